"""Every target under atheris: `make fuzz RUNS=1000000`.

    python -m tests.fuzz --runs 1000000 --seconds 14400 [NAME...]

A target ends at its first crash; the input is left in tests/fuzz/crashes/ and the exit code is 1. Result, for all
targets or for those named and --save: bench/results/fuzz.json, each target with the commit that it ran at.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.record import RESULTS, origin, write_result
from tests.fuzz.targets import MEMORY, ROOT, TARGETS

CRASHES = ROOT / "tests" / "fuzz" / "crashes"
LIMITS = ("-rss_limit_mb=2048", "-timeout=25", "-print_final_stats=1")  # beyond them an input is a crash too


def fuzz(name: str, runs: int, seconds: int) -> dict[str, Any]:
    """One target; what libFuzzer said goes to the terminal when something was found, else only its numbers."""
    CRASHES.mkdir(exist_ok=True)
    before = set(CRASHES.glob(f"{name}-*"))
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="inspectd-fuzz-", dir=MEMORY) as folder:
        command = [sys.executable, "-m", "tests.fuzz.one", name, folder, f"-runs={runs}", f"-max_total_time={seconds}"]
        command += [*LIMITS, f"-artifact_prefix={CRASHES}/{name}-"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
        kept = len(list((Path(folder) / "corpus").iterdir()))
    said = done.stderr.decode("utf-8", "replace")
    counted = re.findall(r"number_of_executed_units: (\d+)", said)
    found = sorted(path.name for path in set(CRASHES.glob(f"{name}-*")) - before)
    if done.returncode or not counted:
        print(said[-6000:], file=sys.stderr)
        found = found or [f"exit code {done.returncode}"]
    row = {"target": name, "runs": int(counted[-1]) if counted else 0, "seconds": round(time.monotonic() - started, 1)}
    return {**row, "corpus": kept, "crashes": len(found), "inputs": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"one of {', '.join(TARGETS)}; all where none is given"
    )
    parser.add_argument("--runs", type=int, default=1_000_000, help="executions a target")
    parser.add_argument("--seconds", type=int, default=14_400, help="at most, a target")
    parser.add_argument("--jobs", type=int, default=1, help="targets at a time; one takes one core")
    parser.add_argument("--save", action="store_true", help="take the results of named targets in; all are always")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(TARGETS)):
        parser.error(f"found target {unknown[0]!r}, wanted one of {', '.join(TARGETS)}")
    if find_spec("atheris") is None:
        parser.error("atheris is not installed; pip install 'inspectd[fuzz]'")

    made = origin("atheris", "opencv-python-headless", "pydantic")

    def tell(name: str) -> dict[str, Any]:
        row = {**fuzz(name, options.runs, options.seconds), "commit": made["commit"]}
        print(row, flush=True)
        return row

    with ThreadPoolExecutor(options.jobs) as jobs:
        rows = list(jobs.map(tell, options.names or TARGETS))
    if options.save or not options.names:
        path = RESULTS / "fuzz.json"
        known = {row["target"]: row for row in json.loads(path.read_text())["targets"]} if path.exists() else {}
        known |= {row["target"]: row for row in rows}
        write_result("fuzz.json", {**made, "targets": [known[name] for name in TARGETS if name in known]})
    sys.exit(any(row["crashes"] for row in rows))


if __name__ == "__main__":
    main()
