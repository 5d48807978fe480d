"""One camera, one subscriber and one PLC bridge in one object, on one thread: the daemon's counterpart.

The simulator, the bench and the tests stand on it. It believes nothing but what comes over the wire:
each part's answer, its result and its permit are noted apart, so that they can be held against each other.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import zmq

from adapters.bridge import Bridge, pump_sockets
from daemon.errors import InspectError
from daemon.keys import PeerFile
from daemon.line.permit import Lease
from daemon.line.sockets import connect
from daemon.line.wire import decode_header, encode_frame
from daemon.types import Header, RawFrame


@dataclass(frozen=True)
class Addresses:
    """Where a daemon listens."""

    frames: str
    results: str
    permits: str


@dataclass
class SentPart:
    """All that is known of one part. Times are of this process's monotonic clock."""

    seq: int
    sent_ns: int
    frame: RawFrame
    answer: Header | None = None
    results: list[Header] = field(default_factory=list)
    permits: list[Header] = field(default_factory=list)
    decided_ns: int | None = None  # when its result arrived
    believed: bool = False  # whether the lease let it pass when its PASS arrived

    @property
    def latency_ms(self) -> float | None:
        return None if self.decided_ns is None else (self.decided_ns - self.sent_ns) / 1e6


class Line:
    """Connected from `open_line` on. `epoch` names this run of the camera."""

    def __init__(
        self, addresses: Addresses, keys: PeerFile | None, names: tuple[str, str], lease_ms: int = 300
    ) -> None:
        self.line, self.camera = names
        self.epoch = uuid4().hex[:12]
        self.parts: dict[int, SentPart] = {}
        self.late: list[Header] = []
        self.foreign: list[Header] = []  # verdicts on parts that were never sent (the MISSING among them)
        self.state: str | None = None
        self.run: str | None = None
        self._addresses, self._keys, self._lease_ms = addresses, keys, lease_ms
        self._context: zmq.Context[Any] = zmq.Context()
        self._frames = connect(self._context, zmq.DEALER, addresses.frames, keys)
        self._results = connect(self._context, zmq.SUB, addresses.results, keys)
        self._bridge = Bridge(
            self._context, addresses.permits, keys, self.line, lease=Lease(lease_ms), hear=self._take_permit
        )
        for kind in ("result", "late", "health"):
            self._results.subscribe(f"{kind}/{self.line}")
        self._poller = zmq.Poller()
        for socket in (self._frames, self._results, self._bridge.socket):
            self._poller.register(socket, zmq.POLLIN)

    @property
    def lease(self) -> Lease:
        return self._bridge.lease

    @lease.setter
    def lease(self, lease: Lease) -> None:
        self._bridge.lease = lease

    def wait_ready(self, timeout_s: float) -> None:
        """Until the bridge's lease is fresh and results are heard. Raises InspectError with what is lacking."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            self.pump(20)
            if self.state == "RUNNING" and self.lease.is_fresh(time.monotonic_ns()):
                return
        heard = f"state {self.state}" if self.state else "nothing on the results socket"
        lease = "a fresh lease" if self.lease.is_fresh(time.monotonic_ns()) else "no fresh lease"
        raise InspectError(
            f"no ready daemon within {timeout_s:.0f} s: heard {heard}, {lease}; is it running, do the addresses fit, "
            "and is this peer's key in its peers.yaml with the roles camera, subscriber and bridge?"
        )

    def send(self, frame: RawFrame) -> SentPart:
        """Send a frame as the next message; its camera, epoch and seq are what they are."""
        part = SentPart(frame.seq, time.monotonic_ns(), frame)
        self.parts[frame.seq] = part
        self.send_raw([bytes(piece) if i < 2 else piece for i, piece in enumerate(encode_frame(self.line, frame))])
        return part

    def send_raw(self, parts: Sequence[bytes | memoryview]) -> None:
        """Send message parts as they are, also broken ones. Returns at once; a full queue raises InspectError."""
        try:
            self._frames.send_multipart(parts, zmq.NOBLOCK, copy=True)
        except zmq.Again as error:
            raise InspectError("the daemon takes no more frames: the send queue is full") from error

    def pump(self, timeout_ms: float) -> None:
        """Ping when it is time, and take in whatever arrives within `timeout_ms` (and up to 1 ms more)."""
        pump_sockets(self._poller, timeout_ms, self._bridge.ping, self._take_all)

    def reopen_camera(self, epoch: str | None = None) -> None:
        """The camera's cable is pulled and put in again: what had not left is lost, and so are answers under way.

        With `epoch` it has started anew: the parts of before are the caller's to take, and none are known any more.
        """
        self._poller.unregister(self._frames)
        self._frames.close(linger=0)
        self._frames = connect(self._context, zmq.DEALER, self._addresses.frames, self._keys)
        self._poller.register(self._frames, zmq.POLLIN)
        if epoch is not None:
            self.epoch, self.parts = epoch, {}

    def reopen_bridge(self) -> None:
        """The bridge goes away and comes back knowing nothing: it must say HELLO again."""
        self._poller.unregister(self._bridge.socket)
        self._bridge.reconnect(Lease(self._lease_ms))
        self._poller.register(self._bridge.socket, zmq.POLLIN)

    def close(self) -> None:
        for socket in (self._frames, self._results, self._bridge.socket):
            socket.close(linger=200)
        self._context.term()

    def _take_all(self, socket: zmq.Socket[bytes]) -> None:
        if socket is self._bridge.socket:
            self._bridge.take()
            return
        while True:
            try:
                parts = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            header = decode_header(parts[1])
            if socket is self._frames:
                self._take_answer(header)
            else:
                self._take_result(parts[0].partition(b"/")[0], header)

    def _take_answer(self, header: Header) -> None:
        part = self.parts.get(header["seq"]) if header["epoch"] == self.epoch else None
        if part is not None and part.answer is None:
            part.answer = header

    def _take_result(self, kind: bytes, header: Header) -> None:
        if kind == b"health":
            self.state, self.run = header["state"], header["run"]
        elif header["camera"] == self.camera and kind == b"late":
            self.late.append(header)
        elif header["camera"] == self.camera:
            part = self.parts.get(header["seq"]) if header["epoch"] == self.epoch else None
            if part is None:
                self.foreign.append(header)
                return
            part.results.append(header)
            part.decided_ns = part.decided_ns or time.monotonic_ns()

    def _take_permit(self, header: Header, now_ns: int, _taken: bool) -> None:  # noqa: FBT001 - as a bridge tells it
        if header["camera"] != self.camera or header["epoch"] != self.epoch:
            return
        part = self.parts.get(header["seq"])
        if part is not None:
            part.permits.append(header)
            part.believed |= self.lease.may_pass(self.camera, self.epoch, part.seq, now_ns)


@contextmanager
def open_line(
    addresses: Addresses, keys: PeerFile | None, names: tuple[str, str], *, ready_s: float = 30.0, lease_ms: int = 300
) -> Iterator[Line]:
    """A connected line of (line, camera), closed at the end."""
    line = Line(addresses, keys, names, lease_ms)
    try:
        line.wait_ready(ready_s)
        yield line
    finally:
        line.close()


def disagreements(line: Line, lost: set[int]) -> list[str]:
    """Where what was sent and what came back differ; [] when every part has exactly one verdict.

    `lost` are the numbers that were skipped on purpose: they must come back as MISSING, each once.
    """
    problems = []
    for part in line.parts.values():
        refused = part.answer is not None and part.answer["status"] == "refused"
        verdicts = {(r["outcome"], r["reason"]) for r in part.results}
        permits = {(p["outcome"], p["reason"]) for p in part.permits}
        if len(part.results) != (0 if refused else 1):
            problems.append(f"seq {part.seq}: {len(part.results)} results, wanted {0 if refused else 1}")
        elif not refused and permits != verdicts:
            problems.append(f"seq {part.seq}: the permit channel says {permits}, the result {verdicts}")
    missing: list[int] = []
    for header in line.foreign:
        if header["epoch"] == line.epoch and header["reason"] == "MISSING":
            missing += range(header["seq"], header.get("seqTo", header["seq"]) + 1)
        elif header["epoch"] == line.epoch:
            problems.append(
                f"seq {header['seq']}: a verdict ({json.dumps(header['outcome'])}) on a part that was never sent"
            )
    if sorted(missing) != sorted(lost):
        problems.append(f"lost on purpose {sorted(lost)[:10]}, told as MISSING {sorted(missing)[:10]}")
    return problems
