"""A frame at the network's size: each side by itself, area average where it shrinks, bilinear where it grows.

OpenCV decides for both sides at once: where one of them grows, the other would be sampled with aliasing. And its area
average reads a large frame pixel by pixel unless both sides shrink by a whole number. So a frame that shrinks by much
is first added up row by row, which is fast, and only what is left goes through OpenCV: 5 megapixels take less than half
of the time (bench/large.py). Both ways give the same mean within a float's error, rounded once, half to even.
"""

from __future__ import annotations

import cv2
import numpy as np

from daemon.types import FloatArray, PixelArray

_LEAST_STRIP = 6  # rows of the frame to one of the input; with fewer the calls cost more than they spare


class Resizer:
    """Brings frames to (height width). Keeps its buffers: a new page costs more than the sum that is written to it."""

    def __init__(self, height: int, width: int) -> None:
        self._height, self._width = height, width
        self._sums, self._parts = np.empty((0, 0), np.float32), np.empty((0, 0), np.float32)
        self._cut: PixelArray = np.empty((0, 0), np.uint8)

    def resize(self, pixels: PixelArray) -> PixelArray:
        """(H W C) -> (height width C), of the same type; C may be dropped where it is 1."""
        height, width = self._height, self._width
        rows, columns = pixels.shape[:2]
        is_whole = rows % height == 0 and columns % width == 0
        if rows >= _LEAST_STRIP * height and columns > width and not is_whole:
            return self._in_strips(pixels)
        if rows > height or columns > width:
            pixels = cv2.resize(pixels, (min(columns, width), min(rows, height)), interpolation=cv2.INTER_AREA)
        if rows < height or columns < width:
            pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
        return pixels

    def _in_strips(self, pixels: PixelArray) -> PixelArray:
        rows, columns, channels = pixels.shape
        sums = self._add_up_rows(pixels.reshape(rows, columns * channels))
        across = cv2.resize(
            sums.reshape(self._height, columns, channels), (self._width, self._height), interpolation=cv2.INTER_AREA
        )
        np.multiply(across, np.float32(self._height / rows), out=across)
        return np.asarray(np.rint(across, out=across).astype(pixels.dtype))

    def _add_up_rows(self, lines: PixelArray) -> FloatArray:
        """(H n) -> (height n): the sum of the rows under each output row, a row on an edge divided between two."""
        rows, height = len(lines), self._height
        if self._sums.shape != (height, lines.shape[1]) or self._cut.dtype != lines.dtype:
            self._sums = np.empty((height, lines.shape[1]), np.float32)
            self._parts, self._cut = np.empty_like(self._sums[1:]), np.empty_like(self._sums[1:], lines.dtype)
        sums, parts = self._sums, self._parts
        edges = np.arange(height + 1) * rows
        ends, has_cuts = edges // height, rows % height != 0
        starts = ends + has_cuts
        starts[0] = 0
        for row in range(height):
            cv2.reduce(lines[starts[row] : ends[row + 1]], 0, cv2.REDUCE_SUM, sums[row : row + 1], cv2.CV_32F)
        if has_cuts:
            above = (edges[1:-1, None] % height / height).astype(np.float32)
            np.take(lines, ends[1:-1], axis=0, out=self._cut, mode="clip")  # the places are right: see `nearest.py`
            np.multiply(self._cut, above, out=parts)
            sums[:-1] += parts
            np.subtract(self._cut, parts, out=parts)
            sums[1:] += parts
        return sums
