"""The unit, its drop-ins and snippets: what systemd says of them, what the daemon says under them, where make puts them."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from daemon.errors import ConfigError
from daemon.keys import load_keyring, load_peer_file, make_peer, make_server_key
from daemon.service import _DRAIN_S
from tests.bundles import bad_pixels, raw_frame
from tests.daemons import ROOT, free_port, make_site
from tests.unit_filter import allowed_calls, settings

UNIT = ROOT / "systemd/inspectd.service"
DROPINS = ROOT / "systemd/dropins"
VARIANTS = [None, "nvidia", "jetson"]

pytestmark = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def run(*command, **options):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, check=False, **options)


def files_of(variant):
    return [UNIT] if variant is None else [UNIT, DROPINS / f"{variant}.conf"]


def last(variant, key):
    return settings(files_of(variant))[key][-1]


@pytest.fixture
def placed(tmp_path):
    """The unit as installed, with a drop-in; its command is one that exists here, as `verify` looks for it."""

    def place(variant):
        unit = tmp_path / "inspectd.service"
        unit.write_text(UNIT.read_text().replace("/opt/inspectd/bin/inspectd", shutil.which("true")))
        if variant:
            (tmp_path / "inspectd.service.d").mkdir()
            shutil.copy(DROPINS / f"{variant}.conf", tmp_path / "inspectd.service.d")
        return unit

    return place


def told_of(unit):
    done = run("systemd-analyze", "security", "--offline=true", "--no-pager", unit)
    assert done.returncode == 0, done.stderr
    return done.stdout


def exposure(unit):
    (level,) = re.findall(r"Overall exposure level for inspectd\.service: (\d+\.\d+)", told_of(unit))
    return float(level)


@pytest.mark.parametrize("variant", VARIANTS)
def test_systemd_finds_nothing_to_say_about_the_unit(placed, variant):
    done = run("systemd-analyze", "verify", "--man=no", placed(variant))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(("variant", "most"), [(None, 2.0), ("nvidia", 2.5), ("jetson", 2.5)])
def test_the_unit_exposes_little(placed, variant, most):
    unit = placed(variant)
    assert exposure(unit) <= most
    # The drop-in was read: with it, devices can be seen.
    assert ("✗ PrivateDevices=" in told_of(unit)) == bool(variant)


SIDES = {"inspectd-plc@.service": "inspectd-plc@modbus.service"}  # the processes beside the daemon, as started


@pytest.mark.parametrize(("template", "name"), SIDES.items())
def test_the_units_beside_it_expose_as_little(tmp_path, template, name):
    unit = tmp_path / name
    unit.write_text((UNIT.parent / template).read_text().replace("/opt/inspectd/bin/inspectd", shutil.which("true")))
    done = run("systemd-analyze", "verify", "--man=no", unit)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (level,) = re.findall(r"Overall exposure level for \S+: (\d+\.\d+)", told_of(unit))
    assert float(level) <= 2.0


def test_the_plc_bridge_serves_under_its_units_rules(tmp_path):
    site = make_site(tmp_path / "site")
    site.write_config()
    at = f"127.0.0.1:{free_port()}"
    command = [sys.executable, ROOT / "tests/unit_filter.py", UNIT.parent / "inspectd-plc@.service"]
    command += [
        *site.program,
        "plc",
        "modbus",
        "--config",
        "config.yaml",
        "--peer",
        "keys/line.peer.yaml",
        "--serve",
        at,
    ]
    with subprocess.Popen(
        list(map(str, command)), cwd=site.folder, env=site.variables(), stderr=subprocess.PIPE, text=True
    ) as bridge:
        assert "plc server listens" in next(line for line in bridge.stderr if "listens" in line or "Error" in line)
        bridge.terminate()
        assert bridge.wait(20) == 0


def test_the_unit_keeps_what_the_promises_rest_on():
    assert last(None, "Type") == "notify"
    assert int(last(None, "WatchdogSec")) > 0
    assert last(None, "Restart") == "on-failure"
    assert last(None, "RestartPreventExitStatus") == "78"
    assert last(None, "StartLimitIntervalSec") == "0"
    assert int(last(None, "TimeoutStopSec")) > _DRAIN_S + 10  # and the writer's end
    assert last(None, "User") == last(None, "Group") == "inspectd"


@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_a_gpu_opens_its_own_devices_and_no_others(variant):
    assert last(variant, "DevicePolicy") == "closed"
    for allowed in settings(files_of(variant))["DeviceAllow"]:
        node, rights = allowed.split()
        assert rights == "rw"
        assert "nv" in node or node in ("/dev/host1x-fence", "/dev/dri/renderD128")
        assert "*" not in node or node.startswith("char-")  # systemd takes no wildcard in a path


# --- the daemon under the unit's rules, which a kernel filter enforces here as systemd would


@pytest.fixture
def under(tmp_path):
    """A site whose daemon starts under the unit with these changes to its text."""

    def make(*changes):
        text = UNIT.read_text()
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        unit = tmp_path / "changed.service"
        unit.write_text(text)
        site = make_site(tmp_path / "site")
        site.program = [sys.executable, str(ROOT / "tests/unit_filter.py"), str(unit), *site.program]
        return site

    return make


def test_the_daemon_judges_parts_under_the_units_rules(under):
    site = under()
    site.start()
    filters = Path(f"/proc/{site.process.pid}/status").read_text()
    assert re.search(r"^Seccomp:\s+2$", filters, re.MULTILINE)
    with site.line() as line:
        part = line.send(raw_frame(bad_pixels(), epoch=line.epoch, seq=0))
        for _ in range(500):
            line.pump(20)
            if part.results and part.permits and part.answer:
                break
    assert part.results[0]["reason"] == "DEFECT"
    assert site.stop() == 0


@pytest.mark.parametrize(
    ("change", "code", "told"),
    [
        ((" AF_NETLINK", ""), -6, "Address family not supported"),
        (("sched_setscheduler ", ""), -6, "Operation not permitted"),
        (("MemoryDenyWriteExecute=no", "MemoryDenyWriteExecute=yes"), 69, "OpenVINO cannot prepare"),
    ],
    ids=["AF_NETLINK", "sched_setscheduler", "writable code"],
)
def test_what_the_unit_relaxes_is_needed(under, change, code, told):
    """Where one of these passes without, the unit's line and its comment can go."""
    site = under(change)
    site.start(wait=False)
    assert site.process.wait(60) == code, site.log
    assert told in site.log


