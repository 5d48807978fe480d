"""The trainer: reading and splitting images, coreset and density, the conformal limit, and a whole build."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.bundle import current_bundle, open_bundle
from daemon.errors import BundleError, ConfigError, DataError, UsageError
from daemon.inspection.backend import open_backend
from daemon.inspection.golden import check_golden
from daemon.inspection.pipeline import Pipeline
from daemon.keys import load_trusted, make_signing_key
from daemon.types import Frame, Outcome
from examples.parts import write_dataset
from trainer import bank, calibrate, dataset
from trainer.calibrate import conformal_limit, conformal_rank
from trainer.dataset import Picture
from trainer.evaluate import command as evaluate_command
from trainer.evaluate import evaluate
from trainer.golden import _paste_ellipse
from trainer.site import _reserve, open_site

ROOT = Path(__file__).resolve().parent.parent


def build(*arguments):
    """Run the command as a user does; stdout, stderr and exit code."""
    call = [sys.executable, ROOT / "build_engines.py", *map(str, arguments)]
    return subprocess.run(call, capture_output=True, text=True, cwd=ROOT, check=False, timeout=120)


def picture(height, width):
    return Picture(Path("x.png"), (height, width), "")


def write_noise(path, shape=(8, 8), dtype=np.uint8, seed=0):
    pixels = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, endpoint=True).astype(dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)
    return pixels


# Reading


def test_names_sort_in_capture_order():
    names = ["part10.png", "part2.png", "Part1.png", "part01.png", "2.png", "10.png", "part2b.png"]
    assert sorted(names, key=dataset.natural_key) == [
        "2.png", "10.png", "Part1.png", "part01.png", "part2.png", "part2b.png", "part10.png",
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".tiff"])
def test_gray_images_are_read_as_stored(tmp_path, suffix):
    pixels = write_noise(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(dataset.read_frame(tmp_path / f"a{suffix}").pixels, pixels[:, :, None])


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_sixteen_bit_images_keep_their_values(tmp_path, suffix):
    pixels = write_noise(tmp_path / f"a{suffix}", dtype=np.uint16) // 16
    cv2.imwrite(str(tmp_path / f"a{suffix}"), pixels)
    found = dataset.read_frame(tmp_path / f"a{suffix}").pixels
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found[:, :, 0], pixels)


def test_color_is_rgb_and_alpha_is_dropped(tmp_path):
    bgra = write_noise(tmp_path / "a.png", (8, 8, 4))
    np.testing.assert_array_equal(dataset.read_frame(tmp_path / "a.png").pixels, bgra[:, :, 2::-1])


def test_float_pixels_are_refused(tmp_path):
    cv2.imwrite(str(tmp_path / "a.tiff"), np.ones((8, 8), np.float32))
    with pytest.raises(DataError, match="float32"):
        dataset.read_frame(tmp_path / "a.tiff")


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_truncated_image_is_corrupt(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write_noise(path, (64, 64))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=f"a{suffix}"):
        dataset.read_frame(path)


def test_corrupt_file_is_named_and_skipped(tmp_path, capsys):
    for index in range(10):
        write_noise(tmp_path / f"{index}.png")
    (tmp_path / "4.png").write_bytes(b"nothing")
    pictures, skipped = dataset.scan(tmp_path, 2)
    assert [found.path.name for found in pictures] == [f"{index}.png" for index in range(10) if index != 4]
    assert skipped == ["4.png"]
    assert "4.png" in capsys.readouterr().err


def test_more_than_a_tenth_corrupt_is_an_error(tmp_path):
    for index in range(10):
        write_noise(tmp_path / f"{index}.png")
    for name in ("3.png", "4.png"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match="2 corrupt files of 10"):
        dataset.scan(tmp_path, 2)


def test_empty_folder_says_what_is_there(tmp_path):
    write_noise(tmp_path / "good" / "a.png")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match="1 folders and 1 other files"):
        dataset.list_images(tmp_path)
    with pytest.raises(DataError, match="found nothing"):
        dataset.list_images(tmp_path / "absent")


# Splits and size


@pytest.fixture
def scanned(monkeypatch):
    """A folder's name is the number of images in it."""

    def scan(folder, _threads):
        return [
            Picture(Path(f"{folder}-{index}"), (8, 8), f"{folder}-{index}") for index in range(int(folder.name))
        ], []

    monkeypatch.setattr(dataset, "scan", scan)


