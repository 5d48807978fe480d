"""The engines on disk, for eyes: versions, limits, golden frames, calibration scores.

The daemon verifies signature and files before it takes an engine; here each file is only held against the manifest's
hash, so that what is shown is what the manifest lists. What cannot be read is shown as such, not left out.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load

from daemon.bundle import CALIBRATION, MANIFEST, Manifest
from daemon.shelf import CURRENT, PREVIOUS, linked_version

_MOST_MANIFEST_BYTES = 4 << 20
_MOST_VERSIONS = 100  # of one engine, the newest
_BARS = 40


def list_engines(folder: Path, names: list[str]) -> list[dict[str, Any]]:
    """Every version of the named engines, newest first."""
    return [_describe(folder, name, version) for name in names for version in _versions(folder / name)]


def _versions(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    found = [path.name for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    return sorted((name for name in found if not name.startswith(".")), reverse=True)[:_MOST_VERSIONS]


def _describe(folder: Path, name: str, version: str) -> dict[str, Any]:
    known: dict[str, Any] = {
        "engine": f"{name}/{version}", "name": name, "version": version, "fault": None,
        "isCurrent": linked_version(folder, name, CURRENT) == version,
        "isPrevious": linked_version(folder, name, PREVIOUS) == version,
    }  # fmt: skip
    try:
        manifest, digest = read_manifest(folder / name / version)
    except (OSError, ValueError) as error:
        return {**known, "fault": f"its manifest cannot be read: {str(error).splitlines()[0]}"}
    products = {
        product: {"limit": judged.limit, "n": judged.n, "bound95": judged.bound95, "medianGood": judged.medianGood}
        for product, judged in manifest.products.items()
    }
    golden = {"frames": len(manifest.golden.frames), "tolerance": manifest.golden.tolerance}
    size = list(manifest.preprocessing.size)
    return {
        **known, "digest": digest, "created": manifest.created, "products": products, "golden": golden,
        "size": size, "branches": list(manifest.branches),
    }  # fmt: skip


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """(manifest, digest). Raises OSError or ValueError."""
    path = folder / MANIFEST
    status = path.stat()
    if status.st_size > _MOST_MANIFEST_BYTES:
        raise ValueError(f"{path} has {status.st_size} bytes")
    return _parse(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=256)
def _parse(path: Path, _changed_ns: int, _bytes: int) -> tuple[Manifest, str]:
    data = path.read_bytes()
    try:
        return Manifest.model_validate(json.loads(data)), hashlib.sha256(data).hexdigest()
    except (ValidationError, RecursionError) as error:
        raise ValueError(f"{path} is no manifest of this version") from error


def calibration_scores(folder: Path, manifest: Manifest, product: str) -> list[float]:
    """The scores that the limit was set on, upwards. Raises ValueError or OSError."""
    data = (folder / CALIBRATION).read_bytes()
    if hashlib.sha256(data).hexdigest() != manifest.files.get(CALIBRATION):
        raise ValueError(f"{folder / CALIBRATION} is not what the manifest lists")
    try:
        return [float(value) for value in load(data)[product]]
    except (KeyError, SafetensorError) as error:
        raise ValueError(f"{folder / CALIBRATION} holds nothing for {product}") from error


def histogram(line: list[float], calibration: list[float], limit: float) -> dict[str, Any]:
    """Both in the same bars, as shares of their own number. The last bar holds all that lies beyond it too."""
    typical = float(np.median(calibration))
    low, high = min([*line, *calibration]), limit + 1.5 * (limit - typical)
    edges = np.linspace(low - 0.02 * (high - low), high, _BARS + 1)
    shares = [np.histogram(np.minimum(scores, high), edges)[0] / max(1, len(scores)) for scores in (line, calibration)]
    return {
        "edges": edges.tolist(), "line": shares[0].tolist(), "calibration": shares[1].tolist(), "limit": limit,
        "n": len(line), "nCalibration": len(calibration),
        "median": float(np.median(line)) if line else None, "medianCalibration": typical,
    }  # fmt: skip
