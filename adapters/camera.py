"""`inspectd camera`: one process that brings one camera's pictures to the daemon, and keeps at it.

A source that goes away is opened again, after rests of up to ten seconds, and a daemon connected to again.
Neither ends the process: only SIGTERM does, the end of a replay, or a fault that trying again cannot mend.
"""

from __future__ import annotations

import logging
import signal
import time
from pathlib import Path

import click
import zmq

from adapters.feed import Encoding, Feed
from adapters.genicam import GenICam, load_aravis
from adapters.simulate import addresses_of
from adapters.sources import (
    Captured,
    Device,
    Folder,
    PictureLostError,
    Rtsp,
    Source,
    SourceEndedError,
    SourceError,
    Video,
    without_password,
)
from adapters.trigger import Request, Trigger
from daemon.config import load_config
from daemon.errors import DataError, UsageError
from daemon.keys import load_peer_file
from daemon.line.notify import notify, watchdog_interval_s

log = logging.getLogger("inspectd.camera")

_FIRST_REST_S, _LONGEST_REST_S = 0.5, 10.0
_STEP_MS = 20
_STALE_NS = 250_000_000  # a trigger that waited longer shows another part
_LAST_ANSWERS_S = 2.0
_ROOM_S = 0.05  # less than what cameras on a line have between two pictures, or not much more
_SILENT_S = 30.0
_REPORT_S = 60.0


