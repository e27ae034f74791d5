"""Learned positions, for maps of other sizes than they were learned at."""

import torch.nn.functional as F
from torch import Tensor


def resize_table(table: Tensor, height: int, width: int) -> Tensor:
    """A position table, (1, C, H, W), for maps of `height` x `width`: bicubic, and as it is where the size fits."""
    if table.shape[2] == height and table.shape[3] == width:
        return table
    return F.interpolate(table, size=(height, width), mode="bicubic", align_corners=False)
