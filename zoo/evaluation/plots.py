"""The confusion matrix as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from zoo.errors import MissingDependencyError
from zoo.files import whole_file

MAX_NAMED_CLASSES = 40
MAX_NUMBERED_CLASSES = 20


def plot_confusion(confusion: np.ndarray, classes: Sequence[str], title: str, path: str | Path) -> Path:
    """Draw which share of each class (row) is taken for which (column), into a PNG at `path`.

    `confusion` is (C, C), counts. Raises MissingDependencyError without matplotlib, ConfigError for a path that cannot
    be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError('Plots need matplotlib: pip install "backbone-zoo[train]".') from error

    count = len(classes)
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    side = float(np.clip(2.5 + 0.42 * count, 5, 14))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the images of the class")
    if count <= MAX_NAMED_CLASSES:
        longest = max(map(len, classes))
        axes.set_xticks(range(count), classes, rotation=90 if longest > 2 else 0)
        axes.set_yticks(range(count), classes)
    if count <= MAX_NUMBERED_CLASSES:
        for row, column in np.argwhere(confusion):
            colour = "white" if share[row, column] > 0.5 else "black"
            number = f"{confusion[row, column]}"
            axes.text(column, row, number, ha="center", va="center", color=colour, fontsize=8)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title)
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
    return Path(path)
