"""The ledger: one row a part, in SQLite, filled from the journal and only from it.

The place in the journal is kept in the same transaction as the rows, so every record is taken exactly
once, also when the daemon or the machine stops in between. `verify` proves promise 1.
"""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from daemon.record.journal import Record, read_records, segments

SEGMENT_DAYS = 2
MAX_INTEGER = 2**63 - 1
_BATCH = 5000
_WAIT_S = 10.0  # for whoever else writes
_SCHEMA = """
CREATE TABLE IF NOT EXISTS parts (
    camera TEXT NOT NULL, epoch TEXT NOT NULL, seq INTEGER NOT NULL, seq_to INTEGER NOT NULL,
    part_id TEXT, accepted INTEGER NOT NULL, accepted_ns INTEGER,
    outcome TEXT, reason TEXT, score REAL, score_limit REAL, p_value REAL, engine TEXT, decided_ns INTEGER,
    PRIMARY KEY (camera, epoch, seq)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS parts_decided ON parts (decided_ns);
CREATE INDEX IF NOT EXISTS parts_rejected ON parts (decided_ns) WHERE outcome = 'REJECT';
CREATE TABLE IF NOT EXISTS skips (
    camera TEXT NOT NULL, epoch TEXT NOT NULL, seq INTEGER NOT NULL, seq_to INTEGER NOT NULL, ns INTEGER,
    PRIMARY KEY (camera, epoch, seq)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS events (ns INTEGER, user TEXT, command TEXT, engine TEXT, ok INTEGER, detail TEXT);
CREATE TABLE IF NOT EXISTS marks (
    ns INTEGER, user TEXT, decision TEXT, mark TEXT, name TEXT,
    camera TEXT, epoch TEXT, seq INTEGER, decided_ns INTEGER
);
CREATE INDEX IF NOT EXISTS marks_part ON marks (camera, epoch, seq);
CREATE TABLE IF NOT EXISTS conflicts (camera TEXT, epoch TEXT, seq INTEGER, first TEXT, second TEXT);
CREATE TABLE IF NOT EXISTS place (
    one INTEGER PRIMARY KEY CHECK (one = 1), segment TEXT, offset INTEGER, damaged INTEGER
);
"""


@dataclass(frozen=True)
class Audit:
    """What `verify` found. `faults` is empty when the promise holds."""

    accepted: int
    missing: int
    verdicts: int
    in_flight: int
    damaged: int
    faults: list[str] = field(default_factory=list)


