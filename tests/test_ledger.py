"""The ledger: every journal record once, the proof of promise 1, and each fault that would break it."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon import cli
from daemon.ledger_report import print_audit, print_summary
from daemon.record import ledger as ledger_module
from daemon.record.journal import Journal, encode_record, segments
from daemon.record.ledger import Ledger

Record = dict[str, Any]
DAY_NS = 86_400 * 10**9
STATE: Record = {"t": "run", "run": "r1", "ns": 1, "streams": {}, "pending": []}
CONFIG = """
version: 1
line: test
inputs: [{kind: router, bind: "ipc://frames"}]
results: {bind: "ipc://results"}
permits: {bind: "ipc://permits"}
control: {bind: "ipc://control"}
cameras: {cam1: {product: part, deadline_ms: 100, valid_ms: 100}}
ledger: {dir: ledger}
"""


def accept(seq: int, camera: str = "cam1", epoch: str = "e1") -> Record:
    return {"t": "accept", "camera": camera, "epoch": epoch, "seq": seq, "partId": f"part-{seq}", "ns": 1}


def verdict(
    seq: int, reason: str | None = None, *, camera: str = "cam1", epoch: str = "e1", ns: int = 2, **more: int
) -> Record:
    """A PASS, or a REJECT where a reason is given."""
    part = {"camera": camera, "epoch": epoch, "seq": seq, "partId": f"part-{seq}", "ns": ns}
    judged = {"outcome": "REJECT" if reason else "PASS", "reason": reason, "score": 0.5, "limit": 1.0}
    return {"t": "verdict", **part, **judged, "pValue": 0.25, "engine": "digest", **more}


def missing(first: int, last: int, **names: Any) -> Record:
    return verdict(first, "MISSING", seqTo=last, **names)


def inspected(*seqs: int, **names: Any) -> list[Record]:
    """Each part accepted and passed."""
    return [record for seq in seqs for record in (accept(seq), verdict(seq, **names))]


def write(folder: Path, *records: Record, begun_ns: int = 1) -> Journal:
    """A new segment with these records."""
    journal = Journal(folder)
    journal.begin(STATE, begun_ns)
    journal.write(*records)
    journal.close()
    return journal


def filled(folder: Path, *records: Record) -> Ledger:
    write(folder, *records)
    ledger = Ledger(folder)
    ledger.fill()
    return ledger


def rows(ledger: Ledger) -> list[Any]:
    return list(ledger._db.execute("SELECT * FROM parts ORDER BY camera, epoch, seq"))


# --- exactly once


def test_every_fact_of_a_part_is_in_its_row(tmp_path: Path) -> None:
    (row,) = filled(tmp_path, accept(7), verdict(7, "DEFECT", ns=99)).latest(10)
    assert row == {
        "camera": "cam1", "epoch": "e1", "seq": 7, "seq_to": 7, "part_id": "part-7", "accepted": 1, "accepted_ns": 1,
        "outcome": "REJECT", "reason": "DEFECT", "score": 0.5, "score_limit": 1.0, "p_value": 0.25,
        "engine": "digest", "decided_ns": 99,
    }  # fmt: skip


def test_filling_again_takes_nothing(tmp_path: Path) -> None:
    ledger = filled(tmp_path, *inspected(1, 2))
    before = rows(ledger)
    assert [ledger.fill(), Ledger(tmp_path).fill()] == [0, 0]
    assert rows(ledger) == before
    assert ledger.verify().faults == []


def test_filling_goes_on_in_the_same_segment_and_in_the_next(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    ledger = Ledger(tmp_path)
    assert ledger.fill() == 0
    journal.begin(STATE, 1)
    journal.write(accept(1))
    assert ledger.fill() == 2
    journal.write(verdict(1))
    journal.begin(STATE, 2)
    journal.write(accept(2))
    assert ledger.fill() == 3
    assert ledger.verify().accepted == 2
    assert ledger.fill() == 0


def test_record_that_is_half_written_is_taken_when_it_is_whole(tmp_path: Path) -> None:
    ledger = filled(tmp_path, accept(1))
    (path,) = segments(tmp_path)
    line = encode_record(verdict(1))
    with path.open("ab", buffering=0) as file:
        file.write(line[:20])
        assert ledger.fill() == 0
        file.write(line[20:])
    assert ledger.fill() == 1
    assert ledger.verify().in_flight == 0


@pytest.mark.parametrize("stops_at", range(11))
def test_stop_in_the_middle_of_a_batch_loses_and_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops_at: int
) -> None:
    write(tmp_path, *inspected(1, 2))
    write(tmp_path, *inspected(3, 4, 5), begun_ns=2)
    monkeypatch.setattr(ledger_module, "_BATCH", 4)
    taken = []

    def take(ledger: Ledger, record: Record) -> None:
        if len(taken) == stops_at:
            raise KeyboardInterrupt
        taken.append(record)
        original(ledger, record)

    original = Ledger._take
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "_take", take)
        with pytest.raises(KeyboardInterrupt):
            Ledger(tmp_path).fill()
    ledger = Ledger(tmp_path)
    assert ledger.fill() == 12 - stops_at // 4 * 4
    audit = ledger.verify()
    assert (audit.accepted, audit.verdicts, audit.faults) == (5, 5, [])


def test_database_on_a_full_disk_goes_on_when_there_is_room(tmp_path: Path) -> None:
    write(tmp_path, *inspected(*range(2000)))
    ledger = Ledger(tmp_path)
    (pages,) = ledger._db.execute("PRAGMA page_count").fetchone()
    ledger._db.execute(f"PRAGMA max_page_count = {pages + 3}")
    for _ in range(2):
        with pytest.raises(sqlite3.Error):
            ledger.fill()
    assert rows(ledger) == []
    ledger._db.execute("PRAGMA max_page_count = 1000000")
    assert ledger.fill() == 4001
    assert ledger.verify().faults == []


def test_many_may_open_a_new_ledger_at_once(tmp_path: Path) -> None:
    for folder in map(str, range(100)):
        start = threading.Barrier(4, timeout=30)

        def ledger(folder: str = folder, start: threading.Barrier = start) -> None:
            start.wait()
            Ledger(tmp_path / folder).close()

        with ThreadPoolExecutor(4) as pool:
            for opened in [pool.submit(ledger) for _ in range(4)]:
                opened.result()


def test_two_ledgers_that_fill_at_once_share_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "_BATCH", 7)
    write(tmp_path, *inspected(*range(150)))
    start = threading.Barrier(2, timeout=30)
    taken: list[int] = []

    def fill() -> None:
        ledger = Ledger(tmp_path)
        start.wait()
        taken.append(ledger.fill())
        ledger.close()

    threads = [threading.Thread(target=fill) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(taken) == 301
    audit = Ledger(tmp_path).verify()
    assert (audit.accepted, audit.verdicts, audit.faults) == (150, 150, [])


# --- the books balance


STEPS = st.lists(
    st.tuples(
        st.just("accept"), st.sampled_from(["cam1", "cam2"]), st.sampled_from([0, 0, 1, 2, 64, 65, 300]), st.booleans()
    )
    | st.tuples(st.just("settle"), st.integers(0, 20), st.sampled_from([None, "DEFECT", "LATE", "MISSING"]), st.none())
    | st.tuples(st.just("rotate"), st.none(), st.none(), st.none()),
    max_size=30,
)


def history(steps: list[Any]) -> tuple[list[list[Record]], tuple[int, int, int, int]]:
    """The records of a daemon by segment, and how many parts it accepted, missed, judged and has in flight."""
    written: list[list[Record]] = [[]]
    last: dict[str, tuple[str, int]] = {}
    in_flight: list[tuple[str, str, int]] = []
    accepted = absent = judged = epochs = 0
    for kind, first, second, new_epoch in steps:
        if kind == "accept":
            if first not in last or new_epoch:
                epochs += 1
                last[first], skip = (f"e{epochs}", 10 * epochs), 0
            else:
                skip = second
            epoch, seq = last[first]
            pieces = [(seq + 1, seq + skip)] if skip > 64 else [(s, s) for s in range(seq + 1, seq + skip + 1)]
            written[-1] += [missing(*piece, camera=first, epoch=epoch) for piece in pieces]
            last[first] = (epoch, seq + skip + 1)
            written[-1].append(accept(seq + skip + 1, first, epoch))
            in_flight.append((first, epoch, seq + skip + 1))
            accepted, absent, judged = accepted + 1, absent + skip, judged + skip
        elif kind == "settle" and in_flight:
            camera, epoch, seq = in_flight.pop(first % len(in_flight))
            written[-1].append(verdict(seq, second, camera=camera, epoch=epoch))
            judged += 1
        elif kind == "rotate":
            written.append([])
    return written, (accepted, absent, judged, len(in_flight))


@given(STEPS)
@settings(max_examples=60, deadline=None)
def test_books_of_any_valid_history_balance(steps: list[Any]) -> None:
    written, counts = history(steps)
    with TemporaryDirectory() as name:
        for number, records in enumerate(written):
            write(Path(name), *records, begun_ns=number + 1)
        ledger = Ledger(Path(name))
        ledger.fill()
        audit = ledger.verify()
        told = sum(parts for *_, parts in ledger.outcomes())
        ledger.close()
    assert (audit.accepted, audit.missing, audit.verdicts, audit.in_flight) == counts
    assert audit.accepted + audit.missing == audit.verdicts + audit.in_flight
    assert (audit.faults, audit.damaged) == ([], 0)
    assert told == audit.verdicts


def test_range_of_missing_parts_counts_each_of_them(tmp_path: Path) -> None:
    ledger = filled(tmp_path, *inspected(4), missing(5, 104), *inspected(105))
    audit = ledger.verify()
    assert (audit.accepted, audit.missing, audit.verdicts, audit.faults) == (2, 100, 102, [])
    assert ("cam1", "REJECT", "MISSING", 100) in ledger.outcomes()


def test_part_of_an_earlier_run_that_ends_as_missing_is_an_accepted_one(tmp_path: Path) -> None:
    write(tmp_path, accept(1))
    audit = filled(tmp_path, verdict(1, "MISSING")).verify()
    assert (audit.accepted, audit.missing, audit.verdicts, audit.in_flight) == (1, 0, 1, 0)


# --- the faults


@pytest.mark.parametrize(
    ("records", "told"),
    [
        ([accept(1), verdict(1), verdict(1, "DEFECT")], "cam1 e1 1: two verdicts, PASS and REJECT DEFECT"),
        ([*inspected(1), *inspected(3)], "cam1 e1: seq 1 is followed by 3: a hole"),
        ([*inspected(1), missing(2, 80), *inspected(80)], "cam1 e1: seq 80 is followed by 80: an overlap"),
        (
            [*inspected(1), missing(2, 80), *inspected(40), *inspected(81)],
            "cam1 e1: seq 80 is followed by 40: an overlap",
        ),
        ([*inspected(1), missing(2, 2), accept(2), verdict(2)], "cam1 e1 2: two verdicts, REJECT MISSING and PASS"),
    ],
)
def test_fault_is_found_and_told(tmp_path: Path, records: list[Record], told: str) -> None:
    faults = filled(tmp_path, *records).verify().faults
    assert told in faults


def test_verdict_on_a_part_that_was_never_accepted_is_a_fault(tmp_path: Path) -> None:
    """Only MISSING needs no accept; anything else that was judged and not accepted breaks the equation."""
    audit = filled(tmp_path, *inspected(1), verdict(2, "DEFECT"), *inspected(3)).verify()
    assert audit.missing == 0
    assert audit.faults != []


def test_damaged_record_is_counted(tmp_path: Path) -> None:
    write(tmp_path, *inspected(1, 2, 3))
    (path,) = segments(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"seq":2', b'"seq":7', 1))
    ledger = Ledger(tmp_path)
    ledger.fill()
    assert ledger.verify().damaged == 1


def test_two_streams_of_one_camera_do_not_have_to_join(tmp_path: Path) -> None:
    other = [accept(50, epoch="e2"), verdict(50, epoch="e2"), accept(9, "cam2"), verdict(9, camera="cam2")]
    assert filled(tmp_path, *inspected(1, 2), *other).verify().faults == []


# --- forgetting


def aged(days: float) -> int:
    return time.time_ns() - int(days * DAY_NS)


def test_forgetting_keeps_what_is_young_and_what_is_in_flight(tmp_path: Path) -> None:
    records = [accept(1), verdict(1, ns=aged(40)), accept(2), verdict(2, ns=aged(20)), accept(3)]
    ledger = filled(tmp_path, *records)
    ledger.forget(keep_days=30)
    assert [row[2] for row in rows(ledger)] == [2, 3]
    assert ledger.verify().faults == []
    assert ledger.fill() == 0


def test_forgetting_removes_old_segments_and_never_the_current_one(tmp_path: Path) -> None:
    for days in (90, 3, 1, 0.5):
        write(tmp_path, begun_ns=aged(days))
    ledger = Ledger(tmp_path)
    ledger.fill()
    before = segments(tmp_path)
    ledger.forget(keep_days=45)  # the ledger keeps its rows that long; of the journal two days are enough
    assert segments(tmp_path) == before[1:]  # the second began before the limit, and may hold what is younger
    ledger.forget(keep_days=1)
    assert segments(tmp_path) == before[2:]
    ledger.forget(keep_days=1)
    assert segments(tmp_path) == before[2:]


def test_segment_that_the_ledger_has_not_read_is_not_removed(tmp_path: Path) -> None:
    for days in (90, 60, 50):
        write(tmp_path, *inspected(days, ns=aged(days)), begun_ns=aged(days))
    ledger = Ledger(tmp_path)
    ledger.forget(keep_days=1)
    assert len(segments(tmp_path)) == 3
    assert ledger.fill() == 9


def test_forgetting_makes_no_hole_where_parts_were_decided_out_of_order(tmp_path: Path) -> None:
    records = [accept(1), accept(2), accept(3), verdict(1, ns=aged(32))]
    ledger = filled(tmp_path, *records, verdict(3, ns=aged(31)), verdict(2, ns=aged(29)), *inspected(4, ns=aged(28)))
    ledger.forget(keep_days=30)
    assert ledger.verify().faults == []
    assert {row[2] for row in rows(ledger)} >= {2, 4}


# --- what is printed


def test_newest_parts_are_decided_ones_newest_first(tmp_path: Path) -> None:
    ledger = filled(tmp_path, accept(1), verdict(1, ns=5), accept(2), verdict(2, ns=9), accept(3))
    assert [row["seq"] for row in ledger.latest(10)] == [2, 1]
    assert [row["seq"] for row in ledger.latest(1)] == [2]


def test_summary_counts_by_outcome_and_lists_the_newest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(
        tmp_path, *inspected(1, ns=5), accept(2), verdict(2, "DEFECT", ns=6), missing(3, 90, ns=7), *inspected(91, ns=8)
    )
    assert print_summary(tmp_path, 3) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["cam1", "PASS", "2"], ["cam1", "REJECT", "DEFECT", "1"], ["cam1", "REJECT", "MISSING", "88"],
    ]  # fmt: skip
    assert lines[3].split()[:5] == ["cam1", "e1", "91", "part-91", "PASS"]
    assert "3..90" in lines[4]
    assert "REJECT DEFECT score 0.500 limit 1.000" in lines[5]
    assert len(lines) == 6


def test_changes_stand_in_the_books_with_who_made_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = {"t": "event", "command": "activate", "engine": "part/2"}
    done = {**asked, "ns": 1_000_000_000, "user": "olga", "ok": True, "detail": None}
    refused = {**asked, "ns": 2_000_000_000, "user": None, "ok": False, "detail": "it is at work already"}
    ledger = filled(tmp_path, *inspected(1), done, accept(2), refused, verdict(2))
    assert [(row["user"], row["engine"], row["ok"]) for row in ledger.events(10)] == [
        (None, "part/2", 0), ("olga", "part/2", 1)
    ]  # fmt: skip
    assert ledger.verify().faults == []
    ledger.forget(1)
    assert len(ledger.events(10)) == 2  # they are few, and asked about long after the parts are gone
    ledger.close()
    assert print_summary(tmp_path, 1) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "1970-01-01T00:00:02+00:00 activate part/2 by unknown refused: it is at work already"
    )


def test_audit_of_good_books_ends_with_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, *inspected(1), missing(2, 4), accept(5))
    assert print_audit(tmp_path) == 0
    out = capsys.readouterr().out
    assert "accepted 2 + missing 3 = verdicts 4 + in flight 1" in out
    assert "the books balance" in out


def ledger_command(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    (folder / "config.yaml").write_text(CONFIG)
    monkeypatch.setattr("sys.argv", ["inspectd", "ledger", "--config", str(folder / "config.yaml"), *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.usefixtures("own_logs")
@pytest.mark.parametrize(
    ("options", "records", "code", "told"),
    [
        ([], inspected(1), 0, "cam1             PASS"),
        (["--verify"], inspected(1), 0, "the books balance"),
        (["--verify"], [*inspected(1), *inspected(3)], 65, "FAULT cam1 e1: seq 1 is followed by 3: a hole"),
        (["--last", "1"], inspected(1, 2), 0, "part-2"),
    ],
)
def test_ledger_command_ends_with_65_on_faults(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    records: list[Record],
    code: int,
    told: str,
) -> None:
    write(tmp_path / "ledger", *records)
    assert ledger_command(tmp_path, monkeypatch, *options) == code
    assert told in capsys.readouterr().out


@pytest.mark.usefixtures("own_logs")
def test_ledger_that_never_was_is_bad_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ledger_command(tmp_path, monkeypatch) == 65
    assert "no ledger is there" in capsys.readouterr().err


@pytest.mark.usefixtures("own_logs")
@pytest.mark.parametrize("options", [[], ["--verify"]])
def test_ledger_that_is_no_database_is_bad_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / "ledger.sqlite").write_bytes(b"this is no database, and long enough to be seen as none" * 99)
    assert ledger_command(tmp_path, monkeypatch, *options) == 65


@pytest.fixture
def own_logs() -> Iterator[None]:
    """The command sets up the process's logs; the next test must not find them."""
    logger = logging.getLogger("inspectd")
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])
