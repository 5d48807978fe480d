"""The repair branch: a network that turns a corrupted part back into a good one, trained on good images alone.

Method: Noise & Pattern (Bauer & Mueller 2025, arXiv 2511.07233). The corruption is structured (trainer/corruption.py);
Gaussian noise is drawn once and added to BOTH input and target. For small s the expected loss is then

    |f(u) - x|^2  +  s^2 |J - I|_F^2  +  s^2 <f(u) - x, laplacian f(u)>

so the noise pulls the Jacobian J to the identity: what is not a structured disturbance passes unchanged. Noise on
the input alone (ordinary denoising) pulls J to 0 and blurs; it is kept as an option for the ablation.
One network and one loop serve two spaces: the frozen backbone's standardised features, where two CPU cores learn
something in minutes, and the image itself, as in the paper, where there is a GPU or time (docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own custom

from daemon.errors import DataError
from daemon.types import FloatArray
from trainer.corruption import Corruptor
from trainer.progress import say, warn
from trainer.schedule import Schedule, cosine

Noise = Literal["anchored", "input-only", "none"]
_DILATIONS = (1, 2, 4, 8)
_MASKED_WEIGHT = 4.0  # what the mask's share of a few per cent adds to the loss beside the rest
_WARM_UP = 50  # steps
_SAVE_EVERY_S = 30.0
_SAY_EVERY_S = 10.0


@dataclass(frozen=True)
class Batch:
    """corrupted u and clean x (B C h w), mask (B 1 h w) in 0..1: where u was changed."""

    corrupted: Tensor
    clean: Tensor
    mask: Tensor


class Sampler(Protocol):
    """Gives the batch of a step; the same step and seed, the same batch."""

    channels: int

    def draw(self, step: int) -> Batch: ...


@dataclass(frozen=True)
class Recipe:
    """How the network is trained; the defaults are what docs/accuracy.md compares the others with."""

    noise: Noise = "anchored"
    sigma: float = 0.2  # of the noise, in standard deviations of the data
    masked_patches: float = 0.1  # zeroed at the input: the surroundings must explain them
    learning_rate: float = 2e-3
    width: int = 96


class _DilatedBlock(nn.Module):
    """x + ReLU(BN(3x3 conv with a dilation)). On CPUs depthwise dilated convolutions take three times as long."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + F.relu(self.norm(self.conv(x)))
        return out


