"""The sockets: who gets in, who is counted, what a message may carry, and what a subscriber may hear."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
import zmq

from daemon.config import Config, parse_config
from daemon.endpoints import Endpoint
from daemon.errors import ConfigError
from daemon.keys import Keyring, PeerFile, load_keyring, load_peer_file, make_peer, make_server_key
from daemon.line import ports as ports_module
from daemon.line.ports import MOST_PARTS, Message, Ports, receive
from daemon.line.sockets import Bounds, Doorman, ZapGate, bind, connect, refuses_strangers
from tests.daemons import ROOT, tcp

BOUNDS = Bounds(1 << 16)
PATIENCE_S = 10.0  # never waited for where things are as they should be
REFUSED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_DISCONNECTED
)


@pytest.fixture
def context() -> Iterator[Any]:
    context: zmq.Context[Any] = zmq.Context()
    yield context
    context.destroy(linger=0)


@dataclass
class Keys:
    """A key folder with peers; `denied` gathers the reasons that sockets give."""

    folder: Path
    denied: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        make_server_key(self.folder)

    def deny(self, reason: str, who: str) -> None:
        assert "=" in who
        self.denied.append(reason)

    def peer(self, name: str, *topics: str, role: Any = "subscriber") -> PeerFile:
        return load_peer_file(make_peer(self.folder, name, [role], list(topics) or ["*"]))

    @property
    def ring(self) -> Keyring:
        return load_keyring(self.folder)


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "keys")


def serve_until(happened: Callable[[], Any], *served: tuple[Any, Callable[[], Any]]) -> Any:
    """Serve sockets, as the loop does, until something has happened; gives what it was."""
    poller, until = zmq.Poller(), time.monotonic() + PATIENCE_S
    for socket, _ in served:
        poller.register(socket, zmq.POLLIN)
    while time.monotonic() < until:
        if (result := happened()) is not None:
            return result
        ready = dict(poller.poll(10))
        for socket, serve in served:
            if socket in ready:
                serve()
    raise AssertionError("it never happened")


def taken(socket: Any) -> list[bytes] | None:
    """A message that waits, or None."""
    return socket.recv_multipart(zmq.NOBLOCK) if socket.poll(0) else None


def events(monitor: Any) -> int | None:
    parts = taken(monitor)
    return int.from_bytes(parts[0][:2], "little") if parts else None


def knock(context: Any, address: str, keys: PeerFile | None) -> tuple[Any, Any]:
    """A camera that says hello, and the monitor that saw it from its first byte on."""
    client = context.socket(zmq.DEALER)
    client.linger = 0
    if keys is not None:
        client.curve_publickey, client.curve_secretkey = keys.publicKey.encode(), keys.secretKey.encode()
        client.curve_serverkey = keys.serverKey.encode()
    monitor = client.get_monitor_socket(REFUSED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
    client.connect(address)
    client.send(b"hello")
    return client, monitor


def router(context: Any, keys: Keys) -> tuple[Any, ZapGate, str]:
    gate = ZapGate(context, keys.ring, keys.deny)
    endpoint = Endpoint(bind=tcp())
    return bind(context, zmq.ROUTER, endpoint, keys.ring, BOUNDS), gate, endpoint.bind


# --- who gets in


def test_known_peer_gets_in_and_its_key_is_on_each_message(context: Any, keys: Keys) -> None:
    peer = keys.peer("cam1", role="camera")
    socket, gate, address = router(context, keys)
    client = connect(context, zmq.DEALER, address, peer)
    client.send_multipart([b"a", b"b"])
    message = serve_until(lambda: receive(socket, routed=True), (gate.socket, gate.serve))
    assert [bytes(part) for part in message.parts] == [b"a", b"b"]
    assert message.key == peer.publicKey
    assert keys.denied == []
    gate.close()


def test_unknown_key_is_refused_and_counted(context: Any, keys: Keys, tmp_path: Path) -> None:
    stranger = Keys(tmp_path / "other").peer("cam1").model_copy(update={"serverKey": keys.ring.server.publicKey})
    socket, gate, address = router(context, keys)
    client, monitor = knock(context, address, stranger)
    event = serve_until(lambda: events(monitor), (gate.socket, gate.serve))
    assert event & REFUSED
    assert set(keys.denied) == {"UNKNOWN_KEY"}
    assert receive(socket, routed=True) is None
    client.disable_monitor()
    gate.close()


def test_peer_with_the_wrong_server_key_is_refused(context: Any, keys: Keys, tmp_path: Path) -> None:
    mistaken = keys.peer("cam1").model_copy(update={"serverKey": Keys(tmp_path / "other").ring.server.publicKey})
    socket, gate, address = router(context, keys)
    client, monitor = knock(context, address, mistaken)
    event = serve_until(lambda: events(monitor), (gate.socket, gate.serve))
    assert event & REFUSED
    assert receive(socket, routed=True) is None
    client.disable_monitor()
    gate.close()


def test_peer_without_a_key_is_refused(context: Any, keys: Keys) -> None:
    socket, gate, address = router(context, keys)
    client, monitor = knock(context, address, None)
    event = serve_until(lambda: events(monitor), (gate.socket, gate.serve))
    assert event & REFUSED
    assert receive(socket, routed=True) is None
    client.disable_monitor()
    gate.close()


def test_curve_needs_keys_on_our_side(context: Any) -> None:
    with pytest.raises(ConfigError, match="inspectd keygen server"):
        bind(context, zmq.ROUTER, Endpoint(bind=tcp()), None, BOUNDS)


KINDS = pytest.mark.parametrize("kind", [zmq.ROUTER, zmq.PULL, zmq.XPUB], ids=["router", "pull", "xpub"])


@KINDS
@pytest.mark.parametrize("host", ["127.0.0.1", "*", "0.0.0.0"])
def test_self_test_sees_that_a_curve_socket_is_closed(context: Any, keys: Keys, kind: int, host: str) -> None:
    endpoint = Endpoint(bind=tcp().replace("127.0.0.1", host))
    socket = bind(context, kind, endpoint, keys.ring, BOUNDS)  # ZAP is not served, as at the daemon's start
    assert refuses_strangers(endpoint.bind)
    socket.close()


@KINDS
def test_self_test_sees_that_a_plain_socket_is_open(context: Any, kind: int) -> None:
    """Also where the socket takes no DEALER: a stranger of the right kind would get in."""
    endpoint = Endpoint(bind=tcp(), plain=True)
    socket = bind(context, kind, endpoint, None, BOUNDS)
    assert not refuses_strangers(endpoint.bind)
    socket.close()


def test_silence_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daemon.line.sockets._SELF_TEST_MS", 50)
    assert not refuses_strangers(tcp())


# --- what a peer may do


def doorman(keys: Keys) -> tuple[Doorman, Callable[[str], str]]:
    keys.peer("cam1", "frame/test/cam1", role="camera")
    ring = keys.ring
    public = {peer.name: peer.publicKey for peer in ring.peers}
    return Doorman(ring, keys.deny), lambda name: public.get(name, "x" * 40)


@pytest.mark.parametrize(
    ("name", "role", "topic", "reason"),
    [
        ("cam1", "camera", "frame/test/cam1", None),
        ("cam1", "camera", "frame/test/cam2", "FOREIGN_TOPIC"),
        ("cam1", "camera", "frame/test/cam11", "FOREIGN_TOPIC"),
        ("cam1", "bridge", None, "WRONG_ROLE"),
        ("cam1", "subscriber", "frame/test/cam1", "WRONG_ROLE"),
        ("nobody", "camera", "frame/test/cam1", "UNKNOWN_KEY"),
    ],
)
def test_peer_may_only_what_its_entry_says(
    keys: Keys, name: str, role: Any, topic: str | None, reason: str | None
) -> None:
    door, key = doorman(keys)
    assert door.admits(curve=True, key=key(name), role=role, topic=topic) == (reason is None)
    assert keys.denied == ([reason] if reason else [])


def test_plain_endpoint_has_no_keys_to_ask_for(keys: Keys) -> None:
    door, _ = doorman(keys)
    assert door.admits(curve=False, key="", role="bridge")
    assert not Doorman(None, keys.deny).admits(curve=True, key="", role="bridge")


# --- binding


def test_ipc_socket_is_for_owner_and_group(context: Any, tmp_path: Path) -> None:
    path = tmp_path / "run" / "a.sock"
    mask = os.umask(0o022)
    try:
        socket = bind(context, zmq.ROUTER, Endpoint(bind=f"ipc://{path}"), None, BOUNDS)
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    socket.close()


def test_address_in_use_is_told_with_what_holds_it(context: Any) -> None:
    endpoint = Endpoint(bind=tcp(), plain=True)
    holder = bind(context, zmq.ROUTER, endpoint, None, BOUNDS)
    with pytest.raises(ConfigError, match=r"cannot be bound.*another process holds it") as caught:
        bind(context, zmq.ROUTER, endpoint, None, BOUNDS)
    assert endpoint.bind in str(caught.value)
    holder.close()


@pytest.mark.parametrize("address", ["tcp://no.such.host.invalid:5550", "tcp://203.0.113.9:5550"])
def test_address_that_this_machine_has_not_is_a_fault_of_the_configuration(context: Any, address: str) -> None:
    with pytest.raises(ConfigError, match="cannot be bound"):
        bind(context, zmq.ROUTER, Endpoint(bind=address, plain=True), None, BOUNDS)


def test_ipc_path_that_is_too_long_is_told_with_the_limit(context: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at most 107 characters"):
        bind(context, zmq.ROUTER, Endpoint(bind=f"ipc://{tmp_path}/{'x' * 120}"), None, BOUNDS)


# --- receiving


def pair(context: Any, kind: int, peer_kind: int, tmp_path: Path) -> tuple[Any, Any]:
    endpoint = Endpoint(bind=f"ipc://{tmp_path}/s")
    return bind(context, kind, endpoint, None, BOUNDS), connect(context, peer_kind, endpoint.bind, None)


def received(socket: Any, *, routed: bool) -> Message:
    assert socket.poll(PATIENCE_S * 1000)
    message = receive(socket, routed=routed)
    assert message is not None
    return message


def test_nothing_waiting_is_none(context: Any, tmp_path: Path) -> None:
    socket, _ = pair(context, zmq.PULL, zmq.PUSH, tmp_path)
    assert receive(socket, routed=False) is None


@pytest.mark.parametrize("count", [1, 2, MOST_PARTS])
@pytest.mark.parametrize(("kind", "peer_kind"), [(zmq.ROUTER, zmq.DEALER), (zmq.PULL, zmq.PUSH)])
def test_message_of_few_parts_comes_whole(context: Any, tmp_path: Path, kind: int, peer_kind: int, count: int) -> None:
    socket, client = pair(context, kind, peer_kind, tmp_path)
    parts = [b"x" * (1000 * number) for number in range(count)]  # the first is empty
    client.send_multipart(parts)
    message = received(socket, routed=kind == zmq.ROUTER)
    assert [bytes(part) for part in message.parts] == parts
    assert message.key == ""
    assert bool(message.identity) == (kind == zmq.ROUTER)


@pytest.mark.parametrize("count", [MOST_PARTS + 1, MOST_PARTS + 2, 10_000])
@pytest.mark.parametrize(("kind", "peer_kind"), [(zmq.ROUTER, zmq.DEALER), (zmq.PULL, zmq.PUSH)])
def test_message_of_many_parts_keeps_few_and_the_next_comes_whole(
    context: Any, tmp_path: Path, kind: int, peer_kind: int, count: int
) -> None:
    socket, client = pair(context, kind, peer_kind, tmp_path)
    client.send_multipart([b"%d" % number for number in range(count)])
    client.send_multipart([b"the", b"next"])
    message = received(socket, routed=kind == zmq.ROUTER)
    assert len(message.parts) <= MOST_PARTS
    assert [bytes(part) for part in message.parts[:3]] == [b"0", b"1", b"2"]
    assert [bytes(part) for part in received(socket, routed=kind == zmq.ROUTER).parts] == [b"the", b"next"]


def test_router_message_without_any_part_is_no_crash(context: Any, tmp_path: Path) -> None:
    socket, client = pair(context, zmq.ROUTER, zmq.DEALER, tmp_path)
    client.send(b"")
    assert [bytes(part) for part in received(socket, routed=True).parts] == [b""]


def test_part_above_the_limit_is_not_taken(context: Any, tmp_path: Path) -> None:
    endpoint = Endpoint(bind=f"ipc://{tmp_path}/s")
    socket = bind(context, zmq.PULL, endpoint, None, Bounds(1000))
    client = connect(context, zmq.PUSH, endpoint.bind, None)
    monitor = client.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    client.send(b"x" * 1001)
    assert monitor.poll(PATIENCE_S * 1000)
    client.send(b"x" * 1000)
    assert len(received(socket, routed=False).parts[0]) == 1000
    client.disable_monitor()


# A process of its own: with ZMTP's heartbeats libzmq aborts it when the next one is due.
FLOOD_AND_GO = """
import sys, time, zmq
from daemon.endpoints import Endpoint
from daemon.line.sockets import Bounds, bind, connect
near, far = zmq.Context(), zmq.Context()
daemon = bind(near, zmq.ROUTER, Endpoint(bind=sys.argv[1], plain=True), None, Bounds(10_000))
camera = connect(far, zmq.DEALER, sys.argv[1], None)
for _ in range(1000):
    camera.send(bytes(1000))
