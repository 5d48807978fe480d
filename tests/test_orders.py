"""The control socket's commands: who asks, and what the journal says before the answer leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import zmq

from daemon.errors import UsageError, WireError
from daemon.line.control import Request, decode_request
from daemon.line.wire import encode_header
from daemon.orders import Orders
from daemon.record.journal import Journal, read_records, segments
from daemon.types import Header
from tests.daemons import make_site


class Socket:
    """What the room needs of a ROUTER. Notes what the journal held when an answer left."""

    def __init__(self, folder: Path) -> None:
        self.waiting: list[list[bytes]] = []
        self.sent: list[tuple[bytes, Header, int]] = []
        self.is_gone = False
        self._folder = folder

    def recv_multipart(self, _flags: int) -> list[bytes]:
        if not self.waiting:
            raise zmq.Again
        return self.waiting.pop(0)

    def send_multipart(self, parts: list[bytes], _flags: int) -> None:
        if self.is_gone:
            raise zmq.ZMQError(zmq.EHOSTUNREACH)
        self.sent.append((parts[0], json.loads(parts[1]), len(events(self._folder))))


def events(folder: Path) -> list[dict[str, Any]]:
    records = [record for path in segments(folder) for _, record in read_records(path)]
    return [record for record in records if record is not None and record["t"] == "event"]


@pytest.fixture
def room(tmp_path: Path) -> tuple[Orders, Any]:
    journal = Journal(tmp_path)
    journal.begin({"t": "run", "run": "r", "ns": 1, "streams": {}, "pending": []}, 1)
    socket: Any = Socket(tmp_path)
    return Orders(socket, journal), socket


def ask(socket: Any, client: bytes = b"me", **fields: Any) -> None:
    socket.waiting.append([client, encode_header(fields)])


def test_a_change_is_journalled_before_it_is_answered(room: Any, tmp_path: Path) -> None:
    orders, socket = room
    ask(socket, command="pause", user="olga")
    assert orders.serve(lambda _request, _client: {"ok": True, "state": "PAUSED"})
    assert socket.sent == [(b"me", {"ok": True, "state": "PAUSED"}, 1)]
    (event,) = events(tmp_path)
    assert (event["user"], event["command"], event["engine"], event["ok"]) == ("olga", "pause", None, True)


def test_a_swap_is_noted_when_it_has_gone_through(room: Any, tmp_path: Path) -> None:
    orders, socket = room
    ask(socket, command="activate", engine="part/2", user="olga")
    orders.serve(lambda _request, _client: None)
    ask(socket, b"other", command="status")
    orders.serve(lambda _request, _client: {"ok": True})
    assert events(tmp_path) == []
    orders.answer(b"me", {"ok": True, "engine": "part/2", "from": "1"})
    (event,) = events(tmp_path)
    assert (event["user"], event["engine"], event["ok"]) == ("olga", "part/2", True)


def test_a_refusal_is_noted_with_its_reason(room: Any, tmp_path: Path) -> None:
    orders, socket = room

    def refuse(_request: Request, _client: bytes) -> Header:
        raise UsageError("part/2 is at work already")

    ask(socket, command="activate", engine="part/2", user="olga")
    orders.serve(refuse)
    assert socket.sent[0][1] == {"ok": False, "error": "part/2 is at work already"}
    assert [(event["ok"], event["detail"]) for event in events(tmp_path)] == [(False, "part/2 is at work already")]


def test_status_and_nonsense_are_no_events(room: Any, tmp_path: Path) -> None:
    orders, socket = room
    ask(socket, command="status", user="olga")
    ask(socket, command="explode", user="olga")
    for _ in range(2):
        orders.serve(lambda _request, _client: {"ok": True})
    assert [answer["ok"] for _, answer, _ in socket.sent] == [True, False]
    assert events(tmp_path) == []
    with pytest.raises(zmq.Again):
        orders.serve(lambda _request, _client: {"ok": True})


def test_a_mark_is_in_the_books_with_its_event_before_it_is_answered(room: Any, tmp_path: Path) -> None:
    orders, socket = room
    parts = [{"camera": "cam1", "epoch": "e", "seq": seq, "decidedNs": 5} for seq in range(2)]
    ask(socket, command="mark", user="olga", mark="defect", name="dent", decision="0" * 16, parts=parts)
    orders.serve(lambda request, _client: {"ok": True, "marked": len(request.marking.parts)})  # type: ignore[union-attr]
    assert socket.sent == [(b"me", {"ok": True, "marked": 2}, 1)]
    (record,) = [r for path in segments(tmp_path) for _, r in read_records(path) if r and r["t"] == "mark"]
    assert (record["user"], record["mark"], record["name"], record["parts"]) == ("olga", "defect", "dent", parts)
    assert [(event["command"], event["detail"]) for event in events(tmp_path)] == [("mark", "2 parts: defect dent")]


def test_whoever_has_gone_is_noted_all_the_same(room: Any, tmp_path: Path) -> None:
    orders, socket = room
    socket.is_gone = True
    ask(socket, command="resume", user="olga")
    orders.serve(lambda _request, _client: {"ok": True})
    assert len(events(tmp_path)) == 1


@pytest.mark.parametrize("user", ["", "x" * 65, "a\nb", "\x1b[31m", 7, ["olga"]])
def test_a_user_is_a_short_printable_text(user: Any) -> None:
    with pytest.raises(WireError, match="printable"):
        decode_request([encode_header({"command": "pause", "user": user})])


def test_a_user_may_be_left_out() -> None:
    assert decode_request([b'{"command": "pause"}']) == Request("pause")
    assert decode_request([encode_header({"command": "pause", "user": "Ölga Groß"})]).user == "Ölga Groß"


def test_the_command_line_gives_the_accounts_name(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    site.environment |= {"SUDO_USER": "karl"}
    site.start()
    for command in ("pause", "resume", "status"):
        assert site.run_command(command).returncode == 0
    assert [(event["user"], event["command"]) for event in site.journal() if event["t"] == "event"] == [
        ("karl", "pause"), ("karl", "resume")
    ]  # fmt: skip
    assert site.stop() == 0
