"""PfNet against its authors' code, and what is particular to it; the shared contract is tested elsewhere."""

from __future__ import annotations

import urllib.error

import pytest
import timm
import torch
from torch import nn

import zoo
from tests import golden
from tests.profiles import profiled
from zoo.config import load_config
from zoo.errors import ConfigError, DownloadError
from zoo.registry import get_entry
from zoo.training import TrainingConfig

QUICK: tuple[str, ...] = ("resnet50_max", "resnet50_max@200x232", "resnet50_hybrid", "resnet50_pf")
QUICK += ("vit_ti_max", "vit_ti_max@192x192", "pit_ti_max", "pit_ti_max@192x192")


def small(name: str, **arguments):
    """A few narrow layers of the architecture."""
    if name.startswith("resnet"):
        arguments = {"depths": (1, 2, 1, 1), "planes": (8, 16, 24, 32), **arguments}
    elif name.startswith("vit"):
        arguments = {"depth": 4, "embed_dim": 32, "num_heads": 2, **arguments}
    else:
        arguments = {"depths": (2, 1, 1), "dims": (16, 32, 64), "num_heads": (1, 2, 4), **arguments}
    return zoo.create_model(name, pretrained=False, **arguments)


def images(batch: int = 2, height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def tokens(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(2).transpose(1, 2)


# ------------------------------------------------------------------------------------------------------------- fidelity


@pytest.mark.parametrize(
    "file",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in golden.names("pfnet")],
)
def test_golden_parity(file):  # slow: the largest, once more each
    reference = golden.load("pfnet", file)
    name = file.split("@")[0]
    # the authors' ViT takes one size alone, with a table made for it; their PiT resizes the table at each call
    size = {"img_size": reference["inputs"]["input"]["shape"][2]} if name.startswith("vit") else {}
    model = zoo.create_model(name, pretrained=False, **size)
    report = zoo.load_checkpoint(model, golden.state_dict(reference))
    assert not report.dropped
    model.double().eval()

    steps = []
    if name.startswith("vit"):
        for block in model.stages[0].blocks:
            block.register_forward_hook(lambda _module, _inputs, output: steps.append(output.flatten(1, 2)))
    with torch.no_grad():
        batch = golden.inputs(reference)["input"].double()
        features, maps = model.forward_intermediates(batch)
        outputs = {"pre_logits": model.forward_head(features, pre_logits=True), "logits": model(batch)}
        if name.startswith("resnet"):
            outputs["stem"] = model.maxpool(model.act1(model.bn1(model.conv1(batch))))
            outputs["features"], maps = features, maps[1:]  # timm's first map is the stem's before pooling
        else:
            stem = model.stem.proj(batch)
            outputs["stem"] = tokens(stem) if name.startswith("vit") else stem
            outputs["features"] = tokens(model.head.norm(features))
    outputs |= {f"stage{i}": stage for i, stage in enumerate(maps, start=1)}
    outputs |= dict(zip(("block1", "block2"), steps, strict=False))
    assert reference["precision"] == "float64"
    assert max(golden.errors(reference, outputs).values()) < 1e-9


@pytest.mark.parametrize(
    ("name", "params", "macs", "fvcore_total"),
    [
        ("resnet50_max", 14_232_232, 2_239_496_192, 2_259_064_832),
        ("resnet50_hybrid", 17_330_600, 2_586_312_704, 2_606_232_576),
        ("resnet50_pf", 25_557_032, 4_089_184_256, 4_111_512_576),
        ("vit_ti_max", 6_159_400, 1_244_757_504, 1_249_461_504),
        ("vit_s_max", 23_819_368, 4_743_822_336, 4_753_230_336),
        ("vit_b_max", 93_644_008, 18_504_873_984, 18_523_689_984),
        ("pit_ti_max", 5_174_504, 631_512_960, 634_515_840),
        ("pit_s_max", 25_119_784, 2_813_372_640, 2_820_129_120),
        ("pit_b_max", 79_005_928, 12_428_636_160, 12_446_830_080),
    ],
)
def test_costs_are_those_of_the_authors_code(name, params, macs, fvcore_total):
    profile = profiled(name, (3, 224, 224))
    assert (profile.params, profile.macs) == (params, macs)
    # the authors' transformers end in a mean over tokens, which fvcore does not count, and ours in a pooling
    last = {"vit_ti": 196 * 192, "vit_s": 196 * 384, "vit_b": 196 * 768, "pit_ti": 49 * 256, "pit_s": 49 * 576}
    last["pit_b"] = 64 * 1024
    assert profile.fvcore_total == fvcore_total + last.get(name.removesuffix("_max"), 0)


def test_the_plain_resnet_is_timms():
    theirs = timm.create_model("resnet50").eval()
    ours = zoo.create_model("resnet50_pf", pretrained=False).eval()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        assert torch.equal(ours(images()), theirs(images()))


# ---------------------------------------------------------------------------------------------------------- checkpoints


def test_published_transformers_fit_another_size():
    """The position table is resized when loaded, and computes what the table of the old size does at the new one."""
    published = golden.state_dict(golden.load("pfnet", "vit_ti_max"))
    models = [zoo.create_model("vit_ti_max", pretrained=False, img_size=size).eval() for size in (224, 96)]
    for model in models:
        assert not zoo.load_checkpoint(model, dict(published)).dropped
    assert models[1].stem.pos_embed.shape == (1, 192, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(models[1](images(1, 96, 96)), models[0](images(1, 96, 96)))


def test_our_own_checkpoints_come_back(tmp_path):
    for name in ("resnet50_hybrid", "vit_ti_max", "pit_ti_max"):
        model = small(name, num_classes=3).eval()
        again = zoo.create_model(f"local-dir:{zoo.save_pretrained(model, tmp_path / name)}").eval()
        with torch.no_grad():
            assert torch.equal(again(images()), model(images()))


# ---------------------------------------------------------------------------------------------------------------- model


def test_a_hybrid_takes_maps_that_do_not_halve():
    """The authors' fails there: its average pooling rounds down, its shortcut up."""
    model = small("resnet50_hybrid").eval()
    assert [tuple(m.shape[2:]) for m in model.forward_intermediates(images(1, 200, 232), intermediates_only=True)] == [
        (100, 116),
        (50, 58),
        (25, 29),
        (13, 15),
        (7, 8),
    ]


@pytest.mark.parametrize("name", ["vit_ti_max", "pit_ti_max"])
def test_maps_need_not_be_square(name):
    model = small(name).eval()
    maps = model.forward_intermediates(images(1, 96, 160), intermediates_only=True)
    assert maps[0].shape[2:] == ((6, 10) if name.startswith("vit") else (11, 19))
    assert model(images(1, 96, 160)).isfinite().all()


def test_the_max_layer_is_as_published():
    """GELU on both sides of the pooling, borders at minus infinity: neither commutes with the other."""
    layer = small("vit_ti_max").stages[0].blocks[1].mixer
    x = torch.randn(1, 5, 6, 32)
    hidden = nn.functional.gelu(layer.fc1(x))
    padded = nn.functional.pad(hidden.permute(0, 3, 1, 2), (1, 1, 1, 1), value=float("-inf"))
    pooled = padded.unfold(2, 3, 1).unfold(3, 3, 1).amax((-1, -2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), layer.fc2(nn.functional.gelu(pooled)))


def test_initialisation():
    torch.manual_seed(0)
    vit, pit, resnet = (small(name) for name in ("vit_ti_max", "pit_ti_max", "resnet50_max"))
    for model in (vit, pit):
        assert abs(model.stem.pos_embed.std().item() - 0.02) < 2e-3
    linear = vit.stages[0].blocks[0].mlp.fc1
    assert abs(linear.weight.std().item() - 0.02) < 2e-3
    assert not linear.bias.any()
    linear = pit.stages[0].blocks[0].mlp.fc1  # PyTorch's own: uniform within 1 / sqrt(fan in)
    assert 0.9 * 16**-0.5 < linear.weight.abs().max() <= 16**-0.5
    assert linear.bias.any()
    conv = resnet.layer4[0].conv3.weight
    assert 0.9 * 32**-0.5 < conv.abs().max() <= 32**-0.5
    assert (resnet.layer1[0].bn3.weight == 1).all()  # timm would have it 0


def test_stochastic_depth_is_the_authors():
    rates = {}
    for name in ("vit_ti_max", "pit_ti_max"):
        model = zoo.create_model(name, pretrained=False, device="meta", drop_path_rate=0.12)
        blocks = [block for stage in model.stages for block in stage.blocks]
        rates[name] = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates["vit_ti_max"] == pytest.approx([0.12 * i / 11 for i in range(12)])
    assert rates["pit_ti_max"] == pytest.approx([0.01 * i for i in range(12)])


@pytest.mark.parametrize("name", ["resnet50_max", "resnet50_hybrid", "vit_ti_max", "pit_ti_max"])
def test_fast_form(name):
    model = small(name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
    model.eval()
    fast = zoo.optimize_for_inference(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    for size in ((64, 64), (96, 72)):
        expected, found = model(images(2, *size)), fast(images(2, *size))
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet50_max", {"mixer": "mxa"}, "Did you mean max"),
        ("resnet50_max", {"depths": (1, 1)}, "depths has 2 stages and planes has 4"),
        ("resnet50_max", {"depths": (1, 1), "planes": (8, 8)}, "has four stages"),
        ("resnet50_max", {"global_pool": ""}, "use it with num_classes=0"),
        ("vit_ti_max", {"num_heads": 5}, "width of 32 cannot be split into 5 heads"),
        ("vit_ti_max", {"depth": 0}, "depth must be a whole number from 1"),
        ("vit_ti_max", {"img_size": 8}, "img_size must be a whole number from 16"),
        ("pit_ti_max", {"dims": (16, 24, 48)}, "multiple of the one before"),
        ("pit_ti_max", {"num_heads": (1, 2)}, "depths has 3 stages and num_heads has 2"),
        ("pit_ti_max", {"mlp_ratio": 0}, "mlp_ratio must be numbers above zero"),
        ("pit_ti_max", {"drop_path_rate": 1}, "drop_path_rate must be a number from 0"),
    ],
)
def test_bad_arguments(name, arguments, message):
    with pytest.raises(ConfigError, match=message):
        small(name, **arguments)


@pytest.mark.parametrize("name", ["resnet50_max", "resnet50_hybrid", "vit_s_max", "pit_s_max"])
def test_weights_are_fetched_from_the_authors_drive(name, monkeypatch, tmp_path):
    asked = []

    def refuse(request, *args, **options):
        asked.append(request if isinstance(request, str) else request.full_url)
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(DownloadError, match=r"drive\.usercontent\.google\.com.*checkpoint_path="):
        zoo.create_model(name, pretrained=True, cache_dir=tmp_path)
    assert set(asked) == {get_entry(name).weights[0].url}


@pytest.mark.parametrize("name", [f"{body}_{size}_max" for body in ("vit", "pit") for size in ("ti", "s", "b")])
def test_recipes_of_transformers_are_deits(name):
    config = load_config(TrainingConfig, f"configs/vision/imagenet1k/{name}.yaml")
    assert config.model.name == name
    assert config.model.args == {"drop_path_rate": 0.1}
    assert (config.optimizer.opt, config.optimizer.lr, config.train.global_batch_size) == ("adamw", 1e-3, 1024)
    assert zoo.create_model(name, device="meta", pretrained=False, **config.model.args).num_classes == 1000


@pytest.mark.parametrize("name", ["resnet50_max", "resnet50_hybrid"])
def test_recipes_of_resnets_fall_in_steps(name):
    config = load_config(TrainingConfig, f"configs/vision/imagenet1k/{name}.yaml")
    assert config.model.name == name
    assert (config.optimizer.opt, config.optimizer.lr, config.optimizer.weight_decay) == ("sgd", 0.2, 1e-4)
    assert (config.scheduler.sched, config.scheduler.epochs, config.train.global_batch_size) == ("step", 90, 1024)
