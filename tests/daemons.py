"""A real daemon in a process of its own, with keys, an engine and ports of its own, and a line to speak with it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from adapters.line import Addresses, Line, open_line
from daemon.keys import load_peer_file, make_peer, make_server_key
from daemon.line.control import ask
from tests.bundles import install_bundle

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    """A tcp port that nobody holds now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tcp() -> str:
    return f"tcp://127.0.0.1:{free_port()}"


@dataclass
class Site:
    """A folder with everything a daemon needs. `config` may be changed before `start`."""

    folder: Path
    config: dict[str, Any]
    process: subprocess.Popen[bytes] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    program: list[str] = field(default_factory=lambda: [sys.executable, "-m", "daemon"])

    @property
    def addresses(self) -> Addresses:
        binds = (self.config["inputs"][0]["bind"], self.config["results"]["bind"], self.config["permits"]["bind"])
        return Addresses(*(self._absolute(bind) for bind in binds))

    @property
    def control(self) -> str:
        return self._absolute(self.config["control"]["bind"])

    @property
    def log(self) -> str:
        return (self.folder / "log.txt").read_text()

    def peer(self, name: str = "line") -> Any:
        return load_peer_file(self.folder / "keys" / f"{name}.peer.yaml")

    def _absolute(self, bind: str) -> str:
        scheme, _, rest = bind.partition("://")
        return f"ipc://{self.folder / rest}" if scheme == "ipc" else bind

    def write_config(self) -> Path:
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(self.config))
        return path

    def start(self, *, wait: bool = True) -> None:
        """Start the daemon; with `wait`, return when it says it is running."""
        self.write_config()
        environment = self.variables()
        with (self.folder / "log.txt").open("ab") as log:
            command = [*self.program, "run", "--config", str(self.folder / "config.yaml")]
            self.process = subprocess.Popen(command, stderr=log, stdout=log, env=environment, cwd=self.folder)
        if wait:
            self.wait_running()

    def wait_running(self, timeout_s: float = 30.0) -> None:
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            assert self.process is not None
            if self.process.poll() is not None:
                raise AssertionError(f"the daemon ended with {self.process.returncode}:\n{self.log}")
            try:
                if ask(self.control, "status", 200)["state"] == "RUNNING":
                    return
            except Exception:
                continue
        raise AssertionError(f"the daemon is not running after {timeout_s} s:\n{self.log}")

    def status(self) -> dict[str, Any]:
        return ask(self.control, "status")

    def kill(self) -> None:
        """kill -9, and wait for the end."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def stop(self, timeout_s: float = 20.0) -> int:
        """SIGTERM, and the exit code."""
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout_s)
        self.process = None
        return code

    @contextmanager
    def line(self, camera: str = "cam1", *, ready_s: float = 15.0, peer: str | None = "line") -> Iterator[Line]:
        keys = self.peer(peer) if peer and self.config["inputs"][0]["bind"].startswith("tcp") else None
        with open_line(self.addresses, keys, (self.config["line"], camera), ready_s=ready_s) as line:
            yield line

    def run_command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "daemon", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, env=self.variables(), cwd=self.folder, timeout=120, check=False
        )

    def variables(self) -> dict[str, str]:
        """The environment of the daemon and of commands beside it."""
        return {**os.environ, "PYTHONPATH": str(ROOT), **self.environment}

    def journal(self) -> list[dict[str, Any]]:
        """Every readable record of every segment."""
        from daemon.record.journal import read_records, segments

        folder = self.folder / "run/ledger"
        return [record for path in segments(folder) for _, record in read_records(path) if record is not None]


def make_site(folder: Path, *, tcp_curve: bool = True, **bundle_options: Any) -> Site:
    """Keys, one engine for the product `part`, and a config with one camera, not started."""
    keys = folder / "keys"
    install_bundle(folder / "engines", keys, "part", **bundle_options)
    make_server_key(keys)
    if not (keys / "line.peer.yaml").exists():
        make_peer(keys, "line", ["camera", "subscriber", "bridge"], ["*"])
    bind = tcp if tcp_curve else iter([f"ipc://run/{name}.sock" for name in ("frames", "results", "permits")]).__next__
    config = {
        "version": 1,
        "line": "test",
        "inputs": [{"kind": "router", "bind": bind()}],
        "results": {"bind": bind()},
        "permits": {"bind": bind()},
        "control": {"bind": "ipc://run/control.sock"},
        "security": {"keys": "keys"},
        "engines": {"dir": "engines"},
        "backend": {"kind": "cpu", "threads": 1, "hang_ms": 5000},
        "queue_mb": 8,
        "cameras": {"cam1": {"product": "part", "deadline_ms": 2000, "valid_ms": 500}},
        "ledger": {"dir": "run/ledger"},
        "recorder": {"dir": "run/rejects", "keep_gb": 1},
    }
    return Site(folder, config)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
