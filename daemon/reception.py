"""Frames at the door: read, ask whether this key may speak here, hand over to the dispatcher, answer the camera."""

from __future__ import annotations

import logging

import zmq

from daemon.config import Config
from daemon.dispatch import Answer, Dispatcher
from daemon.endpoints import Input
from daemon.errors import WireError
from daemon.hub import HubPart, Numbering, split_envelope
from daemon.line.greeter import OK
from daemon.line.ports import Message, Ports, receive
from daemon.line.wire import FramePart, decode_frame, encode_answer
from daemon.record.metrics import Metrics
from daemon.types import Refusal

log = logging.getLogger("inspectd.reception")


class Reception:
    """Serves the input sockets, in the loop."""

    def __init__(self, config: Config, ports: Ports, dispatcher: Dispatcher, metrics: Metrics) -> None:
        self._config = config
        self._ports = ports
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._numbers = {entry.camera: Numbering(entry.camera) for entry in config.inputs if entry.camera is not None}

    def serve(self, source: zmq.Socket[bytes]) -> bool:
        """Take one message; False when none waits."""
        routed = source.type == zmq.ROUTER
        message = receive(source, routed=routed)
        if message is None:
            return False
        endpoint = self._ports.inputs[source]
        if endpoint.camera is not None:
            self._serve_hub(source, message, endpoint, endpoint.camera)
            return True
        answer = self._answer(message, endpoint)
        if routed:
            source.send_multipart([message.identity, *answer], zmq.NOBLOCK)
        return True

    def _answer(self, message: Message, endpoint: Input) -> list[bytes]:
        line = self._config.line
        try:
            part = decode_frame(message.parts, self._ports.rings.read if endpoint.kind == "shm" else None)
        except WireError as error:
            log.warning("bad header: %s", error)
            self._metrics.frames_refused.labels("unknown", Refusal.BAD_HEADER.value).inc()
            return encode_answer(line, None, Refusal.BAD_HEADER.value, 0, str(error))
        answer = self._admit(part, message.key, endpoint)
        refusal = answer.refusal.value if answer.refusal else None
        # The size of a frame in shared memory is known only when it was read.
        credit = self._dispatcher.credit(part.payload_bytes) if part.payload_bytes else 0
        forbidden = answer.refusal is Refusal.FORBIDDEN
        return encode_answer(line, part.key, refusal, 0 if forbidden else credit, answer.detail)

    def _admit(self, part: FramePart, key: str, endpoint: Input) -> Answer:
        topic = f"frame/{part.line}/{part.camera}"
        if self._ports.doorman.admits(curve=endpoint.uses_curve, key=key, role="camera", topic=topic):
            return self._dispatcher.on_frame(part, key)
        camera = part.camera if part.camera in self._config.cameras else "unknown"
        self._metrics.frames_refused.labels(camera, Refusal.FORBIDDEN.value).inc()
        return Answer(Refusal.FORBIDDEN, f"this key may not speak on {topic}")

    def _serve_hub(self, source: zmq.Socket[bytes], message: Message, endpoint: Input, camera: str) -> None:
        """An imageZMQ message. A sender that waits for its OK gets it whatever becomes of the frame."""
        envelope, parts = [b""], message.parts
        if not endpoint.connects:
            envelope, parts = split_envelope(message.parts)
            if source in self._ports.greeters:
                self._ports.greeters[source].heard(message.identity)
        try:
            part = HubPart(self._config.line, self._numbers[camera].number(message.identity), parts)
            answer = self._admit(part, message.key, endpoint)
            if answer.refusal is not None:
                log.warning("refused camera=%s reason=%s %s", camera, answer.refusal.value, answer.detail or "")
        finally:
            if not endpoint.connects:
                source.send_multipart([message.identity, *envelope, OK], zmq.NOBLOCK)
