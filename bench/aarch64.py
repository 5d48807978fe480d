"""Does every dependency of the daemon have a wheel for a Jetson (aarch64, Python 3.10)? Needs pip and its index.

    python -m bench.aarch64

pip resolves and downloads for that platform what pyproject.toml asks for, with all that it needs in turn; the names
are printed. JetPack 6 is Ubuntu 22.04, whose C library (2.35) takes every manylinux up to that.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).resolve().parent.parent
_PLATFORMS = [f"manylinux_2_{version}_aarch64" for version in range(35, 16, -1)] + ["manylinux2014_aarch64"]


def main() -> None:
    """Download into a temporary folder; exit 1 with pip's words where something has no wheel."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--dest", folder]
        command += ["--python-version", "3.10", "--implementation", "cp"]
        command += [word for platform in _PLATFORMS for word in ("--platform", platform)]
        done = subprocess.run([*command, *wanted], capture_output=True, text=True, check=False)
        found = sorted(path.name for path in Path(folder).iterdir())
    print("\n".join(found))
    if done.returncode != 0:
        sys.exit(done.stderr.strip())
    print(f"{len(found)} wheels: everything that the daemon needs")


if __name__ == "__main__":
    main()
