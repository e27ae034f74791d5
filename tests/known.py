"""Images that say their number, and a model whose logits for each number are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from zoo.data import DataConfig


def known_cfg(architecture: str, side: int, label_names: Sequence[str] | None) -> dict[str, Any]:
    """The `pretrained_cfg` of a stand-in for a model: images as they are, at `side` x `side`."""
    return {
        "architecture": architecture,
        "input_size": (3, side, side),
        "mean": (0.0,) * 3,
        "std": (1.0,) * 3,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "label_names": label_names,
    }


class Known(nn.Module):
    """Gives image number i, which `known_folder` writes into the image's colour, the i-th row of `logits` (N, C)."""

    def __init__(self, logits: np.ndarray, label_names: Sequence[str] | None = None, **cfg: Any) -> None:
        super().__init__()
        self.num_classes = logits.shape[1]
        self.logits = nn.Parameter(torch.from_numpy(logits).float())
        self.pretrained_cfg = known_cfg("known", 8, label_names) | cfg

    def forward(self, images: Tensor) -> Tensor:
        colour = (images.float().mean((2, 3)) * 255).round().long()
        return self.logits[colour[:, 0] + 256 * colour[:, 1]]


def random_logits(images: int, classes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (images, classes)).astype(np.float32)


def known_folder(root: Path, files: Sequence[str], **options: Any) -> DataConfig:
    """`root/<file>` for each of `files`, such as `val/cat/1.png`: an image of the colour that says its number."""
    for number, file in enumerate(files):
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as opened:  # PNG whatever it is called: colours must stay exact
            Image.new("RGB", (8, 8), (number % 256, number // 256, 0)).save(opened, format="png")
    given: dict[str, Any] = {"name": "folder", "path": str(root), "batch_size": 4, "workers": 0} | options
    return DataConfig(**given)


def softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)
