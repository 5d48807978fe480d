"""The peer's side of bench/peer_anomalib.py; runs in the peer's environment, by itself."""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np
import openvino as ov  # here, before anything of the daemon: it goes without OpenVINO's conversion tools
import torch


def stub_missing_operators() -> None:
    """torchvision beside a torch of another build lacks its compiled operators; PatchCore uses none of them."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for module in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[module]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def make_model(weights: str) -> Any:
    """PatchCore on EfficientNet-Lite0 with the packaged weights, stride 8 and 16."""
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    model = PatchcoreModel(layers=["blocks.2", "blocks.4"], backbone="tf_efficientnet_lite0", pre_trained=False)
    own = model.feature_extractor.state_dict()
    given = {to_timm(key): value for key, value in torch.load(weights, weights_only=True).items()}
    named = {key: given.get(key.removeprefix("feature_extractor.")) for key in own}
    missing = [key for key, value in named.items() if value is None and "num_batches" not in key]
    if missing:
        sys.exit(f"no weights for {missing[:3]} and {len(missing)} more")
    model.feature_extractor.load_state_dict({k: v for k, v in named.items() if v is not None}, strict=False)
    return model.eval()


_STAGES = (1, 2, 2, 3, 3, 4, 1)  # blocks of EfficientNet-Lite0


def to_timm(key: str) -> str:
    """The weight file's name of a tensor -> timm's."""
    if not key.startswith("_blocks."):
        return key.replace("_conv_stem", "conv_stem").replace("_bn0", "bn1")
    _, number, rest = key.split(".", 2)
    index, stage = int(number), 0
    while index >= _STAGES[stage]:
        index -= _STAGES[stage]
        stage += 1
    names = (
        {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
        if stage == 0
        else {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
              "_project_conv": "conv_pwl", "_bn2": "bn3"}
    )  # fmt: skip
    part, _, kind = rest.partition(".")
    return f"blocks.{stage}.{index}.{names[part]}.{kind}"


def read(data: bytes) -> np.ndarray:
    """An image file -> (1 3 256 256), scaled as the weights expect."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    small = cv2.resize(pixels, (256, 256), interpolation=cv2.INTER_AREA)[:, :, ::-1]
    return ((small.astype(np.float32) - 127.5) / 127.5).transpose(2, 0, 1)[None]


def fit(model: Any, paths: list[Path], rows: int) -> None:
    """Embeddings of the training images, thinned by the project's greedy coreset."""
    from trainer.bank import choose_core

    found = []
    with torch.no_grad():
        for path in paths:
            features = model.feature_extractor(torch.from_numpy(read(path.read_bytes())))
            features = {layer: model.feature_pooler(feature) for layer, feature in features.items()}
            found.append(model.reshape_embedding(model.generate_embedding(features)))
    full = torch.cat(found)
    model.memory_bank = full[choose_core(full, rows, 0)].contiguous()


class Exported(torch.nn.Module):
    """The model with its two results alone: its own named tuple holds empty fields, which cannot be traced."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.model(images)
        return found.pred_score, found.anomaly_map


def export(model: Any, threads: int, precisions: list[str]) -> tuple[dict[str, Any], int]:
    """({precision: OpenVINO's request}, their batch): anomalib's own graph; batch 1 where it can be traced, else 2."""
    for batch in (1, 2):
        try:
            converted = ov.convert_model(Exported(model).eval(), example_input=torch.zeros(batch, 3, 256, 256))
            converted.reshape([batch, 3, 256, 256])
            options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
            requests = {}
            for precision in precisions:
                options["INFERENCE_PRECISION_HINT"] = precision
                requests[precision] = ov.Core().compile_model(converted, "CPU", options).create_infer_request()
                requests[precision].infer([np.zeros((batch, 3, 256, 256), np.float32)])
        except Exception as error:  # whatever tracing and compiling raise
            print(f"peer: batch {batch}: {str(error)[:200]}", file=sys.stderr)
            continue
        return requests, batch
    sys.exit("the peer's model cannot be exported")


def infer(request: Any, batch: int, images: list[bytes]) -> list[float]:
    """The scores of as many images as the batch holds."""
    tensor = np.concatenate([read(data) for data in images])
    results = request.infer([tensor])
    by_size = sorted((np.asarray(value) for value in results.values()), key=lambda value: value.size)
    return [float(value) for value in by_size[0].reshape(-1)[:batch]]


def auroc(good: list[float], bad: list[float]) -> float:
    wins = sum((np.array(good) < value).sum() + 0.5 * (np.array(good) == value).sum() for value in bad)
    return float(wins / (len(good) * len(bad)))


def main() -> None:
    given = json.loads(sys.argv[1])
    torch.set_num_threads(given["threads"])
    cv2.setNumThreads(1)
    stub_missing_operators()
    folder = Path(given["folder"])
    model = make_model(given["weights"])
    fit(model, sorted((folder / "train" / "good").iterdir()), given["rows"])
    requests, batch = export(model, given["threads"], given["precisions"])
    aurocs = {precision: score_all(request, batch, folder) for precision, request in requests.items()}
    versions = {name: version(name) for name in ("anomalib", "torch", "openvino")}
    print(json.dumps({"aurocs": aurocs, "versions": versions, "batch": batch}), flush=True)
    frames = [Path(path).read_bytes() for path in given["frames"]]
    for precision in sys.stdin:
        request, spent = requests[precision.strip()], []
        for start in range(0, len(frames) - batch + 1, batch):
            began = time.perf_counter()
            any(score >= 0.5 for score in infer(request, batch, frames[start : start + batch]))
            spent.append(1000.0 * (time.perf_counter() - began) / batch)
        print(json.dumps({"ms": median(spent)}), flush=True)


def score_all(request: Any, batch: int, folder: Path) -> float:
    """Image AUROC over the folder's test images."""
    scores: dict[bool, list[float]] = {True: [], False: []}
    for kind in sorted((folder / "test").iterdir()):
        data = [path.read_bytes() for path in sorted(kind.iterdir())]
        for start in range(0, len(data), batch):
            part = data[start : start + batch]
            found = infer(request, batch, part + part[-1:] * (batch - len(part)))
            scores[kind.name == "good"] += found[: len(part)]
    return auroc(scores[True], scores[False])


if __name__ == "__main__":
    main()
