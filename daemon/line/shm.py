"""Frames in shared memory (input kind `shm`): ZeroMQ carries the slot's number, the pixels lie in a ring on /dev/shm.

The camera's process makes the ring, /dev/shm/inspectd.<line>.<camera>, and fills a slot before it sends the message;
the daemon copies the slot out and answers, and with the answer the slot is the camera's again. The copy goes by read(2)
into memory that is used again: a sender that cuts its file short makes a BAD_FRAME and not a SIGBUS, what it writes
later changes nothing, and no page is touched for the first time while a part waits.

File, little endian: 16 bytes magic, u64 slots, u64 slot bytes; from 4096 on the slots, each 64 bytes of header
(u64 seq, u64 bytes; seq is 2^64 - 1 while the slot is written) and its data, rounded up to 4096 together.
"""

from __future__ import annotations

import os
import stat
import struct
import weakref
from collections import deque
from pathlib import Path

import numpy as np

from daemon.errors import FrameError
from daemon.types import ByteArray

MAGIC = b"inspectd-shm-1\0\0"
HEAD, SLOT = struct.Struct("<16sQQ"), struct.Struct("<QQ")
PAGE, SLOT_HEADER_BYTES = 4096, 64
BEING_WRITTEN = 2**64 - 1
FOLDER = Path("/dev/shm")  # noqa: S108 - not for temporary files: the one place for shared memory
_MOST_IDLE = 8  # buffers


def ring_path(line: str, camera: str) -> Path:
    return FOLDER / f"inspectd.{line}.{camera}"


def slot_offset(slot: int, slot_bytes: int) -> int:
    """Where a slot's header begins; its data follow it."""
    stride = -(-(SLOT_HEADER_BYTES + slot_bytes) // PAGE) * PAGE
    return PAGE + slot * stride


class Rings:
    """The cameras' rings, opened when they are first spoken of and again for each new epoch."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[str, _Ring]] = {}
        self._buffers = _Buffers()

    def read(self, line: str, camera: str, *, epoch: str, seq: int, slot: object) -> memoryview:
        """What lies in the slot. Raises FrameError."""
        if not isinstance(slot, int) or isinstance(slot, bool):
            raise FrameError(f"header key slot: found {slot!r}, wanted the slot's number")
        known = self._open.get(camera)
        if known is None or known[0] != epoch:
            if known is not None:
                known[1].close()
                del self._open[camera]
            self._open[camera] = (epoch, _Ring(ring_path(line, camera)))
        try:
            return self._open[camera][1].read(slot, seq, self._buffers)
        except (OSError, MemoryError) as error:
            raise FrameError(f"{ring_path(line, camera)}: slot {slot} cannot be read: {error}") from error

    def close(self) -> None:
        for _, ring in self._open.values():
            ring.close()
        self._open.clear()


class _Ring:
    """One camera's file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise FrameError(f"{path}: cannot be opened as a ring: {error.strerror}") from error
        is_file = stat.S_ISREG(os.fstat(self._file).st_mode)  # a pipe or a folder cannot be read at a place
        head = os.pread(self._file, HEAD.size, 0) if is_file else b""
        if len(head) != HEAD.size or not head.startswith(MAGIC):
            self.close()
            raise FrameError(f"{path}: found no ring of frames, wanted one that begins with {MAGIC!r}")
        _, self._slots, self._slot_bytes = HEAD.unpack(head)
        # What the head claims bounds every place and every size that is used later.
        if self._slots < 1 or slot_offset(self._slots, self._slot_bytes) > os.fstat(self._file).st_size:
            self.close()
            raise FrameError(
                f"{path}: the ring claims {self._slots} slots of {self._slot_bytes} bytes, the file is smaller"
            )

    def read(self, slot: int, seq: int, buffers: _Buffers) -> memoryview:
        if not 0 <= slot < self._slots:
            raise FrameError(f"{self._path}: found slot {slot}, the ring has {self._slots}")
        offset = slot_offset(slot, self._slot_bytes)
        held = self._slot(offset)
        if held is None or held[0] != seq or held[1] > self._slot_bytes:
            raise FrameError(f"{self._path}: slot {slot} does not hold frame {seq}; fill a slot before it is announced")
        memory = buffers.take(held[1])
        count = os.preadv(self._file, [memory.data], offset + SLOT_HEADER_BYTES)
        if count != held[1] or self._slot(offset) != held:
            raise FrameError(f"{self._path}: slot {slot} changed while frame {seq} was read; wait for the answer")
        return memory.data

    def _slot(self, offset: int) -> tuple[int, int] | None:
        """(seq, bytes) of the frame that the slot holds."""
        data = os.pread(self._file, SLOT.size, offset)
        return SLOT.unpack(data) if len(data) == SLOT.size else None

    def close(self) -> None:
        os.close(self._file)


class _Buffers:
    """Memory that has been touched before: a new page costs more than the copy into it.

    Handed out in powers of two, so that frames whose sizes differ (JPEG) share it; a few buffers wait, no more.
    """

    def __init__(self) -> None:
        self._idle: deque[ByteArray] = deque(maxlen=_MOST_IDLE)

    def take(self, size: int) -> ByteArray:
        """`size` bytes, which come back by themselves when nobody holds them any more."""
        memory = next((each for each in self._idle if size <= each.nbytes < 4 * max(size, PAGE)), None)
        if memory is None:
            memory = np.empty(1 << max(size - 1, PAGE).bit_length(), np.uint8)
        else:
            self._idle = deque((each for each in self._idle if each is not memory), _MOST_IDLE)
        view = memory[:size]
        weakref.finalize(view, self._give_back, memory).atexit = False
        return view

    def _give_back(self, memory: ByteArray) -> None:
        self._idle.append(memory)  # and the one that waited longest goes
