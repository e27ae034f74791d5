"""PfNet: networks with parameter-free layers, in which max pooling stands for convolution or attention.

Han, Yoo, Kim and Heo, "Learning Features with Parameter-Free Layers", ICLR 2022, arXiv 2202.02777.

What makes them compact: a 3x3 max pooling mixes neighbours without a weight or a multiplication. In ResNet-50's
bottlenecks it takes the place of the 3x3 convolution (all of them, or all but the strided ones); in ViT and PiT that of
self-attention in every second block.

Where this file departs from the authors' code:

- The ResNets are timm's with other bottlenecks, and bear its names. In the hybrid, the average pooling before a strided
  convolution rounds up, as its shortcut does: the same where their code runs, and odd maps work too.
- The transformers take every input size: tokens lie in a map of any height and width, and the position table is resized
  (in ViT as well, as their PiT does).
- A ViT has no stages. For features, two blocks (attention, pooling) are one here.
"""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import Attention, DropPath, LayerNorm2d, Mlp
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.layers.arguments import (
    check_above_zero,
    check_choice,
    check_counts,
    check_pool,
    check_rates,
    check_widths,
    image_sides,
)
from zoo.layers.hub_mixin import ZooModelHubMixin
from zoo.layers.init import init_weights
from zoo.layers.positions import resize_table
from zoo.layers.staged import Head, Stage, StagedNet
from zoo.registry import Entry, Paper, Reported, Weights, register

__all__ = ["PfResNet", "PiTMax", "ViTMax"]


# -------------------------------------------------------------------------------------------------------------- ResNets


