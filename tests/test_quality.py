"""How a frame looks: each fault moves its own figure, and the state names the one that moved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load, save_file

from daemon.bundle import QUALITY, Preprocessing, seal_bundle
from daemon.errors import BundleError
from daemon.inspection.backend.cpu import normalise
from daemon.inspection.drift import BETWEEN_FALSE_ALARMS
from daemon.inspection.quality import STATISTICS, Gauge, SetupTest, deadband
from daemon.keys import make_signing_key
from daemon.types import Frame
from examples.parts import render_part
from tests.bundles import good_pixels, make_bundle, open_pipeline, raw_frame
from trainer import quality

Picture = NDArray[np.uint8]
SIDE = 128
PREPROCESSING = Preprocessing(size=(SIDE, SIDE), mean=(123.0, 117.0, 104.0), std=(58.0, 57.0, 57.5))

FAULTS: dict[str, Callable[[Picture], Picture]] = {
    "brightness": lambda picture: np.rint(picture * 0.85).astype(np.uint8),
    "focus": lambda picture: np.asarray(cv2.GaussianBlur(picture, (0, 0), 1.5), np.uint8),
    "position across": lambda picture: np.roll(picture, 8, axis=1),
    "position along": lambda picture: np.roll(picture, -8, axis=0),
    "contrast": lambda picture: np.rint(0.5 * picture + 0.5 * picture.mean()).astype(np.uint8),
}


def part(seed: int) -> Picture:
    return render_part(seed, size_hw=(SIDE, SIDE))[0]


def planes(picture: Picture) -> NDArray[np.float32]:
    return normalise(Frame(picture.reshape(*picture.shape[:2], -1)), PREPROCESSING)[0]


@pytest.fixture(scope="module")
def mean() -> NDArray[np.float32]:
    frames = (Frame(part(1000 + seed)[..., None]) for seed in range(30))
    return quality.thumbnails(frames, PREPROCESSING).mean(0)


@pytest.fixture(scope="module")
def references(mean: NDArray[np.float32]) -> dict[str, list[float]]:
    found = quality.figures((Frame(part(seed)[..., None]) for seed in range(30)), mean, PREPROCESSING)
    return {name: values.tolist() for name, values in found.items()}


# --- figures


def measured(picture: Picture, mean: NDArray[np.float32]) -> dict[str, float]:
    return Gauge(PREPROCESSING, mean).measure(planes(picture))


def test_gray_is_the_mean_of_the_channels_on_the_scale_of_pixels() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    np.testing.assert_allclose(Gauge(PREPROCESSING).gray(planes(picture)), picture.mean(2), atol=0.01)


def test_brightness_is_the_lamps_and_changes_neither_contrast_nor_focus(mean: NDArray[np.float32]) -> None:
    before, after = measured(part(0), mean), measured(FAULTS["brightness"](part(0)), mean)
    assert after["brightness"] == pytest.approx(0.85 * before["brightness"], rel=0.01)
    for name in ("contrast", "sharpness"):
        assert after[name] == pytest.approx(before[name], rel=0.03)


def test_blur_takes_the_sharpness_and_not_the_light(mean: NDArray[np.float32]) -> None:
    before, after = measured(part(0), mean), measured(FAULTS["focus"](part(0)), mean)
    assert after["sharpness"] < 0.6 * before["sharpness"]
    assert after["brightness"] == pytest.approx(before["brightness"], rel=0.01)


@pytest.mark.parametrize("pixels", [-13, -4, 3, 9])
def test_shift_is_told_in_shares_of_the_side_with_its_sign(mean: NDArray[np.float32], pixels: int) -> None:
    for axis, name, other in ((1, "shiftX", "shiftY"), (0, "shiftY", "shiftX")):
        before, after = measured(part(0), mean), measured(np.roll(part(0), pixels, axis=axis), mean)
        assert after[name] - before[name] == pytest.approx(pixels / SIDE, abs=0.01)
        assert after[other] - before[other] == pytest.approx(0.0, abs=0.01)


def test_burnt_out_and_black_pixels_are_clipped(mean: NDArray[np.float32]) -> None:
    picture = np.full((SIDE, SIDE), 128, np.uint8)
    picture[: SIDE // 4], picture[-SIDE // 8 :] = 255, 0
    assert measured(picture, mean)["clipping"] == pytest.approx(0.25 + 0.125)


@pytest.mark.parametrize("level", [0, 128, 255])
def test_frame_of_one_level_has_no_focus_and_no_place(mean: NDArray[np.float32], level: int) -> None:
    found = measured(np.full((SIDE, SIDE), level, np.uint8), mean)
    assert found["brightness"] == pytest.approx(level, abs=0.01)
    assert set(found) <= set(STATISTICS)
    assert all(np.isfinite(value) for value in found.values())


# --- the test


def feed(test: SetupTest, pictures: list[Picture], mean: NDArray[np.float32]) -> int | None:
    for number, picture in enumerate(pictures, 1):
        test.add(measured(picture, mean))
        if test.evidence >= BETWEEN_FALSE_ALARMS:
            return number
    return None


def test_parts_like_the_calibration_raise_no_alarm(
    mean: NDArray[np.float32], references: dict[str, list[float]]
) -> None:
    assert feed(SetupTest(references), [part(5000 + seed) for seed in range(300)], mean) is None


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_within_forty_frames_and_named(
    mean: NDArray[np.float32], references: dict[str, list[float]], fault: str
) -> None:
    test = SetupTest(references)
    good = [part(5000 + seed) for seed in range(80)]
    assert feed(test, good[:40], mean) is None
    found = feed(test, [FAULTS[fault](picture) for picture in good[40:]], mean)
    assert found is not None
    assert test.describe().startswith(fault)
    assert f"for {found} frames" in test.describe() or abs(_frames(test.describe()) - found) <= 3


def _frames(text: str) -> int:
    return int(text.rpartition("for ")[2].partition(" ")[0])


def test_frames_between_false_alarms_are_as_many_as_promised_for_all_figures_together() -> None:
    # At 100 in place of 250,000; the figures of a frame move together, as those of real frames do.
    assert sum(figure.share for figure in STATISTICS.values()) == pytest.approx(1.0)
    lengths = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        parts = [dict.fromkeys(STATISTICS, float(value)) for value in rng.normal(100, 20, 1030)]
        test = SetupTest({name: [each[name] for each in parts[:30]] for name in STATISTICS})
        lengths.append(1000)
        for number, each in enumerate(parts[30:], 1):
            test.add(each)
            if test.evidence >= 100:
                lengths[-1] = number
                break
    assert np.mean(lengths) >= 100


def test_what_changed_is_told_with_both_values() -> None:
    test = SetupTest({"brightness": np.linspace(99, 101, 30).tolist(), "clipping": [0.0] * 30})
    for _ in range(20):
        test.add({"brightness": 85.0, "clipping": 0.0})
    assert test.describe() == "brightness 15% lower (85 against 100) than the calibration images, for 20 frames"


def test_deadband_ends_where_the_images_differ_more_by_themselves() -> None:
    assert deadband("brightness", [100.0] * 30) == pytest.approx(5.0)
    assert deadband("brightness", np.linspace(50, 150, 100).tolist()) == 0.0
    assert deadband("shiftX", [0.0] * 30) == pytest.approx(0.02)


def test_frame_without_a_figure_is_no_evidence_about_it() -> None:
    test = SetupTest({"sharpness": [1.0, 2.0, 3.0]})
    test.add({"brightness": 5.0})
    assert test.evidence == 0.0


# --- the bundle


def test_bundle_without_figures_loads_and_measures_nothing(tmp_path: Path) -> None:
    pipeline = open_pipeline(make_bundle(tmp_path / "b", tmp_path / "keys"), tmp_path / "keys")
    assert pipeline.references["part"].gauge is None
    assert pipeline.inspect(raw_frame(good_pixels()), "part").quality is None


def test_figures_of_a_bundle_are_of_what_its_network_sees(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "b", tmp_path / "keys", with_quality=True)
    pipeline = open_pipeline(folder, tmp_path / "keys")
    verdict = pipeline.inspect(raw_frame(good_pixels(1000)), "part")
    assert verdict.quality is not None
    reference = pipeline.references["part"]
    # Frame 1000 is one of the calibration's: its figures are there, to the bit.
    for name, value in verdict.quality.items():
        assert value in reference.images[name]


@pytest.mark.parametrize(
    ("name", "values", "told"),
    [
        ("part/thumbnail", np.zeros((8, 8), np.float32), "thumbnail"),
        ("part/brightness", np.zeros((2, 2), np.float32), "brightness"),
        ("part/brightness", np.array([np.nan], np.float32), "finite"),
        ("part/colour", np.zeros(3, np.float32), "PRODUCT/FIGURE"),
        ("other/brightness", np.zeros(3, np.float32), "PRODUCT/FIGURE"),
        ("part/thumbnail", None, "has no part/thumbnail"),
    ],
)
def test_figures_that_cannot_be_are_refused(tmp_path: Path, name: str, values: NDArray[np.float32], told: str) -> None:
    folder = make_bundle(tmp_path / "b", tmp_path / "keys", with_quality=True)
    kept = load((folder / QUALITY).read_bytes())
    if values is None:
        del kept[name]
    else:
        kept[name] = values
    save_file(kept, folder / QUALITY)
    seal_bundle(folder, manifest_fields(folder), make_signing_key(tmp_path / "keys"))
    with pytest.raises(BundleError, match=told):
        open_pipeline(folder, tmp_path / "keys")


def manifest_fields(folder: Path) -> dict[str, object]:
    fields = json.loads((folder / "manifest.json").read_text())
    del fields["files"]
    return fields


# --- the build


def test_each_of_few_images_is_measured_against_the_others() -> None:
    pictures = np.stack([np.full((64, 64), level, np.float32) for level in (0, 30, 60)])
    assert quality.without_each(pictures)[:, 0, 0].tolist() == [45.0, 30.0, 15.0]
    assert quality.without_each(pictures[:1])[0, 0, 0] == 0.0
