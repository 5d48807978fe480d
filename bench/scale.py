"""What a frame costs on the CPU as bank, input and cameras grow, and what the forms of the search are worth.

    python -m bench.scale        (rendered parts; Lite0's features; the coreset as a build makes it)
    python -m bench.scale --only cameras      (or search; the other curves stay as they were measured)

Search: 1,024 patches of 256x256 against 500 to 16,000 rows: pruned, exact (pruned.py), in the form that this machine
takes and in that for plain vectors of 512 bits; whole in f32, in bf16 as one product, and in bf16 as the daemon does it
(nearest.py). They take turns; medians, and the share of patches whose exactly nearest row (float64) was found.
Network: inputs of 128 to 512 pixels. Writes bench/results/scale.json and docs/scale.svg. A GPU's: bench/gpu_check.sh.
The worst excess is by how much, as a share of the frame's score, a distance was too large; a search where that is more
than its precision explains is not timed.
Cameras: 1 to 16 of them, frames of 256x256 through a daemon's encrypted sockets to an engine that is small (one
convolution at 256x256; 4,000 rows of 16 channels), so that the daemon's own part shows. The highest total rate that is
sustained for 10 s without OVERLOAD or LATE (250 ms): from what it takes with two frames a camera under way, down by a
tenth a step. Frames in turns; milliseconds from sending to hearing; the loop's share is of one core. The cameras, their
subscriber and their bridge are one process on the same cores.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import openvino as ov
import torch
import zmq
from openvino import opset13 as ops
from safetensors.numpy import load_file, save_file

from bench.record import RESULTS, ROOT, origin, write_result
from bench.streams import Part, figures, flood, highest_sustained, listening, stream
from daemon.bundle import BANK, Preprocessing
from daemon.inspection.backend import nearest
from daemon.inspection.backend.pruned import PrunedRows, forms_here, load_library
from daemon.line.sockets import connect
from daemon.line.wire import encode_frame
from daemon.types import FloatArray
from examples.parts import write_dataset
from tests.bundles import good_pixels, raw_frame
from tests.daemons import Site, make_site
from trainer import dataset
from trainer.backbone import Backbone, load_backbone
from trainer.bank import choose_core
from trainer.export import EngineNetwork
from trainer.features import FeatureNetwork, read_pixels
from trainer.settings import View

_ROWS = (500, 1000, 2000, 4000, 8000, 16000)
_SIDES = (128, 192, 256, 384, 512)
_SIDE = 256
_GOOD, _TESTED = 60, 8
# Of the frame's score, its largest distance; one product in bf16 is here to be compared with, as bad as it is.
_WORST_EXCESS = {"f32": 1e-5, "bf16": 0.03, "bf16, one product": np.inf}
_PLOT = ROOT / "docs" / "scale.svg"
_CAMERAS = (1, 2, 4, 8, 16)
_DEADLINE_MS = 250
_PICTURES = 50
_BANK_ROWS, _REPEATED = 4000, 80


@click.command()
@click.option("--rounds", type=click.IntRange(3), default=15, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--seconds", type=float, default=10.0, show_default=True, help="That a rate of cameras must hold.")
@click.option("--only", type=click.Choice(["cameras", "search"]), help="Measure this alone.")
def main(*, rounds: int, threads: int, seconds: float, only: str | None) -> None:
    """Measure, write, plot."""
    made = {**origin("openvino", "numpy", "torch", "pyzmq"), "protocol": __doc__}
    result = json.loads((RESULTS / "scale.json").read_text()) if only else {}
    if only != "cameras":
        result |= {**made, "threads": threads, **time_forms(rounds, threads)}
    if only != "search":
        result |= {"cameras": {**made, "seconds": seconds, "curve": time_cameras(seconds)}}
    write_result("scale.json", result)
    plot(result)


def time_forms(rounds: int, threads: int) -> dict[str, Any]:
    """The search by bank rows, the network by input side."""
    with tempfile.TemporaryDirectory(prefix="inspectd-scale-") as name:
        write_dataset(Path(name), good_train=_GOOD, good_test=1, defects_each=1, size_hw=(300, 300))
        pictures, _ = dataset.scan(Path(name) / "train" / "good", threads)
        backbone = load_backbone()
        network, preprocessing = network_of(backbone, _SIDE, threads)
        features = [network.run(read_pixels(picture, preprocessing)).copy() for picture in pictures]
    full = np.concatenate(features[_TESTED:])
    picks = choose_core(torch.from_numpy(full), max(_ROWS), 0).numpy()
    return {
        "patches": len(features[0]), "channels": int(full.shape[1]),
        "search": [time_search(full[picks[:rows]], features[:_TESTED], rounds, threads) for rows in _ROWS],
        "network": time_networks(backbone, rounds, threads),
    }  # fmt: skip


def network_of(backbone: Backbone, side: int, threads: int) -> tuple[FeatureNetwork, Preprocessing]:
    preprocessing = Preprocessing(size=(side, side), mean=backbone.mean, std=backbone.std)
    return FeatureNetwork(EngineNetwork(backbone, View()), preprocessing, threads), preprocessing


def time_search(core: FloatArray, queries: list[FloatArray], rounds: int, threads: int) -> dict[str, Any]:
    """{rows, ms and share found by form}, the forms in turns."""
    bank = {"core": core, "bias": (-0.5 * np.square(core, dtype=np.float64).sum(1)).astype(np.float32)}
    source = ov.Tensor(queries[0].copy(), shared_memory=True)
    options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    forms: dict[str, nearest.NearestRows | PrunedRows | OneProduct] = {}
    if library := load_library():
        for form in forms_here(library)[:-3:-1]:
            forms[f"f32, pruned, {form}"] = PrunedRows(library, bank, source, threads, form)
    forms["f32"] = nearest.NearestRows(bank, source, {**options, "INFERENCE_PRECISION_HINT": "f32"})
    if "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        forms["bf16, one product"] = OneProduct(bank, source, {**options, "INFERENCE_PRECISION_HINT": "bf16"})
        forms["bf16"] = nearest.NearestRows(bank, source, {**options, "INFERENCE_PRECISION_HINT": "bf16"})
    spent: dict[str, list[float]] = {form: [] for form in forms}
    found: dict[str, list[bool]] = {form: [] for form in forms}
    worst = dict.fromkeys(forms, 0.0)
    for number in range(rounds * len(queries)):
        query = queries[number % len(queries)]
        source.data[:] = query
        distances = exact(query, core) if number < len(queries) else None
        for form, search in forms.items():
            started = time.perf_counter()
            rows, _ = search.find()
            spent[form].append(1000.0 * (time.perf_counter() - started))
            if distances is not None:
                worst[form] = max(worst[form], check(form, rows, distances))
                found[form] += list(rows == distances.argmin(1))
    return {
        "rows": len(core),
        "ms": {form: median(values) for form, values in spent.items()},
        "found": {form: float(np.mean(values)) for form, values in found.items()},
        "worstExcess": worst,
    }


class OneProduct:
    """The search that bf16 had before: the whole bank in one product, its winner taken as it is."""

    def __init__(self, bank: dict[str, FloatArray], source: ov.Tensor, options: dict[str, Any]) -> None:
        features = ops.parameter(list(source.shape), np.float32)
        product = ops.matmul(features, ops.constant(np.ascontiguousarray(bank["core"].T)), False, False)
        best = ops.topk(ops.add(product, ops.constant(bank["bias"][None])), ops.constant(1), 1, "max", "none")
        model = ov.Model([ops.result(best.output(1))], [features], "one product")
        self._request = ov.Core().compile_model(model, "CPU", options).create_infer_request()
        self._request.set_input_tensor(source)
        self._bank, self._source = bank, source

    def find(self) -> tuple[nearest.Rows, FloatArray]:
        """As NearestRows: (row (P,), squared distance (P,))."""
        self._request.infer()
        rows: nearest.Rows = self._request.get_output_tensor(0).data[:, 0]
        difference = self._source.data - self._bank["core"][rows]
        distance_sq: FloatArray = np.einsum("pc,pc->p", difference, difference)
        return rows, distance_sq


def exact(query: FloatArray, core: FloatArray) -> np.ndarray[Any, np.dtype[np.float64]]:
    q, m = query.astype(np.float64), core.astype(np.float64)
    distances: np.ndarray[Any, np.dtype[np.float64]] = (q**2).sum(1)[:, None] + (m**2).sum(1) - 2 * q @ m.T
    return distances


def check(form: str, rows: nearest.Rows, distances: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """By how much of the frame's score the worst of the found rows is too far. Raises where the search is wrong."""
    best = distances.min(1)
    excess = float((distances[np.arange(len(rows)), rows] - best).max() / best.max())
    if excess > _WORST_EXCESS.get(form, _WORST_EXCESS["f32"]):
        raise click.ClickException(f"nothing is timed: {form} found a row that is too far by {excess:.1%} of the score")
    return excess


