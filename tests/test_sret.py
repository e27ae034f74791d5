"""SReT against its authors' code, and what is particular to it; the shared contract is tested elsewhere."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import load_file
from timm.layers import set_fused_attn
from torch import nn

import zoo
from tests import golden
from tests.models import each_model, set_to_random
from tests.profiles import profiled
from zoo.config import load_config
from zoo.errors import ConfigError
from zoo.models.sret import SReT, fit_groups, fixed_order
from zoo.training import TrainingConfig

QUICK = ("sret_t", "sret_t@192x192", "sret_t_wo_slice", "sret_lt")
PERMUTATIONS = {"(5*i+3)%N": lambda n: (5 * torch.arange(n) + 3) % n, "i": torch.arange}


def small(name: str = "sret_test", **arguments):
    return zoo.create_model(name, pretrained=False, **arguments)


def images(batch: int = 2, height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------------------- fidelity


@pytest.mark.parametrize(
    "file",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in golden.names("sret")],
)
def test_golden_parity(file):  # slow: the small model, or the large at up to 512 pixels, once more each
    reference = golden.load("sret", file)
    model = small(file.split("@")[0], img_size=tuple(reference["inputs"]["input"]["shape"][2:]))
    report = zoo.load_checkpoint(model, golden.state_dict(reference))
    assert not report.dropped
    if "permutation" in reference:
        model.set_slicing(PERMUTATIONS[reference["permutation"]])
    model.double().eval()

    first, steps = model.stages[0].blocks[0], []
    for part in (first.shared, *first.projections):
        part.register_forward_hook(lambda _module, _inputs, output: steps.append(output))
    with torch.no_grad():
        batch = golden.inputs(reference)["input"].double()
        features, maps = model.forward_intermediates(batch)
        outputs = {
            "stem": model.stem.convs(batch),
            "features": features,
            "pre_logits": model.forward_head(features, pre_logits=True),
            "logits": model(batch),
            **{f"stage{i}": stage for i, stage in enumerate(maps, start=1)},
            **dict(
                zip(("stage1_shared0", "stage1_proj0", "stage1_shared0_second", "stage1_proj1"), steps, strict=False)
            ),
        }
    assert reference["precision"] == "float64"
    assert max(golden.errors(reference, outputs).values()) < 1e-9


# parameters, MACs and what fvcore counts in the authors' code, where it was run
COSTS = {
    "sret_t": (4_755_979, 1_112_444_672, 1_121_665_792),
    "sret_lt": (4_988_024, 1_164_477_184, 1_173_698_304),
    "sret_lt_g16": (4_988_024, 1_224_537_856, 1_233_758_976),
    "sret_s": (20_899_692, 4_172_819_112, 4_190_973_192),
    "sret_t_wo_slice": (4_755_979, 1_365_682_944, 1_374_904_064),
    "sret_lt_wo_slice": (4_988_024, 1_417_715_456, 1_426_936_576),
    "sret_s_wo_slice": (20_899_692, 4_671_381_960, 4_689_536_040),
    "sret_t_wo_slice_384": (4_853_259, 6_408_361_984, 6_435_458_304),
    "sret_s_wo_slice_384": (21_091_212, 18_443_154_240, 18_496_500_120),
    "sret_s_wo_slice_512": (21_317_004, 42_671_708_352, None),
}


def test_the_index_holds_the_costs_of_the_authors_code():
    for name, (params, macs, fvcore_total) in COSTS.items():
        info = zoo.model_info(name)
        assert (info.params, info.macs) == (params, macs), name
        assert fvcore_total in (None, info.fvcore_total), name


@pytest.mark.parametrize("name", each_model(list(COSTS)))
def test_costs_are_those_of_the_authors_code(name):
    params, macs, fvcore_total = COSTS[name]
    profile = profiled(name, zoo.model_info(name).input_size)
    assert (profile.params, profile.macs) == (params, macs)
    assert fvcore_total in (None, profile.fvcore_total)


def test_a_shared_block_counts_its_macs_at_every_pass_and_its_parameters_once():
    costs = {passes: zoo.profile(small(passes=passes), (3, 64, 64)) for passes in (1, 2, 3)}
    parts = {module.name: module for module in costs[2].modules}
    tokens, dim = 64, 32
    weights = 4 * dim**2 + 2 * dim * int(3.6 * dim)  # of attention's and the MLP's matrices
    attention = 2 * tokens**2 * dim
    # first pass in 8 slices, second in 2
    assert parts["stages.0.blocks.0.shared"].macs == 2 * tokens * weights + attention // 8 + attention // 2
    assert parts["stages.0.blocks.0.shared"].params == weights + 9 * dim + int(3.6 * dim) + 4
    projections = sum(parts[f"stages.{i}.blocks.0.projections.0"].params for i in range(3))
    assert costs[3].params - costs[2].params == costs[2].params - costs[1].params == projections
    assert costs[3].macs - costs[2].macs > projections * 4


def test_no_tensor_is_stored_twice(tmp_path):
    model = small("sret_t")
    tensors = model.state_dict()
    assert sum(tensor.numel() for tensor in tensors.values() if tensor.dtype.is_floating_point) == (
        4_755_979 + 2 * (32 + 64 + 64)  # and the running means and variances
    )
    folder = zoo.save_pretrained(model, tmp_path / "saved")
    assert load_file(folder / "model.safetensors").keys() == tensors.keys()
    again = zoo.create_model(f"local-dir:{folder}").eval()
    torch.testing.assert_close(again(images()), model.eval()(images()), rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def published(name: str = "sret_t", alike: bool = True) -> dict[str, torch.Tensor]:
    """A checkpoint in the authors' layout; `alike`: both places of a shared block hold the same, as in real ones."""
    tensors = golden.state_dict(golden.load("sret", name))
    for key in tensors:
        parts = key.split(".")
        if alike and parts[0] == "transformers" and int(parts[3]) % 4 == 0:
            tensors[key] = tensors[".".join([*parts[:3], str(int(parts[3]) + 2), *parts[4:]])]
    return tensors


