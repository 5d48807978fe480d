"""The repair branch of one engine: its training data, its training, and its weight beside the nearest neighbour.

In feature space the corrupted images' features are computed once and kept in float16: a step then costs a small
network at the grid's resolution, not a pass through the backbone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from time import monotonic
from typing import cast

import cv2
import numpy as np
import torch

from daemon.bundle import NETWORKS, Preprocessing
from daemon.errors import DataError
from daemon.inspection.pipeline import Pipeline
from daemon.types import FloatArray, Frame
from trainer.backbone import Backbone
from trainer.corruption import TRAINING, Corruptor, estimate_foreground
from trainer.dataset import Picture, Splits, list_images, read_frame
from trainer.draft import Draft, cpu_backend
from trainer.export import EngineNetwork
from trainer.features import FeatureNetwork, normalised, read_pixels
from trainer.merit import SampledMap, Truth, find_merit, is_better, spoil, standard_error
from trainer.progress import say, track
from trainer.repair import Noise, Recipe, RepairScore, Space, recipe_for, score_with, train
from trainer.samplers import FeatureSampler, ImageSampler, Sampler
from trainer.schedule import Schedule
from trainer.settings import WEIGHTS, View
from trainer.site import Options, Site

_CORRUPTIONS = 6  # of each image
_FEATURE_BYTES = 1_200_000_000
_FEATURE_SHARE = 0.25  # of the time to train
_WEIGHING_DEFECTS = 10  # of each select image
_TEXTURE_SIDE = 512
_LONG_S = 1200.0  # below it, two cores learn nothing of use in image space (docs/accuracy.md)


def load_textures(folder: Path | None) -> list[FloatArray]:
    """The folder's pictures and those of its folders, (H W 3) in 0..255, at most 512 pixels on the long side."""
    if folder is None:
        return []
    if not folder.is_dir():
        list_images(folder)  # says what it is instead
    places = [folder, *sorted(path for path in folder.rglob("*") if path.is_dir())]
    paths: list[Path] = []
    for place in places:
        with suppress(DataError):  # one with folders alone
            paths += list_images(place)
    if not paths:
        raise DataError(f"{folder}: found no pictures in it and its {len(places) - 1} folders, wanted some")
    textures = []
    for path in paths:
        pixels = read_frame(path).pixels
        scale = np.float32(1.0 / 257.0 if pixels.dtype == np.uint16 else 1.0)
        shrink = min(1.0, _TEXTURE_SIDE / max(pixels.shape[:2]))
        size = [max(1, round(shrink * side)) for side in pixels.shape[1::-1]]
        small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        small = small.reshape(*small.shape[:2], -1).astype(np.float32) * scale
        textures.append(np.repeat(small, 3, axis=2) if small.shape[2] == 1 else small)
    return textures


def training_corruptor(options: Options, images: Sequence[FloatArray]) -> Corruptor:
    textures = load_textures(options.textures)
    recipe = TRAINING if textures else replace(TRAINING, fills=tuple(f for f in TRAINING.fills if f != "texture"))
    return Corruptor(images, recipe, textures=textures, foreground=estimate_foreground(images))


def choose_spaces(wanted: str, schedule: Schedule) -> tuple[Space, ...]:
    """Where to repair: what was asked for; else features, and the image too where there is a GPU or a long time."""
    if wanted != "auto":
        return ("features", "image") if wanted == "both" else (cast("Space", wanted),)
    is_long = schedule.seconds is not None and schedule.seconds >= _LONG_S
    return ("features", "image") if is_long or torch.cuda.is_available() else ("features",)


def train_repairs(
    options: Options, site: Site, splits: Splits, draft: Draft, schedule: Schedule, *, backbone: Backbone
) -> tuple[RepairScore, ...]:
    """One repair network for each space; a schedule in seconds is shared out between them."""
    spaces = choose_spaces(options.repair, schedule)
    if schedule.seconds is not None:
        schedule = Schedule(seconds=schedule.seconds / len(spaces))
    found = []
    for space in spaces:
        started = monotonic()
        recipe = recipe_for(space, cast("Noise", options.noise))
        if space == "image":
            images = exposed_images(splits.taught, draft.preprocessing, backbone, draft.settings.view)
            corruptor = training_corruptor(options, images)
            sampler: Sampler = ImageSampler(images, corruptor, seed=options.seed)
        else:
            images = [read_pixels(picture, draft.preprocessing) for picture in splits.taught]
            sampler = _feature_sampler(options, site, draft, images, schedule)
        left = schedule
        if schedule.seconds is not None:
            left = Schedule(seconds=max(1.0, schedule.seconds - (monotonic() - started)))
        name = _fingerprint(options, splits, draft, recipe)
        checkpoint = site.folder.parent / f".repair-{space}-{name}.checkpoint"
        trained = train(sampler, left, recipe, seed=options.seed, checkpoint=checkpoint)
        say(f"repair of the {space}: {trained.steps} steps on {len(images)} images, loss {trained.loss:.4f}")
        found.append(score_with(trained, sampler, draft.grid, space))
    return tuple(found)


def exposed_images(
    pictures: Sequence[Picture], preprocessing: Preprocessing, backbone: Backbone, view: View
) -> list[FloatArray]:
    """The pictures (h w 3) in 0..255 as the network's view exposes them."""
    network = EngineNetwork(backbone, view)
    found = []
    with torch.inference_mode():
        for picture in pictures:
            tensor = torch.from_numpy(normalised(read_pixels(picture, preprocessing), preprocessing).values)
            pixels = network.expose(tensor) * network.std + network.mean
            found.append(np.ascontiguousarray(pixels[0].permute(1, 2, 0).clamp(0.0, 255.0).numpy()))
    return found


