"""One network for many products: Collaborative Reconstruction and Repair (CRR, Wang et al. 2025, arXiv 2512.11401).

A frozen encoder's features go through a masked bottleneck to a decoder that must give back the features of the CLEAN
image: its own (reconstruction), and those of its clean twin where the image was corrupted (repair). Where encoder and
decoder differ, the part is not as good parts are. A decoder of many products that only reconstructs learns to copy
whatever it sees (identity mapping); repair is what forbids it. A second, small network learns on synthetic defects to
read the differences channel by channel. What is ours: the encoder is EfficientNet-Lite0, whose two maps (stride 8 and
16) are the two groups of loose matching; the masking is scaled and belongs to the training alone, so that an engine
gives the same score twice; everything is sized for two cores (docs/accuracy.md has the figures).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from time import monotonic

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own custom

from daemon.errors import DataError
from trainer.checkpoint import Progress
from trainer.samplers import Batch, Sampler
from trainer.schedule import Schedule, cosine

_HARD_FROM = 0.9  # the quantile below which positions count as learnt, at the end of its rise
_RISE = 0.2  # of the training, until the quantile is there
_EASY_WEIGHT = 0.1  # of the gradient of what is learnt
_CLIP = 1.0
_WARM_UP = 50  # steps
_FOCUS = 2.0  # gamma of the focal loss
_RARE = -3.0  # the segmentation's first logit: 5 % of the patches
_SMALL = 1e-6

_Loss = Callable[[nn.Module, Batch, float], Tensor]  # of the network, a batch, and the part of the training done


@dataclass(frozen=True)
class CrrRecipe:
    """How the decoder and the segmentation are made and trained; what the ablation leaves out (docs/accuracy.md)."""

    repairs: bool = True
    masked: float = 0.4  # of the bottleneck's input, element by element
    width: int = 128
    blocks: int = 2
    learning_rate: float = 2e-3
    segmenting_rate: float = 1e-3


class _Attention(nn.Module):
    """Linear attention over all positions (elu + 1): (B N width) -> the same; its cost grows with N alone."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self._heads = heads
        self.asked = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, positions, width = x.shape
        parts = self.asked(x).reshape(batch, positions, 3, self._heads, width // self._heads).permute(2, 0, 3, 1, 4)
        query, key, value = F.elu(parts[0]) + 1.0, F.elu(parts[1]) + 1.0, parts[2]
        key = key / positions  # sums over positions stay near one, so that half precision holds them
        summed = key.sum(2, keepdim=True).transpose(2, 3)
        mixed = query @ (key.transpose(2, 3) @ value) / (query @ summed + _SMALL)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, positions, width))
        return out


class _Block(nn.Module):
    """Pre-norm: attention, then two dense layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _Attention(width, heads=width // 32)
        self.dense = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        out: Tensor = x + self.dense(self.between(x))
        return out


class Decoder(nn.Module):
    """Standardised features (B C gh gw) -> what a good part's would be. gh and gw are even.

    The bottleneck is masked and sees 2x2 patches as one; nothing leads round it.
    """

    def __init__(self, channels: int, grid: tuple[int, int], recipe: CrrRecipe) -> None:
        super().__init__()
        width = recipe.width
        self.masking = nn.Dropout(recipe.masked)
        self.narrow = nn.Conv2d(channels, width, 2, stride=2)
        self.dense = nn.Sequential(nn.GELU(), nn.Conv2d(width, 2 * width, 1), nn.GELU(), nn.Conv2d(2 * width, width, 1))
        self.place = nn.Parameter(torch.zeros(1, width, grid[0] // 2, grid[1] // 2))
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(recipe.blocks)))
        self.norm = nn.LayerNorm(width)
        self.wide = nn.Sequential(nn.Conv2d(width, 4 * channels, 1), nn.PixelShuffle(2))

    def forward(self, features: Tensor) -> Tensor:
        narrow = self.narrow(self.masking(features))
        x = narrow + self.dense(narrow) + self.place
        batch, width, height, across = x.shape
        x = self.norm(self.blocks(x.flatten(2).transpose(1, 2)))
        out: Tensor = self.wide(x.transpose(1, 2).reshape(batch, width, height, across))
        return out


class Segmenter(nn.Module):
    """Products of encoder's and decoder's channels (B C gh gw) -> a defect's logit for each patch (B 1 gh gw)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = (channels, 96, 48)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.out = nn.Conv2d(widths[-1], 1, 1)
        nn.init.constant_(torch.as_tensor(self.out.bias), _RARE)

    def forward(self, products: Tensor) -> Tensor:
        logits: Tensor = self.out(self.layers(products))
        return logits


