"""Hot swap and rollback: whatever goes wrong, the old engine judges, and every part has one verdict."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from daemon.dispatch import Dispatcher
from daemon.errors import BundleError, UsageError
from daemon.inspection.engine import DoneBox, Engine, Job
from daemon.inspection.shadow import Comparison
from daemon.line.control import ask
from daemon.record.metrics import Metrics
from daemon.shelf import linked_version, parse_engine, previous_version, put_to_work
from daemon.swap import WATCHED, Swapper
from daemon.types import EngineId, Outcome, PartKey, Reason, Verdict
from tests.bundles import install_bundle
from tests.daemons import Site, make_site
from tests.faulty_daemon import HANG, THROW
from tests.lines import faulty_site, ordered, pump_until, send, settle

PASSED, FAILED = Verdict(Outcome.PASS, None), Verdict(Outcome.REJECT, Reason.ENGINE_ERROR)


# --- the links


@pytest.mark.parametrize(
    "text",
    ["part", "part/", "/1", "part/1/2", "../x/1", "part/..", "part/.1.partial", "part/current", "a b/1", "p/1\n"],
)
def test_engine_that_is_no_name_and_version_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="NAME/VERSION"):
        parse_engine(text)


def test_current_and_previous_follow_what_is_put_to_work(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    with pytest.raises(UsageError, match="no engine was active before"):
        previous_version(tmp_path, "part")
    for version in ("1", "2", "2", "3"):
        put_to_work(tmp_path, "part", version)
    assert linked_version(tmp_path, "part") == "3"
    assert previous_version(tmp_path, "part") == "2"
    put_to_work(tmp_path, "part", "2")
    assert previous_version(tmp_path, "part") == "3"
    assert sorted(path.name for path in (tmp_path / "part").iterdir()) == ["current", "previous"]


def test_link_that_cannot_be_written_is_told_with_its_folder(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="part/current: cannot be written: No such file"):
        put_to_work(tmp_path, "part", "1")


# --- the comparison


def test_frames_are_compared_whoever_speaks_first() -> None:
    comparison = Comparison(10)
    said = [
        ("a", False, Outcome.PASS),
        ("b", True, Outcome.REJECT),
        ("a", True, Outcome.REJECT),
        ("c", True, Outcome.PASS),
    ]
    for name, is_new, outcome in [*said, ("b", False, Outcome.REJECT)]:
        comparison.add(PartKey("cam1", name, 0), outcome, is_new=is_new)
    assert comparison.header() == {"frames": 2, "agreed": 1, "oldRejects": 1, "newRejects": 2}


def test_frames_of_which_one_engine_never_speaks_are_bounded() -> None:
    comparison = Comparison(10)
    for seq in range(1000):
        comparison.add(PartKey("cam1", "e", seq), Outcome.PASS, is_new=False)
    comparison.add(PartKey("cam1", "e", 999), Outcome.PASS, is_new=True)
    comparison.add(PartKey("cam1", "e", 0), Outcome.PASS, is_new=True)
    assert comparison.frames == 1
    assert len(comparison._unpaired) <= 65


# --- the swapper on engines that do as they are told


class Books(Dispatcher):
    """The dispatcher's engines alone."""

    products = {"part"}  # type: ignore[assignment]  # noqa: RUF012

    def __init__(self) -> None:
        self.engines, self.observer = {}, None


class FakePipeline:
    """Gives one verdict for all; waits first while `gate` is closed."""

    def __init__(self, version: str, verdict: Verdict = PASSED) -> None:
        judged_by = SimpleNamespace(limit=1.0, bound95=0.05)
        manifest = SimpleNamespace(products={"part": judged_by}, version=version, name="part")
        self.bundle: Any = SimpleNamespace(
            folder=Path("engines/part") / version, digest=version * 16, manifest=manifest
        )
        self.backend = self
        self.verdict, self.closed = verdict, threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def inspect(self, _frame: Any, product: str) -> Verdict:
        assert self.gate.wait(10)
        engine = EngineId(product, self.bundle.manifest.version, self.bundle.digest)
        return Verdict(self.verdict.outcome, self.verdict.reason, engine=engine)

    def close(self) -> None:
        self.closed.set()


