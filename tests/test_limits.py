"""The bench of the limit's promise, on scores whose behaviour is known: no engine is built here."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import betabinom

from bench.limits import (
    LINE,
    SETTINGS,
    TARGETS,
    at_most,
    by_order,
    calibration_size,
    dim,
    divide,
    exact_share,
    false_rejects,
    judge,
    measure,
    redraw,
)
from daemon.types import Frame
from trainer.calibrate import conformal_rank

POOL = 400


def pool(seed=0, count=POOL):
    """Scores with the long right tail of anomaly scores, in random order."""
    return np.random.default_rng(seed).lognormal(1, 0.4, count).astype(np.float32)


@pytest.mark.parametrize("target", TARGETS)
def test_exchangeable_scores_hold(target):
    kept = redraw(pool(), target)
    assert kept.supported
    assert kept.holds is True
    assert kept.fallbackHolds is None
    assert kept.n + kept.m == POOL
    assert abs(kept.falseRejectRate - kept.exactRate) < 4 * kept.redrawError
    assert kept.allowed == kept.promised + 2 * kept.redrawError
    assert kept.shareChance > 0.001


@pytest.mark.parametrize("target", TARGETS)
def test_redraws_cannot_see_the_order_but_the_order_can(target):
    """The later half is shifted: redrawn at random it is one mixed pool, in capture order it is not."""
    scores = pool()
    scores[POOL // 2 :] += 4
    kept = redraw(scores, target)
    assert kept.holds is True
    order = kept.captureOrder
    assert not order.withinBound
    assert not order.coveredByPromise
    assert order.falseRejectRate > 2 * order.bound95
    assert order.chanceAtLeast < 1e-4


def test_an_order_that_makes_the_limit_too_high_is_as_odd():
    scores = pool()
    scores[:100] += 20
    order = by_order(scores, 100, 0.05)
    assert (order.falseRejects, order.withinBound) == (0, True)
    assert order.chanceAtMost < 0.001


def test_redraw_depends_on_ranks_alone():
    """So a mean over random redraws of one pool tells of the arithmetic, not of the data."""
    scores = pool()
    assert redraw(scores, 0.05) == redraw(np.exp(scores.astype(np.float64)).astype(np.float32), 0.05)


def test_exchangeable_order_is_within_its_bound_about_as_often_as_it_says():
    n = calibration_size(POOL)
    outside = sum(not by_order(pool(seed), n, 0.05).withinBound for seed in range(400))
    assert outside / 400 == pytest.approx(exact_share(n, POOL - n, 0.05), abs=0.04)


def test_ties_make_rejects_rarer():
    coarse = np.round(pool())
    kept = redraw(coarse, 0.05)
    assert kept.holds is True
    assert kept.falseRejectRate < kept.exactRate
    assert measure(coarse)["tied"] > POOL // 2


def test_equal_scores_are_never_rejected():
    kept = redraw(np.ones(POOL, np.float32), 0.01)
    assert (kept.falseRejectRate, kept.redrawError, kept.holds, kept.shareOverBound) == (0, 0, True, 0)


def test_a_limit_that_breaks_its_word_is_reported(monkeypatch):
    """A limit made for a rate one fifth higher must not pass for a kept promise."""
    from bench import limits

    honest = limits.conformal_limit
    monkeypatch.setattr(limits, "conformal_limit", lambda scores, target: honest(scores, 1.2 * target))
    kept = redraw(pool(), 0.05)
    assert kept.holds is False
    verdict = judge(
        {"products": {"x": {"targets": [vars(kept) | {"captureOrder": vars(kept.captureOrder)}]}}, "banks": {}}
    )
    assert verdict["holds"] is False


def test_rejecting_starts_at_the_limit():
    scores = np.arange(1, 121, dtype=np.float32)  # 1..99 calibrate: the limit for 1 % is just above 99
    assert false_rejects(scores, 99, 0.01) == 21
    scores[99:] = 99
    assert false_rejects(scores, 99, 0.01) == 0
    scores[110] = np.nextafter(np.float32(99), np.float32(100))
    assert false_rejects(scores, 99, 0.01) == 1


def test_too_few_for_one_per_cent_is_said_and_measured_all_the_same():
    few = measure(pool(count=160))
    one, five = few["targets"]
    assert (one["n"], one["m"]) == (40, 120)
    assert not one["supported"]
    assert one["promised"] == pytest.approx(1 / 41)
    assert one["holds"] is None
    assert one["fallbackHolds"] is True
    assert five["supported"]
    assert five["holds"] is True
    verdict = judge({"products": {"few": few}, "banks": {}})
    assert verdict["holds"] is True
    assert (
        verdict["products"]["few"]["0.01"] | {"supported": False, "holds": None} == verdict["products"]["few"]["0.01"]
    )


@pytest.mark.parametrize(("count", "n"), [(160, 40), (197, 49), (198, 99), (300, 99), (396, 99), (700, 175)])
def test_calibration_is_a_quarter_but_enough_for_one_per_cent(count, n):
    assert calibration_size(count) == n


@pytest.mark.parametrize(("n", "m", "target"), [(99, 285, 0.01), (99, 285, 0.05), (175, 525, 0.01), (40, 120, 0.05)])
def test_exact_share_is_what_simulation_gives(n, m, target):
    generator, rounds = np.random.default_rng(1), 10_000
    rank = conformal_rank(n, target)
    scores = generator.random((rounds, n + m), dtype=np.float32)
    limits = np.partition(scores[:, :n], rank.rank - 1, axis=1)[:, rank.rank - 1]
    rates = (scores[:, n:] > limits[:, None]).mean(axis=1)
    assert (rates > rank.bound95).mean() == pytest.approx(exact_share(n, m, target), abs=0.01)


def test_exact_share_tends_to_five_per_cent_as_more_are_judged():
    shares = [exact_share(100, m, 0.05) for m in (100, 300, 1000, 1_000_000)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == pytest.approx(0.05, abs=1e-3)
    assert shares[1] < LINE < shares[0]


@pytest.mark.parametrize("target", TARGETS)
def test_redraws_exceed_the_bound_as_often_as_is_exact(target):
    """Many redraws of one untied pool follow the beta-binomial distribution, mean and tail."""
    kept = redraw(pool(), target, redraws=2500)
    assert kept.shareOverBound == pytest.approx(kept.exactShare, abs=0.02)
    rank = conformal_rank(kept.n, target)
    spread = betabinom.std(kept.m, kept.n + 1 - rank.rank, rank.rank) / kept.m
    assert kept.redrawError * 2500**0.5 == pytest.approx(spread, rel=0.06)


def test_at_most_does_not_exceed():
    assert at_most(0.05, 100) == 5
    assert at_most(0.0499, 100) == 4


@pytest.mark.parametrize(("count", "bank"), [(229, 76), (588, 196), (1000, 300)])
def test_bank_settings_and_pool_share_no_image(count, bank):
    parts = divide(count, seed=3)
    assert [len(part) for part in parts] == [bank, SETTINGS, count - bank - SETTINGS]
    assert sorted(index for part in parts for index in part) == list(range(count))
    assert all(part == sorted(part) for part in parts)
    assert divide(count, seed=3) == parts
    assert divide(count, seed=4) != parts


def test_dimming_scales_grey_levels():
    frame = Frame(np.array([[[100], [255]]], np.uint8))
    dimmed = dim(frame, 0.95).pixels
    assert dimmed.dtype == np.uint8
    assert dimmed.ravel().tolist() == [95, 242]
