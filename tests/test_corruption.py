"""The corruption model: shapes within their ranges, fills that keep a product's gray, masks that tell the truth."""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.errors import DataError, UsageError
from examples.parts import render_part
from trainer import corruption, fills, shapes
from trainer.corruption import CHOICE, TRAINING, Corruptor, Recipe, augment, estimate_foreground, write_preview
from trainer.fills import FILLS, Place, jitter, make_material
from trainer.shapes import SHAPES

KINDS = [(shape, fill) for shape in SHAPES for fill in FILLS]


@cache
def parts(count=4, size=(96, 96), color=False):
    """Good parts (H W 3) float32, gray ones with three equal channels; a size below 64 is cut from the middle."""
    drawn = [render_part(seed, size_hw=tuple(max(64, side) for side in size), color=color)[0] for seed in range(count)]
    top, left = ((max(64, side) - side) // 2 for side in size)
    drawn = [picture[top : top + size[0], left : left + size[1]].astype(np.float32) for picture in drawn]
    return [picture if color else np.repeat(picture[:, :, None], 3, axis=2) for picture in drawn]


@cache
def textures():
    rng = np.random.default_rng(7)
    coarse = [rng.integers(0, 256, (20, 30, 3)).astype(np.float32) for _ in range(3)]
    return [cv2.resize(values, (180, 60 + 60 * number)) for number, values in enumerate(coarse)]


@cache
def corruptor(size=(96, 96), color=False, has_foreground=True):
    images = parts(4, size, color)
    return Corruptor(
        images, TRAINING, textures=textures(), foreground=estimate_foreground(images) if has_foreground else None
    )


def corrupted(shape, fill, seed=0, index=0, **options):
    return corruptor(**options).corrupt(index, np.random.default_rng(seed), shape, fill)


def draw(name, count=60, size=(256, 256), seed=0):
    rng = np.random.default_rng(seed)
    return [SHAPES[name](rng, *size) for _ in range(count)]


@pytest.fixture
def recorded(monkeypatch):
    """Record the positional arguments of a module's function, and let it do its work."""

    def record(module, name):
        calls, original = [], getattr(module, name)
        monkeypatch.setattr(module, name, lambda *values: (calls.append(values), original(*values))[1])
        return calls

    return record


# What every kind of corruption holds


@pytest.mark.parametrize(("shape", "fill"), KINDS)
def test_same_seed_gives_the_same_defect_and_another_seed_another(shape, fill):
    first, again, other = (corrupted(shape, fill, seed) for seed in (3, 3, 4))
    assert np.array_equal(first.pixels, again.pixels)
    assert np.array_equal(first.mask, again.mask)
    assert not np.array_equal(first.pixels, other.pixels)
    assert (first.shape, first.fill) == (shape, fill)


@pytest.mark.parametrize("color", [False, True])
@pytest.mark.parametrize(("shape", "fill"), KINDS)
def test_defect_shows_inside_its_mask_and_nowhere_else(shape, fill, color):
    for seed in range(3):
        image, found = parts(4, (96, 96), color)[seed], corrupted(shape, fill, seed, seed, color=color)
        near = cv2.dilate(found.mask.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0  # an edge fades below 0.1
        assert np.array_equal(found.pixels[~near], image[~near])
        if fill != "cut" or shape != "perlin":  # a field is cut from the same place of another image
            assert np.abs(found.pixels - image)[found.mask].mean() >= 3.0


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    size=st.sampled_from([(32, 32), (32, 96), (96, 41), (64, 64)]),
    color=st.booleans(),
    has_foreground=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_any_image_is_corrupted_within_its_bounds(kind, size, color, has_foreground, seed):
    found = corrupted(*kind, seed, 1, size=size, color=color, has_foreground=has_foreground)
    assert found.pixels.shape == (*size, 3)
    assert found.pixels.dtype == np.float32
    assert found.mask.shape == size
    assert found.mask.dtype == np.bool_
    assert found.mask.any()
    assert np.isfinite(found.pixels).all()
    assert found.pixels.min() >= 0.0
    assert found.pixels.max() <= 255.0
    if not color:
        assert np.ptp(found.pixels, axis=2).max() == 0.0


def test_good_images_are_never_written_to():
    before = [image.copy() for image in parts()]
    for shape, fill in KINDS:
        corrupted(shape, fill)
    assert all(np.array_equal(*pair) for pair in zip(parts(), before, strict=True))


def test_training_and_choice_share_nothing():
    assert set(TRAINING.shapes).isdisjoint(CHOICE.shapes)
    assert set(TRAINING.fills).isdisjoint(CHOICE.fills)
    assert {*TRAINING.shapes, *CHOICE.shapes} == set(SHAPES)
    assert {*TRAINING.fills, *CHOICE.fills} == set(FILLS)


@pytest.mark.parametrize("recipe", [TRAINING, CHOICE])
def test_recipe_is_followed_and_each_kind_has_its_share(recipe):
    maker, rng = Corruptor(parts(), recipe, textures=textures()), np.random.default_rng(0)
    drawn = [maker.corrupt(number % 4, rng) for number in range(240)]
    for names, found in (
        (recipe.shapes, [item.shape for item in drawn]),
        (recipe.fills, [item.fill for item in drawn]),
    ):
        assert set(found) == set(names)
        assert min(found.count(name) for name in names) > 0.5 * len(drawn) / len(names)


# Shapes


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(sorted(SHAPES)),
    height=st.integers(32, 130),
    width=st.integers(32, 130),
    seed=st.integers(0, 2**32),
)
def test_shape_fits_any_image(name, height, width, seed):
    mask = SHAPES[name](np.random.default_rng(seed), height, width)
    assert mask.dtype == np.uint8
    assert mask.max() == 1
    assert mask.shape[0] <= height
    assert mask.shape[1] <= width


# Shares of a 256 x 256 image; a displaced ellipse may be a little out of the range it was drawn from.
@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("blob", 0.0002, 0.15), ("scar", 15 / 256**2, 21 * 30 / 256**2), ("clump", 1 / 256**2, 0.15),
        ("perlin", 1 / 256**2, 0.5), ("ellipse", 0.001, 0.075), ("speck", 0.0001, 0.003), ("hairline", 0.0003, 0.017),
    ],
)  # fmt: skip
def test_area_is_in_the_range_of_the_shape(name, least, most):
    areas = np.array([np.count_nonzero(mask) for mask in draw(name)]) / 256**2
    assert areas.min() >= least
    assert areas.max() <= most
    assert areas.max() > 2 * areas.min()


