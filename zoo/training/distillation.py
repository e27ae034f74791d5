"""Learning from a teacher: from its probabilities ("soft"), its decisions ("hard") or its features.

The teacher sees what the student sees, mixed and augmented, but normalised and sized as it is used to. It is not
trained, and in no checkpoint. `timm.task` knows probabilities and pooled features; hard labels, the maps of stages,
teachers of other input sizes and channels, and classes in another order are why this is our own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.data import ImageSplit, preprocessing
from zoo.errors import ConfigError, DataError
from zoo.evaluation.targets import class_outputs
from zoo.hub import is_language_model
from zoo.loading import load_model
from zoo.training.config import DistillConfig
from zoo.training.learner import Learner

__all__ = ["Distillation", "FeatureStudent", "Teacher", "hard_loss", "soft_loss"]

LUMA = (0.299, 0.587, 0.114)  # red, green, blue to grey, as Pillow converts (ITU-R 601)


def soft_loss(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """`tau**2 * KL(softmax(teacher / tau) || softmax(student / tau))`, mean over the batch; logits (B, num_classes).

    Hinton, Vinyals, Dean, arXiv 1503.02531, section 2.
    """
    student_log, teacher_log = ((logits.float() / tau).log_softmax(-1) for logits in (student, teacher))
    return tau**2 * F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True)


def hard_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy with the teacher's most probable class; logits (B, num_classes).

    Touvron et al., arXiv 2012.12877, equation 3.
    """
    return F.cross_entropy(student.float(), teacher.argmax(-1))


