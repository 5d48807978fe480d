"""Fine-tuning of the backbone: it learns to outline synthetic defects, so that its features tell them from texture.

DefectMaker (trainer/finetune.py) asks which of seven kinds a view is; this asks which pixels were changed. Off by
default, since it helps one product and hurts another (docs/accuracy.md): the nearest neighbour's pixel AUROC rose by
four points on magnetic_tile, and its image AUROC fell by three on polycrystalline cells, whose own grain is as
irregular as the defects that it learns to see. A small head over the engine's own two maps gives one logit for
4x4 pixels; loss: focal (Lin et al. 2017, gamma 2) and dice, since a defect covers a few per cent. The head is
thrown away: as a detector it knows the synthetic defects and not the real ones (docs/accuracy.md).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from time import monotonic

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own custom

from daemon.errors import DataError
from daemon.types import FloatArray
from trainer.backbone import Backbone
from trainer.corruption import Corruptor
from trainer.progress import say
from trainer.schedule import Schedule, cosine
from trainer.shapes import BoolArray
from trainer.tuning import Clocked, ExactDepthwise, Finetuned, freeze_fine, has_bf16, make_ahead

_BATCH = 8
_GOOD_SHARE = 0.15  # of a batch, left as they are
_HEAD_LR, _WARM_UP = 2e-3, 50  # updates
_FOCAL_WEIGHT, _DICE_WEIGHT = 10.0, 0.5
_WIDTH = 64
_RARE = -3.0  # the head's first logit: 5 % of the pixels
_JITTER_GAIN, _JITTER_LEVELS = 0.1, 10.0
_TRAIN, _FRESH = 0, 1  # two streams of random numbers
_FRESH_BATCHES = 4


@dataclass(frozen=True)
class _Batch:
    """pixels float32 (n h w 3) in 0..255, masks bool (n h w)."""

    pixels: FloatArray
    masks: BoolArray


def finetune_by_outline(
    backbone: Backbone, images: Sequence[FloatArray], corruptor: Corruptor, schedule: Schedule, *,
    seed: int, backbone_lr: float = 5e-4, freeze_below: int = 8, clock: Callable[[], float] = monotonic,
) -> Finetuned:  # fmt: skip
    """A copy of the backbone trained on good images (h w 3), 0..255, that the corruptor was made of.

    `accuracy` is the share of changed pixels found on fresh views, less what is found elsewhere (Youden's J).
    Updates by number on a CPU are the seed's to the bit. Raises DataError where the loss is no number any more.
    """
    views = _Views(images, corruptor, seed)
    outliner = _Outliner(backbone, freeze_below, seed)
    clocked = Clocked(schedule, clock)
    with ThreadPoolExecutor(1) as pool:
        batches = make_ahead(lambda number: views.make(_TRAIN, number), pool)
        losses = _train(outliner, batches, clocked, backbone_lr)
    found = _judge(outliner, views)
    tenth = max(1, len(losses) // 10)
    first, last = (float(np.mean(part)) for part in (losses[:tenth], losses[-tenth:]))
    say(f"fine-tuning: {len(losses)} updates, loss {first:.3f} -> {last:.3f}, {found:.0%} of what is changed outlined")
    network = outliner.network.requires_grad_(False).cpu()
    return Finetuned(replace(backbone, network=network), len(losses), first, last, found)


class _Views:
    """Batches by number: corrupted, mirrored and brightened by the seed and the number alone."""

    def __init__(self, images: Sequence[FloatArray], corruptor: Corruptor, seed: int) -> None:
        self._images, self._corruptor, self._seed = images, corruptor, seed

    def make(self, stream: int, number: int) -> _Batch:
        rng = np.random.default_rng([self._seed, stream, number])
        views = [self._view(int(index), rng) for index in rng.integers(len(self._images), size=_BATCH)]
        pixels, masks = zip(*views, strict=True)
        return _Batch(np.stack(pixels), np.stack(masks))

    def _view(self, index: int, rng: np.random.Generator) -> tuple[FloatArray, BoolArray]:
        pixels, mask = self._images[index], np.zeros(self._images[index].shape[:2], bool)
        if rng.random() >= _GOOD_SHARE:
            made = self._corruptor.corrupt(index, rng)
            pixels, mask = made.pixels, made.mask
        for axis in (0, 1):
            if rng.random() < 0.5:
                pixels, mask = np.flip(pixels, axis), np.flip(mask, axis)
        gain = np.float32(rng.uniform(1.0 - _JITTER_GAIN, 1.0 + _JITTER_GAIN))
        offset = np.float32(rng.uniform(-_JITTER_LEVELS, _JITTER_LEVELS))
        return np.clip(pixels * gain + offset, 0.0, 255.0), mask


class _Outliner(nn.Module):
    """A copy of the backbone, and a head over its two maps: (n h w 3) -> logits (n 1 h/4 w/4)."""

    def __init__(self, backbone: Backbone, freeze_below: int, seed: int) -> None:
        super().__init__()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.has_bf16 = has_bf16(self.device)
        # Evaluation mode throughout: the statistics of eight views would ruin ImageNet's, which the engine uses.
        self.network = copy.deepcopy(backbone.network).eval().requires_grad_(True)
        freeze_fine(self.network, freeze_below)
        with torch.no_grad():
            fine, coarse = (found.shape[1] for found in self.network(torch.zeros(1, 3, 64, 64)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.fine, self.coarse = nn.Conv2d(fine, _WIDTH, 1), nn.Conv2d(coarse, _WIDTH, 1)
            self.joined = nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1)
            self.finer = nn.Conv2d(_WIDTH, _WIDTH // 2, 3, padding=1)
            self.out = nn.Conv2d(_WIDTH // 2, 1, 1)
        nn.init.constant_(torch.as_tensor(self.out.bias), _RARE)
        self.mean, self.std = (torch.tensor(values, device=self.device) for values in (backbone.mean, backbone.std))
        self.to(self.device)

    def forward(self, pixels: FloatArray) -> Tensor:
        inputs = (torch.from_numpy(pixels).to(self.device) - self.mean) / self.std
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.has_bf16), ExactDepthwise():
            fine, coarse = self.network(inputs.permute(0, 3, 1, 2))
            coarse = F.interpolate(self.coarse(coarse), size=fine.shape[-2:], mode="bilinear", align_corners=False)
            joined = F.relu(self.joined(F.relu(self.fine(fine) + coarse)))
            finer = F.interpolate(joined, scale_factor=2.0, mode="bilinear", align_corners=False)
            logits = self.out(F.relu(self.finer(finer)))
        return torch.as_tensor(logits).float()

    def loss(self, batch: _Batch) -> Tensor:
        logits = self(batch.pixels)
        wanted = self.wanted(batch, logits)
        surprise = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        focal = ((1.0 - torch.exp(-surprise)).square() * surprise).mean()
        chance = torch.sigmoid(logits)
        both, either = ((part).sum((1, 2, 3)) for part in (chance * wanted, chance + wanted))
        dice = 1.0 - (2.0 * both + 1.0) / (either + 1.0)
        return _FOCAL_WEIGHT * focal + _DICE_WEIGHT * dice.mean()

    def wanted(self, batch: _Batch, logits: Tensor) -> Tensor:
        """The masks on the logits' grid: 1 where any pixel is changed, so that a hairline is not lost."""
        masks = torch.from_numpy(batch.masks.astype(np.float32)).unsqueeze(1).to(self.device)
        return F.adaptive_max_pool2d(masks, logits.shape[-2:])

    def heads(self) -> list[nn.Parameter]:
        parts = (self.fine, self.coarse, self.joined, self.finer, self.out)
        return [parameter for part in parts for parameter in part.parameters()]


def _train(outliner: _Outliner, batches: Iterator[_Batch], clocked: Clocked, backbone_lr: float) -> list[float]:
    """Train until the schedule is over, one update at least; the loss of each update."""
    thawed = [parameter for parameter in outliner.network.parameters() if parameter.requires_grad]
    rates = (backbone_lr, _HEAD_LR)
    groups = [{"params": part, "lr": rate} for part, rate in zip((thawed, outliner.heads()), rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
    losses: list[float] = []
    share = 0.0
    while share < 1.0:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * cosine(share) * min(1.0, (len(losses) + 1) / _WARM_UP)
        loss = outliner.loss(next(batches))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_([*thawed, *outliner.heads()], 1.0)
        losses.append(float(loss.detach()))
        if not (math.isfinite(losses[-1]) and math.isfinite(float(norm))):
            raise DataError(
                f"fine-tuning: the loss is {losses[-1]} after {len(losses)} updates, its gradient {float(norm)}, "
                "wanted finite ones: look for images that are all one value (--good), or build with --finetune off"
            )
        optimizer.step()
        share = clocked.share(len(losses))
        clocked.tell(len(losses), share, losses[-1])
    return losses


def _judge(outliner: _Outliner, views: _Views) -> float:
    """Share of changed pixels found, less the share of unchanged ones called changed, on fresh views."""
    with torch.inference_mode():
        found, wanted = [], []
        for number in range(_FRESH_BATCHES):
            batch = views.make(_FRESH, number)
            logits = outliner(batch.pixels)
            found.append(logits.flatten() > 0.0)
            wanted.append(outliner.wanted(batch, logits).flatten() > 0.0)
    called, truth = torch.cat(found), torch.cat(wanted)
    return float(called[truth].float().mean() - called[~truth].float().mean())
