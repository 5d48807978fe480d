"""The CUDA backend on a GPU that is not there: real kernels on an emulator, a recording driver, TensorRT played by OpenVINO.

What is shown: whole frames and their scores, the order of calls, shapes, pointers and sizes, every way to fail. What is
not: that a GPU runs it (bench/gpu_check.sh does).
"""

from __future__ import annotations

import shutil
import threading

import cv2
import numpy as np
import onnx
import pytest

from daemon.bundle import BANK, NETWORKS, open_bundle, seal_bundle
from daemon.errors import BundleError, DeviceError
from daemon.inspection.backend import ldknn, open_backend
from daemon.inspection.backend.cpu import normalise
from daemon.inspection.backend.cuda import CudaBackend, why_not
from daemon.inspection.backend.search import KEPT, quantise_bank
from daemon.inspection.decode import decode, to_plain
from daemon.inspection.golden import check_golden
from daemon.inspection.pipeline import Pictures, Pipeline
from daemon.inspection.tensors import load_bank
from daemon.keys import load_trusted, make_signing_key
from daemon.types import Frame, Outcome, RawFrame, Reason
from tests import bundles, fake_cuda, reference
from tests.fake_cuda import Error, Gpu, Plan, install
from tests.test_branches import STANDARD, with_repair

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++")

SIZE, GRID = (64, 64), (8, 8)
GRAPH = [
    "copy in", "preprocess_mono8", "networks", "ldknn_round", "ldknn_search", "ldknn_finish", "postprocess_start",
    "postprocess", "copy out", "copy out",
]  # fmt: skip


def seal_again(folder, keys, change=None):
    """Sign the folder as it is now."""
    import json

    fields = json.loads((folder / "manifest.json").read_text())
    fields.pop("files")
    fields["golden"]["tolerance"]["fp16"] = 0.02
    if change is not None:
        change(fields)
    seal_bundle(folder, fields, make_signing_key(keys))
    return open_bundle(folder, load_trusted(keys / "trusted.yaml"))


@pytest.fixture
def keys(tmp_path):
    return tmp_path / "keys"


@pytest.fixture
def folder(tmp_path, keys):
    made = bundles.make_bundle(tmp_path / "bundle", keys, rows=300)
    (made / "networks.trt.plan").write_bytes(b"PLAN")
    return made


@pytest.fixture
def bundle(folder, keys):
    return seal_again(folder, keys)


def tensors(*, repair=False):
    found = {"image": ((1, 3, *SIZE), "HALF"), "features": ((64, bundles.CHANNELS), "FLOAT")}
    return found | ({"repair": ((64,), "FLOAT")} if repair else {})


@pytest.fixture
def gpu(monkeypatch, bundle):
    plan = Plan(bundle.read(NETWORKS), tensors())
    return install(monkeypatch, Gpu(plan=plan))


@pytest.fixture
def backend(gpu, bundle):
    opened = CudaBackend(bundle)
    yield opened
    assert gpu.depth == 0


def on_cpu(bundle, pixels):
    backend = open_backend(bundle, "cpu", "f32", 1)
    found = backend.run(Frame(pixels))[0]
    backend.close()
    return found


# Frames


@pytest.mark.parametrize(
    ("size_hw", "channels", "dtype"),
    [((64, 64), 1, np.uint8), ((90, 130), 1, np.uint8), ((70, 100), 3, np.uint8), ((48, 80), 1, np.uint16)],
)
def test_map_and_score_are_the_cpus_to_within_fp16(backend, bundle, size_hw, channels, dtype):
    for make in (bundles.good_pixels, bundles.bad_pixels):
        pixels = np.repeat(make(3, size_hw), channels, axis=2)
        if channels == 3:
            pixels[:, :, 1] = np.roll(pixels[:, :, 1], 5, axis=1)
        pixels = (pixels.astype(np.uint16) * 257) if dtype == np.uint16 else pixels
        found, timings = backend.run(Frame(pixels))
        wanted = on_cpu(bundle, pixels)
        assert found.frame_hw == size_hw
        product = bundle.manifest.products["part"]
        # What golden frames allow in fp16, on every pixel.
        allowed = 0.02 * (product.limit - product.medianGood)
        assert np.abs(found.values - wanted.values).max() < allowed
        assert found.score == found.values.max()
        assert timings.infer_ms is None
        np.testing.assert_array_equal(backend.mask(), found.values >= np.float32(product.limit))
    assert backend.mask().any()


