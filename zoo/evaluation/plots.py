"""Results as pictures: confusion, calibration, several models, several sizes, predicted masks."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from zoo.data.segmentation import CITYSCAPES
from zoo.plots import new_figure, save_figure

if TYPE_CHECKING:
    from zoo.evaluation.results import Results
    from zoo.evaluation.segmentation_results import Sample

MAX_NAMED_CLASSES = 40
MAX_NUMBERED_CLASSES = 20
GOLDEN_RATIO = 0.618034


def plot_confusion(
    confusion: np.ndarray, classes: Sequence[str], title: str, path: str | Path, *, of: str = "images"
) -> Path:
    """Draw which share of each class (row) is taken for which (column), into a PNG at `path`.

    `confusion` is (C, C), counts of what `of` says; counts of pixels are written as percentages. Raises
    MissingDependencyError without matplotlib, ConfigError for a path that cannot be written.
    """
    count = len(classes)
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    side = float(np.clip(2.5 + 0.42 * count, 5, 14))
    figure = new_figure((side + 1, side))
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, shrink=0.8, label=f"share of the {of} of the class")
    if count <= MAX_NAMED_CLASSES:
        longest = max(map(len, classes))
        axes.set_xticks(range(count), classes, rotation=90 if longest > 2 else 0)
        axes.set_yticks(range(count), classes)
    if count <= MAX_NUMBERED_CLASSES:
        for row, column in np.argwhere(confusion):
            colour = "white" if share[row, column] > 0.5 else "black"
            number = f"{confusion[row, column]}" if of == "images" else f"{100 * share[row, column]:.0f}"
            axes.text(column, row, number, ha="center", va="center", color=colour, fontsize=8)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title)
    return save_figure(figure, path)


def plot_calibration(calibration: np.ndarray, title: str, path: str | Path) -> Path:
    """Draw accuracy against confidence, bin by bin (a reliability diagram), and where the images lie, into a PNG.

    `calibration` is (bins, 3): images, right answers, sum of confidence. Raises as `plot_confusion` does.
    """
    figure = new_figure((6, 6))
    upper, lower = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    images, right, confidence = np.asarray(calibration).T
    width = 1 / len(images)
    centres = (np.arange(len(images)) + 0.5) * width
    some = images > 0
    upper.bar(centres[some], right[some] / images[some], 0.92 * width, color="C0", label="accuracy in the bin")
    means = confidence[some] / images[some]
    upper.plot(means, means, "o", color="C1", markersize=4, label="mean confidence in the bin")
    upper.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--")
    upper.set_ylabel("accuracy")
    upper.set_ylim(0, 1)
    upper.legend(loc="upper left")
    upper.set_title(title)
    lower.bar(centres, images / max(images.sum(), 1), 0.92 * width, color="0.6")
    lower.set_ylabel("share of images")
    lower.set_xlabel("confidence: probability of the most probable class")
    lower.set_xlim(0, 1)
    return save_figure(figure, path)


def plot_sizes(results: Sequence[Results], path: str | Path) -> Path:
    """Draw top-1 and the model's throughput against the size of its input, into a PNG. Raises as `plot_confusion`."""
    figure = new_figure((8, 4.5))
    left, right = figure.add_subplot(), None
    for number, method in enumerate(dict.fromkeys(result.method for result in results)):
        line = [result for result in results if result.method == method]
        sizes = [result.preprocessing["input_size"][-1] for result in line]
        errors = [result.top1_stderr for result in line]
        label = "top-1" if method == "classifier" else f"top-1 ({method})"
        left.errorbar(sizes, [result.top1 for result in line], errors, marker="o", capsize=3, label=label)
        if number == 0 and all(result.model_images_per_second for result in line):
            right = left.twinx()
            speeds = [result.model_images_per_second or 0 for result in line]
            right.plot(sizes, speeds, marker="s", linestyle="--", color="0.5")
            right.set_ylabel("model alone, images/s (dashed)")
            right.set_ylim(bottom=0)
    left.set_xlabel("height and width of the input, pixels")
    left.set_ylabel("top-1 with standard error (%)")
    left.grid(True, color="0.92")
    left.legend(loc="lower left", frameon=False)
    left.set_title(f"{results[0].model}: {results[0].images} images at each size")
    return save_figure(figure, path)


