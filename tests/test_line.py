"""A real daemon, spoken with over its sockets: each row of the design's table of answers and verdicts.

After each test the next good frame must be inspected as usual: `after_each_the_line_goes_on`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import zmq

from adapters.line import Line, disagreements
from daemon.line.sockets import connect
from daemon.line.wire import encode_frame, encode_header
from daemon.types import Header
from tests.bundles import bad_pixels, good_pixels, raw_frame
from tests.daemons import Site, make_site, tcp
from tests.faulty_daemon import HANG, NOT_A_NUMBER, SLOW, THROW
from tests.lines import ordered, send, wait_for

DEADLINE_MS = 300


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    site = make_site(tmp_path_factory.mktemp("line"))
    site.config["queue_mb"] = 1
    site.config["metrics"] = {"bind": tcp().removeprefix("tcp://")}
    site.config["cameras"] = {
        "cam1": {"product": "part", "mode": "every-frame", "deadline_ms": DEADLINE_MS, "valid_ms": 500},
        "cam2": {"product": "part", "mode": "latest", "deadline_ms": 5000, "valid_ms": 500},
        "cam3": {"product": "part", "mode": "every-frame", "deadline_ms": 5000, "valid_ms": 500},
    }
    site.config["inputs"].append({"kind": "pull", "bind": "ipc://run/pull.sock"})
    site.program = [sys.executable, "-m", "tests.faulty_daemon"]
    site.start()
    yield site
    if site.process is not None and site.process.poll() is None:
        assert site.stop() == 0, site.log


@pytest.fixture(params=["cam1"])
def line(site, request):
    with site.line(request.param) as line:
        yield line
        after_each_the_line_goes_on(line)


on_latest_camera = pytest.mark.parametrize("line", ["cam2"], indirect=True)


def after_each_the_line_goes_on(line: Line) -> None:
    told = [header.get("seqTo", header["seq"]) for header in line.foreign if header["epoch"] == line.epoch]
    good = send(line, max([*line.parts, *told, -1]) + 1)
    wait_for(line, lambda: bool(good.results))
    assert (good.results[0]["outcome"], good.results[0]["reason"]) == ("PASS", None)


def settled(line: Line, part) -> Header:
    """The part's one verdict, which the permit channel tells too."""
    wait_for(line, lambda: bool(part.results) and bool(part.permits))
    assert len(part.results) == 1
    result, permit = part.results[0], part.permits[0]
    assert (permit["outcome"], permit["reason"]) == (result["outcome"], result["reason"])
    return result


def refusal(line: Line, part) -> str:
    wait_for(line, lambda: part.answer is not None)
    assert part.answer["status"] == "refused"
    return part.answer["reason"]


def test_a_good_part_passes_and_its_permit_is_believed(line):
    part = send(line, 0)
    result = settled(line, part)
    assert part.answer["status"] == "accepted"
    assert result["outcome"] == "PASS"
    assert result["score"] < result["limit"]
    assert 0 < result["pValue"] <= 1
    assert result["regions"] == []
    assert part.believed
    assert set(result["engine"]) == {"product", "version", "digest"}
    assert result["timings"]["totalMs"] >= result["timings"]["inferMs"] > 0


def test_a_defect_is_rejected_with_a_region_and_never_believed(line):
    part = send(line, 0, bad_pixels())
    result = settled(line, part)
    assert (result["outcome"], result["reason"]) == ("REJECT", "DEFECT")
    assert result["score"] >= result["limit"]
    region = result["regions"][0]
    assert region["x"] <= 32 <= region["x"] + region["w"]
    assert region["y"] <= 32 <= region["y"] + region["h"]
    assert result["payloads"] == ["mask", "frame"]
    assert not part.believed


