"""Engines from a handful of good images: small variations of them in the bank, a limit from leaving one out.

With fewer than 30 images three splits would each be too small to mean anything. So all of them go into the bank,
and each image is scored by a bank made of the others (the jackknife), as if it were new. What n such scores can
support is said in the manifest and in the report: 1 / (n + 1) at best, 50 % for a single image, whose one score comes
from a variation that the bank has not seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import cv2
import numpy as np
from safetensors.numpy import save

from daemon.bundle import BANK, NETWORKS
from daemon.types import FloatArray, Tensor
from trainer import bank
from trainer.dataset import Picture
from trainer.draft import Draft, cpu_backend, open_draft
from trainer.features import FeatureNetwork, normalised, read_pixels
from trainer.progress import track
from trainer.settings import FEW_IMAGES
from trainer.site import Options, Site

_VARIATIONS = 60  # over all images, at most 12 of each
_TURN_DEGREES, _SHIFT, _GAIN = 2.0, 0.02, 0.06  # what a part on a line does: a little of everything


def vary(image: FloatArray, rng: np.random.Generator) -> FloatArray:
    """The picture (h w 3) turned, shifted and lit a little differently; the border is continued by reflection."""
    height, width = image.shape[:2]
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), rng.uniform(-_TURN_DEGREES, _TURN_DEGREES), 1.0)
    turn[:, 2] += rng.uniform(-_SHIFT, _SHIFT, 2) * (width, height)
    turned = cv2.warpAffine(image, turn, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    return np.clip(turned * np.float32(rng.uniform(1 - _GAIN, 1 + _GAIN)), 0.0, 255.0).astype(np.float32)


class FewImages:
    """Features (images, variations, P, C) of all images and their variations; the first variation is the image.

    What was `added` (good parts that a line rejected) is in every bank, as it is, and never left out: nothing is
    measured on it.
    """

    def __init__(
        self, options: Options, site: Site, pictures: Sequence[Picture], draft: Draft, added: Sequence[Picture] = ()
    ) -> None:
        if len(pictures) >= FEW_IMAGES:
            raise ValueError(f"found {len(pictures)} images, wanted fewer than {FEW_IMAGES}")
        self._options, self._draft, self._held = options, draft, len(pictures)
        self._pixels = [read_pixels(picture, draft.preprocessing) for picture in pictures]
        network = FeatureNetwork((site.folder / NETWORKS).read_bytes(), draft.preprocessing, options.threads)
        count = 1 + min(12, -(-_VARIATIONS // len(pictures)))
        self._features = np.empty((len(self._pixels), count, network.patches, network.channels), np.float32)
        for index in track(range(len(self._pixels)), "features of the images and their variations"):
            for number, pixels in enumerate(self._variations(index, count)):
                self._features[index, number] = network.run(pixels)
        self._added = np.empty((len(added), network.patches, network.channels), np.float32)
        for index, picture in enumerate(added):
            self._added[index] = network.run(read_pixels(picture, draft.preprocessing))

    def _variations(self, index: int, count: int) -> Iterator[FloatArray]:
        rng = np.random.default_rng((self._options.seed, index))
        yield self._pixels[index]
        for _ in range(count - 1):
            yield vary(self._pixels[index], rng)

    def bank(self, without: int | None = None) -> bank.Bank:
        """The bank of all images, or of all but one."""
        kept = [index for index in range(len(self._features)) if index != without]
        full = np.concatenate([rows.reshape(-1, rows.shape[-1]) for rows in (self._features[kept], self._added)])
        settings = self._draft.settings
        return bank.make_bank(
            full, rows=settings.coreset, neighbours=settings.k, threads=self._options.threads, seed=self._options.seed
        )

    def held_out(self) -> Iterator[tuple[bytes, Tensor]]:
        """For each image: the bank of the others, as bank.safetensors, and the image as the network's input."""
        if self._held == 1:
            unseen = vary(self._pixels[0], np.random.default_rng((self._options.seed, 1 << 20)))
            yield save(self.bank().tensors), normalised(unseen, self._draft.preprocessing)
            return
        for index in track(range(self._held), "scores with one image left out"):
            yield save(self.bank(index).tensors), normalised(self._pixels[index], self._draft.preprocessing)


def leave_one_out(
    options: Options, site: Site, pictures: Sequence[Picture], draft: Draft, added: Sequence[Picture] = ()
) -> FloatArray:
    """Each image's score (n,) by an engine whose bank is made of the others; the engine's own bank is put back."""
    place = site.folder / BANK
    whole, scores = place.read_bytes(), []
    try:
        for others, tensor in FewImages(options, site, pictures, draft, added).held_out():
            place.write_bytes(others)
            backend = cpu_backend(open_draft(options, site, draft))
            scores.append(backend.postprocess(backend.infer(tensor), draft.preprocessing.size).score)
            backend.close()
    finally:
        place.write_bytes(whole)
    return np.array(scores, np.float32)
