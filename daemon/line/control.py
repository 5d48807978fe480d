"""The control socket's words: a request is one JSON object {command}, the answer one {ok, ...}. ipc only."""

from __future__ import annotations

from typing import Any

import zmq

from daemon.errors import InspectError, UsageError, WireError
from daemon.line.wire import decode_header, encode_header
from daemon.types import Header

COMMANDS = ("status", "pause", "resume", "drain")


def decode_request(parts: list[bytes]) -> str:
    """The command of a request. Raises WireError."""
    if len(parts) != 1:
        raise WireError(f"found {len(parts)} message parts, wanted one JSON object")
    command = decode_header(parts[0]).get("command")
    if command not in COMMANDS:
        raise WireError(f"found command {command!r}, wanted one of {', '.join(COMMANDS)}")
    return str(command)


def ask(address: str, command: str, timeout_ms: int = 3000) -> Header:
    """Send one command to a running daemon and give its answer. Raises InspectError when it does not answer."""
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    try:
        socket.connect(address)
        socket.send(encode_header({"command": command}))
        if not socket.poll(timeout_ms):
            raise InspectError(
                f"{address}: no answer within {timeout_ms} ms; is `inspectd run` running with this config?"
            )
        answer = decode_header(socket.recv())
    finally:
        socket.close()
        context.term()
    if not answer.get("ok"):
        raise UsageError(str(answer.get("error")))
    return answer
