"""SimpleNet against its authors' code, and what is particular to it; the shared contract is tested elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import zoo
from tests import golden
from tests.profiles import profiled
from zoo.config import load_config
from zoo.errors import CheckpointError, ConfigError, DownloadError
from zoo.models.simplenet import Layer, Pool
from zoo.training import TrainingConfig
from zoo.training.config import SchedulerConfig
from zoo.training.loop import make_scheduler

SLOW = ("simplenetv1_9m_m2", "simplenetv1_5m_m3", "simplenetv1_5m_m4")  # a second and more each


def create(name: str = "simplenetv1_small_m1_05", **arguments):
    return zoo.create_model(name, pretrained=False, **arguments)


def entries(model: Any) -> list[nn.Module]:
    """What the authors' table lists: layers and poolings, in their order."""
    parts = [*model.stem, *(part for stage in model.stages for part in (stage.downsample, *stage.blocks))]
    return [part for part in parts if not isinstance(part, nn.Identity)]


# ------------------------------------------------------------------------------------------------------------- fidelity


@pytest.mark.parametrize(
    "file",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in golden.names("simplenet")],
)
def test_golden_parity(file):
    reference = golden.load("simplenet", file)
    model = create(file.split("@")[0])
    report = zoo.load_checkpoint(model, golden.state_dict(reference))
    assert report.converted
    assert not report.dropped
    assert not report.fresh
    model.double().eval()
    seen: list[torch.Tensor] = []
    hooks = [part.register_forward_hook(lambda *arguments: seen.append(arguments[2])) for part in entries(model)]
    with torch.no_grad():
        batch = golden.inputs(reference)["input"].double()
        outputs = {"features": model.forward_features(batch)}
        outputs |= {f"layer{i}": output for i, output in enumerate(seen)}
        for hook in hooks:
            hook.remove()
        outputs["logits"] = model(batch)
    assert reference["precision"] == "float64"
    assert max(golden.errors(reference, outputs).values()) < 1e-9


@pytest.mark.parametrize(
    ("name", "params", "macs", "fvcore_total"),
    [
        ("simplenetv1_small_m1_05", 1_506_792, 340_923_392, 342_905_344),
        ("simplenetv1_small_m2_05", 1_506_792, 427_627_520, 429_910_528),
        ("simplenetv1_small_m1_075", 3_287_272, 758_853_120, 761_826_048),
        ("simplenetv1_small_m2_075", 3_287_272, 953_937_408, 957_361_920),
        ("simplenetv1_5m_m1", 5_752_808, 1_341_761_536, 1_345_725_440),
        ("simplenetv1_5m_m2", 5_752_808, 1_688_578_048, 1_693_144_064),
        ("simplenetv1_5m_m3", 5_752_808, 2_035_394_560, 2_040_562_688),
        ("simplenetv1_5m_m4", 5_752_808, 2_729_027_584, 2_736_604_160),
        ("simplenetv1_9m_m1", 9_508_968, 2_774_249_984, 2_780_810_496),
        ("simplenetv1_9m_m2", 9_508_968, 3_554_587_136, 3_562_050_816),
        ("simplenet_cifar_310k", 312_362, 55_788_160, 56_212_608),
        ("simplenet_cifar_460k", 385_790, 73_189_864, 73_642_248),
        ("simplenet_cifar_5m", 5_498_378, 652_151_296, 653_488_640),
        ("simplenet_cifar_5m_extra_pool", 5_498_378, 631_507_456, 632_787_968),
    ],
)
def test_costs_are_those_of_the_authors_code(name, params, macs, fvcore_total):
    profile = profiled(name, zoo.model_info(name).input_size)
    assert (profile.params, profile.macs, profile.fvcore_total) == (params, macs, fvcore_total)
    assert profile.complete


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("m1", [112, 56, 28, 28, 28, 28]),
        ("m2", [112, 56, 56, 28, 28, 28]),
        ("m3", [112, 56, 56, 56, 28, 28]),
        ("m4", [112, 112, 56, 56, 28, 28]),
    ],
)
def test_maps_shrink_where_the_mode_says(name, sizes):
    model = create(f"simplenetv1_5m_{name}", device="meta").eval()
    seen: list[int] = []
    for part in entries(model):
        part.register_forward_hook(lambda *arguments: seen.append(arguments[2].shape[-1]))
    _, maps = model.forward_intermediates(torch.empty(1, 3, 224, 224, device="meta"))
    assert seen == [*sizes, *[14] * 5, *[7] * 4]
    assert [224 // m.shape[-1] for m in maps] == [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32]


def test_initialisation_is_the_papers():
    torch.manual_seed(0)
    conv = create().stages[1].blocks[1].conv
    bound = 2**0.5 * (6 / (9 * (conv.in_channels + conv.out_channels))) ** 0.5
    assert 0.99 * bound < conv.weight.abs().max() <= bound
    assert conv.bias.abs().max() <= (9 * conv.in_channels) ** -0.5


# ---------------------------------------------------------------------------------------------------------- checkpoints


def authors_layout(model: Any, sizes: tuple[int, int]) -> dict[str, torch.Tensor]:
    """The weights of `model` under the authors' keys, with `sizes` modules to a layer and to a pooling."""
    tensors: dict[str, torch.Tensor] = {}
    number = 0
    for part in entries(model):
        if isinstance(part, Layer):
            for offset, module in enumerate((part.conv, part.bn)):
                tensors |= {f"features.{number + offset}.{key}": value for key, value in module.state_dict().items()}
        number += sizes[0] if isinstance(part, Layer) else sizes[1]
    return tensors | {f"classifier.{key}": value for key, value in model.head.fc.state_dict().items()}


@pytest.mark.parametrize("sizes", [(4, 2), (3, 2), (3, 1)])
def test_every_numbering_of_published_files_is_read(sizes, tmp_path):
    torch.manual_seed(0)
    model = create("simplenet_cifar_310k")
    tensors = authors_layout(model, sizes)
    assert {"features.0.weight", f"features.{4 * sizes[0] + sizes[1]}.weight"} < tensors.keys()
    old = {k: v for k, v in tensors.items() if not k.endswith("num_batches_tracked")}  # as torch 0.3 wrote it
    path = tmp_path / "checkpoint.pth.tar"
    torch.save({"epoch": 3, "arch": "simplenet", "state_dict": {f"module.{k}": v for k, v in old.items()}}, path)
    loaded = zoo.create_model("simplenet_cifar_310k", checkpoint_path=path)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.eval()(images), model.eval()(images))


