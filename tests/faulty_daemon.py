"""The daemon with a backend that a frame can order to misbehave: its first pixel says how.

Run as `python -m tests.faulty_daemon run --config ...`; everything else is the daemon as it is.
"""

from __future__ import annotations

import time

import numpy as np

from daemon.cli import main
from daemon.inspection.backend.cpu import CpuBackend
from daemon.types import Frame, PatchScores, Tensor

SLOW, THROW, NOT_A_NUMBER, HANG = 1, 2, 3, 4
SLOW_S = 0.8


class FaultyBackend(CpuBackend):
    """Obeys the order in pixel (0, 0); every other frame is inspected as usual."""

    _order = 0

    def preprocess(self, frame: Frame) -> Tensor:
        self._order = int(frame.pixels[0, 0, 0])
        return super().preprocess(frame)

    def infer(self, tensor: Tensor) -> dict[str, PatchScores]:
        if self._order == SLOW:
            time.sleep(SLOW_S)
        elif self._order == HANG:
            time.sleep(3600)
        elif self._order == THROW:
            raise RuntimeError("the frame ordered an error")
        outputs = super().infer(tensor)
        if self._order == NOT_A_NUMBER:
            outputs["ldknn"].values[-1] = np.nan  # one of them is enough
        return outputs


if __name__ == "__main__":
    import daemon.inspection.backend.cpu as module

    module.CpuBackend = FaultyBackend
    main()
