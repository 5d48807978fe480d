#!/usr/bin/env python3
"""Build an engine bundle from good images: a recipe, read top to bottom. Its steps: trainer/build.py and finish.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from daemon.needs import demand

demand(to_build=True)  # before the imports that would fail

import click  # noqa: E402

from trainer import build, finish  # noqa: E402
from trainer.draft import open_draft, with_limit  # noqa: E402
from trainer.site import Options, check_name, check_targets, open_site, publish, run_command  # noqa: E402

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
@click.option("--good", type=_FOLDER, required=True, help="Good images, named in capture order.")
@click.option("--select", type=_FOLDER, help="Good images for the settings, instead of some of --good.")
@click.option("--calibration", type=_FOLDER, help="Good images for the limit, instead of the last third of --good.")
@click.option("--test", type=_FOLDER, help="Labelled folder (test/good, test/<defect>, ground_truth) to report on.")
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
def main(**fields: Any) -> None:
    """Build an engine NAME from good images alone and print the bundle's folder."""
    options = Options(**fields)
    if options.preview is not None:
        build.preview(options)
        return
    with open_site(options) as site:
        splits = build.read_images(options)
        chosen = build.choose_settings(options, site, splits)
        chosen = build.tune_backbone(options, splits, chosen)
        draft = build.make_network(site, splits, chosen)
        draft = build.make_bank(options, site, splits, draft)
        draft = build.train_repair(options, site, splits, chosen, draft)
        draft = build.find_scale(options, site, splits, draft)
        draft = build.weigh_branches(options, site, splits, chosen, draft)
        pipeline = open_draft(options, site, draft)
        scores = finish.score_good(options, site, splits, draft, pipeline)
        finish.measure_images(options, site, splits, draft)
        draft = finish.set_limit(options, draft, scores)
        pipeline = with_limit(options, site, draft, scores, pipeline)
        doubts = finish.find_doubts(splits, draft, scores, is_tested=options.test is not None)
        draft = finish.add_golden(options, site, splits, draft, scores=scores, pipeline=pipeline)
        evaluation = finish.judge_test(options, pipeline)
        finish.write_report(
            options, site, splits, chosen, draft, scores=scores, doubts=doubts, pipeline=pipeline, evaluation=evaluation
        )
        finish.add_targets(options, site, draft)
        training = finish.describe_training(options, site, splits, seed=options.seed)
        finish.seal(options, site, draft, training, evaluation, budget_ms=options.budget_ms)
        click.echo(publish(site))


if __name__ == "__main__":
    run_command(main)
