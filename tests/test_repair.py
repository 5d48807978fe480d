"""The repair branch: what the noise does to the Jacobian, what the network repairs and leaves, how training ends."""

from __future__ import annotations

import math
from functools import cache

import cv2
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from daemon.errors import DataError, UsageError
from trainer.corruption import Corruptor
from trainer.corruption import Recipe as Kinds
from trainer.repair import (
    Recipe,
    RepairNet,
    RepairScore,
    _ConvexSkip,
    add_noise,
    score_with,
    train,
)
from trainer.samplers import Batch, FeatureSampler, ImageSampler
from trainer.schedule import Schedule, cosine


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Several threads wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


KINDS = Kinds(("blob", "scar", "clump", "speck"), ("cut", "noise"))


class Clock:
    """Every look at it takes `step` seconds."""

    def __init__(self, step):
        self.now, self.step = 0.0, step

    def __call__(self):
        self.now += self.step
        return self.now


class Watched:
    """A sampler that counts its draws and ends one with an interrupt."""

    def __init__(self, sampler, killed_at=None):
        self.channels, self.drawn = sampler.channels, []
        self._sampler, self._killed_at = sampler, killed_at

    def draw(self, step):
        if step == self._killed_at:
            raise KeyboardInterrupt
        self.drawn.append(step)
        return self._sampler.draw(step)


# Data


def feature_maps(count, seed, channels=6, side=12):
    """Smooth maps (count C side side): three slow waves of random phase, mixed into the channels the same way."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(channels, 3))
    rows, columns = np.mgrid[:side, :side] / side
    angles = np.stack([2 * np.pi * rows, 2 * np.pi * columns, 2 * np.pi * (rows + columns)])
    waves = np.sin(angles[None] + rng.uniform(0, 2 * np.pi, (count, 3, 1, 1)))
    maps = np.einsum("cw,nwyx->ncyx", mixing, waves) + 5.0
    return torch.from_numpy(maps.astype(np.float32))


def spoil_features(maps, seed):
    """A square of another direction on each map, and its mask (count side side)."""
    rng = np.random.default_rng(seed)
    spoilt, masks = maps.clone(), torch.zeros(len(maps), *maps.shape[2:])
    for index in range(len(maps)):
        top, left = rng.integers(1, maps.shape[2] - 4, 2)
        shift = torch.from_numpy(rng.normal(0, 4, (maps.shape[1], 1, 1)).astype(np.float32))
        spoilt[index, :, top : top + 3, left : left + 3] += shift
        masks[index, top : top + 3, left : left + 3] = 1.0
    return spoilt, masks


@cache
def feature_sampler(batch=16):
    clean = feature_maps(40, 0)
    made = [spoil_features(clean, seed) for seed in range(6)]
    corrupted, masks = (torch.stack(part, dim=1) for part in zip(*made, strict=True))
    return FeatureSampler(clean.half(), corrupted.half(), masks.half(), batch=batch)


def texture(seed):
    """(32 32 3): gray stripes of random phase with a grain of two levels."""
    rng = np.random.default_rng(seed)
    columns = np.mgrid[:32, :32][1]
    gray = 120 + 40 * np.sin(2 * np.pi * columns / 8 + rng.uniform(0, 2 * np.pi)) + rng.normal(0, 2, (32, 32))
    return np.repeat(np.clip(gray, 0, 255)[:, :, None], 3, axis=2).astype(np.float32)


@cache
def image_sampler():
    images = [texture(seed) for seed in range(24)]
    return ImageSampler(images, Corruptor(images, KINDS), batch=8)


@cache
def trained_on_features():
    return train(feature_sampler(), Schedule(steps=200), Recipe(width=24), seed=0).net


@cache
def trained_on_images():
    return train(image_sampler(), Schedule(steps=150), Recipe(width=16, halvings=1), seed=0).net


# The method: what the noise does


class Tanh(nn.Module):
    """A random network R^6 -> R^6 with a curvature that can be told."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = torch.randn(6, 16, generator=generator, dtype=torch.float64) / 2
        self.second = torch.randn(16, 6, generator=generator, dtype=torch.float64) / 2

    def forward(self, x):
        return torch.tanh(x @ self.first) @ self.second


