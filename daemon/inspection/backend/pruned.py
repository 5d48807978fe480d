"""The CPU's exact search with pruning: nearest_cpu.c rules most rows out by a bound, and measures the rest in float32.

The bound is Cauchy-Schwarz in the bank's own principal axes: |q - c|^2 >= |q|^2 + |c|^2 - 2 (q_K.c_K + |q_R| |c_R|).
With the bank's K = 48 widest axes few rows are left once the row of the best bound has been measured.
Everything here is rounded so that the bound stays one: a row is measured for nothing now and then, never missed.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import EXTENSION_SUFFIXES
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov

from daemon.types import FloatArray

log = logging.getLogger("inspectd.nearest")

_AXES = 48
_BLOCK, _TILE = 48, 8  # as in nearest_cpu.c
_UNIT = 2.0**-24
_NAME = "_nearest"

Rows = npt.NDArray[np.int32]


def load_library(folder: Path = Path(__file__).parent) -> ctypes.CDLL | None:
    """What setup compiled from nearest_cpu.c; None where there was no compiler, or it was one for another machine."""
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"{_NAME}{suffix}"
        if path.exists():
            try:
                return ctypes.CDLL(str(path))
            except OSError as error:
                log.warning("compiled search cannot be loaded, OpenVINO searches: %s", error)
    return None


class PrunedRows:
    """Searches `bank` for the features (P C) in `source`, which are read in place; on so many threads."""

    def __init__(self, library: ctypes.CDLL, bank: Mapping[str, FloatArray], source: ov.Tensor, threads: int) -> None:
        core = np.ascontiguousarray(bank["core"], np.float32)
        patches, channels = source.shape
        self._library, self._tensor, self._core = library, source, core
        self._source: FloatArray = source.data
        assert self._source.flags.c_contiguous
        assert self._source.dtype == np.float32
        self._centre = core.mean(axis=0, dtype=np.float64).astype(np.float32)
        centred = core.astype(np.float64) - self._centre
        axes = _principal_axes(centred)
        self._axes = np.ascontiguousarray(axes, np.float32)
        held = axes.shape[1]
        # How far the computed products may be from the true ones, as a share of |q| |c|: the projection and the sum.
        self._slack = 2.0 * (channels + held + 8) * _UNIT
        self._longest = float(np.sqrt(np.square(centred).sum(1).max()))
        self._packed, self._bias = _pack(centred, axes, self._slack)
        self._centred = np.empty((patches, channels), np.float32)
        self._projected = np.zeros((-(-patches // _TILE) * _TILE, held + 1), np.float32)
        self._row = np.empty(patches, np.int32)
        self._distance_sq = np.empty(patches, np.float32)
        self._threshold = np.empty(patches, np.float32)
        # The calling thread takes a share, too. Shares begin at whole tiles.
        edges = np.linspace(0, -(-patches // _TILE), threads + 1).round().astype(int) * _TILE
        self._shares = [(int(a), int(min(b, patches))) for a, b in pairwise(edges) if a < b]
        self._bounds = {share: np.empty((_TILE, len(self._bias)), np.float32) for share in self._shares}
        self._helpers = ThreadPoolExecutor(max(1, len(self._shares) - 1), "inspectd-search")

    def find(self) -> tuple[Rows, FloatArray]:
        """(row (P,), squared distance (P,)) for the features that are in the source now; good until the next call."""
        self._project()
        *others, own = self._shares
        waiting = [self._helpers.submit(self._search, share) for share in others]
        self._search(own)
        for each in waiting:
            each.result()
        return self._row, self._distance_sq

    def _project(self) -> None:
        """The features in the bank's axes, the length of what is left, and the bar that a row must reach."""
        held, patches = self._axes.shape[1], len(self._source)
        with np.errstate(invalid="ignore", over="ignore"):  # features that are no numbers: their distance will say so
            centred = np.subtract(self._source, self._centre, out=self._centred)
            projected = np.matmul(centred, self._axes)
            length_sq = np.einsum("pc,pc->p", centred, centred)
            left_sq = np.maximum(length_sq - np.einsum("pk,pk->p", projected, projected), 0)
            rounding = self._slack * (np.sqrt(length_sq) + self._longest) ** 2
            np.subtract(0.5 * length_sq, rounding, out=self._threshold, casting="same_kind")
            np.sqrt(left_sq + np.float32(self._slack) * length_sq, out=self._projected[:patches, held])
        self._projected[:patches, :held] = projected

    def _search(self, share: tuple[int, int]) -> None:
        self._library.inspectd_nearest(
            *share, len(self._core), len(self._bias), self._core.shape[1], self._projected.shape[1],
            *(_address(array) for array in (
                self._projected, self._source, self._packed, self._bias, self._core, self._threshold,
                self._bounds[share], self._row, self._distance_sq)),
        )  # fmt: skip

    def close(self) -> None:
        self._helpers.shutdown(wait=False)


def _address(array: npt.NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _principal_axes(centred: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(C K): the axes along which the bank spreads most."""
    _, vectors = np.linalg.eigh(centred.T @ centred)
    return np.ascontiguousarray(vectors[:, ::-1][:, :_AXES])


def _pack(
    centred: npt.NDArray[np.float64], axes: npt.NDArray[np.float64], slack: float
) -> tuple[FloatArray, FloatArray]:
    """(M/B K+1 B) the rows in the axes and the length of what is left, and (M,) -|c|^2 / 2, padded to whole blocks."""
    rows, held = len(centred), axes.shape[1]
    padded = -(-rows // _BLOCK) * _BLOCK
    table = np.zeros((padded, held + 1))
    table[:rows, :held] = centred @ axes
    length_sq = np.square(centred).sum(1)
    left_sq = length_sq - np.square(table[:rows, :held]).sum(1)
    table[:rows, held] = np.sqrt(np.maximum(left_sq, 0.0) + slack * length_sq)
    bias = np.full(padded, -np.inf)
    bias[:rows] = -0.5 * length_sq
    blocks = table.reshape(-1, _BLOCK, held + 1).transpose(0, 2, 1)
    return np.ascontiguousarray(blocks, np.float32), bias.astype(np.float32)
