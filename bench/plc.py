"""Parts into a PLC while daemon, bridge and PLC are killed at random: does it ever pass a part that was not passed?

    python -m bench.plc [--parts 2000]         (20 parts a second; Modbus both ways and OPC UA, 100 s each)

The PLC is the program of docs/plc.md in a process of its own (tests/plcs.py), which notes what it lets pass. Each note
is held against the daemon's journal: the part, its tag, its outcome, and that its permit was not over. Kills are
kill -9 of one of the three, by a seeded schedule; the dead one starts again within a second. Writes
bench/results/plc.json; exit 1 on any problem.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from adapters.line import Line
from bench.record import ROOT, origin, write_result
from daemon.errors import InspectError
from tests.bundles import bad_pixels, good_pixels, raw_frame
from tests.daemons import Site, free_port, make_site
from tests.plcs import ALIVE_S, read_notes

KINDS = {"modbus into the PLC": "modbus-server", "modbus read by the PLC": "modbus-client", "OPC UA": "opcua-client"}
VICTIMS = ("daemon", "bridge", "plc")
_SIZE = (128, 128)
_SETTLE_S = 3.0
_CLOCK_S = 0.1  # a scan, a cycle, and the scheduler
_MOST_TOLD = 10


@dataclass
class Cell:
    """A daemon, a bridge and a PLC, each a process that may be killed and started again."""

    site: Site
    kind: str
    port: int = field(default_factory=free_port)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    due: dict[str, float] = field(default_factory=dict)  # when the dead start again
    kills: Counter[str] = field(default_factory=Counter)

    @property
    def notes(self) -> Path:
        return self.site.folder / "plc.jsonl"

    def start(self, who: str) -> None:
        if who == "daemon":
            self.site.start(wait=False)
            return
        at = f"127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "daemon", "plc"] if who == "bridge" else [sys.executable, "-m", "tests.plcs"]
        if who == "bridge":
            protocol, side = {
                "modbus-server": ("modbus", ["--plc", at]),
                "modbus-client": ("modbus", ["--serve", at]),
                "opcua-client": ("opcua", ["--serve", at, "--insecure"]),
            }[self.kind]
            command += [protocol, "--config", "config.yaml", "--peer", "keys/line.peer.yaml", *side]
        else:
            url = f"opc.tcp://{at}/inspectd" if self.kind == "opcua-client" else at
            command += [self.kind, "--at", url, "--notes", str(self.notes)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with (self.site.folder / f"{who}.txt").open("ab") as log:
            self.processes[who] = subprocess.Popen(
                command, cwd=self.site.folder, env=environment, stdout=log, stderr=log
            )

    def kill(self, who: str, back_s: float) -> None:
        """kill -9; it starts again in so many seconds."""
        self.kills[who] += 1
        if who == "daemon":
            self.site.kill()
        else:
            self.processes[who].kill()
            self.processes[who].wait(10)
        self.due[who] = time.monotonic() + back_s

    def tend(self) -> None:
        """Start whoever is due; nobody may have ended by himself."""
        for who in [who for who, due_s in self.due.items() if time.monotonic() >= due_s]:
            del self.due[who]
            self.start(who)
        for who, process in self.processes.items():
            if who not in self.due and process.poll() is not None:
                told = (self.site.folder / f"{who}.txt").read_text()[-1000:]
                raise InspectError(f"the {who} ended by itself with {process.returncode}: {told}")

    def stop(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait(10)
        with suppress(Exception):
            self.site.kill()


def measure(folder: Path, kind: str, *, parts: int, rate: float, kills: int, seed: int) -> dict[str, Any]:
    """One run; `problems` is empty when the PLC passed nothing that it should not."""
    site = make_site(folder, size=_SIZE, rows=500)
    site.config["cameras"]["cam1"].update(deadline_ms=250, valid_ms=500)
    cell = Cell(site, kind)
    generator = random.Random(seed)
    moments = sorted(generator.sample(range(parts // 20, parts - parts // 20), kills)) if kills else []
    try:
        site.start()
        for who in ("bridge", "plc"):
            cell.start(who)
        with site.line() as line:
            # The first part that the PLC sees ends the start of bridge and PLC.
            first = warm_up(cell, line)
            schedule = Schedule(range(first, first + parts), rate, [first + moment for moment in moments], generator)
            send(cell, line, schedule)
            until = time.monotonic() + _SETTLE_S
            while time.monotonic() < until:
                line.pump(20)
                cell.tend()
            epoch = line.epoch
    finally:
        cell.stop()
    return report(cell, epoch, parts)


def warm_up(cell: Cell, line: Line) -> int:
    """Send a part at a time until the PLC notes one; the number to go on with."""
    until = time.monotonic() + 60
    seq = 0
    while not read_notes(cell.notes):
        if time.monotonic() > until:
            raise InspectError(f"the PLC saw no part within 60 s; {cell.site.folder}/bridge.txt and plc.txt say why")
        line.send(raw_frame(good_pixels(seq, _SIZE), epoch=line.epoch, seq=seq))
        seq += 1
        line.pump(200)
        cell.tend()
    return seq


@dataclass
class Schedule:
    """Which parts, how many a second, and at which of them one of the three is killed."""

    seqs: range
    rate: float
    moments: list[int]
    generator: random.Random


def send(cell: Cell, line: Line, schedule: Schedule) -> None:
    """At a steady rate; every fourth part is bad."""
    generator, start_s = schedule.generator, time.monotonic()
    for place, seq in enumerate(schedule.seqs):
        while (wait_s := start_s + place / schedule.rate - time.monotonic()) > 0:
            line.pump(1000 * wait_s)
        cell.tend()
        alive = [who for who in VICTIMS if who not in cell.due]
        if seq in schedule.moments and alive:
            cell.kill(generator.choice(alive), generator.uniform(0.0, 1.0))
        pixels = bad_pixels if generator.randrange(4) == 0 else good_pixels
        line.send(raw_frame(pixels(seq % 50, _SIZE), epoch=line.epoch, seq=seq))


def report(cell: Cell, epoch: str, parts: int) -> dict[str, Any]:
    """What the PLC noted, against the journal."""
    verdicts = {
        record["seq"]: (record["outcome"], record["ns"])
        for record in cell.site.journal()
        if record["t"] == "verdict" and record["epoch"] == epoch and "seqTo" not in record
    }
    valid_ns = (cell.site.config["cameras"]["cam1"]["valid_ms"] + 1000 * (ALIVE_S + _CLOCK_S)) * 1e6
    problems, passed, rejected = [], set(), set()
    oldest_ms = 0.0
    for note in read_notes(cell.notes):
        seq = note["seq"]
        if not note["passed"]:
            rejected.add(seq)
            continue
        outcome, decided_ns = verdicts.get(seq, ("none", 0))
        age_ms = (note["atNs"] - decided_ns) / 1e6
        if outcome != "PASS":
            problems.append(f"part {seq}: the PLC passed it, the journal says {outcome}")
        elif note["tag"] != f"part-{seq}":
            problems.append(f"part {seq}: passed under the tag {note['tag']}")
        elif note["atNs"] - decided_ns > valid_ns:
            problems.append(f"part {seq}: passed {age_ms:.0f} ms after its verdict")
        elif seq in rejected:
            problems.append(f"part {seq}: rejected, then passed")
        passed.add(seq)
        oldest_ms = max(oldest_ms, age_ms)
    issued = {seq for seq, (outcome, _) in verdicts.items() if outcome == "PASS"}
    return {
        "parts": parts, "kills": dict(cell.kills), "passedByDaemon": len(issued), "passedByPlc": len(passed & issued),
        "rejectedByPlc": len(rejected - passed), "oldestPassMs": round(oldest_ms, 1),
        "problemsFound": len(problems), "problems": problems[:_MOST_TOLD],
    }  # fmt: skip


@click.command()
@click.option("--parts", type=click.IntRange(40), default=2000, show_default=True)
@click.option("--rate", type=click.FloatRange(1), default=20.0, show_default=True)
@click.option("--kills", type=click.IntRange(0), default=20, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--only", type=click.Choice(list(KINDS.values())))
def main(parts: int, rate: float, kills: int, seed: int, only: str | None) -> None:
    """All three ways, one after the other."""
    results = {}
    for name, kind in KINDS.items():
        if only in (None, kind):
            with tempfile.TemporaryDirectory(prefix="inspectd-plc-") as folder:
                results[name] = measure(Path(folder), kind, parts=parts, rate=rate, kills=kills, seed=seed)
            print(json.dumps({name: results[name]}), flush=True)
    if only is None:
        versions = origin("pyzmq", "pymodbus", "asyncua", "openvino")
        write_result("plc.json", {**versions, "protocol": __doc__, "framesPerS": rate, "runs": results})
    sys.exit(1 if any(result["problems"] for result in results.values()) else 0)


if __name__ == "__main__":
    main()
