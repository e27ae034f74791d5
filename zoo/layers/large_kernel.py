"""Depthwise convolution with large kernels, in the fastest exact way for the shape, the layout and the device.

The operator of SLaK (https://arxiv.org/abs/2207.03620, section 3) and of RepLKNet (https://arxiv.org/abs/2203.06717):
kernels of dozens of taps a side, "same" zero padding, stride 1. What it chooses between computes the same sums:

- taps that can only meet the padding are cut off (a map of 14x14 uses 27 of 47 taps);
- on a CPU, the layout, the orientation and the padding with which oneDNN's convolution is fast, or an FFT;
- the weight gradient on a CPU as one more depthwise convolution, with the output's gradient for a kernel, instead of
  PyTorch's, which takes 10 to 60 times as long; as a banded matrix product in float64, which oneDNN does not take;
- on CUDA, the kernels of `zoo.layers.large_kernel_triton`.

An FFT mixes all pixels of a channel of an image: an infinity or NaN anywhere spreads over the whole channel, and next
to a huge outlier (1e6) the others lose digits (errors of some 1e-3 in float32), where `F.conv2d` keeps them apart. It
is chosen for whole kernels such as 51x51 on maps of some size, not for tall and wide ones.

Traces and exported programs hold plain convolutions. The choices were measured on a CPU with AVX-512:
benchmarks/large_kernel.py, benchmarks/results/large_kernel.json.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError
from zoo.layers import large_kernel_triton
from zoo.layers.large_kernel_triton import crop
from zoo.layers.observers import is_batched, is_exporting, is_transformed


@torch.fx.wrap
def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve every channel with its own kernel: (B, C, H, W), (C, 1, kh, kw)[, (C)] -> (B, C, H, W).

    As `F.conv2d(x, weight, bias, padding=(kh // 2, kw // 2), groups=C)`, which computes the cross-correlation: under
    autocast it computes in the lower precision, as that does. Differentiable twice and more; `torch.func` and forward
    mode get that very convolution. On a CPU the result has the memory format of `x`.

    Raises ConfigError for shapes that do not fit and for even kernels; scripted, it does not check.
    """
    if torch.jit.is_scripting():
        return _convolve(x, crop(weight, x.shape[2], x.shape[3]), bias, x.dtype in (torch.float32, torch.bfloat16))
    else:
        return _choose(x, [weight], bias)


@torch.fx.wrap
def large_kernel_sum(
    x: Tensor, tall: Tensor | None, wide: Tensor | None, small: Tensor | None, bias: Tensor | None = None
) -> Tensor:
    """The sum of up to three depthwise convolutions of `x`, of which any may be None: (B, C, H, W) -> (B, C, H, W).

    The weights are (C, 1, kh, kw) with odd edges; `bias` (C) is added once. Kernels that lie within another are added
    to it first. Raises ConfigError as `depthwise_conv2d`, and where there is no weight.
    """
    weights: list[Tensor] = []
    for weight in (tall, wide, small):
        if weight is not None:
            weights.append(weight)
    if torch.jit.is_scripting():
        fast = x.dtype in (torch.float32, torch.bfloat16)
        weights = _merge([crop(weight, x.shape[2], x.shape[3]) for weight in weights])
        total = _convolve(x, weights[0], bias, fast)
        for weight in weights[1:]:
            total = total + _convolve(x, weight, None, fast)
        return total
    else:
        if not weights:
            raise ConfigError("large_kernel_sum needs at least one weight: tall, wide or small.")
        return _choose(x, weights, bias)


