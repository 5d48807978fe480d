"""Small pictures of what was found: the worst region with what is around it, for the dashboard and for a sheet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from adapters.review.desk import Reject
from daemon.inspection.pipeline import for_display
from daemon.types import ByteArray, Frame

SIDE = 192  # pixels
_AROUND = 1.4  # times the region's longer side
_LEAST = 48  # pixels of the frame
_BOX = (255, 255, 0)  # cyan, which no metal has
_MARGIN, _CAPTION = 8, 26


def thumbnail(frame: Frame, reject: Reject) -> ByteArray:
    """(192 192 3) BGR: a square of the frame around its worst region, whose corners are marked."""
    pixels = _for_eyes(frame)
    height, width = pixels.shape[:2]
    worst = max(reject.regions, key=lambda region: region["peak"])
    side = min(max(_LEAST, round(_AROUND * max(worst["w"], worst["h"]))), height, width)
    left = _within(worst["x"] + worst["w"] // 2 - side // 2, width - side)
    top = _within(worst["y"] + worst["h"] // 2 - side // 2, height - side)
    scale = SIDE / side
    cut = pixels[top : top + side, left : left + side]
    shown = cv2.resize(cut, (SIDE, SIDE), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    first = [round(scale * (worst["x"] - left)), round(scale * (worst["y"] - top))]
    last = [round(scale * (worst["x"] + worst["w"] - left)), round(scale * (worst["y"] + worst["h"] - top))]
    _mark_corners(shown, first, last)
    return np.asarray(shown, np.uint8)


def jpeg(picture: ByteArray) -> bytes:
    return cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 88])[1].tobytes()


def sheet(rows: Sequence[tuple[str, Sequence[ByteArray]]]) -> ByteArray:
    """One picture of all: a row of thumbnails for each caption, on white."""
    widest = max(len(pictures) for _, pictures in rows)
    row_height = SIDE + _CAPTION + _MARGIN
    page = np.full((len(rows) * row_height + _MARGIN, widest * (SIDE + _MARGIN) + _MARGIN, 3), 255, np.uint8)
    for number, (caption, pictures) in enumerate(rows):
        top = number * row_height + _CAPTION
        place = (_MARGIN, top - 8)
        cv2.putText(page, caption, place, cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
        for column, picture in enumerate(pictures):
            left = _MARGIN + column * (SIDE + _MARGIN)
            page[top : top + SIDE, left : left + SIDE] = picture
    return page


def _for_eyes(frame: Frame) -> ByteArray:
    """(H W 3) BGR, 8 bit; 16-bit frames are stretched to their own brightest, as 12 bits would be black."""
    pixels: Any = frame.pixels
    if pixels.dtype == np.uint16:
        pixels = (pixels * (255.0 / max(1, int(pixels.max())))).astype(np.uint8)
    shown = for_display(Frame(pixels))
    return np.repeat(shown, 3, axis=2) if shown.shape[2] == 1 else shown


def _within(first: int, most: int) -> int:
    return max(0, min(first, most))


def _mark_corners(picture: ByteArray, first: list[int], last: list[int]) -> None:
    """A quarter of each side, so that what is inside can be seen."""
    for x, y, dx, dy in (
        (first[0], first[1], 1, 1), (last[0], first[1], -1, 1), (first[0], last[1], 1, -1), (last[0], last[1], -1, -1)
    ):  # fmt: skip
        x, y = min(max(x, 1), SIDE - 2), min(max(y, 1), SIDE - 2)  # noqa: PLW2901 - kept inside the picture
        for end in ((x + dx * SIDE // 12, y), (x, y + dy * SIDE // 12)):
            cv2.line(picture, (x, y), end, (0, 0, 0), 4, cv2.LINE_AA)
        for end in ((x + dx * SIDE // 12, y), (x, y + dy * SIDE // 12)):
            cv2.line(picture, (x, y), end, _BOX, 2, cv2.LINE_AA)
