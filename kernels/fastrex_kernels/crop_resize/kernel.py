"""Triton kernel that cuts and resizes all crops of a batch in one launch, bit for bit as Pillow's bicubic filter. In
each direction, first along x, a value is a sum over a window of the box, in integers, rounded to 8 bits:

    clip((2^21 + sum_t c(t) v(t)) >> 22),   c = round(2^22 f((t + 1/2 - centre) / max(scale, 1)) / sum_t f(...))

A fixed number of programs share the strips of STRIP lines of the crops. For a strip, a program computes the
coefficients of all its columns and lines, in fp64 and Pillow's order of operations, filters the lines of the box within
reach along x, and then along y. Coefficients and filtered lines lie in scratch of its own, about 0.1 MiB at side 224,
which should stay in L1 and L2. So the box is read from memory about once, (STRIP + 4) / STRIP times where the scale is
1 or more, and the output is written once.

Where a direction needs no scaling the coefficients are 0 and 2^22, and the pass that Pillow leaves out changes nothing.

Scratch: at most SCRATCH bytes, whatever N, unless a single program needs more.

Assumed: boxes lie inside their images; compiled without fused multiply-adds, which would round otherwise than Pillow.
"""

# Triton types the kernels.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from .._triton import Compile, cdiv, next_power_of_2, persistent_programs

BITS = tl.constexpr(22)  # of a coefficient behind the binary point
ONE, HALF = tl.constexpr(2.0**22), tl.constexpr(2**21)
# Untuned: chosen by registers (at most 80, so that an SM holds PER_SM programs) and by what the compiler makes of loads
# and stores; no GPU figure yet. More programs than the GPU holds at a time would be a second round for a few.
STRIP, WARPS = 32, 8
BLOCK_Y, BLOCK_X, BLOCK_J = 16, 32, 64  # along y a thread has four neighbouring bytes: one load
PER_SM = 3  # programs, as far as SCRATCH allows
SCRATCH = 128 * 2**20


@triton.jit
def window(place, size, SIDE: tl.constexpr):
    """First and last + 1 value that an output sees, the centre of its window, and how far the filter is stretched."""
    scale = size.to(tl.float64) / SIDE
    stretch = tl.maximum(scale, 1.0)
    centre = (place.to(tl.float64) + 0.5) * scale
    low = tl.maximum((centre - 2.0 * stretch + 0.5).to(tl.int32), 0)
    high = tl.minimum((centre + 2.0 * stretch + 0.5).to(tl.int32), size)
    return low, high, centre, stretch


@triton.jit
def cubic(x):
    """Keys' cubic with a = -1/2."""
    x = tl.abs(x)
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return tl.where(x < 1.0, (1.5 * x - 2.5) * x * x + 1.0, tl.where(x < 2.0, far, 0.0))


