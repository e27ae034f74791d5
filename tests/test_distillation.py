"""Distillation: losses are their formulas, teachers are understood and left alone, runs go on exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import constants
from PIL import Image
from torch import Tensor, nn

import zoo
from tests.hub_stub import Hub
from tests.language import small
from tests.test_data import make_folder
from tests.test_training import SMALL, assert_goes_on_exactly, configure
from zoo.data import DataConfig, load_split
from zoo.errors import ConfigError, DataError, DownloadError, UnknownModelError
from zoo.evaluation import load_model
from zoo.training import ImageClassification, TrainingConfig, train
from zoo.training.config import DistillConfig
from zoo.training.distillation import Distillation, FeatureStudent, Teacher, hard_loss, soft_loss
from zoo.training.loop import make_accelerator, make_optimizer

CPU = torch.device("cpu")
TEACHER = """
model:
  name: poolformer_s12
  args: {depths: [1, 2], dims: [16, 32], stem_kernel_size: 3, stem_stride: 2, layer_scale_init: 1.0}
data: {name: digits, batch_size: 32, workers: 0, input_size: [1, 16, 16], mean: [0.3], std: [0.38]}
augment: {scale: [0.8, 1.0], hflip: 0.0, color_jitter: 0.0}
optimizer: {lr: 5.0e-3}
scheduler: {epochs: 5, warmup_epochs: 0.5}
train: {eval_interval: 5}
output: {tracker: null}
"""
PREPROCESS = {"input_size": (1, 16, 16), "mean": (0.3,), "std": (0.38,)}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that knows the digits."""
    folder = tmp_path_factory.mktemp("teacher")
    (folder / "teacher.yaml").write_text(TEACHER)
    run = train(configure(folder / "teacher.yaml", folder / "run"))
    assert run.best > 60  # chance is 10
    return run.folder


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def make_task(config: TrainingConfig) -> ImageClassification:
    return ImageClassification(config, make_accelerator(config.train, config.output))


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ------------------------------------------------------------------------------------------------------------- formulas


def test_soft_loss_by_hand():
    """Two classes: tau^2 * sum over classes of q * log(q / p), with q and p at temperature tau."""
    student, wise = torch.tensor([[0.0, 2.0], [1.0, 1.0]]), torch.tensor([[4.0, 0.0], [1.0, 1.0]])
    q = 1 / (1 + torch.tensor(-2.0, dtype=torch.float64).exp())  # (4 - 0) / 2
    p = 1 / (1 + torch.tensor(1.0, dtype=torch.float64).exp())  # (0 - 2) / 2
    first = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    assert soft_loss(student, wise, tau=2.0).item() == pytest.approx(4 * (first.item() + 0) / 2, rel=1e-5)
    assert soft_loss(student, student, tau=3.0).item() == pytest.approx(0, abs=1e-6)


def test_hard_loss_by_hand():
    student, wise = torch.tensor([[0.0, 0.0], [0.0, 1.0]]), torch.tensor([[4.0, 0.0], [0.1, 0.2]])
    expected = (torch.tensor(2.0).log() + (1 + torch.tensor(-1.0).exp()).log()) / 2
    assert hard_loss(student, wise).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("mixup", [0.0, 0.8])
