"""The CPU's search: for each patch the nearest row of the memory bank, by squared L2.

One OpenVINO graph maximises q.m - |m|^2 / 2, so that the score matrix (P M) never leaves it. The distance is then
taken again in float32 from the two vectors themselves: no cancellation and no low precision enters a score.
In bf16 a product is off by up to 1/256, and the nearest row may look like the second: so the bank is centred, which
keeps the products small, its blocks (they stay in the cache) each name their best row, and the best two of these are
compared in float32. On solar cells that finds the nearest row for 99.8 % of the patches, bf16 alone for 97 %.
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

_BLOCK_ROWS = 512
_COMPARED = 2  # blocks' best rows, in bf16

Rows = npt.NDArray[np.int32]


class NearestRows:
    """Searches `bank` for the features (P C) in `source`, which are read in place."""

    def __init__(self, bank: Mapping[str, FloatArray], source: ov.Tensor, options: Mapping[str, Any]) -> None:
        self._core = bank["core"]
        patches, channels = source.shape
        in_bf16 = options["INFERENCE_PRECISION_HINT"] == "bf16"
        model = (_in_blocks if in_bf16 else _whole)(patches, bank)
        self._request = ov.Core().compile_model(model, "CPU", dict(options)).create_infer_request()
        self._request.set_input_tensor(source)
        self._source = source
        self._difference = np.empty((patches, channels), np.float32)

    def find(self) -> tuple[Rows, FloatArray]:
        """(row (P,), squared distance (P,)) for the features that are in the source now. Raises DeviceError."""
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


def _in_blocks(patches: int, bank: Mapping[str, FloatArray]) -> Any:
    """features (P C) -> the best rows (P 2) of two blocks, (P 1) where the bank is a single one."""
    core = bank["core"]
    centre = core.mean(axis=0, dtype=np.float64)
    centred = (core - centre).astype(np.float32)
    bias = (-0.5 * np.square(centred, dtype=np.float64).sum(1)).astype(np.float32)
    features = ops.parameter([patches, core.shape[1]], np.float32)
    shifted = ops.subtract(features, ops.constant(centre.astype(np.float32)[None]))
    values, rows = [], []
    for start in range(0, len(core), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        value, row = _best(shifted, centred[block], bias[block])
        values.append(value)
        rows.append(ops.add(row, ops.constant(np.int32(start))).output(0))
    best = ops.topk(ops.concat(values, 1), ops.constant(min(_COMPARED, len(rows))), 1, "max", "value")
    found = ops.gather_elements(ops.concat(rows, 1), best.output(1), 1)
    return ov.Model([ops.result(found.output(0))], [features], "search")


def _best(features: Any, core: FloatArray, bias: FloatArray) -> tuple[Any, Any]:
    """(value (P 1), index (P 1) in `core`) of the row that maximises q.m + bias."""
    product = ops.matmul(features, ops.constant(np.ascontiguousarray(core.T)), False, False)
    winner = ops.topk(ops.add(product, ops.constant(bias[None])), ops.constant(1), 1, "max", "none")
    return winner.output(0), winner.output(1)
