"""How the searches want bank and blocks, and how the kernels order floats: NumPy alone, shared with the checks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from daemon.types import FloatArray

# ldknn_tile.cuh's own: queries and bank rows of a block, copies under way, bytes of a row that are copied at a time.
BLOCK_QUERIES, BLOCK_ROWS, STAGES, STEP_BYTES = 128, 128, 3, 64
SHARED_BYTES = STAGES * (BLOCK_QUERIES + BLOCK_ROWS) * STEP_BYTES
GROUP_SHARED_BYTES = 3 * 2 * 128 * 128  # ldknn_sm90.cu's: its copies under way, of queries and rows, 128 bytes each
BLOCKS_A_MULTIPROCESSOR, INT8_BLOCKS_A_MULTIPROCESSOR = 2, 1  # as many as their registers leave room for
KEPT = 4  # ldknn_int8.cu's: rows of a query whose distances are taken anew
_NO_ROW, _NO_INT8_ROW = np.float32(-3e38), np.int32(-(2**30))  # the bias of rows that only fill the last block
_INSIDE = 0.9999  # of the bank's values are within INT8's range; the rest is cut off
_SAMPLED_ROWS = 16_384  # for that quantile
_AT_ONCE = 8192  # rows: float64 of a large bank is gigabytes


def pad_bank(core: FloatArray) -> tuple[npt.NDArray[np.float16], FloatArray]:
    """(M C) -> rows in FP16, padded with zeros, and their bias. What FP16 cannot hold becomes infinite.

    The bias -|m|^2 / 2 is of the ROUNDED rows, else near rows change places.
    """
    rows, channels = core.shape
    rounded = np.zeros((_up_to(rows, BLOCK_ROWS), _up_to(channels, STEP_BYTES // 2)), np.float16)
    with np.errstate(over="ignore"):
        rounded[:rows, :channels] = core
    bias = np.full(len(rounded), _NO_ROW, np.float32)
    for start in range(0, rows, _AT_ONCE):
        part = slice(start, min(start + _AT_ONCE, rows))
        bias[part] = -0.5 * np.square(rounded[part].astype(np.float64)).sum(1)
    return rounded, bias


@dataclass(frozen=True)
class Int8Bank:
    """A bank as ldknn_int8.cu wants it: x is stored as round((x - centre) * inverse)."""

    rows: npt.NDArray[np.int8]  # (Np Dp), padded with zeros
    bias: npt.NDArray[np.int32]  # (Np): floor(-|m|^2 / 2) of the rounded row
    centre: FloatArray  # (C)
    inverse: np.float32


def quantise_bank(core: FloatArray) -> Int8Bank:
    """(M C) -> INT8, symmetric about the bank's mean, one scale for all that is in it. See performance.md."""
    rows, channels = core.shape
    centre = core.mean(0, dtype=np.float64).astype(np.float32)
    sample = core[:: -(-rows // _SAMPLED_ROWS)] - centre
    reach = float(np.quantile(np.abs(sample), _INSIDE))
    inverse = np.float32(127.0 / reach if reach > 0 else 1.0)
    rounded = np.zeros((_up_to(rows, BLOCK_ROWS), _up_to(channels, STEP_BYTES)), np.int8)
    bias = np.full(len(rounded), _NO_INT8_ROW)
    for start in range(0, rows, _AT_ONCE):
        part = slice(start, min(start + _AT_ONCE, rows))
        rounded[part, :channels] = np.clip(np.rint((core[part] - centre) * inverse), -127, 127)
        bias[part] = -((np.square(rounded[part].astype(np.int32)).sum(1) + 1) // 2)
    return Int8Bank(rounded, bias, centre, inverse)


def split(
    queries: int, rows: int, multiprocessors: int, blocks: int = BLOCKS_A_MULTIPROCESSOR
) -> tuple[tuple[int, int], int]:
    """(the grid: blocks of queries, splits of the bank; tiles of the bank a split), to fill the GPU once."""
    down, tiles = -(-queries // BLOCK_QUERIES), rows // BLOCK_ROWS
    wanted = max(1, min(tiles, blocks * multiprocessors // down))
    tiles_a_split = -(-tiles // wanted)
    return (down, -(-tiles // tiles_a_split)), tiles_a_split


def from_ordered(bits: int) -> float:
    """The float whose order primitives.cuh wrote as an unsigned integer; NaN is the largest."""
    plain = bits ^ 0x80000000 if bits >> 31 else ~bits & 0xFFFFFFFF
    return float(np.array([plain], np.uint32).view(np.float32)[0])


def _up_to(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