COLOURS = [("BGR8", "bgr8", (90, 130, 3)), ("BayerRG8", "bayerrg8", (90, 130)), ("BayerRG8", "bayerrg8", (65, 101))]


def colour_frame(pixel_format, shape, make=bundles.bad_pixels):
    """A raw frame whose channels, or mosaic's cells, differ."""
    pixels = np.repeat(make(4, shape[:2]), 3, axis=2)
    pixels[:, :, 1] = np.roll(pixels[:, :, 1], 5, axis=1)
    pixels[:, :, 2] //= 2
    if pixel_format == "BayerRG8":
        rows, columns = np.indices(shape)
        pixels = np.take_along_axis(pixels, (rows % 2 + columns % 2)[:, :, None], axis=2)
    payload = memoryview(pixels.tobytes())
    return RawFrame("cam1", "e", 0, None, 0, "raw", shape, pixel_format, None, payload)


@pytest.mark.parametrize(("pixel_format", "kind", "shape"), COLOURS)
def test_colours_are_uploaded_as_they_came_and_are_the_cpus_to_one_level(
    backend, bundle, gpu, pixel_format, kind, shape
):
    raw = colour_frame(pixel_format, shape)
    found = backend.run(decode(raw))[0]
    recorded = [name for name, _ in gpu.graphs[1]]
    assert recorded == [name.replace("mono8", kind) for name in GRAPH]
    (size,) = backend._sizes.values()
    assert size.host.tobytes() == bytes(raw.payload)
    image = backend.tap("image", (1, 3, *SIZE), np.float16)
    on_cpu_image = normalise(decode(raw), bundle.manifest.preprocessing)
    # One level of the frame's own pixels, where a sum lies at a half, and half a unit of FP16's last place at 4.
    assert np.abs(image - on_cpu_image).max() <= 1.0 / min(bundle.manifest.preprocessing.std) + 2.0**-9
    assert len(np.unique(np.abs(image).max(axis=(2, 3)))) == 3  # the channels are not one another's
    wanted = on_cpu(bundle, to_plain(decode(raw)).pixels)
    product = bundle.manifest.products["part"]
    assert np.abs(found.values - wanted.values).max() < 0.02 * (product.limit - product.medianGood)


def test_network_input_is_the_cpus_to_one_level(backend, bundle):
    raw = colour_frame("BGR8", (90, 130, 3))
    backend.run(decode(raw))
    found = backend.network_input()
    assert (found.dtype, found.shape) == (np.float32, (3, *SIZE))
    cpu = open_backend(bundle, "cpu", "f32", 1)
    cpu.run(decode(raw))
    assert np.abs(found - cpu.network_input()).max() <= 1.0 / min(bundle.manifest.preprocessing.std) + 2.0**-9
    cpu.close()


def test_same_bytes_in_another_order_of_colours_are_another_frame(backend, gpu):
    pixels = np.frombuffer(colour_frame("BGR8", (64, 64, 3)).payload, np.uint8).reshape(64, 64, 3)
    backend.run(Frame(pixels))
    plain = backend.tap("image", (1, 3, *SIZE), np.float16)
    backend.run(Frame(pixels, "bgr"))
    assert len(gpu.graphs) == 2
    turned = backend.tap("image", (1, 3, *SIZE), np.float16)
    backend.run(Frame(np.ascontiguousarray(pixels[:, :, ::-1])))
    np.testing.assert_array_equal(turned, backend.tap("image", (1, 3, *SIZE), np.float16))
    assert (turned != plain).any()


def test_pictures_of_a_mosaic_are_the_cpus(backend, bundle):
    raw = colour_frame("BayerRG8", (90, 130))
    wanted = Pictures(frame_on_reject=True)
    on_gpu = Pipeline(bundle, backend, wanted).inspect(raw, "part")
    cpu = open_backend(bundle, "cpu", "f32", 1)
    assert on_gpu.outcome is Outcome.REJECT
    assert on_gpu.pictures["frame"] == Pipeline(bundle, cpu, wanted).inspect(raw, "part").pictures["frame"]
    assert cv2.imdecode(np.frombuffer(on_gpu.pictures["frame"], np.uint8), cv2.IMREAD_COLOR).shape == (90, 130, 3)
    cpu.close()


