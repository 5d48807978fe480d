"""What a frame costs on the CPU as bank and input grow, and what the forms of the search are worth.

    python -m bench.scale        (rendered parts; Lite0's features; the coreset as a build makes it)

Search: 1,024 patches of 256x256 against 500 to 16,000 rows, in f32, in bf16 as one product, and in bf16 as the daemon
does it (nearest.py); they take turns, medians, and the share of patches whose exactly nearest row (float64) was found.
Network: inputs of 128 to 512 pixels. Writes bench/results/scale.json and docs/scale.svg. A GPU's: bench/gpu_check.sh.
The worst excess is by how much, as a share of the frame's score, a distance was too large; a search where that is more
than its precision explains is not timed.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import openvino as ov
import torch

from bench.record import ROOT, origin, write_result
from daemon.bundle import Preprocessing
from daemon.inspection.backend import nearest
from daemon.types import FloatArray
from examples.parts import write_dataset
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


@click.command()
@click.option("--rounds", type=click.IntRange(3), default=15, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
def main(rounds: int, threads: int) -> None:
    """Measure, write, plot."""
    with tempfile.TemporaryDirectory(prefix="inspectd-scale-") as name:
        write_dataset(Path(name), good_train=_GOOD, good_test=1, defects_each=1, size_hw=(300, 300))
        pictures, _ = dataset.scan(Path(name) / "train" / "good", threads)
        backbone = load_backbone()
        network, preprocessing = network_of(backbone, _SIDE, threads)
        features = [network.run(read_pixels(picture, preprocessing)).copy() for picture in pictures]
    full = np.concatenate(features[_TESTED:])
    picks = choose_core(torch.from_numpy(full), max(_ROWS), 0).numpy()
    result = {
        **origin("openvino", "numpy", "torch"), "protocol": __doc__, "threads": threads,
        "patches": len(features[0]), "channels": int(full.shape[1]),
        "search": [time_search(full[picks[:rows]], features[:_TESTED], rounds, threads) for rows in _ROWS],
        "network": time_networks(backbone, rounds, threads),
    }  # fmt: skip
    write_result("scale.json", result)
    plot(result)


def network_of(backbone: Backbone, side: int, threads: int) -> tuple[FeatureNetwork, Preprocessing]:
    preprocessing = Preprocessing(size=(side, side), mean=backbone.mean, std=backbone.std)
    return FeatureNetwork(EngineNetwork(backbone, View()), preprocessing, threads), preprocessing


def time_search(core: FloatArray, queries: list[FloatArray], rounds: int, threads: int) -> dict[str, Any]:
    """{rows, ms and share found by form}, the forms in turns."""
    bank = {"core": core, "bias": (-0.5 * np.square(core, dtype=np.float64).sum(1)).astype(np.float32)}
    source = ov.Tensor(queries[0].copy(), shared_memory=True)
    options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    forms = {"f32": nearest.NearestRows(bank, source, {**options, "INFERENCE_PRECISION_HINT": "f32"})}
    if "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        forms["bf16, one product"] = one_product(bank, source, {**options, "INFERENCE_PRECISION_HINT": "bf16"})
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


def one_product(bank: dict[str, FloatArray], source: ov.Tensor, options: dict[str, Any]) -> nearest.NearestRows:
    """The search that bf16 had before: the whole bank in one product, its winner taken as it is."""
    search = nearest.NearestRows(bank, source, {**options, "INFERENCE_PRECISION_HINT": "f32"})
    model = nearest._whole(source.shape[0], bank)  # noqa: SLF001 - the form that is compared with
    search._request = ov.Core().compile_model(model, "CPU", options).create_infer_request()  # noqa: SLF001
    search._request.set_input_tensor(source)  # noqa: SLF001
    return search


def exact(query: FloatArray, core: FloatArray) -> np.ndarray[Any, np.dtype[np.float64]]:
    q, m = query.astype(np.float64), core.astype(np.float64)
    distances: np.ndarray[Any, np.dtype[np.float64]] = (q**2).sum(1)[:, None] + (m**2).sum(1) - 2 * q @ m.T
    return distances


def check(form: str, rows: nearest.Rows, distances: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """By how much of the frame's score the worst of the found rows is too far. Raises where the search is wrong."""
    best = distances.min(1)
    excess = float((distances[np.arange(len(rows)), rows] - best).max() / best.max())
    if excess > _WORST_EXCESS[form]:
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


def plot(result: dict[str, Any]) -> None:
    """Two panels: the search by rows, the network by input side."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasSVG(figure)
    left, right = figure.subplots(1, 2)
    for form in result["search"][0]["ms"]:
        left.plot(
            [each["rows"] for each in result["search"]],
            [each["ms"][form] for each in result["search"]],
            "o-",
            label=form,
        )
    left.set(xscale="log", yscale="log", xlabel="rows of the bank", ylabel="ms", title="search, 1,024 patches")
    left.legend()
    right.plot([each["side"] for each in result["network"]], [each["ms"] for each in result["network"]], "o-")
    right.set(xlabel="input side, pixels", ylabel="ms", title="feature network, f32")
    for panel in (left, right):
        panel.grid(visible=True, alpha=0.3)
        panel.set_ylim(bottom=None if panel is left else 0)
    figure.savefig(_PLOT, metadata={"Date": None})


if __name__ == "__main__":
    main()