def _choose(x: Tensor, weights: list[Tensor], bias: Tensor | None) -> Tensor:
    """The sum of the convolutions of `x` with `weights`, by the way that suits the device and who is looking."""
    if torch.jit.is_tracing():
        return _plain(x, weights, bias)
    if x.is_complex():  # whose derivatives are other ones
        return _plain(x, weights, bias)
    if is_transformed():
        return _plain(x, weights, bias)
    for weight in weights:
        _check(x, weight, bias)
    if x.is_meta:  # costs are those of the convolutions as they stand
        return _plain(x, weights, bias)
    height, width = x.shape[2:]
    if is_exporting():
        # sizes that are plain numbers will not change, others must not be asked
        if type(height) is int and type(width) is int and not torch.compiler.is_dynamo_compiling():
            weights = [crop(weight, height, width) for weight in weights]
        return _plain(x, weights, bias)
    if large_kernel_triton.is_available(x):
        if _longest(weights) > large_kernel_triton.MAX_EDGE:  # else it crops without a copy
            weights = [crop(weight, height, width) for weight in weights]
        if _longest(weights) > large_kernel_triton.MAX_EDGE:
            return _plain(x, weights, bias)
        return large_kernel_triton.depthwise_conv2d(x, weights, bias)
    if not x.is_cpu:
        return _plain(x, weights, bias)
    weights = _merge([crop(weight, height, width) for weight in weights])
    if torch.is_autocast_enabled("cpu"):
        x, weights = _lowered(x), [_lowered(weight) for weight in weights]
        bias = None if bias is None else _lowered(bias)
    with_gradients = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, *weights))
    if with_gradients or torch.compiler.is_compiling():
        convolve = _depthwise if torch.compiler.is_compiling() else _Depthwise.apply
        total = convolve(x, weights[0], bias)
        for weight in weights[1:]:
            total = total + convolve(x, weight, None)
        return total
    fast = _has_fast_convolution(x.dtype)
    total = _convolve(x, weights[0], bias, fast)
    for weight in weights[1:]:
        total = total + _convolve(x, weight, None, fast)
    return total


def _longest(weights: list[Tensor]) -> int:
    return max(max(weight.shape[2:]) for weight in weights)


