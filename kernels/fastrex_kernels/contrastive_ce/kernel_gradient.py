"""The gradient pass of the contrastive cross-entropy, from the statistics of the forward.

dL/ds_nm = (A_n e^(s' - lse_positive_n) + B_n) f'(c) of a positive, C_n e^((1 + a) s - lse_negative_n)
- H_n e^(a s - lse_hard_n) of a negative, in the letters of kernel.py. One program of ``gradient_kernel`` owns BLOCK_O
rows of one operand (x for dx, the learnt keys for dk) and BLOCK_D columns of their sums, which stay in registers, and
streams a range of the other: each of its blocks gives the cosines once more, then its share of the sums. It reads what
it owns and what it streams once, and writes fp32 partials [ranges, own, D], which ``project_kernel`` of the cosine
cross-entropy adds up in the order of the ranges and takes through the norm. With a single range, and rows that fit one
tile, it writes the gradient itself.
"""

# Triton types the kernels.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from ..cosine_ce.kernel_gradient import load_tile, operand, products, scaled, store_tile, summand, through_norm
from .kernel_pairs import LOG2E, load_ids, pairs, with_margin


@triton.jit
def load_exponent(stats_ptr, rows, mask, weight):
    """A log-sum in units of log 2. Infinite where nothing is summed or its weight is 0, so that 0 stays exactly 0."""
    lse = tl.load(stats_ptr + rows, mask=mask, other=0.0)
    return tl.where((weight == 0.0) | (lse == float("-inf")), float("inf"), lse * LOG2E)


@triton.jit
def load_weights(coefficient_ptr, stats_ptr, rows, mask, N, HARD: tl.constexpr):
    """A, B, C, H of rows, and the exponents that belong to A, C and H."""
    stride = N.to(tl.int64)
    at = coefficient_ptr + rows
    a = tl.load(at, mask=mask, other=0.0)
    b = tl.load(at + stride, mask=mask, other=0.0)
    c = tl.load(at + 2 * stride, mask=mask, other=0.0)
    lse_a = load_exponent(stats_ptr, rows, mask, a)
    lse_c = load_exponent(stats_ptr + 2 * stride, rows, mask, c)
    h, lse_h = c, lse_c
    if HARD:
        h = tl.load(at + 3 * stride, mask=mask, other=0.0)
        lse_h = load_exponent(stats_ptr + 3 * stride, rows, mask, h)
    return a, b, c, h, lse_a, lse_c, lse_h


