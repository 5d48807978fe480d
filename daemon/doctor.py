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
from daemon.errors import InspectError
from daemon.inspection.backend import open_backend
from daemon.inspection.golden import check_golden
from daemon.inspection.pipeline import Pipeline
from daemon.keys import load_keyring, load_trusted

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


def _guarded(check: Callable[[Config], Iterator[Finding]], config: Config) -> list[Finding]:
    try:
        return list(check(config))
    except InspectError as error:
        return [Finding("FAIL", str(error))]


def _machine() -> Iterator[Finding]:
    import openvino as ov

    core = ov.Core()
    name = core.get_property("CPU", "FULL_DEVICE_NAME")
    bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    cores = len(os.sched_getaffinity(0))
    yield Finding("ok" if cores > 1 else "WARN", f"processor: {name}, {cores} core(s), bf16 {'yes' if bf16 else 'no'}")
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / 1e9
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
    keyring = load_keyring(folder)
    for peer in keyring.peers:
        yield Finding("ok", f"peer {peer.name}: {', '.join(peer.roles)} on {', '.join(peer.topics)}")
    roles = {role for peer in keyring.peers for role in peer.roles}
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
        if endpoint.bind.startswith("tcp://"):
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