def test_the_rules_refuse_what_they_should():
    calls = allowed_calls(settings([UNIT])["SystemCallFilter"])
    assert calls >= {"read", "futex", "sched_setaffinity"}
    assert not calls & {
        "mount",
        "chown",
        "setuid",
        "ptrace",
        "reboot",
        "init_module",
        "setpriority",
        "bpf",
        "@resources",
    }


# --- the server's key as a credential


@pytest.fixture
def keys(tmp_path, monkeypatch):
    """A key folder, and a credentials folder with another server key, as systemd hands it over; peers know that one."""
    make_server_key(tmp_path / "keys")
    make_server_key(tmp_path / "credentials")
    (tmp_path / "credentials/server.public.yaml").replace(tmp_path / "keys/server.public.yaml")
    credential = tmp_path / "credentials/server.yaml"
    credential.chmod(0o440)  # 0400 and an access list for the service's user
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credential.parent))
    return tmp_path / "keys", credential


def test_the_credential_comes_before_the_key_folder(keys, monkeypatch):
    folder, credential = keys
    given = load_keyring(folder).server
    assert given.secretKey in credential.read_text()
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    (folder / "server.public.yaml").unlink()
    assert load_keyring(folder).server.secretKey in (folder / "server.yaml").read_text()
    assert load_keyring(folder).server != given


def test_a_credential_that_peers_do_not_know_is_refused(keys):
    folder, _ = keys
    (folder / "server.public.yaml").unlink()
    make_server_key(folder)  # what peers are given now is the folder's
    with pytest.raises(ConfigError, match=r"server.public.yaml: has .*, which peers were given; the daemon's own is"):
        load_keyring(folder)


