"""The CPU's exact search with pruning: nearest_cpu.c rules most rows out by a bound, and measures the rest in float32.

The bound is Cauchy-Schwarz in the bank's own principal axes: |q - c|^2 >= |q|^2 + |c|^2 - 2 (q_K.c_K + |q_R| |c_R|).
With the bank's K = 48 widest axes few rows are left once the row of the best bound has been measured.
Everything here is rounded so that the bound stays one: a row is measured for nothing now and then, never missed.
There is a form for each width of vectors, and one for AMX (nearest_amx.c); they find the same rows.
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

FORMS = ("portable", "avx2", "avx512", "amx")  # as in nearest_cpu.c
_AXES, _BLOCK, _MOST_TILE, _SKEW = 48, 48, 32, 16  # as in nearest_cpu.h
_WIDEST = 8  # patches at a time whose bounds are kept
_PADDED = 96  # rows: whole blocks, and AMX's 32
_FEWEST_BY_AMX = 1500  # rows
_STEP, _SIDE, _DEPTH = 32, 16, 160  # as in nearest_amx.c
_UNIT, _BF16_PAIR = 2.0**-24, 2.0**-16
_NOWHERE = -3e38  # a bias that no bound can lift
_NAME, _INTERFACE = "_nearest", 2  # as in nearest_cpu.h

Rows = npt.NDArray[np.int32]


class _Bank(ctypes.Structure):
    """nearest_cpu.h's struct bank."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("rows", "padded", "channels", "form")),
        *((name, ctypes.c_float) for name in ("slack", "longest")),
        *((name, ctypes.c_void_p) for name in ("centre", "axes", "packed", "bias", "core", "halves")),
    )


def load_library(folder: Path = Path(__file__).parent) -> ctypes.CDLL | None:
    """What setup compiled from nearest_cpu.c; None without a compiler, or where it was for other machines."""
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"{_NAME}{suffix}"
        if not path.exists():
            continue
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            log.warning("compiled search cannot be loaded, OpenVINO searches: %s", error)
            continue
        if hasattr(library, "inspectd_nearest_interface") and library.inspectd_nearest_interface() == _INTERFACE:
            return library
        log.warning("compiled search %s is another version's, OpenVINO searches: install inspectd again", path)
    return None


def forms_here(library: ctypes.CDLL) -> tuple[str, ...]:
    """The forms that this machine can run, the fastest last."""
    return FORMS[: library.inspectd_nearest_forms()]


def choose_form(library: ctypes.CDLL, rows: int) -> str:
    """The fastest for a bank of so many rows: docs/performance.md."""
    *others, best = forms_here(library)
    return others[-1] if best == "amx" and rows < _FEWEST_BY_AMX else best