@pytest.mark.parametrize(("name", "aspect"), [("blob", 3.3), ("clump", 3.0)])
def test_box_has_its_share_of_the_image_and_touches_the_curve(name, aspect):
    boxes = np.array([mask.shape for mask in draw(name, 150)])
    share, ratio = boxes.prod(axis=1) / 256**2, boxes[:, 1] / boxes[:, 0]
    assert 0.019 < share.min() < 0.03
    assert 0.14 < share.max() < 0.153
    assert 1 / aspect - 0.05 < ratio.min() < 1 / aspect + 0.1
    assert aspect - 0.4 < ratio.max() < aspect + 0.15


def test_blob_fills_its_box_exactly():
    for mask in draw("blob"):
        assert all(side.any() for side in (mask[0], mask[-1], mask[:, 0], mask[:, -1]))


def test_curves_have_as_many_corners_as_defectmaker_gives_them(recorded):
    calls = recorded(shapes, "_draw_curve")
    for name, corners in (("blob", (5, 6)), ("scar", (5, 6)), ("clump", (5, 9))):
        calls.clear()
        draw(name, 5)
        assert {call[1] for call in calls} == {corners}


def test_half_of_the_edges_stay_straight():
    rng = np.random.default_rng(0)
    points = [len(shapes._draw_curve(rng, (6, 6))) for _ in range(300)]
    # Six edges, each with one point or with eleven.
    assert {(count - 6) % 10 for count in points} == {0}
    assert np.mean(points) == pytest.approx(36.0, abs=2.0)
    assert min(points) == 6
    assert max(points) == 66


def test_scar_has_its_size_in_pixels_and_grows_with_the_image(recorded):
    calls = recorded(shapes, "_stretch")
    for side, scale in ((256, 1), (512, 2)):
        calls.clear()
        draw("scar", 150, (side, side))
        rows, columns = np.array([call[1:] for call in calls]).T / scale
        assert (rows.min(), rows.max()) == (15, 30)
        assert (columns.min(), columns.max()) == (7, 21)


