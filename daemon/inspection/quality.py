"""How a frame looks, in a few cheap figures, and whether a camera's frames still look like the calibration images.

Measured on what the network sees, never on the camera's own resolution: what is not visible there cannot change a
verdict either. `Gauge` measures on the engine's thread; `SetupTest` is fed in the loop. No clock, no socket.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from daemon.bundle import Preprocessing
from daemon.inspection.drift import RankTest
from daemon.types import FloatArray

THUMBNAIL = 64  # pixels a side
_DARK, _BRIGHT = 2.0, 250.0  # gray levels; what lies beyond has no contrast left
_FLAT = 1e-3  # of the brightness: a deviation below it is rounding
_DAMPED = 1e-3  # of the strongest frequency: weaker ones are noise
_ORDINARY = 0.25  # standard deviations: a shift that the bets let pass by themselves
_RECENT = 64  # values kept to tell by how much


@dataclass(frozen=True)
class Figure:
    """What a figure is called, how large a change is let pass however alike the calibration images are, and its share
    of the false alarms. The lamp and the lens have the larger ones: they age and are touched."""

    words: str
    share: float
    of_median: float = 0.0
    absolute: float = 0.0


STATISTICS = {
    "brightness": Figure("brightness", 0.35, of_median=0.05),
    "sharpness": Figure("focus (sharpness)", 0.25, of_median=0.1),
    "clipping": Figure("share of burnt-out or black pixels", 0.1, absolute=0.02),
    "contrast": Figure("contrast", 0.1, of_median=0.1),
    "shiftX": Figure("position across", 0.1, absolute=0.02),
    "shiftY": Figure("position along", 0.1, absolute=0.02),
}


class Gauge:
    """Measures frames as the network sees them; one thread at a time. `thumbnail` (64 64) is the mean good picture."""

    def __init__(self, preprocessing: Preprocessing, thumbnail: FloatArray | None = None) -> None:
        self._weights = [std / 3.0 for std in preprocessing.std]
        self._offset = sum(preprocessing.mean) / 3.0
        ramp = np.hanning(THUMBNAIL + 2)[1:-1].astype(np.float32)
        self._window = ramp[:, None] * ramp
        self._wanted = None if thumbnail is None else np.conj(self._spectrum(thumbnail))

    def measure(self, planes: FloatArray) -> dict[str, float]:
        """The figures of a network input (3 h w), normalised; those that a black frame does not have are left out."""
        gray = self.gray(planes)
        level = float(gray.sum(dtype=np.float32)) / gray.size
        spread = math.sqrt(max(0.0, _mean_square(gray) - level * level))
        # 4-neighbour Laplacian, over the contrast: neither the lamp nor the part's colours make a picture sharp.
        edges = math.sqrt(_mean_square(cv2.Laplacian(gray, cv2.CV_32F)))
        clipped = np.count_nonzero(gray >= _BRIGHT) + np.count_nonzero(gray <= _DARK)
        found = {"brightness": level, "clipping": clipped / gray.size}
        if spread > _FLAT * level:
            found |= {"contrast": spread / level, "sharpness": edges / spread}
            if self._wanted is not None:
                found["shiftX"], found["shiftY"] = self._shift(thumbnail(gray), self._wanted)
        # As float32, like the bundle's: equal figures have to be equal.
        return {name: float(np.float32(value)) for name, value in found.items() if math.isfinite(value)}

    def gray(self, planes: FloatArray) -> FloatArray:
        """(3 h w) normalised -> (h w), the mean of the channels on the scale 0..255."""
        red, green, blue = self._weights
        gray = cv2.addWeighted(planes[0], red, planes[1], green, self._offset)
        return np.asarray(cv2.scaleAdd(planes[2], blue, gray), np.float32)

    def _spectrum(self, picture: FloatArray) -> npt.NDArray[Any]:
        """(64 64), complex. OpenCV's transform takes a quarter of NumPy's time."""
        windowed = (picture - picture.mean()) * self._window
        return np.asarray(cv2.dft(windowed, flags=cv2.DFT_COMPLEX_OUTPUT)).view(np.complex64)[..., 0]

    def _shift(self, picture: FloatArray, wanted: npt.NDArray[Any]) -> tuple[float, float]:
        """(x, y) by phase correlation (Kuglin and Hines 1975), as shares of the frame's sides."""
        crossed = self._spectrum(picture) * wanted
        strength = np.abs(crossed)
        phases = crossed / (strength + np.float32(_DAMPED) * strength.max())
        peaks = cv2.idft(phases[..., None].view(np.float32), flags=cv2.DFT_REAL_OUTPUT)
        y, x = divmod(int(peaks.argmax()), THUMBNAIL)
        return _subpixel(peaks[y], x) / THUMBNAIL, _subpixel(peaks[:, x], y) / THUMBNAIL


def thumbnail(gray: FloatArray) -> FloatArray:
    """(h w) -> (64 64)."""
    return np.asarray(cv2.resize(gray, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA), np.float32)


def _mean_square(values: npt.NDArray[Any]) -> float:
    return cv2.norm(values, cv2.NORM_L2SQR) / values.size


def _subpixel(line: npt.NDArray[Any], peak: int) -> float:
    """The top of the parabola through a peak and its neighbours, counted from zero in both directions."""
    before, top, after = float(line[peak - 1]), float(line[peak]), float(line[(peak + 1) % len(line)])
    curve = before - 2.0 * top + after
    place = peak + (0.5 * (before - after) / curve if curve < 0.0 else 0.0)
    return place - len(line) if place >= len(line) / 2 else place


class SetupTest:
    """One test a figure, together one: on average at least BETWEEN_FALSE_ALARMS frames to a false alarm of any."""

    def __init__(self, references: Mapping[str, Sequence[float]]) -> None:
        self._medians = {name: float(np.median(values)) for name, values in references.items()}
        self._tests = {name: RankTest(values, deadband(name, values)) for name, values in references.items()}
        self._recent: dict[str, deque[float]] = {name: deque(maxlen=_RECENT) for name in references}

    def add(self, measured: Mapping[str, float]) -> None:
        for name, test in self._tests.items():
            if name in measured:
                test.add(measured[name])
                self._recent[name].append(measured[name])

    @property
    def evidence(self) -> float:
        """The mean of the figures' evidence, weighted by their shares."""
        return sum(STATISTICS[name].share * test.evidence for name, test in self._tests.items())

    def describe(self) -> str:
        """Which figure speaks most against the calibration images, and by how much."""
        name = max(self._tests, key=lambda each: STATISTICS[each].share * self._tests[each].evidence)
        frames = max(1, min(self._tests[name].since, len(self._recent[name])))
        now, before = float(np.median(list(self._recent[name])[-frames:])), self._medians[name]
        figure = STATISTICS[name]
        side = "higher" if now > before else "lower"
        if figure.of_median and before:
            by = f"{abs(now / before - 1.0):.0%} {side} ({now:.4g} against {before:.4g})"
        else:
            by = f"{abs(now - before):.1%} {side} ({now:.1%} against {before:.1%})"
        return f"{figure.words} {by} than the calibration images, for {frames} frames"


def deadband(name: str, values: Sequence[float]) -> float:
    """What a change may be before it counts, less what the test lets pass by itself where images differ much."""
    figure = STATISTICS[name]
    lower, middle, upper = np.percentile(values, (25, 50, 75))
    spread = float(upper - lower) / 1.349
    return max(0.0, figure.absolute + figure.of_median * abs(float(middle)) - _ORDINARY * spread)
