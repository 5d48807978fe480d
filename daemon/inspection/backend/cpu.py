"""The CPU backend: OpenVINO for the networks, our own C for the search, OpenCV and NumPy for the rest.

The search is pruned.py's where that was compiled, else nearest.py's by OpenVINO. Precision bf16 is that of the latter
alone: a network in bf16 shifts every feature and does not reproduce the golden frames (docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter_ns
from typing import Any

import cv2
import numpy as np

from daemon.bundle import NETWORKS, Bundle, Preprocessing
from daemon.errors import DeviceError
from daemon.inspection.backend.nearest import NearestRows, Rows, openvino_core
from daemon.inspection.backend.pruned import PrunedRows, load_library
from daemon.inspection.backend.resize import Resizer
from daemon.inspection.backend.tables import branch_scaling, score_of, smoothing_operator
from daemon.inspection.decode import to_plain
from daemon.inspection.tensors import check_outputs, load_bank
from daemon.types import AnomalyMap, FloatArray, Frame, PatchScores, Tensor, Timings


class CpuBackend:
    """The Backend protocol on OpenVINO; its stages are for the trainer and the tests. `threads` bounds inference."""

    name = "cpu"

    def __init__(self, bundle: Bundle, precision: str, threads: int) -> None:
        # One more thread pool beside OpenVINO's would only fight with it for the cores.
        cv2.setNumThreads(1)
        self.precision = precision
        manifest = bundle.manifest
        self._preprocessing = manifest.preprocessing
        self._grid = manifest.grid
        self._score_rule = manifest.scoreRule
        self._resizer = Resizer(*manifest.preprocessing.size)
        self._input = np.empty((1, 3, *manifest.preprocessing.size), np.float32)
        self._branches = {branch: branch_scaling(manifest.fusion, branch) for branch in manifest.branches}
        bank = load_bank(bundle) if "ldknn" in self._branches else None
        self._network, self._search = _compile(bundle, bank, precision, threads)
        if bank is not None:
            self._alpha_density = np.float32(manifest.alpha) * bank["density"]
        sigma = manifest.fusion.smoothingSigma
        self._rows = smoothing_operator(manifest.preprocessing.size[0], manifest.grid[0], sigma)
        self._columns = smoothing_operator(manifest.preprocessing.size[1], manifest.grid[1], sigma).T.copy()

    def run(self, frame: Frame) -> tuple[AnomalyMap, Timings]:
        started = perf_counter_ns()
        tensor = self.preprocess(frame)
        prepared = perf_counter_ns()
        outputs = self.infer(tensor)
        inferred = perf_counter_ns()
        found = self.postprocess(outputs, (frame.pixels.shape[0], frame.pixels.shape[1]))
        ended = perf_counter_ns()
        spent_ms = [spent / 1e6 for spent in (prepared - started, inferred - prepared, ended - inferred)]
        return found, Timings(None, None, *spent_ms)

    def network_input(self) -> FloatArray:
        return np.asarray(self._input[0])

    def preprocess(self, frame: Frame) -> Tensor:
        """(H W C) pixels -> (1 3 h w), resized and normalised as the manifest says."""
        return Tensor(normalise(frame, self._preprocessing, self._resizer, self._input))

    def features(self, tensor: Tensor) -> FloatArray:
        """Tap: patch features (P C), of a map engine its map (P,): the network's own buffer, until the next call."""
        try:
            self._network.infer([tensor.values], share_inputs=True)
        except RuntimeError as error:
            raise DeviceError(f"OpenVINO failed: {error}") from error
        features: FloatArray = self._network.get_output_tensor(0).data
        return features

    def nearest(self) -> tuple[Rows, FloatArray]:
        """Tap: for each patch of the last `features` its nearest bank row (P,) and the squared distance to it (P,)."""
        assert self._search is not None
        return self._search.find()

    def infer(self, tensor: Tensor) -> dict[str, PatchScores]:
        """What each branch of the bundle says of the patches, by its name."""
        first = self.features(tensor)
        if "map" in self._branches:
            return {"map": PatchScores(first)}
        found = {}
        if "repair" in self._branches:
            found["repair"] = PatchScores(self._network.get_output_tensor(1).data)
        if self._search is not None:
            rows, distance_sq = self._search.find()
            # LDKNN (REB, Lyu et al. 2023, eq. 4): the winner is the plain nearest row, the correction comes after.
            found["ldknn"] = PatchScores(distance_sq - self._alpha_density[rows])
        return found

    def postprocess(self, outputs: Mapping[str, PatchScores], frame_hw: tuple[int, int]) -> AnomalyMap:
        """Standardise, combine, upsample and smooth to (h w); the score by the manifest's rule."""
        # Upsampling and smoothing are linear: the branches are combined first, on the small grid.
        grid = np.zeros(self._grid, np.float32)
        for branch, (centre, factor) in self._branches.items():
            if branch not in outputs:
                raise DeviceError(f"the backend's inference gave no scores for the bundle's branch {branch}")
            grid += (outputs[branch].values.reshape(self._grid) - centre) * factor
        smoothed: FloatArray = (self._rows @ grid @ self._columns).astype(np.float32, copy=False)
        return AnomalyMap(smoothed, frame_hw, score_of(smoothed, self._score_rule))

    def close(self) -> None:
        if self._search is not None:
            self._search.close()
        # OpenVINO's objects end here: one that outlives its library, at the end of the process, takes it down.
        del self._network, self._search


