"""A flood of handshakes by strangers beside a camera at work: what it costs the camera's parts.

    python -m bench.strangers

A small engine (128x128, 500 rows), frames of 128x128 at 50 a second through the encrypted sockets; 5,000 handshakes,
eight of ten with a key that the daemon does not know, one without a key, one with the wrong server key, over all three
sockets; and a camera's key that speaks as another camera ten times a second. The strangers are a process of their own
that yields to the daemon (nice 10): on a line they are another machine. Milliseconds from the camera's send to the
result's arrival, before, during and after, in one run. A client without a key often hangs up before it is understood:
NO_KEY counts the others. Ends with 1 where a part has not exactly one verdict. Writes bench/results/strangers.json.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from urllib.request import urlopen

import click
import zmq

from adapters.line import Line, SentPart, disagreements
from bench.record import ROOT, origin, write_result
from daemon.keys import PeerFile, load_peer_file, make_peer
from daemon.line.sockets import connect
from daemon.line.wire import encode_frame
from tests.bundles import good_pixels, raw_frame
from tests.daemons import Site, free_port, make_site

SIZE_HW = (128, 128)
REASONS = ("UNKNOWN_KEY", "NO_KEY", "WRONG_SERVER_KEY", "FOREIGN_TOPIC")
OPEN_AT_ONCE = 100


def knock(addresses: list[str], strangers: list[PeerFile | None], intruder: PeerFile, count: int, rate: float) -> None:
    """The strangers' process: `count` handshakes, and a frame on a foreign topic with every tenth of a second."""
    os.nice(10)
    context: zmq.Context[Any] = zmq.Context()
    camera = connect(context, zmq.DEALER, addresses[0], intruder)
    opened: deque[zmq.Socket[bytes]] = deque()
    started, next_frame_s = time.monotonic(), 0.0
    for number in range(count):
        time.sleep(max(0.0, started + number / rate - time.monotonic()))
        socket = context.socket(zmq.DEALER)
        socket.linger = 0
        socket.set(zmq.RECONNECT_IVL, -1)  # one handshake each
        keys = strangers[number % len(strangers)]
        if keys is not None:
            socket.curve_publickey, socket.curve_secretkey = keys.publicKey.encode(), keys.secretKey.encode()
            socket.curve_serverkey = keys.serverKey.encode()
        socket.connect(addresses[number % len(addresses)])
        opened.append(socket)
        if len(opened) > OPEN_AT_ONCE:
            opened.popleft().close()
        if time.monotonic() >= next_frame_s:
            next_frame_s = time.monotonic() + 0.1
            camera.send_multipart(encode_frame("test", raw_frame(good_pixels(), epoch="intruder", seq=number)))
            while camera.poll(0):
                camera.recv_multipart()
    time.sleep(2)  # the last ones' handshakes end
    context.destroy(linger=0)


def stream(line: Line, rate: float, goes_on: Callable[[], bool]) -> list[SentPart]:
    """Good frames as long as asked for; gives their parts when each has its result."""
    first = len(line.parts)
    next_s = time.monotonic()
    while goes_on():
        seq = len(line.parts)
        line.send(raw_frame(good_pixels(seq % 50, SIZE_HW), camera=line.camera, epoch=line.epoch, seq=seq))
        next_s = max(next_s + 1 / rate, time.monotonic() - 1 / rate)
        line.pump(max(0.0, 1000 * (next_s - time.monotonic())))
    parts = [line.parts[seq] for seq in range(first, len(line.parts))]
    until = time.monotonic() + 10
    while not all(part.results and part.permits for part in parts) and time.monotonic() < until:
        line.pump(20)
    return parts


def figures(parts: list[SentPart]) -> dict[str, float]:
    spent = sorted(part.latency_ms for part in parts if part.latency_ms is not None)
    p99 = spent[min(len(spent) - 1, int(0.99 * len(spent)))]
    passed = sum(part.results[0]["outcome"] == "PASS" for part in parts if part.results)
    return {"frames": len(parts), "passed": passed, "p50Ms": median(spent), "p99Ms": p99, "maxMs": spent[-1]}


def denied(site: Site) -> dict[str, int]:
    text = urlopen(f"http://{site.config['metrics']['bind']}/metrics", timeout=10).read().decode()
    counted = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {
        reason: int(float(counted.get(f'inspectd_auth_denied_total{{reason="{reason}"}}', 0))) for reason in REASONS
    }


def run(site: Site, handshakes: int, rate: float, frames: float, seconds: float) -> dict[str, Any]:
    """The three phases on a running site."""
    good = site.peer()
    other = load_peer_file(make_peer(site.folder / "foreign", "stranger", ["camera"], ["*"]))
    unknown = other.model_copy(update={"serverKey": good.serverKey})
    mistaken = good.model_copy(update={"serverKey": other.publicKey})
    strangers: list[PeerFile | None] = [*[unknown] * 8, None, mistaken]
    arguments = (list(vars(site.addresses).values()), strangers, site.peer("cam2"), handshakes, rate)
    flood = multiprocessing.get_context("spawn").Process(target=knock, args=arguments)
    with site.line() as line:

        def measured(goes_on: Callable[[], bool]) -> dict[str, float]:
            return figures(stream(line, frames, goes_on))

        def until(end_s: float) -> Callable[[], bool]:
            return lambda: time.monotonic() < end_s

        stream(line, frames, until(time.monotonic() + 3))  # warm
        before = measured(until(time.monotonic() + seconds))
        flood.start()
        during = measured(flood.is_alive)
        counted = denied(site)
        after = measured(until(time.monotonic() + seconds))
        problems = disagreements(line, set())
    ratio = during["p99Ms"] / before["p99Ms"]
    phases = {"before": before, "during": during, "after": after}
    return {**phases, "p99DuringToBefore": ratio, "denied": counted, "problems": problems}


@click.command(help=__doc__)
@click.option("--handshakes", type=click.IntRange(10), default=5000, show_default=True)
@click.option("--rate", type=float, default=250.0, show_default=True, help="Handshakes a second.")
@click.option("--frames", type=float, default=50.0, show_default=True, help="Frames a second.")
@click.option("--seconds", type=float, default=20.0, show_default=True, help="Of the phases before and after.")
@click.option("--write/--no-write", default=True, show_default=True)
def main(handshakes: int, rate: float, frames: float, seconds: float, write: bool) -> None:  # noqa: FBT001 - click's way
    with tempfile.TemporaryDirectory(prefix="inspectd-strangers-") as name:
        site = make_site(Path(name), size=SIZE_HW, rows=500)
        site.config["metrics"] = {"bind": f"127.0.0.1:{free_port()}"}
        site.config["cameras"]["cam2"] = site.config["cameras"]["cam1"]
        make_peer(site.folder / "keys", "cam2", ["camera"], ["frame/test/cam2"])
        site.start()
        try:
            result = run(site, handshakes, rate, frames, seconds)
        finally:
            site.stop()
        told = site.log.count(" denied reason=")
    result = {"handshakes": handshakes, "handshakesPerS": rate, "framesPerS": frames, "denialLines": told, **result}
    print(result)
    if write:
        full = {**origin("pyzmq", "openvino"), "protocol": __doc__, **result}
        print(write_result("strangers.json", full).relative_to(ROOT))
    sys.exit(bool(result["problems"]))


if __name__ == "__main__":
    main()
