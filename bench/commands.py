"""Every command of a click program as facts, and the manual page made of them. Called by bench/reference.py."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import click

from daemon import __version__
from daemon.words import EXIT_CODES


@dataclass(frozen=True)
class Paragraph:
    """`is_fixed`: its lines are to stay as they are."""

    lines: tuple[str, ...]
    is_fixed: bool = False

    @property
    def text(self) -> str:
        return " ".join(self.lines)


@dataclass(frozen=True)
class Told:
    """One command: how it is called, what it does, its options with what they mean."""

    name: str
    usage: str
    paragraphs: tuple[Paragraph, ...]
    options: tuple[tuple[str, str], ...]


def walk(command: click.Command, name: str, parent: click.Context | None = None) -> Iterator[Told]:
    """The command itself, then those below it."""
    context = click.Context(command, info_name=name, parent=parent, **command.context_settings)
    options = [param for param in command.get_params(context) if isinstance(param, click.Option)]
    records = [param.get_help_record(context) for param in options if "--help" not in param.opts]
    yield Told(
        context.command_path,
        " ".join([context.command_path, *command.collect_usage_pieces(context)]),
        tuple(_paragraphs(command.help or "")),
        tuple((option, _in_words(text)) for option, text in (record for record in records if record is not None)),
    )
    if isinstance(command, click.Group):
        for each in command.list_commands(context):
            found = command.get_command(context, each)
            assert found is not None
            yield from walk(found, each, context)


def _paragraphs(text: str) -> Iterator[Paragraph]:
    for block in inspect.cleandoc(text).split("\n\n"):
        lines = tuple(line for line in block.splitlines() if line.strip() != "\b")
        if lines:
            yield Paragraph(lines, is_fixed="\b" in block)


def _in_words(text: str) -> str:
    """Without the two blanks before what click adds in brackets."""
    return " ".join(text.split())


# -- the manual page -------------------------------------------------------------------------------

_FILES = {
    "config.yaml": "the configuration; inspectd init writes one, inspectd check-config checks it",
    "dashboard.yaml": "that of inspectd dashboard",
    "keys/": "server.yaml and peers.yaml (who may connect), trusted.yaml (whose engines are accepted), NAME.peer.yaml",
    "engines/PRODUCT/current": "the engine that runs",
    "run/": "ipc sockets, journal, ledger and rejected frames",
}


def manual(command: click.Command) -> str:
    """inspectd(1), in roff."""
    whole, *others = walk(command, "inspectd")
    lines = [
        '.\\" Made by python -m bench.reference',
        f'.TH INSPECTD 1 "" "inspectd {__version__}" "User Commands"',
        ".SH NAME",
        "inspectd \\- exactly one verdict for every part on a camera line",
        ".SH SYNOPSIS",
        ".B inspectd",
        "[\\fIOPTIONS\\fR] \\fICOMMAND\\fR [\\fIARGUMENTS\\fR]",
        ".SH DESCRIPTION",
        *_flow(whole),
        "The first hour: inspectd init, then what it says; inspectd doctor says what a machine lacks.",
        ".SH OPTIONS",
        *_options(whole),
        ".SH COMMANDS",
    ]
    for told in others:
        lines += [f".SS {_roff(told.usage)}", *_flow(told), *_options(told)]
    lines.append(".SH FILES")
    for file, meaning in _FILES.items():
        lines += [".TP", f".I {_roff(file)}", _roff(meaning)]
    lines.append(".SH EXIT STATUS")
    for code, meaning in EXIT_CODES.items():
        lines += [".TP", f".B {code}", _roff(meaning.replace("`", ""))]
    return "\n".join(lines) + "\n"


def _flow(told: Told) -> Iterator[str]:
    for paragraph in told.paragraphs:
        if paragraph.is_fixed:
            yield from (".PP", ".nf", *map(_roff, paragraph.lines), ".fi")
        else:
            yield from (".PP", _roff(paragraph.text))


def _options(told: Told) -> Iterator[str]:
    for option, meaning in told.options:
        yield from (".TP", f".B {_roff(option)}", _roff(meaning))


def _roff(text: str) -> str:
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped
