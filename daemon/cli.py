"""The command `inspectd`. Exit codes: 0; 64 usage; 65 data; 69 device; 70 internal; 78 configuration or bundle.

Commands of wings that the daemon does not know (trainer, adapters) join through the entry point group
`inspectd.commands`, so that nothing here imports them.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click

from daemon import __version__, needs
from daemon.config import Config, load_config
from daemon.errors import InspectError, UsageError
from daemon.first_hour import completion, init
from daemon.keys import Role, make_peer, make_server_key, make_signing_key

CONFIG = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    default=Path("config.yaml"),
    show_default=True,
    help="The daemon's configuration.",
)
KEYS = click.option(
    "--keys", type=click.Path(path_type=Path), default=Path("keys"), show_default=True, help="The key folder."
)


class _Commands(click.Group):
    """Our own commands, and those that installed wings bring."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *(entry.name for entry in _guests())})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        entry = next((entry for entry in _guests() if entry.name == cmd_name), None)
        if entry is None:
            return None
        try:
            command: click.Command = entry.load()
        except ImportError as error:
            advice = needs.advise(error)
            if advice is None:
                raise
            raise UsageError(f"{cmd_name}: {advice}") from error
        return command


def _guests() -> Any:
    return entry_points(group="inspectd.commands")


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="inspectd")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="What is written to standard error.",
)
def cli(log_level: str) -> None:
    """Camera frames in, exactly one verdict for every part out."""
    from daemon.logs import set_up_logs

    # OpenCV's own lines about broken images would stand between ours; read when cv2 is first imported.
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")

    set_up_logs(log_level)


cli.add_command(init)
cli.add_command(completion)


@cli.command()
@CONFIG
def run(config_path: Path) -> None:
    """Run the daemon until SIGTERM, which drains it."""
    from daemon.service import run_service

    sys.exit(run_service(load_config(config_path)))


@cli.command("check-config")
@CONFIG
def check_config(config_path: Path) -> None:
    """Check a configuration; every problem at once."""
    config = load_config(config_path)
    cameras = ", ".join(f"{name} ({camera.product}, {camera.mode})" for name, camera in config.cameras.items())
    print(f"{config_path}: good. Line {config.line}, cameras: {cameras}")


@cli.command()
@CONFIG
@click.option(
    "--peer", type=click.Path(path_type=Path), help="A peer's key file: why is it refused? Asks the running daemon."
)
def doctor(config_path: Path, peer: Path | None) -> None:
    """Check the machine, the keys, the engines and the ports that a configuration needs."""
    from daemon.doctor import examine, examine_peer

    findings = examine_peer(config_path, peer) if peer else examine(config_path)
    for finding in findings:
        print(finding)
    sys.exit(78 if any(finding.state == "FAIL" for finding in findings) else 0)


@cli.group()
def keygen() -> None:
    """Make keys: signing (engines), server (the daemon's sockets), peer (who may connect)."""


@keygen.command("signing")
@KEYS
def keygen_signing(keys: Path) -> None:
    """The key that signs engines; its public half is listed in trusted.yaml."""
    make_signing_key(keys)
    print(f"{keys / 'signing.key'}: keep it on the building machine. {keys / 'trusted.yaml'}: goes to every box.")


@keygen.command("server")
@KEYS
def keygen_server(keys: Path) -> None:
    """The daemon's CURVE pair."""
    pair = make_server_key(keys)
    print(f"{keys / 'server.yaml'}: the daemon's. Public key: {pair.publicKey}")


@keygen.command("peer")
@click.argument("name")
@click.option(
    "--role", "roles", multiple=True, type=click.Choice(["camera", "subscriber", "bridge"]), required=True,
    help="What it may be; may be repeated.",
)  # fmt: skip
@click.option(
    "--topic", "topics", multiple=True, default=["*"], help="What it may speak or hear on, e.g. frame/solar/cam1"
)
@KEYS
def keygen_peer(name: str, roles: tuple[Role, ...], topics: tuple[str, ...], keys: Path) -> None:
    """A camera, subscriber or PLC bridge that may connect."""
    path = make_peer(keys, name, list(roles), list(topics))
    print(f"{path}: carry it to the peer's machine, then delete it here. The daemon reads peers.yaml at its start.")


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--product", help="Which product of the engine; needed where it has several.")
@click.option("--maps", type=click.Path(path_type=Path), help="Write each map as DIR/<parent folder>/<stem>.npy")
@click.option(
    "--trusted", type=click.Path(path_type=Path), default=Path("keys/trusted.yaml"), show_default=True,
    help="Whose engines are accepted.",
)  # fmt: skip
@click.option(
    "--precision", type=click.Choice(["f32", "bf16"]), default="f32", show_default=True, help="Of the computation."
)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True, help="Inference threads.")
def score(  # noqa: PLR0917 - click hands every option over
    bundle: Path,
    paths: tuple[Path, ...],
    product: str | None,
    maps: Path | None,
    trusted: Path,
    precision: str,
    threads: int,
) -> None:
    """Score images with an engine: one JSON object a line. Folders are taken whole."""
    from daemon.score import open_pipeline, score_paths

    pipeline = open_pipeline(bundle, trusted, precision, threads)
    for line in score_paths(pipeline, list(paths), product, maps):
        print(json.dumps(line), flush=True)


