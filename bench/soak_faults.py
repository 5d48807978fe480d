"""What the soak injects, when, and how long each fault counts: a seeded schedule, its windows, and the guests.

A guest is a peer beside the cameras' own lines: a subscriber or a bridge that stops reading for seconds. Its buffers
are made small, so that the daemon's queues for it fill; afterwards it must be served again.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from threading import Event
from typing import Any

import numpy as np
import zmq

from daemon.line.permit import Lease
from daemon.line.sockets import connect
from daemon.line.wire import decode_header, encode_header
from tests.daemons import Site

# How many a minute, over all cameras.
RATES = {
    "lost": 6.0,  # numbers that are skipped: mostly one to three, sometimes more than the daemon tells one by one
    "reconnect": 1.0,  # the camera's connection is cut behind a frame; the stream goes on
    "restart": 0.5,  # the same, and the camera begins a new epoch
    "bridgeAway": 1.0,  # a camera's bridge goes and comes back knowing nothing
    "slowSubscriber": 0.5,  # a guest that stops reading results
    "deafBridge": 0.5,  # a guest that stops reading permits; every second one also stops sending
}
OF_GUESTS = ("slowSubscriber", "deafBridge")
PATIENCE_S = 20.0  # a guest that is not served again by then is a fault of the daemon
_BEFORE_NS, _AFTER_NS = 100_000_000, 1_000_000_000  # a window's margins: what was under way, handshakes
_PING_S = 0.05
_LOST_NS = 1_000_000_000  # health comes ten times a second: a longer silence was lost on the way
_LONG_LOSS = 70

Covering = Callable[[int, int], bool]


@dataclass(frozen=True)
class Fault:
    """`at_s` from the start; `camera` is None for guests; `count` numbers are lost, or `seconds` nothing is read."""

    at_s: float
    kind: str
    camera: str | None
    count: int = 0
    seconds: float = 0.0


def schedule(seed: int, duration_s: float, cameras: Sequence[str], intensity: float, deaf_s: float) -> list[Fault]:
    """Faults of every kind at random times (Poisson), the same ones for the same seed."""
    faults = []
    for number, (kind, a_minute) in enumerate(RATES.items()):
        generator = np.random.default_rng([seed, number])
        at_s = 0.0
        while intensity and (at_s := at_s + generator.exponential(60 / (a_minute * intensity))) < duration_s:
            faults.append(
                Fault(
                    at_s,
                    kind,
                    None if kind in OF_GUESTS else str(generator.choice(list(cameras))),
                    int(_LONG_LOSS if generator.random() < 0.1 else generator.integers(1, 4)),
                    float(generator.uniform(0.4, 1.0) * deaf_s),
                )
            )
    return sorted(faults, key=lambda fault: fault.at_s)


class Windows:
    """When which fault was at work; times are of the monotonic clock. Filled from several threads."""

    def __init__(self) -> None:
        self._all: list[tuple[str, str | None, int, int]] = []

    def add(self, kind: str, camera: str | None, begin_ns: int, end_ns: int) -> None:
        self._all.append((kind, camera, begin_ns, end_ns))

    @contextmanager
    def during(self, kind: str) -> Iterator[None]:
        begin_ns = time.monotonic_ns()
        try:
            yield
        finally:
            self.add(kind, None, begin_ns, time.monotonic_ns())

    def counts(self) -> dict[str, int]:
        found = Counter(kind for kind, *_ in self._all)
        return {kind: found[kind] for kind in RATES}

    def covering(self, camera: str, kinds: Sequence[str] = tuple(RATES)) -> Covering:
        """Whether a fault of these kinds, this camera's or a guest's, touches the time from one moment to another."""
        merged: list[tuple[int, int]] = []
        mine = [(b, e) for kind, of, b, e in self._all if kind in kinds and of in (None, camera)]
        for begin_ns, end_ns in sorted((b - _BEFORE_NS, e + _AFTER_NS) for b, e in mine):
            if merged and begin_ns <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(merged[-1][1], end_ns))
            else:
                merged.append((begin_ns, end_ns))
        ends = [end for _, end in merged]

        def covers(first_ns: int, last_ns: int) -> bool:
            place = bisect_left(ends, first_ns)  # the first window that ends at or after the beginning
            return place < len(merged) and merged[place][0] <= last_ns

        return covers


class Guests:
    """Slow subscribers and deaf bridges, one of a kind at a time. `problems`: what was not served again."""

    def __init__(self, site: Site, windows: Windows, faults: Sequence[Fault]) -> None:
        self.ended = Event()
        self._site = site
        self._line = site.config["line"]
        self._windows = windows
        self._faults = faults
        self.problems: list[str] = []
        self.subscribers_that_lost = 0
        self.bridges_born_again = 0

    def run(self, kind: str, start_ns: int) -> None:
        """Each fault when it is due, or as soon as the one before is over, until all are done or `ended` is set."""
        for fault in (fault for fault in self._faults if fault.kind == kind):
            if self.ended.wait(max(0.0, fault.at_s - (time.monotonic_ns() - start_ns) / 1e9)):
                return
            if kind == "slowSubscriber":
                self._subscribe_slowly(fault)
            else:
                self._be_a_deaf_bridge(fault)

    def _subscribe_slowly(self, fault: Fault) -> None:
        with _tight_context() as context:
            socket = connect(context, zmq.SUB, self._site.addresses.results, self._site.peer(), immediate=True)
            for kind in ("result", "health"):
                socket.subscribe(f"{kind}/{self._line}")
            with self._windows.during(fault.kind):
                before_ns = self._health_after(socket, 0)
                self.ended.wait(fault.seconds)
                woken_ns = time.time_ns()
                told = [before_ns or woken_ns]
                if before_ns is None or self._health_after(socket, woken_ns, told) is None:
                    self.problems.append(f"a slow subscriber heard no health within {PATIENCE_S:.0f} s of reading")
            self.subscribers_that_lost += any(later - sooner > _LOST_NS for sooner, later in pairwise(told))

    def _health_after(self, socket: zmq.Socket[bytes], wanted_ns: int, told: list[int] | None = None) -> int | None:
        """Read until a health that was sent after `wanted_ns`; when it was sent. `told` gets each one's time."""
        until_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < until_s:
            if not socket.poll(50):
                continue
            topic, header, *_ = socket.recv_multipart()
            if not topic.startswith(b"health/"):
                continue
            sent_ns = int(decode_header(header)["sentNs"])
            if told is not None:
                told.append(sent_ns)
            if sent_ns > wanted_ns:
                return sent_ns
        return None

    def _be_a_deaf_bridge(self, fault: Fault) -> None:
        lease = Lease(self._site.config["permits"].get("lease_ms", 300))
        with _tight_context() as context:
            socket = connect(context, zmq.DEALER, self._site.addresses.permits, self._site.peer(), immediate=True)
            with self._windows.during(fault.kind):
                births = self._until_fresh(socket, lease)
                until_s = time.monotonic() + fault.seconds
                while time.monotonic() < until_s and not self.ended.wait(_PING_S):
                    if fault.count % 2:
                        _say(socket, self._line, lease.ping(_nonce(), time.monotonic_ns()))
                born_again = self._until_fresh(socket, lease)
            self.bridges_born_again += bool(born_again)
            if births is None or born_again is None:
                self.problems.append(f"a bridge that stopped reading had no fresh lease within {PATIENCE_S:.0f} s")

    def _until_fresh(self, socket: zmq.Socket[bytes], lease: Lease) -> int | None:
        """Say HELLO and PING, and read and acknowledge, until the lease is fresh; BIRTHs heard, None if never."""
        births, until_s = 0, time.monotonic() + PATIENCE_S
        next_ping_s = 0.0
        while time.monotonic() < until_s:
            now_ns = time.monotonic_ns()
            if now_ns / 1e9 >= next_ping_s:
                next_ping_s = now_ns / 1e9 + _PING_S
                say = lease.hello if lease.needs_hello(now_ns) else lease.ping
                _say(socket, self._line, say(_nonce(), now_ns))
            if socket.poll(10):
                header = decode_header(socket.recv_multipart()[1])
                births += header["type"] == "BIRTH"
                answer = lease.receive(header, time.monotonic_ns())
                if answer is not None:
                    _say(socket, self._line, answer)
            # A lease that nobody had to renew (a short deafness) is fresh from the newest heartbeat on.
            if lease.is_fresh(time.monotonic_ns()):
                return births
        return None


@contextmanager
def _tight_context() -> Iterator[zmq.Context[Any]]:
    """A context whose sockets take in one message and a few kilobytes, and no more."""
    context: zmq.Context[Any] = zmq.Context()
    context.setsockopt(zmq.RCVHWM, 1)
    context.setsockopt(zmq.RCVBUF, 4096)
    try:
        yield context
    finally:
        context.destroy(linger=0)


def _say(socket: zmq.Socket[bytes], line: str, header: dict[str, Any]) -> None:
    try:
        socket.send_multipart([f"permit/{line}".encode(), encode_header(header)], zmq.NOBLOCK)
    except zmq.Again:
        return  # between two connections: the lease runs out, as it should


def _nonce() -> str:
    return f"guest-{time.monotonic_ns()}"
