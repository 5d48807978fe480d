"""`inspectd review`: look at rejects in groups, say which are good or defects, hand both to the next build."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
import cv2

from adapters.dashboard.books import GoneError
from adapters.review.desk import Asked, Desk, Mark, Reject
from adapters.review.export import export
from adapters.review.kept import Group, Grouping, groups_file, load_grouping, medians, save_grouping
from adapters.review.marks import Said, send_marks, take_back, wait_until_booked
from adapters.review.pictures import sheet, thumbnail
from daemon.config import Config, load_config
from daemon.errors import UsageError
from daemon.line.control import account
from daemon.line.marking import DEFECT_NAME
from daemon.line.wire import MAX_SEQ
from daemon.types import PartKey

_DAY_NS = 86_400 * 10**9
_IN_A_ROW = 8  # pictures of a group on the sheet

CONFIG = click.option(
    "--config", "config_path", type=click.Path(path_type=Path), default=Path("config.yaml"), show_default=True,
    help="The daemon's configuration.",
)  # fmt: skip
GROUPS = click.option(
    "--groups", "groups_path", type=click.Path(path_type=Path), help="Keep the groups here.  [beside the rejects]"
)
USER = click.option("--user", help="Who says so, for the books.  [the account, before sudo]")


@dataclass(frozen=True)
class _Place:
    """A configuration and what follows from it."""

    config: Config
    desk: Desk
    groups: Path


def _open(config_path: Path, groups_path: Path | None = None) -> _Place:
    config = load_config(config_path)
    return _Place(config, open_desk(config), groups_path or groups_file(config))


def open_desk(config: Config) -> Desk:
    """Raises ConfigError where nothing is recorded."""
    groups_file(config)
    products = {name: camera.product for name, camera in config.cameras.items()}
    return Desk(config.ledger.dir, config.recorder.dir if config.recorder else None, products)


@click.group("review")
def command() -> None:
    """Rejects under a person's eyes: group them by look, mark them, hand them to the next build."""


@command.command()
@CONFIG
@GROUPS
@click.option("--product", help="Of this product alone.")
@click.option("--camera", help="Of this camera alone.")
@click.option("--days", type=click.FloatRange(0, min_open=True), default=30.0, show_default=True, help="Not older.")
@click.option("--most", type=click.IntRange(1, 5000), default=1000, show_default=True, help="Newest rejects to take.")
@click.option(
    "--sheet", "sheet_path", type=click.Path(path_type=Path), help="Also draw them, a row for a group: a PNG."
)
def groups(  # noqa: PLR0917 - click hands every option over
    config_path: Path,
    groups_path: Path | None,
    product: str | None,
    camera: str | None,
    days: float,
    most: int,
    sheet_path: Path | None,
) -> None:
    """Group the newest rejects by look and number the groups, the largest first."""
    place = _open(config_path, groups_path)
    since_ns = time.time_ns() - int(days * _DAY_NS)
    rejects = place.desk.newest(Asked(product, camera, since_ns, most))
    if not rejects:
        print(f"no DEFECT of the last {days:g} days has its frame in {groups_file(place.config).parent}")
        return
    from adapters.review.groups import make_grouping  # OpenVINO, which only this command needs

    grouping = make_grouping(place.config, place.desk, rejects, _tell)
    save_grouping(place.groups, grouping)
    _print_groups(grouping, place.desk.marks())
    if sheet_path is not None:
        _draw(sheet_path, grouping, place.desk, rejects)


