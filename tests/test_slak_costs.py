"""What SLaK costs: dense figures counted with fvcore on the authors' own code, and effective ones without the zeros."""

from __future__ import annotations

import json
import re

import pytest
import torch

import zoo
from tests.profiles import profiled
from tests.test_slak import SMALL
from zoo import cli
from zoo.errors import CheckpointError, ConfigError
from zoo.profiling import Profile

# parameters, of which weights that can be sparse, MACs of convolutions and linear layers, at 224x224
DENSE = {
    "slak_tiny": (50_703_838, 50_576_524, 8_704_776_370),
    "slak_small": (91_131_820, 90_878_758, 16_604_014_234),
    "slak_base": (157_950_792, 157_613_790, 28_509_057_219),
    "slak_large": (346_624_518, 346_119_302, 61_931_165_204),
    "slak_tiny_k31": (49_581_838, 49_454_524, 8_178_281_170),
    "slak_tiny_k61": (51_264_838, 51_137_524, 8_968_023_970),
}
# parameters at 40% sparsity; with the same density in every layer, MACs in G
SPARSE = {
    "slak_tiny": (30_473_228, 5.22),
    "slak_small": (54_780_317, 9.96),
    "slak_base": (94_905_276, 17.11),
    "slak_tiny_k31": (29_800_028, 4.91),
    "slak_tiny_k61": (30_809_828, 5.38),
}
SIZE = (3, 224, 224)


@pytest.mark.parametrize("name", DENSE)
def test_dense_costs_are_the_authors_networks(name):
    params, weights, macs = DENSE[name]
    info = zoo.model_info(name)
    assert (info.params, info.macs) == (params, macs)
    model = zoo.create_model(name, pretrained=False, device="meta")
    assert sum(p.numel() for p in model.parameters() if p.ndim in (2, 4)) == weights


def test_where_the_macs_of_slak_tiny_lie():
    profile = profiled("slak_tiny", SIZE)
    assert profile.complete
    assert profile.effective is None  # without weights, nobody knows
    operators = {operator.name: operator for operator in profile.operators}
    assert operators["linear"].macs == 7_010_070_896
    assert operators["convolution"].macs == 1_694_705_474
    assert operators["batch_norm"].fvcore_total == 16_675_092
    assert operators["layer_norm"].fvcore_total == 13_900_900 + 5_353_740


def authors_total(profile: Profile) -> int:
    """fvcore's total of the authors' code: it does not see their norms over channels, nor our kind of pooling."""
    unseen = re.compile(r"stem\.norm|stages\.\d\.downsample\.norm|head\.global_pool\.pool")
    return profile.fvcore_total - sum(m.own_fvcore_total for m in profile.modules if unseen.fullmatch(m.name))


@pytest.mark.parametrize(
    ("size", "total"),
    [
        (SIZE, 8_735_352_362),
        ((3, 384, 384), 25_669_295_022),
        pytest.param((3, 192, 256), 8_557_100_334, marks=pytest.mark.slow),  # one more trace of the same network
    ],
)
def test_totals_of_slak_tiny_at_several_sizes(size, total):
    assert authors_total(profiled("slak_tiny", size)) == total


@pytest.mark.parametrize(
    ("name", "arguments", "params", "total"),
    [
        pytest.param("slak_tiny_nodecom", {}, 60_818_614, "13.8248", marks=pytest.mark.slow),  # as the next but wider
        ("slak_tiny_nodecom_merged", {}, 60_577_702, None),
        ("slak_tiny_w1", {}, 30_816_232, "5.4426"),
        ("slak_tiny_w1", {"decompose": False}, 38_605_768, "9.3722"),
        ("slak_convnext_tiny", {}, 28_595_752, "4.4706"),
        ("slak_tiny", {"merged": True}, 50_445_718, "8.6492"),
        ("slak_small", {"merged": True}, 90_604_240, None),
        ("slak_base", {"merged": True}, 157_247_532, None),
    ],
)
def test_costs_of_other_forms(name, arguments, params, total):
    model = zoo.create_model(name, pretrained=False, device="meta", **arguments)
    assert sum(p.numel() for p in model.parameters()) == params
    if total is not None:
        assert f"{authors_total(zoo.profile(model)) / 1e9:.4f}" == total


