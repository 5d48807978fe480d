"""report.html: what a person needs to judge an engine, in one file that opens anywhere and prints well."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from daemon.bundle import Product
from daemon.inspection.pipeline import Pipeline, for_display, heat
from daemon.types import AnomalyMap, ByteArray, Frame
from trainer.calibrate import GoodScores, conformal_rank
from trainer.choose import Choice, in_words
from trainer.dataset import Splits, read_frame
from trainer.evaluate import Evaluation, Judged

_TRIALS = 12
_GALLERY = 6  # pictures in a row
_LONG_SIDE = 240
_BLUE, _GRAY, _RED, _GREEN = "#33658a", "#8d99ae", "#c0392b", "#5b8e55"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin: 2rem 0 .5rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; } td, th { padding: .15rem .9rem .15rem 0; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.doubt { border-left: 4px solid #c0392b; background: #fbeeec; padding: .4rem .8rem; margin: .5rem 0; }
.gallery { display: flex; flex-wrap: wrap; gap: .8rem; } figure { margin: 0; break-inside: avoid; }
figure img, .chart { max-width: 100%; } figcaption { font-size: .8rem; color: #444; max-width: 20rem; }
@media print { body { margin: 0; max-width: none; font-size: 11px; } h2 { break-after: avoid; } }
"""


@dataclass(frozen=True)
class Contents:
    """What the report is made of. `scores` are the splits', from this pipeline, which knows the limit."""

    pipeline: Pipeline
    product: str
    splits: Splits
    scores: GoodScores
    bank_rows: int
    build_seconds: float
    doubts: Sequence[str]
    evaluation: Evaluation | None
    choice: Choice | None = None
    reasons: tuple[
        str, ...
    ] = ()  # why fine-tuning and the repair branch were taken or not; what a model was found to be


def write_report(path: Path, contents: Contents) -> None:
    """Write the page; it names no other file and no host."""
    manifest = contents.pipeline.bundle.manifest
    name = escape(f"{contents.product} {manifest.version}")
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>',
        f"<style>{_STYLE}</style></head><body><h1>{escape(contents.product)}</h1><p>Engine {name}</p>",
        *(f'<p class="doubt">{escape(doubt)}</p>' for doubt in contents.doubts),
        _facts(contents),
        f"<h2>The limit</h2><p>{escape(limit_in_words(manifest.products[contents.product]))}</p>",
        *(f"<p>{escape(line)}</p>" for line in added_in_words(contents)),
        f'<img class="chart" alt="Histogram of scores" src="{_data_url(_histogram(contents))}">',
        _choice(contents),
        _calibration_galleries(contents),
        _test(contents),
        "</body></html>",
    ]
    path.write_text("\n".join(parts), encoding="utf-8")


def limit_in_words(product: Product) -> str:
    """The promise, what it rests on, and how far it may be off."""
    rank = conformal_rank(product.n, product.targetFalseReject).rank
    words = f"Wanted: at most {100 * product.targetFalseReject:.3g} % of good parts rejected. "
    if product.supportedFalseReject > product.targetFalseReject:
        words += f"{product.n} calibration images support no less than {100 * product.supportedFalseReject:.3g} %. "
    return words + (
        f"The highest score that passes is number {rank} of the n = {product.n} calibration scores, counted from the "
        f"lowest; {product.limit:.4g} or more is rejected (the median good part has {product.medianGood:.4g}). "
        f"With n = {product.n} the 95 % upper bound of the false-reject rate is {100 * product.bound95:.3g} %."
    )


def added_in_words(contents: Contents) -> list[str]:
    """What was learnt besides, and what the promise has to say about it."""
    count = len(contents.splits.added)
    if not count:
        return []
    words = (
        f"{count} parts that a line rejected and a person called good are in the memory bank, and in no measurement: "
        "scale, settings and limit rest on the other images alone. Parts that were picked by being rejected are no "
        "sample of the line, so the promise above is one for parts like the calibration images. It says nothing about "
        "parts like the added ones; "
    )
    if contents.evaluation is None:
        return [words + "a labelled test folder shows how many of those are still rejected, and which defects pass."]
    return [words + "how many of those are still rejected is the falseRejectRate below, if the test is their export."]


