"""EMO and EMOv2: inverted residual blocks with attention inside.

Zhang et al., "Rethinking Mobile Block for Efficient Attention-based Models", ICCV 2023, arXiv 2301.01146 (EMO), and
Zhang et al., "EMOv2: Pushing 5M Vision Model Frontier", arXiv 2412.06674 (EMOv2).

What makes them compact: one kind of block serves all stages. It widens the channels, mixes neighbours by a depthwise
convolution, and narrows the channels again; in the last two stages the widened channels also attend to one another
within windows, with queries and keys of the narrow width. EMO's windows gather tokens from all over the map; EMOv2 adds
to these the ordinary windows of neighbours, with the same queries, keys and values.

Where this file departs from the papers it follows their code:

- EMO attends to the normalised input itself and widens what comes out; EMOv2 widens first, and sums both kinds of
  windows (it does not average them).
- Windows are padded with zeros behind the norm, and what is padded is attended to.
- EMOv2's layer scales, which start at 1e-6, are in the blocks without a shortcut as well.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, SqueezeExcite, calculate_drop_path_rates, use_fused_attn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zoo.errors import ConfigError
from zoo.layers.arguments import (
    check_above_zero,
    check_choice,
    check_counts,
    check_numbers_or_none,
    check_rates,
    check_widths,
    per_stage,
)
from zoo.layers.fast_form import HasFastForm
from zoo.layers.folding import batch_norm_affine, fold_affine, fold_batch_norm, fold_scale
from zoo.layers.init import init_weights
from zoo.layers.observers import channels_last
from zoo.layers.staged import Head, Stage, StagedNet
from zoo.registry import Entry, Paper, Reported, Weights, register

__all__ = ["EMO"]

EPS = 1e-6  # of every norm


# -------------------------------------------------------------------------------------------------------------- windows
# A map of n1*w x n2*w pixels is cut into n1*n2 windows of w x w tokens. `remote` windows take every n1-th row and every
# n2-th column, so that each spans the map; the others take neighbours.


@torch.fx.wrap
def pad_to_windows(x: Tensor, window: int) -> Tensor:
    """Zeros at the bottom and the right, up to multiples of the window. (B, C, H, W) -> (B, C, Hp, Wp)."""
    down, right = -x.shape[2] % window, -x.shape[3] % window
    return F.pad(x, (0, right, 0, down)) if down > 0 or right > 0 else x


@torch.fx.wrap
def to_windows(x: Tensor, window: int, num_heads: int, remote: bool) -> Tensor:
    """(B, C, n1*w, n2*w) -> (B*n1*n2, num_heads, w*w, C/num_heads)"""
    B, C, H, W = x.shape
    n1, n2, D = H // window, W // window, C // num_heads
    if remote:
        x = x.reshape(B, num_heads, D, window, n1, window, n2).permute(0, 4, 6, 1, 3, 5, 2)
    else:
        x = x.reshape(B, num_heads, D, n1, window, n2, window).permute(0, 3, 5, 1, 4, 6, 2)
    return x.reshape(B * n1 * n2, num_heads, window * window, D)


@torch.fx.wrap
def from_windows(x: Tensor, window: int, height: int, width: int, remote: bool) -> Tensor:
    """What `to_windows` took, cropped: (B*n1*n2, num_heads, w*w, D) -> (B, num_heads*D, height, width)."""
    n1, n2 = (height + window - 1) // window, (width + window - 1) // window
    heads, D = x.shape[1], x.shape[3]
    x = x.reshape(-1, n1, n2, heads, window, window, D)
    x = x.permute(0, 3, 6, 4, 1, 5, 2) if remote else x.permute(0, 3, 6, 1, 4, 2, 5)
    return x.reshape(-1, heads * D, n1 * window, n2 * window)[:, :, :height, :width]


def attend(q: Tensor, k: Tensor, v: Tensor, fused: bool) -> Tensor:
    """(G, heads, N, D), (G, heads, N, D), (G, heads, N, E) -> (G, heads, N, E)"""
    if fused:
        return F.scaled_dot_product_attention(q, k, v)
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v


# --------------------------------------------------------------------------------------------------------------- blocks


class Expansion(nn.Module):
    """A 1x1 convolution and an activation. (B, dim, H, W) -> (B, hidden, H, W)."""

    def __init__(self, dim: int, hidden: int, act: nn.Module) -> None:
        super().__init__()
        self.v = nn.Conv2d(dim, hidden, 1)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.v(x))


class RemoteAttention(nn.Module):
    """EMO's: attention to the input within remote windows, then the expansion. (B, dim, H, W) -> (B, hidden, H, W)."""

    def __init__(self, dim: int, hidden: int, act: nn.Module, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.fused_attn = use_fused_attn()
        self.qk = nn.Conv2d(dim, 2 * dim, 1)
        self.v = nn.Conv2d(dim, hidden, 1)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2], x.shape[3]
        x = pad_to_windows(x, self.window)
        q, k = self.qk(x).chunk(2, dim=1)
        q = to_windows(q, self.window, self.num_heads, True)
        k = to_windows(k, self.window, self.num_heads, True)
        v = to_windows(x, self.window, self.num_heads, True)
        x = attend(q, k, v, self.fused_attn)
        return self.act(self.v(from_windows(x, self.window, H, W, True)))


