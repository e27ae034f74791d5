"""Segmentation: FFNet's convolutional head, and any backbone that carries it.

Mehta et al., "Simple and Efficient Architectures for Semantic Segmentation", CVPR Workshops 2022, arXiv 2206.08236.
A head takes four maps of a backbone, fine to coarse, brings each to a width by a 1x1 convolution, and adds from coarse
to fine; what comes out at each level is resized to the finest and joined.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import group_parameters
from timm.models._features import FeatureHookNet, feature_take_indices
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.layers.arguments import check_choice, check_counts
from zoo.layers.init import init_weights

# kind: widths that the maps are brought to, widths that come out
UP_HEADS = {
    "A": ((64, 128, 256, 512), (128, 128, 128, 128)),
    "B": ((64, 128, 128, 256), (96, 96, 64, 32)),
    "C": ((128, 128, 128, 128), (128, 16, 16, 16)),
}
# kind: width in between, kernel of the last convolution
SEG_HEADS = {"A": (512, 1), "B": (256, 3), "C": (128, 1)}
UPSAMPLING = ("nearest", "bilinear")


def init_module(module: nn.Module) -> None:
    """FFNet's initialisation of the tensors that `module` itself holds."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=0.01)
        if module.bias is not None:
            nn.init.constant_(module.bias, 1e-4)
    elif isinstance(module, nn.Linear):
        bound = module.out_features**-0.5
        nn.init.uniform_(module.weight, -bound, bound)
        nn.init.zeros_(module.bias)
    else:
        module.reset_parameters()  # type: ignore[operator]