@pytest.mark.parametrize(
    "distill",
    [
        {"kind": "soft", "alpha": 0.3, "tau": 3.0},
        {"kind": "hard", "alpha": 0.5},
        {"kind": "feature", "alpha": 0.7},
        {"kind": "feature", "alpha": 0.7, "stages": [0, -1]},
    ],
    ids=str,
)
def test_the_loss_is_its_formula(recipe: Path, teacher: Path, tmp_path: Path, distill: dict[str, Any], mixup: float):
    """Recomputed from the models' own answers: the teacher sees the mixed images, the labels count as without it."""
    augment = {"mixup": mixup}
    plain = make_task(configure(recipe, tmp_path / "run", augment=augment))
    config = configure(recipe, tmp_path / "run", augment=augment, distill={"teacher": str(teacher), **distill})
    task = make_task(config)
    task.model.load_state_dict(plain.model.state_dict())
    batch = next(task.batches(0, 0))
    seen: list[Tensor] = []

    def watched(module: nn.Module) -> Callable[[Tensor], Any]:
        def call(images: Tensor) -> Any:
            seen.append(images.clone())
            return module(images)

        return call

    task.learner.eval()
    plain.learner.eval()
    seed_mixup()
    by_labels = plain.loss(watched(plain.learner), batch, epoch=0)  # type: ignore[arg-type]
    seed_mixup()
    found = task.loss(watched(task.learner), batch, epoch=0)  # type: ignore[arg-type]
    assert torch.equal(seen[0], seen[1])

    wise: Any = load_model(str(teacher)).eval()
    student: Any = task.model
    with torch.no_grad():
        if distill["kind"] == "soft":
            q = (wise(seen[1]).double() / 3).softmax(-1)
            p = (student(seen[1]).double() / 3).softmax(-1)
            taught = 9 * (q * (q / p).log()).sum() / len(q)
        elif distill["kind"] == "hard":
            p = student(seen[1]).double().softmax(-1)
            taught = -p[torch.arange(len(p)), wise(seen[1]).argmax(-1)].log().mean()
        else:
            learner: Any = task.learner
            if "stages" in distill:
                theirs = [wise.stages[0](wise.stem(seen[1]))]
                theirs.append(wise.stages[1](theirs[0]))
                own = [student.stages[0](student.stem(seen[1]))]
                own.append(student.stages[1](own[0]))
                own = [
                    torch.einsum("bchw,dc->bdhw", mine, projection.weight[:, :, 0, 0]) + projection.bias[:, None, None]
                    for mine, projection in zip(own, learner.projections, strict=True)
                ]
            else:
                theirs = [wise.forward_head(wise.forward_features(seen[1]), pre_logits=True)]
                mine = student.forward_head(student.forward_features(seen[1]), pre_logits=True)
                own = [mine @ learner.projections[0].weight.T + learner.projections[0].bias]
            taught = torch.stack([(a - b).double().square().mean() for a, b in zip(own, theirs, strict=True)]).mean()
    alpha = distill["alpha"]
    assert found.item() == pytest.approx((1 - alpha) * by_labels.item() + alpha * taught.item(), rel=1e-4)


def seed_mixup() -> None:
    np.random.seed(0)


