"""Another engine for the same products while the line runs: load and prove it, compare it, let it take over, watch it.

Loading runs on a thread of its own; everything that touches the line happens in the loop, in `step`. Whatever fails,
the old engine stays: before the new one took over nothing has changed, and in its first frames the old one is kept
loaded and comes back by itself. The links on disk follow, so that a restart finds the engine that was at work.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic_ns

import numpy as np

from daemon.dispatch import Dispatcher
from daemon.errors import InspectError, UsageError
from daemon.inspection.engine import Done, DoneBox, Engine, Job
from daemon.inspection.pipeline import Pipeline
from daemon.inspection.shadow import Comparison, Ear
from daemon.loading import forget_engine, tell_engine
from daemon.record.metrics import Metrics
from daemon.shelf import PREVIOUS, linked_version, parse_engine, previous_version, put_to_work, take_back
from daemon.types import Header, Reason

log = logging.getLogger("inspectd.swap")

WATCHED = 20  # frames in which the new engine has to show itself
_MOST_LATE = 3  # of them
_MOST_TOTALS = 10_000
_STOP_S = 5.0

Load = Callable[[Path], Pipeline]


@dataclass
class _Swap:
    """One swap from request to end. `stage`: LOADING, SHADOWING, WATCHING."""

    name: str
    version: str
    client: bytes | None  # who waits for the answer
    old: Engine
    products: list[str]
    comparison: Comparison
    ear: Ear
    stage: str = "LOADING"
    new: Engine | None = None
    error: str | None = None
    is_comparing: bool = False  # the new engine is at a frame
    totals_ms: deque[float] = field(default_factory=lambda: deque(maxlen=_MOST_TOTALS))
    previous: str | None = None  # the engine before the old one, by its link
    took_over_ns: int = 0
    watched: int = 0
    late: int = 0


class Swapper:
    """At most one swap at a time. Every method but the loading runs in the loop; it is the dispatcher's observer."""

    def __init__(self, engines: Path, dispatcher: Dispatcher, metrics: Metrics, done: DoneBox, load: Load) -> None:
        self._engines = engines
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._done = done
        self._load = load
        self._swap: _Swap | None = None
        self._answers: list[tuple[bytes, Header]] = []
        self._threads: list[threading.Thread] = []  # loading one engine, retiring others
        self.last: Header | None = None  # how the last swap ended
        self.changed = False  # another engine judges since the loop last looked

    # -- requests ----------------------------------------------------------------------------------

    def activate(self, engine: str, shadow: int, client: bytes | None) -> None:
        """Begin; the answer comes from `answers` when the new engine is at work, or why not. Raises UsageError."""
        name, version = parse_engine(engine)
        self._demand_idle()
        self._begin(name, version, shadow, client)

    def roll_back(self, name: str | None, client: bytes | None) -> None:
        """To the engine before: at once while it is still loaded, else like an activation. Raises UsageError."""
        name = name or self._only_name()
        swap = self._swap
        if swap is not None and swap.stage == "WATCHING" and swap.name == name:
            swap.client = client
            self._return("rolled back by command")
            return
        version = previous_version(self._engines, name)
        self._demand_idle()
        self._begin(name, version, 0, client)

    def _only_name(self) -> str:
        names = sorted({engine.pipeline.bundle.folder.parent.name for engine in self._dispatcher.engines.values()})
        if len(names) != 1:
            raise UsageError(f"found no engine named, wanted one of {', '.join(names)}: inspectd rollback NAME")
        return names[0]

    def _demand_idle(self) -> None:
        if self._swap is None:
            return
        if self._swap.stage != "WATCHING":
            swap = self._swap
            raise UsageError(f"{swap.name}/{swap.version} is {swap.stage.lower()}; wait for it (inspectd status)")
        self._end("active")  # a person who activates the next one has seen enough of this one

    def _begin(self, name: str, version: str, shadow: int, client: bytes | None) -> None:
        served = self._dispatcher.engines
        products = [product for product, engine in served.items() if engine.pipeline.bundle.folder.parent.name == name]
        if not products:
            names = sorted({engine.pipeline.bundle.folder.parent.name for engine in served.values()})
            raise UsageError(f"found no engine {name!r} at work, wanted one of {', '.join(names)}")
        old = served[products[0]]
        if old.pipeline.bundle.folder.name == version:
            raise UsageError(f"{name}/{version} is at work already")
        swap = _Swap(name, version, client, old, products, Comparison(shadow), Ear(self._done))
        self._swap = swap
        self._dispatcher.observer = self
        log.info("swap engine=%s/%s stage=loading shadow=%d", name, version, shadow)
        self._spawn("inspectd-loading", lambda: self._open(swap))

    def _open(self, swap: _Swap) -> None:
        """On a thread of its own: verify, open, replay the golden frames; the loop hears of it."""
        try:
            pipeline = self._load(self._engines / swap.name / swap.version)
            engine = Engine(pipeline, swap.ear.report)
            engine.start()
            swap.new = engine
        except InspectError as error:
            swap.error = str(error)
        except Exception as error:
            log.exception("swap engine=%s/%s", swap.name, swap.version)
            swap.error = f"{type(error).__name__}: {error}"
        self._done.wake()

    # -- the loop ----------------------------------------------------------------------------------

    def step(self, now_ns: int, hang_ms: int) -> None:
        """Go on where the swap waits for something that has happened."""
        swap = self._swap
        if swap is None:
            return
        self._compare(swap)
        if swap.stage == "LOADING" and swap.new is not None:
            self._look_over(swap, swap.new)
        if swap.new is not None and swap.is_comparing and swap.new.busy_ms(now_ns) > hang_ms:
            swap.error = f"it has been at one frame for more than {hang_ms} ms"
        if swap.error is not None:
            self._fail(swap.error)
        elif swap.stage == "SHADOWING" and swap.comparison.is_done and not swap.is_comparing:
            self._take_over(swap)

    def _look_over(self, swap: _Swap, new: Engine) -> None:
        # One that only frames name, and no camera, may go: else no rollback could undo a product that was added.
        unknown = (self._dispatcher.products & set(swap.products)) - set(new.pipeline.bundle.manifest.products)
        if unknown:
            swap.error = f"it does not know the product {', '.join(sorted(unknown))}, which is inspected here"
            return
        swap.stage = "SHADOWING"
        log.info("swap engine=%s/%s stage=shadowing", swap.name, swap.version)

    def _compare(self, swap: _Swap) -> None:
        while swap.ear.compared:
            done = swap.ear.compared.popleft()
            swap.is_comparing = False
            if done.verdict.reason is Reason.ENGINE_ERROR:
                swap.error = "it failed on a live frame; the log has the error"
            swap.comparison.add(done.key, done.verdict.outcome, is_new=True)

    def _take_over(self, swap: _Swap) -> None:
        assert swap.new is not None
        try:
            swap.previous = linked_version(self._engines, swap.name, PREVIOUS)
            put_to_work(self._engines, swap.name, swap.version)
        except InspectError as error:
            self._fail(str(error))
            return
        swap.stage = "WATCHING"
        swap.took_over_ns, swap.ear.is_live = monotonic_ns(), True  # before its first frame
        gained = set(swap.new.pipeline.bundle.manifest.products) - self._dispatcher.engines.keys()
        swap.products += sorted(gained)
        self._replace(swap.old, swap.new, swap.products)
        log.info("swap engine=%s/%s stage=watching", swap.name, swap.version)
        self._answer(swap, {"ok": True, "watched": WATCHED, **self._facts(swap)})

    def _replace(self, old: Engine, new: Engine, products: list[str]) -> None:
        known = new.pipeline.bundle.manifest.products
        self._dispatcher.replace([product for product in products if product in known], new)
        for lost in set(products) - set(known):  # no camera's own: a frame that names it is NOT_READY again
            log.warning("engine=%s does not know product=%s", new.pipeline.bundle.folder.name, lost)
            self._dispatcher.engines.pop(lost, None)
        forget_engine(self._metrics, old.pipeline.bundle)
        tell_engine(self._metrics, new.pipeline.bundle)
        self.changed = True

    # -- ends --------------------------------------------------------------------------------------

    def _fail(self, reason: str) -> None:
        """Before it took over: nothing has changed, and nothing does."""
        swap = self._swap
        assert swap is not None
        log.error("swap engine=%s/%s failed: %s: the old engine stays", swap.name, swap.version, reason)
        self._answer(swap, {"ok": False, "error": f"{swap.name}/{swap.version}: {reason}; the old engine stays"})
        self._close(swap, "failed", reason, swap.new)

    def _return(self, reason: str) -> None:
        """The old engine, which is still loaded, takes over again."""
        swap = self._swap
        assert swap is not None
        assert swap.new is not None
        log.error("swap engine=%s/%s returned: %s: the old engine is back", swap.name, swap.version, reason)
        self._replace(swap.new, swap.old, swap.products)
        self._relink(swap)
        version = swap.old.pipeline.bundle.folder.name
        self._answer(swap, {"ok": True, "engine": f"{swap.name}/{version}"})
        self._close(swap, "returned", reason, swap.new)

    def _relink(self, swap: _Swap) -> None:
        try:
            take_back(self._engines, swap.name, swap.old.pipeline.bundle.folder.name, swap.previous)
        except InspectError:
            log.exception("a restart will find the engine that failed")

    def _end(self, result: str) -> None:
        swap = self._swap
        assert swap is not None
        log.info("swap engine=%s/%s stage=%s", swap.name, swap.version, result)
        self._close(swap, result, None, swap.old)

    def _close(self, swap: _Swap, result: str, reason: str | None, leaves: Engine | None) -> None:
        self.last = {"result": result, "reason": reason, **self._facts(swap)}
        if swap.totals_ms:
            self._metrics.swap_p99_seconds.set(self.last["p99Ms"] / 1e3)
        for product in swap.products:
            self._metrics.engine_swaps.labels(product, result).inc()
        self._swap = None
        self._dispatcher.observer = None
        if leaves is not None:
            self._spawn("inspectd-retiring", lambda: _retire(leaves))

    def _spawn(self, name: str, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name=name, daemon=True)
        thread.start()
        self._threads = [each for each in self._threads if each.is_alive()] + [thread]

    def on_hang(self, hung: Engine) -> None:
        """The process is about to end: a restart must not find the engine that hung in its first frames."""
        swap = self._swap
        if swap is not None and swap.stage == "WATCHING" and hung is swap.new:
            log.error(
                "swap engine=%s/%s hung in its first frames: the old engine is current again", swap.name, swap.version
            )
            self._relink(swap)

    def stop(self, timeout_s: float) -> None:
        """The daemon ends: whoever loads or leaves may finish, and the engine that the dispatcher does not know."""
        for thread in self._threads:
            thread.join(timeout_s)
        swap = self._swap
        if swap is not None and swap.new is not None:
            for engine in {swap.old, swap.new} - set(self._dispatcher.engines.values()):
                engine.stop(timeout_s)

    # -- what is told ------------------------------------------------------------------------------

    def answers(self) -> list[tuple[bytes, Header]]:
        """What to send to whom since the last call."""
        answers, self._answers = self._answers, []
        return answers

    def status(self) -> Header | None:
        """The swap under way, else how the last one ended."""
        return {"result": self._swap.stage.lower(), **self._facts(self._swap)} if self._swap else self.last

    def _answer(self, swap: _Swap, header: Header) -> None:
        if swap.client is not None:
            self._answers.append((swap.client, header))
            swap.client = None

    def _facts(self, swap: _Swap) -> Header:
        p99 = float(np.percentile(swap.totals_ms, 99)) if swap.totals_ms else None
        return {
            "engine": f"{swap.name}/{swap.version}", "from": swap.old.pipeline.bundle.folder.name,
            "partsDuring": len(swap.totals_ms), "p99Ms": p99, "comparison": swap.comparison.header(),
        }  # fmt: skip

    # -- dispatch.Observer -------------------------------------------------------------------------

    def submitted(self, job: Job) -> None:
        """A live frame went to its engine: let the new one look at it too, if it is idle."""
        swap = self._swap
        if swap is None or swap.stage != "SHADOWING" or swap.is_comparing or job.product not in swap.products:
            return
        if swap.new is not None and not swap.comparison.is_done:
            swap.is_comparing = True
            swap.new.submit(job)

    def inspected(self, product: str, done: Done) -> None:
        swap = self._swap
        if swap is None or product not in swap.products:
            return
        if swap.stage == "SHADOWING":
            swap.comparison.add(done.key, done.verdict.outcome, is_new=False)
        elif swap.stage == "WATCHING" and swap.new is not None and self._is_of(swap.new, done):
            self._watch(swap, failed=done.verdict.reason is Reason.ENGINE_ERROR)

    @staticmethod
    def _is_of(engine: Engine, done: Done) -> bool:
        return done.verdict.engine is not None and done.verdict.engine.digest == engine.pipeline.bundle.digest

    def _watch(self, swap: _Swap, *, failed: bool) -> None:
        swap.watched += 1
        if failed:
            self._return(f"it failed on frame {swap.watched} of its first {WATCHED}")
        elif swap.watched >= WATCHED:
            self._end("active")

    def late(self, product: str, arrived_ns: int) -> None:
        swap = self._swap
        if swap is None or swap.stage != "WATCHING" or product not in swap.products or arrived_ns < swap.took_over_ns:
            return
        swap.late += 1
        if swap.late >= _MOST_LATE:
            self._return(f"{swap.late} of its first {WATCHED} frames were late")

    def decided(self, total_ms: float) -> None:
        if self._swap is not None:
            self._swap.totals_ms.append(total_ms)


def _retire(engine: Engine) -> None:
    """Let its frame at work be finished, then give back what it holds."""
    if engine.stop(_STOP_S):
        engine.pipeline.backend.close()
    else:
        log.error("an engine that was replaced does not end; its memory is freed at the next start")
