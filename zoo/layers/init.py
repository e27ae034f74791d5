"""Building without waste: modules are made on the meta device, then each tensor is allocated and initialised once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


def own_tensors(module: nn.Module) -> list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]]:
    """(holder, key, tensor) for the parameters and buffers that `module` itself holds, not its children."""
    holders: tuple[dict, dict] = (module._parameters, module._buffers)
    return [(holder, key, tensor) for holder in holders for key, tensor in holder.items() if tensor is not None]


def init_weights(model: nn.Module) -> None:
    """Run `model.init_module` on every submodule that holds tensors, unless they are on the meta device.

    A model calls this at the end of its constructor, so that it is initialised as published however it is built.
    """
    for module in model.modules():
        tensors = own_tensors(module)
        if tensors and not any(tensor.is_meta for _, _, tensor in tensors):
            model.init_module(module)  # type: ignore[operator]


def _empty_like(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    # not empty_like, which imports sympy for tensors on the meta device
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        empty = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
    else:
        empty = torch.empty(tensor.size(), dtype=tensor.dtype, device=device)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


@torch.no_grad()
def materialize(model: nn.Module, device: torch.device | str | None = None) -> nn.Module:
    """Allocate and initialise every tensor of `model` that is still on the meta device, and no other.

    `model.init_module(module)` must initialise the parameters and buffers that `module` itself holds. Tensors that
    are shared stay shared.
    """
    device = torch.get_default_device() if device is None else torch.device(device)
    allocated: dict[int, torch.Tensor] = {}
    for module in model.modules():
        tensors = own_tensors(module)
        if not any(tensor.is_meta for _, _, tensor in tensors):
            continue
        loaded = [(holder, key, tensor) for holder, key, tensor in tensors if not tensor.is_meta]
        for holder, key, tensor in tensors:
            if not tensor.is_meta:  # init_module writes all of a module's tensors: keep it off the loaded ones
                holder[key] = _empty_like(tensor, tensor.device)
                continue
            if id(tensor) not in allocated:
                allocated[id(tensor)] = _empty_like(tensor, device)
            holder[key] = allocated[id(tensor)]
        model.init_module(module)  # type: ignore[operator]
        for holder, key, tensor in loaded:
            holder[key] = tensor
    return model


class _NothingDrawn(TorchFunctionMode):
    """Random values are not drawn for the meta device, where PyTorch would import its compiler for them: seconds."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("uniform_", "normal_", "kaiming_uniform_"):
            tensor = args[0] if args else (kwargs or {}).get("tensor")
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """What is built within has no memory and no values."""
    with torch.device("meta"), _NothingDrawn():
        yield


def has_meta(model: nn.Module) -> bool:
    """Whether any parameter or buffer of `model` is on the meta device."""
    return any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers()))
