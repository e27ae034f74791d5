"""SLaK against its authors' code, its forms against each other, and what is particular to it."""

import argparse
import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import nn

import zoo
from tests import golden
from zoo import registry
from zoo.cli import main
from zoo.config import load_config
from zoo.errors import CheckpointError, ConfigError, DownloadError
from zoo.models.slak import SLaK, arguments_of, timm_convnext_state_dict
from zoo.training import TrainingConfig
from zoo.training.loop import make_scheduler

CONFIGS = Path(__file__).parents[1] / "configs" / "vision" / "imagenet1k"
TRAINING_CASES = golden.load("slak", "sparse_training")["cases"]

# the small configuration of the golden files
SMALL: dict[str, Any] = {
    "depths": (1, 1, 2, 1),
    "dims": (16, 24, 32, 48),
    "kernel_sizes": (11, 9, 7, 5),
    "small_kernel_size": 3,
}
FORMS: dict[str, dict[str, Any]] = {
    "slak_test": {},
    "slak_test_k51": {"kernel_sizes": (51, 49, 47, 13), "small_kernel_size": 5},
    "slak_test_nobn": {"batch_norm": False},
    "slak_test_nodecom": {"decompose": False},
    "slak_test_nodecom_merged": {"decompose": False, "merged": True},
    "slak_test_convnext": {"kernel_sizes": (7, 7, 7, 7), "small_kernel_size": None, "decompose": False},
    "slak_test_nols": {"layer_scale_init": None},
}
TRAINED = [name for name in FORMS if not name.endswith("merged")]
forms = pytest.mark.parametrize("form", FORMS)


def small(form: str = "slak_test", **arguments) -> SLaK:
    arguments = {**SMALL, "num_classes": 10, **FORMS[form], **arguments}
    model = zoo.create_model("slak_tiny", pretrained=False, **arguments)
    assert isinstance(model, SLaK)
    return model


def randomized(model: nn.Module) -> nn.Module:
    """Weights as training leaves them: branches that matter, batch norms that do something."""
    generator = torch.Generator().manual_seed(0)
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            spread = 1 / math.sqrt(tensor[0].numel()) if tensor.ndim > 1 else 0.3
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * spread)
            if tensor.ndim == 1 and not key.endswith(("bias", "running_mean")):
                tensor.abs_().add_(0.5)
    return model.eval()