def test_every_stage_is_the_references(backend, bundle):
    """The taps, against NumPy in double precision."""
    pixels = bundles.bad_pixels(5, (90, 70))
    backend.run(Frame(pixels))
    manifest = bundle.manifest
    image = reference.normalise(pixels, SIZE, manifest.preprocessing.mean, manifest.preprocessing.std)
    found = backend.tap("image", (1, 3, *SIZE), np.float16)
    assert np.abs(found - image).max() <= 0.5 / 55.0 + 2.0**-10
    features = backend.tap("features", (64, bundles.CHANNELS), np.float32)
    np.testing.assert_allclose(
        features, reference.patch_convolution(found.astype(np.float64), bundles.random_weights()), rtol=1e-4, atol=1e-4
    )
    from safetensors.numpy import load_file

    bank = load_file(bundle.folder / BANK)
    scores, winners = reference.ldknn(features, bank["core"], bank["density"], manifest.alpha)
    assert (backend.tap("winners", (64,), np.int32) == winners).mean() >= 0.95
    np.testing.assert_allclose(backend.tap("ldknn", (64,), np.float32), scores, rtol=2e-3, atol=2e-3)


def test_pipeline_passes_golden_frames_and_judges(backend, bundle):
    pipeline = Pipeline(bundle, backend)
    assert check_golden(pipeline) < 1.0
    assert pipeline.inspect(bundles.raw_frame(bundles.good_pixels(9)), "part").outcome is Outcome.PASS
    verdict = pipeline.inspect(bundles.raw_frame(bundles.bad_pixels(9)), "part")
    assert (verdict.outcome, verdict.reason) == (Outcome.REJECT, Reason.DEFECT)
    assert verdict.regions
    assert verdict.timings.infer_ms is None
    assert verdict.timings.decode_ms is not None


def test_both_branches_are_fused(folder, keys, monkeypatch):
    data = with_repair((folder / NETWORKS).read_bytes())
    (folder / NETWORKS).write_bytes(data)

    def change(fields):
        fields["branches"] = ["ldknn", "repair"]
        fields["fusion"]["weights"] = {"ldknn": 0.75, "repair": 0.5}
        fields["fusion"]["standardisation"]["repair"] = STANDARD

    bundle = seal_again(folder, keys, change)
    install(monkeypatch, Gpu(plan=Plan(data, tensors(repair=True))))
    pixels = bundles.bad_pixels(2, (80, 80))
    found, wanted = CudaBackend(bundle).run(Frame(pixels))[0], on_cpu(bundle, pixels)
    assert np.abs(found.values - wanted.values).max() < 0.01 * np.abs(wanted.values).max()


def test_repair_alone_needs_no_bank(folder, keys, monkeypatch):
    data = with_repair((folder / NETWORKS).read_bytes())
    (folder / NETWORKS).write_bytes(data)
    (folder / BANK).unlink()

    def change(fields):
        fields["branches"] = ["repair"]
        fields["fusion"] = {**fields["fusion"], "weights": {"repair": 1.0}, "standardisation": {"repair": STANDARD}}

    bundle = seal_again(folder, keys, change)
    gpu = install(monkeypatch, Gpu(plan=Plan(data, tensors(repair=True))))
    backend = CudaBackend(bundle)
    pixels = bundles.bad_pixels(2)
    found, wanted = backend.run(Frame(pixels))[0], on_cpu(bundle, pixels)
    assert np.abs(found.values - wanted.values).max() < 0.01 * np.abs(wanted.values).max()
    assert not [name for name in gpu.log if name.startswith("ldknn")]


def with_map(data):
    """The network of tests.bundles giving a map (P) alone: the mean square of a patch's features."""
    model = onnx.load_from_string(with_repair(data))
    del model.graph.output[0]
    model.graph.output[0].name = model.graph.node[-1].output[0] = "map"
    onnx.checker.check_model(model)
    return model.SerializeToString()


def map_tensors():
    return {"image": ((1, 3, *SIZE), "HALF"), "map": ((64,), "FLOAT")}


