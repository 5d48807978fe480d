"""The network of an engine of kind `foreign`: somebody else's ONNX model between our `image` and our `map`.

Before it: channels reversed for BGR, averaged for a gray model, put last where it wants that, the frame repeated where
it wants a batch. Behind it: the first result, as float32, as one row of P values. Only what the map needs is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from daemon.errors import DataError, DeviceError
from daemon.inspection.backend.nearest import openvino_core
from daemon.types import FloatArray
from trainer.onnxfile import brief, graphs_of, opset, subgraphs
from trainer.original import ImageInput, Output, run_options

_PREFIX = "model/"  # of every name inside, so that none is ours
_LEAST_IR = 8
# Both sides compute the same in float32, perhaps fused differently. A wrong channel or order is off by much more.
_LARGEST_DEVIATION = 1e-4


def wrap(path: Path, model: ModelProto, image: ImageInput, output: Output, color: str) -> ModelProto:
    """image (1 3 h w) -> map (P). Raises DataError where the result is not valid ONNX."""
    inner = GraphProto()
    inner.CopyFrom(model.graph)
    _prefix_names(inner)
    assert output.grid is not None
    before = _Chain("before", "image")
    if color == "bgr":
        before.then("Gather", np.array([2, 1, 0], np.int64), axis=1)
    if image.channels == 1:
        before.then("Conv", np.full((1, 3, 1, 1), 1 / 3, np.float32))
    if image.is_last:
        before.then("Transpose", perm=[0, 2, 3, 1])
    if image.batch > 1:
        before.nodes.append(helper.make_node("Concat", [before.last] * image.batch, ["before/batch"], axis=0))
        before.last = "before/batch"
    before.end_as(f"{_PREFIX}{image.name}")
    behind = _Chain("behind", f"{_PREFIX}{output.name}")
    if output.kind != "float32":
        behind.then("Cast", to=TensorProto.FLOAT)
    if image.batch > 1:
        behind.then("Gather", np.array([0], np.int64), axis=0)
    patches = output.grid[0] * output.grid[1]
    behind.then("Reshape", np.array([patches], np.int64))
    behind.end_as("map")

    kept, needed = _needed_nodes(inner, f"{_PREFIX}{output.name}")
    graph = helper.make_graph(
        [*before.nodes, *kept, *behind.nodes],
        "foreign",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, *image.size])],
        [helper.make_tensor_value_info("map", TensorProto.FLOAT, [patches])],
        [*(tensor for tensor in inner.initializer if tensor.name in needed), *before.constants, *behind.constants],
        sparse_initializer=[tensor for tensor in inner.sparse_initializer if tensor.values.name in needed],
    )
    for number, node in enumerate(node for each in graphs_of(graph) for node in each.node):
        node.name = f"{node.op_type}_{number}"  # exporters leave them empty; FP16 conversion wants each once
    made = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset(model))], ir_version=max(_LEAST_IR, model.ir_version)
    )
    try:
        onnx.checker.check_model(made, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise DataError(
            f"{path}: is not valid ONNX at {image.size[0]} x {image.size[1]} (h w) and batch {image.batch}: "
            f"{brief(error)}; export it with that size"
        ) from error
    return made


class _Chain:
    """Operators one behind the other, from the tensor `last`."""

    def __init__(self, name: str, last: str) -> None:
        self._name, self.last = name, last
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def then(self, kind: str, *constants: np.ndarray, **attributes: Any) -> None:
        place = f"{self._name}/{len(self.nodes)}"
        names = [f"{place}/{index}" for index in range(len(constants))]
        self.constants += [numpy_helper.from_array(*pair) for pair in zip(constants, names, strict=True)]
        self.nodes.append(helper.make_node(kind, [self.last, *names], [place], **attributes))
        self.last = place

    def end_as(self, name: str) -> None:
        """Call the last tensor so."""
        if self.nodes:
            self.nodes[-1].output[0] = name
        else:
            self.nodes.append(helper.make_node("Identity", [self.last], [name]))
        self.last = name


def _prefix_names(graph: GraphProto) -> None:
    """Every tensor's, inside nodes too. Shapes written beside tensors go: they were those of another size or batch."""
    for each in graphs_of(graph):
        del each.value_info[:]
        del each.quantization_annotation[:]
        for node in each.node:
            for names in (node.input, node.output):
                names[:] = [f"{_PREFIX}{name}" if name else "" for name in names]
        for item in (*each.input, *each.output, *each.initializer):
            item.name = f"{_PREFIX}{item.name}"
        for tensor in each.sparse_initializer:
            tensor.values.name = f"{_PREFIX}{tensor.values.name}"


def _needed_nodes(graph: GraphProto, output: str) -> tuple[Sequence[NodeProto], set[str]]:
    """Those that the output rests on, and the names of all tensors that it does; nodes stand in their order."""
    needed, kept = {output}, list[NodeProto]()
    for node in reversed(graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed |= _read_by(node)
    return kept[::-1], needed


def _read_by(node: NodeProto) -> set[str]:
    """Tensors that the node reads, also from inside its branches."""
    found = set(node.input)
    for graph in subgraphs(node):
        found |= {value.name for value in graph.output}
        for inner in graph.node:
            found |= _read_by(inner)
    return found


def compare(path: Path, made: ModelProto, image: FloatArray, wanted: FloatArray, threads: int) -> None:
    """Hold the engine's network against the model's own output for the image. Raises DeviceError."""
    try:
        compiled = openvino_core().compile_model(
            openvino_core().read_model(made.SerializeToString()), "CPU", run_options(threads)
        )
        found = np.array(compiled([image])[0])
    except RuntimeError as error:
        raise DeviceError(f"{path}: OpenVINO cannot run the engine's network: {brief(error)}") from error
    largest = max(float(np.abs(wanted).max()), 1e-30)
    deviation = float(np.abs(found - wanted.reshape(-1)).max()) / largest
    if not deviation <= _LARGEST_DEVIATION:
        raise DeviceError(
            f"{path}: the engine's network is off from the model by {deviation:.2e} of the largest value, wanted at "
            f"most {_LARGEST_DEVIATION:.0e}: use the versions of onnx and openvino that constraints.txt pins"
        )
