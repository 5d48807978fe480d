"""A whole frame on the GPU as the daemon runs it, with PyTorch's networks in TensorRT's place: gpu_check.py's."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.gpu_parity import MEAN, STD, Bank, Check, Search, exact_nearest
from daemon.inspection.backend.tables import banded, resampling, smoothing_operator
from tests import reference

_FRAME, _SIZE, _GRID = (2048, 2448), (256, 256), (32, 32)
_BANK_ROWS, _SIGMA = 10_000, 4.0


class WholeFrame:
    """Page-locked memory to map and score, recorded once as a CUDA graph."""

    def __init__(self, gpu: Any) -> None:
        torch = gpu.torch
        from trainer.backbone import EfficientNetLite0, PatchFeatures

        torch.manual_seed(0)
        self._gpu = gpu
        self.network = PatchFeatures(EfficientNetLite0()).eval().half().cuda().to(memory_format=torch.channels_last)
        self.host = torch.zeros((*_FRAME, 1), dtype=torch.uint8, pin_memory=True)
        self.frame = torch.zeros((*_FRAME, 1), dtype=torch.uint8, device="cuda")
        self.image = torch.zeros((1, 3, *_SIZE), dtype=torch.float16, device="cuda")
        self.features = torch.zeros((_GRID[0] * _GRID[1], 152), device="cuda")
        rng = np.random.default_rng(0)
        self.host.numpy()[:] = rng.integers(0, 255, self.host.shape, np.uint8)
        self._operators = [smoothing_operator(side, cells, _SIGMA) for side, cells in zip(_SIZE, _GRID, strict=True)]
        self._resample = [self._table(resampling(*sides)) for sides in zip(_SIZE, _FRAME, strict=True)]
        self._smooth = [self._table(banded(operator)) for operator in self._operators]
        self._scale = gpu.put(np.array([1.0 / std for std in STD], np.float32))
        self._offset = gpu.put(np.array([mean / std for mean, std in zip(MEAN, STD, strict=True)], np.float32))
        self._map, self._mask = gpu.put(np.zeros(_SIZE, np.float32)), gpu.put(np.zeros((_SIZE[0], 8), np.uint32))
        self._score = gpu.put(np.zeros(1, np.uint32))
        self.found = torch.zeros(_SIZE, pin_memory=True)
        # Random weights on a random image, brought to unit spread: features that differ, as trained ones do.
        self.image.copy_(torch.randn(self.image.shape))
        self._scale_features = 1.0
        self._run_networks()
        self._scale_features = 1.0 / float(self.features.std())
        self._run_networks()
        if not 0.5 < float(self.features.std()) < 2.0:
            raise SystemExit("gpu_check: the networks' features do not differ; there is nothing to search for")
        core = self.features.cpu().numpy()[rng.integers(0, 1024, _BANK_ROWS)]
        core += 0.05 * core.std() * rng.standard_normal(core.shape, np.float32)
        self.core, self.density = core, rng.random(_BANK_ROWS, np.float32)
        self._search = Search(Bank(gpu, core, self.density), np.zeros((1024, 152), np.float32), 0.25)
        self._search.features = (self.features, np.dtype(np.float32))
        self._graph = self._record()

    def _table(self, table: Any) -> tuple[Any, ...]:
        return self._gpu.put(table.first), self._gpu.put(table.weights), table.taps

    def _run_networks(self) -> None:
        with self._gpu.torch.inference_mode():
            found = self.network(self.image.contiguous(memory_format=self._gpu.torch.channels_last))
            self.features.copy_(found[0].flatten(1).T.float() * self._scale_features)

    def _enqueue(self) -> None:
        launch, (h, w) = self._gpu.launch, _SIZE
        pair = np.dtype(np.uint8), np.dtype(np.float16)
        self.frame.copy_(self.host, non_blocking=True)
        launch(
            "preprocess_mono8", (w // 32, h // 8), (32, 8), (self.frame, pair[0]), (self.image, pair[1]),
            *self._resample[0], *self._resample[1], self._scale, self._offset, *_FRAME, h, w,
        )  # fmt: skip
        self._run_networks()
        self._search.run()
        launch("postprocess_start", (1,), (1,), self._score)
        nothing = (self._gpu.torch.empty(0, device="cuda"), np.dtype(np.float32))  # data_ptr() of it is null
        launch(
            "postprocess", (w // 32, h // 8), (32, 8), nothing, self._search.scores, 0.0, 0.0, 0.0, 1.0,
            *self._smooth[0], *self._smooth[1], self._map, self._mask, self._score, 1e30, _GRID[1], h, w,
        )  # fmt: skip
        self.found.copy_(self._map[0], non_blocking=True)

    def _record(self) -> Any:
        torch = self._gpu.torch
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):  # libraries set themselves up in their first runs, which cannot be recorded
            for _ in range(3):
                self._enqueue()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._enqueue()
        return graph

    def run(self) -> None:
        self._graph.replay()
        self._gpu.torch.cuda.current_stream().synchronize()

    def check(self) -> list[Check]:
        """Every stage against the references, from the output of the one before, on a fresh frame."""
        self.host.numpy()[:] = np.random.default_rng(9).integers(0, 255, self.host.shape, np.uint8)
        self.found.fill_(float("nan"))
        self.run()
        wanted = reference.normalise(self.host.numpy(), _SIZE, MEAN, STD)
        image = self.image.float().cpu().numpy()
        rows, best = exact_nearest(self.features.cpu().numpy(), self.core)
        winners = self._gpu.get(self._search.winners)
        scores = self._gpu.get(self._search.scores).astype(np.float64)
        down, across = self._operators
        smoothed = down @ scores.reshape(_GRID) @ across.T
        return [
            Check("frame: network input", float(np.abs(image - wanted).max()), 0.5 / min(STD) + 2.0**-9),
            Check("frame: winners as in FP64", float((winners == rows).mean()), 0.99, is_least=True),
            Check(
                "frame: scores", float((np.abs(scores + 0.25 * self.density[winners] - best) / (1 + best)).max()), 1e-3
            ),
            Check("frame: map", float(np.abs(self.found.numpy() - smoothed).max() / np.abs(smoothed).max()), 1e-4),
        ]

    def describe(self) -> str:
        return f"{_FRAME[1]}x{_FRAME[0]} Mono8 -> {_SIZE[0]}x{_SIZE[1]}, {_BANK_ROWS} rows x 152"
