"""Runs the demo and records its summary with its origin in bench/results/demo.json."""

from __future__ import annotations

import json
import subprocess
import sys

from bench.record import ROOT, origin, write_result


def main() -> None:
    subprocess.run([sys.executable, "-m", "examples.demo"], cwd=ROOT, check=True)
    summary = json.loads((ROOT / "demo" / "summary.json").read_text())
    result = {**origin("openvino", "torch", "numpy", "elpv-dataset"), **summary}
    print(write_result("demo.json", result).relative_to(ROOT))


if __name__ == "__main__":
    main()
