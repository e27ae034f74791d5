"""What training asks of classifiers, asked of segmentation: FFNet's forms, and every family under FFNet's head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import zoo
from tests.models import SIZE, create, set_to_random
from zoo.data.transforms import preprocessing
from zoo.errors import CheckpointError, ConfigError
from zoo.registry import get_entry
from zoo.sparsity import channel_groups
from zoo.training.config import OptimizerConfig
from zoo.training.loop import make_optimizer
from zoo.weights import convert_checkpoint

# every stem, block, head and resizing, with a filter before them and without
FORMS: dict[str, dict[str, Any]] = {
    "ffnet_test_segmentation": {},
    "ffnet40s_dbbb_mobile": {"depths": (2, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "ffnet40s_bbb_mobile_pre_down": {"depths": (2, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "ffnet34_aaa": {"depths": (2, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "ffnet50_daaa": {"depths": (2, 1, 1, 1), "dims": (16, 24, 32, 48)},
    "ffnet46n_cbb": {"depths": (2, 1, 1), "dims": (16, 24, 32)},
    "ffnet46ns_ccc_mobile": {"depths": (2, 1, 1), "dims": (16, 24, 32)},
}
BACKBONES = zoo.list_models("*_test", task="vision")

models = pytest.mark.parametrize("name", [*FORMS, *BACKBONES])
carriers = pytest.mark.parametrize("name", BACKBONES)


def model_of(name: str, **arguments: Any) -> Any:
    """A small model of the form `name`, or the small model `name` under the head."""
    torch.manual_seed(0)
    return create(name, **{"task": "segmentation", "num_classes": 5, **FORMS.get(name, {}), **arguments})


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def kept_for_backward(model: nn.Module, loss: Callable[[Tensor], Tensor]) -> int:
    """Numbers that a forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss(model(images()))
    return sum(kept.values())


@models
def test_gradient_checkpointing_changes_memory_alone(name: str):
    model = model_of(name).train()
    unused = any(getattr(module, "selective", False) for module in model.modules())  # blocks of other paths

    def gradients() -> dict[str, Tensor]:
        torch.manual_seed(2)
        model.zero_grad()
        model(images()).square().mean().backward()
        assert unused or all(p.grad is not None for p in model.parameters())
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    plain, memory = gradients(), kept_for_backward(model, torch.sum)
    model.set_grad_checkpointing(True)
    assert kept_for_backward(model, torch.sum) < memory
    for key, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[key], rtol=1e-3, atol=1e-5)
    model.set_grad_checkpointing(False)
    assert kept_for_backward(model, torch.sum) == memory


@models
def test_layers_run_from_the_stem_to_the_last_convolution(name: str):
    model = model_of(name, device="meta")
    parameters = sorted(key for key, _ in model.named_parameters())
    prefix = "" if name in FORMS else "backbone.model."
    first = get_entry(name).first_conv
    convs = [first] if isinstance(first, str) else first
    stems = {f"{prefix}{conv}.weight" for conv in convs} & set(parameters)  # of a SN-Net those on the path that is set
    assert stems
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=False)
        assert sorted(key for group in groups.values() for key in group) == parameters
        layers = [set(groups[i]) for i in sorted(groups)]
        assert stems <= layers[0]
        assert layers[-1] == {"head.conv2.weight", "head.conv2.bias"}
        assert layers[-2] >= {key for key in parameters if key.startswith("neck.")}
        assert len(layers) >= len(model.feature_info)


@carriers
def test_layers_of_a_backbone_are_those_of_its_classifier(name: str):
    classifier = create(name, device="meta")
    model = model_of(name, device="meta")
    own = group_parameters(classifier, classifier.group_matcher(), reverse=True)
    found = group_parameters(model, model.group_matcher(), reverse=True)
    for key, _ in model.backbone.model.named_parameters():
        assert found[f"backbone.model.{key}"] == own[key], key


@models
def test_layer_decay_and_what_does_not_decay(name: str):
    model = model_of(name, device="meta")
    config = OptimizerConfig(opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.9)
    named = dict(model.named_parameters())
    undecayed = {id(named[key]) for key in model.no_weight_decay() if key in named}
    groups = make_optimizer(model, config).param_groups
    assert max(group["lr_scale"] for group in groups) == 1.0
    assert len({group["lr_scale"] for group in groups}) > len(model.feature_info)
    for group in [*groups, *create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05).param_groups]:
        for parameter in group["params"]:
            assert (group["weight_decay"] == 0) == (parameter.ndim <= 1 or id(parameter) in undecayed)
    (scale,) = {group["lr_scale"] for group in groups if any(p is model.head.conv2.weight for p in group["params"])}
    assert scale == 1.0


