"""Masks: which weights of a sparse model may be non-zero. True keeps a weight, False holds it at zero.

Masks go by the name of their parameter, `{"stages.0.blocks.0.mlp.fc1.weight": mask}`; a weight without one is dense.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import safetensors
import torch
from torch import Tensor, nn

from zoo.errors import CheckpointError, ConfigError, did_you_mean
from zoo.layers.wrappers import unwrapped
from zoo.sparsity.densities import plain_name, sparse_parameters
from zoo.units import shape_text
from zoo.weights import write_safetensors

__all__ = [
    "MASKS",
    "Masks",
    "apply_masks",
    "check_masks",
    "density_of",
    "follows_n_m",
    "load_masks",
    "masks_of",
    "n_m_mask",
    "pack",
    "save_masks",
    "unpack",
]

MASKS = "masks.safetensors"  # in the folder of a checkpoint
Masks: TypeAlias = dict[str, Tensor]


def masks_of(model: nn.Module, layers: str | Sequence[str] = "all") -> Masks:
    """The masks that the exact zeros of a model's weights make, for those weights of `layers` that have any.

    `layers` is that of `sparse_parameters`. Raises ConfigError for a model on the meta device.
    """
    masks = {}
    for name, parameter in sparse_parameters(model, layers).items():
        if parameter.is_meta:
            raise ConfigError(f"{type(model).__name__} is on the meta device: it has no weights to look at.")
        mask = parameter.detach() != 0
        if not mask.all():
            masks[name] = mask
    return masks


def check_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """The parameters that masks belong to.

    Raises CheckpointError for a mask without one, or of another shape, and ConfigError for what are no masks.
    """
    parameters = {
        plain_name(name): parameter for name, parameter in unwrapped(model).named_parameters(remove_duplicate=False)
    }
    _check_mapping(masks)
    for name, mask in masks.items():
        if name not in parameters:
            near = did_you_mean(name, parameters)
            raise CheckpointError(f"There is a mask for {name!r}, which {type(model).__name__} does not have.{near}")
        if mask.shape != parameters[name].shape:
            raise CheckpointError(
                f"The mask of {name} is {shape_text(mask.shape)}, its weight in {type(model).__name__} is "
                f"{shape_text(parameters[name].shape)}: build the model with the arguments that it was made sparse "
                "with."
            )
    return {name: parameters[name] for name in masks}


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set every weight that its mask leaves out to zero, in place. Raises CheckpointError, as `check_masks`."""
    for name, parameter in check_masks(model, masks).items():
        parameter.masked_fill_(~masks[name].to(parameter.device, torch.bool), 0)


def density_of(masks: Mapping[str, Tensor]) -> float:
    """The share of weights that all masks together keep; 1 without masks. Raises ConfigError for what are no masks."""
    _check_mapping(masks)
    total = sum(mask.numel() for mask in masks.values())
    return sum(int(mask.count_nonzero()) for mask in masks.values()) / total if total else 1.0


def _check_mapping(masks: Mapping[str, Tensor]) -> None:
    if not isinstance(masks, Mapping):
        raise ConfigError(f"Masks are tensors by the names of their weights, and not {type(masks).__name__}.")
    for name, mask in masks.items():
        if not isinstance(name, str):
            raise ConfigError(f"A mask goes by the name of its weight, and not by {name!r}.")
        if not isinstance(mask, Tensor):
            raise ConfigError(f"The mask of {name} must be a tensor, not {type(mask).__name__}.")


# ---------------------------------------------------------------------------------------------------------------- files

FORMAT = "zoo.masks"  # in the metadata of the file, beside the shapes


def pack(mask: Tensor) -> Tensor:
    """Eight elements in a byte, the first in its highest bit: a vector of uint8, on the CPU."""
    return torch.from_numpy(np.packbits(mask.detach().to("cpu", torch.bool).numpy()))


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The mask of that shape that `pack` packed. Raises CheckpointError where the lengths do not agree."""
    size = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.ndim != 1 or packed.numel() != -(-size // 8):
        raise CheckpointError(f"{packed.numel()} elements of {packed.dtype} are no packed mask of {size} weights.")
    bits = np.unpackbits(packed.cpu().numpy(), count=size).astype(bool)
    return torch.from_numpy(bits).reshape(tuple(shape))


def save_masks(masks: Mapping[str, Tensor], path: str | Path) -> None:
    """Write masks to a safetensors file, one bit for each weight, whole or not at all.

    Raises CheckpointError, and ConfigError for what are no masks.
    """
    _check_mapping(masks)
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    metadata = {"kind": FORMAT, "shapes": json.dumps(shapes)}
    write_safetensors({name: pack(mask) for name, mask in masks.items()}, path, metadata)


def load_masks(path: str | Path) -> Masks:
    """The masks of a file that `save_masks` wrote. Raises CheckpointError for any other file."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"There is no file of masks {str(path)!r}.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{str(path)!r} is not a whole safetensors file: {error}.") from error
    if metadata.get("kind") != FORMAT:
        raise CheckpointError(f"{str(path)!r} holds no masks: it was not written by save_masks.")
    try:
        shapes = json.loads(metadata["shapes"])
        return {name: unpack(packed[name], shape) for name, shape in shapes.items()}
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{str(path)!r} holds masks that do not agree with their shapes: {error}.") from error


# ------------------------------------------------------------------------------------------------------------------ N:M


def _groups(scores: Tensor, m: int, filling: float) -> Tensor:
    """A weight as rows along its input dimension (the second), in groups of `m`: (rows, groups, m).

    Where `m` does not divide the inputs, `filling` makes up the last group.
    """
    rows = scores.movedim(1, -1).reshape(-1, scores.shape[1])
    return nn.functional.pad(rows, (0, -rows.shape[1] % m), value=filling).unflatten(1, (-1, m))


def n_m_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """A mask that keeps the `n` highest scores of every `m` along the input dimension (the second).

    Of equal scores the first is kept. Where `m` does not divide the inputs, the last group is shorter. Raises
    ConfigError unless 0 < n <= m, and for a weight without an input dimension.
    """
    _check_n_m(n, m, scores)
    groups = _groups(scores, m, -math.inf)
    best = groups.argsort(dim=-1, descending=True, stable=True)[..., :n]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).flatten(1)[:, : scores.shape[1]]
    return mask.reshape(scores.movedim(1, -1).shape).movedim(-1, 1).contiguous()


def follows_n_m(mask: Tensor, n: int, m: int) -> bool:
    """Whether at most `n` of every `m` along the input dimension are kept (or, of a weight, non-zero).

    Raises ConfigError as `n_m_mask` does.
    """
    _check_n_m(n, m, mask)
    return bool((_groups((mask != 0).float(), m, 0.0).sum(-1) <= n).all())


def _check_n_m(n: int, m: int, weight: Tensor) -> None:
    if type(n) is not int or type(m) is not int or not 0 < n <= m:
        raise ConfigError(f"N:M keeps n of every m weights, 0 < n <= m in whole numbers, not {n!r}:{m!r}.")
    if not isinstance(weight, Tensor):
        raise ConfigError(f"N:M is of a weight, its scores or its mask, which are tensors, not {weight!r}.")
    if weight.ndim < 2:
        raise ConfigError(f"N:M is along the inputs of a weight, its second dimension, and this has {weight.ndim}.")
