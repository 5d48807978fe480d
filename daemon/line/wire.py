"""Wire protocol version 1: bytes <-> types. No socket, no clock, no image. docs/wire.md tells it.

A message is [topic][header: JSON][payload 0..n]. Decoding never allocates by what a header claims:
sizes are compared before anything is made. Unknown header keys are ignored, so that a newer sender
can speak with an older daemon.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from daemon.errors import FrameError, WireError
from daemon.types import Header, Outcome, PartKey, RawFrame, Reason, Verdict

VERSION = 1
MAX_HEADER_BYTES = 64 * 1024
MAX_TOPIC_BYTES = 256
MAX_PIXELS = 1 << 27  # 134 megapixels: above every camera built, below what would fill the memory
MAX_SEQ = 2**53 - 1  # exact in every JSON reader, and sums of ranges stay within 64 bits
MAX_NS = 2**63 - 1

_BYTES_PER_PIXEL = {"Mono8": 1, "Mono16": 2, "RGB8": 3, "BGR8": 3, "BayerRG8": 1}
PIXEL_FORMATS = tuple(_BYTES_PER_PIXEL)
ENCODINGS = ("raw", "jpeg", "png")


# Printable in one line of a log, and encodable: no control characters, no lone surrogates.
Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]+$")]
Seq = Annotated[int, Field(ge=0, le=MAX_SEQ)]


class _Part(BaseModel):
    """The keys without which no part is known: a header that fails here is refused."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    v: Annotated[int, Field(ge=VERSION, le=VERSION)]
    epoch: Name
    seq: Seq
    partId: Name | None = None


class _Image(BaseModel):
    """The keys that describe the payload: a header that fails here is a BAD_FRAME of a known part."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    capturedNs: Annotated[int, Field(ge=0, le=MAX_NS)]
    encoding: Literal["raw", "jpeg", "png"]
    shape: Annotated[list[Annotated[int, Field(ge=1, le=MAX_PIXELS)]], Field(min_length=2, max_length=3)]
    pixelFormat: Literal["Mono8", "Mono16", "RGB8", "BGR8", "BayerRG8"]
    product: Name | None = None
    isSimulated: bool = False


class Fetch(Protocol):
    """Gives the payload that lies in a slot of shared memory. Raises FrameError."""

    def __call__(self, line: str, camera: str, *, epoch: str, seq: int, slot: object) -> memoryview: ...


class FramePart:
    """What is known of a frame message after its first reading: the part, and how to read the rest.

    `line`, `camera` and `key` are sure. `frame()` reads what describes the image and raises FrameError where
    that is wrong, so that a known part always ends in a verdict.
    """

    __slots__ = ("_fetch", "_header", "_payloads", "camera", "key", "line", "part_id")

    def __init__(
        self, source: tuple[str, str], part: _Part, header: Header, payloads: Sequence[memoryview], fetch: Fetch | None
    ) -> None:
        self.line, camera = source
        self.camera = camera
        self.key = PartKey(camera, part.epoch, part.seq)
        self.part_id = part.partId
        self._header = header
        self._payloads = payloads
        self._fetch = fetch

    @property
    def payload_bytes(self) -> int:
        return sum(payload.nbytes for payload in self._payloads)

    def frame(self) -> RawFrame:
        """The frame, its payload's size held against its shape. Raises FrameError."""
        try:
            image = _Image.model_validate(self._header)
        except ValidationError as error:
            raise FrameError(_first_fault(error)) from error
        if self._fetch is not None:
            key = self.key
            payload = self._fetch(self.line, self.camera, epoch=key.epoch, seq=key.seq, slot=self._header.get("slot"))
            self._payloads = [*self._payloads, payload]
        if len(self._payloads) != 1:
            raise FrameError(f"found {len(self._payloads)} payload parts, wanted 1")
        shape = tuple(image.shape)
        _check_size(image, shape, self._payloads[0].nbytes)
        return RawFrame(
            camera=self.camera,
            epoch=self.key.epoch,
            seq=self.key.seq,
            part_id=self.part_id,
            captured_ns=image.capturedNs,
            encoding=image.encoding,
            shape=shape,
            pixel_format=image.pixelFormat,
            product=image.product,
            payload=self._payloads[0],
            is_simulated=image.isSimulated,
        )


def _check_size(image: _Image, shape: tuple[int, ...], payload_bytes: int) -> None:
    channels = 3 if image.pixelFormat in ("RGB8", "BGR8") else 1
    if (shape[2] if len(shape) == 3 else 1) != channels:
        raise FrameError(f"shape {list(shape)} has not the {channels} channel(s) of {image.pixelFormat}")
    pixels = shape[0] * shape[1]
    if pixels > MAX_PIXELS:
        raise FrameError(f"shape {list(shape)} has {pixels} pixels, at most {MAX_PIXELS} are taken")
    if payload_bytes == 0:
        raise FrameError("the payload is empty")
    wanted = pixels * _BYTES_PER_PIXEL[image.pixelFormat]
    if image.encoding == "raw" and payload_bytes != wanted:
        raise FrameError(
            f"the payload has {payload_bytes} bytes, shape {list(shape)} in {image.pixelFormat} has {wanted}"
        )


