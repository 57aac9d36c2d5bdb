"""Triton kernels over the rows: output, and the backward's sums and gradients. See ``kernel.py`` for the formulas.

* ``forward_kernel``: a program owns BLOCK_C columns and every n-th tile of BLOCK_R lines. It first joins the partial
  moments of its columns, in the same order as all others, which saves a launch; then it reads x and the residual once,
  and writes y and the mask.
* ``sums_kernel`` and ``backward_kernel``: likewise for sum(g) and sum(g d), [2, parts, width], then dx and dresidual.

The second pass of each direction goes through memory backwards: what the first read last may still be in the cache.
"""

# Triton types the kernels.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from .kernel_statistics import channels_of, given, joined, tile_at

# How the backward knows what the ReLU let through: everything, what the forward computed from x alone, or the mask.
NONE, RECOMPUTED, STORED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def normalisation(mean, var, weight_ptr, bias_ptr, channels, inside, eps):
    """The fp32 part of the mean, scale and shift; the same bits in every kernel: nothing here is left to contract."""
    high = mean.to(tl.float32)
    scale = tl.load(weight_ptr + channels, mask=inside, other=0.0).to(tl.float64) / tl.sqrt(var + eps)
    bias = tl.load(bias_ptr + channels, mask=inside, other=0.0).to(tl.float64)
    shift = tl.fma(high.to(tl.float64) - mean, scale, bias)
    return high, scale.to(tl.float32), shift.to(tl.float32)


@triton.jit
def passes(rounded):
    """What torch's ReLU lets through: results that round to zero do not pass, a NaN does."""
    return ~(rounded.to(tl.float32) <= 0.0)


