"""`inspectd dashboard` and `inspectd dashboard-user`. The web server's packages are the extra [dashboard]."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from adapters.dashboard.settings import load_place, load_settings
from adapters.dashboard.users import ROLES, Role, load_users, remove_user, save_user
from daemon.errors import ConfigError, UsageError

CONFIG = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    default=Path("dashboard.yaml"),
    show_default=True,
    help="The dashboard's own configuration.",
)


@click.command("dashboard")
@CONFIG
def command(config_path: Path) -> None:
    """Show the line in a browser: live pictures, rejects, engines. Runs until SIGTERM."""
    try:
        from adapters.dashboard.app import Dashboard
        from adapters.dashboard.server import serve
    except ImportError as error:
        raise UsageError(f"dashboard: {error}; it needs an extra: pip install 'inspectd[dashboard]'") from error

    place = load_place(config_path)
    if not load_users(place.settings.users):
        raise ConfigError(
            str(place.settings.users), ["nobody may log in yet; inspectd dashboard-user NAME --role operator"]
        )
    serve(Dashboard(place).app, place)


@click.command("dashboard-user")
@click.argument("name")
@click.option(
    "--role", type=click.Choice(ROLES), default="viewer", show_default=True,
    help="viewer: sees everything; reviewer: marks rejects, too; operator: changes things, too.",
)  # fmt: skip
@click.option("--remove", is_flag=True, help="Take the user out; all their sessions end.")
@CONFIG
def user_command(name: str, role: Role, remove: bool, config_path: Path) -> None:  # noqa: FBT001 - click's flags
    """Let NAME into the dashboard, or change password and role. The password is asked for, or read from stdin."""
    users = load_settings(config_path).users
    if remove:
        remove_user(users, name)
        print(f"{users}: {name} is out")
        return
    password = (
        click.prompt("Password", hide_input=True, confirmation_prompt=True)
        if sys.stdin.isatty()
        else sys.stdin.readline().rstrip("\n")
    )
    is_new = save_user(users, name, role, password)
    print(f"{users}: {name} is {'a new' if is_new else 'now a'} {role}")
