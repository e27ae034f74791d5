"""What an evaluation found: as text, JSON, CSV and pictures."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import timm
import torch

import zoo
from zoo.evaluation.plots import plot_calibration, plot_confusion
from zoo.files import make_folder, whole_file

__all__ = ["CSV_COLUMNS", "Results", "write_csv"]

MAX_CONFUSION_IN_JSON = 100

# timm's columns first, as in the results files of its repository, so that tables of both can be joined
CSV_COLUMNS = (
    *("model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size", "crop_pct", "interpolation"),
    *("method", "data", "label_map", "images", "skipped", "unlabelled", "top1_stderr", "loss", "ece"),
    *("images_per_second", "model_images_per_second", "batch_size", "amp", "device"),
    *("split", "zoo", "torch", "timm", "command"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """What an evaluation found. Accuracies, their standard error and the calibration error are in percent.

    `top5` is None where there are five classes or fewer, and `loss` where the method's scores are no probabilities to
    learn by ("knn"). `ece` is the expected calibration error over 15 equal bins of confidence (Guo et al. 2017, arXiv
    1706.04599), and `calibration` (15, 3) those bins: images, right answers, sum of confidence. `per_class` holds None
    for classes without images. `confusion` is (C, C), true by predicted class. `images_per_second` counts the whole
    evaluation, which is loading, transforms and model; `model_images_per_second` the model alone, without the first
    batch of each size (None where there was no second). `skipped` names damaged images, `unlabelled` counts those that
    the label map gives no right answer. `split` is the one that was asked for, None for the data's own choice.
    `command` is what made them, with local paths cut to their last part, where that was `eval.py`; `versions` are of
    the zoo and of what it computes with.
    """

    model: str
    method: str = "classifier"
    data: str = ""
    label_map: str | None = None
    top1: float
    top5: float | None
    loss: float | None
    ece: float
    images: int
    images_per_second: float
    model_images_per_second: float | None = None
    per_class: Mapping[str, float | None]
    confusion: np.ndarray = dataclasses.field(compare=False)
    calibration: np.ndarray = dataclasses.field(compare=False)
    preprocessing: Mapping[str, Any]
    params: int
    batch_size: int
    skipped: Sequence[str] = ()
    unlabelled: int = 0
    amp: str = "no"
    device: str = "cpu"
    split: str | None = None
    command: str | None = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=lambda: tool_versions())

    @property
    def top1_stderr(self) -> float:
        """Standard error of `top1`, that of a share of so many independent images."""
        return math.sqrt(self.top1 * (100 - self.top1) / self.images)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; the confusion matrix only up to 100 classes."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain["confusion"] = self.confusion.tolist() if len(self.confusion) <= MAX_CONFUSION_IN_JSON else None
        plain["calibration"] = self.calibration.tolist()
        plain["preprocessing"] = {k: list(v) if isinstance(v, tuple) else v for k, v in self.preprocessing.items()}
        return plain | {
            "per_class": dict(self.per_class),
            "versions": dict(self.versions),
            "skipped": list(self.skipped),
            "top1_stderr": self.top1_stderr,
        }

    def to_row(self) -> dict[str, Any]:
        """One row of a table, under CSV_COLUMNS; accuracies in percent rounded as timm does."""
        preprocessing = self.preprocessing
        found: dict[str, Any] = {
            "top1": round(self.top1, 4),
            "top1_err": round(100 - self.top1, 4),
            "top5": None if self.top5 is None else round(self.top5, 4),
            "top5_err": None if self.top5 is None else round(100 - self.top5, 4),
            "param_count": round(self.params / 1e6, 2),
            "img_size": preprocessing["input_size"][-1],
            "crop_pct": preprocessing["crop_pct"],
            "interpolation": preprocessing["interpolation"],
            "skipped": len(self.skipped),
            "top1_stderr": round(self.top1_stderr, 4),
            "loss": None if self.loss is None else round(self.loss, 6),
            "ece": round(self.ece, 4),
            "images_per_second": round(self.images_per_second, 2),
            "model_images_per_second": self.model_images_per_second and round(self.model_images_per_second, 2),
            "zoo": self.versions["backbone-zoo"],
            "torch": self.versions["torch"],
            "timm": self.versions["timm"],
        }
        return {name: found[name] if name in found else getattr(self, name) for name in CSV_COLUMNS}

    def per_class_rows(self) -> list[dict[str, Any]]:
        """For each class: images, top-1 in percent, and the class that most of its images are wrongly taken for."""
        names, totals = tuple(self.per_class), self.confusion.sum(axis=1)
        wrong = self.confusion - np.diag(np.diag(self.confusion))
        rows = []
        for index, (name, top1) in enumerate(self.per_class.items()):
            most = int(wrong[index].argmax())
            times = int(wrong[index, most])
            rows.append(
                {
                    "class": name,
                    "images": int(totals[index]),
                    "top1": top1,
                    "most_confused_with": names[most] if times else None,
                    "times": times,
                }
            )
        return rows

    def save(self, folder: str | Path) -> Path:
        """Write all that was found into `folder`, each file whole or not at all.

        `results.json`; `results.csv`, one row with timm's columns and more; `per_class.csv`; `confusion.csv`, true
        class by predicted; `confusion.png` and `calibration.png`. Raises ConfigError for a folder that cannot be
        written to.
        """
        folder = make_folder(folder)
        with whole_file(folder / "results.json") as file:
            file.write((json.dumps(self.to_dict(), indent=1) + "\n").encode())
        write_csv(folder / "results.csv", [self.to_row()])
        write_csv(folder / "per_class.csv", self.per_class_rows())
        names = tuple(self.per_class)
        with whole_file(folder / "confusion.csv") as file, csv_writer(file) as write:
            write(["true class", *names])
            for name, row in zip(names, self.confusion.tolist(), strict=True):
                write([name, *row])
        title = f"{self.title}: top-1 {self.top1:.2f}% of {self.images} images"
        plot_confusion(self.confusion, names, title, folder / "confusion.png")
        title = f"{self.title}: calibration error {self.ece:.2f}% of {self.images} images"
        plot_calibration(self.calibration, title, folder / "calibration.png")
        return folder

    @property
    def title(self) -> str:
        return self.model if self.method == "classifier" else f"{self.model} ({self.method})"

    @property
    def summary(self) -> str:
        """The figures of the whole, in one line."""
        top5 = "" if self.top5 is None else f"top-5 {self.top5:.2f}%, "
        loss = "" if self.loss is None else f"loss {self.loss:.4f}, "
        return (
            f"{self.title}: top-1 {self.top1:.2f}%, {top5}{loss}calibration error {self.ece:.2f}% "
            f"on {self.images} images ({self.images_per_second:.0f} images/s on {self.device})"
        )

    def __str__(self) -> str:
        lines = [self.summary]
        rated = sorted((value, name) for name, value in self.per_class.items() if value is not None)
        width = max(len(name) for _, name in rated)
        if len(rated) <= 20:
            lines += [
                f"  {name:<{width}}  {value:6.2f}%" for name, value in self.per_class.items() if value is not None
            ]
        else:
            lines += [f"  weakest of {len(rated)} classes:"]
            lines += [f"  {name:<{width}}  {value:6.2f}%" for value, name in rated[:10]]
        empty = [name for name, value in self.per_class.items() if value is None]
        if empty:
            shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
            lines.append(f"  no images of {len(empty)} of the {len(self.per_class)} classes: {shown}")
        if self.unlabelled:
            lines.append(f"  {self.unlabelled} images have no right answer and are left out")
        return "\n".join(lines)


def tool_versions() -> dict[str, str]:
    return {"backbone-zoo": zoo.__version__, "torch": str(torch.__version__), "timm": timm.__version__}


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of equal columns into a CSV file, whole or not at all. Raises ConfigError for a path that will not do."""
    with whole_file(path) as file, csv_writer(file) as write:
        write(rows[0])
        for row in rows:
            write(row.values())


@contextlib.contextmanager
def csv_writer(file: BinaryIO) -> Iterator[Callable[[Iterable[Any]], Any]]:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    yield csv.writer(text, lineterminator="\n").writerow
    text.flush()
    text.detach()
