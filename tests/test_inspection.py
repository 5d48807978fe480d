"""What happens to a frame: decoded, measured against the references, judged, and never an exception.

Bounds are derived where they stand. u is the unit roundoff of float32; a sum of n products in any order is within
n u / (1 - n u) of the exact one, relative to the sum of the products' magnitudes (Higham, Accuracy and Stability of
Numerical Algorithms, section 3.1).
"""

from __future__ import annotations

import json
import math
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from queue import Queue
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from daemon.bundle import MANIFEST, seal_bundle
from daemon.errors import BundleError, DeviceError, FrameError
from daemon.inspection.backend import open_backend
from daemon.inspection.backend.cpu import CpuBackend
from daemon.inspection.backend.tables import smoothing_operator
from daemon.inspection.decode import decode, encoded_size, to_plain
from daemon.inspection.engine import Done, Engine, Job
from daemon.inspection.golden import check_golden
from daemon.inspection.pipeline import Pictures, Pipeline, for_display
from daemon.inspection.tensors import load_bank
from daemon.inspection.verdict import MAX_REGIONS, decide, find_regions, p_value
from daemon.keys import make_signing_key
from daemon.types import (
    AnomalyMap,
    EngineId,
    Frame,
    Limits,
    Outcome,
    PartKey,
    PatchScores,
    RawFrame,
    Reason,
    Tensor,
    Verdict,
)
from tests import reference
from tests.bundles import (
    CHANNELS,
    MEAN,
    STD,
    bad_pixels,
    good_pixels,
    make_bundle,
    open_pipeline,
    open_trusted,
    random_weights,
    raw_frame,
)

U = 2.0**-24
ENGINE = EngineId("part", "1", "00" * 32)
GUARD_S = 30  # a test that waits longer than this has failed; none measures time


def raw(payload: bytes, shape: tuple[int, ...], pixel_format: str = "Mono8", encoding: str = "raw") -> RawFrame:
    return RawFrame("cam1", "e", 0, None, 0, encoding, shape, pixel_format, None, memoryview(payload))


def plain(frame: RawFrame) -> NDArray[Any]:
    """Its pixels in gray or RGB."""
    return to_plain(decode(frame)).pixels


def encoded(pixels: NDArray[Any], extension: str = ".png", *options: int) -> bytes:
    """PNG or JPEG of gray or RGB pixels."""
    return cv2.imencode(extension, pixels[:, :, ::-1] if pixels.ndim == 3 else pixels, options)[1].tobytes()


def noise(shape: tuple[int, ...], dtype: Any = np.uint8, seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


# --- decode: raw


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1)])
def test_gray_bytes_become_one_channel(shape: tuple[int, ...]) -> None:
    pixels = noise((5, 7, 1))
    assert np.array_equal(decode(raw(pixels.tobytes(), shape)).pixels, pixels)


def test_sixteen_bit_gray_is_little_endian() -> None:
    pixels = decode(raw(b"\x01\x00\x00\x01\xff\xff\x00\x00", (2, 2), "Mono16")).pixels
    assert pixels.dtype == np.uint16
    assert pixels[:, :, 0].tolist() == [[1, 256], [65535, 0]]


def test_rgb_stays_as_it_is_and_bgr_is_turned_round() -> None:
    pixels = noise((5, 7, 3))
    assert np.array_equal(plain(raw(pixels.tobytes(), (5, 7, 3), "RGB8")), pixels)
    assert np.array_equal(plain(raw(pixels[:, :, ::-1].tobytes(), (5, 7, 3), "BGR8")), pixels)


@pytest.mark.parametrize(
    ("pixel_format", "shape", "layout"),
    [
        ("Mono8", (5, 7, 1), "plain"),
        ("RGB8", (5, 7, 3), "plain"),
        ("BGR8", (5, 7, 3), "bgr"),
        ("BayerRG8", (5, 7, 1), "bayerrg"),
    ],
)
def test_raw_pixels_leave_as_they_came_and_are_not_copied(
    pixel_format: str, shape: tuple[int, ...], layout: str
) -> None:
    sent = raw(noise(shape).tobytes(), shape, pixel_format)
    frame = decode(sent)
    assert frame.layout == layout
    assert frame.pixels.shape == shape
    assert np.shares_memory(frame.pixels, np.frombuffer(sent.payload, np.uint8))


def test_display_of_a_mosaic_or_of_bgr_is_that_of_its_colours() -> None:
    for sent in (raw(noise((8, 6)).tobytes(), (8, 6), "BayerRG8"), raw(noise((8, 6, 3)).tobytes(), (8, 6, 3), "BGR8")):
        shown = for_display(decode(sent))
        assert shown.shape == (8, 6, 3)
        assert np.array_equal(shown[:, :, ::-1], plain(sent))


def mosaic(shape: tuple[int, int], red: int, green: int, blue: int) -> NDArray[np.uint8]:
    """What a BayerRG sensor sees of one flat colour: R G in even rows, G B in odd ones."""
    pixels = np.full(shape, green, np.uint8)
    pixels[0::2, 0::2] = red
    pixels[1::2, 1::2] = blue
    return pixels


@pytest.mark.parametrize("color", [(200, 100, 50), (255, 0, 0), (0, 255, 0), (0, 0, 255), (7, 7, 7)])
@pytest.mark.parametrize("shape", [(8, 8), (9, 7), (3, 3), (64, 48)])
def test_bayer_mosaic_of_a_flat_colour_becomes_that_colour_up_to_the_border(
    shape: tuple[int, int], color: tuple[int, int, int]
) -> None:
    pixels = plain(raw(mosaic(shape, *color).tobytes(), shape, "BayerRG8"))
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, np.broadcast_to(np.array(color, np.uint8), (*shape, 3)))


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (8, 1), (2, 2), (2, 8), (8, 2)])
def test_bayer_mosaic_too_small_to_interpolate_is_refused(shape: tuple[int, int]) -> None:
    frame = raw(np.full(shape, 100, np.uint8).tobytes(), shape, "BayerRG8")
    with pytest.raises(FrameError):
        decode(frame)


# --- decode: encoded


@pytest.mark.parametrize(
    ("pixels", "pixel_format"),
    [
        (noise((9, 7)), "Mono8"),
        (noise((9, 7), np.uint16), "Mono16"),
        (noise((9, 7, 3)), "RGB8"),
        (noise((9, 7, 3)), "BGR8"),  # a file has its own order of colours
    ],
    ids=["gray", "gray 16 bit", "RGB8", "BGR8"],
)
def test_png_is_decoded_exactly(pixels: NDArray[Any], pixel_format: str) -> None:
    found = plain(raw(encoded(pixels), pixels.shape, pixel_format, "png"))
    assert found.dtype == pixels.dtype
    assert np.array_equal(found, pixels.reshape(9, 7, -1))


