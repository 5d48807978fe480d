"""Engines that fail at work, on the disk and in the middle of swaps."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from bench.bridge_log import issued_by
from bench.restarts import contradictions, told
from bench.swaps import ROWS, SIZE_HW, measure
from daemon.shelf import put_to_work
from tests.bundles import good_pixels, install_bundle
from tests.daemons import Site, make_site
from tests.faulty_daemon import HANG, NOT_A_NUMBER, THROW
from tests.lines import assert_books_balance, faulty_site, ordered, pump_until, send, settle, stream, wait_for


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: Any) -> Iterator[Site]:
    site = make_site(tmp_path_factory.mktemp("engines"))
    site.program = [sys.executable, "-m", "tests.faulty_daemon"]
    site.config["cameras"]["cam2"] = site.config["cameras"]["cam1"]
    site.start()
    yield site
    assert site.stop() == 0
    assert_books_balance(site)


@pytest.mark.parametrize("order", [THROW, NOT_A_NUMBER], ids=["throws", "is no number"])
def test_inference_that_fails_on_every_third_frame_costs_the_others_nothing(faulty, order):
    with faulty.line("cam1") as line, faulty.line("cam2") as beside:
        for seq in range(60):
            send(line, seq, ordered(order, seq) if seq % 3 == 0 else good_pixels(seq))
            line.pump(5)
            send(beside, seq)
            beside.pump(5)
        settle(line)
        settle(beside)
        found = {seq: (part.results[0]["outcome"], part.results[0]["reason"]) for seq, part in line.parts.items()}
        assert found == {seq: ("REJECT", "ENGINE_ERROR") if seq % 3 == 0 else ("PASS", None) for seq in range(60)}
        assert {part.results[0]["outcome"] for part in beside.parts.values()} == {"PASS"}


def test_inference_that_hangs_under_load_ends_the_daemon_and_the_next_one_goes_on(tmp_path):
    site = faulty_site(tmp_path)
    site.config["backend"]["hang_ms"] = 700
    site.start()
    with site.line() as line:
        stream(line, range(30), rate=100)
        settle(line)
        hanging = send(line, 30, ordered(HANG))
        assert site.process is not None
        seq = 31
        while site.process.poll() is None:
            stream(line, [seq], rate=100)
            seq += 1
        assert site.process.returncode == 70
        assert hanging.results[0]["reason"] == "LATE"
        site.start()
        last = seq + 100
        stream(line, range(seq, last), rate=100)
        wait_for(line, lambda: line.parts[last - 1].results)
        assert line.parts[last - 1].results[0]["outcome"] == "PASS"
        behind = [part for part in line.parts.values() if 30 <= part.seq < seq]
        assert not any(part.believed for part in behind if part.results and part.results[0]["outcome"] != "PASS")
    assert site.stop() == 0
    assert_books_balance(site)
    kept = {key: (each.outcome, each.reason) for key, each in issued_by(site.journal()).items()}
    assert contradictions(told(line), kept) == []


def test_engine_that_rots_on_the_disk_judges_on_from_memory_and_a_rotten_one_is_never_started(tmp_path):
    site = make_site(tmp_path)
    engines, keys = tmp_path / "engines", tmp_path / "keys"
    site.start()
    rotten = install_bundle(engines, keys, "part", version="2", seed=5) / "bank.safetensors"
    rotten.write_bytes(rotten.read_bytes()[:-1] + b"\xff")
    with site.line() as line:
        stream(line, range(20), rate=100)
        put_to_work(engines, "part", "2")
        for name in ("networks.onnx", "bank.safetensors", "manifest.json"):
            (engines / "part/1" / name).write_bytes(b"rot")  # in place: whoever has the file open sees it
        stream(line, range(20, 40), rate=100)
        send(line, 40, good_pixels(0))
        settle(line)
        results = [part.results[0] for part in line.parts.values()]
        assert {(result["outcome"], result["engine"]["version"]) for result in results} == {("PASS", "1")}
        assert results[40]["score"] == results[0]["score"]
        site.kill()
        site.start(wait=False)
        assert site.process is not None
        assert site.process.wait(30) == 78
        assert "part/2/bank.safetensors" in site.log
        assert site.log.count("state=RUNNING") == 1
        assert not pump_until(line, lambda: len(line.parts[40].results) > 1, 0.5)
    install_bundle(engines, keys, "part", version="3", seed=7)
    assert site.run_command("activate", "part/3", "--offline").returncode == 0
    site.start()
    with site.line() as line:
        stream(line, range(5), rate=100)
        settle(line)
    assert site.stop() == 0
    assert_books_balance(site)


def test_ten_swaps_under_load_cost_no_part_its_verdict(tmp_path):
    site = make_site(tmp_path, size=SIZE_HW, rows=ROWS)
    install_bundle(tmp_path / "engines", tmp_path / "keys", "part", version="2", size=SIZE_HW, rows=ROWS, seed=5)
    site.start()
    found = measure(site, swaps=10, rate=50)
    assert found["problems"] == []
    assert found["results"] == {"active": 10, "failed": 0, "returned": 0}
    assert site.stop() == 0
    assert_books_balance(site)
