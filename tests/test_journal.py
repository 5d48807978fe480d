"""The journal: a record is whole or absent, whatever happens to the disk, and the book comes back from what is left."""

from __future__ import annotations

import errno
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.config import parse_config
from daemon.dispatch import Dispatcher, Records
from daemon.line.parts import Entry, PartBook
from daemon.record import journal as journal_module
from daemon.record.journal import Journal, decode_record, encode_record, last_run, read_records, segments
from daemon.record.metrics import Metrics
from daemon.records import replay, snapshot
from daemon.types import PartKey

STATE: dict[str, Any] = {"t": "run", "run": "r1", "ns": 1, "streams": {}, "pending": []}
CONFIG = """
version: 1
line: test
inputs: [{kind: router, bind: "ipc://frames"}]
results: {bind: "ipc://results"}
permits: {bind: "ipc://permits"}
control: {bind: "ipc://control"}
cameras: {cam1: {product: part, deadline_ms: 100, valid_ms: 100}}
"""
# A surrogate pair written as two escapes is read as the one character it stands for, hence the JSON round trip below.
TEXT = st.text(st.characters(exclude_categories=()), max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=10,
)


def accept(seq: int, camera: str = "cam1", epoch: str = "e1") -> dict[str, Any]:
    return {"t": "accept", "camera": camera, "epoch": epoch, "seq": seq, "partId": f"part-{seq}", "ns": 1}


def verdict(key: PartKey, outcome: str = "PASS", reason: str | None = None, **more: int) -> dict[str, Any]:
    part = {"camera": key.camera, "epoch": key.epoch, "seq": key.seq, "partId": None, "ns": 1}
    return {"t": "verdict", **part, "outcome": outcome, "reason": reason, **more}


def all_records(folder: Path) -> list[dict[str, Any] | None]:
    return [record for path in segments(folder) for _, record in read_records(path)]


def opened(folder: Path, *records: dict[str, Any]) -> Journal:
    """A journal that has begun and holds these records, each from a write of its own."""
    journal = Journal(folder)
    journal.begin(STATE, 1)
    for record in records:
        journal.write(record)
    return journal


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[int | OSError | None]:
    """What the next writes do, in order: an error, that many bytes only, or (None) all of it."""
    plans: list[int | OSError | None] = []
    real = os.write

    def write(descriptor: int, data: bytes) -> int:
        plan = plans.pop(0) if plans else None
        if isinstance(plan, OSError):
            raise plan
        return real(descriptor, data if plan is None else data[:plan])

    monkeypatch.setattr(journal_module.os, "write", write)
    return plans


@pytest.fixture
def logged() -> Iterator[list[int]]:
    """The levels of the journal's log lines, also where another test has set up the logs of a daemon."""
    levels: list[int] = []
    handler = logging.Handler()
    handler.emit = lambda record: levels.append(record.levelno)  # type: ignore[method-assign]
    logger = logging.getLogger("inspectd.journal")
    logger.addHandler(handler)
    yield levels
    logger.removeHandler(handler)


# --- records


@given(st.dictionaries(TEXT, VALUES, max_size=5))
def test_record_of_any_json_is_one_line_and_comes_back(record: dict[str, Any]) -> None:
    line = encode_record(record)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert decode_record(line[:-1]) == json.loads(json.dumps(record))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_value_that_json_cannot_hold_is_refused_and_nothing_is_written(tmp_path: Path, value: float) -> None:
    journal = opened(tmp_path, accept(1))
    with pytest.raises(ValueError, match="JSON"):
        journal.write(accept(2), {"t": "verdict", "score": value})
    assert all_records(tmp_path) == [STATE, accept(1)]


def test_records_come_back_in_order_with_the_place_behind_each(tmp_path: Path) -> None:
    opened(tmp_path, accept(1), accept(2)).close()
    (path,) = segments(tmp_path)
    found = list(read_records(path))
    assert [record for _, record in found] == [STATE, accept(1), accept(2)]
    assert found[-1][0] == path.stat().st_size
    assert list(read_records(path, found[0][0])) == found[1:]