def test_bayer_mosaic_in_a_png_is_interpolated_like_a_raw_one() -> None:
    pixels = mosaic((16, 16), 200, 100, 50)
    from_png = plain(raw(encoded(pixels), (16, 16), "BayerRG8", "png"))
    assert np.array_equal(from_png, plain(raw(pixels.tobytes(), (16, 16), "BayerRG8")))


@pytest.mark.parametrize("color", [(250, 10, 10), (10, 250, 10), (10, 10, 250)])
def test_jpeg_keeps_the_order_of_colours(color: tuple[int, int, int]) -> None:
    pixels = np.broadcast_to(np.array(color, np.uint8), (16, 24, 3))
    found = plain(raw(encoded(pixels, ".jpg"), (16, 24, 3), "RGB8", "jpeg")).astype(int)
    assert np.abs(found - color).max() <= 4  # chroma is rounded twice, and weighs at most 1.8 in a channel


def test_gray_jpeg_becomes_one_channel() -> None:
    pixels = np.tile(np.arange(0, 240, 10, np.uint8), (16, 1))
    found = decode(raw(encoded(pixels, ".jpg", cv2.IMWRITE_JPEG_QUALITY, 100), (16, 24), "Mono8", "jpeg")).pixels
    assert found.shape == (16, 24, 1)
    assert np.abs(found[:, :, 0].astype(int) - pixels).max() <= 2


def test_orientation_tag_of_a_jpeg_does_not_turn_the_picture() -> None:
    # The wire's shape is that of the stored pixels; a camera that is mounted upside down must stay so.
    plain = encoded(noise((16, 16, 3)), ".jpg")
    tiff = b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + b"\0\0\0\0"
    segment = b"Exif\0\0" + tiff
    tagged = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + plain[2:]
    expected = decode(raw(plain, (16, 16, 3), "RGB8", "jpeg")).pixels
    assert np.array_equal(decode(raw(tagged, (16, 16, 3), "RGB8", "jpeg")).pixels, expected)


@pytest.mark.parametrize("extension", [".png", ".jpg"])
@pytest.mark.parametrize("claimed", [(9, 8), (10, 7), (7, 9), (1, 1)])
def test_file_of_another_size_than_the_header_says_is_refused_with_both(
    extension: str, claimed: tuple[int, int]
) -> None:
    with pytest.raises(FrameError, match=rf"size \[9, 7\], the header says \[{claimed[0]}, {claimed[1]}\]"):
        decode(raw(encoded(noise((9, 7)), extension), claimed, "Mono8", "png"))


@pytest.mark.parametrize("extension", [".png", ".jpg"])
@pytest.mark.parametrize("pixel_format", ["Mono8", "RGB8"])
def test_file_cut_anywhere_is_refused(extension: str, pixel_format: str) -> None:
    shape = (24, 32) if pixel_format == "Mono8" else (24, 32, 3)
    whole = encoded(noise(shape), extension)
    for length in [*range(0, len(whole), 61), len(whole) - 1, len(whole) - 2, len(whole) - 12]:
        with pytest.raises(FrameError):
            decode(raw(whole[:length], shape, pixel_format, extension[1:]))


