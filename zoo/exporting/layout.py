"""What every export asks of a model."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.layers.decoder import Decoder, DecoderConfig

__all__ = ["check_built", "check_whole", "decoder_of", "evened", "sees_windows"]


def decoder_of(model: nn.Module, purpose: str) -> Decoder:
    """`model` as the plain decoder that it must be, with weights. Raises ConfigError."""
    if not isinstance(model, Decoder) or hasattr(model, "quantization"):  # a fast decoder says how it is stored
        kind = type(model).__name__
        raise ConfigError(
            f"{purpose} takes a language model as create_model makes it, not {kind}: "
            "for a fast or quantised form, give the model that it was made from."
        )
    _check_weights(model, purpose)
    return model


def check_built(decoder: Decoder, purpose: str) -> None:
    """Raise ConfigError unless the decoder is as its config builds it, by which formats name its tensors."""
    if decoder.has_own_methods():
        raise ConfigError(
            f"{purpose} takes a language model as its config builds it, and {type(decoder).__name__} computes "
            "features or logits in a way of its own."
        )
    name = decoder.changed_part()
    if name is not None:
        raise ConfigError(
            f"{purpose} takes a language model as its config builds it, and {name} is another or missing: parts were "
            "added, cut off or exchanged."
        )


def check_whole(model: nn.Module, purpose: str) -> None:
    """Raise ConfigError unless `model` is a whole one of vision, in the form in which it was made, with weights."""
    if getattr(model, "optimized_for_inference", False):
        raise ConfigError(
            f"{purpose} takes a model as create_model makes it, and this is its fast form: give the model that it was "
            "made from."
        )
    if hasattr(model, "_orig_mod"):
        raise ConfigError(f"{purpose} takes the model that was compiled, which lies in its _orig_mod.")
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    if "architecture" not in cfg or not hasattr(model, "num_features"):
        advice = ": leave out features_only=True" if hasattr(model, "feature_info") else ""
        raise ConfigError(
            f"{purpose} takes a whole model as create_model makes it, not {type(model).__name__}{advice}."
        )
    _check_weights(model, purpose)


def _check_weights(model: nn.Module, purpose: str) -> None:
    state = model.state_dict()
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise ConfigError(
            f"{purpose} takes tensors, and {others[0]} is none: quantised layers of torch's have no place."
        )
    if any(tensor.is_meta for tensor in state.values()):
        raise ConfigError(f"{purpose} needs weights, and the model is on the meta device.")


def evened(model: Decoder, multiple: int = 1) -> Decoder:
    """`model`, or where its SwiGLUs differ in width, which formats have no word for, a copy that computes the same.

    All are as wide as the widest there, or as the next multiple: what is added is zero.
    """
    widest = -(-max(model.config.hidden_dims) // multiple) * multiple
    if model.config.hidden_dim == widest:
        return model
    model = copy.deepcopy(model).requires_grad_(False)
    for layer in model.model.layers:
        mlp: Any = layer.get_submodule(model.config.mlp_name)
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight.data = F.pad(linear.weight, (0, 0, 0, widest - linear.out_features))
            linear.out_features = widest
        mlp.down_proj.weight.data = F.pad(mlp.down_proj.weight, (0, widest - mlp.down_proj.in_features))
        mlp.down_proj.in_features = widest
    model.config = dataclasses.replace(model.config, hidden_dim=widest)
    return model


def sees_windows(config: DecoderConfig) -> bool:
    """Whether any executed layer sees less than the whole context."""
    windows = (config.window(i) for i in range(len(config.executed)))
    return any(window is not None and window < config.context_length for window in windows)
