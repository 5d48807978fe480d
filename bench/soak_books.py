"""The soak's own books: what each camera sent and heard, held against the ledger row by row when all is over.

What the cameras, subscribers and bridges saw is written down apart from what the daemon kept; `compare` says where
the two differ. It believes neither: a number with two verdicts, or with none, is told whoever is to blame.
"""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.line import Line, SentPart
from bench.soak_faults import Windows
from daemon.types import Header

_GRACE_NS = 10_000_000_000  # what has not come by then is not waited for
_CUTS_CAMERA, _CUTS_BRIDGE = ("reconnect", "restart"), ("bridgeAway", "restart")
_ANSWER_NS = 1_000_000_000  # an answer that was under way for so long may be lost with its connection
MISSING = "REJECT MISSING"

Row = tuple[str, str, int, int, int, str | None, str | None]  # camera, epoch, seq, seq_to, accepted, outcome, reason


@dataclass(slots=True)
class Fate:
    """What became of one number. Times are of this process's monotonic clock; left out on purpose: not sent."""

    sent_ns: int | None = None
    answer: str | None = None  # accepted, or refused with its reason
    told: str | None = None  # the verdict on the results socket
    decided_ns: int | None = None
    permit: str | None = None  # the verdict that the bridge was shown
    believed: bool = False


