"""dashboard.yaml: where the dashboard listens, which daemon it shows, who may look.

Everything about the daemon (line, addresses, folders, cameras) is taken from the daemon's own config.yaml.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError

from daemon.config import Config, Section, load_config
from daemon.endpoints import told
from daemon.errors import ConfigError
from daemon.keys import PeerFile, load_peer_file
from daemon.yamlfile import YamlError, parse_yaml

_LOOPBACK = re.compile(r"127\.\d+\.\d+\.\d+|localhost|\[::1\]")
_PATHS = ("daemon", "peer", "users", "secret")
_TLS_PATHS = ("certificate", "key")


def _address(bind: str) -> str:
    host, _, port = bind.rpartition(":")
    if not host or "/" in host or not port.isdigit() or not 0 <= int(port) < 65_536:
        raise ValueError("wanted host:port, e.g. 127.0.0.1:8080")
    return bind


class Tls(Section):
    certificate: Annotated[Path, told("its certificate, with those between it and the root")]
    key: Annotated[Path, told("its private key, which nobody else may read")]


class Settings(Section):
    """The whole file. `load_settings` makes one."""

    version: Annotated[int, Field(ge=1, le=1), told("of this file's format")]
    bind: Annotated[str, AfterValidator(_address), told("host:port; beyond loopback it wants tls")] = "127.0.0.1:8080"
    daemon: Annotated[Path, told("the daemon's configuration, which names the rest")] = Path("config.yaml")
    peer: Annotated[Path | None, told("key file of a peer of role subscriber")] = Path("keys/dashboard.peer.yaml")
    users: Annotated[Path, told("who may log in; inspectd dashboard-user writes it")] = Path("dashboard-users.yaml")
    secret: Annotated[Path, told("signs the sessions; made at the first start")] = Path("dashboard.secret")
    session_hours: Annotated[float, Field(gt=0, le=720), told("how long a login lasts")] = 12.0
    tls: Annotated[Tls | None, told("The server's certificate and key, in PEM")] = None
    insecure: Annotated[bool, told("true: http beyond loopback, on a test bench; passwords cross in the open")] = False

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.bind.rpartition(":")
        return host.strip("[]"), int(port)

    @property
    def is_open(self) -> bool:
        """Whether passwords could be read on their way from another machine."""
        return self.tls is None and not _LOOPBACK.fullmatch(self.bind.rpartition(":")[0])


@dataclass(frozen=True)
class Place:
    """What the dashboard stands on: its own settings, the daemon's, and the key it subscribes with."""

    settings: Settings
    config: Config
    keys: PeerFile | None

    @property
    def results(self) -> str:
        """Where to subscribe: a daemon that listens everywhere is asked on loopback."""
        bind = self.config.results.bind
        return bind.replace("tcp://*", "tcp://127.0.0.1").replace("tcp://0.0.0.0", "tcp://127.0.0.1")


def load_settings(path: Path) -> Settings:
    """Read and check `path`; relative paths are taken from its folder. Raises ConfigError with every problem."""
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = "; start from the shipped dashboard.yaml" if isinstance(error, FileNotFoundError) else ""
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}{hint}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), ["is not UTF-8 text"]) from error
    except YamlError as error:
        raise ConfigError(str(path), [str(error)]) from error
    if not isinstance(data, dict):
        raise ConfigError(
            str(path), [f"holds a {type(data).__name__}, wanted keys ({', '.join(Settings.model_fields)})"]
        )
    try:
        settings = Settings.model_validate(_with_paths(data, path.resolve().parent))
    except ValidationError as error:
        raise ConfigError(str(path), [_explain(fault) for fault in error.errors(include_url=False)]) from error
    if settings.is_open and not settings.insecure:
        problem = (
            f"bind: {settings.bind} is not loopback and there is no tls: passwords would cross the network in the open"
        )
        raise ConfigError(
            str(path), [f"{problem}; name tls.certificate and tls.key, or set insecure: true on a test bench"]
        )
    return settings


def load_place(path: Path) -> Place:
    """The settings, the daemon's configuration and the peer's key. Raises ConfigError."""
    settings = load_settings(path)
    config = load_config(settings.daemon)
    keys = None
    if config.results.uses_curve:
        if settings.peer is None:
            raise ConfigError(str(path), ["peer: is null, but the daemon's results ask for a key"])
        try:
            keys = load_peer_file(settings.peer)
        except ConfigError as error:
            made = "inspectd keygen peer dashboard --role subscriber"
            raise ConfigError(str(path), [f"peer: {error} ({made})"]) from error
    return Place(settings, config, keys)


def _with_paths(data: dict[Any, Any], base: Path) -> dict[Any, Any]:
    """Strict pydantic wants Path objects where YAML has strings; defaults are anchored too."""
    defaults = {name: str(Settings.model_fields[name].default) for name in _PATHS}
    copy = {**defaults, **data}
    for name in _PATHS:
        copy[name] = _anchored(copy[name], base)
    if isinstance(copy.get("tls"), dict):
        copy["tls"] = {
            key: _anchored(value, base) if key in _TLS_PATHS else value for key, value in copy["tls"].items()
        }
    return copy


def _anchored(value: Any, base: Path) -> Any:
    return base / value if isinstance(value, str) else value


def _explain(fault: Any) -> str:
    path = ".".join(str(step) for step in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = Tls.model_fields if path.startswith("tls.") else Settings.model_fields
        return f"{path}: unknown key; known here: {', '.join(known)}"
    if fault["type"] == "missing":
        return f"{path}: is missing; it has no default"
    return f"{path}: found {str(fault.get('input'))[:200]!r}: {fault['msg'].removeprefix('Value error, ')}"
