"""Where a bundle grows: its hidden folder, its version and key, and the moment it gets its name.

A bundle grows beside its final place and is renamed when it is complete, so that no reader ever sees half
an engine. What the command line asked for is kept here too, with the way that a command ends.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from time import monotonic
from typing import Any, NoReturn

import click
from click.core import ParameterSource
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from daemon.errors import ConfigError, InspectError, UsageError
from daemon.keys import TrustedKey, load_trusted, make_signing_key
from trainer.progress import say

PRODUCT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_FOLDERS = ("good", "select", "calibration", "test")  # of each product
_OF_ONE = (
    "add", "branches", "budget_ms", "finetune", "noise", "repair", "k", "alpha", "coreset",
)  # fmt: skip


@dataclass(frozen=True)
class Order:
    """What every command that makes a bundle is told; of several products, for one of them."""

    name: str
    good: Path
    calibration: Path | None
    test: Path | None
    out: Path
    keys: Path
    false_reject: float
    targets: tuple[str, ...]
    threads: int


@dataclass(frozen=True)
class Options(Order):
    """The command line of build_engines.py for one product."""

    select: Path | None
    add: tuple[Path, ...]
    textures: Path | None
    preview: Path | None
    branches: tuple[str, ...]
    budget_ms: float
    budget: float
    steps: int | None
    finetune: str
    noise: str
    repair: str
    size: int | None
    k: int | None
    alpha: float | None
    coreset: int | None
    backbone: str
    weights: Path | None
    seed: int
    kind: str = "fused"
    without: tuple[str, ...] = ()


def options_of(fields: Mapping[str, Any]) -> list[Options]:
    """The command line of one product, or with kind crr one for each, named as the product. Raises UsageError."""
    rest = {key: value for key, value in fields.items() if key not in (*_FOLDERS, "name")}
    if fields["kind"] == "fused":
        return [Options(name=fields["name"], **{option: _only(option, fields[option]) for option in _FOLDERS}, **rest)]
    folders = {option: _by_product(option, fields[option]) for option in _FOLDERS}
    products = folders["good"]
    for option, given in folders.items():
        if strangers := sorted(set(given) - set(products)):
            named = ", ".join(strangers)
            raise UsageError(f"found --{option} for {named}, wanted products of --good: {', '.join(products)}")
    return [
        Options(name=product, **{option: given.get(product) for option, given in folders.items()}, **rest)
        for product in products
    ]


def _only(option: str, given: Sequence[str]) -> Path | None:
    if len(given) > 1:
        raise UsageError(
            f"found --{option} {len(given)} times, wanted it once; one engine for many products: --kind crr"
        )
    return Path(given[0]) if given else None


def _by_product(option: str, given: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for text in given:
        name, _, folder = text.partition("=")
        if not folder or not PRODUCT.fullmatch(name):
            raise UsageError(f"found --{option} {text}, wanted PRODUCT=DIR with --kind crr, such as cup=images/cup")
        if name in found:
            raise UsageError(f"found --{option} for {name} twice, wanted one folder for each product")
        found[name] = Path(folder)
    return found


def check_options(context: click.Context) -> None:
    """What the command line asks of an engine of one product means nothing to one of many. Raises UsageError."""
    given = [name for name in _OF_ONE if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if given:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UsageError(f"found {named}, wanted them without --kind crr: they are of an engine for one product")


def check_name(_context: click.Context, _parameter: click.Parameter, name: str) -> str:
    """An option's or argument's: a folder below engines/, and what a configuration may name."""
    if not PRODUCT.fullmatch(name):
        raise click.BadParameter(f"found {name!r}, wanted 1 to 64 of A-Z a-z 0-9 _ . -, the first a letter or digit")
    return name


def check_targets(_context: click.Context, _parameter: click.Parameter, value: str) -> tuple[str, ...]:
    """Of --targets."""
    try:
        return parse_targets(value)
    except UsageError as error:
        raise click.BadParameter(str(error)) from error


def parse_targets(text: str) -> tuple[str, ...]:
    """ "cpu,rtx:sm86` -> ("cpu", "rtx:sm86"). Raises UsageError."""
    targets = tuple(dict.fromkeys(text.split(",")))
    bad = [target for target in targets if not re.fullmatch(r"cpu|trt|(rtx|kernels):sm\d{2,3}", target)]
    if bad or "cpu" not in targets:
        raise UsageError(
            f"found targets {text!r}, wanted cpu and any of trt, rtx:smNN, kernels:smNN with commas between, such as "
            "cpu,rtx:sm86; every engine also runs on a CPU (--targets)"
        )
    return targets


@dataclass(frozen=True)
class Site:
    """Where the bundle grows and what it will be called; `key` signs it, `trusted` must accept it."""

    folder: Path
    version: str
    created: datetime
    started: float
    key: Ed25519PrivateKey
    trusted: tuple[TrustedKey, ...]

    @property
    def elapsed_s(self) -> float:
        return monotonic() - self.started

    @property
    def final(self) -> Path:
        return self.folder.parent / self.version


@contextmanager
def open_site(options: Order) -> Iterator[Site]:
    """Make or load the signing key, and the hidden folder; what is left of it goes when the build ends.

    Raises ConfigError where the finished bundle could not be opened with the folder's trusted keys.
    """
    key = make_signing_key(options.keys)
    trusted = load_trusted(options.keys / "trusted.yaml")
    if not any(known.verifies(key.sign(b"probe"), b"probe") for known in trusted):
        problem = f"does not list the public half of {options.keys / 'signing.key'}; add it"
        raise ConfigError(str(options.keys / "trusted.yaml"), [problem])
    created = datetime.now(timezone.utc)
    folder, version = _reserve(options.out / options.name, created.strftime("%Y%m%dT%H%M%SZ"))
    try:
        yield Site(folder, version, created, monotonic(), key, tuple(trusted))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _reserve(engine: Path, stamp: str) -> tuple[Path, str]:
    """Take a version that nobody has or is building: making its hidden folder settles it."""
    suffix = 1
    while True:
        version = stamp if suffix == 1 else f"{stamp}-{suffix}"
        folder = engine / f".{version}.partial"
        if not (engine / version).exists():
            with suppress(FileExistsError):
                folder.mkdir(parents=True)
                return folder, version
        suffix += 1


def publish(site: Site) -> Path:
    """Give the bundle its name, and make it current where no engine is."""
    site.folder.rename(site.final)
    link = site.final.parent / "current"
    with suppress(FileExistsError):
        link.symlink_to(site.version)
        say(f"{link} -> {site.version}")
    if link.resolve() != site.final.resolve():
        say(f"{link} stays at {link.readlink()}; inspectd activate puts the new engine to work")
    return site.final


def run_command(command: click.Command) -> NoReturn:
    """Run a click command with our exit codes: 64 for a wrong call, else what the error carries."""
    try:
        sys.exit(command.main(prog_name=Path(sys.argv[0]).name, standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(UsageError.exit_code)
    except click.Abort:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except InspectError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
