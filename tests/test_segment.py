"""Fine-tuning by outlining synthetic defects: the seed's to the bit, gentle to the backbone, and it learns."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from daemon.errors import DataError
from tests.toys import tiny_backbone
from trainer import segment
from trainer.corruption import Corruptor, Recipe
from trainer.schedule import Schedule
from trainer.segment import finetune_by_outline

SIZE = (64, 64)
KINDS = Recipe(("blob", "clump"), ("noise",), (0.8, 1.0))


@pytest.fixture(autouse=True)
def _alone():
    """One thread: several wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def textures():
    """(64 64 3): gray stripes of random phase with a grain of two levels."""
    made = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        stripes = 120 + 40 * np.sin(2 * np.pi * np.mgrid[:64, :64][1] / 8 + rng.uniform(0, 6)) + rng.normal(0, 2, SIZE)
        made.append(np.repeat(np.clip(stripes, 0, 255)[:, :, None], 3, axis=2).astype(np.float32))
    return made


@cache
def views():
    return segment._Views(textures(), Corruptor(textures(), KINDS), seed=0)


def run(schedule=None, seed=3, **options):
    images = textures()
    schedule = schedule or Schedule(steps=3)
    return finetune_by_outline(tiny_backbone(), images, Corruptor(images, KINDS), schedule, seed=seed, **options)


def state(backbone):
    return {name: value.clone() for name, value in backbone.network.state_dict().items()}


def changed(one, other):
    return {name for name in one if not torch.equal(one[name], other[name])}


def test_same_seed_gives_the_same_weights_to_the_bit_and_another_seed_others():
    torch.manual_seed(0)
    first = run()
    torch.manual_seed(1)  # of no matter
    again, other = run(), run(seed=4)
    assert not changed(state(first.backbone), state(again.backbone))
    assert (first.loss_first, first.loss_last, first.accuracy) == (again.loss_first, again.loss_last, again.accuracy)
    assert changed(state(first.backbone), state(other.backbone))


def test_given_backbone_is_left_alone_and_the_copy_is_ready_for_use():
    given = tiny_backbone()
    before = state(given)
    found = finetune_by_outline(
        given, textures(), Corruptor(textures(), KINDS), Schedule(steps=2), seed=0, freeze_below=1
    )
    assert not changed(before, state(given))
    assert changed(before, state(found.backbone)) == set(before)  # weights and biases of all four layers
    assert (found.backbone.name, found.backbone.mean, found.steps) == ("tiny", (127.5,) * 3, 2)
    assert not any(parameter.requires_grad for parameter in found.backbone.network.parameters())
    assert not any(module.training for module in found.backbone.network.modules())


def test_fine_layers_stay_by_default():
    moved = changed(state(tiny_backbone()), state(run().backbone))
    assert {name.split(".")[1] for name in moved} == {"2", "3"}


def test_it_learns_to_outline():
    before, after = (run(Schedule(steps=steps), backbone_lr=5e-3, freeze_below=1) for steps in (1, 300))
    assert before.accuracy < 0.1
    assert after.accuracy > 0.4  # nothing outlined, or everything, is 0
    assert after.loss_last < 0.8 * after.loss_first


def test_batch_is_the_numbers_alone_and_its_masks_lie_where_it_was_changed():
    batch, again, other = (views().make(0, number) for number in (5, 5, 6))
    assert batch.pixels.shape == (8, *SIZE, 3)
    assert batch.pixels.dtype == np.float32
    np.testing.assert_array_equal(batch.pixels, again.pixels)
    assert (batch.pixels != other.pixels).any()
    assert 0.0 <= batch.pixels.min() <= batch.pixels.max() <= 255.0
    # Noise at full opacity differs from row to row, where stripes do not.
    rough = np.abs(np.diff(batch.pixels[..., 0], axis=1, prepend=batch.pixels[:, :1, :, 0])) > 25
    assert rough[batch.masks].mean() > 5 * rough[~batch.masks].mean()


def test_some_of_the_views_are_good_ones():
    shares = [views().make(0, number).masks.any((1, 2)).mean() for number in range(30)]
    assert 0.75 < np.mean(shares) < 0.95


def test_judged_views_were_not_trained_on():
    assert (views().make(segment._TRAIN, 0).pixels != views().make(segment._FRESH, 0).pixels).any()


def test_hairline_is_not_lost_on_the_coarser_grid():
    outliner = segment._Outliner(tiny_backbone(), 8, 0)
    masks = np.zeros((1, *SIZE), bool)
    masks[0, 33, :] = True
    batch = segment._Batch(np.zeros((1, *SIZE, 3), np.float32), masks)
    with torch.inference_mode():
        logits = outliner(batch.pixels)
        wanted = outliner.wanted(batch, logits)
    assert wanted.shape == logits.shape == (1, 1, 16, 16)
    assert wanted.sum() == 16
    assert wanted[0, 0, 8].sum() == 16


def test_seconds_end_by_the_clock():
    now = iter(range(1000))
    found = run(Schedule(seconds=10.0), clock=lambda: float(next(now)))
    assert 2 <= found.steps <= 10


def test_a_loss_that_is_no_number_says_what_to_do():
    with pytest.raises(DataError, match="wanted finite ones: look for images"):
        run(Schedule(steps=30), backbone_lr=1e30, freeze_below=1)
