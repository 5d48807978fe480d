"""The command `inspectd`: what it prints, what it ends with, and that a fault is one clear text and no traceback."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

from daemon import __version__, cli
from daemon.keys import load_keyring, load_trusted
from tests.bundles import bad_pixels, good_pixels
from tests.commands import Ended, Inspectd, is_clear
from tests.daemons import ROOT, Site, make_site

COMMANDS = (
    "run", "init", "completion", "check-config", "doctor", "keygen", "score", "ledger", "status", "pause", "resume", "drain",
    "reset",
)  # fmt: skip
GUESTS = ("evaluate", "simulate", "bench", "camera")  # of the trainer and the adapters


@pytest.fixture(scope="module")
def shared_site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Keys, an engine and a configuration, made once; nobody changes it."""
    site = make_site(tmp_path_factory.mktemp("site"), tcp_curve=True)
    (site.folder / "keys").chmod(0o700)
    site.write_config()
    return site


@pytest.fixture
def site(shared_site: Site, tmp_path: Path) -> Site:
    """A copy that a test may break."""
    folder = tmp_path / "site"
    shutil.copytree(shared_site.folder, folder, symlinks=True)
    return Site(folder, yaml.safe_load((folder / "config.yaml").read_text()))


def changed(site: Site, section: str, **values: Any) -> Path:
    site.config[section] = {**site.config.get(section, {}), **values}
    return site.write_config()


def save(path: Path, pixels: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix, pixels)[1].tobytes())
    return path


# --- the command as a whole


def test_help_lists_every_command(inspectd: Inspectd) -> None:
    ended = inspectd("--help")
    listed = {line.split()[0] for line in ended.out.partition("Commands:")[2].splitlines() if line.strip()}
    assert ended.code == 0
    assert listed >= {*COMMANDS, *GUESTS}
    assert inspectd("-h").out == ended.out


@pytest.mark.parametrize("command", [*COMMANDS, *GUESTS])
def test_every_command_explains_itself(inspectd: Inspectd, command: str) -> None:
    ended = inspectd(command, "--help")
    assert ended.code == 0
    assert ended.out.startswith("Usage: ")
    assert len(ended.out.partition("Options:")[0].strip().splitlines()) > 1


def test_version_is_told(inspectd: Inspectd) -> None:
    assert inspectd("--version").out == f"inspectd, version {__version__}\n"


def test_module_is_the_command(shared_site: Site) -> None:
    command = [sys.executable, "-m", "daemon", "check-config", "--config", str(shared_site.folder / "config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0
    assert "good. Line test, cameras: cam1 (part, every-frame)" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nonsense"], "No such command"),
        (["--nonsense"], "No such option"),
        (["run", "--nonsense"], "No such option"),
        (["score", "bundle"], "Missing argument"),
        (["keygen", "peer", "name"], "Missing option '--role'"),
        (["keygen", "peer", "name", "--role", "king"], "'king' is not one of"),
        (["ledger", "--last", "0"], "0 is not in the range"),
        (["score", "bundle", "x.png", "--precision", "f8"], "'f8' is not one of"),
        (["--log-level", "loud", "run"], "'loud' is not one of"),
    ],
)
def test_wrong_usage_ends_with_64(inspectd: Inspectd, arguments: list[str], told: str) -> None:
    ended = inspectd(*arguments)
    assert ended.code == 64
    assert told in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("arguments", [[], ["keygen"]])
def test_command_without_a_word_shows_its_help_and_ends_with_64(inspectd: Inspectd, arguments: list[str]) -> None:
    ended = inspectd(*arguments)
    assert ended.code == 64
    assert "Usage: " in ended.out + ended.err


def test_fault_of_our_own_ends_with_70(inspectd: Inspectd, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Path) -> None:
        raise RuntimeError("a fault of our own")

    monkeypatch.setattr(cli, "make_signing_key", broken)
    ended = inspectd("keygen", "signing")
    assert ended.code == 70
    assert "a fault of our own" in ended.err


