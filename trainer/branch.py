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

import cv2
import numpy as np
import torch

from daemon.bundle import NETWORKS
from daemon.errors import DataError
from daemon.inspection.backend.cpu import smoothing_operator
from daemon.inspection.pipeline import Pipeline
from daemon.types import FloatArray
from trainer.choose import auroc, standard_error
from trainer.corruption import CHOICE, TRAINING, Corruptor, estimate_foreground
from trainer.dataset import Picture, Splits, list_images, read_frame
from trainer.draft import Draft
from trainer.features import FeatureNetwork, normalised, read_pixels
from trainer.progress import say, track
from trainer.repair import FeatureSampler, Recipe, RepairScore, train
from trainer.schedule import Schedule
from trainer.settings import WEIGHTS
from trainer.shapes import BoolArray
from trainer.site import Options, Site

_CORRUPTIONS = 6  # of each image
_FEATURE_BYTES = 1_200_000_000
_FEATURE_SHARE = 0.25  # of the time to train
_WEIGHING_DEFECTS = 10  # of each select image
_MAP_STEP = 8
_TEXTURE_SIDE = 512


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


def train_feature_repair(options: Options, site: Site, splits: Splits, draft: Draft, schedule: Schedule) -> RepairScore:
    """Corrupt, extract, train; `schedule` in seconds covers all three."""
    recipe = Recipe(noise=options.noise)
    started = monotonic()
    network = FeatureNetwork((site.folder / NETWORKS).read_bytes(), draft.preprocessing, options.threads)
    images = [read_pixels(picture, draft.preprocessing) for picture in splits.train]
    corruptor = training_corruptor(options, images)
    began = monotonic()
    network.run(images[0])
    one_s = monotonic() - began + 0.003  # and the corruption
    count = _corruptions(len(images), network, one_s, schedule)
    sampler = make_sampler(network, images, corruptor, draft.grid, count=count, seed=options.seed)
    if schedule.seconds is not None:
        schedule = Schedule(seconds=max(1.0, schedule.seconds - (monotonic() - started)))
    checkpoint = site.folder.parent / f".repair-{_fingerprint(options, splits, draft, recipe)}.checkpoint"
    trained = train(sampler, schedule, recipe, seed=options.seed, checkpoint=checkpoint)
    say(f"repair: {trained.steps} steps on {len(images)} images x {count} corruptions, loss {trained.loss:.4f}")
    return RepairScore(trained.net, sampler.mean, sampler.std, draft.grid).eval()


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
    """Features of N images and of `count` corruptions of each, with masks on the grid."""
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
    return FeatureSampler(clean, corrupted, masks, seed=seed)


def _planes(features: FloatArray, shape: tuple[int, int, int]) -> torch.Tensor:
    return torch.from_numpy(features).T.reshape(shape).half()


def _fingerprint(options: Options, splits: Splits, draft: Draft, recipe: Recipe) -> str:
    """Whether a checkpoint belongs to this very training."""
    facts = (splits.digest, draft.preprocessing.model_dump_json(), asdict(recipe), options.seed, str(options.textures))
    return hashlib.sha256(repr((*facts, options.backbone, options.steps)).encode()).hexdigest()[:16]


def choose_weight(pipeline: Pipeline, pictures: Sequence[Picture], draft: Draft, seed: int) -> tuple[float, str]:
    """The repair branch's weight beside 1 for ldknn, and a line that says why; closes the pipeline's backend.

    Merit is the mean of image and pixel AUROC on synthetic defects; a weight above 0 must be better than 0 by more
    than the standard error of the difference, else the branch is not heard.
    """
    maps, truth, source = _branch_maps(pipeline, pictures, draft, seed)
    pipeline.backend.close()
    defective = truth.any(1)
    merits = {}
    for weight in WEIGHTS:
        fused = maps["ldknn"] + np.float32(weight) * maps["repair"]
        merits[weight] = 0.5 * (auroc(fused.max(1), defective) + auroc(fused.ravel(), truth.ravel()))
    best = max(merits, key=lambda weight: merits[weight])
    plain, fused = maps["ldknn"], maps["ldknn"] + np.float32(best) * maps["repair"]
    error = standard_error(fused.max(1), plain.max(1), defective, source)
    gain = merits[best] - merits[0.0]
    taken = best if gain > error else 0.0
    tried = ", ".join(f"{weight:g}: {merit:.3f}" for weight, merit in merits.items())
    return taken, f"repair weight {taken:g} (merit by weight {tried}; standard error {error:.3f})"


def _branch_maps(
    pipeline: Pipeline, pictures: Sequence[Picture], draft: Draft, seed: int
) -> tuple[dict[str, FloatArray], BoolArray, np.ndarray]:
    """Standardised smoothed maps (images, pixels) of each branch, the truth, and each image's source."""
    size = draft.preprocessing.size
    good = [read_pixels(picture, draft.preprocessing) for picture in pictures]
    corruptor = Corruptor(good, CHOICE, foreground=estimate_foreground(good))
    sigma = pipeline.bundle.manifest.fusion.smoothingSigma
    rows = smoothing_operator(size[0], draft.grid[0], sigma)[_MAP_STEP // 2 :: _MAP_STEP]
    columns = smoothing_operator(size[1], draft.grid[1], sigma)[_MAP_STEP // 2 :: _MAP_STEP].T
    maps: dict[str, list[FloatArray]] = {"repair": [], "ldknn": []}
    truth, source = [], []
    for index, image in enumerate(good):
        rng = np.random.default_rng((seed, index))
        made = [corruptor.corrupt(index, rng) for _ in range(_WEIGHING_DEFECTS)]
        views = [(image, np.zeros(size, bool)), *((item.pixels, item.mask) for item in made)]
        for pixels, mask in views:
            outputs = pipeline.backend.infer(normalised(pixels, draft.preprocessing))
            for branch, output in zip(("repair", "ldknn"), outputs, strict=True):
                standard = draft.standardisation[branch]
                scores = (output.values.reshape(draft.grid) - standard.centre) / standard.scale  # type: ignore[union-attr]
                maps[branch].append((rows @ scores.astype(np.float32) @ columns).ravel())
            shape = (columns.shape[1], len(rows))
            truth.append(cv2.resize(mask.astype(np.float32), shape, interpolation=cv2.INTER_AREA).ravel() > 0.25)
            source.append(index)
    return {branch: np.stack(values) for branch, values in maps.items()}, np.stack(truth), np.array(source)
