"""The task of classifying images: data, model, loss and accuracy for the training loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from zoo.data import (
    Batch,
    DamageReport,
    align_classes,
    evaluation_loader,
    load_split,
    preprocessing,
    training_loader,
)
from zoo.data.transforms import LabelMaps
from zoo.errors import ConfigError
from zoo.evaluation.image_classification import Counts, check_image_model, count
from zoo.factory import create_model
from zoo.loading import create_timm_model, names_weights, of_run
from zoo.registry import get_entry
from zoo.training.config import LossConfig, ModelConfig, TrainingConfig
from zoo.training.distillation import Distillation
from zoo.training.freezing import freeze
from zoo.training.image_task import ImageTask
from zoo.training.loop import Run, fit, make_accelerator, prepare_folder
from zoo.training.token_labels import TokenLabeling

__all__ = ["ImageClassification", "train_image_classifier"]


def train_image_classifier(config: TrainingConfig, console: Console | None = None) -> Run:
    """Train an image classifier as `config` says, into the folder `config.output.dir`.

    Raises ConfigError, DataError, UnknownModelError, CheckpointError or TrainingError for what they say, and
    Interrupted when a signal stopped the run (which is saved then).
    """
    prepare_folder(config)  # before the data is read and the model built: this error costs no waiting
    accelerator = make_accelerator(config.train, config.output)
    task = ImageClassification(config, accelerator)
    return fit(task, config, accelerator, console)


class ImageClassification(ImageTask):
    """A classifier, its training and evaluation images, and its loss. A `zoo.training.loop.Task`."""

    metric = "top1"
    add_up = staticmethod(count)

    def __init__(self, config: TrainingConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        data, augment, seed = config.data, config.augment, config.train.seed
        training = load_split(data, training=True)
        self.classes = training.classes
        evaluation = align_classes(load_split(data, training=False), self.classes)
        self.model = build_model(config.model, len(self.classes), data.input_size)
        freeze(self.model, config.model.freeze)
        self.num_classes = len(self.classes)
        self.empty_classes = training.empty_classes

        preprocess = preprocessing(self.model, data)
        describe_model(self.model, preprocess, self.classes, takes_weights(config.model))
        self.memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
        pin_memory = accelerator.device.type == "cuda"
        processes, rank = accelerator.num_processes, accelerator.process_index
        self.train_loader = training_loader(
            training, data, preprocess, augment, seed=seed, rank=rank, processes=processes, pin_memory=pin_memory
        )
        self.eval_loader = evaluation_loader(
            evaluation, data, preprocess, rank=rank, processes=processes, pin_memory=pin_memory
        )
        self.batches_per_epoch = self.train_loader.batches_per_epoch
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
        self.soft_loss, self.hard_loss = _losses(config.loss)
        self.learner = self.model
        self.distillation = None
        if config.distill.teacher is not None:
            self.distillation = Distillation(
                config.distill, self.model, training, preprocess, accelerator.device, self.memory_format
            )
            self.learner = self.distillation.learner
        self.token_labeling = None
        if data.token_labels is not None:
            self.token_labeling = TokenLabeling(
                self.model,
                preprocess["input_size"][1:],
                self.num_classes,
                criterion=self.soft_loss,
                smoothing=config.loss.smoothing,
                weight=config.loss.token_weight,
                alpha=augment.mix_token,
            )
            self.learner = self.token_labeling.learner

    def loss(self, model: nn.Module, batch: Batch, epoch: int) -> Tensor:
        self.damage.add(batch.damaged)
        device = self.accelerator.device
        images = self.train_loader.prepare(batch, device, self.memory_format)
        labels = batch.labels.to(device, non_blocking=True)
        criterion = self.hard_loss
        off_from = self.config.augment.mixup_off_epoch
        mixes = not (off_from and epoch >= off_from)
        if self.token_labeling is not None:
            assert batch.label_maps is not None
            maps = LabelMaps(*(tensor.to(device, non_blocking=True) for tensor in batch.label_maps))
            return self.token_labeling.loss(model, images, labels, maps, mixes)
        if self.mixup is not None and mixes:
            images, labels = self.mixup(images, labels)
            criterion = self.soft_loss
        if self.distillation is None:
            return criterion(model(images), labels)
        return self.distillation.loss(model, images, lambda logits: criterion(logits, labels))

    def plain_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy, with neither mixup, smoothing, labels of tokens nor a teacher."""
        device = self.accelerator.device
        images = self.train_loader.prepare(batch, device, self.memory_format)
        return nn.functional.cross_entropy(model(images), batch.labels.to(device))

    def sums(self) -> Counts:
        return Counts(self.num_classes, self.accelerator.device)

    def describe_data_problems(self) -> str:
        problems = [problem for problem in [super().describe_data_problems()] if problem]
        if self.empty_classes:
            some = ", ".join(self.empty_classes[:20])
            problems.append(f"No training images of {len(self.empty_classes)} of {self.num_classes} classes: {some}.")
        return "\n".join(problems)