@pytest.mark.parametrize(("noise", "anchor"), [("anchored", 1.0), ("input-only", 0.0)])
def test_noise_adds_to_the_loss_what_the_expansion_says(noise, anchor):
    """Excess loss / s^2 = |J - anchor I|_F^2 + <f(u) - x, laplacian f(u)>, by pairs of opposite noises."""
    net, draws, sigma = Tanh(), 40_000, 0.03
    generator = torch.Generator().manual_seed(0)
    u, x = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
    many_u, many_x = (row.expand(draws, 6).reshape(draws, 6, 1, 1) for row in (u, x))
    given, wanted = add_noise(many_u, many_x, Recipe(noise=noise, sigma=sigma), generator)
    losses = []
    for side in (1.0, -1.0):
        noisy, target = (many_u + side * (given - many_u), many_x + side * (wanted - many_x))
        losses.append((net(noisy.flatten(1)) - target.flatten(1)).square().sum(1))
    residual = net(u) - x
    excess = (0.5 * (losses[0] + losses[1]) - residual.square().sum()) / sigma**2
    jacobian = torch.func.jacrev(net)(u)
    laplacian = torch.func.jacrev(torch.func.jacrev(net))(u).diagonal(dim1=1, dim2=2).sum(1)
    slope, curvature = (jacobian - anchor * torch.eye(6)).square().sum(), residual @ laplacian
    error = float(excess.std() / math.sqrt(draws))
    assert 10 * error < min(float(slope), abs(float(curvature)))  # else the next line could not tell them
    assert abs(float(excess.mean() - slope - curvature)) < 3 * error


