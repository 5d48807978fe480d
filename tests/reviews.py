"""A line of rendered parts with an engine of its own: what was rejected, of which kind each reject truly is."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

import build_engines
from adapters.review.command import command, open_desk
from adapters.review.desk import Asked, Desk
from adapters.review.marks import Said, send_marks, wait_until_booked
from daemon.config import Config, load_config
from daemon.types import PartKey
from examples.parts import render_part, with_paint_dot, write_dataset
from tests.bundles import Pixels
from tests.daemons import Site, make_site
from tests.lines import send, settle, wait_for

SIZE = (128, 128)
QUICK = ("--budget", "0", "--size", "128", "--coreset", "500", "--false-reject", "0.1")
SCRATCH, DOT = "scratch", "dot of paint"
EACH = 24


def part_pixels(seed: int, defect: str | None) -> Pixels:
    """(H W 1). A dot of paint is no defect of examples/parts.py: it does no harm."""
    if defect == DOT:
        return with_paint_dot(render_part(seed, size_hw=SIZE)[0], seed)[:, :, None]
    return render_part(seed, size_hw=SIZE, defect=defect)[0][:, :, None]


@dataclass
class Reviewed:
    """The site and, by part, the true kind of everything that was sent."""

    site: Site
    truth: dict[PartKey, str] = field(default_factory=dict)

    @property
    def config(self) -> Config:
        return load_config(self.site.folder / "config.yaml")

    @property
    def desk(self) -> Desk:
        return open_desk(self.config)

    def inspect(self, kinds: list[str | None], seed: int) -> None:
        """Send parts of these kinds and wait until the rejected ones are recorded and in the ledger."""
        with self.site.line() as line:
            for seq, kind in enumerate(kinds):
                send(line, seq, part_pixels(seed + seq, kind))
            settle(line)
            keys = {PartKey("cam1", line.epoch, seq): kind or "good" for seq, kind in enumerate(kinds)}
            self.truth |= keys
            told = {seq: part.results[0] for seq, part in line.parts.items()}
            rejected = {
                PartKey("cam1", line.epoch, seq) for seq, header in told.items() if header["reason"] == "DEFECT"
            }
            wait_for(line, lambda: rejected <= {reject.key for reject in self.desk.newest(Asked())})

    def run(self, *arguments: str) -> Result:
        """`inspectd review ...` in this process."""
        where = ["--config", str(self.site.folder / "config.yaml")]
        return CliRunner().invoke(command, [arguments[0], *where, *arguments[1:]])

    def unmark_all(self) -> None:
        standing = [(each.key, each.reject.decided_ns) for each in self.desk.standing() if each.reject]
        if standing:
            decision = send_marks(self.config.control.bind, Said("none", None, "tests"), standing)
            assert wait_until_booked(self.desk, decision, len(standing))


def make_reviewed(folder: Path) -> Reviewed:
    """A running daemon whose engine `flange` has rejected scratched parts, and good ones with a dot of paint."""
    site = make_site(folder)
    write_dataset(folder / "dataset", good_train=48, good_test=1, defects_each=1, size_hw=SIZE, seed=5)
    (folder / "images").mkdir()
    (folder / "images/flange").symlink_to(folder / "dataset/train/good")
    places = ["--good", folder / "images/flange", "--out", folder / "engines", "--keys", folder / "keys"]
    done = CliRunner().invoke(build_engines.main, ["flange", *map(str, places), *QUICK])
    assert done.exit_code == 0, done.output
    site.config["cameras"]["cam1"] = {"product": "flange", "deadline_ms": 10_000, "valid_ms": 500}
    site.config["queue_mb"] = 64
    site.start()
    reviewed = Reviewed(site)
    kinds: list[Any] = [SCRATCH, DOT] * EACH + [None] * 6
    reviewed.inspect(kinds, seed=9_000_000)
    return reviewed
