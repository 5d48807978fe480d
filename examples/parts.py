"""Procedural pictures of machined parts as a line camera sees them: good ones, and five kinds of defect.

The part is a bored flange in a nearly square frame and a bored plate in a long one. It is drawn from distance
fields to its edges, a height map shaded by one lamp, and a brushed texture. Every length is in pixels.
The tests and the documentation take their pictures from here; it is no substitute for pictures of real parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
from numpy.typing import NDArray

Field = NDArray[Any]  # float32 (H, W); Any because cv2 promises no more
Points = NDArray[np.float64]
Picture = NDArray[np.uint8]  # (H, W), or (H, W, 3) RGB

DEFECTS = ("scratch", "dent", "stain", "missing_hole", "chip")
SOBEL_X = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], np.float32) / 8
TO_LAMP = 0.6 * SOBEL_X + 0.8 * SOBEL_X.T  # filter for the slope towards a lamp at the upper left
VISIBLE_LEVELS = 6.0  # a smaller change drowns in the sensor grain
GRAIN_SIGMA = 1.6
TINTS = ((0.98, 0.85, 0.75), (1.0, 1.02, 1.05), (1.03, 1.0, 1.7))  # R, G, B: metal, belt, stain
FLANGE_BELOW_ASPECT = 1.3


@dataclass(frozen=True)
class Surface:
    """One part in the frame, before lighting."""

    outline: Field  # signed distance to the outline, negative on the part
    circles: Points  # (K, 3): x, y, radius of each hole in the frame
    relief: Field  # height added to the bevelled flat
    metal: Field  # brightness of the brushed metal lying flat
    stain: Field  # 0 clean .. 1 soaked
    belt: Field  # brightness of the belt underneath
    bevel: float


def _layout(height: int, width: int) -> tuple[Points, float, Points]:
    """Half extents (x, y), corner radius, circles (K, 3) about the centre, the bolt holes smallest."""
    short = min(height, width)
    if max(height, width) < FLANGE_BELOW_ASPECT * short:
        radius, angles = 0.42 * short, (np.arange(6) + 0.5) * np.pi / 3
        bolts = radius * np.column_stack([0.73 * np.cos(angles), 0.73 * np.sin(angles), np.full(6, 0.1)])
        return np.array([radius, radius]), radius, np.vstack([[0.0, 0.0, 0.3 * radius], bolts])
    half = np.array([width, height]) / 2 - 0.08 * short
    long, short = half.max(), half.min()
    count = max(1, round(long / short) - 1)
    along = (np.arange(count) - (count - 1) / 2) * 2 * long / (count + 0.4)
    bores = np.column_stack([along, np.zeros(count), np.full(count, 0.34 * short)])
    x, y = np.meshgrid(np.linspace(-1, 1, count + 1) * (long - 0.27 * short), [-0.73 * short, 0.73 * short])
    circles = np.vstack([bores, np.column_stack([x.ravel(), y.ravel(), np.full(x.size, 0.1 * short)])])
    return half, 0.25 * short, circles if width >= height else circles[:, [1, 0, 2]]


def _good_part(rng: np.random.Generator, height: int, width: int) -> Surface:
    """The same design each time, with its own pose, brush marks, exposure and stretch of belt."""
    short = min(height, width)
    half, corner, circles = _layout(height, width)
    angle = np.deg2rad(rng.uniform(-1.5, 1.5)) * short / max(height, width)  # long ones turn less
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = np.array([width - 1, height - 1]) / 2 + rng.uniform(-0.012, 0.012, 2) * short
    x, y = _offsets((height, width), *centre)
    cos, sin = turn[:, 0].astype(np.float32)
    part_x, part_y = cos * x + sin * y, cos * y - sin * x
    rim = _rounded_box(part_x, part_y, half, corner)
    lamp = (150 * rng.uniform(0.985, 1.015)) * (1 - 0.08 * x / width - 0.1 * y / height)
    metal = lamp * _brushed(rng, part_x, part_y, rim, turned=bool(corner == half.min()))
    weave = 40 + 6 * rng.standard_normal((height // 2, width // 2), dtype=np.float32)
    belt = cv2.resize(weave, (width, height), interpolation=cv2.INTER_LINEAR)
    circles = np.column_stack([circles[:, :2] @ turn.T + centre, circles[:, 2]])
    bevel = max(1.5, 0.013 * short)
    groove = (rim + np.float32(0.52 * half.min())) / np.float32(bevel)
    relief = np.float32(-0.7 * bevel) * np.exp(-groove * groove)
    return Surface(rim, circles, relief, metal, np.zeros_like(rim), belt, bevel)


def _offsets(shape: tuple[int, ...], x: float, y: float) -> tuple[Field, Field]:
    """Columns (1, W) and rows (H, 1) counted from the point."""
    columns, rows = np.arange(shape[1], dtype=np.float32), np.arange(shape[0], dtype=np.float32)
    return columns[None, :] - np.float32(x), rows[:, None] - np.float32(y)


def _rounded_box(x: Field, y: Field, half: Points, corner: float) -> Field:
    """Signed distance to a rounded rectangle, a circle when the corner radius is all there is."""
    over_x, over_y = np.abs(x) - np.float32(half[0] - corner), np.abs(y) - np.float32(half[1] - corner)
    outside = cv2.magnitude(np.maximum(over_x, 0), np.maximum(over_y, 0))
    return outside + np.minimum(np.maximum(over_x, over_y), 0) - np.float32(corner)


def _brushed(rng: np.random.Generator, x: Field, y: Field, rim: Field, *, turned: bool) -> Field:
    """Streaks about 1: lathe rings with the two-lobed sheen they give, or straight strokes along x."""
    across, along = (rim, cv2.phase(x, y) * np.float32(20 / np.pi)) if turned else (y, x / 25 + 20)
    strokes = 0.06 * rng.standard_normal((512, 40), dtype=np.float32)
    table = cv2.GaussianBlur(strokes, (0, 0), sigmaX=1.5, sigmaY=0.7)
    streaks = 1 + cv2.remap(table, along, across + 256, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    return streaks + (0.04 * (x * x - y * y) + 0.24 * x * y) / (x * x + y * y + 1) if turned else streaks


def _hole_distance(surface: Surface) -> Field:
    """Signed distance to the nearest hole, negative inside; exact near its edge, three bevels far from it."""
    reach = 3 * surface.bevel
    distance = np.full(surface.outline.shape, np.float32(reach))
    for x, y, radius in surface.circles:
        left, top = max(0, int(x - radius - reach)), max(0, int(y - radius - reach))
        window = distance[top : int(y + radius + reach) + 2, left : int(x + radius + reach) + 2]
        columns, rows = _offsets(window.shape, x - left, y - top)
        np.minimum(window, np.sqrt(columns * columns + rows * rows) - np.float32(radius), out=window)
    return distance


def _light(surface: Surface, tints: Sequence[tuple[float, float, float]]) -> Field:
    """Brightness in grey levels (H, W, a plane for each tint), neither clipped nor grainy yet."""
    bevel, outline, holes = surface.bevel, surface.outline, _hole_distance(surface)
    cover = np.clip(0.5 - outline, 0, 1) * np.clip(0.5 + holes, 0, 1)
    edges = np.minimum(np.clip(-outline, 0, bevel), np.clip(holes, -2 * bevel, bevel))
    facing = cv2.filter2D(edges, -1, TO_LAMP)
    metal = cover * surface.metal * (1 + 0.42 * (facing + cv2.filter2D(surface.relief, -1, TO_LAMP)))
    shade = np.where(holes < 0, 0.45, 1 - 0.55 * np.exp(np.minimum(-outline, 0) / np.float32(4 * bevel)))
    below = (1 - cover) * (surface.belt * shade + 70 * np.clip(facing, 0, 1) * (holes < 0))
    return np.dstack([metal * m * (1 - 0.3 * soak * surface.stain) + below * b for m, b, soak in tints])


def _on_face(rng: np.random.Generator, surface: Surface) -> Points:
    """A random pixel (x, y) where the part is flat, clear of its edges."""
    face = (surface.outline < -3 * surface.bevel) & (_hole_distance(surface) > 2 * surface.bevel)
    return np.asarray(rng.choice(np.argwhere(face))[::-1], np.float64)


def _polar(shape: tuple[int, ...], centre: Points) -> tuple[Field, Field]:
    """Distance from the point (x, y) and angle about it in radians."""
    columns, rows = _offsets(shape, *centre)
    return np.hypot(columns, rows), np.arctan2(rows, columns)


def _scratch(surface: Surface, rng: np.random.Generator) -> Surface:
    """A bowed line, bright where the metal is bare and sunk a little."""
    height, width = surface.outline.shape
    start = _on_face(rng, surface)
    inward = np.arctan2(height / 2 - start[1], width / 2 - start[0])
    heading = inward + rng.choice([-1, 1]) * rng.uniform(0.5, 1.2)  # across the part rather than off it
    ahead, aside = np.array([[np.cos(heading), np.sin(heading)], [-np.sin(heading), np.cos(heading)]])
    step = np.linspace(0, 1, 24)[:, None]
    bow = rng.uniform(-0.4, 0.4) * step * (1 - step)
    path = start + rng.uniform(0.2, 0.4) * min(height, width) * (step * ahead + bow * aside)
    line, thick = np.zeros((height, width), np.uint8), max(1, min(height, width) // 150)
    points = [np.rint(path * 16).astype(np.int32)]
    cv2.polylines(line, points, isClosed=False, color=255, thickness=thick, lineType=cv2.LINE_AA, shift=4)
    depth = line.astype(np.float32) / 255
    return replace(surface, metal=surface.metal * (1 + 0.45 * depth), relief=surface.relief - 0.8 * depth)


def _dent(surface: Surface, rng: np.random.Generator) -> Surface:
    """A shallow bowl as left by a knock: mostly the lamp shows it, one side bright and the other dark."""
    distance, angle = _polar(surface.outline.shape, _on_face(rng, surface))
    radius = rng.uniform(0.028, 0.05) * min(distance.shape)
    squash = (1 + 0.25 * np.cos(2 * (angle - np.float32(rng.uniform(0, np.pi))))) / np.float32(radius)
    bowl = np.exp(-np.square(distance * squash))
    relief = surface.relief - np.float32(0.85 * radius) * bowl
    return replace(surface, relief=relief, metal=surface.metal * (1 - 0.1 * bowl))


def _stain(surface: Surface, rng: np.random.Generator) -> Surface:
    """A dried drop of oil with a ragged outline and the darker margin that drying leaves."""
    height, width = surface.outline.shape
    distance, _ = _polar((height, width), _on_face(rng, surface))
    cell = min(height, width) / 16
    coarse = rng.standard_normal((round(height / cell), round(width / cell)), dtype=np.float32)
    cloud = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    level = 1 - distance / np.float32(rng.uniform(0.06, 0.1) * min(height, width)) + 0.25 * cloud
    margin = (level > 0) * np.exp(-np.square((level - 0.15) / 0.12))
    return replace(surface, stain=0.75 * np.clip(level / 0.15, 0, 1) + 0.35 * margin)


def _missing_hole(surface: Surface, rng: np.random.Generator) -> Surface:
    """One bolt hole was never drilled."""
    dropped = rng.choice(np.flatnonzero(surface.circles[:, 2] == surface.circles[:, 2].min()))
    return replace(surface, circles=np.delete(surface.circles, dropped, axis=0))


def _chip(surface: Surface, rng: np.random.Generator) -> Surface:
    """A bite out of the edge, with a rough break around it."""
    edge = np.argwhere(np.abs(surface.outline) < 1)
    distance, angle = _polar(surface.outline.shape, rng.choice(edge)[::-1])
    first, second = rng.uniform(0, 2 * np.pi, 2).astype(np.float32)
    radius = rng.uniform(0.035, 0.06) * min(distance.shape)
    bite = distance - radius * (1 + 0.2 * np.cos(2 * angle + first) + 0.07 * np.cos(5 * angle + second))
    rough = cv2.GaussianBlur(rng.standard_normal(bite.shape, dtype=np.float32), (0, 0), 0.8)
    metal = surface.metal + 45 * rough * np.exp(-np.square(bite / np.float32(2 * surface.bevel)))
    return replace(surface, outline=np.maximum(surface.outline, -bite), metal=metal)


_SPOIL = dict(zip(DEFECTS, (_scratch, _dent, _stain, _missing_hole, _chip), strict=True))


def render_part(
    seed: int, *, size_hw: tuple[int, int] = (256, 256), defect: str | None = None, color: bool = False
) -> tuple[Picture, Picture]:
    """Picture, and mask (H, W; 255 where a defect shows, else 0 and the picture is the good part's).

    Raises ValueError for a side below 64 or a kind of defect not in DEFECTS.
    """
    if min(size_hw) < 64:
        raise ValueError(f"size_hw is {size_hw}, wanted both sides at least 64")
    if defect is not None and defect not in DEFECTS:
        raise ValueError(f"defect is {defect!r}, wanted one of {', '.join(DEFECTS)}")
    rng = np.random.default_rng([seed, 0])
    surface, tints = _good_part(rng, *size_hw), TINTS if color else ((1.0, 1.0, 1.0),)
    light, mask = _light(surface, tints), np.zeros(size_hw, np.uint8)
    grain = np.float32(GRAIN_SIGMA) * rng.standard_normal(light.shape, dtype=np.float32)
    if defect is not None:
        damage = np.random.default_rng([seed, 1 + DEFECTS.index(defect)])
        spoiled = _light(_SPOIL[defect](surface, damage), tints)
        changed = np.where(np.abs(spoiled - light).max(axis=2) >= VISIBLE_LEVELS, 255, 0).astype(np.uint8)
        kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, [max(3, min(size_hw) // 40) | 1] * 2)
        # closed, so that the two sides of a dent are one defect
        mask = np.asarray(cv2.morphologyEx(changed, cv2.MORPH_CLOSE, kernel), np.uint8)
        light = np.where(mask[..., None] > 0, spoiled, light)
    image = np.clip(np.rint(light + grain), 0, 255).astype(np.uint8)
    return image if color else image[..., 0], mask


def with_paint_dot(image: Picture, seed: int) -> Picture:
    """The grey picture (H, W) of a part with a dot of bright paint, as people mark parts with; always the same dot."""
    rng = np.random.default_rng([seed, 100])
    height, width = image.shape
    short = min(height, width)
    angle, away = rng.uniform(0, 2 * np.pi), rng.uniform(0.18, 0.26) * short
    centre = (width / 2 + away * np.cos(angle), height / 2 + away * np.sin(angle))
    columns, rows = _offsets((height, width), *centre)
    cover = np.clip(0.035 * short + 0.5 - np.hypot(columns, rows), 0, 1)
    return np.asarray(np.rint(image * (1 - cover) + 235 * cover), np.uint8)


def write_dataset(
    folder: Path,
    *,
    good_train: int,
    good_test: int,
    defects_each: int,
    size_hw: tuple[int, int] = (256, 256),
    seed: int = 0,
    color: bool = False,
    kinds: Sequence[str] = DEFECTS,
) -> None:
    """Write PNG pictures as MVTec AD lays them out, no part twice. Raises OSError where it cannot."""
    wanted: list[tuple[str, str | None, int]] = [(f"test/{kind}", kind, defects_each) for kind in kinds]
    part = seed * 1_000_000
    for place, defect, count in [("train/good", None, good_train), ("test/good", None, good_test), *wanted]:
        for index in range(count):
            image, mask = render_part(part, size_hw=size_hw, defect=defect, color=color)
            part += 1
            _write_png(folder / place / f"{index:03d}.png", image[..., ::-1] if color else image)
            if defect is not None:
                _write_png(folder / "ground_truth" / defect / f"{index:03d}_mask.png", mask)


def _write_png(path: Path, image: Picture) -> None:
    """Write grey or BGR, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), image):
        raise OSError(f"{path} could not be written")


@click.command(context_settings={"show_default": True})
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--good-train", default=40, help="Good parts to learn from.")
@click.option("--good-test", default=20, help="Good parts to test on.")
@click.option("--defects-each", default=10, help="Defective parts of each kind.")
@click.option("--size", "size_hw", type=(int, int), default=(256, 256), help="Height and width in pixels.")
@click.option("--seed", default=0, help="Another seed, other parts.")
@click.option("--color", is_flag=True, help="RGB instead of grey.")
def main(folder: Path, **options: Any) -> None:
    """Write pictures of machined parts, good and defective, to FOLDER."""
    write_dataset(folder, **options)


if __name__ == "__main__":
    main()
