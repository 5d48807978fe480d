"""All sockets that config names, opened together, proven closed to strangers, closed together."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import zmq

from daemon.config import Config
from daemon.endpoints import Endpoint, Input
from daemon.errors import ConfigError
from daemon.keys import Keyring
from daemon.line.denials import Denied
from daemon.line.greeter import Greeter
from daemon.line.shm import Rings
from daemon.line.sockets import Bounds, Doorman, Watch, ZapGate, bind, refuses_strangers, sender_key, subscribe_to_all
from daemon.line.wire import MAX_HEADER_BYTES

log = logging.getLogger("inspectd.ports")

MOST_PARTS = 8  # a message has three or four parts; what is beyond is read off and dropped
_RESULTS_WAITING = 256  # a subscriber that does not read loses results beyond this, and costs no more memory
_PERMITS_WAITING = 4096
_SMALL = 4 * MAX_HEADER_BYTES
_ZMQ_NEEDED = (4, 3, 5)


@dataclass(frozen=True)
class Message:
    """A message as received. `key` is the sender's CURVE key, '' on a plain socket."""

    identity: bytes
    parts: list[memoryview]
    key: str


class Ports:
    """The daemon's sockets. `inputs` maps each input socket to its endpoint."""

    def __init__(self, config: Config, keyring: Keyring | None, denied: Denied) -> None:
        if zmq.zmq_version_info() < _ZMQ_NEEDED:
            raise ConfigError("libzmq", [f"found {zmq.zmq_version()}, wanted 4.3.5 or newer; pip install -U pyzmq"])
        self._config = config
        self._context: zmq.Context[Any] = zmq.Context()
        self._sockets: list[zmq.Socket[bytes]] = []
        self.doorman = Doorman(keyring, denied)
        self.inputs: dict[zmq.Socket[bytes], Input] = {}
        self.greeters: dict[zmq.Socket[bytes], Greeter] = {}  # of inputs to which stock imageZMQ senders connect
        self._keyring = keyring
        self._denied = denied
        self._watches: list[Watch] = []
        self._is_ahead = False  # see serve_subscription
        self.zap = ZapGate(self._context, keyring, denied)
        self.rings = Rings()
        try:
            self._open()
        except BaseException:
            self.close(0)
            raise

    def _open(self) -> None:
        config = self._config
        for entry in config.inputs:
            self.inputs[self._open_input(entry)] = entry
        self.results = self._bind(zmq.XPUB, config.results, Bounds(_SMALL, send=_RESULTS_WAITING))
        # Each subscription is asked about before it counts: a key hears only its own topics.
        self.results.set(zmq.XPUB_MANUAL, 1)
        self.permits = self._bind(zmq.ROUTER, config.permits, Bounds(_SMALL, _PERMITS_WAITING, _PERMITS_WAITING))
        self.permits.set(zmq.ROUTER_MANDATORY, 1)
        control = Endpoint(bind=config.control.bind, plain=True)
        self.control = self._bind(zmq.ROUTER, control, Bounds(_SMALL))

    def _open_input(self, entry: Input) -> zmq.Socket[bytes]:
        bounds = Bounds(_SMALL if entry.kind == "shm" else self._config.queue_mb << 20)
        if not entry.connects:
            return self._bind(zmq.PULL if entry.kind == "pull" else zmq.ROUTER, entry, bounds)
        if entry.is_open:
            log.warning("INSECURE connect=%s plain=true: anybody on the way can speak for it", entry.bind)
        socket = subscribe_to_all(self._context, entry.bind, bounds)
        self._sockets.append(socket)
        return socket

    def _bind(self, kind: int, endpoint: Endpoint, bounds: Bounds) -> zmq.Socket[bytes]:
        if endpoint.is_open:
            log.warning("INSECURE bind=%s plain=true: anybody who reaches this address can speak here", endpoint.bind)

        def greet(socket: zmq.Socket[bytes]) -> None:
            self.greeters[socket] = Greeter(self._context, socket)

        # A socket has one monitor, and where keys are asked for that is the Watch's: no stock sender comes there.
        is_greeted = isinstance(endpoint, Input) and endpoint.is_imagezmq and not endpoint.uses_curve
        socket = bind(self._context, kind, endpoint, self._keyring, bounds, before=greet if is_greeted else None)
        self._sockets.append(socket)
        return socket

    def prove_closed(self) -> None:
        """Ask every CURVE socket of ours without a key; raises ConfigError if one lets us in."""
        for path, endpoint in self._config.endpoints():
            if endpoint.uses_curve and not refuses_strangers(endpoint.bind):
                raise ConfigError(
                    path, [f"{endpoint.bind} did not refuse a peer without a key; the daemon does not start"]
                )

    def doors(self) -> dict[zmq.Socket[bytes], Callable[[], None]]:
        """What hears of those who are not in yet, and how each is served.

        Called when the start is over: the refusals that `prove_closed` wanted are then behind, and not counted.
        """
        closed = [socket for socket in self._sockets if socket.get(zmq.CURVE_SERVER)]
        self._watches = [Watch(self._context, socket, self._denied) for socket in closed]
        doors: list[ZapGate | Watch] = [self.zap, *self._watches]
        return {door.socket: door.serve for door in doors}

    def serve_subscription(self) -> None:
        """Take one (un)subscription from the results socket, if its sender may hear the topic.

        A subscription counts for the sender that libzmq believes it has just handed over. A message that is none
        puts it one ahead (XPUB_MANUAL, 4.3.5), until nothing waits any more: up to there nobody is let in.
        """
        part = self.results.recv(zmq.NOBLOCK, copy=False)
        request, key = part.bytes, sender_key(part)
        if not request or request[0] not in (0, 1):
            self._denied("NO_SUBSCRIPTION", f"key={key} sends to the results")
            self._is_ahead = True
        elif self._is_ahead and request[0] == 1:
            self._denied("UNSURE_SENDER", f"key={key} topic={request[1:]!a}; it must subscribe again")
        elif not self._is_ahead:
            self._subscribe(request[1:], key, heard=request[0] == 1)
        if self._is_ahead:
            self._is_ahead = bool(self.results.poll(0))

    def _subscribe(self, topic: bytes, key: str, *, heard: bool) -> None:
        if not heard:
            self.results.setsockopt(zmq.UNSUBSCRIBE, topic)
        elif self.doorman.admits(
            curve=self._config.results.uses_curve, key=key, role="subscriber", topic=topic.decode("utf-8", "replace")
        ):
            self.results.setsockopt(zmq.SUBSCRIBE, topic)

    def greet(self, now_ns: int) -> None:
        for greeter in self.greeters.values():
            greeter.tick(now_ns)

    def close(self, linger_ms: int) -> None:
        """Close everything; what was sent has `linger_ms` to leave."""
        for watch in self._watches:
            watch.close()
        for greeter in self.greeters.values():
            greeter.close()
        for socket in self._sockets:
            socket.close(linger=linger_ms)
        self.rings.close()
        self.zap.close()
        self._context.term()


def receive(socket: zmq.Socket[bytes], *, routed: bool) -> Message | None:
    """One waiting message, or None. Parts are not copied; at most MOST_PARTS are kept."""
    try:
        frames = [socket.recv(zmq.NOBLOCK, copy=False)]
    except zmq.Again:
        return None
    while frames[-1].more:
        part = socket.recv(zmq.NOBLOCK, copy=False)
        frames.append(part)
        if len(frames) > MOST_PARTS + routed:
            frames[-2:] = [part]
    identity = frames.pop(0).bytes if routed else b""
    key = sender_key(frames[0]) if frames else ""
    return Message(identity, [memoryview(frame.buffer).cast("B") for frame in frames], key)
