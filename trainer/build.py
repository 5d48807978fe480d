"""The steps of build_engines.py, each one a function; the recipe there says in which order.

Every score that the limit rests on comes from the daemon's own Pipeline,
run on a draft: a bundle that is all there except for what the step at hand is about to find.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version as library_version
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save

from daemon import __version__, bundle
from daemon.bundle import BANK, CALIBRATION, NETWORKS, GoldenFrame, Manifest, Preprocessing, Product, Standardisation
from daemon.inspection.backend import open_backend
from daemon.inspection.golden import check_golden
from daemon.inspection.pipeline import Pipeline
from daemon.types import FloatArray
from trainer import calibrate, dataset
from trainer.calibrate import GoodScores
from trainer.dataset import Picture, Splits
from trainer.golden import TOLERANCE, pick_golden, write_golden
from trainer.progress import say, track, warn
from trainer.site import Options, Site

if TYPE_CHECKING:
    from trainer.evaluate import Evaluation

_LIBRARIES = ("torch", "onnx", "openvino", "numpy", "opencv-python-headless")
_BRANCH = "ldknn"
_NOT_STANDARDISED = Standardisation(centre=0.0, scale=1.0)
_NO_LIMIT = Product(
    limit=1e30, mapLimit=1e30, targetFalseReject=0.5, supportedFalseReject=0.5, n=1, bound95=1.0, medianGood=0.0
)


@dataclass(frozen=True)
class Draft:
    """What is known of the engine so far; the defaults stand in for what is not."""

    preprocessing: Preprocessing
    grid: tuple[int, int]
    standardisation: Standardisation = _NOT_STANDARDISED
    product: Product = _NO_LIMIT
    golden: tuple[GoldenFrame, ...] = ()
    bank_rows: int = 0


def read_images(options: Options) -> Splits:
    """Check and split the good images."""
    splits = dataset.split(options.good, options.select, options.calibration, options.threads)
    say("good images: " + ", ".join(f"{count} {name}" for name, count in splits.counts.items()))
    return splits


def make_network(options: Options, site: Site, splits: Splits) -> Draft:
    """Choose the input size and export the backbone."""
    import torch

    from trainer.backbone import load_backbone
    from trainer.export import export_network

    torch.set_num_threads(options.threads)
    backbone = load_backbone(options.backbone, options.weights)
    size = dataset.network_size(splits.train, options.size)
    grid = export_network(backbone, size, site.folder / NETWORKS)
    say(f"network: {backbone.name}, input {size[1]} x {size[0]}, {grid[0] * grid[1]} patches")
    return Draft(Preprocessing(size=size, mean=backbone.mean, std=backbone.std), grid)


def make_bank(options: Options, site: Site, splits: Splits, draft: Draft) -> Draft:
    """Collect the training images' features, thin them, measure their densities."""
    from trainer import bank

    networks = (site.folder / NETWORKS).read_bytes()
    features = bank.extract_features(networks, splits.train, draft.preprocessing, options.threads)
    made = bank.make_bank(
        features, rows=options.coreset, neighbours=options.k, threads=options.threads, seed=options.seed
    )
    (site.folder / BANK).write_bytes(save(made.tensors))
    say(f"memory bank: {len(made.core)} of {len(features)} patches, {made.core.shape[1]} channels")
    return replace(draft, bank_rows=len(made.core))


def find_scale(options: Options, site: Site, splits: Splits, draft: Draft) -> Draft:
    """Standardise on the select split's patch scores."""
    backend = open_draft(options, site, draft).backend
    scores = []
    for picture in track(splits.select, "patch scores of the select images"):
        _, patches = backend.infer(backend.preprocess(dataset.read_frame(picture.path)))
        if patches is not None:
            scores.append(patches.values)
    backend.close()
    return replace(draft, standardisation=calibrate.standardise(np.stack(scores)))


def score_good(pipeline: Pipeline, splits: Splits) -> GoodScores:
    """Scores as the daemon will give them, of all images that the bank has not seen."""
    return GoodScores(
        _score(pipeline, splits.select, "scores of the select images"),
        _score(pipeline, splits.calibrate, "scores of the calibration images"),
    )


def _score(pipeline: Pipeline, pictures: Sequence[Picture], what: str) -> FloatArray:
    scores = [pipeline.anomaly_map(dataset.read_frame(picture.path)).score for picture in track(pictures, what)]
    return np.array(scores, np.float32)


def set_limit(options: Options, draft: Draft, scores: GoodScores) -> Draft:
    """The conformal limit from the calibration scores alone."""
    product = calibrate.conformal_limit(scores.calibrate, options.false_reject)
    say(f"limit: {product.limit:.4g} (median good part {product.medianGood:.4g}), from {product.n} scores")
    return replace(draft, product=product)


def find_doubts(splits: Splits, draft: Draft, scores: GoodScores) -> list[str]:
    """Warn of everything that makes the limit doubtful; the report repeats it."""
    doubts = calibrate.find_doubts(draft.product, scores)
    if splits.leaked:
        doubts.append(f"{splits.leaked} calibration images are copies of training images: the limit is too low")
    if splits.skipped:
        doubts.append(f"{len(splits.skipped)} corrupt files were skipped: {', '.join(splits.skipped)}")
    for doubt in doubts:
        warn(doubt)
    return doubts


