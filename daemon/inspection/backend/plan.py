"""A TensorRT plan of a bundle: opened, checked, bound to its buffers. The daemon never builds one."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from daemon.bundle import Bundle
from daemon.errors import BundleError, DeviceError

if TYPE_CHECKING:  # tensorrt-stubs
    import tensorrt


def import_tensorrt(plans: Collection[str] = ()) -> Any:
    """`tensorrt`, else TensorRT for RTX: the same API; a plan of one is none of the other.

    Of several that are installed, one that a plan among `plans` is for. Raises ImportError.
    """
    found = []
    for name in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        with suppress(ImportError):
            found.append(importlib.import_module(name))
    if not found:
        raise ImportError("found neither tensorrt nor tensorrt_rtx")
    kinds = {"networks.trt.plan" if module.__name__ == "tensorrt" else "networks.rtx": module for module in found[::-1]}
    fitting = [module for kind, module in kinds.items() if any(plan.startswith(kind) for plan in plans)]
    return fitting[-1] if fitting else found[0]


def plan_name(module: str, capability: str) -> str:
    """The bundle's file for a TensorRT module and a compute capability ("86")."""
    return "networks.trt.plan" if module == "tensorrt" else f"networks.rtx-sm{capability}.plan"


class Networks:
    """On the GPU. buffers: image (1 3 h w) f16; map (P) f32, or features (P C) f32 and perhaps repair (P)."""

    def __init__(self, bundle: Bundle, capability: str, cuda: Any) -> None:
        self._trt = import_tensorrt(bundle.manifest.files)
        name = plan_name(self._trt.__name__, capability)
        self._path = bundle.folder / name
        if name not in bundle.manifest.files:
            target = "trt" if name == "networks.trt.plan" else f"rtx:sm{capability}"
            raise DeviceError(
                f"{bundle.folder}: found no {name}, wanted the networks' plan for this GPU (sm{capability}) and "
                f"{self._trt.__name__}; build the engine again with --targets cpu,{target}"
            )
        runtime: tensorrt.Runtime = self._trt.Runtime(self._trt.Logger(self._trt.Logger.WARNING))
        engine: tensorrt.ICudaEngine | None = runtime.deserialize_cuda_engine(bundle.read(name))
        if engine is None:
            raise DeviceError(
                f"{self._path}: {self._trt.__name__} {self._trt.__version__} does not take this plan: it was built by "
                "another version or for another GPU; build the engine again on this box"
            )
        self._engine = engine
        context: tensorrt.IExecutionContext | None = engine.create_execution_context()
        if context is None:
            raise DeviceError(f"{self._path}: no memory for the networks on the GPU; free some of it")
        self._context = context
        self.buffers: dict[str, Any] = {}
        self.channels = self._bind(bundle, cuda)

    def _bind(self, bundle: Bundle, cuda: Any) -> int:
        """Check inputs and outputs and give each its buffer; the features' channels, 0 of an engine without them."""
        trt, engine, manifest = self._trt, self._engine, bundle.manifest
        patches = manifest.grid[0] * manifest.grid[1]
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        found: dict[str, tuple[tuple[int, ...], Any]] = {
            # Dims can be iterated; only its stub does not say so.
            name: (tuple(engine.get_tensor_shape(name)), engine.get_tensor_dtype(name))  # type: ignore[arg-type]
            for name in names
        }
        channels = found["features"][0][-1] if "features" in found else 0
        half, single = trt.DataType.HALF, trt.DataType.FLOAT
        wanted: dict[str, tuple[tuple[int, ...], Any]] = {"image": ((1, 3, *manifest.preprocessing.size), half)}
        if "map" in manifest.branches:
            wanted["map"] = ((patches,), single)
        else:
            wanted["features"] = ((patches, channels), single)
        if "repair" in manifest.branches:
            wanted["repair"] = ((patches,), single)
        if found != wanted:
            raise BundleError(f"{self._path}: found tensors {found}, wanted {wanted}; build the engine again")
        for name, (shape, kind) in found.items():
            self.buffers[name] = cuda.mem_alloc((2 if kind == half else 4) * int(np.prod(shape)))
            if not self._context.set_tensor_address(name, int(self.buffers[name])):
                raise DeviceError(f"{self._path}: TensorRT refuses the buffer of {name}")
        return int(channels)

    def enqueue(self, stream: Any) -> None:
        if not self._context.execute_async_v3(stream.handle):
            raise DeviceError("TensorRT refused to run the networks; its log on stderr says why")
