"""The page Review: rejects in groups with small pictures, marks of a group or of one part, and taking them back.

What is marked is what the groups' file held when the page was loaded: a click names the file's time, and is refused
where the groups have been made anew since. The browser names a group or a part; the parts themselves come from that
file and from the ledger.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import anyio
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapters.dashboard.asking import RefusedError, part_key, read_body
from adapters.dashboard.books import GoneError
from adapters.dashboard.gate import Session
from adapters.dashboard.settings import Place
from adapters.review.desk import Asked, Desk, Mark, Reject
from adapters.review.kept import Group, Grouping, Member, groups_file, load_grouping, medians
from adapters.review.marks import Said, send_marks, take_back, wait_until_booked
from adapters.review.pictures import jpeg, thumbnail
from daemon.errors import UsageError
from daemon.line.marking import DEFECT_NAME
from daemon.line.wire import MAX_SEQ
from daemon.types import PartKey

log = logging.getLogger("inspectd.dashboard")

_SHOWN = 12  # of a group
_MOST_GROUPS = 40  # on the page, the largest
_MOST_UNGROUPED = 200
_MOST_DECISIONS = 20
_WORDS = ("open", "good", "defect")

Read = Callable[[Callable[[], Any]], Awaitable[Any]]
Parts = list[tuple[PartKey, int]]


class Reviewing:
    """`read` runs a question on one of the dashboard's threads; `is_heard` tells whether there is a daemon to ask."""

    def __init__(self, place: Place, read: Read, is_heard: Callable[[], bool]) -> None:
        config = place.config
        products = {name: camera.product for name, camera in config.cameras.items()}
        self._config = config
        self._read = read
        self._is_heard = is_heard
        self._desk = Desk(config.ledger.dir, config.recorder.dir if config.recorder else None, products)

    # -- questions ---------------------------------------------------------------------------------

    async def page(self, request: Request, _session: Session) -> Response:
        asked = request.query_params
        word, camera = asked.get("mark") or None, asked.get("camera") or None
        if word is not None and word not in _WORDS:
            raise RefusedError(400, f"found mark {word[:40]!r}, wanted one of {', '.join(_WORDS)}")
        return JSONResponse(await self._read(lambda: self._page(word, camera)))

    async def look(self, request: Request, _session: Session) -> Response:
        """A small picture of a part's worst region."""
        key = PartKey(*part_key(request))

        def draw() -> bytes:
            reject = self._desk.reject(key)
            return jpeg(thumbnail(self._desk.frame(reject), reject))

        data = await self._read(draw)
        return Response(data, media_type="image/jpeg", headers={"cache-control": "private, max-age=86400"})

    def _page(self, word: str | None, camera: str | None) -> dict[str, Any]:
        marks = {key: mark for key, mark in self._desk.marks().items() if mark.word != "none"}
        grouping = self._grouping()
        wants = _Filter(word, camera, marks)
        groups = [group for group in grouping.groups if any(map(wants.member, group.members))] if grouping else []
        known = {member.key for group in (grouping.groups if grouping else []) for member in group.members}
        rest = [
            reject
            for reject in self._desk.newest(Asked(camera=camera, most=_MOST_UNGROUPED))
            if reject.key not in known and wants.has(reject.key)
        ]
        return {
            "madeNs": str(grouping.madeNs) if grouping else None,  # a browser's numbers end before it
            "groups": [_tell_group(group, wants) for group in groups[:_MOST_GROUPS]],
            "moreGroups": max(0, len(groups) - _MOST_GROUPS),
            "ungrouped": [_tell_reject(reject) for reject in rest[:_SHOWN]],
            "ungroupedTotal": len(rest),
            "decisions": [vars(decision) for decision in self._desk.decisions(_MOST_DECISIONS)],
        }

    def _grouping(self) -> Grouping | None:
        if self._config.recorder is None:
            return None
        try:
            return load_grouping(groups_file(self._config))
        except GoneError:
            return None

    # -- changes -----------------------------------------------------------------------------------

    async def mark(self, request: Request, session: Session) -> Response:
        """{mark, name?} of {group, madeNs, camera?}, its open ones, or of the part {camera, epoch, seq}."""
        fields = await read_body(request)
        said = Said(_word(fields.get("mark")), _name(fields.get("name"), fields.get("mark")), session.user)
        parts = await self._read(lambda: self._chosen(fields, said.word))
        if not parts:
            raise UsageError("found nothing to mark: somebody else has marked it meanwhile; load the page again")
        self._demand_daemon()
        log.info("mark user=%s mark=%s name=%s parts=%d", said.user, said.word, said.name, len(parts))

        def order() -> dict[str, Any]:
            decision = send_marks(self._config.control.bind, said, parts)
            return {"ok": True, "decision": decision, "booked": wait_until_booked(self._desk, decision, len(parts))}

        return JSONResponse({**await anyio.to_thread.run_sync(order), "marked": len(parts)})

    async def take_back(self, request: Request, session: Session) -> Response:
        decision = (await read_body(request)).get("decision")
        if not isinstance(decision, str) or not re.fullmatch(r"[0-9a-f]{16}", decision):
            raise RefusedError(400, "wanted a decision's number")
        self._demand_daemon()
        log.info("undo user=%s decision=%s", session.user, decision)
        address = self._config.control.bind
        count = await anyio.to_thread.run_sync(lambda: take_back(address, self._desk, decision, session.user))
        return JSONResponse({"ok": True, "marked": count})

    def _chosen(self, fields: Mapping[str, Any], word: str) -> Parts:
        """The parts with the times of their verdicts. Raises RefusedError, UsageError, GoneError."""
        number, made, camera = fields.get("group"), fields.get("madeNs"), fields.get("camera")
        if number is None:
            epoch, seq = fields.get("epoch"), fields.get("seq")
            if not isinstance(camera, str) or not isinstance(epoch, str) or type(seq) is not int or seq > MAX_SEQ:
                raise RefusedError(400, "wanted a group and madeNs, or camera, epoch and seq")
            reject = self._desk.reject(PartKey(camera, epoch, seq))
            return [(reject.key, reject.decided_ns)]
        if type(number) is not int or not isinstance(made, str) or not isinstance(camera, str | None):
            raise RefusedError(400, "wanted a group's number and madeNs, as the page has them")
        grouping = load_grouping(groups_file(self._config))
        if str(grouping.madeNs) != made:
            raise UsageError("the groups were made anew since this page was loaded; load it again")
        marks = {key: mark for key, mark in self._desk.marks().items() if mark.word != "none"}
        wants = _Filter("open" if word != "none" else None, camera, marks)
        return [(each.key, each.decidedNs) for each in grouping.group(number).members if wants.member(each)]

    def _demand_daemon(self) -> None:
        if not self._is_heard():
            raise RefusedError(503, "no daemon: nothing was changed")


