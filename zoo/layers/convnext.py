"""The fast form of ConvNeXt's stages (https://arxiv.org/abs/2201.03545): of SLaK, which has them with larger kernels,
and of timm's ConvNeXts, EUPE's among them.

Maps stay channels_last, where the norms need no copies and the linear layers are 1x1 convolutions, with GELU and sum
included. A stage's map is its own: its blocks write over it (`may_overwrite` says where they must not).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from zoo.layers.folding import as_conv2d, fold_scale
from zoo.layers.packed import PackedConv2d, in_parts, is_gelu

__all__ = ["FastConvNeXtBlock", "FastConvNeXtStage", "timms_fast_stage"]


class FastConvNeXtStage(nn.Module):
    """Downsampling, if any, and the blocks, on as many samples at a time as the cache has room for.

    (B, C, H, W) -> (B, C', H', W')
    """

    hidden_bytes = 4 * 2**20  # of the MLP's hidden maps that are worked on together

    def __init__(self, downsample: nn.Module | None, blocks: Sequence[FastConvNeXtBlock]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks, self.hidden = nn.Sequential(*blocks), blocks[0].fc1.out_channels

    def forward(self, x: Tensor) -> Tensor:
        if self.downsample is not None:
            x = self.downsample(x)
        return in_parts(self.blocks, x, self.downsample is not None, self.hidden, self.hidden_bytes)


class FastConvNeXtBlock(nn.Module):
    """`x + gamma * fc2(gelu(fc1(norm(conv(x)))))`, norm and linear layers over the channels of each pixel.

    The linear layers are convolutions, and gamma (C) is in the second. (B, C, H, W) -> (B, C, H, W)
    """

    def __init__(
        self, conv: nn.Module, norm: nn.LayerNorm, fc1: nn.Linear, fc2: nn.Linear, gamma: Tensor | None
    ) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm  # with its affine: without, the kernel is slower
        second = as_conv2d(fc2) if gamma is None else fold_scale(as_conv2d(fc2), gamma)
        self.fc1, self.fc2 = PackedConv2d(as_conv2d(fc1), "gelu"), PackedConv2d(second)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.norm(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.fc2.add_to(x, self.fc1(branch))


def timms_fast_stage(stage: nn.Module) -> FastConvNeXtStage | None:
    """The fast form of a stage of timm's ConvNeXt; None for other modules and for its less common variants."""
    timm = sys.modules.get("timm.models.convnext")  # not imported for this: no stage is timm's before
    if timm is None or type(stage) is not timm.ConvNeXtStage:
        return None
    blocks: list[Any] = list(stage.blocks)  # type: ignore[arg-type]
    if not blocks or not all(map(_is_common, blocks)):
        return None
    downsample: Any = stage.downsample
    return FastConvNeXtStage(
        None if isinstance(downsample, nn.Identity) else downsample,
        [FastConvNeXtBlock(b.conv_dw, b.norm, b.mlp.fc1, b.mlp.fc2, b.gamma) for b in blocks],
    )


def _is_common(block: Any) -> bool:
    """Whether it is timm's block as most of its networks have it, and nothing of it was exchanged."""
    timm = sys.modules["timm.models.convnext"]
    if type(block) is not timm.ConvNeXtBlock or type(block.mlp) is not timm.Mlp:  # one has response norm
        return False
    mlp, nothing = block.mlp, (nn.Identity, nn.Dropout)
    return (
        not block.use_conv_mlp
        and isinstance(block.norm, nn.LayerNorm)
        and type(block.shortcut) is nn.Identity
        and type(block.drop_path) in (nn.Identity, timm.DropPath)
        and type(mlp.norm) is nn.Identity
        and type(mlp.fc1) is type(mlp.fc2) is nn.Linear
        and type(mlp.drop1) in nothing
        and type(mlp.drop2) in nothing
        and is_gelu(mlp.act)
    )
