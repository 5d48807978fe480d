"""The recorder: rejected frames and their facts on disk, within its space, and never in inspection's way."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.record import recorder as recorder_module
from daemon.record.recorder import Recorder, Reject

SECOND_NS = 10**9
NOON_NS = 1_700_000_000 * SECOND_NS  # 2023-11-14
PICTURE = ("png", b"p" * 1000)


def reject(
    number: int = 0,
    *,
    epoch: str = "e1",
    size: int = 1000,
    encode: Callable[[], tuple[str, bytes]] = lambda: PICTURE,
    ns: int | None = None,
) -> Reject:
    decided_ns = NOON_NS + number * SECOND_NS if ns is None else ns
    header = {
        "camera": "cam1",
        "epoch": epoch,
        "seq": number,
        "decidedNs": decided_ns,
        "reason": "DEFECT",
        "score": 2.5,
    }
    return Reject(header, size, encode)


def recorded(recorder: Recorder, *rejects: Reject) -> int:
    for one in rejects:
        recorder.submit(one)
    return recorder.write_waiting()


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def numbers(folder: Path) -> list[int]:
    """The seq of every frame that is there whole: picture and facts."""
    facts = [json.loads(path.read_text()) for path in files(folder) if path.suffix == ".json"]
    return [fact["seq"] for fact in facts if list(folder.rglob(fact["file"]))]


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


# --- what is written


def test_what_explains_a_frame_lies_beside_it(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 10**6)
    assert recorded(recorder, replace(reject(5), pictures={"mask": b"mask", "heatmap": b"heat"})) == 1
    stem = tmp_path / recorder_module.recorded_as("cam1", "e1", 5, NOON_NS + 5 * SECOND_NS)
    assert {path.name.removeprefix(stem.name): path.read_bytes() for path in files(tmp_path) if path.suffix == ".png"} == {
        ".png": PICTURE[1], ".mask.png": b"mask", ".heatmap.png": b"heat"
    }  # fmt: skip


def test_pictures_count_against_what_may_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "_MOST_WAITING_BYTES", 3000)
    recorder = Recorder(tmp_path, 10**6)
    large = replace(reject(1), pictures={"mask": b"m" * 2500})
    assert recorded(recorder, large, reject(2), reject(3)) == 2
    assert (numbers(tmp_path), recorder.dropped) == ([2, 3], 1)


def test_frame_lies_beside_what_was_decided_about_it_in_its_day(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "rejects", 10**6)
    one = reject(3)
    assert recorded(recorder, one) == 1
    facts, picture = files(tmp_path / "rejects")
    assert picture.read_bytes() == PICTURE[1]
    assert json.loads(facts.read_text()) == {**one.header, "file": picture.name}
    assert (facts.stem, picture.suffix) == (picture.stem, ".png")
    assert picture.parent == tmp_path / "rejects" / "2023-11-14"


def test_days_are_those_of_utc(tmp_path: Path) -> None:
    midnight_ns = 19_676 * 86_400 * SECOND_NS
    recorded(Recorder(tmp_path, 10**6), reject(1, ns=midnight_ns - 1000), reject(2, ns=midnight_ns))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2023-11-14", "2023-11-15"]


HOSTILE = [
    "../../x",
    "/etc/passwd",
    "a" * 128,
    "ü" * 128,
    "\N{FACE WITH TEARS OF JOY}",
    " ",
    ".",
    "..",
    "a\nb",
    "\0",
    "-rf",
    "a/b",
]


@pytest.mark.parametrize("epoch", HOSTILE)
def test_name_of_a_hostile_epoch_stays_inside_the_folder(tmp_path: Path, epoch: str) -> None:
    folder = tmp_path / "rejects"
    assert recorded(Recorder(folder, 10**6), reject(1, epoch=epoch)) == 1
    assert {path.parent for path in files(tmp_path)} == {folder / "2023-11-14"}
    assert numbers(folder) == [1]
    assert json.loads(files(folder)[0].read_text())["epoch"] == epoch


@given(st.text(min_size=1, max_size=128))
@settings(max_examples=200)
def test_name_of_any_epoch_is_short_and_plain(epoch: str) -> None:
    written: list[Path] = []
    recorder = object.__new__(Recorder)
    recorder._folder, recorder._used_bytes = Path("/rejects"), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "mkdir", lambda *_, **__: None)
        patch.setattr(Path, "write_bytes", lambda path, data: written.append(path) or len(data))
        recorder._write(reject(1, epoch=epoch))
    assert len(written) == 2
    for path in written:
        assert path.parent == Path("/rejects/2023-11-14")
        assert len(path.name) < 200
        assert all(letter.isascii() and (letter.isalnum() or letter in "._-") for letter in path.name)


# --- space


def test_oldest_frames_go_first_when_space_is_up(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 6000)
    for number in range(20):
        recorded(recorder, reject(number))
        assert sum(path.stat().st_size for path in files(tmp_path)) <= 6000
    kept = numbers(tmp_path)
    assert 2 <= len(kept) <= 6
    assert kept == list(range(20 - len(kept), 20))


def test_oldest_go_first_and_what_cannot_be_deleted_is_passed_over_with_few_names_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.record.recorder._NAMES_AT_ONCE", 2)
    recorder = Recorder(tmp_path, 20_000)
    recorded(recorder, *(reject(number) for number in range(9)))
    (tmp_path / "2023-11-14" / "0-in-the-way").mkdir()
    recorder._keep_bytes = 5000
    recorded(recorder, reject(9))
    kept = numbers(tmp_path)
    assert kept == list(range(10 - len(kept), 10))
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 5000


def test_day_without_frames_is_removed(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 2500)
    recorded(recorder, reject(1))
    recorded(recorder, reject(2, ns=NOON_NS + 86_400 * SECOND_NS), reject(3, ns=NOON_NS + 86_401 * SECOND_NS))
    assert [path.name for path in tmp_path.iterdir()] == ["2023-11-15"]


def test_what_an_earlier_run_left_counts_from_the_start(tmp_path: Path) -> None:
    recorded(Recorder(tmp_path, 10**6), *(reject(number) for number in range(5)))
    recorder = Recorder(tmp_path, 3000)
    recorded(recorder, reject(9))
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 3000
    assert numbers(tmp_path)[-1] == 9
    assert 0 not in numbers(tmp_path)


def test_frame_larger_than_all_the_space_is_not_kept_and_the_next_is(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 5000)
    recorded(recorder, reject(1, encode=lambda: ("png", b"p" * 6000)))
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 5000
    recorded(recorder, reject(2))
    assert numbers(tmp_path) == [2]


def test_foreign_file_beside_the_days_neither_ends_recording_nor_goes(tmp_path: Path) -> None:
    folder = tmp_path / "rejects"
    folder.mkdir()
    (folder / "notes.txt").write_bytes(b"n" * 5000)
    recorder = Recorder(folder, 100)
    recorded(recorder, reject(1))
    recorder._keep_bytes = 5000
    assert recorded(recorder, reject(2)) == 1
    assert numbers(folder) == [2]
    assert (folder / "notes.txt").exists()


# --- what waits


def test_frames_that_wait_are_bounded_in_bytes_and_the_dropped_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "_MOST_WAITING_BYTES", 2500)
    recorder = Recorder(tmp_path, 10**6)
    assert recorded(recorder, *(reject(number) for number in range(5))) == 2
    assert recorder.dropped == 3
    assert recorded(recorder, reject(7), reject(8)) == 2
    assert recorder.dropped == 3
    assert numbers(tmp_path) == [0, 1, 7, 8]


def test_nothing_is_encoded_before_the_writer_comes(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 10**6)
    recorder.submit(reject(1, encode=failing(AssertionError("encoded in the loop"))))
    assert recorder.dropped == 0
    assert files(tmp_path) == []


def test_nothing_waiting_writes_nothing(tmp_path: Path) -> None:
    assert Recorder(tmp_path, 10**6).write_waiting() == 0
    assert files(tmp_path) == []


# --- failures


def test_frame_that_cannot_be_encoded_does_not_stop_the_next(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 10**6)
    broken = reject(1, encode=failing(ValueError("no picture")))
    assert recorded(recorder, reject(0), broken, reject(2)) == 2
    assert recorder.dropped == 1
    assert numbers(tmp_path) == [0, 2]


def test_disk_that_takes_nothing_is_counted_and_recording_goes_on_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(tmp_path, 10**6)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", failing(OSError(errno.ENOSPC, "No space left on device")))
        assert recorded(recorder, reject(1), reject(2)) == 0
    assert recorder.dropped == 2
    assert recorded(recorder, reject(3)) == 1
    assert numbers(tmp_path) == [3]


def test_frame_whose_facts_cannot_be_written_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(tmp_path, 10**6)
    real = Path.write_bytes

    def full_after_the_picture(path: Path, data: bytes) -> int:
        if path.suffix == ".json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full_after_the_picture)
        assert recorded(recorder, reject(1)) == 0
    assert files(tmp_path) == []


@pytest.mark.parametrize("method", ["unlink", "rmdir", "rglob"])
def test_disk_that_gives_no_room_back_does_not_raise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The writer thread also brings the journal to disk: nothing of the recorder may end it."""
    recorder = Recorder(tmp_path, 100)
    with monkeypatch.context() as patch:
        patch.setattr(Path, method, failing(OSError(errno.EROFS, "Read-only file system")))
        assert recorded(recorder, reject(1)) == 1
    assert recorded(recorder, reject(2)) == 1


def test_frame_that_somebody_else_deleted_does_not_raise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(tmp_path, 1500)
    recorded(recorder, reject(1))
    real = Path.stat
    gone = files(tmp_path)[0]

    def stat(path: Path, **options: Any) -> Any:
        if path == gone:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        return real(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_file", lambda path: path.suffix in (".png", ".json"))
        patch.setattr(Path, "stat", stat)
        assert recorded(recorder, reject(2)) == 1
    assert recorded(recorder, reject(3)) == 1
    assert numbers(tmp_path)[-1] == 3
