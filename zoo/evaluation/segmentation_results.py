"""What an evaluation of a segmentation network found: as text, JSON, CSV and pictures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zoo.evaluation.plots import plot_confusion, plot_masks
from zoo.evaluation.results import MAX_CONFUSION_IN_JSON, csv_writer, tool_versions, write_csv
from zoo.files import make_folder, whole_file

__all__ = ["SEGMENTATION_COLUMNS", "Sample", "SegmentationResults", "class_figures"]

SEGMENTATION_COLUMNS = (
    *("model", "miou", "mean_accuracy", "pixel_accuracy", "loss", "param_count", "img_height", "img_width"),
    *("interpolation", "data", "images", "skipped", "images_per_second", "model_images_per_second", "batch_size"),
    *("amp", "device", "split", "zoo", "torch", "timm", "command"),
)


class Sample(NamedTuple):
    """An image (h, w, C) uint8, its mask (H, W), and the class that was predicted of each pixel (H, W)."""

    image: np.ndarray
    mask: np.ndarray
    predicted: np.ndarray


def class_figures(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each class its IoU and its accuracy, in percent, from a confusion (C, C) of true by predicted class.

    IoU is right / (true + predicted - right), NaN of classes that are neither true nor predicted of any pixel; accuracy
    is right / true, NaN of classes that are true of none.
    """
    right, true, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        iou = 100 * right / (true + predicted - right)
        accuracy = 100 * right / true
    return iou, accuracy


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentationResults:
    """What an evaluation found. IoU and accuracies are in percent, over pixels that have a class.

    `miou` is the mean IoU of the classes that are true or predicted of any pixel, `mean_accuracy` the mean accuracy of
    those that are true of any, `pixel_accuracy` the share of all pixels, `loss` the mean cross-entropy of a pixel.
    `confusion` is (C, C), true by predicted class, in pixels. `images_per_second` counts the whole evaluation, which is
    loading, transforms, model and counting; `model_images_per_second` the model alone, without the first batch of each
    size (None where there was no second). `skipped` names damaged images. `split` is the one that was asked for, None
    for the data's own choice. `samples` are the first images, for the picture. `command` is what made the results, with
    local paths cut to their last part, where that was `eval.py`; `versions` are of the zoo and of what it computes
    with.
    """

    model: str
    data: str = ""
    miou: float
    mean_accuracy: float
    pixel_accuracy: float
    loss: float
    images: int
    images_per_second: float
    model_images_per_second: float | None = None
    classes: Sequence[str]
    confusion: np.ndarray = dataclasses.field(compare=False)
    preprocessing: Mapping[str, Any]
    params: int
    batch_size: int
    skipped: Sequence[str] = ()
    amp: str = "no"
    device: str = "cpu"
    split: str | None = None
    samples: Sequence[Sample] = dataclasses.field(default=(), compare=False, repr=False)
    command: str | None = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=lambda: tool_versions())

    @property
    def per_class(self) -> dict[str, float | None]:
        """IoU of each class; None of classes that are neither true nor predicted of any pixel."""
        iou, _ = class_figures(self.confusion)
        return {name: None if np.isnan(value) else float(value) for name, value in zip(self.classes, iou, strict=True)}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; the confusion matrix only up to 100 classes."""
        left_out = ("samples", "classes", "confusion", "preprocessing", "skipped", "versions", "command")
        plain = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in left_out
        }
        return plain | {
            "task": "segmentation",
            "per_class": self.per_class,
            "confusion": self.confusion.tolist() if len(self.confusion) <= MAX_CONFUSION_IN_JSON else None,
            "preprocessing": {k: list(v) if isinstance(v, tuple) else v for k, v in self.preprocessing.items()},
            "skipped": list(self.skipped),
            "command": self.command,
            "versions": dict(self.versions),
        }

    def to_row(self) -> dict[str, Any]:
        """One row of a table, under SEGMENTATION_COLUMNS."""
        height, width = self.preprocessing["input_size"][1:]
        found: dict[str, Any] = {
            **{name: round(getattr(self, name), 4) for name in ("miou", "mean_accuracy", "pixel_accuracy")},
            "loss": round(self.loss, 6),
            "param_count": round(self.params / 1e6, 2),
            "img_height": height,
            "img_width": width,
            "interpolation": self.preprocessing["interpolation"],
            "skipped": len(self.skipped),
            "images_per_second": round(self.images_per_second, 2),
            "model_images_per_second": self.model_images_per_second and round(self.model_images_per_second, 2),
            "zoo": self.versions["backbone-zoo"],
            "torch": self.versions["torch"],
            "timm": self.versions["timm"],
        }
        return {name: found[name] if name in found else getattr(self, name) for name in SEGMENTATION_COLUMNS}

    def per_class_rows(self) -> list[dict[str, Any]]:
        """For each class: pixels, IoU and accuracy in percent, and what most of its pixels are wrongly taken for."""
        iou, accuracy = class_figures(self.confusion)
        wrong = self.confusion - np.diag(np.diag(self.confusion))
        rows = []
        for number, name in enumerate(self.classes):
            most = int(wrong[number].argmax())
            times = int(wrong[number, most])
            rows.append(
                {
                    "class": name,
                    "pixels": int(self.confusion[number].sum()),
                    "predicted_pixels": int(self.confusion[:, number].sum()),
                    "iou": None if np.isnan(iou[number]) else float(iou[number]),
                    "accuracy": None if np.isnan(accuracy[number]) else float(accuracy[number]),
                    "most_confused_with": self.classes[most] if times else None,
                    "pixels_confused": times,
                }
            )
        return rows

    def save(self, folder: str | Path) -> Path:
        """Write all that was found into `folder`, each file whole or not at all.

        `results.json`; `results.csv`, one row; `per_class.csv`; `confusion.csv`, true class by predicted, in pixels;
        `confusion.png`; and, where images were kept, `predictions.png`: them, the truth and what was predicted. Raises
        ConfigError for a folder that cannot be written to.
        """
        folder = make_folder(folder)
        with whole_file(folder / "results.json") as file:
            file.write((json.dumps(self.to_dict(), indent=1) + "\n").encode())
        write_csv(folder / "results.csv", [self.to_row()])
        write_csv(folder / "per_class.csv", self.per_class_rows())
        with whole_file(folder / "confusion.csv") as file, csv_writer(file) as write:
            write(["true class", *self.classes])
            for name, row in zip(self.classes, self.confusion.tolist(), strict=True):
                write([name, *row])
        title = f"{self.model}: mIoU {self.miou:.2f}% on {self.images} images"
        plot_confusion(self.confusion, self.classes, title, folder / "confusion.png", of="pixels")
        if self.samples:
            plot_masks(self.samples, self.classes, title, folder / "predictions.png")
        return folder

    @property
    def summary(self) -> str:
        """The figures of the whole, in one line."""
        return (
            f"{self.model}: mIoU {self.miou:.2f}%, mean accuracy {self.mean_accuracy:.2f}%, pixel accuracy "
            f"{self.pixel_accuracy:.2f}%, loss {self.loss:.4f} on {self.images} images "
            f"({self.images_per_second:.1f} images/s on {self.device})"
        )

    def __str__(self) -> str:
        lines = [self.summary]
        rated = {name: value for name, value in self.per_class.items() if value is not None}
        width = max(map(len, rated))
        if len(rated) <= 20:
            lines += [f"  {name:<{width}}  {value:6.2f}%" for name, value in rated.items()]
        else:
            weakest = sorted((value, name) for name, value in rated.items())[:10]
            lines += [f"  weakest of {len(rated)} classes:"]
            lines += [f"  {name:<{width}}  {value:6.2f}%" for value, name in weakest]
        empty = [name for name, value in self.per_class.items() if value is None]
        if empty:
            shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
            lines.append(f"  neither true nor predicted, {len(empty)} of {len(self.classes)} classes: {shown}")
        return "\n".join(lines)
