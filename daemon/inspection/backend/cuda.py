"""The CUDA backend: TensorRT for the networks, our kernels for the rest, one CUDA graph a frame.

    frame in page-locked memory -> preprocess -> networks (a plan of the bundle) -> ldknn -> postprocess -> map, score

Frames go to the GPU in the layout they came in. Everything is allocated when the backend opens or meets a frame of a
new size, nothing per frame; the golden frames, which every engine replays before it is READY, bring the usual sizes.
The daemon never builds a plan, and compiles kernels only where the bundle has none for this GPU. One context, retained
explicitly and made current only inside `run`, which one thread at a time calls. Networks compute in FP16; distances
and the map in FP32.
"""

from __future__ import annotations

import importlib
import threading
import traceback
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from daemon.bundle import Branch, Bundle
from daemon.errors import BundleError, DeviceError
from daemon.inspection.backend.cubin import load_kernels
from daemon.inspection.backend.graph import Graph
from daemon.inspection.backend.ldknn import Search
from daemon.inspection.backend.plan import Networks, import_tensorrt
from daemon.inspection.backend.search import from_ordered
from daemon.inspection.backend.tables import Table, banded, branch_scaling, resampling, score_of, smoothing_operator
from daemon.inspection.tensors import load_bank
from daemon.types import AnomalyMap, FloatArray, Frame, PixelArray, Timings

_MOST_SIZES = 4  # of frames that are kept ready
_LONGEST_SIDE = 32_768  # pixels; the tables of a longer one take longer than a frame may hang
_RECORDING = threading.Lock()
_KINDS = {
    ("plain", 1, "uint8"): "mono8",
    ("plain", 1, "uint16"): "mono16",
    ("plain", 3, "uint8"): "rgb8",
    ("bgr", 3, "uint8"): "bgr8",
    ("bayerrg", 1, "uint8"): "bayerrg8",
}


def why_not(bundle: Bundle) -> str | None:
    """Why this bundle cannot run on a GPU here; None where it can be tried."""
    plans = [name for name in bundle.manifest.files if name.endswith(".plan")]
    if not plans:
        return f"{bundle.folder} holds no plan for a GPU; build it with build_engines.py --targets trt on this box"
    try:
        importlib.import_module("pycuda.driver")
        import_tensorrt()
    except (ImportError, OSError) as error:
        return f"{error}; install the extra [gpu] and NVIDIA's driver, or set backend.kind to cpu"
    return None


