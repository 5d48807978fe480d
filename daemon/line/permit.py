"""The permit channel: a PASS is a permit that expires, and silence is a REJECT. Both halves, no socket.

`PermitDesk` is the daemon's half, `Lease` the bridge's. Every VERDICT and HEARTBEAT echoes the newest
nonce that its bridge sent; the bridge judges age on its own clock from the moment it sent that nonce,
so a message that waited in a buffer cannot be believed late, and no two clocks are ever compared.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import nsmallest

from daemon.types import Header

RESEND_MS = 50  # the first time, then 100, 200, and 400 for good
_MOST_DOUBLINGS = 3
_MOST_RESENT = 64  # at once, of all bridges: deadlines wait while they are sent
MOST_UNACKED = 1024  # a bridge that acknowledges nothing loses the oldest: they would expire anyway
_FORGET_BRIDGE_MS = 10_000
_MOST_NONCE_CHARACTERS = 128

PermitKey = tuple[str, str, int]  # camera, epoch, seq


@dataclass
class _Waiting:
    header: Header
    expires_ns: int
    sent_ns: int
    times: int = 1

    @property
    def next_ns(self) -> int:
        """Ever more rarely: where acknowledgements stay away under load, repetitions must not add to it."""
        return self.sent_ns + (RESEND_MS << min(self.times - 1, _MOST_DOUBLINGS)) * 1_000_000


@dataclass
class _Bridge:
    heard_ns: int
    nonce: str | None = None
    unacked: OrderedDict[PermitKey, _Waiting] = field(default_factory=OrderedDict)


Outgoing = tuple[bytes, Header]


class PermitDesk:
    """The daemon's half. Methods take the time (monotonic ns) and return what to send to whom."""

    def __init__(self, run: str, birth: Header, heartbeat_ms: int) -> None:
        self._run = run
        self._birth = birth
        self._heartbeat_ns = heartbeat_ms * 1_000_000
        self._bridges: dict[bytes, _Bridge] = {}
        self._next_beat_ns = 0
        self._next_resend_ns = 0
        self.state = "STARTING"
        self.degraded: str | None = None  # what is wrong while parts are judged all the same

    @property
    def condition(self) -> Header:
        """What heartbeats, health messages and the status say of the daemon."""
        return {"state": self.state, "degraded": self.degraded}

    def receive(self, bridge: bytes, header: Header, now_ns: int) -> list[Outgoing]:
        """HELLO opens a bridge (what it has not acknowledged stays due); PING and ACK of a stranger are ignored."""
        kind = header.get("type")
        nonce = header.get("nonce")
        if kind == "HELLO":
            self._bridges.setdefault(bridge, _Bridge(now_ns)).heard_ns = now_ns
            self._note_nonce(bridge, nonce)
            return [self._tell_birth(bridge)]
        known = self._bridges.get(bridge)
        if known is None:
            return []
        known.heard_ns = now_ns
        if kind == "PING":
            self._note_nonce(bridge, nonce)
        elif kind == "ACK" and header.get("run") == self._run:
            self._acknowledge(known, header)
        return []

    def born_again(self, birth: Header) -> list[Outgoing]:
        """The same run with other engines: every bridge hears it. Permits that were given stay."""
        self._birth = birth
        return [self._tell_birth(identity) for identity in self._bridges]

    def verdict(self, header: Header, valid_ms: int, now_ns: int) -> list[Outgoing]:
        """Announce a verdict to every bridge, and remember it until it is acknowledged or has expired."""
        message = {"type": "VERDICT", "run": self._run, "validMs": valid_ms, **header}
        key = (header["camera"], header["epoch"], header["seq"])
        for bridge in self._bridges.values():
            bridge.unacked[key] = _Waiting(message, now_ns + valid_ms * 1_000_000, now_ns)
            if len(bridge.unacked) > MOST_UNACKED:
                bridge.unacked.popitem(last=False)
        return [(identity, {**message, **self._echo(identity)}) for identity in self._bridges]

    def tick(self, now_ns: int) -> list[Outgoing]:
        """Heartbeats that are due and verdicts to send again; forgets what expired and who fell silent."""
        for identity, bridge in list(self._bridges.items()):
            if now_ns - bridge.heard_ns > _FORGET_BRIDGE_MS * 1_000_000:
                del self._bridges[identity]
        outgoing: list[Outgoing] = []
        if now_ns >= self._next_resend_ns:
            self._next_resend_ns = now_ns + RESEND_MS * 1_000_000 // 5
            share = max(1, _MOST_RESENT // max(1, len(self._bridges)))
            outgoing = [item for identity in self._bridges for item in self._resend(identity, share, now_ns)]
        if now_ns >= self._next_beat_ns:
            self._next_beat_ns = now_ns + self._heartbeat_ns
            beat = {"type": "HEARTBEAT", "run": self._run, **self.condition}
            outgoing += [(identity, {**beat, **self._echo(identity)}) for identity in self._bridges]
        return outgoing

    def forget(self, bridge: bytes) -> None:
        """Cut off a bridge that cannot be sent to; it must say HELLO again."""
        self._bridges.pop(bridge, None)

    def next_tick_ns(self) -> int:
        return self._next_beat_ns

    @property
    def unacked(self) -> int:
        return sum(len(bridge.unacked) for bridge in self._bridges.values())

    @property
    def bridges(self) -> int:
        return len(self._bridges)

    def quietest_s(self, now_ns: int) -> float:
        return max(((now_ns - bridge.heard_ns) / 1e9 for bridge in self._bridges.values()), default=0.0)

    def summary(self, now_ns: int) -> Header:
        """For the status: how many bridges, how long the quietest has been silent, what none has acknowledged."""
        silent_ms = round(1000 * self.quietest_s(now_ns)) if self._bridges else None
        return {"bridges": self.bridges, "silentMs": silent_ms, "unacked": self.unacked}

    def _tell_birth(self, bridge: bytes) -> Outgoing:
        return bridge, {"type": "BIRTH", "run": self._run, **self._birth, **self._echo(bridge)}

    def _resend(self, identity: bytes, most: int, now_ns: int) -> Iterator[Outgoing]:
        """At most so many again, those first that were sent longest ago; what expired is forgotten."""
        bridge = self._bridges[identity]
        for key in [key for key, waiting in bridge.unacked.items() if waiting.expires_ns <= now_ns]:
            del bridge.unacked[key]
        due = [waiting for waiting in bridge.unacked.values() if waiting.next_ns <= now_ns]
        for waiting in nsmallest(most, due, key=lambda waiting: waiting.sent_ns):
            waiting.sent_ns = now_ns
            waiting.times += 1
            # The new nonce is younger than the verdict: what is left of its validity is counted from there.
            left_ms = (waiting.expires_ns - now_ns) // 1_000_000
            yield identity, {**waiting.header, "validMs": left_ms, **self._echo(identity)}

    def _acknowledge(self, bridge: _Bridge, header: Header) -> None:
        """One part's; every camera's part of this number where the bridge names no camera."""
        epoch, seq, camera = header.get("epoch"), header.get("seq"), header.get("camera")
        if isinstance(camera, str) and isinstance(epoch, str) and type(seq) is int:
            bridge.unacked.pop((camera, epoch, seq), None)
        elif camera is None:
            for key in [key for key in bridge.unacked if key[1:] == (epoch, seq)]:
                del bridge.unacked[key]

    def _note_nonce(self, bridge: bytes, nonce: object) -> None:
        if isinstance(nonce, str) and len(nonce) <= _MOST_NONCE_CHARACTERS:
            self._bridges[bridge].nonce = nonce

    def _echo(self, bridge: bytes) -> Header:
        return {"nonce": self._bridges[bridge].nonce}


@dataclass(frozen=True)
class Permit:
    """What a bridge believes about a part until `expires_ns` on its own clock."""

    outcome: str
    reason: str | None
    part_id: str | None
    expires_ns: int


class Lease:
    """The bridge's half: what may be believed at a given moment of the bridge's own monotonic clock."""

    def __init__(self, lease_ms: int = 300, most_nonces: int = 64) -> None:
        self._lease_ns = lease_ms * 1_000_000
        self._most_nonces = most_nonces
        self._sent_ns: OrderedDict[str, int] = OrderedDict()
        self._run: str | None = None
        self._fresh_until_ns = 0
        self._permits: OrderedDict[PermitKey, Permit] = OrderedDict()
        self.state = "UNKNOWN"
        self.degraded: str | None = None  # for the operator; permits are worth what they say

    def ping(self, nonce: str, now_ns: int) -> Header:
        """A PING with a nonce never used before; remember to send it now."""
        self._note(nonce, now_ns)
        return {"type": "PING", "nonce": nonce}

    def hello(self, nonce: str, now_ns: int) -> Header:
        """Open the channel (again): nothing of before is believed any more."""
        self._run, self._fresh_until_ns = None, 0
        self._permits.clear()
        self._note(nonce, now_ns)
        return {"type": "HELLO", "nonce": nonce}

    def receive(self, header: Header, now_ns: int) -> Header | None:
        """Take a message in; returns the ACK to send, if any. Messages of another run are not believed."""
        kind, run = header.get("type"), header.get("run")
        if kind == "BIRTH" and isinstance(run, str):
            if run != self._run:
                self._permits.clear()
                self._fresh_until_ns = 0
            self._run = run
            return None
        sent_ns = self._sent_ns.get(str(header.get("nonce")))
        if run != self._run or self._run is None:
            return None
        if kind == "HEARTBEAT":
            self._take_heartbeat(header, sent_ns)
            return None
        return self._take_verdict(header, sent_ns, now_ns) if kind == "VERDICT" else None

    def _take_heartbeat(self, header: Header, sent_ns: int | None) -> None:
        """Only the newest nonce speaks: a RUNNING that was held up must not undo a PAUSED that overtook it."""
        if sent_ns is None or sent_ns + self._lease_ns < self._fresh_until_ns:
            return
        state, degraded = str(header.get("state")), header.get("degraded")
        self.degraded = None if degraded is None else str(degraded)
        is_newer = sent_ns + self._lease_ns > self._fresh_until_ns
        if is_newer or state != "RUNNING":
            self.state = state
        self._fresh_until_ns = sent_ns + self._lease_ns

    def needs_hello(self, now_ns: int) -> bool:
        return self._run is None or now_ns >= self._fresh_until_ns

    def is_fresh(self, now_ns: int) -> bool:
        return now_ns < self._fresh_until_ns and self.state == "RUNNING"

    def may_pass(self, camera: str, epoch: str, seq: int, now_ns: int) -> bool:
        """Whether this very part may pass at this very moment. Anything else is a REJECT."""
        permit = self._permits.get((camera, epoch, seq))
        return permit is not None and permit.outcome == "PASS" and now_ns < permit.expires_ns and self.is_fresh(now_ns)

    def permit(self, camera: str, epoch: str, seq: int) -> Permit | None:
        return self._permits.get((camera, epoch, seq))

    def _take_verdict(self, header: Header, sent_ns: int | None, now_ns: int) -> Header | None:
        camera, epoch, seq, valid_ms = (header.get(name) for name in ("camera", "epoch", "seq", "validMs"))
        if not (isinstance(camera, str) and isinstance(epoch, str) and type(seq) is int and type(valid_ms) is int):
            return None  # of no part, or for no time: nothing to believe and nothing to acknowledge
        key = (camera, epoch, seq)
        age_known_ns = sent_ns if sent_ns is not None else now_ns - 2**62  # an unknown nonce: long expired
        # A part's first verdict stands; a repetition with a newer nonce must not prolong its permit.
        if key not in self._permits:
            expires_ns = age_known_ns + valid_ms * 1_000_000
            outcome = str(header.get("outcome"))
            self._permits[key] = Permit(outcome, header.get("reason"), header.get("partId"), expires_ns)
            if len(self._permits) > MOST_UNACKED:
                self._permits.popitem(last=False)
        return {"type": "ACK", "run": self._run, "epoch": key[1], "seq": key[2], "camera": key[0]}

    def _note(self, nonce: str, now_ns: int) -> None:
        self._sent_ns[nonce] = now_ns
        if len(self._sent_ns) > self._most_nonces:
            self._sent_ns.popitem(last=False)