@pytest.mark.parametrize("command", ["status", "pause", "resume", "drain"])
def test_daemon_that_does_not_answer_is_told(
    inspectd: Inspectd, site: Site, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from daemon.line import control

    real = control.ask
    monkeypatch.setattr(control, "ask", lambda address, word, **who: real(address, word, 20, **who))
    (site.folder / "run").mkdir(exist_ok=True)
    ended = inspectd(command, "--config", site.folder / "config.yaml")
    assert ended.code == 70
    assert is_clear(ended)
    assert "is `inspectd run` running" in ended.err


# --- check-config


def test_good_configuration_is_called_good(inspectd: Inspectd, shared_site: Site) -> None:
    ended = inspectd("check-config", "--config", shared_site.folder / "config.yaml")
    assert ended.code == 0
    assert "cam1 (part, every-frame)" in ended.out


def test_every_problem_of_a_configuration_is_told_at_once(inspectd: Inspectd, site: Site) -> None:
    site.config["queue_mb"] = 0
    site.config["colour"] = "red"
    del site.config["line"]
    site.config["cameras"]["cam1"]["dead_line_ms"] = 5
    ended = inspectd("check-config", "--config", site.write_config())
    assert ended.code == 78
    assert is_clear(ended)
    assert len(ended.err.splitlines()) == 4
    for told in ("queue_mb", "colour: unknown key", "line: is missing", "did you mean 'deadline_ms'"):
        assert told in ended.err


@pytest.mark.parametrize("text", ["", "line: [", "- 1", "\0"])
def test_text_that_is_no_configuration_ends_with_78(inspectd: Inspectd, tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    ended = inspectd("check-config", "--config", tmp_path / "config.yaml")
    assert ended.code == 78
    assert is_clear(ended)


@pytest.mark.parametrize("command", ["check-config", "run", "ledger", "status"])
def test_configuration_that_is_not_there_ends_with_78(inspectd: Inspectd, tmp_path: Path, command: str) -> None:
    ended = inspectd(command, "--config", tmp_path / "none.yaml")
    assert ended.code == 78
    assert is_clear(ended)
    assert "none.yaml: cannot be read: No such file" in ended.err


# --- keygen


def test_signing_key_is_secret_and_its_public_half_is_trusted(inspectd: Inspectd, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    ended = inspectd("keygen", "signing", "--keys", keys)
    assert ended.code == 0
    assert stat.S_IMODE((keys / "signing.key").stat().st_mode) == 0o600
    assert stat.S_IMODE(keys.stat().st_mode) == 0o700
    assert len(load_trusted(keys / "trusted.yaml")) == 1
    before = (keys / "signing.key").read_bytes()
    assert inspectd("keygen", "signing", "--keys", keys).code == 0
    assert (keys / "signing.key").read_bytes() == before
    assert len(load_trusted(keys / "trusted.yaml")) == 1


def test_peer_makes_no_second_server_key_where_the_first_is_a_credential(inspectd: Inspectd, tmp_path: Path) -> None:
    """Nor in a folder from before its public half was kept."""
    keys = tmp_path / "keys"
    assert inspectd("keygen", "peer", "cam1", "--role", "camera", "--keys", keys).code == 0
    (keys / "server.yaml").unlink()
    (keys / "server.public.yaml").unlink()
    ended = inspectd("keygen", "peer", "cam2", "--role", "camera", "--keys", keys)
    assert ended.code == 78
    assert "neither half of the server's key" in ended.err
    assert not (keys / "server.yaml").exists()


def test_server_key_is_secret_and_made_once(inspectd: Inspectd, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    ended = inspectd("keygen", "server", "--keys", keys)
    assert ended.code == 0
    assert stat.S_IMODE((keys / "server.yaml").stat().st_mode) == 0o600
    assert stat.S_IMODE(keys.stat().st_mode) == 0o700
    server = load_keyring(keys).server
    assert server.publicKey in ended.out
    assert server.secretKey not in ended.out + ended.err
    assert inspectd("keygen", "server", "--keys", keys).out == ended.out
    assert load_keyring(keys).server == server


def test_peer_is_listed_with_its_roles_and_topics(inspectd: Inspectd, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    roles = ["--role", "camera", "--role", "subscriber"]
    ended = inspectd(
        "keygen", "peer", "cam1", *roles, "--topic", "frame/a/cam1", "--topic", "result/a/*", "--keys", keys
    )
    assert ended.code == 0
    (peer,) = load_keyring(keys).peers
    assert (peer.name, peer.roles, peer.topics) == ("cam1", ["camera", "subscriber"], ["frame/a/cam1", "result/a/*"])
    assert {stat.S_IMODE((keys / name).stat().st_mode) for name in ("cam1.peer.yaml", "server.yaml")} == {0o600}
    assert "secretKey" not in (keys / "peers.yaml").read_text()


def test_second_peer_of_the_same_name_is_refused_and_changes_nothing(inspectd: Inspectd, tmp_path: Path) -> None:
    command = ("keygen", "peer", "cam1", "--role", "camera", "--keys", tmp_path / "keys")
    assert inspectd(*command).code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "keys").iterdir()}
    ended = inspectd(*command)
    assert ended.code == 78
    assert is_clear(ended)
    assert "peer 'cam1' is there already" in ended.err
    assert {path.name: path.read_bytes() for path in (tmp_path / "keys").iterdir()} == before


def test_peer_whose_entry_was_taken_out_can_be_made_anew_or_is_told_why_not(inspectd: Inspectd, tmp_path: Path) -> None:
    """As the refusal of the second peer says; its old key file may still lie there."""
    keys = tmp_path / "keys"
    command = ("keygen", "peer", "cam1", "--role", "camera", "--keys", keys)
    assert inspectd(*command).code == 0
    (keys / "peers.yaml").write_text("[]")
    ended = inspectd(*command)
    assert ended.code == 0 or (ended.code == 78 and "cam1.peer.yaml" in ended.err and is_clear(ended))


@pytest.mark.parametrize("name", ["../cam1", "", "a/b", "-cam", "x" * 65, "cam 1"])
def test_peer_with_a_name_that_is_no_name_is_refused_and_leaves_no_file(
    inspectd: Inspectd, tmp_path: Path, name: str
) -> None:
    ended = inspectd("keygen", "peer", "--role", "camera", "--keys", tmp_path / "keys", "--", name)
    assert ended.code == 78
    assert is_clear(ended)
    assert list(tmp_path.rglob("*.peer.yaml")) == []


@pytest.mark.parametrize("command", [("signing",), ("server",), ("peer", "cam1", "--role", "camera")])
def test_key_folder_that_cannot_be_made_is_told_without_traceback(
    inspectd: Inspectd, tmp_path: Path, command: tuple[str, ...]
) -> None:
    (tmp_path / "file").write_text("")
    ended = inspectd("keygen", *command, "--keys", tmp_path / "file" / "keys")
    assert ended.code in {64, 70, 78}
    assert is_clear(ended)


def test_signing_key_that_is_damaged_is_told_without_traceback(inspectd: Inspectd, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    inspectd("keygen", "signing", "--keys", keys)
    (keys / "signing.key").write_text("no key")
    ended = inspectd("keygen", "signing", "--keys", keys)
    assert ended.code == 78
    assert is_clear(ended)


@pytest.mark.parametrize("name", ["server.yaml", "signing.key"])
def test_secret_that_others_can_read_is_refused(inspectd: Inspectd, site: Site, name: str) -> None:
    (site.folder / "keys" / name).chmod(0o644)
    ended = inspectd("keygen", "server" if name == "server.yaml" else "signing", "--keys", site.folder / "keys")
    assert ended.code == 78
    assert "chmod 600" in ended.err


# --- run, as far as it gets


def test_backend_that_is_not_there_ends_with_69(inspectd: Inspectd, site: Site) -> None:
    ended = inspectd("run", "--config", changed(site, "backend", kind="cuda"))
    assert ended.code == 69
    assert "holds no plan for a GPU" in ended.err
    assert "Traceback" not in ended.err


def test_engine_that_was_changed_ends_with_78(inspectd: Inspectd, site: Site) -> None:
    bank = site.folder / "engines" / "part" / "1" / "bank.safetensors"
    bank.write_bytes(bank.read_bytes()[:-1] + b"x")
    ended = inspectd("run", "--config", site.folder / "config.yaml")
    assert ended.code == 78
    assert "bank.safetensors: its content is not what was signed" in ended.err
    assert "Traceback" not in ended.err


def test_daemon_without_server_keys_ends_with_78(inspectd: Inspectd, site: Site) -> None:
    (site.folder / "keys" / "server.yaml").unlink()
    ended = inspectd("run", "--config", site.folder / "config.yaml")
    assert ended.code == 78
    assert "inspectd keygen server" in ended.err


# --- doctor


def findings(ended: Ended, state: str) -> list[str]:
    return [line for line in ended.out.splitlines() if line.startswith(state)]


def test_doctor_finds_nothing_wrong_with_a_good_site(inspectd: Inspectd, site: Site) -> None:
    ended = inspectd("doctor", "--config", site.folder / "config.yaml")
    assert findings(ended, "FAIL") == []
    assert ended.code == 0
    assert any("engine part: version 1, signature and files good" in line for line in findings(ended, "ok"))
    assert sum("is free" in line for line in findings(ended, "ok")) == 3


def spoil_engine(site: Site) -> None:
    (site.folder / "engines" / "part" / "1" / "networks.onnx").write_bytes(b"other")


def spoil_signature(site: Site) -> None:
    (site.folder / "engines" / "part" / "1" / "manifest.sig").unlink()


def spoil_server_key(site: Site) -> None:
    (site.folder / "keys" / "server.yaml").chmod(0o644)


def spoil_peers(site: Site) -> None:
    (site.folder / "keys" / "peers.yaml").write_text("- {name: x}")


def spoil_config(site: Site) -> None:
    (site.folder / "config.yaml").write_text("version: 2")


def ask_for_cuda(site: Site) -> None:
    changed(site, "backend", kind="cuda")


def ask_for_unknown_product(site: Site) -> None:
    site.config["cameras"]["cam2"] = {"product": "other", "deadline_ms": 100, "valid_ms": 100}
    site.write_config()


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (spoil_engine, "networks.onnx"),
        (spoil_signature, "manifest.sig"),
        (spoil_server_key, "chmod 600"),
        (spoil_peers, "peers.yaml"),
        (spoil_config, "version"),
        (ask_for_cuda, "cuda"),
        (ask_for_unknown_product, "no current engine for 'other'"),
    ],
)
def test_doctor_fails_where_the_daemon_would_not_start(
    inspectd: Inspectd, site: Site, spoil: Callable[[Site], None], told: str
) -> None:
    spoil(site)
    ended = inspectd("doctor", "--config", site.folder / "config.yaml")
    assert ended.code == 78
    assert any(told in line for line in findings(ended, "FAIL")), ended.out
    assert "Traceback" not in ended.err


def test_doctor_asks_everything_also_when_the_keys_are_bad(inspectd: Inspectd, site: Site) -> None:
    (site.folder / "keys" / "server.yaml").unlink()
    (site.folder / "keys" / "server.public.yaml").unlink()
    ended = inspectd("doctor", "--config", site.folder / "config.yaml")
    assert ended.code == 78
    assert any("engine part" in line for line in findings(ended, "ok"))
    assert any("ledger:" in line for line in findings(ended, "ok"))


def test_doctor_says_that_a_server_key_which_is_elsewhere_must_come_as_a_credential(
    inspectd: Inspectd, site: Site
) -> None:
    (site.folder / "keys" / "server.yaml").unlink()
    ended = inspectd("doctor", "--config", site.folder / "config.yaml")
    assert ended.code == 0, ended.out
    assert any("as the credential server.yaml" in line for line in findings(ended, "WARN"))


def test_doctor_asks_for_no_server_key_where_no_socket_needs_one(inspectd: Inspectd, site: Site) -> None:
    for number, name in enumerate(("results", "permits")):
        site.config[name] = {"bind": f"ipc://run/{number}.sock"}
    site.config["inputs"] = [{"kind": "router", "bind": "ipc://run/in.sock"}]
    (site.folder / "keys" / "server.yaml").unlink()
    ended = inspectd("doctor", "--config", site.write_config())
    assert findings(ended, "FAIL") == []
    assert ended.code == 0


def test_doctor_changes_nothing(inspectd: Inspectd, site: Site) -> None:
    before = {path: path.read_bytes() for path in site.folder.rglob("*") if path.is_file()}
    inspectd("doctor", "--config", site.folder / "config.yaml")
    assert {path: path.read_bytes() for path in site.folder.rglob("*") if path.is_file()} == before


# --- score


def score(inspectd: Inspectd, site: Site, *arguments: object) -> Ended:
    trusted = site.folder / "keys" / "trusted.yaml"
    return inspectd("score", site.folder / "engines/part/current", *arguments, "--trusted", trusted, "--threads", "1")


def test_score_prints_one_object_an_image_and_ends_with_0_whatever_the_outcome(
    inspectd: Inspectd, shared_site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "good" / "a.png", good_pixels(5))
    save(tmp_path / "bad" / "b.png", bad_pixels(5))
    monkeypatch.chdir(tmp_path)
    ended = score(inspectd, shared_site, "good/a.png", "bad")
    assert ended.code == 0
    good, bad = (json.loads(line) for line in ended.out.splitlines())
    assert set(good) == {"path", "outcome", "score", "limit", "pValue"}
    assert [(row["path"], row["outcome"]) for row in (good, bad)] == [("good/a.png", "PASS"), ("bad/b.png", "REJECT")]
    assert good["score"] < good["limit"] == bad["limit"] <= bad["score"]
    assert 0 < bad["pValue"] <= good["pValue"] <= 1


@pytest.mark.parametrize(("height", "width"), [(64, 64), (50, 131), (300, 20)])
def test_map_has_the_size_of_its_image(
    inspectd: Inspectd, shared_site: Site, tmp_path: Path, height: int, width: int
) -> None:
    image = save(tmp_path / "scratch" / "part 1.png", bad_pixels(1, (height, width)))
    ended = score(inspectd, shared_site, image, "--maps", tmp_path / "maps")
    assert ended.code == 0
    (written,) = (tmp_path / "maps").rglob("*.npy")
    assert written == tmp_path / "maps" / "scratch" / "part 1.npy"
    values = np.load(written, allow_pickle=False)
    assert (values.dtype, values.shape) == (np.float32, (height, width))
    y, x = np.unravel_index(np.argmax(values), values.shape)
    assert height / 4 <= y <= height * 3 / 4
    assert width / 4 <= x <= width * 3 / 4


def test_maps_of_equal_names_lie_in_the_folders_of_their_images(
    inspectd: Inspectd, shared_site: Site, tmp_path: Path
) -> None:
    images = [save(tmp_path / folder / "0.png", good_pixels(1)) for folder in ("x", "y")]
    assert score(inspectd, shared_site, *images, "--maps", tmp_path / "maps").code == 0
    names = sorted(path.relative_to(tmp_path / "maps").as_posix() for path in (tmp_path / "maps").rglob("*.npy"))
    assert names == ["x/0.npy", "y/0.npy"]


def test_color_and_16_bit_images_of_any_kind_are_scored(inspectd: Inspectd, shared_site: Site, tmp_path: Path) -> None:
    gray = good_pixels(1)
    save(tmp_path / "in" / "a.png", np.repeat(gray, 3, 2))
    save(tmp_path / "in" / "b.tiff", gray.astype(np.uint16) * 257)
    save(tmp_path / "in" / "c.JPG", gray)
    save(tmp_path / "in" / "d.png", np.dstack([gray, gray, gray, gray]))
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    ended = score(inspectd, shared_site, tmp_path / "in")
    assert ended.code == 0
    rows = [json.loads(line) for line in ended.out.splitlines()]
    assert [Path(row["path"]).name for row in rows] == ["a.png", "b.tiff", "c.JPG", "d.png"]
    assert [row["outcome"] for row in rows] == ["PASS"] * 4


def test_unknown_product_ends_with_78_and_tells_the_known(
    inspectd: Inspectd, shared_site: Site, tmp_path: Path
) -> None:
    ended = score(inspectd, shared_site, save(tmp_path / "a.png", good_pixels()), "--product", "other")
    assert ended.code == 78
    assert is_clear(ended)
    assert "found product 'other', wanted one of part" in ended.err


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: None, "is not there"),
        (lambda path: path.mkdir(), "no image is in this folder"),
        (lambda path: path.write_bytes(b""), "a.png"),
        (lambda path: path.write_bytes(b"text, not pixels"), "a.png"),
        (lambda path: path.write_bytes(cv2.imencode(".png", good_pixels())[1].tobytes()[:40]), "a.png"),
        (
            lambda path: path.write_bytes(cv2.imencode(".tiff", good_pixels().astype(np.float32))[1].tobytes()),
            "float32",
        ),
    ],
)
def test_image_that_cannot_be_read_ends_with_65(
    inspectd: Inspectd, shared_site: Site, tmp_path: Path, make: Callable[[Path], object], told: str
) -> None:
    make(tmp_path / "a.png")
    ended = score(inspectd, shared_site, tmp_path / "a.png")
    assert ended.code == 65
    assert "inspectd: " in ended.err
    assert told in ended.err
    assert "Traceback" not in ended.err
    assert ended.out == ""