@pytest.mark.parametrize(("count", "wanted"), [(300, (180, 20, 100)), (30, (18, 2, 10))])
def test_good_images_are_split_by_capture_order(scanned, count, wanted):
    splits = dataset.split(Path(str(count)), None, None, 1)
    assert tuple(splits.counts.values()) == wanted
    joined = [*splits.train, *splits.select, *splits.calibrate]
    assert [found.path.name for found in joined] == [f"{count}-{index}" for index in range(count)]


def test_given_folders_replace_their_splits(scanned):
    splits = dataset.split(Path("30"), Path("5"), Path("7"), 1)
    assert splits.counts == {"train": 30, "select": 5, "calibrate": 7}
    assert dataset.split(Path("30"), None, Path("7"), 1).counts == {"train": 28, "select": 2, "calibrate": 7}


def test_two_images_beside_a_calibration_folder_are_too_few(scanned):
    with pytest.raises(DataError, match="found 1 readable images, wanted at least 2"):
        dataset.split(Path("1"), None, Path("5"), 1)


def test_copies_of_training_images_in_the_calibration_are_counted(scanned):
    assert dataset.split(Path("30"), None, None, 1).leaked == 0
    assert dataset.split(Path("30"), None, Path("30"), 1).leaked == 28


@pytest.mark.parametrize(
    ("hw", "long_side", "wanted"),
    [((300, 300), 256, (256, 256)), ((200, 400), 256, (128, 256)), ((400, 200), 256, (256, 128)),
     ((10, 4000), 256, (32, 256)), ((480, 640), 256, (192, 256)), ((300, 310), 32, (32, 32)), ((90, 100), 256, (224, 256))],
)  # fmt: skip
def test_network_size_keeps_the_aspect(hw, long_side, wanted):
    assert dataset.network_size([picture(*hw)], long_side) == wanted


def test_network_size_follows_the_median_image():
    assert dataset.network_size([picture(100, 100), picture(100, 200), picture(100, 210)], 256) == (128, 256)


# Coreset and density


def plain_greedy(points, starts, rows):
    """The textbook loop in double precision."""
    points, starts = points.double(), starts.double()
    reach = (points[:, None] - starts[None]).square().sum(2).mean(1)
    chosen = []
    for _ in range(rows):
        chosen.append(int(reach.argmax()))
        reach = torch.minimum(reach, (points - points[chosen[-1]]).square().sum(1))
        reach[chosen] = -torch.inf
    return chosen


def radius(points, kept):
    return float(torch.cdist(points.double(), points[kept].double()).amin(1).max())


@pytest.mark.parametrize("working_set", [8, 64, 5000])
def test_greedy_picks_are_those_of_the_plain_algorithm(monkeypatch, working_set):
    monkeypatch.setattr(bank, "_WORKING_SET", working_set)
    points = torch.randn(3000, 8, generator=torch.Generator().manual_seed(1))
    assert bank.greedy_k_centre(points, points[:10], 150).tolist() == plain_greedy(points, points[:10], 150)


def test_coreset_covers_better_than_chance_and_better_with_more_rows():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(4000, 20, generator=generator) ** 3
    kept = bank.choose_core(points, 400, 0)
    radii = [radius(points, kept[:rows]) for rows in (50, 100, 200, 400)]
    assert radii == sorted(radii, reverse=True)
    assert radii[-1] < 0.8 * radius(points, torch.randperm(4000, generator=generator)[:400])


