"""Evaluating segmentation networks: whole images, each compared with its mask at the mask's own size."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.data import (
    DamageReport,
    EvaluationLoader,
    SegmentationBatch,
    SegmentationDataConfig,
    SegmentationSplit,
    load_segmentation_split,
    preprocessing,
    segmentation_evaluation_loader,
)
from zoo.errors import ConfigError, DataError, ZooError, did_you_mean
from zoo.evaluation.image_classification import Amp, Setting, check_takes_images, run_over
from zoo.evaluation.metrics import NOT_FINITE
from zoo.evaluation.segmentation_results import Sample, SegmentationResults, class_figures
from zoo.evaluation.targets import label_names

__all__ = ["PixelCounts", "count_pixels", "evaluate_segmentation", "resized_to_mask"]


def evaluate_segmentation(
    model: nn.Module,
    data: SegmentationDataConfig,
    *,
    name: str | None = None,
    pictures: int = 4,
    device: str | torch.device | None = None,
    amp: Amp = "no",
    channels_last: bool = False,
    torchcompile: bool = False,
) -> SegmentationResults:
    """mIoU, accuracies, loss, IoU of each class and confusion of `model` on the evaluation split of `data`.

    Images are scaled to fit into the model's input size, or that of `data`, and its logits resized linearly to each
    mask. Classes are matched by name, or by number where the model's or the data's have no names. The first `pictures`
    images are kept with what was predicted. The model is moved to `device` ("auto": the accelerator there is; by
    default it stays where it is).

    Where `torch.distributed` is initialised, every process must call this; each takes its share, and all get the
    results of the whole.

    Raises DataError for data that is missing or does not fit the model, ConfigError for arguments that make no sense.
    """
    check_segmentation_model(model)
    if pictures < 0:
        raise ConfigError(f"pictures must not be negative, but is {pictures}.")
    run = Setting(model, data, device, amp, channels_last, kind=SegmentationDataConfig)
    preprocess = preprocessing(model, data) | {"crop_pct": 1.0}  # whole images
    split = fit_split(load_segmentation_split(data, training=False, classes=label_names(model)), model)
    counts = PixelCounts(len(split.classes), split.ignored, run.device)
    loader = segmentation_evaluation_loader(
        split, data, preprocess, rank=run.rank, processes=run.processes, pin_memory=run.device.type == "cuda"
    )
    samples: list[Sample] = []
    wanted = pictures if run.rank == 0 else 0

    def take(logits: Tensor, batch: SegmentationBatch) -> None:
        for number, (mask, resized) in enumerate(resized_to_mask(logits, batch)):
            counts.add(resized, mask.to(run.device, non_blocking=True).long())
            if len(samples) < wanted:
                height, width = batch.taken[number]
                image = batch.images[number, :, :height, :width].permute(1, 2, 0).cpu().numpy()
                samples.append(Sample(image, mask.numpy(), resized.argmax(0).cpu().numpy()))

    started = time.perf_counter()
    speed = run.each(loader, take, torch.compile(model) if torchcompile else model)
    seconds = time.perf_counter() - started
    counts.first_damaged = next(iter(run.damage.names), None)
    counts.reduce(run.add_up)
    skipped = [list(run.damage.names)]
    if run.processes > 1:
        skipped = [[] for _ in range(run.processes)]
        dist.all_gather_object(skipped, list(run.damage.names))
    metrics = counts.metrics()
    cfg: Any = model.pretrained_cfg
    return SegmentationResults(
        model=name or cfg.get("architecture", type(model).__name__),
        data=str(data.path or data.name),
        miou=metrics["miou"],
        mean_accuracy=metrics["mean_accuracy"],
        pixel_accuracy=metrics["pixel_accuracy"],
        loss=metrics["loss"],
        images=int(counts.images),
        images_per_second=int(counts.images) / seconds,
        model_images_per_second=speed,
        classes=split.classes,
        confusion=counts.confusion.cpu().numpy(),
        preprocessing=preprocess,
        params=sum(parameter.numel() for parameter in model.parameters()),
        batch_size=data.batch_size,
        skipped=tuple(name for names in skipped for name in names),
        amp=amp,
        device=str(run.device),
        split=data.val_split,
        samples=tuple(samples),
    )


class PixelCounts:
    """Sums over pixels with a class, from which IoU, accuracy and loss follow; they add up over processes.

    `confusion` is (C, C), true by predicted class.
    """

    def __init__(self, num_classes: int, ignored: int, device: torch.device) -> None:
        self.num_classes, self.ignored = num_classes, ignored
        exact = torch.device("cpu") if device.type == "mps" else device  # where float64 is
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        self.images = torch.zeros((), dtype=torch.int64, device=device)
        self.loss = torch.zeros((), dtype=torch.float64, device=exact)
        self.first_damaged: str | None = None

    def add(self, logits: Tensor, mask: Tensor) -> None:
        """Of one image: logits (C, H, W), mask (H, W) int64."""
        losses = F.cross_entropy(logits[None].float(), mask[None], ignore_index=self.ignored, reduction="none")
        self.loss += losses.to(self.loss).sum()
        labelled = mask != self.ignored
        pairs = mask[labelled] * self.num_classes + logits.argmax(0)[labelled]
        self.confusion.view(-1).add_(torch.bincount(pairs, minlength=self.num_classes**2))
        self.images += 1

    def reduce(self, add_up: Callable[[Tensor], Tensor]) -> None:
        """Add the sums of the other processes to this one's: `add_up` returns the sum over processes of a tensor."""
        self.confusion, self.images, self.loss = map(add_up, (self.confusion, self.images, self.loss))

    def metrics(self) -> dict[str, float]:
        """`loss`, and `miou`, `mean_accuracy` and `pixel_accuracy` in percent. Raises ZooError when it is not finite.

        `miou` is over the classes that are true or predicted of any pixel, `mean_accuracy` over those that are true.
        """
        pixels = int(self.confusion.sum())
        if pixels == 0:
            example = f" The first that cannot be read: {self.first_damaged}." if self.first_damaged else ""
            raise DataError(f"None of the images has a pixel with a class.{example}")
        loss = float(self.loss) / pixels
        if not math.isfinite(loss):
            raise ZooError(NOT_FINITE)
        iou, accuracy = class_figures(self.confusion.cpu().numpy())
        return {
            "loss": loss,
            "miou": float(np.nanmean(iou)),
            "mean_accuracy": float(np.nanmean(accuracy)),
            "pixel_accuracy": 100 * int(self.confusion.trace()) / pixels,
        }


