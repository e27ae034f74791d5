"""Faster linear layers and pointwise convolutions in training on a CPU: their matrix products by oneDNN or MKL.

PyTorch multiplies float32 matrices with MKL, Intel's library, and computes most convolutions with oneDNN. On Intel's
processors MKL is the faster for 1x1 convolutions, too. On others oneDNN's products are faster for both, which PyTorch
keeps for layers packed for inference. `benchmarks/train_step.py` says what that brings.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zoo.layers.observers import is_batched, is_observed, is_saved_by_hooks, is_transformed

__all__ = ["AVAILABLE", "FastProducts", "multiply", "multiply_long", "rows_of"]

AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
SMALLEST = 2**20  # multiplications: below, calling takes longer than what is gained
TURNED = 2**21  # values of a gradient: above, it does not stay in the cache until it is turned


def _is_intels() -> bool:
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        told = platform.processor()
    return "GenuineIntel" in told


# by its maker, and not by time: a run that goes on must compute as it did
_MKL_IS_FASTER = torch.backends.mkl.is_available() and _is_intels()


class FastProducts(TorchFunctionMode):
    """Within it, `F.linear`, and of few images 1x1 `F.conv2d`, are differentiable products by a faster library.

    That is oneDNN; on Intel's processors `F.linear` stays what it is, and 1x1 `F.conv2d` of any number of images
    becomes it.

    Equal to PyTorch's up to rounding; 1x1 kernels with a stride, where PyTorch's gradient writes over other memory, are
    computed without. All else is computed as ever: other devices and dtypes, autocast, small layers,
    compiled, traced or transformed code, tensors of other types, and what somebody's hooks save, as in checkpointed
    layers, which run again outside.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if not kwargs:
            if func is F.linear and not _MKL_IS_FASTER and _suits(args[0], args[1], -1):
                return linear(*args)
            if func is F.conv2d and (stride := _pointwise_stride(*args)):
                if stride == (1, 1) and _gains(args[0]) and _suits(args[0], args[1], 1):
                    return pointwise_conv2d(*args[:3])
                if stride != (1, 1) and _overruns(args[0], args[1]):
                    return F.conv2d(args[0][:, :, :: stride[0], :: stride[1]], *args[1:3])
        return func(*args, **(kwargs or {}))


def _suits(x: Tensor, weight: Tensor, axis: int) -> bool:
    return (
        AVAILABLE
        and weight.ndim > 1
        and x.ndim > 0
        and x.shape[axis] == weight.shape[1] > 0
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and weight.requires_grad
        and torch.is_grad_enabled()
        and x.numel() // weight.shape[1] * weight.numel() >= SMALLEST
        and not torch.is_autocast_enabled("cpu")
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed() or is_saved_by_hooks())
    )


def _pointwise_stride(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[int, int] | None:
    """That of 1x1 kernels on maps, in one group and without padding; None for other convolutions."""
    if weight.shape[2:] != (1, 1) or groups != 1 or padding not in (0, (0, 0)) or x.ndim != 4:
        return None
    return (stride, stride) if isinstance(stride, int) else tuple(stride)


def _gains(x: Tensor) -> bool:
    """Whether a 1x1 convolution of `x` is faster as a linear layer: else PyTorch takes oneDNN's convolution, which is
    as fast as its product, or maps would have to be turned."""
    return (_MKL_IS_FASTER or len(x) < 16) and x.is_contiguous(memory_format=torch.channels_last)


def _overruns(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch (2.11 to 2.14) would write the gradient beyond its memory: of 1x1 kernels with a stride on a CPU,
    with 2 to 15 channels in channels_last, on maps about 100 wide. The same without a stride is right."""
    return (
        1 < weight.shape[1] < 16
        and x.device.type == "cpu"
        and weight.requires_grad
        and torch.is_grad_enabled()
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`. (..., in_features) -> (..., out_features)"""
    if _MKL_IS_FASTER:
        return F.linear(x, weight, bias)
    y = _Linear.apply(rows_of(x), weight, bias)
    return y if x.ndim == 2 else y.unflatten(0, x.shape[:-1])  # not within it, whose views must not be written over


def pointwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.conv2d` by 1x1 kernels. (B, C, H, W) -> (B, C', H, W), both in channels_last."""
    return linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


class _Linear(torch.autograd.Function):
    """(R, C) -> (R, C')"""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return multiply(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        x, weight, _ = inputs
        # as PyTorch does: what no gradient needs may change before the backward pass
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        # to be differentiated once more, or many gradients at once: neither is for oneDNN's product
        again = torch.is_grad_enabled() or is_batched(grad)
        grad = grad.contiguous()
        to_x = to_weight = None
        if of_x:
            to_x = grad @ weight if again else multiply(grad, weight.t())
        if of_weight:
            to_weight = grad.t() @ x if again else multiply_long(grad, x)
        return to_x, to_weight, grad.sum(dim=0) if of_bias else None


def rows_of(x: Tensor) -> Tensor:
    """(..., C) -> (R, C), contiguous"""
    return x.reshape(-1, x.shape[-1]).contiguous()


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` by the faster library, not differentiable. (R, C), (C', C), (C',) -> (R, C')"""
    if _MKL_IS_FASTER or is_observed():
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, dense(bias), "none", [], "")


def dense(bias: Tensor | None) -> Tensor | None:
    """`bias` with its values side by side, as oneDNN reads them whatever the strides."""
    return None if bias is None else bias.contiguous()


def multiply_long(grads: Tensor, rows: Tensor) -> Tensor:
    """`grads.t() @ rows`, a sum over many rows: (R, N), (R, K) -> (N, K)."""
    if _MKL_IS_FASTER or is_observed():
        return grads.t() @ rows
    wide, narrow = grads.shape[1], rows.shape[1]
    # oneDNN is up to three times as fast where the longer edge comes last; but a large gradient takes long to turn
    if wide > narrow and wide * narrow < TURNED:
        return multiply(rows.t(), grads.t()).t()
    return multiply(grads.t(), rows.t())
