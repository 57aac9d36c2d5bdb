"""Triton kernels of the statistics: moments of the rows, the ranks' joined batch, running statistics.

Lines, columns and partials are those of ``kernel.py``, which also launches what is here.

* ``moments_kernel``: a program owns BLOCK_C columns and every parts-th tile of BLOCK_R lines; it reads x once, and per
  column writes its mean (as a sum of two fp32) and centred second moment, [3, parts, width].
* ``slot_kernel``, ``join_kernel``, ``track_kernel``: a few numbers per channel, for groups and running statistics.

Moments are taken about the mean of a program's first tile and joined about the first part's mean (Chan, Golub and
LeVeque 1979), so that a large mean costs nothing, in fp32; a channel's last few numbers are fp64.
"""

# Triton types the kernels.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_at(start, columns, rows, width, total, RAGGED: tl.constexpr, BLOCK_R: tl.constexpr):
    """Offsets of a tile's elements, and which of them exist."""
    lines = start + tl.arange(0, BLOCK_R)
    at = lines.to(tl.int64)[:, None] * width + columns[None, :]
    inside = (lines < rows)[:, None] & (columns < width)[None, :]
    if RAGGED:
        inside = inside & (at < total)
    return at, inside


@triton.jit
def channels_of(columns, C, FOLD: tl.constexpr):
    if FOLD == 1:
        return columns
    return columns % C


@triton.jit
def owned_lines(part, parts, rows, BLOCK_R: tl.constexpr):
    """Number of lines in the tiles of a part, and whether the last line is among them."""
    tiles = tl.cdiv(rows, BLOCK_R)
    lines = (tiles - part + parts - 1) // parts * BLOCK_R
    last = part == (tiles - 1) % parts
    return tl.where(last, lines - tiles * BLOCK_R + rows, lines), last


@triton.jit
def joined(
    partial_ptr, channels, inside, parts, rows, width, C, samples,
    FOLD: tl.constexpr, RAGGED: tl.constexpr, ENTRIES: tl.constexpr, MOMENTS_R: tl.constexpr,
):  # fmt: skip
    """Mean and centred second moment (fp64) of channels from the partials."""
    entry = tl.arange(0, ENTRIES)
    part = entry // FOLD
    count, last = owned_lines(part, parts, rows, MOMENTS_R)
    if RAGGED:
        count = tl.where(last & (entry % FOLD >= samples % FOLD), count - 1, count)
    count = tl.where(part < parts, count, 0).to(tl.float32)[:, None]
    at = entry.to(tl.int64)[:, None] * C + channels[None, :]
    mask = (part < parts)[:, None] & inside[None, :]
    plane = parts.to(tl.int64) * width
    # All means are near the first: their differences are exact enough in fp32.
    pivot = tl.load(partial_ptr + channels, mask=inside, other=0.0)
    delta = tl.load(partial_ptr + at, mask=mask, other=0.0) - pivot[None, :]
    delta += tl.load(partial_ptr + plane + at, mask=mask, other=0.0)
    moment = tl.load(partial_ptr + 2 * plane + at, mask=mask, other=0.0)
    offset = tl.sum(delta * count, 0).to(tl.float64) / samples.to(tl.float64)
    spread = delta - offset.to(tl.float32)[None, :]
    moment = tl.sum(moment + count * spread * spread, 0)
    return pivot.to(tl.float64) + offset, moment.to(tl.float64)


@triton.jit
def given(mean_ptr, var_ptr, channels, inside):
    mean = tl.load(mean_ptr + channels, mask=inside, other=0.0).to(tl.float64)
    return mean, tl.load(var_ptr + channels, mask=inside, other=1.0).to(tl.float64)


