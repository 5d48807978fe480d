"""A GPU that is not there: PyCUDA's driver, CUDA graphs and TensorRT, as far as the CUDA backend calls them.

Device memory is host memory, so that pointers are real. Kernels are the backend's own .cu files, run by the emulator;
the plan's networks are the bundle's ONNX file in OpenVINO, with FP16's rounding at its input. Every call that reaches
the GPU is recorded with its stream; work that is put on a stream while it is captured runs at each launch of the graph.
"""

from __future__ import annotations

import ctypes
import stat
import sys
import types
from pathlib import Path

import numpy as np
import openvino as ov

from tests.emulator import launch, load

_CTYPES = {"P": ctypes.c_void_p, "i": ctypes.c_int, "f": ctypes.c_float}


class Error(Exception):
    """pycuda.driver.Error."""


class Gpu:
    """What the fakes share: the log, the work being captured, faults to come."""

    def __init__(self, *, capability=(8, 7), is_integrated=False, multiprocessors=2, plan=None):
        self.capability, self.is_integrated, self.multiprocessors = capability, is_integrated, multiprocessors
        self.plan = plan  # what deserialize_cuda_engine gives; None where it refuses
        self.log: list[str] = []
        self.captured: list | None = None
        self.graphs: dict[int, list] = {}
        self.allocations = 0
        self.depth = 0
        self.next_fault: tuple[str, BaseException] | None = None
        self.held: dict[int, np.ndarray] = {}

    def put(self, name, work):
        """Work on the stream: at once, or into the graph that is being recorded."""
        self.check(name)
        if self.captured is not None:
            self.captured.append((name, work))
            return
        self.log.append(name)
        work()

    def check(self, name):
        assert self.depth > 0, f"{name}: no context is current"
        if self.next_fault is not None and self.next_fault[0] == name:
            error, self.next_fault = self.next_fault[1], None
            raise error

    def allocate(self, size):
        assert self.captured is None, "memory is allocated while a graph is recorded"
        self.allocations += 1
        memory = np.full(int(size) + 16, 0xFF, np.uint8)  # NaN, whatever is read as
        offset = -memory.ctypes.data % 16
        own = memory[offset : offset + int(size)]
        self.held[own.ctypes.data] = memory
        return own


class Allocation:
    def __init__(self, memory):
        self.memory = memory

    def __int__(self):
        return self.memory.ctypes.data

    __index__ = __int__


def view(pointer, count, dtype):
    size = np.dtype(dtype).itemsize * count
    return np.frombuffer((ctypes.c_char * size).from_address(int(pointer)), dtype)


class Function:
    def __init__(self, gpu, name):
        self._gpu, self._name, self._letters = gpu, name, ""

    def prepare(self, letters):
        self._letters = letters
        return self

    def prepared_async_call(self, grid, block, stream, *arguments, shared_size=0):
        assert len(arguments) == len(self._letters), (self._name, len(arguments), self._letters)
        assert stream is self._gpu.stream
        assert len(block) == 3
        assert block[0] * block[1] * block[2] <= 1024
        given = [
            _CTYPES[letter](int(value) if letter != "f" else float(value))
            for letter, value in zip(self._letters, arguments, strict=True)
        ]
        assert shared_size <= 48 << 10, "more needs an attribute of the function"
        self._gpu.put(self._name, lambda: launch(load("inspectd"), self._name, grid, block, *given))


class HostBase:
    def __init__(self, memory):
        self._memory = memory

    def get_device_pointer(self):
        return self._memory.ctypes.data


class PageLocked(np.ndarray):
    """A page-locked array, whose base knows its device pointer."""

    @property
    def base(self):
        return HostBase(np.asarray(self))


