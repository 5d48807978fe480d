"""Frames in shared memory: what the daemon reads, what it refuses, and a real daemon fed by the sender."""

from __future__ import annotations

import gc
import os
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
import zmq

from adapters.shm_sender import ShmSender
from daemon.config import load_config
from daemon.errors import ConfigError, DataError, FrameError
from daemon.line import shm
from daemon.line.shm import BEING_WRITTEN, HEAD, MAGIC, SLOT, SLOT_HEADER_BYTES, Rings, ring_path, slot_offset
from daemon.line.wire import decode_header
from tests import bundles
from tests.daemons import make_site

SLOT_BYTES = 5000


@pytest.fixture
def camera(monkeypatch, tmp_path):
    """The name of a camera whose ring lies in a folder of its own."""
    monkeypatch.setattr(shm, "FOLDER", tmp_path)
    return "cam1"


@pytest.fixture
def rings():
    made = Rings()
    yield made
    made.close()


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def write_ring(camera, frames, slots=3):
    """A ring whose slots hold these (seq, data)."""
    path = ring_path("solar", camera)
    memory = bytearray(slot_offset(slots, SLOT_BYTES))
    HEAD.pack_into(memory, 0, MAGIC, slots, SLOT_BYTES)
    for slot, (seq, data) in enumerate(frames):
        offset = slot_offset(slot, SLOT_BYTES)
        SLOT.pack_into(memory, offset, seq, len(data))
        memory[offset + SLOT_HEADER_BYTES : offset + SLOT_HEADER_BYTES + len(data)] = data
    path.write_bytes(memory)
    return path


def read(rings, camera, seq, slot, epoch="e"):
    return rings.read("solar", camera, epoch=epoch, seq=seq, slot=slot)


def test_slots_are_read_and_lie_on_pages(rings, camera):
    frames = [(7, b"seven" * 900), (8, b"eight"), (9, b"n" * SLOT_BYTES)]
    write_ring(camera, frames)
    for slot, (seq, data) in enumerate(frames):
        assert bytes(read(rings, camera, seq, slot)) == data
        assert slot_offset(slot, SLOT_BYTES) % shm.PAGE == 0


def test_what_was_read_is_not_changed_by_what_is_written_later(rings, camera):
    path = write_ring(camera, [(1, b"first")])
    payload = read(rings, camera, 1, 0)
    with path.open("r+b") as file:
        file.seek(slot_offset(0, SLOT_BYTES) + SLOT_HEADER_BYTES)
        file.write(b"other")
    assert bytes(payload) == b"first"


def test_memory_comes_back_when_nobody_holds_the_frame(rings, camera):
    write_ring(camera, [(1, b"a" * 100), (2, b"b" * 100)])
    first = read(rings, camera, 1, 0)
    place = np.frombuffer(first, np.uint8).ctypes.data
    second = read(rings, camera, 2, 1)
    assert np.frombuffer(second, np.uint8).ctypes.data != place  # the first frame is still held
    view = np.frombuffer(first, np.uint8).reshape(10, 10)
    del first
    gc.collect()
    third = read(rings, camera, 2, 1)
    assert np.frombuffer(third, np.uint8).ctypes.data != place  # as pixels
    assert (view == ord("a")).all()
    del view
    gc.collect()
    assert np.frombuffer(read(rings, camera, 1, 0), np.uint8).ctypes.data == place


@pytest.mark.parametrize("slot", [3, -1, 10**12, None, "0", 1.0, True, [0]])
def test_slot_that_is_none_is_refused(rings, camera, slot):
    write_ring(camera, [(1, b"x")])
    with pytest.raises(FrameError, match=r"found slot|found .*, wanted the slot's number"):
        read(rings, camera, 1, slot)
    assert bytes(read(rings, camera, 1, 0)) == b"x"


@pytest.mark.parametrize("held", [(2, b"x"), (BEING_WRITTEN, b"x")])
def test_slot_of_another_frame_is_refused(rings, camera, held):
    write_ring(camera, [held])
    with pytest.raises(FrameError, match="slot 0 does not hold frame 1"):
        read(rings, camera, 1, 0)


