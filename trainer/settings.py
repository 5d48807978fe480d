"""What the trainer may choose about an engine, as values; trainer/choose.py chooses them from good images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FEW_IMAGES = 30  # with fewer good images there are no splits: every image is left out once (trainer/few.py)
SIZES = (256, 384, 512)  # long side, pixels
NEIGHBOURS = (1, 3, 5, 9, 15, 25, 45)  # K
ALPHAS = (0.0, 0.1, 0.25, 0.5, 1.0)
CORESETS = (1000, 2000, 4000, 10000)
WEIGHTS = (0.0, 0.125, 0.25, 0.5, 1.0)  # of the repair branch, beside 1 for ldknn


@dataclass(frozen=True)
class View:
    """How the network sees a frame; done inside networks.onnx."""

    exposure: Literal["as-is", "levelled"] = "as-is"
    tiles: Literal["none", "2x2"] = "none"


@dataclass(frozen=True)
class Settings:
    """One point of the grid. `long_side` is that of the network's input in pixels, over all tiles."""

    long_side: int = 256
    view: View = View()
    coreset: int = 4000
    k: int = 9
    alpha: float = 0.25
