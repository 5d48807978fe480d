"""Cameras that do what they should not: flood, stutter, start anew in the stream, speak under another's name.

Whatever they do, each of their parts has one verdict, none is let pass that was not judged, and the camera beside them
has what its mode promises.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from adapters.line import Line
from daemon.keys import make_peer
from daemon.line.sockets import connect
from daemon.line.wire import decode_header, encode_frame
from tests.bundles import good_pixels, raw_frame
from tests.daemons import Site, make_site
from tests.faulty_daemon import SLOW
from tests.lines import assert_books_balance, ordered, send, settle, stream, wait_for

MOST_UNANSWERED = 500  # below the queue of the camera's own socket: nothing is lost on its side


@pytest.fixture(scope="module")
def site(tmp_path_factory: Any) -> Iterator[Site]:
    site = make_site(tmp_path_factory.mktemp("cameras"))
    site.program = [sys.executable, "-m", "tests.faulty_daemon"]
    site.config["queue_mb"] = 1  # 128 of these frames
    calm = {**site.config["cameras"]["cam1"], "deadline_ms": 5000}
    site.config["cameras"] = {"cam1": calm, "cam2": calm, "cam3": {**calm, "mode": "latest"}}
    make_peer(site.folder / "keys", "twin", ["camera"], ["*"])
    site.start()
    yield site
    assert site.stop() == 0
    assert "Traceback" not in site.log
    assert_books_balance(site)


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    context: zmq.Context[Any] = zmq.Context()
    yield context
    context.destroy(linger=0)


def flood(line: Line, count: int, beside: Line) -> None:
    """As many frames as the socket takes, and one of the camera beside it with every fiftieth; the engine begins late."""
    unanswered = 0
    send(line, 0, ordered(SLOW))
    for seq in range(1, count):
        while unanswered >= MOST_UNANSWERED:
            line.pump(1)
            unanswered = sum(part.answer is None for part in line.parts.values())
        send(line, seq)
        unanswered += 1
        if seq % 50 == 0:
            send(beside, len(beside.parts))
            beside.pump(0)


def reasons(line: Line) -> Counter[str | None]:
    return Counter(part.results[0]["reason"] for part in line.parts.values())


def test_flood_of_an_every_frame_camera_is_told_part_by_part_and_ends_with_the_flood(site):
    with site.line("cam1") as flooding, site.line("cam2") as beside:
        flood(flooding, 1500, beside)
        settle(flooding)
        settle(beside)
        assert set(reasons(flooding)) <= {None, "OVERLOAD", "LATE"}
        assert reasons(flooding)["OVERLOAD"] > 0
        # They share the queue and the engine, and yet the flood costs the camera beside it nothing.
        assert set(reasons(beside)) == {None}
        for line in (flooding, beside):
            good = send(line, len(line.parts))
            settle(line)
            assert good.results[0]["outcome"] == "PASS"


def test_flood_of_a_camera_that_wants_its_latest_costs_the_one_beside_it_nothing(site):
    with site.line("cam3") as flooding, site.line("cam2") as beside:
        flood(flooding, 1500, beside)
        settle(flooding)
        settle(beside)
        assert set(reasons(flooding)) == {None, "SUPERSEDED"}
        assert set(reasons(beside)) == {None}
        assert flooding.parts[1499].results[0]["outcome"] == "PASS"  # nothing has overtaken it


def test_camera_that_stutters_is_judged_in_full(site):
    with site.line("cam1") as line:
        for burst in range(4):
            for seq in range(25 * burst, 25 * burst + 25):
                send(line, seq)
            line.pump(400)  # longer than a lease
        settle(line)
        assert set(reasons(line)) == {None}


def test_camera_that_starts_anew_in_the_stream_leaves_no_part_of_any_life_without_its_verdict(site):
    with site.line("cam1") as line, site.line("cam2") as beside:
        lives = {}
        for number in range(5):
            stream(line, range(10), rate=200)
            wait_for(line, lambda: all(part.answer for part in line.parts.values()))  # accepted, on a busy machine too
            for seq in range(10, 13 + number):  # under way when it goes
                send(line, seq)
                send(beside, len(beside.parts))
            lives[line.epoch] = line.parts
            line.reopen_camera(f"{line.epoch}-{number}")
        stream(line, range(10), rate=200)
        settle(line)
        settle(beside)
        assert set(reasons(line)) == set(reasons(beside)) == {None}
        wait_for(line, lambda: site.status()["inFlight"] == 0)
        line.pump(50)
    told = Counter((header["epoch"], header["seq"]) for header in line.foreign)
    told.update((epoch, part.seq) for epoch, parts in lives.items() for part in parts.values() if part.results)
    accepted = {(record["epoch"], record["seq"]) for record in site.journal() if record["t"] == "accept"}
    for epoch, parts in lives.items():
        kept = {seq for seq in parts if (epoch, seq) in accepted}
        assert kept >= set(range(10))
        assert {seq: told[epoch, seq] for seq in kept} == dict.fromkeys(kept, 1)


def test_second_sender_under_a_cameras_name_with_its_own_key_is_refused_frame_by_frame(site, context):
    with site.line("cam1") as line:
        twin = connect(context, zmq.DEALER, site.addresses.frames, site.peer("twin"))
        settle_first = send(line, 0)
        settle(line)
        assert settle_first.results[0]["outcome"] == "PASS"
        for seq in range(1, 21):
            # Once in a stream of its own, once as the camera itself, with the number that comes next.
            for epoch in ("twin", line.epoch):
                twin.send_multipart(encode_frame("test", raw_frame(good_pixels(), epoch=epoch, seq=seq)))
            send(line, seq)
            line.pump(10)
        settle(line)
        assert set(reasons(line)) == {None}
        assert line.foreign == []
        for _ in range(40):
            assert twin.poll(5000)
            assert decode_header(twin.recv_multipart()[1])["reason"] == "FORBIDDEN"


def test_of_two_senders_with_one_key_the_younger_has_the_stream_and_the_older_is_refused_for_good(site):
    with site.line("cam1") as older, site.line("cam1") as younger:
        stream(older, range(10), rate=200)
        settle(older)
        before = dict(older.parts)
        for seq in range(10):
            send(younger, seq)
            younger.pump(10)
            send(older, 10 + seq)
            older.pump(10)
        settle(younger)
        assert set(reasons(younger)) == {None}
        refused = [part for seq, part in older.parts.items() if seq not in before]
        wait_for(older, lambda: all(part.answer for part in refused))
        assert {(part.answer or {}).get("reason") for part in refused} == {"DUPLICATE"}
        assert [part.results + part.permits for part in refused] == [[]] * 10
        assert not any(part.believed for part in refused)
