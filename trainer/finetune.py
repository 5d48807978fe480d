"""Fine-tuning of the backbone: it learns to tell seven kinds of synthetic views (DefectMaker; Lyu et al. 2023, REB).

Class 0 is a good view; 1..3 have a blob, a scar or a clump cut from another view, 4..6 the same of noise. The
paper makes 300 updates of some 1,000 views on a GPU. Two CPU cores see 28 views an update, so that here the
backbone keeps ImageNet's batch statistics and moves more slowly than the head, and what is finer than stride 8
stays as it is: an update then takes 1.4 s of a core at 256 x 256, not 3.7. The head sees both maps that the
engine is made of, and their maxima besides their means: a scar covers 1 % of an image, and a mean all but loses it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from time import monotonic

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own custom

from daemon.errors import DataError, UsageError
from daemon.types import FloatArray
from trainer.backbone import Backbone
from trainer.corruption import Corruptor, Recipe, augment
from trainer.fills import make_material
from trainer.progress import say
from trainer.schedule import Schedule
from trainer.shapes import BoolArray
from trainer.tuning import Clocked, ExactDepthwise, Finetuned, freeze_fine, has_bf16, make_ahead

DEFECTMAKER = Recipe(("blob", "scar", "clump"), ("cut", "noise"))
KINDS = tuple((shape, fill) for fill in DEFECTMAKER.fills for shape in DEFECTMAKER.shapes)  # classes 1..6
CLASSES = 1 + len(KINDS)
FROZEN_SHARE = 0.13  # of the schedule, the head alone learns: 39 of 300 updates
_MOMENTUM, _WEIGHT_DECAY, _LAST_RATE = 0.9, 3e-5, 1e-5
_HEAD_WIDTHS = (512, 256)
_SURE = 1e-6  # from 0 and 1, that a probability is kept
_TRAIN, _FRESH = 0, 1  # two streams of random numbers: what is judged on was never trained on
_FRESH_SOURCES = 32  # 224 views: an accuracy is known to some 3 points


@dataclass(frozen=True)
class _Plan:
    """Learning rates at the start, batches an update, and the share (0..1) of the schedule that is the head's alone."""

    head_lr: float
    backbone_lr: float
    accumulate: int
    frozen_share: float

    def rates(self, share: float) -> list[float]:
        """The head's and the backbone's: down to 1e-5 along half a cosine."""
        fall = 0.5 * (1.0 + math.cos(math.pi * share))
        return [_LAST_RATE + (rate - _LAST_RATE) * fall for rate in (self.head_lr, self.backbone_lr)]


