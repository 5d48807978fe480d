"""Resampling and smoothing as operators, and as tables for the kernels: which input cells make an output cell.

An operator is a matrix (outputs inputs) whose rows are zero but for a band; a table keeps the bands alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from daemon.types import FloatArray

if TYPE_CHECKING:  # this file is also for machines that have NumPy alone
    from daemon.bundle import Fusion


@dataclass(frozen=True)
class Table:
    """first (outputs,): each output's first input; weights (outputs taps), zero past its band."""

    first: npt.NDArray[np.int32]
    weights: FloatArray

    @property
    def taps(self) -> int:
        return int(self.weights.shape[1])


def resampling(size: int, length: int) -> Table:
    """From `length` pixels to `size`: the mean of what lies under each where they shrink, bilinear where they grow."""
    if size > length:
        return _bilinear(size, length)
    edges = np.arange(size + 1) * (length / size)
    first = np.minimum(np.floor(edges[:-1]).astype(np.int64), length - 1)
    taps = int(np.max(np.ceil(edges[1:] - 1e-9) - first))
    pixels = first[:, None] + np.arange(taps)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    weights = np.clip(overlap, 0.0, None) / (length / size)
    weights[weights < 1e-9] = 0.0  # what is left of an edge that is a whole number
    return Table(first.astype(np.int32), np.ascontiguousarray(weights, np.float32))


def _bilinear(size: int, length: int) -> Table:
    """Pixel centres aligned at the edges' halves; past the outermost centres, the outermost pixel."""
    position = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0.0, length - 1.0)
    first = np.minimum(np.floor(position).astype(np.int64), max(length - 2, 0))
    share = position - first
    weights = np.stack([1.0 - share, share], axis=1)
    if length == 1:
        weights = np.ones((size, 1))
    return Table(first.astype(np.int32), np.ascontiguousarray(weights, np.float32))


def banded(operator: FloatArray) -> Table:
    """An operator (outputs inputs) as a table; what is below a millionth of its largest weight is left out."""
    is_kept = np.abs(operator) > 1e-6 * np.abs(operator).max()
    first = is_kept.argmax(1)
    last = operator.shape[1] - 1 - is_kept[:, ::-1].argmax(1)
    taps = int((last - first).max()) + 1
    first = np.minimum(first, operator.shape[1] - taps)
    rows = np.arange(len(operator))[:, None]
    inputs = first[:, None] + np.arange(taps)
    weights = np.where(is_kept[rows, inputs], operator[rows, inputs], 0.0)
    return Table(first.astype(np.int32), np.ascontiguousarray(weights, np.float32))


def smoothing_operator(size: int, cells: int, sigma: float) -> FloatArray:
    """(size cells): bilinear upsampling (pixel centres aligned at the edges' halves) followed by a Gaussian.

    Both are linear and separable, so that `rows @ grid @ columns.T` is the smoothed map. The Gaussian
    reaches four sigma and is mirrored at the border without repeating the edge pixel.
    """
    position = (np.arange(size) + 0.5) * cells / size - 0.5
    low = np.floor(position).astype(int)
    fraction = position - low
    upsample = np.zeros((size, cells))
    pixels = np.arange(size)
    np.add.at(upsample, (pixels, np.clip(low, 0, cells - 1)), 1.0 - fraction)
    np.add.at(upsample, (pixels, np.clip(low + 1, 0, cells - 1)), fraction)
    reach = int(np.ceil(4.0 * sigma))
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (offsets / (sigma or 1.0)) ** 2)  # with sigma 0 the one offset is 0
    weights /= weights.sum()
    period = max(2 * (size - 1), 1)
    gaussian = np.zeros((size, size))
    for offset, weight in zip(offsets, weights, strict=True):
        mirrored = np.abs((pixels + offset + period) % period)
        np.add.at(gaussian, (pixels, np.where(mirrored < size, mirrored, period - mirrored)), weight)
    return (gaussian @ upsample).astype(np.float32)


def score_of(values: FloatArray, rule: str) -> float:
    """A part's score from its map (h w): its maximum, or with `top1pct` the mean of its highest hundredth (CRR)."""
    if rule == "max":
        return float(values.max())
    highest = max(1, values.size // 100)
    return float(np.partition(values, values.size - highest, axis=None)[-highest:].mean(dtype=np.float64))


def branch_scaling(fusion: Fusion, branch: str) -> tuple[np.float32, np.float32]:
    """(centre, factor): a branch's scores s enter the map as (s - centre) * factor."""
    standard = fusion.standardisation[branch]
    return np.float32(standard.centre), np.float32(fusion.weights[branch]) / np.float32(standard.scale)
