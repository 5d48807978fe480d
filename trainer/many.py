"""The steps of build_engines.py --kind crr that an engine for one product has not: one network for many products.

What the products share is trained here, on as many images of each; limits, golden frames and reports are each
product's own, by the same steps as those of an engine that knows one (finish.py).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save
from torch import nn

from daemon.bundle import NETWORKS, Preprocessing, open_bundle
from daemon.errors import BundleError, DataError, UsageError
from daemon.types import FloatArray, Frame
from trainer import calibrate, crr, dataset
from trainer.backbone import Backbone, load_backbone
from trainer.branch import corrupt_features, training_corruptor
from trainer.crr import CrrMap, CrrRecipe, Decoder, Segmenter
from trainer.dataset import Picture, Splits
from trainer.draft import Draft
from trainer.export import CrrNetwork, EngineNetwork, export_map
from trainer.features import FeatureNetwork, network_pixels, read_pixels
from trainer.merit import Merit, SampledMap, Truth, find_merit, is_better, spoil, standard_error
from trainer.progress import say, track
from trainer.samplers import FeatureSampler
from trainer.schedule import Schedule
from trainer.settings import FEW_IMAGES, Settings
from trainer.site import Options, Site

WEIGHTS_FILE = "crr.safetensors"  # what a further product is learnt from
SEGMENTATION_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7)
SCORE_RULE = "top1pct"
_FEATURE_BYTES = 1_200_000_000
_CORRUPTIONS = 5  # of each image
_WEIGHING_DEFECTS = 5  # of each select image
_MOST_WEIGHED = 20  # select images of a product
_DECODER_SHARE = 0.7  # of the time that is left after the features
_RESERVED = 0.15  # of the budget: limits, golden frames, reports
_SHORTEST_S = 15.0
_FURTHER = 0.4  # of the usual steps, where products join an engine


@dataclass(frozen=True)
class Beginning:
    """What an engine brings along to which products are added: its input's size (h w), and its networks' tensors."""

    size: tuple[int, int]
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Encoder:
    """The frozen network, the grid of its features, and how many channels each of its maps has."""

    network: FeatureNetwork
    preprocessing: Preprocessing
    grid: tuple[int, int]
    groups: tuple[int, ...]


def open_encoder(backbone: Backbone, size: tuple[int, int], threads: int) -> Encoder:
    preprocessing = Preprocessing(size=size, mean=backbone.mean, std=backbone.std)
    with torch.inference_mode():
        groups = tuple(found.shape[1] for found in backbone.network(torch.zeros(1, 3, 64, 64)))
    network = FeatureNetwork(EngineNetwork(backbone), preprocessing, threads)
    return Encoder(network, preprocessing, (size[0] // 8, size[1] // 8), groups)


def together(splits: Sequence[Splits]) -> Splits:
    """All products' images as if they were one's: for what the engine shares."""
    return Splits(
        train=tuple(picture for each in splits for picture in each.train),
        select=tuple(picture for each in splits for picture in each.select),
        calibrate=tuple(picture for each in splits for picture in each.calibrate),
        skipped=(),
    )


def train(
    engine: Options, site: Site, products: Sequence[Options], splits: Sequence[Splits], bundle: Path | None
) -> Draft:  # fmt: skip
    """Train decoder and segmentation on all products, choose their weights, and export the network."""
    _check_counts(products, splits)
    torch.set_num_threads(engine.threads)
    backbone = load_backbone(engine.backbone, engine.weights)
    beginning = _open_beginning(bundle, site, products, engine) if bundle is not None else None
    size = beginning.size if beginning else dataset.network_size(together(splits).train, engine.size or 256)
    encoder = open_encoder(backbone, size, engine.threads)
    sampler = _sampler(encoder, products, splits, beginning)
    made = _train_both(engine, site, sampler, encoder, beginning)
    _keep(site, made)
    weight, line = 0.0, "the segmentation was left out"
    if made.segmenter is not None:
        weight, line = choose_weight(made, encoder, [own.select for own in splits], engine.seed)
    say(line)
    made = CrrMap(made.decoder, made.segmenter, (sampler.mean, sampler.std), encoder.groups, weight=weight)
    export_map(CrrNetwork(backbone, made), size, site.folder / NETWORKS)
    parameters = sum(p.numel() for p in made.parameters())
    say(f"network: {backbone.name} and {parameters / 1e6:.2f} M parameters, input {size[1]} x {size[0]}")
    settings = Settings(max(size), k=1, alpha=0.0)  # the last two are ldknn's: there is none
    return Draft(
        encoder.preprocessing, encoder.grid, settings, branches=("map",), kind="crr", score_rule=SCORE_RULE,
        weighing=line,
    )  # fmt: skip


def _check_counts(products: Sequence[Options], splits: Sequence[Splits]) -> None:
    few = [f"{o.name} ({len(s.train)})" for o, s in zip(products, splits, strict=True) if s.few]
    if few:
        raise DataError(
            f"found fewer than {FEW_IMAGES} good images of {', '.join(few)}, wanted {FEW_IMAGES} or more of each; with "
            "fewer, build an engine of kind fused for that product"
        )


def _open_beginning(folder: Path, site: Site, products: Sequence[Options], engine: Options) -> Beginning:
    """The engine that products join. Its own products' images are wanted too: a network that learns scores anew."""
    found = open_bundle(folder, site.trusted)
    manifest = found.manifest
    if manifest.kind != "crr":
        raise UsageError(f"{folder}: found an engine of kind {manifest.kind}, wanted one of kind crr (--add-product)")
    given = {options.name for options in products}
    missing = sorted(set(manifest.products) - given)
    if missing:
        raise UsageError(
            f"found no --good for {', '.join(missing)}, wanted them too: what is learnt now changes every product's "
            "scores, so the limits of all are set again from their own good images"
        )
    if not given - set(manifest.products):
        raise UsageError(f"found no product that {folder} does not know, wanted one more --good PRODUCT=DIR")
    try:
        tensors = load(found.read(WEIGHTS_FILE))
    except Exception as error:  # safetensors raises its own type, which it does not export
        raise BundleError(f"{folder / WEIGHTS_FILE}: is not a safetensors file: {error}") from error
    if engine.size is not None and engine.size != max(manifest.preprocessing.size):
        raise UsageError(f"found --size {engine.size}, wanted that of the engine: {max(manifest.preprocessing.size)}")
    return Beginning(manifest.preprocessing.size, tensors)