def _lowered(tensor: Tensor) -> Tensor:
    """As CPU autocast casts what a convolution takes."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.get_autocast_dtype("cpu"))


def _plain(x: Tensor, weights: list[Tensor], bias: Tensor | None) -> Tensor:
    total = _conv2d(x, weights[0], bias)
    for weight in weights[1:]:
        total = total + _conv2d(x, weight, None)
    return total


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    padding = [weight.shape[2] // 2, weight.shape[3] // 2]
    return F.conv2d(x, weight, bias, padding=padding, groups=weight.shape[0])


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[0] != x.shape[1] or weight.shape[1] != 1:
        raise ConfigError(
            f"A depthwise convolution takes x (B, C, H, W) and weight (C, 1, kh, kw), not {tuple(x.shape)} and "
            f"{tuple(weight.shape)}."
        )
    _check_odd(weight.shape[2], weight.shape[3])
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ConfigError(f"{weight.shape[0]} channels take a bias of that many numbers, not {tuple(bias.shape)}.")
    dtypes = {tensor.dtype for tensor in (x, weight, bias) if tensor is not None}
    if len(dtypes) > 1 and (x.is_meta or not torch.is_autocast_enabled(x.device.type)):
        kinds = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ConfigError(f"Maps, kernels and bias have one dtype outside of autocast, not {kinds}.")


def _check_odd(height: int, width: int) -> None:
    if height % 2 == 0 or width % 2 == 0:
        raise ConfigError(f"Both edges of the kernel must be odd, not {height}x{width}: padding keeps the size then.")


# --------------------------------------------------------------------------------------------------------------------
# Fewer taps


def _merge(weights: list[Tensor]) -> list[Tensor]:
    """The kernels that lie within another one added to its centre: convolution is linear in its kernel."""
    merged: list[Tensor] = []
    for weight in weights:
        apart = True
        for i in range(len(merged)):
            rows, columns = merged[i].shape[2] - weight.shape[2], merged[i].shape[3] - weight.shape[3]
            if apart and rows * columns >= 0:  # one lies within the other
                larger, smaller = (merged[i], weight) if rows >= 0 and columns >= 0 else (weight, merged[i])
                rows, columns = abs(rows) // 2, abs(columns) // 2
                merged[i] = larger + F.pad(smaller, [columns, columns, rows, rows])
                apart = False
        if apart:
            merged.append(weight)
    return merged


# --------------------------------------------------------------------------------------------------------------------
# One convolution on a CPU


# asked once, as torch.compile does not trace the asking
_FAST_TYPES = [torch.float32] if torch.backends.mkldnn.is_available() else []
if _FAST_TYPES and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    _FAST_TYPES.append(torch.bfloat16)


def _has_fast_convolution(dtype: torch.dtype) -> bool:
    """Whether oneDNN convolves this type here; what PyTorch does itself is slow for every large kernel."""
    return dtype in _FAST_TYPES


def _in_channels_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and not x.is_contiguous()


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, fast: bool) -> Tensor:
    """The convolution of a cropped kernel, by the measured best of the exact ways."""
    if x.numel() == 0:
        return _conv2d(x, weight, bias)
    channels_last = _in_channels_last(x)
    if channels_last and len(x) == 1 and x.stride(0) == 0:  # as compiled code holds one image: PyTorch would take NCHW
        x = x.as_strided(x.shape, [x[0].numel(), 1, x.stride(2), x.stride(3)])
    if x.is_floating_point() and _fourier_wins(x.shape[2], x.shape[3], weight.shape[2], weight.shape[3]):
        y = _convolve_by_fourier(x, weight, bias)
    elif not fast:  # PyTorch's own convolution takes 2 to 10 times as long in channels_last
        y = _conv2d(x.contiguous(), weight, bias)
    else:
        y = _correlate(x, weight, bias, weight.shape[2] // 2, weight.shape[3] // 2)
    return y.contiguous(memory_format=torch.channels_last) if channels_last else y.contiguous()


def _correlate(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, columns: int) -> Tensor:
    """`F.conv2d` with a padding of `rows` and `columns` in the form that oneDNN is fast in."""
    groups = weight.shape[0]
    # with avx512_bf16, oneDNN's channels_last kernel of 2 to 16 channels never comes back from 15 columns and more
    hangs = x.dtype == torch.bfloat16 and 1 < groups <= 16 and weight.shape[3] > 9  # 11 would become 15
    if _in_channels_last(x) and not hangs:
        # from 11 to 13 wide, oneDNN's channels_last kernel takes 2 to 3 times as long as at 15: two columns of zeros
        extra = (15 - weight.shape[3]) // 2 if 11 <= weight.shape[3] <= 13 else 0
        if extra > 0:
            weight, columns = F.pad(weight, [extra, extra]), columns + extra
        return F.conv2d(x, weight, bias, padding=[rows, columns], groups=groups)
    # in NCHW, oneDNN is fast (5 to 45 times) where at most 6 columns are padded on the left: the rest is padded here,
    # unless the map can be turned so that fewer are
    if columns > 6 and rows <= 6:
        x, weight = x.transpose(2, 3).contiguous(), weight.transpose(2, 3).contiguous()
        return F.conv2d(x, weight, bias, padding=[columns, rows], groups=groups).transpose(2, 3)
    if columns > 6:
        x, columns = F.pad(x, [columns - 6, columns - 6]), 6
    return F.conv2d(x.contiguous(), weight, bias, padding=[rows, columns], groups=groups)


# --------------------------------------------------------------------------------------------------------------------
# By FFT


def _fast_length(length: int) -> int:
    """The next even length that has no prime factor above 5."""
    length += length % 2
    while _without_small_factors(length) > 1:
        length += 2
    return length


def _without_small_factors(number: int) -> int:
    for prime in (2, 3, 5):
        while number % prime == 0:
            number = number // prime
    return number


def _fourier_wins(height: int, width: int, rows: int, columns: int) -> bool:
    """Whether transforming takes less time than multiplying: measured, when it saves 250 products a coefficient."""
    taps_meeting_the_map = _meetings(height, rows) * _meetings(width, columns)
    return taps_meeting_the_map > 250 * _fast_length(height + rows // 2) * _fast_length(width + columns // 2)


def _meetings(size: int, taps: int) -> int:
    """How often a tap meets a pixel, over all positions along one axis, of taps <= 2 * size - 1."""
    return size * taps - (taps // 2) * (taps // 2 + 1)


def _convolve_by_fourier(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As one circular convolution: a period of size + taps // 2 keeps the pixels that are wanted free of wrapping."""
    height, width = x.shape[2], x.shape[3]
    rows, columns = weight.shape[2], weight.shape[3]
    period = [_fast_length(height + rows // 2), _fast_length(width + columns // 2)]
    wide = torch.promote_types(x.dtype, torch.float32)  # float64 stays: its convolution is the slowest of all
    kernel = F.pad(weight[:, 0].to(wide), [0, period[1] - columns, 0, period[0] - rows])
    spectrum = torch.fft.rfft2(kernel.roll([-(rows // 2), -(columns // 2)], [1, 2])).conj()
    # image by image, since the spectra of a batch do not fit into the cache
    y = torch.stack(
        [torch.fft.irfft2(torch.fft.rfft2(image.to(wide), period) * spectrum, period) for image in x.unbind(0)]
    )
    y = y[:, :, :height, :width].to(x.dtype)
    return y if bias is None else y + bias[:, None, None]


def _weight_grad_by_fourier(x: Tensor, grad: Tensor, rows: int, columns: int) -> Tensor:
    period = [_fast_length(x.shape[2] + rows // 2), _fast_length(x.shape[3] + columns // 2)]
    spectrum = torch.zeros(1)
    for image, image_grad in zip(x, grad, strict=True):
        product = torch.fft.rfft2(image.float(), period) * torch.fft.rfft2(image_grad.float(), period).conj()
        spectrum = product + spectrum
    found = torch.fft.irfft2(spectrum, period).roll([rows // 2, columns // 2], [1, 2])
    return found[:, None, :rows, :columns].to(x.dtype)


# --------------------------------------------------------------------------------------------------------------------
# With gradients: two functions whose derivatives are one another, so that every order exists. Compiled, they are
# operators, opaque to torch.compile, because what they choose depends on strides that it may change; called one by one,
# those take longer than the functions.


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with _in_its_own_type():
        y = _convolve(x, weight, bias, _has_fast_convolution(x.dtype))
    return y.clone() if y is x or y._is_view() else y  # for the caller to write over


def _in_its_own_type() -> contextlib.AbstractContextManager[Any]:
    """`_choose` has cast what autocast casts; a backward pass may be in one that the forward was not in."""
    return torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else contextlib.nullcontext()


def _weight_gradient(x: Tensor, grad: Tensor, rows: int, columns: int) -> Tensor:
    """The gradient of a kernel of rows x columns: (B, C, H, W) twice -> (C, 1, rows, columns)"""
    if x.numel() == 0:
        return x.new_zeros(x.shape[1], 1, rows, columns)
    with _in_its_own_type():
        if not _has_fast_convolution(x.dtype):
            return _weight_grad_as_matmul(x, grad, rows, columns)
        if _fourier_wins(x.shape[2], x.shape[3], rows, columns):
            return _weight_grad_by_fourier(x, grad, rows, columns)
        return _weight_grad_as_convolution(x, grad, rows, columns)


_depthwise = torch.library.custom_op("zoo::depthwise_conv2d", _convolved, mutates_args=())
_weight_grad = torch.library.custom_op("zoo::depthwise_conv2d_weight_grad", _weight_gradient, mutates_args=())


@_depthwise.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    memory_format = torch.channels_last if _in_channels_last(x) else torch.contiguous_format
    return torch.empty_like(x, memory_format=memory_format)


@_weight_grad.register_fake
def _(x: Tensor, grad: Tensor, rows: int, columns: int) -> Tensor:
    return x.new_empty(x.shape[1], 1, rows, columns)


def _save_both(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _depthwise_backward(
    ctx: Any,
    grad: Tensor,
    convolve: Callable[..., Tensor] = _depthwise,
    weight_grad: Callable[..., Tensor] = _weight_grad,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    for_x, for_weight, for_bias = ctx.needs_input_grad
    return (
        convolve(grad, weight.flip(2, 3), None) if for_x else None,
        weight_grad(x, grad, weight.shape[2], weight.shape[3]) if for_weight else None,
        grad.sum((0, 2, 3)) if for_bias else None,
    )


def _weight_grad_backward(
    ctx: Any, grad_of_grad: Tensor, convolve: Callable[..., Tensor] = _depthwise
) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, grad = ctx.saved_tensors
    for_x = convolve(grad, grad_of_grad.flip(2, 3), None) if ctx.needs_input_grad[0] else None
    for_grad = convolve(x, grad_of_grad, None) if ctx.needs_input_grad[1] else None
    return for_x, for_grad, None, None


_depthwise.register_autograd(_depthwise_backward, setup_context=_save_both)
_weight_grad.register_autograd(_weight_grad_backward, setup_context=_save_both)


class _Depthwise(torch.autograd.Function):
    forward, setup_context = staticmethod(_convolved), staticmethod(_save_both)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if torch.compiler.is_compiling() or is_batched(grad):  # for which operators are repeated
            return _depthwise_backward(ctx, grad)
        return _depthwise_backward(ctx, grad, _Depthwise.apply, _WeightGrad.apply)


class _WeightGrad(torch.autograd.Function):
    forward, setup_context = staticmethod(_weight_gradient), staticmethod(_save_both)

    @staticmethod
    def backward(ctx: Any, grad_of_grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        by_operators = torch.compiler.is_compiling() or is_batched(grad_of_grad)
        return _weight_grad_backward(ctx, grad_of_grad, _depthwise if by_operators else _Depthwise.apply)


def _weight_grad_as_convolution(x: Tensor, grad: Tensor, rows: int, columns: int) -> Tensor:
    """Every image of every channel is convolved with the output's gradient, as large as the image, for a kernel."""
    batch, channels, height, width = x.shape
    turned = columns > rows  # so that few columns are padded: see _correlate
    if turned:
        x, grad, rows, columns, height, width = x.mT, grad.mT, columns, rows, width, height
    x = x.contiguous().view(1, batch * channels, height, width)
    grad = grad.contiguous().view(batch * channels, 1, height, width)
    found = _correlate(x, grad, None, rows // 2, columns // 2)
    found = found.reshape(batch, channels, rows, columns).sum(0).unsqueeze(1)
    return found.mT.contiguous() if turned else found


def _weight_grad_as_matmul(x: Tensor, grad: Tensor, rows: int, columns: int) -> Tensor:
    """For each column of the kernel, products of the rows of `grad` with those of `x`; diagonals of them are its taps.

    Only the band of the |rows // 2| diagonals is of use, but a matrix product is faster than what takes only it.
    """
    turned = columns > rows
    if turned:
        x, grad, rows, columns = x.mT, grad.mT, columns, rows
    batch, channels, height, width = x.shape
    side = columns // 2
    # the rows of all images side by side, as far apart as the padding: (C, H, B * stride) and (C, B * stride + ..., H)
    stride = width + columns - 1
    of_grad = F.pad(grad, [0, columns - 1]).permute(1, 2, 0, 3).reshape(channels, height, batch * stride)
    of_x = F.pad(x, [side, columns - 1 - side]).permute(1, 0, 3, 2).reshape(channels, batch * stride, height)
    of_x = F.pad(of_x, [0, 0, 0, columns - 1])
    products = torch.stack([of_grad @ of_x[:, j : j + batch * stride] for j in range(columns)], 1)
    # tap k is the sum of products[h, h + k - rows // 2]: with the rows padded, a diagonal of constant stride
    products = F.pad(products, [rows // 2, rows // 2]).contiguous()
    across = height + rows - 1
    diagonals = products.as_strided(
        [channels, columns, rows, height], [columns * height * across, height * across, 1, across + 1]
    )
    found = diagonals.sum(3)  # (C, columns, rows)
    return (found if turned else found.mT).unsqueeze(1).contiguous()
