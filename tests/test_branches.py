"""Both branches in one engine: what the network computes, what the daemon makes of it, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import onnx
import openvino as ov
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file
from torch import nn

from daemon.bundle import BANK, CALIBRATION, NETWORKS, open_bundle, seal_bundle
from daemon.errors import BundleError, DataError
from daemon.inspection.backend import open_backend
from daemon.inspection.backend.cpu import normalise
from daemon.inspection.backend.tables import smoothing_operator
from daemon.inspection.pipeline import Pipeline
from daemon.keys import load_trusted, make_signing_key
from daemon.types import Frame
from tests import bundles, reference
from tests.toys import tiny_backbone
from trainer.branch import choose_spaces, load_textures
from trainer.export import EngineNetwork, export_network
from trainer.repair import RepairNet, RepairScore
from trainer.schedule import Schedule
from trainer.settings import View

SIZE = (64, 96)
GRID = (8, 12)


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone((120.0, 125.0, 130.0), (60.0, 62.0, 64.0))


@pytest.fixture(scope="module")
def pixels():
    """(1 3 64 96) in 60..140: smooth patches of colour."""
    coarse = torch.rand(1, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(coarse, SIZE, mode="bilinear") * 80.0 + 60.0


def scaled(pixels, backbone):
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (backbone.mean, backbone.std))
    return (pixels - mean) / std


def make_repair(channels, halvings=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = RepairNet(channels, 8, halvings).eval().requires_grad_(False)
    scale = (torch.full((channels,), 100.0), torch.full((channels,), 50.0)) if halvings else (
        torch.full((channels,), 0.3), torch.full((channels,), 0.7)
    )  # fmt: skip
    return RepairScore(net, *scale, GRID, space="image" if halvings else "features", typical=0.5).eval()


# The engine's network


def change_under_gain(network, backbone, pixels, gain):
    with torch.inference_mode():
        before, after = (network(scaled(values, backbone)) for values in (pixels, gain * pixels))
    return float((after - before).norm() / before.norm())


@pytest.mark.parametrize("gain", [0.7, 0.85, 1.2, 1.6])
def test_levelled_exposure_hardly_sees_a_gain(backbone, pixels, gain):
    levelled = change_under_gain(EngineNetwork(backbone, View("levelled")).eval(), backbone, pixels, gain)
    as_is = change_under_gain(EngineNetwork(backbone).eval(), backbone, pixels, gain)
    assert levelled < 0.1
    assert as_is > 0.15
    assert as_is > 4 * levelled


@pytest.mark.parametrize("gain", [0.7, 1.6])
def test_gain_that_levelling_leaves_is_of_the_order_of_the_dark_offset(backbone, pixels, gain):
    network = EngineNetwork(backbone, View("levelled"))
    one, other = (
        network.level(scaled(values, backbone)) * network.std + network.mean for values in (pixels, gain * pixels)
    )
    assert float((other / one - 1).abs().max()) < 5.0 / float((gain * pixels).mean())


def test_levelled_frame_has_the_wanted_brightness_and_a_dark_one_is_not_all_noise(backbone, pixels):
    network = EngineNetwork(backbone, View("levelled"))
    dark = torch.full_like(pixels, 1.0)
    for given, low, high in ((pixels, 100.0, 111.0), (dark, 0.0, 30.0)):
        level = network.level(scaled(given, backbone)) * network.std + network.mean
        assert low < float(level.mean()) < high
        assert float(level.min()) >= 0.0
        assert float(level.max()) <= 255.0


def test_tiles_are_the_four_quarters_run_apart(backbone, pixels):
    image = scaled(pixels, backbone)
    whole, tiled = EngineNetwork(backbone).eval(), EngineNetwork(backbone, View(tiles="2x2")).eval()
    with torch.inference_mode():
        rows = tiled(image).reshape(*GRID, -1)
        for row in range(2):
            for column in range(2):
                quarter = image[:, :, row * 32 : row * 32 + 32, column * 48 : column * 48 + 48]
                place = rows[row * 4 : row * 4 + 4, column * 6 : column * 6 + 6]
                torch.testing.assert_close(place.reshape(24, -1), whole(quarter))
        assert not torch.allclose(tiled(image), whole(image))


@pytest.mark.parametrize(
    ("view", "spaces"),
    [
        (View(), ["features"]),
        (View("levelled", "2x2"), ["features"]),
        (View("levelled"), ["image"]),
        (View("levelled"), ["features", "image"]),
    ],
)
def test_exported_network_gives_what_torch_gives(tmp_path, backbone, pixels, view, spaces):
    made = {"features": make_repair(24), "image": make_repair(3, halvings=1)}
    network = EngineNetwork(backbone, view, [made[space] for space in spaces]).eval()
    assert export_network(network, SIZE, tmp_path / "n.onnx") == GRID
    image = scaled(pixels, backbone)
    with torch.inference_mode():
        wanted = network(image)
    compiled = ov.Core().compile_model(tmp_path / "n.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert [output.get_any_name() for output in compiled.outputs] == ["features", "repair"]
    found = compiled([image.numpy()])
    assert found[1].shape == (GRID[0] * GRID[1],)
    assert float(found[1].min()) >= 0
    for index, output in enumerate(wanted):
        np.testing.assert_allclose(found[index], output.numpy(), rtol=1e-4, atol=1e-4 * float(output.abs().max()))


def test_features_are_the_same_with_and_without_repair(backbone, pixels):
    image = scaled(pixels, backbone)
    with torch.inference_mode():
        alone = EngineNetwork(backbone).eval()(image)
        rows, scores = EngineNetwork(backbone, repairs=[make_repair(24)]).eval()(image)
    assert torch.equal(alone, rows)
    assert scores.shape == (GRID[0] * GRID[1],)


def test_repairs_of_both_spaces_are_added_and_see_the_same_exposure(backbone, pixels):
    image = scaled(pixels, backbone)
    ours = {"features": make_repair(24), "image": make_repair(3, halvings=1)}
    with torch.inference_mode():
        alone = [EngineNetwork(backbone, View("levelled"), [each]).eval()(image)[1] for each in ours.values()]
        both = EngineNetwork(backbone, View("levelled"), list(ours.values())).eval()
        torch.testing.assert_close(both(image)[1], alone[0] + alone[1])
        seen = both.level(image) * both.std + both.mean
        torch.testing.assert_close(alone[1], ours["image"](seen))
        assert not torch.allclose(alone[1], ours["image"](pixels))


@pytest.mark.parametrize(
    ("wanted", "schedule", "spaces"),
    [
        ("auto", Schedule(steps=10_000), ("features",)),
        ("auto", Schedule(seconds=1199.0), ("features",)),
        ("auto", Schedule(seconds=1200.0), ("features", "image")),
        ("image", Schedule(seconds=5.0), ("image",)),
        ("features", Schedule(seconds=5000.0), ("features",)),
        ("both", Schedule(steps=3), ("features", "image")),
    ],
)
def test_image_is_repaired_where_there_is_time_for_it(monkeypatch, wanted, schedule, spaces):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_spaces(wanted, schedule) == spaces


def test_image_is_repaired_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_spaces("auto", Schedule(seconds=60.0)) == ("features", "image")


# The daemon's side, on the tests' small bundle with a second output


def with_repair(data):
    """The network of tests.bundles with an output `repair` (P): the mean square of a patch's features."""
    model = onnx.load_from_string(data)
    patches = model.graph.output[0].type.tensor_type.shape.dim[0].dim_value
    model.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "axes"))
    model.graph.node.extend(
        [
            helper.make_node("Mul", ["features", "features"], ["square"]),
            helper.make_node("ReduceMean", ["square"], ["repair"], axes=[1], keepdims=0),
        ]
    )
    del model.graph.initializer[-1]
    model.graph.output.append(helper.make_tensor_value_info("repair", TensorProto.FLOAT, [patches]))
    onnx.checker.check_model(model)
    return model.SerializeToString()