def test_the_second_place_of_a_shared_block_counts(caplog):
    model = small("sret_t")
    with caplog.at_level(logging.WARNING):
        report = zoo.load_checkpoint(model, published())
    assert not report.dropped
    assert "first place" not in caplog.text
    expected = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    differing = published()
    differing["transformers.1.blocks.8.attn.qkv.weight"] = torch.zeros(384, 128)
    with caplog.at_level(logging.WARNING):
        zoo.load_checkpoint(model, differing)
    assert "1 shared blocks (transformers.1.blocks.8 ...)" in caplog.text
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())


def test_wrapped_checkpoints_and_other_classifiers(tmp_path):
    torch.save({"state_dict": {f"module.{key}": value for key, value in published("sret_lt").items()}}, tmp_path / "f")
    model = zoo.create_model("sret_lt", checkpoint_path=tmp_path / "f", num_classes=7, in_chans=1)
    assert set(model.load_report.dropped) == {"head.fc.weight", "head.fc.bias"}
    assert model(images()[:, :1]).shape == (2, 7)
    maps = zoo.create_model("sret_lt", checkpoint_path=tmp_path / "f", features_only=True, out_indices=(0, 2))(images())
    assert [m.shape[1:] for m in maps] == [(64, 8, 8), (256, 2, 2)]


def test_the_position_table_of_a_checkpoint_is_resized():
    small_one, large_one = small("sret_t_wo_slice"), small("sret_t_wo_slice", img_size=(384, 256))
    zoo.load_checkpoint(small_one, published("sret_t_wo_slice"))
    zoo.load_checkpoint(large_one, published("sret_t_wo_slice"))
    assert large_one.stem.pos_embed.shape == (1, 64, 48, 32)
    batch = images(1, 384, 256)
    with torch.no_grad():  # the table of 224 pixels, resized as it is used, is the same
        torch.testing.assert_close(small_one.eval()(batch), large_one.eval()(batch))
    zoo.load_checkpoint(small_one, large_one.state_dict())  # our own layout, and back to a smaller table
    assert small_one.stem.pos_embed.shape == (1, 64, 28, 28)


