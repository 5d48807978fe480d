"""A dashboard beside a site's daemon: its files, its process, and what tests put into the books without a daemon."""

from __future__ import annotations

import json
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

from adapters.dashboard.users import Role, save_user
from daemon.record.journal import Journal
from daemon.record.ledger import Ledger
from daemon.record.recorder import Recorder, Reject
from tests.daemons import Site, free_port

PASSWORD = "four words in a row"
STATE: dict[str, Any] = {"t": "run", "run": "r1", "ns": 1, "streams": {}, "pending": []}


def png(value: int = 128, size: tuple[int, int] = (64, 64)) -> bytes:
    return cv2.imencode(".png", np.full(size, value, np.uint8))[1].tobytes()


def set_up(site: Site, **changes: Any) -> Path:
    """dashboard.yaml, an operator and a viewer; the config's path."""
    site.write_config()
    path = site.folder / "dashboard.yaml"
    known = {"version": 1, "bind": f"127.0.0.1:{free_port()}", "peer": "keys/line.peer.yaml"}
    path.write_text(yaml.safe_dump({**known, **changes}))
    add_user(site, "olga", "operator")
    add_user(site, "vic", "viewer")
    return path


def add_user(site: Site, name: str, role: Role, password: str = PASSWORD) -> None:
    save_user(site.folder / "dashboard-users.yaml", name, role, password)


def rejected(
    number: int, *, ns: int, camera: str = "cam1", epoch: str = "e1", reason: str = "DEFECT"
) -> dict[str, Any]:
    """A verdict as the journal has it."""
    part = {"camera": camera, "epoch": epoch, "seq": number, "partId": f"part-{number}", "ns": ns}
    judged = {"outcome": "REJECT", "reason": reason, "score": 2.5, "limit": 1.0, "pValue": 0.05, "engine": "digest"}
    return {"t": "verdict", **part, **judged}


def write_books(site: Site, *records: dict[str, Any]) -> None:
    """Into the journal, and from there into the ledger, as the daemon does."""
    journal = Journal(site.folder / "run/ledger")
    journal.begin(STATE, time.time_ns())
    journal.write(*records)
    journal.close()
    ledger = Ledger(site.folder / "run/ledger")
    ledger.fill()
    ledger.close()


def record_frame(site: Site, record: dict[str, Any], **pictures: bytes) -> None:
    """The frame of a reject, as the recorder keeps it."""
    recorder = Recorder(site.folder / "run/rejects", 10**8)
    header = {key: record[key] for key in ("camera", "epoch", "seq", "partId", "reason", "score", "limit")}
    region = {"x": 24, "y": 24, "w": 16, "h": 16, "area": 256, "peak": 2.5}
    header |= {"decidedNs": record["ns"], "outcome": "REJECT", "regions": [region]}
    recorder.submit(Reject(header, 1000, lambda: ("png", png()), pictures))
    assert recorder.write_waiting() == 1


@dataclass
class Shown:
    """A dashboard in a process of its own."""

    site: Site
    config: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        known = yaml.safe_load(self.config.read_text())
        return f"{'https' if known.get('tls') else 'http'}://{known['bind']}"

    @property
    def log(self) -> str:
        return (self.site.folder / "dashboard.log").read_text()

    def start(self, *program: str, timeout_s: float = 30.0, context: ssl.SSLContext | None = None) -> None:
        """Until it serves its login page."""
        command = [*(program or (sys.executable,)), "-m", "daemon", "dashboard", "--config", str(self.config)]
        with (self.site.folder / "dashboard.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=self.site.variables(), cwd=self.site.folder
            )
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise AssertionError(f"the dashboard ended with {self.process.returncode}:\n{self.log}")
            try:
                with urllib.request.urlopen(f"{self.url}/login", timeout=1, context=context) as answer:
                    assert answer.status == 200
                    return
            except OSError:
                time.sleep(0.05)
        raise AssertionError(f"the dashboard does not serve after {timeout_s} s:\n{self.log}")

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)


def events(site: Site) -> list[dict[str, Any]]:
    """What the journal says that people changed."""
    return [record for record in site.journal() if record["t"] == "event"]


def message(text: str | bytes) -> dict[str, Any]:
    """A WebSocket text as the page reads it."""
    return json.loads(text)


def log_in(page: Any, name: str = "olga", password: str = PASSWORD) -> None:
    """On the login page of a browser."""
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill(password)
    page.get_by_role("button", name="Log in").click()
