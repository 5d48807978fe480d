"""Golden frames: a few images, kept with their scores, on which every machine must prove itself.

Three good ones from the calibration split (lowest, median, near the limit) and one made bad, so that
both outcomes are replayed. None lies so near the limit that the tolerance could turn its outcome.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from daemon.bundle import GoldenFrame, Product
from daemon.errors import DataError
from daemon.inspection.pipeline import Pipeline
from daemon.types import FloatArray, Frame, Outcome, PixelArray
from trainer.dataset import Picture, read_frame
from trainer.progress import warn

# Fractions of (limit - medianGood). f32: other summation orders on other processors; bf16, fp16: 8 and 11 bits.
TOLERANCE = {"f32": 0.001, "bf16": 0.02, "fp16": 0.02}
_MARGIN = 0.05  # of (limit - medianGood): more than twice the widest tolerance
_REJECT_MARGIN = 0.5
_STEPS = 12


@dataclass(frozen=True)
class Golden:
    """A frame with what is expected of it."""

    frame: Frame
    score: float
    outcome: Outcome


def pick_golden(pipeline: Pipeline, pictures: Sequence[Picture], scores: FloatArray, product: Product) -> list[Golden]:
    """Up to three good frames and a spoilt one; `scores` (n,) are the pictures', from this pipeline.

    Raises DataError where the engine rejects nothing that is done to a frame: it would be blind.
    """
    span = product.limit - product.medianGood
    order = np.argsort(scores, kind="stable")
    safe = [int(index) for index in order if scores[index] <= product.limit - _MARGIN * span]
    chosen = dict.fromkeys([safe[0], int(order[(len(order) - 1) // 2]), safe[-1]] if safe else [])
    golden = [Golden(read_frame(pictures[index].path), float(scores[index]), Outcome.PASS) for index in chosen]
    if not golden:
        warn("the calibration scores are all but equal: no good frame is far enough from the limit to be golden")
    median = read_frame(pictures[int(order[(len(order) - 1) // 2])].path)
    wanted, least = (product.limit + margin * span for margin in (_REJECT_MARGIN, _MARGIN))
    if pipeline.bundle.manifest.kind != "foreign":
        least = wanted  # a map of our own has no end: one that does not get there is blind
    return [*golden, spoil_until_rejected(pipeline, median, wanted, least)]


def spoil_until_rejected(pipeline: Pipeline, frame: Frame, wanted: float, least: float) -> Golden:
    """The frame with a soft-edged ellipse on it, grown and deepened until its score reaches `wanted`.

    A model whose values end somewhere may never reach that: its worst frame will do from `least` on.
    """
    worst: Golden | None = None
    for step in range(1, _STEPS + 1):
        spoilt = replace(frame, pixels=_paste_ellipse(frame.pixels, step / _STEPS))
        score = pipeline.anomaly_map(spoilt).score
        if worst is None or score > worst.score:
            worst = Golden(spoilt, score, Outcome.REJECT)
        if score >= wanted:
            return worst
    if worst is not None and worst.score >= least:
        return worst
    raise DataError(
        f"the engine gives {score:.4g} to a good frame half covered by a patch, wanted {least:.4g} or more: it cannot "
        "tell good from bad; look at the training images (are there bad ones, or other scenes, among them?), and with "
        "a model from elsewhere at its pixels, colours and output: a higher value has to mean a worse part"
    )


def _paste_ellipse(pixels: PixelArray, strength: float) -> PixelArray:
    """An ellipse in the middle, dark where the frame is bright and bright where it is dark; `strength` in 0..1."""
    height, width = pixels.shape[:2]
    rows, columns = np.mgrid[:height, :width]
    radius = 0.05 + 0.3 * strength  # of each side
    away = np.hypot((rows - height / 2) / (radius * height), (columns - width / 2) / (radius * width))
    opacity = min(1.0, 2.0 * strength) * np.clip((1.2 - away) / 0.4, 0.0, 1.0)[:, :, None]
    # The camera's full scale, as far as its pixels tell it: 12 bits in a 16-bit file stay 12 bits.
    full_scale = 2 ** max(8, int(pixels.max()).bit_length()) - 1
    colour = 0 if float(pixels[away < 1.0].mean()) > 0.5 * full_scale else full_scale
    spoilt: PixelArray = np.rint(pixels * (1.0 - opacity) + colour * opacity).astype(pixels.dtype)
    return spoilt


def write_golden(folder: Path, name: str, golden: Sequence[Golden]) -> list[GoldenFrame]:
    """Store the frames losslessly as golden/<number>.png below `folder`, after others; the manifest's entries."""
    place = folder / "golden"
    place.mkdir(exist_ok=True)
    entries = []
    for number, item in enumerate(golden, len(list(place.iterdir()))):
        file = f"golden/{number}.png"
        done, data = cv2.imencode(".png", np.ascontiguousarray(item.frame.pixels[:, :, ::-1]))
        if not done:
            raise DataError(f"{file}: OpenCV cannot encode a frame of shape {item.frame.pixels.shape} as PNG")
        (folder / file).write_bytes(data.tobytes())
        entries.append(GoldenFrame(file=file, product=name, score=item.score, outcome=item.outcome.value))
    return entries
