"""Data: images and masks, thin over `datasets`, torchvision and `timm.data`; texts, and their tokenizers."""

from typing import TYPE_CHECKING

from zoo.data.config import AugmentConfig, DataConfig
from zoo.data.segmentation_config import SegmentationAugmentConfig, SegmentationDataConfig
from zoo.data.tokenizers import Tokenizer, create_tokenizer, train_tokenizer
from zoo.lazy import on_first_use

if TYPE_CHECKING:
    from zoo.data.loading import (
        UNREADABLE,
        DamageReport,
        EpochSampler,
        EvaluationLoader,
        ImageDataset,
        TrainingLoader,
        evaluation_loader,
        make_loader,
        to_channels,
        training_loader,
    )
    from zoo.data.segmentation import (
        SegmentationBatch,
        SegmentationSplit,
        load_segmentation_split,
        segmentation_evaluation_loader,
        segmentation_training_loader,
    )
    from zoo.data.sources import ImageSplit, align_classes, load_split
    from zoo.data.text import TextDataConfig
    from zoo.data.transforms import Batch, eval_transform, preprocessing, random_transform

__all__ = [
    "UNREADABLE",
    "AugmentConfig",
    "Batch",
    "DamageReport",
    "DataConfig",
    "EpochSampler",
    "EvaluationLoader",
    "ImageDataset",
    "ImageSplit",
    "SegmentationAugmentConfig",
    "SegmentationBatch",
    "SegmentationDataConfig",
    "SegmentationSplit",
    "TextDataConfig",
    "Tokenizer",
    "TrainingLoader",
    "align_classes",
    "create_tokenizer",
    "eval_transform",
    "evaluation_loader",
    "load_segmentation_split",
    "load_split",
    "make_loader",
    "preprocessing",
    "random_transform",
    "segmentation_evaluation_loader",
    "segmentation_training_loader",
    "to_channels",
    "train_tokenizer",
    "training_loader",
]

# torchvision and timm take seconds to import, and texts need neither; tokenizers need no Pillow either
_LATER = {
    "zoo.data.loading": (
        "UNREADABLE",
        "DamageReport",
        "EpochSampler",
        "EvaluationLoader",
        "ImageDataset",
        "TrainingLoader",
        "evaluation_loader",
        "make_loader",
        "to_channels",
        "training_loader",
    ),
    "zoo.data.segmentation": (
        "SegmentationBatch",
        "SegmentationSplit",
        "load_segmentation_split",
        "segmentation_evaluation_loader",
        "segmentation_training_loader",
    ),
    "zoo.data.sources": ("ImageSplit", "align_classes", "load_split"),
    "zoo.data.text": ("TextDataConfig",),
    "zoo.data.transforms": ("Batch", "eval_transform", "preprocessing", "random_transform"),
}
__getattr__, __dir__ = on_first_use(
    __name__,
    {name: home for home, names in _LATER.items() for name in (home.rpartition(".")[2], *names)},
)
