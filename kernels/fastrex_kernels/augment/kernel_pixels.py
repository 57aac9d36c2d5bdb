"""The steps of the augmentation chain as Triton functions: what happens to a tile of pixels in registers, and the taps
of a blur. All values are fp32 on the scale 0..255, and clamped to it after each jitter and after the blur.

Where ``CHANNELS`` is 1 the grey of a pixel takes the place of its red, and green and blue are never computed.
"""

# Triton types the kernels.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

# Columns of the parameters.
COLUMNS = tl.constexpr(9)
FLIP, ORDER, BRIGHTNESS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
CONTRAST, SATURATION, HUE = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)
GRAY, BLUR, SOLARIZE = tl.constexpr(6), tl.constexpr(7), tl.constexpr(8)
# Columns of the table that is written for each row: taps 0 to 48 of its blur, and the level of its contrast.
TABLE = tl.constexpr(64)
LEVEL = tl.constexpr(63)


@triton.jit
def clamp(x):
    return tl.minimum(tl.maximum(x, 0.0), 255.0)


@triton.jit
def luma(red, green, blue):
    """ITU-R 601-2, as Pillow's mode L, not rounded."""
    return 0.299 * red + 0.587 * green + 0.114 * blue


@triton.jit
def load_pixels(image_ptr, offset, mask, CHANNELS: tl.constexpr):
    red = tl.load(image_ptr + offset, mask=mask, other=0).to(tl.float32)
    green = tl.load(image_ptr + offset + 1, mask=mask, other=0).to(tl.float32)
    blue = tl.load(image_ptr + offset + 2, mask=mask, other=0).to(tl.float32)
    if CHANNELS == 1:
        red = luma(red, green, blue)
    return red, green, blue


@triton.jit
def rotate_hue(red, green, blue, turns):
    """Value and chroma stay, so a channel is ``low + chroma * trapezium(hue)``."""
    high = tl.maximum(tl.maximum(red, green), blue)
    low = tl.minimum(tl.minimum(red, green), blue)
    chroma = high - low
    inverse = 1.0 / tl.maximum(chroma, 1e-6)  # where chroma is 0 the hue does not matter
    hue = tl.where(high == green, (blue - red) * inverse + 2.0, (red - green) * inverse + 4.0)
    hue = tl.where(high == red, (green - blue) * inverse, hue) + turns * 6.0
    hue = hue - 6.0 * tl.floor(hue * (1 / 6))
    red = low + chroma * tl.minimum(tl.maximum(tl.abs(hue - 3.0) - 1.0, 0.0), 1.0)
    green = low + chroma * tl.minimum(tl.maximum(2.0 - tl.abs(hue - 2.0), 0.0), 1.0)
    blue = low + chroma * tl.minimum(tl.maximum(2.0 - tl.abs(hue - 4.0), 0.0), 1.0)
    return clamp(red), clamp(green), clamp(blue)


@triton.jit
def steps_of(param_ptr, CHANNELS: tl.constexpr, BEFORE_CONTRAST: tl.constexpr):
    """The row's jitters in its own order, four bits each: 0 to 3 as in the parameters, 4 for one that is off."""
    live = (tl.load(param_ptr + BRIGHTNESS) != 1.0).to(tl.int32)
    live += (tl.load(param_ptr + CONTRAST) != 1.0).to(tl.int32) * 2
    if CHANNELS == 3:
        live += (tl.load(param_ptr + SATURATION) != 1.0).to(tl.int32) * 4
        live += (tl.load(param_ptr + HUE) != 0.0).to(tl.int32) * 8
    # Permutations in lexicographic order: the digits of the index say which of those left comes next.
    order = tl.minimum(tl.maximum(tl.load(param_ptr + ORDER), 0.0), 23.0).to(tl.int32)
    left = 0x3210
    steps = 0
    for position in tl.static_range(4):
        weight = 6 if position == 0 else 2 if position == 1 else 1
        shift = order // weight * 4
        order = order % weight
        step = (left >> shift) & 15
        below = (1 << shift) - 1
        left = (left & below) | ((left >> 4) & ~below)
        if BEFORE_CONTRAST:
            live = tl.where(step == 1, 0, live)
        steps |= tl.where(((live >> step) & 1) != 0, step, 4) << (4 * position)
    return steps


@triton.jit
def row_of(param_ptr, level, CHANNELS: tl.constexpr, BEFORE_CONTRAST: tl.constexpr):
    """What ``jitter`` needs to know about a row."""
    return (
        steps_of(param_ptr, CHANNELS, BEFORE_CONTRAST), tl.load(param_ptr + BRIGHTNESS), tl.load(param_ptr + CONTRAST),
        tl.load(param_ptr + SATURATION), tl.load(param_ptr + HUE), level,
    )  # fmt: skip


