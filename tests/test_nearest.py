"""The CPU's searches (pruned, whole in float32, in blocks in bf16) against distances in float64."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest

from daemon.inspection.backend import nearest, pruned
from daemon.inspection.backend.nearest import NearestRows
from daemon.inspection.backend.pruned import PrunedRows
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


def library() -> Any:
    found = pruned.load_library()
    if found is None and shutil.which("cc") is None:
        pytest.skip("no C compiler: the pruned search was not compiled")
    assert found is not None, "there is a C compiler, and the pruned search is not compiled: install again"
    return found


LIBRARY = pruned.load_library()
# Every form that this machine can run; where none was compiled, library() says whether one should have been.
FORMS = pruned.FORMS[:1] if LIBRARY is None else pruned.forms_here(LIBRARY)
each_form = pytest.mark.parametrize("form", FORMS)


def prune(core: Array, queries: Array, form: str, threads: int = 1) -> PrunedRows:
    return PrunedRows(library(), {"core": core}, ov.Tensor(queries, shared_memory=True), threads, form)


def search(bank: dict[str, Array], queries: Array, precision: str) -> tuple[Any, Array]:
    if precision in pruned.FORMS:
        return prune(bank["core"], queries, precision).find()
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1}
    return NearestRows(bank, ov.Tensor(queries, shared_memory=True), options).find()


@pytest.fixture(params=["f32", "bf16", *FORMS])
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All searches, the pruned one in each form; where the processor has no bf16, OpenVINO computes the second one in float32."""
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
    if precision in pruned.FORMS:  # as the bound is one, only the rounding of distances themselves is left
        bound = 2 * (CHANNELS + 3) * UNIT["f32"] * table
    elif precision == "f32":
        bound = 2 * (CHANNELS + 4) * UNIT["f32"] * (np.abs(q) @ np.abs(core).T + 0.5 * (core**2).sum(1))
    else:
        q, core = q - core.mean(0), core - core.mean(0)
        bound = 2 * UNIT["bf16"] * (2.01 * np.abs(q) @ np.abs(core).T + 0.51 * table) + 1e-5 * (q**2).sum(1)[:, None]
    excess = table[patches, found] - table[patches, best]
    assert (excess <= bound[patches, found] + bound[patches, best]).all()
    assert np.allclose(distance_sq, table[patches, found], rtol=(CHANNELS + 3) * UNIT["f32"])
    assert (found == best).mean() > (0.98 if precision == "bf16" else 0.99)


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


# The pruned search alone


@each_form
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("patches", [1, 7, 8, 9, 31, 32, 33, 300])
def test_what_is_found_depends_neither_on_the_threads_nor_on_the_frame_before(
    form: str, threads: int, patches: int
) -> None:
    bank = bank_of(1300)
    queries = np.zeros((patches, CHANNELS), np.float32)
    searching = prune(bank["core"], queries, form, threads)
    frames = [queries_near(bank["core"], seed)[:patches] for seed in (1, 2, 1)]
    found = []
    for frame in frames:
        queries[:] = frame
        rows, distance_sq = searching.find()
        found.append((rows.copy(), distance_sq.copy()))
    searching.close()
    alone = prune(bank["core"], frames[1], form).find()
    for one, other in ((found[0], found[2]), (found[1], alone)):
        assert np.array_equal(one[0], other[0])
        assert np.array_equal(one[1], other[1])


@each_form
def test_of_equally_near_rows_the_first_is_found(form: str) -> None:
    bank = bank_of(1300)
    for row in (40, 700, 1299):
        bank["core"][row] = bank["core"][5]
    queries = np.repeat(bank["core"][[5]], 9, axis=0)
    rows, distance_sq = prune(bank["core"], queries, form).find()
    assert (rows == 5).all()
    assert (distance_sq == 0).all()


