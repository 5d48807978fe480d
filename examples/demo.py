"""`make demo`: an engine from 300 good solar cells, then 400 held-out cells through the daemon, with CURVE on.

The cells are electroluminescence images of the package elpv-dataset (Deitsch et al.; data CC BY-NC-SA 4.0),
monocrystalline ones only: defect probability 0 counts as good, 1 as defect. Everything is written below
demo/: keys, engine, config, images, results.jsonl, summary.json, overview.png.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

from daemon.score import open_pipeline, read_image
from daemon.types import Frame

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo"
PRODUCT = "solar-mono"
GOOD_TO_TRAIN, GOOD_ON_LINE, DEFECTS_ON_LINE = 300, 250, 150
RATE = 25
SEED = 0


def main() -> None:
    """The story from top to bottom; exits non-zero when frames and verdicts differ."""
    started = time.monotonic()
    shutil.rmtree(DEMO, ignore_errors=True)
    DEMO.mkdir()
    say("1  cells: 300 good ones to train, 250 good and 150 defective ones for the line")
    write_cells()
    say("2  keys: the server's, and one peer that is camera, subscriber and PLC bridge at once")
    inspectd("keygen", "server", "--keys", "keys")
    roles = [word for role in ("camera", "subscriber", "bridge") for word in ("--role", role)]
    inspectd("keygen", "peer", "line", *roles, "--keys", "keys")
    say("3  engine: features, memory bank, density, conformal limit, golden frames, signature")
    build_seconds, bundle = build_engine()
    say(f"   built in {build_seconds:.1f} s: {bundle.relative_to(ROOT)} (open report.html in it)")
    write_config()
    say(f"4  line: the daemon with CURVE on, {GOOD_ON_LINE + DEFECTS_ON_LINE} cells at {RATE} a second")
    counts, code = run_line()
    rows = [json.loads(text) for text in (DEMO / "results.jsonl").read_text().splitlines()]
    summary = summarise(counts, rows, json.loads((bundle / "manifest.json").read_text()), build_seconds)
    (DEMO / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    say("5  pictures: the six worst rejects and the six closest passes")
    draw_overview(bundle, rows)
    show(summary, time.monotonic() - started)
    sys.exit(code)


def say(text: str) -> None:
    print(text, flush=True)


def write_cells() -> None:
    """Mixed by a fixed seed, so that training and line see cells of the same modules."""
    from elpv_dataset.utils import load_dataset

    images, probabilities, kinds = load_dataset()
    generator = np.random.default_rng(SEED)
    mono = kinds == "mono"
    good = generator.permutation(np.flatnonzero(mono & (probabilities == 0)))
    defects = generator.permutation(np.flatnonzero(mono & (probabilities == 1)))
    for folder, indices in (
        ("train", good[:GOOD_TO_TRAIN]),
        ("line/good", good[GOOD_TO_TRAIN : GOOD_TO_TRAIN + GOOD_ON_LINE]),
        ("line/defect", defects[:DEFECTS_ON_LINE]),
    ):
        (DEMO / folder).mkdir(parents=True)
        for number, index in enumerate(indices):
            cv2.imwrite(str(DEMO / folder / f"{number:03d}-cell{index + 1:04d}.png"), images[index])


def inspectd(*arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "daemon", *arguments], cwd=DEMO, check=True, stdout=subprocess.DEVNULL, env=environment()
    )


def environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}


def build_engine() -> tuple[float, Path]:
    command = [sys.executable, str(ROOT / "build_engines.py"), PRODUCT, "--good", "train", "--seed", str(SEED)]
    command += ["--budget", "1"]
    started = time.monotonic()
    built = subprocess.run(command, cwd=DEMO, check=True, stdout=subprocess.PIPE, text=True, env=environment())
    return time.monotonic() - started, (DEMO / built.stdout.strip().splitlines()[-1]).resolve()


def write_config() -> None:
    """The shipped config, with one camera and ports that nobody holds."""
    import socket

    def port() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    config: dict[str, Any] = yaml.safe_load((ROOT / "config.yaml").read_text())
    config["inputs"] = [{"kind": "router", "bind": f"tcp://127.0.0.1:{port()}"}]
    config["results"]["bind"] = f"tcp://127.0.0.1:{port()}"
    config["permits"]["bind"] = f"tcp://127.0.0.1:{port()}"
    config["metrics"] = {"bind": f"127.0.0.1:{port()}"}
    config["cameras"] = {"cam1": config["cameras"]["cam1"]}
    (DEMO / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def run_line() -> tuple[dict[str, Any], int]:
    """Daemon and simulator as processes of their own; the simulator's counts and exit code."""
    run = [sys.executable, "-m", "daemon", "--log-level", "warning"]
    with (DEMO / "daemon.log").open("w") as log:
        daemon = subprocess.Popen([*run, "run"], cwd=DEMO, stderr=log, env=environment())
        try:
            command = [*run, "simulate", "line", "--peer", "keys/line.peer.yaml", "--rate", str(RATE)]
            command += ["--shuffle", "--seed", str(SEED), "--results", "results.jsonl"]
            simulated = subprocess.run(
                command, cwd=DEMO, stdout=subprocess.PIPE, text=True, env=environment(), check=False
            )
        finally:
            daemon.terminate()
            daemon.wait(60)
    if not simulated.stdout:
        sys.exit(f"the simulator ended with {simulated.returncode}; the daemon's log is {DEMO / 'daemon.log'}")
    return json.loads(simulated.stdout.splitlines()[-1]), simulated.returncode


