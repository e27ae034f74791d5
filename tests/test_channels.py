"""Channels: which can go, which do, and a model without them that saves and opens like any other."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import zoo
from tests.language import random_model, small
from zoo.errors import CheckpointError, ConfigError, MissingDependencyError
from zoo.sparsity import apply_masks, follows_n_m, masks_of, n_m_mask, sparse_parameters
from zoo.sparsity.channels import (
    channel_counts,
    channel_groups,
    channel_positions,
    dead_channels,
    kept_widths,
    resize,
    retire_channels,
    shrink,
    slice_tensor,
    weakest_channels,
)

SIZE = (3, 64, 64)
SMALL: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (16, 16, 24, 32), "num_classes": 10}
MODELS = {
    "poolformer": lambda: zoo.create_model("poolformer_s12", **SMALL),
    "convformer": lambda: zoo.create_model("convformer_s18", **SMALL),
    "caformer": lambda: zoo.create_model("caformer_s18", **{**SMALL, "dims": (16, 16, 32, 32)}),
    "slak": lambda: zoo.create_model("slak_tiny", **SMALL, kernel_sizes=(13, 11, 9, 7), small_kernel_size=3),
    "resnet": lambda: timm.create_model("resnet10t", num_classes=10),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, *SIZE)


def settled(model: nn.Module) -> nn.Module:
    """`model` in evaluation, with weights at which every part of it matters."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                if tensor.ndim > 1:
                    nn.init.kaiming_normal_(tensor, nonlinearity="linear")
                else:
                    tensor.uniform_(0.5, 1.5)
    return model.eval()


def some_channels(groups, share: int = 3) -> dict[str, torch.Tensor]:
    return {name: torch.randperm(group.size)[: group.size // share] for name, group in groups.items()}


def without(model: nn.Module, groups, channels) -> nn.Module:
    """A copy of `model` in which everything of these channels is zero."""
    zeroed = copy.deepcopy(model)
    apply_masks(zeroed, {name: ~gone for name, gone in channel_positions(zeroed, groups, channels).items()})
    return zeroed


def params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# ------------------------------------------------------------------------------------------------------------ shrinking


@pytest.mark.parametrize("family", MODELS)
def test_a_shrunk_model_computes_what_it_did_with_the_channels_at_zero(family):
    model = settled(MODELS[family]())
    groups = channel_groups(model, SIZE)
    assert groups
    channels = some_channels(groups)
    expected = without(model, groups, channels)(images := torch.randn(2, *SIZE))
    before = zoo.profile(model, input_size=SIZE)
    shrink(model, groups, channels)
    after = zoo.profile(model, input_size=SIZE)
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert after.params < 0.9 * before.params
    assert after.macs < 0.9 * before.macs
    assert after.complete


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("mobilellm_125m", {}),
        ("mobilellm_ls_125m", {"layer_map": (0, 0, 1, 1, 2, 2)}),
        ("mobilellm_r1_140m", {}),
        ("youtu_llm_2b", {"num_kv_heads": None}),
    ],
)
@torch.no_grad()
def test_language_models_lose_hidden_channels_of_their_swiglus(name: str, args: dict[str, Any], tmp_path: Path):
    """And with them what is saved, opens again, and every form that follows: layer by layer as wide as is left."""
    model = random_model(name, **args)
    for parameter in model.parameters():
        parameter.mul_(0.5)  # larger ones compute what float32 rounds too much to compare
    groups = channel_groups(nn.Sequential(model)[0])
    assert [group.size for group in groups.values()] == [64] * 3
    channels = {name: range(5, 5 + count) for name, count in zip(groups, (40, 7, 20), strict=True)}
    tokens = torch.randint(257, (2, 20))
    expected = without(model, groups, channels)(tokens)
    before = zoo.profile(model, tokens=20)
    masks = {f"{first}.weight": torch.rand(64, 32) < 0.5 for first in groups}
    smaller = shrink(model, groups, channels, masks)
    torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert model.config.hidden_dim == (24, 57, 44)
    assert [len(mask) for mask in smaller.values()] == [24, 57, 44]
    after = zoo.profile(model, tokens=20)
    assert before.params - after.params == 67 * 3 * 32
    times = len(args.get("layer_map", (0, 1, 2))) // 3
    assert before.macs - after.macs == 67 * 3 * 32 * times  # of a token
    assert after.complete

    again: Any = zoo.create_model(f"local-dir:{zoo.save_pretrained(model, tmp_path / 'model')}").eval()
    assert torch.equal(again(tokens), model(tokens))
    with pytest.raises(CheckpointError, match=r"says itself what it is a model of: name it .*, 'local-dir:/.*/model'"):
        zoo.load_checkpoint(small(name, **args), tmp_path / "model")
    untrained = small(name, **args, kept_widths=kept_widths(model))
    assert again.config == untrained.config == small(name, **args, hidden_dim=[24, 57, 44]).config == model.config
    untrained.load_state_dict(model.state_dict())
    stored = small(name, **args, kept_widths=kept_widths(model), quantization={"to": "int8", "group_size": 32})
    assert stored.config == model.config
    reopened: Any = zoo.create_model(f"local-dir:{zoo.save_pretrained(untrained, tmp_path / 'untrained')}").eval()
    assert torch.equal(reopened(tokens), model(tokens))
    assert channel_counts(channel_groups(again), {})["model.layers.1." + groups_name(model)][0].shape == (57,)

    fast: Any = zoo.optimize_for_inference(again)
    cache = fast.make_cache(2, 20)
    steps = [fast(tokens[:, i : i + 1], cache=cache) for i in range(20)]
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def groups_name(model: Any) -> str:
    return f"{model.config.mlp_name}.gate_proj"


