"""How well a language model predicts text: perplexity, bits per token and bits per byte."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.data.tokenizers import Tokenizer, check_fits
from zoo.errors import ConfigError, DataError, ZooError
from zoo.evaluation.image_classification import choose_device
from zoo.layers.token_loss import token_losses

__all__ = ["DocumentScore", "TextScores", "check_language_model", "perplexity", "windows"]

Amp = Literal["no", "bf16", "fp16"]
SEPARATOR = "\n\n"  # between texts that are judged as one: how WikiText is joined in published perplexities
CONTEXT = 2048  # unless another is asked for: that of most published perplexities
SORTED_TOGETHER = 64  # batches: windows of like length share one, so that little is padding


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
        return self.nats / math.log(2) / self.bytes


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
    per_document: bool = False,
    progress: Callable[[int, float], None] | None = None,
) -> TextScores:
    """Perplexity, bits per token and bits per byte of `model` on `texts`, every token predicted once.

    A document's first token is predicted from the tokenizer's bos; where it has none, from nothing, so that neither
    that token nor its bytes count. Long documents are read in windows.

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
    counts = _Counts([] if per_document else None)
    with evaluating(model, device, amp):
        started = time.perf_counter()
        given = counts.windows(_joined(texts, separator) if joined else texts, tokenizer, context, stride)
        for batch in batches(given, batch_size):
            counts.add(batch, window_losses(predict, batch))
            if progress is not None:
                progress(counts.tokens, counts.nats / counts.tokens)
        seconds = time.perf_counter() - started
    if not counts.documents:
        raise DataError("There is no text to evaluate: all of it is empty.")
    if not counts.tokens:
        raise DataError(
            "There is no token to predict: the text is one token long, and its tokenizer has no bos to predict it from."
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

    def __init__(self, each: list[list[float]] | None) -> None:
        self.documents = self.bytes = self.tokens = 0
        self.nats = 0.0
        self.each = each

    def windows(
        self, texts: Iterable[str | Sequence[int]], tokenizer: Tokenizer, context: int, stride: int
    ) -> Iterator[Window]:
        for text in texts:
            if isinstance(text, str):
                ids, size = tokenizer.encode(text, special=False), len(text.encode())
            else:
                ids = [int(number) for number in text]
                size = len(tokenizer.decode(ids).encode())
            if not ids:
                continue
            if tokenizer.bos_id is None:
                size -= min(size, len(tokenizer.decode(ids[:1]).encode()))
            elif ids[0] != tokenizer.bos_id:
                ids = [tokenizer.bos_id, *ids]
            tokens = np.array(ids, dtype=np.int64)
            number = self.documents
            self.documents += 1
            self.bytes += size
            if self.each is not None:
                self.each.append([max(0, len(tokens) - 1), size, 0.0])
            for begin, end, scored in windows(len(tokens) - 1, context, stride):
                yield Window(number, tokens[begin : end + 1], scored)

    def add(self, batch: Sequence[Window], losses: Sequence[Tensor]) -> None:
        for window, of_window in zip(batch, losses, strict=True):
            nats = of_window.sum().item()
            self.tokens += len(of_window)
            self.nats += nats
            if self.each is not None:
                self.each[window.document][2] += nats


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
        weight = getattr(self.model, "head_weight", None)
        if isinstance(weight, Tensor):
            losses = token_losses(self.model.forward_features(tokens)[places], weight, targets)
        else:
            output = self.model(tokens)
            logits = getattr(output, "logits", output)[places]
            losses = F.cross_entropy(logits.float(), targets, reduction="none")
        return losses.cpu().double()


def check_language_model(model: Any) -> None:
    """Raises ConfigError for what does not predict tokens."""
    if not isinstance(model, nn.Module) or not isinstance(
        getattr(getattr(model, "config", None), "vocab_size", None), int
    ):
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
