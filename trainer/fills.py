"""Fills of synthetic defects: what the pixels of a shape are replaced by.

Noise and cut are DefectMaker's (Lyu et al. 2023, REB), with its numbers; texture follows DRAEM
(Zavrtanik et al. 2021); shuffled, elastic and tone are made of the image itself. Every fill is called
with a generator, the material and the place, and returns float32 (h w 3), RGB in 0..255, for the place's
box. Where the product is gray so is every fill: color on a gray camera would give the defect away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import cv2
import numpy as np
import numpy.typing as npt

from daemon.errors import DataError
from daemon.types import ByteArray, FloatArray
from trainer.shapes import BoolArray, log_uniform, resize, smooth_field

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
WEAKEST_TONE, STRONGEST_TONE = 8.0, 90.0  # grey levels
SMALLEST_SIDE = 32  # pixels, of an image
_JITTER = 0.1
_CELLS = 8  # a side, of the shuffled image
_TEXTURE_EDITS = 3


@dataclass(frozen=True)
class Material:
    """What fills are made of: images (H W 3) and where on each a defect may lie (H W), textures of any size."""

    images: Sequence[FloatArray]
    regions: Sequence[BoolArray]
    textures: Sequence[FloatArray]
    is_gray: bool


@dataclass(frozen=True)
class Place:
    """A box of `height` by `width` pixels in the image with the number `index`."""

    index: int
    top: int
    left: int
    height: int
    width: int

    @property
    def window(self) -> tuple[slice, slice]:
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


Fill = Callable[[np.random.Generator, Material, Place], FloatArray]
_Edit = Callable[[np.random.Generator, FloatArray], FloatArray]


def make_material(
    images: Sequence[FloatArray],
    textures: Sequence[FloatArray] = (),
    foreground: Sequence[BoolArray | ByteArray] | None = None,
) -> Material:
    """Material of images (H W 3), textures (h w 3) and, for each image, a mask (H W) of where defects may lie.

    Without masks a defect may lie anywhere. Raises DataError for what does not fit together.
    """
    check_images(images)
    for number, sample in enumerate(textures):
        _check_pixels(sample, f"texture {number}")
    return Material(images, _check_regions(foreground, images), textures, all(is_gray(image) for image in images))


def noise(rng: np.random.Generator, material: Material, place: Place) -> FloatArray:
    """Integers about one mean, drawn on a grid that is coarser or stretched, and resized to the box."""
    mean, fluctuation = 50 + 10 * int(rng.integers(15)), 5 * int(rng.integers(10))
    scale, aspect = rng.choice([1, 2, 4]), rng.choice([1.0, 2.0, 4.0, 0.5, 0.25])
    # DefectMaker takes both sides of the grid from the box's width.
    rows, columns = max(1, int(place.width / scale / aspect)), max(1, int(place.width / scale * aspect))
    low, high = max(mean - fluctuation, 0), min(mean + fluctuation + 1, 255)
    grid = rng.integers(low, high, (rows, columns) if material.is_gray else (rows, columns, 3), np.uint8)
    drawn = np.asarray(resize(grid, place.height, place.width), np.float32)
    return jitter(_in_three(drawn) if material.is_gray else drawn, rng, is_gray=material.is_gray)


def cut(rng: np.random.Generator, material: Material, place: Place) -> FloatArray:
    """A piece of another image of the product (of the same, where there is one only), from where a defect may lie."""
    count = len(material.images)
    other = (place.index + int(rng.integers(1, count))) % count if count > 1 else place.index
    row, column = random_pixel(rng, material.regions[other])
    height, width = material.images[other].shape[:2]
    top, left = centre_within(row, place.height, height), centre_within(column, place.width, width)
    piece = material.images[other][top : top + place.height, left : left + place.width]
    return jitter(piece, rng, is_gray=material.is_gray)


def texture(rng: np.random.Generator, material: Material, place: Place) -> FloatArray:
    """A random texture, cropped or resized to the box, after three edits drawn from ten."""
    source = material.textures[int(rng.integers(len(material.textures)))]
    spare = source.shape[0] - place.height, source.shape[1] - place.width
    if min(spare) >= 0 and rng.random() < 0.5:
        top, left = (int(rng.integers(0, most, endpoint=True)) for most in spare)
        piece = source[top : top + place.height, left : left + place.width]
    else:
        method = cv2.INTER_AREA if min(spare) >= 0 else cv2.INTER_LINEAR
        piece = np.asarray(cv2.resize(source, (place.width, place.height), interpolation=method), np.float32)
    for edit in rng.choice(len(_EDITS), _TEXTURE_EDITS, replace=False):
        piece = np.clip(_EDITS[edit](rng, piece), 0.0, 255.0)
    return jitter(piece if not material.is_gray else to_gray(piece), rng, is_gray=material.is_gray)


def shuffled(rng: np.random.Generator, material: Material, place: Place) -> FloatArray:
    """The image itself, mirrored or not, cut into 8 by 8 cells that change places; of that, the box."""
    image = material.images[place.index]
    image = image[:, ::-1] if rng.random() < 0.5 else image
    rows, columns = image.shape[0] // _CELLS, image.shape[1] // _CELLS
    order = rng.permutation(_CELLS * _CELLS)
    mixed = image.copy()  # sides that are no multiple of 8 keep a margin as it was
    for row in range(place.top // rows, min(_CELLS, -(-(place.top + place.height) // rows))):
        for column in range(place.left // columns, min(_CELLS, -(-(place.left + place.width) // columns))):
            source_row, source_column = divmod(int(order[row * _CELLS + column]), _CELLS)
            target = mixed[row * rows : (row + 1) * rows, column * columns : (column + 1) * columns]
            source = image[source_row * rows :, source_column * columns :]
            target[:] = source[:rows, :columns]
    return jitter(mixed[place.window], rng, is_gray=material.is_gray)


def elastic(rng: np.random.Generator, material: Material, place: Place) -> FloatArray:
    """The place's own content, displaced by 9 to 15 pixels (sigma, in an image of 512)."""
    image = material.images[place.index]
    sigma = rng.uniform(9.0, 15.0) * max(image.shape[:2]) / 512
    away = smooth_field(rng, place.height, place.width, sigma)
    columns = away[:, :, 0] + np.arange(place.left, place.left + place.width, dtype=np.float32)
    rows = away[:, :, 1] + np.arange(place.top, place.top + place.height, dtype=np.float32)[:, None]
    # Gray is warped in one plane: three would cost more, and may be rounded differently.
    source = np.ascontiguousarray(image[:, :, 0]) if material.is_gray else image
    moved = cv2.remap(source, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    content = np.asarray(moved, np.float32)
    return _in_three(content) if material.is_gray else content


def tone(rng: np.random.Generator, material: Material, place: Place) -> FloatArray:
    """The place's own content, 8 to 90 grey levels brighter or darker, by gain and by offset: stain, shadow, dent."""
    content = material.images[place.index][place.window]
    level = float(content.mean())
    change = rng.choice([-1.0, 1.0]) * log_uniform(rng, WEAKEST_TONE, STRONGEST_TONE)
    if not 0.0 <= level + change <= 255.0:
        change = -change  # there is no room that way: clipping would hide it
    share = rng.random()
    gain = 1.0 + (1.0 - share) * change / max(level, 32.0)  # a black place has nothing to multiply
    return _linear(content, gain, level + change - gain * level)


FILLS: Mapping[str, Fill] = MappingProxyType(
    {"noise": noise, "cut": cut, "texture": texture, "shuffled": shuffled, "elastic": elastic, "tone": tone}
)


def jitter(image: FloatArray, rng: np.random.Generator, *, is_gray: bool) -> FloatArray:
    """Brightness, contrast, saturation and hue changed by up to a tenth, in this order; a gray image keeps its gray.

    The four are linear in the pixel, so that they are one product; hue is turned about the gray axis.
    """
    brightness, contrast, saturation = rng.uniform(1.0 - _JITTER, 1.0 + _JITTER, 3)
    turn = rng.uniform(-_JITTER, _JITTER)
    mean = brightness * float(np.asarray(cv2.mean(image)[:3]) @ LUMA)
    gain, offset = brightness * contrast, (1.0 - contrast) * mean
    if is_gray:
        return _linear(image, gain, offset)
    matrix = np.column_stack([gain * color_matrix(saturation, turn), np.full(3, offset)])
    changed = np.asarray(cv2.transform(image, matrix), np.float32)
    return np.clip(changed, 0.0, 255.0, out=changed)


def _linear(image: FloatArray, gain: float, offset: float) -> FloatArray:
    """gain * pixel + offset, kept in 0..255."""
    changed = image * np.float32(gain)
    changed += np.float32(offset)
    return np.clip(changed, 0.0, 255.0, out=changed)


def color_matrix(saturation: float, turn: float) -> npt.NDArray[np.float64]:
    """(3 3) for RGB: saturation as a factor, then hue as a share of the whole circle."""
    cosine, sine = math.cos(2.0 * math.pi * turn), math.sin(2.0 * math.pi * turn) / math.sqrt(3.0)
    rotation = np.full((3, 3), (1.0 - cosine) / 3.0) + cosine * np.eye(3)
    rotation += sine * np.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
    return rotation @ (saturation * np.eye(3) + (1.0 - saturation) * LUMA[None, :])


def to_gray(image: FloatArray) -> FloatArray:
    """(h w 3) with its luma in all three channels."""
    return _in_three(np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.float32))


