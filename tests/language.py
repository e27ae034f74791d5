"""What tests of language models share: golden parity, in one forward pass and token by token, and a small model."""

from __future__ import annotations

from typing import Any

import torch

import zoo
from tests import golden
from zoo.layers.init import materialize

TOLERANCE = 1e-6  # the references compute norms and rotary tables in float32, in their float64 run too
SMALL: dict[str, Any] = {"depth": 3, "dim": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "hidden_dim": 64}


def small(name: str = "mobilellm_125m", **args: Any) -> Any:
    """A decoder of a few thousand weights, with the vocabulary of bytes."""
    return zoo.create_model(
        name, pretrained=False, **{**SMALL, "vocab_size": 257, "context_length": 128, **args}
    ).eval()


def random_model(name: str = "mobilellm_125m", **args: Any) -> Any:
    """`small`, but far from uniform, so that no two tokens cost the same."""
    torch.manual_seed(0)
    model = small(name, **args)
    for parameter in model.parameters():
        parameter.data.mul_(4)
    return model


def check_golden(family: str, name: str, **args: Any) -> None:
    """Hold the model to its golden file: all tokens at once, and, where the reference can, one after the other."""
    reference = golden.load(family, name)
    # on the meta device first: what is loaded is not initialised before
    model: Any = zoo.create_model(name.partition("@")[0], pretrained=False, device="meta", dtype=torch.float64, **args)
    zoo.load_checkpoint(model, golden.state_dict(reference))
    materialize(model)
    assert sum(p.numel() for p in model.parameters()) == reference["parameters"]
    model.eval()
    tokens = golden.inputs(reference)["input"]
    kept = reference["outputs"]["logits"]["shape"][1]
    with torch.no_grad():
        features = model.forward_features(tokens)
        logits = model.forward_head(features[:, -kept:])
        assert max(golden.errors(reference, {"features": features, "logits": logits}).values()) < TOLERANCE
        check_incremental(model, tokens, logits)


def check_incremental(model: Any, tokens: torch.Tensor, logits: torch.Tensor) -> None:
    """Token by token, after a first part at once, the logits are those of the whole."""
    half = max(tokens.shape[1] // 2, tokens.shape[1] - 17)
    for static_shapes in (False, True):
        cache = model.make_cache(len(tokens), tokens.shape[1], static_shapes=static_shapes)
        parts = [model(tokens[:, :half], cache=cache)]
        for place in range(half, tokens.shape[1]):
            parts.append(model(tokens[:, place : place + 1], cache=cache))
        got = torch.cat(parts, 1)[:, -logits.shape[1] :]
        wanted = logits[:, -got.shape[1] :]
        assert ((got - wanted).abs().max() / wanted.abs().max()).item() < 1e-8
