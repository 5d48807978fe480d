"""The house as the design draws it: who may import whom, and how long things may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DAEMON = ROOT / "daemon"
FILES = sorted(DAEMON.rglob("*.py"))
NAMES = [path.relative_to(ROOT).as_posix() for path in FILES]
WINGS = ("inspection", "line", "record")
FOREIGN = {
    "torch",
    "torchvision",
    "timm",
    "trainer",
    "adapters",
    "sklearn",
    "scipy",
    "matplotlib",
    "examples",
    "tests",
    "onnx",
}
CELLAR = {"types", "errors", "yamlfile"}
GROUND = {"bundle", "config", "endpoints", "keys", "logs"}
KNOW_ALL_WINGS = {"dispatch", "service"}

MOST_FILE_LINES = 350
MOST_FUNCTION_LINES = 60
MOST_HOT_LINES = 900
HOT_PATH = (
    "types.py", "line/wire.py", "inspection/pipeline.py", "inspection/verdict.py", "inspection/backend/__init__.py",
    "inspection/backend/cpu.py",
)  # fmt: skip


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere in it, also inside functions, as an absolute dotted name."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room(dotted: str) -> str:
    """daemon.line.wire -> line; daemon.types.Frame -> types."""
    return dotted.split(".")[1]


def rooms_used(path: Path) -> set[str]:
    """The rooms and wings of the daemon that a file imports, its own included."""
    known = {entry.stem for entry in DAEMON.iterdir()}
    return {room(name) for name in imports(path) if name.startswith("daemon.") and room(name) in known}


def own_room(path: Path) -> str:
    return path.relative_to(DAEMON).with_suffix("").parts[0]


def test_there_is_something_to_hold_to_the_rules() -> None:
    assert {"daemon/types.py", "daemon/line/wire.py", "daemon/inspection/pipeline.py"} <= set(NAMES)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_daemon_knows_neither_the_trainer_nor_its_libraries(path: Path) -> None:
    assert {name.partition(".")[0] for name in imports(path)} & FOREIGN == set()


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_run_downwards_only(path: Path) -> None:
    """types, errors < the ground floor < the wings, which do not know each other < the rooms above them."""
    own = own_room(path)
    used = rooms_used(path) - {own}
    if own in CELLAR:
        assert used <= CELLAR
    elif own in GROUND or own in WINGS:
        assert used <= CELLAR | GROUND
    elif own not in KNOW_ALL_WINGS:
        assert not used >= set(WINGS)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_nothing_but_the_command_line_knows_the_command_line(path: Path) -> None:
    if own_room(path) not in ("cli", "__main__"):
        assert rooms_used(path) & {"cli", "__main__"} == set()


def test_rooms_do_not_import_each_other_in_a_circle() -> None:
    below = {own_room(path): set() for path in FILES}
    for path in FILES:
        below[own_room(path)] |= rooms_used(path) - {own_room(path)}
    while free := [name for name, used in below.items() if not used & set(below)]:
        for name in free:
            del below[name]
    assert below == {}


def test_wire_knows_no_socket_no_clock_and_no_image() -> None:
    used = {name.partition(".")[0] for name in imports(DAEMON / "line" / "wire.py")}
    assert used & {"zmq", "socket", "time", "datetime", "cv2", "numpy"} == set()


def test_only_the_backends_know_openvino() -> None:
    users = [
        path.relative_to(DAEMON).as_posix() for path in FILES if any(n.startswith("openvino") for n in imports(path))
    ]
    assert {user for user in users if not user.startswith("inspection/backend/")} <= {"doctor.py"}  # tells its version
    assert "inspection/backend/__init__.py" not in users


def test_nothing_is_ever_unpickled() -> None:
    forbidden = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve"}
    users = [path.name for path in FILES if {name.partition(".")[0] for name in imports(path)} & forbidden]
    assert users == []


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(tree(path))


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_file_is_short_enough_to_read_at_a_sitting(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < MOST_FILE_LINES


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_functions_are_short(path: Path) -> None:
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > MOST_FUNCTION_LINES} == {}


def test_hot_path_can_be_read_in_a_quarter_of_an_hour() -> None:
    lines = [len((DAEMON / name).read_text(encoding="utf-8").splitlines()) for name in HOT_PATH]
    assert sum(lines) <= MOST_HOT_LINES
