"""`inspectd doctor`: what a machine lacks for a configuration, and what to do about it. Changes nothing."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import zmq

from daemon.bundle import current_bundle, open_bundle
from daemon.config import Config, load_config
from daemon.endpoints import Endpoint, Input
from daemon.errors import InspectError
from daemon.inspection.backend import open_backend
from daemon.inspection.backend.cuda import why_not
from daemon.inspection.golden import check_golden
from daemon.inspection.pipeline import Pipeline
from daemon.keys import (
    Peer,
    PeerFile,
    Role,
    load_keyring,
    load_peer_file,
    load_peers,
    load_trusted,
    server_public_key,
)
from daemon.line.control import NoAnswerError, ask
from daemon.line.sockets import handshake
from daemon.machine import (
    Finding,
    State,
    available_memory_gb,
    examine_gpu,
    examine_machine,
    has_bf16,
    listener,
    nvidia_gpus,
)

_DISK_NEEDED_GB = 1.0
_LONGEST_IPC = 107  # characters of a path, by the kernel
_ASK_MS = 500


def examine(config_path: Path) -> list[Finding]:
    """Every check, also when an earlier one failed."""
    findings = [*examine_machine()]
    try:
        config = load_config(config_path)
    except InspectError as error:
        return [*findings, Finding("FAIL", f"config: {error}")]
    findings.append(Finding("ok", f"config: {config_path} is good"))
    for check in (_fit, _gpu, _trusted, _server_key, _peers, _engines, _ports, _paths, _disk):
        findings += _guarded(check, config)
    return list(dict.fromkeys(findings))  # a file that two checks read is told once


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
        yield Finding("ok", f"peer {peer.name}: {', '.join(peer.roles)} on {', '.join(peer.topics)}")
        yield from _rights(config, peer)


def _rights(config: Config, peer: Peer, bad: State = "FAIL") -> Iterator[Finding]:
    """What the peer may do on this line; a role whose topics fit nothing here is as good as none."""
    topics: dict[Role, list[str]] = {
        "camera": [f"frame/{config.line}/{name}" for name in config.cameras],
        "subscriber": [f"{kind}/{config.line}/{name}" for kind in ("result", "late") for name in config.cameras],
        "bridge": [f"permit/{config.line}"],
    }
    for role in peer.roles:
        allowed = [topic for topic in topics[role] if peer.may(role, topic)]
        if allowed:
            yield Finding("ok", f"peer {peer.name} as {role}: {', '.join(allowed)}")
        else:
            wanted = f"its topics allow none of {', '.join(topics[role])}"
            yield Finding(bad, f"peer {peer.name} as {role}: {wanted}; take it out of peers.yaml and make it anew")


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
    findings: list[Finding] = []
    try:
        findings.extend(check(config))
    except InspectError as error:
        findings.append(Finding("FAIL", str(error)))
    return findings


def _fit(config: Config) -> Iterator[Finding]:
    """Whether the configuration asks for what this machine has."""
    backend, cores = config.backend, len(os.sched_getaffinity(0))
    if backend.threads > cores:
        told = f"backend.threads: {backend.threads} threads on {cores} core(s)"
        yield Finding("WARN", f"{told} take them from each other and from the loop; set it to {cores} or less")
    if backend.precision == "bf16" and not has_bf16():
        yield Finding("WARN", "backend.precision: bf16, which this processor does not have; set it to f32")
    queue_gb = config.queue_mb / 1000
    if queue_gb > available_memory_gb() / 2:
        yield Finding("WARN", f"queue_mb: {queue_gb:.1f} GB of frames may wait, over half of free memory; lower it")


def _gpu(config: Config) -> Iterator[Finding]:
    return examine_gpu(config.backend.kind)


def _trusted(config: Config) -> Iterator[Finding]:
    folder = config.security.keys
    if not folder.is_dir():
        yield Finding("FAIL", f"keys: {folder} is not there; make it with: inspectd keygen server --keys {folder}")
        return
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & 0o077:
        yield Finding("WARN", f"keys: {folder} has mode {mode:04o}; chmod 700 {folder}")
    yield Finding("ok", f"keys: {len(load_trusted(folder / 'trusted.yaml'))} trusted engine builder(s)")


def _server_key(config: Config) -> Iterator[Finding]:
    folder = config.security.keys
    if not folder.is_dir() or not _asks_for_keys(config):
        return
    server_public_key(folder)
    if not (folder / "server.yaml").exists():
        told = f"keys: {folder / 'server.yaml'} is not here, only its public half is"
        yield Finding("WARN", f"{told}; the service must get it as the credential server.yaml (docs/install.md)")
        return
    load_keyring(folder)
    yield Finding("ok", "keys: the daemon's own pair is here, and nobody else can read it")


def _peers(config: Config) -> Iterator[Finding]:
    """Who may connect, whether that means something on this line, and whether each camera has somebody."""
    if not _asks_for_keys(config):
        return
    peers = load_peers(config.security.keys)
    for peer in peers:
        yield Finding("ok", f"peer {peer.name}: {', '.join(peer.roles)} on {', '.join(peer.topics)}")
        yield from (finding for finding in _rights(config, peer, "WARN") if finding.state != "ok")
    if not any("camera" in peer.roles for peer in peers):
        yield Finding("WARN", "keys: no peer may be a camera; inspectd keygen peer NAME --role camera")
        return
    without_keys = {entry.camera for entry in config.inputs if entry.camera is not None}
    for name in config.cameras:
        topic = f"frame/{config.line}/{name}"
        if name not in without_keys and not any(peer.may("camera", topic) for peer in peers):
            made = f"inspectd keygen peer {name} --role camera --topic {topic}"
            yield Finding("WARN", f"keys: no peer may speak for camera {name}; {made}")


def _asks_for_keys(config: Config) -> bool:
    return any(endpoint.uses_curve for _, endpoint in config.endpoints())


def _engines(config: Config) -> Iterator[Finding]:
    trusted = load_trusted(config.security.keys / "trusted.yaml")
    for name in sorted(set(config.engine_names().values())):
        bundle = open_bundle(current_bundle(config.engines.dir, name), trusted)
        backend = open_backend(bundle, config.backend.kind, config.backend.precision, config.backend.threads)
        share = check_golden(Pipeline(bundle, backend))
        told = (
            f"signature and files good, golden frames at {100 * share:.0f} % of their tolerance in {backend.precision}"
        )
        yield Finding("ok", f"engine {name}: version {bundle.manifest.version}, {told}")
        if config.backend.kind == "auto" and backend.name == "cpu" and nvidia_gpus() and (reason := why_not(bundle)):
            yield Finding("WARN", f"engine {name}: the processor judges, not the GPU: {reason}")


def _ports(config: Config) -> Iterator[Finding]:
    is_running = _is_running(config)
    for path, endpoint in config.endpoints():
        if endpoint.is_open:
            told = f"{path}: {endpoint.bind} is plain: anybody who reaches it can speak there"
            yield Finding("WARN", f"{told}; remove plain, or guard that network")
        if endpoint.bind.startswith("tcp://") and not endpoint.connects:
            host, _, port = endpoint.bind.removeprefix("tcp://").rpartition(":")
            yield _port(path, host, port, is_running=is_running)
    if config.metrics is not None:
        host, number = config.metrics.address
        yield _port("metrics", host, str(number), is_running=is_running)


def _is_running(config: Config) -> bool:
    """Whether a daemon with this configuration's control socket answers: the ports are its own then."""
    try:
        ask(config.control.bind, "status", _ASK_MS)
    except NoAnswerError:
        return False
    return True


