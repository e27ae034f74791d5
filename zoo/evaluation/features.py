"""How good a model's frozen features are: nearest neighbours and a linear classifier on them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.data import DataConfig, align_classes, load_split, preprocessing
from zoo.data.streaming import Shards
from zoo.errors import ConfigError, DataError
from zoo.evaluation.image_classification import Amp, Setting, check_image_model
from zoo.evaluation.metrics import Counts
from zoo.evaluation.results import Results

__all__ = ["FeatureConfig", "Method", "evaluate_features", "knn_probabilities", "linear_probabilities"]

Method = Literal["knn", "linear"]

MAX_SIMILARITIES = 2**26  # at once: 256 MiB


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """How frozen features are judged.

    Args:
        knn_k: neighbours that vote.
        knn_temperature: of their votes, exp(cosine similarity / temperature).
        linear_c: inverse strength of the linear classifier's penalty on its weights, as scikit-learn's C.
        linear_max_iter: steps of L-BFGS at most.
    """

    knn_k: int = 20
    knn_temperature: float = 0.07
    linear_c: float = 1.0
    linear_max_iter: int = 1000

    def __post_init__(self) -> None:
        for name in ("knn_k", "linear_max_iter"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ConfigError(f"{name} must be a whole number and at least 1, not {value!r}.")
        for name in ("knn_temperature", "linear_c"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above zero, not {getattr(self, name)}.")


@dataclasses.dataclass(frozen=True)
class Features:
    """Pooled features (N, D) float32, what came before the classifier, and labels (N,), on one device."""

    features: Tensor
    labels: Tensor
    model_images_per_second: float | None


def evaluate_features(
    model: nn.Module,
    data: DataConfig,
    methods: Sequence[Method] = ("knn", "linear"),
    *,
    config: FeatureConfig | None = None,
    name: str | None = None,
    device: str | torch.device | None = None,
    amp: Amp = "no",
    channels_last: bool = False,
    torchcompile: bool = False,
) -> list[Results]:
    """One result for each of `methods`, fitted on the training split of `data` and asked about its evaluation split.

    "knn": nearest neighbours by cosine similarity, weighted as DINO does (arXiv 2104.14294). "linear": multinomial
    logistic regression on standardised features, by L-BFGS in float32: with the default penalty probabilities are
    within 1e-3 of scikit-learn's. Features are the model's
    `forward_head(forward_features(images), pre_logits=True)`, of images prepared as for evaluation in both splits; the
    model needs no classifier.

    Raises ConfigError for arguments that make no sense, DataError for data that is missing or does not fit.
    """
    check_image_model(model)
    for method in ("forward_features", "forward_head"):
        if not hasattr(model, method):
            raise ConfigError(f"{type(model).__name__} has no {method}, which gives its features.")
    config = config or FeatureConfig()
    for method in methods:
        if method not in get_args(Method):
            raise ConfigError(f"features can be judged by {' and '.join(get_args(Method))}, not {method!r}.")
    setting = Setting(model, data, device, amp, channels_last)
    if setting.processes > 1:
        raise ConfigError("Features are judged by one process: evaluate with one.")
    preprocess = preprocessing(model, data)
    training_split = load_split(data, training=True)
    if isinstance(training_split.source, Shards):  # a training stream's labels come with its images
        training_split = dataclasses.replace(training_split, labels=training_split.source.labels())
    classes = training_split.classes
    evaluation_split = align_classes(load_split(data, training=False), classes)
    started = time.perf_counter()
    training = _extract(setting, training_split, preprocess, torchcompile)
    evaluation = _extract(setting, evaluation_split, preprocess, torchcompile)
    seconds = time.perf_counter() - started

    found = []
    for method in methods:
        fitted = time.perf_counter()
        counts = Counts(len(classes), setting.device)
        given = (training.features, training.labels, evaluation.features, len(classes))
        if method == "knn":
            probabilities = knn_probabilities(*given, k=config.knn_k, temperature=config.knn_temperature)
        else:
            probabilities = linear_probabilities(*given, c=config.linear_c, max_iter=config.linear_max_iter)
        counts.add(probabilities.clamp(min=1e-12).log(), evaluation.labels)
        results = setting.results(
            counts,
            classes,
            name=name,
            method=method,
            preprocess=preprocess,
            seconds=seconds + time.perf_counter() - fitted,
            model_images_per_second=evaluation.model_images_per_second,
        )
        # shares of a few votes are often 0, and their logarithm says nothing
        found.append(dataclasses.replace(results, loss=None) if method == "knn" else results)
    return found


def _extract(setting: Setting, split: Any, preprocess: dict[str, Any], torchcompile: bool) -> Features:
    model: Any = setting.model

    def forward(images: Tensor) -> Tensor:
        return model.forward_head(model.forward_features(images), pre_logits=True)

    features: list[Tensor] = []
    numbers: list[Tensor] = []

    def take(output: Tensor, batch_numbers: Tensor) -> None:
        if output.ndim != 2:
            raise ConfigError(
                f"{type(model).__name__} does not pool its features to one vector for each image, but gives "
                f"{tuple(output.shape)}."
            )
        features.append(output.float())
        numbers.append(batch_numbers)

    speed = setting.over(setting.loader(split, preprocess), take, torch.compile(forward) if torchcompile else forward)
    if not features:
        raise DataError(f"None of the images can be read. The first: {next(iter(setting.damage.names), 'none')}.")
    labels = torch.from_numpy(split.labels).to(setting.device)[torch.cat(numbers)]
    return Features(torch.cat(features)[labels >= 0], labels[labels >= 0], speed)


@torch.inference_mode()
def knn_probabilities(
    features: Tensor, labels: Tensor, queries: Tensor, num_classes: int, *, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Shares of the votes of the `k` nearest: features (N, D), labels (N,), queries (M, D) -> (M, num_classes)."""
    if k > len(features):
        raise ConfigError(f"knn_k is {k}, and there are {len(features)} training images.")
    features, queries = F.normalize(features), F.normalize(queries)
    found = []
    for chunk in queries.split(max(1, MAX_SIMILARITIES // len(features))):
        nearest = (chunk @ features.T).topk(k)
        votes = torch.zeros(len(chunk), num_classes, device=features.device)
        votes.scatter_add_(1, labels[nearest.indices], (nearest.values / temperature).softmax(-1))
        found.append(votes)
    return torch.cat(found)


@torch.inference_mode(False)
def linear_probabilities(
    features: Tensor, labels: Tensor, queries: Tensor, num_classes: int, *, c: float = 1.0, max_iter: int = 1000
) -> Tensor:
    """Of a logistic regression on standardised features: (N, D), (N,), queries (M, D) -> (M, num_classes).

    Minimises the sum of the losses times `c` plus half the squared weights, without the biases, as scikit-learn's
    LogisticRegression does; on the device that holds the features, so that ImageNet's are feasible.
    """
    scale, shift = features.std(0, unbiased=False), features.mean(0)
    scale = torch.where(scale > 0, scale, 1.0)
    inputs, labels = (features - shift) / scale, labels.clone()  # no inference tensors, which gradients cannot use
    weight = torch.zeros(num_classes, inputs.shape[1], device=inputs.device, requires_grad=True)
    bias = torch.zeros(num_classes, device=inputs.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=max_iter, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(inputs, weight, bias), labels)
        loss = loss + weight.square().sum() / (2 * c * len(inputs))
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        return F.linear((queries - shift) / scale, weight, bias).softmax(-1)
