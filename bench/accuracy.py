"""Accuracy of engines on data sets in the layout that `inspectd evaluate` reads, and what each part of them gives.

    python -m bench.accuracy --data FOLDER     (FOLDER/<set>/train/good, test/..., ground_truth/...)

Beside the folder's sets, ELPV's monocrystalline and polycrystalline cells (package elpv-dataset; 300 good cells by
seed train, the other good ones and all with defect probability 1 are tested). Protocol: the bank is made from all of
train/good. The limit needs good images that the bank has not seen, so the good test images are halved by the seed:
one half calibrates, the other half is tested with all defects. The select split is drawn from train/good.
Three seeds, fixed beforehand. A run that is in the result file already, made with the same options and from the same
sources, is not made again, so that the bench can be run in pieces; docs/accuracy.md is made of it by bench/tables.py.
With --steps in place of --budget a run does not depend on the machine's speed, and no times are recorded: such runs
may share a busy machine, several benches at once with an --out each, and --merge puts their files together.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import click
import cv2
import numpy as np

from bench.record import RESULTS, ROOT, origin, write_result
from daemon.errors import DataError
from daemon.inspection.pipeline import Pipeline
from daemon.score import open_pipeline, read_image
from trainer.evaluate import evaluate

SEEDS = (0, 1, 2)
ELPV = ("elpv-mono", "elpv-poly")
_ELPV_TRAIN = 300
_KEYS = ("imageAuroc", "imageAp", "pixelAuroc", "aupro", "pixelAp", "f1AtLimit", "falseRejectRate", "escapeRate")
_PLAIN = ["--size", "256", "--coreset", "4000", "--k", "9", "--alpha", "0"]
_FIXED = ["--budget", "0", "--branches", "ldknn"]
# Fixed settings but for the part in question, so that it alone makes the difference.
_TUNED, _REPAIR = [*_PLAIN, "--branches", "ldknn"], [*_PLAIN, "--branches", "repair"]
# Options of build_engines.py for each variant; --budget-ms and --budget come from the command line.
VARIANTS: dict[str, list[str]] = {
    "1-NN": [*_FIXED, *_PLAIN],
    "LDKNN fixed": [*_FIXED, *_PLAIN[:-1], "0.25"],
    "LDKNN chosen": ["--branches", "ldknn"],
    "1-NN, DefectMaker": [*_TUNED, "--finetune", "classes"],
    "1-NN, outline": [*_TUNED, "--finetune", "outline"],
    "repair": _REPAIR,
    "repair, ordinary denoising": [*_REPAIR, "--noise", "input-only"],
    "repair without noise": [*_REPAIR, "--noise", "none"],
    "repair of the image": [*_REPAIR, "--repair", "image"],
    "fused": [],
}


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--sets", default="", help="Names, comma separated; default: all in the folder, and ELPV's two.")
@click.option("--variants", default="", help="Names, separated by a semicolon; default: all.")
@click.option("--budget", type=float, default=2.0, show_default=True, help="Minutes, as of build_engines.py.")
@click.option("--steps", type=click.IntRange(min=1), default=None, help="Of each training, in place of --budget.")
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--budget-ms", type=float, default=30.0, show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--out", default="accuracy.json", show_default=True, help="File name below bench/results.")
@click.option("--merge", multiple=True, help="Take in the runs of this file below bench/results first.")
def main(
    *, data: Path, sets: str, variants: str, budget: float, steps: int | None, threads: int, budget_ms: float,
    seeds: str, out: str, merge: tuple[str, ...],
) -> None:  # fmt: skip
    """Build and evaluate what is not in the result file yet, and write it after each run."""
    found = sorted(path.parent.name for path in data.glob("*/train") if (path / "good").is_dir())
    names = sets.split(",") if sets else [*found, *ELPV]
    chosen = variants.split(";") if variants else list(VARIANTS)
    unknown = [name for name in names if name not in (*found, *ELPV)] + [
        name for name in chosen if name not in VARIANTS
    ]
    if unknown:
        raise DataError(f"found {unknown}, wanted sets of {[*found, *ELPV]} and variants of {list(VARIANTS)}")
    result: dict[str, Any] = {"runs": {}}
    for file in (out, *merge):
        path = RESULTS / file
        found = json.loads(path.read_text())["runs"] if path.exists() else {}
        result["runs"] = {**found, **result["runs"]}  # what is there already stays: it may have been timed
    length = ["--budget", str(budget)] if steps is None else ["--steps", str(steps)]
    for seed in map(int, seeds.split(",") if seeds else ()):
        for name in names:
            for variant in chosen:
                given = [*length, "--budget-ms", str(budget_ms)]
                one(result, data, name, variant, seed=seed, budget=given, out=out, threads=threads)
    if merge:
        write_result(out, {**about(), "protocol": __doc__, **result, "summary": summarise(result["runs"].values())})


def about() -> dict[str, Any]:
    return origin("torch", "openvino", "numpy", "scikit-learn", "opencv-python-headless")


def one(
    result: dict[str, Any], data: Path, name: str, variant: str, *, seed: int, budget: list[str], out: str, threads: int
) -> None:
    """One run, unless it is there; a fixed variant takes no budget."""
    options = VARIANTS[variant] + ([] if "--budget" in VARIANTS[variant] else budget)
    key = f"{name} | {variant} | {' '.join(options)} | seed {seed}"
    if key in result["runs"]:
        return
    made = about()
    run = one_run(data, name, [*options, "--threads", str(threads)], seed)
    if "--steps" in budget:
        run |= {"buildSeconds": None, "msAFrame": None}
    result["runs"][key] = {"set": name, "variant": variant, "options": options, "seed": seed, **run, "origin": made}
    result["summary"] = summarise(result["runs"].values())
    write_result(out, {**made, "protocol": __doc__, **result})
    shown = {key: round(run[key], 4) for key in ("imageAuroc", "pixelAuroc", "buildSeconds", "msAFrame") if run[key]}
    print(key, shown, flush=True)


def one_run(data: Path, name: str, options: list[str], seed: int) -> dict[str, Any]:
    """Build with this seed in a temporary place and evaluate; adds ms a frame and build seconds."""
    with tempfile.TemporaryDirectory(prefix="inspectd-accuracy-") as temporary:
        place = Path(temporary)
        folder = write_elpv(place / name, name, seed) if name in ELPV else data / name
        calibration, tested = halve(folder, place, seed)
        command = [sys.executable, str(ROOT / "build_engines.py"), name, "--good", str(folder / "train" / "good")]
        command += ["--calibration", str(calibration), "--seed", str(seed), *options]
        started = time.monotonic()
        built = subprocess.run(command, cwd=place, check=True, capture_output=True, text=True)
        build_seconds = time.monotonic() - started
        bundle = (place / built.stdout.strip().splitlines()[-1]).resolve()
        pipeline = open_pipeline(bundle, place / "keys" / "trusted.yaml")
        found = evaluate(pipeline, tested, name)
        manifest = pipeline.bundle.manifest
        kept = ("settings:", "fine-tuning kept", "fine-tuning not", "repair weight", "repair of ")
        return {
            **{key: found[key] for key in _KEYS},
            "n": found["n"],
            "bound95": manifest.products[name].bound95,
            "buildSeconds": build_seconds,
            "msAFrame": time_a_frame(pipeline, calibration),
            "size": manifest.preprocessing.size,
            "said": [line for line in built.stderr.splitlines() if line.startswith(kept)],
        }


def time_a_frame(pipeline: Pipeline, folder: Path) -> float:
    """Median milliseconds from a decoded frame to its map, over at most 50 frames."""
    spent = []
    for path in sorted(folder.iterdir())[:50]:
        frame = read_image(path)
        started = time.perf_counter()
        pipeline.anomaly_map(frame)
        spent.append(1000 * (time.perf_counter() - started))
    return median(spent)


def write_elpv(folder: Path, name: str, seed: int) -> Path:
    """The cells of one kind as image files in the usual layout."""
    from elpv_dataset.utils import load_dataset

    images, probability, kind = load_dataset()
    of_kind = kind == name.removeprefix("elpv-")
    good = np.random.default_rng(seed).permutation(np.flatnonzero(of_kind & (probability == 0)))
    parts = {"train/good": good[:_ELPV_TRAIN], "test/good": good[_ELPV_TRAIN:]}
    parts["test/defective"] = np.flatnonzero(of_kind & (probability == 1))
    for part, chosen in parts.items():
        (folder / part).mkdir(parents=True)
        for number, index in enumerate(chosen):
            cv2.imwrite(str(folder / part / f"{number:04}.png"), images[index])
    return folder


def halve(folder: Path, place: Path, seed: int) -> tuple[Path, Path]:
    """(a folder with one half of test/good, a test folder with the other half and all defects), as links."""
    good = sorted((folder / "test" / "good").iterdir())
    order = np.random.default_rng(seed).permutation(len(good))
    calibration, tested = place / "calibration", place / "tested"
    calibration.mkdir()
    (tested / "test" / "good").mkdir(parents=True)
    for rank, index in enumerate(order):
        target = calibration if rank < len(good) // 2 else tested / "test" / "good"
        (target / good[index].name).symlink_to(good[index].resolve())
    for defect in sorted(path for path in (folder / "test").iterdir() if path.is_dir() and path.name != "good"):
        (tested / "test" / defect.name).symlink_to(defect.resolve())
    if (folder / "ground_truth").is_dir():
        shutil.copytree(folder / "ground_truth", tested / "ground_truth", symlinks=True)
    return calibration, tested


def summarise(runs: Any) -> dict[str, Any]:
    """Mean and standard deviation over the seeds: {set: {variant with its budget: {figure: {mean, std, seeds}}}}."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        options = run["options"]
        budget = "" if "--k" in options else f", {float(options[options.index('--budget-ms') + 1]):g} ms"
        groups.setdefault((run["set"], run["variant"] + budget), []).append(run)
    summary: dict[str, Any] = {}
    for (name, variant), members in sorted(groups.items()):
        figures = {}
        for key in (*_KEYS, "bound95", "buildSeconds", "msAFrame"):
            values = [run[key] for run in members if run[key] is not None]
            if values:
                spread = stdev(values) if len(values) > 1 else None
                figures[key] = {"mean": mean(values), "std": spread, "seeds": len(values)}
        summary.setdefault(name, {})[variant] = figures
    return summary


if __name__ == "__main__":
    main()
