"""`inspectd evaluate`: how well an engine tells a labelled folder's good parts from its defective ones.

Layout (MVTec AD's): DIR/test/good, DIR/test/<defect>, and DIR/ground_truth/<defect>/<stem>_mask.png with
0 where the part is good. Without the folder ground_truth the pixel metrics are null. Unlike a build, an
evaluation leaves nothing out: an unreadable image or a missing mask ends it. All maps are held in memory
at their image's size, because pixel metrics rank all pixels together.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from daemon.bundle import open_bundle
from daemon.errors import DataError
from daemon.inspection.backend import PRECISIONS, open_backend
from daemon.inspection.pipeline import Pipeline, map_at_frame_size
from daemon.keys import load_trusted
from daemon.types import ByteArray, FloatArray, Outcome
from trainer.dataset import list_images, read_frame
from trainer.progress import track

_GOOD = "good"


@dataclass(frozen=True)
class Judged:
    """One test image and what the engine said; `kind` is its folder's name."""

    path: Path
    kind: str
    score: float
    is_rejected: bool

    @property
    def is_defective(self) -> bool:
        return self.kind != _GOOD


@dataclass(frozen=True)
class Evaluation:
    """The figures as printed, and the single judgements behind them."""

    figures: dict[str, Any]
    judged: tuple[Judged, ...]


def evaluate(pipeline: Pipeline, folder: Path, product: str) -> dict[str, Any]:
    """The flat figures of one labelled folder. Raises DataError, which names the file at fault."""
    return evaluate_images(pipeline, folder, product).figures


def evaluate_images(pipeline: Pipeline, folder: Path, product: str) -> Evaluation:
    """`evaluate`, with the single judgements."""
    images = _list_test_images(folder)
    truth = folder / "ground_truth"
    judged: list[Judged] = []
    maps: list[FloatArray] = []
    masks: list[ByteArray] = []
    for path, kind in track(images, "test images"):
        anomaly = pipeline.anomaly_map(read_frame(path))
        rejected = pipeline.judge(anomaly, product).outcome is Outcome.REJECT
        judged.append(Judged(path, kind, anomaly.score, rejected))
        if truth.is_dir():
            maps.append(map_at_frame_size(anomaly))
            masks.append(_read_mask(truth, path, kind, anomaly.frame_hw))
    whole = {**_image_figures(judged), **_pixel_figures(masks, maps), "n": len(judged)}
    return Evaluation({**whole, "byDefect": _by_defect(judged)}, tuple(judged))


def _list_test_images(folder: Path) -> list[tuple[Path, str]]:
    test = folder / "test"
    if not test.is_dir():
        raise DataError(f"{test}: found no such folder, wanted {test / _GOOD} and {test / '<defect>'} with images")
    kinds = sorted(path for path in test.iterdir() if path.is_dir())
    if not kinds:
        raise DataError(f"{test}: found no folder in it, wanted one for each kind of part ({_GOOD}, and defects)")
    return [(path, kind.name) for kind in kinds for path in list_images(kind)]


def _read_mask(truth: Path, image: Path, kind: str, frame_hw: tuple[int, int]) -> ByteArray:
    """The image's mask (H W), not 0 where defective; all 0 for a good part."""
    if kind == _GOOD:
        return np.zeros(frame_hw, np.uint8)
    path = truth / kind / f"{image.stem}_mask.png"
    if not path.is_file():
        raise DataError(f"{path}: is missing, wanted a mask for {image}")
    mask = read_frame(path).pixels.max(axis=2)
    if mask.shape != frame_hw:
        found = f"a mask of {mask.shape[1]} x {mask.shape[0]} pixels"
        raise DataError(f"{path}: found {found}, wanted {frame_hw[1]} x {frame_hw[0]} as {image} has")
    return np.where(mask > 0, np.uint8(255), np.uint8(0))


def _image_figures(judged: Sequence[Judged]) -> dict[str, float | None]:
    from trainer.metrics import f1_at, image_ap, image_auroc

    labels = [image.is_defective for image in judged]
    scores = [image.score for image in judged]
    rejected = [image.is_rejected for image in judged]
    return {
        "imageAuroc": image_auroc(labels, scores),
        "imageAp": image_ap(labels, scores),
        "f1AtLimit": f1_at(labels, rejected),
        "falseRejectRate": _share(image.is_rejected for image in judged if not image.is_defective),
        "escapeRate": _share(not image.is_rejected for image in judged if image.is_defective),
    }


def _pixel_figures(masks: Sequence[ByteArray], maps: Sequence[FloatArray]) -> dict[str, float | None]:
    from trainer.metrics import aupro, pixel_ap, pixel_auroc

    return {"pixelAuroc": pixel_auroc(masks, maps), "aupro": aupro(masks, maps), "pixelAp": pixel_ap(masks, maps)}


def _by_defect(judged: Sequence[Judged]) -> dict[str, dict[str, Any]]:
    """Each kind of defect against all good parts."""
    from trainer.metrics import image_auroc

    good = [image for image in judged if not image.is_defective]
    figures = {}
    for kind in sorted({image.kind for image in judged if image.is_defective}):
        images = [image for image in judged if image.kind == kind]
        both = [*good, *images]
        auroc = image_auroc([image.is_defective for image in both], [image.score for image in both])
        escapes = _share(not image.is_rejected for image in images)
        figures[kind] = {"n": len(images), "escapeRate": escapes, "imageAuroc": auroc}
    return figures


def _share(flags: Any) -> float | None:
    """The share of true ones; None where there is nothing to share."""
    values = list(flags)
    return sum(values) / len(values) if values else None


@click.command("evaluate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--product", help="Which product of the bundle; needed where it has several.")
@click.option(
    "--trusted", type=click.Path(path_type=Path), default=Path("keys/trusted.yaml"), show_default=True,
    help="Keys whose bundles are accepted.",
)  # fmt: skip
@click.option(
    "--precision", type=click.Choice(PRECISIONS), default="f32", show_default=True, help="Of the computation."
)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True, help="Inference threads.")
def command(*, bundle: Path, folder: Path, product: str | None, trusted: Path, precision: str, threads: int) -> None:
    """Judge DIR/test with BUNDLE and print image, pixel and limit figures as one JSON object."""
    opened = open_bundle(bundle, load_trusted(trusted))
    name = opened.product(product)
    backend = open_backend(opened, precision=precision, threads=threads)
    try:
        click.echo(json.dumps(evaluate(Pipeline(opened, backend), folder, name)))
    finally:
        backend.close()
