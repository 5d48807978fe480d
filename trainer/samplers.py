"""What the repair networks are trained on: batches by step, in feature space or in the image itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from daemon.types import FloatArray
from trainer.corruption import Corruptor


@dataclass(frozen=True)
class Batch:
    """corrupted u and clean x (B C h w), mask (B 1 h w) in 0..1: where u was changed."""

    corrupted: Tensor
    clean: Tensor
    mask: Tensor


class Sampler(Protocol):
    """Gives the batch of a step; the same step and seed, the same batch. `mean` and `std` (C,) standardise its data."""

    channels: int
    mean: Tensor
    std: Tensor

    def draw(self, step: int) -> Batch: ...


class FeatureSampler:
    """Features of images and of their corruptions, computed once: clean (N C gh gw), corrupted (N K C gh gw), float16.

    Standardised as they are drawn; a batch is mirrored at random, which a convolution's features survive well enough
    to multiply the few corruptions.
    """

    def __init__(
        self, clean: Tensor, corrupted: Tensor, masks: Tensor, *, batch: int = 16, seed: int = 0,
        scale: tuple[Tensor, Tensor] | None = None, chances: Tensor | None = None,
    ) -> None:  # fmt: skip
        """`scale` is the mean and deviation (C,) to standardise by, where a network was trained with them before;
        `chances` (N,) are how often each image is drawn in proportion, all alike if None."""
        self.channels = clean.shape[1]
        self._clean, self._corrupted, self._masks = clean, corrupted, masks
        self._batch, self._seed = batch, seed
        self._chances = chances
        if scale is not None:
            self.mean, self.std = scale
            return
        self.mean = torch.stack([clean[:, c].float().mean() for c in range(self.channels)])
        spread = torch.stack([clean[:, c].float().std() for c in range(self.channels)])
        self.std = spread.clamp_(min=1e-6 * float(spread.max()) + 1e-12)

    def draw(self, step: int) -> Batch:
        generator = step_generator(self._seed, step)
        if self._chances is None:
            image = torch.randint(len(self._clean), (self._batch,), generator=generator)
        else:
            image = torch.multinomial(self._chances, self._batch, replacement=True, generator=generator)
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


def step_generator(seed: int, step: int) -> torch.Generator:
    """A step's own generator: a training that goes on after a kill draws what it would have drawn."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))
