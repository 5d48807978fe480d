"""CUDA kernels on a CPU: compiled with tests/emulator.h, launched as the driver would launch them."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

KERNELS = Path(__file__).parents[1] / "daemon/inspection/backend/kernels"
_CTYPES = {int: ctypes.c_int, float: ctypes.c_float, np.int32: ctypes.c_int, np.float32: ctypes.c_float}


@cache
def load(name: str, *defines: str) -> ctypes.CDLL:
    """The kernels of a .cu file, as a library that is made once a test run."""
    options = [
        "-x",
        "c++",
        "-std=c++17",
        "-O2",
        "-fPIC",
        "-shared",
        "-fno-gnu-unique",  # else all libraries share one list of kernels, and the last one's would run
        "-DINSPECTD_EMULATED",
        f"-I{Path(__file__).parent}",
    ]
    folder = Path(tempfile.mkdtemp(prefix="inspectd-emulator-"))
    library = folder / f"{name}-{hashlib.sha256(repr(defines).encode()).hexdigest()[:8]}.so"
    command = ["g++", *options, *(f"-D{define}" for define in defines), "-o", str(library), str(KERNELS / f"{name}.cu")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def launch(library, kernel, grid, block, *arguments, late=False):
    """Arrays are passed as pointers, and so must be what the kernel expects; int and float as C's."""
    held = []
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            assert argument.flags.c_contiguous
            held.append(ctypes.c_void_p(argument.ctypes.data))
        elif argument is None:
            held.append(ctypes.c_void_p(None))
        elif isinstance(argument, (ctypes.c_void_p, ctypes.c_int, ctypes.c_float)):
            held.append(argument)
        else:
            held.append(_CTYPES[type(argument)](argument))
    pointers = (ctypes.c_void_p * len(held))(*(ctypes.addressof(item) for item in held))
    three = [(ctypes.c_uint * 3)(*(*sides, 1, 1)[:3]) for sides in (grid, block)]
    assert library.emulator_launch(kernel.encode(), *three, pointers, int(late)) == 0, f"no kernel {kernel}"
