"""What `eval.py` does: models, sizes and methods one after the other, and one table of them all."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from zoo.data import preprocessing
from zoo.errors import ConfigError, ZooError
from zoo.evaluation.config import EvaluationConfig
from zoo.evaluation.features import evaluate_features
from zoo.evaluation.image_classification import check_image_model, evaluate, load_model
from zoo.evaluation.plots import plot_models, plot_sizes
from zoo.evaluation.results import Results, write_csv
from zoo.evaluation.targets import check_label_map
from zoo.files import check_writable, make_folder

__all__ = ["run"]


def run(config: EvaluationConfig, command: str | None = None) -> int:
    """Evaluate as `config` says, print and save; the exit status: 1 where one of several models could not be.

    `command` is what was typed, for the record. A model that fails alone raises its error.
    """
    output = make_folder(config.output) if config.output else None  # before the work, not after it
    if config.predictions:
        check_writable(config.predictions)
    if config.label_map:
        check_label_map(config.label_map)
    with _processes(config) as (config, speaks):
        return _run(config, command, output, speaks)


def _run(config: EvaluationConfig, command: str | None, output: Path | None, speaks: bool) -> int:
    models = config.models
    rows: list[Results] = []
    failed: dict[str, str] = {}
    for name in models:
        try:
            of_model = _evaluate_model(config, name, command, output, rows, speaks)
        except ZooError as error:
            if len(models) == 1:
                raise
            failed[name] = str(error)
        except Exception as error:  # whatever a model raises, the others have their turn
            if len(models) == 1:
                raise
            failed[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        else:
            if output and speaks and config.sizes and len(of_model) > 1:
                plot_sizes(of_model, _folder(config, output, name) / "sizes.png")
        if name in failed:
            print(f"error: {name}: {failed[name]}", file=sys.stderr, flush=True)
    if not speaks:
        return 1 if failed else 0
    if len(rows) > 1:
        print("\n" + _table(rows))
    if output and rows:
        if len({row.model for row in rows}) > 1:
            plot_models(rows, output / "models.png")
        print(f"Written to {output}")
    if failed:
        print(f"error: {len(failed)} of {len(models)} models failed: {', '.join(failed)}.", file=sys.stderr)
    return 1 if failed else 0


def _evaluate_model(
    config: EvaluationConfig, name: str, command: str | None, output: Path | None, rows: list[Results], speaks: bool
) -> list[Results]:
    """The results of one model, at every size, by every method; saved and added to `rows` as they come."""
    model = load_model(name, config.checkpoint_path)
    check_image_model(model)
    if config.sizes:
        _check_sizes(model, name, config.sizes)
    found = []
    one = len(config.models) * len(config.sizes or "1") * len(config.features or "1") == 1
    for size in config.sizes or (None,):
        for measured in _evaluate_at(config, model, name, size):
            results = dataclasses.replace(measured, command=command)
            found.append(results)
            rows.append(results)
            if not speaks:
                continue
            print(results if one else f"{size}: {results.summary}" if size else results.summary, flush=True)
            if results.skipped:
                print(f"Skipped {len(results.skipped)} damaged images:", *results.skipped[:20], sep="\n  ")
            if output:
                folder = _folder(config, output, name)
                if size is not None:
                    folder = folder / str(size)
                if config.features and len(config.features) > 1:
                    folder = folder / results.method
                results.save(folder)
                write_csv(output / "results.csv", [row.to_row() for row in rows])
    return found


def _evaluate_at(config: EvaluationConfig, model: nn.Module, name: str, size: int | None) -> list[Results]:
    data = config.data
    if size is not None:
        channels = preprocessing(model, data)["input_size"][0]
        data = dataclasses.replace(data, input_size=(channels, size, size))
    how: dict[str, Any] = {
        "name": name,
        "device": config.device,
        "amp": config.amp,
        "channels_last": config.channels_last,
        "torchcompile": config.torchcompile,
    }
    if config.features:
        return evaluate_features(model, data, config.features, config=config.probe, **how)
    return [evaluate(model, data, label_map=config.label_map, predictions=config.predictions, topk=config.topk, **how)]


def _check_sizes(model: nn.Module, name: str, sizes: Sequence[int]) -> None:
    cfg: Any = model.pretrained_cfg
    own = tuple(cfg["input_size"][1:])
    others = [size for size in sizes if (size, size) != own]
    if cfg.get("fixed_input_size") and others:
        shape = "x".join(map(str, own))
        raise ConfigError(f"{name} runs at its own input size alone, {shape}: it has no results at {others[0]}.")


def _folder(config: EvaluationConfig, output: Path, name: str) -> Path:
    """Where the files of a model lie: `output` itself, or of several models a folder called like the model."""
    if len(config.models) == 1:
        return output
    folders = [re.sub(r"[^\w.@=-]+", "_", model).strip("._") for model in config.models]
    number = config.models.index(name)
    alike = folders[:number].count(folders[number])
    return output / (f"{folders[number]}_{alike + 1}" if alike else folders[number])


@contextlib.contextmanager
def _processes(config: EvaluationConfig) -> Iterator[tuple[EvaluationConfig, bool]]:
    """Join the other processes where `torchrun` or `accelerate launch` started several; whether this one prints."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield config, True
        return
    from accelerate import PartialState

    state = PartialState(cpu=config.device == "cpu")
    yield dataclasses.replace(config, device=str(state.device)), state.is_main_process
    state.destroy_process_group()


def _table(rows: Sequence[Results]) -> str:
    """One line for each result, the best first where there are several models."""

    def number(value: float | None, digits: int = 2) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    lines: list[tuple[str, ...]] = [("model", "method", "size", "top-1", "+-", "top-5", "loss", "ECE", "images/s")]
    several = len({row.model for row in rows}) > 1
    for row in sorted(rows, key=lambda row: -row.top1) if several else rows:
        size = row.preprocessing["input_size"][-1]
        figures = (row.top1, row.top1_stderr, row.top5)
        speed = number(row.model_images_per_second or row.images_per_second, 1)
        loss, ece = number(row.loss, 4), number(row.ece)
        lines.append((row.model, row.method, str(size), *map(number, figures), loss, ece, speed))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
