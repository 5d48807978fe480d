"""Golden frames: does this machine, in this precision, give the scores that were signed?"""

from __future__ import annotations

from daemon.errors import BundleError, DataError
from daemon.inspection.decode import decode_file
from daemon.inspection.pipeline import Pipeline
from daemon.types import Frame


def check_golden(pipeline: Pipeline) -> float:
    """Replay every golden frame; the largest deviation as a fraction of what is allowed (0..1).

    Raises BundleError when one is out of tolerance or ends in another outcome: such an engine must not
    judge parts here.
    """
    bundle, precision = pipeline.bundle, pipeline.backend.precision
    golden = bundle.manifest.golden
    tolerance = golden.tolerance.get(precision)
    if tolerance is None:
        raise BundleError(f"{bundle.folder}: has no golden tolerance for precision {precision}; build the engine again")
    worst = 0.0
    for expected in golden.frames:
        product = bundle.manifest.products[expected.product]
        anomaly = pipeline.anomaly_map(read_golden(bundle.read(expected.file), str(bundle.folder / expected.file)))
        outcome = pipeline.judge(anomaly, expected.product).outcome.value
        allowed = tolerance * abs(product.limit - product.medianGood)
        deviation = abs(anomaly.score - expected.score)
        if outcome != expected.outcome or not deviation <= allowed:
            raise BundleError(
                f"{bundle.folder / expected.file}: found score {anomaly.score:.6g} ({outcome}), wanted "
                f"{expected.score:.6g} ({expected.outcome}) within {allowed:.3g} in {precision}: this machine does not "
                "reproduce the engine; use backend.precision f32, or build the engine for this machine"
            )
        worst = max(worst, deviation / allowed)  # the manifest's schema keeps the limit above the median
    return worst


def read_golden(data: bytes, name: str) -> Frame:
    """A golden PNG's pixels. Raises BundleError."""
    try:
        return decode_file(data, name)
    except DataError as error:
        raise BundleError(str(error)) from error
