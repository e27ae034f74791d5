"""The configuration of a training run, section by section. `zoo.config` fills it from YAML and dotted flags."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from zoo.data import AugmentConfig, DataConfig
from zoo.errors import ConfigError

__all__ = [
    "DistillConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "OutputConfig",
    "SchedulerConfig",
    "TrainConfig",
    "TrainingConfig",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is trained.

    Args:
        name: of a model in the zoo, with the tag of its weights or without, "hf-hub:owner/name", "local-dir:path", the
            folder of a run (its best checkpoint), or "timm/name" for timm's own.
        pretrained: start from the published weights; by default, where `name` says which.
        checkpoint_path: start from these weights: a file, a folder, a run's folder, or "hf-hub:owner/name".
        freeze: modules and parameters that are not trained, with all below them, such as [stem, stages.0] or
            ["stages.*.downsample"]. They stay in evaluation mode: drop path rests, batch norms keep their statistics.
        args: arguments of the architecture, such as drop_path_rate, depths or in_chans.
    """

    name: str = "poolformer_s12"
    pretrained: bool | None = None
    checkpoint_path: str | None = None
    freeze: tuple[str, ...] = ()
    args: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is minimised: cross-entropy, against mixed labels where mixup or cutmix is on.

    Args:
        smoothing: share of each label that is spread over all classes.
        bce_loss: binary cross-entropy for each class instead.
        bce_sum: sum it over the classes instead of averaging.
        bce_target_thresh: with it, a class is there (1) where its mixed or smoothed label is above this, else not (0).
    """

    smoothing: float = 0.1
    bce_loss: bool = False
    bce_sum: bool = False
    bce_target_thresh: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise ConfigError(f"loss.smoothing must be from 0 up to, but not, 1; it is {self.smoothing}.")
        if self.bce_target_thresh is not None and not 0 <= self.bce_target_thresh < 1:
            raise ConfigError(
                f"loss.bce_target_thresh must be from 0 up to, but not, 1; it is {self.bce_target_thresh}."
            )
        if not self.bce_loss and (self.bce_sum or self.bce_target_thresh is not None):
            raise ConfigError("loss.bce_sum and loss.bce_target_thresh belong to loss.bce_loss: set it, too.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A teacher to learn from, beside the labels: loss = (1 - alpha) * (loss of the labels) + alpha * (of the teacher).

    Args:
        teacher: a name in the zoo with the tag of its weights or without, "timm/name", "hf-hub:owner/name",
            "local-dir:path" or the folder of a run; null for none.
        checkpoint_path: weights for a teacher that is given by its name.
        kind: "soft", the teacher's probabilities (KL divergence; Hinton et al., arXiv 1503.02531); "hard", its most
            probable class (cross-entropy; DeiT, arXiv 2012.12877); "feature", its features, to which a learned
            projection maps the student's (mean squared error; FitNets, arXiv 1412.6550).
        alpha: weight of the teacher, from 0 to 1.
        tau: temperature of "soft", which divides the logits of both; the loss is multiplied with its square.
        stages: of "feature": stages whose maps are matched, the same of both, as `forward_intermediates` numbers them
            (-1: the last); none for the pooled features before the classifier.
    """

    teacher: str | None = None
    checkpoint_path: str | None = None
    kind: Literal["soft", "hard", "feature"] = "soft"
    alpha: float = 0.5
    tau: float = 1.0
    stages: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"distill.alpha must be from 0 to 1; it is {self.alpha}.")
        _check_above_zero("distill", self, "tau")
        if self.stages and self.kind != "feature":
            raise ConfigError(f"distill.stages belongs to distill.kind feature, not {self.kind}.")
        if self.checkpoint_path is not None and self.teacher is None:
            raise ConfigError("distill.checkpoint_path needs a model to hold the weights: name it as distill.teacher.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How weights follow gradients. Biases, norms and scales (all one-dimensional tensors) are not decayed.

    Args:
        opt: name of the optimizer, as timm lists them: "adamw", "lamb", "sgd", "muon", "lookahead_radam" ...
        lr: learning rate at its peak, for the batch as it is; nothing rescales it.
        weight_decay: of what is decayed.
        momentum: of optimizers that have it.
        betas: of Adam and its kin; by default the optimizer's.
        eps: of Adam and its kin; by default the optimizer's.
        layer_decay: factor on the learning rate from each layer to the one below it; null for none.
        clip_grad: bound on the gradient; null for none.
        clip_mode: what is bound: the "norm" of all gradients, each "value", or ("agc") each unit's norm.
        args: what else the optimizer takes, such as {ns_steps: 6, fallback_list: ["head.*"]} for "muon".
    """

    opt: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    momentum: float = 0.9
    betas: tuple[float, float] | None = None
    eps: float | None = None
    layer_decay: float | None = None
    clip_grad: float | None = None
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    args: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_above_zero("optimizer", self, "lr", "eps", "clip_grad", "layer_decay")
        _check_not_negative("optimizer", self, "weight_decay", "momentum")
        twice = sorted(self.args.keys() & {field.name for field in dataclasses.fields(self)})
        if twice:
            raise ConfigError(f"optimizer.args.{twice[0]}: this is optimizer.{twice[0]}; set it there.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """How the learning rate moves, update by update. timm's schedules.

    Args:
        sched: shape of the schedule; "wsd" is warm-up, stable, decay (the trapezoid), "constant" stays at the peak
            after its warm-up, "none" leaves the rate alone.
        epochs: length of the schedule, with its warm-up.
        warmup_epochs: of linear warm-up.
        warmup_lr: learning rate at the start of the warm-up.
        min_lr: learning rate at the end.
        cooldown_epochs: more epochs at `min_lr` after that; "constant" has none.
        decay_epochs: interval of "step", or length of the decay of "wsd" (below 1: a share of the schedule).
        decay_rate: factor of "step", or power of "poly".
    """

    sched: Literal["cosine", "constant", "wsd", "step", "poly", "tanh", "none"] = "cosine"
    epochs: int = 300
    warmup_epochs: float = 5
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    cooldown_epochs: int = 0
    decay_epochs: float | None = None
    decay_rate: float = 0.1

    def __post_init__(self) -> None:
        _check_above_zero("scheduler", self, "epochs", "decay_epochs", "decay_rate")
        _check_not_negative("scheduler", self, "warmup_epochs", "warmup_lr", "min_lr", "cooldown_epochs")
        if self.warmup_epochs > self.epochs:
            raise ConfigError(
                f"scheduler.warmup_epochs ({self.warmup_epochs:g}) is longer than epochs ({self.epochs})."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the loop runs.

    Args:
        seed: of weights, order, augmentation and dropout.
        device: "auto" takes the accelerator there is.
        amp: mixed precision; bf16 needs no loss scaling.
        parallel: what several processes share: with "ddp" each holds the whole model, with "fsdp" (FSDP2) each holds a
            part of weights, gradients and the optimizer's state. Checkpoints are the same.
        grad_accum_steps: batches of each process whose gradients make one update; those left at the end of an epoch
            make none.
        global_batch_size: samples to an update, over all processes; grad_accum_steps follows from it.
        channels_last: memory layout of model and images.
        torchcompile: compile the model first.
        grad_checkpointing: recompute activations in the backward pass, to save memory.
        model_ema: keep an exponential moving average of the weights; it is what is evaluated and saved.
        model_ema_decay: of that average.
        model_ema_warmup: let its decay grow from zero.
        max_updates: stop after so many updates; null for all epochs.
        eval_interval: epochs from one evaluation to the next; the last epoch is always evaluated.
        save_interval_updates: updates from one checkpoint to the next within an epoch; null for epochs' ends alone.
    """

    seed: int = 42
    device: Literal["auto", "cpu"] = "auto"
    amp: Literal["no", "bf16", "fp16"] = "no"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    grad_accum_steps: int = 1
    global_batch_size: int | None = None
    channels_last: bool = False
    torchcompile: bool = False
    grad_checkpointing: bool = False
    model_ema: bool = False
    model_ema_decay: float = 0.9999
    model_ema_warmup: bool = False
    max_updates: int | None = None
    eval_interval: int = 1
    save_interval_updates: int | None = None

    def __post_init__(self) -> None:
        _check_above_zero(
            "train",
            self,
            "grad_accum_steps",
            "global_batch_size",
            "max_updates",
            "eval_interval",
            "save_interval_updates",
        )
        if not 0 <= self.seed < 2**31:  # leaves room for the processes' own
            raise ConfigError(f"train.seed must be from 0 to {2**31 - 1}; it is {self.seed}.")
        if not 0 <= self.model_ema_decay < 1:
            raise ConfigError(f"train.model_ema_decay must be from 0 up to, but not, 1; it is {self.model_ema_decay}.")
        if self.global_batch_size is not None and self.grad_accum_steps != 1:
            raise ConfigError("train.grad_accum_steps follows from train.global_batch_size: set one of the two.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Where a run leaves what it makes.

    Args:
        dir: the run's folder; it must not hold another run, unless that is resumed.
        tracker: also log there, through accelerate; null for history.csv and the curves alone.
        note: any text, kept with the configuration.
    """

    dir: str = "runs/train"
    tracker: Literal["tensorboard", "wandb", "trackio"] | None = "tensorboard"
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One run of image classification.

    Args:
        resume: "auto" goes on from the run's last checkpoint if it has one; a path goes on from that run or checkpoint.
    """

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = dataclasses.field(default_factory=SchedulerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    output: OutputConfig = dataclasses.field(default_factory=OutputConfig)
    resume: str | None = None

    def __post_init__(self) -> None:
        if self.augment.mixes and self.data.batch_size % 2:
            raise ConfigError(
                f"Mixup pairs the images of a batch: data.batch_size ({self.data.batch_size}) must be even."
            )
        ends_at_min_lr = self.scheduler.sched in ("cosine", "wsd", "poly", "tanh")
        if ends_at_min_lr and self.scheduler.min_lr > self.optimizer.lr:
            raise ConfigError(
                f"scheduler.min_lr ({self.scheduler.min_lr:g}) is above optimizer.lr ({self.optimizer.lr:g}): the rate "
                "would rise. Lower it."
            )


def _check_above_zero(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{section}.{name} must be above zero, not {value}.")


def _check_not_negative(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not value >= 0:
            raise ConfigError(f"{section}.{name} must not be negative, but is {value}.")
