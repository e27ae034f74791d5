"""What a decoder remembers of the tokens before: keys and values, allocated once and written in place."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from zoo.errors import ConfigError

__all__ = ["KVCache", "LayerCache", "LayerShape"]

LayerShape = tuple[tuple[int, int], ...]  # (heads, width) of each tensor that a layer remembers


class LayerCache:
    """What one executed layer remembers: tensors of (B, heads, length, width).

    A layer that sees a window alone keeps a ring of that many tokens: token i lies in place i % window. Keys are kept
    as they are compared, after their rotation, so their order does not matter.
    """

    def __init__(self, shape: LayerShape, batch_size: int, length: int, is_ring: bool, like: Tensor) -> None:
        self.length, self.is_ring = length, is_ring
        self.tensors = tuple(like.new_zeros(batch_size, heads, length, width) for heads, width in shape)

    def update(self, new: tuple[Tensor, ...], cache: KVCache) -> tuple[Tensor, ...]:
        """Remember `new`, (B, heads, S, width) each; all that the new tokens may see, themselves among it.

        No gradients flow through it: else every token would keep the graphs of all before it.
        """
        new = tuple(value.detach() for value in new)
        tokens, start = new[0].shape[2], cache.length
        if tokens == 1 and cache.index is not None:
            place = cache.index % self.length if self.is_ring else cache.index
            for tensor, value in zip(self.tensors, new, strict=True):
                tensor.index_copy_(2, place, value.to(tensor.dtype))
            return self.tensors
        if not self.is_ring:
            for tensor, value in zip(self.tensors, new, strict=True):
                tensor[:, :, start : start + tokens] = value
            return tuple(tensor[:, :, : start + tokens] for tensor in self.tensors)
        if tokens == 1:
            for tensor, value in zip(self.tensors, new, strict=True):
                tensor[:, :, start % self.length] = value[:, :, 0]
            return tuple(tensor[:, :, : start + 1] for tensor in self.tensors)
        seen = new
        if start:
            old = cache.ring_places(self.length)
            seen = tuple(
                torch.cat((tensor[:, :, old], value), 2) for tensor, value in zip(self.tensors, new, strict=True)
            )
        kept = min(tokens, self.length)
        places = torch.arange(start + tokens - kept, start + tokens, device=new[0].device) % self.length
        for tensor, value in zip(self.tensors, new, strict=True):
            tensor[:, :, places] = value[:, :, tokens - kept :].to(tensor.dtype)
        return seen

    def select(self, rows: Tensor) -> LayerCache:
        chosen = copy.copy(self)
        chosen.tensors = tuple(tensor[rows] for tensor in self.tensors)
        return chosen


def _is_recorded() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


class KVCache:
    """The memory of a decoder for `batch_size` sequences of up to `max_length` tokens. `model.make_cache` makes one.

    `length` tokens of each sequence are remembered. `positions`, (B, max_length), says which place in its sequence
    each of them has, and -1 for padding, where sequences are padded; else it is None, and they lie in order.
    With `static_shapes`, single tokens are written at `index`, a tensor, and attention runs over all of the memory:
    more work, but the same shapes at each step, which is what compilers want. A step compiled by `torch.compile` leaves
    `length`, whose every value would be a program of its own, to its caller: `cache.length += 1`.
    """

    def __init__(
        self,
        shapes: list[tuple[LayerShape, int | None]],
        batch_size: int,
        max_length: int,
        like: Tensor,
        static_shapes: bool = False,
    ) -> None:
        self.shapes, self.batch_size, self.max_length = shapes, batch_size, max_length
        self.length = 0
        self.layers = [
            LayerCache(shape, batch_size, min(window or max_length, max_length), window is not None, like)
            for shape, window in shapes
        ]
        self.positions: Tensor | None = None
        self.index: Tensor | None = None
        self.device = like.device
        if static_shapes:
            self.index = torch.zeros(1, dtype=torch.long, device=like.device)
            self._keep_positions()

    def _keep_positions(self) -> Tensor:
        if self.positions is None:
            self.positions = torch.full((self.batch_size, self.max_length), -1, device=self.device)
            self.positions[:, : self.length] = torch.arange(self.length, device=self.device)
        return self.positions

    def begin(self, batch_size: int, tokens: int, positions: Tensor | None) -> None:
        """Make ready for `tokens` more of each sequence, (B, tokens) `positions` where they do not simply follow.

        Raises ConfigError for another batch, for more tokens than there is room for, and for tokens that would see
        others whose place in a ring padding has taken.
        """
        if batch_size != self.batch_size:
            raise ConfigError(f"The cache was made for a batch of {self.batch_size}, not {batch_size}.")
        if not self._is_compiled and self.length + tokens > self.max_length:
            raise ConfigError(
                f"The cache has room for {self.max_length} tokens: it holds {self.length}, and {tokens} more do not "
                "fit. Make it longer."
            )
        if positions is not None or self.positions is not None:
            kept = self._keep_positions()
            if positions is None:
                last = kept.amax(1, keepdim=True)
                positions = last + 1 + torch.arange(tokens, device=self.device)
            if not _is_recorded():
                self._check_rings(kept[:, : self.length], positions)
            if self.index is not None and tokens == 1:
                kept.index_copy_(1, self.index, positions.to(kept.dtype))
            else:
                kept[:, self.length : self.length + tokens] = positions

    def _check_rings(self, kept: Tensor, new: Tensor) -> None:
        """Raise ConfigError where tokens at the positions `new`, (B, S), should see some that rings no longer hold."""
        for ring in {layer.length for layer in self.layers if layer.is_ring}:
            lost = kept[:, : max(0, kept.shape[1] - ring + (new.shape[1] == 1))]  # one alone takes its place before
            if lost.shape[1]:
                first = new.long().where(new >= 0, 1 << 40).amin(1)  # sequences that are over see none
                if bool((lost.amax(1) > (first - ring).clamp(min=-1)).any()):
                    raise ConfigError(
                        f"Padding behind tokens took the place of some that are still seen, in layers that keep {ring} "
                        "tokens: pad on the left."
                    )

    @property
    def _is_compiled(self) -> bool:
        return self.index is not None and torch.compiler.is_compiling()

    def advance(self, tokens: int) -> None:
        if not self._is_compiled:
            self.length += tokens
        if self.index is not None:
            self.index += tokens

    def ring_places(self, window: int) -> Tensor:
        """Where the last `window` tokens, or all, lie in a ring of that length, the oldest first."""
        kept = min(self.length, window)
        return torch.arange(self.length - kept, self.length, device=self.device) % window

    def select(self, rows: Tensor) -> KVCache:
        """Another cache, with the sequences of these numbers, (R,): one beginning can go on in several ways."""
        chosen = copy.copy(self)
        chosen.batch_size = len(rows)
        chosen.layers = [layer.select(rows) for layer in self.layers]
        chosen.positions = None if self.positions is None else self.positions[rows]
        chosen.index = None if self.index is None else self.index.clone()
        return chosen

    def reset(self) -> None:
        """Forget everything, and keep the memory."""
        self.length = 0
        if self.index is not None:
            self.index.zero_()
        if self.positions is not None:
            self.positions.fill_(-1)
            if self.index is None:
                self.positions = None

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values, for all sequences at full length."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors)