def summarise(
    counts: dict[str, Any], rows: list[dict[str, Any]], manifest: dict[str, Any], build_seconds: float
) -> dict[str, Any]:
    from trainer.metrics import image_auroc

    scored = [row for row in rows if row["score"] is not None]
    labels = np.array([row["label"] == "defect" for row in scored])
    auroc = image_auroc(labels, np.array([row["score"] for row in scored]))
    # Rates of the engine: what a busy machine made LATE is in deadlineMissed.
    judged = [row for row in rows if row["reason"] in (None, "DEFECT")]
    rejected = [row["outcome"] == "REJECT" for row in judged if row["label"] == "good"]
    escaped = [row["outcome"] == "PASS" for row in judged if row["label"] == "defect"]
    product = manifest["products"][PRODUCT]
    return {
        **{key: counts[key] for key in ("sent", "verdicts", "missing", "deadlineMissed", "p50Ms", "p99Ms")},
        "imageAuroc": round(auroc, 4) if auroc is not None else None,
        "falseRejectRate": _share(rejected),
        "falseRejectTarget": product["targetFalseReject"],
        "falseRejectBound95": round(product["bound95"], 4),
        "escapeRate": _share(escaped),
        "buildSeconds": round(build_seconds, 1),
    }


def _share(found: list[bool]) -> float | None:
    return round(sum(found) / len(found), 4) if found else None


def draw_overview(bundle: Path, rows: list[dict[str, Any]]) -> None:
    """demo/overview.png: each frame beside its heatmap, the score against the limit."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    pipeline = open_pipeline(bundle, DEMO / "keys" / "trusted.yaml")
    ranked = sorted((row for row in rows if row["score"] is not None), key=lambda row: -row["score"])
    worst = [row for row in ranked if row["outcome"] == "REJECT"][:6]
    closest = [row for row in ranked if row["outcome"] == "PASS"][:6]
    figure, axes = plt.subplots(4, 6, figsize=(15, 11), constrained_layout=True)
    figure.suptitle("Worst rejects (above) and closest passes (below): the frame, and where the engine looks")
    for panel in axes.flat:
        panel.axis("off")
    for block, chosen in ((0, worst), (2, closest)):
        for column, row in enumerate(chosen):
            frame = read_image(DEMO / "line" / row["file"])
            draw_pair(axes[block : block + 2, column], frame, row, pipeline)
    figure.savefig(DEMO / "overview.png", dpi=80)
    plt.close(figure)


def draw_pair(axes: Any, frame: Frame, row: dict[str, Any], pipeline: Any) -> None:
    from daemon.inspection.pipeline import map_at_frame_size

    anomaly = map_at_frame_size(pipeline.anomaly_map(frame))
    axes[0].imshow(frame.pixels[:, :, 0], cmap="gray")
    axes[0].set_title(f"{row['outcome']}  {row['score']:.2f} / {row['limit']:.2f}\nlabel: {row['label']}", fontsize=9)
    axes[1].imshow(frame.pixels[:, :, 0], cmap="gray")
    axes[1].imshow(anomaly, cmap="inferno", alpha=0.6, vmin=0, vmax=2 * row["limit"])


def show(summary: dict[str, Any], seconds: float) -> None:
    width = max(map(len, summary))
    say("")
    for key, value in summary.items():
        say(f"   {key:<{width}}  {value}")
    say(f"\n   {seconds:.0f} s in all. Look at demo/overview.png, demo/results.jsonl and demo/daemon.log.")


if __name__ == "__main__":
    main()