@carriers
def test_a_backbone_spares_what_its_classifier_spares(name: str):
    classifier = create(name, device="meta")
    model = model_of(name, device="meta")
    kept = dict(model.backbone.model.named_parameters())
    expected = {f"backbone.model.{key}" for key in getattr(classifier, "no_weight_decay", set)() if key in kept}
    assert {key for key in model.no_weight_decay() if key in dict(model.named_parameters())} == expected
    if name in ("sret_test", "snnet_test", "pfnet_test"):
        assert expected


@models
def test_intermediates(name: str):
    model = model_of(name).eval()
    with torch.no_grad():
        final, maps = model.forward_intermediates(images())
        assert torch.equal(final, model.forward_features(images()))
        for found, info in zip(maps, model.feature_info, strict=True):
            assert found.shape[1] == info["num_chs"]
            assert abs(found.shape[2] - SIZE / info["reduction"]) <= 2  # padded less, a stem or a filter gives less
            assert model.get_submodule(info["module"]) is not None
        first, last = model.forward_intermediates(images(), indices=[0, len(maps) - 1], intermediates_only=True)
        assert torch.equal(first, maps[0])
        assert torch.equal(last, maps[-1])
        (last,) = model.forward_intermediates(images(), indices=1, stop_early=True, intermediates_only=True)
        assert torch.equal(last, maps[-1])
    with pytest.raises(ConfigError, match="output_fmt must be 'NCHW'"):
        model.forward_intermediates(images(), output_fmt="NLC")


@models
def test_another_number_of_classes_channels_and_precision(name: str):
    model = model_of(name, in_chans=1, dtype=torch.float64).eval()
    grey = images()[:, :1].double()
    side = model(grey).shape[-2:]
    model.reset_classifier(3)
    assert model(grey).shape == (2, 3, *side)
    assert model.get_classifier().weight.dtype == torch.float64
    model.reset_classifier(0)
    assert model(grey).shape == (2, model.head_hidden_size, *side)


@models
def test_saved_as_it_is(name: str, tmp_path: Path):
    model = set_to_random(model_of(name)).eval()
    again = zoo.create_model(f"local-dir:{zoo.save_pretrained(model, tmp_path / 'saved')}").eval()
    assert torch.equal(again(images()), model(images()))


@pytest.mark.parametrize("how", [{"out_indices": (1, 2, 3)}, {"feature_cls": "list"}])
def test_how_the_backbone_is_taken_is_saved(how: dict, tmp_path: Path):
    model = zoo.create_model("caformer_test", task="segmentation", num_classes=3, **how).eval()
    folder = zoo.save_pretrained(model, tmp_path / "saved")
    again = zoo.create_model(f"local-dir:{folder}").eval()
    assert torch.equal(again(images()), model(images()))


def test_a_backbone_in_pieces_does_not_tell_its_layers():
    model = model_of("vovnet_test", feature_cls="list")
    with pytest.raises(ConfigError, match="no group_matcher"):
        model.group_matcher()