def test_scar_is_turned():
    leaning = []
    for mask in draw("scar", 200):
        moments = cv2.moments(mask, binaryImage=True)
        leaning.append(np.rad2deg(0.5 * np.arctan2(2 * moments["mu11"], moments["mu20"] - moments["mu02"])) % 180)
    counts, _ = np.histogram(leaning, [45, 75, 105, 135])  # upright is 90
    assert counts.min() > 15
    assert max(mask.shape[1] for mask in draw("scar", 200)) > 21  # wider than any that is not turned


def test_clump_is_noise_in_pieces(recorded):
    calls = recorded(shapes, "resize")
    pieces = [cv2.connectedComponents(mask)[0] - 1 for mask in draw("clump", 80)]
    assert np.mean(np.array(pieces) >= 3) > 0.6
    noise = np.concatenate([call[0].ravel() for call in calls])
    assert (noise.min(), noise.max()) == (77, 177)
    for grid, _, width in calls:  # both sides are the box's width, over 5 to 7, over and times the aspect
        assert width / 7 / 2 - 1 <= min(grid.shape) <= max(grid.shape) <= width / 5 * 2
        assert (width / 7 - 1) ** 2 * 0.5 <= grid.size <= (width / 5) ** 2


def test_gradient_noise_is_smooth_and_balanced():
    field = shapes.gradient_noise(np.random.default_rng(0), (128, 200), (8, 4))
    assert field.shape == (128, 200)
    assert 0.5 < field.max() < 1.1
    assert abs(field.mean()) < 0.1
    assert np.abs(np.diff(field, axis=0)).max() < 0.25
    assert np.abs(np.diff(field, axis=1)).max() < 0.15


def test_perlin_stays_in_the_region_and_gives_a_blob_where_it_cannot(monkeypatch):
    rng, region = np.random.default_rng(0), np.zeros((96, 96), np.bool_)
    region[20:50, 30:60] = True
    for _ in range(20):
        mask = shapes.perlin(rng, 96, 96, region)
        assert mask.any()
        assert not mask[~region].any()
    for level in (0.0, 1.0):  # nothing, and everything
        monkeypatch.setattr(shapes, "gradient_noise", lambda *_, value=level: np.full((96, 96), value, np.float32))
        monkeypatch.setattr(cv2, "warpAffine", lambda field, *_: field)
        assert shapes.perlin(rng, 96, 96).shape != (96, 96)


def test_hairline_is_thin_long_and_sometimes_branches():
    masks = [np.pad(mask, 1) for mask in draw("hairline", 120)]
    halves = np.array([cv2.distanceTransform(mask, cv2.DIST_L2, 5).max() for mask in masks])
    assert np.median(halves) <= 2.0
    assert halves.max() < 4.0  # where a crack meets itself
    spans = np.array([np.hypot(*mask.shape) for mask in masks])
    assert spans.min() < 45
    assert spans.max() > 110
    assert all(cv2.connectedComponents(mask)[0] == 2 for mask in masks)


# Fills


def fill_once(name, seed=0, color=True, box=(40, 30), count=3):
    material = make_material(parts(count, (96, 96), color), textures())
    return FILLS[name](np.random.default_rng(seed), material, Place(0, 20, 10, *box)), material


@pytest.mark.parametrize("box", [(1, 1), (1, 7), (40, 30), (76, 86)])
@pytest.mark.parametrize("name", sorted(FILLS))
def test_fill_has_the_size_of_its_box(name, box):
    for seed in range(12):  # most of a texture's edits
        values, _ = fill_once(name, seed, box=box)
        assert values.shape == (*box, 3)
        assert values.dtype == np.float32
        assert values.min() >= 0.0
        assert values.max() <= 255.0


