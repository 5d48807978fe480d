"""The benches' own measuring: what counts as sustained, how a rate is found, and both on a real daemon."""

from __future__ import annotations

import uuid
from itertools import count

import numpy as np
import pytest
import zmq

from adapters.shm_sender import ShmSender
from bench import scale
from bench.streams import Sent, figures, flood, highest_sustained, listening, stream
from daemon.bundle import BANK
from daemon.errors import InspectError
from daemon.inspection.tensors import load_bank
from daemon.line.sockets import connect
from tests import bundles
from tests.daemons import make_site

MS = 1_000_000


class Heard:
    """A listener that has heard these verdicts: seq -> (reason, milliseconds after sending), maybe several."""

    def __init__(self, *verdicts):
        self.verdicts = {("cam1", seq): [(reason, at * MS) for reason, at in each] for seq, each in enumerate(verdicts)}


def sent(frames, seconds=1.0):
    made = Sent(asked=frames, seconds=seconds, loop_s=0.25, daemon_s=1.5)
    made.parts = {("cam1", seq): 0 for seq in range(frames)}
    return made


def test_rate_is_sustained_where_each_part_has_its_one_verdict_in_time():
    found = figures(sent(4), Heard([("PASS", 10)], [("DEFECT", 20)], [("PASS", 30)], [("PASS", 40)]))
    assert found["sustained"]
    assert found["verdicts"] == {"PASS": 3, "DEFECT": 1}
    assert (found["framesPerS"], found["p50Ms"], found["loopShare"], found["daemonShare"]) == (4.0, 25.0, 0.25, 1.5)


@pytest.mark.parametrize("second", [
    [("OVERLOAD", 1)], [("LATE", 1)], [("ENGINE_ERROR", 1)], [("BAD_FRAME", 1)], [("PASS", 1), ("PASS", 2)], [],
])  # fmt: skip
def test_rate_is_not_sustained_where_a_part_is_rejected_by_the_line_itself(second):
    heard = Heard([("PASS", 10)], second)
    heard.verdicts = {part: found for part, found in heard.verdicts.items() if found}
    assert not figures(sent(2), heard)["sustained"]


def test_rate_that_the_sender_did_not_keep_is_not_sustained():
    assert not figures(sent(1, seconds=1.1), Heard([("PASS", 10)]))["sustained"]


def test_silence_is_an_error_and_no_figure():
    with pytest.raises(InspectError, match="no verdict came back"):
        figures(sent(1), Heard())


def test_highest_rate_is_found_from_above_and_a_failure_is_tried_once_more():
    tried = []

    def measure(rate):
        tried.append(rate)
        is_held = rate < 95 or len(tried) == 4  # by chance at the second try of the second step
        return {"p50Ms": 1, "p99Ms": 1, "loopShare": 0, "verdicts": {}, "sustained": is_held, "asked": rate}

    assert highest_sustained(100.0, measure)["asked"] == 90.0
    assert tried == [100.0, 100.0, 90.0]
    with pytest.raises(InspectError, match="not even 1 frame a second"):
        highest_sustained(1.0, lambda _: {**measure(100.0), "sustained": False})


def test_cameras_of_a_real_daemon_are_all_heard(tmp_path):
    site = make_site(tmp_path / "s", size=(256, 256), rows=10)
    site.config["cameras"]["cam2"] = dict(site.config["cameras"]["cam1"])
    site.start()
    context = zmq.Context()
    try:
        with listening(site, site.peer()) as listener:
            doors = [connect(context, zmq.DEALER, site.addresses.frames, site.peer()) for _ in range(2)]
            payloads = [memoryview(bundles.good_pixels(seed, (256, 256)).tobytes()) for seed in range(3)]
            send = scale.sender(site, doors, payloads)
            assert flood(listener, send, 4, 0.2) > 0
            run = stream(site, listener, 20.0, 0.5, send)
            found = figures(run, listener)
        assert found["verdicts"] == {"PASS": 10}
        assert {camera for camera, _ in run.parts} == {"cam1", "cam2"}
        assert 0 <= run.loop_s <= run.daemon_s
    finally:
        context.destroy(linger=0)
        assert site.stop() == 0


def test_slots_that_are_announced_again_are_judged_again(tmp_path):
    site = make_site(tmp_path / "s", tcp_curve=False)
    site.config["line"] = f"t{uuid.uuid4().hex[:8]}"
    site.config["inputs"] = [{"kind": "shm", "bind": "ipc://run/shm.sock"}]
    site.start()
    numbers = count()
    try:
        with (
            listening(site, None) as listener,
            ShmSender(site.addresses.frames, site.config["line"], "cam1", slot_bytes=64 * 64, slots=2) as camera,
        ):

            def send():
                target = camera.reserve((64, 64))
                if next(numbers) < 2:
                    target[...] = bundles.good_pixels()[:, :, 0]
                return "cam1", camera.announce(target, "Mono8")

            found = figures(stream(site, listener, 20.0, 0.5, send), listener)
        assert found["verdicts"] == {"PASS": 10}
    finally:
        assert site.stop() == 0


def test_repeated_bank_changes_no_distance(tmp_path):
    folder = bundles.make_bundle(tmp_path / "b", tmp_path / "keys", rows=20)
    before = load_bank(bundles.open_trusted(folder, tmp_path / "keys"))
    many = bundles.make_bundle(
        tmp_path / "m", tmp_path / "keys", rows=20, change=lambda _: scale.repeat(tmp_path / "m" / BANK, 5)
    )
    after = load_bank(bundles.open_trusted(many, tmp_path / "keys"))
    assert {name: values.shape[0] for name, values in after.items()} == {"core": 100, "bias": 100, "density": 100}
    assert all(np.array_equal(after[name][20:40], before[name]) for name in before)
    pipelines = [bundles.open_pipeline(made, tmp_path / "keys") for made in (folder, many)]
    frame = bundles.raw_frame(bundles.bad_pixels())
    scores = [pipeline.inspect(frame, "part").score for pipeline in pipelines]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)
