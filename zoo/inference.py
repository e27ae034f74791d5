"""`optimize_for_inference`: the same function as the model trained, computed with less work."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeGuard, TypeVar

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zoo.errors import ConfigError
from zoo.layers.convnext import timms_fast_stage
from zoo.layers.fast_form import is_as_made
from zoo.layers.folding import fold_batch_norm, has_changed, has_hooks, is_changed, package_of
from zoo.layers.init import has_meta
from zoo.layers.packed import PackedConv2d, PackedLinear, activation_of
from zoo.layers.wrappers import check_has_weights, copied

Model = TypeVar("Model", bound=nn.Module)
METHODS = ("forward", "forward_features", "forward_head", "forward_intermediates")  # that users of timm's models call
HOOKS = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
)
PACKED_CONV2D, PACKED_LINEAR = 2**15, 2**17  # elements of a weight from which on packing saves more than calling costs


def optimize_for_inference(model: Model, *, inplace: bool = False) -> Model:
    """The fast form of a model: norms, scales and parallel branches folded into weights, layouts chosen, work shared.

    The result is in evaluation mode, has no gradients, and equals the model to rounding (1e-5 of the largest output
    in float32). It keeps the model's methods (`forward_features`, `forward_intermediates`, ...), takes every input
    size that the model takes, moves between devices and dtypes, compiles and exports. Its state dict is its own:
    weights are loaded before, and published from the model as trained.

    A part of a model brings its fast form along (`zoo.layers.fast_form`); stages of timm's ConvNeXt have one here.
    Whatever has none keeps its form, and so does what holds hooks, parametrizations, modules that were put in others'
    places, or modules (adapters, for one) whose `forward` is neither torch's nor timm's nor the zoo's; but batch norms
    are folded into the convolutions before them, and convolutions work in channels_last. Large convolutions and linear
    layers run on a CPU with their weights as oneDNN wants them (kept beside the weights, from the first call on), and
    with the ReLU or GELU behind them. That is exact for `forward` and timm's methods; where a model of your own has
    others, or calls a layer of a part past that part's `forward`, these may find a batch norm or an activation joined
    to the layer before it. Parts write over their maps: a hook that is put on the fast form copies what it keeps.
    Weights that are changed in place behind PyTorch's back, through `.data` or NumPy, are not noticed: optimise the
    model again. Those of a model that was made in inference mode, and is changed `inplace`, have no count of their
    changes, and are brought into oneDNN's order at every call.

    Args:
        model: of the zoo, of timm or any other, also wrapped for features.
        inplace: change `model` itself instead of a copy, which would hold the weights a second time.

    Raises ConfigError for what is no module or a scripted one, has no weights yet (the meta device), or makes them anew
    for each call (torch.nn.utils.prune).
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"optimize_for_inference takes a torch.nn.Module, not {model!r}.")
    if any(isinstance(part, torch.jit.ScriptModule) for part in model.modules()):
        raise ConfigError(
            "optimize_for_inference takes a module before torch.jit.script or trace, not what these made."
        )
    if has_meta(model):
        raise ConfigError("A model on the meta device has no weights to fold: create it on another, or load them.")
    check_has_weights(model)
    if not inplace:
        with torch.inference_mode(False):  # in which weights of a copy would not count their changes
            model = copied(model)
    model.eval().requires_grad_(False)
    with torch.no_grad(), torch.inference_mode(any(p.is_inference() for p in model.parameters())):
        fast = _replace_modules(model, _fast_form)
        _fold_batch_norms(fast)
        fast = _pack(fast)
    fast.__dict__["optimized_for_inference"] = True
    return fast.eval().requires_grad_(False)  # type: ignore[return-value]