def _facts(contents: Contents) -> str:
    manifest = contents.pipeline.bundle.manifest
    height, width = manifest.preprocessing.size
    facts = {
        "Created": manifest.created,
        "Good images": ", ".join(f"{count} {split}" for split, count in contents.splits.counts.items()),
        "Network input": f"{width} x {height}, {manifest.grid[1]} x {manifest.grid[0]} patches",
    }
    if "map" not in manifest.branches:
        facts["Neighbours K, density weight alpha"] = f"{manifest.k}, {manifest.alpha:g}"
        facts["Memory bank"] = f"{contents.bank_rows} patches"
    facts["Build"] = f"{contents.build_seconds:.1f} s"
    return _table([(escape(name), escape(value)) for name, value in facts.items()])


def _choice(contents: Contents) -> str:
    """The settings' reason, the best of the grid, and where plain 1-NN stands."""
    choice = contents.choice
    if choice is None:
        told = "".join(f"<p>{escape(reason)}</p>" for reason in contents.reasons)
        return f"<h2>The model</h2>{told}" if told else ""
    lines = [f"<h2>Settings</h2><p>{escape(in_words(choice.settings))}: {escape(choice.reason)}.</p>"]
    lines += [f"<p>{escape(reason)}</p>" for reason in contents.reasons]
    if choice.trials:
        shown = [*choice.trials[:_TRIALS], *([choice.plain] if choice.plain not in choice.trials[:_TRIALS] else [])]
        rows = [
            [
                escape(in_words(trial.settings)),
                *(f"{value:.3f}" for value in (trial.merit.image_auroc, trial.merit.pixel_auroc)),
                f"{trial.nominal_ms:.1f}",
            ]
            for trial in shown
            if trial is not None
        ]
        lines.append(
            f"<p>The best {_TRIALS} of {len(choice.trials)} settings on synthetic defects of held-out good images:</p>"
        )
        lines.append(_table(rows, ["Setting", "Image AUROC", "Pixel AUROC", "Nominal ms"]))
    return "\n".join(lines)


def _table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """Cells are HTML already."""
    lines = ["<table>"]
    if head:
        lines.append("<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>")
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return "\n".join([*lines, "</table>"])


