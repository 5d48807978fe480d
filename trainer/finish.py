"""The last steps of build_engines.py: scores of good images, the limit, golden frames, the report, the seal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version as library_version
from pathlib import Path
from statistics import median
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save

from daemon import __version__, bundle
from daemon.inspection.backend import open_backend
from daemon.inspection.golden import check_golden, read_golden
from daemon.inspection.pipeline import Pipeline
from daemon.types import FloatArray
from trainer import calibrate, dataset, quality
from trainer.build import Chosen
from trainer.calibrate import GoodScores
from trainer.dataset import Picture, Splits
from trainer.draft import Draft, manifest_fields
from trainer.golden import pick_golden, write_golden
from trainer.progress import say, track, warn
from trainer.settings import FEW_IMAGES
from trainer.site import Order, Site

if TYPE_CHECKING:
    from trainer.evaluate import Evaluation

_LIBRARIES = ("torch", "onnx", "openvino", "numpy", "opencv-python-headless")
_TIMED = 15  # frames


def score_good(options: Order, site: Site, splits: Splits, draft: Draft, pipeline: Pipeline) -> GoodScores:
    """Scores as the daemon will give them, of all images that the bank has not seen."""
    if splits.few and splits.train:
        from trainer.few import leave_one_out

        scores = leave_one_out(options, site, splits.train, draft, splits.added)
        own = _score(pipeline, splits.train, "the engine's own score of the image") if len(scores) == 1 else scores
        return GoodScores(own, scores)
    calibrate = _score(pipeline, splits.calibrate, "scores of the calibration images")
    select = calibrate if splits.few else _score(pipeline, splits.select, "scores of the select images")
    return GoodScores(select, calibrate)


def _score(pipeline: Pipeline, pictures: Sequence[Picture], what: str) -> FloatArray:
    scores = [pipeline.anomaly_map(dataset.read_frame(picture.path)).score for picture in track(pictures, what)]
    return np.array(scores, np.float32)


@dataclass(frozen=True)
class Finished:
    """A product of the engine: its limit and golden frames are in the draft, `look` is for quality.safetensors."""

    options: Order
    splits: Splits
    draft: Draft
    scores: GoodScores
    look: dict[str, FloatArray]
    evaluation: Evaluation | None


def measure_images(options: Order, splits: Splits, draft: Draft) -> dict[str, FloatArray]:
    """How the good images look, so that the daemon can tell a changed camera from a bad part."""
    preprocessing = draft.preprocessing
    shown = splits.train or splits.select  # nothing of ours is trained on the images for a model from elsewhere
    trained = (dataset.read_frame(picture.path) for picture in track(shown, "the mean picture"))
    pictures = quality.thumbnails(trained, preprocessing)
    calibrating = (dataset.read_frame(p.path) for p in track(splits.calibrate, "how the calibration images look"))
    means = quality.without_each(pictures) if splits.few else pictures.mean(0)
    found = quality.figures(calibrating, means, preprocessing)
    return quality.tensors(options.name, pictures.mean(0), found)


def set_limit(options: Order, draft: Draft, scores: GoodScores) -> Draft:
    """The conformal limit from the calibration scores alone."""
    product = calibrate.conformal_limit(scores.calibrate, options.false_reject)
    if product.n == 1:
        # One score is limit and median at once, and their distance is what golden frames are measured by.
        product = product.model_copy(update={"medianGood": min(product.medianGood, float(scores.select[0]))})
    say(f"limit: {product.limit:.4g} (median good part {product.medianGood:.4g}), from {product.n} scores")
    return replace(draft, product=product)


def find_doubts(splits: Splits, draft: Draft, scores: GoodScores, *, is_tested: bool = False) -> list[str]:
    """Warn of everything that makes the limit doubtful; the report repeats it."""
    doubts = calibrate.find_doubts(draft.product, scores)
    if splits.few:
        how = (
            "each was scored by an engine made without it" if splits.train else "scale and limit rest on the same ones"
        )
        doubts.append(
            f"{len(splits.calibrate)} good images are too few to divide (wanted {FEW_IMAGES} or more): {how}, so the "
            "limit is rough; build again when there are more"
        )
    if splits.few and splits.leaked:
        doubts.append(f"{splits.leaked} of the images are copies of others: the limit is too low")
    elif splits.leaked:
        doubts.append(f"{splits.leaked} calibration images are copies of training images: the limit is too low")
    if splits.skipped:
        doubts.append(f"{len(splits.skipped)} corrupt files were skipped: {', '.join(splits.skipped)}")
    if splits.added and not is_tested:
        doubts.append(
            f"{len(splits.added)} rejected parts that a person called good were learnt, and nothing shows which "
            "defects that lets pass: give --test the folder of the same `inspectd review export`"
        )
    for doubt in doubts:
        warn(doubt)
    return doubts


def add_golden(
    options: Order, site: Site, splits: Splits, draft: Draft, *, scores: GoodScores, pipeline: Pipeline
) -> Draft:
    """Keep a few frames with their scores, for every machine to reproduce."""
    # A golden score is this engine's own; scores with one image left out are other engines'.
    seen = _score(pipeline, splits.calibrate, "scores of the images") if splits.few else scores.calibrate
    golden = pick_golden(pipeline, splits.calibrate, seen, draft.product)
    return replace(draft, golden=tuple(write_golden(site.folder, options.name, golden)))


def judge_test(options: Order, pipeline: Pipeline) -> Evaluation | None:
    """Judge the labelled test folder, where one is given."""
    if options.test is None:
        return None
    from trainer.evaluate import evaluate_images

    return evaluate_images(pipeline, options.test, options.name)


def describe_training(site: Site, finished: Sequence[Finished], **more: Any) -> dict[str, Any]:
    """What the engine was made of and with: enough to make it again. Of several products, one entry for each."""
    data = [_describe_data(each) for each in finished]
    return {
        **(data[0] if len(data) == 1 else {"products": data}),
        **more,
        "versions": {"inspectd": __version__, **{name: library_version(name) for name in _LIBRARIES}},
        "buildSeconds": round(monotonic() - site.started, 1),
    }


def _describe_data(product: Finished) -> dict[str, Any]:
    splits = product.splits
    return {
        "dataDigest": splits.digest,
        "images": splits.counts,
        "skipped": list(splits.skipped),
        "options": {key: _without_folders(value) for key, value in asdict(product.options).items()},
    }


def _without_folders(value: Any) -> Any:
    """Paths by their names alone: where they lay is nobody else's business."""
    if isinstance(value, tuple):
        return [_without_folders(item) for item in value]
    return value.name if isinstance(value, Path) else value


