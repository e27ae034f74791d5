"""MLPs in training on a CPU, a part of the rows at a time.

The hidden map is the largest that a block makes. Whole, it is written to memory and read back for the activation, and
again for the second layer, and so are its gradients; above 32 MiB, the C library moreover asks the system for new pages
each time, which can cost more than the products do. Parts of a few MiB stay in a cache, or near it. The backward pass
activates again what it needs, so that one hidden map is kept instead of two. `benchmarks/train_step.py` says what that
brings.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers.folding import all_modules_are_watched, has_hooks, is_changed
from zoo.layers.observers import is_batched, is_transformed
from zoo.layers.packed import is_gelu
from zoo.layers.products import AVAILABLE, multiply, multiply_long, rows_of

__all__ = ["training_mlp"]

HIDDEN = 2**20  # values of the hidden map that are worked on together, at most, where layers are narrow: 4 MiB
SMALLEST = 2**17  # of the whole: below, there is nothing to win
StarReLU = tuple[Tensor, Tensor]  # its scale and shift, (1,) each


def training_mlp(x: Tensor, mlp: Any, star: StarReLU | None = None, scale: Tensor | None = None) -> Tensor | None:
    """`scale * mlp(x)` for an eager training step on a CPU, equal up to rounding.

    Args:
        x: a map (B, C, H, W) for an MLP of 1x1 convolutions, (..., C) for one of linear layers.
        mlp: computes `fc1`, `act`, `drop1`, `fc2` and `drop2`, and nothing else, as timm's `Mlp` without a norm.
        star: scale and bias of `mlp.act` where that is a StarReLU.
        scale: (C,), of the branch.

    Returns None where the layers must be called: dropout, other activations, layers that have hooks or are of other
    types, other devices and dtypes, autocast, small maps, and what is recorded, watched or transformed.
    """
    # first what a tracer must not see asked: sizes would become conditions of its program
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed() or all_modules_are_watched():
        return None
    if type(x) is not Tensor or not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    if (scale is not None and scale.ndim != 1) or (star and not star[0].numel() == star[1].numel() == 1):
        return None
    if not _is_plain(mlp) or not (star or is_gelu(mlp.act)) or not _suits(x, mlp.fc1, mlp.fc2, scale, *(star or ())):
        return None
    fc1, fc2 = mlp.fc1, mlp.fc2
    weight1, weight2, bias2 = fc1.weight.flatten(1), fc2.weight.flatten(1), fc2.bias
    pixels = x.permute(0, 2, 3, 1) if isinstance(fc1, nn.Conv2d) else x
    rows = rows_of(pixels)
    in_weights = scale is not None and len(rows) > len(weight1)  # where they are the smaller ones
    if scale is not None and in_weights:
        weight2, bias2 = weight2 * scale[:, None], None if bias2 is None else bias2 * scale
    y = _Mlp.apply(rows, weight1, fc1.bias, *(star or (None, None)), weight2, bias2).unflatten(0, pixels.shape[:-1])
    if scale is not None and not in_weights:
        y = y * scale
    return y.permute(0, 3, 1, 2) if isinstance(fc1, nn.Conv2d) else y


def _is_plain(mlp: Any) -> bool:
    """Whether nothing but the two layers and the activation takes part, and nobody watches them."""
    drops, norm = (mlp.drop1, mlp.drop2), getattr(mlp, "norm", None)  # timm's has one
    parts = (mlp, mlp.fc1, mlp.act, mlp.fc2, *drops, *(() if norm is None else (norm,)))
    return (
        all(
            type(drop) is nn.Identity or (type(drop) is nn.Dropout and not (drop.training and drop.p)) for drop in drops
        )
        and (norm is None or type(norm) is nn.Identity)
        and not has_hooks(*parts)
        and not any(is_changed(part) for part in parts)
    )


def _suits(x: Tensor, fc1: nn.Module, fc2: nn.Module, *others: Tensor | None) -> bool:
    if type(fc1) is nn.Linear and type(fc2) is nn.Linear:
        fits = x.ndim > 1 and x.shape[-1] == fc1.in_features and fc1.out_features == fc2.in_features
    elif type(fc1) is nn.Conv2d and type(fc2) is nn.Conv2d:
        fits = x.ndim == 4 and x.shape[1] == fc1.in_channels and fc1.out_channels == fc2.in_channels
        fits = fits and _is_pointwise(fc1) and _is_pointwise(fc2)
    else:
        return False
    weights = fc1.weight, fc2.weight
    tensors = [t for t in (x, *weights, fc1.bias, fc2.bias, *others) if t is not None]
    return (
        AVAILABLE
        and fits
        and all(type(weight) is nn.Parameter for weight in weights)
        and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
        and x.numel() // weights[0].shape[1] * weights[0].shape[0] >= SMALLEST
    )


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((1, 1), (1, 1), (0, 0), 1)


def _rows_at_once(rows: int, width: int) -> int:
    """Of parts of one size. Wide layers take more, so that weights, and sums of their gradients, are read less often;
    up to 16 MiB, which the C library keeps."""
    values = min(max(HIDDEN, 2 * width**2), 4 * HIDDEN)
    parts = -(-rows // max(1, values // width))
    return -(-rows // parts)


def _activate(hidden: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    return F.gelu(hidden) if scale is None or shift is None else F.relu(hidden).square_().mul_(scale).add_(shift)


class _Mlp(torch.autograd.Function):
    """(R, C) -> (R, C'): linear layer, GELU (or StarReLU, if it has a scale and a shift), linear layer."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        weight2: Tensor,
        bias2: Tensor | None,
    ) -> Tensor:
        ctx.rows = _rows_at_once(len(x), len(weight1))
        hiddens, y = [], x.new_empty(len(x), len(weight2))
        for part, part_y in zip(x.split(ctx.rows), y.split(ctx.rows), strict=True):
            hiddens.append(multiply(part, weight1, bias1))
            part_y.copy_(multiply(_activate(hiddens[-1], scale, shift), weight2, bias2))
        ctx.save_for_backward(x, weight1, scale, shift, weight2, *hiddens)
        ctx.bias1 = bias1  # not saved: its value is in the hidden map, and it may change
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight1, scale, shift, weight2, *hiddens = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(grad):  # to be differentiated again, or many gradients at once
            inputs = x, weight1, ctx.bias1, scale, shift, weight2
            return _differentiable(ctx.needs_input_grad, inputs, torch.cat(hiddens), grad)
        of_x, of_weight1, of_bias1, of_scale, of_shift, of_weight2, of_bias2 = ctx.needs_input_grad
        to_x = torch.empty_like(x) if of_x else None
        sums: dict[str, Tensor] = {}

        def add(name: str, part: Tensor) -> None:
            sums[name] = sums[name].add_(part) if name in sums else part

        grad, rows = grad.contiguous(), ctx.rows
        for i, hidden in enumerate(hiddens):
            part, grads = x[i * rows : (i + 1) * rows], grad[i * rows : (i + 1) * rows]
            if of_weight2:
                add("weight2", multiply_long(grads, _activate(hidden, scale, shift)))
            if not (of_x or of_weight1 or of_bias1 or of_scale or of_shift):
                continue
            to_hidden = multiply(grads, weight2.t())
            if scale is None:
                torch.ops.aten.gelu_backward.grad_input(to_hidden, hidden, grad_input=to_hidden)
            else:
                if of_shift:
                    add("shift", to_hidden.sum().reshape(1))
                positive = F.relu(hidden)
                to_hidden.mul_(positive)  # zero where the ReLU is, so that its derivative is in it already
                if of_scale:
                    add("scale", positive.mul_(to_hidden).sum().reshape(1))  # in pairs, which BLAS's dot does not sum
                to_hidden.mul_(2 * scale)
            if of_weight1:
                add("weight1", multiply_long(to_hidden, part))
            if of_bias1:
                add("bias1", to_hidden.sum(dim=0))
            if to_x is not None:
                to_x[i * rows : (i + 1) * rows] = multiply(to_hidden, weight1.t())
        if of_bias2:
            sums["bias2"] = grad.sum(dim=0)
        of_weights = (sums.get(name) for name in ("weight1", "bias1", "scale", "shift", "weight2", "bias2"))
        return to_x, *of_weights


def _differentiable(
    needed: tuple[bool, ...], inputs: tuple[Tensor | None, ...], hidden: Tensor, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """What `_Mlp.backward` returns, by PyTorch's own operators."""
    with torch.enable_grad():
        # views: what these were made of is no concern of this layer
        of_its_own: list[Any] = [None if t is None else t.view_as(t) for t in inputs]
        x, weight1, bias1, scale, shift, weight2 = of_its_own
        bias2 = weight2.new_zeros(len(weight2)).requires_grad_()  # no gradient depends on it
        recomputed = F.linear(x, weight1, bias1)
        hidden = recomputed + (hidden - recomputed).detach()  # the value that it had
        activated = F.gelu(hidden) if scale is None else scale * F.relu(hidden).square() + shift
        y = F.linear(activated, weight2, bias2)
    everything = (x, weight1, bias1, scale, shift, weight2, bias2)
    wanted = [t for t, is_needed in zip(everything, needed, strict=True) if is_needed and t is not None]
    again = torch.is_grad_enabled()
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=again))
    return tuple(next(found) if is_needed else None for is_needed in needed)
