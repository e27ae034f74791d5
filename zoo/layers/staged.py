"""What networks of stem, stages and head have in common: timm's contract, written once."""

# annotations must be types, not text: fx writes them into the code that it generates

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import SelectAdaptivePool2d
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.layers.arguments import check_counts, check_pool
from zoo.layers.hub_mixin import ZooModelHubMixin


class Head(nn.Module):
    """Pooling and norm (in either order), dropout, classifier. (B, dim, H, W) -> (B, num_classes).

    Args:
        dim: channels of the map.
        num_classes: width of the classifier; 0 leaves it out.
        global_pool: "avg", "max", "avgmax" (their mean), or "" for none (only without a classifier).
        norm: takes maps and, if it comes behind the pooling, what that leaves, (B, dim, 1, 1); None for none.
        norm_first: normalise the map and then pool, instead of pooling first.
        drop_rate: dropout before the classifier.

    Raises ConfigError for a pooling that there is not, or none before a classifier.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        global_pool: str = "avg",
        *,
        norm: nn.Module | None = None,
        norm_first: bool = False,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.norm = nn.Identity() if norm is None else norm
        self.set_pool(global_pool, num_classes)
        self.drop = nn.Dropout(drop_rate)
        self.fc: nn.Module = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

    def set_pool(self, global_pool: str, num_classes: int) -> None:
        check_pool(global_pool, num_classes)
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool)
        self.flatten = nn.Flatten(1) if global_pool else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.global_pool(self.norm(x)) if self.norm_first else self.norm(self.global_pool(x))
        x = self.flatten(x)
        return x if pre_logits else self.fc(self.drop(x))


class Stage(nn.Module):
    """Downsampling and the blocks of one resolution. (B, C, H, W) -> (B, C', H', W')

    Blocks that take another layout than maps have a subclass, whose `forward` calls `run_blocks`.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.run_blocks(self.downsample(x))

    def run_blocks(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class StagedNet(ZooModelHubMixin, nn.Module):
    """(B, in_chans, H, W) -> (B, num_classes) by a stem, stages of falling resolution, and a head.

    The constructor of a subclass makes `stem`, `stages` (whose items have a `grad_checkpointing`) and `head`, and ends
    with `init_weights(self)`. The class defines `init_module`, `blocks_of_stages` where parameters of a stage lie
    elsewhere than in `downsample` and `blocks`, and `make_classifier` and `drop_head_norm` where its head is another.

    Args:
        dims: channels of each stage's map.
        reductions: pixels of the input to one of each map, per side.
        in_chans: channels of the input.
        num_classes: width of the classifier; 0 for none.

    Raises ConfigError for counts that cannot be.
    """

    if TYPE_CHECKING:
        stem: nn.Module
        stages: nn.Sequential
        head: Head
        init_module: Callable[[nn.Module], None]

    blocks_of_stages = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]

    def __init__(self, dims: tuple[int, ...], reductions: tuple[int, ...], in_chans: int, num_classes: int) -> None:
        super().__init__()
        check_counts(1, in_chans=in_chans)
        check_counts(0, num_classes=num_classes)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"}
            for i, (dim, reduction) in enumerate(zip(dims, reductions, strict=True))
        ]

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters of more than one dimension that are not to decay; those of one, timm's optimizers spare anyway."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups in depth order, for layer-wise learning-rate decay: stages (`coarse`) or blocks."""
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else self.blocks_of_stages}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade computation for memory: recompute each block's activations in the backward pass."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """A fresh classifier of another width (0: none), and another pooling; `reset_other` drops the head's norm."""
        check_counts(0, num_classes=num_classes)
        self.head.set_pool(self.head.global_pool.pool_type if global_pool is None else global_pool, num_classes)
        self.num_classes = num_classes
        if reset_other:
            self.drop_head_norm()
        like = next(self.stem.parameters())
        self.head.fc = self.make_classifier(num_classes).to(device=like.device, dtype=like.dtype)
        for module in self.head.fc.modules():
            if next(module.parameters(recurse=False), None) is not None:
                self.init_module(module)
        self.head.train(self.training)

    def make_classifier(self, num_classes: int) -> nn.Module:
        """(B, head_hidden_size) -> (B, num_classes), not initialised; for no classes nothing."""
        return nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()

    def drop_head_norm(self) -> None:
        self.head.norm = nn.Identity()

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

        `norm` normalises the last stage's map with the head's norm.
        """
        if output_fmt != "NCHW":
            raise ConfigError(f"These features are maps: output_fmt must be 'NCHW', not {output_fmt!r}.")
        take, last = feature_take_indices(len(self.stages), indices)
        intermediates = []
        x = self.stem(x)
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take:
                final = norm and i == len(self.stages) - 1
                intermediates.append(self.head.norm(x) if final else x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] | tuple[int, ...] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last one in `indices`, and the head; returns the indices of those kept."""
        take, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "", reset_other=prune_norm or shortened)
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_features, h, w): the last stage's map, not normalised."""
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, num_features, h, w) -> (B, num_classes); `pre_logits` gives (B, num_features)."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
