"""The task of finding the class of each pixel: data, model, loss and mIoU for the training loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn

from zoo.data import (
    DamageReport,
    SegmentationBatch,
    SegmentationSplit,
    load_segmentation_split,
    preprocessing,
    segmentation_evaluation_loader,
    segmentation_training_loader,
)
from zoo.errors import CheckpointError, ConfigError
from zoo.evaluation.segmentation import PixelCounts, count_pixels
from zoo.factory import create_model
from zoo.files import checkpoint_folder
from zoo.hub import load_config
from zoo.loading import load_model, of_run
from zoo.registry import PLACES, get_entry, split_name
from zoo.training.freezing import freeze
from zoo.training.image_classification import describe_model, has_fixed_size, takes_weights
from zoo.training.image_task import ImageTask
from zoo.training.loop import Run, fit, make_accelerator, prepare_folder
from zoo.training.segmentation_config import (
    SegmentationLossConfig,
    SegmentationModelConfig,
    SegmentationTrainingConfig,
)
from zoo.weights import locate, of_own_weights, read_state_dict

__all__ = ["Segmentation", "build_segmentation_model", "pixel_losses", "train_segmentation_model"]

FRESH = ("neck.", "head.", "smoothing.")  # of a segmentation network: what a classifier's backbone does not bring
# the first block of the forms called d halves the map, which takes a shortcut that their classifiers do not have
SHORTCUT = "stages.0.0.downsample."


def train_segmentation_model(config: SegmentationTrainingConfig, console: Console | None = None) -> Run:
    """Train a segmentation network as `config` says, into the folder `config.output.dir`.

    Raises ConfigError, DataError, UnknownModelError, CheckpointError or TrainingError for what they say, and
    Interrupted when a signal stopped the run (which is saved then).
    """
    prepare_folder(config)  # before the data is read and the model built: this error costs no waiting
    accelerator = make_accelerator(config.train, config.output)
    task = Segmentation(config, accelerator)
    if accelerator.is_main_process and task.started_from:
        (console or Console(stderr=True)).print(task.started_from, highlight=False, soft_wrap=True, markup=False)
    return fit(task, config, accelerator, console)


class Segmentation(ImageTask):
    """A segmentation network, its training and evaluation images, and its loss. A `zoo.training.loop.Task`.

    Evaluation sees whole images, scaled to fit into `data.input_size`, and compares at the size of each label.
    """

    metric = "miou"
    add_up = staticmethod(count_pixels)

    def __init__(self, config: SegmentationTrainingConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        data, seed = config.data, config.train.seed
        training = load_segmentation_split(data, training=True)
        evaluation = load_segmentation_split(data, training=False, classes=training.classes)
        self.classes = training.classes
        self.ignored = training.ignored
        self.model, self.started_from = build_segmentation_model(
            config.model, len(self.classes), data.input_size, config.augment.crop_size
        )
        freeze(self.model, config.model.freeze)
        preprocess = preprocessing(self.model, data) | {"crop_pct": 1.0}  # whole images
        describe_model(self.model, preprocess, self.classes, bool(self.started_from) or takes_weights(config.model))
        self.learner: nn.Module = self.model
        self.memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
        self.loss_weights = _class_weights(config.loss, training, accelerator.device)
        processes, rank = accelerator.num_processes, accelerator.process_index
        self.weighs_processes = processes > 1
        sharing: dict[str, Any] = {"rank": rank, "processes": processes}
        sharing["pin_memory"] = accelerator.device.type == "cuda"
        self.train_loader = segmentation_training_loader(
            training, data, preprocess, config.augment, seed=seed, **sharing
        )
        self.eval_loader = segmentation_evaluation_loader(evaluation, data, preprocess, **sharing)
        self.batches_per_epoch = self.train_loader.batches_per_epoch
        self.damage = DamageReport(data.strict)

    def loss(self, model: nn.Module, batch: SegmentationBatch, epoch: int) -> Tensor:
        self.damage.add(batch.damaged)
        losses, weight = self._summed(model, batch, self.config.loss)
        # gradients are averaged over processes, which have not the same number of pixels to learn
        total = self.accelerator.reduce(weight.clone(), "mean") if self.weighs_processes else weight
        return losses / _not_zero(total)

    def plain_loss(self, model: nn.Module, batch: SegmentationBatch) -> Tensor:
        """Cross-entropy, with neither smoothing nor mining."""
        losses, weight = self._summed(model, batch, SegmentationLossConfig())
        return losses / _not_zero(weight)

    def _summed(
        self, model: nn.Module, batch: SegmentationBatch, config: SegmentationLossConfig
    ) -> tuple[Tensor, Tensor]:
        """The sum of the losses of a batch's pixels, and that of their weights."""
        device = self.accelerator.device
        images = self.train_loader.prepare(batch, device, self.memory_format)  # type: ignore[arg-type]
        assert isinstance(batch.masks, Tensor)
        masks = batch.masks.to(device, non_blocking=True).long()
        return pixel_losses(model(images), masks, self.ignored, config, self.loss_weights)

    def sums(self) -> PixelCounts:
        return PixelCounts(len(self.classes), self.ignored, self.accelerator.device)