def make_map_engine(folder, keys, sigma):
    """The folder as an engine whose network gives the map."""
    (folder / NETWORKS).write_bytes(with_map((folder / NETWORKS).read_bytes()))
    (folder / BANK).unlink()

    def change(fields):
        fields |= {"kind": "foreign", "branches": ["map"]}
        fields["fusion"] = {"weights": {"map": 0.5}, "standardisation": {"map": STANDARD}, "smoothingSigma": sigma}

    return seal_again(folder, keys, change)


@pytest.mark.parametrize("sigma", [0.0, 3.0])
def test_a_map_that_the_network_gives_is_the_cpus(folder, keys, monkeypatch, sigma):
    bundle = make_map_engine(folder, keys, sigma)
    gpu = install(monkeypatch, Gpu(plan=Plan(bundle.read(NETWORKS), map_tensors())))
    backend = CudaBackend(bundle)
    for pixels in (bundles.good_pixels(2, (80, 80)), bundles.bad_pixels(2, (80, 80))):
        found, wanted = backend.run(Frame(pixels))[0], on_cpu(bundle, pixels)
        assert np.abs(found.values - wanted.values).max() < 0.01 * np.abs(wanted.values).max()
        assert found.score == found.values.max()
    assert not [name for name in gpu.log if name.startswith("ldknn")]
    recorded = [name for name, _ in gpu.graphs[1]]
    assert recorded == [name for name in GRAPH if not name.startswith("ldknn")]


@pytest.mark.parametrize(
    "change",
    [{"map": ((63,), "FLOAT")}, {"map": ((64,), "HALF")}, {"map": ((1, 64), "FLOAT")}, {"more": ((64,), "FLOAT")}],
)
def test_map_plan_with_other_tensors_is_refused(folder, keys, monkeypatch, change):
    bundle = make_map_engine(folder, keys, 0.0)
    install(monkeypatch, Gpu(plan=Plan(bundle.read(NETWORKS), map_tensors() | change)))
    with pytest.raises(BundleError, match=r"found tensors .*, wanted"):
        CudaBackend(bundle)


# The order of calls


def test_frame_is_one_graph_and_allocates_nothing(backend, gpu):
    backend.run(Frame(bundles.good_pixels(0)))
    recorded = [name for name, _ in gpu.graphs[1]]
    assert recorded == GRAPH
    before, start = gpu.allocations, len(gpu.log)
    scores = {backend.run(Frame(bundles.good_pixels(seed)))[0].score for seed in (1, 2, 3)}
    assert gpu.log[start:] == ["launch", "synchronize"] * 3
    assert gpu.allocations == before
    assert len(scores) == 3  # each frame is its own
    assert len(gpu.graphs) == 1


def test_networks_run_once_before_they_are_recorded(backend, gpu):
    start = len(gpu.log)
    backend.run(Frame(bundles.good_pixels(0)))
    first = gpu.log[start:]
    assert first.index("networks") < first.index("launch")


def test_last_frame_leaves_nothing_in_the_next_ones_score(backend):
    quiet = backend.run(Frame(bundles.good_pixels(1)))[0].score
    loud = backend.run(Frame(bundles.bad_pixels(1)))[0].score
    assert loud > quiet
    assert backend.run(Frame(bundles.good_pixels(1)))[0].score == quiet


def test_few_frame_sizes_are_kept_and_the_oldest_graph_is_closed(backend, gpu):
    sizes = [(64, 64), (66, 64), (68, 64), (70, 64)]
    for size in sizes:
        backend.run(Frame(bundles.good_pixels(0, size)))
    backend.run(Frame(bundles.good_pixels(0, sizes[0])))  # used again: now the second is the oldest
    assert "graph closed" not in gpu.log
    backend.run(Frame(bundles.good_pixels(0, (72, 64))))
    assert gpu.log.count("graph closed") == 1
    made = len(gpu.graphs)
    backend.run(Frame(bundles.good_pixels(0, sizes[0])))
    assert len(gpu.graphs) == made
    backend.run(Frame(bundles.good_pixels(0, sizes[1])))
    assert len(gpu.graphs) == made + 1


def test_integrated_gpu_reads_the_frame_where_it_is(monkeypatch, bundle):
    gpu = install(monkeypatch, Gpu(plan=Plan(bundle.read(NETWORKS), tensors()), is_integrated=True))
    backend = CudaBackend(bundle)
    pixels = bundles.bad_pixels(4, (80, 100))
    found = backend.run(Frame(pixels))[0]
    assert "copy in" not in gpu.log
    assert "copy in" not in [name for name, _ in gpu.graphs[1]]
    assert "pagelocked 2" in gpu.log
    np.testing.assert_allclose(found.score, on_cpu(bundle, pixels).score, rtol=0.01)