def count_pixels(
    model: nn.Module,
    loader: EvaluationLoader,
    counts: PixelCounts,
    *,
    device: torch.device,
    damage: DamageReport,
    autocast: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> None:
    """Run `model` over `loader` in evaluation mode and add up what comes out."""

    def take(logits: Tensor, batch: SegmentationBatch) -> None:
        for mask, resized in resized_to_mask(logits, batch):
            counts.add(resized, mask.to(device, non_blocking=True).long())

    counts.first_damaged = run_over(
        model, loader, take, device=device, damage=damage, autocast=autocast, memory_format=memory_format
    )


def resized_to_mask(logits: Tensor, batch: SegmentationBatch) -> list[tuple[Tensor, Tensor]]:
    """Each mask (H, W) with its image's logits (C, H, W), without those of the filling.

    They are resized linearly, corners not aligned.
    """
    found = []
    for own, mask, taken in zip(logits, batch.masks, batch.taken, strict=True):
        # at which size the model's whole input, with its filling, has the mask's scale
        whole = [
            round(side * wanted / part)
            for side, wanted, part in zip(batch.images.shape[-2:], mask.shape, taken, strict=True)
        ]
        resized = F.interpolate(own[None].float(), whole, mode="bilinear", align_corners=False)[0]
        found.append((mask, resized[:, : mask.shape[0], : mask.shape[1]]))
    return found


def check_segmentation_model(model: nn.Module) -> None:
    """Raises ConfigError for what does not tell the classes of pixels."""
    check_takes_images(model)
    if getattr(model, "task", None) != "segmentation":
        raise ConfigError(
            f'{type(model).__name__} classifies images, not pixels: zoo.create_model(..., task="segmentation") puts a '
            "head for these on a vision model."
        )
    if not getattr(model, "num_classes", 0):
        raise ConfigError("The model has no classifier (num_classes=0): there are no classes to predict.")


def fit_split(split: SegmentationSplit, model: nn.Module) -> SegmentationSplit:
    """`split` with its classes numbered as the model's: by name, or by number where one of the two has no names.

    Raises DataError for what does not fit.
    """
    names, count = label_names(model), int(model.num_classes)  # type: ignore[arg-type]
    named = names is not None and not _are_numbers(names) and not _are_numbers(split.classes)
    if named or names == split.classes:
        unknown = [name for name in split.classes if name not in (names or ())]
        if unknown:
            raise DataError(
                f"{len(unknown)} of the data's {len(split.classes)} classes are not among the model's {count}: "
                f"{', '.join(map(repr, unknown[:5]))}.{did_you_mean(unknown[0], names or ())}"
            )
        return renumbered(split, names or ())
    if len(split.classes) == count:
        return split
    raise DataError(
        f"The data has {len(split.classes)} classes and the model {count}, and their names do not tell which is which: "
        f"the data's begin with {', '.join(map(repr, split.classes[:3]))}."
    )


def _are_numbers(classes: Sequence[str]) -> bool:
    """Whether the classes are called by their numbers, for want of names."""
    return tuple(classes) == tuple(map(str, range(len(classes))))


def renumbered(split: SegmentationSplit, classes: Sequence[str]) -> SegmentationSplit:
    """`split` with the numbers that its classes have among `classes`."""
    if split.classes == tuple(classes):
        return split
    fresh = dataclasses.replace(split, classes=tuple(classes))
    known = (split.numbers >= 0) & (split.numbers != split.ignored)
    numbers = np.where(split.numbers == split.ignored, fresh.ignored, split.numbers)
    numbers[known] = [fresh.classes.index(split.classes[number]) for number in split.numbers[known]]
    return dataclasses.replace(fresh, numbers=numbers)
