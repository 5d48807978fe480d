"""The daemon killed under load, again and again: what books, wire and bridge say afterwards, and how fast it is back.

    python -m bench.restarts [--rounds 20]     (a small engine, 128x128, 500 rows; 100 frames a second)

Each round begins with kill -9 at a random moment with parts in flight; the daemon is started again at once, and the
camera never stops. Seconds are from the start of the process to its READY=1 on NOTIFY_SOCKET (heard at the next frame,
10 ms later at most) and to the first verdict of the new run on an inspected part at the subscriber. After each restart
and at the end the ledger is held against what was sent, answered and told; the bridge's notes of all it heard and
believed are held against the journal (bench/bridge_log.py). Writes bench/results/restarts.json; exit 1 on any problem.
"""

from __future__ import annotations

import json
import random
import socket
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import click

from adapters.line import Line, SentPart
from bench.bridge_log import Issued, LoggedLease, issued_by, untrue_passes
from bench.record import origin, write_result
from bench.soak_books import ledger_rows
from bench.swaps import ROWS, SIZE_HW, Pace
from daemon.errors import InspectError
from daemon.line.permit import PermitKey
from daemon.record.ledger import Ledger
from tests.daemons import Site, make_site

_PATIENCE_S = 60.0
_WATCHED_S = 5.0  # for so long after it was sent a part is asked about at the bridge
_ASKED_EVERY = 3
_MOST_TOLD = 10

Verdict = tuple[str, str | None]


@dataclass
class Run:
    """One life of the daemon: how fast it was there, and when it was killed."""

    killed_ns: int = 0
    ready_s: float = 0.0
    first_verdict_s: float = 0.0


