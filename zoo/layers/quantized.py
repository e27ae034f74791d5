"""Matrices in 8 and 4 bits: whole numbers, with one float16 scale for a group of a row's elements.

A weight is scale * q, with q from -127 to 127 or from -8 to 7, stored as q + 128 or q + 8. Rows lie interleaved by 16,
so that one vector of the processor holds four elements of each: bytes (rows / 16, cols / 32, 8, 16, 4), where the 8 are
the fours of 32 elements; in 4 bits (rows / 16, cols / 32, 4, 16, 4), where a byte holds the fours j in its lower and
j + 4 in its upper half. Scales are (rows / 16, cols / group, 16). Rows beyond the matrix's are zeros.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.layers import native_step
from zoo.layers.native_step import CMatrix, address
from zoo.layers.observers import is_observed, is_transformed

__all__ = ["BITS", "QuantizedEmbedding", "QuantizedLinear", "quantize_matrix"]

BITS = {"int8": 8, "int4": 4}
ROWS, FOURS = 16, 8
ELEMENTS_AT_ONCE = 2**24  # that are quantised, or brought back, at a time


def quantize_matrix(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """(rows, cols) -> packed bytes and scales, laid out as above."""
    rows, cols = weight.shape
    if weight.is_meta:  # empty, for a checkpoint: PyTorch would go through all steps for their shapes alone
        blocks = -(-rows // ROWS)
        packed = weight.new_empty(blocks, cols // 32, FOURS * bits // 8, ROWS, 4, dtype=torch.uint8)
        return packed, weight.new_empty(blocks, cols // group_size, ROWS, dtype=torch.float16)
    parts: list[tuple[Tensor, Tensor]] = []
    for part in weight.detach().split(max(ROWS, ELEMENTS_AT_ONCE // cols // ROWS * ROWS)):
        whole = F.pad(part.float(), (0, 0, 0, -len(part) % ROWS))
        q, scales = _round_groups(whole.view(len(whole), -1, group_size), bits)
        parts.append((_pack(q.view(len(whole), cols), bits), scales.view(-1, ROWS, cols // group_size).mT.contiguous()))
    return torch.cat([packed for packed, _ in parts]), torch.cat([scales for _, scales in parts])


def _round_groups(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(rows, groups, group) -> whole numbers, and float16 scales (rows, groups)."""
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    largest = groups.abs().amax(-1)
    if bits == 8:
        tried = [largest / 127]
    else:  # one end reaches further than the other; and a few large weights may be cut for the sake of the others
        farthest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0] / -8
        tried = [farthest, *(farthest * (1 - 0.05 * i) for i in range(1, 5)), *(largest / 7 * s for s in (1, 0.9))]
    best_error = torch.full_like(largest, torch.inf)
    best_q, best_scale = torch.zeros_like(groups), torch.zeros_like(largest)
    for scale in tried:
        scale = scale.half().float()
        inverse = torch.where(scale == 0, 0, 1 / scale)
        q = (groups * inverse[..., None]).round_().clamp_(low, high)
        error = (q * scale[..., None] - groups).square_().sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_q = torch.where(better[..., None], q, best_q)
        best_scale = torch.where(better, scale, best_scale)
    return best_q, best_scale.half()


def _pack(q: Tensor, bits: int) -> Tensor:
    """(rows, cols) whole numbers -> bytes."""
    offset = 128 if bits == 8 else 8
    q = (q + offset).to(torch.uint8).view(-1, ROWS, q.shape[1] // 32, FOURS, 4).permute(0, 2, 3, 1, 4)
    return q.contiguous() if bits == 8 else q[:, :, :4] | q[:, :, 4:] << 4


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """(..., fours, 4) bytes, of one row's 32 elements -> (..., 32) float32."""
    if bits == 4:
        packed = torch.cat((packed & 15, packed >> 4), -2)
    return packed.flatten(-2).float() - (128 if bits == 8 else 8)


class QuantizedLinear(nn.Module):
    """x A^T, for A in 8 or 4 bits. (..., in_features) -> (..., out_features).

    On a CPU with the native library `x` is rounded to 8 bits too, by groups of 32, and products are of whole numbers;
    elsewhere the weights are brought back to the dtype of `x`, a part at a time.
    """

    packed: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, bits: int, group_size: int) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bits, self.group_size = bits, group_size
        if self.in_features % group_size:
            raise ConfigError(
                f"group_size must divide the width of every matrix: {group_size} does not go with {self.in_features}."
            )
        packed, scales = quantize_matrix(weight, bits, group_size)
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantizedLinear:
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != torch.float16:  # another dtype is meant for activations
            self.scales = scales.to(self.scales.device)
        return self

    def native_matrix(self) -> CMatrix:
        kind = native_step.INT8 if self.bits == 8 else native_step.INT4
        return CMatrix(
            address(self.packed), address(self.scales), self.out_features, self.in_features, kind, self.group_size
        )

    def dequantize(self, dtype: torch.dtype = torch.float32, rows: slice | None = None) -> Tensor:
        """(out_features, in_features), or the blocks of 16 rows in `rows`, whole."""
        packed, scales = (self.packed, self.scales) if rows is None else (self.packed[rows], self.scales[rows])
        q = _unpack(packed.transpose(2, 3).transpose(1, 2), self.bits)  # (blocks, 16, cols / 32, 32)
        q = q.view(len(q), ROWS, -1, self.group_size) * scales.mT[..., None]
        weight = q.view(-1, self.in_features).to(dtype)
        return weight[: self.out_features] if rows is None else weight

    def linear(self, x: Tensor) -> Tensor:
        native = self._native(x)
        if native is not None:
            flat = x.reshape(-1, self.in_features).float().contiguous()
            y = flat.new_empty(len(flat), self.out_features)
            matrix = self.native_matrix()
            native.zoo_linear(ctypes.byref(matrix), flat.data_ptr(), y.data_ptr(), len(flat), native_step.threads())
            return y.view(*x.shape[:-1], self.out_features).to(x.dtype)
        blocks = max(1, ELEMENTS_AT_ONCE // self.in_features // ROWS)
        parts = [
            F.linear(x, self.dequantize(x.dtype, slice(start, start + blocks)))
            for start in range(0, len(self.packed), blocks)
        ]
        return torch.cat(parts, -1)[..., : self.out_features]

    def _native(self, x: Tensor) -> ctypes.CDLL | None:
        if (
            x.device.type != "cpu"
            or self.packed.device.type != "cpu"
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or is_observed()
            or is_transformed()
            or (torch.is_grad_enabled() and x.requires_grad)
            or x.dtype == torch.float64
        ):
            return None
        return native_step.library()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={self.group_size}"


class QuantizedEmbedding(QuantizedLinear):
    """Rows of the matrix. (...) -> (..., in_features); `linear` is its other use, as a tied head."""

    like: Tensor  # of the dtype that rows have

    def __init__(self, weight: Tensor, bits: int, group_size: int) -> None:
        super().__init__(weight, bits, group_size)
        self.register_buffer("like", weight.new_empty(0), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        block, row = tokens // ROWS, tokens % ROWS
        q = _unpack(self.packed[block, :, :, row], self.bits).flatten(-2)
        scales = self.scales[block, :, row].float()
        return (q.unflatten(-1, (-1, self.group_size)) * scales[..., None]).flatten(-2).to(self.like.dtype)