@triton.jit(do_not_specialize=["N", "M", "count_own", "private", "ignore_index", "per_split"])
def gradient_kernel(
    x_ptr, k_ptr, id_ptr, key_id_ptr, instance_ptr, key_instance_ptr, inverse_x_ptr, inverse_k_ptr,
    stats_ptr, coefficient_ptr, out_ptr,
    N, M, count_own, private, ignore_index, per_split, stride_x, stride_k,
    inverse_tau, hardness, margin, cosine, sine,
    D: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, HAS_INSTANCE: tl.constexpr, HARD: tl.constexpr,
    MARGIN: tl.constexpr, OWN_ROWS: tl.constexpr, DIRECT: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Owns the first ``count_own`` of o (x or keys), loops over a range of s (the other): sums [count_own, D]."""
    pid_o, pid_s, pid_d = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    N_AXIS: tl.constexpr = 1 if OWN_ROWS else 0
    x_type: tl.constexpr = x_ptr.dtype.element_ty
    k_type: tl.constexpr = k_ptr.dtype.element_ty
    if OWN_ROWS:
        o_ptr, stride_o, inverse_o_ptr, id_o_ptr, instance_o_ptr = x_ptr, stride_x, inverse_x_ptr, id_ptr, instance_ptr
        s_ptr, stride_s, inverse_s_ptr, id_s_ptr, instance_s_ptr = (
            k_ptr, stride_k, inverse_k_ptr, key_id_ptr, key_instance_ptr)  # fmt: skip
        count_s = M
    else:
        o_ptr, stride_o, inverse_o_ptr, id_o_ptr, instance_o_ptr = (
            k_ptr, stride_k, inverse_k_ptr, key_id_ptr, key_instance_ptr)  # fmt: skip
        s_ptr, stride_s, inverse_s_ptr, id_s_ptr, instance_s_ptr = x_ptr, stride_x, inverse_x_ptr, id_ptr, instance_ptr
        count_s = N
    offs_o = pid_o * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_o = offs_o < count_own
    inverse_o = tl.load(inverse_o_ptr + offs_o, mask=mask_o, other=0.0)
    live_o = mask_o & (inverse_o != 0.0)
    id_o, instance_o, seen_o = load_ids(id_o_ptr, instance_o_ptr, offs_o, mask_o, ignore_index)
    if OWN_ROWS:
        a, b, c, h, lse_a, lse_c, lse_h = load_weights(coefficient_ptr, stats_ptr, offs_o, mask_o, N, HARD)
    if BLOCK_K >= D:
        o = operand(load_tile(o_ptr, offs_o, live_o, stride_o, 0, D, BLOCK_K), inverse_o, COMPUTE)
    scale = inverse_tau * LOG2E

    sums = tl.zeros((BLOCK_O, BLOCK_D), tl.float32)
    first = pid_s * per_split
    for start in range(first, tl.minimum(first + per_split, count_s), BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        mask_s = offs_s < count_s
        inverse_s = tl.load(inverse_s_ptr + offs_s, mask=mask_s, other=0.0)
        # What is ignored is not read: 0 times a NaN is one.
        live_s = mask_s & (inverse_s != 0.0)
        id_s, instance_s, seen_s = load_ids(id_s_ptr, instance_s_ptr, offs_s, mask_s, ignore_index)
        if BLOCK_K >= D:
            s = load_tile(s_ptr, offs_s, live_s, stride_s, 0, D, BLOCK_K)
            dots = tl.dot(o, tl.trans(operand(s, inverse_s, COMPUTE)), input_precision=PRECISION)
        else:
            dots = products(o_ptr, offs_o, live_o, stride_o, inverse_o, s_ptr, offs_s, live_s, stride_s, inverse_s,
                            D, COMPUTE, PRECISION, BLOCK_O, BLOCK_S, BLOCK_K)  # fmt: skip
        if OWN_ROWS:
            cos = scaled(dots, inverse_o[:, None], x_type, inverse_s[None, :], k_type, 1.0, COMPUTE)
            positive, negative = pairs(id_o[:, None], instance_o[:, None], seen_o[:, None], id_s[None, :],
                                       instance_s[None, :], seen_s[None, :], offs_s[None, :], private,
                                       HAS_INSTANCE)  # fmt: skip
        else:
            cos = scaled(dots, inverse_s[None, :], x_type, inverse_o[:, None], k_type, 1.0, COMPUTE)
            positive, negative = pairs(id_s[None, :], instance_s[None, :], seen_s[None, :], id_o[:, None],
                                       instance_o[:, None], seen_o[:, None], offs_o[:, None], private,
                                       HAS_INSTANCE)  # fmt: skip
            a, b, c, h, lse_a, lse_c, lse_h = load_weights(coefficient_ptr, stats_ptr, offs_s, mask_s, N, HARD)
        # A pair is one or the other: a single exponential serves both, and is 0 where the pair is left out.
        shown, slope = with_margin(cos, margin, cosine, sine, MARGIN)
        pushing = tl.where(negative, cos, float("-inf"))
        e = tl.exp2(
            tl.where(
                positive,
                shown * scale - tl.expand_dims(lse_a, N_AXIS),
                pushing * (scale * (1.0 + hardness)) - tl.expand_dims(lse_c, N_AXIS),
            )
        )
        pull = tl.expand_dims(a, N_AXIS) * e + tl.expand_dims(b, N_AXIS)
        if MARGIN == 2:
            pull *= slope
        push = tl.expand_dims(c, N_AXIS) * e
        if HARD:
            push -= tl.expand_dims(h, N_AXIS) * tl.exp2(pushing * (scale * hardness) - tl.expand_dims(lse_h, N_AXIS))
        g = tl.where(positive, pull, push)
        if BLOCK_K < D:
            s = load_tile(s_ptr, offs_s, mask_s, stride_s, pid_d * BLOCK_D, D, BLOCK_D)
            # ``live_s`` as its mask spills on sm_80. What counts and is not finite has a NaN in g already.
            s = tl.where(tl.abs(s) < float("inf"), s, 0.0).to(s.dtype)
        s = summand(s, inverse_s, COMPUTE)
        if COMPUTE == tl.float16:  # noqa: SIM300
            # Scaled to the range of fp16: most of a softmax over many keys lies below its smallest number.
            largest = tl.max(tl.abs(g), 1)
            largest = tl.where(largest > 0.0, largest, 1.0)[:, None]
            sums += tl.dot((g / largest).to(COMPUTE), s) * largest
        else:
            sums = tl.dot((g * inverse_s[None, :]).to(COMPUTE), s, sums, input_precision=PRECISION)

    sums *= inverse_tau
    if DIRECT:
        sums, _ = through_norm(sums, load_tile(o_ptr, offs_o, live_o, stride_o, 0, D, BLOCK_D))
    at = pid_s.to(tl.int64) * count_own + offs_o
    store_tile(out_ptr, at, mask_o, D, pid_d * BLOCK_D, sums, D, BLOCK_D)