@triton.jit(do_not_specialize=["rows", "samples"])
def moments_kernel(
    x_ptr, partial_ptr, total, rows, width, C, samples,
    FOLD: tl.constexpr, RAGGED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    part, parts = tl.program_id(1), tl.num_programs(1)
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    tiles = tl.cdiv(rows, BLOCK_R)
    lines, last = owned_lines(part, parts, rows, BLOCK_R)
    missing = tl.zeros((BLOCK_C,), tl.int32)
    if RAGGED:
        missing = (columns // C >= samples % FOLD).to(tl.int32)
    first = tl.minimum(rows - part * BLOCK_R, BLOCK_R) - tl.where(part == tiles - 1, missing, 0)
    count = tl.maximum(lines - tl.where(last, missing, 0), 1).to(tl.float64)

    at, inside = tile_at(part * BLOCK_R, columns, rows, width, total, RAGGED, BLOCK_R)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    pivot = tl.sum(x, 0) / tl.maximum(first, 1).to(tl.float32)
    sums = tl.where(inside, x - pivot[None, :], 0.0)
    squares = sums * sums
    for tile in range(part + parts, tiles, parts):
        at, inside = tile_at(tile * BLOCK_R, columns, rows, width, total, RAGGED, BLOCK_R)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        d = tl.where(inside, x - pivot[None, :], 0.0)
        sums += d
        squares += d * d

    sum_d = tl.sum(sums, 0).to(tl.float64)
    offset = sum_d / count
    moment = tl.sum(squares, 0).to(tl.float64) - sum_d * offset
    mean = pivot.to(tl.float64) + offset
    high = mean.to(tl.float32)
    out = partial_ptr + part.to(tl.int64) * width + columns
    plane = parts.to(tl.int64) * width
    tl.store(out, high, mask=columns < width)
    tl.store(out + plane, (mean - high.to(tl.float64)).to(tl.float32), mask=columns < width)
    tl.store(out + 2 * plane, tl.where(moment < 0.0, 0.0, moment).to(tl.float32), mask=columns < width)


@triton.jit(do_not_specialize=["rows", "samples", "parts"])
def slot_kernel(
    partial_ptr, slot_ptr, rows, width, C, samples, parts,
    FOLD: tl.constexpr, RAGGED: tl.constexpr, ENTRIES: tl.constexpr, MOMENTS_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, moment = joined(partial_ptr, columns, columns < C, parts, rows, width, C, samples, FOLD, RAGGED,
                          ENTRIES, MOMENTS_R)  # fmt: skip
    tl.store(slot_ptr, samples.to(tl.float64), mask=tl.program_id(0) == 0)
    tl.store(slot_ptr + 1 + columns, mean, mask=columns < C)
    tl.store(slot_ptr + 1 + C + columns, moment, mask=columns < C)


@triton.jit(do_not_specialize=["ranks"])
def join_kernel(slots_ptr, mean_ptr, var_ptr, count_ptr, ranks, C, BLOCK_C: tl.constexpr):
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = columns < C
    mean = tl.zeros((BLOCK_C,), tl.float64)
    moment = tl.zeros((BLOCK_C,), tl.float64)
    before = tl.load(slots_ptr) * 0.0
    slot = slots_ptr
    for _ in range(0, ranks):
        count = tl.load(slot)
        after = before + count
        share = count / tl.where(after > 0.0, after, 1.0)  # a rank without rows gives 0
        delta = tl.load(slot + 1 + columns, mask=exists, other=0.0) - mean
        mean += delta * share
        moment += tl.load(slot + 1 + C + columns, mask=exists, other=0.0) + delta * delta * (before * share)
        before = after
        slot += 1 + 2 * C
    tl.store(count_ptr, before, mask=tl.program_id(0) == 0)
    tl.store(mean_ptr + columns, mean, mask=exists)
    tl.store(var_ptr + columns, moment / before, mask=exists)


@triton.jit(do_not_specialize=["rows"])
def track_kernel(
    running_mean_ptr, running_var_ptr, mean_ptr, var_ptr, count_ptr, rows, stride_mean, stride_var, C, momentum,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = columns < C
    count = tl.load(count_ptr) if count_ptr is not None else rows.to(tl.float64)
    mean, var = given(mean_ptr, var_ptr, columns, exists)
    at = running_mean_ptr + columns * stride_mean
    old = tl.load(at, mask=exists, other=0.0).to(tl.float64)
    tl.store(at, (old + momentum * (mean - old)).to(tl.float32).to(running_mean_ptr.dtype.element_ty), mask=exists)
    at = running_var_ptr + columns * stride_var
    old = tl.load(at, mask=exists, other=0.0).to(tl.float64)
    new = old + momentum * (var * (count / (count - 1.0)) - old)
    tl.store(at, new.to(tl.float32).to(running_var_ptr.dtype.element_ty), mask=exists)
