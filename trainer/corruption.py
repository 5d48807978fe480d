"""The corruption model: a good image becomes one with a synthetic defect, and the mask of it.

A recipe names the shapes (trainer/shapes.py) and fills (trainer/fills.py) that are drawn from. Networks are
trained on one recipe and settings chosen on another that shares neither a shape nor a fill with it:
otherwise the choice would praise what was learnt by heart. Placement and blending are DefectMaker's (Lyu et
al. 2023, REB). Images are float32 (H W 3), RGB in 0..255, all of the network's input size.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import cv2
import numpy as np

from daemon.errors import DataError, UsageError
from daemon.types import ByteArray, FloatArray
from trainer.fills import FILLS, Place, centre_within, check_images, is_gray, jitter, make_material, random_pixel
from trainer.shapes import SHAPES, BoolArray, perlin

VISIBLE_OPACITY = 0.1  # a pixel blended by less is not in the mask
VISIBLE_CHANGE = 3.0  # grey levels, mean over the mask; a weaker corruption is drawn again
_DRAWS = 8
_DRAWS_OF_A_KIND = 2  # shape and fill stay for so many draws, or kinds that are often invisible would be rare
_PLACES = 5  # one and four more
_ON_FOREGROUND = 1 / 3  # of the shape
_OPACITY = {"blob": (1.0, 1.0), "scar": (1.0, 1.0), "clump": (0.5, 1.0)}  # whatever the recipe says
_SOFTENED = 0.5  # of the corruptions
_MOST_JUDGED = 25  # images that decide whether there is a background
_LEAST_CONTRAST = 12.0  # grey levels between the background and what stands out most
_WIDEST_SPREAD = 0.2  # of the contrast
_MOST_AT_RIM = 0.7  # of the share that the object has inside: an object is not as frequent at the rim
_LEAST_STEP = 0.25  # of the contrast, at the object's edge: light that falls off has none
_SMALLEST_PIECE = 0.01  # of the image
_PREVIEW_WIDTH = 2000  # pixels
_GAP, _CAPTION = 2, 20
_OUTLINE, _PAPER = (0, 0, 255), (255, 255, 255)  # BGR


@dataclass(frozen=True)
class Corrupted:
    """pixels float32 (H W 3) in 0..255; mask bool (H W), true where the blend has an opacity of 0.1 or more."""

    pixels: FloatArray
    mask: BoolArray
    shape: str
    fill: str


@dataclass(frozen=True)
class Recipe:
    """Names in SHAPES and FILLS, each as likely as the others, and the range of opacities, in 0.1..1."""

    shapes: tuple[str, ...]
    fills: tuple[str, ...]
    opacity: tuple[float, float] = (0.5, 1.0)


TRAINING = Recipe(("blob", "scar", "clump", "speck"), ("cut", "noise", "texture"))
CHOICE = Recipe(("perlin", "ellipse", "hairline"), ("shuffled", "elastic", "tone"))


class Corruptor:
    """Makes defects on the images of one product. It keeps no state: the generator alone decides."""

    def __init__(
        self,
        images: Sequence[FloatArray],
        recipe: Recipe,
        *,
        textures: Sequence[FloatArray] = (),
        foreground: Sequence[BoolArray | ByteArray] | None = None,
    ) -> None:
        """`foreground` (H W) an image, true or above 0 where a defect may lie; anywhere if None.

        Textures are float32 (h w 3) of any size; without any the recipe's "texture" is left out. Raises
        DataError for images, textures or masks that do not fit, UsageError for a recipe that cannot be followed.
        """
        _check_recipe(recipe)
        self.material = make_material(images, textures, foreground)
        self.fills = tuple(name for name in recipe.fills if len(textures) or name != "texture")
        if not self.fills:
            raise UsageError(
                'the recipe has no fill but "texture" and there are no textures: give some, or another fill'
            )
        self.recipe = recipe

    def corrupt(
        self, index: int, rng: np.random.Generator, shape: str | None = None, fill: str | None = None
    ) -> Corrupted:
        """The image with that number, with a defect; shape and fill are drawn from the recipe unless named.

        What cannot be seen is drawn again, seven times at most; then the strongest counts. Raises UsageError
        for an unknown name, and for "texture" without textures.
        """
        _check_names("shape", () if shape is None else (shape,), SHAPES)
        _check_names("fill", () if fill is None else (fill,), FILLS)
        if fill == "texture" and not len(self.material.textures):
            raise UsageError('found the fill "texture" and no textures: give Corruptor some, or name another fill')
        best, most, kind = None, -1.0, ("", "")
        for number in range(_DRAWS):
            if number % _DRAWS_OF_A_KIND == 0:
                shape_number, fill_number = rng.integers([len(self.recipe.shapes), len(self.fills)])
                kind = shape or self.recipe.shapes[shape_number], fill or self.fills[fill_number]
            drawn, change = self._draw(index, rng, *kind)
            if best is None or change > most:
                best, most = drawn, change
            if most >= VISIBLE_CHANGE:
                break
        assert best is not None
        return best

    def _draw(self, index: int, rng: np.random.Generator, shape: str, fill: str) -> tuple[Corrupted, float]:
        """One corruption and its mean absolute change inside the mask, in grey levels."""
        image = self.material.images[index]
        patch, top, left = self._put(index, rng, shape)
        opacity = patch * np.float32(rng.uniform(*_OPACITY.get(shape, self.recipe.opacity)))
        if rng.random() < _SOFTENED:
            opacity, top, left = _soften(opacity, top, left, image.shape[:2], 5 if shape == "blob" else 3)
        place = Place(index, top, left, *opacity.shape)
        step = FILLS[fill](rng, self.material, place) - image[place.window]
        step *= cv2.cvtColor(opacity, cv2.COLOR_GRAY2RGB)  # numpy is slow at repeating the last axis itself
        pixels, mask = image.copy(), np.zeros(image.shape[:2], np.bool_)
        after, visible = pixels[place.window], opacity >= VISIBLE_OPACITY
        np.clip(np.add(after, step, out=after), 0.0, 255.0, out=after)  # against rounding beyond the ends
        mask[place.window] = visible
        change = cv2.norm(step, cv2.NORM_L1, visible.view(np.uint8)) / step.shape[2] / np.count_nonzero(visible)
        return Corrupted(pixels, mask, shape, fill), change

    def _put(self, index: int, rng: np.random.Generator, shape: str) -> tuple[FloatArray, int, int]:
        """The shape (h w), its top and its left: about a foreground pixel, and a third on it if five tries can."""
        region = self.material.regions[index]
        height, width = region.shape
        best, most = None, -1.0
        for _ in range(_PLACES):
            # A field has no place of its own, so that it is the foreground that bounds it.
            patch = perlin(rng, height, width, region) if shape == "perlin" else SHAPES[shape](rng, height, width)
            centre = random_pixel(rng, region)
            top, left = (centre_within(*sizes) for sizes in zip(centre, patch.shape, region.shape, strict=True))
            under = region[top : top + patch.shape[0], left : left + patch.shape[1]]
            share = np.count_nonzero(under & (patch > 0)) / np.count_nonzero(patch)
            if best is None or share > most:
                best, most = (patch.astype(np.float32), top, left), share
            if most >= _ON_FOREGROUND:
                break
        assert best is not None
        return best


def _soften(
    opacity: FloatArray, top: int, left: int, limits: tuple[int, ...], kernel: int
) -> tuple[FloatArray, int, int]:
    """The patch (h w), its top and its left with an edge that fades; it grows by half a kernel inside the image.

    A shape that erosion would take more than half of is blurred only; one that would then be invisible stays hard.
    """
    reach = kernel // 2
    padded = cv2.copyMakeBorder(opacity, reach, reach, reach, reach, cv2.BORDER_CONSTANT, value=0.0)
    element = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (kernel, kernel))
    eroded = cv2.erode(padded, element)
    core = eroded if eroded.sum() >= 0.5 * padded.sum() else padded
    blurred = cv2.GaussianBlur(core, (kernel, kernel), float(kernel), borderType=cv2.BORDER_CONSTANT)
    soft = np.asarray(blurred, np.float32)
    up, aside = min(reach, top), min(reach, left)  # what of the border is inside the image
    down = min(reach, limits[0] - top - opacity.shape[0])
    beyond = min(reach, limits[1] - left - opacity.shape[1])
    rows = slice(reach - up, reach + opacity.shape[0] + down)
    columns = slice(reach - aside, reach + opacity.shape[1] + beyond)
    if not np.any(soft[rows, columns] >= VISIBLE_OPACITY):
        return opacity, top, left
    return soft[rows, columns], top - up, left - aside


def _check_recipe(recipe: Recipe) -> None:
    _check_names("shape", recipe.shapes, SHAPES)
    _check_names("fill", recipe.fills, FILLS)
    if not recipe.shapes or not recipe.fills:
        raise UsageError(f"found {recipe}, wanted at least one shape and one fill: name some")
    low, high = recipe.opacity
    if not VISIBLE_OPACITY <= low <= high <= 1.0:
        raise UsageError(
            f"found opacity {recipe.opacity}, wanted {VISIBLE_OPACITY} <= low <= high <= 1: change the recipe"
        )


def _check_names(kind: str, names: Collection[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise UsageError(f"found the {kind} {name!r}, wanted one of {', '.join(known)}: correct the name")


def augment(image: FloatArray, rng: np.random.Generator) -> FloatArray:
    """A good image (H W 3) as it might have been taken: DefectMaker's jitter, turns and mirrorings.

    An image that is not square keeps its shape: it is only mirrored or turned upside down.
    """
    image = jitter(image, rng, is_gray=is_gray(image))
    choices = ["none", "90", "180", "270", "transpose", "transverse", "transverse", "mirror", "mirror"]
    if image.shape[0] != image.shape[1]:
        choices = ["none", "180", "mirror", "mirror"]
    choice = choices[int(rng.integers(len(choices)))]
    if choice.isdigit():
        image = np.rot90(image, int(choice) // 90)
    elif choice == "mirror":
        image = image[:, ::-1]
    elif choice.startswith("trans"):
        image = image.transpose(1, 0, 2)
        image = image if choice == "transpose" else image[::-1, ::-1]
    return np.ascontiguousarray(image)


def estimate_foreground(images: Sequence[FloatArray]) -> list[BoolArray]:
    """Where the object is, a mask (H W) an image, of good images (H W 3) of one product; everywhere in doubt.

    An even background shows in the image's rim, which differs little from its own median color. Each image is
    judged alone, as parts may lie turned; the medians over up to 25 of them decide. Raises DataError where
    there are no images, or of several sizes.
    """
    check_images(images)
    rim = _rim(images[0].shape[:2])
    picked = np.unique(np.linspace(0, len(images) - 1, _MOST_JUDGED).astype(int))
    judged = [_distance_to_rim(images[number], rim) for number in picked]
    pooled = np.minimum(np.stack(judged), 255.0).astype(np.uint8).reshape(len(judged), -1)
    threshold = cv2.threshold(pooled, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[0]
    # Up to three tenths of the rim may be object: a part that touches the border.
    spread = np.median([np.percentile(distance[rim], 70) for distance in judged])
    contrast = np.median([np.percentile(distance[~rim], 98) for distance in judged])
    at_rim = np.mean([np.mean(distance[rim] > threshold) for distance in judged])
    inside = np.mean([np.mean(distance[~rim] > threshold) for distance in judged])
    step = np.median([_step_at_edge(distance, threshold) for distance in judged])
    is_even = contrast >= _LEAST_CONTRAST and spread <= _WIDEST_SPREAD * contrast
    if not is_even or at_rim > _MOST_AT_RIM * inside or step < _LEAST_STEP * contrast:
        return [np.ones(rim.shape, np.bool_) for _ in images]
    return [_object_mask(_distance_to_rim(image, rim) > threshold) for image in images]


def _rim(shape: tuple[int, ...]) -> BoolArray:
    """(H W), true within 3 % of the short side of the border."""
    width = max(1, round(0.03 * min(shape)))
    rim = np.ones(shape, np.bool_)
    rim[width:-width, width:-width] = False
    return rim


def _distance_to_rim(image: FloatArray, rim: BoolArray) -> FloatArray:
    """(H W) in grey levels: how far each pixel, without its grain, is from the rim's median color."""
    smooth = cv2.GaussianBlur(image, (0, 0), max(1.0, max(rim.shape) / 256))
    away = np.abs(smooth - np.median(smooth[rim], axis=0))
    return np.asarray(away.max(axis=2), np.float32)


