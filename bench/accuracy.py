"""Accuracy of the default engine on data sets in the layout that `inspectd evaluate` reads.

    python -m bench.accuracy --data FOLDER     (FOLDER/<set>/train/good, test/..., ground_truth/...)

Protocol: the bank is made from all of train/good. The limit needs good images that the bank has not
seen, so the good test images are halved by the seed: one half calibrates, the other half is tested with
all defects. Mean and spread over three seeds, fixed beforehand; options are the trainer's defaults.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
import numpy as np

from bench.record import ROOT, origin, write_result
from daemon.errors import DataError
from daemon.score import open_pipeline
from trainer.evaluate import evaluate

SEEDS = (0, 1, 2)
_KEYS = ("imageAuroc", "imageAp", "pixelAuroc", "aupro", "pixelAp", "f1AtLimit", "falseRejectRate", "escapeRate")


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--sets", default="", help="Names, comma separated; default: every folder that has train/good and test.")
@click.option("--alpha", type=float, default=0.25, show_default=True)
@click.option("--k", type=int, default=9, show_default=True)
@click.option("--size", type=int, default=256, show_default=True)
@click.option("--coreset", type=int, default=4000, show_default=True)
@click.option("--out", default="accuracy.json", show_default=True, help="File name below bench/results.")
def main(data: Path, sets: str, alpha: float, k: int, size: int, coreset: int, out: str) -> None:  # noqa: PLR0917
    """Build, evaluate, write bench/results/accuracy.json."""
    names = (
        sets.split(",")
        if sets
        else sorted(path.parent.name for path in data.glob("*/train") if (path / "good").is_dir())
    )
    if not names:
        raise DataError(f"{data}: found no <set>/train/good; wanted the layout that `inspectd evaluate` reads")
    options = {"alpha": alpha, "k": k, "size": size, "coreset": coreset}
    result: dict[str, Any] = {
        **origin("torch", "openvino", "numpy", "scikit-learn", "opencv-python-headless"),
        "options": options,
        "seeds": list(SEEDS),
        "protocol": "bank: train/good; limit: half of test/good by seed; test: the other half and all defects",
        "sets": {},
    }
    for name in names:
        runs = [one_run(data / name, options, seed) for seed in SEEDS]
        result["sets"][name] = summarise(runs)
        print(
            name,
            {key: round(value["mean"], 4) for key, value in result["sets"][name].items() if isinstance(value, dict)},
        )
    print(write_result(out, result).relative_to(ROOT))


def one_run(folder: Path, options: dict[str, Any], seed: int) -> dict[str, Any]:
    """Build with this seed in a temporary place and evaluate; adds ms a frame and build seconds."""
    with tempfile.TemporaryDirectory(prefix="inspectd-accuracy-") as name:
        place = Path(name)
        calibration, tested = halve(folder, place, seed)
        command = [
            sys.executable,
            str(ROOT / "build_engines.py"),
            folder.name,
            "--good",
            str(folder / "train" / "good"),
        ]
        command += ["--select", str(calibration), "--calibration", str(calibration), "--seed", str(seed)]
        command += [word for key, value in options.items() for word in (f"--{key}", str(value))]
        started = time.monotonic()
        built = subprocess.run(command, cwd=place, check=True, stdout=subprocess.PIPE, text=True)
        build_seconds = time.monotonic() - started
        bundle = (place / built.stdout.strip().splitlines()[-1]).resolve()
        pipeline = open_pipeline(bundle, place / "keys" / "trusted.yaml")
        started = time.monotonic()
        found = evaluate(pipeline, tested, folder.name)
        ms_a_frame = 1000 * (time.monotonic() - started) / found["n"]
        product = pipeline.bundle.manifest.products[folder.name]
        return {
            **{key: found[key] for key in _KEYS},
            "bound95": product.bound95,
            "buildSeconds": build_seconds,
            "evaluateMsAFrame": ms_a_frame,
        }


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


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of whatever all runs have."""
    summary = {}
    for key in runs[0]:
        values = [run[key] for run in runs]
        known = all(value is not None for value in values)
        summary[key] = {"mean": mean(values), "std": stdev(values), "runs": values} if known else None
    return summary


if __name__ == "__main__":
    main()
