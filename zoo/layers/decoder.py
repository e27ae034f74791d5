"""The decoder of small language models: pre-norm, SwiGLU, rotary positions, and attention in one of two forms.

Grouped-query attention (arXiv 2305.13245) with or without a sliding window, or multi-head latent attention
(DeepSeek-V2, arXiv 2405.04434, section 2.1). Which stored layer runs when is data (`layer_map`): any sharing of layers.

Modules are named as in the checkpoints of the Llama family: `model.layers.0.self_attn.q_proj.weight`.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.errors import CheckpointError, ConfigError
from zoo.layers.arguments import check_flags
from zoo.layers.folding import has_hooks, has_own_forward, is_changed
from zoo.layers.hub_mixin import ZooModelHubMixin
from zoo.layers.init import init_weights, on_meta
from zoo.layers.kv_cache import KVCache, LayerCache, LayerShape
from zoo.layers.observers import is_exporting, is_observed, is_transformed
from zoo.layers.token_loss import IGNORED, mean_token_loss

__all__ = ["Decoder", "DecoderConfig", "build_decoder", "convert_published", "outline", "reorder_rotary"]

COUNTERS = ("fvcore", "zoo")  # packages whose hooks note the calls of a module, and change nothing
COUNTS = (  # fields of DecoderConfig that are whole numbers from 1 up
    *("vocab_size", "depth", "dim", "num_heads", "num_kv_heads", "head_dim", "context_length", "sliding_window"),
    *("q_rank", "kv_rank", "nope_head_dim", "rope_head_dim", "v_head_dim"),
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """The architecture of a decoder.

    Raises ConfigError for values that do not go together.
    """

    vocab_size: int
    depth: int  # stored layers
    dim: int  # width of the residual stream
    num_heads: int
    hidden_dim: int | tuple[int, ...]  # of the SwiGLU: the same in all stored layers, or that of each
    num_kv_heads: int | None = None  # None: as many as heads
    head_dim: int = 64
    layer_map: tuple[int, ...] | None = None  # the stored layer of each executed one; None: each once, in order
    context_length: int = 2048  # tokens
    norm_eps: float = 1e-5
    rope_theta: float = 1e4
    rope_interleaved: bool = False  # rotate pairs (2j, 2j + 1), not (j, j + width / 2)
    qk_norm: bool = False  # root mean square of each rotated query and key is 1, without weights
    sliding_window: int | None = None  # tokens that a layer sees, itself among them, but for the global ones
    global_layers: tuple[int, ...] = ()  # executed layers that see everything; those beyond the depth do not count
    q_rank: int | None = None  # of latent attention, which `kv_rank` turns on: widths of its two bottlenecks
    kv_rank: int | None = None
    nope_head_dim: int = 128  # of latent attention: width of a head's query and key without position,
    rope_head_dim: int = 64  # with position,
    v_head_dim: int = 128  # and of its value
    tie_embeddings: bool = True  # the head's matrix is the embedding's
    mlp_name: str = "mlp"  # of the module, and so in the checkpoint
    init_std: float = 0.02  # of linear layers
    embed_init_std: float | None = None  # of the embedding; None: the same

    def __post_init__(self) -> None:
        check_flags(**{name: getattr(self, name) for name in ("rope_interleaved", "qk_norm", "tie_embeddings")})
        if self.global_layers is None or isinstance(self.global_layers, list | range):  # as JSON has it
            object.__setattr__(self, "global_layers", tuple(self.global_layers or ()))
        if not isinstance(self.global_layers, tuple) or any(type(layer) is not int for layer in self.global_layers):
            raise ConfigError(f"global_layers must be numbers of layers, not {self.global_layers!r}.")
        for name in COUNTS:
            value = getattr(self, name)
            if value is None and name in ("num_kv_heads", "sliding_window", "q_rank", "kv_rank"):
                continue
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} must be a whole number from 1 up, not {value!r}.")
        if isinstance(self.hidden_dim, list):  # as JSON has it
            object.__setattr__(self, "hidden_dim", tuple(self.hidden_dim))
        widths = self.hidden_dims
        if len(widths) != self.depth or any(type(width) is not int or width < 1 for width in widths):
            raise ConfigError(
                f"hidden_dim must be a whole number from 1 up, or one for each of the {self.depth} stored layers, not "
                f"{self.hidden_dim!r}."
            )
        if len(set(widths)) == 1:
            object.__setattr__(self, "hidden_dim", widths[0])
        for name in ("norm_eps", "rope_theta", "init_std", "embed_init_std"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and 0 < value < float("inf")):
                raise ConfigError(f"{name} must be a number above zero, not {value!r}.")
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_kv_heads ({self.num_kv_heads}) must divide num_heads ({self.num_heads}).")
        if any(type(stored) is not int or not 0 <= stored < self.depth for stored in self.layer_map or ()):
            raise ConfigError(
                f"layer_map names stored layers, 0 to {self.depth - 1} with this depth: it is {self.layer_map}."
            )
        if self.layer_map is not None and not self.layer_map:
            raise ConfigError("layer_map names no layer at all.")
        if self.kv_rank is not None and (self.q_rank is None or self.sliding_window is not None or self.qk_norm):
            raise ConfigError("Latent attention (kv_rank) needs q_rank, and has neither sliding_window nor qk_norm.")
        if self.rotary_dim % 2:
            raise ConfigError(f"Rotary positions take pairs: the width of a head must be even, not {self.rotary_dim}.")
        if not self.mlp_name.isidentifier():
            raise ConfigError(f"mlp_name must be a Python name, not {self.mlp_name!r}.")

    @property
    def executed(self) -> tuple[int, ...]:
        """The stored layer of each executed one."""
        return tuple(range(self.depth)) if self.layer_map is None else self.layer_map

    @property
    def hidden_dims(self) -> tuple[int, ...]:
        """The width of the SwiGLU of each stored layer."""
        return self.hidden_dim if isinstance(self.hidden_dim, tuple) else (self.hidden_dim,) * self.depth

    @property
    def hidden_range(self) -> str:
        """As people read it: "64", or "24 to 64" where layers differ."""
        widths = self.hidden_dims
        return str(self.hidden_dim) if isinstance(self.hidden_dim, int) else f"{min(widths)} to {max(widths)}"

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def rotary_dim(self) -> int:
        return self.head_dim if self.kv_rank is None else self.rope_head_dim

    def window(self, executed: int) -> int | None:
        """How many tokens an executed layer sees; None: all."""
        return None if executed in self.global_layers else self.sliding_window

    @property
    def cache_shape(self) -> LayerShape:
        """(heads, width) of what a layer remembers of each token."""
        if self.kv_rank is not None:
            return (1, self.kv_rank), (1, self.rope_head_dim)
        return (self.kv_heads, self.head_dim), (self.kv_heads, self.head_dim)

    @property
    def cache_shapes(self) -> list[tuple[LayerShape, int | None]]:
        """That of each executed layer, and its window."""
        return [(self.cache_shape, self.window(i)) for i in range(len(self.executed))]

    @property
    def kv_elements_per_token(self) -> int:
        """Numbers that are remembered of a token, over all executed layers, as long as no window has passed it."""
        return len(self.executed) * sum(heads * width for heads, width in self.cache_shape)

    def kv_elements(self, tokens: int) -> int:
        """Numbers that are remembered of so many tokens: of a layer with a window, those of its last ones alone."""
        kept = sum(min(tokens, self.window(i) or tokens) for i in range(len(self.executed)))
        return kept * sum(heads * width for heads, width in self.cache_shape)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), in float32 or wider, times a learned weight (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * rms_normalize(x, self.eps)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


def rms_normalize(x: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.rms_norm(wide, x.shape[-1:], eps=eps).to(x.dtype)


class RotaryTable(nn.Module):
    """Cosines and sines of position x theta^(-2j / width) (RoFormer, arXiv 2104.09864, eq. 15), made once.

    They stay in float32 whatever the model is converted to: what is rounded once does not come back.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, length: int, width: int, theta: float) -> None:
        super().__init__()
        self.theta = theta
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(length, width // 2, dtype=torch.float32), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryTable:
        was_meta = self.cos.is_meta
        super()._apply(fn, recurse)
        if self.cos.dtype != torch.float32 or (was_meta and not self.cos.is_meta):
            self.cos, self.sin = (torch.empty_like(table, dtype=torch.float32) for table in (self.cos, self.sin))
            if not self.cos.is_meta:
                self.fill()
        return self

    def fill(self) -> None:
        length, half = self.cos.shape
        device = self.cos.device
        # in this order, as the references: at place 1000 another rounding of the frequencies is felt
        frequencies = 1.0 / self.theta ** (torch.arange(half, dtype=torch.float32, device=device) / half)
        angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())

    def forward(self, places: Tensor | slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(B or 1, 1, S, width / 2) each, for (B, S) positions or a slice of them."""
        shape = (1, 1) if isinstance(places, slice) else (places.shape[0], 1)
        cos, sin = (table[places].to(dtype) for table in (self.cos, self.sin))
        return cos.view(*shape, *cos.shape[-2:]), sin.view(*shape, *sin.shape[-2:])


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor], interleaved: bool) -> Tensor:
    """Turn each pair of `x`, (B, heads, S, width), by its position's angle."""
    cos, sin = rotation
    if interleaved:
        a, b = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


@dataclasses.dataclass
class Visible:
    """Which tokens each token sees: those up to itself (`mask` None), or where `mask`, (B or 1, 1, S, K), is true."""

    mask: Tensor | None
    is_causal: bool


class Attention(nn.Module):
    """Grouped-query attention: heads share keys and values in groups."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim, self.eps = config.head_dim, config.norm_eps
        self.interleaved, self.qk_norm = config.rope_interleaved, config.qk_norm
        self.grouped = config.kv_heads != config.num_heads
        q, kv = config.num_heads * self.head_dim, config.kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.dim, q, bias=False)
        self.k_proj = nn.Linear(config.dim, kv, bias=False)
        self.v_proj = nn.Linear(config.dim, kv, bias=False)
        self.o_proj = nn.Linear(q, config.dim, bias=False)

    def _rotated(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        x = rotate(x, rotation, self.interleaved)
        return rms_normalize(x, self.eps) if self.qk_norm else x

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        visible: Visible,
        memory: LayerCache | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, S, dim) -> (B, S, dim)."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (linear(x).view(heads).transpose(1, 2) for linear in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self._rotated(q, rotation), self._rotated(k, rotation)
        if memory is not None and cache is not None:
            k, v = (seen.to(q.dtype) for seen in memory.update((k, v), cache))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible.mask, is_causal=visible.is_causal, enable_gqa=self.grouped
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))


def attend_latent(
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    kv_b: nn.Module,
    visible: Visible,
    *,
    remembers: bool,
) -> Tensor:
    """Attention over keys and values that `kv_b` makes of latent vectors (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Queries are (B, heads, S, nope) and (B, heads, S, rope), the memory (B, 1, K, rank) and (B, 1, K, rope); the weight
    of `kv_b` is (heads * (nope + v_dim), rank). A few tokens over a memory (`remembers`) are computed in the latent
    space, if `kv_b` computes what its weight says. Gives (B, heads, S, v_dim).
    """
    heads, nope = q_nope.shape[1], q_nope.shape[-1]
    scale = (nope + q_rope.shape[-1]) ** -0.5
    options: dict[str, Any] = {"attn_mask": visible.mask, "is_causal": visible.is_causal, "scale": scale}
    few = is_exporting() or 4 * q_nope.shape[2] <= latent.shape[2]  # a graph has one of the two ways
    changed = is_changed(kv_b) or has_hooks(kv_b, but=COUNTERS) or getattr(kv_b, "bias", None) is not None
    if remembers and few and not changed:
        up = kv_b.get_parameter("weight").view(heads, -1, latent.shape[-1]).to(q_nope.dtype)
        q = torch.cat((q_nope @ up[:, :nope], q_rope), -1)
        k = torch.cat((latent, k_rope), -1)
        return F.scaled_dot_product_attention(q, k, latent, enable_gqa=True, **options) @ up[:, nope:].mT
    made = kv_b(latent[:, 0]).unflatten(-1, (heads, -1)).transpose(1, 2)
    k_nope, v = made.split((nope, made.shape[-1] - nope), -1)
    q = torch.cat((q_nope, q_rope), -1)
    k = torch.cat((k_nope, k_rope.expand(-1, heads, -1, -1)), -1)
    return F.scaled_dot_product_attention(q, k, v, **options)


class LatentAttention(nn.Module):
    """Multi-head latent attention: keys and values are made of one narrow vector a token, which alone is remembered.

    One rotary key is shared by all heads. A few new tokens over a longer memory are computed in the latent space
    (queries are taken there, instead of the memory out of it), which is the same function.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        assert config.q_rank is not None
        assert config.kv_rank is not None
        heads, self.rank = config.num_heads, config.kv_rank
        self.heads, self.interleaved = heads, config.rope_interleaved
        self.nope, self.rope, self.v_dim = config.nope_head_dim, config.rope_head_dim, config.v_head_dim
        self.q_a_proj = nn.Linear(config.dim, config.q_rank, bias=False)
        self.q_a_layernorm = RMSNorm(config.q_rank, config.norm_eps)
        self.q_b_proj = nn.Linear(config.q_rank, heads * (self.nope + self.rope), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(config.dim, self.rank + self.rope, bias=False)
        self.kv_a_layernorm = RMSNorm(self.rank, config.norm_eps)
        self.kv_b_proj = nn.Linear(self.rank, heads * (self.nope + self.v_dim), bias=False)
        self.o_proj = nn.Linear(heads * self.v_dim, config.dim, bias=False)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        visible: Visible,
        memory: LayerCache | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, S, dim) -> (B, S, dim)."""
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_nope, q_rope = q.unflatten(-1, (self.heads, -1)).transpose(1, 2).split((self.nope, self.rope), -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x)[:, None].split((self.rank, self.rope), -1)
        latent = self.kv_a_layernorm(latent)
        q_rope, k_rope = (rotate(part, rotation, self.interleaved) for part in (q_rope, k_rope))
        if memory is not None and cache is not None:
            latent, k_rope = (seen.to(q.dtype) for seen in memory.update((latent, k_rope), cache))
        out = attend_latent(q_nope, q_rope, latent, k_rope, self.kv_b_proj, visible, remembers=memory is not None)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """W_down(silu(W_gate x) * W_up x) (arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig, hidden_dim: int) -> None:
        super().__init__()
        self.mlp_name = config.mlp_name
        self.self_attn = Attention(config) if config.kv_rank is None else LatentAttention(config)
        self.add_module(config.mlp_name, SwiGLU(config.dim, hidden_dim))
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        visible: Visible,
        memory: LayerCache | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, S, dim) -> (B, S, dim)."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, visible, memory, cache)
        return x + getattr(self, self.mlp_name)(self.post_attention_layernorm(x))


class DecoderStack(nn.Module):
    """Embedding, stored layers and the last norm: what checkpoints call `model`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(DecoderLayer(config, width) for width in config.hidden_dims)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.rotary = RotaryTable(config.context_length, config.rotary_dim, config.rope_theta)


def _settings(part: nn.Module) -> tuple[type, dict[str, Any]]:
    """The kind of a part, and all that it holds of plain values, but for how it trains."""
    plain = (bool, int, float, str, tuple, type(None))
    held = part.__dict__.items()
    kept = {key: value for key, value in held if isinstance(value, plain) and not key.startswith("_")}
    return type(part), {key: value for key, value in kept.items() if key != "training"}


class Decoder(ZooModelHubMixin, nn.Module):
    """A language model: tokens -> logits of the tokens that come next, or the loss of those that should have."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = DecoderStack(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.grad_checkpointing = False
        init_weights(self)

    def init_module(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.init_std)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.embed_init_std or self.config.init_std)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, RotaryTable):
            module.fill()

    @property
    def head_weight(self) -> Tensor:
        """(vocab_size, dim): what turns features into logits.

        Raises ConfigError for an lm_head that computes something else than its weight says, and for a weight that is
        not there, or offloaded by accelerate.
        """
        if self.config.tie_embeddings:
            embedding = self.model.embed_tokens
            weight = getattr(embedding, "weight", None)
            if not isinstance(weight, Tensor):
                raise ConfigError(
                    f"The head's matrix is the embedding's, and embed_tokens ({type(embedding).__name__}) has no "
                    "weight: merge what it adds into the embedding, or create the model with tie_embeddings=False."
                )
            if _is_offloaded(embedding, weight):
                raise ConfigError(
                    "The head's matrix is the embedding's, which is offloaded: keep embed_tokens in memory, or create "
                    "the model with tie_embeddings=False."
                )
            return weight
        head = self.lm_head
        own = None
        if type(head).forward is not nn.Linear.forward or has_own_forward(head):
            own = "a forward of its own"
        elif has_hooks(head, but=COUNTERS):
            own = "hooks"
        elif head.bias is not None:
            own = "a bias"
        elif _is_offloaded(head, head.weight):
            own = "its weight elsewhere"
        if own is not None:
            raise ConfigError(
                f"Losses are computed with the weight of lm_head alone, and lm_head ({type(head).__name__}) has "
                f"{own}: merge what it adds into the weight, remove hooks, and keep the weight in memory."
            )
        return head.weight

    def changed_part(self) -> str | None:
        """The name of a tensor, or of a part, that is not as `config` builds it, such as a bias or a norm of another
        kind or with another epsilon; None where all are."""
        with on_meta():
            model = Decoder(self.config)
        own, built = self.state_dict(), model.state_dict()
        differ = (k for k in (*built, *own) if k not in own or k not in built or own[k].shape != built[k].shape)
        parts = dict(model.named_modules())
        others = (
            name
            for name, part in self.named_modules()
            if name and (name not in parts or _settings(part) != _settings(parts[name]))
        )
        return next(itertools.chain(differ, others), None)

    def has_own_methods(self) -> bool:
        """Whether a subclass, or this very model, computes features or logits in another way."""
        names = ("forward_features", "forward_head", "head_weight")
        return any(name in self.__dict__ or getattr(type(self), name) is not getattr(Decoder, name) for name in names)

    def fast_form(self) -> Decoder:
        from zoo.layers.fast_decoder import FastDecoder

        return self if self.has_own_methods() or self.changed_part() is not None else FastDecoder(self)

    def describe_widths(self) -> None:
        """Bring `config`, and what a checkpoint says of it, up to date with SwiGLUs that lost channels.

        Raises ConfigError where their matrices do not fit together.
        """
        mlps: list[Any] = [getattr(layer, self.config.mlp_name) for layer in self.model.layers]
        for i, mlp in enumerate(mlps):
            made, read = (mlp.gate_proj.out_features, mlp.up_proj.out_features), mlp.down_proj.in_features
            if set(made) != {read}:
                raise ConfigError(
                    f"The SwiGLU of layer {i} would make {made[0]} and {made[1]} hidden channels and read {read}."
                )
        widths = tuple(mlp.down_proj.in_features for mlp in mlps)
        self.config = dataclasses.replace(self.config, hidden_dim=widths)
        if "_model_args" in self.__dict__:
            self.__dict__["_model_args"] = {**self.__dict__["_model_args"], "hidden_dim": self.config.hidden_dim}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's description of which parameter belongs to which layer, for layer-wise learning rates."""
        return {
            "stem": r"^model\.embed_tokens",
            "blocks": [(r"^model\.layers\.(\d+)", None), (r"^model\.norm", (99999,))],
        }

    def make_cache(
        self,
        batch_size: int = 1,
        max_length: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        static_shapes: bool = False,
    ) -> KVCache:
        """Memory for `batch_size` sequences of up to `max_length` tokens (default: the context's length).

        `dtype` is the weights' by default. Raises ConfigError for more tokens than the context has.
        """
        if not isinstance(batch_size, Integral) or batch_size < 1:
            raise ConfigError(f"A cache is for a batch of 1 up, not {batch_size!r}.")
        max_length = self.config.context_length if max_length is None else max_length
        if not isinstance(max_length, Integral) or not 1 <= max_length <= self.config.context_length:
            raise ConfigError(
                f"A cache for {max_length!r} tokens cannot be: the model's context has {self.config.context_length}."
            )
        like = self.model.norm.weight.detach()
        if dtype is not None:
            like = like.new_empty(0, dtype=dtype)
        return KVCache(self.config.cache_shapes, int(batch_size), int(max_length), like, static_shapes)

    def forward_features(self, tokens: Tensor, cache: KVCache | None = None, positions: Tensor | None = None) -> Tensor:
        """(B, S) token numbers -> (B, S, dim), normalised. The arguments are those of `forward`."""
        self._check(tokens, positions)
        stack, config = self.model, self.config
        batch_size, count = tokens.shape
        if cache is not None:
            self._check_cache(cache)
            if positions is None and cache.positions is not None:
                self._check_room(cache, count)
            cache.begin(batch_size, count, positions)
            if positions is None and cache.positions is not None:
                places = cache.index if count == 1 and cache.index is not None else None
                positions = (
                    cache.positions[:, cache.length : cache.length + count]
                    if places is None
                    else cache.positions.index_select(1, places)
                )
        start = 0 if cache is None else cache.length
        if positions is None:
            if start + count > config.context_length:
                raise ConfigError(_too_long(start + count, config.context_length))
            where: Tensor | slice = slice(start, start + count)
        else:
            where = positions.clamp(min=0)
        x = stack.embed_tokens(tokens)
        # Llama 4 rotates interleaved pairs as complex numbers, in float32 at least; Llama in the activations' precision
        wide = torch.promote_types(x.dtype, torch.float32)
        rotation = stack.rotary(where, wide if config.rope_interleaved else x.dtype)
        visible: dict[int | None, Visible] = {}
        for i, stored in enumerate(config.executed):
            window = config.window(i)
            memory = None if cache is None else cache.layers[i]
            if window not in visible:
                visible[window] = _visible(count, window, positions, memory, cache, x.device)
            layer = stack.layers[stored]
            if self.grad_checkpointing and self.training and cache is None:
                x = checkpoint(layer, x, rotation, visible[window], use_reentrant=False)
            else:
                x = layer(x, rotation, visible[window], memory, cache)
        if cache is not None:
            cache.advance(count)
        return stack.norm(x)

    def forward_head(self, features: Tensor) -> Tensor:
        """(..., dim) -> (..., vocab_size)."""
        return F.linear(features, self.head_weight) if self.config.tie_embeddings else self.lm_head(features)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        *,
        logits_to_keep: int | None = None,
        z_loss: float = 0.0,
    ) -> Tensor:
        """The logits of what comes next, or, with `targets`, the mean loss of that.

        Args:
            tokens: (B, S) token numbers.
            targets: (B, S): the right next token at each place, -100 where none counts. The answer is then the mean
                of -log p, a scalar, without logits of more than some tokens ever in memory.
            cache: of `make_cache`: the tokens continue what it holds, and are added to it.
            positions: (B, S): the place of each token in its own document, where they do not simply follow: a token at
                0 begins a document, whose tokens see no others; -1 is padding. With a cache each row is one document.
            logits_to_keep: logits of so many last tokens; default: of all without a cache, of the last with one.
            z_loss: weight of the squared log-normaliser beside the loss.

        Returns: (B, kept, vocab_size) logits, or the loss.

        Raises ConfigError for tokens that the vocabulary does not have, for more than the context's length, and for
        shapes that do not go together.
        """
        if logits_to_keep is not None and (isinstance(logits_to_keep, float | str) or logits_to_keep < 1):
            raise ConfigError(f"logits_to_keep must be from 1 up, not {logits_to_keep!r}.")
        if targets is not None:
            self._check_targets(targets, tokens)
        features = self.forward_features(tokens, cache, positions)
        if targets is not None:
            return mean_token_loss(features.flatten(0, 1), self.head_weight, targets.flatten().long(), z_loss)
        if logits_to_keep is None and cache is not None:
            logits_to_keep = 1
        if logits_to_keep is not None:
            features = features[:, -logits_to_keep:]
        return self.forward_head(features)

    def _check(self, tokens: Tensor, positions: Tensor | None) -> None:
        if not isinstance(tokens, Tensor):
            raise ConfigError(f"tokens must be a tensor (batch, length), not {type(tokens).__name__}.")
        if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32) or 0 in tokens.shape:
            kind = str(tokens.dtype).removeprefix("torch.")
            raise ConfigError(
                "tokens must be whole numbers (int64 or int32) of shape (batch, length), both from 1 up, not "
                f"{kind} {tuple(tokens.shape)}."
            )
        if positions is not None and (positions.shape != tokens.shape or positions.is_floating_point()):
            raise ConfigError(
                f"positions must be whole numbers of the tokens' shape, {tuple(tokens.shape)}, not "
                f"{tuple(positions.shape)}."
            )
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed() or is_observed():
            return
        if tokens.device.type != "cpu":
            return
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.config.vocab_size:
            raise ConfigError(
                f"Token {low if low < 0 else high} is outside the vocabulary, 0 to {self.config.vocab_size - 1}: is it "
                "another model's tokenizer?"
            )
        if positions is not None and int(positions.max()) >= self.config.context_length:
            raise ConfigError(_too_long(int(positions.max()) + 1, self.config.context_length))

    def _check_cache(self, cache: KVCache) -> None:
        wanted = self.config.cache_shapes
        if cache.shapes == wanted:
            return
        if len(cache.shapes) == len(wanted):
            differ = "its layers keep other shapes or windows than this one's"
        else:
            differ = f"it has {len(cache.shapes)} layers, and this one runs {len(wanted)}"
        raise ConfigError(f"The cache is another model's: {differ}. Take model.make_cache().")

    def _check_room(self, cache: KVCache, count: int) -> None:
        """Where sequences began late in their context, it may end before the cache does."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or cache.device.type != "cpu":
            return
        assert cache.positions is not None
        end = int(cache.positions.max()) + 1 + count
        if end > self.config.context_length:
            raise ConfigError(_too_long(end, self.config.context_length))

    def _check_targets(self, targets: Tensor, tokens: Tensor) -> None:
        if targets.shape != tokens.shape:
            raise ConfigError(f"targets are {tuple(targets.shape)} and tokens {tuple(tokens.shape)}: they differ.")
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or targets.device.type != "cpu":
            return
        targets = targets.long()  # of 8 bits, no number of the vocabulary's size is another
        wrong = targets[((targets < 0) & (targets != IGNORED)) | (targets >= self.config.vocab_size)]
        if len(wrong):
            raise ConfigError(
                f"Target {int(wrong[0])} is outside the vocabulary, 0 to {self.config.vocab_size - 1}; {IGNORED} is "
                "for places that do not count."
            )


def _is_offloaded(module: nn.Module, weight: Tensor) -> bool:
    return weight.is_meta and "_hf_hook" in module.__dict__  # of a model that is all on the meta device it is not


def _too_long(length: int, context_length: int) -> str:
    return f"{length} tokens are more than the model's context, {context_length}: give it less text."


def _visible(
    count: int,
    window: int | None,
    positions: Tensor | None,
    memory: LayerCache | None,
    cache: KVCache | None,
    device: torch.device,
) -> Visible:
    """What `count` new tokens see in a layer that sees `window` tokens."""
    if cache is None or memory is None:
        if positions is None and (window is None or count <= window):
            return Visible(None, is_causal=True)
        order = torch.arange(count, device=device)
        distance = order[:, None] - order
        mask = distance >= 0
        if window is not None:
            mask = mask & (distance < window)
        mask = mask[None]
        if positions is not None:
            document = (positions == 0).cumsum(1)
            mask = mask & (document[:, :, None] == document[:, None]) & (positions >= 0)[:, None]
            mask = mask | (distance == 0)  # padding sees itself: a row that sees nothing has no softmax
        return Visible(mask[:, None], is_causal=False)
    start = cache.length
    if cache.positions is None:
        if count == 1:
            return Visible(None, is_causal=False)  # the memory holds just what it may see
        if start == 0 and (window is None or count <= window):
            return Visible(None, is_causal=True)
        kept = start if window is None else min(start, memory.length)
        new = torch.arange(start, start + count, device=device)
        seen = torch.arange(start - kept, start + count, device=device)
        distance = new[:, None] - seen
        mask = distance >= 0
        return Visible((mask if window is None else mask & (distance < window))[None, None], is_causal=False)
    now = positions
    assert now is not None
    if cache.index is not None and count == 1:  # all of the memory
        seen = cache.positions
        if memory.is_ring:
            places = torch.arange(memory.length, device=device)
            newest = cache.index - (cache.index - places) % memory.length  # the token that lies in each place
            seen = torch.where(newest >= 0, seen.gather(1, newest.clamp(min=0).expand(len(seen), -1)), -1)
    elif memory.is_ring and count == 1:
        kept = min(start + 1, memory.length)
        places = torch.arange(kept, device=device)
        seen = cache.positions[:, start - (start - places) % memory.length]
    else:
        kept = min(start, memory.length) if memory.is_ring else start
        seen = cache.positions[:, start - kept : start + count]
    distance = now[:, :, None] - seen[:, None]
    mask = (distance >= 0) & (seen >= 0)[:, None]
    if window is not None:
        mask = mask & (distance < window)
    return Visible((mask | (now < 0)[:, :, None])[:, None], is_causal=False)  # padding may see anything


def outline(model: nn.Module) -> nn.Module:
    """Of a decoder in any form, quantised too, one whose parameters have their shapes and no values; others as is."""
    config = getattr(model, "config", None)
    if not isinstance(config, DecoderConfig):
        return model
    with torch.device("meta"):
        return Decoder(config)


def build_decoder(**fields: Any) -> Decoder:
    """A decoder of these fields of `DecoderConfig`."""
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return Decoder(DecoderConfig(**fields))


# what may be overridden when a model is created is what the configuration has
build_decoder.__signature__ = inspect.signature(DecoderConfig)  # type: ignore[attr-defined]


def convert_published(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Published checkpoints: rotary tables left out, a tied head checked and left out, both names of the SwiGLU.

    Of those that were exported: shared layers that were written for each run are one again, and norms of queries and
    keys, whose weights are one and which have none here, are left out, the rows that they go with paired as here.

    Raises CheckpointError where the head is another matrix than the embedding, and the model has one for both, and
    where the runs of a shared layer differ.
    """
    assert isinstance(model, Decoder)
    names = {".mlp.", ".feed_forward."} - {f".{model.config.mlp_name}."}
    converted = {}
    for key, value in state.items():
        for name in names:
            key = key.replace(name, f".{model.config.mlp_name}.")
        if not key.endswith("rotary_emb.inv_freq"):
            converted[key] = value
    head, embedding = converted.get("lm_head.weight"), converted.get("model.embed_tokens.weight")
    if model.config.tie_embeddings and head is not None and embedding is not None:
        if head.shape != embedding.shape or not torch.equal(head, embedding):
            raise CheckpointError(
                "The checkpoint's lm_head.weight is not its embedding, and this model has one matrix for both: create "
                "it with tie_embeddings=False."
            )
        del converted["lm_head.weight"]
    for key in [key for key in converted if key.endswith((".q_norm.weight", ".k_norm.weight"))]:
        if model.config.qk_norm and bool((converted[key] == 1).all()):
            del converted[key]
            projection = key.replace("_norm.weight", "_proj.weight")  # where such norms are, rows are paired by halves
            if model.config.rope_interleaved and projection in converted:
                width = model.config.head_dim
                converted[projection] = reorder_rotary(converted[projection], width, width, interleaved=True)
    return _share_layers(converted, model.config)


