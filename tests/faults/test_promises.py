"""Promises of the design, broken on purpose: kill -9 in the middle of a stream, and a daemon with a mutated heart.

The mutated copies show that the tests can fail: a part with two verdicts and a hanging inference without
LATE are what promises 1 and 2 forbid, and the same scenario that passes on the daemon must catch them.
"""

from __future__ import annotations

import signal
import time
from collections import Counter, defaultdict

import pytest

from adapters.line import disagreements
from tests.daemons import Site, make_site
from tests.faulty_daemon import HANG, SLOW
from tests.lines import (
    FAULTY_DEADLINE_MS,
    assert_books_balance,
    faulty_site,
    mutate,
    ordered,
    pump_until,
    send,
    settle,
    stream,
)

# -- the scenarios: an AssertionError is a broken promise -----------------------------------------------


def every_part_has_exactly_one_verdict(site: Site) -> None:
    """A part that is late, then judged after all: the second judgement must stay unspoken."""
    site.start()
    with site.line() as line:
        parts = [send(line, 0, ordered(SLOW)), send(line, 1)]
        assert pump_until(line, lambda: len(line.late) == 2, 10), "the late scores never came"
        line.pump(300)
        assert [len(part.results) for part in parts] == [1, 1]
        assert disagreements(line, set()) == []
    assert site.stop() == 0
    verdicts = Counter((r["epoch"], r["seq"]) for r in site.journal() if r["t"] == "verdict")
    assert set(verdicts.values()) == {1}


def late_is_said_while_the_inference_hangs(site: Site) -> None:
    """The engine never comes back: LATE leaves by the deadline all the same."""
    site.start()
    with site.line() as line:
        hanging = send(line, 0, ordered(HANG))
        behind = send(line, 1)
        assert pump_until(line, lambda: bool(hanging.results) and bool(behind.results), 3), "silence while it hangs"
        assert {part.results[0]["reason"] for part in (hanging, behind)} == {"LATE"}
        assert max(part.latency_ms for part in (hanging, behind)) < 2 * FAULTY_DEADLINE_MS
    site.kill()


SCENARIOS = (every_part_has_exactly_one_verdict, late_is_said_while_the_inference_hangs)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_the_daemon_keeps_its_promise(tmp_path, scenario):
    scenario(faulty_site(tmp_path))


@pytest.mark.parametrize(
    ("scenario", "file", "heart", "mutation"),
    [
        (
            every_part_has_exactly_one_verdict,
            "line/parts.py",
            "return self.in_flight.pop(key, None)",
            "return self.in_flight.get(key)",
        ),
        (
            every_part_has_exactly_one_verdict,
            "dispatch.py",
            "        if entry is None:\n            return False\n",
            "        if entry is None:\n            entry = Entry(key, None, 0, 0)\n",
        ),
        (
            late_is_said_while_the_inference_hangs,
            "service.py",
            "            self.dispatcher.on_time(now_ns)\n",
            "",
        ),
        (
            late_is_said_while_the_inference_hangs,
            "line/parts.py",
            "                due.append(key)\n",
            "                pass\n",
        ),
    ],
    ids=["settle keeps the part", "settle speaks twice", "the loop forgets the time", "nothing is ever due"],
)
def test_a_mutated_daemon_is_caught(tmp_path, scenario, file, heart, mutation):
    site = faulty_site(tmp_path)
    mutate(site, file, heart, mutation)
    try:
        with pytest.raises(AssertionError):
            scenario(site)
    finally:
        if site.process is not None and site.process.poll() is None:
            site.kill()


# -- kill -9 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("round_number", range(3))
def test_kill_nine_in_the_middle_of_a_stream_leaves_one_verdict_for_every_part(tmp_path, round_number):
    site = make_site(tmp_path)
    site.start()
    seen: dict[int, set[tuple[str, str | None]]] = defaultdict(set)
    with site.line() as line:
        stream(line, range(60), rate=100)
        # Parts are on their way and in flight when the daemon dies, at another point in each round.
        for seq in range(60, 66 + round_number):
            send(line, seq)
        line.pump(round_number)
        site.kill()
        before = line.run
        site.start()
        # Both sockets must be back: the bridge's lease, and the new run's health on the results socket.
        back = pump_until(line, lambda: line.run != before and line.lease.is_fresh(time.monotonic_ns()), 15)
        assert back, "the line never came back"
        stream(line, range(100, 130), rate=100)
        assert pump_until(line, lambda: all(line.parts[seq].results for seq in range(100, 130)), 10)
        line.pump(300)
        for part in line.parts.values():
            seen[part.seq] |= {(result["outcome"], result["reason"]) for result in part.results}
        for header in line.foreign:
            for seq in range(header["seq"], header.get("seqTo", header["seq"]) + 1):
                seen[seq].add((header["outcome"], header["reason"]))
    assert all(len(verdicts) <= 1 for verdicts in seen.values()), "a part has two different verdicts on the wire"
    assert site.stop() == 0
    assert_books_balance(site)


def test_daemon_and_camera_killed_together_go_on_with_a_new_epoch(tmp_path):
    site = make_site(tmp_path)
    site.start()
    with site.line() as line:
        stream(line, range(20), rate=100)
        send(line, 20)
        site.kill()
    site.start()
    with site.line() as line:
        stream(line, range(20), rate=100)
        assert pump_until(line, lambda: all(part.results for part in line.parts.values()), 10)
        assert disagreements(line, set()) == []
    assert site.stop() == 0
    assert_books_balance(site)


def test_what_was_accepted_before_a_crash_is_missing_once_also_after_two_restarts(tmp_path):
    site = faulty_site(tmp_path)
    site.config["cameras"]["cam1"]["deadline_ms"] = 60_000
    site.start()
    with site.line() as line:
        send(line, 0, ordered(HANG))
        send(line, 1)
        assert pump_until(line, lambda: all(part.answer for part in line.parts.values()), 5)
    for _ in range(2):
        site.kill()
        site.start()
    assert site.stop() == 0
    verdicts = [(r["seq"], r["reason"]) for r in site.journal() if r["t"] == "verdict"]
    assert verdicts == [(0, "MISSING"), (1, "MISSING")]
    assert_books_balance(site)


def test_a_daemon_stopped_for_two_seconds_tells_late_and_goes_on(tmp_path):
    site = faulty_site(tmp_path)
    site.start()
    with site.line() as line:
        stream(line, range(10), rate=100)
        assert site.process is not None
        first = send(line, 10, ordered(SLOW))
        assert pump_until(line, lambda: first.answer is not None, 5)
        site.process.send_signal(signal.SIGSTOP)
        stream(line, range(11, 31), rate=10)  # the camera does not know
        assert not line.lease.is_fresh(time.monotonic_ns())
        assert not any(part.results or part.believed for part in line.parts.values() if part.seq >= 10)
        site.process.send_signal(signal.SIGCONT)
        assert pump_until(line, lambda: bool(first.results), 5)
        assert first.results[0]["reason"] == "LATE"
        assert not first.believed
        assert pump_until(line, lambda: line.lease.is_fresh(time.monotonic_ns()), 5)
        settle(line)
        good = send(line, 31)
        settle(line)
        assert good.results[0]["outcome"] == "PASS"
    assert site.stop() == 0
