"""The commands of the documents, found in their blocks and run in a folder as whoever reads the page would.

A block marked ```sh, or not marked at all, holds commands: one a line, a backslash goes on. Every other mark (text, yaml, python, ...) says
that it holds none. What never ends by itself, the daemon and what stands beside it, stays until the page's end, as in a terminal of its
own; given again, the one before is ended first, as by Ctrl-C. <!-- from here on: NAME --> goes over to another box.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from daemon.errors import ConfigError
from tests.daemons import ROOT

PASSWORD = "four words in a row"
PATIENCE_S = 120.0
PAGES = sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md"))
)
PAGES = list(dict.fromkeys(PAGES))

STAYS = {  # what never ends by itself, and what it says when it is at work
    "run": "ready run=",
    "dashboard": "serving http",
    "camera": "daemon connected",
    "plc": "lease fresh",
}
ASKS_THE_DAEMON = {*STAYS, "status", "activate", "rollback", "reset", "pause", "resume", "drain", "simulate", "doctor --peer"}  # fmt: skip
ASKS_THE_DAEMON -= {"run", "dashboard"}

# What cannot be run as it is printed, and why. Each is a whole command, on any page or on the one that it names.
NOT_RUN = {
    r"make (demo|test)\b.*": "CI runs both as they are printed (.ci/run); this suite is the second",
    r"git pull": "the network",
    r"(sudo apt|\S*python -m pip|sudo \S+python -m pip) install .*": "the network; .ci/run and `make .venv/.installed` do it",
    r"sudoedit .*|sudo systemctl edit .*": "an editor",
    r"(sudo )?(systemctl|journalctl) .*": "no systemd runs here; tests/test_systemd.py tries the units under their rules",
    r"sudo (chown|usermod) .*": "accounts that are not here; tests/test_systemd.py makes them in a folder",
    r"promtool .*": "tests/test_monitoring.py runs them where Debian's prometheus is installed",
    r"sudo modprobe .*": "a kernel module",
    r".*/etc/credstore.*": "systemd hands it back; tests/test_systemd.py starts a daemon with such a credential",
    r"README\.md: \S+ (activate|rollback)\b.*": "docs/how-to/update-an-engine.md runs both, beside a second engine and a camera",
    r"docs/review\.md: .*": "tests/test_review_line.py runs them, on a line that has rejected parts",
    r"inspectd camera (/dev/video0|genicam:) .*": "a camera; tests/test_live_cameras.py runs the same with Aravis' own",
}

CHANGED_BY_COMMANDS = ("config.yaml", "dashboard.yaml")
MADE = (
    "engines",
    "keys",
    "run",
    "demo",
    "images",
    "dashboard-users.yaml",
    "dashboard.secret",
    "node_modules",
    "build",
    "dist",
)

# What is put in place of what a page can only give as an example.
IN_PLACE = [
    # A build that takes seconds: the later of two options counts.
    (r"(build_engines\.py (?!.*--kind crr).*)", r"\1 --budget 0 --size 64 --coreset 100 --k 1 --alpha 0"),
    (r"(build_engines\.py .*--kind crr.*)", r"\1 --steps 40 --size 64 --threads 1"),
    (r"--shadow \d+", "--shadow 3"),
    # Somebody else's model: tests/test_pages.py makes one beside the images.
    (r"(inspectd import) model\.onnx", r"\1 images/model.onnx"),
    # The service's places, below a folder of the test's; `make install` as packagers do it, and what systemd adds to it.
    (r"sudo make install\b.*", "make install-files DESTDIR={box} && mkdir -p {box}/var/lib/inspectd/{{engines,keys}}"),
    (r"sudo (-u \S+ )?", ""),
    (r"/opt/inspectd/bin/", ".venv/bin/"),
    (r"(?<![\w}])/(opt|etc|var/lib)/", r"{box}/\1/"),
    (r"scp (\S+) newbox:inspectd/", r"cp \1 {boxes}/newbox/"),
]  # fmt: skip


@dataclass(frozen=True)
class Command:
    """One command of a page, and on which box it is given."""

    page: str
    number: int  # of its line
    text: str
    box: str

    def __str__(self) -> str:
        return f"{self.page}:{self.number}: {self.text}"


def commands_of(page: str, text: str | None = None) -> Iterator[Command]:
    """In the order of the page."""
    mark, box, joined = None, "", ""
    for number, line in enumerate((text or (ROOT / page).read_text()).splitlines(), 1):
        if line.lstrip().startswith("```"):
            mark = line.strip().removeprefix("```") if mark is None else None
        elif mark is None:
            other = re.fullmatch(r"<!-- from here on: (\w+) -->", line)
            box = other[1] if other else box
        elif mark in ("", "sh"):
            joined += line.strip()
            if joined.endswith("\\"):
                joined = joined.removesuffix("\\")
                continue
            if joined and not joined.startswith("#"):
                yield Command(page, number, joined, box)
            joined = ""


def reason_not_to_run(command: Command) -> str | None:
    """None where it is to be run."""
    return next((reason for pattern, reason in NOT_RUN.items() if is_meant(pattern, command)), None)


def is_meant(pattern: str, command: Command) -> bool:
    """Whether an entry of NOT_RUN is about this command: on any page, or on the one that it names."""
    return any(re.fullmatch(pattern, text) for text in (command.text, f"{command.page}: {command.text}"))


def subcommand(text: str) -> str | None:
    """`inspectd camera FOLDER ...` -> `camera`; None for what is no command of inspectd."""
    found = re.match(r"(?:\S*bin/)?inspectd ([a-z-]+)", text)
    return found[1] if found else None


def make_checkout(folder: Path) -> None:
    """The repository's files, the environment in its place, and nothing that anybody made."""
    folder.mkdir(parents=True)
    for path in ROOT.iterdir():
        if path.name in CHANGED_BY_COMMANDS:
            shutil.copy(path, folder)
        elif path.name not in MADE and not path.name.startswith(".") and path.suffix != ".egg-info":
            (folder / path.name).symlink_to(path)
    programs = folder / ".venv/bin"
    programs.mkdir(parents=True)
    for name, command in (("python", ""), ("inspectd", " -m daemon")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable}{command} "$@"\n')
        (programs / name).chmod(0o755)
    (folder / ".venv/.installed").touch()  # as `make .venv/.installed` leaves it
    for name in (
        "home",
        "box/etc/modules-load.d",
        "box/etc/prometheus",
    ):  # as on any box, and where Prometheus is installed
        (folder / name).mkdir(parents=True)