def _step_at_edge(distance: FloatArray, threshold: float) -> float:
    """How much the distance (H W) changes, in the median, within a few pixels of where it passes the threshold."""
    edge = cv2.morphologyEx((distance > threshold).astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    if not np.any(edge):
        return 0.0
    near = np.ones([2 * (max(distance.shape) // 64) + 3] * 2, np.uint8)
    return float(np.median(cv2.morphologyEx(distance, cv2.MORPH_GRADIENT, near)[np.asarray(edge) > 0]))


def _object_mask(found: BoolArray) -> BoolArray:
    """The pixels found (H W), closed, with their holes, without pieces below 1 %; the whole image if none is left."""
    side = max(3, max(found.shape) // 64 | 1)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    closed = cv2.morphologyEx(found.astype(np.uint8), cv2.MORPH_CLOSE, kernel)
    outlines = cv2.findContours(closed, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
    mask = np.zeros(found.shape, np.uint8)
    for outline in outlines:
        piece = cv2.drawContours(np.zeros(found.shape, np.uint8), [outline], -1, 1, cv2.FILLED)
        if np.count_nonzero(piece) >= _SMALLEST_PIECE * found.size:
            mask |= np.asarray(piece, np.uint8)
    return mask > 0 if mask.any() else np.ones(found.shape, np.bool_)


def write_preview(path: Path, corruptor: Corruptor, rng: np.random.Generator) -> None:
    """A PNG of every shape (rows) with every fill (columns), each beside itself with the mask's outline.

    Fills that need textures are left out where there are none. Raises DataError if the file cannot be written.
    """
    material = corruptor.material
    fills = [name for name in FILLS if len(material.textures) or name != "texture"]
    side = _PREVIEW_WIDTH // (2 * len(fills)) - _GAP
    cells = []
    for number, (shape, fill) in enumerate(product(SHAPES, fills)):
        cells.append(_draw_cell(corruptor.corrupt(number % len(material.images), rng, shape, fill), side))
    rows = [np.hstack(cells[start : start + len(fills)]) for start in range(0, len(cells), len(fills))]
    done, data = cv2.imencode(".png", np.vstack(rows))
    if not done:
        raise DataError(f"{path}: OpenCV cannot encode the preview as PNG: give images with less extreme sides")
    try:
        path.write_bytes(data.tobytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}; name a file in a folder that exists") from error


def _draw_cell(corrupted: Corrupted, side: int) -> ByteArray:
    """BGR: shape and fill in words, below them the picture, and again with the mask's outline, `side` pixels long."""
    height, width = corrupted.mask.shape
    size = tuple(max(1, round(length * side / max(height, width))) for length in (width, height))
    method = cv2.INTER_AREA if side < max(height, width) else cv2.INTER_NEAREST
    picture = np.rint(cv2.resize(corrupted.pixels[:, :, ::-1], size, interpolation=method)).astype(np.uint8)
    mask = cv2.resize(corrupted.mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    outlined = picture.copy()
    cv2.drawContours(outlined, cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)[0], -1, _OUTLINE, 1)
    both = np.hstack([picture, outlined])
    cell = cv2.copyMakeBorder(both, _CAPTION, _GAP, _GAP, _GAP, cv2.BORDER_CONSTANT, value=_PAPER)
    words = f"{corrupted.shape}, {corrupted.fill}"
    cv2.putText(cell, words, (_GAP, _CAPTION - 6), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    return np.asarray(cell, np.uint8)
