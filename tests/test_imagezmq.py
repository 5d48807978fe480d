"""Stock imageZMQ senders: what they send is judged, they hear OK whatever they send, and a restart does not stop them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise

import cv2
import numpy as np
import pytest
import zmq

from daemon.endpoints import Endpoint
from daemon.hub import Numbering, split_envelope
from daemon.line.greeter import OK, Greeter
from daemon.line.sockets import Bounds, bind
from tests.bundles import bad_pixels, good_pixels
from tests.daemons import make_site, tcp
from tests.lines import assert_books_balance, wait_for

PATIENCE_MS = 20_000  # never waited for where things are as they should be


@pytest.fixture
def context():
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


def hub_site(folder):
    """A site whose cam2 is a stock sender that connects, and cam3 one that publishes."""
    site = make_site(folder)
    site.config["queue_mb"] = 1
    site.config["cameras"] |= {name: dict(site.config["cameras"]["cam1"]) for name in ("cam2", "cam3")}
    site.config["inputs"] += [
        {"kind": "imagezmq-rep", "bind": tcp(), "camera": "cam2", "plain": True},
        {"kind": "imagezmq-sub", "connect": tcp(), "camera": "cam3", "plain": True},
    ]
    return site


def hub_address(site):
    return site.config["inputs"][1]["bind"]


def publisher_address(site):
    return site.config["inputs"][2]["connect"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    site = hub_site(tmp_path_factory.mktemp("hub"))
    site.start()
    yield site
    assert site.stop() == 0, site.log
    assert_books_balance(site)


# --- a sender written from the format


def array(pixels, msg="part"):
    """[JSON {"msg", "dtype", "shape"}][bytes], as send_image sends it."""
    header = {"msg": msg, "dtype": str(pixels.dtype), "shape": pixels.shape}
    return [json.dumps(header).encode(), pixels.tobytes()]


def jpeg(pixels, msg="part"):
    """[JSON {"msg"}][JPEG], as send_jpg sends it."""
    return [
        json.dumps({"msg": msg}).encode(),
        cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes(),
    ]


FORMS = {
    "gray": lambda pixels: array(pixels[:, :, 0]),
    "gray with an axis": array,
    "colour": lambda pixels: array(np.repeat(pixels, 3, 2)),
    "16 bit": lambda pixels: array(pixels[:, :, 0].astype(np.uint16) * 257),
    "JPEG": lambda pixels: jpeg(pixels[:, :, 0]),
    "colour JPEG": lambda pixels: jpeg(np.repeat(pixels, 3, 2)),
}


def connected(context, address):
    sender = context.socket(zmq.REQ)
    sender.rcvtimeo = PATIENCE_MS
    sender.connect(address)
    return sender


def tell(sender, parts):
    sender.send_multipart(parts)
    return sender.recv()


def verdicts(line, count):
    """What was published about the camera's first `count` parts: (seq, outcome, reason, partId)."""
    wait_for(line, lambda: len(line.foreign) >= count)
    return [(header["seq"], header["outcome"], header["reason"], header["partId"]) for header in line.foreign]


@pytest.mark.parametrize("form", FORMS)
def test_frames_are_judged_in_every_form(site, context, form):
    with site.line("cam2") as line:
        sender = connected(context, hub_address(site))
        assert [tell(sender, FORMS[form](pixels)) for pixels in (good_pixels(), bad_pixels())] == [OK, OK]
        assert verdicts(line, 2) == [(0, "PASS", None, "part"), (1, "REJECT", "DEFECT", "part")]


def test_blue_comes_first_as_in_opencv(site, context):
    with site.line("cam2") as line:
        tinted = np.repeat(bad_pixels(), 3, 2)
        tinted[:, :, 2] = 0
        tell(connected(context, hub_address(site)), array(tinted))
        kept = site.folder / "run/rejects"
        wait_for(line, lambda: any(np.array_equal(cv2.imread(str(path)), tinted) for path in kept.rglob("*.png")))


def test_arrival_is_the_time_of_capture_and_nothing_is_simulated(site, context):
    before_ns = time.time_ns()
    with site.line("cam2") as line:
        tell(connected(context, hub_address(site)), array(good_pixels()))
        verdicts(line, 1)
        (header,) = line.foreign
    assert before_ns <= header["capturedNs"] <= header["decidedNs"] <= time.time_ns()
    assert header["isSimulated"] is False


