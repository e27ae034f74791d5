"""Which models a test over the registry takes: the smallest of each series always, all others with the slow tests."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import zoo
from zoo.registry import get_entry

SIZE = 64  # small images keep tests over the registry quick: the last map is 2x2


FEW = ("caformer_test", "snnet_test")  # for tests that compile or trace, seconds a model


def each_vision_model(few: bool = False) -> list[Any]:
    """Parameters for `pytest.mark.parametrize("name", ...)`: slow but for the smallest of each series, or `FEW`.

    All models of a series may be large: then its family has a smaller one.
    """
    smallest: dict[str, str] = {}
    for info in zoo.search(task="vision", sort="params", max_params=8_000_000):
        smallest.setdefault(series(info.name), info.name)
    quick = set(FEW if few else (*smallest.values(), "poolformer_s12"))  # where most begin
    return [
        pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in zoo.list_models(task="vision")
    ]


def each_model(names: list[str]) -> list[Any]:
    """Parameters for all of `names`, slow but for the smallest of each series, and those that no index knows yet."""
    known = {info.name: info for info in zoo.search(sort="params")}
    smallest: dict[str, str] = {}
    for name in filter(set(names).__contains__, known):
        smallest.setdefault(series(name), name)
    quick = set(smallest.values())
    return [pytest.param(n, marks=() if n in quick or n not in known else pytest.mark.slow) for n in names]


def series(name: str) -> str:
    """What comes before a size: `ffnet` of `ffnet40s_bbx_mobile`, `poolformerv2` of `poolformerv2_s12`."""
    return re.sub(r"\d\d+[a-z]*$", "", name.partition("_")[0])


def create(name: str, **arguments: Any) -> Any:
    """The model for SIZE x SIZE images, without published weights."""
    if get_entry(name).fixed_input_size:
        arguments.setdefault("img_size", SIZE)
    return zoo.create_model(name, pretrained=False, **arguments)


def set_to_random(model: nn.Module) -> nn.Module:
    """Norms, biases and scales away from where they start, batch norms that have seen something: so folding tells."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.rand(parameter.shape, generator=generator) - 0.3)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.running_mean, module.running_var):
                    assert tensor is not None
                    tensor.uniform_(0.5, 2, generator=generator)
    return model.eval()
