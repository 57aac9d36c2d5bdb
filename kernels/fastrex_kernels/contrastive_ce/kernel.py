"""Triton kernels of the contrastive cross-entropy: the similarities of N rows and M keys live in registers only.

c_nm = x_n . k_m / (|x_n| |k_m|), s = c / tau, and s' = f(c) / tau of a positive with its margin f. Per row: log sum
e^s' and sum s' over its positives, log sum e^((1 + a) s) and log sum e^(a s) over its negatives, the largest s of each,
and how many there are. Which pairs count is decided in place, from the int64 ids read with each block of keys.

* ``forward_kernel``: one program owns BLOCK_N rows and a range of the keys. It reads its rows once and its range once
  (so the keys are read N / BLOCK_N times, from L2), keeps running maxima and sums, all in units of the cosine, and
  writes seven numbers and two counts per row, as partials of its range.
* ``combine_kernel``: one program owns some rows and adds up their partials in the order of the ranges.
* ``gradient_kernel`` (kernel_gradient.py) computes the cosines once more for each gradient; only those of the keys that
  learn are computed for dk. ``cosine_kernel`` writes a tile of cosines, left-out pairs as -inf: ``nearest_keys`` takes
  the best of a few thousand keys at a time (16 MiB of cosines) and merges them in the order of the keys.

What bounds it: at N = 4096, M = 65,536, D = 128 in bf16 the forward multiplies 69 GFLOP, 0.07 ms of an H200's tensor
cores, and reads 17 MB of keys 32 times from L2, about 0.1 ms. 268 million pairs at some 30 instructions and one
exponential each are about 0.3 ms of its 132 x 128 lanes: the comparisons and sums bound it, not memory. Eager PyTorch
writes and reads N x M numbers (1.1 GB in fp32, 0.4 ms each way at 4.8 TB/s) in each of about ten passes forward and as
many backward. None of this has been measured.

Assumed: fp32 sums, N and M < 2^31. The norms are read from ``norm_kernel`` of the cosine cross-entropy: N + M numbers.
"""

# Triton types the kernels.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import cdiv
from ..cosine_ce.kernel_gradient import load_tile, operand, products, project_kernel, scaled
from .kernel_gradient import gradient_kernel
from .kernel_pairs import LOG2E, load_ids, pairs, with_margin
from .launch import LINES, Similarities, cosine_tile, forward_tile, gradient_tile, margin_words, ranges

# Rows of the forward's partials [splits, 7, N], in units of the cosine: the largest f(c) of the positives, the sum of
# exponentials from there, the sum of f(c), the largest c; of the negatives the largest c and both sums of exponentials.
FACTS = tl.constexpr(7)
# Of ``nearest_keys``: rows and cosines (16 MiB) that stand in memory at once.
NEAREST_ROWS, NEAREST_COSINES = 1024, 2**22