# -------------------------------------------------------------------------------------------------------------- slicing


def test_evaluation_repeats_itself_and_training_draws_anew():
    model = small().eval()
    with torch.no_grad():
        assert torch.equal(model(images()), model(images()))
        model.train()
        for module in model.modules():  # so that nothing else changes
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        assert not torch.equal(model(images()), model(images()))
        model.set_slicing("fixed")
        fixed = model(images())
        assert torch.equal(fixed, model(images()))
        assert torch.equal(fixed, model.eval()(images()))
        model.set_slicing("random")
        assert not torch.equal(model(images()), model(images()))
        torch.manual_seed(3)
        drawn = model(images())
        torch.manual_seed(3)
        assert torch.equal(drawn, model(images()))
        model.set_slicing("auto")
        assert torch.equal(fixed, model(images()))


def test_the_fixed_permutation_follows_from_the_seed():
    tokens = torch.empty(1, 784, 3)
    orders = [fixed_order(tokens, seed) for seed in range(4)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(784))
        # half of each slice comes from each half of the tokens, about: the standard deviation is 7
        assert 150 < (order[:392] < 392).sum() < 242
    assert len({tuple(order.tolist()) for order in orders}) == 4
    with torch.no_grad():
        model = small(slice_seed=5).eval()
        other = small(slice_seed=6).eval()
        other.load_state_dict(model.state_dict())
        assert not torch.equal(model(images()), other(images()))


def test_a_permutation_of_ones_own():
    seen = []

    def halves(tokens: int) -> torch.Tensor:
        seen.append(tokens)
        return torch.arange(tokens).view(2, -1).T.flatten()  # even slots from the first half, odd from the second

    model = small().eval()
    model.set_slicing(halves)
    with torch.no_grad():
        logits = model(images())
        assert seen == [64]  # one stage slices its second pass, and it has one block
        model.set_slicing(lambda tokens: torch.arange(tokens).roll(3))
        assert not torch.equal(model(images()), logits)
        for wrong in (lambda tokens: torch.zeros(tokens), lambda tokens: torch.arange(tokens + 1)):
            model.set_slicing(wrong)
            with pytest.raises(ConfigError, match="permutation of 0 to 63"):
                model(images())
    with pytest.raises(ConfigError, match="Did you mean fixed"):
        model.set_slicing("fixd")


def test_only_which_tokens_share_a_slice_matters():
    model = small().double().eval()
    shuffled = torch.cat([torch.randperm(32), 32 + torch.randperm(32)])
    with torch.no_grad():
        model.set_slicing(torch.arange)
        expected = model(images().double())
        model.set_slicing(lambda _: shuffled)
        torch.testing.assert_close(model(images().double()), expected)


