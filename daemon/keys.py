"""The key folder: who may sign engines (Ed25519) and who may speak with the daemon (CURVE).

    signing.key    Ed25519 private key, PEM, 0600      trusted.yaml  [{name, publicKey}]
    server.yaml    the daemon's CURVE pair, 0600       peers.yaml    [{name, publicKey, roles, topics}]
    server.public.yaml  the public half of it; stays where server.yaml is moved to a systemd credential, which comes
                        before the folder's
    NAME.peer.yaml one peer's CURVE pair and the server's public key, 0600: what is carried to that machine

Secrets are written with 0600 from the first byte and refused when others can read them.
"""

from __future__ import annotations

import base64
import binascii
import os
import stat
import struct
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
import zmq
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from zmq.utils import z85

from daemon.errors import ConfigError
from daemon.yamlfile import YamlError, parse_yaml

Role = Literal["camera", "subscriber", "bridge"]
_Model = TypeVar("_Model")
_SERVER_PUBLIC = "server.public.yaml"


def _is_z85(key: str) -> str:
    """libzmq takes no other key, and says no more than "Invalid argument"."""
    try:
        z85.decode(key)
    except (ValueError, KeyError, struct.error):
        raise ValueError("is not a key in Z85; was it changed or cut when it was copied?") from None
    return key