def test_layers_that_lost_as_many_channels_have_one_width_again(tmp_path: Path):
    """And the model that is saved opens in transformers as it is."""
    model = random_model("mobilellm_125m")
    groups = channel_groups(model)
    shrink(model, groups, {name: range(start, start + 10) for start, name in enumerate(groups)})
    assert model.config == small("mobilellm_125m", hidden_dim=54).config
    config = json.loads((zoo.save_pretrained(model, tmp_path / "model") / "config.json").read_text())
    assert (config["model_type"], config["intermediate_size"]) == ("llama", 54)


def test_lists_are_widths_too():
    config = small("mobilellm_125m").config
    assert dataclasses.replace(config, hidden_dim=[24, 57, 44]).hidden_dim == (24, 57, 44)


def test_matrices_that_would_not_fit_together_are_an_error():
    with pytest.raises(ConfigError, match="SwiGLU of layer 0 would make 64 and 64 hidden channels and read 5"):
        resize(small("mobilellm_125m"), {"tensors": {"model.layers.0.mlp.down_proj.weight": [None, 5]}})


def test_channels_that_cannot_be_are_errors_and_nothing_is_cut():
    model = random_model("mobilellm_125m")
    groups = channel_groups(model)
    first = next(iter(groups))
    for channels in ([1.5], torch.arange(64) < 3):
        with pytest.raises(ConfigError, match=r"Channels of .*gate_proj are given by number, as integers, and not as"):
            shrink(model, groups, {first: channels})
    shrink(model, groups, {first: [1, 2]})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"channels that are gone, or of another model: 64 of a tensor's 62\. Find"):
        shrink(model, groups, {first: [3]})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("widths", [(24, 57), (24, 57, 0), (24, 57, 1.5), 0, (), "wide"])
def test_widths_that_cannot_be(widths: Any):
    with pytest.raises(
        ConfigError, match="hidden_dim must be a whole number from 1 up, or one for each of the 3 stored"
    ):
        small("mobilellm_125m", hidden_dim=widths)


def test_what_layers_say_of_their_widths_follows():
    model = settled(MODELS["convformer"]())
    groups = channel_groups(model, SIZE)
    shrink(model, groups, {"stages.1.blocks.0.token_mixer.pwconv1": range(5)})
    mixer = model.stages[1].blocks[0].token_mixer
    assert (mixer.pwconv1.out_channels, mixer.pwconv2.in_channels) == (27, 27)
    assert (mixer.dwconv.in_channels, mixer.dwconv.out_channels, mixer.dwconv.groups) == (27, 27, 27)


