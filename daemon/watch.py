"""Whether each camera's parts and pictures are still like the calibration's: DRIFT, SETUP, and the rate of rejects.

Fed in the loop behind each verdict that an engine gave. An alarm stays until it is reset by command or another engine
takes over. It changes no verdict, unless a camera's `on_setup_change` is `reject`: then parts that would pass are
REJECT SETUP while SETUP lasts. Metrics are read from here by the metrics server's threads.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median

from daemon.config import Camera
from daemon.errors import UsageError
from daemon.inspection.drift import BETWEEN_FALSE_ALARMS, RankTest, alarm_share
from daemon.inspection.pipeline import Pipeline
from daemon.inspection.quality import SetupTest
from daemon.inspection.rate import judge_rate, rate_bounds
from daemon.inspection.reference import Reference
from daemon.record.metrics import Metrics
from daemon.types import Header, Outcome, Reason, Verdict

log = logging.getLogger("inspectd.watch")

DRIFT, SETUP = "DRIFT", "SETUP"
_RECENT = 64  # scores kept to tell by how much


@dataclass
class _Post:
    """One camera's parts of one product, judged by one engine, since its first frame or the last reset."""

    reference: Reference
    drift: RankTest
    setup: SetupTest | None
    alarms: dict[str, str] = field(default_factory=dict)  # word -> what has changed
    measured: Mapping[str, float] = field(default_factory=dict)  # of the last frame
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    judged: int = 0
    rejected: int = 0

    @property
    def drift_share(self) -> float:
        return alarm_share(self.drift.evidence)

    @property
    def setup_share(self) -> float:
        return alarm_share(self.setup.evidence) if self.setup else 0.0

    def describe_drift(self) -> str:
        parts = max(1, min(self.drift.since, len(self.recent)))
        now, before = median(list(self.recent)[-parts:]), median(self.reference.scores)
        side = "higher" if now > before else "lower"
        return (
            f"scores of passed parts {side} than in calibration: median {now:.4g} of the last {parts}, {before:.4g} of "
            f"{len(self.reference.scores)} calibration scores"
        )


