"""Cached decoding: a prompt is read once, and each new token costs one step of the model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ConfigError
from zoo.generation.sampling import Sampling

__all__ = ["Decoding"]

COMPILED_LENGTHS = 256  # memory of compiled steps is a multiple of so many tokens


class Decoding:
    """Sequences that a model continues together, a token at a time.

    Prompts of different lengths are padded on the left; the padding has no position and nothing sees it, so that a
    sequence continues in a batch as it does alone. Memory for keys and values is allocated once, for the whole length.

    Args:
        model: a decoder, plain, fast or quantised.
        prompts: tokens of each sequence, one at least.
        max_new_tokens: that memory is made for.
        sampling: how tokens are chosen.
        eos_ids: tokens that end a sequence.
        compile: run each step through `torch.compile`, on shapes that stay the same.

    Raises ConfigError for prompts that are empty, hold tokens outside the vocabulary, or do not fit the context.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        eos_ids: Collection[int] = (),
        compile: bool = False,
    ) -> None:
        config = model.config
        check_prompts(prompts, config.vocab_size)
        longest = max(map(len, prompts))
        room = config.context_length - longest
        if room < max_new_tokens:
            raise ConfigError(
                f"A prompt of {longest} tokens leaves room for {max(room, 0)} new ones in the model's context, "
                f"{config.context_length}: "
                + (f"{max_new_tokens} were asked for, ask for {room} at most." if room > 0 else "give it less text.")
            )
        self.model, self.max_new_tokens = model, max_new_tokens
        self.sampling = sampling or Sampling()
        self.eos_ids = frozenset(eos_ids)
        self.is_finished = [False] * len(prompts)
        self.count = 0  # tokens made of each sequence
        device = next(model.parameters(), torch.empty(0)).device
        self._generator = self.sampling.generator(device)
        lengths = [len(prompt) for prompt in prompts]
        padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        self._tokens = torch.tensor(padded, device=device)
        self._positions = None
        if min(lengths) < longest:
            places = torch.arange(longest, device=device) - torch.tensor(
                [[longest - n] for n in lengths], device=device
            )
            self._positions = places.clamp(min=-1)
        self._seen: Tensor | None = None
        if self.sampling.repetition_penalty != 1:
            self._seen = torch.zeros(len(prompts), config.vocab_size, dtype=torch.bool, device=device)
            for row, prompt in enumerate(prompts):
                self._seen[row, torch.tensor(prompt, device=device)] = True
        length = longest + max_new_tokens - 1  # the last new token is never read
        if compile:  # requests of about the same length share a program
            length = min(-(-length // COMPILED_LENGTHS) * COMPILED_LENGTHS, config.context_length)
        self._cache = model.make_cache(len(prompts), length, static_shapes=compile)
        self._compiled = torch.compile(model, dynamic=False) if compile else None

    @property
    def is_over(self) -> bool:
        return self.count == self.max_new_tokens or all(self.is_finished)

    def finish(self, row: int) -> None:
        """Want no more tokens of a sequence."""
        self.is_finished[row] = True

    @torch.inference_mode()
    def step(self) -> list[int | None]:
        """The next token of each sequence, None for those that have ended; a token of `eos_ids` ends one."""
        if self.count == 0:
            logits = self.model(self._tokens, cache=self._cache, positions=self._positions, logits_to_keep=1)[:, -1]
            if not bool(torch.isfinite(logits.amax(-1)).all()):
                kind = str(logits.dtype).removeprefix("torch.")
                raise ConfigError(
                    f"The model's logits are not numbers in {kind}: are its weights damaged, or too large for this "
                    "precision? Try bfloat16 or float32."
                )
        elif self._compiled is None:
            logits = self.model(self._tokens, cache=self._cache)[:, -1]
        else:
            logits = self._compiled(self._tokens, cache=self._cache)[:, -1]
            self._cache.length += 1
        chosen = self.sampling.choose(self.sampling.scores(logits, self._seen), self._generator)
        if self._seen is not None:
            self._seen.scatter_(1, chosen[:, None], True)
        self._tokens = chosen[:, None]
        self.count += 1
        found: list[int | None] = []
        for row, token in enumerate(chosen.tolist()):
            found.append(None if self.is_finished[row] else token)
            if token in self.eos_ids:
                self.is_finished[row] = True
        return found


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raise ConfigError for no prompts, empty ones, and tokens outside the vocabulary."""
    if not prompts:
        raise ConfigError("There is no prompt: give one at least.")
    for row, prompt in enumerate(prompts):
        which = "The prompt" if len(prompts) == 1 else f"Prompt {row}"
        if not prompt:
            raise ConfigError(f"{which} is empty: give it a token at least, such as the one that begins texts.")
        wrong = next((token for token in prompt if type(token) is not int or not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise ConfigError(
                f"{which} holds {wrong!r}, and the model's tokens are 0 to {vocab_size - 1}: is it another model's "
                "tokenizer?"
            )
