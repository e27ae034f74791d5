"""MobileLLM's two claims (arXiv 2402.14905) at small scale, on books, at equal parameters and equal tokens.

    python benchmarks/depth_width.py --data FOLDER [--size 5m] [--tokens 4e6] [--seeds 0 1 2]

1. Deep and thin beats shallow and wide: 24 layers against 6 of twice the width, with the same number of parameters
   without the embedding (within 2%, checked). The embedding of the wide one has twice the parameters, which is in its
   favour.
2. Sharing each layer with its neighbour (LS: every stored layer runs twice in a row) beats not sharing: the same stored
   parameters, and nearly twice the arithmetic.

All learn the same sequences in the same order for a seed, with the same optimizer, rate and schedule; evaluation is
on books by other authors. FOLDER holds train.parquet and validation.parquet with a column `text`. A byte-level BPE of
8,192 tokens is learned from them once. Figures, with the command, device and versions, and the curves (mean, and the
range over the seeds) go to benchmarks/results/depth_width/ after every run. Runs that lie finished in --runs, with the
same settings, are not made again, and one that was interrupted goes on where it stopped. Several of these commands may
run at once, each with other --models or --seeds and one thread (OMP_NUM_THREADS=1): the last writes what all found.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, command, data_folder, versions, write_json

import zoo
from zoo.config import run_command, to_plain
from zoo.data.text import TextDataConfig, load_texts
from zoo.data.tokenizers import create_tokenizer, train_tokenizer
from zoo.devices import device_name
from zoo.errors import ConfigError
from zoo.files import make_folder
from zoo.plots import new_figure, save_figure
from zoo.training import LanguageTrainingConfig, Run, train
from zoo.training.config import OptimizerConfig, OutputConfig, SchedulerConfig
from zoo.training.language_config import (
    LanguageModelConfig,
    LanguageTrainConfig,
    SampleConfig,
    TokenizerConfig,
)

FOLDER = RESULTS / "depth_width"
FIGURES = "figures.json"  # in a run's folder, when it is finished
VOCABULARY = 8192
LENGTH = 256
VAL_TOKENS = 40_000  # whole books: the first three
# width, heads, and width of a head of the deep model with 24 layers; the wide one has 6 of twice the width
SIZES = {"1m": (72, 6, 12), "5m": (144, 6, 24), "20m": (288, 6, 48)}
DEPTH, FACTOR = 24, 2


def variants(size: str) -> dict[str, dict[str, Any]]:
    """Arguments of the architecture by name."""
    dim, heads, head_dim = SIZES[size]
    common = {"vocab_size": VOCABULARY, "head_dim": head_dim, "context_length": LENGTH}
    deep = {"depth": DEPTH, "dim": dim, "num_heads": heads, "num_kv_heads": heads // 3, "hidden_dim": 8 * dim // 3}
    wide = {name: value * FACTOR for name, value in deep.items()} | {"depth": DEPTH // FACTOR**2}
    twice = [stored for stored in range(DEPTH) for _ in range(2)]
    return {"deep": common | deep, "wide": common | wide, "deep_ls": common | deep | {"layer_map": twice}}


def parameters(args: dict[str, Any]) -> dict[str, int]:
    model: Any = zoo.create_model("mobilellm_125m", pretrained=False, **args)
    total, embedding = sum(p.numel() for p in model.parameters()), model.head_weight.numel()
    return {"parameters": total, "without_embedding": total - embedding, "layers_run": len(model.config.executed)}


def check_sizes(models: dict[str, dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Parameters by name. Raises ConfigError where they are not equal within 2%."""
    counted = {name: parameters(args) for name, args in models.items()}
    sizes = [found["without_embedding"] for found in counted.values()]
    if max(sizes) > 1.02 * min(sizes):
        raise ConfigError(f"The models differ in parameters by more than 2%: {sizes}.")
    return counted


