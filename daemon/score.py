"""Score image files with an engine, offline, by the very pipeline that runs on the line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from daemon.bundle import open_bundle
from daemon.errors import DataError
from daemon.inspection.backend import open_backend
from daemon.inspection.decode import decode_file
from daemon.inspection.golden import check_golden
from daemon.inspection.pipeline import Pipeline, map_at_frame_size
from daemon.keys import load_trusted
from daemon.types import Frame, Header

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})


def open_pipeline(bundle: Path, trusted: Path, precision: str = "f32", threads: int = 2) -> Pipeline:
    """Verify the bundle, open it on the CPU and replay its golden frames. Raises BundleError, DeviceError."""
    verified = open_bundle(bundle, load_trusted(trusted))
    pipeline = Pipeline(verified, open_backend(verified, "cpu", precision, threads))
    check_golden(pipeline)
    return pipeline


def read_image(path: Path) -> Frame:
    """An image file as `decode_file` gives it. Raises DataError, which names the file."""
    try:
        return decode_file(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def list_images(paths: list[Path]) -> list[Path]:
    """The files named, and the images inside the folders named, by name. Raises DataError."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise DataError(f"{path}: no image is in this folder; wanted {', '.join(sorted(IMAGE_SUFFIXES))}")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise DataError(
                f"{path}: is not there, wanted an image or a folder of images; is the path right, seen from here?"
            )
    return found


def score_paths(pipeline: Pipeline, paths: list[Path], product: str | None, maps: Path | None) -> Iterator[Header]:
    """One result an image: path (as given), outcome, score, limit, pValue. Raises DataError, BundleError."""
    name = pipeline.bundle.product(product)
    for path in list_images(paths):
        anomaly = pipeline.anomaly_map(read_image(path))
        verdict = pipeline.judge(anomaly, name)
        if maps is not None:
            target = maps / path.resolve().parent.name / f"{path.stem}.npy"
            target.parent.mkdir(parents=True, exist_ok=True)
            np.save(target, map_at_frame_size(anomaly))
        yield {
            "path": str(path),
            "outcome": verdict.outcome.value,
            "score": verdict.score,
            "limit": verdict.limit,
            "pValue": verdict.p_value,
        }