def _histogram(contents: Contents) -> bytes:
    """PNG of the scores of all splits, with the limit."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    limit = contents.pipeline.limits(contents.product).score
    groups = [("select", contents.scores.select, _GRAY), ("calibration", contents.scores.calibrate, _BLUE)]
    if contents.evaluation:
        judged = contents.evaluation.judged
        groups.append(("test, good", np.array([image.score for image in judged if not image.is_defective]), _GREEN))
        groups.append(("test, defective", np.array([image.score for image in judged if image.is_defective]), _RED))
    figure = Figure(figsize=(9, 3.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    everything = np.concatenate([[limit], *(scores for _, scores, _ in groups)])
    bins = np.linspace(everything.min(), everything.max(), 50).tolist()
    for label, scores, color in groups:
        if len(scores):
            shape: dict[str, Any] = {"histtype": "step", "linewidth": 1.8} if "test" in label else {"alpha": 0.6}
            axes.hist(scores, bins, label=f"{label} ({len(scores)})", color=color, **shape)
    axes.axvline(limit, color="black", linestyle="--", label=f"limit {limit:.4g}")
    axes.set(xlabel="score", ylabel="images")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _calibration_galleries(contents: Contents) -> str:
    order = np.argsort(contents.scores.calibrate, kind="stable")
    paths = [contents.splits.calibrate[index].path for index in order]
    worst = [(path, path.name) for path in paths[::-1][:_GALLERY]]
    best = [(path, path.name) for path in paths[:_GALLERY]]
    question = "Calibration images with the highest scores: are they really good parts?"
    return _gallery(question, contents, worst) + _gallery("Calibration images with the lowest scores", contents, best)


def _gallery(title: str, contents: Contents, images: Sequence[tuple[Path, str]]) -> str:
    """A row of pictures, each an image beside its heatmap."""
    if not images:
        return f"<h2>{escape(title)}</h2><p>None.</p>"
    figures = []
    limit = contents.pipeline.limits(contents.product)
    for path, caption in images:
        frame = read_frame(path)
        anomaly = contents.pipeline.anomaly_map(frame)
        text = escape(f"{caption}: {anomaly.score:.4g}" + (", rejected" if anomaly.score >= limit.score else ""))
        source = _data_url(_beside(frame, anomaly, limit.map))
        figures.append(f'<figure><img alt="{text}" src="{source}"><figcaption>{text}</figcaption></figure>')
    return f'<h2>{escape(title)}</h2><div class="gallery">{"".join(figures)}</div>'


def _beside(frame: Frame, anomaly: AnomalyMap, limit: float) -> bytes:
    """PNG: the image, and the image under its heatmap: blue low, green at the limit, red at twice the limit."""
    picture = _displayed(frame)
    warmth = heat(anomaly, limit)
    colors = cv2.applyColorMap(warmth, cv2.COLORMAP_TURBO)
    opacity = 0.75 * np.sqrt(warmth / 255.0)[:, :, None]  # the root lets a defect below the limit be seen
    overlay = (picture * (1.0 - opacity) + colors * opacity).astype(np.uint8)
    both = np.concatenate([picture, overlay], axis=1)
    scale = _LONG_SIDE / max(picture.shape[:2])
    size = (max(2, round(both.shape[1] * scale)), max(1, round(both.shape[0] * scale)))
    shown = cv2.resize(both, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    return cv2.imencode(".png", shown)[1].tobytes()


def _displayed(frame: Frame) -> ByteArray:
    """(H W 3) BGR; 16-bit pixels are stretched to the image's own brightest, as a camera's 12 bits would be black."""
    pixels = frame.pixels
    if pixels.dtype == np.uint16:
        pixels = (pixels * (255.0 / max(1, int(pixels.max())))).astype(np.uint8)
    shown = for_display(Frame(pixels))
    return np.repeat(shown, 3, axis=2) if shown.shape[2] == 1 else shown


def _test(contents: Contents) -> str:
    """The figures on the labelled test folder, and its worst mistakes."""
    if contents.evaluation is None:
        return ""
    figures, judged = contents.evaluation.figures, contents.evaluation.judged
    escapes = [image for image in judged if image.is_defective and not image.is_rejected]
    escapes.sort(key=lambda image: image.score)
    rejects = [image for image in judged if image.is_rejected and not image.is_defective]
    rejects.sort(key=lambda image: -image.score)
    rows = [(escape(name), _number(value)) for name, value in figures.items() if name != "byDefect"]
    by_defect = [
        (escape(kind), *(_number(found[name]) for name in ("n", "escapeRate", "imageAuroc")))
        for kind, found in figures["byDefect"].items()
    ]
    return "\n".join(
        [
            "<h2>On the labelled test images</h2>",
            _table(rows),
            _table(by_defect, ("Defect", "n", "escapeRate", "imageAuroc")),
            _gallery(f"Worst escapes (of {len(escapes)})", contents, _captions(escapes)),
            _gallery(f"Worst false rejects (of {len(rejects)})", contents, _captions(rejects)),
        ]
    )


def _captions(images: Sequence[Judged]) -> list[tuple[Path, str]]:
    return [(image.path, f"{image.kind}/{image.path.name}") for image in images[:_GALLERY]]


def _number(value: Any) -> str:
    if value is None:
        return "not measured"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
