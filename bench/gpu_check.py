"""The part of bench/gpu_check.sh that Python does: parity, then times; needs NumPy, PyTorch with CUDA, and nvcc.

    python -m bench.gpu_check [--parity] [--small]

Kernels are loaded and launched by the driver itself (ctypes), on PyTorch's stream. An op that is wrong is not timed.
Times are medians of CUDA events with the L2 cache flushed before each run, all peers in one process, one after another.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.gpu_parity import Check, check_all, exact_nearest, make_features, searches

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "daemon" / "inspection" / "backend" / "kernels" / "inspectd.cu"
_QUERIES, _ROWS, _CHANNELS = (784, 1024, 3136), (1_000, 10_000, 100_000, 200_000), (128, 152, 384, 1536)
_RUNS, _FRAMES = 25, 2000
_SHARED_UNASKED, _MOST_SHARED = 48 << 10, ctypes.c_int(8)  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_FLUSH_BYTES = 256 << 20
_TIME_OF = {"ldknn": "oursUs", "ldknn_int8": "oursInt8Us", "ldknn_sm90": "oursWgmmaUs"}
_MOST_SCORES = 700_000_000  # M N of peers that write the whole matrix
# Dense FP16 with FP32 accumulation, operations a second, by the GPU's name (NVIDIA's data sheets, without sparsity).
_PEAK = {
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12, "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA L4": 121e12,
}  # fmt: skip


class Gpu:
    """The first GPU: PyTorch's memory, our kernels."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        torch.zeros(1, device="cuda")  # makes the primary context current
        properties = torch.cuda.get_device_properties(0)
        self.name, self.multiprocessors = properties.name, properties.multi_processor_count
        self.capability = f"{properties.major}{properties.minor}"
        self.has_group_product = self.capability == "90"
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._module = ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(self._module), compile_kernels(self.capability))
        self._functions: dict[str, ctypes.c_void_p] = {}

    def put(self, values: Any) -> Any:
        view = {np.dtype(np.uint64): np.int64, np.dtype(np.uint32): np.int32, np.dtype(np.uint16): np.int16}
        known = values.view(view.get(values.dtype, values.dtype))
        return self.torch.from_numpy(np.ascontiguousarray(known)).cuda(), values.dtype

    def get(self, held: Any) -> Any:
        self.torch.cuda.synchronize()
        return held[0].cpu().numpy().view(held[1])

    def launch(self, name: str, grid: Any, block: Any, *arguments: Any, shared: int = 0) -> None:
        if name not in self._functions:
            self._functions[name] = ctypes.c_void_p()
            self._call("cuModuleGetFunction", ctypes.byref(self._functions[name]), self._module, name.encode())
            if shared > _SHARED_UNASKED:
                self._call("cuFuncSetAttribute", self._functions[name], _MOST_SHARED, ctypes.c_int(shared))
        held = [self._argument(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(held))(*(ctypes.addressof(item) for item in held))
        sides = [ctypes.c_uint(side) for shape in (grid, block) for side in (*shape, 1, 1)[:3]]
        stream = ctypes.c_void_p(self.torch.cuda.current_stream().cuda_stream)
        self._call("cuLaunchKernel", self._functions[name], *sides, ctypes.c_uint(shared), stream, pointers, None)

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, int):
            return ctypes.c_int(argument)
        return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_void_p(argument[0].data_ptr())

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code != 0:
            sys.exit(f"gpu_check: {name} failed with CUDA error {code}")


def compile_kernels(capability: str) -> bytes:
    # The instructions that only Hopper has are in its own architecture.
    architecture = "sm_90a" if capability == "90" else f"sm_{capability}"
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "kernels.cubin"
        command = ["nvcc", f"-arch={architecture}", "-cubin", "-O3", "-std=c++17", "-o", str(target), str(KERNELS)]
        subprocess.run(command, check=True)
        return target.read_bytes()


def report(checks: list[Check]) -> bool:
    """Print all checks; whether every one holds."""
    for check in checks:
        sign = ">=" if check.is_least else "<="
        verdict = "ok  " if check.holds else "FAIL"
        print(f"{verdict} {check.what}: {check.found:.3g} (wanted {sign} {check.allowed:.3g})", flush=True)
    return all(check.holds for check in checks)


