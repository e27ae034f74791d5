"""How well a language model predicts text: perplexity, bits per token and bits per byte."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from zoo.data import DamageReport
from zoo.data.packing import document_ends
from zoo.data.text import Damaged, FileTexts, TextDataConfig, find_texts, load_texts
from zoo.data.tokenizers import Tokenizer, check_fits, create_tokenizer
from zoo.devices import choose_device
from zoo.errors import ConfigError, DataError, ZooError
from zoo.evaluation.language_results import DocumentScore, LanguageResults, TaskScore, TextScores
from zoo.generation.prompts import weights_of
from zoo.layers.decoder import outline
from zoo.layers.token_loss import token_losses, tokens_at_once

__all__ = ["check_language_model", "evaluate_language", "perplexity", "predicts_tokens", "windows"]

Amp = Literal["no", "bf16", "fp16"]
SEPARATOR = "\n\n"  # between texts that are judged as one: how WikiText is joined in published perplexities
CONTEXT = 2048  # unless another is asked for: that of most published perplexities
SORTED_TOGETHER = 64  # batches: windows of like length share one, so that little is padding


@dataclasses.dataclass(slots=True)
class Window:
    """A part of a document that the model reads at once."""

    document: int  # its number
    tokens: np.ndarray  # one more than the model is given: the last is a target only
    scored: int  # of the last targets; those before them are context


def perplexity(
    model: nn.Module,
    texts: str | Iterable[str | Sequence[int]],
    tokenizer: Tokenizer,
    *,
    context: int | None = None,
    stride: int | None = None,
    joined: bool = False,
    separator: str = SEPARATOR,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    amp: Amp = "no",
    max_tokens: int | None = None,
    per_document: bool = False,
    progress: Callable[[int, float], None] | None = None,
) -> TextScores:
    """Perplexity, bits per token and bits per byte of `model` on `texts`, every token predicted once.

    A document's first token is predicted from bos, where the tokenizer's models know it before a text; else it is
    predicted from nothing, so that neither that token nor its bytes count. Long documents are read in windows.

    Args:
        model: a language model of the zoo in any form, or a causal one of transformers. It is evaluated in the
            precision of its weights, and stays in the mode it was in.
        texts: the documents; a string is one. Lists of token numbers are documents that are tokenised already.
        tokenizer: the model's (`zoo.create_tokenizer`).
        context: tokens that the model is given at once, at most; by default all that it takes, up to 2048.
        stride: tokens from the beginning of one window to that of the next; every prediction but those of the first
            window sees `context - stride` tokens or more. By default half the context. As much as the context: windows
            do not overlap, which is fastest and the convention of many papers.
        joined: make one document of all texts, with `separator` between them, as WikiText is judged.
        batch_size: windows at once.
        device: where to run; "auto" takes the accelerator there is; by default the model stays where it is.
        amp: mixed precision.
        max_tokens: read no more documents after so many tokens.
        per_document: keep what each document's tokens cost.
        progress: called after each batch with the tokens so far and their mean loss.

    Raises ConfigError for a model that is none of language, a tokenizer that does not fit it and windows that cannot
    be; DataError for texts without a token to predict.
    """
    predict = Predictor(model)
    check_fits(tokenizer, model)
    context = min(predict.context_length, CONTEXT) if context is None else context
    if type(context) is not int or not 1 <= context <= predict.context_length:
        raise ConfigError(f"context must be from 1 to {predict.context_length}, the model's own, not {context!r}.")
    stride = max(1, context // 2) if stride is None else stride
    if type(stride) is not int or not 1 <= stride <= context:
        raise ConfigError(f"stride must be from 1 to the context, {context}, not {stride!r}.")
    if type(batch_size) is not int or batch_size < 1:
        raise ConfigError(f"batch_size must be a whole number from 1 up, not {batch_size!r}.")
    texts = [texts] if isinstance(texts, str) else texts
    counts = _Counts([] if per_document else None, max_tokens)
    with evaluating(model, device, amp):
        started = time.perf_counter()
        known = _known(_joined(texts, separator) if joined else texts, predict.vocab_size)
        given = counts.windows(known, tokenizer, context, stride)
        for batch in batches(given, batch_size):
            counts.add(batch, window_losses(predict, batch))
            if progress is not None:
                progress(counts.tokens, counts.nats / counts.tokens)
        seconds = time.perf_counter() - started
    if not counts.documents:
        raise DataError("There is no text to evaluate: all of it is empty.")
    if not counts.tokens:
        raise DataError(
            "There is no token to predict: the text is one token long, and there is no bos to predict it from."
        )
    if not math.isfinite(counts.nats):
        raise ZooError(
            "The model gives no finite loss: its weights are damaged, or need more range than the precision has."
        )
    return TextScores(
        nats=counts.nats,
        tokens=counts.tokens,
        bytes=counts.bytes,
        documents=counts.documents,
        context=context,
        stride=stride,
        joined=joined,
        seconds=seconds,
        per_document=None
        if counts.each is None
        else [DocumentScore(tokens=int(tokens), bytes=int(size), nats=nats) for tokens, size, nats in counts.each],
    )


def evaluate_language(
    model: nn.Module,
    data: TextDataConfig | str | Iterable[str | Sequence[int]] | None = None,
    *,
    tokenizer: Tokenizer | str | Path | None = None,
    name: str | None = None,
    context: int | None = None,
    stride: int | None = None,
    joined: bool = False,
    per_document: bool = False,
    tasks: Sequence[str] = (),
    suite: str | None = None,
    include_path: str | Path | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
    bootstrap_iters: int = 100_000,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    amp: Amp = "no",
    progress: bool = False,
) -> LanguageResults:
    """How well `model` predicts the texts of `data`, and what it reaches on tasks.

    `data` is a `zoo.data.TextDataConfig`, of which the evaluation split is read (all of a file or folder that has
    none), or the texts themselves; None reads none. `tokenizer` is one, or what names one; by default it is the one
    that lies beside the model's weights. `tasks`, and those of a `suite`, are of lm-evaluation-harness. The other
    arguments are those of `zoo.evaluation.perplexity` and `zoo.evaluation.harness.evaluate_tasks`; `batch_size` is by
    default that of `data`, or 8. With `progress` a bar shows how far it is, where there is a terminal.

    Raises what those raise, and ConfigError where there is neither text nor task.
    """
    check_language_model(model)
    if data is None and not tasks and suite is None:
        raise ConfigError("There is nothing to evaluate on: give texts, tasks or a suite of tasks.")
    if isinstance(data, str) and os.path.exists(data):
        raise ConfigError(
            f"{data!r} is the name of a file, and a str is a text: pass zoo.data.TextDataConfig(path={data!r}), or the "
            "text in a list."
        )
    if data is not None and not isinstance(data, TextDataConfig | Iterable):
        raise ConfigError(f"A language model is evaluated on texts or a TextDataConfig, not on {type(data).__name__}.")
    if tokenizer is None:
        tokenizer = weights_of(model)
    if isinstance(tokenizer, str | Path):
        tokenizer = create_tokenizer(tokenizer)
    source = data if isinstance(data, TextDataConfig) else None
    if batch_size is None:
        batch_size = 8 if source is None else source.batch_size
    how: dict[str, Any] = {"batch_size": batch_size, "device": device, "amp": amp}
    scores: Sequence[TaskScore] = ()
    versions = {}
    if tasks or suite is not None:  # first: a name that does not exist is found at once
        from zoo.evaluation.harness import evaluate_tasks, suite_tasks, version

        scores = evaluate_tasks(
            model,
            [*tasks, *suite_tasks(suite)],
            tokenizer,
            include_path=include_path,
            limit=limit,
            num_fewshot=num_fewshot,
            chat=chat,
            bootstrap_iters=bootstrap_iters,
            **how,
        )
        versions = {"lm-eval": version}
    damage = DamageReport(source is not None and source.strict, "document")
    text = None
    if data is not None:
        with _bar(progress) as advance:
            text = perplexity(
                model,
                _texts(data, damage) if isinstance(data, TextDataConfig) else data,
                tokenizer,
                context=source.sequence_length if context is None and source else context,
                stride=stride,
                joined=joined,
                max_tokens=source.val_tokens if source else None,
                per_document=per_document,
                progress=advance,
                **how,
            )
    results = LanguageResults(
        model=name or _name(model),
        tokenizer=tokenizer.name,
        params=sum(parameter.numel() for parameter in outline(model).parameters()),
        weights=_precision(model),
        text=text,
        data="" if source is None else str(source.val_path or source.path or source.name),
        split=None if source is None else source.val_split,
        tasks=scores,
        suite=suite,
        limit=limit,
        skipped=tuple(damage.names),
        chat=chat,
        batch_size=batch_size,
        amp=amp,
        device=str(device_of(model)),
    )
    return dataclasses.replace(results, versions={**results.versions, **versions})


def _name(model: nn.Module) -> str:
    cfg = getattr(model, "pretrained_cfg", None)
    return cfg.get("architecture", type(model).__name__) if isinstance(cfg, Mapping) else type(model).__name__


def _precision(model: nn.Module) -> str:
    """The precision of the weights: a dtype, or what they are quantised to."""
    quantization: Any = getattr(model, "quantization", None)
    if quantization is not None:
        return str(quantization.to)
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _texts(data: TextDataConfig, damage: DamageReport) -> Iterator[str | list[int]]:
    """The documents of the evaluation split that can be read."""
    try:
        source = load_texts(data, training=False)
    except ConfigError:
        if data.name != "files" or not data.path or data.val_path or data.val_split:
            raise
        source = FileTexts(find_texts(data.path), data.column)  # a file or folder without splits is read whole
    is_damaged = True
    for document in source.documents():
        if isinstance(document, Damaged):
            damage.add([document.problem])
        elif isinstance(document, str) or not document or isinstance(document[0], int):
            is_damaged = False
            yield document  # type: ignore[misc]
        else:
            raise DataError(f"{source.name} holds chats: perplexity is of text. Name its column with data.column.")
    if is_damaged and damage.names:
        raise DataError(f"There is no text to evaluate: {next(iter(damage.names))}")


@contextlib.contextmanager
def _bar(shown: bool) -> Iterator[Callable[[int, float], None]]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.completed:,} tokens"), TimeElapsedColumn(), TextColumn("{task.fields[loss]}"))
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        row = bar.add_task("", total=None, loss="")

        def advance(tokens: int, loss: float) -> None:
            bar.update(row, completed=tokens, loss=f"{loss:.4f} nats per token")

        yield advance


def windows(count: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, how many of the last are predicted for the first time), over `count` places."""
    done = 0
    for begin in range(0, count, stride):
        end = min(begin + context, count)
        yield begin, end, end - done
        done = end
        if end == count:
            return


