"""Depthwise convolution with large kernels on NVIDIA GPUs, in Triton.

The operator of SLaK (https://arxiv.org/abs/2207.03620, section 3).

F.conv2d spends a multiply-add of the ordinary cores on every tap of every position. At SLaK's first stage (batch 64,
124 channels, 56x56, 51x5 + 5x51) that is 25 GFLOP: 0.38 ms on an H200 (67 TFLOP/s in float32), where reading and
writing the map takes 0.041 ms in float32 and 0.021 ms in bfloat16 (4.8 TB/s). So the work goes to tensor cores:

- A kernel's line along its long axis is a banded (Toeplitz) matrix between input rows and output rows. A tall 51x5
  kernel is the sum, over its 5 columns, of such a matrix times the map shifted sideways by up to 2; a wide one the same
  with the axes exchanged. `band_program` does both in one pass over the map, a smaller kernel within one of the two
  added to it. Where a map fits into a tile and lines are few, it makes the matrices itself and holds them for all its
  images; the tile is copied in the order and type in which products take it, so that each shift of it goes from the
  first-level cache to registers, and shared memory serves the matrices alone. Else `matrix_program` lays the matrices
  out first.
- Maps of at most 64 positions (SLaK's last stage), and of 256 where matrices are not held, take one matrix between all
  positions: `map_program`.
- The gradient by the map is the same with the kernels turned by 180 degrees. The gradient by a kernel is (shifted map)
  @ (gradient)^T, of which every diagonal is summed: `weight_program`, and `map_weight_program` for the smallest maps.

The least times in ms of SLaK's stages, forward, batch 64, on an H200, of the best form of each: of the bytes, of the
products (16-bit tensor cores: 990 TFLOP/s), of what passes the first-level cache and shared memory (128 bytes a cycle
of each multiprocessor), and of the instructions (`python benchmarks/large_kernel_code.py`):

| stage | map, kernel | bytes: float32, 16 bits | products | near memory: float32, 16 bits | instructions: the same |
| --- | --- | --- | --- | --- | --- |
| 1 | 124 x 56x56, 51 | 0.041, 0.021 | 0.042 | 0.064, 0.058 | 0.023, 0.019 |
| 2 | 249 x 28x28, 49 | 0.021, 0.010 | 0.011 | 0.027, 0.022 | 0.013, 0.010 |
| 3 | 499 x 14x14, 47 | 0.010, 0.005 | 0.003 | 0.011, 0.009 | 0.008, 0.006 |
| 4 | 998 x 7x7, 13 | 0.005, 0.003 | 0.001 | 0.005, 0.004 | 0.005, 0.004 |

So in float32 nothing forbids half the bandwidth, twice the time of the bytes; for 16 bits the products and near memory
do at stage 1, near memory does at stage 2, and little room is left at stages 3 and 4. Not counted: the copies' way
through the second-level cache, about as many bytes as the map's. None of it has been timed yet:
benchmarks/large_kernel.py.

Precision: all sums are in float32. bfloat16 and float16 are multiplied as they are; a kernel is rounded to the map's
type once, after smaller ones were added. Where `torch.backends.cudnn` allows TF32 for convolutions (PyTorch's default),
float32 is rounded to the 11 bits of TF32, in bands as float16 scaled by a power of two for each image, which tensor
cores multiply twice as fast; where it does not, three such products keep 21 bits, less what tensor cores cut off as
they add. Since zeros of the matrices are multiplied too, an infinity or NaN spreads over its map.

Maps in channels_last are copied to NCHW and back. The first call for a kernel, tile size and type compiles and times a
few forms, which cannot be captured in a CUDA graph; set TRITON_CACHE_AUTOTUNING=1 to keep the choice.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import shutil
import sysconfig
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.errors import ConfigError

MAX_EDGE = 63  # of a kernel
_PRECISIONS = {0: "tf32", 1: "tf32", 3: "tf32x3"}  # of products of float32 where they are not taken as 16-bit ones
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INSTALLED = importlib.util.find_spec("triton") is not None
_INTERPRETED = _INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"


def is_available(x: Tensor) -> bool:
    """Whether these functions take `x`: Triton is there, `x` of 16 or 32 bits is on an NVIDIA GPU, Ampere or later.

    And it has fewer than 2^31 elements, which offsets of 32 bits reach, and Triton finds the C compiler that it needs.
    Under Triton's interpreter (`TRITON_INTERPRET=1`) tensors of the CPU count, too.
    """
    if not _INSTALLED or x.dtype not in _DTYPES or x.numel() >= 2**31:
        return False
    return _INTERPRETED or (x.is_cuda and _is_suitable(x.device.index))


@torch.compiler.assume_constant_result
def _is_suitable(device: int | None) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0) and _can_build()


@functools.cache
def _can_build() -> bool:
    """Whether there is what Triton builds its launchers with; where not, a warning says so once."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_path("include"), "Python.h")
    missing = [] if compiler else ["a C compiler (gcc)"]
    missing += [] if header.is_file() else [f"Python's header files ({header})"]
    if missing:
        warnings.warn(
            f"Large kernels run as F.conv2d, which takes several times as long: Triton needs {' and '.join(missing)}.",
            stacklevel=2,
        )
    return not missing


