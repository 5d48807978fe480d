"""What keeps stock imageZMQ senders going when the daemon is started anew.

A REQ socket that has sent a frame waits for its answer without end, and if the daemon ended meanwhile, frame and answer
are lost: its sender hangs (imageZMQ's issues 1, 16, 35, 49). libzmq connects it again by itself, so a sender that has
connected and says nothing is told OK unasked. One that was not waiting for an answer never sees it (libzmq's REQ
empties its queue before it sends), so it does no harm to greet too many.

A ROUTER knows a peer by the name that it gives to it: a zero byte and a number that counts up by one with each peer.
That is how libzmq has done it since 3.0, and written nowhere; if it did otherwise, the greeting would go to
nobody, and a sender would hang as it does with imageZMQ's own hub. tests/test_imagezmq.py would tell.
"""

from __future__ import annotations

from typing import Any

import zmq

OK = b"OK"
_PATIENCE_NS = 500_000_000  # a sender that has a frame to send does it at once
_NUMBERS = 1 << 32


class Greeter:
    """Of one plain ROUTER socket. Made before the socket is bound; `tick` is called now and then."""

    def __init__(self, context: zmq.Context[Any], socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._next = (_number_of_a_guest(context, socket) + 1) % _NUMBERS
        self._silent: dict[bytes, int] = {}  # by name: when it is to be greeted
        name = f"inproc://greeter-{id(self)}"
        socket.monitor(name, zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._events: zmq.Socket[bytes] = context.socket(zmq.PAIR)
        self._events.linger = 0
        self._events.set(zmq.RCVHWM, 0)  # libzmq's own thread would wait where this is full
        self._events.connect(name)
        self._now_ns = 0

    def heard(self, name: bytes) -> None:
        """This peer has sent something, and is answered as it should be."""
        self._meet()
        self._silent.pop(name, None)

    def tick(self, now_ns: int) -> None:
        """Greet those who came and said nothing."""
        self._now_ns = now_ns
        self._meet()
        for name in [name for name, due_ns in self._silent.items() if due_ns <= now_ns]:
            del self._silent[name]
            self._socket.send_multipart([name, b"", OK], zmq.NOBLOCK)  # who has gone is passed over

    def _meet(self) -> None:
        while self._events.poll(0):
            self._events.recv_multipart(zmq.NOBLOCK)
            self._silent[b"\0" + self._next.to_bytes(4, "big")] = self._now_ns + _PATIENCE_NS
            self._next = (self._next + 1) % _NUMBERS

    def close(self) -> None:
        if not self._socket.closed:  # it is, where its address could not be had
            self._socket.disable_monitor()
        self._events.close()


def _number_of_a_guest(context: zmq.Context[Any], socket: zmq.Socket[bytes]) -> int:
    """The first number is drawn at random; a peer within this process shows it."""
    address = f"inproc://guest-{id(socket)}"
    socket.bind(address)
    guest = context.socket(zmq.DEALER)
    try:
        guest.connect(address)
        guest.send(b"")
        name = socket.recv_multipart()[0]
    finally:
        guest.close(linger=0)
        socket.unbind(address)
    return int.from_bytes(name[1:], "big")