def test_the_teacher_of_images_of_another_kind(tmp_path: Path):
    """Pixels that were normalised for a grey student of 16x16 reach a colour teacher of 32x32 as its own transform."""
    model = zoo.create_model("poolformer_s12", pretrained=False, depths=(1, 1), dims=(8, 16), num_classes=3)
    model.pretrained_cfg |= {"input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}  # type: ignore[operator]
    folder = zoo.save_pretrained(model, tmp_path / "teacher", labels="abc")
    wise = Teacher(DistillConfig(teacher=str(folder)), PREPROCESS, CPU)
    pixels = torch.rand(2, 1, 16, 16)
    found = wise.view((pixels - 0.3) / 0.38)
    for channel, (mean, std) in enumerate(zip((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), strict=True)):
        for i in range(2):
            image = Image.fromarray(pixels[i, 0].numpy()).resize((32, 32), Image.Resampling.BICUBIC)
            expected = (torch.tensor(list(image.getdata())).view(32, 32) - mean) / std
            torch.testing.assert_close(found[i, channel], expected, rtol=0, atol=1e-4)
    own_kind = {"input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    images = torch.randn(2, 3, 32, 32)
    assert Teacher(DistillConfig(teacher=str(folder)), own_kind, CPU).view(images) is images


def test_a_language_model_teaches_no_images(tmp_path: Path):
    folder = zoo.save_pretrained(small(), tmp_path / "teacher")
    with pytest.raises(ConfigError, match="is a language model, and the student sees images"):
        Teacher(DistillConfig(teacher=str(folder)), PREPROCESS, CPU)


def test_a_segmentation_network_teaches_no_classes(tmp_path: Path):
    folder = zoo.save_pretrained(zoo.create_model("ffnet_test_segmentation", num_classes=10), tmp_path / "teacher")
    with pytest.raises(ConfigError, match="classifies pixels, and the student images"):
        Teacher(DistillConfig(teacher=str(folder)), PREPROCESS, CPU)


def test_colour_becomes_grey_as_pillow_makes_it(teacher: Path):
    colour = {"input_size": (3, 16, 16), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    wise = Teacher(DistillConfig(teacher=str(teacher)), colour, CPU)
    picture = Image.frombytes("RGB", (16, 16), bytes(i * 37 % 256 for i in range(16 * 16 * 3)))
    pixels = torch.tensor(list(picture.getdata())).view(16, 16, 3).permute(2, 0, 1)[None] / 255
    grey = torch.tensor(list(picture.convert("L").getdata())).view(1, 1, 16, 16) / 255
    found = wise.view((pixels - 0.5) / 0.5) * 0.38 + 0.3
    torch.testing.assert_close(found, grey, rtol=0, atol=0.6 / 255)  # Pillow rounds


# ----------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize(
    "distill",
    [
        pytest.param({"kind": "soft", "tau": 2.0}, marks=pytest.mark.slow),
        pytest.param({"kind": "hard"}, marks=pytest.mark.slow),
        {"kind": "feature", "alpha": 0.2, "stages": [-1]},  # the one that has weights of its own
    ],
    ids=lambda value: value["kind"],
)
def test_a_run_goes_on_exactly_and_leaves_its_teacher_alone(
    recipe: Path, teacher: Path, tmp_path: Path, distill: dict[str, Any]
):
    """Projections, their moments and averages included; the checkpoint holds the student alone."""
    before = bytes_below(teacher)
    changes: dict[str, Any] = {
        "distill": {"teacher": str(teacher), **distill},
        "augment": {"mixup": 0.4},
        "train": {"model_ema": True, "model_ema_decay": 0.9},
    }
    assert_goes_on_exactly(recipe, tmp_path, **changes)
    plain = make_task(configure(recipe, tmp_path / "plain")).model.state_dict()
    saved = safetensors.torch.load_file(tmp_path / "parts" / "last" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in saved.items()} == {n: t.shape for n, t in plain.items()}
    assert bytes_below(teacher) == before


def test_a_student_learns_from_its_teacher_alone(recipe: Path, teacher: Path, tmp_path: Path):
    """alpha 1: no label counts, and yet it learns the digits."""
    distill = {"teacher": str(teacher), "alpha": 1.0, "tau": 2.0}
    changes: dict[str, Any] = {
        "model": {"args": {"layer_scale_init": 1.0}},
        "data": {"batch_size": 64},
        "optimizer": {"opt": "muon", "lr": 0.05},
        "scheduler": {"epochs": 4},
        "train": {"eval_interval": 4},
    }
    run = train(configure(recipe, tmp_path / "run", distill=distill, **changes))
    assert run.best > 50  # chance is 10


def test_the_teacher_is_not_trained(recipe: Path, teacher: Path, tmp_path: Path):
    task = make_task(configure(recipe, tmp_path / "run", distill={"teacher": str(teacher), "kind": "soft"}))
    assert task.distillation is not None
    wise = task.distillation.teacher.model
    task.learner.train()
    task.loss(task.learner, next(task.batches(0, 0)), epoch=0).backward()
    assert not wise.training
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in wise.parameters())
    assert all(parameter.grad is not None for parameter in task.model.parameters())


def test_projections_learn_as_fast_as_the_head(recipe: Path, teacher: Path, tmp_path: Path):
    config = configure(
        recipe,
        tmp_path / "run",
        distill={"teacher": str(teacher), "kind": "feature", "stages": [0, 1]},
        optimizer={"layer_decay": 0.5},
    )
    learner = make_task(config).learner
    assert isinstance(learner, FeatureStudent)
    names = {parameter: name for name, parameter in learner.named_parameters()}
    optimizer = make_optimizer(learner, config.optimizer)
    scale = {
        names[p]: (group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert len(scale) == len(names)
    assert scale["projections.0.weight"] == scale["model.head.fc.weight"] == (1, 0.05)
    assert scale["projections.1.bias"] == (1, 0)
    assert scale["model.stages.1.blocks.0.mlp.fc1.weight"] == (0.5, 0.05)
    assert scale["model.stem.conv.weight"] == (0.125, 0.05)
    assert scale["model.stem.conv.bias"] == (0.125, 0)


def test_timm_teaches_and_learns(only_data: Path, tmp_path: Path):
    """Both timm's; the teacher's stages are of another size and number of channels."""
    path = tmp_path / "resnet.pth"
    torch.save(timm.create_model("resnet10t", num_classes=1000).state_dict(), path)
    distill = {"teacher": "timm/resnet10t", "checkpoint_path": str(path), "kind": "feature", "stages": [-1, -2]}
    model = {"name": "timm/mobilenetv3_small_050"}
    config = configure(
        only_data, tmp_path / "run", model=model, distill=distill, data={"batch_size": 4, "input_size": [1, 64, 64]}
    )
    task = make_task(config)
    loss = task.loss(task.learner, next(task.batches(0, 0)), epoch=0)
    loss.backward()
    assert torch.isfinite(loss)


def test_a_teacher_of_timms_that_cannot_be_had(recipe: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    config = configure(recipe, tmp_path / "run", distill={"teacher": "timm/test_vit.r160_in1k"})
    with pytest.raises(DownloadError, match=r"^The weights of 'timm/test_vit\.r160_in1k' cannot be had: .*404"):
        make_task(config)


@pytest.fixture
def only_data(tmp_path: Path) -> Path:
    path = tmp_path / "only_data.yaml"
    path.write_text(SMALL[SMALL.index("data:") :])
    return path


# -------------------------------------------------------------------------------------------------------------- classes


def known(tmp_path: Path, labels: list[str]) -> str:
    """A teacher that knows these classes."""
    model = zoo.create_model("poolformer_s12", pretrained=False, depths=(1, 1), dims=(8, 16), num_classes=len(labels))
    return str(zoo.save_pretrained(model, tmp_path / "teacher", labels=labels))


def test_classes_are_matched_by_name(tmp_path: Path):
    """A teacher that numbers them otherwise, and knows more, answers in the order of the data's."""
    source = known(tmp_path, ["c", "x", "a", "b"])
    make_folder(tmp_path / "data" / "train", "abc", 1)
    split = load_split(DataConfig(path=str(tmp_path / "data")), training=True)
    student = nn.Conv2d(3, 3, 1)
    preprocess = {"input_size": (3, 224, 224), "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    distillation = Distillation(DistillConfig(teacher=source), student, split, preprocess, CPU)
    assert distillation.columns.tolist() == [2, 3, 0]
    images = torch.randn(2, 3, 224, 224)
    outputs = student(images).mean((2, 3))
    loss = distillation.loss(lambda _: outputs, images, lambda logits: logits.sum() * 0)  # type: ignore[arg-type]
    with torch.no_grad():
        q = distillation.teacher.model(images)[:, [2, 3, 0]].softmax(-1)
    expected = (q * (q.log() - outputs.log_softmax(-1))).sum(-1).mean() / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)


def test_other_classes_are_refused_but_for_features(recipe: Path, tmp_path: Path):
    source = known(tmp_path, ["cat", "dog"])
    with pytest.raises(DataError, match=r"distill\.teacher knows other classes than the data has\. "):
        make_task(configure(recipe, tmp_path / "run", distill={"teacher": source}))
    task = make_task(configure(recipe, tmp_path / "run", distill={"teacher": source, "kind": "feature"}))
    assert isinstance(task.learner, FeatureStudent)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("distill", "message"),
    [
        ({"alpha": 1.5}, r"distill\.alpha must be from 0 to 1; it is 1\.5"),
        ({"alpha": -0.1}, r"distill\.alpha must be from 0 to 1"),
        ({"tau": 0}, r"distill\.tau must be above zero, not 0"),
        ({"stages": [1]}, r"distill\.stages belongs to distill\.kind feature, not soft"),
        ({"checkpoint_path": "x.pth"}, r"distill\.checkpoint_path belongs to a distill\.teacher: name one"),
        ({"kind": "feature", "stages": [1]}, r"distill\.kind belongs to a distill\.teacher: name one, or leave"),
        ({"kind": "softer"}, r"distill\.kind: Expected one of 'soft', 'hard', 'feature'"),
        ({"teacher": "poolformer_s13"}, r"There is no model called 'poolformer_s13'\. Did you mean poolformer_s"),
        (
            {"teacher": "TEACHER", "kind": "feature", "stages": [5]},
            r"distill\.stages \[5\] are not stages of model.name",
        ),
        ({"teacher": "TEACHER", "kind": "feature", "stages": [1, -1]}, r"do not give 2 different maps of model\.name"),
    ],
    ids=str,
)
def test_what_makes_no_sense(recipe: Path, teacher: Path, tmp_path: Path, distill: dict[str, Any], message: str):
    if distill.get("teacher") == "TEACHER":
        distill = {**distill, "teacher": str(teacher)}
    with pytest.raises((ConfigError, UnknownModelError), match=message):
        make_task(configure(recipe, tmp_path / "run", distill=distill))
