"""Does the limit keep its word? False rejects among good images that neither bank nor limit has seen.

    python -m bench.limits [--data FOLDER]     (FOLDER/<set>/train/good and test/good)

Protocol: a seeded random third of the good images, at most 300, makes the bank; eight more serve the build's
settings and are used no further; the daemon's pipeline scores all others once. These scores, the pool, are
divided at random 200 times: n calibrate (trainer.calibrate.conformal_limit), the other m are judged.
What that covers and what not is said in NOTES, which the result file repeats.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import cv2
import numpy as np
from scipy.stats import betabinom, binom

from bench.record import ROOT, origin, write_result
from daemon.inspection.pipeline import Pipeline
from daemon.score import open_pipeline
from daemon.types import FloatArray, Frame
from examples.parts import render_part
from trainer.calibrate import conformal_limit, conformal_rank
from trainer.dataset import list_images, read_frame

TARGETS = (0.01, 0.05)
REDRAWS, SEED, MORE_BANKS = 200, 0, (1, 2, 3, 4)
LINE = 0.08  # redraws that may exceed bound95: 5 %, and room for a finite held-out part
OPTIONS = {"k": 9, "alpha": 0.25, "coreset": 4000, "budget": 0, "branches": "ldknn"}
MOST_BANK, SETTINGS = 300, 8
PARTS, PARTS_HW, FADES = 1000, (128, 128), (0.05, 0.3)
NOTES = {
    "n": "n is a quarter of the pool, and 99, which 1 % needs, where that leaves at least as many to be judged: the "
    "larger m is against n, the less the held-out rate's own noise adds to the exceedances of bound95, which is about "
    "the true rate. An exchangeable pool exceeds it in 7 to 8 % of the redraws at a quarter, in 9 to 12 % at a half. "
    "Of so few redraws the share itself is uncertain by 2 %: shareChance is the probability of at least this share.",
    "redraws": "A random redraw makes calibration and held-out scores exchangeable, whatever the pool. Without ties "
    "the count of false rejects then follows the beta-binomial distribution exactly (exactRate, exactShare), so "
    "redraws check the arithmetic from scores to rejects (rank, ties, float32), and not the data.",
    "redrawError": "The standard deviation over the redraws divided by their root. The redraws overlap, all being of "
    "one pool scored with one bank: it describes the noise of redrawing, not how far another pool, bank, camera or "
    "day would differ.",
    "captureOrder": "The first n images in order calibrate, all later ones are judged (the bank is still from the "
    "whole period). Order: ELPV as in its data set, procedural parts as rendered, folders train/good and then "
    "test/good by name. Where the order matters, the scores are not exchangeable and the promise does not cover them; "
    "chanceAtLeast and chanceAtMost are the probabilities of so many false rejects or more, or fewer, if they were.",
    "parts-fading": "The procedural parts' own engine and pool, but exposure falls evenly from the pool's first image "
    "to its last, by 5 % or by 30 % in all (where an LED's life is said to end); the bank has seen none of it.",
    "holds": "falseRejectRate <= target + 2 redrawError; null where n does not support the target. The limit is then "
    "the highest calibration score, made for the rate `promised`, and fallbackHolds is about that.",
}


@dataclass(frozen=True)
class CaptureOrder:
    """False rejects when the first n scores calibrate, and how odd the count is if they are exchangeable."""

    falseRejects: int
    falseRejectRate: float
    bound95: float
    withinBound: bool
    chanceAtLeast: float
    chanceAtMost: float
    coveredByPromise: bool = False


@dataclass(frozen=True)
class Kept:
    """How a limit for `target` did over the redraws; rates are shares of the m held-out scores."""

    target: float
    supported: bool
    promised: float
    n: int
    m: int
    redraws: int
    falseRejectRate: float
    exactRate: float
    redrawError: float
    allowed: float
    holds: bool | None
    fallbackHolds: bool | None
    bound95: float
    shareOverBound: float
    exactShare: float
    shareChance: float
    line: float
    withinLine: bool
    captureOrder: CaptureOrder


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True, file_okay=False), help="More sets, as folders.")
@click.option("--out", default="limits.json", show_default=True, help="File name below bench/results.")
def main(data: Path | None, out: str) -> None:
    """Build, score, redraw, write bench/results/limits.json; the last line is the verdicts as JSON."""
    result: dict[str, Any] = {
        **origin("torch", "openvino", "numpy", "scipy", "opencv-python-headless", "elpv-dataset"),
        "options": OPTIONS,
        "seed": SEED,
        "targets": list(TARGETS),
        "notes": NOTES,
        "products": {},
        "banks": {},
    }
    with TemporaryDirectory(prefix="inspectd-limits-") as name:
        for product, (write, size) in sources(data).items():
            folder = Path(name) / product
            write(folder)
            fades = FADES if product == "parts" else ()
            result["products"] |= measure_product(folder, product, size, SEED, fades)
            if product == "parts":
                again = {str(seed): measure_product(folder, product, size, seed)[product] for seed in MORE_BANKS}
                result["banks"] = {str(SEED): result["products"][product], **again}
    verdict = judge(result)
    print(write_result(out, {**result, "verdict": verdict}).relative_to(ROOT))
    print(json.dumps(verdict, separators=(",", ":")))


# Images


def sources(data: Path | None) -> dict[str, tuple[Callable[[Path], None], int]]:
    """Product -> (writes its good images in order into a folder, long side of the network's input)."""
    found: dict[str, tuple[Callable[[Path], None], int]] = {
        "elpv-mono": (partial(write_cells, kind="mono"), 256),
        "elpv-poly": (partial(write_cells, kind="poly"), 256),
        "parts": (write_parts, max(PARTS_HW)),
    }
    if data is not None:
        names = sorted(path.parent.name for path in data.glob("*/train") if (path / "good").is_dir())
        found |= {name: (partial(link_set, data / name), 256) for name in names}
    return found


def write_cells(folder: Path, kind: str) -> None:
    """The ELPV cells of this kind with defect probability 0, in the order of the data set."""
    from elpv_dataset.utils import load_dataset

    folder.mkdir(parents=True)
    images, probabilities, kinds = load_dataset()
    for index in np.flatnonzero((kinds == kind) & (probabilities == 0)):
        cv2.imwrite(str(folder / f"cell{index + 1:04d}.png"), images[index])


def write_parts(folder: Path) -> None:
    """Good flanges, each with its own pose, brush marks and exposure: exchangeable by construction."""
    folder.mkdir(parents=True)
    for part in range(PARTS):
        cv2.imwrite(str(folder / f"{part:04d}.png"), render_part(part, size_hw=PARTS_HW)[0])


def link_set(source: Path, folder: Path) -> None:
    """Links to train/good and then test/good, each in natural order, under names that keep it."""
    folder.mkdir(parents=True)
    images = [path for part in ("train", "test") for path in list_images(source / part / "good")]
    for index, path in enumerate(images):
        (folder / f"{index:04d}-{path.name}").symlink_to(path.resolve())


# Scores


def measure_product(folder: Path, product: str, size: int, seed: int, fades: Sequence[float] = ()) -> dict[str, Any]:
    """Build with this seed's bank and measure its pool, also with a lamp that fades by these shares."""
    images = list_images(folder)
    bank, settings, pool = divide(len(images), seed)
    with TemporaryDirectory(prefix="inspectd-limits-") as name:
        chosen = {"bank": [images[i] for i in bank], "settings": [images[i] for i in settings]}
        pipeline = build(Path(name), product, chosen, size, seed)
        paths = [images[i] for i in pool]
        variants = {product: score(pipeline, map(read_frame, paths))}
        for fade in fades:
            gains = 1 - fade * np.linspace(0, 1, len(paths))
            variants[f"{product}-fading-{fade:.0%}"] = score(pipeline, map(dim, map(read_frame, paths), gains))
        pipeline.backend.close()
    counts = {"good": len(images), "bank": len(bank), "settings": len(settings), "size": size, "bankSeed": seed}
    found = {variant: {**counts, **measure(scores, seed)} for variant, scores in variants.items()}
    for variant, measured in found.items():
        for kept in measured["targets"]:
            rate, allowed = kept["falseRejectRate"], kept["allowed"]
            print(f"{variant} bank {seed}: {kept['target']:.0%} rejected {rate:.2%}, allowed {allowed:.2%}", flush=True)
    return found


def divide(count: int, seed: int) -> tuple[list[int], list[int], list[int]]:
    """Indices of the bank's images (a random third, at most 300), the settings', and the others, each in order."""
    order = np.random.default_rng(seed).permutation(count)
    bank = min(count // 3, MOST_BANK)
    bounds = [bank, bank + SETTINGS]
    first, second, third = (sorted(part.tolist()) for part in np.split(order, bounds))
    return first, second, third


def build(place: Path, product: str, chosen: dict[str, list[Path]], size: int, seed: int) -> Pipeline:
    """The engine that build_engines.py makes of chosen bank and settings images, opened as the daemon does."""
    for folder, images in chosen.items():
        (place / folder).mkdir()
        for image in images:
            (place / folder / image.name).symlink_to(image.resolve())
    command = [sys.executable, str(ROOT / "build_engines.py"), product, "--good", "bank", "--select", "settings"]
    command += ["--calibration", "settings", "--size", str(size), "--seed", str(seed)]
    command += [word for key, value in OPTIONS.items() for word in (f"--{key}", str(value))]
    built = subprocess.run(command, cwd=place, check=True, stdout=subprocess.PIPE, text=True)
    return open_pipeline((place / built.stdout.strip().splitlines()[-1]).resolve(), place / "keys" / "trusted.yaml")


def score(pipeline: Pipeline, frames: Iterator[Frame]) -> FloatArray:
    """Scores (N,) float32 of the frames, as the daemon gives them."""
    return np.array([pipeline.anomaly_map(frame).score for frame in frames], np.float32)


def dim(frame: Frame, gain: float) -> Frame:
    """The frame with its grey levels times `gain` (at most 1), rounded."""
    return replace(frame, pixels=np.rint(frame.pixels * gain).astype(frame.pixels.dtype))


# The word of the limit


def measure(scores: FloatArray, seed: int = SEED) -> dict[str, Any]:
    """The pool's size, how many of its scores occur twice, its median, and a Kept for each target."""
    return {
        "pool": len(scores),
        "tied": len(scores) - len(np.unique(scores)),
        "medianScore": float(np.median(scores)),
        "targets": [asdict(redraw(scores, target, seed=seed)) for target in TARGETS],
    }


def calibration_size(pool: int) -> int:
    """A quarter of the pool, and what the strictest target needs where as many are left to be judged."""
    needed = math.ceil(1 / min(TARGETS)) - 1
    quarter = pool // 4
    return max(quarter, needed) if pool >= 2 * needed else quarter


def redraw(scores: FloatArray, target: float, redraws: int = REDRAWS, seed: int = SEED) -> Kept:
    """Divide the scores (N,), in capture order, at random again and again, and judge the held-out ones."""
    n = calibration_size(len(scores))
    m, rank = len(scores) - n, conformal_rank(n, target)
    generator = np.random.default_rng([seed, 1])
    counts = np.array([false_rejects(generator.permutation(scores), n, target) for _ in range(redraws)])
    rate, error = float(counts.mean()) / m, float(counts.std(ddof=1)) / m / math.sqrt(redraws)
    allowed = rank.supported + 2 * error
    over = int((counts > at_most(rank.bound95, m)).sum())
    share = exact_share(n, m, target)
    supported, kept = rank.supported <= target, rate <= allowed
    return Kept(
        target=target,
        supported=supported,
        promised=rank.supported,
        n=n,
        m=m,
        redraws=redraws,
        falseRejectRate=rate,
        exactRate=(n + 1 - rank.rank) / (n + 1),
        redrawError=error,
        allowed=allowed,
        holds=kept if supported else None,
        fallbackHolds=None if supported else kept,
        bound95=rank.bound95,
        shareOverBound=over / redraws,
        exactShare=share,
        shareChance=float(binom.sf(over - 1, redraws, share)),
        line=LINE,
        withinLine=over <= LINE * redraws,
        captureOrder=by_order(scores, n, target),
    )


def false_rejects(scores: FloatArray, n: int, target: float) -> int:
    """How many of scores[n:] the limit from scores[:n] rejects."""
    return int((scores[n:] >= np.float32(conformal_limit(scores[:n], target).limit)).sum())


def by_order(scores: FloatArray, n: int, target: float) -> CaptureOrder:
    """The first n of the scores (N,) calibrate, the later ones are judged."""
    m, rank, count = len(scores) - n, conformal_rank(n, target), false_rejects(scores, n, target)
    exchangeable = betabinom(m, n + 1 - rank.rank, rank.rank)
    return CaptureOrder(
        falseRejects=count,
        falseRejectRate=count / m,
        bound95=rank.bound95,
        withinBound=count <= at_most(rank.bound95, m),
        chanceAtLeast=float(exchangeable.sf(count - 1)),
        chanceAtMost=float(exchangeable.cdf(count)),
    )


def exact_share(n: int, m: int, target: float) -> float:
    """The probability that the held-out rate exceeds bound95 when n + m untied scores are exchangeable.

    The true rate follows Beta(n + 1 - rank, rank), and the count of m a binomial distribution given it.
    """
    rank = conformal_rank(n, target)
    return float(betabinom.sf(at_most(rank.bound95, m), m, n + 1 - rank.rank, rank.rank))


def at_most(rate: float, m: int) -> int:
    """The highest count of m whose rate does not exceed `rate`."""
    return math.floor(rate * m)


def judge(result: dict[str, Any]) -> dict[str, Any]:
    """The verdicts in brief; `holds` of the whole counts what n supports and leaves the rest out."""
    products = {name: _brief(measured["targets"]) for name, measured in result["products"].items()}
    banks = {seed: _brief(measured["targets"]) for seed, measured in result["banks"].items()}
    said = [kept["holds"] for group in (products, banks) for product in group.values() for kept in product.values()]
    return {"holds": all(holds for holds in said if holds is not None), "products": products, "banks": banks}


def _brief(targets: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Target -> the figures that a reader asks for first."""
    keys = ("supported", "holds", "n", "m", "falseRejectRate", "allowed", "shareOverBound", "exactShare", "withinLine")
    brief = {}
    for kept in targets:
        order = {
            key: kept["captureOrder"][key] for key in ("falseRejectRate", "bound95", "withinBound", "coveredByPromise")
        }
        brief[str(kept["target"])] = {**_rounded({key: kept[key] for key in keys}), "captureOrder": _rounded(order)}
    return brief


def _rounded(figures: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in figures.items()}


if __name__ == "__main__":
    main()
