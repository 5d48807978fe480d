"""Where `inspectd camera` has its pictures from: a folder, a video file, a V4L2 device, an RTSP stream.

A source is opened, read and closed by one thread. A replay (folder, video) is read when its time has come; a live
source sets the pace itself. GenICam cameras are in adapters/genicam.py. A new kind of camera is one more class here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import time_ns
from typing import Any, Protocol

import cv2
import numpy as np

from daemon.errors import DataError, InspectError
from daemon.inspection.pipeline import for_display
from daemon.score import list_images, read_image
from daemon.types import Frame, PixelArray

_TIMEOUT_MS = 5000  # an open or a read of a stream that takes longer has failed; SIGTERM waits as long at most
_MOST_NAME = 128  # of a part id on the wire


@dataclass(frozen=True)
class Captured:
    """A picture as it was taken: pixels (H W) or (H W 3), uint8 or uint16, and the UNIX time of it."""

    pixels: PixelArray
    pixel_format: str
    captured_ns: int
    part_id: str | None = None


class SourceError(InspectError):
    """A source that is not there, or not any more. It may come back: it is opened again."""


class PictureLostError(InspectError):
    """A picture was taken and did not arrive: its part has a number and no frame."""


class SourceEndedError(InspectError):
    """A replay has come to its end."""


class Source(Protocol):
    """`rate` is how many pictures a second a replay is read; None where the source sets the pace (0: not known yet)."""

    is_replay: bool
    rate: float | None

    def open(self) -> None:
        """Raises SourceError, and DataError where trying again would not help."""

    def read(self) -> Captured | None:
        """The next picture; None where none came within about a second.

        Raises SourceError, PictureLostError, and SourceEndedError at the end of a replay.
        """

    def idle(self) -> bool:
        """While nobody wants a picture: throw away what a live source has taken. Whether that took its time."""

    def close(self) -> None: ...


def on_the_wire(frame: Frame) -> tuple[PixelArray, str]:
    """A file's pixels and their format, as a camera would send them: 16-bit gray stays as it is, colours have 8 bit."""
    gray = frame.pixels.shape[2] == 1
    deep = frame.pixels.dtype == np.uint16 and gray
    pixels = frame.pixels if deep or frame.pixels.dtype == np.uint8 else for_display(frame)[:, :, ::-1]
    return (pixels[:, :, 0] if gray else pixels), "Mono16" if deep else "Mono8" if gray else "RGB8"


class Folder:
    """Image files by name, as `simulate` sends them; a file's name without its suffix is its part's id."""

    is_replay = True

    def __init__(self, path: Path, rate: float, *, loop: bool) -> None:
        self.rate: float | None = rate
        self._path, self._loop = path, loop
        self._pictures: Iterator[Path] = iter(())

    def open(self) -> None:
        self._pictures = iter(list_images([self._path]))

    def read(self) -> Captured:
        path = next(self._pictures, None)
        if path is None:
            if not self._loop:
                raise SourceEndedError(f"{self._path}: all images were sent")
            self.open()
            return self.read()
        pixels, pixel_format = on_the_wire(read_image(path))
        name = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", "?", path.stem)[:_MOST_NAME]
        return Captured(pixels, pixel_format, time_ns(), name)

    def idle(self) -> bool:
        return False

    def close(self) -> None:
        return None


class _Capture:
    """What OpenCV opens."""

    def __init__(self, target: str | int, backend: int, parameters: list[int], name: str) -> None:
        self.name = name
        self._arguments: Any = (target, backend, parameters)
        self._capture: Any = None

    def _open(self, advice: str) -> None:
        self._capture = cv2.VideoCapture(*self._arguments)
        if not self._capture.isOpened():
            self.close()
            raise SourceError(f"{self.name}: cannot be opened; {advice}")

    def _grab(self) -> bool:
        return self._capture is not None and bool(self._capture.grab())

    def _retrieve(self, captured_ns: int) -> Captured:
        done, pixels = self._capture.retrieve()
        if not done or pixels is None or pixels.dtype != np.uint8:
            raise PictureLostError(f"{self.name}: a frame could not be decoded")
        if pixels.ndim == 3 and pixels.shape[2] == 3:
            return Captured(pixels, "BGR8", captured_ns)
        return Captured(pixels.reshape(pixels.shape[:2]), "Mono8", captured_ns)

    def close(self) -> None:
        if self._capture is not None:
            self._capture.release()
        self._capture = None


class Video(_Capture):
    """A video file, at its own rate where none is given."""

    is_replay = True

    def __init__(self, path: Path, rate: float | None, *, loop: bool) -> None:
        super().__init__(str(path), cv2.CAP_ANY, [], str(path))
        self.rate: float | None = rate or 0.0
        self._path, self._loop, self._frames = path, loop, 0

    def open(self) -> None:
        if not self._path.is_file():
            raise DataError(f"{self.name}: is not there")
        try:
            self._open("")
        except SourceError:
            raise DataError(f"{self.name}: is no video that OpenCV can read, wanted AVI, MP4, MKV, ...") from None
        own = float(self._capture.get(cv2.CAP_PROP_FPS))
        if not self.rate:
            if not 0 < own < 10_000:
                raise DataError(f"{self.name}: does not say its frame rate; give one with --rate")
            self.rate = own
        self._frames = 0

    def read(self) -> Captured:
        if not self._grab():
            if self._frames == 0:
                raise DataError(f"{self.name}: no frame of it can be read")
            if not self._loop:
                raise SourceEndedError(f"{self.name}: all frames were sent")
            self.close()
            self.open()
            return self.read()
        self._frames += 1
        return self._retrieve(time_ns())

    def idle(self) -> bool:
        return False


class _Live(_Capture):
    """A camera that gives frames by itself; the time of capture is when one was handed over."""

    is_replay = False
    rate: float | None = None

    def read(self) -> Captured:
        if not self._grab():
            raise SourceError(f"{self.name}: gives no frames any more")
        return self._retrieve(time_ns())

    def idle(self) -> bool:
        if not self._grab():
            raise SourceError(f"{self.name}: gives no frames any more")
        return True


class Device(_Live):
    """A V4L2 device."""

    def __init__(self, path: str) -> None:
        super().__init__(path, cv2.CAP_V4L2, [], path)

    def open(self) -> None:
        if not Path(self.name).exists():
            raise SourceError(f"{self.name}: is not there; is the camera plugged in? `ls /dev/video*` shows what is")
        if not os.access(self.name, os.R_OK | os.W_OK):
            raise SourceError(f"{self.name}: this user may not use it; add it to the group video, and log in again")
        self._open("another process has it, or it gives no pictures (`v4l2-ctl --list-formats` of v4l-utils)")


class Rtsp(_Live):
    """An RTSP stream, over TCP unless OPENCV_FFMPEG_CAPTURE_OPTIONS says otherwise."""

    def __init__(self, url: str) -> None:
        timeouts = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, _TIMEOUT_MS]
        super().__init__(url, cv2.CAP_FFMPEG, timeouts, without_password(url))

    def open(self) -> None:
        self._open("does the camera answer (ping), are path, user and password right? Try the same URL in a player")


def without_password(url: str) -> str:
    """The URL as it may stand in a log."""
    return re.sub(r"^(\w+://)[^/@]*@", r"\1***@", url)
