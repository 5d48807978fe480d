#!/usr/bin/env python3
"""Build an engine bundle from good images: a recipe, read top to bottom. Its steps: trainer/build.py and finish.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from daemon.needs import demand

demand(to_build=True)  # before the imports that would fail

import click  # noqa: E402

from daemon.errors import UsageError  # noqa: E402
from trainer import build, finish  # noqa: E402
from trainer.dataset import Splits  # noqa: E402
from trainer.draft import Draft, open_draft, with_limit  # noqa: E402
from trainer.site import (  # noqa: E402
    Options,
    Site,
    check_name,
    check_options,
    check_targets,
    open_site,
    options_of,
    publish,
    run_command,
)

_FOLDER = click.Path(path_type=Path)


def _check_branches(_context: click.Context, _parameter: click.Parameter, value: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(value.split(",")))
    if not set(names) <= {"ldknn", "repair"}:
        raise click.BadParameter(f"found {value!r}, wanted ldknn, repair, or both with a comma between")
    return tuple(sorted(names))


def _check_size(_context: click.Context, _parameter: click.Parameter, size: int | None) -> int | None:
    if size is None:
        return None
    if size % 32 or not 32 <= size <= 8192:
        raise click.BadParameter(f"found {size}, wanted a multiple of 32 from 32 to 8192")
    return size


@click.command(context_settings={"show_default": True})
@click.argument("name", callback=check_name)
@click.option(
    "--good", metavar="DIR", multiple=True, required=True,
    help="Good images, named in capture order; with --kind crr PRODUCT=DIR, once for each product, as the next three.",
)  # fmt: skip
@click.option("--select", metavar="DIR", multiple=True, help="Good images for the settings, instead of some of --good.")
@click.option(
    "--calibration", metavar="DIR", multiple=True,
    help="Good images for the limit, instead of the last third of --good.",
)  # fmt: skip
@click.option(
    "--test", metavar="DIR", multiple=True,
    help="Labelled folder (test/good, test/<defect>, ground_truth) to report on.",
)  # fmt: skip
@click.option(
    "--kind",
    type=click.Choice(["fused", "crr"]),
    default="fused",
    help="fused: the best engine for one product; crr: one engine for many, which a line can change between parts.",
)
@click.option(
    "--add-product", type=_FOLDER,
    help="With --kind crr: a bundle that is to learn further products; --good names its own ones too.",
)  # fmt: skip
@click.option(
    "--without", type=click.Choice(["repair", "masking", "segmentation"]), multiple=True,
    help="With --kind crr: leave this part of the method out, to see what it gives.",
)  # fmt: skip
@click.option(
    "--add", type=_FOLDER, multiple=True,
    help="Good parts that the line rejected, to be learnt too: a folder of images, or of `inspectd review export`.",
)  # fmt: skip
@click.option("--out", type=_FOLDER, default=Path("engines"), help="Where NAME/<version> is written.")
@click.option("--keys", type=_FOLDER, default=Path("keys"), help="Folder of the signing key; made where there is none.")
@click.option("--textures", type=_FOLDER, help="Folder of pictures that synthetic defects may be filled with.")
@click.option("--preview", type=_FOLDER, help="Only write a PNG of synthetic defects on these parts, and end.")
@click.option("--branches", default="ldknn,repair", callback=_check_branches, help="What the engine looks with.")
@click.option(
    "--false-reject", type=click.FloatRange(0, 0.5, min_open=True), default=0.01,
    help="Share of good parts that may be rejected.",
)  # fmt: skip
@click.option("--budget-ms", type=click.FloatRange(0, min_open=True), default=30.0, help="Time a frame may take.")
@click.option(
    "--budget", type=click.FloatRange(0), default=3.0, help="Minutes to choose settings and to train; 0: neither."
)
@click.option("--steps", type=click.IntRange(0), help="Train exactly so many steps instead: the build can be repeated.")
@click.option(
    "--finetune", type=click.Choice(["off", "outline", "classes"]), default="off",
    help="Of the feature network, kept where it helps: to outline synthetic defects, or DefectMaker's classes.",
)  # fmt: skip
@click.option(
    "--noise", type=click.Choice(["anchored", "input-only", "none"]), default="anchored",
    help="Of the repair training: on input and target, as an ordinary denoiser, or none.",
)  # fmt: skip
@click.option(
    "--repair", type=click.Choice(["auto", "features", "image", "both"]), default="auto",
    help="What is repaired; auto: features, and the image too on a GPU or with 20 minutes and more to train.",
)  # fmt: skip
@click.option(
    "--size", callback=_check_size, help="Long side of the network's input, a multiple of 32.  [chosen]", type=int
)
@click.option("--k", type=click.IntRange(1), help="Neighbours of the local density.  [chosen]")
@click.option("--alpha", type=click.FloatRange(0, 100), help="Weight of the density; 0 is plain 1-NN.  [chosen]")
@click.option("--coreset", type=click.IntRange(1), help="Rows of the memory bank.  [chosen]")
@click.option("--backbone", default="efficientnet-lite0", help="Feature network: this one, or a name that timm knows.")
@click.option("--weights", type=_FOLDER, help="Weights of the backbone (a state dict), instead of the packaged ones.")
@click.option(
    "--targets", default="cpu", callback=check_targets,
    help="What the engine runs on: cpu, and trt (the GPU of this box), rtx:smNN (built anywhere), kernels:smNN.",
)  # fmt: skip
@click.option("--threads", type=click.IntRange(1), default=2, help="Most threads at work.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Same data, options and seed: same engine.")
@click.pass_context
def main(context: click.Context, **fields: Any) -> None:
    """Build an engine NAME from good images alone and print the bundle's folder."""
    name, beginning = fields["name"], fields.pop("add_product")
    products = options_of(fields)
    if products[0].preview is not None:
        build.preview(products[0])
    elif products[0].kind == "crr":
        check_options(context)
        click.echo(_build_many(name, products, beginning))
    elif beginning is not None or products[0].without:
        raise UsageError("found --add-product or --without, wanted them with --kind crr alone")
    else:
        click.echo(_build_one(products[0]))


