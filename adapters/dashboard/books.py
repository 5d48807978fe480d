"""The ledger and the recorder's folder, read only: history, figures, full frames, who changed what.

Each question opens the ledger anew, so that a daemon that starts again, or a ledger that is made again, needs no care
here. A question that takes too long is given up: the disk belongs to the daemon.
"""

from __future__ import annotations

import json
import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from daemon.errors import DataError
from daemon.record.recorder import recorded_as
from daemon.types import Reason

REASONS = tuple(reason.value for reason in Reason)
MOST_ROWS = 200
_LONGEST_S = 3.0
_STEPS = 20_000  # of SQLite's machine between two looks at the clock
_MOST_PICTURE_BYTES = 256 << 20
_MOST_FACTS_BYTES = 1 << 20
_TYPES = {"png": "image/png", "jpg": "image/jpeg"}
_PART = "camera, epoch, seq, seq_to, part_id, outcome, reason, score, score_limit, p_value, engine, decided_ns"


class GoneError(DataError):
    """What was asked for is not there (any more)."""


class TooLongError(DataError):
    """A question that the ledger cannot answer in time."""


@dataclass(frozen=True)
class Wanted:
    """Which rejects: newest first, before a place in the list, of a camera, a reason, a time."""

    camera: str | None = None
    reason: str | None = None
    from_ns: int | None = None
    to_ns: int | None = None
    before: tuple[int, str, str, int] | None = None  # decided_ns, camera, epoch, seq of the last row seen
    most: int = 50


