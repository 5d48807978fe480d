"""How well a detector tells defective pictures, and pixels, from good ones.

Plain functions from numpy arrays to a number; a case the measure does not define (one class only, no defect
region) gives None, never nan. Nothing here reads files or knows a detector; the evaluation command calls it.
Masks count as defective wherever they are not 0, so 0/1, 0/255 and bool masks all do.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import average_precision_score, roc_auc_score

Images = Sequence[NDArray[np.generic]]  # one (H, W) each, sizes may differ from image to image


def image_auroc(labels: ArrayLike, scores: ArrayLike) -> float | None:
    """Area under the ROC curve; labels and scores are (N,), label true for defective."""
    truth, values = _labelled(labels, scores)
    return float(roc_auc_score(truth, values)) if _both_classes(truth) else None


def image_ap(labels: ArrayLike, scores: ArrayLike) -> float | None:
    """Average precision; labels and scores are (N,), label true for defective."""
    truth, values = _labelled(labels, scores)
    return float(average_precision_score(truth, values)) if _both_classes(truth) else None


def pixel_auroc(masks: Images, maps: Images) -> float | None:
    """Area under the ROC curve over the pixels of all images together."""
    return image_auroc(*_flat(masks, maps))


def pixel_ap(masks: Images, maps: Images) -> float | None:
    """Average precision over the pixels of all images together."""
    return image_ap(*_flat(masks, maps))


def f1_at(labels: ArrayLike, rejected: ArrayLike) -> float | None:
    """F1 of the decisions taken; labels and rejected are (N,). None without a defective one: no recall."""
    truth, values = _labelled(labels, rejected)
    if not truth.any():
        return None
    decided = values != 0
    return float(2 * np.sum(truth & decided) / (np.sum(truth) + np.sum(decided)))


def aupro(masks: Images, maps: Images, fpr_limit: float = 0.3) -> float | None:
    """Area under the per-region overlap curve up to a false positive rate, as a share of `fpr_limit`.

    Per-region overlap is the mean, over the 8-connected regions of all masks, of the share of the region at
    or above the threshold; the false positive rate counts the good pixels of all images. Bergmann et al.,
    The MVTec Anomaly Detection Dataset, IJCV 2021. Raises ValueError unless 0 < fpr_limit <= 1.
    """
    if not 0 < fpr_limit <= 1:
        raise ValueError(f"fpr_limit is {fpr_limit}, wanted above 0 and at most 1")
    _check_pairs(masks, maps)
    region_scores, weights, regions = _region_pixels(masks, maps)
    good_scores = [values[mask == 0] for mask, values in zip(masks, maps, strict=True)]
    good = np.concatenate(good_scores) if good_scores else np.empty(0)
    if regions == 0 or good.size == 0:
        return None
    good.sort()
    fpr, overlap = _overlap_curve(good, region_scores, weights / regions)
    return _area_to(fpr, overlap, fpr_limit) / fpr_limit


def _region_pixels(masks: Images, maps: Images) -> tuple[NDArray[np.generic], NDArray[np.float64], int]:
    """Scores of all defective pixels, 1 / area of the region of each, and the number of regions."""
    scores: list[NDArray[np.generic]] = []
    weights: list[NDArray[np.float64]] = []
    regions = 0
    for mask, values in zip(masks, maps, strict=True):
        defective = mask != 0
        count, numbered = cv2.connectedComponents(defective.astype(np.uint8), connectivity=8)
        inside = np.asarray(numbered)[defective]
        scores.append(values[defective])
        weights.append(1 / np.bincount(inside, minlength=count)[inside])
        regions += count - 1  # number 0 is the background
    if not scores:
        return np.empty(0), np.empty(0), 0
    return np.concatenate(scores), np.concatenate(weights), regions


def _overlap_curve(
    good: NDArray[np.generic], scores: NDArray[np.generic], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """False positive rate and overlap at the corners of the curve, (0, 0) to (1, 1); `good` is ascending.

    Every distinct score is a threshold. Between two scores of defective pixels the overlap stays level,
    however many good scores lie there, so two points for each distinct defective score hold the whole curve:
    one with the good pixels above it, one with the pixels equal to it as well.
    """
    thresholds, group = np.unique(scores, return_inverse=True)
    reached = np.cumsum(np.bincount(group, weights=weights)[::-1])
    thresholds = thresholds[::-1]
    above = good.size - np.searchsorted(good, thresholds, side="right")
    at_or_above = good.size - np.searchsorted(good, thresholds, side="left")
    fpr = np.column_stack([above, at_or_above]).ravel() / good.size
    overlap = np.column_stack([np.append(0.0, reached[:-1]), reached]).ravel()
    return np.concatenate([[0.0], fpr, [1.0]]), np.concatenate([[0.0], overlap, [1.0]])


def _area_to(fpr: NDArray[np.float64], overlap: NDArray[np.float64], limit: float) -> float:
    """Trapezoids from 0 to the limit; the segment that crosses the limit is cut there."""
    inside = int(np.searchsorted(fpr, limit, side="right"))
    x, y = fpr[:inside], overlap[:inside]
    if inside < fpr.size:
        at_limit = np.interp(limit, fpr[inside - 1 : inside + 1], overlap[inside - 1 : inside + 1])
        x, y = np.append(x, limit), np.append(y, at_limit)
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1])) / 2)


def _labelled(labels: ArrayLike, values: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.generic]]:
    """Both as (N,) arrays, labels as bool. Raises ValueError for other shapes and for nan."""
    truth, numbers = np.asarray(labels) != 0, np.asarray(values)
    if truth.ndim != 1 or numbers.shape != truth.shape:
        raise ValueError(f"labels and values are {truth.shape} and {numbers.shape}, wanted (N,) and (N,)")
    if not np.isfinite(numbers).all():
        raise ValueError("values hold nan or infinity, wanted finite numbers")
    return truth, numbers


def _both_classes(truth: NDArray[np.bool_]) -> bool:
    return bool(truth.any() and not truth.all())


def _check_pairs(masks: Images, maps: Images) -> None:
    """Raise ValueError unless each mask is (H, W) and its map likewise, and finite."""
    if len(masks) != len(maps):
        raise ValueError(f"found {len(masks)} masks and {len(maps)} maps, wanted as many of each")
    for index, (mask, values) in enumerate(zip(masks, maps, strict=True)):
        if mask.ndim != 2 or values.shape != mask.shape:
            raise ValueError(
                f"mask and map {index} are {mask.shape} and {values.shape}, wanted (H, W) and the same (H, W)"
            )
        if not np.isfinite(values).all():
            raise ValueError(f"map {index} holds nan or infinity, wanted finite numbers")


def _flat(masks: Images, maps: Images) -> tuple[NDArray[np.bool_], NDArray[np.generic]]:
    """All pixels of all images in one row: defective or not, and score."""
    _check_pairs(masks, maps)
    if not masks:
        return np.empty(0, bool), np.empty(0)
    return np.concatenate([np.ravel(m) != 0 for m in masks]), np.concatenate([np.ravel(v) for v in maps])
