"""What the results socket says, newest first: state, figures and the last picture of each camera.

One task reads the socket as fast as messages come and keeps only the newest; whoever shows it (watchers.py) is woken
and takes what is there then. So a slow browser costs nobody anything, and nothing here grows.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import zmq
import zmq.asyncio

from adapters.dashboard.settings import Place
from daemon.errors import WireError
from daemon.line.sockets import connect
from daemon.line.wire import decode_header, encode_header, split_topic
from daemon.types import Header

log = logging.getLogger("inspectd.dashboard")

_SILENT_S = 0.6  # heartbeats come every 100 ms; the page must say "no daemon" within a second
_SILENT_BEATS = 3  # where config makes them rarer
_RATE_S = 5.0
_MOST_DECIDED = 5_000  # times a camera's rate is counted from
_MOST_REJECTS = 60  # of the newest that a page is told of
_STATUS_S = 1.0
_WAITING = 256


@dataclass(frozen=True)
class Picture:
    """The newest frame that came with a result, and what explains it; `number` grows with each."""

    number: int
    header: Header
    parts: dict[str, bytes]  # frame, and mask and heatmap where config asks for them


@dataclass
class Camera:
    """One camera as the page shows it."""

    product: str
    last: Header | None = None
    picture: Picture | None = None
    passed: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    decided_s: deque[float] = field(default_factory=lambda: deque(maxlen=_MOST_DECIDED))

    def facts(self, now_s: float) -> dict[str, Any]:
        while self.decided_s and now_s - self.decided_s[0] > _RATE_S:
            self.decided_s.popleft()
        return {
            "product": self.product,
            "last": self.last,
            "passed": self.passed,
            "rejected": self.rejected,
            "rate": len(self.decided_s) / _RATE_S,
        }


class Live:
    """Everything is the event loop's. Each of `watchers` is set whenever there is something new to show."""

    def __init__(self, line: str, cameras: dict[str, str], heartbeat_ms: int = 100) -> None:
        self.line = line
        self._silent_s = max(_SILENT_S, _SILENT_BEATS * heartbeat_ms / 1000)
        self.cameras = {name: Camera(product) for name, product in cameras.items()}
        self.status: Header | None = None
        self.health: Header | None = None
        self._heard_s = float("-inf")
        self._rejects: deque[tuple[int, Header]] = deque(maxlen=_MOST_REJECTS)
        self.newest_reject = 0
        self._pictures = 0
        self.watchers: set[asyncio.Event] = set()

    # -- in ----------------------------------------------------------------------------------------

    def take(self, parts: list[bytes]) -> None:
        """One message of the results socket. Raises WireError for what is none."""
        if len(parts) < 2:
            raise WireError(f"found {len(parts)} message parts, wanted at least 2")
        kind = parts[0].partition(b"/")[0].decode("ascii", "replace")
        header = decode_header(parts[1])
        if kind == "health":
            self._take_health(header)
        elif kind in ("result", "late"):
            line, name = split_topic(parts[0], kind)
            camera = self.cameras.get(name) if line == self.line else None
            if camera is not None and kind == "result":
                self._take_result(camera, header, parts[2:])
            elif camera is not None:
                self._take_late(camera, header)

    def _take_health(self, header: Header) -> None:
        if self.health is None or (header.get("run"), header.get("state")) != (
            self.health["run"],
            self.health["state"],
        ):
            self._wake()
        self.health = header
        self._heard_s = monotonic()

    def _take_result(self, camera: Camera, header: Header, payloads: list[bytes]) -> None:
        parts = header.get("seqTo", header["seq"]) - header["seq"] + 1
        if header["outcome"] == "PASS":
            camera.passed += 1
        else:
            reason = str(header["reason"])
            camera.rejected[reason] = camera.rejected.get(reason, 0) + parts
            self.newest_reject += 1
            self._rejects.append((self.newest_reject, header))
        camera.decided_s.append(monotonic())
        camera.last = header
        pictures = dict(zip(header.get("payloads", []), payloads, strict=False))
        if "frame" in pictures:
            self._pictures += 1
            camera.picture = Picture(self._pictures, header, pictures)
        self._wake()

    def _take_late(self, camera: Camera, header: Header) -> None:
        """The score of a part that was LATE changes nothing, but is worth showing while that part is the last."""
        last = camera.last
        if last is not None and (last["epoch"], last["seq"]) == (header["epoch"], header["seq"]):
            camera.last = {**last, "score": header["score"], "limit": header["limit"]}
            self._wake()

    def note_status(self, status: Header | None) -> None:
        self.status = status
        self._wake()

    # -- out ---------------------------------------------------------------------------------------

    @property
    def is_heard(self) -> bool:
        return monotonic() - self._heard_s < self._silent_s

    def facts(self, rejects_after: int) -> dict[str, Any]:
        """All that a page shows but the pictures; of the rejects those that it has not been told."""
        now_s = monotonic()
        heard = self.is_heard
        return {
            "type": "state",
            "line": self.line,
            "heard": heard,
            "state": self.health["state"] if heard and self.health else "NO_DAEMON",
            "degraded": self.health.get("degraded") if heard and self.health else None,
            "run": self.health["run"] if heard and self.health else None,
            "status": self.status if heard else None,
            "cameras": {name: camera.facts(now_s) for name, camera in self.cameras.items()},
            "rejects": [header for number, header in self._rejects if number > rejects_after],
        }

    def _wake(self) -> None:
        for watcher in self.watchers:
            watcher.set()


async def listen(live: Live, place: Place) -> None:
    """Read the results socket for ever; libzmq connects again by itself when the daemon does."""
    context: Any = zmq.asyncio.Context()  # asyncio's sockets are the plain ones with awaitable methods
    context.setsockopt(zmq.RCVHWM, _WAITING)
    socket: Any = connect(context, zmq.SUB, place.results, place.keys, immediate=True)
    try:
        for topic in ("result/{}/", "late/{}/", "health/{}"):
            socket.subscribe(topic.format(place.config.line))
        while True:
            parts = await socket.recv_multipart()
            try:
                live.take(parts)
            except (WireError, KeyError, TypeError) as error:
                # The daemon's own messages: a line in the log, and the next one.
                log.warning("a message of the results socket was dropped: %r", error)
    finally:
        socket.close(linger=0)
        context.term()


async def watch_status(live: Live, place: Place) -> None:
    """Ask for the status once a second; a daemon that does not answer has none."""
    context = zmq.asyncio.Context()
    socket: Any = None
    try:
        while True:
            if socket is None:
                socket = context.socket(zmq.DEALER)
                socket.linger = 0
                socket.connect(place.config.control.bind)
            await socket.send(encode_header({"command": "status"}))
            if await socket.poll(round(1000 * _STATUS_S)):
                answer = decode_header(await socket.recv())
                live.note_status(answer if answer.get("ok") else None)
                await asyncio.sleep(_STATUS_S)
            else:
                # What was asked of a daemon that is gone must not be answered by the next one, out of turn.
                socket.close()
                socket = None
                live.note_status(None)
    finally:
        if socket is not None:
            socket.close()
        context.term()
