"""Folders of images -> frames, splits, and the size that the network gets to see.

A folder's capture order is the natural order of its names (2 before 10). Folders are not searched
recursively. Pixels are taken as they are stored: alpha is dropped, a JPEG's EXIF orientation is ignored
(cameras on a line deliver pixels, not photographs), and values are not stretched, so a 12-bit image in a
16-bit file stays as dark as it is. Images are decoded once to check them and again when they are needed:
a set is never held in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np

from daemon.errors import DataError, UsageError
from daemon.inspection.decode import decode_file
from daemon.types import Frame
from trainer.progress import warn
from trainer.settings import FEW_IMAGES

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})
_MOST_CORRUPT = 0.1  # of a folder; more is no accident but a wrong or broken folder
_COMMON_ASPECT = math.log(1.25)  # between the 10th and the 90th percentile; beyond it the aspects are mixed
_MARKS = "marks.json"  # in a folder that `inspectd review export` wrote (adapters/review/export.py)
_CELL = 32  # the network's input sides are multiples of it
_MOST_SELECT = 50  # images for the scale of a model from elsewhere: its map may have a value for each pixel


@dataclass(frozen=True)
class Picture:
    """A readable image file: its size, and the SHA-256 of its bytes and of its pixels, however these are packed."""

    path: Path
    hw: tuple[int, int]
    sha256: str
    pixels_sha256: str = ""

    @property
    def shows(self) -> str:
        """The same for two files that show the same."""
        return self.pixels_sha256 or self.sha256


@dataclass(frozen=True)
class Splits:
    """Good images in three, each in capture order: the bank's, the settings', and the limit's alone.

    `train` is empty where nothing is trained: for a model from elsewhere.
    """

    train: tuple[Picture, ...]
    select: tuple[Picture, ...]
    calibrate: tuple[Picture, ...]
    skipped: tuple[str, ...]  # names of the corrupt files
    few: bool = False  # too few to divide: they are the same images, and each is left out once (trainer/few.py)
    added: tuple[Picture, ...] = ()  # good parts that a line rejected: learnt from, and nothing is measured on them

    @property
    def taught(self) -> tuple[Picture, ...]:
        """What the bank and the trainings get to see."""
        return (*self.train, *self.added)

    @property
    def counts(self) -> dict[str, int]:
        found = {"train": len(self.train)} if self.train else {}
        found |= {"select": len(self.select), "calibrate": len(self.calibrate)}
        return {**found, "added": len(self.added)} if self.added else found

    @property
    def leaked(self) -> int:
        """Calibration images that are byte for byte training images: they make the limit too low."""
        if self.few:
            return len(self.calibrate) - len({picture.sha256 for picture in self.calibrate})
        known = {picture.sha256 for picture in self.train}
        return sum(picture.sha256 in known for picture in self.calibrate)

    @property
    def digest(self) -> str:
        """SHA-256 over the splits' names and file hashes: the same data, split the same way."""
        parts = (
            ("train", self.train), ("select", self.select), ("calibrate", self.calibrate), ("added", self.added),
        )  # fmt: skip
        lines = [f"{split} {picture.path.name} {picture.sha256}\n" for split, part in parts for picture in part]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_frame(path: Path) -> Frame:
    """The image as (H W 1) gray or (H W 3) RGB, 8 or 16 bit. Raises DataError, which names the file."""
    return decode_file(_read(path), str(path))