@triton.jit
def finite(top):
    """What to subtract from exponents: no maximum of an empty set."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def tile_of_cosines(
    x_ptr, k_ptr, x, inverse_x, inverse_k, offs_n, mask_n, offs_m, mask_m, stride_x, stride_k,
    D: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    if BLOCK_K >= D:
        k = operand(load_tile(k_ptr, offs_m, mask_m, stride_k, 0, D, BLOCK_K), inverse_k, COMPUTE)
        dots = tl.dot(x, tl.trans(k), input_precision=PRECISION)
    else:
        dots = products(x_ptr, offs_n, mask_n, stride_x, inverse_x, k_ptr, offs_m, mask_m, stride_k, inverse_k,
                        D, COMPUTE, PRECISION, BLOCK_N, BLOCK_M, BLOCK_K)  # fmt: skip
    x_type: tl.constexpr = x_ptr.dtype.element_ty
    k_type: tl.constexpr = k_ptr.dtype.element_ty
    return scaled(dots, inverse_x[:, None], x_type, inverse_k[None, :], k_type, 1.0, COMPUTE)


@triton.jit(do_not_specialize=["N", "M", "private", "ignore_index", "per_split"])
def forward_kernel(
    x_ptr, k_ptr, id_ptr, key_id_ptr, instance_ptr, key_instance_ptr, inverse_x_ptr, inverse_k_ptr,
    partial_ptr, count_ptr,
    N, M, private, ignore_index, per_split, stride_x, stride_k, inverse_tau, hardness, margin, cosine, sine,
    D: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, HAS_INSTANCE: tl.constexpr, HARD: tl.constexpr,
    MARGIN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid_n, pid_s = tl.program_id(0), tl.program_id(1)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    ids, instance, seen = load_ids(id_ptr, instance_ptr, offs_n, mask_n, ignore_index)
    inverse_x = tl.load(inverse_x_ptr + offs_n, mask=seen, other=0.0)
    x = inverse_x
    if BLOCK_K >= D:
        x = operand(load_tile(x_ptr, offs_n, seen, stride_x, 0, D, BLOCK_K), inverse_x, COMPUTE)
    scale = inverse_tau * LOG2E

    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    top = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    sum_shown = tl.zeros((BLOCK_N,), tl.float32)
    rival = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total_rivals = tl.zeros((BLOCK_N,), tl.float32)
    total_hard = tl.zeros((BLOCK_N,), tl.float32)
    positives = tl.zeros((BLOCK_N,), tl.int32)
    negatives = tl.zeros((BLOCK_N,), tl.int32)
    first = pid_s * per_split
    for start in range(first, tl.minimum(first + per_split, M), BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        key_ids, key_instance, key_seen = load_ids(key_id_ptr, key_instance_ptr, offs_m, mask_m, ignore_index)
        inverse_k = tl.load(inverse_k_ptr + offs_m, mask=key_seen, other=0.0)
        c = tile_of_cosines(x_ptr, k_ptr, x, inverse_x, inverse_k, offs_n, seen, offs_m, key_seen, stride_x, stride_k,
                            D, COMPUTE, PRECISION, BLOCK_N, BLOCK_M, BLOCK_K)  # fmt: skip
        positive, negative = pairs(ids[:, None], instance[:, None], seen[:, None], key_ids[None, :],
                                   key_instance[None, :], key_seen[None, :], offs_m[None, :], private,
                                   HAS_INSTANCE)  # fmt: skip
        positives += tl.sum(positive.to(tl.int32), 1)
        negatives += tl.sum(negative.to(tl.int32), 1)
        shown, _ = with_margin(c, margin, cosine, sine, MARGIN)
        sum_shown += tl.sum(tl.where(positive, shown, 0.0), 1)
        if MARGIN != 0:
            best = tl.maximum(best, tl.max(tl.where(positive, c, float("-inf")), 1))
        old_top, old_rival = top, rival
        top = tl.maximum(top, tl.max(tl.where(positive, shown, float("-inf")), 1))
        rival = tl.maximum(rival, tl.max(tl.where(negative, c, float("-inf")), 1))
        from_top, from_rival = finite(top), finite(rival)
        # A pair is one or the other: a single exponential serves both.
        behind = tl.where(negative, c - from_rival[:, None], float("-inf"))
        e = tl.exp2(tl.where(positive, shown - from_top[:, None], behind * (1.0 + hardness)) * scale)
        total = total * tl.exp2((old_top - from_top) * scale) + tl.sum(tl.where(positive, e, 0.0), 1)
        fade = (old_rival - from_rival) * scale
        total_rivals = total_rivals * tl.exp2(fade * (1.0 + hardness)) + tl.sum(tl.where(positive, 0.0, e), 1)
        if HARD:
            e = tl.exp2(behind * (scale * hardness))
            total_hard = total_hard * tl.exp2(fade * hardness) + tl.sum(e, 1)
    if MARGIN == 0:
        best = top

    N64 = N.to(tl.int64)
    at = partial_ptr + pid_s * FACTS * N64 + offs_n
    tl.store(at, top, mask=mask_n)
    tl.store(at + N64, total, mask=mask_n)
    tl.store(at + 2 * N64, sum_shown, mask=mask_n)
    tl.store(at + 3 * N64, best, mask=mask_n)
    tl.store(at + 4 * N64, rival, mask=mask_n)
    tl.store(at + 5 * N64, total_rivals, mask=mask_n)
    if HARD:
        tl.store(at + 6 * N64, total_hard, mask=mask_n)
    at = count_ptr + pid_s * 2 * N64 + offs_n
    tl.store(at, positives, mask=mask_n)
    tl.store(at + N64, negatives, mask=mask_n)


@triton.jit
def log_sum(top, total, scale):
    """Logarithm of ``total`` e^(``scale`` ``top``), -inf where nothing was summed."""
    empty = total == 0.0  # false for a NaN, which stays one
    return tl.where(empty, float("-inf"), finite(top) * scale + tl.log(tl.where(empty, 1.0, total)))


@triton.jit(do_not_specialize=["N", "splits"])
def combine_kernel(
    partial_ptr, count_ptr, stats_ptr, counts_ptr, N, splits, inverse_tau, hardness, HARD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_n = offs_n < N
    N64 = N.to(tl.int64)
    scale = inverse_tau * LOG2E
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    rival = tl.full((BLOCK,), float("-inf"), tl.float32)
    at = partial_ptr + offs_n
    for _ in range(0, splits):
        top = tl.maximum(top, tl.load(at, mask=mask_n, other=0.0))
        best = tl.maximum(best, tl.load(at + 3 * N64, mask=mask_n, other=0.0))
        rival = tl.maximum(rival, tl.load(at + 4 * N64, mask=mask_n, other=0.0))
        at += FACTS * N64
    total = tl.zeros((BLOCK,), tl.float32)
    sum_shown = tl.zeros((BLOCK,), tl.float32)
    total_rivals = tl.zeros((BLOCK,), tl.float32)
    total_hard = tl.zeros((BLOCK,), tl.float32)
    positives = tl.zeros((BLOCK,), tl.int64)
    negatives = tl.zeros((BLOCK,), tl.int64)
    at = partial_ptr + offs_n
    counts = count_ptr + offs_n
    for _ in range(0, splits):
        fade = (tl.load(at, mask=mask_n, other=0.0) - finite(top)) * scale
        total += tl.exp2(fade) * tl.load(at + N64, mask=mask_n, other=0.0)
        sum_shown += tl.load(at + 2 * N64, mask=mask_n, other=0.0)
        fade = (tl.load(at + 4 * N64, mask=mask_n, other=0.0) - finite(rival)) * scale
        total_rivals += tl.exp2(fade * (1.0 + hardness)) * tl.load(at + 5 * N64, mask=mask_n, other=0.0)
        if HARD:
            total_hard += tl.exp2(fade * hardness) * tl.load(at + 6 * N64, mask=mask_n, other=0.0)
        positives += tl.load(counts, mask=mask_n, other=0)
        negatives += tl.load(counts + N64, mask=mask_n, other=0)
        at += FACTS * N64
        counts += 2 * N64
    lse_positive = log_sum(top, total, inverse_tau)
    lse_negative = log_sum(rival, total_rivals, inverse_tau * (1.0 + hardness))
    # A maximum loses a NaN on the way, a sum does not.
    best = tl.where(lse_positive != lse_positive, lse_positive, best * inverse_tau)
    rivals_best = tl.where(lse_negative != lse_negative, lse_negative, rival * inverse_tau)
    out = stats_ptr + offs_n
    tl.store(out, lse_positive, mask=mask_n)
    tl.store(out + N64, sum_shown * inverse_tau, mask=mask_n)
    tl.store(out + 2 * N64, lse_negative, mask=mask_n)
    tl.store(out + 3 * N64, log_sum(rival, total_hard, inverse_tau * hardness), mask=mask_n)
    tl.store(out + 4 * N64, best, mask=mask_n)
    tl.store(out + 5 * N64, rivals_best, mask=mask_n)
    tl.store(counts_ptr + offs_n, positives, mask=mask_n)
    tl.store(counts_ptr + N64 + offs_n, negatives, mask=mask_n)


@triton.jit(do_not_specialize=["N", "M", "first_row", "first_key", "rows", "columns", "private", "ignore_index"])
def cosine_kernel(
    x_ptr, k_ptr, id_ptr, key_id_ptr, instance_ptr, key_instance_ptr, inverse_x_ptr, inverse_k_ptr, out_ptr,
    N, M, first_row, first_key, rows, columns, private, ignore_index, stride_x, stride_k,
    D: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, HAS_INSTANCE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of the cosines [rows, columns] from ``first_row`` and ``first_key`` on."""
    own = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n, offs_m = first_row + own, first_key + column
    mask_n, mask_m = own < rows, column < columns
    ids, instance, seen = load_ids(id_ptr, instance_ptr, offs_n, mask_n, ignore_index)
    key_ids, key_instance, key_seen = load_ids(key_id_ptr, key_instance_ptr, offs_m, mask_m, ignore_index)
    inverse_x = tl.load(inverse_x_ptr + offs_n, mask=seen, other=0.0)
    inverse_k = tl.load(inverse_k_ptr + offs_m, mask=key_seen, other=0.0)
    x = inverse_x
    if BLOCK_K >= D:
        x = operand(load_tile(x_ptr, offs_n, seen, stride_x, 0, D, BLOCK_K), inverse_x, COMPUTE)
    c = tile_of_cosines(x_ptr, k_ptr, x, inverse_x, inverse_k, offs_n, seen, offs_m, key_seen, stride_x, stride_k,
                        D, COMPUTE, PRECISION, BLOCK_N, BLOCK_M, BLOCK_K)  # fmt: skip
    positive, negative = pairs(ids[:, None], instance[:, None], seen[:, None], key_ids[None, :], key_instance[None, :],
                               key_seen[None, :], offs_m[None, :], private, HAS_INSTANCE)  # fmt: skip
    at = out_ptr + own.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(at, tl.where(positive | negative, c, float("-inf")), mask=mask_n[:, None] & mask_m[None, :])


