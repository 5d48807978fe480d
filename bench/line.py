"""The line's speed on this machine: `inspectd bench` in f32 and bf16 on one engine, recorded with its origin.

    python -m bench.line                 (an engine from rendered 300x300 parts, 256x256 input, 4,000 rows)

Machines are shared and noisy: the settings take turns in `--rounds` rounds, every round is recorded, and
`quietest` names for each setting the round with the lowest median. Writes bench/results/line.json.
Nothing is timed while the line is wrong (adapters/bench.py refuses).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from adapters.bench import Setting, measure
from adapters.simulate import load_pictures
from bench.record import ROOT, origin, write_result
from daemon.bundle import open_bundle
from daemon.keys import load_trusted
from examples.parts import write_dataset

GOOD = 300
SIZE_HW = (300, 300)


@click.command()
@click.option("--frames", type=click.IntRange(100), default=500, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option(
    "--good", type=click.IntRange(10), default=GOOD, show_default=True, help="Images the engine is built from."
)
def main(frames: int, rounds: int, good: int) -> None:
    """Build once, measure each setting, write bench/results/line.json."""
    with tempfile.TemporaryDirectory(prefix="inspectd-line-") as name:
        place = Path(name)
        write_dataset(place / "parts", good_train=good, good_test=40, defects_each=1, size_hw=SIZE_HW)
        command = [sys.executable, str(ROOT / "build_engines.py"), "part", "--good", str(place / "parts/train/good")]
        command += ["--budget", "0"]  # fixed settings and one branch: the same work on every machine
        started = time.monotonic()
        subprocess.run(command, cwd=place, check=True, stdout=subprocess.DEVNULL)
        build_seconds = time.monotonic() - started
        trusted = place / "keys" / "trusted.yaml"
        bundle = open_bundle(place / "engines/part/current", load_trusted(trusted))
        pictures = load_pictures(place / "parts" / "test")
        settings = [Setting("f32", 2), Setting("f32", 1), Setting("bf16", 2)]
        runs: list[dict[str, Any]] = []
        for setting in settings * rounds:
            runs.append(measure(bundle, trusted, pictures, frames, setting))
            stages = runs[-1]["stages"]
            print(setting, {key: stages[key] for key in ("totalMs", "ownMs")}, runs[-1]["throughputPerS"])
        result = {
            **origin("openvino", "numpy", "pyzmq", "opencv-python-headless"),
            "frameHw": list(SIZE_HW),
            "networkHw": list(bundle.manifest.preprocessing.size),
            "bankRows": 4000,
            "goodImages": good,
            "buildSeconds": round(build_seconds, 1),
            "quietest": [quietest(runs, setting) for setting in settings],
            "runs": runs,
        }
    print(write_result("line.json", result).relative_to(ROOT))


def quietest(runs: list[dict[str, Any]], setting: Setting) -> dict[str, Any]:
    """The run of this setting whose median time from arrival to verdict is the lowest."""
    own = [run for run in runs if (run["precision"], run["threads"]) == (setting.precision, setting.threads)]
    return min(own, key=lambda run: run["stages"]["totalMs"]["p50"])


if __name__ == "__main__":
    main()
