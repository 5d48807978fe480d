"""Which waiting frames give way to one of another camera where the byte budget is full. Knows no engine, no clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from daemon.types import PartKey

NewestFirst = Callable[[str], Iterator[tuple[PartKey, int]]]


def to_give_up(
    used_bytes: Counter[str], budget_bytes: int, camera: str, wanted_bytes: int, newest_waiting: NewestFirst
) -> list[PartKey]:
    """The newest frames of whoever holds most, frame by frame, as long as that is more than `camera` would hold.

    None where they would not make room enough: a frame that has no room must not cost others theirs.
    """
    chosen: list[PartKey] = []
    held_bytes = used_bytes.copy()
    newest: dict[str, Iterator[tuple[PartKey, int]]] = {}
    while held_bytes and held_bytes.total() + wanted_bytes > budget_bytes:
        greediest, most_bytes = held_bytes.most_common(1)[0]
        if most_bytes <= used_bytes[camera] + wanted_bytes:
            return []
        if greediest not in newest:
            newest[greediest] = newest_waiting(greediest)
        given = next(newest[greediest], None)
        if given is None:
            return []
        chosen.append(given[0])
        held_bytes[greediest] -= given[1]
    return chosen
