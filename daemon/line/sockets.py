"""Every socket: bound with CURVE by default, bounded in bytes, asked for its peer's key on each message.

ZAP (who may connect) is answered by pyzmq's Authenticator, which the loop serves like any other
socket; what a connected peer may then say is asked again for each message, against the key that ZAP
put into it (`sender_key`). Who does not come as far as ZAP is refused by libzmq; a Watch tells of them.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.auth.base import Authenticator

from daemon.endpoints import Endpoint
from daemon.errors import ConfigError
from daemon.keys import Keyring, PeerFile, Role
from daemon.line.denials import Denied

log = logging.getLogger("inspectd.sockets")

_ZAP_DOMAIN = b"inspectd"
_FRAMES_A_PEER = 4  # receive high-water mark: with MAXMSGSIZE this bounds what a peer can pile up
# A peer whose cable was pulled, or that reads nothing, is gone after this. The kernel sees to it: with heartbeats of
# its own libzmq (4.3.5) ends the process when a peer goes whose messages fill its queue, and so it does where the peer
# has heartbeats (docs/wire.md).
_PEER_GONE_S = 5
_PROBE_S = 1
_HANDSHAKE_MS = 5000  # a stranger that connects and says nothing holds a descriptor this long, not libzmq's 30 s
_SELF_TEST_MS = 2000


class ZapGate:
    """The Authenticator of a context: lets in the keys of peers.yaml, counts whom it turns away."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keyring: Keyring | None, denied: Denied) -> None:
        self._keyring = keyring
        self._denied = denied
        self._address = "?"  # of the peer that is asked about
        self._authenticator = Authenticator(context, log=logging.getLogger("inspectd.zap"))
        self._authenticator.configure_curve_callback("*", credentials_provider=self)
        self._authenticator.configure_curve_callback(_ZAP_DOMAIN.decode(), credentials_provider=self)
        self._authenticator.start()

    @property
    def socket(self) -> zmq.Socket[bytes]:
        return self._authenticator.zap_socket

    def callback(self, _domain: str, key: bytes) -> bool:
        """pyzmq asks here; `key` is the Z85 text of the peer's public key."""
        known = self._keyring is not None and self._keyring.peer(key.decode()) is not None
        if not known:
            self._denied("UNKNOWN_KEY", f"address={self._address} key={key.decode()}")
        return known

    def serve(self) -> None:
        """Answer one waiting request. The coroutine never suspends, so it is run without an event loop."""
        request = self.socket.recv_multipart(zmq.NOBLOCK)
        self._address = request[3].decode("ascii", "replace") if len(request) > 3 else "?"  # RFC 27: the fourth frame
        handling = self._authenticator.handle_zap_message(request)
        try:
            handling.send(None)
        except StopIteration:
            return
        handling.close()
        raise RuntimeError("pyzmq's Authenticator wants to wait; this version of pyzmq needs an event loop")

    def close(self) -> None:
        self._authenticator.stop()


_REASONS: dict[int, str] = {
    zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH: "NO_KEY",  # speaks no CURVE
    zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC: "WRONG_SERVER_KEY",  # its file is of another daemon, or of an old key
}


