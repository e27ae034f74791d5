"""GGUF files, which llama.cpp runs: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

A decoder is written as the architecture of llama.cpp whose graph is the same function:

- `llama`, for grouped-query attention without norms of queries and keys (MobileLLM, SmolLM);
- `qwen3`, for grouped-query attention with them (MobileLLM-R1), whose norms then have weights of one: that they stand
  before the rotation, and not after it, changes nothing, as a rotation keeps the mean square. llama.cpp's `llama4`
  is not the function: without windows it leaves the rotation of the last layer out, and it takes no dense model;
- `deepseek2`, for latent attention (Youtu-LLM).

There is none for windows of attention in such layers (MobileLLM-Pro). Shared layers are written once for each time
that they run.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.errors import ConfigError, MissingDependencyError, did_you_mean
from zoo.exporting.layout import check_built, decoder_of, evened, sees_windows
from zoo.files import whole_file
from zoo.layers.decoder import Decoder, DecoderConfig, reorder_rotary
from zoo.layers.folding import check_plain

__all__ = ["GGUF_DTYPES", "gguf_architecture", "rounded", "write_gguf"]

# of the matrices, vectors are always f32; and how the format calls the file
GGUF_DTYPES = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q4_0": "MOSTLY_Q4_0",
}

Part = tuple[str, Tensor, Callable[[Tensor], Tensor]]  # name in the file, weight, and what becomes of it


def write_gguf(
    model: nn.Module,
    path: str | Path,
    *,
    tokenizer: Any = None,
    dtype: str = "f32",
    name: str | None = None,
) -> Path:
    """Write a language model as a GGUF file, whole or not at all.

    Args:
        model: as `create_model` makes it.
        path: the file; one that exists is replaced.
        tokenizer: of `create_tokenizer`, a byte-level or SentencePiece one; without it the file takes and gives token
            numbers alone.
        dtype: of the matrices: "f32", "f16", "bf16", or blocks of 32 with a 16-bit scale, "q8_0" (8.5 bits a weight)
            and "q4_0" (4.5), the embedding among them. Hidden channels of SwiGLUs are filled up to whole blocks with
            zeros; another matrix whose rows are no multiple of 32 stays f16 in these.
        name: what the file calls the model; default: its architecture.

    Returns the path. Raises ConfigError for a model that no architecture of llama.cpp computes, or with adapters or
    hooks, a tokenizer that it does not have or an unknown dtype; MissingDependencyError without the package `gguf`.
    """
    decoder = decoder_of(model, "GGUF")
    check_plain(model, "GGUF")
    check_built(decoder, "GGUF")
    _check_dtype(dtype)
    architecture = gguf_architecture(decoder.config)
    gguf = import_gguf()
    decoder = evened(decoder, _block(gguf, dtype))
    writer = gguf.GGUFWriter(None, architecture)
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    writer.add_name(name or str(cfg.get("architecture") or "decoder"))
    writer.add_file_type(gguf.LlamaFileType[GGUF_DTYPES[dtype]])
    if dtype.startswith("q"):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_config(writer, decoder.config, architecture)
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        from zoo.data.tokenizers import check_fits
        from zoo.exporting.gguf_tokenizer import add_tokenizer

        check_fits(tokenizer, decoder)
        add_tokenizer(writer, tokenizer, decoder.config.vocab_size)

    parts = list(_parts(decoder, architecture))
    kinds = [_kind(gguf, change(weight.to("meta")).shape, dtype) for _, weight, change in parts]
    for (part, weight, change), kind in zip(parts, kinds, strict=True):
        shape = tuple(change(weight.to("meta")).shape)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(part, shape, np.dtype(np.float32), math.prod(shape) // block * size, raw_dtype=kind)
    with whole_file(path) as file:
        writer.write_header_to_file(Path(file.name))
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for (_, weight, change), kind in zip(parts, kinds, strict=True):
            values = change(weight.detach()).to("cpu", torch.float32).contiguous().numpy()
            writer.write_tensor_data(gguf.quants.quantize(values, kind))
        writer.close()
    return Path(path)


def rounded(model: nn.Module, dtype: str) -> Decoder:
    """A copy of the model in float32 with the weights that a GGUF file of `dtype` holds, to see what rounding costs."""
    _check_dtype(dtype)
    gguf = import_gguf()
    copied = copy.deepcopy(evened(decoder_of(model, "GGUF"), _block(gguf, dtype))).to("cpu", torch.float32)

    def as_written(weight: Tensor) -> Tensor:
        kind = _kind(gguf, weight.shape, dtype)
        return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.contiguous().numpy(), kind), kind))

    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if name.endswith("kv_b_proj.weight"):  # blocks lie along the columns of its keys' part
                heads = parameter.unflatten(0, (copied.config.num_heads, -1))
                keys, values = heads.split((copied.config.nope_head_dim, copied.config.v_head_dim), 1)
                parts = (as_written(keys.transpose(1, 2)).transpose(1, 2), as_written(values))
                parameter.copy_(torch.cat(parts, 1).flatten(0, 1))
            else:
                parameter.copy_(as_written(parameter))
    return copied


def import_gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MissingDependencyError('GGUF files need the package gguf: pip install "backbone-zoo[export]".') from error
    return gguf


def gguf_architecture(config: DecoderConfig) -> str:
    """The architecture of llama.cpp that computes this decoder. Raises ConfigError where there is none."""
    if sees_windows(config):
        raise ConfigError(
            "llama.cpp has no architecture that computes this model: its layers see windows of "
            f"{config.sliding_window} tokens, which none of this form has there. A context_length of no more than that "
            "makes it exact."
        )
    if config.kv_rank is None:
        return "qwen3" if config.qk_norm else "llama"
    layers = len(config.executed)
    if layers in (26, 27) or (layers == 48 and config.vocab_size == 128256):
        raise ConfigError(
            f"llama.cpp takes a model of latent attention with {layers} layers for another, whose queries have no "
            "bottleneck: it cannot run there."
        )
    return "deepseek2"


def _check_dtype(dtype: str) -> None:
    if dtype not in GGUF_DTYPES:
        raise ConfigError(
            f"There is no GGUF dtype {dtype!r}.{did_you_mean(str(dtype), GGUF_DTYPES)} There are: "
            f"{', '.join(GGUF_DTYPES)}."
        )


def _block(gguf: Any, dtype: str) -> int:
    """How many weights of a row share a scale."""
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[dtype.upper()]][0]


def _kind(gguf: Any, shape: torch.Size, dtype: str) -> Any:
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    if shape[-1] % _block(gguf, dtype):
        return gguf.GGMLQuantizationType.F16
    return gguf.GGMLQuantizationType[dtype.upper()]


def _add_config(writer: Any, config: DecoderConfig, architecture: str) -> None:
    layers = len(config.executed)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(max(config.hidden_dims))
    writer.add_head_count(config.num_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.rotary_dim)
    if architecture != "deepseek2":
        writer.add_head_count_kv(config.kv_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        return
    assert config.q_rank is not None
    assert config.kv_rank is not None
    writer.add_head_count_kv(1)  # attention runs over the latent vectors, which all heads share
    writer.add_key_length(config.kv_rank + config.rope_head_dim)
    writer.add_value_length(config.kv_rank)
    writer.add_key_length_mla(config.nope_head_dim + config.rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_q_lora_rank(config.q_rank)
    writer.add_kv_lora_rank(config.kv_rank)
    writer.add_leading_dense_block_count(layers)  # no mixture of experts in any of them
    writer.add_expert_feed_forward_length(max(config.hidden_dims))
    writer.add_expert_shared_count(0)


def _same(weight: Tensor) -> Tensor:
    return weight


def _parts(model: Decoder, architecture: str) -> Iterator[Part]:
    """Every tensor of the file, in order."""
    config, stack = model.config, model.model
    yield "token_embd.weight", stack.embed_tokens.weight, _same
    for i, stored in enumerate(config.executed):
        layer: Any = stack.layers[stored]
        mlp = getattr(layer, config.mlp_name)
        yield f"blk.{i}.attn_norm.weight", layer.input_layernorm.weight, _same
        attention = _latent_attention if architecture == "deepseek2" else _attention
        for name, weight, change in attention(layer.self_attn, config, architecture):
            yield f"blk.{i}.{name}.weight", weight, change
        yield f"blk.{i}.attn_output.weight", layer.self_attn.o_proj.weight, _same
        yield f"blk.{i}.ffn_norm.weight", layer.post_attention_layernorm.weight, _same
        yield f"blk.{i}.ffn_gate.weight", mlp.gate_proj.weight, _same
        yield f"blk.{i}.ffn_up.weight", mlp.up_proj.weight, _same
        yield f"blk.{i}.ffn_down.weight", mlp.down_proj.weight, _same
    yield "output_norm.weight", stack.norm.weight, _same
    if not config.tie_embeddings:
        yield "output.weight", model.lm_head.weight, _same


def _attention(attention: Any, config: DecoderConfig, architecture: str) -> Iterator[Part]:
    interleaved = architecture == "llama"  # llama.cpp turns pairs (2j, 2j + 1) there, and (j, j + width / 2) in qwen3
    change: Callable[[Tensor], Tensor] = _same
    if config.rope_interleaved != interleaved:
        change = functools.partial(
            reorder_rotary, head_dim=config.head_dim, rotary_dim=config.head_dim, interleaved=interleaved
        )
    yield "attn_q", attention.q_proj.weight, change
    yield "attn_k", attention.k_proj.weight, change
    yield "attn_v", attention.v_proj.weight, _same
    if config.qk_norm:
        yield "attn_q_norm", torch.ones(config.head_dim), _same
        yield "attn_k_norm", torch.ones(config.head_dim), _same


def _latent_attention(attention: Any, config: DecoderConfig, architecture: str) -> Iterator[Part]:
    assert config.kv_rank is not None
    nope, rope = config.nope_head_dim, config.rope_head_dim

    def turned(weight: Tensor, head_dim: int) -> Tensor:
        if config.rope_interleaved:
            return weight
        return reorder_rotary(weight, head_dim, rope, interleaved=True)

    def up(weight: Tensor, is_key: bool) -> Tensor:
        key, value = weight.unflatten(0, (config.num_heads, -1)).split((nope, config.v_head_dim), 1)
        return key.transpose(1, 2) if is_key else value

    yield "attn_q_a", attention.q_a_proj.weight, _same
    yield "attn_q_a_norm", attention.q_a_layernorm.weight, _same
    yield "attn_q_b", attention.q_b_proj.weight, functools.partial(turned, head_dim=nope + rope)
    down = functools.partial(turned, head_dim=config.kv_rank + rope)
    yield "attn_kv_a_mqa", attention.kv_a_proj_with_mqa.weight, down
    yield "attn_kv_a_norm", attention.kv_a_layernorm.weight, _same
    yield "attn_k_b", attention.kv_b_proj.weight, functools.partial(up, is_key=True)
    yield "attn_v_b", attention.kv_b_proj.weight, functools.partial(up, is_key=False)
