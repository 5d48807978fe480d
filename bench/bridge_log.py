"""What a bridge heard and believed, written down, and a check over that which shares no code with the lease.

`LoggedLease` is the bridge's lease that notes every message and, at each asking, which parts it lets pass. The check
reads the notes alone and what the daemon's journal says was issued: `untrue_passes` tells each PASS that was believed
without a permit for that very part, from another run than the one that speaks, after its expiry or without a fresh
heartbeat. It believes nothing that the lease says of itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from daemon.line.permit import Lease, PermitKey
from daemon.types import Header


@dataclass(frozen=True)
class Note:
    """One thing that happened at the bridge, at a moment of its own clock."""

    at_ns: int
    what: str  # PING and HELLO, which left; BIRTH, HEARTBEAT and VERDICT, which came; BELIEVES, an asking
    header: Header = field(default_factory=dict)
    parts: tuple[PermitKey, ...] = ()


@dataclass(frozen=True)
class Issued:
    """What the journal says of a part: which run of the daemon spoke for it, and how."""

    run: str
    outcome: str
    reason: str | None


class LoggedLease(Lease):
    """A lease that writes down what it hears and what it believes."""

    def __init__(self, lease_ms: int = 300) -> None:
        super().__init__(lease_ms)
        self.notes: list[Note] = []

    def ping(self, nonce: str, now_ns: int) -> Header:
        self.notes.append(Note(now_ns, "PING", {"nonce": nonce}))
        return super().ping(nonce, now_ns)

    def hello(self, nonce: str, now_ns: int) -> Header:
        self.notes.append(Note(now_ns, "HELLO", {"nonce": nonce}))
        return super().hello(nonce, now_ns)

    def receive(self, header: Header, now_ns: int) -> Header | None:
        self.notes.append(Note(now_ns, str(header.get("type")), header))
        return super().receive(header, now_ns)

    def may_pass(self, camera: str, epoch: str, seq: int, now_ns: int) -> bool:
        return bool(self.survey([(camera, epoch, seq)], now_ns))

    def survey(self, keys: Iterable[PermitKey], now_ns: int) -> tuple[PermitKey, ...]:
        """Which of these parts may pass now."""
        believed = tuple(key for key in keys if super(LoggedLease, self).may_pass(*key, now_ns))
        if believed:
            self.notes.append(Note(now_ns, "BELIEVES", parts=believed))
        return believed


def untrue_passes(notes: Iterable[Note], issued: dict[PermitKey, Issued], lease_ms: int = 300) -> list[str]:
    """Every part that was let pass without grounds, once each; [] when none was."""
    grounds = _Grounds(lease_ms * 1_000_000)
    found: dict[PermitKey, str] = {}
    for note in notes:
        if note.what != "BELIEVES":
            grounds.take(note)
            continue
        for key in note.parts:
            fault = grounds.fault(key, note.at_ns, issued.get(key))
            if fault is not None:
                found.setdefault(key, f"{key[0]} {key[1]} {key[2]}: let pass, but {fault}")
    return list(found.values())


class _Grounds:
    """What may be believed, from the messages: the rules of docs/wire.md, written a second time."""

    def __init__(self, lease_ns: int) -> None:
        self._lease_ns = lease_ns
        self._sent_ns: dict[str, int] = {}
        self._run: str | None = None
        self._beat_ns: int | None = None  # when the nonce of the newest heartbeat left
        self._state = "UNKNOWN"
        self._permits: dict[PermitKey, tuple[str, int]] = {}  # outcome, expiry

    def take(self, note: Note) -> None:
        header = note.header
        if note.what in ("PING", "HELLO"):
            self._sent_ns[header["nonce"]] = note.at_ns
        if note.what == "HELLO" or (note.what == "BIRTH" and header["run"] != self._run):
            self._run, self._beat_ns = header.get("run"), None
            self._permits.clear()
        sent_ns = self._sent_ns.get(header.get("nonce") or "")
        if sent_ns is None or header.get("run") != self._run:
            return
        if note.what == "HEARTBEAT" and (self._beat_ns is None or sent_ns >= self._beat_ns):
            is_newer = self._beat_ns is None or sent_ns > self._beat_ns
            self._beat_ns = sent_ns
            self._state = header["state"] if is_newer or header["state"] != "RUNNING" else self._state
        elif note.what == "VERDICT":
            key = (header["camera"], header["epoch"], header["seq"])
            self._permits.setdefault(key, (header["outcome"], sent_ns + header["validMs"] * 1_000_000))

    def fault(self, key: PermitKey, at_ns: int, issued: Issued | None) -> str | None:
        outcome, expires_ns = self._permits.get(key, (None, 0))
        if issued is None or issued.outcome != "PASS":
            return f"the journal says {' '.join(filter(None, vars(issued).values())) if issued else 'nothing'}"
        if issued.run != self._run:
            return f"run {issued.run} issued it, and run {self._run} speaks"
        if outcome != "PASS":
            return f"the permit is {outcome}"
        if at_ns >= expires_ns:
            return f"its permit had expired {_ms(at_ns - expires_ns)} ms before"
        if self._beat_ns is None or at_ns >= self._beat_ns + self._lease_ns:
            silent = "no heartbeat" if self._beat_ns is None else f"{_ms(at_ns - self._beat_ns)} ms without heartbeat"
            return f"the lease was over: {silent}"
        return None if self._state == "RUNNING" else f"the daemon was {self._state}"


def issued_by(records: Iterable[dict[str, Any]]) -> dict[PermitKey, Issued]:
    """The verdicts of a journal by part, each with the run that spoke; the first where there are two."""
    run, found = "", {}
    for record in records:
        if record["t"] == "run":
            run = record["run"]
        elif record["t"] == "verdict":
            spoken = Issued(run, record["outcome"], record["reason"])
            for seq in range(record["seq"], record.get("seqTo", record["seq"]) + 1):
                found.setdefault((record["camera"], record["epoch"], seq), spoken)
    return found


def _ms(nanoseconds: int) -> str:
    return f"{nanoseconds / 1e6:.1f}"
