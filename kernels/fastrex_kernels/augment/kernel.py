"""Triton kernels of the augmentation chain: three launches, and nothing is waited for on the host.

* ``level_kernel``: one program owns one row. It writes what the row's other programs need: the level of its contrast,
  for which it reads the image and applies the jitters that come before, and the taps of its blur. For a row without
  contrast it reads no pixel.
* ``pixel_kernel``: one program owns BLOCK_Y x BLOCK_X pixels of one row without blur, reads each once and writes it
  once: 3 bytes in, 2 or 4 per value out. For a row with blur it leaves at once.
* ``blur_kernel``: a fixed number of programs share the strips of STRIP lines of the rows with blur. For a strip and the
  lines within reach, a program computes what the blur sees and keeps it in scratch of its own, in fp32; it blurs that
  along y, in place, then along x, and writes the output. So an image is read (STRIP + 2 reach) / STRIP times, 1.4 at
  radius 2, and the scratch, of which such a strip touches 0.11 MiB at width 224, should stay in L2.

The parameters of a row choose between branches that all threads of a program take together: a step that is off costs
nothing. Sizes of grids and of scratch follow from shapes. A row's arithmetic does not depend on the other rows, nor
does the binary: Triton does not specialise on what differs between calls on the same row (N, strides, addresses).

Scratch: 256 bytes per row, and at most SCRATCH bytes for the blur, whatever N, unless a single program needs more.

Assumed: fewer than 2^31 bytes in an image, its width rounded up to 32. Parameters out of range give wrong pixels, never
a wrong address.
"""

# Triton types the kernels.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from .._op import INTERPRETED
from .._triton import Compile, cdiv, persistent_programs
from .kernel_pixels import (
    BLUR,
    COLUMNS,
    CONTRAST,
    FLIP,
    GRAY,
    LEVEL,
    SOLARIZE,
    TABLE,
    before_blur,
    clamp,
    full_of,
    jitter,
    load_pixels,
    luma,
    row_of,
    store_pixels,
    taps_of,
)

MAX_RADIUS = tl.constexpr(16.0)
MAX_REACH = 48
# Untuned: chosen by registers and by what the compiler makes of loads and stores; no GPU figure yet.
LEVEL_BLOCK, LEVEL_WARPS = 2048, 8
BLOCK_Y, BLOCK_X, PIXEL_WARPS = 32, 32, 4  # 224 and 96 are multiples of 32
# One pixel per thread where neighbours along x share no 16 bytes: more would lie apart by what one thread holds.
STRIP, BLUR_WARPS = 32, 8
BLUR_Y, BLUR_X = (32, 128) if INTERPRETED else (8, 32)
# Programs, as far as SCRATCH allows. More than an SM holds at a time would be a second round for a few of them.
BLUR_PER_SM, BLUR_REGISTERS = 3, 80
SCRATCH = 96 * 2**20


