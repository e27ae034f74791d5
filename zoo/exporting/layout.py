"""What every export of a decoder asks of it."""

from __future__ import annotations

from torch import nn

from zoo.errors import ConfigError
from zoo.layers.decoder import Decoder, DecoderConfig

__all__ = ["decoder_of", "sees_windows"]


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
