"""Slow, exact references in float64: the definitions that every backend is held against.

Written to be checked by eye against their sources, one loop per sum. Nothing here is fast, and nothing here
imports daemon/: a fault in the daemon cannot hide in its own reference.

Axes as in daemon/types.py: H W frame pixels, h w network pixels, C channels, P patches, M bank rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Anything = NDArray[Any]


def resize_area(pixels: Anything, size_hw: tuple[int, int]) -> Array:
    """(H W C) -> (h w C). Each output pixel is the mean of the input under it, fractions of pixels included.

    Source: OpenCV's documentation of INTER_AREA ("resampling using pixel area relation"). A side that grows, for
    which it is not defined, is bilinear with half-pixel centres instead; each side is taken by itself.
    """
    rows, columns = (
        (area_weights if size <= length else bilinear_weights)(size, length)
        for size, length in zip(size_hw, pixels.shape[:2], strict=True)
    )
    planes = [rows @ pixels[:, :, channel].astype(np.float64) @ columns.T for channel in range(pixels.shape[2])]
    return np.stack(planes, axis=2)


def area_weights(size: int, length: int) -> Array:
    """(size length): the share of input pixel [i, i + 1) in output pixel [o, o + 1) * length / size."""
    weights = np.zeros((size, length))
    for out in range(size):
        start, end = out * length / size, (out + 1) * length / size
        for pixel in range(length):
            overlap = min(end, pixel + 1) - max(start, pixel)
            weights[out, pixel] = max(0.0, overlap) / (end - start)
    return weights


def bilinear_weights(size: int, length: int) -> Array:
    """(size length): centre of output o lies at (o + 1/2) * length / size - 1/2; beyond the edge, the edge pixel."""
    weights = np.zeros((size, length))
    for out in range(size):
        position = (out + 0.5) * length / size - 0.5
        low = floor(position)
        for pixel, share in ((low, 1 - (position - low)), (low + 1, position - low)):
            weights[out, min(max(pixel, 0), length - 1)] += share
    return weights


def normalise(pixels: Anything, size_hw: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> Array:
    """(H W 1) or (H W 3), 8 or 16 bit -> (1 3 h w): resized, brought to 0..255, (x - mean) / std per channel."""
    resized = resize_area(pixels, size_hw) / (257.0 if pixels.dtype == np.uint16 else 1.0)
    planes = []
    for channel in range(3):
        plane = resized[:, :, channel if resized.shape[2] == 3 else 0]
        planes.append((plane - mean[channel]) / std[channel])
    return np.stack(planes)[None]


def demosaic(mosaic: Anything) -> NDArray[np.uint8]:
    """BayerRG8 (H W) -> RGB (H W 3): rows R G R G .., G B G B ..; means of the nearest pixels of a colour, half up.

    Source: OpenCV's bilinear demosaicing; the outermost rows and columns are those beside them.
    """
    height, width = mosaic.shape
    values = mosaic.astype(np.int64)
    found = np.zeros((height, width, 3), np.uint8)
    for row in range(height):
        for column in range(width):
            y, x = min(max(row, 1), height - 2), min(max(column, 1), width - 2)
            beside, above = values[y, x - 1] + values[y, x + 1], values[y - 1, x] + values[y + 1, x]
            corners = values[y - 1 : y + 2 : 2, x - 1 : x + 2 : 2].sum()
            two = {"beside": (beside + 1) // 2, "above": (above + 1) // 2}
            if (y + x) % 2 == 0:  # on a red or a blue pixel
                own, other = (0, 2) if y % 2 == 0 else (2, 0)
                found[row, column, own], found[row, column, 1] = values[y, x], (beside + above + 2) // 4
                found[row, column, other] = (corners + 2) // 4
            else:
                red, blue = ("beside", "above") if y % 2 == 0 else ("above", "beside")
                found[row, column] = two[red], values[y, x], two[blue]
    return found


def density(core: Anything, k: int) -> Array:
    """(M C) -> (M,): the mean squared distance of each row to its k nearest others, itself excluded by index.

    Source: REB (Lyu et al., 2023), local density of the memory bank.
    """
    core = core.astype(np.float64)
    values = np.zeros(len(core))
    for row in range(len(core)):
        others = [float(np.sum((core[row] - core[other]) ** 2)) for other in range(len(core)) if other != row]
        values[row] = np.mean(sorted(others)[:k])
    return values


def distances_sq(queries: Anything, core: Anything) -> Array:
    """(P C), (M C) -> (P M): squared L2 of every pair, from the difference itself."""
    table = np.zeros((len(queries), len(core)))
    for row, stored in enumerate(core.astype(np.float64)):
        table[:, row] = np.sum((queries.astype(np.float64) - stored) ** 2, axis=1)
    return table


def ldknn(queries: Anything, core: Anything, densities: Anything, alpha: float) -> tuple[Array, NDArray[np.int64]]:
    """(P C), (M C), (M,) -> scores (P,), winner (P,): d2(q, m*) - alpha * density(m*), m* the plain nearest row.

    Ties go to the lowest row. Never clipped. Source: REB (Lyu et al., 2023), eq. 4, with squared L2.
    """
    table = distances_sq(queries, core)
    winner = np.argmin(table, axis=1)  # the first of equal minima
    nearest = table[np.arange(len(queries)), winner]
    return nearest - alpha * densities.astype(np.float64)[winner], winner


def ldknn_int8(
    queries: Anything,
    core: Anything,
    densities: Anything,
    alpha: float,
    centre: Anything,
    inverse: float,
    kept: int,
) -> tuple[Array, NDArray[np.int64]]:
    """ldknn, but m* is the plain nearest of the `kept` rows that are nearest in INT8.

    In INT8 a vector is round((x - centre) * inverse) in float32, cut off at +-127, and the order that of
    q.m + floor(-|m|^2 / 2) in integers, the largest first; equal ones go to the lowest row, here and at the end.
    """
    whole_core = _to_int8(core, centre, inverse)
    bias = -((np.sum(whole_core * whole_core, axis=1) + 1) // 2)
    winners = []
    for query, whole in zip(queries, _to_int8(queries, centre, inverse), strict=True):
        order = np.argsort(-(whole_core @ whole + bias), kind="stable")
        candidates = np.sort(order[:kept])
        winners.append(candidates[np.argmin(distances_sq(query[None], core[candidates])[0])])
    winner = np.array(winners)
    nearest = np.array(
        [distances_sq(query[None], core[[row]])[0, 0] for query, row in zip(queries, winner, strict=True)]
    )
    return nearest - alpha * densities.astype(np.float64)[winner], winner


def _to_int8(values: Anything, centre: Anything, inverse: float) -> NDArray[np.int64]:
    scaled = (values.astype(np.float32) - centre.astype(np.float32)) * np.float32(inverse)
    return np.clip(np.rint(scaled), -127, 127).astype(np.int64)


def upsample_bilinear(grid: Anything, size_hw: tuple[int, int]) -> Array:
    """(gh gw) -> (h w), half-pixel centres, edges clamped. Source: torch's interpolate, align_corners=False."""
    rows, columns = bilinear_weights(size_hw[0], grid.shape[0]), bilinear_weights(size_hw[1], grid.shape[1])
    return rows @ grid.astype(np.float64) @ columns.T


