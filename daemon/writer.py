"""Off the loop: bring the journal to disk, fill the ledger from it, record rejected frames.

Nothing here can stop inspection: what fails is logged, shown as a metric, and tried again.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from time import monotonic

from daemon.config import Config
from daemon.record.journal import Journal
from daemon.record.ledger import Ledger
from daemon.record.metrics import Metrics
from daemon.record.recorder import Recorder

log = logging.getLogger("inspectd.writer")

SYNC_S = 0.1
_FILL_EVERY = 5  # rounds of SYNC_S
_FORGET_EVERY_S = 3600.0
_TRIM_EVERY_S = 60.0


class Writer:
    """Owns the ledger; shares the journal and the recorder with the loop."""

    def __init__(self, config: Config, journal: Journal, recorder: Recorder | None, metrics: Metrics) -> None:
        self._config = config
        self._journal = journal
        self._recorder = recorder
        self._metrics = metrics
        self._stop = threading.Event()
        self._synced_s = monotonic()
        self._thread = threading.Thread(target=self._work, name="inspectd-writer", daemon=True)
        self._syncer = threading.Thread(target=self._keep_syncing, name="inspectd-sync", daemon=True)
        metrics.journal_lag_seconds.set_function(lambda: monotonic() - self._synced_s)
        metrics.journal_fault.set_function(lambda: float(journal.fault is not None))
        if recorder is not None:
            metrics.recorder_dropped.set_function(lambda: recorder.dropped)

    def start(self) -> None:
        self._thread.start()
        self._syncer.start()

    def stop(self, timeout_s: float) -> None:
        """A last round, then the end."""
        self._stop.set()
        self._thread.join(timeout_s)
        self._syncer.join(timeout_s)

    def _work(self) -> None:
        ledger: Ledger | None = None
        round_number, forgotten_s = 0, -_FORGET_EVERY_S
        trimmed_s = monotonic()
        stopping = False
        while not stopping:
            stopping = self._stop.wait(SYNC_S)
            if self._recorder is not None:
                self._recorder.write_waiting()
            round_number += 1
            if stopping or round_number % _FILL_EVERY == 0:
                due = monotonic() - forgotten_s >= _FORGET_EVERY_S
                forgotten_s = monotonic() if due else forgotten_s
                ledger = self._fill(ledger, forget=due)
            if monotonic() - trimmed_s >= _TRIM_EVERY_S:
                trimmed_s = monotonic()
                trim_heap()
        if ledger is not None:
            ledger.close()

    def _keep_syncing(self) -> None:
        """A thread of its own: encoding pictures or filling the ledger must not make a power cut cost more."""
        while not self._stop.wait(SYNC_S):
            self._sync()
        self._sync()

    def _sync(self) -> None:
        try:
            self._journal.sync()
        except OSError as error:
            log.error("journal cannot be brought to disk: %s", error)  # noqa: TRY400 - the trace adds nothing
        else:
            self._synced_s = monotonic()

    def _fill(self, ledger: Ledger | None, *, forget: bool) -> Ledger | None:
        """Fill the ledger, opened where it is not open yet; None where it has to be opened again."""
        try:
            ledger = ledger or Ledger(self._config.ledger.dir)
            ledger.fill()
            if forget:
                ledger.forget(self._config.ledger.keep_days)
        except Exception as error:
            # One boundary: whatever is wrong with the ledger, journal and recorder must go on.
            log.error("ledger is behind the journal, tried again: %s", error)  # noqa: TRY400 - the trace adds nothing
            return None
        return ledger


def trim_heap() -> bool:
    """Give free memory back to the system; False where there was none, or the C library cannot (musl).

    glibc keeps what a burst of waiting frames took: each burst that is larger than those before would stay for good.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return bool(trim is not None and trim(0))