@dataclass
class Staying:
    process: subprocess.Popen[bytes]
    log: Path
    since_ns: int


_ports = count(20_000 + 2_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]))


def _port() -> int:
    """One that nobody holds, outside the range from which the kernel gives: it is used by several tests, minutes apart."""
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port := next(_ports)))
            return port


class Walk:
    """Through a page, in a folder that is a checkout.

    `by_the_way` starts and restarts the daemon where a page takes for granted that it runs with the keys and the configuration that are there.
    `built` is an engine that stands for what pages build (tests/sealed_again.py).
    """

    def __init__(
        self, folder: Path, *, ports: dict[str, int] | None = None, by_the_way: bool = False, built: Path | None = None
    ) -> None:
        self.folder = self.here = folder
        self.ports = {} if ports is None else ports
        self.said = ""
        self._by_the_way, self._built = by_the_way, built
        self._staying: dict[str, Staying] = {}
        self._logs = 0
        self._own_ports()

    def end(self) -> None:
        """Whatever stays is ended as by Ctrl-C, the last first, and must end with 0.

        A camera whose place a simulated line has taken ended by itself, and said so.
        """
        for name in reversed(self._staying):
            self._staying[name].process.send_signal(signal.SIGINT)
        codes = {name: staying.process.wait(60) for name, staying in self._staying.items()}
        replaced = {name for name, each in self._staying.items() if "another sender speaks as" in each.log.read_text()}
        codes = {name: code for name, code in codes.items() if code != ConfigError.exit_code or name not in replaced}
        logs = "".join(self._staying[name].log.read_text() for name, code in codes.items() if code)
        self._staying.clear()
        assert set(codes.values()) <= {0}, f"{codes}\n{logs}"

    def give_up(self) -> None:
        """What stays goes, however it ends."""
        for staying in self._staying.values():
            staying.process.kill()
            staying.process.wait(10)

    def run(self, command: Command) -> None:
        """Until it has ended with 0, or says that it is at work."""
        if command.box:
            self.here = self.folder.parent / command.box
        text = self._in_place(command.text)
        name = subcommand(text)
        if self._by_the_way and (name in ASKS_THE_DAEMON or (name == "doctor" and "--peer" in text)):
            self._see_to_the_daemon(text)
        if name in STAYS and not re.search(r"--(once|count)\b", text):
            self._stay(name + "".join(re.findall(r" --camera \S+", text)), text, STAYS[name])
            return
        asked = f"{PASSWORD}\n" if name == "dashboard-user" else ""
        done = subprocess.run(
            ["bash", "-c", text], cwd=self.here, env=self._environment(), input=asked, capture_output=True, text=True,
            timeout=PATIENCE_S, check=False,
        )  # fmt: skip
        self.said = done.stdout
        assert done.returncode == 0, f"{command}\n-> {text}\nended with {done.returncode}\n{done.stdout}{done.stderr}"
        self._own_ports()
        if name == "drain":  # a reader sees it end in its terminal
            assert self._staying.pop("run").process.wait(60) == 0

    def _stay(self, name: str, text: str, word: str) -> None:
        before = self._staying.pop(name, None)
        if before is not None:
            before.process.send_signal(signal.SIGINT)
            assert before.process.wait(60) == 0, before.log.read_text()
        self._logs += 1
        log = self.folder / f".log-{self._logs}"
        with log.open("wb") as file:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {text}"], cwd=self.here, env=self._environment(), stdout=file, stderr=file,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        self._staying[name] = Staying(process, log, time.time_ns())
        until = time.monotonic() + PATIENCE_S
        while word not in log.read_text():
            if process.poll() is not None:
                del self._staying[name]
                raise AssertionError(f"{text}\nended with {process.returncode}\n{log.read_text()}")
            assert time.monotonic() < until, f"{text}\ndoes not say {word!r}:\n{log.read_text()}"
            time.sleep(0.02)

    def _see_to_the_daemon(self, text: str) -> None:
        """As pages say in a sentence: the daemon runs, and was started again after a key was made."""
        named = re.search(r"--config (\S+)", text)
        config = self.here / (named[1] if named else "config.yaml")
        peers = config.parent / "keys/peers.yaml"
        running = self._staying.get("run")
        if running is None or running.since_ns < max(path.stat().st_mtime_ns for path in (config, peers)):
            self._stay("run", f".venv/bin/inspectd run --config {config}", STAYS["run"])

    def _in_place(self, text: str) -> str:
        places = {"box": self.folder / "box", "boxes": self.folder.parent}
        for pattern, other in IN_PLACE:
            text = re.sub(pattern, other.format(**places), text)
        if self._built is not None and "--kind crr" not in text:
            text = text.replace("python build_engines.py", "python -m tests.sealed_again")
        text = re.sub(r"\b(\w+)/\d{8}T\d{6}Z\b", lambda found: f"{found[1]}/{self.newest(found[1])}", text)
        return self._with_own_ports(text)

    def newest(self, engine: str) -> str:
        """The version of an engine that was built last."""
        return max(path.name for path in (self.here / "engines" / engine).iterdir() if path.name[0].isdigit())

    def _with_own_ports(self, text: str) -> str:
        """Every address of a page is this machine, at a port that nobody holds, the same wherever the page names it."""

        def own(found: re.Match[str]) -> str:
            port = found[1] if int(found[1]) in self.ports.values() else self.ports.setdefault(found[1], _port())
            return f"127.0.0.1:{port}"

        return re.sub(r"\b(?:127\.0\.0|192\.168\.\d+)\.\d+:(\d+)\b", own, text)

    def _own_ports(self) -> None:
        for folder in (self.here, *self.folder.glob("box/var/lib/*")):
            for path in folder.glob("*.yaml"):
                text = path.read_text()
                if (owned := self._with_own_ports(text)) != text:
                    path.write_text(owned)

    def _environment(self) -> dict[str, str]:
        path = f"{self.here}/.venv/bin:{os.environ['PATH']}"
        return {
            **os.environ,
            "PATH": path,
            "PYTHONPATH": str(ROOT),
            "HOME": f"{self.here}/home",
            "INSPECTD_BUILT": str(self._built),
        }


@contextmanager
def walking(folder: Path, **options: Any) -> Iterator[Walk]:
    """A walk whose programs are ended with the block."""
    walk = Walk(folder, **options)
    try:
        yield walk
        walk.end()
    finally:
        walk.give_up()
