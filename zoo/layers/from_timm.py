"""Architectures that timm has: built by timm's own code under the zoo's names, their facts read from timm's tables."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import timm.models
from torch import nn

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
        chosen = {key: model_args.pop(key, default) for key, default in options.items()}
        model = entrypoint(
            pretrained=False,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            **{**fixed, **model_args},
        )
        if adapt is not None:
            adapt(model, **chosen)
        return model

    return build


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
        )
        for tag, config in configs.items()
        if config.hf_hub_id
    )