@pytest.mark.parametrize("multiprocessors", [1, 2, 132])
def test_bank_is_split_over_the_gpu_and_the_winner_is_the_same(monkeypatch, bundle, multiprocessors):
    install(monkeypatch, Gpu(plan=Plan(bundle.read(NETWORKS), tensors()), multiprocessors=multiprocessors))
    backend = CudaBackend(bundle)
    score = backend.run(Frame(bundles.bad_pixels(4)))[0].score
    assert backend._search.blocks[1] == {1: 2, 2: 3, 132: 3}[multiprocessors]
    install(monkeypatch, Gpu(plan=Plan(bundle.read(NETWORKS), tensors())))
    assert CudaBackend(bundle).run(Frame(bundles.bad_pixels(4)))[0].score == score


def test_int8_search_takes_its_three_kernels_and_is_its_reference(backend, bundle, gpu, monkeypatch):
    pixels = bundles.bad_pixels(4)
    backend.run(Frame(pixels))
    in_fp16 = backend.tap("ldknn", (64,), np.float32)
    monkeypatch.setattr(ldknn, "FORM", "int8")
    again = CudaBackend(bundle)
    again.run(Frame(pixels))
    assert [name for name, _ in gpu.graphs[2]] == [name.replace("ldknn", "ldknn_int8") for name in GRAPH]
    bank = load_bank(bundle)
    whole = quantise_bank(bank["core"])
    features = again.tap("features", (64, bundles.CHANNELS), np.float32)
    wanted, rows = reference.ldknn_int8(
        features, bank["core"], bank["density"], bundle.manifest.alpha, whole.centre, whole.inverse, KEPT
    )
    np.testing.assert_array_equal(again.tap("winners", (64,), np.int32), rows)
    in_int8 = again.tap("ldknn", (64,), np.float32)
    np.testing.assert_allclose(in_int8, wanted, rtol=1e-5, atol=1e-5)
    is_other = rows != backend.tap("winners", (64,), np.int32)
    np.testing.assert_array_equal(in_int8[~is_other], in_fp16[~is_other])
    # A patch far outside the bank is cut off in INT8, and may be measured to a row that is not the nearest.
    centred = np.abs(features - whole.centre) * whole.inverse
    assert (centred[is_other].max(axis=1) > 127).all()
    assert check_golden(Pipeline(bundle, again)) < 1.0


def test_context_is_current_only_inside_a_call_on_any_thread(backend, gpu):
    found = []
    thread = threading.Thread(target=lambda: found.append(backend.run(Frame(bundles.good_pixels(0)))[0].score))
    thread.start()
    thread.join()
    assert found
    assert gpu.depth == 0
    backend.close()
    assert gpu.log[-1] == "detach"
    assert gpu.depth == 0


# Kernels and plans


def test_kernels_of_the_bundle_need_no_compiler(folder, keys, monkeypatch):
    (folder / "kernels.sm87.cubin").write_bytes(b"CUBIN")
    bundle = seal_again(folder, keys)
    gpu = install(monkeypatch, Gpu(plan=Plan(bundle.read(NETWORKS), tensors())))
    CudaBackend(bundle)
    assert "cubin b'CUBIN'" in gpu.log
    assert not [line for line in gpu.log if line.startswith("compiled")]


def test_kernels_for_another_gpu_are_compiled_here(folder, keys, monkeypatch):
    (folder / "kernels.sm87.cubin").write_bytes(b"CUBIN")
    bundle = seal_again(folder, keys)
    gpu = install(monkeypatch, Gpu(plan=Plan(bundle.read(NETWORKS), tensors()), capability=(8, 9)))
    CudaBackend(bundle)
    assert "compiled sm_89" in gpu.log


def test_rtx_takes_its_own_plan_for_this_gpu(folder, keys, monkeypatch):
    (folder / "networks.trt.plan").unlink()
    for capability in ("86", "89"):
        (folder / f"networks.rtx-sm{capability}.plan").write_bytes(capability.encode())
    bundle = seal_again(folder, keys)
    gpu = install(monkeypatch, Gpu(plan=Plan(bundle.read(NETWORKS), tensors()), capability=(8, 9)), "tensorrt_rtx")
    CudaBackend(bundle)
    assert "plan b'89'" in gpu.log


