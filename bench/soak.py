"""The line at full load for an hour, with faults at random: is a part ever lost, does the daemon grow?

    python -m bench.soak --minutes 60        (an engine from rendered parts, 128 pixels, 500 rows; `make soak`)

Four cameras send 50 frames a second in all, every-frame, through the encrypted sockets, with recorder, journal and
ledger on. Injected by a seeded schedule (bench/soak_faults.py): lost frames, cut cameras, cameras that start anew,
bridges that come back, subscribers and bridges that stop reading. At the end the daemon is drained, and the ledger is
held against what the cameras sent and heard, row by row (bench/soak_books.py). A part is outside faults when no window
of a fault of its camera, or of a guest, touches the time from its sending to its verdict. Exit 1 when the books differ.
Writes bench/results/soak.json and docs/soak.svg.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from threading import Event
from typing import Any
from uuid import uuid4

import click
import numpy as np

from adapters.bench import golden_pictures
from adapters.line import Line
from adapters.simulate import Picture, load_pictures, picture_frame, wait_until
from bench.awake import kept_awake
from bench.record import RESULTS, ROOT, origin, write_result
from bench.soak_books import MISSING, Tally, compare, ledger_rows
from bench.soak_faults import OF_GUESTS, PATIENCE_S, Fault, Guests, Windows, schedule
from daemon.bundle import open_bundle
from daemon.errors import InspectError
from daemon.keys import load_trusted, make_peer, make_server_key
from daemon.record.ledger import Ledger
from examples.parts import write_dataset
from tests.daemons import Site, tcp

WARM_UP_S = 300.0
_LEAST_SLOPE_S = 60.0  # of samples after the warm-up: a line through fewer says nothing
_SETTLE_S = 10.0
_MOST_TOLD = 20
_SIZE_HW = (300, 300)
_KEEP_GB = 0.2  # rejects recorded: little enough that the oldest must go


@dataclass(frozen=True)
class Options:
    minutes: float
    rate: float
    cameras: int
    intensity: float
    deaf_s: float
    deadline_ms: int
    threads: int
    seed: int
    sample_s: float

    @property
    def names(self) -> list[str]:
        return [f"cam{number}" for number in range(1, self.cameras + 1)]


@dataclass(frozen=True)
class Sample:
    """The daemon as /proc shows it, `at_s` after the start; and what of the machine others have had since it booted."""

    at_s: float
    resident_mb: float
    open_files: int
    stolen_s: float = 0.0  # of all cores, where this is a virtual machine


class CameraRun:
    """One camera with its subscriber and bridge: sends, and injects the faults that are its own."""

    def __init__(
        self, line: Line, tally: Tally, pictures: list[Picture], faults: Sequence[Fault], windows: Windows
    ) -> None:
        self.held_up = 0  # frames not sent because this process did not get the processor in time
        self.problems: list[str] = []
        self._line, self._tally, self._pictures, self._windows = line, tally, pictures, windows
        self._faults = deque(faults)
        self._seq = self._sent = 0
        self._bridge_away_ns: int | None = None

    def run(self, start_ns: int, end_and_period_ns: tuple[int, int], ended: Event) -> None:
        """Send at the period until the end or until `ended` is set, then wait for what is under way."""
        end_ns, period_ns = end_and_period_ns
        due_ns = start_ns
        while due_ns < end_ns and not ended.is_set():
            wait_until(self._line, due_ns)
            now_ns = time.monotonic_ns()
            while self._faults and start_ns + self._faults[0].at_s * 1e9 <= now_ns:
                self._inject(self._faults.popleft(), now_ns)
            self._send()
            self._look_at_bridge()
            due_ns += period_ns
            # A camera does not send twice at once because this process was held up.
            if behind := max(0, time.monotonic_ns() - due_ns) // period_ns:
                self.held_up += behind
                due_ns += behind * period_ns
        self._settle()

    def _send(self) -> None:
        picture = self._pictures[self._sent % len(self._pictures)]
        part = self._line.send(picture_frame(self._line, self._seq, picture))
        self._tally.note_sent(self._line.epoch, part)
        self._tally.collect(self._line)
        self._seq += 1
        self._sent += 1

    def _inject(self, fault: Fault, now_ns: int) -> None:
        line = self._line
        if fault.kind == "lost":
            self._tally.note_left_out(line.epoch, range(self._seq, self._seq + fault.count))
            self._seq += fault.count
        elif fault.kind == "bridgeAway":
            if self._bridge_away_ns is not None:
                return  # it is away already
            line.reopen_bridge()
            self._bridge_away_ns = now_ns
            return  # its window ends when it is back
        else:
            self._send()  # a frame that may or may not have left when the cable is pulled
            if fault.kind == "restart":
                self._tally.collect(line)
                line.reopen_camera(uuid4().hex[:12])
                self._seq = 0
            else:
                line.reopen_camera()
        self._windows.add(fault.kind, line.camera, now_ns, time.monotonic_ns())

    def _look_at_bridge(self) -> None:
        """Close the window of a bridge that is back, or should be."""
        now_ns = time.monotonic_ns()
        if self._bridge_away_ns is None:
            return
        is_back = self._line.lease.is_fresh(now_ns)
        if not is_back and now_ns - self._bridge_away_ns > PATIENCE_S * 1e9:
            self.problems.append(
                f"{self._line.camera}: its bridge had no fresh lease within {PATIENCE_S:.0f} s of HELLO"
            )
        elif not is_back:
            return
        self._windows.add("bridgeAway", self._line.camera, self._bridge_away_ns, now_ns)
        self._bridge_away_ns = None

    def _settle(self) -> None:
        """Until each part has its verdict and the bridge is back, at most _SETTLE_S; then a little more."""
        until_s = time.monotonic() + _SETTLE_S
        while time.monotonic() < until_s:
            self.listen(50)
            self._look_at_bridge()
            fates = self._tally.fates.get(self._line.epoch, {})
            if self._bridge_away_ns is None and all(fates[seq].told for seq in self._line.parts):
                break
        self.listen(300)  # what should not come may still come

    def listen(self, milliseconds: float) -> None:
        self._line.pump(milliseconds)
        self._tally.collect(self._line)


def furnish(place: Path, options: Options, engine: Path | None, trusted: Path | None) -> tuple[Site, list[Picture]]:
    """A site with keys, an engine (built when none is given) and a config; the pictures to send."""
    if engine is None:
        write_dataset(place / "parts", good_train=60, good_test=45, defects_each=1, size_hw=_SIZE_HW)
        command = [sys.executable, str(ROOT / "build_engines.py"), "part", "--good", str(place / "parts/train/good")]
        command += ["--budget", "0", "--size", "128", "--coreset", "500"]
        subprocess.run(command, cwd=place, check=True, stdout=subprocess.DEVNULL)
        product, pictures = "part", load_pictures(place / "parts" / "test")
        pictures = [pictures[i] for i in np.random.default_rng(0).permutation(len(pictures))]
    else:
        bundle = open_bundle(engine, load_trusted(trusted or Path("keys/trusted.yaml")))
        product, pictures = bundle.product(None), golden_pictures(bundle)
        (place / "engines" / product).mkdir(parents=True)
        (place / "engines" / product / "current").symlink_to(engine.resolve())
        (place / "keys").mkdir()
        (place / "keys/trusted.yaml").write_text((trusted or Path("keys/trusted.yaml")).read_text())
    make_server_key(place / "keys")
    make_peer(place / "keys", "line", ["camera", "subscriber", "bridge"], ["*"])
    camera = {"product": product, "mode": "every-frame", "deadline_ms": options.deadline_ms, "valid_ms": 500}
    config = {
        "version": 1,
        "line": "soak",
        "inputs": [{"kind": "router", "bind": tcp()}],
        "results": {"bind": tcp(), "mask": True, "frame_on_reject": True},
        "permits": {"bind": tcp()},
        "control": {"bind": "ipc://run/control.sock"},
        "metrics": {"bind": tcp().removeprefix("tcp://")},
        "security": {"keys": "keys"},
        "engines": {"dir": "engines"},
        "backend": {"kind": "cpu", "threads": options.threads},
        "cameras": dict.fromkeys(options.names, camera),
        "ledger": {"dir": "run/ledger"},
        "recorder": {"dir": "run/rejects", "keep_gb": _KEEP_GB},
    }
    return Site(place, config), pictures


def soak(site: Site, pictures: list[Picture], options: Options) -> dict[str, Any]:
    """Run, drain, compare; what is written down, without its origin. `faults` is empty when the promise held."""
    faults = schedule(options.seed, 60 * options.minutes, options.names, options.intensity, options.deaf_s)
    windows, samples = Windows(), list[Sample]()
    guests = Guests(site, windows, faults)
    tallies = [Tally(name, options.deadline_ms) for name in options.names]
    try:
        site.start()
        with ExitStack() as stack:
            lines = [stack.enter_context(site.line(name)) for name in options.names]
            runs = [
                CameraRun(line, tally, pictures, [fault for fault in faults if fault.camera == line.camera], windows)
                for line, tally in zip(lines, tallies, strict=True)
            ]
            start_ns = time.monotonic_ns() + 100_000_000
            problems = run_all(site, runs, guests, (options, start_ns), samples)
            code = site.stop(60)
            for run in runs:
                run.listen(200)
    finally:
        if site.process is not None:
            site.kill()
    problems += [f"the daemon ended with {code}"] if code else []
    problems += [*guests.problems, *(problem for run in runs for problem in run.problems), *what_the_log_says(site)]
    books, differences = balance(site, tallies, windows)
    return {
        **report(options, tallies, windows, samples, start_ns),
        **books,
        "injected": windows.counts(),
        "slowSubscribersThatLost": guests.subscribers_that_lost,
        "bridgesThatSaidHelloAgain": guests.bridges_born_again,
        "framesHeldUpHere": sum(run.held_up for run in runs),
        "faults": [*problems, *differences],
    }


def run_all(
    site: Site, runs: list[CameraRun], guests: Guests, plan: tuple[Options, int], samples: list[Sample]
) -> list[str]:
    """Each camera and each kind of guest on a thread of its own, /proc on this one; why one of them gave up."""
    options, start_ns = plan
    period_ns = int(1e9 * options.cameras / options.rate)
    end_ns = start_ns + int(60e9 * options.minutes)
    with ThreadPoolExecutor(len(runs) + len(OF_GUESTS)) as pool:
        cameras = [
            pool.submit(run.run, start_ns + number * period_ns // len(runs), (end_ns, period_ns), guests.ended)
            for number, run in enumerate(runs)
        ]
        visits = [pool.submit(guests.run, kind, start_ns) for kind in OF_GUESTS]
        try:
            watch(site, cameras, samples, start_ns, options.sample_s)
        finally:
            guests.ended.set()
    given_up = [future.exception() for future in (*cameras, *visits)]
    for error in given_up:
        if error is not None and not isinstance(error, InspectError):
            raise error
    return [str(error) for error in given_up if error is not None]


def watch(site: Site, cameras: Sequence[Future[None]], samples: list[Sample], start_ns: int, every_s: float) -> None:
    """A sample each `every_s` until all cameras are done, one of them failed, or the daemon is gone."""
    assert site.process is not None
    minute = 0
    while not all(camera.done() for camera in cameras):
        if site.process.poll() is not None or any(camera.done() and camera.exception() for camera in cameras):
            return
        samples.append(sample(site, start_ns))
        if samples[-1].at_s >= 60 * minute:
            minute += 1
            print(
                f"{samples[-1].at_s:7.0f} s  {samples[-1].resident_mb} MB  {samples[-1].open_files} files", flush=True
            )
        wait(cameras, timeout=every_s)
    samples.append(sample(site, start_ns))


def sample(site: Site, start_ns: int) -> Sample:
    assert site.process is not None
    proc = Path(f"/proc/{site.process.pid}")
    pages = int((proc / "statm").read_text().split()[1])
    resident_mb = round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 2)
    at_s, files = (time.monotonic_ns() - start_ns) / 1e9, len(list((proc / "fd").iterdir()))
    stolen = int(Path("/proc/stat").read_text().split("\n", 1)[0].split()[8])
    return Sample(at_s, resident_mb, files, stolen / os.sysconf("SC_CLK_TCK"))


def what_the_log_says(site: Site) -> list[str]:
    """A traceback in the daemon's log is a fault of the daemon, whatever it went on to do."""
    lines = site.log.splitlines()
    return [f"the daemon's log: {line} {lines[i - 1]}" for i, line in enumerate(lines) if line.startswith("Traceback")]