def decode_frame(parts: Sequence[memoryview], fetch: Fetch | None = None) -> FramePart:
    """Read [topic][header][payload...] up to the point where the part is known. Raises WireError.

    With `fetch` the payload is not in the message: it is fetched from the slot that the header names.
    """
    if len(parts) < 2:
        raise WireError(f"found {len(parts)} message part(s), wanted topic, header and payload")
    source = split_topic(parts[0], "frame")
    header = decode_header(parts[1])
    try:
        part = _Part.model_validate(header)
    except ValidationError as error:
        raise WireError(_first_fault(error)) from error
    return FramePart(source, part, header, parts[2:], fetch)


def split_topic(topic: memoryview | bytes, kind: str) -> tuple[str, str]:
    """Line and camera of the topic `<kind>/<line>/<camera>`. Raises WireError."""
    if len(topic) > MAX_TOPIC_BYTES:
        raise WireError(f"the topic has {len(topic)} bytes, at most {MAX_TOPIC_BYTES} are taken")
    try:
        fields = bytes(topic).decode("utf-8").split("/")
    except UnicodeDecodeError as error:
        raise WireError("the topic is not UTF-8") from error
    if len(fields) != 3 or fields[0] != kind or not fields[1] or not fields[2]:
        raise WireError(f"found topic {bytes(topic)[:80]!r}, wanted {kind}/<line>/<camera>")
    return fields[1], fields[2]


def decode_header(data: memoryview | bytes) -> Header:
    """A JSON object in UTF-8 of at most 64 KiB. Raises WireError."""
    if len(data) > MAX_HEADER_BYTES:
        raise WireError(f"the header has {len(data)} bytes, at most {MAX_HEADER_BYTES} are taken")
    try:
        header = json.loads(bytes(data).decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the header is not JSON in UTF-8: {error}") from error
    if not isinstance(header, dict):
        raise WireError(f"the header is a JSON {type(header).__name__}, wanted an object")
    return header


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def encode_header(header: Header) -> bytes:
    """Compact JSON. A value that JSON cannot hold (NaN, infinity) is a fault of ours and raises ValueError."""
    return json.dumps(header, separators=(",", ":"), allow_nan=False).encode("utf-8")


def encode_frame(line: str, frame: RawFrame) -> list[bytes | memoryview]:
    """The sender's side of `decode_frame`; used by cameras, simulators and tests."""
    header: Header = {
        "v": VERSION,
        "epoch": frame.epoch,
        "seq": frame.seq,
        "partId": frame.part_id,
        "capturedNs": frame.captured_ns,
        "encoding": frame.encoding,
        "shape": list(frame.shape),
        "pixelFormat": frame.pixel_format,
    }
    if frame.product is not None:
        header["product"] = frame.product
    if frame.is_simulated:
        header["isSimulated"] = True
    return [f"frame/{line}/{frame.camera}".encode(), encode_header(header), frame.payload]


def encode_answer(
    line: str, key: PartKey | None, refusal: str | None, credit: int, detail: str | None = None
) -> list[bytes]:
    """The answer to one frame; `credit` is how many more frames of this size fit the byte budget now."""
    header: Header = {
        "v": VERSION,
        "epoch": key.epoch if key else None,
        "seq": key.seq if key else None,
        "status": "refused" if refusal else "accepted",
        "reason": refusal,
        "credit": credit,
    }
    if detail:
        header["detail"] = detail
    return [f"answer/{line}/{key.camera if key else '-'}".encode(), encode_header(header)]


def verdict_fields(verdict: Verdict) -> Header:
    """The header keys of a verdict that results, late scores and the recorder share."""
    engine = verdict.engine
    timings = {_camel(name): _rounded(value) for name, value in asdict(verdict.timings).items()}
    return {
        "outcome": verdict.outcome.value,
        "reason": verdict.reason.value if verdict.reason else None,
        "score": _finite(verdict.score),
        "limit": verdict.limit,
        "pValue": verdict.p_value,
        "regions": [asdict(region) for region in verdict.regions],
        "engine": {"product": engine.product, "version": engine.version, "digest": engine.digest} if engine else None,
        "timings": timings,
    }


def encode_result(topic: str, header: Header, verdict: Verdict) -> list[bytes]:
    """A message on `result/...` or `late/...`; `header` carries what the book knows of the part."""
    pictures = verdict.pictures or {}
    full = {"v": VERSION, **header, **verdict_fields(verdict), "payloads": list(pictures)}
    return [topic.encode(), encode_header(full), *pictures.values()]


def missing_verdict() -> Verdict:
    """What a part gets that never arrived."""
    return Verdict(Outcome.REJECT, Reason.MISSING)


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(word.capitalize() for word in rest)


def _rounded(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else round(milliseconds, 3)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _first_fault(error: ValidationError) -> str:
    fault = error.errors(include_url=False, include_input=False)[0]
    path = ".".join(str(step) for step in fault["loc"])
    return f"header key {path}: {fault['msg']}" if path else fault["msg"]