class MaxBottleneck(nn.Module):
    """1x1 convolution, 3x3 max pooling, 1x1 convolution, shortcut. (B, C, H, W) -> (B, 4 * planes, H/s, W/s).

    Nothing follows the pooling: what comes in is rectified, and so is what comes out (figure 2 of the paper).
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        drop_path: nn.Module | None = None,
        **_: Any,  # of timm's Bottleneck: groups, dilation and the like, which a pooling has not
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.act1 = nn.ReLU(inplace=True)
        self.mixer = self.mix(planes, stride)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.act3 = nn.ReLU(inplace=True)
        self.downsample = nn.Identity() if downsample is None else downsample
        self.drop_path = nn.Identity() if drop_path is None else drop_path

    def mix(self, planes: int, stride: int) -> nn.Module:
        """What mixes neighbours."""
        return nn.MaxPool2d(3, stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mixer(self.act1(self.bn1(self.conv1(x))))
        y = self.drop_path(self.bn3(self.conv3(y)))
        return self.act3(y + self.downsample(x))


class HybridBottleneck(MaxBottleneck):
    """As MaxBottleneck, but with stride 2: 2x2 average pooling and a 3x3 convolution."""

    def mix(self, planes: int, stride: int) -> nn.Module:
        if stride == 1:
            return super().mix(planes, stride)
        return nn.Sequential(
            nn.AvgPool2d(2, 2, ceil_mode=True),
            nn.Conv2d(planes, planes, 3, 1, 1, bias=False),
            nn.BatchNorm2d(planes),
            nn.ReLU(inplace=True),
        )


BOTTLENECKS: dict[str, type[nn.Module]] = {"max": MaxBottleneck, "hybrid": HybridBottleneck, "conv": Bottleneck}


class PfResNet(ZooModelHubMixin, ResNet):
    """timm's ResNet with parameter-free bottlenecks. (B, in_chans, H, W) -> (B, num_classes)

    The defaults are those of `resnet50_max`.

    Args:
        in_chans: channels of the input.
        num_classes: width of the classifier; 0 leaves it out.
        global_pool: "avg", "max", "avgmax" (their mean), or "" for none (only without a classifier).
        mixer: what mixes neighbours in a bottleneck: "max" pooling; "hybrid", max pooling and where it strides average
            pooling and a convolution; "conv", the ResNet that these came from.
        depths: bottlenecks of each of the four stages.
        planes: width of each stage's bottlenecks; its maps are four times as wide.
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
        mixer: str = "max",
        depths: Sequence[int] = (3, 4, 6, 3),
        planes: Sequence[int] = (64, 128, 256, 512),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        check_choice("mixer", mixer, tuple(BOTTLENECKS))
        check_counts(1, in_chans=in_chans)
        check_counts(0, num_classes=num_classes)
        check_pool(global_pool, num_classes)
        check_rates(drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        depths, planes = check_widths(depths=depths, planes=planes)
        if len(depths) != 4:
            raise ConfigError(f"A ResNet has four stages: depths and planes have {len(depths)} items.")
        super().__init__(
            BOTTLENECKS[mixer],
            depths,
            channels=planes,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
        )
        init_weights(self)

    def init_weights(self, zero_init_last: bool = True) -> None:
        """Nothing: timm's constructor asks for its own initialisation here, which is not the authors'."""

    def init_module(self, module: nn.Module) -> None:
        """Initialise the tensors that `module` itself holds, as the authors' code does: as PyTorch does."""
        module.reset_parameters()  # type: ignore[operator]


# --------------------------------------------------------------------------------------------------------- transformers


class TokenAttention(nn.Module):
    """Multi-head self-attention over all places of a map. (B, H, W, C) -> (B, H, W, C)"""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.attn = Attention(dim, num_heads, qkv_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        return self.attn(x.reshape(B, H * W, C)).reshape(B, H, W, C)


class MaxLayer(nn.Module):
    """Expansion, 3x3 max pooling and projection, in place of attention. (B, H, W, C) -> (B, H, W, C)

    There is a GELU on both sides of the pooling. It is not monotone, so neither of the two can be left out, and the
    borders count as minus infinity, not as zero.
    """

    def __init__(self, dim: int, ratio: int = 3) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, ratio * dim)
        self.act = nn.GELU()
        self.pool = nn.MaxPool2d(3, 1, 1)
        self.fc2 = nn.Linear(ratio * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.fc1(x)).permute(0, 3, 1, 2)
        x = self.pool(x).permute(0, 2, 3, 1)
        return self.fc2(self.act(x))


class Block(nn.Module):
    """A mixer of places and an MLP, each with norm and shortcut. (B, H, W, C) -> (B, H, W, C)"""

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class TokenStage(Stage):
    """Downsampling and the blocks of one resolution, which take (B, H, W, C). (B, C, H, W) -> (B, C', H', W')"""

    def forward(self, x: Tensor) -> Tensor:
        return self.run_blocks(self.downsample(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


torch.fx.wrap("resize_table")  # fx looks for the name in the module that calls it


class Stem(nn.Module):
    """Patches by one convolution, and the position table. (B, in_chans, H, W) -> (B, dim, H/stride, W/stride)"""

    def __init__(
        self, in_chans: int, dim: int, patch_size: int, stride: int, size: tuple[int, int], drop: float
    ) -> None:
        super().__init__()
        rows, columns = ((side - patch_size) // stride + 1 for side in size)
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride)
        self.pos_embed = nn.Parameter(torch.empty(1, dim, rows, columns))
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        return self.drop(x + resize_table(self.pos_embed, x.shape[2], x.shape[3]))


class PfTransformer(StagedNet):
    """What ViT and PiT have in common; `drop_paths` holds one rate for each block, `scales` what each stage strides."""

    def __init__(
        self,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        *,
        depths: Sequence[int],
        dims: Sequence[int],
        num_heads: Sequence[int],
        scales: Sequence[int],
        patch_size: int,
        stride: int,
        mlp_ratio: float,
        drop_paths: Sequence[float],
        drop_rate: float,
        pos_drop_rate: float,
        img_size: int | Sequence[int],
    ) -> None:
        check_above_zero(mlp_ratio=mlp_ratio)
        check_counts(1, patch_size=patch_size, stride=stride)
        size = image_sides(img_size, patch_size)
        check_rates(drop_rate=drop_rate, pos_drop_rate=pos_drop_rate)
        for dim, heads in zip(dims, num_heads, strict=True):
            if dim % heads:
                raise ConfigError(f"A width of {dim} cannot be split into {heads} heads: see num_heads.")
        reductions = tuple(stride * math.prod(scales[: i + 1]) for i in range(len(dims)))
        super().__init__(tuple(dims), reductions, in_chans, num_classes)
        self.stem = Stem(in_chans, dims[0], patch_size, stride, size, pos_drop_rate)
        self.stages = nn.Sequential()
        rates = iter(drop_paths)
        for i, (dim, heads) in enumerate(zip(dims, num_heads, strict=True)):
            downsample = nn.Conv2d(dims[i - 1], dim, 3, 2, 1, groups=dims[i - 1]) if scales[i] > 1 else nn.Identity()
            mixers = [MaxLayer(dim) if j % 2 else TokenAttention(dim, heads) for j in range(depths[i])]
            self.stages.append(TokenStage(downsample, [Block(dim, mixer, mlp_ratio, next(rates)) for mixer in mixers]))
        norm = LayerNorm2d(dims[-1], eps=1e-6)
        self.head = Head(dims[-1], num_classes, global_pool, norm=norm, norm_first=True, drop_rate=drop_rate)
        init_weights(self)

    def init_module(self, module: nn.Module) -> None:
        """Initialise the tensors that `module` itself holds, as the authors' code does: mostly as PyTorch does."""
        if isinstance(module, Stem):
            nn.init.trunc_normal_(module.pos_embed, std=0.02)
        else:
            module.reset_parameters()  # type: ignore[operator]

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The position table."""
        return {"stem.pos_embed"}


class ViTMax(PfTransformer):
    """ViT without class token, whose every second block max-pools. (B, in_chans, H, W) -> (B, num_classes)

    The defaults are those of `vit_s_max`.

    Args:
        in_chans: channels of the input.
        num_classes: width of the classifier; 0 leaves it out.
        global_pool: "avg", "max", "avgmax" (their mean), or "" for none (only without a classifier).
        depth: blocks.
        embed_dim: width.
        num_heads: heads of those blocks that attend.
        patch_size: side of a patch in pixels.
        mlp_ratio: hidden width of the MLPs over the width.
        drop_rate: dropout before the classifier.
        pos_drop_rate: dropout behind the position table.
        drop_path_rate: stochastic depth, growing linearly from 0 at the first block to this at the last.
        img_size: input height and width that the position table is made for; at other sizes it is resized.

    Raises ConfigError for values that cannot be.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        depth: int = 12,
        embed_dim: int = 384,
        num_heads: int = 6,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] = 224,
    ) -> None:
        check_counts(1, depth=depth, embed_dim=embed_dim, num_heads=num_heads)
        check_rates(drop_path_rate=drop_path_rate)
        pairs = [min(2, depth - i) for i in range(0, depth, 2)]
        super().__init__(
            in_chans,
            num_classes,
            global_pool,
            depths=pairs,
            dims=[embed_dim] * len(pairs),
            num_heads=[num_heads] * len(pairs),
            scales=[1] * len(pairs),
            patch_size=patch_size,
            stride=patch_size,
            mlp_ratio=mlp_ratio,
            drop_paths=[drop_path_rate * i / max(depth - 1, 1) for i in range(depth)],
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            img_size=img_size,
        )

    def init_module(self, module: nn.Module) -> None:
        super().init_module(module)
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


class PiTMax(PfTransformer):
    """PiT without class token, every second block of a stage max-pools. (B, in_chans, H, W) -> (B, num_classes)

    The defaults are those of `pit_s_max`. Any number of stages works.

    Args:
        in_chans: channels of the input.
        num_classes: width of the classifier; 0 leaves it out.
        global_pool: "avg", "max", "avgmax" (their mean), or "" for none (only without a classifier).
        depths: blocks of each stage.
        dims: width of each stage, a multiple of the one before: a depthwise convolution widens.
        num_heads: heads of each stage's blocks that attend.
        patch_size: side of a patch in pixels.
        stride: pixels from one patch to the next.
        mlp_ratio: hidden width of the MLPs over the width.
        drop_rate: dropout before the classifier.
        pos_drop_rate: dropout behind the position table.
        drop_path_rate: stochastic depth, growing linearly from 0 at the first block without reaching this.
        img_size: input height and width that the position table is made for; at other sizes it is resized.

    Raises ConfigError for values that cannot be.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        depths: Sequence[int] = (2, 6, 4),
        dims: Sequence[int] = (144, 288, 576),
        num_heads: Sequence[int] = (3, 6, 12),
        patch_size: int = 16,
        stride: int = 8,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] = 224,
    ) -> None:
        depths, dims, num_heads = check_widths(depths=depths, dims=dims, num_heads=num_heads)
        check_rates(drop_path_rate=drop_path_rate)
        if any(dim % before for before, dim in itertools.pairwise(dims)):
            raise ConfigError(f"Each width in dims must be a multiple of the one before, not {dims!r}.")
        super().__init__(
            in_chans,
            num_classes,
            global_pool,
            depths=depths,
            dims=dims,
            num_heads=num_heads,
            scales=[1, *[2] * (len(dims) - 1)],
            patch_size=patch_size,
            stride=stride,
            mlp_ratio=mlp_ratio,
            drop_paths=[drop_path_rate * i / sum(depths) for i in range(sum(depths))],
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            img_size=img_size,
        )


# ---------------------------------------------------------------------------------------------------------- checkpoints

# the authors' ResNet: their Sequentials hold a convolution at 0 and its batch norm at 1
RESNET_KEYS: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"^conv1\.0\.", "conv1."),
    (r"^conv1\.1\.", "bn1."),
    (r"\.reduction_block\.0\.", ".conv1."),
    (r"\.reduction_block\.1\.", ".bn1."),
    (r"\.expansion_block\.0\.", ".conv3."),
    (r"\.expansion_block\.1\.", ".bn3."),
    (r"\.conv_block\.1\.(0|1)\.", lambda match: f".mixer.{int(match[1]) + 1}."),  # hybrid: 0 is the average pooling
    (r"\.conv_block\.0\.", ".conv2."),
    (r"\.conv_block\.1\.", ".bn2."),
]


def convert_resnet(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A ResNet of naver-ai/PfLayer, or one of ours, for `model`."""
    if "conv1.0.weight" not in state_dict:
        return state_dict
    converted = {}
    for key, tensor in state_dict.items():
        for pattern, name in RESNET_KEYS:
            key = re.sub(pattern, name, key)
        converted[key] = tensor
    return converted


def convert_transformer(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A ViT or PiT of naver-ai/PfLayer, or one of ours, for `model`, whose position table it is resized to."""
    if "pos_embed" in state_dict:
        state_dict = {_transformer_key(key): tensor for key, tensor in state_dict.items()}
    table, wanted = state_dict.get("stem.pos_embed"), model.state_dict().get("stem.pos_embed")
    if table is None or wanted is None:
        return state_dict
    if table.ndim == 3:  # a ViT's, (1, tokens, dim)
        side = math.isqrt(table.shape[1])
        table = table.transpose(1, 2).unflatten(2, (side, -1))
    if table.shape[1] == wanted.shape[1] and table.shape != wanted.shape:
        resized = resize_table(table.float(), wanted.shape[2], wanted.shape[3])
        table = resized.to(table.dtype)
    return {**state_dict, "stem.pos_embed": table}


def _transformer_key(key: str) -> str:
    if match := re.match(r"(?:transformers\.(\d+)\.)?blocks\.(\d+)\.(.*)", key):
        block, rest = int(match[2]), match[3]
        if block % 2:  # max layers bear the names of attention
            rest = rest.replace("attn.qkv.", "mixer.fc1.").replace("attn.proj.", "mixer.fc2.")
        else:
            rest = rest.replace("attn.", "mixer.attn.")
        stage, block = (int(match[1]), block) if match[1] else divmod(block, 2)
        return f"stages.{stage}.blocks.{block}.{rest}"
    if match := re.match(r"pools\.(\d+)\.conv\.(.*)", key):
        return f"stages.{int(match[1]) + 1}.downsample.{match[2]}"
    for pattern, name in (
        (r"^pos_embed$", "stem.pos_embed"),
        (r"^patch_embed\.(proj|conv)\.", "stem.proj."),
        (r"^head\.", "head.fc."),
        (r"^norm\.", "head.norm."),
    ):
        key = re.sub(pattern, name, key)
    return key


# ------------------------------------------------------------------------------------------------------------- variants

PAPER = Paper(
    title="Learning Features with Parameter-Free Layers",
    authors="Han, Yoo, Kim, Heo",
    venue="ICLR 2022",
    arxiv="2202.02777",
)
README = "README of naver-ai/PfLayer"


def _weights(tag: str, drive_id: str, top1: float, top5: float | None = None) -> Weights:
    return Weights(
        tag=tag,
        url=f"https://drive.usercontent.google.com/download?id={drive_id}&export=download&confirm=t",
        license="unstated",
        top1=top1,
        top5=top5,
        accuracy_source=README,
        note="The authors state no licence for the weights; their code is Apache-2.0.",
    )


def _register(name: str, build: Callable[..., nn.Module], args: dict[str, Any], compact: str, **fields: Any) -> None:
    resnet = build is PfResNet
    register(
        Entry(
            name=name,
            build=build,
            family="pfnet",
            args=args,
            paper=PAPER,
            compact=compact,
            code_license="apache-2.0",
            code_url="https://github.com/naver-ai/PfLayer",
            convert=convert_resnet if resnet else convert_transformer,
            first_conv="conv1" if resnet else "stem.proj",
            classifier="fc" if resnet else "head.fc",
            **fields,
        )
    )


_register(
    "resnet50_max",
    PfResNet,
    {"mixer": "max"},
    "Max pooling stands for every 3x3 convolution of a ResNet's bottlenecks.",
    reported=Reported(params=14.2e6, macs=2_200_000_000, source=README),
    weights=(
        _weights("naver_in1k", "1MoCdVLPau4XuI0BVGEwDkiwibpybqWTX", 74.3, 92.0),
        _weights("naver_plus_in1k", "1TQfwMXENn7s78Myc58svKVpHi5OVsdGX", 75.5, 92.1),
    ),
)
_register(
    "resnet50_hybrid",
    PfResNet,
    {"mixer": "hybrid"},
    "Max pooling stands for the 3x3 convolutions of a ResNet's bottlenecks but for the strided ones.",
    reported=Reported(params=17.3e6, macs=2_600_000_000, source=README),
    weights=(
        _weights("naver_in1k", "1CyajEQUfWo9oetqcIhexVjfRXU-iGHk1", 77.1, 93.1),
        _weights("naver_plus_in1k", "1f5fOwEItFITqzofvQ6d-kLLOTs-c1k3o", 78.0, 93.5),
    ),
)
_register(
    "resnet50_pf",
    PfResNet,
    {"mixer": "conv"},
    "Bottlenecks: the ResNet-50 that the others of the family are compared with.",
    reported=Reported(params=25.6e6, macs=4_100_000_000, source=README),
)
for size, dim, heads in (("ti", 192, 3), ("s", 384, 6), ("b", 768, 12)):
    _register(
        f"vit_{size}_max",
        ViTMax,
        {"embed_dim": dim, "num_heads": heads},
        "Max pooling stands for self-attention in every second block of a ViT.",
        pool_size=(14, 14),
        weights=(_weights("naver_in1k", "19lfagLJDXWvVHcb8Qm_U4_A_Kr7qYLv7", 80.0),) if size == "s" else (),
    )
PITS: dict[str, dict[str, Any]] = {
    "ti": {"dims": (64, 128, 256), "num_heads": (2, 4, 8)},
    "s": {"dims": (144, 288, 576), "num_heads": (3, 6, 12)},
    "b": {
        "depths": (3, 6, 4),
        "dims": (256, 512, 1024),
        "num_heads": (4, 8, 16),
        "patch_size": 14,
        "stride": 7,
    },
}
for size, args in PITS.items():
    _register(
        f"pit_{size}_max",
        PiTMax,
        args,
        "Max pooling stands for self-attention in every second block of a PiT.",
        pool_size=(8, 8) if size == "b" else None,
        weights=(_weights("naver_in1k", "1S9JJM2WGtDtpo-6Me7Ak74nJOlOeBKeH", 80.8),) if size == "s" else (),
    )
_register(
    "pfnet_test",
    PiTMax,
    {"depths": (2, 2, 2), "dims": (32, 64, 128), "num_heads": (2, 4, 8), "patch_size": 8, "stride": 4, "img_size": 64},
    "A tiny one for tests and trials, not of the paper.",
    input_size=(3, 64, 64),
    pool_size=(4, 4),
)