def test_a_checkpoint_of_another_table_is_an_error():
    tensors = authors_layout(create("simplenet_cifar_310k"), (4, 2))
    with pytest.raises(CheckpointError, match="misshapen"):
        zoo.load_checkpoint(create("simplenet_cifar_460k"), tensors)
    fewer = {key: value for key, value in tensors.items() if not key.startswith(("features.0.", "features.1."))}
    with pytest.raises(CheckpointError, match="24 convolutions and batch norms, the model 26"):
        zoo.load_checkpoint(create("simplenet_cifar_310k"), fewer)


def test_weights_for_cifar_say_what_they_are_for_and_how_they_come():
    tags = {weights.tag: weights for weights in zoo.model_info("simplenet_cifar_5m_extra_pool").weights}
    assert {tag: (w.num_classes, w.top1) for tag, w in tags.items()} == {
        "coderx7_cifar10": (10, 95.51),
        "coderx7_cifar10_201805": (10, 95.32),
        "coderx7_cifar100": (100, 78.37),
        "coderx7_cifar100_201805": (100, 77.83),
    }
    with pytest.raises(DownloadError, match=r"by hand.*CIFAR100/78\.37"):
        zoo.create_model("simplenet_cifar_5m_extra_pool.coderx7_cifar100")


# ------------------------------------------------------------------------------------------------------------ arguments


def test_dropout_lies_where_the_table_says():
    rates = (*[0.0] * 6, 0.3, *[0.0] * 5, 0.05)
    model = create(drop_rates=rates, drop_rate=0.5)
    found = {i: part.drop.p for i, part in enumerate(entries(model)) if isinstance(part.drop, nn.Dropout2d)}
    assert found == {6: 0.3, 12: 0.05}
    assert model.head.drop.p == 0.5
    images = torch.randn(1, 3, 64, 64)
    model.train()
    assert not torch.equal(model(images), model(images))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dims": (64, 128)}, "dims holds widths"),
        ({"dims": ((64,),)}, "dims holds widths"),
        ({"dims": ((64,), (0,)), "downsamples": "conv"}, "dims must be whole numbers above zero"),
        ({"dims": ((64,), (64,)), "downsamples": ("conv", "pool")}, "downsamples has 2 items for 1 stages"),
        ({"downsamples": "stride"}, "'conv' or 'pool'"),
        ({"dims": ((64,), ()), "downsamples": "conv", "pointwise": ()}, "no layer that could stride"),
        ({"pointwise": (13,)}, "numbers of layers, 0 to 12"),
        ({"drop_rates": (0.0,) * 16}, "16 rates for 13 layers and 2 poolings"),
        ({"drop_rates": (0.1, 1.0)}, r"drop_rates\[1\]"),
        ({"width_factor": 0}, "width_factor"),
        ({"global_pool": "maximum"}, "Did you mean max"),
    ],
)
def test_arguments_that_cannot_be_are_errors(arguments, message):
    with pytest.raises(ConfigError, match=message):
        create(**arguments)


def test_a_stage_may_be_a_pooling_alone():
    model = create(dims=((16,), (24,), ()), downsamples=("conv", "pool"), pointwise=(), num_classes=5)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    assert [info["num_chs"] for info in model.feature_info] == [12, 12]  # half of them: width_factor


