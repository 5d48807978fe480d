"""An engine on its way: what is known so far, and a bundle over it that the daemon's own pipeline can run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save

from daemon import bundle
from daemon.bundle import BANK, CALIBRATION, NETWORKS, GoldenFrame, Manifest, Preprocessing, Product, Standardisation
from daemon.inspection.backend import open_backend
from daemon.inspection.backend.cpu import CpuBackend
from daemon.inspection.pipeline import Pipeline
from daemon.types import FloatArray
from trainer import calibrate
from trainer.calibrate import GoodScores
from trainer.golden import TOLERANCE
from trainer.settings import Settings
from trainer.site import Order, Site

_NOT_STANDARDISED = Standardisation(centre=0.0, scale=1.0)
_NO_LIMIT = Product(
    limit=1e30, mapLimit=1e30, targetFalseReject=0.5, supportedFalseReject=0.5, n=1, bound95=1.0, medianGood=0.0
)


@dataclass(frozen=True)
class Draft:
    """What is known of the engine so far; the defaults stand in for what is not."""

    preprocessing: Preprocessing
    grid: tuple[int, int]
    settings: Settings
    kind: Literal["fused", "crr", "foreign"] = "fused"
    smoothing: float | None = None  # sigma in pixels of the network's input; None: as calibrate says for its size
    branches: tuple[str, ...] = ()
    standardisation: Mapping[str, Standardisation] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)  # a branch that is not named has the weight 1
    weighing: str = ""
    product: Product = _NO_LIMIT
    golden: tuple[GoldenFrame, ...] = ()
    bank_rows: int = 0
    notes: tuple[str, ...] = ()  # what the report tells of a network that came from elsewhere
    score_rule: Literal["max", "top1pct"] = "max"


def open_draft(options: Order, site: Site, draft: Draft) -> Pipeline:
    """The daemon's pipeline on the draft; its backend is the caller's to close."""
    unsigned = _draft_bundle(options, site, draft, np.zeros(1, np.float32))
    return Pipeline(unsigned, open_backend(unsigned, "cpu", "f32", options.threads))


def cpu_backend(pipeline: Pipeline) -> CpuBackend:
    """A draft's backend, stage by stage."""
    assert isinstance(pipeline.backend, CpuBackend)
    return pipeline.backend


def with_limit(options: Order, site: Site, draft: Draft, scores: GoodScores, pipeline: Pipeline) -> Pipeline:
    """The same pipeline, with the limit known; stores the calibration scores."""
    return Pipeline(_draft_bundle(options, site, draft, np.sort(scores.calibrate)), pipeline.backend)


def _draft_bundle(options: Order, site: Site, draft: Draft, scores: FloatArray) -> bundle.Bundle:
    """An unsigned bundle over the files that are there, with `scores` (n,) as the calibration."""
    (site.folder / CALIBRATION).write_bytes(save({options.name: scores}))
    names = (NETWORKS, CALIBRATION, *([BANK] if "ldknn" in draft.branches else []))
    files = {name: hashlib.sha256((site.folder / name).read_bytes()).hexdigest() for name in names}
    fields = manifest_fields(options, site, draft) | {"metrics": {}, "training": {}, "files": files}
    if not draft.golden:  # the schema wants one, but nobody replays a draft's: any file will do
        stand_in = GoldenFrame(file=NETWORKS, product=options.name, score=0.0, outcome="PASS")
        fields["golden"] = {"frames": [stand_in.model_dump()], "tolerance": {}}
    return bundle.Bundle(site.folder, Manifest.model_validate(fields), digest="")


def manifest_fields(options: Order, site: Site, draft: Draft) -> dict[str, Any]:
    """The manifest without metrics, training and files."""
    return {
        "format": bundle.FORMAT,
        "kind": draft.kind,
        "name": options.name,
        "version": site.version,
        "created": site.created.isoformat(timespec="seconds"),
        "preprocessing": draft.preprocessing.model_dump(),
        "branches": list(draft.branches),
        "grid": draft.grid,
        "k": draft.settings.k,
        "alpha": draft.settings.alpha,
        "distance": "squared-l2",
        "fusion": {
            "weights": {branch: draft.weights.get(branch, 1.0) for branch in draft.branches},
            "standardisation": {
                branch: draft.standardisation.get(branch, _NOT_STANDARDISED).model_dump() for branch in draft.branches
            },
            "smoothingSigma": _smoothing_sigma(draft),
        },
        "scoreRule": draft.score_rule,
        "products": {options.name: draft.product.model_dump()},
        "golden": {"frames": [frame.model_dump() for frame in draft.golden], "tolerance": TOLERANCE},
    }


def _smoothing_sigma(draft: Draft) -> float:
    return calibrate.smoothing_sigma(draft.preprocessing.size) if draft.smoothing is None else draft.smoothing
