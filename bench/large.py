"""Five megapixels at 60 frames a second through shared memory, on two cores: does the line hold it, what costs what?

    python -m bench.large --rate 60 --seconds 20

Frames of 2448x2048 Mono8 (rendered good parts) into a daemon's `shm` input, mode every-frame, deadline 250 ms, engines
for 256x256 with EfficientNet-Lite0 as a build makes them. The camera's driver is taken to write into the slots by
itself: they are filled before, and the camera only announces them. Sender, subscriber and bridge are a process on the
same cores. At each bank size and precision: the asked rate, and where it is not sustained without OVERLOAD and LATE,
the highest that is: from what it takes with four under way, down by a tenth a step.
What a frame costs: the stages alone, in turns on the same frames, wall time and processor time of the calling thread
(OpenVINO's others are not in it), with OpenCV's own area average beside ours. Writes bench/results/large.json.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import click
import cv2
import numpy as np
import openvino as ov

from adapters.shm_sender import ShmSender
from bench.record import ROOT, origin, write_result
from bench.streams import Part, figures, flood, highest_sustained, listening, stream
from daemon.bundle import Bundle, open_bundle
from daemon.inspection.backend.cpu import CpuBackend
from daemon.keys import load_trusted, make_peer, make_server_key
from daemon.line.shm import Rings
from daemon.types import ByteArray, Frame
from examples.parts import render_part, write_dataset
from tests.daemons import Site

_FRAME_HW, _SIDE = (2048, 2448), 256
_SMALL_HW = (512, 512)  # what the engines are built from: the same parts by another camera, so that the input is square
_GOOD, _PICTURES, _SLOTS = 60, 6, 8
_ROWS = (4000, 1000)
_THREADS = 2
_UNDER_WAY, _FLOOD_S = 4, 3.0


@click.command(help=__doc__)
@click.option("--rate", type=click.FloatRange(1), default=60.0, show_default=True, help="Frames a second.")
@click.option("--seconds", type=click.FloatRange(1), default=20.0, show_default=True, help="That a rate must hold.")
@click.option("--rounds", type=click.IntRange(3), default=30, show_default=True, help="Of the stages alone.")
def main(rate: float, seconds: float, rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="inspectd-large-") as name:
        place = Path(name)
        frames = [enlarged(number) for number in range(_PICTURES)]
        write_dataset(place / "parts", good_train=_GOOD, good_test=1, defects_each=1, size_hw=_SMALL_HW)
        lines, stages = [], {}
        for rows in _ROWS:
            bundle = build(place, rows)
            for precision in precisions():
                stages[f"{precision}, {rows} rows"] = time_stages(bundle, precision, frames, rounds)
                line = run_line(make_site(place, bundle, precision), frames, rate, seconds)
                lines.append({"rows": rows, "precision": precision, **line})
    result = {
        "rate": rate,
        "seconds": seconds,
        "frameHw": _FRAME_HW,
        "networkHw": (_SIDE, _SIDE),
        "threads": _THREADS,
        "lines": lines,
    }
    made = origin("openvino", "numpy", "opencv-python-headless", "pyzmq")
    write_result("large.json", {**made, "protocol": __doc__, **result, "lines": lines, "stages": stages})


def precisions() -> list[str]:
    return ["f32"] + ["bf16"] * ("BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def enlarged(number: int) -> ByteArray:
    """(H W): a good part that no engine has seen, as the larger camera would show it."""
    small, _ = render_part(900_000 + number, size_hw=_SMALL_HW)
    large = cv2.resize(small, _FRAME_HW[::-1], interpolation=cv2.INTER_CUBIC)
    return np.ascontiguousarray(large.reshape(_FRAME_HW), np.uint8)


def build(place: Path, rows: int) -> Bundle:
    name = f"part-{rows}"
    command = [sys.executable, str(ROOT / "build_engines.py"), name, "--good", str(place / "parts/train/good")]
    command += ["--budget", "0", "--branches", "ldknn", "--size", str(_SIDE), "--coreset", str(rows)]
    subprocess.run(command, cwd=place, check=True, stdout=subprocess.DEVNULL)
    bundle = open_bundle(place / "engines" / name / "current", load_trusted(place / "keys" / "trusted.yaml"))
    assert bundle.manifest.preprocessing.size == (_SIDE, _SIDE)
    return bundle


def make_site(place: Path, bundle: Bundle, precision: str) -> Site:
    """A daemon's folder beside the engines, its sockets all ipc."""
    product = bundle.product(None)
    keys = place / "keys"
    if not (keys / "server.yaml").exists():
        make_server_key(keys)
        make_peer(keys, "line", ["camera", "subscriber", "bridge"], ["*"])
    config = {
        "version": 1,
        "line": f"large-{uuid.uuid4().hex[:8]}",  # /dev/shm is the machine's
        "inputs": [{"kind": "shm", "bind": "ipc://run/frames.sock"}],
        "results": {"bind": "ipc://run/results.sock"},
        "permits": {"bind": "ipc://run/permits.sock"},
        "control": {"bind": "ipc://run/control.sock"},
        "security": {"keys": "keys"},
        "engines": {"dir": "engines"},
        "backend": {"kind": "cpu", "precision": precision, "threads": _THREADS},
        "cameras": {"cam1": {"product": product, "mode": "every-frame", "deadline_ms": 250, "valid_ms": 500}},
        "ledger": {"dir": f"run/ledger-{product}-{precision}"},
    }
    return Site(place, config)


