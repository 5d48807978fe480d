"""One frame's way through the house: every type it becomes, held against the slow references."""

from __future__ import annotations

import json

import numpy as np

from daemon.bundle import BANK
from daemon.inspection.decode import decode
from daemon.inspection.tensors import load_bank
from daemon.inspection.verdict import decide
from daemon.line.wire import decode_frame, encode_frame, encode_result
from daemon.types import AnomalyMap, EngineId, Frame, Outcome, PatchScores, RawFrame, Reason, Tensor, Verdict
from tests import reference
from tests.bundles import MEAN, STD, bad_pixels, make_bundle, open_pipeline, random_weights, raw_frame

SIZE = (64, 64)


def test_one_frame_becomes_each_type_in_turn_and_ends_as_a_message(tmp_path):
    bundle_folder = make_bundle(tmp_path / "bundle", tmp_path / "keys", size=SIZE)
    pipeline = open_pipeline(bundle_folder, tmp_path / "keys")
    backend, manifest = pipeline.backend, pipeline.bundle.manifest
    pixels = bad_pixels(5, (128, 128))

    message = [memoryview(bytes(part)) for part in encode_frame("test", raw_frame(pixels))]
    raw = decode_frame(message).frame()
    assert isinstance(raw, RawFrame)
    frame = decode(raw)
    assert isinstance(frame, Frame)
    assert np.array_equal(frame.pixels, pixels)

    tensor = backend.preprocess(frame)
    assert isinstance(tensor, Tensor)
    wanted = reference.normalise(pixels, SIZE, MEAN, STD)
    assert np.abs(tensor.values - wanted).max() <= 0.51 / min(STD)  # OpenCV rounds a resized pixel to an integer

    outputs = backend.infer(tensor)
    assert list(outputs) == ["ldknn"]
    assert isinstance(outputs["ldknn"], PatchScores)
    bank = load_bank(pipeline.bundle)
    assert BANK in manifest.files
    features = reference.patch_convolution(np.asarray(tensor.values, np.float64), random_weights())
    scores, _ = reference.ldknn(features, bank["core"], bank["density"], manifest.alpha)
    assert np.allclose(outputs["ldknn"].values, scores, rtol=1e-4, atol=1e-3)

    anomaly = backend.postprocess(outputs, (128, 128))
    assert isinstance(anomaly, AnomalyMap)
    standard = manifest.fusion.standardisation["ldknn"]
    grid = ((scores - standard.centre) / standard.scale).reshape(manifest.grid)
    smooth = reference.gaussian_smooth(reference.upsample_bilinear(grid, SIZE), manifest.fusion.smoothingSigma)
    assert np.allclose(anomaly.values, smooth, rtol=1e-3, atol=1e-2)
    assert anomaly.score == anomaly.values.max()

    engine = EngineId("part", manifest.version, pipeline.bundle.digest)
    verdict = decide(anomaly, pipeline.limits("part"), [0.0], engine)
    assert isinstance(verdict, Verdict)
    assert (verdict.outcome, verdict.reason) == (Outcome.REJECT, Reason.DEFECT)
    assert verdict.regions

    topic, header, *payloads = encode_result("result/test/cam1", {"seq": raw.seq}, verdict)
    told = json.loads(header)
    assert topic == b"result/test/cam1"
    assert (told["outcome"], told["score"], told["payloads"], payloads) == ("REJECT", anomaly.score, [], [])


def test_inspect_gives_what_the_stages_give(tmp_path):
    pipeline = open_pipeline(make_bundle(tmp_path / "bundle", tmp_path / "keys"), tmp_path / "keys")
    pixels = bad_pixels(5)
    verdict = pipeline.inspect(raw_frame(pixels), "part")
    staged = pipeline.judge(pipeline.anomaly_map(Frame(pixels)), "part")
    assert (verdict.outcome, verdict.score, verdict.regions) == (staged.outcome, staged.score, staged.regions)


def test_the_same_frame_gives_the_same_score_again_and_after_a_restart(tmp_path):
    folder = make_bundle(tmp_path / "bundle", tmp_path / "keys")
    scores = set()
    for _ in range(2):
        pipeline = open_pipeline(folder, tmp_path / "keys")
        scores |= {pipeline.inspect(raw_frame(bad_pixels(5)), "part").score for _ in range(3)}
    assert len(scores) == 1
