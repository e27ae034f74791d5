"""What the evaluation of a language model found: as text, JSON and CSV."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import zoo
from zoo.evaluation.results import write_csv
from zoo.files import make_folder, whole_file

__all__ = ["LANGUAGE_COLUMNS", "DocumentScore", "LanguageResults", "TaskScore", "TextScores"]

LANGUAGE_COLUMNS = (
    *("model", "data", "perplexity", "bits_per_byte", "bits_per_token", "loss", "tokens", "bytes", "documents"),
    *(
        "context",
        "stride",
        "joined",
        "tokenizer",
        "tokens_per_second",
        "param_count",
        "weights",
        "batch_size",
        "amp",
        "device",
    ),
    *("split", "zoo", "torch", "command"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentScore:
    """What one document's tokens cost: `nats` is the sum of -log p over its `tokens`, which are `bytes` of UTF-8."""

    tokens: int
    bytes: int
    nats: float

    @property
    def loss(self) -> float:
        return self.nats / self.tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextScores:
    """What the tokens of a text cost a model, each predicted once.

    `nats` is the sum of -log p over `tokens`, and `bytes` is the length of what they spell in UTF-8. Windows of up to
    `context` tokens begin every `stride` tokens; `joined` says whether all texts were one. `per_document` is None
    unless it was asked for. `seconds` are of tokenizer and model.
    """

    nats: float
    tokens: int
    bytes: int
    documents: int
    context: int
    stride: int
    joined: bool
    seconds: float
    per_document: Sequence[DocumentScore] | None = dataclasses.field(default=None, repr=False)

    @property
    def loss(self) -> float:
        """Mean of -log p of a token, in nats."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss): of so many equally likely tokens the model would choose as uncertainly."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_token(self) -> float:
        return self.loss / math.log(2)

    @property
    def bits_per_byte(self) -> float:
        """The one figure that models with different tokenizers have in common."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.inf


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One figure of one task of lm-evaluation-harness. `value` is as the harness gives it: accuracies are shares of 1.

    `stderr` is None where it was not computed.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int
    num_fewshot: int
    version: str
    higher_is_better: bool | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageResults:
    """What an evaluation of a language model found: on text, on tasks, or both.

    `text` is None where no text was read, and `tasks` empty where none was asked for. `suite` is the name under which
    they were. `data` and `tokenizer` name what was read and with which, `split` the one that was asked for, None for
    the data's own choice; `skipped` says which documents could not be read. `limit` is how many samples of each task
    were taken (below 1: what share), None for all; `chat` whether they were asked as conversations. `weights` is the
    precision of the weights, `params` their number.
    `command` is what made the results, with local paths cut to their last part, where that was `eval.py`; `versions`
    are of the zoo and of what it computes with.
    """

    model: str
    tokenizer: str
    params: int
    weights: str = "float32"
    text: TextScores | None = None
    data: str = ""
    split: str | None = None
    tasks: Sequence[TaskScore] = ()
    suite: str | None = None
    limit: float | None = None
    skipped: Sequence[str] = ()
    chat: bool = False
    batch_size: int
    amp: str = "no"
    device: str = "cpu"
    command: str | None = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=lambda: _versions())

    @property
    def loss(self) -> float | None:
        """Mean of -log p of a token, in nats."""
        return None if self.text is None else self.text.loss

    @property
    def perplexity(self) -> float | None:
        return None if self.text is None else _finite(self.text.perplexity)

    @property
    def bits_per_byte(self) -> float | None:
        return None if self.text is None else _finite(self.text.bits_per_byte)

    @property
    def bits_per_token(self) -> float | None:
        return None if self.text is None else self.text.bits_per_token

    @property
    def tokens_per_second(self) -> float | None:
        return None if self.text is None else self.text.tokens / self.text.seconds

    @property
    def mean_accuracy(self) -> float | None:
        """Mean of `acc` over the tasks, as a share of 1; None unless there are several and each has one."""
        found = {score.task: score.value for score in self.tasks if score.metric == "acc"}
        names = {score.task for score in self.tasks}
        return sum(found.values()) / len(found) if len(found) == len(names) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: figures of the text by name (None without one), tasks as a list."""
        plain: dict[str, Any] = {
            "model": self.model,
            "task": "language",
            "data": self.data,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "bits_per_token": self.bits_per_token,
            "loss": self.loss,
        }
        for name in ("tokens", "bytes", "documents", "context", "stride", "joined"):
            plain[name] = None if self.text is None else getattr(self.text, name)
        return plain | {
            "tokenizer": self.tokenizer,
            "tokens_per_second": self.tokens_per_second,
            "suite": self.suite,
            "tasks": [dataclasses.asdict(score) for score in self.tasks],
            "mean_accuracy": self.mean_accuracy,
            "limit": self.limit,
            "skipped": list(self.skipped),
            "chat": self.chat,
            "params": self.params,
            "weights": self.weights,
            "batch_size": self.batch_size,
            "amp": self.amp,
            "device": self.device,
            "split": self.split,
            "command": self.command,
            "versions": dict(self.versions),
        }

    def to_row(self) -> dict[str, Any]:
        """One row of a table, under LANGUAGE_COLUMNS."""
        found = self.to_dict()
        rounded = {
            name: None if found[name] is None else round(found[name], 6)
            for name in ("perplexity", "bits_per_byte", "bits_per_token", "loss")
        }
        speed = None if self.tokens_per_second is None else round(self.tokens_per_second, 1)
        versions = {"zoo": self.versions["backbone-zoo"], "torch": self.versions["torch"]}
        found |= rounded | versions | {"tokens_per_second": speed, "param_count": round(self.params / 1e6, 2)}
        return {name: found[name] for name in LANGUAGE_COLUMNS}

    def task_rows(self) -> list[dict[str, Any]]:
        """For each figure of each task one row, the model before it."""
        return [{"model": self.model, **dataclasses.asdict(score)} for score in self.tasks]

    def save(self, folder: str | Path) -> Path:
        """Write all that was found into `folder`, each file whole or not at all.

        `results.json`; of a text `results.csv`, one row, and, where they were kept, `documents.csv`; of tasks
        `tasks.csv`. Raises ConfigError for a folder that cannot be written to.
        """
        folder = make_folder(folder)
        with whole_file(folder / "results.json") as file:
            file.write((json.dumps(self.to_dict(), indent=1) + "\n").encode())
        if self.text is not None:
            write_csv(folder / "results.csv", [self.to_row()])
        if self.text is not None and self.text.per_document is not None:
            rows = [
                {"document": number, "tokens": each.tokens, "bytes": each.bytes, "nats": round(each.nats, 6)}
                for number, each in enumerate(self.text.per_document)
            ]
            write_csv(folder / "documents.csv", rows)
        if self.tasks:
            write_csv(folder / "tasks.csv", self.task_rows())
        return folder

    @property
    def summary(self) -> str:
        """The figures of the text, in one line, or of the tasks."""
        if self.text is not None:
            return (
                f"{self.model}: perplexity {self.text.perplexity:.4g}, {self.text.bits_per_byte:.4f} bits per byte, "
                f"{self.text.bits_per_token:.4f} per token on {self.text.tokens:,} tokens of {self.tokenizer}, "
                f"{self.text.bytes:,} bytes ({self.tokens_per_second:.0f} tokens/s on {self.device})"
            )
        mean = self.mean_accuracy
        names = dict.fromkeys(score.task for score in self.tasks)
        what = self.suite or (next(iter(names)) if len(names) == 1 else f"{len(names)} tasks")
        return f"{self.model}: {what}" + ("" if mean is None else f", mean accuracy {100 * mean:.2f}%")

    def __str__(self) -> str:
        lines = [self.summary]
        if self.text is not None and self.tasks:
            lines.append("")
        width = max((len(score.task) for score in self.tasks), default=0)
        column = max((len(score.metric) for score in self.tasks), default=0)
        for score in self.tasks:
            stderr = "" if score.stderr is None else f" +- {score.stderr:.4f}"
            shots = f"{score.num_fewshot}-shot" if score.num_fewshot else "zero-shot"
            lines.append(
                f"  {score.task:<{width}}  {score.metric:<{column}}  {score.value:.4f}{stderr}  "
                f"({shots}, {score.samples} samples)"
            )
        return "\n".join(lines)


def _finite(value: float) -> float | None:
    return None if math.isinf(value) else value


def _versions() -> dict[str, str]:
    return {"backbone-zoo": zoo.__version__, "torch": str(torch.__version__)}