@command.command("list")
@CONFIG
@GROUPS
@click.option("--group", "number", type=click.IntRange(1), help="Of this group alone.")
@click.option("--mark", "word", type=click.Choice(["good", "defect", "open"]), help="With this mark, or none yet.")
@click.option("--camera", help="Of this camera alone.")
@click.option("--last", type=click.IntRange(1), default=50, show_default=True, help="So many of them.")
@click.option("--decisions", is_flag=True, help="Who marked what and when, instead.")
def list_rejects(  # noqa: PLR0917 - click hands every option over
    config_path: Path,
    groups_path: Path | None,
    number: int | None,
    word: str | None,
    camera: str | None,
    last: int,
    decisions: bool,  # noqa: FBT001 - click hands flags over as they come
) -> None:
    """Rejects, newest first: score and limit, severity (area, peak, place), what was said of them and by whom."""
    place = _open(config_path, groups_path)
    if decisions:
        for each in place.desk.decisions(last):
            stands = "" if each.standing == each.parts else f", {each.standing} still stand"
            what = f"{_said(each.word, each.name)}, {each.parts} parts{stands}"
            print(f"{each.decision}  {_when(each.ns)}  {each.user}: {what}")
        return
    inside = None if number is None else {member.key for member in load_grouping(place.groups).group(number).members}
    shown = [
        reject
        for reject in place.desk.newest(Asked(camera=camera, most=5000))
        if (inside is None or reject.key in inside) and word in (None, reject.mark.word if reject.mark else "open")
    ]
    for reject in shown[:last]:
        print(_line(reject))
    if len(shown) > last:
        print(f"and {len(shown) - last} more (--last)")


@command.command()
@CONFIG
@GROUPS
@click.argument("word", type=click.Choice(["good", "defect", "none"]))
@click.option("--group", "number", type=click.IntRange(1), help="All of this group that nobody has marked yet.")
@click.option("--part", "parts", multiple=True, help="CAMERA/EPOCH/SEQ, as `list` shows it; marked already or not.")
@click.option("--name", help="What the defect is called: letters, digits, _ and -.")
@USER
def mark(  # noqa: PLR0917 - click hands every option over
    config_path: Path,
    groups_path: Path | None,
    word: str,
    number: int | None,
    parts: tuple[str, ...],
    name: str | None,
    user: str | None,
) -> None:
    """Say that rejects are good parts or defects (or take it back: none). The daemon writes it into its books."""
    if (number is None) == (not parts):
        raise UsageError("found neither or both of --group and --part, wanted one of them")
    place = _open(config_path, groups_path)
    said = Said(word, _checked(name, word), _user(user))
    if number is not None:
        members = load_grouping(place.groups).group(number).members
        chosen = open_members(members, place.desk.marks(), word)
        left = len(members) - len(chosen)
        if not chosen:
            raise UsageError(f"found nothing to mark in group {number}, all {left} are (--part for a single one)")
    else:
        chosen = [(reject.key, reject.decided_ns) for reject in map(place.desk.reject, map(_parse_part, parts))]
        left = 0
    decision = send_marks(place.config.control.bind, said, chosen)
    is_booked = wait_until_booked(place.desk, decision, len(chosen))
    behind = "" if is_booked else " (in the journal; the ledger is behind)"
    stay = f"; {left} were marked before and stay as they were" if left else ""
    print(f"{len(chosen)} parts: {_said(said.word, said.name)}, by {said.user}{stay}{behind}")
    print(f"to take it back: inspectd review undo {decision}")


def open_members(members: Sequence[Any], marks: dict[PartKey, Mark], word: str) -> list[tuple[PartKey, int]]:
    """Of a group those whose mark is still open; for `none` those that have one."""
    has_mark = {key for key, mark in marks.items() if mark.word != "none"}
    return [(each.key, each.decidedNs) for each in members if (each.key in has_mark) == (word == "none")]


@command.command()
@CONFIG
@click.argument("decision")
@USER
def undo(config_path: Path, decision: str, user: str | None) -> None:
    """Take back DECISION (see list --decisions) where it still is the last word: those parts are open again."""
    place = _open(config_path)
    count = take_back(place.config.control.bind, place.desk, decision, _user(user))
    print(f"{count} parts are open again")


@command.command("export")
@CONFIG
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--product", help="Whose; needed where the line has several.")
def export_marks(config_path: Path, folder: Path, product: str | None) -> None:
    """Write the marked frames into DIR for build_engines.py --add DIR --test DIR, or update an earlier DIR."""
    place = _open(config_path)
    products = sorted({camera.product for camera in place.config.cameras.values()})
    if product is None and len(products) != 1:
        raise UsageError(f"found no --product, wanted one of {', '.join(products)}")
    done = export(place.desk, product or products[0], folder)
    for name, count in done.files.items():
        print(f"{folder / name}: {count}")
    if done.gone:
        print(f"{done.gone} marked parts are not there: the recorder has given their frames up (recorder.keep_gb)")
    if done.foreign:
        print(f"{done.foreign} files are of parts that this ledger never had; they stay as they are")
    if not done.files:
        print("nothing is marked yet: inspectd review mark")