def test_slot_that_claims_more_than_it_has_is_refused(rings, camera):
    path = write_ring(camera, [(1, b"x")])
    with path.open("r+b") as file:
        file.seek(slot_offset(0, SLOT_BYTES))
        file.write(SLOT.pack(1, SLOT_BYTES + 1))
    with pytest.raises(FrameError, match="does not hold frame 1"):
        read(rings, camera, 1, 0)


def test_ring_that_is_cut_short_is_a_bad_frame_and_no_signal(rings, camera):
    path = write_ring(camera, [(1, b"x" * 3000), (2, b"y" * 3000)])
    assert len(read(rings, camera, 2, 1)) == 3000
    os.truncate(path, slot_offset(1, SLOT_BYTES) + SLOT_HEADER_BYTES + 10)
    with pytest.raises(FrameError, match="slot 1 changed while frame 2 was read"):
        read(rings, camera, 2, 1)
    os.truncate(path, 100)
    with pytest.raises(FrameError, match="does not hold"):
        read(rings, camera, 1, 0)


def test_slot_overwritten_while_it_is_read_is_a_bad_frame(rings, camera, monkeypatch):
    path = write_ring(camera, [(1, b"x" * 100)])
    read(rings, camera, 1, 0)
    original = os.preadv

    def overwrite(*arguments):
        count = original(*arguments)
        with path.open("r+b") as file:
            file.seek(slot_offset(0, SLOT_BYTES))
            file.write(SLOT.pack(BEING_WRITTEN, 0))
        return count

    monkeypatch.setattr(os, "preadv", overwrite)
    with pytest.raises(FrameError, match="changed while frame 1 was read"):
        read(rings, camera, 1, 0)


@pytest.mark.parametrize("make", [
    lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"x" * 5000), lambda path: path.mkdir(),
    lambda path: path.symlink_to("/etc/hostname"), os.mkfifo, lambda path: None,
])  # fmt: skip
def test_what_is_no_ring_is_refused_and_leaves_no_file_open(rings, camera, make):
    make(ring_path("solar", camera))
    before = open_files()
    with pytest.raises(FrameError, match=r"ring"):
        read(rings, camera, 1, 0)
    assert open_files() == before


def test_new_epoch_opens_the_ring_again(rings, camera):
    path = write_ring(camera, [(0, b"old")])
    assert bytes(read(rings, camera, 0, 0, "first")) == b"old"
    before = open_files()
    path.unlink()
    write_ring(camera, [(0, b"new")])
    assert bytes(read(rings, camera, 0, 0, "first")) == b"old"
    assert bytes(read(rings, camera, 0, 0, "second")) == b"new"
    assert open_files() == before


def test_shared_memory_is_refused_over_tcp(tmp_path):
    site = make_site(tmp_path / "site")
    site.config["inputs"].append({"kind": "shm", "bind": "tcp://127.0.0.1:5999"})
    with pytest.raises(ConfigError, match="wanted ipc://path: frames in shared memory"):
        load_config(site.write_config())


@pytest.mark.parametrize(
    ("slots", "slot_bytes"), [(2**63, 100), (3, 2**63), (0, SLOT_BYTES), (4, SLOT_BYTES), (2**64 - 1, 2**64 - 1)]
)
def test_ring_that_claims_more_than_its_file_has_is_a_bad_frame(rings, camera, slots, slot_bytes):
    path = write_ring(camera, [(1, b"x")])
    with path.open("r+b") as file:
        file.write(HEAD.pack(MAGIC, slots, slot_bytes))
    before = open_files()
    for slot in (0, 2**62):
        with pytest.raises(FrameError, match="the file is smaller"):
            read(rings, camera, 1, slot)
    assert open_files() == before


def test_frames_of_many_sizes_share_a_few_buffers(rings, camera):
    """JPEGs: each one another size."""
    write_ring(camera, [(1, b"x")])
    ring = ring_path("solar", camera)
    for size in range(1, SLOT_BYTES, 7):
        with ring.open("r+b") as file:
            file.seek(slot_offset(0, SLOT_BYTES))
            file.write(SLOT.pack(1, size))
        assert len(read(rings, camera, 1, 0)) == size
    assert len(rings._buffers._idle) <= 8


# The sender, and a real daemon


@pytest.fixture
def site(tmp_path):
    made = make_site(tmp_path / "s", tcp_curve=False)
    made.config["line"] = f"t{uuid.uuid4().hex[:8]}"  # /dev/shm is the machine's
    made.config["inputs"].append({"kind": "shm", "bind": "ipc://run/shm.sock"})
    made.start()
    yield made
    assert made.stop() == 0


