"""The vision families on CIFAR-10 at about equal MACs: a small model of each, one recipe, the same seeds.

    python benchmarks/families_cifar10.py [--data PATH] [--epochs 5] [--seeds 0] [--models emo rmt]

Each model is its family's own architecture with fewer and narrower layers, about 10 million MACs for an image (FFNet:
13, of which its smallest up-head takes most). Images are 32x32; a family whose stem cannot be made finer gets them
enlarged to 64x64, and its MACs are counted there. Nothing is tuned for any of them: the recipe is
`configs/vision/cifar10_poolformer_s12.yaml` without RandAugment, so that this compares how much families learn in a
short run, not what they reach. SLaK and EMOv2 are without their layer scales, which start at 1e-6 and would leave out
their blocks for most of such a run. Left out is SN-Net, which is made of networks that
are trained already. Runs that the results hold already are not made again, so that several commands with different
--models may share the work. Figures, curves and a picture go to benchmarks/results/families_cifar10/.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from zoo.training import Run, TrainingConfig
from zoo.training.config import ModelConfig
from zoo.training.plots import plot_curves

FINE_STEM = {"stem_stride": 2, "stem_kernel_size": 3}
FBNETV3 = (
    ("ds_r1_k3_s1_e1_c16",),
    ("ir_r1_k5_s2_e4_c24", "ir_r1_k5_s1_e2_c24"),
    ("ir_r1_k5_s2_e5_c40_se0.25", "ir_r1_k5_s1_e3_c40_se0.25"),
    ("ir_r1_k5_s2_e5_c80", "ir_r1_k3_s1_e3_c80"),
    ("ir_r1_k3_s2_e6_c136_se0.25",),
    ("cn_r1_k1_s1_c384",),
)
# label: (architecture, side of the image, arguments)
MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "poolformerv2": ("poolformerv2_s12", 32, {"depths": (1, 1, 3, 1), "dims": (32, 64, 88, 136), **FINE_STEM}),
    "caformer": ("caformer_s18", 32, {"depths": (1, 1, 2, 1), "dims": (32, 48, 64, 128), **FINE_STEM}),
    "slak": (
        "slak_tiny",
        32,
        {
            "depths": (1, 1, 2, 1),
            "dims": (24, 48, 80, 120),
            "kernel_sizes": (15, 7, 5, 3),
            "small_kernel_size": 3,
            "stem_stride": 2,
            "layer_scale_init": None,
        },
    ),
    "sret": ("sret_test", 64, {"depths": (1, 1, 1), "dims": (36, 72, 144), "num_heads": (2, 4, 8), "img_size": 64}),
    "emo": ("emo_test", 64, {"depths": (1, 1, 4, 2), "dims": (24, 40, 72, 112)}),
    "emo2": ("emo2_test", 64, {"depths": (1, 2, 5, 2), "dims": (24, 40, 72, 112), "layer_scale_init": None}),
    "rmt": ("rmt_test", 64, {"depths": (1, 1, 2, 1), "dims": (24, 48, 64, 80)}),
    "simplenet": ("simplenet_cifar_310k", 32, {"width_factor": 0.42}),
    "pfnet": ("resnet50_max", 32, {"depths": (1, 1, 1, 1), "planes": (48, 88, 144, 208)}),
    "ffnet": ("ffnet_test", 32, {"dims": (16, 24, 40, 56), "neck_dims": (8, 12, 24, 48), "head_hidden_size": 64}),
    "resnetrs": ("resnetrs50", 32, {"layers": (1, 1, 1, 1), "channels": (16, 24, 32, 48)}),
    "fbnetv3": ("fbnetv3_b", 64, {"blocks": FBNETV3}),
    "vovnet": ("vovnet_test", 64, {}),
    "eupe": ("eupe_test", 32, {"patch_size": 4, "embed_dim": 56, "depth": 3, "num_heads": 2}),
}


def configurations(arguments: argparse.Namespace, seed: int, output: Path) -> dict[str, TrainingConfig]:
    """What to train under which name: the same in all but the model and the side of its images."""
    found = {}
    for label in arguments.models:
        name, side, args = MODELS[label]
        config = base_config(
            arguments, seed, data={"input_size": [3, side, side]}, augment={"aa": None, "scale": [0.6, 1.0]}
        )
        found[label] = dataclasses.replace(
            config,
            model=ModelConfig(name=name, pretrained=False, args=args),
            output=dataclasses.replace(config.output, dir=str(output / label)),
        )
    return found


def measured(run: Run, config: TrainingConfig) -> dict[str, Any]:
    size = config.data.input_size
    assert size is not None
    costs = zoo.profile(zoo.create_model(f"local-dir:{run.folder / 'last'}", device="meta"), size)
    return figures(run, config) | {"parameters": costs.params, "macs": costs.macs}


def describe(mine: list[dict[str, Any]]) -> Report:
    first = mine[0]
    return {
        "model": first["model"],
        "input_size": first["config"]["data"]["input_size"],
        "parameters": first["parameters"],
        "macs": first["macs"],
        "epochs": len(first["history"]),
        "training_images_per_second": first["training_images_per_second"][-1],
    }


def draw(report: Report, folder: Path) -> None:
    found = report["summary"]
    if max(row["epochs"] for row in found.values()) > 1:
        curves = {
            f"{name}, {row['macs'] / 1e6:.1f} M MACs": mean_history(report["runs"], name) for name, row in found.items()
        }
        plot_curves(curves, "top1", "Families on CIFAR-10 (JPEG), mean over seeds", folder / "curves.png")
    figure = new_figure((8, 5))
    axes = figure.add_subplot()
    for i, (name, row) in enumerate(found.items()):
        mine = runs_of(report["runs"], name)
        style: dict[str, Any] = {"color": f"C{i % 10}", "marker": "os"[i // 10], "label": f"{name}: {spread(row)}"}
        axes.scatter([row["macs"] / 1e6] * len(mine), [run["last_top1"] for run in mine], **style)
    axes.set(xlabel="MACs for an image (millions)", ylabel="top-1 on the test images (%)")
    axes.set_title(f"Families on CIFAR-10 (JPEG), {max(row['epochs'] for row in found.values())} epochs, each seed")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, bbox_to_anchor=(1.01, 1), loc="upper left")
    save_figure(figure, folder / "top1.png")


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = new_parser(
        __doc__,
        RESULTS / "families_cifar10",
        models=tuple(MODELS),
        epochs=100 if gpu else 5,
        warmup_epochs=5 if gpu else 0.5,
        amp="bf16" if gpu else "no",
    )
    arguments = parser.parse_args()
    report = compare(arguments, partial(configurations, arguments), describe, draw, measured, go_on=True)
    for name, row in sorted(report["summary"].items(), key=lambda item: -item[1]["top1_mean"]):
        print(
            f"{name:<13} top-1 {spread(row)} over {row['seeds']} seeds, {row['epochs']} epochs; "
            f"{row['macs'] / 1e6:.1f} M MACs, {row['parameters'] / 1e6:.2f} M parameters"
        )
    print(f"Written to {arguments.results}")


if __name__ == "__main__":
    sys.exit(run_command(main))
