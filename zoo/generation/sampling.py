"""Which token comes next: from logits to a choice, with the meanings and the order that transformers has."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from zoo.errors import ConfigError

__all__ = ["Sampling"]

TINY = 1e-6  # temperature, from which down logits divided by it may not be finite
NUCLEUS = 1024  # tokens among which the nucleus is looked for before all are sorted


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely token; otherwise logits are divided by it, and a token is drawn.
        top_k: draw among so many most likely tokens (and those as likely as the last of them); None or 0: all.
        top_p: draw among the most likely tokens whose probabilities together reach this (arXiv 1904.09751).
        min_p: draw among tokens at least this times as likely as the most likely one (arXiv 2407.01082).
        repetition_penalty: positive logits of tokens that the sequence holds already, prompt or not, are divided by
            this, negative ones multiplied (arXiv 1909.05858); 1 does nothing.
        seed: of the draws; None draws from torch's own generator.

    The penalty comes first, then temperature, top_k, top_p and min_p, each of what the one before it left. Raises
    ConfigError for values that cannot be.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature must be 0 (the most likely token) or more, not {self.temperature!r}.")
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 0):
            raise ConfigError(f"top_k must be a whole number of tokens, or None for all, not {self.top_k!r}.")
        if self.top_p is not None and (not _is_number(self.top_p) or not 0 < self.top_p <= 1):
            raise ConfigError(f"top_p must be above 0 and at most 1, not {self.top_p!r}.")
        if self.min_p is not None and (not _is_number(self.min_p) or not 0 <= self.min_p <= 1):
            raise ConfigError(f"min_p must be from 0 to 1, not {self.min_p!r}.")
        if not _is_number(self.repetition_penalty) or not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(f"repetition_penalty must be above 0, not {self.repetition_penalty!r}.")
        if self.seed is not None and (type(self.seed) is not int or not -(2**63) <= self.seed < 2**63):
            raise ConfigError(f"seed must be a whole number, or None, not {self.seed!r}.")

    def generator(self, device: torch.device) -> torch.Generator | None:
        """What the draws come from."""
        if self.seed is None or not self.temperature:
            return None
        return torch.Generator(device=device).manual_seed(self.seed)

    def scores(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """(B, V) logits of the next token -> those that it is chosen by, -inf where it may not be.

        `seen`, (B, V), says which tokens each sequence holds.
        """
        if seen is not None and self.repetition_penalty != 1:
            penalised = torch.where(logits < 0, logits * self.repetition_penalty, logits / self.repetition_penalty)
            logits = torch.where(seen, penalised, logits)
        if not self.temperature:
            return logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.temperature < TINY:  # quotients are finite but for those of 0, which the largest then is
            logits = logits - logits.amax(-1, keepdim=True)
        logits = logits / max(self.temperature, 1e-30)
        if self.top_k:
            least = logits.topk(min(self.top_k, logits.shape[-1])).values[..., -1:]
            logits = logits.masked_fill(logits < least, -math.inf)
        if self.top_p is not None and self.top_p < 1:
            logits = _nucleus(logits, self.top_p)
        if self.min_p:
            log_p = logits.log_softmax(-1)
            logits = logits.masked_fill(log_p < log_p.amax(-1, keepdim=True) + math.log(self.min_p), -math.inf)
        return logits

    def choose(self, scores: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, V) of `scores` -> (B,) tokens."""
        if not self.temperature:
            return scores.argmax(-1)
        # one draw where the probabilities are added up: torch.multinomial draws for every token
        wide = torch.float32 if scores.device.type == "mps" else torch.float64
        reached = scores.softmax(-1).to(wide).cumsum(-1)
        draw = torch.rand(len(reached), 1, dtype=wide, device=reached.device, generator=generator)
        chosen = torch.searchsorted(reached, draw * reached[:, -1:], right=True)[:, 0]
        return chosen.clamp(max=reached.shape[-1] - 1)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """-inf for all but the most likely tokens, each of which those before it leave short of `top_p`."""
    probabilities = logits.softmax(-1)
    size = logits.shape[-1]
    for count in (min(NUCLEUS, size), size):  # to sort all of a large vocabulary takes as long as a small model
        p, order = probabilities.topk(count)
        before = p.cumsum(-1) - p
        if count == size or bool((before[:, -1] >= top_p).all()):
            break
    removed = torch.ones_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
    return logits.masked_fill(removed, -math.inf)
