"""What systemd and the journal of the machine hear: sd_notify datagrams, and logs that no flood can swell."""

from __future__ import annotations

import io
import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import pytest

from daemon import logs
from daemon.line.notify import notify, watchdog_interval_s
from daemon.logs import RateLimit, set_up_logs


@contextmanager
def listener(address: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(address)
        datagrams.setblocking(False)
        yield datagrams


# --- sd_notify


def test_fields_arrive_as_one_datagram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with listener(str(tmp_path / "notify")) as systemd:
        notify("READY=1", "STATUS=inspecting")
        notify("WATCHDOG=1")
        assert [systemd.recv(100), systemd.recv(100)] == [b"READY=1\nSTATUS=inspecting", b"WATCHDOG=1"]


def test_abstract_socket_is_spoken_to(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"inspectd-{uuid4().hex}"
    monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
    with listener(f"\0{name}") as systemd:
        notify("STOPPING=1")
        assert systemd.recv(100) == b"STOPPING=1"


@pytest.mark.parametrize("address", [None, ""])
def test_without_systemd_no_socket_is_made(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    monkeypatch.setattr(socket, "socket", lambda *_: pytest.fail("a socket was made"))
    notify("READY=1")


def test_systemd_that_is_gone_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    before = len(list(Path("/proc/self/fd").iterdir()))
    notify("READY=1")  # never there
    with listener(str(tmp_path / "notify")):
        pass
    notify("READY=1")  # there, and nobody listens
    monkeypatch.setenv("NOTIFY_SOCKET", "/" + "x" * 200)
    notify("READY=1")  # no address at all
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_systemd_that_does_not_read_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop sends these, and it must never wait."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    most = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text()) + 2

    def talk() -> None:
        for _ in range(most):
            notify("WATCHDOG=1")

    talker = threading.Thread(target=talk, daemon=True)
    with listener(str(tmp_path / "notify")):
        talker.start()
        talker.join(10)
        stuck = talker.is_alive()
    talker.join()  # a closed socket wakes whoever waits for it
    assert not stuck


def test_watchdog_is_fed_twice_in_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "10000000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    assert watchdog_interval_s() == 5.0
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert watchdog_interval_s() == 5.0


@pytest.mark.parametrize(
    ("microseconds", "process"),
    [(None, None), ("", None), ("soon", None), ("-1", None), ("10000000", "1"), ("10000000", "x")],
)
def test_without_a_watchdog_for_this_process_there_is_no_interval(
    monkeypatch: pytest.MonkeyPatch, microseconds: str | None, process: str | None
) -> None:
    for name, value in (("WATCHDOG_USEC", microseconds), ("WATCHDOG_PID", process)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert watchdog_interval_s() is None


# --- logs


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the rate limit sees; set its one value."""
    now = [1000.0]
    monkeypatch.setattr(logs, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What goes to stderr; the logger is left as it was found."""
    root = logging.getLogger("inspectd")
    before = (root.handlers[:], root.level, root.propagate)
    stream = io.StringIO()
    monkeypatch.setattr(logs, "sys", SimpleNamespace(stderr=stream))
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    yield stream
    root.handlers[:], root.propagate = before[0], before[2]
    root.setLevel(before[1])


def lines(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


def test_event_is_one_line_with_level_and_room(written: io.StringIO) -> None:
    set_up_logs("info")
    logging.getLogger("inspectd.zap").warning("denied reason=%s", "UNKNOWN_KEY")
    (line,) = lines(written)
    assert line.endswith("WARNING inspectd.zap denied reason=UNKNOWN_KEY")


def test_level_decides_what_is_written(written: io.StringIO) -> None:
    set_up_logs("warning")
    logger = logging.getLogger("inspectd.service")
    logger.info("quiet")
    logger.error("loud")
    assert [line.split()[-1] for line in lines(written)] == ["loud"]


def test_setting_up_twice_writes_once(written: io.StringIO) -> None:
    set_up_logs("info")
    set_up_logs("info")
    logging.getLogger("inspectd.service").info("once")
    assert len(lines(written)) == 1


@pytest.mark.parametrize(
    ("level", "prefix"), [("debug", "<7>"), ("info", "<6>"), ("warning", "<4>"), ("error", "<3>"), ("critical", "<2>")]
)
def test_journald_reads_the_level_from_the_prefix(
    written: io.StringIO, monkeypatch: pytest.MonkeyPatch, level: str, prefix: str
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "8:1")
    set_up_logs("debug")
    getattr(logging.getLogger("inspectd.service"), level)("state=%s", "RUNNING")
    assert lines(written) == [f"{prefix}inspectd.service state=RUNNING"]


def test_every_line_of_a_traceback_has_the_prefix(written: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "8:1")
    set_up_logs("info")
    try:
        int("two\nlines")
    except ValueError:
        logging.getLogger("inspectd.service").exception("while stopping")
    found = lines(written)
    assert len(found) >= 4
    assert all(line.startswith("<3>") for line in found)
    assert found[0] == "<3>inspectd.service while stopping"
    assert found[-1].startswith("<3>ValueError: ")


def test_line_that_repeats_is_written_ten_times_then_counted(written: io.StringIO, clock: list[float]) -> None:
    set_up_logs("info")
    logger = logging.getLogger("inspectd.service")
    for number in range(25):
        logger.warning("bad header: %s", number)
    assert [line.split()[-1] for line in lines(written)] == [str(number) for number in range(10)]
    clock[0] += 10.0
    logger.warning("bad header: %s", "next")
    logger.warning("bad header: %s", "after")
    assert lines(written)[10].endswith("bad header: next (and 15 more like it)")
    assert lines(written)[11].endswith("bad header: after")


def test_flood_of_one_line_does_not_silence_another(written: io.StringIO, clock: list[float]) -> None:
    set_up_logs("info")
    for number in range(50):
        logging.getLogger("inspectd.service").warning("bad header: %s", number)
    logging.getLogger("inspectd.service").error("engine hung")
    logging.getLogger("inspectd.dispatch").warning("bad header: %s", "another room's")
    assert [line.split()[-1] for line in lines(written)[-2:]] == ["hung", "room's"]


def test_line_that_repeats_slowly_is_never_held_back(written: io.StringIO, clock: list[float]) -> None:
    set_up_logs("info")
    for _ in range(30):
        logging.getLogger("inspectd.service").info("state")
        clock[0] += 1.5
    assert len(lines(written)) == 30
    assert "more like it" not in written.getvalue()


def test_each_window_has_its_own_ten(clock: list[float]) -> None:
    limit = RateLimit()
    passed = []
    for _ in range(3):
        records = [logging.LogRecord("inspectd", logging.INFO, "", 0, "again", (), None) for _ in range(40)]
        passed.append(sum(limit.filter(record) for record in records))
        clock[0] += 10.0
    assert passed == [10, 10, 10]