class Stage:
    """A swapper over engine 1, with a loop that the test turns."""

    def __init__(self, folder: Path, new: FakePipeline | Exception | None = None) -> None:
        (folder / "part").mkdir()
        put_to_work(folder, "part", "1")
        self.folder, self.old, self.new = folder, FakePipeline("1"), new or FakePipeline("2")
        self.done, self.books, self.loading = DoneBox(), Books(), threading.Event()
        self.loading.set()
        self.engine = Engine(self.old, self.done.put)  # type: ignore[arg-type]
        self.engine.start()
        self.books.engines["part"] = self.engine
        self.metrics = Metrics()
        self.metrics.engine_info.labels("part", "1", "1" * 16).set(1)
        self.swapper = Swapper(folder, self.books, self.metrics, self.done, self._load)
        self.seq = 0

    def _load(self, folder: Path) -> Any:
        assert self.loading.wait(10)
        assert folder == self.folder / "part/2"
        if isinstance(self.new, Exception):
            raise self.new
        return self.new

    def turn(self, until: Callable[[], bool]) -> None:
        """The loop, until the condition holds."""
        deadline = time.monotonic() + 10
        while not until():
            assert time.monotonic() < deadline
            for done in self.done.take():
                self.swapper.inspected("part", done)
            self.swapper.step(time.monotonic_ns(), 60_000)
            time.sleep(0.001)

    def frame(self) -> PartKey:
        """A live frame for whichever engine is at work."""
        key = PartKey("cam1", "e", self.seq)
        self.seq += 1
        job = Job(key, None, "part", 0, 2**62)  # type: ignore[arg-type]
        self.books.engines["part"].submit(job)
        self.swapper.submitted(job)
        return key

    @property
    def result(self) -> str:
        return str((self.swapper.status() or {}).get("result"))

    def at_work(self) -> str:
        return self.books.engines["part"].pipeline.bundle.manifest.version

    def info(self) -> list[str]:
        """The versions that the metrics name."""
        samples = next(iter(self.metrics.engine_info.collect())).samples
        return [sample.labels["version"] for sample in samples]


