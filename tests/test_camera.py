"""`inspectd camera` with folders and videos: what it sends, that it keeps at it, and what it says when it cannot."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager

import cv2
import numpy as np
import pytest
import yaml
import zmq

from adapters import camera as camera_module
from adapters.camera import CameraProcess, open_source
from adapters.feed import Encoding, Feed
from adapters.sources import (
    Captured,
    Device,
    Folder,
    PictureLostError,
    Rtsp,
    SourceEndedError,
    SourceError,
    Video,
    without_password,
)
from adapters.trigger import Trigger
from daemon.config import load_config
from daemon.errors import ConfigError, DataError, UsageError
from daemon.keys import load_peer_file, make_peer, make_server_key
from tests.bundles import bad_pixels, good_pixels
from tests.daemons import ROOT, make_site, tcp
from tests.lines import assert_books_balance, wait_for

PATIENCE_S = 30.0  # never waited for where things are as they should be


def colours(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (60, 80, 3), np.uint8)


def save(folder, *pictures, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(pictures):
        cv2.imwrite(str(folder / f"A{number:03d}{suffix}"), pixels)
    return folder


def save_video(path, frames, rate=25.0):
    """MJPEG in AVI, which OpenCV writes and reads without any codec of the system's."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), rate, frames[0].shape[1::-1])
    assert writer.isOpened()
    for frame in frames:
        writer.write(np.repeat(frame, 3, 2) if frame.shape[2] == 1 else frame)
    writer.release()
    return path


# --- folders and videos as sources


def test_folder_gives_its_images_by_name_with_their_pixels(tmp_path):
    folder = save(tmp_path / "parts", good_pixels(), colours(), good_pixels(3).astype(np.uint16) * 257)
    source = Folder(folder, 5.0, loop=False)
    source.open()
    gray, colour, deep = (source.read() for _ in range(3))
    with pytest.raises(SourceEndedError):
        source.read()
    assert [(p.pixel_format, p.pixels.shape, p.part_id) for p in (gray, colour, deep)] == [
        ("Mono8", (64, 64), "A000"), ("RGB8", (60, 80, 3), "A001"), ("Mono16", (64, 64), "A002"),
    ]  # fmt: skip
    np.testing.assert_array_equal(gray.pixels, good_pixels()[:, :, 0])
    np.testing.assert_array_equal(colour.pixels, colours()[:, :, ::-1])
    np.testing.assert_array_equal(deep.pixels, good_pixels(3)[:, :, 0].astype(np.uint16) * 257)
    assert 0 <= time.time_ns() - gray.captured_ns < 60e9


def test_folder_that_loops_begins_again_with_what_is_there_then(tmp_path):
    source = Folder(save(tmp_path, good_pixels()), 5.0, loop=True)
    source.open()
    assert [source.read().part_id for _ in range(2)] == ["A000", "A000"]
    (tmp_path / "A000.png").rename(tmp_path / "B.png")
    assert source.read().part_id == "B"


def test_name_that_no_log_line_could_hold_is_made_harmless(tmp_path):
    cv2.imwrite(str(tmp_path / "a\nb.png"), good_pixels())
    source = Folder(tmp_path, 5.0, loop=False)
    source.open()
    assert source.read().part_id == "a?b"


def test_video_gives_its_frames_at_its_own_rate(tmp_path):
    path = save_video(tmp_path / "parts.avi", [good_pixels(), bad_pixels()], rate=12.0)
    source = Video(path, None, loop=False)
    source.open()
    good, bad = source.read(), source.read()
    with pytest.raises(SourceEndedError):
        source.read()
    source.close()
    assert (source.rate, good.pixel_format, good.pixels.shape) == (12.0, "BGR8", (64, 64, 3))
    assert bad.pixels[32, 32].min() > 230 > 180 > good.pixels[32, 32].max()


def test_video_that_loops_begins_again_and_may_have_another_rate(tmp_path):
    source = Video(save_video(tmp_path / "v.avi", [good_pixels(), bad_pixels()]), 3.0, loop=True)
    source.open()
    peaks = [int(source.read().pixels.max()) > 230 for _ in range(5)]
    source.close()
    assert peaks == [False, True, False, True, False]
    assert source.rate == 3.0