def balance(site: Site, tallies: list[Tally], windows: Windows) -> tuple[dict[str, Any], list[str]]:
    """The ledger's own proof, and its rows against what the cameras saw."""
    folder = site.folder / "run/ledger"
    ledger = Ledger(folder)
    ledger.fill()
    audit = ledger.verify()
    ledger.close()
    cameras, problems = compare(tallies, ledger_rows(folder), windows)
    if audit.in_flight or audit.damaged:
        problems.append(f"after the drain {audit.in_flight} parts are in flight, {audit.damaged} records damaged")
    if audit.accepted + audit.missing != audit.verdicts:
        problems.append(f"accepted {audit.accepted} + missing {audit.missing} is not verdicts {audit.verdicts}")
    counts = {
        "sent": sum(camera["sent"] for camera in cameras.values()),
        "accepted": audit.accepted,
        "missing": audit.missing,
        "verdicts": audit.verdicts,
    }
    return {**counts, "cameras": cameras}, [*audit.faults, *problems]


def report(
    options: Options, tallies: list[Tally], windows: Windows, samples: list[Sample], start_ns: int
) -> dict[str, Any]:
    """Deadlines, times by minute, memory and descriptors."""
    by_minute: dict[int, list[float]] = {}
    outcomes, late, late_outside, inside = Counter[str](), 0, 0, 0
    for tally in tallies:
        in_fault = windows.covering(tally.camera)
        for _, _, fate in tally.all():
            outcomes[fate.told or "none"] += 1
            if fate.sent_ns is None or fate.decided_ns is None or fate.told == MISSING:
                continue
            excused = in_fault(fate.sent_ns, fate.decided_ns)
            inside += excused
            late += fate.told == "REJECT LATE"
            late_outside += fate.told == "REJECT LATE" and not excused
            minute = int((fate.sent_ns - start_ns) / 60e9)
            by_minute.setdefault(minute, []).append((fate.decided_ns - fate.sent_ns) / 1e6)
    everything = [value for values in by_minute.values() for value in values]
    overruns_ms = [each for tally in tallies for each in tally.overruns_ms]
    slope = memory_slope(samples)
    return {
        "minutes": options.minutes,
        "options": asdict(options),
        "deadlineMissed": late,
        "deadlineMissedOutsideFaults": late_outside,
        "leftAfterDeadline": len(overruns_ms),
        "leftAfterDeadlineByMs": round(max(overruns_ms, default=0.0), 1),
        "shareOfPartsInsideFaults": round(inside / max(1, len(everything)), 3),
        "outcomes": dict(sorted(outcomes.items())),
        "p50Ms": percentile(everything, 50),
        "p99Ms": percentile(everything, 99),
        "p99ByMinute": [percentile(by_minute.get(minute, []), 99) for minute in range(max(by_minute, default=-1) + 1)],
        "stolenShareByMinute": stolen_by_minute(samples),
        "memorySlopeMbPerHour": slope,
        "memorySlopeNote": None if slope is not None else too_short(),
        **open_files(samples),
        "samples": [[round(s.at_s, 1), s.resident_mb, s.open_files] for s in samples],
    }


