"""`quantize`: language models with weights in 8 or 4 bits, smaller and faster, and almost the same."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from zoo.errors import ConfigError, ZooError
from zoo.exporting.layout import check_built
from zoo.files import check_folder, checkpoint_places
from zoo.layers.decoder import Decoder
from zoo.layers.fast_decoder import FastDecoder, Quantization
from zoo.layers.folding import check_plain

__all__ = ["Quantization", "quantize", "quantize_checkpoint"]


@torch.no_grad()
def quantize(model: nn.Module, to: str = "int8", *, group_size: int = 32) -> FastDecoder:
    """A copy of a language model whose matrices are stored in 8 or 4 bits; vectors keep their precision.

    It has the interface of the model: it generates, evaluates, and is saved and opened by `zoo.save_pretrained` and
    `zoo.create_model`. It is made for CPUs, where products are of whole numbers (activations are rounded to 8 bits by
    groups of 32, as llama.cpp does); elsewhere, and without a C++ compiler, it computes the same with weights brought
    back to 32 bits, which saves memory, not time. It cannot be trained.

    Args:
        model: a language model as `create_model` makes it, with its weights.
        to: "int8", 8.5 bits a weight with the default groups, or "int4", 4.5 bits.
        group_size: elements of a row that share a scale, in float16: a multiple of 32. Hidden channels of SwiGLUs are
            filled up to whole groups with zeros, unless that would more than double them; other matrices whose rows
            are not whole groups keep their precision.

    Raises ConfigError for a model that is none of language, is fast or quantised already, has hooks, adapters,
    parametrizations or biases, or has no matrix that the groups fit.
    """
    quantization = Quantization(to, group_size)
    if not isinstance(model, Decoder):
        raise ConfigError(f"quantize takes a language model of the zoo, not {type(model).__name__}.")
    if isinstance(model, FastDecoder):
        form = "fast" if model.quantization is None else "quantised"
        raise ConfigError(f"The model is {form} already: give the one that it was made from.")
    check_plain(model, f"A model in {to}")
    check_built(model, f"A model in {to}")
    return FastDecoder(model, quantization)


def quantize_checkpoint(
    source: str,
    folder: str | Path,
    *,
    to: str = "int8",
    group_size: int = 32,
    text: str | Path | None = None,
    tokenizer: str | None = None,
    checkpoint: str | None = None,
    max_tokens: int | None = None,
    overwrite: bool = False,
) -> Quantization:
    """Write the model that `source` names (a name, a run, a folder, `hf-hub:owner/name`) to `folder`, quantised.

    With `text`, a file, folder or pattern of texts, the perplexity on it before and after is measured, and kept in
    `config.json`; no more documents are read after `max_tokens` tokens. The tokenizer is that of `source`, unless
    `tokenizer` names another; without `text` it may be missing. Raises ConfigError for a `folder` that holds `source`
    itself, whose weights cannot be had back from fewer bits, and what `quantize`, `create_tokenizer` and
    `save_pretrained` raise.
    """
    from zoo.data.text import iterate_texts
    from zoo.data.tokenizers import create_tokenizer
    from zoo.evaluation.language import perplexity
    from zoo.hub import save_pretrained
    from zoo.loading import load_model

    Quantization(to, group_size)
    out = Path(folder).expanduser().absolute()
    check_folder(out, overwrite)
    given = Path(source.removeprefix("local-dir:")).expanduser()
    if out.exists() and any(place.exists() and place.samefile(out) for place in (given, *checkpoint_places(given))):
        raise ConfigError(
            f"{str(folder)!r} holds the model that is quantised, which would be lost: choose another folder."
        )
    model = load_model(source, checkpoint).eval()
    reader = None
    try:
        reader = create_tokenizer(tokenizer or source)
    except ZooError:
        if tokenizer is not None or text is not None:
            raise
    quantized = quantize(model, to, group_size=group_size)
    if text is not None:
        assert reader is not None
        before, after = (
            perplexity(form, iterate_texts(text), reader, max_tokens=max_tokens, batch_size=1)
            for form in (model, quantized)
        )
        found = {"before": before.perplexity, "after": after.perplexity, "tokens": after.tokens}
        quantized.quantization = Quantization(to, group_size, perplexity={**found, "text": Path(text).name})
    save_pretrained(quantized, folder, tokenizer=reader, overwrite=overwrite)
    assert quantized.quantization is not None
    return quantized.quantization
