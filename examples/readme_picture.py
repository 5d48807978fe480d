"""Makes docs/parts.png: rendered parts through an engine built from rendered good ones.

python -m examples.readme_picture
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from daemon.inspection.pipeline import map_at_frame_size
from daemon.score import open_pipeline
from daemon.types import Frame
from examples.parts import DEFECTS, render_part, write_dataset

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_dataset(place / "parts", good_train=60, good_test=1, defects_each=1)
        command = [sys.executable, str(ROOT / "build_engines.py"), "part", "--good", str(place / "parts/train/good")]
        subprocess.run([*command, "--false-reject", "0.05", "--budget", "0"], cwd=place, check=True)
        pipeline = open_pipeline(place / "engines/part/current", place / "keys/trusted.yaml")
        figure, axes = plt.subplots(2, 1 + len(DEFECTS), figsize=(12, 4.4), constrained_layout=True)
        for column, defect in enumerate((None, *DEFECTS)):
            pixels, _ = render_part(9_000_000 + column, defect=defect)
            anomaly = pipeline.anomaly_map(Frame(pixels[:, :, None]))
            verdict = pipeline.judge(anomaly, "part")
            axes[0, column].imshow(pixels, cmap="gray", vmin=0, vmax=255)
            axes[0, column].set_title((defect or "good").replace("_", " "), fontsize=10)
            axes[1, column].imshow(pixels, cmap="gray", vmin=0, vmax=255)
            axes[1, column].imshow(
                map_at_frame_size(anomaly), cmap="inferno", alpha=0.55, vmin=0, vmax=2 * (verdict.limit or 1)
            )
            axes[1, column].set_title(f"{verdict.outcome.value}  {verdict.score:.1f} / {verdict.limit:.1f}", fontsize=9)
        for panel in axes.flat:
            panel.axis("off")
        figure.savefig(ROOT / "docs" / "parts.png", dpi=80)


if __name__ == "__main__":
    main()
