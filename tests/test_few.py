"""Engines from a handful of images: how they are told apart, varied, scored, and what such an engine promises."""

from __future__ import annotations

import shutil
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from time import monotonic

import cv2
import numpy as np
import pytest
import torch
from safetensors.numpy import load, save
from torch import nn

from daemon.bundle import BANK, CALIBRATION, NETWORKS, Preprocessing, open_bundle
from daemon.errors import DataError
from daemon.inspection.backend import open_backend
from daemon.inspection.golden import check_golden
from daemon.inspection.pipeline import Pipeline
from daemon.keys import load_trusted
from examples.parts import render_part
from trainer import dataset
from trainer.backbone import Backbone
from trainer.calibrate import GoodScores, conformal_limit, conformal_rank
from trainer.dataset import Picture
from trainer.draft import Draft, open_draft
from trainer.export import EngineNetwork, export_network
from trainer.few import FewImages, leave_one_out, vary
from trainer.finish import find_doubts
from trainer.settings import FEW_IMAGES, Settings
from trainer.site import Options, Site


def write_parts(folder, count, first=0):
    folder.mkdir(parents=True)
    for seed in range(first, first + count):
        assert cv2.imwrite(str(folder / f"{seed}.png"), render_part(seed, size_hw=(64, 64))[0])
    return folder


# Which sets are few


@pytest.fixture
def scanned(monkeypatch):
    """A folder's name is the number of images in it."""

    def scan(folder, _threads):
        return [Picture(Path(f"{index}.png"), (8, 8), f"{folder}-{index}") for index in range(int(folder.name))], []

    monkeypatch.setattr(dataset, "scan", scan)


@pytest.mark.parametrize("count", [1, 5, 20, FEW_IMAGES - 1])
def test_few_images_are_not_divided(scanned, count):
    splits = dataset.split(Path(str(count)), None, None, 1)
    assert splits.few
    assert splits.train == splits.select == splits.calibrate
    assert len(splits.train) == count
    assert splits.leaked == 0


def test_thirty_images_are_divided(scanned):
    splits = dataset.split(Path(str(FEW_IMAGES)), None, None, 1)
    assert not splits.few
    assert splits.counts == {"train": 18, "select": 2, "calibrate": 10}


def test_folders_that_are_given_are_kept_however_few(scanned):
    splits = dataset.split(Path("5"), None, Path("4"), 1)
    assert not splits.few
    assert splits.counts == {"train": 4, "select": 1, "calibrate": 4}
    assert not dataset.split(Path("6"), Path("2"), None, 1).few


def test_no_image_is_an_error(scanned):
    with pytest.raises(DataError, match="found 0 readable images"):
        dataset.split(Path("0"), None, None, 1)


def test_copies_among_few_images_are_counted(tmp_path):
    folder = write_parts(tmp_path / "good", 3)
    shutil.copy(folder / "0.png", folder / "3.png")
    splits = dataset.split(folder, None, None, 1)
    assert splits.few
    assert splits.leaked == 1
    scores = np.array([1.0, 2.0, 3.0, 1.0], np.float32)
    draft = Draft(Preprocessing(size=(64, 64), mean=(0,) * 3, std=(1,) * 3), (8, 8), Settings())
    doubts = find_doubts(splits, replace(draft, product=conformal_limit(scores, 0.5)), GoodScores(scores, scores))
    assert "1 of the images are copies" in " ".join(doubts)


# Variations


def picture(seed=0):
    gray = render_part(seed, size_hw=(64, 96))[0].astype(np.float32)
    return np.repeat(gray[:, :, None], 3, axis=2)


@pytest.mark.parametrize(
    "image", [picture(), np.full((64, 64, 3), 255.0, np.float32), np.zeros((32, 64, 3), np.float32)]
)
def test_variations_stay_in_range(image):
    rng = np.random.default_rng(0)
    for _ in range(20):
        varied = vary(image, rng)
        assert varied.shape == image.shape
        assert varied.dtype == np.float32
        assert varied.min() >= 0.0
        assert varied.max() <= 255.0


def test_variations_differ_a_little():
    image, rng = picture(), np.random.default_rng(0)
    changes = [float(np.abs(vary(image, rng) - image).mean()) for _ in range(20)]
    other = float(np.abs(picture(1) - image).mean())
    assert min(changes) > 0.5  # grey levels
    assert max(changes) < 25.0
    assert len(set(changes)) == 20
    assert np.median(changes) < 2 * other  # no more than parts of the same kind do, or so
    np.testing.assert_array_equal(vary(image, np.random.default_rng(5)), vary(image, np.random.default_rng(5)))
    np.testing.assert_array_equal(image, picture())


# Leaving one out


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 8, 8), nn.Conv2d(12, 8, 2, 2)

    def forward(self, image):
        fine = torch.relu(self.first(image))
        return [fine, torch.relu(self.second(fine))]


@pytest.fixture
def grounds(tmp_path):
    """make(count) -> (options, site, pictures, draft) with a network, and a bank of all images."""

    def make(count):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            backbone = Backbone("tiny", Tiny().eval().requires_grad_(False), (127.5,) * 3, (127.5,) * 3)
        folder = tmp_path / "site"
        folder.mkdir()
        pictures = dataset.scan(write_parts(tmp_path / "good", count), 1)[0]
        grid = export_network(EngineNetwork(backbone), (64, 64), folder / NETWORKS)
        preprocessing = Preprocessing(size=(64, 64), mean=backbone.mean, std=backbone.std)
        draft = Draft(preprocessing, grid, Settings(64, coreset=100, k=3), branches=("ldknn",))
        fields = dict.fromkeys(Options.__dataclass_fields__)
        options = Options(**(fields | {"name": "part", "good": tmp_path / "good", "threads": 1, "seed": 0}))
        site = Site(folder, "1", datetime.now(timezone.utc), monotonic(), None, ())
        (folder / BANK).write_bytes(save(FewImages(options, site, pictures, draft).bank().tensors))
        return options, site, pictures, draft

    return make


