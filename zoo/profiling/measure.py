"""`benchmark`: how fast models are and how much memory they take, measured side by side on the machine at hand."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from zoo.devices import DEVICES, device_name, find_device
from zoo.errors import ConfigError, ZooError, did_you_mean, first_line
from zoo.inference import optimize_for_inference
from zoo.layers.wrappers import to_channels_last
from zoo.loading import model_task
from zoo.profiling.resolve import build, check_count, check_input_size, default_input_size
from zoo.registry import get_entry
from zoo.units import humanize, shape_text

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODES = ("inference", "train")

CONVENTION = (
    "Latency: of one batch, the median and the 10th to 90th percentile of the repeats, the models taking turns. "
    "Speed: images per second relative to the first model. "
    "Peak memory: on CUDA what the allocator held at most for the model, its input and one step; on a CPU by how much "
    "the resident memory of a fresh process grew, from before the model was built to the height of one step."
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkResult:
    """One model at one batch size. Latencies are milliseconds per batch, throughput images per second."""

    name: str
    batch_size: int
    input_size: tuple[int, ...]
    mode: str
    latency_ms: float  # median
    latency_p10_ms: float
    latency_p90_ms: float
    throughput: float  # at the median latency
    peak_memory: int | None  # bytes; None where it was not or cannot be measured
    repeats: int
    warmup: int
    device: str
    dtype: str
    threads: int
    channels_last: bool
    compile: bool
    hardware: str
    torch_version: str
    optimize: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return dataclasses.asdict(self)

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=indent)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How every model of a benchmark is set up."""

    device: torch.device
    dtype: torch.dtype
    channels_last: bool
    compile: bool
    mode: str
    optimize: bool = False
    quantize: str | None = None  # language models: "int8", "int4"

    def prepare(self, name: str, input_size: tuple[int, ...] | None) -> Subject:
        """Build the model called `name`, ready to be stepped."""
        model: nn.Module = build(name).to(device=self.device, dtype=self.dtype).train(self.mode == "train")
        if hasattr(model, "make_cache"):
            from zoo.profiling.language_speed import prepare_language

            return prepare_language(name, model, input_size or (), self)
        size = default_input_size(model) if input_size is None else input_size
        if self.optimize:
            model = optimize_for_inference(model, inplace=True)
        if self.channels_last:
            to_channels_last(model)
        # a graph for each batch size: measured is the model, not a graph that serves all sizes
        step = torch.compile(model, dynamic=False) if self.compile else model
        return Subject(name, model, step, size, self)


@dataclasses.dataclass(slots=True)
class Subject:
    """A model in a benchmark."""

    name: str
    model: nn.Module
    call: Callable[..., Any]
    input_size: tuple[int, ...]
    settings: Settings

    def images(self, batch_size: int) -> Tensor:
        layout = torch.channels_last if self.settings.channels_last else torch.contiguous_format
        images = torch.randn(batch_size, *self.input_size, device=self.settings.device, dtype=self.settings.dtype)
        return images.contiguous(memory_format=layout)

    def step(self, images: Tensor) -> None:
        """A forward; in mode "train" a backward too, without an optimizer's step."""
        if self.settings.mode == "inference":
            with torch.inference_mode():
                self.call(images)
            return
        outputs = [leaf for leaf in tree_leaves(self.call(images)) if isinstance(leaf, Tensor)]
        torch.stack([output.float().mean() for output in outputs]).sum().backward()
        self.model.zero_grad(set_to_none=True)