def normalise(
    frame: Frame, preprocessing: Preprocessing, resizer: Resizer | None = None, out: FloatArray | None = None
) -> FloatArray:
    """(H W C) pixels of 8 or 16 bit -> (1 3 h w) float32: in RGB, area-resized, then (x - mean) / std per channel.

    16-bit pixels are brought to the scale 0..255 after the resize; gray is repeated in all channels. A
    resizer of this size is used where it is given, and the result is written to `out`.
    """
    height, width = preprocessing.size
    pixels = (resizer or Resizer(height, width)).resize(to_plain(frame).pixels)
    planes = pixels.reshape(height, width, -1).transpose(2, 0, 1)
    values = np.empty((1, 3, height, width), np.float32) if out is None else out
    to_eight_bit = 1.0 / 257.0 if pixels.dtype == np.uint16 else 1.0
    scaling = [(mean, 1.0 / std) for mean, std in zip(preprocessing.mean, preprocessing.std, strict=True)]
    for channel, (mean, scale) in enumerate(scaling):
        if channel > 0 and len(planes) == 1 and scaling[channel] == scaling[0]:
            values[0, channel] = values[0, 0]
            continue
        np.multiply(planes[channel % len(planes)], np.float32(to_eight_bit * scale), out=values[0, channel])
        values[0, channel] -= np.float32(mean * scale)
    return values


def _compile(
    bundle: Bundle, bank: dict[str, FloatArray] | None, precision: str, threads: int
) -> tuple[Any, NearestRows | PrunedRows | None]:
    """A request of the networks (f32), and the search in the bank, if any. Raises DeviceError, BundleError."""
    core = openvino_core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise DeviceError("precision bf16: this processor has no bf16 instructions; set backend.precision to f32")
    try:
        model = core.read_model(bundle.read(NETWORKS))
        check_outputs(bundle, [tuple(output.shape) for output in model.outputs])
        network = core.compile_model(model, "CPU", _options("f32", threads)).create_infer_request()
        if bank is None:
            return network, None
        features = network.get_output_tensor(0)
        library = load_library() if precision == "f32" else None
        if library is not None:
            return network, PrunedRows(library, bank, features, threads)
        return network, NearestRows(bank, features, _options(precision, threads))
    except RuntimeError as error:
        raise DeviceError(f"OpenVINO cannot prepare this engine: {error}") from error


def _options(precision: str, threads: int) -> dict[str, Any]:
    return {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
