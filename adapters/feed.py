"""A camera's way to the daemon: frames numbered and sent over the native protocol, answers heard, credit kept.

Nothing waits in a queue for a daemon that is away: a frame that cannot leave now is lost, and its number is left out,
so that the daemon tells a missing part. A replay asks `has_room` first, and waits.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import cv2
import numpy as np
import zmq

from adapters.sources import Captured
from daemon.errors import ConfigError, UsageError
from daemon.keys import PeerFile
from daemon.line.sockets import connect, handshake
from daemon.line.wire import decode_header, encode_frame
from daemon.types import Header, PixelArray, RawFrame

log = logging.getLogger("inspectd.camera")

_MOST_UNANSWERED = 16
_FIRST_UNANSWERED = 2  # before the daemon has told its credit
_ANSWER_NS = 2_000_000_000  # an answer that takes longer was lost with its connection
_EXPLAIN_AFTER_NS = 3_000_000_000
_EXPLAIN_AGAIN_NS = 60_000_000_000
_SUFFIXES = {"jpeg": ".jpg", "png": ".png"}


@dataclass(frozen=True)
class Encoding:
    """How pixels travel; `gray` makes one channel of three (a monochrome camera behind a colour interface)."""

    kind: str = "raw"
    quality: int = 95
    gray: bool = False

    def encode(self, captured: Captured) -> tuple[memoryview, tuple[int, ...], str]:
        """Payload, shape and pixel format. Raises UsageError where the encoding cannot hold such pixels."""
        pixels, pixel_format = captured.pixels, captured.pixel_format
        if self.gray and pixels.ndim == 3:
            code = cv2.COLOR_BGR2GRAY if pixel_format == "BGR8" else cv2.COLOR_RGB2GRAY
            pixels, pixel_format = np.asarray(cv2.cvtColor(pixels, code)), "Mono8"
        if self.kind == "raw":
            return _flat(pixels), pixels.shape, pixel_format
        if self.kind == "jpeg" and pixel_format in ("Mono16", "BayerRG8"):
            raise UsageError(f"found {pixel_format} pixels, which a JPEG would spoil; --encoding png or raw")
        if pixel_format == "RGB8":
            pixels, pixel_format = np.ascontiguousarray(pixels[:, :, ::-1]), "BGR8"
        options = [cv2.IMWRITE_JPEG_QUALITY, self.quality] if self.kind == "jpeg" else [cv2.IMWRITE_PNG_COMPRESSION, 1]
        done, data = cv2.imencode(_SUFFIXES[self.kind], pixels, options)
        if not done:
            raise UsageError(f"OpenCV cannot encode pixels of shape {pixels.shape} as {self.kind}; --encoding raw")
        return memoryview(data.tobytes()), pixels.shape, pixel_format


def _flat(pixels: PixelArray) -> memoryview:
    return memoryview(np.ascontiguousarray(pixels).reshape(-1).view(np.uint8))


class Feed:
    """One camera's stream, from `epoch` on. `counts` are of frames: sent, accepted, refused, unanswered, lost."""

    def __init__(
        self, address: str, keys: PeerFile | None, names: tuple[str, str], encoding: Encoding, product: str | None
    ) -> None:
        self.line, self.camera = names
        self.epoch, self.seq = uuid4().hex[:12], 0
        self.counts: Counter[str] = Counter()
        self._address, self._keys, self._encoding, self._product = address, keys, encoding, product
        self._context: zmq.Context[Any] = zmq.Context()
        # Immediate: there is a queue only while there is a connection, and it ends with it.
        self.socket = connect(self._context, zmq.DEALER, address, keys, immediate=True)
        self._unanswered: dict[int, int] = {}  # by seq: when it was sent
        self._credit = _FIRST_UNANSWERED
        self._is_connected = False
        self._explain_ns = time.monotonic_ns() + _EXPLAIN_AFTER_NS

    @property
    def is_connected(self) -> bool:
        return self._is_connected

    def has_room(self) -> bool:
        """Whether a frame could leave now, and the daemon has room for it."""
        self._look()
        return self._is_connected and len(self._unanswered) < min(max(1, self._credit), _MOST_UNANSWERED)

    def send(self, captured: Captured, *, is_simulated: bool, part_id: str | None = None) -> bool:
        """Give the picture the next number and send it; False where it could not leave and is lost."""
        if not self.has_room():
            return self.skip()
        payload, shape, pixel_format = self._encoding.encode(captured)
        frame = RawFrame(
            camera=self.camera,
            epoch=self.epoch,
            seq=self.seq,
            part_id=part_id or captured.part_id,
            captured_ns=captured.captured_ns,
            encoding=self._encoding.kind,
            shape=shape,
            pixel_format=pixel_format,
            product=self._product,
            payload=payload,
            is_simulated=is_simulated,
        )
        try:
            self.socket.send_multipart(encode_frame(self.line, frame), zmq.NOBLOCK, copy=True)
        except zmq.Again:
            return self.skip()
        self._unanswered[self.seq] = time.monotonic_ns()
        self.counts["sent"] += 1
        self.seq += 1
        return True

    def skip(self) -> bool:
        """A part whose picture cannot be sent: its number is left out, and the daemon tells it MISSING. Gives False."""
        self.counts["lost"] += 1
        self.seq += 1
        return False

    def hear(self) -> None:
        """Take the answers that are there. Raises ConfigError where another sender has taken this camera's place."""
        while True:
            try:
                answer = decode_header(self.socket.recv_multipart(zmq.NOBLOCK)[-1])
            except zmq.Again:
                break
            self._take(answer)
        self._look()

    @property
    def waits(self) -> bool:
        """Whether answers are to come."""
        return bool(self._unanswered)

    def _take(self, answer: Header) -> None:
        seq = answer.get("seq")
        if seq is None and self._unanswered:  # a header that the daemon cannot read; answers come in order
            seq = next(iter(self._unanswered))
        if self._unanswered.pop(seq, None) is None:
            return
        if isinstance(answer.get("credit"), int):
            self._credit = answer["credit"]
        if answer.get("status") == "accepted":
            self.counts["accepted"] += 1
            return
        self.counts["refused"] += 1
        reason, detail = answer.get("reason"), answer.get("detail") or ""
        if reason == "DUPLICATE":
            problem = f"another sender speaks as {self.line}/{self.camera} ({detail})"
            raise ConfigError(self._address, [f"{problem}; only one may: end the other, or give this one another name"])
        log.warning("refused camera=%s seq=%s reason=%s %s", self.camera, seq, reason, detail)

    def _look(self) -> None:
        """Notice that the daemon came or went, and say why it does not come."""
        now_ns = time.monotonic_ns()
        for seq in [seq for seq, sent_ns in self._unanswered.items() if now_ns - sent_ns > _ANSWER_NS]:
            del self._unanswered[seq]
            self.counts["unanswered"] += 1
        is_connected = bool(self.socket.poll(0, zmq.POLLOUT))
        if is_connected != self._is_connected:
            self._is_connected, self._credit = is_connected, _FIRST_UNANSWERED
            self._explain_ns = now_ns + _EXPLAIN_AFTER_NS
            if is_connected:
                log.info("daemon connected at %s", self._address)
            else:
                log.warning("daemon lost at %s", self._address)
        elif not is_connected and now_ns >= self._explain_ns:
            self._explain_ns = now_ns + _EXPLAIN_AGAIN_NS
            log.warning("no daemon at %s: %s", self._address, self._why_not())

    def _why_not(self) -> str:
        event = handshake(self._address, zmq.DEALER, self._keys) if self._address.startswith("tcp://") else None
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            return "it does not know this key; is it in the daemon's peers.yaml, and was the daemon restarted since?"
        if event in (zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.EVENT_DISCONNECTED):
            peer = "its key is not serverKey of the key file" if self._keys else "it wants a key: --peer FILE"
            return f"it ends the handshake; {peer}"
        return "nobody answers there; is inspectd running, and is this the bind of its input of kind router?"

    def summary(self) -> str:
        """Counts as one JSON object."""
        names = ("sent", "accepted", "refused", "unanswered", "lost")
        return json.dumps({"camera": self.camera, "epoch": self.epoch, **{name: self.counts[name] for name in names}})

    def close(self) -> None:
        self.socket.close(linger=200)
        self._context.term()
