"""`inspectd simulate`: a camera line and a PLC in one process, which count what they sent and what came back."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from adapters.line import Addresses, Line, SentPart, disagreements, open_line
from adapters.sources import on_the_wire
from daemon.config import Config, load_config
from daemon.errors import DataError, UsageError
from daemon.keys import load_peer_file
from daemon.score import list_images, read_image
from daemon.types import Header, RawFrame

_MOST_PRELOADED_BYTES = 1 << 30


@dataclass(frozen=True)
class Picture:
    """An image ready to be sent: its file, its label (good or defect, by the folder it lies in)."""

    file: str
    label: str
    pixel_format: str
    shape: tuple[int, ...]
    payload: bytes


@dataclass(frozen=True)
class Plan:
    """How to stream: frames a second, random delay of each up to `jitter_ms`, share of numbers left out."""

    rate: float
    jitter_ms: float = 0.0
    lose: float = 0.0
    seed: int = 0


def load_pictures(folder: Path) -> list[Picture]:
    """Every image below `folder`, as raw frames (16-bit gray stays 16 bit). Raises DataError."""
    pictures, total = [], 0
    for path in list_images([folder]):
        pixels, pixel_format = on_the_wire(read_image(path))
        label = "good" if path.parent.name == "good" else "defect"
        pictures.append(Picture(str(path.relative_to(folder)), label, pixel_format, pixels.shape, pixels.tobytes()))
        total += pixels.nbytes
        if total > _MOST_PRELOADED_BYTES:
            raise DataError(f"{folder}: holds more than 1 GiB of pixels; simulate a smaller folder")
    return pictures


def stream(line: Line, pictures: list[Picture], plan: Plan, report: Reporter | None = None) -> set[int]:
    """Send the pictures at the plan's rate and wait for their verdicts; returns the numbers left out on purpose."""
    generator = np.random.default_rng(plan.seed)
    lost: set[int] = set()
    start_ns = time.monotonic_ns() + 50_000_000
    for seq, picture in enumerate(pictures):
        due_ns = start_ns + int(seq * 1e9 / plan.rate + generator.uniform(0, plan.jitter_ms) * 1e6)
        # The last number always goes out: a loss at the very end could not be seen by anybody.
        if generator.random() < plan.lose and 0 < seq < len(pictures) - 1:
            lost.add(seq)
            continue
        wait_until(line, due_ns)
        line.send(picture_frame(line, seq, picture))
        if report is not None:
            report.show(line)
    until = time.monotonic() + 10
    while time.monotonic() < until and any(not _is_answered(part) for part in line.parts.values()):
        line.pump(20)
    line.pump(200)  # what should not come may still come
    return lost


def wait_until(line: Line, due_ns: int) -> None:
    """Pump up to a millisecond before `due_ns` (monotonic), then sleep the rest: a poll's grain is a millisecond."""
    line.pump(max(0.0, (due_ns - time.monotonic_ns()) / 1e6 - 1.5))
    time.sleep(max(0, due_ns - time.monotonic_ns()) / 1e9)


def _is_answered(part: SentPart) -> bool:
    refused = part.answer is not None and part.answer["status"] == "refused"
    return refused or (bool(part.results) and bool(part.permits))


def picture_frame(line: Line, seq: int, picture: Picture) -> RawFrame:
    """The picture as the line's camera sends it under this number."""
    return RawFrame(
        camera=line.camera,
        epoch=line.epoch,
        seq=seq,
        part_id=f"part-{seq}",
        captured_ns=time.time_ns(),
        encoding="raw",
        shape=picture.shape,
        pixel_format=picture.pixel_format,
        product=None,
        payload=memoryview(picture.payload),
        is_simulated=True,
    )