def test_last_record_torn_at_any_byte_is_left_and_the_others_stay(tmp_path: Path) -> None:
    opened(tmp_path, accept(1), accept(2)).close()
    (path,) = segments(tmp_path)
    whole = path.read_bytes()
    for cut in range(len(whole) - len(encode_record(accept(2))), len(whole)):
        path.write_bytes(whole[:cut])
        assert all_records(tmp_path) == [STATE, accept(1)]


def test_torn_record_is_read_when_its_rest_has_come(tmp_path: Path) -> None:
    opened(tmp_path, accept(1), accept(2)).close()
    (path,) = segments(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    offset = list(read_records(path))[-1][0]
    path.write_bytes(whole)
    assert [record for _, record in read_records(path, offset)] == [accept(2)]


@pytest.mark.parametrize("change", [0x01, 0x08, 0x20, 0x80, 0xFF])
def test_record_with_any_byte_changed_is_dropped_and_the_others_stay(tmp_path: Path, change: int) -> None:
    opened(tmp_path, accept(1), accept(2), accept(3)).close()
    (path,) = segments(tmp_path)
    whole = path.read_bytes()
    start = len(encode_record(STATE)) + len(encode_record(accept(1)))
    for place in range(start, start + len(encode_record(accept(2))) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :])
        kept = [record for record in all_records(tmp_path) if record is not None]
        # A checksum in other letters (0A for 0a) is the same number: the record may stay, but only as it was.
        same = place < start + 8 and accept(2) in kept
        assert kept == [STATE, accept(1), *([accept(2)] if same else []), accept(3)]


def test_changed_line_end_costs_the_two_records_that_it_joins_and_no_other(tmp_path: Path) -> None:
    opened(tmp_path, accept(1), accept(2), accept(3)).close()
    (path,) = segments(tmp_path)
    whole = path.read_bytes()
    end = len(encode_record(STATE)) + len(encode_record(accept(1))) - 1
    path.write_bytes(whole[:end] + b" " + whole[end + 1 :])
    assert all_records(tmp_path) == [STATE, None, accept(3)]


@given(st.binary(max_size=60).filter(lambda line: b"\n" not in line))
def test_line_of_arbitrary_bytes_is_no_record(line: bytes) -> None:
    assert decode_record(line) is None


def test_record_nested_beyond_reading_is_dropped() -> None:
    body = b"[" * 100_000
    assert decode_record(b"%08x %s" % (zlib.crc32(body), body)) is None


@pytest.mark.parametrize("value", [[], 1, "text", None])
def test_record_that_is_no_object_is_dropped(value: Any) -> None:
    assert decode_record(encode_record(value)[:-1]) is None


# --- writing


def test_what_belongs_together_goes_out_in_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = opened(tmp_path)
    calls = []
    real = os.write
    monkeypatch.setattr(journal_module.os, "write", lambda fd, data: calls.append(data) or real(fd, data))
    journal.write(*(accept(seq) for seq in range(70)))
    assert len(calls) == 1
    monkeypatch.undo()
    assert all_records(tmp_path) == [STATE, *(accept(seq) for seq in range(70))]


def test_segment_is_appended_to_and_readable_by_owner_and_group_only(tmp_path: Path) -> None:
    opened(tmp_path / "new" / "folder").close()
    (path,) = segments(tmp_path / "new" / "folder")
    assert path.stat().st_mode & 0o137 == 0


def test_full_disk_is_told_once_and_what_waits_is_written_when_there_is_room(
    tmp_path: Path, disk: list[Any], logged: list[int]
) -> None:
    journal = opened(tmp_path, accept(1))
    disk += [OSError(errno.ENOSPC, "No space left on device")] * 2
    journal.write(accept(2))
    journal.write(accept(3))
    assert journal.fault == "No space left on device"
    assert logged == [logging.ERROR]
    journal.write(accept(4))
    assert journal.fault is None
    assert logged == [logging.ERROR, logging.WARNING]
    assert all_records(tmp_path) == [STATE, accept(1), accept(2), accept(3), accept(4)]


def test_short_write_is_a_fault_and_the_next_record_stands_on_a_fresh_line(
    tmp_path: Path, disk: list[Any], logged: list[int]
) -> None:
    journal = opened(tmp_path, accept(1))
    disk.append(len(encode_record(accept(2))) + 7)
    journal.write(accept(2), accept(3))
    assert journal.fault is not None
    assert logged == [logging.ERROR]
    journal.write(accept(4))
    journal.write(accept(5))
    assert journal.fault is None
    assert all_records(tmp_path) == [STATE, accept(1), accept(2), None, accept(3), accept(4), accept(5)]