class Watch:
    """One per daemon, in the loop. `words` are what the heartbeat says: DRIFT, SETUP, of any camera."""

    def __init__(self, cameras: Mapping[str, Camera], metrics: Metrics) -> None:
        self._cameras = cameras
        self._posts: dict[tuple[str, str], _Post] = {}  # by camera and product
        self.words: tuple[str, ...] = ()
        for camera in cameras:
            self._show(camera, metrics)
        self._metrics = metrics

    # -- frames ------------------------------------------------------------------------------------

    def ruled(self, camera: str, verdict: Verdict) -> Verdict:
        """The verdict as the camera's `on_setup_change` wants it."""
        if verdict.outcome is not Outcome.PASS or verdict.engine is None or SETUP not in self.words:
            return verdict
        post = self._posts.get((camera, verdict.engine.product))
        is_off = post is not None and SETUP in post.alarms and post.reference.digest == verdict.engine.digest
        known = self._cameras.get(camera)
        if not is_off or known is None or known.on_setup_change == "warn":
            return verdict
        return replace(verdict, outcome=Outcome.REJECT, reason=Reason.SETUP)

    def feed(self, camera: str, pipeline: Pipeline, verdict: Verdict) -> None:
        """Take in what `pipeline` said of a frame; what another engine said is passed over."""
        engine = verdict.engine
        if engine is None or verdict.reason not in (None, Reason.DEFECT) or engine.digest != pipeline.bundle.digest:
            return
        post = self._posts.get((camera, engine.product))
        if post is None or post.reference.digest != engine.digest:
            post = self._posts[camera, engine.product] = _begin(pipeline.references[engine.product])
            self._tell_words()
        post.judged += 1
        post.rejected += verdict.outcome is Outcome.REJECT
        if verdict.outcome is Outcome.PASS and verdict.score is not None and DRIFT not in post.alarms:
            post.drift.add(verdict.score)
            post.recent.append(verdict.score)
            if post.drift.evidence >= BETWEEN_FALSE_ALARMS:
                self._raise_alarm(post, camera, DRIFT, post.describe_drift())
        if verdict.quality:
            post.measured = verdict.quality
            if post.setup is not None and SETUP not in post.alarms:
                post.setup.add(verdict.quality)
                if post.setup.evidence >= BETWEEN_FALSE_ALARMS:
                    self._raise_alarm(post, camera, SETUP, f"camera set-up changed: {post.setup.describe()}")

    def _raise_alarm(self, post: _Post, camera: str, word: str, what: str) -> None:
        post.alarms[word] = what
        self._metrics.camera_alarms.labels(camera, word).inc()
        log.warning("alarm=%s camera=%s: %s", word, camera, what)
        self._tell_words()

    # -- orders ------------------------------------------------------------------------------------

    def reset(self, camera: str | None) -> None:
        """Begin again, with one camera or with all. Raises UsageError for a camera that is not configured."""
        if camera is not None and camera not in self._cameras:
            raise UsageError(f"found no camera {camera!r}, wanted one of {', '.join(self._cameras)}")
        self._forget(lambda name, _: camera in (None, name))
        log.info("alarms reset camera=%s", camera or "all")

    def engines_changed(self, digests: Collection[str]) -> None:
        """Another engine has another calibration: what was found against the old one says nothing."""
        self._forget(lambda _, post: post.reference.digest not in digests)

    def _forget(self, is_over: Callable[[str, _Post], bool]) -> None:
        for key in [key for key, post in self._posts.items() if is_over(key[0], post)]:
            del self._posts[key]
        self._tell_words()

    def _tell_words(self) -> None:
        raised = {word for post in self._posts.values() for word in post.alarms}
        self.words = tuple(word for word in (DRIFT, SETUP) if word in raised)

    # -- what is told ------------------------------------------------------------------------------

    def status(self) -> Header:
        """{camera: {product: ...}}, of all that have judged since the start, the last reset or the last swap."""
        told: Header = {camera: {} for camera in self._cameras}
        for (camera, product), post in self._posts.items():
            told.setdefault(camera, {})[product] = _facts(post)
        return told

    def _of(self, camera: str) -> list[_Post]:
        return [post for (name, _), post in list(self._posts.items()) if name == camera]

    def _is_raised(self, camera: str, word: str) -> float:
        return float(any(word in post.alarms for post in self._of(camera)))

    def _show(self, camera: str, metrics: Metrics) -> None:
        """Let the metrics ask when they are asked."""

        def bounds() -> tuple[float, float, float]:
            posts = self._of(camera)
            rejected, judged = sum(post.rejected for post in posts), sum(post.judged for post in posts)
            low, high = rate_bounds(max(judged, rejected), rejected)
            return (rejected / judged if judged else 0.0), low, high

        metrics.drift_statistic.labels(camera).set_function(
            lambda: max((post.drift_share for post in self._of(camera)), default=0.0)
        )
        metrics.setup_statistic.labels(camera).set_function(
            lambda: max((post.setup_share for post in self._of(camera)), default=0.0)
        )
        for word in (DRIFT, SETUP):
            metrics.camera_degraded.labels(camera, word).set_function(partial(self._is_raised, camera, word))
            metrics.camera_alarms.labels(camera, word)
        metrics.false_reject_rate_estimate.labels(camera).set_function(lambda: bounds()[0])
        metrics.false_reject_rate_low.labels(camera).set_function(lambda: bounds()[1])
        metrics.false_reject_rate_high.labels(camera).set_function(lambda: bounds()[2])


def _begin(reference: Reference) -> _Post:
    return _Post(reference, RankTest(reference.scores), SetupTest(reference.images) if reference.images else None)


def _facts(post: _Post) -> Header:
    """In four digits, so that the status of many cameras fits one header."""
    reference, medians = post.reference, post.reference.medians
    low, high = rate_bounds(post.judged, post.rejected)
    rejects = {
        "judged": post.judged, "defects": post.rejected, "low": _short(low), "high": _short(high),
        "estimate": _short(post.rejected / post.judged) if post.judged else None, "bound95": _short(reference.bound95),
        "promise": judge_rate(post.judged, post.rejected, reference.bound95),
    }  # fmt: skip
    images = {
        name: {"now": _short(value), "calibration": _short(medians[name])}
        for name, value in post.measured.items()
        if name in medians
    }
    return {
        "alarms": dict(post.alarms), "driftStatistic": _short(post.drift_share),
        "setupStatistic": _short(post.setup_share), "passed": post.drift.values,
        "calibrationScores": len(reference.scores), "images": images, "rejects": rejects,
    }  # fmt: skip


def _short(value: float) -> float:
    return float(f"{value:.4g}")
