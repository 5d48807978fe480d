"""The documents keep their word: senders run as printed, commands and metrics exist, keys are told."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from daemon.keys import make_peer
from daemon.line.wire import PIXEL_FORMATS
from daemon.record.metrics import Metrics
from daemon.types import Reason, Refusal
from tests.daemons import ROOT, make_site, tcp

WIRE = (ROOT / "docs/wire.md").read_text()


def code_block(language: str) -> str:
    (block,) = re.findall(rf"```{language}\n(.*?)```", WIRE, re.DOTALL)
    return block


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A daemon as the page assumes it: line solar, camera cam1, a key file of that name."""
    site = make_site(tmp_path_factory.mktemp("docs"))
    site.config["line"] = "solar"
    site.config["cameras"]["cam2"] = site.config["cameras"]["cam1"]
    make_peer(site.folder / "keys", "cam1", ["camera"], ["frame/solar/cam1"])
    site.start()
    yield site
    assert site.stop() == 0


def adjusted(site, code: str) -> str:
    assert "tcp://127.0.0.1:5550" in code
    return code.replace("tcp://127.0.0.1:5550", site.config["inputs"][0]["bind"])


def test_the_python_sender_runs_as_printed(site):
    (site.folder / "sender.py").write_text(adjusted(site, code_block("python")))
    done = subprocess.run(
        [sys.executable, "sender.py"], cwd=site.folder, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.split() == ["accepted"] * 10, done.stderr


@pytest.fixture(scope="session")
def node_modules():
    """npm's zeromq, installed once into a folder that git ignores."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("Node.js and npm are not installed")
    place = ROOT / "node_modules"
    if not (place / "zeromq").is_dir():
        command = [
            "npm",
            "install",
            "--silent",
            "--no-save",
            "--no-audit",
            "--no-fund",
            "--prefix",
            str(ROOT),
            "zeromq@6",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            pytest.skip(f"npm cannot install zeromq: {done.stderr.strip()[:200]}")
    return place


def test_the_javascript_sender_runs_as_printed(site, node_modules):
    (site.folder / "sender.mjs").write_text(adjusted(site, code_block("javascript")))
    (site.folder / "node_modules").symlink_to(node_modules)
    done = subprocess.run(
        ["node", "sender.mjs"], cwd=site.folder, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.split() == ["accepted"] * 10, done.stderr


@pytest.fixture(scope="module")
def sender_in_c(tmp_path_factory):
    """examples/sender.c, built by the command in its head."""
    source = (ROOT / "examples/sender.c").read_text()
    command = re.search(r"^ \*   (cc .*) -o sender (examples/sender\.c .*)$", source, re.MULTILINE)
    built = tmp_path_factory.mktemp("c") / "sender"
    try:
        subprocess.run(["cc", "-E", "-include", "zmq.h", "-x", "c", "/dev/null"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("cc or libzmq's headers are not installed: apt install gcc libc6-dev libzmq3-dev")
    full = [*command[1].split(), "-Werror", "-o", built, *command[2].split()]
    subprocess.run(full, cwd=ROOT, check=True)
    return built


def run_c(site, built, address, line="solar"):
    command = [built, "keys/cam1.peer.yaml", address, line, "cam1"]
    return subprocess.run(command, cwd=site.folder, capture_output=True, text=True, timeout=60, check=False)


def test_the_c_sender_is_accepted_with_its_key(site, sender_in_c):
    done = run_c(site, sender_in_c, site.config["inputs"][0]["bind"])
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(answer["seq"], answer["status"]) for answer in answers] == [(seq, "accepted") for seq in range(10)]


def test_the_c_sender_says_when_it_is_refused_or_alone(site, sender_in_c):
    refused = run_c(site, sender_in_c, site.config["inputs"][0]["bind"], line="moon")
    assert (refused.returncode, refused.stdout.count("FORBIDDEN")) == (1, 10)
    alone = run_c(site, sender_in_c, tcp())
    assert alone.returncode == 1
    assert "no daemon takes the frame" in alone.stderr


def test_both_senders_are_short():
    for language in ("python", "javascript"):
        lines = [line for line in code_block(language).splitlines() if line.strip()]
        assert len(lines) <= 22, f"{language}: {len(lines)} lines"


def test_the_wire_page_names_every_reason_refusal_and_pixel_format():
    for word in (*Reason, *Refusal):
        assert word.value in WIRE
    for pixel_format in PIXEL_FORMATS:
        assert f"`{pixel_format}`" in WIRE


def test_every_key_of_a_real_result_is_told(site):
    from tests.bundles import bad_pixels, raw_frame

    # cam1's stream belongs to the senders above.
    with site.line("cam2") as line:
        part = line.send(raw_frame(bad_pixels(), camera="cam2", epoch=line.epoch, seq=0))
        for _ in range(500):
            line.pump(20)
            if part.results and part.permits and part.answer:
                break
        for header in (part.results[0], part.results[0]["regions"][0], part.results[0]["timings"], part.answer):
            for key in header:
                assert re.search(rf"\b{key}\b", WIRE), f"docs/wire.md does not tell {key}"
        for key in part.permits[0]:
            assert re.search(rf"\b{key}\b", WIRE), f"docs/wire.md does not tell {key}"


def test_the_readme_names_only_commands_that_exist():
    from daemon.cli import cli

    known = set(cli.list_commands(None))
    told = set(re.findall(r"\.venv/bin/inspectd ([a-z-]+)", (ROOT / "README.md").read_text()))
    assert told
    assert told <= known


def test_the_metrics_page_and_the_metrics_are_one():
    metrics = {family.name for family in Metrics().registry.collect()}
    told = set(re.findall(r"`inspectd_(\w+?)(?:_total|\{|`)", (ROOT / "docs/metrics.md").read_text()))
    assert {name.removeprefix("inspectd_") for name in metrics} == told


def test_versions_agree():
    from daemon import __version__

    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_links_in_the_documents_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (ROOT / page).parent.joinpath(Path(target)).exists(), f"{page} links to {target}"
