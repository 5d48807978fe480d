"""Every command of the documents is run as it is printed, or named in tests/pages.py with the reason why it is not.

The pictures are rendered parts. The tutorial starts from a bare checkout; the how-to pages from what the tutorial leaves, line running; the
reference pages from an engine, the shipped configuration that names it, and no keys of anybody.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
from websockets.sync.client import connect

from daemon.cli import cli
from examples.parts import write_dataset
from tests import models
from tests.daemons import ROOT
from tests.pages import (
    NOT_RUN,
    PAGES,
    PASSWORD,
    Command,
    Walk,
    commands_of,
    is_meant,
    make_checkout,
    reason_not_to_run,
    walking,
)

TUTORIAL, README = "docs/tutorial.md", "README.md"
ENGINE = "engines/bracket/current"
MOST_COMMANDS = 8  # from a folder of images to the live overlay
HOW_TO = [page for page in PAGES if page.startswith("docs/how-to/")]
REFERENCE = [
    page
    for page in PAGES
    if page not in (TUTORIAL, README, *HOW_TO)
    and any(reason_not_to_run(command) is None for command in commands_of(page))
]


def walk_page(walk: Walk, page: str) -> None:
    for command in commands_of(page):
        if reason_not_to_run(command) is None:
            walk.run(command)


# --- what pages start from


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """As a user has them: good ones of two products, the line's next parts, and some with labels."""
    folder = tmp_path_factory.mktemp("images")
    for name, size_hw in (("bracket", (96, 96)), ("cover", (96, 192)), ("lid", (96, 96))):
        write_dataset(folder / "all" / name, good_train=30, good_test=4, defects_each=1, size_hw=size_hw)
        shutil.move(folder / "all" / name / "train/good", folder / name)
    shutil.move(folder / "all/bracket", folder / "labelled")
    shutil.copytree(folder / "labelled/test", folder / "new")
    shutil.rmtree(folder / "all")
    models.template(folder / "model.onnx", folder / "cover")
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, images):
    """Makes a checkout with the images in it; its parent is nobody else's."""

    def make() -> Path:
        folder = tmp_path_factory.mktemp("walk") / "inspectd"
        make_checkout(folder)
        (folder / "images").symlink_to(images)
        return folder

    return make


@pytest.fixture(scope="module")
def tutorial(checkout):
    """The tutorial walked to its end: (its folder, its ports, the picture that the browser was shown)."""
    with walking(checkout()) as walk:
        walk_page(walk, TUTORIAL)
        return walk.folder, walk.ports, shown_picture(walk.ports["8080"])


def take_along(tutorial, folder, *names):
    for name in names:
        path = tutorial / name
        if path.is_dir():
            shutil.copytree(path, folder / name, symlinks=True)
        else:
            shutil.copy(path, folder / name)


def shown_picture(port):
    """What the dashboard sends a browser for the camera's newest part: (its header, the names of its pictures)."""
    place = f"127.0.0.1:{port}"
    body = json.dumps({"name": "anna", "password": PASSWORD}).encode()
    headers = {"origin": f"http://{place}", "content-type": "application/json"}
    with urllib.request.urlopen(
        urllib.request.Request(f"http://{place}/api/login", body, headers), timeout=30
    ) as answer:
        cookie = answer.headers["set-cookie"].partition(";")[0]
    with connect(f"ws://{place}/live", origin=f"http://{place}", additional_headers={"cookie": cookie}) as page:
        while not isinstance(message := page.recv(timeout=60), bytes):
            pass
    (length,) = struct.unpack_from("<I", message)
    picture = json.loads(message[4 : 4 + length])
    return picture["header"], [name for name, _ in picture["parts"]]


# --- the pages


def test_the_tutorial_ends_with_a_live_overlay(tutorial):
    folder, _, (header, pictures) = tutorial
    assert header["camera"] == "cam1"
    assert header["engine"]["product"] == "bracket"
    assert {"frame", "heatmap"} <= set(pictures)
    assert (folder / "engines/bracket/current/report.html").exists()


def test_the_tutorial_has_no_more_commands_than_promised():
    commands = list(commands_of(TUTORIAL))
    assert len(commands) <= MOST_COMMANDS
    assert [reason_not_to_run(command) for command in commands] == [None] * len(commands)


@pytest.mark.parametrize("page", HOW_TO)
def test_commands_of_a_how_to_page_do_what_they_say(page, tutorial, checkout):
    left, ports, _ = tutorial
    folder = checkout()
    make_checkout(folder.parent / "newbox")
    take_along(left, folder, "engines", "keys", "config.yaml", "dashboard.yaml", "dashboard-users.yaml")
    with walking(folder, ports=dict(ports), built=left / ENGINE) as walk:
        for command in commands_of(TUTORIAL):
            if re.search(r"inspectd (run|camera)\b", command.text):
                walk.run(command)
        walk_page(walk, page)