def agreement(encoded: Tensor, decoded: Tensor, groups: Sequence[int]) -> Tensor:
    """Products of the channels (B C gh gw), each group's features of unit length: summed over a group, its cosine."""
    parts = zip(encoded.split(list(groups), 1), decoded.split(list(groups), 1), strict=True)
    return torch.cat([_unit(ours) * _unit(theirs) for ours, theirs in parts], 1)


def _unit(features: Tensor) -> Tensor:
    return features / (features.square().sum(1, keepdim=True) + _SMALL).sqrt()


def distance_map(products: Tensor, groups: Sequence[int]) -> Tensor:
    """(B 1 gh gw): 1 less the cosine, in the mean over the groups."""
    cosines = [part.sum(1, keepdim=True) for part in products.split(list(groups), 1)]
    return 1.0 - torch.stack(cosines).mean(0)


def matching_loss(encoded: Tensor, decoded: Tensor, groups: Sequence[int], easy: float) -> Tensor:
    """1 less the cosine of a group's features over the whole image, in the mean over groups (loose matching).

    Positions (B gh gw) whose own distance is below the quantile `easy` of the batch pass a tenth of the gradient.
    """
    losses = []
    for ours, theirs in zip(encoded.split(list(groups), 1), decoded.split(list(groups), 1), strict=True):
        with torch.no_grad():
            apart = 1.0 - F.cosine_similarity(ours, theirs, dim=1)
            is_easy = (apart < torch.quantile(apart.flatten(), easy)).unsqueeze(1)
        damped = _EASY_WEIGHT * theirs + (1.0 - _EASY_WEIGHT) * theirs.detach()
        kept = torch.where(is_easy, damped, theirs)
        losses.append(1.0 - F.cosine_similarity(ours.flatten(1), kept.flatten(1), dim=1).mean())
    return torch.stack(losses).mean()


@dataclass(frozen=True)
class Stage:
    """A training's steps, and its mean loss over the last tenth of them; its network is in eval mode on the CPU."""

    steps: int
    loss: float


def train_decoder(
    net: Decoder, sampler: Sampler, groups: Sequence[int], schedule: Schedule, *,
    recipe: CrrRecipe, seed: int, checkpoint: Path | None = None, clock: Callable[[], float] = monotonic,
) -> Stage:  # fmt: skip
    """Stage one: reconstruct, and repair."""

    def loss(net: nn.Module, batch: Batch, fraction: float) -> Tensor:
        easy = _HARD_FROM * min(1.0, fraction / _RISE)
        if not recipe.repairs:
            return matching_loss(batch.clean, _forward(net, batch.clean), groups, easy)
        clean, corrupted = _forward(net, torch.cat([batch.clean, batch.corrupted])).chunk(2)
        return matching_loss(batch.clean, clean, groups, easy) + matching_loss(batch.clean, corrupted, groups, easy)

    rate = recipe.learning_rate
    return _train("crr", net, sampler, schedule, loss, rate=rate, seed=seed, checkpoint=checkpoint, clock=clock)


