"""What a product's frames and scores are held against while the line runs: the bundle's calibration, made ready."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from daemon.bundle import Bundle
from daemon.inspection.drift import passing_scores
from daemon.inspection.quality import Gauge
from daemon.inspection.tensors import load_quality


@dataclass(frozen=True)
class Reference:
    """Of one product of the bundle with this digest. `images` and `gauge` only where the bundle has quality figures."""

    digest: str
    bound95: float
    scores: list[float]  # calibration scores that pass, lowest first
    images: Mapping[str, list[float]]  # figures of the calibration images, by name
    gauge: Gauge | None

    @property
    def medians(self) -> dict[str, float]:
        return {name: float(np.median(values)) for name, values in self.images.items()}


def load_references(bundle: Bundle, calibration: Mapping[str, list[float]]) -> dict[str, Reference]:
    """By product. Raises BundleError."""
    quality = load_quality(bundle)
    references = {}
    for name, product in bundle.manifest.products.items():
        scores = passing_scores(calibration[name], product.limit)
        images, gauge = dict[str, list[float]](), None
        if name in quality:
            thumbnail = quality[name].pop("thumbnail")
            images = {figure: values.tolist() for figure, values in quality[name].items()}
            gauge = Gauge(bundle.manifest.preprocessing, thumbnail)
        references[name] = Reference(bundle.digest, product.bound95, scores, images, gauge)
    return references
