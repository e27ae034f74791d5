"""Convolutions and linear layers for inference: on a CPU through oneDNN with weights in its own layout, activation and
sum included.

`F.conv2d` brings the weights into that layout at every call, which for small maps and batches takes longer than the
convolution; `F.linear` computes without. Where that layout is not to be had (on a GPU, in an exported graph, where
derivatives are asked for, in dtypes that oneDNN lacks) these are plain layers, and so they are for who counts their
operations (`torch.utils.flop_counter.FlopCounterMode`).
"""

from __future__ import annotations

import dataclasses
import operator
import sys
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from zoo.layers.observers import is_exporting, is_observed, is_transformed
from zoo.layers.products import dense

Activation = Literal["none", "relu", "gelu"]
_OPERATORS = torch.ops.mkldnn
_ONEDNN = torch.backends.mkldnn.is_available() and all(
    hasattr(_OPERATORS, op)
    for op in (
        "_convolution_pointwise",
        "_convolution_pointwise_",
        "_reorder_convolution_weight",
        "_linear_pointwise",
        "_reorder_linear_weight",
        "_get_mkldnn_serialized_md",
    )
)
if _ONEDNN:  # looked up at each call they take a third longer to call
    _CONVOLVE, _MULTIPLY = _OPERATORS._convolution_pointwise.default, _OPERATORS._linear_pointwise.default