def outputs(model: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """All of one forward; that other ways to these values agree is the contract's to test."""
    with torch.no_grad():
        features, maps = model.forward_intermediates(images)
        return {
            "logits": model.forward_head(features),
            "features": features,
            "pre_logits": model.forward_head(features, pre_logits=True),
            **{f"stage{i}": stage for i, stage in enumerate(maps, start=1)},
        }


def deviation(reference: dict, model: nn.Module) -> float:
    assert reference["precision"] == "float64"
    images = golden.inputs(reference)["input"].double()
    return max(golden.errors(reference, outputs(model.double().eval(), images)).values())


def golden_files() -> list:
    """The small configurations always, the published ones with the slow tests."""
    names = [name for name in golden.names("slak") if name != "sparse_training"]
    return [pytest.param(name, marks=() if name in FORMS else pytest.mark.slow) for name in names]


# -------------------------------------------------------------------------------------------------------------- goldens


@pytest.mark.parametrize("file", golden_files())
def test_golden_parity(file):
    reference = golden.load("slak", file)
    if file in FORMS:
        model = small(file)
    else:
        name, _, note = file.partition("@")
        model = zoo.create_model(name, pretrained=False, **({"depths": (1, 1, 1, 1)} if note == "depth1" else {}))
    assert sum(p.numel() for p in model.parameters()) == reference["parameters"]
    report = zoo.load_checkpoint(model, golden.state_dict(reference))
    assert report.converted
    assert not report.dropped
    assert deviation(reference, model) < 1e-9


# 2.3 * 100 is 229.99..., and rounded down 229: only 2.3 itself gives 229 there and 23 of 10
@pytest.mark.parametrize(
    ("mlp_ratio", "read"), [(2.5, 2.5), (2.7, 2.7), (3.3, 3.3), (1.3, 1.3), (2.3, 2.3), (8 / 3, None)]
)
@pytest.mark.parametrize("dims", [(24, 48, 96, 100), (10, 100), (62, 124)])
def test_fractional_mlp_ratios_are_read_from_the_shapes(mlp_ratio, read, dims):
    arguments: dict[str, Any] = {"depths": (1,) * len(dims), "kernel_sizes": (3,) * len(dims), "width_factor": 1.0}
    model = small(mlp_ratio=mlp_ratio, dims=dims, **arguments)
    found = arguments_of(model.state_dict())
    zoo.create_model("slak_test", **found).load_state_dict(model.state_dict())
    assert len(dims) < 4 or read is None or found["mlp_ratio"] == read


@forms
def test_golden_arguments_are_read_from_the_shapes(form):
    reference = golden.load("slak", form)
    tensors = golden.state_dict(reference)
    model = zoo.create_model("slak_base", pretrained=False, **arguments_of(tensors))
    zoo.load_checkpoint(model, tensors)
    assert deviation(reference, model) < 1e-9
    assert arguments_of(model.state_dict()) == arguments_of(tensors)


def test_branches_are_merged_with_the_epsilon_of_their_norms():
    model = randomized(small()).double().eval()
    for norm in filter(lambda module: isinstance(module, nn.BatchNorm2d), model.modules()):
        norm.eps = 0.1
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(zoo.optimize_for_inference(model)(x), model(x), rtol=1e-10, atol=1e-10)


@forms
def test_golden_parity_of_the_fast_form(form):
    reference = golden.load("slak", form)
    model = small(form)
    zoo.load_checkpoint(model, golden.state_dict(reference))
    fast = zoo.optimize_for_inference(model.double())
    assert deviation(reference, fast) < 1e-9
    kernels = [module for module in fast.modules() if isinstance(module, nn.Conv2d) and module.groups > 1]
    assert len(kernels) == sum(SMALL["depths"]) * (2 if FORMS[form].get("decompose", True) else 1)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    assert not any("gamma" in key for key in fast.state_dict())


@pytest.mark.parametrize("form", TRAINED)
def test_golden_parity_of_merged_checkpoints(form):
    """A merged model takes what was trained unmerged; decomposed kernels, too, which the authors' code cannot merge."""
    reference = golden.load("slak", form)
    model = small(form, merged=True, dtype=torch.float64)
    trained = {key: tensor.double() for key, tensor in golden.state_dict(reference).items()}
    zoo.load_checkpoint(model, trained)
    assert deviation(reference, model) < 1e-9
    with pytest.raises(CheckpointError, match="does not fit slak_tiny"):
        zoo.load_checkpoint(small(form), model.state_dict())


def test_backbones_of_detectors_and_segmenters():
    reference = golden.load("slak", "slak_test")
    tensors = golden.state_dict(reference)
    backbone = {f"backbone.{key}": tensor for key, tensor in tensors.items() if not key.startswith(("norm", "head"))}
    norms = {f"backbone.norm{i}.weight": torch.ones(1) for i in range(4)}
    model = small(num_classes=0)
    report = zoo.load_checkpoint(model, backbone | norms, strict=False)
    assert set(report.dropped) == {f"norm{i}.weight" for i in range(4)}
    assert set(report.fresh) == {"head.norm.weight", "head.norm.bias"}
    reference["outputs"] = {name: reference["outputs"][name] for name in ("stage1", "stage4", "features")}
    assert deviation(reference, model) < 1e-9


# ---------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def pickled(tmp_path_factory) -> tuple[str, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A file as the authors' training script writes it; and the last and the averaged weights in it."""
    last = golden.state_dict(golden.load("slak", "slak_test"))
    averaged = {key: tensor * 0.5 if tensor.is_floating_point() else tensor for key, tensor in last.items()}
    model = small()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    optimizer.step()
    saved = {
        "model": last,
        "optimizer": optimizer.state_dict(),
        "epoch": 299,
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 0},
        "args": argparse.Namespace(model="SLaK_tiny", kernel_size=[11, 9, 7, 5, 3], Decom=True, lr=4e-3, output_dir=""),
        "model_ema": averaged,
    }
    path = tmp_path_factory.mktemp("slak") / "SLaK_tiny_checkpoint.pth"
    torch.save(saved, path)
    return str(path), last, averaged


