"""One engine for many products (kind crr): what each part of the method gives, and what one for all costs.

    python -m bench.many --data FOLDER --steps 1000    (ELPV comes with elpv-dataset)

Protocol and splits are bench/accuracy.py's. Over all sets together: reconstruction only; with repair; with masking;
with the segmentation (the order of the paper's ablation); then an engine of kind crr for each set alone.
`cosineOnDefects` is how alike encoder and decoder are on patches of real defects, where there are masks: near that of
good patches, the decoder copies what it sees. Runs that are in the result file stay, so that the bench can be run in
pieces. With --memory: the resident memory of a process that has judged with an engine of one product, and of all.
Writes bench/results/many.json; docs/accuracy.md is made of it by bench/tables.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
import cv2
import numpy as np

from bench.accuracy import ELPV, about, halve, time_a_frame, write_elpv
from bench.record import RESULTS, ROOT, write_result
from daemon.errors import DataError
from daemon.inspection.pipeline import Pipeline
from daemon.score import open_pipeline, read_image
from trainer.draft import cpu_backend
from trainer.evaluate import evaluate

VARIANTS = {
    "reconstruction": ("repair", "masking", "segmentation"),
    "+ repair": ("masking", "segmentation"),
    "+ masking": ("segmentation",),
    "+ segmentation": (),
}
ALONE = "each product alone"
_KEYS = ("imageAuroc", "pixelAuroc", "aupro", "imageAp")
_COVERED = 0.5  # of a patch, for it to count as defective
_MEMORY = """
import sys
from pathlib import Path
from daemon.score import open_pipeline, read_image
pipeline = open_pipeline(Path(sys.argv[1]), Path(sys.argv[2]))
for name in sys.argv[3:]:
    pipeline.anomaly_map(read_image(Path(name)))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS")))
