"""The generated parts: repeatable, defects where the mask says, and the layout on disk."""

from __future__ import annotations

import shlex
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from examples.parts import DEFECTS, main, render_part, write_dataset


def test_same_seed_gives_the_same_picture_and_another_seed_another() -> None:
    first, _ = render_part(3, defect="dent")
    again, _ = render_part(3, defect="dent")
    other, _ = render_part(4, defect="dent")
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_good_part_has_an_empty_mask() -> None:
    image, mask = render_part(0)
    assert image.shape == mask.shape == (256, 256)
    assert image.dtype == mask.dtype == np.uint8
    assert not mask.any()


@pytest.mark.parametrize("color", [False, True])
@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("seed", range(4))
def test_mask_covers_what_changed_and_little_else(seed: int, defect: str, *, color: bool) -> None:
    good, _ = render_part(seed, color=color)
    bad, mask = render_part(seed, defect=defect, color=color)
    change = np.abs(bad.astype(int) - good).reshape(*mask.shape, -1).max(axis=2)
    assert set(np.unique(mask)) == {0, 255}
    assert not change[mask == 0].any()
    assert np.mean(change[mask > 0] >= 5) > 0.7  # the rest is gaps that closing filled
    assert change.max() >= 15
    assert 20 < np.count_nonzero(mask) < 0.1 * mask.size


@pytest.mark.parametrize("size_hw", [(64, 64), (64, 300), (300, 64), (96, 129), (200, 150)])
@pytest.mark.parametrize("defect", DEFECTS)
def test_any_frame_shows_every_defect(size_hw: tuple[int, int], defect: str) -> None:
    for seed in range(3):
        image, mask = render_part(seed, size_hw=size_hw, defect=defect)
        assert image.shape == mask.shape == size_hw
        assert mask.any()


def test_part_fills_most_of_a_long_frame() -> None:
    image, _ = render_part(0, size_hw=(128, 512))
    assert np.mean(image > 90) > 0.6


def test_good_parts_look_alike() -> None:
    parts = np.array([render_part(seed)[0] for seed in range(8)], float)
    assert np.abs(parts - np.median(parts, axis=0)).mean() < 10


def test_small_frame_and_unknown_defect_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 64"):
        render_part(0, size_hw=(63, 100))
    with pytest.raises(ValueError, match="'rust', wanted one of scratch"):
        render_part(0, defect="rust")


def test_data_set_is_laid_out_with_a_mask_for_each_defect(tmp_path: Path) -> None:
    write_dataset(tmp_path, good_train=3, good_test=2, defects_each=1, size_hw=(64, 80), kinds=("chip", "dent"))
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png"))
    assert found == [
        "ground_truth/chip/000_mask.png",
        "ground_truth/dent/000_mask.png",
        "test/chip/000.png",
        "test/dent/000.png",
        "test/good/000.png",
        "test/good/001.png",
        "train/good/000.png",
        "train/good/001.png",
        "train/good/002.png",
    ]
    stored = cv2.imread(str(tmp_path / "train/good/001.png"), cv2.IMREAD_UNCHANGED)
    assert stored is not None
    assert np.array_equal(stored, render_part(1, size_hw=(64, 80))[0])


def test_command_writes_color_as_rgb(tmp_path: Path) -> None:
    arguments = "--good-train 1 --good-test 1 --defects-each 1 --size 64 64 --seed 2 --color"
    result = CliRunner().invoke(main, f"{shlex.quote(str(tmp_path))} {arguments}")
    assert result.exit_code == 0, result.output
    stored = cv2.imread(str(tmp_path / "train/good/000.png"), cv2.IMREAD_COLOR)
    assert stored is not None
    assert np.array_equal(stored[..., ::-1], render_part(2_000_000, size_hw=(64, 64), color=True)[0])
    assert {path.name for path in (tmp_path / "test").iterdir()} == {"good", *DEFECTS}