@pytest.mark.parametrize(
    ("name", "least"), [("simplenet_test", 25), ("simplenetv1_small_m2_05", 25), ("simplenet_cifar_310k", 16)]
)
def test_images_that_are_too_small(name, least):
    model = zoo.create_model(name, pretrained=False).eval()
    assert model(torch.randn(1, 3, least, least)).isfinite().all()
    for height, width in ((least - 1, least), (least, least - 1)):
        with pytest.raises(
            ConfigError, match=rf"too small: a map of .* This network takes images from {least}x{least}"
        ):
            model(torch.randn(1, 3, height, width))


def test_the_fast_form_is_a_chain_of_convolutions():
    model = create("simplenet_cifar_310k").eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 2)
                module.bias.normal_()
    fast = zoo.optimize_for_inference(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    torch.testing.assert_close(fast(images), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


# -------------------------------------------------------------------------------------------------------------- recipes


def test_the_rate_falls_at_the_milestones():
    config = SchedulerConfig(sched="multistep", epochs=10, warmup_epochs=0, decay_milestones=(3, 7), decay_rate=0.1)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler, epochs = make_scheduler(optimizer, config, updates_per_epoch=100)
    rates = []
    for epoch in range(epochs):
        scheduler.step_update(100 * epoch + 50)
        rates.append(round(optimizer.param_groups[0]["lr"], 6))
    assert rates == [1.0] * 3 + [0.1] * 4 + [0.01] * 3
    for update, rate in ((299, 1.0), (300, 0.1), (699, 0.1), (700, 0.01)):
        scheduler.step_update(update)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
    with pytest.raises(ConfigError, match="decay_milestones, such as"):
        SchedulerConfig(sched="multistep")
    with pytest.raises(ConfigError, match="decay_milestones, such as"):
        SchedulerConfig(decay_milestones=(3,))
    with pytest.raises(ConfigError, match="rising numbers"):
        SchedulerConfig(sched="multistep", decay_milestones=(7, 3))


@pytest.mark.parametrize("name", zoo.list_models("simplenetv1_*", pretrained=True))
def test_recipes_for_imagenet_are_the_authors(name):
    name = name.partition(".")[0]
    config = load_config(TrainingConfig, f"configs/vision/imagenet1k/{name}.yaml")
    assert (config.model.name, config.model.args) == (name, {})
    optimizer = config.optimizer
    assert (optimizer.opt, optimizer.lr, optimizer.eps) == ("rmsproptf", 0.0195, 1e-3)
    assert optimizer.weight_decay in ((1e-5,) if name.endswith("_05") else (2e-5, 3e-5))
    schedule = config.scheduler
    assert (schedule.sched, schedule.epochs, schedule.warmup_lr) == ("step", 900, 1e-3)
    assert (schedule.decay_epochs, schedule.decay_rate) == (1, 0.981)
    assert config.train.global_batch_size in (None, 256)
    assert (config.data.batch_size, config.loss.smoothing, config.train.model_ema_decay) == (256, 0.1, 0.9999)
    assert (config.train.model_ema, config.train.channels_last) == (True, True)


@pytest.mark.parametrize("name", ["310k", "460k", "5m", "5m_extra_pool"])
def test_recipes_for_cifar_are_those_of_the_authors_logs(name):
    config = load_config(TrainingConfig, f"configs/vision/cifar10_simplenet_{name}.yaml")
    assert config.model.name == f"simplenet_cifar_{name}"
    optimizer, schedule = config.optimizer, config.scheduler
    assert (optimizer.opt, optimizer.lr, optimizer.eps, optimizer.args) == ("adadelta", 0.1, 1e-3, {"rho": 0.9})
    assert (optimizer.weight_decay, config.data.batch_size) == (0.002, 100)
    assert (schedule.sched, schedule.epochs, schedule.decay_rate) == ("multistep", 550, 0.1)
    assert schedule.decay_milestones == (100, 190, 306, 390, 440, 540)
    assert config.data.mean == pytest.approx([value / 255 for value in (125.3, 123.0, 113.9)], abs=5e-5)
    assert config.data.std == pytest.approx([value / 255 for value in (63.0, 62.1, 66.7)], abs=5e-5)
    assert config.augment.train_crop_mode == "src"  # 4 pixels of border, and a crop of the size that was
    model = zoo.create_model(config.model.name, pretrained=False, **config.model.args)
    behind = {"head.drop"} | {f"{key}.drop" for key, module in model.named_modules() if isinstance(module, Pool)}
    dropouts = {key: m.p for key, m in model.named_modules() if isinstance(m, nn.Dropout | nn.Dropout2d) and m.p}
    assert dropouts == dict.fromkeys(behind, 0.1)


def test_a_file_of_the_network_before_is_warned_of(tmp_path, caplog):
    model = zoo.create_model("simplenetv1_small_m1_05", pretrained=False)
    for ending, warned in (("a7ec600b", True), ("be804903", False)):
        path = tmp_path / f"simplenetv1_small_m1_05-{ending}.pth"
        torch.save(model.state_dict(), path)
        zoo.create_model("simplenetv1_small_m1_05", checkpoint_path=path)
        assert ("before 11 April 2023" in caplog.text) is warned
        caplog.clear()
