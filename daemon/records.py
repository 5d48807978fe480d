"""What of a part goes into the journal, and the book that comes back from it. Two ends of one format.

Record kinds: `run` (the whole state, first in each segment), `accept`, `verdict` (also of parts that never
came: a gap, with seqTo for a range), `skip` (numbers that went by while nothing was inspected), `event` (what a
person changed, and who; of no part), `mark` (what a person says of rejected parts, all of one request in one record).
"""

from __future__ import annotations

from dataclasses import replace
from time import time_ns

from daemon.line.control import Request
from daemon.line.parts import Entry, Gap, PartBook, Stream
from daemon.record.journal import Record
from daemon.types import Header, Outcome, PartKey, Reason, Verdict


def snapshot(book: PartBook, run: str) -> Record:
    """All that a later run needs, as the first record of a segment."""
    streams = {
        camera: {"epoch": stream.epoch, "lastSeq": stream.last_seq, "retired": list(stream.retired)}
        for camera, stream in book.streams.items()
    }
    pending = [[e.key.camera, e.key.epoch, e.key.seq, e.part_id] for e in book.in_flight.values()]
    return {"t": "run", "run": run, "ns": time_ns(), "streams": streams, "pending": pending}


def accept_record(entry: Entry, now_ns: int) -> Record:
    key = entry.key
    part = {"camera": key.camera, "epoch": key.epoch, "seq": key.seq, "partId": entry.part_id}
    return {"t": "accept", **part, "ns": now_ns}


def skip_record(key: PartKey, first: int, now_ns: int) -> Record:
    return {"t": "skip", "camera": key.camera, "epoch": key.epoch, "seq": first, "seqTo": key.seq, "ns": now_ns}


def missing_record(gap: Gap, now_ns: int) -> Record:
    record = {"t": "verdict", "camera": gap.camera, "epoch": gap.epoch, "seq": gap.first, "partId": None, "ns": now_ns}
    blank = {"outcome": Outcome.REJECT.value, "reason": Reason.MISSING.value}
    return {**record, "seqTo": gap.last, **blank, "score": None, "limit": None, "pValue": None, "engine": None}


def verdict_record(entry: Entry, verdict: Verdict, now_ns: int) -> Record:
    key = entry.key
    return {
        "t": "verdict", "camera": key.camera, "epoch": key.epoch, "seq": key.seq, "partId": entry.part_id, "ns": now_ns,
        "outcome": verdict.outcome.value, "reason": verdict.reason.value if verdict.reason else None,
        "score": verdict.score, "limit": verdict.limit, "pValue": verdict.p_value,
        "engine": verdict.engine.digest if verdict.engine else None,
    }  # fmt: skip


def order_records(request: Request, answer: Header) -> list[Record]:
    """A command that was obeyed or refused, and whose it was; and the marks, where it was one that was obeyed."""
    now_ns, marking, is_obeyed = time_ns(), request.marking, bool(answer["ok"])
    engine = answer.get("engine") or request.engine
    told = {"user": request.user, "command": request.command, "engine": engine}
    detail = answer.get("error") or (marking.words if marking else None)
    event = {"t": "event", "ns": now_ns, **told, "ok": is_obeyed, "detail": detail}
    if marking is None or not is_obeyed:
        return [event]
    return [{"t": "mark", "ns": now_ns, "user": request.user, **marking.model_dump()}, event]


def replay(records: list[Record]) -> PartBook:
    """The book as an earlier run left it, from the records since its last snapshot. Owners are not kept."""
    book = PartBook()
    for record in records:
        kind = record["t"]
        if kind == "run":
            book = PartBook(
                {
                    camera: Stream(state["epoch"], state["lastSeq"], dict.fromkeys(state["retired"]))
                    for camera, state in record["streams"].items()
                }
            )
            for camera, epoch, seq, part_id in record["pending"]:
                book.open(Entry(PartKey(camera, epoch, seq), part_id, 0, 0))
            continue
        if kind in ("event", "mark"):
            continue
        key = PartKey(record["camera"], record["epoch"], record["seq"])
        if kind == "accept":
            book.admit(key, "")
            book.open(Entry(key, record["partId"], 0, 0))
        elif kind == "skip" or book.settle(key) is None:
            # A pause, a gap, or a part whose accept was damaged: the stream has come as far as this all the same.
            book.admit(replace(key, seq=record.get("seqTo", key.seq)), "")
    for stream in book.streams.values():
        stream.owner = None
    return book
