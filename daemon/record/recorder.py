"""Rejected frames on disk, lossless, beside what was decided about them; the oldest go when space is up.

`submit` is the loop's and never waits: what the writer thread cannot keep up with is dropped and
counted. The frame itself is made into a file by the caller's function, on the writer thread.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from heapq import nsmallest
from pathlib import Path

from daemon.types import Header

log = logging.getLogger("inspectd.recorder")

_MOST_WAITING_BYTES = 64 << 20
_NAMES_AT_ONCE = 1024  # a folder of a million names would stay in the daemon's memory for good
_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class Reject:
    """A rejected frame: its result header, its size in memory and the function that gives (extension, bytes).

    `pictures` explain it (mask, heatmap): PNG files that are made already.
    """

    header: Header
    frame_bytes: int
    encode: Callable[[], tuple[str, bytes]]
    pictures: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def held_bytes(self) -> int:
        return self.frame_bytes + sum(map(len, self.pictures.values()))


class Recorder:
    """Files below `folder`/<day>/; at most `keep_bytes` in all."""

    def __init__(self, folder: Path, keep_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._keep_bytes = keep_bytes
        self._waiting: deque[Reject] = deque()
        self._waiting_bytes = 0
        self._lock = threading.Lock()
        self._used_bytes = _size_bytes(folder)
        self.dropped = 0

    def submit(self, reject: Reject) -> None:
        with self._lock:
            if self._waiting_bytes + reject.held_bytes > _MOST_WAITING_BYTES:
                self.dropped += 1
                return
            self._waiting.append(reject)
            self._waiting_bytes += reject.held_bytes

    def write_waiting(self) -> int:
        """Write what waits; returns the number of frames written. A full disk drops them, and says so once."""
        written = 0
        while self._waiting:
            with self._lock:
                reject = self._waiting.popleft()
                self._waiting_bytes -= reject.held_bytes
            try:
                self._write(reject)
                written += 1
            except Exception as error:
                # One boundary for the disk and for frames that cannot be encoded: recording never stops inspection.
                self.dropped += 1
                log.warning(
                    "recorder dropped camera=%s seq=%s: %s", reject.header["camera"], reject.header["seq"], error
                )
        try:
            self._make_room()
        except OSError as error:
            log.warning("recorder cannot look through its folder: %s", error)
        return written

    def _write(self, reject: Reject) -> None:
        header = reject.header
        path = self._folder / recorded_as(header["camera"], header["epoch"], header["seq"], header["decidedNs"])
        day, stem = path.parent, path.name
        day.mkdir(exist_ok=True)
        extension, data = reject.encode()
        text = json.dumps({**header, "file": f"{stem}.{extension}"}, indent=1).encode()
        files = {day / f"{stem}.{extension}": data, day / f"{stem}.json": text}
        files |= {day / f"{stem}.{name}.png": picture for name, picture in reject.pictures.items()}
        try:
            for path, content in files.items():
                path.write_bytes(content)
        except OSError:
            for path in files:  # a picture without its facts is of no use
                path.unlink(missing_ok=True)
            raise
        self._used_bytes += sum(map(len, files.values()))

    def _make_room(self) -> None:
        """Delete the oldest files until what is left fits; what cannot be deleted is passed over."""
        if self._used_bytes <= self._keep_bytes:
            return
        # A twentieth more than is needed goes, so that the folder is not looked through again with the next reject.
        wanted_bytes = 0.95 * self._keep_bytes
        for day in _days(self._folder):
            for path in _oldest_first(day):
                if self._used_bytes <= wanted_bytes:
                    return
                try:
                    size_bytes = path.stat().st_size
                    path.unlink()
                    self._used_bytes -= size_bytes
                except OSError as error:
                    log.warning("recorder cannot make room: %s", error)
            with suppress(OSError):  # not empty
                day.rmdir()
        self._used_bytes = _size_bytes(self._folder)


def recorded_as(camera: str, epoch: str, seq: int, decided_ns: int) -> Path:
    """Day and stem of a part's files, below the recorder's folder; the epoch's own text cannot lead out of it."""
    return Path(_day(decided_ns)) / f"{decided_ns}-{camera}-{_UNSAFE.sub('_', epoch)[:40]}-{seq}"


def _days(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _oldest_first(day: Path) -> Iterator[Path]:
    """A day's files in the order of recording, which is that of their names; a few names in memory at a time."""
    last = ""
    while names := nsmallest(_NAMES_AT_ONCE, (entry.name for entry in os.scandir(day) if entry.name > last)):
        yield from (day / name for name in names)
        last = names[-1]


def _size_bytes(folder: Path) -> int:
    """What is recorded; files that lie beside the days' folders are not the recorder's."""
    used_bytes = 0
    for day in _days(folder):
        for entry in os.scandir(day):
            with suppress(OSError):  # somebody else deletes, too
                used_bytes += entry.stat(follow_symlinks=False).st_size
    return used_bytes


def _day(time_ns: int) -> str:
    from datetime import datetime, timezone

    return datetime.fromtimestamp(time_ns / 1e9, tz=timezone.utc).strftime("%Y-%m-%d")
