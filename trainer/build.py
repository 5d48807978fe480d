"""The steps of build_engines.py, each one a function; the recipe there says in which order.

Every score that the limit rests on comes from the daemon's own Pipeline,
run on a draft: a bundle that is all there except for what the step at hand is about to find.
"""

from __future__ import annotations

import math
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
from daemon.bundle import BANK, NETWORKS, Preprocessing
from daemon.errors import UsageError
from daemon.inspection.backend import open_backend
from daemon.inspection.golden import check_golden, read_golden
from daemon.inspection.pipeline import Pipeline
from daemon.types import FloatArray
from trainer import calibrate, dataset
from trainer.calibrate import GoodScores
from trainer.dataset import Picture, Splits
from trainer.draft import Draft, manifest_fields, open_draft
from trainer.golden import pick_golden, write_golden
from trainer.progress import say, track, warn
from trainer.schedule import Schedule
from trainer.settings import FEW_IMAGES, Settings
from trainer.site import Options, Site

if TYPE_CHECKING:
    from trainer.backbone import Backbone
    from trainer.choose import Choice
    from trainer.evaluate import Evaluation

_LIBRARIES = ("torch", "onnx", "openvino", "numpy", "opencv-python-headless")
_CHOICE_SHARE = 0.4  # of the budget
_TUNING_SHARE, _SHORTEST_TUNING_S = 0.2, 60.0
_MOST_TUNING_STEPS = 300  # REB's
_SHORTEST_TRAINING_S = 15.0
_PREVIEWED = 24  # images
_TIMED = 15  # frames


@dataclass(frozen=True)
class Chosen:
    """The backbone, and what was chosen for it."""

    backbone: Backbone
    choice: Choice
    tuning: str = ""  # whether it was fine-tuned and kept, and why


def read_images(options: Options) -> Splits:
    """Check and split the good images."""
    splits = dataset.split(options.good, options.select, options.calibration, options.threads)
    if splits.few and "ldknn" not in options.branches:
        raise UsageError(f"found {len(splits.train)} good images, wanted {FEW_IMAGES} or more for repair alone")
    say("good images: " + ", ".join(f"{count} {name}" for name, count in splits.counts.items()))
    return splits


