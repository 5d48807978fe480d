"""The memory bank: patch features of the training images, thinned to a coreset, with local densities.

Method: REB (Lyu et al. 2023), sections 3.4-3.6, and PatchCore's approximate greedy coreset (Roth et al.
2022). The density is taken over the FULL set; at run time the coreset and one number a row are enough.
Shapes: N rows in the full set, M in the coreset, C channels, D channels after projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from daemon.errors import UsageError
from daemon.types import FloatArray

# Rows that the coreset is chosen from; the density still sees all N. 60,000 would save 8 s on 300 images, and lost the
# rare normal patches: 0.5 points of image AUROC on magnetic_tile.
_MOST_CANDIDATES = 400_000
_PROJECTED = 128  # REB's; 64 saves 0.3 s and leaves a wider radius
_START_POINTS = 10
_WORKING_SET = 1024
_MOST_PICKS = 256  # in one round; bounds the distance buffer
_ROWS = 4096  # of a block, so that a block and its distances stay near the cache
_SPARE = 4  # neighbours beyond K that are measured again exactly


@dataclass(frozen=True)
class Bank:
    """core (M C), bias (M,) = -|m|^2 / 2, density (M,): what bank.safetensors holds, float32."""

    core: FloatArray
    bias: FloatArray
    density: FloatArray

    @property
    def tensors(self) -> dict[str, FloatArray]:
        return {"core": self.core, "bias": self.bias, "density": self.density}


def make_bank(features: FloatArray, *, rows: int, neighbours: int, threads: int, seed: int) -> Bank:
    """Thin the full set (N C) to `rows` and measure each kept row's density among all N.

    Raises UsageError where the set has too few rows for `neighbours`.
    """
    full = torch.from_numpy(features)
    with one_thread():
        kept = choose_core(full, rows, seed)
        density = local_density(full, kept, neighbours, threads)
    core = full[kept]
    bias = core.square().sum(1).mul_(-0.5)
    return Bank(core.numpy(), bias.numpy(), density.numpy())


@contextmanager
def one_thread() -> Iterator[None]:
    """torch's threads wait for each other after every block: on a busy machine that took ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def choose_core(full: torch.Tensor, rows: int, seed: int) -> torch.Tensor:
    """Indices (M,) into the full set (N C), in the order chosen; all N where there are no more than `rows`.

    Distances are taken on a random Gaussian projection, among at most 400,000 rows drawn at random.
    """
    if len(full) <= rows:
        return torch.arange(len(full))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(full), generator=generator)[: max(_MOST_CANDIDATES, rows)]
    points = full[drawn]
    if points.shape[1] > _PROJECTED:
        points = points @ torch.randn(points.shape[1], _PROJECTED, generator=generator)
    starts = points[torch.randperm(len(points), generator=generator)[:_START_POINTS]]
    return drawn[greedy_k_centre(points, starts, rows)]


def greedy_k_centre(points: torch.Tensor, starts: torch.Tensor, rows: int) -> torch.Tensor:
    """Indices (M,) of farthest points (N D), one after the other; rows <= N.

    A point's reach is its squared distance to the nearest chosen one, at first its mean distance to the
    start points, which are not chosen themselves. Reaches only ever shrink, so the 1,024 farthest points
    alone decide every pick until the best of them comes below the farthest point outside: each round
    picks among those and then brings all reaches up to date in one product. The picks are those of the
    plain algorithm, which reads all N points for each.
    """
    half_norms = points.square().sum(1).mul_(0.5)
    reach = torch.cdist(points, starts, compute_mode="donot_use_mm_for_euclid_dist").square_().mean(1)
    products = torch.empty(min(_ROWS, len(points)), _MOST_PICKS)
    chosen: list[torch.Tensor] = []
    missing = rows
    while missing:
        size = min(_WORKING_SET, len(points))
        farthest = torch.topk(reach, min(size + 1, len(points)))
        floor = float(farthest.values[size]) if len(points) > size else -torch.inf
        members = farthest.indices[:size]
        near = farthest.values[:size].clone()
        picks = members[_pick_farthest(points[members], half_norms[members], near, floor, min(missing, _MOST_PICKS))]
        _shorten(reach, points, half_norms, picks, products)
        reach[picks] = -torch.inf
        chosen.append(picks)
        missing -= len(picks)
    return torch.cat(chosen)