WEIGHTS = {"ldknn": 0.75, "repair": 0.5}
STANDARD = {"centre": 0.4, "scale": 0.2}


def make_bundle(place, branches, *, output=True):
    """A bundle with these branches; without `output` its network lacks what the manifest promises."""
    folder, keys = place / "bundle", place / "keys"
    fields = {}
    bundles.make_bundle(folder, keys, change=fields.update)
    if output:
        (folder / NETWORKS).write_bytes(with_repair((folder / NETWORKS).read_bytes()))
    fields["branches"] = list(branches)
    fields["fusion"]["weights"] = {branch: WEIGHTS[branch] for branch in branches}
    known = {"ldknn": fields["fusion"]["standardisation"]["ldknn"], "repair": STANDARD}
    fields["fusion"]["standardisation"] = {branch: known[branch] for branch in branches}
    if "ldknn" not in branches:
        (folder / BANK).unlink()
    fields.pop("files", None)
    seal_bundle(folder, fields, make_signing_key(keys))
    return open_bundle(folder, load_trusted(keys / "trusted.yaml"))


def expected_map(bundle, pixels):
    """The same in NumPy, in double precision where it can be."""
    manifest = bundle.manifest
    features = reference.patch_convolution(normalise(Frame(pixels), manifest.preprocessing), bundles.random_weights())
    grids = {"repair": (features**2).mean(1)}
    if "ldknn" in manifest.branches:
        bank = load_file(bundle.folder / BANK)
        grids["ldknn"], _ = reference.ldknn(features, bank["core"], bank["density"], manifest.alpha)
    total = np.zeros(manifest.grid)
    for branch in manifest.branches:
        standard = manifest.fusion.standardisation[branch]
        total += (
            manifest.fusion.weights[branch] * (grids[branch].reshape(manifest.grid) - standard.centre) / standard.scale
        )
    operators = [
        smoothing_operator(side, cells, manifest.fusion.smoothingSigma).astype(np.float64)
        for side, cells in zip(manifest.preprocessing.size, manifest.grid, strict=True)
    ]
    return operators[0] @ total @ operators[1].T