def outcomes(site, work, count):
    """What is published about the parts that `work` sends, by seq."""
    context = zmq.Context()
    results = context.socket(zmq.SUB)
    results.setsockopt(zmq.SUBSCRIBE, b"result/")
    results.connect(site._absolute(site.config["results"]["bind"]))
    time.sleep(0.5)  # a subscription is not answered
    work()
    found = {}
    while len(found) < count and results.poll(10_000):
        header = decode_header(results.recv_multipart()[1])
        found[header["seq"]] = (header["outcome"], header["reason"], header["partId"])
    context.destroy(linger=0)
    return found


def open_sender(site, slots=3, slot_bytes=64 * 64):
    address = site._absolute("ipc://run/shm.sock")
    return ShmSender(address, site.config["line"], "cam1", slot_bytes=slot_bytes, slots=slots)


def test_daemon_inspects_what_lies_in_the_slots(site):
    def work():
        with open_sender(site) as camera:
            for seq in range(12):  # more than there are slots
                make = bundles.bad_pixels if seq % 3 == 0 else bundles.good_pixels
                camera.send(make(seq)[:, :, 0], "Mono8", part_id=f"A{seq}")
            while len(camera.answers) < 12:
                camera._hear(2000)
            assert {answer["status"] for answer in camera.answers} == {"accepted"}
            assert ring_path(site.config["line"], "cam1").exists()
        assert not ring_path(site.config["line"], "cam1").exists()

    found = outcomes(site, work, 12)
    assert found == {
        seq: ("REJECT", "DEFECT", f"A{seq}") if seq % 3 == 0 else ("PASS", None, f"A{seq}") for seq in range(12)
    }


def test_restarted_camera_is_a_new_stream_and_bad_slots_are_bad_frames(site):
    def work():
        for _ in range(2):
            with open_sender(site) as camera:
                camera.send(bundles.good_pixels(1)[:, :, 0], "Mono8")
                camera._under_way[0] = 9  # the slot is not to be used again
                camera._free.clear()
                camera._free.append(2)
                camera.send(np.zeros((10, 10), np.uint8), "Mono8", part_id="small")
                offset = slot_offset(2, camera._slot_bytes)
                camera._hear(2000)
                camera._hear(2000)
                SLOT.pack_into(camera._memory, offset, 77, 100)
                camera._socket.send_multipart([camera._topic, _header(camera, 2, slot=2)])
                camera._hear(2000)

    found = outcomes(site, work, 3)
    assert found[0][0] == "PASS"
    assert found[2][:2] == ("REJECT", "BAD_FRAME")


def _header(camera, seq, slot):
    from daemon.line.wire import encode_header

    return encode_header(
        {
            "v": 1, "epoch": camera.epoch, "seq": seq, "partId": None, "capturedNs": 1, "encoding": "raw",
            "shape": [10, 10], "pixelFormat": "Mono8", "slot": slot,
        }
    )  # fmt: skip


def test_slot_comes_back_when_the_daemon_cannot_read_the_header(site):
    with open_sender(site, slots=2) as camera:
        for _ in range(6):  # an empty part id is refused as BAD_HEADER, whose answer carries no seq
            camera.send(bundles.good_pixels(1)[:, :, 0], "Mono8", part_id="")
        camera.send(bundles.good_pixels(1)[:, :, 0], "Mono8", part_id="good")
        while not any(answer["status"] == "accepted" for answer in camera.answers):
            camera._hear(2000)


def test_sender_says_when_a_frame_is_too_large_and_when_nobody_answers(camera, tmp_path, monkeypatch):
    monkeypatch.setattr("adapters.shm_sender._WAIT_MS", 50)
    with ShmSender(f"ipc://{tmp_path}/nobody", "solar", camera, slot_bytes=100, slots=2) as sender:
        with pytest.raises(DataError, match="found a frame of 101 bytes, the slots have 100"):
            sender.send(np.zeros(101, np.uint8), "Mono8")
        assert [sender.send(np.zeros((10, 10), np.uint8), "Mono8") for _ in range(2)] == [0, 1]
        with pytest.raises(TimeoutError, match="all slots are under way"):
            sender.send(np.zeros((10, 10), np.uint8), "Mono8")
