"""Strangers at every tcp port of a running daemon: garbage, wrong keys, foreign topics, floods.

Whatever they do, the real camera's parts have exactly one verdict each, and who was denied is counted and told.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import yaml
import zmq

from adapters.line import Line, disagreements
from daemon.keys import PeerFile, load_peer_file, make_peer
from daemon.line.denials import WINDOW_S, Denials
from daemon.line.sockets import connect
from daemon.line.wire import decode_header, encode_frame, encode_header
from tests.bundles import good_pixels, raw_frame
from tests.daemons import Site, free_port, make_site
from tests.lines import send, wait_for

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01"
CURVE = GREETING + b"CURVE".ljust(20, b"\0") + bytes(32)
GARBAGE = {
    "http": b"GET /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32),
    "ones": b"\xff" * 4096,
    "zeros": bytes(4096),
    "half a greeting": GREETING[:7],
    "another mechanism": GREETING + b"PLAIN".ljust(20, b"\0") + bytes(32) + b"\x04\x08\x05HELLO\x00\x00",
    "mechanism without an end": GREETING + b"A" * 52,
    "old protocol": b"\x01\x00",
    "hello that is none": CURVE + b"\x04\xc8\x05HELLO\x01\x00" + bytes(192),
    "hello cut short": CURVE + b"\x04\xc8\x05HELLO\x01\x00",
    "initiate before hello": CURVE + b"\x04\x0a\x08INITIATE" + b"x",
    "message of 2^64 bytes": CURVE + b"\x02" + b"\xff" * 8,
    "command of 2^63 bytes": CURVE + b"\x06\x7f" + b"\xff" * 7 + b"x" * 1000,
    "ping before hello": CURVE + b"\x04\x07\x04PING\x00\x0a",
    "long line": b"A" * 200_000,
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: Any) -> Iterator[Site]:
    site = make_site(tmp_path_factory.mktemp("strangers"))
    site.config["metrics"] = {"bind": f"127.0.0.1:{free_port()}"}
    site.config["cameras"]["cam2"] = site.config["cameras"]["cam1"]
    make_peer(site.folder / "keys", "cam2", ["camera"], ["frame/test/cam2"])
    site.start()
    yield site
    assert site.stop() == 0
    assert "Traceback" not in site.log


def ports(site: Site) -> list[tuple[str, int]]:
    """Every tcp port the daemon has, the metrics' too."""
    binds = [*vars(site.addresses).values(), f"tcp://{site.config['metrics']['bind']}"]
    hosts = [bind.removeprefix("tcp://").rpartition(":") for bind in binds]
    return [(host, int(port)) for host, _, port in hosts]


def denied(site: Site, reason: str) -> int:
    text = urlopen(f"http://{site.config['metrics']['bind']}/metrics", timeout=10).read().decode()
    found = [line for line in text.splitlines() if line.startswith(f'inspectd_auth_denied_total{{reason="{reason}"}}')]
    return int(float(found[0].split()[-1])) if found else 0


def stream(line: Line, count: int, step: Callable[[int], None] = lambda _: None) -> None:
    """`count` good parts at 100 a second, with `step` before each; every one must pass, once, on both channels."""
    first = max(line.parts, default=-1) + 1
    for seq in range(first, first + count):
        step(seq - first)
        send(line, seq)
        line.pump(10)
    parts = [line.parts[seq] for seq in range(first, first + count)]
    wait_for(line, lambda: all(part.results and part.permits and part.answer for part in parts))
    assert disagreements(line, set()) == []
    assert {part.answer["status"] for part in parts if part.answer} == {"accepted"}
    assert {part.results[0]["outcome"] for part in parts} == {"PASS"}


def stranger_keys(site: Site, folder: Path) -> PeerFile:
    """A key that the daemon does not know, with the daemon's own public key."""
    foreign = load_peer_file(make_peer(folder, "stranger", ["camera", "subscriber", "bridge"], ["*"]))
    return foreign.model_copy(update={"serverKey": site.peer().serverKey})


# --- bytes that are no protocol


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_on_every_port_costs_the_camera_nothing(site, kind):
    with ExitStack() as open_sockets, site.line() as line:

        def throw(number: int) -> None:
            for address in ports(site):
                raw = open_sockets.enter_context(socket.create_connection(address, 5))
                raw.setblocking(False)
                raw.send(GARBAGE[kind])
                if number % 2:  # one half hangs up without a word, the other stays
                    raw.close()

        stream(line, 10, throw)
    with site.line() as line:
        stream(line, 3)


def test_connections_that_say_nothing_cost_the_camera_nothing(site):
    with ExitStack() as open_sockets, site.line() as line:

        def open_many(_: int) -> None:
            for address in ports(site) * 3:
                open_sockets.enter_context(socket.create_connection(address, 5))

        stream(line, 20, open_many)
        assert b"inspectd_build_info" in urlopen(f"http://{site.config['metrics']['bind']}/metrics", timeout=10).read()


