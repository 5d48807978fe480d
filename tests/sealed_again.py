"""`build_engines.py` where a page needs one more engine, not one more build: the same call, read by the same options.

The engine is the one in INSPECTD_BUILT, sealed under the name that is asked for as a new version, with the key that a build would take. A
build as it is printed is run by the tutorial's page (tests/test_pages.py).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from safetensors.numpy import load_file, save_file

import build_engines
from daemon.bundle import CALIBRATION, MANIFEST, QUALITY, SIGNATURE, seal_bundle
from trainer.dataset import list_images
from trainer.site import open_site, options_of, publish


def main() -> None:
    fields = build_engines.main.make_context("build_engines.py", sys.argv[1:]).params
    del fields["add_product"]
    [options] = options_of(fields)
    list_images(options.good)  # or it says what is wrong with the folder
    with open_site(options) as site:
        shutil.copytree(os.environ["INSPECTD_BUILT"], site.folder, dirs_exist_ok=True)
        manifest = json.loads((site.folder / MANIFEST).read_text())
        before = manifest["name"]
        for name in (CALIBRATION, QUALITY):
            rename(site.folder / name, before, options.name)
        for frame in manifest["golden"]["frames"]:
            frame["product"] = options.name
        known = {
            "name": options.name,
            "version": site.version,
            "products": {options.name: manifest["products"][before]},
        }
        for made in (MANIFEST, SIGNATURE):
            (site.folder / made).unlink()
        del manifest["files"]
        seal_bundle(site.folder, {**manifest, **known}, site.key)
        print(publish(site))


def rename(file: Path, before: str, product: str) -> None:
    """Of tensors named PRODUCT and PRODUCT/FIGURE."""
    save_file({name.replace(before, product, 1): tensor for name, tensor in load_file(file).items()}, file)


if __name__ == "__main__":
    main()