def plot_models(results: Sequence[Results], path: str | Path) -> Path:
    """Draw top-1 of several models against their throughput, into a PNG. Raises as `plot_confusion` does."""
    figure = new_figure((9, 6))
    axes = figure.add_subplot()
    speeds = [result.model_images_per_second or result.images_per_second for result in results]
    tops, errors = [result.top1 for result in results], [result.top1_stderr for result in results]
    axes.errorbar(speeds, tops, errors, linestyle="none", marker="o", capsize=3)
    for result, speed in zip(results, speeds, strict=True):
        label = f"{result.title} at {result.preprocessing['input_size'][-1]}"
        axes.annotate(label, (speed, result.top1), xytext=(5, 5), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel(f"model alone, images/s on {results[0].device}")
    axes.set_ylabel("top-1 with standard error (%)")
    axes.margins(x=0.2, y=0.12)
    axes.grid(True, which="major", color="0.92")
    return save_figure(figure, path)


def plot_masks(samples: Sequence[Sample], classes: Sequence[str], title: str, path: str | Path) -> Path:
    """Draw each image beside its true and its predicted classes, in colours, into a PNG. Raises as `plot_confusion`.

    Pixels without a class are white. The legend names the classes that occur, the most frequent ones of many.
    """
    from matplotlib.patches import Patch

    colours = np.array([*_colours(classes), (255, 255, 255)], dtype=np.uint8)
    height, width = np.max([sample.mask.shape for sample in samples], axis=0)
    each = 4.0, float(np.clip(4.0 * height / width, 1.0, 8.0))
    figure = new_figure((3 * each[0], len(samples) * each[1] + 1.2))
    grid = figure.subplots(len(samples), 3, squeeze=False)
    seen = np.zeros(len(classes) + 1, dtype=np.int64)
    for row, sample in zip(grid, samples, strict=True):
        grey = sample.image.shape[2] == 1
        row[0].imshow(sample.image[..., 0] if grey else sample.image, cmap="gray", vmin=0, vmax=255)
        for axes, numbers in zip(row[1:], (sample.mask, sample.predicted), strict=True):
            numbers = np.where(numbers < len(classes), numbers, len(classes))
            seen += np.bincount(numbers.ravel(), minlength=len(seen))
            axes.imshow(colours[numbers], interpolation="nearest")
        for axes in row:
            axes.set_axis_off()
    for axes, text in zip(grid[0], ("image", "truth", "prediction"), strict=True):
        axes.set_title(text)
    named = sorted(np.argsort(-seen[:-1], kind="stable")[:MAX_NAMED_CLASSES])
    patches = [Patch(color=colours[n] / 255, label=classes[n]) for n in named if seen[n]]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(10, max(1, len(patches))), fontsize=8)
    figure.suptitle(title)
    return save_figure(figure, path)


def _colours(classes: Sequence[str]) -> list[tuple[int, int, int]]:
    """Cityscapes' own; else hues that lie far apart, and black for a background."""
    if tuple(classes) == tuple(CITYSCAPES):
        return [colour for _, colour in CITYSCAPES.values()]
    found = []
    for number, name in enumerate(classes):
        strength = 0.0 if name.lower() == "background" else (1.0, 0.7, 0.85)[number % 3]
        rgb = colorsys.hsv_to_rgb(number * GOLDEN_RATIO % 1, 0.75, strength)
        found.append((round(255 * rgb[0]), round(255 * rgb[1]), round(255 * rgb[2])))
    return found
