"""Our kernels on the device: the bundle's own for this GPU, or compiled once."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from daemon.bundle import Bundle
from daemon.errors import DeviceError

KERNELS = Path(__file__).parent / "kernels" / "inspectd.cu"
COMPILER_OPTIONS = ["-O3", "-std=c++17"]
# struct's letters: P pointer, i int32, f float32.
_RESAMPLE = "PPiPPi"
_SIGNATURES = {
    **{f"preprocess_{kind}": f"PP{_RESAMPLE}PPiiii" for kind in ("mono8", "mono16", "rgb8", "bgr8", "bayerrg8")},
    "ldknn_round": "PPPiii",
    "ldknn_search": "PPPPiiii",
    "ldknn_finish": "PPPPPPfiii",
    "ldknn_int8_round": "PPPPfiii",
    "ldknn_int8_search": "PPPPiiii",
    "ldknn_int8_finish": "PPPPPPfiii",
    "postprocess_start": "P",
    "postprocess": f"PPffff{_RESAMPLE}PPPfiii",
}


def kernels_name(capability: str) -> str:
    return f"kernels.sm{capability}.cubin"


def load_kernels(cuda: Any, bundle: Bundle, capability: str) -> dict[str, Any]:
    """PyCUDA's functions by name, ready to be launched. Raises DeviceError."""
    name = kernels_name(capability)
    is_there = name in bundle.manifest.files
    module = cuda.module_from_buffer(bundle.read(name)) if is_there else _compile(bundle, capability)
    return {name: module.get_function(name).prepare(types) for name, types in _SIGNATURES.items()}


def _compile(bundle: Bundle, capability: str) -> Any:
    """By PyCUDA, which keeps what it compiled in the user's cache."""
    compiler = importlib.import_module("pycuda.compiler")
    options = {"options": COMPILER_OPTIONS, "no_extern_c": True, "include_dirs": [str(KERNELS.parent)]}
    try:
        return compiler.SourceModule(KERNELS.read_text(), arch=f"sm_{capability}", **options)
    except OSError as error:  # pytools' ExecError, where nvcc is not found
        raise DeviceError(
            f"{bundle.folder}: has no kernels for this GPU, and they cannot be compiled here ({error}); build the "
            f"engine with --targets cpu,kernels:sm{capability} where nvcc is, or put nvcc into PATH"
        ) from error