assert daemon.poll(10_000)
camera.close(linger=0)
far.term()
time.sleep(2.5)  # more than one heartbeat, while nothing is read
read = 0
while daemon.poll(300):
    read += len(daemon.recv_multipart()) > 0
print("read", read)
"""


def test_peer_that_fills_the_queue_and_goes_does_not_end_the_daemon() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FLOOD_AND_GO, tcp()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) > 0


# A process of its own, because libzmq's answer to a queue that outlived its connection is to abort.
STALLED_PEER = """
import sys, zmq
from daemon.endpoints import Endpoint
from daemon.line import sockets
sockets._PEER_GONE_S = 2
kind, address = getattr(zmq, sys.argv[1]), sys.argv[2]
server, tight = zmq.Context(), zmq.Context()
kept = zmq.XPUB if kind == zmq.SUB else zmq.ROUTER
daemon = sockets.bind(server, kept, Endpoint(bind=address, plain=True), None, sockets.Bounds(10_000))
cut = daemon.get_monitor_socket(zmq.EVENT_DISCONNECTED)
tight.setsockopt(zmq.RCVHWM, 1)
tight.setsockopt(zmq.RCVBUF, 4096)
peer = sockets.connect(tight, kind, address, None, immediate=True)

def introduce():
    "Until the daemon's side can send to the peer; gives what goes before a message."
    if kind == zmq.SUB:
        peer.subscribe("")
    while not daemon.poll(20):
        peer.poll(20)
        if kind == zmq.DEALER:
            try:
                peer.send(b"HELLO", zmq.NOBLOCK)
            except zmq.Again:
                pass
    return daemon.recv_multipart()[:1] if kind == zmq.DEALER else []

