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
import sys
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from cifar10_runs import Report, base_config, compare, mean_history, new_parser, spread
from record import RESULTS
from torch import nn

import zoo
from zoo.config import run_command
from zoo.training import TrainingConfig
from zoo.training.plots import plot_curves

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


def configurations(arguments: argparse.Namespace, seed: int, output: Path) -> dict[str, TrainingConfig]:
    """What to train under which name: the same in all but the model."""
    ours = base_config(arguments, seed)
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


def describe(mine: list[dict[str, Any]]) -> Report:
    return {"model": mine[0]["model"], "epochs": len(mine[0]["history"])}


def draw(report: Report, folder: Path) -> None:
    found = report["summary"]
    curves = {f"{name} ({found[name]['seeds']} seeds)": mean_history(report["runs"], name) for name in found}
    epochs = max(row["epochs"] for row in found.values())
    title = f"poolformer_s12 (stem for 32x32) on CIFAR-10 (JPEG), {epochs} epochs, mean over seeds"
    plot_curves(curves, "top1", title, folder / "curves.png")


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = new_parser(
        __doc__,
        RESULTS / "cifar10",
        models=("zoo", "timm"),
        epochs=100 if gpu else 2,
        warmup_epochs=5 if gpu else 0.5,
        amp="bf16",
    )
    parser.add_argument("--same-start", action="store_true", help="the same initial weights and head for both")
    arguments = parser.parse_args()
    report = compare(arguments, partial(configurations, arguments), describe, draw)
    for name, row in report["summary"].items():
        print(f"{name:<5} top-1 {spread(row)} over {row['seeds']} seeds, {row['epochs']} epochs")
    print(f"Written to {arguments.results}")


if __name__ == "__main__":
    sys.exit(run_command(main))
