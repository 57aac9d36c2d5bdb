"""The gradient pass of the cosine cross-entropy from a known lse, and what it shares with the forward.

dL/dz_nc = A_n e^(z_nc - lse_n) - a_nc, in the letters of the forward's kernel.py. One program of ``gradient_kernel``
owns BLOCK_O rows of one operand (x for dx, W for dw) and BLOCK_D columns of their sums, which stay in registers, and
streams a range of the other: each of its blocks gives z once more, then its share of the sums. It reads what it owns
and what it streams once, and writes fp32 partials [ranges, own, D], which ``project_kernel`` adds up in the order of
the ranges and takes through the norm. With a single range, and rows that fit one tile, it writes dw itself.
"""

# Triton types the kernels.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl

EPS = tl.constexpr(1e-12)
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def inverse_norm(square_sum):
    norm = tl.sqrt(square_sum)
    dead = norm <= EPS  # false for a NaN, which stays one
    return tl.where(dead, 0.0, 1.0 / tl.where(dead, 1.0, norm))


@triton.jit
def load_tile(ptr, rows, mask, stride, start, D: tl.constexpr, BLOCK: tl.constexpr):
    columns = start + tl.arange(0, BLOCK)
    inside = mask[:, None] & (columns < D)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store_tile(ptr, rows, mask, stride, start, values, D: tl.constexpr, BLOCK: tl.constexpr):
    columns = start + tl.arange(0, BLOCK)
    inside = mask[:, None] & (columns < D)[None, :]
    at = ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(at, values.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def tile_inverse(tile):
    values = tile.to(tl.float32)
    return inverse_norm(tl.sum(values * values, 1))


@triton.jit
def operand(tile, inverse, COMPUTE: tl.constexpr):
    # Into the range of fp16; elsewhere the norms are factors of the finished product, which rounds less.
    if COMPUTE == tl.float16 and tile.dtype != tl.float16:  # noqa: SIM300
        return (tile.to(tl.float32) * inverse[:, None]).to(COMPUTE)
    return tile.to(COMPUTE)


@triton.jit
def summand(tile, inverse, COMPUTE: tl.constexpr):
    # What a sum's factors would be multiplied by instead does not fit the range of fp16.
    if COMPUTE == tl.float16:  # noqa: SIM300
        return (tile.to(tl.float32) * inverse[:, None]).to(COMPUTE)
    return tile.to(COMPUTE)


@triton.jit
def products(
    a_ptr, rows_a, mask_a, stride_a, inverse_a, b_ptr, rows_b, mask_b, stride_b, inverse_b,
    D: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    dots = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for start in range(0, D, BLOCK_K):
        a = operand(load_tile(a_ptr, rows_a, mask_a, stride_a, start, D, BLOCK_K), inverse_a, COMPUTE)
        b = operand(load_tile(b_ptr, rows_b, mask_b, stride_b, start, D, BLOCK_K), inverse_b, COMPUTE)
        dots = tl.dot(a, tl.trans(b), dots, input_precision=PRECISION)
    return dots


@triton.jit
def scaled(dots, inverse_x, x_type: tl.constexpr, inverse_w, w_type: tl.constexpr, inverse_tau, COMPUTE: tl.constexpr):
    """Logits from products; always in this order, so that each is the same number wherever it is computed."""
    # As ``operand`` left them.
    factor_x = inverse_x * inverse_tau
    if COMPUTE == tl.float16 and x_type != tl.float16:  # noqa: SIM300
        factor_x = inverse_tau
    z = dots * factor_x
    if COMPUTE == tl.float16 and w_type != tl.float16:  # noqa: SIM300
        return z
    return z * inverse_w


@triton.jit
def inverse_temperature(tau_ptr, tau):
    if tau_ptr is not None:
        tau = tl.load(tau_ptr).to(tl.float32)
    return 1.0 / tau


@triton.jit
def load_labels(label_ptr, rows, mask, B, num_classes, ignore_index, SOFT: tl.constexpr):
    """Label of each row, 0 where it has none; whether it is ignored; whether it is a class."""
    label = tl.load(label_ptr + rows % B, mask=mask, other=0)
    ignored = label != label
    if not SOFT:
        ignored = label == ignore_index
    valid = (label >= 0) & (label < num_classes)
    return tl.where(valid, label, 0), ignored, valid


@triton.jit
def load_factors(class_weight_ptr, classes, mask):
    if class_weight_ptr is not None:
        return tl.load(class_weight_ptr + classes, mask=mask, other=0.0)
    return tl.where(mask, 1.0, 0.0)


@triton.jit
def row_weights(weight_ptr, rows, mask, B, factor, smoothing, SOFT: tl.constexpr):
    """A of each row; ``weight_ptr``: A itself [B] of probabilities, smoothing times the mean class factor of ids."""
    if SOFT:
        return tl.load(weight_ptr + rows % B, mask=mask, other=0.0)
    if weight_ptr is not None:
        return (1.0 - smoothing) * factor + tl.load(weight_ptr)
    return factor


@triton.jit
def shares(
    share_ptr, stride_share, class_weight_ptr, rows, mask_rows, classes, mask_classes, num_classes, smoothing,
    SOFT: tl.constexpr,
):  # fmt: skip
    """What the target gives classes, a label's own part apart. One of ``rows``, ``classes`` is [., 1], one [1, .]."""
    share = smoothing / num_classes
    if SOFT:
        at = share_ptr + rows.to(tl.int64) * stride_share + classes
        share += (1.0 - smoothing) * tl.load(at, mask=mask_rows & mask_classes, other=0.0).to(tl.float32)
    if class_weight_ptr is not None:
        share *= tl.load(class_weight_ptr + classes, mask=mask_classes, other=0.0)
    return share


@triton.jit
def through_norm(g, a):
    """Gradient of the rows of a from g, that of their unit vectors, and g's part along each."""
    inverse = tile_inverse(a)[:, None]
    unit = a.to(tl.float32) * inverse
    radial = tl.sum(g * unit, 1)
    return (g - radial[:, None] * unit) * inverse, radial


@triton.jit(do_not_specialize=["R"])
def norm_kernel(a_ptr, inverse_ptr, R, stride_a, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    inverse = tile_inverse(load_tile(a_ptr, offs_r, mask_r, stride_a, 0, D, BLOCK_D))
    tl.store(inverse_ptr + offs_r, inverse, mask=mask_r)


@triton.jit(do_not_specialize=["N", "C", "B", "first_class", "num_classes", "ignore_index", "per_split"])
def gradient_kernel(
    x_ptr, w_ptr, label_ptr, share_ptr, weight_ptr, class_weight_ptr, tau_ptr, inverse_x_ptr, inverse_w_ptr,
    top_ptr, total_ptr, upstream_ptr, out_ptr,
    N, C, B, first_class, num_classes, ignore_index, per_split, stride_x, stride_w, stride_share, tau, smoothing,
    D: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, SOFT: tl.constexpr, SPREAD: tl.constexpr,
    OWN_ROWS: tl.constexpr, DIRECT: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Owns rows of o (x or w), loops over a range of s (the other): sum over s of dL/dz_os s_hat / tau [O, D].

    e^(z - top) / total is the probability: from the forward's own maximum and sum, or from a given lse alone.
    """
    pid_o, pid_s, pid_d = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    whole: tl.constexpr = BLOCK_D >= D
    N_AXIS: tl.constexpr = 1 if OWN_ROWS else 0
    x_type: tl.constexpr = x_ptr.dtype.element_ty
    w_type: tl.constexpr = w_ptr.dtype.element_ty
    if OWN_ROWS:
        o_ptr, stride_o, inverse_o_ptr, count_o = x_ptr, stride_x, inverse_x_ptr, N
        s_ptr, stride_s, inverse_s_ptr, count_s = w_ptr, stride_w, inverse_w_ptr, C
    else:
        o_ptr, stride_o, inverse_o_ptr, count_o = w_ptr, stride_w, inverse_w_ptr, C
        s_ptr, stride_s, inverse_s_ptr, count_s = x_ptr, stride_x, inverse_x_ptr, N
    offs_o = pid_o * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_o = offs_o < count_o
    inverse_tau = inverse_temperature(tau_ptr, tau)
    if whole:
        o = load_tile(o_ptr, offs_o, mask_o, stride_o, 0, D, BLOCK_D)
        inverse_o = tile_inverse(o)
    else:
        inverse_o = tl.load(inverse_o_ptr + offs_o, mask=mask_o, other=0.0)
    if BLOCK_K >= D:
        o = operand(o, inverse_o, COMPUTE)

    sums = tl.zeros((BLOCK_O, BLOCK_D), tl.float32)
    first = pid_s * per_split
    for start in range(first, tl.minimum(first + per_split, count_s), BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        mask_s = offs_s < count_s
        if whole:
            s = load_tile(s_ptr, offs_s, mask_s, stride_s, 0, D, BLOCK_D)
            inverse_s = tile_inverse(s)
        else:
            inverse_s = tl.load(inverse_s_ptr + offs_s, mask=mask_s, other=0.0)
        if BLOCK_K >= D:
            dots = tl.dot(o, tl.trans(operand(s, inverse_s, COMPUTE)), input_precision=PRECISION)
        else:
            dots = products(o_ptr, offs_o, mask_o, stride_o, inverse_o, s_ptr, offs_s, mask_s, stride_s, inverse_s,
                            D, COMPUTE, PRECISION, BLOCK_O, BLOCK_S, BLOCK_K)  # fmt: skip
        if OWN_ROWS:
            z = scaled(dots, inverse_o[:, None], x_type, inverse_s[None, :], w_type, inverse_tau, COMPUTE)
        else:
            z = scaled(dots, inverse_s[None, :], x_type, inverse_o[:, None], w_type, inverse_tau, COMPUTE)

        # Rows and classes stand on the axes where o and s put them.
        offs_n = tl.expand_dims(offs_o if OWN_ROWS else offs_s, N_AXIS)
        mask_n = tl.expand_dims(mask_o if OWN_ROWS else mask_s, N_AXIS)
        offs_c = tl.expand_dims(offs_s if OWN_ROWS else offs_o, 1 - N_AXIS)
        mask_c = tl.expand_dims(mask_s if OWN_ROWS else mask_o, 1 - N_AXIS)
        label, ignored, valid = load_labels(label_ptr, offs_n, mask_n, B, num_classes, ignore_index, SOFT)
        factor = load_factors(class_weight_ptr, label, mask_n)
        weight = row_weights(weight_ptr, offs_n, mask_n, B, factor, smoothing, SOFT)
        if total_ptr is not None:
            weight /= tl.load(total_ptr + offs_n, mask=mask_n, other=1.0)
        g = weight * tl.exp(z - tl.load(top_ptr + offs_n, mask=mask_n, other=0.0))
        if not SOFT:
            g -= tl.where(offs_c == (label - first_class).to(tl.int32), (1.0 - smoothing) * factor, 0.0)
        if SOFT or SPREAD:
            g -= shares(share_ptr, stride_share, class_weight_ptr, offs_n % B, mask_n, first_class + offs_c, mask_c,
                        num_classes, smoothing, SOFT)  # fmt: skip
        if upstream_ptr is not None and not OWN_ROWS:
            g *= tl.load(upstream_ptr + offs_n, mask=mask_n, other=0.0)
        g = tl.where(valid & (ignored == 0) & mask_n & mask_c, g, 0.0)
        if not whole:
            s = load_tile(s_ptr, offs_s, mask_s, stride_s, pid_d * BLOCK_D, D, BLOCK_D)
        s = summand(s, inverse_s, COMPUTE)
        if COMPUTE == tl.float16:  # noqa: SIM300
            # Scaled to the range of fp16: most of a softmax over many classes lies below its smallest number.
            largest = tl.max(tl.abs(g), 1)
            largest = tl.where(largest > 0.0, largest, 1.0)[:, None]
            sums += tl.dot((g / largest).to(COMPUTE), s) * largest
        else:
            sums = tl.dot((g * inverse_s[None, :]).to(COMPUTE), s, sums, input_precision=PRECISION)

    sums *= inverse_tau
    if DIRECT:
        sums, _ = through_norm(sums, load_tile(o_ptr, offs_o, mask_o, stride_o, 0, D, BLOCK_D))
    at = pid_s.to(tl.int64) * count_o + offs_o
    store_tile(out_ptr, at, mask_o, D, pid_d * BLOCK_D, sums, D, BLOCK_D)


@triton.jit(do_not_specialize=["R", "splits"])
def project_kernel(
    sums_ptr, a_ptr, upstream_ptr, grad_ptr, radial_ptr, R, splits, stride_a,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    rows = offs_r.to(tl.int64)
    g = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for _ in range(0, splits):
        g += load_tile(sums_ptr, rows, mask_r, D, 0, D, BLOCK_D)
        rows += R
    grad, radial = through_norm(g, load_tile(a_ptr, offs_r, mask_r, stride_a, 0, D, BLOCK_D))
    if upstream_ptr is not None:
        grad *= tl.load(upstream_ptr + offs_r, mask=mask_r, other=0.0)[:, None]
    store_tile(grad_ptr, offs_r, mask_r, D, 0, grad, D, BLOCK_D)
    if radial_ptr is not None:
        tl.store(radial_ptr + offs_r, radial, mask=mask_r)
