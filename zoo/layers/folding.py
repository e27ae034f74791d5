"""Folding: what a network computes with constants at inference, done once in the weights.

Each function returns a new layer and leaves its arguments as they are. Products are formed in float64 and rounded
once. All of it is exact in real arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from zoo.errors import ConfigError

KNOWN = ("torch", "timm", "zoo")  # packages whose modules compute what fast forms of them take for granted
Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def has_hooks(*modules: nn.Module, but: tuple[str, ...] = ()) -> bool:
    """Whether something watches or changes what one of `modules` computes, so that it must be called as it is; hooks of
    the packages `but`, which are known to watch only, do not count."""
    kinds = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    hooks = (hook for module in modules for kind in kinds for hook in getattr(module, kind).values())
    return any(package_of(hook) not in but for hook in hooks)


def all_modules_are_watched() -> bool:
    """Whether somebody's hook is called for every module; torch's own, as of FlopCounterMode, watch only."""
    calls = torch.nn.modules.module
    if not calls._has_any_global_hook():
        return False
    kinds = "forward", "forward_pre", "backward", "backward_pre"
    hooks = (hook for kind in kinds for hook in getattr(calls, f"_global_{kind}_hooks").values())
    return any(package_of(hook) != "torch" for hook in hooks)


def is_changed(module: nn.Module, *packages: str) -> bool:
    """Whether `module` may compute something else than its kind does in a known package, or in one of `packages`: it is
    parametrized, or has a `forward` from elsewhere, as adapters have, or of torch's quantised layers."""
    return _given_forward(module) is not None or _is_special(module, *packages)


def has_changed(module: nn.Module, *packages: str) -> bool:
    """Whether a part of `module`, or it itself, `is_changed`."""
    return any(is_changed(part, *packages) for part in module.modules())


def _is_special(module: nn.Module, *packages: str) -> bool:
    forward = getattr(type(module), "forward", None)
    known = package_of(forward) in (*KNOWN, *packages) and not str(forward.__module__).startswith("torch.ao.")
    return not known or is_parametrized(module)


def _given_forward(module: nn.Module) -> Any:
    """What `module` calls in place of its class's `forward`; None where that is it, also where it was put back."""
    given = module.__dict__.get("forward")
    is_back = getattr(given, "__func__", None) is type(module).forward and getattr(given, "__self__", None) is module
    return None if is_back else given


def has_own_forward(module: nn.Module) -> bool:
    """Whether `module` was given a `forward`, other than those of accelerate that call the class's in mixed precision
    or on another device."""
    given = _given_forward(module)
    if given is None:
        return False
    hook = module.__dict__.get("_hf_hook", given)
    by_accelerate = all(package_of(part) == "accelerate" for part in getattr(hook, "hooks", (hook,)))
    called = module.__dict__.get("_old_forward", module.__dict__.get("_original_forward"))
    return not by_accelerate or getattr(called, "__func__", None) is not type(module).forward


def check_plain(model: nn.Module, purpose: str, *, like: nn.Module | None = None) -> None:
    """Raise ConfigError where a part computes more than its weights say, and that of the model `like` does not."""
    usual = {} if like is None else dict(like.named_modules())
    # the model itself may be of a user's class, whose weights are those of ours
    is_subclass = like is not None and isinstance(model, type(like)) and not is_parametrized(model)

    def has(test: Callable[[nn.Module], bool], name: str, part: nn.Module) -> bool:
        return test(part) and not (name in usual and test(usual[name]))

    for name, part in model.named_modules():
        hooked = has(has_hooks, name, part)
        special = has(_is_special, name, part) and not (part is model and is_subclass)
        if hooked or special or has(has_own_forward, name, part):
            what = "hooks" if hooked else "a parametrization or a forward of its own"
            raise ConfigError(
                f"{purpose} holds weights alone, and {name or 'the model'} ({type(part).__name__}) has {what}: first "
                "merge adapters into the weights, and remove hooks and parametrizations."
            )


