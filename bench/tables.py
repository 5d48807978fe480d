"""Writes README's table of measured figures from bench/results/*.json, so that no number is typed by hand.

python -m bench.tables [--check]     (--check: exit 1 when README is not what the results say)
"""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from bench.record import RESULTS, ROOT

_BEGIN, _END = "<!-- measured:begin -->", "<!-- measured:end -->"


def table() -> str:
    """The block between the marks, from line.json, accuracy.json and demo.json."""
    line, accuracy, demo = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("line", "accuracy", "demo"))
    runs = {(run["precision"], run["threads"]): run for run in line["quietest"]}
    machine = line["machine"]
    rows = [("what", "measured"), ("---", "---")]
    for key in (("f32", 2), ("bf16", 2)):
        run = runs[key]
        stages = run["stages"]
        setting = f"{key[0]}, {key[1]} inference threads, half load"
        rows += [
            (f"arrival to verdict, {setting}", _times(stages["totalMs"])),
            (f"of it the daemon's own part, {setting}", _times(stages["ownMs"])),
            (f"throughput, {setting.rpartition(',')[0]}", f"{run['throughputPerS']} frames/s"),
        ]
    rows += [
        ("build from 300 images of 300x300 (the demo's)", f"{demo['buildSeconds']} s"),
        *(_accuracy_row(name, result, accuracy["options"]) for name, result in accuracy["sets"].items()),
        ("solar cells (the demo): image AUROC", f"{demo['imageAuroc']:.3f}"),
        (
            "solar cells: false rejects / promised bound",
            f"{demo['falseRejectRate']:.2%} / {demo['falseRejectBound95']:.2%}",
        ),
        ("solar cells: escapes", f"{demo['escapeRate']:.1%}"),
        ("solar cells: send to verdict at 25/s", f"p50 {demo['p50Ms']:.1f} ms, p99 {demo['p99Ms']:.1f} ms"),
    ]
    frame, network = _by(line["frameHw"]), _by(line["networkHw"])
    head = (
        f"{machine['processor']}, {machine['cores']} cores (shared). Frames of {frame}, network input {network}, "
        f"{line['bankRows']} rows, through the encrypted sockets, the quietest of the rounds. Made by "
        "`python -m bench.tables` from [bench/results](bench/results), which say commit, versions and options."
    )
    return "\n".join([_BEGIN, head, "", *(f"| {left} | {right} |" for left, right in rows), _END])


def _accuracy_row(name: str, result: dict[str, Any], options: dict[str, Any]) -> tuple[str, str]:
    image, pixel = result["imageAuroc"], result["pixelAuroc"]
    return (
        f"{name}, {options['coreset']} rows: image / pixel AUROC, mean and spread of three seeds",
        f"{image['mean']:.3f} ± {image['std']:.3f} / {pixel['mean']:.3f} ± {pixel['std']:.3f}",
    )


def _times(statistics: dict[str, float]) -> str:
    return f"p50 {statistics['p50']:.1f} ms, p99 {statistics['p99']:.1f} ms"


def _by(size: list[int]) -> str:
    return "x".join(map(str, size))


@click.command()
@click.option("--check", is_flag=True)
def main(check: bool) -> None:  # noqa: FBT001 - click
    """Write the table, or say whether README has it."""
    path = ROOT / "README.md"
    text = path.read_text()
    before, _, rest = text.partition(_BEGIN)
    wanted = before + table() + rest.partition(_END)[2]
    if check:
        sys.exit(
            0
            if text == wanted
            else "README.md: the measured table is not what bench/results say; python -m bench.tables"
        )
    path.write_text(wanted)


if __name__ == "__main__":
    main()