_Z85_KEY = Annotated[str, Field(min_length=40, max_length=40), AfterValidator(_is_z85)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TrustedKey(_Strict):
    """A key whose signature makes a bundle acceptable; `publicKey` is base64 of the 32 raw bytes."""

    name: str
    publicKey: str

    def verifies(self, signature: bytes, message: bytes) -> bool:
        try:
            Ed25519PublicKey.from_public_bytes(base64.b64decode(self.publicKey, validate=True)).verify(
                signature, message
            )
        except (InvalidSignature, ValueError, binascii.Error):
            return False
        return True


class Peer(_Strict):
    """Somebody who may connect: what they may be, and the topics (shell patterns) they may speak or hear on."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
    publicKey: _Z85_KEY
    roles: Annotated[list[Role], Field(min_length=1)]
    topics: list[str] = ["*"]

    def may(self, role: Role, topic: str | None = None) -> bool:
        return role in self.roles and (topic is None or any(fnmatchcase(topic, pattern) for pattern in self.topics))


class CurvePublic(_Strict):
    publicKey: _Z85_KEY


class CurvePair(CurvePublic):
    secretKey: Annotated[_Z85_KEY, Field(repr=False)]


class PeerFile(CurvePair):
    """What a peer's machine needs: its own pair and the server's public key."""

    serverKey: _Z85_KEY


@dataclass(frozen=True)
class Keyring:
    """What the daemon needs to open its sockets."""

    server: CurvePair
    peers: tuple[Peer, ...]

    def peer(self, public_key: str) -> Peer | None:
        return next((peer for peer in self.peers if peer.publicKey == public_key), None)


def load_keyring(folder: Path) -> Keyring:
    """The server's pair and the peers. Raises ConfigError where one is missing, unreadable or open to others."""
    server = _load_server(folder)
    public_file = folder / _SERVER_PUBLIC
    if public_file.exists() and (told := _load(public_file, CurvePublic).publicKey) != server.publicKey:
        problem = f"has {told}, which peers were given; the daemon's own is {server.publicKey}"
        raise ConfigError(str(public_file), [f"{problem}: bring the key that belongs to it, or delete this file"])
    return Keyring(server, load_peers(folder))


def load_peers(folder: Path) -> tuple[Peer, ...]:
    """Who may connect; nobody where there is no list. Raises ConfigError."""
    peers_file = folder / "peers.yaml"
    peers = (
        _load(peers_file, list[Peer], hint="make one with: inspectd keygen peer NAME") if peers_file.exists() else []
    )
    names = {key: [peer.name for peer in peers if peer.publicKey == key] for key in {p.publicKey for p in peers}}
    twice = [
        f"{' and '.join(same)} have one publicKey; each peer needs its own" for same in names.values() if len(same) > 1
    ]
    if twice:
        raise ConfigError(str(peers_file), twice)
    return tuple(peers)


def server_public_key(folder: Path) -> str:
    """What peers are given; known also where the pair is a credential. Raises ConfigError."""
    if not (folder / "server.yaml").exists() and (folder / _SERVER_PUBLIC).exists():
        return _load(folder / _SERVER_PUBLIC, CurvePublic).publicKey
    return _load_server(folder).publicKey


def _load_server(folder: Path) -> CurvePair:
    """The credential `server.yaml` where the service has one, else the folder's file."""
    if credentials := os.environ.get("CREDENTIALS_DIRECTORY"):
        try:
            # Modes are not asked for: systemd gives the file to the service's user by an access list, which looks like
            # a group's right, and lets nobody else into the folder.
            return _load(Path(credentials) / "server.yaml", CurvePair)
        except ConfigError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
    hint = "make it with: inspectd keygen server, or give the service the credential server.yaml"
    return _load(folder / "server.yaml", CurvePair, hint=hint, secret=True)


def load_trusted(path: Path) -> list[TrustedKey]:
    """The keys whose engines are accepted. Raises ConfigError."""
    return _load(path, list[TrustedKey], hint="the first build makes it, or: inspectd keygen signing")


def load_peer_file(path: Path) -> PeerFile:
    """A peer's own key file, as `keygen peer` wrote it, or as systemd hands it over. Raises ConfigError."""
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    is_credential = credentials is not None and path.parent == Path(credentials)  # its mode: see _load_server
    return _load(path, PeerFile, hint="make it with: inspectd keygen peer NAME", secret=not is_credential)


def make_signing_key(folder: Path, name: str = "local") -> Ed25519PrivateKey:
    """The folder's signing key, made and listed in trusted.yaml where there is none yet."""
    path = folder / "signing.key"
    if path.exists():
        _refuse_open(path)
        try:
            key = load_pem_private_key(path.read_bytes(), password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise ConfigError(
                str(path), ["is not an unencrypted private key in PEM; restore it, or delete it"]
            ) from None
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError(str(path), [f"holds a {type(key).__name__}, wanted an Ed25519 private key"])
        return key
    key = Ed25519PrivateKey.generate()
    _write_secret(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public = base64.b64encode(key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)).decode()
    trusted_file = folder / "trusted.yaml"
    trusted = load_trusted(trusted_file) if trusted_file.exists() else []
    listed = [*trusted, TrustedKey(name=name, publicKey=public)]
    _write_public(trusted_file, [entry.model_dump() for entry in listed])
    return key


def make_server_key(folder: Path) -> CurvePair:
    """The daemon's CURVE pair, made where there is none yet. Raises ConfigError where only its public half is here."""
    path, public_file = folder / "server.yaml", folder / _SERVER_PUBLIC
    if path.exists():
        pair = _load(path, CurvePair, secret=True)
    elif public_file.exists():
        raise ConfigError(
            str(public_file),
            [f"is there and {path} is not: the pair is kept elsewhere; delete this file to make another"],
        )
    else:
        pair = _new_pair()
        _write_secret(path, _dump(pair.model_dump()))
    if not public_file.exists():
        _write_public(public_file, CurvePublic(publicKey=pair.publicKey).model_dump())
    return pair


def make_peer(folder: Path, name: str, roles: list[Role], topics: list[str]) -> Path:
    """A new peer in peers.yaml, and the file to carry to its machine. Raises ConfigError if the name is taken."""
    peers_file = folder / "peers.yaml"
    peers = _load(peers_file, list[Peer]) if peers_file.exists() else []
    if not (folder / _SERVER_PUBLIC).exists():
        if peers and not (folder / "server.yaml").exists():
            # A folder from before the public half was kept, its pair a credential: another pair would stop the daemon.
            problem = f"lists peers, and neither half of the server's key is in {folder}"
            wanted = f"bring {_SERVER_PUBLIC} (docs/install.md says how), or make another: inspectd keygen server"
            raise ConfigError(str(peers_file), [f"{problem}; {wanted}"])
        make_server_key(folder)
    server_key = server_public_key(folder)
    if any(peer.name == name for peer in peers):
        raise ConfigError(str(peers_file), [f"peer {name!r} is there already; take its entry out to make a new key"])
    pair = _new_pair()
    try:
        peer = Peer(name=name, publicKey=pair.publicKey, roles=roles, topics=topics)
    except ValidationError as error:
        raise ConfigError("keygen peer", _faults(error)) from error
    path = folder / f"{name}.peer.yaml"
    path.unlink(missing_ok=True)  # of an entry that was taken out of peers.yaml
    _write_secret(path, _dump({**pair.model_dump(), "serverKey": server_key}))
    _write_public(peers_file, [entry.model_dump() for entry in (*peers, peer)])
    return path


def _new_pair() -> CurvePair:
    public, secret = zmq.curve_keypair()
    return CurvePair(publicKey=public.decode(), secretKey=secret.decode())


def _load(path: Path, kind: type[_Model], *, hint: str = "", secret: bool = False) -> _Model:
    try:
        if secret:
            _refuse_open(path)
        elif problem := foreign_hands(path.stat()):
            raise ConfigError(str(path), [problem])
        data = parse_yaml(path.read_text(encoding="utf-8"))
        return TypeAdapter(kind).validate_python(data)
    except FileNotFoundError as error:
        raise ConfigError(str(path), [f"is not there; {hint}"]) from error
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError:
        raise ConfigError(str(path), ["is not UTF-8 text"]) from None
    except YamlError as error:
        raise ConfigError(str(path), [str(error)]) from None
    except ValidationError as error:
        raise ConfigError(str(path), _faults(error)) from None


def _faults(error: ValidationError) -> list[str]:
    """Without the values: a key file's faults must not print its secrets."""
    return [f"{'.'.join(str(step) for step in fault['loc'])}: {fault['msg']}" for fault in error.errors()]


def foreign_hands(status: os.stat_result) -> str | None:
    """Why a file could be a stranger's work; None where it is root's or our own, and not everybody's to write."""
    if status.st_uid not in {0, os.geteuid()}:
        return f"belongs to user {status.st_uid}, wanted root or the user that runs this; chown it, if you trust it"
    if status.st_mode & stat.S_IWOTH:
        return f"has mode {stat.S_IMODE(status.st_mode):04o}, anyone can write it; chmod o-w, if you trust it"
    return None


def _refuse_open(path: Path) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ConfigError(str(path), [f"has mode {mode:04o}, others can read this secret; chmod 600 {path}"])


def _write_secret(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def _write_public(path: Path, data: Any) -> None:
    """Replace a public file in one step, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(_dump(data))
    partial.chmod(0o644)  # public, and nobody else's to write, whatever the umask
    partial.replace(path)


def _dump(data: Any) -> bytes:
    return yaml.safe_dump(data, sort_keys=False).encode()
