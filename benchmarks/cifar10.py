"""poolformer_s12 on CIFAR-10, ours and timm's, under one recipe, one engine and the same seeds.

    python benchmarks/cifar10.py [--data PATH] [--epochs 2] [--seeds 0 1 2] [--same-start]

Both get a 3x3 stem of stride 2 for 32x32 images. What differs is what differs between the two: PoolFormer's head (the
authors' order of norm and pooling in ours), the initialisation of the stem and downsampling convolutions (PyTorch's in
ours, as published; truncated normal in timm's), and our own implementation. The curves of both and the figures, with
the command, device and versions, go to benchmarks/results/cifar10/, written anew after every run. With `--same-start`
both begin with timm's initial weights and pool before they normalise: what is left between them is the implementation.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import nn

import zoo
from zoo.config import load_config, run_command, to_plain
from zoo.errors import DataError
from zoo.files import whole_file
from zoo.training import Run, TrainingConfig, train
from zoo.training.plots import plot_curves

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs" / "vision" / "cifar10_poolformer_s12.yaml"
RESULTS = ROOT / "benchmarks" / "results" / "cifar10"
TIMM_NAME = "timm_poolformer_s12_cifar"


@zoo.register(name=TIMM_NAME, family="timm", first_conv="stem.conv", classifier="head.fc")
def timm_poolformer_s12(num_classes: int = 10, in_chans: int = 3, drop_path_rate: float = 0.0) -> nn.Module:
    """timm's model, but for its stem, which halves the resolution instead of quartering it."""
    model = timm.create_model(
        "poolformer_s12", num_classes=num_classes, in_chans=in_chans, drop_path_rate=drop_path_rate
    )
    stem = nn.Conv2d(in_chans, model.stem.conv.out_channels, kernel_size=3, stride=2, padding=1)
    nn.init.trunc_normal_(stem.weight, std=0.02)  # as timm initialises every convolution of this model
    nn.init.zeros_(stem.bias)  # type: ignore[arg-type]
    model.stem.conv = stem
    return model


def data_folder(given: str | None) -> Path:
    """The folder with train.parquet and test.parquet. Raises DataError where there is none."""
    folder = Path(given) if given else Path(os.environ.get("ZOO_DATA", ROOT.parent / "shared" / "data")) / "cifar10"
    if not (folder / "train.parquet").is_file():
        raise DataError(
            f"No train.parquet in {folder}: name CIFAR-10's folder with --data, or its parent with ZOO_DATA."
        )
    return folder


def configurations(arguments: argparse.Namespace, seed: int, output: Path) -> dict[str, TrainingConfig]:
    """What to train under which name: the same in all but the model."""
    changes: dict[str, Any] = {
        "data": {"path": str(data_folder(arguments.data)), "workers": arguments.workers},
        "scheduler": {"epochs": arguments.epochs, "warmup_epochs": arguments.warmup_epochs},
        "train": {"seed": seed, "amp": arguments.amp, "max_updates": arguments.max_updates},
        "output": {"tracker": None},
    }
    ours = load_config(TrainingConfig, RECIPE, **changes)
    drop_path_rate = ours.model.args["drop_path_rate"]
    theirs = dataclasses.replace(ours.model, name=TIMM_NAME, args={"drop_path_rate": drop_path_rate})
    models = {"zoo": ours.model, "timm": theirs}
    if arguments.same_start:
        torch.manual_seed(seed)
        start = output / "start.safetensors"
        safetensors.torch.save_model(zoo.create_model(TIMM_NAME), str(start))
        args = {**ours.model.args, "head_norm_first": False}
        models["zoo"] = dataclasses.replace(ours.model, args=args)
        models = {name: dataclasses.replace(model, checkpoint_path=str(start)) for name, model in models.items()}
    return {
        name: dataclasses.replace(
            ours, model=models[name], output=dataclasses.replace(ours.output, dir=str(output / name))
        )
        for name in arguments.models
    }


def figures(run: Run, config: TrainingConfig) -> dict[str, Any]:
    last = run.history[-1]
    images = config.data.batch_size * config.train.grad_accum_steps
    steps = [(row["updates"] - before, row["seconds"]) for row, before in zip(run.history, _starts(run), strict=True)]
    return {
        "model": config.model.name,
        "last_top1": last["val_top1"],
        "best_top1": run.best,
        "last_val_loss": last["val_loss"],
        "training_images_per_second": [round(images * updates / seconds, 1) for updates, seconds in steps],
        "seconds": round(run.seconds, 1),
        "history": run.history,
    }