def configuration(arguments: argparse.Namespace, args: dict[str, Any], seed: int, folder: Path) -> Any:
    return LanguageTrainingConfig(
        model=LanguageModelConfig(name="mobilellm_125m", pretrained=False, args=args),
        tokenizer=TokenizerConfig(name=str(arguments.runs / "tokenizer")),
        data=TextDataConfig(
            path=str(arguments.data),
            batch_size=arguments.batch_size,
            sequence_length=LENGTH,
            tokens_per_epoch=int(arguments.tokens) // arguments.evaluations,
            val_tokens=VAL_TOKENS,
        ),
        optimizer=OptimizerConfig(opt="adamw", lr=arguments.lr, weight_decay=0.1, betas=(0.9, 0.95), clip_grad=1.0),
        scheduler=SchedulerConfig(
            sched="cosine",
            epochs=arguments.evaluations,
            warmup_epochs=0.05 * arguments.evaluations,
            min_lr=0.1 * arguments.lr,
        ),
        train=LanguageTrainConfig(
            seed=seed, amp=arguments.amp, device=arguments.device, torchcompile=arguments.compile, eval_interval=1
        ),
        sample=SampleConfig(),
        output=OutputConfig(dir=str(folder), tracker=None),
        resume="auto",
    )


def figures(run: Run, tokens_per_epoch: int) -> dict[str, Any]:
    seconds = sum(row["seconds"] for row in run.history)
    last = run.history[-1]
    return {
        "val_loss": last["val_loss"],
        "bits_per_byte": last["val_bits_per_byte"],
        "tokens": tokens_per_epoch * len(run.history),
        "tokens_per_second": round(tokens_per_epoch * len(run.history) / seconds),
        "history": [
            {"tokens": tokens_per_epoch * row["epoch"], "train_loss": row["train_loss"], "val_loss": row["val_loss"]}
            for row in run.history
        ],
    }


def finished(home: Path) -> dict[str, dict[str, Any]]:
    """The figures of all finished runs, by name and seed."""
    files = sorted(home.glob(f"*/{FIGURES}"))
    return {file.parent.name.replace("_seed", "/seed"): json.loads(file.read_text()) for file in files}


