"""RawFrame -> Frame: the one place where pixel formats are known. Colours leave as they came, with their layout.

Turning them into RGB is left to the backend: a GPU does it while it resizes, the CPU's calls `to_plain`.

An encoded payload's own size is read from its header before it is decoded, so that a small file that
claims to be huge is refused instead of allocated.
"""

from __future__ import annotations

import struct

import cv2
import numpy as np

from daemon.errors import DataError, FrameError
from daemon.types import Frame, PixelArray, RawFrame

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_MOST_SEGMENTS = 4096  # and fill bytes; a camera's JPEG has a dozen, a hostile one millions
_MOST_SCANS = 32  # a progressive JPEG has some ten; each costs a pass over all pixels, and a hostile one has thousands
_MOST_CHUNKS = 16_384  # of a PNG; libpng writes 8 KB each, so that 128 MB are within
_JPEG_SIZE_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start of frame, all codings


def decode(raw: RawFrame) -> Frame:
    """The pixels of a frame, where they are raw those of its payload itself. Raises FrameError."""
    if raw.encoding == "raw":
        return _from_raw(raw)
    return _from_encoded(raw)


def to_plain(frame: Frame) -> Frame:
    """The same frame in gray or RGB. GenICam names a mosaic's first two pixels; OpenCV's alias RGGB means the same."""
    if frame.layout == "bayerrg":
        return Frame(np.asarray(cv2.cvtColor(frame.pixels, cv2.COLOR_BayerRGGB2RGB), np.uint8))
    if frame.layout == "bgr":
        return Frame(np.ascontiguousarray(frame.pixels[:, :, ::-1]))
    return frame


def _from_raw(raw: RawFrame) -> Frame:
    height, width = raw.shape[:2]
    if raw.pixel_format == "Mono16":
        return Frame(np.frombuffer(raw.payload, "<u2").reshape(height, width, 1))
    pixels = np.frombuffer(raw.payload, np.uint8)
    if raw.pixel_format == "Mono8":
        return Frame(pixels.reshape(height, width, 1))
    if raw.pixel_format == "BayerRG8":
        return _from_mosaic(pixels.reshape(height, width, 1))
    return Frame(pixels.reshape(height, width, 3), "plain" if raw.pixel_format == "RGB8" else "bgr")


def _from_mosaic(mosaic: PixelArray) -> Frame:
    height, width = mosaic.shape[:2]
    if min(height, width) < 3:
        raise FrameError(f"a Bayer mosaic of {[height, width]} is too small to interpolate, wanted 3 x 3 at least")
    return Frame(mosaic, "bayerrg")


def _from_encoded(raw: RawFrame) -> Frame:
    found = encoded_size(raw.payload)
    if found is None:
        raise FrameError(f"the payload is not a readable {raw.encoding} file")
    if found != raw.shape[:2]:
        raise FrameError(f"the {raw.encoding} has size {list(found)}, the header says {list(raw.shape[:2])}")
    data = bytes(raw.payload)
    if is_cut_short(data):
        raise FrameError(f"the {raw.encoding} is cut short")
    if not data.startswith(_PNG_MAGIC) and (scans := data.count(b"\xff\xda")) > _MOST_SCANS:
        raise FrameError(f"the {raw.encoding} has {scans} scans, at most {_MOST_SCANS} are decoded")
    gray = raw.pixel_format not in ("RGB8", "BGR8")
    flags = cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH if gray else cv2.IMREAD_COLOR
    flags |= cv2.IMREAD_IGNORE_ORIENTATION  # a camera's pixels are where they are; rotating is for photo viewers
    try:
        pixels = cv2.imdecode(np.frombuffer(raw.payload, np.uint8), flags)
    except cv2.error as error:
        raise FrameError(f"the {raw.encoding} cannot be decoded: {error.err}") from error
    if pixels is None or pixels.shape[:2] != raw.shape[:2] or pixels.dtype not in (np.uint8, np.uint16):
        raise FrameError(f"the {raw.encoding} cannot be decoded")
    if raw.pixel_format == "BayerRG8":
        if pixels.dtype != np.uint8:
            raise FrameError(f"the {raw.encoding} has {pixels.dtype} pixels, BayerRG8 has 8 bit")
        return _from_mosaic(pixels[:, :, None])
    return Frame(pixels[:, :, None]) if gray else Frame(pixels, "bgr")


