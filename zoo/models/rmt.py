"""RMT: vision transformers whose attention decays with Manhattan distance.

Fan, Huang, Chen, Liu, He, "RMT: Retentive Networks Meet Vision Transformers", CVPR 2024, arXiv 2309.11523.

What makes it compact: attention weights fall off with the distance between two pixels, a prior that costs no weights,
and because Manhattan distance is the sum of a horizontal and a vertical one, attention over the whole map comes apart
into attention along rows and then along columns: O(HW(H + W)) instead of O((HW)^2) for the many tokens of the first
stages.

Where this file departs from the paper it follows the authors' code: the decay is added to the logits as its logarithm
before the softmax (the paper multiplies the softmax with it), the rotary frequencies run to their end point, and a
token's rotation is that of its index in the flattened map, in rows and columns too. Keys within a block are the
authors'; stem, stages and head are named as in the zoo's other families, and the downsampling between two stages
belongs to the later one, so that a stage ends with its feature map.

The models with token labels classify every token besides, and add half of the best token's logits to the image's. In
training, too, this model gives that sum; the authors' training mixes tokens of two images and holds the tokens to the
labels of a teacher. `forward_tokens` gives both logits apart, for such a loss.
"""

import copy
import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates, trunc_normal_, use_fused_attn
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from zoo.errors import CheckpointError, ConfigError
from zoo.layers.arguments import (
    check_above_zero,
    check_counts,
    check_numbers_or_none,
    check_rates,
    check_widths,
    per_stage,
)
from zoo.layers.fast_form import HasFastForm
from zoo.layers.folding import fold_batch_norm, fold_scale
from zoo.layers.init import init_weights
from zoo.layers.mix_token import exchange_tokens
from zoo.layers.staged import Head, StagedNet
from zoo.registry import Entry, Paper, Reported, Weights, register

__all__ = ["RMT", "ManhattanAttention"]

_logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------- relative positions (3.1-2)