class Watch:
    """Hears of handshakes at one socket that libzmq itself has refused."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], watched: zmq.Socket[bytes], denied: Denied) -> None:
        self._watched = watched
        self._denied = denied
        name = f"inproc://watch-{id(self)}"
        watched.monitor(name, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
        self.socket: zmq.Socket[bytes] = context.socket(zmq.PAIR)
        self.socket.linger = 0
        self.socket.set(zmq.RCVHWM, 0)  # libzmq's own thread would wait where this is full
        self.socket.connect(name)

    def serve(self) -> None:
        """Count one refusal."""
        event, address = self.socket.recv_multipart(zmq.NOBLOCK)
        code = int.from_bytes(event[2:6], "little")
        self._denied(_REASONS.get(code, "BAD_HANDSHAKE"), f"at={address.decode()}")

    def close(self) -> None:
        self._watched.disable_monitor()
        self.socket.close()


@dataclass(frozen=True)
class Bounds:
    """What a socket takes: the largest message part, and messages that may wait in each direction."""

    most_bytes: int
    receive: int = _FRAMES_A_PEER
    send: int = 1000


def bind(
    context: zmq.Context[zmq.Socket[bytes]],
    kind: int,
    endpoint: Endpoint,
    keyring: Keyring | None,
    bounds: Bounds,
    *,
    before: Callable[[zmq.Socket[bytes]], object] | None = None,
) -> zmq.Socket[bytes]:
    """A bound socket as config asks; `before` gets it while nobody can have connected yet.

    Raises ConfigError where the address cannot be had.
    """
    socket = context.socket(kind)
    socket.linger = 0
    _limit(socket, bounds)
    if endpoint.bind.startswith("tcp://"):
        _notice_silence(socket)
        socket.set(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
    if endpoint.uses_curve:
        if keyring is None:
            raise ConfigError(endpoint.bind, ["needs keys; make them with: inspectd keygen server"])
        socket.curve_server = True
        socket.curve_secretkey = keyring.server.secretKey.encode()
        socket.curve_publickey = keyring.server.publicKey.encode()
        socket.zap_domain = _ZAP_DOMAIN
    if before is not None:
        before(socket)
    try:
        _bind_private(socket, endpoint.bind)
    except zmq.ZMQError as error:
        socket.close()
        raise ConfigError(
            endpoint.bind, [f"cannot be bound: {error.strerror}{_bind_hint(endpoint.bind, error.errno)}"]
        ) from error
    return socket


def _limit(socket: zmq.Socket[bytes], bounds: Bounds) -> None:
    socket.setsockopt(zmq.MAXMSGSIZE, bounds.most_bytes)
    socket.set(zmq.RCVHWM, bounds.receive)
    socket.set(zmq.SNDHWM, bounds.send)


def subscribe_to_all(context: zmq.Context[zmq.Socket[bytes]], address: str, bounds: Bounds) -> zmq.Socket[bytes]:
    """A SUB socket that is connected to a plain publisher, there or not yet. Raises ConfigError for a bad address."""
    socket = _client(context, zmq.SUB, address, None)
    _limit(socket, bounds)
    socket.subscribe("")
    try:
        socket.connect(address)
    except zmq.ZMQError as error:
        socket.close()
        raise ConfigError(address, [f"cannot be connected to: {error.strerror}"]) from error
    return socket


def _bind_private(socket: zmq.Socket[bytes], address: str) -> None:
    """ipc sockets are made 0660 from the start: the umask is the process's, so this runs before threads do."""
    path = Path(address.removeprefix("ipc://"))
    if not address.startswith("ipc://"):
        socket.bind(address)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    umask = os.umask(0o117)
    try:
        socket.bind(address)
    finally:
        os.umask(umask)


def _bind_hint(address: str, number: int | None) -> str:
    if number == zmq.EADDRINUSE:
        return "; another process holds it (another inspectd?): stop that, or choose another port"
    if number in (zmq.EADDRNOTAVAIL, errno.ENODEV):
        return "; this box has no such address: `ip address` lists its own, 0.0.0.0 is all of them"
    if number == errno.EACCES and address.startswith("tcp://"):
        return "; ports below 1024 are root's: choose another one"
    if address.startswith("ipc://") and len(address) > 107 + len("ipc://"):
        return "; an ipc path has at most 107 characters: put the configuration into a folder with a shorter path"
    return ""


def sender_key(part: zmq.Frame) -> str:
    """The CURVE public key (Z85) of the peer that sent this message part; '' on a plain socket."""
    try:
        return str(part.get("User-Id"))
    except zmq.ZMQError:
        return ""


