"""What others put around a model."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod

from zoo.errors import ConfigError

__all__ = ["check_has_weights", "copied", "to_channels_last", "unwrapped"]

Model = TypeVar("Model", bound=nn.Module)


def copied(model: Model) -> Model:
    """A copy with weights of its own. Raises ConfigError for a model that PyTorch cannot copy."""
    check_has_weights(model)
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:
        if "created explicitly by the user" not in str(error):
            raise
        raise ConfigError(f"{type(model).__name__} cannot be copied: {COMPUTED}") from error


COMPUTED = (
    "it holds tensors that were computed from others, as under torch.nn.utils.prune, whose remove(module, 'weight') "
    "makes weights of them."
)


def check_has_weights(model: nn.Module) -> None:
    """Raise ConfigError for a model whose weights are made anew before each call, by torch.nn.utils.prune."""
    if any(isinstance(hook, BasePruningMethod) for m in model.modules() for hook in m._forward_pre_hooks.values()):
        raise ConfigError(f"{type(model).__name__} has no weights of its own: {COMPUTED}")


def to_channels_last(model: nn.Module) -> None:
    """Lay out tensors of four dimensions so, in place; `Module.to` also tries those of five, for which it fails."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


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