def run_line(site: Site, frames: list[ByteArray], rate: float, seconds: float) -> dict[str, Any]:
    """The asked rate, and the highest sustained one where that is lower."""
    site.start()
    try:
        with (
            listening(site, None) as listener,
            ShmSender(
                site.addresses.frames, site.config["line"], "cam1", slot_bytes=frames[0].nbytes, slots=_SLOTS
            ) as camera,
        ):
            numbers = count()

            def send() -> Part:
                """The next slot, which holds a frame from its first time on."""
                target = camera.reserve(_FRAME_HW)
                number = next(numbers)
                if number < _SLOTS:
                    target[...] = frames[number % len(frames)]
                return "cam1", camera.announce(target, "Mono8")

            flood(listener, send, _UNDER_WAY, _FLOOD_S)  # warms up, fills the slots

            def measure(asked: float) -> dict[str, Any]:
                return figures(stream(site, listener, asked, seconds, send), listener)

            asked = measure(rate)
            click.echo(f"{site.config['cameras']['cam1']['product']}, {site.config['backend']}: {asked}", err=True)
            if asked["sustained"]:
                return {"asked": asked, "sustained": asked}
            flooded = flood(listener, send, _UNDER_WAY, _FLOOD_S)
            return {"asked": asked, "flooded": flooded, "sustained": highest_sustained(min(rate, flooded), measure)}
    finally:
        site.stop()


def time_stages(bundle: Bundle, precision: str, frames: list[ByteArray], rounds: int) -> dict[str, dict[str, float]]:
    """{stage: median milliseconds, wall and of this thread}, the stages of a frame one after the other."""
    backend = CpuBackend(bundle, precision, _THREADS)
    rings = Rings()
    line = f"large-{uuid.uuid4().hex[:8]}"
    spent: dict[str, list[tuple[float, float]]] = {}
    kept: dict[str, Any] = {}

    def timed(stage: str, work: Callable[[], Any]) -> None:
        wall, own = time.perf_counter(), time.thread_time()
        kept[stage] = work()
        spent.setdefault(stage, []).append((time.perf_counter() - wall, time.thread_time() - own))

    nowhere = f"ipc:///tmp/{line}.sock"
    with ShmSender(nowhere, line, "cam1", slot_bytes=frames[0].nbytes, slots=rounds + 1) as camera:
        for number in range(rounds + 1):
            target = camera.reserve(_FRAME_HW)
            target[...] = frames[number % len(frames)]
            camera.announce(target, "Mono8")

            def copy_out(number: int = number) -> memoryview:
                return rings.read(line, "cam1", epoch=camera.epoch, seq=number, slot=number)

            timed("copy out of the ring", copy_out)
            frame = Frame(np.frombuffer(kept["copy out of the ring"], np.uint8).reshape(*_FRAME_HW, 1))
            timed("OpenCV's area average", lambda frame=frame: opencv_area(frame.pixels))
            timed("resize and normalise", lambda frame=frame: backend.preprocess(frame))
            timed("network", lambda: backend.features(kept["resize and normalise"]))
            timed("search", backend.nearest)
            outputs = backend.infer(kept["resize and normalise"])
            timed("postprocess", lambda outputs=outputs: backend.postprocess(outputs, _FRAME_HW))
    rings.close()
    backend.close()
    return {
        stage: {
            "ms": 1000 * median(wall for wall, _ in times[1:]),  # the first of each warms up
            "threadMs": 1000 * median(own for _, own in times[1:]),
        }
        for stage, times in spent.items()
    }


def opencv_area(pixels: ByteArray) -> ByteArray:
    return np.asarray(cv2.resize(pixels, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA), np.uint8)


if __name__ == "__main__":
    main()