@given(
    st.lists(
        st.tuples(st.integers(1, 3), st.sampled_from(["ok", "full", "short"]), st.integers(0, 300)),
        min_size=1,
        max_size=12,
    )
)
@settings(max_examples=60, deadline=None)
def test_whatever_the_disk_does_every_record_is_there_once_and_in_order(plans: list[tuple[int, str, int]]) -> None:
    real, seq = os.write, 0
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        journal = opened(Path(name))
        for count, kind, most in plans:
            if kind == "full":
                patch.setattr(journal_module.os, "write", _raise_full)
            elif kind == "short":
                patch.setattr(journal_module.os, "write", lambda fd, data, most=most: real(fd, data[:most]))
            else:
                patch.setattr(journal_module.os, "write", real)
            journal.write(*(accept(seq + number) for number in range(count)))
            seq += count
        patch.setattr(journal_module.os, "write", real)
        journal.flush()
        assert journal.fault is None
        found = [record for record in all_records(Path(name)) if record is not None]
    assert found == [STATE, *(accept(number) for number in range(seq))]


def test_what_waits_is_bounded_and_a_segment_that_lacks_records_is_followed_by_a_whole_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[int]
) -> None:
    monkeypatch.setattr(journal_module, "MOST_WAITING_BYTES", 10 * len(encode_record(accept(10))))
    journal = opened(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(journal_module.os, "write", _raise_full)
        for seq in range(10, 40):
            journal.write(accept(seq))
        assert journal._waiting_bytes <= journal_module.MOST_WAITING_BYTES
        assert not journal.is_full  # no new segment on a full disk
    assert logged.count(logging.CRITICAL) == 1
    journal.flush()
    assert all_records(tmp_path) == [STATE, *(accept(seq) for seq in range(30, 40))]
    assert journal.is_full
    journal.begin(STATE, 2)
    assert not journal.is_full


def _raise_full(_descriptor: int, _data: bytes) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


# --- segments


def test_new_segment_holds_the_state_and_what_follows(tmp_path: Path) -> None:
    journal = opened(tmp_path, accept(1))
    newer = {**STATE, "run": "r2", "pending": [["cam1", "e1", 1, None]]}
    journal.begin(newer, 2)
    journal.write(accept(2))
    journal.close()
    assert last_run(tmp_path) == [newer, accept(2)]
    assert all_records(tmp_path) == [STATE, accept(1), newer, accept(2)]


def test_new_segment_is_the_newest_also_when_the_clock_has_gone_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for run, now_ns in (("r1", 1_000), ("r2", 10), ("r3", 1_000)):
        journal.begin({**STATE, "run": run}, now_ns)
    journal.close()
    assert last_run(tmp_path)[0]["run"] == "r3"
    assert len(segments(tmp_path)) == 3


def test_segment_is_full_at_its_limit_and_the_next_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 200)
    journal = opened(tmp_path)
    assert not journal.is_full
    while not journal.is_full:
        journal.write(accept(1))
    assert segments(tmp_path)[0].stat().st_size >= 200
    journal.begin(STATE, 2)
    assert not journal.is_full


def test_segment_that_is_a_day_old_is_followed_by_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1000.0
    monkeypatch.setattr(journal_module, "monotonic", lambda: now_s)
    journal = opened(tmp_path, accept(1))
    journal.tend(lambda: STATE, 2)
    assert len(segments(tmp_path)) == 1
    now_s += journal_module.SEGMENT_S
    journal.tend(lambda: STATE, 3)
    journal.tend(lambda: STATE, 4)
    assert len(segments(tmp_path)) == 2


