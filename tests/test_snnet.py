"""SN-Net against its authors' code, and the contract as far as it holds for a model that computes in parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from timm.optim import create_optimizer_v2
from torch import nn

import zoo
from tests import golden
from tests.launcher import Launcher
from zoo.config import load_config
from zoo.errors import ConfigError
from zoo.evaluation.prediction import class_activation_map
from zoo.models.snnet import Stitch, paired
from zoo.profiling import stitch_costs
from zoo.training import TrainingConfig


def small(**arguments):
    return zoo.create_model("snnet_test", pretrained=False, **arguments)


def small_swin(**arguments):
    depths = ((2, 2, 2, 1), (2, 2, 4, 1))
    sizes = {"dims": (16, 24), "depths": depths, "num_heads": (1, 2), "window_size": 2, "img_size": 64}
    return zoo.create_model("snnet_swin_ti_s_b", pretrained=False, **(sizes | arguments))


def images(batch: int = 2, side: int = 64, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------------------- fidelity


SLOW = ("snnet_deit_ti_s_b", "snnet_deit_ti_s_ls_init", "snnet_swin_ti_s_b")  # large, or every block in float64


@pytest.mark.parametrize(
    "file", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in golden.names("snnet")]
)
def test_golden_parity(file):
    reference = golden.load("snnet", file)
    model = zoo.create_model(file.removesuffix("_ls_init"), pretrained=False)
    assert sum(parameter.numel() for parameter in model.parameters()) == reference["parameters"]
    report = zoo.load_checkpoint(model, golden.state_dict(reference))
    assert not report.dropped
    model.double().eval()

    assert model.num_stitches == reference["num_configs"]
    for number, stitch in reference["stitch_configs"].items():
        found = model.stitch_config(int(number))
        assert list(found.anchors) == stitch["comb"]
        assert [list(cut) for cut in found.cuts] == stitch["cfg"]
        assert list(found.layers) == stitch["layer"]
        assert found.stage == stitch.get("stage")

    batch = golden.inputs(reference)["input"].double()
    if file.endswith("_ls_init"):
        model.init_stitches([batch[:1], batch[1:]])  # in several batches as in one
    outputs = {}
    with torch.no_grad():
        for name in reference["outputs"]:
            kind, _, number = name.rpartition("_")
            if kind in ("logits", "features"):
                model.set_stitch(int(number))
                outputs[name] = model(batch) if kind == "logits" else model.forward_features(batch)
            else:
                layer, _, tensor = name.rpartition(".")
                outputs[name] = model.get_parameter(f"{layer}.transform.{tensor}")
    assert reference["precision"] == "float64"
    assert max(golden.errors(reference, outputs).values()) < 1e-9


@pytest.mark.parametrize(
    ("kernel_size", "stride", "neighbours", "all_anchors", "layers"),
    [
        (1, 1, 27, 117, 12),
        (2, 1, 71, 732, 11),
        (2, 2, 51, 387, 6),
        (3, 1, 111, 1748, 10),
        (3, 3, 75, 813, 4),
        (4, 1, 147, 3035, 9),
        (4, 4, 99, 1395, 3),
    ],
)
def test_numbers_of_stitches_are_the_papers(kernel_size, stride, neighbours, all_anchors, layers):
    pairs = paired(12, kernel_size, stride)
    assert 3 + 2 * len(pairs) == neighbours
    assert len(set(pairs.values())) == max(pairs.values()) + 1 == layers
    arguments = {"dims": (4, 8, 12), "num_heads": (1, 1, 1), "depth": 12, "device": "meta"}
    model = small(kernel_size=kernel_size, stride=stride, nearest=False, **arguments)
    assert model.num_stitches == all_anchors


PUBLISHED = {  # stitch: MACs with norms, parameters of the path
    "snnet_deit_ti_s_b": {
        0: (1_258_411_200, 5_717_416),
        1: (4_608_338_304, 22_050_664),
        2: (17_582_740_224, 86_567_656),
        3: (4_696_010_496, 22_345_960),
        4: (4_316_862_720, 20_571_496),
        20: (3_414_835_968, 16_142_824),
        24: (2_758_967_808, 13_038_760),
        36: (1_652_086_272, 7_720_360),
        37: (17_961_426_432, 88_190_440),
        56: (10_048_040_448, 49_222_120),
        70: (6_121_909_248, 29_742_952),
    },
    "snnet_swin_ti_s_b": {
        0: (4_509_194_496, 28_288_354),
        1: (8_768_534_784, 49_606_258),
        2: (15_467_826_176, 87_768_224),
        3: (8_797_436_160, 49_615_570),
        4: (15_220_458_496, 87_692_407),
        7: (8_797_436_160, 49_383_154),
        13: (7_377_656_064, 42_277_186),
        23: (4_893_040_896, 29_841_742),
        24: (14_026_420_224, 85_063_014),
        28: (12_936_597_504, 79_548_630),
        40: (9_667_129_344, 63_005_478),
    },
}


@pytest.mark.parametrize(
    ("name", "count"),
    [("snnet_deit_ti_s_b", 71), pytest.param("snnet_swin_ti_s_b", 41, marks=pytest.mark.slow)],  # three times as long
)
def test_costs_of_all_stitches_are_the_published(name, count, tmp_path):
    model = zoo.create_model(name, device="meta")
    costs = stitch_costs(model)
    assert len(costs) == model.num_stitches == count
    published = PUBLISHED[name]
    assert {number: (costs[number].fvcore_total, costs[number].params) for number in published} == published
    model.set_stitch(20)  # a path profiled as a whole
    assert zoo.profile(model, (3, 224, 224)).macs == costs[20].macs
    lines = costs.table().splitlines()
    assert len(lines) == 1 + count
    expected = "to block 6 > anchor 1 from block 5" if "deit" in name else "to stage 2 block 4 > anchor 1 from block 14"
    assert f"anchor 0 {expected}" in lines[21]
    assert costs.plot(tmp_path / "costs.svg").read_text().count("<use") > count
    with pytest.raises(ConfigError, match=f"{count} stitches, but 2 accuracies"):
        costs.plot(tmp_path / "costs.svg", top1=(1, 2))
    with pytest.raises(ConfigError, match="takes an SN-Net"):
        stitch_costs(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="one path alone"):
        stitch_costs(model.extract(1))
    assert stitch_costs(name) == costs


# ------------------------------------------------------------------------------------------------------------- stitches


def test_stitches_are_chosen_at_run_time():
    model = small().eval()
    assert model.num_stitches == 2 + 7  # two windows over three blocks: 4 pairs, and 3 more
    assert model.stitch_config(3) == Stitch(anchors=(0, 1), cuts=((0, 1),), layers=(0,))
    with torch.no_grad():
        logits = []
        for number in range(model.num_stitches):
            model.set_stitch(number)
            logits.append(model(images()))
            end = model.anchors[model.stitch_config(number).anchors[-1]]
            assert model.get_classifier() is end.head
            assert model.num_features == end.embed_dim
        assert all(not torch.equal(one, other) for i, one in enumerate(logits) for other in logits[:i])
        model.set_stitch(0)
        assert torch.equal(model(images()), logits[0])
        torch.testing.assert_close(model.anchors[1](images()), logits[1])
    for wrong in (-1, 9, 1.0, "0", True):
        with pytest.raises(ConfigError, match="stitches 0 to 8"):
            model.set_stitch(wrong)


@pytest.mark.parametrize("number", [0, 1, 4])
def test_a_path_on_its_own(number):
    model = small().eval()
    alone = model.extract(number)
    assert alone.num_stitches == 1
    assert model.num_stitches == 9
    model.set_stitch(number)
    with torch.no_grad():
        assert torch.equal(alone(images()), model(images()))
        assert alone(images(side=96)).shape == (2, 1000)
    front = model.anchors[model.stitch_config(number).anchors[0]]
    own = sum(parameter.numel() for parameter in alone.parameters())
    rule = stitch_costs(model)[number].params  # which leaves out the front's class token and positions of a stitch
    assert own == rule + (0 if number < 2 else front.cls_token.numel() + front.pos_embed.numel())
    model.anchors[0].patch_embed.proj.weight.data.zero_()
    with torch.no_grad():
        assert not torch.equal(alone(images()), model(images())) or number == 1


def test_least_squares_initialisation():
    """Where a linear map leads from the one anchor's activations to the other's, the stitching layers find it."""
    torch.manual_seed(0)
    model = small().eval()
    with pytest.raises(ConfigError, match="at least one batch"):
        model.init_stitches([])
    for path in (0, 4):
        with pytest.raises(ConfigError, match="holds one path alone: call it before `extract`"):
            model.extract(path).init_stitches([images()])
    model.train()
    torch.manual_seed(0)
    model.init_stitches([images(8), images(4) + 1])
    assert model.training
    model.eval()
    layer = model.stitch_layers[0][1].transform  # of (1, 2), (2, 1), (2, 2): the mean of three solutions
    batch = torch.cat([images(8), images(4) + 1])
    with torch.no_grad():
        inputs, targets = {}, {}
        for number, store in ((0, inputs), (1, targets)):
            x = model.embed(number, batch)
            for i, block in enumerate(model.anchors[number].blocks):
                targets[i] = x.flatten(0, 1).double() if number else targets.get(i)
                x = block(x)
                if not number:
                    store[i] = nn.functional.pad(x.flatten(0, 1).double(), (0, 1), value=1.0)
        solutions = [
            torch.linalg.lstsq(inputs[j], targets[t], driver="gelsd").solution for j, t in ((1, 2), (2, 1), (2, 2))
        ]
        expected = torch.stack(solutions).mean(0)
    torch.testing.assert_close(layer.weight.double(), expected[:-1].T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.bias.double(), expected[-1], rtol=1e-4, atol=1e-5)


def test_training_draws_stitches():
    torch.manual_seed(0)
    model = small(sample_stitches=True, num_classes=4).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch, labels = images(8), torch.arange(8) % 4
    trained = set()
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(batch), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        trained |= {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-15:]) < 0.8 * sum(losses[:15])
    assert trained == {name for name, _ in model.named_parameters()}  # every part had its turn
    model.eval()
    assert torch.equal(model(images()), model(images()))


def test_the_norm_of_a_stitched_path_is_a_choice():
    plain, normed = small(stitch=3).eval(), small(stitch=3, end_norm=True).eval()
    normed.load_state_dict(plain.state_dict())
    with torch.no_grad():
        features = plain.forward_features(images())
        assert torch.equal(plain.anchors[1].norm(features), normed.forward_features(images()))


# ------------------------------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.slow), 4])
def test_contract(number):
    model = small(stitch=number, num_classes=7).eval()
    expected = model(images())
    assert expected.shape == (2, 7)
    features = model.forward_features(images())
    assert features.shape == (2, 65, model.num_features)
    assert torch.equal(model.forward_head(features), expected)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    final, maps = model.forward_intermediates(images())
    assert torch.equal(final, features)
    assert [tuple(m.shape[1:]) for m in maps] == [(info["num_chs"], 8, 8) for info in model.feature_info]
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(images()), expected)
    model.set_grad_checkpointing(False)

    exported = torch.export.export(model, (images(),), dynamic_shapes=({0: torch.export.Dim("batch", max=8)},)).module()
    torch.testing.assert_close(exported(images(3)), model(images(3)), rtol=1e-4, atol=1e-5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()), expected, rtol=1e-4, atol=1e-5)

    model.reset_classifier(3)
    assert model(images(1, 96)).shape == (1, 3)
    model.reset_classifier(0)
    assert model(images()).shape == (2, model.num_features)
    assert small(stitch=number, in_chans=1)(images(channels=1)).shape == (2, 1000)
    wrapped = small(stitch=number, features_only=True, out_indices=(0, 2)).eval()
    assert [m.shape[1] for m in wrapped(images())] == [maps[0].shape[1], maps[2].shape[1]]
    assert zoo.profile(model, (3, 64, 64)).unknown_operators == {}


@pytest.mark.parametrize("make", ["small", "small_swin"])
def test_each_path_is_scripted_pruned_and_made_fast(make):
    model = {"small": small, "small_swin": small_swin}[make](num_classes=7).eval()
    with torch.no_grad():
        for number in (0, 1, model.num_stitches - 1):
            model.set_stitch(number)
            expected = model(images())
            torch.testing.assert_close(torch.jit.script(model)(images()), expected)
            torch.testing.assert_close(zoo.optimize_for_inference(model)(images()), expected, rtol=1e-4, atol=1e-5)
            blocks = len(model.feature_info)
            maps = model.forward_intermediates(images(), intermediates_only=True)
            for last in range(blocks):
                pruned = model.extract()
                assert pruned.prune_intermediate_layers([last]) == [last]
                assert len(pruned.feature_info) == last + 1
                assert pruned.num_features == maps[last].shape[1]
                assert torch.equal(pruned.forward_intermediates(images())[1][-1], maps[last])
                assert isinstance(pruned.get_classifier(), nn.Identity)
            kept = model.extract()
            kept.prune_intermediate_layers([blocks - 1], prune_head=False)
            assert torch.equal(kept(images()), expected)


def test_checkpoints_fit_other_classes_and_channels(tmp_path):
    """Those of every anchor: the heads start anew, the stems are adapted, all else is loaded."""
    model = small(num_classes=5).eval()
    folder = zoo.save_pretrained(model, tmp_path / "saved")
    other = zoo.create_model("snnet_test", checkpoint_path=folder, num_classes=3, in_chans=1, stitch=4).eval()
    heads, stems = (tuple(f"anchors.{i}.{part}" for i in (0, 1)) for part in ("head", "patch_embed.proj"))
    for name, tensor in model.state_dict().items():
        found = other.state_dict()[name]
        if name.startswith(heads):
            assert found.shape[0] == 3
        elif name.startswith(stems) and name.endswith("weight"):
            torch.testing.assert_close(found, tensor.sum(1, keepdim=True))
        else:
            assert torch.equal(found, tensor)
    features = zoo.create_model("snnet_test", checkpoint_path=folder, features_only=True, stitch=4).eval()
    model.set_stitch(4)
    maps = model.forward_intermediates(images(), intermediates_only=True)
    assert all(torch.equal(one, two) for one, two in zip(features(images()), maps, strict=True))


@pytest.mark.parametrize("number", [0, 1, 4])
def test_activation_maps(number):
    picture = Image.fromarray(torch.randint(256, (80, 80, 3), dtype=torch.uint8).numpy())
    arguments = {"dims": (8, 16), "num_heads": (1, 1), "window_size": 7}
    for model in (
        small(stitch=number),
        small(stitch=number, in_chans=1).extract(),
        small_swin(stitch=number, **arguments, img_size=224),
    ):
        side = model.pretrained_cfg["input_size"][1]
        activation = class_activation_map(model, picture)
        assert activation.shape == (side, side)
        assert 0 <= activation.min() <= activation.max() <= 1


def test_saved_and_opened(tmp_path):
    model = small(stitch=4).eval()
    folder = zoo.save_pretrained(model, tmp_path / "saved")
    again = zoo.create_model(f"local-dir:{folder}").eval()
    assert again.stitch == 4
    torch.testing.assert_close(again(images()), model(images()), rtol=0, atol=0)
    again.set_stitch(6)
    other = zoo.create_model(f"local-dir:{zoo.save_pretrained(again, tmp_path / 'other')}").eval()
    torch.testing.assert_close(other(images()), again(images()), rtol=0, atol=0)
    assert (other.stitch, again.stitch) == (6, 6)
    larger = zoo.create_model("snnet_test", checkpoint_path=folder, img_size=96)  # position tables are resized
    assert larger.anchors[1].pos_embed.shape == (1, 145, 64)


@pytest.mark.parametrize("number", [0, 1, 4])
def test_a_path_is_saved_and_opened(tmp_path, number):
    """A path that was extracted opens as such, and can be had of the whole network's weights."""
    model = small().eval()
    whole = zoo.save_pretrained(model, tmp_path / "whole")
    alone = model.extract(number)
    folder = zoo.save_pretrained(alone, tmp_path / "alone")
    for again in (
        zoo.create_model(f"local-dir:{folder}").eval(),
        zoo.create_model(f"local-dir:{whole}", extract=number).eval(),
        zoo.create_model("snnet_test", checkpoint_path=whole, extract=number).eval(),
    ):
        assert again.num_stitches == 1
        assert again.state_dict().keys() == alone.state_dict().keys() < model.state_dict().keys()
        torch.testing.assert_close(again(images()), alone(images()), rtol=0, atol=0)
    small_head = zoo.create_model("snnet_test", checkpoint_path=whole, extract=number, num_classes=3)
    assert small_head(images()).shape == (2, 3)
    with pytest.raises(ConfigError, match="There are stitches 0 to 8, and no 9"):
        zoo.create_model("snnet_test", extract=9)


