"""The append-only journal: what was accepted and what was decided, before anybody is told.

One record is one line, `<crc32 as 8 hex digits> <JSON>`, and everything that belongs together goes out
in one write call, so that kill -9 leaves either all of it or none. A power cut can lose what was
written since the last `sync` (100 ms by default). Each segment begins with a `run` record that holds
the whole state, so that only the newest readable segment is needed to go on.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

from daemon.errors import ConfigError

log = logging.getLogger("inspectd.journal")

Record = dict[str, Any]
SEGMENT_BYTES, SEGMENT_S = 64 << 20, 86_400.0
MOST_WAITING_BYTES = 64 << 20  # some 80 minutes of 50 parts a second
_PATTERN = "journal-*.log"


class Journal:
    """The writer. `write` is the loop's, `sync` another thread's."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._descriptor = -1
        self._retired: list[int] = []
        self._written = 0
        self._torn = False
        self._waiting: deque[bytes] = deque()  # for room on the disk, one entry a call of `write`
        self._waiting_bytes = 0
        self._lacks = False  # records that were given up
        self._begun_s = monotonic()
        self.fault: str | None = None  # why records wait, None while all is well

    def begin(self, state: Record, now_ns: int) -> None:
        """Start a new segment with the whole state; the old one is closed by the next `sync`."""
        newest = max((int(p.stem.split("-")[1]) for p in segments(self._folder)), default=0)
        path = self._folder / f"journal-{max(now_ns, newest + 1):020d}.log"
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o640)
        except OSError as error:
            if self._descriptor < 0:
                raise
            # A full disk: the open segment grows on, and the next attempt waits until it has grown as much again.
            self._written, self._begun_s = 0, monotonic()
            self._tell(error.strerror or str(error))
            return
        if self._descriptor >= 0:
            self._retired.append(self._descriptor)
        self._descriptor, self._torn, self._lacks = descriptor, False, False
        self._begun_s = monotonic()
        self.write(state)
        self._written = 0  # a large state must not make a new segment full at once

    @property
    def is_full(self) -> bool:
        """Time for a new segment: this one is large or a day old, or lacks records and a restart must not trust it."""
        is_old = monotonic() - self._begun_s >= SEGMENT_S
        return self.fault is None and (self._written >= SEGMENT_BYTES or is_old or self._lacks)

    def write(self, *records: Record) -> None:
        """Append the records in one write call. A full disk stops nothing: `fault` says so, and they wait in memory."""
        data = b"".join(encode_record(record) for record in records)
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        self.flush()
        while self._waiting_bytes > MOST_WAITING_BYTES:
            self._waiting_bytes -= len(self._waiting.popleft())
            if not self._lacks:
                log.critical("journal more than %d bytes wait for room: the oldest are lost", MOST_WAITING_BYTES)
            self._lacks = True

    def tend(self, state: Callable[[], Record], now_ns: int) -> None:
        """Now and then: try again what waits, also on a line that stands still, or begin a new segment."""
        if self.fault is not None:
            self.flush()
        elif self.is_full:
            self.begin(state(), now_ns)

    def flush(self) -> None:
        """Write what waits, in order, each call's records in one write call, until the disk refuses."""
        fault = None
        while self._waiting and fault is None:
            data = self._waiting[0]
            lead = b"\n" if self._torn else b""  # ends the half record that the last failure left
            try:
                written = os.write(self._descriptor, lead + data)
            except OSError as error:
                fault = error.strerror or str(error)
                continue
            self._written += written
            done = max(0, written - len(lead))
            if done == len(data):
                self._waiting.popleft()
                self._torn = False
            else:
                fault = f"wrote {written} of {len(lead) + len(data)} bytes"
                # Whole records must not be written twice, nor one that lacks its line's end alone: the lead ends it.
                whole = done + 1 if data[done : done + 1] == b"\n" else data.rfind(b"\n", 0, done) + 1
                self._torn = done != whole or (self._torn and written == 0)
                self._waiting[0], done = data[whole:], whole
            self._waiting_bytes -= done
        self._tell(fault)

    def _tell(self, fault: str | None) -> None:
        if fault != self.fault:
            log.log(
                logging.ERROR if fault else logging.WARNING, "journal fault=%s", fault or "none, it is written again"
            )
            self.fault = fault

    def sync(self) -> None:
        """Bring what was written to the disk."""
        while self._retired:
            descriptor = self._retired.pop()
            os.fsync(descriptor)
            os.close(descriptor)
        if self._descriptor >= 0:
            os.fsync(self._descriptor)

    def close(self) -> None:
        if self._descriptor >= 0:
            self.flush()
            self._retired.append(self._descriptor)
            self._descriptor = -1
        self.sync()


def hold_alone(folder: Path) -> Callable[[], None]:
    """Lock the folder for this process; returns what gives it back. Raises ConfigError if another one holds it.

    ipc sockets can be taken over in silence, so this, not a bind, is what keeps a second daemon away.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a+")
    except OSError as error:
        raise ConfigError(
            str(folder),
            [f"cannot hold the ledger: {error.strerror}; name another folder (ledger.dir), or give it to this user"],
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise ConfigError(
            str(folder),
            [f"another process holds it (pid {holder}): is inspectd running already? Stop it, or change ledger.dir"],
        ) from error
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file.close


def encode_record(record: Record) -> bytes:
    body = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def decode_record(line: bytes) -> Record | None:
    """The record of one line without its newline; None where it is torn or changed."""
    try:
        if int(line[:8], 16) != zlib.crc32(line[9:]) or line[8:9] != b" ":
            return None
        record = json.loads(line[9:])
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def segments(folder: Path) -> list[Path]:
    """The journal's files, oldest first."""
    return sorted(folder.glob(_PATTERN))


def read_records(path: Path, offset: int = 0) -> Iterator[tuple[int, Record | None]]:
    """Each whole line from `offset` on as (offset behind it, record); None for a line that is damaged.

    A last line without its end is left for the next reading: it may still be growing.
    """
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            if line != b"\n":
                yield offset, decode_record(line[:-1])


def last_run(folder: Path) -> list[Record]:
    """The records since the newest `run` record that can be read, that one first; [] for a new journal."""
    newer: list[Record] = []
    for path in reversed(segments(folder)):
        records = [record for _, record in read_records(path)]
        known = [record for record in records if record is not None]
        if len(known) < len(records):
            log.warning("journal segment=%s damaged_records=%d", path.name, len(records) - len(known))
        newer = known + newer
        if records and records[0] and records[0].get("t") == "run":
            return newer
        log.warning("journal segment=%s has no readable beginning; the one before is taken too", path.name)
    return newer if newer and newer[0].get("t") == "run" else []