def _starts(run: Run) -> list[int]:
    return [0, *(row["updates"] for row in run.history[:-1])]


def summary(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread (sample standard deviation) over the seeds, by name."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(key.partition("/")[0] for key in runs):
        mine = [run for key, run in runs.items() if key.startswith(f"{name}/")]
        top1 = [run["last_top1"] for run in mine]
        found[name] = {
            "model": mine[0]["model"],
            "epochs": len(mine[0]["history"]),
            "seeds": len(top1),
            "top1_mean": round(statistics.mean(top1), 2),
            "top1_std": round(statistics.stdev(top1), 2) if len(top1) > 1 else None,
        }
    return found


def mean_history(runs: dict[str, dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The rows of `name`, each the mean over its seeds."""
    histories = [run["history"] for key, run in runs.items() if key.startswith(f"{name}/")]
    keys = ("epoch", "train_loss", "val_loss", "val_top1")
    return [{key: statistics.mean(row[key] for row in rows) for key in keys} for rows in zip(*histories, strict=False)]


def write(report: dict[str, Any], folder: Path) -> None:
    with whole_file(folder / "results.json") as file:
        file.write((json.dumps(report, indent=1) + "\n").encode())
    found = report["summary"]
    curves = {f"{name} ({found[name]['seeds']} seeds)": mean_history(report["runs"], name) for name in found}
    epochs = max(row["epochs"] for row in found.values())
    title = f"poolformer_s12 (stem for 32x32) on CIFAR-10 (JPEG), {epochs} epochs, mean over seeds"
    plot_curves(curves, "top1", title, folder / "curves.png")


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="folder with train.parquet and test.parquet")
    parser.add_argument("--epochs", type=int, default=100 if gpu else 2)
    parser.add_argument("--warmup-epochs", type=float, default=5 if gpu else 0.5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--amp", choices=("no", "bf16", "fp16"), default="bf16", help="mixed precision")
    parser.add_argument("--workers", type=int, default=8 if gpu else 0)
    parser.add_argument("--models", nargs="+", choices=("zoo", "timm"), default=["zoo", "timm"])
    parser.add_argument("--same-start", action="store_true", help="the same initial weights and head for both")
    parser.add_argument("--max-updates", type=int, default=None, help="stop each run after so many updates")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for figures and curves")
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)

    device = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads ({platform.machine()})"
    report: dict[str, Any] = {
        "what": "CIFAR-10 (JPEG), evaluated on its 10,000 test images",
        "command": " ".join(["python", "benchmarks/cifar10.py", *sys.argv[1:]]),
        "device": device,
        "versions": {"zoo": zoo.__version__, "torch": torch.__version__, "timm": timm.__version__},
        "summary": {},
        "runs": {},
    }
    for seed in arguments.seeds:  # seeds outside: a run that is cut short has as many of ours as of timm's
        with tempfile.TemporaryDirectory() as folder:
            for name, config in configurations(arguments, seed, Path(folder)).items():
                print(f"== {name}, seed {seed}: {config.model.name}", flush=True)
                run = train(config)
                found = report["runs"][f"{name}/seed{seed}"] = figures(run, config)
                recipe = to_plain(dataclasses.replace(config, data=dataclasses.replace(config.data, path="cifar10")))
                recipe.pop("output")
                recipe["model"].pop("checkpoint_path")
                found["config"] = recipe
                report["summary"] = summary(report["runs"])
                write(report, arguments.results)
                print(f"{name:<5} seed {seed}: top-1 {found['last_top1']:.2f}%, {found['seconds']:.0f} s", flush=True)
    for name, found in report["summary"].items():
        spread = "" if found["top1_std"] is None else f" ± {found['top1_std']:.2f}"
        print(
            f"{name:<5} top-1 {found['top1_mean']:.2f}{spread}% over {found['seeds']} seeds, {found['epochs']} epochs"
        )
    print(f"Written to {arguments.results}")


if __name__ == "__main__":
    sys.exit(run_command(main))
