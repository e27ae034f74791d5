"""The configuration of a run that trains a language model."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from zoo.data.text import TextDataConfig
from zoo.errors import ConfigError
from zoo.training.config import (
    OptimizerConfig,
    OutputConfig,
    SchedulerConfig,
    SparsityConfig,
    TrainConfig,
    check_above_zero,
    check_has_teacher,
    check_not_negative,
    check_schedule,
)

__all__ = [
    "LanguageDistillConfig",
    "LanguageLossConfig",
    "LanguageModelConfig",
    "LanguageTrainConfig",
    "LanguageTrainingConfig",
    "SampleConfig",
    "TokenizerConfig",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """What is trained.

    Args:
        name: of a language model in the zoo, with the tag of its weights or without, "hf-hub:owner/name",
            "local-dir:path", or the folder of a run (its best checkpoint).
        pretrained: start from the published weights; by default, where `name` says which.
        checkpoint_path: start from these weights: a file, a folder, a run's folder, or "hf-hub:owner/name".
        freeze: modules and parameters that are not trained, with all below them, such as [model.embed_tokens].
        args: arguments of the architecture, such as depth, dim or context_length. `vocab_size` is the tokenizer's
            where training starts from nothing.
    """

    name: str = "mobilellm_125m"
    pretrained: bool | None = None
    checkpoint_path: str | None = None
    freeze: tuple[str, ...] = ()
    args: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """What makes tokens of texts. Checkpoints hold its files.

    Args:
        name: "bytes", a folder or file, "hf-hub:owner/name", the name of a model, or the folder of a run; "bpe" learns
            one, a byte-level BPE, from the training texts; null where the data are token numbers. "auto" is the one
            that lies beside the weights which training starts from, and "bytes" where it starts from none.
        vocab_size: of "bpe".
    """

    name: str | None = "auto"
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if (self.name == "bpe") != (self.vocab_size is not None):
            raise ConfigError('tokenizer.vocab_size and tokenizer.name "bpe" belong together: set both or neither.')
        check_above_zero("tokenizer", self, "vocab_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageLossConfig:
    """What is minimised: cross-entropy with the next token.

    Args:
        z_loss: weight of the mean squared log-normaliser beside it, which keeps logits small; 1e-4 is usual.
    """

    z_loss: float = 0.0

    def __post_init__(self) -> None:
        check_not_negative("loss", self, "z_loss")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageDistillConfig:
    """A teacher to learn from: loss = (1 - alpha) * cross-entropy + alpha * KL(teacher || student).

    Args:
        teacher: a name in the zoo, "hf-hub:owner/name", "local-dir:path", the folder of a run, or
            "transformers/owner/name" (or a folder) for a causal model of that library; null for none. It must have the
            student's tokens.
        alpha: weight of the teacher, from 0 to 1.
        tau: temperature, which divides the logits of both; the loss is multiplied with its square.
        top_k: learn the teacher's so many most probable tokens alone, their probabilities scaled to a sum of 1; null
            for all.
        dtype: of the teacher's weights.
    """

    teacher: str | None = None
    alpha: float = 0.5
    tau: float = 1.0
    top_k: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"distill.alpha must be from 0 to 1; it is {self.alpha}.")
        check_above_zero("distill", self, "tau", "top_k")
        check_has_teacher(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageTrainConfig(TrainConfig):
    """How the loop runs.

    Args:
        peak_flops: of one device, in FLOP/s, for the model FLOPs utilisation; null measures a matrix product's.
    """

    peak_flops: float | None = None

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        check_above_zero("train", self, "peak_flops")
        if self.channels_last:
            raise ConfigError("train.channels_last is for images.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Text that the model writes after each evaluation, kept in the run's `samples.md`.

    Args:
        prompts: what it continues; none writes nothing. An empty one lets it begin.
        max_new_tokens: of each.
        temperature: of the draws; 0 takes the most probable token.
        top_p: share of the probability that is drawn from.
    """

    prompts: tuple[str, ...] = ()
    max_new_tokens: int = 128
    temperature: float = 0.8
    top_p: float = 0.95

    def __post_init__(self) -> None:
        check_above_zero("sample", self, "max_new_tokens", "top_p")
        check_not_negative("sample", self, "temperature")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageTrainingConfig:
    """One run of a language model.

    Args:
        task: what the file configures.
        resume: "auto" goes on from the run's last checkpoint if it has one; a path goes on from that run or checkpoint.
    """

    task: Literal["language"] = "language"
    model: LanguageModelConfig = dataclasses.field(default_factory=LanguageModelConfig)
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    data: TextDataConfig
    loss: LanguageLossConfig = dataclasses.field(default_factory=LanguageLossConfig)
    distill: LanguageDistillConfig = dataclasses.field(default_factory=LanguageDistillConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = dataclasses.field(default_factory=SchedulerConfig)
    train: LanguageTrainConfig = dataclasses.field(default_factory=LanguageTrainConfig)
    sparsity: SparsityConfig = dataclasses.field(default_factory=SparsityConfig)
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    output: OutputConfig = dataclasses.field(default_factory=OutputConfig)
    resume: str | None = None

    def __post_init__(self) -> None:
        check_schedule(self.scheduler, self.optimizer)
        if self.sample.prompts and self.tokenizer.name is None:
            raise ConfigError("sample.prompts are text: without a tokenizer leave them out.")
