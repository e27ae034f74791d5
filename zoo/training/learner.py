"""A model inside the module that is optimised, for training that calls it otherwise than `model(images)`."""

from __future__ import annotations

from collections.abc import Callable

from timm.models import group_parameters
from torch import nn

from zoo.errors import ConfigError

__all__ = ["Learner"]


class Learner(nn.Module):
    """`model`, and beside it what training alone needs; the optimizer treats the model's parameters as its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def no_weight_decay(self) -> set[str]:
        names = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else ()  # type: ignore[operator]
        return {f"model.{name}" for name in names}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """The model's layers; what lies beside it learns as fast as its last."""
        if not hasattr(self.model, "group_matcher"):
            raise ConfigError(f"{type(self.model).__name__} does not tell its layers: it has no group_matcher.")
        matcher = self.model.group_matcher(coarse=coarse)  # type: ignore[operator]
        layers = group_parameters(self.model, matcher, reverse=True)
        return lambda name: layers.get(name.removeprefix("model."), max(layers.values()))