class Doorman:
    """May this message's sender do this? Plain endpoints (loopback, ipc) have no keys and are trusted."""

    def __init__(self, keyring: Keyring | None, denied: Denied) -> None:
        self._keyring = keyring
        self._denied = denied

    def admits(self, *, curve: bool, key: str, role: Role, topic: str | None = None) -> bool:
        if not curve:
            return True
        peer = self._keyring.peer(key) if self._keyring else None
        if peer is not None and peer.may(role, topic):
            return True
        reason = "UNKNOWN_KEY" if peer is None else "FOREIGN_TOPIC" if peer.may(role) else "WRONG_ROLE"
        self._denied(reason, f"peer={peer.name if peer else key} as={role} topic={topic!a}")
        return False


def connect(
    context: zmq.Context[zmq.Socket[bytes]], kind: int, address: str, keys: PeerFile | None, *, immediate: bool = False
) -> zmq.Socket[bytes]:
    """A client socket, with CURVE where keys are given; for cameras, subscribers, bridges and tools.

    With `immediate` no queue outlives its connection: what is unread when it ends is lost, and nothing is sent while
    there is none. A bridge wants that, and any peer that may stop reading for seconds: else libzmq (4.3.5, its issue
    3937) aborts the process when it reads again, because the old connection's full queue wakes the new connection.
    """
    socket = _client(context, kind, address, keys)
    try:
        socket.set(zmq.IMMEDIATE, immediate)
        socket.connect(address)
    except BaseException:
        socket.close()  # a context that is forgotten waits for its open sockets for ever, in whoever collects garbage
        raise
    return socket


def _client(
    context: zmq.Context[zmq.Socket[bytes]], kind: int, address: str, keys: PeerFile | None
) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.linger = 0
    if address.startswith("tcp://"):
        _notice_silence(socket)
    if keys is not None and address.startswith("tcp://"):
        socket.curve_publickey = keys.publicKey.encode()
        socket.curve_secretkey = keys.secretKey.encode()
        socket.curve_serverkey = keys.serverKey.encode()
    return socket


def _notice_silence(socket: zmq.Socket[bytes]) -> None:
    """End connections whose other side is not there any more, whether something is to be sent to it or not."""
    socket.set(zmq.TCP_KEEPALIVE, 1)
    socket.set(zmq.TCP_KEEPALIVE_IDLE, _PROBE_S)
    socket.set(zmq.TCP_KEEPALIVE_INTVL, _PROBE_S)
    socket.set(zmq.TCP_KEEPALIVE_CNT, _PEER_GONE_S - 1)
    socket.set(zmq.TCP_MAXRT, 1000 * _PEER_GONE_S)


_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL


def refuses_strangers(address: str) -> bool:
    """Whether the tcp socket at `address` turns away a peer without a key; asked over the wire itself.

    Asked as each kind of client: a plain socket would refuse the wrong kind for its kind alone. The caller need
    not serve ZAP meanwhile: libzmq itself refuses a peer that does not speak CURVE.
    """
    events = [handshake(address, kind, None) for kind in (zmq.DEALER, zmq.PUSH, zmq.SUB)]
    return None not in events and zmq.EVENT_HANDSHAKE_SUCCEEDED not in events


def handshake(address: str, kind: int, keys: PeerFile | None) -> int | None:
    """How a client's handshake at the tcp socket `address` ended (a zmq.EVENT_...); None when nobody answered.

    A wildcard address is asked on loopback.
    """
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    client = _client(context, kind, address, keys)
    monitor = client.get_monitor_socket(_REFUSED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
    try:
        client.connect(address.replace("tcp://*", "tcp://127.0.0.1").replace("tcp://0.0.0.0", "tcp://127.0.0.1"))
        if not monitor.poll(_SELF_TEST_MS):
            return None
        return int.from_bytes(monitor.recv_multipart()[0][:2], "little")
    finally:
        client.disable_monitor()
        context.destroy(linger=0)  # closes the monitor's own socket too