def depthwise_conv2d(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
    """The sum of depthwise convolutions of `x` in one pass: (B, C, H, W) -> (B, C, H, W), in `x`'s memory format.

    Each of `weights` is (C, 1, kh, kw) with odd edges up to 63, `bias` is (C). Zero padding keeps the size. Under
    autocast everything is cast as `F.conv2d` casts it. Raises ConfigError for other shapes, and where
    `is_available(x)` is false.
    """
    _check(x, weights, bias)
    if not is_available(x):
        raise ConfigError(
            "The Triton kernels need an NVIDIA GPU since Ampere and fewer than 2^31 elements of float32, bfloat16 or "
            f"float16, not {x.numel()} of {x.dtype} on {x.device}: use zoo.layers.large_kernel, which falls back."
        )
    tall, wide, small = _merge(weights)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    y = _bands(x.contiguous(), tall, wide, small, None if bias is None else bias.contiguous())
    return y.contiguous(memory_format=torch.channels_last) if channels_last else y


def _check(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> None:
    if not weights:
        raise ConfigError("A convolution needs at least one kernel.")
    if x.ndim != 4:
        raise ConfigError(f"A depthwise convolution takes x (B, C, H, W), not {tuple(x.shape)}.")
    for weight in weights:
        shape = tuple(weight.shape)
        if len(shape) != 4 or shape[:2] != (x.shape[1], 1) or not all(e % 2 and e <= MAX_EDGE for e in shape[2:]):
            raise ConfigError(
                f"The kernels of x {tuple(x.shape)} must be ({x.shape[1]}, 1, kh, kw) with odd edges up to {MAX_EDGE}, "
                f"not {shape}."
            )
    if bias is not None and bias.shape != (x.shape[1],):
        raise ConfigError(f"The bias of {x.shape[1]} channels must be ({x.shape[1]},), not {tuple(bias.shape)}.")


def _merge(weights: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """At most one tall, one wide and one small kernel whose convolutions have the same sum.

    The small one lies within the tall one or, where there is none, within the wide one. Others are padded and added.
    """
    groups = [[w for w in weights if w.shape[2] >= w.shape[3]], [w for w in weights if w.shape[2] < w.shape[3]]]
    for inner, outer in (groups, groups[::-1]):
        if inner and outer and all(any(_fits(w, o) for o in outer) for w in inner):
            outer += inner
            inner.clear()
            break
    tall, wide = (sorted(group, key=lambda w: w.shape[2] * w.shape[3], reverse=True) for group in groups)
    small = None
    host = tall or wide
    if len(host) == 2 and _fits(host[1], host[0]):
        small = host.pop()
    return _sum(tall), _sum(wide), small


def _fits(weight: Tensor, other: Tensor) -> bool:
    return weight.shape[2] <= other.shape[2] and weight.shape[3] <= other.shape[3]


def _sum(weights: Sequence[Tensor]) -> Tensor | None:
    if len(weights) < 2:
        return weights[0] if weights else None
    height, width = (max(weight.shape[axis] for weight in weights) for axis in (2, 3))
    total = None
    for weight in weights:
        down, right = (height - weight.shape[2]) // 2, (width - weight.shape[3]) // 2
        padded = F.pad(weight.float(), (right, right, down, down))  # the sum is rounded once, in the program
        total = padded if total is None else total + padded
    return None if total is None else total.contiguous()  # padding keeps the strides of what is transposed


def crop(weight: Tensor, height: int, width: int) -> Tensor:
    """Without the taps that reach beyond a map of height x width from everywhere: 2 * size - 1 remain an axis."""
    rows, columns = max(weight.shape[2] // 2 - max(height - 1, 0), 0), max(weight.shape[3] // 2 - max(width - 1, 0), 0)
    if rows > 0 or columns > 0:
        weight = weight[:, :, rows : weight.shape[2] - rows, columns : weight.shape[3] - columns]
    return weight


def _in_rows(kernel: Tensor | None, height: int, width: int) -> Tensor | None:
    """`crop`, for programs, which are told how far apart channels and rows lie."""
    if kernel is None:
        return None
    kernel = crop(kernel, height, width)
    return kernel if kernel.stride(3) == 1 or kernel.shape[3] == 1 else kernel.contiguous()


def _described(kernel: Tensor | None, name: str) -> dict[str, int]:
    """What programs are told of a kernel."""
    if kernel is None:
        return {f"{name}_{what}": 0 for what in ("H", "W", "CHANNEL", "ROW")}
    values = (*kernel.shape[2:], kernel.stride(0), kernel.stride(2))
    return dict(zip((f"{name}_{what}" for what in ("H", "W", "CHANNEL", "ROW")), values, strict=True))


@torch.library.custom_op("zoo::depthwise_bands", mutates_args=())
def _bands(
    x: Tensor,
    tall: Tensor | None,
    wide: Tensor | None,
    small: Tensor | None,
    bias: Tensor | None,
    turned: bool = False,
) -> Tensor:
    """conv(x, tall) + conv(x, wide) + conv(x, small) + bias, x and bias contiguous, the kernels as of `_merge`.

    `turned`: with the kernels turned by 180 degrees.
    """
    from zoo.layers import large_kernel_programs as programs

    y = torch.empty_like(x)
    if not x.numel():
        return y
    batch, channels, height, width = x.shape
    tall, wide, small = (_in_rows(kernel, height, width) for kernel in (tall, wide, small))
    products = _products(x.dtype)
    tiles = _tile(height), _tile(width)
    strips = tuple(1 if size <= tile else 3 for size, tile in zip((height, width), tiles, strict=True))
    lines = [None if tall is None else tall.shape[3], None if wide is None else wide.shape[2]]
    held = strips == (1, 1) and _can_hold(lines, tiles, products)
    most = programs.POSITIONS if products < 3 and not held else programs.BLOCK_POSITIONS
    on_map = height * width <= most
    if small is not None and not on_map and not held:
        if tall is not None:
            tall = _sum([tall, small])
        elif wide is not None:
            wide = _sum([wide, small])
        small = None
    options: dict[str, Any] = {"HAS_BIAS": bias is not None, "TURNED": turned}
    for name, kernel in (("TALL", tall), ("WIDE", wide), ("SMALL", small)):
        options |= _described(kernel, name)
    tensors = [x if tensor is None else tensor for tensor in (tall, wide, small, bias)]
    with torch.cuda.device_of(x):
        if on_map:
            images, places = _tile(batch), _tile(height * width, most=programs.POSITIONS)
            block = min(places, programs.BLOCK_POSITIONS)
            registers = None if places > block else 128 if products else 96  # so few that four or five run at once
            programs.map_program[(_cdiv(batch, images) * channels,)](
                x, *tensors, y, batch, channels,
                MAP_H=height, MAP_W=width, IMAGES=images, BLOCK=block, BLOCKS=places // block,
                PRECISION=_PRECISIONS[products], num_warps=4, maxnreg=registers, **options,
            )  # fmt: skip
            return y
        max_images = min(16, _tile(batch, 1))
        splits = min(batch, max(1, _slots(_multiprocessors(x.device), lines, tiles) // channels)) if held else batch

        def band_grid(chosen: dict[str, Any]) -> tuple[int]:
            images = programs.images_of(chosen["TILE"], *tiles, max_images, chosen["WARPS"])
            return (min(_cdiv(batch, images), splits) * _cdiv(height, tiles[0]) * _cdiv(width, tiles[1]) * channels,)

        align = math.gcd(width, 16)
        matrices: list[Tensor] = []
        for i, weight in enumerate((tall, wide)):
            if weight is None or held:
                matrices += [x if weight is None else weight, x]
            else:
                matrices += _banded(weight, x.dtype, tiles[i], strips[i], wide=i == 1, turned=turned)
        copies = x
        if not held:  # whatever the kernels were laid out as, one program reads their matrices
            options |= {key: 0 for key in options if key.endswith(("_CHANNEL", "_ROW"))} | {"TURNED": False}
        else:
            forms = [config.kwargs for config in programs._CONFIGS]
            most = max(programs.images_of(form["TILE"], *tiles, max_images, form["WARPS"]) for form in forms)
            room = channels * splits * programs.size_of_copies(most, *tiles)
            copies = x.new_empty(room, dtype=torch.float16 if products else x.dtype)
        programs.band_program[band_grid](
            x, *matrices, *tensors[2:], copies, y, batch, channels, height, width // align, splits,
            ALIGN=align, MAX_IMAGES=max_images, TILE_H=tiles[0], TILE_W=tiles[1], STRIP_H=strips[0], STRIP_W=strips[1],
            HELD=held, PRODUCTS=products, **options,
        )  # fmt: skip
    return y


def _slots(multiprocessors: int, lines: Sequence[int | None], tiles: tuple[int, int]) -> int:
    """How many programs that hold matrices run at once: more would make theirs after others have finished.

    A multiprocessor has registers for four, and shared memory for two where matrices take more than 40 KiB.
    """
    return multiprocessors * (2 if _room(lines, tiles) > 5 * 64**2 else 4)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _room(lines: Sequence[int | None], tiles: tuple[int, int]) -> int:
    """Elements of the matrices of so many lines of a tall and of a wide kernel."""
    return sum(count * tile**2 for count, tile in zip(lines, tiles, strict=True) if count is not None)


def _can_hold(lines: Sequence[int | None], tiles: tuple[int, int], products: int) -> bool:
    """Whether a program has room for the matrices of so many lines of a tall and of a wide kernel.

    Ten of 64x64 are 80 KiB, what shared memory of 99 KiB, the least of these GPUs, leaves beside a tile.
    """
    few = all(count is None or count <= 7 for count in lines)
    return products < 3 and few and _room(lines, tiles) <= 10 * 64**2


def _banded(
    weight: Tensor, dtype: torch.dtype, tile: int, strip: int, wide: bool, turned: bool
) -> tuple[Tensor, Tensor]:
    """Every line of a kernel as a banded matrix, and by what products of each channel are to be multiplied."""
    from zoo.layers import large_kernel_programs as programs

    channels, _, height, width = weight.shape
    lines, products = height if wide else width, _products(dtype)
    shape = (2 if products == 3 else 1, channels, lines, tile, strip * tile)
    matrices = weight.new_empty(shape, dtype=torch.float16 if products else dtype)
    unscales = weight.new_empty(channels, dtype=torch.float32)
    programs.matrix_program[(channels * lines,)](
        weight, matrices, unscales, channels,
        HEIGHT=height, WIDTH=width, CHANNEL=weight.stride(0), ROW=weight.stride(2), WIDE=wide,
        TURNED=turned, LONG=tile, STRIP=strip, PRODUCTS=products, num_warps=4,
    )  # fmt: skip
    return matrices, unscales


@torch.library.custom_op("zoo::depthwise_bands_weight", mutates_args=())
def _bands_weight(x: Tensor, gradient: Tensor, kernel_h: int, kernel_w: int, dtype: torch.dtype) -> Tensor:
    """The gradient of a (C, 1, kernel_h, kernel_w) kernel of that type."""
    from zoo.layers import large_kernel_programs as programs

    batch, channels, height, width = x.shape
    shape = (channels, 1, kernel_h, kernel_w)
    if not x.numel():
        return x.new_zeros(shape, dtype=dtype)
    wide = kernel_h < kernel_w
    precision = _PRECISIONS[_products(x.dtype)]
    if height * width <= programs.BLOCK_POSITIONS:
        of_kernel, reached = _room_for_gradient(x, shape, height, width, dtype)
        with torch.cuda.device_of(x):
            programs.map_weight_program[(channels,)](
                x, gradient, reached, batch, channels,
                MAP_H=height, MAP_W=width, IMAGES=_tile(batch), PLACES=_tile(height * width),
                KERNEL_H=reached.shape[2], KERNEL_W=reached.shape[3], CHANNEL=reached.stride(0), ROW=reached.stride(2),
                PRECISION=precision, num_warps=4 if reached[0].numel() <= 128 else 8, num_stages=1,
            )  # fmt: skip
        return of_kernel
    long, short = (width, height) if wide else (height, width)
    short_tile = min(64, 1 << (short - 1).bit_length())
    images = 64 // short_tile
    steps = _cdiv(batch, images)
    lines = min(kernel_h, kernel_w, 2 * short - 1)
    steps_each = _cdiv(steps, max(1, min(steps, 2048 // (channels * lines))))  # few channels: more programs
    splits = _cdiv(steps, steps_each)
    # lines that never touch the map are left out; of the others, programs find taps that do not to be zero
    limits = (short, kernel_w) if wide else (kernel_h, short)
    summed = dtype if splits == 1 else torch.float32
    out, reached = _room_for_gradient(x, (splits * channels, *shape[1:]), *limits, summed)
    align = math.gcd(width, 16)
    with torch.cuda.device_of(x):
        programs.weight_program[(splits * channels * lines,)](
            x, gradient, reached, batch, channels, height, width // align, steps_each * images,
            ALIGN=align, WIDE=wide, TAPS=max(kernel_h, kernel_w), LINES=lines, LONG=_tile(long),
            CHANNEL=reached.stride(0), ROW=reached.stride(2), SHORT=short_tile, IMAGES=images, REPEATS=steps_each >= 4,
            PRECISION=precision,
        )  # fmt: skip
    return out if splits == 1 else out.view(splits, *shape).sum(0).to(dtype)


def _room_for_gradient(
    x: Tensor, shape: tuple[int, ...], height: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A kernel's gradient, and what of it a program is to write: taps that never touch the map remain zero."""
    room = x.new_empty(shape, dtype=dtype)
    reached = crop(room, height, width)
    return (room if reached is room else room.zero_()), reached


def _cdiv(size: int, step: int) -> int:
    return -(-size // step)


def _tile(size: int, least: int = 16, most: int = 64) -> int:
    """The power of two that holds `size`, within what tensor cores take and what fits in registers."""
    return min(max(1 << (size - 1).bit_length(), least), most)


def _products(dtype: torch.dtype) -> int:
    """How many 16-bit products stand for one float32 product; 0 for 16-bit types."""
    if dtype != torch.float32:
        return 0
    return 1 if torch.backends.cudnn.conv.fp32_precision == "tf32" else 3  # type: ignore[attr-defined]


@_bands.register_fake
def _(
    x: Tensor,
    tall: Tensor | None,
    wide: Tensor | None,
    small: Tensor | None,
    bias: Tensor | None,
    turned: bool = False,
) -> Tensor:
    return torch.empty_like(x)


@_bands_weight.register_fake
def _(x: Tensor, gradient: Tensor, kernel_h: int, kernel_w: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty((x.shape[1], 1, kernel_h, kernel_w), dtype=dtype)


# as FlopCounterMode counts a convolution: every tap of every position
@register_flop_formula(torch.ops.zoo.depthwise_bands)
def _bands_flops(
    x: Sequence[int],
    tall: Sequence[int] | None,
    wide: Sequence[int] | None,
    small: Sequence[int] | None,
    *args: Any,
    **kwargs: Any,
) -> int:
    return sum(_flops(x, kernel[2], kernel[3]) for kernel in (tall, wide, small) if kernel is not None)


@register_flop_formula(torch.ops.zoo.depthwise_bands_weight)
def _bands_weight_flops(
    x: Sequence[int], gradient: Sequence[int], kernel_h: int, kernel_w: int, *args: Any, **kwargs: Any
) -> int:
    return _flops(x, kernel_h, kernel_w)


def _flops(x: Sequence[int], kernel_h: int, kernel_w: int) -> int:
    return 2 * math.prod(x) * kernel_h * kernel_w


def _save_bands(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, tall, wide, small, bias, ctx.turned = inputs
    ctx.save_for_backward(x, tall, wide, small)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _bands_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, tall, wide, small = ctx.saved_tensors
    gradient = gradient.contiguous()
    of_x = _bands(gradient, tall, wide, small, None, not ctx.turned) if ctx.needs_input_grad[0] else None
    maps = (gradient, x) if ctx.turned else (x, gradient)
    of_kernels: list[Tensor | None] = [None, None, None]
    for i, weight in enumerate((tall, wide)):
        if ctx.needs_input_grad[1 + i]:
            of_kernels[i] = _bands_weight(*maps, *weight.shape[2:], weight.dtype)
    if ctx.needs_input_grad[3]:
        around = of_kernels[1 if tall is None else 0]
        if around is None:
            of_kernels[2] = _bands_weight(*maps, *small.shape[2:], small.dtype)
        else:
            of_kernels[2] = _center(around, small).to(small.dtype)
    of_bias = gradient.sum((0, 2, 3), dtype=torch.float32).to(ctx.bias_dtype) if ctx.needs_input_grad[4] else None
    return of_x, *of_kernels, of_bias, None


def _center(gradient: Tensor, weight: Tensor) -> Tensor:
    """Of a larger kernel's gradient, that of `weight` in its middle."""
    down, right = ((gradient.shape[axis] - weight.shape[axis]) // 2 for axis in (2, 3))
    return gradient[:, :, down : down + weight.shape[2], right : right + weight.shape[3]].clone()


def _save_bands_weight(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _bands_weight_backward(ctx: Any, of_kernel: Tensor) -> tuple[Tensor | None, ...]:
    x, gradient = ctx.saved_tensors
    tall, wide = (None, of_kernel) if of_kernel.shape[2] < of_kernel.shape[3] else (of_kernel, None)
    of_x = _bands(gradient, tall, wide, None, None, True) if ctx.needs_input_grad[0] else None
    of_gradient = _bands(x, tall, wide, None, None) if ctx.needs_input_grad[1] else None
    return of_x, of_gradient, None, None, None


_bands.register_autograd(_bands_backward, setup_context=_save_bands)
_bands_weight.register_autograd(_bands_weight_backward, setup_context=_save_bands_weight)