class ConvUnit(nn.Module):
    """Convolution, batch norm, ReLU. (B, in_dim, H, W) -> (B, dim, H / stride, W / stride)"""

    def __init__(self, in_dim: int, dim: int, kernel_size: int, stride: int = 1, bias: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, kernel_size, stride, kernel_size // 2, bias=bias)
        self.bn = nn.BatchNorm2d(dim)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


def resize(x: Tensor, like: Tensor, mode: str) -> Tensor:
    """`x` at the height and width of `like`."""
    return F.interpolate(x, size=like.shape[-2:], mode=mode, align_corners=True if mode == "bilinear" else None)


class UpHead(nn.Module):
    """Four maps, fine to coarse, of the widths `dims` -> four maps of the same sizes and the widths `out_dims`.

    Args:
        dims: widths of the maps that come in.
        kind: "A", "B" or "C", the paper's, from large to small.
        upsample: "nearest", or "bilinear" with aligned corners.

    Raises ConfigError for values that cannot be.
    """

    def __init__(self, dims: Sequence[int], kind: str, upsample: str) -> None:
        super().__init__()
        check_choice("up_head", kind, tuple(UP_HEADS))
        check_choice("upsample", upsample, UPSAMPLING)
        if len(dims) != 4:
            raise ConfigError(f"FFNet's head takes four maps, not {len(dims)}.")
        self.upsample = upsample
        widths, outs = UP_HEADS[kind]
        self.out_dims = outs
        self.adapters = nn.ModuleList(ConvUnit(dim, width, 1) for dim, width in zip(dims, widths, strict=True))
        self.fam_32_sm = ConvUnit(widths[3], outs[3], 3)
        self.fam_32_up = ConvUnit(widths[3], widths[2], 1)
        self.fam_16_sm = ConvUnit(widths[2], outs[2], 3)
        self.fam_16_up = ConvUnit(widths[2], widths[1], 1)
        self.fam_8_sm = ConvUnit(widths[1], outs[1], 3)
        self.fam_8_up = ConvUnit(widths[1], widths[0], 1)
        self.fam_4 = ConvUnit(widths[0], outs[0], 3)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        adapted = [adapt(maps[i]) for i, adapt in enumerate(self.adapters)]
        x4, x8, x16, x32 = adapted[0], adapted[1], adapted[2], adapted[3]
        x16 = resize(self.fam_32_up(x32), x16, self.upsample) + x16
        x8 = resize(self.fam_16_up(x16), x8, self.upsample) + x8
        x4 = resize(self.fam_8_up(x8), x4, self.upsample) + x4
        return [self.fam_4(x4), self.fam_8_sm(x8), self.fam_16_sm(x16), self.fam_32_sm(x32)]


class SegmentationNeck(nn.Module):
    """`UpHead`, its maps resized to the finest and joined. Four maps -> (B, sum of out_dims, H, W)"""

    def __init__(self, dims: Sequence[int], kind: str, upsample: str) -> None:
        super().__init__()
        self.up = UpHead(dims, kind, upsample)
        self.num_features = sum(self.up.out_dims)

    def forward(self, maps: list[Tensor]) -> Tensor:
        maps = self.up(maps)
        joined = [maps[0]]
        for i in range(1, 4):
            joined.append(resize(maps[i], maps[0], self.up.upsample))
        return torch.cat(joined, dim=1)


class SegmentationHead(nn.Module):
    """Two convolutions. (B, dim, H, W) -> (B, num_classes, H, W); `num_classes` 0 leaves the map as it is."""

    def __init__(self, dim: int, kind: str, num_classes: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        check_choice("seg_head", kind, tuple(SEG_HEADS))
        check_counts(0, num_classes=num_classes)
        self.hidden, self.kernel_size = SEG_HEADS[kind]
        self.conv1 = nn.Conv2d(dim, self.hidden, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(self.hidden)
        self.act = nn.ReLU()
        self.drop = nn.Dropout2d(drop_rate)
        self.set_classifier(num_classes)

    def set_classifier(self, num_classes: int) -> None:
        check_counts(0, num_classes=num_classes)
        padding = self.kernel_size // 2
        dim = self.conv1.out_channels  # fewer than `hidden` where channels were cut out
        layer = nn.Conv2d(dim, num_classes, self.kernel_size, padding=padding) if num_classes else nn.Identity()
        self.conv2 = layer.to(self.conv1.weight.device, self.conv1.weight.dtype).train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        return x if pre_logits else self.conv2(self.drop(x))


class SegmentationModel(nn.Module):
    """Any backbone with FFNet's head. (B, in_chans, H, W) -> (B, num_classes, H / s, W / s)

    `s` is the stride of the finest map that the head takes, 4 for most backbones. The logits are left at that size.

    Args:
        backbone: as `zoo.create_model(..., features_only=True)` makes it: gives a list of maps, fine to coarse, and
            has a `feature_info`. The last map of each stride is taken, of the four coarsest strides. Where there are
            fewer strides, the last four maps are taken, and where there are fewer maps, the coarsest more than once.
            Its layers, its gradient checkpointing and what of it does not decay are this model's.
        num_classes: of the logits; 0 gives the map before them.
        up_head: "A", "B" or "C", from large to small.
        seg_head: likewise.
        upsample: "nearest", or "bilinear" with aligned corners.
        drop_rate: dropout of whole channels before the last convolution.

    Raises ConfigError for values that cannot be.
    """

    task = "segmentation"

    def __init__(
        self,
        backbone: nn.Module,
        *,
        num_classes: int = 19,
        up_head: str = "B",
        seg_head: str = "B",
        upsample: str = "bilinear",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        info: Any = backbone.feature_info
        channels, strides = list(info.channels()), list(info.reduction())
        self.take = _four_maps(strides)
        self.num_classes = num_classes
        self.backbone = backbone
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": dim, "reduction": stride, "module": self.name_here(module)}
            for dim, stride, module in zip(channels, strides, info.module_name(), strict=True)
        ]
        self.neck = SegmentationNeck([channels[i] for i in self.take], up_head, upsample)
        self.head = SegmentationHead(self.neck.num_features, seg_head, num_classes, drop_rate)
        self.num_features = self.neck.num_features
        self.head_hidden_size = self.head.hidden
        self.output_stride = strides[self.take[0]]
        init_weights(_Fresh(self.neck, self.head))

    def init_module(self, module: nn.Module) -> None:
        """Initialise what `module` itself holds, as FFNet's authors do; for the head, which no backbone brings."""
        init_module(module)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """What the backbone does not decay; norms and biases are one-dimensional, which timm's optimizers spare."""
        prefix, owner = self._contract()
        names = owner.no_weight_decay() if hasattr(owner, "no_weight_decay") else ()
        return {prefix + name for name in names}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Layers in depth order, for layer-wise learning-rate decay: the backbone's, the neck, the last convolution.

        Raises ConfigError when the backbone does not tell its layers.
        """
        prefix, owner = self._contract()
        if not hasattr(owner, "group_matcher"):
            raise ConfigError(
                f'{type(owner).__name__} does not tell its layers: it has no group_matcher. feature_cls="getter" '
                "makes a backbone of a whole model, which does."
            )
        layers = group_parameters(owner, owner.group_matcher(coarse=coarse), reverse=True)
        behind = max(layers.values()) + 1

        def layer(name: str) -> int:
            if name.startswith(prefix):
                return layers[name.removeprefix(prefix)]
            return behind + name.startswith("head.conv2.")

        return layer

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade computation for memory: recompute the backbone's activations in the backward pass."""
        self._contract()[1].set_grad_checkpointing(enable)

    def _contract(self) -> tuple[str, Any]:
        """What keeps timm's contract for the backbone, and how the names of its modules begin here."""
        if hasattr(self.backbone, "model"):  # timm's getter holds the whole model, which it asks for maps
            return "backbone.model.", self.backbone.model
        if "body" in self.backbone._modules and isinstance(self.backbone, FeatureHookNet):  # left in one piece
            return "backbone.body.", self.backbone.body
        return "backbone.", self.backbone

    def name_here(self, name: str) -> str:
        """What a part of the backbone, or a tensor, is called here: timm's wrappers name `stages.0` `stages_0`."""
        prefix, owner = self._contract()
        flat = re.sub(r"^(\w+)\.(\d+)(?=\.|$)", r"\1_\2", name)
        return prefix + (flat if hasattr(owner, flat.partition(".")[0]) else name)

    def take_widths(self, widths: Mapping[str, list[int | None]]) -> None:
        """Make the widths that the backbone was shrunk to, as `zoo.sparsity.kept_widths` has its tensors, the whole's:
        the convolutions that read its maps are as narrow."""
        adapters: Any = self.neck.up.adapters
        readers = {
            f"neck.up.adapters.{i}.conv.weight": [None, adapter.conv.in_channels, None, None]
            for i, adapter in enumerate(adapters)
        }
        self.__dict__["_kept_widths"] = {self.name_here(name): shape for name, shape in widths.items()} | readers

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.conv2

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh last convolution for another number of classes (0: none)."""
        self.head.set_classifier(num_classes)
        self.num_classes = num_classes
        if num_classes:
            init_module(self.head.conv2)

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

        `norm` and `stop_early` change nothing: the maps are those that the backbone hands out, all at once.
        """
        if output_fmt != "NCHW":
            raise ConfigError(f"These features are maps: output_fmt must be 'NCHW', not {output_fmt!r}.")
        take, _ = feature_take_indices(len(self.feature_info), indices)
        maps = self.backbone(x)
        intermediates = [maps[i] for i in take]
        return intermediates if intermediates_only else (self._join(maps), intermediates)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, C, H / s, W / s): the joined maps."""
        return self._join(self.backbone(x))

    def _join(self, maps: list[Tensor]) -> Tensor:
        if maps[self.take[0]].ndim != 4:
            raise ConfigError('The backbone hands out tokens and not maps: feature_cls="getter" makes maps of them.')
        return self.neck([maps[i] for i in self.take])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The joined maps -> (B, num_classes, H / s, W / s)"""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class _Fresh(nn.Module):
    """Parts that are initialised together."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.init_module = init_module


def _four_maps(strides: Sequence[int]) -> tuple[int, ...]:
    """Which of a backbone's maps the head takes, fine to coarse."""
    last_of_each = {stride: i for i, stride in enumerate(strides)}
    if len(last_of_each) >= 4:
        return tuple(sorted(last_of_each.values())[-4:])
    every = [*range(len(strides)), *[len(strides) - 1] * 4]
    return tuple(every[max(0, len(strides) - 4) :][:4])