def test_layers_decay_side_by_side():
    model = small(device="meta")
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    scales = {parameter: group["lr_scale"] for group in optimizer.param_groups for parameter in group["params"]}
    named = {name: scales[parameter] for name, parameter in model.named_parameters()}
    assert len(named) == len(scales)
    assert named["anchors.0.blocks.1.attn.qkv.weight"] == named["anchors.1.blocks.1.mlp.fc1.weight"]
    assert named["anchors.0.cls_token"] < named["anchors.0.blocks.0.norm1.weight"] < named["anchors.0.head.weight"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dims": (32,)}, "dims has 1 stages and num_heads has 2"),
        ({"stitch": 9}, "stitches 0 to 8"),
        ({"kernel_size": 0}, "kernel_size must be a whole number from 1"),
        ({"drop_path_rate": -1}, "drop_path_rate must be a number from 0"),
        ({"stich": 3}, "Did you mean stitch"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        small(**arguments)


def test_recipe_is_the_authors():
    config = load_config(TrainingConfig, "configs/vision/imagenet1k/snnet_deit_ti_s_b.yaml")
    assert config.model.args == {"sample_stitches": True, "drop_path_rate": 0.1}
    assert (config.optimizer.lr, config.train.global_batch_size, config.scheduler.epochs) == (1e-4, 1024, 50)
    assert (config.distill.kind, config.distill.alpha) == ("hard", 0.5)


def test_recipe_of_swin_anchors_is_the_authors():
    """At the anchors' rate: 5e-4 for 512 images, times 0.1; the stitching layers' own is named in the header."""
    config = load_config(TrainingConfig, "configs/vision/imagenet1k/snnet_swin_ti_s_b.yaml")
    assert config.model.name == "snnet_swin_ti_s_b"
    assert config.model.args == {"sample_stitches": True, "drop_path_rate": 0.2}
    assert (config.optimizer.opt, config.train.global_batch_size, config.scheduler.epochs) == ("adamw", 1024, 50)
    assert config.optimizer.lr == pytest.approx(5e-4 * 1024 / 512 * 0.1)
    assert (config.optimizer.weight_decay, config.optimizer.clip_grad) == (0.05, 5.0)
    assert config.scheduler.sched == "cosine"
    assert (config.distill.kind, config.distill.alpha) == ("hard", 0.5)
    assert (config.distill.teacher or "").startswith("timm/regnety_160")


SMALL = """
model: {name: snnet_test, args: {dims: [16, 32], img_size: 16}}
data: {name: digits, batch_size: 128, workers: 0, input_size: [1, 16, 16], mean: [0.3], std: [0.38]}
augment: {scale: [0.8, 1.0], hflip: 0.0, color_jitter: 0.0}
optimizer: {lr: 3.0e-3}
scheduler: {epochs: 1, warmup_epochs: 0}
train: {global_batch_size: 256, device: cpu}
output: {tracker: null}
"""


def weights_after(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "last" / "model.safetensors")


@pytest.mark.slow  # a minute: nine processes
def test_several_processes_train(tmp_path):
    """A path that leaves weights out is learned by two as by one; with paths drawn, every process draws its own."""
    (tmp_path / "small.yaml").write_text(SMALL)
    argv = ["--config", tmp_path / "small.yaml"]
    fixed = [*argv, "--model.args.stitch", 4]
    drawn = [*argv, "--model.args.sample_stitches", "true", "--data.batch_size", 64, "--scheduler.epochs", 4]
    launcher = Launcher()
    try:
        launcher.run(tmp_path, *fixed, "--output.dir", tmp_path / "one")
        launcher.run(tmp_path, *fixed, "--data.batch_size", 64, "--output.dir", tmp_path / "two", processes=2)
        launcher.run(tmp_path, *drawn, "--output.dir", tmp_path / "drawn", processes=2)
        job = launcher.start(
            tmp_path, *drawn, "--train.parallel", "fsdp", "--output.dir", tmp_path / "sharded", processes=2
        )
        assert job.wait() == [1, 1]
        assert "error: train.parallel fsdp does not go with StitchedViT" in job.text()
    finally:
        launcher.close()
    one, two, every = (weights_after(tmp_path / name) for name in ("one", "two", "drawn"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)
        assert not torch.equal(every[name], tensor)  # which is as it began where the path does not lead


@pytest.mark.parametrize("number", [0, 1, 2, 5])
def test_swin(number):
    """The same of Swin anchors: stitches within the stages, at fixed input size."""
    model = small_swin(stitch=number, num_classes=7).eval()
    assert model.num_stitches == 2 + 1 + 1 + 3
    expected = model(images())
    features = model.forward_features(images())
    torch.testing.assert_close(model.forward_head(features), expected)
    maps = model.forward_intermediates(images(), intermediates_only=True)
    for info, found in zip(model.feature_info, maps, strict=True):
        side = 64 // info["reduction"]
        assert found.shape == (2, info["num_chs"], side, side)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(images()), expected)
    with torch.no_grad():
        assert torch.equal(model.extract()(images()), expected)
    own = sum(parameter.numel() for parameter in model.extract().parameters())
    assert own >= stitch_costs(model, (3, 64, 64))[number].params
    model.reset_classifier(3)
    assert model(images()).shape == (2, 3)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    with torch.no_grad():
        before = model.stitch_layers[2][0][0].transform.weight.clone()
        model.init_stitches([images(4)])
    assert not torch.equal(model.stitch_layers[2][0][0].transform.weight, before)


@pytest.mark.slow  # a minute: compiled and exported; test_swin has the rest
@pytest.mark.parametrize("number", [0, 1, 5])
def test_contract_of_swin(number):
    model = small_swin(stitch=number, num_classes=7).eval()
    expected = model(images())
    exported = torch.export.export(model, (images(),), dynamic_shapes=({0: torch.export.Dim("batch", max=8)},)).module()
    torch.testing.assert_close(exported(images(3)), model(images(3)), rtol=1e-4, atol=1e-5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()), expected, rtol=1e-4, atol=1e-5)
    assert small_swin(stitch=number, in_chans=1)(images(channels=1)).shape == (2, 1000)
    wrapped = small_swin(stitch=number, features_only=True, out_indices=(0, -1)).eval()
    maps = model.forward_intermediates(images(), intermediates_only=True)
    assert [m.shape for m in wrapped(images())] == [maps[0].shape, maps[-1].shape]
    profile = zoo.profile(model, (3, 64, 64))
    assert profile.unknown_operators == {}
    assert profile.macs == stitch_costs(model, (3, 64, 64))[number].macs