def test_old_segment_is_closed_by_the_next_sync(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    old = journal._descriptor
    journal.begin(STATE, 2)
    os.fstat(old)  # still open: only the writer thread closes, so that it never syncs a closed one
    journal.sync()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(old)


def test_rotation_on_a_disk_without_room_for_a_file_goes_on_in_the_old_segment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = opened(tmp_path, accept(1))

    def no_room(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(journal_module.os, "open", no_room)
        journal.begin(STATE, 2)
    assert journal.fault is not None
    journal.write(accept(2))
    assert last_run(tmp_path) == [STATE, accept(1), accept(2)]


def test_journal_that_never_was_has_no_last_run(tmp_path: Path) -> None:
    assert last_run(tmp_path / "nowhere") == []
    assert last_run(tmp_path) == []


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-1], lambda data: b"x" + data[1:]])
def test_segment_with_a_torn_beginning_is_passed_over_for_the_one_before(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    journal = opened(tmp_path, accept(1))
    journal.begin({**STATE, "run": "r2"}, 2)
    journal.close()
    newest = segments(tmp_path)[-1]
    newest.write_bytes(damage(newest.read_bytes()))
    assert last_run(tmp_path) == [STATE, accept(1)]


def test_records_behind_a_damaged_beginning_are_not_forgotten(tmp_path: Path) -> None:
    """An accept in the newest segment must end in MISSING, also when the segment's first record is gone."""
    journal = opened(tmp_path, accept(1))
    journal.begin({**STATE, "pending": [["cam1", "e1", 1, "part-1"]]}, 2)
    journal.write(verdict(PartKey("cam1", "e1", 1)))
    journal.write(accept(2))
    journal.close()
    newest = segments(tmp_path)[-1]
    newest.write_bytes(b"x" + newest.read_bytes()[1:])
    book = replay(last_run(tmp_path))
    assert list(book.in_flight) == [PartKey("cam1", "e1", 2)]
    assert book.streams["cam1"].last_seq == 2


def test_damaged_record_in_the_newest_segment_costs_only_itself(tmp_path: Path) -> None:
    opened(tmp_path, accept(1), accept(2), accept(3)).close()
    (path,) = segments(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"part-2", b"part-9"))
    assert last_run(tmp_path) == [STATE, accept(1), accept(3)]


# --- the book of an earlier run


@dataclass
class Model:
    """What a reader of the surviving records must know. Streams: epoch, last seq, retired epochs."""

    streams: dict[str, tuple[str, int, frozenset[str]]] = field(default_factory=dict)
    in_flight: dict[PartKey, str | None] = field(default_factory=dict)

    def copy(self) -> Model:
        return Model(dict(self.streams), dict(self.in_flight))

    def advance(self, key: PartKey) -> None:
        epoch, _, retired = self.streams.get(key.camera, (key.epoch, 0, frozenset()))
        retired = retired | {epoch} if epoch != key.epoch else retired
        self.streams[key.camera] = (key.epoch, key.seq, retired)


class History:
    """Writes what a daemon would write, keeps a model beside it, and notes where each record ends."""

    def __init__(self, folder: Path) -> None:
        config = parse_config(CONFIG, "config.yaml", folder)
        self.journal = Journal(folder)
        self.dispatcher = Dispatcher(config, "run", PartBook(), Records(self.journal, Metrics(), None), announcer=None)  # type: ignore[arg-type]
        self.model = Model()
        self.ends: list[tuple[int, Model]] = [(0, Model())]
        self.begun = self.epochs = 0
        self.rotate()

    def rotate(self) -> None:
        self.begun += 1
        state = snapshot(self.dispatcher.book, "run")
        self.journal.begin(state, self.begun)
        self._note(state)

    def accept(self, camera: str, skip: int, *, new_epoch: bool) -> None:
        book = self.dispatcher.book
        epoch, last, _ = self.model.streams.get(camera, ("e0", 9, frozenset()))
        if new_epoch:
            self.epochs += 1
            epoch, last, skip = f"e{self.epochs}", 99, 0
        skip = skip if camera in self.model.streams else 0
        key = PartKey(camera, epoch, last + 1 + skip)
        assert book.admit(key, "owner").refusal is None
        book.open(Entry(key, f"p{key.seq}", 0, 0))
        gap = verdict(PartKey(camera, epoch, last + 1), "REJECT", "MISSING", seqTo=last + skip)
        records = [*([gap] if skip else []), {**accept(key.seq, camera, epoch), "partId": f"p{key.seq}"}]
        self.journal.write(*records)
        if skip:
            self.model.advance(PartKey(camera, epoch, last + skip))
            self._note(gap)
        self.model.advance(key)
        self.model.in_flight[key] = f"p{key.seq}"
        self._note(records[-1])

    def settle(self, choice: int) -> None:
        if not self.model.in_flight:
            return
        key = list(self.model.in_flight)[choice % len(self.model.in_flight)]
        self.dispatcher.book.settle(key)
        del self.model.in_flight[key]
        self.journal.write(verdict(key))
        self._note(verdict(key))

    def _note(self, record: dict[str, Any]) -> None:
        self.ends.append((self.ends[-1][0] + len(encode_record(record)), self.model.copy()))


