"""`inspectd bench`: how fast an engine is on this machine, for frames sent through the daemon's own sockets.

A daemon of its own is started with CURVE on, beside this process, and measured twice: as fast as it
takes frames (two in flight), then at half that rate, which is where latencies mean something.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import yaml

from adapters.line import Addresses, Line, SentPart, disagreements, open_line
from adapters.simulate import Picture, load_pictures, picture_frame, wait_until
from daemon.bundle import Bundle, open_bundle
from daemon.errors import InspectError
from daemon.inspection.golden import read_golden
from daemon.keys import load_peer_file, load_trusted, make_peer, make_server_key
from daemon.types import Header

_STAGES = ("queueMs", "decodeMs", "preprocessMs", "inferMs", "postprocessMs", "totalMs")
_INSPECTION = ("decodeMs", "preprocessMs", "inferMs", "postprocessMs")
_WARM_UP = 30


@dataclass(frozen=True)
class Setting:
    """What the daemon under measurement runs with."""

    precision: str = "f32"
    threads: int = 2
    deadline_ms: int = 5000


@contextmanager
def running_daemon(
    bundle: Bundle, trusted: Path, setting: Setting
) -> Iterator[tuple[Addresses, Path, subprocess.Popen[bytes]]]:
    """A daemon for one bundle in a folder of its own; its addresses, its peer's key file, its process."""
    with tempfile.TemporaryDirectory(prefix="inspectd-bench-") as name:
        folder = Path(name)
        product = bundle.product(None)
        (folder / "engines" / product).mkdir(parents=True)
        (folder / "engines" / product / "current").symlink_to(bundle.folder)
        keys = folder / "keys"
        make_server_key(keys)
        peer = make_peer(keys, "bench", ["camera", "subscriber", "bridge"], ["*"])
        shutil.copy(trusted, keys / "trusted.yaml")
        config = _config(product, setting)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        command = [
            sys.executable,
            "-m",
            "daemon",
            "--log-level",
            "warning",
            "run",
            "--config",
            str(folder / "config.yaml"),
        ]
        daemon = subprocess.Popen(command)
        try:
            yield _addresses(config), peer, daemon
        finally:
            daemon.terminate()
            daemon.wait(60)


def _config(product: str, setting: Setting) -> dict[str, Any]:
    return {
        "version": 1,
        "line": "bench",
        "inputs": [{"kind": "router", "bind": _free_tcp()}],
        "results": {"bind": _free_tcp(), "mask": True, "frame_on_reject": True},
        "permits": {"bind": _free_tcp()},
        "control": {"bind": "ipc://control.sock"},
        "backend": {"kind": "cpu", "precision": setting.precision, "threads": setting.threads},
        "cameras": {"cam": {"product": product, "deadline_ms": setting.deadline_ms, "valid_ms": setting.deadline_ms}},
        "recorder": None,
    }


def _addresses(config: dict[str, Any]) -> Addresses:
    return Addresses(config["inputs"][0]["bind"], config["results"]["bind"], config["permits"]["bind"])


def _free_tcp() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def measure(bundle: Bundle, trusted: Path, pictures: list[Picture], frames: int, setting: Setting) -> Header:
    """Throughput, then every stage at half that rate. Raises InspectError when a part has not one verdict."""
    with running_daemon(bundle, trusted, setting) as (addresses, peer, daemon):
        keys = load_peer_file(peer)
        with open_line(addresses, keys, ("bench", "cam")) as line:
            _flood(line, pictures, _WARM_UP)
        with open_line(addresses, keys, ("bench", "cam")) as line:
            seconds = _flood(line, pictures, frames)
            _demand_agreement(line)
        rate = 0.5 * frames / seconds
        with open_line(addresses, keys, ("bench", "cam")) as line:
            _pace(line, pictures, frames, rate)
            _demand_agreement(line)
            paced = list(line.parts.values())
        memory_mb = _resident_mb(daemon.pid)
    return {
        "frames": frames,
        "precision": setting.precision,
        "threads": setting.threads,
        "throughputPerS": round(frames / seconds, 1),
        "halfLoadPerS": round(rate, 1),
        "residentMb": memory_mb,
        "stages": stage_statistics(paced),
    }


