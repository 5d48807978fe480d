"""The Backend protocol, and which implementation a machine gets.

A backend turns a Frame into an AnomalyMap for one bundle. It owns every buffer it needs from the
moment it is opened and is used by one thread; what a stage returns is good until its next call.
"""

from __future__ import annotations

from typing import Protocol

from daemon.bundle import Bundle
from daemon.errors import DeviceError
from daemon.types import AnomalyMap, Frame, PatchScores, Repaired, Tensor

PRECISIONS = ("f32", "bf16")


class Backend(Protocol):
    """Four stages, called in this order for each frame. Each may raise DeviceError."""

    name: str
    precision: str

    def preprocess(self, frame: Frame) -> Tensor:
        """(H W C) pixels -> (1 3 h w), resized and normalised as the manifest says."""

    def infer(self, tensor: Tensor) -> tuple[Repaired | None, PatchScores | None]:
        """The branches' raw outputs; None for a branch that the bundle does not have."""

    def postprocess(self, outputs: tuple[Repaired | None, PatchScores | None], frame_hw: tuple[int, int]) -> AnomalyMap:
        """Standardise, combine, upsample and smooth to (h w); the score is the map's maximum."""

    def close(self) -> None:
        """Give back what was allocated; the backend is not used afterwards."""


def open_backend(bundle: Bundle, kind: str = "auto", precision: str = "f32", threads: int = 2) -> Backend:
    """The backend for this machine: `auto` is the CPU until a GPU backend is there. Raises DeviceError."""
    if kind == "cuda":
        raise DeviceError(
            "backend kind 'cuda': this version runs on the CPU only; set backend.kind to auto or cpu in config.yaml"
        )
    if precision not in PRECISIONS:
        raise DeviceError(f"found precision {precision!r}, wanted one of {', '.join(PRECISIONS)}")
    from daemon.inspection.backend.cpu import CpuBackend

    return CpuBackend(bundle, precision, threads)