def train_segmenter(
    net: Segmenter, decoder: Decoder, sampler: Sampler, groups: Sequence[int], schedule: Schedule, *,
    recipe: CrrRecipe, seed: int, checkpoint: Path | None = None, clock: Callable[[], float] = monotonic,
) -> Stage:  # fmt: skip
    """Stage two, the decoder as it is: which patches were corrupted? Focal loss alone (Lin et al. 2017)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    decoder = decoder.to(device).eval()

    def loss(net: nn.Module, batch: Batch, _fraction: float) -> Tensor:
        with torch.no_grad():
            products = agreement(batch.corrupted, _forward(decoder, batch.corrupted), groups)
        return focal_loss(_forward(net, products), batch.mask)

    rate = recipe.segmenting_rate
    stage = _train(
        "segmentation", net, sampler, schedule, loss, rate=rate, seed=seed + 1, checkpoint=checkpoint, clock=clock
    )
    decoder.cpu()
    return stage


def focal_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Of two classes, both (B 1 h w), `wanted` in 0..1; what is told surely and rightly counts little."""
    surprise = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return ((1.0 - torch.exp(-surprise)) ** _FOCUS * surprise).mean()


def _forward(net: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16):
        out: Tensor = net(x.contiguous(memory_format=torch.channels_last))
    return out.float()


def _train(
    name: str, net: nn.Module, sampler: Sampler, schedule: Schedule, loss_of: _Loss, *,
    rate: float, seed: int, checkpoint: Path | None, clock: Callable[[], float],
) -> Stage:  # fmt: skip
    """Train until the schedule is over. Raises DataError where the loss stops being a number."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = net.to(device).train()
    optimizer = torch.optim.AdamW(net.parameters(), rate, weight_decay=1e-4, amsgrad=True)
    state = Progress(name, checkpoint, net, optimizer, clock)
    losses: list[float] = []
    for fraction in schedule.fractions(state.steps, state.spent_s, clock):
        for group in optimizer.param_groups:
            group["lr"] = rate * (0.1 + 0.9 * cosine(fraction)) * min(1.0, (state.steps + 1) / _WARM_UP)
        drawn = sampler.draw(state.steps)
        # What is drawn at random inside the network too depends on the step alone: a killed training goes on alike.
        torch.manual_seed(int(np.random.SeedSequence((seed, state.steps)).generate_state(1)[0]))
        batch = Batch(*(part.to(device) for part in (drawn.corrupted, drawn.clean, drawn.mask)))
        loss = loss_of(net, batch, fraction)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(net.parameters(), _CLIP)
        optimizer.step()
        losses.append(float(loss.detach()))
        if not np.isfinite(losses[-1]):
            raise DataError(f"{name}: the loss became {losses[-1]}; look for images that are all one value (--good)")
        state.advance(fraction, losses)
    state.forget()
    tail = losses[-max(1, len(losses) // 10) :]
    net.cpu().eval().requires_grad_(False)
    return Stage(state.steps, float(np.mean(tail)) if tail else float("nan"))


class CrrMap(nn.Module):
    """Features (B C gh gw), as the encoder gives them, to the anomaly map (B 1 gh gw).

    `weight` is the segmentation's share beside the cosine map's: (1 - weight) * distance + weight * probability.
    """

    def __init__(
        self, decoder: Decoder, segmenter: Segmenter | None, scale: tuple[Tensor, Tensor], groups: Sequence[int], *,
        weight: float,
    ) -> None:  # fmt: skip
        """`scale` is the mean and the deviation (C,) of the features that the networks were trained on."""
        super().__init__()
        self.decoder, self.segmenter = decoder, segmenter if weight > 0.0 else None
        self.groups, self.weight = tuple(groups), weight
        self.register_buffer("mean", scale[0].reshape(1, -1, 1, 1))
        self.register_buffer("std", scale[1].reshape(1, -1, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        distance, chance = self.parts(features)
        return distance if chance is None else (1.0 - self.weight) * distance + self.weight * chance

    def parts(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """The cosine map, and the segmentation's probability where there is one; both (B 1 gh gw)."""
        x = (features - self.mean) / self.std
        products = agreement(x, self.decoder(x), self.groups)
        chance = None if self.segmenter is None else torch.sigmoid(self.segmenter(products))
        return distance_map(products, self.groups), chance
