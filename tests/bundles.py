"""Small real bundles for the tests: sealed, signed, loadable, made in a fraction of a second and without torch.

The network is one convolution whose stride is its kernel (8); good frames are flat gray with a little noise, bad ones
carry a bright square. The limit lies halfway between the two, far from both: unlike the trainer's it is no
conformal limit, so that tests of the daemon never depend on the luck of a calibration set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from daemon.bundle import BANK, CALIBRATION, NETWORKS, QUALITY, Bundle, Preprocessing, open_bundle, seal_bundle
from daemon.inspection.backend import open_backend
from daemon.inspection.pipeline import Pipeline
from daemon.keys import load_trusted, make_signing_key
from daemon.types import Frame, RawFrame
from tests import reference
from trainer import quality

STRIDE = 8
CHANNELS = 16
MEAN, STD = (128.0, 120.0, 110.0), (64.0, 60.0, 55.0)
CALIBRATION_FRAMES = 20

Pixels = NDArray[np.uint8]
Change = Callable[[dict[str, Any]], None]
Draw = Callable[[int, tuple[int, int]], Pixels]


def good_pixels(seed: int = 0, size: tuple[int, int] = (64, 64)) -> Pixels:
    """(H W 1): flat gray with a noise of three levels."""
    noise = np.random.default_rng(seed).normal(128, 3, (*size, 1))
    return np.clip(np.round(noise), 0, 255).astype(np.uint8)


def bad_pixels(seed: int = 0, size: tuple[int, int] = (64, 64)) -> Pixels:
    """A good frame with a white square in its middle, a quarter of the frame high and wide."""
    return with_square(good_pixels(seed, size))


def with_square(pixels: Pixels) -> Pixels:
    """The frame itself, with the square."""
    height, width = pixels.shape[:2]
    pixels[height * 3 // 8 : height * 5 // 8, width * 3 // 8 : width * 5 // 8] = 255
    return pixels


def raw_frame(
    pixels: Pixels, *, camera: str = "cam1", epoch: str = "epoch", seq: int = 0, product: str | None = None
) -> RawFrame:
    """The frame as a camera sends it: Mono8, raw."""
    payload = memoryview(pixels.tobytes())
    return RawFrame(camera, epoch, seq, f"part-{seq}", 1_000 + seq, "raw", pixels.shape[:2], "Mono8", product, payload)


def random_weights(seed: int = 0) -> NDArray[np.float32]:
    """(C 3 8 8): random filters of unit length."""
    weights = np.random.default_rng(seed).normal(size=(CHANNELS, 3, STRIDE, STRIDE))
    return (weights / np.sqrt(3 * STRIDE * STRIDE)).astype(np.float32)


def make_bundle(
    folder: Path,
    keys_folder: Path,
    *,
    size: tuple[int, int] = (64, 64),
    rows: int = 50,
    alpha: float = 0.25,
    k: int = 3,
    sigma: float = 4.0,
    products: Sequence[str] = ("part",),
    version: str = "1",
    seed: int = 0,
    weights: NDArray[np.float32] | None = None,
    core: NDArray[np.float32] | None = None,
    change: Change | None = None,
    draw: Draw = good_pixels,
    with_quality: bool = False,
) -> Path:
    """A bundle in `folder`, signed with the key in `keys_folder` (made where there is none); gives `folder`.

    `weights` and `core` replace the random network and its bank; `change` edits the manifest's fields before they
    are signed for good; `draw` makes other good frames than good_pixels. bad_pixels() lies far above the limit of every product, good_pixels() far below.
    """
    weights = random_weights(seed) if weights is None else weights
    good = [draw(1000 + seed + number, size) for number in range(CALIBRATION_FRAMES)]
    features = np.concatenate([reference.patch_convolution(_normalised(pixels), weights) for pixels in good[:5]])
    if core is None:
        chosen = np.random.default_rng(seed).choice(len(features), rows, replace=rows > len(features))
        core = features[chosen].astype(np.float32)
    densities = reference.density(core, k)
    scores, _ = reference.ldknn(features, core, densities, alpha)
    centre = float(np.median(scores))
    spread = max(float(np.median(np.abs(scores - centre))), 1e-3)

    (folder / "golden").mkdir(parents=True)
    (folder / NETWORKS).write_bytes(make_network(weights, size))
    bias = -0.5 * np.sum(core.astype(np.float64) ** 2, axis=1)
    save_file({"core": core, "bias": bias.astype(np.float32), "density": densities.astype(np.float32)}, folder / BANK)
    golden = {"golden/good.png": draw(7 + seed, size), "golden/bad.png": with_square(draw(7 + seed, size))}
    for name, pixels in golden.items():
        (folder / name).write_bytes(cv2.imencode(".png", pixels)[1].tobytes())

    fields = manifest_fields(size, alpha, k, sigma, products, version, (centre, spread), list(golden))
    _write_calibration(folder, products, [0.0])
    key = make_signing_key(keys_folder)
    seal_bundle(folder, fields, key)
    pipeline = open_pipeline(folder, keys_folder)
    calibration = [pipeline.anomaly_map(Frame(pixels)).score for pixels in good]
    _write_calibration(folder, products, calibration)
    _set_limits(fields, pipeline, golden, calibration)
    if with_quality:
        _write_quality(folder, products, good, draw, size)
    if change is not None:
        change(fields)
    seal_bundle(folder, fields, key)
    return folder


def install_bundle(engines: Path, keys_folder: Path, product: str = "part", version: str = "1", **options: Any) -> Path:
    """engines/<product>/<version>, with engines/<product>/current pointing to it where there is none yet."""
    folder = make_bundle(engines / product / version, keys_folder, products=(product,), version=version, **options)
    current = engines / product / "current"
    if not current.is_symlink():
        current.symlink_to(version)
    return folder


def open_trusted(folder: Path, keys_folder: Path) -> Bundle:
    return open_bundle(folder, load_trusted(keys_folder / "trusted.yaml"))


def open_pipeline(folder: Path, keys_folder: Path) -> Pipeline:
    """The bundle on the CPU backend, one thread, f32."""
    bundle = open_trusted(folder, keys_folder)
    return Pipeline(bundle, open_backend(bundle, "cpu", "f32", 1))


def make_network(weights: NDArray[np.float32], size: tuple[int, int]) -> bytes:
    """ONNX, (1 3 h w) -> (P C): the convolution, then its grid as rows."""
    channels = len(weights)
    shape = numpy_helper.from_array(np.array([channels, -1], np.int64), "shape")
    nodes = [
        helper.make_node("Conv", ["image", "weights"], ["grid"], strides=[STRIDE, STRIDE]),
        helper.make_node("Reshape", ["grid", "shape"], ["columns"]),
        helper.make_node("Transpose", ["columns"], ["features"], perm=[1, 0]),
    ]
    patches = (size[0] // STRIDE) * (size[1] // STRIDE)
    graph = helper.make_graph(
        nodes,
        "patches",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, *size])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, [patches, channels])],
        [numpy_helper.from_array(weights, "weights"), shape],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def manifest_fields(
    size: tuple[int, int],
    alpha: float,
    k: int,
    sigma: float,
    products: Sequence[str],
    version: str,
    centre_and_scale: tuple[float, float],
    golden: Sequence[str],
) -> dict[str, Any]:
    """A manifest without its files, the limits and golden scores still to be set."""
    centre, scale = centre_and_scale
    judged = {"limit": 1.0, "mapLimit": 1.0, "medianGood": 0.0, "bound95": 0.15, "n": CALIBRATION_FRAMES}
    rates = {"targetFalseReject": 0.05, "supportedFalseReject": 0.05}
    frames = [{"file": name, "product": products[0], "score": 0.0, "outcome": "PASS"} for name in golden]
    return {
        "format": 1,
        "kind": "fused",
        "name": products[0],
        "version": version,
        "created": "2025-01-01T00:00:00Z",
        "preprocessing": {"size": list(size), "mean": list(MEAN), "std": list(STD)},
        "branches": ["ldknn"],
        "grid": [size[0] // STRIDE, size[1] // STRIDE],
        "k": k,
        "alpha": alpha,
        "distance": "squared-l2",
        "fusion": {
            "weights": {"ldknn": 1.0},
            "standardisation": {"ldknn": {"centre": centre, "scale": scale}},
            "smoothingSigma": sigma,
        },
        "scoreRule": "max",
        "products": {name: {**judged, **rates} for name in products},
        "metrics": {},
        "training": {},
        "golden": {"frames": frames, "tolerance": {"f32": 0.001, "bf16": 0.02}},
    }


def _set_limits(
    fields: dict[str, Any], pipeline: Pipeline, golden: dict[str, Pixels], calibration: list[float]
) -> None:
    scores = {name: pipeline.anomaly_map(Frame(pixels)).score for name, pixels in golden.items()}
    limit = (max(calibration) + scores["golden/bad.png"]) / 2
    for product in fields["products"].values():
        product.update(limit=limit, mapLimit=limit, medianGood=float(np.median(calibration)))
    for frame in fields["golden"]["frames"]:
        score = scores[frame["file"]]
        frame.update(score=score, outcome="REJECT" if score >= limit else "PASS")


def _normalised(pixels: Pixels) -> NDArray[np.float64]:
    """(h w 1) of the network's own size -> (1 3 h w)."""
    return np.stack([(pixels[:, :, 0] - mean) / std for mean, std in zip(MEAN, STD, strict=True)])[None]


def _write_quality(
    folder: Path, products: Sequence[str], good: Sequence[Pixels], draw: Draw, size: tuple[int, int]
) -> None:
    preprocessing = Preprocessing(size=size, mean=MEAN, std=STD)
    trained = [Frame(draw(2000 + number, size)) for number in range(CALIBRATION_FRAMES)]
    mean = quality.thumbnails(trained, preprocessing).mean(0)
    found = quality.figures((Frame(pixels) for pixels in good), mean, preprocessing)
    save_file(
        {key: value for name in products for key, value in quality.tensors(name, mean, found).items()}, folder / QUALITY
    )


def _write_calibration(folder: Path, products: Sequence[str], scores: list[float]) -> None:
    save_file({name: np.sort(np.array(scores, np.float32)) for name in products}, folder / CALIBRATION)
