"""One engine for many products: what the method does on small data, and a whole build of two products."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from safetensors.numpy import load_file

from daemon.bundle import CALIBRATION, FP16_NETWORKS, NETWORKS, QUALITY, current_bundle, open_bundle
from daemon.config import parse_config
from daemon.errors import UsageError
from daemon.inspection.backend import open_backend
from daemon.inspection.backend.tables import score_of
from daemon.inspection.engine import Done
from daemon.inspection.golden import check_golden
from daemon.inspection.pipeline import Pipeline
from daemon.keys import load_trusted
from daemon.loading import open_engines
from daemon.record.metrics import Metrics
from daemon.types import Frame
from examples.parts import write_dataset
from tests.test_repair import feature_maps, feature_sampler, spoil_features
from tests.test_trainer import ROOT
from tests.toys import tiny_backbone
from trainer import crr
from trainer.crr import CrrMap, CrrRecipe, Decoder, Segmenter
from trainer.dataset import list_images, read_frame
from trainer.export import CrrNetwork, export_map
from trainer.many import recipe_without
from trainer.plans import build_plan, convert_to_fp16
from trainer.samplers import FeatureSampler
from trainer.schedule import Schedule
from trainer.site import options_of

GROUPS, GRID = (2, 4), (12, 12)
SMALL = CrrRecipe(width=32, blocks=1)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks as small as these wait for each other's threads longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(recipe, steps=150, seed=0):
    torch.manual_seed(seed)
    decoder = Decoder(6, GRID, recipe)
    crr.train_decoder(decoder, feature_sampler(), GROUPS, Schedule(steps=steps), recipe=recipe, seed=seed)
    return decoder


@cache
def whole():
    return trained(SMALL)


def distances(decoder, features):
    """(B gh gw): 1 less the cosine of what goes in and what comes out."""
    with torch.inference_mode():
        return crr.distance_map(crr.agreement(features, decoder(features), GROUPS), GROUPS)[:, 0]


def held_out(batch):
    """Standardised features of good maps that no training saw, the same spoilt, and the masks."""
    sampler = feature_sampler()
    good = feature_maps(batch, 77)
    spoilt, masks = spoil_features(good, 78)
    return *((part - sampler.mean.view(1, -1, 1, 1)) / sampler.std.view(1, -1, 1, 1) for part in (good, spoilt)), masks


# The method


def test_decoder_gives_good_features_back_and_not_the_defects():
    good, spoilt, masks = held_out(16)
    on_good, on_spoilt = distances(whole(), good), distances(whole(), spoilt)
    inside, outside = on_spoilt[masks > 0].mean(), on_spoilt[masks == 0].mean()
    assert on_good.mean() < 0.2
    assert inside > 3 * on_good.mean()
    assert inside > 2 * outside


def test_repair_gives_back_more_of_what_was_there_before_the_defect_and_copies_less_of_it():
    batch = feature_sampler().draw(999)
    inside = batch.mask[:, 0] > 0
    from_clean, from_seen = [], []
    for repairs in (True, False):
        decoder = trained(replace(SMALL, masked=0.0, repairs=repairs), steps=200)
        with torch.inference_mode():
            decoded = decoder(batch.corrupted)
            for kept, encoded in ((from_clean, batch.clean), (from_seen, batch.corrupted)):
                kept.append(crr.distance_map(crr.agreement(encoded, decoded, GROUPS), GROUPS)[:, 0][inside].mean())
    assert from_clean[0] < 0.85 * from_clean[1]
    assert from_seen[0] > from_seen[1]


def test_masking_belongs_to_the_training_alone():
    good, _, _ = held_out(2)
    decoder = whole().eval()
    with torch.inference_mode():
        assert torch.equal(decoder(good), decoder(good))
        assert not torch.equal(decoder.train()(good), decoder(good))
    decoder.eval()


def test_training_with_a_seed_and_steps_is_the_same_to_the_bit():
    one, other = (trained(SMALL, steps=5).state_dict() for _ in range(2))
    assert all(torch.equal(one[key], other[key]) for key in one)
    third = trained(SMALL, steps=5, seed=1).state_dict()
    assert any(not torch.equal(one[key], third[key]) for key in one)


def test_training_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.checkpoint._SAVE_EVERY_S", 0.0)
    wanted = trained(SMALL, steps=6).state_dict()

    class Killed(FeatureSampler):
        def draw(self, step):
            if step == 4:
                raise KeyboardInterrupt
            return feature_sampler().draw(step)

    def train(sampler):
        torch.manual_seed(0)
        decoder = Decoder(6, GRID, SMALL)
        schedule = Schedule(steps=6)
        crr.train_decoder(
            decoder, sampler, GROUPS, schedule, recipe=SMALL, seed=0, checkpoint=tmp_path / "decoder.checkpoint"
        )
        return decoder.state_dict()

    killed = Killed.__new__(Killed)
    killed.__dict__.update(feature_sampler().__dict__)
    with pytest.raises(KeyboardInterrupt):
        train(killed)
    found = train(feature_sampler())
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert not (tmp_path / "decoder.checkpoint").exists()


def test_segmentation_finds_what_was_corrupted():
    torch.manual_seed(0)
    segmenter = Segmenter(6)
    crr.train_segmenter(
        segmenter, whole(), feature_sampler(), GROUPS, Schedule(steps=120), recipe=SMALL, seed=0
    )  # fmt: skip
    scale = (feature_sampler().mean, feature_sampler().std)
    made = CrrMap(whole(), segmenter, scale, GROUPS, weight=0.3)
    _, spoilt, masks = held_out(16)
    features = spoilt * scale[1].view(1, -1, 1, 1) + scale[0].view(1, -1, 1, 1)
    with torch.inference_mode():
        distance, chance = made.parts(features)
        mixed = made(features)
    assert chance[:, 0][masks > 0].mean() > 2 * chance[:, 0][masks == 0].mean()
    torch.testing.assert_close(mixed, 0.7 * distance + 0.3 * chance)


def test_segmentation_without_weight_is_no_part_of_the_network():
    made = CrrMap(whole(), Segmenter(6), (torch.zeros(6), torch.ones(6)), GROUPS, weight=0.0)
    assert made.segmenter is None
    good, _, _ = held_out(1)
    torch.testing.assert_close(made(good)[:, 0], distances(whole(), good))


def test_cosine_of_a_group_is_the_sum_of_its_products():
    generator = torch.Generator().manual_seed(3)
    one, other = (torch.randn(2, 6, 3, 3, generator=generator) for _ in range(2))
    products = crr.agreement(one, other, GROUPS)
    for group in (slice(0, 2), slice(2, 6)):
        wanted = torch.cosine_similarity(one[:, group], other[:, group], dim=1)
        torch.testing.assert_close(products[:, group].sum(1), wanted, rtol=1e-4, atol=1e-4)


def test_matching_loss_is_nothing_for_what_is_equal_and_two_for_the_opposite():
    x = torch.randn(2, 6, 3, 3, generator=torch.Generator().manual_seed(3))
    assert crr.matching_loss(x, 5 * x, GROUPS, 0.0).item() == pytest.approx(0.0, abs=1e-5)
    assert crr.matching_loss(x, -x, GROUPS, 0.5).item() == pytest.approx(2.0, abs=1e-5)


def test_positions_that_are_learnt_pass_a_tenth_of_the_gradient():
    generator = torch.Generator().manual_seed(3)
    encoded, start = (torch.randn(1, 6, 4, 4, generator=generator) for _ in range(2))
    gradients = []
    for easy in (0.0, 0.5):
        decoded = start.clone().requires_grad_()
        crr.matching_loss(encoded, decoded, (6,), easy).backward()
        gradients.append(decoded.grad)
    apart = 1 - torch.cosine_similarity(encoded, start, dim=1)
    easy = (apart < apart.flatten().quantile(0.5)).unsqueeze(1).expand_as(start)
    torch.testing.assert_close(gradients[1][easy], 0.1 * gradients[0][easy])
    torch.testing.assert_close(gradients[1][~easy], gradients[0][~easy])
    assert 0 < int(easy.sum()) < easy.numel()


def test_focal_loss_makes_little_of_what_is_known():
    sure, unsure = torch.tensor([[[[6.0]]]]), torch.tensor([[[[0.0]]]])
    wanted = torch.ones(1, 1, 1, 1)
    plain = torch.nn.functional.binary_cross_entropy_with_logits
    assert crr.focal_loss(sure, wanted) < 1e-4 * plain(sure, wanted)
    assert crr.focal_loss(unsure, wanted).item() == pytest.approx(0.25 * plain(unsure, wanted).item())


def test_score_is_the_mean_of_the_highest_hundredth():
    values = np.random.default_rng(0).normal(size=(40, 50)).astype(np.float32)
    assert score_of(values, "top1pct") == pytest.approx(float(np.sort(values.ravel())[-20:].mean()), rel=1e-6)
    assert score_of(values, "max") == float(values.max())
    assert score_of(values[:3, :3], "top1pct") == float(values[:3, :3].max())
    values[3, 3] = np.nan
    assert np.isnan(score_of(values, "top1pct"))


def test_ablation_leaves_out_what_it_names():
    assert not recipe_without(["repair"]).repairs
    assert recipe_without(["masking"]).masked == 0.0
    assert recipe_without([]) == CrrRecipe()


# On a GPU


def test_network_has_the_daemons_tensors_in_fp16_and_a_plan_is_built_without_a_gpu(tmp_path):
    torch.manual_seed(0)
    made = CrrMap(
        Decoder(24, (8, 12), SMALL), Segmenter(24), (torch.zeros(24), torch.ones(24)), (12, 12), weight=0.3
    ).eval()  # fmt: skip
    export_map(CrrNetwork(tiny_backbone(), made), (64, 96), tmp_path / NETWORKS)
    convert_to_fp16(tmp_path / NETWORKS, tmp_path / FP16_NETWORKS)
    model = onnx.load(tmp_path / FP16_NETWORKS)
    tensors = {
        value.name: (value.type.tensor_type.elem_type, [dim.dim_value for dim in value.type.tensor_type.shape.dim])
        for value in (*model.graph.input, *model.graph.output)
    }
    assert tensors == {"image": (TensorProto.FLOAT16, [1, 3, 64, 96]), "map": (TensorProto.FLOAT, [96])}
    assert build_plan(tmp_path / FP16_NETWORKS, "rtx", "86", tmp_path).stat().st_size > 10_000


# The command line


def fields(**given):
    return {"name": "both", "kind": "crr", "good": (), "select": (), "calibration": (), "test": (), **given}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"good": ("images",)}, "found --good images, wanted PRODUCT=DIR"),
        ({"good": ("a=x", "a=y")}, "found --good for a twice"),
        ({"good": ("a=x",), "test": ("b=y",)}, "found --test for b, wanted products of --good: a"),
        ({"kind": "fused", "good": ("x", "y")}, "found --good 2 times, wanted it once"),
    ],
)
def test_what_is_wrong_with_the_products_is_told(given, told):
    with pytest.raises(UsageError, match=told):
        options_of(fields(**given))


# A whole build


@pytest.fixture(scope="module")
def products(tmp_path_factory):
    """Two products: rendered parts, and their negatives."""
    place = tmp_path_factory.mktemp("products")
    write_dataset(place / "part", good_train=34, good_test=5, defects_each=2, size_hw=(96, 96), seed=5)
    for path in sorted((place / "part").rglob("*.png")):
        target = place / "negative" / path.relative_to(place / "part")
        target.parent.mkdir(parents=True, exist_ok=True)
        pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        cv2.imwrite(str(target), pixels if "ground_truth" in path.parts else 255 - pixels)
    return place


def arguments(products, out, *names):
    given = [text for name in names for text in ("--good", f"{name}={products / name / 'train/good'}")]
    return [*given, "--kind", "crr", "--out", out / "engines", "--keys", out / "keys", "--size", 64, "--threads", 1]


@pytest.fixture(scope="module")
def built(products, tmp_path_factory):
    """(place, bundle) of an engine for both."""
    place = tmp_path_factory.mktemp("crr")
    call = [sys.executable, ROOT / "build_engines.py", "both", *arguments(products, place, "part", "negative")]
    call += ["--steps", 40, "--test", f"part={products / 'part'}", "--false-reject", 0.1]
    done = subprocess.run([str(part) for part in call], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    trusted = load_trusted(place / "keys/trusted.yaml")
    return place, open_bundle(current_bundle(place / "engines", "both"), trusted), done.stderr


def test_bundle_has_a_limit_and_golden_frames_for_each_product(built):
    _, bundle, said = built
    manifest = bundle.manifest
    assert (manifest.kind, manifest.branches, manifest.scoreRule) == ("crr", ["map"], "top1pct")
    assert set(manifest.products) == {"part", "negative"}
    assert {frame.product for frame in manifest.golden.frames} == {"part", "negative"}
    assert manifest.products["part"].limit != manifest.products["negative"].limit
    assert set(load_file(bundle.folder / CALIBRATION)) == {"part", "negative"}
    assert {key.partition("/")[0] for key in load_file(bundle.folder / QUALITY)} == {"part", "negative"}
    assert {"report-part.html", "report-negative.html", "crr.safetensors"} <= set(manifest.files)
    assert set(manifest.metrics) == {"part"}
    assert "M parameters" in said
    assert "segmentation weight" in said


def test_engine_judges_each_product_by_its_own_limit(built, products):
    _, bundle, _ = built
    pipeline = Pipeline(bundle, open_backend(bundle))
    assert check_golden(pipeline) < 1.0
    frames = {name: read_frame(list_images(products / name / "train/good")[-1]) for name in ("part", "negative")}
    maps = {name: pipeline.anomaly_map(frame).values.copy() for name, frame in frames.items()}
    for name, frame in frames.items():
        verdict = pipeline.judge(pipeline.anomaly_map(frame), name)
        assert verdict.limit == bundle.manifest.products[name].limit
        assert np.array_equal(pipeline.anomaly_map(frame).values, maps[name])
        assert verdict.score == score_of(maps[name], "top1pct")
    pipeline.backend.close()


def test_defect_always_has_a_region(built, products):
    _, bundle, _ = built
    pipeline = Pipeline(bundle, open_backend(bundle))
    pixels = read_frame(list_images(products / "part" / "train/good")[0]).pixels.copy()
    pixels[20:70, 20:70] = 255 - pixels[20:70, 20:70]
    verdict = pipeline.judge(pipeline.anomaly_map(Frame(pixels)), "part")
    assert verdict.outcome == "REJECT"
    assert verdict.regions
    pipeline.backend.close()


def test_one_resident_engine_serves_every_product_and_the_cameras_name_it(built, tmp_path):
    place, _, _ = built
    text = f"""
