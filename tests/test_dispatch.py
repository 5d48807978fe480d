"""The byte budget, on a dispatcher whose engine never begins."""

from __future__ import annotations

import numpy as np
import pytest
import yaml

from daemon.config import parse_config
from daemon.dispatch import Dispatcher, Records
from daemon.inspection.engine import Engine
from daemon.line.parts import PartBook
from daemon.line.wire import decode_frame, encode_frame
from daemon.record.journal import Journal
from daemon.record.metrics import Metrics
from daemon.records import snapshot
from tests.bundles import raw_frame


class Told(list):
    """(camera, seq, reason) of each verdict, as an announcer hears them."""

    def result(self, parts):
        pass

    def verdict(self, header, valid_ms):
        self.append((header["camera"], header["seq"], header["reason"]))


@pytest.fixture
def line(tmp_path):
    """A dispatcher with a budget of 1 MiB, and what it tells."""
    camera = {"product": "part", "mode": "every-frame", "deadline_ms": 60_000, "valid_ms": 500}
    names = ("frames", "results", "permits", "control")
    frames, results, permits, control = ({"bind": f"ipc://{name}.sock"} for name in names)
    data = {
        "version": 1, "line": "test", "queue_mb": 1, "inputs": [{"kind": "router", **frames}], "results": results,
        "permits": permits, "control": control, "cameras": dict.fromkeys(("cam1", "cam2", "cam3"), camera),
    }  # fmt: skip
    config = parse_config(yaml.safe_dump(data), "config.yaml", tmp_path)
    book, journal, told = PartBook(), Journal(tmp_path), Told()
    journal.begin(snapshot(book, "run"), 0)
    dispatcher = Dispatcher(config, "run", book, Records(journal, Metrics(), None), told)
    dispatcher.engines["part"] = Engine(None, print)
    yield dispatcher, told
    journal.close()


def send(dispatcher, camera, seq, kilobytes):
    frame = raw_frame(np.zeros((kilobytes, 1000, 1), np.uint8), camera=camera, epoch="e", seq=seq)
    dispatcher.on_frame(decode_frame(encode_frame("test", frame)), camera)


def test_frame_takes_the_place_of_the_newest_of_the_camera_that_holds_most(line):
    dispatcher, told = line
    for seq in range(6):
        send(dispatcher, "cam1", seq, 160)
    send(dispatcher, "cam2", 0, 300)
    assert told == [("cam1", 5, "OVERLOAD"), ("cam1", 4, "OVERLOAD")]


def test_frame_that_would_have_no_room_all_the_same_costs_no_other_camera_a_part(line):
    dispatcher, told = line
    for seq in range(3):
        send(dispatcher, "cam1", seq, 160)
        send(dispatcher, "cam2", seq, 160)
    send(dispatcher, "cam3", 0, 450)
    assert told == [("cam3", 0, "OVERLOAD")]
