"""What the daemon does of what people order (orders.py): whatever stands in line/control.py's COMMANDS."""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic_ns

from daemon.config import Config
from daemon.dispatch import Dispatcher
from daemon.errors import UsageError
from daemon.line.control import Request
from daemon.line.notify import notify
from daemon.line.permit import PermitDesk
from daemon.loading import name_engines
from daemon.swap import Swapper
from daemon.types import Header, Refusal

log = logging.getLogger("inspectd.commands")


class Commands:
    """Every method runs in the loop. `drain` begins the end; `books_fault` is what keeps the daemon from writing."""

    def __init__(
        self, config: Config, run: str, *, desk: PermitDesk, dispatcher: Dispatcher, swapper: Swapper,
        drain: Callable[[], None], books_fault: Callable[[], str | None],
    ) -> None:  # fmt: skip
        self._config = config
        self._run = run
        self._desk = desk
        self._dispatcher = dispatcher
        self._swapper = swapper
        self._drain = drain
        self._books_fault = books_fault

    def obey(self, request: Request, client: bytes) -> Header | None:
        """The answer, or None where the swapper will give it."""
        command, is_draining = request.command, self._dispatcher.refuses is Refusal.DRAINING
        if command in ("activate", "rollback"):
            if is_draining:
                raise UsageError("the daemon is draining; try again when it runs again")
            if command == "activate":
                self._swapper.activate(request.engine or "", request.shadow, client)
            else:
                self._swapper.roll_back(request.engine, client)
            return None
        if request.marking is not None:
            # Nothing of the line changes: the journal's word on it, which orders.py writes, is all that is asked.
            if fault := self._books_fault():
                raise UsageError(f"found books that cannot be written ({fault}), wanted them to be; mark again then")
            return {"ok": True, "marked": len(request.marking.parts)}
        if command == "reset":
            self._dispatcher.watch.reset(request.camera)
        elif command == "pause" and not is_draining:
            self._dispatcher.refuses = Refusal.PAUSED
            set_state(self._desk, "PAUSED")
        elif command == "resume" and not is_draining:
            self._dispatcher.refuses = None
            set_state(self._desk, "RUNNING")
        elif command == "drain":
            self._drain()
        tell_degraded(self._desk, self._dispatcher, self._books_fault())
        return {"ok": True, **self._status()}

    def _status(self) -> Header:
        dispatcher = self._dispatcher
        return {
            **self._desk.condition,
            "run": self._run,
            "line": self._config.line,
            "cameras": list(self._config.cameras),
            "engines": name_engines(dispatcher.engines),
            "swap": self._swapper.status(),
            "permits": self._desk.summary(monotonic_ns()),
            "inFlight": len(dispatcher.book.in_flight),
            "queueBytes": dispatcher.used_bytes,
            "journalFault": self._books_fault(),
            "watch": dispatcher.watch.status(),
        }


def set_state(desk: PermitDesk, state: str) -> None:
    """Bridges, subscribers, systemd and the log hear of it."""
    desk.state = state
    notify(f"STATUS={state.lower()}")
    log.info("state=%s", state)


def tell_degraded(desk: PermitDesk, dispatcher: Dispatcher, books_fault: str | None) -> None:
    """What is wrong while parts are judged all the same: words with commas between, or nothing."""
    words = [*(["JOURNAL"] if books_fault is not None else []), *dispatcher.watch.words]
    desk.degraded = ",".join(words) or None