class _Counts:
    """What has been read and predicted so far; `each` holds [tokens, bytes, nats] of every document, or is None."""

    def __init__(self, each: list[list[float]] | None, max_tokens: int | None) -> None:
        self.documents = self.bytes = self.tokens = self.read = 0
        self.max_tokens = max_tokens
        self.nats = 0.0
        self.each = each

    def windows(
        self, texts: Iterable[str | Sequence[int]], tokenizer: Tokenizer, context: int, stride: int
    ) -> Iterator[Window]:
        before, _ = document_ends(tokenizer)
        for text in texts:
            if isinstance(text, str):
                ids, size = tokenizer.encode(text, special=False), len(text.encode())
            elif isinstance(text, list | tuple):
                ids = [int(number) for number in text]
                size = len(tokenizer.decode(ids).encode())
            else:
                raise DataError(f"A text is a string, or a list of token numbers, not {type(text).__name__}.")
            if not ids:
                continue
            if not before:
                size -= min(size, len(tokenizer.decode(ids[:1]).encode()))
            elif ids[:1] != before:
                ids = [*before, *ids]
            tokens = np.array(ids, dtype=np.int64)
            number = self.documents
            self.documents += 1
            self.read += len(tokens) - 1
            self.bytes += size
            if self.each is not None:
                self.each.append([max(0, len(tokens) - 1), size, 0.0])
            for begin, end, scored in windows(len(tokens) - 1, context, stride):
                yield Window(number, tokens[begin : end + 1], scored)
            if self.max_tokens is not None and self.read >= self.max_tokens:
                return

    def add(self, batch: Sequence[Window], losses: Sequence[Tensor]) -> None:
        for window, of_window in zip(batch, losses, strict=True):
            nats = of_window.sum().item()
            self.tokens += len(of_window)
            self.nats += nats
            if self.each is not None:
                self.each[window.document][2] += nats


