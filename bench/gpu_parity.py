"""The kernels against the references, on whatever runs them: a GPU, or the suite's emulator (tests/emulator.h).

Inputs are fresh for every check and outputs are poisoned before it, so that nothing passes by what was left there.
Bounds are derived where they stand; a check gives what it found beside what it allowed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from daemon.inspection.backend.search import (
    GROUP_SHARED_BYTES,
    INT8_BLOCKS_A_MULTIPROCESSOR,
    KEPT,
    SHARED_BYTES,
    from_ordered,
    pad_bank,
    quantise_bank,
    split,
)
from daemon.inspection.backend.tables import banded, resampling, smoothing_operator
from tests import reference

KINDS = ("mono8", "mono16", "rgb8", "bgr8", "bayerrg8")
MEAN, STD = (120.0, 125.0, 130.0), (60.0, 62.0, 64.0)
Array = npt.NDArray[Any]


class Device(Protocol):
    """Arrays go in by `put` and come back by `get`; a launch takes them, and Python's int and float as C's."""

    multiprocessors: int
    has_group_product: bool  # wgmma, which sm_90a alone has

    def put(self, values: Array) -> Any: ...

    def get(self, held: Any) -> Array: ...

    def launch(
        self, name: str, grid: tuple[int, ...], block: tuple[int, ...], *arguments: Any, shared: int = 0
    ) -> None: ...


@dataclass(frozen=True)
class Check:
    """A figure that was found and the most that is allowed (or the least, with `is_least`)."""

    what: str
    found: float
    allowed: float
    is_least: bool = False

    @property
    def holds(self) -> bool:
        return self.found >= self.allowed if self.is_least else self.found <= self.allowed


class Bank:
    """A bank on the device, as daemon/inspection/backend/cuda.py lays it out."""

    def __init__(self, device: Device, core: Array, density: Array) -> None:
        self.device, (self.n, self.d) = device, core.shape
        rounded, bias = pad_bank(core)
        self.rows, self.padded = rounded.shape
        self.bank, self.bias = device.put(rounded), device.put(bias)
        self.core, self.density = device.put(core.astype(np.float32)), device.put(density.astype(np.float32))


class Search:
    """Queries against a bank: three launches, buffers made once."""

    kernel, shared_bytes = "ldknn_search", SHARED_BYTES

    def __init__(self, bank: Bank, features: Array, alpha: float) -> None:
        self.bank, self.m, self.alpha = bank, len(features), alpha
        device = bank.device
        self.features = device.put(features.astype(np.float32))
        self.queries = device.put(np.full((self.m, bank.padded), np.nan, np.float16))
        self.keys = device.put(np.full(self.m, 2**63, np.uint64))
        self.scores = device.put(np.full(self.m, np.nan, np.float32))
        self.winners = device.put(np.full(self.m, -7, np.int32))
        self.grid, self.tiles_a_split = split(self.m, bank.rows, device.multiprocessors)

    def run(self) -> None:
        bank, launch = self.bank, self.bank.device.launch
        launch(
            "ldknn_round", (max(1, self.m * bank.padded // 1024),), (256,), self.features, self.queries, self.keys,
            self.m, bank.d, bank.padded,
        )  # fmt: skip
        launch(
            self.kernel, self.grid, (256,), self.queries, bank.bank, bank.bias, self.keys, self.m, bank.rows,
            bank.padded, self.tiles_a_split, shared=self.shared_bytes,
        )  # fmt: skip
        launch(
            "ldknn_finish", (-(-self.m // 8),), (256,), self.features, bank.core, bank.density, self.keys, self.scores,
            self.winners, float(self.alpha), self.m, bank.n, bank.d,
        )  # fmt: skip


class GroupSearch(Search):
    """ldknn_sm90.cu in the middle."""

    kernel, shared_bytes = "ldknn_search_sm90", GROUP_SHARED_BYTES


class Int8Bank(Bank):
    """The same in INT8."""

    def __init__(self, device: Device, core: Array, density: Array) -> None:
        super().__init__(device, core, density)
        self.whole = quantise_bank(core.astype(np.float32))
        self.rows, self.padded = self.whole.rows.shape
        self.bank, self.bias = device.put(self.whole.rows), device.put(self.whole.bias)
        self.centre = device.put(self.whole.centre)


class Int8Search(Search):
    """ldknn_int8.cu's three launches."""

    bank: Int8Bank

    def __init__(self, bank: Int8Bank, features: Array, alpha: float) -> None:
        super().__init__(bank, features, alpha)
        device = bank.device
        self.queries = device.put(np.full((self.m, bank.padded), 99, np.int8))
        self.keys = device.put(np.full((self.m, KEPT), 2**63, np.uint64))
        self.grid, self.tiles_a_split = split(self.m, bank.rows, device.multiprocessors, INT8_BLOCKS_A_MULTIPROCESSOR)

    def run(self) -> None:
        bank, launch = self.bank, self.bank.device.launch
        launch(
            "ldknn_int8_round", (max(1, self.m * bank.padded // 1024),), (256,), self.features, bank.centre,
            self.queries, self.keys, float(bank.whole.inverse), self.m, bank.d, bank.padded,
        )  # fmt: skip
        launch(
            "ldknn_int8_search", self.grid, (256,), self.queries, bank.bank, bank.bias, self.keys, self.m, bank.rows,
            bank.padded, self.tiles_a_split, shared=SHARED_BYTES,
        )  # fmt: skip
        launch(
            "ldknn_int8_finish", (-(-self.m // 8),), (256,), self.features, bank.core, bank.density, self.keys,
            self.scores, self.winners, float(self.alpha), self.m, bank.n, bank.d,
        )  # fmt: skip


def searches(device: Device) -> dict[str, tuple[type[Bank], type[Search]]]:
    """The forms of the search that this device has, by name."""
    found: dict[str, tuple[type[Bank], type[Search]]] = {
        "ldknn": (Bank, Search),
        "ldknn_int8": (Int8Bank, Int8Search),
    }
    return found | ({"ldknn_sm90": (Bank, GroupSearch)} if device.has_group_product else {})


def make_features(m: int, n: int, d: int, seed: int) -> tuple[Array, Array, Array]:
    """(features (m d), core (n d), density (n)): not negative and of very different norms, as after a ReLU."""
    rng = np.random.default_rng(seed)
    core = np.maximum(rng.standard_normal((n, d), np.float32), 0) * rng.uniform(0.3, 2.0, (n, 1)).astype(np.float32)
    features = core[rng.integers(n, size=m)] + 0.3 * rng.standard_normal((m, d), np.float32)
    return features, core, rng.random(n, np.float32)


def check_search(device: Device, form: str, shape: tuple[int, int, int], seed: int) -> list[Check]:
    m, n, d = shape
    features, core, density = make_features(m, n, d, seed)
    make_bank, make_search = searches(device)[form]
    search = make_search(make_bank(device, core, density), features, 0.25)
    search.run()
    winners, scores = device.get(search.winners), device.get(search.scores)
    name = f"{form} {m} x {n} x {d}"
    if winners.min() < 0 or winners.max() >= n:
        return [Check(f"{name}: queries without a winner", float((winners < 0).sum()), 0.0)]
    nearest, best = exact_nearest(features, core)
    own = np.square(features.astype(np.float64) - core[winners].astype(np.float64)).sum(1)
    wanted = own - 0.25 * density[winners].astype(np.float64)
    excess = (own - best) / np.maximum(best, 1e-12)
    return [
        Check(f"{name}: winners as in FP64", float((winners == nearest).mean()), 0.99, is_least=True),
        Check(f"{name}: relative excess of the distance", float(excess.max()), 1e-4),
        Check(f"{name}: score of the winner", float((np.abs(scores - wanted) / (1.0 + own)).max()), 1e-5),
    ]


def exact_nearest(features: Array, core: Array) -> tuple[Array, Array]:
    """(rows, squared distances) in FP64, the lowest of equal rows."""
    queries = features.astype(np.float64)
    best, rows = np.full(len(queries), np.inf), np.zeros(len(queries), np.int64)
    for start in range(0, len(core), 4096):
        block = core[start : start + 4096].astype(np.float64)
        squared = np.square(queries).sum(1)[:, None] - 2.0 * queries @ block.T + np.square(block).sum(1)
        place = squared.argmin(1)
        found = np.square(queries - block[place]).sum(1)
        rows = np.where(found < best, place + start, rows)
        best = np.minimum(found, best)
    return rows, best


def check_ties(device: Device, form: str) -> list[Check]:
    """Equal rows in other columns, tiles and splits: the lowest one wins; a NaN stays its query's own."""
    features, core, density = make_features(40, 1000, 48, 3)
    core[[133, 400, 999]] = core[7]
    features[:4] = core[[7, 999, 400, 133]]
    features[20, 5] = np.nan
    make_bank, make_search = searches(device)[form]
    search = make_search(make_bank(device, core, density), features, 0.0)
    search.run()
    winners, scores = device.get(search.winners), device.get(search.scores)
    others = np.delete(scores, 20)
    return [
        Check(f"{form}: ties that did not go to the lowest row", float((winners[:4] != 7).sum()), 0.0),
        Check(f"{form}: NaN queries with a number", float(np.isfinite(scores[20])), 0.0),
        Check(f"{form}: other queries without one", float((~np.isfinite(others)).sum()), 0.0),
    ]


def check_preprocess(device: Device, kind: str, frame_hw: tuple[int, int], size: tuple[int, int], seed: int) -> Check:
    """Against FP64: half a level of the frame's pixels by rounding, and FP16's last place at four."""
    rng = np.random.default_rng(seed)
    channels = 3 if kind in ("rgb8", "bgr8") else 1
    dtype = np.uint16 if kind == "mono16" else np.uint8
    pixels = rng.integers(0, np.iinfo(dtype).max, (*frame_hw, channels), dtype, endpoint=True)
    rows, columns = (resampling(side, length) for side, length in zip(size, frame_hw, strict=True))
    to_eight_bit = 1.0 / 257.0 if dtype == np.uint16 else 1.0
    scale = np.array([to_eight_bit / std for std in STD], np.float32)
    offset = np.array([mean / std for mean, std in zip(MEAN, STD, strict=True)], np.float32)
    found = device.put(np.full((3, *size), np.nan, np.float16))
    tables = [
        device.put(a) if isinstance(a, np.ndarray) else a for t in (rows, columns) for a in (t.first, t.weights, t.taps)
    ]
    device.launch(
        f"preprocess_{kind}", (-(-size[1] // 32), -(-size[0] // 8)), (32, 8), device.put(pixels), found, *tables,
        device.put(scale), device.put(offset), *frame_hw, *size,
    )  # fmt: skip
    wanted = reference.normalise(to_plain(pixels, kind), size, MEAN, STD)[0]
    deviation = float(np.abs(device.get(found).astype(np.float64) - wanted).max())
    return Check(f"preprocess {kind} {frame_hw} -> {size}", deviation, 0.5 * to_eight_bit / min(STD) + 2.0**-9)


def to_plain(pixels: Array, kind: str) -> Array:
    """Gray or RGB, by the references."""
    if kind.startswith("bgr"):
        return np.ascontiguousarray(pixels[:, :, ::-1])
    return reference.demosaic(pixels[:, :, 0]) if kind.startswith("bayer") else pixels


def check_postprocess(device: Device, grid: tuple[int, int], size: tuple[int, int], seed: int) -> list[Check]:
    rng = np.random.default_rng(seed)
    repair, ldknn = (rng.standard_normal(grid[0] * grid[1], np.float32) for _ in range(2))
    down, across = (smoothing_operator(side, cells, 4.0) for side, cells in zip(size, grid, strict=True))
    fused = (repair - 0.5) * 2.0 + (ldknn - 0.25) * 4.0
    wanted = down.astype(np.float64) @ fused.reshape(grid) @ across.T.astype(np.float64)
    limit = float(np.quantile(wanted, 0.95))
    words = -(-size[1] // 32)
    found = device.put(np.full(size, np.nan, np.float32))
    mask = device.put(np.full((size[0], words), 0xFFFFFFFF, np.uint32))
    score = device.put(np.array([77], np.uint32))
    tables = [
        device.put(a) if isinstance(a, np.ndarray) else a
        for t in (banded(down), banded(across))
        for a in (t.first, t.weights, t.taps)
    ]
    device.launch("postprocess_start", (1,), (1,), score)
    device.launch(
        "postprocess", (words, -(-size[0] // 8)), (32, 8), device.put(repair), device.put(ldknn), 0.5, 2.0, 0.25, 4.0,
        *tables, found, mask, score, limit, grid[1], *size,
    )  # fmt: skip
    values = device.get(found)
    bits = np.unpackbits(device.get(mask).view(np.uint8), axis=1, bitorder="little")[:, : size[1]].astype(bool)
    top = from_ordered(int(device.get(score)[0]))
    name = f"postprocess {grid} -> {size}"
    return [
        Check(f"{name}: map", float(np.abs(values - wanted).max()), 1e-4 * float(np.abs(wanted).max())),
        Check(f"{name}: score is not the map's maximum", float(top != values.max()), 0.0),
        Check(f"{name}: wrong bits of the mask", float((bits != (values >= np.float32(limit))).sum()), 0.0),
    ]


def check_all(device: Device, *, is_small: bool) -> list[Check]:
    """Every kernel. Small sizes suit the emulator and compute-sanitizer."""
    shapes = [(130, 300, 40), (77, 513, 152), (1, 1, 1)]
    if not is_small:
        shapes += [(784, 10_000, 384), (1024, 4000, 152), (3136, 20_000, 128), (784, 100_000, 384), (100, 3000, 1536)]
    checks = []
    for form in searches(device):
        checks += [check for seed, shape in enumerate(shapes) for check in check_search(device, form, shape, seed)]
        checks += check_ties(device, form)
    sizes = [((90, 130), (64, 64))] if is_small else [((90, 130), (64, 64)), ((2048, 2448), (256, 256))]
    for seed, (frame_hw, size) in enumerate(sizes):
        checks += [check_preprocess(device, kind, frame_hw, size, seed) for kind in KINDS]
    for seed, (grid, size) in enumerate([((5, 9), (40, 72)), ((32, 32), (256, 256))][: 1 if is_small else 2]):
        checks += check_postprocess(device, grid, size, seed)
    return checks
