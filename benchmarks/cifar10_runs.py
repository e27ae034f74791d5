"""What the comparisons on CIFAR-10 share: their data, recipe and options, runs over seeds, and the report of these."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import ROOT, command, data_folder, versions, write_json

from zoo.config import load_config, to_plain
from zoo.devices import device_and_threads
from zoo.training import Run, TrainingConfig, train

RECIPE = ROOT / "configs" / "vision" / "cifar10_poolformer_s12.yaml"

Report = dict[str, Any]


def new_parser(
    doc: str | None, results: Path, *, models: tuple[str, ...], epochs: int, warmup_epochs: float, amp: str
) -> argparse.ArgumentParser:
    """The options that all comparisons have, with a script's own defaults."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--data", help="folder with train.parquet and test.parquet")
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--warmup-epochs", type=float, default=warmup_epochs)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--amp", choices=("no", "bf16", "fp16"), default=amp, help="mixed precision")
    parser.add_argument("--workers", type=int, default=8 if torch.cuda.is_available() else 0)
    parser.add_argument("--models", nargs="+", choices=models, default=models)
    parser.add_argument("--max-updates", type=int, default=None, help="stop each run after so many updates")
    parser.add_argument("--results", type=Path, default=results, help="folder for figures and curves")
    return parser


def base_config(arguments: argparse.Namespace, seed: int, **changes: dict[str, Any]) -> TrainingConfig:
    """The recipe with the options of `new_parser`, and sections changed."""
    sections: dict[str, dict[str, Any]] = {
        "data": {"path": str(data_folder("cifar10", "train.parquet", arguments.data)), "workers": arguments.workers},
        "scheduler": {"epochs": arguments.epochs, "warmup_epochs": arguments.warmup_epochs},
        "train": {"seed": seed, "amp": arguments.amp, "max_updates": arguments.max_updates},
        "output": {"tracker": None},
    }
    merged = {key: {**sections.get(key, {}), **changes.get(key, {})} for key in {**sections, **changes}}
    return load_config(TrainingConfig, RECIPE, **merged)


def figures(run: Run, config: TrainingConfig) -> dict[str, Any]:
    """What is kept of a run."""
    last = run.history[-1]
    images = config.data.batch_size * config.train.grad_accum_steps
    starts = [0, *(row["updates"] for row in run.history[:-1])]
    steps = [(row["updates"] - before, row["seconds"]) for row, before in zip(run.history, starts, strict=True)]
    return {
        "model": config.model.name,
        "last_top1": last["val_top1"],
        "best_top1": run.best,
        "last_val_loss": last["val_loss"],
        "training_images_per_second": [round(images * updates / seconds, 1) for updates, seconds in steps],
        "seconds": round(run.seconds, 1),
        "history": run.history,
    }


def runs_of(runs: dict[str, dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [run for key, run in runs.items() if key.startswith(f"{name}/")]


def mean_history(runs: dict[str, dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The rows of `name`, each the mean over its seeds."""
    histories = [run["history"] for run in runs_of(runs, name)]
    keys = ("epoch", "train_loss", "val_loss", "val_top1")
    return [{key: statistics.mean(row[key] for row in rows) for key in keys} for rows in zip(*histories, strict=False)]


def summarize(runs: dict[str, dict[str, Any]], describe: Callable[[list[dict[str, Any]]], Report]) -> Report:
    """By name: what `describe` says of its runs, and mean and spread (sample standard deviation) over the seeds."""
    found: Report = {}
    for name in dict.fromkeys(key.partition("/")[0] for key in runs):
        mine = runs_of(runs, name)
        top1 = [run["last_top1"] for run in mine]
        found[name] = {
            **describe(mine),
            "seeds": len(top1),
            "top1_mean": round(statistics.mean(top1), 2),
            "top1_std": round(statistics.stdev(top1), 2) if len(top1) > 1 else None,
        }
    return found


def spread(row: Report) -> str:
    """Mean and spread of one row of the summary, as text."""
    return f"{row['top1_mean']:.2f}" + ("" if row["top1_std"] is None else f" ± {row['top1_std']:.2f}") + "%"


def compare(
    arguments: argparse.Namespace,
    configurations: Callable[[int, Path], dict[str, TrainingConfig]],
    describe: Callable[[list[dict[str, Any]]], Report],
    draw: Callable[[Report, Path], None],
    measure: Callable[[Run, TrainingConfig], dict[str, Any]] = figures,
    go_on: bool = False,
) -> Report:
    """Train what `configurations` gives for each seed; `results.json` and pictures are written anew after each run,
    and at the end, where there was nothing left to run, too: the command that they state is the last one.

    With `go_on`, runs that the results hold already are left as they are; several commands may then run at once, each
    with other models or seeds.
    """
    arguments.results.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.is_available()
    report: Report = {
        "what": "CIFAR-10 (JPEG), evaluated on its 10,000 test images",
        "command": command(),
        "device": device_and_threads(torch.device("cuda" if gpu else "cpu")),
        "versions": versions("torch", "timm"),
        "summary": {},
        "runs": {},
    }
    path = arguments.results / "results.json"

    def known() -> dict[str, dict[str, Any]]:
        return json.loads(path.read_text())["runs"] if go_on and path.is_file() else {}

    def write() -> None:
        report["runs"] |= known()
        report["summary"] = summarize(report["runs"], describe)
        write_json(report, path)
        draw(report, arguments.results)

    report["runs"] = known()
    for seed in arguments.seeds:  # seeds outside: a comparison that is cut short has as many of each
        with tempfile.TemporaryDirectory() as folder:
            for name, config in configurations(seed, Path(folder)).items():
                if f"{name}/seed{seed}" in report["runs"]:
                    continue
                print(f"== {name}, seed {seed}: {config.model.name}", flush=True)
                found = measure(train(config), config)
                recipe = to_plain(dataclasses.replace(config, data=dataclasses.replace(config.data, path="cifar10")))
                recipe.pop("output")
                recipe["model"].pop("checkpoint_path")
                report["runs"][f"{name}/seed{seed}"] = found | {"config": recipe}
                write()
                print(f"{name} seed {seed}: top-1 {found['last_top1']:.2f}%, {found['seconds']:.0f} s", flush=True)
    write()
    return report