def test_maps_that_became_narrower_are_described_so():
    model = settled(MODELS["resnet"]())
    groups = channel_groups(model, SIZE)
    shrink(model, groups, {name: range(8) for name, group in groups.items()})
    features = model.forward_features(images())
    assert model.num_features == features.shape[1] < 512
    assert model.feature_info[-1]["num_chs"] == features.shape[1]
    model.reset_classifier(7)
    assert model(images()).shape == (2, 7)


def test_channels_that_others_depend_on_are_left_alone():
    """A LayerNorm mixes the stream's channels, attention's belong to heads, and the classifier's are classes."""
    groups = channel_groups(MODELS["caformer"](), SIZE)
    assert set(groups) == {
        *(f"stages.{i}.blocks.0.mlp.fc1" for i in range(4)),
        *(f"stages.{i}.blocks.0.token_mixer.pwconv1" for i in range(2)),
    }


def test_looking_for_channels_changes_nothing():
    model = MODELS["resnet"]().train()
    model.fc.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    channel_groups(model, SIZE)
    assert model.training
    assert [p.requires_grad for p in model.fc.parameters()] == [False, True]
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_model_that_shrinks_twice_and_trains_on():
    model = settled(MODELS["poolformer"]())
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        groups = channel_groups(model, SIZE)
        model(images()).square().mean().backward()
        optimizer.step()
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        channels = some_channels(groups, 4)
        sliced = {
            parameter: {
                key: slice_tensor(value, names[id(parameter)], groups, channels) if value.ndim else value
                for key, value in state.items()
            }
            for parameter, state in optimizer.state.items()
        }
        shrink(model, groups, channels)
        optimizer.state.update(sliced)
        optimizer.zero_grad()
    model(images()).square().mean().backward()
    optimizer.step()
    assert model.stages[0].blocks[0].mlp.fc1.out_channels == 36  # of 64: a quarter gone, twice
    assert all(s["exp_avg"].shape == p.shape for p, s in optimizer.state.items())


# --------------------------------------------------------------------------------------------------- saving and opening


def test_a_shrunk_model_opens_like_any_other(tmp_path):
    model = settled(MODELS["convformer"]())
    groups = channel_groups(model, SIZE)
    shrink(model, groups, some_channels(groups))
    expected = model(batch := images())
    zoo.save_pretrained(model, tmp_path / "small")
    opened = zoo.create_model(f"local-dir:{tmp_path / 'small'}").eval()
    torch.testing.assert_close(opened(batch), expected, rtol=1e-5, atol=1e-5)
    assert params(opened) == params(model)

    zoo.save_pretrained(opened, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["zoo"]["kept_widths"] == kept_widths(model)
    assert kept_widths(MODELS["convformer"]()) == {}

    other = zoo.create_model(f"local-dir:{tmp_path / 'small'}", num_classes=3, in_chans=1).eval()
    assert other(batch[:, :1]).shape == (2, 3)
    maps = zoo.create_model(f"local-dir:{tmp_path / 'small'}", features_only=True)(batch)
    assert [m.shape[1] for m in maps] == [16, 16, 24, 32]
    untrained = zoo.create_model("convformer_s18", **SMALL, kept_widths=kept_widths(model))
    assert params(untrained) == params(model)
    zoo.convert_checkpoint(tmp_path / "small", tmp_path / "converted.safetensors")
    assert (tmp_path / "converted.safetensors").stat().st_size


@pytest.mark.parametrize("name", ["vovnet27_slim", "simplenet_cifar_310k"])
def test_a_shrunk_network_with_narrower_maps_opens_too(name, tmp_path):
    """Batch norms let the stream lose channels, and so the maps that others build on."""
    model = settled(zoo.create_model(name, num_classes=10))
    groups = channel_groups(model, SIZE)
    shrink(model, groups, some_channels(groups))
    expected = model(batch := images(1))
    zoo.save_pretrained(model, tmp_path / "small")
    opened = zoo.create_model(f"local-dir:{tmp_path / 'small'}").eval()
    torch.testing.assert_close(opened(batch), expected, rtol=1e-5, atol=1e-5)
    backbone = zoo.create_model(f"local-dir:{tmp_path / 'small'}", features_only=True)
    maps = backbone(batch)
    assert [m.shape[1] for m in maps] == backbone.feature_info.channels()
    opened.reset_classifier(4)
    assert opened(batch).shape == (1, 4)


def test_widths_that_cannot_be_are_errors():
    model = MODELS["poolformer"]()
    for shape in ([99, None], [8], [0, None, None, None], "8"):
        with pytest.raises(ConfigError, match=r"fc1\.weight is 64x16x1x1 in MetaFormer, and cannot become"):
            resize(model, {"tensors": {"stages.0.blocks.0.mlp.fc1.weight": shape}})
    with pytest.raises(ConfigError, match="kept_widths is what"):
        zoo.create_model("poolformer_s12", kept_widths={"fc": 3})
    assert params(model) == params(MODELS["poolformer"]())


def test_what_timm_made_is_not_saved_as_something_that_timm_cannot_open(tmp_path):
    model = MODELS["resnet"]()
    groups = channel_groups(model, SIZE)
    shrink(model, groups, some_channels(groups))
    with pytest.raises(ConfigError, match="cannot be opened again"):
        zoo.save_pretrained(model, tmp_path / "small")


# ---------------------------------------------------------------------------------------------------- dead and weakest


def test_channels_count_the_weights_that_make_and_read_them():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 5, 1)
    )
    model = nn.Sequential(model, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2))
    groups = channel_groups(model, (3, 16, 16))
    assert [(name, group.size) for name, group in groups.items()] == [("0.0", 4), ("0.4", 5)]
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in sparse_parameters(model).items()}
    masks["0.0.weight"][1] = False  # nothing makes it but its depthwise kernel
    masks["0.3.weight"][1] = False
    masks["0.4.weight"][:, 2] = False  # nothing reads it
    masks["0.0.weight"][3, 0] = False
    incoming, outgoing = channel_counts(groups, masks)["0.0"]
    assert incoming.tolist() == [36, 0, 36, 27]
    assert outgoing.tolist() == [5, 5, 0, 5]
    assert dead_channels(model, groups, masks)["0.0"].tolist() == [1, 2]
    assert weakest_channels(model, groups, 0.75, masks)["0.0"].tolist() == [1, 2, 3]
    assert weakest_channels(model, groups, 0.75, masks, multiple=2)["0.0"].tolist() == [1, 2]
    assert dead_channels(model, groups) == {}
    apply_masks(model, masks)
    assert dead_channels(model, groups)["0.0"].tolist() == [1, 2]


