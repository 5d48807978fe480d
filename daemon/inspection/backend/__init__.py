"""The Backend protocol, and which implementation a machine gets.

A backend turns a Frame into an AnomalyMap for one bundle. It owns every buffer it needs from the
moment it is opened and is used by one thread; what a stage returns is good until its next call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from daemon.errors import DeviceError
from daemon.types import AnomalyMap, FloatArray, Frame, Timings

if TYPE_CHECKING:  # tables.py is also for machines that have NumPy alone
    from daemon.bundle import Bundle

PRECISIONS = ("f32", "bf16")  # the CPU's; the GPU computes in fp16


class Backend(Protocol):
    """A whole frame in one call, so that a backend may fuse its stages."""

    name: str
    precision: str

    def run(self, frame: Frame) -> tuple[AnomalyMap, Timings]:
        """The map (h w), whose maximum is the score, good until the next call; null for stages that are fused.

        Raises DeviceError.
        """

    def network_input(self) -> FloatArray:
        """What the networks saw of the last frame, (3 h w) normalised, good until the next one. Raises DeviceError."""

    def close(self) -> None:
        """Give back what was allocated; the backend is not used afterwards."""


def open_backend(bundle: Bundle, kind: str = "auto", precision: str = "f32", threads: int = 2) -> Backend:
    """`auto` is the GPU where the bundle has a plan for one and its libraries import. Raises DeviceError."""
    if kind != "cpu":
        from daemon.inspection.backend.cuda import CudaBackend, why_not

        reason = why_not(bundle)
        if reason is None:
            return CudaBackend(bundle)
        if kind == "cuda":
            raise DeviceError(f"backend kind 'cuda': {reason}")
    if precision not in PRECISIONS:
        raise DeviceError(f"found precision {precision!r}, wanted one of {', '.join(PRECISIONS)}")
    from daemon.inspection.backend.cpu import CpuBackend

    return CpuBackend(bundle, precision, threads)
