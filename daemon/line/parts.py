"""The book of parts: which are known, which are in flight, and that each is settled exactly once.

Pure bookkeeping: no socket, no clock (the time is handed in), no image. Promise 1 of the design
rests on `settle`: it gives an entry once, and whoever gets None must not speak.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from daemon.types import PartKey, Refusal

MOST_RETIRED = 1000  # a camera that starts anew a thousand times before an old sender comes back
MAX_SINGLE_MISSING = 64  # a longer gap is told as one range


@dataclass(frozen=True)
class Gap:
    """Parts first..last (both inside) of one stream that never arrived."""

    camera: str
    epoch: str
    first: int
    last: int

    @property
    def count(self) -> int:
        return self.last - self.first + 1

    def pieces(self) -> list[Gap]:
        """One piece a part, or the whole as one range where it is long."""
        if self.count > MAX_SINGLE_MISSING:
            return [self]
        return [Gap(self.camera, self.epoch, seq, seq) for seq in range(self.first, self.last + 1)]


@dataclass(frozen=True)
class Entry:
    """A part in flight. Times are of the monotonic clock."""

    key: PartKey
    part_id: str | None
    arrived_ns: int
    deadline_ns: int
    captured_ns: int | None = None
    is_simulated: bool = False


@dataclass
class Stream:
    """What is remembered of a camera. `owner` is the CURVE user id that spoke first since the start."""

    epoch: str
    last_seq: int
    retired: dict[str, None] = field(default_factory=dict)  # the newest MOST_RETIRED epochs, oldest first
    owner: str | None = None


@dataclass(frozen=True)
class Admission:
    """The answer to a frame: refused with a reason, or accepted with the gap before it."""

    refusal: Refusal | None = None
    detail: str | None = None
    gap: Gap | None = None


class PartBook:
    """Streams by camera and parts in flight."""

    def __init__(self, streams: dict[str, Stream] | None = None) -> None:
        self.streams = {} if streams is None else streams
        self.in_flight: dict[PartKey, Entry] = {}
        self._deadlines: list[tuple[int, int, PartKey]] = []
        self._count = 0

    def admit(self, key: PartKey, owner: str) -> Admission:
        """Whether the stream goes on with this part; moves the stream to it if so."""
        stream = self.streams.get(key.camera)
        if stream is None:
            self.streams[key.camera] = Stream(key.epoch, key.seq, owner=owner)
            return Admission()
        if stream.owner is not None and stream.owner != owner:
            return Admission(Refusal.FORBIDDEN, "this camera's stream belongs to another sender")
        stream.owner = owner
        if key.epoch in stream.retired:
            return Admission(
                Refusal.DUPLICATE, f"epoch {key.epoch!r} was replaced by {stream.epoch!r}; start a new one"
            )
        if key.epoch != stream.epoch:
            stream.retired[stream.epoch] = None
            if len(stream.retired) > MOST_RETIRED:
                del stream.retired[next(iter(stream.retired))]
            stream.epoch, stream.last_seq = key.epoch, key.seq
            return Admission()
        if key.seq <= stream.last_seq:
            return Admission(Refusal.DUPLICATE, f"seq {key.seq} is not above the last one, {stream.last_seq}")
        first, stream.last_seq = stream.last_seq + 1, key.seq
        return Admission(gap=Gap(key.camera, key.epoch, first, key.seq - 1) if first < key.seq else None)

    def open(self, entry: Entry) -> None:
        """An accepted part is in flight from here until `settle`."""
        self.in_flight[entry.key] = entry
        self._count += 1  # ties of the deadline are kept in order of arrival
        heapq.heappush(self._deadlines, (entry.deadline_ns, self._count, entry.key))

    def settle(self, key: PartKey) -> Entry | None:
        """The part's entry, for whoever gives its verdict; None when it has one already."""
        return self.in_flight.pop(key, None)

    def due(self, now_ns: int) -> list[PartKey]:
        """The parts in flight whose deadline has come; they stay in flight until settled."""
        due = []
        while self._deadlines and self._deadlines[0][0] <= now_ns:
            _, _, key = heapq.heappop(self._deadlines)
            if key in self.in_flight:
                due.append(key)
        return due

    def next_deadline_ns(self) -> int | None:
        """When `due` has something next; settled parts are dropped on the way."""
        while self._deadlines and self._deadlines[0][2] not in self.in_flight:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None
