"""Evaluating image classifiers, and asking one about a single image."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torch.utils.data import DataLoader

from zoo.data.images import (
    UNREADABLE,
    Batch,
    DamageReport,
    DataConfig,
    ImageDataset,
    ImageSplit,
    align_classes,
    eval_transform,
    load_split,
    make_loader,
    preprocessing,
)
from zoo.devices import find_device
from zoo.errors import ConfigError, DataError, UnknownModelError, ZooError, did_you_mean
from zoo.evaluation.plots import plot_confusion
from zoo.factory import create_model
from zoo.files import whole_file
from zoo.registry import get_entry

__all__ = ["Prediction", "Results", "class_names", "evaluate", "load_model", "predict"]

Amp = Literal["no", "bf16", "fp16"]

MAX_CONFUSION_IN_JSON = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """What an evaluation found. Accuracies are in percent.

    `top5` is None where there are five classes or fewer. `per_class` holds None for classes without images.
    `images_per_second` counts the whole evaluation: loading, transforms and model. `confusion` is (C, C), true by
    predicted class.
    """

    model: str
    top1: float
    top5: float | None
    loss: float
    images: int
    images_per_second: float
    per_class: Mapping[str, float | None]
    confusion: np.ndarray = dataclasses.field(compare=False)
    preprocessing: Mapping[str, Any]
    skipped: Sequence[str] = ()
    device: str = "cpu"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; the confusion matrix only up to 100 classes."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain["confusion"] = self.confusion.tolist() if len(self.confusion) <= MAX_CONFUSION_IN_JSON else None
        plain["preprocessing"] = {k: list(v) if isinstance(v, tuple) else v for k, v in self.preprocessing.items()}
        return plain | {"per_class": dict(self.per_class), "skipped": list(self.skipped)}

    def save(self, folder: str | Path) -> Path:
        """Write `results.json` and `confusion.png` into `folder`, each whole or not at all."""
        folder = make_folder(folder)
        with whole_file(folder / "results.json") as file:
            file.write((json.dumps(self.to_dict(), indent=1) + "\n").encode())
        title = f"{self.model}: top-1 {self.top1:.2f}% of {self.images} images"
        plot_confusion(self.confusion, tuple(self.per_class), title, folder / "confusion.png")
        return folder

    def __str__(self) -> str:
        top5 = "" if self.top5 is None else f"top-5 {self.top5:.2f}%, "
        lines = [
            f"{self.model}: top-1 {self.top1:.2f}%, {top5}loss {self.loss:.4f} on {self.images} images "
            f"({self.images_per_second:.0f} images/s on {self.device})"
        ]
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
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """One class that a model sees in an image."""

    label: str
    index: int
    probability: float


class Counts:
    """Sums over batches from which accuracy and loss follow; they add up over processes."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes = num_classes
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        self.in_top5 = torch.zeros((), dtype=torch.int64, device=device)
        self.loss = torch.zeros((), dtype=torch.float64, device="cpu" if device.type == "mps" else device)
        self.first_damaged: str | None = None

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """logits (B, num_classes), labels (B,)"""
        logits = logits.float()
        self.loss += F.cross_entropy(logits, labels, reduction="sum").to(self.loss)
        top = logits.topk(min(5, self.num_classes)).indices
        self.in_top5 += (top == labels[:, None]).sum()
        pairs = labels * self.num_classes + top[:, 0]
        self.confusion.view(-1).index_add_(0, pairs, torch.ones_like(pairs))

    def reduce(self, add_up: Callable[[Tensor], Tensor]) -> None:
        self.confusion, self.in_top5, self.loss = map(add_up, (self.confusion, self.in_top5, self.loss))

    def metrics(self) -> dict[str, float]:
        """top1, top5 (where there are more than five classes) and loss. Raises ZooError when the loss is not finite."""
        images = int(self.confusion.sum())
        if images == 0:
            example = f" The first: {self.first_damaged}." if self.first_damaged else ""
            raise DataError(f"None of the images can be read.{example}")
        loss = float(self.loss) / images
        if not math.isfinite(loss):
            raise ZooError("The model's outputs are not finite (NaN or infinite): its weights are damaged.")
        metrics = {"loss": loss, "top1": 100 * int(self.confusion.trace()) / images}
        return metrics | ({"top5": 100 * int(self.in_top5) / images} if self.num_classes > 5 else {})


def count(
    model: nn.Module,
    loader: DataLoader,
    counts: Counts,
    *,
    device: torch.device,
    damage: DamageReport,
    autocast: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> None:
    """Run `model` over `loader` in evaluation mode and add up what comes out."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            batch: Batch
            for batch in loader:
                damage.add(batch.damaged)
                if batch.damaged and counts.first_damaged is None:
                    counts.first_damaged = batch.damaged[0]
                if not len(batch.images):
                    continue
                images = batch.images.to(device, non_blocking=True, memory_format=memory_format)
                with autocast():
                    logits = model(images)
                counts.add(logits, batch.labels.to(device, non_blocking=True))
    finally:
        model.train(training)


def evaluate(
    model: nn.Module,
    data: DataConfig,
    *,
    name: str | None = None,
    device: str | torch.device | None = None,
    amp: Amp = "no",
    channels_last: bool = False,
) -> Results:
    """Top-1, top-5, loss, per-class accuracy and confusion of `model` on the evaluation split of `data`.

    Preprocessing is that of the model's `pretrained_cfg`, with what `data` sets over it. Where the model knows the
    names of its classes, the data's are matched with them. The model is moved to `device` ("auto": the accelerator
    there is; by default it stays where it is).

    Raises DataError for data that is missing or does not fit the model, ConfigError for arguments that make no sense.
    """
    num_classes = _num_classes(model)
    if not isinstance(data, DataConfig):
        raise ConfigError(f"data must be a zoo.data.DataConfig, not {type(data).__name__}.")
    if amp not in get_args(Amp):
        raise ConfigError(f"amp must be one of {', '.join(get_args(Amp))}, not {amp!r}.")
    device = _device(model, device)
    split, names = fit_classes(load_split(data, training=False), model)
    preprocess = preprocessing(model, data)
    dataset = ImageDataset(split, eval_transform(preprocess), channels=preprocess["input_size"][0])
    loader = make_loader(dataset, data, pin_memory=device.type == "cuda")
    damage = DamageReport(data.strict)
    counts = Counts(num_classes, device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
    started = time.perf_counter()
    count(
        model,
        loader,
        counts,
        device=device,
        damage=damage,
        autocast=lambda: torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext(),
        memory_format=memory_format,
    )
    metrics = counts.metrics()
    seconds = time.perf_counter() - started
    confusion = counts.confusion.cpu().numpy()
    totals = confusion.sum(axis=1)
    return Results(
        model=name or model.pretrained_cfg.get("architecture", type(model).__name__),  # type: ignore[union-attr,operator]
        top1=metrics["top1"],
        top5=metrics.get("top5"),
        loss=metrics["loss"],
        images=int(totals.sum()),
        images_per_second=int(totals.sum()) / seconds,
        per_class={
            label: 100 * int(confusion[i, i]) / int(totals[i]) if totals[i] else None for i, label in enumerate(names)
        },
        confusion=confusion,
        preprocessing=preprocess,
        skipped=tuple(damage.names),
        device=str(device),
    )


def fit_classes(split: ImageSplit, model: nn.Module) -> tuple[ImageSplit, tuple[str, ...]]:
    """`split` with labels as the model numbers its classes, and the classes' names.

    Matched by name where the model knows all the split's names (a split may hold some of the classes only), else by
    number, which takes equally many classes. Classes that are called 0, 1, 2, ... say their numbers themselves. Where
    the split's numbers are only the alphabetical order of its names, they say nothing to a model that knows other
    names. Raises DataError for what does not fit.
    """
    num_classes: int = model.num_classes  # type: ignore[assignment]
    names = class_names(model)
    if names is not None and set(split.classes) <= set(names):
        return align_classes(split, names), names
    numbered = all(name.isascii() and name.isdigit() for name in split.classes)
    if numbered and sorted(map(int, split.classes)) == list(range(num_classes)) and _label_names(model) is None:
        by_number = tuple(sorted(split.classes, key=int))  # not as text, where 10 comes before 2
        return align_classes(split, by_number), by_number
    if names is not None and split.alphabetical:
        unknown = [name for name in split.classes if name not in names]
        unmatched = [name for name in names if name not in split.classes]
        lacking = f", and the data lacks {len(unmatched)} of its own: {_first(unmatched)}" if unmatched else ""
        raise DataError(
            f"The model does not know {len(unknown)} of the data's {len(split.classes)} classes: {_first(unknown)}"
            f"{lacking}.{did_you_mean(unknown[0], names)} Rename the data's classes (folders) to the model's names, or "
            "evaluate on the classes that it was trained on."
        )
    if len(split.classes) == num_classes:
        return split, split.classes
    raise DataError(
        f"The data has {len(split.classes)} classes and the model {num_classes}, and their names do not tell which is "
        f"which: the data's begin with {', '.join(map(repr, split.classes[:3]))}."
    )


def _first(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")


def class_names(model: nn.Module) -> tuple[str, ...] | None:
    """Names of the model's classes as its weights state them; WordNet ids for ImageNet-1k; None where unknown."""
    return _label_names(model) or (tuple(ImageNetInfo().label_names()) if _knows_imagenet(model) else None)


