"""SReT: Sliced Recursive Transformer.

Shen, Liu and Xing, "Sliced Recursive Transformer", ECCV 2022, arXiv 2111.05297.

What makes it compact: each transformer block is passed through more than once, with weights of its own only in a small
MLP behind each pass (the paper's non-linear projection layer), and attention is sliced into groups of tokens, so that
two sliced passes cost about as much as one whole. Tokens are permuted before a sliced pass that is not the first, so
that every pass groups others.

Where this file departs from the authors' code:

- A shared block is stored once, in `stages.*.blocks.*.shared`; their checkpoints list it once for each pass.
- They draw the permutation anew at every call, in evaluation too, so that no output can be had twice. Here it is drawn
  anew in training alone, and in evaluation it is the same at every call (`SReT.set_slicing` chooses otherwise).
- The number of passes is an argument; their code takes two for granted.
- Other input sizes than the position table's work: the table is resized (bicubic, as DeiT does), and tokens that do not
  divide into as many slices are cut into the next smaller number that they do divide into.
"""

from __future__ import annotations

import copy
import itertools
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, Mlp, use_fused_attn
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.layers.arguments import check_above_zero, check_choice, check_counts, check_rates, check_widths, image_sides
from zoo.layers.fast_form import HasFastForm, HasNumbers
from zoo.layers.folding import fold_scale
from zoo.layers.init import init_weights
from zoo.layers.positions import resize_table
from zoo.layers.staged import Head, Stage, StagedNet
from zoo.registry import Entry, Paper, Reported, Weights, register

__all__ = ["SReT"]

_logger = logging.getLogger(__name__)

Slicing = Literal["auto", "fixed", "random"]


# -------------------------------------------------------------------------------------------------------------- slicing


@torch.fx.wrap
def fit_groups(tokens: int, groups: int) -> int:
    """The largest number, `groups` at most, that divides `tokens`."""
    while tokens % groups != 0:
        groups -= 1
    return groups