@each_form
@pytest.mark.parametrize("scale", [1e-18, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_no_near_row_is_ruled_out_by_rounding(form: str, scale: float, offset: float) -> None:
    """Far from the origin, tiny and huge: the bound is computed from rounded numbers, and must stay one."""
    rng = np.random.default_rng(4)
    core = (scale * (offset + rng.normal(size=(999, 152)))).astype(np.float32)
    queries = (core[rng.integers(999, size=200)] + scale * rng.normal(0, 0.5, (200, 152))).astype(np.float32)
    rows, _ = prune(core, queries, form).find()
    exact = np.square(queries[:, None].astype(np.float64) - core[None]).sum(2)
    patches = np.arange(200)
    best = exact.min(1)
    assert (exact[patches, rows] <= best * (1 + 200 * UNIT["f32"])).all()


@each_form
def test_slack_is_what_keeps_the_nearest_row(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few dimensions in many channels: the bound is the product itself, and only the slack is between it and a miss."""
    rng = np.random.default_rng(6)
    one = rng.normal(size=(1500, 40))
    pairs = np.concatenate([one, one + 0.005 * rng.normal(size=one.shape)])
    core = (pairs @ np.linalg.qr(rng.normal(size=(512, 40)))[0].T).astype(np.float32)
    queries = (core[:1500] + np.float32(0.495) * (core[1500:] - core[:1500])).astype(np.float32)
    exact = np.stack([np.square(queries.astype(float) - half).sum(1) for half in (core[:1500], core[1500:])])
    assert (exact[0] < exact[1]).all()
    rows, _ = prune(core, queries, form).find()
    assert np.array_equal(rows, np.arange(1500))
    monkeypatch.setattr(pruned, "_UNIT", 0.0)
    monkeypatch.setattr(pruned, "_BF16_PAIR", 0.0)
    assert not np.array_equal(prune(core, queries, form).find()[0], np.arange(1500))


@each_form
def test_bank_that_lies_in_one_point_or_on_a_line_is_searched(form: str) -> None:
    for core in (np.full((60, 152), 3.0), np.outer(np.arange(60), np.ones(152))):
        bank = {"core": core.astype(np.float32)}
        queries = np.ascontiguousarray(bank["core"][[0, 20, 59]])
        rows, distance_sq = prune(bank["core"], queries, form).find()
        assert (distance_sq == 0).all()
        assert np.array_equal(bank["core"][rows], queries)


@each_form
def test_rows_that_are_far_are_not_measured(form: str) -> None:
    """A search that measured them would find the same, slowly. So they are made the nearest behind its back."""
    core = bank_of(1300)["core"]
    query = core[-1].copy()
    distance_sq = np.square(core - query).sum(1)
    far = distance_sq > np.quantile(distance_sq, 0.1)
    far[0] = False  # is where every patch begins
    searching = prune(core, np.repeat(query[None], 40, axis=0), form)
    core[far] = query  # measured rows are read from here, their bounds are not
    rows, _ = searching.find()
    assert (rows == len(core) - 1).all()


_MATRIX_UNIT = """
#include <immintrin.h>
__attribute__((target("amx-tile"))) void set_up(const char *config) {
    __asm__ volatile("ldtilecfg %0" : : "m"(*(const char(*)[64])config));
}
__attribute__((target("amx-tile"))) void read_back(char *config) {
    __asm__ volatile("sttilecfg %0" : "=m"(*(char(*)[64])config));
}
"""


@pytest.mark.skipif("amx" not in FORMS, reason="this processor has no AMX")
def test_amx_leaves_the_matrix_unit_as_it_found_it(tmp_path: Path) -> None:
    """OpenVINO may keep the unit's set-up from one bf16 call to the next, in the same thread."""
    (tmp_path / "unit.c").write_text(_MATRIX_UNIT)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "unit.so", tmp_path / "unit.c"], check=True)
    unit = ctypes.CDLL(str(tmp_path / "unit.so"))
    bank = bank_of(1300)
    searching = prune(bank["core"], queries_near(bank["core"]), "amx")
    theirs = bytes(
        [1] + 15 * [0] + 8 * [32, 0] + 16 * [0] + 8 * [7] + 8 * [0]
    )  # palette 1, eight tiles of 7 x 32 bytes
    unit.set_up(theirs)
    searching.find()
    after = ctypes.create_string_buffer(64)
    unit.read_back(after)
    assert after.raw == theirs


def test_a_small_bank_does_without_the_matrix_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    for forms, few, many in ((pruned.FORMS, "avx512", "amx"), (pruned.FORMS[:1], "portable", "portable")):
        monkeypatch.setattr(pruned, "forms_here", lambda _, forms=forms: forms)
        assert [pruned.choose_form(library(), rows) for rows in (500, 4000)] == [few, many]


def test_without_a_usable_compiled_search_there_is_none_to_load(tmp_path: Path, caplog: Any) -> None:
    assert pruned.load_library(tmp_path) is None
    (tmp_path / f"_nearest{pruned.EXTENSION_SUFFIXES[0]}").write_bytes(b"for another machine")
    assert pruned.load_library(tmp_path) is None
    assert "OpenVINO searches" in caplog.text


def test_a_library_left_over_from_another_version_is_not_used(tmp_path: Path, caplog: Any) -> None:
    library()
    for number, text in enumerate(
        ("int inspectd_nearest(void) { return 0; }", "int inspectd_nearest_interface(void) { return 1; }")
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "old.c").write_text(text)
        target = folder / f"_nearest{pruned.EXTENSION_SUFFIXES[0]}"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", target, folder / "old.c"], check=True)
        assert pruned.load_library(folder) is None
        assert f"{target} is another version's" in caplog.text


def test_doctor_says_whether_the_search_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from daemon.machine import examine_machine

    form = pruned.forms_here(library())[-1]
    assert f"ok    compiled search: yes, {form}" in {str(finding) for finding in examine_machine()}
    monkeypatch.setattr(pruned, "load_library", lambda: None)
    (told,) = (finding for finding in examine_machine() if "compiled search" in str(finding))
    assert told.state == "WARN"
    assert "C compiler" in str(told)
