"""anomalib's own PatchCore through `inspectd import`: `make test-anomalib`, in an environment of its own (several GB).

Not part of `make test`. What is shown: its export as it comes by default, with normalisation and thresholds inside; the
advice for weights in a second file; the same maps as anomalib's own in torch; a limit of ours. INSPECTD_PEER_PYTHON
names an environment that has anomalib already.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from bench.peer_anomalib import make_environment
from bench.record import ROOT
from daemon.bundle import FP16_NETWORKS, NETWORKS, open_bundle
from daemon.keys import load_trusted
from examples.parts import write_dataset
from trainer.backbone import _packaged_lite0
from trainer.plans import convert_to_fp16

_WORKER = Path(__file__).with_name("anomalib_worker.py")


@pytest.fixture(scope="session")
def place():
    with tempfile.TemporaryDirectory(prefix="inspectd-anomalib-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def parts(place):
    """What the model is trained and tested on, and good parts that it does not know."""
    write_dataset(place / "parts", good_train=24, good_test=8, defects_each=4, kinds=["dent", "stain"], color=True)
    write_dataset(
        place / "line", good_train=45, good_test=8, defects_each=6, kinds=["dent", "stain"], seed=1, color=True
    )
    return place / "parts"


@pytest.fixture(scope="session")
def exported(place, parts):
    """model.onnx, its weights beside it."""
    named = os.environ.get("INSPECTD_PEER_PYTHON")
    python = Path(named) if named else make_environment()
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(place / "home")}
    (place / "home").mkdir()
    command = [python, _WORKER, parts, _packaged_lite0(), place / "exported"]
    subprocess.run([str(word) for word in command], check=True, env=environment, cwd=place, timeout=1800)
    return place / "exported/weights/onnx/model.onnx"


def inspectd(place, *words):
    command = [sys.executable, "-m", "daemon", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=place, env=environment, timeout=900)


def import_(place, model, *more):
    good = place / "line/train/good"
    return inspectd(place, "import", model, "--product", "parts", "--good", good, "--pixels", "0..1", *more)


@pytest.fixture(scope="session")
def joined(place, exported):
    """As the refusal advises."""
    refused = import_(place, exported)
    assert refused.returncode == 65, refused.stderr
    advice = re.search(r"python -c (\".*\")", refused.stderr)
    assert advice is not None, refused.stderr
    subprocess.run(f"{sys.executable} -c {advice[1]}", shell=True, check=True, cwd=exported.parent)
    return exported.with_name("joined.onnx")


@pytest.fixture(scope="session")
def built(place, joined):
    done = import_(place, joined, "--test", place / "line")
    assert done.returncode == 0, done.stderr
    return Path(place, done.stdout.strip().splitlines()[-1]), done.stderr


@pytest.fixture(scope="session")
def bundle(place, built):
    return open_bundle(built[0], load_trusted(place / "keys/trusted.yaml"))


def test_input_and_output_are_found_and_said(built):
    assert "taken as 256 x 256, RGB, pixels 0..1" in built[1]
    assert "output taken: 'anomaly_map'" in built[1]
    for name in ("pred_score", "pred_label", "pred_mask"):
        assert f"output not taken: '{name}'" in built[1]


def test_maps_are_those_of_anomalib_in_torch(place, parts, bundle):
    done = inspectd(place, "score", bundle.folder, parts / "test", "--maps", place / "ours")
    assert done.returncode == 0, done.stderr
    standard = bundle.manifest.fusion.standardisation["map"]
    compared = 0
    for path in sorted((place / "exported/maps").rglob("*.npy")):
        theirs = np.load(path)
        ours = np.load(place / "ours" / path.parent.name / path.name) * standard.scale + standard.centre
        np.testing.assert_allclose(ours, theirs, atol=2e-3)
        compared += 1
    assert compared == 16


def test_an_export_as_advised_is_one_file_and_computes_each_frame_once(place, exported, bundle):
    done = import_(place, place / "exported/single/weights/onnx/model.onnx", "--out", place / "single")
    assert done.returncode == 0, done.stderr
    assert "is fixed at a batch" not in done.stderr
    single = open_bundle(place / done.stdout.strip().splitlines()[-1], load_trusted(place / "keys/trusted.yaml"))
    limits = [each.manifest.products["parts"].limit for each in (single, bundle)]
    assert limits[0] == pytest.approx(limits[1], rel=1e-3)


def test_it_can_be_brought_to_fp16(bundle, tmp_path):
    (tmp_path / NETWORKS).write_bytes(bundle.read(NETWORKS))
    convert_to_fp16(tmp_path / NETWORKS, tmp_path / FP16_NETWORKS, (0.0, 1.0))
    assert (tmp_path / FP16_NETWORKS).stat().st_size < 0.6 * (tmp_path / NETWORKS).stat().st_size


def test_parts_that_the_model_does_not_know_are_judged(place, bundle):
    done = inspectd(place, "evaluate", bundle.folder, place / "line")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["imageAuroc"] > 0.9
    assert figures["pixelAuroc"] > 0.9
    assert bundle.manifest.products["parts"].n == 36
    assert bundle.manifest.metrics["imageAuroc"] == pytest.approx(figures["imageAuroc"])
