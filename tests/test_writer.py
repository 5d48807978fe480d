"""The writer's own housekeeping; what it records is tested with journal, ledger and recorder."""

import platform
from pathlib import Path

import pytest

from daemon import writer
from daemon.config import load_config
from daemon.record.journal import Journal
from daemon.record.metrics import Metrics

glibc_only = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries give memory back at once")


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


@glibc_only
def test_a_burst_of_frames_does_not_stay_in_memory():
    """Frames of 100 kB from the heap, every twentieth stays: those between cannot go back by themselves."""
    writer.trim_heap()
    before_mb = resident_mb()
    frames = [b"x" * 100_000 for _ in range(1000)]
    kept = frames[::20]
    burst_mb = resident_mb()
    del frames
    assert writer.trim_heap()
    assert burst_mb - before_mb > 90
    assert resident_mb() - before_mb < 30
    assert len(kept) == 50


def test_the_heap_is_trimmed_now_and_then(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(writer, "trim_heap", lambda: called.append(True))
    monkeypatch.setattr(writer, "_TRIM_EVERY_S", 0.0)
    monkeypatch.chdir(tmp_path)
    config = load_config(Path(__file__).parent.parent / "config.yaml")
    journal = Journal(tmp_path / "ledger")
    thread = writer.Writer(config, journal, None, Metrics())
    thread.start()
    thread.stop(10.0)
    assert called
    journal.close()
