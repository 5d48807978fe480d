"""Fine-tuning: the seed's to the bit, gentle to the backbone it was given, and it learns what it is shown."""

from __future__ import annotations

import copy
from functools import cache
from itertools import count, pairwise

import numpy as np
import pytest
import torch
from torch import nn

from daemon.errors import DataError, UsageError
from trainer import finetune as finetuning
from trainer import tuning
from trainer.backbone import Backbone, EfficientNetLite0, PatchFeatures
from trainer.finetune import CLASSES, KINDS, Finetuned, Schedule, finetune

SIZE = (64, 64)


@pytest.fixture(autouse=True)
def _small_and_alone(monkeypatch):
    """Few views to judge; and one thread, since several wait for each other on a busy machine."""
    monkeypatch.setattr(finetuning, "_FRESH_SOURCES", 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Tiny(nn.Module):
    """Three strided convolutions and one more: maps of stride 8 and 16."""

    def __init__(self):
        super().__init__()
        widths = (3, 8, 16, 24, 32)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(*pair, 3, 2, 1, bias=False), nn.BatchNorm2d(pair[1]), nn.ReLU())
            for pair in pairwise(widths)
        )

    def forward(self, image):
        maps = [image]
        for layer in self.layers:
            maps.append(layer(maps[-1]))
        return maps[3:]


@cache
def tiny():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        network = Tiny().eval().requires_grad_(False)
        for layer in network.layers:
            nn.init.kaiming_normal_(layer[0].weight)
    return Backbone("tiny", network, (127.5,) * 3, (127.5,) * 3)


@cache
def textures(number=6, size=SIZE):
    """Even grey of a small grain (H W 3), each of its own level."""
    rng = np.random.default_rng(1)
    rows = [rng.uniform(60, 200) + 2 * rng.standard_normal(size) for _ in range(number)]
    return [np.repeat(row.astype(np.float32)[:, :, None], 3, axis=2) for row in rows]


def run(schedule=None, seed=3, backbone=None, images=None, **options) -> Finetuned:
    images = textures() if images is None else images
    return finetune(backbone or tiny(), images, schedule or Schedule(steps=3), seed=seed, **options)


def state(backbone):
    return {name: value.clone() for name, value in backbone.network.state_dict().items()}


