"""The soak: it counts what the ledger counts, and it fails when it must."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from adapters.line import Line
from bench import soak
from bench.awake import kept_awake
from bench.soak_books import Fate, Tally, ledger_rows
from bench.soak_faults import RATES, Windows, schedule
from daemon.record.ledger import Ledger
from tests.bundles import make_bundle

S = 1_000_000_000
OPTIONS = soak.Options(
    minutes=0.12, rate=50, cameras=4, intensity=40, deaf_s=1.5, deadline_ms=2000, threads=1, seed=7, sample_s=0.5
)
CAMERAS = ("cam1", "cam2", "cam3", "cam4")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """A tiny bundle and who is trusted to have signed it."""
    folder = tmp_path_factory.mktemp("engine")
    return make_bundle(folder / "bundle", folder / "keys"), folder / "keys/trusted.yaml"


@pytest.fixture(scope="module")
def soaked(tmp_path_factory, engine):
    """A run of some seconds: its site, the result, and what its books were compared by."""
    site, pictures = soak.furnish(tmp_path_factory.mktemp("soak"), OPTIONS, *engine)
    compared = []
    with pytest.MonkeyPatch.context() as patch:
        balance = soak.balance
        patch.setattr(soak, "balance", lambda *all: (compared.append(all), balance(*all))[1])
        found = soak.soak(site, pictures, OPTIONS)
    return site, found, compared[0]


def test_a_run_with_every_fault_ends_with_books_that_balance(soaked):
    _, found, _ = soaked
    assert found["faults"] == []
    assert found["accepted"] + found["missing"] == found["verdicts"]
    assert found["deadlineMissed"] >= found["deadlineMissedOutsideFaults"]
    assert min(found["injected"].values()) > 0, found["injected"]
    assert found["bridgesThatSaidHelloAgain"] > 0


def test_no_more_is_injected_than_was_planned(soaked):
    _, found, _ = soaked
    planned = Counter(fault.kind for fault in schedule(7, 60 * OPTIONS.minutes, CAMERAS, 40, 1.5))
    assert all(found["injected"][kind] <= planned[kind] for kind in RATES)


def test_the_counts_are_the_ledgers(soaked):
    site, found, _ = soaked
    ledger = Ledger(site.folder / "run/ledger")
    assert ledger.fill() == 0
    audit = ledger.verify()
    assert audit.faults == []
    assert (audit.accepted, audit.missing, audit.verdicts) == (found["accepted"], found["missing"], found["verdicts"])
    for camera in CAMERAS:
        counts = found["cameras"][camera]
        in_ledger = sum(parts for name, _, _, parts in ledger.outcomes() if name == camera)
        assert counts["verdicts"] == counts["verdictsOnTheWire"] == in_ledger
        assert 0 < counts["accepted"] <= counts["sent"]
        assert counts["passesBelieved"] > 0
    ledger.close()


def test_what_was_left_out_came_back_as_missing(soaked):
    _, found, _ = soaked
    cameras = found["cameras"].values()
    # A frame that was lost with its connection is missing too, unless nothing came after it in its epoch.
    cut = sum(camera["unanswered"] for camera in cameras)
    left_out = sum(camera["leftOut"] for camera in cameras)
    assert 0 < left_out <= found["missing"] <= left_out + cut


DOCTORED = {
    "a part forgotten": (
        (
            "DELETE FROM parts WHERE (camera, epoch, seq) IN "
            "(SELECT camera, epoch, max(seq) FROM parts WHERE camera = 'cam2' GROUP BY epoch LIMIT 1)"
        ),
        "and not in the ledger",
    ),
    "another verdict": (
        (
            "UPDATE parts SET outcome = 'PASS', reason = NULL WHERE (camera, epoch, seq) IN "
            "(SELECT camera, epoch, seq FROM parts WHERE reason = 'DEFECT' LIMIT 1)"
        ),
        "the ledger has PASS, the wire said REJECT DEFECT",
    ),
    "a second verdict": (
        "INSERT INTO conflicts SELECT camera, epoch, seq, 'PASS', 'REJECT LATE' FROM parts LIMIT 1",
        "two verdicts, PASS and REJECT LATE",
    ),
    "an accepted part that never came": (
        (
            "UPDATE parts SET accepted = 0, outcome = 'REJECT', reason = 'MISSING' WHERE (camera, epoch, seq) IN "
            "(SELECT camera, epoch, seq FROM parts WHERE outcome = 'PASS' ORDER BY accepted_ns LIMIT 1)"  # before any fault
        ),
        "answered accepted, but not in the ledger as that",
    ),
    "a missing part that was accepted": (
        (
            "UPDATE parts SET accepted = 1 WHERE (camera, epoch, seq) IN "
            "(SELECT camera, epoch, seq FROM parts WHERE reason = 'MISSING' AND seq = seq_to LIMIT 1)"
        ),
        "in the ledger as accepted, but never sent",
    ),
    "a part without verdict": (
        (
            "UPDATE parts SET outcome = NULL, reason = NULL WHERE (camera, epoch, seq) IN "
            "(SELECT camera, epoch, seq FROM parts WHERE outcome = 'PASS' LIMIT 1)"
        ),
        "after the drain 1 parts are in flight",
    ),
    "a part of nobody": (
        (
            "UPDATE parts SET camera = 'cam9' WHERE (camera, epoch, seq) IN "
            "(SELECT camera, epoch, max(seq) FROM parts WHERE camera = 'cam2' GROUP BY epoch LIMIT 1)"
        ),
        "a camera cam9, which sent nothing",
    ),
}


@pytest.mark.parametrize("name", DOCTORED)
def test_a_doctored_ledger_is_found_out(soaked, tmp_path, name):
    site, _, (_, tallies, windows) = soaked
    statement, told = DOCTORED[name]
    shutil.copytree(site.folder / "run/ledger", tmp_path / "run/ledger")
    with sqlite3.connect(tmp_path / "run/ledger/ledger.sqlite") as db:
        assert db.execute(statement).rowcount == 1
    _, faults = soak.balance(replace(site, folder=tmp_path), tallies, windows)
    assert any(told in fault for fault in faults), faults


def run_command(engine, folder, *more):
    bundle, trusted = engine
    files = ["--out", folder / "soak.json", "--picture", folder / "soak.svg"]
    brief = ["--minutes", 0.04, "--deadline-ms", 2000, "--cameras", 2, "--sample-s", 0.5]
    words = ["--engine", bundle, "--trusted", trusted, *files, *brief, *more]
    ended = CliRunner().invoke(soak.main, [str(word) for word in words])
    return ended, json.loads((folder / "soak.json").read_text())


def test_the_command_writes_what_it_found_and_draws_it(engine, tmp_path):
    ended, found = run_command(engine, tmp_path)
    assert ended.exit_code == 0, ended.output
    assert found["holds"] is True
    wanted = "minutes sent accepted missing verdicts deadlineMissed deadlineMissedOutsideFaults openFilesWarm "
    wanted += "openFilesEnd p99ByMinute injected commit machine"
    assert [key for key in wanted.split() if found[key] is None] == []
    assert found["memorySlopeMbPerHour"] is None
    assert "6 minutes" in found["memorySlopeNote"]
    assert len(found["p99ByMinute"]) == 1
    assert "</svg>" in (tmp_path / "soak.svg").read_text()


def test_a_verdict_that_is_not_told_fails_the_command(engine, tmp_path, monkeypatch):
    take, dropped = Line._take_result, []

    def lose_one(line, kind, header):
        if kind == b"result" and header["camera"] == line.camera == "cam2" and header["seq"] == 5 and not dropped:
            dropped.append(header)
        else:
            take(line, kind, header)

    monkeypatch.setattr(Line, "_take_result", lose_one)
    monkeypatch.setattr(soak, "_SETTLE_S", 1)
    ended, found = run_command(engine, tmp_path, "--faults", 0)
    assert len(dropped) == 1
    assert ended.exit_code == 1
    assert found["holds"] is False
    assert any("cam2" in fault and "the wire said None" in fault for fault in found["faults"])


def test_a_verdict_that_is_told_twice_fails_the_command(engine, tmp_path, monkeypatch):
    take = Line._take_result

    def repeat_one(line, kind, header):
        take(line, kind, header)
        if kind == b"result" and header["camera"] == line.camera == "cam1" and header["seq"] == 5:
            take(line, kind, {**header, "outcome": "REJECT", "reason": "LATE"})

    monkeypatch.setattr(Line, "_take_result", repeat_one)
    ended, found = run_command(engine, tmp_path, "--faults", 0)
    assert ended.exit_code == 1
    assert any("told twice" in fault for fault in found["faults"])


def test_a_bridge_that_is_not_shown_a_verdict_fails_the_command(engine, tmp_path, monkeypatch):
    take = Line._take_permit

    def overlook_one(line, header, now_ns, taken):
        if (header["camera"], header["seq"]) != ("cam1", 5):
            take(line, header, now_ns, taken)

    monkeypatch.setattr(Line, "_take_permit", overlook_one)
    ended, found = run_command(engine, tmp_path, "--faults", 0)
    assert ended.exit_code == 1
    assert any("was not shown it" in fault for fault in found["faults"])


def test_a_daemon_that_ends_fails_the_command(engine, tmp_path, monkeypatch):
    sample, seen = soak.sample, []

    def kill_at_the_third(site, start_ns):
        seen.append(sample(site, start_ns))
        if len(seen) == 3:
            site.process.kill()
        return seen[-1]

    monkeypatch.setattr(soak, "sample", kill_at_the_third)
    monkeypatch.setattr(soak, "_SETTLE_S", 1)
    ended, found = run_command(engine, tmp_path, "--faults", 0)
    assert ended.exit_code == 1
    assert "the daemon ended with -9" in found["faults"]


def test_what_the_host_took_is_told_by_minute():
    cores = os.cpu_count()
    taken = [soak.Sample(at_s, 1, 1, 1000 + cores * (0.1 * at_s if at_s < 60 else 6 + 0.5 * (at_s - 60)))
             for at_s in range(0, 125, 5)]  # fmt: skip
    assert soak.stolen_by_minute(taken) == [0.1, 0.5]
    assert soak.stolen_by_minute(taken[:1]) == []


def test_the_schedule_is_the_same_for_the_same_seed_and_knows_every_kind():
    plan = schedule(3, 3600, CAMERAS, 1.0, 12.0)
    assert plan == schedule(3, 3600, CAMERAS, 1.0, 12.0)
    assert plan != schedule(4, 3600, CAMERAS, 1.0, 12.0)
    found = Counter(fault.kind for fault in plan)
    for kind, a_minute in RATES.items():
        assert abs(found[kind] - 60 * a_minute) < 5 * (60 * a_minute) ** 0.5
    assert {fault.camera for fault in plan} == {None, *CAMERAS}
    assert schedule(3, 3600, CAMERAS, 0, 12.0) == []


def test_a_window_covers_its_own_camera_and_a_guests_covers_all():
    windows = Windows()
    windows.add("lost", "cam1", 10 * S, 11 * S)
    windows.add("slowSubscriber", None, 20 * S, 30 * S)
    mine, other = windows.covering("cam1"), windows.covering("cam2")
    assert mine(10 * S, 10 * S)
    assert mine(5 * S, 15 * S)
    assert not mine(5 * S, 9 * S)
    assert not mine(14 * S, 15 * S)
    assert not other(5 * S, 15 * S)
    assert other(25 * S, 26 * S)
    assert not windows.covering("cam1", ("reconnect",))(0, 40 * S)
    assert windows.counts()["lost"] == 1


def test_deadlines_missed_in_a_fault_are_counted_apart():
    tally = Tally("cam1", 100)
    tally.fates["e"] = {
        seq: Fate(sent_ns=at_s * S, answer="accepted", told="REJECT LATE", decided_ns=at_s * S + S // 10)
        for seq, at_s in enumerate((10, 70, 80))
    }
    windows = Windows()
    windows.add("reconnect", "cam1", 70 * S, 70 * S)
    found = soak.report(OPTIONS, [tally], windows, [soak.Sample(0, 1, 1)], 0)
    assert (found["deadlineMissed"], found["deadlineMissedOutsideFaults"]) == (3, 2)
    assert found["p99ByMinute"] == [100.0, 100.0]


def test_the_memory_slope_leaves_the_warm_up_out():
    grown = [soak.Sample(at_s, 100 + at_s / 3600 * (3 if at_s >= 300 else 500), 20) for at_s in range(0, 1800, 5)]
    assert soak.memory_slope(grown) == pytest.approx(3.0)
    assert soak.memory_slope([each for each in grown if each.at_s < 350]) is None


def test_descriptors_that_stay_open_are_seen_and_guests_are_not():
    leaking = [soak.Sample(at_s, 1, 20 + at_s // 300) for at_s in range(0, 1800, 5)]
    assert soak.open_files(leaking) == {"openFilesWarm": 21, "openFilesEnd": 25, "openFilesMost": 25}
    visited = [soak.Sample(at_s, 1, 22 if at_s % 10 else 20) for at_s in range(0, 1800, 5)]
    assert soak.open_files(visited) == {"openFilesWarm": 20, "openFilesEnd": 20, "openFilesMost": 22}


def test_rows_of_a_ledger_are_only_read(soaked):
    site, found, _ = soaked
    rows = ledger_rows(site.folder / "run/ledger")
    assert sum(row[3] - row[2] + 1 for row in rows) == found["verdicts"]


def test_kept_awake_every_core_has_a_loop_that_gives_way_to_anything() -> None:
    def loops() -> dict[int, set[int]]:
        own = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        idle = [int(child) for child in own if os.sched_getscheduler(int(child)) == os.SCHED_IDLE]
        return {child: os.sched_getaffinity(child) for child in idle}

    cores = os.sched_getaffinity(0)
    with kept_awake():
        end = time.monotonic() + 20
        while len(loops()) < len(cores) and time.monotonic() < end:
            time.sleep(0.02)
        assert sorted(map(sorted, loops().values())) == [[core] for core in sorted(cores)]
    assert loops() == {}
