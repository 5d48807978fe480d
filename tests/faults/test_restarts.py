"""kill -9 under 100 frames a second: a short run of the bench, and that the bench finds out what it looks for.

The bridge's notes are made by both halves of the permit channel on a clock of our own, then doctored; leases with a fault
in them are driven the same way. A daemon that speaks before it writes is caught by the books.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from adapters.line import SentPart
from bench.bridge_log import Issued, LoggedLease, Note, issued_by, untrue_passes
from bench.restarts import ROWS, SIZE_HW, contradictions, measure, told, unheard
from daemon.line.permit import PermitDesk
from tests.bundles import good_pixels, raw_frame
from tests.daemons import make_site
from tests.lines import mutate

MS = 1_000_000
PASS, REJECT = ("PASS", None), ("REJECT", "DEFECT")


def test_daemon_killed_twice_under_load_leaves_nothing_to_say(tmp_path):
    site = make_site(tmp_path, size=SIZE_HW, rows=ROWS)
    found = measure(site, rounds=2, rate=100, seed=5)
    assert found["problems"] == []
    assert found["inFlightAtKills"] + found["lostOnTheWay"] > 0, "nothing was under way when the daemon was killed"
    assert found["passesBelieved"] > found["sent"] / 2
    assert len(found["restartToReadySeconds"]) == 2
    # Which of the two was first is not asked: READY is heard at the next frame only, later still on a busy machine.
    assert min(found["restartToReadySeconds"] + found["restartToFirstVerdictSeconds"]) > 0
    assert len(found["restartToFirstVerdictSeconds"]) == 2


def test_daemon_that_speaks_before_it_writes_is_caught(tmp_path):
    site = make_site(tmp_path, size=SIZE_HW, rows=ROWS)
    wait = "        if self._waiting_bytes > 1_000_000:\n            self.flush()\n        while self._waiting_bytes"
    mutate(site, "record/journal.py", "        self.flush()\n        while self._waiting_bytes", wait)
    found = measure(site, rounds=1, rate=100, seed=0)
    assert any("accepted before a kill, and not in the ledger" in problem for problem in found["problems"])
    assert found["problemsFound"] > found["sent"] / 5  # what was told is in no book, either


# --- the bridge's notes


class Bridge:
    """Desk and lease on one clock: what is said arrives at once, unless the daemon is killed."""

    def __init__(self, lease: LoggedLease) -> None:
        self.lease, self.now_ns, self.issued = lease, 0, {}
        self.start("run-a")

    def start(self, run: str) -> None:
        self.run, self.desk, self.seq = run, PermitDesk(run, {}, 100), getattr(self, "seq", 0)
        self.desk.state = "RUNNING"

    def go_on(self, milliseconds: int, *, is_killed: bool = False) -> None:
        """Every 10 ms the bridge pings and asks about every part, and the daemon, if it is there, answers."""
        for _ in range(milliseconds // 10):
            self.now_ns += 10 * MS
            hello = self.lease.needs_hello(self.now_ns)
            ask = self.lease.hello if hello else self.lease.ping
            header = ask(f"nonce-{self.now_ns}", self.now_ns)
            if not is_killed:
                self._hear(self.desk.receive(b"plc", header, self.now_ns))
                self._hear(self.desk.tick(self.now_ns))
            self.lease.survey([("cam1", "e", seq) for seq in range(-1, self.seq + 2)], self.now_ns)

    def judge(self, verdict: tuple[str, str | None], valid_ms: int = 500) -> None:
        outcome, reason = verdict
        self.issued["cam1", "e", self.seq] = Issued(self.run, outcome, reason)
        part = {"camera": "cam1", "epoch": "e", "seq": self.seq, "partId": None}
        self._hear(self.desk.verdict({**part, "outcome": outcome, "reason": reason}, valid_ms, self.now_ns))
        self.seq += 1

    def _hear(self, outgoing: Any) -> None:
        for _, header in outgoing:
            acknowledgement = self.lease.receive(header, self.now_ns)
            if acknowledgement is not None:
                self.desk.receive(b"plc", acknowledgement, self.now_ns)


def story(lease: LoggedLease) -> Bridge:
    """Parts that pass and parts that do not, a pause, kill -9, a long silence, another run."""
    bridge = Bridge(lease)
    bridge.go_on(200)
    for verdict in (PASS, REJECT, PASS):
        bridge.judge(verdict)
        bridge.go_on(50)
    bridge.judge(PASS, valid_ms=60_000)
    bridge.go_on(600)
    bridge.desk.state = "PAUSED"
    bridge.go_on(300)
    bridge.desk.state = "RUNNING"
    bridge.go_on(300)
    bridge.judge(PASS, valid_ms=60_000)
    bridge.go_on(100)
    bridge.go_on(1000, is_killed=True)
    bridge.start("run-b")
    bridge.go_on(200)
    bridge.judge(PASS)
    bridge.go_on(200)
    return bridge


def asked(notes: list[Note], seq: int) -> list[int]:
    """Where a part was let pass."""
    return [number for number, note in enumerate(notes) if ("cam1", "e", seq) in note.parts]


def test_notes_of_a_bridge_that_keeps_the_rules_leave_nothing_to_say():
    bridge = story(LoggedLease())
    assert untrue_passes(bridge.lease.notes, bridge.issued) == []
    passed = {seq for seq in range(bridge.seq) if asked(bridge.lease.notes, seq)}
    assert passed == {0, 2, 3, 4, 5}


class KeepsPermitsOverABirth(LoggedLease):
    def receive(self, header, now_ns):
        before = dict(self._permits)
        answer = super().receive(header, now_ns)
        self._permits = type(self._permits)({**before, **self._permits})
        return answer

    def hello(self, nonce, now_ns):
        before = self._permits.copy()
        header = super().hello(nonce, now_ns)
        self._permits = before
        return header


class ForgetsToExpire(LoggedLease):
    def _take_verdict(self, header, sent_ns, now_ns):
        return super()._take_verdict({**header, "validMs": 100 * header["validMs"]}, sent_ns, now_ns)


class TrustsSilence(LoggedLease):
    def needs_hello(self, now_ns):
        return self._run is None

    def is_fresh(self, now_ns):
        return self.state == "RUNNING"


class IgnoresAPause(LoggedLease):
    def is_fresh(self, now_ns):
        return now_ns < self._fresh_until_ns


class TakesThePartBehind(LoggedLease):
    def survey(self, keys, now_ns):
        keys = list(keys)
        super().survey([(camera, epoch, seq + 1) for camera, epoch, seq in keys], now_ns)
        note = self.notes[-1]
        if note.what == "BELIEVES":
            self.notes[-1] = replace(note, parts=tuple((camera, epoch, seq - 1) for camera, epoch, seq in note.parts))


class TakesRejectsForPasses(LoggedLease):
    def receive(self, header, now_ns):
        answer = super().receive(header, now_ns)
        for key, permit in self._permits.items():
            self._permits[key] = replace(permit, outcome="PASS")
        return answer


@pytest.mark.parametrize(
    ("faulty", "told_of_it"),
    [
        (KeepsPermitsOverABirth, "e 4: let pass, but run run-a issued it, and run run-b speaks"),
        (ForgetsToExpire, "e 0: let pass, but its permit had expired"),
        (TrustsSilence, "e 4: let pass, but the lease was over"),
        (IgnoresAPause, "e 3: let pass, but the daemon was PAUSED"),
        (TakesThePartBehind, "e 1: let pass, but the journal says run-a REJECT DEFECT"),
        (TakesThePartBehind, "e -1: let pass, but the journal says nothing"),
        (TakesRejectsForPasses, "e 1: let pass, but the journal says run-a REJECT DEFECT"),
    ],
)
def test_lease_with_a_fault_is_found_out_by_its_notes(faulty, told_of_it):
    bridge = story(faulty())
    found = untrue_passes(bridge.lease.notes, bridge.issued)
    assert any(told_of_it in problem for problem in found), found


def without(what: str, seq: int | None = None) -> Callable[[list[Note]], list[Note]]:
    return lambda notes: [
        note for note in notes if note.what != what or (seq is not None and note.header["seq"] != seq)
    ]


def believed_later(notes: list[Note]) -> list[Note]:
    """As if part 0 had been let pass once more, at the very end of its run."""
    last = asked(notes, 4)[-1]
    return [*notes[:last], replace(notes[last], parts=(("cam1", "e", 0),)), *notes[last:]]


def born_before(notes: list[Note]) -> list[Note]:
    """As if another run had spoken just before part 2 was let pass for the last time."""
    last = asked(notes, 2)[-1]
    return [*notes[:last], Note(notes[last].at_ns, "BIRTH", {"run": "run-x", "nonce": None}), *notes[last:]]


def of_an_old_nonce(notes: list[Note]) -> list[Note]:
    """As if the verdicts had answered the first nonce of all, and waited since."""
    first = notes[0].header["nonce"]
    return [replace(note, header={**note.header, "nonce": first}) if note.what == "VERDICT" else note for note in notes]


@pytest.mark.parametrize(
    ("doctored", "told_of_it"),
    [
        (without("VERDICT", 0), "e 0: let pass, but the permit is None"),
        (without("HEARTBEAT"), "e 0: let pass, but the lease was over: no heartbeat"),
        (without("BIRTH"), "e 0: let pass, but run run-a issued it, and run None speaks"),
        (believed_later, "e 0: let pass, but its permit had expired"),
        (born_before, "e 2: let pass, but run run-a issued it, and run run-x speaks"),
        (of_an_old_nonce, "e 2: let pass, but its permit had expired"),
    ],
)
def test_doctored_notes_are_found_out(doctored, told_of_it):
    bridge = story(LoggedLease())
    found = untrue_passes(doctored(bridge.lease.notes), bridge.issued)
    assert any(told_of_it in problem for problem in found), found


@pytest.mark.parametrize(
    ("issued", "told_of_it"),
    [
        (None, "the journal says nothing"),
        (Issued("run-a", "REJECT", "LATE"), "the journal says run-a REJECT LATE"),
        (Issued("run-0", "PASS", None), "run run-0 issued it, and run run-a speaks"),
    ],
)
def test_pass_that_the_journal_does_not_have_is_found_out(issued, told_of_it):
    bridge = story(LoggedLease())
    books = {key: issued if key[2] == 2 else value for key, value in bridge.issued.items()}
    assert untrue_passes(bridge.lease.notes, books) == [f"cam1 e 2: let pass, but {told_of_it}"]


def test_journal_says_which_run_spoke_for_each_part_also_of_a_range():
    spoken = {"t": "verdict", "camera": "cam1", "epoch": "e", "reason": None}
    records = [
        {"t": "run", "run": "a"}, {"t": "accept"}, {**spoken, "seq": 1, "outcome": "PASS"}, {"t": "run", "run": "b"},
        {**spoken, "seq": 2, "seqTo": 3, "outcome": "REJECT"}, {**spoken, "seq": 1, "outcome": "REJECT"},
    ]  # fmt: skip
    assert {key[2]: (each.run, each.outcome) for key, each in issued_by(records).items()} == {
        1: ("a", "PASS"), 2: ("b", "REJECT"), 3: ("b", "REJECT"),
    }  # fmt: skip


# --- the wire


def header(seq: int, verdict: tuple[str, str | None] = PASS, **more: Any) -> dict[str, Any]:
    return {"camera": "cam1", "epoch": "e", "seq": seq, "outcome": verdict[0], "reason": verdict[1], **more}


def line_that_heard(results: list[dict[str, Any]], permits: list[dict[str, Any]], count: int = 3) -> Any:
    parts = {seq: SentPart(seq, 10 * seq, raw_frame(good_pixels(), seq=seq)) for seq in range(count)}
    for each in results:
        parts[each["seq"]].results.append(each)
    for each in permits:
        parts[each["seq"]].permits.append(each)
    return SimpleNamespace(parts=parts, foreign=[], camera="cam1", epoch="e")


BOOKS = {("cam1", "e", seq): PASS for seq in range(3)}


@pytest.mark.parametrize(
    ("results", "permits", "told_of_it"),
    [
        ([header(1)], [header(1), header(1)], []),
        ([header(1)], [header(1, REJECT)], ["cam1 e 1: two verdicts on the wire, PASS and REJECT DEFECT"]),
        (
            [header(2), header(0, ("REJECT", "MISSING"), seqTo=2)],
            [],
            [
                "cam1 e 2: two verdicts on the wire, PASS and REJECT MISSING",
                "cam1 e 2: told more than once on the results socket",
                "cam1 e 0: REJECT MISSING on the wire, ('PASS', None) in the books",
                "cam1 e 1: REJECT MISSING on the wire, ('PASS', None) in the books",
            ],
        ),
        ([header(1), header(1)], [], ["cam1 e 1: told more than once on the results socket"]),
    ],
)
def test_contradiction_on_the_wire_is_found_out(results, permits, told_of_it):
    found = contradictions(told(line_that_heard(results, permits)), BOOKS)
    assert sorted(found) == sorted(told_of_it)


@pytest.mark.parametrize("channel", ["results", "permits"])
def test_part_that_was_passed_over_on_a_channel_is_found_out(channel):
    issued = {key: Issued("run-a", "PASS", None) for key in BOOKS}
    heard = told(line_that_heard([header(seq) for seq in range(3)], [header(seq) for seq in range(3)]))
    assert unheard(heard, issued) == []
    heard["cam1", "e", 1] = [each for each in heard["cam1", "e", 1] if each[0] != channel]
    assert unheard(heard, issued) == [f"('cam1', 'e', 1): told before and behind it, not on {channel}"]
    # What was under way when a run ended may be lost.
    issued["cam1", "e", 2] = Issued("run-b", "PASS", None)
    assert unheard(heard, issued) == []