@pytest.mark.parametrize("count", [1, 2, 4])
def test_each_image_is_scored_and_the_bank_put_back(grounds, count):
    ground = grounds(count)
    folder, before = ground[1].folder, (ground[1].folder / BANK).read_bytes()
    scores = leave_one_out(*ground)
    assert scores.shape == (count,)
    assert scores.dtype == np.float32
    assert np.isfinite(scores).all()
    assert len(set(scores.tolist())) == count
    assert (folder / BANK).read_bytes() == before
    np.testing.assert_array_equal(leave_one_out(*ground), scores)


def test_added_images_are_in_every_bank_and_have_no_score(grounds, tmp_path):
    options, site, pictures, draft = grounds(3)
    more = dataset.scan(write_parts(tmp_path / "added", 2, first=50), 1)[0]
    assert leave_one_out(options, site, pictures, draft, more).shape == (3,)
    draft = replace(draft, settings=Settings(64, coreset=100_000, k=3, alpha=0.0))  # every patch
    few = FewImages(options, site, pictures, draft, more)
    rows = few.bank(1).core

    def holds(patches):
        return all((np.abs(rows - patch).sum(1) < 1e-4).any() for patch in patches.reshape(-1, rows.shape[1])[::7])

    assert holds(few._added)
    assert holds(few._features[[0, 2], 0])
    assert not holds(few._features[1, 0])


def test_score_with_the_image_left_out_is_higher_than_with_it(grounds):
    options, site, pictures, draft = grounds(4)
    draft = replace(draft, settings=Settings(64, coreset=10_000, k=3, alpha=0.0))  # every patch, its bare distance
    (site.folder / BANK).write_bytes(save(FewImages(options, site, pictures, draft).bank().tensors))
    pipeline = open_draft(options, site, draft)
    own = [pipeline.anomaly_map(dataset.read_frame(found.path)).score for found in pictures]
    pipeline.backend.close()
    assert np.all(leave_one_out(options, site, pictures, draft) > np.array(own))


def test_bank_without_an_image_holds_none_of_its_patches(grounds):
    options, site, pictures, draft = grounds(3)
    few = FewImages(options, site, pictures, draft)
    features = few._features[1].reshape(-1, few._features.shape[-1])
    for without, is_there in ((None, True), (0, True), (1, False)):
        core = few.bank(without).core
        assert core.shape == (100, features.shape[1])
        nearest = np.square(core[:, None] - features[None]).sum(2).min(1)
        assert bool((nearest == 0).any()) is is_there
    tensors = [load(others) for others, _ in few.held_out()]
    assert len(tensors) == 3
    np.testing.assert_array_equal(tensors[1]["core"], few.bank(1).core)


def test_enough_images_are_not_for_this(grounds):
    options, site, pictures, draft = grounds(1)
    with pytest.raises(ValueError, match="fewer than 30"):
        FewImages(options, site, pictures * FEW_IMAGES, draft)


# The whole build


@pytest.mark.parametrize(("count", "supported"), [(1, 0.5), (4, 0.2)])
def test_build_from_few_images_says_what_it_can_promise(tmp_path, run_here, count, supported):
    good = write_parts(tmp_path / "good", count)
    code, out, err = run_here(
        "part", "--good", good, "--out", tmp_path / "engines", "--keys", tmp_path / "keys", "--budget", 0, "--size", 64,
        "--threads", 1,
    )  # fmt: skip
    assert code in (0, None), err
    bundle = open_bundle(Path(out.strip()), load_trusted(tmp_path / "keys/trusted.yaml"))
    product = bundle.manifest.products["part"]
    assert product.n == count
    assert product.supportedFalseReject == pytest.approx(supported)
    assert product.bound95 == pytest.approx(conformal_rank(count, 0.01).bound95)
    assert bundle.manifest.branches == ["ldknn"]
    assert bundle.manifest.training["images"] == {"train": count, "select": count, "calibrate": count}
    assert len(load(bundle.read(CALIBRATION))["part"]) == count
    # Golden frames are held to a fraction of this distance: one float32 step would pass on no other machine.
    assert product.limit - product.medianGood > 0.01 * abs(product.limit)
    assert "repair: left out" in err
    warnings = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert any(f"{supported:.2%}" in line for line in warnings)
    assert any(f"{count} good images are too few to divide" in line for line in warnings)
    pipeline = Pipeline(bundle, open_backend(bundle, "cpu", "f32", 1))
    assert check_golden(pipeline) <= 1.0
    outcomes = {frame.outcome for frame in bundle.manifest.golden.frames}
    assert outcomes == {"PASS", "REJECT"}
    pipeline.backend.close()


def test_repair_alone_needs_more_images(tmp_path, run_here):
    good = write_parts(tmp_path / "good", 2)
    code, out, err = run_here(
        "part", "--good", good, "--out", tmp_path / "engines", "--keys", tmp_path / "keys", "--budget", 0, "--size", 64,
        "--branches", "repair",
    )  # fmt: skip
    assert code == 64
    assert out == ""
    assert "found 2 good images, wanted 30 or more for repair alone" in err
    assert not any((tmp_path / "engines/part").iterdir())