def shrunk(model: Any) -> Any:
    """`model` without the last third of the channels of each of its groups."""
    groups = channel_groups(model, (3, SIZE, SIZE))
    assert groups
    gone = {name: torch.arange(group.size)[-(group.size // 3) :] for name, group in groups.items() if group.size > 2}
    zoo.sparsity.shrink(model, groups, gone)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *[("vovnet_test", {"feature_cls": how}) for how in ("getter", "list", "hook")],
        ("ffnet_test_segmentation", {}),
        pytest.param("caformer_test", {"feature_cls": "list"}, marks=pytest.mark.slow),
        pytest.param("slak_test", {}, marks=pytest.mark.slow),
    ],
)
def test_shrunk_and_saved(name: str, how: dict, tmp_path: Path):
    whole = sum(p.numel() for p in model_of(name).parameters())
    model = shrunk(set_to_random(model_of(name, **how)))
    for hop in range(2):
        again = zoo.create_model(f"local-dir:{zoo.save_pretrained(model, tmp_path / f'saved{hop}')}").eval()
        assert torch.equal(again(images()), model(images()))
        assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters()) < 0.95 * whole
        assert again.feature_info == model.feature_info
        model = again
    named = create(name, task="segmentation", num_classes=5, kept_widths=zoo.sparsity.kept_widths(model), **how).eval()
    zoo.load_checkpoint(named, model.state_dict())
    assert torch.equal(named(images()), model(images()))
    named.reset_classifier(3)
    assert named(images()).shape[:2] == (2, 3)
    named.reset_classifier(0)
    assert named(images()).shape[1] == named.head_hidden_size


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("vovnet_test", {}),
        ("vovnet_test", {"feature_cls": "list"}),
        pytest.param("resnetrs_test", {"feature_cls": "hook"}, marks=pytest.mark.slow),
    ],
)
def test_a_shrunk_classifier_becomes_the_backbone(name: str, how: dict, tmp_path: Path):
    classifier = shrunk(set_to_random(create(name, num_classes=5)))
    place = f"local-dir:{zoo.save_pretrained(classifier, tmp_path / 'classifier')}"
    model: Any = zoo.create_model(place, task="segmentation", num_classes=3, **how).eval()
    expected: list[Tensor] = classifier.forward_intermediates(images(), intermediates_only=True)
    for found, wanted in zip(model.backbone(images()), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    again = zoo.create_model(f"local-dir:{zoo.save_pretrained(model, tmp_path / 'saved')}").eval()
    assert torch.equal(again(images()), model(images()))


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("caformer_test", {}),
        ("vovnet_test", {"feature_cls": "list"}),
        ("resnetrs_test", {"feature_cls": "hook"}),  # in one piece, as `body`
        ("ffnet_test_segmentation", {}),
    ],
)
def test_saved_weights_are_adapted_to_grey_images(name: str, how: dict, tmp_path: Path):
    model = model_of(name, **how).eval()
    folder = zoo.save_pretrained(model, tmp_path / "saved")
    grey: Any = zoo.create_model(f"local-dir:{folder}", in_chans=1).eval()
    assert grey.load_report.adapted
    image = images()[:, :1]
    torch.testing.assert_close(grey(image), model(image.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)
    assert preprocessing(grey)["input_size"][0] == 1


def test_the_size_that_a_network_was_made_for_is_saved(tmp_path: Path):
    model = zoo.create_model("eupe_test", task="segmentation", num_classes=3, img_size=32)
    again: Any = zoo.create_model(f"local-dir:{zoo.save_pretrained(model, tmp_path / 'saved')}")
    assert preprocessing(again)["input_size"] == preprocessing(model)["input_size"] == (3, 32, 32)


def test_saved_weights_are_converted(tmp_path: Path):
    """With the head, which the architecture's own layout does not have."""
    folder = zoo.save_pretrained(model_of("caformer_test"), tmp_path / "saved")
    report = convert_checkpoint(folder, tmp_path / "out.safetensors")
    assert not report.converted
    before, after = (load_file(path) for path in (Path(folder) / "model.safetensors", tmp_path / "out.safetensors"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_trained_branches_are_merged_under_the_head(tmp_path: Path):
    """SLaK's, in our layout: the weights of a trained network in one that was built merged."""
    model = set_to_random(model_of("slak_test")).eval()
    folder = zoo.save_pretrained(model, tmp_path / "saved")
    merged = zoo.create_model("slak_test", task="segmentation", num_classes=5, merged=True).eval()
    assert zoo.load_checkpoint(merged, folder).converted
    torch.testing.assert_close(merged(images()), model(images()), rtol=1e-4, atol=1e-4)


def test_weights_of_a_segmentation_network_in_a_classifier():
    with pytest.raises(CheckpointError, match="is it a segmentation network's, which create_model makes with task="):
        zoo.load_checkpoint(create("caformer_test"), model_of("caformer_test").state_dict())


@pytest.mark.parametrize(
    ("name", "feature_cls", "message"),
    [
        ("caformer_test", "dict", "getter, list and hook give, and not feature_cls='dict'"),
        ("caformer_test", "fx", "not feature_cls='fx'"),
        ("eupe_test", "hook", "hands out tokens and not maps"),
    ],
)
def test_wrappers_that_give_no_maps(name: str, feature_cls: str, message: str):
    with pytest.raises(ConfigError, match=message):
        model_of(name, feature_cls=feature_cls)(images())
