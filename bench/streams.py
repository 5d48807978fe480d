"""Frames at a steady total rate into a running daemon, and what came of each: for bench.scale and bench.large.

One subscriber and one PLC bridge hear all cameras; how frames are sent is the caller's. A rate is sustained where every
frame has exactly one verdict, none of them OVERLOAD or LATE, and the sender itself kept the pace.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import zmq

from adapters.bridge import Bridge, pump_sockets
from daemon.errors import InspectError
from daemon.keys import PeerFile
from daemon.line.sockets import connect
from daemon.line.wire import decode_header
from tests.daemons import Site

_SETTLE_S = 10.0
_KEPT_PACE = 0.98
_FINER, _LEAST_RATE = 0.9, 1.0
_TICKS = os.sysconf("SC_CLK_TCK")

Part = tuple[str, int]  # camera, seq


class Listener:
    """Hears every verdict, and keeps a bridge's lease fresh. Poll other sockets with it by `also`."""

    def __init__(self, site: Site, keys: PeerFile | None) -> None:
        self.verdicts: dict[Part, list[tuple[str, int]]] = {}  # (reason or PASS, when it arrived)
        self._state = ""
        self._context: zmq.Context[Any] = zmq.Context()
        self._results = connect(self._context, zmq.SUB, site.addresses.results, keys)
        self._bridge = Bridge(self._context, site.addresses.permits, keys, site.config["line"])
        for kind in ("result", "health"):
            self._results.subscribe(f"{kind}/{site.config['line']}")
        self._poller = zmq.Poller()
        self._poller.register(self._results, zmq.POLLIN)
        self._poller.register(self._bridge.socket, zmq.POLLIN)
        self.also: dict[Any, Callable[[], object]] = {}

    def wait_ready(self) -> None:
        until = time.monotonic() + 30
        while not (self._state == "RUNNING" and self._bridge.lease.is_fresh(time.monotonic_ns())):
            self.pump(20)
            if time.monotonic() > until:
                raise InspectError("no ready daemon within 30 s; its log.txt says why")

    def watch(self, socket: Any, hear: Callable[[], object]) -> None:
        self._poller.register(socket, zmq.POLLIN)
        self.also[socket] = hear

    def pump(self, timeout_ms: float) -> None:
        """Take in what arrives within `timeout_ms`, and up to 1 ms more."""
        pump_sockets(self._poller, timeout_ms, self._bridge.ping, self._take)

    def _take(self, socket: Any) -> None:
        if socket in self.also:
            self.also[socket]()
        elif socket is self._bridge.socket:
            self._bridge.take()
        else:
            _take_all(socket, self._hear_result)

    def _hear_result(self, parts: list[bytes]) -> None:
        header = decode_header(parts[1])
        if parts[0].startswith(b"health/"):
            self._state = header["state"]
            return
        found = self.verdicts.setdefault((header["camera"], header["seq"]), [])
        found.append((header["reason"] or header["outcome"], time.monotonic_ns()))

    def close(self) -> None:
        self._context.destroy(linger=0)


def _take_all(socket: Any, take: Callable[[list[bytes]], None]) -> None:
    while True:
        try:
            parts = socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return
        take(parts)


@contextmanager
def listening(site: Site, keys: PeerFile | None) -> Iterator[Listener]:
    listener = Listener(site, keys)
    try:
        listener.wait_ready()
        yield listener
    finally:
        listener.close()


@dataclass
class Sent:
    """A run of frames: when each was sent, and the daemon's processor time around it."""

    asked: float
    parts: dict[Part, int] = field(default_factory=dict)
    seconds: float = 0.0  # of sending
    loop_s: float = 0.0
    daemon_s: float = 0.0


