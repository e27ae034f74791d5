"""What every export of a decoder needs: its executed layers one after the other, and rotary rows in another order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.layers.decoder import Decoder, DecoderConfig

__all__ = ["decoder_of", "reorder_rotary", "sees_windows"]


def decoder_of(model: nn.Module, purpose: str) -> Decoder:
    """`model` as the plain decoder that it must be, with weights. Raises ConfigError."""
    if not isinstance(model, Decoder) or hasattr(model, "quantization"):  # a fast decoder says how it is stored
        kind = type(model).__name__
        raise ConfigError(
            f"{purpose} takes a language model as create_model makes it, not {kind}: "
            "for a fast or quantised form, give the model that it was made from."
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigError(f"{purpose} needs weights, and the model is on the meta device.")
    return model


def sees_windows(config: DecoderConfig) -> bool:
    """Whether any executed layer sees less than the whole context."""
    windows = (config.window(i) for i in range(len(config.executed)))
    return any(window is not None and window < config.context_length for window in windows)


def reorder_rotary(weight: Tensor, head_dim: int, rotary_dim: int, *, interleaved: bool) -> Tensor:
    """Rows of a projection to heads, (heads x head_dim, in), for the other pairing of rotary positions.

    The last `rotary_dim` of each head's rows are turned. Where they were paired (j, j + rotary_dim / 2) they are, with
    `interleaved`, to be paired (2j, 2j + 1), and without it the other way round.
    """
    heads = weight.unflatten(0, (-1, head_dim))
    fixed, turned = heads.split((head_dim - rotary_dim, rotary_dim), 1)
    pairs: Any = (2, -1) if interleaved else (-1, 2)
    turned = turned.unflatten(1, pairs).transpose(1, 2).flatten(1, 2)
    return torch.cat((fixed, turned), 1).flatten(0, 1)