@dataclass
class Tally:
    """One camera's book: fates by epoch and number."""

    camera: str
    deadline_ms: int
    fates: dict[str, dict[int, Fate]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    overruns_ms: list[float] = field(default_factory=list)  # of verdicts that left after their deadline

    def note_sent(self, epoch: str, part: SentPart) -> None:
        self._fate(epoch, part.seq).sent_ns = part.sent_ns

    def note_left_out(self, epoch: str, numbers: Iterable[int]) -> None:
        for seq in numbers:
            self._fate(epoch, seq)

    def collect(self, line: Line) -> None:
        """Take over what the line has heard since; parts that are settled are taken out of it."""
        now_ns = time.monotonic_ns()
        for header in line.foreign:
            self._hear(header, now_ns)
        line.foreign.clear()
        line.late.clear()
        for seq, part in list(line.parts.items()):
            fate = self._fate(line.epoch, seq)
            self._take(line.epoch, part, fate)
            if (fate.answer and fate.told and fate.permit) or now_ns - part.sent_ns > _GRACE_NS:
                del line.parts[seq]

    def _take(self, epoch: str, part: SentPart, fate: Fate) -> None:
        if part.answer is not None:
            fate.answer = " ".join(filter(None, (part.answer["status"], part.answer["reason"])))
        for header in part.results:
            self._hear(header, part.decided_ns or time.monotonic_ns())
        part.results.clear()
        for header in part.permits:
            shown = _verdict(header)
            if fate.permit not in (None, shown):
                self.problems.append(f"{self.camera} {epoch} {part.seq}: permits for {fate.permit} and {shown}")
            fate.permit = shown
        part.permits.clear()
        fate.believed |= part.believed

    def _hear(self, header: Header, now_ns: int) -> None:
        verdict = _verdict(header)
        first = int(header["seq"])
        for seq in range(first, int(header.get("seqTo", first)) + 1):
            fate = self._fate(header["epoch"], seq)
            if fate.told is not None:
                self.problems.append(
                    f"{self.camera} {header['epoch']} {seq}: told twice, as {fate.told} and as {verdict}"
                )
            fate.told, fate.decided_ns = verdict, now_ns
        overrun_ms = (header["timings"]["totalMs"] or 0.0) - self.deadline_ms
        if overrun_ms > 0:
            self.overruns_ms.append(overrun_ms)

    def _fate(self, epoch: str, seq: int) -> Fate:
        return self.fates.setdefault(epoch, {}).setdefault(seq, Fate())

    def all(self) -> Iterator[tuple[str, int, Fate]]:
        for epoch, fates in self.fates.items():
            for seq, fate in fates.items():
                yield epoch, seq, fate


def _verdict(header: Header) -> str:
    return " ".join(filter(None, (header["outcome"], header["reason"])))


def ledger_rows(folder: Path) -> list[Row]:
    """Every row of a ledger that nobody writes any more."""
    db = sqlite3.connect(f"file:{folder / 'ledger.sqlite'}?mode=ro", uri=True)
    try:
        return db.execute("SELECT camera, epoch, seq, seq_to, accepted, outcome, reason FROM parts").fetchall()
    finally:
        db.close()


def compare(tallies: list[Tally], rows: list[Row], windows: Windows) -> tuple[dict[str, Any], list[str]]:
    """Counts by camera, and every difference between the cameras' books and the ledger's; [] when there is none."""
    counts, problems = {}, []
    strangers = {row[0] for row in rows} - {tally.camera for tally in tallies}
    problems += [f"the ledger knows a camera {name}, which sent nothing" for name in sorted(strangers)]
    for tally in tallies:
        mine = [row for row in rows if row[0] == tally.camera]
        counts[tally.camera] = _count(tally, mine)
        problems += [*tally.problems, *_differences(tally, mine), *_gaps_on_the_wire(tally, windows)]
        found = counts[tally.camera]
        if found["accepted"] + found["missing"] != found["verdicts"]:
            problems.append(f"{tally.camera}: accepted + missing is not verdicts: {found}")
        if found["verdicts"] != found["verdictsOnTheWire"]:
            problems.append(f"{tally.camera}: verdicts in the ledger and on the wire differ: {found}")
    return counts, problems


def _count(tally: Tally, rows: list[Row]) -> dict[str, int]:
    """The ledger's accepted, missing and verdicts; the rest as the camera, the subscriber and the bridge saw it."""
    answers = Counter(fate.answer for _, _, fate in tally.all() if fate.sent_ns is not None)
    sent = sum(answers.values())
    return {
        "sent": sent,
        "leftOut": sum(fate.sent_ns is None for _, _, fate in tally.all()),
        "answeredAccepted": answers["accepted"],
        "unanswered": answers[None],
        "refused": sent - answers["accepted"] - answers[None],
        "accepted": sum(row[4] for row in rows),
        "missing": sum((row[3] - row[2] + 1) for row in rows if not row[4] and row[6] == "MISSING"),
        "verdicts": sum((row[3] - row[2] + 1) for row in rows if row[5] is not None),
        "verdictsOnTheWire": sum(fate.told is not None for _, _, fate in tally.all()),
        "permitsShown": sum(fate.permit is not None for _, _, fate in tally.all()),
        "passes": sum(fate.told == "PASS" for _, _, fate in tally.all()),
        "passesBelieved": sum(fate.believed for _, _, fate in tally.all()),
    }


def _differences(tally: Tally, rows: list[Row]) -> Iterator[str]:
    """The ledger's rows against what was sent, answered and told."""
    kept: set[tuple[str, int]] = set()
    for camera, epoch, first, last, accepted, outcome, reason in rows:
        verdict = " ".join(filter(None, (outcome, reason))) or None
        for seq in range(first, last + 1):
            kept.add((epoch, seq))
            fate = tally.fates.get(epoch, {}).get(seq, Fate())
            if fate.told != verdict:
                yield f"{camera} {epoch} {seq}: the ledger has {verdict}, the wire said {fate.told}"
            if accepted and fate.sent_ns is None:
                yield f"{camera} {epoch} {seq}: in the ledger as accepted, but never sent"
            if accepted and fate.answer not in ("accepted", None):
                yield f"{camera} {epoch} {seq}: in the ledger as accepted, but answered {fate.answer}"
            if not accepted and fate.answer == "accepted":
                yield f"{camera} {epoch} {seq}: answered accepted, but not in the ledger as that"
    for epoch, seq, fate in tally.all():
        if (epoch, seq) not in kept and (fate.answer == "accepted" or fate.told is not None):
            yield f"{tally.camera} {epoch} {seq}: answered {fate.answer}, told {fate.told}, and not in the ledger"


def _gaps_on_the_wire(tally: Tally, windows: Windows) -> Iterator[str]:
    """Answers, verdicts and permits that did not come though nothing stood in their way, and passes that were not."""
    camera_was_cut = windows.covering(tally.camera, _CUTS_CAMERA)
    bridge_was_cut = windows.covering(tally.camera, _CUTS_BRIDGE)
    for epoch, seq, fate in tally.all():
        name = f"{tally.camera} {epoch} {seq}"
        if fate.believed and fate.told != "PASS":
            yield f"{name}: the bridge let pass what was {fate.told}"
        if fate.permit is not None and fate.permit != fate.told:
            yield f"{name}: the permit channel says {fate.permit}, the result {fate.told}"
        if fate.sent_ns is None:
            continue
        if fate.answer != "accepted" and not camera_was_cut(fate.sent_ns, fate.sent_ns + _ANSWER_NS):
            yield f"{name}: answered {fate.answer} on an uncut connection"
        if fate.answer == "accepted" and fate.told is None:
            yield f"{name}: accepted, and no verdict was told"
        until_ns = fate.decided_ns or fate.sent_ns
        if fate.told not in (None, MISSING) and fate.permit is None and not bridge_was_cut(fate.sent_ns, until_ns):
            yield f"{name}: {fate.told}, and the bridge, which was there, was not shown it"
