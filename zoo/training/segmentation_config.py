"""The configuration of a run that trains a segmentation network."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from zoo.data import SegmentationAugmentConfig, SegmentationDataConfig
from zoo.errors import ConfigError
from zoo.training.config import (
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    SchedulerConfig,
    SparsityConfig,
    TrainConfig,
    check_schedule,
)

__all__ = ["SegmentationLossConfig", "SegmentationModelConfig", "SegmentationTrainingConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentationModelConfig(ModelConfig):
    """What is trained.

    Args:
        name: of a segmentation network in the zoo or, with FFNet's head on its feature maps, of any vision model; with
            the tag of its weights or without, "hf-hub:owner/name", "local-dir:path", or the folder of a run (its best
            checkpoint). Weights of a classifier are its backbone's, and the head begins anew.
        pretrained: start from the published weights; by default, where `name` says which.
        checkpoint_path: start from these weights: a file, a folder, a run's folder, or "hf-hub:owner/name".
        backbone_weights: start a network of segmentation from the stem and the stages of a classifier of the same
            backbone, neck and head anew: a name with the tag of its weights, "hf-hub:owner/name", the folder of a run,
            or a file that the network's converter reads.
        freeze: modules and parameters that are not trained, with all below them, such as [stem, stages.0] of an FFNet
            or [backbone] of another model. They stay in evaluation mode.
        args: arguments of the architecture and the head, such as up_head, seg_head, upsample or drop_rate.
    """

    name: str = "ffnet40s_bcc_mobile"
    backbone_weights: str | None = None

    def __post_init__(self) -> None:
        if self.backbone_weights is not None and (self.pretrained or self.checkpoint_path is not None):
            raise ConfigError(
                "model.backbone_weights begins with a backbone and a fresh head: leave out pretrained and "
                "checkpoint_path."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentationLossConfig:
    """What is minimised: cross-entropy of each pixel that has a class, at the label's resolution.

    Args:
        smoothing: share of each label that is spread over all classes.
        class_weights: of each class in the mean; none for equal ones.
        ohem_thresh: online hard example mining (Shrivastava et al. 2016, arXiv 1604.03540, as in HRNet's code): learn
            only pixels whose class has a probability below this; null learns all.
        ohem_min_kept: with it, at least so many pixels of a process's batch, those of the least probability.
    """

    smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()
    ohem_thresh: float | None = None
    ohem_min_kept: int = 100_000

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise ConfigError(f"loss.smoothing must be from 0 up to, but not, 1; it is {self.smoothing}.")
        if self.class_weights and not (
            all(0 <= weight < math.inf for weight in self.class_weights) and any(self.class_weights)
        ):
            raise ConfigError(
                f"loss.class_weights must be numbers from 0 up, one at least above, not {list(self.class_weights)}."
            )
        if self.ohem_thresh is not None and not 0 < self.ohem_thresh <= 1:
            raise ConfigError(f"loss.ohem_thresh must be above 0 and at most 1; it is {self.ohem_thresh}.")
        if self.ohem_min_kept < 1:
            raise ConfigError(f"loss.ohem_min_kept must be at least 1, not {self.ohem_min_kept}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentationTrainingConfig:
    """One run of a segmentation network.

    Args:
        task: what the file configures.
        resume: "auto" goes on from the run's last checkpoint if it has one; a path goes on from that run or checkpoint.
    """

    task: Literal["segmentation"] = "segmentation"
    model: SegmentationModelConfig = dataclasses.field(default_factory=SegmentationModelConfig)
    data: SegmentationDataConfig
    augment: SegmentationAugmentConfig = dataclasses.field(default_factory=SegmentationAugmentConfig)
    loss: SegmentationLossConfig = dataclasses.field(default_factory=SegmentationLossConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = dataclasses.field(default_factory=SchedulerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    sparsity: SparsityConfig = dataclasses.field(default_factory=SparsityConfig)
    output: OutputConfig = dataclasses.field(default_factory=OutputConfig)
    resume: str | None = None

    def __post_init__(self) -> None:
        check_schedule(self.scheduler, self.optimizer)
