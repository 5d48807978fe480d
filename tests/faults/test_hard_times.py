"""What the machine does to the daemon: a disk that is full for a while, a clock that jumps."""

from __future__ import annotations

import resource
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from adapters.line import Line, disagreements
from adapters.review.marks import Said, send_marks
from daemon.errors import UsageError
from daemon.types import PartKey
from tests.daemons import Site, make_site
from tests.lines import assert_books_balance, pump_until, stream

PART = PartKey("cam1", "e", 0)
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


def journal_bytes(site: Site) -> int:
    return sum(path.stat().st_size for path in (site.folder / "run/ledger").glob("journal-*.log"))


def limit_files(site: Site, most_bytes: int) -> None:
    """No file of the daemon may grow beyond; that is how a full disk feels, but for the errno."""
    assert site.process is not None
    resource.prlimit(site.process.pid, resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))


def verdicts(site: Site) -> list[int]:
    return [record["seq"] for record in site.journal() if record["t"] == "verdict"]


def judge(line: Line, numbers: range) -> None:
    """Send these parts and wait until every part so far is judged."""
    stream(line, numbers, rate=200)
    assert pump_until(line, lambda: all_judged(line), 10)


def all_judged(line: Line) -> bool:
    return all(part.results and part.permits for part in line.parts.values())


def test_line_goes_on_over_a_full_disk_and_the_books_are_whole_when_there_is_room(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    site.start()
    with site.line() as line:
        judge(line, range(20))
        assert line.lease.degraded is None
        limit_files(site, journal_bytes(site) + 100)  # in the middle of a record
        judge(line, range(20, 60))
        assert pump_until(line, lambda: line.lease.degraded == "JOURNAL", 5)
        assert "File too large" in site.status()["journalFault"]
        assert site.status()["state"] == "RUNNING"
        # A mark is somebody's word: it is not taken where it could be lost.
        with pytest.raises(UsageError, match="found books that cannot be written"):
            send_marks(site.control, Said("good", None, "anna"), [(PART, 1)])
        assert {part.results[0]["outcome"] for part in line.parts.values()} == {"PASS"}
        assert len(set(verdicts(site))) < 60
        limit_files(site, resource.RLIM_INFINITY)
        # No frame comes, and yet the books are written.
        assert pump_until(line, lambda: line.lease.degraded is None, 5)
        assert sorted(verdicts(site)) == list(range(60))
        assert disagreements(line, set()) == []
    assert site.stop() == 0
    assert_books_balance(site)


def test_daemon_killed_over_a_full_disk_speaks_twice_for_no_part_with_pass(tmp_path: Path) -> None:
    # What was decided and never written is MISSING after the restart: a REJECT where there was a PASS, never the reverse.
    site = make_site(tmp_path)
    site.start()
    with site.line() as line:
        judge(line, range(10))
        limit_files(site, journal_bytes(site))
        judge(line, range(10, 20))
        before = line.run
        site.kill()
        site.start()
        heard = len(line.foreign)
        # Both sockets must be back: the bridge's lease, and the new run's health on the results socket.
        back = pump_until(line, lambda: line.run != before and line.lease.is_fresh(time.monotonic_ns()), 15)
        assert back, "the line never came back"
        judge(line, range(20, 30))
        told = [header for header in line.foreign[heard:] if header["outcome"] != "REJECT"]
        assert told == []
    assert site.stop() == 0
    assert_books_balance(site)


@pytest.mark.skipif(FAKETIME is None, reason="libfaketime is not installed (Debian: faketime)")
def test_clock_that_jumps_changes_no_deadline_and_no_verdict(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    site.config["cameras"]["cam1"].update(deadline_ms=5000, valid_ms=5000)
    clock = tmp_path / "clock"
    clock.write_text("+0")
    site.environment = fake_clock(clock)
    site.start()
    with site.line() as line:
        for number, jump in enumerate(["+0", "+3600", "-86400", "+864000", "-8640000", "+0"]):
            clock.write_text(jump)
            judge(line, range(20 * number, 20 * number + 20))
        decided = [part.results[0]["decidedNs"] for part in line.parts.values()]
        assert max(decided) - min(decided) > 30 * 86_400 * 10**9  # else the clock never jumped
        assert {part.results[0]["outcome"] for part in line.parts.values()} == {"PASS"}
        assert disagreements(line, set()) == []
        clock.write_text("-34560000")
    assert site.stop() == 0
    site.environment = {}
    site.start()  # its clock is behind and ahead of what the journal holds
    assert site.stop() == 0
    assert_books_balance(site)
    assert sorted(verdicts(site)) == list(range(120))


def fake_clock(file: Path) -> dict[str, str]:
    """The wall clock as the file says, read at each call; the monotonic one stays."""
    fakes: dict[str, Any] = {"LD_PRELOAD": FAKETIME, "FAKETIME_TIMESTAMP_FILE": file, "FAKETIME_NO_CACHE": 1}
    return {key: str(value) for key, value in {**fakes, "FAKETIME_DONT_FAKE_MONOTONIC": 1}.items()}


def test_disk_without_room_for_a_first_segment_is_told_at_the_start(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    site.folder.joinpath("run").mkdir(exist_ok=True)
    site.start()
    assert site.stop() == 0
    shutil.rmtree(site.folder / "run/ledger")
    (site.folder / "run/ledger").write_text("a file where the folder should be")
    site.start(wait=False)
    assert site.process is not None
    assert site.process.wait(30) != 0
    assert "ledger" in site.log
