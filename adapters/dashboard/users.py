"""Who may look and who may change: a file of names, roles and password hashes (scrypt), 0600.

A viewer sees everything and changes nothing; a reviewer may also mark rejects; an operator may besides activate engines
and roll back.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import os
import secrets
import stat
import threading
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from daemon.errors import ConfigError, UsageError
from daemon.yamlfile import YamlError, parse_yaml

log = logging.getLogger("inspectd.dashboard")

Role = Literal["viewer", "reviewer", "operator"]
ROLES: tuple[Role, ...] = ("viewer", "reviewer", "operator")  # each may do what those before it may
LEAST_CHARACTERS, MOST_CHARACTERS = 10, 200
# 32 MB and some 0.2 s of one core: dear for whoever has stolen the file, bearable for the box, one at a time.
_N, _R, _P = 1 << 15, 8, 3
_MEMORY_BYTES = 64 << 20
_ONE_AT_A_TIME = threading.Lock()


class User(BaseModel):
    """`hash` is scrypt$N$r$p$salt$key, the last two in base64."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}$")]
    role: Role
    hash: Annotated[
        str, Field(pattern=r"^scrypt\$\d{1,8}\$\d{1,3}\$\d{1,3}\$[A-Za-z0-9+/=]+\$[A-Za-z0-9+/=]+$", repr=False)
    ]

    @property
    def mark(self) -> str:
        """Changes with the password or the role: a cookie that was given before is worth nothing then."""
        return hashlib.sha256(f"{self.name} {self.role} {self.hash}".encode()).hexdigest()[:16]


def hash_password(password: str) -> str:
    """Raises UsageError for a password that is too short to be one."""
    if not LEAST_CHARACTERS <= len(password) <= MOST_CHARACTERS:
        raise UsageError(
            f"the password has {len(password)} characters, wanted {LEAST_CHARACTERS} to {MOST_CHARACTERS}; "
            "four words in a row are a good one"
        )
    salt = secrets.token_bytes(16)
    key = _scrypt(password, salt, _N, _R, _P)
    return f"scrypt${_N}${_R}${_P}${base64.b64encode(salt).decode()}${base64.b64encode(key).decode()}"


def is_password(password: str, hashed: str) -> bool:
    _, n, r, p, salt, key = hashed.split("$")
    found = _scrypt(password, base64.b64decode(salt), int(n), int(r), int(p))
    return hmac.compare_digest(found, base64.b64decode(key))


def _scrypt(password: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    with _ONE_AT_A_TIME:
        return hashlib.scrypt(password.encode(), salt=salt, n=n, r=r, p=p, maxmem=_MEMORY_BYTES, dklen=32)


class Users:
    """The file, read again when it changes: who is taken out of it is out within a second."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int] | None = None
        self._users: dict[str, User] = {}
        self._nobody = hash_password(secrets.token_urlsafe(16))
        self._refresh()

    def get(self, name: str) -> User | None:
        self._refresh()
        return self._users.get(name)

    def check(self, name: str, password: str) -> User | None:
        """The user, if the password is theirs. Takes as long for a name that nobody has."""
        user = self.get(name)
        is_theirs = is_password(password, user.hash if user else self._nobody)
        return user if is_theirs else None

    def _refresh(self) -> None:
        try:
            status = self._path.stat()
        except FileNotFoundError:
            self._stamp, self._users = None, {}
            return
        stamp = (status.st_mtime_ns, status.st_ino)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._users = {user.name: user for user in load_users(self._path)}
        except ConfigError as error:
            # Nobody gets in by a file that cannot be read, and the log says what is wrong with it.
            log.error("users: %s", error)  # noqa: TRY400 - the trace adds nothing
            self._users = {}


def load_users(path: Path) -> list[User]:
    """Nobody where there is no file. Raises ConfigError; the hashes are never quoted."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            raise ConfigError(str(path), [f"has mode {mode:04o}, others can read the hashes; chmod 600 {path}"])
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from error
    except (UnicodeDecodeError, YamlError) as error:
        raise ConfigError(str(path), ["is not YAML" if isinstance(error, UnicodeDecodeError) else str(error)]) from None
    try:
        users = TypeAdapter(list[User]).validate_python(data or [])
    except ValidationError as error:
        faults = [f"{'.'.join(str(step) for step in fault['loc'])}: {fault['msg']}" for fault in error.errors()]
        raise ConfigError(str(path), faults) from None
    twice = sorted({user.name for user in users if sum(other.name == user.name for other in users) > 1})
    if twice:
        raise ConfigError(str(path), [f"{name}: stands there twice" for name in twice])
    return users


def save_user(path: Path, name: str, role: Role, password: str) -> bool:
    """Add a user, or give one another password and role; whether they are new. Raises UsageError, ConfigError."""
    users = load_users(path)
    try:
        user = User(name=name, role=role, hash=hash_password(password))
    except ValidationError as error:
        raise UsageError(f"found name {name!r}, wanted letters, digits and _ . @ - (at most 64)") from error
    _write(path, [other for other in users if other.name != name] + [user])
    return name not in {other.name for other in users}


def remove_user(path: Path, name: str) -> None:
    """Raises UsageError where there is no such user."""
    users = load_users(path)
    if name not in {user.name for user in users}:
        raise UsageError(
            f"found no user {name!r} in {path}, wanted one of {', '.join(u.name for u in users) or 'none'}"
        )
    _write(path, [user for user in users if user.name != name])


def _write(path: Path, users: list[User]) -> None:
    data: list[dict[str, Any]] = [user.model_dump() for user in users]
    write_secret(path, yaml.safe_dump(data, sort_keys=False).encode())


def write_secret(path: Path, data: bytes) -> None:
    """Replace a file in one step; nobody else can read it from its first byte on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    partial.replace(path)


def load_secret(path: Path) -> bytes:
    """The key that signs cookies, made where there is none. Raises ConfigError where others can read it."""
    if not path.exists():
        write_secret(path, secrets.token_hex(32).encode())
    mode = stat.S_IMODE(path.stat().st_mode)
    data = path.read_bytes().strip()
    if mode & 0o077:
        raise ConfigError(str(path), [f"has mode {mode:04o}, others can read this secret; chmod 600 {path}"])
    if len(data) < 32:
        raise ConfigError(str(path), ["is too short to sign anything; delete it, and a new one is made"])
    return data