@pytest.mark.parametrize(
    ("content", "told"), [(None, "is not there"), (b"", "no video"), (b"RIFF, not really", "no video")]
)
def test_file_that_is_no_video_is_told(tmp_path, content, told):
    path = tmp_path / "v.avi"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=told):
        Video(path, None, loop=False).open()


@pytest.mark.parametrize(
    ("text", "kind"),
    [("0", Device), ("/dev/video3", Device), ("rtsp://h/s", Rtsp), ("pictures", Folder), ("v.avi", Video)],
)
def test_source_is_known_by_its_form(tmp_path, monkeypatch, text, kind):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "pictures", good_pixels())
    (tmp_path / "v.avi").write_bytes(b"")
    assert isinstance(open_source(text, None, loop=True, features="", is_triggered=False), kind)


def test_source_of_no_known_form_is_told_with_the_known_ones():
    with pytest.raises(DataError, match=r"nowhere: is not there; wanted a folder of images, .*genicam:NAME"):
        open_source("nowhere", None, loop=True, features="", is_triggered=False)
    with pytest.raises(UsageError, match="are for GenICam cameras"):
        open_source("0", None, loop=True, features="Gain=2", is_triggered=False)


def test_device_that_is_not_there_is_waited_for():
    with pytest.raises(SourceError, match=r"/dev/video987: is not there; is the camera plugged in"):
        Device("/dev/video987").open()


def test_password_of_a_camera_is_not_told():
    assert without_password("rtsp://admin:geheim@10.0.0.5/live") == "rtsp://***@10.0.0.5/live"
    with pytest.raises(SourceError) as caught:
        Rtsp(f"rtsp://admin:geheim@127.0.0.1:{tcp().rpartition(':')[2]}/live").open()
    assert "geheim" not in str(caught.value)
    assert "cannot be opened" in str(caught.value)


# --- encodings

GRAY, DEEP = good_pixels()[:, :, 0], good_pixels()[:, :, 0].astype(np.uint16) * 257


@pytest.mark.parametrize(
    ("encoding", "pixels", "pixel_format", "sent_as"),
    [
        (Encoding("raw"), GRAY, "Mono8", "Mono8"),
        (Encoding("raw"), DEEP, "Mono16", "Mono16"),
        (Encoding("raw"), colours(), "RGB8", "RGB8"),
        (Encoding("raw"), GRAY, "BayerRG8", "BayerRG8"),
        (Encoding("png"), GRAY, "Mono8", "Mono8"),
        (Encoding("png"), DEEP, "Mono16", "Mono16"),
        (Encoding("png"), GRAY, "BayerRG8", "BayerRG8"),
        (Encoding("png"), colours(), "BGR8", "BGR8"),
        (Encoding("png"), colours(), "RGB8", "BGR8"),
        (Encoding("jpeg", 100), GRAY, "Mono8", "Mono8"),
        (Encoding("jpeg", 100), cv2.GaussianBlur(colours(), (0, 0), 9), "RGB8", "BGR8"),
    ],
)
def test_daemon_reads_every_encoding_as_it_was_meant(encoding, pixels, pixel_format, sent_as):
    from daemon.inspection.decode import decode, to_plain
    from daemon.types import RawFrame

    payload, shape, told = encoding.encode(Captured(pixels, pixel_format, 1))
    frame = RawFrame("c", "e", 0, None, 1, encoding.kind, shape, told, None, payload)
    plain = to_plain(decode(frame)).pixels
    expected = to_plain(decode(RawFrame("c", "e", 0, None, 1, "raw", pixels.shape, pixel_format, None,
                                        memoryview(pixels.tobytes())))).pixels  # fmt: skip
    assert told == sent_as
    assert plain.shape == expected.shape
    if encoding.kind != "jpeg":
        np.testing.assert_array_equal(plain, expected)
    else:
        assert abs(plain.astype(int) - expected.astype(int)).mean() < 8


