"""The decoder as it is served: fewer and larger products, and single tokens in C++ where a compiler is at hand.

The same function as `zoo.layers.decoder.Decoder`, with the same interface: queries, keys and values come of one matrix,
gate and up of one, the norms' weights are folded into the matrices behind them (in float32; 16 bits would be rounded
once more), and interleaved rotary pairs are brought side by side by reordering the rows of queries and keys.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ConfigError, did_you_mean
from zoo.layers import native_step
from zoo.layers.decoder import (
    Attention,
    Decoder,
    DecoderConfig,
    LatentAttention,
    RotaryTable,
    Visible,
    attend_latent,
    rms_normalize,
)
from zoo.layers.folding import has_hooks
from zoo.layers.kv_cache import KVCache, LayerCache
from zoo.layers.native_step import CLayer, CMatrix, NativeStep, address, float_matrix
from zoo.layers.observers import is_observed
from zoo.layers.quantized import BITS, QuantizedEmbedding, QuantizedLinear

__all__ = ["FastDecoder", "Quantization"]


@dataclasses.dataclass(frozen=True, slots=True)
class Quantization:
    """How weights are stored: "int8" or "int4", with one scale for `group_size` of a row's elements.

    `perplexity`, where it was measured, says "before" and "after", on how many "tokens" of which "text". Raises
    ConfigError for another kind or size.
    """

    to: str
    group_size: int = 32
    perplexity: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.to not in BITS:
            raise ConfigError(
                f"Weights are quantised to {' or '.join(BITS)}, not {self.to!r}.{did_you_mean(str(self.to), BITS)}"
            )
        if type(self.group_size) is not int or self.group_size < 32 or self.group_size % 32:
            raise ConfigError(f"group_size must be a multiple of 32, not {self.group_size!r}.")


def _plain(x: Tensor) -> bool:
    """Whether a CPU computes now, with nothing recorded."""
    return x.device.type == "cpu" and not (torch.compiler.is_compiling() or torch.jit.is_tracing() or is_observed())


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """x A^T. PyTorch gives one row in float32 to one thread: here each has its part of the matrix."""
    if _plain(x) and x.numel() == weight.shape[1] and x.dtype == weight.dtype == torch.float32:
        threads = torch.get_num_threads()
        if threads > 1 and len(weight) % threads == 0:
            parts = weight.view(threads, -1, weight.shape[1]).transpose(1, 2)  # x as row: as column it is 3x slower
            return torch.bmm(x.reshape(1, 1, -1).expand(threads, -1, -1), parts).view(*x.shape[:-1], len(weight))
    return F.linear(x, weight)


class FastLinear(nn.Module):
    """x A^T. (..., in_features) -> (..., out_features)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.weight)

    def native_matrix(self) -> CMatrix:
        return float_matrix(self.weight)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


AnyLinear = FastLinear | QuantizedLinear


class FastNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), in float32 or wider, times a weight that was not folded away."""

    def __init__(self, weight: Tensor | None, eps: float) -> None:
        super().__init__()
        self.weight = None if weight is None else nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = rms_normalize(x, self.eps)
        return normed if self.weight is None else self.weight * normed


class FastRotary(RotaryTable):
    """The tables at their full width, the first half of the sines negative: see `_rotate`."""

    def forward(self, places: Tensor | slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(B or 1, 1, S, width) each."""
        cos, sin = super().forward(places, dtype)
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn pairs (i, i + width / 2) of `x`, (B, heads, S, width), in the precision of the tables."""
    cos, sin = rotation
    wide = x.to(cos.dtype)
    a, b = wide.chunk(2, -1)
    return torch.addcmul(wide * cos, torch.cat((b, a), -1), sin).to(x.dtype)


def _side_by_side(weight: Tensor, width: int, turned: int, interleaved: bool) -> Tensor:
    """Rows of heads of `width`, whose last `turned` hold pairs (2j, 2j + 1), reordered to pairs (j, j + turned / 2)."""
    if not interleaved or weight.is_meta:  # where indexing would import sympy
        return weight
    kept = width - turned
    order = [*range(kept), *range(kept, width, 2), *range(kept + 1, width, 2)]
    return weight.unflatten(0, (-1, width))[:, order].flatten(0, 1)


class _Parts:
    """Makes the parts of a fast decoder from those of a plain one."""

    def __init__(self, config: DecoderConfig, dtype: torch.dtype, quantization: Quantization | None) -> None:
        self.config, self.quantization = config, quantization
        self.folds = dtype.itemsize >= 4 and quantization is None

    def norm(self, norm: nn.Module, *, folds: bool = True) -> FastNorm:
        return FastNorm(None if folds and self.folds else norm.weight, norm.eps)  # type: ignore[arg-type]

    def linear(self, *weights: Tensor, norm: nn.Module | None = None) -> AnyLinear:
        """The matrices one below the other, with the weight of the `norm` before them."""
        first = weights[0]
        if first.is_meta:  # where torch.cat and clone would import the compiler
            weight = first.new_empty(sum(map(len, weights)), first.shape[1])
        else:
            weight = torch.cat(weights) if len(weights) > 1 else first.clone()
        if norm is not None and self.folds:
            weight = weight * norm.get_parameter("weight")
        if self.quantization is None or not self.fits(weight):
            return FastLinear(weight)
        return QuantizedLinear(weight, BITS[self.quantization.to], self.quantization.group_size)

    def swiglu(self, mlp: Any, norm: nn.Module) -> tuple[AnyLinear, AnyLinear]:
        """Gate and up in one, and down. Hidden channels that fill no group of a scale are filled up with zeros.

        Not where that would more than double them, or where gate and up keep their precision.
        """
        gate, up, down = (linear.weight for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        width = down.shape[1]
        room = -width % self.quantization.group_size if self.quantization is not None and self.fits(gate) else 0
        if 0 < room < max(width, 32):
            gate, up, down = F.pad(gate, (0, 0, 0, room)), F.pad(up, (0, 0, 0, room)), F.pad(down, (0, room))
        return self.linear(gate, up, norm=norm), self.linear(down)

    def fits(self, weight: Tensor) -> bool:
        """Whether rows are whole groups; a matrix whose rows are not keeps its precision."""
        return self.quantization is not None and weight.shape[1] % self.quantization.group_size == 0


class FastAttention(nn.Module):
    """`Attention` with one matrix for queries, keys and values."""

    def __init__(self, attention: Attention, norm: nn.Module, make: _Parts) -> None:
        super().__init__()
        config = make.config
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.kv_heads, config.head_dim
        self.qk_norm = FastNorm(None, config.norm_eps) if config.qk_norm else None
        q, k = (
            _side_by_side(linear.weight, self.head_dim, self.head_dim, config.rope_interleaved)
            for linear in (attention.q_proj, attention.k_proj)
        )
        self.qkv = make.linear(q, k, attention.v_proj.weight, norm=norm)
        self.o = make.linear(attention.o_proj.weight)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        visible: Visible,
        memory: LayerCache | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, S, dim) -> (B, S, dim)."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        qk = _rotate(qkv[:, : self.heads + self.kv_heads], rotation)
        if self.qk_norm is not None:
            qk = self.qk_norm(qk)
        q, k = qk.split((self.heads, self.kv_heads), 1)
        v = qkv[:, self.heads + self.kv_heads :]
        if memory is not None and cache is not None:
            k, v = (seen.to(q.dtype) for seen in memory.update((k, v), cache))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible.mask, is_causal=visible.is_causal, enable_gqa=self.heads != self.kv_heads
        )
        return self.o(out.transpose(1, 2).flatten(2))


class FastLatentAttention(nn.Module):
    """`LatentAttention` with one matrix for both of its bottlenecks.

    The matrix that leads out of the memory is used in parts, from both sides: it keeps its dtype in 8 and 4 bits.
    """

    def __init__(self, attention: LatentAttention, norm: nn.Module, make: _Parts) -> None:
        super().__init__()
        config = make.config
        self.heads, self.rank = attention.heads, attention.rank
        self.nope, self.rope = attention.nope, attention.rope
        self.q_rank = attention.q_a_proj.out_features
        kv_a = _side_by_side(
            attention.kv_a_proj_with_mqa.weight, self.rank + self.rope, self.rope, config.rope_interleaved
        )
        self.qkv_a = make.linear(attention.q_a_proj.weight, kv_a, norm=norm)
        self.q_norm, self.kv_norm = make.norm(attention.q_a_layernorm), make.norm(attention.kv_a_layernorm, folds=False)
        q_b = _side_by_side(attention.q_b_proj.weight, self.nope + self.rope, self.rope, config.rope_interleaved)
        self.q_b = make.linear(q_b, norm=attention.q_a_layernorm)
        self.kv_b = FastLinear(attention.kv_b_proj.weight.clone())
        self.o = make.linear(attention.o_proj.weight)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        visible: Visible,
        memory: LayerCache | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, S, dim) -> (B, S, dim)."""
        q, kv = self.qkv_a(x).split((self.q_rank, self.rank + self.rope), -1)
        q = self.q_b(self.q_norm(q)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q_nope, q_rope = q.split((self.nope, self.rope), -1)
        latent, k_rope = kv[:, None].split((self.rank, self.rope), -1)
        latent = self.kv_norm(latent)
        q_rope, k_rope = _rotate(q_rope, rotation), _rotate(k_rope, rotation)
        if memory is not None and cache is not None:
            latent, k_rope = (seen.to(q.dtype) for seen in memory.update((latent, k_rope), cache))
        out = attend_latent(q_nope, q_rope, latent, k_rope, self.kv_b, visible, remembers=memory is not None)
        return self.o(out.transpose(1, 2).flatten(2))


class FastLayer(nn.Module):
    def __init__(self, layer: nn.Module, make: _Parts) -> None:
        super().__init__()
        mlp, before, between = (
            getattr(layer, name) for name in (make.config.mlp_name, "input_layernorm", "post_attention_layernorm")
        )
        attention = layer.self_attn
        self.attention_norm = make.norm(before)
        self.attention: FastAttention | FastLatentAttention
        if isinstance(attention, LatentAttention):
            self.attention = FastLatentAttention(attention, before, make)
        else:
            assert isinstance(attention, Attention)
            self.attention = FastAttention(attention, before, make)
        self.mlp_norm = make.norm(between)
        self.gate_up, self.down = make.swiglu(mlp, between)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        visible: Visible,
        memory: LayerCache | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, S, dim) -> (B, S, dim)."""
        x = x + self.attention(self.attention_norm(x), rotation, visible, memory, cache)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)

    def native_layer(self) -> CLayer:
        assert isinstance(self.attention, FastAttention)
        linears = (self.attention.qkv, self.attention.o, self.gate_up, self.down)
        norms = (self.attention_norm, self.mlp_norm)
        return CLayer(*(linear.native_matrix() for linear in linears), *(address(norm.weight) for norm in norms))


class FastStack(nn.Module):
    def __init__(self, model: Decoder, make: _Parts) -> None:
        super().__init__()
        stack, config = model.model, make.config
        embedding = stack.embed_tokens.weight.detach()
        self.embed_tokens: nn.Embedding | QuantizedEmbedding
        if make.quantization is None or not make.fits(embedding):
            self.embed_tokens = nn.Embedding.from_pretrained(embedding.clone())
        else:
            self.embed_tokens = QuantizedEmbedding(embedding, BITS[make.quantization.to], make.quantization.group_size)
        self.layers = nn.ModuleList(FastLayer(layer, make) for layer in stack.layers)
        self.norm = make.norm(stack.norm, folds=False)
        with torch.device("meta"):
            self.rotary = FastRotary(config.context_length, config.rotary_dim, config.rope_theta)
        self.rotary.cos, self.rotary.sin = stack.rotary.cos.clone(), stack.rotary.sin.clone()


PARTS = (  # that the library computes
    *(FastStack, FastLayer, FastAttention, FastNorm, FastRotary, FastLinear, QuantizedLinear, QuantizedEmbedding),
    *(nn.Embedding, nn.ModuleList),
)


class FastDecoder(Decoder):
    """`Decoder` for inference. `model` keeps its weights; of a model on the meta device this is the empty form."""

    def __init__(self, model: Decoder, quantization: Quantization | None = None) -> None:
        nn.Module.__init__(self)
        self.config, self.quantization = model.config, quantization
        make = _Parts(model.config, model.model.embed_tokens.weight.dtype, quantization)
        self.model = FastStack(model, make)  # type: ignore[assignment]
        if not model.config.tie_embeddings:
            self.head = make.linear(model.lm_head.weight)
        if quantization is not None and not any(isinstance(part, QuantizedLinear) for part in self.modules()):
            raise ConfigError(
                f"Groups of {quantization.group_size} fit into the rows of no matrix of this model, which are "
                f"{model.config.dim} and {model.config.hidden_range} wide: choose a smaller group_size, if "
                "there is one."
            )
        self.grad_checkpointing = False
        self._native: NativeStep | None = None
        self._is_whole = True
        self.register_load_state_dict_post_hook(_forget)
        self.requires_grad_(False)
        super().train(False)
        for name in ("pretrained_cfg", "default_cfg", "_model_args", "load_report"):  # which model this is
            if name in model.__dict__:
                self.__dict__[name] = model.__dict__[name]

    def fast_form(self) -> FastDecoder:
        return self

    def train(self, mode: bool = True) -> FastDecoder:
        """Raises ConfigError for training in 8 and 4 bits."""
        if mode and self.quantization is not None:
            raise ConfigError(
                f"Weights in {self.quantization.to} have no gradients: train the model as it was, then quantise it."
            )
        super().train(mode)
        return self

    @property
    def head_weight(self) -> Tensor:
        """(vocab_size, dim): what turns features into logits; made anew each time in 8 and 4 bits."""
        head = self.model.embed_tokens if self.config.tie_embeddings else self.head
        return head.dequantize(self.model.norm.weight.dtype) if isinstance(head, QuantizedLinear) else head.weight

    def make_cache(
        self,
        batch_size: int = 1,
        max_length: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        static_shapes: bool = False,
    ) -> KVCache:
        """As of `Decoder`; in 8 and 4 bits keys and values are kept in bfloat16 by default."""
        if dtype is None and self.quantization is not None:
            dtype = torch.bfloat16
        return super().make_cache(batch_size, max_length, dtype=dtype, static_shapes=static_shapes)

    def forward_head(self, features: Tensor) -> Tensor:
        """(..., dim) -> (..., vocab_size)."""
        head = self.model.embed_tokens if self.config.tie_embeddings else self.head
        return head.linear(features) if isinstance(head, QuantizedLinear) else _linear(features, self.head_weight)

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
        """As of `Decoder`. One token of one sequence, after what a cache holds, is the library's to compute."""
        if cache is not None and _plain(tokens) and (tokens.shape[-1:] != (1,) or not cache.length):
            self._look_again()
        if cache is not None and tokens.shape == (1, 1) and targets is None and positions is None:
            native = self._library_for(tokens, cache) if logits_to_keep in (None, 1) else None
            if native is not None:
                self._check(tokens, None)
                self._check_cache(cache)
                cache.begin(1, 1, None)
                step = self._native = self._native or self._native_step()
                logits = step(native, int(tokens), cache)
                cache.advance(1)
                return logits.view(1, 1, -1).to(self.model.norm.weight.dtype)
        return super().forward(tokens, targets, cache, positions, logits_to_keep=logits_to_keep, z_loss=z_loss)

    # ------------------------------------------------------------------------------------------------------- native

    def _library_for(self, tokens: Tensor, cache: KVCache) -> Any:
        """The library, where it can do what is asked."""
        config, weight = self.config, self.model.norm.weight
        layers: Any = self.model.layers
        if (
            config.kv_rank is not None
            or not self._is_whole
            or cache.positions is not None
            or cache.device.type != "cpu"
            or not _plain(tokens)
            or not _plain(weight)
            or weight.dtype not in native_step.KINDS
            or cache.layers[0].tensors[0].dtype not in native_step.KINDS
            # parts of gate and up are whole blocks
            or (self.quantization is not None and any(layer.down.in_features % 16 for layer in layers))
            or torch.is_autocast_enabled("cpu")
        ):
            return None
        return native_step.library()

    def _look_again(self) -> None:
        """As a sequence begins (for each token it would take too long): weights and parts may be others now."""
        self._native = None
        parts = [part for part in self.modules() if part is not self]
        norms = [part for part in parts if isinstance(part, FastNorm)]
        attentions = [part for part in parts if isinstance(part, FastAttention)]
        self._is_whole = (
            not has_hooks(*parts)
            and all(type(part) in PARTS and "forward" not in part.__dict__ for part in parts)
            and all(norm.eps == self.config.norm_eps for norm in norms)
            and all((attention.qk_norm is not None) == self.config.qk_norm for attention in attentions)
        )

    def _native_step(self) -> NativeStep:
        config, stack = self.config, self.model
        norm = stack.norm.weight.float()
        keep: list[Tensor] = []
        layers = []
        for stored in stack.layers:
            assert isinstance(stored, FastLayer)
            layer = stored.native_layer()
            for name in ("attention_norm", "mlp_norm"):
                weight = getattr(stored, name).weight
                if weight is not None:
                    keep.append(weight.float())
                    setattr(layer, name, address(keep[-1]))
            layers.append(layer)
        embedding, head = (
            float_matrix(part.weight) if isinstance(part, nn.Embedding) else part.native_matrix()
            for part in (stack.embed_tokens, stack.embed_tokens if config.tie_embeddings else self.head)
        )
        return NativeStep(
            sizes=(
                config.dim,
                config.num_heads,
                config.kv_heads,
                config.head_dim,
                max(layer.down.cols for layer in layers),
                len(config.executed),
                int(config.qk_norm),
            ),
            eps=config.norm_eps,
            rotary=(stack.rotary.cos, stack.rotary.sin),
            norm=norm,
            embedding=embedding,
            head=head,
            layers=[layers[stored] for stored in config.executed],
            # detached, they keep their memory where a parameter's `data` is replaced
            keep=[*keep, *(tensor.detach() for tensor in (*self.parameters(), *self.buffers()))],
        )

    def _apply(self, fn: Any, recurse: bool = True) -> FastDecoder:
        self._native = None  # tensors move
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_native": None}


def _forget(module: nn.Module, *_: Any) -> None:
    module._native = None  # type: ignore[assignment]
