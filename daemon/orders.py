"""The control socket at work: who asked for what, and the journal's word on it before anybody is answered.

What changes the line (everything but `status`) is an event of the books, whether it was obeyed or refused. A swap is
answered when it has gone through or failed, so who asked for it is remembered until then.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress

import zmq

from daemon.errors import UsageError, WireError
from daemon.line.control import Request, decode_request
from daemon.line.wire import encode_header
from daemon.record.journal import Journal
from daemon.records import order_records
from daemon.types import Header

log = logging.getLogger("inspectd.orders")

Obey = Callable[[Request, bytes], Header | None]  # the answer, or None where it comes later


class Orders:
    """Every method runs in the loop."""

    def __init__(self, socket: zmq.Socket[bytes], journal: Journal) -> None:
        self._socket = socket
        self._journal = journal
        self._asked: dict[bytes, Request] = {}  # by client, of those who wait for a swap

    def serve(self, obey: Obey) -> bool:
        """Take one request and see to it. Raises zmq.Again where none waits."""
        client, *parts = self._socket.recv_multipart(zmq.NOBLOCK)
        request = None
        try:
            request = decode_request(parts)
            answer = obey(request, client)
        except (WireError, UsageError) as error:
            answer = {"ok": False, "error": str(error)}
        if request is not None:
            self._asked[client] = request
        if answer is not None:
            self.answer(client, answer)
        return True

    def answer(self, client: bytes, answer: Header) -> None:
        """Note it, then tell whoever asked, if they are still there."""
        request = self._asked.pop(client, None)
        if request is not None and request.command != "status":
            self._journal.write(*order_records(request, answer))
            log.info("command=%s user=%s engine=%s ok=%s", request.command, request.user, request.engine, answer["ok"])
        with suppress(zmq.ZMQError):
            self._socket.send_multipart([client, encode_header(answer)], zmq.NOBLOCK)