def list_images(folder: Path) -> list[Path]:
    """The folder's image files in capture order. Raises DataError if there is none."""
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise DataError(f"{folder}: found {found}, wanted a folder of images; is the path right, seen from here?")
    entries = sorted(folder.iterdir(), key=lambda path: natural_key(path.name))
    images = [path for path in entries if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not images:
        folders = sum(path.is_dir() for path in entries)
        raise DataError(
            f"{folder}: found {folders} folders and {len(entries) - folders} other files, wanted images "
            f"({', '.join(sorted(SUFFIXES))}) in the folder itself; name the folder that holds the good ones"
        )
    return images


def natural_key(name: str) -> tuple[list[tuple[str, int]], str]:
    """Sorts part2 before part10; the name itself decides between part1 and part01."""
    pieces = re.split(r"([0-9]+)", name.lower())
    numbers = [int(piece) for piece in pieces[1::2]]
    return list(zip(pieces[::2], [*numbers, -1], strict=True)), name


def scan(folder: Path, threads: int) -> tuple[list[Picture], list[str]]:
    """Check every image of a folder: the readable ones in capture order, and the names of the others.

    Each corrupt file is warned about; more than one in ten is a DataError.
    """
    images = list_images(folder)
    with ThreadPoolExecutor(threads) as pool:
        checked = list(pool.map(_check, images))
    faults = [found for found in checked if isinstance(found, DataError)]
    for fault in faults:
        warn(f"skipped {fault}")
    if len(faults) > _MOST_CORRUPT * len(images):
        raise DataError(
            f"{folder}: found {len(faults)} corrupt files of {len(images)}, wanted at most one in ten; the first: "
            f"{faults[0]}"
        )
    skipped = [path.name for path, found in zip(images, checked, strict=True) if isinstance(found, DataError)]
    return [found for found in checked if isinstance(found, Picture)], skipped


def split(good: Path, select: Path | None, calibration: Path | None, threads: int) -> Splits:
    """Divide the good images by capture order; a folder given for a split replaces it.

    The last third calibrates, the fifteenth before it selects, the rest trains (300: 180, 20, 100); fewer than
    30 are not divided. Raises DataError if a split would be empty.
    """
    pictures, skipped = scan(good, threads)
    if select is None and calibration is None and 1 <= len(pictures) < FEW_IMAGES:
        whole = tuple(pictures)
        return Splits(train=whole, select=whole, calibrate=whole, skipped=tuple(skipped), few=True)
    chosen: dict[str, list[Picture]] = {}
    for name, folder in (("select", select), ("calibrate", calibration)):
        if folder is not None:
            chosen[name], faults = scan(folder, threads)
            skipped += faults
    count = len(pictures)
    calibrate_n = 0 if calibration else max(1, count // 3)
    select_n = 0 if select else max(1, round(count / 15))
    train_n = count - calibrate_n - select_n
    if train_n < 1:
        wanted = 1 + (calibrate_n > 0) + (select_n > 0)
        raise DataError(f"{good}: found {count} readable images, wanted at least {wanted}, and better 100 or more")
    return Splits(
        train=tuple(pictures[:train_n]),
        select=tuple(chosen.get("select", pictures[train_n : train_n + select_n])),
        calibrate=tuple(chosen.get("calibrate", pictures[train_n + select_n :])),
        skipped=tuple(skipped),
    )


def split_untrained(good: Path, calibration: Path | None, threads: int) -> Splits:
    """For a model that is trained already: the first fifth selects (at most 50), the others calibrate.

    Fewer than 30 are not divided: nothing was made of them, so that each may do both. With a folder for the
    calibration `good` selects alone. Raises DataError where fewer than two calibrate.
    """
    pictures, skipped = scan(good, threads)
    few = calibration is None and len(pictures) < FEW_IMAGES
    if calibration is not None:
        select = pictures[:: -(-len(pictures) // _MOST_SELECT)]
        pictures, faults = scan(calibration, threads)
        skipped += faults
    else:
        select = pictures if few else pictures[: min(_MOST_SELECT, round(len(pictures) / 5))]
        pictures = pictures if few else pictures[len(select) :]
    if len(pictures) < 2:
        raise DataError(
            f"{calibration or good}: found {len(pictures)} good image for the limit, wanted at least 2, and better 100 "
            "or more that the model was not trained on"
        )
    return Splits((), tuple(select), tuple(pictures), tuple(skipped), few=few)


def add(splits: Splits, folders: Sequence[Path], product: str, threads: int) -> Splits:
    """The same splits with images to learn from besides: folders of images, or what `inspectd review export` wrote.

    They were picked by having been rejected, so they are no sample of good parts: they join neither the choice of
    settings, nor the scale, nor the calibration. Raises DataError, and UsageError for another product's marks.
    """
    measured = {picture.shows for picture in (*splits.select, *splits.calibrate)}
    added: dict[str, Picture] = {}
    skipped = list(splits.skipped)
    for path in folders:
        folder, named = _added_folder(path, product)
        pictures, faults = scan(folder, threads)
        skipped += faults
        # A frame of the line comes raw and is kept as PNG: the same picture has other bytes.
        added |= {picture.shows: picture for picture in pictures if named is None or picture.path.name in named}
    copies = sum(digest in measured for digest in added)
    if copies:
        warn(f"{copies} of the images to add are copies of images that the limit or the scale rests on: left out")
    known = measured | {picture.shows for picture in splits.train}
    kept = tuple(picture for digest, picture in added.items() if digest not in known)
    return replace(splits, added=kept, skipped=tuple(skipped))


def _added_folder(path: Path, product: str) -> tuple[Path, frozenset[str] | None]:
    """The good images of an export, by its folder or its marks.json, and their names there; else the folder itself."""
    folder = path.parent if path.name == _MARKS else path
    if not (folder / _MARKS).is_file():
        return path, None
    try:
        told = json.loads((folder / _MARKS).read_text(encoding="utf-8"))
        found, files = told["product"], [Path(name) for name in told["files"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{folder / _MARKS}: is not what `inspectd review export` writes: {error!r}") from error
    if found != product:
        raise UsageError(f"{folder}: holds the marks of {found}, wanted those of {product} (--add)")
    good = folder / "train/good"
    if not good.is_dir():
        raise DataError(f"{folder}: has no train/good: no rejected part was marked good, or all of them are kept back")
    return good, frozenset(name.name for name in files if name.parent == Path("train/good"))


def network_size(pictures: Sequence[Picture], long_side: int) -> tuple[int, int]:
    """(h w) of the network's input: `long_side` (a multiple of 32), and the other as the median aspect asks.

    The short side is the multiple of 32, at least one, whose aspect is nearest in ratio. Where the aspects of
    the images have little in common there is no aspect to keep, and the input is square.
    """
    aspects = sorted(math.log(height / width) for height, width in (picture.hw for picture in pictures))
    tenth = max(len(aspects) // 10, 1 if len(aspects) > 2 else 0)
    if aspects[-1 - tenth] - aspects[tenth] > _COMMON_ASPECT:
        return long_side, long_side
    aspect = math.exp(median(aspects))
    ideal = long_side * min(aspect, 1 / aspect)
    below = max(_CELL, int(ideal // _CELL) * _CELL)
    short_side = min((below, below + _CELL), key=lambda side: abs(math.log(side / ideal)))
    short_side = min(short_side, long_side)
    return (long_side, short_side) if aspect > 1 else (short_side, long_side)


def _check(path: Path) -> Picture | DataError:
    try:
        data = _read(path)
        pixels = decode_file(data, str(path)).pixels
    except DataError as error:
        return error
    shows = hashlib.sha256(f"{pixels.shape} {pixels.dtype}".encode() + np.ascontiguousarray(pixels).tobytes())
    return Picture(path, (pixels.shape[0], pixels.shape[1]), hashlib.sha256(data).hexdigest(), shows.hexdigest())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