class SpanningAttention(nn.Module):
    """EMOv2's: the expansion, then attention within remote windows plus attention within ordinary ones.

    (B, dim, H, W) -> (B, hidden, H, W)
    """

    def __init__(self, dim: int, hidden: int, act: nn.Module, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.fused_attn = use_fused_attn()
        self.qk = nn.Conv2d(dim, 2 * dim, 1)
        self.v = nn.Conv2d(dim, hidden, 1)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2], x.shape[3]
        x = pad_to_windows(x, self.window)
        q, k = self.qk(x).chunk(2, dim=1)
        v = self.act(self.v(x))
        return self.within(q, k, v, H, W, True) + self.within(q, k, v, H, W, False)

    def within(self, q: Tensor, k: Tensor, v: Tensor, height: int, width: int, remote: bool) -> Tensor:
        q = to_windows(q, self.window, self.num_heads, remote)
        k = to_windows(k, self.window, self.num_heads, remote)
        v = to_windows(v, self.window, self.num_heads, remote)
        return from_windows(attend(q, k, v, self.fused_attn), self.window, height, width, remote)


class DepthwiseConv(nn.Module):
    """Depthwise convolution, batch norm, SiLU. (B, dim, H, W) -> (B, dim, H/stride, W/stride), rounded up."""

    def __init__(self, dim: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel_size, stride, kernel_size // 2, groups=dim, bias=False)
        self.norm = nn.BatchNorm2d(dim, eps=EPS)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class LayerScale(nn.Module):
    """Multiplication of each channel of a map by a learned number."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.init = init
        self.gamma = nn.Parameter(torch.empty(dim))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.init)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.view(-1, 1, 1)


class InvertedResidual(HasFastForm):
    """iRMB of EMO and i2RMB of EMOv2: expansion, with attention or without, depthwise convolution, projection.

    (B, in_dim, H, W) -> (B, dim, H/stride, W/stride). Where the shape stays, two shortcuts: around the block, and
    around the depthwise convolution.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        norm: nn.Module,
        expand: nn.Module,
        kernel_size: int,
        stride: int,
        residual: bool,
        layer_scale_init: float | None,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.norm = norm
        self.expand = expand
        self.dwconv = DepthwiseConv(hidden, kernel_size, stride)
        self.proj = nn.Conv2d(hidden, dim, 1, bias=False)
        self.layer_scale = nn.Identity() if layer_scale_init is None else LayerScale(dim, layer_scale_init)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.expand(self.norm(x))
        if self.residual:
            return x + self.drop_path(self.layer_scale(self.proj(hidden + self.dwconv(hidden))))
        return self.layer_scale(self.proj(self.dwconv(hidden)))

    def fast_form(self) -> nn.Module:
        return FastInvertedResidual(self)


# ---------------------------------------------------------------------------------------------------------------- model


class SqueezeStem(HasFastForm):
    """EMO's: convolution of stride 2, depthwise convolution, squeeze-and-excitation, 1x1 convolution.

    (B, in_chans, H, W) -> (B, dim, H/2, W/2)
    """

    def __init__(self, in_chans: int, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, 3, 2, 1)
        self.norm = nn.BatchNorm2d(dim, eps=EPS)
        self.dwconv = DepthwiseConv(dim, kernel_size, 1)
        self.se = SqueezeExcite(dim, rd_channels=dim, act_layer=nn.SiLU)
        self.proj = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.se(self.dwconv(self.norm(self.conv(x)))))

    def fast_form(self) -> nn.Module:
        return FastStem(self)


