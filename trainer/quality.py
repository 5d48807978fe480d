"""How the good images look: what the daemon holds a camera's frames against (daemon/inspection/quality.py).

The mean picture comes from the training images and the figures from the calibration images, which had no part in it: so
a frame of the line differs from the mean picture in the same way as they do, however few they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from daemon.bundle import Preprocessing
from daemon.inspection.backend.cpu import normalise
from daemon.inspection.quality import Gauge, thumbnail
from daemon.types import FloatArray, Frame


def thumbnails(frames: Iterable[Frame], preprocessing: Preprocessing) -> FloatArray:
    """(n 64 64), of the frames as the network sees them."""
    gauge = Gauge(preprocessing)
    return np.stack([thumbnail(gauge.gray(normalise(frame, preprocessing)[0])) for frame in frames])


def figures(
    frames: Iterable[Frame], means: Sequence[FloatArray] | FloatArray, preprocessing: Preprocessing
) -> dict[str, FloatArray]:
    """By name the figures (n,) of the frames, lowest first; `means` (64 64) is one for all, or one for each."""
    found: dict[str, list[float]] = {}
    single = Gauge(preprocessing, np.asarray(means)) if np.ndim(means) == 2 else None
    for index, frame in enumerate(frames):
        gauge = single or Gauge(preprocessing, np.asarray(means[index]))
        for name, value in gauge.measure(normalise(frame, preprocessing)[0]).items():
            found.setdefault(name, []).append(value)
    return {name: np.sort(np.array(values, np.float32)) for name, values in found.items()}


def without_each(pictures: FloatArray) -> FloatArray:
    """(n 64 64) -> for each the mean of the others; its own where it is the only one."""
    count = len(pictures)
    return pictures if count == 1 else (pictures.sum(0) - pictures) / np.float32(count - 1)


def tensors(product: str, mean: FloatArray, found: dict[str, FloatArray]) -> dict[str, FloatArray]:
    """What quality.safetensors holds of a product."""
    named = {f"{product}/{name}": values for name, values in found.items()}
    return {**named, f"{product}/thumbnail": np.ascontiguousarray(mean, np.float32)}
