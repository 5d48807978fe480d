"""Rejected frames on disk, lossless, beside what was decided about them; the oldest go when space is up.

`submit` is the loop's and never waits: what the writer thread cannot keep up with is dropped and
counted. The frame itself is made into a file by the caller's function, on the writer thread.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from daemon.types import Header

log = logging.getLogger("inspectd.recorder")

_MOST_WAITING_BYTES = 64 << 20
_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class Reject:
    """A rejected frame: its result header, its size in memory and the function that gives (extension, bytes)."""

    header: Header
    frame_bytes: int
    encode: Callable[[], tuple[str, bytes]]


class Recorder:
    """Files below `folder`/<day>/; at most `keep_bytes` in all."""

    def __init__(self, folder: Path, keep_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._keep_bytes = keep_bytes
        self._waiting: deque[Reject] = deque()
        self._waiting_bytes = 0
        self._lock = threading.Lock()
        self._used_bytes = sum(map(_size, folder.rglob("*")))
        self.dropped = 0

    def submit(self, reject: Reject) -> None:
        with self._lock:
            if self._waiting_bytes + reject.frame_bytes > _MOST_WAITING_BYTES:
                self.dropped += 1
                return
            self._waiting.append(reject)
            self._waiting_bytes += reject.frame_bytes

    def write_waiting(self) -> int:
        """Write what waits; returns the number of frames written. A full disk drops them, and says so once."""
        written = 0
        while self._waiting:
            with self._lock:
                reject = self._waiting.popleft()
                self._waiting_bytes -= reject.frame_bytes
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
        day = self._folder / _day(header["decidedNs"])
        day.mkdir(exist_ok=True)
        epoch = _UNSAFE.sub("_", header["epoch"])[:40]
        stem = f"{header['decidedNs']}-{header['camera']}-{epoch}-{header['seq']}"
        extension, data = reject.encode()
        text = json.dumps({**header, "file": f"{stem}.{extension}"}, indent=1).encode()
        files = {day / f"{stem}.{extension}": data, day / f"{stem}.json": text}
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
        # Names begin with the time, so the sorted order is the order of recording. A twentieth more than is needed
        # goes, so that the folder is not looked through again with the next reject.
        for path in sorted(p for p in self._folder.rglob("*") if p.is_file()):
            if self._used_bytes <= 0.95 * self._keep_bytes:
                return
            try:
                size = path.stat().st_size
                path.unlink()
                self._used_bytes -= size
                if path.parent != self._folder and not any(path.parent.iterdir()):
                    path.parent.rmdir()
            except OSError as error:
                log.warning("recorder cannot make room: %s", error)
        self._used_bytes = sum(map(_size, self._folder.rglob("*")))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


def _day(time_ns: int) -> str:
    from datetime import datetime, timezone

    return datetime.fromtimestamp(time_ns / 1e9, tz=timezone.utc).strftime("%Y-%m-%d")