def _replace_modules(model: nn.Module, change: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """`model`, with each part for which `change` gives another replaced by that, from the outside in."""
    done: dict[nn.Module, nn.Module] = {}  # a part that is used in two places stays one

    def replace(module: nn.Module) -> nn.Module:
        if module not in done:
            done[module] = module
            changed = change(module)
            if changed is not None:
                done[module] = changed
                for hooks in HOOKS:  # timm's feature wrapper "hook" lives on these
                    getattr(changed, hooks).update(getattr(module, hooks))
            else:
                for name, child in module._modules.items():
                    module._modules[name] = None if child is None else replace(child)
        return done[module]

    return replace(model)


def _fast_form(module: nn.Module) -> nn.Module | None:
    made_by = package_of(getattr(type(module), "fast_form", None)) or "zoo"  # which knows its own modules
    if has_changed(module, made_by) or has_hooks(*(part for part in module.modules() if part is not module)):
        return None
    if not is_as_made(module) or any(_is_of_batch(part) for part in module.modules()):
        return None
    if hasattr(type(module), "fast_form"):
        return module.fast_form()  # type: ignore[operator]
    return timms_fast_stage(module)


# --------------------------------------------------------------------------------- convolutions and what is behind them


class _Children(fx.Tracer):
    """Follows one of a module's own methods; its children are black boxes."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.traced_func_name = method

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return True


def _fold_batch_norms(model: nn.Module) -> None:
    """Fold each batch norm that one convolution alone feeds, and that feeds on nothing else."""
    _join(model, _is_conv, _is_norm, lambda conv, norm: (fold_batch_norm(conv, norm), _behind(norm)))


def _pack(model: nn.Module) -> nn.Module:
    """Large layers with packed weights and with the activation that is all they feed, small ones in channels_last."""
    _join(model, _is_large_conv, _activation, lambda conv, act: (PackedConv2d(conv, _activation(act)), nn.Identity()))
    _join(model, _is_large_linear, _activation, lambda fc, act: (PackedLinear(fc, _activation(act)), nn.Identity()))
    return _replace_modules(model, _packed_form)


def _packed_form(module: nn.Module) -> nn.Module | None:
    if _is_large_conv(module):
        return PackedConv2d(module)
    if _is_conv(module):
        # copied even where edges of 1 leave the layout open: by the strides that this gives PyTorch keeps channels_last
        # for a single image, too, of which compiled code does not say it
        module.weight.data = torch.empty_like(module.weight, memory_format=torch.channels_last).copy_(module.weight)
    return PackedLinear(module) if _is_large_linear(module) else None


def _is_large_conv(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    return _is_conv(module) and module.weight.numel() >= PACKED_CONV2D


def _is_large_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    if type(module) is not nn.Linear or is_changed(module) or "weight" not in module._parameters:
        return False
    return module.weight.numel() >= PACKED_LINEAR


def _activation(module: nn.Module) -> Any:
    """What `module` is called where it can be joined to a layer."""
    return None if is_changed(module) else activation_of(module)


def _join(
    model: nn.Module,
    is_first: Callable[[nn.Module], bool],
    is_second: Callable[[nn.Module], Any],
    join: Callable[[Any, Any], tuple[nn.Module, nn.Module]],
) -> None:
    """Put what `join` makes of them in the place of each first module and of the second that alone it feeds."""
    uses = Counter(
        id(child) for module in model.modules() for child in module._modules.values() if child is not None
    )  # `modules` gives each once
    for module in model.modules():
        children = [child for child in module._modules.values() if child is not None]
        if not (isinstance(module, fx.GraphModule) or (any(map(is_first, children)) and any(map(is_second, children)))):
            continue
        methods = [(_called(graph), _pairs(graph, module, uses, is_first, is_second)) for graph in _graphs(module)]
        for pair in methods[0][1] if methods else ():
            # a method that calls one of them alone, or hands out what lies between, sees a difference
            if all(pair in pairs or called.isdisjoint(pair) for called, pairs in methods):
                for place, made in zip(pair, join(*map(module.get_submodule, pair)), strict=True):
                    module.set_submodule(place, made)


def _graphs(module: nn.Module) -> list[fx.Graph]:
    """What a module's forward and timm's other methods do, as called without options and with each of those that are
    on or off the other way, of what fx can follow; none where forward is not."""
    if isinstance(module, fx.GraphModule):
        return [module.graph]
    graphs: list[fx.Graph] = []
    for name in METHODS:
        method = getattr(type(module), name, None)
        if name in vars(module):  # exchanged in this very module: nothing is known of the others either
            return []
        if method is None:
            continue
        parameters = list(inspect.signature(method).parameters.values())
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        switched = [defaults | {name: not default} for name, default in defaults.items() if isinstance(default, bool)]
        for arguments in (defaults, *switched):
            try:
                graphs.append(_Children(name).trace(module, concrete_args=arguments))
            except Exception:  # fx cannot follow it
                if not graphs:
                    return graphs
    return graphs


def _called(graph: fx.Graph) -> set[str]:
    """The names of the modules that a method calls."""
    return {str(node.target) for node in graph.nodes if node.op == "call_module"}


def _is_conv(module: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    return type(module) is nn.Conv2d and not is_changed(module) and "weight" in module._parameters  # or it is computed


def _is_of_batch(module: nn.Module) -> bool:
    """Whether a batch norm keeps no statistics, so that it takes those of every batch."""
    return isinstance(module, _BatchNorm) and module.running_mean is None


def _is_norm(module: nn.Module | None) -> bool:
    if not isinstance(module, _BatchNorm) or is_changed(module):
        return False
    if module._modules:
        from timm.layers import BatchNormAct2d, SyncBatchNormAct  # language models start without timm

        if not isinstance(module, BatchNormAct2d | SyncBatchNormAct) or not _does_nothing(module._modules.get("drop")):
            return False
    return module.track_running_stats and module.running_mean is not None


def _pairs(
    graph: fx.Graph,
    owner: nn.Module,
    uses: Counter[int],
    is_first: Callable[[nn.Module], bool],
    is_second: Callable[[nn.Module], Any],
) -> list[tuple[str, str]]:
    """What `graph`, a method of `owner`, shows to follow one the other, with nothing between that does a thing.

    Modules that are used elsewhere, too, or have hooks, are left alone.
    """
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    attributes = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}

    def called(node: Any) -> nn.Module | None:
        return owner.get_submodule(str(node.target)) if isinstance(node, fx.Node) and node.op == "call_module" else None

    def is_alone(node: fx.Node, part: nn.Module) -> bool:
        name = str(node.target)
        return calls[name] == 1 and name not in attributes and uses[id(part)] == 1 and not has_hooks(part)

    pairs = []
    for node in graph.nodes:
        second = called(node)
        if second is None or not is_second(second) or not node.args:
            continue
        before = node.args[0]
        while _does_nothing(called(before)) and len(before.users) == 1 and before.args:
            before = before.args[0]
        first = called(before)
        if first is None or not is_first(first) or len(before.users) != 1:
            continue
        if is_alone(before, first) and is_alone(node, second):
            pairs.append((str(before.target), str(node.target)))
    return pairs


def _does_nothing(module: nn.Module | None) -> bool:
    return type(module) is nn.Identity and not (has_hooks(module) or is_changed(module))


def _behind(norm: nn.Module) -> nn.Module:
    """What timm's batch norms do besides: their activation."""
    act = getattr(norm, "act", None)
    return act if isinstance(act, nn.Module) else nn.Identity()
