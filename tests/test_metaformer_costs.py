"""What the MetaFormers cost, against figures counted with fvcore on the authors' own code."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

import zoo
from tests.models import each_model
from tests.profiles import NORMS, profiled


@dataclass(frozen=True)
class Figures:
    """Parameters, and GMACs and fvcore totals in G to the last digit given."""

    params: int
    macs: str
    fvcore: str


BASIC = {
    "poolformer_s12": Figures(11_915_176, "1.8123", "1.8227"),
    "poolformer_s24": Figures(21_388_968, "3.3922", "3.4129"),
    "poolformer_s36": Figures(30_862_760, "4.9722", "5.0031"),
    "poolformer_m36": Figures(56_172_520, "8.7588", "8.8019"),
    "poolformer_m48": Figures(73_473_448, "11.5333", "11.5907"),
    "identityformer_s12": Figures(11_891_712, "1.8123", "1.8123"),
    "identityformer_s24": Figures(21_341_464, "3.3922", "3.3922"),
    "identityformer_s36": Figures(30_791_216, "4.9722", "4.9722"),
    "identityformer_m36": Figures(56_077_168, "8.7588", "8.7588"),
    "identityformer_m48": Figures(73_346_056, "11.5333", "11.5333"),
    "randformer_s12": Figures(12_127_010, "1.8885", "1.8885"),
    "randformer_s24": Figures(21_812_060, "3.5447", "3.5447"),
    "randformer_s36": Figures(31_497_110, "5.2008", "5.2008"),
    "randformer_m36": Figures(56_783_062, "9.0354", "9.0354"),
    "randformer_m48": Figures(74_287_248, "11.9021", "11.9021"),
    "poolformerv2_s12": Figures(11_891_712, "1.8123", "1.8123"),
    "poolformerv2_s24": Figures(21_341_464, "3.3922", "3.3922"),
    "poolformerv2_s36": Figures(30_791_216, "4.9722", "4.9722"),
    "poolformerv2_m36": Figures(56_077_168, "8.7588", "8.7588"),
    "poolformerv2_m48": Figures(73_346_056, "11.5333", "11.5333"),
}

MIXED = {  # by name and input size
    ("convformer_s18", 224): Figures(26_774_448, "3.9410", "3.9564"),
    ("convformer_s18", 384): Figures(26_774_448, "11.5757", "11.6210"),
    ("convformer_s36", 224): Figures(40_012_152, "7.6397", "7.6698"),
    ("convformer_s36", 384): Figures(40_012_152, "22.4453", "22.5338"),
    ("convformer_m36", 224): Figures(57_051_640, "12.8423", "12.8838"),
    ("convformer_m36", 384): Figures(57_051_640, "37.7337", "37.8556"),
    ("convformer_b36", 224): Figures(99_882_616, "22.6294", "22.6848"),
    ("convformer_b36", 384): Figures(99_882_616, "66.4922", "66.6548"),
    ("caformer_s18", 224): Figures(26_341_656, "4.1069", "4.1224"),
    ("caformer_s18", 384): Figures(26_341_656, "13.3661", "13.4115"),
    ("caformer_s36", 224): Figures(39_297_102, "7.9716", "8.0017"),
    ("caformer_s36", 384): Figures(39_297_102, "25.9843", "26.0727"),
    ("caformer_m36", 224): Figures(56_204_878, "13.2406", "13.2821"),
    ("caformer_m36", 384): Figures(56_204_878, "41.9773", "42.0992"),
    ("caformer_b36", 224): Figures(98_753_614, "23.1605", "23.2158"),
    ("caformer_b36", 384): Figures(98_753_614, "72.1503", "72.3129"),
}

# The trainable part of RandFormer is IdentityFormer, which it is but for the matrices.
TRAINABLE = {name: BASIC[name.replace("randformer", "identityformer")].params for name in BASIC if "rand" in name}


def giga(number: int) -> str:
    return f"{number / 1e9:.4f}"


def share(profile, operators: tuple[str, ...]) -> int:
    return sum(operator.fvcore_total for operator in profile.operators if operator.name in operators)


def einsum_rounding(profile) -> int:
    """What the authors' code gains by fvcore's einsum handler, which reads its count from text of four digits.

    One 196x196 matrix mixes 320 channels: 196 * 196 * 320 = 12,293,120 MACs; twice that prints as 2.459e+07, and half
    of that is 12,295,000. RandFormer is the only model whose reference uses einsum.
    """
    mixers = [module for module in profile.modules if module.type == "RandomMixing"]
    return sum(int(float(f"{2 * module.macs:.3e}") / 2) - module.macs for module in mixers)


def test_the_rounding_of_einsum():
    # stage 3: 12,295,000 for 12,293,120, 12 blocks; stage 4: 1,229,500 for 49 * 49 * 512 = 1,229,312, 4 blocks
    assert einsum_rounding(profiled("randformer_s24", (3, 224, 224))) == 12 * 1_880 + 4 * 188


def test_the_index_holds_the_authors_figures():
    """Of every model, as the tests below, but what they measure is taken from the index."""
    for name, figures in BASIC.items():
        info = zoo.model_info(name)
        assert (info.params, info.trainable_params) == (figures.params, TRAINABLE.get(name, figures.params)), name
        if name not in TRAINABLE:
            assert giga(info.macs) == figures.macs, name
    for (name, size), figures in MIXED.items():
        info = zoo.model_info(name)
        assert info.params == info.trainable_params == figures.params, name
        if info.input_size == (3, size, size):
            assert giga(info.macs) == figures.macs, name


@pytest.mark.parametrize("name", each_model(list(BASIC)))
def test_basic_models(name):
    figures, profile = BASIC[name], profiled(name, (3, 224, 224))
    assert profile.params == figures.params
    assert profile.trainable_params == TRAINABLE.get(name, profile.params)
    assert giga(profile.macs + einsum_rounding(profile)) == figures.macs
    # The authors average the last map by `mean`, which fvcore does not count; we do it by adaptive pooling.
    uncounted: tuple[str, ...] = ("adaptive_avg_pool2d",)
    if not name.startswith("poolformer_"):  # and write the norms out in elementary operations, which have no count
        uncounted += NORMS
    assert giga(profile.fvcore_total - share(profile, uncounted) + einsum_rounding(profile)) == figures.fvcore


@pytest.mark.parametrize(
    ("name", "size"),
    [pytest.param(*key, marks=() if key[0].endswith("_s18") else pytest.mark.slow) for key in MIXED],
)
def test_convolution_and_attention_models(name, size):
    figures, profile = MIXED[name, size], profiled(name, (3, size, size))
    assert profile.params == profile.trainable_params == figures.params
    assert giga(profile.macs) == figures.macs
    # Here the authors write out the norms of stem and downsampling alone; those of the blocks are layer norms.
    elementary = [m for m in profile.modules if m.type == "LayerNorm" and m.name.endswith(("stem.norm", "sample.norm"))]
    assert len(elementary) == 4
    uncounted = share(profile, ("adaptive_avg_pool2d",)) + sum(norm.own_fvcore_total for norm in elementary)
    assert giga(profile.fvcore_total - uncounted) == figures.fvcore


def test_caformer_counts_the_attention_that_fvcore_alone_would_miss():
    for size, attention in ((224, "0.229"), (384, "1.975")):
        operators = {operator.name: operator for operator in profiled("caformer_s18", (3, size, size)).operators}
        assert f"{operators['scaled_dot_product_attention'].macs / 1e9:.3f}" == attention


def test_every_published_variant_has_figures():
    assert {"caformer_test", *BASIC, *(name for name, _ in MIXED)} == set(zoo.list_models(family="metaformer"))
