"""Frozen features: nearest neighbours and a linear classifier, against scikit-learn's on the same features."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import nn

import zoo
from tests.known import Known, known_folder
from zoo.data import DataConfig, evaluation_loader, load_split, preprocessing
from zoo.errors import ConfigError, DataError
from zoo.evaluation import FeatureConfig, evaluate_features

DIGITS = DataConfig(name="digits", batch_size=256, workers=0, input_size=(3, 16, 16))


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    args: Any = {"depths": (1, 1), "dims": (16, 48), "stem_kernel_size": 3, "stem_stride": 2}
    return zoo.create_model("poolformer_s12", pretrained=False, num_classes=0, **args).eval()


def features_of(model: nn.Module, training: bool) -> tuple[np.ndarray, np.ndarray]:
    network: Any = model
    loader = evaluation_loader(load_split(DIGITS, training), DIGITS, preprocessing(model, DIGITS))
    features, labels = [], []
    with torch.no_grad():
        for batch in loader:
            images = loader.prepare(batch, torch.device("cpu"))
            features.append(network.forward_head(network.forward_features(images), pre_logits=True))
            labels.append(batch.labels)
    return torch.cat(features).numpy(), torch.cat(labels).numpy()


def test_digits_by_the_features_of_a_network_that_never_saw_any(model: Any):
    knn, linear = evaluate_features(model, DIGITS, config=FeatureConfig(knn_k=20, linear_c=1.0))
    features, labels = features_of(model, training=True)
    queries, answers = features_of(model, training=False)

    reference: Any = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    predicted = reference.fit(features, labels).predict(queries)
    assert knn.top1 == pytest.approx(100 * np.mean(predicted == answers), abs=100 * 1.5 / 360)  # a tie may fall
    expected = np.zeros((10, 10), int)
    np.add.at(expected, (answers, predicted), 1)
    assert np.abs(knn.confusion - expected).sum() <= 4

    scaler = StandardScaler().fit(features)
    regression = LogisticRegression(C=1.0, max_iter=5000, tol=1e-6).fit(scaler.transform(features), labels)
    shares = regression.predict_proba(scaler.transform(queries))
    assert linear.top1 == pytest.approx(100 * np.mean(shares.argmax(1) == answers), abs=100 * 1.5 / 360)
    assert linear.loss == pytest.approx(-np.log(shares[range(360), answers]).mean(), rel=0.01)

    for results in (knn, linear):
        assert results.top1 > 60  # chance is 10
        assert (results.images, results.confusion.sum()) == (360, 360)
    assert (knn.method, linear.method, knn.loss) == ("knn", "linear", None)
    assert knn.to_row()["method"] == "knn"
    assert "(knn): top-1" in str(knn)


def test_neighbours_worked_out_by_hand():
    from zoo.evaluation.features import knn_probabilities

    features = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    found = knn_probabilities(features, torch.tensor([0, 1, 1]), torch.tensor([[5.0, 0.0]]), 3, k=2, temperature=0.5)
    votes = np.exp(np.array([1, np.sqrt(0.5)]) / 0.5)
    assert found[0].tolist() == pytest.approx([*(votes / votes.sum()), 0])


def test_features_that_cannot_be_judged(tmp_path: Any, model: Any):
    with pytest.raises(ConfigError, match=r"judged by knn and linear, not 'svm'"):
        evaluate_features(model, DIGITS, ["svm"])  # type: ignore[list-item]
    data = known_folder(tmp_path, ["train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png"])
    small = DataConfig(name="folder", path=data.path, workers=0, input_size=(3, 16, 16))
    with pytest.raises(ConfigError, match="knn_k is 20, and there are 2 training images"):
        evaluate_features(model, small, ["knn"])
    assert evaluate_features(model, small, ["knn"], config=FeatureConfig(knn_k=1))[0].images == 2
    with pytest.raises(ConfigError, match="knn_k must be a whole number and at least 1, not 0"):
        FeatureConfig(knn_k=0)
    with pytest.raises(ConfigError, match=r"Known has no forward_features"):
        evaluate_features(Known(np.zeros((2, 2), np.float32)), small)
    known_folder(tmp_path, ["val/c/5.png"])
    with pytest.raises(DataError, match="1 class is not among the 2"):
        evaluate_features(model, small, ["knn"], config=FeatureConfig(knn_k=1))