def test_the_authors_pickles(pickled):
    """Read without running code; of the two sets the last one is taken, which the authors evaluated, unless asked."""
    path, last, averaged = pickled
    arguments = {**SMALL, "num_classes": 10}
    for name in ("slak_tiny.vita_in1k", "slak_tiny"):
        model = zoo.create_model(name, checkpoint_path=path, **arguments)
        assert torch.equal(model.head.fc.weight, last["head.weight"])
        assert "The last weights (model) were taken, not the averaged ones (model_ema)" in str(model.load_report)
    report = zoo.load_checkpoint(model, path, use_ema=True)
    assert torch.equal(model.stages[2].blocks[1].mlp.fc1.weight, averaged["stages.2.1.pwconv1.weight"])
    assert "The averaged weights (model_ema) were taken" in str(report)
    zoo.load_checkpoint(model, path)
    assert torch.equal(model.head.fc.weight, last["head.weight"])
    unpublished = zoo.create_model("slak_large", checkpoint_path=path, **arguments)  # nobody states what was evaluated
    assert torch.equal(unpublished.head.fc.weight, averaged["head.weight"])


@pytest.fixture
def published(monkeypatch) -> str:
    """A small architecture with the weights of slak_tiny."""
    entry = dataclasses.replace(registry.get_entry("slak_test"), weights=registry.get_entry("slak_tiny").weights)
    monkeypatch.setitem(registry._entries, "slak_test", entry)
    return "slak_test"


def test_commands_take_the_weights_that_were_evaluated_and_say_so(pickled, published, tmp_path, capsys):
    path, last, averaged = pickled
    said = "The last weights (model) were taken, not the averaged ones (model_ema)"
    assert main(["sparsity", published, "--checkpoint", path, "--json"]) == 0
    assert said in capsys.readouterr().err
    for model in (published, f"{published}.vita_in1k"):
        assert main(["convert", path, str(tmp_path / "slak.safetensors"), "--model", model, "--overwrite"]) == 0
        assert said in capsys.readouterr().out
        converted = zoo.weights.read_state_dict(tmp_path / "slak.safetensors")
        assert torch.equal(converted["head.fc.weight"], last["head.weight"])
    zoo.convert_checkpoint(path, tmp_path / "averaged.safetensors", published, use_ema=True)
    converted = zoo.weights.read_state_dict(tmp_path / "averaged.safetensors")
    assert torch.equal(converted["head.fc.weight"], averaged["head.weight"])


def test_pickles_convert_to_safetensors(pickled, tmp_path):
    path, last, _ = pickled
    out = tmp_path / "slak.safetensors"
    with pytest.raises(CheckpointError, match="slak_tiny"):  # the published size
        zoo.convert_checkpoint(path, out, "slak_tiny")
    assert not out.exists()
    model = small()
    zoo.load_checkpoint(model, path)
    assert torch.equal(model.stem.conv.weight, last["downsample_layers.0.0.weight"])


@pytest.mark.parametrize("info", zoo.search(family="slak"), ids=lambda info: info.name)
def test_published_weights_are_fetched_by_hand(info):
    for weights in info.weights:
        with pytest.raises(DownloadError, match=r"by hand.*checkpoint_path=") as caught:
            zoo.create_model(f"{info.name}.{weights.tag}")
        assert weights.source.startswith(("https://drive.google.com/", "https://surfdrive.surf.nl/"))
        assert weights.source in str(caught.value)
    assert bool(info.weights) == (info.name in PUBLISHED)


PUBLISHED = {
    "slak_tiny",
    "slak_small",
    "slak_base",
    "slak_tiny_k31",
    "slak_tiny_k61",
    "slak_convnext_tiny",
    "slak_convnext_small",
}


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("LoRA2.", "LoRA1 and LoRA2, or lkb_origin, but there is LoRA1"),
        ("LoRA1.bn.bias", r"lacks LoRA1\.bn\.bias"),
        ("LoRA1.bn.weight", r"lacks LoRA1\.bn\.weight"),
        ("small_conv.conv.", r"lacks small_conv\.conv\.weight"),
        ("small_conv.", r"lacks small_conv\.conv\.weight"),
    ],
)
def test_damaged_checkpoints_are_told(lost, message):
    tensors = {key: tensor for key, tensor in small().state_dict().items() if lost not in key}
    with pytest.raises(CheckpointError, match=message):
        zoo.load_checkpoint(small(merged=True), tensors)