def test_mask_and_frame_of_a_reject_come_as_payloads_of_the_frames_size(site):
    with site.line() as line:
        context = zmq.Context()
        subscriber = connect(context, zmq.SUB, site.addresses.results, site.peer())
        subscriber.subscribe(f"result/{line.line}")
        subscriber.subscribe("health/")
        assert subscriber.poll(5000)  # health: the subscription is in force
        send(line, 0, np.repeat(np.repeat(bad_pixels(), 2, 0), 3, 1))
        while (parts := subscriber.recv_multipart())[0].startswith(b"health/"):
            assert subscriber.poll(5000)
        header, mask, frame = json.loads(parts[1]), *parts[2:]
        context.destroy(linger=0)
        mask_pixels = cv2.imdecode(np.frombuffer(mask, np.uint8), cv2.IMREAD_UNCHANGED)
        assert mask_pixels.shape == (128, 192)
        assert set(np.unique(mask_pixels)) == {0, 255}
        assert cv2.imdecode(np.frombuffer(frame, np.uint8), cv2.IMREAD_GRAYSCALE).shape == (128, 192)
        region = header["regions"][0]
        assert region["x"] + region["w"] <= 192
        assert mask_pixels[region["y"] + region["h"] // 2, region["x"] + region["w"] // 2] == 255


@pytest.mark.parametrize(
    "parts",
    [
        [b"frame/test/cam1", b"not json", b"x"],
        [b"frame/test/cam1", b"[1, 2]", b"x"],
        [b"frame/test/cam1", b"{" * 5000, b"x"],
        [b"frame/test/cam1", b'{"v": 1, "epoch": "e", "seq": ' + b"1" * 70_000 + b"}", b"x"],
        [b"frame/test/cam1", b'{"v": 1, "epoch": "e", "seq": "1"}', b"x"],
        [b"frame/test/cam1", b'{"v": 1, "epoch": "e", "seq": true}', b"x"],
        [b"frame/test/cam1", b'{"v": 1, "epoch": 5, "seq": 1}', b"x"],
        [b"frame/test/cam1", b'{"v": 2, "epoch": "e", "seq": 1}', b"x"],
        [b"frame/test/nobody", b'{"v": 1, "epoch": "e", "seq": 1}', b"x"],
        [b"frame/other/cam1", b'{"v": 1, "epoch": "e", "seq": 1}', b"x"],
        [b"image", b'{"v": 1, "epoch": "e", "seq": 1}', b"x"],
        [b"\xff\xfe", b"\xff", b"\xff"],
        [b"frame/test/cam1"],
        [b""],
    ],
    ids=lambda parts: repr(parts[-2:])[:40],
)
def test_a_header_that_names_no_part_is_refused_and_answered(line, parts):
    answers = []
    take = line._take_answer
    line._take_answer = lambda header: (answers.append(header), take(header))
    line.send_raw(parts)
    wait_for(line, lambda: bool(answers))
    assert (answers[0]["status"], answers[0]["reason"]) == ("refused", "BAD_HEADER")
    assert answers[0]["detail"]


def test_an_empty_multipart_message_changes_nothing(line):
    line.send_raw([b"", b""])
    line.pump(50)


def test_ten_thousand_garbage_messages_change_nothing(line):
    generator = np.random.default_rng(0)
    for number in range(10_000):
        garbage = generator.bytes(int(generator.integers(0, 60)))
        line.send_raw([garbage, generator.bytes(8)] if number % 2 else [garbage])
        if number % 200 == 0:
            line.pump(5)


IMAGE = {"capturedNs": 1, "encoding": "raw", "shape": [64, 64], "pixelFormat": "Mono8"}


@pytest.mark.parametrize(
    ("image", "payload"),
    [
        ({}, bytes(64 * 64 - 1)),
        ({}, bytes(64 * 64 + 1)),
        ({}, b""),
        ({"shape": [0, 64]}, b""),
        ({"shape": [10**5, 10**4]}, bytes(10)),
        ({"shape": [10**30, 1]}, bytes(10)),
        ({"shape": "64x64"}, bytes(64 * 64)),
        ({"shape": [64, 64, 3]}, bytes(64 * 64)),
        ({"encoding": "webp"}, bytes(64 * 64)),
        ({"encoding": "png"}, b"no png"),
        ({"encoding": "jpeg"}, b"\xff\xd8\xff\xe0 cut off"),
        ({"pixelFormat": "Mono12"}, bytes(64 * 64)),
        ({"capturedNs": -5}, bytes(64 * 64)),
    ],
    ids=repr,
)
def test_a_known_part_with_an_unusable_image_is_a_bad_frame(line, image, payload):
    header = {"v": 1, "epoch": line.epoch, "seq": 7, "partId": "p7", **IMAGE, **image}
    part = line.send(raw_frame(good_pixels(), camera=line.camera, epoch=line.epoch, seq=6))
    settled(line, part)
    line.send_raw([f"frame/test/{line.camera}".encode(), encode_header(header), payload])
    wait_for(line, lambda: any(h["seq"] == 7 for h in line.foreign))
    verdict = next(h for h in line.foreign if h["seq"] == 7)
    assert (verdict["outcome"], verdict["reason"], verdict["partId"]) == ("REJECT", "BAD_FRAME", "p7")


def test_png_and_jpeg_frames_are_inspected(line):
    for seq, (name, extension) in enumerate((("png", ".png"), ("jpeg", ".jpg"))):
        payload = memoryview(cv2.imencode(extension, bad_pixels())[1].tobytes())
        part = send(line, seq, encoding=name, payload=payload)
        assert settled(line, part)["reason"] == "DEFECT"


def test_an_unknown_product_is_not_ready(line):
    assert settled(line, send(line, 0, product="unknown"))["reason"] == "NOT_READY"


def test_beyond_the_byte_budget_every_frame_cameras_get_overload(site):
    with site.line("cam3") as line:
        big = np.repeat(np.repeat(good_pixels(), 9, 0), 9, 1)  # 331,776 bytes: three fit into 1 MiB
        first = big.copy()
        first[0, 0, 0] = SLOW
        parts = [send(line, 0, first)] + [send(line, seq, big) for seq in range(1, 7)]
        verdicts = [settled(line, part) for part in parts]
        assert [v["reason"] for v in verdicts] == [None, None, None, "OVERLOAD", "OVERLOAD", "OVERLOAD", "OVERLOAD"]
        assert parts[3].answer["status"] == "accepted"
        assert parts[2].answer["credit"] == 0
        after_each_the_line_goes_on(line)


@on_latest_camera
def test_in_mode_latest_a_newer_frame_supersedes_the_waiting_one(line):
    slow = send(line, 0, ordered(SLOW))
    wait_for(line, lambda: slow.answer is not None)
    line.pump(200)  # the engine has taken it up, and is at it for as long again and longer
    parts = [slow, *(send(line, seq) for seq in range(1, 5))]
    verdicts = [settled(line, part) for part in parts]
    assert [v["reason"] for v in verdicts] == [None, "SUPERSEDED", "SUPERSEDED", "SUPERSEDED", None]


def test_each_missing_part_of_a_gap_gets_its_verdict(line):
    settled(line, send(line, 10))
    settled(line, send(line, 14))
    wait_for(line, lambda: len(line.foreign) == 3)
    assert [(h["seq"], h["outcome"], h["reason"]) for h in line.foreign] == [
        (n, "REJECT", "MISSING") for n in (11, 12, 13)
    ]
    assert disagreements(line, {11, 12, 13}) == []


def test_a_long_gap_is_told_as_one_range(line):
    settled(line, send(line, 0))
    settled(line, send(line, 1_000_000))
    wait_for(line, lambda: bool(line.foreign))
    assert [(h["seqFrom"], h["seqTo"], h["reason"]) for h in line.foreign] == [(1, 999_999, "MISSING")]


def test_a_gap_of_64_is_told_part_by_part_and_one_of_65_as_a_range(line):
    settled(line, send(line, 0))
    settled(line, send(line, 65))
    wait_for(line, lambda: len(line.foreign) == 64)
    settled(line, send(line, 131))
    wait_for(line, lambda: len(line.foreign) == 65)
    assert (line.foreign[-1]["seqFrom"], line.foreign[-1]["seqTo"]) == (66, 130)


def test_a_repeated_or_older_number_is_refused_and_has_no_second_verdict(line):
    first = send(line, 5)
    settled(line, first)
    for seq in (5, 4):
        again = send(line, seq)
        assert refusal(line, again) == "DUPLICATE"
        line.pump(100)
        assert again.results == []
    line.parts[5] = first


def test_an_epoch_that_was_replaced_is_refused_for_good(line):
    settled(line, send(line, 3))
    old, line.epoch = line.epoch, line.epoch + "-new"
    settled(line, send(line, 0))
    new, line.epoch = line.epoch, old
    assert refusal(line, send(line, 4)) == "DUPLICATE"
    line.epoch = new


def test_an_inference_that_throws_is_an_engine_error(line):
    assert settled(line, send(line, 0, ordered(THROW)))["reason"] == "ENGINE_ERROR"


def test_a_score_that_is_no_number_is_an_engine_error(line):
    result = settled(line, send(line, 0, ordered(NOT_A_NUMBER)))
    assert (result["outcome"], result["reason"], result["score"]) == ("REJECT", "ENGINE_ERROR", None)


def test_a_part_past_its_deadline_is_late_and_its_score_follows(site):
    with site.line() as line:
        part = send(line, 0, ordered(SLOW))
        assert settled(line, part)["reason"] == "LATE"
        assert part.latency_ms < DEADLINE_MS + 100  # said by the deadline, not when the inference ended
        wait_for(line, lambda: bool(line.late))
        assert line.late[0]["seq"] == 0
        assert line.late[0]["score"] is not None
        assert (line.late[0]["partId"], line.late[0]["capturedNs"]) == ("part-0", 1000)
        assert len(part.results) == 1
        after_each_the_line_goes_on(line)


def test_paused_frames_are_refused_and_the_bridge_sees_the_state(site):
    with site.line() as line:
        assert json.loads(site.run_command("pause").stdout)["state"] == "PAUSED"
        try:
            part = send(line, 0)
            assert refusal(line, part) == "PAUSED"
            wait_for(line, lambda: line.lease.state == "PAUSED")
            assert not line.lease.is_fresh(time.monotonic_ns())
            assert part.results == []
        finally:
            assert json.loads(site.run_command("resume").stdout)["state"] == "RUNNING"
        wait_for(line, lambda: line.lease.is_fresh(time.monotonic_ns()))
        line.parts.clear()
        settled(line, send(line, 1))


def test_numbers_refused_while_paused_are_not_missing_afterwards(site):
    with site.line("cam3") as line:
        settled(line, send(line, 0))
        site.run_command("pause")
        try:
            refused = [send(line, seq) for seq in (1, 3)]
            assert [refusal(line, part) for part in refused] == ["PAUSED", "PAUSED"]
        finally:
            site.run_command("resume")
        settled(line, send(line, 4))
        settled(line, send(line, 6))
        wait_for(line, lambda: bool(line.foreign))
        assert [header["seq"] for header in line.foreign] == [5]
        assert [part.results for part in refused] == [[], []]


def test_a_header_made_to_break_the_daemon_is_a_bad_frame(line):
    shape = [int("1" + "0" * 2200)] * 2
    header = {"v": 1, "epoch": line.epoch, "seq": 0, **IMAGE, "shape": shape}
    line.send_raw([b"frame/test/cam1", encode_header(header), b"x"])
    wait_for(line, lambda: any(h["reason"] == "BAD_FRAME" for h in line.foreign))


def test_a_camera_that_connects_again_goes_on_in_its_stream(line):
    settled(line, send(line, 0))
    line.reopen_camera()
    part = send(line, 2)
    settled(line, part)
    wait_for(line, lambda: part.answer is not None)
    assert part.answer["status"] == "accepted"
    assert [header["seq"] for header in line.foreign] == [1]


def test_a_camera_that_starts_anew_has_no_gap_behind_it(line):
    settled(line, send(line, 5))
    line.reopen_camera(line.epoch + "-again")
    assert line.parts == {}
    settled(line, send(line, 0))
    assert line.foreign == []


def test_a_bridge_that_comes_back_believes_nothing_until_it_was_born_again(line):
    part = send(line, 0)
    settled(line, part)
    line.reopen_bridge()
    assert line.lease.needs_hello(time.monotonic_ns())
    assert not line.lease.may_pass(line.camera, line.epoch, 0, time.monotonic_ns())
    wait_for(line, lambda: line.lease.is_fresh(time.monotonic_ns()))
    after = send(line, 1)
    settled(line, after)
    assert after.believed


def test_a_push_sender_without_answers_gets_verdicts_all_the_same(site):
    with site.line("cam2") as line:
        context = zmq.Context()
        push = context.socket(zmq.PUSH)
        push.connect(f"ipc://{site.folder}/run/pull.sock")
        frame = raw_frame(good_pixels(), camera="cam1", epoch="pushed", seq=0)
        line.camera = "cam1"
        # cam1's stream belongs to the CURVE key that spoke first; a plain sender may not take it over.
        push.send_multipart(encode_frame("test", frame))
        line.pump(100)
        assert [h for h in line.foreign if h["epoch"] == "pushed"] == []
        context.destroy(linger=0)


def test_metrics_count_what_happened(site):
    from urllib.request import urlopen

    text = urlopen(f"http://{site.config['metrics']['bind']}/metrics").read().decode()
    with site.line() as line:
        before = dict(part.rsplit(" ", 1) for part in text.splitlines() if not part.startswith("#"))
        settled(line, send(line, 0))
        settled(line, send(line, 3))
        wait_for(line, lambda: len(line.foreign) == 2)
        refusal(line, send(line, 3, bad_pixels()))
        text = urlopen(f"http://{site.config['metrics']['bind']}/metrics").read().decode()
        after = dict(part.rsplit(" ", 1) for part in text.splitlines() if not part.startswith("#"))

        def rise(name: str) -> float:
            return float(after[name]) - float(before.get(name, 0))

        assert rise('inspectd_frames_accepted_total{camera="cam1"}') == 2
        assert rise('inspectd_verdicts_total{camera="cam1",outcome="PASS",reason=""}') == 2
        assert rise('inspectd_verdicts_total{camera="cam1",outcome="REJECT",reason="MISSING"}') == 2
        assert rise('inspectd_sequence_gaps_total{camera="cam1"}') == 2
        assert rise('inspectd_frames_refused_total{camera="cam1",reason="DUPLICATE"}') == 1


def promtool_on(metrics: bytes) -> tuple[int, bytes]:
    done = subprocess.run(["promtool", "check", "metrics"], input=metrics, capture_output=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
def test_promtool_has_nothing_to_say_of_a_live_scrape(site):
    from urllib.request import urlopen

    with site.line() as line:
        settled(line, send(line, 0))
        settled(line, send(line, 2, bad_pixels()))
        refusal(line, send(line, 2))
        metrics = urlopen(f"http://{site.config['metrics']['bind']}/metrics").read()
    assert b'inspectd_verdicts_total{camera="cam1",outcome="REJECT",reason="MISSING"}' in metrics
    assert promtool_on(metrics) == (0, b"")
    # It would say something: a counter that is not named as one.
    code, said = promtool_on(metrics.replace(b"inspectd_verdicts_total", b"inspectd_verdicts"))
    assert code != 0
    assert b'should have "_total" suffix' in said


def test_rejected_frames_are_recorded_lossless(site):
    with site.line() as line:
        pixels = bad_pixels(42)
        part = send(line, 0, pixels)
        decided = settled(line, part)["decidedNs"]
        found = []
        wait_for(line, lambda: bool(found.extend((site.folder / "run/rejects").rglob(f"{decided}-*.json")) or found))
        record = json.loads(found[0].read_text())
        assert record["reason"] == "DEFECT"
        recorded = cv2.imread(str(found[0].with_name(record["file"])), cv2.IMREAD_GRAYSCALE)
        assert np.array_equal(recorded, pixels[:, :, 0])


def test_at_the_end_the_ledger_balances(site):
    done = site.run_command("ledger", "--verify")
    assert done.returncode == 0, done.stdout
    assert "the books balance" in done.stdout


def test_draining_refuses_frames_and_ends_with_every_verdict_out(site):
    with site.line("cam3") as line:
        part = send(line, 0, ordered(SLOW))
        wait_for(line, lambda: part.answer is not None)
        assert site.process is not None
        site.process.terminate()
        wait_for(line, lambda: line.state == "DRAINING")
        refused = send(line, 1)
        wait_for(line, lambda: bool(part.results))
        assert part.results[0]["outcome"] == "PASS"
        assert refused.answer is None or refused.answer["reason"] == "DRAINING"
    assert site.process.wait(20) == 0, site.log


def test_an_inference_that_hangs_ends_the_process_with_70_after_its_verdicts(tmp_path):
    site = make_site(tmp_path)
    site.config["backend"]["hang_ms"] = 700
    site.config["cameras"]["cam1"]["deadline_ms"] = 300
    site.program = [sys.executable, "-m", "tests.faulty_daemon"]
    site.start()
    with site.line() as line:
        hanging, waiting = send(line, 0, ordered(HANG)), send(line, 1)
        assert settled(line, hanging)["reason"] == "LATE"
        assert settled(line, waiting)["reason"] == "LATE"
        line.pump(100)
        last = send(line, 2)
        assert site.process.wait(20) == 70, site.log
        wait_for(line, lambda: bool(last.results))
        assert last.results[0]["reason"] in ("LATE", "ENGINE_ERROR")


def test_two_daemons_on_one_address_the_second_says_who_is_there(tmp_path):
    site = make_site(tmp_path)
    site.start()
    try:
        second = Site(site.folder, {**site.config, "control": {"bind": "ipc://run/other.sock"}})
        done = second.write_config() and second.run_command("run")
        assert done.returncode == 78
        assert "another process holds it" in done.stderr
    finally:
        site.write_config()
        assert site.stop() == 0
