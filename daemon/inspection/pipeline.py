"""One frame through decode, preprocess, infer, postprocess, decide. Runs on an engine's own thread.

`inspect` always returns a verdict: what is wrong with the frame is a BAD_FRAME, anything else that
goes wrong is an ENGINE_ERROR, and the next frame finds the pipeline as it was.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from time import monotonic_ns, perf_counter_ns

import cv2
import numpy as np

from daemon.bundle import Bundle
from daemon.errors import FrameError
from daemon.inspection.backend import Backend
from daemon.inspection.decode import decode, to_plain
from daemon.inspection.reference import load_references
from daemon.inspection.tensors import load_calibration
from daemon.inspection.verdict import decide, region_mask
from daemon.types import (
    AnomalyMap,
    ByteArray,
    EngineId,
    FloatArray,
    Frame,
    Limits,
    Outcome,
    RawFrame,
    Reason,
    Verdict,
)

log = logging.getLogger("inspectd.pipeline")


@dataclass(frozen=True)
class Pictures:
    """Which pictures go with a verdict."""

    mask: bool = False
    heatmap: bool = False
    frame_on_reject: bool = False
    frame_every_ms: int = 0  # with whatever verdict, one of each camera in this time; 0: none


class Pipeline:
    """A verified bundle on an opened backend."""

    def __init__(self, bundle: Bundle, backend: Backend, pictures: Pictures = Pictures()) -> None:
        self.backend = backend
        self.bundle = bundle
        self.golden_deviation: float | None = None  # of what is allowed, where the golden frames were replayed
        self._pictures = pictures
        self._next_frame_ns: dict[str, int] = {}
        self._calibration = load_calibration(bundle)
        self.references = load_references(bundle, self._calibration)
        version = bundle.manifest.version
        self._engines = {name: EngineId(name, version, bundle.digest) for name in bundle.manifest.products}

    def inspect(self, raw: RawFrame, product: str) -> Verdict:
        """The verdict on a frame of `product`; never raises."""
        engine = self._engines.get(product)
        try:
            return self._inspect(raw, product)
        except FrameError as error:
            log.warning("bad frame camera=%s seq=%d: %s", raw.camera, raw.seq, error)
            return Verdict(Outcome.REJECT, Reason.BAD_FRAME, engine=engine)
        except Exception:
            log.exception("engine error camera=%s seq=%d product=%s", raw.camera, raw.seq, product)
            return Verdict(Outcome.REJECT, Reason.ENGINE_ERROR, engine=engine)

    def _inspect(self, raw: RawFrame, product: str) -> Verdict:
        started = perf_counter_ns()
        frame = decode(raw)
        decoded = perf_counter_ns()
        anomaly, timings = self.backend.run(frame)
        inspected = perf_counter_ns()
        limits = self.limits(product)
        verdict = decide(anomaly, limits, self._calibration[product], self._engines[product])
        pictures = self._draw(frame, anomaly, limits, verdict, raw)
        gauge = self.references[product].gauge
        quality = gauge.measure(self.backend.network_input()) if gauge else None
        # What follows the backend belongs to the postprocessing; with fused stages it is all there is of it.
        rest_ms = (perf_counter_ns() - inspected) / 1e6 + (timings.postprocess_ms or 0.0)
        timings = replace(timings, decode_ms=(decoded - started) / 1e6, postprocess_ms=rest_ms)
        return replace(verdict, timings=timings, pictures=pictures, quality=quality)

    def anomaly_map(self, frame: Frame) -> AnomalyMap:
        """The map alone: what the trainer calibrates on and `score --maps` writes."""
        return self.backend.run(frame)[0]

    def judge(self, anomaly: AnomalyMap, product: str) -> Verdict:
        """The verdict that `inspect` gives on a frame with this map."""
        return decide(anomaly, self.limits(product), self._calibration[product], self._engines[product])

    def limits(self, product: str) -> Limits:
        return self.bundle.manifest.products[product].limits

    def _draw(
        self, frame: Frame, anomaly: AnomalyMap, limits: Limits, verdict: Verdict, raw: RawFrame
    ) -> dict[str, bytes]:
        pictures = {}
        rejected = verdict.outcome is Outcome.REJECT
        if self._pictures.mask and rejected:
            pictures["mask"] = _encode(".png", to_frame_size(region_mask(anomaly, limits.map), anomaly.frame_hw))
        if self._pictures.heatmap:
            pictures["heatmap"] = _encode(".png", heat(anomaly, limits.map))
        if (self._pictures.frame_on_reject and rejected) or self._is_due(raw.camera):
            pictures["frame"] = bytes(raw.payload) if raw.encoding == "jpeg" else _encode(".jpg", for_display(frame))
        return {name: data for name, data in pictures.items() if data}

    def _is_due(self, camera: str) -> bool:
        """Whether it is time to show a frame of this camera again."""
        every_ns, now_ns = self._pictures.frame_every_ms * 1_000_000, monotonic_ns()
        if every_ns == 0 or now_ns < self._next_frame_ns.get(camera, 0):
            return False
        self._next_frame_ns[camera] = now_ns + every_ns
        return True


def to_frame_size(mask: ByteArray, frame_hw: tuple[int, int]) -> ByteArray:
    """A mask at the frame's size, nearest pixel, so that it keeps its two values."""
    return np.asarray(cv2.resize(mask, frame_hw[::-1], interpolation=cv2.INTER_NEAREST_EXACT), np.uint8)


def map_at_frame_size(anomaly: AnomalyMap) -> FloatArray:
    """The map at the frame's size (H W), bilinear; what pixel metrics are taken on."""
    return np.asarray(cv2.resize(anomaly.values, anomaly.frame_hw[::-1], interpolation=cv2.INTER_LINEAR), np.float32)


def heat(anomaly: AnomalyMap, limit: float) -> ByteArray:
    """The map at the frame's size in 8 bit: the map limit is 128, the map's zero (the median good patch) is 0."""
    scale = 128.0 / limit if limit > 0 else 1.0
    shade: ByteArray = np.clip(map_at_frame_size(anomaly) * scale, 0, 255).astype(np.uint8)
    return shade


def for_display(frame: Frame) -> ByteArray:
    """8-bit gray or BGR, as OpenCV's encoders want it."""
    pixels = to_plain(frame).pixels
    if pixels.dtype == np.uint16:
        pixels = (pixels // 257).astype(np.uint8)
    display: ByteArray = np.ascontiguousarray(pixels[:, :, ::-1], dtype=np.uint8)
    return display


def _encode(extension: str, image: ByteArray) -> bytes:
    """b"" for what the format cannot hold (a JPEG has at most 65,500 pixels a side): a picture is no verdict."""
    try:
        done, data = cv2.imencode(extension, image)
    except cv2.error:
        done = False
    if not done:
        log.warning("no picture: %s cannot hold shape %s", extension, image.shape)
        return b""
    return data.tobytes()
