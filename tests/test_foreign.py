"""Somebody else's model as an engine: what is found in it, what is made of it, how it judges, and what is refused."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import click
import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import load_file
from torch import nn

from daemon.bundle import BANK, CALIBRATION, FP16_NETWORKS, NETWORKS, open_bundle, seal_bundle
from daemon.errors import BundleError, DataError, DeviceError, InspectError, UsageError
from daemon.inspection.backend import open_backend
from daemon.inspection.golden import check_golden
from daemon.inspection.pipeline import Pipeline
from daemon.keys import load_trusted, make_signing_key
from daemon.score import open_pipeline
from daemon.types import Frame, Outcome
from examples.parts import write_dataset
from tests import models, reference
from tests.commands import Ended
from tests.models import BOOL, FLOAT, UINT8, pooled, template, toy, write
from trainer import onnxfile, plans, report
from trainer.dataset import read_frame
from trainer.export import _silence
from trainer.foreign import command
from trainer.onnxfile import read_onnx
from trainer.original import Original, choose_output, find_input
from trainer.plans import convert_to_fp16
from trainer.wrap import compare, wrap

HW = (64, 64)
GOOD = 40


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Colour pictures: train/good, test/good, test/<defect>, ground_truth."""
    folder = tmp_path_factory.mktemp("parts")
    write_dataset(folder, good_train=GOOD, good_test=6, defects_each=2, size_hw=HW, color=True)
    return folder


@pytest.fixture(scope="module")
def good(parts):
    return parts / "train/good"


@pytest.fixture(scope="module")
def few(good, tmp_path_factory):
    """A handful of good images."""
    folder = tmp_path_factory.mktemp("few")
    for path in sorted(good.iterdir())[:5]:
        shutil.copy(path, folder)
    return folder


class Template(nn.Module):
    """How far each patch lies from the mean good part, by a convolution; as anomalib's exports name it."""

    def __init__(self, mean):
        super().__init__()
        self.register_buffer("mean", mean)
        self.pool = nn.Conv2d(3, 1, 8, stride=8, bias=False).requires_grad_(False)
        self.pool.weight.fill_(1 / 192)

    def forward(self, image):
        anomaly_map = self.pool((image - self.mean).abs())
        score = anomaly_map.amax((1, 2, 3))
        return score, score > 0.2, anomaly_map, anomaly_map > 0.2


