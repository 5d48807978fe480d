"""`inspectd camera` with cameras that give pictures by themselves: a GigE Vision one of Aravis and an RTSP server.

Both are real programs of Debian's on loopback; what they are and where they come from: docs/cameras.md, .ci/run. A V4L2
device cannot be made without a kernel module: that path is only tried as far as its errors (tests/test_camera.py).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq

from adapters import genicam
from adapters.genicam import GenICam
from adapters.sources import SourceError
from daemon.errors import DeviceError
from tests.daemons import ROOT, free_port, make_site
from tests.lines import wait_for
from tests.test_camera import camera_at

FAKE_CAMERA = shutil.which("arv-fake-gv-camera-0.8")
DEBIANS_PYTHON = "/usr/bin/python3"
PATIENCE_S = 30.0  # never waited for where things are as they should be


def can_import(python, *versions):
    """Whether this Python has these modules of GObject introspection."""
    if not Path(python).exists():
        return False
    text = "import gi\n" + "\n".join(f"gi.require_version({name!r}, {version!r})" for name, version in versions)
    return subprocess.run([python, "-c", text], capture_output=True, check=False).returncode == 0


HAS_ARAVIS = FAKE_CAMERA is not None and can_import(DEBIANS_PYTHON, ("Aravis", "0.8"))
HAS_RTSP = can_import(DEBIANS_PYTHON, ("Gst", "1.0"), ("GstRtspServer", "1.0"))
needs_aravis = pytest.mark.skipif(
    not HAS_ARAVIS, reason="apt install aravis-tools gir1.2-aravis-0.8 python3-gi (on Debian's version of Python)"
)
needs_rtsp = pytest.mark.skipif(
    not HAS_RTSP, reason="apt install gir1.2-gst-rtsp-server-1.0 gstreamer1.0-plugins-good python3-gi"
)


@contextmanager
def running(*command, until):
    """A program that goes on until the end, from when it has told (or done) what is waited for."""
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        until(process)
        yield process
    finally:
        process.kill()
        process.wait(10)


def rtsp_server(port, *frames):
    def listens(process):
        assert process.stdout.readline() == "listening\n"

    return running(DEBIANS_PYTHON, "tests/rtsp_server.py", port, *frames, until=listens)


def gige_camera():
    """On loopback, at GigE Vision's own port: there is one at a time."""

    # Only looked for: one that is opened again within its own period goes on sending to where it did before.
    def is_found(process):
        aravis, _ = genicam.load_aravis()
        wait_until(lambda: aravis.update_device_list() or aravis.get_n_devices() or process.poll() is not None)
        assert process.poll() is None

    return running(FAKE_CAMERA, "-i", "127.0.0.1", "-s", "T01", until=is_found)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    site = make_site(tmp_path_factory.mktemp("live") / "site")
    site.start()
    yield site
    assert site.stop() == 0, site.log


def wait_until(condition):
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.02)


# --- RTSP


@needs_rtsp
def test_rtsp_stream_is_judged_and_found_again_when_its_camera_comes_back(site):
    port = free_port()
    with camera_at(site, f"rtsp://viewer:geheim@127.0.0.1:{port}/live", "--gray") as camera, site.line() as line:
        wait_until(lambda: "cannot be opened" in camera.said)
        for _ in range(2):
            with rtsp_server(port):
                before = len(line.foreign)
                wait_for(line, lambda before=before: len(line.foreign) >= before + 10, PATIENCE_S)
            lost = camera.said.count("source lost")
            wait_until(lambda lost=lost: camera.said.count("source lost") > lost or "no frames any more" in camera.said)
        code, counts = camera.stop()
        assert code == 0, camera.said
        assert {header["isSimulated"] for header in line.foreign} == {False}
        assert len({header["epoch"] for header in line.foreign}) == 1
        assert {header["reason"] for header in line.foreign} <= {"DEFECT", "MISSING", "OVERLOAD", None}
        judged = [header for header in line.foreign if header["reason"] != "MISSING"]
    assert counts["accepted"] >= len(judged) >= 10
    assert "geheim" not in camera.said


@needs_rtsp
def test_rtsp_stream_that_ends_is_opened_again(site):
    port = free_port()
    with rtsp_server(port, 20), camera_at(site, f"rtsp://127.0.0.1:{port}/live") as camera, site.line() as line:
        wait_for(line, lambda: len(line.foreign) >= 30, PATIENCE_S)
        assert "gives no frames any more" in camera.said
        assert camera.stop()[0] == 0


# --- GenICam


