"""Targets: FP16 networks, plans built without a GPU, kernels compiled ahead of time."""

from __future__ import annotations

import shutil

import numpy as np
import onnx
import openvino as ov
import pytest
import tensorrt_rtx_bindings as rtx
from onnx import TensorProto

from bench import ptxas
from daemon.bundle import FP16_NETWORKS, NETWORKS
from daemon.errors import DeviceError, UsageError
from tests.test_branches import GRID, SIZE, make_repair
from tests.toys import tiny_backbone
from trainer import plans
from trainer.export import EngineNetwork, export_network
from trainer.plans import add_targets, build_plan, convert_to_fp16
from trainer.settings import View
from trainer.site import parse_targets

PATCHES = GRID[0] * GRID[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bundle's folder with networks of every kind of part: levelled, tiled, both repairs."""
    place = tmp_path_factory.mktemp("engine") / "1"
    place.mkdir()
    repairs = [make_repair(24), make_repair(3, halvings=1)]
    network = EngineNetwork(tiny_backbone(), View("levelled", "2x2"), repairs).eval()
    assert export_network(network, SIZE, place / NETWORKS) == GRID
    convert_to_fp16(place / NETWORKS, place / FP16_NETWORKS)
    return place


def test_fp16_networks_take_fp16_and_give_f32(folder):
    model = onnx.load(folder / FP16_NETWORKS)
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
    assert kinds == {"image": TensorProto.FLOAT16, "features": TensorProto.FLOAT, "repair": TensorProto.FLOAT}
    weights = [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT16]
    assert sum(np.prod(tensor.dims) for tensor in weights) > 1000
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    halves = {tensor.name for tensor in weights}
    assert all(node.input[1] in halves for node in convolutions)


def test_fp16_networks_give_what_f32_ones_give(folder):
    image = np.random.default_rng(1).uniform(-1, 1, (1, 3, *SIZE))
    found = []
    for name, dtype in ((NETWORKS, np.float32), (FP16_NETWORKS, np.float16)):
        compiled = ov.Core().compile_model(folder / name, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        results = compiled([image.astype(dtype)])
        found.append([results[index] for index in range(2)])
    for wanted, ours in zip(*found, strict=True):
        assert np.abs(ours - wanted).max() < 0.01 * np.abs(wanted).max()


def test_weights_that_lose_too_much_are_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "_LARGEST_DEVIATION", 1e-6)  # less than eleven bits can keep
    with pytest.raises(DeviceError, match=r"with its weights in FP16, wanted at most 0%; .*--targets cpu"):
        convert_to_fp16(folder / NETWORKS, tmp_path / FP16_NETWORKS)


def test_networks_beyond_fp16_are_refused(tmp_path):
    network = EngineNetwork(tiny_backbone()).eval()
    for layer in network.features.network.layers:
        layer.weight.mul_(300.0)
    export_network(network, SIZE, tmp_path / NETWORKS)
    with pytest.raises(DeviceError, match=r"found values up to .*, wanted at most 16000: FP16 .* .--targets cpu"):
        convert_to_fp16(tmp_path / NETWORKS, tmp_path / FP16_NETWORKS)


@pytest.mark.parametrize("capability", ["86", "89", "120"])
def test_rtx_plan_is_built_without_a_gpu(folder, capability):
    plan = build_plan(folder / FP16_NETWORKS, "rtx", capability, folder)
    assert plan.name == f"networks.rtx-sm{capability}.plan"
    assert plan.stat().st_size > 10_000


def test_what_the_builder_reads_has_the_daemons_tensors(folder):
    """Names, types and shapes through TensorRT's own API: what daemon/inspection/backend/plan.py will ask for."""
    logger = rtx.Logger(rtx.Logger.ERROR)
    network = rtx.Builder(logger).create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = rtx.OnnxParser(network, logger)
    assert parser.parse((folder / FP16_NETWORKS).read_bytes())
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    assert [(t.name, tuple(t.shape), t.dtype) for t in inputs] == [("image", (1, 3, *SIZE), rtx.DataType.HALF)]
    assert [(t.name, tuple(t.shape), t.dtype) for t in outputs] == [
        ("features", (PATCHES, 24), rtx.DataType.FLOAT), ("repair", (PATCHES,), rtx.DataType.FLOAT),
    ]  # fmt: skip
    types = {network.get_layer(index).get_output(0).dtype for index in range(network.num_layers)}
    assert rtx.DataType.HALF in types


def test_network_that_tensorrt_cannot_read_says_what_it_said(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(DeviceError, match=r"tensorrt_rtx_bindings cannot read broken.onnx: .+"):
        build_plan(tmp_path / "broken.onnx", "rtx", "86", tmp_path)


def test_gpu_that_rtx_does_not_build_for_is_named_with_those_it_does(folder):
    with pytest.raises(UsageError, match=r"found rtx:sm87, .* builds for .*sm86"):
        build_plan(folder / FP16_NETWORKS, "rtx", "87", folder)


def test_trt_wants_the_gpu_that_will_run_it(folder):
    with pytest.raises(DeviceError, match="built on the box that runs it"):
        add_targets(folder, ("cpu", "trt"))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("cpu", ("cpu",)), ("cpu,trt", ("cpu", "trt")), ("rtx:sm86,cpu,rtx:sm120", ("rtx:sm86", "cpu", "rtx:sm120")),
        ("cpu,cpu,kernels:sm87", ("cpu", "kernels:sm87")),
    ],
)  # fmt: skip
def test_targets_are_read(text, wanted):
    assert parse_targets(text) == wanted


@pytest.mark.parametrize("text", ["", "trt", "cpu,", "cpu,rtx", "cpu,rtx:86", "gpu", "cpu,kernels:sm8", "cpu;trt"])
def test_other_targets_say_what_is_wanted(text):
    with pytest.raises(UsageError, match="wanted cpu and any of trt, rtx:smNN, kernels:smNN"):
        parse_targets(text)


# Kernels


def test_without_nvcc_the_build_goes_on_and_says_so(folder, monkeypatch, capsys):
    monkeypatch.setattr(plans.shutil, "which", lambda _: None)
    assert plans.compile_kernels("87", folder) is None
    assert "no nvcc here" in capsys.readouterr().err


with_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


@with_nvcc
def test_kernels_go_into_the_bundle(folder):
    add_targets(folder, ("cpu", "kernels:sm87"))
    assert (folder / "kernels.sm87.cubin").read_bytes()[:4] == b"\x7fELF"


@with_nvcc
def test_kernels_that_do_not_compile_say_why(folder):
    with pytest.raises(DeviceError, match="nvcc cannot compile the kernels for sm11: "):
        plans.compile_kernels("11", folder)


@with_nvcc
@pytest.mark.parametrize("capability", ptxas.CAPABILITIES)
def test_no_kernel_spills_registers(capability):
    found = ptxas.report(capability)
    assert {"ldknn_search", "ldknn_finish", "preprocess_bayerrg8", "postprocess"} <= set(found)
    assert {name: figures[1:] for name, figures in found.items()} == dict.fromkeys(found, (0, 0, 0))
    assert {"ldknn_int8_search", "ldknn_search_sm90"} <= set(found)
    for kernel in ("ldknn_search", "ldknn_search_sm90"):
        assert found[kernel][0] <= 128  # two blocks of 256 threads on a multiprocessor
