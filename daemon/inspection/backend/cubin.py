"""Our kernels on the device: the bundle's own for this GPU, or compiled once."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from daemon.bundle import Bundle
from daemon.errors import DeviceError
from daemon.keys import foreign_hands

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
    """By PyCUDA, which keeps what it compiled."""
    compiler = importlib.import_module("pycuda.compiler")
    options: dict[str, Any] = {"options": COMPILER_OPTIONS, "no_extern_c": True, "include_dirs": [str(KERNELS.parent)]}
    options["cache_dir"] = str(_private_cache(bundle))
    try:
        return compiler.SourceModule(KERNELS.read_text(), arch=f"sm_{capability}", **options)
    except OSError as error:  # pytools' ExecError, where nvcc is not found
        raise DeviceError(
            f"{bundle.folder}: has no kernels for this GPU, and they cannot be compiled here ({error}); build the "
            f"engine with --targets cpu,kernels:sm{capability} where nvcc is, or put nvcc into PATH"
        ) from error


def _private_cache(bundle: Bundle) -> Path:
    """A folder for what is compiled for this very bundle, and nobody else's: what lies there runs unasked."""
    home = os.environ.get("CACHE_DIRECTORY") or Path.home() / ".cache/inspectd"
    folder = Path(home) / "kernels" / bundle.digest
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        problem = foreign_hands(folder.stat())
    except OSError as error:
        problem = f"cannot be used ({error.strerror})"
    if problem is not None:
        raise DeviceError(f"{folder}, for compiled kernels: {problem}; or name another place in CACHE_DIRECTORY")
    return folder
