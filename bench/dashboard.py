"""What the dashboard costs the line, and how soon a reject is on the screen.

    python -m bench.dashboard        (four cameras, 50 frames of 256x256 a second together; some 8 minutes)

Three arms in turns, on one daemon that never stops, the first seconds of each left out: `without` a dashboard; with one
that a client watches (`watched`: it takes every picture it is offered, as a browser on another machine does); with one
in a Chromium on this very machine (`browser`), at the lowest priority, for it renders in software here. The daemon's
times are from sending to hearing, through encrypted sockets, one part in 25 a reject; its p99 is taken over all rounds
of an arm. The engine is small (one convolution), so that the daemon's own part shows.
Screen: from a reject's verdict (its decidedNs) to its line in the list, and to its picture where no newer one overtook
it, both by the page's own clock. Writes bench/results/dashboard.json.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import click
import numpy as np
import zmq

from bench.record import ROOT, origin, write_result
from bench.streams import Listener, Part, Sent, figures, listening, stream
from daemon.line.sockets import connect
from daemon.line.wire import encode_frame
from tests.bundles import bad_pixels, good_pixels, raw_frame
from tests.daemons import Site, make_site
from tests.dashboards import PASSWORD, Shown, log_in, set_up

_CAMERAS = 4
_SIZE = (256, 256)
_REJECT_EVERY = 25
_PICTURES = 50
_WARM_S = 2.0
_SEEN = """() => {
  window.listed = {}; window.shown = {}
  new MutationObserver(() => {
    const now = Date.now()
    for (const each of document.querySelectorAll(".rejects button")) window.listed[each.dataset.part] ??= now
    for (const each of document.querySelectorAll("canvas[data-part]")) window.shown[each.dataset.part] ??= now
  }).observe(document.getElementById("main"), {subtree: true, attributes: true, childList: true})
}"""


@click.command()
@click.option("--rate", type=float, default=50.0, show_default=True, help="Frames a second, all cameras together.")
@click.option("--seconds", type=float, default=20.0, show_default=True, help="Of one arm in one round.")
@click.option("--rounds", type=click.IntRange(1), default=6, show_default=True)
@click.option("--watch", hidden=True, help="URL; the client of the arm `watched`, in a process of its own.")
def main(*, rate: float, seconds: float, rounds: int, watch: str | None) -> None:
    """Measure and write."""
    if watch:
        take_pictures(watch)
        return
    with tempfile.TemporaryDirectory(prefix="inspectd-dashboard-") as name:
        result = measure(Path(name), rate, seconds, rounds)
    made = origin("openvino", "pyzmq", "starlette", "uvicorn", "websockets")
    write_result("dashboard.json", {**made, "protocol": __doc__, "rate": rate, "seconds": seconds, **result})
    print(json.dumps(result["summary"], indent=1))


def measure(place: Path, rate: float, seconds: float, rounds: int) -> dict[str, Any]:
    site = make_site(place, size=_SIZE)
    site.config["cameras"] = {f"cam{number}": site.config["cameras"]["cam1"] for number in range(_CAMERAS)}
    site.config["results"].update(heatmap=True, frame_every_ms=200)
    site.config["queue_mb"] = 64
    shown = Shown(site, set_up(site))
    arms: dict[str, Callable[[Shown], Any]] = {"without": without, "watched": watched, "browser": in_browser}
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    site.start()
    try:
        with listening(site, site.peer()) as listener, sending(site) as send:
            for number in range(rounds):
                # Each round begins with another arm: what the machine does meanwhile must not meet always the same one.
                for arm in [*arms][number % len(arms) :] + [*arms][: number % len(arms)]:
                    found[arm].append(one_round(shown, listener, send, arms[arm], rate, seconds))
                    click.echo(f"round {number + 1} {arm}: p99 {found[arm][-1]['p99Ms']:.1f} ms", err=True)
    finally:
        site.stop()
    return {"rounds": found, "summary": summarise(found)}


def one_round(  # noqa: PLR0917 - all that a round is made of
    shown: Shown,
    listener: Listener,
    send: Callable[[], Part],
    arm: Callable[[Shown], Any],
    rate: float,
    seconds: float,
) -> dict[str, Any]:
    site = shown.site
    with arm(shown) as tell:
        stream(site, listener, rate, _WARM_S, send)
        sent = stream(site, listener, rate, seconds, send)
        return {**figures(sent, listener), "latenciesMs": latencies(sent, listener), **tell()}


def latencies(sent: Sent, listener: Listener) -> list[float]:
    return [round((listener.verdicts[part][0][1] - at) / 1e6, 3) for part, at in sent.parts.items()]


@contextmanager
def sending(site: Site) -> Iterator[Callable[[], Part]]:
    """Sends the cameras' next frame, in turns; one in _REJECT_EVERY is a reject. Part ids are unique."""
    context: zmq.Context[Any] = zmq.Context()
    sockets = [connect(context, zmq.DEALER, site.addresses.frames, site.peer()) for _ in range(_CAMERAS)]
    good = [good_pixels(number, _SIZE) for number in range(_PICTURES)]
    bad = [bad_pixels(number, _SIZE) for number in range(_PICTURES)]
    numbers = count()

    def send() -> Part:
        number = next(numbers)
        camera, seq = number % _CAMERAS, number // _CAMERAS
        pixels = (bad if number % _REJECT_EVERY == 0 else good)[number % _PICTURES]
        frame = replace(
            raw_frame(pixels, camera=f"cam{camera}", epoch="bench", seq=seq), part_id=f"{number}", is_simulated=True
        )
        sockets[camera].send_multipart(encode_frame(site.config["line"], frame))
        while sockets[camera].poll(0):
            sockets[camera].recv_multipart()
        return frame.camera, seq

    try:
        yield send
    finally:
        context.destroy(linger=0)


