"""The limit, and the scale that scores are told on. Split-conformal prediction (Vovk; Lei et al. 2018).

The promise: if the calibration parts and the next good part are exchangeable, that part is rejected with
probability at most (n + 1 - rank) / (n + 1), which is at most the rate asked for. Nothing is assumed about
the scores' distribution. The promise is about the average over calibration sets; for the one set at hand
the rate follows a Beta distribution, whose 95 % quantile is `bound95`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from scipy.stats import beta, mannwhitneyu

from daemon.bundle import Product, Standardisation
from daemon.errors import DataError
from daemon.types import FloatArray

_TO_DEVIATION = 1.4826  # times the median absolute deviation = standard deviation of a Gaussian
_SIGMA, _SIGMA_SIDE = 4.0, 256  # smoothing in pixels of the network's input, at this long side
_SHIFT_P = 0.01
_FEW_SCORES = 20


@dataclass(frozen=True)
class GoodScores:
    """Scores (n,) of the select and of the calibration split, in capture order, float32."""

    select: FloatArray
    calibrate: FloatArray


@dataclass(frozen=True)
class Rank:
    """Which order statistic of n calibration scores (1 = lowest) is the highest that passes, for which rate."""

    rank: int
    supported: float
    bound95: float


def conformal_rank(n: int, wanted: float) -> Rank:
    """The ceil((n + 1)(1 - wanted))-th smallest; where n < that rank, the highest score and the rate 1 / (n + 1).

    The product is taken on the rate as written (0.05, not the nearest binary fraction): a rank one too
    high or too low by rounding would break the promise or waste it.
    """
    rank = math.ceil((n + 1) * (1 - Fraction(repr(wanted))))
    supported = wanted if rank <= n else 1 / (n + 1)
    rank = min(rank, n)
    return Rank(rank, supported, float(beta.ppf(0.95, n + 1 - rank, rank)))


def conformal_limit(scores: FloatArray, wanted: float) -> Product:
    """What the product is judged by, from its n calibration scores (float32). Raises DataError for a nan.

    The daemon rejects AT the limit, so the limit is the next float32 above the order statistic: a
    score equal to it passes. At most n - rank of the calibration scores are rejected, ties or not, because
    only scores strictly above the order statistic are; ties can only make rejections rarer. Map values
    are float32 too, so the part's limit and the map's cut at the same place.
    """
    broken = int((~np.isfinite(scores)).sum())
    if broken:
        raise DataError(f"found {broken} of {len(scores)} calibration scores that are not finite, wanted none")
    ordered = np.sort(scores.astype(np.float32))
    taken = conformal_rank(len(ordered), wanted)
    limit = float(np.nextafter(ordered[taken.rank - 1], np.float32(np.inf)))
    return Product(
        limit=limit,
        mapLimit=limit,
        targetFalseReject=wanted,
        supportedFalseReject=taken.supported,
        n=len(ordered),
        bound95=taken.bound95,
        medianGood=float(np.median(ordered)),
    )


def standardise(patch_scores: FloatArray) -> Standardisation:
    """Median and robust deviation of the select split's patch scores (any shape). Raises DataError for a nan.

    Where half the patches score the same, the plain deviation stands in; where all do, 1.
    """
    values = patch_scores.astype(np.float64).ravel()
    broken = int((~np.isfinite(values)).sum())
    if broken:
        raise DataError(f"found {broken} of {len(values)} patch scores that are not finite, wanted none")
    centre = float(np.median(values))
    for scale in (_TO_DEVIATION * float(np.median(np.abs(values - centre))), float(values.std())):
        if scale > 1e-6 * max(1.0, abs(centre)):
            return Standardisation(centre=centre, scale=scale)
    return Standardisation(centre=centre, scale=1.0)


def smoothing_sigma(size: tuple[int, int]) -> float:
    """REB's 4 pixels at 256, in proportion to the input's long side."""
    return _SIGMA * max(size) / _SIGMA_SIDE


def find_doubts(product: Product, scores: GoodScores) -> list[str]:
    """What the builder should know before trusting the limit, a sentence each."""
    doubts = []
    supported, wanted = product.supportedFalseReject, product.targetFalseReject
    if supported > wanted:
        doubts.append(
            f"{product.n} calibration images support a false-reject rate of {supported:.2%} at best, not the "
            f"{wanted:.2%} wanted: {supported:.2%} was taken ({wanted:.2%} needs {math.ceil(1 / wanted) - 1} images)"
        )
    if product.n < _FEW_SCORES:
        doubts.append(f"{product.n} calibration images are few: the limit may be far off; wanted {_FEW_SCORES} or more")
    shift = _find_shift(scores.calibrate, scores.select)
    return [*doubts, shift] if shift else doubts


def _find_shift(calibration: FloatArray, select: FloatArray) -> str | None:
    """A sentence where the calibration scores lie systematically to one side of the select scores.

    Two-sided Mann-Whitney test at 1 %. The two splits follow each other in capture order, so a
    difference means that parts or camera changed while the images were taken.
    """
    if len(select) < 3 or mannwhitneyu(calibration, select).pvalue >= _SHIFT_P:
        return None
    if np.median(calibration) > np.median(select):
        side, meaning = "higher", "the later images look less like the training images: the limit holds for them, "
        advice = "but if the change goes on, good parts will be rejected; train on images of the whole period"
    else:
        side, meaning = "lower", "the calibration images look more like the training images than others do: "
        advice = "the limit may be too low for other good parts; look for near-copies, or mix the capture order"
    medians = f"median {np.median(calibration):.3g} against {np.median(select):.3g}"
    return f"calibration scores are systematically {side} than select scores ({medians}): {meaning}{advice}"