def test_noise_has_defectmakers_numbers(recorded, monkeypatch):
    monkeypatch.setattr(fills, "jitter", lambda image, _, **__: image)
    calls = recorded(fills, "resize")
    for seed in range(500):
        fill_once("noise", seed, box=(24, 32))
    grids = [call[0] for call in calls]
    wanted = {
        (max(1, int(32 / scale / aspect)), max(1, int(32 / scale * aspect)))
        for scale in (1, 2, 4)
        for aspect in (1, 2, 4, 1 / 2, 1 / 4)
    }
    assert {grid.shape[:2] for grid in grids} == wanted
    assert min(grid.min() for grid in grids) == 50 - 45
    assert max(grid.max() for grid in grids) == 190 + 45
    assert max(np.ptp(grid) for grid in grids) == 90
    even = {int(grid.max()) for grid in grids if np.ptp(grid) == 0}
    assert even <= set(range(50, 200, 10))
    assert len(even) > 10


def test_cut_takes_another_image(monkeypatch):
    monkeypatch.setattr(fills, "jitter", lambda image, _, **__: image)
    images = [np.full((32, 32, 3), value, np.float32) for value in (10, 20, 30)]
    rng, material = np.random.default_rng(0), make_material(images)
    assert {float(fills.cut(rng, material, Place(1, 0, 0, 9, 9)).mean()) for _ in range(30)} == {10.0, 30.0}
    assert fills.cut(rng, make_material(images[:1]), Place(0, 0, 0, 9, 9)).mean() == 10.0


def test_cut_comes_from_the_foreground(monkeypatch):
    monkeypatch.setattr(fills, "jitter", lambda image, _, **__: image)
    region = np.zeros((64, 64), np.bool_)
    region[5:9, 40:44] = True
    image = np.dstack([region * 200] * 3).astype(np.float32)
    material = make_material([image, image], foreground=[region, region])
    assert all(
        fills.cut(np.random.default_rng(seed), material, Place(0, 50, 0, 3, 3))[1, 1, 0] == 200 for seed in range(20)
    )


def test_shuffled_moves_whole_cells(monkeypatch):
    monkeypatch.setattr(fills, "jitter", lambda image, _, **__: image)
    cells = np.arange(64, dtype=np.float32).reshape(8, 8)
    image = np.dstack([np.kron(cells, np.ones((5, 6), np.float32))] * 3)
    mixed = fills.shuffled(np.random.default_rng(0), make_material([image]), Place(0, 0, 0, 40, 48))[:, :, 0]
    assert sorted(mixed[::5, ::6].ravel()) == list(range(64))
    assert np.array_equal(mixed, np.kron(mixed[::5, ::6], np.ones((5, 6))))
    part = fills.shuffled(np.random.default_rng(0), make_material([image]), Place(0, 7, 11, 20, 23))[:, :, 0]
    assert np.array_equal(part, mixed[7:27, 11:34])


def test_tone_changes_the_mean_by_8_to_90_levels():
    changes = []
    for seed in range(200):
        values, material = fill_once("tone", seed)
        changes.append(float((values - material.images[0][20:60, 10:40]).mean()))
    assert min(np.abs(changes)) > 7.0
    assert 75.0 < max(np.abs(changes)) < 91.0
    assert 0.3 < np.mean(np.array(changes) > 0) < 0.8


@pytest.mark.parametrize("name", sorted(FILLS))
def test_fill_of_a_gray_product_is_gray(name):
    for seed in range(20):
        values, _ = fill_once(name, seed, color=False)
        assert np.ptp(values, axis=2).max() == 0.0


def test_jitter_changes_little_and_leaves_gray_alone():
    rng = np.random.default_rng(0)
    color = rng.uniform(60.0, 180.0, (16, 16, 3)).astype(np.float32)
    gray = np.repeat(color[:, :, :1], 3, axis=2)
    for _ in range(50):
        assert 0.0 < np.abs(jitter(color, rng, is_gray=False) - color).mean() < 40.0
        assert np.ptp(jitter(gray, rng, is_gray=True), axis=2).max() == 0.0
        assert 0.88 < jitter(gray, rng, is_gray=True).mean() / gray.mean() < 1.12
    assert np.allclose(fills.color_matrix(1.0, 0.0), np.eye(3))
    assert np.allclose(fills.color_matrix(1.0, 1 / 3) @ [255, 0, 0], [0, 255, 0])  # red, green, blue: a third each


# Blending and placement


