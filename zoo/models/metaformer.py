"""MetaFormer: PoolFormer, PoolFormerV2, IdentityFormer, RandFormer, ConvFormer and CAFormer.

Yu et al., "MetaFormer Is Actually What You Need for Vision", CVPR 2022, arXiv 2111.11418 (PoolFormer), and Yu et al.,
"MetaFormer Baselines for Vision", TPAMI 2024, arXiv 2210.13452 (the others).

What makes them compact: a transformer block stays strong when attention gives way to a mixer with few or no weights, so
the token mixer is an argument here, and average pooling, nothing at all, a frozen random matrix, a separable
convolution and attention are its published values.

Where this file departs from the papers it follows their code: StarReLU starts at scale 1 and bias 0 (the paper derives
0.8944 and -0.4472), and PoolFormer's stem and downsampling convolutions keep PyTorch's initialisation. The random
matrices of RandFormer, frozen parameters there, are buffers here: no optimizer or gradient check stumbles over them.

State-dict keys are timm's. Two things that timm computes otherwise than the authors are arguments: `head_norm_first`
(PoolFormer normalises the last map and then averages; timm averages first) and `mlp_head_eps` (1e-5; timm 1e-6).
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates, use_fused_attn
from torch import Tensor, nn

from zoo.errors import ConfigError, did_you_mean
from zoo.layers.arguments import (
    check_above_zero,
    check_choice,
    check_counts,
    check_numbers_or_none,
    check_rates,
    check_widths,
    image_sides,
    per_stage,
)
from zoo.layers.fast_form import HasFastForm, HasNumbers, is_as_made
from zoo.layers.folding import all_modules_are_watched, as_conv2d, fold_affine, fold_scale, has_changed, has_hooks
from zoo.layers.init import init_weights
from zoo.layers.observers import channels_last, is_batched, is_exporting, is_transformed
from zoo.layers.packed import PackedConv2d, activation_of, in_parts, may_overwrite, needs_gradients
from zoo.layers.staged import Head, Stage, StagedNet
from zoo.layers.stochastic_depth import is_per_sample, stochastic_add, trains_eagerly
from zoo.layers.training_mlp import training_mlp
from zoo.registry import Entry, Paper, Reported, Weights, register

__all__ = ["Attention", "MetaFormer", "Pooling", "RandomMixing", "SepConv", "StarReLU"]


# --------------------------------------------------------------------------------------------------------------- layers


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map, (B, C, H, W), or of tokens, (B, N, C)."""

    def __init__(self, dim: int, eps: float = 1e-6, bias: bool = True, tokens: bool = False) -> None:
        super().__init__(dim, eps=eps, bias=bias)
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        if self.tokens:
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class GroupNorm(nn.GroupNorm):
    """Normalisation over channels and space together: one group. (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int, eps: float = 1e-6, bias: bool = True) -> None:
        super().__init__(1, dim, eps=eps)
        if not bias:
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def scaled(self, x: Tensor, scale: Tensor) -> Tensor:
        """`scale * self(x)`, (C,) the scale."""
        return F.group_norm(x, 1, self.weight * scale, None if self.bias is None else self.bias * scale, self.eps)


class Scale(nn.Module):
    """Multiplication by a learned vector: LayerScale on a branch, ResScale on the shortcut."""

    def __init__(self, dim: int, init: float, tokens: bool = False) -> None:
        super().__init__()
        self.init = init
        self.shape = (dim,) if tokens else (dim, 1, 1)
        self.scale = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.scale, self.init)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.view(self.shape)


class _StarReLU(torch.autograd.Function):
    """StarReLU that keeps its input alone for the backward pass, and takes fewer passes over the map in it."""

    @staticmethod
    def forward(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return F.relu(x).square_().mul_(scale).add_(bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        positive = F.relu(x)
        product = grad * positive  # zero where the ReLU is, so that its derivative is in it already
        if torch.is_grad_enabled() or is_batched(grad):  # to be differentiated again, or many gradients at once
            return product * (2 * scale), (product * positive).sum().reshape(1), grad.sum().reshape(1)
        of_scale = positive.mul_(product).sum().reshape(1)
        return product.mul_(2 * scale), of_scale, grad.sum().reshape(1)


@torch.fx.wrap
def star_relu(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """`scale * relu(x)**2 + bias`."""
    if torch.jit.is_scripting():
        return scale * F.relu(x).square() + bias
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed()
    is_one = scale.numel() == bias.numel() == 1
    if recorded or not is_one or x.dtype != scale.dtype or not (torch.is_grad_enabled() and x.requires_grad):
        return scale * F.relu(x).square() + bias
    return _StarReLU.apply(x, scale, bias)


class StarReLU(nn.Module):
    """`scale * relu(x)**2 + bias` with learned scalars (arXiv 2210.13452, section 3.3)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(1))
        self.bias = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return star_relu(x, self.scale, self.bias)


class PatchConv(nn.Conv2d):
    """The strided convolution of stem and downsampling, padded so that (7, 4) and (3, 2) come out as published."""

    def __init__(self, in_dim: int, dim: int, kernel_size: int, stride: int) -> None:
        super().__init__(in_dim, dim, kernel_size, stride, padding=max(0, kernel_size - stride + 1) // 2)


class Mlp(nn.Module):
    """Two linear layers and an activation: 1x1 convolutions on maps, `nn.Linear` on tokens."""

    def __init__(
        self, dim: int, ratio: float, act: Callable[[], nn.Module], bias: bool, drop: float, tokens: bool
    ) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.fc1 = nn.Linear(dim, hidden, bias) if tokens else nn.Conv2d(dim, hidden, 1, bias=bias)
        self.act = act()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden, dim, bias) if tokens else nn.Conv2d(hidden, dim, 1, bias=bias)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))

    def for_training(self, x: Tensor, scale: Tensor | None) -> Tensor | None:
        """`scale * self(x)`, (dim,) the scale, as `training_mlp`; None where the layers must be called."""
        star = (self.act.scale, self.act.bias) if type(self.act) is StarReLU else None
        return training_mlp(x, self, star, scale)


