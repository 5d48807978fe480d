"""The dashboard as a service: what systemd says of its unit, that it serves under the unit's rules, what is installed."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from daemon.config import load_config
from tests.daemons import ROOT, make_site
from tests.dashboards import Shown, set_up
from tests.unit_filter import allowed_calls, settings

UNIT = ROOT / "systemd/inspectd-dashboard.service"
PAGE = (ROOT / "docs/dashboard.md").read_text()

pytestmark = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def run(*command, **options):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, check=False, **options)


@pytest.fixture
def unit(tmp_path):
    """As installed; its command is one that exists here, as `verify` looks for it."""
    path = tmp_path / UNIT.name
    path.write_text(UNIT.read_text().replace("/opt/inspectd/bin/inspectd", shutil.which("true")))
    return path


@pytest.fixture
def installed(tmp_path):
    root = tmp_path / "root"
    done = run("make", "install-files", f"DESTDIR={root}", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return root


def test_systemd_finds_nothing_to_say_about_the_unit(unit):
    done = run("systemd-analyze", "verify", "--man=no", unit)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_unit_exposes_little_and_the_page_says_how_little(unit):
    told = run("systemd-analyze", "security", "--offline=true", "--no-pager", unit).stdout
    (level,) = re.findall(r"Overall exposure level for inspectd-dashboard\.service: (\d+\.\d+)", told)
    assert float(level) <= 2.0
    assert f"says {level}." in PAGE


def test_the_dashboard_comes_after_the_line_and_never_in_its_way():
    known = settings([UNIT])
    assert int(known["CPUWeight"][-1]) < int(settings([ROOT / "systemd/inspectd.service"])["CPUWeight"][-1])
    assert {"CPUWeight=20", "Nice=10"} <= set(re.findall(r"`(\w+=\d+)`", PAGE))
    assert known["MemoryMax"] == ["1G"]
    assert known["MemoryDenyWriteExecute"] == ["yes"]
    assert not allowed_calls(known["SystemCallFilter"]) & {"mount", "ptrace", "setuid", "sched_setaffinity", "mbind"}


def test_the_dashboard_serves_under_the_units_rules(tmp_path):
    site = make_site(tmp_path / "site")
    shown = Shown(site, set_up(site))
    site.start()
    shown.start(sys.executable, str(ROOT / "tests/unit_filter.py"), str(UNIT), sys.executable)
    filters = Path(f"/proc/{shown.process.pid}/status").read_text()
    assert re.search(r"^Seccomp:\s+2$", filters, re.MULTILINE)
    assert shown.stop() == 0
    assert "ended" not in shown.log
    assert site.stop() == 0


def test_it_starts_with_what_is_installed(installed):
    folder = installed / "var/lib/inspectd-dashboard"
    shipped = yaml.safe_load((folder / "dashboard.yaml").read_text())
    assert shipped["daemon"] == "/var/lib/inspectd/config.yaml"
    assert shipped["peer"] == "dashboard.peer.yaml"
    assert load_config(installed / shipped["daemon"].lstrip("/")).results.bind
    text = (installed / "usr/lib/systemd/system/inspectd-dashboard.service").read_text()
    assert "ExecStart=/opt/inspectd/bin/inspectd dashboard --config /var/lib/inspectd-dashboard/dashboard.yaml" in text
    assert (installed / "opt/inspectd/share/doc/dashboard.md").read_text() == PAGE


def test_a_second_installation_keeps_the_file(installed):
    file = installed / "var/lib/inspectd-dashboard/dashboard.yaml"
    file.write_text("mine")
    assert run("make", "install-files", f"DESTDIR={installed}", cwd=ROOT).returncode == 0
    assert file.read_text() == "mine"


def test_the_account_reads_what_the_group_reads_and_has_no_shell(tmp_path, installed):
    (tmp_path / "etc").mkdir()
    for name in ("inspectd", "inspectd-dashboard"):
        done = run("systemd-sysusers", f"--root={tmp_path}", installed / f"usr/lib/sysusers.d/{name}.conf")
        assert done.returncode == 0, done.stderr
    users = [line.split(":") for line in (tmp_path / "etc/passwd").read_text().splitlines()]
    (mine,) = [fields for fields in users if fields[0] == "inspectd-dashboard"]
    assert Path(mine[6]).name == "nologin"
    groups = dict(line.split(":")[::3] for line in (tmp_path / "etc/group").read_text().splitlines())
    assert groups["inspectd"] == "inspectd-dashboard"


def test_its_folder_is_its_own(installed):
    (installed / "etc").mkdir(exist_ok=True)
    me = f"{os.getuid()}:{os.getgid()}"
    (installed / "etc/passwd").write_text(f"inspectd-dashboard:x:{me}::/:/usr/sbin/nologin\n")
    (installed / "etc/group").write_text(f"inspectd-dashboard:x:{os.getgid()}:\n")
    snippet = installed / "usr/lib/tmpfiles.d/inspectd-dashboard.conf"
    assert run("systemd-tmpfiles", f"--root={installed}", "--create", snippet).returncode == 0
    assert stat.S_IMODE((installed / "var/lib/inspectd-dashboard").stat().st_mode) == 0o700


def test_the_page_names_only_commands_and_targets_that_exist():
    from daemon.cli import cli

    assert set(re.findall(r"\bin/inspectd ([a-z-]+)", PAGE)) <= set(cli.list_commands(None))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", PAGE)) <= targets
