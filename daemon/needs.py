"""What a fresh machine lacks before the first command can say anything: a newer Python, packages, their libraries.

Imports the standard library alone, and says nothing that Python 3.7 cannot read: the first import of anything else
would end in a trace.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import NoReturn

_OLDEST = (3, 10)
_EXIT_CODE = 64
_COMMAND = ("click", "cryptography", "cv2", "numpy", "openvino", "prometheus_client", "pydantic", "yaml", "zmq")
_BUILD = (*_COMMAND, "onnx", "safetensors", "scipy", "torch")
_EXTRAS = {
    "train": ("torch", "onnx", "onnxscript", "onnxconverter_common", "sklearn", "scipy", "matplotlib", "rich"),
    "plc": ("pymodbus", "asyncua"),
    "dashboard": ("starlette", "uvicorn", "websockets", "itsdangerous"),
    "gpu": ("tensorrt", "pycuda"),
}


def demand(*, to_build: bool = False) -> None:
    """End with 64 and one clear text where this Python cannot run inspectd. Called before anything else is imported."""
    here = sys.executable or "this Python"
    if sys.version_info < _OLDEST:
        found = ".".join(str(number) for number in sys.version_info[:3])
        _end(
            f"found Python {found} ({here}), wanted 3.10 or newer; call .venv/bin/python, or make it with a newer one: "
            "make .venv/.installed PYTHON=python3.11"
        )
    lacking = [name for name in (_BUILD if to_build else _COMMAND) if find_spec(name) is None]
    if lacking:
        _end(
            f"found no {', '.join(lacking)} in {here}, wanted the Python that inspectd was installed into; call "
            f".venv/bin/python (make .venv/.installed makes it), or: pip install '.{'[train]' if to_build else ''}'"
        )


def advise(error: ImportError) -> str | None:
    """What to do about a package or library that is not there; None for a fault of our own."""
    text = str(error)
    if "libGL" in text or "libgthread" in text:
        return (
            f"{text}: found the OpenCV that opens windows, wanted the one that needs no display; pip uninstall "
            "opencv-python, then pip install --force-reinstall opencv-python-headless"
        )
    if "shared object" in text:
        return f"{text}: found a package without a library that it wants; install it, or the package anew with pip"
    name = (error.name or "").partition(".")[0]
    extra = next((extra for extra, names in _EXTRAS.items() if name in names), None)
    if extra is not None:
        return f"{text}: wanted the extra [{extra}]; pip install 'inspectd[{extra}]'"
    return None


def _end(text: str) -> NoReturn:
    print(f"inspectd: {text}", file=sys.stderr)
    sys.exit(_EXIT_CODE)