class PrunedRows:
    """Searches `bank` for the features (P C) in `source`, which are read in place; on so many threads."""

    def __init__(
        self, library: ctypes.CDLL, bank: Mapping[str, FloatArray], source: ov.Tensor, threads: int, form: str = ""
    ) -> None:
        core = np.ascontiguousarray(bank["core"], np.float32)
        patches, channels = source.shape
        self.form = form or choose_form(library, len(core))
        self._library, self._tensor = library, source
        self._source: FloatArray = source.data
        assert self._source.flags.c_contiguous
        assert self._source.dtype == np.float32
        centre = core.mean(axis=0, dtype=np.float64).astype(np.float32)
        centred = core.astype(np.float64) - centre
        axes = _principal_axes(centred)
        # How far the computed products may be from the true ones, as a share of |q| |c|: the projection and the sums,
        # and what pairs of bf16 leave out. The bar is lowered by it times (|q| + |c|)^2, which is 4 |q| |c| or more.
        slack = 2.0 * (channels + 3 * _AXES + 8) * _UNIT + (_BF16_PAIR if self.form == "amx" else 0.0)
        table, bias = _table(centred, axes, slack)
        halves = _pack_halves(table, bias) if self.form == "amx" else np.empty(0, np.uint16)
        # Kept, since C holds their addresses.
        self._arrays = (centre, np.ascontiguousarray(axes, np.float32), _pack(table), bias, core, halves)
        longest = float(np.sqrt(np.square(centred).sum(1).max()))
        numbers = (len(core), len(bias), channels, FORMS.index(self.form), slack, longest)
        self._bank = _Bank(*numbers, *map(_address, self._arrays))
        self._row = np.empty(patches, np.int32)
        self._distance_sq = np.empty(patches, np.float32)
        # The calling thread takes a share, too. Shares begin at whole tiles.
        edges = np.linspace(0, -(-patches // _MOST_TILE), threads + 1).round().astype(int) * _MOST_TILE
        self._shares = [(int(a), int(min(b, patches))) for a, b in pairwise(edges) if a < b]
        self._bounds = {share: np.empty((_WIDEST, len(bias) + _SKEW), np.float32) for share in self._shares}
        self._helpers = ThreadPoolExecutor(max(1, len(self._shares) - 1), "inspectd-search")

    def find(self) -> tuple[Rows, FloatArray]:
        """(row (P,), squared distance (P,)) for the features that are in the source now; good until the next call."""
        *others, own = self._shares
        waiting = [self._helpers.submit(self._search, share) for share in others]
        self._search(own)
        for each in waiting:
            each.result()
        return self._row, self._distance_sq

    def _search(self, share: tuple[int, int]) -> None:
        arrays = (self._source, self._bounds[share], self._row, self._distance_sq)
        self._library.inspectd_nearest(ctypes.byref(self._bank), *share, *map(_address, arrays))

    def close(self) -> None:
        self._helpers.shutdown(wait=False)


def _address(array: npt.NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _principal_axes(centred: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(C K): the axes along which the bank spreads most, widest first; columns of 0 where there are fewer."""
    _, vectors = np.linalg.eigh(centred.T @ centred)
    axes = np.zeros((len(vectors), _AXES))
    axes[:, : len(vectors)] = vectors[:, ::-1][:, :_AXES]
    return axes


def _table(
    centred: npt.NDArray[np.float64], axes: npt.NDArray[np.float64], slack: float
) -> tuple[npt.NDArray[np.float64], FloatArray]:
    """(M K+1) the rows in the axes and the length of what is left, and (M,) -|c|^2 / 2; M is padded to whole blocks."""
    rows = len(centred)
    padded = -(-rows // _PADDED) * _PADDED
    table = np.zeros((padded, _AXES + 1))
    table[:rows, :_AXES] = centred @ axes
    length_sq = np.square(centred).sum(1)
    left_sq = length_sq - np.square(table[:rows, :_AXES]).sum(1)
    table[:rows, _AXES] = np.sqrt(np.maximum(left_sq, 0.0) + slack * length_sq)
    bias = np.full(padded, _NOWHERE, np.float32)
    bias[:rows] = -0.5 * length_sq
    return table, bias


def _pack(table: npt.NDArray[np.float64]) -> FloatArray:
    """(M K+1) -> (M/B K+1 B)."""
    blocks = table.reshape(-1, _BLOCK, table.shape[1]).transpose(0, 2, 1)
    return np.ascontiguousarray(blocks, np.float32)


def _pack_halves(table: npt.NDArray[np.float64], bias: FloatArray) -> npt.NDArray[np.uint16]:
    """(M K+1) and (M,) -> (M/16 D/32 16 32) in bf16, as nearest_amx.c says."""
    high, low = _pieces(table.astype(np.float32), 2)
    rows = np.zeros((len(bias), _DEPTH), np.uint16)
    given = np.concatenate([high, low, high, _pieces(bias, 3).T], axis=1)
    rows[:, : given.shape[1]] = given
    return np.ascontiguousarray(rows.reshape(-1, _SIDE, _DEPTH // _STEP, _STEP).transpose(0, 2, 1, 3))


def _pieces(values: FloatArray, count: int) -> npt.NDArray[np.uint16]:
    """(count, *shape) bf16, each the nearest to what the ones before leave of the values."""
    pieces = np.empty((count, *values.shape), np.uint16)
    left = values
    for piece in pieces:
        bits = left.view(np.uint32)
        piece[:] = (bits + (0x7FFF + (bits >> 16 & 1)).astype(np.uint32)) >> 16
        left = left - (piece.astype(np.uint32) << 16).view(np.float32)
    return pieces
