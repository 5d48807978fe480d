"""What systemd sees and what stops a start: READY only after everything was asked, exit codes, clear words."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import suppress

import pytest

from tests.bundles import install_bundle, make_bundle
from tests.daemons import ROOT, make_site


@pytest.fixture
def listener(tmp_path):
    """systemd's end of NOTIFY_SOCKET."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(str(tmp_path / "notify"))
        datagrams.settimeout(20)
        yield datagrams


def test_systemd_hears_ready_watchdog_and_stopping_in_this_order(tmp_path, listener):
    site = make_site(tmp_path / "site", tcp_curve=False)
    site.environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
    site.start()
    heard = ""
    while "WATCHDOG=1" not in heard:
        heard += listener.recv(4096).decode() + "\n"
    assert heard.index("READY=1") < heard.index("WATCHDOG=1")
    assert "STATUS=inspecting" in heard
    assert site.stop() == 0
    while "STOPPING=1" not in heard:
        heard += listener.recv(4096).decode() + "\n"


@pytest.mark.parametrize(
    ("spoil", "code", "told"),
    [
        (lambda site: (site.folder / "engines/part/1/bank.safetensors").write_bytes(b"x"), 78, "bank.safetensors"),
        (lambda site: (site.folder / "engines/part/1/networks.onnx").unlink(), 78, "networks.onnx"),
        (lambda site: (site.folder / "engines/part/current").unlink(), 78, "build_engines.py part"),
        (lambda site: (site.folder / "keys/server.yaml").unlink(), 78, "inspectd keygen server"),
        (lambda site: (site.folder / "keys/trusted.yaml").write_text("[]"), 78, "manifest.sig"),
        (lambda site: site.config["backend"].update(kind="cuda"), 69, "cuda"),
        (lambda site: site.config.update(deadline=3), 78, "deadline"),
        (lambda site: (site.folder / "run").write_text("a file where a folder must be"), 70, "run"),
    ],
    ids=[
        "bank changed",
        "network missing",
        "no engine",
        "no keys",
        "nobody trusted",
        "no GPU",
        "bad config",
        "no place",
    ],
)
def test_a_start_that_cannot_be_says_why_and_never_ready(tmp_path, listener, spoil, code, told):
    site = make_site(tmp_path / "site")
    spoil(site)
    site.environment = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
    site.start(wait=False)
    assert site.process is not None
    assert site.process.wait(30) == code, site.log
    assert told in site.log
    listener.settimeout(0.1)
    heard = ""
    with suppress(TimeoutError):
        while True:
            heard += listener.recv(4096).decode()
    assert "READY=1" not in heard


def test_a_bundle_of_two_products_serves_both_with_one_engine(tmp_path):
    site = make_site(tmp_path / "site", tcp_curve=False)
    engines = site.folder / "engines"
    make_bundle(engines / "part" / "2", site.folder / "keys", products=("part", "other"), version="2")
    (engines / "part/current").unlink()
    (engines / "part/current").symlink_to("2")
    site.start()
    assert set(site.status()["engines"]) == {"part", "other"}
    assert site.stop() == 0


def test_a_second_daemon_on_the_same_books_is_turned_away(tmp_path):
    site = make_site(tmp_path / "site", tcp_curve=False)
    site.start()
    second = site.run_command("run")
    assert second.returncode == 78
    assert f"pid {site.process.pid}" in second.stderr
    assert site.status()["state"] == "RUNNING"
    assert site.stop() == 0


@pytest.mark.parametrize("room", ["daemon.inspection.backend.cpu", "daemon.doctor", "trainer.features"])
def test_openvino_reports_nothing_to_its_makers(tmp_path, room):
    """By itself it does, at each import: over the network, from a forked process, with files in the home folder."""
    code = f"import sys, {room}, openvino; sys.exit(sys.modules['openvino.tools.ovc'] is not None)"
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []


def test_an_engine_whose_golden_frames_do_not_reproduce_does_not_start(tmp_path):
    site = make_site(tmp_path / "site")

    def lie(fields):
        fields["golden"]["frames"][0]["score"] += 10.0

    install_bundle(site.folder / "engines", site.folder / "keys", "part", version="2", change=lie)
    (site.folder / "engines/part/current").unlink()
    (site.folder / "engines/part/current").symlink_to("2")
    site.start(wait=False)
    assert site.process is not None
    assert site.process.wait(30) == 78
    assert "does not" in site.log
    assert "reproduce the engine" in site.log
