"""Stock imageZMQ senders: their messages as parts of ours. No socket.

A message is [JSON {"msg", "dtype", "shape"}][pixels, rows without padding] or [JSON {"msg"}][JPEG], from a REQ socket
behind an empty part. It has no camera, no number and no time: the endpoint names the camera, the numbers are made
here, the time is that of arrival. So a sender's gaps cannot be seen, and any message whatever is a known part: what
cannot be read is a BAD_FRAME and not a refusal.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import time_ns
from uuid import uuid4

from pydantic import TypeAdapter, ValidationError

from daemon.errors import FrameError, WireError
from daemon.inspection.decode import encoded_size
from daemon.line import wire
from daemon.line.wire import FramePart, decode_header
from daemon.types import Header, PartKey, RawFrame

# OpenCV's arrays by dtype and channels; colours are in its order, blue first.
_FORMATS = {"uint8 1": "Mono8", "uint8 3": "BGR8", "uint16 1": "Mono16"}
_PART_ID: TypeAdapter[str] = TypeAdapter(wire.Name)


class Numbering:
    """Epochs and numbers of one endpoint's frames: a new epoch with each run of the daemon and each connection."""

    def __init__(self, camera: str) -> None:
        self._camera = camera
        self._run = uuid4().hex[:12]
        self._peer: bytes | None = None
        self._connections = 0
        self._seq = 0

    def number(self, peer: bytes) -> PartKey:
        """The key of the next frame, which came by this connection."""
        if peer != self._peer:
            self._peer, self._connections, self._seq = peer, self._connections + 1, -1
        self._seq += 1
        return PartKey(self._camera, f"{self._run}-{self._connections}", self._seq)


class HubPart(FramePart):
    """One imageZMQ message, [header][image], as the part with this key. Never raises before `frame()`."""

    __slots__ = ("_fault", "_hub")

    def __init__(self, line: str, key: PartKey, parts: Sequence[memoryview]) -> None:
        # In place of FramePart's own, which takes a header that was found good.
        self.line, self.camera, self.key, self.part_id = line, key.camera, key, None
        self._payloads, self._fetch = parts[1:], None
        self._fault: str | None = None
        self._hub: Header = {}
        try:
            self._hub = decode_header(parts[0] if parts else b"")
        except WireError as error:
            self._fault = str(error)
        try:
            self.part_id = _PART_ID.validate_python(self._hub.get("msg"), strict=True)
        except ValidationError:
            self.part_id = None  # nothing, or a text that no log line could hold

    def frame(self) -> RawFrame:
        if self._fault is not None:
            raise FrameError(self._fault)
        if len(self._payloads) != 1:
            raise FrameError(f"found {len(self._payloads)} message parts behind the header, wanted the image alone")
        self._header = {"capturedNs": time_ns(), **self._image()}
        return super().frame()

    def _image(self) -> Header:
        """What our own header would say of the image. Raises FrameError."""
        if "dtype" not in self._hub and "shape" not in self._hub:
            size = encoded_size(self._payloads[0])
            if size is None:
                raise FrameError("the header has neither dtype nor shape, and what follows is no readable JPEG")
            return {"encoding": "jpeg", "shape": [*size, 3], "pixelFormat": "BGR8"}
        dtype, shape = self._hub.get("dtype"), self._hub.get("shape")
        channels = shape[2] if isinstance(shape, list) and len(shape) == 3 else 1
        pixel_format = _FORMATS.get(f"{dtype} {channels}")
        if pixel_format is None:
            raise FrameError(
                f"found dtype {str(dtype)[:40]} with {str(channels)[:40]} channel(s), wanted uint8 with 1 or 3 (blue, "
                "green, red) or uint16 with 1"
            )
        return {"encoding": "raw", "shape": shape, "pixelFormat": pixel_format}


def split_envelope(parts: list[memoryview]) -> tuple[list[bytes], list[memoryview]]:
    """What a REQ socket puts before its message, up to an empty part, and the message. It goes with the answer."""
    for place, part in enumerate(parts):
        if part.nbytes == 0:
            return [bytes(piece) for piece in parts[: place + 1]], parts[place + 1 :]
    return [b""], parts
