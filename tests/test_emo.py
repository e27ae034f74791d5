"""EMO and EMOv2 against their authors' code, and what is theirs alone; the shared contract is tested elsewhere."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from timm.layers import set_fused_attn
from torch import nn

import zoo
from tests import golden
from tests.models import each_model, set_to_random
from tests.profiles import profiled
from zoo.config import load_config
from zoo.errors import ConfigError
from zoo.models.emo import attend, from_windows, pad_to_windows, to_windows
from zoo.training import TrainingConfig
from zoo.training.config import OptimizerConfig
from zoo.training.loop import make_optimizer

QUICK = ("emo_1m", "emo_1m@192x256", "emo2_1m", "emo2_1m_256")


def small(name: str, **arguments):
    return zoo.create_model(name, pretrained=False, **arguments)


def images(batch: int = 2, height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------------------- fidelity


@pytest.mark.parametrize(
    "file",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in golden.names("emo")],
)
def test_golden_parity(file):  # slow: larger variants and inputs
    reference = golden.load("emo", file)
    model = small(file.split("@")[0])
    report = zoo.load_checkpoint(model, golden.state_dict(reference))
    assert not report.dropped
    model.double().eval()
    with torch.no_grad():
        batch = golden.inputs(reference)["input"].double()
        features, maps = model.forward_intermediates(batch, norm=False)
        outputs = {
            "stage0": model.stem(batch),
            **{f"stage{i}": stage for i, stage in enumerate(maps, start=1)},
            "features": model.head.norm(features),
            "logits": model(batch),
        }
    assert reference["precision"] == "float64"
    assert max(golden.errors(reference, outputs).values()) < 1e-9


# parameters, and fvcore's total on the authors' code
COSTS = {
    "emo_1m": (1_361_168, 260_843_664),
    "emo_2m": (2_377_472, 439_363_064),
    "emo_5m": (5_108_848, 902_583_776),
    "emo_6m": (6_168_496, 960_752_512),
    "emo2_1m": (1_460_844, 284_756_712),
    "emo2_2m": (2_384_312, 487_454_824),
    "emo2_5m": (5_126_440, 1_035_473_760),
    "emo2_20m": (20_195_208, 4_017_165_376),
    "emo2_50m": (49_815_560, 8_804_167_168),
    "emo2_1m_256": (1_460_844, 392_185_632),
    "emo2_5m_512": (5_126_440, 5_627_331_840),
}


def test_the_index_holds_the_costs_of_the_authors_code():
    for name, (params, _) in COSTS.items():
        info = zoo.model_info(name)
        assert info.params == params, name
        if name in golden.names("emo"):
            theirs = golden.load("emo", name)["macs_by_operator"]
            assert info.macs == theirs["conv"] + theirs["matmul"] + theirs["linear"], name


@pytest.mark.parametrize("name", each_model(list(COSTS)))
def test_costs_are_those_of_the_authors_code(name):
    profile = profiled(name, zoo.model_info(name).input_size)
    counted = {operator.name: operator.fvcore_total for operator in profile.operators}
    pooling = counted.pop("adaptive_avg_pool2d")  # the authors average by `mean`, which fvcore does not count
    assert (profile.params, profile.fvcore_total - pooling) == COSTS[name]
    if name in golden.names("emo"):
        theirs = golden.load("emo", name)["macs_by_operator"]
        assert profile.macs == theirs["conv"] + theirs["matmul"] + theirs["linear"]
        names = {"conv": "convolution", "matmul": "scaled_dot_product_attention"}
        assert counted == {names.get(kind, kind): macs for kind, macs in theirs.items()}


def test_what_is_padded_is_not_widened():
    """Where windows do not divide the map, the authors widen the padding, too, and crop behind; we crop before."""
    profile = profiled("emo_1m", (3, 192, 256))
    theirs = golden.load("emo", "emo_1m@192x256")["macs_by_operator"]
    # stage 3: 12x16 padded to 14x21, 7 blocks from 80 channels to 240; stage 4: 6x8 padded to 7x14, 2 blocks
    saved = 7 * (14 * 21 - 12 * 16) * 80 * 240 + 2 * (7 * 14 - 6 * 8) * 168 * 588
    assert profile.macs == theirs["conv"] + theirs["matmul"] + theirs["linear"] - saved


def test_every_variant_is_here():
    forms = {"emo2_1m_512", "emo2_2m_256", "emo2_2m_512", "emo2_5m_256", "emo2_20m_256"}  # of the same parameters
    assert {*COSTS, *forms, "emo_test", "emo2_test"} == set(zoo.list_models(family="emo"))
    for name in forms:
        info, whole = zoo.model_info(name), zoo.model_info(name.rpartition("_")[0])
        assert info.params == whole.params
        assert info.macs > whole.macs


def test_training_checkpoints_are_unwrapped(tmp_path):
    """The authors' training checkpoints hold `net` and, averaged, `net_E`."""
    averaged = golden.state_dict(golden.load("emo", "emo_1m"))
    raw = {key: torch.zeros_like(tensor) for key, tensor in averaged.items()}
    torch.save({"net": raw, "net_E": averaged, "epoch": 3}, tmp_path / "net.pth")
    model = zoo.create_model("emo_1m", checkpoint_path=tmp_path / "net.pth")
    assert torch.equal(model.head.fc.weight, averaged["head.weight"])
    torch.save({"net": averaged, "epoch": 3}, tmp_path / "net.pth")
    model = zoo.create_model("emo_1m", checkpoint_path=tmp_path / "net.pth", num_classes=5)
    assert torch.equal(model.stem.conv.weight, averaged["stage0.0.convs.0.0.weight"])