# --- the arms: each a context that gives a function for what it saw


@contextmanager
def without(_shown: Shown) -> Iterator[Callable[[], dict[str, Any]]]:
    yield dict


@contextmanager
def watched(shown: Shown) -> Iterator[Callable[[], dict[str, Any]]]:
    with ExitStack() as stack:
        shown.start()
        stack.callback(shown.stop)
        command = [sys.executable, "-m", "bench.dashboard", "--watch", shown.url]
        client = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, env=shown.site.variables())
        stack.callback(client.wait, 10)
        stack.callback(client.terminate)
        assert client.stdout is not None
        client.stdout.readline()  # it has heard the first state
        share = processor_share(shown)
        yield lambda: {"dashboardShare": share()}


def take_pictures(url: str) -> None:
    """What a browser does with the socket, without a screen; until it is ended."""
    from websockets.sync.client import connect as open_socket

    body = json.dumps({"name": "olga", "password": PASSWORD}).encode()
    headers = {"content-type": "application/json", "origin": url}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/api/login", body, headers), timeout=10) as answer:
        cookie = answer.headers["set-cookie"].partition(";")[0]
    with open_socket(f"{url.replace('http', 'ws')}/live", origin=url, additional_headers={"cookie": cookie}) as socket:
        print("watching", flush=True)
        for message in socket:
            if isinstance(message, bytes):
                length = int.from_bytes(message[:4], "little")
                socket.send(json.dumps({"shown": json.loads(message[4 : 4 + length])["camera"]}))


@contextmanager
def in_browser(shown: Shown) -> Iterator[Callable[[], dict[str, Any]]]:
    from playwright.sync_api import sync_playwright

    with ExitStack() as stack:
        shown.start()
        stack.callback(shown.stop)
        playwright = stack.enter_context(sync_playwright())
        browser = playwright.chromium.launch(executable_path=lowly_chromium(shown.site.folder))
        stack.callback(browser.close)
        page = browser.new_page(viewport={"width": 1180, "height": 820})
        page.goto(shown.url)
        log_in(page)
        page.locator("[data-camera]").first.wait_for()
        page.evaluate(_SEEN)
        began_ns, share = time.time_ns(), processor_share(shown)

        def tell() -> dict[str, Any]:
            used = share()
            time.sleep(1.5)  # what was judged last has a second to be seen
            decided_ms = {
                record["partId"]: record["ns"] / 1e6
                for record in shown.site.journal()
                if record["t"] == "verdict" and record["reason"] == "DEFECT" and record["ns"] > began_ns
            }
            seen = {name: page.evaluate(f"window.{name}") for name in ("listed", "shown")}
            delays = {
                f"{name}Ms": sorted(at - decided_ms[part] for part, at in times.items() if part in decided_ms)
                for name, times in seen.items()
            }
            return {**delays, "rejects": len(decided_ms), "dashboardShare": used}

        yield tell


def processor_share(shown: Shown) -> Callable[[], float]:
    """A function that gives the share of one core that the dashboard's process has used since now."""
    assert shown.process is not None
    stat = Path(f"/proc/{shown.process.pid}/stat")

    def used_s() -> float:
        fields = stat.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    began_s, before_s = time.monotonic(), used_s()
    return lambda: (used_s() - before_s) / (time.monotonic() - began_s)


def lowly_chromium(folder: Path) -> str:
    """Debian's chromium at the lowest priority."""
    script = folder / "chromium"
    script.write_text(f'#!/bin/sh\nexec nice -n 19 {shutil.which("chromium")} "$@"\n')
    script.chmod(0o755)
    return os.fspath(script)


def summarise(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """p99 of each arm over all its rounds, against `without`; and how late the screen is."""
    together = {arm: np.concatenate([each["latenciesMs"] for each in told]) for arm, told in found.items()}
    p99 = {arm: float(np.percentile(times, 99)) for arm, times in together.items()}
    screen = {}
    for name in ("listedMs", "shownMs"):
        delays = np.concatenate([told[name] for told in found["browser"]])
        if len(delays):
            percentiles = {key: float(np.percentile(delays, q)) for key, q in (("p50", 50), ("p99", 99), ("most", 100))}
            screen[name] = {"n": len(delays), **percentiles}
    return {
        "p99Ms": p99,
        "p99Ratio": {arm: p99[arm] / p99["without"] for arm in found if arm != "without"},
        "screen": screen,
        "dashboardShare": {
            arm: [each["dashboardShare"] for each in told] for arm, told in found.items() if arm != "without"
        },
        "sustained": {arm: [each["sustained"] for each in told] for arm, told in found.items()},
    }


if __name__ == "__main__":
    main()