# ----------------------------------------------------------------------------------------------------------------- loss


def pixel_losses(
    logits: Tensor, masks: Tensor, ignored: int, config: SegmentationLossConfig, class_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits (B, C, h, w) of any size and masks (B, H, W) int64 -> sum of the losses of pixels, sum of their weights.

    The logits are resized to the masks linearly (corners not aligned). Pixels that are `ignored`, or not hard enough to
    be mined, have neither loss nor weight.
    """
    logits = F.interpolate(logits.float(), masks.shape[-2:], mode="bilinear", align_corners=False)
    losses = F.cross_entropy(
        logits, masks, class_weights, ignore_index=ignored, reduction="none", label_smoothing=config.smoothing
    )
    learned = masks != ignored
    if config.ohem_thresh is not None:
        learned = _hardest(logits.detach(), masks, learned, config)
    weights = learned.to(losses) if class_weights is None else _of_each(class_weights, masks, learned)
    return (losses * learned).sum(), weights.sum()


def _hardest(logits: Tensor, masks: Tensor, labelled: Tensor, config: SegmentationLossConfig) -> Tensor:
    """Of the pixels with a class, those whose class has a probability below the bound, or the least ones there are."""
    answers = logits.log_softmax(1).gather(1, masks.masked_fill(~labelled, 0)[:, None])[:, 0].exp()
    assert config.ohem_thresh is not None
    hard = labelled & (answers < config.ohem_thresh)
    least = min(config.ohem_min_kept, int(labelled.sum()))
    if int(hard.sum()) >= least:
        return hard
    kept = answers.masked_fill(~labelled, 2.0).flatten().topk(least, largest=False).indices
    return torch.zeros_like(labelled).flatten().index_fill_(0, kept, True).view_as(labelled)


def _of_each(class_weights: Tensor, masks: Tensor, learned: Tensor) -> Tensor:
    return class_weights[masks.masked_fill(~learned, 0)] * learned


def _not_zero(weight: Tensor) -> Tensor:
    """Where no pixel is learned, the loss is zero."""
    return torch.where(weight > 0, weight, torch.ones_like(weight))


def _class_weights(config: SegmentationLossConfig, split: SegmentationSplit, device: torch.device) -> Tensor | None:
    if not config.class_weights:
        return None
    if len(config.class_weights) != len(split.classes):
        raise ConfigError(
            f"loss.class_weights are {len(config.class_weights)}, and the data has {len(split.classes)} classes."
        )
    return torch.tensor(config.class_weights, device=device)


# ---------------------------------------------------------------------------------------------------------------- model


def build_segmentation_model(
    config: SegmentationModelConfig,
    num_classes: int,
    input_size: tuple[int, int, int] | None,
    crop_size: tuple[int, int] | None = None,
) -> tuple[nn.Module, str]:
    """The model that `config` names, with `num_classes` outputs, and what became of `config.backbone_weights`.

    Raises ConfigError, UnknownModelError and CheckpointError.
    """
    args = dict(config.args)
    given = args.pop("num_classes", num_classes)
    if given != num_classes:
        raise ConfigError(f"model.args.num_classes is {given}, but the data has {num_classes} classes: leave it out.")
    name = of_run(config.name, "local-dir:")
    if name.startswith("timm/"):
        raise ConfigError(f"timm's own models have no head for segmentation: take one of the zoo's, not {name!r}.")
    hub = name.startswith(PLACES)
    entry = get_entry(load_config(name)[0] if hub else split_name(name)[0])
    if entry.task == "language":
        raise ConfigError(f"{entry.name} takes tokens, not images: it is a language model.")
    if has_fixed_size(name) and crop_size not in (None, (input_size or entry.input_size)[1:]):
        raise ConfigError(
            f"augment.crop_size is {list(crop_size or ())}, but {entry.name} takes images of one size alone: leave it "
            "out."
        )
    if input_size is not None:
        args.setdefault("in_chans", input_size[0])
        if has_fixed_size(name):
            args.setdefault("img_size", input_size[1:])
    checkpoint_path = config.checkpoint_path and of_run(config.checkpoint_path)
    if config.backbone_weights is not None and entry.task != "segmentation":
        raise ConfigError(
            f"model.backbone_weights is for networks of segmentation such as FFNet's: name the weights of {entry.name} "
            "with its tag (model.name), or their place with model.checkpoint_path."
        )
    model = create_model(
        name,
        pretrained=False if config.backbone_weights is not None else config.pretrained,
        task="segmentation",
        checkpoint_path=checkpoint_path,
        num_classes=num_classes,
        **args,
    )
    if config.backbone_weights is None:
        return model, ""
    return model, load_backbone(model, config.backbone_weights)


def load_backbone(model: nn.Module, source: str) -> str:
    """Give a segmentation network the stem and the stages of a classifier; what came and what is fresh, in words.

    `source` is a name with the tag of its weights, "hf-hub:owner/name", the folder of a run or a model, or a file in a
    layout that the network's converter reads. Raises CheckpointError for what does not fit, and leaves the model as it
    was.
    """
    targets = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(FRESH)}
    tensors, origin = _backbone_tensors(model, source)
    unexpected = [key for key in tensors if key not in targets]
    misshapen = [key for key in tensors if key in targets and tensors[key].shape != targets[key].shape]
    missing = [key for key in targets if key not in tensors and not key.endswith("num_batches_tracked")]
    if unexpected or misshapen or any(not key.startswith(SHORTCUT) for key in missing):
        kinds = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
        lists = [f"{len(keys)} {kind}, such as {keys[0]}" for kind, keys in kinds.items() if keys]
        raise CheckpointError(
            f"model.backbone_weights: the backbone in {source} is not that of {model.pretrained_cfg['architecture']}: "  # type: ignore[index]
            f"{'; '.join(lists)}."
        )
    model.load_state_dict(tensors, strict=False)
    cfg = of_own_weights(model.pretrained_cfg) | origin  # type: ignore[arg-type]
    model.pretrained_cfg = model.default_cfg = cfg  # type: ignore[assignment]
    fresh = ["neck", "head"]
    if missing:
        count = sum(p.numel() for name, p in model.named_parameters() if name in missing)
        fresh.append(f"the shortcut {SHORTCUT.rstrip('.')} ({count:,} parameters), which a classifier does not have")
    return f"{len(tensors)} tensors of the backbone are those of {source}. Fresh: {', '.join(fresh)}."


def _backbone_tensors(model: nn.Module, source: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stem and stages in `source`, and whose weights they are."""
    path = Path(source.removeprefix("local-dir:")).expanduser()
    if path.is_file() and checkpoint_folder(path) is None:
        entry = get_entry(str(model.pretrained_cfg["architecture"]))  # type: ignore[index]
        found = read_state_dict(locate(path))
        tensors = entry.convert(found, model) if entry.convert else found
        published = tensors.keys() != found.keys() and entry.weights
        origin = {"license": entry.weights[0].license} if published else {}
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("fc.")}  # torchvision's
    else:
        classifier = load_model(source)
        cfg: Any = classifier.pretrained_cfg
        origin = {key: cfg[key] for key in ("license", "origin_url") if cfg.get(key)}
        tensors = classifier.state_dict()
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(FRESH)}, origin
