"""The choice of settings: its measures, its search, and that it never does worse than plain 1-NN."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from examples.parts import render_part
from tests.toys import tiny_backbone
from trainer import choose as choosing
from trainer import features, grid
from trainer.choose import FEWEST, Trial, Wishes, choose, in_words, nominal_ms
from trainer.dataset import Picture, Splits
from trainer.merit import Merit, Truth, find_merit
from trainer.settings import Settings, View


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("parts"), []
    for seed in range(16):
        path = folder / f"{seed}.png"
        assert cv2.imwrite(str(path), render_part(seed, size_hw=(112, 112))[0])
        found.append(Picture(path, (112, 112), str(seed)))
    return found


SMALL_GRID = {
    "SIZES": (64, 128), "CORESETS": (50, 200), "NEIGHBOURS": (1, 5), "ALPHAS": (0.0, 0.25, 1.0),
}  # fmt: skip


@pytest.fixture
def _small_grid(monkeypatch):
    for name, values in SMALL_GRID.items():
        monkeypatch.setattr(choosing, name, values)


@pytest.fixture(scope="module")
def whole(backbone, pictures):
    """The choice on the whole small grid."""
    with pytest.MonkeyPatch.context() as patch:
        for name, values in SMALL_GRID.items():
            patch.setattr(choosing, name, values)
        return run(backbone, few(pictures))


@pytest.fixture(scope="module", autouse=True)
def _converted_once():
    """The conversion to OpenVINO takes most of a try; here there is one network, so once for each view and size."""
    kept, convert = {}, features._convert

    def convert_once(module, size):
        key = (module._view, size)
        if key not in kept:
            kept[key] = convert(module, size)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "_convert", convert_once)
        yield


def few(pictures):
    whole = tuple(pictures)
    return Splits(whole, whole, whole, (), few=True)


def run(backbone, splits, seconds=math.inf, **wishes):
    return choose(backbone, splits, Wishes(**wishes), threads=1, seed=0, seconds=seconds)


# Parts of the search


@pytest.mark.parametrize("limits", [[40], [1, 7, 40], [5, 20, 33, 40]])
def test_nested_search_finds_the_nearest_of_each_limit(limits):
    generator = torch.Generator().manual_seed(0)
    queries, core = torch.randn(30, 6, generator=generator), torch.randn(40, 6, generator=generator)
    queries[:10] = core[:10]  # distance 0
    found = grid._nested_nearest(queries, core, core.square().sum(1) / -2, limits)
    assert list(found) == limits
    for limit, (nearest, distance) in found.items():
        wanted = (queries[:, None].double() - core[None, :limit].double()).square().sum(2).min(1)
        np.testing.assert_array_equal(nearest, wanted.indices)
        np.testing.assert_allclose(distance, wanted.values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [FEWEST, 13, 29, 60, 100, 500])
def test_the_last_third_in_capture_order_is_held_out(count):
    good = [Picture(Path(f"{index}.png"), (8, 8), str(index)) for index in range(count)]
    banked, held = ([int(picture.path.stem) for picture in part] for part in choosing._divide(good))
    first = count - count // 3
    assert (len(held), len(banked)) == (min(30, count // 3), min(80, first))
    for part, start, end in ((banked, 0, first), (held, first, count)):
        assert (part[0], part[-1]) == (start, end - 1)
        assert part == sorted(set(part))
        assert max(np.diff(part)) <= 2 * (end - start) / len(part) + 1  # evenly over its stretch


def test_cost_grows_with_everything_that_it_counts():
    base = {"pixels": 256 * 256, "patches": 1024, "rows": 4000, "channels": 152}
    plain = nominal_ms(**base, with_repair=False)
    assert plain > 0
    assert nominal_ms(**base, with_repair=True) > plain
    for name, value in base.items():
        assert nominal_ms(**(base | {name: 2 * value}), with_repair=False) > plain


@pytest.mark.parametrize(
    ("hw", "sizes"), [((300, 300), [256]), ((240, 356), [256, 384]), ((2048, 2448), [256, 384, 512]), ((90, 80), [256])]
)
def test_inputs_much_larger_than_the_frame_are_not_tried(hw, sizes):
    good = [Picture(Path("x.png"), hw, "")] * 3
    assert choosing._sizes(Wishes(), good) == sizes
    assert choosing._sizes(Wishes(long_side=640), good) == [640]


# When there is nothing to choose


def test_what_is_all_given_is_not_tried(pictures):
    choice = run(None, few(pictures), long_side=96, k=5, alpha=0.5, coreset=123)  # not even a backbone
    assert choice.settings == Settings(96, View(), 123, 5, 0.5)
    assert choice.trials == ()
    assert "given on the command line" in choice.reason


def test_few_images_take_plain_nearest_neighbour(pictures):
    choice = run(None, few(pictures[: FEWEST - 1]))
    assert choice.settings.alpha == 0.0
    assert "too few to choose on" in choice.reason
    assert f"{FEWEST - 1} images" in choice.reason
    assert run(None, few(pictures[:3]), alpha=0.5, long_side=64).settings == Settings(long_side=64, alpha=0.5)


def test_calibration_images_are_not_looked_at(pictures):
    splits = Splits(tuple(pictures[:8]), tuple(pictures[8:11]), tuple(pictures), ())
    assert "11 images" in run(None, splits).reason


def test_nothing_affordable_gives_the_defaults_and_says_so(backbone, pictures):
    choice = run(backbone, few(pictures), budget_ms=0.01, long_side=64)
    assert choice.settings == Settings(long_side=64)
    assert choice.trials == ()
    assert "--budget-ms" in choice.reason


# The rule, on made-up trials


def scores(plain, corrected):
    """One pixel an image: 20 good images and 20 defects of them; K 1 at alpha 1 turns `plain` into `corrected`."""
    good_then_bad = np.r_[np.zeros(20, bool), np.ones(20, bool)]
    column = [np.asarray(values, np.float32)[:, None] for values in (plain, np.subtract(plain, corrected))]
    truth = Truth(good_then_bad[:, None], np.r_[np.arange(20), np.arange(20)])
    return grid.GridScores({100: column[0]}, {(100, 1): column[1]}, truth)


def take(plain, corrected):
    made = scores(plain, corrected)
    settings = [Settings(64, View(), 100, 1, alpha) for alpha in (0.0, 1.0)]
    trials = [Trial(each, find_merit(made.maps(each), made.truth), 1.0) for each in settings]
    return choosing._take(trials, {trial.settings: made for trial in trials}, Settings())


SEPARATE = np.r_[np.arange(20), 100 + np.arange(20)]
MIXED = np.random.default_rng(0).permutation(40)


def test_equal_merits_take_plain():
    choice = take(MIXED, MIXED)
    assert choice.settings.alpha == 0.0
    assert choice.plain is not None
    assert choice.settings == choice.plain.settings
    assert "plain 1-NN" in choice.reason


def test_clear_gain_takes_the_best():
    choice = take(MIXED, SEPARATE)
    assert choice.settings.alpha == 1.0
    assert choice.plain is not None
    assert choice.trials[0].merit.value == 1.0 > choice.plain.merit.value
    assert "over plain 1-NN" in choice.reason


def test_gain_that_may_be_chance_takes_plain():
    nearly = MIXED.copy()
    low = int(np.argmin(nearly[20:])) + 20
    nearly[low] = nearly[low] + 5  # one defect a little higher
    choice = take(MIXED, nearly)
    assert choice.trials[0].settings.alpha == 1.0  # it is better, but by less than chance would explain
    assert choice.settings.alpha == 0.0
    assert "may be chance" in choice.reason


def test_loss_takes_plain():
    assert take(SEPARATE, MIXED).settings.alpha == 0.0


def test_setting_that_ranks_images_worse_is_not_taken_for_its_pixels():
    plain, other = (Trial(Settings(64, View(), 100, 1, alpha), Merit(*merit), 1.0) for alpha, merit in (
        (0.0, (0.9, 0.5)), (1.0, (0.89, 1.0))))  # fmt: skip
    made = scores(MIXED, SEPARATE)
    choice = choosing._take([plain, other], {plain.settings: made, other.settings: made}, Settings())
    assert choice.settings == plain.settings
    assert choice.trials[0] is other


def test_settings_of_two_input_sizes_are_compared():
    small, large = scores(MIXED, SEPARATE), scores(SEPARATE, SEPARATE)
    large = grid.GridScores(
        {100: np.repeat(large.distance[100], 4, axis=1)},
        {},
        Truth(np.repeat(large.truth.mask, 4, 1), large.truth.source),
    )
    kept = {Settings(64, View(), 100, 1, 0.0): small, Settings(128, View(), 100, 1, 0.0): large}
    trials = [Trial(each, find_merit(kept[each].maps(each), kept[each].truth), 1.0) for each in kept]
    choice = choosing._take(trials, kept, Settings())
    assert choice.settings.long_side == 128
    assert "over plain 1-NN" in choice.reason


def test_larger_input_must_be_better_beyond_doubt():
    """256 and 512 are both far better than plain; 512 by a hair more than 256."""
    nearly = np.where(np.arange(40) == 20, 18, SEPARATE)  # one defect among the good ones
    made = {
        Settings(128, View(), 100, 1, 0.0): scores(MIXED, MIXED),
        Settings(256, View("levelled"), 100, 1, 0.0): scores(nearly, nearly),
        Settings(512, View("levelled"), 100, 1, 0.0): scores(SEPARATE, SEPARATE),
    }
    trials = [Trial(each, find_merit(kept.maps(each), kept.truth), 1.0) for each, kept in made.items()]
    choice = choosing._take(trials, made, Settings())
    assert choice.trials[0].settings.long_side == 512
    assert choice.settings.long_side == 256
    without = [trials[0], trials[2]]
    assert choosing._take(without, made, Settings()).settings.long_side == 512


def test_of_settings_that_are_as_good_the_least_corrected_is_taken():
    """Alpha 1 is best by a hair, 0.5 as good, 0.25 clearly worse though better than plain."""
    good_then_bad = np.r_[np.zeros(20, bool), np.ones(20, bool)]
    truth = Truth(good_then_bad[:, None], np.r_[np.arange(20), np.arange(20)])
    nearly = np.where(np.arange(40) == 20, 18, SEPARATE)  # one defect among the good ones
    halfway = np.where(np.arange(40) % 4 == 0, MIXED, SEPARATE)
    column = {alpha: np.asarray(values, np.float32)[:, None] for alpha, values in
              {0.0: MIXED, 0.25: halfway, 0.5: nearly, 1.0: SEPARATE}.items()}  # fmt: skip
    made = {
        alpha: grid.GridScores({100: column[0.0]}, {(100, 1): (column[0.0] - column[alpha]) / (alpha or 1)}, truth)
        for alpha in column
    }
    kept = {Settings(64, View(), 100, 1, alpha): made[alpha] for alpha in column}
    trials = [Trial(each, find_merit(kept[each].maps(each), kept[each].truth), 1.0) for each in kept]
    choice = choosing._take(trials, kept, Settings())
    assert choice.trials[0].settings.alpha == 1.0
    assert choice.settings.alpha == 0.5


def test_without_plain_in_the_grid_the_best_is_taken():
    made = scores(MIXED, SEPARATE)
    trials = [
        Trial(Settings(64, View(), 100, 1, 0.5), Merit(0.7, 0.6), 1.0),
        Trial(Settings(64, View(), 100, 1, 1.0), Merit(0.9, 0.9), 1.0),
    ]
    choice = choosing._take(trials, {trial.settings: made for trial in trials}, Settings())
    assert choice.settings.alpha == 1.0
    assert choice.plain is None


def test_no_trials_give_the_defaults():
    assert choosing._take([], {}, Settings(k=3)).settings == Settings(k=3)


# The whole choice


@pytest.mark.usefixtures("_small_grid")
def test_choice_can_be_repeated_and_is_never_worse_than_plain(backbone, pictures, whole):
    choice = run(backbone, few(pictures))
    assert choice == whole
    assert choice.plain is not None
    by_settings = {trial.settings: trial for trial in choice.trials}
    assert len(by_settings) == len(choice.trials)
    assert by_settings[choice.settings].merit.value >= choice.plain.merit.value
    assert choice.plain.settings.alpha == 0.0
    merits = [trial.merit.value for trial in choice.trials]
    assert merits == sorted(merits, reverse=True)
    views = {
        (trial.settings.long_side, trial.settings.view.exposure, trial.settings.view.tiles) for trial in choice.trials
    }
    assert {(64, "as-is", "none"), (64, "levelled", "none")} <= views
    assert {(side, tiles) for side, _, tiles in views} == {(64, "none"), (128, "none"), (128, "2x2")}
    assert in_words(choice.settings).startswith(f"{choice.settings.long_side} pixels")
    assert 0.5 < choice.trials[0].merit.image_auroc <= 1.0
    assert 0.5 < choice.trials[0].merit.pixel_auroc <= 1.0


@pytest.mark.usefixtures("_small_grid")
def test_no_trial_costs_more_than_a_frame_may_take(backbone, pictures, whole):
    costs = sorted({trial.nominal_ms for trial in whole.trials if trial.settings.long_side == 64})
    budget = (costs[0] + costs[-1]) / 2
    choice = run(backbone, few(pictures), long_side=64, budget_ms=budget)
    assert choice.trials
    assert max(trial.nominal_ms for trial in choice.trials) <= budget < costs[-1]


@pytest.mark.usefixtures("_small_grid")
def test_wishes_are_kept_and_the_rest_is_chosen(backbone, pictures):
    choice = run(backbone, few(pictures), long_side=64, k=5, alpha=0.25)
    tried = {(trial.settings.long_side, trial.settings.k, trial.settings.alpha) for trial in choice.trials}
    assert tried == {(64, 5, 0.25)}
    assert {trial.settings.coreset for trial in choice.trials} == {50, 200}
    assert "ruled out" in choice.reason


@pytest.mark.usefixtures("_small_grid")
def test_bank_smaller_than_the_coresets_of_the_grid_is_tried_whole(backbone, pictures, monkeypatch):
    monkeypatch.setattr(choosing, "CORESETS", (50, 5000))
    choice = run(backbone, few(pictures), long_side=64)
    assert {trial.settings.coreset for trial in choice.trials} == {50, 11 * 64}


@pytest.mark.usefixtures("_small_grid")
def test_no_time_leaves_the_first_view_alone(backbone, pictures):
    choice = run(backbone, few(pictures), seconds=0.0)
    assert {(trial.settings.long_side, trial.settings.view) for trial in choice.trials} == {(64, View())}
