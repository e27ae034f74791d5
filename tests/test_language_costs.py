"""What language models cost: the tables of their papers and cards, and the count of every operator that runs."""

from __future__ import annotations

import json

import pytest

import zoo
from tests.language import small
from tests.models import each_model
from zoo.errors import ConfigError
from zoo.layers.decoder import DecoderConfig
from zoo.profiling.tokens import token_costs
from zoo.registry import get_entry

# parameters, MACs of a token without attention's, numbers remembered of a token: worked out from published shapes
TABLE = {
    "mobilellm_125m": (124_635_456, 124_600_320, 11_520),
    "mobilellm_350m": (345_355_200, 345_292_800, 20_480),
    "mobilellm_600m": (603_188_352, 603_095_040, 30_720),
    "mobilellm_1b": (1_005_461_760, 1_005_322_240, 34_560),
    "mobilellm_1_5b": (1_511_188_800, 1_511_014_400, 34_560),
    "mobilellm_ls_125m": (124_635_456, 230_768_640, 23_040),
    "mobilellm_ls_350m": (345_355_200, 659_865_600, 40_960),
    "mobilellm_ls_600m": (603_188_352, 1_169_326_080, 61_440),
    "mobilellm_r1_140m": (140_248_512, 140_230_656, 5_760),
    "mobilellm_r1_360m": (359_431_168, 359_399_424, 7_680),
    "mobilellm_r1_950m": (949_685_760, 949_616_640, 16_896),
    "mobilellm_r1_140m_base": (140_248_512, 140_230_656, 5_760),
    "mobilellm_r1_360m_base": (359_431_168, 359_399_424, 7_680),
    "mobilellm_r1_950m_base": (949_685_760, 949_616_640, 16_896),
    # 30 layers of 20 + 2 * 4 + 20 heads of 64 and 3 * 6144, and the head; 30 layers of 2 * 4 * 64
    "mobilellm_pro": (1_084_453_120, 30 * 1280 * (48 * 64 + 3 * 6144) + 202_048 * 1280, 15_360),
    # SmolLM: MobileLLM's layers under another vocabulary, and 24 layers without grouped heads
    "smollm_135m": (124_635_456 + (49_152 - 32_000) * 576, 124_600_320 + (49_152 - 32_000) * 576, 11_520),
    "smollm_360m": (345_355_200 + (49_152 - 32_000) * 960, 345_292_800 + (49_152 - 32_000) * 960, 20_480),
    "smollm_1_7b": (1_711_376_384, 24 * 2048 * (4 * 2048 + 3 * 8192) + 49_152 * 2048, 24 * 2 * 2048),
    "youtu_llm_2b": (1_961_560_064, 1_961_361_408, 18_432),
    "youtu_llm_2b_base": (1_961_560_064, 1_961_361_408, 18_432),
}
NAMES = zoo.list_models(task="language")


@pytest.mark.parametrize("name", TABLE)
def test_costs_are_those_of_the_tables(name):
    params, macs, kv_elements = TABLE[name]
    info = zoo.model_info(name)
    assert info.language is not None
    assert (info.params, info.macs, info.language.kv_elements) == (params, macs, kv_elements)
    assert info.kv_bytes == 2 * kv_elements
    assert info.macs - info.language.prefill_macs == info.language.vocab_size * get_entry(name).args["dim"]
    assert (info.language.executed_layers == 2 * info.language.stored_layers) == ("_ls_" in name)


def test_every_model_is_in_the_tables():
    assert {*TABLE} == {*NAMES}


def test_attention_at_a_length():
    """2 x layers x heads x 64 for each remembered token; and 40 MB for 8,000 tokens of MobileLLM-Pro at one byte."""
    for name, layers, heads in (("mobilellm_125m", 30, 9), ("mobilellm_ls_350m", 64, 15), ("mobilellm_1_5b", 54, 25)):
        facts = zoo.model_info(name).language
        assert facts is not None
        assert facts.attention_macs == facts.prefill_attention_macs == 2 * layers * heads * 64
    pro, youtu = (DecoderConfig(**get_entry(name).args) for name in ("mobilellm_pro", "youtu_llm_2b"))
    assert pro.kv_elements(8000) == 8000 * 2 * 4 * 64 * 9 + 512 * 2 * 4 * 64 * 21
    assert youtu.kv_elements(100) == 100 * 32 * 576


