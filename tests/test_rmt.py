"""RMT against its authors' code, what it costs, and what is particular to it; the shared contract is elsewhere."""

import logging
import math
from typing import Any

import pytest
import torch
from timm.layers import set_fused_attn
from torch import nn

import zoo
from tests import golden
from zoo.config import load_config
from zoo.errors import CheckpointError, ConfigError, DownloadError
from zoo.models.rmt import RMT, RelativePositions, relative_positions
from zoo.registry import get_entry
from zoo.training import TrainingConfig


def tiny(name: str = "rmt_test", **arguments: Any) -> Any:
    """A small model that computes as the one called `name` does."""
    sizes = {"depths": (1, 1, 2, 1), "dims": (16, 32, 64, 64), "num_heads": (2, 2, 4, 4), "head_hidden_size": 128}
    return zoo.create_model(name, pretrained=False, **{**sizes, **arguments})


# -------------------------------------------------------------------------------------------------------------- goldens


def golden_params() -> list:
    """Files of few layers always: they are the sharp ones (see their notes). The whole depth with the slow tests."""
    return [pytest.param(name, marks=() if "1121layers" in name else pytest.mark.slow) for name in golden.names("rmt")]


def with_golden_logarithm(module: nn.Module, inputs: Any, tables: list[torch.Tensor]) -> list[torch.Tensor]:
    """Decays of the first head by the logarithm of 3/4 that the golden files were made with.

    Decays are logarithms in float32, as published, whose last bit depends on the processor: there it was one below the
    nearest, here it may be another. That alone is worth 5e-9.
    """
    sin, cos, *decays = tables
    for decay in decays:
        here = decay[0, 0, 1].item()
        assert here == pytest.approx(math.log(0.75), rel=2**-23)
        decay[0] *= -0.28768205642700195 / here
    return [sin, cos, *decays]


@pytest.mark.parametrize("file", golden_params())
def test_golden_parity(file):
    reference = golden.load("rmt", file)
    model = zoo.create_model(file.split("@")[0], pretrained=False, **reference.get("overrides", {}))
    report = zoo.load_checkpoint(model, golden.state_dict(reference))
    assert not report.dropped
    assert not report.fresh
    model.double().eval()
    for module in model.modules():
        if isinstance(module, RelativePositions):
            module.register_forward_hook(with_golden_logarithm)

    with torch.no_grad():
        images = golden.inputs(reference)["input"].double()
        features, maps = model.forward_intermediates(images)
        outputs = {
            "logits": model(images),
            "prelogits": model.forward_head(features, pre_logits=True),
            "stem": model.stem(images).permute(0, 2, 3, 1),
            "features": features.permute(0, 2, 3, 1),
            **{f"stage{i}": stage.permute(0, 2, 3, 1) for i, stage in enumerate(maps, start=1)},
        }
    assert reference["precision"] == "float64"
    assert outputs.keys() == reference["outputs"].keys()
    assert max(golden.errors(reference, outputs).values()) < 1e-9


@pytest.mark.parametrize("file", [name for name in golden.names("rmt") if "@" in name])
def test_costs_are_the_authors(file):
    """Convolutions, linear layers, attention and each kind of norm, as fvcore counts them in the authors' code."""
    reference = golden.load("rmt", file)
    size = tuple(reference["inputs"]["input"]["shape"][1:])
    overrides = reference.get("overrides", {})
    profile = zoo.profile(zoo.create_model(file.split("@")[0], device="meta", pretrained=False, **overrides), size)
    assert profile.params == profile.trainable_params == reference["parameters"]
    ours = {operator.name: operator.fvcore_total for operator in profile.operators if operator.fvcore_total}
    theirs = dict(reference["macs_by_operator"])
    assert ours.pop("convolution") == theirs.pop("conv")
    assert ours.pop("scaled_dot_product_attention") == theirs.pop("matmul")
    pooled = ours.pop("adaptive_avg_pool2d")  # the authors average by `mean`, which fvcore does not count
    assert ours == theirs
    assert profile.macs == reference["macs"] - theirs["batch_norm"] - theirs["layer_norm"]
    assert profile.fvcore_total == reference["macs"] + pooled


@pytest.mark.parametrize("name", [name for name in golden.names("rmt") if "@" not in name])
def test_stated_costs_are_the_authors(name):
    reference, info = golden.load("rmt", name), zoo.model_info(name)
    norms = reference["macs_by_operator"]["batch_norm"] + reference["macs_by_operator"]["layer_norm"]
    pooled = 7 * 7 * 1024  # the authors average by `mean`, which fvcore does not count
    assert (info.params, info.macs) == (reference["parameters"], reference["macs"] - norms)
    assert info.fvcore_total == reference["macs"] + pooled