class Ledger:
    """Opened and used by one thread."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._db = sqlite3.connect(folder / "ledger.sqlite", timeout=_WAIT_S, isolation_level=None)
        _write_ahead(self._db)
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(_SCHEMA)

    def fill(self) -> int:
        """Take what the journal has beyond the last place; returns the number of records taken."""
        total = 0
        while taken := self._fill_batch():
            total += taken
        return total

    def _fill_batch(self) -> int:
        with _Transaction(self._db):
            segment, offset, damaged = self._db.execute("SELECT segment, offset, damaged FROM place").fetchone() or (
                "",
                0,
                0,
            )
            taken = 0
            for path in segments(self._folder):
                if path.name < segment:
                    continue
                if path.name > segment:
                    segment, offset = path.name, 0
                for behind, record in read_records(path, offset):
                    offset, taken = behind, taken + 1
                    damaged += record is None
                    if record is not None:
                        self._take(record)
                    if taken == _BATCH:
                        break
                if taken == _BATCH:
                    break
            self._db.execute("INSERT OR REPLACE INTO place VALUES (1, ?, ?, ?)", (segment, offset, damaged))
        return taken

    def _take(self, record: Record) -> None:
        if record["t"] == "accept":
            self._db.execute(
                "INSERT OR IGNORE INTO parts (camera, epoch, seq, seq_to, part_id, accepted, accepted_ns) "
                "VALUES (:camera, :epoch, :seq, :seq, :partId, 1, :ns)",
                record,
            )
        elif record["t"] == "skip":
            self._db.execute("INSERT OR IGNORE INTO skips VALUES (:camera, :epoch, :seq, :seqTo, :ns)", record)
        elif record["t"] == "event":
            self._db.execute("INSERT INTO events VALUES (:ns, :user, :command, :engine, :ok, :detail)", record)
        elif record["t"] == "mark":
            said = {key: record[key] for key in ("ns", "user", "decision", "mark", "name")}
            self._db.executemany(
                "INSERT INTO marks VALUES (:ns, :user, :decision, :mark, :name, :camera, :epoch, :seq, :decidedNs)",
                [{**said, **part} for part in record["parts"]],
            )
        elif record["t"] == "verdict":
            self._take_verdict({"seqTo": record["seq"], **record})

    def _take_verdict(self, record: Record) -> None:
        self._db.execute(
            "INSERT OR IGNORE INTO parts (camera, epoch, seq, seq_to, part_id, accepted) "
            "VALUES (:camera, :epoch, :seq, :seqTo, :partId, 0)",
            record,
        )
        changed = self._db.execute(
            "UPDATE parts SET outcome = :outcome, reason = :reason, score = :score, score_limit = :limit, "
            "p_value = :pValue, engine = :engine, decided_ns = :ns "
            "WHERE camera = :camera AND epoch = :epoch AND seq = :seq AND outcome IS NULL",
            record,
        ).rowcount
        if not changed:
            self._db.execute(
                "INSERT INTO conflicts SELECT camera, epoch, seq, outcome || ' ' || ifnull(reason, ''), "
                ":outcome || ' ' || ifnull(:reason, '') FROM parts "
                "WHERE camera = :camera AND epoch = :epoch AND seq = :seq",
                record,
            )

    def verify(self) -> Audit:
        """Count, and look for parts with two verdicts, holes and overlaps in a stream, and forgotten parts."""
        count = self._db.execute(
            "SELECT ifnull(sum(accepted), 0), "
            "ifnull(sum((1 - accepted) * (reason = 'MISSING') * (seq_to - seq + 1)), 0), "
            "ifnull(sum((outcome IS NOT NULL) * (seq_to - seq + 1)), 0), ifnull(sum(outcome IS NULL), 0) FROM parts"
        ).fetchone()
        damaged = (self._db.execute("SELECT damaged FROM place").fetchone() or (0,))[0]
        faults = [
            f"{camera} {epoch} {seq}: two verdicts, {first.strip()} and {second.strip()}"
            for camera, epoch, seq, first, second in self._db.execute("SELECT * FROM conflicts")
        ]
        faults += self._broken_chains()
        accepted, missing, verdicts, in_flight = (int(value) for value in count)
        if accepted + missing != verdicts + in_flight:
            faults.append(f"accepted {accepted} + missing {missing} is not verdicts {verdicts} + in flight {in_flight}")
        return Audit(accepted, missing, verdicts, in_flight, int(damaged), faults)

    def _broken_chains(self) -> list[str]:
        """Within a stream every seq from the first row to the last must be covered by exactly one row or pause."""
        rows = self._db.execute(
            "SELECT camera, epoch, seq, before FROM (SELECT camera, epoch, seq, "
            "lag(seq_to) OVER (PARTITION BY camera, epoch ORDER BY seq) AS before FROM "
            "(SELECT camera, epoch, seq, seq_to FROM parts UNION ALL SELECT camera, epoch, seq, seq_to FROM skips)) "
            "WHERE before IS NOT NULL AND seq != before + 1 LIMIT 100"
        )
        return [
            f"{camera} {epoch}: seq {before} is followed by {seq}: " + ("a hole" if seq > before else "an overlap")
            for camera, epoch, seq, before in rows
        ]

    def latest(self, most: int) -> list[dict[str, Any]]:
        """The newest decided parts, newest first."""
        return self._rows("SELECT * FROM parts WHERE outcome IS NOT NULL ORDER BY decided_ns DESC LIMIT ?", most)

    def events(self, most: int) -> list[dict[str, Any]]:
        """What people changed, newest first. These rows are never forgotten."""
        return self._rows("SELECT * FROM events ORDER BY ns DESC LIMIT ?", most)

    def _rows(self, query: str, *values: int) -> list[dict[str, Any]]:
        cursor = self._db.execute(query, values)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor]

    def outcomes(self) -> list[tuple[str, str, str | None, int]]:
        """(camera, outcome, reason, parts), for a summary."""
        query = (
            "SELECT camera, outcome, reason, sum(seq_to - seq + 1) FROM parts WHERE outcome IS NOT NULL "
            "GROUP BY camera, outcome, reason ORDER BY camera, outcome, reason"
        )
        return [(str(c), str(o), r, int(n)) for c, o, r, n in self._db.execute(query)]

    def forget(self, keep_days: int) -> None:
        """Delete rows older than `keep_days`, and journal segments that the ledger took in days ago.

        A journal is needed to start again (its newest segment) and to fill the ledger; two days more are kept for
        whoever wants to look. The newest segment always stays.
        """
        before_ns = time.time_ns() - keep_days * 86_400 * 10**9
        # Within a stream only what lies below the first young or undecided part may go: a hole would look like a loss.
        streams = self._db.execute("SELECT DISTINCT camera, epoch FROM parts").fetchall()
        for stream in streams:
            (kept,) = self._db.execute(
                "SELECT min(seq) FROM parts WHERE camera = ? AND epoch = ? AND (decided_ns IS NULL OR decided_ns >= ?)",
                (*stream, before_ns),
            ).fetchone()
            for table in ("parts", "skips"):
                self._db.execute(
                    f"DELETE FROM {table} WHERE camera = ? AND epoch = ? AND seq < ?",  # noqa: S608 - our own names
                    (*stream, MAX_INTEGER if kept is None else kept),
                )
        (current,) = self._db.execute("SELECT segment FROM place").fetchone() or ("",)
        segments_before_ns = time.time_ns() - min(keep_days, SEGMENT_DAYS) * 86_400 * 10**9
        files = segments(self._folder)
        for path, follower in pairwise(files):
            # A segment may go when the one after it began before the limit and the ledger is past it.
            if path.name < current and int(follower.stem.split("-")[1]) < segments_before_ns:
                path.unlink()

    def close(self) -> None:
        self._db.close()


def _write_ahead(db: sqlite3.Connection) -> None:
    """Switch to WAL. SQLite does not wait here: who switches while another does is told "locked" at once."""
    deadline = time.monotonic() + _WAIT_S
    while True:
        try:
            db.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


class _Transaction:
    """BEGIN IMMEDIATE ... COMMIT, rolled back on an exception: two fillers never take a record twice."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, *_: object) -> None:
        self._db.execute("ROLLBACK" if kind else "COMMIT")