def check_operators(name, tokens, batch_size=1, **args):
    """What fvcore counts of the operators that run is what the shapes say."""
    model = zoo.create_model(name, pretrained=False, device="meta", **args)
    profile = zoo.profile(model, tokens=tokens, batch_size=batch_size)
    assert profile.complete
    assert profile.prefill.complete
    costs, config = token_costs(model), model.config
    layers = len(config.executed)
    seen = sum(min(tokens, config.window(i) or tokens) for i in range(layers))
    attention = batch_size * seen * costs.attention_macs // layers
    assert profile.attention_macs == attention
    assert profile.macs == batch_size * costs.macs + attention
    head = costs.macs - costs.prefill_macs
    wanted = tokens * costs.prefill_macs + head + tokens**2 * costs.prefill_attention_macs
    assert profile.prefill.macs == batch_size * wanted
    assert profile.kv_bytes == 4 * batch_size * config.kv_elements(tokens)
    by_name = {module.name: module for module in profile.modules}
    assert by_name[""].own_macs == batch_size * head
    runs = config.executed.count(1)
    assert by_name["model.layers.1"].calls == runs
    assert by_name["model.layers.1.self_attn.o_proj"].calls == runs
    assert profile.params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", each_model(NAMES))
def test_every_operator_is_counted(name):
    layer_map = (0, 0, 1, 1) if "_ls_" in name else None
    check_operators(name, 600, batch_size=2, depth=2, layer_map=layer_map)  # beyond the window of MobileLLM-Pro


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_operator_of_whole_models_is_counted(name):
    check_operators(name, 2048)


def test_a_profile_in_words_and_as_json():
    profile = zoo.profile("mobilellm_r1_140m", tokens=100)
    facts = json.loads(profile.to_json())
    assert facts["macs"] == profile.macs == 140_230_656 + 100 * 17_280
    assert facts["attention_macs"] == 100 * 17_280
    assert facts["prefill"]["macs"] == 100 * 66_355_200 + 73_875_456 + 100**2 * 17_280
    assert facts["tokens"] == 100
    assert "input_size" not in {*facts, *facts["prefill"]}
    text = profile.table(depth=3)
    for words in ("1 x 100 tokens", "141,958,656 MACs, of which attention has 1,728,000", "(head)", "rms_norm"):
        assert words in text
    assert "embed_tokens" in text
    assert "embed_tokens" not in profile.table(depth=1)


def test_a_module_is_profiled_as_it_is(tmp_path):
    model = small("mobilellm_pro", dtype=None)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    profile = zoo.profile(model)
    assert profile.tokens == 128
    assert profile.name == "mobilellm_pro"
    assert profile.kv_bytes == model.make_cache(1).nbytes
    assert all((tensor == state[key]).all() for key, tensor in model.state_dict().items())
    assert profile.plot(tmp_path / "cost.svg").read_text().startswith("<?xml")
    with pytest.raises(ConfigError, match="129 tokens are more than the context of mobilellm_pro, 128"):
        zoo.profile(model, tokens=129)


def test_fast_and_quantised_forms_cost_what_the_model_does():
    model = small(hidden_dim=96, vocab_size=256)
    plain, params = zoo.profile(model, tokens=20), sum(p.numel() for p in model.parameters())
    for form, size in (
        (zoo.optimize_for_inference(model), 4 * params),
        (zoo.quantize(model), 8.5 / 8 * params),
        (zoo.quantize(model, "int4"), 4.5 / 8 * params),
    ):
        profile = zoo.profile(form, tokens=20)
        assert (profile.macs, profile.prefill.macs) == (plain.macs, plain.prefill.macs)
        assert not profile.unknown_operators
        assert abs(profile.params - params) <= 32 * 7  # norms may be folded
        assert abs(sum(profile.weight_bytes.values()) - size) <= 4 * 32 * 7


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("smollm_135m", {"tokens": 0}, "tokens must be a whole number from 1 up, not 0"),
        ("smollm_135m", {"tokens": 2049}, "2049 tokens are more than the context of smollm_135m, 2048"),
        ("smollm_135m", {"input_size": (3, 32, 32)}, "takes tokens and not images: say how many with tokens="),
        ("poolformer_s12", {"tokens": 5}, "poolformer_s12 takes images and not tokens: leave out tokens="),
    ],
)
def test_profiles_that_cannot_be(name, options, message):
    with pytest.raises(ConfigError, match=message):
        zoo.profile(name, **options)
