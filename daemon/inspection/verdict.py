"""Map + limits -> verdict. Pure: no clock, no engine, no picture.

With the score rule `max` the part's limit and the map's are one, so a DEFECT always has a region.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

import cv2
import numpy as np

from daemon.types import AnomalyMap, ByteArray, EngineId, Limits, Outcome, Reason, Region, Verdict

MAX_REGIONS = 64  # the largest are told; a map that lights up everywhere must not make a huge message


def decide(anomaly: AnomalyMap, limits: Limits, calibration: Sequence[float], engine: EngineId) -> Verdict:
    """A score at or above the limit is a DEFECT; one that is not a number is an ENGINE_ERROR."""
    if not math.isfinite(anomaly.score):
        return Verdict(Outcome.REJECT, Reason.ENGINE_ERROR, limit=limits.score, engine=engine)
    rejected = anomaly.score >= limits.score
    return Verdict(
        Outcome.REJECT if rejected else Outcome.PASS,
        Reason.DEFECT if rejected else None,
        score=anomaly.score,
        limit=limits.score,
        p_value=p_value(anomaly.score, calibration),
        regions=find_regions(anomaly, limits.map) if rejected else (),
        engine=engine,
    )


def p_value(score: float, calibration: Sequence[float]) -> float:
    """(1 + #{calibration >= score}) / (n + 1), the conformal p-value; `calibration` is sorted upwards."""
    at_or_above = len(calibration) - bisect_left(calibration, score)
    return (1 + at_or_above) / (len(calibration) + 1)


def find_regions(anomaly: AnomalyMap, limit: float) -> tuple[Region, ...]:
    """The 8-connected components at or above `limit`, largest first, in frame pixels."""
    above = region_mask(anomaly, limit)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(above, connectivity=8)
    largest = sorted(range(1, count), key=lambda label: -int(stats[label, cv2.CC_STAT_AREA]))[:MAX_REGIONS]
    return tuple(_region(anomaly, labels, stats[label], label) for label in largest)


def region_mask(anomaly: AnomalyMap, limit: float) -> ByteArray:
    """255 where the map is at or above `limit`, else 0; (h w)."""
    return np.where(anomaly.values >= np.float32(limit), np.uint8(255), np.uint8(0))


def _region(anomaly: AnomalyMap, labels: object, stats: object, label: int) -> Region:
    x, y, width, height, area = (int(value) for value in np.asarray(stats))
    inside = np.s_[y : y + height, x : x + width]
    peak = float(anomaly.values[inside][np.asarray(labels)[inside] == label].max())
    (frame_h, frame_w), (map_h, map_w) = anomaly.frame_hw, anomaly.values.shape
    left, top = x * frame_w // map_w, y * frame_h // map_h
    right, bottom = -(-(x + width) * frame_w // map_w), -(-(y + height) * frame_h // map_h)
    frame_area = max(1, round(area * (frame_h * frame_w) / (map_h * map_w)))
    return Region(left, top, right - left, bottom - top, frame_area, peak)
