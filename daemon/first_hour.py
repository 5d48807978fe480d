"""Commands of the first hour: `inspectd init` and `inspectd completion`."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from daemon.first_config import PLCS, Answers, refuse_to_replace, write_first_config

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_DEFAULTS = Answers(line="line1", camera="cam1", product="part", plc="none")
_QUESTIONS = {
    "line": "What is the line called",
    "camera": "What is its camera called",
    "product": "What does it look at (the engine gets this name)",
    "plc": "How is the PLC reached",
}
_TO_COMPLETE = """Print what lets SHELL complete commands and options with the Tab key.

`make install` puts bash's in its place. By hand, for one user:

\b
bash  inspectd completion bash > ~/.local/share/bash-completion/completions/inspectd
zsh   inspectd completion zsh > ~/.zfunc/_inspectd; in ~/.zshrc before compinit: fpath+=~/.zfunc
fish  inspectd completion fish > ~/.config/fish/completions/inspectd.fish
"""


def _as_name(value: str) -> str:
    """What topics, folders and YAML can hold. Raises click.BadParameter."""
    if not _NAME.fullmatch(value):
        raise click.BadParameter(f"found {value!r}, wanted 1 to 64 of A-Z a-z 0-9 _ . -, the first a letter or digit")
    return value


def _check_name(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    return None if value is None else _as_name(value)


@click.command()
@click.argument("file", type=click.Path(path_type=Path), default=Path("config.yaml"))
@click.option("--line", callback=_check_name, help="The line's name, the middle of every topic.  [line1]")
@click.option("--camera", callback=_check_name, help="The camera's name on it.  [cam1]")
@click.option("--product", callback=_check_name, help="What it looks at: the engine's name.  [part]")
@click.option("--plc", type=click.Choice(PLCS), help="How the PLC is reached; zmq: by a bridge of your own.  [none]")
@click.option("--force", is_flag=True, help="Replace FILE where it is there.")
def init(file: Path, force: bool, **given: str | None) -> None:  # noqa: FBT001 - click hands flags over as they come
    """Write a commented configuration for one camera and one product, and say what to run next.

    FILE is config.yaml where none is named. What no option says is asked for. Where nobody can be asked (standard
    input is no terminal), the value in brackets is taken, and told. Sockets are on loopback and ask for keys.
    """
    refuse_to_replace(file, force=force)  # before the questions
    answers = Answers(**{name: given[name] or _ask(name) for name in _QUESTIONS})
    write_first_config(file, answers, force=force)
    click.echo(
        f"{file}: written. Line {answers.line}, camera {answers.camera}, product {answers.product}, PLC {answers.plc}"
    )
    taken = [f"--{name} {getattr(answers, name)}" for name in _QUESTIONS if not given[name]]
    if taken and not sys.stdin.isatty():
        click.echo(f"Taken without asking, as standard input is no terminal: {' '.join(taken)}")
    click.echo("Next:")
    for step in next_steps(file, answers):
        click.echo(f"  {step}")


def _ask(name: str) -> str:
    default = str(getattr(_DEFAULTS, name))
    if not sys.stdin.isatty():
        return default
    question = _QUESTIONS[name]
    if name == "plc":
        return str(click.prompt(question, default=default, type=click.Choice(PLCS)))
    return str(click.prompt(question, default=default, value_proc=_as_name))


def next_steps(file: Path, answers: Answers) -> Iterator[str]:
    """The commands up to a running line, as they can be typed here."""
    program = Path(sys.argv[0])
    inspectd = _as_typed(program) if program.name == "inspectd" and program.is_file() else "inspectd"
    folder = file.parent
    config = "" if file == Path("config.yaml") else f" --config {file}"
    keys = "" if folder == Path() else f" --keys {folder / 'keys'}"
    out = "" if folder == Path() else f" --out {folder / 'engines'}"
    bridge = "plc" if answers.camera != "plc" else "plc-bridge"  # no two peers have one name
    frames = f"frame/{answers.line}/{answers.camera}"
    yield f"{inspectd} keygen server{keys}"
    yield f"{inspectd} keygen peer {answers.camera} --role camera --topic {frames}{keys}"
    if answers.plc != "none":
        yield f"{inspectd} keygen peer {bridge} --role bridge --topic permit/{answers.line}{keys}"
    python = _as_typed(Path(sys.executable))
    yield f"{python} build_engines.py {answers.product} --good FOLDER{out}{keys}   # of good images"
    yield f"{inspectd} check-config{config}"
    yield f"{inspectd} doctor{config}"
    yield f"{inspectd} run{config}"
    peer = folder / "keys" / f"{answers.camera}.peer.yaml"
    yield f"{inspectd} camera SOURCE --camera {answers.camera} --config {file} --peer {peer}   # docs/cameras.md"
    peer = folder / "keys" / f"{bridge}.peer.yaml"
    if answers.plc == "modbus":
        yield f"{inspectd} plc modbus --config {file} --peer {peer} --plc HOST:502   # docs/plc.md"
    elif answers.plc == "opcua":
        yield f"{inspectd} plc opcua --config {file} --peer {peer}   # docs/plc.md"


def _as_typed(program: Path) -> str:
    """By its name where the shell finds this very program, else by its path, from here if it lies below."""
    found = shutil.which(program.name)
    if found is not None and Path(found).absolute() == program.absolute():
        return program.name
    try:
        return str(program.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(program)


@click.command(help=_TO_COMPLETE)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    click.echo(completion_script(context.find_root().command, shell), nl=False)


def completion_script(command: click.Command, shell: str) -> str:
    """click's own script for a shell; it asks the command itself each time Tab is pressed."""
    maker = get_completion_class(shell)
    assert maker is not None
    return maker(command, {}, "inspectd", "_INSPECTD_COMPLETE").source()