def _in_three(plane: FloatArray) -> FloatArray:
    """(h w) as the three channels of a gray image, equal to the bit."""
    return np.asarray(cv2.cvtColor(plane, cv2.COLOR_GRAY2RGB), np.float32)


def is_gray(image: FloatArray) -> bool:
    return bool(np.array_equal(image[:, :, 0], image[:, :, 1]) and np.array_equal(image[:, :, 0], image[:, :, 2]))


def random_pixel(rng: np.random.Generator, region: BoolArray) -> tuple[int, int]:
    """(row, column) of a pixel of the region (H W), each as likely as the others."""
    for _ in range(8):  # most regions are large: this spares listing them
        row, column = (int(rng.integers(side)) for side in region.shape)
        if region[row, column]:
            return row, column
    inside = np.flatnonzero(region)
    row, column = divmod(int(inside[rng.integers(inside.size)]), region.shape[1])
    return row, column


def centre_within(centre: int, size: int, limit: int) -> int:
    """The start of a stretch of `size` about the centre, shifted into 0..limit; size <= limit."""
    return min(max(centre - size // 2, 0), limit - size)


def _gamma(rng: np.random.Generator, image: FloatArray) -> FloatArray:
    return np.asarray(255.0 * np.power(image / np.float32(255.0), np.float32(rng.uniform(0.5, 2.0))), np.float32)


def _brightness(rng: np.random.Generator, image: FloatArray) -> FloatArray:
    return image * np.float32(rng.uniform(0.8, 1.2)) + np.float32(rng.uniform(-30.0, 30.0))


def _sharpness(rng: np.random.Generator, image: FloatArray) -> FloatArray:
    factor, smooth = np.float32(rng.uniform(0.0, 2.0)), np.asarray(cv2.blur(image, (3, 3)), np.float32)
    return smooth + factor * (image - smooth)


def _color(rng: np.random.Generator, image: FloatArray) -> FloatArray:
    return np.asarray(cv2.transform(image, color_matrix(rng.uniform(0.7, 1.3), rng.uniform(-0.2, 0.2))), np.float32)


def _solarize(rng: np.random.Generator, image: FloatArray) -> FloatArray:
    return np.where(image > np.float32(rng.uniform(32.0, 128.0)), np.float32(255.0) - image, image)


def _posterize(rng: np.random.Generator, image: FloatArray) -> FloatArray:
    step = np.float32(2 ** (8 - int(rng.integers(2, 6, endpoint=True))))
    return np.asarray(np.floor(image / step) * step, np.float32)


def _invert(_rng: np.random.Generator, image: FloatArray) -> FloatArray:
    return np.float32(255.0) - image


def _autocontrast(_rng: np.random.Generator, image: FloatArray) -> FloatArray:
    low, high = float(image.min()), float(image.max())
    return (image - np.float32(low)) * np.float32(255.0 / max(high - low, 1.0))


def _equalize(_rng: np.random.Generator, image: FloatArray) -> FloatArray:
    planes: list[ByteArray] = [np.ascontiguousarray(image[:, :, channel]).astype(np.uint8) for channel in range(3)]
    return np.dstack([cv2.equalizeHist(plane) for plane in planes]).astype(np.float32)


def _rotate(rng: np.random.Generator, image: FloatArray) -> FloatArray:
    height, width = image.shape[:2]
    turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), rng.uniform(-45.0, 45.0), 1.0)
    turned = cv2.warpAffine(image, turn, (width, height), borderMode=cv2.BORDER_REFLECT_101)
    return np.asarray(turned, np.float32)


_EDITS: tuple[_Edit, ...] = (
    _gamma, _brightness, _sharpness, _color, _solarize, _posterize, _invert, _autocontrast, _equalize, _rotate,
)  # fmt: skip


def check_images(images: Sequence[FloatArray]) -> None:
    if len(images) == 0:
        raise DataError("found no images to corrupt, wanted one at least: give good images of the product")
    first = images[0].shape
    for number, image in enumerate(images):
        _check_pixels(image, f"image {number}")
        if image.shape != first:
            raise DataError(
                f"image {number} is {image.shape}, image 0 is {first}, wanted one size: resize to the network's input"
            )
    if min(first[:2]) < SMALLEST_SIDE:
        raise DataError(f"images are {first}, wanted sides of {SMALLEST_SIDE} pixels or more: use a larger input size")


def _check_pixels(image: FloatArray, name: str) -> None:
    if image.dtype != np.float32 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise DataError(
            f"{name} is {image.dtype} {image.shape}, wanted float32 (H W 3): convert it, and repeat gray three times"
        )
    low, high = float(image.min()), float(image.max())
    if not (low >= 0.0 and high <= 255.0):  # nan is caught too
        raise DataError(
            f"{name} has values from {low:.4g} to {high:.4g}, wanted 0..255: give pixels, not normalised ones"
        )


def _check_regions(masks: Sequence[BoolArray | ByteArray] | None, images: Sequence[FloatArray]) -> list[BoolArray]:
    """The foreground as bool masks (H W), one an image."""
    shape = images[0].shape[:2]
    if masks is None:
        return [np.ones(shape, np.bool_)] * len(images)
    if len(masks) != len(images):
        raise DataError(f"found {len(masks)} foreground masks and {len(images)} images, wanted one an image")
    for number, mask in enumerate(masks):
        if mask.shape != shape or not mask.any():
            raise DataError(
                f"foreground mask {number} is {mask.shape} with {np.count_nonzero(mask)} pixels set, wanted {shape} "
                "with one at least: make the masks from the same images, or give none"
            )
    return [mask.astype(np.bool_) for mask in masks]
