"""MetaFormer against its authors' code, and what is particular to it; the shared contract is tested elsewhere."""

import math

import pytest
import torch
from torch import nn

import zoo
from tests import golden
from zoo.errors import ConfigError
from zoo.models.metaformer import MetaFormer, StarReLU

SMALL = ("_s12", "_s18", "poolformer_s12.timm")


def golden_params() -> list:
    """Small variants at their own size always, and one in timm's layout; the rest with the slow tests."""
    return [
        pytest.param(name, marks=() if name.endswith(SMALL) else pytest.mark.slow)
        for name in golden.names("metaformer")
    ]


def timm_arguments(name: str) -> dict[str, object]:
    """What makes our model compute as timm's does, where timm and the authors differ."""
    if name.startswith("poolformer_"):
        return {"head_norm_first": False}
    return {"mlp_head_eps": 1e-6} if name.startswith(("convformer", "caformer")) else {}


@pytest.mark.parametrize("file", golden_params())
def test_golden_parity(file):
    reference = golden.load("metaformer", file)
    name = file.split(".")[0].split("@")[0]
    model = zoo.create_model(name, pretrained=False, **(timm_arguments(name) if file.endswith(".timm") else {}))
    report = zoo.load_checkpoint(model, golden.state_dict(reference))
    assert not report.dropped
    model.double().eval()

    with torch.no_grad():
        images = golden.inputs(reference)["input"].double()
        features, maps = model.forward_intermediates(images)
        outputs = {
            "logits": model(images),
            "features": model.forward_features(images),
            "pre_logits": model.forward_head(features, pre_logits=True),
            **{f"stage{i}": stage for i, stage in enumerate(maps, start=1)},
        }
        if "features_normed" in reference["outputs"]:
            outputs["features_normed"] = model.head.norm(features)

    assert reference["precision"] == "float64"
    assert max(golden.errors(reference, outputs).values()) < 1e-9


def test_the_authors_and_timms_poolformer_heads_differ():
    """The switch does something: each golden file rejects the other head."""
    reference = golden.load("metaformer", "poolformer_s12.timm")
    model = zoo.create_model("poolformer_s12", pretrained=False)
    zoo.load_checkpoint(model, golden.state_dict(reference))
    model.double().eval()
    with torch.no_grad():
        logits = model(golden.inputs(reference)["input"].double())
    reference["outputs"] = {"logits": reference["outputs"]["logits"]}
    assert golden.errors(reference, {"logits": logits})["logits"] > 1e-3


def test_published_weights_are_built_with_the_authors_head():
    for name in ("poolformer_s12", "poolformer_m48"):
        assert zoo.create_model(name, pretrained=False, device="meta").head.norm_first
    head = zoo.create_model("caformer_s18", pretrained=False, device="meta").head.fc
    assert head.norm.eps == 1e-5


@pytest.mark.parametrize("name", ["poolformer_s12", "poolformer_s36", "caformer_s18", "randformer_s12"])
def test_initialisation_moments(name):
    """Published: normal of standard deviation 0.02, biases 0, norms 1 and 0, scales as each paper says."""
    torch.manual_seed(0)
    model = zoo.create_model(name, pretrained=False)
    seen = set()
    for key, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight
            deviation = 0.02
            if name.startswith("poolformer_") and key.endswith(("stem.conv", "downsample.conv")):
                fan_in = weight[0].numel()
                bound = 1 / math.sqrt(fan_in)  # PyTorch's convolution: uniform within this
                deviation = bound / math.sqrt(3)
                assert weight.abs().max() <= bound
                assert module.bias.abs().max() <= bound
                assert module.bias.std() > 0
            elif module.bias is not None:
                assert not module.bias.any(), key
            tolerance = 6 * deviation / math.sqrt(weight.numel())
            assert abs(weight.mean().item()) < tolerance, key
            assert abs(weight.std().item() - deviation) < tolerance, key
            seen.add(type(module).__name__)
        elif "norm" in key.split(".")[-1] and not isinstance(module, nn.Identity):
            assert (module.weight == 1).all()
            assert module.bias is None or not module.bias.any()
            seen.add("norm")
        elif isinstance(module, StarReLU):
            assert module.scale.item() == 1
            assert module.bias.item() == 0
            seen.add("StarReLU")
    assert {"Conv2d", "Linear", "norm"} <= seen
    scales = {k: v for k, v in model.named_parameters() if "_scale" in k}
    if name.startswith("poolformer_"):
        expected = 1e-5 if name.endswith("s12") else 1e-6
        assert all((v == expected).all() for v in scales.values())
        assert all("layer_scale" in k for k in scales)
    else:
        assert scales
        assert all((v == 1).all() for v in scales.values())
        assert all(k.startswith(("stages.2.", "stages.3.")) and "res_scale" in k for k in scales)