# -------------------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("remote", [True, False])
def test_windows(remote):
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(9), indexing="ij")
    grid = torch.stack([rows, columns]).float()[None].repeat(2, 1, 1, 1)  # each pixel says where it is
    windows = to_windows(grid, 3, 1, remote)
    assert windows.shape == (2 * 2 * 3, 1, 9, 2)
    token_rows, token_columns = windows[3 + 1, 0].T.view(2, 3, 3)  # of the first image, the window in row 1, column 1
    expected = ([1, 3, 5], [1, 4, 7]) if remote else ([3, 4, 5], [3, 4, 5])
    assert token_rows[:, 0].tolist() == expected[0]
    assert token_columns[0].tolist() == expected[1]
    assert torch.equal(from_windows(windows, 3, 6, 9, remote), grid)
    assert torch.equal(from_windows(windows, 3, 5, 7, remote), grid[:, :, :5, :7])


def test_padding_is_only_where_it_is_needed():
    x = images(1, 14, 21)
    assert pad_to_windows(x, 7) is x
    padded = pad_to_windows(x, 8)
    assert padded.shape == (1, 3, 16, 24)
    assert not padded[:, :, 14:].any()
    assert not padded[:, :, :, 21:].any()


def test_attention_by_hand():
    q, k = torch.randn(2, 5, 1, 4, 8).unbind(0)
    v = torch.randn(5, 1, 4, 20)  # wider than queries and keys
    weights = torch.einsum("ghnd,ghmd->ghnm", q, k).div(8**0.5).exp()
    expected = (weights / weights.sum(-1, keepdim=True)) @ v
    for fused in (True, False):
        torch.testing.assert_close(attend(q, k, v, fused), expected)


# ---------------------------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("name", ["emo_test", "emo2_test"])
@pytest.mark.parametrize("size", [(64, 64), (33, 95), (1, 1), (100, 30)])
def test_any_size(name, size):
    model = small(name).eval()
    height, width = size
    maps = model.forward_intermediates(images(1, height, width), intermediates_only=True)
    for level, found in enumerate(maps, start=2):
        assert found.shape[2:] == (-(-height // 2**level), -(-width // 2**level))
    assert model(images(1, height, width)).isfinite().all()


@pytest.mark.parametrize("name", ["emo_1m", "emo2_1m"])
def test_initialisation(name):
    torch.manual_seed(0)
    model = small(name)
    assert model.head.fc.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not model.head.fc.bias.any()
    conv = model.stages[3].blocks[1].expand.v  # PyTorch's own: uniform within 1 / sqrt(fan in)
    fan_in = conv.in_channels
    assert conv.weight.abs().max() <= fan_in**-0.5
    assert conv.weight.std().item() == pytest.approx(fan_in**-0.5 / 3**0.5, rel=0.02)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-6}
    scales = [p for key, p in model.named_parameters() if key.endswith("gamma")]
    assert len(scales) == (15 if name == "emo2_1m" else 0)  # one in every block
    assert all((p == 1e-6).all() for p in scales)


def test_stochastic_depth_grows_over_the_blocks():
    model = small("emo_1m", drop_path_rate=0.14, device="meta")
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.01 * i for i in range(15)])