@cli.command()
@CONFIG
@click.option("--verify", is_flag=True, help="Prove that every part has exactly one verdict; exit 65 if not.")
@click.option("--last", type=click.IntRange(1), default=10, show_default=True, help="How many of the newest parts.")
def ledger(config_path: Path, verify: bool, last: int) -> None:  # noqa: FBT001 - click hands flags over as they come
    """What the ledger holds: counts by outcome, the newest parts, or the proof of the books."""
    from daemon.ledger_report import print_audit, print_summary

    folder = load_config(config_path).ledger.dir
    sys.exit(print_audit(folder) if verify else print_summary(folder, last))


def _control(command: str, text: str) -> click.Command:
    @cli.command(command, help=text)
    @CONFIG
    def ask_daemon(config_path: Path) -> None:
        from daemon.line.control import account, ask

        print(json.dumps(ask(load_config(config_path).control.bind, command, user=account()), indent=1))

    return ask_daemon


_control("status", "State, engines and parts in flight of the running daemon.")
_control("pause", "Refuse frames (PAUSED); the PLC sees the state and holds REJECT.")
_control("resume", "Take frames in again.")
_control("drain", "Refuse frames, give every part in flight its verdict, then end.")


@cli.command()
@CONFIG
@click.argument("camera", required=False)
def reset(config_path: Path, camera: str | None) -> None:
    """Forget the alarms DRIFT and SETUP of CAMERA, or of all, and begin to watch anew."""
    from daemon.line.control import account, ask

    print(json.dumps(ask(load_config(config_path).control.bind, "reset", user=account(), camera=camera), indent=1))


@cli.command()
@CONFIG
@click.argument("engine")
@click.option("--shadow", type=click.IntRange(0), default=0, help="Live frames to judge with both engines before.")
@click.option("--wait", "wait_s", type=click.FloatRange(1), default=600.0, show_default=True, help="Seconds.")
@click.option("--offline", is_flag=True, help="No daemon runs: verify the engine, and let the next start take it.")
def activate(config_path: Path, engine: str, shadow: int, wait_s: float, offline: bool) -> None:  # noqa: FBT001
    """Put ENGINE (NAME/VERSION) to work: loaded and proven beside the old one, it takes over between two frames."""
    from daemon.shelf import parse_engine

    name, version = parse_engine(engine)
    config = load_config(config_path)
    if offline:
        _activate_offline(config, name, version)
    else:
        _swap(config, "activate", wait_s, engine=engine, shadow=shadow)


@cli.command()
@CONFIG
@click.argument("name", required=False)
@click.option("--wait", "wait_s", type=click.FloatRange(1), default=600.0, show_default=True, help="Seconds.")
@click.option("--offline", is_flag=True, help="No daemon runs: let the next start take the engine before.")
def rollback(config_path: Path, name: str | None, wait_s: float, offline: bool) -> None:  # noqa: FBT001
    """Go back to the engine that was at work before."""
    from daemon.shelf import previous_version

    config = load_config(config_path)
    if offline:
        names = sorted(set(config.engine_names().values()))
        if name is None and len(names) != 1:
            raise UsageError(f"found no engine named, wanted one of {', '.join(names)}: inspectd rollback NAME")
        name = name or names[0]
        _activate_offline(config, name, previous_version(config.engines.dir, name))
    else:
        _swap(config, "rollback", wait_s, engine=name)


def _swap(config: Config, command: str, wait_s: float, **fields: str | int | None) -> None:
    from daemon.line.control import NoAnswerError, account, ask

    address = config.control.bind
    try:
        ask(address, "status")  # nobody should wait ten minutes for a daemon that is not there
    except NoAnswerError as error:
        raise NoAnswerError(f"{error} Where none should run: --offline, and the next start takes the engine") from error
    print(json.dumps(ask(address, command, round(1000 * wait_s), user=account(), **fields), indent=1))


def _activate_offline(config: Config, name: str, version: str) -> None:
    from daemon.bundle import open_bundle
    from daemon.keys import load_trusted
    from daemon.line.control import NoAnswerError, ask
    from daemon.shelf import put_to_work

    with suppress(NoAnswerError):
        ask(config.control.bind, "status", 500)
        raise UsageError("a daemon runs with this configuration; leave --offline out, so that it takes the engine now")
    bundle = open_bundle(config.engines.dir / name / version, load_trusted(config.security.keys / "trusted.yaml"))
    put_to_work(config.engines.dir, name, version)
    print(json.dumps({"ok": True, "engine": f"{name}/{version}", "digest": bundle.digest}, indent=1))


def main() -> None:
    """Entry point: errors become one clear text on stderr and the exit code of their kind."""
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(UsageError.exit_code)
    except click.Abort:
        sys.exit(130)
    except InspectError as error:
        print(f"inspectd: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        print(f"inspectd: {error}", file=sys.stderr)
        sys.exit(InspectError.exit_code)
    except Exception as error:
        advice = needs.advise(error) if isinstance(error, ImportError) else None
        if advice is not None:
            print(f"inspectd: {advice}", file=sys.stderr)
            sys.exit(UsageError.exit_code)
        # A fault of our own: the trace is for whoever reports it, the code for systemd.
        traceback.print_exc()
        sys.exit(InspectError.exit_code)
