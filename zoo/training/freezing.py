"""Frozen parts of a model: not trained, and at rest."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from types import MethodType

from torch import nn

from zoo.errors import ConfigError, did_you_mean

__all__ = ["freeze"]


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Freeze the modules and parameters of `model` whose names match, with all below them; returns these names.

    A pattern is a name, or holds `*` and `?`. Frozen parameters get no gradient. Frozen modules stay in evaluation mode
    when the model is trained: dropout and drop path rest, batch norms keep their statistics. Copies of the model keep
    all this. Raises ConfigError for a pattern that matches nothing, and when nothing is left to train.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    parameters = dict(model.named_parameters())
    frozen: dict[str, None] = {}
    for pattern in patterns:
        found = [name for name in (*modules, *parameters) if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            near = did_you_mean(pattern, (*modules, *parameters)) or f" There are: {', '.join(_top_names(model))}."
            raise ConfigError(f"model.freeze: nothing in {type(model).__name__} is called {pattern!r}.{near}")
        frozen |= dict.fromkeys(found)
    for name in frozen:
        if name in modules:
            modules[name].requires_grad_(False)
            for module in modules[name].modules():
                # a bound method, as copy.deepcopy binds it to the copy
                module.train = MethodType(_stay_in_evaluation, module)
            modules[name].eval()
        else:
            parameters[name].requires_grad_(False)
    if frozen and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("model.freeze leaves nothing to train: keep at least the classifier.")
    return list(frozen)


def _stay_in_evaluation(module: nn.Module, mode: bool = True) -> nn.Module:
    return type(module).train(module, False)


def _top_names(model: nn.Module) -> list[str]:
    """Children, and the members of those that are lists, as a user thinks of stages."""
    names = []
    for name, child in model.named_children():
        names += [name, *(f"{name}.{member}" for member, _ in child.named_children() if member.isdigit())]
    return names
