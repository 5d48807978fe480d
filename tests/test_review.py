"""Review without a line: marks in the journal and the ledger, what is read of rejects, groups, exports, added images."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from adapters.dashboard.books import GoneError
from adapters.review.command import command, open_desk
from adapters.review.desk import Asked
from adapters.review.export import export, is_kept_back
from adapters.review.groups import cluster
from adapters.review.kept import FILE, Group, Grouping, Member, load_grouping, save_grouping
from adapters.review.look import PlainLook, contrast_of, find_place, shape_of
from adapters.review.pictures import SIDE, thumbnail
from daemon.config import load_config
from daemon.errors import DataError, InspectError, UsageError, WireError
from daemon.line.control import decode_request
from daemon.line.wire import encode_header
from daemon.record.ledger import Ledger
from daemon.records import replay
from daemon.types import Frame, PartKey
from tests.daemons import make_site
from tests.dashboards import STATE, png, record_frame, rejected, write_books
from trainer import dataset
from trainer.dataset import Picture, Splits

NOON_NS = 1_700_000_000 * 10**9
PART = {"camera": "cam1", "epoch": "e1", "seq": 1, "decidedNs": NOON_NS}
SAID = {"command": "mark", "user": "olga", "mark": "defect", "decision": "0" * 16, "parts": [PART]}


def mark_record(numbers, word="good", *, name=None, user="olga", decision="a" * 16, ns=NOON_NS, offset_ns=0):
    """As the daemon journals it, of the parts that `rejected` makes."""
    parts = [{"camera": "cam1", "epoch": "e1", "seq": number, "decidedNs": NOON_NS + number} for number in numbers]
    return {
        "t": "mark",
        "ns": ns + offset_ns,
        "user": user,
        "mark": word,
        "name": name,
        "decision": decision,
        "parts": parts,
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return make_site(tmp_path_factory.mktemp("built"))


@pytest.fixture
def site(tmp_path, built):
    site = type(built)(tmp_path, dict(built.config))
    site.write_config()
    return site


def fill(site, numbers, *marks):
    """Rejects in the books and their frames with the recorder."""
    records = [rejected(number, ns=NOON_NS + number) for number in numbers]
    write_books(site, *records, *marks)
    for record in records:
        record_frame(site, record, mask=mask())


def mask():
    pixels = np.zeros((64, 64), np.uint8)
    pixels[24:40, 24:40] = 255
    return cv2.imencode(".png", pixels)[1].tobytes()


def desk_of(site):
    return open_desk(load_config(site.folder / "config.yaml"))


def run(site, *arguments):
    return CliRunner().invoke(command, [arguments[0], "--config", str(site.folder / "config.yaml"), *arguments[1:]])


# --- the command `mark`


def test_a_mark_is_read_with_its_parts():
    marking = decode_request([encode_header({**SAID, "name": "scratch"})]).marking
    assert (marking.mark, marking.name, marking.parts[0].seq) == ("defect", "scratch", 1)
    assert marking.words == "1 part: defect scratch"


@pytest.mark.parametrize(
    "change",
    [
        {"user": None}, {"mark": "bad"}, {"mark": None}, {"parts": []}, {"parts": [PART] * 501}, {"parts": "all"},
        {"decision": "x" * 16}, {"decision": None}, {"mark": "good", "name": "scratch"}, {"name": "Good"},
        {"name": "../x"}, {"name": "a\n"}, {"name": ""}, {"parts": [{**PART, "camera": "../cam"}]},
        {"parts": [{**PART, "seq": -1}]}, {"parts": [{**PART, "seq": True}]}, {"parts": [{**PART, "decidedNs": 2**63}]},
        {"parts": [{**PART, "epoch": "a\nb"}]}, {"parts": [{**PART, "more": 1}]}, {"parts": [[1, 2, 3, 4]]},
    ],
)  # fmt: skip
def test_a_mark_that_is_none_is_refused(change):
    with pytest.raises(WireError):
        decode_request([encode_header({**SAID, **change})])


def test_marks_are_in_the_ledger_and_stay_when_the_parts_are_forgotten(tmp_path, site):
    write_books(site, rejected(1, ns=NOON_NS), mark_record([1, 2], "defect", name="dent"))
    ledger = Ledger(site.folder / "run/ledger")
    ledger.forget(1)
    rows = list(ledger._db.execute("SELECT user, mark, name, camera, epoch, seq, decided_ns FROM marks"))
    assert rows == [("olga", "defect", "dent", "cam1", "e1", number, NOON_NS + number) for number in (1, 2)]
    assert list(ledger._db.execute("SELECT * FROM parts")) == []
    assert ledger.verify().faults == []


def test_a_restart_reads_past_marks():
    assert replay([STATE, mark_record([1])]).in_flight == {}


# --- what there is to review


def test_rejects_come_with_their_severity_and_last_mark(site):
    marks = [mark_record([1]), mark_record([1], "defect", name="dent", user="karl", decision="b" * 16)]
    fill(site, [1, 2], *marks)
    second, first = desk_of(site).newest(Asked())
    assert (second.key.seq, second.mark) == (2, None)
    assert (first.mark.word, first.mark.name, first.mark.user) == ("defect", "dent", "karl")
    severity = first.severity
    assert (severity.regions, severity.area, severity.peak, severity.x, severity.y) == (1, 256, 2.5, 32, 32)
    assert (severity.share, severity.place) == (None, "32, 32"), "a record of before does not tell the frame's size"


@pytest.mark.parametrize(
    ("x", "y", "words"), [(0, 0, "top left"), (60, 30, "right"), (30, 60, "bottom"), (30, 30, "middle")]
)
def test_a_place_is_told_in_words(site, x, y, words):
    fill(site, [1])
    (facts,) = (site.folder / "run/rejects").rglob("*.json")
    told = json.loads(facts.read_text())
    told["regions"][0] |= {"x": x, "y": y, "w": 4, "h": 4}
    facts.write_text(json.dumps({**told, "shape": [64, 64]}))
    (reject,) = desk_of(site).newest(Asked())
    assert reject.severity.place == words
    assert reject.severity.share == 256 / 4096


def test_only_defects_whose_frame_is_kept_are_reviewed(site):
    fill(site, [1, 2])
    write_books(site, rejected(9, ns=NOON_NS + 9), rejected(10, ns=NOON_NS + 10, reason="LATE"))
    (frame,) = (site.folder / "run/rejects").rglob(f"{NOON_NS + 1}-*.json")
    frame.unlink()
    assert [reject.key.seq for reject in desk_of(site).newest(Asked())] == [2]


def test_a_long_list_is_read_page_by_page_and_ends_where_the_recorder_made_room(site):
    write_books(site, *(rejected(number, ns=NOON_NS + number) for number in range(500)))
    for number in range(150, 500):
        record_frame(site, rejected(number, ns=NOON_NS + number))
    assert [reject.key.seq for reject in desk_of(site).newest(Asked())] == list(range(499, 149, -1))
    assert len(desk_of(site).newest(Asked(most=10))) == 10


def test_a_ledger_of_before_has_no_marks(site):
    fill(site, [1])
    db = sqlite3.connect(site.folder / "run/ledger/ledger.sqlite")
    db.execute("DROP TABLE marks")
    db.close()
    desk = desk_of(site)
    assert (desk.marks(), desk.decisions(5), len(desk.newest(Asked()))) == ({}, [], 1)


def test_the_thumbnail_shows_the_worst_region(site):
    fill(site, [1])
    (reject,) = desk_of(site).newest(Asked())
    pixels = np.full((64, 64, 1), 90, np.uint8)
    pixels[24:40, 24:40] = 200
    for frame in (Frame(pixels), Frame(pixels.astype(np.uint16) * 16), Frame(np.repeat(pixels, 3, axis=2))):
        shown = thumbnail(frame, reject)
        assert shown.shape == (SIDE, SIDE, 3)
        assert shown[SIDE // 2, SIDE // 2, 0] > 1.5 * shown[4, 4, 0]


# --- looks and groups


def test_alike_is_one_group_and_the_strange_are_by_themselves():
    rng = np.random.default_rng(0)
    near, far = rng.normal(0, 0.05, (30, 8)), rng.normal(3, 0.05, (10, 8))
    lone = np.full((1, 8), -5.0)
    groups = cluster(np.concatenate([near, far, lone]).astype(np.float32), 0.69)
    assert sorted(map(sorted, groups)) == [list(range(30)), list(range(30, 40)), [40]]
    assert cluster(near[:1].astype(np.float32), 0.69) == [[0]]
    assert len(cluster(near.astype(np.float32), 0.69)) == 1, "many of one look are not torn apart"


def drawn(kind):
    """A gray frame with a dark line or a bright disc, and its region."""
    pixels = np.full((120, 160), 120, np.uint8)
    if kind == "line":
        cv2.line(pixels, (20, 30), (120, 90), 40, 2)
    else:
        cv2.circle(pixels, (80, 60), 14, 230, -1)
    rows, columns = np.nonzero(pixels != 120)
    box = {"x": columns.min(), "y": rows.min(), "w": np.ptp(columns) + 1, "h": np.ptp(rows) + 1}
    return (
        Frame(pixels[:, :, None]),
        [{**box, "area": len(rows), "peak": 2.0}],
        np.where(pixels != 120, 255, 0).astype(np.uint8),
    )


def test_a_line_is_long_and_dark_and_a_disc_is_round_and_bright():
    line, disc = (find_place(*drawn(kind)) for kind in ("line", "disc"))
    assert shape_of(line)[1] > shape_of(disc)[1] + 1
    assert shape_of(line)[2] < shape_of(disc)[2]
    assert contrast_of(drawn("line")[0], line)[0] < 0 < contrast_of(drawn("disc")[0], disc)[0]
    assert np.isfinite(PlainLook().describe(*drawn("line"))).all()


def test_without_a_mask_the_boxes_are_looked_at():
    frame, regions, _ = drawn("disc")
    assert find_place(frame, regions, None).sum() == regions[0]["w"] * regions[0]["h"]
    assert find_place(frame, regions, np.zeros((9, 9), np.uint8)).any(), "a mask of another size is no mask"
    with pytest.raises(InspectError, match="no region"):
        find_place(frame, [], None)


def member(seq):
    fields = {"score": 2.5, "limit": 1.0, "area": 9, "share": None, "peak": 2.5, "place": "top"}
    return Member(camera="cam1", epoch="e1", seq=seq, decidedNs=NOON_NS + seq, partId=None, **fields)


def test_groups_are_kept_and_what_is_none_is_told(tmp_path):
    path = tmp_path / FILE
    with pytest.raises(GoneError, match="inspectd review groups"):
        load_grouping(path)
    grouping = Grouping(madeNs=1, groups=[Group(number=1, product="part", look="plain", members=[member(1)])])
    save_grouping(path, grouping)
    assert load_grouping(path) == grouping
    assert [entry.name for entry in tmp_path.iterdir()] == [FILE]
    with pytest.raises(UsageError, match="found no group 2, wanted 1 to 1"):
        grouping.group(2)
    for text in ("[]", "{", '{"version": 2, "madeNs": 1, "groups": []}'):
        path.write_text(text)
        with pytest.raises(DataError, match="makes it anew"):
            load_grouping(path)
    path.unlink()
    path.symlink_to("/etc/passwd")
    with pytest.raises(DataError, match="plain file"):
        load_grouping(path)


def test_the_recorder_counts_no_groups_among_its_frames(site):
    fill(site, [1])
    (site.folder / "run/rejects" / FILE).write_text("x" * 10**6)
    record_frame(site, rejected(2, ns=NOON_NS + 2))
    assert (site.folder / "run/rejects" / FILE).exists()


# --- exports


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def names(numbers, folder):
    return sorted(f"{folder}/{NOON_NS + number}-cam1-e1-{number}.png" for number in numbers)


def test_good_ones_teach_some_are_kept_back_and_defects_test(site, tmp_path):
    fill(
        site,
        range(20),
        mark_record(range(14)),
        mark_record([14, 15], "defect", name="dent"),
        mark_record([16], "defect"),
    )
    done = export(desk_of(site), "part", tmp_path / "out")
    back = [number for number in range(14) if is_kept_back(PartKey("cam1", "e1", number))]
    assert 0 < len(back) < 7
    taught = sorted(set(range(14)) - set(back))
    wanted = [
        *names(taught, "train/good"),
        *names(back, "test/good"),
        *names([14, 15], "test/dent"),
        *names([16], "test/defect"),
    ]
    assert files(tmp_path / "out") == sorted(["marks.json", *wanted])
    assert (done.files["test/dent"], done.gone) == (2, 0)
    assert (tmp_path / "out" / wanted[0]).read_bytes() == png()
    told = json.loads((tmp_path / "out/marks.json").read_text())
    entry = told["files"][names([14], "test/dent")[0]]
    assert (told["product"], entry["user"], entry["name"], entry["seq"]) == ("part", "olga", "dent", 14)


def test_an_export_follows_the_marks_and_keeps_what_the_recorder_gave_up(site, tmp_path):
    out = tmp_path / "out"
    fill(site, range(4), mark_record([0, 1, 2], "defect", name="dent"))
    export(desk_of(site), "part", out)
    for path in (site.folder / "run/rejects").rglob(f"{NOON_NS}-*"):
        path.unlink()
    for path in (site.folder / "run/rejects").rglob(f"{NOON_NS + 3}-*"):
        path.unlink()
    write_books(
        site, mark_record([1], "none", decision="b" * 16), mark_record([0, 3], "defect", name="chip", decision="c" * 16)
    )
    done = export(desk_of(site), "part", out)
    assert files(out) == sorted(["marks.json", *names([0], "test/chip"), *names([2], "test/dent")])
    assert done.gone == 1, "part 3 was marked when its frame had gone"
    assert export(desk_of(site), "part", out) == done


def test_a_frame_that_goes_while_it_is_exported_costs_no_other(site, tmp_path, monkeypatch):
    fill(site, range(3), mark_record([0, 1, 2], "defect", name="dent"))
    desk = desk_of(site)
    standing = desk.standing()
    monkeypatch.setattr(desk, "standing", lambda: standing)
    for path in (site.folder / "run/rejects").rglob(f"{NOON_NS}-*"):
        path.unlink()  # the recorder makes room between the list and the copy
    done = export(desk, "part", tmp_path / "out")
    assert (done.files, done.gone) == ({"test/dent": 2}, 1)
    assert files(tmp_path / "out") == sorted(["marks.json", *names([1, 2], "test/dent")])


def test_an_interrupted_export_is_brought_up_to_date_by_the_next(site, tmp_path, monkeypatch):
    out = tmp_path / "out"
    fill(site, range(3), mark_record([0, 1], "defect", name="dent"))
    with monkeypatch.context() as patch:
        patch.setattr("adapters.review.export._drop_empty", interrupted)
        patch.setattr("adapters.review.export._collect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export(desk_of(site), "part", out)
    done = export(desk_of(site), "part", out)
    assert done.files == {"test/dent": 2}
    write_books(site, mark_record([0], "defect", name="chip", decision="c" * 16))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export(desk_of(site), "part", out)
    assert export(desk_of(site), "part", out).files == {"test/chip": 1, "test/dent": 1}
    assert files(out) == sorted(["marks.json", *names([0], "test/chip"), *names([1], "test/dent")])


def interrupted(*_arguments):
    raise KeyboardInterrupt


def test_what_another_ledger_said_stays_in_an_export(site, tmp_path):
    out = tmp_path / "out"
    fill(site, [1], mark_record([1], "defect", name="dent"))
    export(desk_of(site), "part", out)
    told = json.loads((out / "marks.json").read_text())
    ((name, entry),) = told["files"].items()
    (out / "test/dent/theirs.png").write_bytes((out / name).read_bytes())
    told["files"]["test/dent/theirs.png"] = {**entry, "epoch": "of-another-line"}
    (out / "marks.json").write_text(json.dumps(told))
    write_books(site, mark_record([1], "none", decision="b" * 16))
    done = export(desk_of(site), "part", out)
    assert (done.files, done.foreign) == ({"test/dent": 1}, 1)
    assert files(out) == ["marks.json", "test/dent/theirs.png"]


def test_an_export_touches_no_folder_that_is_not_its_own(site, tmp_path):
    fill(site, [1], mark_record([1]))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.png").write_bytes(b"x")
    with pytest.raises(DataError, match="no earlier export"):
        export(desk_of(site), "part", tmp_path / "mine")
    export(desk_of(site), "part", tmp_path / "out")
    with pytest.raises(DataError, match="holds the marks of part, wanted those of other"):
        export(desk_of(site), "other", tmp_path / "out")
    told = json.loads((tmp_path / "out/marks.json").read_text())
    (entry,) = told["files"].values()
    told["files"] = {"../../mine/photo.png": entry}
    (tmp_path / "out/marks.json").write_text(json.dumps(told))
    with pytest.raises(DataError, match="which no export writes"):
        export(desk_of(site), "part", tmp_path / "out")
    assert (tmp_path / "mine/photo.png").exists()


def test_a_mosaic_leaves_in_the_colours_that_the_engine_saw(site, tmp_path):
    fill(site, [1], mark_record([1], "defect"))
    (facts,) = (site.folder / "run/rejects").rglob("*.json")
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "pixelFormat": "BayerRG8", "encoding": "png"}))
    export(desk_of(site), "part", tmp_path / "out")
    (name,) = (tmp_path / "out/test/defect").iterdir()
    assert cv2.imread(str(name), cv2.IMREAD_UNCHANGED).shape == (64, 64, 3)


# --- the command line


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("mark", "good"), "neither or both"),
        (("mark", "good", "--group", "1", "--part", "a/b/1"), "neither or both"),
        (("mark", "good", "--part", "cam1"), "wanted CAMERA/EPOCH/SEQ"),
        (("mark", "good", "--group", "1", "--name", "dent"), "wanted for a defect"),
        (("mark", "defect", "--group", "1", "--name", "../x"), "wanted for a defect"),
        (("mark", "good", "--group", "1"), "no groups were made yet"),
        (("mark", "good", "--part", "cam1/e1/99"), "no part cam1 e1 99 is in the ledger"),
        (("undo", "0" * 16), "found no mark of decision"),
    ],
)
def test_what_cannot_be_done_is_told(site, arguments, told):
    fill(site, [1])
    done = run(site, *arguments)
    assert isinstance(done.exception, InspectError)
    assert told in str(done.exception)


def test_nothing_to_review_is_told(site):
    write_books(site)
    assert "no DEFECT of the last 30 days" in run(site, "groups").output
    assert run(site, "list").output == ""
    assert "nothing is marked yet" in run(site, "export", str(site.folder / "out")).output


def test_a_line_that_records_nothing_has_nothing_to_review(site):
    site.config["recorder"] = None
    site.write_config()
    assert "there is nothing to review" in str(run(site, "list").exception)


# --- what the next build takes in


def pictures(folder, values):
    folder.mkdir(parents=True)
    for value in values:
        (folder / f"{value}.png").write_bytes(png(value, (40, 40)))
    return folder


@pytest.fixture
def splits(tmp_path):
    found = [*dataset.scan(pictures(tmp_path / "all", range(6)), 1)[0]]
    return Splits(tuple(found[:3]), tuple(found[3:4]), tuple(found[4:]), ())


def test_added_images_are_taught_and_nothing_is_measured_on_them(tmp_path, splits):
    found = dataset.add(splits, [pictures(tmp_path / "more", [100, 101])], "part", 1)
    assert (found.train, found.select, found.calibrate) == (splits.train, splits.select, splits.calibrate)
    assert [picture.path.name for picture in found.taught[3:]] == ["100.png", "101.png"]
    assert found.counts == {"train": 3, "select": 1, "calibrate": 2, "added": 2}
    assert splits.counts == {"train": 3, "select": 1, "calibrate": 2}
    assert found.digest != splits.digest


def test_what_is_measured_on_is_never_added(tmp_path, splits, capsys):
    more = pictures(tmp_path / "more", [0, 3, 4, 100])
    packed_otherwise = cv2.imencode(".png", cv2.imread(str(more / "4.png"), -1), [cv2.IMWRITE_PNG_COMPRESSION, 1])[1]
    assert packed_otherwise.tobytes() != (more / "4.png").read_bytes()
    (more / "4.png").write_bytes(packed_otherwise.tobytes())
    found = dataset.add(splits, [more], "part", 1)
    assert [picture.path.name for picture in found.added] == ["100.png"]
    assert "2 of the images to add are copies" in capsys.readouterr().err


def test_an_export_is_added_by_its_good_ones_and_only_to_its_product(tmp_path, splits):
    out = tmp_path / "out"
    pictures(out / "train/good", [100, 101])  # the latter is left over from an export that was cut short
    (out / "marks.json").write_text('{"product": "part", "files": {"train/good/100.png": {}, "test/good/102.png": {}}}')
    for path in (out, out / "marks.json"):
        assert [picture.path.name for picture in dataset.add(splits, [path], "part", 1).added] == ["100.png"]
    with pytest.raises(UsageError, match="holds the marks of part, wanted those of other"):
        dataset.add(splits, [out], "other", 1)
    shutil.rmtree(out / "train/good")
    with pytest.raises(DataError, match="no rejected part was marked good"):
        dataset.add(splits, [out], "part", 1)
    (out / "marks.json").write_text("{")
    with pytest.raises(DataError, match="is not what `inspectd review export` writes"):
        dataset.add(splits, [out], "part", 1)


def test_splits_without_added_images_are_as_before():
    one = Picture(Path("a.png"), (8, 8), "a")
    assert Splits((one,), (one,), (one,), ()).taught == (one,)