@torch.fx.wrap
def fixed_order(x: Tensor, seed: int) -> Tensor:
    """A permutation of the tokens of `x`, (B, N, C) -> (N,), that follows from `seed` and N alone, on any device.

    It sorts the numbers from 0 to N-1 by a hash: multiplications by odd numbers and shifted exclusive ors within 32
    bits, which are one to one. A random generator could neither be scripted nor exported.
    """
    keys = torch.arange(x.shape[1], device=x.device) + seed * 7919
    for factor in (0x045D9F3B, 0x119DE1F3):
        keys = (keys * factor) % 4294967296
        keys = keys.bitwise_xor(keys // 65536)
    return keys.argsort()


@torch.fx.wrap
def random_order(x: Tensor) -> Tensor:
    """A permutation of the tokens of `x`, (B, N, C) -> (N,), drawn anew."""
    return torch.randperm(x.shape[1], device=x.device)


class SliceOrder(nn.Module):
    """The order in which tokens are sliced: (B, N, C) -> (N,), one for the whole batch."""

    def __init__(self, seed: int, slicing: str) -> None:
        super().__init__()
        self.seed = seed
        self.slicing = slicing

    def forward(self, x: Tensor) -> Tensor:
        if self.slicing == "random" or (self.slicing == "auto" and self.training):
            return random_order(x)
        return fixed_order(x, self.seed)


class GivenOrder(nn.Module):
    """The order that a user's function gives: (B, N, C) -> (N,)."""

    def __init__(self, order: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        tokens = int(x.shape[1])
        order = torch.as_tensor(self.order(tokens)).to(device=x.device, dtype=torch.int64)
        if order.shape != (tokens,) or not torch.equal(order.sort().values, torch.arange(tokens, device=x.device)):
            raise ConfigError(f"The slicing function must return a permutation of 0 to {tokens - 1}, as a tensor.")
        return order


class Attention(nn.Module):
    """Multi-head self-attention within groups of tokens. (B, N, C) -> (B, N, C)."""

    def __init__(self, dim: int, num_heads: int, seed: int, slicing: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.fused_attn = use_fused_attn()
        self.order: nn.Module = SliceOrder(seed, slicing)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, groups: int, permute: bool) -> Tensor:
        if permute:
            order = self.order(x)
            return self.attend(x.index_select(1, order), groups).index_select(1, order.argsort())
        return self.attend(x, groups)

    def attend(self, x: Tensor, groups: int) -> Tensor:
        """Attention within each of `groups` runs of tokens: the runs are so many more images of a batch."""
        B, N, C = x.shape
        G = fit_groups(N, groups) if groups > 1 else 1
        qkv = self.qkv(x).reshape(B * G, N // G, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = (q * self.head_dim**-0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


# --------------------------------------------------------------------------------------------------------------- blocks


class SharedBlock(HasFastForm):
    """The transformer block that is passed through several times. (B, N, C) -> (B, N, C).

    `coefficients` scale shortcut and branch of the attention, then of the MLP (section 3.4, learnable residual
    connections).
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float, seed: int, slicing: str) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.empty(4))
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, seed, slicing)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, groups: int, permute: bool) -> Tensor:
        a = self.coefficients
        x = a[0] * x + a[1] * self.drop_path(self.attn(self.norm1(x), groups, permute))
        return a[2] * x + a[3] * self.drop_path(self.mlp(self.norm2(x)))

    def fast_form(self) -> nn.Module:
        return FastSharedBlock(self)


class Projection(HasFastForm):
    """The MLP that each pass has for itself: the non-linear projection layer (section 3.3). (B, N, C) -> (B, N, C)."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.empty(2))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * ratio))

    def forward(self, x: Tensor) -> Tensor:
        return self.coefficients[0] * x + self.coefficients[1] * self.mlp(self.norm(x))

    def fast_form(self) -> nn.Module:
        return FastProjection(self)


class RecursiveBlock(nn.Module):
    """A shared block and, behind each pass through it, a projection. (B, N, C) -> (B, N, C).

    Pass number i slices attention into `groups[i]`. All but the first permute the tokens before they slice.
    """

    def __init__(self, shared: nn.Module, projections: Sequence[nn.Module], groups: Sequence[int]) -> None:
        super().__init__()
        self.groups = list(groups)
        self.shared = shared
        self.projections = nn.ModuleList(projections)

    def forward(self, x: Tensor) -> Tensor:
        for i, projection in enumerate(self.projections):
            x = projection(self.shared(x, self.groups[i], i > 0 and self.groups[i] > 1))
        return x


Part = TypeVar("Part", bound=nn.Module)


def own(module: Part) -> Part:
    """`module` with places of its own for the same parts: somebody else may hold it, too."""
    made = copy.copy(module)
    made._modules = dict(module._modules)
    return made


class FastSharedBlock(HasNumbers):
    """`SharedBlock` at inference: the branches' coefficients in their last layer, the shortcuts' in the addition."""

    def __init__(self, block: SharedBlock) -> None:
        super().__init__()
        a = block.coefficients.detach()
        self.numbers = a[0].item(), a[2].item()  # of the shortcuts
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, own(block.attn), block.norm2, own(block.mlp)
        self.attn.proj = fold_scale(self.attn.proj, a[1])
        self.mlp.fc2 = fold_scale(self.mlp.fc2, a[3])

    def forward(self, x: Tensor, groups: int, permute: bool) -> Tensor:
        x = torch.add(self.attn(self.norm1(x), groups, permute), x, alpha=self.numbers[0])
        return torch.add(self.mlp(self.norm2(x)), x, alpha=self.numbers[1])


class FastProjection(HasNumbers):
    """`Projection` at inference, as `FastSharedBlock`."""

    def __init__(self, block: Projection) -> None:
        super().__init__()
        a = block.coefficients.detach()
        self.numbers = (a[0].item(),)  # of the shortcut
        self.norm, self.mlp = block.norm, own(block.mlp)
        self.mlp.fc2 = fold_scale(self.mlp.fc2, a[1])

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.mlp(self.norm(x)), x, alpha=self.numbers[0])


# ---------------------------------------------------------------------------------------------------------------- model


torch.fx.wrap("resize_table")  # fx looks for the name in the module that calls it


class Stem(nn.Module):
    """Three 3x3 convolutions of stride 2, and the position table. (B, in_chans, H, W) -> (B, dim, H/8, W/8)."""

    def __init__(self, in_chans: int, dim: int, grid: tuple[int, int], drop: float) -> None:
        super().__init__()
        widths = (in_chans, dim // 2, dim, dim)
        self.convs = nn.Sequential()
        for before, width in itertools.pairwise(widths):
            self.convs.extend((nn.Conv2d(before, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()))
        self.pos_embed = nn.Parameter(torch.empty(1, dim, *grid))
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs(x)
        return self.drop(x + resize_table(self.pos_embed, x.shape[2], x.shape[3]))


class SReTStage(Stage):
    """Downsampling and the recursive blocks of one resolution. (B, C, H, W) -> (B, C', H', W')."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        B, C, H, W = x.shape
        x = self.run_blocks(x.flatten(2).transpose(1, 2))
        return x.transpose(1, 2).reshape(B, C, H, W)


class SReT(StagedNet):
    """Stages of recursive blocks on a convolutional stem of stride 8. (B, in_chans, H, W) -> (B, num_classes).

    The defaults are those of `sret_t`. Any number of stages works.

    Args:
        in_chans: channels of the input.
        num_classes: width of the classifier; 0 leaves it out.
        global_pool: "avg", "max", "avgmax" (their mean), or "" for none (only without a classifier).
        depths: shared blocks of each stage; each is passed through `passes` times.
        passes: times that each shared block is passed through. Each pass has a projection of its own.
        dims: width of each stage.
        num_heads: attention heads of each stage.
        mlp_ratio: hidden width of the shared blocks' MLP over the width (rounded down).
        projection_ratio: that of the projections.
        groups: slices of attention, for each pass one number for each stage. Passes beyond the last given slice as that
            one does; given ones beyond the number of passes are not used.
        slicing: how tokens are permuted before a sliced pass that is not the first; see `set_slicing`.
        slice_seed: decides the fixed permutations, one for each shared block.
        drop_rate: dropout before the classifier.
        pos_drop_rate: dropout behind the position table.
        drop_path_rate: stochastic depth. It grows linearly over all passes from 0 without reaching this; the shared
            blocks of a stage have the first rates of their stage, the same in each pass.
        img_size: input height and width that the position table is made for; at other sizes it is resized.

    Raises ConfigError for values that cannot be.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        depths: Sequence[int] = (2, 5, 3),
        passes: int = 2,
        dims: Sequence[int] = (64, 128, 256),
        num_heads: Sequence[int] = (2, 4, 8),
        mlp_ratio: float = 3.6,
        projection_ratio: float = 1.0,
        groups: Sequence[Sequence[int]] = ((8, 4, 1), (2, 1, 1)),
        slicing: Slicing = "auto",
        slice_seed: int = 0,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] = 224,
    ) -> None:
        depths, dims, num_heads = check_widths(depths=depths, dims=dims, num_heads=num_heads)
        check_counts(1, passes=passes)
        check_counts(0, slice_seed=slice_seed)
        check_above_zero(mlp_ratio=mlp_ratio, projection_ratio=projection_ratio)
        check_rates(drop_rate=drop_rate, pos_drop_rate=pos_drop_rate, drop_path_rate=drop_path_rate)
        check_choice("slicing", slicing, SLICINGS)
        for dim, heads in zip(dims, num_heads, strict=True):
            if dim % heads:
                raise ConfigError(f"A stage of width {dim} cannot be split into {heads} heads: dims and num_heads.")
        if any(dim % before for before, dim in itertools.pairwise(dims)) or dims[0] < 2:
            raise ConfigError(f"Each width in dims must be a multiple of the one before, from 2 up, not {dims!r}.")
        group_rows = _check_groups(groups, len(dims))[:passes]
        group_rows += group_rows[-1:] * (passes - len(group_rows))

        reductions = tuple(8 * 2**i for i in range(len(dims)))
        super().__init__(dims, reductions, in_chans, num_classes)
        self.slice_seed = slice_seed
        self.stem = Stem(in_chans, dims[0], _grid(img_size), pos_drop_rate)
        stages = []
        total, before = passes * sum(depths), 0
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            downsample = nn.Conv2d(dims[i - 1], dim, 3, 2, 1, groups=dims[i - 1]) if i else nn.Identity()
            blocks = [
                RecursiveBlock(
                    SharedBlock(
                        dim,
                        num_heads[i],
                        mlp_ratio,
                        drop_path_rate * (passes * before + j) / total,
                        slice_seed + before + j,
                        slicing,
                    ),
                    [Projection(dim, projection_ratio) for _ in range(passes)],
                    [row[i] for row in group_rows],
                )
                for j in range(depth)
            ]
            before += depth
            stages.append(SReTStage(downsample, blocks))
        self.stages = nn.Sequential(*stages)
        self.head = Head(dims[-1], num_classes, global_pool, norm=LayerNorm2d(dims[-1]), drop_rate=drop_rate)
        init_weights(self)

    def init_module(self, module: nn.Module) -> None:
        """Initialise the tensors that `module` itself holds, as the authors' code does: mostly as PyTorch does."""
        if isinstance(module, SharedBlock | Projection):
            nn.init.ones_(module.coefficients)
        elif isinstance(module, Stem):
            nn.init.trunc_normal_(module.pos_embed, std=0.02)
        else:
            module.reset_parameters()  # type: ignore[operator]

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The position table; the coefficients are one-dimensional, which timm's optimizers leave undecayed anyway."""
        return {"stem.pos_embed"}

    @torch.jit.ignore
    def set_slicing(self, slicing: Slicing | Callable[[int], Tensor]) -> None:
        """How tokens are permuted before a sliced pass that is not the first. Only which share a slice matters.

        Args:
            slicing: "auto", anew at each call in training and the same at each call in evaluation; "fixed", always the
                same; "random", always anew, as the authors do; or a function from the number of tokens N to a
                permutation, an integer tensor (N,) whose item t is the token that comes t-th.

        Raises ConfigError for any other; the model does at its next call where a function gives no permutation.
        """
        if not callable(slicing):
            check_choice("slicing", slicing, SLICINGS)
        seeds = (block.shared.attn for stage in self.stages for block in stage.blocks)  # type: ignore[union-attr]
        for seed, attention in enumerate(seeds, start=self.slice_seed):
            order = GivenOrder(slicing) if callable(slicing) else SliceOrder(seed, slicing)
            attention.order = order.train(attention.training)


SLICINGS = ("auto", "fixed", "random")


def _check_groups(groups: Any, stages: int) -> list[list[int]]:
    rows = (
        [list(row) if isinstance(row, list | tuple) else row for row in groups]
        if isinstance(groups, list | tuple)
        else []
    )
    if not rows or not all(
        isinstance(row, list) and len(row) == stages and all(type(n) is int and n > 0 for n in row) for row in rows
    ):
        raise ConfigError(
            "groups must hold one row for each pass, with a whole number above zero for each of "
            f"{stages} stages, as in ((8, 4, 1), (2, 1, 1)), not {groups!r}."
        )
    return rows


def _grid(img_size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width behind the stem."""
    height, width = image_sides(img_size)
    return -(-height // 8), -(-width // 8)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def convert(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint of szq0214/SReT, or one of ours, for `model`, whose position table it is resized to.

    Theirs lists each shared block at two places, of which the authors' code keeps the second.
    """
    if "pos_embed" in state_dict:
        state_dict = _from_published(state_dict)
    table, wanted = state_dict.get("stem.pos_embed"), model.state_dict().get("stem.pos_embed")
    if table is not None and wanted is not None and table.ndim == 4 and table.shape[:2] == wanted.shape[:2]:
        resized = resize_table(table.float(), wanted.shape[2], wanted.shape[3])
        state_dict = {**state_dict, "stem.pos_embed": resized.to(table.dtype)}
    return state_dict


STEM = {"conv1": 0, "bn1": 1, "conv2": 3, "bn2": 4, "conv3": 6, "bn3": 7}


def _from_published(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    converted: dict[str, Tensor] = {}
    coefficients: dict[str, dict[int, Tensor]] = {}
    differing = set()
    for key, tensor in state_dict.items():
        if match := re.match(r"transformers\.(\d+)\.blocks\.(\d+)\.(.*)", key):
            stage, entry, rest = int(match[1]), int(match[2]), match[3]
            block, place = divmod(entry, 4)  # first pass, its projection, second pass, its projection
            if place == 0:
                second = state_dict.get(f"transformers.{stage}.blocks.{entry + 2}.{rest}")
                if second is None or not torch.equal(tensor, second):
                    differing.add(f"transformers.{stage}.blocks.{entry}")
                continue
            name = f"stages.{stage}.blocks.{block}." + ("shared" if place == 2 else f"projections.{place // 2}")
            if number := re.fullmatch(r"coefficient(\d)\.bias", rest):
                coefficients.setdefault(name, {})[int(number[1])] = tensor.reshape(1)
                continue
            key = f"{name}.{rest if place == 2 else rest.replace('norm1.', 'norm.')}"
        elif match := re.match(r"patch_embed\.(\w+)\.(.*)", key):
            key = f"stem.convs.{STEM.get(match[1], match[1])}.{match[2]}"
        elif match := re.match(r"pools\.(\d+)\.conv\.(.*)", key):
            key = f"stages.{int(match[1]) + 1}.downsample.{match[2]}"
        elif key == "pos_embed":
            key = "stem.pos_embed"
        else:
            key = re.sub(r"^norm\.", "head.norm.", re.sub(r"^head\.", "head.fc.", key))
        converted[key] = tensor
    for name, numbered in coefficients.items():
        converted[f"{name}.coefficients"] = torch.cat([numbered[i] for i in sorted(numbered)])
    if differing:
        _logger.warning(
            "%d shared blocks (%s ...) hold other values at their first place than at their second, which is used.",
            len(differing),
            min(differing),
        )
    return converted


# ------------------------------------------------------------------------------------------------------------- variants

PAPER = Paper(
    title="Sliced Recursive Transformer",
    authors="Shen, Liu, Xing",
    venue="ECCV 2022",
    arxiv="2111.05297",
)
README = "README of szq0214/SReT"
FKD_README = "README of szq0214/FKD"
LICENSE_NOTE = "The authors state no licence for the weights; their code is MIT."

SIZES: dict[str, dict[str, Any]] = {
    "t": {},
    "lt": {"mlp_ratio": 4.0},
    "s": {"dims": (126, 252, 504), "num_heads": (3, 6, 12), "mlp_ratio": 3.0, "projection_ratio": 2.0},
}
GROUPS = {"": ((8, 4, 1), (2, 1, 1)), "g16": ((16, 14, 1), (1, 1, 1)), "wo_slice": ((1, 1, 1),)}


def _weights(tag: str, drive_id: str, top1: float, side: int, source: str = README) -> Weights:
    return Weights(
        tag=tag,
        url=f"https://drive.usercontent.google.com/download?id={drive_id}&export=download&confirm=t",
        license="unstated",
        top1=top1,
        accuracy_source=source,
        input_size=(3, side, side),
        note=LICENSE_NOTE,
    )


# name without the family: size, groups, input side, parameters (M) and MACs (G) as stated,
# {tag: (Google Drive file, top-1 of the last epoch)}
for name, size, grouping, side, params, macs, published in (
    (
        "t",
        "t",
        "",
        224,
        4.8,
        1.1,
        {
            "szq_in1k": ("1FDTpva6y-I_bKmyVmLFDn_3BlDq3dwni", 76.0),
            "szq_distill_in1k": ("1xzG4VQyQyxWJfQTcGCE-fuMuK3BwPCjK", 77.6),
        },
    ),
    (
        "lt",
        "lt",
        "",
        224,
        5.0,
        1.2,
        {
            "szq_in1k": ("1uSWvoVLHmOH6rNYiXSxD_rlN5dSBvEm3", 76.7),
            "szq_distill_in1k": ("1l6u0q4kwli5czEyo4TeJANtqsulh-J5G", 77.7),
            "szq_fkd_in1k": ("1mmdPXKutHM9Li8xo5nGG6TB0aAXA9PFR", 78.7),
        },
    ),
    ("lt_g16", "lt", "g16", 224, 5.0, 1.2, {"szq_in1k": ("1sKW9KJ5PLkDVXcW6m7dp8ieLwyCJNRqV", 76.6)}),
    ("s", "s", "", 224, 20.9, 4.2, {"szq_in1k": ("1y6F_bCgS1sagm7pxjAtuSPUB5HoNb8Ed", 81.9)}),
    (
        "t_wo_slice",
        "t",
        "wo_slice",
        224,
        4.8,
        1.4,
        {
            "szq_in1k": ("1wHM7NRSkz-WykCSES17xFV56h_m5RMXj", 76.1),
            "szq_distill_in1k": ("1P1qK-j1Cac5le8-DNUFBbjmIpRThuiVp", 77.7),
        },
    ),
    (
        "lt_wo_slice",
        "lt",
        "wo_slice",
        224,
        5.0,
        1.4,
        {
            "szq_in1k": ("1EXwfiMMa1UVQ_tmY6YQJ-Se0b3bW5NpC", 76.8),
            "szq_distill_in1k": ("1FDqkfkw5nZEuTcBmiBKg3lvPJOPQWS6i", 77.9),
        },
    ),
    ("s_wo_slice", "s", "wo_slice", 224, 20.9, 4.7, {"szq_in1k": ("1vlsxJieKhfnw-F6xFiwczvXBuk7ugXxm", 82.0)}),
    (
        "t_wo_slice_384",
        "t",
        "wo_slice",
        384,
        4.9,
        6.4,
        {"szq_distill_in1k_384": ("11mWAktu6LrNa0Qt61WJGA0eTWoKYD1Be", 79.7)},
    ),
    (
        "s_wo_slice_384",
        "s",
        "wo_slice",
        384,
        21.0,
        18.5,
        {"szq_distill_in1k_384": ("1z5whJpXbbtFdjLpS1pCPvKcJhVnYCeo-", 83.8)},
    ),
    (
        "s_wo_slice_512",
        "s",
        "wo_slice",
        512,
        21.3,
        42.8,
        {"szq_distill_in1k_512": ("1AZXIGMiGboI-nkoKuPnHnhDlBwZumuiB", 84.3)},
    ),
):
    sliced = grouping != "wo_slice"
    register(
        Entry(
            name=f"sret_{name}",
            build=SReT,
            family="sret",
            args={**SIZES[size], "groups": GROUPS[grouping], **({} if side == 224 else {"img_size": side})},
            paper=PAPER,
            compact="Each block is passed through twice"
            + (", attention sliced into groups of tokens." if sliced else "."),
            code_license="mit",
            code_url="https://github.com/szq0214/SReT",
            reported=Reported(
                params=round(params * 1e6), macs=round(macs * 1e9), input_size=(3, side, side), source=README
            ),
            weights=tuple(
                _weights(tag, drive_id, top1, side, FKD_README if "fkd" in tag else README)
                for tag, (drive_id, top1) in published.items()
            ),
            convert=convert,
            input_size=(3, side, side),
            first_conv="stem.convs.0",
            classifier="head.fc",
        )
    )
register(
    Entry(
        name="sret_test",
        build=SReT,
        family="sret",
        args={"depths": (1, 1, 1), "dims": (32, 64, 128), "num_heads": (2, 4, 8), "img_size": 64},
        paper=PAPER,
        compact="A tiny one for tests and trials, not of the paper.",
        code_license="mit",
        code_url="https://github.com/szq0214/SReT",
        convert=convert,
        input_size=(3, 64, 64),
        first_conv="stem.convs.0",
        classifier="head.fc",
    )
)
