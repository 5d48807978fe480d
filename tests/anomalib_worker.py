"""anomalib's side of tests/with_anomalib.py: PatchCore, trained and exported by anomalib itself, in its environment.

    anomalib_worker.py PARTS WEIGHTS PLACE

PARTS/train/good and PARTS/test/... as MVTec AD lays them out, of 256 x 256. Writes PLACE/weights/onnx/model.onnx with
its weights beside it, as anomalib exports by default, PLACE/single/weights/onnx/model.onnx as docs/how-to/import.md
advises, and PLACE/maps/<folder>/<stem>.npy: what the model itself, in
torch, makes of the test images. The backbone's weights are the trainer's packaged ones, so that nothing is fetched.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import cv2
import numpy as np
import torch

from bench.peer_worker import make_model, stub_missing_operators


def main() -> None:
    parts, weights, place = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    torch.manual_seed(0)
    torch.set_num_threads(2)
    stub_missing_operators()
    logging.disable(logging.WARNING)
    from anomalib.data import Folder
    from anomalib.engine import Engine
    from anomalib.models import Patchcore

    data = Folder(
        name="parts", root=parts, normal_dir="train/good", normal_test_dir="test/good",
        abnormal_dir=["test/dent", "test/stain"], val_split_mode="same_as_test", train_batch_size=8,
        eval_batch_size=8, num_workers=0, seed=0,
    )  # fmt: skip
    model = Patchcore(
        backbone="tf_efficientnet_lite0", layers=["blocks.2", "blocks.4"], pre_trained=False,
        coreset_sampling_ratio=0.02, visualizer=False, evaluator=False,
    )  # fmt: skip
    model.model.feature_extractor = make_model(weights).feature_extractor
    engine = Engine(
        accelerator="cpu", devices=1, default_root_dir=place / "runs", enable_progress_bar=False,
        enable_model_summary=False, barebones=False,
    )  # fmt: skip
    engine.fit(model, datamodule=data)
    path = engine.export(model, "onnx", export_root=place, input_size=(256, 256))
    advised = {"dynamic_axes": {}, "external_data": False}
    engine.export(model, "onnx", export_root=place / "single", input_size=(256, 256), onnx_kwargs=advised)
    model = model.eval().cpu()
    for image in sorted((parts / "test").rglob("*.png")):
        target = place / "maps" / image.parent.name / f"{image.stem}.npy"
        target.parent.mkdir(parents=True, exist_ok=True)
        with torch.inference_mode():
            np.save(target, model(read(image)).anomaly_map.numpy().reshape(256, 256))
    print(path)


def read(path: Path) -> torch.Tensor:
    """(1 3 256 256), RGB in 0..1: what anomalib's exports take."""
    pixels = cv2.imread(str(path), cv2.IMREAD_COLOR)[:, :, ::-1]
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], np.float32) / np.float32(255.0))


if __name__ == "__main__":
    main()