def test_png_with_a_damaged_pixel_stream_is_refused() -> None:
    data = bytearray(encoded(noise((32, 32))))
    data[len(data) // 2] ^= 1
    with pytest.raises(FrameError):
        decode(raw(bytes(data), (32, 32), "Mono8", "png"))


def claiming_png(height: int, width: int) -> bytes:
    """A few bytes of PNG that claim any size."""
    header = b"IHDR" + struct.pack(">II5B", width, height, 8, 0, 0, 0, 0)
    chunks = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_png_that_claims_a_thousand_million_pixels_is_refused_without_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> None:
        raise AssertionError("the file was decoded")

    monkeypatch.setattr(cv2, "imdecode", refuse)
    with pytest.raises(FrameError, match="40000, 25000"):
        decode(raw(claiming_png(40_000, 25_000), (64, 64), "Mono8", "png"))


@pytest.mark.parametrize(
    "payload", [b"", b"\x89PNG", b"\xff\xd8", b"GIF89a" + bytes(60), b"II*\0" + bytes(60), b"BM" + bytes(60)]
)
@pytest.mark.parametrize("encoding", ["png", "jpeg"])
def test_file_of_another_kind_is_refused(encoding: str, payload: bytes) -> None:
    with pytest.raises(FrameError, match=f"not a readable {encoding}"):
        decode(raw(payload, (8, 8), "Mono8", encoding))


@settings(max_examples=150, deadline=None)
@given(
    start=st.sampled_from(
        [
            b"",
            b"\x89PNG\r\n\x1a\n",
            claiming_png(8, 8),
            b"\xff\xd8",
            b"\xff\xd8\xff\xe0\0\x04ab\xff\xc0\0\x11\x08\0\x08\0\x08",
        ]
    ),
    rest=st.binary(max_size=120),
)
def test_any_bytes_are_a_frame_of_the_claimed_size_or_a_frame_error(start: bytes, rest: bytes) -> None:
    size = encoded_size(start + rest)
    assert size is None or min(size) >= 0
    try:
        shape = decode(raw(start + rest, (8, 8), "RGB8", "jpeg")).pixels.shape
    except FrameError:
        shape = (8, 8, 3)
    assert shape == (8, 8, 3)


@pytest.mark.parametrize("fill", [b"", b"\xff", b"\xff\xff\xff"])
def test_size_of_a_jpeg_is_found_behind_other_segments_and_fill_bytes(fill: bytes) -> None:
    plain = encoded(noise((9, 7)), ".jpg")
    comment = b"\xff\xfe" + struct.pack(">H", 10) + b"\xff\xc0abcdef"  # holds what looks like a start of frame
    assert encoded_size(plain[:2] + comment + fill + plain[2:]) == (9, 7)


# --- the backend against the references, stage by stage

NEVER_NS = 2**62  # a deadline that no test reaches

SIZE = (64, 96)
GRID = (8, 12)
P = GRID[0] * GRID[1]


def one_hot_weights() -> NDArray[np.float32]:
    """A network whose feature c is the pixel (c // 8, c % 8) of channel 0 of the patch: the test chooses the features."""
    weights = np.zeros((CHANNELS, 3, 8, 8), np.float32)
    for channel in range(CHANNELS):
        weights[channel, 0, channel // 8, channel % 8] = 1
    return weights


def tensor_of(queries: NDArray[np.float32]) -> Tensor:
    """(P C) -> the tensor that the network above turns into these features."""
    values = np.zeros((1, 3, *SIZE), np.float32)
    for patch, query in enumerate(queries):
        y, x = patch // GRID[1] * 8, patch % GRID[1] * 8
        values[0, 0, y : y + 2, x : x + 8] = query.reshape(2, 8)
    return Tensor(values)


def awkward_core() -> NDArray[np.float32]:
    """(M C): ordinary rows, the zero row, duplicates, two rows equally far from the zero query, far and tiny ones."""
    core = np.random.default_rng(5).normal(size=(40, CHANNELS)).astype(np.float32)
    core[3] = 0
    core[11] = core[10]
    core[12] = core[10]
    core[20], core[21] = 0, 0
    core[20, 0], core[21, 1] = 0.5, 0.5
    core[30] *= 1000
    core[31] *= 1e-20
    return core


def awkward_queries(core: NDArray[np.float32]) -> NDArray[np.float32]:
    """(P C): random ones, rows of the bank themselves, halfway between two, zeros, outliers, denormal-small ones."""
    queries = np.random.default_rng(6).normal(size=(P, CHANNELS)).astype(np.float32)
    queries[:40] = core
    queries[40] = (core[20] + core[21]) / 2
    queries[41] = (core[0] + core[1]) / 2
    queries[42] = 0
    queries[43] = 1e4
    queries[44] = -1e4
    queries[45] = 1e-20
    return queries


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundles `plain` and `awkward` and the folder `keys`."""
    folder = tmp_path_factory.mktemp("inspection")
    make_bundle(folder / "plain", folder / "keys")
    make_bundle(
        folder / "awkward",
        folder / "keys",
        size=SIZE,
        weights=one_hot_weights(),
        core=awkward_core(),
        alpha=0.4,
        sigma=3.0,
    )
    make_bundle(folder / "wide", folder / "keys", size=SIZE)
    return folder


def backend_of(made: Path, name: str) -> CpuBackend:
    backend = open_backend(open_trusted(made / name, made / "keys"), "cpu", "f32", 1)
    assert isinstance(backend, CpuBackend)
    return backend


@pytest.fixture(scope="module")
def awkward(made: Path) -> CpuBackend:
    return backend_of(made, "awkward")


@pytest.fixture(scope="module")
def wide(made: Path) -> CpuBackend:
    return backend_of(made, "wide")


def awkward_queries_tensor() -> Tensor:
    return tensor_of(awkward_queries(awkward_core()))


def taps(backend: CpuBackend, tensor: Tensor) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Features (P C) and nearest rows (P,), copied: the backend's arrays are its own buffers."""
    return backend.features(tensor).copy(), backend.nearest()[0].copy()


def pictures(shape: tuple[int, ...], dtype: Any) -> Iterator[NDArray[Any]]:
    """Noise, black, white, and black with one white pixel."""
    yield noise(shape, dtype)
    yield np.zeros(shape, dtype)
    yield np.full(shape, np.iinfo(dtype).max, dtype)
    outlier = np.zeros(shape, dtype)
    outlier[shape[0] // 2, shape[1] // 2] = np.iinfo(dtype).max
    yield outlier


FRAME_SIZES = [
    SIZE, (128, 192), (192, 288), (64, 200), (65, 97), (100, 177), (301, 96),  # shrink or stay
    (512, 765), (512, 768), (500, 700), (384, 97),  # shrink by much: in strips, whole or cut, or by OpenCV alone
    (40, 50), (64, 50), (63, 96), (1, 1), (32, 400),  # at least one side grows
]  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("frame_hw", FRAME_SIZES)
def test_preprocess_is_the_reference_within_the_rounding_of_pixels(
    wide: CpuBackend, frame_hw: tuple[int, int], dtype: Any, channels: int
) -> None:
    # OpenCV rounds a resized pixel to an integer: half a level; 1 % covers its float32 sums. Bilinear on 8 bits is
    # integer arithmetic: weights of 11 bits (2^-12 off on each axis, times 255: an eighth of a level), both rows' sums
    # cut to 7 bits after the point and their products to 2 (twice 1/128 and 1/4 of a level).
    # A level of a 16-bit frame is 1/257. The affine map: three roundings of at most (255 + mean) / std.
    shrinks = frame_hw[0] >= SIZE[0] and frame_hw[1] >= SIZE[1]
    levels = 0.0 if frame_hw == SIZE else 0.51
    levels += 0 if shrinks or dtype == np.uint16 else 1 / 8 + 2 / 128 + 2 / 4
    # One side shrinks and the other grows: two steps, each rounded.
    levels += 0.51 if (frame_hw[0] - SIZE[0]) * (frame_hw[1] - SIZE[1]) < 0 else 0
    levels /= 257 if dtype == np.uint16 else 1
    for pixels in pictures((*frame_hw, channels), dtype):
        found = wide.preprocess(Frame(pixels)).values
        assert found.dtype == np.float32
        assert found.shape == (1, 3, *SIZE)
        error = np.abs(found - reference.normalise(pixels, SIZE, MEAN, STD))
        for channel in range(3):
            bound = (levels + 6 * U * (255 + MEAN[channel])) / STD[channel]
            assert error[0, channel].max() <= bound


def test_preprocess_of_gray_is_that_of_three_equal_channels(wide: CpuBackend) -> None:
    gray = noise((100, 150, 1))
    as_color = wide.preprocess(Frame(np.repeat(gray, 3, axis=2))).values
    assert np.array_equal(wide.preprocess(Frame(gray)).values, as_color)


def test_features_are_the_reference_within_the_rounding_of_a_sum(wide: CpuBackend, made: Path) -> None:
    values = np.random.default_rng(1).normal(size=(1, 3, *SIZE)).astype(np.float32)
    values[0, :, :8, :8] = 0
    values[0, :, 8:16, :8] = 1e4
    features, _ = taps(wide, Tensor(values))
    n = 3 * 8 * 8
    magnitude = reference.patch_convolution(np.abs(values), np.abs(random_weights()))
    error = np.abs(features - reference.patch_convolution(values, random_weights()))
    assert (error <= (n + 1) * U / (1 - (n + 1) * U) * magnitude).all()


def test_search_finds_the_nearest_row_or_one_as_near_within_rounding(awkward: CpuBackend) -> None:
    # The graph maximises q.m - |m|^2 / 2 in float32: C + 2 roundings of at most |q|.|m| + |m|^2 / 2 each, with the
    # bias rounded once when stored. Squared distance is |q|^2 minus twice that; two rows are compared: factor 4.
    core = awkward_core()
    queries, nearest = taps(awkward, awkward_queries_tensor())
    table = reference.distances_sq(queries, core)
    norms = np.abs(queries.astype(float)) @ np.abs(core.astype(float)).T + 0.5 * np.sum(core.astype(float) ** 2, axis=1)
    bound = 4 * (CHANNELS + 3) * U * norms
    best = table.argmin(axis=1)
    patches = np.arange(P)
    excess = table[patches, nearest] - table[patches, best]
    assert (excess <= np.maximum(bound[patches, nearest], bound[patches, best])).all()
    assert np.mean(nearest == best) > 0.9


def test_patch_scores_are_the_reference_of_the_same_winner(awkward: CpuBackend, made: Path) -> None:
    # One rounding in each difference, squared: 2; the square and the sum of C: C; the product alpha * density: 2 with
    # alpha itself rounded; density was rounded once when stored, and the reference takes the stored one.
    core = awkward_core()
    densities = reference.density(core, 3).astype(np.float32)
    tensor = awkward_queries_tensor()
    queries, winner = taps(awkward, tensor)
    patches = awkward.infer(tensor)["ldknn"]
    distance = reference.distances_sq(queries, core)[np.arange(P), winner]
    penalty = 0.4 * densities.astype(float)[winner]
    error = np.abs(patches.values - (distance - penalty))
    bound = (CHANNELS + 3) * U * distance + 2 * U * penalty + U * np.abs(distance - penalty)
    assert (error <= bound * (1 + 1e-6)).all()
    scores, best = reference.ldknn(queries, core, densities, 0.4)
    same = best == winner
    assert (np.abs(patches.values - scores)[same] <= (bound * (1 + 1e-6))[same]).all()


def test_rows_of_the_bank_themselves_score_minus_alpha_times_their_density(awkward: CpuBackend) -> None:
    # Never clipped: the score of a known patch is negative. Duplicates have the same density, so a tie is harmless.
    densities = reference.density(awkward_core(), 3).astype(np.float32)
    patches = awkward.infer(awkward_queries_tensor())["ldknn"]
    ordinary = [row for row in range(40) if row not in (3, 20, 21, 30, 31)]
    assert np.array_equal(patches.values[ordinary], -(np.float32(0.4) * densities[ordinary]))
    assert (patches.values[ordinary] < 0).all()


def test_query_equally_far_from_two_rows_wins_one_of_the_two(awkward: CpuBackend) -> None:
    core = awkward_core()
    queries = awkward_queries(core)
    queries[:] = 10 * core[30]  # far from everything but row 30
    queries[0] = (core[10] + core[10]) / 2
    _, nearest = taps(awkward, tensor_of(queries))
    assert nearest[0] in (10, 11, 12)
    assert (nearest[1:] == 30).all()


@pytest.mark.parametrize("kind", ["noise", "flat", "zeros", "one outlier", "huge"])
def test_map_and_score_are_the_reference_within_the_rounding_of_two_products(
    awkward: CpuBackend, made: Path, kind: str
) -> None:
    # Weights of both operators are not negative and sum to 1 in each row, so nothing grows: gh + gw products and sums,
    # and one rounding for each operator entry. The standardisation before it: three roundings.
    scores = np.random.default_rng(8).normal(size=P).astype(np.float32)
    scores = {"noise": scores, "flat": scores * 0 + 3, "zeros": scores * 0, "huge": scores * 1e20}.get(kind, scores * 0)
    if kind == "one outlier":
        scores[P // 2] = 1e6
    manifest = open_trusted(made / "awkward", made / "keys").manifest
    standard = manifest.fusion.standardisation["ldknn"]
    found = awkward.postprocess({"ldknn": PatchScores(scores)}, (480, 640))
    grid = (scores.astype(float).reshape(GRID) - standard.centre) / standard.scale
    expected = reference.gaussian_smooth(reference.upsample_bilinear(grid, SIZE), manifest.fusion.smoothingSigma)
    largest = (np.abs(scores).max() + abs(standard.centre)) / standard.scale
    assert found.values.shape == SIZE
    assert np.abs(found.values - expected).max() <= (sum(GRID) + 2 + 4) * U * 2 * largest
    assert found.score == float(found.values.max())
    assert found.frame_hw == (480, 640)


def test_postprocess_without_the_scores_of_its_branch_is_a_device_error(awkward: CpuBackend) -> None:
    with pytest.raises(DeviceError, match="no scores for the bundle's branch ldknn"):
        awkward.postprocess({}, (64, 64))


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((64, 96), (8, 12)),
        ((32, 32), (4, 4)),
        ((64, 32), (8, 1)),
        ((32, 64), (1, 1)),
        ((40, 33), (7, 5)),
        ((5, 3), (5, 3)),
        ((6, 8), (9, 10)),
        ((1, 2), (1, 2)),
    ],
)
@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.6, 12.0])
def test_smoothing_operators_are_upsampling_followed_by_the_gaussian(
    size: tuple[int, int], grid: tuple[int, int], sigma: float
) -> None:
    values = np.random.default_rng(3).normal(size=grid)
    rows, columns = smoothing_operator(size[0], grid[0], sigma), smoothing_operator(size[1], grid[1], sigma)
    expected = reference.gaussian_smooth(reference.upsample_bilinear(values, size), sigma)
    # Two operators, rounded once to float32; their rows sum to 1.
    assert (
        np.abs(rows.astype(float) @ values @ columns.T.astype(float) - expected).max() <= 3 * U * np.abs(values).max()
    )


