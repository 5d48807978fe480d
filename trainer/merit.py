"""How well an engine tells good images from synthetic defects: what every choice of the trainer goes by.

Held-out good images, and the same ones with defects whose shapes and fills no network was trained on
(corruption.CHOICE), get the maps that the daemon would make of them. The defects are put on the camera's frames, not on
the network's input: through the same resize as everything else a defect is as sharp as the part, and the same one for
every input size. Painted at the input's resolution they spoke for inputs larger than the frame (docs/accuracy.md).
Merit is the mean of image and pixel AUROC.
Something else than the plain engine is taken only where `is_better` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from daemon.bundle import Preprocessing
from daemon.inspection.backend.tables import score_of, smoothing_operator
from daemon.types import ByteArray, FloatArray
from trainer import dataset
from trainer.corruption import CHOICE, Corruptor, estimate_foreground
from trainer.dataset import Picture
from trainer.features import read_pixels
from trainer.shapes import BoolArray

# Standard errors. Two kept plain 1-NN on magnetic_tile, where all settings that were tried had won two to six points
# (docs/accuracy.md); since the images may not be ranked worse either, one is doubt enough.
_SURE = 1.0
_STEP = 8  # every 8th pixel of the smoothed map stands for its surroundings
_COVERED = 0.25  # of such a pixel's surroundings, for it to count as defective
_LONGEST_FRAME = 768  # pixels; more would only cost time
_REDRAWS = 400  # of the bootstrap
_BINS = 1000  # of scores in the bootstrap; a pixel's rank is known to a thousandth


@dataclass(frozen=True)
class Spoilt:
    """Good frames (H W 3), then defects of them; their masks (H W), and which good frame each one is of."""

    pictures: Sequence[ByteArray]
    masks: Sequence[BoolArray]
    source: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Truth:
    """mask (images, pixels) of the sampled maps, source (images,): which good image each one is or is made of."""

    mask: BoolArray
    source: npt.NDArray[np.int64]

    @property
    def is_defective(self) -> BoolArray:
        """(images,)."""
        found: BoolArray = self.mask.any(1)
        return found


@dataclass(frozen=True)
class Merit:
    """AUROC of images and of pixels, 0..1."""

    image_auroc: float
    pixel_auroc: float

    @property
    def value(self) -> float:
        return 0.5 * (self.image_auroc + self.pixel_auroc)


def spoil(pictures: Sequence[Picture], *, each: int, seed: int) -> Spoilt:
    """The pictures as frames of one size, at most 768 pixels on the long side, and `each` defects of every one."""
    size = dataset.network_size(pictures, frame_side(pictures))
    plain = Preprocessing(size=size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    good = [read_pixels(picture, plain) for picture in pictures]
    corruptor = Corruptor(good, CHOICE, foreground=estimate_foreground(good))
    frames, masks = [_as_bytes(image) for image in good], [np.zeros(size, bool) for _ in good]
    source = list(range(len(good)))
    for index in range(len(good)):
        rng = np.random.default_rng((seed, index))
        for _ in range(each):
            made = corruptor.corrupt(index, rng)
            frames.append(_as_bytes(made.pixels))
            masks.append(made.mask)
            source.append(index)
    return Spoilt(frames, masks, np.array(source))


def frame_side(pictures: Sequence[Picture]) -> int:
    """The median long side of the pictures' frames, as a multiple of 32 up to 768."""
    found = float(np.median([max(picture.hw) for picture in pictures]))
    return int(min(_LONGEST_FRAME, max(32, 32 * round(found / 32))))


def _as_bytes(image: FloatArray) -> ByteArray:
    found: ByteArray = np.rint(np.clip(image, 0.0, 255.0)).astype(np.uint8)
    return found


