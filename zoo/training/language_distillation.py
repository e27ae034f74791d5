"""Learning a teacher's probabilities of the next token, a part of the tokens at a time.

The logits of student and teacher together are what would not fit: both are made from features for some tokens, turned
into the loss of these, and made again for its gradient.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.errors import CheckpointError, ConfigError, MissingDependencyError, first_line
from zoo.layers.token_loss import IGNORED, tokens_at_once
from zoo.training.language_config import LanguageDistillConfig

__all__ = ["LanguageTeacher", "Student", "distillation_loss"]

TRANSFORMERS = "transformers/"


def distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    alpha: float,
    tau: float = 1.0,
    top_k: int | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """`(1 - alpha) * cross-entropy + alpha * tau**2 * KL(teacher || student)`, mean over the targets that count.

    `hidden` (N, D) times `weight` (V, D) transposed are the student's logits, those of the teacher likewise with its
    own width; `targets` (N,). The probabilities are softmax(logits / tau); with `top_k` the teacher's are those of its
    so many best tokens, scaled to a sum of 1, and the student's are of the whole vocabulary still (Hinton, Vinyals,
    Dean, arXiv 1503.02531, section 2). `z_loss` as in `mean_token_loss`. Zero where no target counts.
    """
    count = (targets != IGNORED).sum().clamp(min=1)
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    def part(h: Tensor, w: Tensor, t: Tensor, teacher_h: Tensor) -> Tensor:
        with torch.autocast(kind, enabled=False):
            logits = _logits(h, w, dtype)
            with torch.no_grad():
                taught = _logits(teacher_h, teacher_weight, None)
                columns = None
                if top_k is not None and top_k < taught.shape[-1]:
                    taught, columns = taught.topk(top_k, -1)
                log_p = (taught / tau).log_softmax(-1)
            log_q = (logits / tau).log_softmax(-1)
            if columns is not None:
                log_q = log_q.gather(-1, columns)
            divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
            log_sum = logits.logsumexp(-1)
            right = logits.gather(1, t.clamp(min=0)[:, None])[:, 0]
            losses = (1 - alpha) * (log_sum - right) + alpha * tau**2 * divergence + z_loss * log_sum.square()
            return (losses * (t != IGNORED)).sum()

    size = tokens_at_once(len(weight))
    parts = zip(hidden.split(size), targets.split(size), teacher_hidden.split(size), strict=True)
    total = torch.stack([_again(part, h, weight, t, teacher_h) for h, t, teacher_h in parts]).sum()
    return total / count


def _again(part: Any, *args: Tensor) -> Tensor:
    return checkpoint(part, *args, use_reentrant=False, preserve_rng_state=False)


def _logits(hidden: Tensor, weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    dtype = dtype or weight.dtype
    logits = hidden.to(dtype) @ weight.to(dtype).t()  # not F.linear: `FastProducts` makes it once, not again
    return logits.to(torch.promote_types(dtype, torch.float32))


class LanguageTeacher:
    """A trained language model, asked what comes next. Raises ConfigError for one with other tokens than `vocab_size`.

    Raises what `zoo.create_model` raises, CheckpointError and MissingDependencyError.
    """

    def __init__(self, config: LanguageDistillConfig, vocab_size: int, device: torch.device) -> None:
        assert config.teacher is not None
        dtype = getattr(torch, config.dtype)
        self.theirs = config.teacher.startswith(TRANSFORMERS)
        if self.theirs:
            model = _from_transformers(config.teacher.removeprefix(TRANSFORMERS), dtype)
            self.body = model.base_model
        else:
            from zoo.factory import create_model
            from zoo.loading import of_run

            model = create_model(of_run(config.teacher, "local-dir:"), pretrained=True, dtype=dtype)
            if not hasattr(model, "head_weight"):
                raise ConfigError(f"distill.teacher: {config.teacher} is no language model.")
            self.body = model
        model.eval().requires_grad_(False).to(device)
        self.model = model
        self.weight = model.get_output_embeddings().weight if self.theirs else model.head_weight
        if len(self.weight) != vocab_size:
            raise ConfigError(
                f"distill.teacher: {config.teacher} has {len(self.weight):,} tokens and the student {vocab_size:,}; a "
                "teacher must know the student's tokens. Give the student the teacher's tokenizer and "
                "model.args.vocab_size."
            )

    @torch.no_grad()
    def features(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        """(B, S) -> (B, S, D), which times `weight` transposed are logits."""
        if not self.theirs:
            return self.body.forward_features(tokens, positions=positions)
        if positions is not None:
            raise ConfigError("distill.teacher: a transformers model does not go with data.document_masks.")
        return self.body(tokens, use_cache=False).last_hidden_state


def _from_transformers(name: str, dtype: torch.dtype) -> Any:
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise MissingDependencyError(
            f'distill.teacher {TRANSFORMERS}{name} needs transformers: pip install "backbone-zoo[export]".'
        ) from error
    try:
        return AutoModelForCausalLM.from_pretrained(
            str(Path(name).expanduser()) if Path(name).exists() else name, dtype=dtype
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"distill.teacher {TRANSFORMERS}{name} cannot be loaded: {first_line(error)}") from None


class Student(nn.Module):
    """A language model whose forward pass is its loss under a teacher: one call, so that processes can share it."""

    def __init__(self, model: Any, config: LanguageDistillConfig, z_loss: float) -> None:
        super().__init__()
        self.model = model
        self.options = {"alpha": config.alpha, "tau": config.tau, "top_k": config.top_k, "z_loss": z_loss}

    def forward(
        self, tokens: Tensor, targets: Tensor, positions: Tensor | None, taught: Tensor, teacher_weight: Tensor
    ) -> Tensor:
        """(B, S) tokens, targets and positions, (B, S, D) features of the teacher, its (V, D) head -> the loss."""
        hidden = self.model.forward_features(tokens, positions=positions)
        flat = hidden.flatten(0, 1), self.model.head_weight, targets.flatten(), taught.flatten(0, 1), teacher_weight
        return distillation_loss(*flat, **self.options)  # type: ignore[arg-type]