@dataclass
class Watch:
    """A line at work: frames at a rate, and a bridge, asked at every permit and every third frame what it lets pass.

    More often would take from the daemon what it is measured by.
    """

    site: Site
    line: Line
    lease: LoggedLease
    pace: Pace
    random: random.Random
    runs: list[Run] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    asked: int = 0

    def tick(self) -> None:
        self.pace.tick()
        now_ns = time.monotonic_ns()
        newest = len(self.line.parts)
        if newest < self.asked + _ASKED_EVERY:
            return
        first = self.asked = newest
        while first > 0 and self.line.parts[first - 1].sent_ns > now_ns - _WATCHED_S * 1e9:
            first -= 1
        # Three that were not even sent are asked about, too.
        self.lease.survey(((self.line.camera, self.line.epoch, seq) for seq in range(first, newest + 3)), now_ns)

    def run_for(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.tick()

    def run_until(self, condition: Callable[[], Any], what: str) -> None:
        until = time.monotonic() + _PATIENCE_S
        while not condition():
            if time.monotonic() > until:
                raise InspectError(f"{what} did not come within {_PATIENCE_S:.0f} s:\n{self.site.log[-2000:]}")
            self.tick()

    def run_beside(self, work: Callable[[], list[str]]) -> None:
        """Go on until `work` is done in a thread of its own, and keep the problems that it found."""
        with ThreadPoolExecutor(1) as threads:
            done = threads.submit(work)
            while not done.done():
                self.tick()
        self.problems += done.result()

    def is_up(self) -> bool:
        """Bridge and camera are served again: the lease is fresh, and the newest parts have their verdict."""
        parts = self.line.parts
        recent = [parts[seq] for seq in range(max(0, len(parts) - 20), len(parts))]
        return (
            self.lease.is_fresh(time.monotonic_ns()) and sum(bool(part.results) for part in recent) >= len(recent) / 2
        )


class Notified:
    """systemd's end of NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self._datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._datagrams.bind(str(path))
        self._datagrams.setblocking(False)

    def heard(self, word: str) -> bool:
        """Whether one of the datagrams since the last asking says so."""
        found = False
        with suppress(BlockingIOError):
            while True:
                found |= word in self._datagrams.recv(4096).decode().split("\n")
        return found

    def close(self) -> None:
        self._datagrams.close()


def measure(site: Site, rounds: int, rate: float, seed: int) -> dict[str, Any]:
    """Run, kill and start again; the figures and every problem. The daemon is stopped afterwards."""
    with closing(Notified(site.folder / "notify")) as systemd:
        site.environment["NOTIFY_SOCKET"] = str(site.folder / "notify")
        site.start()
        with site.line() as line:
            line.lease = lease = LoggedLease()
            watch = Watch(site, line, lease, Pace(line, rate), random.Random(seed))
            watch.run_until(watch.is_up, "the line")
            watch.runs.append(Run())
            for number in range(rounds):
                watch.run_for(watch.random.uniform(0.5, 2.0))
                kill_and_start(watch, systemd)
                watch.run_until(watch.is_up, "the line")
                watch.run_beside(lambda: forgotten(watch))
                print(f"round {number + 1}: {watch.runs[-1]}", file=sys.stderr)
            watch.run_for(1.0)
            last = line.parts[len(line.parts) - 1]
            until = time.monotonic() + _PATIENCE_S
            while time.monotonic() < until and not (last.results and last.permits):
                line.pump(10)
            code = site.stop()
        if code != 0:
            watch.problems.append(f"the daemon ended with {code}")
    return report(watch, rate)


def kill_and_start(watch: Watch, systemd: Notified) -> None:
    """kill -9 with parts in flight, at once a new process, and on until it was READY and has spoken for a part."""
    line, site = watch.line, watch.site
    for _ in range(watch.random.randint(6, 12)):  # more than a quick machine judges before it is killed
        watch.pace.send()
    line.pump(watch.random.uniform(0.0, 8.0))
    site.kill()
    watch.runs[-1].killed_ns = time.monotonic_ns()
    before = {header["run"] for part in line.parts.values() for header in part.results}
    systemd.heard("")
    started_ns = time.monotonic_ns()
    site.start(wait=False)
    run = Run()
    watch.runs.append(run)

    def spoken() -> bool:
        times_ns = [part.decided_ns or 0 for part in line.parts.values() if is_judged(part, before)]
        run.first_verdict_s = (min(times_ns) - started_ns) / 1e9 if times_ns else 0.0
        return bool(times_ns)

    def ready() -> bool:
        if systemd.heard("READY=1"):
            run.ready_s = (time.monotonic_ns() - started_ns) / 1e9
        return run.ready_s > 0

    watch.run_until(ready, "READY=1")
    watch.run_until(spoken, "a verdict of the new run")


def is_judged(part: SentPart, before: set[str]) -> bool:
    """Whether a run that is none of those `before` has looked at this part and spoken."""
    return any(header["run"] not in before and header["reason"] != "MISSING" for header in part.results)


# -- what may be wrong --------------------------------------------------------------------------------------


def forgotten(watch: Watch) -> list[str]:
    """Promise 1 after a restart: the books balance, and what was accepted before has its one row and its verdict."""
    folder = watch.site.folder / "run/ledger"
    with closing(Ledger(folder)) as ledger:
        ledger.fill()
        faults = ledger.verify().faults
    killed_ns = watch.runs[-2].killed_ns
    accepted = {
        (watch.line.camera, watch.line.epoch, part.seq)
        for part in list(watch.line.parts.values())
        if part.sent_ns < killed_ns and part.answer is not None and part.answer["status"] == "accepted"
    }
    rows = {row[:3]: row for row in ledger_rows(folder)}
    faults += [f"{key}: accepted before a kill, and not in the ledger" for key in sorted(accepted - set(rows))]
    silent = sorted(key for key in accepted & set(rows) if rows[key][5] is None)
    return faults + [f"{key}: accepted before a kill, without a verdict" for key in silent]


def told(line: Line) -> dict[PermitKey, list[tuple[str, Verdict]]]:
    """Every verdict heard of each part, with the channel. A range of MISSING is one for each of its parts."""
    heard: dict[PermitKey, list[tuple[str, Verdict]]] = defaultdict(list)
    headers = [("results", header) for part in line.parts.values() for header in part.results]
    headers += [("permits", header) for part in line.parts.values() for header in part.permits]
    for channel, header in [*headers, *(("results", header) for header in line.foreign)]:
        for seq in range(header["seq"], header.get("seqTo", header["seq"]) + 1):
            key = (header["camera"], header["epoch"], seq)
            heard[key].append((channel, (header["outcome"], header["reason"])))
    return heard


def contradictions(heard: dict[PermitKey, list[tuple[str, Verdict]]], kept: dict[PermitKey, Verdict]) -> list[str]:
    """Parts with two different verdicts on the wire, or another one in the books than on the wire."""
    problems = []
    for key, verdicts in heard.items():
        name = f"{key[0]} {key[1]} {key[2]}"
        different = sorted({" ".join(filter(None, verdict)) for _, verdict in verdicts})
        if len(different) > 1:
            problems.append(f"{name}: two verdicts on the wire, {' and '.join(different)}")
        elif verdicts[0][1] != kept.get(key):
            problems.append(f"{name}: {different[0]} on the wire, {kept.get(key)} in the books")
        if [channel for channel, _ in verdicts].count("results") > 1:
            problems.append(f"{name}: told more than once on the results socket")
    return problems


def unheard(heard: dict[PermitKey, list[tuple[str, Verdict]]], issued: dict[PermitKey, Issued]) -> list[str]:
    """Parts that were not told on a channel though the same run told earlier and later ones there, in this order."""
    problems = []
    spoken: dict[str, list[PermitKey]] = defaultdict(list)
    for key, each in issued.items():
        spoken[each.run].append(key)
    for channel in ("results", "permits"):
        for keys in spoken.values():
            there = [number for number, key in enumerate(keys) if channel in {where for where, _ in heard.get(key, [])}]
            silent = set(range(there[0], there[-1])) - set(there) if there else set()
            problems += [f"{keys[number]}: told before and behind it, not on {channel}" for number in sorted(silent)]
    return problems


def report(watch: Watch, rate: float) -> dict[str, Any]:
    """Hold everything against everything, after the end."""
    line, site = watch.line, watch.site
    records = site.journal()
    verified = site.run_command("ledger", "--verify")
    issued = issued_by(records)
    kept = {key: (each.outcome, each.reason) for key, each in issued.items()}
    heard = told(line)
    problems = watch.problems
    if verified.returncode != 0 or "in flight 0" not in verified.stdout:
        problems.append(f"ledger --verify: exit {verified.returncode}, {verified.stdout.strip()}")
    problems += contradictions(heard, kept) + unheard(heard, issued)
    problems += [f"{key}: sent and in no book" for key in _sent(line) - set(kept)]
    problems += untrue_passes(watch.lease.notes, issued)
    accepted = {(record["camera"], record["epoch"], record["seq"]) for record in records if record["t"] == "accept"}
    recovered = [key for key in accepted if kept.get(key) == ("REJECT", "MISSING")]
    passed = {key for note in watch.lease.notes for key in note.parts}
    restarts = watch.runs[1:]
    ready, spoken = [run.ready_s for run in restarts], [run.first_verdict_s for run in restarts]
    return {
        "rounds": len(restarts), "framesPerS": rate, "sent": len(line.parts), "accepted": len(accepted),
        "lostOnTheWay": len(_sent(line) - accepted), "inFlightAtKills": len(recovered), "passesBelieved": len(passed),
        "notesOfTheBridge": len(watch.lease.notes), "problemsFound": len(problems), "problems": problems[:_MOST_TOLD],
        "ledger": verified.stdout.strip().split("\n"),
        "restartToReadySecondsMedian": median(ready), "restartToReadySecondsMax": max(ready),
        "restartToFirstVerdictSecondsMedian": median(spoken), "restartToFirstVerdictSecondsMax": max(spoken),
        "restartToReadySeconds": [round(value, 3) for value in ready],
        "restartToFirstVerdictSeconds": [round(value, 3) for value in spoken],
    }  # fmt: skip


def _sent(line: Line) -> set[PermitKey]:
    return {(line.camera, line.epoch, seq) for seq in line.parts}


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=20, show_default=True)
@click.option("--rate", type=click.FloatRange(1), default=100.0, show_default=True, help="Frames a second.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the moments of the kills.")
def main(rounds: int, rate: float, seed: int) -> None:
    """Kill and start under load, hold the books against the wire, measure."""
    with tempfile.TemporaryDirectory(prefix="inspectd-restarts-") as name:
        site = make_site(Path(name), size=SIZE_HW, rows=ROWS)
        try:
            result = measure(site, rounds, rate, seed)
        finally:
            if site.process is not None and site.process.poll() is None:
                site.kill()
    write_result("restarts.json", {**origin("openvino", "numpy", "pyzmq"), "protocol": __doc__, **result})
    print(json.dumps(result))
    sys.exit(1 if result["problems"] else 0)


if __name__ == "__main__":
    main()
