"""Logs: one line an event on stderr, key=value; under journald with its priority prefix.

A line that repeats (a peer that sends garbage, a camera that stutters) is written ten times in ten
seconds, then counted, so that no flood of bad input becomes a flood of logs.
"""

from __future__ import annotations

import logging
import os
import sys
from time import monotonic

_BURST, _WINDOW_S = 10, 10.0
_PRIORITY = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}


class _Journald(logging.Formatter):
    """journald adds the time and reads the level from the prefix."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{_PRIORITY.get(record.levelno, 6)}>"
        return prefix + super().format(record).replace("\n", f"\n{prefix}")


class RateLimit(logging.Filter):
    """Lets each message (by its text before the values are filled in) through `_BURST` times a window."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[tuple[str, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        key, now = (record.name, str(record.msg)), monotonic()
        since, count = self._seen.get(key, (now, 0))
        if now - since >= _WINDOW_S:
            if count > _BURST:
                record.msg = f"{record.msg} (and {count - _BURST} more like it)"
            since, count = now, 0
        self._seen[key] = (since, count + 1)
        return count < _BURST


def set_up_logs(level: str) -> None:
    """Send everything below the logger `inspectd` to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    text = "%(levelname)s %(name)s %(message)s"
    journald = "JOURNAL_STREAM" in os.environ
    handler.setFormatter(_Journald("%(name)s %(message)s") if journald else logging.Formatter("%(asctime)s " + text))
    handler.addFilter(RateLimit())
    root = logging.getLogger("inspectd")
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False