def time_networks(backbone: Backbone, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Median milliseconds of the network by input side, in turns."""
    networks = {side: network_of(backbone, side, threads)[0] for side in _SIDES}
    spent: dict[int, list[float]] = {side: [] for side in _SIDES}
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        for side, network in networks.items():
            pixels = rng.uniform(0, 255, (side, side, 3)).astype(np.float32)
            started = time.perf_counter()
            network.run(pixels)
            spent[side].append(1000.0 * (time.perf_counter() - started))
    return [{"side": side, "patches": networks[side].patches, "ms": median(spent[side])} for side in _SIDES]


def time_cameras(seconds: float) -> list[dict[str, Any]]:
    """Each number of cameras at the highest total rate that is sustained, on one daemon."""
    with tempfile.TemporaryDirectory(prefix="inspectd-scale-") as name:
        bank = Path(name) / "engines" / "part" / "1" / BANK
        rows = {"rows": _BANK_ROWS // _REPEATED, "change": lambda _: repeat(bank, _REPEATED)}
        site = make_site(Path(name), size=(_SIDE, _SIDE), **rows)
        site.config["queue_mb"] = 64
        camera = {**site.config["cameras"]["cam1"], "deadline_ms": _DEADLINE_MS}
        site.config["cameras"] = {f"cam{number}": dict(camera) for number in range(1, max(_CAMERAS) + 1)}
        payloads = [memoryview(good_pixels(seed, (_SIDE, _SIDE)).tobytes()) for seed in range(_PICTURES)]
        site.start()
        try:
            return [{"cameras": cameras, **run_cameras(site, payloads, cameras, seconds)} for cameras in _CAMERAS]
        finally:
            site.stop()


def repeat(bank: Path, times: int) -> None:
    """The same rows so many times: every distance stays as it was, and the search has as much to do as with others."""
    tensors = load_file(bank)
    repeated = {name: np.concatenate([values] * times) for name, values in tensors.items()}
    save_file(repeated, bank)


def run_cameras(site: Site, payloads: list[memoryview], cameras: int, seconds: float) -> dict[str, Any]:
    """Find the rate for so many cameras, each a connection of its own."""
    keys = site.peer()
    context: zmq.Context[Any] = zmq.Context()
    with listening(site, keys) as listener:
        doors = [connect(context, zmq.DEALER, site.addresses.frames, keys) for _ in range(cameras)]
        try:
            for door in doors:
                listener.watch(door, lambda door=door: drop_answers(door))
            send = sender(site, doors, payloads)
            flood(listener, send, 2 * cameras, seconds / 4)  # warms up
            first = flood(listener, send, 2 * cameras, seconds / 4)

            def measure(rate: float) -> dict[str, Any]:
                return figures(stream(site, listener, rate, seconds, send), listener)

            return {"flooded": first, **highest_sustained(first, measure)}
        finally:
            context.destroy(linger=0)


def sender(site: Site, doors: list[Any], payloads: list[memoryview]) -> Callable[[], Part]:
    """Sends the next frame, each camera in its turn."""
    epoch, turns = str(time.monotonic_ns()), count()
    template = raw_frame(good_pixels(0, (_SIDE, _SIDE)))

    def send() -> Part:
        seq, turn = divmod(next(turns), len(doors))
        payload = payloads[(seq + turn) % len(payloads)]
        frame = replace(template, camera=f"cam{turn + 1}", epoch=epoch, seq=seq, payload=payload)
        doors[turn].send_multipart(encode_frame(site.config["line"], frame), zmq.NOBLOCK)
        return frame.camera, seq

    return send


def drop_answers(door: Any) -> None:
    while door.poll(0):
        door.recv_multipart()


def plot(result: dict[str, Any]) -> None:
    """Three panels: the search by rows, the network by input side, the cameras."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    FigureCanvasSVG(figure)
    left, right, cameras = figure.subplots(1, 3)
    rows = [each["rows"] for each in result["search"]]
    for form in result["search"][0]["ms"]:
        left.plot(rows, [each["ms"][form] for each in result["search"]], "o-", label=form)
    left.set(xscale="log", yscale="log", xlabel="rows of the bank", ylabel="ms", title="search, 1,024 patches")
    left.legend()
    right.plot([each["side"] for each in result["network"]], [each["ms"] for each in result["network"]], "o-")
    right.set(xlabel="input side, pixels", ylabel="ms", title="feature network, f32")
    right.set_ylim(bottom=0)
    plot_cameras(cameras, result["cameras"]["curve"])
    for panel in (left, right, cameras):
        panel.grid(visible=True, alpha=0.3)
    figure.savefig(_PLOT, metadata={"Date": None})


def plot_cameras(panel: Any, curve: list[dict[str, Any]]) -> None:
    """Frames a second in all, and on an axis of its own the loop's share of a core."""
    numbers = [each["cameras"] for each in curve]
    panel.plot(numbers, [each["framesPerS"] for each in curve], "o-", color="tab:blue")
    panel.set_xscale("log", base=2)
    panel.set_xticks(numbers, [str(number) for number in numbers])
    panel.set(xlabel="cameras", title="cameras on a small engine")
    panel.set_ylabel("frames a second in all", color="tab:blue")
    panel.set_ylim(bottom=0)
    share = panel.twinx()
    share.plot(numbers, [100 * each["loopShare"] for each in curve], "s--", color="tab:orange")
    share.set_ylabel("the loop's share of a core, %", color="tab:orange")
    share.set_ylim(bottom=0)


if __name__ == "__main__":
    main()
