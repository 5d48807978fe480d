"""What several files of tests share."""

from __future__ import annotations

import sys

import pytest

import build_engines
from trainer.site import run_command


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
