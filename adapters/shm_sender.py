"""A camera on the daemon's own box: frames go through shared memory (input kind `shm`), a message carries the slot.

    with ShmSender("ipc://run/frames.sock", "solar", "cam1", slot_bytes=2448 * 2048) as camera:
        camera.send(pixels, "Mono8", part_id="A17")
        target = camera.reserve((2048, 2448))         # or let the camera's driver write where the daemon reads
        driver.grab_into(target)
        camera.announce(target, "Mono8", part_id="A18")

Run it under the daemon's account or in its group: the ring is readable by both alone.
"""

from __future__ import annotations

import mmap
import os
import time
import uuid
from collections import deque
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import zmq

from daemon.errors import DataError
from daemon.line.shm import BEING_WRITTEN, HEAD, MAGIC, SLOT, SLOT_HEADER_BYTES, ring_path, slot_offset
from daemon.line.wire import decode_header, encode_header
from daemon.types import Header

_WAIT_MS = 1000


class ShmSender:
    """One camera's ring and its socket. `slots` frames may be under way; answers are kept in `answers`."""

    def __init__(self, address: str, line: str, camera: str, *, slot_bytes: int, slots: int = 4) -> None:
        self.epoch, self.seq = uuid.uuid4().hex, 0
        self.answers: deque[Header] = deque(maxlen=1000)
        self._topic = f"frame/{line}/{camera}".encode()
        self._slot_bytes, self._path = slot_bytes, ring_path(line, camera)
        self._free = deque(range(slots))
        self._under_way: dict[int, int] = {}  # slot by seq
        self._slot = 0  # reserved last
        size = slot_offset(slots, slot_bytes)
        # A new file each time: a daemon that still reads the last one keeps it until the new epoch comes.
        self._path.unlink(missing_ok=True)
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
        try:
            os.posix_fallocate(file, 0, size)  # a full /dev/shm is told now, not by a signal in the middle of a frame
            self._memory = mmap.mmap(file, size)
        finally:
            os.close(file)
        self._memory[: HEAD.size] = HEAD.pack(MAGIC, slots, slot_bytes)
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)

    def __enter__(self) -> ShmSender:  # noqa: PYI034 - Self is in typing from Python 3.11 on
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def send(
        self, pixels: npt.NDArray[Any], pixel_format: str, *, part_id: str | None = None, product: str | None = None
    ) -> int:
        """Copy one raw frame, (H W) or (H W C), into a slot and announce it; its seq. Errors are `reserve`'s."""
        target = self.reserve(pixels.shape, pixels.dtype)
        target[...] = pixels
        return self.announce(target, pixel_format, part_id=part_id, product=product)

    def reserve(self, shape: tuple[int, ...], dtype: npt.DTypeLike = np.uint8) -> npt.NDArray[Any]:
        """A free slot as an array of this shape, for a camera's driver to fill itself. Waits for one.

        Raises DataError for a frame that is larger than a slot, TimeoutError where the daemon frees none.
        """
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if size > self._slot_bytes:
            raise DataError(f"found a frame of {size} bytes, the slots have {self._slot_bytes}; make larger ones")
        self._slot = self._take_slot()
        offset = slot_offset(self._slot, self._slot_bytes)
        SLOT.pack_into(self._memory, offset, BEING_WRITTEN, 0)
        return np.frombuffer(self._memory, dtype, int(np.prod(shape)), offset + SLOT_HEADER_BYTES).reshape(shape)

    def announce(
        self, pixels: npt.NDArray[Any], pixel_format: str, *, part_id: str | None = None, product: str | None = None
    ) -> int:
        """Send what was put into the array that `reserve` gave last; its seq."""
        slot, seq = self._slot, self.seq
        SLOT.pack_into(self._memory, slot_offset(slot, self._slot_bytes), seq, pixels.nbytes)
        header: Header = {
            "v": 1, "epoch": self.epoch, "seq": seq, "partId": part_id, "capturedNs": time.time_ns(), "encoding": "raw",
            "shape": list(pixels.shape), "pixelFormat": pixel_format, "slot": slot,
        }  # fmt: skip
        if product is not None:
            header["product"] = product
        self._socket.send_multipart([self._topic, encode_header(header)])
        self._under_way[seq] = slot
        self.seq += 1
        return seq

    def _take_slot(self) -> int:
        self._hear(0)
        until = time.monotonic() + _WAIT_MS / 1000
        while not self._free:
            left_ms = int(1000 * (until - time.monotonic()))
            if left_ms <= 0:
                raise TimeoutError(
                    f"no answer from the daemon for {_WAIT_MS} ms: all slots are under way; make a new ShmSender"
                )
            self._hear(left_ms)
        return self._free.popleft()

    def _hear(self, wait_ms: int) -> None:
        """Take the answers that are there; each one frees its slot."""
        while self._socket.poll(wait_ms):
            answer = decode_header(self._socket.recv_multipart()[-1])
            self.answers.append(answer)
            seq = answer.get("seq")
            if seq is None and self._under_way:  # a header that could not be read; answers come in order
                seq = next(iter(self._under_way))
            slot = self._under_way.pop(seq, None)
            if slot is not None:
                self._free.append(slot)
            wait_ms = 0

    def close(self) -> None:
        self._socket.close()
        self._context.term()
        self._path.unlink(missing_ok=True)
