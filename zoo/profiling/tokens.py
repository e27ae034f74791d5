"""What a language model costs for each token."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

__all__ = ["TokenCosts", "token_costs"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TokenCosts:
    """Multiply-accumulates and memory for one token. A stored layer that runs twice counts twice.

    `macs`: of linear layers and the head, at decode. `prefill_macs`: without the head, which only the last token of a
    prompt needs. `attention_macs`: what each remembered token adds at decode, and `prefill_attention_macs` to a token
    of a prompt: more and less where attention at decode is computed in the latent space. `kv_elements`: numbers
    remembered, of which layers with a sliding window forget `windowed_kv_elements` again.
    """

    macs: int
    prefill_macs: int
    attention_macs: int
    prefill_attention_macs: int
    kv_elements: int
    windowed_kv_elements: int


def token_costs(model: nn.Module) -> TokenCosts:
    """The costs of a `zoo.layers.decoder.Decoder`, from its shapes alone."""
    decoder: Any = model
    config = decoder.config
    layers = [
        sum(part.weight.numel() for part in layer.modules() if isinstance(part, nn.Linear))
        for layer in decoder.model.layers
    ]
    executed = config.executed
    body = sum(layers[stored] for stored in executed)
    if config.kv_rank is None:
        width = prefill_width = 2 * config.head_dim
    else:
        width = 2 * config.kv_rank + config.rope_head_dim
        prefill_width = config.nope_head_dim + config.rope_head_dim + config.v_head_dim
    elements = config.kv_elements_per_token
    windowed = sum(config.window(i) is not None for i in range(len(executed)))
    return TokenCosts(
        macs=body + decoder.head_weight.numel(),
        prefill_macs=body,
        attention_macs=len(executed) * config.num_heads * width,
        prefill_attention_macs=len(executed) * config.num_heads * prefill_width,
        kv_elements=elements,
        windowed_kv_elements=elements // len(executed) * windowed,
    )
