"""How ldknn.cu wants its bank and its blocks, and how the kernels order floats: NumPy alone, shared with the checks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from daemon.types import FloatArray

# ldknn.cu's own: queries and bank rows of a block, its copies under way, channels are padded to a multiple of STEP.
BLOCK_QUERIES, BLOCK_ROWS, STAGES, STEP = 128, 128, 3, 32
SHARED_BYTES = STAGES * (BLOCK_QUERIES + BLOCK_ROWS) * STEP * 2
_BLOCKS_A_MULTIPROCESSOR = 2
_NO_ROW = np.float32(-3e38)  # the bias of rows that only fill the last block
_AT_ONCE = 8192  # rows: float64 of a large bank is gigabytes


def pad_bank(core: FloatArray) -> tuple[npt.NDArray[np.float16], FloatArray]:
    """(M C) -> rows in FP16, padded with zeros, and their bias. What FP16 cannot hold becomes infinite.

    The bias -|m|^2 / 2 is of the ROUNDED rows, else near rows change places.
    """
    rows, channels = core.shape
    rounded = np.zeros((_up_to(rows, BLOCK_ROWS), _up_to(channels, STEP)), np.float16)
    with np.errstate(over="ignore"):
        rounded[:rows, :channels] = core
    bias = np.full(len(rounded), _NO_ROW, np.float32)
    for start in range(0, rows, _AT_ONCE):
        part = slice(start, min(start + _AT_ONCE, rows))
        bias[part] = -0.5 * np.square(rounded[part].astype(np.float64)).sum(1)
    return rounded, bias


def split(queries: int, rows: int, multiprocessors: int) -> tuple[tuple[int, int], int]:
    """(the grid: blocks of queries, splits of the bank; tiles of the bank a split), to fill the GPU once."""
    down, tiles = -(-queries // BLOCK_QUERIES), rows // BLOCK_ROWS
    wanted = max(1, min(tiles, _BLOCKS_A_MULTIPROCESSOR * multiprocessors // down))
    tiles_a_split = -(-tiles // wanted)
    return (down, -(-tiles // tiles_a_split)), tiles_a_split


def from_ordered(bits: int) -> float:
    """The float whose order primitives.cuh wrote as an unsigned integer; NaN is the largest."""
    plain = bits ^ 0x80000000 if bits >> 31 else ~bits & 0xFFFFFFFF
    return float(np.array([plain], np.uint32).view(np.float32)[0])


def _up_to(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
