"""From what a user names to a module, for `profile` and `benchmark`: our models, and any of timm's beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo.errors import ConfigError, UnknownModelError, did_you_mean
from zoo.factory import create_model
from zoo.loading import create_timm_model, holds_timm_model, resolve_path
from zoo.registry import list_models

TIMM_PREFIX = "timm/"


def build(name: str, device: torch.device | str = "cpu") -> nn.Module:
    """The model called `name`, without weights: the zoo's if it has one, else timm's (`timm/NAME`: always timm's).

    The folder of a run or a model stands for its architecture. Raises UnknownModelError with the nearest names of both,
    ConfigError for a path at which there is no model.
    """
    if not isinstance(name, str):
        raise ConfigError(f"A model name is a string such as 'poolformer_s12', not {type(name).__name__}.")
    if name.startswith(TIMM_PREFIX):
        return _build_with_timm(name.removeprefix(TIMM_PREFIX), device)
    if name not in list_models():  # a folder of that name in the way is none's
        name = resolve_path(name)
    if holds_timm_model(name):
        with torch.device(device):
            return create_timm_model(name, pretrained=False)
    try:
        return create_model(name, pretrained=False, device=device)
    except UnknownModelError:
        if ":" in name or name.split(".")[0] in list_models():
            raise
        return _build_with_timm(name, device)


def _build_with_timm(name: str, device: torch.device | str) -> nn.Module:
    import timm

    from zoo.compat.timm import timms_own

    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        names = {*list_models(), *timm.list_models()}
        raise UnknownModelError(f"Neither the zoo nor timm has a model called {base!r}.{did_you_mean(base, names)}")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(base)] if tag else []
    if tag and tag not in tags:
        raise UnknownModelError(f"timm has no weights {tag!r} of {base}.{did_you_mean(tag, tags)}")
    with torch.device(device), timms_own(name):
        return timm.create_model(name, pretrained=False)


def default_input_size(model: nn.Module) -> tuple[int, int, int]:
    """The size that the model's own `pretrained_cfg` names, with as many channels as the model was made for.

    Raises ConfigError for a model that has none.
    """
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    size = cfg.get("input_size")
    if size is None:
        raise ConfigError(
            f"{type(model).__name__} does not say what input it takes: give input_size=(channels, height, width)."
        )
    channels, height, width = size
    given: Any = getattr(model, "_model_args", None) or {}
    chosen: Any = getattr(model, "in_chans", given.get("in_chans"))
    return chosen if isinstance(chosen, int) else channels, height, width


def check_input_size(size: Any) -> tuple[int, int, int]:
    """`size` as a tuple, or a ConfigError unless it is (channels, height, width) in whole numbers above zero."""
    if not isinstance(size, tuple | list) or len(size) != 3 or not all(type(n) is int and n > 0 for n in size):
        raise ConfigError(
            f"input_size is (channels, height, width) in whole numbers above zero, such as (3, 224, 224), not {size!r}."
        )
    return tuple(size)


def check_channels(model: nn.Module, size: tuple[int, int, int], name: str) -> None:
    """Raise ConfigError where the model says that it takes images of other channels."""
    channels: Any = getattr(model, "in_chans", size[0])
    if isinstance(channels, int) and channels != size[0]:
        raise ConfigError(f"{name} takes images of {channels} channels, not {size[0]}: input_size is {size}.")


def check_count(what: str, value: Any, least: int = 1) -> int:
    """`value`, or a ConfigError unless it is a whole number from `least` up."""
    if type(value) is not int or value < least:
        raise ConfigError(f"{what} must be a whole number from {least} up, not {value!r}.")
    return value
