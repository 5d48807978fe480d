"""The CPU's search, whole in float32 and in blocks in bf16, against distances in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
import pytest

from daemon.inspection.backend import nearest
from daemon.inspection.backend.nearest import NearestRows
from tests import reference

CHANNELS, PATCHES = 24, 300
BF16 = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
UNIT = {"f32": 2.0**-24, "bf16": 2.0**-9}
Array = np.ndarray[Any, np.dtype[np.float32]]


def bank_of(rows: int, seed: int = 0) -> dict[str, Array]:
    """Like features: not negative, far from the origin, in clusters, so that near rows are many."""
    rng = np.random.default_rng(seed)
    kinds = rng.normal(5, 2, (max(1, rows // 8), CHANNELS))
    core = np.abs(kinds[rng.integers(len(kinds), size=rows)] + rng.normal(0, 0.3, (rows, CHANNELS))).astype(np.float32)
    return {"core": core, "bias": (-0.5 * (core.astype(float) ** 2).sum(1)).astype(np.float32)}


def queries_near(core: Array, seed: int = 1) -> Array:
    rng = np.random.default_rng(seed)
    near = core[rng.integers(len(core), size=PATCHES)] + rng.normal(0, 0.3, (PATCHES, CHANNELS))
    return np.abs(near).astype(np.float32)


def search(bank: dict[str, Array], queries: Array, precision: str) -> tuple[Any, Array]:
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1}
    return NearestRows(bank, ov.Tensor(queries, shared_memory=True), options).find()


@pytest.fixture(params=["f32", "bf16"])
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both searches; where the processor has no bf16, OpenVINO computes the second one in float32."""
    return str(request.param)


@pytest.mark.parametrize("rows", [1, 2, 511, 512, 513, 1300, 4000])
def test_row_is_the_nearest_or_as_near_as_the_precision_tells(precision: str, rows: int) -> None:
    bank = bank_of(rows)
    queries = queries_near(bank["core"])
    found, distance_sq = search(bank, queries, precision)
    table = reference.distances_sq(queries, bank["core"])
    patches, best = np.arange(PATCHES), table.argmin(1)
    # In float32 a similarity q.m - |m|^2 / 2 has C + 4 roundings of at most |q|.|m| + |m|^2 / 2. In bf16 both operands
    # of the centred product are rounded, and the result, which is minus half the squared distance; its pieces are not.
    # A squared distance is twice that, and two rows are compared.
    core, q = bank["core"].astype(float), queries.astype(float)
    if precision == "f32":
        bound = 2 * (CHANNELS + 4) * UNIT["f32"] * (np.abs(q) @ np.abs(core).T + 0.5 * (core**2).sum(1))
    else:
        q, core = q - core.mean(0), core - core.mean(0)
        bound = 2 * UNIT["bf16"] * (2.01 * np.abs(q) @ np.abs(core).T + 0.51 * table) + 1e-5 * (q**2).sum(1)[:, None]
    excess = table[patches, found] - table[patches, best]
    assert (excess <= bound[patches, found] + bound[patches, best]).all()
    assert np.allclose(distance_sq, table[patches, found], rtol=(CHANNELS + 3) * UNIT["f32"])
    assert (found == best).mean() > (0.99 if precision == "f32" else 0.98)


def test_rows_of_the_bank_find_themselves_in_every_block(precision: str) -> None:
    bank = bank_of(1300)
    picked = np.unique(np.concatenate([[0, 511, 512, 1023, 1024, 1299], np.arange(0, 1300, 5)]))
    found, distance_sq = search(bank, bank["core"][picked], precision)
    assert np.array_equal(found, picked)
    assert (distance_sq == 0).all()


def test_pieces_add_up_and_bf16_holds_each() -> None:
    values = np.concatenate([np.random.default_rng(0).normal(0, 1e3, 500), [0.0, -1e-20, 3e38]]).astype(np.float32)
    pieces = nearest._in_pieces(values)
    assert np.array_equal(pieces.astype(np.float64).sum(1), values.astype(np.float64))
    assert not (pieces.view(np.uint32) & 0xFFFF).any()


def test_features_that_are_no_numbers_give_distances_that_are_none(precision: str) -> None:
    bank = bank_of(1300)
    queries = queries_near(bank["core"])
    queries[7, 3], queries[9] = np.nan, np.inf
    _, distance_sq = search(bank, queries, precision)
    assert not np.isfinite(distance_sq[[7, 9]]).any()
    assert np.isfinite(np.delete(distance_sq, [7, 9])).all()