def _known(texts: Iterable[str | Sequence[int]], vocab_size: int) -> Iterator[str | Sequence[int]]:
    """Raises DataError for numbers that are no tokens of the model's."""
    for text in texts:
        if isinstance(text, list | tuple):
            wrong = [token for token in text if not (isinstance(token, Integral) and 0 <= int(token) < vocab_size)]
            if wrong:
                raise DataError(f"The texts hold token {wrong[0]!r}, and the model's vocabulary has {vocab_size:,}.")
        yield text


def _joined(texts: Iterable[str | Sequence[int]], separator: str) -> Iterator[str]:
    texts = list(texts)
    if not all(isinstance(text, str) for text in texts):
        raise DataError("Only texts can be joined to one, and these are token numbers.")
    yield separator.join(texts)  # type: ignore[arg-type]


def batches(given: Iterator[Window], batch_size: int) -> Iterator[list[Window]]:
    """Windows of like length together, from as many as fill a few batches."""
    while part := list(itertools.islice(given, SORTED_TOGETHER * batch_size)):
        part.sort(key=lambda window: -len(window.tokens))
        yield from (part[i : i + batch_size] for i in range(0, len(part), batch_size))


def window_losses(predict: Predictor, batch: Sequence[Window]) -> Sequence[Tensor]:
    """-log p of the scored targets of each window, float64 on the CPU."""
    length = max(len(window.tokens) for window in batch) - 1
    tokens = np.zeros((len(batch), length), np.int64)  # padding stands behind, where nobody sees it
    places = np.zeros((len(batch), length), bool)
    for row, window in enumerate(batch):
        inputs = len(window.tokens) - 1
        tokens[row, :inputs] = window.tokens[:-1]
        places[row, inputs - window.scored : inputs] = True
    targets = np.concatenate([window.tokens[len(window.tokens) - window.scored :] for window in batch])
    given = (torch.from_numpy(array).to(predict.device) for array in (tokens, places, targets))
    return predict.losses(*given).split([window.scored for window in batch])