"""


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--sets", default="bottle,magnetic_tile,elpv-mono,elpv-poly", show_default=True)
@click.option("--variants", default="", help="Names, separated by a semicolon; default: all.")
@click.option("--steps", type=click.IntRange(min=1), default=None, help="Of the decoder, in place of --budget.")
@click.option("--budget", type=float, default=25.0, show_default=True, help="Minutes, as of build_engines.py.")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--memory", is_flag=True, help="Of one product against all, by the first seed.")
@click.option("--out", default="many.json", show_default=True, help="File name below bench/results.")
def main(
    *, data: Path, sets: str, variants: str, steps: int | None, budget: float, seeds: str, threads: int, memory: bool,
    out: str,
) -> None:  # fmt: skip
    """Build and judge what is not in the result file yet, and write it after each build."""
    chosen = variants.split(";") if variants else [*VARIANTS, ALONE]
    if unknown := [name for name in chosen if name not in (*VARIANTS, ALONE)]:
        raise DataError(f"found variants {unknown}, wanted some of {[*VARIANTS, ALONE]}")
    length = ["--budget", str(budget)] if steps is None else ["--steps", str(steps)]
    path = RESULTS / out
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    for seed in map(int, seeds.split(",")):
        with prepared(data, sets.split(","), seed) as places:
            for variant in chosen:
                groups = [[name] for name in places] if variant == ALONE else [list(places)]
                for group in groups:
                    key = f"{variant} | {','.join(group)} | {' '.join(length)} | seed {seed}"
                    if key in result["runs"]:
                        continue
                    options = [*length, "--seed", str(seed), "--threads", str(threads)]
                    options += [text for part in VARIANTS.get(variant, ()) for text in ("--without", part)]
                    made = about()
                    run = one_run({name: places[name] for name in group}, options)
                    if steps is not None:
                        run["buildSeconds"] = None  # others may have shared the machine
                    result["runs"][key] = {"variant": variant, "seed": seed, "length": length, **run, "origin": made}
                    result["summary"] = summarise(result["runs"].values())
                    write_result(out, {**made, "protocol": __doc__, **result})
                    print(key, {name: round(each["imageAuroc"], 4) for name, each in run["sets"].items()}, flush=True)
            if memory and "memory" not in result:
                result["memory"] = {**measure_memory(places, threads), "origin": about()}
                write_result(out, {**about(), "protocol": __doc__, **result})


@contextmanager
def prepared(data: Path, names: list[str], seed: int) -> Iterator[dict[str, tuple[Path, Path, Path]]]:
    """By set: good images to train on, those to calibrate on, and the labelled folder."""
    with tempfile.TemporaryDirectory(prefix="inspectd-many-") as temporary:
        places = {}
        for name in names:
            place = Path(temporary) / name
            place.mkdir()
            folder = write_elpv(place / "all", name, seed) if name in ELPV else data / name
            calibration, tested = halve(folder, place, seed)
            places[name] = (folder / "train" / "good", calibration, tested)
        yield places


@contextmanager
def built(places: dict[str, tuple[Path, Path, Path]], options: list[str]) -> Iterator[tuple[Path, Path, float, str]]:
    """(bundle, trusted keys, seconds, what the build said)."""
    with tempfile.TemporaryDirectory(prefix="inspectd-many-") as temporary:
        place = Path(temporary)
        command = [sys.executable, str(ROOT / "build_engines.py"), "all", "--kind", "crr", *options]
        for name, (good, calibration, _) in places.items():
            command += ["--good", f"{name}={good}", "--calibration", f"{name}={calibration}"]
        started = time.monotonic()
        done = subprocess.run(command, cwd=place, check=True, capture_output=True, text=True)
        seconds = time.monotonic() - started
        bundle = (place / done.stdout.strip().splitlines()[-1]).resolve()
        yield bundle, place / "keys" / "trusted.yaml", seconds, done.stderr


def one_run(places: dict[str, tuple[Path, Path, Path]], options: list[str]) -> dict[str, Any]:
    with built(places, options) as (bundle, trusted, seconds, said):
        pipeline = open_pipeline(bundle, trusted)
        sets = {}
        for name, (_, calibration, tested) in places.items():
            found = evaluate(pipeline, tested, name)
            figures = {key: found[key] for key in _KEYS} | {"falseRejectRate": found["falseRejectRate"]}
            sets[name] = {**figures, **agreement(pipeline, tested), "msAFrame": time_a_frame(pipeline, calibration)}
        kept = ("decoder:", "segmentation", "network:")
        pipeline.backend.close()
        return {
            "sets": sets,
            "buildSeconds": seconds,
            "said": [line for line in said.splitlines() if line.startswith(kept)],
        }


def agreement(pipeline: Pipeline, tested: Path) -> dict[str, float | None]:
    """Cosine of encoder and decoder on patches of real defects and elsewhere; None where the map is not that alone."""
    truth, training = tested / "ground_truth", pipeline.bundle.manifest.training
    is_pure = all("segmentation" in each["options"]["without"] for each in training.get("products", [training]))
    if not is_pure or not truth.is_dir():
        return {"cosineOnDefects": None, "cosineElsewhere": None}
    backend, grid = cpu_backend(pipeline), pipeline.bundle.manifest.grid
    on, off = [], []
    for path in sorted(truth.glob("*/*_mask.png")):
        image = next((tested / "test" / path.parent.name).glob(f"{path.stem.removesuffix('_mask')}.*"))
        found = backend.infer(backend.preprocess(read_image(image)))["map"].values.reshape(grid)
        mask = (read_image(path).pixels.max(axis=2) > 0).astype(np.float32)
        share = cv2.resize(mask, grid[::-1], interpolation=cv2.INTER_AREA)
        on.append(1.0 - found[share >= _COVERED])
        off.append(1.0 - found[share == 0.0])
    return {
        "cosineOnDefects": float(np.concatenate(on).mean()),
        "cosineElsewhere": float(np.concatenate(off).mean()),
    }


def measure_memory(places: dict[str, tuple[Path, Path, Path]], threads: int) -> dict[str, float]:
    """Resident MB of a process that has judged fifty frames, with an engine of one product and with one of all."""
    found = {}
    for what, group in (("oneProductMb", dict([next(iter(places.items()))])), ("allProductsMb", places)):
        frames = [str(path) for _, calibration, _ in group.values() for path in sorted(calibration.iterdir())][:50]
        with built(group, ["--steps", "200", "--threads", str(threads)]) as (bundle, trusted, _, _):
            command = [sys.executable, "-c", _MEMORY, str(bundle), str(trusted), *frames]
            done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        found[what] = int(done.stdout) / 1024
    return {**found, "ratio": found["allProductsMb"] / found["oneProductMb"]}


def summarise(runs: Any) -> dict[str, Any]:
    """{variant: {set: {figure: {mean, std, seeds}}}}."""
    summary: dict[str, Any] = {}
    for variant in (*VARIANTS, ALONE):
        members = [run for run in runs if run["variant"] == variant]
        for name in dict.fromkeys(name for run in members for name in run["sets"]):
            of_set = [run["sets"][name] for run in members if name in run["sets"]]
            figures = {}
            for key in of_set[0]:
                values = [each[key] for each in of_set if each[key] is not None]
                if values:
                    spread = stdev(values) if len(values) > 1 else None
                    figures[key] = {"mean": mean(values), "std": spread, "seeds": len(values)}
            summary.setdefault(variant, {})[name] = figures
    return summary


if __name__ == "__main__":
    main()
