"""What every language model of the zoo can do, on small ones of the same architecture."""

from __future__ import annotations

import pytest
import torch
from timm.optim import param_groups_layer_decay

import zoo
from zoo.registry import get_entry

NAMES = zoo.list_models(task="language")


def make(name, **args):
    """The architecture of `name` at a few thousand weights: all that tells it from others is kept."""
    entry = get_entry(name)
    heads, kv_heads = entry.args["num_heads"], entry.args.get("num_kv_heads")
    sizes = {"vocab_size": 97, "depth": 3, "dim": 24, "hidden_dim": 40, "head_dim": 8, "context_length": 64}
    sizes["num_kv_heads"] = None if kv_heads is None else 2
    sizes["num_heads"] = 2 if kv_heads is None else 2 * (heads // kv_heads)
    if "layer_map" in entry.args:
        sizes["layer_map"] = (0, 0, 1, 1, 2, 2)
    if "sliding_window" in entry.args:
        sizes |= {"sliding_window": 5, "global_layers": (0, 2)}
    if "kv_rank" in entry.args:
        sizes |= {"q_rank": 12, "kv_rank": 16, "nope_head_dim": 8, "rope_head_dim": 4, "v_head_dim": 6}
    torch.manual_seed(0)
    return zoo.create_model(name, pretrained=False, **{**sizes, "init_std": 0.3, "embed_init_std": 1.0, **args}).eval()


def tokens_of(*shape):
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_remembered_logits_are_those_of_the_whole(name):
    model, tokens = make(name, dtype=torch.float64), tokens_of(2, 21)
    wanted = model(tokens)
    assert wanted.shape == (2, 21, 97)
    for static_shapes in (False, True):
        cache = model.make_cache(2, 21, static_shapes=static_shapes)
        got = [model(tokens[:, :8], cache=cache, logits_to_keep=8)]
        got += [model(token, cache=cache) for token in tokens[:, 8:].split(1, 1)]
        assert ((torch.cat(got, 1) - wanted).abs().max() / wanted.abs().max()).item() < 1e-9
    features = model.forward_features(tokens)
    assert features.shape == (2, 21, 24)
    assert torch.equal(model.forward_head(features), wanted)
    assert model.head_weight.shape == (97, 24)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(name, tmp_path):
    model, tokens = make(name), tokens_of(1, 9)
    zoo.save_pretrained(model, tmp_path / "saved")
    loaded = zoo.create_model(f"local-dir:{tmp_path / 'saved'}").eval()
    assert loaded.config == model.config
    assert loaded.pretrained_cfg["architecture"] == name
    assert torch.equal(loaded(tokens), model(tokens))
    again = zoo.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=False)
    assert again.config == model.config
    assert not torch.equal(again.head_weight, model.head_weight)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_runs_in_half_precision(name):
    model, tokens = make(name), tokens_of(2, 12)
    wanted = model(tokens)
    half = make(name, dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())
    half.load_state_dict(model.state_dict())
    for low in (half, model.to(torch.bfloat16)):
        got = low(tokens)
        assert got.dtype == torch.bfloat16
        assert (got.float() - wanted).norm() < 0.1 * wanted.norm()
        cache = low.make_cache(2, 12)
        stepped = torch.cat([low(token, cache=cache) for token in tokens.split(1, 1)], 1)
        assert (stepped - got).float().norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize("name", NAMES)
def test_learns_with_and_without_gradient_checkpointing(name):
    model, tokens = make(name, dtype=torch.float64).train(), tokens_of(2, 10)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        loss = model(tokens, tokens.roll(-1, 1))
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        assert all(gradient.abs().max() > 0 for gradient in gradients[-1])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_layers_have_learning_rates_of_their_own(name):
    model = make(name)
    groups = param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert {id(p) for p in named.values()} == scale.keys()
    assert scale[id(named["model.norm.weight"])] == 1
    by_depth = [scale[id(named["model.embed_tokens.weight"])]]
    for i in range(3):
        (own,) = {scale[id(p)] for key, p in named.items() if key.startswith(f"model.layers.{i}.")}
        by_depth.append(own)
    assert by_depth == sorted(set(by_depth))
    assert all((decay[id(p)] == 0) == (p.ndim == 1) for p in named.values())


@pytest.mark.parametrize("name", NAMES)
def test_says_whose_weights_it_has(name):
    model, entry = make(name), get_entry(name)
    cfg = model.pretrained_cfg
    assert cfg["architecture"] == name
    assert not {"input_size", "mean", "std", "crop_pct", "num_classes", "interpolation"} & cfg.keys()
    if not entry.weights:
        assert cfg["tag"] == ""
        return
    assert (cfg["tag"], cfg["hf_hub_id"], cfg["license"]) == (
        entry.weights[0].tag,
        entry.weights[0].hub_id,
        entry.weights[0].license,
    )
    for weights in entry.weights:
        assert entry.pretrained_cfg(weights.tag)["hf_hub_id"] == weights.hub_id
        assert weights.gated == (entry.family == "mobilellm")
