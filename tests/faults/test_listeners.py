"""Listeners that do not listen: the daemon's memory stays bounded, and whoever listens hears everything."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import zmq

from bench.swaps import resident_mb
from daemon.line.sockets import connect
from daemon.line.wire import encode_header
from tests.bundles import Pixels
from tests.daemons import Site, make_site
from tests.lines import mutate, send, settle, stream, wait_for

PARTS, MOST_GROWTH_MB = 600, 60
WAITING = "_RESULTS_WAITING = 256"


def noise(seed: int) -> Pixels:
    """A defect whose picture in the result cannot be made small: some 100 kB as JPEG."""
    pixels = np.random.default_rng(seed).integers(0, 256, (400, 400, 1), np.uint8)
    pixels[150:250, 150:250] = 255
    return pixels


@pytest.fixture
def deaf() -> Iterator[zmq.Context[Any]]:
    """Sockets that take in one message and a few kilobytes."""
    context: zmq.Context[Any] = zmq.Context()
    context.setsockopt(zmq.RCVHWM, 1)
    context.setsockopt(zmq.RCVBUF, 4096)
    yield context
    context.destroy(linger=0)


def growth_beside(deaf: zmq.Context[Any], site: Site) -> float:
    """Megabytes by which the daemon grows while a subscriber and a bridge that never read are there.

    Over ipc, where no heartbeat cuts them off after some seconds.
    """
    site.config["recorder"] = None
    site.start()
    assert site.process is not None
    with site.line() as line:
        subscriber = connect(deaf, zmq.SUB, site.addresses.results, None, immediate=True)
        bridge = connect(deaf, zmq.DEALER, site.addresses.permits, None, immediate=True)
        stream(line, range(20), rate=50)
        settle(line)
        before_mb = resident_mb(site.process.pid)
        subscriber.subscribe("")
        assert subscriber.poll(5000)
        bridge.send_multipart([b"permit/test", encode_header({"type": "HELLO", "nonce": "deaf"})])
        assert bridge.poll(5000)
        pictures = [noise(seed) for seed in range(8)]
        for seq in range(20, 20 + PARTS):
            send(line, seq, pictures[seq % 8])
            line.pump(2)
            wait_for(line, lambda: sum(not part.results for part in line.parts.values()) < 8)
            bridge.send_multipart([b"permit/test", encode_header({"type": "PING", "nonce": f"deaf-{seq}"})])
        settle(line)
        grown_mb = resident_mb(site.process.pid) - before_mb
        assert line.lease.is_fresh(time.monotonic_ns())
        assert {part.results[0]["reason"] for seq, part in line.parts.items() if seq >= 20} == {"DEFECT"}
    assert site.stop() == 0
    return grown_mb


def test_subscriber_and_bridge_that_never_read_cost_a_bounded_amount_of_memory_and_nobody_else_anything(deaf, tmp_path):
    grown_mb = growth_beside(deaf, make_site(tmp_path, tcp_curve=False))
    assert grown_mb < MOST_GROWTH_MB


def test_daemon_that_keeps_everything_for_a_deaf_subscriber_is_caught(deaf, tmp_path):
    site = make_site(tmp_path, tcp_curve=False)
    mutate(site, "line/ports.py", WAITING, "_RESULTS_WAITING = 0  # no limit")
    grown_mb = growth_beside(deaf, site)
    assert grown_mb > MOST_GROWTH_MB, f"{grown_mb} MB"