def package_of(function: object) -> str:
    """Where it was written; "" where that is not known, as of generated code."""
    return (getattr(function, "__module__", None) or "").partition(".")[0]


def batch_norm_affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """(weight, bias), each (C,) in float64, of the `x * weight + bias` that a batch norm is at inference.

    Raises ValueError for one that keeps no running statistics, which is no constant.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("A batch norm without running statistics depends on the batch and cannot be folded.")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()


def fold_batch_norm(conv: Layer, norm: _BatchNorm) -> Layer:
    """`norm(conv(x))` as one layer with a bias; for a batch norm *before* a layer see `batch_norm_affine`."""
    scale, shift = batch_norm_affine(norm)
    return fold_shift(fold_scale(conv, scale), shift)


def fold_affine(layer: Layer, weight: Tensor | None, bias: Tensor | None = None) -> Layer:
    """`layer(x * weight + bias)` as one layer; `weight` and `bias` are (in_channels,), None for 1 and 0.

    Raises ValueError for a bias before a convolution that pads with zeros: at the borders it cannot be folded.
    """
    if bias is not None and isinstance(layer, nn.Conv2d) and layer.padding not in (0, (0, 0), "valid"):
        raise ValueError("A bias before a zero-padded convolution differs at the borders and cannot be folded.")
    old = layer.weight.detach().double()
    new = old if weight is None else old * _per_input(layer, weight)
    folded = _like(layer, new, layer.bias)
    if bias is None:
        return folded
    return fold_shift(folded, (old * _per_input(layer, bias)).flatten(1).sum(1))


def fold_scale(layer: Layer, scale: Tensor) -> Layer:
    """`scale * layer(x)` as one layer; `scale` is (out_channels,) or a single number."""
    scale = scale.detach().double().flatten().expand(layer.weight.shape[0])
    weight = layer.weight.detach().double() * scale.view(-1, *(1,) * (layer.weight.ndim - 1))
    return _like(layer, weight, None if layer.bias is None else layer.bias.detach().double() * scale)


def fold_shift(layer: Layer, shift: Tensor) -> Layer:
    """`layer(x) + shift` as one layer with a bias; `shift` is (out_channels,) or a single number."""
    shift = shift.detach().double().flatten().expand(layer.weight.shape[0])
    return _like(layer, layer.weight, shift if layer.bias is None else layer.bias.detach().double() + shift)


def as_conv2d(layer: nn.Conv2d | nn.Linear) -> nn.Conv2d:
    """A linear layer over the last dimension as the 1x1 convolution over channels; a convolution as it is."""
    if isinstance(layer, nn.Conv2d):
        return layer
    conv = nn.Conv2d(layer.in_features, layer.out_features, 1, bias=layer.bias is not None, device="meta")
    conv.weight = nn.Parameter(layer.weight.detach()[:, :, None, None].clone(), requires_grad=False)
    if layer.bias is not None:
        conv.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    return conv.train(layer.training)


def _per_input(layer: nn.Conv2d | nn.Linear, values: Tensor) -> Tensor:
    """`values` (in_channels,), shaped to multiply the layer's weight."""
    values = values.detach().double().flatten()
    if isinstance(layer, nn.Linear):
        return values
    per_group = values.view(layer.groups, 1, -1).expand(-1, layer.out_channels // layer.groups, -1)
    return per_group.reshape(layer.out_channels, -1, 1, 1)


def _like(layer: Layer, weight: Tensor, bias: Tensor | None) -> Layer:
    """A layer that differs from `layer` in its weights alone. Neither has gradients."""
    old = layer.weight
    made: nn.Conv2d | nn.Linear
    if isinstance(layer, nn.Conv2d):
        made = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            layer.groups,
            bias=bias is not None,
            padding_mode=layer.padding_mode,
            device="meta",
        )
    else:
        made = nn.Linear(layer.in_features, layer.out_features, bias is not None, device="meta")
    made.weight = nn.Parameter(torch.empty_like(old).copy_(weight.detach()), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().to(old.dtype, copy=True), requires_grad=False)
    made.train(layer.training)
    return made