def reorder_rotary(weight: Tensor, head_dim: int, rotary_dim: int, *, interleaved: bool) -> Tensor:
    """Rows of a projection to heads, (heads x head_dim, in), for the other pairing of rotary positions.

    The last `rotary_dim` of each head's rows are turned. Where they were paired (j, j + rotary_dim / 2) they are, with
    `interleaved`, to be paired (2j, 2j + 1), and without it the other way round.
    """
    heads = weight.unflatten(0, (-1, head_dim))
    fixed, turned = heads.split((head_dim - rotary_dim, rotary_dim), 1)
    pairs: Any = (2, -1) if interleaved else (-1, 2)
    turned = turned.unflatten(1, pairs).transpose(1, 2).flatten(1, 2)
    return torch.cat((fixed, turned), 1).flatten(0, 1)


def _share_layers(state: dict[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """Layers that were written once for each time they run, as the stored ones."""
    layers = {int(key.split(".")[2]) for key in state if key.startswith("model.layers.")}
    if len(config.executed) == config.depth or layers != set(range(len(config.executed))):
        return state
    shared: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith("model.layers."):
            executed, name = key.removeprefix("model.layers.").split(".", 1)
            key = f"model.layers.{config.executed[int(executed)]}.{name}"
            if key in shared and not torch.equal(shared[key], value):
                raise CheckpointError(
                    f"The checkpoint has other weights for each time that a layer runs ({name} of run {executed}), and "
                    "this model one for all: create it without layer_map."
                )
        shared[key] = value
    return shared
