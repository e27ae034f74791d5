"""What others put around a model."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from zoo.errors import ConfigError

__all__ = ["copied", "unwrapped"]

Model = TypeVar("Model", bound=nn.Module)


def copied(model: Model) -> Model:
    """A copy with weights of its own. Raises ConfigError for a model that PyTorch cannot copy."""
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:
        if "created explicitly by the user" not in str(error):
            raise
        raise ConfigError(
            f"{type(model).__name__} cannot be copied: it holds tensors that were computed from others, as under "
            "torch.nn.utils.prune, whose remove(module, 'weight') makes weights of them."
        ) from error


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside data-parallel and compiled wrappers. Raises ConfigError for what is no module."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"A model is a torch.nn.Module, and not {model!r}.")
    while True:
        parallel = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
        inner = getattr(model, "module" if parallel else "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner
