"""Decoders as the classes of the library transformers, and back: configuration, names and order of tensors.

A decoder is written as the stock class that computes the same function, so that `AutoModelForCausalLM` opens the folder
without remote code:

- `llama`, for grouped-query attention (MobileLLM, SmolLM), `ministral` where some layers see windows alone;
- `llama4_text`, dense, where queries and keys are normalised (MobileLLM-R1), and `qwen3` where besides some layers see
  windows (MobileLLM-Pro; Llama 4 has chunks instead): its norms have weights, which then are one, and stand before the
  rotation, which keeps the mean square;
- `youtu`, for latent attention (Youtu-LLM).

Shared layers are written once for each time that they run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import CheckpointError, ConfigError
from zoo.exporting.layout import check_built, decoder_of, evened, sees_windows
from zoo.files import whole_file
from zoo.layers.decoder import Decoder, DecoderConfig, reorder_rotary
from zoo.layers.folding import check_plain
from zoo.registry import get_entry, list_models
from zoo.weights import read_json, write_safetensors

__all__ = [
    "MODEL_TYPES",
    "decoder_args",
    "generation_config",
    "is_stock",
    "transformers_config",
    "transformers_state",
    "write_transformers",
]

CLASSES = {
    "llama": "LlamaForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
    "ministral": "MinistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "youtu": "YoutuForCausalLM",
}
NEAREST = {  # an entry of the architecture, where no entry is the very model
    "llama": "smollm_135m",
    "llama4_text": "mobilellm_r1_140m",
    "ministral": "smollm_135m",
    "mobilellm": "mobilellm_125m",
    "qwen3": "mobilellm_pro",
    "youtu": "youtu_llm_2b",
}
MODEL_TYPES = tuple(NEAREST)


def model_type(config: DecoderConfig) -> str:
    """The `model_type` of the class that computes this decoder. Raises ConfigError where there is none."""
    if config.kv_rank is not None:
        if config.norm_eps != 1e-6:  # of the two inner norms, whatever the configuration says
            raise ConfigError(
                f"transformers' Youtu has 1e-6 built into norms, and this model has norm_eps={config.norm_eps:g}: no "
                "class there computes it."
            )
        return "youtu"
    if config.dim % config.num_heads and not config.qk_norm and not sees_windows(config):
        raise ConfigError(
            f"transformers' Llama needs a width that its heads divide, and this model has {config.dim} for "
            f"{config.num_heads}: no class there computes it."
        )
    if sees_windows(config):
        return "qwen3" if config.qk_norm else "ministral"
    return "llama4_text" if config.qk_norm else "llama"


def is_stock(config: DecoderConfig) -> bool:
    """Whether a class of transformers computes this decoder from its very tensors, as they are named and ordered."""
    try:
        kind = model_type(config)
    except ConfigError:
        return False
    is_plain = config.layer_map in (None, tuple(range(config.depth))) and kind != "qwen3"
    is_plain = is_plain and isinstance(config.hidden_dim, int)
    return is_plain and config.mlp_name == _mlp_name(kind) and config.rope_interleaved == _interleaved(kind, config)


def _mlp_name(kind: str) -> str:
    return "feed_forward" if kind == "llama4_text" else "mlp"


def _interleaved(kind: str, config: DecoderConfig) -> bool:
    return config.rope_interleaved if kind == "youtu" else kind == "llama4_text"


# -------------------------------------------------------------------------------------------------------------- writing


def transformers_config(config: DecoderConfig, *, dtype: torch.dtype, tokenizer: Any = None) -> dict[str, Any]:
    """What `config.json` says of this decoder. Raises ConfigError where no class of transformers computes it."""
    kind = model_type(config)
    layers = len(config.executed)
    written: dict[str, Any] = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": max(config.hidden_dims),
        "num_hidden_layers": layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads if kind == "youtu" else config.kv_heads,
        "head_dim": config.rotary_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # as version 4 reads it
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        "dtype": str(dtype).removeprefix("torch."),
        **token_ids(tokenizer),
    }
    if kind == "llama":
        written |= {"mlp_bias": False}
    if kind == "llama4_text":
        written |= {
            "intermediate_size_mlp": max(config.hidden_dims),
            "moe_layers": [],
            "interleave_moe_layer_step": layers + 1,
            "use_qk_norm": True,
            "no_rope_layers": [1] * layers,  # 1: the layer has rotary positions
            "layer_types": ["full_attention"] * layers,
            "attention_chunk_size": config.context_length,
            "attn_temperature_tuning": False,
        }
    if kind in ("qwen3", "ministral"):
        windows = [config.window(i) for i in range(layers)]
        kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
        written |= {"layer_types": kinds, "sliding_window": config.sliding_window, "use_sliding_window": True}
    if kind == "youtu":
        written |= {
            "q_lora_rank": config.q_rank,
            "kv_lora_rank": config.kv_rank,
            "qk_nope_head_dim": config.nope_head_dim,
            "qk_rope_head_dim": config.rope_head_dim,
            "v_head_dim": config.v_head_dim,
            "rope_interleave": config.rope_interleaved,
            "embedding_initializer_range": config.embed_init_std or config.init_std,
        }
    return written


def token_ids(tokenizer: Any) -> dict[str, Any]:
    """The special tokens in a configuration; None where there are none, as the classes' defaults are other models'."""
    ends = list(getattr(tokenizer, "eos_ids", ()))
    return {
        "bos_token_id": getattr(tokenizer, "bos_id", None),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": getattr(tokenizer, "pad_id", None),
    }


def generation_config(tokenizer: Any) -> dict[str, Any]:
    """What `generation_config.json` says of a tokenizer: what begins, ends and fills up a text."""
    ids = {key: value for key, value in token_ids(tokenizer).items() if value is not None}
    if "pad_token_id" not in ids and getattr(tokenizer, "eos_id", None) is not None:
        ids["pad_token_id"] = tokenizer.eos_id
    return ids


def transformers_state(model: Decoder) -> dict[str, Tensor]:
    """The tensors of a decoder as its class of transformers names and orders them."""
    model = evened(model)
    config, stack = model.config, model.model
    kind = model_type(config)
    state = {"model.embed_tokens.weight": stack.embed_tokens.weight}
    turn = config.rope_interleaved != _interleaved(kind, config)
    for i, stored in enumerate(config.executed):
        for name, tensor in stack.layers[stored].state_dict().items():
            if turn and name in ("self_attn.q_proj.weight", "self_attn.k_proj.weight"):
                width = config.head_dim
                tensor = reorder_rotary(tensor, width, width, interleaved=not config.rope_interleaved)
            if name.startswith(f"{config.mlp_name}."):
                name = f"{_mlp_name(kind)}.{name.removeprefix(f'{config.mlp_name}.')}"
            state[f"model.layers.{i}.{name}"] = tensor
        if kind == "qwen3":
            for name in ("q_norm", "k_norm"):
                like = stack.embed_tokens.weight
                state[f"model.layers.{i}.self_attn.{name}.weight"] = like.new_ones(config.head_dim)
    state["model.norm.weight"] = stack.norm.weight
    if not config.tie_embeddings:
        state["lm_head.weight"] = model.lm_head.weight
    return {name: tensor.detach() for name, tensor in state.items()}


def write_transformers(
    model: nn.Module, folder: Path, *, tokenizer: Any = None, dtype: torch.dtype | None = None
) -> None:
    """Write configuration, tensors and tokenizer into `folder`, which exists. Raises ConfigError, CheckpointError."""
    decoder = decoder_of(model, "An export to transformers")
    check_plain(model, "An export to transformers")
    check_built(decoder, "An export to transformers")
    dtype = dtype or decoder.model.embed_tokens.weight.dtype
    config = transformers_config(decoder.config, dtype=dtype, tokenizer=tokenizer)
    write_safetensors(
        {name: t.to(dtype) for name, t in transformers_state(decoder).items()}, folder / "model.safetensors"
    )
    write_json(folder / "config.json", config)
    write_tokenizer(tokenizer, folder)


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer's files, and `generation_config.json`, which keeps what was published with the tokenizer."""
    path = folder / "generation_config.json"
    if tokenizer is not None:
        tokenizer.save(folder)
    published = read_json(path) if path.is_file() else {}
    write_json(path, published | generation_config(tokenizer))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    with whole_file(path) as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")