def test_biases_of_convolutions_are_merged():
    """As where a batch norm's shift was moved into its convolution before."""
    tensors = randomized(small()).state_dict()
    moved = dict(tensors)
    for key in tensors:
        if key.endswith("large_kernel.LoRA1.bn.running_mean"):
            moved[key.replace("bn.running_mean", "conv.bias")] = -tensors[key]
            moved[key] = torch.zeros_like(tensors[key])
    found = []
    for checkpoint in (moved, tensors):
        model = small(merged=True).eval()
        zoo.load_checkpoint(model, checkpoint)
        found.append(model(torch.ones(1, 3, 64, 64)))
    assert len(moved) > len(tensors)
    torch.testing.assert_close(*found)


def test_checkpoints_of_others_are_refused():
    with pytest.raises(CheckpointError, match="no checkpoint of a SLaK"):
        arguments_of({"stem.conv.weight": torch.zeros(8, 3, 4, 4)})
    tensors = zoo.create_model("slak_tiny", pretrained=False, device="meta").state_dict()
    model = zoo.create_model("slak_tiny_k31", pretrained=False, device="meta")
    with pytest.raises(CheckpointError, match="51x5, the model has 124x1x31x5") as told:
        zoo.load_checkpoint(model, tensors)
    advice = re.search(r"Its shapes are those of (zoo\.create_model\(.*\))\.$", str(told.value), re.MULTILINE)
    assert advice
    as_told = eval(advice[1])
    assert {key: tensor.shape for key, tensor in as_told.state_dict().items()} == {
        key: tensor.shape for key, tensor in tensors.items()
    }


