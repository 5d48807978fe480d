"""What `inspectd init` writes: a configuration for one camera and one product, what each key means beside it.

Keys, defaults and meanings are the schema's (config.py), so that a key that is added there is told here, too. Chosen
here is what has no default (sockets on loopback that ask for keys, ordinary times), and what the dashboard shows.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from daemon.config import Config, parse_config
from daemon.endpoints import Section
from daemon.errors import UsageError
from daemon.yamlfile import YamlError, parse_yaml

PLCS = ("none", "zmq", "modbus", "opcua")
_WIDTH, _COLUMN = 120, 36
_OF_THE_PLC = {
    "none": "No PLC yet. The ways to one: docs/plc.md",
    "zmq": "The PLC's bridge is a program of your own: docs/wire.md#permits",
    "modbus": "The PLC is reached by inspectd plc modbus, a process of its own: docs/plc.md",
    "opcua": "The PLC is reached by inspectd plc opcua, a process of its own: docs/plc.md",
}


@dataclass(frozen=True)
class Answers:
    """To the four questions: names as topics have them, and one of PLCS."""

    line: str
    camera: str
    product: str
    plc: str


def write_first_config(path: Path, answers: Answers, *, force: bool = False) -> Config:
    """Write the configuration and give it as read. Raises UsageError where something is there, or cannot be."""
    text = first_config(answers)
    config = parse_config(text, str(path), path.absolute().parent)
    refuse_to_replace(path, force=force)
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be written: {error.strerror}; name a file in a folder that is there and is yours"
        ) from error
    return config


def refuse_to_replace(path: Path, *, force: bool) -> None:
    """Raises UsageError where a file is there that nobody gave up."""
    if not force and (path.exists() or path.is_symlink()):
        raise UsageError(
            f"{path}: found it there already, wanted a file that is not; name another (inspectd init FILE), or "
            "replace what is there with --force"
        )


def first_config(answers: Answers) -> str:
    """The text of the file."""
    said = " ".join(f"--{name} {value}" for name, value in vars(answers).items())
    lines = [
        f"# Made by: inspectd init {said}",
        "# Check a change with: inspectd check-config   What the machine lacks: inspectd doctor",
        "# Relative paths are taken from this file's folder. Every key with its bounds: docs/reference.md",
    ]
    chosen = _chosen(answers)
    notes = {"permits": _OF_THE_PLC[answers.plc], "cameras": "Who brings the pictures: docs/cameras.md"}
    for name, field in Config.model_fields.items():
        value = chosen.get(name, field.default)
        section = section_of(field)
        if section is None:
            lines += ["", *_key("", name, value, field)] if value == field.default else _key("", name, value, field)
        else:
            lines += ["", f"# {field.description}", *([f"# {notes[name]}"] if name in notes else []), f"{name}:"]
            lines += _section(field, section, value)
    return "\n".join(lines) + "\n"


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a key holds: itself, one or none, a list of them, or by name; None for a plain value."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def _chosen(answers: Answers) -> dict[str, Any]:
    """What has no default or another than it, the order of keys as people read them."""
    camera = {"product": answers.product, "deadline_ms": 250, "valid_ms": 500}
    return {
        "version": 1,
        "line": answers.line,
        "inputs": [{"kind": "router", "bind": "tcp://127.0.0.1:5550"}],
        # Off by default for what it costs; a first hour wants to see something.
        "results": {"bind": "tcp://127.0.0.1:5551", "heatmap": True, "frame_every_ms": 500},
        "permits": {"bind": "tcp://127.0.0.1:5552"},
        "control": {"bind": "ipc://run/control.sock"},
        "metrics": {"bind": "127.0.0.1:9464"},
        "cameras": {answers.camera: camera},
    }


def _section(field: FieldInfo, section: type[Section], value: Any) -> list[str]:
    """The lines below a section's name: its keys, or those of each entry of a list or by name."""
    if isinstance(value, list):
        entries = [_keys("    ", section, entry) for entry in value]
        return [line for first, *more in entries for line in (f"  - {first[4:]}", *more)]
    if get_origin(field.annotation) is dict:
        return [
            line for name, entry in value.items() for line in (f"  {_scalar(name)}:", *_keys("    ", section, entry))
        ]
    return _keys("  ", section, value.model_dump() if isinstance(value, Section) else value)


def _keys(indent: str, section: type[Section], given: Mapping[str, Any]) -> list[str]:
    """Given keys first, then the others with their defaults; one whose default is none is left out."""
    others = {name: field.default for name, field in section.model_fields.items() if name not in given}
    values = {**given, **{name: value for name, value in others.items() if value is not None}}
    lines: list[str] = []
    for name, value in values.items():
        lines += _key(indent, name, value, section.model_fields[name])
    return lines


def _key(indent: str, name: str, value: Any, field: FieldInfo) -> list[str]:
    """`name: value   # what it may be and means (default)`; a long meaning goes on below itself."""
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    words = f"{' | '.join(choices)}; {field.description}" if choices else field.description
    meaning = f"{words}{' (default)' if value == field.default else ''}"
    first, *more = textwrap.wrap(meaning, _WIDTH - _COLUMN - len("# "))
    left = f"{indent}{name}: {_scalar(value)}"
    return [f"{left:<{_COLUMN - 1}} # {first}", *(f"{'':<{_COLUMN}}# {line}" for line in more)]


def _scalar(value: Any) -> str:
    """As YAML has it: in quotes where it would be read as something else without them, and addresses."""
    if isinstance(value, str | Path):
        text = str(value)
        return text if _is_plain(text) and "://" not in text else json.dumps(text)
    return json.dumps(value)


def _is_plain(text: str) -> bool:
    try:
        return bool(parse_yaml(text) == text)
    except YamlError:
        return False