def _feature_sampler(
    options: Options, site: Site, draft: Draft, images: Sequence[FloatArray], schedule: Schedule
) -> FeatureSampler:
    network = FeatureNetwork((site.folder / NETWORKS).read_bytes(), draft.preprocessing, options.threads)
    corruptor = training_corruptor(options, images)
    began = monotonic()
    network.run(images[0])
    one_s = monotonic() - began + 0.003  # and the corruption
    count = _corruptions(len(images), network, one_s, schedule)
    return make_sampler(network, images, corruptor, draft.grid, count=count, seed=options.seed)


def _corruptions(images: int, network: FeatureNetwork, one_s: float, schedule: Schedule) -> int:
    """How many of each image: as memory and, where it counts, time allow."""
    in_memory = _FEATURE_BYTES // (2 * images * network.patches * network.channels) - 1
    in_time = _CORRUPTIONS if schedule.seconds is None else int(_FEATURE_SHARE * schedule.seconds / (images * one_s))
    # Few images are corrupted more often: the network should see some hundred defects at least.
    wanted = max(_CORRUPTIONS, -(-300 // images))
    return int(max(1, min(wanted, in_memory, max(in_time, wanted if images < 50 else 1))))


def make_sampler(
    network: FeatureNetwork, images: Sequence[FloatArray], corruptor: Corruptor, grid: tuple[int, int], *, count: int,
    seed: int,
) -> FeatureSampler:  # fmt: skip
    return FeatureSampler(*corrupt_features(network, images, corruptor, grid, count=count, seed=seed), seed=seed)


def corrupt_features(
    network: FeatureNetwork, images: Sequence[FloatArray], corruptor: Corruptor, grid: tuple[int, int], *, count: int,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Features of N images (N C gh gw) and of `count` corruptions of each (N K C gh gw), with masks (N K gh gw)."""
    shape = (network.channels, *grid)
    clean = torch.empty((len(images), *shape), dtype=torch.float16)
    corrupted = torch.empty((len(images), count, *shape), dtype=torch.float16)
    masks = torch.empty((len(images), count, *grid), dtype=torch.float16)
    for index in track(range(len(images)), "features of corrupted images"):
        rng = np.random.default_rng((seed, index))
        clean[index] = _planes(network.run(images[index]), shape)
        for kind in range(count):
            made = corruptor.corrupt(index, rng)
            corrupted[index, kind] = _planes(network.run(made.pixels), shape)
            mask = cv2.resize(made.mask.astype(np.float32), grid[::-1], interpolation=cv2.INTER_AREA)
            masks[index, kind] = torch.from_numpy((mask > 0.0).astype(np.float16))
    return clean, corrupted, masks


def _planes(features: FloatArray, shape: tuple[int, int, int]) -> torch.Tensor:
    return torch.from_numpy(features).T.reshape(shape).half()


def _fingerprint(options: Options, splits: Splits, draft: Draft, recipe: Recipe) -> str:
    """Whether a checkpoint belongs to this very training."""
    facts = (splits.digest, draft.preprocessing.model_dump_json(), asdict(recipe), options.seed, str(options.textures))
    return hashlib.sha256(repr((*facts, options.backbone, options.steps)).encode()).hexdigest()[:16]


def choose_weight(pipeline: Pipeline, pictures: Sequence[Picture], draft: Draft, seed: int) -> tuple[float, str]:
    """The repair branch's weight beside 1 for ldknn, and a line that says why; closes the pipeline's backend.

    0 unless another weight is better on synthetic defects (merit.is_better).
    """
    maps, truth = _branch_maps(pipeline, pictures, draft, seed)
    pipeline.backend.close()
    fused = {weight: maps["ldknn"] + np.float32(weight) * maps["repair"] for weight in WEIGHTS}
    merits = {weight: find_merit(values, truth) for weight, values in fused.items()}
    best = max(merits, key=lambda weight: merits[weight].value)
    error = standard_error((fused[best], truth), (fused[0.0], truth))
    taken = best if is_better(merits[best], merits[0.0], error) else 0.0
    tried = ", ".join(f"{weight:g}: {merit.value:.3f}" for weight, merit in merits.items())
    return taken, f"repair weight {taken:g} (merit by weight {tried}; standard error {error:.3f})"


def _branch_maps(
    pipeline: Pipeline, pictures: Sequence[Picture], draft: Draft, seed: int
) -> tuple[dict[str, FloatArray], Truth]:
    """Standardised sampled maps (images, pixels) of each branch, and the truth."""
    spoilt = spoil(pictures, each=_WEIGHING_DEFECTS, seed=seed)
    backend = cpu_backend(pipeline)
    sampled = SampledMap(draft.preprocessing.size, draft.grid, pipeline.bundle.manifest.fusion.smoothingSigma)
    maps: dict[str, list[FloatArray]] = {"repair": [], "ldknn": []}
    for pixels in spoilt.pictures:
        for branch, output in backend.infer(backend.preprocess(Frame(pixels))).items():
            standard = draft.standardisation[branch]
            scores = (output.values - standard.centre) / standard.scale
            maps[branch].append(sampled.sample(scores.astype(np.float32)))
    return {branch: np.stack(values) for branch, values in maps.items()}, sampled.truth(spoilt)
