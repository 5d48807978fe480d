"""How a command `inspectd` ended that ran in the tests' own process; the fixture `inspectd` (conftest.py) runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


Inspectd = Callable[..., Ended]


def is_clear(ended: Ended) -> bool:
    """One text on stderr that says inspectd, nothing on stdout, no traceback."""
    return ended.err.startswith("inspectd: ") and "Traceback" not in ended.err and ended.out == ""
