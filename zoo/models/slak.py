"""SLaK: convolutional networks with kernels beyond 51x51, decomposed and sparse.

Liu et al., "More ConvNets in the 2020s: Scaling up Kernels Beyond 51x51 using Sparsity", ICLR 2023, arXiv 2207.03620.

What makes them compact: a 51x51 depthwise kernel is the sum of a tall one (51x5), a wide one (5x51) and a small one
(5x5), each with a batch norm of its own. Around it stands a ConvNeXt. The width grows by 1.3, and 40% of the weights
are zero, by training that moves the zeros about. They stand in the weights, not in this file: a profile of a model with
its weights counts them.

The defaults are the paper's networks. The authors' code has others: whole 51x51 kernels, width 1.0. Two more forms are
theirs: `decompose=False` leaves kernels whole, and `merged=True` holds the sum of all branches, batch norms folded in.
Their code merges whole kernels alone; here decomposed ones merge too, into a tall and a wide kernel with one bias.

With 7x7 kernels and no small ones it is what the authors call ConvNeXt: unlike the original it has a batch norm behind
the depthwise convolution. `timm_convnext_state_dict` folds that away, and what is left is timm's ConvNeXt.
"""

import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, cast

import torch
from timm.layers import DropPath, LayerNorm2d, Mlp, calculate_drop_path_rates
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zoo.errors import CheckpointError, ConfigError
from zoo.layers.arguments import (
    check_above_zero,
    check_counts,
    check_flags,
    check_numbers,
    check_numbers_or_none,
    check_rates,
    check_widths,
)
from zoo.layers.convnext import FastConvNeXtBlock, FastConvNeXtStage
from zoo.layers.fast_form import HasFastForm
from zoo.layers.image_size import check_map
from zoo.layers.init import init_weights
from zoo.layers.large_kernel import depthwise_conv2d, large_kernel_sum
from zoo.layers.observers import channels_last
from zoo.layers.packed import PackedConv2d, is_gelu
from zoo.layers.staged import Head, Stage, StagedNet
from zoo.layers.training_mlp import training_mlp
from zoo.registry import Entry, Paper, Reported, Weights, register

__all__ = ["SLaK", "arguments_of", "timm_convnext_state_dict"]

BN_EPS = 1e-5


# ------------------------------------------------------------------------------------------------------- large kernels

