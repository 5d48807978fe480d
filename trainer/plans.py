"""What an engine needs on a GPU, made when it is built: the networks in FP16, plans of TensorRT, kernels.

A target is `cpu`, `trt` (a plan by TensorRT, built on the very box that will run it), `rtx:smNN` (a plan by TensorRT
for RTX, built anywhere, without a GPU) or `kernels:smNN` (the kernels alone, for a box whose plan is built there).
Plans are strongly typed: the ONNX file says every precision, the builder chooses none. nvcc compiles the kernels where
it is found, so that the line's box needs no compiler; without it the daemon compiles them once, at its first start.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
import openvino as ov
from onnx import TensorProto, helper

from daemon.bundle import FP16_NETWORKS, NETWORKS
from daemon.errors import DeviceError, UsageError
from daemon.inspection.backend.cubin import COMPILER_OPTIONS, KERNELS, kernels_name
from daemon.inspection.backend.plan import import_tensorrt, plan_name
from trainer.progress import say, warn

if TYPE_CHECKING:  # tensorrt-stubs
    import tensorrt

_IN_F32 = ("Resize", "ReduceMean")  # scales are f32 by the standard; a mean over 200,000 pixels is beyond FP16
_LARGEST_DEVIATION = 0.02  # of the largest feature: FP16 has eleven bits, and some fifty layers add up their rounding
_LARGEST_VALUE = 16_000.0  # between layers, on a random image: real ones may be four times as loud
_TIMING_CACHE = "tensorrt-timing.cache"  # beside the bundles: the next build for this GPU is quicker
_OPTIMISATION = 5  # the longest search for the fastest kernels
_WORKSPACE_BYTES = 1 << 30


def add_targets(folder: Path, targets: tuple[str, ...], pixels: tuple[float, float] = (-1.0, 1.0)) -> None:
    """Put into the bundle's folder what its targets beside `cpu` need. Raises DeviceError, UsageError.

    `pixels`: the darkest and the brightest that the network gets to see.
    """
    gpu = [target for target in targets if target != "cpu"]
    if not gpu:
        return
    convert_to_fp16(folder / NETWORKS, folder / FP16_NETWORKS, pixels)
    for target in gpu:
        kind, _, capability = target.partition(":sm")
        if kind == "trt":
            capability = _own_capability()
        if kind in ("trt", "rtx"):
            build_plan(folder / FP16_NETWORKS, kind, capability, folder)
        compile_kernels(capability, folder)


def convert_to_fp16(source: Path, target: Path, pixels: tuple[float, float] = (-1.0, 1.0)) -> None:
    """The networks with FP16 weights and tensors, input `image` in FP16, outputs in FP32.

    Raises DeviceError where FP16 cannot hold them.
    """
    layers = _run(source, np.float32, pixels, every_layer=True)
    # Exporters mark what is not set by a nan inside; one that reaches an output is found below.
    largest = max(float(np.nanmax(np.abs(values), initial=0.0)) for values in layers)
    if not largest <= _LARGEST_VALUE:
        raise DeviceError(
            f"{source.name}: found values up to {largest:.3g} between its layers, wanted at most {_LARGEST_VALUE:.0f}: "
            "FP16 ends at 65504; build for the CPU alone (--targets cpu)"
        )
    try:
        onnx.save(_in_half(onnx.load(source)), target)
        deviation = _deviation(source, target, pixels)
    except Exception as error:  # the converter has no type of its own for a network that it leaves half converted
        said = " ".join(str(error).split())[:400]
        raise DeviceError(
            f"{source.name}: cannot be brought to FP16: {said}; build for the CPU alone (--targets cpu)"
        ) from error
    if not deviation <= _LARGEST_DEVIATION:
        raise DeviceError(
            f"{target.name}: off by {deviation:.1%} of the largest value with its weights in FP16, wanted at most "
            f"{_LARGEST_DEVIATION:.0%}; build for the CPU alone (--targets cpu)"
        )
    say(f"networks in FP16: {target.stat().st_size / 1e6:.1f} MB, off by {deviation:.2%} of the largest value at most")


def _in_half(model: onnx.ModelProto) -> onnx.ModelProto:
    from onnxconverter_common import float16

    for node in model.graph.node:  # the converter takes a cast to FP32 for one of its own
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights below FP16's smallest, which become zero or that
        blocked = [*float16.DEFAULT_OP_BLOCK_LIST, *_IN_F32]
        half: onnx.ModelProto = float16.convert_float_to_float16(model, keep_io_types=False, op_block_list=blocked)
    for output in half.graph.output:
        inner = f"{output.name}_fp16"
        for node in half.graph.node:
            node.output[:] = [inner if name == output.name else name for name in node.output]
            node.input[:] = [inner if name == output.name else name for name in node.input]
        half.graph.node.append(helper.make_node("Cast", [inner], [output.name], to=TensorProto.FLOAT))
        output.type.tensor_type.elem_type = TensorProto.FLOAT
    onnx.checker.check_model(half, full_check=True)
    return half


def _deviation(source: Path, target: Path, pixels: tuple[float, float]) -> float:
    """The largest difference of any output on a random image, as a fraction of that output's largest value.

    It shows what rounding the weights does. The CPU computes with them in FP32, so what is beyond FP16 between the
    layers is looked for apart.
    """
    pairs = zip(_run(source, np.float32, pixels), _run(target, np.float16, pixels), strict=True)
    return max(float(np.abs(ours - theirs).max() / np.abs(theirs).max()) for theirs, ours in pairs)


def _run(
    path: Path, dtype: npt.DTypeLike, pixels: tuple[float, float], *, every_layer: bool = False
) -> list[npt.NDArray[Any]]:
    """The outputs on a random image, or those of every layer that has a float one."""
    core = ov.Core()
    model = core.read_model(path)
    if every_layer:
        inner = [node for node in model.get_ops() if node.get_type_name() not in ("Result", "Constant", "Parameter")]
        model.add_outputs([port for node in inner for port in node.outputs() if port.get_element_type() == ov.Type.f32])
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    image = np.random.default_rng(0).uniform(*pixels, tuple(compiled.input(0).shape)).astype(dtype)
    found = compiled([image])
    return [found[index] for index in range(len(compiled.outputs))]


def build_plan(network: Path, kind: str, capability: str, folder: Path) -> Path:
    """The plan of an FP16 network. Raises DeviceError with what the builder said."""
    trt = _builder_library(kind)
    logger = _Log(trt)
    builder: tensorrt.Builder = trt.Builder(logger.logger)
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # TensorRT 11 knows no other kind
    definition = builder.create_network(0 if flag is None else 1 << int(flag))
    parser: tensorrt.OnnxParser = trt.OnnxParser(definition, logger.logger)
    if not parser.parse(network.read_bytes()):
        said = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise DeviceError(f"{trt.__name__} cannot read {network.name}: {said}")
    config = builder.create_builder_config()
    cache = folder.parent / _TIMING_CACHE
    if kind == "rtx":
        _aim(trt, config, capability)
    else:
        config.builder_optimization_level = _OPTIMISATION
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, _WORKSPACE_BYTES)
        known = cache.read_bytes() if cache.exists() else b""
        # One of another version or GPU is refused: then it begins anew.
        if not config.set_timing_cache(config.create_timing_cache(known), False):
            config.set_timing_cache(config.create_timing_cache(b""), False)
    plan = builder.build_serialized_network(definition, config)
    if plan is None:
        raise DeviceError(f"{trt.__name__} {trt.__version__} built no plan for sm{capability}: {logger.last}")
    target = folder / plan_name(trt.__name__, capability)
    target.write_bytes(plan)
    if kind == "trt" and (timings := config.get_timing_cache()) is not None:
        cache.write_bytes(timings.serialize())
    say(f"{target.name}: {target.stat().st_size / 1e6:.1f} MB by {trt.__name__} {trt.__version__}")
    return target


def _builder_library(kind: str) -> Any:
    try:
        if kind == "rtx":
            return importlib.import_module("tensorrt_rtx_bindings")
        return importlib.import_module("tensorrt")
    except ImportError as error:
        extra = "rtx" if kind == "rtx" else "gpu"
        raise UsageError(f"target {kind}: {error}; install it with: pip install 'inspectd[{extra}]'") from error


def _aim(trt: Any, config: Any, capability: str) -> None:
    """Build for that GPU instead of the one in this box."""
    known = trt.ComputeCapability.__members__
    wanted = known.get(f"SM{capability}")
    if wanted is None:
        names = ", ".join(name.lower() for name in known if name.startswith("SM"))
        raise UsageError(f"found rtx:sm{capability}, {trt.__name__} {trt.__version__} builds for {names} (--targets)")
    config.num_compute_capabilities = 1
    config.set_compute_capability(wanted, 0)


class _Log:
    """The builder's log: errors are kept for our own message instead of being printed."""

    def __init__(self, trt: Any) -> None:
        log = self
        self.last = "it said nothing"

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity <= trt.ILogger.Severity.ERROR:
                    log.last = message

        self.logger = Logger()


def compile_kernels(capability: str, folder: Path) -> Path | None:
    """kernels.smNN.cubin by nvcc, where nvcc is. Raises DeviceError with the compiler's words."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        warn(f"no nvcc here: the line's box compiles the kernels for sm{capability} itself, at its first start")
        return None
    target = folder / kernels_name(capability)
    architecture = f"-arch=sm_{capability}"
    command = [nvcc, architecture, "-cubin", *COMPILER_OPTIONS, "-o", str(target), str(KERNELS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DeviceError(f"nvcc cannot compile the kernels for sm{capability}: {done.stderr.strip()[:500]}")
    say(f"{target.name}: {target.stat().st_size / 1e3:.0f} kB")
    return target


def _own_capability() -> str:
    """The compute capability of the GPU in this box."""
    try:
        import_tensorrt()
        cuda = importlib.import_module("pycuda.driver")
        cuda.init()
        return "".join(map(str, cuda.Device(0).compute_capability()))
    except Exception as error:  # pycuda has a type of its own for each failure, and none where it does not import
        raise DeviceError(
            f"target trt: a plan is built on the box that runs it, and here is no GPU to be used ({error}); use "
            "rtx:smNN, or run this command there"
        ) from error
