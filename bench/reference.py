"""What is made from the code: docs/reference.md, the alerts in docs/monitoring.md, the manual page, bash's completion.

    python -m bench.reference [--check]

A test checks that they are what this makes (tests/test_reference.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import click
import yaml
from pydantic.fields import FieldInfo

import build_engines
from adapters.dashboard.settings import Settings
from adapters.plc import REASON_CODES
from bench.commands import Told, manual, walk
from bench.tables import put
from daemon.cli import cli
from daemon.config import Config
from daemon.endpoints import Section
from daemon.first_config import section_of
from daemon.first_hour import completion_script
from daemon.record.metrics import Metrics
from daemon.words import DENIALS, EXIT_CODES, REASONS, REFUSALS

ROOT = Path(__file__).resolve().parent.parent
PAGE, MANUAL, COMPLETION = "docs/reference.md", "share/inspectd.1", "share/inspectd.bash"
MONITORING, ALERTS = "docs/monitoring.md", "examples/prometheus/alerts.yml"
_NO_DEFAULT = "must be given"
_HEAD = """# Reference

Made from the code by `python -m bench.reference`; a test holds it to it. What things are for stands on the other pages;
here is everything there is.

[Commands](#commands) · [config.yaml](#configyaml) · [dashboard.yaml](#dashboardyaml) · [Metrics](#metrics) ·
[Reasons](#reasons) · [Exit codes](#exit-codes)

## Commands

Each takes `--help`. `build_engines.py` is called as `.venv/bin/python build_engines.py` in a checkout."""
_CONFIG = """## config.yaml

Relative paths are taken from the file's folder. An unknown key is an error. `inspectd init` writes a file with all of
these, `inspectd check-config` checks it. An input of kind `imagezmq-sub` has `connect` in place of `bind`."""
_METRICS = """## Metrics

On `metrics.bind`, path `/metrics`. More: [metrics.md](metrics.md); alerts: [monitoring.md](monitoring.md)."""


def reference() -> str:
    """The whole page."""
    commands = [*walk(cli, "inspectd"), *walk(build_engines.main, "build_engines.py")]
    return "\n\n".join(
        [
            _HEAD,
            *(text for told in commands for text in _command(told)),
            _CONFIG,
            _keys(Config),
            "## dashboard.yaml",
            "The configuration of `inspectd dashboard` ([dashboard.md](dashboard.md)).",
            _keys(Settings),
            _METRICS,
            _table(("metric", "type", "labels", "meaning"), _metrics()),
            "## Reasons",
            "Of a REJECT, with the number that a PLC reads ([plc.md](plc.md)); a PASS has none.",
            _table(
                ("reason", "number", "meaning"),
                ((f"`{reason.value}`", str(REASON_CODES[reason.value]), text) for reason, text in REASONS.items()),
            ),
            "Of a frame that is refused; it gets no verdict ([wire.md](wire.md)).",
            _table(("refusal", "meaning"), ((f"`{word.value}`", text) for word, text in REFUSALS.items())),
            "Of a peer or message that is denied, in `inspectd_auth_denied_total`.",
            _table(("denial", "meaning"), ((f"`{word}`", text) for word, text in DENIALS.items())),
            "## Exit codes",
            _table(("code", "meaning"), ((str(code), text) for code, text in EXIT_CODES.items())),
        ]
    ) + "\n"  # fmt: skip


def _command(told: Told) -> Iterator[str]:
    yield f"### {told.name}"
    yield f"```text\n{told.usage}\n```"
    for paragraph in told.paragraphs:
        yield "```text\n" + "\n".join(paragraph.lines) + "\n```" if paragraph.is_fixed else _plain(paragraph.text)
    if told.options:
        yield _table(("option", "meaning"), ((f"`{option}`", text) for option, text in told.options))


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows)])


def _cell(text: str) -> str:
    return (text if text.startswith("`") else _plain(text)).replace("|", "\\|")


def _plain(text: str) -> str:
    """No page takes <line> for a tag."""
    return text.replace("<", "&lt;")


# -- keys of a configuration -----------------------------------------------------------------------


def _keys(model: type[Section]) -> str:
    return _table(("key", "value", "default", "meaning"), _rows(model, ""))


def _rows(model: type[Section], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for name, field in model.model_fields.items():
        section = section_of(field)
        path = f"{prefix}{name}"
        assert field.description is not None, path
        if section is None:
            yield f"`{path}`", _kind(field), _default(field), field.description
            continue
        origin = get_origin(field.annotation)
        below = f"{path}[]" if origin is list else f"{path}.<name>" if origin is dict else path
        kind = {list: "a list", dict: "by name"}.get(origin or object, "a section")
        yield f"`{path}`", kind, _default(field), field.description
        yield from _rows(section, f"{below}.")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return _NO_DEFAULT
    if field.default is None:
        return "none"
    if isinstance(field.default, Section):
        return "as below"
    return f"`{json.dumps(field.default) if isinstance(field.default, bool) else field.default}`"


def _kind(field: FieldInfo) -> str:
    """What may be written, in words."""
    kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not NoneType]
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{word}`" for word in kinds)
    kind = kinds[0] if not hasattr(kinds[0], "__metadata__") else get_args(kinds[0])[0]
    names = {bool: "`true`, `false`", int: "a whole number", float: "a number", Path: "a path", str: "text"}
    bounds = {
        word: getattr(rule, sign)
        for rule in field.metadata
        for sign, word in (("ge", "from"), ("gt", "above"), ("le", "to"), ("lt", "below"))
        if getattr(rule, sign, None) is not None
    }
    if "from" in bounds and bounds["from"] == bounds.get("to"):
        return f"`{bounds['from']}`"
    return " ".join([names[kind], *(f"{word} {bound}" for word, bound in bounds.items())])


# -- metrics and alerts ----------------------------------------------------------------------------


def _metrics() -> Iterator[tuple[str, str, str, str]]:
    metrics = Metrics()
    labels = {
        family.name: ", ".join(collector._labelnames)  # noqa: SLF001 - prometheus_client tells it nowhere else
        for collector in vars(metrics).values()
        if hasattr(collector, "describe")
        for family in collector.describe()
    }
    for family in metrics.registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        yield f"`{name}`", family.type, labels[family.name], family.documentation


def alerts(rules: Mapping[str, Any]) -> str:
    """alerts.yml as a table: what fires, how bad it is, and what to do."""
    rows = (
        (f"`{rule['alert']}`", rule["labels"]["severity"], rule.get("for", "at once"), _for_people(rule))
        for group in rules["groups"]
        for rule in group["rules"]
    )
    return _table(("alert", "severity", "after", "what it says, and what to do"), rows)


def _for_people(rule: Mapping[str, Any]) -> str:
    text = f"{rule['annotations']['summary']}. {rule['annotations']['description']}"
    text = text.removeprefix("{{ $labels.instance }}: ")
    for word in ("camera", "product", "reason", "result"):
        text = text.replace(f"{{{{ $labels.{word} }}}}", f"<{word}>")
    for word in ("{{ $value }}", "{{ $value | humanizePercentage }}", "{{ $value | humanizeDuration }}"):
        text = text.replace(word, "<value>")
    return text[:1].upper() + text[1:]


# -- files -----------------------------------------------------------------------------------------


def made() -> dict[str, str]:
    """Every file that is made, by its path."""
    rules = yaml.safe_load((ROOT / ALERTS).read_text())
    return {
        PAGE: reference(),
        MANUAL: manual(cli),
        COMPLETION: completion_script(cli, "bash"),
        MONITORING: put((ROOT / MONITORING).read_text(), "alerts", alerts(rules)),
    }


@click.command()
@click.option("--check", is_flag=True, help="Only say which files are not what the code makes.")
def main(check: bool) -> None:  # noqa: FBT001 - click
    """Write them."""
    files = made()
    stale = [name for name, text in files.items() if not (ROOT / name).exists() or (ROOT / name).read_text() != text]
    if check and stale:
        sys.exit(f"{', '.join(stale)}: not what the code makes; python -m bench.reference")
    for name in stale:
        (ROOT / name).write_text(files[name])


if __name__ == "__main__":
    main()
