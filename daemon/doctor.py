"""`inspectd doctor`: what a machine lacks for a configuration, and what to do about it. Changes nothing."""

from __future__ import annotations

import os
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import zmq

from daemon.bundle import current_bundle, open_bundle
from daemon.config import Config, load_config
from daemon.endpoints import Endpoint, Input
from daemon.errors import InspectError
from daemon.inspection.backend import open_backend
from daemon.inspection.golden import check_golden
from daemon.inspection.pipeline import Pipeline
from daemon.keys import Peer, PeerFile, load_keyring, load_peer_file, load_peers, load_trusted, server_public_key
from daemon.line.sockets import handshake

State = Literal["ok", "WARN", "FAIL"]
_MEMORY_NEEDED_GB = 2.0
_DISK_NEEDED_GB = 1.0


@dataclass(frozen=True)
class Finding:
    state: State
    what: str

    def __str__(self) -> str:
        return f"{self.state:<5} {self.what}"


def examine(config_path: Path) -> list[Finding]:
    """Every check, also when an earlier one failed."""
    findings = [*_machine()]
    try:
        config = load_config(config_path)
    except InspectError as error:
        return [*findings, Finding("FAIL", f"config: {error}")]
    findings.append(Finding("ok", f"config: {config_path} is good"))
    for check in (_keys, _engines, _ports, _disk):
        findings += _guarded(check, config)
    return findings


def examine_peer(config_path: Path, peer_file: Path) -> list[Finding]:
    """Why the peer with this key file is refused, as far as its file, the key folder and the running daemon tell."""
    try:
        config, keys = load_config(config_path), load_peer_file(peer_file)
        return [*_peer_keys(config, keys, peer_file), *_handshakes(config, keys)]
    except InspectError as error:
        return [Finding("FAIL", str(error))]


def _peer_keys(config: Config, keys: PeerFile, source: Path) -> Iterator[Finding]:
    folder = config.security.keys
    server_key, peers = server_public_key(folder), load_peers(folder)
    if zmq.curve_public(keys.secretKey.encode()).decode() != keys.publicKey:
        yield Finding("FAIL", f"{source}: its publicKey does not belong to its secretKey; was it put together by hand?")
    if keys.serverKey == server_key:
        yield Finding("ok", f"{source}: serverKey is the daemon's public key")
    else:
        wanted = f"wanted {server_key}, the daemon's"
        yield Finding("FAIL", f"{source}: serverKey is {keys.serverKey}, {wanted}; make a new file with keygen peer")
    peer = next((peer for peer in peers if peer.publicKey == keys.publicKey), None)
    if peer is None:
        told = f"{source}: publicKey {keys.publicKey} is not in {folder / 'peers.yaml'}"
        yield Finding("FAIL", f"{told}; make a new file with: inspectd keygen peer NAME --role ...")
    else:
        yield from _rights(config, peer)


def _rights(config: Config, peer: Peer) -> Iterator[Finding]:
    """What the peer may do on this line; a role whose topics fit nothing here is as good as none."""
    topics = {
        "camera": [f"frame/{config.line}/{name}" for name in config.cameras],
        "subscriber": [f"{kind}/{config.line}/{name}" for kind in ("result", "late") for name in config.cameras],
        "bridge": [f"permit/{config.line}"],
    }
    yield Finding("ok", f"peer {peer.name}: {', '.join(peer.roles)} on {', '.join(peer.topics)}")
    for role in peer.roles:
        allowed = [topic for topic in topics[role] if peer.may(role, topic)]
        if allowed:
            yield Finding("ok", f"peer {peer.name} as {role}: {', '.join(allowed)}")
        else:
            yield Finding("FAIL", f"peer {peer.name} as {role}: its topics allow none of {', '.join(topics[role])}")


_KINDS = {"router": zmq.DEALER, "pull": zmq.PUSH, "results": zmq.SUB, "permits": zmq.DEALER}


def _handshakes(config: Config, keys: PeerFile) -> Iterator[Finding]:
    for path, endpoint in config.endpoints():
        kind = endpoint.kind if isinstance(endpoint, Input) else path
        if endpoint.bind.startswith("tcp://") and kind in _KINDS:  # imageZMQ's senders have no keys to be refused
            yield _handshake(f"{path}: {endpoint.bind}", endpoint, _KINDS[kind], keys)


def _handshake(place: str, endpoint: Endpoint, kind: int, keys: PeerFile) -> Finding:
    event = handshake(endpoint.bind, kind, keys)
    if event is None:
        return Finding("WARN", f"{place} does not answer; is inspectd running, and with this configuration?")
    if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
        return Finding("ok", f"{place} takes this key")
    if not endpoint.uses_curve:
        return Finding("FAIL", f"{place} is plain: a peer connects there without keys")
    if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        return Finding("FAIL", f"{place} does not know this key; the daemon reads peers.yaml at its start: restart it")
    return Finding("FAIL", f"{place} ends the handshake: the daemon there has another key than serverKey")


