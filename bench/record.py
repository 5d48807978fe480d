"""What every result file says about its origin, and how it is written."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def origin(*packages: str) -> dict[str, Any]:
    """Commit (marked when the tree was changed), machine, versions, time."""
    commit = _git("rev-parse", "HEAD")
    changed = bool(
        _git("status", "--porcelain", "--untracked-files=no", "--", "daemon", "trainer", "adapters", "bench")
    )
    return {
        "commit": commit + ("-dirty" if changed else ""),
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "system": platform.platform(terse=True),
        },
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "measured": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write_result(name: str, result: dict[str, Any]) -> Path:
    path = RESULTS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _processor() -> str:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()
