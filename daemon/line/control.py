"""The control socket's words: a request is one JSON object {command, ...}, the answer one {ok, ...}. ipc only."""

from __future__ import annotations

import os
from dataclasses import dataclass
from getpass import getuser
from typing import Any

import zmq

from daemon.errors import InspectError, UsageError, WireError
from daemon.line.marking import Marking, decode_marking
from daemon.line.wire import decode_header, encode_header
from daemon.types import Header

COMMANDS = ("status", "pause", "resume", "drain", "reset", "mark", "activate", "rollback")
MOST_SHADOWED = 1_000_000
MOST_USER_CHARACTERS = 64


@dataclass(frozen=True)
class Request:
    """`engine` is NAME/VERSION for activate and NAME, or nothing where there is only one, for rollback.

    `user` is who asks, as the asker says: whoever reaches this socket is trusted with that too.
    `camera` is for reset; all of them where it is left out. `marking` is for mark, which also needs a user.
    """

    command: str
    engine: str | None = None
    shadow: int = 0  # live frames to compare before the swap
    user: str | None = None
    camera: str | None = None
    marking: Marking | None = None


def decode_request(parts: list[bytes]) -> Request:
    """Raises WireError."""
    if len(parts) != 1:
        raise WireError(f"found {len(parts)} message parts, wanted one JSON object")
    fields = decode_header(parts[0])
    command, engine, shadow = fields.get("command"), fields.get("engine"), fields.get("shadow", 0)
    if command not in COMMANDS:
        raise WireError(f"found command {command!r}, wanted one of {', '.join(COMMANDS)}")
    if not isinstance(engine, str) and not (engine is None and command != "activate"):
        raise WireError(f"found engine {engine!r}, wanted text: NAME/VERSION to activate, NAME to roll back")
    if type(shadow) is not int or not 0 <= shadow <= MOST_SHADOWED:
        raise WireError(f"found shadow {shadow!r}, wanted a number of frames from 0 to {MOST_SHADOWED}")
    user = fields.get("user")
    if user is not None and not _is_name(user):
        raise WireError(f"found user {user!r}, wanted text of 1 to {MOST_USER_CHARACTERS} printable characters")
    camera = fields.get("camera")
    if not isinstance(camera, str | None):
        raise WireError(f"found camera {camera!r}, wanted text, or nothing for all cameras")
    if command == "mark" and user is None:
        raise WireError("found no user, wanted one: a mark is somebody's word")
    marking = decode_marking(fields) if command == "mark" else None
    return Request(str(command), engine, shadow, user, camera, marking)


def _is_name(user: object) -> bool:
    return isinstance(user, str) and 0 < len(user) <= MOST_USER_CHARACTERS and user.isprintable()


def account() -> str | None:
    """Whose hands these are, for the books: the account before sudo; nobody's where it has no name."""
    try:
        return os.environ.get("SUDO_USER") or getuser()
    except (KeyError, OSError):
        return None


class NoAnswerError(InspectError):
    """Nobody answers on the control socket."""


def _connect(socket: zmq.Socket[bytes], address: str) -> None:
    try:
        socket.connect(address)
    except zmq.ZMQError as error:
        raise NoAnswerError(
            f"{address}: cannot be asked: {error.strerror}; an ipc path has at most 107 characters: put the "
            "configuration into a folder with a shorter path"
        ) from error


def ask(address: str, command: str, timeout_ms: int = 3000, **fields: Any) -> Header:
    """Send one command to a running daemon and give its answer. Raises NoAnswerError, UsageError where it refuses."""
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    try:
        _connect(socket, address)
        socket.send(encode_header({"command": command, **fields}))
        if not socket.poll(timeout_ms):
            raise NoAnswerError(
                f"{address}: no answer within {timeout_ms} ms; is `inspectd run` running with this config?"
            )
        answer = decode_header(socket.recv())
    finally:
        socket.close()
        context.term()
    if not answer.get("ok"):
        raise UsageError(str(answer.get("error")))
    return answer