def _build_one(options: Options) -> Path:
    """The engine of one product."""
    with open_site(options) as site:
        splits = build.read_images(options)
        chosen = build.choose_settings(options, site, splits)
        chosen = build.tune_backbone(options, splits, chosen)
        draft = build.make_network(site, splits, chosen)
        draft = build.make_bank(options, site, splits, draft)
        draft = build.train_repair(options, site, splits, chosen, draft)
        draft = build.find_scale(options, site, splits, draft)
        draft = build.weigh_branches(options, site, splits, chosen, draft)
        finished = _finish(options, site, splits, chosen, draft)
        finish.add_targets(options, site, draft)
        training = finish.describe_training(site, [finished], seed=options.seed)
        finish.seal(options.name, site, [finished], training, budget_ms=options.budget_ms)
        return publish(site)


def _build_many(name: str, products: list[Options], beginning: Path | None) -> Path:
    """One engine for many products (trainer/crr.py); each has its limit as if it were alone."""
    from trainer import many  # it imports torch, which --help need not wait for

    engine = replace(products[0], name=name)
    with open_site(engine) as site:
        splits = [build.read_images(options) for options in products]
        draft = many.train(engine, site, products, splits, beginning)
        draft = build.find_scale(engine, site, many.together(splits), draft)
        finished = [_finish(options, site, own, None, draft) for options, own in zip(products, splits, strict=True)]
        finish.add_targets(engine, site, draft)
        finish.seal(name, site, finished, finish.describe_training(site, finished, seed=engine.seed))
        return publish(site)


def _finish(
    options: Options, site: Site, splits: Splits, chosen: build.Chosen | None, draft: Draft
) -> finish.Finished:  # fmt: skip
    """What every product gets: a limit of its own, golden frames, a report."""
    pipeline = open_draft(options, site, draft)
    scores = finish.score_good(options, site, splits, draft, pipeline)
    look = finish.measure_images(options, splits, draft)
    draft = finish.set_limit(options, draft, scores)
    pipeline = with_limit(options, site, draft, scores, pipeline)
    doubts = finish.find_doubts(splits, draft, scores, is_tested=options.test is not None)
    draft = finish.add_golden(options, site, splits, draft, scores=scores, pipeline=pipeline)
    evaluation = finish.judge_test(options, pipeline)
    finish.write_report(
        options, site, splits, chosen, draft, scores=scores, doubts=doubts, pipeline=pipeline, evaluation=evaluation
    )
    return finish.Finished(options, splits, draft, scores, look, evaluation)


if __name__ == "__main__":
    run_command(main)
