"""From configured products to proven engines: verify, open, replay the golden frames."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable

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
    """The engine of every configured product, by product, not yet started.

    Raises BundleError, ConfigError or DeviceError: a daemon never starts half configured.
    """
    trusted = load_trusted(config.security.keys / "trusted.yaml")
    engines: dict[str, Engine] = {}
    for product in sorted({camera.product for camera in config.cameras.values()}):
        bundle = open_bundle(current_bundle(config.engines.dir, product), trusted)
        known = bundle.manifest.products
        if product not in known:
            raise ConfigError("cameras", [f"product {product!r}: its engine knows only {', '.join(known)}"])
        engines.update(dict.fromkeys(known, Engine(_open_pipeline(bundle, config, metrics), report)))
    return engines


def _open_pipeline(bundle: Bundle, config: Config, metrics: Metrics) -> Pipeline:
    opened = open_backend(bundle, config.backend.kind, config.backend.precision, config.backend.threads)
    results = config.results
    pictures = Pictures(mask=results.mask, heatmap=results.heatmap, frame_on_reject=results.frame_on_reject)
    pipeline = Pipeline(bundle, opened, pictures)
    deviation = check_golden(pipeline)
    manifest = bundle.manifest
    for name, product in manifest.products.items():
        metrics.engine_info.labels(name, manifest.version, bundle.digest[:16]).set(1)
        metrics.score_limit.labels(name).set(product.limit)
    engine = f"{manifest.name}/{manifest.version}"
    share = round(100 * deviation)
    log.info(
        "engine=%s backend=%s precision=%s golden_deviation_percent=%d", engine, opened.name, opened.precision, share
    )
    return pipeline


def describe(config: Config, engines: dict[str, Engine]) -> Header:
    """What a BIRTH says: cameras, products, the engines' digests and the limits."""
    bundles = {name: engine.pipeline.bundle for name, engine in engines.items()}
    return {
        "cameras": list(config.cameras),
        "products": list(bundles),
        "engines": {name: bundle.digest for name, bundle in bundles.items()},
        "limits": {name: bundle.manifest.products[name].limit for name, bundle in bundles.items()},
    }


def calm_the_interpreter() -> None:
    """Keep the collector and the interpreter lock out of the way of deadlines, once everything is loaded."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    sys.setswitchinterval(0.0001)
