"""Marked rejects as folders: what the next build learns from, and what it is tested on.

DIR/train/good   good parts that were rejected: build_engines.py --add DIR puts them into the memory bank
DIR/test/good    one in five of them, kept back: how many of such parts the new engine still rejects
DIR/test/NAME    defects: what the new engine must still find (build_engines.py --test DIR, inspectd evaluate)
DIR/marks.json   who said what of each file, and when

Which of the five is kept back follows from the part's own name, so that a part never moves from the test to the
training with a later export. An earlier export is brought up to date, and keeps frames that the recorder has given up.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from adapters.dashboard.books import GoneError
from adapters.review.desk import Desk, Reject, Standing
from daemon.errors import DataError
from daemon.line.marking import DEFECT_NAME
from daemon.record.recorder import recorded_as
from daemon.types import PartKey

MARKS = "marks.json"
UNNAMED = "defect"
_KEPT_BACK = 5  # one in so many
_OURS = re.compile(rf"(train/good|test/{DEFECT_NAME})/[A-Za-z0-9_.-]+\.(png|jpg)")
_PART = ("camera", "epoch", "seq", "decidedNs", "partId", "score", "limit")

Entry = dict[str, Any]  # of marks.json: the part, and what was said of it


@dataclass(frozen=True)
class Exported:
    """How many files lie in each folder now; `gone` are marked parts whose frame nobody has any more.

    `foreign` are files of an earlier export that this ledger knows nothing of; they stay as they are.
    """

    files: dict[str, int]
    gone: int
    foreign: int


def export(desk: Desk, product: str, folder: Path) -> Exported:
    """Write or update the folder. Raises DataError where it is another product's, or not one of ours.

    Interrupted anywhere, it is brought up to date by the next one: the new list of files is there before any of the
    old ones is moved or removed, and a file that was moved already is found by its name, which is its part's.
    """
    held = _read_held(folder, product)
    if not (folder / MARKS).exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write_marks(folder, product, {})
    kept, moved, gone = _collect(desk, product, folder, held)
    known = desk.marks()
    # Another line's, or of before this ledger: nobody took that back.
    foreign = {name: entry for key, (name, entry) in held.items() if key not in known}
    kept |= foreign
    _write_marks(folder, product, kept)
    for name, target in moved.items():
        if name != target:
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).rename(folder / target)
    for key, (name, _) in held.items():
        if key in known and name not in moved:
            (folder / name).unlink(missing_ok=True)  # the mark was taken back
    _drop_empty(folder)
    return Exported(dict(sorted(Counter(str(Path(name).parent) for name in kept).items())), gone, len(foreign))


def _collect(
    desk: Desk, product: str, folder: Path, held: dict[PartKey, tuple[str, Entry]]
) -> tuple[dict[str, Entry], dict[str, str], int]:
    """(what marks.json will say, held files and where they belong now, how many frames are gone); brings new frames."""
    kept: dict[str, Entry] = {}
    moved: dict[str, str] = {}
    gone = 0
    for standing in desk.standing():
        reject, (name, entry) = standing.reject, held.get(standing.key, ("", None))
        if entry is not None:
            target, part = f"{place_of(standing)}/{Path(name).name}", {field: entry[field] for field in _PART}
            moved[name] = target
        elif reject is not None and reject.product == product:
            try:
                target, part = _bring(desk, standing, reject, folder), _part(reject)
            except (GoneError, DataError):  # the recorder gave it up meanwhile
                gone += 1
                continue
        else:
            gone += reject is None and desk.product_of(standing.key.camera) == product
            continue
        mark = standing.mark
        kept[target] = {**part, "mark": mark.word, "name": mark.name, "user": mark.user, "markedNs": mark.ns}
    return kept, moved, gone


def _write_marks(folder: Path, product: str, files: dict[str, Entry]) -> None:
    """Whole or not at all."""
    told = {"version": 1, "product": product, "madeNs": time.time_ns(), "files": dict(sorted(files.items()))}
    partial = folder / f"{MARKS}.partial"
    partial.write_text(json.dumps(told, indent=1), encoding="utf-8")
    partial.replace(folder / MARKS)


def place_of(standing: Standing) -> str:
    """The folder of a marked part, below DIR."""
    if standing.mark.word == "good":
        return "test/good" if is_kept_back(standing.key) else "train/good"
    return f"test/{standing.mark.name or UNNAMED}"


def is_kept_back(key: PartKey) -> bool:
    """Whether a good part is for the test."""
    name = f"{key.camera} {key.epoch} {key.seq}".encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:4], "big") % _KEPT_BACK == 0


def _bring(desk: Desk, standing: Standing, reject: Reject, folder: Path) -> str:
    """Copy the frame as it was recorded; only a mosaic becomes the colours that the engine saw."""
    path, data = desk.frame_bytes(reject)
    suffix = path.suffix
    if desk.is_mosaic(reject):
        suffix = ".png"
        data = cv2.imencode(".png", np.ascontiguousarray(desk.frame(reject).pixels[:, :, ::-1]))[1].tobytes()
    key = reject.key
    stem = recorded_as(key.camera, key.epoch, key.seq, reject.decided_ns).name
    target = f"{place_of(standing)}/{stem}{suffix}"
    (folder / target).parent.mkdir(parents=True, exist_ok=True)
    (folder / target).write_bytes(data)
    return target


def _part(reject: Reject) -> Entry:
    key = reject.key
    values = (key.camera, key.epoch, key.seq, reject.decided_ns, reject.part_id, reject.score, reject.limit)
    return dict(zip(_PART, values, strict=True))


def _read_held(folder: Path, product: str) -> dict[PartKey, tuple[str, Entry]]:
    """What an earlier export left there and is still there. Raises DataError."""
    path = folder / MARKS
    if not path.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DataError(f"{folder}: is there and is no earlier export (it has no {MARKS}); name another folder")
        return {}
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        files: dict[str, Entry] = told["files"]
        found = {_key(entry): (name, entry) for name, entry in files.items()}
        incomplete = [name for name, entry in files.items() if not {*_PART} <= {*entry}]
        theirs = told["product"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read ({error!r}); name another folder") from error
    if theirs != product:
        raise DataError(f"{folder}: holds the marks of {theirs}, wanted those of {product}; name another folder")
    strange = [name for name in files if not _OURS.fullmatch(name)] + incomplete
    if strange:
        raise DataError(f"{path}: names {strange[0]!r}, which no export writes; name another folder")
    there = {path.name: str(path.relative_to(folder)) for path in folder.glob("t*/*/*") if path.is_file()}
    return {key: (there[Path(name).name], entry) for key, (name, entry) in found.items() if Path(name).name in there}


def _key(entry: Entry) -> PartKey:
    return PartKey(entry["camera"], entry["epoch"], entry["seq"])


def _drop_empty(folder: Path) -> None:
    """An empty folder is no kind of part: `inspectd evaluate` would stumble over it."""
    for place in [*sorted(folder.glob("t*/*")), folder / "train", folder / "test"]:
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()