@torch.fx.wrap
def relative_positions(
    x: Tensor, num_heads: int, head_dim: int, decay_init: float, decay_range: float, decomposed: bool
) -> list[Tensor]:
    """Rotary tables and logarithmic decays for maps like `x` (B, H, W, C), in float32, or float64 if `x` is.

    Returns [sin, cos], each (H, W, 1, head_dim / 2), and then the decays between any two tokens, (num_heads, HW, HW),
    or, if `decomposed`, within rows, (num_heads, W, W), and within columns, (num_heads, H, H).
    """
    H, W = x.shape[1], x.shape[2]
    # published as float32 buffers; in half precision the phases, which reach HW, would be noise
    angle = 1.0 / torch.pow(10000.0, torch.linspace(0.0, 1.0, head_dim // 2, dtype=torch.float32, device=x.device))
    head = torch.arange(num_heads, dtype=torch.float32, device=x.device)
    decay = torch.log(1.0 - torch.pow(2.0, -decay_init - decay_range * head / num_heads))
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    angle, decay = angle.to(dtype), decay.to(dtype)[:, None, None]
    rows, columns = torch.arange(H, device=x.device), torch.arange(W, device=x.device)
    phase = (rows[:, None] * W + columns)[:, :, None, None] * angle
    within_row = (columns[:, None] - columns).abs()
    within_column = (rows[:, None] - rows).abs()
    if decomposed:
        return [phase.sin(), phase.cos(), decay * within_row, decay * within_column]
    distance = (within_column[:, None, :, None] + within_row[None, :, None, :]).reshape(H * W, H * W)
    return [phase.sin(), phase.cos(), decay * distance]


class RelativePositions(nn.Module):
    """`relative_positions` of one stage, for all its blocks."""

    def __init__(self, num_heads: int, head_dim: int, decay_init: float, decay_range: float, decomposed: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.decay_init = decay_init
        self.decay_range = decay_range
        self.decomposed = decomposed

    def forward(self, x: Tensor) -> list[Tensor]:
        return relative_positions(x, self.num_heads, self.head_dim, self.decay_init, self.decay_range, self.decomposed)


def rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels by its phase. (B, H, W, heads, d), tables (H, W, 1, d/2)."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, fused: bool) -> Tensor:
    """softmax(q k / sqrt(d) + decay) v. (N, heads, L, d) and decay (heads, L, L) -> (N, heads, L, d)"""
    decay = decay.to(q.dtype)
    if fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=decay.unsqueeze(0))
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + decay).softmax(dim=-1) @ v


def attend_over_map(q: Tensor, k: Tensor, v: Tensor, positions: list[Tensor], decomposed: bool, fused: bool) -> Tensor:
    """Attention over the whole map, or, if `decomposed`, along rows and then along columns.

    (B, H, W, heads, d) -> (B, H, W, heads * d)
    """
    B, H, W, heads, d = q.shape
    if not decomposed:
        q, k, v = (t.reshape(B, H * W, heads, d).transpose(1, 2) for t in (q, k, v))
        return attend(q, k, v, positions[2], fused).transpose(1, 2).reshape(B, H, W, heads * d)
    rows = [t.reshape(B * H, W, heads, d).transpose(1, 2) for t in (q, k, v)]
    v = attend(rows[0], rows[1], rows[2], positions[2], fused).transpose(1, 2).reshape(B, H, W, heads, d)
    columns = [t.transpose(1, 2).reshape(B * W, H, heads, d).transpose(1, 2) for t in (q, k, v)]
    x = attend(columns[0], columns[1], columns[2], positions[3], fused)
    return x.transpose(1, 2).reshape(B, W, H, heads * d).transpose(1, 2)


# --------------------------------------------------------------------------------------------------------------- blocks


class DWConv(nn.Module):
    """Depthwise convolution. (B, H, W, C) -> (B, H, W, C)"""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ManhattanAttention(nn.Module):
    """Manhattan self-attention with local enhancement (section 3.2, equations 5 to 7). (B, H, W, C) -> (B, H, W, C)"""

    def __init__(self, dim: int, num_heads: int, decomposed: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.decomposed = decomposed
        self.fused_attn = use_fused_attn()
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.lepe = DWConv(dim, 5)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, positions: list[Tensor]) -> Tensor:
        B, H, W, C = x.shape
        heads = (B, H, W, self.num_heads, C // self.num_heads)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        sin, cos = positions[0], positions[1]
        q, k = rotate(q.reshape(heads), sin, cos), rotate(k.reshape(heads), sin, cos)
        attended = attend_over_map(q, k, v.reshape(heads), positions, self.decomposed, self.fused_attn)
        return self.out_proj(attended + self.lepe(v))


class FeedForward(nn.Module):
    """Two linear layers and, on the hidden map, a depthwise convolution with a shortcut. (B, H, W, C) -> the same"""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.dwconv = DWConv(hidden, 3)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.fc1(x))
        return self.fc2(x + self.dwconv(x))


class RetentionBlock(nn.Module):
    """Position by convolution, attention, feed-forward, each beside a shortcut. (B, H, W, C) -> (B, H, W, C)"""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        decomposed: bool,
        mlp_ratio: float,
        layer_scale_init: float | None,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.layer_scale_init = layer_scale_init
        self.pos = DWConv(dim, 3)
        self.retention_layer_norm = nn.LayerNorm(dim, eps=1e-6)
        self.retention = ManhattanAttention(dim, num_heads, decomposed)
        self.final_layer_norm = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = FeedForward(dim, mlp_ratio)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        scaled = layer_scale_init is not None
        # four axes as published, which is why weight decay reaches them
        self.gamma_1 = nn.Parameter(torch.empty(1, 1, 1, dim)) if scaled else None
        self.gamma_2 = nn.Parameter(torch.empty(1, 1, 1, dim)) if scaled else None

    def reset_parameters(self) -> None:
        for gamma in (self.gamma_1, self.gamma_2):
            if gamma is not None and self.layer_scale_init is not None:
                nn.init.constant_(gamma, self.layer_scale_init)

    def forward(self, x: Tensor, positions: list[Tensor]) -> Tensor:
        x = x + self.pos(x)
        branch = self.retention(self.retention_layer_norm(x), positions)
        x = x + self.drop_path(branch if self.gamma_1 is None else self.gamma_1 * branch)
        branch = self.ffn(self.final_layer_norm(x))
        return x + self.drop_path(branch if self.gamma_2 is None else self.gamma_2 * branch)


class Stem(nn.Module):
    """Four 3x3 convolutions with batch norms, two of them of stride 2. (B, in_chans, H, W) -> (B, dim, H/4, W/4)"""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, 2, 1)
        self.norm1 = nn.BatchNorm2d(dim // 2)
        self.conv2 = nn.Conv2d(dim // 2, dim // 2, 3, 1, 1)
        self.norm2 = nn.BatchNorm2d(dim // 2)
        self.conv3 = nn.Conv2d(dim // 2, dim, 3, 2, 1)
        self.norm3 = nn.BatchNorm2d(dim)
        self.conv4 = nn.Conv2d(dim, dim, 3, 1, 1)
        self.norm4 = nn.BatchNorm2d(dim)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.conv1(x)))
        x = self.act(self.norm2(self.conv2(x)))
        x = self.act(self.norm3(self.conv3(x)))
        return self.norm4(self.conv4(x))


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2 and its batch norm. (B, C, H, W) -> (B, C', H/2, W/2)"""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, 3, 2, 1)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class RetentionStage(HasFastForm):
    """Downsampling and the blocks of one resolution. (B, C, H, W) -> (B, C', H', W')"""

    def __init__(self, downsample: nn.Module, positions: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.positions = positions
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x).permute(0, 2, 3, 1).contiguous()
        positions = self.positions(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, positions)
            else:
                x = block(x, positions)
        return x.permute(0, 3, 1, 2)

    def fast_form(self) -> nn.Module | None:
        """Batch norm folded, positions cached, and every block in its own fast form."""
        if not isinstance(self.positions, RelativePositions):  # this is one
            return None
        downsample: nn.Module = self.downsample
        if isinstance(downsample, Downsample):
            downsample = fold_batch_norm(downsample.conv, downsample.norm)
        blocks = [FastBlock(cast(RetentionBlock, block)) for block in self.blocks]
        return RetentionStage(downsample, CachedPositions(self.positions), blocks)


# ----------------------------------------------------------------------------------------------------------- fast forms


class CachedPositions(nn.Module):
    """The tables of `positions`, computed once for each of the last few sizes, devices and dtypes."""

    def __init__(self, positions: RelativePositions, size: int = 8) -> None:
        super().__init__()
        self.positions = positions
        self.size = size
        self.cache: dict[Any, list[Tensor]] = {}

    def forward(self, x: Tensor) -> list[Tensor]:
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor:
            return self.positions(x)  # a tensor of a trace must not outlive it
        key = (*x.shape[1:3], x.device, x.dtype)
        if key not in self.cache:
            if len(self.cache) >= self.size:
                self.cache.pop(next(iter(self.cache)))
            with torch.inference_mode(False):  # whose tensors could not be used outside it
                sin, cos, *decays = self.positions(x)
                self.cache[key] = [sin, cos, *(decay.to(x.dtype) for decay in decays)]
        return self.cache[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "cache": {}}


def plus_input(layer: DWConv) -> DWConv:
    """`x + layer(x)` as one layer: one more in the middle of each kernel."""
    fast, size = copy.deepcopy(layer), layer.conv.kernel_size[0]
    fast.conv.weight[:, :, size // 2, size // 2] += 1
    return fast


class FastBlock(nn.Module):
    """`RetentionBlock` with one projection for query, key and value, shortcuts and layer scales in the weights.

    The channels of queries and keys are sorted, alike in both, so that the pairs that turn together lie in two halves.
    """

    def __init__(self, block: RetentionBlock) -> None:
        super().__init__()
        attention, ffn = block.retention, block.ffn
        self.num_heads = attention.num_heads
        self.decomposed = attention.decomposed
        self.fused_attn = attention.fused_attn
        dim = attention.q_proj.in_features
        order = torch.arange(dim).view(self.num_heads, -1, 2).transpose(1, 2).flatten()
        layers = (attention.q_proj, attention.k_proj, attention.v_proj)
        orders = (order, order, torch.arange(dim))
        self.qkv = nn.Linear(dim, 3 * dim, device="meta")
        self.qkv.weight = nn.Parameter(torch.cat([layer.weight[i] for layer, i in zip(layers, orders, strict=True)]))
        self.qkv.bias = nn.Parameter(torch.cat([layer.bias[i] for layer, i in zip(layers, orders, strict=True)]))
        self.pos = plus_input(block.pos)
        self.norm1 = block.retention_layer_norm
        self.lepe = attention.lepe
        self.proj = attention.out_proj if block.gamma_1 is None else fold_scale(attention.out_proj, block.gamma_1)
        self.norm2 = block.final_layer_norm
        self.fc1 = ffn.fc1
        self.act = ffn.act
        self.dwconv = plus_input(ffn.dwconv)
        self.fc2 = ffn.fc2 if block.gamma_2 is None else fold_scale(ffn.fc2, block.gamma_2)

    def forward(self, x: Tensor, positions: list[Tensor]) -> Tensor:
        x = self.pos(x)
        B, H, W, C = x.shape
        qkv = self.qkv(self.norm1(x))
        d = C // self.num_heads
        sin, cos = positions[0].unsqueeze(2), positions[1].unsqueeze(2)  # (H, W, 1, 1, d/2)
        # queries and keys at once: (B, H, W, 2, heads, d/2) twice
        a, b = qkv[..., : 2 * C].view(B, H, W, 2, self.num_heads, d).chunk(2, dim=-1)
        q, k = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(qkv.dtype).unbind(3)
        v = qkv[..., 2 * C :]
        attended = attend_over_map(
            q, k, v.unflatten(-1, (self.num_heads, d)), positions, self.decomposed, self.fused_attn
        )
        x = x + self.proj(attended + self.lepe(v))
        return x + self.fc2(self.dwconv(self.act(self.fc1(self.norm2(x)))))


# ---------------------------------------------------------------------------------------------------------------- model


class RetentionHead(Head):
    """Projection, batch norm, SiLU, pooling and the classifier. (B, C, H, W) -> (B, num_classes)

    With `token_label`, every token is classified besides, and half of the largest of its logits is added.
    """

    def __init__(
        self, dim: int, hidden: int, num_classes: int, global_pool: str, drop: float, token_label: bool
    ) -> None:
        super().__init__(hidden, num_classes, global_pool, norm=nn.BatchNorm2d(hidden), norm_first=True, drop_rate=drop)
        self.token_label = token_label
        self.proj: nn.Module = nn.Linear(dim, hidden)
        self.act: nn.Module = nn.SiLU()
        self.aux = nn.Linear(dim, num_classes) if num_classes and token_label else None

    def drop_projection(self) -> None:
        self.proj, self.norm, self.act = nn.Identity(), nn.Identity(), nn.Identity()

    def tokens(self, x: Tensor) -> Tensor:
        """Logits of every token: (B, C, H, W) -> (B, H * W, num_classes)."""
        x = x.flatten(2).transpose(1, 2)
        return x if self.aux is None else self.aux(x)

    def image(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of the image without the tokens'."""
        x = self.proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.flatten(self.global_pool(self.act(self.norm(x))))
        return x if pre_logits else self.fc(self.drop(x))

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        logits = self.image(x, pre_logits)
        if self.aux is None or pre_logits:
            return logits
        return logits + 0.5 * self.tokens(x).amax(dim=1)

    def fast_form(self) -> nn.Module:
        """The batch norm folded into the projection."""
        norm: Any = self.norm
        if type(self.proj) is nn.Linear and type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm):
            self.proj, self.norm = fold_batch_norm(self.proj, norm), nn.Identity()
        return self


class RMT(StagedNet):
    """A four-stage network of blocks with Manhattan self-attention. (B, in_chans, H, W) -> (B, num_classes)

    The defaults are those of RMT-T. Any number of stages and any input size works; a map's width enters the phases of
    its columns (see above), so padding an image changes its features.

    Args:
        in_chans: channels of the input.
        num_classes: width of the classifier; 0 leaves it out.
        global_pool: "avg", "max", "avgmax" (their mean), or "" for none (only without a classifier).
        depths: blocks of each stage.
        dims: width of each stage.
        num_heads: of the attention in each stage; each head needs an even number of channels.
        mlp_ratio: hidden width of the feed-forward layers over the width, one for all stages or one for each.
        decay_init: head h of n loses the factor 1 - 2^(-decay_init - decay_range * h / n) of its attention per pixel.
        decay_range: one for all stages or one for each.
        decomposed: attend along rows and then along columns (else over the whole map), one for all or for each stage.
        layer_scale_init: initial LayerScale of both branches, one for all stages or one for each; None for none.
        head_hidden_size: width of the projection before the classifier.
        token_label: classify every token, too, and add half of the largest logits.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, growing linearly from 0 at the first block to this at the last.

    Raises ConfigError for values that cannot be.
    """

    if TYPE_CHECKING:
        head: RetentionHead

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: Sequence[int] = (64, 128, 256, 512),
        num_heads: Sequence[int] = (4, 4, 8, 16),
        mlp_ratio: float | Sequence[float] = 3.0,
        decay_init: float = 2.0,
        decay_range: float | Sequence[float] = (4.0, 4.0, 6.0, 6.0),
        decomposed: bool | Sequence[bool] = (True, True, False, False),
        layer_scale_init: float | Sequence[float | None] | None = None,
        head_hidden_size: int = 1024,
        token_label: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        depths, dims, num_heads = check_widths(depths=depths, dims=dims, num_heads=num_heads)
        for dim, heads in zip(dims, num_heads, strict=True):
            if dim % (2 * heads) or dim // heads < 4:
                raise ConfigError(
                    f"Each head turns pairs of channels, at least two: {dim} channels do not give {heads} heads that."
                )
        check_counts(1, head_hidden_size=head_hidden_size)
        check_rates(drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        check_above_zero(mlp_ratio=mlp_ratio, decay_init=decay_init, decay_range=decay_range)
        stages = len(depths)
        mlp_ratios = per_stage("mlp_ratio", mlp_ratio, stages)
        decay_ranges = per_stage("decay_range", decay_range, stages)
        decompositions = [bool(value) for value in per_stage("decomposed", decomposed, stages)]
        layer_scales = per_stage("layer_scale_init", layer_scale_init, stages)
        check_numbers_or_none(layer_scale_init=layer_scales)

        super().__init__(dims, tuple(4 * 2**i for i in range(stages)), in_chans, num_classes)
        self.head_hidden_size = head_hidden_size
        self.drop_rate = drop_rate
        self.stem = Stem(in_chans, dims[0])
        drop_paths = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        self.stages = nn.Sequential()
        for i, dim in enumerate(dims):
            blocks = [
                RetentionBlock(dim, num_heads[i], decompositions[i], mlp_ratios[i], layer_scales[i], drop_path)
                for drop_path in drop_paths[i]
            ]
            positions = RelativePositions(
                num_heads[i], dim // num_heads[i], float(decay_init), float(decay_ranges[i]), decompositions[i]
            )
            self.stages.append(RetentionStage(Downsample(dims[i - 1], dim) if i else nn.Identity(), positions, blocks))
        self.head = RetentionHead(dims[-1], head_hidden_size, num_classes, global_pool, drop_rate, token_label)
        init_weights(self)

    def init_module(self, module: nn.Module) -> None:
        """Initialise the tensors that `module` itself holds, as the authors' code does."""
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        else:  # convolutions keep PyTorch's initialisation
            module.reset_parameters()  # type: ignore[operator]

    def drop_head_norm(self) -> None:
        """The projection, which the norm is of, goes with it."""
        self.head.drop_projection()
        self.head_hidden_size = self.num_features

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """A fresh classifier of another width (0: none), another pooling; `reset_other` drops the projection."""
        super().reset_classifier(num_classes, global_pool, reset_other)
        if self.head.token_label:
            like = next(self.stem.parameters())
            self.head.aux = None
            if num_classes:
                self.head.aux = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
                self.init_module(self.head.aux)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | tuple[int, ...] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of the stages in `indices` (the last n if a number, all if None), and the final map.

        `norm` changes nothing: the only norm behind the last stage is that of the projection to another width.
        """
        return super().forward_intermediates(x, indices, False, stop_early, output_fmt, intermediates_only)

    def prune_intermediate_layers(
        self, indices: int | list[int] | tuple[int, ...] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last one in `indices`, and the head; returns the indices of those kept."""
        return super().prune_intermediate_layers(indices, prune_norm=True, prune_head=prune_head)

    @torch.jit.ignore
    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the tokens that `forward_tokens` classifies in an image of `height` x `width`.

        Raises ConfigError for a model without `token_label`.
        """
        self._check_tokens()
        pixels = self.feature_info[-1]["reduction"]
        return -(-height // pixels), -(-width // pixels)

    @torch.jit.ignore
    def forward_tokens(self, x: Tensor, exchanged: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits of the image, (B, num_classes), and of each token of the last map, (B, H/32 * W/32, num_classes).

        Where `exchanged` (H/32, W/32), bool, is true, the stem's map of image i gives place to that of image B - 1 - i
        (MixToken, arXiv 2104.10858). Raises ConfigError for a model without `token_label`.
        """
        self._check_tokens()
        x = self.stem(x)
        if exchanged is not None:
            x = exchange_tokens(x, exchanged, 2 ** (len(self.stages) - 1))
        x = self.stages(x)
        return self.head.image(x), self.head.tokens(x)

    def _check_tokens(self) -> None:
        if self.head.aux is None:
            raise ConfigError("Only a model with token_label=True classifies its tokens.")


# ---------------------------------------------------------------------------------------------------------- checkpoints


def convert(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A published checkpoint in our layout. Takes qhfan/RMT's layout, and ours.

    The tables of relative positions, which are stored there, are computed here. Weights trained with token labels fit
    the plain model of their size without their second classifier; a warning says so.
    """
    if "patch_embed.proj.0.weight" not in state_dict:
        return state_dict
    aux = state_dict.get("aux_head.weight")
    own = model.state_dict(keep_vars=True).get("head.aux.weight")
    if aux is not None and own is None and "head.fc.weight" in model.state_dict(keep_vars=True):
        _logger.warning(
            "aux_head is left out, as the model has no token_label: it computes the authors' main head alone, which is "
            "less accurate than what they state for these weights."
        )
    if aux is not None and own is not None and aux.shape[1] != own.shape[1]:
        raise CheckpointError(
            f"aux_head reads {aux.shape[1]} channels, where the authors' released code gives it {own.shape[1]}: what "
            "it computed is not known. Load these weights into the model without token_label, which leaves it out."
        )
    converted = {}
    for key, tensor in state_dict.items():
        if ".Relpos." not in key and not (key.startswith("aux_head.") and own is None):
            converted[_rename(key)] = tensor
    return converted


def _rename(key: str) -> str:
    if match := re.match(r"patch_embed\.proj\.(\d+)\.(.*)", key):
        place = int(match[1])
        return f"stem.{'norm' if place % 3 else 'conv'}{place // 3 + 1}.{match[2]}"
    if match := re.match(r"layers\.(\d+)\.downsample\.(reduction|norm)\.(.*)", key):
        part = "conv" if match[2] == "reduction" else "norm"
        return f"stages.{int(match[1]) + 1}.downsample.{part}.{match[3]}"
    key = re.sub(r"^head\.", "head.fc.", key)
    key = re.sub(r"^aux_head\.", "head.aux.", key)
    key = re.sub(r"^(proj|norm)\.", r"head.\1.", key)
    return re.sub(r"^layers\.", "stages.", key)


# ------------------------------------------------------------------------------------------------------------- variants

PAPER = Paper(
    title="RMT: Retentive Networks Meet Vision Transformers",
    authors="Fan, Huang, Chen, Liu, He",
    venue="CVPR 2024",
    arxiv="2309.11523",
)
README = "README of qhfan/RMT"
COSTS_NOTE = (
    "The authors' MACs are 5 to 7% below what fvcore counts in their code (conv, linear, attention), and they state no "
    "convention."
)

SIZES: dict[str, dict[str, Any]] = {
    "t": {
        "depths": (2, 2, 8, 2),
        "dims": (64, 128, 256, 512),
        "num_heads": (4, 4, 8, 16),
        "mlp_ratio": 3.0,
        "decay_range": (4.0, 4.0, 6.0, 6.0),
        "decomposed": (True, True, False, False),
    },
    "s": {
        "depths": (3, 4, 18, 4),
        "dims": (64, 128, 256, 512),
        "num_heads": (4, 4, 8, 16),
        "mlp_ratio": (4.0, 4.0, 3.0, 3.0),
        "decay_range": (4.0, 4.0, 6.0, 6.0),
        "decomposed": (True, True, True, False),
    },
    "b": {
        "depths": (4, 8, 25, 8),
        "dims": (80, 160, 320, 512),
        "num_heads": (5, 5, 10, 16),
        "mlp_ratio": (4.0, 4.0, 3.0, 3.0),
        "decay_range": (5.0, 5.0, 6.0, 6.0),
        "decomposed": (True, True, True, False),
        "layer_scale_init": (None, None, 1e-6, 1e-6),
    },
    "l": {
        "depths": (4, 8, 25, 8),
        "dims": (112, 224, 448, 640),
        "num_heads": (7, 7, 14, 20),
        "mlp_ratio": (4.0, 4.0, 3.0, 3.0),
        "decay_range": 6.0,
        "decomposed": (True, True, True, False),
        "layer_scale_init": (None, None, 1e-6, 1e-6),
    },
}

# size, token labels: params (M) and MACs (G) as the authors state them, top-1 (%), share link and its password
for size, token_label, params, macs, top1, link, password in (
    ("t", False, 14, 2.5, 82.4, "1uTSCuPqYRNmT4Zb4Je9BOw", "vsyv"),
    ("s", False, 27, 4.5, 84.1, "1aQeErkmy191-zshlW2bT0g", "3ay4"),
    ("b", False, 54, 9.7, 85.0, "1ZDNl_broia_fvvlEoTaFhA", "yzge"),
    ("l", False, 95, 18.2, 85.5, "1v7QWgAh0TulWOTg4d94KHw", "uewu"),
    ("s", True, 27, 4.5, 84.8, "1Xjgko9_-rokfvP39uiwTqQ", "q37r"),
    ("b", True, 55, 9.7, 85.6, "1fqCzZ8Pfw39QA4LQ3dSiCg", "2rdt"),
    ("l", True, 96, 18.2, 86.1, "1KvV8IMJC6xG5Eh6w6uFbpw", "z1k2"),
):
    weights_note = f"On Baidu netdisk, password {password}. The authors state no licence for code or weights."
    if token_label:
        weights_note += " The accuracy is that of both heads."
    register(
        Entry(
            name=f"rmt_{size}{'_token_label' if token_label else ''}",
            build=RMT,
            family="rmt",
            args={**SIZES[size], **({"token_label": True} if token_label else {})},
            paper=PAPER,
            compact="Attention along rows and columns that decays with distance, by a prior without weights.",
            code_license="unstated",
            code_url="https://github.com/qhfan/RMT",
            reported=Reported(params=params * 1e6, macs=round(macs * 1e9), source=README),
            weights=(
                Weights(
                    tag="token_label_in1k" if token_label else "in1k",
                    page=f"https://pan.baidu.com/s/{link}",
                    license="unstated",
                    top1=top1,
                    accuracy_source=README,
                    crop_pct=0.96 if token_label else 0.875,
                    note=weights_note,
                ),
            ),
            convert=convert,
            first_conv="stem.conv1",
            classifier=("head.fc", "head.aux") if token_label else "head.fc",
            note=COSTS_NOTE
            + (
                " The log of the published S* states 27,992,240 parameters, whose second head the released code does "
                "not show: load those weights into rmt_s."
                if (size, token_label) == ("s", True)
                else ""
            ),
        )
    )

register(
    Entry(
        name="rmt_test",
        build=RMT,
        family="rmt",
        args={
            **SIZES["t"],
            "depths": (1, 1, 2, 1),
            "dims": (16, 32, 64, 64),
            "num_heads": (2, 2, 4, 4),
            "head_hidden_size": 128,
            "layer_scale_init": (None, None, 1e-6, 1e-6),
        },
        paper=PAPER,
        compact="A tiny one for tests and trials, not of the paper.",
        code_license="unstated",
        code_url="https://github.com/qhfan/RMT",
        convert=convert,
        input_size=(3, 64, 64),
        first_conv="stem.conv1",
        classifier="head.fc",
    )
)
