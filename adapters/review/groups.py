"""Rejects grouped by look, so that a hundred alike are one decision. The clustering is scikit-learn's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from adapters.dashboard.books import read_plain
from adapters.review.desk import Desk, Reject
from adapters.review.kept import Group, Grouping, Member
from adapters.review.look import EngineLook, Look, PlainLook
from daemon.bundle import current_bundle, open_bundle
from daemon.config import Config
from daemon.errors import DataError, InspectError, UsageError
from daemon.inspection.decode import decode_file
from daemon.keys import load_trusted
from daemon.types import ByteArray, FloatArray

_MOST_MASK_BYTES = 64 << 20

Tell = Callable[[str], None]


def make_grouping(config: Config, desk: Desk, rejects: Sequence[Reject], tell: Tell) -> Grouping:
    """Look at every reject, product by product; the largest group is number 1. `tell` hears what was left out."""
    found: list[tuple[str, str, list[Reject]]] = []
    for product in sorted({reject.product for reject in rejects}):
        with _open_look(config, product, tell) as look:
            described = list(_described(desk, [each for each in rejects if each.product == product], look, tell))
        if described:
            vectors = np.stack([vector for _, vector in described])
            groups = cluster(vectors, look.scale)
            found += [(product, look.name, [described[row][0] for row in rows]) for rows in groups]
    found.sort(key=lambda group: (-len(group[2]), group[0], -group[2][0].decided_ns))
    numbered = [
        Group(number=number, product=product, look=name, members=[_member(reject) for reject in members])
        for number, (product, name, members) in enumerate(found, start=1)
    ]
    return Grouping(madeNs=time.time_ns(), groups=numbered)


def cluster(vectors: FloatArray, scale: float) -> list[list[int]]:
    """Rows (n C) that look alike, each row once; within a group the most typical first.

    Ward's linkage up to a height that grows with the fourth root of n. Heights of one look grow with the square root of
    its rows, and a fixed height would tear many alike apart; a height that grew as fast would hide a few rare defects
    among many. So many alike are a handful of groups, and what is rare stays by itself.
    """
    if len(vectors) == 1:
        return [[0]]
    try:
        from sklearn.cluster import AgglomerativeClustering
    except ImportError as error:
        raise UsageError(f"review groups: {error}; it needs an extra: pip install 'inspectd[review]'") from error
    clustering = AgglomerativeClustering(
        n_clusters=None, distance_threshold=scale * len(vectors) ** 0.25, linkage="ward"
    )
    labels = clustering.fit_predict(vectors)
    groups = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        away = np.linalg.norm(vectors[rows] - vectors[rows].mean(0), axis=1)
        groups.append([int(row) for row in rows[np.argsort(away, kind="stable")]])
    return groups


def _described(desk: Desk, rejects: Sequence[Reject], look: Look, tell: Tell) -> Iterator[tuple[Reject, FloatArray]]:
    for reject in rejects:
        try:
            yield reject, look.describe(desk.frame(reject), reject.regions, _mask(desk, reject))
        except InspectError as error:  # one boundary: a frame that has gone or is broken leaves the others alone
            tell(f"left out {reject.address}: {error}")


def _mask(desk: Desk, reject: Reject) -> ByteArray | None:
    path = desk.file(reject, "mask")
    data = read_plain(path, _MOST_MASK_BYTES) if path else None
    return None if data is None else np.asarray(decode_file(data, str(path)).pixels[:, :, 0], np.uint8)


@contextmanager
def _open_look(config: Config, product: str, tell: Tell) -> Iterator[Look]:
    """The engine at work for the product; its network looks better than we do by ourselves."""
    try:
        folder = current_bundle(config.engines.dir, config.engine_names().get(product, product))
        bundle = open_bundle(folder, load_trusted(config.security.keys / "trusted.yaml"))
        if "ldknn" not in bundle.manifest.branches:
            raise DataError(f"{bundle.folder}: its engine has no memory bank")
        look = EngineLook(bundle)
    except (InspectError, OSError) as error:
        tell(f"{product}: grouped without its engine, by shape and contrast alone: {error}")
        yield PlainLook()
        return
    try:
        yield look
    finally:
        look.close()


def _member(reject: Reject) -> Member:
    key, severity = reject.key, reject.severity
    return Member(
        camera=key.camera, epoch=key.epoch, seq=key.seq, decidedNs=reject.decided_ns, partId=reject.part_id,
        score=reject.score, limit=reject.limit, area=severity.area, share=severity.share, peak=severity.peak,
        place=severity.place,
    )  # fmt: skip