def test_connection_that_says_nothing_is_let_go_at_every_port(site):
    with ExitStack() as open_sockets:
        silent = [open_sockets.enter_context(socket.create_connection(address, 5)) for address in ports(site)]
        for raw in silent:
            raw.settimeout(20)
            while raw.recv(1000):  # a greeting, then the end
                pass


def test_connections_beyond_the_daemons_descriptors_leave_the_line_running_and_are_let_go(tmp_path):
    """A camera that is connected loses nothing; a new one gets in when the strangers' time for a handshake is over."""
    site = make_site(tmp_path)
    site.program = ["/bin/sh", "-c", 'ulimit -n 128; exec "$@"', "sh", sys.executable, "-m", "daemon"]
    site.start()
    assert site.process is not None
    descriptors = Path(f"/proc/{site.process.pid}/fd")
    with ExitStack() as open_sockets, site.line() as line:
        stream(line, 5)
        host, port = site.addresses.frames.removeprefix("tcp://").split(":")
        for _ in range(200):
            raw = open_sockets.enter_context(socket.socket())
            raw.setblocking(False)  # beyond the descriptors the kernel's queue fills, and a connect would wait
            raw.connect_ex((host, int(port)))
        wait_for(line, lambda: len(list(descriptors.iterdir())) >= 128)
        stream(line, 30)
        open_sockets.close()
        wait_for(line, lambda: len(list(descriptors.iterdir())) < 100, 30)
        stream(line, 5)
    with site.line(ready_s=30) as line:
        stream(line, 5)
    assert site.stop() == 0
    assert "Traceback" not in site.log


# --- keys


@pytest.mark.parametrize("reason", ["NO_KEY", "WRONG_SERVER_KEY", "UNKNOWN_KEY"])
def test_peer_that_is_refused_is_counted_by_its_reason_and_told_why(site, tmp_path, reason):
    stranger = stranger_keys(site, tmp_path)
    keys = {
        "NO_KEY": None,
        "WRONG_SERVER_KEY": site.peer().model_copy(update={"serverKey": stranger.publicKey}),
        "UNKNOWN_KEY": stranger,
    }[reason]
    before = denied(site, reason)
    context: zmq.Context[Any] = zmq.Context()
    with site.line() as line:
        knocking = [
            connect(context, kind, address, keys)
            for kind, address in zip((zmq.DEALER, zmq.SUB, zmq.DEALER), vars(site.addresses).values(), strict=True)
        ]
        knocking[0].send_multipart(encode_frame("test", raw_frame(good_pixels(), epoch="stranger", seq=0)))
        knocking[1].subscribe("")
        knocking[2].send_multipart([b"permit/test", encode_header({"type": "HELLO", "nonce": "n"})])
        stream(line, 10)
        wait_for(line, lambda: denied(site, reason) >= before + 3)
        assert [peer.poll(0) for peer in knocking] == [0, 0, 0], "a stranger hears something"
        assert [header for header in line.foreign if header["epoch"] == "stranger"] == []
    context.destroy(linger=0)
    assert f"denied reason={reason} " in site.log


def test_right_key_on_a_foreign_topic_is_answered_forbidden_counted_and_named(site):
    before = denied(site, "FOREIGN_TOPIC")
    context: zmq.Context[Any] = zmq.Context()
    camera = connect(context, zmq.DEALER, site.addresses.frames, site.peer("cam2"))
    with site.line() as line:

        def intrude(number: int) -> None:
            """As cam1, in the epoch and with the numbers of the real cam1, each before its own part."""
            camera.send_multipart(encode_frame("test", raw_frame(good_pixels(), epoch=line.epoch, seq=number)))

        stream(line, 20, intrude)
        wait_for(line, lambda: denied(site, "FOREIGN_TOPIC") == before + 20)
        for _ in range(20):
            assert decode_header(camera.recv_multipart()[1])["reason"] == "FORBIDDEN"
    context.destroy(linger=0)
    assert "denied reason=FOREIGN_TOPIC peer=cam2 as=camera topic='frame/test/cam1'" in site.log


def test_cameras_key_hears_no_results_and_is_no_bridge(site):
    before = denied(site, "WRONG_ROLE")
    context: zmq.Context[Any] = zmq.Context()
    listener = connect(context, zmq.SUB, site.addresses.results, site.peer("cam2"))
    listener.subscribe("")
    bridge = connect(context, zmq.DEALER, site.addresses.permits, site.peer("cam2"))
    bridge.send_multipart([b"permit/test", encode_header({"type": "HELLO", "nonce": "n"})])
    with site.line() as line:
        wait_for(line, lambda: denied(site, "WRONG_ROLE") >= before + 2)
        stream(line, 10)
        assert [listener.poll(0), bridge.poll(0)] == [0, 0]
    context.destroy(linger=0)


# --- floods


