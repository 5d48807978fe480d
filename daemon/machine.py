"""What the machine under a daemon is, for `inspectd doctor`: processor, memory, GPU, clock, who holds a port.

Asks the kernel and the drivers, and changes nothing. Every finding that is not good says what to do.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import zmq

from daemon import __version__
from daemon.inspection.backend.plan import import_tensorrt

State = Literal["ok", "WARN", "FAIL"]
_ROOT = Path("/")
_MEMORY_NEEDED_GB = 2.0
_TIME_ERROR, _TIMEX_BYTES = 5, 512  # adjtimex(2); struct timex has 208 bytes or less
_NVIDIA, _DISPLAY = "0x10de", "0x03"  # PCI's vendor, and its class of graphics
_TENSORRT = ((10, 3), (12, 0))  # as pyproject.toml asks: from, and below


@dataclass(frozen=True)
class Finding:
    state: State
    what: str

    def __str__(self) -> str:
        return f"{self.state:<5} {self.what}"


def examine_machine() -> Iterator[Finding]:
    """What does not depend on a configuration."""
    yield Finding("ok", f"inspectd: {__version__}, Python {platform.python_version()} ({sys.executable})")
    yield from _processor()
    memory_gb = available_memory_gb()
    told = f"memory: {memory_gb:.1f} GB free, wanted {_MEMORY_NEEDED_GB:.0f}"
    if memory_gb >= _MEMORY_NEEDED_GB:
        yield Finding("ok", told)
    else:
        yield Finding("WARN", f"{told}; end other programs, or put more in")
    has_curve = zmq.has("curve")
    told = f"libzmq: {zmq.zmq_version()}, CURVE {'yes' if has_curve else 'no'}"
    if zmq.zmq_version_info() >= (4, 3, 5) and has_curve:
        yield Finding("ok", told)
    else:
        yield Finding("FAIL", f"{told}; wanted 4.3.5 with CURVE: pip install --force-reinstall pyzmq")
    yield _clock()


def _processor() -> Iterator[Finding]:
    from daemon.inspection.backend.nearest import openvino_core
    from daemon.inspection.backend.pruned import load_library

    core = openvino_core()
    name = core.get_property("CPU", "FULL_DEVICE_NAME")
    bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    cores = len(os.sched_getaffinity(0))
    told = f"processor: {name}, {cores} core(s), {_vectors()}, bf16 {'yes' if bf16 else 'no'}"
    if cores > 1:
        yield Finding("ok", told)
    else:
        yield Finding("WARN", f"{told}; with one core deadlines wait for the inference: give it two or more")
    if platform.machine() == "x86_64" and "avx2" not in processor_flags():
        yield Finding("WARN", "processor: no AVX2, several times slower; in a virtual machine, pass it through")
    compiled = load_library() is not None
    advice = "yes" if compiled else "no, OpenVINO searches, slower; install a C compiler, then inspectd again"
    yield Finding("ok" if compiled else "WARN", f"compiled search: {advice}")


def has_bf16() -> bool:
    """Whether this processor computes in bf16."""
    from daemon.inspection.backend.nearest import openvino_core

    return "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def processor_flags(root: Path = _ROOT) -> frozenset[str]:
    """What the processor can, in the kernel's words."""
    with suppress(OSError):
        for line in (root / "proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.partition(":")[2].split())
    return frozenset()


def _vectors() -> str:
    known = {"avx512f": "AVX-512", "avx2": "AVX2", "sve": "SVE", "asimd": "NEON"}
    flags = processor_flags()
    return next((name for flag, name in known.items() if flag in flags), "no wide vectors")


def available_memory_gb(root: Path = _ROOT) -> float:
    """What programs could still have: the free pages, and those of the page cache that would be given up."""
    told = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
    return int(told["MemAvailable"].split()[0]) * 1024 / 1e9


# -- clock -----------------------------------------------------------------------------------------


def is_clock_kept() -> bool | None:
    """Whether something keeps the clock right (NTP, PTP), as the kernel was told; None where it does not say."""
    adjtimex = getattr(ctypes.CDLL(None), "adjtimex", None)
    if adjtimex is None:
        return None
    state = int(adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES)))  # modes 0: only asks
    return None if state < 0 else state != _TIME_ERROR


