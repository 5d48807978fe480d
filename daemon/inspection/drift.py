"""Do values still come from the distribution of a calibration sample? Sequential, two-sided, distribution-free.

Each new value is ranked among the calibration values and all values since. As long as they are exchangeable that rank
is uniform, whatever their distribution is and however small the sample: what a few calibration values leave open is in
the law of the ranks itself. A bet on the rank (Lehmann 1953: u^theta) is a likelihood ratio as in Wald's sequential
test (1947), and the sum of these ratios over every possible beginning of a change is Shiryaev's and Roberts'
statistic (1963, 1966; with ranks: Gordon and Pollak 1994). While nothing changes it grows by one a value on average:
so a threshold A is reached after A values on average, or later. Page's rule (1954) tells since when. docs/drift.md.

Pure: no clock, no socket, no picture. `daemon/watch.py` feeds it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

BETWEEN_FALSE_ALARMS = 250_000  # values, on average and at least
# Of two parts, one of before and one of after the change, the latter's score is the higher one with a probability of
# theta / (theta + 1): 0.63, 0.75 and 0.89.
_THETAS = (1.7, 3.0, 8.0)
_HELD_BACK = 0.1  # of each bet: one stray value must not undo what twenty others said
_MOST = 1e15  # where the sums stop to grow: an alarm is out long before


class Ranks:
    """Where a value lies among a reference sample and the values before it, as the interval (low, high) of its rank.

    Values of the stream are kept as counts between the reference's values, so that memory does not grow.
    """

    def __init__(self, reference: Sequence[float]) -> None:
        values, counts = np.unique(np.asarray(reference, np.float64), return_counts=True)
        self._values: list[float] = values.tolist()
        # Gap, value, gap, value, ..., gap.
        self._counts = np.zeros(2 * len(self._values) + 1, np.int64)
        self._counts[1::2] = counts
        self._total = len(reference)

    def place(self, value: float) -> tuple[float, float]:
        """The interval of 0..1 in which its rank lies, one for equal values and for a gap; from now on it counts."""
        index = bisect_left(self._values, value)
        is_tie = index < len(self._values) and self._values[index] == value
        cell = 2 * index + is_tie
        below, within = int(self._counts[:cell].sum()), int(self._counts[cell])
        self._counts[cell] += 1
        self._total += 1
        return below / self._total, (below + within + 1) / self._total


def _bets(low: float, high: float) -> tuple[float, ...]:
    """What bets on higher ranks pay, in the mean over the interval: their densities are theta * u^(theta - 1)."""
    return tuple((high**theta - low**theta) / (high - low) for theta in _THETAS)


class RankTest:
    """The test on one kind of value. A change of the median by less than `deadband` is let pass, either way."""

    def __init__(self, reference: Sequence[float], deadband: float = 0.0) -> None:
        self._deadband = deadband
        self._above = Ranks(reference)
        self._below = Ranks(reference) if deadband else self._above
        bets = 2 * len(_THETAS)
        self._sums = [0.0] * bets  # Shiryaev-Roberts
        self._runs = [1.0] * bets  # Page
        self._lengths = [0] * bets
        self.values = 0

    def add(self, value: float) -> None:
        low, high = self._above.place(value - self._deadband)
        upwards = _bets(low, high)
        if self._deadband:
            low, high = self._below.place(value + self._deadband)
        self.values += 1
        for bet, paid in enumerate((*upwards, *_bets(1.0 - high, 1.0 - low))):
            if paid == 1.0:
                continue  # one of many equal values says nothing, however often: no time to begin at either
            factor = _HELD_BACK + (1.0 - _HELD_BACK) * paid
            self._sums[bet] = min(_MOST, (1.0 + self._sums[bet]) * factor)
            run = self._runs[bet] * factor
            is_over = run <= 1.0
            self._runs[bet] = 1.0 if is_over else min(_MOST, run)
            self._lengths[bet] = 0 if is_over else self._lengths[bet] + 1

    @property
    def evidence(self) -> float:
        """The mean of the bets' sums; its mean grows by one a value while nothing changes."""
        return sum(self._sums) / len(self._sums)

    @property
    def since(self) -> int:
        """For how many values the change has lasted, as far as the bet that gained most can tell."""
        return self._lengths[self._sums.index(max(self._sums))]


def alarm_share(evidence: float) -> float:
    """Evidence on a scale on which 1 is the alarm: log(1 + evidence) / log(1 + BETWEEN_FALSE_ALARMS)."""
    return math.log1p(evidence) / math.log1p(BETWEEN_FALSE_ALARMS)


def passing_scores(calibration: Sequence[float], limit: float) -> list[float]:
    """What the scores of passed parts are held against: the calibration scores that pass, lowest first.

    Without the one that the limit was taken from: given the limit, the others and the scores of passed parts are
    draws from one distribution, and that one is not.
    """
    passing = sorted(score for score in calibration if score < limit)
    if passing and float(np.nextafter(np.float32(passing[-1]), np.float32(np.inf))) == np.float32(limit):
        passing.pop()
    return passing
