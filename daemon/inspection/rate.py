"""Bounds of a rate that hold at every moment at once, however often one looks. Pure.

Robbins' confidence sequence (1970): in it are the rates under which what was counted is at most 1 / error times less
likely than under Jeffreys' mixture of all rates. By Ville's inequality (1939) the true rate ever leaves it with
probability `error` at most. An interval for a single moment would be left sooner or later by every rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable

_ROUNDS = 50  # of halving, to a part in 10^15


def rate_bounds(judged: int, rejected: int, error: float = 0.05) -> tuple[float, float]:
    """(low, high) of the rate at which parts are rejected, after `rejected` of `judged`."""
    if judged == 0:
        return 0.0, 1.0
    passed = judged - rejected
    mixture = math.lgamma(rejected + 0.5) + math.lgamma(passed + 0.5) - math.lgamma(judged + 1) - math.log(math.pi)
    wanted = mixture + math.log(error)

    def is_inside(rate: float) -> bool:
        of_rejected = rejected * math.log(rate) if rejected else 0.0
        return of_rejected + (passed * math.log1p(-rate) if passed else 0.0) >= wanted

    middle = rejected / judged
    low = _edge(is_inside, middle, 0.0) if rejected else 0.0
    return low, _edge(is_inside, middle, 1.0) if passed else 1.0


def _edge(is_inside: Callable[[float], bool], inside: float, outside: float) -> float:
    """Where a range ends between a point in it and one that is not, by halving."""
    for _ in range(_ROUNDS):
        middle = (inside + outside) / 2
        if is_inside(middle):
            inside = middle
        else:
            outside = middle
    return outside


def judge_rate(judged: int, rejected: int, promised: float) -> str:
    """What the bounds say of a promised false-reject rate: kept, exceeded or open.

    True defects are among the rejected: `kept` holds all the more without them, `exceeded` may be theirs.
    """
    low, high = rate_bounds(judged, rejected)
    if high <= promised:
        return "kept"
    return "exceeded" if low > promised else "open"
