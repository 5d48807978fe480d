"""The CPU's search by OpenVINO: for each patch the nearest row of the memory bank, by squared L2.

It is that of precision bf16, and of f32 where pruned.py's was not compiled.

One OpenVINO graph maximises q.m - |m|^2 / 2, so that the score matrix (P M) never leaves it. The distance is then
taken again in float32 from the two vectors themselves: no cancellation and no low precision enters a score.
In bf16 every operand and result is rounded to 8 bits, and the nearest row may look like the second. So what is summed
there is kept small: bank and features are centred, and both half norms ride along as channels, in pieces that bf16
holds exactly, so that a result is minus half the squared distance itself. Then each block of the bank (they stay in
the cache) names its best row, and the best two of these are compared in float32. What that gives: docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov
from openvino import opset13 as ops

from daemon.errors import DeviceError
from daemon.types import FloatArray

_BLOCK_ROWS, _FEWEST_BLOCKS = 512, 8
_COMPARED = 2  # blocks' best rows, in bf16
_PIECES = 3  # of 8 bits, for float32's 24

Rows = npt.NDArray[np.int32]


class NearestRows:
    """Searches `bank` for the features (P C) in `source`, which are read in place."""

    def __init__(self, bank: Mapping[str, FloatArray], source: ov.Tensor, options: Mapping[str, Any]) -> None:
        self._core = bank["core"]
        patches, channels = source.shape
        self._source = source
        self._difference = np.empty((patches, channels), np.float32)
        self._centre: FloatArray | None = None
        if options["INFERENCE_PRECISION_HINT"] == "bf16":
            self._centre = self._core.mean(axis=0, dtype=np.float64).astype(np.float32)
            self._query = np.ones((patches, channels + 2 * _PIECES), np.float32)
            model, given = (
                _in_blocks(patches, _widen_bank(self._core - self._centre)),
                ov.Tensor(self._query, shared_memory=True),
            )
        else:
            model, given = _whole(patches, bank), source
        self._request = ov.Core().compile_model(model, "CPU", dict(options)).create_infer_request()
        self._request.set_input_tensor(given)

    def find(self) -> tuple[Rows, FloatArray]:
        """(row (P,), squared distance (P,)) for the features that are in the source now. Raises DeviceError."""
        if self._centre is not None:
            self._widen_query(self._centre)
        try:
            self._request.infer()
        except RuntimeError as error:
            raise DeviceError(f"OpenVINO failed: {error}") from error
        candidates: Rows = self._request.get_output_tensor(0).data
        rows = candidates[:, 0]
        distance_sq = self._distance_sq(rows)
        for others in candidates.T[1:]:
            other_sq = self._distance_sq(others)
            closer = other_sq < distance_sq
            rows, distance_sq = np.where(closer, others, rows), np.where(closer, other_sq, distance_sq)
        return rows, distance_sq

    def close(self) -> None:
        del self._request

    def _widen_query(self, centre: FloatArray) -> None:
        """[q - centre, 1 1 1, the pieces of -|q - centre|^2 / 2], as _widen_bank's rows want it."""
        channels = len(centre)
        centred = np.subtract(self._source.data, centre, out=self._query[:, :channels])
        self._query[:, channels + _PIECES :] = _in_pieces(-0.5 * np.einsum("pc,pc->p", centred, centred))

    def _distance_sq(self, rows: Rows) -> FloatArray:
        # The indices come from the search over this very bank; `clip` only spares NumPy a buffer.
        difference = np.take(self._core, rows, axis=0, out=self._difference, mode="clip")
        np.subtract(self._source.data, difference, out=difference)
        distance_sq: FloatArray = np.einsum("pc,pc->p", difference, difference)
        return distance_sq


def _whole(patches: int, bank: Mapping[str, FloatArray]) -> Any:
    """features (P C) -> the nearest row (P 1)."""
    features = ops.parameter([patches, bank["core"].shape[1]], np.float32)
    _, row = _best(features, bank["core"], bank["bias"])
    return ov.Model([ops.result(row)], [features], "search")


def _widen_bank(centred: FloatArray) -> FloatArray:
    """(M C) -> (M C+6): [m, the pieces of -|m|^2 / 2, 1 1 1]."""
    half_norms = (-0.5 * np.square(centred, dtype=np.float64).sum(1)).astype(np.float32)
    return np.concatenate([centred, _in_pieces(half_norms), np.ones((len(centred), _PIECES), np.float32)], axis=1)


def _in_pieces(values: FloatArray) -> FloatArray:
    """(N,) -> (N 3) that add up to the values, each of at most 8 significant bits, which bf16 holds exactly."""
    pieces = np.empty((len(values), _PIECES), np.float32)
    left = values
    with np.errstate(invalid="ignore"):  # infinite features: the distance itself will say so
        for number in range(_PIECES):
            pieces[:, number] = (left.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
            left = left - pieces[:, number]
    return pieces


def _in_blocks(patches: int, core: FloatArray) -> Any:
    """widened features (P C+6) -> the best rows (P 2) of two blocks, (P 1) where the bank is a single row."""
    block_rows = min(_BLOCK_ROWS, -(-len(core) // _FEWEST_BLOCKS))
    features = ops.parameter([patches, core.shape[1]], np.float32)
    values, rows = [], []
    for start in range(0, len(core), block_rows):
        value, row = _best(features, core[start : start + block_rows])
        values.append(value)
        rows.append(ops.add(row, ops.constant(np.int32(start))).output(0))
    best = ops.topk(ops.concat(values, 1), ops.constant(min(_COMPARED, len(rows))), 1, "max", "value")
    found = ops.gather_elements(ops.concat(rows, 1), best.output(1), 1)
    return ov.Model([ops.result(found.output(0))], [features], "search")


def _best(features: Any, core: FloatArray, bias: FloatArray | None = None) -> tuple[Any, Any]:
    """(value (P 1), index (P 1) in `core`) of the row that maximises q.m, plus the bias if any."""
    product = ops.matmul(features, ops.constant(np.ascontiguousarray(core.T)), False, False)
    similarity = product if bias is None else ops.add(product, ops.constant(bias[None]))
    winner = ops.topk(similarity, ops.constant(1), 1, "max", "none")
    return winner.output(0), winner.output(1)
