"""MixToken: two images in one map of tokens. Jiang et al. 2021, arXiv 2104.10858, section 3."""

# annotations must be types, not text: fx writes them into the code that it generates

from torch import Tensor


def exchange_tokens(x: Tensor, exchanged: Tensor, stride: int) -> Tensor:
    """Maps (B, C, H, W), of which image i has the places that `exchanged` marks from image B - 1 - i.

    `exchanged` (h, w), bool, is as coarse as the last map of the network: one place is `stride` x `stride` of `x`.
    """
    marked = exchanged.repeat_interleave(stride, 0).repeat_interleave(stride, 1)[: x.shape[2], : x.shape[3]]
    return x.flip(0).where(marked, x)
