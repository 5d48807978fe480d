"""The file that keeps the groups: what a person saw is what a decision marks.

Groups are made by `inspectd review groups` (groups.py) and kept beside the recorder's days, where the dashboard reads
them: its process has neither the time nor the right to run an engine. New rejects wait for the next call.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapters.dashboard.books import GoneError, read_plain
from daemon.config import Config
from daemon.errors import ConfigError, DataError, UsageError
from daemon.types import PartKey

FILE = "groups.json"
_MOST_BYTES = 16 << 20


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Member(_Strict):
    """A reject as it was when the groups were made; its marks are asked of the ledger."""

    camera: str
    epoch: str
    seq: int
    decidedNs: int
    partId: str | None
    score: float
    limit: float
    area: int
    share: float | None
    peak: float
    place: str

    @property
    def key(self) -> PartKey:
        return PartKey(self.camera, self.epoch, self.seq)


class Group(_Strict):
    """Rejects of one product that look alike, the most typical first."""

    number: Annotated[int, Field(ge=1)]
    product: str
    look: str
    members: Annotated[list[Member], Field(min_length=1)]


class Grouping(_Strict):
    version: Annotated[int, Field(ge=1, le=1)] = 1
    madeNs: int
    groups: list[Group]

    def group(self, number: int) -> Group:
        """Raises UsageError."""
        for group in self.groups:
            if group.number == number:
                return group
        raise UsageError(f"found no group {number}, wanted 1 to {len(self.groups)}; inspectd review groups")


def groups_file(config: Config) -> Path:
    """Beside the recorder's days. Raises ConfigError where nothing is recorded."""
    if config.recorder is None:
        raise ConfigError("recorder", ["is null: no rejected frame is kept, and there is nothing to review"])
    return config.recorder.dir / FILE


def save_grouping(path: Path, grouping: Grouping) -> None:
    """In one step, so that no reader finds half of it. Raises OSError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(grouping.model_dump_json(), encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_grouping(path: Path) -> Grouping:
    """Raises GoneError where there is none, DataError where it cannot be read."""
    if not path.exists():
        raise GoneError(f"{path}: no groups were made yet; inspectd review groups")
    data = read_plain(path, _MOST_BYTES)
    if data is None:
        raise DataError(f"{path}: is no plain file of at most {_MOST_BYTES} bytes that may be read here")
    try:
        return Grouping.model_validate_json(data)
    except ValidationError as error:
        raise DataError(f"{path}: is no grouping of this version; inspectd review groups makes it anew") from error


def medians(members: Sequence[Member]) -> dict[str, Any]:
    """What is typical of a group: area in pixels, share of the frame, peak by the limit, and the place most named."""
    shares = [member.share for member in members if member.share is not None]
    places = [member.place for member in members]
    return {
        "area": int(np.median([member.area for member in members])),
        "share": float(np.median(shares)) if shares else None,
        "peak": float(np.median([member.peak for member in members])),
        "place": max(sorted(set(places)), key=places.count),
    }
