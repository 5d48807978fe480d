"""Shapes of synthetic defects: each draws a small mask, or a whole field, of 0 and 1.

Blob, scar and clump are DefectMaker's (Lyu et al. 2023, REB), with its numbers; the field is
DRAEM's (Zavrtanik et al. 2021). The elastic ellipse, its small sister the speck, and the hairline are our own.
Every shape is called with a generator and the image's height and width in pixels, and returns uint8 (h w),
never empty and never larger than the image. Scar and hairline have lengths in pixels of an image whose
long side is 256, and grow with the image; the other shapes have areas, which are shares of the image's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import cv2
import numpy as np
import numpy.typing as npt

from daemon.types import ByteArray, FloatArray

BoolArray = npt.NDArray[np.bool_]
Points = npt.NDArray[np.float64]  # (n 2): x, y
Shape = Callable[[np.random.Generator, int, int], ByteArray]

BOX_AREA = (0.02, 0.15)  # of the image: the box around a blob or a clump
ELLIPSE_AREA = (0.002, 0.05)  # of the image, before the edge is displaced
SPECK_AREA = (0.0002, 0.002)
LARGEST_FIELD = 0.5  # of the image; a field beyond it is the scene, not a defect in it
_LONG_SIDE = 256  # pixels, of the images that lengths are given for
_FEW_CORNERS, _MANY_CORNERS = (5, 6), (5, 9)
_BLOB_ASPECT, _CLUMP_ASPECT, _ELLIPSE_ASPECT = 3.3, 3.0, 4.0
_CURVE_POINTS = 12  # of an edge, both ends included
_FIELD_TRIES = 50
_CLUMP_TRIES = 20
_COARSE = 5  # points a side of the grid that a smooth displacement is drawn on


def blob(rng: np.random.Generator, height: int, width: int) -> ByteArray:
    """A closed curve, partly bowed and partly straight, that touches all four sides of its box."""
    rows, columns = _draw_box(rng, height, width, _BLOB_ASPECT)
    return _rasterise(_stretch(_draw_curve(rng, _FEW_CORNERS), rows, columns))


def scar(rng: np.random.Generator, height: int, width: int) -> ByteArray:
    """A blob in an upright box of 7..21 by 15..30 pixels, turned by up to 45 degrees."""
    scale = max(height, width) / _LONG_SIDE
    columns = max(2, round(int(rng.integers(7, 21, endpoint=True)) * scale))
    rows = max(2, round(int(rng.integers(15, 30, endpoint=True)) * scale))
    curve = _stretch(_draw_curve(rng, _FEW_CORNERS), rows, columns)
    angle = math.radians(int(rng.integers(-45, 45, endpoint=True)))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    # Turning the curve rather than its picture spares a canvas and leaves no stairs.
    return trim(_rasterise(curve @ turn.T), height, width)


def clump(rng: np.random.Generator, height: int, width: int) -> ByteArray:
    """Coarse noise above a threshold, inside a closed curve: mostly several pieces."""
    rows, columns = _draw_box(rng, height, width, _CLUMP_ASPECT)
    for _ in range(_CLUMP_TRIES):
        curve = _rasterise(_stretch(_draw_curve(rng, _MANY_CORNERS), rows, columns))
        scale, aspect = rng.uniform(5.0, 7.0), log_uniform(rng, 0.5, 2.0)
        # DefectMaker takes both sides of the grid from the box's width.
        coarse = max(1, int(columns / scale / aspect)), max(1, int(columns / scale * aspect))
        noise = rng.integers(77, 177, coarse, np.uint8, endpoint=True)
        pieces = curve & (resize(noise, rows, columns) > 138)
        if pieces.any():
            return np.asarray(pieces, np.uint8)
    return curve  # a box of a few pixels: no noise fits in


def perlin(rng: np.random.Generator, height: int, width: int, region: BoolArray | None = None) -> ByteArray:
    """A field (H W) of gradient noise, turned and cut at 0.5, inside `region` (H W; everywhere if None).

    Where 50 fields leave nothing of the region, or more than half of the image, a blob is returned.
    """
    for _ in range(_FIELD_TRIES):
        rows, columns = (int(count) for count in 2 ** rng.integers(0, 5, 2, endpoint=True))
        field = gradient_noise(rng, (height, width), (rows, columns))
        centre, angle = ((width - 1) / 2, (height - 1) / 2), rng.uniform(-90.0, 90.0)
        turned = cv2.warpAffine(field, cv2.getRotationMatrix2D(centre, angle, 1.0), (width, height))
        mask = turned > 0.5
        if region is not None:
            mask &= region
        if 0 < np.count_nonzero(mask) <= LARGEST_FIELD * mask.size:
            return mask.astype(np.uint8)
    return blob(rng, height, width)


def ellipse(rng: np.random.Generator, height: int, width: int) -> ByteArray:
    """An ellipse of 0.2 to 5 % of the image, as if drawn on rubber."""
    return _elastic_ellipse(rng, height, width, ELLIPSE_AREA)


def speck(rng: np.random.Generator, height: int, width: int) -> ByteArray:
    """An ellipse of 0.02 to 0.2 % of the image, one pixel at least: dust, a pore, a splash."""
    return _elastic_ellipse(rng, height, width, SPECK_AREA)


def hairline(rng: np.random.Generator, height: int, width: int) -> ByteArray:
    """A crack: a walk that drifts slowly, 1 to 3 pixels wide, 0.1 to 0.6 of the long side; some branch once."""
    long_side = max(height, width)
    thickness = max(1, round(rng.uniform(1.0, 3.0) * long_side / _LONG_SIDE))
    steps = max(2, round(rng.uniform(0.1, 0.6) * 64))
    heading = rng.uniform(0.0, 2.0 * math.pi)
    stem, headings = _walk(rng, np.zeros(2), heading, steps, long_side / 64)
    lines = [stem]
    if rng.random() < 0.3:
        fork = int(rng.integers(1, steps))
        aside = headings[fork] + rng.choice([-1.0, 1.0]) * rng.uniform(0.4, 1.0)
        lines.append(_walk(rng, stem[fork], aside, max(1, (steps - fork) // 2), long_side / 64)[0])
    margin = thickness + 1
    corner = np.vstack(lines).min(axis=0) - margin
    columns, rows = np.ceil(np.vstack(lines).max(axis=0) - corner).astype(int) + margin + 1
    mask = np.zeros((rows, columns), np.uint8)
    # cv2 takes fixed-point coordinates: 3 bits after the point.
    paths = [np.rint((line - corner) * 8).astype(np.int32) for line in lines]
    cv2.polylines(mask, paths, isClosed=False, color=1, shift=3)
    # Not polylines' own thickness: OpenCV 5 draws a thickness of 3 five pixels wide.
    pen = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (thickness, thickness))
    return trim(np.asarray(cv2.dilate(mask, pen), np.uint8), height, width)


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "blob": blob, "scar": scar, "clump": clump, "perlin": perlin, "ellipse": ellipse, "hairline": hairline,
        "speck": speck,
    }
)  # fmt: skip


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A number whose logarithm is uniform; 0 < low <= high."""
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def resize(values: ByteArray, height: int, width: int) -> ByteArray:
    """(h w) or (h w 3) to another size: cubic along an axis that grows, averaging along one that shrinks.

    Pillow's resize, which DefectMaker used, does this; OpenCV's cubic drops pixels where it shrinks.
    """
    for size in ((width, values.shape[0]), (width, height)):
        shrinks = size[0] < values.shape[1] or size[1] < values.shape[0]
        values = np.asarray(cv2.resize(values, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC))
    return values