# --------------------------------------------------------------------------------------------------------- token mixers
# A mixer is any callable that takes the width and returns a module from maps to maps, (B, C, H, W) -> (B, C, H, W).
# One whose class sets `tokens = True` gets and returns (B, N, C) instead.


class Pooling(nn.Module):
    """Average over a neighbourhood, less the pixel itself (arXiv 2111.11418, equation 4). Padding is not counted."""

    def __init__(self, dim: int, pool_size: int = 3) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(pool_size, stride=1, padding=pool_size // 2, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x) - x


@torch.fx.wrap
def check_grid(height: int, width: int, grid_size: tuple[int, int]) -> None:
    """Raise ConfigError unless a map is as large as the random matrix was made for."""
    if torch.jit.is_scripting() or torch.jit.is_tracing():
        return
    if (height, width) != grid_size:
        raise ConfigError(
            f"RandFormer mixes a {grid_size[0]}x{grid_size[1]} grid here but got {height}x{width}: its random matrices "
            "hold for one input size. Create the model with img_size=(height, width) of your images, or resize them."
        )


class RandomMixing(nn.Module):
    """Mixes tokens by one frozen random matrix, rows softmax-normalised (arXiv 2210.13452, equation 3)."""

    frozen_weights = ("random_matrix",)

    def __init__(self, dim: int, grid_size: tuple[int, int]) -> None:
        super().__init__()
        self.grid_size = grid_size
        tokens = grid_size[0] * grid_size[1]
        self.register_buffer("random_matrix", torch.empty(tokens, tokens))
        self.random_matrix: Tensor
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.random_matrix.copy_(torch.rand_like(self.random_matrix).softmax(dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        check_grid(x.shape[2], x.shape[3], self.grid_size)
        return (x.flatten(2) @ self.random_matrix.T).unflatten(2, self.grid_size)


class SepConv(nn.Module):
    """Inverted separable convolution: expand, StarReLU, depthwise 7x7, project (arXiv 2210.13452, equation 4)."""

    def __init__(self, dim: int, expansion: float = 2.0, kernel_size: int = 7) -> None:
        super().__init__()
        hidden = int(expansion * dim)
        self.pwconv1 = nn.Conv2d(dim, hidden, 1, bias=False)
        self.act1 = StarReLU()
        self.dwconv = nn.Conv2d(hidden, hidden, kernel_size, padding=kernel_size // 2, groups=hidden, bias=False)
        self.pwconv2 = nn.Conv2d(hidden, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pwconv2(self.dwconv(self.act1(self.pwconv1(x))))


class Attention(nn.Module):
    """Multi-head self-attention over all positions. (B, N, C) -> (B, N, C)."""

    tokens = True

    def __init__(self, dim: int, head_dim: int = 32) -> None:
        super().__init__()
        if dim % head_dim:
            raise ConfigError(f"Attention splits the width into heads of {head_dim}, but {dim} is no multiple of it.")
        self.num_heads = dim // head_dim
        self.head_dim = head_dim
        self.fused_attn = use_fused_attn()
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = (q * self.head_dim**-0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


Mixer = str | Callable[[int], nn.Module]
MIXERS: dict[str, Callable[..., nn.Module]] = {
    "pool": Pooling,
    "identity": nn.Identity,
    "random": RandomMixing,
    "sepconv": SepConv,
    "attention": Attention,
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"gelu": nn.GELU, "star_relu": StarReLU, "relu": nn.ReLU}


def choose(what: str, name: Any, options: dict[str, Any]) -> Any:
    """`options[name]`; a callable stands for itself. Raises ConfigError that lists the options."""
    if callable(name):
        return name
    if name not in options:
        raise ConfigError(
            f"{what} {name!r} is unknown.{did_you_mean(str(name), options)} "
            f"Choose one of {', '.join(options)}, or pass a callable."
        )
    return options[name]


# ---------------------------------------------------------------------------------------------------------------- model


class MetaFormerBlock(HasFastForm):
    """`x + mix(norm(x))`, then `x + mlp(norm(x))`; layer scales on the branches, residual scales on the shortcuts."""

    def __init__(
        self,
        dim: int,
        *,
        token_mixer: nn.Module,
        norm: Callable[[int], nn.Module],
        mlp: Callable[[int], nn.Module],
        drop_path: float,
        layer_scale_init: float | None,
        res_scale_init: float | None,
        tokens: bool,
    ) -> None:
        super().__init__()

        def scale(init: float | None) -> nn.Module:
            return nn.Identity() if init is None else Scale(dim, init, tokens)

        def drop() -> nn.Module:
            return DropPath(drop_path) if drop_path > 0 else nn.Identity()

        self.norm1 = norm(dim)
        self.token_mixer = token_mixer
        self.drop_path1 = drop()
        self.layer_scale1 = scale(layer_scale_init)
        self.res_scale1 = scale(res_scale_init)
        self.norm2 = norm(dim)
        self.mlp = mlp(dim)
        self.drop_path2 = drop()
        self.layer_scale2 = scale(layer_scale_init)
        self.res_scale2 = scale(res_scale_init)
        self.per_sample = is_per_sample(self)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile what stood behind an `and`)
            if self.leaves_samples_out(x):
                x = stochastic_add(self.res_scale1(x), x, self.mix, self.drop_path1)
                return stochastic_add(self.res_scale2(x), x, self.transform, self.drop_path2)
        x = self.res_scale1(x) + self.layer_scale1(self.drop_path1(self.token_mixer(self.norm1(x))))
        return self.res_scale2(x) + self.layer_scale2(self.drop_path2(self.mlp(self.norm2(x))))

    @torch.jit.ignore
    def leaves_samples_out(self, x: Tensor) -> bool:
        """Whether branches may see the samples alone that stochastic depth keeps, and scale before it draws."""
        if not (self.per_sample and trains_eagerly(self, x)):
            return False
        return is_as_made(self) and not (has_changed(self) or has_hooks(self.layer_scale1, self.layer_scale2))

    def mix(self, x: Tensor) -> Tensor:
        """The first branch, for training."""
        norm, mixer, scale = self.norm1, self.token_mixer, self.layer_scale1
        linear = type(mixer) is Pooling and not has_hooks(norm, scale, mixer, mixer.pool)  # in each channel
        if linear and type(norm) is GroupNorm and type(scale) is Scale and not all_modules_are_watched():
            return mixer(norm.scaled(x, scale.scale))
        return scale(mixer(norm(x)))

    def transform(self, x: Tensor) -> Tensor:
        """The second branch, for training."""
        x, mlp, scale = self.norm2(x), self.mlp, self.layer_scale2
        y = None
        if type(mlp) is Mlp and type(scale) in (Scale, nn.Identity) and not has_hooks(scale):
            y = mlp.for_training(x, scale.scale if isinstance(scale, Scale) else None)
        return scale(mlp(x)) if y is None else y


class Stem(HasFastForm):
    """Strided convolution, then norm."""

    def __init__(self, in_chans: int, dim: int, kernel_size: int, stride: int, norm: bool) -> None:
        super().__init__()
        self.conv = PatchConv(in_chans, dim, kernel_size, stride)
        self.norm = LayerNorm(dim, bias=False) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def fast_form(self) -> nn.Module:
        return FastStem(self)


class Downsample(nn.Module):
    """Norm, then a 3x3 convolution of stride 2."""

    def __init__(self, in_dim: int, dim: int, norm: bool) -> None:
        super().__init__()
        self.norm = LayerNorm(in_dim, bias=False) if norm else nn.Identity()
        self.conv = PatchConv(in_dim, dim, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x))


class MetaFormerStage(Stage, HasFastForm):
    """Downsampling and the blocks of one resolution. (B, C, H, W) -> (B, C', H', W')."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], tokens: bool) -> None:
        super().__init__(downsample, blocks)
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if not self.tokens:
            return self.run_blocks(x)
        B, C, H, W = x.shape
        return self.run_blocks(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(B, C, H, W)

    def fast_form(self) -> nn.Module:
        return FastStage(self)


class MlpHead(nn.Module):
    """ConvFormer's and CAFormer's classifier, with squared ReLU. (B, C) -> (B, num_classes)."""

    def __init__(self, dim: int, num_classes: int, eps: float, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.norm = nn.LayerNorm(4 * dim, eps=eps)
        self.drop = nn.Dropout(drop)
        self.fc2 = nn.Linear(4 * dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(self.norm(F.relu(self.fc1(x)).square())))


class MetaFormer(StagedNet):
    """A four-stage network of MetaFormer blocks. (B, in_chans, H, W) -> (B, num_classes).

    The defaults are those of PoolFormerV2. Any number of stages works.

    Args:
        in_chans: channels of the input.
        num_classes: width of the classifier; 0 leaves it out.
        global_pool: "avg", "max", "avgmax" (their mean), or "" for none (only without a classifier).
        depths: blocks of each stage.
        dims: width of each stage.
        token_mixers: one for all stages or one for each: "pool", "identity", "random", "sepconv", "attention", or any
            callable `mixer(dim) -> nn.Module` from maps to maps (from tokens to tokens if it has `tokens = True`).
        mlp_ratio: hidden width of the MLP over the width.
        mlp_act: "star_relu", "gelu", "relu", or a callable without arguments.
        mlp_bias: whether the MLP's linear layers have biases.
        norm: "group" (over channels and space) or "layer" (over channels), before mixer and MLP.
        norm_bias: whether these norms have biases.
        norm_eps: their epsilon.
        downsample_norm: whether stem and downsampling have LayerNorms.
        layer_scale_init: initial LayerScale of both branches; None for none.
        res_scale_init: initial scale of the shortcuts, one for all stages or one for each; None for none.
        mlp_head: whether the classifier is an MLP.
        mlp_head_eps: epsilon of the norm in it.
        head_norm_first: normalise the last map and then pool, instead of pooling first.
        stem_kernel_size: of the first convolution; 3 with stride 1 or 2 suits 32x32 images.
        stem_stride: of the first convolution.
        drop_rate: dropout before the last linear layer.
        proj_drop_rate: dropout in the MLPs.
        drop_path_rate: stochastic depth, growing linearly from 0 at the first block to this at the last.
        patch_conv_init: "normal" (as all else) or "default" (PyTorch's) for stem and downsampling convolutions.
        img_size: input height and width, for mixers that are made for one size ("random").

    Raises ConfigError for values that cannot be.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (64, 128, 320, 512),
        token_mixers: Mixer | Sequence[Mixer] = "pool",
        mlp_ratio: float = 4.0,
        mlp_act: str | Callable[[], nn.Module] = "star_relu",
        mlp_bias: bool = False,
        norm: Literal["group", "layer"] = "group",
        norm_bias: bool = False,
        norm_eps: float = 1e-6,
        downsample_norm: bool = True,
        layer_scale_init: float | None = None,
        res_scale_init: float | Sequence[float | None] | None = (None, None, 1.0, 1.0),
        mlp_head: bool = False,
        mlp_head_eps: float = 1e-5,
        head_norm_first: bool = False,
        stem_kernel_size: int = 7,
        stem_stride: int = 4,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        patch_conv_init: Literal["normal", "default"] = "normal",
        img_size: int | tuple[int, int] = 224,
    ) -> None:
        depths, dims = check_widths(depths=depths, dims=dims)
        mixers = per_stage("token_mixers", token_mixers, len(depths))
        res_scales = per_stage("res_scale_init", res_scale_init, len(depths))
        check_choice("norm", norm, ("group", "layer"))
        check_choice("patch_conv_init", patch_conv_init, ("normal", "default"))
        act = choose("mlp_act", mlp_act, ACTIVATIONS)
        check_counts(1, stem_kernel_size=stem_kernel_size, stem_stride=stem_stride)
        check_rates(drop_rate=drop_rate, proj_drop_rate=proj_drop_rate, drop_path_rate=drop_path_rate)
        check_above_zero(mlp_ratio=mlp_ratio, norm_eps=norm_eps, mlp_head_eps=mlp_head_eps)
        check_numbers_or_none(layer_scale_init=(layer_scale_init,), res_scale_init=res_scales)
        super().__init__(dims, tuple(stem_stride * 2**i for i in range(len(dims))), in_chans, num_classes)
        self.drop_rate = drop_rate
        self.mlp_head = mlp_head
        self.mlp_head_eps = mlp_head_eps
        self.patch_conv_init = patch_conv_init

        self.stem = Stem(in_chans, dims[0], stem_kernel_size, stem_stride, downsample_norm)
        grid = _grid_after(self.stem.conv, image_sides(img_size))
        drop_paths = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            downsample: nn.Module = nn.Identity()
            if i:
                downsample = Downsample(dims[i - 1], dim, downsample_norm)
                grid = _grid_after(downsample.conv, grid)
            make_mixer = choose("token mixer", mixers[i], MIXERS)
            tokens = getattr(make_mixer, "tokens", False)

            def make_norm(dim: int, tokens: bool = tokens) -> nn.Module:
                if norm == "layer" or tokens:  # on tokens only the width is left to normalise over
                    return LayerNorm(dim, norm_eps, norm_bias, tokens)
                return GroupNorm(dim, norm_eps, norm_bias)

            def make_mlp(dim: int, tokens: bool = tokens) -> nn.Module:
                return Mlp(dim, mlp_ratio, act, mlp_bias, proj_drop_rate, tokens)

            blocks = [
                MetaFormerBlock(
                    dim,
                    token_mixer=make_mixer(dim, grid) if make_mixer is RandomMixing else make_mixer(dim),
                    norm=make_norm,
                    mlp=make_mlp,
                    drop_path=drop_path,
                    layer_scale_init=layer_scale_init,
                    res_scale_init=res_scales[i],
                    tokens=tokens,
                )
                for drop_path in drop_paths[i]
            ]
            stages.append(MetaFormerStage(downsample, blocks, tokens))
        self.stages = nn.Sequential(*stages)

        head_norm = GroupNorm(dims[-1], norm_eps) if head_norm_first else LayerNorm(dims[-1], 1e-6)
        self.head = Head(
            dims[-1],
            num_classes,
            global_pool,
            norm=head_norm,
            norm_first=head_norm_first,
            drop_rate=0.0 if mlp_head else drop_rate,
        )
        if mlp_head:
            self.head.fc = self.make_classifier(num_classes)
        init_weights(self)

    def make_classifier(self, num_classes: int) -> nn.Module:
        if self.mlp_head and num_classes:
            return MlpHead(self.num_features, num_classes, self.mlp_head_eps, self.drop_rate)
        return super().make_classifier(num_classes)

    def init_module(self, module: nn.Module) -> None:
        """Initialise the tensors that `module` itself holds, as the authors' code does."""
        if isinstance(module, PatchConv) and self.patch_conv_init == "default":
            module.reset_parameters()
        elif isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=0.02)  # published as truncated at +-2, which is 100 standard deviations
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        else:
            reset = getattr(module, "reset_parameters", None)
            if reset is None:
                name = type(module).__name__
                raise ConfigError(f"{name} holds weights: give it a reset_parameters() that initialises them.")
            reset()


def _grid_after(conv: nn.Conv2d, size: tuple[int, int]) -> tuple[int, int]:
    def after(side: int) -> int:
        return (side + 2 * int(conv.padding[0]) - conv.kernel_size[0]) // conv.stride[0] + 1

    return after(size[0]), after(size[1])


# ------------------------------------------------------------------------------------------------------ fast inference
# What `zoo.optimize_for_inference` puts in place of stem and stages. Maps stay channels_last, so that tokens are a view
# of them. A stage's map is its own: its blocks write over it (`may_overwrite` says where they must not).


class FastStem(nn.Module):
    """`Stem` with a channels_last output."""

    def __init__(self, stem: Stem) -> None:
        super().__init__()
        self.conv, self.norm = PackedConv2d(stem.conv), stem.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(channels_last(x)))


class FastStage(nn.Module):
    """`MetaFormerStage`, on as many samples at a time as the cache has room for."""

    hidden_bytes = 8 * 2**20  # of the MLP's hidden maps that are worked on together

    def __init__(self, stage: MetaFormerStage) -> None:
        super().__init__()
        self.owns_input = not isinstance(stage.downsample, nn.Identity)
        self.downsample = stage.downsample
        if isinstance(stage.downsample, Downsample):
            self.downsample = nn.Sequential(stage.downsample.norm, PackedConv2d(stage.downsample.conv))
        blocks = [FastBlock(cast(MetaFormerBlock, block)) for block in stage.blocks]
        self.blocks, self.hidden = nn.Sequential(*blocks), blocks[0].mlp.fc1.out_channels

    def forward(self, x: Tensor) -> Tensor:
        return in_parts(self.blocks, self.downsample(x), self.owns_input, self.hidden, self.hidden_bytes)


class FastBlock(nn.Module):
    """`MetaFormerBlock`, with what its norms and scales multiply held by the weights beside them."""

    def __init__(self, block: MetaFormerBlock) -> None:
        super().__init__()
        self.mix: nn.Module
        mixer = type(block.token_mixer)
        if mixer is Pooling and isinstance(block.norm1, GroupNorm):
            self.mix = FastPooling(block)
        else:
            self.mix = {SepConv: FastSepConv, Attention: FastAttention, RandomMixing: FastRandomMixing}.get(
                mixer, AnyMixer
            )(block)
        self.mlp = FastMlp(block)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.mix(x))


def tokens_of(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H*W, C), a view of a channels_last map."""
    return x.flatten(2).transpose(1, 2)


def scale_shortcut(x: Tensor, scale: nn.Module) -> Tensor:
    """`scale(x)`, over x where that may be. `scale` is a Scale, or an identity."""
    if isinstance(scale, nn.Identity):
        return x
    factor = cast(Tensor, scale.scale)[:, None, None]
    return x.mul_(factor) if may_overwrite(x) else x * factor


def add_branch(x: Tensor, branch: Tensor) -> Tensor:
    return x.add_(branch) if may_overwrite(x) else x + branch


def scaled(layer: nn.Conv2d | nn.Linear, *scales: nn.Module) -> nn.Conv2d:
    """`layer` with the layer scales behind it in its weights, as a convolution."""
    conv = as_conv2d(layer)
    for scale in scales:
        conv = fold_scale(conv, scale.scale) if isinstance(scale, Scale) else conv
    return conv


class MapNorm(nn.Module):
    """A block's norm of a channels_last map, also where the block holds it for tokens."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.tokens = norm, getattr(norm, "tokens", False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.tokens:
            return self.norm(x)
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def moments(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation of each sample, (B, 1, 1, 1)."""
    if may_overwrite(x):
        return _native_moments(x, eps)
    if torch.compiler.is_compiling() and x.device.type == "cpu" and not (needs_gradients(x) or is_exporting()):
        mean, deviation = torch.ops.zoo.moments(x, eps)
        return mean, deviation
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # squares leave float16
    mean = wide.mean((1, 2, 3), keepdim=True)
    deviation = ((wide - mean).square().mean((1, 2, 3), keepdim=True) + eps).rsqrt()
    return mean.to(x.dtype), deviation.to(x.dtype)


def _native_moments(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Those that PyTorch's group norm finds on its way; torch 2.11 has no gradients of them."""
    B, C, H, W = x.shape
    _, mean, deviation = torch.native_group_norm(x, None, None, B, C, H * W, 1, eps)
    return mean[:, :, None, None].to(x.dtype), deviation[:, :, None, None].to(x.dtype)


# one operator to a compiler, whose own loop over a map takes three times as long on a CPU
@torch.library.custom_op("zoo::moments", mutates_args=(), schema="(Tensor x, float eps) -> (Tensor, Tensor)")
def _moments_op(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _native_moments(x, eps)


@_moments_op.register_fake
def _(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), 1, 1, 1), x.new_empty(len(x), 1, 1, 1)


class PlainGroupNorm(nn.Module):
    """`GroupNorm` without weight and bias."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return F.group_norm(x, 1, eps=self.eps)
        mean, deviation = moments(x, self.eps)
        return (x - mean) * deviation


class FastPooling(nn.Module):
    """`r x + s (P(norm(x)) - norm(x))`: the norm's shifts cancel, its scale passes P; left is a mean of x and P(x)."""

    def __init__(self, block: MetaFormerBlock) -> None:
        super().__init__()
        assert isinstance(block.norm1, GroupNorm)
        assert isinstance(block.token_mixer, Pooling)
        self.pool, self.eps, self.res_scale = block.token_mixer.pool, block.norm1.eps, block.res_scale1
        weight = block.norm1.weight.detach()
        if isinstance(block.layer_scale1, Scale):
            weight = weight * block.layer_scale1.scale.detach()
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        share = moments(x, self.eps)[1] * self.weight[:, None, None]
        share = share.to(x.dtype)  # autocast leaves weights as they are
        pooled = self.pool(x)
        if isinstance(self.res_scale, nn.Identity):
            return x.lerp_(pooled, share) if may_overwrite(x) else x.lerp(pooled, share)
        kept = cast(Tensor, self.res_scale.scale)[:, None, None].to(x.dtype) - share
        return x.mul_(kept).addcmul_(pooled, share) if may_overwrite(x) else (x * kept).addcmul(pooled, share)


class FastSepConv(HasNumbers):
    """`SepConv` with its norm and shortcut; StarReLU is the ReLU of its first layer and one pass."""

    def __init__(self, block: MetaFormerBlock) -> None:
        super().__init__()
        mixer = block.token_mixer
        assert isinstance(mixer, SepConv)
        self.norm, self.res_scale = MapNorm(block.norm1), block.res_scale1
        self.pwconv1 = PackedConv2d(mixer.pwconv1, "relu")
        self.numbers, self.shift = (mixer.act1.scale.item(),), mixer.act1.bias
        self.dwconv = PackedConv2d(mixer.dwconv)
        self.pwconv2 = PackedConv2d(scaled(mixer.pwconv2, block.layer_scale1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.pwconv1(self.norm(x))
        out = h if may_overwrite(h) else None
        h = torch.addcmul(self.shift[:, None, None], h, h, value=self.numbers[0], out=out)
        return self.pwconv2.add_to(scale_shortcut(x, self.res_scale), self.dwconv(h))


class FastAttention(nn.Module):
    """`Attention` with its norm and shortcut, from map to map."""

    def __init__(self, block: MetaFormerBlock) -> None:
        super().__init__()
        mixer = block.token_mixer
        assert isinstance(mixer, Attention)
        self.norm, self.res_scale = MapNorm(block.norm1), block.res_scale1
        self.num_heads, self.head_dim = mixer.num_heads, mixer.head_dim
        self.qkv = PackedConv2d(as_conv2d(mixer.qkv))
        self.proj = PackedConv2d(scaled(mixer.proj, block.layer_scale1))

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        qkv = tokens_of(self.qkv(self.norm(x))).reshape(B, H * W, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        mixed = mixed.transpose(1, 2).reshape(B, H, W, C).permute(0, 3, 1, 2)
        return self.proj.add_to(scale_shortcut(x, self.res_scale), mixed)


class FastRandomMixing(nn.Module):
    """`RandomMixing` with its norm and shortcut: the matrix product adds to the map."""

    def __init__(self, block: MetaFormerBlock) -> None:
        super().__init__()
        assert isinstance(block.token_mixer, RandomMixing)
        self.norm, self.mixer, self.res_scale = MapNorm(block.norm1), block.token_mixer, block.res_scale1
        self.layer_scale = block.layer_scale1

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        check_grid(H, W, self.mixer.grid_size)
        normed = self.norm(x)
        if isinstance(self.layer_scale, Scale):  # scaling channels and mixing tokens commute
            normed = normed * self.layer_scale.scale[:, None, None]
        normed = tokens_of(normed).to(x.dtype)  # autocast leaves weights as they are
        tokens = tokens_of(scale_shortcut(x, self.res_scale))
        matrix = self.mixer.random_matrix.to(x.dtype).expand(B, -1, -1)
        if may_overwrite(x):
            tokens.baddbmm_(matrix, normed)
            return x
        return torch.baddbmm(tokens, matrix, normed).reshape(B, H, W, C).permute(0, 3, 1, 2)


class AnyMixer(nn.Module):
    """Any mixer as it is, with its norm and shortcut."""

    def __init__(self, block: MetaFormerBlock) -> None:
        super().__init__()
        self.norm, self.mixer, self.scale = MapNorm(block.norm1), block.token_mixer, block.layer_scale1
        self.res_scale, self.tokens = block.res_scale1, getattr(block.norm1, "tokens", False)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.norm(x)
        branch = self.mixer(tokens_of(branch) if self.tokens else branch)
        branch = self.scale(branch)
        branch = branch.transpose(1, 2).unflatten(2, x.shape[2:]) if self.tokens else branch
        return add_branch(scale_shortcut(x, self.res_scale), branch)


class FastMlp(nn.Module):
    """`Mlp` with its norm and shortcut. Of StarReLU only relu and square are left: `W(s t + b) = (s W) t + b W 1`."""

    def __init__(self, block: MetaFormerBlock) -> None:
        super().__init__()
        mlp = block.mlp
        assert isinstance(mlp, Mlp)
        fc1, fc2 = as_conv2d(mlp.fc1), as_conv2d(mlp.fc2)
        self.norm: nn.Module = MapNorm(block.norm2)
        self.res_scale = block.res_scale2
        if isinstance(block.norm2, GroupNorm):  # LayerNorm's kernel is faster with a weight than without
            fc1 = fold_affine(fc1, block.norm2.weight, block.norm2.bias)
            self.norm = PlainGroupNorm(block.norm2.eps)
        self.act: nn.Module = nn.Identity()
        self.squares = isinstance(mlp.act, StarReLU)
        fused = activation_of(mlp.act)
        if isinstance(mlp.act, StarReLU):
            fused = "relu"
            fc2 = fold_affine(fc2, *(value.expand(fc2.in_channels) for value in (mlp.act.scale, mlp.act.bias)))
        elif fused is None:
            self.act = mlp.act
        self.fc1, self.fc2 = PackedConv2d(fc1, fused or "none"), PackedConv2d(scaled(fc2, block.layer_scale2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.fc1(self.norm(x)))
        if self.squares:
            h = h.mul_(h) if may_overwrite(h) else h * h
        return self.fc2.add_to(scale_shortcut(x, self.res_scale), h)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def convert(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A published checkpoint in our layout, which is timm's.

    Takes sail-sg/poolformer's and sail-sg/metaformer's layouts, and ours. 1x1 convolutions, which the authors store as
    linear layers, are reshaped to what the model holds.
    """
    rename: Callable[[str], str] = str
    if "network.0.0.mlp.fc1.weight" in state_dict:
        rename = _rename_poolformer
    elif "downsample_layers.0.conv.weight" in state_dict:
        rename = _rename_baselines
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    converted = {}
    for key, tensor in state_dict.items():
        key = rename(key)
        shape = shapes.get(key, tensor.shape)
        if tensor.ndim != len(shape) and tensor.shape[:2] == shape[:2] and tensor.numel() == shape.numel():
            tensor = tensor.reshape(shape)
        converted[key] = tensor
    return converted


def _rename_poolformer(key: str) -> str:
    """sail-sg/poolformer: `network` alternates stages (even) and downsampling (odd)."""
    key = key.replace("patch_embed.proj.", "stem.conv.")
    if match := re.match(r"network\.(\d+)\.(.*)", key):
        place, rest = int(match[1]), match[2]
        if place % 2:
            return f"stages.{place // 2 + 1}.downsample.{rest.replace('proj.', 'conv.')}"
        block, rest = rest.split(".", 1)
        rest = re.sub(r"layer_scale_(\d)", r"layer_scale\1.scale", rest)
        return f"stages.{place // 2}.blocks.{block}.{rest}"
    return _rename_head(key)


def _rename_baselines(key: str) -> str:
    """sail-sg/metaformer."""
    if match := re.match(r"downsample_layers\.(\d+)\.(?:(conv)|(?:pre|post)_(norm))\.(.*)", key):
        place = "stem" if match[1] == "0" else f"stages.{match[1]}.downsample"
        return f"{place}.{match[2] or match[3]}.{match[4]}"
    if match := re.match(r"stages\.(\d+)\.(\d+)\.(.*)", key):
        return f"stages.{match[1]}.blocks.{match[2]}.{match[3]}"
    return _rename_head(key)


def _rename_head(key: str) -> str:
    return re.sub(r"^norm\.", "head.norm.", re.sub(r"^head\.", "head.fc.", key))


# ------------------------------------------------------------------------------------------------------------- variants

POOLFORMER_PAPER = Paper(
    title="MetaFormer Is Actually What You Need for Vision",
    authors="Yu, Luo, Zhou, Si, Zhou, Wang, Feng, Yan",
    venue="CVPR 2022",
    arxiv="2111.11418",
)
BASELINES_PAPER = Paper(
    title="MetaFormer Baselines for Vision",
    authors="Yu, Si, Zhou, Luo, Zhou, Feng, Yan, Wang",
    venue="TPAMI 46(2), 2024",
    arxiv="2210.13452",
)
README_V1 = "README of sail-sg/poolformer"
README_BASELINES = "README of sail-sg/metaformer"

SIZES = {
    "s12": {"depths": (2, 2, 6, 2), "dims": (64, 128, 320, 512)},
    "s24": {"depths": (4, 4, 12, 4), "dims": (64, 128, 320, 512)},
    "s36": {"depths": (6, 6, 18, 6), "dims": (64, 128, 320, 512)},
    "m36": {"depths": (6, 6, 18, 6), "dims": (96, 192, 384, 768)},
    "m48": {"depths": (8, 8, 24, 8), "dims": (96, 192, 384, 768)},
}
# ConvFormer and CAFormer have fewer shallow blocks, and a last width of 576 where the basic baselines' m has 768
LARGE_SIZES = {
    "s18": {"depths": (3, 3, 9, 3), "dims": (64, 128, 320, 512)},
    "s36": {"depths": (3, 12, 18, 3), "dims": (64, 128, 320, 512)},
    "m36": {"depths": (3, 12, 18, 3), "dims": (96, 192, 384, 576)},
    "b36": {"depths": (3, 12, 18, 3), "dims": (128, 256, 512, 768)},
}

POOLFORMER = {
    "token_mixers": "pool",
    "mlp_act": "gelu",
    "mlp_bias": True,
    "norm_bias": True,
    "norm_eps": 1e-5,
    "downsample_norm": False,
    "res_scale_init": None,
    "head_norm_first": True,
    "patch_conv_init": "default",
}
CONV_OR_ATTENTION = {"norm": "layer", "mlp_head": True}
TIMM = {"head_norm_first": False, "mlp_head_eps": 1e-6}  # what timm computes otherwise, where the model has it


def _entry(
    name: str,
    args: dict[str, Any],
    compact: str,
    params: float | None = None,
    macs: float = 0.0,
    weights: tuple[Weights, ...] = (),
    **fields: Any,
) -> None:
    """Register one variant; `params` in millions and `macs` in billions, where the authors state them."""
    baselines = not name.startswith("poolformer_")
    readme = README_BASELINES if baselines else README_V1
    register(
        Entry(
            name=name,
            build=MetaFormer,
            family="metaformer",
            args=args,
            paper=BASELINES_PAPER if baselines else POOLFORMER_PAPER,
            compact=compact,
            code_license="apache-2.0",
            code_url=f"https://github.com/sail-sg/{'metaformer' if baselines else 'poolformer'}",
            reported=None
            if params is None
            else Reported(params=round(params * 1e6), macs=round(macs * 1e9), source=readme),
            weights=weights,
            convert=convert,
            first_conv="stem.conv",
            classifier="head.fc.fc2" if args.get("mlp_head") else "head.fc",
            timm_args={key: value for key, value in TIMM.items() if args.get(key.removesuffix("_eps"))},
            **fields,
        )
    )


TIMM_LICENSE_NOTE = "Licence as timm states it; the authors state none for the weights."
NO_LICENSE_NOTE = "The authors state no licence for the weights; their code is Apache-2.0."

# size: params (M), MACs (G), top-1 (%) as the authors state them, initial LayerScale, crop_pct
for size, params, macs, top1, layer_scale_init, crop_pct in (
    ("s12", 12.0, 1.8, 77.2, 1e-5, 0.9),
    ("s24", 21.0, 3.4, 80.3, 1e-5, 0.9),
    ("s36", 31.0, 5.0, 81.4, 1e-6, 0.9),
    ("m36", 56.0, 8.8, 82.1, 1e-6, 0.95),
    ("m48", 73.0, 11.6, 82.5, 1e-6, 0.95),
):
    _entry(
        f"poolformer_{size}",
        {**POOLFORMER, **SIZES[size], "layer_scale_init": layer_scale_init},
        "3x3 average pooling, which has no weights, mixes the tokens.",
        params,
        macs,
        (
            Weights(
                tag="sail_in1k",
                hub_id=f"timm/poolformer_{size}.sail_in1k",
                license="apache-2.0",
                top1=top1,
                accuracy_source=README_V1,
                crop_pct=crop_pct,
                note=TIMM_LICENSE_NOTE,
            ),
        ),
        note="The authors' MACs are fvcore's total, which counts norms.",
    )

# family: token mixers, what makes it compact, {size: params (M), MACs (G), top-1 (%)}
for family, mixers, compact, variants in (
    (
        "identityformer",
        "identity",
        "Nothing mixes the tokens but the downsampling convolutions.",
        {
            "s12": (11.9, 1.8, 74.6),
            "s24": (21.3, 3.4, 78.2),
            "s36": (30.8, 5.0, 79.3),
            "m36": (56.1, 8.8, 80.0),
            "m48": (73.3, 11.5, 80.4),
        },
    ),
    (
        "randformer",
        ("identity", "identity", "random", "random"),
        "Frozen random matrices mix the tokens of the last two stages; nothing mixes those of the first two.",
        {
            "s12": (12.1, 1.9, 76.6),
            "s24": (21.8, 3.5, 78.2),
            "s36": (31.5, 5.2, 79.5),
            "m36": (56.8, 9.0, 81.2),
            "m48": (74.2, 11.9, 81.4),
        },
    ),
    (
        "poolformerv2",
        "pool",
        "3x3 average pooling, which has no weights, mixes the tokens.",
        {
            "s12": (11.9, 1.8, 78.0),
            "s24": (21.3, 3.4, 80.7),
            "s36": (30.8, 5.0, 81.6),
            "m36": (56.1, 8.8, 82.2),
            "m48": (73.3, 11.5, 82.6),
        },
    ),
):
    for size, (params, macs, top1) in variants.items():
        name = f"{family}_{size}"
        in_timm = family == "poolformerv2"
        _entry(
            name,
            {"token_mixers": mixers, **SIZES[size]},
            compact,
            params,
            macs,
            (
                Weights(
                    tag="sail_in1k",
                    hub_id=f"timm/{name}.sail_in1k" if in_timm else "sail/dl",
                    filename=None if in_timm else f"{family}/{name}.pth",
                    license="apache-2.0" if in_timm else "unstated",
                    top1=top1,
                    accuracy_source=README_BASELINES,
                    crop_pct=1.0,
                    note=TIMM_LICENSE_NOTE if in_timm else NO_LICENSE_NOTE,
                ),
            ),
            fixed_input_size=family == "randformer",
            note="Parameters include the frozen random matrices." if family == "randformer" else "",
        )

# tag of the weights: input size, what they were trained on before, classes
TRAINING = {
    "sail_in1k": (224, None, 1000),
    "sail_in1k_384": (384, None, 1000),
    "sail_in22k_ft_in1k": (224, "imagenet-22k", 1000),
    "sail_in22k_ft_in1k_384": (384, "imagenet-22k", 1000),
    "sail_in22k": (224, None, 21841),
}
# family: token mixers, what makes it compact, {size: params (M), MACs (G), top-1 (%) in the order of TRAINING}
for family, mixers, compact, large_variants in (
    (
        "convformer",
        "sepconv",
        "Depthwise separable 7x7 convolutions mix the tokens.",
        {
            "s18": (27.0, 3.9, (83.0, 84.4, 83.7, 85.0)),
            "s36": (40.0, 7.6, (84.1, 85.4, 85.4, 86.4)),
            "m36": (57.0, 12.8, (84.5, 85.6, 86.1, 86.9)),
            "b36": (100.0, 22.6, (84.8, 85.7, 87.0, 87.6)),
        },
    ),
    (
        "caformer",
        ("sepconv", "sepconv", "attention", "attention"),
        "Separable convolutions mix the many tokens of the first two stages, attention the few of the last two.",
        {
            "s18": (26.0, 4.1, (83.6, 85.0, 84.1, 85.4)),
            "s36": (39.0, 8.0, (84.5, 85.7, 85.8, 86.9)),
            "m36": (56.0, 13.2, (85.2, 86.2, 86.6, 87.5)),
            "b36": (99.0, 23.2, (85.5, 86.4, 87.4, 88.1)),
        },
    ),
):
    for size, (params, macs, claims) in large_variants.items():
        name = f"{family}_{size}"
        _entry(
            name,
            {**CONV_OR_ATTENTION, "token_mixers": mixers, **LARGE_SIZES[size]},
            compact,
            params,
            macs,
            tuple(
                Weights(
                    tag=tag,
                    hub_id=f"timm/{name}.{tag}",
                    license="apache-2.0",
                    dataset="imagenet-1k" if num_classes == 1000 else "imagenet-22k",
                    pretrained_on=pretrained_on,
                    top1=claim,
                    accuracy_source=README_BASELINES if claim else None,
                    num_classes=num_classes,
                    input_size=(3, side, side),
                    crop_pct=1.0,
                    note=TIMM_LICENSE_NOTE,
                )
                for (tag, (side, pretrained_on, num_classes)), claim in zip(
                    TRAINING.items(), (*claims, None), strict=True
                )
            ),
        )
_entry(
    "caformer_test",
    {
        **CONV_OR_ATTENTION,
        "token_mixers": ("sepconv", "sepconv", "attention", "attention"),
        "depths": (1, 1, 1, 1),
        "dims": (16, 32, 64, 96),
    },
    "A tiny one for tests and trials, not of the paper.",
    input_size=(3, 64, 64),
)
