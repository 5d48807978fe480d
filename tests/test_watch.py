"""DRIFT and SETUP on a line: which camera, until when, what becomes of the verdicts, and who hears of it."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from adapters.line import Line
from daemon.commands import tell_degraded
from daemon.config import Camera
from daemon.errors import UsageError
from daemon.inspection.quality import STATISTICS
from daemon.inspection.reference import Reference
from daemon.line.control import account, ask
from daemon.line.wire import MAX_HEADER_BYTES, encode_header
from daemon.record.metrics import Metrics
from daemon.types import EngineId, Outcome, Reason, Verdict
from daemon.watch import DRIFT, SETUP, Watch
from examples.parts import render_part
from tests.bundles import install_bundle
from tests.daemons import Site, free_port, make_site
from tests.lines import send, settle, wait_for

N = 100


def camera(on_setup_change: str = "warn") -> Camera:
    return Camera(product="part", deadline_ms=100, valid_ms=100, on_setup_change=on_setup_change)


def engine(digest: str = "a", seed: int = 0) -> Any:
    """What the watch sees of a pipeline: calibration scores about 0, brightness about 100."""
    rng = np.random.default_rng(seed)
    images = {"brightness": rng.normal(100, 2, N).tolist()}
    reference = Reference(digest, 0.05, np.sort(rng.normal(size=N)).tolist(), images, None)
    return SimpleNamespace(bundle=SimpleNamespace(digest=digest), references={"part": reference})


def judged(score: float = 0.0, brightness: float | None = None, digest: str = "a") -> Verdict:
    quality = None if brightness is None else {"brightness": brightness}
    return Verdict(Outcome.PASS, None, score=score, engine=EngineId("part", "1", digest), quality=quality)


@pytest.fixture
def watch() -> Watch:
    return Watch({"cam1": camera(), "cam2": camera(), "strict": camera("reject")}, Metrics())


def feed(watch: Watch, name: str, verdicts: list[Verdict], pipeline: Any = None) -> None:
    for verdict in verdicts:
        watch.feed(name, pipeline or engine(), verdict)


def good(count: int, seed: int = 1) -> list[Verdict]:
    rng = np.random.default_rng(seed)
    return [judged(float(rng.normal()), float(rng.normal(100, 2))) for _ in range(count)]


def drifted(count: int, seed: int = 2) -> list[Verdict]:
    rng = np.random.default_rng(seed)
    return [judged(float(rng.normal(2.5)), float(rng.normal(100, 2))) for _ in range(count)]


def dimmed(count: int, seed: int = 3) -> list[Verdict]:
    rng = np.random.default_rng(seed)
    return [judged(float(rng.normal()), float(rng.normal(85, 2))) for _ in range(count)]


# --- the states


def test_line_like_its_calibration_is_in_no_state(watch: Watch) -> None:
    feed(watch, "cam1", good(500))
    assert watch.words == ()
    assert watch.status()["cam1"]["part"]["alarms"] == {}


def test_scores_that_drift_are_told_of_their_camera_alone(watch: Watch) -> None:
    feed(watch, "cam2", good(60))
    feed(watch, "cam1", [*good(60), *drifted(60)])
    assert watch.words == (DRIFT,)
    status = watch.status()
    assert re.match(r"scores of passed parts higher than in calibration", status["cam1"]["part"]["alarms"][DRIFT])
    assert status["cam2"]["part"]["alarms"] == {}
    assert status["cam2"]["part"]["driftStatistic"] < 1.0 <= status["cam1"]["part"]["driftStatistic"]


def test_frames_that_change_are_told_with_what_changed(watch: Watch) -> None:
    feed(watch, "cam1", [*good(60), *dimmed(40)])
    assert watch.words == (SETUP,)
    assert re.match(r"camera set-up changed: brightness 1[3-7]% lower", watch.status()["cam1"]["part"]["alarms"][SETUP])


def test_both_can_be_true_at_once(watch: Watch) -> None:
    feed(watch, "cam1", drifted(60))
    feed(watch, "cam2", dimmed(60))
    assert watch.words == (DRIFT, SETUP)


def test_rejected_parts_say_nothing_of_drift_and_count_as_rejected(watch: Watch) -> None:
    rejected = [replace(each, outcome=Outcome.REJECT, reason=Reason.DEFECT) for each in drifted(200)]
    feed(watch, "cam1", [*good(100), *rejected])
    assert watch.words == ()
    rejects = watch.status()["cam1"]["part"]["rejects"]
    assert (rejects["judged"], rejects["defects"], rejects["promise"]) == (300, 200, "exceeded")


@pytest.mark.parametrize("reason", [Reason.ENGINE_ERROR, Reason.BAD_FRAME])
def test_frames_that_were_not_judged_say_nothing(watch: Watch, reason: Reason) -> None:
    feed(watch, "cam1", [replace(each, outcome=Outcome.REJECT, reason=reason) for each in dimmed(100)])
    assert watch.status()["cam1"] == {}


def test_alarm_stays_when_the_frames_are_as_before_again(watch: Watch) -> None:
    feed(watch, "cam1", [*dimmed(60), *good(500)])
    assert watch.words == (SETUP,)


# --- reset and swap


def test_reset_forgets_one_camera_or_all(watch: Watch) -> None:
    for name in ("cam1", "cam2"):
        feed(watch, name, dimmed(60))
    watch.reset("cam1")
    assert watch.status()["cam1"] == {}
    assert watch.words == (SETUP,)
    watch.reset(None)
    assert watch.words == ()
    with pytest.raises(UsageError, match=r"found no camera 'cam9', wanted one of cam1, cam2, strict"):
        watch.reset("cam9")


def test_change_that_lasts_is_found_again_after_a_reset(watch: Watch) -> None:
    feed(watch, "cam1", dimmed(60))
    watch.reset("cam1")
    feed(watch, "cam1", dimmed(60, seed=9))
    assert watch.words == (SETUP,)


def test_another_engine_begins_anew_and_the_old_one_speaks_no_more(watch: Watch) -> None:
    feed(watch, "cam1", dimmed(60))
    watch.engines_changed({"b"})
    assert watch.words == ()
    feed(watch, "cam1", dimmed(60), engine("b"))  # frames that the old engine still had
    assert watch.status()["cam1"] == {}
    feed(watch, "cam1", [replace(each, engine=EngineId("part", "2", "b")) for each in good(60)], engine("b"))
    assert watch.status()["cam1"]["part"]["rejects"]["judged"] == 60


# --- verdicts


def test_verdicts_stay_as_they_are_where_config_says_warn(watch: Watch) -> None:
    feed(watch, "cam1", dimmed(60))
    assert watch.ruled("cam1", judged()) == judged()


def test_parts_that_would_pass_are_rejected_where_config_says_so_until_the_reset(watch: Watch) -> None:
    assert watch.ruled("strict", judged()).outcome is Outcome.PASS
    feed(watch, "strict", dimmed(60))
    found = watch.ruled("strict", judged(0.25))
    assert (found.outcome, found.reason, found.score) == (Outcome.REJECT, Reason.SETUP, 0.25)
    defect = replace(judged(), outcome=Outcome.REJECT, reason=Reason.DEFECT)
    assert watch.ruled("strict", defect) == defect
    assert watch.ruled("cam1", judged()).outcome is Outcome.PASS
    assert watch.ruled("strict", judged(digest="b")).outcome is Outcome.PASS
    watch.reset("strict")
    assert watch.ruled("strict", judged()).outcome is Outcome.PASS


def test_drift_alone_rejects_nothing(watch: Watch) -> None:
    feed(watch, "strict", drifted(60))
    assert watch.words == (DRIFT,)
    assert watch.ruled("strict", judged()).outcome is Outcome.PASS


# --- who hears of it


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"inspectd_{name}", labels)


def test_metrics_say_what_the_state_says() -> None:
    metrics = Metrics()
    watch = Watch({"cam1": camera(), "cam2": camera()}, metrics)
    assert value(metrics, "drift_statistic", camera="cam1") == 0.0
    assert value(metrics, "false_reject_rate_high", camera="cam1") == 1.0
    rejected = [replace(each, outcome=Outcome.REJECT, reason=Reason.DEFECT) for each in good(10)]
    feed(watch, "cam1", [*good(90), *rejected, *dimmed(60)])
    assert value(metrics, "camera_degraded", camera="cam1", kind=SETUP) == 1.0
    assert value(metrics, "camera_degraded", camera="cam1", kind=DRIFT) == 0.0
    assert value(metrics, "camera_degraded", camera="cam2", kind=SETUP) == 0.0
    assert value(metrics, "camera_alarms_total", camera="cam1", kind=SETUP) == 1.0
    assert value(metrics, "setup_statistic", camera="cam1") >= 1.0
    assert value(metrics, "false_reject_rate_estimate", camera="cam1") == pytest.approx(10 / 160)
    low, high = (value(metrics, f"false_reject_rate_{end}", camera="cam1") for end in ("low", "high"))
    assert low < 10 / 160 < high


def test_heartbeat_says_everything_that_is_wrong_at_once() -> None:
    desk, dispatcher = SimpleNamespace(degraded=None), SimpleNamespace(watch=SimpleNamespace(words=()))
    tell_degraded(desk, dispatcher, None)
    assert desk.degraded is None
    dispatcher.watch.words = (DRIFT, SETUP)
    tell_degraded(desk, dispatcher, "no space left")
    assert desk.degraded == "JOURNAL,DRIFT,SETUP"


def test_status_of_sixty_cameras_fits_one_header() -> None:
    names = [f"camera-{number:03}" for number in range(60)]
    watch = Watch(dict.fromkeys(names, camera()), Metrics())
    pipeline, rng = engine(), np.random.default_rng(4)
    pipeline.references["part"].images.update({name: rng.normal(100, 2, N).tolist() for name in STATISTICS})
    for name in names:
        for _ in range(12):
            quality = {figure: float(rng.normal(50, 2)) for figure in STATISTICS}
            watch.feed(name, pipeline, replace(judged(float(rng.normal(9.0))), quality=quality))
    assert watch.words == (DRIFT, SETUP)
    assert len(encode_header(watch.status())) < MAX_HEADER_BYTES


# --- a daemon


SIDE = 64


def part(seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> NDArray[np.uint8]:
    return render_part(seed, size_hw=size)[0][..., None]


def dim(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.rint(pixels * 0.85).astype(np.uint8)


@pytest.fixture
def site(tmp_path: Path) -> Any:
    """Cameras cam1, which warns, and cam2, which rejects, on an engine of rendered parts."""
    site = make_site(tmp_path, draw=part, with_quality=True)
    site.config["cameras"]["cam2"] = {**site.config["cameras"]["cam1"], "on_setup_change": "reject"}
    site.config["metrics"] = {"bind": f"127.0.0.1:{free_port()}"}
    site.start()
    yield site
    assert site.stop() == 0


def show(line: Line, numbers: range, change: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] = np.asarray) -> None:
    for seq in numbers:
        send(line, seq, change(part(5000 + seq)))
        line.pump(1)
    settle(line)


def reasons(line: Line, numbers: range) -> set[str | None]:
    return {line.parts[seq].results[0]["reason"] for seq in numbers}


def scraped(site: Site) -> str:
    with urllib.request.urlopen(f"http://{site.config['metrics']['bind']}/metrics", timeout=5) as page:
        return page.read().decode()


def test_dimmed_lamp_is_told_everywhere_and_changes_no_verdict_where_config_says_warn(site: Site) -> None:
    with site.line() as line:
        show(line, range(60))
        before = reasons(line, range(60))
        assert line.lease.degraded is None
        assert site.status()["watch"]["cam1"]["part"]["alarms"] == {}
        show(line, range(60, 160), dim)
        wait_for(line, lambda: SETUP in (line.lease.degraded or ""))
        assert Reason.SETUP.value not in before | reasons(line, range(60, 160))
        status = site.status()
        assert status["state"] == "RUNNING"
        assert "brightness 1" in status["watch"]["cam1"]["part"]["alarms"][SETUP]
        assert status["watch"]["cam2"] == {}
        assert 'inspectd_camera_degraded{camera="cam1",kind="SETUP"} 1.0' in scraped(site)
        assert 'inspectd_camera_degraded{camera="cam2",kind="SETUP"} 0.0' in scraped(site)
        assert "camera=cam1: camera set-up changed: brightness" in site.log
        done = site.run_command("reset", "cam1")
        assert (done.returncode, json.loads(done.stdout)["watch"]["cam1"]) == (0, {})
        (event,) = (record for record in site.journal() if record["t"] == "event")
        assert (event["command"], event["user"]) == ("reset", account())
        assert event["user"]
        wait_for(line, lambda: line.lease.degraded is None)


def test_dimmed_lamp_rejects_parts_that_would_pass_where_config_says_so(site: Site) -> None:
    with site.line("cam2") as line:
        show(line, range(60))
        assert Reason.SETUP.value not in reasons(line, range(60))
        show(line, range(60, 160), dim)
        wait_for(line, lambda: SETUP in (line.lease.degraded or ""))
        show(line, range(160, 180))  # as before, and rejected all the same: somebody has to look
        assert reasons(line, range(160, 180)) == {"SETUP"}
        assert {line.parts[seq].permits[0]["outcome"] for seq in range(160, 180)} == {"REJECT"}
        ask(site.control, "reset")
        show(line, range(180, 200))
        assert reasons(line, range(180, 200)) == {None}


def test_another_engine_is_watched_from_its_first_frame_on(site: Site) -> None:
    install_bundle(site.folder / "engines", site.folder / "keys", "part", "2", draw=part, with_quality=True)
    with site.line("cam2") as line:
        show(line, range(100), dim)
        wait_for(line, lambda: SETUP in (line.lease.degraded or ""))
        ask(site.control, "activate", 30_000, engine="part/2")
        wait_for(line, lambda: line.lease.degraded is None)
        show(line, range(100, 110))
        assert reasons(line, range(100, 110)) == {None}
        assert site.status()["watch"]["cam2"]["part"]["rejects"]["judged"] == 10


def test_camera_that_is_not_there_cannot_be_reset(site: Site) -> None:
    done = site.run_command("reset", "cam9")
    assert done.returncode == 64
    assert "found no camera 'cam9', wanted one of cam1, cam2" in done.stderr
