"""Convolutions for inference: on a CPU through oneDNN with weights in its own layout, activation and sum included.

`F.conv2d` brings the weights into that layout at every call, which for small maps and batches takes longer than the
convolution. Where that is not to be had (on a GPU, in an exported graph, where gradients are asked for, in dtypes that
oneDNN lacks) these are plain convolutions.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

Activation = Literal["none", "relu", "gelu"]
_OPERATORS = torch.ops.mkldnn
_ONEDNN = torch.backends.mkldnn.is_available() and all(
    hasattr(_OPERATORS, op)
    for op in ("_convolution_pointwise", "_convolution_pointwise_", "_reorder_convolution_weight")
)
if _ONEDNN:
    _CONVOLVE = _OPERATORS._convolution_pointwise.default  # looked up at each call it takes a third longer to call


def may_overwrite(x: Tensor) -> bool:
    """Whether work in place is both allowed and of use: not where it is recorded, nor where gradients flow."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return not _needs_gradients(x)


class PackedConv2d(nn.Conv2d):
    """`conv`, then an activation. (B, in_channels, H, W) -> (B, out_channels, H', W').

    It shares its weights with `conv`. Packed copies of them are kept beside them from the first call on.
    """

    def __init__(self, conv: nn.Conv2d, act: Activation = "none") -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            device="meta",
        )
        self.weight, self.bias = conv.weight, conv.bias
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        if not self._packs(x):
            x = super().forward(x)
            return x if self.act == "none" else F.relu(x) if self.act == "relu" else F.gelu(x)
        convolve = torch.ops.zoo.packed_conv2d if torch.compiler.is_compiling() else _packed_conv2d
        return convolve(x, self.weight, self.bias, *self._geometry(), self.act)

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """`y + self(x)`, written over `y` where `may_overwrite(y)`."""
        if self.act == "none" and x.dtype == y.dtype and self._packs(x) and not _needs_gradients(y):
            arguments = y, x, self.weight, self.bias, *self._geometry()
            if torch.compiler.is_compiling():
                return torch.ops.zoo.packed_conv2d_add(*arguments)
            if may_overwrite(y) and all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, y)):
                _packed_conv2d_add_(*arguments)
                return y
        return y.add_(self(x)) if may_overwrite(y) else y + self(x)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.act == "none" else f", act={self.act}")

    def _geometry(self) -> tuple[list[int], list[int], list[int], int]:
        assert not isinstance(self.padding, str)
        return list(self.padding), list(self.stride), list(self.dilation), self.groups

    def _packs(self, x: Tensor) -> bool:
        return (
            _ONEDNN
            and self.padding_mode == "zeros"
            and not isinstance(self.padding, str)
            and x.device.type == self.weight.device.type == "cpu"
            and x.dtype == self.weight.dtype
            and x.dtype in (torch.float32, torch.bfloat16)
            and x.ndim == 4
            and not (_needs_gradients(x) or _needs_gradients(self.weight))
            and not (torch.compiler.is_exporting() or torch.jit.is_tracing())
            and not torch.is_autocast_enabled("cpu")
        )


def _needs_gradients(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


# ------------------------------------------------------------------------------------------------------------ operators
# A compiler sees these as two operators, since packed weights can be neither traced nor copied.

_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # weight: (its state, itself as oneDNN wants it)


def _pack(weight: Tensor, geometry: tuple[list[int], list[int], list[int], int], shape: torch.Size) -> Tensor:
    """The weight in the layout that oneDNN chooses for its first input; packed anew where the weight changed."""
    state = weight.data_ptr(), weight.dtype, 0 if weight.is_inference() else weight._version
    known = _packed.get(weight)
    if known is None or known[0] != state:
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight.detach(), *geometry, list(shape))
        known = _packed[weight] = state, packed
    return known[1]


def _packed_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: list[int],
    stride: list[int],
    dilation: list[int],
    groups: int,
    act: str,
) -> Tensor:
    packed = _pack(weight, (padding, stride, dilation, groups), x.shape)
    algorithm = "none" if act == "gelu" else ""
    return _CONVOLVE(x, packed, bias, padding, stride, dilation, groups, act, [], algorithm)


def _packed_conv2d_add_(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: list[int],
    stride: list[int],
    dilation: list[int],
    groups: int,
) -> None:
    packed = _pack(weight, (padding, stride, dilation, groups), x.shape)
    torch.ops.mkldnn._convolution_pointwise_(
        y, x, packed, bias, padding, stride, dilation, groups, "add", None, None, [], None
    )


@torch.library.custom_op(
    "zoo::packed_conv2d",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, int[] padding, int[] stride, int[] dilation, int groups, str act)"
    " -> Tensor",
)
def _conv2d_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: list[int],
    stride: list[int],
    dilation: list[int],
    groups: int,
    act: str,
) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    return _packed_conv2d(x, weight, bias, padding, stride, dilation, groups, act)


@_conv2d_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: list[int],
    stride: list[int],
    dilation: list[int],
    groups: int,
    act: str,
) -> Tensor:
    size = [
        (x.shape[i + 2] + 2 * padding[i] - dilation[i] * (weight.shape[i + 2] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    return x.new_empty(x.shape[0], weight.shape[0], *size).contiguous(memory_format=torch.channels_last)


@torch.library.custom_op(
    "zoo::packed_conv2d_add",
    mutates_args=(),
    schema="(Tensor y, Tensor x, Tensor weight, Tensor? bias, int[] padding, int[] stride, int[] dilation, int groups)"
    " -> Tensor",
)
def _conv2d_add_op(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: list[int],
    stride: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    x, y = (t.contiguous(memory_format=torch.channels_last) for t in (x, y))
    packed = _pack(weight, (padding, stride, dilation, groups), x.shape)
    return torch.ops.mkldnn._convolution_pointwise.binary(
        x, y, packed, bias, padding, stride, dilation, groups, "add", None, None, [], None
    )


@_conv2d_add_op.register_fake
def _(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: list[int],
    stride: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    return torch.empty_like(y, memory_format=torch.channels_last)
