"""The unit of a camera: what systemd says of it, that a camera works under its rules, and what reaches it from outside."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import cv2
import pytest

from daemon.errors import ConfigError
from daemon.keys import load_peer_file, make_peer, make_server_key
from tests.bundles import bad_pixels
from tests.daemons import ROOT, make_site
from tests.lines import wait_for
from tests.unit_filter import settings

UNIT = ROOT / "systemd/inspectd-camera@.service"
PAGE = (ROOT / "docs/cameras.md").read_text()

pytestmark = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def run(*command):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def placed(tmp_path):
    """One camera's unit as systemd sees it; its command is one that exists here, as `verify` looks for it."""
    unit = tmp_path / "inspectd-camera@cam1.service"
    unit.write_text(UNIT.read_text().replace("/opt/inspectd/bin/inspectd", shutil.which("true")))
    return unit


def test_systemd_finds_nothing_to_say_about_the_unit(placed):
    done = run("systemd-analyze", "verify", "--man=no", placed)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_unit_exposes_little_and_the_page_says_how_little(placed):
    done = run("systemd-analyze", "security", "--offline=true", "--no-pager", placed)
    (level,) = re.findall(r"Overall exposure level for inspectd-camera@cam1\.service: (\d+\.\d+)", done.stdout)
    assert float(level) <= 2.0
    assert f"`systemd-analyze security` says {level}" in PAGE


def test_the_unit_restarts_what_may_come_right_and_leaves_what_cannot():
    rules = settings([UNIT])
    assert rules["Restart"] == ["on-failure"]
    assert rules["RestartPreventExitStatus"] == ["64 78"]
    assert rules["StartLimitIntervalSec"] == ["0"]
    assert {allowed.split()[0] for allowed in rules["DeviceAllow"]} == {"char-video4linux", "char-usb_device"}


def test_a_camera_sends_under_the_units_rules(tmp_path):
    site = make_site(tmp_path)
    (tmp_path / "pictures").mkdir()
    cv2.imwrite(str(tmp_path / "pictures/A17.png"), bad_pixels())
    site.start()
    environment = {"INSPECTD_SOURCE": "pictures", "INSPECTD_LINE": "test", "INSPECTD_DAEMON": site.addresses.frames}
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    shutil.copy(tmp_path / "keys/line.peer.yaml", credentials / "peer.yaml")
    (credentials / "peer.yaml").chmod(0o440)
    started = settings([UNIT])["ExecStart"][0].replace("%i", "cam1").replace("%d", str(credentials))
    command = [sys.executable, "-m", "daemon", *started.replace("$OPTIONS", "--once").split()[1:]]
    with site.line(peer="line") as line:
        done = subprocess.run(
            [sys.executable, ROOT / "tests/unit_filter.py", UNIT, *command],
            env={**site.variables(), **environment, "CREDENTIALS_DIRECTORY": str(credentials)},
            cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        wait_for(line, lambda: line.foreign)
        assert (line.foreign[0]["reason"], line.foreign[0]["partId"]) == ("DEFECT", "A17")
    assert site.stop() == 0


def test_a_key_file_is_taken_from_systemd_with_its_mode_and_from_nobody_else(tmp_path, monkeypatch):
    make_server_key(tmp_path)
    path = make_peer(tmp_path, "cam1", ["camera"], ["*"])
    path.chmod(0o440)  # 0400 and an access list for the service's user
    with pytest.raises(ConfigError, match="others can read this secret"):
        load_peer_file(path)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "elsewhere"))
    with pytest.raises(ConfigError, match="others can read this secret"):
        load_peer_file(path)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert load_peer_file(path).publicKey


def test_the_page_says_what_the_unit_reads():
    rules = settings([UNIT])
    (settings_file,) = rules["EnvironmentFile"]
    (credential,) = rules["LoadCredential"]
    assert settings_file.replace("%i", "cam1") in PAGE
    assert credential.partition(":")[2].replace("%i", "cam1") in PAGE
    for variable in ("INSPECTD_SOURCE", "INSPECTD_LINE", "INSPECTD_DAEMON", "OPTIONS"):
        assert f"{variable}=" in PAGE