def make_driver(gpu):  # noqa: C901 - one closure a function of the driver
    """The module pycuda.driver."""
    driver = types.ModuleType("pycuda.driver")

    class Stream:
        handle = 4711

        def __init__(self):
            gpu.check("Stream")
            gpu.stream = self

        def synchronize(self):
            gpu.check("synchronize")
            assert gpu.captured is None, "a recording stream cannot be waited for"
            gpu.log.append("synchronize")

    class Context:
        def push(self):
            gpu.depth += 1

        def pop(self):
            assert gpu.depth > 0
            gpu.depth -= 1

        def detach(self):
            gpu.log.append("detach")

    class Device:
        def __init__(self, number):
            assert number == 0

        def retain_primary_context(self):
            return Context()

        def compute_capability(self):
            return gpu.capability

        def get_attribute(self, attribute):
            return {"INTEGRATED": gpu.is_integrated, "MULTIPROCESSOR_COUNT": gpu.multiprocessors}[attribute]

    class Module:
        def get_function(self, name):
            return Function(gpu, name)

    def mem_alloc(size):
        gpu.check("mem_alloc")
        return Allocation(gpu.allocate(size))

    def to_device(values):
        assert values.flags.c_contiguous
        memory = gpu.allocate(values.nbytes)
        memory[:] = values.reshape(-1).view(np.uint8)
        return Allocation(memory)

    def pagelocked_empty(shape, dtype, order="C", mem_flags=0):
        gpu.check("pagelocked_empty")
        gpu.log.append(f"pagelocked {mem_flags}")
        memory = gpu.allocate(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        return memory.view(dtype).reshape(shape).view(PageLocked)

    def copy(name, target, source, size):
        gpu.put(name, lambda: ctypes.memmove(int(target), int(source), size))

    def module_from_buffer(data):
        gpu.log.append(f"cubin {bytes(data)!r}")
        return Module()

    driver.Error, driver.Stream, driver.Device, driver.init = Error, Stream, Device, lambda: None
    driver.device_attribute = types.SimpleNamespace(
        INTEGRATED="INTEGRATED", MULTIPROCESSOR_COUNT="MULTIPROCESSOR_COUNT"
    )
    driver.host_alloc_flags = types.SimpleNamespace(DEVICEMAP=2)
    driver.mem_alloc, driver.to_device, driver.pagelocked_empty = mem_alloc, to_device, pagelocked_empty
    driver.memcpy_htod_async = lambda to, values, stream: copy("copy in", to, values.ctypes.data, values.nbytes)
    driver.memcpy_dtoh_async = lambda values, source, stream: copy(
        "copy out", values.ctypes.data, source, values.nbytes
    )
    driver.memcpy_dtod_async = lambda to, source, size, stream: copy("copy on", to, source, size)
    driver.memcpy_dtoh = lambda values, source: ctypes.memmove(values.ctypes.data, int(source), values.nbytes)
    driver.module_from_buffer = module_from_buffer
    driver.Module = Module
    return driver


def make_compiler(gpu, driver):
    """The module pycuda.compiler."""
    compiler = types.ModuleType("pycuda.compiler")

    def compile_source(source, *, arch, options, no_extern_c, include_dirs, cache_dir):
        assert no_extern_c
        assert stat.S_IMODE(Path(cache_dir).stat().st_mode) == 0o700
        assert '#include "ldknn.cu"' in source
        assert len(include_dirs) == 1
        gpu.log.append(f"compiled {arch}")
        gpu.cache = Path(cache_dir)
        return driver.Module()

    compiler.SourceModule = compile_source
    return compiler


class Libcuda:
    """The functions of libcuda.so.1 that daemon/inspection/backend/graph.py calls."""

    def __init__(self, gpu):
        self._gpu = gpu

    def cuStreamBeginCapture_v2(self, stream, mode):  # noqa: N802 - the driver's names
        assert stream.value == 4711
        self._gpu.check("capture")
        self._gpu.captured = []
        return 0

    def cuStreamEndCapture(self, stream, graph):  # noqa: N802
        number = len(self._gpu.graphs) + 1
        self._gpu.graphs[number] = self._gpu.captured
        self._gpu.captured = None
        graph._obj.value = number
        return 0

    def cuGraphInstantiateWithFlags(self, ready, graph, flags):  # noqa: N802
        ready._obj.value = 100 + graph.value
        return 0

    def cuGraphDestroy(self, graph):  # noqa: N802
        return 0

    def cuGraphLaunch(self, ready, stream):  # noqa: N802
        self._gpu.check("launch")
        self._gpu.log.append("launch")
        for name, work in self._gpu.graphs[ready.value - 100]:
            if self._gpu.next_fault is not None and self._gpu.next_fault[0] == f"graph {name}":
                self._gpu.next_fault = None
                return 700  # CUDA_ERROR_ILLEGAL_ADDRESS
            work()
        return 0

    def cuGraphExecDestroy(self, ready):  # noqa: N802
        self._gpu.log.append("graph closed")
        return 0


class Plan:
    """What a plan of this ONNX file is to TensorRT."""

    def __init__(self, onnx_bytes, tensors):
        self.onnx_bytes, self.tensors = onnx_bytes, tensors  # {name: (shape, "HALF" or "FLOAT")}


def make_tensorrt(gpu, name="tensorrt"):  # noqa: C901 - one class a class of TensorRT
    """The module tensorrt, or tensorrt_rtx."""
    module = types.ModuleType(name)
    module.__version__ = "10.3.0"
    module.DataType = types.SimpleNamespace(HALF="HALF", FLOAT="FLOAT", INT8="INT8")

    class Logger:
        WARNING = 1

        def __init__(self, level):
            pass

    class Context:
        def __init__(self, engine):
            self._addresses = {}
            core = ov.Core()
            model = core.read_model(engine.plan.onnx_bytes)
            compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            self._request = compiled.create_infer_request()
            self._tensors = engine.plan.tensors

        def set_tensor_address(self, tensor, pointer):
            self._addresses[tensor] = pointer
            return pointer % 16 == 0

        def execute_async_v3(self, handle):
            assert handle == 4711
            assert set(self._addresses) == set(self._tensors)
            gpu.check("networks")
            if gpu.next_fault is not None and gpu.next_fault[0] == "networks refuse":
                gpu.next_fault = None
                return False
            gpu.put("networks", self._run)
            return True

        def _run(self):
            shape = self._tensors["image"][0]
            image = view(self._addresses["image"], int(np.prod(shape)), np.float16).astype(np.float32).reshape(shape)
            self._request.infer([image])
            for tensor in self._tensors:
                if tensor != "image":
                    found = self._request.get_tensor(tensor).data.reshape(-1)
                    view(self._addresses[tensor], found.size, np.float32)[:] = found

    class Engine:
        def __init__(self, plan):
            self.plan, self._names = plan, list(plan.tensors)
            self.num_io_tensors = len(self._names)

        def get_tensor_name(self, index):
            return self._names[index]

        def get_tensor_shape(self, tensor):
            return self.plan.tensors[tensor][0]

        def get_tensor_dtype(self, tensor):
            return self.plan.tensors[tensor][1]

        def create_execution_context(self):
            return Context(self)

    class Runtime:
        def __init__(self, logger):
            pass

        def deserialize_cuda_engine(self, data):
            gpu.log.append(f"plan {data!r}")
            return None if gpu.plan is None else Engine(gpu.plan)

    module.Logger, module.Runtime = Logger, Runtime
    return module


def install(monkeypatch, gpu, tensorrt="tensorrt"):
    """Put the fakes where the backend looks for the real ones."""
    from daemon.inspection.backend import graph

    driver = make_driver(gpu)
    package = types.ModuleType("pycuda")
    package.driver = driver
    modules = {"pycuda": package, "pycuda.driver": driver, "pycuda.compiler": make_compiler(gpu, driver)}
    modules |= {"tensorrt": None, "tensorrt_rtx": None, "tensorrt_rtx_bindings": None}
    if tensorrt:
        modules[tensorrt] = make_tensorrt(gpu, tensorrt)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(graph, "_driver", lambda: Libcuda(gpu))
    return gpu