def gaussian_smooth(values: Anything, sigma: float) -> Array:
    """(h w) -> (h w): one axis after the other, weights exp(-d^2 / 2 sigma^2) for |d| <= ceil(4 sigma), sum 1.

    Beyond the border the picture is mirrored without repeating the edge pixel (... 2 1 | 0 1 2 ...), as often as the
    reach needs. Source: scipy.ndimage.gaussian_filter, mode "mirror", truncate 4, but with the reach rounded up.
    """
    once = np.apply_along_axis(_smooth_line, 0, values.astype(np.float64), sigma)
    return np.apply_along_axis(_smooth_line, 1, once, sigma)


def _smooth_line(line: Array, sigma: float) -> Array:
    reach = ceil(4 * sigma)
    weights = np.array([np.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-reach, reach + 1)])
    weights /= weights.sum()
    smoothed = np.zeros(len(line))
    for position in range(len(line)):
        for offset, weight in zip(range(-reach, reach + 1), weights, strict=True):
            smoothed[position] += weight * line[_mirrored(position + offset, len(line))]
    return smoothed


def _mirrored(position: int, length: int) -> int:
    """Reflect at the first and the last pixel until inside."""
    if length == 1:
        return 0
    while not 0 <= position < length:
        position = -position if position < 0 else 2 * (length - 1) - position
    return position


def regions(above: Anything) -> list[set[tuple[int, int]]]:
    """(h w) of booleans -> the 8-connected components as sets of (y, x), by flood fill in reading order."""
    left = {(int(y), int(x)) for y, x in np.argwhere(above)}
    found = []
    for start in sorted(left):
        if start not in left:
            continue
        component, front = set(), [start]
        left.discard(start)
        while front:
            y, x = front.pop()
            component.add((y, x))
            for neighbour in [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]:
                if neighbour in left:
                    left.discard(neighbour)
                    front.append(neighbour)
        found.append(component)
    return found


def patch_convolution(values: Anything, weights: Anything) -> Array:
    """(1 3 h w), (C 3 s s) -> (P C), row-major: a convolution whose stride is its kernel, so patches do not overlap.

    This is the whole feature network of tests/bundles.py.
    """
    _, channels, height, width = values.shape
    side = weights.shape[2]
    grid = values.astype(np.float64).reshape(channels, height // side, side, width // side, side)
    return np.einsum("cyaxb,kcab->yxk", grid, weights.astype(np.float64)).reshape(-1, len(weights))
