"""Fine-tuning: weights from anywhere, new heads, other sizes, frozen parts, optimizers, layers that learn by depth."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo
from tests.hub_stub import Hub
from tests.launcher import python
from tests.models import each_vision_model
from tests.test_data import make_folder
from tests.test_training import SMALL, assert_goes_on_exactly, configure
from zoo.errors import ConfigError
from zoo.training import ImageClassification, TrainingConfig, train
from zoo.training.config import LossConfig, ModelConfig, OptimizerConfig
from zoo.training.freezing import freeze
from zoo.training.image_classification import build_model
from zoo.training.loop import make_accelerator, make_optimizer, make_scheduler

ROOT = Path(__file__).resolve().parents[1]
STILL = {
    "optimizer": {"lr": 1e-12, "weight_decay": 0},
    "scheduler": {"warmup_lr": 0, "min_lr": 0},
    "train": {"max_updates": 1},
}  # an update that moves no weight by more than its rounding


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture
def only_data(tmp_path: Path) -> Path:
    """The small recipe, but for its model."""
    path = tmp_path / "only_data.yaml"
    path.write_text(SMALL[SMALL.index("data:") :])
    return path


def weights(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def make_task(config: TrainingConfig) -> ImageClassification:
    return ImageClassification(config, make_accelerator(config.train, config.output))


# ---------------------------------------------------------------------------------------------------- where weights lie


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the digits."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "small.yaml").write_text(SMALL)
    return train(configure(folder / "small.yaml", folder / "run", train={"max_updates": 3})).folder


@pytest.mark.parametrize(
    "source", ["run", "local-dir", "local-dir of a run", "checkpoint file", "checkpoint folder", "run's weights"]
)
def test_weights_come_from(source: str, trained: Path, recipe: Path, only_data: Path, tmp_path: Path):
    """The backbone is the trained run's, the head is fresh: letters instead of digits."""
    best = trained / "best"
    model = {
        "run": {"name": str(trained)},
        "local-dir": {"name": f"local-dir:{best}"},
        "local-dir of a run": {"name": f"local-dir:{trained}"},
        "checkpoint file": {"checkpoint_path": str(best / "model.safetensors")},
        "checkpoint folder": {"checkpoint_path": str(best)},
        "run's weights": {"checkpoint_path": str(trained)},
    }[source]
    for split in ("train", "val"):
        make_folder(tmp_path / "data" / split, "abc", 2)
    data = {"name": "folder", "path": str(tmp_path / "data"), "batch_size": 2}
    start = only_data if "name" in model else recipe
    run = train(configure(start, tmp_path / "tuned", model=model, data=data, **STILL))
    before, after = weights(best), weights(run.folder / "last")
    assert before["head.fc.weight"].shape == (10, 16)
    assert after["head.fc.weight"].shape == (3, 16)
    for name in before.keys() - {"head.fc.weight", "head.fc.bias"}:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-9)
    opened: Any = zoo.create_model(f"local-dir:{run.folder / 'last'}")
    assert list(opened.pretrained_cfg["label_names"]) == list("abc")


FROM_THE_HUB = """
import json
from zoo.training.config import ModelConfig
from zoo.training.image_classification import build_model

def facts(name, **config):
    model = build_model(ModelConfig(name=name, **config), 3, (3, 96, 96))
    return [model.get_classifier().out_features, model.stages[1].blocks[0].mlp.fc2.weight.sum().item()]

found = {"tag": facts("poolformer_s12.sail_in1k"), "declined": facts("poolformer_s12.sail_in1k", pretrained=False)}
found |= {"default": facts("poolformer_s12", pretrained=True), "unasked": facts("poolformer_s12")}
print(json.dumps(found | {"repository": facts("hf-hub:lab/s12")}))
"""


