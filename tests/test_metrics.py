"""The detection metrics against cases worked by hand, and AUPRO against a slow loop over all thresholds."""

from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from trainer.metrics import aupro, f1_at, image_ap, image_auroc, pixel_ap, pixel_auroc


def row(*values: float) -> NDArray[np.float32]:
    return np.array([values], np.float32)


def test_aupro_of_a_perfect_map_is_one() -> None:
    mask = row(1, 1, 0, 0)
    assert aupro([mask], [mask]) == pytest.approx(1.0)


def test_aupro_of_an_inverted_map_is_zero() -> None:
    # All good pixels come first: the curve runs along overlap 0 to FPR 1 before it rises.
    mask = row(1, 1, 0, 0)
    assert aupro([mask], [1 - mask]) == pytest.approx(0.0)


def test_aupro_of_a_constant_map_is_the_area_under_the_diagonal() -> None:
    # One threshold takes all: (0, 0) straight to (1, 1). Area to 0.3 is 0.3^2 / 2 = 0.045; over 0.3, 0.15.
    assert aupro([row(1, 1, 0, 0, 0)], [row(5, 5, 5, 5, 5)]) == pytest.approx(0.15)


def test_aupro_gives_a_small_region_the_weight_of_a_large_one() -> None:
    # Regions of 1 and 4 pixels, 5 good pixels. The small one scores 9, then a good pixel 8, the large one 7.
    # Overlap 1/2 from FPR 0 to 1/5, then 1. Area to 0.3: 0.2 * 0.5 + 0.1 * 1 = 0.2; over 0.3, 2/3.
    mask = row(1, 0, 1, 1, 1, 1, 0, 0, 0, 0)
    scores = row(9, 8, 7, 7, 7, 7, 1, 1, 1, 1)
    assert aupro([mask], [scores]) == pytest.approx(2 / 3)


def test_aupro_takes_tied_pixels_as_one_threshold() -> None:
    # A defective and a good pixel tie at 5: slope from (0, 0) to (1/2, 1/2). The other one, 4, lifts
    # it to (1/2, 1). Area to 1: 0.5 * 0.5 / 2 + 0.5 * 1 = 0.625.
    assert aupro([row(1, 1, 0, 0)], [row(5, 4, 5, 1)], fpr_limit=1.0) == pytest.approx(0.625)


def test_aupro_cuts_the_segment_that_crosses_the_limit() -> None:
    # Defective 9 and 5, good 5, 5, 1, 1: (0, 0), (0, 1/2), then all ties at 5: (1/2, 1), (1, 1).
    # At FPR 0.3 the overlap is 1/2 + 0.3 / 0.5 * 1/2 = 0.8.
    # Area: 0.3 * (0.5 + 0.8) / 2 = 0.195; over 0.3, 0.65.
    assert aupro([row(1, 1, 0, 0, 0, 0)], [row(9, 5, 5, 5, 1, 1)]) == pytest.approx(0.65)


def test_aupro_joins_pixels_that_touch_at_a_corner() -> None:
    # One region of 3 pixels, two of them found before any good pixel: overlap 2/3 throughout, up to FPR 1.
    mask = np.array([[1, 0, 0], [0, 1, 1], [0, 0, 0]], np.uint8)
    scores = np.array([[9, 1, 1], [1, 9, 0], [1, 1, 1]], np.float32)
    assert aupro([mask], [scores], fpr_limit=1.0) == pytest.approx(2 / 3)


def test_aupro_counts_the_false_positives_of_good_images() -> None:
    # 2 good pixels beside the defect and 2 in a good picture of another size, one of which scores highest.
    # Overlap 0 to FPR 1/4, then 1. Area to 0.5: 0.25; over 0.5, one half.
    masks, maps = [row(1, 0, 0), row(0, 0).T], [row(5, 1, 1), row(9, 1).T]
    assert aupro(masks, maps, fpr_limit=0.5) == pytest.approx(0.5)


