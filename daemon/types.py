"""The values that stages hand to each other. Frozen, without behaviour; arrays are never written to.

Axes, declared once and used in every shape of this project:
    H W  frame pixels (rows, columns)        h w    pixels of the network's input
    C    channels of a frame or a feature    gh gw  the feature grid, P = gh * gw patches, row-major
    M    rows of the memory bank             K      neighbours of the local density
Distances are squared L2 wherever they occur. Times are integers in nanoseconds (`_ns`), of the UNIX
clock where they leave the process and of the monotonic clock where they are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]
PixelArray = npt.NDArray[Any]  # uint8 or uint16
Layout = Literal["plain", "bgr", "bayerrg"]


class Outcome(str, Enum):
    """What the PLC acts on. There is no third value."""

    PASS = "PASS"
    REJECT = "REJECT"


class Reason(str, Enum):
    """Why a part is rejected; a PASS has none."""

    DEFECT = "DEFECT"
    BAD_FRAME = "BAD_FRAME"
    NOT_READY = "NOT_READY"
    OVERLOAD = "OVERLOAD"
    SUPERSEDED = "SUPERSEDED"
    MISSING = "MISSING"
    ENGINE_ERROR = "ENGINE_ERROR"
    LATE = "LATE"
    SETUP = "SETUP"


class Refusal(str, Enum):
    """Why a frame is not accepted; a refused frame gets no verdict."""

    BAD_HEADER = "BAD_HEADER"
    DUPLICATE = "DUPLICATE"
    FORBIDDEN = "FORBIDDEN"
    PAUSED = "PAUSED"
    DRAINING = "DRAINING"


@dataclass(frozen=True)
class RawFrame:
    """A frame as it arrived. `payload` is the encoded or raw image; it is not copied on its way."""

    camera: str
    epoch: str
    seq: int
    part_id: str | None
    captured_ns: int
    encoding: str  # raw | jpeg | png
    shape: tuple[int, ...]  # (H W) or (H W C)
    pixel_format: str  # Mono8 | Mono16 | RGB8 | BGR8 | BayerRG8
    product: str | None
    payload: memoryview
    is_simulated: bool = False


@dataclass(frozen=True)
class Frame:
    """The pixels of a frame, uint8 or uint16.

    `plain` is (H W 1) gray or (H W 3) RGB; `bgr` (H W 3) and `bayerrg` (H W 1), a mosaic, are as a camera or a file
    has them, for a backend that converts by itself; decode.to_plain makes them plain.
    """

    pixels: PixelArray
    layout: Layout = "plain"


@dataclass(frozen=True)
class Tensor:
    """The network's input: (1 3 h w) float32, normalised as the bundle says."""

    values: FloatArray


@dataclass(frozen=True)
class PatchScores:
    """A branch's score of each patch, (P,), row by row; it may be negative.

    ldknn: squared distance minus alpha * density. repair: how far a patch is from its repaired self, squared. map: what
    the engine's network says by itself.
    """

    values: FloatArray


@dataclass(frozen=True)
class AnomalyMap:
    """The final smoothed map, (h w) at the network's resolution, and the frame's size it belongs to."""

    values: FloatArray
    frame_hw: tuple[int, int]
    score: float


@dataclass(frozen=True)
class Region:
    """A connected component above the map limit, in frame pixels; `peak` is its highest map value."""

    x: int
    y: int
    w: int
    h: int
    area: int
    peak: float


@dataclass(frozen=True)
class Limits:
    """What one product is judged by: `score` for the part, `map` for its regions."""

    score: float
    map: float


@dataclass(frozen=True)
class Timings:
    """Milliseconds of each stage; None for a stage that was not run or is fused into another."""

    queue_ms: float | None = None
    decode_ms: float | None = None
    preprocess_ms: float | None = None
    infer_ms: float | None = None
    postprocess_ms: float | None = None
    total_ms: float | None = None


@dataclass(frozen=True)
class EngineId:
    """Which engine judged: `digest` is the SHA-256 of its manifest."""

    product: str
    version: str
    digest: str


@dataclass(frozen=True)
class Verdict:
    """The judgement of one image by one engine."""

    outcome: Outcome
    reason: Reason | None
    score: float | None = None
    limit: float | None = None
    p_value: float | None = None
    regions: tuple[Region, ...] = ()
    engine: EngineId | None = None
    timings: Timings = Timings()
    pictures: Mapping[str, bytes] | None = None  # mask, heatmap, frame: encoded, as config asks
    quality: Mapping[str, float] | None = None  # how the frame looks, for daemon/watch.py; not told on the wire


@dataclass(frozen=True)
class PartKey:
    """One part for ever: a camera's stream and the number in it."""

    camera: str
    epoch: str
    seq: int


Header = dict[str, Any]
