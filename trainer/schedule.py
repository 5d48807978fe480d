"""How long a training goes on: exactly so many steps, or until the clock says stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import monotonic

from daemon.errors import UsageError


@dataclass(frozen=True)
class Schedule:
    """Exactly one is set. With `steps` a training can be repeated bit by bit; with `seconds` it cannot."""

    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.steps, self.seconds) if value is not None]
        if len(given) != 1 or not given[0] > 0:
            raise UsageError(f"found {self}, wanted steps or seconds, one of the two, above 0: correct the schedule")

    def fractions(self, done: int = 0, spent_s: float = 0.0, clock: Callable[[], float] = monotonic) -> Iterator[float]:
        """For each step still to do, the part of the training that lies behind it, in [0, 1)."""
        started = clock() - spent_s
        while True:
            fraction = done / self.steps if self.steps is not None else (clock() - started) / (self.seconds or 1.0)
            if fraction >= 1.0:
                return
            yield fraction
            done += 1


def cosine(fraction: float) -> float:
    """The learning rate's factor: 1 at the start, 0 at the end."""
    return 0.5 + 0.5 * math.cos(math.pi * fraction)