@pytest.mark.parametrize("sigma", [0.3, 4.0, 40.0])
def test_smoothing_keeps_a_flat_map_flat(sigma: float) -> None:
    operator = smoothing_operator(48, 6, sigma)
    assert (operator >= 0).all()
    assert np.abs(operator.sum(axis=1, dtype=float) - 1).max() <= 6 * U


def test_whole_frame_is_scored_as_the_references_score_it(made: Path) -> None:
    # The stages' bounds would multiply up; at the network's own size nothing but float32 sums is between the two:
    # features of unit filters within 200 u, distances within twice that relative to |q|^2, both far below 1e-3.
    pipeline = open_pipeline(made / "plain", made / "keys")
    manifest = pipeline.bundle.manifest
    bank = load_bank(pipeline.bundle)
    for pixels in (good_pixels(3), bad_pixels(3)):
        features = reference.patch_convolution(reference.normalise(pixels, (64, 64), MEAN, STD), random_weights())
        scores, _ = reference.ldknn(features, bank["core"], bank["density"], manifest.alpha)
        standard = manifest.fusion.standardisation["ldknn"]
        grid = ((scores - standard.centre) / standard.scale).reshape(8, 8)
        expected = reference.gaussian_smooth(
            reference.upsample_bilinear(grid, (64, 64)), manifest.fusion.smoothingSigma
        )
        assert pipeline.anomaly_map(Frame(pixels)).score == pytest.approx(expected.max(), rel=1e-3)


def test_backend_that_the_bundle_was_not_built_for_is_refused_with_what_to_do(made: Path) -> None:
    bundle = open_trusted(made / "plain", made / "keys")
    with pytest.raises(DeviceError, match=r"holds no plan for a GPU; build it with .* --targets trt"):
        open_backend(bundle, "cuda")
    with pytest.raises(DeviceError, match="wanted one of f32"):
        open_backend(bundle, "cpu", "fp4")


# --- the verdict


def anomaly(values: Any, frame_hw: tuple[int, int] | None = None) -> AnomalyMap:
    values = np.array(values, np.float32)
    return AnomalyMap(values, frame_hw or values.shape, float(values.max()))


