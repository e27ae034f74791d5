"""A small SLaK at 32x32 on CIFAR-10: dense, 40% sparse and 1.3 times as wide, and dense at that width.

    python benchmarks/sparse_cifar10.py [--data PATH] [--epochs 1] [--seeds 0 1 2]

The paper's recipe in miniature (arXiv 2207.03620, section 4): kernels decomposed, `sparsity.method slak` (densities by
SNIP, masks that move by magnitude and chance) at width 1.3. "dense" has as many parameters as the sparse model keeps,
to the nearest width; that is the model of width 1, or as good as. "wide" is the sparse model's own architecture with
all its weights. All share one recipe and the same seeds; no layer scale, which would keep a short run from learning.
The figures, with the command, device and versions, a picture of them, and the curves of runs of several epochs go to
benchmarks/results/slak_cifar10/, written anew after every run.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cifar10_runs import Report, base_config, compare, figures, mean_history, new_parser, runs_of, spread
from record import RESULTS

import zoo
from zoo.config import run_command
from zoo.plots import new_figure, save_figure
from zoo.sparsity import load_masks, sparse_parameters
from zoo.training import Run, TrainingConfig
from zoo.training.config import ModelConfig, SparsityConfig
from zoo.training.plots import plot_curves
from zoo.training.sparse import MASKS

MODELS = ("dense", "sparse", "wide")
WIDTH, DENSITY = 1.3, 0.6
# maps of 16, 8, 4 and 2 pixels: kernels that span them, as 51 to 13 span the maps of 224
SMALL = {"depths": (1, 1, 2, 1), "dims": (16, 32, 64, 128), "kernel_sizes": (15, 7, 5, 3), "small_kernel_size": 3}
LARGE = {"depths": (3, 3, 9, 3), "dims": (48, 96, 192, 384), "kernel_sizes": (15, 7, 5, 3), "small_kernel_size": 3}
COMMON = {"stem_stride": 2, "layer_scale_init": None}


def parameters(args: dict[str, Any], width: float, density: float = 1.0) -> int:
    """Of the model of that width; of its weights that can be sparse, the share `density` counts."""
    model = zoo.create_model("slak_tiny", num_classes=10, width_factor=width, **args)
    total = sum(parameter.numel() for parameter in model.parameters())
    return round(total - (1 - density) * sum(parameter.numel() for parameter in sparse_parameters(model).values()))


def width_of(args: dict[str, Any], wanted: int) -> float:
    """The width at which a dense model's parameters are nearest to `wanted`, to a thousandth."""
    low, high = 1000, 1300
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if parameters(args, middle / 1000) <= wanted else (low, middle)
    return min((low / 1000, high / 1000), key=lambda width: abs(parameters(args, width) - wanted))


def configurations(arguments: argparse.Namespace, seed: int, output: Path) -> dict[str, TrainingConfig]:
    """What to train under which name: the same in all but width and sparsity."""
    common = base_config(
        arguments,
        seed,
        data={"batch_size": arguments.batch_size},
        augment={} if arguments.large else {"aa": None, "scale": [0.6, 1.0]},
        optimizer={"lr": arguments.lr},
    )
    args = (LARGE if arguments.large else SMALL) | COMMON
    widths = {"dense": width_of(args, parameters(args, WIDTH, DENSITY)), "sparse": WIDTH, "wide": WIDTH}
    sparse = SparsityConfig(method="slak", density=DENSITY, update_interval=arguments.update_interval)
    return {
        name: dataclasses.replace(
            common,
            model=ModelConfig(name="slak_tiny", pretrained=False, args=args | {"width_factor": widths[name]}),
            sparsity=sparse if name == "sparse" else SparsityConfig(),
            output=dataclasses.replace(common.output, dir=str(output / name)),
        )
        for name in arguments.models
    }


def measured(run: Run, config: TrainingConfig) -> dict[str, Any]:
    """Figures of a run. Of its parameters those count as kept that masks leave, though they may be zero still."""
    folder = run.folder / "last"
    total = sum(parameter.numel() for parameter in zoo.create_model(f"local-dir:{folder}").parameters())
    masks = load_masks(folder / MASKS) if (folder / MASKS).exists() else {}
    gone = sum(mask.numel() - int(mask.count_nonzero()) for mask in masks.values())
    return figures(run, config) | {"parameters": total, "kept": total - gone}


def describe(mine: list[dict[str, Any]]) -> Report:
    return {
        "width_factor": mine[0]["config"]["model"]["args"]["width_factor"],
        "parameters": mine[0]["parameters"],
        "kept": round(statistics.mean(run["kept"] for run in mine)),
        "updates": mine[0]["history"][-1]["updates"],
        "seconds_mean": round(statistics.mean(run["seconds"] for run in mine), 1),
    }


def draw(report: Report, folder: Path) -> None:
    found = report["summary"]
    curves = {
        f"{name}, width {row['width_factor']:g}, {row['kept'] / 1e3:.0f} K weights": mean_history(report["runs"], name)
        for name, row in found.items()
    }
    seeds = max(row["seeds"] for row in found.values())
    title = f"A small SLaK on CIFAR-10 (JPEG), mean over {seeds} seed{'s' * (seeds > 1)}"
    if max(len(run["history"]) for run in report["runs"].values()) > 1:
        plot_curves(curves, "top1", title, folder / "curves.png")
    plot_seeds(report, folder / "top1.png")


def plot_seeds(report: Report, path: Path) -> None:
    """The accuracy of every run against the weights that it keeps."""
    figure = new_figure((7, 4.5))
    axes = figure.add_subplot()
    for colour, (name, row) in enumerate(report["summary"].items()):
        mine = runs_of(report["runs"], name)
        label = f"{name}, width {row['width_factor']:g}: {row['top1_mean']:.2f}%"
        axes.scatter(
            [run["kept"] / 1e3 for run in mine], [run["last_top1"] for run in mine], color=f"C{colour}", alpha=0.6
        )
        axes.scatter(row["kept"] / 1e3, row["top1_mean"], color=f"C{colour}", marker="_", s=900, label=label)
    axes.set(xlabel="parameters kept (thousands)", ylabel="top-1 on the test images (%)")
    axes.set_title(f"A small SLaK on CIFAR-10 (JPEG), {row['updates']} updates: each seed, and their mean")
    axes.margins(x=0.15)
    axes.grid(alpha=0.3)
    axes.legend(markerscale=0.4)
    save_figure(figure, path)


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = new_parser(
        __doc__,
        RESULTS / "slak_cifar10",
        models=MODELS,
        epochs=120 if gpu else 1,
        warmup_epochs=8 if gpu else 0.1,
        amp="bf16" if gpu else "no",
    )
    parser.add_argument("--batch-size", type=int, default=128 if gpu else 64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--update-interval", type=int, default=100 if gpu else 20, help="updates, of the masks")
    parser.add_argument("--large", action=argparse.BooleanOptionalAction, default=gpu, help="SLaK-T's depths")
    arguments = parser.parse_args()
    report = compare(arguments, partial(configurations, arguments), describe, draw, measured)
    for name, row in report["summary"].items():
        print(
            f"{name:<6} width {row['width_factor']:g}, {row['kept']:,} kept of {row['parameters']:,} parameters: "
            f"top-1 {spread(row)} over {row['seeds']} seeds"
        )
    print(f"Written to {arguments.results}")


if __name__ == "__main__":
    sys.exit(run_command(main))
