"""Registers, shared memory and spills of every kernel for every GPU, by ptxas: bench/results/ptxas.txt. Needs nvcc.

python -m bench.ptxas
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.record import RESULTS, origin

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "daemon" / "inspection" / "backend" / "kernels" / "inspectd.cu"
CAPABILITIES = ("80", "86", "87", "89", "90a", "110", "120")


def main() -> None:
    """Compile for each GPU and keep what ptxas says."""
    about = origin()
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    lines = [f"commit {about['commit']}, {version}, {about['measured']}", ""]
    lines.append(f"{'GPU':8}{'kernel':24}{'registers':>10}{'stack':>7}{'spill stores':>14}{'spill loads':>13}")
    spilled = False
    for capability in CAPABILITIES:
        for name, figures in sorted(report(capability).items()):
            lines.append(f"sm_{capability:5}{name:24}{figures[0]:>10}{figures[1]:>7}{figures[2]:>14}{figures[3]:>13}")
            spilled |= figures[2:] != (0, 0)
    (RESULTS / "ptxas.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    if spilled:
        sys.exit("a kernel spills registers")


def report(capability: str) -> dict[str, tuple[int, int, int, int]]:
    """Of each kernel: registers, bytes of stack, of spill stores and of spill loads."""
    with tempfile.TemporaryDirectory() as folder:
        target = str(Path(folder) / "kernels.cubin")
        command = ["nvcc", f"-arch=sm_{capability}", "-cubin", "-Xptxas", "-v", "-O3", "-std=c++17", "-o", target]
        said = subprocess.run([*command, str(KERNELS)], capture_output=True, text=True, check=True).stderr
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    found = {}
    for name, stack, stores, loads, registers in re.findall(pattern, said, re.DOTALL):
        found[name] = (int(registers), int(stack), int(stores), int(loads))
    return found


if __name__ == "__main__":
    main()