def encoded_size(payload: memoryview | bytes) -> tuple[int, int] | None:
    """(H, W) that a PNG or JPEG claims in its header, without decoding it; None where it is neither."""
    data = memoryview(payload)
    if bytes(data[:8]) == _PNG_MAGIC and bytes(data[12:16]) == b"IHDR" and len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])
        return height, width
    return _jpeg_size(data) if bytes(data[:2]) == b"\xff\xd8" else None


def _jpeg_size(data: memoryview) -> tuple[int, int] | None:
    """Walk the segments up to the start of frame."""
    position = 2
    for _ in range(_MOST_SEGMENTS):
        if position + 9 > len(data) or data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker in _JPEG_SIZE_MARKERS:
            height, width = struct.unpack(">HH", data[position + 5 : position + 9])
            return height, width
        if marker == 0xFF or 0xD0 <= marker <= 0xD7 or marker == 0x01:  # fill byte, restart: no length follows
            position += 1 if marker == 0xFF else 2
            continue
        position += 2 + struct.unpack(">H", data[position + 2 : position + 4])[0]
    return None


def decode_file(data: bytes, name: str) -> Frame:
    """An image file's bytes as (H W 1) or (H W 3) RGB, 8 or 16 bit; alpha is dropped. Raises DataError.

    Pixels are taken as stored: an EXIF rotation is what a photo viewer applies, and a camera does not.
    """
    if is_cut_short(data):
        raise DataError(f"{name}: is cut short; copy it again")
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if data else None
    except cv2.error as error:
        raise DataError(f"{name}: cannot be decoded: {error.err}") from error
    if pixels is None:
        raise DataError(f"{name}: found no readable image, wanted PNG, JPEG, BMP or TIFF")
    if pixels.dtype not in (np.uint8, np.uint16):
        raise DataError(f"{name}: found {pixels.dtype} pixels, wanted 8 or 16 bit")
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    if channels < 3:  # gray, with alpha where there are two
        return Frame(np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], channels)[:, :, :1]))
    return Frame(np.ascontiguousarray(pixels[:, :, 2::-1]))


def is_cut_short(data: bytes) -> bool:
    """OpenCV 4 fills the missing rows of a truncated JPEG or PNG with gray and says nothing (OpenCV 5 refuses it).

    A JPEG's end marker follows its last scan; inside a scan the two bytes cannot occur, and a thumbnail's
    own end marker comes before. A PNG ends with the chunk IEND.
    """
    if data.startswith(b"\xff\xd8"):
        return data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")
    return data.startswith(_PNG_MAGIC) and not _ends_whole(data)


def _ends_whole(png: bytes) -> bool:
    """Whether every chunk up to IEND is there: OpenCV 5 takes memory for the length that a chunk claims, up to 2 GB."""
    position = len(_PNG_MAGIC)
    for _ in range(_MOST_CHUNKS):
        if position + 12 > len(png):
            return False
        length = int.from_bytes(png[position : position + 4], "big")
        kind = png[position + 4 : position + 8]
        position += 12 + length
        if kind == b"IEND":
            return position <= len(png)
    return False


def lossless(raw: RawFrame) -> tuple[str, bytes]:
    """The frame as a file that keeps every pixel: (extension, bytes). Encoded payloads stay as they came.

    Raises FrameError; an undecodable payload has no picture to keep.
    """
    if raw.encoding != "raw":
        return ("jpg" if raw.encoding == "jpeg" else "png"), bytes(raw.payload)
    pixels = to_plain(decode(raw)).pixels
    done, data = cv2.imencode(".png", pixels[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])
    if not done:
        raise FrameError(f"OpenCV cannot encode a picture of shape {pixels.shape} as PNG")
    return "png", data.tobytes()
