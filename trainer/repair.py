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

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own custom

from daemon.errors import DataError
from trainer.checkpoint import Progress
from trainer.samplers import Batch, Sampler, step_generator
from trainer.schedule import Schedule, cosine

Noise = Literal["anchored", "input-only", "none"]
Space = Literal["features", "image"]
_DILATIONS = (1, 2, 4, 8)
_MASKED_WEIGHT = 4.0  # what the mask's share of a few per cent adds to the loss beside the rest
_WARM_UP = 50  # steps
_TYPICAL_BATCHES = 4


@dataclass(frozen=True)
class Recipe:
    """How the network is trained; the defaults are what docs/accuracy.md compares the others with."""

    noise: Noise = "anchored"
    sigma: float = 0.2  # of the noise, in standard deviations of the data
    masked_patches: float = 0.1  # zeroed at the input: the surroundings must explain them
    learning_rate: float = 2e-3
    width: int = 96
    halvings: int = 0  # of the sides, in the network


def recipe_for(space: Space, noise: Noise) -> Recipe:
    """What each space gets. A GPU affords the image's network three times the width."""
    if space == "features":
        return Recipe(noise=noise)
    width = 96 if torch.cuda.is_available() else 32
    return Recipe(noise=noise, masked_patches=0.0, width=width, halvings=3)


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
    space, over the patch's pixels, divided by `typical`.
    """

    def __init__(
        self, net: RepairNet, mean: Tensor, std: Tensor, grid: tuple[int, int], *, space: Space = "features",
        typical: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.net, self.space, self.typical = net, space, typical
        self.register_buffer("mean", mean.reshape(1, -1, 1, 1))
        self.register_buffer("std", std.reshape(1, -1, 1, 1))
        self._grid = grid

    def forward(self, data: Tensor) -> Tensor:
        x = (data - self.mean) / self.std
        residual = (x - self.net(x)).square().mean(1, keepdim=True) / self.typical
        stride = residual.shape[-1] // self._grid[1]
        return (F.avg_pool2d(residual, stride) if stride > 1 else residual).flatten()


def score_with(trained: Trained, sampler: Sampler, grid: tuple[int, int], space: Space) -> RepairScore:
    """The branch of a trained network, in the unit of its mean score on clean data, so that spaces can be added."""
    residuals = []
    with torch.inference_mode():
        for step in range(_TYPICAL_BATCHES):
            clean = sampler.draw(step).clean
            residuals.append(float((clean - trained.net(clean)).square().mean()))
    typical = max(float(np.mean(residuals)), 1e-12)
    return RepairScore(trained.net, sampler.mean, sampler.std, grid, space=space, typical=typical).eval()


@dataclass(frozen=True)
class Trained:
    """The network in eval mode on the CPU; how many steps it had, and its mean loss over the last tenth of them."""

    net: RepairNet
    steps: int
    loss: float


def train(
    sampler: Sampler, schedule: Schedule, recipe: Recipe, *,
    seed: int, checkpoint: Path | None = None, clock: Callable[[], float] = monotonic,
) -> Trained:  # fmt: skip
    """Train a RepairNet. With a checkpoint file, a killed training goes on where it was last saved.

    A GPU is used where torch finds one. Raises DataError where the loss stops being a number.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    net = RepairNet(sampler.channels, recipe.width, recipe.halvings).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), recipe.learning_rate, weight_decay=1e-3)
    state = Progress("repair", checkpoint, net, optimizer, clock)
    losses: list[float] = []
    for fraction in schedule.fractions(state.steps, state.spent_s, clock):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * cosine(fraction) * min(1.0, (state.steps + 1) / _WARM_UP)
        losses.append(_step(net, optimizer, sampler.draw(state.steps), recipe, step_generator(seed + 1, state.steps)))
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
