"""What tests do with a line: send good frames at a pace, order a fault, wait for what must come, prove the books."""

from __future__ import annotations

import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters.line import Line, SentPart, disagreements
from tests.bundles import Pixels, good_pixels, raw_frame
from tests.daemons import ROOT, Site, make_site

FAULTY_DEADLINE_MS = 250


def faulty_site(folder: Path) -> Site:
    """A site whose engine obeys the orders in frames, and whose cameras have a short deadline."""
    site = make_site(folder)
    site.program = [sys.executable, "-m", "tests.faulty_daemon"]
    site.config["cameras"]["cam1"]["deadline_ms"] = FAULTY_DEADLINE_MS
    return site


def mutate(site: Site, file: str, heart: str, mutation: str) -> None:
    """Let the site run a copy of the daemon in which `heart` is replaced."""
    # The site's own folder comes first in the import order of `python -m`, so this copy is what runs.
    shutil.copytree(ROOT / "daemon", site.folder / "daemon", ignore=shutil.ignore_patterns("__pycache__"))
    source = site.folder / "daemon" / file
    text = source.read_text()
    assert text.count(heart) == 1, "the mutation does not fit the code any more"
    source.write_text(text.replace(heart, mutation))


def ordered(order: int, seed: int = 0) -> Pixels:
    """A good frame whose first pixel carries an order to the faulty backend."""
    pixels = good_pixels(seed)
    pixels[0, 0, 0] = order
    return pixels


def send(line: Line, seq: int, pixels: Pixels | None = None, **changes: Any) -> SentPart:
    frame = raw_frame(good_pixels(seq) if pixels is None else pixels, camera=line.camera, epoch=line.epoch, seq=seq)
    return line.send(replace(frame, **changes))


def stream(line: Line, numbers: Iterable[int], rate: float) -> None:
    """Good frames at a rate, and whatever comes back meanwhile."""
    for seq in numbers:
        send(line, seq)
        line.pump(1000 / rate)


def pump_until(line: Line, condition: Callable[[], Any], timeout_s: float) -> bool:
    """Let the line go on until the condition holds; whether it did in time."""
    until = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < until:
        line.pump(10)
    return bool(condition())


def wait_for(line: Line, condition: Callable[[], Any], timeout_s: float = 20.0) -> None:
    assert pump_until(line, condition, timeout_s), "what was waited for did not come"


def settle(line: Line, lost: set[int] | None = None, timeout_s: float = 20.0) -> None:
    """Wait until every part is judged on both channels: each once, on both alike, and none let pass that was not PASS."""
    wait_for(line, lambda: all(part.results and part.permits for part in line.parts.values()), timeout_s)
    assert disagreements(line, lost or set()) == []
    assert {part.results[0]["outcome"] for part in line.parts.values() if part.believed} <= {"PASS"}


def assert_books_balance(site: Site) -> None:
    done = site.run_command("ledger", "--verify")
    assert done.returncode == 0, done.stdout
    assert "in flight 0" in done.stdout
    verdicts: dict[tuple[str, str, int], list[str]] = defaultdict(list)
    for record in site.journal():
        if record["t"] == "verdict":
            for seq in range(record["seq"], record.get("seqTo", record["seq"]) + 1):
                verdicts[record["camera"], record["epoch"], seq].append(record["outcome"])
    accepted = {(r["camera"], r["epoch"], r["seq"]) for r in site.journal() if r["t"] == "accept"}
    assert accepted <= set(verdicts), "an accepted part has no verdict"
    assert {len(told) for told in verdicts.values()} == {1}, "a part has two verdicts in the journal"