def test_opacity_is_full_for_blob_and_scar_and_the_recipes_otherwise(monkeypatch):
    monkeypatch.setattr(corruption, "_SOFTENED", 0.0)
    image = np.full((64, 64, 3), 100.0, np.float32)
    monkeypatch.setattr(
        corruption, "FILLS", {"noise": lambda _, __, place: np.full((place.height, place.width, 3), 200.0, np.float32)}
    )
    maker, rng = Corruptor([image], Recipe(("blob",), ("noise",), (0.2, 0.3))), np.random.default_rng(0)
    for shape, low, high in (("blob", 1.0, 1.0), ("scar", 1.0, 1.0), ("clump", 0.5, 1.0), ("ellipse", 0.2, 0.3)):
        found = [maker.corrupt(0, rng, shape) for _ in range(60)]
        weights = np.array([(item.pixels.max() - 100) / 100 for item in found])
        assert weights.min() >= low - 1e-6
        assert weights.max() <= high + 1e-6
        assert np.ptp(weights) >= 0.8 * (high - low)


@pytest.mark.parametrize(("side", "kernel"), [(1, 3), (2, 3), (2, 5), (5, 3), (5, 5), (20, 5)])
def test_soft_edge_fades_and_never_swallows_the_shape(side, kernel):
    patch = np.ones((side, 20), np.float32)
    soft, top, left = corruption._soften(patch, 30, 30, (64, 64), kernel)
    reach = kernel // 2
    assert soft.shape == (side + 2 * reach, 20 + 2 * reach)
    assert (top, left) == (30 - reach, 30 - reach)
    assert (soft >= 0.1).any()
    assert 0.0 < soft.max() <= 1.0
    assert len(np.unique(soft)) > 3
    if side == 20:  # eroded first, the soft edge stays within the shape
        assert soft[:reach].max() == 0.0
        assert soft[soft.shape[0] // 2, soft.shape[1] // 2] == pytest.approx(1.0)


def test_soft_edge_at_the_border_stays_in_the_image():
    soft, top, left = corruption._soften(np.ones((10, 10), np.float32), 0, 54, (64, 64), 5)
    assert (top, left) == (0, 52)
    assert soft.shape == (12, 12)


def test_a_single_faint_pixel_stays_hard():
    patch = np.full((1, 1), 0.5, np.float32)
    soft, *corner = corruption._soften(patch, 9, 9, (32, 32), 3)
    assert np.array_equal(soft, patch)
    assert corner == [9, 9]


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_defect_lies_on_the_foreground(shape):
    region = np.zeros((96, 96), np.bool_)
    region[30:80, 10:60] = True
    maker = Corruptor(parts(), TRAINING, textures=textures(), foreground=[region.astype(np.uint8) * 255] * 4)
    rng = np.random.default_rng(0)
    shares = [np.mean(region[maker.corrupt(0, rng, shape, "noise").mask]) for _ in range(40)]
    assert np.mean(np.array(shares) >= 0.3) > 0.9  # a soft edge moves the share a little


def test_what_cannot_be_seen_is_drawn_again_and_the_strongest_is_kept(recorded):
    flat = [np.full((48, 48, 3), 255.0, np.float32)] * 2
    calls = recorded(corruption, "Corrupted")
    found = Corruptor(flat, Recipe(("ellipse",), ("shuffled",))).corrupt(0, np.random.default_rng(1))
    changes = [np.abs(call[0] - 255.0)[call[1]].mean() for call in calls]
    assert np.abs(found.pixels - 255.0)[found.mask].mean() == max(changes)
    assert len(changes) == 8 or (max(changes) >= 3.0 and changes[-1] == max(changes))


def test_recipe_without_textures_never_asks_for_one():
    maker, rng = Corruptor(parts(), TRAINING), np.random.default_rng(0)
    assert "texture" not in {maker.corrupt(0, rng).fill for _ in range(80)}
    with pytest.raises(UsageError, match="no textures"):
        maker.corrupt(0, rng, fill="texture")
    with pytest.raises(UsageError, match="no fill but"):
        Corruptor(parts(), Recipe(("blob",), ("texture",)))


# Augmentation


@pytest.mark.parametrize(("size", "shares"), [((40, 40), [1, 1, 1, 1, 1, 2, 2]), ((32, 48), [1, 1, 2])])
def test_augmented_image_is_turned_or_mirrored_and_keeps_its_shape(monkeypatch, size, shares):
    monkeypatch.setattr(corruption, "jitter", lambda image, _, **__: image)
    rng, image = np.random.default_rng(0), np.random.default_rng(1).uniform(0, 255, (*size, 3)).astype(np.float32)
    found = [augment(image, rng) for _ in range(100 * sum(shares))]
    assert {item.shape for item in found} == {image.shape}
    assert all(np.array_equal(np.sort(item, axis=None), np.sort(image, axis=None)) for item in found[:20])
    corners = [tuple(item[0, :2, 0]) for item in found]  # tell all poses apart
    assert sorted(round(corners.count(corner) / 100) for corner in set(corners)) == shares
    assert round(corners.count(tuple(image[0, ::-1, 0][:2])) / 100) == 2  # mirrored


def test_augmented_gray_stays_gray():
    rng = np.random.default_rng(0)
    assert all(np.ptp(augment(parts()[0], rng), axis=2).max() == 0.0 for _ in range(20))


# Where the object is


def gray(values):
    return np.repeat(np.clip(values, 0, 255).astype(np.float32)[:, :, None], 3, axis=2)


def bars(angles, length):
    """A textured bar on a grainy belt at each of the angles, and where it is."""
    rng, images, truth = np.random.default_rng(0), [], []
    for angle in angles:
        ends = [tuple(int(64 + way * length * part) for part in (np.cos(angle), np.sin(angle))) for way in (-1, 1)]
        mask = cv2.line(np.zeros((128, 128), np.uint8), *ends, 1, 20) > 0
        belt, metal = 40 + 5 * rng.standard_normal(mask.shape), 150 + 15 * rng.standard_normal(mask.shape)
        images.append(gray(np.where(mask, metal, belt)))
        truth.append(mask)
    return images, truth


@pytest.mark.parametrize("color", [False, True])
@pytest.mark.parametrize(("size", "area"), [((128, 128), np.pi * 0.42**2), ((96, 256), 0.81), ((200, 80), 0.77)])
def test_foreground_is_the_part_with_its_holes(size, area, color):
    for mask in estimate_foreground(parts(4, size, color)):
        assert np.mean(mask) == pytest.approx(area, abs=0.04)
        assert mask[size[0] // 2, size[1] // 2]
        assert not mask[[0, 0, -1, -1], [0, -1, 0, -1]].any()


@pytest.mark.parametrize("length", [40, 120])
def test_foreground_is_found_however_the_part_lies_and_where_it_touches_the_border(length):
    images, truth = bars(np.linspace(0.1, 3.0, 8), length)
    for mask, wanted in zip(estimate_foreground(images), truth, strict=True):
        assert np.count_nonzero(mask & wanted) / np.count_nonzero(mask | wanted) > 0.9


def test_dark_part_on_bright_ground_is_found_in_one_small_image():
    rows, columns = np.mgrid[:32, :32]
    disc = np.hypot(rows - 16, columns - 16) < 9
    (mask,) = estimate_foreground([gray(np.where(disc, 60, 230))])
    assert np.count_nonzero(mask ^ disc) < 30


def textured(kind):
    rng, (rows, columns) = np.random.default_rng(0), np.mgrid[:128, :128]
    plain = 120 + 3 * rng.standard_normal((128, 128))
    if kind == "spots":
        for row, column in rng.integers(0, 128, (60, 2)):
            plain[row : row + 4, column : column + 4] = 30
    values = {
        "flat": np.full((128, 128), 90.0), "spots": plain, "grain": 120 + 20 * rng.standard_normal((128, 128)),
        "stripes": 100 + 60 * np.sin(columns / 5), "vignette": 200 - np.hypot(rows - 64, columns - 64),
        "lattice": 60.0 + 120 * ((rows % 16 < 3) | (columns % 16 < 3)),
    }  # fmt: skip
    return gray(values[kind])


@pytest.mark.parametrize("kind", ["flat", "spots", "grain", "stripes", "vignette", "lattice"])
def test_a_texture_is_foreground_everywhere(kind):
    assert all(mask.all() for mask in estimate_foreground([textured(kind)] * 3))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), blur=st.sampled_from([0.3, 2.0, 8.0, 20.0]), count=st.integers(1, 3))