def _guarded(check: Callable[[Config], Iterator[Finding]], config: Config) -> list[Finding]:
    try:
        return list(check(config))
    except InspectError as error:
        return [Finding("FAIL", str(error))]


def available_memory_gb() -> float:
    """What programs could still have: the free pages, and those of the page cache that would be given up."""
    told = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(told["MemAvailable"].split()[0]) * 1024 / 1e9


def _machine() -> Iterator[Finding]:
    import openvino as ov

    from daemon.inspection.backend.pruned import forms_here, load_library

    core = ov.Core()
    name = core.get_property("CPU", "FULL_DEVICE_NAME")
    bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    cores = len(os.sched_getaffinity(0))
    yield Finding("ok" if cores > 1 else "WARN", f"processor: {name}, {cores} core(s), bf16 {'yes' if bf16 else 'no'}")
    library = load_library()
    advice = (
        f"yes, {forms_here(library)[-1]}"
        if library
        else "no, OpenVINO searches, slower: install a C compiler, then inspectd again"
    )
    yield Finding("ok" if library else "WARN", f"compiled search: {advice}")
    memory_gb = available_memory_gb()
    enough = memory_gb >= _MEMORY_NEEDED_GB
    yield Finding("ok" if enough else "WARN", f"memory: {memory_gb:.1f} GB free, wanted {_MEMORY_NEEDED_GB:.0f}")
    good = zmq.zmq_version_info() >= (4, 3, 5) and zmq.has("curve")
    yield Finding("ok" if good else "FAIL", f"libzmq: {zmq.zmq_version()}, CURVE {'yes' if zmq.has('curve') else 'no'}")


def _keys(config: Config) -> Iterator[Finding]:
    folder = config.security.keys
    mode = stat.S_IMODE(folder.stat().st_mode) if folder.is_dir() else 0
    if mode & 0o077:
        yield Finding("WARN", f"keys: {folder} has mode {mode:04o}; chmod 700 {folder}")
    yield Finding("ok", f"keys: {len(load_trusted(folder / 'trusted.yaml'))} trusted engine builder(s)")
    if not any(endpoint.uses_curve for _, endpoint in config.endpoints()):
        return
    server_public_key(folder)
    if not (folder / "server.yaml").exists():
        told = f"keys: {folder / 'server.yaml'} is not here, only its public half is"
        yield Finding("WARN", f"{told}; the service must get it as the credential server.yaml (docs/install.md)")
    else:
        load_keyring(folder)
    peers = load_peers(folder)
    for peer in peers:
        yield Finding("ok", f"peer {peer.name}: {', '.join(peer.roles)} on {', '.join(peer.topics)}")
    roles = {role for peer in peers for role in peer.roles}
    if "camera" not in roles:
        yield Finding("WARN", "keys: no peer may be a camera; inspectd keygen peer NAME --role camera")


def _engines(config: Config) -> Iterator[Finding]:
    trusted = load_trusted(config.security.keys / "trusted.yaml")
    for product in sorted({camera.product for camera in config.cameras.values()}):
        bundle = open_bundle(current_bundle(config.engines.dir, product), trusted)
        backend = open_backend(bundle, config.backend.kind, config.backend.precision, config.backend.threads)
        share = check_golden(Pipeline(bundle, backend))
        told = (
            f"signature and files good, golden frames at {100 * share:.0f} % of their tolerance in {backend.precision}"
        )
        yield Finding("ok", f"engine {product}: version {bundle.manifest.version}, {told}")


def _ports(config: Config) -> Iterator[Finding]:
    for path, endpoint in config.endpoints():
        if endpoint.is_open:
            yield Finding("WARN", f"{path}: {endpoint.bind} is plain: anybody who reaches it can speak there")
        if endpoint.bind.startswith("tcp://") and not endpoint.connects:
            host, _, port = endpoint.bind.removeprefix("tcp://").rpartition(":")
            yield _port(path, host, port)


def _port(path: str, host: str, port: str) -> Finding:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            # Binding to all is the question here: whether this port is free.
            probe.bind(("" if host == "*" else host.strip("[]"), int(port)))
        except (OSError, ValueError) as error:
            return Finding("WARN", f"{path}: {host}:{port} cannot be bound now ({error}); is inspectd running already?")
    return Finding("ok", f"{path}: {host}:{port} is free")


def _disk(config: Config) -> Iterator[Finding]:
    folders = {"ledger": config.ledger.dir} | ({"recorder": config.recorder.dir} if config.recorder else {})
    for name, folder in folders.items():
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free_gb = shutil.disk_usage(existing).free / 1e9
        writable = os.access(existing, os.W_OK)
        state: State = "FAIL" if not writable else "ok" if free_gb >= _DISK_NEEDED_GB else "WARN"
        yield Finding(
            state, f"{name}: {folder}, {free_gb:.1f} GB free{'' if writable else ', not writable for this user'}"
        )
    if config.recorder and config.recorder.keep_gb > shutil.disk_usage(existing).free / 1e9:
        yield Finding(
            "WARN", f"recorder: keep_gb {config.recorder.keep_gb} is more than is free; rejects would fill the disk"
        )
