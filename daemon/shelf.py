"""The engines on disk: engines/NAME/VERSION, and the links `current` and `previous` beside the versions.

`current` is what a daemon starts with; `previous` is what `inspectd rollback` goes back to. A link is replaced by a
rename, so that no reader finds it missing or half made.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from daemon.errors import BundleError, UsageError

CURRENT, PREVIOUS = "current", "previous"
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,127}")


def parse_engine(text: str) -> tuple[str, str]:
    """'part/20261122T082148Z' -> (name, version). Raises UsageError."""
    name, slash, version = text.partition("/")
    if not (slash and _PLAIN.fullmatch(name) and _PLAIN.fullmatch(version)) or version in (CURRENT, PREVIOUS):
        raise UsageError(f"found engine {text!r}, wanted NAME/VERSION as below the engines' folder")
    return name, version


def linked_version(engines: Path, name: str, link: str = CURRENT) -> str | None:
    """The version that a link names; None where there is no such link."""
    try:
        return (engines / name / link).readlink().name
    except OSError:
        return None


def previous_version(engines: Path, name: str) -> str:
    """What rollback goes back to. Raises UsageError where there is nothing."""
    previous = linked_version(engines, name, PREVIOUS)
    if previous is None or previous == linked_version(engines, name):
        raise UsageError(f"{engines / name}: no engine was active before this one; inspectd activate {name}/VERSION")
    return previous


def put_to_work(engines: Path, name: str, version: str) -> None:
    """Point `current` to a version and `previous` to what was current. Raises BundleError where the disk refuses."""
    before = linked_version(engines, name)
    if before != version:
        # A crash between the two leaves a rollback without a target, never a start without an engine.
        _point(engines, name, PREVIOUS, before)
        _point(engines, name, CURRENT, version)


def take_back(engines: Path, name: str, version: str, previous: str | None) -> None:
    """As if another one had never been put to work: what failed is not what a rollback goes to. Raises BundleError."""
    _point(engines, name, CURRENT, version)
    _point(engines, name, PREVIOUS, previous)


def _point(engines: Path, name: str, link: str, version: str | None) -> None:
    path = engines / name / link
    try:
        if version is None:
            path.unlink(missing_ok=True)
        else:
            _link(path, version)
    except OSError as error:
        raise BundleError(
            f"{path}: cannot be written: {error.strerror}; the daemon's user must own the engine's folder"
        ) from error


def _link(path: Path, target: str) -> None:
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
