"""Prometheus metrics, in a registry of their own. docs name the same list; a test holds them together."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from daemon import __version__
from daemon.errors import ConfigError
from daemon.types import Outcome, Reason, Verdict

log = logging.getLogger("inspectd.metrics")

_PATIENCE_S = 5.0  # a connection that asks for nothing holds a thread and a descriptor this long
_STATES = ("STARTING", "RUNNING", "PAUSED", "DRAINING")
_SWAP_RESULTS = ("active", "failed", "returned")
_STAGES = ("queue", "decode", "preprocess", "infer", "postprocess", "total")
_STAGE_BUCKETS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)


class Metrics:
    """Every metric the daemon has; the attributes are named as the metrics without their prefix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._told_state: str | None = None

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"inspectd_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"inspectd_{name}", text, labels, registry=self.registry)

        self.frames_accepted = counter("frames_accepted_total", "Frames taken in; each gets a verdict.", "camera")
        self.frames_refused = counter("frames_refused_total", "Frames not taken in.", "camera", "reason")
        self.verdicts = counter("verdicts_total", "Parts judged.", "camera", "outcome", "reason")
        self.sequence_gaps = counter("sequence_gaps_total", "Parts that never arrived.", "camera")
        self.deadline_missed = counter("deadline_missed_total", "Parts rejected as LATE.", "camera")
        self.stage_seconds = Histogram(
            "inspectd_stage_seconds",
            "Time a frame spends in a stage.",
            ["stage"],
            buckets=_STAGE_BUCKETS,
            registry=self.registry,
        )
        self.queue_bytes = gauge("queue_bytes", "Bytes of frames that wait or are inspected.")
        self.permit_bridges = gauge("permit_bridges", "PLC bridges that are heard.")
        self.permits_unacked = gauge("permits_unacked", "Verdicts that a bridge has not acknowledged.")
        self.permit_lease_seconds = gauge("permit_lease_seconds", "Time since the quietest bridge was last heard.")
        self.engine_info = gauge("engine_info", "Engines in use; the value is 1.", "product", "version", "digest")
        self.score_limit = gauge("score_limit", "Scores at or above it are rejected.", "product")
        self.drift_statistic = gauge("drift_statistic", "Evidence that scores have drifted; 1 is the alarm.", "camera")
        self.setup_statistic = gauge("setup_statistic", "Evidence of a changed set-up; 1 is the alarm.", "camera")
        self.camera_degraded = gauge("camera_degraded", "1 while the alarm lasts.", "camera", "kind")
        self.camera_alarms = counter("camera_alarms_total", "Alarms raised.", "camera", "kind")
        self.false_reject_rate_estimate = gauge(
            "false_reject_rate_estimate", "Share of DEFECT among judged parts, true defects among them.", "camera"
        )
        self.false_reject_rate_low = gauge("false_reject_rate_low", "Lower 95 % bound of it, at all times.", "camera")
        self.false_reject_rate_high = gauge("false_reject_rate_high", "Upper 95 % bound of it, at all times.", "camera")
        self.false_reject_rate_promised = gauge("false_reject_rate_promised", "The engine's bound95.", "product")
        self.engine_swaps = counter("engine_swaps_total", "Engines put to work while running.", "product", "result")
        self.swap_p99_seconds = gauge("swap_p99_seconds", "p99 from arrival to verdict during the last swap.")
        self.state = gauge("state", "1 for the state that the daemon is in.", "state")
        self.auth_denied = counter("auth_denied_total", "Peers or messages denied.", "reason")
        self.journal_lag_seconds = gauge("journal_lag_seconds", "Time since the journal was last brought to disk.")
        self.journal_fault = gauge("journal_fault", "1 while the journal cannot be written.")
        self.recorder_dropped = gauge("recorder_dropped_frames", "Rejected frames that were not recorded.")
        self.build_info = gauge("build_info", "The running version; the value is 1.", "version")
        self.build_info.labels(__version__).set(1)
        self.tell_state("STARTING")

    def know_camera(self, camera: str) -> None:
        """Its counters are there from the start: the first of anything is a rise then, and silence is a zero."""
        for counter in (self.frames_accepted, self.sequence_gaps, self.deadline_missed):
            counter.labels(camera)
        self.verdicts.labels(camera, Outcome.PASS.value, "")
        for reason in Reason:
            self.verdicts.labels(camera, Outcome.REJECT.value, reason.value)

    def know_product(self, product: str) -> None:
        """As know_camera."""
        for result in _SWAP_RESULTS:
            self.engine_swaps.labels(product, result)

    def tell_state(self, state: str) -> None:
        """Called in each round of the loop."""
        if state != self._told_state:
            self._told_state = state
            for known in dict.fromkeys((*_STATES, state)):
                self.state.labels(known).set(known == state)

    def count_verdict(self, camera: str, verdict: Verdict, parts: int = 1) -> None:
        """A verdict that went out, and how long its stages took."""
        reason = verdict.reason.value if verdict.reason else ""
        self.verdicts.labels(camera, verdict.outcome.value, reason).inc(parts)
        if verdict.reason is Reason.LATE:
            self.deadline_missed.labels(camera).inc()
        for stage in _STAGES:
            milliseconds = getattr(verdict.timings, f"{stage}_ms")
            if milliseconds is not None:
                self.stage_seconds.labels(stage).observe(milliseconds / 1e3)


def serve_metrics(metrics: Metrics, address: tuple[str, int]) -> Callable[[], None]:
    """Serve on `address`; returns what stops the server. Raises ConfigError where the address cannot be had."""
    server: Any
    try:
        server, thread = start_http_server(address[1], address[0], registry=metrics.registry)
    except OSError as error:
        place, advice = f"{address[0]}:{address[1]}", "stop what listens there, or choose another address"
        raise ConfigError("metrics.bind", [f"{place} cannot be bound: {error.strerror}; {advice}"]) from error

    # Whoever sends garbage or hangs up must not fill the log with traces, nor the process with threads.
    server.handle_error = lambda _request, peer: log.debug("metrics: a request of %s ended early", peer[0])
    server.RequestHandlerClass = type("Hurried", (server.RequestHandlerClass,), {"timeout": _PATIENCE_S})

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join(2)

    return stop