def test_coreset_is_the_seeds_and_has_no_row_twice():
    points = torch.randn(2000, 200, generator=torch.Generator().manual_seed(0))
    first, again, other = (bank.choose_core(points, 300, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(set(first.tolist())) == 300


def test_coreset_of_equal_rows_still_has_no_row_twice():
    assert len(set(bank.choose_core(torch.ones(500, 4), 100, 0).tolist())) == 100


def test_small_set_is_kept_whole():
    assert bank.choose_core(torch.randn(20, 4), 50, 0).tolist() == list(range(20))


@pytest.mark.parametrize("neighbours", [1, 2, 9, 299])
def test_density_is_the_mean_distance_to_the_neighbours(monkeypatch, neighbours):
    """Rows far from the origin, with duplicates and near-duplicates, against brute force in double precision."""
    monkeypatch.setattr(bank, "_ROWS", 64)
    full = torch.randn(300, 6, generator=torch.Generator().manual_seed(3)) + 30.0
    full[100:110] = full[5]
    full[110:120] = full[6] + 1e-3 * torch.randn(10, 6, generator=torch.Generator().manual_seed(4))
    kept = torch.tensor([299, 5, 6, 100, 0, 115, 64])
    distances = (full[kept, None].double() - full[None].double()).square().sum(2)
    distances[torch.arange(len(kept)), kept] = torch.inf  # itself, by index
    wanted = distances.sort(dim=1).values[:, :neighbours].mean(1)
    torch.testing.assert_close(bank.local_density(full, kept, neighbours, 2).double(), wanted, rtol=1e-5, atol=1e-6)


def test_density_counts_an_equal_row_but_never_the_row_itself():
    full = torch.tensor([[0.0], [0.0], [3.0]])
    assert bank.local_density(full, torch.arange(3), 1).tolist() == [0.0, 0.0, 9.0]
    assert bank.local_density(full, torch.arange(3), 2).tolist() == [4.5, 4.5, 9.0]


@pytest.mark.parametrize("neighbours", [0, 3])
def test_density_needs_enough_rows(neighbours):
    with pytest.raises(UsageError, match="wanted 1 to 2"):
        bank.local_density(torch.zeros(3, 2), torch.arange(3), neighbours)


def test_bank_bias_is_minus_half_the_squared_norm():
    made = bank.make_bank(np.array([[3, 4], [0, 0], [1, 0]], np.float32), rows=9, neighbours=1, threads=1, seed=0)
    assert made.bias.tolist() == [-12.5, 0.0, -0.5]
    assert made.core.shape == (3, 2)


# The limit


SCORES = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=80)
RATES = st.sampled_from([0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.9])


@given(SCORES, RATES)
def test_limit_rejects_no_more_calibration_scores_than_promised(scores, rate):
    values = np.array(scores, np.float32)
    product = conformal_limit(values, rate)
    rank = conformal_rank(len(values), rate).rank
    assert int(np.sum(values.astype(np.float64) >= product.limit)) <= len(values) - rank
    assert np.sort(values)[rank - 1] < product.limit  # the order statistic itself passes


@settings(max_examples=60)
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=12), RATES)
def test_promise_holds_over_all_orders_of_exchangeable_scores(scores, rate):
    """Each of n + 1 parts is as likely the new one: at most (n + 1) * supported of them may be rejected."""
    values = np.array(scores, np.float32)
    rejected = 0
    for new in range(len(values)):
        product = conformal_limit(np.delete(values, new), rate)
        rejected += bool(values[new] >= product.limit)
    assert rejected <= len(values) * product.supportedFalseReject + 1e-9


@pytest.mark.parametrize(
    ("n", "rate", "rank", "supported"),
    [(100, 0.01, 100, 0.01), (99, 0.01, 99, 0.01), (98, 0.01, 98, 1 / 99), (199, 0.05, 190, 0.05), (1, 0.01, 1, 0.5),
     (9, 0.1, 9, 0.1), (999, 0.001, 999, 0.001)],
)  # fmt: skip
def test_rank_is_exact_and_small_sets_say_what_they_support(n, rate, rank, supported):
    taken = conformal_rank(n, rate)
    assert (taken.rank, taken.supported) == (rank, pytest.approx(supported))


def test_bound95_is_the_beta_quantile():
    assert conformal_rank(100, 0.01).bound95 == pytest.approx(1 - 0.05 ** (1 / 100))
    assert conformal_rank(100, 0.01).bound95 == pytest.approx(0.02951, abs=1e-5)


def test_limit_of_equal_scores_passes_them_all():
    product = conformal_limit(np.full(50, 2.5, np.float32), 0.1)
    assert product.medianGood == 2.5 < product.limit
    assert np.float32(product.limit) == product.limit == product.mapLimit


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(DataError, match="1 of 2"):
        conformal_limit(np.array([1, np.nan], np.float32), 0.1)


