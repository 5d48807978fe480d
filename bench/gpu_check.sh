#!/usr/bin/env bash
# The GPU check, by one command on a machine with an NVIDIA GPU and no network:
#
#     bash bench/gpu_check.sh [FOLDER]
#
# FOLDER (default: wheels) may hold wheels and source packages of what is missing: PyCUDA is built from its source
# package, without curand. Python with NumPy and PyTorch, and nvcc, must be there. It compiles the kernels, holds every
# one against the references on fresh inputs and poisoned outputs, runs the small sizes under compute-sanitizer, times
# the search against its peers and a whole frame as one graph, and writes bench/results/gpu-<name>.json.
# Without a GPU it says so and ends with 69.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:-wheels}")
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if ! command -v nvidia-smi >/dev/null || ! nvidia-smi -L >/dev/null 2>&1; then
    echo "gpu_check: no NVIDIA GPU here (nvidia-smi finds none); nothing was checked" >&2
    exit 69
fi
nvidia-smi --query-gpu=name,compute_cap,driver_version,clocks.max.sm --format=csv

install_pycuda() {
    local source
    source=$(ls "$folder"/pycuda-*.tar.gz 2>/dev/null | head -n 1)
    [ -n "$source" ] || return 1
    tar -xzf "$source" -C "$work"
    (
        cd "$work"/pycuda-*/
        echo "CUDA_ENABLE_CURAND = False" >siteconf.py
        "$python" -m pip install --quiet --no-index --no-build-isolation --find-links "$folder" .
    )
}
if ! "$python" -c 'import pycuda.driver' 2>/dev/null; then
    "$python" -m pip install --quiet --no-index --find-links "$folder" pytools mako 2>/dev/null || true
    install_pycuda || echo "gpu_check: no PyCUDA ($folder holds no source package that builds)"
fi

mkdir -p bench/results
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        echo "== compute-sanitizer $tool, small sizes"
        compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m bench.gpu_check --parity --small
    done
else
    echo "gpu_check: no compute-sanitizer: neither memory nor races were checked"
fi
"$python" -m bench.gpu_check
if "$python" -c 'import pycuda.driver' 2>/dev/null; then
    "$python" -m bench.gpu_backend
else
    echo "gpu_check: without PyCUDA the backend itself was not run"
fi