def test_channels_that_nothing_reads_go_without_a_trace():
    model = settled(MODELS["convformer"]())
    groups = channel_groups(model, SIZE)
    with torch.no_grad():
        for i in range(4):
            model.stages[i].blocks[0].mlp.fc2.weight[:, ::2] = 0
    masks = masks_of(model)
    expected = model(batch := images())
    dead = dead_channels(model, groups)
    assert set(dead) == {f"stages.{i}.blocks.0.mlp.fc1" for i in range(4)}
    smaller = shrink(model, groups, dead, masks)
    torch.testing.assert_close(model(batch), expected, rtol=1e-5, atol=1e-4)
    assert smaller.keys() == masks.keys()
    assert all(mask.all() for mask in smaller.values())
    apply_masks(model, smaller)


def test_a_group_never_loses_all_of_its_channels():
    model = MODELS["poolformer"]()
    groups = channel_groups(model, SIZE)
    with torch.no_grad():
        model.stages[0].blocks[0].mlp.fc1.weight.zero_()
    assert len(dead_channels(model, groups)["stages.0.blocks.0.mlp.fc1"]) == 63
    with pytest.raises(ConfigError, match="would lose all of its 64 channels"):
        shrink(model, groups, {"stages.0.blocks.0.mlp.fc1": range(64)})
    assert weakest_channels(model, groups, 0.999)["stages.0.blocks.0.mlp.fc1"].numel() == 63


# ------------------------------------------------------------------------------------------------------------- retiring