def _tell(line: str) -> None:
    click.echo(f"warning: {line}", err=True)


def _user(user: str | None) -> str:
    name = user or account()
    if name is None:
        raise UsageError("found no account's name, wanted --user NAME: a mark is somebody's word")
    return name


def _checked(name: str | None, word: str) -> str | None:
    if name is None:
        return None
    if word != "defect" or name.lower() == "good" or not re.fullmatch(DEFECT_NAME, name):
        raise UsageError(
            f"found --name {name!r} with {word}, wanted for a defect 1 to 40 letters, digits, _ and -, and not good"
        )
    return name


def _parse_part(text: str) -> PartKey:
    camera, slash, rest = text.partition("/")
    epoch, slash_too, seq = rest.rpartition("/")
    if not (slash and slash_too and camera and epoch and seq.isascii() and seq.isdigit() and int(seq) <= MAX_SEQ):
        raise UsageError(f"found part {text!r}, wanted CAMERA/EPOCH/SEQ as `inspectd review list` shows it")
    return PartKey(camera, epoch, int(seq))


def _print_groups(grouping: Grouping, marks: dict[PartKey, Mark]) -> None:
    print("group  rejects  open  marked             area       peak    place         product")
    for group in grouping.groups:
        typical = medians(group.members)
        said = Counter(_said(m.word, m.name) for key in group.members if (m := marks.get(key.key)) and m.word != "none")
        words = ", ".join(f"{count} {what}" for what, count in sorted(said.items()))
        count = len(group.members)
        area = _area(typical["area"], typical["share"])
        print(
            f"{group.number:<5}  {count:<7}  {count - said.total():<4}  {words:<17}  {area:<9}  "
            f"{typical['peak']:<4.1f} x  {typical['place']:<12}  {group.product}"
        )
    looks = sorted({group.look for group in grouping.groups})
    print(f"{sum(len(group.members) for group in grouping.groups)} rejects, looked at with: {', '.join(looks)}")


def _draw(path: Path, grouping: Grouping, desk: Desk, rejects: Sequence[Reject]) -> None:
    by_key = {reject.key: reject for reject in rejects}
    rows = [(_caption(group), _pictures(group, desk, by_key)) for group in grouping.groups]
    if not cv2.imwrite(str(path), sheet([(caption, pictures) for caption, pictures in rows if pictures])):
        raise UsageError(f"{path}: cannot be written as a picture, wanted a name that ends with .png or .jpg")


def _pictures(group: Group, desk: Desk, by_key: dict[PartKey, Reject]) -> list[Any]:
    chosen = [by_key[member.key] for member in group.members[:_IN_A_ROW]]
    found = []
    for reject in chosen:
        try:
            found.append(thumbnail(desk.frame(reject), reject))
        except GoneError as error:
            _tell(str(error))  # the recorder made room meanwhile
    return found


def _caption(group: Group) -> str:
    count = len(group.members)
    return f"group {group.number}: {count} reject{'' if count == 1 else 's'} of {group.product}"


def _line(reject: Reject) -> str:
    severity, mark = reject.severity, reject.mark
    said = f"{_said(mark.word, mark.name)} by {mark.user} {_when(mark.ns)}" if mark else "open"
    return (
        f"{_when(reject.decided_ns)}  {reject.address}  {reject.part_id or '-'}  "
        f"score {reject.score:.4g} limit {reject.limit:.4g}  area {_area(severity.area, severity.share)} in "
        f"{severity.regions}, peak {severity.peak:.2g} x, {severity.place}  {said}"
    )


def _area(area: int, share: float | None) -> str:
    return f"{area} px" if share is None else f"{100 * share:.2g} %"


def _said(word: str, name: str | None) -> str:
    return f"{word} {name}" if name else {"none": "mark taken back"}.get(word, word)


def _when(ns: int) -> str:
    return datetime.fromtimestamp(ns / 1e9, tz=timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")
