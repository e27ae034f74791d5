"""The curves of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.history import best_row
from zoo.plots import new_figure, save_figure

Rows = Sequence[Mapping[str, Any]]


def plot_curves(
    runs: Mapping[str, Rows], metric: str, title: str, path: str | Path, *, lower_is_better: bool = False
) -> Path:
    """Draw losses (left) and `metric` (right; in percent if it is such) over epochs for each named run, into a PNG.

    `runs` maps a name to the rows of its history. Raises MissingDependencyError without matplotlib, ConfigError for a
    path that cannot be written.
    """
    several, many = len(runs) > 1, len(runs) > 4  # many have one legend beside the axes, which they would fill
    figure = new_figure((14 if many else 11, 4.4))
    from matplotlib import colormaps
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    left, right = figure.subplots(1, 2)
    colours: Any = colormaps["tab10" if len(runs) <= 10 else "tab20"]
    unit, digits = (" (%)", 2) if is_percentage(metric) else ("", 4)
    for number, (name, rows) in enumerate(runs.items()):
        colour = colours(number % colours.N)
        prefix = f"{name}: " if several else ""
        for key, style, label in (("train_loss", "--", "training"), ("val_loss", "-", "evaluation")):
            left.plot(*_points(rows, key), style, color=colour, marker=_marker(rows), label=f"{prefix}{label}")
        epochs, values = _points(rows, f"val_{metric}")
        best = best_row(rows, f"val_{metric}", lower_is_better)
        label = f"{prefix}{metric_title(metric)}" + (f" (best {best[f'val_{metric}']:.{digits}f})" if best else "")
        right.plot(epochs, values, color=colour, marker=_marker(rows), label=label)
    left.set_ylabel("loss")
    left.set_ylim(bottom=0)
    right.set_ylabel(f"{metric_title(metric)} on the evaluation split{unit}")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(True, color="0.92")
        axes.set_axisbelow(True)
    if many:
        styles = {"training": "--", "evaluation": "-"}
        left.legend([Line2D([], [], color="0.3", linestyle=style) for style in styles.values()], styles, frameon=False)
        right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    else:
        left.legend(frameon=False)
        right.legend(frameon=False)
    figure.suptitle(title)
    return save_figure(figure, path)


def metric_title(metric: str) -> str:
    return {"miou": "mIoU"}.get(metric, metric.replace("_", " "))


def is_percentage(metric: str) -> bool:
    return metric.startswith("top") or metric == "miou" or metric.endswith("_accuracy")


def _points(rows: Rows, key: str) -> tuple[list[int], list[float]]:
    known = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
    return [epoch for epoch, _ in known], [value for _, value in known]


def _marker(rows: Rows) -> str:
    return "." if len(rows) <= 30 else ""