def test_peers_can_be_made_where_the_servers_key_is_a_credential(keys):
    folder, credential = keys
    (folder / "server.yaml").unlink()
    peer = load_peer_file(make_peer(folder, "cam1", ["camera"], ["*"]))
    assert peer.serverKey in credential.read_text()
    assert load_keyring(folder).peers[0].publicKey == peer.publicKey
    with pytest.raises(ConfigError, match="the pair is kept elsewhere; delete this file to make another"):
        make_server_key(folder)
    assert not (folder / "server.yaml").exists()


def test_without_a_credential_of_that_name_the_key_folder_counts(keys):
    folder, credential = keys
    credential.rename(credential.with_name("other.yaml"))
    (folder / "server.public.yaml").unlink()
    assert load_keyring(folder).server.secretKey in (folder / "server.yaml").read_text()


def test_a_credential_that_is_no_key_is_not_passed_over(keys):
    folder, credential = keys
    credential.chmod(0o600)
    credential.write_text("publicKey: short")
    with pytest.raises(ConfigError, match=r"credentials/server\.yaml: publicKey"):
        load_keyring(folder)


# --- make install


@pytest.fixture
def installed(tmp_path):
    """The files part of the installation, in a folder, with an account `inspectd` there that is whoever tests."""
    root = tmp_path / "root"
    done = run("make", "install-files", f"DESTDIR={root}", cwd=ROOT, umask=0o077)  # root's may be as strict
    assert done.returncode == 0, done.stderr
    return root


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def make_account(root):
    (root / "etc").mkdir()
    (root / "etc/passwd").write_text(f"inspectd:x:{os.getuid()}:{os.getgid()}::/var/lib/inspectd:/usr/sbin/nologin\n")
    (root / "etc/group").write_text(f"inspectd:x:{os.getgid()}:\n")


def make_folders(root):
    make_account(root)
    done = run("systemd-tmpfiles", f"--root={root}", "--create", root / "usr/lib/tmpfiles.d/inspectd.conf")
    assert done.returncode == 0, done.stderr


def test_every_path_that_the_unit_names_is_installed_or_made(installed):
    make_folders(installed)
    named = set()
    for place in (
        *(installed / "usr/lib/systemd/system").iterdir(),
        *(installed / "opt/inspectd/share/dropins").iterdir(),
    ):
        named |= {path.rstrip(".") for path in re.findall(r"(?:/opt|/var/lib)/inspectd[\w./-]*", place.read_text())}
    assert {"/opt/inspectd/bin/inspectd", "/var/lib/inspectd/config.yaml", "/var/lib/inspectd/keys"} <= named
    # A dynamic user's folder is made when the unit starts.
    named = {path for path in named if not path.startswith("/var/lib/inspectd-plc")}
    missing = {path for path in named if not (installed / path.lstrip("/")).exists()}
    assert missing == {"/opt/inspectd/bin/inspectd"}  # which pip makes, from this line:
    assert '\n[project.scripts]\ninspectd = "daemon.cli:main"\n' in (ROOT / "pyproject.toml").read_text()


def test_only_the_service_reads_its_keys(installed):
    make_folders(installed)
    state = installed / "var/lib/inspectd"
    assert {name: mode(state / name) for name in (".", "keys", "engines", "run")} == {
        ".": 0o750, "keys": 0o700, "engines": 0o750, "run": 0o750
    }  # fmt: skip


def test_the_account_has_no_shell_and_lives_where_the_service_does(tmp_path, installed):
    snippet = installed / "usr/lib/sysusers.d/inspectd.conf"
    told = run("systemd-sysusers", f"--root={tmp_path}", "--dry-run", snippet)
    assert told.returncode == 0, told.stderr
    assert "inspectd" in told.stdout + told.stderr
    (tmp_path / "etc").mkdir()
    done = run("systemd-sysusers", f"--root={tmp_path}", snippet)
    assert done.returncode == 0, done.stderr
    name, _, uid, _, _, home, shell = (tmp_path / "etc/passwd").read_text().splitlines()[-1].split(":")
    assert (name, home, Path(shell).name) == ("inspectd", "/var/lib/inspectd", "nologin")
    assert 0 < int(uid) < 1000