def slow_aupro(masks: list[NDArray[np.uint8]], maps: list[NDArray[np.float32]], limit: float) -> float | None:
    """Every threshold in turn, every region counted by itself, one trapezoid after the other."""
    regions = []
    for mask, scores in zip(masks, maps, strict=True):
        count, numbered = cv2.connectedComponents(mask, connectivity=8)
        regions += [scores[np.asarray(numbered) == number] for number in range(1, count)]
    good = np.concatenate([scores[mask == 0] for mask, scores in zip(masks, maps, strict=True)])
    if not regions or not good.size:
        return None
    thresholds = sorted({float(v) for scores in maps for v in scores.flat}, reverse=True)
    found = [float(np.mean([np.mean(region >= threshold) for region in regions])) for threshold in thresholds]
    points = [(0.0, 0.0), *zip([float(np.mean(good >= t)) for t in thresholds], found, strict=True)]
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 < limit and x1 > x0:
            end = min(x1, limit)
            area += (end - x0) * (y0 + y0 + (y1 - y0) * (end - x0) / (x1 - x0)) / 2
    return area / limit


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4),
    levels=st.integers(1, 12),
    share=st.floats(0, 1),
    limit=st.floats(0.01, 1),
)
def test_aupro_equals_the_loop_over_all_thresholds(
    seed: int, sizes: list[tuple[int, int]], levels: int, share: float, limit: float
) -> None:
    rng = np.random.default_rng(seed)
    masks = [(rng.random(size) < share).astype(np.uint8) for size in sizes]
    maps = [rng.integers(0, levels, size).astype(np.float32) for size in sizes]
    assert aupro(masks, maps, limit) == pytest.approx(slow_aupro(masks, maps, limit), abs=1e-9)


def test_image_metrics_of_a_case_worked_by_hand() -> None:
    # Of the four (defective, good) pairs three are in order. Precision at the two defective ones: 1 and 2/3.
    labels, scores = [1, 0, 1, 0], [0.9, 0.5, 0.4, 0.1]
    assert image_auroc(labels, scores) == pytest.approx(3 / 4)
    assert image_ap(labels, scores) == pytest.approx((1 + 2 / 3) / 2)


def test_pixel_metrics_join_images_of_different_sizes() -> None:
    masks, maps = [row(255, 0), row(255, 0).T], [row(0.9, 0.5), row(0.4, 0.1).T]
    assert pixel_auroc(masks, maps) == pytest.approx(3 / 4)
    assert pixel_ap(masks, maps) == pytest.approx((1 + 2 / 3) / 2)


def test_f1_weighs_missed_and_false_rejects_alike() -> None:
    # 1 found, 1 missed, 2 false: 2 * 1 / (2 * 1 + 1 + 2).
    assert f1_at([1, 1, 0, 0, 0], [True, False, True, True, False]) == pytest.approx(2 / 5)


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_only_gives_none(label: int) -> None:
    assert image_auroc([label] * 3, [1, 2, 3]) is None
    assert image_ap([label] * 3, [1, 2, 3]) is None
    masks, maps = [np.full((2, 2), label, np.uint8)], [np.eye(2, dtype=np.float32)]
    assert pixel_auroc(masks, maps) is None
    assert pixel_ap(masks, maps) is None
    assert aupro(masks, maps) is None


def test_no_images_give_none() -> None:
    assert image_auroc([], []) is None
    assert pixel_ap([], []) is None
    assert aupro([], []) is None


def test_f1_without_a_defective_part_is_none() -> None:
    assert f1_at([0, 0], [False, True]) is None


def test_shapes_that_differ_are_refused_with_both_named() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 2\)"):
        aupro([np.zeros((2, 3), np.uint8)], [np.zeros((3, 2), np.float32)])
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        image_auroc([0, 1], [1, 2, 3])
    with pytest.raises(ValueError, match="1 masks and 0 maps"):
        pixel_auroc([row(1)], [])


def test_scores_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="nan"):
        aupro([row(1, 0)], [row(np.nan, 0)])
    with pytest.raises(ValueError, match="nan"):
        image_ap([1, 0], [np.nan, 0])


@pytest.mark.parametrize("limit", [0, -0.1, 1.1])
def test_false_positive_limit_outside_its_range_is_refused(limit: float) -> None:
    with pytest.raises(ValueError, match="fpr_limit"):
        aupro([row(1, 0)], [row(1, 0)], fpr_limit=limit)
