"""Hand-over of a frame from a camera's process to the daemon's: shared memory, ipc, tcp, tcp with CURVE, in turns.

    python -m bench.transport [--keep-awake]     (bench/awake.py: where the host gives a core that rests away)

`shm` is a camera whose driver writes into the slot itself, `shm, copied in` one whose frame is copied there first.
Milliseconds from the call that sends until the daemon's own code has the frame's pixels (receive, decode_frame,
frame()), by the monotonic clock that processes share; one frame under way at a time, as at a camera's pace. Of these,
apart: until the message is received, its header read (decode_frame), its pixels had (frame()). Beside them, in the
same run, what any hand-over by messages and read(2) costs at least here: one small message alone, and read(2) of as
many bytes out of /dev/shm into memory that was used before. Result: bench/results/transport.json.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import zmq

from adapters.shm_sender import ShmSender
from bench.awake import kept_awake
from bench.record import origin, write_result
from daemon.line.ports import receive
from daemon.line.shm import FOLDER, Rings
from daemon.line.wire import decode_frame, encode_frame
from daemon.types import RawFrame

_SIZES = {"0.3 MB": (480, 640), "2.3 MB": (1200, 1920), "15 MB": (2048, 2448, 3)}
_FRAMES, _ROUNDS, _PAUSE_S, _SLOTS = 60, 5, 0.005, 4


def serve(address: str, keys: tuple[bytes, bytes] | None, pipe: Connection) -> None:
    """The daemon's end: tell when each frame was there."""
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    if keys:
        socket.curve_server, socket.curve_publickey, socket.curve_secretkey = True, *keys
    socket.bind(address)
    rings = Rings()
    pipe.send("ready")
    while True:
        if not socket.poll(100):
            if pipe.poll():
                return
            continue
        message = receive(socket, routed=True)
        assert message is not None
        received_ns = time.monotonic_ns()
        has_slot = len(message.parts) == 2
        part = decode_frame(message.parts, rings.read if has_slot else None)
        known_ns = time.monotonic_ns()
        frame = part.frame()
        taken_ns = time.monotonic_ns()
        del frame
        answer = json.dumps({"seq": part.key.seq}).encode()
        socket.send_multipart([message.identity, b"answer", answer])
        pipe.send((received_ns, known_ns, taken_ns))


def measure(kind: str, shape: tuple[int, ...], place: Path) -> list[tuple[float, ...]]:
    """Milliseconds of each frame of one round until received, known and taken; the first three are left out."""
    name = f"{kind}-{time.monotonic_ns()}"
    address = f"ipc://{place}/{name}" if kind.startswith(("shm", "ipc")) else f"tcp://127.0.0.1:{_free_port()}"
    keys = zmq.curve_keypair() if kind == "tcp, CURVE" else None
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(address, keys, theirs), daemon=True)
    process.start()
    assert ours.recv() == "ready"
    pixels = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    prepare, send, close = make_sender(kind, address, keys[0] if keys else None, pixels)
    spent = []
    for _ in range(_FRAMES + 3):
        prepare()
        started = time.monotonic_ns()
        send()
        spent.append(tuple((at - started) / 1e6 for at in ours.recv()))
        time.sleep(_PAUSE_S)
    close()
    ours.send("end")
    process.join(5)
    return spent[3:]


def make_sender(
    kind: str, address: str, server: bytes | None, pixels: np.ndarray[Any, Any]
) -> tuple[Callable[[], None], Callable[[], Any], Callable[[], None]]:
    """(what comes before a frame is complete, send one frame, close)."""
    pixel_format = "RGB8" if pixels.ndim == 3 else "Mono8"
    if kind.startswith("shm"):
        camera = ShmSender(address, "bench", "cam1", slot_bytes=pixels.nbytes)
        if kind == "shm, copied in":
            return lambda: None, lambda: camera.send(pixels, pixel_format), camera.close
        target = [pixels]

        def grab() -> None:  # what the camera's driver does, before the frame is complete
            target[0] = camera.reserve(pixels.shape)
            target[0][...] = pixels

        return grab, lambda: camera.announce(target[0], pixel_format), camera.close
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    if server is not None:
        socket.curve_serverkey = server
        socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
    socket.connect(address)
    state = {"seq": 0}

    def send() -> None:
        payload = memoryview(pixels.reshape(-1))
        frame = RawFrame("cam1", "e", state["seq"], None, 1, "raw", pixels.shape, pixel_format, None, payload)
        socket.send_multipart(encode_frame("bench", frame), copy=False)
        state["seq"] += 1
        while socket.poll(0):
            socket.recv_multipart()

    return lambda: None, send, lambda: context.destroy(linger=0)


def read_alone(shape: tuple[int, ...]) -> list[float]:
    """Milliseconds of read(2) of so many bytes from shared memory, each time others, as a ring's slots."""
    size = int(np.prod(shape))
    spent = []
    with tempfile.TemporaryFile(dir=FOLDER) as file:
        for _ in range(_SLOTS):
            file.write(np.random.default_rng(0).integers(0, 255, size, np.uint8))
        file.flush()
        target = np.ones(size, np.uint8)
        for number in range(_FRAMES):
            started = time.perf_counter()
            os.preadv(file.fileno(), [target.data], number % _SLOTS * size)
            spent.append(1000 * (time.perf_counter() - started))
            time.sleep(_PAUSE_S)
    return spent


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@click.command()
@click.option("--keep-awake", is_flag=True, help="An idle loop on each core, so that a shared host leaves it here.")
def main(keep_awake: bool) -> None:  # noqa: FBT001 - click
    """Rounds in turns; medians and the p99 over all of a kind's frames."""
    with kept_awake() if keep_awake else nullcontext():
        rows, reads = run_rounds()
    result = {"frames": _FRAMES, "keptAwake": keep_awake, "rows": rows, "readMs": reads}
    print(result["readMs"])
    write_result("transport.json", {**origin("pyzmq", "numpy"), "protocol": __doc__, **result})


def run_rounds() -> tuple[list[dict[str, Any]], dict[str, float]]:
    """(a row for each size and kind, milliseconds of read(2) alone by size)."""
    kinds = ("shm", "shm, copied in", "ipc", "tcp", "tcp, CURVE")
    spent: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    reads: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="inspectd-transport-") as folder:
        for _ in range(_ROUNDS):
            for size, shape in _SIZES.items():
                reads.setdefault(size, []).extend(read_alone(shape))
                for kind in kinds:
                    spent.setdefault((size, kind), []).extend(measure(kind, shape, Path(folder)))
            spent.setdefault(("1 pixel", "ipc"), []).extend(measure("ipc", (1, 1), Path(folder)))
    rows = []
    for (size, kind), times in spent.items():
        received, known, taken = np.array(times).T
        row: dict[str, Any] = {"size": size, "kind": kind, "p50Ms": median(taken), "p99Ms": np.percentile(taken, 99)}
        row |= {"messageMs": median(received), "headerMs": median(known - received), "pixelsMs": median(taken - known)}
        rows.append({key: value if isinstance(value, str) else round(float(value), 4) for key, value in row.items()})
        print(rows[-1])
    return rows, {size: median(times) for size, times in reads.items()}


if __name__ == "__main__":
    main()
