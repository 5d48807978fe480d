"""The feature network as ONNX: one file, fixed input size, checked against torch before anyone relies on it."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import openvino as ov
import torch

from daemon.errors import DeviceError
from trainer.backbone import Backbone, PatchFeatures

# Both sides compute in float32 through some fifty layers, in another order of summation: deviations are near
# 1e-6 of the largest feature. A wrong operator, padding or resize is off by more than a hundredth.
_LARGEST_DEVIATION = 1e-4


def export_network(backbone: Backbone, size: tuple[int, int], path: Path) -> tuple[int, int]:
    """Write the network with input `image` (1 3 h w) and output `features` (P C); gives the grid (gh gw).

    Raises DeviceError if OpenVINO does not compute what torch does.
    """
    module = PatchFeatures(backbone.network).eval()
    example = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    with torch.inference_mode():
        grid = tuple(backbone.network(example)[0].shape[-2:])
        wanted = module(example).numpy()
    with _silence():
        torch.onnx.export(
            module, (example,), path, input_names=["image"], output_names=["features"],
            dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip
    model = onnx.load(path)
    _strip(model)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    _compare(path, example.numpy(), wanted)
    return grid[0], grid[1]


def _strip(model: onnx.ModelProto) -> None:
    """Take out the exporter's notes: they hold stack traces, and so the builder's paths."""
    del model.metadata_props[:]
    model.graph.doc_string = ""
    del model.graph.metadata_props[:]
    for item in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        item.doc_string = ""
        del item.metadata_props[:]
    for tensor in model.graph.initializer:
        tensor.doc_string = ""
        del tensor.metadata_props[:]


def _compare(path: Path, image: np.ndarray, wanted: np.ndarray) -> None:
    try:
        compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        found = compiled([image])[0]
    except RuntimeError as error:
        raise DeviceError(f"OpenVINO cannot run the exported network: {error}") from error
    if found.shape != wanted.shape:
        raise DeviceError(f"the exported network gives features {found.shape}, torch gives {wanted.shape}")
    deviation = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    if not deviation <= _LARGEST_DEVIATION:
        raise DeviceError(
            f"the exported network is off by {deviation:.2e} of the largest feature under OpenVINO, wanted at most "
            f"{_LARGEST_DEVIATION:.0e}: use the versions of torch, onnx and openvino that constraints.txt pins"
        )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """torch's exporter prints its steps and warns about itself; neither is of use to whoever builds an engine."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        stack.callback(logging.disable, logging.root.manager.disable)
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        yield
