"""Does the trainer choose well? Every setting of its grid on real defects, against what it took from good images alone.

    python -m bench.choice --data FOLDER       (FOLDER/<set>/train/good, test/...; ELPV beside them)

For each set and seed: the trainer chooses as in a build (trainer/choose.py, 30 ms a frame); then every setting of the
views that it tried gets a bank of the training images and is judged by the image AUROC on real defects. Reported:
plain 1-NN at the default input, the chosen setting, the best of the grid at that input and of all views, and the rank
correlation of merit and real AUROC. The test images choose nothing. Runs that are there already are not made again.
"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
from scipy.stats import spearmanr

from bench.accuracy import ELPV, halve, write_elpv
from bench.record import RESULTS, origin, write_result
from daemon.bundle import Preprocessing
from trainer import choose, dataset, grid
from trainer.backbone import Backbone, load_backbone
from trainer.dataset import Picture, Splits
from trainer.export import EngineNetwork
from trainer.features import FeatureNetwork, read_pixels
from trainer.merit import Truth, auroc
from trainer.settings import Settings, View

_OUT = "choice.json"


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--sets", default="", help="Names, comma separated; default: all in the folder, and ELPV's two.")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
def main(*, data: Path, sets: str, seeds: str, threads: int) -> None:
    """Choose, then judge the whole grid; written after each run."""
    names = sets.split(",") if sets else [*sorted(path.parent.name for path in data.glob("*/train")), *ELPV]
    path = RESULTS / _OUT
    runs: dict[str, Any] = json.loads(path.read_text())["runs"] if path.exists() else {}
    backbone = load_backbone()
    for seed in map(int, seeds.split(",")):
        for name in names:
            if f"{name} | seed {seed}" in runs:
                continue
            runs[f"{name} | seed {seed}"] = found = one_run(backbone, data, name, seed, threads)
            write_result(_OUT, {**origin("torch", "openvino", "numpy"), "protocol": __doc__, "runs": runs})
            shown = {key: found[key] for key in ("plain", "chosen", "bestAtInput", "best", "rankCorrelation")}
            print(name, seed, found["settings"], shown, flush=True)


def one_run(backbone: Backbone, data: Path, name: str, seed: int, threads: int) -> dict[str, Any]:
    """The trainer's choice, and the image AUROC on real defects of every setting that it tried."""
    with tempfile.TemporaryDirectory(prefix="inspectd-choice-") as temporary:
        place = Path(temporary)
        folder = write_elpv(place / name, name, seed) if name in ELPV else data / name
        calibration, tested = halve(folder, place, seed)
        splits = dataset.split(folder / "train" / "good", None, calibration, threads)
        choice = choose.choose(backbone, splits, choose.Wishes(), threads=threads, seed=seed, seconds=math.inf)
        real: dict[Settings, float] = {}
        for view in dict.fromkeys((trial.settings.long_side, trial.settings.view) for trial in choice.trials):
            of_view = [each.settings for each in choice.trials if (each.settings.long_side, each.settings.view) == view]
            real |= judge(backbone, splits, tested, of_view, seed=seed, threads=threads)
    assert choice.plain is not None
    plain, at_input = choice.plain.settings, (choice.settings.long_side, choice.settings.view)
    merits = [trial.merit.value for trial in choice.trials]
    return {
        "set": name,
        "seed": seed,
        "settings": choose.in_words(choice.settings),
        "reason": choice.reason,
        "plain": real[plain],
        "chosen": real[choice.settings],
        "bestAtInput": max(value for key, value in real.items() if (key.long_side, key.view) == at_input),
        "best": max(real.values()),
        "bestSettings": choose.in_words(max(real, key=lambda key: real[key])),
        "rankCorrelation": float(spearmanr(merits, [real[trial.settings] for trial in choice.trials])[0]),
        "grid": [
            {**asdict(trial.settings), "merit": trial.merit.value, "real": real[trial.settings]}
            for trial in choice.trials
        ],
    }


def judge(
    backbone: Backbone, splits: Splits, tested: Path, settings: list[Settings], *, seed: int, threads: int
) -> dict[Settings, float]:
    """Image AUROC of settings that share one view, the bank of all training images."""
    long_side, view = settings[0].long_side, View(**asdict(settings[0].view))
    size = dataset.network_size(splits.train, long_side)
    preprocessing = Preprocessing(size=size, mean=backbone.mean, std=backbone.std)
    network = FeatureNetwork(EngineNetwork(backbone, view), preprocessing, threads)
    banked = grid.GridBank(
        network, (read_pixels(picture, preprocessing) for picture in splits.train),
        coresets=sorted({each.coreset for each in settings}), neighbours=sorted({each.k for each in settings}),
        threads=threads, seed=seed,
    )  # fmt: skip
    labelled = [(path, kind.name != "good") for kind in sorted((tested / "test").iterdir()) for path in kind.iterdir()]
    defective = np.array([is_defective for _, is_defective in labelled])
    pictures = (read_pixels(Picture(path, (0, 0), ""), preprocessing) for path, _ in labelled)
    truth = Truth(defective[:, None], np.arange(len(defective)))
    scores = banked.score(pictures, grid.sampled_map(size), truth)
    return {each: auroc(scores.maps(each).max(1), defective) for each in settings}


if __name__ == "__main__":
    main()
