"""Evaluating image classifiers."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from zoo.data import (
    Batch,
    DamageReport,
    DataConfig,
    EvaluationLoader,
    ImageSplit,
    evaluation_loader,
    load_split,
    preprocessing,
)
from zoo.data.workers import dead_workers_told
from zoo.devices import choose_device
from zoo.errors import ConfigError, DataError, ZooError
from zoo.evaluation.metrics import Counts
from zoo.evaluation.predictions import predictions_file
from zoo.evaluation.results import Results
from zoo.evaluation.targets import class_names, find_targets, fit_classes

__all__ = [
    "Counts",
    "Results",
    "class_names",
    "count",
    "evaluate",
    "fit_classes",
]

Amp = Literal["no", "bf16", "fp16"]


def evaluate(
    model: nn.Module,
    data: DataConfig,
    *,
    name: str | None = None,
    label_map: str | None = None,
    predictions: str | Path | None = None,
    topk: int = 5,
    device: str | torch.device | None = None,
    amp: Amp = "no",
    channels_last: bool = False,
    torchcompile: bool = False,
) -> Results:
    """Accuracy, loss, calibration, per-class accuracy and confusion of `model` on the evaluation split of `data`.

    Preprocessing is that of the model's `pretrained_cfg`, with what `data` sets over it. Where the model knows the
    names of its classes, the data's are matched with them; or a `label_map` (`zoo.evaluation.LABEL_MAPS`, or a file)
    says what is right. `predictions` names a parquet file for the `topk` most probable classes of each image. The model
    is moved to `device` ("auto": the accelerator there is; by default it stays where it is).

    Where `torch.distributed` is initialised, every process must call this; each takes its share, and all get the
    results of the whole.

    Raises DataError for data that is missing or does not fit the model, ConfigError for arguments that make no sense.
    """
    num_classes(model)
    run = Setting(model, data, device, amp, channels_last)
    preprocess = preprocessing(model, data)
    split = load_split(data, training=False)
    targets = find_targets(split, model, label_map)
    counts = Counts(len(targets.classes), run.device)
    loader = run.loader(split, preprocess)
    answers = torch.from_numpy(targets.labels).to(run.device)
    outputs = None if targets.outputs is None else torch.from_numpy(targets.outputs).to(run.device)
    partial = bool((targets.labels[:, 0] < 0).any())
    unlabelled = torch.zeros((), dtype=torch.int64, device=run.device)

    with contextlib.ExitStack() as stack:
        write = None
        if predictions is not None:
            if run.processes > 1:
                raise ConfigError("predictions are written by one process: evaluate with one.")
            write = stack.enter_context(predictions_file(predictions, split, targets, topk))

        def take(logits: Tensor, numbers: Tensor) -> None:
            if outputs is not None:
                logits = logits[:, outputs]
            if write is not None:
                write(logits, numbers)
            right = answers[numbers]
            if partial:
                known = right[:, 0] >= 0
                unlabelled.add_((~known).sum())
                logits, right = logits[known], right[known]
            counts.add(logits, right)

        started = time.perf_counter()
        speed = run.over(loader, take, torch.compile(model) if torchcompile else model)
        seconds = time.perf_counter() - started
    counts.first_damaged = next(iter(run.damage.names), None)
    counts.reduce(run.add_up)
    without = int(run.add_up(unlabelled))
    if without and not counts.confusion.any():
        raise DataError(f"None of the {without} images has a right answer: no accuracy can be told.")
    return run.results(
        counts,
        targets.classes,
        name=name,
        label_map=label_map,
        preprocess=preprocess,
        seconds=seconds,
        model_images_per_second=speed,
        unlabelled=without,
    )


class Setting:
    """Where and how a model is run over data: device, precision, memory layout, and this process's share."""

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        device: str | torch.device | None,
        amp: Amp,
        channels_last: bool,
        kind: Any = DataConfig,
    ) -> None:
        if not isinstance(data, kind):
            raise ConfigError(f"data must be a zoo.data.{kind.__name__}, not {type(data).__name__}.")
        if amp not in get_args(Amp):
            raise ConfigError(f"amp must be one of {', '.join(get_args(Amp))}, not {amp!r}.")
        self.data = data
        self.model, self.amp = model, amp
        self.device = choose_device(model, device)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.damage = DamageReport(data.strict)
        shared = dist.is_available() and dist.is_initialized()
        self.rank, self.processes = (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)
        model.to(device=self.device, memory_format=self.memory_format)  # type: ignore[call-overload]

    def loader(self, split: ImageSplit, preprocess: dict[str, Any]) -> EvaluationLoader:
        """This process's share of `split`, with the numbers of the images in place of their labels."""
        numbered = dataclasses.replace(split, labels=np.arange(len(split)))
        return evaluation_loader(
            numbered,
            self.data,
            preprocess,
            rank=self.rank,
            processes=self.processes,
            pin_memory=self.device.type == "cuda",
        )

    def autocast(self) -> AbstractContextManager:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.amp)
        return torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext()

    def over(
        self,
        loader: EvaluationLoader,
        take: Callable[[Tensor, Tensor], None],
        forward: Callable[[Tensor], Tensor],
    ) -> float | None:
        """As `each`, of which `take` gets the labels alone."""

        def labelled(output: Tensor, batch: Batch) -> None:
            take(output, batch.labels.to(self.device, non_blocking=True))

        return self.each(loader, labelled, forward)

    def each(
        self,
        loader: EvaluationLoader,
        take: Callable[[Tensor, Any], None],
        forward: Callable[[Tensor], Tensor],
    ) -> float | None:
        """Run `forward` over the batches, hand `take` what comes out and the batch; the speed of `forward` in images/s.

        The time of loading and of `take` is not counted.
        """
        clock = Clock(self.device)
        try:
            run_over(
                self.model,
                loader,
                take,
                device=self.device,
                damage=self.damage,
                autocast=self.autocast,
                memory_format=self.memory_format,
                forward=clock.timed(forward),
            )
        except torch.OutOfMemoryError:
            raise ZooError(
                f"The memory of {self.device} does not suffice for batches of {self.data.batch_size} images: lower "
                "data.batch_size."
            ) from None
        images, seconds = self.add_up(torch.tensor([clock.images, clock.seconds / self.processes])).tolist()
        return images / seconds if seconds else None

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over the processes."""
        if self.processes > 1:
            there = tensor.to(self.device)
            dist.all_reduce(there)
            tensor = there.to(tensor.device)
        return tensor

    def results(
        self,
        counts: Counts,
        classes: tuple[str, ...],
        *,
        name: str | None,
        preprocess: dict[str, Any],
        seconds: float,
        model_images_per_second: float | None,
        unlabelled: int = 0,
        **more: Any,
    ) -> Results:
        """What `counts` come to, over all processes."""
        metrics = counts.metrics()
        confusion = counts.confusion.cpu().numpy()
        totals = confusion.sum(axis=1)
        images = int(totals.sum())
        skipped = [list(self.damage.names)]
        if self.processes > 1:
            skipped = [[] for _ in range(self.processes)]
            dist.all_gather_object(skipped, list(self.damage.names))
        return Results(
            model=name or self.model.pretrained_cfg.get("architecture", type(self.model).__name__),  # type: ignore[union-attr,operator]
            data=str(self.data.path or self.data.name),
            top1=metrics["top1"],
            top5=metrics.get("top5"),
            loss=metrics["loss"],
            ece=counts.calibration_error(),
            images=images,
            images_per_second=(images + unlabelled) / seconds,
            model_images_per_second=model_images_per_second,
            per_class={
                label: 100 * int(confusion[i, i]) / int(totals[i]) if totals[i] else None
                for i, label in enumerate(classes)
            },
            confusion=confusion,
            calibration=counts.calibration.cpu().numpy(),
            preprocessing=preprocess,
            params=sum(parameter.numel() for parameter in self.model.parameters()),
            batch_size=self.data.batch_size,
            skipped=tuple(name for names in skipped for name in names),
            unlabelled=unlabelled,
            amp=self.amp,
            device=str(self.device),
            split=self.data.val_split,
            **more,
        )


class Clock:
    """The time of a model alone, over batches whose size it has met before: at a new size it warms up, or compiles."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.images = 0
        self.seconds = 0.0
        self.sizes: set[int] = set()

    def timed(self, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(images: Tensor) -> Tensor:
            self._wait()
            started = time.perf_counter()
            output = forward(images)
            self._wait()
            if len(images) in self.sizes:
                self.images += len(images)
                self.seconds += time.perf_counter() - started
            self.sizes.add(len(images))
            return output

        return run

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def count(
    model: nn.Module,
    loader: EvaluationLoader,
    counts: Counts,
    *,
    device: torch.device,
    damage: DamageReport,
    autocast: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> None:
    """Run `model` over `loader` in evaluation mode and add up what comes out."""

    def add(output: Tensor, batch: Batch) -> None:
        counts.add(output, batch.labels.to(device, non_blocking=True))

    counts.first_damaged = run_over(
        model, loader, add, device=device, damage=damage, autocast=autocast, memory_format=memory_format
    )


def run_over(
    model: nn.Module,
    loader: EvaluationLoader,
    take: Callable[[Tensor, Any], None],
    *,
    device: torch.device,
    damage: DamageReport,
    autocast: Callable[[], AbstractContextManager],
    memory_format: torch.memory_format,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> str | None:
    """Hand `take` outputs and batches, one after the other, in evaluation mode; the name of the first damaged image."""
    training, first_damaged = model.training, None
    model.eval()
    try:
        with torch.inference_mode(), dead_workers_told():
            for batch in loader:
                damage.add(batch.damaged)
                if batch.damaged and first_damaged is None:
                    first_damaged = batch.damaged[0]
                if not len(batch.images):
                    continue
                images = loader.prepare(batch, device, memory_format)
                with autocast():
                    output = (forward or model)(images)
                take(output, batch)
    finally:
        model.train(training)
    return first_damaged


def num_classes(model: nn.Module) -> int:
    """How many classes the model tells apart. Raises ConfigError for what is no image classifier."""
    check_image_model(model)
    classes = getattr(model, "num_classes", 0)
    if not classes:
        raise ConfigError("The model has no classifier (num_classes=0): there are no classes to predict.")
    return int(classes)


def check_image_model(model: nn.Module) -> None:
    """Raises ConfigError for what does not classify images, or does not say how they are prepared."""
    check_takes_images(model)
    if getattr(model, "task", None) == "segmentation":
        raise ConfigError(
            f"{type(model).__name__} classifies pixels, not images: call the model of zoo.create_model itself, "
            "evaluate it with eval.py, or train it with `task: segmentation`."
        )


def check_takes_images(model: nn.Module) -> None:
    """Raises ConfigError for what does not say how its images are prepared."""
    cfg = getattr(model, "pretrained_cfg", None)
    if not isinstance(model, nn.Module) or not isinstance(cfg, Mapping):
        raise ConfigError(
            f"{type(model).__name__} has no pretrained_cfg, which says how its images are prepared: "
            "take a model of zoo.create_model or zoo.evaluation.load_model."
        )
    if "input_size" not in cfg:
        raise ConfigError(f"{type(model).__name__} takes tokens, not images: it is a language model.")
