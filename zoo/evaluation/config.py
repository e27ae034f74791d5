"""The configuration of an evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import yaml

from zoo.config import parse_config, plain_flags
from zoo.data.images import DataConfig

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
    for token, following in zip(argv, [*argv[1:], ""], strict=True):
        model = token.removeprefix("--model=") if token.startswith("--model=") else following
        recorded = Path(model) / "config.yaml"
        if token.partition("=")[0] == "--model" and recorded.is_file():
            flags = plain_flags({"data": yaml.safe_load(recorded.read_text(encoding="utf-8")).get("data", {})})
    if any(token.startswith(("--data.name", "--data.path", "--config")) for token in argv):
        flags = []
    return parse_config(
        EvaluationConfig,
        [*flags, *argv],
        prog="eval.py",
        description="Evaluate an image classifier: top-1, top-5, loss, per-class accuracy, confusion.",
    )