def _losses(config: LossConfig) -> tuple[nn.Module, nn.Module]:
    """(for mixed labels, which are smoothed already; for class numbers)"""
    if config.bce_loss:

        def bce(smoothing: float) -> nn.Module:
            return BinaryCrossEntropy(smoothing, config.bce_target_thresh, sum_classes=config.bce_sum)

        return bce(0.0), bce(config.smoothing)
    hard = LabelSmoothingCrossEntropy(config.smoothing) if config.smoothing else nn.CrossEntropyLoss()
    return SoftTargetCrossEntropy(), hard


def build_model(config: ModelConfig, num_classes: int, input_size: tuple[int, int, int] | None) -> nn.Module:
    """The model that `config` names, with `num_classes` outputs. Raises ConfigError and UnknownModelError."""
    args = dict(config.args)
    given = args.pop("num_classes", num_classes)
    if given != num_classes:
        raise ConfigError(f"model.args.num_classes is {given}, but the data has {num_classes} classes: leave it out.")
    name = of_run(config.name, "local-dir:")
    checkpoint_path = config.checkpoint_path and of_run(config.checkpoint_path)
    if input_size is not None:
        args.setdefault("in_chans", input_size[0])
        if has_fixed_size(name):
            args.setdefault("img_size", input_size[1:])
    if name.startswith("timm/"):
        weights = {
            "pretrained": takes_weights(config) and not checkpoint_path,
            "checkpoint_path": checkpoint_path or "",
        }
        return create_timm_model(name, num_classes=num_classes, **weights, **args)
    model = create_model(
        name, pretrained=config.pretrained, checkpoint_path=checkpoint_path, num_classes=num_classes, **args
    )
    check_image_model(model)
    return model


def describe_model(model: nn.Module, preprocess: dict[str, Any], classes: Sequence[str], has_weights: bool) -> None:
    """Let the model's `pretrained_cfg` say what it is being trained with: prediction later needs nothing else."""
    cfg = dict(model.pretrained_cfg)  # type: ignore[arg-type]
    if not has_weights:
        for key in ("hf_hub_id", "hf_hub_filename", "url", "tag", "license", "origin_url", "paper_ids"):
            cfg.pop(key, None)
    for key in ("test_input_size", "test_crop_pct", "label_descriptions", "pool_size"):
        cfg.pop(key, None)
    cfg |= {key: preprocess[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")}
    cfg |= {"num_classes": len(classes), "label_names": list(classes)}
    model.pretrained_cfg = model.default_cfg = cfg  # type: ignore[assignment]


def takes_weights(config: ModelConfig) -> bool:
    """Whether training starts from weights: by default where the name, with a tag or a place, says which."""
    return names_weights(config.name, config.pretrained) or config.checkpoint_path is not None


def has_fixed_size(name: str) -> bool:
    """Whether the model is made for one size of input, and must be told which."""
    if name.startswith("timm/"):
        cfg = get_pretrained_cfg(name.removeprefix("timm/"))
        return cfg is not None and cfg.fixed_input_size
    return ":" not in name and get_entry(name).fixed_input_size