@needs_aravis
def test_genicam_camera_is_judged_and_found_again_when_it_comes_back(site):
    options = ("--features", "Width=64 Height=64")
    with site.line() as line, camera_at(site, "genicam:Aravis-Fake-T01", *options) as camera:
        wait_until(lambda: "source lost" in camera.said)
        with gige_camera():
            wait_for(line, lambda: len(line.foreign) >= 10, PATIENCE_S)
            lost = camera.said.count("source lost")
        wait_until(lambda: camera.said.count("source lost") > lost)
        with gige_camera():
            before = len(line.foreign)
            wait_for(line, lambda: len(line.foreign) >= before + 10, PATIENCE_S)
            code, counts = camera.stop()  # without it Aravis looks for it once more, for seconds
        assert code == 0, camera.said
        captured = [header["capturedNs"] for header in line.foreign if header["reason"] != "MISSING"]
        assert captured == sorted(captured)
        assert 0 <= time.time_ns() - captured[-1] < 120e9
        assert len({header["epoch"] for header in line.foreign}) == 1
    assert counts["accepted"] >= 10


@needs_aravis
def test_genicam_camera_takes_a_picture_for_each_request(site, tmp_path):
    address = f"ipc://{tmp_path}/trigger.sock"
    context = zmq.Context()
    plc = context.socket(zmq.REQ)
    plc.rcvtimeo = 20_000
    plc.connect(address)
    with gige_camera(), site.line() as line, camera_at(
        site, "genicam:", "--features", "Width=64 Height=64", "--trigger", address
    ) as camera:  # fmt: skip
        wait_until(lambda: "daemon connected" in camera.said)
        answers = []
        for part_id in (b"A1", b"A2", b"A3"):
            plc.send(part_id)
            answers.append(json.loads(plc.recv()))
        wait_for(line, lambda: len(line.foreign) >= 3, PATIENCE_S)
        assert [answer.get("seq") for answer in answers] == [0, 1, 2]
        assert [(header["seq"], header["partId"]) for header in line.foreign] == [(0, "A1"), (1, "A2"), (2, "A3")]
        assert [header["capturedNs"] for header in line.foreign] == [answer["capturedNs"] for answer in answers]
        assert camera.stop()[0] == 0
    context.destroy(linger=0)


@needs_aravis
@pytest.mark.parametrize(
    ("pixel_format", "expected"),
    [("Mono8", ("Mono8", (32, 48), "uint8")), ("Mono16", ("Mono16", (32, 48), "uint16")),
     ("BayerRG8", ("BayerRG8", (32, 48), "uint8")), ("RGB8", ("RGB8", (32, 48, 3), "uint8"))],
)  # fmt: skip
def test_genicam_pixels_come_in_the_format_of_the_camera(pixel_format, expected):
    with gige_camera():
        source = GenICam("", f"Width=48 Height=32 PixelFormat={pixel_format}", is_triggered=False)
        source.open()
        try:
            until = time.monotonic() + PATIENCE_S
            while (captured := source.read()) is None:
                assert time.monotonic() < until
        finally:
            source.close()
    assert (captured.pixel_format, captured.pixels.shape, str(captured.pixels.dtype)) == expected
    assert captured.pixels.max() > captured.pixels.min()


@needs_aravis
def test_genicam_camera_that_is_not_there_is_told_with_those_that_are():
    with gige_camera(), pytest.raises(SourceError, match=r"genicam:nobody: .*found Aravis-Fake-T01"):
        GenICam("nobody", "", is_triggered=False).open()


@needs_aravis
def test_features_that_a_camera_has_not_are_told():
    with gige_camera(), pytest.raises(SourceError, match="NoSuchFeature"):
        GenICam("", "NoSuchFeature=1", is_triggered=False).open()


def test_missing_aravis_is_told_with_the_packages_that_bring_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gi", None)
    monkeypatch.setattr(genicam, "_DEBIAN_GI", tmp_path / "none")
    with pytest.raises(DeviceError, match=r"apt install gir1\.2-aravis-0\.8 python3-gi aravis-tools"):
        genicam.load_aravis()


# --- under the rules of its unit


@needs_aravis
@needs_rtsp
@pytest.mark.parametrize("kind", ["genicam", "rtsp"])
def test_pictures_come_under_the_units_rules(tmp_path, kind):
    port = free_port()
    source = "genicam:" if kind == "genicam" else f"rtsp://127.0.0.1:{port}/live"
    unit = ROOT / "systemd/inspectd-camera@.service"
    command = [sys.executable, ROOT / "tests/unit_filter.py", unit, sys.executable, "-m", "daemon", "camera", source]
    command += ["--camera", "cam1", "--line", "test", "--daemon", f"ipc://{tmp_path}/nobody", "--count", "10"]
    command += ["--features", "Width=64 Height=64"] if kind == "genicam" else []
    with gige_camera() if kind == "genicam" else rtsp_server(port):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["lost"] == 10  # taken, and nobody there to have them
