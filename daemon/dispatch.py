"""From a frame's arrival to its one verdict: the book of parts, the journal, the engines, the announcements.

Runs in the loop and never waits. Every path into this room ends in `_settle`, which speaks for a part
only if the book still has it in flight; whoever comes second (an engine after the deadline, a deadline
after the engine) finds nothing to say. What is announced was journalled before.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from time import monotonic_ns, time_ns
from typing import Protocol

from daemon.budget import to_give_up
from daemon.config import Camera, Config
from daemon.errors import FrameError
from daemon.inspection.decode import lossless
from daemon.inspection.engine import Done, Engine, Job
from daemon.line.parts import Entry, Gap, PartBook
from daemon.line.wire import FramePart, encode_result, missing_verdict, verdict_fields
from daemon.record.journal import Journal
from daemon.record.metrics import Metrics
from daemon.record.recorder import Recorder, Reject
from daemon.records import accept_record, missing_record, skip_record, verdict_record
from daemon.types import Header, Outcome, PartKey, RawFrame, Reason, Refusal, Verdict
from daemon.watch import Watch

log = logging.getLogger("inspectd.dispatch")

_FRAME_OVERHEAD_BYTES = 4096  # the objects around a payload
_LATE_MARGIN_NS = 2_000_000  # the loop's clock has milliseconds, and the message has to leave
_UNKNOWN_VALID_MS = 1000  # for parts of an earlier run whose camera is no longer configured
# What comes in floods must neither fill the disk nor take the core that inference needs.
_NOT_RECORDED = (Reason.OVERLOAD, Reason.SUPERSEDED, Reason.NOT_READY, Reason.LATE, Reason.SETUP)


class Announcer(Protocol):
    """The line's ears: the results socket and the permit channel."""

    def result(self, parts: list[bytes]) -> None: ...

    def verdict(self, header: Header, valid_ms: int) -> None: ...


class Observer(Protocol):
    """Who watches the engines at work while one is swapped for another. Called in the loop."""

    def submitted(self, job: Job) -> None: ...

    def inspected(self, product: str, done: Done) -> None: ...

    def late(self, product: str, arrived_ns: int) -> None: ...

    def decided(self, total_ms: float) -> None: ...


@dataclass(frozen=True)
class Answer:
    """What the camera is told."""

    refusal: Refusal | None
    detail: str | None = None


@dataclass(frozen=True)
class Records:
    """Where things are kept; the recorder is optional."""

    journal: Journal
    metrics: Metrics
    recorder: Recorder | None