def test_maps_that_cannot_be_written_are_told_without_traceback(
    inspectd: Inspectd, shared_site: Site, tmp_path: Path
) -> None:
    image = save(tmp_path / "a.png", good_pixels())
    ended = score(inspectd, shared_site, image, "--maps", image)
    assert ended.code in {64, 65, 70}
    assert "inspectd: " in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("what", ["bundle", "trusted"])
def test_engine_or_keys_that_are_not_there_end_with_78(
    inspectd: Inspectd, shared_site: Site, tmp_path: Path, what: str
) -> None:
    bundle = tmp_path / "none" if what == "bundle" else shared_site.folder / "engines/part/current"
    trusted = tmp_path / "none" if what == "trusted" else shared_site.folder / "keys/trusted.yaml"
    ended = inspectd("score", bundle, save(tmp_path / "a.png", good_pixels()), "--trusted", trusted)
    assert ended.code == 78
    assert is_clear(ended)


def test_engine_of_an_unknown_builder_ends_with_78(inspectd: Inspectd, shared_site: Site, tmp_path: Path) -> None:
    inspectd("keygen", "signing", "--keys", tmp_path / "keys")
    image = save(tmp_path / "a.png", good_pixels())
    bundle = shared_site.folder / "engines/part/current"
    ended = inspectd("score", bundle, image, "--trusted", tmp_path / "keys/trusted.yaml")
    assert ended.code == 78
    assert "trusted" in ended.err
