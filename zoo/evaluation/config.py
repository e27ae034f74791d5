"""The configuration of an evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from zoo.config import flag_values, parse_config, plain_flags, read_yaml
from zoo.data.images import DataConfig
from zoo.errors import ConfigError

__all__ = ["EvaluationConfig", "parse_evaluation"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluate an image classifier.

    Args:
        model: a name in the zoo with the tag of its weights or without, "timm/name", "hf-hub:owner/name", the folder of
            a run (its best checkpoint, and its data unless other data is named), or a folder in the Hub's layout.
        data: which images.
        checkpoint_path: weights for a model that is given by its name.
        device: where to run; "auto" takes the accelerator there is.
        amp: mixed precision.
        channels_last: memory layout of model and images.
        output: folder for results.json and confusion.png; null to print only.
    """

    model: str
    data: DataConfig
    checkpoint_path: str | None = None
    device: str = "auto"
    amp: Literal["no", "bf16", "fp16"] = "no"
    channels_last: bool = False
    output: str | None = None


def parse_evaluation(argv: Sequence[str]) -> EvaluationConfig:
    """The configuration in `argv`; a run's own data fills in where that names a run. Raises as `parse_config` does."""
    flags: list[str] = []
    for model in flag_values(argv, "--model"):
        recorded = Path(model).expanduser() / "config.yaml"
        if recorded.is_file():
            run = read_yaml(str(recorded))
            if not isinstance(run, dict) or not isinstance(run.get("data"), dict):
                raise ConfigError(f"{recorded} is not the configuration of a run: name the data with --data.name.")
            flags = plain_flags({"data": run["data"]})
    if any(token.startswith(("--data.name", "--data.path", "--config")) for token in argv):
        flags = []
    return parse_config(
        EvaluationConfig,
        [*flags, *argv],
        prog="eval.py",
        description="Evaluate an image classifier: top-1, top-5, loss, per-class accuracy, confusion.",
    )