version: 1
line: one
inputs: [{{kind: router, bind: "ipc://{tmp_path}/in", plain: true}}]
results: {{bind: "ipc://{tmp_path}/out", plain: true}}
permits: {{bind: "ipc://{tmp_path}/plc", plain: true}}
control: {{bind: "ipc://{tmp_path}/control"}}
security: {{keys: {place / "keys"}}}
engines: {{dir: {place / "engines"}}}
cameras:
  cam1: {{product: part, engine: both, deadline_ms: 500, valid_ms: 500}}
  cam2: {{product: part, engine: both, deadline_ms: 500, valid_ms: 500}}
"""
    config = parse_config(text, "config.yaml", tmp_path)
    done: list[Done] = []
    engines = open_engines(config, Metrics(), done.append)
    assert set(engines) == {"part", "negative"}
    assert engines["part"] is engines["negative"]
    engines["part"].pipeline.backend.close()


def test_scores_are_printed_for_the_product_that_is_asked_for(built, products, inspectd):
    place, bundle, _ = built
    image = list_images(products / "negative" / "train/good")[-1]
    trusted = ("--trusted", place / "keys/trusted.yaml")
    unasked = inspectd("score", bundle.folder, image, *trusted)
    assert unasked.code == 78
    assert "wanted one of part, negative (--product)" in unasked.err
    asked = inspectd("score", bundle.folder, image, "--product", "negative", *trusted)
    assert asked.code == 0
    assert json.loads(asked.out)["limit"] == bundle.manifest.products["negative"].limit


def test_product_joins_an_engine_and_the_limits_of_all_are_set_again(built, products, run_here):
    place, bundle, _ = built
    joining = ["--add-product", bundle.folder, "--steps", 10, "--false-reject", 0.1]
    code, _, said = run_here("both", *arguments(products, place, "part", "negative"), *joining)
    assert code == 64
    assert "found no product that" in said
    code, _, said = run_here("both", *arguments(products, place, "part"), *joining)
    assert code == 64
    assert "found no --good for negative" in said
    (products / "third").mkdir(exist_ok=True)
    (products / "third/train").symlink_to(products / "part/train")
    code, out, said = run_here("both", *arguments(products, place, "part", "negative", "third"), *joining)
    assert not code, said
    joined = open_bundle(Path(out.strip()), load_trusted(place / "keys/trusted.yaml"))
    assert set(joined.manifest.products) == {"part", "negative", "third"}
    before, after = (load_file(each.folder / "crr.safetensors") for each in (bundle, joined))
    assert np.array_equal(before["mean"], after["mean"])  # what the decoder was trained on stays its scale


@pytest.mark.parametrize("option", [("--k", 3), ("--branches", "ldknn"), ("--budget-ms", 10)])
def test_options_of_an_engine_for_one_product_are_refused(products, tmp_path, run_here, option):
    code, _, said = run_here("both", *arguments(products, tmp_path, "part"), *option)
    assert code == 64
    assert f"found {option[0]}, wanted" in said


def test_few_images_of_one_product_are_told(products, tmp_path, run_here):
    few = tmp_path / "few"
    few.mkdir()
    for path in list_images(products / "part/train/good")[:10]:
        (few / path.name).symlink_to(path)
    given = ["--good", f"part={products / 'part/train/good'}", "--good", f"rare={few}", "--kind", "crr", "--steps", 1]
    code, _, said = run_here("both", *given, "--out", tmp_path / "engines", "--keys", tmp_path / "keys")
    assert code == 65
    assert "fewer than 30 good images of rare (10)" in said
