"""ONNX models as somebody else might hand them over, for the tests of `inspectd import`; made without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, BOOL, INT64, UINT8 = TensorProto.FLOAT, TensorProto.BOOL, TensorProto.INT64, TensorProto.UINT8
WEIGHTS = {3: (0.6, 0.3, 0.1), 1: (1.0,)}  # of the channels, so that their order matters
PATCH = 8


def write(path, nodes, *, inputs=None, outputs=None, constants=None, opset=17, domains=(), **fields) -> Path:
    """A model of these nodes from `x` (1 3 64 64) to `out`, unless other inputs and outputs (name, kind, shape) are given."""
    graph = helper.make_graph(
        nodes,
        "somebody's",
        [helper.make_tensor_value_info(*given) for given in inputs or [("x", FLOAT, (1, 3, 64, 64))]],
        [helper.make_tensor_value_info(*given) for given in outputs or [("out", FLOAT, ("n", "c", "gh", "gw"))]],
        [numpy_helper.from_array(values, name) for name, values in (constants or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8, **fields), path)
    return path


def pooled(first="x", last="out"):
    """The mean of channels in patches: (N C H W) -> (N 1 H/8 W/8)."""
    sides = [PATCH, PATCH]
    return [
        helper.make_node("ReduceMean", [first], ["mean"], axes=[1]),
        helper.make_node("AveragePool", ["mean"], [last], kernel_shape=sides, strides=sides),
    ]


ENDS = {  # by the shape of what the model gives: (its last operator, that one's constant)
    "(N 1 gh gw)": ("Identity", {}, None, 4),
    "(N gh gw)": ("Reshape", {}, (-1, 8, 12), 3),
    "(gh gw)": ("Reshape", {}, (8, 12), 2),
    "(N gh gw 1)": ("Transpose", {"perm": [0, 2, 3, 1]}, None, 4),
    "(N)": ("ReduceMax", {"axes": [1, 2, 3], "keepdims": 0}, None, 1),
    "(N 1)": ("ReduceMax", {"axes": [2, 3], "keepdims": 0}, None, 2),
    "()": ("ReduceMax", {"keepdims": 0}, None, 0),
}


def toy(path, shape: Sequence[int | str] = (1, 3, 64, 96), gives: str = "(N 1 gh gw)") -> Path:
    """The weighted mean of channels in patches of 8 x 8, whatever the shapes of input and output."""
    is_last = shape[1] not in WEIGHTS
    channels = shape[3] if is_last else shape[1]
    kind, attributes, constant, rank = ENDS[gives]
    weights = np.array(WEIGHTS[channels], np.float32).reshape(1, channels, 1, 1)
    first = helper.make_node("Transpose", ["x"], ["planes"], perm=[0, 3, 1, 2]) if is_last else helper.make_node("Identity", ["x"], ["planes"])  # fmt: skip
    constants = {"weights": weights} | ({} if constant is None else {"shape": np.array(constant, np.int64)})
    nodes = [
        first,
        helper.make_node("Mul", ["planes", "weights"], ["weighted"]),
        *pooled("weighted", "image"),  # a name of the engine's own
        helper.make_node(kind, ["image", *(["shape"] if constant else [])], ["out"], **attributes),
    ]
    outputs = [("out", FLOAT, [f"d{axis}" for axis in range(rank)])]
    return write(path, nodes, inputs=[("x", FLOAT, shape)], outputs=outputs, constants=constants)


def expected(image, shape: Sequence[int | str], gives: str, color: str):
    """What `toy` gives for the first of the batch, in NumPy, for an image (1 3 h w) in RGB; flat."""
    planes = image.astype(np.float64)[0]
    planes = planes[::-1] if color == "bgr" else planes
    channels = shape[1] if shape[1] in WEIGHTS else shape[3]
    planes = planes.mean(0, keepdims=True) if channels == 1 else planes
    mean = (planes * np.array(WEIGHTS[channels])[:, None, None]).mean(0)
    height, width = mean.shape
    grid = mean.reshape(height // PATCH, PATCH, width // PATCH, PATCH).mean((1, 3))
    return grid.reshape(-1) if "g" in gives else grid.max(keepdims=True).reshape(-1)


def mean_picture(folder: Path):
    """(1 3 H W) in 0..1 and RGB: what the folder's images have in common."""
    pictures = [cv2.imread(str(path))[:, :, ::-1].transpose(2, 0, 1) for path in sorted(folder.iterdir())]
    return np.mean(pictures, axis=0, dtype=np.float64)[None].astype(np.float32) / np.float32(255.0)


def template(path, good: Path, *, more=(), last="out", **given) -> Path:
    """How far each patch lies from the mean good part, for pixels 0..1; `more` goes from `away` to `out`."""
    mean = mean_picture(good)
    nodes = [
        helper.make_node("Sub", ["x", "template"], ["difference"]),
        helper.make_node("Abs", ["difference"], ["absolute"]),
        *pooled("absolute", "away" if more else last),
        *more,
    ]
    return write(path, nodes, inputs=[("x", FLOAT, mean.shape)], constants={"template": mean}, **given)