def test_distilled_convnexts_are_timms():
    arguments = {**FORMS["slak_test_convnext"], "width_factor": 1.0, "depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
    ours = randomized(small(**arguments))
    theirs = timm.create_model("convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=10).eval()
    theirs.load_state_dict(timm_convnext_state_dict(ours.state_dict()))
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)
    with pytest.raises(CheckpointError, match="whole kernels"):
        timm_convnext_state_dict(small().state_dict())
    with torch.device("meta"):
        published = timm.create_model("convnext_tiny")
    assert (
        sum(p.numel() for p in published.parameters())
        == 28_589_128
        == zoo.model_info("slak_convnext_tiny").params - 6624
    )


# ---------------------------------------------------------------------------------------------------------------- forms


@forms
@pytest.mark.parametrize("size", [(64, 96), (33, 150)])
def test_the_fast_form_equals_the_model(form, size):
    model = randomized(small(form))
    fast = zoo.optimize_for_inference(model)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    expected = outputs(model, images)
    for name, found in outputs(fast, images).items():
        assert (found - expected[name]).abs().max() < 1e-5 * expected[name].abs().max(), name
    again = zoo.optimize_for_inference(fast)
    torch.testing.assert_close(again(images), fast(images))


@pytest.mark.parametrize("optimize", [False, True])
def test_images_that_are_too_small_are_errors_in_words(optimize):
    model = small().eval()
    model = zoo.optimize_for_inference(model) if optimize else model
    for size in ((31, 32), (32, 31), (8, 8), (3, 64)):
        with pytest.raises(ConfigError, match=r"too small: a map of .* This network takes images from 32x32 up"):
            model(torch.zeros(1, 3, *size))
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_the_fast_form_of_features():
    maps = zoo.create_model("slak_tiny", pretrained=False, features_only=True, out_indices=(1, 3), **SMALL)
    images = torch.randn(1, 3, 64, 64)
    expected = randomized(maps)(images)
    for found, wanted in zip(zoo.optimize_for_inference(maps)(images), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_decomposed_kernels_can_be_traced_scripted_exported_and_compiled():
    model = randomized(small(depths=(1, 1), dims=(16, 24), kernel_sizes=(17, 9)))
    images = torch.randn(2, 3, 64, 64)
    batch = torch.export.Dim("batch", min=1, max=8)
    fast = zoo.optimize_for_inference(model)
    with torch.no_grad():
        expected = model(images)
        ways = {
            "traced": torch.jit.trace(model, images[:1]),
            "scripted": torch.jit.script(model),
            "fx": torch.jit.script(torch.fx.symbolic_trace(model)),
        }
        for form, module in (("model", model), ("fast form", fast)):
            exported = torch.export.export(module, (images,), dynamic_shapes=({0: batch},))
            ways[f"{form}, exported"] = exported.module()
            ways[f"{form}, compiled"] = torch.compile(module, backend="aot_eager", fullgraph=True)
        for way, found in ways.items():
            torch.testing.assert_close(
                found(images), expected, rtol=1e-4, atol=1e-5, msg=lambda text, way=way: f"{way}: {text}"
            )


def test_maps_are_channels_last_whatever_the_images_are():
    """Large kernels are slow on contiguous maps, and the MLP works on channels."""
    model = randomized(small())
    images = torch.randn(2, 3, 64, 96)
    plain = outputs(model, images)
    for name, found in outputs(model, images.to(memory_format=torch.channels_last)).items():
        torch.testing.assert_close(found, plain[name], rtol=1e-4, atol=1e-5)
    for name in ("stage1", "stage2", "stage3", "stage4"):
        assert plain[name].is_contiguous(memory_format=torch.channels_last)


def test_training_reaches_every_weight_of_every_form():
    for form in FORMS:
        model = small(form, drop_path_rate=0.3).train()
        model(torch.randn(4, 3, 64, 64)).square().mean().backward()
        missing = [key for key, parameter in model.named_parameters() if parameter.grad is None]
        assert not missing, form


# ------------------------------------------------------------------------------------------------------ particularities


def test_initialisation():
    torch.manual_seed(0)
    model = zoo.create_model("slak_tiny_w1", pretrained=False, depths=(1, 1, 1, 1), head_init_scale=0.5)
    for key, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            expected = 0.01 if key == "head.fc" else 0.02
            tolerance = 6 * expected / math.sqrt(module.weight.numel())
            assert abs(module.weight.std().item() - expected) < tolerance, key
            assert abs(module.weight.mean().item()) < tolerance, key
            assert module.bias is None or not module.bias.any(), key
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert not module.bias.any()
    assert (model.stages[0].blocks[0].gamma == 1e-6).all()


def test_stochastic_depth_grows_to_its_rate():
    model = small(drop_path_rate=0.4)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_weight_decay_and_tensors_are_the_authors():
    """The groups as their code makes them; 470 tensors, without decomposition 362, without batch norms 200."""
    model = zoo.create_model("slak_tiny", pretrained=False, device="meta")
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    found = [
        {
            "weight_decay": group["weight_decay"],
            "tensors": len(group["params"]),
            "parameters": sum(p.numel() for p in group["params"]),
        }
        for group in groups
    ]
    expected = TRAINING_CASES["weight_decay_groups"]["values"]
    assert sorted(found, key=str) == sorted(expected, key=str)
    assert len(model.state_dict()) == 470
    for arguments, count in (({"decompose": False}, 362), ({"batch_norm": False}, 200)):
        model = zoo.create_model("slak_tiny", pretrained=False, device="meta", **arguments)
        assert len(model.state_dict()) == count


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_the_learning_rate_is_the_authors(size):
    """Of the recipes, over all 300 epochs; theirs reaches the peak at the last update of the warm-up, not after it."""
    recipe = load_config(TrainingConfig, CONFIGS / f"slak_{size}.yaml")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=recipe.optimizer.lr)
    scheduler, epochs = make_scheduler(optimizer, recipe.scheduler, updates_per_epoch=312)
    assert scheduler is not None
    assert epochs == 300
    for update, expected in TRAINING_CASES["lr"]["values"].items():
        scheduler.step_update(int(update))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=2e-4), update


@pytest.mark.parametrize(("size", "last"), [((32, 32), (1, 1)), ((37, 130), (1, 4)), ((96, 64), (3, 2))])
def test_any_size_from_32_up(size, last):
    assert small().eval().forward_features(torch.randn(1, 3, *size)).shape[2:] == last


