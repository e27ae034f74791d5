"""Which models a test over the registry takes: the smallest of each series always, all others with the slow tests."""

from __future__ import annotations

import re
from typing import Any

import pytest

import zoo
from zoo.registry import get_entry

SIZE = 64  # small images keep tests over the registry quick: the last map is 2x2


def each_vision_model(everything: bool = False) -> list[Any]:
    """Parameters for `pytest.mark.parametrize("name", ...)`.

    Without those that compute with part of their weights at a time: what holds for them, their own tests say.
    """
    smallest: dict[str, str] = {}
    for info in zoo.search(task="vision", sort="params"):
        smallest.setdefault(series(info.name), info.name)
    quick = set(smallest.values())
    return [
        pytest.param(name, marks=() if everything or name in quick else pytest.mark.slow)
        for name in zoo.list_models(task="vision")
        if not get_entry(name).selective
    ]


def series(name: str) -> str:
    """What comes before a size: `ffnet` of `ffnet40s_bbx_mobile`, `poolformerv2` of `poolformerv2_s12`."""
    return re.sub(r"\d\d+[a-z]*$", "", name.partition("_")[0])


def create(name: str, **arguments: Any) -> Any:
    """The model for SIZE x SIZE images, without published weights."""
    if get_entry(name).fixed_input_size:
        arguments.setdefault("img_size", SIZE)
    return zoo.create_model(name, pretrained=False, **arguments)