class Dispatcher:
    """One per daemon. `engines` is by product; a product without an engine is NOT_READY."""

    def __init__(self, config: Config, run: str, book: PartBook, records: Records, announcer: Announcer) -> None:
        self.engines: dict[str, Engine] = {}
        self.refuses: Refusal | None = None  # PAUSED or DRAINING
        self.observer: Observer | None = None
        self.watch = Watch(config.cameras, records.metrics)
        for camera in config.cameras:
            records.metrics.know_camera(camera)
        self.book = book
        self._config = config
        self._run = run
        self._records = records
        self._announcer = announcer
        self._budget_bytes = config.queue_mb << 20
        self._used_bytes: Counter[str] = Counter()  # by camera
        self._frames: dict[PartKey, tuple[RawFrame, str]] = {}  # at an engine, with its product
        self._newest: dict[str, PartKey] = {}  # by camera in mode `latest`: the one that waits

    @property
    def products(self) -> set[str]:
        """Those that cameras name in the configuration."""
        return {camera.product for camera in self._config.cameras.values()}

    # -- frames in ---------------------------------------------------------------------------------

    def on_frame(self, part: FramePart, owner: str) -> Answer:
        """Take in or refuse a frame whose part is known, and settle at once what cannot be inspected."""
        camera = self._config.cameras.get(part.camera)
        if part.line != self._config.line or camera is None:
            return self._refuse("unknown", Refusal.BAD_HEADER, f"no camera {part.line}/{part.camera} is configured")
        admission = self.book.admit(part.key, owner)
        if admission.refusal is not None:
            return self._refuse(part.camera, admission.refusal, admission.detail)
        if self.refuses is not None:
            self._skip(part.key, admission.gap)
            return self._refuse(part.camera, self.refuses)
        now_ns = monotonic_ns()
        entry = Entry(part.key, part.part_id, now_ns, now_ns + deadline_ns(camera.deadline_ms))
        frame: RawFrame | None = None
        verdict: Verdict | None = Verdict(Outcome.REJECT, Reason.BAD_FRAME)
        try:
            frame = part.frame()
        except FrameError as error:
            log.warning("bad frame camera=%s seq=%d: %s", part.camera, part.key.seq, error)
        if frame is not None:
            entry = replace(entry, captured_ns=frame.captured_ns, is_simulated=frame.is_simulated)
            # The engine may begin while the accept is written: what it finds is only heard by this loop, later.
            verdict = self._start(frame, part.key, camera, now_ns)
        self._accept(entry, admission.gap)
        if verdict is not None:
            self._settle(part.key, verdict, frame)
        return Answer(None)

    def _refuse(self, camera: str, refusal: Refusal, detail: str | None = None) -> Answer:
        self._records.metrics.frames_refused.labels(camera, refusal.value).inc()
        return Answer(refusal, detail)

    def _skip(self, key: PartKey, gap: Gap | None) -> None:
        """Numbers that went by while nothing was inspected: no verdict, and no gap afterwards either."""
        self._records.journal.write(skip_record(key, gap.first if gap else key.seq, time_ns()))

    def _accept(self, entry: Entry, gap: Gap | None) -> None:
        """Journal the accept and the gap before it in one write, then tell of the missing parts."""
        now_ns = time_ns()
        key = entry.key
        pieces = gap.pieces() if gap else []
        missing = [missing_record(piece, now_ns) for piece in pieces]
        self._records.journal.write(*missing, accept_record(entry, now_ns))
        self.book.open(entry)
        self._records.metrics.frames_accepted.labels(key.camera).inc()
        if gap:
            log.warning("sequence gap camera=%s epoch=%s first=%d last=%d", gap.camera, gap.epoch, gap.first, gap.last)
            self._records.metrics.sequence_gaps.labels(gap.camera).inc(gap.count)
        for piece in pieces:
            self._announce_missing(piece, now_ns)

    def _start(self, frame: RawFrame, key: PartKey, camera: Camera, now_ns: int) -> Verdict | None:
        """Hand the frame to its engine; the verdict where there is none, or the byte budget does not allow it."""
        product = frame.product or camera.product
        engine = self.engines.get(product)
        if engine is None:
            return Verdict(Outcome.REJECT, Reason.NOT_READY)
        if camera.mode == "latest":
            self._supersede(key)
        self._make_room(key.camera, _cost(frame))
        if self.used_bytes + _cost(frame) > self._budget_bytes:
            return Verdict(Outcome.REJECT, Reason.OVERLOAD)
        self._frames[key] = (frame, product)
        self._used_bytes[key.camera] += _cost(frame)
        job = Job(key, frame, product, now_ns, now_ns + deadline_ns(camera.deadline_ms))
        engine.submit(job)
        if self.observer is not None:
            self.observer.submitted(job)
        return None

    def replace(self, products: list[str], engine: Engine) -> None:
        """Another engine for these products, between two frames: what waits moves over, in order."""
        replaced = {self.engines[product] for product in products if product in self.engines} - {engine}
        self.engines.update(dict.fromkeys(products, engine))
        for old in replaced:
            for job, is_late in old.take_waiting():
                engine.submit(job)
                if is_late:
                    engine.postpone(job.key)

    def _supersede(self, key: PartKey) -> None:
        """The newest frame of a camera overtakes the one that still waits."""
        older = self._newest.get(key.camera)
        self._newest[key.camera] = key
        if older is not None and (frame := self._withdraw(older)) is not None:
            self._settle(older, Verdict(Outcome.REJECT, Reason.SUPERSEDED), frame)

    def _make_room(self, camera: str, wanted_bytes: int) -> None:
        """Give up late frames that wait for their score, then the newest frames of the camera that holds most.

        A flood turns its own frames away: another camera has room as long as it holds less than the one that floods.
        """
        for engine in self.engines.values():
            while self.used_bytes + wanted_bytes > self._budget_bytes and (late := engine.oldest_late()) is not None:
                if self._withdraw(late) is None:
                    break
        for key in to_give_up(self._used_bytes, self._budget_bytes, camera, wanted_bytes, self._newest_waiting):
            if self._withdraw(key) is not None:
                self._settle(key, Verdict(Outcome.REJECT, Reason.OVERLOAD))

    def _newest_waiting(self, camera: str) -> Iterator[tuple[PartKey, int]]:
        for key in reversed(self._frames):
            frame, product = self._frames[key]
            if key.camera == camera and self.engines[product].is_waiting(key):
                yield key, _cost(frame)

    def _withdraw(self, key: PartKey) -> RawFrame | None:
        """Take a waiting frame back from its engine; None when it does not wait any more."""
        frame, product = self._frames.get(key, (None, ""))
        if frame is None or not self.engines[product].withdraw(key):
            return None
        self._release(key)
        return frame

    def _release(self, key: PartKey) -> RawFrame | None:
        frame, _ = self._frames.pop(key, (None, ""))
        if frame is not None:
            self._used_bytes[key.camera] -= _cost(frame)
        return frame

    def credit(self, frame_bytes: int) -> int:
        """How many more frames of this size the byte budget takes now."""
        return max(0, self._budget_bytes - self.used_bytes) // (frame_bytes + _FRAME_OVERHEAD_BYTES)

    @property
    def used_bytes(self) -> int:
        return self._used_bytes.total()

    # -- verdicts out ------------------------------------------------------------------------------

    def on_done(self, done: Done) -> None:
        """An engine has judged: the verdict, or the late score of a part that has one already."""
        _, product = self._frames.get(done.key, (None, ""))
        frame = self._release(done.key)
        if self.observer is not None:
            self.observer.inspected(product, done)
        camera = done.key.camera
        if not self._settle(done.key, self.watch.ruled(camera, done.verdict), frame) and frame is not None:
            self._announce_late(done, frame)
        if product in self.engines:
            self.watch.feed(camera, self.engines[product].pipeline, done.verdict)

    def on_time(self, now_ns: int) -> None:
        """Whatever has reached its deadline is LATE now, whether its engine works on it or not."""
        for key in self.book.due(now_ns):
            frame, product = self._frames.get(key, (None, ""))
            if product in self.engines:
                self.engines[product].postpone(key)
            if self.observer is not None:
                self.observer.late(product, self.book.in_flight[key].arrived_ns)
            self._settle(key, Verdict(Outcome.REJECT, Reason.LATE), frame)

    def give_up(self, reason: Reason) -> None:
        """Settle everything in flight: the daemon is about to end."""
        for key in list(self.book.in_flight):
            self._settle(key, Verdict(Outcome.REJECT, reason))

    def recover(self, pending: list[PartKey]) -> None:
        """Parts accepted by an earlier run that never got a verdict: they get theirs, once."""
        for key in pending:
            self._settle(key, missing_verdict())

    def _settle(self, key: PartKey, verdict: Verdict, frame: RawFrame | None = None) -> bool:
        """Speak for a part, if nobody has. Journal first, then the permit, then the result."""
        entry = self.book.settle(key)
        if entry is None:
            return False
        decided_ns = time_ns()
        self._records.journal.write(verdict_record(entry, verdict, decided_ns))
        header = self._part_header(entry.key, entry.part_id, decided_ns)
        self._announcer.verdict(_permit_header(header, verdict), self._valid_ms(key.camera))
        # The total is taken as late as a message can carry it: behind the journal and the permit.
        total_ms = (monotonic_ns() - entry.arrived_ns) / 1e6
        if self.observer is not None:
            self.observer.decided(total_ms)
        verdict = replace(verdict, timings=replace(verdict.timings, total_ms=total_ms))
        header.update(capturedNs=entry.captured_ns, isSimulated=entry.is_simulated)
        self._announcer.result(encode_result(self._topic("result", key.camera), header, verdict))
        self._records.metrics.count_verdict(key.camera, verdict)
        self._record(header, verdict, frame)
        return True

    def _announce_missing(self, gap: Gap, decided_ns: int) -> None:
        key = PartKey(gap.camera, gap.epoch, gap.first)
        header = self._part_header(key, None, decided_ns)
        if gap.count > 1:
            header.update(seqFrom=gap.first, seqTo=gap.last)
        verdict = missing_verdict()
        self._announcer.verdict(_permit_header(header, verdict), self._valid_ms(gap.camera))
        header.update(capturedNs=None, isSimulated=False)
        self._announcer.result(encode_result(self._topic("result", gap.camera), header, verdict))
        self._records.metrics.count_verdict(gap.camera, verdict, gap.count)

    def _announce_late(self, done: Done, frame: RawFrame) -> None:
        key = done.key
        header = self._part_header(key, frame.part_id, time_ns())
        header.update(capturedNs=frame.captured_ns, isSimulated=frame.is_simulated)
        self._announcer.result(encode_result(self._topic("late", key.camera), header, done.verdict))

    def _valid_ms(self, camera: str) -> int:
        known = self._config.cameras.get(camera)
        return known.valid_ms if known else _UNKNOWN_VALID_MS

    def _topic(self, kind: str, camera: str) -> str:
        return f"{kind}/{self._config.line}/{camera}"

    def _part_header(self, key: PartKey, part_id: str | None, decided_ns: int) -> Header:
        part = {"camera": key.camera, "epoch": key.epoch, "seq": key.seq, "partId": part_id}
        return {"run": self._run, **part, "decidedNs": decided_ns}

    def _record(self, header: Header, verdict: Verdict, frame: RawFrame | None) -> None:
        recorder = self._records.recorder
        if recorder is None or frame is None or verdict.reason is None or verdict.reason in _NOT_RECORDED:
            return
        facts = verdict_fields(verdict)
        kept = {key: facts[key] for key in ("outcome", "reason", "score", "limit", "regions", "engine")}
        kept |= {"shape": list(frame.shape[:2]), "encoding": frame.encoding, "pixelFormat": frame.pixel_format}
        pictures = {name: data for name, data in (verdict.pictures or {}).items() if name != "frame"}
        encode: Callable[[], tuple[str, bytes]] = lambda: lossless(frame)  # noqa: E731
        recorder.submit(Reject({**header, **kept}, frame.payload.nbytes, encode, pictures))


def _cost(frame: RawFrame) -> int:
    """What a waiting frame takes of the byte budget: a flood of tiny frames must not be free."""
    return frame.payload.nbytes + _FRAME_OVERHEAD_BYTES


def deadline_ns(deadline_ms: int) -> int:
    """From arrival to the moment LATE is said: a little before the deadline, so that it leaves by it."""
    return deadline_ms * 1_000_000 - min(_LATE_MARGIN_NS, deadline_ms * 100_000)


def _permit_header(header: Header, verdict: Verdict) -> Header:
    """A permit message is small: who, and the outcome."""
    kept: Header = {
        key: header[key] for key in ("epoch", "seq", "camera", "partId", "seqFrom", "seqTo") if key in header
    }
    return {**kept, "outcome": verdict.outcome.value, "reason": verdict.reason.value if verdict.reason else None}
