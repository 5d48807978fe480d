"""The first hour: `inspectd init`, completion, and the likeliest mistakes, each told with what was found, what was wanted
and what to do, with the right exit code and without a traceback."""

from __future__ import annotations

import io
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from daemon import cli, needs
from daemon.config import Config, load_config, parse_config
from daemon.first_config import PLCS, Answers, first_config, section_of
from daemon.keys import make_signing_key
from daemon.record.journal import hold_alone
from tests.bundles import good_pixels, install_bundle
from tests.daemons import ROOT, Site, free_port, make_site

SHOWN = {"results.heatmap": True, "results.frame_every_ms": 500}  # what the dashboard shows, not the default
FLAGS = ("--line", "solar", "--camera", "cam7", "--product", "bracket")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, where the commands are called."""
    place = tmp_path / "line"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


# --- init


def test_options_alone_write_a_configuration_that_is_good(inspectd, folder):
    ended = inspectd("init", *FLAGS, "--plc", "modbus")
    assert (ended.code, ended.err) == (0, "")
    assert "config.yaml: written. Line solar, camera cam7, product bracket, PLC modbus" in ended.out
    assert "without asking" not in ended.out
    config = load_config(Path("config.yaml"))
    assert (config.line, list(config.cameras), config.cameras["cam7"].product) == ("solar", ["cam7"], "bracket")
    assert inspectd("check-config").code == 0
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_every_socket_is_on_loopback_and_asks_for_keys(inspectd, folder):
    inspectd("init", *FLAGS, "--plc", "none")
    config = load_config(Path("config.yaml"))
    for _, endpoint in config.endpoints():
        assert endpoint.uses_curve
        assert endpoint.bind.startswith("tcp://127.0.0.1:")
    assert config.metrics.address[0] == "127.0.0.1"
    assert not config.security.insecure
    assert config.security.keys == folder / "keys"


def test_every_key_is_written_with_its_meaning_and_default(inspectd, folder):
    inspectd("init", *FLAGS, "--plc", "none")
    text = Path("config.yaml").read_text()
    written = yaml.safe_load(text)
    for name, field in Config.model_fields.items():
        section = section_of(field)
        assert field.description in re.sub(r"\s+# ", " ", text), name
        keys = {} if section is None else section.model_fields
        own = written[name] if isinstance(written[name], dict) else {}
        entries = {"inputs": written["inputs"][0], "cameras": written["cameras"]["cam7"]}.get(name, own)
        # What is none unless somebody wants it (an imageZMQ sender's `camera`, an engine of another name) is left out.
        assert set(entries) == {key for key, told in keys.items() if told.is_required() or told.default is not None}
        for key, told in keys.items():
            if key in entries and not told.is_required() and told.default is not None:
                assert str(entries[key]) == str(SHOWN.get(f"{name}.{key}", told.default)), f"{name}.{key}"
    for line in text.splitlines():
        if re.match(r" +\S+: +\S", line) or re.match(r"  - ", line):
            assert "# " in line, line
        assert len(line) <= 120


@pytest.mark.parametrize("plc", PLCS)
def test_the_way_to_the_plc_is_written_down(inspectd, folder, plc):
    ended = inspectd("init", *FLAGS, "--plc", plc)
    assert ("keygen peer plc --role bridge --topic permit/solar" in ended.out) == (plc != "none")
    assert (f"plc {plc} --config config.yaml" in ended.out) == (plc in {"modbus", "opcua"})
    assert "docs/plc.md" in Path("config.yaml").read_text() or plc == "zmq"


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", fullmatch=True)


@settings(max_examples=100, deadline=None)
@given(line=NAMES, camera=NAMES, product=NAMES)
@example(line="null", camera="yes", product="1e3")
@example(line="0x1F", camera="2024-13-45", product="1_000")
@example(line="product", camera="mode", product="bind")
@example(line="a" * 64, camera="b" * 64, product="true")
def test_any_name_comes_back_as_it_was_given(line, camera, product):
    config = parse_config(first_config(Answers(line, camera, product, "none")), "config.yaml", Path("/srv"))
    assert (config.line, [*config.cameras], config.cameras[camera].product) == (line, [camera], product)


class Terminal(io.StringIO):
    """Somebody who types."""

    def isatty(self):
        return True


def test_four_questions_are_asked_and_an_answer_that_is_none_again(inspectd, folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", Terminal("my line\nsolar\n\nbracket\nserial\nopcua\n"))
    ended = inspectd("init")
    assert ended.code == 0
    asked = ["line called [line1]", "camera called [cam1]", "engine gets this name) [part]", "[none]"]
    places = [ended.out.index(question) for question in asked]
    assert places == sorted(places)
    assert "found 'my line', wanted 1 to 64 of" in ended.out + ended.err
    assert "Line solar, camera cam1, product bracket, PLC opcua" in ended.out


def test_only_what_no_option_says_is_asked(inspectd, folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", Terminal("bracket\n"))
    ended = inspectd("init", "--line", "solar", "--camera", "cam7", "--plc", "none")
    assert "Line solar, camera cam7, product bracket, PLC none" in ended.out
    assert "called" not in ended.out


def test_where_nobody_can_be_asked_defaults_are_taken_and_told(inspectd, folder):
    ended = inspectd("init", "--product", "bracket")
    assert ended.code == 0
    assert "--line line1 --camera cam1 --plc none" in ended.out
    assert load_config(Path("config.yaml")).cameras["cam1"].product == "bracket"


def test_a_file_that_is_there_stays_unless_it_is_given_up(inspectd, folder, monkeypatch):
    Path("config.yaml").write_text("mine")
    monkeypatch.setattr("sys.stdin", Terminal(""))  # and nothing is asked before
    ended = inspectd("init")
    assert ended.code == 64
    assert "--force" in ended.err
    assert Path("config.yaml").read_text() == "mine"
    assert inspectd("init", *FLAGS, "--plc", "none", "--force").code == 0
    assert load_config(Path("config.yaml")).line == "solar"


@pytest.mark.parametrize("file", ["config.yaml", "second/other.yaml"])
def test_what_it_says_to_run_next_leads_to_a_machine_that_the_doctor_calls_ready(inspectd, folder, file):
    Path("second").mkdir()
    said = inspectd("init", file, *FLAGS, "--plc", "zmq").out
    steps = [line.partition("#")[0].split() for line in said.partition("Next:\n")[2].splitlines()]
    text = Path(file).read_text()
    for port in set(re.findall(r"127\.0\.0\.1:(\d+)", text)):
        text = text.replace(f":{port}", f":{free_port()}")
    Path(file).write_text(text)
    done = []
    for step in steps:
        if step[1] == "build_engines.py":
            options = dict(zip(step[3::2], step[4::2], strict=True))
            assert options.pop("--good") == "FOLDER"
            install_bundle(Path(options.get("--out", "engines")), Path(options.get("--keys", "keys")), step[2])
        elif step[1] in {"keygen", "check-config", "doctor"}:
            ended = inspectd(*step[1:])
            assert ended.code == 0, ended.out + ended.err
            assert "FAIL" not in ended.out
        done.append(step[1])
    assert done == ["keygen", "keygen", "keygen", "build_engines.py", "check-config", "doctor", "run", "camera"]
    peer, config = steps[-1][steps[-1].index("--peer") + 1], steps[-1][steps[-1].index("--config") + 1]
    assert (Path(peer).exists(), config) == (True, file)


def test_a_camera_that_is_called_plc_leaves_the_bridge_a_name(inspectd, folder):
    said = inspectd("init", "--line", "solar", "--camera", "plc", "--product", "part", "--plc", "modbus").out
    assert "keygen peer plc --role camera" in said
    assert "keygen peer plc-bridge --role bridge" in said
    assert "--peer keys/plc-bridge.peer.yaml --plc HOST:502" in said


def test_the_shipped_example_and_the_schema_have_one_tongue():
    """What `init` writes of a key with a default is what config.yaml of the repository has."""
    shipped = load_config(ROOT / "config.yaml")
    text = first_config(Answers("solar", "cam1", "solar-mono", "none"))
    written = parse_config(text, "config.yaml", ROOT)
    assert written.cameras["cam1"] == shipped.cameras["cam1"]
    shown = {key.removeprefix("results."): value for key, value in SHOWN.items()}
    assert written.results == shipped.results.model_copy(update=shown)
    for name in (
        "permits",
        "control",
        "metrics",
        "security",
        "engines",
        "backend",
        "queue_mb",
        "ledger",
        "recorder",
    ):
        assert getattr(written, name) == getattr(shipped, name), name


# --- completion


@pytest.mark.parametrize(
    ("shell", "mark"),
    [("bash", "complete -o nosort -F"), ("zsh", "#compdef inspectd"), ("fish", "complete --no-files")],
)
def test_a_shell_gets_its_script(inspectd, shell, mark):
    ended = inspectd("completion", shell)
    assert ended.code == 0
    assert mark in ended.out
    assert "_INSPECTD_COMPLETE" in ended.out


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("words", "wanted"), [("inspectd comp", "completion"), ("inspectd keygen peer x --role br", "bridge")]
)
def test_bash_completes_with_the_script_that_is_installed(tmp_path, words, wanted):
    program = tmp_path / "inspectd"
    program.write_text(f"#!{sys.executable}\nfrom daemon.cli import main\nmain()\n")
    program.chmod(0o755)
    tab = f"COMP_WORDS=({words}); COMP_CWORD={len(words.split()) - 1}; _inspectd_completion inspectd; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(
        ["bash", "-c", f"source {ROOT / 'share/inspectd.bash'}; {tab}"], capture_output=True, text=True, check=False,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}, timeout=60,
    )  # fmt: skip
    assert (done.stdout.split(), done.stderr) == ([wanted], "")


# --- mistakes


@pytest.fixture(scope="module")
def shared_site(tmp_path_factory):
    site = make_site(tmp_path_factory.mktemp("mistakes"))
    site.write_config()
    return site


@pytest.fixture
def site(shared_site, tmp_path, monkeypatch):
    """A copy that a mistake may spoil, and the folder where the command is called."""
    place = tmp_path / "site"
    shutil.copytree(shared_site.folder, place, symlinks=True)
    monkeypatch.chdir(place)
    return Site(place, yaml.safe_load((place / "config.yaml").read_text()))


@dataclass(frozen=True)
class Mistake:
    spoil: object  # what somebody did; gives the command's words, and perhaps what must be held while it runs
    code: int
    told: tuple[str, ...]  # what was found, what was wanted, what to do


MISTAKES: dict[str, Mistake] = {}


def mistake(code, *told):
    def keep(spoil):
        MISTAKES[spoil.__name__] = Mistake(spoil, code, told)
        return spoil

    return keep


def changed(site, section, **values):
    site.config[section] = {**site.config.get(section, {}), **values}
    site.write_config()


@mistake(78, "config.yaml: cannot be read: No such file", "write one with: inspectd init")
def no_configuration(site):
    Path("config.yaml").unlink()
    return ["run"]


@mistake(78, "cameras.cam1.deadlin_ms: unknown key", "did you mean 'deadline_ms'?")
def a_key_misspelt(site):
    site.config["cameras"]["cam1"]["deadlin_ms"] = 5
    site.write_config()
    return ["check-config"]


@mistake(78, "cameras.cam1.deadline_ms: found '100ms'", "write a whole number, without quotes and without a unit")
def a_number_with_its_unit(site):
    site.config["cameras"]["cam1"]["deadline_ms"] = "100ms"
    site.write_config()
    return ["check-config"]


@mistake(78, "results.mask: found 'on'", "write true or false")
def a_switch_in_quotes(site):
    changed(site, "results", mask="on")
    return ["check-config"]


@mistake(78, "backend.kind: found 'gpu'", "'auto', 'cpu' or 'cuda'")
def a_word_that_is_none(site):
    changed(site, "backend", kind="gpu")
    return ["check-config"]


@mistake(78, "is not YAML: line 2, column 1", "indent with spaces")
def a_tab_in_the_configuration(site):
    Path("config.yaml").write_text("version: 1\n\tline: solar\n")
    return ["check-config"]


@mistake(78, "plain: true on tcp://0.0.0.0:5551, which is not loopback", "remove plain")
def an_open_socket(site):
    changed(site, "results", bind="tcp://0.0.0.0:5551", plain=True)
    return ["check-config"]


@mistake(78, "no current engine for 'bracket'", "build_engines.py bracket --good DIR")
def a_product_without_an_engine(site):
    site.config["cameras"]["cam1"]["product"] = "bracket"
    site.write_config()
    return ["run"]


@mistake(78, "cannot be bound: Address already in use", "another process holds it", "choose another port")
def a_port_that_is_taken(site):
    holder = socket.create_server(("127.0.0.1", int(site.config["results"]["bind"].rpartition(":")[2])))
    return ["run"], holder.close


@mistake(78, "metrics.bind: 127.0.0.1:", "cannot be bound: Address already in use", "choose another address")
def a_port_of_the_metrics_that_is_taken(site):
    holder = socket.create_server(("127.0.0.1", 0))
    changed(site, "metrics", bind=f"127.0.0.1:{holder.getsockname()[1]}")
    return ["run"], holder.close


@mistake(78, "tcp://192.0.2.1:5550: cannot be bound", "this box has no such address", "0.0.0.0 is all of them")
def an_address_of_another_box(site):
    site.config["inputs"][0]["bind"] = "tcp://192.0.2.1:5550"
    site.write_config()
    return ["run"]


@mistake(78, "run/ledger: another process holds it (pid", "is inspectd running already?", "Stop it")
def a_second_daemon(site):
    return ["run"], hold_alone(site.folder / "run/ledger")


@mistake(70, "ledger: cannot hold the ledger: ", "name another folder (ledger.dir)")
def a_file_for_the_ledgers_folder(site):
    Path("ledger").write_text("")
    changed(site, "ledger", dir="ledger")
    return ["run"]


@mistake(78, "server.yaml: is not there", "make it with: inspectd keygen server")
def no_server_key(site):
    for name in ("server.yaml", "server.public.yaml"):
        Path("keys", name).unlink()
    return ["run"]


@mistake(78, "server.yaml: has mode 0644, others can read this secret", "chmod 600")
def a_key_that_others_can_read(site):
    Path("keys/server.yaml").chmod(0o644)
    return ["run"]


@mistake(78, "manifest.sig: is missing", "a bundle is whole or worthless", "copy it again")
def an_engine_without_its_signature(site):
    Path("engines/part/1/manifest.sig").unlink()
    return ["run"]


@mistake(78, "does not sign manifest.json with a trusted key", "bring that file from the building machine")
def an_engine_of_another_builder(site):
    for name in ("signing.key", "trusted.yaml"):
        Path("keys", name).unlink()
    make_signing_key(Path("keys"))
    return ["run"]


@mistake(78, "engines/part: holds the versions of an engine, wanted one of them", "name ", "part/current")
def an_engines_folder_for_its_version(site):
    return ["score", "engines/part", "images"]


@mistake(78, "engines/other: no bundle is there", "wanted an engine", "build one with build_engines.py")
def an_engine_that_is_not_there(site):
    return ["score", "engines/other", "images"]


@mistake(65, "nowhere: is not there", "wanted an image or a folder of images", "is the path right")
def images_that_are_not_there(site):
    return ["score", "engines/part/current", "nowhere"]


@mistake(65, "empty: no image is in this folder", "wanted .bmp, .jpeg, .jpg, .png")
def an_empty_folder(site):
    Path("empty").mkdir()
    return ["score", "engines/part/current", "empty"]


@mistake(65, "a.png: found no readable image, wanted PNG, JPEG, BMP or TIFF")
def a_text_that_is_called_an_image(site):
    Path("a.png").write_text("text, not pixels, and more of it")
    return ["score", "engines/part/current", "a.png"]


@mistake(65, "labelled/test: found no such folder, wanted labelled/test/good and labelled/test/<defect> with images")
def a_folder_that_is_not_labelled(site):
    Path("labelled").mkdir()
    return ["evaluate", "engines/part/current", "labelled"]


@mistake(64, "found no --peer, and the daemon's sockets ask for keys", "wanted --peer FILE", "inspectd keygen peer")
def a_simulation_without_a_key(site):
    Path("images").mkdir()
    return ["simulate", "images"]


@mistake(64, "found camera 'cam9', wanted one of cam1 (--camera)")
def a_camera_that_is_not_configured(site):
    Path("images").mkdir()
    return ["simulate", "images", "--camera", "cam9", "--peer", "keys/line.peer.yaml"]


@mistake(64, "speaks CURVE: wanted --peer FILE", "inspectd keygen peer NAME --role bridge")
def a_bridge_without_a_key(site):
    return ["plc", "modbus", "--config", "config.yaml", "--plc", "192.0.2.1:502"]


@mistake(70, "cannot be asked", "an ipc path has at most 107 characters", "a folder with a shorter path")
def a_folder_too_deep_to_ask(site):
    changed(site, "control", bind=f"ipc://{'deep/' * 30}control.sock")
    return ["status"]


@mistake(78, "cannot be bound", "an ipc path has at most 107 characters", "a folder with a shorter path")
def a_folder_too_deep_to_run(site):
    changed(site, "control", bind=f"ipc://{'deep/' * 30}control.sock")
    return ["run"]


@mistake(78, "dashboard.yaml: cannot be read: No such file", "start from the shipped dashboard.yaml")
def a_dashboard_without_its_file(site):
    return ["dashboard"]


@mistake(64, "config.yaml: found it there already", "wanted a file that is not", "replace what is there with --force")
def a_second_init(site):
    return ["init", "--line", "solar"]


@mistake(64, "found 'my line', wanted 1 to 64 of A-Z a-z 0-9 _ . -", "--line")
def a_name_with_a_blank(site):
    return ["init", "other.yaml", "--line", "my line"]


@mistake(64, "nowhere/config.yaml: cannot be written: No such file", "name a file in a folder that is there")
def a_folder_that_is_not_there(site):
    return ["init", "nowhere/config.yaml"]


@mistake(64, "No such command 'scor'", "for help")
def a_command_misspelt(site):
    return ["scor"]


@mistake(64, "found engine 'part', wanted NAME/VERSION")
def an_engine_without_its_version(site):
    return ["activate", "part"]


@mistake(64, "engines/part: no engine was active before this one", "inspectd activate part/VERSION")
def a_rollback_to_nothing(site):
    return ["rollback", "--offline"]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_with_what_to_do(inspectd, site, name):
    wrong = MISTAKES[name]
    words = wrong.spoil(site)
    words, release = words if isinstance(words, tuple) else (words, lambda: None)
    try:
        ended = inspectd(*words)
    finally:
        release()
    assert ended.code == wrong.code, ended.err
    assert "Traceback" not in ended.err
    assert ended.out == ""
    for told in wrong.told:
        assert told in ended.err


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda good: None, ("found nothing, wanted a folder of images", "is the path right")),
        (lambda good: good.write_text(""), ("found a file, wanted a folder of images", "is the path right")),
        (lambda good: good.mkdir(), ("found 0 folders and 0 other files, wanted images (", "name the folder")),
        (lambda good: (good / "good").mkdir(parents=True), ("found 1 folders and 0 other files", "name the folder")),
    ],
    ids=["wrong path", "a file", "an empty folder", "the folder above"],
)
def test_a_build_from_no_images_says_what_it_wants(run_here, folder, make, told):
    make(Path("images"))
    code, out, err = run_here("part", "--good", "images")
    assert (code, out) == (65, "")
    for words in told:
        assert words in err
    assert "Traceback" not in err


def test_a_build_from_one_image_is_no_mistake_but_another_size_is(run_here, folder):
    """One image builds (test_few.py tells what it is worth); a size that no network has is refused before anything."""
    Path("images").mkdir()
    Path("images/0.png").write_bytes(cv2.imencode(".png", good_pixels())[1].tobytes())
    code, _, err = run_here("part", "--good", "images", "--size", "250")
    assert code == 64
    assert "found 250, wanted a multiple of 32 from 32 to 8192" in err


# --- the machine itself


@pytest.mark.parametrize("command", [["-m", "daemon", "run"], ["build_engines.py", "part", "--good", "images"]])
def test_a_python_without_the_packages_says_which_one_has_them(command):
    done = subprocess.run(
        [sys.executable, "-S", *command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (64, "")
    assert "inspectd: found no click, " in done.stderr
    assert "wanted the Python that inspectd was installed into; call .venv/bin/python" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_python_that_is_too_old_is_told(monkeypatch, capsys):
    monkeypatch.setattr("sys.version_info", (3, 9, 2, "final", 0))
    with pytest.raises(SystemExit) as ended:
        needs.demand()
    assert ended.value.code == 64
    assert "found Python 3.9.2 (" in capsys.readouterr().err


def test_a_python_that_is_too_old_makes_no_virtual_environment(tmp_path):
    for name in ("pyproject.toml", "constraints.txt", "daemon/inspection/backend/kernels/nearest_cpu.c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    shutil.copy(ROOT / "Makefile", tmp_path)
    old = tmp_path / "python3.8"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.2 && exit\nexit 1\n')
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "demo", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode != 0
    assert "python3.8 is Python 3.8.2, wanted Python 3.10 or newer: make PYTHON=python3.11" in done.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ImportError("libGL.so.1: cannot open shared object file"), ("needs no display", "opencv-python-headless")),
        (ImportError("libtbb.so.12: cannot open shared object file"), ("without a library", "install it")),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), ("pip install 'inspectd[train]'",)),
        (ModuleNotFoundError("No module named 'asyncua.ua'", name="asyncua.ua"), ("pip install 'inspectd[plc]'",)),
    ],
    ids=["no display", "a library", "the trainer", "a fieldbus"],
)
def test_what_is_not_installed_is_told_with_its_remedy(inspectd, monkeypatch, error, told):
    def fail(_):
        raise error

    monkeypatch.setattr(cli, "load_config", fail)
    ended = inspectd("check-config")
    assert ended.code == 64
    assert "Traceback" not in ended.err
    for words in (str(error), *told):
        assert words in ended.err


def test_an_import_that_is_a_fault_of_our_own_shows_its_trace(inspectd, monkeypatch):
    def fail(_):
        raise ImportError("cannot import name 'x' from 'daemon.config'", name="daemon.config")

    monkeypatch.setattr(cli, "load_config", fail)
    ended = inspectd("check-config")
    assert ended.code == 70
    assert "Traceback" in ended.err