@pytest.mark.parametrize("branches", [("ldknn", "repair"), ("repair", "ldknn"), ("ldknn",), ("repair",)])
def test_map_is_the_weighted_sum_of_the_standardised_branches(tmp_path, branches):
    bundle = make_bundle(tmp_path, branches, output="repair" in branches)
    pipeline = Pipeline(bundle, open_backend(bundle, "cpu", "f32", 1))
    for pixels in (bundles.good_pixels(3), bundles.bad_pixels(4)):
        found = pipeline.anomaly_map(Frame(pixels))
        wanted = expected_map(bundle, pixels)
        np.testing.assert_allclose(found.values, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())
        assert found.score == pytest.approx(float(wanted.max()), rel=1e-3)
    pipeline.backend.close()


def test_repair_alone_needs_no_bank(tmp_path):
    bundle = make_bundle(tmp_path, ("repair",))
    assert not (bundle.folder / BANK).exists()
    assert BANK not in bundle.manifest.files
    assert CALIBRATION in bundle.manifest.files
    backend = open_backend(bundle, "cpu", "f32", 1)
    outputs = backend.infer(backend.preprocess(Frame(bundles.bad_pixels())))
    assert list(outputs) == ["repair"]
    repaired = outputs["repair"]
    assert repaired.values.shape == (64,)
    assert repaired.values.min() >= 0
    backend.close()


@pytest.mark.parametrize("branches", [("ldknn", "repair"), ("repair",)])
def test_network_without_the_promised_output_is_refused(tmp_path, branches):
    bundle = make_bundle(tmp_path, branches, output=False)
    with pytest.raises(BundleError, match=r"found outputs \[\(64, 16\)\], wanted \(64, C\) and \(64,\)"):
        open_backend(bundle, "cpu", "f32", 1)


def test_network_with_an_output_too_many_is_refused(tmp_path):
    bundle = make_bundle(tmp_path, ("ldknn",), output=True)
    with pytest.raises(BundleError, match=r"found outputs \[\(64, 16\), \(64,\)\], wanted \(64, C\)$"):
        open_backend(bundle, "cpu", "f32", 1)


# Textures for the corruptions


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)


def test_textures_of_all_kinds_are_found_in_nested_folders(tmp_path):
    write(tmp_path / "a" / "b" / "deep16.png", np.full((20, 30), 257 * 200, np.uint16))
    write(tmp_path / "a" / "gray.png", np.full((20, 30), 100, np.uint8))
    write(tmp_path / "c" / "bgr.png", np.full((1200, 600, 3), (10, 20, 30), np.uint8))
    write(tmp_path / "top.bmp", np.full((8, 8), 50, np.uint8))
    (tmp_path / "empty").mkdir()
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "notes.txt").touch()
    found = load_textures(tmp_path)
    assert [texture.shape for texture in found] == [(8, 8, 3), (20, 30, 3), (20, 30, 3), (512, 256, 3)]
    assert {texture.dtype for texture in found} == {np.dtype(np.float32)}
    levels = [tuple(np.unique(texture.reshape(-1, 3), axis=0).ravel()) for texture in found]
    assert levels == [(50,) * 3, (100,) * 3, (pytest.approx(200),) * 3, (30, 20, 10)]


def test_thin_texture_is_not_shrunk_to_nothing(tmp_path):
    write(tmp_path / "line.png", np.full((1, 3000), 80, np.uint8))
    assert load_textures(tmp_path)[0].shape == (1, 512, 3)


def test_no_texture_folder_is_no_textures():
    assert load_textures(None) == []


@pytest.mark.parametrize("folders", [(), ("inner",), ("one", "two/three")])
def test_folder_without_textures_is_an_error_that_names_it(tmp_path, folders):
    place = tmp_path / "textures"
    place.mkdir()
    for name in folders:
        (place / name).mkdir(parents=True)
    with pytest.raises(DataError, match="textures: found no pictures"):
        load_textures(place)


def test_absent_texture_folder_is_an_error():
    with pytest.raises(DataError, match="absent: found nothing"):
        load_textures(Path("absent"))
