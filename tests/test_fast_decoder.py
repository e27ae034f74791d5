"""The fast form of decoders equals the plain one, for every language model, in every way that one is called."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import zoo
from tests.language import small
from zoo.errors import ConfigError
from zoo.layers.decoder import Decoder, RMSNorm
from zoo.layers.fast_decoder import FastDecoder
from zoo.registry import get_entry

LATENT = {"num_kv_heads": None, "q_rank": 32, "kv_rank": 64, "nope_head_dim": 8, "rope_head_dim": 8, "v_head_dim": 16}


def entries() -> list[str]:
    """One name for each architecture that differs once it is small."""
    kinds: dict[Any, str] = {}
    for info in zoo.list_models("*", task="language"):
        args = get_entry(info).args
        same = ("rope_theta", "rope_interleaved", "qk_norm", "sliding_window", "kv_rank", "norm_eps", "mlp_name")
        kinds.setdefault((*(args.get(key) for key in same), "layer_map" in args), info)
    return list(kinds.values())


def reduced(name: str, **changes: Any) -> Any:
    """A small model of `name` that still has what is special about it."""
    args: dict[str, Any] = {}
    if "layer_map" in get_entry(name).args:
        args["layer_map"] = tuple(stored for stored in range(3) for _ in range(2))
    if "sliding_window" in get_entry(name).args:
        args |= {"sliding_window": 5, "global_layers": (0,)}
    if "kv_rank" in get_entry(name).args:
        args |= LATENT
    torch.manual_seed(0)
    return small(name, **{**args, **changes})


def randomised(name: str, **changes: Any) -> Any:
    """That, with norms that have weights and layers that matter."""
    model = reduced(name, **changes)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()


@pytest.fixture(params=["0", "1"], ids=["pytorch", "native"])
def native(request, monkeypatch):
    monkeypatch.setenv("ZOO_NATIVE", request.param)
    return request.param == "1"


@pytest.mark.parametrize("name", entries())
@torch.inference_mode()
def test_equals_the_model(name, native):
    model = randomised(name)
    fast = zoo.optimize_for_inference(model)
    tokens = torch.randint(0, 257, (2, 20))
    assert isinstance(fast, FastDecoder)
    assert error(fast(tokens), model(tokens)) < 1e-5
    assert error(fast.forward_features(tokens), model.forward_features(tokens)) < 1e-5
    targets = tokens.roll(-1, 1)
    assert error(fast(tokens, targets), model(tokens, targets)) < 1e-5
    positions = torch.arange(20).repeat(2, 1) - torch.tensor([[0], [4]])
    positions = positions.clamp(min=-1)
    kept = positions >= 0
    assert error(fast(tokens, positions=positions)[kept], model(tokens, positions=positions)[kept]) < 1e-5
    for batch, static_shapes in itertools.product((1, 2), (False, True)):
        whole = model(tokens[:batch])
        cache = fast.make_cache(batch, 32, static_shapes=static_shapes)
        steps = [fast(tokens[:batch, :8], cache=cache)]
        steps += [fast(tokens[:batch, place : place + 1], cache=cache) for place in range(8, 20)]
        assert error(torch.cat(steps, 1), whole[:, 7:]) < 1e-5
        assert cache.length == 20


@pytest.mark.parametrize("name", ["mobilellm_125m", "mobilellm_pro", "youtu_llm_2b"])
@torch.inference_mode()
def test_left_padding_in_a_cache(name, native):
    model = randomised(name)
    fast = zoo.optimize_for_inference(model)
    tokens = torch.randint(0, 257, (2, 12))
    positions = torch.arange(12).repeat(2, 1) - torch.tensor([[0], [5]])
    found = []
    for form in (model, fast):
        cache = form.make_cache(2, 20)
        found.append([form(tokens, cache=cache, positions=positions.clamp(min=-1))])
        found[-1] += [form(tokens[:, place : place + 1], cache=cache) for place in range(4)]
    assert error(torch.cat(found[1], 1), torch.cat(found[0], 1)) < 1e-5


@torch.inference_mode()
def test_untied_head_and_more_dtypes(native):
    model = randomised("mobilellm_125m", tie_embeddings=False)
    tokens = torch.randint(0, 257, (1, 9))
    assert error(zoo.optimize_for_inference(model)(tokens), model(tokens)) < 1e-5
    wide = model.double()
    assert error(zoo.optimize_for_inference(wide)(tokens), wide(tokens)) < 1e-12
    narrow = model.bfloat16()
    fast = zoo.optimize_for_inference(narrow)
    exact = copy.deepcopy(narrow).double()(tokens)
    assert fast(tokens).dtype == torch.bfloat16
    assert error(fast(tokens), exact) < 2 * error(narrow(tokens), exact)


def test_shared_layers_are_stored_once():
    model = randomised("mobilellm_ls_125m")
    fast = zoo.optimize_for_inference(model)
    assert sum(p.numel() for p in fast.parameters()) <= sum(p.numel() for p in model.parameters())


def test_the_model_stays_as_it_was_and_the_form_cannot_be_exported(tmp_path):
    model = randomised("mobilellm_125m")
    before = copy.deepcopy(model.state_dict())
    fast = zoo.optimize_for_inference(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    with pytest.raises(ConfigError, match="the model that it was made from"):
        zoo.save_pretrained(fast, tmp_path / "fast")
    with pytest.raises(ConfigError, match="Token 257 is outside the vocabulary"):
        fast(torch.tensor([[257]]))


@torch.inference_mode()
def test_generates_what_the_model_generates(native):
    model = randomised("mobilellm_125m")
    fast = zoo.optimize_for_inference(model)
    for prompts in ([5, 6, 7], [[1, 2, 3], [4] * 9]):
        assert zoo.generate(fast, prompts, max_new_tokens=24) == zoo.generate(model, prompts, max_new_tokens=24)


@pytest.mark.parametrize("name", ["mobilellm_125m", "mobilellm_pro", "youtu_llm_2b"])
@torch.inference_mode()
def test_followed_by_a_compiler_without_a_break(name):
    model = randomised(name)
    fast = zoo.optimize_for_inference(model)
    followed = torch.compile(fast, backend="eager", fullgraph=True)
    tokens = torch.randint(0, 257, (1, 13))
    cache = fast.make_cache(1, 16, static_shapes=True)
    fast(tokens[:, :12], cache=cache)
    assert error(followed(tokens), model(tokens)) < 1e-5
    assert error(followed(tokens[:, 12:], cache=cache), model(tokens)[:, 12:]) < 1e-5


class Adapter(torch.nn.Linear):
    """A linear layer and what was learned beside it, as LoRA has it."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight = base.weight
        self.down = torch.nn.Parameter(0.2 * torch.randn(2, base.in_features))
        self.up = torch.nn.Parameter(0.2 * torch.randn(base.out_features, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


@torch.inference_mode()
def test_a_model_with_adapters_keeps_them(native):
    model = randomised("mobilellm_125m")
    mlp = model.model.layers[1].mlp
    mlp.up_proj = Adapter(mlp.up_proj)
    fast = zoo.optimize_for_inference(model)
    tokens = torch.randint(0, 257, (1, 12))
    assert error(fast(tokens), model(tokens)) < 1e-5
    assert zoo.generate(fast, [5, 6, 7], max_new_tokens=8) == zoo.generate(model, [5, 6, 7], max_new_tokens=8)


@torch.inference_mode()
def test_adapters_of_latent_attention_and_of_the_head_count_step_by_step():
    """And hooks are called there, too."""
    model = randomised("youtu_llm_2b", tie_embeddings=False)
    attention = model.model.layers[1].self_attn
    tokens = torch.randint(0, 257, (1, 12))
    before = model(tokens)
    attention.kv_b_proj = Adapter(attention.kv_b_proj)
    assert error(model(tokens), before) > 1e-3
    model.lm_head = Adapter(model.lm_head)
    whole = model(tokens)
    for adapted in (model, zoo.optimize_for_inference(model)):
        cache = adapted.make_cache(1, 12)
        steps = [adapted(tokens[:, i : i + 1], cache=cache) for i in range(12)]
        assert error(torch.cat(steps, 1), whole) < 1e-4
    with pytest.raises(ConfigError, match=r"weight of lm_head alone, and lm_head \(Adapter\) has"):
        model(tokens, targets=tokens)
    called: list[str] = []
    model.lm_head.register_forward_hook(lambda *_: called.append("head"))
    attention.kv_b_proj.register_forward_hook(lambda *_: called.append("latent"))
    model(tokens[:, :1], cache=model.make_cache(1, 12))
    assert called == ["latent", "head"]


@pytest.mark.parametrize("name", ["mobilellm_125m", "youtu_llm_2b"])
@torch.inference_mode()
def test_biases_count(name):
    """They are no part of the architecture: the fast form leaves such a model as it is, and memory takes them along."""
    model = randomised(name)
    for part in [part for part in model.modules() if type(part) is torch.nn.Linear]:
        part.bias = torch.nn.Parameter(0.2 * torch.randn(part.out_features))
    tokens = torch.randint(0, 257, (1, 12))
    whole = model(tokens)
    for form in (model, zoo.optimize_for_inference(model)):
        assert error(form(tokens), whole) < 1e-5
        cache = form.make_cache(1, 12)
        assert error(torch.cat([form(tokens[:, i : i + 1], cache=cache) for i in range(12)], 1), whole) < 1e-4
    with pytest.raises(ConfigError, match=r"in int8 takes .* as its config builds it, and model\.layers\.0.*bias is"):
        zoo.quantize(model)


@torch.inference_mode()
def test_the_cache_of_another_model_is_refused(native):
    fast, other = (zoo.optimize_for_inference(randomised("mobilellm_125m", head_dim=dim)) for dim in (16, 32))
    cache = other.make_cache(1, 16)
    other(torch.tensor([[1, 2, 3]]), cache=cache)
    with pytest.raises(ConfigError, match="another model's: its layers keep other shapes"):
        fast(torch.tensor([[4]]), cache=cache)


def test_losses_refuse_what_the_heads_weight_does_not_say():
    tokens = torch.randint(0, 257, (1, 12))

    def prune_head(model):
        prune.l1_unstructured(model.lm_head, "weight", 0.5)

    def hook(model):
        model.lm_head.register_forward_hook(lambda module, inputs, output: output + 1)

    def add_bias(model):
        model.lm_head.bias = torch.nn.Parameter(torch.ones(257))

    for change, what in ((prune_head, "hooks"), (hook, "hooks"), (add_bias, "a bias")):
        model = randomised("mobilellm_125m", tie_embeddings=False)
        change(model)
        with pytest.raises(ConfigError, match=rf"weight of lm_head alone, and lm_head \(Linear\) has {what}: merge"):
            model(tokens, targets=tokens)
        assert model(tokens).shape == (1, 12, 257)
    model = randomised("mobilellm_125m")
    model.model.embed_tokens = torch.nn.Sequential(model.model.embed_tokens)
    with pytest.raises(ConfigError, match=r"embed_tokens \(Sequential\) has no weight: merge"):
        model(tokens)


def other_norms(model):
    for layer in model.model.layers:
        layer.input_layernorm = nn.LayerNorm(model.config.dim, bias=False)


def other_epsilons(model):
    for part in model.modules():
        if isinstance(part, RMSNorm):
            part.eps = 0.1


def other_rotation(model):
    model.model.rotary.theta = 100.0
    model.model.rotary.fill()


def pairs_side_by_side(model):
    for layer in model.model.layers:
        layer.self_attn.interleaved = not layer.self_attn.interleaved


class Capped(Decoder):
    def forward_head(self, features):
        return 3 * torch.tanh(super().forward_head(features) / 3)


def other_head(model):
    model.__class__ = Capped


def head_of_its_own(model):
    model.forward_head = lambda features: torch.zeros(*features.shape[:2], model.config.vocab_size)


@pytest.mark.parametrize(
    "change", [other_norms, other_epsilons, other_rotation, pairs_side_by_side, other_head, head_of_its_own]
)
@torch.no_grad()
def test_what_was_exchanged_is_computed_as_it_is_or_refused(change, tmp_path):
    model = zoo.create_model(
        "smollm_135m", vocab_size=97, depth=2, dim=64, num_heads=4, hidden_dim=96, num_kv_heads=2, head_dim=16
    ).eval()
    tokens = torch.randint(0, 97, (1, 12))
    before = model(tokens)
    change(model)
    expected = model(tokens)
    assert (expected - before).abs().max() > 1e-3 * before.abs().max()
    torch.testing.assert_close(zoo.optimize_for_inference(model)(tokens), expected)
    with pytest.raises(ConfigError, match="as its config builds it"):
        zoo.quantize(model)
    if change not in (other_head, head_of_its_own):  # whose weights are what they were
        with pytest.raises(ConfigError, match="is not as the model's arguments build it"):
            zoo.save_pretrained(model, tmp_path / "saved")
        assert not (tmp_path / "saved").exists()


@torch.no_grad()
def test_a_fast_form_that_is_changed_steps_as_it_computes():
    model = zoo.create_model("smollm_135m", vocab_size=97, depth=2, dim=64, num_heads=4, hidden_dim=96, num_kv_heads=2)
    fast, tokens = zoo.optimize_for_inference(model.eval()), torch.randint(0, 97, (1, 12))
    for part in fast.modules():
        if hasattr(part, "eps"):
            part.eps = 0.1
    cache = fast.make_cache(1)
    fast(tokens[:, :11], cache=cache)
    torch.testing.assert_close(fast(tokens[:, 11:], cache=cache)[0, -1], fast(tokens)[0, -1], rtol=1e-4, atol=1e-4)