def contrastive_ce(
    input: Tensor,
    keys: Tensor,
    ids: Tensor,
    key_ids: Tensor,
    instance: Tensor | None,
    key_instance: Tensor | None,
    private: int,
    ignore_index: int,
    temperature: float,
    hardness: float,
    margin_kind: int,
    margin: float,
    compute: torch.dtype,
    _splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Launcher of ``fastrex::contrastive_ce``. ``_splits`` overrides how often the tests divide a program's work."""
    N, M = input.shape[0], keys.shape[0]
    stats = input.new_empty((6, N), dtype=torch.float32)
    counts = input.new_empty((2, N), dtype=torch.int64)
    if N == 0:
        return stats, counts
    with torch.cuda.device_of(input):
        call = Similarities(input, keys, ids, key_ids, instance, key_instance, private, ignore_index, compute)
        tile = forward_tile(call.D, compute, call.precision, call.width)
        grid, each = ranges(tile, N, M, 1, N * FACTS.value * 4, _splits)
        partial = stats.new_empty((grid[1], FACTS.value, N))
        parts = counts.new_empty((grid[1], 2, N), dtype=torch.int32)
        forward_kernel[grid[:2]](
            **call.common, **margin_words(temperature, hardness, margin_kind, margin), partial_ptr=partial,
            count_ptr=parts, per_split=each, BLOCK_N=tile.own, BLOCK_M=tile.stream, BLOCK_K=tile.step,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        combine_kernel[(cdiv(N, LINES),)](
            partial, parts, stats, counts, N, grid[1], 1 / temperature, hardness, HARD=hardness > 0, BLOCK=LINES
        )
    return stats, counts


def contrastive_ce_backward(
    input: Tensor,
    keys: Tensor,
    ids: Tensor,
    key_ids: Tensor,
    instance: Tensor | None,
    key_instance: Tensor | None,
    private: int,
    ignore_index: int,
    temperature: float,
    hardness: float,
    margin_kind: int,
    margin: float,
    compute: torch.dtype,
    stats: Tensor,
    coefficients: Tensor,
    input_grad: bool,
    learnt_keys: int,
    _splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Launcher of ``fastrex::contrastive_ce_backward``."""
    (N, D), M = input.shape, keys.shape[0]
    grad_input = input.new_empty((N, D) if input_grad else (0,))
    grad_keys = keys.new_empty((learnt_keys, D))
    if N == 0 or M == 0:
        return grad_input.zero_(), grad_keys.zero_()
    with torch.cuda.device_of(input):
        call = Similarities(input, keys, ids, key_ids, instance, key_instance, private, ignore_index, compute)
        tile = gradient_tile(D, compute, call.precision, call.width)
        words = margin_words(temperature, hardness, margin_kind, margin)
        stats, coefficients = stats.contiguous(), coefficients.contiguous()
        chunks = cdiv(D, tile.columns)
        for own_rows, own, out, stream, own_ids in (
            (True, call.x, grad_input, M, ids),
            (False, call.k, grad_keys, N, key_ids),
        ):
            count = out.shape[0]
            if count == 0:
                continue
            grid, each = ranges(tile, count, stream, chunks, count * D * 4, _splits)
            direct = grid[1] == chunks == 1
            sums = out if direct else out.new_empty((grid[1], count, D), dtype=torch.float32)
            gradient_kernel[grid](
                **call.common, **words, stats_ptr=stats, coefficient_ptr=coefficients, out_ptr=sums, count_own=count,
                per_split=each, OWN_ROWS=own_rows, DIRECT=direct, BLOCK_O=tile.own, BLOCK_S=tile.stream,
                BLOCK_D=tile.columns, BLOCK_K=tile.step, num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
            if not direct:
                project_kernel[(cdiv(count, call.lines),)](
                    sums, own, None, out, None, count, grid[1], own.stride(0),
                    D=D, BLOCK_R=call.lines, BLOCK_D=call.line,
                )  # fmt: skip
                # It takes the norm of every row, also of one that is not looked at and may hold a NaN.
                out.masked_fill_((own_ids[:count] == ignore_index)[:, None], 0.0)
    return grad_input, grad_keys


def nearest_keys(
    input: Tensor,
    keys: Tensor,
    ids: Tensor,
    key_ids: Tensor,
    instance: Tensor | None,
    key_instance: Tensor | None,
    private: int,
    ignore_index: int,
    k: int,
    compute: torch.dtype,
    _rows: int = NEAREST_ROWS,
    _cosines: int = NEAREST_COSINES,
) -> tuple[Tensor, Tensor]:
    """Launcher of ``fastrex::nearest_keys``. ``_rows`` and ``_cosines`` override how many stand in memory.

    Earlier keys stand first where the best of two chunks are merged; which of equal cosines is taken is ``topk``'s.
    """
    N, M = input.shape[0], keys.shape[0]
    best = input.new_full((N, k), float("-inf"), dtype=torch.float32)
    index = ids.new_full((N, k), -1)
    if N == 0 or M == 0 or k == 0:
        return best, index
    with torch.cuda.device_of(input):
        call = Similarities(input, keys, ids, key_ids, instance, key_instance, private, ignore_index, compute)
        tile = cosine_tile(call.D, compute, call.precision, call.width)
        columns = min(M, _cosines // min(_rows, N))
        buffer = best.new_empty(min(_rows, N) * columns)
        for row in range(0, N, _rows):
            rows = slice(row, min(row + _rows, N))
            height = rows.stop - row
            for key in range(0, M, columns):
                width = min(columns, M - key)
                cosine = buffer[: height * width].view(height, width)
                cosine_kernel[(cdiv(height, tile.own), cdiv(width, tile.stream))](
                    **call.common, out_ptr=cosine, first_row=row, first_key=key, rows=height, columns=width,
                    BLOCK_N=tile.own, BLOCK_M=tile.stream, BLOCK_K=tile.step, num_warps=tile.num_warps,
                    num_stages=tile.num_stages,
                )  # fmt: skip
                found, at = cosine.topk(min(k, width))
                # -1 beside every cosine that is not one.
                at = torch.where(found == float("-inf"), -1, at + key)
                found, chosen = torch.cat((best[rows], found), dim=1).topk(k)
                best[rows] = found
                index[rows] = torch.cat((index[rows], at), dim=1).gather(1, chosen)
    return best, index