class Reporter:
    """A live line on a terminal, a plain line every two seconds elsewhere."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._next_s = 0.0
        self._live = sys.stderr.isatty()

    def show(self, line: Line, *, last: bool = False) -> None:
        if time.monotonic() < self._next_s and not last:
            return
        self._next_s = time.monotonic() + (0.2 if self._live else 2.0)
        reasons = Counter(str(r["reason"] or "PASS") for part in line.parts.values() for r in part.results[:1])
        latencies = [part.latency_ms for part in line.parts.values() if part.latency_ms is not None][-200:]
        p50 = f"{np.median(latencies):.1f} ms" if latencies else "-"
        counts = " ".join(f"{name} {count}" for name, count in sorted(reasons.items()))
        text = f"sent {len(line.parts)}/{self._total}  verdicts {sum(reasons.values())}  {counts}  p50 {p50}"
        print(
            f"\r{text:<100}" if self._live else text,
            end="" if self._live and not last else "\n",
            file=sys.stderr,
            flush=True,
        )


def summarise(line: Line, lost: set[int]) -> Header:
    """Counts and times of one streaming, as `simulate` prints them."""
    parts = list(line.parts.values())
    verdicts = [part.results[0] for part in parts if part.results]
    latencies = [part.latency_ms for part in parts if part.latency_ms is not None]
    reasons = Counter(str(verdict["reason"] or "PASS") for verdict in verdicts)
    return {
        "sent": len(parts),
        "accepted": sum(part.answer is not None and part.answer["status"] == "accepted" for part in parts),
        "refused": sum(part.answer is not None and part.answer["status"] == "refused" for part in parts),
        "verdicts": len(verdicts),
        "lostOnPurpose": len(lost),
        "missing": sum(h.get("seqTo", h["seq"]) - h["seq"] + 1 for h in line.foreign if h["reason"] == "MISSING"),
        "deadlineMissed": reasons["LATE"],
        "outcomes": dict(sorted(reasons.items())),
        "passesBelieved": sum(part.believed for part in parts),
        "p50Ms": _percentile(latencies, 50),
        "p95Ms": _percentile(latencies, 95),
        "p99Ms": _percentile(latencies, 99),
        "maxMs": _percentile(latencies, 100),
    }


def _percentile(values: list[float], percent: float) -> float | None:
    return round(float(np.percentile(values, percent)), 3) if values else None


def result_lines(line: Line, pictures: list[Picture]) -> Iterator[Header]:
    """One object a part that was sent: file, label, outcome, reason, score, limit."""
    for seq, part in sorted(line.parts.items()):
        result = part.results[0] if part.results else {}
        picture = pictures[seq]
        facts = {key: result.get(key) for key in ("outcome", "reason", "score", "limit")}
        yield {"file": picture.file, "label": picture.label, **facts}


def addresses_of(config: Config) -> Addresses:
    """The addresses that a client on this machine connects to. Raises UsageError if there is no router input."""
    router = next((entry.bind for entry in config.inputs if entry.kind == "router"), None)
    if router is None:
        raise UsageError(
            "the configuration has no input of kind router, where frames are answered; add one, or name another daemon"
        )
    local = [
        bind.replace("//*:", "//127.0.0.1:").replace("//0.0.0.0:", "//127.0.0.1:")
        for bind in (router, config.results.bind, config.permits.bind)
    ]
    return Addresses(*local)


@click.command("simulate")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    default=Path("config.yaml"),
    show_default=True,
    help="The daemon's configuration.",
)
@click.option("--camera", help="Which camera of the configuration to be; default: the first.")
@click.option(
    "--peer", type=click.Path(path_type=Path), help="Key file of a peer with roles camera, subscriber, bridge."
)
@click.option(
    "--rate", type=click.FloatRange(0, min_open=True), default=10.0, show_default=True, help="Frames a second."
)
@click.option("--count", type=click.IntRange(1), help="How many frames; default: each image once.")
@click.option("--jitter-ms", type=click.FloatRange(0), default=0.0, show_default=True, help="Most delay of a frame.")
@click.option("--lose", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="Share of numbers left out.")
@click.option("--shuffle", is_flag=True, help="Mix the images (seeded); default: by name.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of losses, delays and order.")
@click.option("--results", type=click.Path(path_type=Path), help="Write one JSON object a part to this file.")
def command(  # noqa: PLR0917 - click hands every option over
    folder: Path,
    config_path: Path,
    camera: str | None,
    peer: Path | None,
    rate: float,
    count: int | None,
    jitter_ms: float,
    lose: float,
    shuffle: bool,  # noqa: FBT001 - click
    seed: int,
    results: Path | None,
) -> None:
    """Be a camera line and a PLC: stream a folder, count, exit 1 when sent and received disagree."""
    config = load_config(config_path)
    name = camera or next(iter(config.cameras))
    if name not in config.cameras:
        raise UsageError(f"found camera {name!r}, wanted one of {', '.join(config.cameras)} (--camera)")
    if peer is None and any(endpoint.uses_curve for _, endpoint in config.endpoints()):
        raise UsageError(
            "found no --peer, and the daemon's sockets ask for keys; wanted --peer FILE, made by: inspectd keygen peer "
            "NAME --role camera --role subscriber --role bridge"
        )
    pictures = load_pictures(folder)
    order = np.random.default_rng(seed).permutation(len(pictures)) if shuffle else np.arange(len(pictures))
    chosen = [pictures[order[i % len(order)]] for i in range(count or len(pictures))]
    keys = load_peer_file(peer) if peer else None
    with open_line(addresses_of(config), keys, (config.line, name), lease_ms=config.permits.lease_ms) as line:
        reporter = Reporter(len(chosen))
        lost = stream(line, chosen, Plan(rate, jitter_ms, lose, seed), reporter)
        reporter.show(line, last=True)
        problems = disagreements(line, lost)
        if results is not None:
            results.write_text("".join(json.dumps(row) + "\n" for row in result_lines(line, chosen)))
        print(json.dumps(summarise(line, lost)))
    for problem in problems[:20]:
        print(f"DISAGREES {problem}", file=sys.stderr)
    sys.exit(1 if problems else 0)