def cut_journal(folder: Path, kept_bytes: int) -> None:
    """The journal as it was when it had so many bytes: later segments were not there yet."""
    for path in segments(folder):
        data = path.read_bytes()
        path.write_bytes(data[:kept_bytes])
        if kept_bytes <= 0:
            path.unlink()
        kept_bytes -= len(data)


def known(book: PartBook) -> Model:
    streams = {name: (s.epoch, s.last_seq, frozenset(s.retired)) for name, s in book.streams.items()}
    return Model(streams, {key: entry.part_id for key, entry in book.in_flight.items()})


STEPS = st.lists(
    st.tuples(st.just("accept"), st.sampled_from(["cam1", "cam2"]), st.sampled_from([0, 1, 70]), st.booleans())
    | st.tuples(st.just("settle"), st.integers(0, 10))
    | st.tuples(st.just("rotate")),
    max_size=25,
)


@given(STEPS, st.integers(0, 100), st.integers(0, 400))
@settings(max_examples=150, deadline=None)
def test_book_comes_back_from_a_journal_cut_at_any_byte(steps: list[Any], record: int, byte: int) -> None:
    with TemporaryDirectory() as name:
        history = History(Path(name))
        for kind, *values in steps:
            if kind == "accept":
                history.accept(values[0], values[1], new_epoch=values[2])
            elif kind == "settle":
                history.settle(values[0])
            else:
                history.rotate()
        history.journal.close()
        kept = min(history.ends[record % len(history.ends)][0] + byte, history.ends[-1][0])
        cut_journal(Path(name), kept)
        book = replay(last_run(Path(name)))
    assert known(book) == [model for end, model in history.ends if end <= kept][-1]
    assert {stream.owner for stream in book.streams.values()} <= {None}


def test_whoever_speaks_first_after_a_restart_owns_the_stream(tmp_path: Path) -> None:
    history = History(tmp_path)
    history.accept("cam1", 0, new_epoch=False)
    history.rotate()
    history.accept("cam1", 0, new_epoch=False)
    book = replay(last_run(tmp_path))
    assert book.streams["cam1"].owner is None
    assert book.admit(PartKey("cam1", "e0", 12), "another").refusal is None


def test_missing_parts_whose_successor_was_lost_are_not_missing_again(tmp_path: Path) -> None:
    """A power cut inside the one write of a gap and its accept: the gap was told, and is not told twice."""
    history = History(tmp_path)
    history.accept("cam1", 0, new_epoch=False)
    history.accept("cam1", 3, new_epoch=False)
    history.journal.close()
    cut_journal(tmp_path, history.ends[-2][0])
    assert last_run(tmp_path)[-1]["reason"] == "MISSING"
    book = replay(last_run(tmp_path))
    gap = book.admit(PartKey("cam1", "e0", 15), "owner").gap
    assert gap is not None
    assert (gap.first, gap.last) == (14, 14)


def test_part_whose_accept_was_damaged_is_not_missing_beside_its_verdict(tmp_path: Path) -> None:
    journal = opened(
        tmp_path, accept(1), accept(2), verdict(PartKey("cam1", "e1", 1)), verdict(PartKey("cam1", "e1", 2))
    )
    journal.close()
    (path,) = segments(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"part-2", b"part-9"))
    book = replay(last_run(tmp_path))
    assert book.in_flight == {}
    assert book.admit(PartKey("cam1", "e1", 3), "owner").gap is None


def test_what_people_changed_is_no_part_of_the_book() -> None:
    event = {"t": "event", "ns": 1, "user": "olga", "command": "pause", "engine": None, "ok": True, "detail": None}
    book = replay([STATE, event, accept(1), event])
    assert [key.seq for key in book.in_flight] == [1]