def benchmark(
    names: str | Sequence[str],
    *,
    batch_sizes: int | Sequence[int] = (1,),
    input_size: tuple[int, int, int] | None = None,
    tokens: int | None = None,
    new_tokens: int | None = None,
    threads: int | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    channels_last: bool = False,
    compile: bool = False,
    optimize: bool = False,
    quantize: str | None = None,
    warmup: int | None = None,
    repeats: int | None = None,
    mode: Literal["inference", "train"] = "inference",
    memory: bool = True,
) -> list[BenchmarkResult]:
    """Measure latency, throughput and peak memory of models, which take turns so that a busy moment hits all alike.

    Language models read a prompt and continue it, greedily: see `zoo.profiling.LanguageBenchmarkResult`.

    Args:
        names: the zoo's models first, then timm's (`"timm/NAME"` is always timm's); all of images, or all of language.
            Weights are random.
        batch_sizes: images or prompts at a time, one or several.
        input_size: (channels, height, width); by default each model's own.
        tokens: of the prompt of a language model (128).
        new_tokens: that it adds (32).
        threads: of the CPU; torch's setting is restored afterwards.
        device: "cpu", "cuda", "cuda:1", "mps".
        dtype: "float32", "bfloat16", "float16"; model and images are converted.
        channels_last: lay out model and images as NHWC.
        compile: run the models through `torch.compile`.
        optimize: measure the models' fast forms, `optimize_for_inference`; in mode "inference" only.
        quantize: store the weights of language models in "int8" or "int4".
        warmup: untimed steps of each model before the timed ones (3; of language models, whose steps are texts, 1).
        repeats: timed steps of each model (20; of language models 5).
        mode: "inference" is a forward, "train" a forward and a backward.
        memory: measure peak memory; on a CPU that takes a fresh process for each model and batch size.

    Returns:
        A result for every batch size and name, in the order given.

    Raises:
        UnknownModelError: no model of that name; names the nearest.
        ConfigError: a setting that makes no sense, that this machine lacks, or that a model cannot run with.
    """
    names = [names] if isinstance(names, str) else names
    batch_sizes = [batch_sizes] if isinstance(batch_sizes, int) else batch_sizes
    for what, values in (("names", names), ("batch_sizes", batch_sizes)):
        if not isinstance(values, list | tuple) or not values:
            raise ConfigError(f"{what} must be one or a list of several, not {values!r}.")
    for batch_size in batch_sizes:
        check_count("batch_size", batch_size)
    has_language = any(map(_is_language, names))
    warmup = (1 if has_language else 3) if warmup is None else check_count("warmup", warmup, least=0)
    repeats = (5 if has_language else 20) if repeats is None else check_count("repeats", repeats)
    if threads is not None:
        check_count("threads", threads)
    if input_size is not None:
        input_size = check_input_size(input_size)
    size: tuple[int, ...] | None = input_size
    if has_language:
        if not all(map(_is_language, names)):
            raise ConfigError("Models of language and of images have no measure in common: benchmark them apart.")
        if input_size is not None or channels_last or mode == "train":
            raise ConfigError(
                "Language models take tokens= and new_tokens=, for inference: leave out input_size=, channels_last= "
                "and mode=."
            )
        size = (128 if tokens is None else tokens, 32 if new_tokens is None else new_tokens)
        check_count("tokens", size[0])
        check_count("new_tokens", size[1])
    elif (tokens, new_tokens, quantize) != (None, None, None):
        raise ConfigError("tokens=, new_tokens= and quantize= are for language models: leave them out.")
    settings = Settings(
        device=_device(device),
        dtype=_dtype(dtype),
        channels_last=bool(channels_last),
        compile=bool(compile),
        mode=_choice("mode", mode, MODES),
        optimize=bool(optimize),
        quantize=quantize,
    )
    if settings.optimize and settings.quantize:
        raise ConfigError("A quantised model is its fast form: leave out optimize=True.")
    if settings.optimize and settings.mode != "inference":
        raise ConfigError('optimize=True makes models for inference: leave it out with mode="train".')

    threads_before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        subjects = [settings.prepare(name, size) for name in names]
        results: list[BenchmarkResult] = []
        if has_language:
            from zoo.profiling.language_speed import benchmark_language

            for batch_size in batch_sizes:
                results += benchmark_language(subjects, batch_size, warmup, repeats, memory)
            return results
        for batch_size in batch_sizes:
            times = _take_turns(subjects, batch_size, warmup, repeats)
            for subject, seconds in zip(subjects, times, strict=True):
                peak = peak_memory(subject, batch_size) if memory else None
                results.append(_result(subject, batch_size, seconds, peak, warmup))
        return results
    finally:
        torch.set_num_threads(threads_before)


def _is_language(name: Any) -> bool:
    try:
        return isinstance(name, str) and model_task(name) == "language"
    except ZooError:
        return False


def _device(device: Any) -> torch.device:
    chosen = find_device(device)
    if chosen.type not in DEVICES:
        raise ConfigError(f"Cannot benchmark on {device!r}: choose one of {', '.join(DEVICES)}.")
    return chosen


def _dtype(dtype: Any) -> torch.dtype:
    return DTYPES[_choice("dtype", str(dtype).removeprefix("torch."), tuple(DTYPES))]


