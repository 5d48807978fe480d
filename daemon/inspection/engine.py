"""An engine's own thread: frames wait here, one is inspected at a time.

The loop submits jobs and never waits. The earliest deadline is first as long as all that wait can be judged in time;
where they cannot, cameras take turns, each with its oldest frame: one that floods makes its own parts late, not those
of the others. Parts whose deadline has passed step behind all fresh ones: their late score is
worth having, but not at the price of the next deadline.
"""

from __future__ import annotations

import socket
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import SimpleQueue
from time import monotonic_ns

from daemon.inspection.pipeline import Pipeline
from daemon.types import PartKey, RawFrame, Verdict


@dataclass(frozen=True)
class Job:
    """A frame to inspect; when it arrived and when its verdict is due (monotonic clock)."""

    key: PartKey
    frame: RawFrame
    product: str
    arrived_ns: int
    deadline_ns: int


@dataclass(frozen=True)
class Done:
    key: PartKey
    verdict: Verdict


class DoneBox:
    """Where engines put what they have done, from their threads, and the loop takes it; `fileno` wakes the loop."""

    def __init__(self) -> None:
        self._done: deque[Done] = deque()
        self._inside, self._outside = socket.socketpair()
        self._inside.setblocking(False)
        self._outside.setblocking(False)

    def put(self, done: Done) -> None:
        self._done.append(done)
        self.wake()

    def wake(self) -> None:
        """Let the loop look around, from any thread."""
        with suppress(BlockingIOError):  # the loop has thousands of bytes to wake up by already
            self._outside.send(b"\0")

    def take(self) -> list[Done]:
        with suppress(BlockingIOError):
            while self._inside.recv(4096):
                pass
        return [self._done.popleft() for _ in range(len(self._done))]

    def fileno(self) -> int:
        return self._inside.fileno()


class Engine:
    """A pipeline with its thread. `report` is called on that thread with each Done."""

    def __init__(self, pipeline: Pipeline, report: Callable[[Done], None]) -> None:
        self.pipeline = pipeline
        self._report = report
        self._fresh: OrderedDict[str, OrderedDict[PartKey, Job]] = OrderedDict()  # by camera, whose turn it is first
        self._late: OrderedDict[PartKey, Job] = OrderedDict()
        self._lock = threading.Lock()
        # One token a job, so that the thread sleeps in C: a Condition would hand two locks to and fro at each frame.
        self._tokens: SimpleQueue[None] = SimpleQueue()
        self._stopping = False
        self._busy_since_ns: int | None = None
        self._service_ns = 0  # how long the last frame took
        self._thread = threading.Thread(target=self._work, name="inspectd-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job) -> None:
        with self._lock:
            self._fresh.setdefault(job.key.camera, OrderedDict())[job.key] = job
        self._tokens.put(None)

    def withdraw(self, key: PartKey) -> bool:
        """Take a waiting frame out; False if it was not waiting (it is being inspected, or done)."""
        with self._lock:
            return (self._pop_fresh(key) or self._late.pop(key, None)) is not None

    def is_waiting(self, key: PartKey) -> bool:
        with self._lock:
            return key in self._fresh.get(key.camera, ()) or key in self._late

    def postpone(self, key: PartKey) -> None:
        """Let a waiting frame, whose verdict is out already, step behind every fresh one."""
        with self._lock:
            job = self._pop_fresh(key)
            if job is not None:
                self._late[key] = job

    def oldest_late(self) -> PartKey | None:
        with self._lock:
            return next(iter(self._late), None)

    def take_waiting(self) -> list[tuple[Job, bool]]:
        """Everything that waits, as it arrived, with whether it is late; for the engine that takes over."""
        with self._lock:
            fresh = sorted((job for waiting in self._fresh.values() for job in waiting.values()), key=_by_arrival)
            taken = [(job, False) for job in fresh] + [(job, True) for job in self._late.values()]
            self._fresh.clear()
            self._late.clear()
        return taken

    def busy_ms(self, now_ns: int) -> float:
        """How long the frame at work has been at work; 0 when idle."""
        since = self._busy_since_ns
        return 0.0 if since is None else (now_ns - since) / 1e6

    def stop(self, timeout_s: float) -> bool:
        """Finish the frame at work and end the thread; False if it does not end in time."""
        self._stopping = True
        self._tokens.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            started_ns = self._busy_since_ns = monotonic_ns()
            verdict = self.pipeline.inspect(job.frame, job.product)
            self._busy_since_ns = None
            self._service_ns = monotonic_ns() - started_ns
            timings = replace(verdict.timings, queue_ms=(started_ns - job.arrived_ns) / 1e6)
            self._report(Done(job.key, replace(verdict, timings=timings)))

    def _next(self) -> Job | None:
        while True:
            self._tokens.get()
            if self._stopping:
                return None
            with self._lock:
                self._pass_over_the_hopeless()
                if self._fresh:
                    return self._take_fresh()
                if self._late:  # else its job was withdrawn
                    return self._late.popitem(last=False)[1]

    def _take_fresh(self) -> Job:
        """By deadline while all that wait can be judged in time, else the oldest of the camera whose turn it is."""
        all_done_ns = monotonic_ns() + self._service_ns * sum(map(len, self._fresh.values()))
        camera = next(iter(self._fresh))
        if all(all_done_ns <= next(reversed(waiting.values())).deadline_ns for waiting in self._fresh.values()):
            camera = min(self._fresh, key=lambda name: next(iter(self._fresh[name].values())).deadline_ns)
        waiting = self._fresh.pop(camera)
        job = waiting.popitem(last=False)[1]
        if waiting:
            self._fresh[camera] = waiting  # behind the others
        return job

    def _pass_over_the_hopeless(self) -> None:
        """Frames that cannot be judged in time step behind those that can: else, once the queue is a deadline
        long, every frame would run out of time while it is at work."""
        hopeless_ns = monotonic_ns() + self._service_ns
        for camera, waiting in list(self._fresh.items()):
            while waiting and (job := next(iter(waiting.values()))).deadline_ns < hopeless_ns:
                self._late[job.key] = waiting.pop(job.key)
            if not waiting:
                del self._fresh[camera]

    def _pop_fresh(self, key: PartKey) -> Job | None:
        waiting = self._fresh.get(key.camera)
        if waiting is None:
            return None
        job = waiting.pop(key, None)
        if not waiting:
            del self._fresh[key.camera]
        return job


def _by_arrival(job: Job) -> int:
    return job.arrived_ns
