"""Every shipped recipe trains, states what its paper states, and expects what its source claims.

The tables below are the papers' (arXiv 2111.11418 and 2210.13452), as the training scripts of sail-sg/poolformer and
sail-sg/metaformer set them.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from tests.models import each_vision_model
from tests.test_data import make_folder, make_parquet
from tests.test_segmentation_training import write_cityscapes
from zoo.config import load_config, to_plain
from zoo.registry import split_name
from zoo.training import ImageClassification, Segmentation, SegmentationTrainingConfig, TrainingConfig, fit
from zoo.training.loop import make_accelerator

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "vision"
RECIPES = sorted(CONFIGS.rglob("*.yaml"))
SCRATCH = CONFIGS / "imagenet1k"
TUNED = CONFIGS / "imagenet1k_384"
CITYSCAPES = CONFIGS / "cityscapes"
SEGMENTATION = [*sorted(CITYSCAPES.glob("*.yaml")), CONFIGS / "digits_segmentation.yaml"]
CLASSIFICATION = [path for path in RECIPES if path not in SEGMENTATION]

# optimizer, learning rate, batch, epochs of warm-up
HYPER_PARAMETERS = {
    "poolformer": ("adamw", 1e-3, 1024, 5),
    "identityformer": ("adamw", 4e-3, 4096, 5),
    "randformer": ("adamw", 4e-3, 4096, 5),
    "poolformerv2": ("adamw", 4e-3, 4096, 5),
    "convformer": ("adamw", 4e-3, 4096, 20),
    "caformer": ("lamb", 8e-3, 4096, 20),
}
# drop path, dropout in the head
DROP = {
    f"{series}_{size}": (drop_path, 0)
    for series in ("poolformer", "identityformer", "randformer", "poolformerv2")
    for size, drop_path in (("s12", 0.1), ("s24", 0.1), ("s36", 0.2), ("m36", 0.3), ("m48", 0.4))
} | {
    "randformer_m48": (0.3, 0),
    "convformer_s18": (0.2, 0),
    "convformer_s36": (0.3, 0),
    "convformer_m36": (0.4, 0),
    "convformer_b36": (0.6, 0),
    "caformer_s18": (0.15, 0),
    "caformer_s36": (0.3, 0.4),
    "caformer_m36": (0.4, 0.4),
    "caformer_b36": (0.6, 0.5),
}
FEW = ("ffnet40s_dbbb_mobile", "ffnet46ns_ccc_mobile_pre_down")  # of Cityscapes', which the default tests train
DROP_384 = {
    "convformer_s18": (0.3, 0.4),
    "convformer_s36": (0.5, 0.4),
    "convformer_m36": (0.8, 0.4),
    "convformer_b36": (0.8, 0.5),
    "caformer_s18": (0.3, 0.4),
    "caformer_s36": (0.5, 0.4),
    "caformer_m36": (0.7, 0.4),
    "caformer_b36": (0.8, 0.5),
}
AUGMENTATION = {
    "scale": [0.08, 1.0],
    "ratio": [3 / 4, 4 / 3],
    "hflip": 0.5,
    "vflip": 0.0,
    "color_jitter": 0.4,
    "aa": "rand-m9-mstd0.5-inc1",
    "train_interpolation": "random",
    "reprob": 0.25,
    "remode": "pixel",
    "recount": 1,
    "mixup_prob": 1.0,
    "mixup_switch_prob": 0.5,
    "mixup_off_epoch": 0,
}


@functools.cache
def read(path: Path) -> dict[str, Any]:
    return to_plain(load_config(SegmentationTrainingConfig if path in SEGMENTATION else TrainingConfig, path))


def header(path: Path) -> str:
    """The comment at the top, as one line."""
    lines = list(itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()))
    return " ".join(" ".join(line.lstrip("# ") for line in lines).split())


def assert_regularised_as_published(config: dict[str, Any]) -> None:
    assert {key: config["augment"][key] for key in AUGMENTATION} == AUGMENTATION
    assert config["loss"]["smoothing"] == 0.1
    assert not config["loss"]["bce_loss"]
    assert config["optimizer"]["weight_decay"] == 0.05
    assert config["distill"]["teacher"] is None
    for key in ("betas", "eps", "layer_decay", "clip_grad"):
        assert config["optimizer"][key] is None
    assert config["train"]["seed"] == 42


# ------------------------------------------------------------------------------------------------------------ facts


def test_every_variant_has_a_recipe():
    variants = {info.name: info for info in zoo.search(family="metaformer") if info.name != "caformer_test"}
    recipes = {path.stem for path in SCRATCH.glob("*.yaml")}
    assert recipes & set(variants) == set(variants) == set(DROP)
    at_384 = {name for name, info in variants.items() if any(w.tag == "sail_in1k_384" for w in info.weights)}
    assert {path.stem for path in TUNED.glob("*.yaml")} == at_384 == set(DROP_384)


@pytest.mark.parametrize("name", DROP)
def test_recipe_is_the_papers(name: str):
    config = read(SCRATCH / f"{name}.yaml")
    optimizer, lr, batch, warmup = HYPER_PARAMETERS[name.rpartition("_")[0]]
    drop_path, drop = DROP[name]
    assert (config["model"]["name"], config["model"]["pretrained"]) == (name, None)
    assert config["model"]["args"] == {"drop_path_rate": drop_path, **({"drop_rate": drop} if drop else {})}
    assert (config["optimizer"]["opt"], config["optimizer"]["lr"]) == (optimizer, lr)
    assert config["train"]["global_batch_size"] == batch
    expected = {"sched": "cosine", "epochs": 300, "cooldown_epochs": 10, "warmup_lr": 1e-6, "min_lr": 1e-5}
    assert {key: config["scheduler"][key] for key in expected} == expected
    assert config["scheduler"]["warmup_epochs"] == warmup
    assert (config["augment"]["mixup"], config["augment"]["cutmix"]) == (0.8, 1.0)
    assert config["data"]["input_size"] == [3, 224, 224]
    assert not config["train"]["model_ema"]
    assert_regularised_as_published(config)


@pytest.mark.parametrize("name", DROP_384)
def test_recipe_for_384_is_the_papers(name: str):
    config = read(TUNED / f"{name}.yaml")
    drop_path, drop = DROP_384[name]
    assert (config["model"]["name"], config["model"]["pretrained"]) == (f"{name}.sail_in1k", True)
    assert config["model"]["args"] == {"drop_path_rate": drop_path, "drop_rate": drop}
    expected = ("lamb", 1e-4) if name.startswith("caformer") else ("adamw", 5e-5)
    assert (config["optimizer"]["opt"], config["optimizer"]["lr"]) == expected
    assert (config["scheduler"]["sched"], config["scheduler"]["epochs"]) == ("none", 30)
    assert config["train"]["global_batch_size"] == 1024
    assert (config["augment"]["mixup"], config["augment"]["cutmix"]) == (0, 0)
    assert (config["train"]["model_ema"], config["train"]["model_ema_decay"]) == (True, 0.9999)
    assert (config["data"]["input_size"], config["data"]["crop_pct"]) == ([3, 384, 384], 1.0)
    assert_regularised_as_published(config)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_headers_say_what_a_reader_needs(path: Path):
    text = header(path)
    place = str(path.relative_to(ROOT))
    for fact in ("Command:", "Hardware:", "Time:", "Expect:"):
        assert fact in text
    assert f"--config {place}" in text
    config = read(path)
    if path.stem in DROP:
        paper = {"poolformer": "2111.11418"}.get(path.stem.rpartition("_")[0], "2210.13452")
        assert f"arXiv {paper}" in text
        assert f"for a batch of {config['train']['global_batch_size']}" in text
        rate = re.search(r"(?:at|constant) ([\d.e-]+) for a batch", text)
        assert rate is not None
        assert float(rate[1]) == config["optimizer"]["lr"]
    named_after_the_file = f"runs/{path.relative_to(CONFIGS).with_suffix('')}"
    assert config["output"]["dir"] == {"digits_poolformer": "runs/digits"}.get(path.stem, named_after_the_file)
    batches = re.search(r"(\d+) GPUs with (\d+) images each(?:, (\d+) batches to an update)?", text)
    if config["train"]["global_batch_size"] is not None:
        assert batches is not None
        assert math.prod(int(number or 1) for number in batches.groups()) == config["train"]["global_batch_size"]
        assert int(batches[2]) == config["data"]["batch_size"]
        assert f"--nproc_per_node {batches[1]} " in text


@pytest.mark.parametrize(
    ("path", "tag"),
    [
        *((SCRATCH / f"{name}.yaml", "sail_in1k") for name in DROP),
        *((path, "sail_in1k_384") for path in TUNED.glob("*")),
        *((path, None) for path in SCRATCH.glob("*.yaml") if path.stem not in DROP),
        *((path, None) for path in sorted(CITYSCAPES.glob("*.yaml"))),
    ],
    ids=lambda value: getattr(value, "stem", value),
)
def test_what_headers_expect_is_what_the_authors_claim(path: Path, tag: str | None):
    """`tag` None: of any of the weights; a model without published weights has nothing here to compare with."""
    weights = zoo.model_info(path.stem).weights
    if path.parent == CITYSCAPES:
        assert f"Expect: {expected_miou(path.stem)}; not measured here" in header(path)
        return
    if not weights:
        pytest.skip(f"{path.stem} has no published weights")
    claims = [w for w in weights if w.top1 is not None and tag in (None, w.tag)]
    if not claims and tag is None:
        assert "Expect: the authors state no accuracy; not measured here" in header(path)
        return
    assert any(f"Expect: {w.top1:.1f}% top-1 ({w.accuracy_source}); not measured here" in header(path) for w in claims)


def expected_miou(name: str) -> str:
    (weights,) = zoo.model_info(name).weights
    if weights.miou is None:
        assert zoo.model_info(f"{name}_pre_down").weights[0].miou is not None
        return "the authors state no mIoU but that of the form with pre_down"
    return f"{weights.miou:.1f}% mIoU ({weights.accuracy_source})"


def test_every_published_segmentation_network_has_a_recipe():
    published = {info.name: info for info in zoo.search(task="segmentation") if info.weights}
    assert {path.stem for path in CITYSCAPES.glob("*.yaml")} == set(published)
    for name, info in published.items():
        config = read(CITYSCAPES / f"{name}.yaml")
        assert config["model"]["name"] == name
        assert config["data"]["input_size"] == list(info.input_size)
        halves = [side // 2 for side in info.input_size[1:]]
        assert config["augment"]["crop_size"] == halves
        # HRNet's, arXiv 1908.07919
        assert (config["augment"]["scale"], config["augment"]["hflip"]) == ([0.5, 2.0], 0.5)
        optimizer, scheduler = config["optimizer"], config["scheduler"]
        assert [optimizer[key] for key in ("opt", "lr", "momentum", "weight_decay")] == ["momentum", 0.01, 0.9, 5e-4]
        assert [scheduler[key] for key in ("sched", "decay_rate", "min_lr", "warmup_epochs")] == ["poly", 0.9, 0, 0]
        assert scheduler["epochs"] * (2975 // 12) == pytest.approx(120_000, abs=123)
        assert config["train"]["global_batch_size"] == 12


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=() if path.stem in FEW else pytest.mark.slow)
        for path in sorted(CITYSCAPES.glob("*.yaml"))
    ],
)
def test_the_backbone_of_a_recipe_is_the_networks(path: Path):
    """Tensor for tensor, but for the shortcut that the forms called d have in their first block."""
    model = read(path)["model"]
    name, tag = model["backbone_weights"].split(".")
    assert zoo.model_info(name).weights[0].tag == tag
    shapes = []
    for each in (model["name"], name):
        tensors = zoo.create_model(each, pretrained=False, device="meta").state_dict()
        shapes.append({k: v.shape for k, v in tensors.items() if k.startswith(("stem.", "stages."))})
    own, theirs = shapes
    more = {key for key in own if key not in theirs}
    assert own == theirs | {key: own[key] for key in more}
    assert all(key.startswith("stages.0.0.downsample.") for key in more)
    is_d = re.search(r"_d[ab]", path.stem) is not None
    basic_d = is_d and not path.stem.startswith(("ffnet50_", "ffnet101_"))  # a bottleneck's has one anyway
    assert bool(more) == basic_d
    assert ("shortcut" in header(path)) == basic_d


def test_the_index_of_recipes_names_all():
    text = (CONFIGS / "README.md").read_text()
    for path in RECIPES:
        place = path.relative_to(CONFIGS)
        patterns = (f"[{place}]({place})", f"{place.parent}/<model>.yaml", f"{place.stem.partition('_')[0]}_*.yaml")
        assert any(pattern in text for pattern in patterns), place
    for place in re.findall(r"\]\((.*?)\)", text):
        assert (CONFIGS / place).is_file(), place


# ------------------------------------------------------------------------------------------------------------- steps


def quick_ones() -> Iterator[Any]:
    """The smallest variant of each series; larger ones with the slow tests, as ten times the parameters take long."""
    slow = {param.values[0] for param in each_vision_model() if param.marks}
    slow |= {f"imagenet1k_emo2_{size}" for size in ("2m", "5m", "5m_512")}
    for path in CLASSIFICATION:
        marks = pytest.mark.slow if path.stem in slow else ()
        yield pytest.param(path, marks=marks, id=str(path.relative_to(CONFIGS)))


@pytest.mark.parametrize("path", quick_ones())
def test_recipe_takes_two_steps(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The whole architecture on small images and batches, with the recipe's augmentation, loss, optimizer and schedule.

    What is left out is what costs and is tested elsewhere: published weights, and checkpoints on disk.
    """
    config = load_config(TrainingConfig, path)
    changes: dict[str, Any] = {"workers": 0, "batch_size": 2}
    if config.data.name == "folder":
        for split, count in (("train", 2), ("val", 1)):
            make_folder(tmp_path / "data" / split, "abc", count)
        changes |= {"path": str(tmp_path / "data"), "input_size": [3, 64, 64]}
        if config.data.token_labels is not None:
            changes["token_labels"] = str(tmp_path / "labels")
            for image in (tmp_path / "data" / "train").rglob("*.png"):
                place = tmp_path / "labels" / image.parent.name / f"{image.stem}.pt"
                place.parent.mkdir(parents=True, exist_ok=True)
                torch.save(torch.ones(2, 1, 3, 3), place)
    elif config.data.name == "parquet":
        for split in ("train", "test"):
            make_parquet(tmp_path / "data" / f"{split}.parquet", [0, 1, 2, 0], ["a", "b", "c"])
        size = min(64, (config.data.input_size or (3, 64, 64))[1])
        changes |= {"path": str(tmp_path / "data"), "input_size": [3, size, size]}
    elif config.data.name == "digits":
        changes["batch_size"] = 64
    batch = config.train.global_batch_size or config.data.batch_size  # what the learning rate is meant for
    lr = max(config.optimizer.lr * changes["batch_size"] / batch, config.scheduler.min_lr)
    distill = {}
    if config.distill.teacher:
        name = config.distill.teacher
        name = "poolformer_s12" if name.startswith("timm/") else split_name(name)[0]  # any will do that has no weights
        teacher = zoo.create_model(name, pretrained=False, num_classes=3)
        distill["teacher"] = str(zoo.save_pretrained(teacher, tmp_path / "teacher", labels="abc"))
    config = load_config(
        TrainingConfig,
        path,
        model={"pretrained": False},
        data=changes,
        optimizer={"lr": lr},
        distill=distill,
        train={"max_updates": 2, "device": "cpu", "global_batch_size": None},
        sparsity={"update_interval": 1} if config.sparsity.method else {},  # so that masks move in a run this short
        output={"dir": str(tmp_path / "run"), "tracker": None},
    )
    monkeypatch.setattr("zoo.training.loop.write_checkpoint", lambda *_: None)
    accelerator = make_accelerator(config.train, config.output)
    task = ImageClassification(config, accelerator)
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    run = fit(task, config, accelerator)
    assert run.history[-1]["updates"] == 2
    assert math.isfinite(run.history[-1]["train_loss"])
    assert math.isfinite(run.history[-1]["val_loss"])
    frozen = {name for name, parameter in task.model.named_parameters() if not parameter.requires_grad}
    assert bool(frozen) == bool(config.model.freeze)
    changed = {name for name, tensor in task.model.state_dict().items() if not torch.equal(tensor, before[name])}
    trained = {name for name, parameter in task.model.named_parameters() if parameter.requires_grad}
    assert changed <= trained | {name for name, _ in task.model.named_buffers()}  # such as running means
    assert {name for name in trained if name.startswith("head.") and name.endswith("weight")} <= changed


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=() if path.stem in (*FEW, "digits_segmentation") else pytest.mark.slow)
        for path in SEGMENTATION
    ],
)
def test_recipe_of_segmentation_takes_two_steps(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The whole network on small crops, in Cityscapes' layout, with the recipe's loss, optimizer and schedule."""
    config = load_config(SegmentationTrainingConfig, path)
    changes: dict[str, Any] = {"workers": 0, "batch_size": 2}
    augment: dict[str, Any] = {}
    if config.data.name == "cityscapes":
        write_cityscapes(tmp_path / "data", (4, 1))
        changes |= {"path": str(tmp_path / "data"), "input_size": [3, 64, 128]}
        augment = {"crop_size": [64, 128]}
    batch = config.train.global_batch_size or config.data.batch_size
    config = load_config(
        SegmentationTrainingConfig,
        path,
        model={"backbone_weights": None},
        data=changes,
        augment=augment,
        optimizer={"lr": config.optimizer.lr * 2 / batch},
        train={"max_updates": 2, "device": "cpu", "global_batch_size": None},
        output={"dir": str(tmp_path / "run"), "tracker": None},
    )
    monkeypatch.setattr("zoo.training.loop.write_checkpoint", lambda *_: None)
    accelerator = make_accelerator(config.train, config.output)
    task = Segmentation(config, accelerator)
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    run = fit(task, config, accelerator)
    assert run.history[-1]["updates"] == 2
    assert math.isfinite(run.history[-1]["train_loss"])
    assert 0 <= run.history[-1]["val_miou"] <= 100
    after = task.model.state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert {name for name, _ in task.model.named_parameters() if name.startswith("head.")} <= changed
