"""Decoding by llama.cpp: the model is written as GGUF once, in its own dtype, and each step is one call of the library.

Choosing tokens is ours (`zoo.generation.sampling`), so that every option means what it means with torch.
"""

from __future__ import annotations

import ctypes
import dataclasses
import tempfile
import weakref
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.data.tokenizers import Tokenizer
from zoo.errors import ConfigError, MissingDependencyError
from zoo.generation.sampling import Sampling

__all__ = ["LlamaCppDecoding", "LlamaCppModel"]

DTYPES = {torch.float32: "f32", torch.float64: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def import_llama_cpp() -> Any:
    try:
        import llama_cpp
    except ImportError as error:
        raise MissingDependencyError(
            'engine="llama.cpp" needs llama-cpp-python: pip install "backbone-zoo[llama-cpp]".'
        ) from error
    return llama_cpp


class LlamaCppModel:
    """A GGUF file as llama.cpp has it in memory. Raises ConfigError for a file that it does not take."""

    def __init__(self, path: str | Path) -> None:
        llama = import_llama_cpp()
        be_quiet(llama)
        llama.llama_backend_init()
        if not Path(path).is_file():
            raise ConfigError(f"There is no GGUF file {str(path)!r}.")
        self.model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
        if not self.model:
            raise ConfigError(f"llama.cpp cannot read {str(path)!r}: is it a whole GGUF file that this version knows?")
        self._close = weakref.finalize(self, llama.llama_model_free, self.model)
        self.vocab_size = int(llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model)))
        self.is_float32 = 4 * llama.llama_model_n_params(self.model) <= llama.llama_model_size(self.model)
        self.context_length = int(llama.llama_model_n_ctx_train(self.model))

    @classmethod
    def of(cls, model: nn.Module, dtype: str | None = None) -> LlamaCppModel:
        """`model`, written as GGUF in a temporary folder in `dtype` (default: its own), and kept as long as it lives.

        Raises ConfigError for a model that llama.cpp does not compute.
        """
        from zoo.exporting.gguf import write_gguf

        dtype = dtype or DTYPES[next(model.parameters()).dtype]
        state = dtype, *((tensor.data_ptr(), _version(tensor)) for tensor in model.parameters())
        known = _opened.get(model)
        if known is None or known[0] != state:
            import_llama_cpp()
            with tempfile.TemporaryDirectory(prefix="backbone-zoo-") as folder:  # the library has the file mapped
                known = _opened[model] = state, cls(write_gguf(model, Path(folder) / "model.gguf", dtype=dtype))
        return known[1]


_opened: weakref.WeakKeyDictionary[nn.Module, tuple[Any, LlamaCppModel]] = weakref.WeakKeyDictionary()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


@dataclasses.dataclass
class _Log:
    callback: Any = None


_log = _Log()


def be_quiet(llama: Any) -> None:
    """llama.cpp tells all that it does on stderr; what goes wrong comes back as an error."""
    if _log.callback is None:
        _log.callback = llama.llama_log_callback(lambda level, text, data: None)
        llama.llama_log_set(_log.callback, ctypes.c_void_p(0))


