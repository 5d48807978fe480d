"""From configured products to proven engines: verify, open, replay the golden frames."""

from __future__ import annotations

import gc
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from daemon.bundle import Bundle, current_bundle, open_bundle
from daemon.config import Config
from daemon.errors import ConfigError
from daemon.inspection.backend import open_backend
from daemon.inspection.engine import Done, Engine
from daemon.inspection.golden import check_golden
from daemon.inspection.pipeline import Pictures, Pipeline
from daemon.keys import load_trusted
from daemon.record.metrics import Metrics
from daemon.types import Header

log = logging.getLogger("inspectd.loading")


def open_engines(config: Config, metrics: Metrics, report: Callable[[Done], None]) -> dict[str, Engine]:
    """The engine of every product that the cameras name or their engines know, by product, not yet started.

    Raises BundleError, ConfigError or DeviceError: a daemon never starts half configured.
    """
    wanted = config.engine_names()
    opened: dict[str, Engine] = {}
    for name in sorted(set(wanted.values())):
        pipeline = open_engine(config, current_bundle(config.engines.dir, name))
        opened[name] = Engine(pipeline, report)
        tell_engine(metrics, pipeline.bundle)
    engines = {}
    for product, name in wanted.items():
        known = opened[name].pipeline.bundle.manifest.products
        if product not in known:
            raise ConfigError("cameras", [f"product {product!r}: its engine {name} knows only {', '.join(known)}"])
        engines[product] = opened[name]
    # What a frame may name beside: of a product that several engines know, nobody has said whose it is.
    for product, count in Counter(each for engine in opened.values() for each in _known(engine)).items():
        if product not in engines and count == 1:
            engines[product] = next(engine for engine in opened.values() if product in _known(engine))
    return engines


def _known(engine: Engine) -> Iterable[str]:
    return engine.pipeline.bundle.manifest.products


def open_engine(config: Config, folder: Path) -> Pipeline:
    """Verify a bundle, open it as config says and replay its golden frames. Raises BundleError or DeviceError."""
    bundle = open_bundle(folder, load_trusted(config.security.keys / "trusted.yaml"))
    opened = open_backend(bundle, config.backend.kind, config.backend.precision, config.backend.threads)
    results = config.results
    pictures = Pictures(
        mask=results.mask,
        heatmap=results.heatmap,
        frame_on_reject=results.frame_on_reject,
        frame_every_ms=results.frame_every_ms,
    )
    pipeline = Pipeline(bundle, opened, pictures)
    deviation = pipeline.golden_deviation = check_golden(pipeline)
    engine = f"{bundle.manifest.name}/{bundle.manifest.version}"
    share = round(100 * deviation)
    log.info(
        "engine=%s backend=%s precision=%s golden_deviation_percent=%d", engine, opened.name, opened.precision, share
    )
    return pipeline


def tell_engine(metrics: Metrics, bundle: Bundle) -> None:
    """The engine that judges now, in the metrics."""
    for name, product in bundle.manifest.products.items():
        metrics.engine_info.labels(name, bundle.manifest.version, bundle.digest[:16]).set(1)
        metrics.score_limit.labels(name).set(product.limit)
        metrics.know_product(name)
        metrics.false_reject_rate_promised.labels(name).set(product.bound95)


def forget_engine(metrics: Metrics, bundle: Bundle) -> None:
    """It judges no more."""
    for name in bundle.manifest.products:
        metrics.engine_info.remove(name, bundle.manifest.version, bundle.digest[:16])


def describe(config: Config, engines: dict[str, Engine]) -> Header:
    """What a BIRTH says: cameras, products, the engines' digests and the limits."""
    bundles = {name: engine.pipeline.bundle for name, engine in engines.items()}
    return {
        "cameras": list(config.cameras),
        "products": list(bundles),
        "engines": {name: bundle.digest for name, bundle in bundles.items()},
        "limits": {name: bundle.manifest.products[name].limit for name, bundle in bundles.items()},
    }


def name_engines(engines: dict[str, Engine]) -> Header:
    """Version, digest and how well the golden frames were reproduced, by product, for the status."""
    pipelines = {name: engine.pipeline for name, engine in engines.items()}
    return {
        name: {
            "version": pipeline.bundle.manifest.version,
            "digest": pipeline.bundle.digest,
            "goldenDeviation": pipeline.golden_deviation,
        }
        for name, pipeline in pipelines.items()
    }


def calm_the_interpreter() -> None:
    """Keep the collector and the interpreter lock out of the way of deadlines, once everything is loaded."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    sys.setswitchinterval(0.0001)