def stolen_by_minute(samples: Sequence[Sample]) -> list[float]:
    """The share of the machine's cores that its host gave to others: what is late then, the daemon could not help."""
    cores = os.cpu_count() or 1
    marks = [next((s for s in samples if s.at_s >= 60 * minute), samples[-1]) for minute in range(len(samples))]
    pairs = [(one, other) for one, other in pairwise(marks) if other.at_s > one.at_s]
    return [round((b.stolen_s - a.stolen_s) / (b.at_s - a.at_s) / cores, 3) for a, b in pairs]


def percentile(values: list[float], percent: float) -> float | None:
    return round(float(np.percentile(values, percent)), 2) if values else None


def too_short() -> str:
    least = (WARM_UP_S + _LEAST_SLOPE_S) / 60
    return f"null: a slope needs {least:.0f} minutes, {WARM_UP_S / 60:.0f} of them to warm up"


def memory_slope(samples: list[Sample]) -> float | None:
    """MB/h of resident memory by least squares over the samples after the warm-up; None where they are too few."""
    warm = [each for each in samples if each.at_s >= WARM_UP_S]
    if len(warm) < 3 or warm[-1].at_s - warm[0].at_s < _LEAST_SLOPE_S:
        return None
    return round(float(np.polyfit([s.at_s / 3600 for s in warm], [s.resident_mb for s in warm], 1)[0]), 3)