def stage_statistics(parts: list[SentPart]) -> Header:
    """p50, p95, p99 and max of each stage; `ownMs` is what the daemon itself adds to the inspection."""
    timings = [part.results[0]["timings"] for part in parts]
    columns = {stage: [timing[stage] for timing in timings] for stage in _STAGES}
    columns["ownMs"] = [timing["totalMs"] - sum(timing[stage] for stage in _INSPECTION) for timing in timings]
    columns["sendToVerdictMs"] = [part.latency_ms for part in parts]
    return {
        stage: {
            name: round(float(np.percentile(values, percent)), 3)
            for name, percent in (("p50", 50), ("p95", 95), ("p99", 99), ("max", 100))
        }
        for stage, values in columns.items()
    }


def _flood(line: Line, pictures: list[Picture], frames: int) -> float:
    """Send with two in flight; the seconds from the first send to the last verdict."""
    started = time.monotonic()
    open_parts: list[SentPart] = []
    until = started + 60 + frames
    for seq in range(frames):
        open_parts.append(line.send(picture_frame(line, seq, pictures[seq % len(pictures)])))
        while len(open_parts) >= 2:
            if time.monotonic() > until:
                raise InspectError(f"no verdict on seq {open_parts[0].seq}; did the daemon end?")
            line.pump(0.5)
            open_parts = [part for part in open_parts if not part.results]
    _wait_for_all(line)
    return time.monotonic() - started


def _pace(line: Line, pictures: list[Picture], frames: int, rate: float) -> None:
    start_ns = time.monotonic_ns()
    for seq in range(frames):
        due_ns = start_ns + int(seq * 1e9 / rate)
        wait_until(line, due_ns)
        line.send(picture_frame(line, seq, pictures[seq % len(pictures)]))
    _wait_for_all(line)


def _wait_for_all(line: Line) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until and any(not (part.results and part.permits) for part in line.parts.values()):
        line.pump(2)


def _demand_agreement(line: Line) -> None:
    """A bench of a line that loses parts, or judges none of them, is worth nothing."""
    problems = disagreements(line, set())
    problems += [
        f"seq {p.seq}: {p.results[0]['reason']}"
        for p in line.parts.values()
        if p.results and p.results[0]["score"] is None
    ]
    if problems:
        raise InspectError("nothing is timed, because the line is wrong: " + "; ".join(problems[:5]))


def _resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


def golden_pictures(bundle: Bundle) -> list[Picture]:
    """The bundle's own golden frames, as they would come from a camera."""
    pictures = []
    for golden in bundle.manifest.golden.frames:
        pixels = read_golden(bundle.read(golden.file), golden.file).pixels
        gray = pixels.shape[2] == 1
        kind = "RGB8" if not gray else "Mono8" if pixels.dtype == np.uint8 else "Mono16"
        shape = pixels.shape[:2] if gray else pixels.shape
        pictures.append(Picture(golden.file, golden.outcome, kind, shape, pixels.tobytes()))
    return pictures


@click.command("bench")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--images", type=click.Path(path_type=Path, exists=True), help="Frames to send; default: the golden frames."
)
@click.option("--frames", type=click.IntRange(50), default=1000, show_default=True, help="How many to time.")
@click.option(
    "--precision", type=click.Choice(["f32", "bf16"]), default="f32", show_default=True, help="Of the computation."
)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True, help="Inference threads.")
@click.option(
    "--trusted", type=click.Path(path_type=Path), default=Path("keys/trusted.yaml"), show_default=True,
    help="Whose engines are accepted.",
)  # fmt: skip
def command(bundle: Path, images: Path | None, frames: int, precision: str, threads: int, trusted: Path) -> None:  # noqa: PLR0917
    """Throughput, and p50, p95, p99 and max of every stage at half load, as JSON."""
    opened = open_bundle(bundle, load_trusted(trusted))
    pictures = load_pictures(images) if images else golden_pictures(opened)
    print(json.dumps(measure(opened, trusted, pictures, frames, Setting(precision, threads)), indent=1))
