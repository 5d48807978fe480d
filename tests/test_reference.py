"""What is made from the code is what the code makes, and leaves nothing out: reference, manual page, completion."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess

import click
import pytest

import build_engines
from adapters.dashboard.settings import Settings
from adapters.plc import REASON_CODES
from bench.commands import manual, walk
from bench.reference import COMPLETION, MANUAL, PAGE, made, reference
from daemon import errors
from daemon.cli import cli
from daemon.config import Config
from daemon.first_config import section_of
from daemon.record.metrics import Metrics
from daemon.types import Reason, Refusal
from daemon.words import DENIALS, EXIT_CODES, REASONS, REFUSALS
from examples import grafana_dashboard
from tests.daemons import ROOT


def test_every_file_is_what_the_code_makes():
    stale = [name for name, wanted in made().items() if (ROOT / name).read_text() != wanted]
    assert stale == [], "python -m bench.reference"
    assert grafana_dashboard.TARGET.read_text() == grafana_dashboard.text(), "python -m examples.grafana_dashboard"


def test_every_option_says_what_it_means():
    for told in (*walk(cli, "inspectd"), *walk(build_engines.main, "build_engines.py")):
        assert told.paragraphs, told.name
        for option, meaning in told.options:
            assert re.sub(r"\[.*\]$", "", meaning).strip(), f"{told.name} {option}"


def test_every_command_and_option_is_in_the_reference_and_in_the_manual():
    page, roff = (ROOT / PAGE).read_text(), (ROOT / MANUAL).read_text().replace("\\-", "-")
    names = [told.name for told in walk(cli, "inspectd")]
    assert {"inspectd run", "inspectd keygen peer", "inspectd plc opcua", "inspectd init"} <= set(names)
    for told in walk(cli, "inspectd"):
        assert f"### {told.name}\n" in page
        for option, _ in told.options:
            assert option.replace("|", "\\|") in page
            assert f".B {option}" in roff


@pytest.mark.parametrize("model", [Config, Settings])
def test_every_key_is_in_the_reference_with_its_meaning(model):
    page = (ROOT / PAGE).read_text()

    def look(kind, prefix):
        for name, field in kind.model_fields.items():
            assert field.description, name
            rows = re.findall(rf"^\| `{prefix}{name}` \| .* \|$", page, re.MULTILINE)
            assert any(field.description.replace("<", "&lt;") in row for row in rows), f"{prefix}{name}"
            section = section_of(field)
            if section is not None:
                look(section, rf"{prefix}{name}(?:\[\]|\.<name>)?\.")

    look(model, "")


def test_every_metric_is_in_the_reference_with_its_labels():
    page = (ROOT / PAGE).read_text()
    assert "| `inspectd_verdicts_total` | counter | camera, outcome, reason |" in page
    for family in Metrics().registry.collect():
        assert re.search(rf"^\| `{family.name}(_total)?` \| {family.type} \|", page, re.MULTILINE), family.name


def test_no_word_is_without_its_meaning():
    assert set(REASONS) == set(Reason)
    assert set(REFUSALS) == set(Refusal)
    assert {reason.value for reason in REASONS} <= set(REASON_CODES)
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.InspectError)]
    assert {kind.exit_code for kind in kinds} <= set(EXIT_CODES)
    page = (ROOT / PAGE).read_text()
    for word in (*(reason.value for reason in Reason), *(refusal.value for refusal in Refusal), *DENIALS):
        assert f"| `{word}` |" in page


def test_every_denial_that_the_code_counts_has_its_meaning():
    """They are plain texts there: the first argument of `_denied`, or a value that comes to it."""
    counted = set()
    for path in (ROOT / "daemon/line").glob("*.py"):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)) if "denied" in text else ():
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                counted |= set(re.findall(r"^[A-Z]+_[A-Z]+(?:_[A-Z]+)?$", node.value))
    counted -= {reason.value for reason in (*Reason, *Refusal)}
    assert {"UNKNOWN_KEY", "NO_KEY", "FOREIGN_TOPIC"} <= counted
    assert counted == set(DENIALS)


def test_a_page_that_is_stale_is_found_out(monkeypatch):
    """The check itself can fail: a command that is there for a moment is missed."""

    @click.command("passing")
    def passing():
        """Be here for a moment."""

    cli.add_command(passing)
    try:
        assert "### inspectd passing" in reference()
        assert made()[MANUAL] != (ROOT / MANUAL).read_text()
    finally:
        cli.commands.pop("passing")


# --- the manual page


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_groff_has_nothing_to_say_of_the_manual_page():
    command = ["groff", "-man", "-Tutf8", "-ww", "-z", "-rLL=100n"]
    done = subprocess.run([*command, ROOT / MANUAL], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    broken = manual(cli).replace(".SH NAME", ".XX NAME\n\\f(XXbroken")
    done = subprocess.run(command, input=broken, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr, "groff would say something"


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_the_manual_page_reads_as_it_should():
    command = ["groff", "-man", "-Tascii", "-P-c", "-P-b", "-P-u", "-rLL=200n"]
    said = subprocess.run([*command, ROOT / MANUAL], capture_output=True, text=True, timeout=60, check=True).stdout
    assert "inspectd - exactly one verdict for every part on a camera line" in said
    assert "inspectd keygen peer [OPTIONS] NAME" in said
    assert "--coreset" not in said  # build_engines.py is no command of inspectd
    assert re.search(r"78 +configuration, keys or engine are wrong", said)


def test_roff_takes_no_line_of_ours_for_a_request():
    @click.command()
    def odd():
        """.hidden and 'quoted' with a \\ backslash."""

    assert "\\&.hidden and 'quoted' with a \\e backslash." in manual(odd)


# --- completion


def test_the_completion_that_is_installed_is_clicks_own(inspectd):
    assert inspectd("completion", "bash").out == (ROOT / COMPLETION).read_text()