def _label_names(model: nn.Module) -> tuple[str, ...] | None:
    names = model.pretrained_cfg.get("label_names")  # type: ignore[union-attr,operator]
    num_classes = model.num_classes
    if isinstance(names, Mapping):  # index to name, as a Hub config may hold it
        names = [names.get(str(i), names.get(i)) for i in range(num_classes)]  # type: ignore[arg-type]
    if names and len(names) == num_classes and None not in names:
        return tuple(map(str, names))
    return None


def _knows_imagenet(model: nn.Module) -> bool:
    """Whether `pretrained_cfg` names a published checkpoint of ImageNet-1k, and the model has its classes."""
    cfg: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    tag = cfg.get("tag") or ""
    if not (model.num_classes == cfg.get("num_classes") == 1000 and tag):
        return False
    try:
        return get_entry(str(cfg.get("architecture"))).find_weights(tag).dataset == "imagenet-1k"
    except UnknownModelError:  # timm's own, whose tags say what they were trained on last
        return "in1k" in tag.split("_")


def _num_classes(model: nn.Module) -> int:
    """How many classes the model tells apart. Raises ConfigError for what is no image classifier."""
    if not isinstance(model, nn.Module) or not isinstance(getattr(model, "pretrained_cfg", None), Mapping):
        raise ConfigError(
            f"{type(model).__name__} has no pretrained_cfg, which says how its images are prepared: "
            "take a model of zoo.create_model or zoo.evaluation.load_model."
        )
    num_classes = getattr(model, "num_classes", 0)
    if not num_classes:
        raise ConfigError("The model has no classifier (num_classes=0): there are no classes to predict.")
    return int(num_classes)


