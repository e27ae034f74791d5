"""The backbone zoo: compact networks under the same few verbs.

Public names are imported on first use, so that `import zoo` and everything that only reads facts stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoo.lazy import on_first_use

__version__ = "0.1.0"

_PUBLIC = {
    "Entry": "zoo.registry",
    "ModelInfo": "zoo.registry",
    "Paper": "zoo.registry",
    "Reported": "zoo.registry",
    "Weights": "zoo.registry",
    "list_models": "zoo.registry",
    "model_info": "zoo.registry",
    "pareto": "zoo.registry",
    "register": "zoo.registry",
    "search": "zoo.registry",
    "ZooError": "zoo.errors",
    "create_model": "zoo.factory",
    "create_tokenizer": "zoo.data.tokenizers",
    "load_checkpoint": "zoo.weights",
    "convert_checkpoint": "zoo.weights",
    "save_pretrained": "zoo.hub",
    "publish": "zoo.publishing",
    "export": "zoo.exporting",
    "ZooModelHubMixin": "zoo.layers.hub_mixin",
    "profile": "zoo.profiling",
    "benchmark": "zoo.profiling",
    "optimize_for_inference": "zoo.inference",
    "quantize": "zoo.quantization",
    "train": "zoo.training",
    "evaluate": "zoo.evaluation",
    "predict": "zoo.evaluation",
    "generate": "zoo.generation",
    "register_with_timm": "zoo.compat.timm",
    "sparsity": "zoo.sparsity",
}
__all__ = [*_PUBLIC, "__version__"]

if TYPE_CHECKING:
    from zoo import sparsity
    from zoo.compat.timm import register_with_timm
    from zoo.data.tokenizers import create_tokenizer
    from zoo.errors import ZooError
    from zoo.evaluation import evaluate, predict
    from zoo.exporting import export
    from zoo.factory import create_model
    from zoo.generation import generate
    from zoo.hub import save_pretrained
    from zoo.inference import optimize_for_inference
    from zoo.layers.hub_mixin import ZooModelHubMixin
    from zoo.profiling import benchmark, profile
    from zoo.publishing import publish
    from zoo.quantization import quantize
    from zoo.registry import (
        Entry,
        ModelInfo,
        Paper,
        Reported,
        Weights,
        list_models,
        model_info,
        pareto,
        register,
        search,
    )
    from zoo.training import train
    from zoo.weights import convert_checkpoint, load_checkpoint


__getattr__, __dir__ = on_first_use(__name__, _PUBLIC)