@triton.jit
def mask_at(start, first_column, rows, width, total, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets of a tile's bytes of the mask, and which of them exist."""
    lines = start + tl.arange(0, BLOCK_R)
    columns = first_column // 8 + tl.arange(0, BLOCK_C // 8)
    at = lines.to(tl.int64)[:, None] * (width // 8) + columns[None, :]
    return at, (lines < rows)[:, None] & (columns < width // 8)[None, :] & (at * 8 < total)


@triton.jit
def gated(
    g, d, scale, shift, bits_ptr, start, first_column, rows, width, total, dtype: tl.constexpr,
    GATE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient behind the ReLU."""
    if GATE == RECOMPUTED:
        g = tl.where(passes(tl.fma(d, scale[None, :], shift[None, :]).to(dtype)), g, 0.0)
    if GATE == STORED:
        at, inside = mask_at(start, first_column, rows, width, total, BLOCK_R, BLOCK_C)
        bits = tl.load(bits_ptr + at, mask=inside, other=0).to(tl.int32)
        bits = (bits[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
        g = tl.where(tl.reshape(bits, (BLOCK_R, BLOCK_C)) != 0, g, 0.0)
    return g


@triton.jit(do_not_specialize=["rows", "samples", "parts"])
def forward_kernel(
    x_ptr, residual_ptr, y_ptr, bits_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, partial_ptr,
    total, rows, width, C, samples, parts, eps,
    RELU: tl.constexpr, FOLD: tl.constexpr, RAGGED: tl.constexpr, ENTRIES: tl.constexpr, MOMENTS_R: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(1)
    first_column = tl.program_id(0) * BLOCK_C
    columns = first_column + tl.arange(0, BLOCK_C)
    exists = columns < width
    channels = channels_of(columns, C, FOLD)
    if partial_ptr is not None:
        mean, var = joined(partial_ptr, channels, exists, parts, rows, width, C, samples, FOLD, RAGGED,
                           ENTRIES, MOMENTS_R)  # fmt: skip
        var /= samples.to(tl.float64)
        own = (columns < C) & (pid == 0)
        tl.store(mean_ptr + columns, mean, mask=own)
        tl.store(var_ptr + columns, var, mask=own)
    else:
        mean, var = given(mean_ptr, var_ptr, channels, exists)
    high, scale, shift = normalisation(mean, var, weight_ptr, bias_ptr, channels, exists, eps)

    tiles = tl.cdiv(rows, BLOCK_R)
    for tile in range(pid, tiles, tl.num_programs(1)):
        start = (tiles - 1 - tile) * BLOCK_R
        at, inside = tile_at(start, columns, rows, width, total, RAGGED, BLOCK_R)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        y = tl.fma(x - high[None, :], scale[None, :], shift[None, :])
        if residual_ptr is not None:
            y += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        y = y.to(y_ptr.dtype.element_ty)
        if RELU:
            passed = passes(y)
            y = tl.where(passed, y, 0.0)
            if bits_ptr is not None:
                bits = tl.reshape((passed & inside).to(tl.int32), (BLOCK_R, BLOCK_C // 8, 8))
                bits = tl.sum(bits << tl.arange(0, 8)[None, None, :], 2)
                byte, whole = mask_at(start, first_column, rows, width, total, BLOCK_R, BLOCK_C)
                tl.store(bits_ptr + byte, bits.to(tl.uint8), mask=whole)
        tl.store(y_ptr + at, y, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def sums_kernel(
    grad_ptr, x_ptr, bits_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, partial_ptr, total, rows, width, C, eps,
    GATE: tl.constexpr, FOLD: tl.constexpr, RAGGED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    part, parts = tl.program_id(1), tl.num_programs(1)
    first_column = tl.program_id(0) * BLOCK_C
    columns = first_column + tl.arange(0, BLOCK_C)
    exists = columns < width
    channels = channels_of(columns, C, FOLD)
    mean, var = given(mean_ptr, var_ptr, channels, exists)
    high, scale, shift = normalisation(mean, var, weight_ptr, bias_ptr, channels, exists, eps)
    sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    products = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for tile in range(part, tl.cdiv(rows, BLOCK_R), parts):
        start = tile * BLOCK_R
        at, inside = tile_at(start, columns, rows, width, total, RAGGED, BLOCK_R)
        g = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) - high[None, :]
        g = gated(g, d, scale, shift, bits_ptr, start, first_column, rows, width, total, x_ptr.dtype.element_ty,
                  GATE, BLOCK_R, BLOCK_C)  # fmt: skip
        sums += g
        products += g * d
    out = partial_ptr + part.to(tl.int64) * width + columns
    tl.store(out, tl.sum(sums, 0), mask=exists)
    tl.store(out + parts.to(tl.int64) * width, tl.sum(products, 0), mask=exists)


@triton.jit(do_not_specialize=["rows", "samples", "parts"])
def backward_kernel(
    grad_ptr, x_ptr, bits_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, partial_ptr, sums_ptr, count_ptr,
    dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr, total, rows, width, C, samples, parts, eps,
    GATE: tl.constexpr, BATCH: tl.constexpr, FOLD: tl.constexpr, RAGGED: tl.constexpr, ENTRIES: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(1)
    first_column = tl.program_id(0) * BLOCK_C
    columns = first_column + tl.arange(0, BLOCK_C)
    exists = columns < width
    channels = channels_of(columns, C, FOLD)
    mean, var = given(mean_ptr, var_ptr, channels, exists)
    high, scale, shift = normalisation(mean, var, weight_ptr, bias_ptr, channels, exists, eps)
    rest = mean - high.to(tl.float64)
    if partial_ptr is not None:
        entry = tl.arange(0, ENTRIES)
        known = (entry < parts * FOLD)[:, None] & exists[None, :]
        source = partial_ptr + entry.to(tl.int64)[:, None] * C + channels[None, :]
        sum_g = tl.sum(tl.load(source, mask=known, other=0.0), 0).to(tl.float64)
        sum_gd = tl.sum(tl.load(source + parts.to(tl.int64) * width, mask=known, other=0.0), 0).to(tl.float64)
        sum_gd -= rest * sum_g
        own = (columns < C) & (pid == 0)
        tl.store(dweight_ptr + columns, (sum_gd / tl.sqrt(var + eps)).to(tl.float32), mask=own)
        tl.store(dbias_ptr + columns, sum_g.to(tl.float32), mask=own)
        if sums_ptr is not None:
            tl.store(sums_ptr + columns, sum_g, mask=own)
            tl.store(sums_ptr + C + columns, sum_gd, mask=own)
    else:
        sum_g = tl.load(sums_ptr + channels, mask=exists, other=0.0)
        sum_gd = tl.load(sums_ptr + C + channels, mask=exists, other=0.0)
    if BATCH:
        count = tl.load(count_ptr) if count_ptr is not None else samples.to(tl.float64)
        step = sum_gd / (count * (var + eps))
        slope = step.to(tl.float32)
        offset = (sum_g / count - step * rest).to(tl.float32)

    if (dx_ptr is not None) or (dresidual_ptr is not None):
        tiles = tl.cdiv(rows, BLOCK_R)
        for tile in range(pid, tiles, tl.num_programs(1)):
            start = (tiles - 1 - tile) * BLOCK_R
            at, inside = tile_at(start, columns, rows, width, total, RAGGED, BLOCK_R)
            g = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
            d = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) - high[None, :]
            g = gated(g, d, scale, shift, bits_ptr, start, first_column, rows, width, total, x_ptr.dtype.element_ty,
                      GATE, BLOCK_R, BLOCK_C)  # fmt: skip
            if dresidual_ptr is not None:
                tl.store(dresidual_ptr + at, g.to(dresidual_ptr.dtype.element_ty), mask=inside)
            if dx_ptr is not None:
                if BATCH:
                    g -= tl.fma(d, slope[None, :], offset[None, :])
                tl.store(dx_ptr + at, (g * scale[None, :]).to(dx_ptr.dtype.element_ty), mask=inside)
