"""The GPU check's own checks: right kernels pass, wrong ones do not, and without a GPU it says so."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import gpu_backend
from bench.gpu_check import report
from bench.gpu_parity import Check, check_all, exact_nearest
from tests.emulator import launch, load
from tests.fake_cuda import Gpu, install

ROOT = Path(__file__).parents[1]


class Emulated:
    """bench.gpu_parity.Device on the emulator."""

    multiprocessors = 2
    has_group_product = True

    def __init__(self, spoil=None):
        self._spoil = spoil

    def put(self, values):
        return np.ascontiguousarray(values).copy()

    def get(self, held):
        return held

    def launch(self, name, grid, block, *arguments, shared=0):
        launch(load("inspectd"), name, grid, block, *arguments)
        if self._spoil is not None and self._spoil[0] == name:
            self._spoil[1](arguments)


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++")


@needs_compiler
def test_right_kernels_pass_every_check(capsys):
    checks = check_all(Emulated(), is_small=True)
    assert report(checks), capsys.readouterr().out
    said = capsys.readouterr().out
    for kernel in (
        "ldknn 130 x 300 x 40",
        "ldknn_int8 130 x 300 x 40",
        "ldknn_sm90 130 x 300 x 40",
        "ties",
        "mono8",
        "mono16",
        "rgb8",
        "bgr8",
        "bayerrg8",
        "postprocess",
    ):
        assert kernel in said


@needs_compiler
@pytest.mark.parametrize(
    ("kernel", "spoil", "named"),
    [
        ("ldknn_finish", lambda a: a[5].__setitem__(slice(0, 5), 0), "winners"),
        ("ldknn_finish", lambda a: a[4].__setitem__(0, a[4][0] + 0.1), "score of the winner"),
        ("ldknn_int8_finish", lambda a: a[5].__setitem__(slice(0, 5), 0), "ldknn_int8 130 x 300 x 40: winners"),
        ("ldknn_int8_finish", lambda a: a[4].__setitem__(0, a[4][0] + 0.1), "score of the winner"),
        ("ldknn_search_sm90", lambda a: a[3].__setitem__(slice(0, 5), 2**64 - 1), "ldknn_sm90 130 x 300 x 40: winners"),
        ("preprocess_rgb8", lambda a: a[1].__setitem__((0, 0, 0), np.nan), "preprocess rgb8"),
        ("preprocess_mono16", lambda a: a[1].__setitem__((0, 0), a[1][0, 0] + 0.1), "preprocess mono16"),
        ("postprocess", lambda a: a[12].__setitem__((3, 3), 99.0), "map"),
        ("postprocess", lambda a: a[13].__setitem__((3, 0), a[13][3, 0] ^ 4), "mask"),
        ("postprocess", lambda a: a[14].__setitem__(0, 0), "score is not"),
    ],
)
def test_wrong_kernel_fails_its_check(kernel, spoil, named):
    failed = [check.what for check in check_all(Emulated((kernel, spoil)), is_small=True) if not check.holds]
    assert failed
    assert any(named in what for what in failed), failed


@needs_compiler
def test_backend_passes_its_own_check_with_the_networks_left_out(monkeypatch, capsys):
    gpu = install(monkeypatch, Gpu(), tensorrt=None)
    assert report(gpu_backend.check_backend((64, 64), (8, 8), 300, [(64, 64), (80, 70), (66, 64), (64, 90), (70, 64)]))
    assert gpu.log.count("graph closed") == 7  # three made room, four were closed at the end
    assert gpu.log[-1] == "detach"


def test_nan_fails_a_check():
    assert not Check("x", float("nan"), 1.0).holds
    assert not Check("x", float("nan"), 0.5, is_least=True).holds


def test_exact_nearest_is_brute_force():
    rng = np.random.default_rng(0)
    queries, rows = rng.normal(size=(20, 5)), rng.normal(size=(9000, 5))
    squared = ((queries[:, None] - rows[None]) ** 2).sum(2)
    found, best = exact_nearest(queries, rows)
    np.testing.assert_array_equal(found, squared.argmin(1))
    np.testing.assert_allclose(best, squared.min(1), rtol=1e-9)


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="a GPU may be here")
@pytest.mark.parametrize("command", [["bash", "bench/gpu_check.sh"], [sys.executable, "-m", "bench.gpu_check"]])
def test_without_a_gpu_it_says_so_and_ends_with_69(command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 69, done.stderr
    assert "nothing was checked" in done.stderr