# What can go wrong


def test_plan_of_another_gpu_says_how_to_build_one(folder, keys, monkeypatch):
    (folder / "networks.trt.plan").rename(folder / "networks.rtx-sm86.plan")
    bundle = seal_again(folder, keys)
    gpu = install(monkeypatch, Gpu(plan=Plan(b"", tensors()), capability=(8, 9)), "tensorrt_rtx")
    with pytest.raises(DeviceError, match=r"networks.rtx-sm89.plan, wanted .* --targets cpu,rtx:sm89"):
        CudaBackend(bundle)
    assert gpu.depth == 0


def test_plan_that_tensorrt_refuses(bundle, monkeypatch):
    gpu = install(monkeypatch, Gpu(plan=None))
    with pytest.raises(DeviceError, match=r"tensorrt 10.3.0 does not take this plan"):
        CudaBackend(bundle)
    assert gpu.depth == 0


@pytest.mark.parametrize(
    "change",
    [
        {"image": ((1, 3, 32, 32), "HALF")}, {"image": ((1, 3, *SIZE), "FLOAT")}, {"features": ((63, 16), "FLOAT")},
        {"features": ((64, 16), "HALF")}, {"repair": ((64,), "FLOAT")}, {"extra": ((1,), "FLOAT")},
    ],
)  # fmt: skip
def test_plan_with_other_tensors_is_refused(bundle, monkeypatch, change):
    install(monkeypatch, Gpu(plan=Plan(bundle.read(NETWORKS), tensors() | change)))
    with pytest.raises(BundleError, match=r"found tensors .*, wanted"):
        CudaBackend(bundle)


def test_bank_of_other_channels_is_refused(bundle, monkeypatch):
    wider = {"image": ((1, 3, *SIZE), "HALF"), "features": ((64, 24), "FLOAT")}
    install(monkeypatch, Gpu(plan=Plan(bundle.read(NETWORKS), wider)))
    with pytest.raises(BundleError, match="found 16 channels in the bank, 24 in the networks"):
        CudaBackend(bundle)


def test_bank_beyond_fp16_is_refused(tmp_path, keys, monkeypatch):
    core = np.full((50, bundles.CHANNELS), 1.0, np.float32)
    core[3, 3] = 70_000.0
    folder = bundles.make_bundle(tmp_path / "far", keys, core=core)
    (folder / "networks.trt.plan").write_bytes(b"PLAN")
    bundle = seal_again(folder, keys)
    install(monkeypatch, Gpu(plan=Plan(bundle.read(NETWORKS), tensors())))
    with pytest.raises(DeviceError, match="beyond FP16"):
        CudaBackend(bundle)


@pytest.mark.parametrize(
    ("where", "error", "says"),
    [
        ("synchronize", Error("cuStreamSynchronize failed: an illegal memory access"), "illegal memory access"),
        ("graph ldknn_search", None, "cuGraphLaunch failed with CUDA error 700"),
    ],
)
def test_fault_in_a_frame_is_a_device_error(backend, gpu, where, error, says):
    backend.run(Frame(bundles.good_pixels(0)))
    gpu.next_fault = (where, error)
    with pytest.raises(DeviceError, match=says):
        backend.run(Frame(bundles.good_pixels(1)))
    assert gpu.depth == 0


def test_fault_while_recording_ends_the_capture_and_the_next_frame_is_inspected(backend, gpu):
    gpu.next_fault = ("networks refuse", None)
    with pytest.raises(DeviceError, match="TensorRT refused to run"):
        backend.run(Frame(bundles.good_pixels(0)))
    gpu.next_fault = ("ldknn_search", Error("cuLaunchKernel failed: out of resources"))
    with pytest.raises(DeviceError, match="out of resources"):
        backend.run(Frame(bundles.good_pixels(0)))
    assert gpu.captured is None
    assert backend.run(Frame(bundles.good_pixels(0)))[0].score