class CudaBackend:
    """The Backend protocol on the first GPU."""

    name, precision = "cuda", "fp16"

    def __init__(self, bundle: Bundle) -> None:
        self._cuda = importlib.import_module("pycuda.driver")
        self._sizes: OrderedDict[tuple[str, tuple[int, ...]], _Size] = OrderedDict()
        with _as_device_error():
            self._cuda.init()
            self._device = self._cuda.Device(0)
            self._context = self._device.retain_primary_context()
        with self._current(), _as_device_error():
            self._open(bundle)

    def _open(self, bundle: Bundle) -> None:
        manifest = bundle.manifest
        self._grid, self._hw = manifest.grid, manifest.preprocessing.size
        self._score_rule = manifest.scoreRule
        self._branches = {branch: branch_scaling(manifest.fusion, branch) for branch in manifest.branches}
        self._stream = self._cuda.Stream()
        capability = "".join(map(str, self._device.compute_capability()))
        self._functions = load_kernels(self._cuda, bundle, capability)
        patches, (h, w) = self._grid[0] * self._grid[1], self._hw
        with _as_device_error():
            self._networks = Networks(bundle, capability, self._cuda)
        self._buffers = dict(self._networks.buffers)
        sigma = manifest.fusion.smoothingSigma
        operators = (smoothing_operator(h, self._grid[0], sigma), smoothing_operator(w, self._grid[1], sigma))
        self._smoothing = [self._upload_table(banded(operator)) for operator in operators]
        scaling = manifest.preprocessing
        scale = np.array([[1.0 / std, mean / std] for mean, std in zip(scaling.mean, scaling.std, strict=True)])
        self._scale_8 = self._upload(scale[:, 0].astype(np.float32))
        self._scale_16 = self._upload((scale[:, 0] / 257.0).astype(np.float32))
        self._offset = self._upload(scale[:, 1].astype(np.float32))
        if "ldknn" in self._branches:
            self._search = self._open_search(bundle, patches)
            self._buffers |= self._search.buffers
        self._limit = np.float32(min(product.mapLimit for product in manifest.products.values()))
        words = -(-w // 32)
        self._map, self._mask, self._score = (self._cuda.mem_alloc(size) for size in (4 * h * w, 4 * h * words, 4))
        self._found_map: FloatArray = self._page_locked((h, w), np.float32)
        self._found_score: npt.NDArray[np.uint32] = self._page_locked((1,), np.uint32)

    # Opening

    def _open_search(self, bundle: Bundle, patches: int) -> Search:
        bank = load_bank(bundle)
        channels = bank["core"].shape[1]
        if channels != self._networks.channels:
            raise BundleError(
                f"{bundle.folder}: found {channels} channels in the bank, {self._networks.channels} in the networks"
            )
        try:
            return Search(
                bank, bundle.manifest.alpha, patches,
                multiprocessors=self._device.get_attribute(self._cuda.device_attribute.MULTIPROCESSOR_COUNT),
                upload=self._upload, allocate=self._cuda.mem_alloc,
            )  # fmt: skip
        except DeviceError as error:
            raise DeviceError(f"{bundle.folder}: {error}") from error

    # A frame

    def run(self, frame: Frame) -> tuple[AnomalyMap, Timings]:
        with self._current(), _as_device_error():
            size = self._size_for(frame)
            np.copyto(size.host, frame.pixels)
            size.graph.launch()
            self._stream.synchronize()
        is_max = self._score_rule == "max"  # the kernel's; any other rule reads the map, which is here anyway
        score = from_ordered(int(self._found_score[0])) if is_max else score_of(self._found_map, self._score_rule)
        return AnomalyMap(self._found_map, size.frame_hw, score), Timings()

    def network_input(self) -> FloatArray:
        image = self.tap("image", (3, *self._hw), np.float16)
        return image.astype(np.float32)

    def mask(self) -> npt.NDArray[np.bool_]:
        """Tap: where the last map reached the limit, (h w); the lowest limit where there are several products."""
        words = np.empty((self._hw[0], -(-self._hw[1] // 32)), np.uint32)
        with self._current(), _as_device_error():
            self._cuda.memcpy_dtoh(words, self._mask)
        bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
        return bits[:, : self._hw[1]].astype(bool)

    def tap(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Tap: a buffer of the last frame: image, features, repair, winners or ldknn."""
        found = np.empty(shape, dtype)
        with self._current(), _as_device_error():
            self._cuda.memcpy_dtoh(found, self._buffers[name])
        return found

    def close(self) -> None:
        with self._current():
            for size in self._sizes.values():
                size.graph.close()
            self._sizes.clear()
            # Everything on the device goes while the context is current; PyCUDA frees nothing afterwards.
            context = self._context
            for name in [name for name in vars(self) if name not in ("_context", "_cuda")]:
                delattr(self, name)
        context.detach()

    def _size_for(self, frame: Frame) -> _Size:
        pixels = frame.pixels
        kind = _KINDS.get((frame.layout, pixels.shape[2], pixels.dtype.name))
        if kind is None or max(pixels.shape[:2]) > _LONGEST_SIDE:
            raise DeviceError(
                f"found a frame of shape {list(pixels.shape)} in {pixels.dtype}, wanted gray of 8 or 16 bit or colours "
                f"of 8 bit, at most {_LONGEST_SIDE} pixels a side; use backend.kind cpu for others"
            )
        key = (kind, pixels.shape)
        if key in self._sizes:
            self._sizes.move_to_end(key)
            return self._sizes[key]
        while len(self._sizes) >= _MOST_SIZES:
            self._sizes.popitem(last=False)[1].graph.close()
        # One at a time in the process: what another engine does to the default stream would spoil a recording.
        with _RECORDING:
            try:
                self._sizes[key] = made = _Size(self, kind, pixels)
            except BaseException as error:
                # PyCUDA frees memory only while the context is current: let go of the half-made size here.
                for raised in (error, error.__cause__, error.__context__):
                    if raised is not None:
                        traceback.clear_frames(raised.__traceback__)
                raise
        return made

    def enqueue(self, size: _Size) -> None:
        """Put a frame's whole work on the stream."""
        if size.is_copied:
            self._cuda.memcpy_htod_async(size.device, size.host, self._stream)
        (rows, columns), (h, w) = size.tables, self._hw
        blocks = (-(-w // 32), -(-h // 8))
        self._launch(
            f"preprocess_{size.kind}", blocks, (32, 8, 1), size.device, self._buffers["image"], *rows, *columns,
            self._scale_16 if size.kind == "mono16" else self._scale_8, self._offset, *size.frame_hw, h, w,
        )  # fmt: skip
        self._networks.enqueue(self._stream)
        if "ldknn" in self._branches:
            self._search.enqueue(self._launch, self._buffers["features"])
        # Two at most: a map stands alone, in the place of the repair branch.
        pair: tuple[Branch, ...] = ("map" if "map" in self._branches else "repair", "ldknn")
        scaling = [value for branch in pair for value in self._branches.get(branch, (0.0, 0.0))]
        inputs = [self._buffers[branch] if branch in self._branches else np.uintp(0) for branch in pair]
        self._launch("postprocess_start", (1, 1), (1, 1, 1), self._score)
        self._launch(
            "postprocess", blocks, (32, 8, 1), *inputs, *scaling, *self._smoothing[0], *self._smoothing[1],
            self._map, self._mask, self._score, self._limit, self._grid[1], h, w,
        )  # fmt: skip
        self._cuda.memcpy_dtoh_async(self._found_map, self._map, self._stream)
        self._cuda.memcpy_dtoh_async(self._found_score, self._score, self._stream)

    # The driver

    def _launch(
        self, name: str, blocks: tuple[int, int], threads: tuple[int, int, int], *arguments: Any, shared_bytes: int = 0
    ) -> None:
        self._functions[name].prepared_async_call(blocks, threads, self._stream, *arguments, shared_size=shared_bytes)

    def upload_tables(self, frame_hw: tuple[int, int]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The resampling of frames of this size, on the device."""
        rows, columns = (resampling(side, length) for side, length in zip(self._hw, frame_hw, strict=True))
        return self._upload_table(rows), self._upload_table(columns)

    def _upload_table(self, table: Table) -> tuple[Any, ...]:
        return self._upload(table.first), self._upload(table.weights), table.taps

    def _upload(self, values: npt.NDArray[Any]) -> Any:
        with _as_device_error():
            return self._cuda.to_device(np.ascontiguousarray(values))

    def _page_locked(self, shape: tuple[int, ...], dtype: npt.DTypeLike, flags: int = 0) -> Any:
        with _as_device_error():
            return self._cuda.pagelocked_empty(shape, dtype, mem_flags=flags)

    def make_slot(self, pixels: PixelArray) -> tuple[Any, Any, bool]:
        """(page-locked array, its device pointer, whether it is copied): a Jetson's GPU reads host memory itself."""
        with _as_device_error():
            is_integrated = self._device.get_attribute(self._cuda.device_attribute.INTEGRATED)
        flags = self._cuda.host_alloc_flags.DEVICEMAP if is_integrated else 0
        host = self._page_locked(pixels.shape, pixels.dtype, flags)
        if is_integrated:
            return host, np.uintp(host.base.get_device_pointer()), False
        return host, self._cuda.mem_alloc(pixels.nbytes), True

    def record(self, size: _Size) -> Graph:
        """Once without recording, since TensorRT sets itself up in its first run; then into a graph."""
        self.enqueue(size)
        self._stream.synchronize()
        return Graph(self._stream, lambda: self.enqueue(size))

    @contextmanager
    def _current(self) -> Iterator[None]:
        """Make the context this thread's for a while."""
        self._context.push()
        try:
            yield
        finally:
            self._context.pop()


class _Size:
    """What frames of one size and kind need: page-locked memory, tables, and the graph that was recorded with them."""

    def __init__(self, backend: CudaBackend, kind: str, pixels: PixelArray) -> None:
        self.kind = kind
        self.frame_hw = (pixels.shape[0], pixels.shape[1])
        self.host, self.device, self.is_copied = backend.make_slot(pixels)
        self.tables = backend.upload_tables(self.frame_hw)
        self.host[...] = pixels
        self.graph = backend.record(self)


@contextmanager
def _as_device_error() -> Iterator[None]:
    """PyCUDA's own errors as ours."""
    cuda = importlib.import_module("pycuda.driver")
    try:
        yield
    except cuda.Error as error:
        raise DeviceError(f"the GPU failed: {error}") from error
