"""The Triton programs behind `zoo.layers.large_kernel_triton`, which says what they compute and why so.

Every program works on one channel of some images. Names: `long` is the axis along which a kernel is long (height for
a tall kernel, width for a wide one), `short` the other. The kernel has TAPS taps along the long axis in each of its
LINES, which lie side by side along the short one.
"""

# mypy: disallow-untyped-defs=False, disable-error-code="assignment, index"
# (what a program takes has no Python type)
# ruff: noqa: RUF005
# (Triton does not unpack tuples)

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
UPCAST = tl.constexpr(INTERPRETED)  # the interpreter multiplies no bfloat16; products of 16 bits are exact in float32
POSITIONS = 256  # maps of up to so many positions take `map_program`, where no matrices are held
BLOCK_POSITIONS = 64  # which takes so many at once; maps of up to so many take it always, and `map_weight_program`
PAD = tl.constexpr(4)  # lines of zeros on either side of an image's copy, at least half of the 7 that are held

# TILE: positions that a program takes at once, images x tile height x tile width. The first call for a shape times them
# all: of few registers more programs run at once, in larger tiles they read less. One stage each: loads that shift the
# map are too narrow to be copied ahead, and matrices fill shared memory.
_CONFIGS = [
    triton.Config({"TILE": tile, "WARPS": warps}, num_warps=warps, num_stages=1, maxnreg=registers)
    for tile, warps, registers in ((4096, 4, None), (4096, 4, 128), (8192, 4, None), (4096, 8, None), (8192, 8, 128))
]
_WEIGHT_CONFIGS = [triton.Config({}, num_warps=4, num_stages=1), triton.Config({}, num_warps=4, num_stages=3)]


