"""Figures, and pictures of the registry's facts. Needs matplotlib, which comes with the `train` extra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.errors import ConfigError, MissingDependencyError
from zoo.files import check_writable, whole_file
from zoo.registry import PARETO_AXES, ModelInfo

_AXES = {
    "params": "parameters (M)",
    "macs": "MACs at each model's own input size (G, one fused multiply-add counts one)",
    "activations": "activations (M output elements of convolution, linear, matmul and attention)",
    "fvcore_total": "fvcore total (G, multiply-adds and norms)",
    "kv_bytes": "remembered of a token (KiB at 2 bytes a number)",
    "top1": "claimed ImageNet-1k top-1 (%)",
    "miou": "claimed Cityscapes mIoU (%)",
}
_SCALES = {"params": 1e6, "macs": 1e9, "activations": 1e6, "fvcore_total": 1e9, "kv_bytes": 1024.0}
_SCALES |= {"top1": 1.0, "miou": 1.0}


def check_picture(path: str | Path) -> Path:
    """`path` as a Path that a picture can be drawn into. To ask before long work.

    Raises MissingDependencyError without matplotlib, ConfigError for an ending or a place that will not do.
    """
    endings = new_figure((1, 1)).canvas.get_supported_filetypes()
    path = check_writable(path)
    if path.suffix.lstrip(".").lower() not in endings:
        raise ConfigError(f"Cannot draw into {str(path)!r}: give it one of the endings {', '.join(sorted(endings))}.")
    return path


def new_figure(size: tuple[float, float]) -> Any:
    """An empty figure of `size` (width and height in inches). Raises MissingDependencyError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError('Plots need matplotlib: pip install "backbone-zoo[train]".') from error
    return Figure(figsize=size, layout="constrained")


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write `figure` in the format of the path's ending, whole or not at all. Raises ConfigError."""
    path = Path(path)
    with whole_file(path) as file:
        figure.savefig(file, format=path.suffix.lstrip(".").lower(), dpi=150)
    return path


def plot_pareto(models: Sequence[ModelInfo], front: Sequence[ModelInfo], x: str, y: str, path: str | Path) -> Path:
    """Draw `models` in grey and their Pareto `front` in colour, by name, into `path` (PNG, SVG or PDF).

    Models without one of the two figures are left out.

    Raises MissingDependencyError without matplotlib, ConfigError for a kind of file it cannot write, and for no models.
    """
    path = check_picture(path)
    if not front:
        raise ConfigError("There are no models to draw.")
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    def values(infos: Sequence[ModelInfo], axis: str) -> list[float]:
        return [getattr(info, axis) / _SCALES[axis] for info in infos]

    figure = new_figure((10, 6.5))
    axes = figure.add_subplot()
    names = {info.name for info in front}
    others = [info for info in models if info.name not in names and None not in (getattr(info, x), getattr(info, y))]
    axes.scatter(values(others, x), values(others, y), s=22, color="0.72", label=f"other models ({len(others)})")
    axes.plot(values(front, x), values(front, y), color="C0", linewidth=1, alpha=0.6)
    axes.scatter(values(front, x), values(front, y), s=40, color="C0", zorder=3, label=f"Pareto front ({len(front)})")

    for name, set_scale, axis in (("x", axes.set_xscale, axes.xaxis), ("y", axes.set_yscale, axes.yaxis)):
        if not PARETO_AXES[x if name == "x" else y]:  # costs; accuracies differ by a few percent
            set_scale("log")
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_formatter(NullFormatter())
    # names above the front lean left and those below it lean right, so that neighbours do not cover each other
    for position, info in enumerate(front):
        above = position % 2 == 0
        axes.annotate(
            info.name,
            (getattr(info, x) / _SCALES[x], getattr(info, y) / _SCALES[y]),
            xytext=(-6, 6) if above else (6, -12),
            textcoords="offset points",
            horizontalalignment="right" if above else "left",
            fontsize=8,
        )
    axes.set_xlabel(_AXES[x])
    axes.set_ylabel(_AXES[y])
    axes.margins(x=0.18, y=0.08)
    axes.grid(True, which="major", color="0.92")
    axes.set_axisbelow(True)
    axes.legend(loc="lower right", frameon=False)

    return save_figure(figure, path)
