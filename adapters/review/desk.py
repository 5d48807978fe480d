"""What there is to review: rejected parts whose frames are kept, how severe each looks, what people said of them.

Read only, from the ledger and the recorder's folder. Marks are written by the daemon alone (marks.py asks it to).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapters.dashboard.books import MOST_ROWS, Books, GoneError, Wanted, read_plain
from daemon.inspection.decode import decode_file, to_plain
from daemon.types import Frame, PartKey

_MOST_FRAME_BYTES = 256 << 20
_BARE_PAGES = 20
_ROWS = ("top", "", "bottom")
_COLUMNS = ("left", "", "right")


@dataclass(frozen=True)
class Mark:
    """What somebody said of a part: good, or defect and perhaps its name; of one decision with the parts beside it."""

    word: str
    name: str | None
    user: str
    ns: int
    decision: str


@dataclass(frozen=True)
class Severity:
    """How much of the part is marked, how far beyond the limit and where; apart from the score, which is one number.

    `area` is that of all regions in pixels, `share` of the frame; `peak` the highest value by the limit; the place is
    the middle of the region with the peak, in pixels and in words. Records of before lack the frame's size.
    """

    regions: int
    area: int
    share: float | None
    peak: float
    x: int
    y: int
    place: str


@dataclass(frozen=True)
class Reject:
    """A part that was rejected as a DEFECT and whose frame is kept."""

    key: PartKey
    decided_ns: int
    part_id: str | None
    product: str
    score: float
    limit: float
    severity: Severity
    regions: tuple[Mapping[str, Any], ...]
    mark: Mark | None = None

    @property
    def address(self) -> str:
        """How a command line names it: CAMERA/EPOCH/SEQ; an epoch may hold slashes itself."""
        return f"{self.key.camera}/{self.key.epoch}/{self.key.seq}"


@dataclass(frozen=True)
class Standing:
    """The last word on a part; its reject where the recorder still has the frame."""

    key: PartKey
    mark: Mark
    reject: Reject | None


@dataclass(frozen=True)
class Decision:
    """One click or command: who, when, what, of how many parts, and of how many it still stands."""

    decision: str
    user: str
    ns: int
    word: str
    name: str | None
    parts: int
    standing: int


@dataclass(frozen=True)
class Asked:
    """Which rejects: newest first. `product` and `camera` narrow, `from_ns` bounds the time."""

    product: str | None = None
    camera: str | None = None
    from_ns: int | None = None
    most: int = 1000


class Desk(Books):
    """`products` tells what each camera inspects, for records of before that do not say."""

    def __init__(self, ledger: Path, rejects: Path | None, products: Mapping[str, str]) -> None:
        super().__init__(ledger, rejects)
        self._products = products

    # -- rejects -----------------------------------------------------------------------------------

    def newest(self, asked: Asked) -> list[Reject]:
        """Rejects with their frames, newest first. Raises GoneError without a ledger."""
        found: list[Reject] = []
        marks = self.marks()
        before, bare = None, 0
        while len(found) < asked.most:
            page = self.rejects(Wanted(asked.camera, "DEFECT", asked.from_ns, None, before, MOST_ROWS))
            kept = [row for row in page if row["recorded"]]
            known = (self._reject(row, marks) for row in kept)
            found += [each for each in known if each is not None and asked.product in (None, each.product)]
            # The recorder gives up the oldest first: behind so many without a frame there is none either. Fewer may be
            # a time in which its disk was full.
            bare = 0 if kept else bare + 1
            if len(page) < MOST_ROWS or bare == _BARE_PAGES:
                break
            before = (page[-1]["decided_ns"], page[-1]["camera"], page[-1]["epoch"], page[-1]["seq"])
        return found[: asked.most]

    def reject(self, key: PartKey) -> Reject:
        """One of them. Raises GoneError where the ledger or the recorder has it no more."""
        found = self._reject(self.part(key.camera, key.epoch, key.seq), self.marks([key]))
        if found is None:
            raise GoneError(f"{key.camera}/{key.epoch}/{key.seq} is no DEFECT whose frame is kept (any more)")
        return found

    def standing(self) -> list[Standing]:
        """All that is marked, oldest part first, also where the ledger has forgotten the part."""
        found = [
            (decided_ns, Standing(key, mark, self._reject(_row(key, decided_ns), {key: mark})))
            for key, (mark, decided_ns) in self._newest_marks().items()
            if mark.word != "none"
        ]
        return [each for _, each in sorted(found, key=lambda each: (each[0], str(each[1].key)))]

    def product_of(self, camera: str) -> str:
        """What a camera inspects unless a frame says otherwise."""
        return self._products.get(camera, camera)

    def _reject(self, row: Mapping[str, Any], marks: Mapping[PartKey, Mark]) -> Reject | None:
        key = PartKey(row["camera"], row["epoch"], row["seq"])
        facts = self._facts(dict(row))
        if facts is None or not facts.get("regions"):
            return None
        engine = facts.get("engine") or {}
        mark = marks.get(key)
        return Reject(
            key, row["decided_ns"], facts.get("partId"),
            engine.get("product") or self.product_of(key.camera), facts["score"], facts["limit"],
            find_severity(facts), tuple(facts["regions"]), mark if mark and mark.word != "none" else None,
        )  # fmt: skip

    # -- pictures ----------------------------------------------------------------------------------

    def file(self, reject: Reject, name: str = "frame") -> Path | None:
        """The recorder's file of a reject's frame, mask or heatmap."""
        row = _row(reject.key, reject.decided_ns)
        facts = self._facts(row)
        return self._picture_path(row, facts, name) if facts else None

    def frame(self, reject: Reject) -> Frame:
        """The frame in gray or RGB. Raises GoneError, DataError."""
        path, data = self.frame_bytes(reject)
        frame = decode_file(data, str(path))
        is_mosaic = frame.pixels.shape[2] == 1 and self.is_mosaic(reject)
        return to_plain(replace(frame, layout="bayerrg")) if is_mosaic else frame

    def is_mosaic(self, reject: Reject) -> bool:
        """Whether the file is a colour camera's mosaic: one that came encoded is kept as it came."""
        facts = self._facts(_row(reject.key, reject.decided_ns)) or {}
        return facts.get("pixelFormat") == "BayerRG8" and facts.get("encoding") != "raw"

    def frame_bytes(self, reject: Reject) -> tuple[Path, bytes]:
        """Raises GoneError."""
        path = self.file(reject)
        data = read_plain(path, _MOST_FRAME_BYTES) if path else None
        if path is None or data is None:
            raise GoneError(f"the recorder has no frame of {reject.address} any more")
        return path, data

    # -- marks -------------------------------------------------------------------------------------

    def marks(self, keys: Iterable[PartKey] | None = None) -> dict[PartKey, Mark]:
        """What was said last of each part, `none` included."""
        if keys is None:
            return {key: mark for key, (mark, _) in self._newest_marks().items()}
        query = "SELECT * FROM marks WHERE camera = ? AND epoch = ? AND seq = ? ORDER BY rowid DESC LIMIT 1"
        rows = [row for key in keys for row in self._mark_rows(query, key.camera, key.epoch, key.seq)]
        return {key: mark for key, (mark, _) in _said(rows).items()}

    def _newest_marks(self) -> dict[PartKey, tuple[Mark, int]]:
        # Of a group SQLite takes the bare columns from the row with the maximum.
        rows = self._mark_rows("SELECT *, max(rowid) FROM marks GROUP BY camera, epoch, seq ORDER BY max(rowid)")
        return _said(rows)

    def decisions(self, most: int) -> list[Decision]:
        """Newest first."""
        rows = self._mark_rows(
            "SELECT decision, user, max(ns) AS ns, mark, name, count(*) AS parts FROM marks "
            "GROUP BY decision ORDER BY max(rowid) DESC LIMIT ?",
            most,
        )
        standing = Counter(mark.decision for mark in self.marks().values())
        return [
            Decision(row["decision"], row["user"], row["ns"], row["mark"], row["name"], row["parts"],
                     standing[row["decision"]])
            for row in rows
        ]  # fmt: skip

    def of_decision(self, decision: str) -> list[tuple[PartKey, int]]:
        """The parts, with the time of their verdict, of which this decision still is the last word."""
        newest = self._newest_marks()
        return [(key, ns) for key, (mark, ns) in newest.items() if mark.decision == decision and mark.word != "none"]

    def has_taken(self, decision: str, parts: int) -> bool:
        """Whether the ledger has so many parts of a decision already: it follows the journal half a second behind."""
        rows = self._mark_rows("SELECT count(*) AS parts FROM marks WHERE decision = ?", decision)
        return bool(rows and rows[0]["parts"] >= parts)

    def _mark_rows(self, query: str, *values: Any) -> list[dict[str, Any]]:
        """[] for a ledger from before marks were known."""
        with self._open() as db:
            if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'marks'").fetchone():
                return []
            return [dict(row) for row in db.execute(query, values)]


