"""Evaluation: how good a model is on given data, what it sees in an image, and where."""

from zoo.evaluation.dispatch import evaluate
from zoo.evaluation.features import FeatureConfig, evaluate_features
from zoo.evaluation.image_classification import load_model
from zoo.evaluation.language import evaluate_language, perplexity
from zoo.evaluation.language_results import LanguageResults
from zoo.evaluation.prediction import Prediction, class_activation_map, predict
from zoo.evaluation.results import Results
from zoo.evaluation.targets import LABEL_MAPS

__all__ = [
    "LABEL_MAPS",
    "FeatureConfig",
    "LanguageResults",
    "Prediction",
    "Results",
    "class_activation_map",
    "evaluate",
    "evaluate_features",
    "evaluate_language",
    "load_model",
    "perplexity",
    "predict",
]