class _Filter:
    """Which parts are shown, or meant: with a mark (`open`: with none) and of a camera, where they are named."""

    def __init__(self, word: str | None, camera: str | None, marks: Mapping[PartKey, Mark]) -> None:
        self._word, self._camera, self.marks = word, camera, marks

    def has(self, key: PartKey) -> bool:
        mark = self.marks.get(key)
        return self._camera in (None, key.camera) and self._word in (None, mark.word if mark else "open")

    def member(self, member: Member) -> bool:
        return self.has(member.key)


def _tell_group(group: Group, wants: _Filter) -> dict[str, Any]:
    members = [member for member in group.members if wants.member(member)]
    words = Counter(_words(wants.marks.get(member.key)) for member in members)
    return {
        "number": group.number, "product": group.product, "look": group.look, "total": len(members),
        "marked": dict(sorted(words.items())), "typical": medians(members),
        "shown": [_tell_member(member, wants.marks.get(member.key)) for member in _spread(members)],
    }  # fmt: skip


def _spread(members: Sequence[Member]) -> list[Member]:
    """Some of a group, from its most typical to its least: whoever decides for all should see the doubtful ones."""
    if len(members) <= _SHOWN:
        return list(members)
    return [members[round(step * (len(members) - 1) / (_SHOWN - 1))] for step in range(_SHOWN)]


def _tell_member(member: Member, mark: Mark | None) -> dict[str, Any]:
    known = member.model_dump(exclude={"decidedNs"})
    return {**known, "decidedNs": member.decidedNs, "mark": _tell_mark(mark)}


def _tell_reject(reject: Reject) -> dict[str, Any]:
    severity, key = reject.severity, reject.key
    return {
        "camera": key.camera, "epoch": key.epoch, "seq": key.seq, "partId": reject.part_id, "score": reject.score,
        "limit": reject.limit, "area": severity.area, "share": severity.share, "peak": severity.peak,
        "place": severity.place, "decidedNs": reject.decided_ns, "mark": _tell_mark(reject.mark),
    }  # fmt: skip


def _tell_mark(mark: Mark | None) -> dict[str, Any] | None:
    return {"word": mark.word, "name": mark.name, "user": mark.user, "ns": mark.ns} if mark else None


def _words(mark: Mark | None) -> str:
    if mark is None:
        return "open"
    return f"{mark.word} {mark.name}" if mark.name else mark.word


def _word(found: Any) -> str:
    if found not in ("good", "defect", "none"):
        raise RefusedError(400, "wanted mark good, defect or none")
    return str(found)


def _name(found: Any, word: Any) -> str | None:
    if found is None or found == "":
        return None
    is_name = isinstance(found, str) and re.fullmatch(DEFECT_NAME, found) and found.lower() != "good"
    if word != "defect" or not is_name:
        raise RefusedError(400, "a defect's name has 1 to 40 letters, digits, _ and -, and is not good")
    return str(found)
