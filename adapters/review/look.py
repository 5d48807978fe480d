"""How the marked place of a reject looks, as numbers (C,): rejects that look alike lie near each other.

Two ways to look. With the engine: what its network sees at the place, less what it knows of good parts there (the
nearest row of the bank), so that the part's own pattern does not count, only what is new on it. Without it: contrast
and texture against the surroundings, which tells kinds apart far worse. Both are joined by the shape of the place. All
scales are fixed, so that a distance means the same whatever else was rejected; they were found by bench/review.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import cv2
import numpy as np

from daemon.bundle import Bundle
from daemon.errors import InspectError
from daemon.inspection.backend.cpu import CpuBackend
from daemon.inspection.decode import to_plain
from daemon.inspection.tensors import load_bank
from daemon.types import ByteArray, FloatArray, Frame

_SIDE = 256  # the longer side at which shapes and contrasts are measured, in pixels
_LEAST_WEIGHT = 1e-9


class Look(Protocol):
    """`name` is told beside groups; `scale` is what of its distances groups.py holds for alike."""

    name: str
    scale: float

    def describe(self, frame: Frame, regions: Sequence[Mapping[str, Any]], mask: ByteArray | None) -> FloatArray:
        """Of a frame (H W C), its regions in pixels and, where it was kept, their mask (H W)."""


class PlainLook:
    """By shape, contrast and texture alone, for rejects whose engine is gone or cannot be opened."""

    name = "plain"
    scale = 0.21

    def describe(self, frame: Frame, regions: Sequence[Mapping[str, Any]], mask: ByteArray | None) -> FloatArray:
        place = find_place(frame, regions, mask)
        return np.concatenate([0.5 * shape_of(place), contrast_of(frame, place)])


class EngineLook:
    """By the features of an engine's network. The bundle must have the branch ldknn, which has the bank."""

    name = "engine"
    scale = 0.74

    def __init__(self, bundle: Bundle, threads: int = 1) -> None:
        self._grid = bundle.manifest.grid
        self._core = load_bank(bundle)["core"]
        self._backend = CpuBackend(bundle, "f32", threads)

    def describe(self, frame: Frame, regions: Sequence[Mapping[str, Any]], mask: ByteArray | None) -> FloatArray:
        place = find_place(frame, regions, mask)
        features = self._backend.features(self._backend.preprocess(frame))
        rows, distance_sq = self._backend.nearest()
        inside = cv2.resize(place.astype(np.float32), self._grid[::-1], interpolation=cv2.INTER_AREA).ravel()
        weights = inside * np.sqrt(np.maximum(distance_sq, 0.0)) + _LEAST_WEIGHT * (inside > 0)
        mean = weights @ (features - self._core[rows])
        # The direction alone: how far beyond the limit a defect is does not make it another kind.
        seen = mean / max(float(np.linalg.norm(mean)), _LEAST_WEIGHT)
        return np.concatenate([seen, shape_of(place)]).astype(np.float32)

    def close(self) -> None:
        self._backend.close()


def find_place(frame: Frame, regions: Sequence[Mapping[str, Any]], mask: ByteArray | None) -> ByteArray:
    """(h w) of at most 256 on the longer side: 1 in the regions, else 0; their boxes where no mask was kept."""
    height, width = frame.pixels.shape[:2]
    scale = min(1.0, _SIDE / max(height, width))
    size = (max(1, round(scale * width)), max(1, round(scale * height)))
    if mask is not None and mask.shape == (height, width):
        small = cv2.resize(mask, size, interpolation=cv2.INTER_AREA)
        place = (small >= 128).astype(np.uint8)
        if place.any():
            return place
    place = np.zeros(size[::-1], np.uint8)
    for region in regions:
        left, top = int(scale * region["x"]), int(scale * region["y"])
        right, bottom = scale * (region["x"] + region["w"]), scale * (region["y"] + region["h"])
        place[top : max(top + 1, round(bottom)), left : max(left + 1, round(right))] = 1
    if not place.any():
        raise InspectError(f"found no region within a frame of {width} x {height} pixels, wanted one at least")
    return place


def shape_of(place: ByteArray) -> FloatArray:
    """Size, length by width and thickness, as logarithms: (3,)."""
    rows, columns = np.nonzero(place)
    spread = np.cov(np.stack([rows, columns]).astype(np.float64), bias=True) + np.eye(2) / 12.0
    short, long = np.sqrt(np.linalg.eigvalsh(spread))
    thick = float(cv2.distanceTransform(np.pad(place, 1), cv2.DIST_L2, 3).max())
    return np.array([0.25 * np.log(len(rows)), np.log(long / short), 0.5 * np.log(thick)], np.float32)


def contrast_of(frame: Frame, place: ByteArray) -> FloatArray:
    """Against the surroundings: how much brighter or darker, its extremes, how much rougher: (4,)."""
    pixels = to_plain(frame).pixels
    gray = pixels.astype(np.float32).mean(axis=2) / (65535.0 if pixels.dtype == np.uint16 else 255.0)
    small = cv2.resize(gray, place.shape[::-1], interpolation=cv2.INTER_AREA)
    around = cv2.dilate(place, np.ones((13, 13), np.uint8)) & (1 - place)
    inside, outside = small[place > 0], small[around > 0]
    if outside.size == 0:
        outside = small.ravel()
    middle = float(np.median(outside))
    low, high = np.percentile(inside, [5, 95]) - middle
    rough = np.log((inside.std() + 0.01) / (outside.std() + 0.01))
    return np.array([2.0 * (inside.mean() - middle), 2.0 * low, 2.0 * high, 0.5 * rough], np.float32)
