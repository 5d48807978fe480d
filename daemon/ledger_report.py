"""What `inspectd ledger` prints."""

from __future__ import annotations

import sqlite3
from datetime import datetime, timezone
from pathlib import Path

from daemon.errors import DataError
from daemon.record.ledger import Ledger


def print_audit(folder: Path) -> int:
    """The proof of the books: 0 when they balance, 65 when they do not."""
    audit = _open(folder).verify()
    print(
        f"accepted {audit.accepted} + missing {audit.missing} = verdicts {audit.verdicts} + in flight {audit.in_flight}"
    )
    print(f"damaged journal records: {audit.damaged}")
    for fault in audit.faults:
        print(f"FAULT {fault}")
    print("the books balance" if not audit.faults else f"{len(audit.faults)} fault(s)")
    return DataError.exit_code if audit.faults else 0


def print_summary(folder: Path, last: int) -> int:
    ledger = _open(folder)
    for camera, outcome, reason, parts in ledger.outcomes():
        print(f"{camera:<16} {outcome:<7} {reason or '':<13} {parts}")
    for row in ledger.latest(last):
        score = "" if row["score"] is None else f"score {row['score']:.3f} limit {row['score_limit']:.3f}"
        number = f"{row['seq']}" if row["seq"] == row["seq_to"] else f"{row['seq']}..{row['seq_to']}"
        verdict = f"{row['outcome']} {row['reason'] or ''} {score}"
        print(f"{row['camera']} {row['epoch']} {number} {row['part_id'] or '-'} {verdict}")
    for event in ledger.events(last):
        when = datetime.fromtimestamp(event["ns"] / 1e9, tz=timezone.utc).isoformat(timespec="seconds")
        how = f" {event['detail'] or ''}".rstrip() if event["ok"] else f" refused: {event['detail']}"
        print(f"{when} {event['command']} {event['engine'] or ''} by {event['user'] or 'unknown'}{how}")
    return 0


def _open(folder: Path) -> Ledger:
    if not folder.is_dir():
        raise DataError(f"{folder}: no ledger is there; has this configuration ever run?")
    try:
        ledger = Ledger(folder)
        ledger.fill()
    except sqlite3.DatabaseError as error:
        file = folder / "ledger.sqlite"
        raise DataError(f"{file}: {error}; move it away, and it is made again from the journal beside it") from error
    return ledger
