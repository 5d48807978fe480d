"""The sequential test: what it promises of false alarms for any distribution and any calibration, and what it finds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from daemon.inspection.drift import (
    BETWEEN_FALSE_ALARMS,
    Ranks,
    RankTest,
    _bets,
    alarm_share,
    passing_scores,
)
from daemon.inspection.rate import judge_rate, rate_bounds
from trainer.calibrate import conformal_limit

Values = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], Values]

DISTRIBUTIONS: dict[str, Draw] = {
    "gaussian": lambda rng, count: rng.normal(size=count),
    "heavy tails": lambda rng, count: rng.standard_cauchy(count),
    "three values": lambda rng, count: rng.choice([0.0, 0.0, 0.0, 1.0, 2.0], count),
    "half zeros": lambda rng, count: np.maximum(0.0, rng.normal(size=count)),
}


def until(test: RankTest, values: Values, evidence: float = BETWEEN_FALSE_ALARMS) -> int | None:
    """After how many of the values the alarm is out."""
    for number, value in enumerate(values, 1):
        test.add(float(value))
        if test.evidence >= evidence:
            return number
    return None


# --- ranks


def places(ranks: Ranks, values: list[float]) -> list[tuple[float, float]]:
    return [copy.deepcopy(ranks).place(value) for value in values]


@pytest.mark.parametrize("seed", range(5))
def test_the_gaps_of_the_reference_share_all_ranks_among_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    reference = np.sort(rng.normal(size=7))
    ranks = Ranks(reference.tolist())
    for value in rng.normal(0.5, size=30):
        ranks.place(float(value))
    middles = [reference[0] - 1, *((low + high) / 2 for low, high in pairwise(reference)), reference[-1] + 1]
    found = places(ranks, middles)
    assert found[0][0] == 0.0
    assert found[-1][1] == 1.0
    assert sum(high - low for low, high in found) == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(5))
def test_every_bet_pays_one_on_average_while_nothing_has_changed(seed: int) -> None:
    rng = np.random.default_rng(seed)
    reference = np.sort(rng.normal(size=9))
    ranks = Ranks(reference.tolist())
    for value in rng.normal(-0.3, size=50):
        ranks.place(float(value))
    middles = [reference[0] - 1, *((low + high) / 2 for low, high in pairwise(reference)), reference[-1] + 1]
    intervals = places(ranks, middles)
    for bet in range(3):
        upwards = sum((high - low) * _bets(low, high)[bet] for low, high in intervals)
        downwards = sum((high - low) * _bets(1 - high, 1 - low)[bet] for low, high in intervals)
        assert (upwards, downwards) == (pytest.approx(1.0), pytest.approx(1.0))


def test_equal_values_take_the_whole_room_of_their_equals() -> None:
    assert Ranks([1.0, 2.0, 2.0, 3.0]).place(2.0) == (1 / 5, 4 / 5)
    assert Ranks([0.0] * 9).place(0.0) == (0.0, 1.0)


# --- false alarms


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("n", [1, 5, 30, 100, 300])
def test_values_between_false_alarms_are_as_many_as_promised_for_any_calibration(name: str, n: int) -> None:
    # At 100 in place of 250,000, so that there are alarms to count. Each run has a calibration of its own. The mean
    # is some 140, as the sum jumps over its threshold; of 150 runs it is known to a tenth.
    draw, promised, runs, longest = DISTRIBUTIONS[name], 100, 150, 1500
    lengths = []
    for seed in range(runs):
        rng = np.random.default_rng([seed, n])
        found = until(RankTest(draw(rng, n).tolist()), draw(rng, longest), promised)
        lengths.append(longest if found is None else found)
    assert np.mean(lengths) >= promised


class Frozen(Ranks):
    """Takes the calibration for the truth: never learns where a small one is off."""

    def place(self, value: float) -> tuple[float, float]:
        counts, total = self._counts.copy(), self._total
        placed = super().place(value)
        self._counts, self._total = counts, total
        return placed


def alarms_in(values: int, n: int, runs: int, ranks: type[Ranks]) -> int:
    found = 0
    for seed in range(runs):
        rng = np.random.default_rng([seed, n, 7])
        test = RankTest([])
        test._above = test._below = ranks(rng.normal(size=n).tolist())
        found += until(test, rng.normal(size=values)) is not None
    return found


def test_thirty_calibration_scores_raise_no_alarm_where_taking_them_for_the_truth_would() -> None:
    assert alarms_in(3000, n=30, runs=20, ranks=Ranks) == 0
    assert alarms_in(3000, n=30, runs=20, ranks=Frozen) >= 2


def test_equal_values_for_ever_are_no_evidence() -> None:
    test = RankTest([0.0] * 30)
    assert until(test, np.zeros(5000), 1e-9) is None


def test_without_calibration_scores_there_is_no_alarm() -> None:
    test = RankTest([])
    assert until(test, np.random.default_rng(0).normal(size=3000).cumsum(), 1e-9) is None


def test_change_that_does_not_matter_is_let_pass() -> None:
    # A score of now is above one of the calibration with probability 0.55: the smallest bet is on 0.67.
    rng = np.random.default_rng(3)
    assert until(RankTest(rng.normal(size=300).tolist()), rng.normal(0.18, size=4000)) is None


# --- what is found


@pytest.mark.parametrize("sign", [1, -1], ids=["higher", "lower"])
@pytest.mark.parametrize(
    ("n", "before", "deviations"),
    # Thirty calibration scores alone cannot prove less than two deviations; what the line has shown since counts too.
    [(30, 0, 2.5), (30, 300, 1.5), (100, 0, 1.5), (300, 1000, 1.5)],
)
def test_change_of_the_scores_is_found_within_sixty_values(n: int, before: int, deviations: float, sign: int) -> None:
    for seed in range(5):
        rng = np.random.default_rng([seed, n])
        test = RankTest(rng.normal(size=n).tolist())
        assert until(test, rng.normal(size=before)) is None
        found = until(test, rng.normal(deviations * sign, size=60))
        assert found is not None
        assert abs(test.since - found) <= 10


def test_values_beyond_all_of_thirty_are_found_within_fifteen() -> None:
    found = until(RankTest(np.arange(30.0).tolist()), np.full(15, 40.0) + np.arange(15) / 100)
    assert found is not None
    assert found >= 5  # and one or two strays are no alarm


def test_stray_values_do_not_hide_a_change() -> None:
    rng = np.random.default_rng(1)
    test = RankTest(rng.normal(size=100).tolist())
    values = np.where(np.arange(60) % 5 == 4, -3.0, rng.normal(3.0, size=60))
    assert until(test, values) is not None


def test_alarm_share_is_one_at_the_alarm_and_nothing_at_nothing() -> None:
    assert alarm_share(0.0) == 0.0
    assert alarm_share(BETWEEN_FALSE_ALARMS) == 1.0


# --- what does not matter to the line


def test_change_within_the_deadband_is_let_pass_however_alike_the_calibration_is() -> None:
    rng = np.random.default_rng(5)
    reference = rng.normal(100.0, 0.1, 30).tolist()
    assert until(RankTest(reference, deadband=5.0), rng.normal(104.0, 0.1, 5000)) is None
    assert until(RankTest(reference, deadband=5.0), rng.normal(96.0, 0.1, 5000)) is None
    assert until(RankTest(reference), rng.normal(101.0, 0.1, 20)) is not None
    for level in (85.0, 115.0):
        found = until(RankTest(reference, deadband=5.0), rng.normal(level, 0.1, 20))
        assert found is not None


@pytest.mark.parametrize("n", [5, 30, 100])
def test_deadband_only_makes_false_alarms_rarer(n: int) -> None:
    lengths = []
    for seed in range(40):
        rng = np.random.default_rng([seed, n])
        found = until(RankTest(rng.normal(size=n).tolist(), 0.2), rng.normal(size=1000), 100)
        lengths.append(1000 if found is None else found)
    assert np.mean(lengths) >= 100


# --- against which scores


def test_score_that_set_the_limit_is_no_reference() -> None:
    scores = np.random.default_rng(0).normal(size=50).astype(np.float32)
    product = conformal_limit(scores, 0.1)
    found = passing_scores(scores.tolist(), product.limit)
    ordered = np.sort(scores).astype(float).tolist()
    assert found == ordered[:45]  # the 46th passes too: the limit is the next number above it
    assert ordered[45] < product.limit <= ordered[46]
    assert passing_scores([1.0, 2.0, 9.0], 5.0) == [1.0, 2.0]
    assert passing_scores([9.0], 5.0) == []


def test_passed_scores_are_like_the_passing_calibration_scores_without_it() -> None:
    # A passed score is above all m of them once in m + 1 times; with the one that set the limit it never would be.
    rng = np.random.default_rng(0)
    n, runs, above, passed = 20, 6000, 0, 0
    for _ in range(runs):
        scores = rng.normal(size=n + 1).astype(np.float32)
        limit = conformal_limit(scores[:n], 0.1).limit
        reference = passing_scores(scores[:n].tolist(), limit)
        if scores[n] < limit:
            passed += 1
            above += float(scores[n]) > reference[-1]
    share = 1 / (len(reference) + 1)
    assert above / passed == pytest.approx(share, abs=4 * (share / passed) ** 0.5)


# --- the rate of rejects


def test_bounds_of_cases_known_beforehand() -> None:
    assert rate_bounds(0, 0) == (0.0, 1.0)
    low, high = rate_bounds(1000, 0)
    assert low == 0.0
    assert 0.003 < high < 0.01  # 3 / n for a single look, and what looking always costs
    low, high = rate_bounds(10, 10)
    assert high == 1.0
    assert 0.5 < low < 0.8
    low, high = rate_bounds(10_000, 200)
    assert 0.014 < low < 0.02 < high < 0.027


@pytest.mark.parametrize("rate", [0.01, 0.2])
def test_true_rate_leaves_the_bounds_in_at_most_one_of_twenty_lines_though_looked_at_all_the_time(rate: float) -> None:
    looks = np.unique(np.geomspace(1, 3000, 60).astype(int))
    left = 0
    for seed in range(200):
        rejected = (np.random.default_rng(seed).random(3000) < rate).cumsum()
        bounds = [rate_bounds(int(look), int(rejected[look - 1])) for look in looks]
        left += not all(low <= rate <= high for low, high in bounds)
    assert left <= 0.05 * 200


def test_promise_is_kept_exceeded_or_open() -> None:
    assert judge_rate(10, 0, 0.03) == "open"
    assert judge_rate(2000, 10, 0.03) == "kept"
    assert judge_rate(2000, 200, 0.03) == "exceeded"
