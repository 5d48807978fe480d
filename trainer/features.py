"""Pixels -> features, for everything that the trainer does before there is an engine to ask.

Pictures here are float32 (h w 3) on the scale 0..255 at the network's input size, which is what the
corruption model works on. The daemon's own resize and normalisation make them.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import openvino as ov

from daemon.bundle import Preprocessing
from daemon.errors import DeviceError
from daemon.inspection.backend.cpu import normalise
from daemon.types import FloatArray, Frame, Tensor
from trainer.dataset import Picture, read_frame


def read_pixels(picture: Picture, preprocessing: Preprocessing) -> FloatArray:
    """The picture as the network will see it, (h w 3) in 0..255. Raises DataError."""
    return network_pixels(read_frame(picture.path), preprocessing)


def network_pixels(frame: Frame, preprocessing: Preprocessing) -> FloatArray:
    """The frame as the network will see it, (h w 3) in 0..255."""
    planes = normalise(frame, preprocessing)[0]
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    return np.ascontiguousarray(np.clip(planes * std + mean, 0.0, 255.0).transpose(1, 2, 0))


def normalised(pixels: FloatArray, preprocessing: Preprocessing) -> Tensor:
    """(h w 3) in 0..255 -> the network's input (1 3 h w)."""
    mean, std = (np.array(values, np.float32) for values in (preprocessing.mean, preprocessing.std))
    return Tensor(np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1)[None], np.float32))


class FeatureNetwork:
    """An exported network, or a torch module, in OpenVINO f32."""

    def __init__(self, network: bytes | Any, preprocessing: Preprocessing, threads: int) -> None:
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self._preprocessing = preprocessing
        try:
            core = ov.Core()
            model = core.read_model(network) if isinstance(network, bytes) else _convert(network, preprocessing.size)
            self._request = core.compile_model(model, "CPU", options).create_infer_request()
        except RuntimeError as error:
            raise DeviceError(f"OpenVINO cannot run the feature network: {error}") from error
        self.patches, self.channels = self._request.get_output_tensor(0).shape

    def run(self, pixels: FloatArray) -> FloatArray:
        """Features (P C) of a picture; the array is the network's own buffer, good until the next call."""
        try:
            self._request.infer([normalised(pixels, self._preprocessing).values], share_inputs=True)
        except RuntimeError as error:
            raise DeviceError(f"OpenVINO cannot run the feature network: {error}") from error
        features: FloatArray = self._request.get_output_tensor(0).data
        return features


def _convert(module: Any, size: tuple[int, int]) -> Any:
    """By the front end itself: `ov.convert_model` reports each conversion to its makers, if it can reach them."""
    import torch
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the decoder traces with torch.jit
        decoder = TorchScriptPythonDecoder(module.eval(), example_input=torch.zeros(1, 3, *size))
        front = FrontEndManager().load_by_framework("pytorch")
        model = front.convert(front.load(decoder))
    model.reshape([1, 3, *size])
    return model
