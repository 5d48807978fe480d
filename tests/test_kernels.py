"""The CUDA kernels, on a CPU that plays the GPU's part (tests/emulator.h), against the NumPy references."""

from __future__ import annotations

import shutil

import cv2
import numpy as np
import pytest

from daemon.bundle import Preprocessing
from daemon.inspection.backend.cpu import normalise
from daemon.inspection.backend.search import KEPT, Int8Bank, quantise_bank
from daemon.inspection.backend.tables import banded, resampling, smoothing_operator
from daemon.types import Frame
from tests import reference
from tests.emulator import launch, load

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++")

BM, BN = 128, 128
THREADS = (256,)


# Nearest neighbour with local density


def pad(length, multiple):
    return -(-length // multiple) * multiple


class Search:
    """Queries and a bank as the backend lays them out on the device."""

    def __init__(self, features, core, density):
        self.features, self.core, self.density = (
            np.ascontiguousarray(a, np.float32) for a in (features, core, density)
        )
        (self.m, self.d), self.n = self.features.shape, len(self.core)
        self.padded, self.rows = pad(self.d, 32), pad(self.n, BN)
        self.bank = np.zeros((self.rows, self.padded), np.float16)
        self.bank[: self.n, : self.d] = self.core
        self.bias = np.full(self.rows, -3e38, np.float32)
        self.bias[: self.n] = -0.5 * np.square(self.bank[: self.n].astype(np.float64)).sum(1)

    def run(self, *, alpha=0.25, splits=1, late=False, kernel="ldknn_search"):
        library = load("inspectd")
        queries = np.full((self.m, self.padded), np.nan, np.float16)
        keys = np.full(self.m, 2**64 - 1, np.uint64)  # what the last frame left
        launch(library, "ldknn_round", (3,), THREADS, self.features, queries, keys, self.m, self.d, self.padded)
        tiles = -(-(self.rows // BN) // splits)
        launch(
            library, kernel, (-(-self.m // BM), splits), THREADS,
            queries, self.bank, self.bias, keys, self.m, self.rows, self.padded, tiles, late=late,
        )  # fmt: skip
        scores, winners = np.full(self.m, -1, np.float32), np.full(self.m, -7, np.int32)
        launch(
            library, "ldknn_finish", (-(-self.m // 8),), THREADS,
            self.features, self.core, self.density, keys, scores, winners, float(alpha), self.m, self.n, self.d,
        )  # fmt: skip
        return scores, winners


def random_search(m, n, d, seed=0):
    rng = np.random.default_rng(seed)
    # Non-negative and of very different norms, as features after a ReLU are.
    core = np.maximum(rng.normal(size=(n, d)), 0) * rng.uniform(0.2, 3.0, (n, 1))
    features = core[rng.integers(n, size=m)] + rng.normal(0, 0.3, (m, d))
    return Search(features, core, rng.random(n))


def assert_nearest(search, scores, winners, alpha):
    """The winner is the nearest, or as near to within FP16's rounding; its score is exact for that winner."""
    features, core = search.features.astype(np.float64), search.core.astype(np.float64)
    squared = ((features[:, None] - core[None]) ** 2).sum(2)
    rows = np.arange(search.m)
    # Rounding a vector to FP16 moves it by at most 2^-11 of its length, so a squared distance d^2 by 2 d e + e^2.
    moved = 2.0**-11 * (np.linalg.norm(features, axis=1) + np.linalg.norm(core, axis=1).max())
    nearest = squared.min(1)
    assert (squared[rows, winners] - nearest <= 4 * np.sqrt(nearest) * moved + 4 * moved**2 + 1e-5).all()
    assert (winners == squared.argmin(1)).mean() >= 0.97
    wanted = squared[rows, winners] - alpha * search.density.astype(np.float64)[winners]
    np.testing.assert_allclose(scores, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "d", "splits"),
    [(1, 1, 1, 1), (130, 300, 40, 2), (128, 128, 32, 1), (77, 513, 152, 5), (200, 700, 64, 3)],
)
def test_search_finds_the_nearest_row_and_its_score(m, n, d, splits, late):
    search = random_search(m, n, d)
    scores, winners = search.run(alpha=0.5, splits=splits, late=late)
    assert_nearest(search, scores, winners, 0.5)


def test_search_agrees_with_the_reference():
    search = random_search(20, 150, 24, seed=3)
    scores, winners = search.run(alpha=1.0)
    wanted, rows = reference.ldknn(search.features, search.core, search.density, 1.0)
    np.testing.assert_array_equal(winners, rows)
    np.testing.assert_allclose(scores, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("splits", [1, 2, 4])
def test_equal_rows_go_to_the_lowest_one(splits):
    rng = np.random.default_rng(1)
    core = rng.normal(size=(500, 16)).astype(np.float32)
    core[[133, 260, 499]] = core[7]  # other columns of a tile, other tiles, another split
    core[300] = core[299]
    search = Search(core[[7, 499, 300, 5]], core, np.zeros(500))
    for late in (False, True):
        scores, winners = search.run(alpha=0.0, splits=splits, late=late)
        assert list(winners) == [7, 7, 299, 5]
        np.testing.assert_array_equal(scores, 0.0)


def test_result_does_not_depend_on_the_splits():
    search = random_search(140, 900, 48, seed=5)
    first = search.run(splits=1)
    for splits in (2, 3, 8):
        again = search.run(splits=splits, late=True)
        np.testing.assert_array_equal(first[0], again[0])
        np.testing.assert_array_equal(first[1], again[1])


def test_more_splits_than_tiles_change_nothing():
    search = random_search(10, 100, 16)
    np.testing.assert_array_equal(search.run(splits=1)[1], search.run(splits=7)[1])


def test_nan_in_a_query_is_nan_in_its_score_alone():
    search = random_search(40, 200, 33, seed=2)
    search.features[11, 32] = np.nan
    scores, winners = search.run()
    assert np.flatnonzero(np.isnan(scores)).tolist() == [11]
    assert winners[11] == -1
    assert (winners[np.arange(40) != 11] >= 0).all()


def test_far_away_queries_keep_their_order():
    """Queries far outside the bank: large products, small differences."""
    rng = np.random.default_rng(7)
    core = (rng.normal(size=(256, 64)) + 20).astype(np.float32)
    search = Search(core[:50] + 0.05 * rng.normal(size=(50, 64)), core, rng.random(256))
    scores, winners = search.run(alpha=0.1)
    np.testing.assert_array_equal(winners, np.arange(50))
    assert_nearest(search, scores, winners, 0.1)


# The same by a warpgroup's products


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "d", "splits"),
    [(1, 1, 1, 1), (130, 300, 40, 2), (128, 128, 64, 1), (77, 513, 152, 5), (200, 700, 96, 3)],
)
def test_warpgroups_find_what_warps_find(m, n, d, splits, late):
    """On the emulator, which adds along the channels in both, to the last bit."""
    search = random_search(m, n, d)
    wanted = search.run(splits=splits)
    found = search.run(splits=splits, late=late, kernel="ldknn_search_sm90")
    np.testing.assert_array_equal(found[1], wanted[1])
    np.testing.assert_array_equal(found[0], wanted[0])
    assert_nearest(search, *found, 0.25)


@pytest.mark.parametrize("splits", [1, 2, 4])
def test_equal_rows_go_to_the_lowest_one_in_a_warpgroup(splits):
    rng = np.random.default_rng(1)
    core = rng.normal(size=(500, 16)).astype(np.float32)
    core[[133, 260, 499]] = core[7]
    search = Search(core[[7, 499, 300, 5]], core, np.zeros(500))
    scores, winners = search.run(alpha=0.0, splits=splits, kernel="ldknn_search_sm90")
    assert list(winners) == [7, 7, 300, 5]
    np.testing.assert_array_equal(scores, 0.0)


def test_nan_in_a_query_is_nan_in_its_score_alone_in_a_warpgroup():
    search = random_search(40, 200, 33, seed=2)
    search.features[11, 32] = np.nan
    scores, winners = search.run(kernel="ldknn_search_sm90")
    assert np.flatnonzero(np.isnan(scores)).tolist() == [11]
    assert winners[11] == -1


# The same in INT8


class WholeSearch(Search):
    """Quantised as the backend does, or with a scale of the test's own."""

    def __init__(self, features, core, density, *, inverse=None):
        super().__init__(features, core, density)
        self.whole = quantise_bank(self.core)
        if inverse is not None:
            rows = np.zeros_like(self.whole.rows)
            scaled = (self.core - self.whole.centre) * np.float32(inverse)
            rows[: self.n, : self.d] = np.clip(np.rint(scaled), -127, 127)
            bias = -((np.square(rows.astype(np.int64)).sum(1) + 1) // 2)
            bias[self.n :] = -(2**30)
            self.whole = Int8Bank(rows, bias.astype(np.int32), self.whole.centre, np.float32(inverse))

    def run(self, *, alpha=0.25, splits=1, late=False, kept=KEPT):
        library = load("ldknn_int8", *([] if kept == KEPT else [f"KEPT={kept}"]))
        rows, padded = self.whole.rows.shape
        queries, keys = np.full((self.m, padded), 99, np.int8), np.full((self.m, kept), 2**64 - 1, np.uint64)
        launch(
            library, "ldknn_int8_round", (3,), THREADS, self.features, self.whole.centre, queries, keys,
            float(self.whole.inverse), self.m, self.d, padded,
        )  # fmt: skip
        launch(
            library, "ldknn_int8_search", (-(-self.m // BM), splits), THREADS,
            queries, self.whole.rows, self.whole.bias, keys, self.m, rows, padded, -(-(rows // BN) // splits), late=late,
        )  # fmt: skip
        self.keys = keys
        scores, winners = np.full(self.m, -1, np.float32), np.full(self.m, -7, np.int32)
        launch(
            library, "ldknn_int8_finish", (-(-self.m // 8),), THREADS,
            self.features, self.core, self.density, keys, scores, winners, float(alpha), self.m, self.n, self.d,
        )  # fmt: skip
        return scores, winners

    def reference(self, alpha, kept=KEPT):
        whole = self.whole
        return reference.ldknn_int8(
            self.features, self.core, self.density, alpha, whole.centre, float(whole.inverse), kept
        )


def whole_search(m, n, d, seed=0, **options):
    made = random_search(m, n, d, seed)
    return WholeSearch(made.features, made.core, made.density, **options)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "d", "splits"),
    [(1, 1, 1, 1), (130, 300, 40, 2), (128, 128, 64, 1), (77, 513, 152, 5), (30, 3, 70, 1)],
)
def test_int8_search_is_its_reference_and_finds_the_nearest_row(m, n, d, splits, late):
    search = whole_search(m, n, d)
    scores, winners = search.run(alpha=0.5, splits=splits, late=late)
    wanted, rows = search.reference(0.5)
    np.testing.assert_array_equal(winners, rows)  # integers and float32 alone decide: no bound is needed
    np.testing.assert_allclose(scores, wanted, rtol=1e-5, atol=1e-5)
    _, exact = reference.ldknn(search.features, search.core, search.density, 0.5)
    assert (winners == exact).mean() >= 0.99


@pytest.mark.parametrize("kept", [1, 2, 4])
def test_int8_keeps_the_best_rows_in_order_whatever_the_splits(kept):
    """So coarse that most rows have equals: every order of blocks must name the same ones."""
    search = whole_search(60, 900, 40, seed=4, inverse=1.5)
    whole = search.whole
    scaled = (search.features - whole.centre) * whole.inverse
    queries = np.clip(np.rint(scaled), -127, 127).astype(np.int64)
    table = queries @ whole.rows[: search.n, : search.d].astype(np.int64).T + whole.bias[: search.n]
    order = np.argsort(-table, axis=1, kind="stable")[:, :kept]
    assert (np.diff(np.sort(table, axis=1)[:, ::-1][:, : kept + 1], axis=1) == 0).any()  # ties at the very edge
    for splits in (1, 2, 3, 8):
        scores, winners = search.run(splits=splits, late=splits % 2 == 0, kept=kept)
        np.testing.assert_array_equal(~search.keys.astype(np.uint32), order.astype(np.uint32))
        wanted, rows = search.reference(0.25, kept)
        np.testing.assert_array_equal(winners, rows)
        np.testing.assert_allclose(scores, wanted, rtol=1e-5, atol=1e-5)


def test_ranking_the_kept_rows_again_is_what_finds_the_nearest():
    """Coarse on purpose: INT8's own first row is often wrong, the nearest of the four is not."""
    search = whole_search(130, 600, 48, seed=6, inverse=6.0)
    _, exact = reference.ldknn(search.features, search.core, search.density, 0.0)
    shares = {kept: (search.run(kept=kept)[1] == exact).mean() for kept in (1, 2, 4)}
    assert shares[1] < shares[2] <= shares[4]
    assert shares[4] >= 0.99


@pytest.mark.parametrize("splits", [1, 2, 4])
def test_equal_rows_go_to_the_lowest_one_in_int8(splits):
    rng = np.random.default_rng(1)
    core = rng.normal(size=(500, 16)).astype(np.float32)
    core[[133, 134, 260, 261, 499]] = core[7]  # more equal ones than are kept
    core[300] = core[299]
    search = WholeSearch(core[[7, 499, 300, 5]], core, np.zeros(500))
    for late in (False, True):
        scores, winners = search.run(alpha=0.0, splits=splits, late=late)
        assert list(winners) == [7, 7, 299, 5]
        np.testing.assert_array_equal(scores, 0.0)


def test_nan_and_infinity_in_a_query_are_nan_in_its_score_alone_in_int8():
    search = whole_search(40, 200, 33, seed=2)
    search.features[11, 32], search.features[12, 0] = np.nan, np.inf
    scores, winners = search.run()
    assert np.flatnonzero(np.isnan(scores)).tolist() == [11, 12]
    assert winners[[11, 12]].tolist() == [-1, -1]
    assert (np.delete(winners, [11, 12]) >= 0).all()


def test_values_beyond_int8_are_cut_off_and_the_score_is_exact():
    """A query far outside the bank is still measured to a row of the bank, in f32."""
    search = whole_search(20, 300, 32, seed=8)
    search.features[3] *= 100.0
    scores, winners = search.run(alpha=0.0)
    own = np.square(search.features[3].astype(np.float64) - search.core[winners[3]]).sum()
    np.testing.assert_allclose(scores[3], own, rtol=1e-5)
    np.testing.assert_array_equal(winners, search.reference(0.0)[1])


def test_quantised_bank_is_within_half_a_unit_where_it_is_not_cut_off():
    core = random_search(1, 700, 40, seed=9).core
    whole = quantise_bank(core)
    assert whole.rows.shape == (768, 64)
    assert not whole.rows[700:].any()
    assert not whole.rows[:, 40:].any()
    back = whole.rows[:700, :40] / whole.inverse + whole.centre
    is_cut = np.abs(whole.rows[:700, :40]) == 127
    assert 0 < is_cut.mean() < 0.001
    assert np.abs(back - core)[~is_cut].max() <= 0.5001 / whole.inverse
    norms = np.square(whole.rows[:700].astype(np.int64)).sum(1)
    np.testing.assert_array_equal(whole.bias[:700], np.floor(-norms / 2))
    assert (whole.bias[700:] < whole.bias[:700].min() - 127 * 127 * 40).all()  # no padding row wins
    assert not quantise_bank(
        np.ones((3, 2), np.float32)
    ).rows.any()  # all rows alike: no scale, and no division by zero


# Preprocessing

MEAN, STD = (120.0, 125.0, 130.0), (60.0, 62.0, 64.0)


def run_preprocess(pixels, kind, size):
    rows, columns = (resampling(side, length) for side, length in zip(size, pixels.shape[:2], strict=True))
    to_eight_bit = 1 / 257 if pixels.dtype == np.uint16 else 1.0
    scale = np.array([to_eight_bit / std for std in STD], np.float32)
    offset = np.array([mean / std for mean, std in zip(MEAN, STD, strict=True)], np.float32)
    found = np.full((3, *size), np.nan, np.float16)
    launch(
        load("preprocess"), f"preprocess_{kind}", (-(-size[1] // 32), -(-size[0] // 8)), (32, 8),
        np.ascontiguousarray(pixels), found, rows.first, rows.weights, rows.taps,
        columns.first, columns.weights, columns.taps, scale, offset, *pixels.shape[:2], *size,
    )  # fmt: skip
    return found


def frame(kind, height, width, seed=0):
    rng = np.random.default_rng(seed)
    smooth = cv2.resize(rng.random((7, 9, 3)).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    pixels = np.clip(smooth * 220 + rng.normal(0, 8, smooth.shape), 0, 255)
    if kind == "mono16":
        return (pixels[:, :, :1] * 257).astype(np.uint16)
    return pixels[:, :, : 3 if kind in ("rgb8", "bgr8") else 1].astype(np.uint8)


def to_frame(pixels, kind):
    if kind == "bgr8":
        pixels = np.ascontiguousarray(pixels[:, :, ::-1])
    if kind == "bayerrg8":
        pixels = cv2.cvtColor(pixels[:, :, 0], cv2.COLOR_BayerRGGB2RGB)
    return Frame(pixels)


@pytest.mark.parametrize("size_hw", [(64, 64), (100, 73), (65, 331), (40, 50), (96, 30)])
@pytest.mark.parametrize("kind", ["mono8", "mono16", "rgb8", "bgr8", "bayerrg8"])
def test_preprocess_equals_the_cpus_to_one_level(kind, size_hw):
    pixels = frame(kind, *size_hw)
    found = run_preprocess(pixels, kind, (64, 64))
    wanted = normalise(to_frame(pixels, kind), Preprocessing(size=(64, 64), mean=MEAN, std=STD))[0]
    # One level of the frame's own pixels, and half a unit of FP16's last place at 4.
    level = (1 / 257 if kind == "mono16" else 1.0) / min(STD)
    # A side that grows while the other shrinks is rounded twice by OpenCV: two levels.
    is_mixed = min(size_hw) < 64 < max(size_hw)
    differences = np.abs(found.astype(np.float64) - wanted)
    assert differences.max() <= (2 if is_mixed else 1) * level + 2.0**-9
    if min(size_hw) >= 64 and kind != "mono16":  # OpenCV's bilinear weights have eleven bits, which moves more
        assert (differences > 2.0**-9).mean() < 0.02  # sums that lie at a half, and nothing else


def test_reference_of_a_mosaic_is_opencvs():
    mosaic = np.random.default_rng(0).integers(0, 256, (9, 12), np.uint8)
    np.testing.assert_array_equal(reference.demosaic(mosaic), cv2.cvtColor(mosaic, cv2.COLOR_BayerRGGB2RGB))


@pytest.mark.parametrize("kind", ["mono8", "rgb8"])
def test_preprocess_is_the_reference_rounded(kind):
    pixels = frame(kind, 90, 130)
    found = run_preprocess(pixels, kind, (32, 64))
    wanted = reference.normalise(pixels, (32, 64), MEAN, STD)[0]
    assert np.abs(found - wanted).max() <= 0.5 / min(STD) + 2.0**-9


@pytest.mark.parametrize(("size", "length"), [(8, 8), (8, 16), (8, 19), (8, 9), (7, 100), (8, 5), (9, 1), (256, 2448)])
def test_table_holds_the_whole_operator(size, length):
    table = resampling(size, length)
    dense = np.zeros((size, length))
    for row in range(size):
        for tap in range(table.taps):
            if table.weights[row, tap]:
                dense[row, table.first[row] + tap] += table.weights[row, tap]
    wanted = (reference.area_weights if size <= length else reference.bilinear_weights)(size, length)
    np.testing.assert_allclose(dense, wanted, atol=1e-6)
    assert table.weights.dtype == np.float32


# Postprocessing


def run_postprocess(repair, ldknn, grid, size, limit, sigma=4.0):
    rows, columns = (banded(smoothing_operator(side, cells, sigma)) for side, cells in zip(size, grid, strict=True))
    found = np.full(size, np.nan, np.float32)
    words = -(-size[1] // 32)
    mask, score = np.full((size[0], words), 0xFFFFFFFF, np.uint32), np.array([77], np.uint32)
    library = load("postprocess")
    launch(library, "postprocess_start", (1,), (1,), score)
    launch(
        library, "postprocess", (words, -(-size[0] // 8)), (32, 8), repair, ldknn, 0.5, 2.0, 0.25, 4.0,
        rows.first, rows.weights, rows.taps, columns.first, columns.weights, columns.taps,
        found, mask, score, float(limit), grid[1], *size,
    )  # fmt: skip
    bits = np.unpackbits(mask.view(np.uint8), axis=1, bitorder="little")[:, : size[1]].astype(bool)
    ordered = int(score[0])
    value = np.array([ordered ^ 0x80000000 if ordered >> 31 else ~ordered & 0xFFFFFFFF], np.uint32).view(np.float32)
    return found, bits, float(value[0])


@pytest.mark.parametrize(("grid", "size"), [((8, 8), (64, 64)), ((5, 9), (40, 72)), ((12, 4), (96, 32))])
@pytest.mark.parametrize("branches", ["both", "repair", "ldknn"])
def test_postprocess_gives_map_score_and_mask(grid, size, branches):
    rng = np.random.default_rng(0)
    repair, ldknn = (rng.normal(size=grid[0] * grid[1]).astype(np.float32) for _ in range(2))
    fused = np.zeros(grid[0] * grid[1])
    if branches != "ldknn":
        fused += (repair - 0.5) * 2.0
    if branches != "repair":
        fused += (ldknn - 0.25) * 4.0
    down, across = (smoothing_operator(side, cells, 4.0) for side, cells in zip(size, grid, strict=True))
    wanted = down @ fused.reshape(grid) @ across.T
    limit = float(np.quantile(wanted, 0.9))
    found, mask, score = run_postprocess(
        None if branches == "ldknn" else repair, None if branches == "repair" else ldknn, grid, size, limit
    )
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert score == found.max()
    np.testing.assert_array_equal(mask, found >= np.float32(limit))
    assert 0.05 < mask.mean() < 0.15


def test_negative_scores_keep_their_order():
    found, mask, score = run_postprocess(None, np.full(64, -3.0, np.float32), (8, 8), (64, 64), 0.0)
    assert score == found.max() < -10
    assert not mask.any()


def test_nan_is_the_largest_score_of_all():
    values = np.zeros(64, np.float32)
    values[9] = -np.float32(np.nan)
    _, _, score = run_postprocess(None, values, (8, 8), (64, 64), 1.0)
    assert np.isnan(score)
