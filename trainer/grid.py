"""Every setting of one view at once: a nested bank, and the sampled maps of pictures for each setting."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from daemon.types import FloatArray
from trainer import bank
from trainer.calibrate import smoothing_sigma
from trainer.features import FeatureNetwork
from trainer.merit import SampledMap, Truth
from trainer.settings import Settings

_MOST_CANDIDATE_ROWS = 60_000


@dataclass(frozen=True)
class GridScores:
    """Sampled maps (images, pixels) for every setting of a view, and the truth.

    `distance` for each coreset; `density` for each coreset and K: a setting's map is distance - alpha * density.
    """

    distance: dict[int, FloatArray]
    density: dict[tuple[int, int], FloatArray]
    truth: Truth

    def maps(self, settings: Settings) -> FloatArray:
        distance = self.distance[settings.coreset]
        if not settings.alpha:
            return distance
        return distance - np.float32(settings.alpha) * self.density[settings.coreset, settings.k]


class GridBank:
    """A memory bank for every setting of one view at once: greedy picks are nested, one coreset holds all smaller ones.

    Made of pictures (h w 3), 0..255, of the network's size.
    """

    def __init__(
        self, network: FeatureNetwork, pictures: Iterable[FloatArray], *, coresets: Sequence[int],
        neighbours: Sequence[int], threads: int, seed: int,
    ) -> None:  # fmt: skip
        self._network = network
        full = torch.from_numpy(np.concatenate([network.run(pixels).copy() for pixels in pictures]))
        drawn = torch.randperm(len(full), generator=torch.Generator().manual_seed(seed))[:_MOST_CANDIDATE_ROWS]
        self.neighbours = [k for k in neighbours if k < len(full)] or list(neighbours)
        with bank.one_thread():
            rows = drawn[bank.choose_core(full[drawn], max(coresets), seed)]
            self._densities = bank.local_densities(full, rows, self.neighbours, threads).numpy()
        self._core = full[rows]
        self._biases = self._core.square().sum(1).mul_(-0.5)
        self.limits = sorted({min(limit, len(rows)) for limit in coresets})

    def score(self, pictures: Iterable[FloatArray], sampled: SampledMap, truth: Truth) -> GridScores:
        """Sampled maps of pictures for every setting."""
        distance: dict[int, list[FloatArray]] = {limit: [] for limit in self.limits}
        density: dict[tuple[int, int], list[FloatArray]] = {
            (limit, k): [] for limit in self.limits for k in self.neighbours
        }
        for pixels in pictures:
            features = torch.from_numpy(self._network.run(pixels))
            found = _nested_nearest(features, self._core, self._biases, self.limits)
            for limit, (nearest, values) in found.items():
                distance[limit].append(sampled.sample(values))
                for column, k in enumerate(self.neighbours):
                    density[limit, k].append(sampled.sample(self._densities[nearest, column]))
        return GridScores(
            {key: np.stack(value) for key, value in distance.items()},
            {key: np.stack(value) for key, value in density.items()},
            truth,
        )


def sampled_map(size: tuple[int, int]) -> SampledMap:
    """For a network input of this size."""
    return SampledMap(size, (size[0] // 8, size[1] // 8), smoothing_sigma(size))


def _nested_nearest(
    features: torch.Tensor, core: torch.Tensor, biases: torch.Tensor, limits: Sequence[int]
) -> dict[int, tuple[FloatArray, FloatArray]]:
    """For each limit: the nearest among the first so many rows (P,), and its squared distance (P,)."""
    best = torch.full((len(features),), -torch.inf)
    place = torch.zeros(len(features), dtype=torch.int64)
    found, start = {}, 0
    for limit in limits:
        value, index = torch.addmm(biases[start:limit], features, core[start:limit].T).max(1)
        nearer = value > best
        best, place = torch.where(nearer, value, best), torch.where(nearer, index + start, place)
        distance = (features - core[place]).square().sum(1)
        found[limit], start = (place.numpy().copy(), distance.numpy()), limit
    return found
