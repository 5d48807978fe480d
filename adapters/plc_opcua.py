"""OPC UA server: one result object that a PLC reads or subscribes to, and a method by which it acknowledges.

Names are those of OPC 40100-1 (Machine Vision) where it has one: resultId, partId, resultState, isPartial,
creationTime. Only clients whose certificate lies in the folder of trusted ones may open a session, over an encrypted
channel; the certificate of a client that was turned away is kept in `rejected`, so that trusting it is one move.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from asyncua import Server, ua, uamethod
from asyncua.common.node import Node
from asyncua.crypto.cert_gen import setup_self_signed_certificate
from asyncua.crypto.permission_rules import User, UserRole
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from adapters.plc import Handover, Output
from daemon.errors import ConfigError, UsageError
from daemon.line.permit import Lease

log = logging.getLogger("inspectd.plc")

NAMESPACE = "urn:inspectd:plc"
_APPLICATION = "urn:inspectd:plc:server"
_COMPLETED = 1  # OPC 40100-1, ResultState
_MOST_REJECTED = 20  # certificates kept; a stranger must not fill the disk
_POLICIES = [
    ua.SecurityPolicyType.Basic256Sha256_SignAndEncrypt,
    ua.SecurityPolicyType.Aes256Sha256RsaPss_SignAndEncrypt,
]


@dataclass(frozen=True)
class Endpoint:
    """Where to listen. Without `certificates` nothing is encrypted and nobody asked who they are."""

    host: str
    port: int
    certificates: Path | None

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"opc.tcp://{host}:{self.port}/inspectd"


# Facts first and the number behind them, so that who sees a new number finds what belongs to it.
_FIELDS: tuple[tuple[str, ua.VariantType, Callable[[Output], Any]], ...] = (
    ("resultId", ua.VariantType.String, lambda o: f"{o.camera}/{o.epoch}/{o.seq}" if o.number else ""),
    ("isPartial", ua.VariantType.Boolean, lambda _: False),
    ("resultState", ua.VariantType.Int32, lambda o: _COMPLETED if o.number else 0),
    ("partId", ua.VariantType.String, lambda o: o.part_id),
    ("camera", ua.VariantType.String, lambda o: o.camera),
    ("seq", ua.VariantType.UInt64, lambda o: o.seq),
    ("parts", ua.VariantType.UInt32, lambda o: o.parts),
    ("outcome", ua.VariantType.Byte, lambda o: int(o.shown)),
    ("reason", ua.VariantType.String, lambda o: o.reason or ""),
    ("waiting", ua.VariantType.UInt16, lambda o: o.waiting),
    ("overrun", ua.VariantType.UInt16, lambda o: o.overrun),
    ("session", ua.VariantType.UInt16, lambda o: o.session),
    ("number", ua.VariantType.UInt16, lambda o: o.number),
    ("ready", ua.VariantType.Boolean, lambda o: o.is_ready),
    ("alive", ua.VariantType.UInt16, lambda o: o.alive),
)


class OpcUaServer:
    """Serves for as long as `run` is awaited."""

    def __init__(self, endpoint: Endpoint, handover: Handover, cycle_s: float) -> None:
        self._endpoint, self._handover, self._cycle_s = endpoint, handover, cycle_s
        self._nodes: dict[str, Node] = {}
        self._told: dict[str, Any] = {}
        self._lease: Lease | None = None
        self._updating = asyncio.Lock()

    async def run(self, lease: Lease) -> None:
        """Until cancelled. Raises UsageError where the address cannot be had, ConfigError for unusable certificates."""
        server = await self._make()
        self._lease = lease
        try:
            await server.start()
        except OSError as error:
            raise UsageError(f"cannot listen at {self._endpoint.url}: {error}; is the port taken?") from error
        log.warning("plc server listens url=%s session=%d", self._endpoint.url, self._handover.session)
        try:
            while True:
                began_s = time.monotonic()
                await self._update()
                await asyncio.sleep(max(0.0, self._cycle_s - (time.monotonic() - began_s)))
        finally:
            await server.stop()

    async def _update(self) -> None:
        """Write what has changed. A PASS must hold until the next time, and once more."""
        assert self._lease is not None
        async with self._updating:
            output = self._handover.show(self._lease, time.monotonic_ns(), int(2e9 * self._cycle_s))
            if output.number != self._told.get("number") and output.number:
                await self._tell("creationTime", datetime.now(timezone.utc), ua.VariantType.DateTime)
            for name, kind, value in _FIELDS:
                await self._tell(name, value(output), kind)

    async def _tell(self, name: str, value: Any, kind: ua.VariantType) -> None:
        if self._told.get(name) != value:
            await self._nodes[name].write_value(ua.DataValue(ua.Variant(value, kind)))
            self._told[name] = value

    async def _make(self) -> Server:
        folder = self._endpoint.certificates
        server = Server(user_manager=TrustedClients(folder) if folder else None)
        await server.init()
        server.set_endpoint(self._endpoint.url)
        server.set_server_name("inspectd PLC bridge")
        await server.set_application_uri(_APPLICATION)
        server.set_identity_tokens([ua.AnonymousIdentityToken])  # who a client is, its certificate says
        if folder is None:
            server.set_security_policy([ua.SecurityPolicyType.NoSecurity])
        else:
            certificate, key = await own_certificate(folder)
            await server.load_certificate(str(certificate))
            await server.load_private_key(str(key))
            server.set_security_policy(_POLICIES)
        index = await server.register_namespace(NAMESPACE)
        place = await server.nodes.objects.add_object(ua.NodeId("inspection", index), f"{index}:inspection")
        blank = [("creationTime", ua.VariantType.DateTime, datetime.fromtimestamp(0, timezone.utc))]
        blank += [(name, kind, ua.get_default_value(kind)) for name, kind, _ in _FIELDS]
        for name, kind, value in blank:
            self._nodes[name] = await place.add_variable(ua.NodeId(name, index), f"{index}:{name}", value, kind)
        arguments = [ua.VariantType.UInt16, ua.VariantType.UInt16]
        await place.add_method(
            ua.NodeId("acknowledge", index), f"{index}:acknowledge", self._acknowledge(), arguments,
            [ua.VariantType.Boolean],
        )  # fmt: skip
        return server

    def _acknowledge(self) -> Callable[..., Awaitable[Any]]:
        @uamethod
        async def acknowledge(_parent: Any, session: int, number: int) -> bool:
            """Whether that was the result that is shown. When the answer comes, the next one is."""
            is_it = self._handover.acknowledge(session, number)
            if is_it:
                await self._update()
            return is_it

        return acknowledge


class TrustedClients:
    """Lets in whose channel was opened with a certificate that lies in `folder`/trusted; read anew each time."""

    def __init__(self, folder: Path) -> None:
        self._trusted, self._rejected = folder / "trusted", folder / "rejected"

    def get_user(
        self, _server: Any, username: str | None = None, password: str | None = None, certificate: Any = None
    ) -> User | None:
        """The user of a session that is about to open; None turns it away."""
        del username, password
        if certificate is None:
            log.warning("plc client refused: it has no certificate")
            return None
        if certificate in load_certificates(self._trusted):
            return User(role=UserRole.User)
        name = hashlib.sha256(certificate).hexdigest()[:16]
        self._rejected.mkdir(mode=0o700, exist_ok=True)
        if len(list(self._rejected.iterdir())) < _MOST_REJECTED:
            (self._rejected / f"{name}.der").write_bytes(certificate)
        log.warning("plc client refused: move %s to %s to trust it", self._rejected / f"{name}.der", self._trusted)
        return None


def load_certificates(folder: Path) -> set[bytes]:
    """The certificates of a folder as DER; files that hold none are told and passed over."""
    found = set()
    for path in sorted(folder.glob("*")) if folder.is_dir() else ():
        try:
            data = path.read_bytes()
            is_text = data.lstrip().startswith(b"-----BEGIN")
            certificate = x509.load_pem_x509_certificate(data) if is_text else x509.load_der_x509_certificate(data)
        except (OSError, ValueError) as error:
            log.error("no certificate in %s: %s", path, error)  # noqa: TRY400 - the trace adds nothing
            continue
        found.add(certificate.public_bytes(Encoding.DER))
    return found


async def own_certificate(folder: Path) -> tuple[Path, Path]:
    """This server's certificate and key, made where there is none. Raises ConfigError."""
    certificate, key = folder / "server.der", folder / "server.pem"
    try:
        _make_private(folder)
        before = os.umask(0o077)
        try:
            await setup_self_signed_certificate(
                key, certificate, _APPLICATION, socket.gethostname(), [ExtendedKeyUsageOID.SERVER_AUTH],
                {"organizationName": "inspectd"},
            )  # fmt: skip
        finally:
            os.umask(before)
    except (OSError, ValueError) as error:
        raise ConfigError(str(folder), [f"no usable certificate: {error}; wanted a folder of this user's"]) from error
    return certificate, key


def _make_private(folder: Path) -> None:
    (folder / "trusted").mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)


def field_names() -> Sequence[str]:
    """Every variable that the server has."""
    return ["creationTime", *(name for name, _, _ in _FIELDS)]