def test_parameters_of_the_models_with_token_labels():
    """As the logs of their training state them; that of S* is at odds with the released code (see its entry)."""
    assert zoo.model_info("rmt_b_token_label").params == 54_667_896
    assert zoo.model_info("rmt_l_token_label").params == 96_105_864


# ------------------------------------------------------------------------------------------------------------ attention


def test_attention_along_rows_and_columns_is_a_product_of_two():
    """By the definition, pixel by pixel, in float64."""
    torch.manual_seed(0)
    model = tiny().double().eval()
    attention = model.stages[0].blocks[0].retention
    heads, d, H, W = 2, 8, 3, 5
    x = torch.randn(1, H, W, 16, dtype=torch.float64)
    found = attention(x, model.stages[0].positions(x))

    theta = 1 / torch.pow(10000.0, torch.linspace(0, 1, d // 2)).double()
    gamma = [1 - 2.0 ** (-2 - 4 * h / heads) for h in range(heads)]

    def turned(t: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(t.reshape(H, W, heads, d // 2, 2))
        index = torch.arange(H * W, dtype=torch.float64).reshape(H, W, 1, 1)
        return pairs * torch.polar(torch.ones_like(index * theta), index * theta)

    q, k = turned(attention.q_proj(x)), turned(attention.k_proj(x)) * d**-0.5
    v = attention.v_proj(x).reshape(H, W, heads, d)
    rows = torch.einsum("hwnd,hvnd->nhwv", q, k.conj()).real
    columns = torch.einsum("hwnd,gwnd->nwhg", q, k.conj()).real
    for h in range(heads):
        for i in range(W):
            for j in range(W):
                rows[h, :, i, j] += math.log(gamma[h]) * abs(i - j)
        for i in range(H):
            for j in range(H):
                columns[h, :, i, j] += math.log(gamma[h]) * abs(i - j)
    along_rows = torch.einsum("nhwv,hvnd->hwnd", rows.softmax(-1), v)
    along_columns = torch.einsum("nwhg,gwnd->hwnd", columns.softmax(-1), along_rows)
    expected = attention.out_proj(along_columns.flatten(-2) + attention.lepe(attention.v_proj(x)))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)  # the decay is rounded to float32, as published


def test_decay_counts_steps_between_pixels():
    x = torch.zeros(1, 3, 4, 8)
    _, _, whole = relative_positions(x, 2, 4, 2.0, 4.0, False)
    _, _, rows, columns = relative_positions(x, 2, 4, 2.0, 4.0, True)
    for head, gamma in enumerate((1 - 2**-2, 1 - 2**-4)):
        assert whole[head, 0, 11].item() == pytest.approx(math.log(gamma) * (2 + 3))  # corner to corner
        assert rows[head, 1, 3].item() == pytest.approx(math.log(gamma) * 2)
        assert columns[head, 2, 0].item() == pytest.approx(math.log(gamma) * 2)


def test_tables_are_not_rounded_with_the_model():
    half = relative_positions(torch.zeros(1, 56, 56, 64, dtype=torch.bfloat16), 4, 16, 2.0, 4.0, True)
    full = relative_positions(torch.zeros(1, 56, 56, 64), 4, 16, 2.0, 4.0, True)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(half, full, strict=True))


def test_fused_and_plain_attention_agree():
    torch.manual_seed(0)
    model = tiny().eval()
    images = torch.randn(2, 3, 96, 64)
    set_fused_attn(False)
    try:
        plain = tiny().eval()
    finally:
        set_fused_attn(True)
    plain.load_state_dict(model.state_dict())
    assert plain.stages[0].blocks[0].retention.fused_attn != model.stages[0].blocks[0].retention.fused_attn
    torch.testing.assert_close(plain(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(33, 47), (97, 64), (1, 250), (1, 1)])
def test_any_size(size):
    grid = [math.ceil(side / 4) for side in size]
    for stage in tiny().eval().forward_intermediates(torch.randn(2, 3, *size), intermediates_only=True):
        assert list(stage.shape[2:]) == grid
        assert stage.isfinite().all()
        grid = [math.ceil(side / 2) for side in grid]


# ----------------------------------------------------------------------------------------------------------- fast forms


# slow: differs from rmt_test in its head alone, whose golden file test_golden_parity holds
@pytest.mark.parametrize("name", ["rmt_test", pytest.param("rmt_b_token_label", marks=pytest.mark.slow)])
def test_the_fast_form_computes_the_same(name):
    torch.manual_seed(0)
    model = tiny(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
    for key, parameter in model.named_parameters():
        if "gamma" in key:
            nn.init.normal_(parameter)
    model.eval()
    fast = zoo.optimize_for_inference(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    for size in ((64, 64), (96, 64), (64, 64)):
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            _, maps = model.forward_intermediates(images)
            found, found_maps = fast.forward_intermediates(images)
            for ours, plain in zip((*found_maps, fast(images)), (*maps, model(images)), strict=True):
                assert (ours - plain).abs().max() <= 1e-5 * plain.abs().max()
            assert torch.equal(fast.forward_head(found), fast(images))
            assert torch.equal(torch.compile(fast, backend="eager", fullgraph=True)(images), fast(images))
    assert [len(stage.positions.cache) for stage in fast.stages] == [2] * 4  # one for each size that came


def test_cached_tables_outlive_no_trace_and_no_mode():
    fast = zoo.optimize_for_inference(tiny())
    images = torch.randn(1, 3, 64, 64)
    torch.export.export(fast, (images,))
    torch.jit.trace(fast, images, check_trace=False)
    assert not any(stage.positions.cache for stage in fast.stages)
    with torch.inference_mode():
        fast(images)
    leaf = images.clone().requires_grad_()
    fast(leaf).sum().backward()  # saves the tables for the backward pass
    assert leaf.grad is not None
    for side in range(32, 32 * 12, 32):
        fast(torch.randn(1, 3, side, 32))
    assert all(len(stage.positions.cache) <= 8 for stage in fast.stages)


# --------------------------------------------------------------------------------------------------------- token labels


def test_token_labels_add_half_of_the_best_token():
    model = tiny("rmt_s_token_label", num_classes=7).eval()
    images = torch.randn(2, 3, 96, 64)
    image, tokens = model.forward_tokens(images)
    assert (image.shape, tokens.shape) == ((2, 7), (2, 6, 7))
    torch.testing.assert_close(model(images), image + 0.5 * tokens.max(dim=1).values)
    torch.testing.assert_close(model.train()(images).shape, image.shape)
    with pytest.raises(ConfigError, match="token_label=True"):
        tiny().forward_tokens(images)


def test_classifiers_of_image_and_tokens_change_together():
    model = tiny("rmt_s_token_label").eval()
    model.reset_classifier(5)
    assert (model.head.fc.out_features, model.head.aux.out_features) == (5, 5)
    assert model.head.aux.weight.std().item() == pytest.approx(0.02, rel=0.2)
    model.reset_classifier(0)
    assert model.head.aux is None
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 128)
    model.reset_classifier(3)
    assert model.head.aux.out_features == 3


def test_weights_with_token_labels_in_other_models(caplog):
    sizes = {"depths": (1, 1, 2, 1)}
    published = golden.state_dict(golden.load("rmt", "rmt_s_token_label@1121layers"))
    plain = zoo.create_model("rmt_s", pretrained=False, **sizes)
    with caplog.at_level(logging.WARNING):
        zoo.load_checkpoint(plain, published)
    assert "main head alone" in caplog.text
    torch.testing.assert_close(plain.head.fc.weight, published["head.weight"])
    whole = zoo.create_model("rmt_s_token_label", pretrained=False, **sizes)
    with pytest.raises(CheckpointError, match=r"head\.aux"):
        zoo.load_checkpoint(whole, {k: v for k, v in published.items() if "aux_head" not in k})
    published["aux_head.weight"] = torch.zeros(1000, 1024)
    with pytest.raises(CheckpointError, match=r"aux_head reads 1024 channels.*without token_label"):
        zoo.load_checkpoint(whole, published)


def test_another_number_of_classes_leaves_both_classifiers_fresh():
    published = golden.state_dict(golden.load("rmt", "rmt_s_token_label@1121layers"))
    model = zoo.create_model("rmt_s_token_label", pretrained=False, num_classes=10, depths=(1, 1, 2, 1))
    report = zoo.load_checkpoint(model, published)
    assert set(report.fresh) == {"head.fc.weight", "head.fc.bias", "head.aux.weight", "head.aux.bias"}
    assert model.head.aux.weight.shape == (10, 512)


# ---------------------------------------------------------------------------------------------------------------- rest


def test_published_weights_are_fetched_by_hand():
    with pytest.raises(
        DownloadError, match=r"by hand, from https://pan\.baidu\.com/s/.*password vsyv.*checkpoint_path="
    ):
        zoo.create_model("rmt_t", pretrained=True)
    for name in zoo.list_models("rmt*", pretrained=True):
        entry = get_entry(name)
        assert (entry.code_license, entry.weights[0].license) == ("unstated", "unstated")


def test_averaged_weights_of_a_training_checkpoint_are_taken(tmp_path):
    published = golden.state_dict(golden.load("rmt", "rmt_t@1121layers"))
    published["layers.0.Relpos.angle"] = torch.zeros(16)
    last = {key: torch.zeros_like(value) for key, value in published.items()}
    torch.save({"model": last, "model_ema": published, "epoch": 299, "max_accuracy": 84.1}, tmp_path / "rmt.pth")
    model = zoo.create_model("rmt_t", checkpoint_path=tmp_path / "rmt.pth", depths=(1, 1, 2, 1))
    assert torch.equal(model.head.fc.weight, published["head.weight"])


def test_initialisation():
    torch.manual_seed(0)
    model = zoo.create_model("rmt_b", pretrained=False, depths=(1, 1, 1, 1))
    for key, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05), key
            assert not module.bias.any(), key
        elif isinstance(module, nn.Conv2d):
            bound = 1 / math.sqrt(module.weight[0].numel())
            assert 0.9 * bound < module.weight.abs().max() <= bound, key
            assert module.bias.any(), key
    gammas = {key: value for key, value in model.named_parameters() if "gamma" in key}
    assert {key.split(".blocks")[0] for key in gammas} == {"stages.2", "stages.3"}
    assert all((value == 1e-6).all() and value.ndim == 4 for value in gammas.values())


def test_stochastic_depth_grows_to_its_rate():
    model = zoo.create_model("rmt_t", pretrained=False, device="meta", drop_path_rate=0.1, drop_rate=0.3)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.1, 14))
    assert model.head.drop.p == 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depths": (1, 1)}, "depths has 2 stages and dims has 4"),
        ({"num_heads": (3, 4, 8, 16)}, "64 channels do not give 3 heads"),
        ({"dims": (8, 16, 32, 64), "num_heads": (4, 4, 8, 16)}, "8 channels do not give 4 heads"),
        ({"mlp_ratio": 0}, "mlp_ratio must be numbers above zero"),
        ({"mlp_ratio": (1.0, 2.0)}, "mlp_ratio has 2 items for 4 stages"),
        ({"decay_range": "4"}, "decay_range must be numbers above zero"),
        ({"layer_scale_init": "small"}, "layer_scale_init must be a number"),
        ({"layer_scale_init": (1e-6, float("nan"), None, None)}, "layer_scale_init must be a number or None"),
        ({"drop_path_rate": 1}, "drop_path_rate must be a number from 0"),
        ({"head_hidden_size": 0}, "head_hidden_size must be a whole number from 1"),
        ({"global_pool": "average"}, "Did you mean avg"),
        ({"global_pool": ""}, "use it with num_classes=0"),
        ({"num_head": (4, 4, 8, 16)}, "Did you mean num_heads"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        zoo.create_model("rmt_t", pretrained=False, **arguments)


def test_the_class_stands_for_itself():
    one_stage = {"depths": (1,), "dims": (16,), "num_heads": (2,), "decay_range": 4.0, "decomposed": True}
    assert RMT(num_classes=3, **one_stage)(torch.randn(1, 3, 32, 32)).shape == (1, 3)


DROP_PATH = {"rmt_t": 0.1, "rmt_s": 0.15, "rmt_b": 0.4, "rmt_l": 0.5}


@pytest.mark.parametrize("name", [*DROP_PATH, "rmt_s_token_label", "rmt_b_token_label", "rmt_l_token_label"])
def test_recipes_are_the_authors(name):
    drop_path, token_label = DROP_PATH[name.removesuffix("_token_label")], name.endswith("_token_label")
    config = load_config(TrainingConfig, f"configs/vision/imagenet1k/{name}.yaml")
    assert (config.model.name, config.model.args) == (name, {"drop_path_rate": drop_path})
    assert (config.optimizer.opt, config.optimizer.lr, config.train.global_batch_size) == ("adamw", 2e-3, 2048)
    assert (config.optimizer.weight_decay, config.optimizer.clip_grad) == (0.05, None)
    schedule = config.scheduler
    assert (schedule.sched, schedule.epochs, schedule.cooldown_epochs, schedule.warmup_epochs) == ("cosine", 300, 10, 5)
    assert (schedule.warmup_lr, schedule.min_lr) == (1e-6, 1e-5)
    augment = config.augment
    assert (augment.aa, augment.color_jitter, augment.train_interpolation) == (
        "rand-m9-mstd0.5-inc1",
        0.4,
        "random" if token_label else "bicubic",
    )
    mixing = (augment.mixup, augment.cutmix, augment.mixup_switch_prob, augment.mix_token)
    assert mixing == ((0, 0, 0.5, 1.0) if token_label else (0.8, 1.0, 0.5, 0))
    assert config.loss.token_weight == 0.5
    assert (config.data.token_labels is not None) == token_label
    assert config.data.crop_pct == (0.96 if token_label else None)
    assert (augment.reprob, augment.remode, augment.aug_repeats) == (0.25, "pixel", 3)
    assert config.loss.smoothing == 0.1
    assert config.train.model_ema
    assert config.train.model_ema_decay == pytest.approx(0.99996 ** (2048 / 512), abs=1e-8)
    assert config.data.input_size == (3, 224, 224)
