"""Decode to verdict against anomalib 2.7.0's PatchCore in OpenVINO: same box, run, backbone; 4,000 rows, 256x256.

    python -m bench.peer_anomalib [--data FOLDER] [--peer-python PATH]

FOLDER/train/good, FOLDER/test/...; default: ELPV's monocrystalline cells (seed 0). The peer runs in a virtual
environment of its own (--peer-python; without it one is made below bench/.peer: several GB). Both get the same weights
and PNG files; the peer's bank is 4,000 rows of its own embeddings, picked by our greedy coreset, since its own sampler
takes a quarter of an hour. Rounds alternate; each figure is the median over the rounds' medians. The last line is JSON,
and is written to bench/results/peer.json.
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

from bench.accuracy import write_elpv
from bench.record import ROOT, origin, write_result
from daemon.score import open_pipeline
from daemon.types import RawFrame
from trainer.backbone import _packaged_lite0
from trainer.evaluate import evaluate

_ROUNDS, _FRAMES, _ROWS = 9, 60, 4000
_THREADS = 2
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
        pipeline, our_auroc = build_ours(folder, place)
        peer = Peer(peer_python or make_environment(), folder, frames)
        click.echo(f"ours {our_auroc:.4f}, peer {peer.auroc:.4f} image AUROC", err=True)
        payloads = [_as_frame(path, number) for number, path in enumerate(frames)]
        product = next(iter(pipeline.bundle.manifest.products))
        ours, theirs = [], []
        for number in range(rounds + 1):
            spent = [time_one(pipeline, frame, product) for frame in payloads]
            found = peer.time_ms()
            if number > 0:  # the first round warms both up
                ours.append(median(spent))
                theirs.append(found)
                click.echo(f"round {number}: ours {ours[-1]:.2f} ms, peer {theirs[-1]:.2f} ms", err=True)
        peer.close()
    ratios = sorted(peer_ms / our_ms for our_ms, peer_ms in zip(ours, theirs, strict=True))
    result = {
        "oursMs": median(ours), "peerMs": median(theirs), "ratio": median(ratios), "ratioMin": ratios[0],
        "ratioMax": ratios[-1],
        "oursAuroc": our_auroc, "peerAuroc": peer.auroc, "peerVersions": peer.versions, "rounds": rounds,
        "framesARound": len(frames), "threads": _THREADS, "data": data.name if data else "elpv-mono",
    }  # fmt: skip
    write_result("peer.json", {**origin("openvino", "numpy", "opencv-python-headless"), "protocol": __doc__, **result})
    click.echo(json.dumps(result))


def build_ours(folder: Path, place: Path) -> tuple[Any, float]:
    """Plain 1-NN with the peer's settings: (the pipeline, its image AUROC)."""
    command = [sys.executable, str(ROOT / "build_engines.py"), "peer", "--good", str(folder / "train" / "good")]
    command += ["--select", str(folder / "test" / "good"), "--calibration", str(folder / "test" / "good")]
    command += ["--budget", "0", "--branches", "ldknn", "--size", "256", "--coreset", str(_ROWS), "--k", "9"]
    built = subprocess.run([*command, "--alpha", "0"], cwd=place, check=True, stdout=subprocess.PIPE, text=True)
    bundle = place / built.stdout.strip().splitlines()[-1]
    pipeline = open_pipeline(bundle, place / "keys" / "trusted.yaml", "f32", _THREADS)
    return pipeline, float(evaluate(pipeline, folder, "peer")["imageAuroc"])


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

    def __init__(self, python: Path, folder: Path, frames: list[Path]) -> None:
        given = {"folder": str(folder), "frames": [str(path) for path in frames], "rows": _ROWS, "threads": _THREADS}
        given["weights"] = str(_packaged_lite0())
        environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": tempfile.gettempdir()}
        self._process = subprocess.Popen(
            [str(python), str(_WORKER), json.dumps(given)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        first = self._read()
        self.auroc, self.versions = float(first["auroc"]), first["versions"]

    def time_ms(self) -> float:
        """Median milliseconds a frame of one round."""
        stdin: IO[str] | None = self._process.stdin
        assert stdin is not None
        stdin.write("round\n")
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