class Teacher:
    """A trained model, asked about images that were prepared for a student.

    `preprocess` is the student's. Raises what `zoo.evaluation.load_model` raises.
    """

    def __init__(
        self,
        config: DistillConfig,
        preprocess: Mapping[str, Any],
        device: torch.device,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        assert config.teacher is not None
        model = load_model(config.teacher, config.checkpoint_path).eval().requires_grad_(False)
        if is_language_model(model):
            raise ConfigError(f"distill.teacher: {config.teacher} is a language model, and the student sees images.")
        if getattr(model, "task", None) == "segmentation" and config.kind != "feature":
            raise ConfigError(f"distill.teacher: {config.teacher} classifies pixels, and the student images.")
        self.model: Any = model.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
        own = preprocessing(self.model)
        self.size: tuple[int, int] = tuple(own["input_size"][1:])
        self.channels: int = own["input_size"][0]
        self.mean, self.std = (_per_channel(own[key], device) for key in ("mean", "std"))
        self.student_mean, self.student_std = (_per_channel(preprocess[key], device) for key in ("mean", "std"))
        self.luma = _per_channel(LUMA, device)
        self.same_pixels = own["input_size"][0] == preprocess["input_size"][0] and all(
            tuple(own[key]) == tuple(preprocess[key]) for key in ("mean", "std")
        )

    def view(self, images: Tensor) -> Tensor:
        """The student's images as the teacher takes them: its normalisation, channels and size."""
        if not self.same_pixels:
            pixels = images * self.student_std + self.student_mean
            if self.channels == 1 < pixels.shape[1]:
                pixels = (pixels * self.luma).sum(1, keepdim=True)
            images = (pixels.expand(-1, self.channels, -1, -1) - self.mean) / self.std
        if tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        return images


def _per_channel(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


def _forward_with_features(model: Any, images: Tensor, stages: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """Logits (B, num_classes), and the maps of `stages` (B, C, H, W) or else the pooled features (B, C)."""
    if stages:
        last, features = model.forward_intermediates(images, indices=list(stages))
    else:
        last = model.forward_features(images)
        features = [model.forward_head(last, pre_logits=True)]
    return model.forward_head(last), features


class FeatureStudent(Learner):
    """A model, and the projections of its features into the teacher's.

    (B, in_chans, H, W) -> logits (B, num_classes), [maps (B, C, H', W') or vectors (B, C) of the teacher's width].
    """

    def __init__(self, model: nn.Module, stages: Sequence[int], dims: Sequence[int], teacher_dims: Sequence[int]):
        super().__init__(model)
        self.stages = tuple(stages)
        pairs = zip(dims, teacher_dims, strict=True)
        self.projections = nn.ModuleList(nn.Conv2d(d, t, 1) if stages else nn.Linear(d, t) for d, t in pairs)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        logits, features = _forward_with_features(self.model, images, self.stages)
        return logits, [project(feature) for project, feature in zip(self.projections, features, strict=True)]


class Distillation:
    """What a student learns from a teacher. `learner` is what is optimised: `student`, with projections if need be.

    `training` gives the classes that the student learns, `preprocess` how its images are prepared. Raises DataError
    when the teacher knows other classes (its features serve all the same), ConfigError when features do not match.
    """

    def __init__(
        self,
        config: DistillConfig,
        student: nn.Module,
        training: ImageSplit,
        preprocess: Mapping[str, Any],
        device: torch.device,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.config = config
        self.teacher = Teacher(config, preprocess, device, memory_format)
        self.learner = student
        if config.kind == "feature":
            probe = torch.zeros(1, *preprocess["input_size"])
            dims = _widths(student, probe, config.stages, "model.name")
            teacher_dims = _widths(
                self.teacher.model, self.teacher.view(probe.to(device)), config.stages, "distill.teacher"
            )
            self.learner = FeatureStudent(student, config.stages, dims, teacher_dims)
        else:
            self.columns = torch.from_numpy(_class_numbers(self.teacher.model, training)).to(device)

    def loss(self, learner: nn.Module, images: Tensor, criterion: Callable[[Tensor], Tensor]) -> Tensor:
        """`(1 - alpha) * criterion(logits) + alpha * (loss of the teacher)` for images (B, C, H, W)."""
        with torch.no_grad():
            seen = self.teacher.view(images)
        if self.config.kind == "feature":
            logits, features = learner(images)
            taught = self._feature_loss(features, seen)
        else:
            logits = learner(images)
            with torch.no_grad():
                decided = self.teacher.model(seen)[:, self.columns]
            hard = self.config.kind == "hard"
            taught = hard_loss(logits, decided) if hard else soft_loss(logits, decided, self.config.tau)
        return (1 - self.config.alpha) * criterion(logits) + self.config.alpha * taught

    def _feature_loss(self, features: list[Tensor], seen: Tensor) -> Tensor:
        """Mean squared error, mean over the stages; the teacher's maps are pooled to the size of the student's."""
        with torch.no_grad():
            targets = _forward_with_features(self.teacher.model, seen, self.config.stages)[1]
        losses = []
        for feature, target in zip(features, targets, strict=True):
            if target.ndim == 4:
                target = F.adaptive_avg_pool2d(target, (feature.shape[2], feature.shape[3]))
            losses.append(F.mse_loss(feature.float(), target.float()))
        return torch.stack(losses).mean()


@torch.no_grad()
def _widths(model: nn.Module, image: Tensor, stages: Sequence[int], option: str) -> list[int]:
    """Channels of the features, found by looking at them. Raises ConfigError where there are none such."""
    needed = ("forward_intermediates" if stages else "forward_features", "forward_head")
    lacking = [name for name in needed if not hasattr(model, name)]
    if lacking:
        raise ConfigError(
            f"{option}: {type(model).__name__} gives no features (it has no {lacking[0]}): choose another distill.kind."
        )
    training = model.training
    try:
        features = _forward_with_features(model.eval(), image, stages)[1]
    except AssertionError as error:
        raise ConfigError(f"distill.stages {list(stages)} are not stages of {option}: {error}") from None
    finally:
        model.train(training)
    if stages and (len(features) != len(stages) or any(feature.ndim != 4 for feature in features)):
        raise ConfigError(f"distill.stages {list(stages)} do not give {len(stages)} different maps of {option}.")
    return [feature.shape[1] for feature in features]


def _class_numbers(teacher: nn.Module, training: ImageSplit) -> np.ndarray:
    """The teacher's number of each class of the data, matched as in evaluation. Raises DataError."""
    try:
        return class_outputs(training, teacher)
    except DataError as error:
        raise DataError(f"distill.teacher knows other classes than the data has. {error}") from None