def test_random_matrices_are_softmax_rows_and_frozen():
    model = zoo.create_model("randformer_s12", pretrained=False)
    matrices = {key: value for key, value in model.state_dict().items() if "random_matrix" in key}
    assert [tuple(m.shape) for m in matrices.values()] == [(196, 196)] * 6 + [(49, 49)] * 2
    for matrix in matrices.values():
        torch.testing.assert_close(matrix.sum(dim=1), torch.ones(len(matrix)))
        ratio = matrix.max(dim=1).values / matrix.min(dim=1).values
        assert (ratio <= math.e * 1.0001).all()  # softmax of numbers in [0, 1)
        assert ratio.min() > 1.5
    assert not any("random_matrix" in key for key, _ in model.named_parameters())


def test_randformer_holds_for_one_size_that_can_be_chosen():
    model = zoo.create_model("randformer_s12", pretrained=False, img_size=(64, 96), num_classes=3)
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 3)
    with pytest.raises(ConfigError, match=r"4x6 grid here but got 4x4.*img_size"):
        model(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("family", ["poolformer", "poolformerv2", "identityformer"])
@pytest.mark.parametrize("size", [(33, 47), (97, 64), (1, 250)])
def test_any_size_that_the_mathematics_allows(family, size):
    model = zoo.create_model(f"{family}_s12", pretrained=False, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)).eval()
    height, width = (max(side, 3) for side in size)
    grid = [(side - 3) // 4 + 1 for side in (height, width)]
    for stage in model.forward_intermediates(torch.randn(1, 3, height, width), intermediates_only=True):
        assert list(stage.shape[2:]) == grid
        grid = [math.ceil(side / 2) for side in grid]


@pytest.mark.parametrize(("kernel", "stride", "first"), [(7, 4, 8), (3, 2, 16), (3, 1, 32), (4, 4, 8), (5, 2, 16)])
def test_stem_for_small_images(kernel, stride, first):
    model = zoo.create_model(
        "poolformer_s12",
        pretrained=False,
        features_only=True,
        depths=(1, 1, 1, 1),
        dims=(8, 16, 24, 32),
        stem_kernel_size=kernel,
        stem_stride=stride,
    )
    maps = model(torch.randn(1, 3, 32, 32))
    assert [m.shape[-1] for m in maps] == [first, first // 2, first // 4, first // 8]
    assert model.feature_info.reduction() == [stride, stride * 2, stride * 4, stride * 8]


class Shift(nn.Module):
    """A user's mixer on maps, without weights."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.roll(1, dims=3)


class TokenMean(nn.Module):
    """A user's mixer on tokens, with weights of its own."""

    tokens = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gain, 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gain * x.mean(dim=1, keepdim=True).expand_as(x)


def test_a_metaformer_with_ones_own_mixers():
    model = MetaFormer(
        token_mixers=(Shift, "pool", "sepconv", TokenMean), depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=5
    )
    logits = model(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 5)
    logits.sum().backward()
    assert (model.stages[3].blocks[0].token_mixer.gain == 0.5).all()
    assert model.stages[3].blocks[0].token_mixer.gain.grad is not None
    named = zoo.create_model("poolformerv2_s12", pretrained=False, token_mixers=TokenMean, depths=(1, 1, 1, 1))
    assert (named.stages[0].blocks[0].token_mixer.gain == 0.5).all()


def test_a_mixer_that_cannot_be_initialised_is_refused():
    class Bare(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(dim))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(ConfigError, match=r"Bare holds weights: give it a reset_parameters\(\)"):
        zoo.create_model("poolformerv2_s12", pretrained=False, token_mixers=Bare)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depths": (1, 1)}, "depths has 2 stages and dims has 4"),
        ({"depths": (1, 0, 1, 1)}, "depths must be whole numbers above zero"),
        ({"depths": 3}, "depths must be a sequence"),
        ({"dims": "abc"}, "dims must be a sequence"),
        ({"token_mixers": "pol"}, "Did you mean pool"),
        ({"token_mixers": ("pool", "pool")}, "token_mixers has 2 items for 4 stages"),
        ({"mlp_act": "gelus"}, "Did you mean gelu"),
        ({"norm": "batch"}, "Choose one of 'group', 'layer'"),
        ({"mlp_ratio": 0}, "mlp_ratio must be numbers above zero"),
        ({"norm_eps": -1.0}, "norm_eps must be numbers above zero"),
        ({"drop_rate": 2.0}, "drop_rate must be a number from 0"),
        ({"proj_drop_rate": -1}, "proj_drop_rate must be a number from 0"),
        ({"drop_path_rate": "a"}, "drop_path_rate must be a number from 0"),
        ({"layer_scale_init": "a"}, "layer_scale_init must be a number"),
        ({"device": "gpu"}, "There is no device 'gpu'"),
        ({"dtype": "float32"}, "dtype is a floating-point torch.dtype"),
        ({"features_only": True, "out_indices": 5}, "out_indices is a sequence"),
        ({"features_only": True, "out_indices": (4,)}, "has 4 feature maps, 0 to 3"),
        ({"features_only": True, "feature_cls": "gettr"}, "Did you mean getter"),
        ({"out_indices": (1,)}, "goes with features_only=True"),
        ({"stem_stride": 0}, "stem_stride must be a whole number from 1"),
        ({"img_size": -1}, "img_size must be a whole number from 1 up"),
        ({"global_pool": "sum"}, "global_pool 'sum' is unknown"),
        ({"global_pool": ""}, "use it with num_classes=0"),
        ({"num_classes": -1}, "num_classes must be a whole number from 0"),
        ({"in_chans": 0}, "in_chans must be a whole number from 1"),
        ({"in_chans": 1.5}, "in_chans must be a whole number from 1"),
        ({"deths": (1, 1, 1, 1)}, "Did you mean depths"),
        ({"token_mixers": "attention", "dims": (8, 16, 24, 40)}, "heads of 32, but 8"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        zoo.create_model("poolformer_s12", pretrained=False, **arguments)


def test_a_bad_classifier_leaves_the_model_as_it_was():
    model = zoo.create_model("poolformer_s12", pretrained=False, device="meta")
    classifier = model.get_classifier()
    for bad in (-1, "x", 2.5):
        with pytest.raises(ConfigError, match="num_classes must be"):
            model.reset_classifier(bad)
    assert model.num_classes == 1000
    assert model.get_classifier() is classifier


def test_dropout_and_stochastic_depth_where_the_authors_have_them():
    model = zoo.create_model("caformer_s18", pretrained=False, drop_rate=0.4, drop_path_rate=0.17)
    assert model.head.drop.p == 0
    assert model.head.fc.drop.p == 0.4
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.17, 18))
    assert zoo.create_model("poolformer_s12", pretrained=False, drop_rate=0.3).head.drop.p == 0.3


def test_fused_and_plain_attention_agree():
    from timm.layers import set_fused_attn

    torch.manual_seed(0)
    model = zoo.create_model("caformer_s18", pretrained=False, depths=(1, 1, 2, 1)).eval()
    images = torch.randn(2, 3, 96, 64)
    set_fused_attn(False)
    try:
        plain = zoo.create_model("caformer_s18", pretrained=False, depths=(1, 1, 2, 1)).eval()
    finally:
        set_fused_attn(True)
    plain.load_state_dict(model.state_dict())
    assert plain.stages[2].blocks[0].token_mixer.fused_attn != model.stages[2].blocks[0].token_mixer.fused_attn
    torch.testing.assert_close(plain(images), model(images), rtol=1e-4, atol=1e-5)


def test_star_relu_is_transformed_as_other_functions_are():
    act, x = StarReLU(), torch.linspace(-1, 1, 8)
    each = torch.func.vmap(torch.func.grad(lambda x: act(x).sum()))(x[:, None])
    torch.testing.assert_close(each[:, 0], 2 * x.relu())
    twice = torch.func.jvp(torch.func.grad(lambda x: act(x).sum()), (x,), (torch.ones(8),))[1]
    torch.testing.assert_close(twice, 2 * (x > 0).float())