def preview(options: Options) -> None:
    """Write the contact sheet of synthetic defects on these parts, and build nothing."""
    from trainer.branch import load_textures
    from trainer.corruption import FILLS, SHAPES, Corruptor, Recipe, estimate_foreground, write_preview
    from trainer.features import read_pixels

    pictures, _ = dataset.scan(options.good, options.threads)
    size = dataset.network_size(pictures, options.size or Settings().long_side)
    plain = Preprocessing(size=size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    images = [read_pixels(picture, plain) for picture in pictures[:_PREVIEWED]]
    textures = load_textures(options.textures)
    recipe = Recipe(tuple(SHAPES), tuple(fill for fill in FILLS if textures or fill != "texture"))
    corruptor = Corruptor(images, recipe, textures=textures, foreground=estimate_foreground(images))
    write_preview(options.preview or Path("preview.png"), corruptor, np.random.default_rng(options.seed))
    say(f"synthetic defects on {len(images)} images: {options.preview}")


def choose_settings(options: Options, site: Site, splits: Splits) -> Chosen:
    """Load the backbone and choose what the command line leaves open."""
    import torch

    from trainer import choose
    from trainer.backbone import load_backbone

    torch.set_num_threads(options.threads)
    backbone = load_backbone(options.backbone, options.weights)
    wishes = choose.Wishes(
        options.size, options.k, options.alpha, options.coreset, options.budget_ms, "repair" in options.branches
    )
    if options.steps is None and options.budget == 0:
        return Chosen(backbone, choose.Choice(wishes.defaults(), "the defaults: --budget 0 leaves no time to choose"))
    seconds = math.inf if options.steps is not None else _CHOICE_SHARE * 60.0 * options.budget - site.elapsed_s
    choice = choose.choose(backbone, splits, wishes, threads=options.threads, seed=options.seed, seconds=seconds)
    say(f"settings: {choose.in_words(choice.settings)} ({choice.reason})")
    return Chosen(backbone, choice)


def tune_backbone(options: Options, splits: Splits, chosen: Chosen) -> Chosen:
    """Fine-tune the backbone (DefectMaker) where there is time, and keep it only where it helps."""
    schedule = _tuning_schedule(options)
    if schedule is None or splits.few or "ldknn" not in options.branches:
        return chosen
    from trainer.choose import compare
    from trainer.corruption import estimate_foreground
    from trainer.features import read_pixels
    from trainer.finetune import finetune

    settings = chosen.choice.settings
    size = dataset.network_size(splits.train, settings.long_side)
    plain = Preprocessing(size=size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    images = [read_pixels(picture, plain) for picture in splits.train]
    tuned = finetune(
        chosen.backbone, images, schedule, seed=options.seed, foreground=estimate_foreground(images)
    ).backbone
    found = compare(chosen.backbone, tuned, splits, settings, threads=options.threads, seed=options.seed)
    line = (
        f"fine-tuning {'kept' if found.gained else 'not kept'}: merit {found.before.merit.value:.3f} before, "
        f"{found.after.merit.value:.3f} after, standard error {found.error:.3f}"
    )
    say(line)
    return Chosen(tuned if found.gained else chosen.backbone, chosen.choice, line)


def _tuning_schedule(options: Options) -> Schedule | None:
    if options.finetune == "off":
        return None
    if options.steps is not None:
        return Schedule(steps=min(options.steps, _MOST_TUNING_STEPS)) if options.steps else None
    seconds = _TUNING_SHARE * 60.0 * options.budget
    return Schedule(seconds=seconds) if seconds >= _SHORTEST_TUNING_S else None


def make_network(site: Site, splits: Splits, chosen: Chosen) -> Draft:
    """Export the feature network at the chosen input."""
    from trainer.export import EngineNetwork, export_network

    settings, backbone = chosen.choice.settings, chosen.backbone
    size = dataset.network_size(splits.train, settings.long_side)
    grid = export_network(EngineNetwork(backbone, settings.view), size, site.folder / NETWORKS)
    say(f"network: {backbone.name}, input {size[1]} x {size[0]}, {grid[0] * grid[1]} patches")
    preprocessing = Preprocessing(
        size=size, mean=backbone.mean, std=backbone.std, tiles=settings.view.tiles, exposure=settings.view.exposure
    )
    return Draft(preprocessing, grid, settings)


def make_bank(options: Options, site: Site, splits: Splits, draft: Draft) -> Draft:
    """Collect the training images' features, thin them, measure their densities."""
    if "ldknn" not in options.branches:
        return draft
    if splits.few:
        from trainer.few import FewImages

        made = FewImages(options, site, splits.train, draft).bank()
        (site.folder / BANK).write_bytes(save(made.tensors))
        return replace(draft, bank_rows=len(made.core), branches=("ldknn",))
    from trainer import bank
    from trainer.features import FeatureNetwork, read_pixels

    network = FeatureNetwork((site.folder / NETWORKS).read_bytes(), draft.preprocessing, options.threads)
    features = np.empty((len(splits.train), network.patches, network.channels), np.float32)
    for row, picture in enumerate(track(splits.train, "features of the training images")):
        features[row] = network.run(read_pixels(picture, draft.preprocessing))
    full = features.reshape(-1, network.channels)
    settings = draft.settings
    made = bank.make_bank(
        full, rows=settings.coreset, neighbours=settings.k, threads=options.threads, seed=options.seed
    )
    (site.folder / BANK).write_bytes(save(made.tensors))
    say(f"memory bank: {len(made.core)} of {len(full)} patches, {made.core.shape[1]} channels")
    return replace(draft, bank_rows=len(made.core), branches=("ldknn",))


def train_repair(options: Options, site: Site, splits: Splits, chosen: Chosen, draft: Draft) -> Draft:
    """Train the repair branch and export it together with the features, whose output stays as it was."""
    if "repair" not in options.branches:
        return draft
    if splits.few:
        say(f"repair: left out with fewer than {FEW_IMAGES} good images")
        return draft
    schedule = _repair_schedule(options, site)
    if schedule is None:
        if "ldknn" not in options.branches:
            raise UsageError(
                "found --branches repair and no time left to train it, wanted a longer --budget or --steps"
            )
        warn("no time to train the repair branch: the engine has ldknn alone (a longer --budget, or --steps)")
        return draft
    from trainer.branch import train_repairs
    from trainer.export import EngineNetwork, export_network

    repairs = train_repairs(options, site, splits, draft, schedule, backbone=chosen.backbone)
    export_network(
        EngineNetwork(chosen.backbone, draft.settings.view, repairs), draft.preprocessing.size, site.folder / NETWORKS
    )
    return replace(draft, branches=(*draft.branches, "repair"))


def _repair_schedule(options: Options, site: Site) -> Schedule | None:
    if options.steps is not None:
        return Schedule(steps=options.steps) if options.steps else None
    seconds = 60.0 * options.budget - site.elapsed_s
    return Schedule(seconds=seconds) if seconds >= _SHORTEST_TRAINING_S else None


def find_scale(options: Options, site: Site, splits: Splits, draft: Draft) -> Draft:
    """Standardise each branch on the select split's patch scores."""
    backend = open_draft(options, site, draft).backend
    scores: dict[str, list[FloatArray]] = {branch: [] for branch in draft.branches}
    for picture in track(splits.select, "patch scores of the select images"):
        outputs = backend.infer(backend.preprocess(dataset.read_frame(picture.path)))
        for branch, output in zip(("repair", "ldknn"), outputs, strict=True):
            if output is not None:
                scores[branch].append(output.values.copy())
    backend.close()
    found = {branch: calibrate.standardise(np.stack(values)) for branch, values in scores.items()}
    return replace(draft, standardisation=found)


def weigh_branches(options: Options, site: Site, splits: Splits, chosen: Chosen, draft: Draft) -> Draft:
    """Choose the repair branch's weight beside ldknn's on synthetic defects; with weight 0 it costs nothing either."""
    if len(draft.branches) < 2:
        return draft
    from trainer.branch import choose_weight
    from trainer.export import EngineNetwork, export_network

    weight, line = choose_weight(open_draft(options, site, draft), splits.select, draft, options.seed)
    say(line)
    if weight > 0.0:
        return replace(draft, weights={"ldknn": 1.0, "repair": weight}, weighing=line)
    export_network(
        EngineNetwork(chosen.backbone, draft.settings.view), draft.preprocessing.size, site.folder / NETWORKS
    )
    kept = {"ldknn": draft.standardisation["ldknn"]}
    return replace(draft, branches=("ldknn",), standardisation=kept, weighing=f"{line}: the branch is left out")


def score_good(options: Options, site: Site, splits: Splits, draft: Draft, pipeline: Pipeline) -> GoodScores:
    """Scores as the daemon will give them, of all images that the bank has not seen."""
    if splits.few:
        from trainer.few import leave_one_out

        scores = leave_one_out(options, site, splits.train, draft)
        own = _score(pipeline, splits.train, "the engine's own score of the image") if len(scores) == 1 else scores
        return GoodScores(own, scores)
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
    if product.n == 1:
        # One score is limit and median at once, and their distance is what golden frames are measured by.
        product = product.model_copy(update={"medianGood": min(product.medianGood, float(scores.select[0]))})
    say(f"limit: {product.limit:.4g} (median good part {product.medianGood:.4g}), from {product.n} scores")
    return replace(draft, product=product)


def find_doubts(splits: Splits, draft: Draft, scores: GoodScores) -> list[str]:
    """Warn of everything that makes the limit doubtful; the report repeats it."""
    doubts = calibrate.find_doubts(draft.product, scores)
    if splits.few:
        doubts.append(
            f"{len(splits.train)} good images are too few to divide (wanted {FEW_IMAGES} or more): each was scored by "
            "an engine made without it, so the limit is rough; build again when there are more"
        )
    if splits.few and splits.leaked:
        doubts.append(f"{splits.leaked} of the images are copies of others: the limit is too low")
    elif splits.leaked:
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
    # A golden score is this engine's own; scores with one image left out are other engines'.
    seen = _score(pipeline, splits.calibrate, "scores of the images") if splits.few else scores.calibrate
    golden = pick_golden(pipeline, splits.calibrate, seen, draft.product)
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
    options: Options, site: Site, splits: Splits, chosen: Chosen, draft: Draft, *,
    scores: GoodScores, doubts: list[str], pipeline: Pipeline, evaluation: Evaluation | None,
) -> None:  # fmt: skip
    """Write report.html into the bundle."""
    from trainer.report import Contents
    from trainer.report import write_report as write

    seconds = monotonic() - site.started
    reasons = tuple(line for line in (chosen.tuning, draft.weighing) if line)
    contents = Contents(
        pipeline, options.name, splits, scores, draft.bank_rows, seconds, doubts, evaluation, chosen.choice, reasons
    )  # fmt: skip
    write(site.folder / "report.html", contents)


def _say_time(pipeline: Pipeline, options: Options) -> None:
    """What a frame takes on this machine, which the choice by nominal cost does not know."""
    first = pipeline.bundle.manifest.golden.frames[0].file
    frame = read_golden(pipeline.bundle.read(first), first)
    spent_ms = []
    for _ in range(_TIMED):
        started = perf_counter()
        pipeline.anomaly_map(frame)
        spent_ms.append(1000.0 * (perf_counter() - started))
    found = median(spent_ms)
    say(f"a frame takes {found:.1f} ms here, --budget-ms is {options.budget_ms:g}")
    if found > options.budget_ms:
        warn(
            f"a frame takes {found:.1f} ms on this machine, more than the {options.budget_ms:g} wanted: settings are "
            "chosen by their cost on the reference machine; where the line's is like this one, lower --budget-ms"
        )


def seal(options: Options, site: Site, draft: Draft, training: dict[str, Any], evaluation: Evaluation | None) -> None:
    """Sign the bundle, then open it as the daemon will and replay the golden frames."""
    fields = manifest_fields(options, site, draft)
    fields |= {"metrics": evaluation.figures if evaluation else {}, "training": training}
    bundle.seal_bundle(site.folder, fields, site.key)
    sealed = bundle.open_bundle(site.folder, site.trusted)
    pipeline = Pipeline(sealed, open_backend(sealed, "cpu", "f32", options.threads))
    deviation = check_golden(pipeline)
    _say_time(pipeline, options)
    pipeline.backend.close()
    say(f"golden frames: {len(draft.golden)} reproduced, at most {deviation:.1%} of what is allowed")
