"""Sparse models: which weights are sparse and how much, their masks, what they cost, and channels that die.

Nothing here trains: `zoo.training.sparse` does, with these parts.
"""

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

__all__ = [
    "apply_masks",
    "check_masks",
    "counts",
    "densities",
    "density_of",
    "er",
    "erk",
    "follows_n_m",
    "load_masks",
    "masks_of",
    "n_m_mask",
    "pack",
    "save_masks",
    "sparse_parameters",
    "uniform",
    "unpack",
]
