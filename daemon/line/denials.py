"""Who was turned away: each counted by its reason, and told without a flood.

The first of a reason is a log line at once; those that follow within a minute are told in one line at its end,
with their number and the last of them. No socket; the time is handed in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic

log = logging.getLogger("inspectd.denials")

WINDOW_S = 60.0
Denied = Callable[[str, str], None]  # the reason, and who it was as far as that is known


class Denials:
    """Called with each denial; `tick` when time has passed, `close` at the end."""

    def __init__(self, count: Callable[[str], None], clock: Callable[[], float] = monotonic) -> None:
        self._count = count
        self._clock = clock
        self._since_s: dict[str, float] = {}  # by reason: when its window began
        self._more: dict[str, tuple[int, str]] = {}  # not told yet: how many, and the last of them

    def __call__(self, reason: str, who: str) -> None:
        self._count(reason)
        if reason in self._since_s:
            self._more[reason] = (self._more.get(reason, (0, ""))[0] + 1, who)
            return
        self._since_s[reason] = self._clock()
        log.warning("denied reason=%s %s", reason, who)

    def tick(self) -> None:
        """Tell what a minute has gathered; a reason that was quiet for a minute is told at once again."""
        now_s = self._clock()
        for reason, since_s in list(self._since_s.items()):
            if now_s - since_s < WINDOW_S:
                continue
            if self._tell(reason):
                self._since_s[reason] = now_s
            else:
                del self._since_s[reason]

    def close(self) -> None:
        for reason in list(self._more):
            self._tell(reason)

    def _tell(self, reason: str) -> bool:
        count, last = self._more.pop(reason, (0, ""))
        if count:
            log.warning("denied reason=%s %d more since, the last: %s", reason, count, last)
        return bool(count)
