"""Marks on their way to the books: the daemon is asked, and writes them into its journal with the user's name.

Nobody else writes there: the dashboard runs under an account that may only read and ask. One decision may need several
requests, which carry its number; what was not taken when one fails is simply not marked.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any

from adapters.review.desk import Desk
from daemon.errors import UsageError
from daemon.line.control import ask
from daemon.line.marking import MOST_MARKED
from daemon.types import PartKey

_MOST_REQUEST_BYTES = 48 << 10  # of 64 KiB
_ASK_MS = 5000
_BOOKED_S, _LOOK_S = 3.0, 0.05


@dataclass(frozen=True)
class Said:
    """What a person says of parts."""

    word: str
    name: str | None
    user: str


def send_marks(address: str, said: Said, parts: Sequence[tuple[PartKey, int]]) -> str:
    """Ask the daemon to write the marks of (part, time of its verdict); the decision's number.

    Raises NoAnswerError, and UsageError where it refuses.
    """
    if not parts:
        raise UsageError("found no part to mark, wanted one at least")
    decision = secrets.token_hex(8)
    told = {"mark": said.word, "decision": decision} | ({"name": said.name} if said.name else {})
    for piece in _pieces(parts):
        ask(address, "mark", _ASK_MS, user=said.user, parts=piece, **told)
    return decision


def _pieces(parts: Sequence[tuple[PartKey, int]]) -> Iterator[list[dict[str, Any]]]:
    piece: list[dict[str, Any]] = []
    size_bytes = 0
    for key, decided_ns in parts:
        part = {"camera": key.camera, "epoch": key.epoch, "seq": key.seq, "decidedNs": decided_ns}
        bytes_more = len(json.dumps(part)) + 2
        if piece and (len(piece) == MOST_MARKED or size_bytes + bytes_more > _MOST_REQUEST_BYTES):
            yield piece
            piece, size_bytes = [], 0
        piece.append(part)
        size_bytes += bytes_more
    yield piece


def wait_until_booked(desk: Desk, decision: str, parts: int) -> bool:
    """The ledger follows the journal half a second behind; whether it has caught up in time."""
    until = monotonic() + _BOOKED_S
    while not desk.has_taken(decision, parts):
        if monotonic() > until:
            return False
        sleep(_LOOK_S)
    return True


def take_back(address: str, desk: Desk, decision: str, user: str) -> int:
    """Undo a decision where it still is the last word; of how many parts. Raises UsageError where it is of none."""
    parts = desk.of_decision(decision)
    if not parts:
        raise UsageError(f"found no mark of decision {decision} that still stands; inspectd review list --decisions")
    wait_until_booked(desk, send_marks(address, Said("none", None, user), parts), len(parts))
    return len(parts)
