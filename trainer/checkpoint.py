"""A training that tells how far it is and goes on after a kill where it was last saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch import nn

from trainer.progress import say, warn

_SAVE_EVERY_S = 30.0
_SAY_EVERY_S = 10.0


class Progress:
    """Counts, tells and saves. A checkpoint holds tensors and numbers only and is loaded as such."""

    def __init__(
        self, name: str, path: Path | None, net: nn.Module, optimizer: torch.optim.Optimizer, clock: Callable[[], float]
    ) -> None:
        """`name` is the training's, for people. Without a path nothing is saved."""
        self.steps, self.spent_s = 0, 0.0
        self._name, self._path, self._net, self._optimizer, self._clock = name, path, net, optimizer, clock
        if path is not None and path.exists():
            self._resume(path)
        self._started = clock() - self.spent_s
        self._saved = self._said = clock()

    def _resume(self, path: Path) -> None:
        """Go on from the checkpoint; from one that cannot be used there is nothing to save, so start anew."""
        fresh = deepcopy(self._net.state_dict())
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            steps, spent_s = int(saved["steps"]), float(saved["spent_s"])
            self._net.load_state_dict(saved["net"])
            self._optimizer.load_state_dict(saved["optimizer"])
        except Exception as error:  # torch raises whatever the broken bytes lead it to
            self._net.load_state_dict(fresh)
            reason = str(error).partition("\n")[0]
            warn(f"{path}: no checkpoint that can be used ({reason}); the training starts anew")
            return
        self.steps, self.spent_s = steps, spent_s
        say(f"{self._name}: goes on from step {self.steps}, saved in {path}")

    def advance(self, fraction: float, losses: Sequence[float]) -> None:
        self.steps += 1
        now = self._clock()
        if now - self._said >= _SAY_EVERY_S and fraction > 0.0:
            self._said = now
            left = (now - self._started) * (1.0 - fraction) / fraction
            say(f"{self._name}: step {self.steps}, loss {np.mean(losses[-50:]):.4f}, {left:.0f} s left")
        if self._path is not None and now - self._saved >= _SAVE_EVERY_S:
            self._saved = now
            self.save()

    def save(self) -> None:
        if self._path is None:
            return
        partial = self._path.with_suffix(".partial")
        state = {"net": self._net.state_dict(), "optimizer": self._optimizer.state_dict()}
        torch.save({**state, "steps": self.steps, "spent_s": self._clock() - self._started}, partial)
        partial.replace(self._path)

    def forget(self) -> None:
        """The training is complete: what was saved is of no use any more."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