class CameraProcess:
    """`run` returns when the source has ended, `count` pictures were taken, or `stop` was called."""

    def __init__(self, source: Source, feed: Feed, trigger: Trigger | None = None, count: int | None = None) -> None:
        self._source, self._feed, self._trigger, self._left = source, feed, trigger, count
        self._is_stopping = False
        self._rest_s = _FIRST_REST_S
        self._due_ns = 0
        self._looked_ns = 0  # when requests were last looked for
        self._silent_s = 0.0  # when a source that gives nothing is told next
        self._report_s = time.monotonic() + _REPORT_S
        self._watchdog_s, self._next_watchdog_s = watchdog_interval_s(), 0.0
        self._poller = zmq.Poller()
        self._poller.register(feed.socket, zmq.POLLIN)
        if trigger is not None:
            self._poller.register(trigger.socket, zmq.POLLIN)

    def stop(self, *_: object) -> None:
        self._is_stopping = True

    def run(self) -> None:
        notify("READY=1", "STATUS=opening the source")
        while not self._is_stopping:
            try:
                self._looked_ns = time.monotonic_ns()
                self._source.open()
                log.info("source open")
                self._due_ns = time.monotonic_ns()
                self._silent_s = time.monotonic() + _SILENT_S
                while not self._is_stopping:
                    self._go_on()
            except SourceEndedError as error:
                log.info("%s", error)
                break
            except SourceError as error:
                log.warning("source lost, tried again in %.1f s: %s", self._rest_s, error)
                notify(f"STATUS=source lost: {error}")
                self._source.close()
                self._rest()
            finally:
                self._source.close()
        self._hear_out()

    # -- one picture after the other ----------------------------------------------------------------

    def _go_on(self) -> None:
        """Up to the next picture, or a step of waiting for it."""
        request = None
        if self._trigger is not None:
            request = self._next_request(self._trigger)
            if request is None:
                self._pump(0 if self._source.idle() else _STEP_MS)
                return
        elif self._source.is_replay and not self._is_due():
            return
        self._take(request)
        self._pump(0)

    def _is_due(self) -> bool:
        """Whether a replay's next picture is. It waits for the daemon, and does not hurry afterwards."""
        wait_ms = (self._due_ns - time.monotonic_ns()) / 1e6
        if not self._feed.has_room():
            self._pump(_STEP_MS)
            return False
        if wait_ms > 0:
            self._pump(min(wait_ms, _STEP_MS))
            return False
        period_ns = int(1e9 / (self._source.rate or 1.0))
        self._due_ns = max(self._due_ns + period_ns, time.monotonic_ns() - period_ns)
        return True

    def _take(self, request: Request | None) -> None:
        """Read a picture and send it. A request's picture that does not come leaves a number out."""
        try:
            captured = self._source.read()
        except PictureLostError as error:
            log.warning("%s", error)
            self._feed.skip()
            self._fail(request, str(error))
            return
        except (SourceError, SourceEndedError) as error:
            if request is not None:
                self._feed.skip()
            self._fail(request, str(error))
            raise
        if captured is not None:
            self._rest_s = _FIRST_REST_S
            self._silent_s = time.monotonic() + _SILENT_S
            self._send(captured, request)
        elif request is not None:
            self._feed.skip()
            self._fail(request, "no picture came")
        elif time.monotonic() >= self._silent_s:
            self._silent_s = time.monotonic() + _SILENT_S
            log.warning("the source is open and gives no pictures; does it wait for a trigger of its own?")

    def _send(self, captured: Captured, request: Request | None) -> None:
        self._wait_for_room()
        seq = self._feed.seq
        part_id = request.part_id if request else None
        has_left = self._feed.send(captured, is_simulated=self._source.is_replay, part_id=part_id)
        if not has_left:
            self._fail(request, "the daemon is away, or takes no more frames now")
        elif request is not None and self._trigger is not None:
            fields = {"epoch": self._feed.epoch, "seq": seq, "capturedNs": captured.captured_ns}
            self._trigger.answer(request, fields)
        if self._left is not None:
            self._left -= 1
            self._is_stopping |= self._left <= 0

    def _wait_for_room(self) -> None:
        """An answer that is a little late must cost no picture."""
        until = time.monotonic() + _ROOM_S
        while not self._feed.has_room() and self._feed.is_connected and time.monotonic() < until:
            self._poller.poll(1)
            self._feed.hear()

    # -- triggers -----------------------------------------------------------------------------------

    def _next_request(self, trigger: Trigger) -> Request | None:
        """A request to serve now. Those that waited too long are told so; their parts are missing."""
        now_ns = time.monotonic_ns()
        waited_ns, self._looked_ns = now_ns - self._looked_ns, now_ns
        if waited_ns > _STALE_NS:
            self._turn_away(f"the source did not answer for {waited_ns / 1e9:.1f} s, and the part has gone by")
        return trigger.next()

    def _turn_away(self, error: str) -> None:
        waiting = []  # who is answered may ask again at once, and is not meant
        while self._trigger is not None and (request := self._trigger.next()) is not None:
            waiting.append(request)
        for late in waiting:
            self._feed.skip()
            self._fail(late, error)

    def _fail(self, request: Request | None, error: str) -> None:
        if request is not None and self._trigger is not None:
            log.warning("no picture for part %s: %s", request.part_id or "-", error)
            self._trigger.fail(request, error)

    # -- waiting ------------------------------------------------------------------------------------

    def _pump(self, timeout_ms: float) -> None:
        """Hear the daemon for so long, and see to what is due once in a while."""
        self._poller.poll(timeout_ms)
        self._feed.hear()
        now_s = time.monotonic()
        if self._watchdog_s is not None and now_s >= self._next_watchdog_s:
            self._next_watchdog_s = now_s + self._watchdog_s
            notify("WATCHDOG=1")
        if now_s >= self._report_s:
            self._report_s = now_s + _REPORT_S
            log.info("%s", self._feed.summary())
            notify(f"STATUS={self._feed.summary()}")

    def _rest(self) -> None:
        """Until the source is tried again; what is triggered meanwhile has no picture."""
        until = time.monotonic() + self._rest_s
        self._rest_s = min(2 * self._rest_s, _LONGEST_REST_S)
        while time.monotonic() < until and not self._is_stopping:
            self._turn_away("the source is not there")
            self._pump(_STEP_MS)

    def _hear_out(self) -> None:
        """The last answers, as far as they come."""
        notify("STOPPING=1")
        until = time.monotonic() + _LAST_ANSWERS_S
        while self._feed.waits and time.monotonic() < until:
            self._pump(_STEP_MS)


