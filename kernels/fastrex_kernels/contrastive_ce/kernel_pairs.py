"""What the contrastive kernels share: which pairs of a tile count, as what, and the margin of a positive.

Rows and keys stand on whichever axis the caller has put them: all is broadcast.
"""

# Triton types the kernels.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Least sin(theta)^2 of ArcFace: its derivative divides by the sine, whose rounding takes over from here on.
LEAST_SINE_SQUARED = tl.constexpr(1e-6)


@triton.jit
def load_ids(id_ptr, instance_ptr, rows, mask, ignore_index):
    """Ids of rows or of keys, which image each is, and whether it takes part at all."""
    ids = tl.load(id_ptr + rows, mask=mask, other=0)
    instance = ids
    if instance_ptr is not None:
        instance = tl.load(instance_ptr + rows, mask=mask, other=0)
    return ids, instance, mask & (ids != ignore_index)


@triton.jit
def pairs(ids, instance, seen, key_ids, key_instance, key_seen, keys, private, HAS_INSTANCE: tl.constexpr):
    """Masks of the positive and of the negative pairs; ``keys`` are the keys' numbers."""
    counted = seen & key_seen
    if HAS_INSTANCE:
        counted = counted & (instance != key_instance)
    return counted & (ids == key_ids), counted & (ids != key_ids) & (keys >= private)


@triton.jit
def with_margin(c, margin, cosine, sine, MARGIN: tl.constexpr):
    """f(c) of a positive and, of ArcFace, f'(c), which is 1 of the others; ``cosine``, ``sine``: of the margin."""
    if MARGIN == 1:
        return c - margin, c
    if MARGIN == 2:
        squared = tl.maximum(1.0 - c * c, LEAST_SINE_SQUARED)
        inverse = tl.rsqrt(squared)
        straight = c < -cosine  # theta + margin would pass pi
        turn = tl.where(squared > LEAST_SINE_SQUARED, c * sine * inverse, 0.0)
        shown = tl.where(straight, c - margin * sine, c * cosine - squared * inverse * sine)
        return shown, tl.where(straight, 1.0, cosine + turn)
    return c, c
