"""What a long build says while it works: bars on a terminal, plain lines elsewhere, always on stderr.

Standard output is left to results, so that a script can read the bundle's folder from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import monotonic
from typing import TypeVar

import click

_LINE_EVERY_S = 5.0
_Item = TypeVar("_Item")


def say(line: str) -> None:
    click.echo(line, err=True)


def warn(line: str) -> None:
    click.echo(f"warning: {line}", err=True)


def track(items: Sequence[_Item], what: str) -> Iterator[_Item]:
    """The items one by one, while the progress through them is shown as `what`."""
    from rich.console import Console
    from rich.progress import track as bar

    console = Console(stderr=True)
    if console.is_terminal:
        yield from bar(items, description=what, console=console)
    else:
        yield from _lines(items, what)


def _lines(items: Sequence[_Item], what: str) -> Iterator[_Item]:
    started = said = monotonic()
    for done, item in enumerate(items):
        if monotonic() - said >= _LINE_EVERY_S:
            said = monotonic()
            say(f"{what}: {done} of {len(items)}")
        yield item
    say(f"{what}: {len(items)} in {monotonic() - started:.1f} s")