def add_golden(
    options: Options, site: Site, splits: Splits, draft: Draft, *, scores: GoodScores, pipeline: Pipeline
) -> Draft:
    """Keep a few frames with their scores, for every machine to reproduce."""
    golden = pick_golden(pipeline, splits.calibrate, scores.calibrate, draft.product)
    return replace(draft, golden=tuple(write_golden(site.folder, options.name, golden)))


def judge_test(options: Options, pipeline: Pipeline) -> Evaluation | None:
    """Judge the labelled test folder, where one is given."""
    if options.test is None:
        return None
    from trainer.evaluate import evaluate_images

    return evaluate_images(pipeline, options.test, options.name)


def describe_training(options: Options, site: Site, splits: Splits) -> dict[str, Any]:
    """What the engine was made of and with: enough to make it again."""
    given = {key: value.name if isinstance(value, Path) else value for key, value in asdict(options).items()}
    return {
        "dataDigest": splits.digest,
        "images": splits.counts,
        "skipped": list(splits.skipped),
        "options": given,
        "seed": options.seed,
        "versions": {"inspectd": __version__, **{name: library_version(name) for name in _LIBRARIES}},
        "buildSeconds": round(monotonic() - site.started, 1),
    }


def write_report(
    options: Options, site: Site, splits: Splits, draft: Draft, *,
    scores: GoodScores, doubts: list[str], pipeline: Pipeline, evaluation: Evaluation | None,
) -> None:  # fmt: skip
    """Write report.html into the bundle."""
    from trainer.report import Contents
    from trainer.report import write_report as write

    seconds = monotonic() - site.started
    contents = Contents(pipeline, options.name, splits, scores, draft.bank_rows, seconds, doubts, evaluation)
    write(site.folder / "report.html", contents)


def seal(options: Options, site: Site, draft: Draft, training: dict[str, Any], evaluation: Evaluation | None) -> None:
    """Sign the bundle, then open it as the daemon will and replay the golden frames."""
    fields = _manifest_fields(options, site, draft)
    fields |= {"metrics": evaluation.figures if evaluation else {}, "training": training}
    bundle.seal_bundle(site.folder, fields, site.key)
    sealed = bundle.open_bundle(site.folder, site.trusted)
    pipeline = Pipeline(sealed, open_backend(sealed, "cpu", "f32", options.threads))
    deviation = check_golden(pipeline)
    pipeline.backend.close()
    say(f"golden frames: {len(draft.golden)} reproduced, at most {deviation:.1%} of what is allowed")


def open_draft(options: Options, site: Site, draft: Draft) -> Pipeline:
    """The daemon's pipeline on the draft; its backend is the caller's to close."""
    unsigned = _draft_bundle(options, site, draft, np.zeros(1, np.float32))
    return Pipeline(unsigned, open_backend(unsigned, "cpu", "f32", options.threads))


def with_limit(options: Options, site: Site, draft: Draft, scores: GoodScores, pipeline: Pipeline) -> Pipeline:
    """The same pipeline, with the limit known; stores the calibration scores."""
    return Pipeline(_draft_bundle(options, site, draft, np.sort(scores.calibrate)), pipeline.backend)


def _draft_bundle(options: Options, site: Site, draft: Draft, scores: FloatArray) -> bundle.Bundle:
    """An unsigned bundle over the files that are there, with `scores` (n,) as the calibration."""
    (site.folder / CALIBRATION).write_bytes(save({options.name: scores}))
    names = (NETWORKS, BANK, CALIBRATION)
    files = {name: hashlib.sha256((site.folder / name).read_bytes()).hexdigest() for name in names}
    fields = _manifest_fields(options, site, draft) | {"metrics": {}, "training": {}, "files": files}
    if not draft.golden:  # the schema wants one, but nobody replays a draft's: any file will do
        stand_in = GoldenFrame(file=NETWORKS, product=options.name, score=0.0, outcome="PASS")
        fields["golden"] = {"frames": [stand_in.model_dump()], "tolerance": {}}
    return bundle.Bundle(site.folder, Manifest.model_validate(fields), digest="")


def _manifest_fields(options: Options, site: Site, draft: Draft) -> dict[str, Any]:
    """The manifest without metrics, training and files."""
    return {
        "format": bundle.FORMAT,
        "kind": "fused",
        "name": options.name,
        "version": site.version,
        "created": site.created.isoformat(timespec="seconds"),
        "preprocessing": draft.preprocessing.model_dump(),
        "branches": [_BRANCH],
        "grid": draft.grid,
        "k": options.k,
        "alpha": options.alpha,
        "distance": "squared-l2",
        "fusion": {
            "weights": {_BRANCH: 1.0},
            "standardisation": {_BRANCH: draft.standardisation.model_dump()},
            "smoothingSigma": calibrate.smoothing_sigma(draft.preprocessing.size),
        },
        "scoreRule": "max",
        "products": {options.name: draft.product.model_dump()},
        "golden": {"frames": [frame.model_dump() for frame in draft.golden], "tolerance": TOLERANCE},
    }
