"""`zoo.generate`: prompts in, what the model adds to them out, at once or as it comes."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from zoo.data.tokenizers import DecodeStream, Tokenizer, check_fits, create_tokenizer
from zoo.errors import ConfigError, did_you_mean
from zoo.generation.decoding import Decoding, check_prompts
from zoo.generation.sampling import Sampling

__all__ = ["Engine", "Generation", "Piece", "Steps", "generate", "prepare", "weights_of"]

Engine = Literal["torch", "llama.cpp"]
MAX_NEW_TOKENS = 256  # where nobody says, as far as the context has room


class Steps(Protocol):
    """What carries sequences on: `Decoding`, or an engine that does the same."""

    count: int  # tokens made of each sequence

    @property
    def is_over(self) -> bool: ...

    def step(self) -> list[int | None]:
        """The next token of each sequence, None for those that have ended."""

    def finish(self, row: int) -> None:
        """Want no more tokens of a sequence."""


class Piece(NamedTuple):
    """Something new of a sequence: a token, or text that is certain by now."""

    row: int
    token: int | None = None
    text: str = ""


def generate(
    model: Any,
    prompts: Any,
    *,
    tokenizer: Tokenizer | str | Path | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: str | Iterable[str] = (),
    seed: int | None = None,
    stream: bool = False,
    engine: Engine = "torch",
    compile: bool = False,
) -> Any:
    """What a language model adds to prompts: the new text, or the new tokens, alone.

    The answer is as the prompts are: a str for a str, a list for a list of them; token numbers for token numbers, as a
    list, a list of lists, or a tensor of (S,) or (B, S), whose shorter rows are filled up with the padding token (else
    that which ends texts, else 0). Text begins with the token that begins texts where the tokenizer adds one, and an
    empty text is just that token; token numbers are taken as they are.

    Args:
        model: a decoder in any form, the name of a model (with its published weights), a run or a folder.
        prompts: one or several; several run as one batch, and of any lengths.
        tokenizer: a tokenizer or what `zoo.create_tokenizer` takes; by default that of the model's weights.
        max_new_tokens: of each prompt; by default 256, or as many as the context has room for.
        temperature, top_k, top_p, min_p, repetition_penalty, seed: as in `zoo.generation.Sampling`. By default the most
            likely token is taken.
        stop: texts that end the answer, which ends before them. Of token numbers, those that made up the text stay.
        stream: return an iterator of pieces of text (of tokens) as they come; for several prompts of (index, piece).
        engine: "torch", or "llama.cpp", which runs the model exported to GGUF (extra `llama-cpp`).
        compile: run steps through `torch.compile` with memory of a fixed shape.

    A sequence ends with one of the tokenizer's `eos_ids`, which is the last of its tokens and no part of its text.

    Raises ConfigError for arguments that cannot be, prompts that do not fit the context or the vocabulary, and text
    where there is no tokenizer; and what creating a model and a tokenizer raises.
    """
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    rows, is_one, is_text = _as_rows(prompts)
    run = prepare(
        model,
        rows,
        tokenizer=tokenizer,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
        engine=engine,
        compile=compile,
    )
    if stream:
        return _pieces(run, is_one, is_text)
    for _ in run:
        pass
    answers: list[Any] = run.texts if is_text else run.tokens
    if isinstance(prompts, Tensor):
        fill = 0 if run.tokenizer is None else run.tokenizer.pad_id
        fill = run.tokenizer.eos_id if fill is None and run.tokenizer is not None else fill
        longest = max(map(len, run.tokens))
        padded = [row + [fill or 0] * (longest - len(row)) for row in run.tokens]
        dtype = prompts.dtype if prompts.dtype.itemsize >= 4 else torch.int64  # that holds any token
        answers = list(torch.tensor(padded, dtype=dtype, device=prompts.device))
        return answers[0] if is_one else torch.stack(answers)
    return answers[0] if is_one else answers


def _pieces(run: Generation, is_one: bool, is_text: bool) -> Iterator[Any]:
    for piece in run:
        new = piece.text if is_text else piece.token
        if new not in ("", None):
            yield new if is_one else (piece.row, new)


def _as_rows(prompts: Any) -> tuple[list[str] | list[list[int]], bool, bool]:
    """The prompts as a list, whether they are one that stands alone, and whether they are text."""
    if isinstance(prompts, np.ndarray):
        prompts = prompts.tolist()
    if isinstance(prompts, str):
        return [prompts], True, True
    if isinstance(prompts, Tensor):
        if prompts.ndim not in (1, 2) or prompts.is_floating_point():
            kind = str(prompts.dtype).removeprefix("torch.")
            raise ConfigError(
                f"Prompts are whole numbers of shape (S,) or (B, S), not {kind} {tuple(prompts.shape)}: token numbers."
            )
        rows = prompts.tolist()
        return ([rows], True, False) if prompts.ndim == 1 else (rows, False, False)
    if isinstance(prompts, Sequence) and not isinstance(prompts, bytes) and len(prompts):
        if all(isinstance(prompt, str) for prompt in prompts):
            return list(prompts), False, True
        if all(_is_whole(prompt) for prompt in prompts):
            return [[int(token) for token in prompts]], True, False
        if all(isinstance(prompt, Sequence) and not isinstance(prompt, str) for prompt in prompts):
            rows = [[int(token) if _is_whole(token) else token for token in prompt] for prompt in prompts]
            return rows, False, False
    what = "nothing" if isinstance(prompts, Sequence) and not len(prompts) else f"{type(prompts).__name__}"
    raise ConfigError(f"Prompts are a str, token numbers, a list of either, or a tensor: not {what}, nor a mixture.")


def _is_whole(token: object) -> bool:
    return isinstance(token, int | np.integer) and not isinstance(token, bool)


def prepare(
    model: Any,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    tokenizer: Tokenizer | str | Path | None = None,
    max_new_tokens: int | None = None,
    sampling: Sampling | None = None,
    stop: str | Iterable[str] = (),
    engine: Engine = "torch",
    compile: bool = False,
) -> Generation:
    """A generation that is ready to run: `generate` step by step, with its counts. Arguments and errors are its."""
    if engine not in get_args(Engine):
        raise ConfigError(
            f"There is no engine {engine!r}: it is {' or '.join(get_args(Engine))}."
            f"{did_you_mean(str(engine), get_args(Engine))}"
        )
    stops = (stop,) if isinstance(stop, str) or not isinstance(stop, Iterable) else tuple(stop)
    if not all(isinstance(text, str) and text for text in stops):
        raise ConfigError(f"stop is a text or several, none of them empty: not {stop!r}.")
    is_text = any(isinstance(prompt, str) for prompt in prompts)
    model, reader = _with_tokenizer(model, tokenizer, needed=is_text or bool(stops))
    if reader is not None:
        check_fits(reader, model)
    rows = [_as_tokens(prompt, reader) for prompt in prompts]
    check_prompts(rows, model.config.vocab_size)
    if max_new_tokens is None:
        max_new_tokens = max(1, min(MAX_NEW_TOKENS, model.config.context_length - max(map(len, rows))))
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be a whole number from 1 up, not {max_new_tokens!r}.")
    ends = () if reader is None else reader.eos_ids
    sampling = sampling or Sampling()
    steps: Steps
    if engine == "llama.cpp":
        if compile:
            raise ConfigError("compile=True compiles steps of torch: leave it out with engine='llama.cpp'.")
        from zoo.generation.llama_cpp import LlamaCppDecoding

        steps = LlamaCppDecoding(model, rows, max_new_tokens, sampling, ends, tokenizer=reader)
    else:
        steps = Decoding(model, rows, max_new_tokens, sampling, ends, compile)
    return Generation(steps, rows, reader, ends, stops)


def _with_tokenizer(model: Any, tokenizer: Tokenizer | str | Path | None, needed: bool) -> tuple[Any, Tokenizer | None]:
    """The decoder, and the tokenizer where one is given, or is needed and can be found."""
    name = None
    if isinstance(model, str | os.PathLike):
        from zoo.loading import load_model

        name = os.fspath(model)
        model = load_model(name)
    if not hasattr(model, "make_cache") or not hasattr(model, "config"):
        cfg = getattr(model, "pretrained_cfg", None) or {}
        raise ConfigError(f"{cfg.get('architecture') or type(model).__name__} is not a language model.")
    if isinstance(tokenizer, Tokenizer):
        return model, tokenizer
    if tokenizer is not None:
        return model, create_tokenizer(tokenizer)
    return model, create_tokenizer(name or weights_of(model)) if needed else None


def weights_of(model: Any) -> str:
    """What names the weights of a model, and so its tokenizer."""
    report = getattr(model, "load_report", None)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    if report is None:
        raise ConfigError(
            "The model came without a tokenizer: say with tokenizer= which, such as 'bytes', a folder, or the name of "
            "a published model."
        )
    return f"{cfg['architecture']}.{cfg['tag']}" if cfg.get("tag") else report.source


def _as_tokens(prompt: str | Sequence[int], tokenizer: Tokenizer | None) -> list[int]:
    if not isinstance(prompt, str):
        ids = list(prompt)
    else:
        assert tokenizer is not None
        ids = tokenizer.encode(prompt, bos=tokenizer.adds_bos)
    if not ids:
        if tokenizer is None or tokenizer.bos_id is None:
            raise ConfigError("A prompt is empty, and no token is known to begin a text: give it a word at least.")
        return [tokenizer.bos_id]
    return ids


class Generation:
    """Sequences as they grow: iterate over it for the pieces, and look at what there is at any time.

    Attributes:
        tokenizer: that made text of tokens, or None.
        tokens: the new tokens of each sequence, the one that ended it among them.
        texts: the new text of each; empty without a tokenizer.
        ended: why each ended: "eos", "stop" (one of the texts), "length", or None as long as it goes on.
        prompt_tokens: how many the prompts have together.
        prompt_seconds: that the first tokens took, prompts and all.
        step_seconds: that all further ones took.
    """

    def __init__(
        self,
        steps: Steps,
        prompts: Sequence[Sequence[int]],
        tokenizer: Tokenizer | None = None,
        eos_ids: Collection[int] = (),
        stop: Sequence[str] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.texts = [""] * len(prompts)
        self.ended: list[str | None] = [None] * len(prompts)
        self.prompt_tokens = sum(map(len, prompts))
        self.prompt_seconds = self.step_seconds = 0.0
        self._steps, self._eos_ids = steps, frozenset(eos_ids)
        self._readers = [None if tokenizer is None else _Reader(tokenizer.stream(prompt), stop) for prompt in prompts]

    @property
    def new_tokens(self) -> int:
        """How many there are by now, of all sequences together."""
        return sum(map(len, self.tokens))

    @property
    def tokens_per_second(self) -> float | None:
        """New tokens a second, all sequences together, the prompts and the tokens right behind them left out."""
        count = self.new_tokens - len(self.tokens)
        return count / self.step_seconds if count > 0 and self.step_seconds else None

    def __iter__(self) -> Iterator[Piece]:
        while not self._steps.is_over:
            start = time.perf_counter()
            found = self._steps.step()
            seconds = time.perf_counter() - start
            if self._steps.count == 1:
                self.prompt_seconds += seconds
            else:
                self.step_seconds += seconds
            for row, token in enumerate(found):
                if token is not None:
                    yield self._take(row, token)

    def _take(self, row: int, token: int) -> Piece:
        self.tokens[row].append(token)
        reader = self._readers[row]
        ended = "eos" if token in self._eos_ids else None
        text = "" if reader is None or ended else reader.push([token])
        if reader is not None and reader.is_stopped:
            ended = "stop"
            self._steps.finish(row)
        elif ended is None and self._steps.is_over:
            ended = "length"
        if ended is not None:
            if reader is not None:
                text += reader.flush()
            self.ended[row] = ended
        self.texts[row] += text
        return Piece(row, token, text)


class _Reader:
    """The text of one sequence, up to the first of some texts that stop it."""

    def __init__(self, stream: DecodeStream, stop: Sequence[str]) -> None:
        self.is_stopped = False
        self._stream, self._stop = stream, stop
        self._held = ""  # what may be the beginning of such a text

    def push(self, ids: list[int]) -> str:
        self._held += self._stream.push(ids)
        return self._release(is_end=False)

    def flush(self) -> str:
        if not self.is_stopped:
            self._held += self._stream.flush()
        return self._release(is_end=True)

    def _release(self, is_end: bool) -> str:
        text = self._held
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)]
        kept = 0 if is_end else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