def test_gray_makes_one_channel_of_a_monochrome_camera_behind_a_colour_interface():
    same = np.repeat(good_pixels(), 3, 2)
    payload, shape, told = Encoding("raw", gray=True).encode(Captured(same, "BGR8", 1))
    assert (shape, told) == ((64, 64), "Mono8")
    assert bytes(payload) == good_pixels().tobytes()


@pytest.mark.parametrize(("pixels", "pixel_format"), [(DEEP, "Mono16"), (GRAY, "BayerRG8")])
def test_jpeg_that_would_spoil_the_pixels_is_refused(pixels, pixel_format):
    with pytest.raises(UsageError, match=rf"found {pixel_format} pixels.*--encoding png or raw"):
        Encoding("jpeg").encode(Captured(pixels, pixel_format, 1))


# --- a daemon, and the process as a user starts it


@contextmanager
def running_site(folder):
    site = make_site(folder)
    site.start()
    yield site
    if site.process is not None:
        assert site.stop() == 0, site.log
    assert_books_balance(site)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A daemon that no test stops."""
    with running_site(tmp_path_factory.mktemp("cameras") / "site") as site:
        yield site


@pytest.fixture
def own_site(tmp_path):
    """One that a test may end and start anew."""
    with running_site(tmp_path / "site") as site:
        yield site


class Camera:
    """`inspectd camera` in a process of its own, as cam1."""

    def __init__(self, site, source, *options):
        self._said = site.folder / "camera.txt"
        command = [sys.executable, "-m", "daemon", "camera", str(source), "--camera", "cam1"]
        command += ["--config", "config.yaml", "--peer", "keys/line.peer.yaml", *map(str, options)]
        with self._said.open("wb") as said:
            self.process = subprocess.Popen(
                command, cwd=site.folder, env=site.variables(), stderr=said, stdout=subprocess.PIPE, text=True
            )

    @property
    def said(self):
        return self._said.read_text()

    def ended(self):
        """Its exit code and the counts that it printed last."""
        told, _ = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, json.loads(told) if told else None

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.ended()


@contextmanager
def camera_at(site, source, *options):
    camera = Camera(site, source, *options)
    try:
        yield camera
    finally:
        if camera.process.poll() is None:
            camera.process.kill()
            camera.process.communicate()


def told(line):
    """What was published about cam1: by seq, (outcome, reason, part id)."""
    return {header["seq"]: (header["outcome"], header["reason"], header["partId"]) for header in line.foreign}


def test_folder_is_sent_once_and_each_part_judged(site, tmp_path):
    folder = save(tmp_path / "parts", good_pixels(), bad_pixels(), good_pixels(5))
    with site.line() as line, camera_at(site, folder, "--once", "--rate", 50) as camera:
        code, counts = camera.ended()
        wait_for(line, lambda: len(line.foreign) == 3)
        assert told(line) == {
            0: ("PASS", None, "A000"), 1: ("REJECT", "DEFECT", "A001"), 2: ("PASS", None, "A002")
        }  # fmt: skip
        assert {header["isSimulated"] for header in line.foreign} == {True}
        assert {header["epoch"] for header in line.foreign} == {counts["epoch"]}
    assert code == 0
    assert {key: counts[key] for key in ("sent", "accepted", "refused", "unanswered", "lost")} == {
        "sent": 3, "accepted": 3, "refused": 0, "unanswered": 0, "lost": 0
    }  # fmt: skip


@pytest.mark.parametrize("options", [(), ("--encoding", "jpeg"), ("--encoding", "png", "--gray")])
def test_video_is_sent_in_every_encoding(site, tmp_path, options):
    path = save_video(tmp_path / "v.avi", [good_pixels(), bad_pixels(), good_pixels()])
    with site.line() as line, camera_at(site, path, "--once", *options) as camera:
        assert camera.ended()[0] == 0
        wait_for(line, lambda: len(line.foreign) == 3)
        assert [outcome for _, (outcome, _, _) in sorted(told(line).items())] == ["PASS", "REJECT", "PASS"]


def test_sigterm_ends_it_with_its_counts(site, tmp_path):
    with site.line() as line, camera_at(site, save(tmp_path / "p", good_pixels()), "--rate", 50) as camera:
        wait_for(line, lambda: len(line.foreign) >= 5)
        code, counts = camera.stop()
    assert code == 0
    assert counts["sent"] == counts["accepted"] >= 5


def test_count_ends_it_also_where_the_source_goes_on(site, tmp_path):
    with camera_at(site, save(tmp_path / "p", good_pixels()), "--rate", 50, "--count", 7) as camera:
        code, counts = camera.ended()
    assert (code, counts["accepted"]) == (0, 7)


def test_replay_waits_while_the_daemon_is_away_and_goes_on_in_its_stream(own_site, tmp_path):
    folder = save(tmp_path / "p", *(good_pixels(seed) for seed in range(40)))
    with own_site.line() as line, camera_at(own_site, folder, "--rate", 40, "--once") as camera:
        under_way = 0
        for heard, end in ((5, own_site.kill), (15, own_site.stop)):
            wait_for(line, lambda heard=heard: len(line.foreign) >= heard)
            end()
            kinds = Counter(record["t"] for record in own_site.journal())
            under_way = max(under_way, kinds["accept"] - kinds["verdict"])
            line.pump(200)
            own_site.start()
        code, counts = camera.ended()
        assert code == 0, camera.said
        wait_for(line, lambda: 39 in told(line))
        # What was under way when a daemon was killed is MISSING; all else was judged, in one epoch. By the journal: who
        # hears of it is cut off, too.
        verdicts = [record for record in own_site.journal() if record["t"] == "verdict"]
        judged = {
            seq: record["reason"] or record["outcome"]
            for record in verdicts
            for seq in range(record["seq"], record.get("seqTo", record["seq"]) + 1)
        }
        outcomes = Counter(judged.values())
        assert outcomes["PASS"] + outcomes["MISSING"] + counts["refused"] == 40
        assert outcomes["MISSING"] <= under_way + counts["unanswered"]
        assert counts["sent"] + counts["lost"] == 40
    assert "daemon lost" in camera.said
    assert "daemon connected" in camera.said


def test_second_sender_ends_the_first_which_says_why(site, tmp_path):
    folder = save(tmp_path / "p", good_pixels())
    with site.line() as line, camera_at(site, folder, "--rate", 50) as first:
        wait_for(line, lambda: len(line.foreign) >= 3)
        with camera_at(site, folder, "--rate", 20, "--count", 5) as second:
            assert second.ended()[0] == 0
            assert first.ended()[0] == 78
    assert "another sender speaks as test/cam1" in first.said


def test_refused_camera_goes_on_and_says_why(site, tmp_path):
    folder = save(tmp_path / "p", good_pixels())
    assert site.run_command("pause").returncode == 0
    with camera_at(site, folder, "--rate", 50) as camera:
        until = time.monotonic() + PATIENCE_S
        while "PAUSED" not in camera.said:
            assert time.monotonic() < until
            time.sleep(0.02)
        assert site.run_command("resume").returncode == 0
        with site.line() as line:
            wait_for(line, lambda: len(line.foreign) >= 3)
        code, counts = camera.stop()
    assert code == 0
    assert counts["refused"] > 0
    assert counts["accepted"] >= 3


def test_key_that_the_daemon_does_not_know_is_told(site, tmp_path):
    make_server_key(tmp_path / "other")
    stranger = make_peer(tmp_path / "other", "cam1", ["camera"], ["*"])
    text = stranger.read_text()
    known = load_peer_file(site.folder / "keys/line.peer.yaml").serverKey
    stranger.write_text(re.sub(r"serverKey: .*", f"serverKey: {json.dumps(known)}", text))
    with camera_at(site, save(tmp_path / "p", good_pixels()), "--peer", stranger) as camera:
        until = time.monotonic() + PATIENCE_S
        while "does not know this key" not in camera.said:
            assert time.monotonic() < until, camera.said
            time.sleep(0.05)
        assert camera.stop()[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["pictures", "--camera", "cam1"], 64, "wanted --line NAME and --daemon tcp://HOST:PORT, or --config"),
        (["nowhere", "--camera", "cam1", "--config", "config.yaml"], 65, "nowhere: is not there; wanted a folder"),
        (["empty", "--camera", "cam1", "--config", "config.yaml"], 65, "empty: no image is in this folder"),
        (["pictures", "--camera", "cam1", "--config", "config.yaml", "--trigger", "tcp://0.0.0.0:1"], 64, "loopback"),
        (["pictures", "--camera", "cam1", "--config", "config.yaml", "--trigger", "unix:x"], 64, "wanted tcp://"),
        (["pictures", "--camera", "cam1", "--config", "config.yaml", "--peer", "none.yaml"], 78, "none.yaml: is not there"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_told_at_once(tmp_path, arguments, code, told):
    site = make_site(tmp_path)
    site.write_config()
    save(tmp_path / "pictures", good_pixels())
    (tmp_path / "empty").mkdir()
    done = site.run_command("camera", *arguments)
    assert done.returncode == code, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr


# --- sources that come and go, and triggers: the process's heart with a source that obeys the test


class Obedient:
    """A live source that gives what stands in `script`: pictures, None, or errors to raise."""

    is_replay = False
    rate = None

    def __init__(self, *script):
        self.script, self.opened, self.closed, self.idled = list(script), 0, 0, 0
        self.on_empty = lambda: None

    def open(self):
        self.opened += 1

    def read(self):
        if not self.script:
            self.on_empty()
            return None
        step = self.script.pop(0)
        if isinstance(step, Exception):
            raise step
        return step

    def idle(self):
        self.idled += 1
        return False

    def close(self):
        self.closed += 1


def picture(seed=0):
    return Captured(good_pixels(seed)[:, :, 0], "Mono8", 1000 + seed)


@contextmanager
def feed_to(site):
    feed = Feed(site.addresses.frames, site.peer(), ("test", "cam1"), Encoding(), None)
    until = time.monotonic() + PATIENCE_S
    while not feed.has_room():
        assert time.monotonic() < until
        feed.socket.poll(10)
    yield feed
    feed.close()


@pytest.fixture
def feed(site):
    with feed_to(site) as feed:
        yield feed


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(camera_module, "_FIRST_REST_S", 0.01)
    monkeypatch.setattr(camera_module, "_LONGEST_REST_S", 0.05)


@pytest.mark.usefixtures("hasty")
def test_source_that_goes_away_is_opened_again_and_its_stream_goes_on(site, feed):
    with site.line() as line:
        gone = [SourceError("unplugged") for _ in range(4)]
        source = Obedient(picture(0), gone[0], gone[1], picture(1), gone[2], picture(2), gone[3])
        process = CameraProcess(source, feed)
        source.on_empty = process.stop
        process.run()
        wait_for(line, lambda: len(line.foreign) == 3)
        assert [header["seq"] for header in line.foreign] == [0, 1, 2]
        assert [header["capturedNs"] for header in line.foreign] == [1000, 1001, 1002]
        assert {header["isSimulated"] for header in line.foreign} == {False}
    assert source.opened == 5
    assert feed.counts["accepted"] == 3


def test_rests_between_tries_grow_up_to_their_limit_and_a_picture_makes_them_short_again(monkeypatch, feed):
    monkeypatch.setattr(camera_module, "_FIRST_REST_S", 0.5)
    rests = []
    process = CameraProcess(Obedient(*[SourceError("away")] * 7, picture(), SourceError("away")), feed)
    process._source.on_empty = process.stop

    def rest():
        rests.append(process._rest_s)
        process._rest_s = min(2 * process._rest_s, camera_module._LONGEST_REST_S)

    monkeypatch.setattr(process, "_rest", rest)
    process.run()
    assert rests == [0.5, 1, 2, 4, 8, 10, 10, 0.5]


def test_picture_that_was_taken_and_did_not_arrive_is_a_missing_part(site, feed):
    with site.line() as line:
        source = Obedient(picture(), PictureLostError("incomplete"), picture())
        process = CameraProcess(source, feed)
        source.on_empty = process.stop
        process.run()
        wait_for(line, lambda: len(line.foreign) == 3)
        assert told(line)[1] == ("REJECT", "MISSING", None)
        assert [told(line)[seq][0] for seq in (0, 2)] == ["PASS", "PASS"]


def test_frames_of_a_live_camera_are_missing_parts_while_the_daemon_is_away(own_site):
    with own_site.line() as line, feed_to(own_site) as feed:
        assert feed.send(picture(), is_simulated=False)
        wait_for(line, lambda: len(line.foreign) == 1)
        own_site.kill()
        until = time.monotonic() + PATIENCE_S
        while feed.has_room():
            assert time.monotonic() < until
            feed.hear()
        assert [feed.send(picture(), is_simulated=False) for _ in range(3)] == [False] * 3
        before = line.run
        own_site.start()
        wait_for(line, lambda: line.run != before and feed.has_room())  # the line hears the new run
        assert feed.send(picture(), is_simulated=False)
        wait_for(line, lambda: 4 in told(line))
        assert {seq: reason for seq, (_, reason, _) in told(line).items()} == {
            0: None, 1: "MISSING", 2: "MISSING", 3: "MISSING", 4: None
        }  # fmt: skip


def test_no_more_frames_are_under_way_than_the_daemon_has_room_for(site):
    address = tcp()
    context = zmq.Context()
    daemon = context.socket(zmq.ROUTER)
    daemon.bind(address)
    feed = Feed(address, None, ("test", "cam1"), Encoding(), None)

    def answer(credit):
        who, _, header, _ = daemon.recv_multipart()
        fields = {"v": 1, "epoch": feed.epoch, "seq": json.loads(header)["seq"], "status": "accepted", "credit": credit}
        daemon.send_multipart([who, b"answer/test/cam1", json.dumps(fields).encode()])
        assert feed.socket.poll(10_000)
        feed.hear()

    def send_all():
        until = time.monotonic() + PATIENCE_S
        while not feed.has_room():
            assert time.monotonic() < until
        count = 0
        while feed.has_room():
            count += feed.send(picture(), is_simulated=False)
        return count

    try:
        assert send_all() == 2
        answer(5)
        assert send_all() == 4  # one is under way still
        for _ in range(5):
            answer(0)
        assert send_all() == 1  # without any there would be no answer to tell of room
    finally:
        feed.close()
        context.destroy(linger=0)


class Asked:
    """Whoever wants pictures: a REQ socket, and the process in a thread beside it."""

    def __init__(self, feed, source, address):
        self.trigger = Trigger(address)
        self.process = CameraProcess(source, feed, self.trigger)
        self.thread = threading.Thread(target=self.process.run, daemon=True)
        self.thread.start()
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.REQ)
        self.socket.rcvtimeo = 10_000
        self.socket.connect(address)

    def ask(self, text=b""):
        self.socket.send(text)
        return json.loads(self.socket.recv())

    def close(self):
        self.process.stop()
        self.thread.join(10)
        self._context.destroy(linger=0)
        self.trigger.close()


@pytest.fixture
def asked(feed, tmp_path):
    made = []

    def make(*script):
        made.append(Asked(feed, Obedient(*script), f"ipc://{tmp_path}/trigger.sock"))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_a_request_takes_one_picture_with_its_part_id(site, feed, asked):
    with site.line() as line:
        someone = asked(picture(0), picture(1))
        assert someone.ask(b"A17") == {"epoch": feed.epoch, "seq": 0, "capturedNs": 1000}
        assert someone.ask() == {"epoch": feed.epoch, "seq": 1, "capturedNs": 1001}
        wait_for(line, lambda: len(line.foreign) == 2)
        assert told(line) == {0: ("PASS", None, "A17"), 1: ("PASS", None, None)}


def test_a_request_whose_picture_does_not_come_is_told_so_and_is_a_missing_part(site, asked):
    with site.line() as line:
        someone = asked(picture(), None, PictureLostError("incomplete"), picture())
        assert someone.ask(b"A0")["seq"] == 0
        assert someone.ask(b"A1") == {"error": "no picture came"}
        assert someone.ask(b"A2") == {"error": "incomplete"}
        assert someone.ask(b"A3")["seq"] == 3
        wait_for(line, lambda: 3 in told(line))
        missing = ("REJECT", "MISSING", None)
        assert told(line) == {0: ("PASS", None, "A0"), 1: missing, 2: missing, 3: ("PASS", None, "A3")}


def test_a_part_id_that_cannot_be_is_told_and_takes_no_number(asked):
    someone = asked(picture())
    for text in (b"two\nlines", b"\xff", b"x" * 129):
        assert "wanted 1 to 128 printable characters" in someone.ask(text)["error"]
    assert someone.ask(b"x" * 128)["seq"] == 0


def test_request_while_the_source_is_away_is_told_so(asked, monkeypatch):
    monkeypatch.setattr(camera_module, "_FIRST_REST_S", 2.0)
    someone = asked(SourceError("unplugged"), picture())
    assert someone.ask(b"A1") == {"error": "unplugged"}
    assert someone.ask(b"A2") == {"error": "the source is not there"}
    assert someone.ask(b"A3").keys() in ({"error"}, {"epoch", "seq", "capturedNs"})


def test_request_that_waited_while_the_source_hung_takes_no_picture_of_another_part(asked, monkeypatch):
    monkeypatch.setattr(camera_module, "_STALE_NS", 0)
    assert "the part has gone by" in asked(picture()).ask(b"A1")["error"]


def test_request_that_waited_while_the_source_was_opened_takes_no_picture_either(feed, tmp_path):
    address = f"ipc://{tmp_path}/trigger.sock"
    source = Obedient(picture(), picture())
    source.open = lambda: time.sleep(2 * camera_module._STALE_NS / 1e9)
    trigger = Trigger(address)
    context = zmq.Context()
    early = context.socket(zmq.REQ)
    early.rcvtimeo = 10_000
    early.connect(address)
    early.send(b"A1")
    assert trigger.socket.poll(10_000)
    process = CameraProcess(source, feed, trigger, count=1)
    thread = threading.Thread(target=process.run, daemon=True)
    thread.start()
    assert "the part has gone by" in json.loads(early.recv())["error"]
    early.send(b"A2")
    assert json.loads(early.recv())["seq"] == 1
    thread.join(10)
    context.destroy(linger=0)
    trigger.close()


def test_trigger_socket_is_for_owner_and_group(tmp_path):
    trigger = Trigger(f"ipc://{tmp_path}/t.sock")
    assert (tmp_path / "t.sock").stat().st_mode & 0o777 == 0o660
    trigger.close()


def test_trigger_address_in_use_is_told(tmp_path):
    address = tcp()
    first = Trigger(address)
    with pytest.raises(ConfigError, match="cannot be bound"):
        Trigger(address)
    first.close()


# --- docs/cameras.md

PAGE = (ROOT / "docs/cameras.md").read_text()


def test_the_commands_of_the_page_are_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^inspectd camera (.*)$", PAGE, re.MULTILINE)
    assert len(commands) >= 4
    for text in commands:
        with camera_module.command.make_context("camera", shlex.split(text)) as context:
            assert context.params["camera"] == "cam1"


def test_the_trigger_of_the_page_is_answered_as_it_says(asked, tmp_path):
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "trigger.send" in block]
    asked(picture())
    code = code.replace("ipc://run/cam1.trigger", f"ipc://{tmp_path}/trigger.sock")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert re.match(r"""b'{"epoch":"\w+","seq":0,"capturedNs":1000}'""", done.stdout), done.stderr


def test_the_time_limit_of_the_page_ends_a_sender_that_nobody_answers():
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "imagezmq" in block]
    code = code.replace("tcp://127.0.0.1:5555", tcp()).replace("RCVTIMEO, 2000", "RCVTIMEO, 100")
    code += """
import numpy as np
sender = connect()
try:
    sender.send_image("part", np.zeros((8, 8), np.uint8))
except zmq.Again:
    sender.close()
    print("ended")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "ended\n", done.stderr


def test_the_inputs_of_the_page_are_a_configuration(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    site = make_site(tmp_path)
    site.config["cameras"] |= {name: dict(site.config["cameras"]["cam1"]) for name in ("cam2", "cam3")}
    site.config["inputs"] = yaml.safe_load(text)["inputs"]
    assert [entry.camera for entry in load_config(site.write_config()).inputs] == ["cam2", "cam3"]
