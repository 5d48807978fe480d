"""The permit channel: a PASS is believed for its very part, from its very run, for its time, and never otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from daemon.line.permit import MOST_UNACKED, Lease, PermitDesk

MS = 1_000_000
BIRTH = {"cameras": ["cam1"], "products": ["part"], "engines": {"part": "digest"}, "limits": {"part": 1.5}}
BRIDGE, OTHER = b"bridge", b"other"
Header = dict[str, Any]


def judged(seq: int = 1, outcome: str = "PASS", camera: str = "cam1", epoch: str = "e1") -> Header:
    reason = None if outcome == "PASS" else "DEFECT"
    return {"camera": camera, "epoch": epoch, "seq": seq, "partId": f"p{seq}", "outcome": outcome, "reason": reason}


def make_desk(run: str = "r1", *bridges: bytes, state: str = "RUNNING") -> PermitDesk:
    """A running desk with bridges that have said HELLO at time 0 and heard the heartbeat of time 0."""
    desk = PermitDesk(run, BIRTH, heartbeat_ms=100)
    desk.state = state
    for bridge in bridges:
        desk.receive(bridge, {"type": "HELLO", "nonce": f"{bridge.decode()}-0"}, 0)
    desk.tick(0)
    return desk


def kinds(outgoing: list[tuple[bytes, Header]]) -> list[tuple[bytes, str]]:
    return [(bridge, header["type"]) for bridge, header in outgoing]


def acknowledge(desk: PermitDesk, now_ns: int, bridge: bytes = BRIDGE, **changes: Any) -> None:
    header = {"type": "ACK", "run": "r1", "epoch": "e1", "seq": 1, "camera": "cam1", **changes}
    desk.receive(bridge, {key: value for key, value in header.items() if value is not None}, now_ns)


# --- the desk


def test_hello_is_answered_by_what_the_daemon_is() -> None:
    desk = PermitDesk("r1", BIRTH, heartbeat_ms=100)
    ((bridge, header),) = desk.receive(BRIDGE, {"type": "HELLO", "nonce": "n1"}, 0)
    assert bridge == BRIDGE
    assert header == {"type": "BIRTH", "run": "r1", "nonce": "n1", **BIRTH}


def test_newest_nonce_of_each_bridge_is_echoed() -> None:
    desk = make_desk("r1", BRIDGE, OTHER)
    desk.receive(BRIDGE, {"type": "PING", "nonce": "n7"}, 1)
    assert [(b, h["nonce"]) for b, h in desk.verdict(judged(), 500, 2)] == [(BRIDGE, "n7"), (OTHER, "other-0")]
    assert [(b, h["nonce"]) for b, h in desk.tick(100 * MS) if h["type"] == "HEARTBEAT"] == [
        (BRIDGE, "n7"),
        (OTHER, "other-0"),
    ]


@pytest.mark.parametrize("nonce", [None, 5, "x" * 129, ["n"], {"n": 1}])
def test_nonce_that_is_no_short_text_is_not_echoed(nonce: object) -> None:
    desk = make_desk("r1", BRIDGE)
    desk.receive(BRIDGE, {"type": "PING", "nonce": nonce}, 1)
    ((_, header),) = desk.verdict(judged(), 500, 2)
    assert header["nonce"] == "bridge-0"


def test_verdict_goes_to_every_bridge_with_its_time() -> None:
    outgoing = make_desk("r1", BRIDGE, OTHER).verdict(judged(), 500, 5)
    assert [bridge for bridge, _ in outgoing] == [BRIDGE, OTHER]
    assert outgoing[0][1] == {"type": "VERDICT", "run": "r1", "validMs": 500, "nonce": "bridge-0", **judged()}


def test_verdict_without_a_bridge_is_kept_for_nobody() -> None:
    desk = make_desk("r1")
    assert desk.verdict(judged(), 500, 5) == []
    desk.receive(BRIDGE, {"type": "HELLO", "nonce": "n"}, 6)
    assert desk.unacked == 0


def test_heartbeat_tells_the_state_each_interval() -> None:
    desk = make_desk("r1", BRIDGE)
    assert desk.tick(99 * MS) == []
    assert desk.next_tick_ns() == 100 * MS
    desk.state = "PAUSED"
    ((_, header),) = desk.tick(100 * MS)
    told = {"state": "PAUSED", "degraded": None}
    assert header == {"type": "HEARTBEAT", "run": "r1", **told, "nonce": "bridge-0"}
    desk.degraded = "JOURNAL"
    ((_, header),) = desk.tick(200 * MS)
    assert header["degraded"] == "JOURNAL"


def test_desk_that_never_ran_says_so() -> None:
    desk = PermitDesk("r1", BIRTH, heartbeat_ms=100)
    desk.receive(BRIDGE, {"type": "HELLO", "nonce": "n"}, 0)
    ((_, header),) = desk.tick(0)
    assert header["state"] == "STARTING"


def test_unacknowledged_verdict_is_sent_again_ever_more_rarely_with_the_newest_nonce_until_it_expires() -> None:
    desk = make_desk("r1", BRIDGE)
    desk.verdict(judged(), 1600, 0)
    sent = []
    for now_ms in range(1, 2500):
        desk.receive(BRIDGE, {"type": "PING", "nonce": f"n{now_ms}"}, now_ms * MS)
        sent += [(now_ms, h["nonce"]) for _, h in desk.tick(now_ms * MS) if h["type"] == "VERDICT"]
    assert sent == [(now_ms, f"n{now_ms}") for now_ms in (50, 150, 350, 750, 1150, 1550)]
    assert desk.unacked == 0


def test_acknowledged_verdict_is_not_sent_again_and_repeating_the_ack_is_harmless() -> None:
    desk = make_desk("r1", BRIDGE)
    desk.verdict(judged(), 500, 0)
    for now_ms in (10, 20, 600):
        acknowledge(desk, now_ms * MS)
        assert desk.unacked == 0
    assert kinds(desk.tick(60 * MS)) == []


def test_ack_after_the_end_is_harmless() -> None:
    desk = make_desk("r1", BRIDGE)
    desk.verdict(judged(), 100, 0)
    desk.tick(150 * MS)
    acknowledge(desk, 160 * MS)
    assert desk.unacked == 0


def test_ack_without_camera_is_taken_for_its_epoch_and_seq() -> None:
    desk = make_desk("r1", BRIDGE)
    desk.verdict(judged(), 500, 0)
    acknowledge(desk, 1, camera=None)
    assert desk.unacked == 0


@pytest.mark.parametrize(
    "changes",
    [{"run": "r0"}, {"run": None}, {"epoch": "e2"}, {"seq": 2}, {"seq": "1"}, {"camera": "cam2"}, {"epoch": ["e1"]}],
)
def test_ack_of_something_else_changes_nothing(changes: Header) -> None:
    desk = make_desk("r1", BRIDGE)
    desk.verdict(judged(), 500, 0)
    acknowledge(desk, 1, **changes)
    assert desk.unacked == 1


def test_ack_of_one_bridge_does_not_speak_for_another() -> None:
    desk = make_desk("r1", BRIDGE, OTHER)
    desk.verdict(judged(), 500, 0)
    acknowledge(desk, 1)
    assert kinds(desk.tick(60 * MS)) == [(OTHER, "VERDICT")]


@pytest.mark.parametrize("kind", ["PING", "ACK", "BYE", None, 5])
def test_stranger_that_never_said_hello_hears_nothing(kind: object) -> None:
    desk = make_desk("r1")
    assert desk.receive(BRIDGE, {"type": kind, "nonce": "n", "run": "r1"}, 0) == []
    assert desk.verdict(judged(), 500, 0) == []


def test_silent_bridge_is_forgotten_and_a_ping_keeps_it() -> None:
    desk = make_desk("r1", BRIDGE, OTHER)
    desk.receive(OTHER, {"type": "PING", "nonce": "n"}, 5_000 * MS)
    assert {bridge for bridge, _ in desk.tick(10_001 * MS)} == {OTHER}
    assert desk.quietest_s(10_001 * MS) == pytest.approx(5.001)


def test_bridge_that_cannot_be_sent_to_is_forgotten_until_its_hello() -> None:
    desk = make_desk("r1", BRIDGE)
    desk.verdict(judged(), 500, 0)
    desk.forget(BRIDGE)
    desk.forget(BRIDGE)
    assert (desk.unacked, desk.tick(100 * MS)) == (0, [])
    assert kinds(desk.receive(BRIDGE, {"type": "HELLO", "nonce": "n"}, 101 * MS)) == [(BRIDGE, "BIRTH")]


def test_hello_of_a_known_bridge_leaves_what_is_due() -> None:
    desk = make_desk("r1", BRIDGE)
    desk.verdict(judged(), 500, 0)
    desk.receive(BRIDGE, {"type": "HELLO", "nonce": "n2"}, 1 * MS)
    assert [(h["type"], h["nonce"]) for _, h in desk.tick(60 * MS)] == [("VERDICT", "n2")]


def test_unacknowledged_verdicts_are_bounded_and_the_newest_stay() -> None:
    desk = make_desk("r1", BRIDGE)
    for seq in range(MOST_UNACKED + 10):
        desk.verdict(judged(seq), 60_000, 0)
    assert desk.unacked == MOST_UNACKED
    again: list[int] = []
    for now_ms in range(60, 260, 10):
        again += [header["seq"] for _, header in desk.tick(now_ms * MS) if header["type"] == "VERDICT"]
    assert sorted(set(again)) == list(range(10, MOST_UNACKED + 10))


def test_repetitions_come_in_small_lots_and_a_silent_bridge_takes_no_others_share() -> None:
    desk = make_desk("r1", BRIDGE, OTHER)
    for seq in range(600):
        desk.verdict(judged(seq), 60_000, 0)
        if seq < 590:
            acknowledge(desk, 1, OTHER, seq=seq)
    first = [bridge for bridge, header in desk.tick(60 * MS) if header["type"] == "VERDICT"]
    assert first.count(OTHER) == 10
    assert 0 < first.count(BRIDGE) <= 64
    second = [header["seq"] for bridge, header in desk.tick(70 * MS) if header["type"] == "VERDICT"]
    assert second[0] == first.count(BRIDGE)  # it goes on where it stopped


# --- the lease


def birth(run: str = "r1") -> Header:
    return {"type": "BIRTH", "run": run, "nonce": None, **BIRTH}


def beat(nonce: str | None, run: str = "r1", state: str = "RUNNING") -> Header:
    return {"type": "HEARTBEAT", "run": run, "state": state, "nonce": nonce}


def permit(nonce: str | None, run: str = "r1", valid_ms: int = 500, **names: Any) -> Header:
    return {"type": "VERDICT", "run": run, "validMs": valid_ms, "nonce": nonce, **judged(**names)}


def running_lease() -> Lease:
    """A lease of 300 ms whose nonces n0 and n1 were sent at 0 and 50 ms; fresh until 350 ms."""
    lease = Lease(lease_ms=300)
    lease.hello("n0", 0)
    lease.receive(birth(), 1 * MS)
    lease.ping("n1", 50 * MS)
    lease.receive(beat("n1"), 60 * MS)
    return lease


def passes(lease: Lease, now_ms: float, seq: int = 1, camera: str = "cam1", epoch: str = "e1") -> bool:
    return lease.may_pass(camera, epoch, seq, int(now_ms * MS))


def test_pass_is_believed_until_its_time_is_over() -> None:
    lease = running_lease()
    lease.receive(permit("n1", valid_ms=200), 70 * MS)
    assert passes(lease, 70)
    assert passes(lease, 249.999)
    assert not passes(lease, 250)
    assert not passes(lease, 10_000)


def test_verdict_is_acknowledged_each_time() -> None:
    lease = running_lease()
    wanted = {"type": "ACK", "run": "r1", "epoch": "e1", "seq": 1, "camera": "cam1"}
    assert lease.receive(permit("n1"), 70 * MS) == wanted
    assert lease.receive(permit("n1"), 80 * MS) == wanted


@pytest.mark.parametrize(("seq", "camera", "epoch"), [(2, "cam1", "e1"), (1, "cam2", "e1"), (1, "cam1", "e2")])
def test_pass_is_for_its_very_part(seq: int, camera: str, epoch: str) -> None:
    lease = running_lease()
    lease.receive(permit("n1"), 70 * MS)
    assert not passes(lease, 70, seq, camera, epoch)


def test_part_without_a_verdict_does_not_pass() -> None:
    assert not passes(running_lease(), 70)


@pytest.mark.parametrize("outcome", ["REJECT", "pass", "", "None"])
def test_anything_but_pass_does_not_pass(outcome: str) -> None:
    lease = running_lease()
    lease.receive(permit("n1", outcome=outcome), 70 * MS)
    assert not passes(lease, 70)


@pytest.mark.parametrize("nonce", [None, "never sent", 7])
def test_verdict_with_a_nonce_that_was_not_sent_is_not_believed(nonce: Any) -> None:
    lease = running_lease()
    assert lease.receive(permit(nonce), 70 * MS) is not None
    assert not passes(lease, 70)


def test_verdict_that_waited_in_a_buffer_is_not_believed() -> None:
    lease = running_lease()
    for number in range(2, 40):
        lease.ping(f"n{number}", number * 50 * MS)
    lease.receive(beat("n39"), 1_951 * MS)
    lease.receive(permit("n1", valid_ms=500), 1_952 * MS)
    assert lease.is_fresh(1_952 * MS)
    assert not passes(lease, 1_952)


def test_nonce_that_is_long_ago_is_forgotten_and_not_believed() -> None:
    lease = running_lease()
    for number in range(2, 100):
        lease.ping(f"n{number}", (50 + number) * MS)
    lease.receive(permit("n1"), 160 * MS)
    assert not passes(lease, 160)


def test_verdict_that_is_repeated_with_a_newer_nonce_does_not_prolong_its_permit() -> None:
    lease = running_lease()
    lease.receive(permit("n1", valid_ms=200), 70 * MS)
    lease.ping("n2", 200 * MS)
    lease.receive(beat("n2"), 210 * MS)
    lease.receive(permit("n2", valid_ms=200), 210 * MS)
    assert passes(lease, 249)
    assert not passes(lease, 250)


def test_reject_is_not_undone_by_a_later_pass() -> None:
    lease = running_lease()
    lease.receive(permit("n1", outcome="REJECT"), 70 * MS)
    lease.receive(permit("n1"), 71 * MS)
    assert not passes(lease, 72)
    held = lease.permit("cam1", "e1", 1)
    assert held is not None
    assert (held.outcome, held.reason, held.part_id) == ("REJECT", "DEFECT", "p1")


@pytest.mark.parametrize("state", ["PAUSED", "DRAINING", "STARTING", "UNKNOWN", "running", "None"])
def test_only_a_running_daemon_lets_pass(state: str) -> None:
    lease = running_lease()
    lease.receive(permit("n1"), 70 * MS)
    lease.receive(beat("n1", state=state), 80 * MS)
    assert not passes(lease, 81)


def test_state_of_an_older_heartbeat_does_not_replace_the_newer_one() -> None:
    """A daemon said RUNNING, then PAUSED; the first message comes last."""
    lease = running_lease()
    lease.receive(permit("n1"), 70 * MS)
    lease.ping("n2", 100 * MS)
    lease.receive(beat("n2", state="PAUSED"), 110 * MS)
    lease.receive(beat("n1"), 111 * MS)
    assert not passes(lease, 112)


@pytest.mark.parametrize("nonce", [None, "never sent"])
def test_state_of_a_heartbeat_with_an_unknown_nonce_lets_nothing_pass(nonce: str | None) -> None:
    lease = running_lease()
    lease.receive(permit("n1"), 70 * MS)
    lease.receive(beat("n1", state="PAUSED"), 80 * MS)
    lease.receive(beat(nonce), 81 * MS)
    assert not passes(lease, 82)


def test_lease_ends_by_itself_when_heartbeats_stay_away() -> None:
    lease = running_lease()
    lease.receive(permit("n1", valid_ms=5_000), 70 * MS)
    assert passes(lease, 349.999)
    assert not passes(lease, 350)
    assert lease.needs_hello(350 * MS)
    assert not lease.needs_hello(349 * MS)


def test_older_heartbeat_does_not_shorten_the_lease() -> None:
    lease = running_lease()
    lease.receive(beat("n0"), 70 * MS)
    assert lease.is_fresh(349 * MS)


def test_messages_of_another_run_are_neither_believed_nor_acknowledged() -> None:
    lease = running_lease()
    assert lease.receive(permit("n1", run="r0"), 70 * MS) is None
    lease.receive(beat("n1", run="r0", state="PAUSED"), 71 * MS)
    assert not passes(lease, 72)
    assert lease.state == "RUNNING"


def test_new_run_takes_every_permit_of_the_old_one_away() -> None:
    lease = running_lease()
    lease.receive(permit("n1"), 70 * MS)
    lease.receive(birth("r2"), 80 * MS)
    assert not passes(lease, 81)
    lease.receive(beat("n1", run="r2"), 82 * MS)
    assert not passes(lease, 83)


def test_hello_takes_every_permit_away() -> None:
    lease = running_lease()
    lease.receive(permit("n1"), 70 * MS)
    lease.hello("n2", 80 * MS)
    assert not passes(lease, 81)
    lease.receive(birth(), 90 * MS)
    lease.receive(beat("n2"), 91 * MS)
    assert lease.is_fresh(92 * MS)
    assert not passes(lease, 92)


def test_repeated_birth_of_the_same_run_keeps_the_permits() -> None:
    lease = running_lease()
    lease.receive(permit("n1"), 70 * MS)
    lease.receive(birth(), 80 * MS)
    assert passes(lease, 81)


@pytest.mark.parametrize("header", [{}, {"type": "BIRTH"}, {"type": "BIRTH", "run": 5}, {"type": "NEWS", "run": "r1"}])
def test_message_that_says_nothing_known_changes_nothing(header: Header) -> None:
    lease = running_lease()
    lease.receive(permit("n1"), 70 * MS)
    assert lease.receive(header, 71 * MS) is None
    assert passes(lease, 72)


@pytest.mark.parametrize(
    "changes",
    [
        {"camera": None}, {"epoch": 5}, {"seq": "x"}, {"seq": 1e999}, {"seq": 1.0}, {"seq": True}, {"seq": None},
        {"validMs": None}, {"validMs": [1]}, {"validMs": 1e999},
    ],
    ids=str,
)  # fmt: skip
def test_verdict_on_no_part_or_for_no_time_is_neither_believed_nor_acknowledged(changes: Header) -> None:
    """A bridge that ends on it would be a bridge that a single message stops."""
    lease = running_lease()
    assert lease.receive({**permit("n1"), **changes}, 70 * MS) is None
    assert not passes(lease, 71)
    assert lease.receive(permit("n1"), 72 * MS) is not None
    assert passes(lease, 73)


def test_before_the_birth_nothing_is_believed() -> None:
    lease = Lease()
    lease.hello("n0", 0)
    lease.receive(beat("n0"), 1)
    assert lease.receive(permit("n0"), 2) is None
    assert lease.needs_hello(3)
    assert not passes(lease, 0)


def test_permits_are_bounded() -> None:
    lease = running_lease()
    for seq in range(MOST_UNACKED + 10):
        lease.receive(permit("n1", seq=seq), 70 * MS)
    assert not passes(lease, 71, seq=9)
    assert passes(lease, 71, seq=10)
    assert passes(lease, 71, seq=MOST_UNACKED + 9)


def test_verdict_that_is_sent_again_does_not_outlive_the_one_that_was_lost() -> None:
    """The first sending was lost; the second carries a newer nonce, and must not begin validMs anew."""
    desk, lease = make_desk(), Lease(lease_ms=300)
    desk.receive(BRIDGE, lease.hello("n0", 0), 0)
    lease.receive(birth(), 0)
    desk.verdict(judged(), 200, 0)  # lost
    desk.receive(BRIDGE, lease.ping("n1", 150 * MS), 150 * MS)
    for _, header in desk.tick(150 * MS):
        lease.receive(header, 151 * MS)
    assert passes(lease, 151)
    assert not passes(lease, 200)


# --- both, and everything that can happen between them


@dataclass(frozen=True)
class Issue:
    """A verdict as the desk gave it, in true time."""

    outcome: str
    issued_ns: int
    valid_ns: int


class PermitChannel(RuleBasedStateMachine):
    """A desk and a lease with clocks of their own; messages are lost, doubled, late and in any order between them."""

    LEASE_NS = 300 * MS
    passed: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.now_ns = 0  # true time, which neither side knows
        self.runs = self.bridges = self.nonces = 0
        self.to_desk: list[Header] = []
        self.to_lease: list[Header] = []
        self.issues: dict[tuple[str, int], Issue] = {}
        self.restart_daemon()
        self.restart_bridge()
        for _ in range(2):  # HELLO and BIRTH, then a first heartbeat
            self.talk(100, "", newest_first=False)

    @property
    def desk_ns(self) -> int:
        return self.now_ns + 10**15

    @property
    def lease_ns(self) -> int:
        return self.now_ns + 777

    def post(self, outgoing: list[tuple[bytes, Header]]) -> None:
        self.to_lease += [header for bridge, header in outgoing if bridge == BRIDGE]

    @rule(which=st.sampled_from(["daemon", "bridge", "", "", "", ""]))
    def restart(self, which: str) -> None:
        if which == "daemon":
            self.restart_daemon()
        elif which == "bridge":
            self.restart_bridge()

    def restart_daemon(self) -> None:
        self.runs += 1
        self.run = f"r{self.runs}"
        self.desk = PermitDesk(self.run, BIRTH, heartbeat_ms=100)
        self.desk.state = "RUNNING"

    def restart_bridge(self) -> None:
        self.lease = Lease(lease_ms=300, most_nonces=8)
        self.sent: dict[str, int] = {}  # this bridge's nonces, in true time
        self.heard: list[Header] = []

    @rule(passed_ms=st.sampled_from([1, 10, 30, 50, 70, 100, 190]))
    def wait(self, passed_ms: int) -> None:
        self.now_ns += passed_ms * MS

    @rule(hello=st.booleans())
    def ping(self, hello: bool) -> None:
        self.nonces += 1
        nonce = f"n{self.nonces}"
        self.sent[nonce] = self.now_ns
        hello = self.lease.needs_hello(self.lease_ns) or hello
        if hello:
            self.heard.clear()  # nothing of before is believed any more
        say = self.lease.hello if hello else self.lease.ping
        self.to_desk.append(say(nonce, self.lease_ns))

    @rule()
    def tick(self) -> None:
        self.post(self.desk.tick(self.desk_ns))

    @rule(state=st.sampled_from(["RUNNING", "RUNNING", "PAUSED", "DRAINING"]))
    def change_state(self, state: str) -> None:
        self.desk.state = state

    @rule(
        seq=st.integers(0, 3),
        outcome=st.sampled_from(["PASS", "PASS", "REJECT"]),
        valid_ms=st.sampled_from([60, 200, 600]),
        lost=st.booleans(),
    )
    def judge(self, seq: int, outcome: str, valid_ms: int, lost: bool) -> None:
        if (self.run, seq) in self.issues:
            return
        self.issues[self.run, seq] = Issue(outcome, self.now_ns, valid_ms * MS)
        outgoing = self.desk.verdict(judged(seq, outcome), valid_ms, self.desk_ns)
        self.post([] if lost else outgoing)

    @rule(index=st.integers(0, 50), fate=st.sampled_from(["once", "once", "again", "lost"]), up=st.booleans())
    def carry(self, index: int, fate: str, up: bool) -> None:
        channel = self.to_desk if up else self.to_lease
        if not channel:
            return
        index %= len(channel)
        header = channel[index] if fate == "again" else channel.pop(index)
        if fate == "lost":
            return
        if up:
            self.post(self.desk.receive(BRIDGE, header, self.desk_ns))
        else:
            self._hear(header)

    @rule(
        passed_ms=st.sampled_from([0, 20, 50, 100]),
        held=st.sampled_from(["", "", "VERDICT", "HEARTBEAT"]),
        newest_first=st.booleans(),
    )
    def talk(self, passed_ms: int, held: str, newest_first: bool) -> None:
        """A round almost as it should be, so that there is something to believe; one kind of message is held up."""
        self.now_ns += passed_ms * MS
        self.ping(hello=False)
        while self.to_desk:
            self.post(self.desk.receive(BRIDGE, self.to_desk.pop(0), self.desk_ns))
        self.tick()
        arriving = [header for header in self.to_lease if header["type"] != held]
        self.to_lease = [header for header in self.to_lease if header["type"] == held]
        for header in reversed(arriving) if newest_first else arriving:
            self._hear(header)

    def _hear(self, header: Header) -> None:
        run = self.lease._run
        answer = self.lease.receive(header, self.lease_ns)
        if self.lease._run != run:
            self.heard.clear()
        self.heard.append(header)
        if answer is not None:
            self.to_desk.append(answer)

    def heard_of(self, kind: str, valid_ns: int, **facts: Any) -> bool:
        """Whether such a message came, from the run that is believed in, with a nonce not older than `valid_ns`."""
        facts = {"type": kind, "run": self.lease._run, **facts}
        return any(
            facts.items() <= {k: v for k, v in header.items() if k in facts}.items()
            and self.now_ns < self.sent.get(str(header["nonce"]), -valid_ns) + valid_ns
            for header in self.heard
        )

    def newest_states(self) -> set[str]:
        """What the heartbeats with the newest nonce say."""
        beats = [h for h in self.heard if h["type"] == "HEARTBEAT" and h["run"] == self.lease._run]
        newest_ns = max(self.sent.get(str(header["nonce"]), -1) for header in beats)
        return {header["state"] for header in beats if self.sent.get(str(header["nonce"]), -1) == newest_ns}

    @invariant()
    def what_passes_was_permitted(self) -> None:
        for seq in range(4):
            if not self.lease.may_pass("cam1", "e1", seq, self.lease_ns):
                continue
            type(self).passed += 1
            issue = self.issues[str(self.lease._run), seq]
            assert issue.outcome == "PASS"
            assert self.now_ns < issue.issued_ns + issue.valid_ns
            assert self.heard_of("VERDICT", issue.valid_ns, seq=seq, outcome="PASS")
            assert self.heard_of("HEARTBEAT", self.LEASE_NS, state="RUNNING")
            assert "RUNNING" in self.newest_states()

    @invariant()
    def nothing_else_passes(self) -> None:
        assert not self.lease.may_pass("cam1", "e1", 99, self.lease_ns)
        assert not self.lease.may_pass("cam2", "e1", 0, self.lease_ns)


def test_whatever_the_channel_does_only_what_was_permitted_passes() -> None:
    PermitChannel.passed = 0
    run_state_machine_as_test(PermitChannel, settings=settings(max_examples=250, stateful_step_count=50, deadline=None))
    assert PermitChannel.passed > 0


def test_the_desk_tells_how_its_bridges_do() -> None:
    desk = PermitDesk("run", {}, 100)
    assert desk.summary(0) == {"bridges": 0, "silentMs": None, "unacked": 0}
    desk.receive(b"a", {"type": "HELLO", "nonce": "1"}, 0)
    desk.receive(b"b", {"type": "HELLO", "nonce": "1"}, 400_000_000)
    desk.verdict({"camera": "cam1", "epoch": "e", "seq": 1}, 500, 400_000_000)
    assert desk.summary(500_000_000) == {"bridges": 2, "silentMs": 500, "unacked": 2}