def _sampler(
    encoder: Encoder, products: Sequence[Options], splits: Sequence[Splits], beginning: Beginning | None
) -> FeatureSampler:  # fmt: skip
    """Images and corruptions of every product, as many as memory holds; each product is drawn as often as another."""
    network = encoder.network
    one_bytes = 2 * network.patches * network.channels
    most = max(8, _FEATURE_BYTES // (one_bytes * (_CORRUPTIONS + 1) * len(products)))
    parts, chances = [], []
    for options, own in zip(products, splits, strict=True):
        count = min(most, len(own.train))
        rows = np.linspace(0, len(own.train) - 1, count).astype(int)
        images = [read_pixels(own.train[row], encoder.preprocessing) for row in rows]
        corruptor = training_corruptor(options, images)
        say(f"{options.name}: {count} images, {_CORRUPTIONS} corruptions of each")
        parts.append(corrupt_features(network, images, corruptor, encoder.grid, count=_CORRUPTIONS, seed=options.seed))
        chances += [1.0 / count] * count
    clean, corrupted, masks = (torch.cat(kind) for kind in zip(*parts, strict=True))
    scale = (beginning.tensors["mean"].flatten(), beginning.tensors["std"].flatten()) if beginning else None
    return FeatureSampler(
        clean, corrupted, masks, seed=products[0].seed, scale=scale, chances=torch.tensor(chances)
    )  # fmt: skip


def _train_both(
    engine: Options, site: Site, sampler: FeatureSampler, encoder: Encoder, beginning: Beginning | None
) -> CrrMap:  # fmt: skip
    recipe, groups = recipe_without(engine.without), encoder.groups
    torch.manual_seed(engine.seed)
    decoder, segmenter = Decoder(sampler.channels, encoder.grid, recipe), Segmenter(sampler.channels)
    if beginning is not None:
        _load(decoder, beginning.tensors, "decoder.")
        _load(segmenter, beginning.tensors, "segmenter.")
    first, second = _schedules(engine, site, is_further=beginning is not None)
    one = crr.train_decoder(decoder, sampler, groups, first, recipe=recipe, seed=engine.seed)
    say(f"decoder: {one.steps} steps, loss {one.loss:.4f}")
    if "segmentation" in engine.without:
        return CrrMap(decoder, None, (sampler.mean, sampler.std), groups, weight=0.0)
    two = crr.train_segmenter(segmenter, decoder, sampler, groups, second, recipe=recipe, seed=engine.seed)
    say(f"segmentation: {two.steps} steps, loss {two.loss:.4f}")
    return CrrMap(decoder, segmenter, (sampler.mean, sampler.std), groups, weight=0.5)


def recipe_without(parts: Collection[str]) -> CrrRecipe:
    """CRR's, less what the ablation leaves out."""
    whole = CrrRecipe()
    return replace(whole, repairs="repair" not in parts, masked=0.0 if "masking" in parts else whole.masked)


def _schedules(engine: Options, site: Site, *, is_further: bool) -> tuple[Schedule, Schedule]:
    """Of the decoder and of the segmentation."""
    share = _FURTHER if is_further else 1.0
    if engine.steps is not None:
        steps = max(1, round(share * engine.steps))
        return Schedule(steps=steps), Schedule(steps=max(1, steps // 2))
    seconds = share * ((1.0 - _RESERVED) * 60.0 * engine.budget - site.elapsed_s)
    if seconds < _SHORTEST_S:
        raise UsageError(
            f"found --budget {engine.budget:g} with {site.elapsed_s:.0f} s of it gone for the features, wanted "
            f"{_SHORTEST_S:.0f} s or more to train: give more minutes, 5 for each product are a good start"
        )
    return Schedule(seconds=_DECODER_SHARE * seconds), Schedule(seconds=(1.0 - _DECODER_SHARE) * seconds)


def _load(net: nn.Module, tensors: dict[str, torch.Tensor], prefix: str) -> None:
    state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise BundleError(f"{WEIGHTS_FILE}: does not fit this version's networks: {error}; build all anew") from error


def _keep(site: Site, made: CrrMap) -> None:
    """The weights as they were trained: ONNX holds them rearranged."""
    tensors = {key: value.contiguous() for key, value in made.state_dict().items()}
    (site.folder / WEIGHTS_FILE).write_bytes(save(tensors))


def choose_weight(
    made: CrrMap, encoder: Encoder, products: Sequence[Sequence[Picture]], seed: int
) -> tuple[float, str]:  # fmt: skip
    """The segmentation's share of the map, and a line that says why; `products` are the select images of each.

    The merit on synthetic defects decides, in the mean over products; 0 unless another is better by a standard error.
    """
    found = [_part_maps(made, encoder, pictures, seed) for pictures in products]
    merits = {}
    for weight in SEGMENTATION_WEIGHTS:
        each = [find_merit(_mixed(maps, weight), truth, SCORE_RULE) for maps, truth in found]
        merits[weight] = Merit(*(float(np.mean(kind)) for kind in zip(*map(astuple, each), strict=True)))
    best = max(merits, key=lambda weight: merits[weight].value)
    errors = [
        standard_error((_mixed(maps, best), truth), (_mixed(maps, 0.0), truth), SCORE_RULE) for maps, truth in found
    ]
    error = float(np.linalg.norm(errors)) / len(errors)
    taken = best if is_better(merits[best], merits[0.0], error) else 0.0
    tried = ", ".join(f"{weight:g}: {merit.value:.3f}" for weight, merit in merits.items())
    return taken, f"segmentation weight {taken:g} (merit by weight {tried}; standard error {error:.3f})"


def _mixed(maps: tuple[FloatArray, FloatArray], weight: float) -> FloatArray:
    mixed: FloatArray = (1.0 - weight) * maps[0] + weight * maps[1]
    return mixed


def _part_maps(
    made: CrrMap, encoder: Encoder, pictures: Sequence[Picture], seed: int
) -> tuple[tuple[FloatArray, FloatArray], Truth]:  # fmt: skip
    """Sampled maps (images, pixels) of distance and of probability, of good images and synthetic defects; the truth."""
    size = encoder.preprocessing.size
    sampled = SampledMap(size, encoder.grid, calibrate.smoothing_sigma(size))
    rows = np.linspace(0, len(pictures) - 1, min(_MOST_WEIGHED, len(pictures))).astype(int)
    spoilt = spoil([pictures[row] for row in rows], each=_WEIGHING_DEFECTS, seed=seed)
    shape = (1, encoder.network.channels, *encoder.grid)
    maps: tuple[list[FloatArray], list[FloatArray]] = ([], [])
    with torch.inference_mode():
        for pixels in track(spoilt.pictures, "maps of synthetic defects"):
            features = encoder.network.run(network_pixels(Frame(pixels), encoder.preprocessing))
            distance, chance = made.parts(torch.from_numpy(features.T.reshape(shape)))
            assert chance is not None
            for kept, part in zip(maps, (distance, chance), strict=True):
                kept.append(sampled.sample(part.numpy().ravel()))
    return (np.stack(maps[0]), np.stack(maps[1])), sampled.truth(spoilt)