def _said(rows: Iterable[Mapping[str, Any]]) -> dict[PartKey, tuple[Mark, int]]:
    """By part: its mark, and when its verdict was."""
    return {
        PartKey(row["camera"], row["epoch"], row["seq"]): (
            Mark(row["mark"], row["name"], row["user"], row["ns"], row["decision"]), row["decided_ns"],
        )
        for row in rows
    }  # fmt: skip


def find_severity(facts: Mapping[str, Any]) -> Severity:
    """Of a recorded result with regions."""
    regions, limit = facts["regions"], facts["limit"]
    worst = max(regions, key=lambda region: region["peak"])
    x, y = worst["x"] + worst["w"] // 2, worst["y"] + worst["h"] // 2
    height, width = facts.get("shape") or (None, None)
    area = sum(region["area"] for region in regions)
    return Severity(
        regions=len(regions),
        area=area,
        share=area / (height * width) if height and width else None,
        peak=worst["peak"] / limit if limit > 0 else worst["peak"],
        x=x,
        y=y,
        place=_place(x / width, y / height) if height and width else f"{x}, {y}",
    )


def _place(x: float, y: float) -> str:
    """In words, of shares of the frame."""
    words = [names[min(2, int(3 * share))] for names, share in ((_ROWS, y), (_COLUMNS, x))]
    return " ".join(word for word in words if word) or "middle"


def _row(key: PartKey, decided_ns: int) -> dict[str, Any]:
    return {"camera": key.camera, "epoch": key.epoch, "seq": key.seq, "decided_ns": decided_ns}