def stream(site: Site, listener: Listener, rate: float, seconds: float, send: Callable[[], Part]) -> Sent:
    """`send` at this rate for this long, then until each part has its verdict."""
    sent = Sent(rate)
    before = processor_s(site)
    start_ns = time.monotonic_ns()
    for number in range(round(rate * seconds)):
        due_ns = start_ns + int(number * 1e9 / rate)
        while (left_ns := due_ns - time.monotonic_ns()) > 0:
            listener.pump(max(0.0, left_ns / 1e6 - 1.0))
        listener.pump(0)
        sent_ns = time.monotonic_ns()
        sent.parts[send()] = sent_ns
    sent.seconds = (time.monotonic_ns() - start_ns) / 1e9
    after = processor_s(site)
    sent.loop_s, sent.daemon_s = after[0] - before[0], after[1] - before[1]
    until = time.monotonic() + _SETTLE_S
    while time.monotonic() < until and any(part not in listener.verdicts for part in sent.parts):
        listener.pump(20)
    return sent


def flood(listener: Listener, send: Callable[[], Part], under_way: int, seconds: float) -> float:
    """Frames a second with so many under way."""
    started, done, waiting = time.monotonic(), 0, set[Part]()
    while time.monotonic() < started + seconds:
        while len(waiting) < under_way:
            waiting.add(send())
        listener.pump(1)
        heard = {part for part in waiting if part in listener.verdicts}
        waiting -= heard
        done += len(heard)
    rate = done / (time.monotonic() - started)
    while waiting and time.monotonic() < started + seconds + 10:
        listener.pump(5)
        waiting -= listener.verdicts.keys()
    return rate


def processor_s(site: Site) -> tuple[float, float]:
    """Seconds of processor that the daemon's loop (its first thread) and all its threads have used."""
    assert site.process is not None
    process = Path(f"/proc/{site.process.pid}")
    paths = (process / "task" / process.name / "stat", process / "stat")
    spent = [path.read_text().rpartition(")")[2].split() for path in paths]
    loop, everything = ((int(fields[11]) + int(fields[12])) / _TICKS for fields in spent)
    return loop, everything


def figures(sent: Sent, listener: Listener) -> dict[str, Any]:
    """Frames a second, latencies from sending to hearing, verdicts by reason, and the daemon's processor time.

    The shares are of one core; a frame's milliseconds are of all threads, and hold also on a machine that is shared.
    """
    spent = [(listener.verdicts[part][0][1] - at) / 1e6 for part, at in sent.parts.items() if part in listener.verdicts]
    if not spent:
        raise InspectError("no verdict came back; the daemon's log.txt says why")
    verdicts = [listener.verdicts.get(part, []) for part in sent.parts]
    reasons = Counter(found[0][0] if found else "none" for found in verdicts)
    late = len(sent.parts) / sent.seconds < _KEPT_PACE * sent.asked
    lost = sum(len(found) != 1 for found in verdicts)
    bad = reasons["OVERLOAD"] + reasons["LATE"] + reasons["ENGINE_ERROR"] + reasons["BAD_FRAME"] + lost
    return {
        "asked": sent.asked, "framesPerS": len(sent.parts) / sent.seconds, "frames": len(sent.parts),
        "p50Ms": float(np.percentile(spent, 50)), "p99Ms": float(np.percentile(spent, 99)),
        "loopShare": sent.loop_s / sent.seconds, "daemonShare": sent.daemon_s / sent.seconds,
        "daemonMsAFrame": 1000 * sent.daemon_s / len(sent.parts),
        "verdicts": dict(reasons), "sustained": not (bad or late),
    }  # fmt: skip


def highest_sustained(first: float, measure: Callable[[float], dict[str, Any]]) -> dict[str, Any]:
    """From `first` frames a second down by a tenth a step; a step that fails is tried once more. Its figures."""
    rate = first
    while rate >= _LEAST_RATE:
        for _ in range(2):
            found = measure(rate)
            shown = {key: found[key] for key in ("p50Ms", "p99Ms", "loopShare", "verdicts", "sustained")}
            click.echo(f"{rate:.1f} frames/s: {shown}", err=True)
            if found["sustained"]:
                return found
        rate *= _FINER
    raise InspectError(f"not even {_LEAST_RATE:g} frame a second is sustained; is the machine busy with other things?")