def finetune(
    backbone: Backbone,
    images: Sequence[FloatArray],
    schedule: Schedule,
    *,
    seed: int,
    foreground: Sequence[BoolArray] | None = None,
    sources: int = 4,
    accumulate: int = 1,
    lr: float = 0.03,
    backbone_lr: float = 0.01,
    frozen_share: float = FROZEN_SHARE,
    freeze_below: int = 8,
    clock: Callable[[], float] = monotonic,
) -> Finetuned:
    """A copy of the backbone trained on good images (h w 3), 0..255, of the network's input size.

    An update sees `accumulate` batches of 7 * `sources` views. Layers of a finer stride than `freeze_below` stay
    as they are; 1 trains all. `foreground` masks (h w) say where defects may lie. Updates by number on a CPU are the
    seed's to the bit; with seconds, the time for judging (some 5 s) comes on top. With a single image, cuts come
    from other views of it. Raises DataError for images or masks that do not fit (corruption.Corruptor) and where
    the loss is no number any more, UsageError for other arguments.
    """
    if sources < 1 or accumulate < 1:
        raise UsageError(f"found sources {sources} and accumulate {accumulate}, wanted 1 or more: correct them")
    views = _Views(images, foreground, sources, seed)
    classifier = _Classifier(backbone, freeze_below, seed)
    plan, clocked = _Plan(lr, backbone_lr, accumulate, frozen_share), Clocked(schedule, clock)
    with ThreadPoolExecutor(1) as pool:
        losses = _train(classifier, make_ahead(lambda number: views.make(_TRAIN, number), pool), plan, clocked)
    spent, accuracy = clocked.elapsed(), _judge(classifier, views)
    tenth = max(1, len(losses) // 10)
    first, last = (float(np.mean(part)) for part in (losses[:tenth], losses[-tenth:]))
    say(
        f"fine-tuning: {len(losses)} updates in {spent:.0f} s, loss {first:.3f} -> {last:.3f}, "
        f"{accuracy:.0%} of fresh views told right"
    )
    network = classifier.network.requires_grad_(False).cpu()
    return Finetuned(replace(backbone, network=network), len(losses), first, last, accuracy)


@dataclass(frozen=True)
class _Batch:
    """pixels float32 (n h w 3) in 0..255; classes (n,)."""

    pixels: FloatArray
    classes: npt.NDArray[np.int64]


class _Views:
    """Batches of views by number: each is made of the seed and its number alone, by whichever thread."""

    def __init__(
        self, images: Sequence[FloatArray], foreground: Sequence[BoolArray] | None, sources: int, seed: int
    ) -> None:
        self.material = make_material(images, (), foreground)
        self.sources, self.seed = sources, seed

    def make(self, stream: int, number: int) -> _Batch:
        """All seven views of as many images as there are sources: all images once before any comes again."""
        rng = np.random.default_rng([self.seed, stream, 0, number])
        chosen = [self._choose(stream, number * self.sources + place) for place in range(self.sources)]
        taken = [_augment(self.material.images[index], self.material.regions[index], rng) for index in chosen]
        images = [image for image, _ in taken]
        # Sources of a batch are what each other's cuts come from.
        maker = Corruptor(images, DEFECTMAKER, foreground=[region for _, region in taken])
        views = [view for index in range(self.sources) for view in _all_kinds(maker, index, rng)]
        return _Batch(np.stack(views), np.tile(np.arange(CLASSES), self.sources))

    def _choose(self, stream: int, place: int) -> int:
        """The image at a place of an endless row of permutations."""
        turn, place = divmod(place, len(self.material.images))
        order = np.random.default_rng([self.seed, stream, 1, turn]).permutation(len(self.material.images))
        return int(order[place])


def _all_kinds(maker: Corruptor, index: int, rng: np.random.Generator) -> list[FloatArray]:
    """The view itself and its six corruptions, in the order of their classes."""
    return [maker.material.images[index], *(maker.corrupt(index, rng, *kind).pixels for kind in KINDS)]


def _augment(image: FloatArray, region: BoolArray, rng: np.random.Generator) -> tuple[FloatArray, BoolArray]:
    """The image (h w 3) augmented, and its region (h w) turned the same way."""
    if region.all():
        return augment(image, rng), region
    # The same random numbers turn both, since the pixels have no say in how many are drawn; the jitter of a tenth
    # leaves black below the middle and white above it.
    painted = np.repeat(np.where(region, 255.0, 0.0).astype(np.float32)[:, :, None], 3, axis=2)
    turned = augment(painted, copy.deepcopy(rng))[:, :, 0] > 127.0
    return augment(image, rng), turned


def _train(classifier: _Classifier, batches: Iterator[_Batch], plan: _Plan, clocked: Clocked) -> list[float]:
    """Train until the schedule is over, one update at least; the loss of each update."""
    groups = [{"params": list(classifier.head.parameters())}, {"params": classifier.thawing}]
    optimizer = torch.optim.SGD(groups, lr=plan.head_lr, momentum=_MOMENTUM, weight_decay=_WEIGHT_DECAY)
    losses: list[float] = []
    share = 0.0
    while share < 1.0:
        for group, rate in zip(optimizer.param_groups, plan.rates(share), strict=True):
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for _ in range(plan.accumulate):
            loss = classifier.loss(next(batches), is_thawed=share >= plan.frozen_share) / plan.accumulate
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        optimizer.step()
        losses.append(total)
        if not math.isfinite(total) or not classifier.is_finite():
            raise DataError(
                f"fine-tuning: the loss is {total} or the weights are no numbers any more after {len(losses)} updates, "
                f"wanted finite ones: lower lr ({plan.head_lr}) and backbone_lr ({plan.backbone_lr})"
            )
        share = clocked.share(len(losses))
        clocked.tell(len(losses), share, total)
    return losses


def _judge(classifier: _Classifier, views: _Views) -> float:
    """The share (0..1) of fresh views whose class has the largest output."""
    classifier.head.eval()
    right: list[bool] = []
    with torch.inference_mode():
        for number in range(-(-_FRESH_SOURCES // views.sources)):
            batch = views.make(_FRESH, number)
            found = classifier(batch.pixels, is_thawed=False).argmax(1).cpu().numpy()
            right += list(found == batch.classes)
    return float(np.mean(right))


class _Classifier(nn.Module):
    """A copy of the backbone, and the head: both maps' means and maxima through two hidden layers to 7 outputs."""

    def __init__(self, backbone: Backbone, freeze_below: int, seed: int) -> None:
        super().__init__()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.has_bf16 = has_bf16(self.device)
        # Evaluation mode throughout: the statistics of 28 views of four images are these images' own and would ruin
        # ImageNet's, which the exported network uses; scale and shift of these layers are trained.
        self.network = copy.deepcopy(backbone.network).eval().requires_grad_(True)
        channels = freeze_fine(self.network, freeze_below)
        self.thawing = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = _make_head(2 * channels)
        self.mean, self.std = (torch.tensor(values, device=self.device) for values in (backbone.mean, backbone.std))
        self.to(self.device)

    def forward(self, pixels: FloatArray, *, is_thawed: bool) -> Tensor:
        """Logits (n 7) of pixels (n h w 3) in 0..255; no gradient reaches the backbone unless it is thawed."""
        inputs = (torch.from_numpy(pixels).to(self.device) - self.mean) / self.std
        # Pixels that have their channels last in memory already are as oneDNN is fastest with.
        fast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.has_bf16)
        with torch.set_grad_enabled(is_thawed), fast, ExactDepthwise() if is_thawed else nullcontext():
            maps = [found.float() for found in self.network(inputs.permute(0, 3, 1, 2))]
        pooled = torch.cat([pool for found in maps for pool in (found.mean((2, 3)), found.amax((2, 3)))], dim=1)
        return torch.as_tensor(self.head(pooled))

    def loss(self, batch: _Batch, *, is_thawed: bool) -> Tensor:
        """One against the rest: binary cross-entropy, the mean over the seven outputs and the views."""
        chances = torch.sigmoid(self(batch.pixels, is_thawed=is_thawed)).clamp(_SURE, 1.0 - _SURE)
        wanted = F.one_hot(torch.from_numpy(batch.classes), CLASSES).to(self.device) > 0
        return -torch.where(wanted, chances, 1.0 - chances).log().mean()  # torch's own aborts the process over a nan

    def is_finite(self) -> bool:
        sums = [parameter.detach().sum() for parameter in (*self.thawing, *self.head.parameters())]
        return bool(torch.stack(sums).isfinite().all())


def _make_head(width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for wider in _HEAD_WIDTHS:
        layers += [nn.Linear(width, wider), nn.BatchNorm1d(wider), nn.ReLU()]
        width = wider
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))
