"""Evaluation: how good a model is on given data."""

from zoo.evaluation.image_classification import Prediction, Results, evaluate, load_model, predict

__all__ = ["Prediction", "Results", "evaluate", "load_model", "predict"]
