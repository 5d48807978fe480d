"""An ONNX file of somebody else's: bounded, whole, checked and plain before anything runs it; and exporters' notes.

Weights in other files are refused: ONNX would read whatever path the file names. Local functions are written out where
they are called, so that only standard operators are left, and what an exporter leaves of its machine is taken out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from daemon.errors import DataError

_MOST_BYTES = 1 << 30
_OLDEST_OPSET = 7  # before it operators broadcast by attributes of their own
_STANDARD = ("", "ai.onnx")


def read_onnx(path: Path) -> tuple[ModelProto, str]:
    """The checked model, and the SHA-256 of the file. Raises DataError, which names the file."""
    model, sha256 = _parse(path)
    del model.training_info[:]
    if model.functions:
        model = _without_functions(path, model)
    for graph in graphs_of(model.graph):
        _refuse_other_files(path, graph)
        _refuse_strange_operators(path, graph)
    version = _opset(path, model)
    del model.opset_import[:]
    model.opset_import.add(domain="", version=version)
    strip_notes(model)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise DataError(f"{path}: is not valid ONNX: {brief(error)}; export it again") from error
    return model, sha256


def opset(model: ModelProto) -> int:
    """Of the standard operators."""
    return next((int(entry.version) for entry in model.opset_import if entry.domain in _STANDARD), 0)


def graphs_of(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph, and those inside its nodes (branches, loop bodies)."""
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from graphs_of(inner)


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def strip_notes(model: ModelProto) -> None:
    """Take out the exporter's notes: they hold stack traces, and so the builder's paths."""
    model.doc_string = ""
    del model.metadata_props[:]
    for graph in graphs_of(model.graph):
        graph.doc_string = ""
        del graph.metadata_props[:]
        for item in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
            item.doc_string = ""
            del item.metadata_props[:]
        for node in graph.node:
            for attribute in node.attribute:
                attribute.doc_string = ""


def brief(error: Exception) -> str:
    """A library's many lines as one."""
    return printable(" ".join(str(error).split()))[:400]


def printable(text: str) -> str:
    """What a file says goes to a terminal, which obeys some characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _parse(path: Path) -> tuple[ModelProto, str]:
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise DataError(f"{path}: found {found}, wanted an ONNX file; is the path right, seen from here?")
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise DataError(f"{path}: has {size} bytes, wanted at most {_MOST_BYTES}; a line's engine has to be smaller")
    model = ModelProto()
    try:
        data = path.read_bytes()
        model.ParseFromString(data)
    except DecodeError as error:
        raise DataError(f"{path}: is not ONNX, or cut off: {brief(error)}; wanted a whole model as .onnx") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if not model.graph.node:
        raise DataError(f"{path}: holds no operator, wanted a model as ONNX; is it the right file, and whole?")
    return model, hashlib.sha256(data).hexdigest()


def _without_functions(path: Path, model: ModelProto) -> ModelProto:
    from onnx import inliner

    try:
        return inliner.inline_local_functions(model, convert_version=True)
    except Exception as error:  # the inliner has no type of its own for what it cannot do
        raise DataError(f"{path}: its local functions cannot be written out: {brief(error)}; export without") from error


def _refuse_other_files(path: Path, graph: GraphProto) -> None:
    tensors = [*graph.initializer]
    sparse = [*graph.sparse_initializer]
    for node in graph.node:
        for attribute in node.attribute:
            tensors += [attribute.t, *attribute.tensors]
            sparse += [attribute.sparse_tensor, *attribute.sparse_tensors]
    tensors += [part for tensor in sparse for part in (tensor.values, tensor.indices)]
    outside = [tensor for tensor in tensors if tensor.data_location == TensorProto.EXTERNAL]
    if outside:
        named = {entry.value for entry in outside[0].external_data if entry.key == "location"}
        raise DataError(
            f"{path}: found weights in another file ({', '.join(map(repr, named)) or 'not named'}), wanted all in "
            "this one: export with external_data=False, or join them where you trust the files: python -c "
            f"\"import onnx; onnx.save(onnx.load('{path.name}'), 'joined.onnx')\""
        )


def _refuse_strange_operators(path: Path, graph: GraphProto) -> None:
    strange = {printable(f"{node.domain}.{node.op_type}") for node in graph.node if node.domain not in _STANDARD}
    if strange:
        raise DataError(
            f"{path}: found operators that are not ONNX's own: {', '.join(sorted(strange)[:8])}; wanted standard ones, "
            "which every backend has; export without optimisations for one runtime"
        )


def _opset(path: Path, model: ModelProto) -> int:
    version, newest = opset(model), onnx.defs.onnx_opset_version()
    if not _OLDEST_OPSET <= version <= newest:
        raise DataError(
            f"{path}: found opset {version}, wanted {_OLDEST_OPSET} to {newest}; export with opset_version=17, or "
            "bring it there with onnx.version_converter"
        )
    return version