def fit_plane(noise):
    """A small tanh network that repairs nothing: points of a plane in R^6, with the recipe's noise. ||J - I||_F."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 6))
    plane = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for step in range(400):
        generator = torch.Generator().manual_seed(step)
        x = (torch.randn(64, 2, generator=generator) @ plane).view(64, 6, 1, 1)
        given, wanted = add_noise(x, x, Recipe(noise=noise), generator)
        optimizer.zero_grad()
        F.mse_loss(net(given.flatten(1)), wanted.flatten(1)).backward()
        optimizer.step()
    points = torch.randn(8, 2, generator=torch.Generator().manual_seed(77)) @ plane
    jacobians = torch.func.vmap(torch.func.jacrev(net))(points).detach()
    return float((jacobians - torch.eye(6)).flatten(1).norm(dim=1).mean())


def test_noise_on_both_sides_keeps_what_the_data_do_not_span():
    assert fit_plane("anchored") < 0.5 * fit_plane("input-only")


def distance_to_identity(net, points):
    """Mean ||J - I||_F, by central differences."""
    found = []
    for x in points:
        step = 1e-2 * torch.eye(x.numel()).reshape(-1, *x.shape)
        with torch.inference_mode():
            columns = ((net(x + step) - net(x - step)) / 2e-2).flatten(1)
        found.append(float((columns - torch.eye(x.numel())).norm()))
    return float(np.mean(found))


def test_noise_on_both_sides_pulls_the_jacobian_of_the_network_to_the_identity():
    clean = feature_maps(40, 0, channels=3, side=8)
    corrupted, masks = (part.unsqueeze(1) for part in spoil_features(clean, 0))
    sampler = FeatureSampler(clean.half(), corrupted.half(), masks.half(), batch=8)
    points = sampler._standard(feature_maps(3, 500, channels=3, side=8))
    found = {}
    for noise in ("anchored", "input-only"):
        recipe = Recipe(noise=noise, sigma=0.5, masked_patches=0.0, learning_rate=1e-2, width=24)
        found[noise] = distance_to_identity(train(sampler, Schedule(steps=200), recipe, seed=0).net, points)
    assert found["anchored"] < 0.8 * found["input-only"]


def test_noise_is_drawn_once_and_goes_where_the_recipe_says():
    clean = torch.zeros(4, 3, 16, 16)
    corrupted = clean + 1.0

    def noisy(kind, seed=0):
        return add_noise(corrupted, clean, Recipe(noise=kind, sigma=0.2), torch.Generator().manual_seed(seed))

    given, wanted = noisy("anchored")
    torch.testing.assert_close(given - corrupted, wanted - clean, atol=1e-6, rtol=0)
    assert float(wanted.std()) == pytest.approx(0.2, rel=0.1)
    alone, kept = noisy("input-only")
    assert torch.equal(alone, given)
    assert torch.equal(kept, clean)
    assert torch.equal(noisy("none")[0], corrupted)
    assert torch.equal(noisy("none")[1], clean)
    assert not torch.equal(noisy("anchored", 1)[0], given)
    assert not torch.equal(given[0], given[1])


# What a trained network repairs, and what it leaves


def features_on_trial():
    """(network, clean, corrupted, masks) that training has not seen, standardised."""
    clean = feature_maps(20, 700)
    corrupted, masks = spoil_features(clean, 701)
    sampler = feature_sampler()
    return trained_on_features(), sampler._standard(clean), sampler._standard(corrupted), masks.unsqueeze(1)


def images_on_trial():
    clean = [texture(seed) for seed in range(700, 712)]
    corrupted, masks = [], []
    for index, image in enumerate(clean):
        mask = cv2.circle(np.zeros((32, 32), np.uint8), (8 + index, 20 - index), 3, 1, -1)
        corrupted.append(np.where(mask[:, :, None] > 0, np.float32(20 if index % 2 else 235), image))
        masks.append(torch.from_numpy(mask.astype(np.float32)))
    sampler = image_sampler()
    return trained_on_images(), sampler._standard(clean), sampler._standard(corrupted), torch.stack(masks).unsqueeze(1)


ON_TRIAL = [features_on_trial, images_on_trial]


def mean_square(difference, where):
    where = where.expand_as(difference)
    return float((difference.square() * where).sum() / where.sum())


@pytest.mark.parametrize("on_trial", ON_TRIAL)
def test_normal_texture_passes_nearly_unchanged(on_trial):
    net, clean, _, _ = on_trial()
    with torch.inference_mode():
        assert mean_square(net(clean) - clean, torch.ones(())) < 0.1  # of the data's variance


@pytest.mark.parametrize("on_trial", ON_TRIAL)
def test_defect_is_removed_and_shows_in_the_residual(on_trial):
    net, clean, corrupted, mask = on_trial()
    with torch.inference_mode():
        repaired = net(corrupted)
    assert mean_square(repaired - corrupted, mask) > 8 * mean_square(repaired - corrupted, 1 - mask)
    assert mean_square(repaired - clean, mask) < 0.5 * mean_square(corrupted - clean, mask)


@pytest.mark.parametrize("on_trial", ON_TRIAL)
def test_repairing_twice_changes_little_more(on_trial):
    net, _, corrupted, _ = on_trial()
    with torch.inference_mode():
        once = net(corrupted)
        again = net(once)
    assert float((again - once).norm()) < 0.5 * float((once - corrupted).norm())


# The network


@pytest.mark.parametrize(("halvings", "hw"), [(0, (5, 7)), (1, (6, 10)), (2, (12, 8))])
def test_network_keeps_the_shape(halvings, hw):
    net = RepairNet(4, 8, halvings).eval()
    assert net(torch.randn(2, 4, *hw)).shape == (2, 4, *hw)


@pytest.mark.parametrize("logit", [-8.0, -0.5, 0.0, 3.0])
def test_convex_skip_stays_between_its_inputs(logit):
    skip = _ConvexSkip(5)
    nn.init.constant_(skip.logit, logit)
    encoder, decoder = torch.randn(2, 2, 5, 6, 6, generator=torch.Generator().manual_seed(0))
    out = skip(encoder, decoder)
    assert bool((out >= torch.minimum(encoder, decoder) - 1e-6).all())
    assert bool((out <= torch.maximum(encoder, decoder) + 1e-6).all())
    torch.testing.assert_close(skip(encoder, encoder), encoder)


@pytest.mark.parametrize(("channels", "halvings", "hw", "grid"), [(6, 0, (5, 7), (5, 7)), (3, 1, (32, 48), (4, 6))])
def test_score_is_the_mean_squared_residual_of_each_patch(channels, halvings, hw, grid):
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.randn(channels, generator=generator), torch.rand(channels, generator=generator) + 0.5
    net = RepairNet(channels, 8, halvings).eval().requires_grad_(False)
    data = torch.randn(1, channels, *hw, generator=generator) * 3
    scores = RepairScore(net, mean, std, grid).eval()(data)
    assert scores.shape == (grid[0] * grid[1],)
    assert bool((scores >= 0).all())
    x = (data - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)
    square, (height, width) = ((x - net(x)) ** 2)[0].numpy(), (hw[0] // grid[0], hw[1] // grid[1])
    wanted = [
        square[:, row * height : (row + 1) * height, column * width : (column + 1) * width].mean()
        for row in range(grid[0])
        for column in range(grid[1])
    ]
    np.testing.assert_allclose(scores.numpy(), wanted, rtol=1e-4)


# Samplers


@pytest.mark.parametrize("sampler", [feature_sampler, image_sampler])
def test_a_step_is_drawn_the_same_every_time(sampler):
    first, again, other = (sampler().draw(step) for step in (3, 3, 4))
    for name in ("corrupted", "clean", "mask"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.corrupted, other.corrupted)


@pytest.mark.parametrize("sampler", [feature_sampler, image_sampler])
def test_batches_are_standardised_and_changed_in_their_masks(sampler):
    batches = [sampler().draw(step) for step in range(12)]
    clean = torch.cat([batch.clean for batch in batches]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(clean.mean(1), torch.zeros(len(clean)), atol=0.2, rtol=0)
    torch.testing.assert_close(clean.std(1), torch.ones(len(clean)), atol=0.2, rtol=0)
    for batch in batches:
        assert batch.mask.shape == (len(batch.clean), 1, *batch.clean.shape[2:])
        # An edge that fades out lies a little outside the mask; mirrored, image, corruption and mask go together.
        near = F.max_pool2d(batch.mask, 5, 1, 2) > 0
        changed = (batch.corrupted - batch.clean).abs().amax(1, keepdim=True) > 1e-3
        assert bool(changed.any())
        assert not bool((changed & ~near).any())


def test_channel_that_never_changes_is_no_division_by_zero():
    clean = feature_maps(4, 0)
    clean[:, 2] = 7.0
    sampler = FeatureSampler(clean.half(), clean.half().unsqueeze(1), torch.zeros(4, 1, 12, 12), batch=4)
    assert bool(torch.isfinite(sampler.draw(0).clean).all())


# Training: its end, its repetition, its checkpoint


def weights(trained):
    return {name: value.clone() for name, value in trained.net.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def short(sampler=None, schedule=None, seed=0, halvings=0, **options):
    schedule = schedule or Schedule(steps=12)
    return train(sampler or feature_sampler(4), schedule, Recipe(width=8, halvings=halvings), seed=seed, **options)


@pytest.mark.parametrize(("sampler", "halvings"), [(lambda: feature_sampler(4), 0), (image_sampler, 1)])
def test_same_steps_and_seed_give_the_same_bits(sampler, halvings):
    first, again, other = (short(sampler(), Schedule(steps=6), seed=seed, halvings=halvings) for seed in (0, 0, 1))
    assert first.steps == 6
    assert first.loss == again.loss
    assert_same(weights(first), weights(again))
    assert not torch.equal(first.net.out.weight, other.net.out.weight)


def test_trained_network_is_ready_to_use():
    net = short(schedule=Schedule(steps=2)).net
    assert not net.training
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert {parameter.device.type for parameter in net.parameters()} == {"cpu"}


@pytest.mark.parametrize("space", ["features", "image"])
def test_score_is_in_units_of_clean_data(space):
    is_image = space == "image"
    sampler = image_sampler() if is_image else feature_sampler()
    trained = short(sampler, halvings=int(is_image))
    score = score_with(trained, sampler, (16, 16) if is_image else (12, 12), space)
    clean = sampler.draw(0).clean
    raw = clean * sampler.std.view(1, -1, 1, 1) + sampler.mean.view(1, -1, 1, 1)
    with torch.inference_mode():
        values = torch.stack([score(image[None]) for image in raw])
    assert values.shape == (len(clean), 256 if is_image else 144)
    assert float(values.mean()) == pytest.approx(1.0, rel=0.3)
    assert score.space == space


def test_seconds_end_by_the_clock():
    sampler = Watched(feature_sampler(4))
    trained = short(sampler, Schedule(seconds=20.0), clock=Clock(1.0))
    assert sampler.drawn == list(range(trained.steps))
    assert 5 <= trained.steps <= 20  # one or two looks at the clock a step


def test_killed_training_goes_on_to_the_same_bits(tmp_path, capsys):
    checkpoint = tmp_path / "repair.checkpoint"
    whole = short()
    first, second = Watched(feature_sampler(4), killed_at=9), Watched(feature_sampler(4))
    with pytest.raises(KeyboardInterrupt):
        short(first, checkpoint=checkpoint, clock=Clock(10.0))
    assert checkpoint.exists()
    resumed = short(second, checkpoint=checkpoint, clock=Clock(10.0))
    assert 0 < second.drawn[0] <= 9
    assert second.drawn == list(range(second.drawn[0], 12))
    assert f"goes on from step {second.drawn[0]}" in capsys.readouterr().err
    assert resumed.steps == whole.steps == 12
    assert_same(weights(resumed), weights(whole))
    assert list(tmp_path.iterdir()) == []


def test_time_before_the_kill_counts(tmp_path):
    checkpoint, schedule = tmp_path / "repair.checkpoint", Schedule(seconds=400.0)
    whole = short(schedule=schedule, checkpoint=checkpoint, clock=Clock(10.0)).steps
    with pytest.raises(KeyboardInterrupt):
        short(Watched(feature_sampler(4), whole // 2), schedule, checkpoint=checkpoint, clock=Clock(10.0))
    resumed = Watched(feature_sampler(4))
    assert abs(short(resumed, schedule, checkpoint=checkpoint, clock=Clock(10.0)).steps - whole) <= 3
    assert len(resumed.drawn) < whole


def make_checkpoint(path):
    with pytest.raises(KeyboardInterrupt):
        short(Watched(feature_sampler(4), 9), checkpoint=path, clock=Clock(10.0))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replace_network(path):
    saved = torch.load(path, weights_only=True)
    saved["net"] = RepairNet(6, 8, 1).state_dict()
    torch.save(saved, path)


def drop_steps(path):
    saved = torch.load(path, weights_only=True)
    del saved["steps"]
    torch.save(saved, path)


@pytest.mark.parametrize(
    "spoil",
    [lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"nothing"), cut, replace_network, drop_steps],
    ids=["empty", "nonsense", "cut", "other network", "incomplete"],
)
def test_checkpoint_that_cannot_be_used_is_told_and_training_starts_anew(tmp_path, capsys, spoil):
    checkpoint, sampler = tmp_path / "repair.checkpoint", Watched(feature_sampler(4))
    make_checkpoint(checkpoint)
    spoil(checkpoint)
    trained = short(sampler, checkpoint=checkpoint)
    told = capsys.readouterr().err
    assert "warning: " in told
    assert str(checkpoint) in told
    assert "starts anew" in told
    assert sampler.drawn == list(range(12))
    assert_same(weights(trained), weights(short()))
    assert not checkpoint.exists()


class Broken:
    """A sampler whose third batch is no number."""

    channels = 6

    def draw(self, step):
        batch = feature_sampler(4).draw(step)
        return Batch(batch.corrupted, batch.clean * (np.nan if step == 2 else 1.0), batch.mask)


def test_loss_that_is_no_number_is_an_error():
    with pytest.raises(DataError, match="loss became nan"):
        short(Broken())


# The schedule


@pytest.mark.parametrize(
    "fields",
    [{}, {"steps": 3, "seconds": 3.0}, {"steps": 0}, {"steps": -1}, {"seconds": 0.0}, {"seconds": -0.5}, {"seconds": math.nan}],
)  # fmt: skip
def test_schedule_is_in_steps_or_in_seconds_and_above_nothing(fields):
    with pytest.raises(UsageError, match="one of the two, above 0"):
        Schedule(**fields)


def test_fractions_of_steps():
    assert list(Schedule(steps=4).fractions()) == [0.0, 0.25, 0.5, 0.75]
    assert list(Schedule(steps=4).fractions(done=3)) == [0.75]


def test_fractions_of_seconds_follow_the_clock():
    assert list(Schedule(seconds=8.0).fractions(clock=Clock(2.0))) == [0.25, 0.5, 0.75]
    assert list(Schedule(seconds=8.0).fractions(spent_s=4.0, clock=Clock(2.0))) == [0.75]


def test_learning_rate_falls_from_one_to_nothing():
    rates = [cosine(fraction) for fraction in np.linspace(0, 1, 11)]
    assert rates[0] == 1.0
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)
    assert rates == sorted(rates, reverse=True)
