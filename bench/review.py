"""Do rejects that look alike fall into one group, and does an engine learn from rejects that were good?

    python -m bench.review [--data FOLDER]       (FOLDER/<set>/train/good and test/<kind>)

Groups: the rejects of an engine (build_engines.py --budget 0; rendered parts of 128 pixels, real ones at 192) among a
set's labelled test images, by the grouping of `inspectd review groups`, with the engine's network and without it.
The adjusted Rand index holds the groups against the kinds (1: the same division; 0: no better than chance); purity is
the share of rejects that are of their group's most frequent kind, which is what a click on a group gets right;
`decisions` the number of groups, for so many `rejects`. Rendered parts are examples/parts.py's; each seed has its own
parts and engine.

Learning: on rendered parts something is taken for harmless: a dot of paint, always the same, or a stain, each of its
own shape. Of an engine's rejected parts with it some are added (build_engines.py --add), and both engines judge other
such parts, good parts and the other kinds of defect.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import click
import cv2
import numpy as np
import numpy.typing as npt

from adapters.review.groups import cluster
from adapters.review.look import EngineLook, Look, PlainLook
from bench.record import ROOT, origin, write_result
from daemon.inspection.pipeline import Pipeline, to_frame_size
from daemon.inspection.verdict import region_mask
from daemon.score import open_pipeline
from daemon.types import ByteArray, Frame, Outcome
from examples.parts import DEFECTS, render_part, with_paint_dot, write_dataset
from trainer.dataset import list_images, read_frame

SIZE = (128, 128)
RENDERED = ("--size", "128", "--coreset", "1000")
REAL = ("--size", "192", "--coreset", "1000")
_HARMLESS = ("dot of paint", "stain")
_ADDED = (5, 20)
_JUDGED = 60  # of each kind


@dataclass(frozen=True)
class Found:
    """A rejected test image: its kind, its regions as the daemon records them, and their mask."""

    kind: str
    frame: Frame
    regions: list[dict[str, Any]]
    mask: ByteArray


def build(place: Path, good: Path, *options: str) -> Pipeline:
    """A quick engine, opened."""
    command = [sys.executable, str(ROOT / "build_engines.py"), "part", "--good", str(good), "--out", str(place / "e")]
    command += ["--keys", str(place / "keys"), "--budget", "0", "--false-reject", "0.05", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return open_pipeline(Path(done.stdout.split()[-1]), place / "keys/trusted.yaml")


def rejected(pipeline: Pipeline, test: Path) -> list[Found]:
    """What the engine rejects of test/<kind>, good ones included: a false reject is a look of its own."""
    found = []
    limit = pipeline.limits("part").map
    for kind in sorted(path for path in test.iterdir() if path.is_dir()):
        for path in list_images(kind):
            frame = read_frame(path)
            anomaly = pipeline.anomaly_map(frame)
            verdict = pipeline.judge(anomaly, "part")
            if verdict.outcome is Outcome.REJECT:
                mask = to_frame_size(region_mask(anomaly, limit), anomaly.frame_hw)
                found.append(Found(kind.name, frame, [asdict(region) for region in verdict.regions], mask))
    return found


def described(look: Look, found: list[Found]) -> npt.NDArray[np.float32]:
    return np.stack([look.describe(each.frame, each.regions, each.mask) for each in found])


def agreement(vectors: npt.NDArray[np.float32], kinds: list[str], scale: float) -> dict[str, Any]:
    """The figures of one grouping."""
    from sklearn.metrics import adjusted_rand_score

    groups = cluster(vectors, scale)
    labels = np.empty(len(kinds), int)
    right = 0
    for number, rows in enumerate(groups):
        labels[rows] = number
        right += Counter(kinds[row] for row in rows).most_common(1)[0][1]
    return {
        "rejects": len(kinds),
        "decisions": len(groups),
        "adjustedRandIndex": round(float(adjusted_rand_score(kinds, labels)), 3),
        "purity": round(right / len(kinds), 3),
    }


def grouping(pipeline: Pipeline, test: Path) -> dict[str, Any]:
    """By each look."""
    found = rejected(pipeline, test)
    engine = EngineLook(pipeline.bundle)
    looks: list[Look] = [engine, PlainLook()]
    figures: dict[str, Any] = {"kinds": dict(Counter(each.kind for each in found))}
    for look in looks:
        figures[look.name] = agreement(described(look, found), [each.kind for each in found], look.scale)
    engine.close()
    return figures


def shares(pipeline: Pipeline, folders: dict[str, list[Path]]) -> dict[str, float]:
    """How much of each the engine passes."""
    return {
        name: round(
            mean(
                pipeline.judge(pipeline.anomaly_map(read_frame(path)), "part").outcome is Outcome.PASS for path in paths
            ),
            3,
        )
        for name, paths in folders.items()
    }


def learning(place: Path, seed: int) -> dict[str, list[dict[str, Any]]]:
    """By what was called harmless: shares that pass, before and with so many rejected parts added."""
    parts = place / "learn"
    write_dataset(parts, good_train=90, good_test=_JUDGED, defects_each=2 * _JUDGED, size_hw=SIZE, seed=100 + seed)
    _write_dotted(parts / "test/dot of paint", 2 * _JUDGED, seed)
    before = build(place, parts / "train/good", *RENDERED)
    folders = {kind: list_images(parts / "test" / kind)[_JUDGED:] for kind in ("dot of paint", *DEFECTS)}
    folders["good"] = list_images(parts / "test/good")
    found = {}
    for harmless in _HARMLESS:
        rows = [{"added": 0, **shares(before, folders)}]
        turned = [path for path in list_images(parts / "test" / harmless)[:_JUDGED] if _is_rejected(before, path)]
        for count in _ADDED:
            folder = place / f"{harmless}-{count}"
            folder.mkdir()
            for path in turned[:count]:
                (folder / path.name).write_bytes(path.read_bytes())
            after = build(place, parts / "train/good", *RENDERED, "--add", str(folder))
            rows.append({"added": len(turned[:count]), **shares(after, folders)})
            after.backend.close()
        found[harmless] = rows
    before.backend.close()
    return found


def _write_dotted(folder: Path, count: int, seed: int) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        part = 50_000_000 + 1_000_000 * seed + number
        cv2.imwrite(str(folder / f"{number:03d}.png"), with_paint_dot(render_part(part, size_hw=SIZE)[0], part))


def _is_rejected(pipeline: Pipeline, path: Path) -> bool:
    return pipeline.judge(pipeline.anomaly_map(read_frame(path)), "part").outcome is Outcome.REJECT


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Real sets, besides.")
@click.option("--sets", default="", help="Names, comma separated; default: all in the folder.")
@click.option("--seeds", type=click.IntRange(1), default=2, show_default=True)
@click.option("--out", default="review.json", show_default=True, help="File name below bench/results.")
def main(*, data: Path | None, sets: str, seeds: int, out: str) -> None:
    """Build, judge, group, learn; written at the end."""
    cv2.setNumThreads(1)
    result: dict[str, Any] = {
        **origin("openvino", "numpy", "opencv-python-headless", "scikit-learn"),
        "protocol": __doc__,
        "groups": {},
        "learning": [],
    }
    for seed in range(seeds):
        with tempfile.TemporaryDirectory(prefix="inspectd-review-") as name:
            place = Path(name)
            write_dataset(place / "parts", good_train=90, good_test=30, defects_each=30, size_hw=SIZE, seed=seed)
            pipeline = build(place, place / "parts/train/good", *RENDERED, "--seed", str(seed))
            result["groups"][f"rendered parts, seed {seed}"] = grouping(pipeline, place / "parts/test")
            pipeline.backend.close()
            print(json.dumps(result["groups"]), flush=True)
            result["learning"].append(learning(place, seed))
            print(json.dumps(result["learning"][-1]), flush=True)
    names = [name for name in sets.split(",") if name]
    if data is not None:
        for folder in sorted(path.parent for path in data.glob("*/train")):
            if names and folder.name not in names:
                continue
            with tempfile.TemporaryDirectory(prefix="inspectd-review-") as name:
                pipeline = build(Path(name), folder / "train/good", *REAL)
                result["groups"][folder.name] = grouping(pipeline, folder / "test")
                pipeline.backend.close()
                print(json.dumps(result["groups"][folder.name]), flush=True)
    print(write_result(out, result))


if __name__ == "__main__":
    main()
