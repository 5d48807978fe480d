"""The software trigger of `inspectd camera`: a ZeroMQ request takes one picture, its text is the part's id.

The answer is one JSON object, {"epoch", "seq", "capturedNs"} of the picture that was sent, or {"error"}. A request
that could not be served at once is answered with an error: a picture taken later would show another part.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import zmq
from pydantic import TypeAdapter, ValidationError

from daemon.endpoints import Endpoint, check_address
from daemon.errors import UsageError
from daemon.line import wire
from daemon.line.sockets import Bounds, bind
from daemon.line.wire import encode_header
from daemon.types import Header

_MOST_BYTES = 4096
_PART_ID: TypeAdapter[str] = TypeAdapter(wire.Name)


@dataclass(frozen=True)
class Request:
    """Who asked, and for which part."""

    envelope: list[bytes]
    part_id: str | None


class Trigger:
    """Bound to ipc (0660) or to loopback: whoever can speak here can have pictures taken."""

    def __init__(self, address: str) -> None:
        try:
            check_address(address)
        except ValueError as error:
            raise UsageError(f"--trigger {address}: {error}") from error
        endpoint = Endpoint(bind=address, plain=True)
        if endpoint.is_open:
            raise UsageError(f"--trigger {address}: anybody on the network could take pictures; wanted ipc or loopback")
        self._context: zmq.Context[Any] = zmq.Context()
        try:
            self.socket = bind(self._context, zmq.ROUTER, endpoint, None, Bounds(_MOST_BYTES))
        except BaseException:
            self._context.term()
            raise

    def next(self) -> Request | None:
        """The oldest request that waits. One whose part id cannot be is answered here."""
        while True:
            try:
                *envelope, text = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return None
            try:
                part_id = _PART_ID.validate_python(text.decode("utf-8"), strict=True) if text else None
            except (UnicodeDecodeError, ValidationError):
                shown = re.sub(r"[^\x20-\x7e]", "?", text[:40].decode("ascii", "replace"))
                self.fail(Request(envelope, None), f"found part id {shown}, wanted 1 to 128 printable characters")
                continue
            return Request(envelope, part_id)

    def answer(self, request: Request, fields: Header) -> None:
        self.socket.send_multipart([*request.envelope, encode_header(fields)], zmq.NOBLOCK)

    def fail(self, request: Request, error: str) -> None:
        self.answer(request, {"error": error})

    def close(self) -> None:
        self.socket.close(linger=200)
        self._context.term()