class Books:
    """Stateless but for the folders' names."""

    def __init__(self, ledger: Path, rejects: Path | None) -> None:
        self._ledger = ledger / "ledger.sqlite"
        self._rejects = rejects

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """Raises GoneError where there is no ledger, TooLongError where a question takes too long."""
        if not self._ledger.exists():
            raise GoneError(f"{self._ledger}: no ledger is there yet; has this configuration ever run?")
        # A ledger that nobody has open lacks its -wal and -shm, which a reader may not make: then it does not change.
        quiet = "" if self._ledger.with_name(self._ledger.name + "-wal").exists() else "&immutable=1"
        db = sqlite3.connect(f"{self._ledger.resolve().as_uri()}?mode=ro{quiet}", uri=True, timeout=1.0)
        until = monotonic() + _LONGEST_S
        db.set_progress_handler(lambda: monotonic() > until, _STEPS)
        db.row_factory = sqlite3.Row
        try:
            yield db
        except sqlite3.OperationalError as error:
            if "interrupted" in str(error):
                raise TooLongError(f"the ledger takes more than {_LONGEST_S:.0f} s; ask for less time") from error
            raise GoneError(f"{self._ledger}: {error}") from error
        except sqlite3.DatabaseError as error:
            raise GoneError(f"{self._ledger}: {error}") from error
        finally:
            db.close()

    def rejects(self, wanted: Wanted) -> list[dict[str, Any]]:
        """A page of rejects. `before` makes pages that do not shift while new rejects come in."""
        where, values = ["outcome = 'REJECT'"], list[Any]()
        for text, value in (
            ("camera = ?", wanted.camera),
            ("reason = ?", wanted.reason),
            ("decided_ns >= ?", wanted.from_ns),
            ("decided_ns < ?", wanted.to_ns),
        ):
            if value is not None:
                where.append(text)
                values.append(value)
        if wanted.before is not None:
            # The first comparison is the index's, the second puts those of one moment in order.
            where += ["decided_ns <= ?", "(decided_ns, camera, epoch, seq) < (?, ?, ?, ?)"]
            values += [wanted.before[0], *wanted.before]
        query = (
            f"SELECT {_PART} FROM parts WHERE {' AND '.join(where)} "  # noqa: S608 - our own texts; values are bound
            "ORDER BY decided_ns DESC, camera DESC, epoch DESC, seq DESC LIMIT ?"
        )
        with self._open() as db:
            rows = [dict(row) for row in db.execute(query, (*values, min(wanted.most, MOST_ROWS)))]
        for row in rows:
            row["recorded"] = self._facts_path(row) is not None
        return rows

    def part(self, camera: str, epoch: str, seq: int) -> dict[str, Any]:
        """One part's row, with what the recorder keeps of it. Raises GoneError."""
        with self._open() as db:
            query = f"SELECT {_PART} FROM parts WHERE camera = ? AND epoch = ? AND seq = ?"  # noqa: S608 - our own text
            row = db.execute(query, (camera, epoch, seq)).fetchone()
        if row is None:
            raise GoneError(f"no part {camera} {epoch} {seq} is in the ledger (yet)")
        part = dict(row)
        facts = self._facts(part)
        pictures = [name for name in ("frame", "mask", "heatmap") if facts and self._picture_path(part, facts, name)]
        return {**part, "regions": (facts or {}).get("regions", []), "pictures": pictures}

    def picture(self, camera: str, epoch: str, seq: int, name: str) -> tuple[str, bytes]:
        """(media type, bytes) of a part's frame, mask or heatmap. Raises GoneError."""
        part = self.part(camera, epoch, seq)
        facts = self._facts(part)
        path = self._picture_path(part, facts, name) if facts else None
        data = read_plain(path, _MOST_PICTURE_BYTES) if path else None
        if path is None or data is None:
            raise GoneError(f"the recorder has no {name} of {camera} {epoch} {seq} (any more)")
        return _TYPES[path.suffix[1:]], data

    # The names of files are made from the ledger's row alone, as the recorder makes them: what a browser sends only
    # picks a row, and what a file says of another file counts only if it is that very name.

    def _stem(self, part: dict[str, Any]) -> Path | None:
        if self._rejects is None or part["decided_ns"] is None:
            return None
        return self._rejects / recorded_as(part["camera"], part["epoch"], part["seq"], part["decided_ns"])

    def _facts_path(self, part: dict[str, Any]) -> Path | None:
        stem = self._stem(part)
        path = stem.with_name(f"{stem.name}.json") if stem else None
        return path if path is not None and path.is_file() else None

    def _facts(self, part: dict[str, Any]) -> dict[str, Any] | None:
        path = self._facts_path(part)
        data = read_plain(path, _MOST_FACTS_BYTES) if path else None
        try:
            facts = json.loads(data) if data else None
        except (ValueError, RecursionError):
            return None
        return facts if isinstance(facts, dict) else None

    def _picture_path(self, part: dict[str, Any], facts: dict[str, Any], name: str) -> Path | None:
        stem = self._stem(part)
        if stem is None:
            return None
        endings = [f".{kind}" for kind in _TYPES] if name == "frame" else [f".{name}.png"]
        wanted = [ending for ending in endings if name != "frame" or facts.get("file") == f"{stem.name}{ending}"]
        paths = [stem.with_name(stem.name + ending) for ending in wanted]
        return next((path for path in paths if path.is_file() and not path.is_symlink()), None)

    # -- figures -----------------------------------------------------------------------------------

    def counts(self, from_ns: int) -> list[dict[str, Any]]:
        """Parts by camera, outcome and reason since a time."""
        query = (
            "SELECT camera, outcome, reason, sum(seq_to - seq + 1) AS parts FROM parts INDEXED BY parts_decided "
            "WHERE decided_ns >= ? GROUP BY camera, outcome, reason ORDER BY camera, outcome, reason"
        )
        with self._open() as db:
            return [dict(row) for row in db.execute(query, (from_ns,))]

    def scores(self, camera: str, engine: str, from_ns: int, most: int) -> list[float]:
        """The newest scores that one engine gave a camera's parts."""
        query = (
            "SELECT score FROM parts INDEXED BY parts_decided WHERE decided_ns >= ? AND camera = ? AND engine = ? "
            "AND score IS NOT NULL ORDER BY decided_ns DESC LIMIT ?"
        )
        with self._open() as db:
            return [float(row["score"]) for row in db.execute(query, (from_ns, camera, engine, most))]

    def events(self, most: int) -> list[dict[str, Any]]:
        """Who changed what, newest first; [] for a ledger from before that was written down."""
        with self._open() as db:
            if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'events'").fetchone():
                return []
            return [dict(row) for row in db.execute("SELECT * FROM events ORDER BY ns DESC LIMIT ?", (most,))]


def read_plain(path: Path, most_bytes: int) -> bytes | None:
    """The bytes of a plain file that is no link; None where it is none, or too large."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None  # the recorder made room meanwhile
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        return file.read() if stat.S_ISREG(status.st_mode) and status.st_size <= most_bytes else None