def _choice(what: str, value: Any, options: Sequence[str]) -> Any:
    if value not in options:
        near = did_you_mean(str(value), options)
        raise ConfigError(f"{what} is {value!r}, but must be one of {', '.join(options)}.{near}")
    return value


def _take_turns(subjects: Sequence[Subject], batch_size: int, warmup: int, repeats: int) -> list[list[float]]:
    """Seconds of every timed step of every model. The order is turned round after each round."""
    seconds: list[list[float]] = [[] for _ in subjects]
    inputs = []
    for subject in subjects:
        try:
            images = subject.images(batch_size)
            for _ in range(max(1, warmup)):
                subject.step(images)
        except Exception as error:
            raise cannot_run(subject, batch_size, error) from error
        inputs.append(images)
    for round_number in range(repeats):
        turns = range(len(subjects)) if round_number % 2 == 0 else reversed(range(len(subjects)))
        for i in turns:
            seconds[i].append(_time_step(subjects[i], inputs[i]))
    return seconds


def cannot_run(subject: Subject, batch_size: int, error: Exception) -> ZooError:
    if isinstance(error, ZooError):
        return error
    settings = subject.settings
    how = f"{settings.mode} on {settings.device} with batch size {batch_size}, input {subject.input_size}"
    reason = first_line(error)
    return ConfigError(f"{subject.name} cannot run {how}: {reason}")


def _time_step(subject: Subject, images: Tensor) -> float:
    """Seconds of one step: by CUDA's own clock where there is one."""
    if images.device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(images.device)
        torch.cuda.synchronize(images.device)
        start.record(stream)
        subject.step(images)
        end.record(stream)
        torch.cuda.synchronize(images.device)
        return start.elapsed_time(end) / 1000
    _synchronize(images.device)
    began = time.perf_counter()
    subject.step(images)
    _synchronize(images.device)
    return time.perf_counter() - began


def _synchronize(device: torch.device) -> None:
    if device.type == "mps":
        torch.mps.synchronize()


def _result(
    subject: Subject, batch_size: int, seconds: Sequence[float], peak_memory: int | None, warmup: int
) -> BenchmarkResult:
    return BenchmarkResult(
        **measured(subject, batch_size, seconds), repeats=len(seconds), warmup=warmup, peak_memory=peak_memory
    )


