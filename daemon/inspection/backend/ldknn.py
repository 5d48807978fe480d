"""The search for the nearest row on the GPU: its memory and its launches, in FP16 (ldknn.cu) or INT8 (ldknn_int8.cu).

INT8 is twice the tensor cores' rate and half the bytes, but no GPU has said yet what it gains; until one has
(bench/gpu_check.sh times both), FORM stays fp16. What INT8 finds is in docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from daemon.errors import DeviceError
from daemon.inspection.backend import search
from daemon.types import FloatArray

FORM: Literal["fp16", "int8"] = "fp16"
_THREADS = (256, 1, 1)


class Search:
    """A bank on the device, ready for `patches` queries a frame; `buffers` are by name, for taps."""

    def __init__(
        self,
        bank: Mapping[str, FloatArray],
        alpha: float,
        patches: int,
        *,
        multiprocessors: int,
        upload: Callable[[npt.NDArray[Any]], Any],
        allocate: Callable[[int], Any],
    ) -> None:
        """Raises DeviceError for a bank that FP16 cannot hold."""
        core = bank["core"]
        self._is_int8 = FORM == "int8"
        self._bank_rows, self._channels = core.shape
        self._alpha, self._patches = np.float32(alpha), patches
        kept = search.KEPT if self._is_int8 else 1
        arrays = self._in_int8(core) if self._is_int8 else _in_fp16(core)
        rows = arrays["bank"]
        self._rows, self._padded = rows.shape
        self.buffers = {name: upload(values) for name, values in arrays.items()}
        self.buffers |= {name: upload(bank[name]) for name in ("core", "density")}
        sizes = {"queries": rows.itemsize * patches * self._padded, "keys": 8 * patches * kept}
        sizes |= {"ldknn": 4 * patches, "winners": 4 * patches}
        self.buffers |= {name: allocate(size) for name, size in sizes.items()}
        blocks = search.INT8_BLOCKS_A_MULTIPROCESSOR if self._is_int8 else search.BLOCKS_A_MULTIPROCESSOR
        self.blocks, self._tiles_a_split = search.split(patches, self._rows, multiprocessors, blocks)

    def _in_int8(self, core: FloatArray) -> dict[str, npt.NDArray[Any]]:
        whole = search.quantise_bank(core)
        self._inverse = whole.inverse
        return {"bank": whole.rows, "bias": whole.bias, "centre": whole.centre}

    def enqueue(self, launch: Callable[..., None], features: Any) -> None:
        """features (P C) f32 on the device -> the buffers `ldknn` (P) f32 and `winners` (P) i32."""
        b, name = self.buffers, "ldknn_int8" if self._is_int8 else "ldknn"
        centre, inverse = ([b["centre"]], [self._inverse]) if self._is_int8 else ([], [])
        launch(
            f"{name}_round", (-(-self._patches * self._padded // 1024), 1), _THREADS,
            features, *centre, b["queries"], b["keys"], *inverse, self._patches, self._channels, self._padded,
        )  # fmt: skip
        launch(
            f"{name}_search", self.blocks, _THREADS,
            b["queries"], b["bank"], b["bias"], b["keys"], self._patches, self._rows, self._padded, self._tiles_a_split,
            shared_bytes=search.SHARED_BYTES,
        )  # fmt: skip
        launch(
            f"{name}_finish", (-(-self._patches // 8), 1), _THREADS,
            features, b["core"], b["density"], b["keys"], b["ldknn"], b["winners"],
            self._alpha, self._patches, self._bank_rows, self._channels,
        )  # fmt: skip


def _in_fp16(core: FloatArray) -> dict[str, npt.NDArray[Any]]:
    rounded, bias = search.pad_bank(core)
    if not np.isfinite(rounded).all():
        raise DeviceError("features of the bank are beyond FP16 (65504); use backend.kind cpu")
    return {"bank": rounded, "bias": bias}
