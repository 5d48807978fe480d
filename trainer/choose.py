"""Settings chosen from good images alone: held-out good images against the same ones with synthetic defects.

REB's authors call the choice of K an open problem (Lyu et al. 2023, section 5); with a thinned bank the density
correction can win five points or lose twenty. So every setting is tried on synthetic defects, and plain 1-NN
(alpha = 0) stands in the grid: another setting is taken only where merit.is_better says so.
A setting costs what it would take on two reference cores (`nominal_ms`), so that the choice can be repeated anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import TYPE_CHECKING

import numpy as np

from daemon.bundle import Preprocessing
from daemon.types import Frame
from trainer import dataset
from trainer.dataset import Picture, Splits
from trainer.export import EngineNetwork
from trainer.features import FeatureNetwork, network_pixels, read_pixels
from trainer.grid import GridBank, GridScores, sampled_map
from trainer.merit import Merit, Spoilt, find_merit, is_better, spoil, standard_error
from trainer.progress import say
from trainer.settings import ALPHAS, CORESETS, NEIGHBOURS, SIZES, Settings, View

if TYPE_CHECKING:
    from trainer.backbone import Backbone

FEWEST = 12  # train and select images together; with fewer there is nothing to choose on
_MOST_BANK, _MOST_HELD = 80, 30  # images
_DEFECTS = 3  # of each held-out image
_MOST_ENLARGED = 1.25  # input to frame
# Milliseconds on the reference machine (two Xeon cores with AVX-512, OpenVINO f32), see bench/results/line.json.
_NETWORK_MS, _REPAIR_MS = 4.7 / 256**2, 5.0 / 1024  # a pixel; a patch
_MACS_A_MS = 81e6
_OTHER_MS = 1.0


@dataclass(frozen=True)
class Trial:
    """One setting and how it did on synthetic defects."""

    settings: Settings
    merit: Merit
    nominal_ms: float


@dataclass(frozen=True)
class Choice:
    """What was taken and why, with all that was tried, the best first."""

    settings: Settings
    reason: str
    trials: tuple[Trial, ...] = ()
    plain: Trial | None = None  # the reference: 1-NN at the default input


@dataclass(frozen=True)
class Wishes:
    """What the command line fixed (None: to be chosen), and the milliseconds that a frame may take."""

    long_side: int | None = None
    k: int | None = None
    alpha: float | None = None
    coreset: int | None = None
    budget_ms: float = 30.0
    with_repair: bool = False

    @property
    def leave_nothing(self) -> bool:
        return None not in (self.long_side, self.k, self.alpha, self.coreset)

    def defaults(self) -> Settings:
        base = Settings()
        return Settings(
            self.long_side or base.long_side, View(), self.coreset or base.coreset, self.k or base.k,
            base.alpha if self.alpha is None else self.alpha,
        )  # fmt: skip


@dataclass(frozen=True)
class _Ground:
    """What all settings are tried on."""

    backbone: Backbone
    banked: Sequence[Picture]
    spoilt: Spoilt  # of the held-out ones
    wishes: Wishes
    threads: int
    seed: int


def nominal_ms(pixels: int, patches: int, rows: int, channels: int, *, with_repair: bool) -> float:
    """What a frame of this many network pixels takes on the reference machine."""
    search = patches * rows * channels / _MACS_A_MS
    return pixels * _NETWORK_MS + search + (patches * _REPAIR_MS if with_repair else 0.0) + _OTHER_MS


def choose(backbone: Backbone, splits: Splits, wishes: Wishes, *, threads: int, seed: int, seconds: float) -> Choice:
    """Try the grid within `seconds` (infinite: all of it) and take a setting."""
    settings = wishes.defaults()
    if wishes.leave_nothing:
        return Choice(settings, "everything was given on the command line")
    good = [*splits.train, *(() if splits.few else splits.select)]
    if len(good) < FEWEST:
        plain = replace(settings, alpha=0.0 if wishes.alpha is None else wishes.alpha)
        return Choice(plain, f"plain 1-NN: {len(good)} images are too few to choose on, wanted {FEWEST} or more")
    banked, held = _divide(good)
    started, longest = monotonic(), 0.0
    ground = _Ground(backbone, banked, spoil(held, each=_DEFECTS, seed=seed), wishes, threads, seed)
    trials: list[Trial] = []
    kept: dict[Settings, GridScores] = {}
    for long_side, view in _views(_sizes(wishes, good), trials):
        # The cost of a view grows with its pixels; one that would not be done in time is not begun.
        if trials and monotonic() - started + longest * (long_side / SIZES[0]) ** 2 > seconds:
            say(f"choice: no time for {long_side} pixels, {view.exposure}, tiles {view.tiles}")
            continue
        began = monotonic()
        tried = _try_view(ground, long_side, view)
        longest = max(longest, (monotonic() - began) * (SIZES[0] / long_side) ** 2)
        for trial, scores in tried:
            trials.append(trial)
            kept[trial.settings] = scores
        if tried:
            top = max((trial for trial, _ in tried), key=lambda trial: trial.merit.value)
            merit = top.merit
            say(f"choice: {in_words(top.settings)}: image {merit.image_auroc:.3f}, pixel {merit.pixel_auroc:.3f}")
    return _take(trials, kept, settings)


@dataclass(frozen=True)
class Comparison:
    """Two backbones at one setting: merits, and the standard error of their difference."""

    before: Trial
    after: Trial
    error: float

    @property
    def gained(self) -> bool:
        return is_better(self.after.merit, self.before.merit, self.error)


def compare(
    before: Backbone, after: Backbone, splits: Splits, settings: Settings, *, threads: int, seed: int
) -> Comparison:
    """The same held-out images and synthetic defects for both."""
    wishes = Wishes(settings.long_side, settings.k, settings.alpha, settings.coreset, budget_ms=math.inf)
    banked, held = _divide([*splits.train, *splits.select])
    spoilt = spoil(held, each=_DEFECTS, seed=seed)
    tried = []
    for backbone in (before, after):
        ground = _Ground(backbone, banked, spoilt, wishes, threads, seed)
        tried += _try_view(ground, settings.long_side, settings.view)
    first, second = ((scores.maps(trial.settings), scores.truth) for trial, scores in tried)
    return Comparison(tried[0][0], tried[1][0], standard_error(first, second))


def _divide(good: Sequence[Picture]) -> tuple[list[Picture], list[Picture]]:
    """(for the bank, held out): the last third of the capture order is held out, at most 30 images evenly of it.

    Later images stand to earlier ones as the line's will stand to all of them. Held out at random instead, the
    merit of a setting said nothing of its AUROC on real defects (docs/accuracy.md).
    """
    first = len(good) - len(good) // 3
    return _evenly(good[:first], _MOST_BANK), _evenly(good[first:], _MOST_HELD)


def _evenly(pictures: Sequence[Picture], most: int) -> list[Picture]:
    rows = np.unique(np.linspace(0, len(pictures) - 1, min(most, len(pictures))).astype(int))
    return [pictures[row] for row in rows]


def _sizes(wishes: Wishes, good: Sequence[Picture]) -> list[int]:
    """Input sizes worth a try: one that is larger than the frame shows nothing more."""
    if wishes.long_side:
        return [wishes.long_side]
    most = _MOST_ENLARGED * float(np.median([max(picture.hw) for picture in good]))
    return [size for size in SIZES if size <= max(most, SIZES[0])]


def _views(sizes: Sequence[int], trials: Sequence[Trial]) -> Iterator[tuple[int, View]]:
    """Inputs worth a try, the cheap ones first; larger ones with the exposure that did better at the first size."""
    for exposure in ("as-is", "levelled"):
        yield sizes[0], View(exposure)
    best = max(trials, key=lambda trial: trial.merit.value).settings.view if trials else View()
    for size in sizes[1:]:
        yield size, best
        if size % 64 == 0 and size >= 2 * SIZES[0]:
            yield size, replace(best, tiles="2x2")


def _try_view(ground: _Ground, long_side: int, view: View) -> list[tuple[Trial, GridScores]]:
    """All affordable settings of one view."""
    wishes = ground.wishes
    size = dataset.network_size(ground.banked, long_side)
    preprocessing = Preprocessing(size=size, mean=ground.backbone.mean, std=ground.backbone.std)
    network = FeatureNetwork(EngineNetwork(ground.backbone, view), preprocessing, ground.threads)

    def cost(rows: int) -> float:
        pixels = size[0] * size[1]
        return nominal_ms(pixels, network.patches, rows, network.channels, with_repair=wishes.with_repair)

    wanted = [wishes.coreset] if wishes.coreset else CORESETS
    affordable = [rows for rows in wanted if cost(rows) <= wishes.budget_ms]
    if not affordable:
        return []
    banked = GridBank(
        network, (read_pixels(picture, preprocessing) for picture in ground.banked), coresets=affordable,
        neighbours=_neighbours(wishes), threads=ground.threads, seed=ground.seed,
    )  # fmt: skip
    sampled = sampled_map(size)
    pictures = (network_pixels(Frame(pixels), preprocessing) for pixels in ground.spoilt.pictures)
    scores = banked.score(pictures, sampled, sampled.truth(ground.spoilt))
    trials = []
    for rows in sorted(scores.distance):
        for alpha in [wishes.alpha] if wishes.alpha is not None else ALPHAS:
            for k in _neighbours(wishes)[: None if alpha else 1]:
                settings = Settings(long_side, view, rows, k, alpha)
                trials.append((Trial(settings, find_merit(scores.maps(settings), scores.truth), cost(rows)), scores))
    return trials


def _neighbours(wishes: Wishes) -> Sequence[int]:
    return [wishes.k] if wishes.k else NEIGHBOURS


def _take(trials: Sequence[Trial], kept: Mapping[Settings, GridScores], defaults: Settings) -> Choice:
    """The best setting, unless plain 1-NN at the default input is as good as far as one can tell."""
    if not trials:
        return Choice(defaults, "no setting of the grid fits --budget-ms; the defaults were taken")
    order = tuple(sorted(trials, key=lambda trial: -trial.merit.value))
    first = trials[0].settings
    plain_ones = [trial for trial in trials if trial.settings.alpha == 0 and _same_input(trial.settings, first)]
    if not plain_ones:
        reason = "the best of the grid (plain 1-NN was ruled out on the command line)"
        return Choice(order[0].settings, reason, order)
    plain = max(plain_ones, key=lambda trial: (trial.settings.coreset <= defaults.coreset, trial.settings.coreset))
    best = _smallest_as_good(order, plain, kept)
    error = _error(best, plain, kept)
    found = f"{best.merit.value - plain.merit.value:+.3f} +- {error:.3f}"
    if is_better(best.merit, plain.merit, error):
        gentlest = _least_corrected(order, best, plain, best.merit.value - error)
        return Choice(gentlest.settings, f"{found} over plain 1-NN on synthetic defects", order, plain)
    reason = f"plain 1-NN: the best of the grid that ranks images no worse is {found} better, which may be chance"
    return Choice(plain.settings, reason, order, plain)


def _smallest_as_good(order: Sequence[Trial], plain: Trial, kept: Mapping[Settings, GridScores]) -> Trial:
    """The best setting of the smallest input that is as good as the best of all, as far as one can tell.

    A larger input is slower, and its thousandth of merit says little: on magnetic_tile 512 pixels won by so much and
    lost six points of image AUROC to 384 (docs/accuracy.md).
    """
    worthy = [trial for trial in order if trial.merit.image_auroc >= plain.merit.image_auroc]
    for side in sorted({trial.settings.long_side for trial in worthy}):
        first = next(trial for trial in worthy if trial.settings.long_side == side)
        if not is_better(worthy[0].merit, first.merit, _error(worthy[0], first, kept)):
            return first
    raise AssertionError("the best is not better than itself")


def _least_corrected(order: Sequence[Trial], best: Trial, plain: Trial, least: float) -> Trial:
    """Of the best one's input, the smallest alpha that has at least the merit `least`; of that alpha, the best.

    The rule of one standard error (Breiman et al. 1984, section 3.4.3): between settings that the synthetic defects
    cannot tell apart, the simpler one. A density correction that is no gain is a risk: with real defects the strongest
    ones of the grid were the settings that fell below plain 1-NN (docs/accuracy.md).
    """
    equal = [
        trial
        for trial in order
        if _same_input(trial.settings, best.settings)
        and trial.merit.image_auroc >= plain.merit.image_auroc
        and trial.merit.value >= least
    ]
    return min(equal, key=lambda trial: trial.settings.alpha)  # of equal ones the first: `order` has the best first


def _error(one: Trial, other: Trial, kept: Mapping[Settings, GridScores]) -> float:
    """Standard error of the difference of two trials' merits."""
    first, second = ((kept[each.settings].maps(each.settings), kept[each.settings].truth) for each in (one, other))
    return standard_error(first, second)


def _same_input(one: Settings, other: Settings) -> bool:
    return (one.long_side, one.view) == (other.long_side, other.view)


def in_words(settings: Settings) -> str:
    view = settings.view
    kind = "plain 1-NN" if not settings.alpha else f"K {settings.k}, alpha {settings.alpha:g}"
    tiles = "" if view.tiles == "none" else f", tiles {view.tiles}"
    return f"{settings.long_side} pixels, exposure {view.exposure}{tiles}, {settings.coreset} rows, {kind}"