who = introduce()
for _ in range(500):
    daemon.send_multipart([*who, bytes(1000)])
assert cut.poll(20_000), "a peer that does not read was not cut off"
while peer.poll(300):
    peer.recv()
who = introduce() if kind == zmq.DEALER else []
while not (peer.poll(20) and peer.recv() == b"fresh"):
    daemon.send_multipart([*who, b"fresh"])
print("read again")
"""


@pytest.mark.parametrize("kind", ["SUB", "DEALER"])
def test_peer_that_stopped_reading_and_was_cut_off_reads_again(kind: str) -> None:
    command = [sys.executable, "-c", STALLED_PEER, kind, tcp()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert (done.returncode, done.stdout) == (0, "read again\n"), done.stderr


# --- all ports together


def make_config(folder: Path, **changes: Any) -> Config:
    data = {
        "version": 1,
        "line": "test",
        "inputs": [{"kind": "router", "bind": tcp()}, {"kind": "pull", "bind": "ipc://pull.sock"}],
        "results": {"bind": tcp()},
        "permits": {"bind": tcp()},
        "control": {"bind": "ipc://control.sock"},
        "cameras": {"cam1": {"product": "part", "deadline_ms": 100, "valid_ms": 100}},
        **changes,
    }
    return parse_config(yaml.safe_dump(data), "config.yaml", folder)


@pytest.fixture
def opened(keys: Keys, tmp_path: Path) -> Iterator[Callable[..., Ports]]:
    """Opens the ports of a configuration, and closes them at the end."""
    everything: list[Ports] = []

    def open_ports(**changes: Any) -> Ports:
        everything.append(Ports(make_config(tmp_path, **changes), keys.ring, keys.deny))
        return everything[-1]

    yield open_ports
    for ports in everything:
        ports.close(0)


def test_ports_refuse_strangers_and_start(opened: Callable[..., Ports]) -> None:
    ports = opened()
    ports.prove_closed()
    assert [socket.type for socket in ports.inputs] == [zmq.ROUTER, zmq.PULL]


@pytest.mark.parametrize("path", ["inputs[0]", "results", "permits"])
def test_ports_do_not_start_when_a_socket_lets_strangers_in(
    opened: Callable[..., Ports], monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """The socket is opened without CURVE although its configuration asks for it."""

    def forgetful(context: Any, kind: int, endpoint: Endpoint, *rest: Any, **more: Any) -> Any:
        forgets = endpoint.bind == wanted.get(path)
        return bind(context, kind, endpoint.model_copy(update={"plain": True}) if forgets else endpoint, *rest, **more)

    binds = {"inputs[0]": tcp(), "results": tcp(), "permits": tcp()}
    wanted = {path: binds[path]}
    monkeypatch.setattr(ports_module, "bind", forgetful)
    ports = opened(
        inputs=[{"kind": "router", "bind": binds["inputs[0]"]}],
        results={"bind": binds["results"]},
        permits={"bind": binds["permits"]},
    )
    with pytest.raises(ConfigError, match="did not refuse a peer without a key") as caught:
        ports.prove_closed()
    assert str(caught.value).startswith(f"{path}: {binds[path]}")


def test_plain_and_ipc_endpoints_are_not_asked(opened: Callable[..., Ports], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(ports_module, "refuses_strangers", lambda address: not asked.append(address))
    plain, curve = {"bind": tcp(), "plain": True}, {"bind": tcp()}
    opened(results=plain, permits=curve, inputs=[{"kind": "pull", "bind": "ipc://pull.sock"}]).prove_closed()
    assert asked == [curve["bind"]]


def test_port_in_use_closes_what_was_open_before_it(keys: Keys, tmp_path: Path) -> None:
    config = make_config(tmp_path)
    blocker: zmq.Context[Any] = zmq.Context()
    blocking = blocker.socket(zmq.ROUTER)
    blocking.bind(config.permits.bind)
    with pytest.raises(ConfigError, match="another process holds it"):
        Ports(config, keys.ring, keys.deny)
    blocker.destroy(linger=0)
    Ports(config, keys.ring, keys.deny).close(0)


def test_open_port_is_shouted_about(opened: Callable[..., Ports], monkeypatch: pytest.MonkeyPatch) -> None:
    shouted: list[str] = []
    monkeypatch.setattr(ports_module.log, "warning", lambda text, *values: shouted.append(text % values))
    address = tcp().replace("127.0.0.1", "0.0.0.0")
    opened(results={"bind": address, "plain": True}, security={"insecure": True})
    assert len(shouted) == 1
    assert shouted[0].startswith(f"INSECURE bind={address}")


@dataclass
class Listening:
    """Ports with subscribers; `publish` brings one message to each of them that may hear it."""

    ports: Ports
    context: Any

    def subscriber(self, keys: PeerFile | None, *topics: str) -> Any:
        socket = connect(self.context, zmq.SUB, self.ports._config.results.bind, keys)
        for topic in topics:
            socket.subscribe(topic)
        return socket

    def serve(self, happened: Callable[[], Any]) -> Any:
        served = ((self.ports.zap.socket, self.ports.zap.serve), (self.ports.results, self.ports.serve_subscription))
        return serve_until(happened, *served)

    def heard(self, socket: Any, *topics: str) -> list[str]:
        """Which of the topics come through. Each is sent again and again until "end", which must be subscribed."""
        found: list[str] = []

        def step() -> bool | None:
            for topic in (*topics, "end"):
                self.ports.results.send_multipart([topic.encode(), b"{}"])
            while (parts := taken(socket)) is not None:
                found.append(parts[0].decode())
            return True if found.count("end") > 2 else None

        self.serve(step)
        return sorted(set(found) - {"end", "mark"})


@pytest.fixture
def listening(opened: Callable[..., Ports], context: Any) -> Callable[[], Listening]:
    return lambda: Listening(opened(), context)


def test_subscriber_hears_only_the_topics_of_its_entry(keys: Keys, listening: Callable[[], Listening]) -> None:
    peer = keys.peer("dashboard", "result/test/cam1", "end")
    line = listening()
    socket = line.subscriber(peer, "result/test/cam2", "", "result/", "result/test/cam1", "end")
    assert line.heard(socket, "result/test/cam1", "result/test/cam2", "late/test/cam1") == ["result/test/cam1"]
    assert keys.denied.count("FOREIGN_TOPIC") == 3


def test_pattern_of_an_entry_opens_what_it_matches(keys: Keys, listening: Callable[[], Listening]) -> None:
    peer = keys.peer("dashboard", "result/test*", "end")
    line = listening()
    socket = line.subscriber(peer, "late/test", "result/test", "end")
    assert line.heard(socket, "result/test/cam1", "late/test/cam1") == ["result/test/cam1"]


def test_camera_may_not_listen(keys: Keys, listening: Callable[[], Listening]) -> None:
    camera, dashboard = keys.peer("cam1", role="camera"), keys.peer("dashboard")
    line = listening()
    deaf = line.subscriber(camera, "result/test")
    line.serve(lambda: "WRONG_ROLE" in keys.denied or None)
    assert line.heard(line.subscriber(dashboard, "result/test", "end"), "result/test/cam1") == ["result/test/cam1"]
    assert taken(deaf) is None


def test_topic_that_was_given_up_is_not_heard_any_more(keys: Keys, listening: Callable[[], Listening]) -> None:
    peer = keys.peer("dashboard")
    line = listening()
    socket = line.subscriber(peer, "result/test", "end")
    assert line.heard(socket, "result/test/cam1") == ["result/test/cam1"]
    socket.unsubscribe("result/test")
    socket.subscribe("mark")  # arrives behind the unsubscription
    line.serve(lambda: (line.ports.results.send_multipart([b"mark", b""]), _last(socket) == b"mark" or None)[1])
    assert line.heard(socket, "result/test/cam1") == []


def _last(socket: Any) -> bytes | None:
    last = None
    while (parts := taken(socket)) is not None:
        last = parts[0]
    return last


def test_noise_upstream_of_the_results_is_no_subscription(
    keys: Keys, context: Any, listening: Callable[[], Listening]
) -> None:
    peer = keys.peer("dashboard")
    line = listening()
    socket = connect(context, zmq.XSUB, line.ports._config.results.bind, peer)
    for noise in ([b""], [b"\x02result"], [b"x" * 1000], [b"\xff\xfe", b"\x02more"]):
        socket.send_multipart(noise)
    line.serve(lambda: keys.denied.count("NO_SUBSCRIPTION") == 5 or None)
    socket.send(b"\x01end")
    assert line.heard(socket, "result/test/cam1") == []


def test_peer_that_may_not_hear_cannot_take_over_anothers_subscription(
    keys: Keys, context: Any, listening: Callable[[], Listening]
) -> None:
    """libzmq takes a message that is no subscription for one, and the next request for the one after it."""

    def in_order() -> None:
        """The socket takes in what has come, in this order. Nothing is served, so nothing shows that it is there."""
        time.sleep(0.3)
        line.ports.results.poll(0)

    thief_keys, victim_keys = keys.peer("thief", role="camera"), keys.peer("victim")
    line = listening()
    thief = connect(context, zmq.XSUB, line.ports._config.results.bind, thief_keys)
    victim = line.subscriber(victim_keys, "end")
    line.heard(victim)
    thief.send(b"\x01end")
    line.serve(lambda: keys.denied or None)
    for noise in (b"no", b"subscription", b"at all"):
        thief.send(noise)
    in_order()
    victim.subscribe("result/")
    in_order()
    for topic in (b"a", b"b", b"result/"):
        thief.send(b"\x01" + topic)
    in_order()
    line.serve(lambda: True if len(keys.denied) == 8 else None)
    line.ports.results.send_multipart([b"result/test/cam1", b"secret"])
    assert not thief.poll(300), "a camera's key hears results"
    victim.unsubscribe("result/")
    victim.subscribe("result/")  # asks again: now it is heard
    line.serve(lambda: (line.ports.results.send_multipart([b"result/test/cam1", b""]), taken(victim))[1])
    assert keys.denied == ["WRONG_ROLE"] + 3 * ["NO_SUBSCRIPTION"] + 4 * ["UNSURE_SENDER"]


def test_connecting_to_what_is_no_address_leaves_no_open_socket():
    context = zmq.Context()
    with pytest.raises(zmq.ZMQError):
        connect(context, zmq.DEALER, "carrier-pigeon://roof", None)
    context.term()  # would wait for an open one for ever