def _pick_farthest(
    points: torch.Tensor, half_norms: torch.Tensor, reach: torch.Tensor, floor: float, most: int
) -> torch.Tensor:
    """Greedy picks (at least one) inside the working set, while the farthest is not below `floor`.

    Works on `reach` in place.
    """
    product = torch.empty(len(points))
    picks: list[int] = []
    while len(picks) < most:
        best = int(torch.argmax(reach))
        if float(reach[best]) < floor or float(reach[best]) == -torch.inf:
            break
        picks.append(best)
        torch.mv(points, points[best], out=product)
        product.neg_().add_(half_norms).add_(half_norms[best]).mul_(2.0).clamp_(min=0.0)
        torch.minimum(reach, product, out=reach)
        reach[best] = -torch.inf
    return torch.tensor(picks)


def _shorten(
    reach: torch.Tensor, points: torch.Tensor, half_norms: torch.Tensor, picks: torch.Tensor, products: torch.Tensor
) -> None:
    """Bring every point's reach (N,) down to its distance to the new picks, in place, block by block."""
    centres, centre_norms = points[picks].T.contiguous(), half_norms[picks]
    for start in range(0, len(points), _ROWS):
        block = points[start : start + _ROWS]
        product = products[: len(block), : len(picks)]
        torch.addmm(centre_norms, block, centres, alpha=-1.0, out=product)
        distance = product.amin(1).add_(half_norms[start : start + _ROWS]).mul_(2.0).clamp_(min=0.0)
        torch.minimum(reach[start : start + _ROWS], distance, out=reach[start : start + _ROWS])


def local_density(full: torch.Tensor, kept: torch.Tensor, neighbours: int, threads: int = 1) -> torch.Tensor:
    """Mean squared distance (M,) from each kept row to its K nearest rows of the full set (N C).

    Raises UsageError unless 1 <= K < N.
    """
    return local_densities(full, kept, [neighbours], threads)[:, 0]


def local_densities(
    full: torch.Tensor, kept: torch.Tensor, neighbours: Sequence[int], threads: int = 1
) -> torch.Tensor:
    """`local_density` for several K at the cost of the largest, (M, len(neighbours)).

    The row itself is left out by its index, so that an equal row elsewhere counts with distance 0 (REB's
    code drops the first hit only where its distance is exactly 0).
    """
    most = max(neighbours)
    if not 1 <= min(neighbours) <= most < len(full):
        raise UsageError(f"found k = {most} for {len(full)} training patches, wanted 1 to {len(full) - 1} (--k)")
    with ThreadPoolExecutor(threads) as pool:
        nearest = torch.cat(list(pool.map(lambda part: _part_nearest(full, part, most), kept.chunk(threads))))
    return torch.stack([nearest[:, :count].mean(1) for count in neighbours], dim=1)


def _part_nearest(full: torch.Tensor, kept: torch.Tensor, neighbours: int) -> torch.Tensor:
    """Squared distances (M K), ascending, of some of the kept rows to their nearest.

    The search ranks by q.m - |m|^2 / 2, which cancels for near rows; the best K and a few more are then
    measured from the vectors themselves.
    """
    wanted = min(neighbours + _SPARE, len(full) - 1)
    core = full[kept]
    best = torch.full((len(kept), wanted), -torch.inf)
    places = torch.zeros((len(kept), wanted), dtype=torch.int64)
    products = torch.empty(len(kept), min(_ROWS, len(full)))
    for start in range(0, len(full), _ROWS):
        block = full[start : start + _ROWS]
        product = products[:, : len(block)]
        torch.addmm(block.square().sum(1).mul_(-0.5), core, block.T, out=product)
        inside = ((kept >= start) & (kept < start + len(block))).nonzero().squeeze(1)
        product[inside, kept[inside] - start] = -torch.inf
        found = product.topk(min(wanted, len(block)), dim=1)
        values = torch.cat([best, found.values], dim=1)
        indices = torch.cat([places, found.indices + start], dim=1)
        best, order = values.topk(wanted, dim=1)
        places = indices.gather(1, order)
    distances = torch.empty(places.shape)
    for column in range(wanted):
        distances[:, column] = full[places[:, column]].sub_(core).square_().sum(1)
    return distances.topk(neighbours, dim=1, largest=False, sorted=True).values
