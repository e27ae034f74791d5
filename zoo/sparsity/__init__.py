"""Sparse models: which weights are sparse and how much, their masks, what they cost, and channels that die.

Nothing here trains: `zoo.training.sparse` does, with these parts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoo.lazy import on_first_use
from zoo.sparsity.channels import (
    ChannelGroup,
    channel_counts,
    channel_groups,
    channel_positions,
    dead_channels,
    kept_widths,
    resize,
    retire_channels,
    shrink,
    slice_tensor,
    weakest_channels,
)
from zoo.sparsity.densities import counts, densities, er, erk, sparse_parameters, uniform
from zoo.sparsity.masks import (
    apply_masks,
    check_masks,
    density_of,
    follows_n_m,
    load_masks,
    masks_of,
    n_m_mask,
    pack,
    save_masks,
    unpack,
)

if TYPE_CHECKING:
    from zoo.sparsity.sparse_model import SparseLayer, SparseModel, report

__all__ = [
    "ChannelGroup",
    "SparseLayer",
    "SparseModel",
    "apply_masks",
    "channel_counts",
    "channel_groups",
    "channel_positions",
    "check_masks",
    "counts",
    "dead_channels",
    "densities",
    "density_of",
    "er",
    "erk",
    "follows_n_m",
    "kept_widths",
    "load_masks",
    "masks_of",
    "n_m_mask",
    "pack",
    "report",
    "resize",
    "retire_channels",
    "save_masks",
    "shrink",
    "slice_tensor",
    "sparse_parameters",
    "uniform",
    "unpack",
    "weakest_channels",
]

# imported late, as it needs zoo.profiling, which itself counts with the densities of this package
__getattr__, __dir__ = on_first_use(
    __name__, dict.fromkeys(("SparseLayer", "SparseModel", "report"), "zoo.sparsity.sparse_model")
)
