"""What the INT8 search finds: is the nearest row among the rows that it keeps for measuring again, and what if not.

    python -m bench.int8         (rendered parts; Lite0's features; the coreset as a build makes it; no GPU is needed)

The search is played in NumPy: the daemon's own quantised bank, products of integers that float32 holds exactly, ties to
the lowest row, as tests/reference.py has it and the kernel was found to do. The nearest row is FP64's. Patches of good
frames and of frames with defects are told apart: a defect may lie outside the range that INT8 has from the bank, and is
cut off. The excess is by how much the winner's squared distance is too large (it is never too small), as a share of the
frame's largest. Writes bench/results/int8.json.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from bench.record import origin, write_result
from bench.scale import exact, network_of
from daemon.inspection.backend.search import KEPT, quantise_bank
from daemon.types import FloatArray
from examples.parts import DEFECTS, write_dataset
from trainer import dataset
from trainer.backbone import load_backbone
from trainer.bank import choose_core
from trainer.features import read_pixels

_SIDE = 256
_ROWS = (1000, 4000, 16_000)
_COUNTS = (1, 2, KEPT, 8)
_GOOD, _TESTED, _DEFECTS_EACH = 60, 8, 2


@click.command()
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
def main(threads: int) -> None:
    """Measure and write."""
    with tempfile.TemporaryDirectory(prefix="inspectd-int8-") as name:
        write_dataset(Path(name), good_train=_GOOD, good_test=1, defects_each=_DEFECTS_EACH, size_hw=(300, 300))
        network, preprocessing = network_of(load_backbone(), _SIDE, threads)

        def features(folder: str) -> list[FloatArray]:
            pictures, _ = dataset.scan(Path(name) / folder, threads)
            return [network.run(read_pixels(picture, preprocessing)).copy() for picture in pictures]

        good = features("train/good")
        bad = [frame for kind in DEFECTS for frame in features(f"test/{kind}")]
    full = np.concatenate(good[_TESTED:])
    picks = choose_core(torch.from_numpy(full), max(_ROWS), 0).numpy()
    result = {
        **origin("numpy", "torch", "openvino"), "protocol": __doc__, "kept": KEPT, "patches": len(good[0]),
        "channels": int(full.shape[1]), "goodFrames": _TESTED, "defectFrames": len(bad),
        "search": [compare(full[picks[:rows]], good[:_TESTED], bad) for rows in _ROWS],
    }  # fmt: skip
    print(write_result("int8.json", result))


def compare(core: FloatArray, good: list[FloatArray], bad: list[FloatArray]) -> dict[str, Any]:
    return {"rows": len(core), "good": measure(core, good), "defect": measure(core, bad)}


def measure(core: FloatArray, frames: list[FloatArray]) -> list[dict[str, Any]]:
    """For each number of kept rows: the share of patches whose nearest row is among them, and the worst excess."""
    whole = quantise_bank(core)
    rows, bias = whole.rows[: len(core), : core.shape[1]].astype(np.float32), whole.bias[: len(core)]
    found: dict[int, list[float]] = {kept: [] for kept in _COUNTS}
    excess = dict.fromkeys(_COUNTS, 0.0)
    for features in frames:
        distances = exact(features, core)
        best = distances.min(1)
        queries = np.clip(np.rint((features - whole.centre) * whole.inverse), -127, 127)
        products = queries @ rows.T  # below 2^24 up to 1,040 channels: exact
        order = np.argsort(-(products.astype(np.int64) + bias), axis=1, kind="stable")
        for kept in _COUNTS:
            own = np.take_along_axis(distances, order[:, :kept], axis=1).min(1)
            found[kept] += list((own == best).astype(float))
            excess[kept] = max(excess[kept], float((own - best).max() / best.max()))
    return [{"kept": kept, "found": float(np.mean(found[kept])), "worstExcess": excess[kept]} for kept in _COUNTS]


if __name__ == "__main__":
    main()
