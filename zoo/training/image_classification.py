"""The task of classifying images: data, model, loss and accuracy for the training loop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from zoo.data.images import (
    Batch,
    DamageReport,
    EpochSampler,
    ImageDataset,
    align_classes,
    eval_transform,
    load_split,
    make_loader,
    preprocessing,
    random_transform,
)
from zoo.errors import ConfigError, DataError
from zoo.evaluation.image_classification import Counts, count, create_timm_model
from zoo.factory import create_model
from zoo.hub import save_pretrained
from zoo.registry import get_entry
from zoo.training.config import ModelConfig, TrainingConfig
from zoo.training.loop import Run, fit, make_accelerator, prepare_folder

__all__ = ["ImageClassification", "train"]


def train(config: TrainingConfig, console: Console | None = None) -> Run:
    """Train an image classifier as `config` says, into the folder `config.output.dir`.

    Raises ConfigError, DataError, UnknownModelError, CheckpointError or TrainingError for what they say, and
    Interrupted when a signal stopped the run (which is saved then).
    """
    prepare_folder(config)  # before the data is read and the model built: this error costs no waiting
    accelerator = make_accelerator(config.train, config.output)
    task = ImageClassification(config, accelerator)
    return fit(task, config, accelerator, console)


class ImageClassification:
    """A classifier, its training and evaluation images, and its loss. A `zoo.training.loop.Task`."""

    metric = "top1"

    def __init__(self, config: TrainingConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        data, augment, seed = config.data, config.augment, config.train.seed
        training = load_split(data, training=True)
        self.classes = training.classes
        evaluation = align_classes(load_split(data, training=False), self.classes)
        self.model = build_model(config.model, len(self.classes), data.input_size)
        self.num_classes = len(self.classes)
        counts = np.bincount(training.labels, minlength=self.num_classes)
        self.empty_classes = [name for name, images in zip(self.classes, counts, strict=True) if not images]

        preprocess = preprocessing(self.model, data)
        self._describe(preprocess)
        channels = preprocess["input_size"][0]
        self.memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
        pin_memory = accelerator.device.type == "cuda"

        processes, rank = accelerator.num_processes, accelerator.process_index
        self.sampler = EpochSampler(len(training), seed=seed, rank=rank, processes=processes)
        self.batches_per_epoch = len(self.sampler) // data.batch_size
        if self.batches_per_epoch == 0:
            raise DataError(
                f"{len(training)} training images do not fill one batch: lower data.batch_size ({data.batch_size})."
            )
        self.train_loader = make_loader(
            ImageDataset(
                training, random_transform(preprocess, augment), channels=channels, seed=seed, replace_damaged=True
            ),
            data,
            sampler=self.sampler,
            drop_last=True,
            pin_memory=pin_memory,
        )
        self.eval_loader = make_loader(
            ImageDataset(evaluation, eval_transform(preprocess), channels=channels),
            data,
            sampler=range(rank, len(evaluation), processes),
            pin_memory=pin_memory,
        )
        self.damage = DamageReport(data.strict)
        self.mixup = None
        if augment.mixes:
            self.mixup = Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                prob=augment.mixup_prob,
                switch_prob=augment.mixup_switch_prob,
                mode=augment.mixup_mode,
                label_smoothing=config.loss.smoothing,
                num_classes=self.num_classes,
            )
        self.soft_loss, self.hard_loss = _losses(config)

    def _describe(self, preprocess: dict) -> None:
        """Let the model's `pretrained_cfg` say what it is being trained with: prediction later needs nothing else."""
        cfg = dict(self.model.pretrained_cfg)  # type: ignore[arg-type]
        if not (self.config.model.pretrained or self.config.model.checkpoint_path):
            for key in ("hf_hub_id", "hf_hub_filename", "url", "tag", "license", "origin_url", "paper_ids"):
                cfg.pop(key, None)
        for key in ("test_input_size", "test_crop_pct", "label_descriptions", "pool_size"):
            cfg.pop(key, None)
        cfg |= {key: preprocess[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")}
        cfg |= {"num_classes": len(self.classes), "label_names": list(self.classes)}
        self.model.pretrained_cfg = self.model.default_cfg = cfg  # type: ignore[assignment]

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        self.sampler.epoch, self.sampler.start = epoch, start * self.config.data.batch_size
        return iter(self.train_loader)

    def loss(self, model: nn.Module, batch: Batch, epoch: int) -> Tensor:
        self.damage.add(batch.damaged)
        if len(batch.images) < self.config.data.batch_size:
            raise DataError(f"Too many images in a row cannot be read: {batch.damaged[0]}.")
        device = self.accelerator.device
        images = batch.images.to(device, non_blocking=True, memory_format=self.memory_format)
        labels = batch.labels.to(device, non_blocking=True)
        off_from = self.config.augment.mixup_off_epoch
        if self.mixup is not None and not (off_from and epoch >= off_from):
            images, labels = self.mixup(images, labels)
            return self.soft_loss(model(images), labels)
        return self.hard_loss(model(images), labels)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        counts = Counts(self.num_classes, self.accelerator.device)
        count(
            model,
            self.eval_loader,
            counts,
            device=self.accelerator.device,
            damage=self.damage,
            autocast=self.accelerator.autocast,
            memory_format=self.memory_format,
        )
        counts.reduce(lambda tensor: self.accelerator.reduce(tensor, reduction="sum"))
        return counts.metrics()

    def save(self, folder: Path) -> Path:
        return save_pretrained(self.model, folder, labels=list(self.classes))

    def describe_data_problems(self) -> str:
        problems = [str(self.damage)] if self.damage.names else []
        if self.empty_classes:
            some = ", ".join(self.empty_classes[:20])
            problems.append(f"No training images of {len(self.empty_classes)} of {self.num_classes} classes: {some}.")
        return "\n".join(problems)


def _losses(config: TrainingConfig) -> tuple[nn.Module, nn.Module]:
    """(for mixed labels, which are smoothed already; for class numbers)"""
    smoothing = config.loss.smoothing
    if config.loss.bce_loss:
        return BinaryCrossEntropy(smoothing=0.0), BinaryCrossEntropy(smoothing=smoothing)
    hard = LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()
    return SoftTargetCrossEntropy(), hard


def build_model(config: ModelConfig, num_classes: int, input_size: tuple[int, int, int] | None) -> nn.Module:
    """The model that `config` names, with `num_classes` outputs. Raises ConfigError and UnknownModelError."""
    args = dict(config.args)
    given = args.pop("num_classes", num_classes)
    if given != num_classes:
        raise ConfigError(f"model.args.num_classes is {given}, but the data has {num_classes} classes: leave it out.")
    if config.name.startswith("timm/"):
        weights = {"pretrained": config.pretrained, "checkpoint_path": config.checkpoint_path or ""}
        return create_timm_model(config.name, num_classes=num_classes, **weights, **args)
    if input_size is not None:
        args.setdefault("in_chans", input_size[0])
        if ":" not in config.name and get_entry(config.name).fixed_input_size:
            args.setdefault("img_size", input_size[1:])
    return create_model(
        config.name,
        pretrained=config.pretrained or (None if ":" in config.name else False),
        checkpoint_path=config.checkpoint_path,
        num_classes=num_classes,
        **args,
    )