@pytest.fixture(scope="module")
def exported(good, tmp_path_factory):
    """By PyTorch, with an open batch."""
    path = tmp_path_factory.mktemp("model") / "template.onnx"
    names = ["pred_score", "pred_label", "anomaly_map", "pred_mask"]
    with _silence():
        torch.onnx.export(
            Template(torch.from_numpy(models.mean_picture(good))).eval(), (torch.zeros(2, 3, *HW),), path,
            input_names=["input"], output_names=names, dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip
    return path


def imported(model, good, place, *more, product="part", pixels="0..1") -> Ended:
    """`inspectd import` into the folder `place`, as its function."""
    given = [model, "--product", product, "--good", good, "--out", place / "engines", "--keys", place / "keys"]
    given += ["--pixels", pixels] if pixels else []
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            command.main([str(word) for word in (*given, "--threads", 1, *more)], standalone_mode=False)
        except InspectError as error:
            code = error.exit_code
            print(error, file=sys.stderr)
        except click.ClickException as error:
            code = UsageError.exit_code
            print(error.format_message(), file=sys.stderr)
    return Ended(code, out.getvalue(), err.getvalue())


def bundle_of(ended, place):
    assert ended.code == 0, ended.err
    return open_bundle(Path(ended.out.strip().splitlines()[-1]), load_trusted(place / "keys/trusted.yaml"))


@pytest.fixture(scope="module")
def built(exported, parts, good, tmp_path_factory):
    """(what the import said, its folder), tested on labelled parts."""
    place = tmp_path_factory.mktemp("built")
    return imported(exported, good, place, "--test", parts, "--smoothing", 2), place


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing the report takes longer than all the rest of a small import; the engine that is `built` has them."""
    monkeypatch.setattr(report, "_histogram", lambda _contents: b"")
    monkeypatch.setattr(report, "_gallery", lambda *_given: "")


@pytest.fixture
def bundle(built):
    return bundle_of(*built)


@pytest.fixture
def pipeline(bundle):
    opened = Pipeline(bundle, open_backend(bundle, "cpu", "f32", 1))
    yield opened
    opened.backend.close()


# -- a model exported by PyTorch, from import to verdict


def test_the_bundle_is_a_foreign_engine_with_our_limit_golden_frames_and_signature(bundle, exported):
    manifest = bundle.manifest
    assert (manifest.kind, manifest.branches, manifest.grid, manifest.scoreRule) == ("foreign", ["map"], (8, 8), "max")
    assert manifest.preprocessing.size == HW
    assert manifest.fusion.smoothingSigma == 2.0
    assert BANK not in manifest.files
    assert manifest.products["part"].n == GOOD - GOOD // 5
    assert {frame.outcome for frame in manifest.golden.frames} == {"PASS", "REJECT"}
    assert manifest.training["model"]["output"] == "anomaly_map"
    assert manifest.training["images"] == {"select": 8, "calibrate": 32}
    assert str(exported.parent) not in json.dumps(manifest.training)
    assert manifest.metrics["imageAuroc"] > 0.5


def test_what_was_found_and_what_was_taken_is_said_and_kept(built, bundle):
    ended, _ = built
    for said in (
        "input 'input' float (batch 3 64 64), taken as 64 x 64, RGB, pixels 0..1",
        "output taken: 'anomaly_map', float32 (1 1 8 8): a map of 8 x 8",
        "output not taken: 'pred_score', float32 (1): a score",
        "output not taken: 'pred_label', bool (1): no float",
        "good images: 8 select, 32 calibrate",
        "image AUROC on the labelled test images: ",
    ):
        assert said in ended.err
    page = (bundle.folder / "report.html").read_text()
    assert "output taken: &#x27;anomaly_map&#x27;" in page
    assert "Memory bank" not in page
    assert re.search(r"Histogram of scores\" src=\"data:image/png;base64,[\w+/]{1000}", page)


def test_the_daemon_reproduces_the_golden_frames(pipeline):
    assert check_golden(pipeline) < 0.1


def test_scores_and_maps_are_the_references(pipeline, bundle, good, parts):
    manifest = bundle.manifest
    standard = manifest.fusion.standardisation["map"]
    mean = models.mean_picture(good).astype(np.float64)
    for path in (next(good.iterdir()), next((parts / "test/stain").iterdir())):
        frame = read_frame(path)
        seen = reference.normalise(frame.pixels, HW, manifest.preprocessing.mean, manifest.preprocessing.std)
        patches = np.abs(seen - mean).mean(1).reshape(8, 8, 8, 8).mean((1, 3))
        grid = (patches - standard.centre) / standard.scale
        wanted = reference.gaussian_smooth(reference.upsample_bilinear(grid, HW), 2.0)
        found = pipeline.anomaly_map(frame)
        np.testing.assert_allclose(found.values, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
        assert found.score == found.values.max()


def test_the_limit_is_the_conformal_one_of_the_calibration_images_alone(pipeline, bundle, good):
    scores = [pipeline.anomaly_map(read_frame(path)).score for path in sorted(good.iterdir())[8:]]
    kept = load_file(bundle.folder / CALIBRATION)["part"]
    np.testing.assert_allclose(kept, np.sort(scores), rtol=1e-5)
    assert bundle.manifest.products["part"].limit == np.nextafter(np.float32(max(scores)), np.float32(np.inf))
    assert bundle.manifest.products["part"].supportedFalseReject == pytest.approx(1 / 33)


def test_a_spoilt_part_is_a_defect_with_a_region(pipeline, good):
    pixels = read_frame(next(good.iterdir())).pixels.copy()
    pixels[20:44, 20:44] = 255
    verdict = pipeline.judge(pipeline.anomaly_map(Frame(pixels)), "part")
    assert verdict.outcome is Outcome.REJECT
    assert verdict.regions


def test_score_judges_images_with_it(built, inspectd, parts):
    ended, place = built
    folder = ended.out.strip().splitlines()[-1]
    done = inspectd("score", folder, parts / "test", "--trusted", place / "keys/trusted.yaml")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert len(rows) == 16
    assert all(row["outcome"] == ("REJECT" if row["score"] >= row["limit"] else "PASS") for row in rows)


def test_the_same_import_gives_the_same_engine(built, bundle, exported, good, tmp_path):
    again = bundle_of(imported(exported, good, tmp_path, "--smoothing", 2), tmp_path)
    for name in (NETWORKS, CALIBRATION):
        assert again.read(name) == bundle.read(name)


def test_the_engine_is_current_where_none_was(built):
    ended, place = built
    assert (place / "engines/part/current").resolve() == Path(ended.out.strip().splitlines()[-1])


def test_nothing_of_the_exporters_machine_is_in_the_network(bundle):
    model = onnx.load_from_string(bundle.read(NETWORKS))
    data = bundle.read(NETWORKS)
    assert b"forward" not in data
    assert str(Path(__file__).parent).encode() not in data
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["image", "map"]
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)


def test_what_the_map_does_not_rest_on_is_left_out(bundle):
    kinds = {node.op_type for node in onnx.load_from_string(bundle.read(NETWORKS)).graph.node}
    assert "Conv" in kinds
    assert kinds & {"ReduceMax", "Greater"} == set()


def test_the_network_can_be_brought_to_fp16_for_a_plan(bundle, tmp_path):
    (tmp_path / NETWORKS).write_bytes(bundle.read(NETWORKS))
    convert_to_fp16(tmp_path / NETWORKS, tmp_path / FP16_NETWORKS, (0.0, 1.0))
    value = onnx.load(tmp_path / FP16_NETWORKS).graph.input[0]
    assert (value.name, value.type.tensor_type.elem_type) == ("image", onnx.TensorProto.FLOAT16)


def test_targets_are_tried_with_the_pixels_that_the_model_will_see(exported, good, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(plans, "add_targets", lambda folder, targets, pixels: seen.append((targets, pixels)))
    bundle_of(imported(exported, good, tmp_path, "--targets", "cpu,rtx:sm86"), tmp_path)
    assert seen == [(("cpu", "rtx:sm86"), (0.0, 1.0))]


def test_a_network_that_fp16_cannot_hold_is_refused_for_gpus_alone(good, tmp_path):
    more = [helper.make_node("Mul", ["away", "much"], ["out"])]
    model = template(tmp_path / "m.onnx", good, more=more)
    proto = onnx.load(model)
    proto.graph.initializer.append(numpy_helper.from_array(np.array([1e6], np.float32), "much"))
    onnx.save(proto, model)
    ended = imported(model, good, tmp_path, "--targets", "cpu,kernels:sm87")
    assert ended.code == DeviceError.exit_code
    assert "FP16 ends at 65504; build for the CPU alone (--targets cpu)" in ended.err
    assert not list((tmp_path / "engines/part").iterdir())
    assert imported(model, good, tmp_path).code == 0


def test_values_that_an_exporter_marks_as_unset_are_no_reason_against_fp16(good, tmp_path):
    """As anomalib does for a normalisation without statistics: a nan inside, and none that comes out."""
    more = [
        helper.make_node("Mul", ["away", "unset"], ["normalised"]),
        helper.make_node("IsNaN", ["normalised"], ["is_unset"]),
        helper.make_node("Where", ["is_unset", "away", "normalised"], ["out"]),
    ]
    path = template(tmp_path / "m.onnx", good, more=more)
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(np.array(np.nan, np.float32), "unset"))
    onnx.save(model, path)
    bundle = bundle_of(imported(path, good, tmp_path), tmp_path)
    convert_to_fp16(bundle.folder / NETWORKS, tmp_path / FP16_NETWORKS, (0.0, 1.0))
    broken = onnx.load(bundle.folder / NETWORKS)
    del broken.graph.node[-2:]
    shape = next(tensor.name for tensor in broken.graph.initializer if tensor.name.startswith("behind"))
    broken.graph.node.append(helper.make_node("Reshape", ["model/normalised", shape], ["map"]))
    onnx.save(broken, tmp_path / NETWORKS)
    with pytest.raises(DeviceError, match="off by nan%"):
        convert_to_fp16(tmp_path / NETWORKS, tmp_path / FP16_NETWORKS, (0.0, 1.0))


def test_a_network_that_the_converter_does_not_master_is_refused_with_its_words(good, tmp_path, monkeypatch):
    from onnxconverter_common import float16

    def fail(*_args, **_given):
        raise KeyError("a node of another kind")

    monkeypatch.setattr(float16, "convert_float_to_float16", fail)
    ended = imported(template(tmp_path / "m.onnx", good), good, tmp_path, "--targets", "cpu,kernels:sm87")
    assert ended.code == DeviceError.exit_code
    assert "cannot be brought to FP16: 'a node of another kind'; build for the CPU alone" in ended.err


# -- shapes: what goes in and comes out is what the model itself gives


@pytest.mark.parametrize(
    ("shape", "gives", "color"),
    [
        ((1, 3, 64, 96), "(N 1 gh gw)", "rgb"),
        ((1, 3, 64, 96), "(gh gw)", "bgr"),
        ((1, 3, 64, 96), "()", "rgb"),
        (("batch", 3, "height", "width"), "(N gh gw)", "rgb"),
        ((2, 3, 64, 96), "(N 1 gh gw)", "bgr"),
        ((2, 3, 64, 96), "(N gh gw)", "rgb"),
        ((2, 3, 64, 96), "(N)", "rgb"),
        ((1, 64, 96, 3), "(N gh gw 1)", "bgr"),
        (("n", "h", "w", 3), "(N 1)", "rgb"),
        ((1, 1, 64, 96), "(N)", "rgb"),
        ((3, 64, 96, 1), "(N 1 gh gw)", "rgb"),
    ],
)  # fmt: skip
def test_the_engines_network_gives_what_the_model_gives(tmp_path, shape, gives, color):
    path = toy(tmp_path / "m.onnx", shape, gives)
    proto, _ = read_onnx(path)
    image = find_input(path, proto, (64, 96))
    original = Original(path, proto, image, 1)
    noise = np.random.default_rng(0).uniform(0, 1, (1, 3, 64, 96)).astype(np.float32)
    output = choose_output(path, original.outputs(noise, color), None)
    assert output.is_score is ("g" not in gives)
    made = wrap(path, proto, image, output, color)
    wanted = models.expected(noise, shape, gives, color).astype(np.float32)
    # Twice: ONNX's own evaluation, and OpenVINO's, which the daemon uses.
    np.testing.assert_allclose(ReferenceEvaluator(made).run(None, {"image": noise})[0], wanted, rtol=1e-5)
    compare(path, made, noise, wanted, 1)


def test_a_network_that_is_off_is_refused(tmp_path):
    path = toy(tmp_path / "m.onnx")
    proto, _ = read_onnx(path)
    image = find_input(path, proto, None)
    noise = np.random.default_rng(0).uniform(0, 1, (1, 3, 64, 96)).astype(np.float32)
    output = choose_output(path, Original(path, proto, image, 1).outputs(noise, "rgb"), None)
    made = wrap(path, proto, image, output, "bgr")
    with pytest.raises(DeviceError, match=r"is off from the model by .* wanted at most 1e-04"):
        compare(path, made, noise, models.expected(noise, (1, 3, 64, 96), "(gh gw)", "rgb"), 1)


def test_branches_that_read_from_around_them_survive(good, tmp_path):
    """Names inside an If are those outside it: tensors and weights."""
    inner = helper.make_graph(
        [helper.make_node("Mul", ["away", "twice"], ["doubled"])], "then", [],
        [helper.make_tensor_value_info("doubled", FLOAT, (1, 1, 8, 8))],
    )  # fmt: skip
    other = helper.make_graph(
        [helper.make_node("Identity", ["away"], ["same"])], "else", [],
        [helper.make_tensor_value_info("same", FLOAT, (1, 1, 8, 8))],
    )  # fmt: skip
    more = [helper.make_node("If", ["yes"], ["out"], then_branch=inner, else_branch=other)]
    path = template(tmp_path / "m.onnx", good, more=more)
    model = onnx.load(path)
    for name, values in {"yes": np.array(True), "twice": np.array([2.0], np.float32)}.items():
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    onnx.save(model, path)
    bundle = bundle_of(imported(path, good, tmp_path), tmp_path)
    plain = tmp_path / "plain"
    plain.mkdir()
    once = bundle_of(imported(template(plain / "m.onnx", good), good, plain), plain)
    scale = [each.manifest.fusion.standardisation["map"].scale for each in (bundle, once)]
    assert scale[0] == pytest.approx(2 * scale[1], rel=1e-4)


def test_functions_of_the_model_are_written_out(good, tmp_path):
    function = helper.make_function(
        "its.own", "Away", ["x", "template"], ["absolute"],
        [helper.make_node("Sub", ["x", "template"], ["d"]), helper.make_node("Abs", ["d"], ["absolute"])],
        [helper.make_opsetid("", 17)],
    )  # fmt: skip
    nodes = [helper.make_node("Away", ["x", "template"], ["absolute"], domain="its.own"), *pooled("absolute")]
    path = write(
        tmp_path / "m.onnx", nodes, constants={"template": models.mean_picture(good)}, domains=["its.own"],
        functions=[function],
    )  # fmt: skip
    assert imported(path, good, tmp_path).code == 0


def test_a_score_alone_marks_the_whole_frame(good, tmp_path):
    path = template(tmp_path / "m.onnx", good, more=[helper.make_node("ReduceMax", ["away"], ["out"], axes=[1, 2, 3], keepdims=0)], outputs=[("out", FLOAT, ("n",))])  # fmt: skip
    ended = imported(path, good, tmp_path)
    bundle = bundle_of(ended, tmp_path)
    assert "output taken: 'out', float32 (1): a score" in ended.err
    assert bundle.manifest.grid == (1, 1)
    pipeline = Pipeline(bundle, open_backend(bundle, "cpu", "f32", 1))
    pixels = np.full((100, 50, 3), 255, np.uint8)
    verdict = pipeline.judge(pipeline.anomaly_map(Frame(pixels)), "part")
    pipeline.backend.close()
    (region,) = verdict.regions
    assert (region.x, region.y, region.w, region.h) == (0, 0, 50, 100)


def test_a_model_fixed_at_a_batch_says_what_that_costs(good, tmp_path):
    path = tmp_path / "m.onnx"
    toy(path, (2, 3, *HW), "(N 1 gh gw)")
    ended = imported(path, good, tmp_path)
    assert "is fixed at a batch of 2: each frame is computed 2 times; export it with batch 1" in ended.err


def test_two_maps_need_a_name_and_the_named_one_is_taken(good, tmp_path):
    nodes = [helper.make_node("Identity", ["out"], ["second"])]
    outputs = [("out", FLOAT, (1, 1, 8, 8)), ("second", FLOAT, (1, 1, 8, 8))]
    path = template(tmp_path / "m.onnx", good, outputs=outputs)
    model = onnx.load(path)
    model.graph.node.extend(nodes)
    onnx.save(model, path)
    ended = imported(path, good, tmp_path)
    assert ended.code == UsageError.exit_code
    assert "found 2 outputs that could be meant: 'out', float32 (1 1 8 8): a map of 8 x 8; 'second'" in ended.err
    ended = imported(path, good, tmp_path, "--output", "second")
    assert "output taken: 'second'" in ended.err
    bundle_of(ended, tmp_path)


# -- models and calls that are refused


def rule(kind, first="x", last="out", **attributes):
    return helper.make_node(kind, [first] if isinstance(first, str) else first, [last], **attributes)


def outside(path):
    """Weights in a file of their own, as PyTorch exports them unless it is told otherwise."""
    template(path, path.parent / "good")
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.data", size_threshold=0)
    return path


def cut_off(path):
    data = toy(path).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


MODELS = {
    "no.onnx: found nothing, wanted an ONNX file": lambda path: path.with_name("no.onnx"),
    "found a folder, wanted an ONNX file": lambda path: path.mkdir() or path,
    "is not ONNX, or cut off": cut_off,
    "holds no operator": lambda path: path.write_bytes(b"") or path,
    "found weights in another file ('weights.data'), wanted all in this one: export with external_data=False": outside,
    "found operators that are not ONNX's own: com.microsoft.Gelu": lambda path: write(
        path, [helper.make_node("Gelu", ["x"], ["out"], domain="com.microsoft")], domains=["com.microsoft"]
    ),
    "found opset 6, wanted 7 to": lambda path: write(path, [rule("Relu")], opset=6),
    "found opset 900, wanted 7 to": lambda path: write(path, [rule("Relu")], opset=900),
    "is not valid ONNX: ": lambda path: write(path, [rule("Magic")]),
    "found 2 inputs ('x' float (1 3 64 64); 'limit' float (1)), wanted the image alone": lambda path: write(
        path, [helper.make_node("Mul", ["x", "limit"], ["out"])],
        inputs=[("x", FLOAT, (1, 3, 64, 64)), ("limit", FLOAT, (1,))],
    ),
    "found 0 inputs (none)": lambda path: write(
        path, [helper.make_node("Constant", [], ["out"], value_floats=[1.0])], inputs=[("c", FLOAT, (1,))],
        constants={"c": np.zeros(1, np.float32)}, outputs=[("out", FLOAT, (1,))],
    ),
    "found the input 'x' uint8 (1 3 64 64), wanted float32": lambda path: write(
        path, [rule("Cast", last="f", to=FLOAT), *pooled("f")], inputs=[("x", UINT8, (1, 3, 64, 64))]
    ),
    "found the input 'x' float (3 64 64), wanted an image": lambda path: write(
        path, [rule("Relu")], inputs=[("x", FLOAT, (3, 64, 64))]
    ),
    "'x' float (1 5 64 64), wanted 3 or 1 channels": lambda path: write(
        path, pooled(), inputs=[("x", FLOAT, (1, 5, 64, 64))]
    ),
    "'x' float (1 c 64 64), wanted 3 or 1 channels": lambda path: write(
        path, pooled(), inputs=[("x", FLOAT, (1, "c", 64, 64))]
    ),
    "'x' float (1 3 h 3), wanted 3 or 1 channels": lambda path: write(
        path, pooled(), inputs=[("x", FLOAT, (1, 3, "h", 3))]
    ),
    "'x' float (1 3 16 16), wanted 3 or 1 channels, second or last, and sides of 32": lambda path: write(
        path, pooled(), inputs=[("x", FLOAT, (1, 3, 16, 16))]
    ),
    "found a batch of 100, wanted 1": lambda path: toy(path, (100, 3, 64, 96)),
    "takes 64 x 9000 (h w), wanted sides from 32 to 8192": lambda path: toy(path, (1, 3, 64, 9000)),
    "OpenVINO cannot run it on an image (1 3 64 64): ": lambda path: write(
        path, [*pooled(last="p"), helper.make_node("Reshape", ["p", "to"], ["out"])],
        inputs=[("x", FLOAT, ("n", 3, 64, 64))], constants={"to": np.array([2, 1, 8, 8], np.int64)},
    ),
    "found no map and no score among its outputs ('out', bool (1 3 64 64): no float), wanted either": lambda path: write(
        path, [helper.make_node("Greater", ["x", "x"], ["out"])], outputs=[("out", BOOL, (1, 3, 64, 64))]
    ),
    "'out', float32 (1 3 64 64): no map: wanted float (1 1 gh gw)": lambda path: write(path, [rule("Relu")]),
    "'out', float32 (1 1 128 128): no map: wanted float (1 1 gh gw), (1 gh gw) or (gh gw), at most (64 64)": (
        lambda path: write(
            path, [rule("ReduceMean", last="m", axes=[1]), helper.make_node("Resize", ["m", "", "by"], ["out"])],
            constants={"by": np.array([1, 1, 2, 2], np.float32)},
        )
    ),
    "of a size that is only known afterwards (NonZero)": lambda path: write(
        path, [rule("NonZero", last="i"), rule("Cast", "i", to=FLOAT)], outputs=[("out", FLOAT, (4, "n"))]
    ),
    "gives the same image another 'out' in each run (RandomNormalLike inside)": lambda path: write(
        path, [*pooled(last="p"), rule("RandomNormalLike", "p", "r"), helper.make_node("Add", ["p", "r"], ["out"])]
    ),
    "gives values that are not finite for noise": lambda path: write(
        path, [*pooled(last="p"), rule("Neg", "p", "n"), rule("Log", "n")]
    ),
}  # fmt: skip


@pytest.mark.parametrize("said", MODELS)
def test_a_model_that_is_none_for_us_is_refused_with_what_to_do(tmp_path, good, few, said):
    (tmp_path / "good").symlink_to(good)
    ended = imported(MODELS[said](tmp_path / "m.onnx"), few, tmp_path)
    assert (ended.code, ended.out) == (DataError.exit_code, "")
    assert said in ended.err
    assert "wanted" in ended.err or "export it" in ended.err
    assert "Traceback" not in ended.err
    assert not list(tmp_path.glob("engines/part/*"))


CALLS = {
    "found no --pixels, wanted one of 0..1, 0..255, -1..1, imagenet. The file does not say": ((1, 3, 64, 96), None, []),
    "leaves its input's size open ('x' float (n 3 h w)), wanted --input-size H W": (("n", 3, "h", "w"), "0..1", []),
    "takes 'x' float (1 3 64 96), found --input-size 96 64": ((1, 3, 64, 96), "0..1", ["--input-size", "96", "64"]),
    "takes 'x' float (1 3 64 w), found --input-size 32 96": ((1, 3, 64, "w"), "0..1", ["--input-size", "32", "96"]),
    "found no output 'map' (--output), wanted one of 'out'": ((1, 3, 64, 96), "0..1", ["--output", "map"]),
    "takes gray images ('x' float (1 1 64 96)), found --color bgr": ((1, 1, 64, 96), "0..1", ["--color", "bgr"]),
    "found --color rgb --pixels imagenet; wanted neither": ((1, 1, 64, 96), "imagenet", []),
    "found 'a/b', wanted 1 to 64 of": ((1, 3, 64, 96), "0..1", ["--product", "a/b"]),
    "found targets 'gpu', wanted cpu and any of": ((1, 3, 64, 96), "0..1", ["--targets", "gpu"]),
}


@pytest.mark.parametrize("said", CALLS)
def test_a_call_that_contradicts_the_model_is_refused(tmp_path, few, said):
    shape, pixels, options = CALLS[said]
    ended = imported(toy(tmp_path / "m.onnx", shape), few, tmp_path, *options, pixels=pixels)
    assert (ended.code, ended.out) == (UsageError.exit_code, "")
    assert said in ended.err
    assert not (tmp_path / "keys").exists()


def test_an_output_that_is_no_map_cannot_be_asked_for(exported, few, tmp_path):
    ended = imported(exported, few, tmp_path, "--output", "pred_mask")
    assert ended.code == UsageError.exit_code
    assert "found --output 'pred_mask', bool (1 1 8 8): no float; wanted one of 'pred_score'" in ended.err


def test_a_file_that_is_too_large_is_not_read(tmp_path, few, monkeypatch):
    monkeypatch.setattr(onnxfile, "_MOST_BYTES", 100)
    ended = imported(toy(tmp_path / "m.onnx"), few, tmp_path)
    assert ended.code == DataError.exit_code
    assert "bytes, wanted at most 100" in ended.err


def test_a_command_joined_as_advised_is_taken(tmp_path, good):
    (tmp_path / "good").symlink_to(good)
    path = outside(tmp_path / "m.onnx")
    assert "onnx.save(onnx.load('m.onnx'), 'joined.onnx')" in imported(path, good, tmp_path).err
    onnx.save(onnx.load(path), tmp_path / "joined.onnx")
    assert imported(tmp_path / "joined.onnx", good, tmp_path).code == 0


def test_without_the_extra_train_it_says_what_to_install(inspectd, monkeypatch, tmp_path, few):
    model = toy(tmp_path / "m.onnx")
    for name in ("trainer.onnxfile", "trainer.original", "trainer.wrap"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    ended = inspectd("import", model, "--product", "part", "--good", few, "--pixels", "0..1")
    assert ended.code == UsageError.exit_code
    assert "wanted the extra [train]; pip install 'inspectd[train]'" in ended.err


# -- what the values say


def test_a_model_that_does_not_look_is_refused(good, few, tmp_path):
    path = template(tmp_path / "m.onnx", good, more=[helper.make_node("Sub", ["away", "away"], ["out"])])
    ended = imported(path, few, tmp_path)
    assert ended.code == DataError.exit_code
    assert "gives 100% of the good images the same score, the highest that passes: it clips its values" in ended.err


def test_a_model_that_clips_above_its_limit_is_taken(good, tmp_path):
    """Its worst frame does not lie as far beyond the limit as those of models without an end."""
    plain = template(tmp_path / "plain.onnx", good)
    limit = bundle_of(imported(plain, good, tmp_path), tmp_path).manifest
    standard, product = limit.fusion.standardisation["map"], limit.products["part"]
    top = standard.centre + standard.scale * (product.limit + 0.2 * (product.limit - product.medianGood))
    path = template(tmp_path / "m.onnx", good, more=[helper.make_node("Clip", ["away", "", "top"], ["out"])])
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(np.array(top, np.float32), "top"))
    onnx.save(model, path)
    clipped = bundle_of(imported(path, good, tmp_path), tmp_path).manifest
    assert clipped.products["part"].limit == pytest.approx(product.limit, rel=1e-4)
    worst = max(frame.score for frame in clipped.golden.frames)
    assert worst == pytest.approx((top - standard.centre) / standard.scale, rel=1e-3)


def test_a_model_whose_higher_values_mean_better_parts_is_refused(good, tmp_path):
    ended = imported(
        template(tmp_path / "m.onnx", good, more=[helper.make_node("Neg", ["away"], ["out"])]), good, tmp_path
    )
    assert ended.code == DataError.exit_code
    assert "cannot tell good from bad" in ended.err
    assert "a higher value has to mean a worse part" in ended.err


def test_labels_tell_a_model_that_points_the_wrong_way(exported, good, parts, tmp_path):
    """Good and defective exchanged: as if the model scored good parts higher."""
    shutil.copytree(parts / "test/good", tmp_path / "turned/test/defect")
    shutil.copytree(parts / "test/stain", tmp_path / "turned/test/good")
    ended = imported(exported, good, tmp_path, "--test", tmp_path / "turned")
    assert "below 0.5: by this output good parts look worse than defective ones" in ended.err
    assert "below 0.5" in (bundle_of(ended, tmp_path).folder / "report.html").read_text()


def test_negative_values_are_values(good, tmp_path):
    path = template(tmp_path / "m.onnx", good, more=[helper.make_node("Log", ["away"], ["out"])])
    bundle = bundle_of(imported(path, good, tmp_path), tmp_path)
    assert bundle.manifest.fusion.standardisation["map"].centre < 0


# -- how many good images there are


def test_few_images_all_calibrate_and_the_limit_is_honest(exported, few, tmp_path):
    ended = imported(exported, few, tmp_path)
    product = bundle_of(ended, tmp_path).manifest.products["part"]
    assert (product.n, product.supportedFalseReject) == (5, pytest.approx(1 / 6))
    assert "good images: 5 select, 5 calibrate" in ended.err
    assert "5 good images are too few to divide (wanted 30 or more): scale and limit rest on the same ones" in ended.err
    assert "support a false-reject rate of 16.67% at best, not the 1.00% wanted" in ended.err


def test_one_image_is_no_calibration(exported, few, tmp_path):
    (tmp_path / "one").mkdir()
    shutil.copy(next(few.iterdir()), tmp_path / "one")
    ended = imported(exported, tmp_path / "one", tmp_path)
    assert ended.code == DataError.exit_code
    assert "found 1 good image for the limit, wanted at least 2, and better 100 or more" in ended.err


def test_a_folder_for_the_limit_leaves_the_others_to_the_scale(exported, good, few, tmp_path):
    ended = imported(exported, few, tmp_path, "--calibration", good, "--false-reject", "0.1")
    assert "good images: 5 select, 40 calibrate" in ended.err
    product = bundle_of(ended, tmp_path).manifest.products["part"]
    assert (product.n, product.targetFalseReject, product.supportedFalseReject) == (40, 0.1, 0.1)


def test_copies_among_few_images_are_told(exported, few, tmp_path):
    folder = tmp_path / "copies"
    shutil.copytree(few, folder)
    shutil.copy(next(few.iterdir()), folder / "again.png")
    assert "1 of the images are copies of others" in imported(exported, folder, tmp_path).err


# -- what the daemon refuses of a map engine


def sealed_with(bundle, place, change, network=None):
    """The bundle with another manifest or network, signed all the same."""
    shutil.copytree(bundle.folder, place / "changed")
    fields = json.loads((place / "changed/manifest.json").read_text())
    fields.pop("files")
    change(fields)
    if network is not None:
        (place / "changed" / NETWORKS).write_bytes(network)
    seal_bundle(place / "changed", fields, make_signing_key(place / "keys"))
    return open_bundle(place / "changed", load_trusted(place / "keys/trusted.yaml"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "fused"}, "branches: found map, kind fused wants ldknn, repair or both"),
        ({"branches": ["ldknn"]}, "branches: found ldknn, kind foreign wants map alone"),
        ({"branches": ["map", "ldknn"]}, "branches: found map, ldknn, kind foreign wants map alone"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(bundle, tmp_path, change, said):
    with pytest.raises(BundleError, match=said):
        sealed_with(bundle, tmp_path, lambda fields: fields.update(change))


def test_a_network_with_other_outputs_is_refused_by_the_backend(bundle, tmp_path):
    model = onnx.load_from_string(bundle.read(NETWORKS))
    model.graph.output.append(model.graph.output[0])
    model.graph.output[1].name = "more"
    model.graph.node.append(helper.make_node("Identity", ["map"], ["more"]))
    opened = sealed_with(bundle, tmp_path, lambda fields: None, model.SerializeToString())
    with pytest.raises(BundleError, match=r"found outputs \[\(64,\), \(64,\)\], wanted \(64,\)"):
        open_backend(opened, "cpu", "f32", 1)


def test_a_grid_that_is_not_the_networks_is_refused_by_the_backend(bundle, tmp_path):
    opened = sealed_with(bundle, tmp_path, lambda fields: fields.update(grid=[4, 8]))
    with pytest.raises(BundleError, match=r"found outputs \[\(64,\)\], wanted \(32,\)"):
        open_backend(opened, "cpu", "f32", 1)


def test_a_map_of_the_size_of_the_image_is_the_score_map_itself(good, tmp_path):
    """Neither scaled up nor smoothed: sizes that are no multiples of 32 too."""
    nodes = [rule("Sub", ["x", "half"], "d"), rule("Abs", "d", "a"), rule("ReduceMean", "a", axes=[1])]
    half = np.array([0.5], np.float32)
    path = write(tmp_path / "m.onnx", nodes, inputs=[("x", FLOAT, (1, 3, 50, 70))], constants={"half": half})
    bundle = bundle_of(imported(path, good, tmp_path), tmp_path)
    assert bundle.manifest.grid == (50, 70)
    pipeline = open_pipeline(bundle.folder, tmp_path / "keys/trusted.yaml")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    standard = bundle.manifest.fusion.standardisation["map"]
    wanted = (np.abs(pixels / 255.0 - 0.5).mean(2) - standard.centre) / standard.scale
    np.testing.assert_allclose(pipeline.anomaly_map(Frame(pixels)).values, wanted, rtol=1e-4, atol=1e-4)
    pipeline.backend.close()