@pytest.mark.parametrize(
    ("score", "reason"),
    [(0.999, None), (1.0, Reason.DEFECT), (1.001, Reason.DEFECT), (-5.0, None), (1e30, Reason.DEFECT)],
)
def test_score_at_the_limit_is_a_reject_and_one_below_a_pass(score: float, reason: Reason | None) -> None:
    verdict = decide(anomaly([[score, -9.0]]), Limits(1.0, 1.0), [0.0], ENGINE)
    assert verdict.outcome is (Outcome.REJECT if reason else Outcome.PASS)
    assert verdict.reason is reason
    assert bool(verdict.regions) is bool(reason)
    assert (verdict.score, verdict.limit) == (pytest.approx(score), 1.0)


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_score_that_is_no_number_is_an_engine_error(score: float) -> None:
    verdict = decide(anomaly([[0.0, score]]) if score != -math.inf else anomaly([[score]]), Limits(1, 1), [0.0], ENGINE)
    assert (verdict.outcome, verdict.reason) == (Outcome.REJECT, Reason.ENGINE_ERROR)
    assert verdict.score is None
    assert verdict.p_value is None
    assert verdict.regions == ()


@settings(deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=12),
    limit=st.floats(-1e6, 1e6),
    at_a_value=st.booleans(),
)
def test_defect_always_has_a_region_and_a_pass_never(values: list[float], limit: float, at_a_value: bool) -> None:
    # `limit` has 64 bits, the map has 32: the comparison must not fall between the two.
    limit = values[0] if at_a_value else limit
    verdict = decide(anomaly([values]), Limits(limit, limit), [0.0], ENGINE)
    assert (verdict.reason is Reason.DEFECT) == (max(values) >= limit)
    assert bool(verdict.regions) == (verdict.reason is Reason.DEFECT)


@pytest.mark.parametrize(
    ("score", "calibration", "expected"),
    [
        (5.0, [1.0, 2.0, 3.0, 4.0], 1 / 5),
        (0.0, [1.0, 2.0, 3.0, 4.0], 5 / 5),
        (3.0, [1.0, 2.0, 3.0, 4.0], 3 / 5),  # equal counts as at or above
        (3.1, [1.0, 2.0, 3.0, 4.0], 2 / 5),
        (2.0, [2.0, 2.0, 2.0], 4 / 4),
        (2.1, [2.0], 1 / 2),
    ],
)
def test_p_value_of_cases_worked_by_hand(score: float, calibration: list[float], expected: float) -> None:
    assert p_value(score, calibration) == pytest.approx(expected)


@settings(deadline=None)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1))
def test_regions_are_the_flood_fill_of_the_map(rows: int, columns: int, seed: int, share: float) -> None:
    values = np.random.default_rng(seed).random((rows, columns)).astype(np.float32)
    limit = 1 - share
    found = find_regions(anomaly(values), limit)
    expected = []
    for pixels in reference.regions(values >= np.float32(limit)):
        ys, xs = [y for y, _ in pixels], [x for _, x in pixels]
        box = (min(xs), min(ys), max(xs) - min(xs) + 1, max(ys) - min(ys) + 1)
        expected.append((*box, len(pixels), max(float(values[pixel]) for pixel in pixels)))
    assert sorted((r.x, r.y, r.w, r.h, r.area, r.peak) for r in found) == sorted(expected)
    assert [r.area for r in found] == sorted((r.area for r in found), reverse=True)


def test_regions_that_touch_at_a_corner_are_one() -> None:
    (region,) = find_regions(anomaly([[2, 0, 0], [0, 3, 0], [0, 0, 0]]), 1)
    assert (region.x, region.y, region.w, region.h, region.area, region.peak) == (0, 0, 2, 2, 2, 3.0)