class LlamaCppDecoding:
    """`zoo.generation.decoding.Decoding`, run by llama.cpp.

    `model` is a decoder as `create_model` makes it, or a `LlamaCppModel`. Raises ConfigError for what llama.cpp does
    not compute, and MissingDependencyError without it.
    """

    def __init__(
        self,
        model: nn.Module | LlamaCppModel,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        eos_ids: Collection[int] = (),
        *,
        tokenizer: Tokenizer | None = None,
        threads: int | None = None,
    ) -> None:
        llama = self._llama = import_llama_cpp()
        self._model = model if isinstance(model, LlamaCppModel) else LlamaCppModel.of(model)
        longest = max(map(len, prompts))
        if longest + max_new_tokens > self._model.context_length:
            raise ConfigError(
                f"A prompt of {longest} tokens and {max_new_tokens} new ones are more than the model's context, "
                f"{self._model.context_length}: ask for fewer new tokens, or give it less text."
            )
        self.sampling = sampling or Sampling()
        self.max_new_tokens, self.eos_ids = max_new_tokens, frozenset(eos_ids)
        self.count = 0
        self.is_finished = [False] * len(prompts)
        self._prompts = [list(prompt) for prompt in prompts]
        self._lengths = [0] * len(prompts)
        self._generator = self.sampling.generator(torch.device("cpu"))
        self._next: list[tuple[int, int]] = []
        self._seen: Tensor | None = None
        if self.sampling.repetition_penalty != 1:
            self._seen = torch.zeros(len(prompts), self._model.vocab_size, dtype=torch.bool, device="cpu")
            for row, prompt in enumerate(self._prompts):
                self._seen[row, torch.tensor(prompt, device="cpu")] = True
        options = llama.llama_context_default_params()
        options.n_ctx = sum(map(len, prompts)) + len(prompts) * max_new_tokens
        options.n_batch = options.n_ubatch = min(512, options.n_ctx)
        options.n_seq_max = len(prompts)
        options.kv_unified = True
        if self._model.is_float32:  # by default it keeps and adds up keys and values in float16
            options.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
            options.type_k = options.type_v = llama.GGML_TYPE_F32
        options.n_threads = options.n_threads_batch = threads or torch.get_num_threads()
        self._context = llama.llama_init_from_model(self._model.model, options)
        if not self._context:
            raise ConfigError(f"llama.cpp has no memory for {options.n_ctx} tokens of this model.")
        self._batch = llama.llama_batch_init(options.n_batch, 0, 1)
        self._room = int(options.n_batch)
        self._close = weakref.finalize(self, _free, llama, self._context, self._batch)
        self.logits = torch.empty(len(prompts), self._model.vocab_size, dtype=torch.float32, device="cpu")

    @property
    def is_over(self) -> bool:
        return self.count == self.max_new_tokens or all(self.is_finished)

    def finish(self, row: int) -> None:
        """Want no more tokens of a sequence."""
        self.is_finished[row] = True

    def step(self) -> list[int | None]:
        """The next token of each sequence, None for those that have ended; a token of `eos_ids` ends one."""
        if self.count == 0:
            for row, prompt in enumerate(self._prompts):
                for start in range(0, len(prompt), self._room):
                    part = prompt[start : start + self._room]
                    self._decode([(row, token) for token in part], is_last=start + len(part) == len(prompt))
        else:
            for start in range(0, len(self._next), self._room):
                self._decode(self._next[start : start + self._room], is_last=True)
        chosen = self.sampling.choose(self.sampling.scores(self.logits, self._seen), self._generator)
        if self._seen is not None:
            self._seen.scatter_(1, chosen[:, None], True)
        self.count += 1
        found: list[int | None] = []
        for row, token in enumerate(chosen.tolist()):
            found.append(None if self.is_finished[row] else token)
            if token in self.eos_ids:
                self.is_finished[row] = True
        self._next = [(row, token) for row, token in enumerate(chosen.tolist()) if not self.is_finished[row]]
        return found

    def _decode(self, tokens: Sequence[tuple[int, int]], is_last: bool) -> None:
        """Add (row, token) to the sequences, and take the logits after the last of each row where `is_last`."""
        batch, llama = self._batch, self._llama
        last = {row: place for place, (row, _) in enumerate(tokens)} if is_last else {}
        batch.n_tokens = len(tokens)
        for place, (row, token) in enumerate(tokens):
            batch.token[place] = token
            batch.pos[place] = self._lengths[row]
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = row
            batch.logits[place] = last.get(row) == place
            self._lengths[row] += 1
        status = llama.llama_decode(self._context, batch)
        if status:
            raise ConfigError(f"llama.cpp could not compute this step (its status is {status}).")
        for row, place in last.items():
            found = llama.llama_get_logits_ith(self._context, place)
            ctypes.memmove(self.logits[row].data_ptr(), found, 4 * self._model.vocab_size)


def _free(llama: Any, context: Any, batch: Any) -> None:
    llama.llama_batch_free(batch)
    llama.llama_free(context)