def open_files(samples: list[Sample]) -> dict[str, int]:
    """The fewest in the minute after the warm-up (a quarter of a shorter run) and in the last minute, and the most.

    The fewest, because guests and cameras that connect again have a descriptor while they are there.
    """
    warm_s = min(WARM_UP_S, samples[-1].at_s / 4)
    span_s = min(60.0, samples[-1].at_s / 4)
    warm = [each.open_files for each in samples if warm_s <= each.at_s <= warm_s + span_s]
    last = [each.open_files for each in samples if each.at_s >= samples[-1].at_s - span_s]
    return {
        "openFilesWarm": min(warm or last),
        "openFilesEnd": min(last),
        "openFilesMost": max(each.open_files for each in samples),
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Three panels over time: p99 by minute, resident memory, open descriptors."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasSVG(figure)
    times, memory, files = zip(*result["samples"], strict=True)
    minutes = [at_s / 60 for at_s in times]
    left, middle, right = figure.subplots(1, 3)
    p99 = [np.nan if value is None else value for value in result["p99ByMinute"]]
    left.plot(range(len(p99)), p99, "o-", markersize=3)
    left.set(title="send to verdict, p99 by minute", ylabel="ms", ylim=(0, None))
    middle.plot(minutes, memory)
    middle.set(title="resident memory of the daemon", ylabel="MB", ylim=(0, None))
    right.plot(minutes, files)
    right.set(title="its open descriptors", ylim=(0, None))
    for panel in (left, middle, right):
        panel.set_xlabel("minutes")
        panel.grid(visible=True, alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


@click.command(context_settings={"show_default": True})
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=60.0)
@click.option("--rate", type=click.FloatRange(0, min_open=True), default=50.0, help="Frames a second, of all cameras.")
@click.option("--cameras", type=click.IntRange(1, 64), default=4)
@click.option("--engine", type=click.Path(path_type=Path, exists=True), help="A bundle; default: one is built.")
@click.option("--trusted", type=click.Path(path_type=Path), help="With --engine.  [default: keys/trusted.yaml]")
@click.option("--faults", "intensity", type=click.FloatRange(0), default=1.0, help="How often, of the usual rates.")
@click.option("--deaf-s", type=click.FloatRange(0.1), default=12.0, help="Most seconds that a guest does not read.")
@click.option("--deadline-ms", type=click.IntRange(1), default=250, help="As config.yaml has it.")
@click.option("--threads", type=click.IntRange(1), default=1, help="For inference.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the schedule of faults.")
@click.option("--sample-s", type=click.FloatRange(0, min_open=True), default=5.0)
@click.option("--keep-awake", is_flag=True, help="On a shared virtual machine: no core ever rests (bench/awake.py).")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "soak.json")
@click.option("--picture", type=click.Path(path_type=Path), default=ROOT / "docs" / "soak.svg")
def main(
    engine: Path | None,
    trusted: Path | None,
    out: Path,
    picture: Path,
    keep_awake: bool,  # noqa: FBT001 - click hands flags over as they come
    **fields: Any,
) -> None:
    """Soak, write, plot; exit 1 when the books differ."""
    options = Options(**fields)
    with tempfile.TemporaryDirectory(prefix="inspectd-soak-") as name:
        site, pictures = furnish(Path(name), options, engine, trusted)
        with kept_awake() if keep_awake else nullcontext():
            found = {"keptAwake": keep_awake, **soak(site, pictures, options)}
    found = {**origin("openvino", "numpy", "pyzmq", "opencv-python-headless"), "protocol": __doc__, **found}
    found["holds"] = not found["faults"]
    found["faultsFound"], found["faults"] = len(found["faults"]), found["faults"][:_MOST_TOLD]
    plot(found, picture)
    print(write_result(str(out.resolve()), found))
    print({key: value for key, value in found.items() if key not in ("protocol", "samples", "cameras", "machine")})
    for fault in found["faults"]:
        print(f"FAULT {fault}", file=sys.stderr)
    sys.exit(0 if found["holds"] else 1)


if __name__ == "__main__":
    main()
