"""What both ways of fine-tuning a backbone share: what is frozen, how convolutions are computed, when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeVar

import openvino as ov
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from trainer.backbone import Backbone
from trainer.progress import say
from trainer.schedule import Schedule

_Made = TypeVar("_Made")
_AHEAD = 2  # batches
_SAY_EVERY_S = 10.0
_PROBE = 128  # pixels a side of the image that shows which layer has which stride


@dataclass(frozen=True)
class Finetuned:
    """The backbone after `steps` updates; mean losses of their first and last tenth; accuracy (0..1) on fresh views."""

    backbone: Backbone
    steps: int
    loss_first: float
    loss_last: float
    accuracy: float


def make_ahead(make: Callable[[int], _Made], pool: ThreadPoolExecutor) -> Iterator[_Made]:
    """Batches 0, 1, .. for training; the next ones are made while one is learnt from."""
    waiting: list[Future[_Made]] = []
    for number in count():
        waiting.append(pool.submit(make, number))
        if len(waiting) > _AHEAD:
            yield waiting.pop(0).result()


class Clocked:
    """How much of a schedule is over, and a line about it every ten seconds."""

    def __init__(self, schedule: Schedule, clock: Callable[[], float]) -> None:
        self._schedule, self._clock = schedule, clock
        self._started = self._said = clock()

    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._started

    def share(self, steps: int) -> float:
        """0 at the start, 1 and above when it is over."""
        if self._schedule.steps is not None:
            return steps / self._schedule.steps
        assert self._schedule.seconds is not None
        return self.elapsed() / self._schedule.seconds

    def tell(self, steps: int, share: float, loss: float) -> None:
        now = self._clock()
        if now - self._said >= _SAY_EVERY_S and share < 1.0:
            self._said = now
            left = (now - self._started) * (1.0 / share - 1.0)
            say(f"fine-tuning: {steps} updates, loss {loss:.3f}, some {left:.0f} s left")


def has_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16; emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return "BF16" in list(ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


class ExactDepthwise(TorchFunctionMode):
    """Depthwise convolutions in float32: oneDNN takes four times as long over their weights' gradients in bf16."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        is_slow = func is F.conv2d and len(args) > 1 and args[1].shape[1] == 1 and args[1].requires_grad
        if is_slow and args[0].device.type == "cpu":
            args = (args[0].float(), *args[1:])
            with torch.autocast("cpu", enabled=False):
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def freeze_fine(network: nn.Module, stride: int) -> int:
    """Freeze all layers up to the last one whose output is finer than the stride; the maps' channels, summed.

    By the order in which they run, since a squeeze-and-excite between fine layers has an output of one pixel.
    """
    ran: list[tuple[nn.Module, int]] = []

    def note(module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            ran.append((module, round(_PROBE / output.shape[-2]) if output.ndim == 4 else _PROBE))

    own = [module for module in network.modules() if next(module.parameters(recurse=False), None) is not None]
    hooks = [module.register_forward_hook(note) for module in own]
    with torch.no_grad():
        maps = network(torch.zeros(1, 3, _PROBE, _PROBE))
    for hook in hooks:
        hook.remove()
    fine = [number for number, (_, found) in enumerate(ran) if found < stride]
    for module, _ in ran[: fine[-1] + 1 if fine else 0]:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
    return sum(found.shape[1] for found in maps)