def test_foreground_is_never_empty(seed, blur, count):
    rng = np.random.default_rng(seed)
    images = [gray(120 + 80 * cv2.GaussianBlur(rng.standard_normal((48, 40)), (0, 0), blur)) for _ in range(count)]
    masks = estimate_foreground(images)
    assert [mask.shape for mask in masks] == [(48, 40)] * count
    assert all(mask.any() and mask.dtype == np.bool_ for mask in masks)


# Preview


@pytest.mark.parametrize(("size", "has_textures"), [((96, 96), True), ((64, 256), False), ((32, 32), False)])
def test_preview_is_a_readable_sheet(tmp_path, size, has_textures):
    maker = Corruptor(parts(2, size), CHOICE, textures=textures() if has_textures else ())
    write_preview(tmp_path / "sheet.png", maker, np.random.default_rng(0))
    sheet = cv2.imread(str(tmp_path / "sheet.png"))
    assert 1800 < sheet.shape[1] <= 2000
    assert (sheet == (0, 0, 255)).all(axis=2).any()  # outlines


def test_preview_that_cannot_be_written_names_the_file(tmp_path):
    with pytest.raises(DataError, match=r"absent.*sheet\.png: cannot be written"):
        write_preview(tmp_path / "absent" / "sheet.png", corruptor(), np.random.default_rng(0))