@pytest.mark.parametrize("name", ["emo_test", "emo2_test", "emo2_1m"])
def test_fast_form(name):
    model = set_to_random(small(name))
    fast = zoo.optimize_for_inference(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    assert not any(key.endswith("gamma") for key in fast.state_dict())
    # one window covers the last map or not; padded in either direction or neither
    for size in ((64, 64), (96, 96), (192, 100)):
        expected, found = model(images(2, *size)), fast(images(2, *size))
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    pairs = zip(model.forward_intermediates(images())[1], fast.forward_intermediates(images())[1], strict=True)
    for expected, found in pairs:
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["emo_test", "emo2_test"])
def test_the_fast_form_exports_and_compiles(name):
    model = small(name).eval()
    fast = zoo.optimize_for_inference(model)
    batch = torch.export.Dim("batch", min=1, max=16)
    exported = torch.export.export(fast, (images(2),), dynamic_shapes=({0: batch},)).module()
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    for count in (1, 3):
        torch.testing.assert_close(exported(images(count)), model(images(count)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled(images(2)), model(images(2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["emo_test", "emo2_test"])
def test_fused_and_plain_attention_agree(name):
    model = small(name).eval()
    set_fused_attn(False)
    try:
        plain = small(name).eval()
    finally:
        set_fused_attn(True)
    plain.load_state_dict(model.state_dict())
    assert plain.stages[2].blocks[1].expand.fused_attn != model.stages[2].blocks[1].expand.fused_attn
    torch.testing.assert_close(plain(images()), model(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depths": (1, 1)}, "depths has 2 stages and dims has 4"),
        ({"head_dim": (None, None, 7, 8)}, "width 32 cannot be split into heads of 7"),
        ({"head_dim": (8, 8)}, "head_dim has 2 items for 4 stages"),
        ({"mlp_ratio": (1, 1, 1.1, 1)}, "hidden width of 35 cannot be split into 4 heads"),
        ({"mlp_ratio": 0}, "mlp_ratio must be numbers above zero"),
        ({"kernel_size": 4}, "kernel_size must be odd"),
        ({"attention": "remot"}, "Did you mean remote"),
        ({"window_size": 0}, "window_size must be a whole number from 1"),
        ({"layer_scale_init": "a"}, "layer_scale_init must be a number or None"),
        ({"layer_scale_init": float("nan")}, "layer_scale_init must be a number or None"),
        ({"drop_rate": 1.0}, "drop_rate must be a number from 0"),
        ({"windw_size": 7}, "Did you mean window_size"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        small("emo2_test", **arguments)


@pytest.mark.parametrize(
    ("name", "lr", "batch", "drop_path", "floor"),
    [
        ("emo_1m", 6e-3, 2048, 0.04036, 1e-6),
        ("emo_6m", 6e-3, 2048, 0.05, 1e-6),
        ("emo2_1m", 3e-3, 1024, 0.04036, 5e-7),
        ("emo2_20m_256", 3e-3, 1024, 0.1, 5e-7),
        ("emo2_50m", 3e-3, 1024, 0.2, 5e-7),
        ("emo2_5m_512", 3e-3, 1024, 0.05, 5e-7),
    ],
)
def test_recipes_are_the_authors(name, lr, batch, drop_path, floor):
    config = load_config(TrainingConfig, f"configs/vision/imagenet1k/{name}.yaml")
    assert (config.model.name, config.model.args) == (name, {"drop_path_rate": drop_path})
    assert tuple(config.data.input_size) == zoo.model_info(name).input_size
    assert (config.optimizer.opt, config.optimizer.lr, config.optimizer.clip_grad) == ("adamw", lr, 5.0)
    assert (config.scheduler.epochs, config.scheduler.warmup_epochs) == (300, 20)
    assert (config.scheduler.warmup_lr, config.scheduler.min_lr) == (floor, floor)
    assert (config.train.global_batch_size, config.train.model_ema_decay) == (batch, 0.9998)
    assert (config.augment.mixup, config.augment.cutmix, config.augment.reprob) == (0, 0, 0)


@pytest.mark.parametrize("name", ["emo2_1m", "emo2_2m", "emo2_5m", "emo2_5m_512"])
def test_recipes_with_a_teacher_are_the_authors(name):
    """Cross-entropy + 5 * KL at temperature 1, beside what the model learns without a teacher."""
    plain = load_config(TrainingConfig, f"configs/vision/imagenet1k/{name}.yaml")
    config = load_config(TrainingConfig, f"configs/vision/distill/imagenet1k_{name}.yaml")
    assert (config.distill.kind, config.distill.tau) == ("soft", 1.0)
    assert config.distill.teacher == "timm/tresnet_v2_l.miil_in21k_ft_in1k"
    share = 1 - config.distill.alpha  # of the authors' loss: with it shrink the bound and the epsilon
    assert config.distill.alpha / share == pytest.approx(5)
    ours, theirs = config.optimizer, plain.optimizer
    assert (theirs.clip_grad, theirs.eps) == (5.0, 1e-8)
    assert (ours.clip_grad, ours.eps) == (pytest.approx(share * 5.0), pytest.approx(share * 1e-8))
    assert dataclasses.replace(ours, clip_grad=5.0, eps=1e-8) == theirs
    for part in ("model", "data", "augment", "loss", "scheduler", "train"):
        assert getattr(config, part) == getattr(plain, part)


def test_a_share_of_the_loss_takes_the_steps_of_the_whole_with_a_share_of_bound_and_epsilon():
    """Why the recipes with a teacher may weigh labels and teacher by 1/6 and 5/6 in place of 1 and 5."""
    finals = []
    for share in (1.0, 1 / 6):
        torch.manual_seed(0)
        layer = torch.nn.Linear(16, 8).double()
        config = OptimizerConfig(opt="adamw", lr=1e-2, eps=share * 1e-3, weight_decay=0.05)  # an epsilon that matters
        optimizer = make_optimizer(layer, config)
        for _ in range(20):
            optimizer.zero_grad()
            logits = layer(torch.randn(4, 16).double())
            (share * 40 * logits.square().mean()).backward()
            torch.nn.utils.clip_grad_norm_(layer.parameters(), share * 5.0)
            optimizer.step()
        finals.append(layer.weight.detach())
    torch.testing.assert_close(finals[0], finals[1], rtol=1e-6, atol=1e-8)