def _port(path: str, host: str, port: str, *, is_running: bool) -> Finding:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            # Binding to all is the question here: whether this port is free.
            probe.bind(("" if host == "*" else host.strip("[]"), int(port)))
        except (OSError, UnicodeError) as error:
            return _taken(f"{path}: {host}:{port}", int(port), error, is_running=is_running)
    return Finding("ok", f"{path}: {host}:{port} is free")


def _taken(place: str, port: int, error: OSError | UnicodeError, *, is_running: bool) -> Finding:
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EADDRINUSE and is_running:
        return Finding("ok", f"{place} is held by the daemon that runs")
    if number == errno.EADDRINUSE:
        holder = listener(port) or "another user's process (sudo ss -ltnp shows it)"
        return Finding("FAIL", f"{place} is taken by {holder}; stop that, or choose another port")
    if number == errno.EADDRNOTAVAIL:
        return Finding("FAIL", f"{place}: this box has no such address; ip address lists its own, 0.0.0.0 is all")
    if number == errno.EACCES:
        return Finding("FAIL", f"{place}: ports below 1024 are root's; choose another one")
    return Finding("WARN", f"{place} cannot be tried ({error}); is it an address of this box?")


def _paths(config: Config) -> Iterator[Finding]:
    """ipc sockets: a path that the kernel takes, in a folder that can be made and written."""
    binds = {path: endpoint.bind for path, endpoint in config.endpoints() if not endpoint.connects}
    for path, bind in {**binds, "control": config.control.bind}.items():
        scheme, _, text = bind.partition("://")
        if scheme != "ipc" or text.startswith("@"):
            continue
        if len(os.fsencode(text)) > _LONGEST_IPC:
            advice = "put the configuration into a folder with a shorter path"
            yield Finding("FAIL", f"{path}: {text} has more than {_LONGEST_IPC} characters; {advice}")
        elif not os.access(folder := _existing(Path(text).parent), os.W_OK):
            yield Finding("FAIL", f"{path}: {folder} is not writable for this user; chown or chmod it")


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _disk(config: Config) -> Iterator[Finding]:
    folders = {"ledger": config.ledger.dir} | ({"recorder": config.recorder.dir} if config.recorder else {})
    for name, folder in folders.items():
        existing = _existing(folder)
        free_gb = shutil.disk_usage(existing).free / 1e9
        told = f"{name}: {folder}, {free_gb:.1f} GB free"
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            yield Finding("FAIL", f"{told}, not writable for this user; chown {existing}, or name another folder")
        elif free_gb < _DISK_NEEDED_GB:
            yield Finding("WARN", f"{told}, wanted {_DISK_NEEDED_GB:.0f}; make room, or lower keep_days and keep_gb")
        else:
            yield Finding("ok", told)
    if config.recorder and config.recorder.keep_gb > shutil.disk_usage(_existing(config.recorder.dir)).free / 1e9:
        yield Finding(
            "WARN",
            f"recorder: keep_gb {config.recorder.keep_gb} is more than is free; rejects would fill the disk: lower it",
        )