def may_overwrite(x: Tensor) -> bool:
    """Whether work in place is both allowed and of use: not where it is recorded, nor where derivatives flow."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed():
        return False
    return not needs_gradients(x)


def in_parts(blocks: nn.Module, x: Tensor, owned: bool, hidden_channels: int, hidden_bytes: int) -> Tensor:
    """`blocks(x)` for blocks that write over their input where `may_overwrite` it, on as many samples at a time as the
    cache has room for. (B, C, H, W) -> (B, C, H, W)

    A map that is not `owned` is somebody else's, and copied before. `hidden_channels` are those of the largest map
    within a block, of which `hidden_bytes` are worked on together. What a hook, or a block of somebody's own, makes
    anew is taken.
    """
    if torch.is_grad_enabled() and may_overwrite(x) and any(p.requires_grad for p in blocks.parameters()):
        x = x.detach().requires_grad_()  # which tells the blocks
    if not may_overwrite(x):
        return blocks(x)
    x = x.contiguous(memory_format=torch.channels_last)
    if not owned:
        x = x.clone()
    samples = len(x)
    if x.device.type == "cpu" and x.numel() > 0:
        samples = hidden_bytes // (hidden_channels * x[0, 0].numel() * x.element_size())
    parts = x.split(max(1, samples))
    results = [blocks(part) for part in parts]
    return x if all(map(operator.is_, results, parts)) else torch.cat(results)


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
            return _activate(x, self.act)
        convolve = torch.ops.zoo.packed_conv2d if torch.compiler.is_compiling() else _packed_conv2d
        return convolve(x, self.weight, self.bias, *self._geometry(), self.act)

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """`y + self(x)`, written over `y` where `may_overwrite(y)`."""
        watched = self._forward_hooks or self._forward_pre_hooks
        plain = self.act == "none" and x.dtype == y.dtype and not (watched or needs_gradients(y))
        if plain and self._packs(x):
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
            and x.ndim == 4
            and x.shape[1] == self.in_channels
            and _takes_packed(x, self.weight, self.bias)
        )


class PackedLinear(nn.Linear):
    """`linear`, then an activation. (..., in_features) -> (..., out_features).

    It shares its weights with `linear`. A packed copy of them is kept beside them from the first call on.
    """

    def __init__(self, linear: nn.Linear, act: Activation = "none") -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        fits = x.ndim > 1 and x.shape[-1] == self.in_features
        if not (_ONEDNN and fits and _takes_packed(x, self.weight, self.bias)):
            return _activate(super().forward(x), self.act)
        multiply = torch.ops.zoo.packed_linear if torch.compiler.is_compiling() else _packed_linear
        return multiply(x, self.weight, self.bias, self.act)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.act == "none" else f", act={self.act}")


def is_gelu(module: nn.Module) -> bool:
    """Whether `module` computes the exact GELU."""
    timm = sys.modules.get("timm.layers")  # not imported for this, which takes seconds: no model has its GELU before
    gelus = (nn.GELU, timm.GELU) if timm else (nn.GELU,)
    return type(module) in gelus and getattr(module, "approximate", "none") == "none"


def activation_of(module: nn.Module) -> Activation | None:
    """What a packed layer calls the activation that `module` computes; None for others."""
    if type(module) is nn.ReLU:
        return "relu"
    return "gelu" if is_gelu(module) else None


def _activate(x: Tensor, act: Activation) -> Tensor:
    return x if act == "none" else F.relu(x) if act == "relu" else F.gelu(x)


def _takes_packed(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        x.device.type == weight.device.type == "cpu"
        and type(x) in (Tensor, nn.Parameter)  # not fake, or another's
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and not (needs_gradients(x) or needs_gradients(weight) or (bias is not None and needs_gradients(bias)))
        and not (is_exporting() or is_transformed() or is_observed() or torch.jit.is_tracing())
        and not torch.is_autocast_enabled("cpu")
    )


def needs_gradients(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


# ------------------------------------------------------------------------------------------------------------ operators
# A compiler sees each as one operator, since packed weights can be neither traced nor copied.

_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # weight: _Packed
_SHAPES = 256  # of inputs that are remembered for a weight


@dataclasses.dataclass(frozen=True, slots=True)
class _Packed:
    """A weight as oneDNN wants it. The layout depends on the input's shape and the number of threads; in any other the
    result is right, but the weight changes its layout at every call, which can take many times as long as the rest."""

    memory: StorageWeakRef  # while it is held, no other memory has its number
    state: tuple[int, int, torch.dtype, int]
    by_shape: dict[tuple[int, ...], Tensor]
    by_layout: dict[bytes, Tensor]


def _packed_for(weight: Tensor, shape: tuple[int, ...], pack: Callable[[Tensor], Tensor]) -> Tensor:
    """The weight in the layout that oneDNN chooses for inputs of `shape`; packed anew where the weight changed. Shapes
    that ask for the same layout share one copy."""
    if weight.is_inference():  # which does not count its changes
        return pack(weight)
    memory = weight.untyped_storage()
    state = memory._cdata, weight.data_ptr(), weight.dtype, weight._version
    known = _packed.get(weight)
    if known is None or known.state != state:
        known = _packed[weight] = _Packed(StorageWeakRef(memory), state, {}, {})
    key = (*shape, torch.get_num_threads())
    packed = known.by_shape.get(key)
    if packed is None:
        packed = pack(weight.detach())
        layout = _OPERATORS._get_mkldnn_serialized_md(packed).numpy().tobytes()
        if len(known.by_shape) >= _SHAPES:
            known.by_shape.clear()
        packed = known.by_shape[key] = known.by_layout.setdefault(layout, packed)
    return packed


def _pack_conv2d(weight: Tensor, geometry: tuple[list[int], list[int], list[int], int], shape: torch.Size) -> Tensor:
    return _packed_for(weight, shape, lambda w: _OPERATORS._reorder_convolution_weight(w, *geometry, list(shape)))


def _packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    # of all numbers of rows only a single one changes the layout, and takes as long in that of many
    packed = _packed_for(weight, (), lambda w: _OPERATORS._reorder_linear_weight(w, 64))
    return _MULTIPLY(x, packed, dense(bias), act, [], "none" if act == "gelu" else "")


@torch.library.custom_op(
    "zoo::packed_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, str act) -> Tensor",
)
def _linear_op(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    return _packed_linear(x, weight, bias, act)


@_linear_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _goes_as_one(x: Tensor, weight: Tensor, padding: list[int], stride: list[int], groups: int) -> bool:
    """Whether to take the batch as one image: oneDNN goes through the weights for each, which are too many for a cache
    and, as the maps are small, too much of the work."""
    return (
        len(x) > 1
        and x.shape[2] * x.shape[3] <= 64
        and weight.numel() * weight.element_size() >= 2 * 2**20
        and weight.shape[2:] == (1, 1)
        and groups == 1
        and stride == [1, 1]
        and padding == [0, 0]
    )


def _as_one(x: Tensor) -> Tensor:
    """(B, C, H, W), channels_last -> (1, C, B*H, W), the same memory."""
    return x.permute(0, 2, 3, 1).reshape(1, -1, x.shape[3], x.shape[1]).permute(0, 3, 1, 2)


def _apart(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The way back."""
    B, C, H, W = shape
    return x.permute(0, 2, 3, 1).reshape(B, H, W, C).permute(0, 3, 1, 2)


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
    B, _, H, W = x.shape
    as_one = _goes_as_one(x, weight, padding, stride, groups)
    if as_one:
        x = _as_one(x)
    packed = _pack_conv2d(weight, (padding, stride, dilation, groups), x.shape)
    algorithm = "none" if act == "gelu" else ""
    out = _CONVOLVE(x, packed, dense(bias), padding, stride, dilation, groups, act, [], algorithm)
    return _apart(out, (B, len(weight), H, W)) if as_one else out


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
    """All channels_last."""
    if _goes_as_one(x, weight, padding, stride, groups):
        y, x = _as_one(y), _as_one(x)
    packed = _pack_conv2d(weight, (padding, stride, dilation, groups), x.shape)
    _OPERATORS._convolution_pointwise_(
        y, x, packed, dense(bias), padding, stride, dilation, groups, "add", None, None, [], None
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
    as_one = _goes_as_one(x, weight, padding, stride, groups)
    shape = y.shape
    if as_one:
        x, y = _as_one(x), _as_one(y)
    packed = _pack_conv2d(weight, (padding, stride, dilation, groups), x.shape)
    out = _OPERATORS._convolution_pointwise.binary(
        x, y, packed, dense(bias), padding, stride, dilation, groups, "add", None, None, [], None
    )
    return _apart(out, shape) if as_one else out


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