def test_new_engine_takes_over_and_the_old_one_leaves_when_it_has_shown_itself(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.swapper.activate("part/2", 0, b"client")
    stage.turn(lambda: stage.result == "watching")
    ((client, answer),) = stage.swapper.answers()
    assert (client, answer["ok"], answer["engine"], answer["from"]) == (b"client", True, "part/2", "1")
    assert (stage.at_work(), stage.info(), linked_version(tmp_path, "part")) == ("2", ["2"], "2")
    assert not stage.old.closed.is_set()
    for _ in range(WATCHED):
        stage.frame()
    stage.turn(lambda: stage.result == "active")
    assert stage.old.closed.wait(10)
    assert stage.books.observer is None


@pytest.mark.parametrize("error", [BundleError("not signed"), RuntimeError("a fault of ours")])
def test_engine_that_cannot_be_loaded_changes_nothing(tmp_path: Path, error: Exception) -> None:
    stage = Stage(tmp_path, error)
    stage.swapper.activate("part/2", 0, b"client")
    stage.turn(lambda: stage.result == "failed")
    ((_, answer),) = stage.swapper.answers()
    assert not answer["ok"]
    assert str(error) in answer["error"]
    assert "the old engine stays" in answer["error"]
    assert (stage.at_work(), stage.info(), linked_version(tmp_path, "part")) == ("1", ["1"], "1")


def test_engine_that_does_not_know_the_product_is_turned_away_and_closed(tmp_path: Path) -> None:
    new = FakePipeline("2")
    new.bundle.manifest.products = {"other": SimpleNamespace(limit=1.0)}
    stage = Stage(tmp_path, new)
    stage.swapper.activate("part/2", 0, None)
    stage.turn(lambda: stage.result == "failed")
    assert new.closed.wait(10)
    assert stage.at_work() == "1"


def test_products_that_a_version_brings_are_served_and_go_again_with_it(tmp_path: Path) -> None:
    new = FakePipeline("2")
    new.bundle.manifest.products["lid"] = new.bundle.manifest.products["part"]
    stage = Stage(tmp_path, new)
    stage.swapper.activate("part/2", 0, None)
    stage.turn(lambda: stage.result == "watching")
    assert set(stage.books.engines) == {"part", "lid"}
    assert stage.books.engines["lid"] is stage.books.engines["part"]
    stage.swapper.roll_back(None, None)
    stage.turn(lambda: stage.at_work() == "1")
    assert set(stage.books.engines) == {"part"}
    assert stage.info() == ["1"]


def test_product_that_only_frames_name_does_not_keep_an_engine_away(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.old.bundle.manifest.products["lid"] = stage.old.bundle.manifest.products["part"]
    stage.books.engines["lid"] = stage.engine
    stage.metrics.engine_info.labels("lid", "1", "1" * 16).set(1)
    stage.swapper.activate("part/2", 0, None)
    stage.turn(lambda: stage.result == "watching")
    assert set(stage.books.engines) == {"part"}
    assert stage.at_work() == "2"


def test_live_frames_are_compared_before_the_swap(tmp_path: Path) -> None:
    stage = Stage(tmp_path, FakePipeline("2", Verdict(Outcome.REJECT, Reason.DEFECT)))
    stage.swapper.activate("part/2", 5, None)
    stage.turn(lambda: stage.result == "shadowing")
    while stage.at_work() == "1":
        stage.frame()
        stage.turn(lambda: not stage.swapper._swap.is_comparing or stage.at_work() == "2")  # type: ignore[union-attr]
    status = stage.swapper.status() or {}
    assert status["comparison"] == {"frames": 5, "agreed": 0, "oldRejects": 0, "newRejects": 5}


def test_engine_that_fails_while_it_looks_on_speaks_for_no_part(tmp_path: Path) -> None:
    new = FakePipeline("2", FAILED)
    new.gate.clear()
    stage = Stage(tmp_path, new)
    stage.swapper.activate("part/2", 3, None)
    stage.turn(lambda: stage.result == "shadowing")
    stage.frame()
    stage.swapper._swap.error = "another reason to fail"  # type: ignore[union-attr]
    stage.turn(lambda: stage.result == "failed")
    new.gate.set()
    assert new.closed.wait(10)
    heard = stage.done.take()
    assert [done.verdict.engine.version for done in heard if done.verdict.engine] in ([], ["1"])


def test_engine_that_fails_on_a_live_frame_while_it_looks_on_is_not_put_to_work(tmp_path: Path) -> None:
    stage = Stage(tmp_path, FakePipeline("2", FAILED))
    stage.swapper.activate("part/2", 3, b"client")
    stage.turn(lambda: stage.result == "shadowing")
    stage.frame()
    stage.turn(lambda: stage.result == "failed")
    assert "failed on a live frame" in stage.swapper.answers()[0][1]["error"]
    assert stage.at_work() == "1"


def test_engine_that_hangs_while_it_looks_on_is_given_up(tmp_path: Path) -> None:
    new = FakePipeline("2")
    new.gate.clear()
    stage = Stage(tmp_path, new)
    stage.swapper.activate("part/2", 3, None)
    stage.turn(lambda: stage.result == "shadowing")
    stage.frame()
    stage.turn(lambda: stage.swapper._swap.new.busy_ms(time.monotonic_ns()) > 0)  # type: ignore[union-attr]
    stage.swapper.step(time.monotonic_ns() + 61 * 10**9, 60_000)
    assert stage.result == "failed"
    new.gate.set()


def test_engine_that_fails_in_its_first_frames_goes_and_the_old_one_is_back(tmp_path: Path) -> None:
    stage = Stage(tmp_path, FakePipeline("2", FAILED))
    stage.swapper.activate("part/2", 0, None)
    stage.turn(lambda: stage.result == "watching")
    stage.frame()
    stage.turn(lambda: stage.result == "returned")
    assert (stage.at_work(), stage.info(), linked_version(tmp_path, "part")) == ("1", ["1"], "1")
    assert isinstance(stage.new, FakePipeline)
    assert stage.new.closed.wait(10)
    assert not stage.old.closed.is_set()


def test_engine_that_failed_is_not_what_a_rollback_goes_to(tmp_path: Path) -> None:
    stage = Stage(tmp_path, FakePipeline("2", FAILED))
    put_to_work(tmp_path, "part", "0")
    put_to_work(tmp_path, "part", "1")
    stage.swapper.activate("part/2", 0, None)
    stage.turn(lambda: stage.result == "watching")
    assert previous_version(tmp_path, "part") == "1"
    stage.frame()
    stage.turn(lambda: stage.result == "returned")
    assert (linked_version(tmp_path, "part"), previous_version(tmp_path, "part")) == ("1", "0")


def test_engine_whose_first_frames_are_late_goes_too_but_not_for_frames_of_before(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.swapper.activate("part/2", 0, None)
    before_ns = time.monotonic_ns()
    stage.turn(lambda: stage.result == "watching")
    for _ in range(10):
        stage.swapper.late("part", before_ns)
        stage.swapper.late("other", time.monotonic_ns())
    assert stage.result == "watching"
    for _ in range(3):
        stage.swapper.late("part", time.monotonic_ns())
    assert (stage.result, stage.at_work()) == ("returned", "1")


def test_verdicts_of_the_old_engine_say_nothing_of_the_new_one(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.old.verdict = FAILED
    stage.old.gate.clear()
    stage.frame()
    stage.turn(lambda: stage.engine.busy_ms(time.monotonic_ns()) > 0)
    stage.swapper.activate("part/2", 0, None)
    stage.turn(lambda: stage.result == "watching")
    stage.old.gate.set()
    stage.turn(lambda: stage.engine.busy_ms(time.monotonic_ns()) == 0)
    stage.turn(lambda: not stage.done._done)
    assert stage.result == "watching"


def test_waiting_frames_move_over_in_order(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    assert isinstance(stage.new, FakePipeline)
    stage.old.gate.clear()
    keys = [stage.frame() for _ in range(5)]
    stage.turn(lambda: stage.engine.busy_ms(time.monotonic_ns()) > 0)
    stage.swapper.activate("part/2", 0, None)
    stage.new.gate.clear()
    stage.turn(lambda: stage.result == "watching")
    stage.new.gate.set()
    heard: list[Any] = []
    deadline = time.monotonic() + 10
    while len(heard) < 4 and time.monotonic() < deadline:
        heard += stage.done.take()
    stage.old.gate.set()
    while len(heard) < 5 and time.monotonic() < deadline:
        heard += stage.done.take()
    assert [done.key for done in heard] == [*keys[1:], keys[0]]
    assert [done.verdict.engine.version for done in heard] == ["2", "2", "2", "2", "1"]


def test_one_swap_at_a_time_and_no_swap_to_what_is_at_work(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    put_to_work(tmp_path, "part", "0")
    put_to_work(tmp_path, "part", "1")  # there is something to roll back to
    with pytest.raises(UsageError, match="part/1 is at work already"):
        stage.swapper.activate("part/1", 0, None)
    with pytest.raises(UsageError, match="found no engine 'other' at work, wanted one of part"):
        stage.swapper.activate("other/1", 0, None)
    stage.loading.clear()
    stage.swapper.activate("part/2", 0, None)
    for again in (lambda: stage.swapper.activate("part/3", 0, None), lambda: stage.swapper.roll_back("part", None)):
        with pytest.raises(UsageError, match="part/2 is loading; wait"):
            again()
    stage.loading.set()
    stage.turn(lambda: stage.result == "watching")


def test_rollback_in_the_first_frames_is_at_once(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.swapper.activate("part/2", 0, None)
    stage.turn(lambda: stage.result == "watching")
    stage.swapper.roll_back(None, b"client")
    assert (stage.at_work(), linked_version(tmp_path, "part")) == ("1", "1")
    assert stage.swapper.answers() == [(b"client", {"ok": True, "engine": "part/1"})]


def test_engine_that_has_left_is_held_by_nobody(tmp_path: Path) -> None:
    # An engine is tens of megabytes; the collector of cycles hardly ever runs in the daemon.
    gc.disable()
    try:
        stage = Stage(tmp_path)
        gone = weakref.ref(stage.engine)
        stage.swapper.activate("part/2", 0, None)
        stage.turn(lambda: stage.result == "watching")
        for _ in range(WATCHED):
            stage.frame()
        stage.turn(lambda: stage.result == "active")
        assert stage.old.closed.wait(10)
        del stage.engine
        stage.swapper.stop(5)
        assert gone() is None
    finally:
        gc.enable()


def test_daemon_that_ends_in_the_middle_of_a_swap_ends(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.swapper.activate("part/2", 0, None)
    stage.turn(lambda: stage.result == "watching")
    stage.swapper.stop(5)
    assert not stage.engine._thread.is_alive()


# --- on a daemon


def versions(line: Any) -> list[str]:
    return [part.results[0]["engine"]["version"] for part in line.parts.values() if part.results]


def run_while(site: Site, line: Any, *command: str) -> subprocess.CompletedProcess[str]:
    """A command of inspectd beside a line that goes on."""
    arguments = [sys.executable, "-m", "daemon", *command]
    process = subprocess.Popen(
        arguments, cwd=site.folder, env=site.variables(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < until:
        send(line, len(line.parts))
        line.pump(10)
    out, err = process.communicate(timeout=5)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def test_engine_is_swapped_under_load_and_every_part_has_one_verdict(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    install_bundle(tmp_path / "engines", tmp_path / "keys", "part", version="2", seed=5)
    site.start()
    with site.line() as line:
        births = []
        take = line.lease.receive
        line.lease.receive = lambda header, now: (
            births.append(header) if header["type"] == "BIRTH" else 0,
            take(header, now),
        )[1]  # type: ignore[method-assign]
        done = run_while(site, line, "activate", "part/2", "--shadow", "5")
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert (answer["engine"], answer["from"]) == ("part/2", "1")
        assert answer["comparison"]["frames"] == 5
        for _ in range(2 * WATCHED):
            send(line, len(line.parts))
            line.pump(20)
        settle(line)
        assert site.status()["swap"]["result"] == "active"
        assert site.status()["engines"]["part"]["version"] == "2"
        assert births[-1]["engines"]["part"] == site.status()["engines"]["part"]["digest"]
        found = versions(line)
        assert found == sorted(found)
        assert set(found) == {"1", "2"}
        done = run_while(site, line, "rollback")
        assert done.returncode == 0, done.stderr
        settle(line)
    assert site.stop() == 0
    assert linked_version(tmp_path / "engines", "part") == "1"
    assert site.run_command("ledger", "--verify").returncode == 0


@pytest.mark.parametrize("spoil", ["a changed byte", "no such version", "another key"])
def test_engine_that_is_not_what_was_signed_is_refused_and_the_line_goes_on(tmp_path: Path, spoil: str) -> None:
    site = make_site(tmp_path)
    folder = tmp_path / "engines/part/2"
    if spoil == "another key":
        install_bundle(tmp_path / "engines", tmp_path / "foreign", "part", version="2")
    elif spoil == "a changed byte":
        install_bundle(tmp_path / "engines", tmp_path / "keys", "part", version="2")
        bank = folder / "bank.safetensors"
        bank.write_bytes(bank.read_bytes()[:-1] + b"\xff")
    site.start()
    with site.line() as line:
        done = run_while(site, line, "activate", "part/2")
        assert done.returncode == 64
        assert "the old engine stays" in done.stderr
        assert str(folder) in done.stderr
        settle(line)
        assert set(versions(line)) == {"1"}
    assert linked_version(tmp_path / "engines", "part") == "1"
    assert site.stop() == 0


def test_engine_that_hangs_in_its_first_frames_is_not_what_the_restart_finds(tmp_path: Path) -> None:
    site = faulty_site(tmp_path)
    site.config["backend"]["hang_ms"] = 500
    install_bundle(tmp_path / "engines", tmp_path / "keys", "part", version="2", seed=5)
    site.start()
    with site.line() as line:
        assert ask(site.control, "activate", 30_000, engine="part/2")["ok"]
        assert linked_version(tmp_path / "engines", "part") == "2"
        send(line, 0, ordered(HANG))
        assert pump_until(line, lambda: bool(line.parts[0].results), 5)
        assert site.process is not None
        assert site.process.wait(10) == 70
    assert linked_version(tmp_path / "engines", "part") == "1"
    site.start()
    assert site.status()["engines"]["part"]["version"] == "1"
    assert site.stop() == 0


def test_engine_that_throws_in_its_first_frames_is_replaced_by_the_old_one(tmp_path: Path) -> None:
    site = faulty_site(tmp_path)
    install_bundle(tmp_path / "engines", tmp_path / "keys", "part", version="2", seed=5)
    site.start()
    with site.line() as line:
        assert ask(site.control, "activate", 30_000, engine="part/2")["ok"]
        send(line, 0, ordered(THROW))
        assert pump_until(line, lambda: bool(line.parts[0].results), 5)
        send(line, 1)
        settle(line)
        assert line.parts[0].results[0]["reason"] == "ENGINE_ERROR"
        assert line.parts[1].results[0]["engine"]["version"] == "1"
        assert site.status()["swap"]["result"] == "returned"
    assert site.stop() == 0


def test_daemon_may_be_stopped_while_an_engine_is_loading(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    install_bundle(tmp_path / "engines", tmp_path / "keys", "part", version="2", seed=5)
    site.start()
    command = [sys.executable, "-m", "daemon", "activate", "part/2", "--wait", "5"]
    client = subprocess.Popen(command, cwd=tmp_path, env=site.variables(), stderr=subprocess.PIPE)
    until = time.monotonic() + 20
    while "stage=loading" not in site.log and time.monotonic() < until:
        time.sleep(0.005)
    assert site.stop() == 0
    client.communicate(timeout=30)


def test_without_a_daemon_the_next_start_takes_the_engine(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    install_bundle(tmp_path / "engines", tmp_path / "keys", "part", version="2", seed=5)
    site.write_config()
    done = site.run_command("activate", "part/2")
    assert done.returncode == 70
    assert "--offline" in done.stderr
    assert site.run_command("rollback", "--offline").returncode == 64
    assert site.run_command("activate", "part/2", "--offline").returncode == 0
    site.start()
    assert site.status()["engines"]["part"]["version"] == "2"
    refused = site.run_command("activate", "part/1", "--offline")
    assert (refused.returncode, "a daemon runs" in refused.stderr) == (64, True)
    assert site.stop() == 0
    assert site.run_command("rollback", "--offline").returncode == 0
    assert linked_version(tmp_path / "engines", "part") == "1"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"command": "activate"}, "found engine None"),
        ({"command": "activate", "engine": 7}, "found engine 7"),
        ({"command": "activate", "engine": "../../etc"}, "NAME/VERSION"),
        ({"command": "activate", "engine": "part/1"}, "at work already"),
        ({"command": "activate", "engine": "part/2", "shadow": -1}, "found shadow -1"),
        ({"command": "activate", "engine": "part/2", "shadow": True}, "found shadow True"),
        ({"command": "reset", "camera": 7}, "found camera 7"),
        ({"command": "reset", "camera": "cam9"}, "found no camera 'cam9', wanted one of cam1"),
        ({"command": "rollback", "engine": "nobody"}, "no engine was active before"),
        ({"command": "rollback"}, "no engine was active before"),
    ],
)
def test_request_that_cannot_be_is_refused_with_what_was_wanted(
    running: Site, fields: dict[str, Any], told: str
) -> None:
    command = fields.pop("command")
    with pytest.raises(UsageError, match=told):
        ask(running.control, command, **fields)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Any:
    site = make_site(tmp_path_factory.mktemp("running"))
    site.start()
    yield site
    assert site.stop() == 0