def write_report(
    options: Order, site: Site, splits: Splits, chosen: Chosen | None, draft: Draft, *,
    scores: GoodScores, doubts: list[str], pipeline: Pipeline, evaluation: Evaluation | None,
) -> None:  # fmt: skip
    """Write report.html into the bundle, of kind crr report-PRODUCT.html. `chosen` is None where nothing was chosen."""
    from trainer.report import Contents
    from trainer.report import write_report as write

    seconds = monotonic() - site.started
    reasons = tuple(line for line in (chosen.tuning if chosen else "", draft.weighing, *draft.notes) if line)
    contents = Contents(
        pipeline, options.name, splits, scores, draft.bank_rows, seconds, doubts, evaluation,
        chosen.choice if chosen else None, reasons,
    )  # fmt: skip
    write(site.folder / (f"report-{options.name}.html" if draft.kind == "crr" else "report.html"), contents)


def _say_time(pipeline: Pipeline, budget_ms: float | None) -> None:
    """What a frame takes on this machine, which the choice by nominal cost does not know."""
    first = pipeline.bundle.manifest.golden.frames[0].file
    frame = read_golden(pipeline.bundle.read(first), first)
    spent_ms = []
    for _ in range(_TIMED):
        started = perf_counter()
        pipeline.anomaly_map(frame)
        spent_ms.append(1000.0 * (perf_counter() - started))
    found = median(spent_ms)
    say(f"a frame takes {found:.1f} ms here" + ("" if budget_ms is None else f", --budget-ms is {budget_ms:g}"))
    if budget_ms is not None and found > budget_ms:
        warn(
            f"a frame takes {found:.1f} ms on this machine, more than the {budget_ms:g} wanted: settings are "
            "chosen by their cost on the reference machine; where the line's is like this one, lower --budget-ms"
        )


def add_targets(options: Order, site: Site, draft: Draft) -> None:
    """What the engine needs on GPUs."""
    if options.targets != ("cpu",):
        from trainer import plans

        scaling = list(zip(draft.preprocessing.mean, draft.preprocessing.std, strict=True))
        darkest = min(-mean / std for mean, std in scaling)
        brightest = max((255.0 - mean) / std for mean, std in scaling)
        plans.add_targets(site.folder, options.targets, (darkest, brightest))


def seal(
    name: str, site: Site, finished: Sequence[Finished], training: dict[str, Any], *, budget_ms: float | None = None
) -> None:
    """Sign the bundle, then open it as the daemon will and replay the golden frames."""
    (site.folder / bundle.CALIBRATION).write_bytes(
        save({each.options.name: np.sort(each.scores.calibrate) for each in finished})
    )
    (site.folder / bundle.QUALITY).write_bytes(
        save({key: part for each in finished for key, part in each.look.items()})
    )
    options = finished[0].options
    every = [manifest_fields(each.options, site, each.draft) for each in finished]
    fields = every[0] | {"name": name, "training": training}
    fields["products"] = {product: judged for each in every for product, judged in each["products"].items()}
    frames = [frame for each in every for frame in each["golden"]["frames"]]
    fields["golden"] = every[0]["golden"] | {"frames": frames}
    figures = {each.options.name: each.evaluation.figures for each in finished if each.evaluation}
    fields["metrics"] = figures if len(finished) > 1 else figures.get(options.name, {})
    bundle.seal_bundle(site.folder, fields, site.key)
    sealed = bundle.open_bundle(site.folder, site.trusted)
    pipeline = Pipeline(sealed, open_backend(sealed, "cpu", "f32", options.threads))
    deviation = check_golden(pipeline)
    _say_time(pipeline, budget_ms)
    pipeline.backend.close()
    say(f"golden frames: {len(frames)} reproduced, at most {deviation:.1%} of what is allowed")
