"""The configuration of a training run, section by section. `zoo.config` fills it from YAML and dotted flags."""

from __future__ import annotations

import dataclasses
import numbers
import typing
from typing import Any, Literal

from zoo.data import AugmentConfig, DataConfig
from zoo.errors import ConfigError, did_you_mean
from zoo.training.sparse_methods import (
    METHODS,
    Distribution,
    Growth,
    MaskChoice,
    OptimizerState,
    Prune,
    Schedule,
    SparsityRule,
)

__all__ = [
    "DistillConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "OutputConfig",
    "SchedulerConfig",
    "SparsityConfig",
    "TrainConfig",
    "TrainingConfig",
    "check_above_zero",
    "check_has_teacher",
    "check_not_negative",
    "check_schedule",
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
    """What is minimised: cross-entropy, against mixed labels where mixup, cutmix or MixToken is on.

    Args:
        smoothing: share of each label that is spread over all classes.
        bce_loss: binary cross-entropy for each class instead.
        bce_sum: sum it over the classes instead of averaging.
        bce_target_thresh: with it, a class is there (1) where its mixed or smoothed label is above this, else not (0).
        token_weight: with `data.token_labels`, weight of the tokens' cross-entropy, beside 1 for the image's loss.
    """

    smoothing: float = 0.1
    bce_loss: bool = False
    bce_sum: bool = False
    bce_target_thresh: float | None = None
    token_weight: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise ConfigError(f"loss.smoothing must be from 0 up to, but not, 1; it is {self.smoothing}.")
        check_not_negative("loss", self, "token_weight")
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
        check_above_zero("distill", self, "tau")
        if self.stages and self.kind != "feature":
            raise ConfigError(f"distill.stages belongs to distill.kind feature, not {self.kind}.")
        check_has_teacher(self)


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
        layer_decay: factor, up to 1, on the learning rate from each layer to the one below it; null for none.
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
        check_above_zero("optimizer", self, "lr", "eps", "clip_grad", "layer_decay")
        if self.layer_decay is not None and self.layer_decay > 1:
            raise ConfigError(
                f"optimizer.layer_decay must be above 0 and at most 1 (lower layers learn slower); it is "
                f"{self.layer_decay:g}."
            )
        check_not_negative("optimizer", self, "weight_decay", "momentum")
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
        warmup_prefix: the shape begins where the warm-up ends; otherwise it begins with it, and the warm-up hides its
            first part. `epochs` counts the warm-up either way.
        warmup_lr: learning rate at the start of the warm-up.
        min_lr: learning rate at the end.
        cooldown_epochs: more epochs at `min_lr` after that; "constant" has none.
        decay_epochs: interval of "step", or length of the decay of "wsd" (below 1: a share of the schedule).
        decay_milestones: epochs at which "multistep" lowers the rate.
        decay_rate: factor of "step" and "multistep", or power of "poly".
    """

    sched: Literal["cosine", "constant", "wsd", "step", "multistep", "poly", "tanh", "none"] = "cosine"
    epochs: int = 300
    warmup_epochs: float = 5
    warmup_prefix: bool = False
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    cooldown_epochs: int = 0
    decay_epochs: float | None = None
    decay_milestones: tuple[int, ...] = ()
    decay_rate: float = 0.1

    def __post_init__(self) -> None:
        check_above_zero("scheduler", self, "epochs", "decay_epochs", "decay_rate")
        check_not_negative("scheduler", self, "warmup_epochs", "warmup_lr", "min_lr", "cooldown_epochs")
        if self.warmup_epochs > self.epochs:
            raise ConfigError(
                f"scheduler.warmup_epochs ({self.warmup_epochs:g}) is longer than epochs ({self.epochs})."
            )
        if self.warmup_prefix and self.warmup_epochs == self.epochs:
            raise ConfigError(f"scheduler.warmup_prefix leaves nothing after a warm-up of all {self.epochs} epochs.")
        if bool(self.decay_milestones) != (self.sched == "multistep"):
            raise ConfigError(
                "scheduler.decay_milestones, such as [100, 190], belong to scheduler.sched multistep, which needs them."
            )
        if list(self.decay_milestones) != sorted({n for n in self.decay_milestones if n > 0}):
            raise ConfigError(
                f"scheduler.decay_milestones must be rising numbers of epochs, not {list(self.decay_milestones)}."
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
        max_updates: stop after so many updates; null for all epochs. A schedule, also of a density that falls, goes by
            the epochs: it is cut off, where masks may just have moved. The epoch ends there, too: a run that goes on
            begins the next one.
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
        check_above_zero(
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
class SparsityConfig:
    """Weights that are held at zero, and how the masks that say which move (`zoo.training.sparse`).

    What is left null is as `method` has it; `zoo.training.sparse_methods` lists that. A run's `config.yaml` has the
    values themselves: to try another method, begin with the recipe and not with that file.

    Args:
        method: "static", "snip", "set", "rigl", "slak", "gmp", "granet", "nm" or "chase"; null trains all weights. It
            sets what is left null below: zoo/training/sparse_methods.py lists the values of each method.
        density: share of the chosen layers' weights that is kept, above 0 and below 1: 1 - sparsity; with dead_channels
            up to 1. Null: what the method sets (slak alone does), or what its masks or pattern give.
        layers: "all" (weights of convolutions and linear layers), "decomposed" (of them SLaK's long depthwise kernels),
            or names of modules and weights, with `*` and `?`. Vectors and frozen weights are never sparse. Null: what
            the method sets.
        distribution: of the density over the layers: "uniform"; "er" and "erk" (Erdos-Renyi, without and with the
            kernel's size): small layers are denser; "snip": by the loss's sensitivity on the first update's batches.
            Null: what the method sets.
        masks: which weights of a layer are kept at first: "random"; those of the largest "magnitude"; of the largest
            sensitivity ("snip"); those that are not zero in the "weights" that training starts from, whose density it
            keeps. Null: what the method sets.
        dense_from: a layer that would keep this share of its weights or more keeps all. Null: what the method sets.
        pattern: N:M, such as "2:4" (in quotes): at most 2 of every 4 weights along the inputs are kept, which fixes the
            density. Null: what the method sets.
        initial_density: density at the start, from which it falls to `density` on a cubic curve. Null: what the method
            sets.
        prune: which weights leave when masks move: the smallest by "magnitude", or, in proportion, the smallest
            positive and the largest negative ones ("magnitude_per_sign"). Null: what the method sets.
        growth: where as many appear, at zero: "random", or where the "gradient" or the optimizer's "momentum" is
            largest. With "none" masks do not move. Null: what the method sets.
        prune_rate: share of a layer's kept weights that move at once, at first. Null: what the method sets.
        final_prune_rate: the same at `stop`. Null: what the method sets.
        prune_schedule: the way from the one to the other: "cosine" or "linear"; "constant" stays at `prune_rate`. Null:
            what the method sets.
        update_interval: updates of the weights from one move of the masks to the next, or "epoch": with the first
            update of every epoch but the first. Null: what the method sets.
        start: share of the run before which masks do not move and the density does not fall. Null: what the method
            sets.
        stop: share of the run after which they do not. At its last update no weight appears: it would never learn.
            Null: what the method sets.
        update_instead_of_step: the gradients of an update that moves masks are not used for the weights. Null: what the
            method sets.
        optimizer_state: "dense": the optimizer follows the gradients of all weights, also of those at zero; "active":
            only of those kept, and a weight that appears starts anew, its bias correction counted by its own age;
            "compact": the same, stored for the kept weights alone, which takes memory as the density does (optimizers
            that treat each weight by itself). Null: what the method sets.
        regrow_warmup: updates over which the steps of a weight that appeared grow to their full length; 0 means 100
            with optimizers that are not known here and keep other averages than Adam. Null: what the method sets.
        lr_density_power: a layer of density d takes steps d ** -power as long: 0 as they are, 1 as muP asks for sparse
            layers (Dey et al. 2024, arXiv 2405.15743). Null: what the method sets.
        dead_channels: share of each inner layer's channels, those with the fewest weights, that dies out by `stop`; at
            the end of the run they are cut off. Only channels whose layers, those that make and those that read them,
            are all chosen and not frozen; of language models those of SwiGLUs. Their weights go to other channels, of
            their layer first, so that the density stays, unless it is more than the living channels hold: these end
            dense then.
            Null: what the method sets.
    """

    method: Literal["static", "snip", "set", "rigl", "slak", "gmp", "granet", "nm", "chase"] | None = None
    density: float | None = None
    layers: tuple[str, ...] | str | None = None
    distribution: Distribution | None = None
    masks: MaskChoice | None = None
    dense_from: float | None = None
    pattern: str | int | None = None
    initial_density: float | None = None
    prune: Prune | None = None
    growth: Growth | None = None
    prune_rate: float | None = None
    final_prune_rate: float | None = None
    prune_schedule: Schedule | None = None
    update_interval: int | Literal["epoch"] | None = None
    start: float | None = None
    stop: float | None = None
    update_instead_of_step: bool | None = None
    optimizer_state: OptimizerState | None = None
    regrow_warmup: int | None = None
    lr_density_power: float | None = None
    dead_channels: float | None = None

    def resolved(self) -> SparsityConfig:
        """The same with the method's values written down where none is given."""
        rule = self.rule()
        return self if rule is None else dataclasses.replace(self, **dataclasses.asdict(rule))

    def rule(self) -> SparsityRule | None:
        """All values, with the method's where none is given; None where no method is."""
        if self.method is None:
            return None
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        given = {name: value for name, value in given.items() if name != "method" and value is not None}
        return dataclasses.replace(METHODS[self.method], **given)

    def __post_init__(self) -> None:
        if self.method is not None and self.method not in METHODS:
            raise ConfigError(
                f"sparsity.method is {self.method!r}.{did_you_mean(str(self.method), METHODS)} There are: "
                f"{', '.join(METHODS)}."
            )
        _check_types("sparsity", self)
        rule = self.rule()
        if rule is None:
            given = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None]
            if given:
                raise ConfigError(
                    f"sparsity.{given[0]} belongs to a sparsity.method: choose one of {', '.join(METHODS)}."
                )
            return
        self._check(rule)

    def _check(self, rule: SparsityRule) -> None:
        for name, zero in (("density", False), ("dense_from", False), ("initial_density", False), ("stop", False)):
            _check_share("sparsity", rule, name, zero=zero)
        for name in ("prune_rate", "final_prune_rate", "start"):
            _check_share("sparsity", rule, name)
        if not 0 <= rule.dead_channels < 1:
            raise ConfigError(f"sparsity.dead_channels must be from 0 up to, but not, 1; it is {rule.dead_channels}.")
        check_not_negative("sparsity", rule, "regrow_warmup", "lr_density_power")
        if rule.lr_density_power > 2:
            raise ConfigError(f"sparsity.lr_density_power must be up to 2, not {rule.lr_density_power:g}.")
        if rule.update_interval != "epoch" and rule.update_interval < 1:
            raise ConfigError(f"sparsity.update_interval must be above zero, not {rule.update_interval}.")
        if rule.start >= rule.stop:
            raise ConfigError(f"sparsity.start ({rule.start:g}) must come before sparsity.stop ({rule.stop:g}).")
        if rule.pattern is not None:
            _check_pattern(rule)
        elif rule.masks == "weights":
            if rule.density is not None or rule.initial_density is not None:
                raise ConfigError(
                    "sparsity.masks weights keeps the density of the weights: leave out density and initial_density."
                )
        elif rule.density is None:
            raise ConfigError(
                f"sparsity.method {self.method} needs sparsity.density: the share of weights to keep, such as 0.2."
            )
        elif rule.density == 1 and not rule.dead_channels:
            raise ConfigError("sparsity.density 1 leaves no weight at zero: lower it.")
        elif rule.initial_density is not None and rule.initial_density < rule.density:
            raise ConfigError(
                f"sparsity.initial_density ({rule.initial_density:g}) must not be below density ({rule.density:g})."
            )
        if rule.optimizer_state == "dense" and rule.regrow_warmup:
            raise ConfigError(
                "sparsity.regrow_warmup belongs to optimizer_state active or compact: a dense state never starts anew."
            )
        if rule.growth == "momentum" and rule.optimizer_state != "dense":
            raise ConfigError(
                "sparsity.growth momentum needs sparsity.optimizer_state dense: else weights at zero have no momentum."
            )
        if rule.dead_channels and rule.initial_density is not None:
            raise ConfigError("sparsity.dead_channels does not go with initial_density, a density that falls.")
        if rule.dead_channels and rule.growth == "none":
            raise ConfigError("sparsity.dead_channels needs masks that move: set sparsity.growth, too.")


NUMBERS = (numbers.Real, numbers.Integral)  # NumPy's among them


def _check_types(section: str, config: Any) -> None:
    """Raise ConfigError for values that are not of their fields' types, as the command line does by itself."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value, kinds = getattr(config, name), typing.get_args(hint) or (hint,)
        words = [word for kind in kinds if typing.get_origin(kind) is Literal for word in typing.get_args(kind)]
        plain = {typing.get_origin(kind) or kind for kind in kinds if typing.get_origin(kind) is not Literal}
        plain |= {numbers.Real} if float in plain else {numbers.Integral} if int in plain else set()
        plain |= {list} if tuple in plain else set()
        fits = isinstance(value, tuple(plain)) and (type(value) is not bool or bool in plain)
        if fits or (isinstance(value, str) and value in words):
            continue
        near = did_you_mean(value, words) if isinstance(value, str) else ""
        told = [repr(word) for word in words] + sorted(k.__name__ for k in plain - {type(None), list, *NUMBERS})
        raise ConfigError(f"{section}.{name} must be {' or '.join(told)}, not {value!r}.{near}")


def _check_pattern(rule: SparsityRule) -> None:
    n, colon, m = str(rule.pattern).partition(":")
    if not (colon and n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m) <= 1024):
        raise ConfigError(
            f"sparsity.pattern is {rule.pattern!r}: it is N:M, such as 2:4, with N below M; in YAML in quotes. "
            "M is at most 1024."
        )
    if rule.density is not None or rule.initial_density is not None or rule.masks == "weights" or rule.dead_channels:
        raise ConfigError(
            f"sparsity.pattern {rule.pattern} fixes the density: leave out density, initial_density, masks weights and "
            "dead_channels."
        )


def _check_share(section: str, config: Any, name: str, *, zero: bool = True) -> None:
    value = getattr(config, name)
    if value is not None and not (0 <= value <= 1 and (zero or value > 0)):
        raise ConfigError(f"{section}.{name} must be {'from 0' if zero else 'above 0 and up'} to 1; it is {value}.")


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
    sparsity: SparsityConfig = dataclasses.field(default_factory=SparsityConfig)
    output: OutputConfig = dataclasses.field(default_factory=OutputConfig)
    resume: str | None = None

    def __post_init__(self) -> None:
        if self.augment.mixes and self.data.batch_size % 2:
            raise ConfigError(
                f"Mixup pairs the images of a batch: data.batch_size ({self.data.batch_size}) must be even."
            )
        self._check_token_labels()
        check_schedule(self.scheduler, self.optimizer)

    def _check_token_labels(self) -> None:
        if self.data.token_labels is None:
            if self.augment.mix_token:
                raise ConfigError(
                    "augment.mix_token mixes tokens and their labels: say where these lie, too, with data.token_labels."
                )
            return
        if self.augment.mixes:
            raise ConfigError(
                "data.token_labels does not go with augment.mixup and augment.cutmix, which mix pixels: set both to 0. "
                "augment.mix_token mixes tokens."
            )
        if self.distill.teacher is not None:
            raise ConfigError(
                "data.token_labels are a teacher's already, and do not go with distill.teacher: leave out one of them."
            )


def check_schedule(scheduler: SchedulerConfig, optimizer: OptimizerConfig) -> None:
    """Raises ConfigError for a rate that would rise."""
    ends_at_min_lr = scheduler.sched in ("cosine", "wsd", "poly", "tanh")
    if ends_at_min_lr and scheduler.min_lr > optimizer.lr:
        raise ConfigError(
            f"scheduler.min_lr ({scheduler.min_lr:g}) is above optimizer.lr ({optimizer.lr:g}): the rate would rise. "
            "Lower it."
        )


def check_has_teacher(distill: Any) -> None:
    """Raise ConfigError where options of a distillation stand without the teacher that they are about."""
    given = [f.name for f in dataclasses.fields(distill) if getattr(distill, f.name) != f.default]
    if distill.teacher is None and given:
        raise ConfigError(
            f"distill.{given[0]} belongs to a distill.teacher: name one, or leave distill.{given[0]} out."
        )


def check_above_zero(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{section}.{name} must be above zero, not {value}.")


def check_not_negative(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not value >= 0:
            raise ConfigError(f"{section}.{name} must not be negative, but is {value}.")