def test_peak_is_that_of_the_region_and_not_of_its_box() -> None:
    # The small region lies inside the box of the large one.
    values = [[1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 9, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    large, small = find_regions(anomaly(values), 1)
    assert (large.peak, small.peak) == (1.0, 9.0)


@pytest.mark.parametrize(
    ("frame_hw", "box", "area"),
    [
        ((8, 8), (2, 3, 3, 2), 6),
        ((80, 80), (20, 30, 30, 20), 600),
        ((16, 24), (6, 6, 9, 4), 36),
        ((4, 4), (1, 1, 2, 2), 2),  # 2..5 x 3..5 halved and rounded outwards; 6 / 4 = 1.5 rounds to 2
        ((1, 1), (0, 0, 1, 1), 1),
    ],
)
def test_regions_are_told_in_pixels_of_the_frame(frame_hw: tuple[int, int], box: tuple[int, ...], area: int) -> None:
    values = np.zeros((8, 8), np.float32)
    values[3:5, 2:5] = 7
    (region,) = find_regions(anomaly(values, frame_hw), 1)
    assert (region.x, region.y, region.w, region.h) == box
    assert region.area == area


@settings(deadline=None)
@given(frame_hw=st.tuples(st.integers(1, 500), st.integers(1, 500)), seed=st.integers(0, 2**32 - 1))
def test_regions_lie_inside_the_frame_and_are_never_empty(frame_hw: tuple[int, int], seed: int) -> None:
    values = np.random.default_rng(seed).random((9, 13)).astype(np.float32)
    for region in find_regions(anomaly(values, frame_hw), 0.7):
        assert region.x >= 0
        assert region.y >= 0
        assert min(region.w, region.h, region.area) >= 1
        assert region.x + region.w <= frame_hw[1]
        assert region.y + region.h <= frame_hw[0]


def test_map_that_lights_up_everywhere_tells_its_largest_regions_only() -> None:
    values = np.zeros((64, 64), np.float32)
    values[::2, ::2] = 1
    values[0, 0:5] = 1
    found = find_regions(anomaly(values), 1)
    assert len(found) == MAX_REGIONS
    assert found[0].area == 5


# --- the pipeline


@pytest.fixture
def pipeline(made: Path) -> Pipeline:
    return open_pipeline(made / "plain", made / "keys")


def test_flat_frame_passes_and_a_bright_square_is_a_defect_where_it_is(pipeline: Pipeline) -> None:
    good = pipeline.inspect(raw_frame(good_pixels(1)), "part")
    assert (good.outcome, good.reason, good.regions) == (Outcome.PASS, None, ())
    bad = pipeline.inspect(raw_frame(bad_pixels(1)), "part")
    assert (bad.outcome, bad.reason) == (Outcome.REJECT, Reason.DEFECT)
    (region,) = bad.regions
    assert (region.x + region.w / 2, region.y + region.h / 2) == (32, 32)
    assert bad.engine == EngineId("part", "1", pipeline.bundle.digest)
    assert bad.p_value == pytest.approx(1 / 21)


def test_frames_of_any_size_are_judged_alike(pipeline: Pipeline) -> None:
    for size in [(48, 48), (64, 64), (200, 100), (480, 640)]:
        assert pipeline.inspect(raw_frame(good_pixels(1, size)), "part").outcome is Outcome.PASS
        verdict = pipeline.inspect(raw_frame(bad_pixels(1, size)), "part")
        assert verdict.reason is Reason.DEFECT
        region = verdict.regions[0]
        assert region.x < size[1] / 2 < region.x + region.w
        assert region.y < size[0] / 2 < region.y + region.h


def test_same_frame_gives_the_same_score_also_after_opening_again(pipeline: Pipeline, made: Path) -> None:
    frame = raw_frame(bad_pixels(2, (100, 130)))
    first = pipeline.inspect(frame, "part").score
    pipeline.inspect(raw_frame(good_pixels(9)), "part")
    again = open_pipeline(made / "plain", made / "keys")
    assert pipeline.inspect(frame, "part").score == first == again.inspect(frame, "part").score


def test_timings_are_told_for_each_stage_that_ran(pipeline: Pipeline) -> None:
    timings = pipeline.inspect(raw_frame(good_pixels()), "part").timings
    stages = (timings.decode_ms, timings.preprocess_ms, timings.infer_ms, timings.postprocess_ms)
    assert all(stage is not None and stage >= 0 for stage in stages)
    assert timings.queue_ms is None


BAD_FRAMES = {
    "no png": raw(b"no png", (64, 64), "Mono8", "png"),
    "cut jpeg": raw(encoded(noise((64, 64)), ".jpg")[:200], (64, 64), "Mono8", "jpeg"),
    "png of another size": raw(encoded(noise((9, 7))), (64, 64), "Mono8", "png"),
}


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_frame_that_cannot_be_decoded_is_a_bad_frame_and_the_next_one_is_fine(pipeline: Pipeline, name: str) -> None:
    verdict = pipeline.inspect(BAD_FRAMES[name], "part")
    assert (verdict.outcome, verdict.reason, verdict.score) == (Outcome.REJECT, Reason.BAD_FRAME, None)
    assert verdict.engine is not None
    assert pipeline.inspect(raw_frame(good_pixels()), "part").outcome is Outcome.PASS


def fail_once(backend: Any, stage: str, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage raises at its next call, and works again after it."""
    works = getattr(backend, stage)

    def fail(*_args: object) -> None:
        monkeypatch.setattr(backend, stage, works)
        raise error

    monkeypatch.setattr(backend, stage, fail)


@pytest.mark.parametrize(
    "error", [DeviceError("gone"), RuntimeError("x"), MemoryError(), ValueError("shape"), KeyError("k")]
)
@pytest.mark.parametrize("stage", ["run", "preprocess", "infer", "postprocess"])
def test_stage_that_raises_is_an_engine_error_and_the_next_frame_is_fine(
    pipeline: Pipeline, stage: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_once(pipeline.backend, stage, error, monkeypatch)
    verdict = pipeline.inspect(raw_frame(good_pixels()), "part")
    assert (verdict.outcome, verdict.reason) == (Outcome.REJECT, Reason.ENGINE_ERROR)
    assert pipeline.inspect(raw_frame(good_pixels()), "part").outcome is Outcome.PASS


def test_scores_that_are_no_numbers_are_an_engine_error(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    infer = pipeline.backend.infer

    def one_nan(tensor: Tensor) -> Any:
        values = infer(tensor)["ldknn"].values.copy()
        values[5] = np.nan
        return {"ldknn": PatchScores(values)}

    monkeypatch.setattr(pipeline.backend, "infer", one_nan)
    assert pipeline.inspect(raw_frame(good_pixels()), "part").reason is Reason.ENGINE_ERROR


@settings(max_examples=60, deadline=None)
@given(
    payload=st.binary(max_size=300),
    encoding=st.sampled_from(["png", "jpeg"]),
    magic=st.sampled_from([b"", claiming_png(64, 64), b"\xff\xd8"]),
)
def test_no_payload_makes_the_pipeline_raise(
    shared_pipeline: Pipeline, payload: bytes, encoding: str, magic: bytes
) -> None:
    verdict = shared_pipeline.inspect(raw(magic + payload, (64, 64), "Mono8", encoding), "part")
    assert verdict.outcome is Outcome.REJECT
    assert verdict.reason is Reason.BAD_FRAME


@pytest.fixture(scope="module")
def shared_pipeline(made: Path) -> Pipeline:
    return open_pipeline(made / "plain", made / "keys")


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (120, 90)])
def test_pictures_are_made_as_asked_and_at_the_size_of_the_frame(made: Path, size: tuple[int, int]) -> None:
    bundle = open_trusted(made / "plain", made / "keys")
    pipeline = Pipeline(
        bundle, open_backend(bundle, "cpu", "f32", 1), Pictures(mask=True, heatmap=True, frame_on_reject=True)
    )
    verdict = pipeline.inspect(raw_frame(bad_pixels(1, size)), "part")
    assert verdict.pictures is not None
    drawn = {name: cv2.imdecode(np.frombuffer(data, np.uint8), -1) for name, data in verdict.pictures.items()}
    assert list(drawn) == ["mask", "heatmap", "frame"]
    assert {picture.shape for picture in drawn.values()} == {size}
    assert set(np.unique(drawn["mask"])) == {0, 255}
    assert drawn["mask"][size[0] // 2, size[1] // 2] == 255
    assert drawn["heatmap"][size[0] // 2, size[1] // 2] >= 128
    assert np.abs(drawn["frame"].astype(int) - bad_pixels(1, size)[:, :, 0]).mean() < 5
    good = pipeline.inspect(raw_frame(good_pixels(1, size)), "part").pictures
    assert good is not None
    assert list(good) == ["heatmap"]


# --- golden frames


def resealed(made: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Pipeline:
    """The plain bundle with its manifest's fields changed and signed again."""
    make_bundle(folder, made / "keys")
    fields = json.loads((folder / MANIFEST).read_bytes())
    del fields["files"]
    change(fields)
    seal_bundle(folder, fields, make_signing_key(made / "keys"))
    return open_pipeline(folder, made / "keys")


def test_golden_frames_are_reproduced_where_they_were_made(pipeline: Pipeline) -> None:
    assert check_golden(pipeline) <= 0.01


def test_golden_frames_are_replayed_exactly_as_inspect_sees_them(pipeline: Pipeline) -> None:
    for frame in pipeline.bundle.manifest.golden.frames:
        payload = pipeline.bundle.read(frame.file)
        verdict = pipeline.inspect(raw(payload, (64, 64), "Mono8", "png"), frame.product)
        assert (verdict.score, verdict.outcome.value) == (frame.score, frame.outcome)


@pytest.mark.parametrize("factor", [1.1, -1.1, 50.0])
@pytest.mark.parametrize("number", [0, 1])
def test_golden_score_out_of_tolerance_is_refused_with_both_scores(
    made: Path, tmp_path: Path, number: int, factor: float
) -> None:
    def shift(fields: dict[str, Any]) -> None:
        product = fields["products"]["part"]
        fields["golden"]["frames"][number]["score"] += factor * 0.001 * (product["limit"] - product["medianGood"])

    with pytest.raises(BundleError, match=r"found score .* wanted .* within"):
        check_golden(resealed(made, tmp_path / "bundle", shift))


def test_golden_score_just_inside_its_tolerance_is_taken(made: Path, tmp_path: Path) -> None:
    def shift(fields: dict[str, Any]) -> None:
        product = fields["products"]["part"]
        fields["golden"]["frames"][0]["score"] += 0.9 * 0.001 * (product["limit"] - product["medianGood"])

    assert check_golden(resealed(made, tmp_path / "bundle", shift)) == pytest.approx(0.9, abs=0.01)


def test_golden_outcome_that_is_not_met_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"wanted .*\(REJECT\)"):
        check_golden(
            resealed(made, tmp_path / "bundle", lambda fields: fields["golden"]["frames"][0].update(outcome="REJECT"))
        )


def test_precision_without_a_golden_tolerance_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no golden tolerance for precision f32"):
        check_golden(
            resealed(made, tmp_path / "bundle", lambda fields: fields["golden"].update(tolerance={"bf16": 0.02}))
        )


def test_limit_no_higher_than_the_median_leaves_no_tolerance_and_no_division_by_zero(
    made: Path, tmp_path: Path
) -> None:
    def flatten(fields: dict[str, Any]) -> None:
        product = fields["products"]["part"]
        product["medianGood"] = product["limit"]

    try:
        worst = check_golden(resealed(made, tmp_path / "bundle", flatten))
    except BundleError:
        worst = 0.0
    assert worst == 0.0


def test_golden_file_that_is_no_picture_is_refused(made: Path, tmp_path: Path) -> None:
    def spoil(_: dict[str, Any]) -> None:
        (tmp_path / "bundle" / "golden" / "good.png").write_bytes(b"no picture")

    with pytest.raises(BundleError, match=r"good\.png: found no readable image"):
        check_golden(resealed(made, tmp_path / "bundle", spoil))


# --- the engine's thread


class Slow:
    """A pipeline that tells when it has begun a frame and ends it when it is let."""

    def __init__(self) -> None:
        self.begun: Queue[int] = Queue()
        self.allowed = threading.Semaphore(0)

    def inspect(self, frame: RawFrame, product: str) -> Verdict:
        self.begun.put(frame.seq)
        assert self.allowed.acquire(timeout=GUARD_S)
        return Verdict(Outcome.PASS, None)


class Bench:
    """An engine on a slow pipeline, its reports in a queue."""

    def __init__(self) -> None:
        self.pipeline = Slow()
        self.reports: Queue[Done] = Queue()
        self.engine = Engine(self.pipeline, self.reports.put)  # type: ignore[arg-type]

    def submit(self, *seqs: int) -> None:
        for seq in seqs:
            frame = replace(raw_frame(good_pixels(0, (4, 4))), seq=seq)
            self.engine.submit(Job(key(seq), frame, "part", arrived_ns=0, deadline_ns=NEVER_NS))

    def begin(self) -> int:
        """Wait until a frame is at work."""
        return self.pipeline.begun.get(timeout=GUARD_S)

    def finish(self, count: int) -> list[int]:
        """Let `count` frames end; their numbers in the order of the reports."""
        for _ in range(count):
            self.pipeline.allowed.release()
        return [self.reports.get(timeout=GUARD_S).key.seq for _ in range(count)]


def key(seq: int) -> PartKey:
    return PartKey("cam1", "epoch", seq)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    bench.engine.start()
    yield bench
    for _ in range(100):
        bench.pipeline.allowed.release()
    assert bench.engine.stop(GUARD_S)


def test_frames_are_inspected_in_the_order_of_their_arrival(bench: Bench) -> None:
    bench.submit(1, 2, 3, 4)
    assert bench.finish(4) == [1, 2, 3, 4]


def test_report_carries_the_verdict_and_the_time_in_the_queue(bench: Bench) -> None:
    bench.submit(1)
    bench.pipeline.allowed.release()
    done = bench.reports.get(timeout=GUARD_S)
    assert done.key == key(1)
    assert done.verdict.outcome is Outcome.PASS
    assert done.verdict.timings.queue_ms is not None
    assert done.verdict.timings.queue_ms > 0


def test_withdrawn_frame_is_never_inspected(bench: Bench) -> None:
    bench.submit(1, 2, 3)
    assert bench.begin() == 1
    assert bench.engine.withdraw(key(2))
    assert not bench.engine.withdraw(key(2))
    assert bench.finish(2) == [1, 3]


def test_frame_at_work_or_done_or_unknown_cannot_be_withdrawn(bench: Bench) -> None:
    bench.submit(1)
    bench.begin()
    assert not bench.engine.withdraw(key(1))
    assert bench.finish(1) == [1]
    assert not bench.engine.withdraw(key(1))
    assert not bench.engine.withdraw(key(99))


def test_postponed_frames_step_behind_every_fresh_one_in_their_order(bench: Bench) -> None:
    bench.submit(1, 2, 3, 4)
    bench.begin()
    bench.engine.postpone(key(2))
    bench.engine.postpone(key(3))
    bench.submit(5)
    assert bench.engine.oldest_late() == key(2)
    assert bench.finish(5) == [1, 4, 5, 2, 3]
    assert bench.engine.oldest_late() is None


def test_frame_that_arrives_while_a_late_one_is_at_work_is_next(bench: Bench) -> None:
    bench.submit(1, 2, 3)
    bench.begin()
    bench.engine.postpone(key(2))
    bench.engine.postpone(key(3))
    assert bench.finish(1) == [1]
    assert bench.begin() == 2
    bench.submit(4)
    assert bench.finish(3) == [2, 4, 3]


def test_postponed_frame_can_be_withdrawn(bench: Bench) -> None:
    bench.submit(1, 2)
    bench.begin()
    bench.engine.postpone(key(2))
    assert bench.engine.withdraw(key(2))
    assert bench.engine.oldest_late() is None
    bench.submit(3)
    assert bench.finish(2) == [1, 3]


@pytest.mark.parametrize("seq", [1, 99])
def test_postponing_a_frame_at_work_or_unknown_changes_nothing(bench: Bench, seq: int) -> None:
    bench.submit(1, 2)
    bench.begin()
    bench.engine.postpone(key(seq))
    assert bench.engine.oldest_late() is None
    assert bench.finish(2) == [1, 2]


def test_stop_finishes_the_frame_at_work_and_leaves_the_waiting_ones() -> None:
    bench = Bench()
    bench.engine.start()
    bench.submit(1, 2, 3)
    bench.begin()
    assert not bench.engine.stop(0)
    assert bench.finish(1) == [1]
    assert bench.engine.stop(GUARD_S)
    assert bench.reports.empty()
    assert bench.engine.withdraw(key(2))


def test_engine_that_idles_or_never_started_stops_at_once() -> None:
    idle, unstarted = Bench(), Bench()
    idle.engine.start()
    assert idle.engine.stop(GUARD_S)
    assert unstarted.engine.stop(0)


def test_engine_is_busy_from_the_beginning_of_a_frame_to_its_report(bench: Bench) -> None:
    far_ahead_ns = 2**62
    assert bench.engine.busy_ms(far_ahead_ns) == 0
    bench.submit(1)
    bench.begin()
    assert bench.engine.busy_ms(far_ahead_ns) > 0
    bench.finish(1)
    assert bench.engine.busy_ms(far_ahead_ns) == 0


def test_real_pipeline_runs_on_the_engines_thread(made: Path) -> None:
    reports: Queue[Done] = Queue()
    engine = Engine(open_pipeline(made / "plain", made / "keys"), reports.put)
    engine.start()
    for seq, pixels in enumerate([good_pixels(1), bad_pixels(1), good_pixels(2)]):
        engine.submit(Job(key(seq), raw_frame(pixels, seq=seq), "part", arrived_ns=0, deadline_ns=NEVER_NS))
    outcomes = [reports.get(timeout=GUARD_S).verdict.outcome for _ in range(3)]
    assert engine.stop(GUARD_S)
    assert outcomes == [Outcome.PASS, Outcome.REJECT, Outcome.PASS]


@pytest.mark.parametrize("filling", [b"\xff", b"\xff\xd0", b"\xff\x01"])
def test_jpeg_of_nothing_but_fill_bytes_is_given_up_after_a_few_steps(filling: bytes) -> None:
    assert encoded_size(b"\xff\xd8" + filling * 2_000_000) is None


def test_frame_that_cannot_be_judged_in_time_steps_behind_one_that_can() -> None:
    """Else a queue as long as the deadline makes every frame late."""
    order: list[int] = []

    class Slow:
        def inspect(self, raw: RawFrame, product: str) -> Verdict:
            order.append(raw.seq)
            return Verdict(Outcome.PASS, None)

    engine = Engine(Slow(), lambda _done: None)  # type: ignore[arg-type]
    for seq, deadline_ns in ((0, 1), (1, NEVER_NS), (2, 1), (3, NEVER_NS)):
        engine.submit(Job(PartKey("cam1", "e", seq), raw_frame(good_pixels(), seq=seq), "part", 0, deadline_ns))
    taken = [engine._next() for _ in range(4)]
    assert [job.key.seq for job in taken if job is not None] == [1, 3, 0, 2]


def submit(engine: Engine, keys: list[PartKey], deadline_ns: Callable[[int], int]) -> None:
    for place, key in enumerate(keys):
        frame = raw_frame(good_pixels(), camera=key.camera, seq=key.seq)
        engine.submit(Job(key, frame, "part", place, deadline_ns(place)))


FLOOD = [PartKey("cam1", "e", seq) for seq in range(5)]
OTHERS = [PartKey("cam2", "e", 0), PartKey("cam3", "e", 0), PartKey("cam2", "e", 1)]


def test_cameras_take_turns_where_not_all_can_be_judged_in_time() -> None:
    engine = Engine(None, lambda _done: None)  # type: ignore[arg-type]
    soon_ns = time.monotonic_ns() + 3_600_000_000_000
    engine._service_ns = 1_000_000_000_000  # eight of them take longer, one does not
    submit(engine, [*FLOOD, *OTHERS], lambda place: soon_ns + place)
    taken = [engine._next() for _ in range(3)]
    assert [job.key for job in taken if job is not None] == [FLOOD[0], OTHERS[0], OTHERS[1]]


def test_earliest_deadline_is_first_where_all_can_be_judged_in_time() -> None:
    engine = Engine(None, lambda _done: None)  # type: ignore[arg-type]
    submit(engine, [*FLOOD, *OTHERS], lambda place: NEVER_NS - 100 + place)
    taken = [engine._next() for _ in range(8)]
    assert [job.key for job in taken if job is not None] == [*FLOOD, *OTHERS]


def test_what_waits_is_handed_over_as_it_arrived() -> None:
    engine = Engine(None, lambda _done: None)  # type: ignore[arg-type]
    submit(engine, [*FLOOD, *OTHERS], lambda _place: NEVER_NS)
    engine.withdraw(FLOOD[1])
    engine.postpone(FLOOD[2])
    assert [job.key for job, _ in engine.take_waiting()] == [FLOOD[0], *FLOOD[3:], *OTHERS, FLOOD[2]]


def test_jpeg_whose_scans_would_hold_up_the_line_is_refused() -> None:
    """66 kB of 16 megapixels, the last scan a hundred times over, took 5 s: longer than hang_ms, the daemon's end."""
    progressive = [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]
    data = cv2.imencode(".jpg", np.zeros((40, 40), np.uint8), progressive)[1].tobytes()
    scan = data[data.rfind(b"\xff\xda") : -2]
    scans = data.count(b"\xff\xda")

    def frame(more: int) -> RawFrame:
        payload = memoryview(data[:-2] + scan * more + data[-2:])
        return RawFrame("c", "e", 1, None, 1, "jpeg", (40, 40), "Mono8", None, payload)

    assert decode(frame(0)).pixels.shape == (40, 40, 1)
    with pytest.raises(FrameError, match=rf"the jpeg has {scans + 100} scans, at most 32 are decoded"):
        decode(frame(100))


def png_with(chunk: bytes) -> RawFrame:
    data = cv2.imencode(".png", np.zeros((40, 40), np.uint8))[1].tobytes()
    after_header = 8 + 25
    payload = memoryview(data[:after_header] + chunk + data[after_header:])
    return RawFrame("c", "e", 1, None, 1, "png", (40, 40), "Mono8", None, payload)


def png_chunk(kind: bytes, data: bytes, length: int | None = None) -> bytes:
    claimed = len(data) if length is None else length
    return struct.pack(">I", claimed) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_png_whose_chunk_claims_more_than_there_is_never_reaches_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """96 bytes that claimed a chunk of 1.6 GB took as much memory."""
    assert decode(png_with(png_chunk(b"tEXt", b"a\0b"))).pixels.shape == (40, 40, 1)
    monkeypatch.setattr("daemon.inspection.decode.cv2.imdecode", lambda *_: pytest.fail("decoded"))
    for length in (1_600_000_000, 2**32 - 1, 200):
        with pytest.raises(FrameError, match="the png is cut short"):
            decode(png_with(png_chunk(b"tEXt", b"a\0b", length)))


def test_png_of_very_many_chunks_is_given_up() -> None:
    with pytest.raises(FrameError, match="the png is cut short"):
        decode(png_with(png_chunk(b"tEXt", b"a\0b") * 20_000))
