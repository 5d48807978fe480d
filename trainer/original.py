"""Somebody else's model as it came: what it takes and gives, found by looking and by running it. Nothing is guessed.

The file tells the input's name, type and shape. What the outputs are is seen when one image has been through OpenVINO,
since the shapes that exporters write down are often open. What cannot be seen (which pixels it was trained on, whether
a higher value is worse) has to be said on the command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, TensorProto, ValueInfoProto

from daemon.errors import DataError, UsageError
from daemon.inspection.backend.nearest import openvino_core
from daemon.types import FloatArray
from trainer.onnxfile import brief, graphs_of, printable

Size = tuple[int, int]  # (h w)

_LEAST_SIDE, _MOST_SIDE = 32, 8192  # what a bundle's manifest takes
_MOST_BATCH = 64
_CONTROL = {"If", "Loop", "Scan", "NonZero", "NonMaxSuppression", "Unique", "Compress"}
_CHANNELS = (1, 3)


@dataclass(frozen=True)
class ImageInput:
    """How the model takes an image."""

    name: str
    told: str  # as the file has it
    batch: int  # 1 where the file leaves it open
    channels: int  # 3 or 1
    is_last: bool  # channels behind the sides
    size: Size

    @property
    def shape(self) -> tuple[int, int, int, int]:
        height, width = self.size
        inner = (height, width, self.channels) if self.is_last else (self.channels, height, width)
        return (self.batch, *inner)

    def arrange(self, image: FloatArray, color: str) -> FloatArray:
        """(1 3 h w) in RGB -> what the model takes; in NumPy, so that the engine's network can be held against it."""
        planes = image[:, ::-1] if color == "bgr" else image
        planes = planes.mean(1, keepdims=True) if self.channels == 1 else planes
        planes = planes.transpose(0, 2, 3, 1) if self.is_last else planes
        return np.ascontiguousarray(np.repeat(planes, self.batch, axis=0), np.float32)


@dataclass(frozen=True)
class Output:
    """One of the model's outputs, as it was when an image had been through it. `grid` is None where it is no map."""

    index: int
    name: str
    kind: str
    shape: tuple[int, ...]
    grid: Size | None
    lack: str = ""  # why it is no map

    @property
    def is_score(self) -> bool:
        return self.grid == (1, 1)

    def __str__(self) -> str:
        what = f"a map of {self.grid[1]} x {self.grid[0]}" if self.grid else self.lack
        return f"{self.name!r}, {self.kind} {_in_words(self.shape)}: {'a score' if self.is_score else what}"


# -- the input -------------------------------------------------------------------------------------


def find_input(path: Path, model: ModelProto, wanted: Size | None) -> ImageInput:
    """The only input. Raises DataError where it is no image, UsageError where `wanted` (h w) is missing or another."""
    given = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in given]
    told = "; ".join(map(_told, inputs)) or "none"
    if len(inputs) != 1:
        raise DataError(
            f"{path}: found {len(inputs)} inputs ({told}), wanted the image alone; export with the others set"
        )
    (only,) = inputs
    tensor = only.type.tensor_type
    if tensor.elem_type != TensorProto.FLOAT:
        raise DataError(f"{path}: found the input {told}, wanted float32; export the model in FP32, with float pixels")
    dims = _dims(only)
    if dims is None or len(dims) != 4:
        raise DataError(f"{path}: found the input {told}, wanted an image (N 3 H W), (N H W 3), (N 1 H W) or (N H W 1)")
    axis = _channel_axis(dims)
    if axis is None:
        raise DataError(
            f"{path}: found the input {told}, wanted 3 or 1 channels, second or last, and sides of {_LEAST_SIDE} or "
            "more; export with a fixed number of channels"
        )
    batch, channels = dims[0], dims[axis]
    if isinstance(batch, int) and batch > _MOST_BATCH:
        raise DataError(f"{path}: found a batch of {batch}, wanted 1; export with batch 1 or an open one")
    sides = (dims[1], dims[2]) if axis == 3 else (dims[2], dims[3])
    size = _size(path, told, sides, wanted)
    return ImageInput(only.name, told, batch if isinstance(batch, int) else 1, int(channels), axis == 3, size)


def _channel_axis(dims: Sequence[int | str]) -> int | None:
    """1 or 3; None where neither has 1 or 3 entries, or both could be meant."""
    fitting = []
    for axis, sides in ((1, (2, 3)), (3, (1, 2))):
        if dims[axis] in _CHANNELS and all(isinstance(dims[s], str) or dims[s] >= _LEAST_SIDE for s in sides):
            fitting.append(axis)
    return fitting[0] if len(fitting) == 1 else None


def _size(path: Path, told: str, sides: tuple[int | str, int | str], wanted: Size | None) -> Size:
    is_open = any(isinstance(side, str) for side in sides)
    if wanted is None and is_open:
        raise UsageError(
            f"{path}: leaves its input's size open ({told}), wanted --input-size H W: the size that it was trained with"
        )
    size = wanted or (int(sides[0]), int(sides[1]))
    if any(isinstance(side, int) and side != asked for side, asked in zip(sides, size, strict=True)):
        raise UsageError(f"{path}: takes {told}, found --input-size {size[0]} {size[1]}; leave it out, or export anew")
    if not all(_LEAST_SIDE <= side <= _MOST_SIDE for side in size):
        raise DataError(f"{path}: takes {size[0]} x {size[1]} (h w), wanted sides from {_LEAST_SIDE} to {_MOST_SIDE}")
    return size