@pytest.mark.parametrize("msg", [None, 5, "", "two\nlines", "x" * 129, ["part"]])
def test_message_text_that_can_be_no_part_id_is_none(site, context, msg):
    with site.line("cam2") as line:
        tell(connected(context, hub_address(site)), array(good_pixels(), msg))
        assert verdicts(line, 1) == [(0, "PASS", None, None)]


GOOD = array(good_pixels())
BROKEN = {
    "nothing": [b""],
    "no JSON": [b"x", GOOD[1]],
    "no object": [b"[1]", GOOD[1]],
    "a header that is too large": [b'{"msg": "%s"}' % (b"x" * 70_000), GOOD[1]],
    "no image": GOOD[:1],
    "an empty image": [GOOD[0], b""],
    "two images": [*GOOD, GOOD[1]],
    "many parts": [*GOOD, *[b"x"] * 50],
    "an image that is too short": [GOOD[0], GOOD[1][:-1]],
    "an image that is too long": [GOOD[0], GOOD[1] + b"x"],
    "floats": array(good_pixels().astype(np.float32)),
    "four channels": array(np.repeat(good_pixels(), 4, 2)),
    "a dtype that is no text": [b'{"dtype": [1], "shape": [64, 64]}', GOOD[1]],
    "a shape that is none": [b'{"dtype": "uint8", "shape": "64x64"}', GOOD[1]],
    "a shape of one side": [b'{"dtype": "uint8", "shape": [4096]}', GOOD[1]],
    "a negative shape": [b'{"dtype": "uint8", "shape": [-64, -64, 1]}', GOOD[1]],
    "an endless shape": [b'{"dtype": "uint8", "shape": [1e999, 64]}', GOOD[1]],
    "a gigantic shape": [b'{"dtype": "uint8", "shape": [9000000000, 9000000000]}', GOOD[1]],
    "a shape without dtype": [b'{"shape": [64, 64]}', GOOD[1]],
    "a JPEG that is none": [b'{"msg": "a"}', b"\xff\xd8 no"],
    "half a JPEG": [b'{"msg": "a"}', jpeg(good_pixels())[1][:-200]],
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_message_is_answered_and_is_a_bad_frame(site, context, name):
    with site.line("cam2") as line:
        sender = connected(context, hub_address(site))
        assert tell(sender, BROKEN[name]) == OK
        assert tell(sender, GOOD) == OK
        told = [(seq, outcome, reason) for seq, outcome, reason, _ in verdicts(line, 2)]
        assert sorted(told) == [(0, "REJECT", "BAD_FRAME"), (1, "PASS", None)]


def test_sender_of_a_paused_daemon_goes_on_and_its_frames_get_no_verdict(site, context):
    with site.line("cam2") as line:
        sender = connected(context, hub_address(site))
        assert site.run_command("pause").returncode == 0
        assert [tell(sender, GOOD) for _ in range(3)] == [OK] * 3
        assert site.run_command("resume").returncode == 0
        assert tell(sender, GOOD) == OK
        assert verdicts(line, 1) == [(3, "PASS", None, "part")]
        line.pump(200)
        assert len(line.foreign) == 1


def test_each_connection_is_an_epoch_of_its_own(site, context):
    with site.line("cam2") as line:
        first, second = (connected(context, hub_address(site)) for _ in range(2))
        for sender in (first, first, second, first):
            assert tell(sender, GOOD) == OK
        wait_for(line, lambda: len(line.foreign) == 4)
        parts = [(header["epoch"], header["seq"]) for header in line.foreign]
    assert sorted(Counter(epoch for epoch, _ in parts).values()) == [1, 1, 2]
    assert {seq for _, seq in parts} == {0, 1}
    assert {header["reason"] for header in line.foreign} == {None}


def test_request_with_an_envelope_of_its_own_gets_it_back(site, context):
    sender = connected(context, hub_address(site))
    sender.setsockopt(zmq.REQ_CORRELATE, 1)  # puts a number before each request and wants it back
    assert [tell(sender, GOOD) for _ in range(3)] == [OK] * 3


def test_message_without_an_envelope_is_answered_in_one():
    assert split_envelope([memoryview(b"a"), memoryview(b"b")]) == ([b""], [b"a", b"b"])
    assert split_envelope([memoryview(b"id"), memoryview(b""), memoryview(b"a")]) == ([b"id", b""], [b"a"])


def test_numbers_begin_anew_with_each_connection_and_run():
    numbering = Numbering("cam2")
    keys = [numbering.number(peer) for peer in (b"a", b"a", b"b", b"a", b"a")]
    assert [key.seq for key in keys] == [0, 1, 0, 0, 1]
    assert [now.epoch == before.epoch for before, now in pairwise(keys)] == [True, False, False, True]
    assert Numbering("cam2").number(b"a").epoch != keys[0].epoch


def test_frames_of_a_publisher_are_judged_also_after_it_came_back(site):
    def publish_until(line, count):
        context = zmq.Context()
        publisher = context.socket(zmq.PUB)
        publisher.bind(publisher_address(site))

        def is_heard():
            publisher.send_multipart(FORMS["colour"](bad_pixels()))
            return len(line.foreign) >= count

        wait_for(line, is_heard)
        context.destroy(linger=0)

    with site.line("cam3") as line:
        publish_until(line, 2)
        publish_until(line, len(line.foreign) + 2)
        assert {(header["outcome"], header["reason"]) for header in line.foreign} == {("REJECT", "DEFECT")}
        assert len({header["epoch"] for header in line.foreign}) == 1
        assert [header["seq"] for header in line.foreign] == list(range(len(line.foreign)))


def test_doctor_asks_a_key_only_where_keys_are_asked_for(site):
    done = site.run_command("doctor", "--peer", "keys/line.peer.yaml")
    assert (done.returncode, "FAIL" in done.stdout) == (0, False), done.stdout
    assert "inputs[0]" in done.stdout
    assert not {"inputs[1]", "inputs[2]"} & set(re.findall(r"inputs\[\d\]", done.stdout))


def test_doctor_looks_for_the_hubs_port_and_not_for_the_publishers(tmp_path):
    site = hub_site(tmp_path)
    site.write_config()
    told = site.run_command("doctor").stdout
    assert re.search(r"ok +inputs\[1\]: 127\.0\.0\.1:\d+ is free", told)
    assert "inputs[2]" not in told


def test_hub_whose_address_is_held_ends_at_once_and_says_so(tmp_path, context):
    site = hub_site(tmp_path)
    holder = context.socket(zmq.REP)
    holder.bind(hub_address(site))
    site.start(wait=False)
    assert site.process.wait(60) == 78
    assert "another process holds it" in site.log


# --- senders that wait for an answer which was lost


def hub(context, address):
    """The daemon's side alone: a socket whose newcomers are greeted."""
    greeters = []

    def greet(socket):
        greeters.append(Greeter(context, socket))

    endpoint = Endpoint(bind=address, plain=True)
    return bind(context, zmq.ROUTER, endpoint, None, Bounds(1 << 20), before=greet), greeters[0]


def go_on(greeter, condition, jump_ns=50_000_000):
    """Let time pass for the greeter, until the condition holds."""
    until, now_ns = time.monotonic() + PATIENCE_MS / 1000, 0
    while not condition():
        assert time.monotonic() < until, "it never happened"
        now_ns += jump_ns
        greeter.tick(now_ns)


@pytest.mark.parametrize("scheme", ["tcp", "ipc"])
def test_sender_whose_answer_was_lost_with_the_daemon_is_told_ok_by_the_next_one(context, tmp_path, scheme):
    address = tcp() if scheme == "tcp" else f"ipc://{tmp_path}/hub.sock"
    of_first = zmq.Context()
    first, greeter = hub(of_first, address)
    senders = [connected(context, address) for _ in range(3)]
    for sender in senders:
        sender.send_multipart(GOOD)
    for _ in senders:
        assert first.poll(PATIENCE_MS)
        first.recv_multipart()  # and dies before it answers
    greeter.close()
    of_first.destroy(linger=0)
    second, greeter = hub(context, address)
    go_on(greeter, lambda: all(sender.poll(10) for sender in senders))
    assert [sender.recv() for sender in senders] == [OK] * 3
    for number, sender in enumerate(senders):
        sender.send_multipart([b"next", b"%d" % number])
    heard = set()
    for _ in senders:
        assert second.poll(PATIENCE_MS)
        name, *_, number = second.recv_multipart()
        greeter.heard(name)
        heard.add(number)
    assert heard == {b"0", b"1", b"2"}
    greeter.close()


def test_sender_that_speaks_is_not_greeted(context):
    address = tcp()
    socket, greeter = hub(context, address)
    sender = connected(context, address)
    sender.send_multipart(GOOD)
    assert socket.poll(PATIENCE_MS)
    name, *_ = socket.recv_multipart()
    greeter.heard(name)
    greeter.tick(10**12)
    greeter.tick(2 * 10**12)
    socket.send_multipart([name, b"", b"the answer"])
    assert sender.recv() == b"the answer"
    assert not sender.poll(100)
    greeter.close()


def test_greeting_of_one_that_was_not_waiting_stops_nobody(context):
    address = tcp()
    socket, greeter = hub(context, address)
    sender = connected(context, address)
    go_on(greeter, lambda: greeter._silent)
    go_on(greeter, lambda: not greeter._silent)
    heard = []
    for number in range(5):
        sender.send(b"%d" % number)
        assert socket.poll(PATIENCE_MS)
        name, _, frame = socket.recv_multipart()
        heard.append(int(frame))
        socket.send_multipart([name, b"", b"the answer"])
        assert sender.recv() in (OK, b"the answer")  # the greeting, where it came after the first frame had left
    assert heard == [0, 1, 2, 3, 4]
    greeter.close()


# --- the package itself, as it is, across restarts of the daemon

SENDER = """
import sys, time
import cv2, imagezmq
import numpy as np
sender = imagezmq.ImageSender(connect_to=sys.argv[1], REQ_REP=sys.argv[2] != "sub")
pixels = np.full((64, 64), 128, np.uint8)
for number in range(int(sys.argv[3])):
    if sys.argv[2] == "jpg":
        answer = sender.send_jpg(f"part-{number}", cv2.imencode(".jpg", pixels)[1])
    else:
        answer = sender.send_image(f"part-{number}", pixels)
    assert answer == (None if sys.argv[2] == "sub" else b"OK"), answer
    print(number, flush=True)
    time.sleep(0.002)
"""


class Sender:
    """imageZMQ's ImageSender in a process of its own, which sends without end as far as the test goes."""

    def __init__(self, folder, address, kind):
        self._told = folder / "sender.txt"
        with self._told.open("wb") as told:
            command = [sys.executable, "-c", SENDER, address, kind, "1000000"]
            self.process = subprocess.Popen(command, stdout=told, stderr=subprocess.STDOUT)

    @property
    def sent(self):
        return len(self._told.read_text().splitlines())

    def goes_on(self, count):
        """Wait until `count` more frames were sent."""
        wanted, until = self.sent + count, time.monotonic() + PATIENCE_MS / 1000
        while self.sent < wanted:
            assert self.process.poll() is None, self._told.read_text()[-2000:]
            assert time.monotonic() < until, f"the sender hangs after {self.sent} frames"
            time.sleep(0.01)

    def stop(self):
        self.process.kill()
        self.process.wait(10)


@pytest.fixture
def own_site(tmp_path):
    site = hub_site(tmp_path)
    site.start()
    yield site
    if site.process is not None:
        site.kill()


@pytest.mark.parametrize("kind", ["image", "jpg", "sub"])
def test_stock_sender_survives_a_killed_and_a_stopped_daemon(own_site, tmp_path, kind):
    site = own_site
    camera, address = ("cam3", publisher_address(site)) if kind == "sub" else ("cam2", hub_address(site))
    sender = Sender(tmp_path, address, kind)
    try:
        with site.line(camera) as line:
            for end in (site.kill, site.stop, site.kill):
                sender.goes_on(50)
                line.foreign.clear()
                wait_for(line, lambda: any(header["outcome"] == "PASS" for header in line.foreign))
                end()
                site.start()
            sender.goes_on(50)
            line.foreign.clear()
            wait_for(line, lambda: any(header["outcome"] == "PASS" for header in line.foreign))
            (named,) = {header["partId"].partition("-")[0] for header in line.foreign if header["outcome"] == "PASS"}
            assert named == "part"
    finally:
        sender.stop()
    assert site.stop() == 0
    assert_books_balance(site)