def test_flood_of_handshakes_with_a_wrong_key_costs_no_frame_and_few_lines(site, tmp_path):
    keys = stranger_keys(site, tmp_path)
    before, told = denied(site, "UNKNOWN_KEY"), site.log.count("denied reason=UNKNOWN_KEY")
    context: zmq.Context[Any] = zmq.Context()
    knocked = []
    with site.line() as line:

        def knock(_: int) -> None:
            for address in 2 * list(vars(site.addresses).values()):
                knocking = context.socket(zmq.DEALER)
                knocking.set(zmq.RECONNECT_IVL, -1)  # one handshake each
                knocking.curve_publickey, knocking.curve_secretkey = keys.publicKey.encode(), keys.secretKey.encode()
                knocking.curve_serverkey = keys.serverKey.encode()
                knocking.connect(address)
                knocked.append(knocking)

        stream(line, 50, knock)
        wait_for(line, lambda: denied(site, "UNKNOWN_KEY") >= before + 300)
    context.destroy(linger=0)
    assert site.log.count("denied reason=UNKNOWN_KEY") <= told + 3


# --- inspectd doctor --peer


def doctor(site: Site, peer: Path) -> tuple[int, str]:
    done = site.run_command("doctor", "--config", str(site.folder / "config.yaml"), "--peer", str(peer))
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout


def key_file(folder: Path, keys: PeerFile) -> Path:
    path = folder / "asked.peer.yaml"
    path.write_text(yaml.safe_dump(keys.model_dump()))
    path.chmod(0o600)
    return path


def test_doctor_finds_a_good_peer_good_and_says_what_it_may(site):
    code, said = doctor(site, site.folder / "keys/cam2.peer.yaml")
    assert code == 0
    assert "peer cam2 as camera: frame/test/cam2\n" in said
    assert said.count("takes this key") == 3
    assert "FAIL" not in said


def test_doctor_names_the_wrong_server_key(site, tmp_path):
    other = stranger_keys(site, tmp_path).publicKey
    code, said = doctor(site, key_file(tmp_path, site.peer().model_copy(update={"serverKey": other})))
    assert code == 78
    assert f"serverKey is {other}, wanted {site.peer().serverKey}" in said
    assert said.count("ends the handshake: the daemon there has another key than serverKey") == 3


def test_doctor_names_the_key_that_is_not_in_the_list(site, tmp_path):
    stranger = stranger_keys(site, tmp_path)
    code, said = doctor(site, key_file(tmp_path, stranger))
    assert code == 78
    assert f"publicKey {stranger.publicKey} is not in" in said
    assert said.count("does not know this key") == 3


def test_doctor_sees_a_peer_that_was_made_after_the_daemons_start(site):
    peers = site.folder / "keys/peers.yaml"
    before = peers.read_bytes()
    try:
        code, said = doctor(site, make_peer(site.folder / "keys", "late", ["bridge"], ["permit/other"]))
    finally:
        peers.write_bytes(before)
    assert code == 78
    assert "FAIL  peer late as bridge: its topics allow none of permit/test" in said
    assert said.count("reads peers.yaml at its start: restart it") == 3


def test_doctor_sees_that_two_halves_are_not_one_pair(site, tmp_path):
    mixed = site.peer().model_copy(update={"secretKey": stranger_keys(site, tmp_path).secretKey})
    code, said = doctor(site, key_file(tmp_path, mixed))
    assert code == 78
    assert "its publicKey does not belong to its secretKey" in said


def test_doctor_says_that_nobody_answers(tmp_path):
    site = make_site(tmp_path)
    site.write_config()
    code, said = doctor(site, site.folder / "keys/line.peer.yaml")
    assert code == 0
    assert said.count("does not answer; is inspectd running") == 3


# --- how denials are told


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_first_denial_is_told_at_once_and_a_minute_of_others_in_one_line(caplog):
    now, counted = [0.0], []
    denials = Denials(counted.append, lambda: now[0])
    for number in range(5000):
        denials("UNKNOWN_KEY", f"key={number}")
        denials.tick()
    denials("NO_KEY", "at=x")
    assert told(caplog) == ["denied reason=UNKNOWN_KEY key=0", "denied reason=NO_KEY at=x"]
    now[0] = WINDOW_S
    denials.tick()
    assert told(caplog)[2:] == ["denied reason=UNKNOWN_KEY 4999 more since, the last: key=4999"]
    assert len(counted) == 5001


def test_flood_that_goes_on_is_one_line_a_minute_and_after_a_quiet_one_the_first_is_told_again(caplog):
    now = [0.0]
    denials = Denials(lambda _: None, lambda: now[0])
    for _ in range(600):
        denials("UNKNOWN_KEY", "key=x")
        denials.tick()
        now[0] += 1.0
    assert len(told(caplog)) == 10
    for _ in range(2):  # tells the rest, then forgets
        now[0] += WINDOW_S
        denials.tick()
    caplog.clear()
    denials("UNKNOWN_KEY", "key=y")
    assert told(caplog) == ["denied reason=UNKNOWN_KEY key=y"]


def test_what_was_not_told_yet_is_told_at_the_end(caplog):
    denials = Denials(lambda _: None, lambda: 0.0)
    for number in range(3):
        denials("NO_KEY", f"at={number}")
    denials.close()
    denials.close()
    assert told(caplog)[1:] == ["denied reason=NO_KEY 2 more since, the last: at=2"]
