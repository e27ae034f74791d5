"""Stochastic depth that does not compute what it drops: a branch sees the samples alone that keep it.

Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016, arXiv 1603.09382, section 3: the saving is theirs, where
a whole batch drops a layer; timm's `DropPath` draws for each sample and multiplies what is computed by zero.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zoo.layers.folding import has_changed, has_hooks
from zoo.layers.observers import is_transformed

__all__ = ["is_per_sample", "stochastic_add", "trains_eagerly"]

WORTH = 1 / 16  # share of the samples that must drop out before copying the others is cheaper than computing all


def trains_eagerly(module: nn.Module, x: Tensor) -> bool:
    """Whether this is a training step on a CPU that nothing records: the place for forms of our own."""
    return (
        module.training
        and type(x) is Tensor  # and no proxy of a tracer, nor a fake one
        and x.device.type == "cpu"
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed())
    )


def is_per_sample(module: nn.Module) -> bool:
    """Whether what a sample becomes is known to depend on no other sample: not with batch norms, nor with modules that
    are neither torch's nor timm's nor the zoo's."""
    return not (has_changed(module) or any(isinstance(part, _BatchNorm) for part in module.modules()))


def stochastic_add(shortcut: Tensor, x: Tensor, branch: Callable[[Tensor], Tensor], drop_path: nn.Module) -> Tensor:
    """`shortcut + drop_path(branch(x))`, drawing the same random numbers; `branch` must be per sample."""
    if not (isinstance(drop_path, DropPath) and drop_path.training and drop_path.drop_prob) or has_hooks(drop_path):
        return shortcut + drop_path(branch(x))
    keep = 1.0 - float(drop_path.drop_prob)
    mask = x.new_empty(len(x)).bernoulli_(keep)
    scale = 1 / keep if keep > 0 and drop_path.scale_by_keep else 1.0
    kept = mask.nonzero().flatten()
    dropped = len(x) - len(kept)
    if dropped == 0:
        return torch.add(shortcut, branch(x), alpha=scale)
    if dropped == len(x) or dropped < WORTH * len(x):  # gradients, if zero, for every weight
        return torch.addcmul(shortcut, branch(x), (mask * scale).view(-1, *[1] * (x.ndim - 1)))
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):  # index_select would make it contiguous
        taken = x.permute(0, 2, 3, 1).index_select(0, kept).permute(0, 3, 1, 2)
        added = branch(taken).permute(0, 2, 3, 1)
        return shortcut.permute(0, 2, 3, 1).index_add(0, kept, added, alpha=scale).permute(0, 3, 1, 2)
    return shortcut.index_add(0, kept, branch(x.index_select(0, kept)), alpha=scale)