# ------------------------------------------------------------------------------------------------------------ effective


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "slak_tiny" else pytest.mark.slow) for name in SPARSE]
)
def test_costs_at_the_papers_sparsity(name):
    params, macs = SPARSE[name]
    effective = zoo.profile(name, sparsity=0.4).effective
    assert effective.rule == "uniform"
    assert effective.density == pytest.approx(0.6)
    assert effective.params == params
    weights = DENSE[name][1]
    assert params == round(DENSE[name][0] - 0.4 * weights)
    assert f"{effective.macs / 1e9:.2f}" == f"{macs:.2f}"
    info = zoo.model_info(name)
    assert round(params / 1e6) == info.reported.params / 1e6  # the authors', in millions
    assert info.reported.macs == pytest.approx(effective.macs, rel=0.05)  # by SNIP's densities, which we do not know
    assert f"{params:,} parameters and {macs:.2f} G MACs" in info.note


def test_erdos_renyi_spreads_the_zeros_otherwise():
    effective = zoo.profile("slak_tiny", sparsity=0.4, sparsity_rule="erk").effective
    assert effective.rule == "erk"
    assert effective.params == 30_473_228
    assert f"{effective.macs / 1e9:.2f}" == "7.15"


@torch.no_grad()
def sparse_model() -> tuple[torch.nn.Module, int]:
    """A small SLaK with three quarters of its MLPs' and a quarter of its kernels' weights at zero; and how many."""
    model = zoo.create_model("slak_tiny", pretrained=False, **SMALL)
    zeros = 0
    for name, weight in model.named_parameters():
        share = 0.75 if ".mlp." in name else 0.25 if ".large_kernel." in name else 0
        if weight.ndim > 1 and share:
            count = round(share * weight.numel())
            weight.view(-1)[:count] = 0
            zeros += count
    return model, zeros


def test_zeros_of_a_model_are_counted():
    model, zeros = sparse_model()
    profile = zoo.profile(model, (3, 64, 64))
    assert profile.effective.rule == "zeros"
    assert profile.effective.params == profile.params - zeros
    operators = {operator.name: operator.macs for operator in profile.operators}
    dense = {m.name: m.own_macs for m in profile.modules}
    kernels = sum(macs for name, macs in dense.items() if ".large_kernel." in name)
    mlps = sum(macs for name, macs in dense.items() if ".mlp." in name)
    assert 0 < kernels < operators["convolution"]
    expected = profile.macs - 0.25 * kernels - 0.75 * mlps
    assert profile.effective.macs == pytest.approx(expected, rel=1e-3)  # whole numbers of weights
    fast = zoo.profile(zoo.optimize_for_inference(model), (3, 64, 64))  # its kernels are called from above them
    assert fast.effective.macs < 0.75 * fast.macs


def test_zeros_of_a_checkpoint_are_counted(tmp_path, capsys):
    model, zeros = sparse_model()
    folder = zoo.save_pretrained(model, tmp_path / "sparse")
    profile = zoo.profile(f"local-dir:{folder}", (3, 64, 64), checkpoint_path=folder)
    assert profile.effective == zoo.profile(model, (3, 64, 64)).effective
    assert zoo.profile(f"local-dir:{folder}", (3, 64, 64)).effective is None
    assert f"{profile.effective.params:,} parameters" in profile.summary()
    assert "zeros (counted in the weights)" in profile.summary()

    command = ["profile", f"local-dir:{folder}", "--input-size", "3", "64", "64"]
    assert cli.main([*command, "--checkpoint", str(folder), "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out)
    assert facts["effective"]["params"] == facts["params"] - zeros
    assert facts["effective"]["rule"] == "zeros"
    assert cli.main([*command, "--sparsity", "0.5", "--sparsity-rule", "er"]) == 0
    assert "MACs with 50.0% zeros (stated, by the rule er)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sparsity": 1.0}, ConfigError, "from 0 up to, but not, 1"),
        ({"sparsity": "0.4"}, ConfigError, "from 0 up to, but not, 1"),
        ({"sparsity": 0.4, "sparsity_rule": "erq"}, ConfigError, "Did you mean er"),
        ({"sparsity": 0.4, "checkpoint_path": "x"}, ConfigError, "one of the two"),
        ({"checkpoint_path": "nowhere.pth"}, CheckpointError, "There is no checkpoint 'nowhere.pth'"),
    ],
)
def test_what_cannot_be_counted(arguments, error, message):
    with pytest.raises(error, match=message):
        zoo.profile("slak_tiny", **arguments)
    if arguments == {"checkpoint_path": "nowhere.pth"}:
        with pytest.raises(ConfigError, match="a module has its weights"):
            zoo.profile(torch.nn.Identity(), SIZE, **arguments)