# -------------------------------------------------------------------------------------------------------------- reading


def decoder_args(saved: Mapping[str, Any], source: str) -> tuple[str, dict[str, Any]] | None:
    """The entry and the arguments for the decoder that a `config.json` of transformers describes; None for others.

    Where an entry of the zoo is this very model, it is that one; else the nearest, all its arguments replaced. Raises
    CheckpointError for a model of a known class that no decoder here computes.
    """
    kind = saved.get("model_type")
    if kind not in NEAREST:
        return None

    def need(fits: bool, what: str) -> None:
        if not fits:
            raise CheckpointError(f"{source} holds a {kind} model with {what}, which no decoder of the zoo computes.")

    depth = saved["num_hidden_layers"]
    rope = saved.get("rope_parameters") or saved.get("rope_scaling") or {}
    need(isinstance(rope, Mapping), "rotary positions that are no object")
    default_theta = 5e5 if kind == "llama4_text" else 1e4
    need(rope.get("rope_type", rope.get("type", "default")) == "default", "scaled rotary positions")
    need(saved.get("hidden_act", "silu") in ("silu", "swish"), f"the activation {saved.get('hidden_act')}")
    need(not saved.get("attention_bias") and not saved.get("mlp_bias"), "biases")
    heads = saved["num_attention_heads"]
    args: dict[str, Any] = {
        "vocab_size": saved["vocab_size"],
        "depth": depth,
        "dim": saved["hidden_size"],
        "num_heads": heads,
        "hidden_dim": saved.get("intermediate_size_mlp", saved["intermediate_size"]),
        "context_length": saved["max_position_embeddings"],
        "norm_eps": saved.get("rms_norm_eps", 1e-5 if kind == "llama4_text" else 1e-6),
        "rope_theta": float(rope.get("rope_theta") or saved.get("rope_theta") or default_theta),
        "tie_embeddings": bool(saved.get("tie_word_embeddings", kind == "youtu")),
        "init_std": saved.get("initializer_range") or 0.02,
    }
    if kind == "youtu":
        need(saved.get("q_lora_rank") is not None, "queries without a bottleneck")
        args |= {
            "q_rank": saved["q_lora_rank"],
            "kv_rank": saved["kv_lora_rank"],
            "nope_head_dim": saved["qk_nope_head_dim"],
            "rope_head_dim": saved["qk_rope_head_dim"],
            "v_head_dim": saved["v_head_dim"],
            "rope_interleaved": bool(saved.get("rope_interleave", True)),
            "embed_init_std": saved.get("embedding_initializer_range"),
        }
    else:
        kv_heads = saved.get("num_key_value_heads") or heads
        args |= {
            "num_kv_heads": None if kv_heads == heads else kv_heads,
            "head_dim": saved.get("head_dim") or saved["hidden_size"] // heads,
        }
    if kind == "mobilellm":
        args["tie_embeddings"] = bool(saved.get("share_embedding", True))
        if saved.get("layer_sharing"):
            args["layer_map"] = tuple(stored for stored in range(depth) for _ in range(2))
    if kind == "llama4_text":
        need(not any(i < depth for i in _moe_layers(saved, depth)), "a mixture of experts")
        no_rope = saved.get("no_rope_layers") or [int((i + 1) % 4 != 0) for i in range(depth)]
        need(all(no_rope[:depth]), "layers without rotary positions")
        args |= {"rope_interleaved": True, "mlp_name": "feed_forward", "qk_norm": bool(saved.get("use_qk_norm", True))}
    if kind == "qwen3":
        args["qk_norm"] = True
    args |= _windows(saved, kind, depth, need)
    return _entry_for(args, kind)