def test_commands_of_the_readme_do_what_they_say(tutorial, checkout):
    with walking(checkout(), by_the_way=True, built=tutorial[0] / ENGINE) as walk:
        walk_page(walk, README)


@pytest.mark.parametrize("page", REFERENCE)
def test_commands_of_a_reference_page_do_what_they_say(page, tutorial, checkout):
    folder = checkout()
    take_along(tutorial[0], folder, "engines")
    (folder / "keys").mkdir(mode=0o700)
    take_along(tutorial[0], folder, "keys/trusted.yaml")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("solar-mono", "bracket"))
    with walking(folder, by_the_way=True) as walk:
        walk_page(walk, page)


def test_what_is_not_run_is_still_printed_somewhere():
    printed = [command for page in PAGES for command in commands_of(page)]
    assert [pattern for pattern in NOT_RUN if not any(is_meant(pattern, command) for command in printed)] == []


# --- the mechanism


PAGE = """
Words, `inspectd nothing`.

```sh
# a comment
make x   # another

two \\
  lines
```

```yaml
no: command
```

<!-- from here on: newbox -->

```
not marked
```
"""


def test_commands_are_found_where_they_stand():
    found = [(command.number, command.text, command.box) for command in commands_of("x.md", PAGE)]
    assert found == [(6, "make x   # another", ""), (9, "two lines", ""), (19, "not marked", "newbox")]


def test_a_command_that_fails_is_told_with_its_page_and_line(checkout):
    with (
        walking(checkout()) as walk,
        pytest.raises(AssertionError, match=r"(?s)x\.md:7: .*ended with 78\n.*none\.yaml"),
    ):
        walk.run(Command("x.md", 7, ".venv/bin/inspectd check-config --config none.yaml", ""))


def test_a_program_that_does_not_come_to_work_is_told_with_what_it_said(checkout):
    with (
        walking(checkout()) as walk,
        pytest.raises(AssertionError, match=r"(?s)ended with 78\n.*server\.yaml: is not there"),
    ):
        walk.run(Command("x.md", 7, ".venv/bin/inspectd run", ""))


@pytest.mark.parametrize(
    "text", ["sudo rm -rf /var", "systemctld", "git push", "inspectd camera rtsp://x --camera cam1"]
)
def test_what_is_not_named_is_not_left_out(text):
    assert reason_not_to_run(Command("x.md", 1, text, "")) is None


# --- commands in the middle of a sentence


SPANS = [(page, span) for page in PAGES for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", (ROOT / page).read_text())]


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_sentences_exist_with_their_options(page):
    for span in (span for of, span in SPANS if of == page):
        for text in re.findall(r"^(?:sudo (?:-u \S+ )?)?(?:\S*/)?inspectd ((?!\[)[a-z].*)", span):
            assert unknown_words(text.split()) == [], f"{page}: `{span}`"
        for target in re.findall(r"^(?:sudo )?make ([a-z-]+)", span):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"{page}: `{span}`"
        for module in re.findall(r"python -m ([\w.]+)", span):
            assert find_spec(module) is not None, f"{page}: `{span}`"


def unknown_words(words: list[str]) -> list[str]:
    """Of a command line of inspectd: the command itself where there is none of its name, else options that it does not have."""
    command: click.Command = cli
    while words and isinstance(command, click.Group):
        name, *words = words
        found = command.get_command(click.Context(command), name)
        if found is None:
            return [name]
        command = found
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    given = [word.strip("[]").partition("=")[0] for word in words]
    return [word for word in given if word.startswith("--") and word not in {*known, "--help"}]


def test_words_that_no_command_has_are_found_out():
    assert unknown_words(["ledger", "--verify", "--las"]) == ["--las"]
    assert unknown_words(["plc", "modbuss"]) == ["modbuss"]
    assert unknown_words(["keygen", "peer", "cam1", "--role", "camera"]) == []


# --- the index


def test_the_index_names_each_page_once():
    index = (ROOT / "docs/README.md").read_text()
    linked = [(ROOT / "docs" / target).resolve() for target in re.findall(r"\]\(([^)#:]+\.md)\)", index)]
    assert sorted(linked) == sorted({*linked})
    pages = {path.resolve() for path in (ROOT / "docs").rglob("*.md")} - {ROOT / "docs/README.md"}
    assert pages - {*linked} == set()