@triton.jit(do_not_specialize=["H", "W", "stride_image"], do_not_specialize_on_alignment=["image_ptr", "param_ptr"])
def level_kernel(image_ptr, param_ptr, table_ptr, H, W, stride_image, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    image_ptr += n * stride_image
    param_ptr += n * COLUMNS
    level = 0.0
    if tl.load(param_ptr + CONTRAST) != 1.0:
        row = row_of(param_ptr, 0.0, CHANNELS, True)
        total = tl.zeros((BLOCK,), tl.float32)
        start = 0
        while start < H * W:
            pixel = start + tl.arange(0, BLOCK)
            mask = pixel < H * W
            red, green, blue = load_pixels(image_ptr, pixel * 3, mask, CHANNELS)
            red, green, blue = jitter(red, green, blue, row, CHANNELS)
            if CHANNELS == 3:
                red = luma(red, green, blue)
            total += tl.where(mask, red, 0.0)
            start += BLOCK
        level = tl.floor(tl.sum(total, 0) / (H * W).to(tl.float32) + 0.5)
    column = tl.arange(0, TABLE)
    taps = taps_of(tl.minimum(tl.load(param_ptr + BLUR), MAX_RADIUS), column)
    tl.store(table_ptr + n * TABLE + column, tl.where(column == LEVEL, level, taps))


@triton.jit(
    do_not_specialize=["H", "W", "stride_image", "stride_out", "tiles", "columns"],
    do_not_specialize_on_alignment=["out_ptr", "image_ptr", "param_ptr"],
)
def pixel_kernel(
    out_ptr, image_ptr, param_ptr, table_ptr, H, W, stride_image, stride_out, tiles, columns,
    scale_0, scale_1, scale_2, shift_0, shift_1, shift_2,
    CHANNELS: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // tiles).to(tl.int64)
    param_ptr += n * COLUMNS
    if tl.load(param_ptr + BLUR) > 0.0:
        return
    tile = tl.program_id(0) % tiles
    y = (tile // columns * BLOCK_Y + tl.arange(0, BLOCK_Y))[:, None]
    x = (tile % columns * BLOCK_X + tl.arange(0, BLOCK_X))[None, :]
    mask = (y < H) & (x < W)
    flip, gray = tl.load(param_ptr + FLIP) != 0.0, tl.load(param_ptr + GRAY) != 0.0
    row = row_of(param_ptr, tl.load(table_ptr + n * TABLE + LEVEL), CHANNELS, False)
    red, green, blue = before_blur(image_ptr + n * stride_image, y, x, mask, W, flip, gray, row, CHANNELS)
    store_pixels(
        out_ptr + n * stride_out, (y * W + x) * CHANNELS, mask, red, green, blue, tl.load(param_ptr + SOLARIZE),
        (scale_0, scale_1, scale_2), (shift_0, shift_1, shift_2), CHANNELS,
    )  # fmt: skip


@triton.jit
def keep(at, red, green, blue, mask, CHANNELS: tl.constexpr, PITCH: tl.constexpr):
    tl.store(at, red, mask=mask)
    if CHANNELS == 3:
        tl.store(at + PITCH, green, mask=mask)
        tl.store(at + 2 * PITCH, blue, mask=mask)


@triton.jit
def convolve(
    line_ptr, place, last, taps_ptr, reach, mask, STRIDE: tl.constexpr, CHANNELS: tl.constexpr, PITCH: tl.constexpr
):
    """The blur at ``place`` of lines of values STRIDE apart, whose first and last values repeat beyond their ends."""
    red = tl.zeros(mask.shape, tl.float32)
    green = tl.zeros(mask.shape, tl.float32)
    blue = tl.zeros(mask.shape, tl.float32)
    distance = reach  # the smallest terms first: their sum is rounded at its own size
    while distance >= 0:
        weight = tl.load(taps_ptr + distance)
        one = line_ptr + tl.maximum(place - distance, 0) * STRIDE
        other = line_ptr + tl.minimum(place + distance, last) * STRIDE
        red += weight * (tl.load(one, mask=mask, other=0.0) + tl.load(other, mask=mask, other=0.0))
        if CHANNELS == 3:
            one += PITCH
            other += PITCH
            green += weight * (tl.load(one, mask=mask, other=0.0) + tl.load(other, mask=mask, other=0.0))
            one += PITCH
            other += PITCH
            blue += weight * (tl.load(one, mask=mask, other=0.0) + tl.load(other, mask=mask, other=0.0))
        distance -= 1
    return red, green, blue


@triton.jit(
    do_not_specialize=["N", "H", "W", "stride_image", "stride_out", "strips", "lines"],
    do_not_specialize_on_alignment=["out_ptr", "image_ptr", "param_ptr"],
)
def blur_kernel(
    out_ptr, image_ptr, param_ptr, table_ptr, scratch_ptr, N, H, W, stride_image, stride_out, strips, lines,
    scale_0, scale_1, scale_2, shift_0, shift_1, shift_2,
    CHANNELS: tl.constexpr, PITCH: tl.constexpr, STRIP: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    LINE: tl.constexpr = CHANNELS * PITCH  # of scratch: the planes of one line of pixels
    seen_ptr = scratch_ptr + tl.program_id(0).to(tl.int64) * lines * LINE
    item = tl.program_id(0)
    while item < N * strips:
        n = (item // strips).to(tl.int64)
        row_ptr = param_ptr + n * COLUMNS
        radius = tl.minimum(tl.load(row_ptr + BLUR), MAX_RADIUS)
        if radius > 0.0:
            taps_ptr = table_ptr + n * TABLE
            flip, gray = tl.load(row_ptr + FLIP) != 0.0, tl.load(row_ptr + GRAY) != 0.0
            threshold = tl.load(row_ptr + SOLARIZE)
            row = row_of(row_ptr, tl.load(taps_ptr + LEVEL), CHANNELS, False)
            reach = 3 * full_of(radius) + 3
            first = item % strips * STRIP
            end = tl.minimum(first + STRIP, H)
            low, high = tl.maximum(first - reach, 0), tl.minimum(end + reach, H)

            y0 = low
            while y0 < high:
                y = (y0 + tl.arange(0, BLOCK_Y))[:, None]
                for x0 in range(0, PITCH, BLOCK_X):
                    x = (x0 + tl.arange(0, BLOCK_X))[None, :]
                    red, green, blue = before_blur(
                        image_ptr + n * stride_image, y, x, (y < high) & (x < W), W, flip, gray, row, CHANNELS
                    )
                    at, mask = seen_ptr + (y - low) * LINE + x, tl.broadcast_to(y < high, (BLOCK_Y, BLOCK_X))
                    keep(at, red, green, blue, mask, CHANNELS, PITCH)
                y0 += BLOCK_Y
            tl.debug_barrier()  # what follows reads what other threads wrote

            # In place, column after column: a tile has all lines of the strip. No mask along x, and four values per
            # thread: loads and stores of 16 bytes.
            line = (first + tl.arange(0, STRIP))[:, None]
            live = tl.broadcast_to(line < end, (STRIP, BLOCK_X))
            for x0 in range(0, PITCH, BLOCK_X):
                column = (x0 + tl.arange(0, BLOCK_X))[None, :]
                reds, greens, blues = convolve(
                    seen_ptr - low * LINE + column, line, H - 1, taps_ptr, reach, live, LINE, CHANNELS, PITCH
                )
                tl.debug_barrier()  # nothing is overwritten that other threads have yet to read
                keep(seen_ptr + (line - first) * LINE + column, reds, greens, blues, live, CHANNELS, PITCH)
            tl.debug_barrier()

            y0 = first
            while y0 < end:
                y = (y0 + tl.arange(0, BLOCK_Y))[:, None]
                for x0 in range(0, PITCH, BLOCK_X):
                    x = (x0 + tl.arange(0, BLOCK_X))[None, :]
                    mask = (y < end) & (x < W)
                    red, green, blue = convolve(
                        seen_ptr + (y - first) * LINE, x, W - 1, taps_ptr, reach, mask, 1, CHANNELS, PITCH
                    )
                    store_pixels(
                        out_ptr + n * stride_out, (y * W + x) * CHANNELS, mask, clamp(red), clamp(green), clamp(blue),
                        threshold, (scale_0, scale_1, scale_2), (shift_0, shift_1, shift_2), CHANNELS,
                    )  # fmt: skip
                y0 += BLOCK_Y
            tl.debug_barrier()
        item += tl.num_programs(0)


def augment_(out: Tensor, images: Tensor, params: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
    """Launcher of ``fastrex::augment_``: three launches, whatever the parameters."""
    count, channels, height, width = out.shape
    pitch = cdiv(width, BLUR_X) * BLUR_X
    if 3 * height * pitch >= 2**31:
        raise ValueError(f"augment_: an image must have fewer than 2^31 bytes, got {height} x {width} x 3")
    if channels == 1:
        mean, std = [sum(mean) / 3] * 3, [sum(std) / 3] * 3
    scales = [1 / (255 * s) for s in std]
    shifts = [-m / s for m, s in zip(mean, std, strict=True)]
    columns = cdiv(width, BLOCK_X)
    tiles, strips = cdiv(height, BLOCK_Y) * columns, cdiv(height, STRIP)
    if count * max(tiles, strips) >= 2**31:
        raise ValueError(f"augment_: too many pixels for one call, got {count} x {height} x {width}")
    if count == 0:
        return
    lines = min(height, STRIP + 2 * MAX_REACH)
    share = lines * channels * pitch
    with torch.cuda.device_of(out):
        table = params.new_empty((count, TABLE.value))
        strides = (images.stride(0), out.stride(0))
        level_kernel[(count,)](
            images, params, table, height, width, strides[0],
            CHANNELS=channels, BLOCK=LEVEL_BLOCK, num_warps=LEVEL_WARPS,
        )  # fmt: skip
        pixel_kernel[(count * tiles,)](
            out, images, params, table, height, width, *strides, tiles, columns, *scales, *shifts,
            CHANNELS=channels, BLOCK_Y=BLOCK_Y, BLOCK_X=BLOCK_X, num_warps=PIXEL_WARPS,
        )  # fmt: skip
        programs = min(count * strips, persistent_programs(4 * share, SCRATCH, BLUR_PER_SM, out.device))
        scratch = params.new_empty((programs * share,))
        blur_kernel[(programs,)](
            out, images, params, table, scratch, count, height, width, *strides, strips, lines, *scales, *shifts,
            CHANNELS=channels, PITCH=pitch, STRIP=STRIP, BLOCK_Y=BLUR_Y, BLOCK_X=BLUR_X, num_warps=BLUR_WARPS,
        )  # fmt: skip
    # The kernels write behind autograd's back: a backward that still needs an old value must notice.
    increment_version([out])


_NUMBERS = dict.fromkeys(("N", "H", "W", "stride_image", "stride_out", "tiles", "columns", "strips", "lines"), "i32")
_FACTORS = {f"{name}_{channel}": "fp32" for name in ("scale", "shift") for channel in range(3)}
_INPUTS = {"image_ptr": "*u8"} | dict.fromkeys(("param_ptr", "table_ptr", "scratch_ptr"), "*fp32")


def _compile(name: str, kernel: Any, out: str, constants: dict[str, int], num_warps: int, limit: int = 96) -> Compile:
    kinds = _INPUTS | _NUMBERS | _FACTORS | {"out_ptr": out}
    signature = {argument: kinds[argument] for argument in kernel.arg_names if argument not in constants}
    return Compile(name, kernel, signature, constants, num_warps, max_registers=limit)


AOT = (
    _compile("levels and taps", level_kernel, "", {"CHANNELS": 3, "BLOCK": LEVEL_BLOCK}, LEVEL_WARPS),
    _compile(
        "rows without blur in bf16", pixel_kernel, "*bf16",
        {"CHANNELS": 3, "BLOCK_Y": BLOCK_Y, "BLOCK_X": BLOCK_X}, PIXEL_WARPS,
    ),
    *(
        _compile(
            f"rows with blur, {channels} channels of width {width} in {out}", blur_kernel, f"*{out}",
            {"CHANNELS": channels, "PITCH": width, "STRIP": STRIP, "BLOCK_Y": BLUR_Y, "BLOCK_X": BLUR_X}, BLUR_WARPS,
            BLUR_REGISTERS,
        )
        for channels, width, out in ((3, 224, "bf16"), (1, 96, "fp32"))
    ),
)  # fmt: skip
