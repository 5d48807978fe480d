"""Makes docs/dashboard-*.png: rendered parts of four cameras, an engine built from rendered good ones, Chromium.

python -m examples.dashboard_pictures        (Debian's chromium; a second engine is there to be activated)
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from adapters.line import Line
from adapters.review.command import command as review
from daemon.keys import make_peer, make_server_key
from daemon.types import RawFrame
from examples.parts import DEFECTS, render_part, write_dataset
from tests.daemons import Site, tcp
from tests.dashboards import Shown, log_in, set_up

ROOT = Path(__file__).resolve().parent.parent
CAMERAS = ("left", "right", "top", "exit")
SIZE = (300, 400)
ROUNDS = 40
COLOURS = 128  # of a picture in the documents: text stays sharp, frames stay frames, a file stays small


def build(place: Path) -> None:
    """Two engines of the same parts, the first at work."""
    write_dataset(place / "parts", good_train=60, good_test=1, defects_each=1, size_hw=SIZE)
    command = [sys.executable, str(ROOT / "build_engines.py"), "flange", "--good", str(place / "parts/train/good")]
    for seed in ("0", "1"):
        subprocess.run([*command, "--false-reject", "0.05", "--budget", "0", "--seed", seed], cwd=place, check=True)
        time.sleep(1)  # versions are named by the second


def site_of(place: Path) -> Site:
    make_server_key(place / "keys")
    make_peer(place / "keys", "line", ["camera", "subscriber", "bridge"], ["*"])
    config: dict[str, Any] = {
        "version": 1, "line": "flanges", "inputs": [{"kind": "router", "bind": tcp()}],
        "results": {"bind": tcp(), "heatmap": True, "frame_every_ms": 500}, "permits": {"bind": tcp()},
        "control": {"bind": "ipc://run/control.sock"}, "backend": {"kind": "cpu", "threads": 2},
        "cameras": {name: {"product": "flange", "deadline_ms": 5000, "valid_ms": 500} for name in CAMERAS},
    }  # fmt: skip
    return Site(place, config)


def frame(line: Line, number: int) -> RawFrame:
    """Mostly good parts; each camera has its own, and a defect now and then, of every kind in turn."""
    place = CAMERAS.index(line.camera)
    defect = DEFECTS[(number + place) % len(DEFECTS)] if (number + 2 * place) % 7 == 3 else None
    pixels, _ = render_part(10_000 * (place + 1) + number, size_hw=SIZE, defect=defect)
    payload = memoryview(pixels.tobytes())
    part_id = f"{line.camera[0].upper()}-{1000 + number}"
    return RawFrame(
        line.camera, line.epoch, number, part_id, time.time_ns(), "raw", pixels.shape, "Mono8", None, payload
    )


def pump(lines: list[Line], rounds: int = 1) -> None:
    """All in turns: each is a bridge whose lease must not run out."""
    for _ in range(rounds):
        for line in lines:
            line.pump(8)


def keep(page: Any, name: str) -> None:
    """A screenshot in few colours, as a PNG with a palette."""
    from PIL import Image

    path = ROOT / "docs" / f"dashboard-{name}.png"
    picture = cv2.imdecode(np.frombuffer(page.screenshot(), np.uint8), cv2.IMREAD_COLOR)
    image = Image.fromarray(np.ascontiguousarray(picture[:, :, ::-1]))
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size // 1000} kB")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="inspectd-pictures-") as name, ExitStack() as stack:
        place = Path(name)
        build(place)
        site = site_of(place)
        shown = Shown(site, set_up(site))
        site.start()
        stack.callback(site.stop)
        shown.start()
        stack.callback(shown.stop)
        lines = [stack.enter_context(site.line(camera)) for camera in CAMERAS]
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
            page = browser.new_page(viewport={"width": 1180, "height": 820})
            page.goto(shown.url)
            log_in(page)
            page.locator("[data-camera]").first.wait_for()
            for number in range(ROUNDS):
                parts = [line.send(frame(line, number)) for line in lines]
                while not all(part.results for part in parts):
                    pump(lines)
            page.locator("canvas[data-part]").nth(len(CAMERAS) - 1).wait_for()
            pump(lines, 20)
            keep(page, "line")
            page.locator(".rejects button").first.click()
            page.locator("dialog canvas[aria-label*=regions]").wait_for()
            keep(page, "part")
            page.get_by_role("dialog").get_by_role("button", name="Close").click()
            review.main(["groups", "--config", str(place / "config.yaml")], standalone_mode=False)
            for view, rest in (
                ("History", "history"),
                ("Review", "review"),
                ("Scores", "scores"),
                ("Engines", "engines"),
                ("Permits and books", "books"),
            ):
                page.get_by_role("link", name=view, exact=True).click()
                page.wait_for_load_state("networkidle")
                pump(lines, 40)
                keep(page, rest)
            browser.close()


if __name__ == "__main__":
    main()