def test_weights_from_the_hub(tmp_path: Path):
    """By name and tag, by name alone, or by repository; a tag is enough to ask for them, and can be declined."""
    published: Any = zoo.create_model("poolformer_s12", pretrained=False)
    with torch.no_grad():
        published.stages[1].blocks[0].mlp.fc2.weight.fill_(2.0)
    wanted = [3, published.stages[1].blocks[0].mlp.fc2.weight.sum().item()]
    saved = zoo.save_pretrained(published, tmp_path / "saved")
    with Hub() as hub:
        files = {path.name: path.read_bytes() for path in saved.iterdir()}
        hub.repo("timm/poolformer_s12.sail_in1k", {"model.safetensors": files["model.safetensors"]})
        hub.repo("lab/s12", files)
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
        done = python("-c", FROM_THE_HUB, env=clean | environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["tag"] == found["default"] == found["repository"] == wanted
    assert all(classes == 3 and abs(total) < wanted[1] / 10 for classes, total in (found["declined"], found["unasked"]))


def test_a_model_made_for_one_size_is_made_for_the_datas(recipe: Path, only_data: Path, tmp_path: Path):
    small = {"depths": [1, 1], "dims": [8, 16], "token_mixers": "random", "stem_kernel_size": 3, "stem_stride": 2}
    for model in (
        {"name": "randformer_s12", "args": {**small, "res_scale_init": None}},
        {"name": "timm/vit_tiny_patch16_224", "args": {"depth": 1, "embed_dim": 32, "num_heads": 2, "patch_size": 4}},
    ):
        task = make_task(configure(only_data, tmp_path / "run", model=model, data={"input_size": [1, 24, 24]}))
        assert task.model(torch.zeros(2, 1, 24, 24)).shape == (2, 10)


def test_arguments_of_the_architecture_from_the_command_line(recipe: Path, tmp_path: Path):
    task = make_task(configure(recipe, tmp_path / "run", model={"args": {"drop_path_rate": 0.3}}))
    rates = [module.drop_prob for module in task.model.modules() if type(module).__name__ == "DropPath"]
    assert rates == [pytest.approx(0.3)] * 2  # of the second of two blocks, both branches


# --------------------------------------------------------------------------------------------------------------- frozen


def test_frozen_parts_stay_bit_for_bit(recipe: Path, only_data: Path, tmp_path: Path):
    """Weights and averaged weights, with weight decay and momentum on, from weights that the run starts with."""
    config = configure(
        recipe,
        tmp_path / "run",
        model={"freeze": ["stem", "stages.0", "head.fc.bias"], "args": {"drop_path_rate": 0.5, "drop_rate": 0.5}},
        optimizer={"weight_decay": 0.5, "layer_decay": 0.5},
        train={"model_ema": True, "model_ema_decay": 0.7, "max_updates": 4},
    )
    before = copy.deepcopy(make_task(config).model.state_dict())
    run = train(config)
    averaged = weights(run.folder / "last")
    for name, tensor in before.items():
        frozen = name.startswith(("stem.", "stages.0.")) or name == "head.fc.bias"
        dead = name.endswith("norm1.bias")  # pooling less the pixel cancels it: its gradient is rounding
        assert torch.equal(averaged[name], tensor) == frozen or dead, name
    optimizer = make_optimizer(make_task(config).learner, config.optimizer)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert len(held) == sum(not (n.startswith(("stem.", "stages.0.")) or n == "head.fc.bias") for n in before)


def test_frozen_parts_are_at_rest(recipe: Path, only_data: Path, tmp_path: Path):
    """Batch norms keep their statistics, and drop path and dropout do nothing, whatever the loop does."""
    config = configure(
        only_data,
        tmp_path / "run",
        model={"name": "timm/resnet10t", "freeze": ["conv1", "bn1", "layer[12]"], "args": {"drop_path_rate": 0.5}},
        data={"batch_size": 16},
        train={"max_updates": 2, "model_ema": True},
    )
    before = copy.deepcopy(make_task(config).model.state_dict())
    after = weights(train(config).folder / "last")
    statistics = [name for name in before if "running" in name]
    still = [name for name in statistics if torch.equal(before[name], after[name])]
    assert still == [name for name in statistics if name.startswith(("bn1", "conv1", "layer1", "layer2"))]
    assert len(still) < len(statistics)

    model: Any = build_model(ModelConfig(name="poolformer_s12", args={"drop_path_rate": 0.9}), 10, None)
    images = torch.randn(2, 3, 64, 64)
    freeze(model, ["stem", "stages"])
    quiet = model.eval()(images)
    for trained in (model.train(), copy.deepcopy(model).train()):
        assert trained.training
        assert trained.head.training
        assert not any(module.training for module in trained.stages.modules())
        assert torch.equal(trained(images), quiet)


def test_a_frozen_run_goes_on_as_if_unbroken(recipe: Path, tmp_path: Path):
    changes: dict[str, Any] = {
        "model": {"freeze": ["stem", "stages.0"], "args": {"drop_path_rate": 0.3}},
        "optimizer": {"layer_decay": 0.5},
        "train": {"model_ema": True, "model_ema_decay": 0.9},
    }
    assert_goes_on_exactly(recipe, tmp_path, **changes)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("stages.9", "nothing in MetaFormer is called 'stages.9'. Did you mean stages.0"),
        ("layer1", "nothing in MetaFormer is called 'layer1'. There are: stem, stages, stages.0, stages.1, head"),
        ("*", "leaves nothing to train"),
    ],
)
def test_what_cannot_be_frozen(recipe: Path, tmp_path: Path, pattern: str, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_task(configure(recipe, tmp_path / "run", model={"freeze": [pattern]}))


# ----------------------------------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("name", each_vision_model())
def test_only_matrices_and_kernels_are_decayed(name: str):
    """Of every variant: no bias, norm, layer scale, residual scale or StarReLU, with layer decay and without."""
    model = zoo.create_model(name, device="meta")
    names = {parameter: name for name, parameter in model.named_parameters()}
    mapped = {
        f"{prefix}.{key}": parameter
        for prefix, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
        for key, parameter in module.named_parameters(recurse=False)
        if key == "weight"
    }
    for layer_decay in (None, 0.7):
        optimizer = make_optimizer(model, OptimizerConfig(weight_decay=0.05, layer_decay=layer_decay))
        decayed = {
            names[parameter]: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]
        }
        assert len(decayed) == len(names)
        found = {key for key, decay in decayed.items() if decay}
        assert set(mapped) <= found
        several_axes = {key for key, parameter in model.named_parameters() if parameter.ndim > 1}
        assert found == several_axes - getattr(model, "no_weight_decay", set)()  # as published: RMT's scales have four
        assert set(decayed.values()) == {0, 0.05}


