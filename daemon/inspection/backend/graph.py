"""CUDA graphs, which PyCUDA does not wrap: a frame's whole work is recorded once and launched by one call."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

from daemon.errors import DeviceError

_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: what other threads do with the GPU is no business of ours


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: Any) -> None:
    """A function of the driver. Raises DeviceError with its name and code."""
    code = getattr(_driver(), name)(*arguments)
    if code != 0:
        raise DeviceError(f"{name} failed with CUDA error {code}; inspectd doctor says what the driver is")


class Graph:
    """What `work` puts on a stream, ready to be launched again and again with the same pointers."""

    def __init__(self, stream: Any, work: Callable[[], None]) -> None:
        self._stream = ctypes.c_void_p(int(stream.handle))
        graph, self._ready = ctypes.c_void_p(), ctypes.c_void_p()
        _call("cuStreamBeginCapture_v2", self._stream, ctypes.c_int(_THREAD_LOCAL))
        try:
            work()
        except BaseException:
            # A capture that is not ended would swallow all that follows; what it says now is of no interest.
            _driver().cuStreamEndCapture(self._stream, ctypes.byref(graph))
            if graph:
                _driver().cuGraphDestroy(graph)
            raise
        _call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        try:
            _call("cuGraphInstantiateWithFlags", ctypes.byref(self._ready), graph, ctypes.c_ulonglong(0))
        finally:
            _driver().cuGraphDestroy(graph)

    def launch(self) -> None:
        _call("cuGraphLaunch", self._ready, self._stream)

    def close(self) -> None:
        _call("cuGraphExecDestroy", self._ready)