@torch.inference_mode()
def predict(model: nn.Module, image: str | Path | Image.Image, topk: int = 5) -> list[Prediction]:
    """The `topk` most probable classes of an image (a path or a PIL image), most probable first.

    The image is prepared as the model's `pretrained_cfg` says. Raises DataError for a file that is no image, and
    ConfigError for a model that is no image classifier and for arguments that make no sense.
    """
    _num_classes(model)
    if type(topk) is not int or topk < 1:
        raise ConfigError(f"topk must be a whole number and at least 1, not {topk!r}.")
    if not isinstance(image, str | os.PathLike | Image.Image):
        raise ConfigError(
            f"image must be a path or a PIL image, not {type(image).__name__}: "
            "PIL.Image.fromarray makes an image of an array."
        )
    preprocess = preprocessing(model)
    mode = "L" if preprocess["input_size"][0] == 1 else "RGB"
    if isinstance(image, Image.Image):
        converted = image.convert(mode)
    else:
        try:
            with Image.open(image) as file:
                converted = file.convert(mode)
        except FileNotFoundError:
            raise DataError(f"There is no image {str(image)!r}.") from None
        except UNREADABLE as error:
            raise DataError(f"{str(image)!r} cannot be read as an image: {error}") from None
    parameter = next(model.parameters())
    tensor = eval_transform(preprocess)(converted).to(parameter)
    training = model.training
    try:
        probabilities = model.eval()(tensor[None]).float().softmax(-1)[0]
    finally:
        model.train(training)
    names = class_names(model)
    descriptions = ImageNetInfo() if names and names == tuple(ImageNetInfo().label_names()) else None
    best = probabilities.topk(min(topk, len(probabilities)))
    found = []
    for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        label = names[index] if names else str(index)
        if descriptions:
            label = descriptions.index_to_description(index)
        found.append(Prediction(label=label, index=index, probability=probability))
    return found


def load_model(source: str, checkpoint_path: str | None = None, **model_args: Any) -> nn.Module:
    """A model with weights, from whatever names one.

    `source`: a name in the zoo with the tag of its weights or without (then its default weights, or `checkpoint_path`),
    `timm/name`, `hf-hub:owner/name`, the folder of a run (its best checkpoint), or a folder in the Hub's layout.
    Raises ConfigError for a folder that is neither, and what `zoo.create_model` raises.
    """
    if source.startswith("timm/"):
        return create_timm_model(
            source, pretrained=checkpoint_path is None, checkpoint_path=checkpoint_path or "", **model_args
        )
    path = Path(source).expanduser()
    if path.exists() and not source.startswith(("hf-hub:", "local-dir:")):
        folder = path if path.is_dir() else path.parent
        for candidate in (folder / "best", folder / "last", folder):
            if (candidate / "config.json").is_file() and (path.is_dir() or candidate == folder):
                return create_model(f"local-dir:{candidate}", checkpoint_path=checkpoint_path, **model_args)
        if path.is_file():
            raise ConfigError(
                f"{source} has no config.json beside it that says what model it is: name the model, and give this file "
                "as checkpoint_path."
            )
        raise ConfigError(f"{source} is neither the folder of a run nor one with config.json and model.safetensors.")
    tagged_or_hub = "." in source or ":" in source
    return create_model(
        source,
        pretrained=None if tagged_or_hub or checkpoint_path else True,
        checkpoint_path=checkpoint_path,
        **model_args,
    )


def create_timm_model(name: str, **args: Any) -> nn.Module:
    """timm's own model, for a name such as `timm/poolformer_s12`. Raises ConfigError for what timm does not take."""
    try:
        model = timm.create_model(name.removeprefix("timm/"), **args)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"timm does not make {name!r}: {error}") from None
    cfg = model.pretrained_cfg
    model.pretrained_cfg = model.default_cfg = cfg if isinstance(cfg, dict) else cfg.to_dict()
    return model


def make_folder(path: str | Path) -> Path:
    """`path`, made if need be. Raises ConfigError when it cannot be, or cannot be written to."""
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"Cannot write to the folder {str(folder)!r}: {error.strerror}.") from None
    return folder


def _device(model: nn.Module, device: str | torch.device | None) -> torch.device:
    if device is None:
        return next(model.parameters()).device
    if device == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return find_device(device)