@pytest.mark.parametrize("scored", [False, True])
def test_retired_channels_give_their_weights_back_to_their_layers(scored):
    model = settled(MODELS["convformer"]())
    groups = channel_groups(model, SIZE)
    generator = torch.Generator().manual_seed(1)
    masks = {
        name: torch.rand(p.shape, generator=generator) < 0.4
        for name, p in sparse_parameters(model, ["stages.*.mlp.*", "stages.*.pwconv1"]).items()
    }
    first = weakest_channels(model, groups, 0.2, masks)
    scores = {name: torch.rand(mask.shape, generator=generator) for name, mask in masks.items()} if scored else None
    new = retire_channels(model, groups, first, masks, scores=scores, generator=generator)
    assert {name: int(mask.sum()) for name, mask in new.items() if name in masks} == {
        name: int(mask.sum()) for name, mask in masks.items()
    }
    more = {name: [i for i in range(8) if i not in numbers] for name, numbers in first.items()}
    newer = retire_channels(model, groups, more, new, retired=first, generator=generator)
    gone = {name: torch.cat([first[name], torch.tensor(more[name])]) for name in groups}
    for name, positions in channel_positions(model, groups, gone).items():
        if name in newer:
            assert not (newer[name] & positions).any()
    if scores is not None:
        name = "stages.0.blocks.0.mlp.fc1.weight"
        grown = new[name] & ~masks[name]
        closed = channel_positions(model, groups, first)[name]
        assert scores[name][grown].min() > scores[name][~new[name] & ~masks[name] & ~closed].max()

    # layers without a mask got one, so that the model without the channels computes the same
    assert "stages.0.blocks.0.token_mixer.pwconv2.weight" in newer
    apply_masks(model, newer)
    expected = model(batch := images())
    smaller = shrink(model, groups, gone, newer)
    torch.testing.assert_close(model(batch), expected, rtol=1e-5, atol=1e-4)
    assert sum(int(mask.sum()) for mask in smaller.values()) == sum(int(mask.sum()) for mask in newer.values())


def test_a_layer_without_room_becomes_dense():
    model = MODELS["poolformer"]()
    groups = channel_groups(model, SIZE)
    name = "stages.0.blocks.0.mlp.fc1"
    masks = {f"{name}.weight": torch.ones(64, 16, 1, 1, dtype=torch.bool)}
    masks[f"{name}.weight"][40:, 0] = False
    new = retire_channels(model, groups, {name: range(30)}, masks)
    assert new[f"{name}.weight"][30:].all()
    assert not new[f"{name}.weight"][:30].any()


# --------------------------------------------------------------------------------------------------------------- errors


def test_language_models_take_no_images():
    with pytest.raises(ConfigError, match="Decoder takes tokens: leave out input_size"):
        channel_groups(small("mobilellm_125m"), SIZE)


def test_mistakes_are_named():
    model = MODELS["poolformer"]()
    groups = channel_groups(model, SIZE)
    with pytest.raises(ConfigError, match=r"no group of channels.*Did you mean stages\.0\.blocks\.0\.mlp\.fc1"):
        shrink(model, groups, {"stages.0.blocks.0.mlp.fc2": [1]})
    with pytest.raises(ConfigError, match="has 64 channels, 0 to 63"):
        shrink(model, groups, {"stages.0.blocks.0.mlp.fc1": [64]})
    with pytest.raises(ConfigError, match="from 0 up to, but not, 1"):
        weakest_channels(model, groups, 1.0)
    with pytest.raises(ConfigError, match="cannot be traced on one image of 4x64x64"):
        channel_groups(model, (4, 64, 64))
    with pytest.raises(ConfigError, match="meta device"):
        channel_groups(zoo.create_model("poolformer_s12", device="meta"))
    with pytest.raises(ConfigError, match="does not say what input"):
        channel_groups(nn.Linear(3, 3))
    with pytest.raises(ConfigError, match="it gives no tensor, but a list"):
        channel_groups(zoo.create_model("vovnet_test", pretrained=False, features_only=True), (3, 64, 64))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(MissingDependencyError, match=r"backbone-zoo\[sparsity\]"):
        channel_groups(MODELS["poolformer"](), SIZE)


def test_n_m_survives_a_shrink_along_the_outputs():
    model = settled(MODELS["poolformer"]())
    groups = channel_groups(model, SIZE)
    name = "stages.0.blocks.0.mlp.fc1"
    masks = {f"{name}.weight": n_m_mask(model.get_parameter(f"{name}.weight").abs(), 2, 4)}
    smaller = shrink(model, groups, {name: range(10)}, masks)
    assert smaller[f"{name}.weight"].shape[0] == 54
    assert follows_n_m(smaller[f"{name}.weight"], 2, 4)
