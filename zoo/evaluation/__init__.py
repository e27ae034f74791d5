"""Evaluation: how good a model is on given data, what it sees in an image, and where."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, overload

from torch import nn

from zoo.data import DataConfig, SegmentationDataConfig
from zoo.data.text import TextDataConfig
from zoo.evaluation import image_classification
from zoo.evaluation.features import FeatureConfig, evaluate_features
from zoo.evaluation.language import evaluate_language, perplexity, predicts_tokens
from zoo.evaluation.language_results import LanguageResults
from zoo.evaluation.prediction import Prediction, class_activation_map, predict
from zoo.evaluation.results import Results
from zoo.evaluation.segmentation import evaluate_segmentation
from zoo.evaluation.segmentation_results import SegmentationResults
from zoo.evaluation.targets import LABEL_MAPS
from zoo.loading import load_model

__all__ = [
    "LABEL_MAPS",
    "FeatureConfig",
    "LanguageResults",
    "Prediction",
    "Results",
    "SegmentationResults",
    "class_activation_map",
    "evaluate",
    "evaluate_features",
    "evaluate_language",
    "evaluate_segmentation",
    "load_model",
    "perplexity",
    "predict",
]

Texts = TextDataConfig | str | Iterable[str | Sequence[int]]


@overload
def evaluate(model: nn.Module, data: DataConfig, **options: Any) -> Results: ...
@overload
def evaluate(model: nn.Module, data: SegmentationDataConfig, **options: Any) -> SegmentationResults: ...
@overload
def evaluate(model: nn.Module, data: Texts | None = None, **options: Any) -> LanguageResults: ...
def evaluate(model: nn.Module, data: Any = None, **options: Any) -> Results | SegmentationResults | LanguageResults:
    """How good `model` is on `data`.

    An image classifier is evaluated on a `zoo.data.DataConfig`, with the options of
    `zoo.evaluation.image_classification.evaluate`: accuracy, loss, calibration, confusion. A segmentation
    network is evaluated on a `zoo.data.SegmentationDataConfig`, with the options of
    `zoo.evaluation.evaluate_segmentation`: mIoU, accuracies, confusion. A language model is evaluated on texts
    (strings, or a `zoo.data.TextDataConfig`) and on tasks of lm-evaluation-harness, with the options of
    `zoo.evaluation.evaluate_language`: perplexity, bits per byte, accuracies.

    Raises ConfigError and DataError as those do.
    """
    if predicts_tokens(model):
        return evaluate_language(model, data, **options)
    if getattr(model, "task", None) == "segmentation":
        return evaluate_segmentation(model, data, **options)
    return image_classification.evaluate(model, data, **options)
