"""The CUDA backend itself on a GPU, the networks left out: driver calls, page-locked memory, graphs, sizes, closing.

    python -m bench.gpu_backend          (PyCUDA is needed; the end of bench/gpu_check.sh)

Fixed features stand in for the networks' output, so that no TensorRT is needed; everything else is
daemon/inspection/backend/cuda.py as the daemon runs it, kernels compiled by PyCUDA where it says so.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from bench.gpu_check import report
from bench.gpu_parity import MEAN, STD, Check, make_features, to_plain
from daemon.inspection.backend import cuda
from daemon.inspection.backend.tables import smoothing_operator
from daemon.types import Frame, Layout
from tests import reference

_ALPHA, _SIGMA = 0.25, 4.0


class FixedNetworks:
    """In place of daemon.inspection.backend.plan.Networks: the same features for every frame."""

    def __init__(self, driver: Any, size: tuple[int, int], features: Any) -> None:
        self._driver, self.channels = driver, features.shape[1]
        self._features, self._bytes = driver.to_device(features), features.nbytes
        self.buffers = {"image": driver.mem_alloc(2 * 3 * size[0] * size[1]), "features": driver.mem_alloc(self._bytes)}

    def enqueue(self, stream: Any) -> None:
        self._driver.memcpy_dtod_async(self.buffers["features"], self._features, self._bytes, stream)


def check_backend(
    size: tuple[int, int], grid: tuple[int, int], rows: int, frames: list[tuple[int, int]]
) -> list[Check]:
    """Frames of these sizes, the first one twice and in each layout, against the references; then it is closed."""
    features, core, density = make_features(grid[0] * grid[1], rows, 24, 0)
    manifest = SimpleNamespace(
        grid=grid, branches=["ldknn"], alpha=_ALPHA, scoreRule="max", files=[],
        products={"p": SimpleNamespace(mapLimit=0.0)},
        preprocessing=SimpleNamespace(size=size, mean=MEAN, std=STD),
        fusion=SimpleNamespace(
            smoothingSigma=_SIGMA, weights={"ldknn": 1.0},
            standardisation={"ldknn": SimpleNamespace(centre=1.0, scale=2.0)},
        ),
    )  # fmt: skip
    bundle: Any = SimpleNamespace(folder=Path("check"), digest="check", manifest=manifest)
    kept = cuda.Networks, cuda.load_bank
    cuda.Networks = lambda _bundle, _capability, driver: FixedNetworks(driver, size, features)  # type: ignore[misc, assignment]
    cuda.load_bank = lambda _bundle: {"core": core, "density": density}
    try:
        backend = cuda.CudaBackend(bundle)
    finally:
        cuda.Networks, cuda.load_bank = kept  # type: ignore[misc]
    scores, _ = reference.ldknn(features, core, density, _ALPHA)
    down, across = (smoothing_operator(side, cells, _SIGMA) for side, cells in zip(size, grid, strict=True))
    wanted = down @ ((scores - 1.0) / 2.0).reshape(grid) @ across.T
    checks = []
    shapes: list[tuple[tuple[int, int], Layout]] = [(frame_hw, "plain") for frame_hw in [frames[0], *frames]]
    shapes += [(frames[0], "bgr"), (frames[0], "bayerrg")]
    for number, (frame_hw, layout) in enumerate(shapes):
        pixels = np.random.default_rng(number).integers(0, 256, (*frame_hw, 3 if layout == "bgr" else 1), np.uint8)
        found = backend.run(Frame(pixels, layout))[0].values
        image = backend.tap("image", (1, 3, *size), np.float16).astype(np.float64)
        expected = reference.normalise(to_plain(pixels, layout), size, MEAN, STD)
        name = f"{frame_hw} {layout}"
        checks.append(Check(f"{name}: image", float(np.abs(image - expected).max()), 0.5 / min(STD) + 2.0**-9))
        checks.append(Check(f"{name}: map", float(np.abs(found - wanted).max() / np.abs(wanted).max()), 1e-3))
        bits = float((backend.mask() != (found >= 0.0)).sum())
        checks.append(Check(f"{name}: wrong bits of the mask", bits, 0.0))
    backend.close()
    return checks


def main() -> None:
    frames = [(256, 256), (2048, 2448), (1200, 1920), (300, 300), (480, 640), (256, 256)]
    if not report(check_backend((256, 256), (32, 32), 4000, frames)):
        sys.exit("gpu_backend: the backend is not what the references say")


if __name__ == "__main__":
    main()