@triton.jit
def jitter(red, green, blue, row, CHANNELS: tl.constexpr):
    """The row's jitters, one after another; every branch is the whole program's."""
    for position in range(4):
        step = (row[0] >> (4 * position)) & 15
        if step == 0:
            red = clamp(red * row[1])
            if CHANNELS == 3:
                green = clamp(green * row[1])
                blue = clamp(blue * row[1])
        elif step == 1:
            shift = (1.0 - row[2]) * row[5]
            red = clamp(red * row[2] + shift)
            if CHANNELS == 3:
                green = clamp(green * row[2] + shift)
                blue = clamp(blue * row[2] + shift)
        if CHANNELS == 3:
            if step == 2:
                gray = (1.0 - row[3]) * luma(red, green, blue)
                red = clamp(red * row[3] + gray)
                green = clamp(green * row[3] + gray)
                blue = clamp(blue * row[3] + gray)
            elif step == 3:
                red, green, blue = rotate_hue(red, green, blue, row[4])
    return red, green, blue


@triton.jit
def before_blur(image_ptr, y, x, mask, W, flip, gray, row, CHANNELS: tl.constexpr):
    """The pixels (y, x) of the output after all that looks at one pixel alone and comes before the blur."""
    red, green, blue = load_pixels(image_ptr, (y * W + tl.where(flip, W - 1 - x, x)) * 3, mask, CHANNELS)
    red, green, blue = jitter(red, green, blue, row, CHANNELS)
    if CHANNELS == 3:  # noqa: SIM102 - one known when compiling, the other on the device
        if gray:
            red = luma(red, green, blue)
            green = red
            blue = red
    return red, green, blue


@triton.jit
def store_pixels(out_ptr, offset, mask, red, green, blue, threshold, scales, shifts, CHANNELS: tl.constexpr):
    """Solarises, normalises and writes; nothing is at or above a threshold of 256."""
    kind = out_ptr.dtype.element_ty
    red = tl.where(red >= threshold, 255.0 - red, red)
    tl.store(out_ptr + offset, (red * scales[0] + shifts[0]).to(kind), mask=mask)
    if CHANNELS == 3:
        green = tl.where(green >= threshold, 255.0 - green, green)
        tl.store(out_ptr + offset + 1, (green * scales[1] + shifts[1]).to(kind), mask=mask)
        blue = tl.where(blue >= threshold, 255.0 - blue, blue)
        tl.store(out_ptr + offset + 2, (blue * scales[2] + shifts[2]).to(kind), mask=mask)


@triton.jit
def full_of(radius):
    """Up to which distance the box of a blur has weight 1: the largest l with l (l + 1) <= radius^2."""
    return tl.floor((tl.sqrt_rn(4.0 * radius * radius + 1.0) - 1.0) * 0.5).to(tl.int32)


@triton.jit
def pairs(n):
    """In how many ways three whole numbers add up to n."""
    n = tl.maximum(n, -1)
    return (n + 1) * (n + 2) // 2


@triton.jit
def triples(n, a, b, c):
    """In how many ways whole numbers below a, b and c add up to n."""
    fewer = pairs(n - a) + pairs(n - b) + pairs(n - c)
    return pairs(n) - fewer + pairs(n - a - b) + pairs(n - a - c) + pairs(n - b - c) - pairs(n - a - b - c)


@triton.jit
def taps_of(radius, distance):
    """The weights at ``distance`` (0 to at least 48) of three boxes, each 1 up to ``full`` and ``rim`` beyond, so that
    its variance is radius^2 / 3.

    Such a box is (1 - rim) times one of length 2 full + 1 and rim times the next longer one, so three of them are a
    sum of counts, which are exact, with weights that are not negative: no cancellation. Half the weight at distance 0,
    which is its own mirror image. Divided by their own sum, or what they all err by would make images brighter.
    """
    full = full_of(radius)
    length = 2 * full + 1
    inner, square = full.to(tl.float32), radius * radius
    rim = (2.0 * inner + 1.0) * (inner * (inner + 1.0) - square) / (2.0 * square - 6.0 * (inner + 1.0) * (inner + 1.0))
    rest = 1.0 - rim
    top = 3 * full - distance
    taps = rest * rest * rest * triples(top, length, length, length).to(tl.float32)
    taps += 3.0 * rest * rest * rim * triples(top + 1, length, length, length + 2).to(tl.float32)
    taps += 3.0 * rest * rim * rim * triples(top + 2, length, length + 2, length + 2).to(tl.float32)
    taps += rim * rim * rim * triples(top + 3, length + 2, length + 2, length + 2).to(tl.float32)
    taps = tl.where(distance == 0, 0.5 * taps, taps)
    return taps / (2.0 * tl.sum(taps, 0))