class Predictor:
    """One way to ask models of the zoo, in any form, and transformers' causal ones, for what comes next.

    Raises ConfigError for what is neither.
    """

    def __init__(self, model: nn.Module) -> None:
        check_language_model(model)
        self.model: Any = model
        config: Any = model.config
        self.vocab_size = int(config.vocab_size)
        length = getattr(config, "context_length", None) or getattr(config, "max_position_embeddings", None)
        if length is None:
            raise ConfigError(f"{type(model).__name__}.config does not say how long the model's context is.")
        self.context_length = int(length)

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    def losses(self, tokens: Tensor, places: Tensor, targets: Tensor) -> Tensor:
        """-log p of `targets` (N,), what follows each of the N true `places` (B, S) of `tokens` (B, S): (N,) float64.

        The answer lies on the CPU.
        """
        if not hasattr(self.model, "forward_head"):
            logits = self.model(tokens).logits[places]
            return F.cross_entropy(logits.float(), targets, reduction="none").cpu().double()
        features = self.model.forward_features(tokens)[places]
        quantised = getattr(self.model, "quantization", None) is not None
        if not quantised:
            return token_losses(features, self.model.head_weight, targets).cpu().double()
        # such a head rounds its inputs, too: it is asked itself, for a part of the logits at a time
        at_once = tokens_at_once(self.vocab_size)
        parts = zip(features.split(at_once), targets.split(at_once), strict=True)
        losses = [F.cross_entropy(self.model.forward_head(part).float(), t, reduction="none") for part, t in parts]
        return torch.cat(losses).cpu().double()


def predicts_tokens(model: Any) -> bool:
    """Whether it says how large its vocabulary is, as the zoo's and transformers' do."""
    config = getattr(model, "config", None)
    return isinstance(model, nn.Module) and isinstance(getattr(config, "vocab_size", None), int)


def check_language_model(model: Any) -> None:
    """Raises ConfigError for what does not predict tokens."""
    if not predicts_tokens(model):
        raise ConfigError(
            f"{type(model).__name__} is no language model: take one of zoo.list_models(task='language'), created by "
            "zoo.create_model, or one of transformers' for causal language modelling."
        )


def device_of(model: nn.Module) -> torch.device:
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


@contextlib.contextmanager
def evaluating(model: nn.Module, device: str | torch.device | None, amp: Amp = "no") -> Iterator[None]:
    """In evaluation mode, without gradients, on `device`; the model's mode is restored."""
    if amp not in get_args(Amp):
        raise ConfigError(f"amp must be one of {', '.join(get_args(Amp))}, not {amp!r}.")
    if device is not None:
        model.to(choose_device(model, device))
    device = device_of(model)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)
    autocast = torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast:
            yield
    except torch.OutOfMemoryError:
        raise ZooError(f"The memory of {device} does not suffice: lower batch_size.") from None
    finally:
        model.train(training)