@triton.jit
def taps_of(size, SIDE: tl.constexpr):
    """No window is longer."""
    return 2 * tl.maximum((2 * size + SIDE - 1) // SIDE, 2) + 1


@triton.jit
def rounded(total):
    return tl.minimum(tl.maximum(total >> BITS, 0), 255).to(tl.uint8)


@triton.jit(do_not_specialize=["N", "images", "taps", "lines"])
def crop_kernel(
    out_ptr, image_ptr, box_ptr, weight_ptr, line_ptr, N, images, stride_out, taps, lines,
    SIDE: tl.constexpr, PLACES: tl.constexpr, PITCH: tl.constexpr, STRIP: tl.constexpr,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    STRIPS: tl.constexpr = (SIDE + STRIP - 1) // STRIP
    weight_ptr += tl.program_id(0).to(tl.int64) * taps * PLACES
    line_ptr += tl.program_id(0).to(tl.int64) * lines * PITCH
    item = tl.program_id(0)
    while item < N * STRIPS:
        n = (item // STRIPS).to(tl.int64)
        first = item % STRIPS * STRIP
        last = tl.minimum(first + STRIP, SIDE) - 1
        source_ptr = image_ptr + n % images * 2
        stride = tl.load(source_ptr + 1)
        top, left = tl.load(box_ptr + n * 4), tl.load(box_ptr + n * 4 + 1)
        height, width = tl.load(box_ptr + n * 4 + 2), tl.load(box_ptr + n * 4 + 3)
        low, _, _, _ = window(first, height, SIDE)
        _, high, _, _ = window(last, height, SIDE)
        # Where the first line starts that this strip needs.
        corner = tl.load(source_ptr) + (top + low).to(tl.int64) * stride + left.to(tl.int64) * 3
        x_taps, y_taps = taps_of(width, SIDE), taps_of(height, SIDE)

        # Places are the columns 0 to SIDE - 1, and then the lines of the strip.
        place = tl.arange(0, PLACES)
        size = tl.where(place < SIDE, width, height)
        which = tl.where(place < SIDE, place, tl.minimum(first + place - SIDE, last))
        start, end, centre, stretch = window(which, size, SIDE)
        inverse = 1.0 / stretch
        total = tl.zeros((PLACES,), tl.float64)
        t = 0
        while t < tl.maximum(x_taps, y_taps):
            value = cubic(((start + t).to(tl.float64) - centre + 0.5) * inverse)
            total += tl.where(start + t < end, value, 0.0)
            t += 1
        t = 0
        while t < tl.maximum(x_taps, y_taps):
            value = cubic(((start + t).to(tl.float64) - centre + 0.5) * inverse) / total * ONE
            value = tl.where(start + t < end, value, 0.0)
            value = tl.where(value < 0.0, value - 0.5, value + 0.5)
            tl.store(weight_ptr + t * PLACES + place, value.to(tl.int32))
            t += 1
        tl.debug_barrier()  # what follows reads what other threads wrote

        for x0 in range(0, SIDE, BLOCK_X):
            x = (x0 + tl.arange(0, BLOCK_X))[None, :]
            begin, _, _, _ = window(tl.minimum(x, SIDE - 1), width, SIDE)
            y0 = 0
            while y0 < high - low:
                y = (y0 + tl.arange(0, BLOCK_Y))[:, None]
                mask = (y < high - low) & (x < SIDE)
                at = corner.to(tl.pointer_type(tl.uint8)) + y.to(tl.int64) * stride
                red = tl.full((BLOCK_Y, BLOCK_X), HALF, tl.int32)
                green = tl.full((BLOCK_Y, BLOCK_X), HALF, tl.int32)
                blue = tl.full((BLOCK_Y, BLOCK_X), HALF, tl.int32)
                t = 0
                while t < x_taps:
                    weight = tl.load(weight_ptr + t * PLACES + x)
                    pixel = at + tl.minimum(begin + t, width - 1) * 3  # behind the window the weight is 0
                    red += weight * tl.load(pixel, mask=mask, other=0).to(tl.int32)
                    green += weight * tl.load(pixel + 1, mask=mask, other=0).to(tl.int32)
                    blue += weight * tl.load(pixel + 2, mask=mask, other=0).to(tl.int32)
                    t += 1
                to = line_ptr + y * PITCH + x * 3
                tl.store(to, rounded(red), mask=mask)
                tl.store(to + 1, rounded(green), mask=mask)
                tl.store(to + 2, rounded(blue), mask=mask)
                y0 += BLOCK_Y
        tl.debug_barrier()

        k0 = 0
        while first + k0 <= last:
            k = (k0 + tl.arange(0, BLOCK_Y))[:, None]
            begin, _, _, _ = window(tl.minimum(first + k, last), height, SIDE)
            for j0 in range(0, 3 * SIDE, BLOCK_J):
                j = (j0 + tl.arange(0, BLOCK_J))[None, :]
                live = (first + k <= last) & (j < 3 * SIDE)
                sums = tl.full((BLOCK_Y, BLOCK_J), HALF, tl.int32)
                t = 0
                while t < y_taps:
                    weight = tl.load(weight_ptr + t * PLACES + SIDE + k)
                    line = tl.minimum(begin + t, high - 1) - low
                    sums += weight * tl.load(line_ptr + line * PITCH + j, mask=live, other=0).to(tl.int32)
                    t += 1
                tl.store(out_ptr + n * stride_out + (first + k) * (3 * SIDE) + j, rounded(sums), mask=live)
            k0 += BLOCK_Y
        tl.debug_barrier()  # the next strip overwrites what these read
        item += tl.num_programs(0)


def crop_resize_(out: Tensor, images: Sequence[Tensor], boxes: Tensor) -> None:
    """Launcher of ``fastrex::crop_resize_``: one launch, and one table of addresses and boxes that goes to the GPU."""
    count, side = out.shape[:2]
    strips = cdiv(side, STRIP)
    if count * strips >= 2**31:
        raise ValueError(f"crop_resize_: too many crops for one call, got {count} of side {side}")
    if count == 0:
        return
    tallest, widest = boxes[:, 2:].amax(0).tolist()
    taps = 2 * max(cdiv(2 * max(tallest, widest), side), 2) + 1
    # No strip sees more lines: what its centres span, the reach of the filter at both ends, and their rounding.
    lines = min(tallest, cdiv(min(STRIP, side) * tallest, side) + 2 * max(cdiv(2 * tallest, side), 2) + 2)
    places, pitch = next_power_of_2(side + STRIP), cdiv(3 * side, 16) * 16
    with torch.cuda.device_of(out):
        addresses, table = _send(images, boxes, out.device)
        programs = min(
            count * strips, persistent_programs(4 * taps * places + lines * pitch, SCRATCH, PER_SM, out.device)
        )
        weights = torch.empty((programs * taps * places,), dtype=torch.int32, device=out.device)
        filtered = torch.empty((programs * lines * pitch,), dtype=torch.uint8, device=out.device)
        crop_kernel[(programs,)](
            out, addresses, table, weights, filtered, count, len(images), out.stride(0), taps, lines,
            SIDE=side, PLACES=places, PITCH=pitch, STRIP=STRIP,
            BLOCK_Y=BLOCK_Y, BLOCK_X=BLOCK_X, BLOCK_J=BLOCK_J, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    # The kernel writes behind autograd's back: a backward that still needs an old value must notice.
    increment_version([out])


def _send(images: Sequence[Tensor], boxes: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Address and line stride of each image, int64 [B, 2], and the boxes, both on the device after one copy."""
    numbers = array("q", chain.from_iterable((image.data_ptr(), image.stride(0)) for image in images))
    host = torch.empty((len(numbers) + 2 * len(boxes),), dtype=torch.int64, pin_memory=device.type == "cuda")
    host[: len(numbers)] = torch.frombuffer(numbers, dtype=torch.int64)
    host[len(numbers) :].view(torch.int32).view(-1, 4).copy_(boxes)
    table = host.to(device, non_blocking=True)
    return table[: len(numbers)], table[len(numbers) :].view(torch.int32)


AOT = tuple(
    Compile(
        f"crops of side {side}",
        crop_kernel,
        {"out_ptr": "*u8", "image_ptr": "*i64", "box_ptr": "*i32", "weight_ptr": "*i32", "line_ptr": "*u8"}
        | dict.fromkeys(("N", "images", "stride_out", "taps", "lines"), "i32"),
        {"SIDE": side, "PLACES": places, "PITCH": 3 * side, "STRIP": STRIP}
        | {"BLOCK_Y": BLOCK_Y, "BLOCK_X": BLOCK_X, "BLOCK_J": BLOCK_J},
        num_warps=WARPS,
        max_registers=80,
    )
    for side, places in ((224, 256), (96, 128))
)
