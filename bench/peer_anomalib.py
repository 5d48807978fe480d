"""Decode to verdict against anomalib 2.7.0's PatchCore in OpenVINO: same box, run, backbone; 4,000 rows, 256x256.

    python -m bench.peer_anomalib [--data FOLDER] [--peer-python PATH]

FOLDER/train/good, FOLDER/test/...; default: ELPV's monocrystalline cells (seed 0). The peer runs in a virtual
environment of its own (--peer-python; without it one is made below bench/.peer: several GB). Both get the same weights
and PNG files; the peer's bank is 4,000 rows of its own embeddings, picked by our greedy coreset, since its own sampler
takes a quarter of an hour. Both run in f32 and, where the processor has it, in bf16 (ours: the search alone). What is
compared is f32 with f32, which is what ours ships with; beside it (peersFastest) ours in f32 with the peer's faster one
that costs at most 0.002 of its own image AUROC in f32. Rounds alternate; each figure
is the median over the rounds' medians. The last line is JSON, and is written to bench/results/peer.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import IO, Any

import click
import openvino as ov

from bench.accuracy import write_elpv
from bench.record import ROOT, origin, write_result
from daemon.score import open_pipeline
from daemon.types import RawFrame
from trainer.backbone import _packaged_lite0
from trainer.evaluate import evaluate

_ROUNDS, _FRAMES, _ROWS = 9, 60, 4000
_THREADS = 2
_AUROC_LOST = 0.002  # at most, by a lower precision
_PEER = ROOT / "bench" / ".peer"
_WORKER = Path(__file__).with_name("peer_worker.py")


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--peer-python", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--rounds", type=click.IntRange(3), default=_ROUNDS, show_default=True)
def main(*, data: Path | None, peer_python: Path | None, rounds: int) -> None:
    """Build both, check both, then time them in turns."""
    with tempfile.TemporaryDirectory(prefix="inspectd-peer-") as temporary:
        place = Path(temporary)
        folder = data or write_elpv(place / "elpv-mono", "elpv-mono", 0)
        frames = sorted((folder / "test" / "good").iterdir())[:_FRAMES]
        pipelines = build_ours(folder, place)
        our_aurocs = {
            key: float(evaluate(pipeline, folder, "peer")["imageAuroc"]) for key, pipeline in pipelines.items()
        }
        peer = Peer(peer_python or make_environment(), folder, frames, list(pipelines))
        click.echo(f"image AUROC: ours {our_aurocs}, peer {peer.aurocs}", err=True)
        payloads = [_as_frame(path, number) for number, path in enumerate(frames)]
        product = next(iter(pipelines["f32"].bundle.manifest.products))
        ours: dict[str, list[float]] = {key: [] for key in pipelines}
        theirs: dict[str, list[float]] = {key: [] for key in pipelines}
        for number in range(rounds + 1):
            for key, pipeline in pipelines.items():
                ours[key].append(median(time_one(pipeline, frame, product) for frame in payloads))
                theirs[key].append(peer.time_ms(key))
            said = ", ".join(f"{key}: ours {ours[key][-1]:.2f} ms, peer {theirs[key][-1]:.2f} ms" for key in pipelines)
            click.echo(f"round {number}: {said}", err=True)
        peer.close()
    for times in (*ours.values(), *theirs.values()):
        del times[0]  # the first round warms up
    result = compare(ours, our_aurocs, theirs, peer.aurocs)
    result |= {"peerVersions": peer.versions, "rounds": rounds, "framesARound": len(frames), "threads": _THREADS}
    result["data"] = data.name if data else "elpv-mono"
    write_result("peer.json", {**origin("openvino", "numpy", "opencv-python-headless"), "protocol": __doc__, **result})
    click.echo(json.dumps(result))


def compare(
    ours: dict[str, list[float]], our_aurocs: dict[str, float], theirs: dict[str, list[float]],
    peer_aurocs: dict[str, float],
) -> dict[str, Any]:  # fmt: skip
    """Milliseconds of each round by precision -> the figures in f32, and against the peer's fastest, AUROC kept."""
    shipped, peer = "f32", fastest(theirs, peer_aurocs)
    alike, best = (
        sorted(their_ms / our_ms for our_ms, their_ms in zip(ours[shipped], theirs[key], strict=True))
        for key in (shipped, peer)
    )
    return {
        "oursMs": median(ours[shipped]), "peerMs": median(theirs[shipped]), "ratio": median(alike),
        "ratioMin": alike[0], "ratioMax": alike[-1], "oursAuroc": our_aurocs[shipped],
        "peerAuroc": peer_aurocs[shipped], "precision": shipped,
        "peersFastest": {"precision": peer, "peerMs": median(theirs[peer]), "ratio": median(best)},
        "all": {
            key: {
                "oursMs": median(ours[key]), "peerMs": median(theirs[key]), "oursAuroc": our_aurocs[key],
                "peerAuroc": peer_aurocs[key],
            }
            for key in ours
        },
    }  # fmt: skip