def test_standardisation_is_robust_and_never_zero():
    scores = np.r_[np.random.default_rng(0).normal(5, 2, 10_000), np.full(500, 1e4)].astype(np.float32)
    found = calibrate.standardise(scores)
    assert found.centre == pytest.approx(5, abs=0.2)
    assert found.scale == pytest.approx(2, abs=0.2)
    assert calibrate.standardise(np.array([1, 1, 1, 9], np.float32)).scale == pytest.approx(np.sqrt(12))
    assert calibrate.standardise(np.zeros((2, 4), np.float32)).scale == 1.0


@pytest.mark.parametrize(("offset", "side"), [(3, "higher"), (-3, "lower"), (0, None)])
def test_shift_between_splits_is_told(offset, side):
    rng = np.random.default_rng(0)
    scores = calibrate.GoodScores(rng.normal(size=20), rng.normal(size=100) + offset)
    doubts = calibrate.find_doubts(conformal_limit(scores.calibrate, 0.05), scores)
    assert [side in doubt for doubt in doubts] == ([True] if side else [])


# The whole build


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    write_dataset(folder, good_train=36, good_test=6, defects_each=3, size_hw=(128, 128), seed=5)
    return folder


@pytest.fixture(scope="session")
def built(tmp_path_factory, parts):
    """(folder of engines and keys, the finished process) of one small build."""
    place = tmp_path_factory.mktemp("built")
    done = build(
        "part", "--good", parts / "train/good", "--test", parts, "--out", place / "engines", "--keys", place / "keys",
        "--size", 128, "--coreset", 500, "--false-reject", 0.1, "--steps", 12,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return place, done


@pytest.fixture(scope="session")
def bundle(built):
    return open_bundle(current_bundle(built[0] / "engines", "part"), load_trusted(built[0] / "keys/trusted.yaml"))


@pytest.fixture(scope="session")
def pipeline(bundle):
    return Pipeline(bundle, open_backend(bundle))


def test_build_ends_with_the_bundles_folder_and_speaks_on_stderr(built, bundle):
    place, done = built
    folder = Path(done.stdout.splitlines()[-1])
    assert done.stdout.count("\n") == 1
    assert folder == place / "engines/part" / bundle.manifest.version
    assert "good images: 22 train, 2 select, 12 calibrate" in done.stderr
    assert "ms here, --budget-ms is 30" in done.stderr
    assert sorted(path.name for path in folder.parent.iterdir()) == sorted(["current", folder.name])
    assert (folder.parent / "current").readlink() == Path(folder.name)


def test_manifest_tells_what_the_engine_was_made_of(bundle):
    manifest = bundle.manifest
    assert manifest.preprocessing.size == (128, 128)
    assert manifest.grid == (16, 16)
    assert manifest.fusion.smoothingSigma == 2.0
    product = manifest.products["part"]
    assert (product.n, product.targetFalseReject, product.supportedFalseReject) == (12, 0.1, 0.1)
    assert manifest.training["images"] == {"train": 22, "select": 2, "calibrate": 12}
    assert {"dataDigest", "skipped", "options", "seed", "versions", "buildSeconds"} <= set(manifest.training)
    assert manifest.metrics["n"] == 6 + 5 * 3


def test_engine_tells_generated_defects_from_good_parts(bundle):
    assert bundle.manifest.metrics["imageAuroc"] > 0.9
    assert bundle.manifest.metrics["pixelAuroc"] > 0.9


def test_calibration_scores_are_the_daemons_own(bundle, pipeline, parts):
    images = dataset.list_images(parts / "train/good")[24:]
    scores = sorted(pipeline.anomaly_map(dataset.read_frame(path)).score for path in images)
    stored = pipeline._calibration["part"]
    np.testing.assert_allclose(stored, scores, rtol=1e-4)
    limit = bundle.manifest.products["part"].limit
    assert sum(score >= limit for score in stored) <= 12 - conformal_rank(12, 0.1).rank


def test_golden_frames_hold_both_outcomes_and_reproduce(bundle, pipeline):
    assert check_golden(pipeline) < 1.0
    assert {frame.outcome for frame in bundle.manifest.golden.frames} == {"PASS", "REJECT"}
    product = bundle.manifest.products["part"]
    margin = 2 * bundle.manifest.golden.tolerance["bf16"] * (product.limit - product.medianGood)
    assert all(abs(frame.score - product.limit) > margin for frame in bundle.manifest.golden.frames)


def test_network_holds_no_path_of_its_builder(bundle):
    assert str(ROOT).encode() not in (bundle.folder / "networks.onnx").read_bytes()
    assert b"site-packages" not in (bundle.folder / "networks.onnx").read_bytes()


def test_report_stands_alone(bundle):
    page = (bundle.folder / "report.html").read_text(encoding="utf-8")
    assert "95 % upper bound" in page
    assert "Worst escapes" in page
    assert page.count("data:image/png;base64,") >= 13
    assert "http" not in page.replace("https://matplotlib", "")


def test_every_file_can_be_read_by_the_daemons_user(bundle):
    assert all(path.stat().st_mode & 0o044 for path in bundle.folder.rglob("*"))


def test_bundle_of_another_key_is_refused(bundle, tmp_path):
    make_signing_key(tmp_path / "other")
    with pytest.raises(BundleError, match="trusted key"):
        open_bundle(bundle.folder, load_trusted(tmp_path / "other/trusted.yaml"))


def test_evaluate_prints_one_flat_object(built, bundle, parts):
    arguments = [str(bundle.folder), str(parts), "--trusted", str(built[0] / "keys/trusted.yaml")]
    result = CliRunner().invoke(evaluate_command, arguments)
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert list(figures) == [
        "imageAuroc", "imageAp", "f1AtLimit", "falseRejectRate", "escapeRate", "pixelAuroc", "aupro", "pixelAp", "n",
        "byDefect",
    ]  # fmt: skip
    assert figures["byDefect"]["dent"].keys() == {"n", "escapeRate", "imageAuroc"}
    stored = dict(bundle.manifest.metrics)
    assert figures.pop("byDefect") == stored.pop("byDefect")
    assert figures == pytest.approx(stored, rel=1e-4)


def test_evaluate_without_masks_has_no_pixel_figures(pipeline, parts, tmp_path):
    (tmp_path / "test").symlink_to(parts / "test")
    figures = evaluate(pipeline, tmp_path, "part")
    assert figures["pixelAuroc"] is figures["aupro"] is figures["pixelAp"] is None
    assert figures["imageAuroc"] > 0.9


def test_mask_of_another_size_is_named(pipeline, parts, tmp_path):
    (tmp_path / "test").symlink_to(parts / "test")
    write_noise(tmp_path / "ground_truth/chip/000_mask.png")
    with pytest.raises(DataError, match=r"chip/000_mask.png: found a mask of 8 x 8 pixels, wanted 128 x 128"):
        evaluate(pipeline, tmp_path, "part")


def test_missing_mask_is_named(pipeline, parts, tmp_path):
    (tmp_path / "test").symlink_to(parts / "test")
    (tmp_path / "ground_truth").mkdir()
    with pytest.raises(DataError, match=r"chip/000_mask.png: is missing"):
        evaluate(pipeline, tmp_path, "part")


def test_sixteen_bit_twin_scores_the_same(pipeline, parts):
    frame = dataset.read_frame(dataset.list_images(parts / "test/chip")[0])
    wide = Frame(frame.pixels.astype(np.uint16) * 257)
    scores = [pipeline.anomaly_map(shown).score for shown in (frame, wide)]
    assert scores[0] == pytest.approx(scores[1], rel=0.02)
    assert pipeline.judge(pipeline.anomaly_map(wide), "part").outcome is Outcome.REJECT


@pytest.mark.parametrize(("dtype", "level", "brightest"), [(np.uint8, 10, 255), (np.uint16, 1000, 1023)])
def test_spoilt_frame_stays_in_the_cameras_range(dtype, level, brightest):
    spoilt = _paste_ellipse(np.full((40, 60, 1), level, dtype), 1.0)
    assert spoilt.dtype == dtype
    assert {int(spoilt.min()), int(spoilt.max())} == ({level, brightest} if level == 10 else {0, level})


# Where it is put, and how it fails


def test_version_that_is_taken_gets_a_suffix(tmp_path):
    (tmp_path / "v").mkdir()
    assert _reserve(tmp_path, "v") == (tmp_path / ".v-2.partial", "v-2")
    assert _reserve(tmp_path, "v")[1] == "v-3"  # v-2 is being built


@pytest.mark.parametrize(
    "arguments",
    [["../evil"], ["p", "--branches", "crr"], ["p", "--targets", "cuda"], ["p", "--size", "250"], ["p", "--budget", "-1"],
     ["p", "--false-reject", "0"], ["p", "--budget-ms", "0"]],
)  # fmt: skip
def test_wrong_call_exits_64(run_here, arguments, tmp_path):
    code, _, err = run_here(*arguments, "--good", tmp_path, "--out", tmp_path / "engines", "--keys", tmp_path / "keys")
    assert code == 64
    assert "Usage: build_engines.py" in err
    assert not list(tmp_path.iterdir())


def test_bad_data_exits_65_and_leaves_nothing_behind(tmp_path):
    done = build("p", "--good", tmp_path / "absent", "--out", tmp_path / "engines", "--keys", tmp_path / "keys")
    assert (done.returncode, done.stdout) == (65, "")
    assert done.stderr.strip().splitlines() == [
        f"error: {tmp_path / 'absent'}: found nothing, wanted a folder of images; is the path right, seen from here?"
    ]
    assert not list((tmp_path / "engines/p").iterdir())


def test_build_by_steps_can_be_repeated_bit_by_bit(run_here, built, bundle, parts, tmp_path):
    code, out, err = run_here(
        "part", "--good", parts / "train/good", "--test", parts, "--out", tmp_path, "--keys", built[0] / "keys",
        "--size", 128, "--coreset", 500, "--false-reject", 0.1, "--steps", 12,
    )  # fmt: skip
    assert not code, err
    again = open_bundle(Path(out.strip()), load_trusted(built[0] / "keys/trusted.yaml")).manifest
    assert again.branches == bundle.manifest.branches
    differing = [name for name, digest in again.files.items() if digest != bundle.manifest.files[name]]
    assert differing == ["report.html"]  # it tells the version and how long the build took
    assert again.fusion == bundle.manifest.fusion
    assert again.products == bundle.manifest.products


def test_engine_of_repair_alone_in_both_spaces(run_here, built, parts, tmp_path):
    code, out, err = run_here(
        "part", "--good", parts / "train/good", "--out", tmp_path, "--keys", built[0] / "keys", "--branches", "repair",
        "--repair", "both", "--size", 128, "--k", 1, "--alpha", 0, "--coreset", 10, "--steps", 3,
    )  # fmt: skip
    assert not code, err
    assert "repair of the features: 3 steps" in err
    assert "repair of the image: 3 steps" in err
    made = open_bundle(Path(out.strip()), load_trusted(built[0] / "keys/trusted.yaml"))
    assert made.manifest.branches == ["repair"]
    assert made.manifest.fusion.standardisation["repair"].centre == pytest.approx(2.0, rel=0.5)  # a unit for each space


def test_second_build_leaves_current_alone(run_here, built, parts, tmp_path):
    """Few images, 16-bit colour, 1:2: the limit says what it can, and the first engine stays current."""
    place, _ = built
    for index in range(5):
        gray = dataset.read_frame(dataset.list_images(parts / "train/good")[index]).pixels
        wide = np.repeat(cv2.resize(gray, (200, 100))[:, :, None], 3, axis=2).astype(np.uint16) * 257
        cv2.imwrite(str(tmp_path / f"{index}.tiff"), wide)
    before = (place / "engines/part/current").readlink()
    code, out, err = run_here(
        "part", "--good", tmp_path, "--out", place / "engines", "--keys", place / "keys", "--size", 128, "--k", 1,
        "--coreset", 100, "--budget", 0,
    )  # fmt: skip
    assert not code, err
    assert "support a false-reject rate of 16.67% at best" in err
    assert (place / "engines/part/current").readlink() == before
    second = open_bundle(Path(out.strip()), load_trusted(place / "keys/trusted.yaml"))
    assert second.manifest.preprocessing.size == (64, 128)
    assert second.manifest.metrics == {}


def test_key_that_nobody_trusts_ends_the_build_before_it_starts(tmp_path):
    make_signing_key(tmp_path / "keys")
    (tmp_path / "keys/trusted.yaml").write_text("[]")
    options = type("Options", (), {"keys": tmp_path / "keys", "out": tmp_path, "name": "p"})()
    with pytest.raises(ConfigError, match="does not list"), open_site(options):
        pass