@triton.jit
def _tf32(value):
    """float32 rounded to the 11 bits of TF32: tensor cores themselves cut the others off."""
    rounded = ((value.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
    return tl.where(value == value, rounded, value)  # a GPU's NaN, of ones alone, would become zero


@triton.jit
def _rounded(value, PRECISION: tl.constexpr):
    """What one product takes of `value`."""
    if value.dtype == tl.float32 and PRECISION == "tf32":
        value = _tf32(value)
    return value


@triton.jit
def _dot(left, right, total, PRECISION: tl.constexpr):
    """total + left @ right: of float32 in TF32, or with PRECISION "tf32x3" in three products that keep 21 bits."""
    if UPCAST:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    if PRECISION == "tf32x3":  # Triton's own way of it spills registers
        left_high = _tf32(left)
        right_high = _tf32(right)
        total = tl.dot(left - left_high, right_high, total, input_precision="tf32")
        total = tl.dot(left_high, right - right_high, total, input_precision="tf32")
        return tl.dot(left_high, right_high, total, input_precision="tf32")
    else:
        return tl.dot(left, right, total, input_precision="tf32")


@triton.jit
def _scale(peak):
    """The power of two that brings `peak` into [2^14, 2^15), near the end of float16's range, and its inverse."""
    exponent = (peak.to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.minimum(268 - exponent, 253)
    return (exponent << 23).to(tl.float32, bitcast=True), ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _peak_of_map(
    x, images, height, width, row0, row1, column0, column1, image_stride,
    IMAGES: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """Each image's largest magnitude within rows row0 to row1 and columns column0 to column1: (IMAGES,)."""
    lane = tl.arange(0, IMAGES * TILE_H)
    image = lane // TILE_H
    peak = tl.full((IMAGES * TILE_H, TILE_W), 0.0, tl.float32)
    for row in range(row0, row1, TILE_H):
        rows = row + lane % TILE_H
        for column in range(column0, column1, TILE_W):
            columns = column + tl.arange(0, TILE_W)
            mask = ((image < images) & (rows < height))[:, None] & (columns < width)[None, :]
            value = tl.load(x + (image * image_stride + rows * width)[:, None] + columns[None, :], mask, 0.0)
            peak = tl.maximum(peak, tl.abs(value.to(tl.float32)))
    return _peak_of_images(peak, IMAGES, TILE_H)


@triton.jit
def _peak_of_images(lines, IMAGES: tl.constexpr, EACH: tl.constexpr):
    """Every image's largest of its EACH rows of magnitudes, side by side in `lines`."""
    return tl.max(tl.reshape(lines, (IMAGES, EACH * lines.shape[1])), 1)


@triton.jit
def _repeated(scale, IMAGES: tl.constexpr, EACH: tl.constexpr):
    """Every image's scale EACH times."""
    return tl.reshape(tl.broadcast_to(scale[:, None], (IMAGES, EACH)), (IMAGES * EACH,))


@triton.jit
def _taps(kernel, row, column, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROW: tl.constexpr, TURNED: tl.constexpr):
    """Where taps of a kernel lie whose rows are ROW apart; TURNED: of the one that is turned by 180 degrees."""
    if TURNED:
        row = HEIGHT - 1 - row
        column = WIDTH - 1 - column
    return kernel + row * ROW + column


@triton.jit
def _peak_of_kernel(kernel, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROW: tl.constexpr):
    tap = tl.arange(0, triton.next_power_of_2(HEIGHT * WIDTH))
    value = tl.load(kernel + tap // WIDTH * ROW + tap % WIDTH, tap < HEIGHT * WIDTH, 0.0)
    return tl.max(tl.abs(value.to(tl.float32)))


@triton.jit
def _lined_up(
    kernel, line, tap,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROW: tl.constexpr, WIDE: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """The taps of one line of a kernel, zeros beyond it."""
    if WIDE:
        places = _taps(kernel, line, tap, HEIGHT, WIDTH, ROW, TURNED)
    else:
        places = _taps(kernel, tap, line, HEIGHT, WIDTH, ROW, TURNED)
    return tl.load(places, (tap >= 0) & (tap < (WIDTH if WIDE else HEIGHT)), 0.0).to(tl.float32)


@triton.jit(do_not_specialize=["channels"])
def matrix_program(
    kernel, matrices, unscales, channels,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNEL: tl.constexpr, ROW: tl.constexpr, WIDE: tl.constexpr,
    TURNED: tl.constexpr, LONG: tl.constexpr, STRIP: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """One line of one channel's kernel as a banded matrix: matrices[plane, channel, line] is (LONG, STRIP * LONG).

    Entry [o, i] is the tap with which input row `i` counts for output row `o`; in a strip of three, input rows begin
    LONG before the output rows. float32 is scaled and held as float16, the remainder in a second plane.
    """
    TAPS: tl.constexpr = WIDTH if WIDE else HEIGHT
    LINES: tl.constexpr = HEIGHT if WIDE else WIDTH
    program = tl.program_id(0)
    channel = program // LINES
    kernel += channel * CHANNEL
    line = program % LINES
    for part in range(STRIP):
        row = tl.arange(0, LONG)
        column = tl.arange(0, LONG)
        tap = column[None, :] - row[:, None] + (part - STRIP // 2) * LONG + TAPS // 2
        matrix = _lined_up(kernel, line, tap, HEIGHT, WIDTH, ROW, WIDE, TURNED)
        out = matrices + program.to(tl.int64) * (LONG * STRIP * LONG) + part * LONG
        out += row[:, None] * (STRIP * LONG) + column[None, :]
        if PRODUCTS == 0:
            tl.store(out, matrix.to(matrices.dtype.element_ty))
        else:
            scale, unscale = _scale(_peak_of_kernel(kernel, HEIGHT, WIDTH, ROW))
            tl.store(unscales + channel, unscale)
            matrix *= scale
            high = matrix.to(tl.float16)
            tl.store(out, high)
            if PRODUCTS == 3:
                plane = channels.to(tl.int64) * (LINES * LONG * STRIP * LONG)
                tl.store(out + plane, (matrix - high.to(tl.float32)).to(tl.float16))


@triton.jit
def _matrices(
    x, kernel, small,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROW: tl.constexpr,
    SMALL_H: tl.constexpr, SMALL_W: tl.constexpr, SMALL_ROW: tl.constexpr,
    WIDE: tl.constexpr, TURNED: tl.constexpr, LONG: tl.constexpr, STORED: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """Every line of kernel + small as a banded matrix (LONG, LONG), and by what products of them are multiplied.

    They are right operands: rows stand for what is read, in the order of `_as_operand`, columns for what is written, in
    that of `_ordered`.
    """
    TAPS: tl.constexpr = WIDTH if WIDE else HEIGHT
    LINES: tl.constexpr = HEIGHT if WIDE else WIDTH
    SMALL_TAPS: tl.constexpr = SMALL_W if WIDE else SMALL_H
    SMALL_LINES: tl.constexpr = SMALL_H if WIDE else SMALL_W
    FIRST: tl.constexpr = (LINES - SMALL_LINES) // 2
    EACH: tl.constexpr = values_in_a_row(LONG)
    k = tl.arange(0, LONG)
    read = k // (4 * EACH) * (4 * EACH) + k // 2 % 4 * EACH + k // 16 % (EACH // 4) * 4 + k // 8 % 2 * 2 + k % 2
    written = k // (4 * STORED) * (4 * STORED) + k // 2 % 4 * STORED + k // 8 % (STORED // 2) * 2 + k % 2
    behind = read[:, None] - written[None, :]
    scale = 1.0
    unscale = 1.0
    if PRODUCTS > 0:
        peak = _peak_of_kernel(kernel, HEIGHT, WIDTH, ROW)
        if SMALL_TAPS > 0:
            peak += _peak_of_kernel(small, SMALL_H, SMALL_W, SMALL_ROW)
        scale, unscale = _scale(peak)
    matrices = ()
    for line in tl.static_range(LINES):
        matrix = _lined_up(kernel, line, behind + TAPS // 2, HEIGHT, WIDTH, ROW, WIDE, TURNED)
        if line >= FIRST and line < FIRST + SMALL_LINES:
            matrix += _lined_up(
                small, line - FIRST, behind + SMALL_TAPS // 2, SMALL_H, SMALL_W, SMALL_ROW, WIDE, TURNED
            )  # fmt: skip
        if PRODUCTS > 0:
            matrices = matrices + ((matrix * scale).to(tl.float16),)
        else:
            matrices = matrices + (matrix.to(x.dtype.element_ty),)
    return matrices, unscale


@triton.jit
def _line_product(
    total, high, low, x, offset, short_stride, column, short_size, rows, columns, map_scale, PRODUCTS: tl.constexpr
):
    """total + (a line's banded matrix) @ (the map, shifted by that line's offset), on 16-bit operands.

    The matrix of float32 is the sum of what lies at `high` and, of three PRODUCTS, at `low`.
    """
    matrix = tl.load(high)
    touched = columns & (column + offset >= 0) & (column + offset < short_size)
    block = tl.load(x + offset * short_stride, rows[:, None] & touched[None, :], 0.0)
    if PRODUCTS == 0:
        total = _dot(matrix, block, total, "tf32")
    else:
        block = block * map_scale[None, :]
        rounded = block.to(tl.float16)
        total = _dot(matrix, rounded, total, "tf32")
        if PRODUCTS == 3:
            total = _dot(matrix, (block - rounded.to(tl.float32)).to(tl.float16), total, "tf32")
            total = _dot(tl.load(low), rounded, total, "tf32")
    return total


@triton.jit
def _clear(copy, IMAGES: tl.constexpr, LONG: tl.constexpr, SHORT: tl.constexpr):
    """Zeros before and after the lines of every image's copy."""
    row = tl.arange(0, IMAGES * 2 * PAD)
    row = row // (2 * PAD) * (SHORT + 2 * PAD) + row % (2 * PAD) + tl.where(row % (2 * PAD) < PAD, 0, SHORT)
    tl.store(copy + row[:, None] * LONG + tl.arange(0, LONG)[None, :], tl.zeros((IMAGES * 2 * PAD, LONG), tl.float32))


@triton.constexpr_function
def values_in_a_row(long: int) -> int:
    """How many values of a line of a copy one thread loads at once."""
    return 8 if long >= 32 else 4


@triton.jit
def _as_operand(values, LONG: tl.constexpr, WARPS: tl.constexpr):
    """What threads load in rows, (rows, values of each), as (16 * WARPS, LONG) of which the same threads hold the same.

    A tensor core's left operand gives a thread two values of every eight along LONG, of a row in every eight. To load
    several in a row, LONG is taken in another order, in which the matrices' rows are, too (`_matrices`).
    """
    EACH: tl.constexpr = values_in_a_row(LONG)
    # rows: which part of LONG, half of a warp's 16 rows, warp, row of its half, and thread of the row; columns: which
    # four of EACH, and half of these
    values = tl.reshape(values, (LONG // (4 * EACH), 2, WARPS, 8, 4, EACH // 4, 2, 2))
    return tl.reshape(tl.permute(values, (2, 1, 3, 0, 5, 6, 4, 7)), (16 * WARPS, LONG))


@triton.jit
def _joined(totals, COUNT: tl.constexpr, LONG: tl.constexpr, WARPS: tl.constexpr):
    """COUNT times (16 * WARPS, LONG), of rows in `_band_of_copy`'s order, as one of all rows."""
    if COUNT == 4:
        joined = tl.join(tl.join(totals[0], totals[2]), tl.join(totals[1], totals[3]))
    elif COUNT == 2:
        joined = tl.join(totals[0], totals[1])
    else:
        joined = totals[0]
    joined = tl.permute(tl.reshape(joined, (WARPS, 2, 8, LONG, COUNT)), (0, 2, 1, 4, 3))
    return tl.reshape(joined, (16 * WARPS * COUNT, LONG))


@triton.jit
def _band_of_copy(
    copy, matrices,
    LINES: tl.constexpr, IMAGES: tl.constexpr, LONG: tl.constexpr, SHORT: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """As `_band` turned, (IMAGES * SHORT, LONG), from a copy of the tile, whose lines lie between zeros.

    The copy is read into registers as products take it, so that shared memory serves the matrices alone. A thread's
    lines are neighbours: those of one shift are for the most part those of another.
    """
    EACH: tl.constexpr = values_in_a_row(LONG)
    ROWS: tl.constexpr = 16 * WARPS
    COUNT: tl.constexpr = IMAGES * SHORT // ROWS
    thread = tl.arange(0, ROWS * LONG // EACH)
    row = ((thread // 32 % WARPS * 8 + thread // 4 % 8) * 2 + thread // (32 * WARPS) % 2) * COUNT
    column = thread // (64 * WARPS) * (4 * EACH) + thread % 4 * EACH
    copy += ((row // SHORT * (SHORT + 2 * PAD) + PAD + row % SHORT) * LONG + column)[:, None]
    copy += tl.arange(0, EACH)[None, :]
    totals = ()
    for _ in tl.static_range(COUNT):
        totals = totals + (tl.zeros((ROWS, LONG), tl.float32),)
    for shift in tl.static_range(COUNT + LINES - 1):
        shifted = _as_operand(tl.load(copy + (shift - LINES // 2) * LONG), LONG, WARPS)
        sums = ()
        for i in tl.static_range(COUNT):
            if shift - i >= 0 and shift - i < LINES:
                sums = sums + (_dot(shifted, matrices[shift - i], totals[i], "tf32"),)
            else:
                sums = sums + (totals[i],)
        totals = sums
    return _joined(totals, COUNT, LONG, WARPS)


@triton.jit
def _band(
    x, matrices, plane, images, long_size, short_size, long_stride, short_stride, image_stride, long0, short0,
    map_scale,
    TAPS: tl.constexpr, LINES: tl.constexpr, IMAGES: tl.constexpr, LONG: tl.constexpr, SHORT: tl.constexpr,
    STRIP: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """One kernel's outputs for a tile, (LONG, IMAGES * SHORT): the sum over lines of banded matrix @ shifted map."""
    lane = tl.arange(0, IMAGES * SHORT)
    column = short0 + lane % SHORT
    columns = lane // SHORT < images
    place = tl.arange(0, LONG)
    x += (lane // SHORT * image_stride + column * short_stride)[None, :] + place[:, None] * long_stride
    total = tl.zeros((LONG, IMAGES * SHORT), tl.float32)
    if PRODUCTS > 0:
        map_scale = _repeated(map_scale, IMAGES, SHORT)
    matrices += place[:, None] * (STRIP * LONG) + place[None, :]
    first = 0
    last = long_size
    if STRIP > 1:
        first = tl.maximum(long0 - TAPS // 2, 0) // 16 * 16  # multiples of 16 keep wide loads aligned
        last = tl.minimum(long0 + LONG + TAPS // 2, long_size)
    for start in range(first, last, LONG):
        rows = start + place < long_size
        strip = matrices + (start - long0 + STRIP // 2 * LONG)
        source = x + start * long_stride
        if LINES <= 7:
            for line in tl.static_range(LINES):
                matrix = strip + line * (LONG * STRIP * LONG)
                total = _line_product(
                    total, matrix, matrix + plane, source, line - LINES // 2, short_stride, column,
                    short_size, rows, columns, map_scale, PRODUCTS,
                )  # fmt: skip
        else:  # too many to unroll; those that never touch the map are left out
            touching = tl.maximum(LINES // 2 - short_size + 1, 0), tl.minimum(LINES // 2 + short_size, LINES)
            for line in range(touching[0], touching[1]):
                matrix = strip + line * (LONG * STRIP * LONG)
                total = _line_product(
                    total, matrix, matrix + plane, source, line - LINES // 2, short_stride, column,
                    short_size, rows, columns, map_scale, PRODUCTS,
                )  # fmt: skip
    return total


@triton.autotune(
    configs=_CONFIGS[:1] if INTERPRETED else _CONFIGS,
    key=[
        "ALIGN", "MAX_IMAGES", "TILE_H", "TILE_W", "STRIP_H", "STRIP_W",
        "TALL_H", "TALL_W", "WIDE_H", "WIDE_W", "SMALL_H", "SMALL_W", "PRODUCTS",
    ],
)  # fmt: skip
@triton.jit(do_not_specialize=["batch", "channels", "height", "width_units", "splits"])
def band_program(
    x, tall, tall_unscale, wide, wide_unscale, small, bias, copies, y,
    batch, channels, height, width_units, splits,
    ALIGN: tl.constexpr, MAX_IMAGES: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    STRIP_H: tl.constexpr, STRIP_W: tl.constexpr,
    TALL_H: tl.constexpr, TALL_W: tl.constexpr, TALL_CHANNEL: tl.constexpr, TALL_ROW: tl.constexpr,
    WIDE_H: tl.constexpr, WIDE_W: tl.constexpr, WIDE_CHANNEL: tl.constexpr, WIDE_ROW: tl.constexpr,
    SMALL_H: tl.constexpr, SMALL_W: tl.constexpr, SMALL_CHANNEL: tl.constexpr, SMALL_ROW: tl.constexpr,
    TURNED: tl.constexpr, HAS_BIAS: tl.constexpr, PRODUCTS: tl.constexpr, HELD: tl.constexpr, TILE: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """y = conv(x, tall + small) + conv(x, wide) + bias on a tile of one channel of every `splits`-th group of images.

    Where there is no tall kernel, the small one is added to the wide one; edges of 0 mean that there is none. HELD: the
    matrices are made here and stay in shared memory for all images, and `copies` has room for every program's copies.
    Else `tall` and `wide` are what `matrix_program` made of the kernels, the small one included.
    """
    IMAGES: tl.constexpr = images_of(TILE, TILE_H, TILE_W, MAX_IMAGES, WARPS)
    STORED: tl.constexpr = values_stored_in_a_row(ALIGN, TILE_W, PRODUCTS)
    width = width_units * ALIGN  # so that the compiler knows which loads are aligned
    program = tl.program_id(0)
    channel = program % channels
    rest = program // channels
    tiles_w = tl.cdiv(width, TILE_W)
    tiles_h = tl.cdiv(height, TILE_H)
    column0 = rest % tiles_w * TILE_W
    row0 = rest // tiles_w % tiles_h * TILE_H
    image_stride = channels * height * width
    tall_held = ()
    wide_held = ()
    tall_factor = 1.0
    wide_factor = 1.0
    tall_plane = 0
    wide_plane = 0
    if HELD:
        small += channel * SMALL_CHANNEL
        if TALL_H > 0:
            tall_held, tall_factor = _matrices(
                x, tall + channel * TALL_CHANNEL, small, TALL_H, TALL_W, TALL_ROW,
                SMALL_H, SMALL_W, SMALL_ROW, False, TURNED, TILE_H, 2, PRODUCTS,
            )  # fmt: skip
        if WIDE_H > 0:
            wide_held, wide_factor = _matrices(
                x, wide + channel * WIDE_CHANNEL, small, WIDE_H, WIDE_W, WIDE_ROW,
                SMALL_H if TALL_H == 0 else 0, SMALL_W if TALL_H == 0 else 0, SMALL_ROW,
                True, TURNED, TILE_W, STORED, PRODUCTS,
            )  # fmt: skip
    else:
        if TALL_H > 0:
            tall_size: tl.constexpr = TALL_W * TILE_H * TILE_H * STRIP_H
            tall += channel.to(tl.int64) * tall_size
            tall_plane = channels.to(tl.int64) * tall_size
            if PRODUCTS > 0:
                tall_factor = tl.load(tall_unscale + channel)
        if WIDE_H > 0:
            wide_size: tl.constexpr = WIDE_H * TILE_W * TILE_W * STRIP_W
            wide += channel.to(tl.int64) * wide_size
            wide_plane = channels.to(tl.int64) * wide_size
            if PRODUCTS > 0:
                wide_factor = tl.load(wide_unscale + channel)
    if HELD:
        copies += program.to(tl.int64) * size_of_copies(IMAGES, TILE_H, TILE_W)
        wide_copy = copies + IMAGES * (TILE_W + 2 * PAD) * TILE_H
        if TALL_H > 0:
            _clear(copies, IMAGES, TILE_H, TILE_W)
        if WIDE_H > 0:
            _clear(wide_copy, IMAGES, TILE_W, TILE_H)
    for group in range(rest // (tiles_w * tiles_h), tl.cdiv(batch, IMAGES), splits):
        image0 = group * IMAGES
        images = batch - image0
        origin = (image0.to(tl.int64) * channels + channel) * height * width
        source = x + origin
        map_scale = 1.0
        map_unscale = 1.0
        if HELD:
            lane = tl.arange(0, IMAGES * TILE_H)
            image = lane // TILE_H
            row = lane % TILE_H
            column = tl.arange(0, TILE_W)
            mask = ((image < images) & (row < height))[:, None] & (column < width)[None, :]
            value = tl.load(source + (image * image_stride + row * width)[:, None] + column[None, :], mask, 0.0)
            if PRODUCTS > 0:
                map_scale, map_unscale = _scale(_peak_of_images(tl.abs(value), IMAGES, TILE_H))
                value *= _repeated(map_scale, IMAGES, TILE_H)[:, None]
            value = value.to(copies.dtype.element_ty)
            tl.debug_barrier()  # the copies of the images before have been read
            if TALL_H > 0:
                place = (image * (TILE_W + 2 * PAD) + PAD)[:, None] + column[None, :]
                tl.store(copies + place * TILE_H + row[:, None], value)
            if WIDE_H > 0:
                place = image * (TILE_H + 2 * PAD) + PAD + row
                tl.store(wide_copy + (place * TILE_W)[:, None] + column[None, :], value)
            tl.debug_barrier()  # what a program's threads have stored, all of them see
        elif PRODUCTS > 0:
            reach_h: tl.constexpr = max(TALL_H // 2, WIDE_H // 2)
            reach_w: tl.constexpr = max(TALL_W // 2, WIDE_W // 2)
            peak = _peak_of_map(
                source, images, height, width,
                tl.maximum(row0 - reach_h, 0) // 16 * 16, tl.minimum(row0 + TILE_H + reach_h, height),
                tl.maximum(column0 - reach_w, 0) // 16 * 16, tl.minimum(column0 + TILE_W + reach_w, width),
                image_stride, IMAGES, TILE_H, TILE_W,
            )  # fmt: skip
            map_scale, map_unscale = _scale(peak)
        total = tl.zeros((IMAGES * TILE_H, TILE_W), tl.float32)
        if TALL_H > 0:
            if HELD:
                band = _band_of_copy(copies, tall_held, TALL_W, IMAGES, TILE_H, TILE_W, WARPS) * tall_factor
                band = tl.permute(tl.reshape(band, (IMAGES, TILE_W, TILE_H)), (0, 2, 1))
            else:
                band = tall_factor * _band(
                    source, tall, tall_plane, images, height, width, width, 1, image_stride,
                    row0, column0, map_scale, TALL_H, TALL_W, IMAGES, TILE_H, TILE_W, STRIP_H, PRODUCTS,
                )  # fmt: skip
                band = tl.permute(tl.reshape(band, (TILE_H, IMAGES, TILE_W)), (1, 0, 2))
            total += _ordered(band, IMAGES * TILE_H, TILE_W, STORED)
        if WIDE_H > 0:
            if HELD:
                total += _band_of_copy(wide_copy, wide_held, WIDE_H, IMAGES, TILE_W, TILE_H, WARPS) * wide_factor
            else:
                band = wide_factor * _band(
                    source, wide, wide_plane, images, width, height, 1, width, image_stride,
                    column0, row0, map_scale, WIDE_W, WIDE_H, IMAGES, TILE_W, TILE_H, STRIP_W, PRODUCTS,
                )  # fmt: skip
                band = tl.permute(tl.reshape(band, (TILE_W, IMAGES, TILE_H)), (1, 2, 0))
                total += _ordered(band, IMAGES * TILE_H, TILE_W, STORED)
        if PRODUCTS > 0:
            total *= _repeated(map_unscale, IMAGES, TILE_H)[:, None]
        if HAS_BIAS:
            total += tl.load(bias + channel).to(tl.float32)
        _store(
            y + origin, total, images, row0, column0, height, width, image_stride,
            IMAGES, TILE_H, TILE_W, STORED, WARPS,
        )  # fmt: skip


@triton.constexpr_function
def values_stored_in_a_row(align: int, tile_w: int, products: int) -> int:
    """How many values of a line of the output one thread stores at once: up to 16 bytes, as rows are aligned."""
    return max(min(align, tile_w // 4, 4 if products else 8), 2)


@triton.jit
def _ordered(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STORED: tl.constexpr):
    """(ROWS, COLUMNS) with columns in the order of which products give a thread STORED in a row, two at a time."""
    tile = tl.reshape(tile, (ROWS, COLUMNS // (4 * STORED), 4, STORED // 2, 2))
    return tl.reshape(tl.permute(tile, (0, 1, 3, 2, 4)), (ROWS, COLUMNS))


@triton.jit
def _store(
    y, tile, images, row0, column0, height, width, image_stride,
    IMAGES: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, STORED: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Writes what `_band_of_copy` has of a tile, columns as of `_ordered`, from where threads hold it."""
    COUNT: tl.constexpr = IMAGES * TILE_H // (16 * WARPS)
    PARTS: tl.constexpr = TILE_W // (4 * STORED)
    tile = tl.reshape(tile, (WARPS, 8, 2, COUNT, PARTS, STORED // 2, 4, 2))
    tile = tl.reshape(tl.permute(tile, (2, 3, 4, 0, 1, 6, 5, 7)), (64 * WARPS * COUNT * PARTS, STORED))
    thread = tl.arange(0, 64 * WARPS * COUNT * PARTS)
    part = thread // (32 * WARPS)
    row = ((thread // 32 % WARPS * 8 + thread // 4 % 8) * 2 + part // (PARTS * COUNT)) * COUNT + part // PARTS % COUNT
    image = row // TILE_H
    row = (row0 + row % TILE_H)[:, None]
    column = column0 + (part % PARTS * (4 * STORED) + thread % 4 * STORED)[:, None]
    column += tl.arange(0, STORED)[None, :]
    mask = (image < images)[:, None] & (row < height) & (column < width)
    tl.store(y + (image * image_stride)[:, None] + row * width + column, tile.to(y.dtype.element_ty), mask)


@triton.constexpr_function
def size_of_copies(images: int, tile_h: int, tile_w: int) -> int:
    """Elements of the two copies of a program's tile, one with its columns side by side, one with its rows."""
    return images * ((tile_w + 2 * PAD.value) * tile_h + (tile_h + 2 * PAD.value) * tile_w)


@triton.constexpr_function
def images_of(tile: int, tile_h: int, tile_w: int, max_images: int, warps: int) -> int:
    """How many images a program takes: of copies, one to four times the lines that its warps multiply at once."""
    lines = 16 * warps
    most = min(max_images, 4 * lines // max(tile_h, tile_w))
    return max(min(tile // (tile_h * tile_w), most), lines // min(tile_h, tile_w), 1)


@triton.jit
def _tabled(
    table, kernel, row, column, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROW: tl.constexpr, TURNED: tl.constexpr
):
    """table + the kernel's taps for pixels that lie `row` rows and `column` columns behind the output."""
    row += HEIGHT // 2
    column += WIDTH // 2
    inside = (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
    return table + tl.load(_taps(kernel, row, column, HEIGHT, WIDTH, ROW, TURNED), inside, 0.0).to(tl.float32)


@triton.jit
def _looked_up(table, index):
    return tl.reshape(tl.gather(table, tl.reshape(index, (index.numel,)), 0), index.shape)


@triton.jit
def _code(place, MAP_H: tl.constexpr, MAP_W: tl.constexpr):
    """Numbers of positions whose differences tell how many rows and columns apart they lie."""
    place = tl.minimum(place, MAP_H * MAP_W - 1)  # what lies beyond the map is multiplied by zeros
    return place // MAP_W * (2 * MAP_W - 1) + place % MAP_W


@triton.jit(do_not_specialize=["batch", "channels"])
def map_program(
    x, tall, wide, small, bias, y, batch, channels,
    MAP_H: tl.constexpr, MAP_W: tl.constexpr, IMAGES: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    TALL_H: tl.constexpr, TALL_W: tl.constexpr, TALL_CHANNEL: tl.constexpr, TALL_ROW: tl.constexpr,
    WIDE_H: tl.constexpr, WIDE_W: tl.constexpr, WIDE_CHANNEL: tl.constexpr, WIDE_ROW: tl.constexpr,
    SMALL_H: tl.constexpr, SMALL_W: tl.constexpr, SMALL_CHANNEL: tl.constexpr, SMALL_ROW: tl.constexpr,
    TURNED: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `band_program` for maps of at most BLOCK * BLOCKS positions: all kernels as one matrix between all positions.

    Its entries are looked up in a table of taps by how far apart two positions lie.
    """
    size: tl.constexpr = MAP_H * MAP_W
    across: tl.constexpr = 2 * MAP_W - 1
    program = tl.program_id(0)
    channel = program % channels
    image0 = program // channels * IMAGES
    entry = tl.arange(0, 4 * BLOCK * BLOCKS)
    row = entry // across - (MAP_H - 1)
    column = entry % across - (MAP_W - 1)
    table = tl.zeros((4 * BLOCK * BLOCKS,), tl.float32)
    if TALL_H > 0:
        table = _tabled(
            table, tall + channel * TALL_CHANNEL, row, column, TALL_H, TALL_W, TALL_ROW, TURNED
        )  # fmt: skip
    if WIDE_H > 0:
        table = _tabled(
            table, wide + channel * WIDE_CHANNEL, row, column, WIDE_H, WIDE_W, WIDE_ROW, TURNED
        )  # fmt: skip
    if SMALL_H > 0:
        table = _tabled(
            table, small + channel * SMALL_CHANNEL, row, column, SMALL_H, SMALL_W, SMALL_ROW, TURNED
        )  # fmt: skip
    table = _rounded(table.to(x.dtype.element_ty), PRECISION)
    image = tl.arange(0, IMAGES)
    place = tl.arange(0, BLOCK)
    origin = (image0.to(tl.int64) * channels + channel) * size
    images = (image < batch - image0)[:, None]
    offset = (image * (channels * size))[:, None] + place[None, :]
    inputs = ()
    codes = ()
    for block in tl.static_range(BLOCKS):
        mask = images & (block * BLOCK + place < size)[None, :]
        inputs = inputs + (_rounded(tl.load(x + origin + offset + block * BLOCK, mask, 0.0), PRECISION),)
        codes = codes + (_code(block * BLOCK + place, MAP_H, MAP_W) + ((MAP_H - 1) * across + MAP_W - 1),)
    for out_block in range(BLOCKS):
        out = out_block * BLOCK + place
        out_code = _code(out, MAP_H, MAP_W)
        total = tl.zeros((IMAGES, BLOCK), tl.float32)
        for block in tl.static_range(BLOCKS):
            matrix = _looked_up(table, codes[block][:, None] - out_code[None, :])
            total = _dot(inputs[block], matrix, total, PRECISION)
        if HAS_BIAS:
            total += tl.load(bias + channel).to(tl.float32)
        tl.store(y + origin + offset + out_block * BLOCK, total.to(y.dtype.element_ty), images & (out < size)[None, :])


@triton.jit(do_not_specialize=["batch", "channels"])
def map_weight_program(
    x, gradient, out, batch, channels,
    MAP_H: tl.constexpr, MAP_W: tl.constexpr, IMAGES: tl.constexpr, PLACES: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, CHANNEL: tl.constexpr, ROW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One channel's weight gradient on maps of at most PLACES positions.

    map^T @ (gradient map) holds what every two positions share; a tap's gradient is the sum over those that lie as far
    apart as it says.
    """
    size: tl.constexpr = MAP_H * MAP_W
    channel = tl.program_id(0)
    place = tl.arange(0, PLACES)
    image = tl.arange(0, IMAGES)
    offset = (image * (channels * size))[:, None] + place[None, :]
    total = tl.zeros((PLACES, PLACES), tl.float32)
    for image0 in range(0, batch, IMAGES):
        origin = (image0 * channels.to(tl.int64) + channel) * size
        mask = (image < batch - image0)[:, None] & (place < size)[None, :]
        left = tl.load(x + origin + offset, mask, 0.0)
        right = tl.load(gradient + origin + offset, mask, 0.0)
        total = _dot(tl.trans(_rounded(left, PRECISION)), _rounded(right, PRECISION), total, PRECISION)
    tap = tl.arange(0, triton.next_power_of_2(KERNEL_H * KERNEL_W))
    down = tap // KERNEL_W - KERNEL_H // 2
    right = tap % KERNEL_W - KERNEL_W // 2
    row = tl.where(place < size, place // MAP_W, PLACES)[None, :] + down[:, None]
    column = (place % MAP_W)[None, :] + right[:, None]
    inside = (row.to(tl.uint32, bitcast=True) < MAP_H) & (column.to(tl.uint32, bitcast=True) < MAP_W)
    pair = (place * PLACES + place)[None, :] + ((down * MAP_W + right) * PLACES)[:, None]
    pair &= PLACES * PLACES - 1  # what is not inside lies anywhere
    shared = _looked_up(tl.reshape(total, (PLACES * PLACES,)), pair)
    sums = tl.sum(tl.where(inside, shared, 0.0), 1)
    out += channel * CHANNEL + tap // KERNEL_W * ROW + tap % KERNEL_W
    tl.store(out, sums.to(out.dtype.element_ty), tap < KERNEL_H * KERNEL_W)


@triton.autotune(
    configs=_WEIGHT_CONFIGS[:1] if INTERPRETED else _WEIGHT_CONFIGS,
    key=["ALIGN", "WIDE", "TAPS", "LINES", "LONG", "SHORT", "REPEATS", "PRECISION"],
)
@triton.jit(do_not_specialize=["batch", "channels", "height", "width_units", "images_each"])
def weight_program(
    x, gradient, out, batch, channels, height, width_units, images_each,
    ALIGN: tl.constexpr, WIDE: tl.constexpr, TAPS: tl.constexpr, LINES: tl.constexpr, LONG: tl.constexpr,
    CHANNEL: tl.constexpr, ROW: tl.constexpr, SHORT: tl.constexpr, IMAGES: tl.constexpr, REPEATS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One line of one channel's weight gradient over `images_each` images: out[split * channels + channel, line].

    REPEATS: whether these are several times IMAGES, for the choice of a form alone.

    (shifted map) @ (gradient map)^T holds at [i, o] what input row i and output row o share; a tap is i - o, so its
    gradient is the sum of a diagonal.
    """
    width = width_units * ALIGN
    long_size = width if WIDE else height
    short_size = height if WIDE else width
    long_stride = 1 if WIDE else width
    short_stride = width if WIDE else 1
    program = tl.program_id(0)
    line = program % LINES
    channel = program // LINES % channels
    split = program // (LINES * channels)
    offset = line - LINES // 2
    image_stride = channels * height * width
    place = tl.arange(0, LONG)
    lane = tl.arange(0, IMAGES * SHORT)
    tap = tl.arange(0, triton.next_power_of_2(TAPS))
    sums = tl.zeros((triton.next_power_of_2(TAPS),), tl.float32)
    reach = 0 if long_size <= LONG else (TAPS // 2 + LONG - 1) // LONG
    for step in range(-reach, reach + 1):  # how many tiles the input lies behind the output
        total = tl.zeros((LONG, LONG), tl.float32)
        for image0 in range(split * images_each, tl.minimum((split + 1) * images_each, batch), IMAGES):
            origin = image0 * image_stride.to(tl.int64) + channel * height * width
            present = lane // SHORT < tl.minimum((split + 1) * images_each, batch) - image0
            for short0 in range(0, short_size, SHORT):
                column = short0 + lane % SHORT
                column_offset = lane // SHORT * image_stride + column * short_stride
                usable = present & (column < short_size)
                touched = usable & (column + offset >= 0) & (column + offset < short_size)
                for long0 in range(0, long_size, LONG):
                    out_row = long0 + place
                    in_row = out_row + step * LONG
                    right = tl.load(
                        gradient + origin + (out_row * long_stride)[:, None] + column_offset[None, :],
                        (out_row < long_size)[:, None] & usable[None, :],
                        0.0,
                    )
                    left = tl.load(
                        x + origin + (in_row * long_stride)[:, None] + (column_offset + offset * short_stride)[None, :],
                        ((in_row >= 0) & (in_row < long_size))[:, None] & touched[None, :],
                        0.0,
                    )
                    total = _dot(_rounded(left, PRECISION), tl.trans(_rounded(right, PRECISION)), total, PRECISION)
        row = place[None, :] + (tap - TAPS // 2 - step * LONG)[:, None]
        inside = (row >= 0) & (row < LONG)
        diagonals = tl.gather(total, tl.minimum(tl.maximum(row, 0), LONG - 1), 0)
        sums += tl.sum(tl.where(inside, diagonals, 0.0), 1)
    out += (split * channels + channel) * CHANNEL + tap * (1 if WIDE else ROW) + line * (ROW if WIDE else 1)
    tl.store(out, sums.to(out.dtype.element_ty), tap < TAPS)
