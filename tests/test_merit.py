"""What the trainer's choices go by: AUROC, its standard error, and synthetic defects on held-out images."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from daemon.inspection.backend.tables import smoothing_operator
from examples.parts import render_part
from trainer import merit as merits
from trainer.dataset import Picture
from trainer.merit import (
    Merit,
    SampledMap,
    Spoilt,
    Truth,
    auroc,
    find_merit,
    frame_side,
    is_better,
    spoil,
    standard_error,
)


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=60))
def test_auroc_is_sklearns_with_ties(rows):
    values, positive = np.array([row[0] for row in rows], np.float32), np.array([row[1] for row in rows])
    one_class = positive.all() or not positive.any()
    wanted = 0.5 if one_class else roc_auc_score(positive, values)
    assert auroc(values, positive) == pytest.approx(wanted)


def test_auroc_of_real_values():
    rng = np.random.default_rng(0)
    positive = rng.random(500) < 0.3
    values = (rng.normal(size=500) + positive).astype(np.float32)
    assert auroc(values, positive) == pytest.approx(roc_auc_score(positive, values))
    assert auroc(positive.astype(np.float32), positive) == 1.0


# The bootstrap


@given(st.integers(0, 10_000), st.integers(1, 5), st.booleans())
def test_redrawn_aurocs_are_those_of_the_values_repeated(seed, spread, has_ties):
    rng = np.random.default_rng(seed)
    source = rng.integers(0, 5, 80)
    positive = rng.random(80) < 0.4
    values = (rng.normal(size=80) * spread + positive).astype(np.float32)
    values = np.round(values) if has_ties else values
    times = rng.integers(0, 3, (4, 5))
    found = merits._redrawn_aurocs(values, positive, source, times)
    for row, redrawn in zip(times, found, strict=True):
        repeats = row[source]
        many, truth = np.repeat(values, repeats), np.repeat(positive, repeats)
        if truth.any() and not truth.all():
            assert redrawn == pytest.approx(auroc(many, truth))


def test_redrawn_aurocs_of_many_values_are_exact_to_a_thousandth():
    rng = np.random.default_rng(1)
    positive = rng.random(60_000) < 0.03
    values = (rng.normal(size=60_000) + 2 * positive).astype(np.float32)
    found = merits._redrawn_aurocs(values, positive, np.zeros(60_000, np.int64), np.ones((1, 1), np.int64))
    assert found[0] == pytest.approx(auroc(values, positive), abs=1e-3)


def make_maps(seed, sources=30, each=3, pixels=64, gain=1.5):
    """Sampled maps of `sources` good images and `each` defects of every one, with one defective pixel in eight."""
    rng = np.random.default_rng(seed)
    source = np.r_[np.arange(sources), np.repeat(np.arange(sources), each)]
    mask = np.zeros((len(source), pixels), bool)
    mask[sources:, :8] = True
    maps = rng.normal(size=mask.shape) + 0.5 * rng.normal(size=sources)[source, None] + gain * mask
    return maps.astype(np.float32), Truth(mask, source)


def test_standard_error_is_that_of_fresh_samples():
    """The spread of the difference over 60 independent samples, against what the bootstrap says of one."""
    gains = (1.0, 1.6)
    differences, errors = [], []
    for seed in range(60):
        (one, truth), (other, _) = (make_maps(seed + 1000 * index, gain=gain) for index, gain in enumerate(gains))
        differences.append(find_merit(one, truth).value - find_merit(other, truth).value)
        if seed < 10:
            errors.append(standard_error((one, truth), (other, truth)))
    spread = np.std(differences)
    assert 0.6 * spread < np.mean(errors) < 1.5 * spread


def test_equal_maps_have_no_error():
    maps, truth = make_maps(0)
    assert standard_error((maps, truth), (maps, truth)) == 0.0


def test_maps_of_two_resolutions_are_compared():
    """A coarser map that says the same has all but the same merit in every redraw."""
    maps, truth = make_maps(0)
    coarse = maps.reshape(len(maps), 16, 4).mean(2)
    of_coarse = Truth(truth.mask.reshape(len(maps), 16, 4).any(2), truth.source)
    fine = np.repeat(coarse, 4, axis=1)
    of_fine = Truth(np.repeat(of_coarse.mask, 4, axis=1), truth.source)
    assert standard_error((coarse, of_coarse), (fine, of_fine)) < 1e-4  # the bins differ
    assert standard_error((coarse, of_coarse), (maps, truth)) > 0.001


# Merit


def test_merit_is_the_mean_of_both_aurocs():
    maps, truth = make_maps(0)
    found = find_merit(maps, truth)
    assert found.image_auroc == pytest.approx(roc_auc_score(truth.mask.any(1), maps.max(1)))
    assert found.pixel_auroc == pytest.approx(roc_auc_score(truth.mask.ravel(), maps.ravel()))
    assert found.value == pytest.approx((found.image_auroc + found.pixel_auroc) / 2)


@pytest.mark.parametrize(
    ("new", "error", "better"),
    [
        (Merit(0.9, 0.9), 0.09, True),
        (Merit(0.9, 0.9), 0.11, False),  # 0.1 better, less than the standard error
        (Merit(0.8, 0.8), 0.0, False),  # no better
        (Merit(0.79, 1.0), 0.0, False),  # ranks images worse
    ],
)
def test_better_is_more_than_the_standard_error(new, error, better):
    assert is_better(new, Merit(0.8, 0.8), error) is better


# Synthetic defects on held-out images


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    found = []
    for seed in range(3):
        path = tmp_path_factory.mktemp("parts") / f"{seed}.png"
        assert cv2.imwrite(str(path), render_part(seed, size_hw=(96, 128))[0])
        found.append(Picture(path, (96, 128), str(seed)))
    return found


def test_spoilt_frames_come_after_the_good_ones_and_are_the_seeds(pictures):
    first, again, other = (spoil(pictures, each=2, seed=seed) for seed in (0, 0, 1))
    assert list(first.source) == [0, 1, 2, 0, 0, 1, 1, 2, 2]
    assert {frame.shape for frame in first.pictures} == {(96, 128, 3)}
    assert {frame.dtype for frame in first.pictures} == {np.dtype(np.uint8)}
    assert not any(mask.any() for mask in first.masks[:3])
    assert all(mask.any() for mask in first.masks[3:])
    for index in range(3, 9):
        # A soft edge fades out beyond the mask.
        outside = cv2.dilate(first.masks[index].astype(np.uint8), np.ones((13, 13), np.uint8)) == 0
        np.testing.assert_array_equal(first.pictures[index][outside], first.pictures[first.source[index]][outside])
        np.testing.assert_array_equal(first.pictures[index], again.pictures[index])
    assert any((first.pictures[index] != other.pictures[index]).any() for index in range(3, 9))


@pytest.mark.parametrize(("sides", "wanted"), [([300, 310, 290], 288), ([2448], 768), ([20], 32), ([100, 720], 416)])
def test_defects_are_put_on_frames_of_the_cameras_size(sides, wanted):
    assert frame_side([Picture(Path("x.png"), (side // 2, side), "") for side in sides]) == wanted


def test_sampled_map_is_the_daemons_map_at_every_eighth_pixel():
    size, grid, sigma = (64, 96), (8, 12), 3.0
    scores = np.random.default_rng(0).random(96).astype(np.float32)
    whole = smoothing_operator(64, 8, sigma) @ scores.reshape(grid) @ smoothing_operator(96, 12, sigma).T
    np.testing.assert_allclose(SampledMap(size, grid, sigma).sample(scores), whole[4::8, 4::8].ravel(), rtol=1e-5)


def test_truth_keeps_a_hairline_and_nothing_of_a_good_image():
    masks = [np.zeros((64, 96), bool) for _ in range(3)]
    masks[1][10, 20:60] = True  # one pixel wide: an eighth of what it crosses
    masks[2][16:32, 16:32] = True
    spoilt = Spoilt([], masks, np.array([0, 0, 0]))
    truth = SampledMap((64, 96), (8, 12), 3.0).truth(spoilt)
    assert list(truth.is_defective) == [False, True, True]
    assert truth.mask[1].reshape(8, 12)[1].sum() == 6
    assert truth.mask[1].sum() == 6
    assert set(np.flatnonzero(truth.mask[2])) == {26, 27, 38, 39}
