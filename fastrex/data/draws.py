"""Random numbers that are functions of a counter, and crop boxes from random numbers; numpy only.

The random words come from Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Key:
the 64-bit seed. Counter: four 32-bit numbers, which say what is drawn.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def philox(counter: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Philox4x32-10: ``counter`` uint64 [4, ...], each below 2^32 -> four 32-bit random words, uint64 [4, ...]."""
    a, b, c, d = counter
    for turn in range(10):
        key_a = np.uint64((seed + turn * WEYL[0]) & 0xFFFFFFFF)
        key_b = np.uint64(((seed >> 32) + turn * WEYL[1]) & 0xFFFFFFFF)
        product_a, product_c = MULTIPLIERS[0] * a, MULTIPLIERS[1] * c
        a, b, c, d = (product_c >> HALF) ^ b ^ key_a, product_c & LOW, (product_a >> HALF) ^ d ^ key_b, product_a & LOW
    return np.stack((a, b, c, d))


def uniforms(counter: NDArray[np.uint64], seed: int) -> NDArray[np.float64]:
    """The words of :func:`philox` as numbers in [0, 1), multiples of 2^-32, float64 [4, ...]."""
    return np.ldexp(philox(counter, seed).astype(np.float64), -32)


def random_keys(
    seed: int, first: NDArray[np.int64], second: NDArray[np.int64] | int, epoch: int, purpose: int
) -> NDArray[np.uint64]:
    """A 64-bit key for each counter (first, second, epoch, purpose), uint64 [N]: sorting by them permutes at random."""
    keys = np.empty(len(first), np.uint64)
    second = np.broadcast_to(np.asarray(second), first.shape)
    for start in range(0, len(keys), 1 << 14):  # in pieces that stay in the processor's cache
        part = slice(start, start + (1 << 14))
        counter = np.empty((4, len(keys[part])), np.uint64)
        counter[0], counter[1], counter[2], counter[3] = first[part], second[part], epoch, purpose
        high, low, *_ = philox(counter, seed)
        keys[part] = high << HALF | low
    return keys


def try_boxes(
    uniforms: NDArray[np.float64],
    heights: NDArray[np.int64],
    widths: NDArray[np.int64],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """One try of torchvision's RandomResizedCrop per row, from ``uniforms`` [4, N] (area, log-ratio, top, left).

    Returns boxes int64 [N, 4] (top, left, height, width) and whether each fits its image (else it means nothing).
    """
    area = heights * widths * (scale[0] + (scale[1] - scale[0]) * uniforms[0])
    low, high = np.log(ratio)
    aspect = np.exp(low + (high - low) * uniforms[1])
    width = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    height = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    found = (width > 0) & (width <= widths) & (height > 0) & (height <= heights)
    top = (uniforms[2] * (heights - height + 1)).astype(np.int64)
    left = (uniforms[3] * (widths - width + 1)).astype(np.int64)
    return np.stack((top, left, height, width), 1), found


def central_boxes(
    heights: NDArray[np.int64], widths: NDArray[np.int64], ratio: tuple[float, float]
) -> NDArray[np.int64]:
    """torchvision's fallback: the largest centred box whose aspect ratio lies within ``ratio``, at least one pixel."""
    shape = widths / heights
    height = np.where(shape < ratio[0], np.rint(widths / ratio[0]), heights)
    width = np.where(shape > ratio[1], np.rint(heights * ratio[1]), widths)
    height, width = np.clip(height, 1, heights).astype(np.int64), np.clip(width, 1, widths).astype(np.int64)
    return np.stack(((heights - height) // 2, (widths - width) // 2, height, width), 1)