def test_tokens_that_do_not_divide_are_cut_into_fewer_slices():
    assert [fit_groups(784, 8), fit_groups(49, 8), fit_groups(35, 8), fit_groups(13, 4), fit_groups(4, 8)] == [
        8,
        7,
        7,
        1,
        4,
    ]
    model = small().eval()
    for height, width in ((40, 56), (33, 95), (8, 8)):
        maps = model.forward_intermediates(images(1, height, width), intermediates_only=True)
        assert maps[0].shape[2:] == (-(-height // 8), -(-width // 8))
        assert model(images(1, height, width)).isfinite().all()


# ---------------------------------------------------------------------------------------------------------------- model


def test_initialisation():
    torch.manual_seed(0)
    model = small("sret_t", num_classes=10)
    assert abs(model.stem.pos_embed.std().item() - 0.02) < 1e-3
    coefficients = [p for name, p in model.named_parameters() if name.endswith("coefficients")]
    assert sum(p.numel() for p in coefficients) == 80
    assert all((p == 1).all() for p in coefficients)
    linear = model.stages[1].blocks[0].shared.attn.qkv  # PyTorch's own: uniform within 1 / sqrt(fan in)
    assert linear.weight.abs().max() <= 128**-0.5
    assert linear.weight.std().item() == pytest.approx(128**-0.5 / 3**0.5, rel=0.02)
    assert linear.bias.std() > 0


def test_stochastic_depth_is_the_authors():
    model = small("sret_s", drop_path_rate=0.1, device="meta")
    rates = [[getattr(block.shared.drop_path, "drop_prob", 0.0) for block in stage.blocks] for stage in model.stages]
    expected = [[0, 0.005], [0.02, 0.025, 0.03, 0.035, 0.04], [0.07, 0.075, 0.08]]
    assert [rate for stage in rates for rate in stage] == pytest.approx([rate for stage in expected for rate in stage])


@pytest.mark.parametrize("passes", [1, 3])
def test_other_numbers_of_passes(passes):
    model = small(passes=passes, num_classes=4).eval()
    assert model(images()).shape == (2, 4)
    calls = []
    model.stages[1].blocks[0].shared.register_forward_hook(lambda *_: calls.append(1))
    model(images())
    assert len(calls) == passes


def test_checkpointed_gradients_use_the_same_permutations():
    model = small().double().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        torch.manual_seed(7)
        model(images().double()).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("name", ["sret_test", "sret_t_wo_slice"])
def test_fast_form(name):
    model = set_to_random(small(name))
    fast = zoo.optimize_for_inference(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    assert not any(key.endswith("coefficients") for key in fast.state_dict())
    for size in ((64, 64), (96, 72)):
        expected, found = model(images(2, *size)), fast(images(2, *size))
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    fast.set_slicing(torch.arange)
    model.set_slicing(torch.arange)
    torch.testing.assert_close(fast(images()), model(images()), rtol=1e-4, atol=1e-5)


def test_fused_and_plain_attention_agree():
    model = small().eval()
    set_fused_attn(False)
    try:
        plain = small().eval()
    finally:
        set_fused_attn(True)
    plain.load_state_dict(model.state_dict())
    assert plain.stages[0].blocks[0].shared.attn.fused_attn != model.stages[0].blocks[0].shared.attn.fused_attn
    torch.testing.assert_close(plain(images()), model(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depths": (1, 1)}, "depths has 2 stages and dims has 3"),
        ({"passes": 0}, "passes must be a whole number from 1"),
        ({"num_heads": (3, 4, 8)}, "width 32 cannot be split into 3 heads"),
        ({"dims": (32, 48, 96)}, "multiple of the one before"),
        ({"groups": ((8, 4),)}, "a whole number above zero for each of 3 stages"),
        ({"groups": 8}, "one row for each pass"),
        ({"slicing": "auot"}, "Did you mean auto"),
        ({"slice_seed": -1}, "slice_seed must be a whole number from 0"),
        ({"mlp_ratio": 0}, "mlp_ratio must be numbers above zero"),
        ({"drop_path_rate": 1}, "drop_path_rate must be a number from 0"),
        ({"img_size": (64,)}, "img_size must be a whole number"),
        ({"global_pool": ""}, "use it with num_classes=0"),
        ({"pases": 3}, "Did you mean passes"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        small(**arguments)


@pytest.mark.parametrize(
    ("name", "drop_path"),
    [
        ("sret_t", 0.1),
        ("sret_lt", 0.1),
        ("sret_lt_g16", 0.1),
        ("sret_s", 0.2),
        ("sret_t_wo_slice", 0.0),
        ("sret_lt_wo_slice", 0.0),
        ("sret_s_wo_slice", 0.2),
    ],
)
def test_recipes_hold_the_authors_stochastic_depth(name, drop_path):
    config = load_config(TrainingConfig, f"configs/vision/imagenet1k/{name}.yaml")
    assert config.model.name == name
    assert config.model.args == ({"drop_path_rate": drop_path} if drop_path else {})
    assert (config.optimizer.opt, config.optimizer.lr, config.train.global_batch_size) == ("adamw", 1e-3, 1024)
    assert isinstance(zoo.create_model(name, device="meta", **config.model.args), SReT)
