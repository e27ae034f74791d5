"""`optimize_for_inference`: the same function as the model trained, computed with less work."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from typing import TypeVar

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zoo.errors import ConfigError
from zoo.layers.folding import fold_batch_norm
from zoo.layers.init import has_meta

Model = TypeVar("Model", bound=nn.Module)


def optimize_for_inference(model: Model, *, inplace: bool = False) -> Model:
    """The fast form of a model: norms, scales and parallel branches folded into weights, layouts chosen, work shared.

    The result is in evaluation mode, has no gradients, and equals the model to rounding (1e-5 of the largest output
    in float32). It keeps the model's methods (`forward_features`, `forward_intermediates`, ...), takes every input
    size that the model takes, moves between devices and dtypes, compiles and exports. Its state dict is its own:
    weights are loaded before, and published from the model as trained.

    A part of a model brings its fast form along: `fast_form(self) -> nn.Module`. Whatever has none keeps its form, but
    for batch norms, which are folded into the convolutions before them.

    Args:
        model: of the zoo, of timm or any other, also wrapped for features.
        inplace: change `model` itself instead of a copy, which would hold the weights a second time.

    Raises ConfigError for what is no module, or has no weights yet (the meta device).
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"optimize_for_inference takes a torch.nn.Module, not {model!r}.")
    if has_meta(model):
        raise ConfigError("A model on the meta device has no weights to fold: create it on another, or load them.")
    if not inplace:
        model = copy.deepcopy(model)
    model.eval().requires_grad_(False)
    with torch.no_grad():
        fast = _replace(model)
        _fold_batch_norms(fast)
    fast.__dict__["optimized_for_inference"] = True
    return fast.eval().requires_grad_(False)  # type: ignore[return-value]


def _replace(module: nn.Module) -> nn.Module:
    """`module`, or its fast form, with every part that brings one replaced, from the outside in."""
    done: dict[nn.Module, nn.Module] = {}  # a part that is used in two places stays one

    def replace(module: nn.Module) -> nn.Module:
        if module not in done:
            done[module] = module
            if hasattr(type(module), "fast_form"):
                fast = done[module] = module.fast_form()  # type: ignore[operator]
                for hooks in ("_forward_pre_hooks", "_forward_hooks"):  # timm's feature wrapper "hook" lives on these
                    getattr(fast, hooks).update(getattr(module, hooks))
            else:
                for name, child in module.named_children():
                    module._modules[name] = replace(child)
        return done[module]

    return replace(module)


# ---------------------------------------------------------------------------------------------------------- batch norms


class _Children(fx.Tracer):
    """Follows one module's own forward; its children are black boxes."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return True


def _fold_batch_norms(model: nn.Module) -> None:
    """Fold each batch norm that one convolution alone feeds, and that feeds on nothing else."""
    uses = Counter(
        id(child) for module in model.modules() for child in module._modules.values() if child is not None
    )  # `modules` gives each once
    for module in model.modules():
        if isinstance(module, fx.GraphModule):
            _fold_along(module.graph, module, uses)
            continue
        children = [child for child in module._modules.values() if child is not None]
        if any(map(_is_conv, children)) and any(map(_is_norm, children)):
            try:
                parameters = list(inspect.signature(module.forward).parameters.values())
                defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
                graph = _Children().trace(module, concrete_args=defaults)
            except Exception:  # a forward that fx cannot follow: it stays as it is
                continue
            _fold_along(graph, module, uses)


def _is_conv(module: nn.Module | None) -> bool:
    return type(module) is nn.Conv2d


def _is_norm(module: nn.Module | None) -> bool:
    return isinstance(module, _BatchNorm) and module.track_running_stats and module.running_mean is not None


def _fold_along(graph: fx.Graph, owner: nn.Module, uses: Counter[int]) -> None:
    """Fold what `graph`, the forward of `owner`, shows to be convolution, then batch norm, and nothing between."""
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    attributes = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        names = str(before.target), str(node.target)
        conv, norm = (owner.get_submodule(name) for name in names)
        alone = all(
            calls[name] == 1 and name not in attributes and uses[id(part)] == 1 and not part._forward_hooks
            for name, part in zip(names, (conv, norm), strict=True)
        )
        if _is_conv(conv) and _is_norm(norm) and alone:
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(norm, _BatchNorm)
            owner.set_submodule(names[0], fold_batch_norm(conv, norm))
            owner.set_submodule(names[1], _behind(norm))


def _behind(norm: nn.Module) -> nn.Module:
    """What timm's batch norms do besides: their activation."""
    act = getattr(norm, "act", None)
    return act if isinstance(act, nn.Module) else nn.Identity()
