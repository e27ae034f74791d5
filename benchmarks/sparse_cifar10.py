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
import json
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from cifar10 import RECIPE, data_folder, figures, mean_history

import zoo
from zoo.config import load_config, run_command, to_plain
from zoo.files import whole_file
from zoo.sparsity import load_masks, sparse_parameters
from zoo.training import Run, TrainingConfig, train
from zoo.training.config import ModelConfig, SparsityConfig
from zoo.training.plots import plot_curves
from zoo.training.sparse import MASKS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "slak_cifar10"
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
    augment = {} if arguments.large else {"aa": None, "scale": [0.6, 1.0]}
    changes: dict[str, Any] = {
        "data": {
            "path": str(data_folder(arguments.data)),
            "workers": arguments.workers,
            "batch_size": arguments.batch_size,
        },
        "augment": augment,
        "optimizer": {"lr": arguments.lr},
        "scheduler": {"epochs": arguments.epochs, "warmup_epochs": arguments.warmup_epochs},
        "train": {"seed": seed, "amp": arguments.amp, "max_updates": arguments.max_updates},
        "output": {"tracker": None},
    }
    common = load_config(TrainingConfig, RECIPE, **changes)
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


def summary(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread (sample standard deviation) over the seeds, by name."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(key.partition("/")[0] for key in runs):
        mine = [run for key, run in runs.items() if key.startswith(f"{name}/")]
        top1 = [run["last_top1"] for run in mine]
        found[name] = {
            "width_factor": mine[0]["config"]["model"]["args"]["width_factor"],
            "parameters": mine[0]["parameters"],
            "kept": round(statistics.mean(run["kept"] for run in mine)),
            "updates": mine[0]["history"][-1]["updates"],
            "seeds": len(top1),
            "top1_mean": round(statistics.mean(top1), 2),
            "top1_std": round(statistics.stdev(top1), 2) if len(top1) > 1 else None,
            "seconds_mean": round(statistics.mean(run["seconds"] for run in mine), 1),
        }
    return found


def write(report: dict[str, Any], folder: Path) -> None:
    with whole_file(folder / "results.json") as file:
        file.write((json.dumps(report, indent=1) + "\n").encode())
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


def plot_seeds(report: dict[str, Any], path: Path) -> None:
    """The accuracy of every run against the weights that it keeps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for colour, (name, row) in enumerate(report["summary"].items()):
        mine = [run for key, run in report["runs"].items() if key.startswith(f"{name}/")]
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
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=100)


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="folder with train.parquet and test.parquet")
    parser.add_argument("--epochs", type=int, default=120 if gpu else 1)
    parser.add_argument("--warmup-epochs", type=float, default=8 if gpu else 0.1)
    parser.add_argument("--batch-size", type=int, default=128 if gpu else 64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--max-updates", type=int, default=None, help="stop each run after so many updates")
    parser.add_argument("--update-interval", type=int, default=100 if gpu else 20, help="updates, of the masks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--amp", choices=("no", "bf16", "fp16"), default="bf16" if gpu else "no")
    parser.add_argument("--workers", type=int, default=8 if gpu else 0)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--large", action=argparse.BooleanOptionalAction, default=gpu, help="SLaK-T's depths")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for figures and curves")
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)

    device = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads ({platform.machine()})"
    report: dict[str, Any] = {
        "what": "CIFAR-10 (JPEG), evaluated on its 10,000 test images",
        "command": " ".join(["python", "benchmarks/sparse_cifar10.py", *sys.argv[1:]]),
        "device": device,
        "versions": {"zoo": zoo.__version__, "torch": torch.__version__, "timm": timm.__version__},
        "summary": {},
        "runs": {},
    }
    for seed in arguments.seeds:  # seeds outside: a run that is cut short has as many of each model
        with tempfile.TemporaryDirectory() as folder:
            for name, config in configurations(arguments, seed, Path(folder)).items():
                print(f"== {name}, seed {seed}", flush=True)
                run = train(config)
                found = report["runs"][f"{name}/seed{seed}"] = measured(run, config)
                recipe = to_plain(dataclasses.replace(config, data=dataclasses.replace(config.data, path="cifar10")))
                recipe.pop("output")
                found["config"] = recipe
                report["summary"] = summary(report["runs"])
                write(report, arguments.results)
                print(f"{name:<6} seed {seed}: top-1 {found['last_top1']:.2f}%, {found['seconds']:.0f} s", flush=True)
    for name, found in report["summary"].items():
        spread = "" if found["top1_std"] is None else f" ± {found['top1_std']:.2f}"
        print(
            f"{name:<6} width {found['width_factor']:g}, {found['kept']:,} kept of {found['parameters']:,} "
            f"parameters: top-1 {found['top1_mean']:.2f}{spread}% over {found['seeds']} seeds"
        )
    print(f"Written to {arguments.results}")


if __name__ == "__main__":
    sys.exit(run_command(main))