def measured(subject: Subject, batch_size: int, seconds: Sequence[float]) -> dict[str, Any]:
    """The fields of a result that come of timed steps, and of how they were set up."""
    settings = subject.settings
    milliseconds = torch.tensor(seconds, dtype=torch.float64) * 1000
    p10, p90 = milliseconds.quantile(torch.tensor([0.1, 0.9], dtype=torch.float64)).tolist()
    median = statistics.median(milliseconds.tolist())
    return {
        "name": subject.name,
        "batch_size": batch_size,
        "input_size": subject.input_size,
        "mode": settings.mode,
        "latency_ms": median,
        "latency_p10_ms": p10,
        "latency_p90_ms": p90,
        "throughput": 1000 * batch_size / median,
        "device": str(settings.device),
        "dtype": str(settings.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "channels_last": settings.channels_last,
        "compile": settings.compile,
        "optimize": settings.optimize,
        "hardware": device_name(settings.device),
        "torch_version": torch.__version__,
    }


# --------------------------------------------------------------------------------------------------------------- memory


def peak_memory(subject: Subject, batch_size: int) -> int | None:
    """Bytes that the model, its input and one step take at most; None where it cannot be told."""
    device = subject.settings.device
    if device.type == "cuda":
        return _peak_cuda_memory(subject, batch_size)
    return _peak_resident_memory(subject, batch_size) if device.type == "cpu" else None


def _peak_cuda_memory(subject: Subject, batch_size: int) -> int:
    device = subject.settings.device
    tensors = {id(t): t for t in (*subject.model.parameters(), *subject.model.buffers())}
    images = subject.images(batch_size)
    held = torch.cuda.memory_allocated(device)  # other models too: only what this one adds counts
    torch.cuda.reset_peak_memory_stats(device)
    subject.step(images)
    torch.cuda.synchronize(device)
    added = torch.cuda.max_memory_allocated(device) - held
    return added + sum(t.numel() * t.element_size() for t in (images, *tensors.values()))


def _peak_resident_memory(subject: Subject, batch_size: int) -> int | None:
    """Measured in a process of its own, which nothing else has left its traces in."""
    settings = subject.settings
    imports = _registering_module(subject.name)
    if imports == "__main__":  # a model that lives in this very script or notebook cannot be had elsewhere
        return None
    job = {
        "name": subject.name,
        "imports": imports,
        "batch_size": batch_size,
        "input_size": subject.input_size,
        "threads": torch.get_num_threads(),
        "dtype": str(settings.dtype).removeprefix("torch."),
        "channels_last": settings.channels_last,
        "compile": settings.compile,
        "optimize": settings.optimize,
        "quantize": settings.quantize,
        "mode": settings.mode,
    }
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "zoo.profiling.memory", json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ConfigError(
            f"The memory of {subject.name} could not be measured: {reason} Leave it out with memory=False."
        )
    return json.loads(done.stdout.splitlines()[-1])


def _registering_module(name: str) -> str | None:
    """The module that has to be imported before `name` is known; None for a name that every process knows."""
    try:
        module = get_entry(name).module
    except ZooError:
        return None
    return None if module.startswith("zoo.") else module


def measure_resident_memory(job: dict[str, Any]) -> int:
    """Bytes by which this process grows, from before the model of `job` is built to the height of one step."""
    settings = Settings(
        device=torch.device("cpu"),
        dtype=_dtype(job["dtype"]),
        channels_last=job["channels_last"],
        compile=job["compile"],
        mode=job["mode"],
        optimize=job.get("optimize", False),
        quantize=job.get("quantize"),
    )
    torch.set_num_threads(job["threads"])

    def ready() -> tuple[Subject, Tensor]:
        subject = settings.prepare(job["name"], tuple(job["input_size"]))
        images = subject.images(job["batch_size"])
        subject.step(images)  # kernels keep what they allocate at the first call
        return subject, images

    ready()  # and gone again: libraries that load on first use are no part of the model
    _return_free_memory()
    before = _resident_memory()
    subject, images = ready()
    _return_free_memory()
    _forget_peak()
    subject.step(images)
    return _peak_resident() - before


def _return_free_memory() -> None:
    """Collect garbage and, with glibc, hand back to the system what it keeps for later allocations."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _status(field: str) -> int | None:
    """A line of Linux's /proc/self/status, in bytes; None elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)


def _peak_of_process() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _resident_memory() -> int:
    return _status("VmRSS") or _peak_of_process()


def _peak_resident() -> int:
    return _status("VmHWM") or _peak_of_process()


def _forget_peak() -> None:
    """Let the peak start anew (Linux): building a model may take more than running it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


# ---------------------------------------------------------------------------------------------------------------- table


def benchmark_table(results: Sequence[BenchmarkResult], width: int = 120) -> str:
    """The results as text, batch size by batch size, each with its speed relative to the first model's."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    if not results:
        raise ConfigError("There are no results to show.")
    if len(results[0].input_size) == 2:
        from zoo.profiling.language_speed import language_table

        return language_table(results, width)
    first: dict[int, BenchmarkResult] = {}
    for result in results:
        first.setdefault(result.batch_size, result)
    table = Table("model", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("input", "batch", "latency ms", "p10 - p90", "images/s", "speed", "peak memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        memory = "-" if result.peak_memory is None else f"{result.peak_memory / 2**20:.1f} MiB"
        table.add_row(
            result.name,
            shape_text(result.input_size),
            str(result.batch_size),
            f"{result.latency_ms:.2f}",
            f"{result.latency_p10_ms:.2f} - {result.latency_p90_ms:.2f}",
            f"{result.throughput:.1f}" if result.throughput < 1000 else humanize(result.throughput),
            f"{result.throughput / first[result.batch_size].throughput:.2f}x",
            memory,
        )
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(setting_of(results[0]), highlight=False)
        console.print(table)
        console.print(CONVENTION, highlight=False)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def setting_of(one: BenchmarkResult, *more: str) -> str:
    """How it was measured, in a line; `more` options go behind those of every model."""
    options = [one.dtype, *(["channels_last"] if one.channels_last else []), *(["compiled"] if one.compile else [])]
    options += [*(["optimised"] if one.optimize else []), *more]
    threads = f"{one.threads} CPU thread{'s' if one.threads > 1 else ''}"
    where = f"{one.mode} on {one.device} ({one.hardware}), {', '.join(options)}"
    return f"{where}, {threads}, torch {one.torch_version}, {one.repeats} repeats"
