"""How fast language models read and write: the part of `benchmark` that is theirs."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.inference import optimize_for_inference
from zoo.profiling.measure import (
    BenchmarkResult,
    Settings,
    Subject,
    cannot_run,
    measured,
    peak_memory,
    setting_of,
)
from zoo.units import humanize

CONVENTION = (
    "Prefill: the prompt at once, with the logits of its last token. Decode: each token after it, one at a time, "
    "greedily; the median and the 10th to 90th percentile over all of them. The models take turns. Speed: tokens per "
    "second at decode relative to the first model. Peak memory: on CUDA what the allocator held at most for the model, "
    "keys and values and one step; on a CPU by how much the resident memory of a fresh process grew, from before the "
    "model was built to the end of a text."
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LanguageBenchmarkResult(BenchmarkResult):
    """One language model at one batch size. `latency_ms` is that of a token at decode, for all sequences together;
    `throughput` and `prefill_throughput` are tokens per second, of all sequences.
    """

    tokens: int  # of the prompt
    new_tokens: int
    prefill_ms: float  # median, of the whole prompt
    prefill_throughput: float
    quantize: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            key: value for key, value in dataclasses.asdict(self).items() if key not in ("input_size", "channels_last")
        }


@dataclasses.dataclass(slots=True)
class LanguageSubject(Subject):
    """A language model in a benchmark; its `input_size` is (tokens of the prompt, new ones)."""

    caches: dict[int, Any] = dataclasses.field(default_factory=dict)  # by batch size

    def images(self, batch_size: int) -> Tensor:
        """Prompts, (B, tokens)."""
        model: Any = self.model
        generator = torch.Generator().manual_seed(0)
        shape = (batch_size, self.input_size[0])
        return torch.randint(model.config.vocab_size, shape, generator=generator).to(self.settings.device)

    def step(self, images: Tensor) -> None:
        self.write(images)

    @torch.inference_mode()
    def write(self, prompts: Tensor) -> tuple[float, list[float]]:
        """Read prompts and continue them: seconds of reading, and of each token."""
        model: Any = self.model
        if len(prompts) not in self.caches:
            self.caches[len(prompts)] = model.make_cache(
                len(prompts), sum(self.input_size), static_shapes=self.settings.compile
            )
        cache = self.caches[len(prompts)]
        cache.reset()
        seconds = []
        tokens = prompts
        for place in range(self.input_size[1] + 1):
            self._wait()
            began = time.perf_counter()
            call = self.call if place else model  # what is compiled is the step that runs again and again
            tokens = call(tokens, cache=cache)[:, -1].argmax(-1, keepdim=True)
            self._wait()
            seconds.append(time.perf_counter() - began)
            if place and self.settings.compile:
                cache.length += 1
        return seconds[0], seconds[1:]

    def _wait(self) -> None:
        if self.settings.device.type != "cpu":
            getattr(torch, self.settings.device.type).synchronize()


def prepare_language(name: str, model: nn.Module, size: tuple[int, ...], settings: Settings) -> LanguageSubject:
    """`model`, ready to read and write. Raises ConfigError for more tokens than its context has."""
    decoder: Any = model
    if sum(size) > decoder.config.context_length:
        raise ConfigError(
            f"{size[0]} tokens and {size[1]} new ones are more than the context of {name}, "
            f"{decoder.config.context_length}."
        )
    if settings.quantize is not None:
        from zoo.quantization import quantize

        model = quantize(model, settings.quantize)
    elif settings.optimize:
        model = optimize_for_inference(model, inplace=True)
    step = torch.compile(model, dynamic=False) if settings.compile else model
    return LanguageSubject(name, model, step, size, settings)


def benchmark_language(
    subjects: Sequence[Subject], batch_size: int, warmup: int, repeats: int, memory: bool
) -> list[LanguageBenchmarkResult]:
    """A result for each of `subjects`, which are those of `prepare_language`. The order turns after each round."""
    language = [subject for subject in subjects if isinstance(subject, LanguageSubject)]
    prompts = []
    for subject in language:
        try:
            prompts.append(subject.images(batch_size))
            for _ in range(max(1, warmup)):
                subject.write(prompts[-1])
        except Exception as error:
            raise cannot_run(subject, batch_size, error) from error
    reading: list[list[float]] = [[] for _ in language]
    writing: list[list[float]] = [[] for _ in language]
    for round_number in range(repeats):
        turns = range(len(language)) if round_number % 2 == 0 else reversed(range(len(language)))
        for i in turns:
            prefill, steps = language[i].write(prompts[i])
            reading[i].append(prefill)
            writing[i] += steps
    return [
        LanguageBenchmarkResult(
            **measured(subject, batch_size, steps),
            repeats=repeats,
            warmup=warmup,
            peak_memory=peak_memory(subject, batch_size) if memory else None,
            tokens=subject.input_size[0],
            new_tokens=subject.input_size[1],
            prefill_ms=1000 * statistics.median(prefill),
            prefill_throughput=batch_size * subject.input_size[0] / statistics.median(prefill),
            quantize=subject.settings.quantize,
        )
        for subject, prefill, steps in zip(language, reading, writing, strict=True)
    ]


def language_table(results: Sequence[BenchmarkResult], width: int = 120) -> str:
    """The results as text, batch size by batch size, each with its speed relative to the first model's."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    rows = [result for result in results if isinstance(result, LanguageBenchmarkResult)]
    first: dict[int, LanguageBenchmarkResult] = {}
    for result in rows:
        first.setdefault(result.batch_size, result)
    table = Table("model", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("batch", "prefill tokens/s", "decode tokens/s", "ms/token", "p10 - p90", "speed", "peak memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in rows:
        table.add_row(
            result.name,
            str(result.batch_size),
            *(
                f"{rate:.1f}" if rate < 1000 else humanize(rate)
                for rate in (result.prefill_throughput, result.throughput)
            ),
            f"{result.latency_ms:.2f}",
            f"{result.latency_p10_ms:.2f} - {result.latency_p90_ms:.2f}",
            f"{result.throughput / first[result.batch_size].throughput:.2f}x",
            "-" if result.peak_memory is None else f"{result.peak_memory / 2**20:.1f} MiB",
        )
    one = rows[0]
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        setting = setting_of(one, *([one.quantize] if one.quantize else []))
        console.print(f"{setting}, {one.tokens} tokens and {one.new_tokens} new ones", highlight=False)
        console.print(table)
        console.print(CONVENTION, highlight=False)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
