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

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "ImageClassification",
    "Interrupted",
    "LanguageModeling",
    "LanguageTrainingConfig",
    "Run",
    "TrainingConfig",
    "TrainingError",
    "fit",
    "parse_training_config",
    "train",
]


def train(config: TrainingConfig | LanguageTrainingConfig, console: Console | None = None) -> Run:
    """Train a model as `config` says, into the folder `config.output.dir`: an image classifier or a language model.

    Raises ConfigError, DataError, UnknownModelError, CheckpointError or TrainingError for what they say, and
    Interrupted when a signal stopped the run (which is saved then).
    """
    if isinstance(config, LanguageTrainingConfig):
        return train_language_model(config, console)
    return train_image_classifier(config, console)


def parse_training_config(
    argv: Sequence[str], *, prog: str, examples: str = ""
) -> TrainingConfig | LanguageTrainingConfig:
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
            TrainingConfig, argv, prog=prog, description="Train an image classifier.", examples=examples
        )
    if named[-1] != "language":
        raise ConfigError(
            f"There is no task {named[-1]!r}: it is language, or, for images, left out."
            f"{did_you_mean(str(named[-1]), ['language'])}"
        )
    return parse_config(
        LanguageTrainingConfig, argv, prog=prog, description="Train a language model.", examples=examples
    )