class PlainStem(HasFastForm):
    """EMOv2's: convolution of stride 2, depthwise and 1x1 convolution. (B, in_chans, H, W) -> (B, dim, H/2, W/2)."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, 3, 2, 1)
        self.norm = nn.BatchNorm2d(dim, eps=EPS)
        self.act = nn.SiLU()
        self.dwconv = DepthwiseConv(dim, 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.dwconv(self.act(self.norm(self.conv(x)))))

    def fast_form(self) -> nn.Module:
        return FastStem(self)


class EMO(StagedNet):
    """Stages of inverted residual blocks, the last ones with attention. (B, in_chans, H, W) -> (B, num_classes).

    The defaults are those of `emo_1m`. Any number of stages works, and any input size.

    Args:
        in_chans: channels of the input.
        num_classes: width of the classifier; 0 leaves it out.
        global_pool: "avg", "max", "avgmax" (their mean), or "" for none (only without a classifier).
        depths: blocks of each stage; the first of each halves the resolution and has no attention.
        dims: width of each stage.
        mlp_ratio: hidden width of the blocks over the width of their input (rounded down), for each stage or one for
            all; twice that in the first block of a stage.
        kernel_size: of the depthwise convolutions, for each stage or one for all.
        attention: "remote" (EMO) or "spanning" (EMOv2).
        head_dim: width of attention's heads, for each stage or one for all; None for a stage without attention, whose
            norms are batch norms and activations SiLU, where those with attention have layer norms and GELU.
        window_size: side of attention's windows.
        stem_dim: width of the stem; None for half the first stage's.
        stem_se: whether the stem has squeeze-and-excitation (EMO), instead of an activation behind its first
            convolution (EMOv2).
        layer_scale_init: initial LayerScale of every block; None for none.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, growing linearly from 0 at the first block to this at the last.

    Raises ConfigError for values that cannot be.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        depths: Sequence[int] = (2, 2, 8, 3),
        dims: Sequence[int] = (32, 48, 80, 168),
        mlp_ratio: float | Sequence[float] = (2.0, 2.5, 3.0, 3.5),
        kernel_size: int | Sequence[int] = (3, 3, 5, 5),
        attention: Literal["remote", "spanning"] = "remote",
        head_dim: int | Sequence[int | None] | None = (None, None, 20, 21),
        window_size: int = 7,
        stem_dim: int | None = 24,
        stem_se: bool = True,
        layer_scale_init: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        depths, dims = check_widths(depths=depths, dims=dims)
        ratios = per_stage("mlp_ratio", mlp_ratio, len(dims))
        kernel_sizes = per_stage("kernel_size", kernel_size, len(dims))
        head_dims = per_stage("head_dim", head_dim, len(dims))
        stem_dim = dims[0] // 2 if stem_dim is None else stem_dim
        check_counts(1, window_size=window_size, stem_dim=stem_dim)
        check_above_zero(mlp_ratio=ratios)
        check_rates(drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        check_choice("attention", attention, tuple(ATTENTIONS))
        if not all(type(size) is int and size > 0 and size % 2 for size in kernel_sizes):
            raise ConfigError(f"kernel_size must be odd whole numbers, not {kernel_size!r}.")
        check_numbers_or_none(layer_scale_init=(layer_scale_init,))
        for dim, ratio, width in zip(dims, ratios, head_dims, strict=True):
            if width is not None and (type(width) is not int or width < 1 or dim % width):
                raise ConfigError(f"A stage of width {dim} cannot be split into heads of {width!r}: dims and head_dim.")
            if width is not None and attention == "spanning" and int(dim * ratio) % (dim // width):
                raise ConfigError(f"A hidden width of {int(dim * ratio)} cannot be split into {dim // width} heads.")

        reductions = tuple(4 * 2**i for i in range(len(dims)))
        super().__init__(dims, reductions, in_chans, num_classes)
        self.stem = SqueezeStem(in_chans, stem_dim, kernel_sizes[0]) if stem_se else PlainStem(in_chans, stem_dim)
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        before = stem_dim
        for i, dim in enumerate(dims):
            blocks = []
            for j in range(depths[i]):
                hidden = int(before * ratios[i] * (1 if j else 2))
                act: nn.Module = nn.SiLU() if head_dims[i] is None else nn.GELU()
                expand: nn.Module = Expansion(before, hidden, act)
                if j and head_dims[i] is not None:
                    expand = ATTENTIONS[attention](dim, hidden, act, dim // head_dims[i], window_size)
                blocks.append(
                    InvertedResidual(
                        dim,
                        hidden,
                        norm=nn.BatchNorm2d(before, eps=EPS) if head_dims[i] is None else LayerNorm2d(before, eps=EPS),
                        expand=expand,
                        kernel_size=kernel_sizes[i],
                        stride=1 if j else 2,
                        residual=j > 0,
                        layer_scale_init=layer_scale_init,
                        drop_path=drop_paths[i][j],
                    )
                )
                before = dim
            stages.append(Stage(nn.Identity(), blocks))
        self.stages = nn.Sequential(*stages)
        self.head = Head(
            dims[-1],
            num_classes,
            global_pool,
            norm=LayerNorm2d(dims[-1], eps=EPS),
            norm_first=True,
            drop_rate=drop_rate,
        )
        init_weights(self)

    def init_module(self, module: nn.Module) -> None:
        """Initialise the tensors that `module` itself holds, as the authors' code does: convolutions as PyTorch."""
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        else:
            module.reset_parameters()  # type: ignore[operator]


ATTENTIONS: dict[str, type[RemoteAttention] | type[SpanningAttention]] = {
    "remote": RemoteAttention,
    "spanning": SpanningAttention,
}


# ----------------------------------------------------------------------------------------------------------- fast forms
# At inference, maps lie in memory pixel by pixel (channels last), where 1x1 convolutions are linear layers, layer norms
# need no transposition, and depthwise convolutions are fastest. Between blocks they have the shape (B, C, H, W) still.


def as_linear(conv: nn.Conv2d) -> nn.Linear:
    """A 1x1 convolution as the linear layer that it is on (B, H, W, C)."""
    made = nn.Linear(conv.in_channels, conv.out_channels, conv.bias is not None, device="meta")
    made.weight = nn.Parameter(conv.weight.detach().flatten(1).clone(), requires_grad=False)
    if conv.bias is not None:
        made.bias = nn.Parameter(conv.bias.detach().clone(), requires_grad=False)
    return made


def window_view(x: Tensor, window: int, num_heads: int, remote: bool) -> Tensor:
    """A map as windows, without a copy: (B, n1*w, n2*w, C) -> (B, n1, n2, num_heads, w, w, C/num_heads)."""
    B, H, W, C = x.shape
    n1, n2, D = H // window, W // window, C // num_heads
    if remote:
        return x.view(B, window, n1, window, n2, num_heads, D).permute(0, 2, 4, 5, 1, 3, 6)
    return x.view(B, n1, window, n2, window, num_heads, D).permute(0, 1, 3, 5, 2, 4, 6)


class FastExpansion(nn.Module):
    """`Expansion` with the norm before it: (B, H, W, dim) -> (B, H, W, hidden)."""

    def __init__(self, expand: Expansion, norm: nn.Module) -> None:
        super().__init__()
        folded = isinstance(norm, _BatchNorm)
        self.norm = nn.Identity() if folded else channels_last_norm(norm)
        v = fold_affine(expand.v, *batch_norm_affine(norm)) if isinstance(norm, _BatchNorm) else expand.v
        self.v = as_linear(v)
        self.act = inplace(expand.act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.v(self.norm(x)))


class FastRemoteAttention(nn.Module):
    """`RemoteAttention` with the norm before it: the input goes into windows, and all else is a view of that."""

    def __init__(self, attention: RemoteAttention, norm: nn.Module) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.window = attention.window
        self.norm = channels_last_norm(norm)
        self.qk = as_linear(attention.qk)
        self.v = as_linear(attention.v)
        self.act = inplace(attention.act)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        heads, w = self.num_heads, self.window
        x = pad_last(self.norm(x), w)
        Hp, Wp = x.shape[1], x.shape[2]
        windows = B * (Hp // w) * (Wp // w)
        tokens = window_view(x, w, 1, True).reshape(windows, w * w, C)
        q, k = self.qk(tokens).view(windows, w * w, 2, heads, C // heads).permute(2, 0, 3, 1, 4).unbind(0)
        v = tokens.view(windows, w * w, heads, C // heads).transpose(1, 2)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)  # its output lies token by token
        x = x.reshape(B, Hp // w, Wp // w, w, w, C).permute(0, 3, 1, 4, 2, 5).reshape(B, Hp, Wp, C)
        return self.act(self.v(x[:, :H, :W]))


class FastSpanningAttention(nn.Module):
    """`SpanningAttention` with the norm before it; where one window covers the map, both kinds are the same one."""

    def __init__(self, attention: SpanningAttention, norm: nn.Module) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.window = attention.window
        self.norm = channels_last_norm(norm)
        dim = attention.qk.in_channels
        scale = torch.ones(2 * dim, dtype=torch.float64, device=attention.qk.weight.device)
        scale[:dim] = (dim // self.num_heads) ** -0.5  # of attention
        self.qk = as_linear(fold_scale(attention.qk, scale))
        self.v = as_linear(attention.v)
        self.act = inplace(attention.act)

    def forward(self, x: Tensor) -> Tensor:
        H, W, w = x.shape[1], x.shape[2], self.window
        x = pad_last(self.norm(x), w)
        Hp, Wp = x.shape[1], x.shape[2]
        q, k = self.qk(x).chunk(2, dim=-1)
        v = self.act(self.v(x))
        out = self.within(q, k, v, True).permute(0, 4, 1, 5, 2, 3, 6).reshape(-1, Hp, Wp, v.shape[-1])
        if Hp == w and Wp == w:
            out = out * 2
        else:
            close = self.within(q, k, v, False).permute(0, 1, 4, 2, 5, 3, 6)
            out = (out.view(close.shape) + close).view(out.shape)
        return out[:, :H, :W]

    def within(self, q: Tensor, k: Tensor, v: Tensor, remote: bool) -> Tensor:
        """(B, n1*w, n2*w, C), the same, (B, n1*w, n2*w, E) -> (B, n1, n2, num_heads, w, w, E/num_heads)"""
        N = self.window**2
        q, k, v = (window_view(part, self.window, self.num_heads, remote) for part in (q, k, v))
        shape = v.shape
        q, k, v = (part.reshape(-1, N, part.shape[-1]) for part in (q, k, v))
        if v.is_cuda:
            v = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        else:  # has no fused form on a CPU where values are wider than keys
            v = (q @ k.transpose(1, 2)).softmax(dim=-1) @ v
        return v.view(shape)


class ChannelsLastNorm(nn.LayerNorm):
    """`LayerNorm2d` on (B, H, W, C)."""


def channels_last_norm(norm: nn.Module) -> nn.Module:
    assert isinstance(norm, nn.LayerNorm)
    made = ChannelsLastNorm(norm.normalized_shape[0], norm.eps, device="meta")
    made.weight, made.bias = norm.weight, norm.bias
    return made


def pad_last(x: Tensor, window: int) -> Tensor:
    """`pad_to_windows` of (B, H, W, C)."""
    down, right = -x.shape[1] % window, -x.shape[2] % window
    return F.pad(x, (0, 0, 0, right, 0, down)) if down or right else x


def inplace(act: nn.Module) -> nn.Module:
    return nn.SiLU(inplace=True) if isinstance(act, nn.SiLU) else act


class FastInvertedResidual(nn.Module):
    """`InvertedResidual` at inference: norms and layer scale in the weights, 1x1 convolutions as linear layers."""

    def __init__(self, block: InvertedResidual) -> None:
        super().__init__()
        self.residual = block.residual
        self.expand = FAST[type(block.expand)](block.expand, block.norm)
        self.dwconv = fold_batch_norm(block.dwconv.conv, block.dwconv.norm)
        proj = block.proj
        if isinstance(block.layer_scale, LayerScale):
            proj = fold_scale(proj, block.layer_scale.gamma)
        self.proj = as_linear(proj)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        hidden = self.expand(x)
        local = F.silu(self.dwconv(hidden.permute(0, 3, 1, 2)), inplace=True).permute(0, 2, 3, 1)
        out = self.proj(local.add_(hidden)).add_(x) if self.residual else self.proj(local)
        return out.permute(0, 3, 1, 2)


FAST: dict[type[nn.Module], Any] = {
    Expansion: FastExpansion,
    RemoteAttention: FastRemoteAttention,
    SpanningAttention: FastSpanningAttention,
}


class FastStem(nn.Module):
    """Either stem at inference: batch norms in the weights, and the map channels last."""

    def __init__(self, stem: nn.Module) -> None:
        super().__init__()
        assert isinstance(stem, SqueezeStem | PlainStem)
        self.conv = fold_batch_norm(stem.conv, stem.norm)
        self.act = inplace(stem.act) if isinstance(stem, PlainStem) else nn.Identity()
        self.dwconv = fold_batch_norm(stem.dwconv.conv, stem.dwconv.norm)
        self.se = stem.se if isinstance(stem, SqueezeStem) else nn.Identity()
        self.proj = as_linear(stem.proj)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(channels_last(x)))
        x = self.se(F.silu(self.dwconv(x), inplace=True))
        return self.proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


# ---------------------------------------------------------------------------------------------------------- checkpoints

RENAMES = {  # EMO's and EMOv2's, in turn
    r"^stage0\.0\.convs\.0\.0\.": "stem.conv.",
    r"^stage0\.0\.convs\.0\.1\.": "stem.norm.",
    r"^stage0\.1\.conv_local\.": "stem.dwconv.",
    r"^stage0\.1\.se\.conv_reduce\.": "stem.se.fc1.",
    r"^stage0\.1\.se\.conv_expand\.": "stem.se.fc2.",
    r"^stage0\.1\.proj\.conv\.": "stem.proj.",
    r"^stage0\.0\.(conv|norm)\.": r"stem.\1.",
    r"^stage0\.1\.(conv|norm)\.": r"stem.dwconv.\1.",
    r"^stage0\.2\.conv\.": "stem.proj.",
    r"(\.\d+)\.norm\.(?:norm\.)?": r"\1.norm.",
    r"(\.\d+)\.(?:eops\.0\.)?(qk|v)\.conv\.": r"\1.expand.\2.",
    r"(\.\d+)\.eops\.0\.net\.conv\.": r"\1.expand.v.",
    r"(\.\d+)\.conv_local\.": r"\1.dwconv.",
    r"(\.\d+)\.proj\.conv\.": r"\1.proj.",
    r"(\.\d+)\.ls\.gamma$": r"\1.layer_scale.gamma",
    r"^norm\.norm\.": "head.norm.",
    r"^head\.(weight|bias)$": r"head.fc.\1",
}


def convert(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint of zhangzjn/EMO or zhangzjn/EMOv2, or one of ours."""
    if not any(key.startswith("stage0.") for key in state_dict):
        return state_dict
    converted = {}
    for key, tensor in state_dict.items():
        for pattern, replacement in RENAMES.items():
            key = re.sub(pattern, replacement, key)
        key = re.sub(r"^stage(\d+)\.(\d+)\.", lambda match: f"stages.{int(match[1]) - 1}.blocks.{match[2]}.", key)
        converted[key] = tensor.flatten() if key.endswith(".layer_scale.gamma") else tensor
    return converted


# ------------------------------------------------------------------------------------------------------------- variants

EMO_PAPER = Paper(
    title="Rethinking Mobile Block for Efficient Attention-based Models",
    authors="Zhang, Li, Li, Liu, Xue, Zhang, Jiang, Huang, Wang, Wang",
    venue="ICCV 2023",
    arxiv="2301.01146",
)
EMO2_PAPER = Paper(
    title="EMOv2: Pushing 5M Vision Model Frontier",
    authors="Zhang, Hu, He, Xue, Wang, Wang, Liu, Li, Tao",
    venue="TPAMI 2025",
    arxiv="2412.06674",
)
LICENSE_NOTE = "The authors state no licence, for code or weights."
EMO_URL = "https://github.com/zhangzjn/EMO/raw/main/resources/EMO_{size}/net.pth"
EMO2_URL = "https://github.com/zhangzjn/EMOv2/raw/main/resources/Cls/EMOv2_{size}.pth"
COMPACT = (
    "One inverted residual block everywhere; windows gathered from all over the map attend in the last two stages."
)
COMPACT2 = "As EMO, and ordinary windows attend as well, with the same weights."

SIZES: dict[str, dict[str, Any]] = {
    "1m": {"depths": (2, 2, 8, 3), "dims": (32, 48, 80, 168), "mlp_ratio": (2.0, 2.5, 3.0, 3.5)},
    "2m": {"depths": (3, 3, 9, 3), "dims": (32, 48, 120, 200), "mlp_ratio": (2.0, 2.5, 3.0, 3.5)},
    "5m": {"depths": (3, 3, 9, 3), "dims": (48, 72, 160, 288), "mlp_ratio": (2.0, 3.0, 4.0, 4.0)},
    "6m": {"depths": (3, 3, 9, 3), "dims": (48, 72, 160, 320), "mlp_ratio": (2.0, 3.0, 4.0, 5.0)},
    "20m": {"depths": (3, 3, 13, 3), "dims": (64, 128, 320, 448), "mlp_ratio": (2.0, 3.0, 4.0, 4.0)},
    "50m": {"depths": (5, 8, 20, 7), "dims": (64, 128, 384, 512), "mlp_ratio": (2.0, 3.0, 4.0, 4.0)},
}
SPANNING = {"attention": "spanning", "kernel_size": 5, "stem_dim": None, "stem_se": False, "layer_scale_init": 1e-6}


def _entry(name: str, args: dict[str, Any], **fields: Any) -> None:
    second = name.startswith("emo2_")
    register(
        Entry(
            name=name,
            build=EMO,
            family="emo",
            args={**args, **(SPANNING if second else {})},
            paper=EMO2_PAPER if second else EMO_PAPER,
            compact=fields.pop("compact", COMPACT2 if second else COMPACT),
            code_license="unstated",
            code_url=f"https://github.com/zhangzjn/{'EMOv2' if second else 'EMO'}",
            convert=convert,
            first_conv="stem.conv",
            classifier="head.fc",
            **fields,
        )
    )


def _reported(params: float, macs: float, second: bool, side: int = 224) -> Reported:
    """`params` and `macs` in millions."""
    source = f"README of zhangzjn/{'EMOv2' if second else 'EMO'}"
    size = (3, side, side)
    return Reported(params=round(params * 1e6), macs=round(macs * 1e6), input_size=size, source=source)


def _weights(tag: str, url: str, top1: float, top5: float | None = None, side: int = 224) -> Weights:
    return Weights(
        tag=tag,
        url=url,
        license="unstated",
        top1=top1,
        top5=top5,
        accuracy_source=f"README of zhangzjn/{'EMOv2' if 'EMOv2' in url else 'EMO'}",
        input_size=(3, side, side),
        note=LICENSE_NOTE,
    )


NORMS_NOTE = "The authors' MACs are fvcore's total, which counts norms."

# size: head widths of the last two stages, params (M), MACs (M), top-1 and top-5 (%) as the authors state them
for size, head_dims, params, macs, top1, top5 in (
    ("1m", (20, 21), 1.3, 261, 71.498, 90.368),
    ("2m", (20, 20), 2.3, 439, 75.134, 92.184),
    ("5m", (32, 32), 5.1, 903, 78.422, 93.970),
    ("6m", (20, 32), 6.1, 961, 78.988, 94.162),
):
    _entry(
        f"emo_{size}",
        {**SIZES[size], "head_dim": (None, None, *head_dims)},
        reported=_reported(params, macs, second=False),
        weights=(_weights("zhangzjn_in1k", EMO_URL.format(size=size.upper()), top1, top5),),
        note=NORMS_NOTE,
    )

# size: width of heads, params (M), MACs (M), top-1 (%) without and with distillation; other input sizes
for size, width, params, macs, claims, others in (
    ("1m", 20, 1.4, 285, (72.3, 73.5), (256, 512)),
    ("2m", 20, 2.3, 487, (75.8, 76.7), (256, 512)),
    ("5m", 32, 5.1, 1035, (79.4, 80.9), (256, 512)),
    ("20m", 32, 20.1, 4000, (), (256,)),
    ("50m", 32, 49.8, 8800, (), ()),
):
    args = {**SIZES[size], "head_dim": (None, None, width, width)}
    if size == "1m":
        args["dims"] = (32, 48, 80, 180)
    _entry(
        f"emo2_{size}",
        args,
        reported=_reported(params, macs, second=True),
        weights=tuple(
            _weights(tag, EMO2_URL.format(size=f"{size.upper()}_224{suffix}"), claim)
            for (tag, suffix), claim in zip(
                (("zhangzjn_in1k", ""), ("zhangzjn_kd_in1k", "_KD")), claims, strict=bool(claims)
            )
        ),
        note=NORMS_NOTE,
    )
    for side in others:
        published = (size, side) == ("5m", 512)
        _entry(
            f"emo2_{size}_{side}",
            {**args, "window_size": 8},
            input_size=(3, side, side),
            reported=_reported(5.1, 5627, second=True, side=512) if published else None,
            weights=(_weights("zhangzjn_kd_in1k", EMO2_URL.format(size="5M_512_KD"), 82.9, side=512),)
            if published
            else (),
            note=NORMS_NOTE if published else "",
        )

for name in ("emo_test", "emo2_test"):
    _entry(
        name,
        {
            "depths": (1, 1, 3, 2),
            "dims": (16, 24, 32, 48),
            "mlp_ratio": 2.0,
            "head_dim": (None, None, 8, 8),
            "window_size": 3,
        },
        compact="A tiny one for tests and trials, not of the paper.",
        input_size=(3, 64, 64),
    )
