"""`inspectd import`: somebody else's ONNX model as an engine of kind `foreign`; a recipe, read top to bottom.

Nothing is trained. The model's own limits count for nothing: scale, limit, golden frames and signature are ours, from
good images that the model has not seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from daemon.errors import DataError, UsageError
from trainer.progress import say, warn
from trainer.site import Order, Site, check_name, check_targets, open_site, publish

if TYPE_CHECKING:
    from onnx import ModelProto

    from daemon.types import FloatArray
    from trainer.calibrate import GoodScores
    from trainer.dataset import Splits
    from trainer.draft import Draft
    from trainer.evaluate import Evaluation
    from trainer.finish import Finished
    from trainer.original import ImageInput, Original, Output

_FOLDER = click.Path(path_type=Path)
# (mean, std) on the scale 0..255, by what the model was trained on.
_PIXELS = {
    "0..1": ((0.0,) * 3, (255.0,) * 3),
    "0..255": ((0.0,) * 3, (1.0,) * 3),
    "-1..1": ((127.5,) * 3, (127.5,) * 3),
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}
_HOW_TO_KNOW = """The file does not say which --pixels it wants; the code that trained or exported it does: pixels / 255
or ToTensor() alone is 0..1 (so are anomalib's exports, which normalise inside), a Normalize(mean=[0.485, ...]) before
the model is imagenet, x / 127.5 - 1 is -1..1, pixels as a camera gives them are 0..255."""
_HELP = f"""Make an engine of an ONNX model that gives an anomaly map or a score, and print the bundle's folder.

A higher value has to mean a worse part: --test with labelled images shows whether it does. A map's highest value is the
part's score; a model that gives a score alone marks a rejected part as a whole.

{_HOW_TO_KNOW}
"""
_MOST_ALIKE = 0.1  # of the good images may share the highest score that passes; more, and the model clips


@dataclass(frozen=True)
class ImportOptions(Order):
    """The command line of `inspectd import`."""

    model: Path
    input_size: tuple[int, int] | None
    pixels: str | None
    color: str
    output: str | None
    smoothing: float


@dataclass(frozen=True)
class Model:
    """What was found: the model, how it takes an image, which output was taken, and all that in sentences."""

    proto: ModelProto
    original: Original
    image: ImageInput
    output: Output
    sha256: str
    notes: tuple[str, ...]


@click.command(
    "import",
    context_settings={"show_default": True},
    help=_HELP,
)
@click.argument("model", metavar="MODEL.onnx", type=_FOLDER)
@click.option("--product", "name", required=True, callback=check_name, help="What the engine judges, and its name.")
@click.option("--good", type=_FOLDER, required=True, help="Good images that the model was not trained on.")
@click.option("--calibration", type=_FOLDER, help="Good images for the limit, instead of most of --good.")
@click.option("--test", type=_FOLDER, help="Labelled folder (test/good, test/<defect>, ground_truth) to report on.")
@click.option(
    "--input-size", type=click.IntRange(1), nargs=2, metavar="H W", help="Where the model leaves its size open."
)
@click.option(
    "--pixels", type=click.Choice(list(_PIXELS)), help="Must be given: the values that the model was trained on."
)
@click.option("--color", type=click.Choice(["rgb", "bgr"]), default="rgb", help="Order of the channels it expects.")
@click.option("--output", help="The output to take, where several could be meant; a map goes before a score.")
@click.option("--smoothing", type=click.FloatRange(0), default=0.0, help="Sigma in pixels of the model's input.")
@click.option(
    "--false-reject", type=click.FloatRange(0, 0.5, min_open=True), default=0.01,
    help="Share of good parts that may be rejected.",
)  # fmt: skip
@click.option("--out", type=_FOLDER, default=Path("engines"), help="Where PRODUCT/<version> is written.")
@click.option("--keys", type=_FOLDER, default=Path("keys"), help="Folder of the signing key; made where there is none.")
@click.option(
    "--targets", default="cpu", callback=check_targets,
    help="What the engine runs on: cpu, and trt (the GPU of this box), rtx:smNN (built anywhere), kernels:smNN.",
)  # fmt: skip
@click.option("--threads", type=click.IntRange(1), default=2, help="Most threads at work.")
def command(**fields: Any) -> None:
    """Recipe of `inspectd import`."""
    from trainer import build, finish
    from trainer.draft import open_draft, with_limit

    options = ImportOptions(**fields)
    model = inspect_model(options)
    splits = read_images(options, model)
    with open_site(options) as site:
        draft = make_network(options, site, model)
        finish.add_targets(options, site, draft)
        draft = build.find_scale(options, site, splits, draft)
        pipeline = open_draft(options, site, draft)
        scores = finish.score_good(options, site, splits, draft, pipeline)
        look = finish.measure_images(options, splits, draft)
        draft = set_limit(options, draft, scores)
        pipeline = with_limit(options, site, draft, scores, pipeline)
        doubts = finish.find_doubts(splits, draft, scores)
        draft = finish.add_golden(options, site, splits, draft, scores=scores, pipeline=pipeline)
        evaluation = finish.judge_test(options, pipeline)
        doubts += doubt_direction(evaluation)
        finish.write_report(
            options, site, splits, None, draft, scores=scores, doubts=doubts, pipeline=pipeline, evaluation=evaluation
        )
        made = finish.Finished(options, splits, draft, scores, look, evaluation)
        finish.seal(options.name, site, [made], describe(site, made, model))
        click.echo(publish(site))


def inspect_model(options: ImportOptions) -> Model:
    """Read it, find its input, run it, choose an output, and say what was found. Raises DataError, UsageError."""
    from trainer.onnxfile import opset, read_onnx
    from trainer.original import Original, choose_output, find_input

    if options.pixels is None:
        raise UsageError(f"found no --pixels, wanted one of {', '.join(_PIXELS)}. {' '.join(_HOW_TO_KNOW.split())}")
    proto, sha256 = read_onnx(options.model)
    image = find_input(options.model, proto, options.input_size)
    if image.channels == 1 and (options.color == "bgr" or options.pixels == "imagenet"):
        raise UsageError(
            f"{options.model}: takes gray images ({image.told}), found --color {options.color} --pixels "
            f"{options.pixels}; wanted neither bgr nor imagenet, which are about three colours"
        )
    original = Original(options.model, proto, image, options.threads)
    outputs = original.outputs(_noise(options, image), options.color)
    output = choose_output(options.model, outputs, options.output)
    height, width = image.size
    taken = f"{width} x {height}, {'gray' if image.channels == 1 else options.color.upper()}, pixels {options.pixels}"
    notes = [
        f"{options.model.name}, opset {opset(proto)}: input {image.told}, taken as {taken}",
        f"output taken: {output}",
        *(f"output not taken: {other}" for other in outputs if other is not output),
    ]
    for note in notes:
        say(note)
    if image.batch > 1:
        warn(
            f"{options.model}: is fixed at a batch of {image.batch}: each frame is computed {image.batch} times; "
            "export it with batch 1 or an open one"
        )
    return Model(proto, original, image, output, sha256, tuple(notes))


def _noise(options: ImportOptions, image: ImageInput) -> FloatArray:
    """(1 3 h w), over the whole range of pixels."""
    mean, std = (np.array(values).reshape(1, 3, 1, 1) for values in _PIXELS[str(options.pixels)])
    pixels = np.random.default_rng(0).uniform(0.0, 255.0, (1, 3, *image.size))
    return np.asarray((pixels - mean) / std, np.float32)


def read_images(options: ImportOptions, model: Model) -> Splits:
    """Check and split the good images."""
    from trainer import dataset

    splits = dataset.split_untrained(options.good, options.calibration, options.threads)
    say("good images: " + ", ".join(f"{count} {name}" for name, count in splits.counts.items()))
    (height, width), (model_height, model_width) = splits.calibrate[0].hw, model.image.size
    say(
        f"frames as {splits.calibrate[0].path.name} of {width} x {height} are brought to {model_width} x {model_height}"
    )
    return splits


def make_network(options: ImportOptions, site: Site, model: Model) -> Draft:
    """Wrap the model and hold the result against the model itself. Raises DataError, DeviceError."""
    from daemon.bundle import NETWORKS, Preprocessing
    from trainer.draft import Draft
    from trainer.original import Original
    from trainer.settings import Settings
    from trainer.wrap import compare, wrap

    image, output, noise = model.image, model.output, _noise(options, model.image)
    made = wrap(options.model, model.proto, image, output, options.color)
    again = Original(options.model, model.proto, image, options.threads)
    values = model.original.refuse_chance(noise, options.color, output, again)
    wanted = values[:1] if image.batch > 1 else values
    if not np.isfinite(wanted).all():
        raise DataError(
            f"{options.model}: gives values that are not finite for noise, wanted numbers; look at --pixels"
        )
    compare(options.model, made, noise, np.asarray(wanted, np.float32), options.threads)
    (site.folder / NETWORKS).write_bytes(made.SerializeToString())
    mean, std = _PIXELS[str(options.pixels)]
    assert output.grid is not None
    return Draft(
        Preprocessing(size=image.size, mean=mean, std=std), output.grid, Settings(k=1, alpha=0.0),
        kind="foreign", smoothing=options.smoothing, branches=("map",), notes=model.notes,
    )  # fmt: skip


def set_limit(options: ImportOptions, draft: Draft, scores: GoodScores) -> Draft:
    """The conformal limit. Raises DataError where the model gives good parts one and the same score."""
    from trainer import finish

    draft = finish.set_limit(options, draft, scores)
    alike = float(np.mean(scores.calibrate == scores.calibrate[scores.calibrate < draft.product.limit].max()))
    if draft.product.medianGood >= np.nextafter(np.float32(draft.product.limit), np.float32(-np.inf)):
        raise DataError(
            f"{options.model}: gives {alike:.0%} of the good images the same score, the highest that passes: it clips "
            "its values, or does not look at the image; export it without its normalisation, or look at --pixels"
        )
    if len(scores.calibrate) >= 1 / _MOST_ALIKE and alike > _MOST_ALIKE:
        warn(f"{alike:.0%} of the good images have the very score that is the limit: the model clips its values")
    return draft


def doubt_direction(evaluation: Evaluation | None) -> list[str]:
    """Whether a higher value means a worse part is seen on labelled images alone."""
    auroc = evaluation.figures["imageAuroc"] if evaluation else None
    if auroc is None:
        return []
    say(f"image AUROC on the labelled test images: {auroc:.3f}")
    if auroc >= 0.5:
        return []
    doubt = (
        f"image AUROC on the test images is {auroc:.3f}, below 0.5: by this output good parts look worse than "
        "defective ones; if a higher value means a better part, export it with the sign turned, else look at --pixels"
    )
    warn(doubt)
    return [doubt]


def describe(site: Site, made: Finished, model: Model) -> dict[str, Any]:
    """The manifest's `training`: whose model it is."""
    from trainer import finish

    found = {"sha256": model.sha256, "output": model.output.name, "found": list(model.notes)}
    return finish.describe_training(site, [made], model=found)