def changed(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


# The same seed, the same weights


@pytest.mark.parametrize("options", [{}, {"sources": 2, "accumulate": 2, "freeze_below": 1}])
def test_same_seed_gives_the_same_weights_to_the_bit_and_another_seed_others(options):
    torch.manual_seed(0)
    first = run(frozen_share=0.3, **options)
    torch.manual_seed(1)  # of no matter
    again, other = run(frozen_share=0.3, **options), run(frozen_share=0.3, seed=4, **options)
    assert not changed(state(first.backbone), state(again.backbone))
    assert (first.loss_first, first.loss_last, first.accuracy) == (again.loss_first, again.loss_last, again.accuracy)
    assert changed(state(first.backbone), state(other.backbone))


def test_neither_torchs_own_random_numbers_nor_the_images_are_touched():
    before, images = torch.random.get_rng_state(), textures()
    copies = [image.copy() for image in images]
    run()
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(np.array_equal(*pair) for pair in zip(images, copies, strict=True))


# What becomes of the backbone


def test_given_backbone_is_left_alone_and_the_copy_is_ready_for_use():
    before = state(tiny())
    found = run(freeze_below=1)
    assert not changed(before, state(tiny()))
    assert (found.backbone.name, found.backbone.mean, found.backbone.std) == ("tiny", (127.5,) * 3, (127.5,) * 3)
    assert not any(module.training for module in found.backbone.network.modules())
    assert not any(parameter.requires_grad for parameter in found.backbone.network.parameters())
    assert found.steps == 3


def test_statistics_stay_and_everything_else_is_trained():
    moved = changed(state(tiny()), state(run(freeze_below=1).backbone))
    assert moved == {name for name, _ in tiny().network.named_parameters()}


def test_fine_layers_stay_by_default():
    moved = changed(state(tiny()), state(run().backbone))
    assert {name.split(".")[1] for name in moved} == {"2", "3"}


def test_head_learns_alone_at_first():
    assert not changed(state(tiny()), state(run(frozen_share=1.0, freeze_below=1).backbone))


def test_head_alone_learns_for_13_percent_of_the_schedule(monkeypatch):
    thawed, original = [], finetuning._Classifier.loss
    monkeypatch.setattr(
        finetuning._Classifier,
        "loss",
        lambda self, batch, **how: (thawed.append(how["is_thawed"]), original(self, batch, **how))[1],
    )
    run(Schedule(steps=24), sources=1)
    assert thawed == [False] * 4 + [True] * 20  # 4 / 24 is the first share that is not below
    assert sum(step / 300 < finetuning.FROZEN_SHARE for step in range(300)) == 39  # the paper's


def test_features_move_and_stay_finite():
    image = torch.from_numpy(textures()[0]).permute(2, 0, 1)[None] / 127.5 - 1.0
    before, after = (PatchFeatures(backbone.network)(image) for backbone in (tiny(), run().backbone))
    assert before.shape == after.shape
    assert torch.isfinite(after).all()
    assert (before - after).abs().max() > 1e-4


def test_layers_before_stride_8_of_the_default_network():
    network = EfficientNetLite0().eval()
    assert finetuning.freeze_fine(network, 8) == 40 + 112
    still = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    early = (
        "_conv_stem.",
        "_bn0.",
        "_blocks.0.",
        "_blocks.1.",
        "_blocks.2.",
        "_blocks.3._expand_conv.",
        "_blocks.3._bn0.",
    )
    assert still == {name for name, _ in network.named_parameters() if name.startswith(early)}


def test_gate_between_fine_layers_stays_with_them():
    """Squeeze-and-excite: one pixel, as coarse as can be, and yet early."""

    class Gated(Tiny):
        def __init__(self):
            super().__init__()
            self.gate = nn.Conv2d(8, 8, 1)

        def forward(self, image):
            fine = self.layers[0](image)
            maps = [fine * torch.sigmoid(self.gate(fine.mean((2, 3), keepdim=True)))]
            for layer in self.layers[1:]:
                maps.append(layer(maps[-1]))
            return maps[2:]

    network = Gated().eval()
    assert finetuning.freeze_fine(network, 8) == 24 + 32
    assert not network.gate.weight.requires_grad
    finetuning.freeze_fine(network.requires_grad_(True), 1)
    assert all(parameter.requires_grad for parameter in network.parameters())


# What it learns


def test_it_learns_to_tell_the_classes(monkeypatch):
    monkeypatch.setattr(finetuning, "_FRESH_SOURCES", 36)
    options = {"sources": 6, "lr": 0.1, "backbone_lr": 0.1, "freeze_below": 1}
    before, after = (run(Schedule(steps=steps), **options) for steps in (1, 60))
    assert after.loss_last < 0.8 * after.loss_first
    assert after.loss_last < 0.38  # 0.41 knows nothing but that there are seven classes
    assert before.accuracy < 0.22
    assert after.accuracy > 0.25  # 1 / 7 by chance, give or take 0.02


def test_batch_holds_every_class_of_every_source():
    views = finetuning._Views(textures(), None, 3, 0)
    batch = views.make(0, 0)
    assert batch.pixels.shape == (3 * CLASSES, *SIZE, 3)
    assert batch.pixels.dtype == np.float32
    assert batch.classes.tolist() == [0, 1, 2, 3, 4, 5, 6] * 3
    assert tuple((shape, fill) for fill in ("cut", "noise") for shape in ("blob", "scar", "clump")) == KINDS
    good = batch.pixels[::CLASSES]
    assert all(
        not np.array_equal(view, good[number // CLASSES])
        for number, view in enumerate(batch.pixels)
        if number % CLASSES
    )


def test_every_image_is_a_source_before_any_is_one_again():
    views = finetuning._Views(textures(), None, 4, 0)
    assert sorted(views._choose(0, place) for place in range(12)) == sorted([*range(6)] * 2)
    assert [views._choose(0, place) for place in range(30)] != [views._choose(1, place) for place in range(30)]


def test_judged_views_were_not_trained_on():
    views = finetuning._Views(textures(), None, 2, 0)
    assert not np.array_equal(views.make(0, 0).pixels, views.make(1, 0).pixels)


@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_foreground_is_turned_with_its_image(size):
    region = np.zeros(size, np.bool_)
    region[5:20, 8:50] = True
    image = np.repeat(np.where(region, 180.0, 60.0).astype(np.float32)[:, :, None], 3, axis=2)
    poses = set()
    for seed in range(40):
        turned, mask = finetuning._augment(image, region, np.random.default_rng(seed))
        plain, _ = finetuning._augment(image, np.ones(size, np.bool_), np.random.default_rng(seed))
        assert np.array_equal(turned, plain)  # the mask has no say in how the image is turned
        assert np.array_equal(mask, turned[:, :, 0] > 120)
        poses.add(mask.tobytes())
    assert len(poses) == (7 if size == (64, 64) else 3)


def test_foreground_of_each_source_reaches_the_corruption_model(monkeypatch):
    masks, given, original = [], [], finetuning.Corruptor
    for number in range(4):
        masks.append(np.zeros(SIZE, np.bool_))
        masks[-1][: 10 + 5 * number, 8:40] = True
    images = [np.repeat(np.where(mask, 180.0, 60.0).astype(np.float32)[:, :, None], 3, axis=2) for mask in masks]
    monkeypatch.setattr(
        finetuning, "Corruptor", lambda *args, **how: (given.append((args[0], how)), original(*args, **how))[1]
    )
    finetuning._Views(images, masks, 4, 0).make(0, 0)
    ((sources, how),) = given
    assert all(np.array_equal(mask, view[:, :, 0] > 120) for mask, view in zip(how["foreground"], sources, strict=True))
    assert sorted(mask.sum() for mask in how["foreground"]) == sorted(mask.sum() for mask in masks)


def test_one_image_is_enough():
    """Cuts come from other views of the same image, and with one source from the view itself."""
    for sources in (1, 3):
        assert np.isfinite(run(images=textures()[:1], sources=sources).loss_last)


# The schedule


def test_seconds_end_on_the_clock_and_the_cosine_follows_them(monkeypatch):
    rates, original = [], finetuning._Plan.rates
    monkeypatch.setattr(
        finetuning._Plan, "rates", lambda plan, share: (rates.append((share, *original(plan, share))), rates[-1][1:])[1]
    )
    ticks = count(step=0.5)
    found = run(Schedule(seconds=20.0), clock=lambda: next(ticks), lr=0.04, backbone_lr=0.01)
    assert 18 <= found.steps <= 21  # the clock is read twice an update
    shares, head, body = zip(*rates, strict=True)
    assert shares == tuple(sorted(shares))
    assert (shares[0], head[0], body[0]) == (0.0, 0.04, 0.01)
    assert shares[-1] > 0.9
    assert head == tuple(sorted(head, reverse=True))
    assert head[-1] == pytest.approx(1e-5 + (0.04 - 1e-5) * 0.5 * (1 + np.cos(np.pi * shares[-1])))
    assert original(finetuning._Plan(0.04, 0.01, 1, 0.13), 1.0) == pytest.approx([1e-5, 1e-5])


def test_progress_is_told_every_ten_seconds(capsys):
    ticks = count(step=2.0)
    run(Schedule(steps=12), clock=lambda: next(ticks))
    told = capsys.readouterr().err.splitlines()
    assert 2 <= sum("s left" in line for line in told) <= 5
    assert told[-1].startswith("fine-tuning: 12 updates in ")
    assert told[-1].endswith("of fresh views told right")


def test_time_that_is_over_at_once_still_makes_one_update():
    ticks = count(step=100.0)
    assert run(Schedule(seconds=1.0), clock=lambda: next(ticks)).steps == 1


# Precision


def test_depthwise_convolutions_are_computed_in_float32():
    convolution, image = nn.Conv2d(4, 4, 3, groups=4), torch.rand(1, 4, 8, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert convolution(image).dtype == torch.bfloat16
        with finetuning.ExactDepthwise():
            assert convolution(image).dtype == torch.float32
            assert nn.Conv2d(4, 4, 3)(image).dtype == torch.bfloat16


def test_a_processor_without_bf16_computes_in_float32(monkeypatch):
    monkeypatch.setattr(tuning.ov, "Core", type("Core", (), {"get_property": lambda *_: ["FP32"]}))
    assert np.isfinite(run().loss_last)
    assert not finetuning._Classifier(tiny(), 8, 0).has_bf16


# What cannot be done


@pytest.mark.parametrize(
    "values", [{}, {"steps": 1, "seconds": 1.0}, {"steps": 0}, {"seconds": -1.0}, {"seconds": float("nan")}]
)
def test_schedule_is_one_of_two(values):
    with pytest.raises(UsageError, match="wanted steps or seconds, one of the two"):
        Schedule(**values)


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="found no images"):
        run(images=[])
    with pytest.raises(DataError, match="image 0 is uint8"):
        run(images=[np.zeros((*SIZE, 3), np.uint8)])
    with pytest.raises(DataError, match="2 foreground masks and 6 images"):
        run(foreground=[np.ones(SIZE, np.bool_)] * 2)
    for option in ("sources", "accumulate"):
        with pytest.raises(UsageError, match=f"{option} 0"):
            run(**{option: 0})


def test_a_loss_that_is_no_number_says_what_to_do():
    with pytest.raises(DataError, match=r"wanted finite ones: lower lr \(1e\+38\) and backbone_lr"):
        run(Schedule(steps=9), lr=1e38)


def test_weights_that_are_no_numbers_are_noticed_before_anyone_uses_them():
    broken = copy.deepcopy(tiny())
    with torch.no_grad():
        broken.network.layers[3][0].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(DataError, match="after 1 updates"):
        run(backbone=broken)