def open_source(text: str, rate: float | None, *, loop: bool, features: str, is_triggered: bool) -> Source:
    """The source that SOURCE names. Raises UsageError, DataError, DeviceError."""
    path = Path(text)
    if text.startswith("genicam:"):
        load_aravis()  # what is not installed does not come by waiting
        return GenICam(text.removeprefix("genicam:"), features, is_triggered=is_triggered)
    if features:
        raise UsageError(f"--features are for GenICam cameras, found source {without_password(text)}")
    if text.startswith(("rtsp://", "rtsps://")):
        return Rtsp(text)
    if text.isdigit() or text.startswith("/dev/"):
        return Device(f"/dev/video{text}" if text.isdigit() else text)
    if path.is_dir():
        return Folder(path, rate or 10.0, loop=loop)
    if path.is_file():
        return Video(path, rate, loop=loop)
    raise DataError(
        f"{text}: is not there; wanted a folder of images, a video file, /dev/videoN or N, rtsp://HOST/..., or "
        "genicam:NAME (genicam: for the first that is found)"
    )


def _daemon_of(config_path: Path | None, line: str | None, address: str | None) -> tuple[str, str]:
    """Line and address, from the daemon's own configuration where that is at hand."""
    if config_path is not None:
        config = load_config(config_path)
        line, address = line or config.line, address or addresses_of(config).frames
    if line is None or address is None:
        raise UsageError("wanted --line NAME and --daemon tcp://HOST:PORT, or --config with the daemon's config.yaml")
    return line, address


@click.command("camera")
@click.argument("source", envvar="INSPECTD_SOURCE")
@click.option("--camera", required=True, help="This camera's name in the daemon's configuration.")
@click.option("--line", envvar="INSPECTD_LINE", help="The daemon's line.")
@click.option(
    "--daemon",
    "address",
    envvar="INSPECTD_DAEMON",
    help="The daemon's input of kind router, e.g. tcp://192.168.10.2:5550",
)
@click.option("--config", "config_path", type=click.Path(path_type=Path), help="In place of --line and --daemon.")
@click.option("--peer", type=click.Path(path_type=Path), help="This camera's key file (inspectd keygen peer).")
@click.option(
    "--rate", type=click.FloatRange(0, min_open=True), help="Of a replay, a second; folder 10, video its own."
)
@click.option("--once", is_flag=True, help="End a replay with its last picture; default: from the beginning again.")
@click.option("--count", type=click.IntRange(1), help="End after so many pictures.")
@click.option(
    "--encoding", type=click.Choice(["raw", "jpeg", "png"]), default="raw", show_default=True, help="As sent."
)
@click.option("--quality", type=click.IntRange(1, 100), default=95, show_default=True, help="Of --encoding jpeg.")
@click.option("--gray", is_flag=True, help="Send one channel of a colour source.")
@click.option("--product", help="Which engine judges; default: the camera's in the daemon's configuration.")
@click.option("--trigger", "trigger_address", help="Take pictures on request: ipc://PATH or tcp://127.0.0.1:PORT")
@click.option("--features", default="", help="GenICam features to set, e.g. 'ExposureTime=5000 Gain=2'")
def command(  # noqa: PLR0917 - click hands every option over
    source: str,
    camera: str,
    line: str | None,
    address: str | None,
    config_path: Path | None,
    peer: Path | None,
    rate: float | None,
    once: bool,  # noqa: FBT001 - click
    count: int | None,
    encoding: str,
    quality: int,
    gray: bool,  # noqa: FBT001 - click
    product: str | None,
    trigger_address: str | None,
    features: str,
) -> None:
    """Be a camera: send the pictures of SOURCE to the daemon until SIGTERM, whatever comes and goes.

    SOURCE is a folder of images, a video file, /dev/videoN (or N), rtsp://..., or genicam:NAME. It may stand in the
    variable INSPECTD_SOURCE instead, where no list of processes shows a password; so may INSPECTD_LINE and
    INSPECTD_DAEMON.
    """
    line, address = _daemon_of(config_path, line, address)
    keys = load_peer_file(peer) if peer else None
    opened = open_source(source, rate, loop=not once, features=features, is_triggered=trigger_address is not None)
    trigger = Trigger(trigger_address) if trigger_address else None
    feed = Feed(address, keys, (line, camera), Encoding(encoding, quality, gray), product)
    process = CameraProcess(opened, feed, trigger, count)
    handlers = {number: signal.signal(number, process.stop) for number in (signal.SIGTERM, signal.SIGINT)}
    log.info("camera=%s epoch=%s source=%s daemon=%s", camera, feed.epoch, without_password(source), address)
    try:
        process.run()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        feed.close()
        if trigger is not None:
            trigger.close()
        print(feed.summary())
