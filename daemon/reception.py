"""Frames at the door: read, ask whether this key may speak here, hand over to the dispatcher, answer the camera."""

from __future__ import annotations

import logging

import zmq

from daemon.config import Config, Input
from daemon.dispatch import Dispatcher
from daemon.errors import WireError
from daemon.line.ports import Message, Ports, receive
from daemon.line.wire import decode_frame, encode_answer
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

    def serve(self, source: zmq.Socket[bytes]) -> bool:
        """Take one message; False when none waits."""
        routed = source.type == zmq.ROUTER
        message = receive(source, routed=routed)
        if message is None:
            return False
        answer = self._answer(message, self._ports.inputs[source])
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
        topic = f"frame/{part.line}/{part.camera}"
        curve = endpoint.uses_curve
        if not self._ports.doorman.admits(curve=curve, key=message.key, role="camera", topic=topic):
            camera = part.camera if part.camera in self._config.cameras else "unknown"
            self._metrics.frames_refused.labels(camera, Refusal.FORBIDDEN.value).inc()
            return encode_answer(line, part.key, Refusal.FORBIDDEN.value, 0, f"this key may not speak on {topic}")
        answer = self._dispatcher.on_frame(part, message.key)
        refusal = answer.refusal.value if answer.refusal else None
        # The size of a frame in shared memory is known only when it was read.
        credit = self._dispatcher.credit(part.payload_bytes) if part.payload_bytes else 0
        return encode_answer(line, part.key, refusal, credit, answer.detail)