# What cannot be done


@pytest.mark.parametrize(
    ("images", "found"),
    [
        ([], "found no images"),
        ([np.zeros((64, 64, 3), np.float32), np.zeros((64, 32, 3), np.float32)], r"image 1 is \(64, 32, 3\)"),
        ([np.zeros((64, 64, 3), np.uint8)], "image 0 is uint8"),
        ([np.zeros((64, 64), np.float32)], r"float32 \(64, 64\), wanted float32 \(H W 3\)"),
        ([np.zeros((16, 64, 3), np.float32)], "32 pixels or more"),
        ([np.full((64, 64, 3), -1.0, np.float32)], r"values from -1 to -1, wanted 0\.\.255"),
        ([np.full((64, 64, 3), np.nan, np.float32)], "values from nan"),
    ],
)
def test_images_that_do_not_fit_are_refused(images, found):
    with pytest.raises(DataError, match=found):
        Corruptor(images, TRAINING)
    with pytest.raises(DataError, match=found):
        estimate_foreground(images)


@pytest.mark.parametrize(
    ("recipe", "found"),
    [
        (Recipe(("star",), ("noise",)), "found the shape 'star', wanted one of blob, scar"),
        (Recipe(("blob",), ("paint",)), "found the fill 'paint', wanted one of noise, cut"),
        (Recipe((), ("noise",)), "at least one shape and one fill"),
        (Recipe(("blob",), ("noise",), (0.9, 0.5)), r"found opacity \(0\.9, 0\.5\)"),
        (Recipe(("blob",), ("noise",), (0.0, 0.5)), "found opacity"),
    ],
)
def test_recipes_that_cannot_be_followed_are_refused(recipe, found):
    with pytest.raises(UsageError, match=found):
        Corruptor(parts(), recipe)


def test_other_arguments_that_do_not_fit_are_refused():
    empty, small = np.zeros((96, 96), np.bool_), np.ones((9, 9), np.bool_)
    with pytest.raises(UsageError, match="'star'"):
        corrupted("star", "noise")
    with pytest.raises(UsageError, match="'paint'"):
        corrupted("blob", "paint")
    with pytest.raises(DataError, match="3 foreground masks and 4 images"):
        Corruptor(parts(), TRAINING, foreground=[~empty] * 3)
    for mask, found in ((empty, "mask 0 is .* with 0 pixels set"), (small, r"mask 0 is \(9, 9\)")):
        with pytest.raises(DataError, match=found):
            Corruptor(parts(), TRAINING, foreground=[mask] * 4)
    with pytest.raises(DataError, match="texture 0 is float64"):
        Corruptor(parts(), TRAINING, textures=[np.zeros((8, 8, 3))])
