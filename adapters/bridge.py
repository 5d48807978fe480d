"""The bridge's half of the permit channel on a socket: HELLO and PING when they are due, an ACK for each verdict.

What may be believed is the lease's business (daemon/line/permit.py); here its messages are only carried. The
simulator's line, the benches and the PLC bridges stand on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import zmq

from daemon.errors import WireError
from daemon.keys import PeerFile
from daemon.line.permit import Lease
from daemon.line.sockets import connect
from daemon.line.wire import decode_header, encode_header
from daemon.types import Header

_PING_NS = 50_000_000

Hear = Callable[[Header, int, bool], object]  # a VERDICT, when it came, whether the lease took it in


class Bridge:
    """Connected from the start. Call `ping` when it is due and `take` when `socket` is readable, on one thread."""

    def __init__(
        self, context: zmq.Context[Any], address: str, keys: PeerFile | None, line: str, *,
        lease: Lease | None = None, hear: Hear | None = None,
    ) -> None:  # fmt: skip
        self.lease = lease or Lease()
        self.broken = 0  # messages that could not be read
        self._hear = hear
        self._context, self._address, self._keys = context, address, keys
        self._topic = f"permit/{line}".encode()
        self._name = uuid4().hex[:12]  # a nonce must not have been used before, not by a bridge before this one either
        self._nonces = 0
        self._next_ping_ns = 0
        self.socket = self._connect()

    def ping(self, now_ns: int) -> int:
        """If it is time; returns when it is again (monotonic ns)."""
        if now_ns >= self._next_ping_ns:
            self._next_ping_ns = now_ns + _PING_NS
            self._nonces += 1
            say = self.lease.hello if self.lease.needs_hello(now_ns) else self.lease.ping
            self._send(say(f"{self._name}-{self._nonces}", now_ns))
        return self._next_ping_ns

    def take(self) -> None:
        """All that waits. `hear` gets each verdict, repetitions and those of another run too."""
        while True:
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                header = decode_header(parts[1])
            except (IndexError, WireError):
                self.broken += 1
                continue
            self._take(header, time.monotonic_ns())

    def _take(self, header: Header, now_ns: int) -> None:
        acknowledgement = self.lease.receive(header, now_ns)
        if acknowledgement is not None:
            self._send(acknowledgement)
        if self._hear is not None and header.get("type") == "VERDICT":
            self._hear(header, now_ns, acknowledgement is not None)

    def reconnect(self, lease: Lease) -> None:
        """Go away and come back knowing nothing: a new socket, and a HELLO."""
        self.close()
        self.lease, self._next_ping_ns = lease, 0
        self.socket = self._connect()

    def close(self) -> None:
        self.socket.close(linger=0)

    def _connect(self) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = connect(self._context, zmq.DEALER, self._address, self._keys, immediate=True)
        return socket

    def _send(self, header: Header) -> None:
        try:
            self.socket.send_multipart([self._topic, encode_header(header)], zmq.NOBLOCK)
        except zmq.Again:
            return  # nobody there: the lease runs out, as it should


def pump_sockets(
    poller: zmq.Poller, timeout_ms: float, ping: Callable[[int], int], take: Callable[[Any], object]
) -> None:
    """`take` what arrives within `timeout_ms` and up to 1 ms more; `ping` does what is due and says when again (ns)."""
    until_ns = time.monotonic_ns() + int(timeout_ms * 1e6)
    while True:
        now_ns = time.monotonic_ns()
        wait_ns = min(until_ns, ping(now_ns)) - now_ns
        for socket, _ in poller.poll(max(0, -(-wait_ns // 1_000_000))):
            take(socket)
        if time.monotonic_ns() >= until_ns:
            return
