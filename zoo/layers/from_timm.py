"""Architectures that timm has: built by timm's own code under the zoo's names, their facts read from timm's tables."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import timm.models
import torch
from torch import nn

from zoo.errors import ConfigError, did_you_mean
from zoo.layers.arguments import check_rates
from zoo.registry import Weights

__all__ = ["timm_builder", "timm_weights"]

RESULTS = "timm's results-imagenet.csv"


def timm_builder(name: str, adapt: Callable[..., None] | None = None, **fixed: Any) -> Callable[..., nn.Module]:
    """A builder of timm's model `name` with the arguments `fixed`, whatever timm's registry holds by now.

    `adapt(model, **options)` changes the model after it is built; it gets those arguments that it names.
    """
    entrypoint = getattr(timm.models, name)
    options = adapt.__kwdefaults__ or {} if adapt is not None else {}

    def build(
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        **model_args: Any,
    ) -> nn.Module:
        check_rates(drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        chosen = {key: model_args.pop(key, default) for key, default in options.items()}
        try:
            model = entrypoint(
                pretrained=False,
                num_classes=num_classes,
                in_chans=in_chans,
                global_pool=global_pool,
                drop_rate=drop_rate,
                drop_path_rate=drop_path_rate,
                **{**fixed, **model_args},
            )
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument(?:\(s\):)? \[?'(\w+)'", str(error))
            if unknown is None or unknown[1] not in model_args:
                raise
            near = did_you_mean(unknown[1], {*fixed, *options, *_arguments(entrypoint)})
            raise ConfigError(f"timm's {name} has no argument {unknown[1]!r}.{near}") from error
        if adapt is not None:
            adapt(model, **chosen)
        return model

    return build


def _arguments(entrypoint: Callable[..., nn.Module]) -> set[str]:
    """The arguments of the class that one of timm's functions builds, and what that function itself gives it."""
    with torch.device("meta"):
        kind = type(entrypoint(pretrained=False))
    module = sys.modules[kind.__module__]
    config = getattr(module, "model_cfgs", {}).get(entrypoint.__name__, {})
    return {*inspect.signature(kind).parameters, *config}


def timm_weights(name: str, top1: Mapping[str, float], source: str = RESULTS) -> tuple[Weights, ...]:
    """timm's checkpoints of `name`, in timm's order, with the accuracies (%) that `source` claims by tag."""
    configs = sys.modules[getattr(timm.models, name).__module__].default_cfgs[name].cfgs
    return tuple(
        Weights(
            tag=tag,
            hub_id=f"timm/{name}.{tag}",
            license=config.license or "unstated",
            top1=top1.get(tag),
            accuracy_source=source if tag in top1 else None,
            num_classes=config.num_classes,
            input_size=config.input_size,
            crop_pct=config.crop_pct,
            interpolation=config.interpolation,
            mean=config.mean,
            std=config.std,
            test_input_size=config.test_input_size,
            test_crop_pct=config.test_crop_pct,
        )
        for tag, config in configs.items()
        if config.hf_hub_id
    )
