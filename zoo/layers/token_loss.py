"""Cross-entropy over a vocabulary, a part of the tokens at a time, so that no more logits exist than one part's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["IGNORED", "mean_token_loss", "token_losses", "tokens_at_once"]

IGNORED = -100  # target of a token that does not count, as in F.cross_entropy
LOGITS_AT_ONCE = 2**25  # elements; 128 MiB in float32


def tokens_at_once(vocab_size: int) -> int:
    """How many tokens' logits exist together."""
    return max(1, LOGITS_AT_ONCE // vocab_size)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target, zero where it is `IGNORED`: (N, D), (V, D), (N,) -> (N,) float32. Without gradients."""
    with torch.no_grad():
        weight = weight.to(_compute_dtype(hidden))
        parts = [
            F.cross_entropy(F.linear(h.to(weight.dtype), weight).float(), t, ignore_index=IGNORED, reduction="none")
            for h, t in zip(
                hidden.split(tokens_at_once(len(weight))), targets.split(tokens_at_once(len(weight))), strict=True
            )
        ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def mean_token_loss(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    """The mean of -log p over the targets that count, plus `z_loss` times that of (log of the sum of exp)^2.

    `hidden` (N, D) times `weight` (V, D) transposed are the logits; `targets` (N,). The second term keeps logits small
    (PaLM, arXiv 2204.02311, section 5). Zero, with zero gradients, when no target counts.
    """
    if not torch.is_grad_enabled() or not (hidden.requires_grad or weight.requires_grad):
        loss, _, _ = _pass(hidden, weight, targets, z_loss, _compute_dtype(hidden), False)
        return loss
    return _MeanTokenLoss.apply(hidden, weight, targets, z_loss, _compute_dtype(hidden))


def _pass(
    hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float, dtype: torch.dtype, gradients: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    wide = torch.promote_types(dtype, torch.float32)
    kind = hidden.device.type
    counted = targets != IGNORED
    count = counted.sum().clamp(min=1)
    loss = torch.zeros((), dtype=wide, device=hidden.device)
    to_hidden = torch.empty_like(hidden) if gradients else None
    to_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if gradients else None
    with torch.autocast(kind, enabled=False):
        cast = weight.to(dtype)
        size = tokens_at_once(len(weight))
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            h, t, c = hidden[part].to(dtype), targets[part], counted[part]
            logits = F.linear(h, cast).to(wide)
            log_sum = logits.logsumexp(-1)
            t = t.where(c, 0)
            right = logits.gather(1, t[:, None])[:, 0]
            loss += ((log_sum - right + z_loss * log_sum.square()) * c).sum() / count
            if to_hidden is None or to_weight is None:
                continue
            scale = c.to(wide) / count
            slope = logits.sub_(log_sum[:, None]).exp_().mul_(((1 + 2 * z_loss * log_sum) * scale)[:, None])
            slope.scatter_add_(1, t[:, None], -scale[:, None])
            slope = slope.to(dtype)
            to_hidden[part] = slope @ cast
            to_weight += slope.T @ h
    return loss, to_hidden, to_weight


class _MeanTokenLoss(torch.autograd.Function):
    """Gradients are made in the forward pass, while a part's logits are there."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float, dtype: torch.dtype) -> Tensor:
        loss, to_hidden, to_weight = _pass(hidden, weight, targets, z_loss, dtype, True)
        ctx.save_for_backward(to_hidden, to_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        to_hidden, to_weight = ctx.saved_tensors
        return to_hidden * slopes[0], (to_weight * slopes[0]).to(ctx.weight_dtype), None, None, None