@pytest.mark.parametrize(
    "frame",
    [
        Frame(np.zeros((64, 64, 3), np.uint16)), Frame(np.zeros((1, 40_000, 1), np.uint8)),
        Frame(np.zeros((64, 64, 1), np.uint16), "bayerrg"),
    ],
    ids=["deep colour", "endless row", "deep mosaic"],
)  # fmt: skip
def test_frame_that_the_gpu_cannot_take_is_a_device_error(backend, frame):
    with pytest.raises(DeviceError, match=r"found a frame of shape .*, wanted gray of 8 or 16 bit or colours of 8 bit"):
        backend.run(frame)
    assert backend.run(Frame(bundles.good_pixels(0)))[0].score


def test_without_a_compiler_the_target_is_named(bundle, gpu, monkeypatch):
    import sys

    def no_nvcc(*_arguments, **_options):
        raise OSError("nvcc: command not found")

    monkeypatch.setattr(sys.modules["pycuda.compiler"], "SourceModule", no_nvcc)
    with pytest.raises(DeviceError, match=r"command not found.*--targets cpu,kernels:sm87"):
        CudaBackend(bundle)


def test_what_is_compiled_lies_in_a_folder_of_this_bundle_and_of_this_user_alone(bundle, gpu, cache):
    CudaBackend(bundle)
    assert gpu.cache == cache / "kernels" / bundle.digest
    gpu.cache.chmod(0o777)
    with pytest.raises(DeviceError, match=r"has mode 0777, anyone can write it.*; or name another place in CACHE_DIRE"):
        CudaBackend(bundle)


def test_place_for_what_is_compiled_that_is_none_is_a_device_error(bundle, gpu, cache):
    cache.write_text("")
    with pytest.raises(DeviceError, match=r"for compiled kernels: cannot be used \(Not a directory\)"):
        CudaBackend(bundle)


def test_of_two_tensorrts_the_one_with_a_plan_is_taken(folder, keys, monkeypatch):
    import sys

    (folder / "networks.trt.plan").rename(folder / "networks.rtx-sm87.plan")
    bundle = seal_again(folder, keys)
    gpu = install(monkeypatch, Gpu(plan=Plan(bundle.read(NETWORKS), tensors())))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake_cuda.make_tensorrt(gpu, "tensorrt_rtx"))
    assert CudaBackend(bundle).run(Frame(bundles.good_pixels(0)))[0].score
    assert open_backend(bundle, "auto").name == "cuda"


def test_no_memory_at_opening_is_a_device_error(bundle, gpu):
    gpu.next_fault = ("mem_alloc", Error("cuMemAlloc failed: out of memory"))
    with pytest.raises(DeviceError, match="out of memory"):
        CudaBackend(bundle)
    assert gpu.depth == 0


def test_nan_from_the_networks_is_an_engine_error(backend, bundle, monkeypatch):
    pipeline = Pipeline(bundle, backend)
    whole = fake_cuda.view

    def one_nan(pointer, count, dtype):
        found = whole(pointer, count, dtype)
        if dtype is np.float16:
            found = found.copy()
            found[5] = np.nan
        return found

    monkeypatch.setattr(fake_cuda, "view", one_nan)
    verdict = pipeline.inspect(bundles.raw_frame(bundles.good_pixels(0)), "part")
    assert (verdict.outcome, verdict.reason) == (Outcome.REJECT, Reason.ENGINE_ERROR)


# Which backend a machine gets


def test_auto_takes_the_gpu_where_plan_and_libraries_are(bundle, gpu):
    assert why_not(bundle) is None
    assert open_backend(bundle, "auto").name == "cuda"
    assert open_backend(bundle, "cpu").name == "cpu"


def test_auto_takes_the_cpu_without_libraries_and_cuda_says_what_is_missing(bundle, monkeypatch):
    install(monkeypatch, Gpu(), tensorrt=None)
    assert open_backend(bundle, "auto").name == "cpu"
    with pytest.raises(DeviceError, match=r"backend kind 'cuda': .*tensorrt.*\[gpu\]"):
        open_backend(bundle, "cuda")


def test_bundle_without_a_plan_runs_on_the_cpu_and_cuda_says_so(tmp_path, keys, gpu):
    plain = bundles.open_trusted(bundles.make_bundle(tmp_path / "plain", keys), keys)
    assert open_backend(plain, "auto").name == "cpu"
    with pytest.raises(DeviceError, match=r"holds no plan for a GPU; build it with build_engines.py --targets trt"):
        open_backend(plain, "cuda")