class Clock:
    """Median microseconds of a piece of work on the GPU, its inputs out of the L2 cache."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def time_us(self, work: Callable[[], Any], runs: int = _RUNS) -> float:
        cuda, spent = self._torch.cuda, []
        for _ in range(3):
            work()
        for _ in range(runs):
            self._flush.zero_()
            started, ended = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            started.record()
            work()
            ended.record()
            ended.synchronize()
            spent.append(1000.0 * started.elapsed_time(ended))
        return median(spent)


def time_searches(gpu: Gpu) -> list[dict[str, Any]]:
    """Ours against PyTorch, cuBLAS with an argmin through CuPy, and FAISS where it imports.

    Each shape is checked before it is timed; the exact winners of the first 64 queries are enough to see a fault.
    """
    torch, clock, rows = gpu.torch, Clock(gpu.torch), []
    for d in _CHANNELS:
        for n in _ROWS:
            features, core, density = make_features(max(_QUERIES), n, d, seed=n + d)
            forms = searches(gpu)
            banks = {form: make_bank(gpu, core, density) for form, (make_bank, _) in forms.items()}
            exact, _ = exact_nearest(features[:64], core)
            for m in _QUERIES:
                found: dict[str, Any] = {"m": m, "n": n, "d": d}
                for form, bank in banks.items():
                    search = forms[form][1](bank, features[:m], 0.25)
                    search.run()
                    agreed = float((gpu.get(search.winners)[:64] == exact).mean())
                    if report([Check(f"{form} {m} x {n} x {d}: winners as in FP64", agreed, 0.95, is_least=True)]):
                        found[_TIME_OF[form]] = clock.time_us(search.run)
                    else:
                        found[f"{form}Error"] = "wrong winners; not timed"
                if "oursUs" not in found:
                    rows.append(found)
                    continue
                found["shareOfPeak"] = share_of_peak(gpu.name, 2.0 * m * n * d, found["oursUs"])
                peers = make_peers(torch, features[:m], core)
                found |= {name: clock.time_us(work) for name, work in peers.items() if m * n <= _MOST_SCORES}
                rows.append(found)
                shown = {key: round(value, 2) if isinstance(value, float) else value for key, value in found.items()}
                print(shown, flush=True)
    return rows


def share_of_peak(name: str, operations: float, spent_us: float) -> float | None:
    peak = _PEAK.get(name)
    return None if peak is None else operations / (spent_us * 1e-6) / peak


def make_peers(torch: Any, features: Any, core: Any) -> dict[str, Callable[[], Any]]:
    """Work by name; every peer finds the nearest row of each query, none re-measures it."""
    queries, rows = torch.from_numpy(features).cuda(), torch.from_numpy(core).cuda()
    half_queries, half_rows = queries.half(), rows.half()
    bias = -0.5 * half_rows.float().square().sum(1)
    peers: dict[str, Callable[[], Any]] = {
        "torchCdistUs": lambda: torch.cdist(queries, rows).min(1),
        "torchMatmulUs": lambda: (half_queries @ half_rows.T).float().add_(bias).max(1),
    }
    try:
        import cupy

        own_queries, own_rows, own_bias = (cupy.asarray(each) for each in (half_queries, half_rows, bias))
        stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)

        def gemm_argmin() -> Any:
            with stream:
                return (cupy.matmul(own_queries, own_rows.T) + own_bias).argmax(1)

        peers["cublasArgminUs"] = gemm_argmin
    except ImportError:
        pass
    try:
        import faiss
        import faiss.contrib.torch_utils  # takes tensors that are on the GPU already

        index = faiss.GpuIndexFlatL2(faiss.StandardGpuResources(), core.shape[1])
        index.add(rows)
        peers["faissUs"] = lambda: index.search(queries, 1)
    except (ImportError, AttributeError):
        pass
    return peers


def time_frames(gpu: Gpu) -> dict[str, Any]:
    """Whole frames of 2448x2048 in one CUDA graph: copy, preprocess, networks by PyTorch, search, postprocess, copy.

    TensorRT has no plan for this GPU here, so the networks are PyTorch's in FP16: the table says so.
    """
    from bench.gpu_frame import WholeFrame

    frame = WholeFrame(gpu)
    if not report(frame.check()):
        return {"error": "the whole frame is not what the references say; it was not timed"}
    spent = []
    for _ in range(_FRAMES):
        started = time.perf_counter()
        frame.run()
        spent.append(1000.0 * (time.perf_counter() - started))
    ordered = sorted(spent)
    figures = {"p50Ms": median(spent), "p99Ms": ordered[int(0.99 * len(ordered))], "framesPerS": 1000.0 / median(spent)}
    print({"frame": frame.describe(), **figures}, flush=True)
    return {"networks": "PyTorch FP16 in a CUDA graph, not TensorRT", "frame": frame.describe(), **figures}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parity", action="store_true", help="no times, no file")
    parser.add_argument("--small", action="store_true", help="sizes for compute-sanitizer")
    given = parser.parse_args()
    try:
        import torch

        has_gpu = torch.cuda.is_available()
    except ImportError as error:
        sys.exit(f"gpu_check: {error}; PyTorch with CUDA is wanted")
    if not has_gpu:
        print("gpu_check: PyTorch finds no GPU; nothing was checked", file=sys.stderr)
        sys.exit(69)
    gpu = Gpu()
    checks = check_all(gpu, is_small=given.small)
    if not report(checks):
        sys.exit("gpu_check: a kernel is wrong; nothing is timed")
    if given.parity:
        return
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    result = {
        "commit": commit.stdout.strip() or "unknown",
        "gpu": gpu.name,
        "capability": gpu.capability,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "parity": [{"what": c.what, "found": c.found, "allowed": c.allowed} for c in checks],
        "search": time_searches(gpu),
        "frame": time_frames(gpu),
    }
    path = ROOT / "bench" / "results" / f"gpu-{gpu.name.replace(' ', '-').lower()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