def summary(runs: dict[str, dict[str, Any]], counted: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Mean and spread (sample standard deviation) over the seeds, and the differences of the same seeds."""
    found: dict[str, Any] = {}
    for name, sizes in counted.items():
        mine = [run for key, run in runs.items() if key.startswith(f"{name}/")]
        if not mine:
            continue
        losses = [run["val_loss"] for run in mine]
        found[name] = {
            **sizes,
            "seeds": len(mine),
            "tokens": mine[0]["tokens"],
            "val_loss_mean": round(statistics.mean(losses), 4),
            "val_loss_std": round(statistics.stdev(losses), 4) if len(losses) > 1 else None,
            "bits_per_byte_mean": round(statistics.mean(run["bits_per_byte"] for run in mine), 4),
            "tokens_per_second": round(statistics.mean(run["tokens_per_second"] for run in mine)),
        }
        seeds = [
            key.partition("/")[2]
            for key in runs
            if key.startswith(f"{name}/") and f"deep/{key.partition('/')[2]}" in runs
        ]
        if name != "deep" and seeds:
            gains = [runs[f"{name}/{seed}"]["val_loss"] - runs[f"deep/{seed}"]["val_loss"] for seed in seeds]
            found[name]["val_loss_minus_deep"] = [round(gain, 4) for gain in gains]
    return found


def plot(runs: dict[str, dict[str, Any]], found: dict[str, Any], title: str, path: Path) -> None:
    """Validation loss over tokens: the mean as a line, the range over the seeds as a band."""
    figure = new_figure((7.5, 4.8))
    axes = figure.add_subplot()
    for name, row in found.items():
        histories = [run["history"] for key, run in runs.items() if key.startswith(f"{name}/")]
        tokens = [point["tokens"] / 1e6 for point in histories[0]]
        values = list(zip(*([point["val_loss"] for point in history] for history in histories), strict=True))
        label = f"{name}: {row['layers_run']} layers, {row['without_embedding'] / 1e6:.2f}M, {row['seeds']} seeds"
        (line,) = axes.plot(tokens, [statistics.mean(at) for at in values], marker=".", label=label)
        axes.fill_between(
            tokens, [min(at) for at in values], [max(at) for at in values], color=line.get_color(), alpha=0.2
        )
    axes.set_xlabel("training tokens (M)")
    axes.set_ylabel("loss on books by other authors (nats a token)")
    axes.set_title(title)
    axes.grid(True, color="0.92")
    axes.legend(frameon=False)
    save_figure(figure, path)


def write(report: dict[str, Any], folder: Path) -> None:
    write_json(report, folder / "results.json")
    title = f"MobileLLM's shapes on books, {report['settings']['size']} without the embedding"
    plot(report["runs"], report["summary"], title, folder / "curves.png")


def learn_tokenizer(arguments: argparse.Namespace) -> None:
    folder = arguments.runs / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        print(f"== a BPE of {VOCABULARY:,} tokens", flush=True)
        texts = load_texts(TextDataConfig(path=str(arguments.data)), training=True)
        train_tokenizer((text for text in texts.documents() if isinstance(text, str)), VOCABULARY).save(folder)
    create_tokenizer(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with train.parquet and validation.parquet")
    parser.add_argument("--size", choices=SIZES, default="5m", help="parameters without the embedding")
    parser.add_argument("--tokens", type=float, default=4e6, help="training tokens of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", choices=("deep", "wide", "deep_ls"), default=["deep", "wide", "deep_ls"])
    parser.add_argument("--evaluations", type=int, default=8, help="points of the curve")
    parser.add_argument("--batch-size", type=int, default=16, help=f"sequences of {LENGTH} tokens to an update")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (the paper's)")
    parser.add_argument("--amp", choices=("no", "bf16"), default="bf16")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--runs", type=Path, default=Path("runs/depth_width"), help="folder for the runs themselves")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder for figures and curves")
    arguments = parser.parse_args()
    arguments.data = data_folder("books", "train.parquet", arguments.data)
    make_folder(arguments.results)
    make_folder(arguments.runs)
    learn_tokenizer(arguments)

    models = variants(arguments.size)
    counted = check_sizes(models)
    named = ("size", "tokens", "evaluations", "batch_size", "lr", "amp")
    settings = {name: getattr(arguments, name) for name in named} | {"length": LENGTH, "vocabulary": VOCABULARY}
    made_by = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    home = make_folder(arguments.runs / f"{arguments.size}_{made_by}")
    device = torch.device("cuda" if arguments.device == "auto" and torch.cuda.is_available() else "cpu")
    report: dict[str, Any] = {
        "what": "loss on books by authors who are not among those learned",
        "command": command(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions("torch"),
        "settings": settings,
        "models": models,
    }
    for seed in arguments.seeds:  # seeds outside: cut short, there are as many runs of the one as of the other
        for name in arguments.models:
            folder = home / f"{name}_seed{seed}"
            if not (folder / FIGURES).is_file():
                print(f"== {folder.name}: {counted[name]['without_embedding']:,} without the embedding", flush=True)
                config = configuration(arguments, models[name], seed, folder)
                run = train(config)
                batch = arguments.batch_size * LENGTH
                found = figures(run, config.data.tokens_per_epoch // batch * batch)
                recipe = to_plain(config)
                for private in ("output", "resume", "tokenizer"):
                    recipe.pop(private)
                recipe["data"]["path"] = "books"
                write_json(found | {"config": recipe}, folder / FIGURES)
            report["runs"] = finished(home)
            report["summary"] = summary(report["runs"], counted)
            write(report, arguments.results)
            found = report["runs"][f"{name}/seed{seed}"]
            print(f"{folder.name}: loss {found['val_loss']:.4f}, {found['tokens_per_second']:,} tokens/s", flush=True)
    for name, row in report["summary"].items():
        spread = "" if row["val_loss_std"] is None else f" ± {row['val_loss_std']:.4f}"
        print(f"{name:<8} loss {row['val_loss_mean']:.4f}{spread} over {row['seeds']} seeds, {row['tokens']:,} tokens")
    print(f"Written to {arguments.results}")


if __name__ == "__main__":
    sys.exit(run_command(main))