def smooth_field(rng: np.random.Generator, height: int, width: int, sigma: float) -> FloatArray:
    """Displacements (h w 2) in pixels: normal with `sigma` on a grid of 5 by 5 points, cubic between them."""
    coarse = sigma * rng.standard_normal((_COARSE, _COARSE, 2), np.float32)
    return np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), np.float32)


def gradient_noise(rng: np.random.Generator, shape: tuple[int, int], cells: tuple[int, int]) -> FloatArray:
    """Perlin noise (H W) in about -1..1, with `cells` (rows, columns) of random gradients at their corners.

    First along each row of corners, then down from row to row: far fewer numbers than corner by corner.
    """
    angles = rng.uniform(0.0, 2.0 * math.pi, (cells[0] + 1, cells[1] + 1)).astype(np.float32)
    cell, away, fade = _corner_places(shape[1], cells[1])
    lifts = np.sin(angles[:, cell]) * (1 - fade) + np.sin(angles[:, cell + 1]) * fade
    leans = np.cos(angles[:, cell]) * (1 - fade) * away + np.cos(angles[:, cell + 1]) * fade * (away - 1)
    cell, away, fade = _corner_places(shape[0], cells[0])
    field = lifts[cell] * away[:, None] + leans[cell]
    below = lifts[cell + 1] * (away[:, None] - 1) + leans[cell + 1]
    field += fade[:, None] * (below - field)
    return np.asarray(np.float32(math.sqrt(2.0)) * field, np.float32)


def _corner_places(size: int, cells: int) -> tuple[npt.NDArray[np.int64], FloatArray, FloatArray]:
    """For each of `size` pixels: its cell, how far into it (0..1), and how much the corner ahead counts (0..1)."""
    place = (np.arange(size) + 0.5) * cells / size
    cell = place.astype(np.int64)
    away = (place - cell).astype(np.float32)
    return cell, away, away**3 * (away * (6 * away - 15) + 10)


