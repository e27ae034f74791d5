"""Training: one loop, tasks apart from it, checkpoints that survive."""

from zoo.errors import MissingDependencyError

try:
    import accelerate  # noqa: F401
except ImportError as error:
    raise MissingDependencyError('Training needs accelerate: pip install "backbone-zoo[train]".') from error

from zoo.training.config import TrainingConfig
from zoo.training.image_classification import ImageClassification, train
from zoo.training.loop import Interrupted, Run, TrainingError, fit

__all__ = ["ImageClassification", "Interrupted", "Run", "TrainingConfig", "TrainingError", "fit", "train"]
