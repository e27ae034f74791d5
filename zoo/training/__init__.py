"""Training: one loop, tasks apart from it, checkpoints that survive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from zoo.errors import MissingDependencyError

try:
    import accelerate  # noqa: F401
except ImportError as error:
    raise MissingDependencyError('Training needs accelerate: pip install "backbone-zoo[train]".') from error

from zoo.config import flag_values, parse_config, read_yaml
from zoo.errors import ConfigError, did_you_mean
from zoo.training.config import TrainingConfig
from zoo.training.image_classification import ImageClassification, train_image_classifier
from zoo.training.language_config import LanguageTrainingConfig
from zoo.training.language_modeling import LanguageModeling, train_language_model
from zoo.training.loop import Interrupted, Run, TrainingError, fit
from zoo.training.segmentation import Segmentation, train_segmentation_model
from zoo.training.segmentation_config import SegmentationTrainingConfig

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "ImageClassification",
    "Interrupted",
    "LanguageModeling",
    "LanguageTrainingConfig",
    "Run",
    "Segmentation",
    "SegmentationTrainingConfig",
    "TrainingConfig",
    "TrainingError",
    "fit",
    "parse_training_config",
    "train",
]


AnyConfig = TrainingConfig | SegmentationTrainingConfig | LanguageTrainingConfig
TASKS: dict[str, tuple[type[AnyConfig], str]] = {
    "language": (LanguageTrainingConfig, "Train a language model."),
    "segmentation": (SegmentationTrainingConfig, "Train a segmentation network."),
}


def train(config: AnyConfig, console: Console | None = None) -> Run:
    """Train a model as `config` says, into the folder `config.output.dir`: the kind of `config` says which task.

    Raises ConfigError, DataError, UnknownModelError, CheckpointError or TrainingError for what they say, and
    Interrupted when a signal stopped the run (which is saved then).
    """
    if isinstance(config, LanguageTrainingConfig):
        return train_language_model(config, console)
    if isinstance(config, SegmentationTrainingConfig):
        return train_segmentation_model(config, console)
    if not isinstance(config, TrainingConfig):
        raise ConfigError(
            f"train() takes a TrainingConfig, SegmentationTrainingConfig or LanguageTrainingConfig, not {config!r}: "
            "parse_training_config makes one of a recipe's file and flags."
        )
    return train_image_classifier(config, console)


def parse_training_config(argv: Sequence[str], *, prog: str, examples: str = "") -> AnyConfig:
    """The configuration that `argv` asks for: `task: language` in its file, or `--task language`, says which kind.

    Raises what `zoo.config.parse_config` raises.
    """
    named = list(flag_values(argv, "--task"))
    for path in flag_values(argv, "--config"):
        values = read_yaml(path) if path else None
        if isinstance(values, dict) and "task" in values:
            named.insert(0, values["task"])
    if not named:
        return parse_config(
            TrainingConfig,
            argv,
            prog=prog,
            description="Train an image classifier. For other tasks: train.py --task language --help, "
            "train.py --task segmentation --help.",
            examples=examples,
        )
    if str(named[-1]) not in TASKS:
        raise ConfigError(
            f"There is no task {named[-1]!r}: it is language or segmentation, or, for classifying images, left out."
            f"{did_you_mean(str(named[-1]), TASKS)}"
        )
    schema, description = TASKS[named[-1]]
    return parse_config(schema, argv, prog=prog, description=description, examples=examples)