def trim(mask: ByteArray, height: int, width: int) -> ByteArray:
    """The mask's filled part; of one that is larger than the image, the middle."""
    for axis, most in ((0, height), (1, width)):
        filled = np.flatnonzero(mask.any(axis=1 - axis))
        start, stop = int(filled[0]), int(filled[-1]) + 1
        start += max(0, stop - start - most) // 2
        stop = min(stop, start + most)
        mask = mask[start:stop] if axis == 0 else mask[:, start:stop]
    return np.ascontiguousarray(mask)


def _draw_box(rng: np.random.Generator, height: int, width: int, aspect: float) -> tuple[int, int]:
    """(rows, columns) of a box with a share of the image's area and an aspect of at most `aspect` either way."""
    area, ratio = rng.uniform(*BOX_AREA) * height * width, log_uniform(rng, 1.0 / aspect, aspect)
    rows, columns = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
    return min(max(rows, 2), height), min(max(columns, 2), width)


def _draw_curve(rng: np.random.Generator, corners: tuple[int, int]) -> Points:
    """A closed curve (m 2) through random corners in the order of their angle about the centroid.

    The handles at a corner are parallel to the line between the midpoints of its two edges, which the edges'
    lengths divide. Half of the edges, drawn at random, are left straight.
    """
    count = int(rng.integers(*corners, endpoint=True))
    points = rng.integers(0, 100, (count, 2)).astype(np.float64)
    away = points - points.mean(axis=0)
    points = points[np.argsort(np.arctan2(away[:, 1], away[:, 0]), kind="stable")]
    ahead = np.roll(points, -1, axis=0)
    lengths = np.linalg.norm(ahead - points, axis=1)[:, None]
    middle, behind = (points + ahead) / 2.0, np.roll((points + ahead) / 2.0, 1, axis=0)
    share = np.roll(lengths, 1, axis=0) / np.maximum(np.roll(lengths, 1, axis=0) + lengths, 1e-9)
    reach = (1.0 - rng.choice([0.2, 0.3, 0.4])) * (middle - behind)
    leaving, arriving = points + (1.0 - share) * reach, points - share * reach
    handles = np.stack([points, leaving, np.roll(arriving, -1, axis=0), ahead], axis=1)
    step = np.linspace(0.0, 1.0, _CURVE_POINTS)[:-1, None]  # the last point is the next edge's first
    basis = np.hstack([(1 - step) ** 3, 3 * step * (1 - step) ** 2, 3 * step**2 * (1 - step), step**3])
    curves = basis @ handles
    straight = rng.random(count) < 0.5
    return np.vstack([curve[:1] if flat else curve for curve, flat in zip(curves, straight, strict=True)])


def _stretch(curve: Points, rows: int, columns: int) -> Points:
    """The curve (m 2) shifted and scaled to fill a box of (rows, columns) pixels exactly."""
    corner = curve.min(axis=0)
    span = np.maximum(curve.max(axis=0) - corner, 1e-9)  # all corners on one line: a straight stroke
    return np.asarray((curve - corner) / span * [columns - 1, rows - 1])


def _rasterise(curve: Points) -> ByteArray:
    """The inside of a closed curve (m 2) and the pixels on it, in the smallest mask that holds them."""
    pixels = np.rint(curve - curve.min(axis=0)).astype(np.int32)
    columns, rows = pixels.max(axis=0) + 1
    mask = np.zeros((rows, columns), np.uint8)
    cv2.fillPoly(mask, [pixels], 1)
    return mask


def _elastic_ellipse(rng: np.random.Generator, height: int, width: int, area: tuple[float, float]) -> ByteArray:
    square, aspect = (
        rng.uniform(*area) * height * width / math.pi,
        log_uniform(rng, 1 / _ELLIPSE_ASPECT, _ELLIPSE_ASPECT),
    )
    radii = np.sqrt([square * aspect, square / aspect])
    reach = math.ceil(1.5 * radii.max()) + 1
    offsets = np.arange(-reach, reach + 1, dtype=np.float32)
    moved = smooth_field(rng, offsets.size, offsets.size, 0.25 * float(radii.min()))
    x, y = moved[:, :, 0] + offsets[None, :], moved[:, :, 1] + offsets[:, None]
    angle = rng.uniform(0.0, math.pi)
    along, across = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
    mask = ((along / radii[0]) ** 2 + (across / radii[1]) ** 2 <= 1.0).astype(np.uint8)
    mask[reach, reach] = 1  # one pixel at least
    return trim(mask, height, width)


def _walk(rng: np.random.Generator, start: Points, heading: float, steps: int, stride: float) -> tuple[Points, Points]:
    """Positions (steps + 1, 2) and the headings (steps + 1,) in radians at them; a drift that itself changes slowly."""
    drift = rng.normal(0.0, 0.03) + rng.normal(0.0, 0.12, steps)
    headings = heading + np.concatenate([[0.0], np.cumsum(drift)])
    ways = stride * np.column_stack([np.cos(headings[1:]), np.sin(headings[1:])])
    return np.vstack([start, start + np.cumsum(ways, axis=0)]), headings