class _ConvexSkip(nn.Module):
    """a * encoder + (1 - a) * decoder, a in (0, 1) learned for each channel (CCM of arXiv 2206.11723)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.zeros(1, width, 1, 1))

    def forward(self, encoder: Tensor, decoder: Tensor) -> Tensor:
        share = torch.sigmoid(self.logit)
        return share * encoder + (1.0 - share) * decoder


class RepairNet(nn.Module):
    """(B C h w) -> (B C h w), fully convolutional; h and w are multiples of 2^halvings.

    An encoder that halves the sides `halvings` times (0 in feature space), dilated blocks (1, 2, 4, 8), and a decoder
    with a convex skip on every level.
    """

    def __init__(self, channels: int, width: int, halvings: int = 0) -> None:
        super().__init__()
        kernel = 3 if halvings else 1
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
            for _ in range(halvings)
        )
        self.blocks = nn.Sequential(*(_DilatedBlock(width, dilation) for dilation in _DILATIONS))
        self.up = nn.ModuleList(_DilatedBlock(width, 1) for _ in range(halvings))
        self.skips = nn.ModuleList(_ConvexSkip(width) for _ in range(halvings + 1))
        self.out = nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        levels = [self.stem(x)]
        for down in self.down:
            levels.append(down(levels[-1]))
        y = self.skips[0](levels[-1], self.blocks(levels[-1]))
        for up, skip, level in zip(self.up, list(self.skips)[1:], levels[-2::-1], strict=True):
            y = skip(level, up(F.interpolate(y, scale_factor=2.0, mode="bilinear", align_corners=False)))
        repaired: Tensor = self.out(y)
        return repaired


class RepairScore(nn.Module):
    """The branch as the engine runs it: data (1 C h w), standardised by `mean` and `std`, to scores (P,).

    A patch's score is the mean squared difference between it and its repaired self, over channels and, in image
    space, over the patch's pixels.
    """

    def __init__(self, net: RepairNet, mean: Tensor, std: Tensor, grid: tuple[int, int]) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", mean.reshape(1, -1, 1, 1))
        self.register_buffer("std", std.reshape(1, -1, 1, 1))
        self._grid = grid

    def forward(self, data: Tensor) -> Tensor:
        x = (data - self.mean) / self.std
        residual = (x - self.net(x)).square().mean(1, keepdim=True)
        stride = residual.shape[-1] // self._grid[1]
        return (F.avg_pool2d(residual, stride) if stride > 1 else residual).flatten()


class FeatureSampler:
    """Features of images and of their corruptions, computed once: clean (N C gh gw), corrupted (N K C gh gw), float16.

    Standardised as they are drawn; a batch is mirrored at random, which a convolution's features survive well enough
    to multiply the few corruptions.
    """

    def __init__(self, clean: Tensor, corrupted: Tensor, masks: Tensor, *, batch: int = 16, seed: int = 0) -> None:
        self.channels = clean.shape[1]
        self._clean, self._corrupted, self._masks = clean, corrupted, masks
        self._batch, self._seed = batch, seed
        self.mean = torch.stack([clean[:, c].float().mean() for c in range(self.channels)])
        spread = torch.stack([clean[:, c].float().std() for c in range(self.channels)])
        self.std = spread.clamp_(min=1e-6 * float(spread.max()) + 1e-12)

    def draw(self, step: int) -> Batch:
        generator = _generator(self._seed, step)
        image = torch.randint(len(self._clean), (self._batch,), generator=generator)
        kind = torch.randint(self._corrupted.shape[1], (self._batch,), generator=generator)
        parts = [self._standard(self._corrupted[image, kind]), self._standard(self._clean[image])]
        parts.append(self._masks[image, kind].float().unsqueeze(1))
        sides = [side for side in (2, 3) if torch.rand(1, generator=generator) < 0.5]
        return Batch(*(part.flip(sides) for part in parts))

    def _standard(self, features: Tensor) -> Tensor:
        return (features.float() - self.mean.view(1, -1, 1, 1)) / self.std.view(1, -1, 1, 1)


class ImageSampler:
    """Images (H W 3) in 0..255, corrupted anew for every batch; standardised over all of them."""

    channels = 3

    def __init__(self, images: Sequence[FloatArray], corruptor: Corruptor, *, batch: int = 16, seed: int = 0) -> None:
        self._images, self._corruptor = images, corruptor
        self._batch, self._seed = batch, seed
        pixels = np.stack([image.reshape(-1, 3).mean(0) for image in images]).mean(0)
        spread = np.sqrt(np.mean([((image - pixels) ** 2).reshape(-1, 3).mean(0) for image in images], axis=0))
        self.mean = torch.from_numpy(pixels.astype(np.float32))
        self.std = torch.from_numpy(np.maximum(spread, 1.0).astype(np.float32))

    def draw(self, step: int) -> Batch:
        rng = np.random.default_rng((self._seed, step))
        chosen = rng.integers(len(self._images), size=self._batch)
        made = [self._corruptor.corrupt(int(index), rng) for index in chosen]
        corrupted = self._standard([item.pixels for item in made])
        clean = self._standard([self._images[index] for index in chosen])
        mask = torch.from_numpy(np.stack([item.mask for item in made]).astype(np.float32)).unsqueeze(1)
        return Batch(corrupted, clean, mask)

    def _standard(self, images: Sequence[FloatArray]) -> Tensor:
        stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        return (stacked - self.mean.view(1, 3, 1, 1)) / self.std.view(1, 3, 1, 1)


@dataclass(frozen=True)
class Trained:
    """The network in eval mode on the CPU; how many steps it had, and its mean loss over the last tenth of them."""

    net: RepairNet
    steps: int
    loss: float


def train(
    sampler: Sampler, schedule: Schedule, recipe: Recipe, *,
    seed: int, halvings: int = 0, checkpoint: Path | None = None, clock: Callable[[], float] = monotonic,
) -> Trained:  # fmt: skip
    """Train a RepairNet. With a checkpoint file, a killed training goes on where it was last saved.

    A GPU is used where torch finds one. Raises DataError where the loss stops being a number.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    net = RepairNet(sampler.channels, recipe.width, halvings).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), recipe.learning_rate, weight_decay=1e-3)
    state = _Progress(checkpoint, net, optimizer, clock)
    losses: list[float] = []
    for fraction in schedule.fractions(state.steps, state.spent_s, clock):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * cosine(fraction) * min(1.0, (state.steps + 1) / _WARM_UP)
        losses.append(_step(net, optimizer, sampler.draw(state.steps), recipe, _generator(seed + 1, state.steps)))
        state.advance(fraction, losses)
    state.forget()
    tail = losses[-max(1, len(losses) // 10) :]
    return Trained(
        net.to("cpu").eval().requires_grad_(False), state.steps, float(np.mean(tail)) if tail else float("nan")
    )


def _step(
    net: RepairNet, optimizer: torch.optim.Optimizer, batch: Batch, recipe: Recipe, generator: torch.Generator
) -> float:
    device = next(net.parameters()).device
    corrupted, clean, mask = (part.to(device) for part in (batch.corrupted, batch.clean, batch.mask))
    given, wanted = add_noise(corrupted, clean, recipe, generator)
    shape = (len(given), 1, *given.shape[2:])
    kept = (torch.rand(shape, generator=generator) >= recipe.masked_patches).float().to(device)
    with torch.autocast(device.type, torch.bfloat16):
        repaired = net((given * kept).contiguous(memory_format=torch.channels_last))
    loss = ((repaired.float() - wanted).square() * (1.0 + _MASKED_WEIGHT * mask)).mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    value = float(loss.detach())
    if not np.isfinite(value):
        raise DataError(f"the repair network's loss became {value}; look for images that are all one value (--good)")
    return value


def add_noise(corrupted: Tensor, clean: Tensor, recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(input, target): the noise is drawn once; anchored, the target keeps it (arXiv 2511.07233)."""
    if recipe.noise == "none":
        return corrupted, clean
    noise = recipe.sigma * torch.randn(corrupted.shape, generator=generator).to(corrupted.device)
    return corrupted + noise, clean + noise if recipe.noise == "anchored" else clean


class _Progress:
    """Counts, tells and saves. A checkpoint holds tensors and numbers only and is loaded as such."""

    def __init__(
        self, path: Path | None, net: RepairNet, optimizer: torch.optim.Optimizer, clock: Callable[[], float]
    ) -> None:
        self.steps, self.spent_s = 0, 0.0
        self._path, self._net, self._optimizer, self._clock = path, net, optimizer, clock
        if path is not None and path.exists():
            self._resume(path)
        self._started = clock() - self.spent_s
        self._saved = self._said = clock()

    def _resume(self, path: Path) -> None:
        """Go on from the checkpoint; from one that cannot be used there is nothing to save, so start anew."""
        fresh = deepcopy(self._net.state_dict())
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            steps, spent_s = int(saved["steps"]), float(saved["spent_s"])
            self._net.load_state_dict(saved["net"])
            self._optimizer.load_state_dict(saved["optimizer"])
        except Exception as error:  # torch raises whatever the broken bytes lead it to
            self._net.load_state_dict(fresh)
            reason = str(error).partition("\n")[0]
            warn(f"{path}: no checkpoint that can be used ({reason}); the training starts anew")
            return
        self.steps, self.spent_s = steps, spent_s
        say(f"repair: goes on from step {self.steps}, saved in {path}")

    def advance(self, fraction: float, losses: Sequence[float]) -> None:
        self.steps += 1
        now = self._clock()
        if now - self._said >= _SAY_EVERY_S and fraction > 0.0:
            self._said = now
            left = (now - self._started) * (1.0 - fraction) / fraction
            say(f"repair: step {self.steps}, loss {np.mean(losses[-50:]):.4f}, {left:.0f} s left")
        if self._path is not None and now - self._saved >= _SAVE_EVERY_S:
            self._saved = now
            self.save()

    def save(self) -> None:
        if self._path is None:
            return
        partial = self._path.with_suffix(".partial")
        state = {"net": self._net.state_dict(), "optimizer": self._optimizer.state_dict()}
        torch.save({**state, "steps": self.steps, "spent_s": self._clock() - self._started}, partial)
        partial.replace(self._path)

    def forget(self) -> None:
        """The training is complete: what was saved is of no use any more."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _generator(seed: int, step: int) -> torch.Generator:
    """A step's own generator: a training that goes on after a kill draws what it would have drawn."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))