def fastest(times: dict[str, list[float]], aurocs: dict[str, float]) -> str:
    kept = [key for key in times if aurocs[key] >= aurocs["f32"] - _AUROC_LOST]
    return min(kept, key=lambda key: median(times[key]))


def build_ours(folder: Path, place: Path) -> dict[str, Any]:
    """Plain 1-NN with the peer's settings: {precision: its pipeline}."""
    command = [sys.executable, str(ROOT / "build_engines.py"), "peer", "--good", str(folder / "train" / "good")]
    command += ["--select", str(folder / "test" / "good"), "--calibration", str(folder / "test" / "good")]
    command += ["--budget", "0", "--branches", "ldknn", "--size", "256", "--coreset", str(_ROWS), "--k", "9"]
    built = subprocess.run([*command, "--alpha", "0"], cwd=place, check=True, stdout=subprocess.PIPE, text=True)
    bundle = place / built.stdout.strip().splitlines()[-1]
    precisions = ["f32"] + ["bf16"] * ("BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    return {key: open_pipeline(bundle, place / "keys" / "trusted.yaml", key, _THREADS) for key in precisions}


def _as_frame(path: Path, seq: int) -> RawFrame:
    import cv2

    height, width = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE).shape
    data = memoryview(path.read_bytes())
    return RawFrame("cam1", "bench", seq, None, 0, "png", (height, width), "Mono8", None, data)


def time_one(pipeline: Any, frame: RawFrame, product: str) -> float:
    started = time.perf_counter()
    pipeline.inspect(frame, product)
    return 1000.0 * (time.perf_counter() - started)


class Peer:
    """The peer's process: it builds, says its AUROC, and times a round for each line that it is sent."""

    def __init__(self, python: Path, folder: Path, frames: list[Path], precisions: list[str]) -> None:
        given: dict[str, Any] = {"folder": str(folder), "frames": [str(path) for path in frames], "rows": _ROWS}
        given |= {"threads": _THREADS, "precisions": precisions}
        given["weights"] = str(_packaged_lite0())
        environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": tempfile.gettempdir()}
        self._process = subprocess.Popen(
            [str(python), str(_WORKER), json.dumps(given)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        first = self._read()
        self.aurocs, self.versions = first["aurocs"], first["versions"]

    def time_ms(self, precision: str) -> float:
        """Median milliseconds a frame of one round."""
        stdin: IO[str] | None = self._process.stdin
        assert stdin is not None
        stdin.write(f"{precision}\n")
        stdin.flush()
        return float(self._read()["ms"])

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise click.ClickException("the peer ended; its words are above")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)


def make_environment() -> Path:
    """A virtual environment with anomalib and what it needs; its torch is its own."""
    python = _PEER / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(_PEER)], check=True)
        packages = ["anomalib==2.7.0", "openvino", "onnx", "onnxscript", "torchvision"]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


if __name__ == "__main__":
    main()
