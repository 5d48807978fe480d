"""The feature network as ONNX: one file, fixed input size, checked against torch before anyone relies on it."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import openvino as ov
import torch
from torch import Tensor, nn

from daemon.errors import DeviceError
from trainer.backbone import Backbone, PatchFeatures
from trainer.crr import CrrMap
from trainer.onnxfile import strip_notes
from trainer.repair import RepairScore
from trainer.settings import View

# Both sides compute in float32 through some fifty layers, in another order of summation: deviations are near
# 1e-6 of the largest feature. A wrong operator, padding or resize is off by more than a hundredth.
_LARGEST_DEVIATION = 1e-4
_LEVEL, _DARK = (
    110.0,
    5.0,
)  # grey levels: the mean that frames are brought to; keeps a dark frame's noise from exploding


class EngineNetwork(nn.Module):
    """Everything that an engine computes before the search: image (1 3 h w) -> features (P C), repair scores (P).

    The second output is there only with `repairs`: their sum, each of the features (1 C gh gw) or of the image in
    0..255. Patches are in row-major order over the whole grid, also with tiles.
    """

    def __init__(self, backbone: Backbone, view: View | None = None, repairs: Sequence[RepairScore] = ()) -> None:
        super().__init__()
        self.features = PatchFeatures(backbone.network)
        self.repairs = nn.ModuleList(repairs)
        self._view = view or View()
        self.register_buffer("mean", torch.tensor(backbone.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(backbone.std).view(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        image = self.expose(image)
        features = self.maps(image)
        rows = features.flatten(2).squeeze(0).transpose(0, 1)
        spaces = {"features": features, "image": image * self.std + self.mean}
        scores = [repair(spaces[str(repair.space)]) for repair in self.repairs]
        return (rows, torch.stack(scores).sum(0)) if scores else rows

    def expose(self, image: Tensor) -> Tensor:
        """The image as the view wants it exposed."""
        return self.level(image) if self._view.exposure == "levelled" else image

    def level(self, image: Tensor) -> Tensor:
        """One gain a frame that brings its mean brightness to a fixed value; what is clipped at 255 stays clipped."""
        pixels = image * self.std + self.mean
        gain = _LEVEL / (pixels.mean(dim=(1, 2, 3), keepdim=True) + _DARK)
        return ((pixels * gain).clamp(0.0, 255.0) - self.mean) / self.std

    def maps(self, image: Tensor) -> Tensor:
        """(1 3 h w) -> (1 C gh gw)."""
        if self._view.tiles == "none":
            out: Tensor = self.features(image)
            return out
        top, bottom = image.chunk(2, dim=2)
        quarters = [*top.chunk(2, dim=3), *bottom.chunk(2, dim=3)]
        made = self.features(torch.cat(quarters))
        return torch.cat([torch.cat([made[:1], made[1:2]], 3), torch.cat([made[2:3], made[3:]], 3)], 2)


class CrrNetwork(nn.Module):
    """An engine of kind crr: image (1 3 h w) -> map (P), row by row."""

    def __init__(self, backbone: Backbone, made: CrrMap) -> None:
        super().__init__()
        self.features, self.made = PatchFeatures(backbone.network), made

    def forward(self, image: Tensor) -> Tensor:
        found: Tensor = self.made(self.features(image)).flatten()
        return found


def export_network(module: EngineNetwork, size: tuple[int, int], path: Path) -> tuple[int, int]:
    """Write the network with input `image` (1 3 h w), outputs `features` (P C), perhaps `repair` (P); gives the grid.

    Raises DeviceError if OpenVINO does not compute what torch does.
    """
    with torch.inference_mode():
        grid = tuple(module.eval().maps(_example(size)).shape[-2:])
    _export(module, size, ["features", "repair"], path)
    return grid[0], grid[1]


def export_map(module: CrrNetwork, size: tuple[int, int], path: Path) -> None:
    """Write the network with input `image` (1 3 h w) and output `map` (P). Raises DeviceError as above."""
    _export(module, size, ["map"], path)


def _example(size: tuple[int, int]) -> Tensor:
    return torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0


def _export(module: nn.Module, size: tuple[int, int], names: list[str], path: Path) -> None:
    module, example = module.eval(), _example(size)
    with torch.inference_mode():
        found = module(example)
    wanted = [output.numpy() for output in (found if isinstance(found, tuple) else (found,))]
    with _silence():
        torch.onnx.export(
            module, (example,), path, input_names=["image"], output_names=names[: len(wanted)],
            dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip
    model = onnx.load(path)
    strip_notes(model)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    _compare(path, example.numpy(), dict(zip(names, wanted, strict=False)))


def _compare(path: Path, image: np.ndarray, wanted: dict[str, np.ndarray]) -> None:
    try:
        compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        results = compiled([image])
        found = [results[index] for index in range(len(wanted))]
    except RuntimeError as error:
        raise DeviceError(f"OpenVINO cannot run the exported network: {error}") from error
    for (name, theirs), ours in zip(wanted.items(), found, strict=True):
        if ours.shape != theirs.shape:
            raise DeviceError(f"the exported network gives {name} {ours.shape}, torch gives {theirs.shape}")
        deviation = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
        if not deviation <= _LARGEST_DEVIATION:
            raise DeviceError(
                f"the exported network's {name} are off by {deviation:.2e} of the largest under OpenVINO, wanted at "
                f"most {_LARGEST_DEVIATION:.0e}: use the versions of torch, onnx and openvino that constraints.txt pins"
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
