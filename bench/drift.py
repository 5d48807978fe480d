"""How soon is a dimmed lamp or a blurred lens told, and how often is nothing told as something?

    python -m bench.drift --data FOLDER       (FOLDER/<set>/train/good and test/good)

The daemon's own pipeline and watch (daemon/watch.py), without sockets, on real frames. For each seed the good images of
both folders are mixed, so that nothing but chance is between them; two thirds build an engine (build_engines.py
--budget 0 --coreset 1000), the last third is the line. As taken, in a row of its own: train/good builds, test/good
is the line, which may be another capture. First every frame of the line once, in random order; then the same frames,
order after order, with a fault: 15 % less light, or a Gaussian blur of --sigma pixels of the camera's frame. Told: the
alarms before the fault, after how many faulty frames (at most 400) DRIFT and SETUP were out, and what share of these
frames the engine rejects.

False alarms: for n calibration scores drawn from the engine's own calibration scores (and from a uniform distribution),
each time other ones, the limit of them, and 100,000 scores of passed parts from the same distribution; after an alarm
the test is reset. The same for the figures of the frames.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import click
import cv2
import numpy as np
import numpy.typing as npt

from bench.record import RESULTS, ROOT, origin, write_result
from daemon.config import Camera
from daemon.inspection.drift import BETWEEN_FALSE_ALARMS, RankTest, passing_scores
from daemon.inspection.pipeline import Pipeline
from daemon.inspection.quality import SetupTest
from daemon.inspection.tensors import load_calibration
from daemon.record.metrics import Metrics
from daemon.score import open_pipeline
from daemon.types import Frame, Outcome, RawFrame, Verdict
from daemon.watch import DRIFT, SETUP, Watch
from trainer.calibrate import conformal_limit
from trainer.dataset import list_images, read_frame

CALIBRATIONS = (30, 100, 300)
SCORES = 100_000
AS_TAKEN = "as taken"
_DIM = 0.85
_MOST = 400  # faulty frames
_TIMED = 200


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--sets", default="", help="Names, comma separated; default: all in the folder.")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--sigma", type=click.FloatRange(0, min_open=True), default=2.0, show_default=True, help="Of the blur.")
@click.option("--runs", type=click.IntRange(1), default=10, show_default=True, help="Simulations of each n.")
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--out", default="drift.json", show_default=True, help="File name below bench/results.")
def main(*, data: Path, sets: str, seeds: str, sigma: float, runs: int, threads: int, out: str) -> None:
    """Build, replay, simulate; written at the end."""
    names = sets.split(",") if sets else sorted(path.parent.name for path in data.glob("*/train"))
    result: dict[str, Any] = {
        **origin("openvino", "numpy", "opencv-python-headless"),
        "protocol": __doc__,
        "scoresBetweenFalseAlarms": BETWEEN_FALSE_ALARMS,
        "sigma": sigma,
        "sets": {},
        "falseAlarms": {},
        "setupFalseAlarms": {},
    }
    result["falseAlarms"]["uniform"] = false_alarms(np.linspace(0, 1, 100_001), runs)
    for name in names:
        result["sets"][name] = found = {}
        for split in [*seeds.split(","), AS_TAKEN]:
            with tempfile.TemporaryDirectory(prefix="inspectd-drift-") as temporary:
                good, line = divide(Path(temporary), data / name, split)
                pipeline = build(Path(temporary), name, good, threads)
                found[split] = replay(pipeline, name, [read_frame(path) for path in line], split, sigma)
                print(name, split, json.dumps(found[split]), flush=True)
                if split == AS_TAKEN:
                    population = np.array(load_calibration(pipeline.bundle)[name])
                    result["falseAlarms"][name] = false_alarms(population, runs)
                    result["setupFalseAlarms"][name] = setup_false_alarms(pipeline, name, runs)
                pipeline.backend.close()
        write_result(out, result)
    print(RESULTS.joinpath(out).relative_to(ROOT))


def divide(place: Path, folder: Path, split: str) -> tuple[Path, list[Path]]:
    """(a folder of good images to build from, the line's images)."""
    train, test = (list_images(folder / kind / "good") for kind in ("train", "test"))
    if split == AS_TAKEN:
        return folder / "train" / "good", test
    pool = train + test
    order = np.random.default_rng(int(split)).permutation(len(pool))
    mixed = [pool[index].resolve() for index in order]
    good, count = place / "good", len(pool) * 2 // 3
    good.mkdir()
    for number, path in enumerate(mixed[:count]):
        (good / f"{number:04}{path.suffix}").symlink_to(path)
    return good, mixed[count:]


def build(place: Path, name: str, good: Path, threads: int) -> Pipeline:
    command = [sys.executable, str(ROOT / "build_engines.py"), name, "--good", str(good.resolve()), "--budget", "0"]
    command += ["--coreset", "1000", "--threads", str(threads)]
    built = subprocess.run(command, cwd=place, check=True, stdout=subprocess.PIPE, text=True)
    bundle = (place / built.stdout.strip().splitlines()[-1]).resolve()
    return open_pipeline(bundle, place / "keys" / "trusted.yaml", threads=threads)


# Frames


def dim(frame: Frame) -> Frame:
    return replace(frame, pixels=np.rint(frame.pixels * _DIM).astype(frame.pixels.dtype))


def blur(frame: Frame, sigma: float) -> Frame:
    blurred = cv2.GaussianBlur(frame.pixels, (0, 0), sigma)
    return replace(frame, pixels=blurred.reshape(frame.pixels.shape))


def inspect(pipeline: Pipeline, name: str, frame: Frame) -> Verdict:
    pixels = frame.pixels
    kind = "RGB8" if pixels.shape[2] == 3 else "Mono16" if pixels.dtype == np.uint16 else "Mono8"
    shape = pixels.shape if kind == "RGB8" else pixels.shape[:2]
    payload = memoryview(pixels.tobytes())
    verdict = pipeline.inspect(RawFrame("cam1", "e", 0, None, 0, "raw", shape, kind, None, payload), name)
    assert verdict.score is not None
    return verdict


def replay(pipeline: Pipeline, name: str, frames: list[Frame], split: str, sigma: float) -> dict[str, Any]:
    """Frames until the alarm, by fault. Each frame is judged once; a replay only changes the order."""
    kinds = {"unchanged": frames, "dimmed": [dim(each) for each in frames]}
    kinds["blurred"] = [blur(each, sigma) for each in frames]
    verdicts = {kind: [inspect(pipeline, name, frame) for frame in shown] for kind, shown in kinds.items()}
    seed = 0 if split == AS_TAKEN else int(split)
    found: dict[str, Any] = {
        "calibrationScores": len(pipeline.references[name].scores),
        "frames": len(frames),
        "gaugeMs": time_gauge(pipeline, name, frames[0]),
    }
    for kind, judged in verdicts.items():
        rejected = sum(each.outcome is Outcome.REJECT for each in judged) / len(judged)
        shown = [] if kind == "unchanged" else judged
        found[kind] = {"rejected": rejected, **until_alarm(pipeline, verdicts["unchanged"], shown, seed)}
    return found


def in_orders(verdicts: list[Verdict], rng: np.random.Generator) -> Iterator[Verdict]:
    while True:
        yield from (verdicts[index] for index in rng.permutation(len(verdicts)))


def until_alarm(pipeline: Pipeline, before: list[Verdict], shown: list[Verdict], seed: int) -> dict[str, Any]:
    """After how many of the frames each alarm was out; `early` are the alarms before the first of them."""
    rng = np.random.default_rng(seed)
    watch = Watch({"cam1": Camera(product="part", deadline_ms=1, valid_ms=1)}, Metrics())
    for index in rng.permutation(len(before)):
        watch.feed("cam1", pipeline, before[index])
    early = watch.words
    found: dict[str, Any] = {"early": list(early), DRIFT: None, SETUP: None}
    for number, verdict in enumerate(islice(in_orders(shown, rng), _MOST if shown else 0), 1):
        watch.feed("cam1", pipeline, verdict)
        for word in set(watch.words) - set(early):
            found[word] = found[word] or number
    facts = next(iter(watch.status()["cam1"].values()))
    statistics = {name: round(facts[name], 3) for name in ("driftStatistic", "setupStatistic")}
    first = min((found[word] for word in (DRIFT, SETUP) if found[word]), default=None)
    return {**found, "first": first, "alarms": facts["alarms"], **statistics}


def time_gauge(pipeline: Pipeline, name: str, frame: Frame) -> float:
    """Median milliseconds of the figures of one frame."""
    gauge = pipeline.references[name].gauge
    assert gauge is not None
    pipeline.backend.run(frame)
    spent = []
    for _ in range(_TIMED):
        started = time.perf_counter()
        gauge.measure(pipeline.backend.network_input())
        spent.append(1000 * (time.perf_counter() - started))
    return median(spent)


# False alarms


def false_alarms(population: npt.NDArray[np.float64], runs: int) -> dict[str, Any]:
    """Alarms in 100,000 scores of passed parts, for each n: of every run, and their mean."""
    found = {}
    for n in CALIBRATIONS:
        counts, spent_s = [], 0.0
        for seed in range(runs):
            rng = np.random.default_rng([seed, n])
            scores = rng.choice(population, n).astype(np.float32)
            limit = conformal_limit(scores, 0.01).limit
            reference = passing_scores(scores.tolist(), limit)
            stream = rng.choice(population[population < limit], SCORES).astype(np.float32).tolist()
            started = time.perf_counter()
            counts.append(count_alarms(reference, stream))
            spent_s += time.perf_counter() - started
        mean = sum(counts) / runs
        found[str(n)] = {"mean": mean, "runs": counts, "microsecondsAScore": 1e6 * spent_s / runs / SCORES}
        print(f"n {n}: {mean} false alarms in {SCORES}", flush=True)
    return found


def count_alarms(reference: list[float], stream: list[float]) -> int:
    test, alarms = RankTest(reference), 0
    for score in stream:
        test.add(score)
        if test.evidence >= BETWEEN_FALSE_ALARMS:
            test, alarms = RankTest(reference), alarms + 1
    return alarms


def setup_false_alarms(pipeline: Pipeline, name: str, runs: int) -> dict[str, Any]:
    """The same for the figures of frames, drawn from the calibration images', with n as the engine has them."""
    images = {figure: np.array(values) for figure, values in pipeline.references[name].images.items()}
    counts = []
    for seed in range(max(1, runs // 5)):
        rng = np.random.default_rng(seed)
        references = {figure: rng.choice(values, len(values)).tolist() for figure, values in images.items()}
        test, alarms = SetupTest(references), 0
        streams = {figure: rng.choice(values, SCORES).tolist() for figure, values in images.items()}
        for index in range(SCORES):
            test.add({figure: stream[index] for figure, stream in streams.items()})
            if test.evidence >= BETWEEN_FALSE_ALARMS:
                test, alarms = SetupTest(references), alarms + 1
        counts.append(alarms)
    return {"frames": SCORES, "mean": sum(counts) / len(counts), "runs": counts}


if __name__ == "__main__":
    main()
