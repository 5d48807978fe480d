"""Start, loop, drain, stop. The only room that knows all three wings.

The loop owns every socket and every deadline. It never waits for an engine: engines report through a
queue and wake the loop by one byte. The start is ordered so that READY is only said when everything
that could refuse has been asked.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from uuid import uuid4

import zmq

from daemon.commands import Commands, set_state, tell_degraded
from daemon.config import Config
from daemon.dispatch import Dispatcher, Records
from daemon.errors import WireError
from daemon.inspection.engine import DoneBox, Engine
from daemon.keys import Keyring, load_keyring
from daemon.line.denials import Denials
from daemon.line.notify import notify, watchdog_interval_s
from daemon.line.permit import Outgoing, PermitDesk
from daemon.line.ports import Ports, receive
from daemon.line.wire import decode_header, encode_header
from daemon.loading import calm_the_interpreter, describe, open_engine, open_engines
from daemon.orders import Orders
from daemon.reception import Reception
from daemon.record.journal import Journal, hold_alone, last_run
from daemon.record.metrics import Metrics, serve_metrics
from daemon.record.recorder import Recorder
from daemon.records import replay, snapshot
from daemon.swap import Swapper
from daemon.types import Header, Reason, Refusal
from daemon.writer import Writer

log = logging.getLogger("inspectd.service")

EXIT_HUNG = 70
_MOST_WAIT_MS = 50  # the loop looks at hangs, watchdog and metrics at least this often
_MOST_AT_ONCE = 4  # messages taken from one socket before the others, and the deadlines, are looked at
_DRAIN_S = 30.0
_LINGER_MS = 500
_LOADING_S = 10.0  # for an engine that is just being loaded when the daemon ends


class Service:
    """One run of the daemon. `run` is called once, on the main thread."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.run_id = uuid4().hex
        self._metrics = Metrics()
        self._denials = Denials(lambda reason: self._metrics.auth_denied.labels(reason).inc())
        self._done = DoneBox()
        self._drain_until_s: float | None = None
        self._closers: list[Callable[[], Any]] = []
        self._watchdog_s = watchdog_interval_s()
        self._next_watchdog_s = 0.0

    # -- start -------------------------------------------------------------------------------------

    def run(self) -> int:
        """Start, loop until drained, stop. Returns the exit code."""
        handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._start()
            return self._loop()
        finally:
            self._stop()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _start(self) -> None:
        notify("STATUS=starting")
        config = self._config
        keyring = self._keyring()
        engines = open_engines(config, self._metrics, self._done.put)
        self._closers.append(hold_alone(config.ledger.dir))
        self._ports = Ports(config, keyring, self._denials)
        self._closers += [self._denials.close, lambda: self._ports.close(_LINGER_MS)]
        self._ports.prove_closed()
        if config.metrics is not None:
            self._closers.append(serve_metrics(self._metrics, config.metrics.address))
        self._desk = PermitDesk(self.run_id, describe(config, engines), config.permits.heartbeat_ms)
        recovered = self._open_books(engines)
        self._closers.append(lambda: [engine.stop(2) for engine in set(self.dispatcher.engines.values())])
        self._closers.append(lambda: self._swapper.stop(_LOADING_S))
        for engine in set(engines.values()):
            engine.start()
        calm_the_interpreter()
        set_state(self._desk, "RUNNING")
        notify("READY=1", "STATUS=inspecting")
        log.info("ready run=%s cameras=%s recovered_missing=%d", self.run_id, ",".join(config.cameras), recovered)

    def _open_books(self, engines: dict[str, Engine]) -> int:
        """Go on from where an earlier run ended: its parts without a verdict are MISSING. Returns how many."""
        config = self._config
        book = replay(last_run(config.ledger.dir))
        pending = list(book.in_flight)
        self._journal = journal = Journal(config.ledger.dir)
        self._orders = Orders(self._ports.control, journal)
        recorder = Recorder(config.recorder.dir, int(config.recorder.keep_gb * 1e9)) if config.recorder else None
        dispatcher = Dispatcher(config, self.run_id, book, Records(journal, self._metrics, recorder), self)
        dispatcher.engines = engines
        journal.begin(snapshot(book, self.run_id), time.time_ns())
        self._closers.append(journal.close)
        dispatcher.recover(pending)
        self._reception = Reception(config, self._ports, dispatcher, self._metrics)
        self._swapper = Swapper(
            config.engines.dir, dispatcher, self._metrics, self._done, lambda folder: open_engine(config, folder)
        )
        self._commands = Commands(
            config, self.run_id, desk=self._desk, dispatcher=dispatcher, swapper=self._swapper,
            drain=self._drain, books_fault=lambda: journal.fault,
        )  # fmt: skip
        # Only from here on may a stop speak for parts in flight: those of the earlier run have their verdict.
        self.dispatcher = dispatcher
        writer = Writer(config, journal, recorder, self._metrics)
        writer.start()
        self._closers.append(lambda: writer.stop(10))
        return len(pending)

    def _keyring(self) -> Keyring | None:
        needed = any(endpoint.uses_curve for _, endpoint in self._config.endpoints())
        return load_keyring(self._config.security.keys) if needed else None

    # -- loop --------------------------------------------------------------------------------------

    def _loop(self) -> int:
        ports, poller = self._ports, zmq.Poller()
        serve: dict[Any, Callable[[], bool | None]] = {
            **ports.doors(),
            ports.results: self._serve_subscription,
            ports.permits: self._serve_permit,
            ports.control: partial(self._orders.serve, self._commands.obey),
            **{socket: partial(self._reception.serve, socket) for socket in ports.inputs},
        }
        for served in (*serve, self._done.fileno()):
            poller.register(served, zmq.POLLIN)
        while not self._is_finished():
            for ready, _ in poller.poll(self._wait_ms()):
                if ready in serve:
                    self._serve_some(serve[ready])
            # Deadlines first: after a freeze of the whole process both are due, and the part is late.
            now_ns = time.monotonic_ns()
            self.dispatcher.on_time(now_ns)
            for done in self._done.take():
                self.dispatcher.on_done(done)
            self._swap(now_ns)
            self._beat(now_ns)
            self._look_around(now_ns)
            if self._is_hung(now_ns):
                return EXIT_HUNG
        return 0

    def _serve_some(self, serve: Callable[[], bool | None]) -> None:
        for _ in range(_MOST_AT_ONCE):
            try:
                if serve() is False:
                    return
            except zmq.Again:
                return
            except Exception:
                # One boundary for whatever a peer may send: its message is lost, nobody else's is.
                log.exception("a message was dropped")

    def _wait_ms(self) -> int:
        """Until the next thing that has a time, at most _MOST_WAIT_MS."""
        now_ns = time.monotonic_ns()
        soonest_ns = self._desk.next_tick_ns()
        deadline_ns = self.dispatcher.book.next_deadline_ns()
        if deadline_ns is not None:
            soonest_ns = min(soonest_ns, deadline_ns)
        return min(_MOST_WAIT_MS, max(0, -((now_ns - soonest_ns) // 1_000_000)))

    def _serve_subscription(self) -> bool:
        self._ports.serve_subscription()
        return True

    def _serve_permit(self) -> bool:
        message = receive(self._ports.permits, routed=True)
        if message is None:
            return False
        admitted = self._ports.doorman.admits(
            curve=self._config.permits.uses_curve,
            key=message.key,
            role="bridge",
            topic=f"permit/{self._config.line}",
        )
        try:
            header = decode_header(message.parts[-1]) if message.parts else {}
        except WireError as error:
            log.warning("bad permit message: %s", error)
            return True
        if admitted:
            self._send_permits(self._desk.receive(message.identity, header, time.monotonic_ns()))
        return True

    def _swap(self, now_ns: int) -> None:
        """Let a swap go on; bridges hear which engine judges, and whoever asked hears how it went."""
        self._swapper.step(now_ns, self._config.backend.hang_ms)
        if self._swapper.changed:
            self._swapper.changed = False
            engines = self.dispatcher.engines
            self._send_permits(self._desk.born_again(describe(self._config, engines)))
            self.dispatcher.watch.engines_changed({engine.pipeline.bundle.digest for engine in engines.values()})
        for client, answer in self._swapper.answers():
            self._orders.answer(client, answer)

    # -- the line's ears (dispatch.Announcer) ------------------------------------------------------

    def result(self, parts: list[bytes]) -> None:
        self._ports.results.send_multipart(parts, zmq.NOBLOCK)

    def verdict(self, header: Header, valid_ms: int) -> None:
        self._send_permits(self._desk.verdict(header, valid_ms, time.monotonic_ns()))

    def _beat(self, now_ns: int) -> None:
        """Heartbeats to the bridges, and the same state to subscribers: silence on either means trouble."""
        if now_ns >= self._desk.next_tick_ns():
            health = {"v": 1, "run": self.run_id, **self._desk.condition, "sentNs": time.time_ns()}
            self.result([f"health/{self._config.line}".encode(), encode_header(health)])
        self._send_permits(self._desk.tick(now_ns))

    def _send_permits(self, outgoing: list[Outgoing]) -> None:
        topic = f"permit/{self._config.line}".encode()
        for bridge, header in outgoing:
            try:
                self._ports.permits.send_multipart([bridge, topic, encode_header(header)], zmq.NOBLOCK)
            except zmq.ZMQError:
                # Gone, or it does not read: it must say HELLO again. Its lease runs out meanwhile.
                self._desk.forget(bridge)

    # -- watching, draining, stopping --------------------------------------------------------------

    def _look_around(self, now_ns: int) -> None:
        self._journal.tend(lambda: snapshot(self.dispatcher.book, self.run_id), time.time_ns())
        tell_degraded(self._desk, self.dispatcher, self._journal.fault)
        self._denials.tick()
        self._ports.greet(now_ns)
        self._metrics.queue_bytes.set(self.dispatcher.used_bytes)
        self._metrics.tell_state(self._desk.state)
        self._metrics.permit_bridges.set(self._desk.bridges)
        self._metrics.permits_unacked.set(self._desk.unacked)
        self._metrics.permit_lease_seconds.set(self._desk.quietest_s(now_ns))
        if self._watchdog_s is not None and now_ns / 1e9 >= self._next_watchdog_s:
            self._next_watchdog_s = now_ns / 1e9 + self._watchdog_s
            notify("WATCHDOG=1")

    def _is_hung(self, now_ns: int) -> bool:
        hang_ms = self._config.backend.hang_ms
        hung = [name for name, engine in self.dispatcher.engines.items() if engine.busy_ms(now_ns) > hang_ms]
        if hung:
            self._swapper.on_hang(self.dispatcher.engines[hung[0]])
            log.critical(
                "engine hung product=%s hang_ms=%d: the process ends and must be started again", hung[0], hang_ms
            )
            self.dispatcher.give_up(Reason.ENGINE_ERROR)
        return bool(hung)

    def _on_signal(self, number: int, _frame: object) -> None:
        log.info("signal=%s", signal.Signals(number).name)
        if self._drain_until_s is None and hasattr(self, "dispatcher"):
            self._drain()
        else:
            self._drain_until_s = 0.0  # a second signal does not wait

    def _drain(self) -> None:
        """Take in nothing more; the loop ends when every part in flight has its verdict."""
        self._drain_until_s = time.monotonic() + _DRAIN_S
        self.dispatcher.refuses = Refusal.DRAINING
        set_state(self._desk, "DRAINING")
        notify("STOPPING=1")

    def _is_finished(self) -> bool:
        if self._drain_until_s is None:
            return False
        return not self.dispatcher.book.in_flight or time.monotonic() >= self._drain_until_s

    def _stop(self) -> None:
        """Undo the start in reverse order."""
        if hasattr(self, "dispatcher"):
            self.dispatcher.give_up(Reason.LATE)
        while self._closers:
            try:
                self._closers.pop()()
            except Exception:
                log.exception("while stopping")


def run_service(config: Config) -> int:
    """Run the daemon to its end. A hung engine's thread cannot be joined, so the process leaves at once."""
    code = Service(config).run()
    if code == EXIT_HUNG:
        logging.shutdown()
        os._exit(code)
    return code
