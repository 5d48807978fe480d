"""Results handed to a PLC one part at a time, each until it is acknowledged. No socket, no clock, no fieldbus.

What the PLC reads, whatever carries it (adapters/plc_modbus.py, adapters/plc_opcua.py):

- a result has a number; it stays, with its part's tag, until the PLC acknowledges that number, then the next comes.
  So no PLC takes a neighbour's result for a part's own, however slowly it reads.
- PASS is shown only while the lease and the part's permit say so, judged again each time it is shown; what was once
  shown as REJECT never becomes PASS.
- `alive` counts up with each showing. A PLC that does not see it change for the lease's time has no bridge: REJECT.
- Numbers are of one session of the bridge; an acknowledgement names both, so that one of before counts for nothing.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict, deque
from collections.abc import Collection
from dataclasses import dataclass
from enum import IntEnum

from daemon.line.permit import Lease, PermitKey
from daemon.types import Header, Reason

MOST_WAITING = 256  # results; the oldest goes, and its part has no PASS
TAG_BYTES = 32
_MOST_REMEMBERED = 4096  # parts whose verdict was taken, so that a repetition is none
_U16, _U32 = 0xFFFF, 0xFFFF_FFFF


class Shown(IntEnum):
    """The word for the PLC. Anything but PASS is a reject."""

    NOTHING = 0
    PASS = 1
    REJECT = 2


# What the PLC's register says; the daemon's reasons keep their numbers for good, the bridge's own begin at 100.
REASON_CODES = {
    None: 0, **{reason.value: 1 + place for place, reason in enumerate((
        Reason.DEFECT, Reason.BAD_FRAME, Reason.NOT_READY, Reason.OVERLOAD, Reason.SUPERSEDED, Reason.MISSING,
        Reason.ENGINE_ERROR, Reason.LATE, Reason.SETUP,
    ))},
    "NO_LEASE": 100, "EXPIRED": 101, "BAD_TAG": 102,
}  # fmt: skip
OTHER_REASON = 99  # of a newer daemon


@dataclass(frozen=True)
class Output:
    """What the PLC reads at one moment."""

    session: int  # 1..65535, drawn at the bridge's start
    alive: int  # 0..65535, one more with each showing
    is_ready: bool  # a fresh lease of a RUNNING daemon
    number: int  # of the result, 1..65535; 0: none is waiting
    shown: Shown
    reason: str | None
    camera: str
    epoch: str
    seq: int
    parts: int  # 1; more for a range of missing parts, seq being the first
    part_id: str
    waiting: int  # results behind this one
    overrun: int  # results that were lost because the PLC did not acknowledge, 0..65535

    @property
    def reason_code(self) -> int:
        return REASON_CODES.get(self.reason, OTHER_REASON)

    @property
    def part_number(self) -> int:
        """The tag as a number, for PLCs that count: 1..2^32 - 1 where it is one, else 0."""
        is_number = self.part_id.isascii() and self.part_id.isdigit() and int(self.part_id) <= _U32
        return int(self.part_id) if is_number else 0


@dataclass
class _Result:
    key: PermitKey
    outcome: str
    reason: str | None
    part_id: str
    parts: int


class Handover:
    """Fed by the bridge (`take`) and by the PLC (`acknowledge`); `show` is what the PLC is to read now."""

    def __init__(self, cameras: Collection[str] = ()) -> None:
        """Only parts of these cameras; () takes all."""
        self.session = 1 + secrets.randbelow(_U16)
        self._cameras = frozenset(cameras)
        self._waiting: deque[_Result] = deque()
        self._known: OrderedDict[PermitKey, None] = OrderedDict()
        self._current: _Result | None = None
        self._number = self._alive = self._overrun = 0

    def take(self, header: Header) -> bool:
        """A VERDICT that the lease took in; False for a repetition and for a camera that is not this bridge's."""
        key = (header["camera"], header["epoch"], header["seq"])
        if key in self._known or (self._cameras and key[0] not in self._cameras):
            return False
        self._known[key] = None
        if len(self._known) > _MOST_REMEMBERED:
            self._known.popitem(last=False)
        parts = int(header.get("seqTo", key[2])) - key[2] + 1
        self._waiting.append(_Result(key, header["outcome"], header["reason"], header["partId"] or "", parts))
        if len(self._waiting) > MOST_WAITING:
            self._waiting.popleft()
            self._overrun = min(self._overrun + 1, _U16)
        return True

    def acknowledge(self, session: int, number: int) -> bool:
        """The PLC has taken this result; False where that is not the one that is shown."""
        if self._current is None or (session, number) != (self.session, self._number):
            return False
        self._current = None
        return True

    @property
    def overrun(self) -> int:
        return self._overrun

    def show(self, lease: Lease, now_ns: int, margin_ns: int = 0) -> Output:
        """What the PLC is to read from now on for `margin_ns`, which is how long it stays what it is."""
        if self._current is None and self._waiting:
            self._current = self._waiting.popleft()
            self._number = self._number % _U16 + 1
        self._alive = (self._alive + 1) & _U16
        is_ready = lease.is_fresh(now_ns) and lease.is_fresh(now_ns + margin_ns)
        result = self._current
        if result is None:
            blank = _Result(("", "", 0), "", None, "", 0)
            return self._output(blank, 0, Shown.NOTHING, is_ready=is_ready)
        if result.outcome == "PASS":
            doubt = _doubt(result, lease, now_ns + margin_ns, is_ready=is_ready)
            if doubt is not None:
                result.outcome, result.reason = "REJECT", doubt  # for good: the PLC may have read it
        shown = Shown.PASS if result.outcome == "PASS" else Shown.REJECT
        return self._output(result, self._number, shown, is_ready=is_ready)

    def _output(self, result: _Result, number: int, shown: Shown, *, is_ready: bool) -> Output:
        camera, epoch, seq = result.key
        return Output(
            session=self.session, alive=self._alive, is_ready=is_ready, number=number, shown=shown,
            reason=result.reason, camera=camera, epoch=epoch, seq=seq, parts=result.parts, part_id=result.part_id,
            waiting=len(self._waiting), overrun=self._overrun,
        )  # fmt: skip


def _doubt(result: _Result, lease: Lease, at_ns: int, *, is_ready: bool) -> str | None:
    """Why a PASS must not be shown, None when it may."""
    if not is_ready:
        return "NO_LEASE"
    if not lease.may_pass(*result.key, at_ns):
        return "EXPIRED"
    # A tag that is cut would be another part's.
    fits = result.part_id.isascii() and result.part_id.isprintable() and len(result.part_id) <= TAG_BYTES
    return None if fits else "BAD_TAG"
