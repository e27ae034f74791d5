"""What `eval.py` does: models, sizes and methods one after the other, and one table of them all."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from zoo.data import preprocessing
from zoo.errors import ConfigError, ZooError
from zoo.evaluation.config import EvaluationConfig, LanguageEvaluationConfig, SegmentationEvaluationConfig
from zoo.evaluation.features import evaluate_features
from zoo.evaluation.image_classification import check_image_model, evaluate
from zoo.evaluation.language import check_language_model, evaluate_language
from zoo.evaluation.language_results import LanguageResults
from zoo.evaluation.plots import plot_models, plot_sizes
from zoo.evaluation.results import Results, write_csv
from zoo.evaluation.segmentation import evaluate_segmentation
from zoo.evaluation.segmentation_results import SegmentationResults
from zoo.evaluation.targets import check_label_map
from zoo.files import check_writable, make_folder
from zoo.hub import tokenizer_beside
from zoo.loading import check_is_whole, load_model
from zoo.units import shape_text

__all__ = ["run"]

AnyConfig = EvaluationConfig | SegmentationEvaluationConfig | LanguageEvaluationConfig


def run(config: AnyConfig, command: str | None = None) -> int:
    """Evaluate as `config` says, print and save; the exit status: 1 where one of several models could not be.

    `command` is what was typed, for the record. A model that fails alone raises its error.
    """
    output = make_folder(config.output) if config.output else None  # before the work, not after it
    if isinstance(config, LanguageEvaluationConfig):
        return _run_language(config, command, output)
    if isinstance(config, SegmentationEvaluationConfig):
        with _processes(config) as (config, speaks):
            return _run_segmentation(config, command, output, speaks)
    if config.predictions:
        check_writable(config.predictions)
    if config.label_map:
        check_label_map(config.label_map)
    with _processes(config) as (config, speaks):
        return _run_images(config, command, output, speaks)


def _run_images(config: EvaluationConfig, command: str | None, output: Path | None, speaks: bool) -> int:
    rows: list[Results] = []

    def evaluate_one(name: str) -> None:
        of_model = _evaluate_model(config, name, command, output, rows, speaks)
        if output and speaks and config.sizes and len(of_model) > 1:
            plot_sizes(of_model, _folder(config, output, name) / "sizes.png")

    failed = _each(config.models, evaluate_one)
    if speaks:
        if len(rows) > 1:
            print("\n" + _table(rows))
        if output and len({row.model for row in rows}) > 1:
            plot_models(rows, output / "models.png")
        _finish(config.models, failed, output if rows else None)
    return 1 if failed else 0


def _run_segmentation(
    config: SegmentationEvaluationConfig, command: str | None, output: Path | None, speaks: bool
) -> int:
    rows: list[SegmentationResults] = []

    def evaluate_one(name: str) -> None:
        model = load_model(name, config.checkpoint_path)
        check_is_whole(model)
        found = evaluate_segmentation(
            model,
            config.data,
            name=name,
            pictures=config.pictures if output else 0,
            device=config.device,
            amp=config.amp,
            channels_last=config.channels_last,
            torchcompile=config.torchcompile,
        )
        results = dataclasses.replace(found, command=command)
        rows.append(dataclasses.replace(results, samples=()))
        if not speaks:
            return
        print(results if len(config.models) == 1 else results.summary, flush=True)
        if results.skipped:
            print(f"Skipped {len(results.skipped)} damaged images:", *results.skipped[:20], sep="\n  ")
        if output:
            results.save(_folder(config, output, name))
            write_csv(output / "results.csv", [row.to_row() for row in rows])

    failed = _each(config.models, evaluate_one)
    if speaks:
        if len(rows) > 1:
            print("\n" + _segmentation_table(rows))
        _finish(config.models, failed, output if rows else None)
    return 1 if failed else 0


def _run_language(config: LanguageEvaluationConfig, command: str | None, output: Path | None) -> int:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("Language models are evaluated by one process: start eval.py with python.")
    rows: list[LanguageResults] = []

    def evaluate_one(name: str) -> None:
        precision = {} if config.dtype is None else {"dtype": getattr(torch, config.dtype)}
        model = load_model(name, config.checkpoint_path, **precision)
        check_language_model(model)
        beside = config.checkpoint_path and tokenizer_beside(config.checkpoint_path)
        found = evaluate_language(
            model,
            config.data if config.reads_text else None,
            tokenizer=config.tokenizer or beside or name,
            name=name,
            context=config.context,
            stride=config.stride,
            joined=config.joined,
            per_document=config.per_document,
            tasks=config.task_names,
            suite=config.suite,
            include_path=config.include_path,
            limit=config.limit,
            num_fewshot=config.num_fewshot,
            chat=config.chat,
            bootstrap_iters=config.bootstrap_iters,
            batch_size=config.data.batch_size,
            device=config.device,
            amp=config.amp,
            progress=True,
        )
        results = dataclasses.replace(found, command=command)
        rows.append(results)
        print(results, flush=True)
        if results.skipped:
            print(f"Skipped {len(results.skipped)} damaged documents:", *results.skipped[:20], sep="\n  ")
        if output:
            results.save(_folder(config, output, name))
            if results.text is not None:
                write_csv(output / "results.csv", [row.to_row() for row in rows])
            if results.tasks:
                write_csv(output / "tasks.csv", [task for row in rows for task in row.task_rows()])

    failed = _each(config.models, evaluate_one)
    if len(rows) > 1:
        print("\n" + _language_table(rows))
    _finish(config.models, failed, output if rows else None)
    return 1 if failed else 0


def _each(models: Sequence[str], evaluate_one: Callable[[str], None]) -> dict[str, str]:
    """Evaluate one after the other; what is wrong with those that failed. One alone raises its error."""
    failed: dict[str, str] = {}
    for name in models:
        try:
            evaluate_one(name)
        except ZooError as error:
            if len(models) == 1:
                raise
            failed[name] = str(error)
        except Exception as error:  # whatever a model raises, the others have their turn
            if len(models) == 1:
                raise
            failed[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if name in failed:
            print(f"error: {name}: {failed[name]}", file=sys.stderr, flush=True)
    return failed


def _finish(models: Sequence[str], failed: dict[str, str], output: Path | None) -> None:
    if output:
        print(f"Written to {output}")
    if failed:
        print(f"error: {len(failed)} of {len(models)} models failed: {', '.join(failed)}.", file=sys.stderr)


def _evaluate_model(
    config: EvaluationConfig, name: str, command: str | None, output: Path | None, rows: list[Results], speaks: bool
) -> list[Results]:
    """The results of one model, at every size, by every method; saved and added to `rows` as they come."""
    model = load_model(name, config.checkpoint_path)
    check_image_model(model)
    if not config.features:
        check_is_whole(model)
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
        shape = shape_text(own)
        raise ConfigError(f"{name} runs at its own input size alone, {shape}: it has no results at {others[0]}.")


def _folder(config: AnyConfig, output: Path, name: str) -> Path:
    """Where the files of a model lie: `output` itself, or of several models a folder called like the model."""
    if len(config.models) == 1:
        return output
    folders = [re.sub(r"[^\w.@=-]+", "_", model).strip("._") for model in config.models]
    number = config.models.index(name)
    alike = folders[:number].count(folders[number])
    return output / (f"{folders[number]}_{alike + 1}" if alike else folders[number])


OnDevice = TypeVar("OnDevice", EvaluationConfig, SegmentationEvaluationConfig)


@contextlib.contextmanager
def _processes(config: OnDevice) -> Iterator[tuple[OnDevice, bool]]:
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
    return _aligned(lines, 2)


def _segmentation_table(rows: Sequence[SegmentationResults]) -> str:
    """One line for each model, the best first."""
    lines: list[tuple[str, ...]] = [("model", "size", "mIoU", "mean acc.", "pixel acc.", "loss", "images/s")]
    for row in sorted(rows, key=lambda row: -row.miou):
        size = shape_text(row.preprocessing["input_size"][1:])
        figures = (f"{value:.2f}" for value in (row.miou, row.mean_accuracy, row.pixel_accuracy))
        speed = f"{row.model_images_per_second or row.images_per_second:.1f}"
        lines.append((row.model, size, *figures, f"{row.loss:.4f}", speed))
    return _aligned(lines, 1)


def _language_table(rows: Sequence[LanguageResults]) -> str:
    """One line for each model: figures of the text, the lowest bits per byte first, and of the tasks."""
    tasks = list(dict.fromkeys((score.task, score.metric) for row in rows for score in row.tasks))
    of_text = ("perplexity", "bits/byte", "bits/token", "tokens/s") if any(row.text for row in rows) else ()
    lines: list[tuple[str, ...]] = [("model", *of_text, *(f"{task} {metric}" for task, metric in tasks))]
    for row in sorted(rows, key=lambda row: row.bits_per_byte or 0):
        figures: list[str] = []
        if of_text:
            values = (row.perplexity, row.bits_per_byte, row.bits_per_token, row.tokens_per_second)
            forms = (".4g", ".4f", ".4f", ".0f")
            figures = ["" if v is None else format(v, form) for v, form in zip(values, forms, strict=True)]
        found = {(score.task, score.metric): f"{score.value:.4f}" for score in row.tasks}
        lines.append((row.model, *figures, *(found.get(task, "") for task in tasks)))
    return _aligned(lines, 1)


def _aligned(lines: Sequence[tuple[str, ...]], names: int) -> str:
    """Columns, of which the first `names` hold words and the others numbers."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < names else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