def test_layers_learn_by_depth_and_go_on_so(recipe: Path, tmp_path: Path):
    """Each layer's rate is the schedule's times its scale: frozen layers keep their place, and so do resumed runs."""
    changes: dict[str, Any] = {"optimizer": {"layer_decay": 0.5}, "train": {"model_ema": True}}
    frozen = {"model": {"freeze": ["stem"]}}
    for sched in ("cosine", "none"):
        config = configure(recipe, tmp_path / "run", **changes, **frozen, scheduler={"sched": sched})
        model = make_task(config).model
        names = {parameter: name for name, parameter in model.named_parameters()}
        optimizer = make_optimizer(model, config.optimizer)
        scheduler, _ = make_scheduler(optimizer, config.scheduler, updates_per_epoch=10)
        if scheduler is not None:
            scheduler.step_update(15)
        rates = {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        top = rates["head.fc.weight"]
        assert top == config.optimizer.lr if scheduler is None else 0 < top < config.optimizer.lr
        assert not any(name.startswith("stem.") for name in rates)
        assert rates["stages.1.blocks.0.mlp.fc1.weight"] == pytest.approx(top / 2)
        assert rates["stages.1.downsample.conv.weight"] == pytest.approx(top / 2)
        assert rates["stages.0.blocks.0.mlp.fc1.weight"] == pytest.approx(top / 4)

    assert_goes_on_exactly(recipe, tmp_path, **changes)


OPTIMIZERS = ["adamw", "lamb", "muon", "sgd"]
MORE_OPTIMIZERS = ["nadamw", "lion", "adan", "adopt", "lookahead_radam"]


@pytest.mark.parametrize("opt", [*OPTIMIZERS, *(pytest.param(o, marks=pytest.mark.slow) for o in MORE_OPTIMIZERS)])
def test_optimizers_learn(recipe: Path, tmp_path: Path, opt: str):
    rate = 0.3 if opt == "sgd" else 3e-3
    config = configure(recipe, tmp_path / "run", optimizer={"opt": opt, "lr": rate}, train={"max_updates": 7})
    before = copy.deepcopy(make_task(config).model.state_dict())
    after = weights(train(config).folder / "last")
    changed = [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
    assert {name for name in after if name.endswith("weight")} <= set(changed)


def test_muon_teaches_a_poolformer_the_digits(recipe: Path, tmp_path: Path):
    """Its matrices by Muon, what is no matrix, the stem and the head by AdamW at a third of the rate."""
    arguments = {"fallback_list": ["stem.*", "head.*"], "fallback_lr_scale": 0.3}
    config = configure(
        recipe,
        tmp_path / "run",
        model={"args": {"layer_scale_init": 1.0}},
        data={"batch_size": 64},
        optimizer={"opt": "muon", "lr": 0.05, "args": arguments},
        scheduler={"epochs": 4},
        train={"eval_interval": 4},
    )
    run = train(config)
    assert run.best > 60  # chance is 10
    state = torch.load(run.folder / "last" / "state.pt", weights_only=True)["optimizer"]
    assert any(group.get("use_fallback") for group in state["param_groups"])
    with_momentum = [entry for entry in state["state"].values() if "momentum_buffer" in entry]
    with_moments = [entry for entry in state["state"].values() if "exp_avg" in entry]
    assert len(with_momentum) == 5  # two MLPs of two, and the downsampling
    assert len(with_momentum) + len(with_moments) == len(state["state"])


def test_arguments_of_the_optimizer():
    model = nn.Linear(4, 4)
    assert make_optimizer(model, OptimizerConfig(opt="adamw", args={"amsgrad": True})).defaults["amsgrad"] is True
    with pytest.raises(ConfigError, match=r"'adamw' cannot be made: .*unexpected keyword argument 'amsgard'"):
        make_optimizer(model, OptimizerConfig(args={"amsgard": True}))
    with pytest.raises(ConfigError, match=r"optimizer\.args\.lr: this is optimizer\.lr"):
        OptimizerConfig(args={"lr": 1})


# --------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize(
    "loss",
    [
        {"smoothing": 0.0},
        {"smoothing": 0.2},
        {"bce_loss": True, "smoothing": 0.0},
        {"bce_loss": True, "smoothing": 0.2, "bce_sum": True},
        {"bce_loss": True, "smoothing": 0.1, "bce_target_thresh": 0.15},
    ],
    ids=str,
)
def test_losses_are_their_formulas(recipe: Path, tmp_path: Path, loss: dict[str, Any], mixes: bool):
    """Against targets and sums written out here, for class numbers and for mixed labels."""
    augment = {"mixup": 0.8} if mixes else {}
    task = make_task(configure(recipe, tmp_path / "run", loss=loss, augment=augment, data={"batch_size": 4}))
    batch = next(task.batches(0, 0))
    images = task.train_loader.prepare(batch, torch.device("cpu"), torch.contiguous_format).clone()
    seen: list[Tensor] = []

    def model(images: Tensor) -> Tensor:
        seen.append(images)
        return images.flatten(1)[:, 40:50] * 3

    np.random.seed(0)  # mixup draws from it
    found = task.loss(model, batch, epoch=0)  # type: ignore[arg-type]
    logits = model(seen[0]).double()
    target = F.one_hot(batch.labels, 10).double() * (1 - loss["smoothing"]) + loss["smoothing"] / 10
    if mixes:  # how much of each image is left follows from the pixels: mixed = share * own + (1 - share) * other's
        other = images.flip(0)
        share = ((seen[0] - other) * (images - other)).sum() / (images - other).square().sum()
        assert 0 < share < 1
        target = share * target + (1 - share) * target.flip(0)
    if not loss.get("bce_loss"):
        expected = -(target * logits.log_softmax(-1)).sum(-1).mean()
    else:
        if "bce_target_thresh" in loss:
            target = (target > loss["bce_target_thresh"]).double()
        terms = -(target * logits.sigmoid().log() + (1 - target) * (-logits).sigmoid().log())
        expected = terms.sum(-1).mean() if loss.get("bce_sum") else terms.mean()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_losses_that_make_no_sense():
    with pytest.raises(ConfigError, match=r"belong to loss\.bce_loss"):
        LossConfig(bce_sum=True)
    with pytest.raises(ConfigError, match=r"loss.bce_target_thresh must be from 0 up to, but not, 1; it is 2"):
        LossConfig(bce_loss=True, bce_target_thresh=2)