@pytest.mark.parametrize("stride", [1, 2])
def test_stems_for_small_images(stride):
    model = zoo.create_model("slak_tiny", pretrained=False, features_only=True, stem_stride=stride, **SMALL).eval()
    assert [m.shape[-1] for m in model(torch.randn(1, 3, 32, 32))] == [32 // stride // 2**i for i in range(4)]
    assert model.feature_info.reduction() == [stride * 2**i for i in range(4)]


@pytest.mark.parametrize(
    ("size", "drop_path", "update_interval", "prune_rate", "gpus", "images"),
    [("tiny", 0.1, 2000, 0.5, 4, 128), ("small", 0.4, 100, 0.3, 8, 64), ("base", 0.5, 100, 0.3, 16, 32)],
)
def test_recipes_are_the_papers(size, drop_path, update_interval, prune_rate, gpus, images):
    config = load_config(TrainingConfig, CONFIGS / f"slak_{size}.yaml")
    assert config.model.args == {"drop_path_rate": drop_path}
    rule = config.sparsity.rule()
    assert rule is not None
    assert (rule.density, rule.distribution, rule.masks, rule.dense_from) == (0.6, "snip", "random", 0.99)
    assert (rule.prune, rule.growth, rule.update_interval) == ("magnitude", "random", update_interval)
    assert (rule.prune_schedule, rule.prune_rate, rule.final_prune_rate) == ("cosine", prune_rate, 0.005)
    assert (rule.start, rule.stop, rule.layers, rule.optimizer_state) == (0, 1, "all", "dense")
    optimizer, scheduler, train, augment = config.optimizer, config.scheduler, config.train, config.augment
    assert (optimizer.opt, optimizer.lr, optimizer.weight_decay, optimizer.clip_grad) == ("adamw", 4e-3, 0.05, None)
    assert (scheduler.epochs, scheduler.warmup_epochs, scheduler.warmup_lr, scheduler.min_lr) == (300, 20, 0, 1e-6)
    assert (train.global_batch_size, train.amp, train.model_ema, train.model_ema_decay) == (4096, "no", True, 0.9999)
    assert (gpus * images * 8, config.data.batch_size) == (4096, images)
    assert (augment.aa, augment.color_jitter, augment.train_interpolation) == ("rand-m9-mstd0.5-inc1", 0.4, "bicubic")
    assert (augment.mixup, augment.cutmix, augment.mixup_switch_prob, augment.reprob) == (0.8, 1.0, 0.5, 0.25)
    assert config.loss.smoothing == 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depths": (1, 1)}, "depths has 2 stages and dims has 4"),
        ({"kernel_sizes": (51, 49, 47)}, "kernel_sizes has 3"),
        ({"kernel_sizes": (51, 48, 47, 13)}, "must be odd"),
        ({"small_kernel_size": 4}, "must be odd"),
        ({"small_kernel_size": None}, r"give small_kernel_size, or decompose=False"),
        ({"width_factor": 0}, "width_factor must be numbers above zero"),
        ({"width_factor": 0.001}, "leave a stage without channels"),
        ({"mlp_ratio": "4"}, "mlp_ratio must be numbers above zero"),
        ({"layer_scale_init": "small"}, "layer_scale_init must be a number"),
        ({"layer_scale_init": float("nan")}, "layer_scale_init must be a number"),
        ({"layer_scale_init": (1e-6, 1e-6, 1e-6, 1e-6)}, "layer_scale_init must be a number"),
        ({"layer_scale_init": True}, "layer_scale_init must be a number"),
        ({"head_init_scale": None}, "head_init_scale must be a number, not None"),
        ({"merged": "yes"}, "merged must be True or False"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be a number from 0"),
        ({"stem_stride": 0}, "stem_stride must be a whole number"),
        ({"global_pool": "sum"}, "global_pool 'sum'"),
        ({"num_classes": -1}, "num_classes must be a whole number"),
        ({"kernel_size": 51}, "Did you mean"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        zoo.create_model("slak_tiny", pretrained=False, **arguments)