def _dims(value: ValueInfoProto) -> list[int | str] | None:
    """A number where it is fixed, else its name or "?"."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return [dim.dim_value if dim.dim_value > 0 else printable(dim.dim_param) or "?" for dim in tensor.shape.dim]


def _told(value: ValueInfoProto) -> str:
    if value.type.WhichOneof("value") != "tensor_type":
        return f"{value.name!r} (no tensor)"
    kind = TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()
    dims = _dims(value)
    return f"{value.name!r} {kind} {'of any shape' if dims is None else _in_words(dims)}"


def _in_words(dims: Sequence[int | str]) -> str:
    return f"({' '.join(map(str, dims))})"


# -- a run -----------------------------------------------------------------------------------------


class Original:
    """The model in OpenVINO, at a fixed size. Raises DataError where OpenVINO cannot run it."""

    def __init__(self, path: Path, model: ModelProto, image: ImageInput, threads: int) -> None:
        self._path, self._image = path, image
        self._names = [value.name for value in model.graph.output]
        try:
            network = openvino_core().read_model(model.SerializeToString())
            network.reshape(list(image.shape))
            self._is_open = [output.get_partial_shape().is_dynamic for output in network.outputs]
            self._compiled = openvino_core().compile_model(network, "CPU", run_options(threads))
        except RuntimeError as error:
            raise DataError(
                f"{path}: OpenVINO cannot run it on an image {_in_words(image.shape)}: {brief(error)}; export it with "
                "that size and batch 1, or with other operators"
            ) from error
        found = {node.op_type for graph in graphs_of(model.graph) for node in graph.node}
        self._suspects = sorted(found & _CONTROL)
        self._random = sorted(name for name in found if "Random" in name or name in ("Multinomial", "Bernoulli"))

    def run(self, image: FloatArray, color: str) -> list[npt.NDArray[Any]]:
        """Every output for an image (1 3 h w) in RGB."""
        try:
            results = self._compiled([self._image.arrange(image, color)])
        except RuntimeError as error:
            raise DataError(f"{self._path}: OpenVINO cannot run it: {brief(error)}; export it anew") from error
        return [np.array(results[index]) for index in range(len(self._names))]

    def outputs(self, image: FloatArray, color: str) -> list[Output]:
        """What each of them is."""
        return [
            self._judge(index, values, is_open=self._is_open[index])
            for index, values in enumerate(self.run(image, color))
        ]

    def _judge(self, index: int, values: npt.NDArray[Any], *, is_open: bool) -> Output:
        grid, lack = (
            None,
            f"no map: wanted float (1 1 gh gw), (1 gh gw) or (gh gw), at most {_in_words(self._image.size)}",
        )
        if not np.issubdtype(values.dtype, np.floating):
            lack = "no float"
        elif is_open:
            cause = f" ({', '.join(self._suspects)})" if self._suspects else ""
            lack = f"of a size that is only known afterwards{cause}: an engine's map has a fixed one"
        else:
            grid = self._grid(values.shape)
        return Output(index, self._names[index], values.dtype.name, values.shape, grid, "" if grid else lack)

    def _grid(self, shape: tuple[int, ...]) -> Size | None:
        """Of one image's share: (1 gh gw), (gh gw 1), (gh gw), (1) or nothing more; None for any other shape."""
        if len(shape) != 2 or shape[1] == 1:  # else (gh gw), with no batch
            if shape[:1] != (self._image.batch,) and not (shape == () and self._image.batch == 1):
                return None
            shape = shape[1:]
            if len(shape) == 3 and 1 in (shape[0], shape[2]):
                shape = shape[1:] if shape[0] == 1 else shape[:2]
        elif self._image.batch > 1 or shape[0] == 1:
            return None  # a value for each class, or nobody knows
        if shape in ((), (1,), (1, 1)):
            return (1, 1)
        is_map = len(shape) == 2 and all(1 < cells <= side for cells, side in zip(shape, self._image.size, strict=True))
        return (shape[0], shape[1]) if is_map else None

    def refuse_chance(self, image: FloatArray, color: str, output: Output, other: Original) -> FloatArray:
        """The output for an image, the same in every run and in another compilation. Raises DataError."""
        first, *more = (model.run(image, color)[output.index] for model in (self, self, other))
        if not all(np.array_equal(first, again, equal_nan=True) for again in more):
            cause = f" ({', '.join(self._random)} inside)" if self._random else ""
            raise DataError(
                f"{self._path}: gives the same image another {output.name!r} in each run{cause}, wanted one verdict "
                "for one image; export it in evaluation mode (model.eval()), without random operators"
            )
        return np.asarray(first)


def run_options(threads: int) -> dict[str, Any]:
    """In float32, as the daemon will."""
    return {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }


def choose_output(path: Path, outputs: Sequence[Output], wanted: str | None) -> Output:
    """The named one, else the only map, else the only score. Raises UsageError, and DataError where none will do."""
    told = "; ".join(map(str, outputs))
    if wanted is not None:
        named = [output for output in outputs if output.name == wanted]
        if not named:
            raise UsageError(f"{path}: found no output {wanted!r} (--output), wanted one of {told}")
        if named[0].grid is None:
            raise UsageError(f"{path}: found --output {named[0]}; wanted one of {told}")
        return named[0]
    usable = [output for output in outputs if output.grid is not None]
    if not usable:
        raise DataError(
            f"{path}: found no map and no score among its outputs ({told}), wanted either; export it with one"
        )
    taken = [output for output in usable if not output.is_score] or usable
    if len(taken) > 1:
        raise UsageError(f"{path}: found {len(taken)} outputs that could be meant: {told}; wanted --output NAME")
    return taken[0]
