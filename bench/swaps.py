"""Engines swapped under load: no part without its one verdict, what p99 does, and whether memory or descriptors grow.

    python -m bench.swaps [--swaps 200]     (two small engines, 128x128, 500 rows; 50 frames a second)

The line runs throughout. Swaps and stretches without any take turns, so that both are measured in the same run; a swap
begins with the request and ends when the old engine has left. Memory and descriptors are the daemon's own, from /proc,
after the first tenth of the swaps and after the last. Writes bench/results/swaps.json; exit 1 when a part lacks its
verdict or has two.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

from adapters.line import Line, disagreements
from bench.record import origin, write_result
from daemon.line.control import ask
from daemon.record.ledger import Ledger
from tests.bundles import good_pixels, install_bundle, raw_frame
from tests.daemons import Site, make_site

SIZE_HW = (128, 128)
ROWS = 500
_QUIET_S = 0.4  # a stretch without a swap
_PATIENCE_S = 60.0
_SETTLED = ("active", "failed", "returned")


@click.command()
@click.option("--swaps", type=click.IntRange(10), default=200, show_default=True)
@click.option("--rate", type=click.FloatRange(1), default=50.0, show_default=True, help="Frames a second.")
def main(swaps: int, rate: float) -> None:
    """Swap to and fro under load, count, measure."""
    with tempfile.TemporaryDirectory(prefix="inspectd-swaps-") as name:
        site = make_site(Path(name), size=SIZE_HW, rows=ROWS)
        install_bundle(
            site.folder / "engines", site.folder / "keys", "part", version="2", size=SIZE_HW, rows=ROWS, seed=5
        )
        site.start()
        try:
            result = measure(site, swaps, rate)
        finally:
            site.stop()
        ledger = Ledger(site.folder / "run/ledger")
        ledger.fill()
        audit = ledger.verify()
        ledger.close()
    result["ledger"] = asdict(audit)
    result["problems"] += audit.faults
    write_result("swaps.json", {**origin("openvino", "numpy", "pyzmq"), "protocol": __doc__, **result})
    print(json.dumps(result))
    sys.exit(1 if result["problems"] else 0)


def measure(site: Site, swaps: int, rate: float) -> dict[str, Any]:
    assert site.process is not None
    pid = site.process.pid
    warm = (0.0, 0)
    quiet, during, slowest = [], [], []
    results = {"active": 0, "failed": 0, "returned": 0}
    with site.line() as line:
        pace = Pace(line, rate)
        pace.run(1.0)
        for number in range(swaps):
            begun = len(line.parts)
            pace.run(_QUIET_S)
            quiet += latencies(line, begun)
            begun = len(line.parts)
            started = time.monotonic()
            results[swap(site, pace, "2" if number % 2 == 0 else "1")] += 1
            slowest.append(time.monotonic() - started)
            during += latencies(line, begun)
            if number == swaps // 10:
                warm = (resident_mb(pid), descriptors(pid))
        pace.run(1.0)
        until = time.monotonic() + _PATIENCE_S
        while time.monotonic() < until and not all(part.results and part.permits for part in line.parts.values()):
            line.pump(10)
        problems = disagreements(line, set())
        sent = len(line.parts)
    p99 = [float(np.percentile(values, 99)) for values in (quiet, during)]
    return {
        "swaps": swaps, "results": results, "framesPerS": rate, "sent": sent, "problems": problems[:10],
        "p50QuietMs": median(quiet), "p50DuringMs": median(during), "p99QuietMs": p99[0], "p99DuringMs": p99[1],
        "p99Ratio": p99[1] / p99[0], "swapSecondsMedian": median(slowest),
        "residentWarmMb": warm[0], "residentEndMb": resident_mb(pid),
        "openFilesWarm": warm[1], "openFilesEnd": descriptors(pid),
    }  # fmt: skip


class Pace:
    """Frames at a rate, whatever else is waited for."""

    def __init__(self, line: Line, rate: float) -> None:
        self._line, self._step_s = line, 1.0 / rate
        self._pixels = [good_pixels(seed, SIZE_HW) for seed in range(16)]
        self._next = time.monotonic()

    def tick(self) -> None:
        if time.monotonic() >= self._next:
            self.send()
            self._next = max(self._next + self._step_s, time.monotonic() - self._step_s)
        self._line.pump(max(0.0, 1000 * (self._next - time.monotonic())))

    def send(self) -> None:
        """One frame more, now."""
        seq = len(self._line.parts)
        self._line.send(raw_frame(self._pixels[seq % 16], epoch=self._line.epoch, seq=seq))

    def run(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.tick()


def swap(site: Site, pace: Pace, version: str) -> str:
    """Ask for the engine and go on until the old one has left; how it ended."""
    asked = threading.Thread(target=ask, args=(site.control, "activate", 60_000), kwargs={"engine": f"part/{version}"})
    asked.start()
    while asked.is_alive():
        pace.tick()
    until = time.monotonic() + _PATIENCE_S
    while time.monotonic() < until:
        pace.run(0.1)
        found = site.status()["swap"]
        if found is not None and found["engine"] == f"part/{version}" and found["result"] in _SETTLED:
            return str(found["result"])
    raise click.ClickException(f"the swap to {version} does not end")


def latencies(line: Line, begun: int) -> list[float]:
    parts = [part for seq, part in line.parts.items() if seq >= begun]
    return [part.latency_ms for part in parts if part.latency_ms is not None]


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


if __name__ == "__main__":
    main()