def _moe_layers(saved: Mapping[str, Any], depth: int) -> list[int]:
    if saved.get("moe_layers") is not None:
        return list(saved["moe_layers"])
    step = saved.get("interleave_moe_layer_step", 1)
    return list(range(step - 1, depth, step)) if step else []


def _windows(saved: Mapping[str, Any], kind: str, depth: int, need: Any) -> dict[str, Any]:
    """`sliding_window` and `global_layers`, from the kinds of the layers."""
    kinds = saved.get("layer_types")
    if kinds is None:
        need(kind != "qwen3" or not saved.get("use_sliding_window"), "windows whose layers are not listed")
        kinds = [
            "sliding_attention" if kind == "ministral" and saved.get("sliding_window") else "full_attention"
        ] * depth
    chunked = (saved.get("attention_chunk_size") or 0) < saved["max_position_embeddings"]
    need("chunked_attention" not in kinds or not chunked, "attention in chunks")
    if "sliding_attention" not in kinds:
        return {}
    need(isinstance(saved.get("sliding_window"), int), "windows without a size")
    seeing = tuple(i for i, kind in enumerate(kinds) if kind != "sliding_attention")
    return {"sliding_window": saved["sliding_window"], "global_layers": seeing}


def _entry_for(args: dict[str, Any], kind: str) -> tuple[str, dict[str, Any]]:
    wanted = DecoderConfig(**args)
    for name in list_models(task="language"):
        known = DecoderConfig(**get_entry(name).args)
        if dataclasses.replace(known, num_kv_heads=known.kv_heads) == dataclasses.replace(
            wanted, num_kv_heads=wanted.kv_heads
        ):
            return name, {}
    usual = get_entry(NEAREST[kind]).args
    every = {field.name: getattr(wanted, field.name) for field in dataclasses.fields(wanted)}
    defaults = {f.name: f.default for f in dataclasses.fields(wanted) if f.default is not dataclasses.MISSING}
    return NEAREST[kind], {key: value for key, value in every.items() if {**defaults, **usual}.get(key) != value}
