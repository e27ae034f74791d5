"""FFNet: fuss-free networks of plain convolutions, for segmentation and classification.

Mehta, Skliar, Ben Yahia, Borse, Porikli, Habibian, Blankevoort, "Simple and Efficient Architectures for Semantic
Segmentation", CVPR Workshops 2022, arXiv 2206.08236.

What makes them compact: a receptive field that grows by depth, in narrow ResNets of basic blocks, takes the place of
dilated convolutions, attention and multi-scale branches, so that every operator is one that every device runs fast.

Names are the authors': `ffnet78s_dbbb_mobile` has a backbone 78 convolutions deep of the slim kind (s; n and ns have
three stages, without a letter it is a plain ResNet), and backbone, up-head and segmentation head of the kinds B, B, B.
`d` doubles the output's stride from 4 to 8, `mobile` resizes to the nearest pixel instead of linearly, and `pre_down`
halves the image with a fixed Gaussian filter first. An `x` in place of the last letter classifies.

Where this file departs from the authors' code: the dropout before the classifier works (theirs names an attribute that
does not exist), and logits of a single image keep their batch axis. The filter of `pre_down` extends the image at its
top and bottom only, as theirs does. Stem, stages, neck and head are named as in the zoo's other families.

Backbones that the authors trained without labels (PixPro) lie in `SSL_weights.zip` of their release "weights", which a
person fetches: `checkpoint_path` takes a file of it, with `strict=False`, since it holds neither neck nor head.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.layers.arguments import check_choice, check_counts, check_pool, check_rates, check_widths
from zoo.layers.hub_mixin import ZooModelHubMixin
from zoo.layers.image_size import check_map
from zoo.layers.init import init_weights
from zoo.layers.segmentation import ConvUnit, SegmentationHead, SegmentationNeck, UpHead, init_module
from zoo.registry import Entry, Paper, Weights, register

__all__ = ["FFNet", "FFNetSegmentation"]

torch.fx.wrap("check_map")


# ------------------------------------------------------------------------------------------------------------- backbone


def shortcut(in_dim: int, dim: int, stride: int = 1) -> nn.Module:
    """Nothing, or a 1x1 convolution where width or size change."""
    if in_dim == dim and stride == 1:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_dim, dim, 1, stride, bias=False), nn.BatchNorm2d(dim))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut. (B, in_dim, H, W) -> (B, dim, H / stride, W / stride)"""

    def __init__(self, in_dim: int, dim: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_dim, dim, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(dim)
        self.act = nn.ReLU()
        self.downsample = shortcut(in_dim, dim, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        return self.act(self.bn2(self.conv2(y)) + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution at a quarter of the width, beside a shortcut. Shapes as `BasicBlock`."""

    def __init__(self, in_dim: int, dim: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_dim, dim // 4, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(dim // 4)
        self.conv2 = nn.Conv2d(dim // 4, dim // 4, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(dim // 4)
        self.conv3 = nn.Conv2d(dim // 4, dim, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(dim)
        self.act = nn.ReLU()
        self.downsample = shortcut(in_dim, dim, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        y = self.act(self.bn2(self.conv2(y)))
        return self.act(self.bn3(self.conv3(y)) + self.downsample(x))


BLOCKS: dict[str, type[BasicBlock | Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}


class ResNetStem(nn.Module):
    """A 7x7 convolution and max pooling. (B, in_chans, H, W) -> (B, 64, H/4, W/4)"""

    def __init__(self, in_chans: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.act = nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.act(self.bn1(self.conv1(x))))


class SlimStem(nn.Module):
    """Two 3x3 convolutions. (B, in_chans, H, W) -> (B, 64, H/4, W/4)"""

    def __init__(self, in_chans: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(in_chans, 32, 3, 2, 1, bias=False)
        self.bn0 = nn.BatchNorm2d(32)
        self.conv1 = nn.Conv2d(32, 64, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn0(self.conv0(x)))
        return self.act(self.bn1(self.conv1(x)))


class WideStem(nn.Module):
    """Three 3x3 convolutions, whose output is itself a feature map. (B, in_chans, H, W) -> (B, 64, H/4, W/4)"""

    def __init__(self, in_chans: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(in_chans, 64, 3, 2, 1, bias=False)
        self.bn0 = nn.BatchNorm2d(64)
        self.conv1 = nn.Conv2d(64, 64, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = nn.Conv2d(64, 64, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn0(self.conv0(x)))
        x = self.act(self.bn1(self.conv1(x)))
        return self.act(self.bn2(self.conv2(x)))


# stem: its module, its first convolution
STEMS = {"resnet": (ResNetStem, "stem.conv1"), "slim": (SlimStem, "stem.conv0"), "wide": (WideStem, "stem.conv0")}


# a Gaussian of deviation 0.7 on five taps, reflected at its ends
GAUSSIAN = (0.00967746, 0.20539965, 0.56984578, 0.20539965, 0.00967746)


class Smoothing(nn.Module):
    """A fixed Gaussian filter of stride 2. (B, C, H, W) -> (B, C, H/2 - 1, W/2 - 2), as only height is extended.

    Raises ConfigError for images below 3x5.
    """

    frozen_weights = ("weight",)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(channels, 1, 5, 5))
        self.weight: Tensor
        self.reset_parameters()

    def reset_parameters(self) -> None:
        taps = torch.tensor(GAUSSIAN, device=self.weight.device)
        self.weight.copy_(torch.outer(taps, taps).expand_as(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        check_map(x, 3, 5, "A network with pre_down takes images from 3x5 up.")
        x = F.pad(x, (0, 0, 1, 1), mode="reflect")
        return F.conv2d(x, self.weight, stride=2, groups=x.shape[1])


class Stage(nn.Sequential):
    """The blocks of one resolution."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(list(self), x)
        for block in self:
            x = block(x)
        return x


class LastMap(nn.Module):
    """What is left of a neck where maps alone are wanted."""

    def forward(self, maps: list[Tensor]) -> Tensor:
        return maps[-1]


class _Backbone(ZooModelHubMixin, nn.Module):
    """Stem and stages, whose four maps a neck joins; what both kinds of FFNet share."""

    def __init__(
        self,
        in_chans: int,
        depths: Sequence[int],
        dims: Sequence[int],
        stem: str,
        block: str,
        first_stride: int,
        pre_down: bool,
        drop_rate: float,
    ) -> None:
        super().__init__()
        depths, dims = check_widths(depths=depths, dims=dims)
        check_choice("stem", stem, tuple(STEMS))
        check_choice("block", block, tuple(BLOCKS))
        check_counts(1, in_chans=in_chans, first_stride=first_stride)
        check_rates(drop_rate=drop_rate)
        stages = 3 if stem == "wide" else 4
        if len(depths) != stages:
            raise ConfigError(f'With stem="{stem}", FFNet has {stages} stages: depths names {len(depths)}.')
        if block == "bottleneck" and any(dim % 4 for dim in dims):
            raise ConfigError(f"Bottlenecks need widths that are multiples of 4, not {dims}.")
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.stem_is_map = stem == "wide"
        self.smoothing: nn.Module = Smoothing(in_chans) if pre_down else nn.Identity()
        self.stem = STEMS[stem][0](in_chans)
        self.stages = nn.Sequential()
        self.feature_info: list[dict[str, Any]] = []
        reduction, in_dim = 8 if pre_down else 4, 64
        if self.stem_is_map:
            self.feature_info.append({"num_chs": in_dim, "reduction": reduction, "module": "stem"})
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            stride = 2 if i or self.stem_is_map else first_stride
            reduction *= stride
            blocks = [BLOCKS[block](dim if j else in_dim, dim, 1 if j else stride) for j in range(depth)]
            self.stages.append(Stage(*blocks))
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"})
            in_dim = dim
        self.neck: nn.Module = LastMap()

    def init_module(self, module: nn.Module) -> None:
        """Initialise the tensors that `module` itself holds, as the authors' code does."""
        if isinstance(module, Smoothing):
            module.reset_parameters()
        else:
            init_module(module)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Norms and biases are one-dimensional, which timm's optimizers leave undecayed anyway."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups in depth order, for layer-wise learning-rate decay: stages (`coarse`) or blocks."""
        stages = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": [(stages, None), (r"^neck|^head\.(?:conv1|bn1)", (99999,))]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade computation for memory: recompute each block's activations in the backward pass."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    def forward_maps(self, x: Tensor) -> list[Tensor]:
        """The feature maps, fine to coarse."""
        x = self.stem(self.smoothing(x))
        maps = [x] if self.stem_is_map else []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | tuple[int, ...] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of the backbone in `indices` (the last n if a number, all if None), and what `forward_features` gives.

        Stopped early, it is the last map. `norm` changes nothing: every map is normalised.
        """
        if output_fmt != "NCHW":
            raise ConfigError(f"FFNet's features are maps: output_fmt must be 'NCHW', not {output_fmt!r}.")
        count = len(self.stages) + self.stem_is_map
        take, last = feature_take_indices(count, indices)
        x = self.stem(self.smoothing(x))
        maps = [x] if self.stem_is_map else []
        for stage in self.stages:
            if stop_early and len(maps) > last:
                break
            x = stage(x)
            maps.append(x)
        intermediates = [maps[i] for i in take]
        if intermediates_only:
            return intermediates
        return self.neck(maps) if len(maps) == count else maps[-1], intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] | tuple[int, ...] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last map in `indices`, neck and head; returns the indices of those kept."""
        count = len(self.stages) + self.stem_is_map
        take, last = feature_take_indices(count, indices)
        if prune_head or last < count - 1:
            self.stages = self.stages[: last + 1 - self.stem_is_map]
            self.drop_head(int(self.feature_info[last]["num_chs"]))
        return take

    def drop_head(self, num_features: int) -> None:
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_features, H', W'): what the neck makes of the four maps."""
        return self.neck(self.forward_maps(x))


# ------------------------------------------------------------------------------------------------------- classification


class ClassificationNeck(nn.Module):
    """The up-head's maps widened and added, fine to coarse, as in HRNet. Four maps -> (B, num_features, H/32, W/32)"""

    def __init__(
        self, dims: Sequence[int], up_head: str, upsample: str, widths: Sequence[int], num_features: int
    ) -> None:
        super().__init__()
        self.up = UpHead(dims, up_head, upsample)
        self.expansion = nn.ModuleList(
            Bottleneck(in_dim, dim) for in_dim, dim in zip(self.up.out_dims, widths, strict=True)
        )
        self.downsampling = nn.ModuleList(ConvUnit(in_dim, dim, 3, 2, bias=True) for in_dim, dim in pairwise(widths))
        self.final = ConvUnit(widths[-1], num_features, 1, bias=True)

    def forward(self, maps: list[Tensor]) -> Tensor:
        maps = self.up(maps)
        wide = [expand(maps[i]) for i, expand in enumerate(self.expansion)]
        x = wide[0]
        for i, down in enumerate(self.downsampling):
            x = wide[i + 1] + down(x)
        return self.final(x)


class FFNet(_Backbone):
    """Classification. (B, in_chans, H, W) -> (B, num_classes)

    The defaults are those of FFNet-40S-BBX-mobile. Any input size works.

    Args:
        in_chans: channels of the input.
        num_classes: width of the classifier; 0 leaves it out.
        global_pool: "avg", "max", "avgmax" (their mean), or "" for none (only without a classifier).
        depths: blocks of each stage: four, or three with the wide stem.
        dims: width of each stage.
        stem: "resnet", "slim", or "wide", whose output is the first of the four maps.
        block: "basic" or "bottleneck" (at a quarter of the width).
        up_head: "A", "B" or "C", from large to small.
        upsample: "nearest", or "bilinear" with aligned corners.
        neck_dims: widths in which the up-head's four maps are added.
        head_hidden_size: width of the features before the classifier.
        drop_rate: dropout before the classifier.

    Raises ConfigError for values that cannot be.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        depths: Sequence[int] = (4, 5, 6, 4),
        dims: Sequence[int] = (64, 128, 192, 320),
        stem: str = "slim",
        block: str = "basic",
        up_head: str = "B",
        upsample: str = "nearest",
        neck_dims: Sequence[int] = (128, 256, 512, 1024),
        head_hidden_size: int = 2048,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(in_chans, depths, dims, stem, block, 1, False, drop_rate)
        check_counts(0, num_classes=num_classes)
        check_counts(1, head_hidden_size=head_hidden_size)
        (neck_dims,) = check_widths(neck_dims=neck_dims)
        if len(neck_dims) != 4 or any(dim % 4 for dim in neck_dims):
            raise ConfigError(f"neck_dims must be four multiples of 4, not {neck_dims}.")
        check_pool(global_pool, num_classes)
        self.num_classes = num_classes
        dims = [int(info["num_chs"]) for info in self.feature_info]
        self.neck = ClassificationNeck(dims, up_head, upsample, neck_dims, head_hidden_size)
        self.num_features = self.head_hidden_size = head_hidden_size
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        init_weights(self)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier of another width (0: none), and another pooling."""
        check_counts(0, num_classes=num_classes)
        pool = self.head.global_pool.pool_type if global_pool is None else global_pool
        check_pool(pool, num_classes)
        reference = next(self.stem.parameters())
        head = ClassifierHead(self.num_features, num_classes, pool_type=pool, drop_rate=self.drop_rate)
        self.head = head.to(device=reference.device, dtype=reference.dtype).train(self.training)
        self.num_classes = num_classes
        if num_classes:
            self.init_module(self.head.fc)

    def drop_head(self, num_features: int) -> None:
        self.neck = LastMap()
        self.num_features = self.head_hidden_size = num_features
        self.reset_classifier(0, "")

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, num_features, H', W') -> (B, num_classes); `pre_logits` gives (B, num_features)."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


# --------------------------------------------------------------------------------------------------------- segmentation


class FFNetSegmentation(_Backbone):
    """Segmentation. (B, in_chans, H, W) -> (B, num_classes, H / s, W / s), s = 4 * first_stride (twice: `pre_down`)

    The logits are left at that size. The defaults are those of FFNet-40S-BBB-mobile. Any input size works (`pre_down`:
    from 3x5 up).

    Args:
        in_chans: channels of the input.
        num_classes: of the logits; 0 gives the map before them.
        depths: blocks of each stage: four, or three with the wide stem.
        dims: width of each stage.
        stem: "resnet", "slim", or "wide", whose output is the first of the four maps.
        block: "basic" or "bottleneck" (at a quarter of the width).
        first_stride: of the first stage: 1, or 2 in the forms called d; without meaning for the wide stem.
        up_head: "A", "B" or "C", from large to small.
        seg_head: likewise.
        upsample: "nearest", or "bilinear" with aligned corners.
        pre_down: halve the image with a Gaussian filter first.
        drop_rate: dropout of whole channels before the last convolution.

    Raises ConfigError for values that cannot be.
    """

    task = "segmentation"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 19,
        *,
        depths: Sequence[int] = (4, 5, 6, 4),
        dims: Sequence[int] = (64, 128, 192, 320),
        stem: str = "slim",
        block: str = "basic",
        first_stride: int = 1,
        up_head: str = "B",
        seg_head: str = "B",
        upsample: str = "nearest",
        pre_down: bool = False,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(in_chans, depths, dims, stem, block, first_stride, pre_down, drop_rate)
        check_counts(0, num_classes=num_classes)
        self.num_classes = num_classes
        self.neck = SegmentationNeck([int(info["num_chs"]) for info in self.feature_info], up_head, upsample)
        self.head = SegmentationHead(self.neck.num_features, seg_head, num_classes, drop_rate)
        self.num_features = self.neck.num_features
        self.head_hidden_size = self.head.hidden
        self.output_stride = int(self.feature_info[0]["reduction"])
        init_weights(self)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.conv2

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh last convolution for another number of classes (0: none)."""
        self.head.set_classifier(num_classes)
        self.num_classes = num_classes
        if num_classes:
            self.init_module(self.head.conv2)

    def drop_head(self, num_features: int) -> None:
        self.neck = LastMap()
        self.head = nn.Identity()  # type: ignore[assignment]
        self.num_features = self.head_hidden_size = num_features
        self.num_classes = 0

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, num_features, H', W') -> (B, num_classes, H', W'); `pre_logits` gives (B, head_hidden_size, H', W')."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))


# ---------------------------------------------------------------------------------------------------------- checkpoints


def convert(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A published checkpoint in our layout. Takes Qualcomm-AI-research/FFNet's layout, torchvision's and ours.

    A Cityscapes file serves a model with `pre_down` and without: the latter has no use for the filter. Weights of a
    backbone alone (torchvision's ResNets, FFNet's self-supervised ones) need `strict=False`.
    """
    own = model.state_dict(keep_vars=True)
    converted = {}
    for key, tensor in state_dict.items():
        key = _rename(key)
        if key == "smoothing.weight":
            if key not in own:
                continue
            if len(tensor) != len(own[key]):  # the same filter for every channel of the input
                tensor = tensor[:1].expand_as(own[key]).clone()
        converted[key] = tensor
    return converted


def _rename(key: str) -> str:
    if match := re.match(r"(?:backbone_model\.)?((?:conv|bn)\d\..*)", key):
        return f"stem.{match[1]}"
    if match := re.match(r"(?:backbone_model\.)?layer(\d)\.(.*)", key):
        return f"stages.{int(match[1]) - 1}.{match[2]}"
    units = {"0": "conv", "1": "bn"}
    if match := re.match(r"head\.layers\.0\.adapter_conv\.(\d)\.layers\.([01])\.(.*)", key):
        return f"neck.up.adapters.{match[1]}.{units[match[2]]}.{match[3]}"
    if match := re.match(r"head\.layers\.1\.(fam_\w+)\.layers\.([01])\.(.*)", key):
        return f"neck.up.{match[1]}.{units[match[2]]}.{match[3]}"
    if match := re.match(r"head\.layers\.2\.downsampling_layers\.(\d)\.([01])\.(.*)", key):
        return f"neck.downsampling.{match[1]}.{units[match[2]]}.{match[3]}"
    if match := re.match(r"head\.layers\.2\.final_layer\.([01])\.(.*)", key):
        return f"neck.final.{units[match[1]]}.{match[2]}"
    if match := re.match(r"head\.layers\.3\.last_layer\.([013])\.(.*)", key):
        return f"head.{ {'0': 'conv1', '1': 'bn1', '3': 'conv2'}[match[1]] }.{match[2]}"
    key = key.replace("head.layers.2.expansion_layers.", "neck.expansion.")
    return key.replace("head.layers.2.classifier.", "head.fc.")


# ------------------------------------------------------------------------------------------------------------- variants

PAPER = Paper(
    title="Simple and Efficient Architectures for Semantic Segmentation",
    authors="Mehta, Skliar, Ben Yahia, Borse, Porikli, Habibian, Blankevoort",
    venue="CVPR Workshops 2022",
    arxiv="2206.08236",
)
REPOSITORY = "https://github.com/Qualcomm-AI-research/FFNet"
README = "README of Qualcomm-AI-research/FFNet"
LICENSE = "bsd-3-clause-clear"
LICENSE_NOTE = "The licence is the repository's; the authors state none for the weights apart."

PLAIN = (64, 128, 256, 512)
SLIM = (64, 128, 192, 320)
BACKBONES: dict[str, dict[str, Any]] = {
    "18": {"stem": "resnet", "dims": PLAIN, "depths": (2, 2, 2, 2)},
    "34": {"stem": "resnet", "dims": PLAIN, "depths": (3, 4, 6, 3)},
    "50": {"stem": "resnet", "dims": (256, 512, 1024, 2048), "depths": (3, 4, 6, 3), "block": "bottleneck"},
    "56": {"stem": "resnet", "dims": PLAIN, "depths": (4, 8, 12, 3)},
    "86": {"stem": "resnet", "dims": PLAIN, "depths": (8, 12, 16, 6)},
    "101": {"stem": "resnet", "dims": (256, 512, 1024, 2048), "depths": (3, 4, 23, 3), "block": "bottleneck"},
    "134": {"stem": "resnet", "dims": PLAIN, "depths": (8, 18, 28, 12)},
    "150": {"stem": "resnet", "dims": PLAIN, "depths": (16, 18, 28, 12)},
    "40S": {"stem": "slim", "dims": SLIM, "depths": (4, 5, 6, 4)},
    "54S": {"stem": "slim", "dims": SLIM, "depths": (5, 8, 8, 5)},
    "78S": {"stem": "slim", "dims": SLIM, "depths": (6, 12, 12, 8)},
    "86S": {"stem": "slim", "dims": SLIM, "depths": (8, 12, 16, 6)},
    "150S": {"stem": "slim", "dims": SLIM, "depths": (16, 18, 28, 12)},
    "46N": {"stem": "wide", "dims": (96, 160, 320), "depths": (6, 8, 8)},
    "74N": {"stem": "wide", "dims": (96, 160, 320), "depths": (8, 12, 16)},
    "122N": {"stem": "wide", "dims": (96, 160, 320), "depths": (16, 24, 20)},
    "46NS": {"stem": "wide", "dims": (64, 128, 256), "depths": (6, 8, 8)},
    "74NS": {"stem": "wide", "dims": (64, 128, 256), "depths": (8, 12, 16)},
    "122NS": {"stem": "wide", "dims": (64, 128, 256), "depths": (16, 24, 20)},
}


def _register(depth: str, code: str, *, mobile: bool, pre_down: bool = False, miou: float | None = None) -> None:
    """One variant: `depth` "78S" and `code` "dBBB", as the authors write them; `miou` (%) on Cityscapes."""
    classifies = code.endswith("X")
    suffixes = ("_mobile" if mobile else "") + ("_pre_down" if pre_down else "")
    name = f"ffnet{depth}_{code}{suffixes}".lower()
    args: dict[str, Any] = {**BACKBONES[depth], "up_head": code[-2], "upsample": "nearest" if mobile else "bilinear"}
    if not classifies:
        args |= {"seg_head": code[-1]}
        if code.startswith("d"):
            args["first_stride"] = 2
        if pre_down:
            args["pre_down"] = True
    halved = mobile and not code.startswith("d")  # trained to be given images of half the height and width
    side = 1024 if pre_down or not halved else 512
    size = (3, 224, 224) if classifies else (3, side, 2 * side)
    # within the archive, slim networks that are not for mobile devices carry a mark
    mark = "_gpu" if depth.endswith("S") and not depth.endswith("NS") and not mobile else ""
    data = "imagenet" if classifies else "cityscapes"
    note = LICENSE_NOTE
    if halved and not classifies and not pre_down:
        note = f"The authors evaluate these with pre_down, on images of 1024x2048. {LICENSE_NOTE}"
    register(
        Entry(
            name=name,
            build=FFNet if classifies else FFNetSegmentation,
            family="ffnet",
            task="vision" if classifies else "segmentation",
            args=args,
            paper=PAPER,
            compact="A deep, narrow ResNet of basic blocks and a head of plain convolutions.",
            code_license=LICENSE,
            code_url=REPOSITORY,
            weights=(
                Weights(
                    tag="in1k" if classifies else "cityscapes",
                    url=f"{REPOSITORY}/releases/download/models/ffnet{depth}.zip",
                    filename=f"ffnet{depth}/ffnet{depth}_{code}{mark}_{data}_state_dict_quarts.pth",
                    license=LICENSE,
                    dataset="imagenet-1k" if classifies else "cityscapes",
                    num_classes=1000 if classifies else 19,
                    input_size=size,
                    crop_pct=0.875 if classifies else 1.0,
                    interpolation="bilinear",
                    miou=miou,
                    accuracy_source=README if miou else None,
                    note=note,
                ),
            ),
            convert=convert,
            input_size=size,
            first_conv=STEMS[BACKBONES[depth]["stem"]][1],
            classifier="head.fc" if classifies else "head.conv2",
        )
    )


# (depth, heads): mIoU (%). For mobile devices; evaluated with `pre_down`, but for the d forms
for (depth, code), miou in {
    ("40S", "dBBB"): 79.2,
    ("54S", "dBBB"): 80.8,
    ("78S", "dBBB"): 81.3,
    ("86S", "dBBB"): 81.5,
    ("40S", "BBB"): 79.7,
    ("54S", "BBB"): 80.2,
    ("78S", "BBB"): 80.5,
    ("86S", "BBB"): 80.9,
    ("150S", "BBB"): 81.6,
    ("40S", "BCC"): 78.4,
    ("54S", "BCC"): 79.9,
    ("78S", "BCC"): 80.6,
    ("86S", "BCC"): 81.0,
    ("150S", "BCC"): 81.0,
    ("46NS", "CBB"): 77.5,
    ("74NS", "CBB"): 78.3,
    ("122NS", "CBB"): 79.3,
    ("46NS", "CCC"): 76.7,
    ("74NS", "CCC"): 77.8,
    ("122NS", "CCC"): 79.2,
}.items():
    if code.startswith("d"):
        _register(depth, code, mobile=True, miou=miou)
    else:
        _register(depth, code, mobile=True)
        _register(depth, code, mobile=True, pre_down=True, miou=miou)

# for desktop GPUs
for (depth, code), miou in {
    ("34", "AAA"): 81.4,
    ("50", "AAA"): 79.6,
    ("56", "AAA"): 82.5,
    ("86", "AAA"): 83.2,
    ("101", "AAA"): 82.1,
    ("134", "AAA"): 84.1,
    ("150", "AAA"): 84.4,
    ("34", "ABB"): 80.3,
    ("56", "ABB"): 82.1,
    ("86", "ABB"): 83.5,
    ("150", "ABB"): 83.7,
    ("86S", "BBB"): 82.6,
    ("150S", "BBB"): 84.1,
    ("46N", "CBB"): 81.9,
    ("74N", "CBB"): 83.0,
    ("122N", "CBB"): 83.7,
    ("18", "dAAA"): 76.5,
    ("34", "dAAA"): 79.1,
    ("50", "dAAA"): 79.4,
    ("56", "dAAA"): 80.7,
    ("86", "dAAA"): 81.4,
    ("101", "dAAA"): 80.4,
    ("134", "dAAA"): 82.0,
    ("150", "dAAA"): 82.3,
    ("18", "dAAC"): 76.4,
    ("34", "dAAC"): 79.1,
    ("86", "dAAC"): 81.1,
    ("150", "dAAC"): 81.9,
    ("86S", "dBBB"): 81.1,
    ("150S", "dBBB"): 81.0,
}.items():
    _register(depth, code, mobile=False, miou=miou)

for depth in ("40S", "54S", "78S", "86S", "150S"):
    _register(depth, "BBX", mobile=True)
for depth in ("46NS", "74NS", "122NS"):
    _register(depth, "CBX", mobile=True)
for depth in ("46N", "74N", "122N"):
    _register(depth, "CBX", mobile=False)
for depth in ("18", "34", "50", "56", "86", "101", "134", "150"):
    _register(depth, "AAX", mobile=False)
for depth in ("86S", "150S"):
    _register(depth, "BBX", mobile=False)

for task, build in (("vision", FFNet), ("segmentation", FFNetSegmentation)):
    small: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48), "up_head": "C"}
    if build is FFNet:
        small |= {"neck_dims": (16, 32, 64, 128), "head_hidden_size": 128}
    register(
        Entry(
            name="ffnet_test" if build is FFNet else "ffnet_test_segmentation",
            build=build,
            family="ffnet",
            task=task,  # type: ignore[arg-type]
            args=small if build is FFNet else {**small, "seg_head": "C"},
            paper=PAPER,
            compact="A tiny one for tests and trials, not of the paper.",
            code_license=LICENSE,
            code_url=REPOSITORY,
            convert=convert,
            input_size=(3, 64, 64),
            first_conv=STEMS["slim"][1],
            classifier="head.fc" if build is FFNet else "head.conv2",
        )
    )
