"""The book of parts: every part once, every gap once, whatever order things come in."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from daemon.line.parts import MAX_SINGLE_MISSING, MOST_RETIRED, Admission, Entry, Gap, PartBook, Stream
from daemon.types import PartKey, Refusal


def key(seq: int, epoch: str = "e1", camera: str = "cam1") -> PartKey:
    return PartKey(camera, epoch, seq)


def entry(seq: int, deadline_ns: int, **names: str) -> Entry:
    return Entry(key(seq, **names), None, arrived_ns=0, deadline_ns=deadline_ns)


# --- one stream


def test_stream_may_start_anywhere_without_a_gap() -> None:
    assert PartBook().admit(key(1_000), "owner") == Admission()


def test_next_part_follows_without_a_gap() -> None:
    book = PartBook()
    book.admit(key(4), "owner")
    assert book.admit(key(5), "owner") == Admission()


def test_skipped_parts_are_told_as_the_gap_before_the_next() -> None:
    book = PartBook()
    book.admit(key(4), "owner")
    assert book.admit(key(8), "owner") == Admission(gap=Gap("cam1", "e1", 5, 7))
    assert book.admit(key(9), "owner") == Admission()


@pytest.mark.parametrize("seq", [0, 3, 4])
def test_part_repeated_or_going_back_is_a_duplicate_and_changes_nothing(seq: int) -> None:
    book = PartBook()
    book.admit(key(4), "owner")
    assert book.admit(key(seq), "owner").refusal is Refusal.DUPLICATE
    assert book.admit(key(5), "owner") == Admission()


def test_part_that_was_told_missing_is_refused_when_it_comes_after_all() -> None:
    book = PartBook()
    book.admit(key(4), "owner")
    book.admit(key(8), "owner")
    assert [book.admit(key(seq), "owner").refusal for seq in (5, 6, 7)] == [Refusal.DUPLICATE] * 3


def test_new_epoch_replaces_the_old_one_for_good() -> None:
    book = PartBook()
    book.admit(key(4, "e1"), "owner")
    assert book.admit(key(0, "e2"), "owner") == Admission()
    assert book.admit(key(5, "e1"), "owner").refusal is Refusal.DUPLICATE
    book.admit(key(0, "e3"), "owner")
    for epoch in ("e1", "e2"):
        for seq in (0, 5, 10**9):
            assert book.admit(key(seq, epoch), "owner").refusal is Refusal.DUPLICATE
    assert book.admit(key(1, "e3"), "owner") == Admission()


def test_stranger_is_refused_and_changes_nothing() -> None:
    book = PartBook()
    book.admit(key(4), "owner")
    for stranger in (key(5), key(0, "e2"), key(99)):
        assert book.admit(stranger, "stranger").refusal is Refusal.FORBIDDEN
    assert book.admit(key(5), "owner") == Admission()


def test_cameras_do_not_touch_each_other() -> None:
    book = PartBook()
    book.admit(key(4), "owner")
    assert book.admit(key(100, "e9", camera="cam2"), "another") == Admission()
    assert book.admit(key(5), "owner") == Admission()


def test_stream_known_from_before_the_start_goes_on_and_belongs_to_who_speaks_first() -> None:
    book = PartBook({"cam1": Stream("e1", last_seq=10, retired={"e0"})})
    assert book.admit(key(10), "owner").refusal is Refusal.DUPLICATE
    assert book.admit(key(11, "e0"), "owner").refusal is Refusal.DUPLICATE
    assert book.admit(key(13), "owner") == Admission(gap=Gap("cam1", "e1", 11, 12))
    assert book.admit(key(14), "stranger").refusal is Refusal.FORBIDDEN


# --- gaps


@given(first=st.integers(0, 2**62), count=st.integers(1, 200))
def test_gap_is_told_part_by_part_up_to_64_and_as_one_range_above(first: int, count: int) -> None:
    gap = Gap("cam1", "e1", first, first + count - 1)
    pieces = gap.pieces()
    assert gap.count == count
    assert len(pieces) == (count if count <= MAX_SINGLE_MISSING else 1)
    assert [seq for piece in pieces for seq in range(piece.first, piece.last + 1)] == list(range(first, first + count))


def test_gap_as_long_as_all_numbers_is_still_one_piece() -> None:
    gap = Gap("cam1", "e1", 0, 2**63 - 1)
    assert gap.pieces() == [gap]


@settings(max_examples=200)
@given(seqs=st.lists(st.integers(0, 400), min_size=1, max_size=40))
def test_accepted_and_missing_parts_cover_the_stream_exactly_once(seqs: list[int]) -> None:
    book = PartBook()
    told: Counter[int] = Counter()
    for seq in seqs:
        admission = book.admit(key(seq), "owner")
        if admission.refusal is None:
            told[seq] += 1
        for piece in admission.gap.pieces() if admission.gap else []:
            told.update(range(piece.first, piece.last + 1))
    assert told == Counter(range(seqs[0], max(seqs) + 1))


# --- in flight and deadlines


def test_part_is_settled_once() -> None:
    book = PartBook()
    opened = entry(1, deadline_ns=100)
    book.open(opened)
    assert book.settle(key(1)) is opened
    assert book.settle(key(1)) is None
    assert not book.in_flight


def test_part_that_was_never_opened_cannot_be_settled() -> None:
    assert PartBook().settle(key(1)) is None


def test_part_is_due_at_its_deadline_and_not_before() -> None:
    book = PartBook()
    book.open(entry(1, deadline_ns=100))
    assert book.next_deadline_ns() == 100
    assert book.due(99) == []
    assert book.due(100) == [key(1)]


def test_due_part_is_told_once_and_stays_in_flight_until_settled() -> None:
    book = PartBook()
    book.open(entry(1, deadline_ns=100))
    assert book.due(100) == [key(1)]
    assert book.due(10**18) == []
    assert book.next_deadline_ns() is None
    assert book.settle(key(1)) is not None


def test_settled_part_is_never_due() -> None:
    book = PartBook()
    book.open(entry(1, deadline_ns=100))
    book.open(entry(2, deadline_ns=200))
    book.settle(key(1))
    assert book.next_deadline_ns() == 200
    assert book.due(10**18) == [key(2)]


def test_parts_with_one_deadline_are_due_in_order_of_arrival() -> None:
    book = PartBook()
    for seq in (3, 1, 2):
        book.open(entry(seq, deadline_ns=100))
    assert book.due(100) == [key(3), key(1), key(2)]


def test_empty_book_has_no_deadline() -> None:
    assert PartBook().next_deadline_ns() is None


CAMERAS, EPOCHS, OWNERS = ("cam1", "cam2"), ("e1", "e2", "e3"), ("owner", "stranger")


class Line(RuleBasedStateMachine):
    """Cameras that skip, repeat and start anew, verdicts in any order, and deadlines, against a plain model."""

    opened = Bundle("opened")

    @initialize()
    def start(self) -> None:
        self.book = PartBook()
        self.now_ns = 0
        self.owners: dict[str, str] = {}
        self.epochs: dict[str, list[str]] = {camera: [] for camera in CAMERAS}
        self.told: dict[tuple[str, str], list[int]] = {}
        self.waiting: dict[PartKey, int] = {}  # deadlines of parts in flight
        self.due: Counter[PartKey] = Counter()
        self.settled: Counter[PartKey] = Counter()

    @rule(
        target=opened,
        camera=st.sampled_from(CAMERAS),
        epoch=st.sampled_from(EPOCHS),
        owner=st.sampled_from((OWNERS[0], *OWNERS)),
        step=st.integers(-3, 80),
        deadline_ms=st.integers(0, 50),
    )
    def frame(self, camera: str, epoch: str, owner: str, step: int, deadline_ms: int) -> PartKey:
        seen = self.told.get((camera, epoch), [])
        part = PartKey(camera, epoch, max(0, (seen[-1] if seen else 0) + step))
        admission = self.book.admit(part, owner)
        assert admission.refusal is self.expected_refusal(part, owner)
        if admission.refusal is not None:
            assert admission.gap is None
            return part
        self.owners.setdefault(camera, owner)
        if epoch not in self.epochs[camera]:
            self.epochs[camera].append(epoch)
        told = self.told.setdefault((camera, epoch), [])
        for piece in admission.gap.pieces() if admission.gap else []:
            assert (piece.camera, piece.epoch) == (camera, epoch)
            told.extend(range(piece.first, piece.last + 1))
        told.append(part.seq)
        deadline_ns = self.now_ns + deadline_ms
        self.book.open(Entry(part, None, self.now_ns, deadline_ns))
        self.waiting[part] = deadline_ns
        return part

    def expected_refusal(self, part: PartKey, owner: str) -> Refusal | None:
        if self.owners.get(part.camera, owner) != owner:
            return Refusal.FORBIDDEN
        if part.epoch in self.epochs[part.camera][:-1]:
            return Refusal.DUPLICATE
        told = self.told.get((part.camera, part.epoch), [])
        return Refusal.DUPLICATE if told and part.seq <= told[-1] else None

    @rule(part=opened)
    def verdict(self, part: PartKey) -> None:
        settled = self.book.settle(part)
        assert (settled is not None) == (part in self.waiting)
        if settled is not None:
            assert settled.key == part
            self.settled[part] += 1
            del self.waiting[part]

    @rule(part=consumes(opened))
    def forgotten(self, part: PartKey) -> None:
        """Keeps the other rules from speaking of the same few parts only."""

    @rule(passed_ns=st.integers(0, 60))
    def time_passes(self, passed_ns: int) -> None:
        self.now_ns += passed_ns
        due = self.book.due(self.now_ns)
        expected = {part for part, at_ns in self.waiting.items() if at_ns <= self.now_ns and not self.due[part]}
        assert set(due) == expected
        assert [self.waiting[part] for part in due] == sorted(self.waiting[part] for part in due)
        self.due.update(due)

    @invariant()
    def next_deadline_is_the_earliest_not_told(self) -> None:
        pending = [at_ns for part, at_ns in self.waiting.items() if not self.due[part]]
        assert self.book.next_deadline_ns() == min(pending, default=None)

    @invariant()
    def every_number_is_accepted_or_missing_once(self) -> None:
        for told in self.told.values():
            assert told == list(range(told[0], told[-1] + 1))

    @invariant()
    def nothing_is_settled_or_due_twice(self) -> None:
        assert set(self.settled.values()) <= {1}
        assert set(self.due.values()) <= {1}
        assert set(self.book.in_flight) == set(self.waiting)


TestLine = Line.TestCase
TestLine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_camera_that_starts_anew_for_ever_costs_no_more_memory() -> None:
    book = PartBook()
    for number in range(MOST_RETIRED + 50):
        book.admit(PartKey("cam1", f"epoch-{number}", 0), "owner")
    stream = book.streams["cam1"]
    assert len(stream.retired) == MOST_RETIRED
    assert book.admit(PartKey("cam1", f"epoch-{MOST_RETIRED}", 1), "owner").refusal is Refusal.DUPLICATE
