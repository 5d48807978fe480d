"""The arrays of a bundle, checked as they are read."""

from __future__ import annotations

from typing import Any

import numpy as np
from safetensors.numpy import load as load_tensors

from daemon.bundle import BANK, CALIBRATION, NETWORKS, QUALITY, Bundle
from daemon.errors import BundleError
from daemon.inspection.quality import STATISTICS, THUMBNAIL
from daemon.types import FloatArray


def load_bank(bundle: Bundle) -> dict[str, FloatArray]:
    """core (M C), bias (M,) = -|m|^2 / 2, density (M,), checked against each other. Raises BundleError."""
    path = bundle.folder / BANK
    tensors = _read(bundle, BANK)
    missing = {"core", "bias", "density"} - set(tensors)
    if missing:
        raise BundleError(f"{path}: has no tensor {', '.join(sorted(missing))}")
    rows = len(tensors["core"])
    shapes = {name: tensors[name].shape for name in ("core", "bias", "density")}
    if tensors["core"].ndim != 2 or shapes["bias"] != (rows,) or shapes["density"] != (rows,) or rows == 0:
        raise BundleError(f"{path}: found shapes {shapes}, wanted core (M, C), bias (M,), density (M,)")
    return {name: np.ascontiguousarray(tensors[name], np.float32) for name in shapes}


def check_outputs(bundle: Bundle, found: list[tuple[int, ...]]) -> None:
    """The output shapes: `map` (P) alone, or `features` (P C) and, with that branch, `repair` (P). BundleError."""
    patches = bundle.manifest.grid[0] * bundle.manifest.grid[1]
    if "map" in bundle.manifest.branches:
        if found != [(patches,)]:
            raise BundleError(f"{bundle.folder / NETWORKS}: found outputs {found}, wanted ({patches},)")
        return
    wanted: list[tuple[int, ...]] = [(patches,)] if "repair" in bundle.manifest.branches else []
    if not found or len(found[0]) != 2 or found[0][0] != patches or found[1:] != wanted:
        others = "".join(f" and {shape}" for shape in wanted)
        raise BundleError(f"{bundle.folder / NETWORKS}: found outputs {found}, wanted ({patches}, C){others}")


def load_calibration(bundle: Bundle) -> dict[str, list[float]]:
    """The sorted calibration scores of each product. Raises BundleError."""
    tensors = _read(bundle, CALIBRATION)
    scores = {}
    for product in bundle.manifest.products:
        if product not in tensors or tensors[product].ndim != 1 or not len(tensors[product]):
            raise BundleError(f"{bundle.folder / CALIBRATION}: has no scores for product {product!r}")
        scores[product] = sorted(float(score) for score in tensors[product])
    return scores


def load_quality(bundle: Bundle) -> dict[str, dict[str, FloatArray]]:
    """By product the figures (n,) of its calibration images, and their mean picture `thumbnail` (64 64).

    Empty for a bundle of before these figures were kept. Raises BundleError.
    """
    if QUALITY not in bundle.manifest.files:
        return {}
    found: dict[str, dict[str, FloatArray]] = {product: {} for product in bundle.manifest.products}
    wanted: dict[str, tuple[int, ...] | None] = {"thumbnail": (THUMBNAIL, THUMBNAIL), **dict.fromkeys(STATISTICS)}
    for key, values in _read(bundle, QUALITY).items():
        product, _, figure = key.rpartition("/")
        if product not in found or figure not in wanted:
            raise BundleError(f"{bundle.folder / QUALITY}: found tensor {key!r}, wanted PRODUCT/FIGURE of this bundle")
        shape = wanted[figure] or (max(1, values.size),)
        if values.shape != shape or not np.isfinite(values).all():
            raise BundleError(f"{bundle.folder / QUALITY}: {key}: found shape {values.shape}, wanted {shape}, finite")
        found[product][figure] = np.ascontiguousarray(values, np.float32)
    for product, figures in found.items():
        if "thumbnail" not in figures:
            raise BundleError(f"{bundle.folder / QUALITY}: has no {product}/thumbnail")
    return found


def _read(bundle: Bundle, name: str) -> dict[str, Any]:
    data = bundle.read(name)
    try:
        tensors: dict[str, Any] = load_tensors(data)
    except Exception as error:  # safetensors raises its own type, which it does not export
        raise BundleError(f"{bundle.folder / name}: is not a safetensors file: {error}") from error
    return tensors
