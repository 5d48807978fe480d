"""The first steps of build_engines.py, each one a function, up to an engine that can score; finish.py has the others.

Every score that the limit rests on comes from the daemon's own Pipeline,
run on a draft: a bundle that is all there except for what the step at hand is about to find.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import save

from daemon.bundle import BANK, NETWORKS, Preprocessing
from daemon.errors import UsageError
from daemon.types import FloatArray
from trainer import calibrate, dataset
from trainer.corruption import estimate_foreground
from trainer.dataset import Splits
from trainer.draft import Draft, cpu_backend, open_draft
from trainer.progress import say, track, warn
from trainer.schedule import Schedule
from trainer.settings import FEW_IMAGES, Settings
from trainer.site import Options, Order, Site

if TYPE_CHECKING:
    from trainer.backbone import Backbone
    from trainer.choose import Choice

_CHOICE_SHARE = 0.4  # of the budget
_TUNING_SHARE, _SHORTEST_TUNING_S = 0.35, 30.0
_MOST_TUNING_STEPS = 300  # REB's
_SHORTEST_TRAINING_S = 15.0
_PREVIEWED = 24  # images


@dataclass(frozen=True)
class Chosen:
    """The backbone, and what was chosen for it."""

    backbone: Backbone
    choice: Choice
    tuning: str = ""  # whether it was fine-tuned and kept, and why


def read_images(options: Options) -> Splits:
    """Check and split the good images."""
    splits = dataset.split(options.good, options.select, options.calibration, options.threads)
    if options.add:
        splits = dataset.add(splits, options.add, options.name, options.threads)
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
    """Fine-tune the backbone on synthetic defects where there is time, and keep it only where it helps."""
    schedule = _tuning_schedule(options)
    if schedule is None or splits.few or "ldknn" not in options.branches:
        return chosen
    from trainer.branch import exposed_images, training_corruptor
    from trainer.choose import compare
    from trainer.finetune import finetune
    from trainer.segment import finetune_by_outline

    settings, backbone = chosen.choice.settings, chosen.backbone
    size = dataset.network_size(splits.train, settings.long_side)
    preprocessing = Preprocessing(size=size, mean=backbone.mean, std=backbone.std)
    images = exposed_images(splits.taught, preprocessing, backbone, settings.view)
    if options.finetune == "classes":
        tuned = finetune(backbone, images, schedule, seed=options.seed, foreground=estimate_foreground(images))
    else:
        tuned = finetune_by_outline(backbone, images, training_corruptor(options, images), schedule, seed=options.seed)
    found = compare(backbone, tuned.backbone, splits, settings, threads=options.threads, seed=options.seed)
    line = (
        f"fine-tuning {'kept' if found.gained else 'not kept'}: merit {found.before.merit.value:.3f} before, "
        f"{found.after.merit.value:.3f} after, standard error {found.error:.3f}"
    )
    say(line)
    return Chosen(tuned.backbone if found.gained else backbone, chosen.choice, line)


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

        made = FewImages(options, site, splits.train, draft, splits.added).bank()
        (site.folder / BANK).write_bytes(save(made.tensors))
        return replace(draft, bank_rows=len(made.core), branches=("ldknn",))
    from trainer import bank
    from trainer.features import FeatureNetwork, read_pixels

    network = FeatureNetwork((site.folder / NETWORKS).read_bytes(), draft.preprocessing, options.threads)
    features = np.empty((len(splits.taught), network.patches, network.channels), np.float32)
    for row, picture in enumerate(track(splits.taught, "features of the training images")):
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


def find_scale(options: Order, site: Site, splits: Splits, draft: Draft) -> Draft:
    """Standardise each branch on the select split's patch scores."""
    backend = cpu_backend(open_draft(options, site, draft))
    scores: dict[str, list[FloatArray]] = {branch: [] for branch in draft.branches}
    for picture in track(splits.select, "patch scores of the select images"):
        for branch, output in backend.infer(backend.preprocess(dataset.read_frame(picture.path))).items():
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
