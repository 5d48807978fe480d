"""What several files of tests share."""

from __future__ import annotations

import logging
import sys

import pytest

import build_engines
from daemon import cli
from tests.commands import Ended
from trainer.site import run_command

# Judge deadlines on a live daemon, or find their way in a browser: `make test` runs them after the others, one by one.
ALONE = ("tests/faults/", "tests/browser/", "tests/test_line.py", "tests/test_soak.py", "tests/test_swap.py")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.nodeid.startswith(ALONE):
            item.add_marker("alone")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where compiled kernels are kept: as systemd would have it, and not in the home of whoever runs the tests."""
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def run_here(monkeypatch, capsys):
    """The build command without a process of its own: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["build_engines.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run_command(build_engines.main)
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return run


@pytest.fixture
def inspectd(monkeypatch, capfd):
    """Runs the command in this process and gives how it ended; the logs are left as they were found."""
    logger = logging.getLogger("inspectd")
    before = (logger.handlers[:], logger.level, logger.propagate)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["inspectd", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        captured = capfd.readouterr()
        return Ended(code, captured.out, captured.err)

    yield run
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])