def test_installed_files_are_readable_by_the_service_and_writable_by_root_alone(installed):
    files = [path for path in installed.rglob("*") if path.is_file()]
    assert len(files) == 19
    assert {mode(path) for path in files} == {0o644}
    folders = {path for path in installed.rglob("*") if path.is_dir()}
    shown = installed / "var/lib/inspectd-dashboard"
    assert {mode(path) for path in folders - {installed / "var/lib/inspectd", shown}} == {0o755}
    assert mode(shown) == 0o700
    assert mode(installed / "var/lib/inspectd") == 0o750


def test_a_second_installation_keeps_the_config(installed):
    config = installed / "var/lib/inspectd/config.yaml"
    config.write_text("mine")
    (installed / "usr/lib/systemd/system/inspectd.service").write_text("old")
    assert run("make", "install-files", f"DESTDIR={installed}", cwd=ROOT).returncode == 0
    assert config.read_text() == "mine"
    assert (installed / "usr/lib/systemd/system/inspectd.service").read_text() == UNIT.read_text()


def test_another_prefix_is_what_the_unit_and_the_drop_ins_say(tmp_path):
    root = tmp_path / "root"
    assert run("make", "install-files", f"DESTDIR={root}", "PREFIX=/srv/inspectd", cwd=ROOT).returncode == 0
    assert "ExecStart=/srv/inspectd/bin/inspectd run" in (root / "usr/lib/systemd/system/inspectd.service").read_text()
    assert not [path for path in root.rglob("*") if path.is_file() and "/opt/inspectd" in path.read_text()]


def test_a_prefix_that_others_share_is_refused(tmp_path):
    for target in ("install-files", "uninstall"):
        done = run("make", target, f"DESTDIR={tmp_path}", "PREFIX=/usr", cwd=ROOT)
        assert done.returncode != 0
        assert "wanted a folder of its own" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_uninstalling_leaves_only_what_is_yours(installed):
    assert run("make", "uninstall", f"DESTDIR={installed}", cwd=ROOT).returncode == 0
    left = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    assert left == {"var/lib/inspectd/config.yaml", "var/lib/inspectd-dashboard/dashboard.yaml"}


def test_a_packager_gets_no_account_and_nothing_started(tmp_path):
    def steps(*variables):
        done = run("make", "--dry-run", "install", *variables, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return {word for word in ("systemd-sysusers", "systemd-tmpfiles", "systemctl") if f"{word} " in done.stdout}

    assert steps(f"DESTDIR={tmp_path}") == set()
    assert steps() == {"systemd-sysusers", "systemd-tmpfiles", "systemctl"}


# --- docs/install.md; its commands are run by tests/test_pages.py

PAGE = (ROOT / "docs/install.md").read_text()


@pytest.mark.parametrize(
    ("variant", "told"),
    [(None, "says {} for the unit"), ("nvidia", "{} with the NVIDIA drop-in"), ("jetson", "{} with the Jetson's")],
)
def test_the_page_says_what_systemd_says(placed, variant, told):
    assert told.format(exposure(placed(variant))) in PAGE


def test_the_page_says_what_the_unit_says():
    (credential,) = settings([UNIT])["LoadCredential"]
    assert f"/etc/credstore/{credential.partition(':')[2]}" in PAGE
    assert credential.partition(":")[0] == "server.yaml"
    for relaxed in re.findall(r"^(MemoryDenyWriteExecute|RemoveIPC|UMask)=(\S+)", UNIT.read_text(), re.MULTILINE):
        assert f"`{'='.join(relaxed)}`" in PAGE


def test_the_page_knows_only_targets_and_files_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", PAGE)) == {"install", "install-files", "uninstall"} <= targets
    for name in re.findall(r"share/dropins/(\w+)\.conf", PAGE):
        assert (DROPINS / f"{name}.conf").exists()