torch.fx.wrap("check_map")  # these choose by sizes, which fx does not follow
torch.fx.wrap("depthwise_conv2d")
torch.fx.wrap("large_kernel_sum")


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution with odd kernel edges, zero padding and stride 1. (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int, kernel_size: tuple[int, int], bias: bool = False) -> None:
        height, width = kernel_size
        super().__init__(dim, dim, kernel_size, padding=(height // 2, width // 2), groups=dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv2d(x, self.weight, self.bias)


class Branch(nn.Module):
    """A depthwise convolution and its batch norm."""

    def __init__(self, dim: int, kernel_size: tuple[int, int], batch_norm: bool) -> None:
        super().__init__()
        self.conv = DepthwiseConv2d(dim, kernel_size)
        self.bn = nn.BatchNorm2d(dim, eps=BN_EPS) if batch_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class LargeKernelConv(nn.ModuleDict):
    """The sum of parallel branches, named as the authors name them. (B, C, H, W) -> (B, C, H, W)

    `LoRA1` (tall, M x N) and `LoRA2` (wide, N x M), or `lkb_origin` (whole, M x M); `small_conv` (N x N) where N < M.
    """

    def __init__(
        self, dim: int, kernel_size: int, small_kernel_size: int | None, decompose: bool, batch_norm: bool
    ) -> None:
        super().__init__()
        large, small = kernel_size, small_kernel_size
        if decompose:
            assert small is not None  # the network checks it
            self["LoRA1"] = Branch(dim, (large, small), batch_norm)
            self["LoRA2"] = Branch(dim, (small, large), batch_norm)
        else:
            self["lkb_origin"] = Branch(dim, (large, large), batch_norm)
        if small is not None and small < large:
            self["small_conv"] = Branch(dim, (small, small), batch_norm)

    def forward(self, x: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        for branch in self.values():
            outputs.append(branch(x))
        total = outputs[0]
        for output in outputs[1:]:
            total = total + output
        return total

    def merge(self) -> "MergedLargeKernelConv":
        """The same function at inference with all branches in one or two kernels."""
        tensors, eps = self.state_dict(), {}
        for name, branch in self.items():
            if isinstance(branch.bn, _BatchNorm):
                eps[name] = branch.bn.eps
                mean = tensors[f"{name}.bn.running_mean"]
                tensors.setdefault(f"{name}.bn.weight", torch.ones_like(mean))  # without an affine it has none
                tensors.setdefault(f"{name}.bn.bias", torch.zeros_like(mean))
        return MergedLargeKernelConv.of(merge_branches(tensors, eps))


class MergedLargeKernelConv(nn.Module):
    """What the branches sum up to: `LoRA1` (tall, with the bias) and `LoRA2` (wide), or `lkb_reparam` (whole)."""

    def __init__(self, dim: int, kernel_size: int, small_kernel_size: int | None, decompose: bool) -> None:
        super().__init__()
        self.LoRA1 = self.LoRA2 = self.lkb_reparam = None
        if decompose:
            assert small_kernel_size is not None  # the network checks it
            self.LoRA1 = DepthwiseConv2d(dim, (kernel_size, small_kernel_size), bias=True)
            self.LoRA2 = DepthwiseConv2d(dim, (small_kernel_size, kernel_size))
        else:
            self.lkb_reparam = DepthwiseConv2d(dim, (kernel_size, kernel_size), bias=True)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "MergedLargeKernelConv":
        """The module that holds these tensors."""
        decomposed = "LoRA1.weight" in tensors
        dim, _, height, width = tensors["LoRA1.weight" if decomposed else "lkb_reparam.weight"].shape
        with torch.device("meta"):
            merged = cls(dim, height, width, decomposed)
        merged.load_state_dict(tensors, assign=True)
        return merged

    def forward(self, x: Tensor) -> Tensor:
        if self.LoRA1 is not None and self.LoRA2 is not None:
            return large_kernel_sum(x, self.LoRA1.weight, self.LoRA2.weight, None, self.LoRA1.bias)
        assert self.lkb_reparam is not None
        return self.lkb_reparam(x)

    def merge(self) -> "MergedLargeKernelConv":
        return self


def merge_branches(tensors: Mapping[str, Tensor], eps: Mapping[str, float] | None = None) -> dict[str, Tensor]:
    """The tensors of a `LargeKernelConv` as those of a `MergedLargeKernelConv`. Exact; computed in float64.

    A batch norm scales its kernel and adds to the bias; the small kernel joins the middle of the tall one or of the
    whole one, since all are centred on the same pixel. `eps`: of each branch's norm where it is not the authors' 1e-5.
    Raises CheckpointError where a part is missing.
    """
    kernels, bias = {}, None
    for name in ("LoRA1", "LoRA2", "lkb_origin", "small_conv"):
        norm = [f"{name}.bn.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
        has_norm = any(part in tensors for part in norm)
        if not has_norm and f"{name}.conv.weight" not in tensors:
            continue
        if missing := [part for part in (f"{name}.conv.weight", *(norm if has_norm else ())) if part not in tensors]:
            raise CheckpointError(f"A large kernel of this checkpoint lacks {', '.join(missing)}.")
        kernel = tensors[f"{name}.conv.weight"].to(torch.float64, copy=True)
        shift = torch.zeros_like(kernel[:, 0, 0, 0])
        if f"{name}.conv.bias" in tensors:
            shift = tensors[f"{name}.conv.bias"].double()
        if has_norm:
            weight, offset, mean, variance = (tensors[part].double() for part in norm)
            scale = weight / (variance + (eps or {}).get(name, BN_EPS)).sqrt()
            kernel, shift = kernel * scale.view(-1, 1, 1, 1), offset + scale * (shift - mean)
        kernels[name] = kernel
        bias = shift if bias is None else bias + shift
    if kernels.keys() - {"small_conv"} not in ({"LoRA1", "LoRA2"}, {"lkb_origin"}):
        raise CheckpointError(
            "A large kernel of this checkpoint is not whole: it has to be LoRA1 and LoRA2, or lkb_origin, but there is "
            f"{', '.join(kernels) or 'none'}."
        )
    target = kernels["LoRA1" if "LoRA1" in kernels else "lkb_origin"]
    if "LoRA1" in kernels and target.shape[2] > target.shape[3] and "small_conv" not in kernels:
        raise CheckpointError("A large kernel of this checkpoint lacks small_conv.conv.weight.")
    if "small_conv" in kernels:
        small = kernels["small_conv"]
        top, left = ((target.shape[i] - small.shape[i]) // 2 for i in (2, 3))
        target[:, :, top : top + small.shape[2], left : left + small.shape[3]] += small
    dtype = next(tensor.dtype for name, tensor in tensors.items() if name.endswith("conv.weight"))
    assert bias is not None
    if "LoRA1" in kernels:
        merged = {"LoRA1.weight": target, "LoRA1.bias": bias, "LoRA2.weight": kernels["LoRA2"]}
    else:
        merged = {"lkb_reparam.weight": target, "lkb_reparam.bias": bias}
    return {name: tensor.to(dtype) for name, tensor in merged.items()}


# ---------------------------------------------------------------------------------------------------------------- model


class SLaKBlock(nn.Module):
    """`x + gamma * mlp(norm(large_kernel(x)))`; norm and MLP work on the channels of each pixel.

    (B, C, H, W) -> (B, C, H, W)
    """

    def __init__(
        self,
        dim: int,
        large_kernel: LargeKernelConv | MergedLargeKernelConv,
        mlp_ratio: float,
        drop_path: float,
        layer_scale_init: float | None,
    ) -> None:
        super().__init__()
        self.layer_scale_init = layer_scale_init
        self.large_kernel: LargeKernelConv | MergedLargeKernelConv = large_kernel
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.gamma = None if layer_scale_init is None else nn.Parameter(torch.empty(dim))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.gamma is not None and self.layer_scale_init is not None:
            nn.init.constant_(self.gamma, self.layer_scale_init)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.transform(self.norm(self.large_kernel(x).permute(0, 2, 3, 1)))
        return x + self.drop_path(branch.permute(0, 3, 1, 2))

    def transform(self, x: Tensor) -> Tensor:
        """MLP and layer scale. (B, H, W, C) -> (B, H, W, C)"""
        if not torch.jit.is_scripting():
            fits = self.training and type(self.mlp) is Mlp
            y = training_mlp(x, self.mlp, scale=self.gamma) if fits else None
            if y is not None:
                return y
        x = self.mlp(x)
        return x if self.gamma is None else x * self.gamma


class Stem(HasFastForm):
    """Patches of `stride` x `stride` pixels, then norm. (B, in_chans, H, W) -> (B, dim, H/stride, W/stride)

    `needed` says which images the network takes. Raises ConfigError for those without a patch.
    """

    def __init__(self, in_chans: int, dim: int, stride: int, needed: str) -> None:
        super().__init__()
        self.stride, self.needed = stride, needed
        self.conv = nn.Conv2d(in_chans, dim, stride, stride)
        self.norm = LayerNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        check_map(x, self.stride, self.stride, self.needed)
        return self.norm(self.conv(x))

    def fast_form(self) -> nn.Module:
        return FastStem(self)


class Downsample(nn.Module):
    """Norm, then a 2x2 convolution of stride 2. (B, in_dim, H, W) -> (B, dim, H/2, W/2)

    `needed` says which images the network takes. Raises ConfigError for a map below 2x2.
    """

    def __init__(self, in_dim: int, dim: int, needed: str) -> None:
        super().__init__()
        self.needed = needed
        self.norm = LayerNorm2d(in_dim)
        self.conv = nn.Conv2d(in_dim, dim, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        check_map(x, 2, 2, self.needed)
        return self.conv(self.norm(x))


class SLaKStage(Stage, HasFastForm):
    def fast_form(self) -> nn.Module | None:
        blocks = [cast(SLaKBlock, block) for block in self.blocks]
        if not all(is_gelu(block.mlp.act) for block in blocks):
            return None
        return FastConvNeXtStage(
            self.downsample if isinstance(self.downsample, Downsample) else None,
            [FastConvNeXtBlock(b.large_kernel.merge(), b.norm, b.mlp.fc1, b.mlp.fc2, b.gamma) for b in blocks],
        )


class SLaK(StagedNet):
    """A ConvNeXt of large kernels. (B, in_chans, H, W) -> (B, num_classes)

    The defaults are SLaK-T's. Any number of stages works. H and W are at least the stride of the last: 32 with four
    stages and a stem of stride 4. A smaller image is a ConfigError.

    Args:
        in_chans: channels of the input.
        num_classes: width of the classifier; 0 leaves it out.
        global_pool: "avg", "max", "avgmax" (their mean), or "" for none (only without a classifier).
        depths: blocks of each stage.
        dims: width of each stage before `width_factor`.
        width_factor: what `dims` are multiplied by, rounded down.
        kernel_sizes: edge of the large kernels of each stage, odd.
        small_kernel_size: the decomposed kernels' short edge, and the edge of the small kernel that stands beside each
            larger one, odd. None for no small ones (with whole kernels).
        decompose: whether a large kernel is a tall and a wide one, instead of whole.
        merged: hold the branches' sum without batch norms: for inference, and for checkpoints that were merged.
        batch_norm: whether every branch has a batch norm.
        mlp_ratio: hidden width of the MLP over the width.
        layer_scale_init: initial gamma of each block; None for none.
        head_init_scale: the initial classifier is multiplied by this.
        stem_stride: edge and stride of the stem's patches; 1 or 2 suits 32x32 images.
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
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        width_factor: float = 1.3,
        kernel_sizes: Sequence[int] = (51, 49, 47, 13),
        small_kernel_size: int | None = 5,
        decompose: bool = True,
        merged: bool = False,
        batch_norm: bool = True,
        mlp_ratio: float = 4.0,
        layer_scale_init: float | None = 1e-6,
        head_init_scale: float = 1.0,
        stem_stride: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        depths, dims, kernel_sizes = check_widths(depths=depths, dims=dims, kernel_sizes=kernel_sizes)
        check_above_zero(width_factor=width_factor, mlp_ratio=mlp_ratio)
        check_rates(drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        check_counts(1, stem_stride=stem_stride)
        check_numbers(head_init_scale=head_init_scale)
        check_numbers_or_none(layer_scale_init=(layer_scale_init,))
        check_flags(decompose=decompose, merged=merged, batch_norm=batch_norm)
        edges = kernel_sizes if small_kernel_size is None else (*kernel_sizes, small_kernel_size)
        if not all(type(edge) is int and edge > 0 and edge % 2 for edge in edges):
            raise ConfigError(
                f"kernel_sizes and small_kernel_size must be odd: a kernel has a centre. They are {edges}."
            )
        if decompose and small_kernel_size is None:
            raise ConfigError("Decomposed kernels have a short edge: give small_kernel_size, or decompose=False.")
        widths = tuple(int(dim * width_factor) for dim in dims)
        if not all(widths):
            raise ConfigError(f"dims {dims} times width_factor {width_factor} leave a stage without channels.")
        super().__init__(widths, tuple(stem_stride * 2**i for i in range(len(dims))), in_chans, num_classes)
        self.head_init_scale = head_init_scale

        def large_kernel(width: int, kernel_size: int) -> LargeKernelConv | MergedLargeKernelConv:
            if merged:
                return MergedLargeKernelConv(width, kernel_size, small_kernel_size, decompose)
            return LargeKernelConv(width, kernel_size, small_kernel_size, decompose, batch_norm)

        least = stem_stride * 2 ** (len(dims) - 1)
        needed = f"This network takes images from {least}x{least} up."
        self.stem = Stem(in_chans, widths[0], stem_stride, needed)
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, (width, kernel_size) in enumerate(zip(widths, kernel_sizes, strict=True)):
            downsample = Downsample(widths[i - 1], width, needed) if i else nn.Identity()
            blocks = [
                SLaKBlock(width, large_kernel(width, kernel_size), mlp_ratio, drop_path, layer_scale_init)
                for drop_path in drop_paths[i]
            ]
            stages.append(SLaKStage(downsample, blocks))
        self.stages = nn.Sequential(*stages)
        self.head = Head(widths[-1], num_classes, global_pool, norm=LayerNorm2d(widths[-1]), drop_rate=drop_rate)
        init_weights(self)

    def init_module(self, module: nn.Module) -> None:
        """Initialise the tensors that `module` itself holds, as the authors' code does."""
        if isinstance(module, nn.Conv2d | nn.Linear):
            scale = self.head_init_scale if module is self.head.fc else 1.0
            nn.init.normal_(module.weight, std=0.02 * scale)  # published as truncated at +-2, 100 standard deviations
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        else:
            module.reset_parameters()  # type: ignore[operator]


# ------------------------------------------------------------------------------------------------------ fast inference
# Of the stem; that of the stages is `zoo.layers.convnext`.


class FastStem(nn.Module):
    """`Stem` with a channels_last output."""

    def __init__(self, stem: Stem) -> None:
        super().__init__()
        self.stride, self.needed = stem.stride, stem.needed
        self.conv, self.norm = PackedConv2d(stem.conv), stem.norm

    def forward(self, x: Tensor) -> Tensor:
        check_map(x, self.stride, self.stride, self.needed)
        return self.norm(self.conv(channels_last(x)))


# ---------------------------------------------------------------------------------------------------------- checkpoints


def convert(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A published checkpoint in our layout.

    Takes VITA-Group/SLaK's layout, trained or merged, a backbone out of a detector or segmenter, and ours. The branches
    of a trained checkpoint are merged where the model is.
    """
    own = model.state_dict().keys()
    is_segmentation = any(key.startswith("backbone.") for key in own)  # whose layout nobody else has
    tensors = dict(state_dict) if is_segmentation else {_rename(key): tensor for key, tensor in state_dict.items()}
    if any(re.search(r"large_kernel\.(LoRA1|lkb_reparam)\.weight$", key) for key in own):
        tensors = _merge_all(tensors)
    return tensors


def _rename(key: str) -> str:
    key = key.removeprefix("backbone.")
    if match := re.match(r"downsample_layers\.(\d+)\.([01])\.(.*)", key):
        stage, place, rest = match.groups()
        if stage == "0":
            return f"stem.{('conv', 'norm')[int(place)]}.{rest}"
        return f"stages.{stage}.downsample.{('norm', 'conv')[int(place)]}.{rest}"
    if match := re.match(r"stages\.(\d+)\.(\d+)\.(.*)", key):
        return f"stages.{match[1]}.blocks.{match[2]}.{re.sub(r'^pwconv', 'mlp.fc', match[3])}"
    return re.sub(r"^norm\.", "head.norm.", re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key))


def _merge_all(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` with the branches of every operator merged, which those that were merged before stay."""
    merged: dict[str, Tensor] = {}
    operators: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        operator, found, rest = key.rpartition("large_kernel.")
        if found and (".conv." in rest or ".bn." in rest):
            operators.setdefault(operator + found, {})[rest] = tensor
        else:
            merged[key] = tensor
    for operator, branches in operators.items():
        merged |= {operator + name: tensor for name, tensor in merge_branches(branches).items()}
    return merged


def arguments_of(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of the `SLaK` that a checkpoint, in a published layout or ours, belongs to: read from its shapes.

        tensors = zoo.weights.read_state_dict("SLaK_tiny_checkpoint.pth", use_ema=False)  # the last, as evaluated
        model = zoo.create_model("slak_tiny", **arguments_of(tensors))
        zoo.load_checkpoint(model, tensors)

    Widths come out as they are, with `width_factor=1.0`. Rates, which have no shape, are left out. Raises
    CheckpointError for the checkpoint of another model.
    """
    shapes = {_rename(key): tuple(tensor.shape) for key, tensor in state_dict.items()}
    firsts: list[str] = []  # the first block of each stage
    while any(key.startswith(f"stages.{len(firsts)}.blocks.0.") for key in shapes):
        firsts.append(f"stages.{len(firsts)}.blocks.0.")
    depths = []
    for i in range(len(firsts)):
        found = {match[1] for key in shapes if (match := re.match(rf"stages\.{i}\.blocks\.(\d+)\.", key))}
        depths.append(len(found))
    try:
        (name,) = {name for name in _LARGE if f"{firsts[0]}large_kernel.{name}.weight" in shapes}
        larges = [shapes[f"{first}large_kernel.{name}.weight"] for first in firsts]
        _, in_chans, _, stem_stride = shapes["stem.conv.weight"]
        mlps = [shapes[f"{first}mlp.fc1.weight"] for first in firsts]
        mlp_ratio = _mlp_ratio([(hidden, width) for hidden, width in mlps])
    except (IndexError, KeyError, ValueError) as error:
        raise CheckpointError("This is no checkpoint of a SLaK: its blocks hold no large kernels.") from error
    decompose, merged = _LARGE[name]
    smalls = [shapes.get(f"{first}large_kernel.small_conv.conv.weight") for first in firsts]
    small_kernel_size = larges[0][3] if decompose else next((shape[3] for shape in smalls if shape), None)
    arguments: dict[str, Any] = {
        "in_chans": in_chans,
        "num_classes": shapes.get("head.fc.weight", (0,))[0],
        "depths": tuple(depths),
        "dims": tuple(shape[0] for shape in larges),
        "width_factor": 1.0,
        "kernel_sizes": tuple(shape[2] for shape in larges),
        "small_kernel_size": small_kernel_size,
        "decompose": decompose,
        "merged": merged,
        "batch_norm": any(key.endswith(".bn.weight") for key in shapes),
        "mlp_ratio": mlp_ratio,
        "stem_stride": stem_stride,
    }
    if f"{firsts[0]}gamma" not in shapes:
        arguments["layer_scale_init"] = None
    return arguments


def _mlp_ratio(stages: Sequence[tuple[int, int]]) -> float:
    """The shortest decimal that gives each of (hidden, width) its hidden width.

    Where channels were cut out there may be none: then it is the quotient of the first.
    """
    least = max(Fraction(hidden, width) for hidden, width in stages)
    for digits in range(16):
        first = math.ceil(least * 10**digits)
        for ratio in (first / 10**digits, (first + 1) / 10**digits):  # rounded products may just miss the first
            if all(int(ratio * width) == hidden for hidden, width in stages):
                return ratio
    return stages[0][0] / stages[0][1]


# the kernel that says what a large-kernel operator is: (decompose, merged)
_LARGE = {
    "LoRA1.conv": (True, False),
    "lkb_origin.conv": (False, False),
    "LoRA1": (True, True),
    "lkb_reparam": (False, True),
}


def timm_convnext_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint of whole kernels (`decompose=False`) in the layout of timm's ConvNeXt, which computes the same.

    timm's `convnext_tiny` and `convnext_small` take those of 7x7 kernels. Batch norms are folded, small kernels merged.
    Raises CheckpointError for decomposed kernels, which no single one of that size replaces.
    """
    tensors = _merge_all({_rename(key): tensor for key, tensor in state_dict.items()})
    if not any(key.endswith("large_kernel.lkb_reparam.weight") for key in tensors):
        raise CheckpointError("Only a SLaK of whole kernels, decompose=False, is a ConvNeXt to timm.")
    renamed = {}
    for key, tensor in tensors.items():
        key = key.replace("stem.conv.", "stem.0.").replace("stem.norm.", "stem.1.")
        key = key.replace("downsample.norm.", "downsample.0.").replace("downsample.conv.", "downsample.1.")
        renamed[key.replace("large_kernel.lkb_reparam.", "conv_dw.")] = tensor
    return renamed


# ------------------------------------------------------------------------------------------------------------- variants

PAPER = Paper(
    title="More ConvNets in the 2020s: Scaling up Kernels Beyond 51x51 using Sparsity",
    authors="Liu, Chen, Chen, Chen, Xiao, Wu, Kärkkäinen, Pechenizkiy, Mocanu, Wang",
    venue="ICLR 2023",
    arxiv="2207.03620",
)
L2S_PAPER = Paper(
    title="Are Large Kernels Better Teachers than Transformers for ConvNets?",
    authors="Huang, Yin, Zhang, Shen, Fang, Pechenizkiy, Wang, Liu",
    venue="ICML 2023",
    arxiv="2305.19412",
)
README = "README of VITA-Group/SLaK"
COMPACT = (
    "Large depthwise kernels are the sum of tall, wide and small ones; trained sparse, 40% of all weights are zero."
)
WEIGHTS_NOTE = (
    "The authors state no licence for the weights; their code is MIT. Where the file holds averaged weights, too, the "
    "last ones are loaded, which the authors evaluate."
)

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768)},
    "small": {"depths": (3, 3, 27, 3), "dims": (96, 192, 384, 768)},
    "base": {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)},
    "large": {"depths": (3, 3, 27, 3), "dims": (192, 384, 768, 1536)},
}
DRIVE = "https://drive.google.com/file/d/{}/view"
SURF = "https://surfdrive.surf.nl/files/index.php/s/{}"


def _weights(tag: str, page: str, top1: float, note: str = "") -> Weights:
    return Weights(
        tag=tag,
        page=page,
        license="unstated",
        top1=top1,
        accuracy_source=README,
        use_ema=False,
        note=f"{note} {WEIGHTS_NOTE}".lstrip(),
    )


def _entry(
    name: str,
    args: Mapping[str, Any],
    reported: tuple[float, float] | None = None,
    weights: tuple[Weights, ...] = (),
    **fields: Any,
) -> None:
    """Register one variant; `reported` are the authors' parameters in millions and MACs in billions."""
    costs = None
    if reported is not None:
        costs = Reported(params=round(reported[0] * 1e6), macs=round(reported[1] * 1e9), source=README)
    facts: dict[str, Any] = {
        "family": "slak",
        "paper": PAPER,
        "compact": COMPACT,
        "code_license": "mit",
        "code_url": "https://github.com/VITA-Group/SLaK",
        "convert": convert,
        "arguments_of": arguments_of,
        "first_conv": "stem.conv",
        "classifier": "head.fc",
    }
    register(Entry(name=name, build=SLaK, args=args, reported=costs, weights=weights, **(facts | fields)))


def _sparse_note(params: int, macs: float) -> str:
    """Why the authors' costs are lower; `params` and `macs` (in billions) with 60% of every layer's weights."""
    return (
        "The authors state costs at 40% sparsity, here they are dense. With 40% of each layer's weights zero they are "
        f"{params:,} parameters and {macs:.2f} G MACs; the authors' MACs follow the densities that SNIP chose."
    )


# size: the authors' parameters (M) and MACs (G), ours at 40% sparsity, weights
for size, reported, effective, weights in (
    (
        "tiny",
        (30, 5.0),
        (30_473_228, 5.22),
        (
            _weights("vita_in1k", DRIVE.format("1Iut2f5FMS_77jGPYoUJDQzDIXOsax1u4"), 82.5, "300 epochs."),
            _weights("vita_in1k_120e", SURF.format("WiQYWNclJ9bW5XV"), 81.6, "120 epochs."),
        ),
    ),
    (
        "small",
        (55, 9.8),
        (54_780_317, 9.96),
        (_weights("vita_in1k", DRIVE.format("1etM6KQbnlsgDAZ37adsQJ3UI8Bbv2AVe"), 83.8, "300 epochs."),),
    ),
    (
        "base",
        (95, 17.1),
        (94_905_276, 17.11),
        (_weights("vita_in1k", DRIVE.format("1duUxUD3RSblQ6eDHd0n-u0aulwGypf1j"), 84.0, "300 epochs."),),
    ),
):
    _entry(f"slak_{size}", SIZES[size], reported, weights, note=_sparse_note(*effective))

_entry("slak_large", SIZES["large"], note="In the authors' code, not in their paper.")

for edge, reported, effective, kernel_sizes, link, top1 in (
    (31, (30, 4.8), (29_800_028, 4.91), (31, 29, 27, 13), "VXzBxFXQdlAQ7h8", 81.5),
    (61, (31, 5.2), (30_809_828, 5.38), (61, 59, 57, 13), "VpR1te71NmVImJb", 81.5),
):
    _entry(
        f"slak_tiny_k{edge}",
        {**SIZES["tiny"], "kernel_sizes": kernel_sizes},
        reported,
        (_weights("vita_in1k_120e", SURF.format(link), top1, "120 epochs."),),
        note=_sparse_note(*effective),
    )

_entry(
    "slak_tiny_w1",
    {**SIZES["tiny"], "width_factor": 1.0},
    compact="Large depthwise kernels are the sum of a tall, a wide and a small one.",
    note="Decomposed kernels at width 1.0, meant to stay dense.",
)
_entry(
    "slak_tiny_nodecom",
    {**SIZES["tiny"], "decompose": False},
    compact="A 51x51 depthwise kernel costs each channel 2,601 weights, and mixing channels is left to linear layers.",
    note="Whole kernels: what the decomposition saves from.",
)
_entry(
    "slak_tiny_nodecom_merged",
    {**SIZES["tiny"], "decompose": False, "merged": True},
    compact="A 51x51 depthwise kernel costs each channel 2,601 weights, and mixing channels is left to linear layers.",
    note="Whole kernels, small ones and batch norms merged into them: for inference.",
)

for size, reported, link, top1 in (
    ("tiny", (29, 4.5), "cR6KLvxjlUshUQA", 83.1),
    ("small", (50, 8.7), "PYqL3rVff3Nu2sP", 84.3),
):
    _entry(
        f"slak_convnext_{size}",
        {
            **SIZES[size],
            "width_factor": 1.0,
            "kernel_sizes": (7, 7, 7, 7),
            "small_kernel_size": None,
            "decompose": False,
        },
        reported,
        (_weights("vita_l2s_in1k", SURF.format(link), top1, "Distilled from a SLaK."),),
        paper=L2S_PAPER,
        compact="Small 7x7 depthwise kernels, taught by a network of large ones.",
        note="ConvNeXt with a batch norm behind the depthwise convolution, as the authors' code has it.",
    )
_entry(
    "slak_test",
    {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 48), "kernel_sizes": (11, 9, 7, 5), "small_kernel_size": 3},
    compact="A tiny one for tests and trials, not of the paper.",
    input_size=(3, 64, 64),
)
