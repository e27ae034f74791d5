"""Images that are too small for a network, said in words."""

# annotations must be types, not text: fx writes them into the code that it generates

import torch
from torch import Tensor

from zoo.errors import ConfigError


def check_map(x: Tensor, height: int, width: int, needed: str) -> None:
    """Raise ConfigError for a map below `height` x `width`; `needed` says which images do.

    A module that calls this in a forward pass has `torch.fx.wrap("check_map")`, so that fx does not look inside.
    """
    if torch.jit.is_scripting() or torch.jit.is_tracing():
        return
    if x.shape[-2] < height or x.shape[-1] < width:
        raise ConfigError(f"The image is too small: a map of {x.shape[-2]}x{x.shape[-1]} is left of it. {needed}")