def _clock() -> Finding:
    is_kept = is_clock_kept()
    if is_kept:
        return Finding("ok", "clock: synchronised")
    told = "clock: nothing keeps it right" if is_kept is False else "clock: the kernel does not say whether it is kept"
    what = "times in the ledger and in results are this machine's own guess, certificates may look expired"
    return Finding("WARN", f"{told}; {what}: timedatectl set-ntp true, or install chrony")


# -- GPU -------------------------------------------------------------------------------------------


def examine_gpu(kind: str) -> Iterator[Finding]:
    """GPU, driver and libraries, as backend.kind wants them."""
    gpus = nvidia_gpus()
    bad: State = "FAIL" if kind == "cuda" else "WARN"
    if not gpus:
        if kind == "cuda":
            yield Finding("FAIL", "gpu: found none, backend.kind is cuda; put one in, or set it to auto or cpu")
        else:
            yield Finding("ok", f"gpu: none, the processor judges (backend.kind: {kind})")
        return
    told, driver = f"gpu: {', '.join(gpus)}", nvidia_driver()
    if driver is None:
        yield Finding(bad, f"{told}, and no driver; install NVIDIA's (Debian: nvidia-driver), then start the box again")
    elif kind == "cpu":
        yield Finding("ok", f"{told}, driver {driver}; not used (backend.kind: cpu)")
    elif (cuda := cuda_version()) is None:
        why = "its library finds no GPU: nvidia-smi says why; a service needs the drop-in (docs/install.md)"
        yield Finding(bad, f"{told}, driver {driver}, but {why}")
    else:
        yield Finding("ok", f"{told}, driver {driver}, CUDA {cuda}")
        yield _gpu_libraries(bad)


def nvidia_gpus(root: Path = _ROOT) -> list[str]:
    """NVIDIA's graphics on the PCI bus by their addresses, or the Jetson that this is."""
    found = []
    for device in sorted((root / "sys/bus/pci/devices").glob("*")):
        with suppress(OSError):
            is_graphics = (device / "class").read_text().startswith(_DISPLAY)
            if is_graphics and (device / "vendor").read_text().strip() == _NVIDIA:
                found.append(f"NVIDIA at {device.name}")
    with suppress(OSError):
        model = (root / "proc/device-tree/model").read_text().strip("\0\n")
        if re.search("jetson|orin|xavier", model, re.IGNORECASE):
            found.append(model)
    return found


def nvidia_driver(root: Path = _ROOT) -> str | None:
    """The version of the loaded driver."""
    with suppress(OSError):
        found = re.search(r"\d+\.\d+(\.\d+)?", (root / "proc/driver/nvidia/version").read_text())
        return found.group() if found else "of no known version"
    return None


def cuda_version(library: Any = None) -> str | None:
    """The newest CUDA that the driver speaks; None where its library is not there, or finds no GPU."""
    version = ctypes.c_int()
    try:
        library = library or ctypes.CDLL("libcuda.so.1")
        failed = library.cuInit(0) or library.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else f"{version.value // 1000}.{version.value % 1000 // 10}"


def _gpu_libraries(bad: State) -> Finding:
    try:
        importlib.import_module("pycuda.driver")
        tensorrt = import_tensorrt()
    except (ImportError, OSError) as error:
        advice = "pip install 'inspectd[gpu]' (a Jetson has TensorRT from JetPack: docs/install.md)"
        return Finding(bad, f"TensorRT: {error}; {advice}")
    told = f"TensorRT: {tensorrt.__name__} {tensorrt.__version__}"
    version = tuple(int(number) for number in re.findall(r"\d+", tensorrt.__version__)[:2])
    if tensorrt.__name__ == "tensorrt" and not _TENSORRT[0] <= version < _TENSORRT[1]:
        return Finding(bad, f"{told}; wanted 10.3 to 11.x: pip install 'tensorrt>=10.3,<12'")
    return Finding("ok", told)


# -- ports -----------------------------------------------------------------------------------------


def listener(port: int, root: Path = _ROOT) -> str | None:
    """Who listens on a tcp port, as far as this user may see; None where nobody is seen."""
    sockets = set()
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in (root / "proc/net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:  # 0A: it listens
                    sockets.add(f"socket:[{fields[9]}]")
    for process in (root / "proc").glob("[0-9]*") if sockets else ():
        with suppress(OSError):
            if any(str(held.readlink()) in sockets for held in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text().strip()} (pid {process.name})"
    return None