class SampledMap:
    """Patch scores -> every 8th pixel of the smoothed map that the daemon would make of them."""

    def __init__(self, size: tuple[int, int], grid: tuple[int, int], sigma: float) -> None:
        self._grid = grid
        self._down = smoothing_operator(size[0], grid[0], sigma)[_STEP // 2 :: _STEP]
        self._across = smoothing_operator(size[1], grid[1], sigma)[_STEP // 2 :: _STEP].T
        self._shape = (len(self._down), self._across.shape[1])

    def sample(self, scores: FloatArray) -> FloatArray:
        """(P,) -> (pixels,)."""
        found: FloatArray = (self._down @ scores.reshape(self._grid) @ self._across).ravel()
        return found

    def truth(self, spoilt: Spoilt) -> Truth:
        """The masks, sampled the same way. A defect too small for that keeps the pixel that it covers most."""
        shares = [
            cv2.resize(mask.astype(np.float32), self._shape[::-1], interpolation=cv2.INTER_AREA).ravel()
            for mask in spoilt.masks
        ]
        return Truth(
            np.stack([(share > 0.0) & (share >= min(_COVERED, 0.5 * share.max())) for share in shares]), spoilt.source
        )


def find_merit(maps: FloatArray, truth: Truth, rule: str = "max") -> Merit:
    """Of sampled maps (images, pixels), each image scored by the rule."""
    return Merit(auroc(image_scores(maps, rule), truth.is_defective), auroc(maps.ravel(), truth.mask.ravel()))


def image_scores(maps: FloatArray, rule: str) -> FloatArray:
    """(images,) of sampled maps (images, pixels)."""
    return np.array([score_of(values, rule) for values in maps], np.float32)


def is_better(new: Merit, old: Merit, error: float) -> bool:
    """Whether `new` has the greater merit, by more than the standard error, and ranks images no worse."""
    return new.image_auroc >= old.image_auroc and new.value - old.value > _SURE * error


def auroc(values: FloatArray, positive: BoolArray) -> float:
    """Area under the ROC curve by ranks, ties counted half (Mann-Whitney); 0.5 where one class is absent."""
    count = int(positive.sum())
    others = len(positive) - count
    if not count or not others:
        return 0.5
    ranks = rankdata(values)
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * others))


def standard_error(one: tuple[FloatArray, Truth], other: tuple[FloatArray, Truth], rule: str = "max") -> float:
    """Of the difference of the merits of two sets of maps (images, pixels), by a paired bootstrap over good images.

    Both are of the same images, at the same or at different resolutions. A good image is drawn together with the
    defects made of it: they are no independent witnesses.
    """
    sources = int(one[1].source.max()) + 1
    drawn = np.random.default_rng(0).integers(sources, size=(_REDRAWS, sources))
    times = np.stack([np.bincount(row, minlength=sources) for row in drawn])  # (redraws, sources)
    first, second = (_redrawn_merits(maps, truth, times, rule) for maps, truth in (one, other))
    return float(np.std(first - second))


def _redrawn_merits(
    maps: FloatArray, truth: Truth, times: npt.NDArray[np.int64], rule: str
) -> npt.NDArray[np.float64]:  # fmt: skip
    pixels = maps.shape[1]
    of_images = _redrawn_aurocs(image_scores(maps, rule), truth.is_defective, truth.source, times)
    of_pixels = _redrawn_aurocs(maps.ravel(), truth.mask.ravel(), np.repeat(truth.source, pixels), times)
    return 0.5 * (of_images + of_pixels)


def _redrawn_aurocs(
    values: FloatArray, positive: BoolArray, source: npt.NDArray[np.int64], times: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """AUROC (redraws,) where the values (n,) of a source count as often as it was drawn.

    Counted in bins of the values' quantiles, so that a redraw is a product of two small matrices; with fewer than
    a thousand values it is exact.
    """
    levels = np.unique(values)[1:]
    edges = levels if len(levels) < _BINS else np.unique(np.quantile(values, np.linspace(0.0, 1.0, _BINS + 1)[1:-1]))
    bins = np.searchsorted(edges, values, side="right") + (len(edges) + 1) * source
    shape = (times.shape[1], len(edges) + 1)
    above, below = (
        times @ np.bincount(bins[kind], minlength=shape[0] * shape[1]).reshape(shape) for kind in (positive, ~positive)
    )
    lower = np.cumsum(below, axis=1) - below
    pairs = above.sum(1) * below.sum(1)
    won = (above * (lower + 0.5 * below)).sum(1)
    return np.where(pairs > 0, won / np.maximum(pairs, 1), 0.5)
