"""Triton kernels of the cosine cross-entropy: logits live in registers only, and no sum depends on scheduling.

Row n: z_c = cos(x_n, w_c) / tau, a_c the target's share of class c times its factor, A = sum_c a_c,
loss = A lse - sum_c a_c z_c, g = (1/tau) sum_c (A p_c - a_c) w_hat_c, dx = (g - (g . x_hat) x_hat) / |x|; dw likewise.

* ``forward_kernel``: one program owns BLOCK_N rows, a range of the classes and BLOCK_D columns of U = sum_c e^(z_c - m)
  w_hat_c without the label's. It reads x once and its range of W once (so W is read N / BLOCK_N times, from L2), keeps
  the running max m, and writes per row six numbers and U, as partials of its range.
* ``combine_kernel``: one program owns a few whole rows, sums the partials in the order of the ranges, and writes what
  the operator returns for them. ``reduce_kernel``, a single program, adds up the loss where one number is wanted.
* ``gradient_kernel``: from a known lse, one program owns rows (dx) or classes (dw), a range of the other operand and
  BLOCK_D columns; recomputes z and writes its gradient, or a partial that ``project_kernel`` sums in order.

Target ids without smoothing take dx from U, two matrix products in all; the others take the second pass of
``gradient_kernel``, three. Up to D = 256 a tile holds whole rows and takes the norms on its way. A larger D reads them
from ``norm_kernel``, loops over D for z, and repeats that in every program of BLOCK_D columns: with D = 2048 each
gradient computes z eight times.

Assumed: last dimensions contiguous, fp32 sums, C < 2^31, fewer than 2^24 classes in one range.
"""

# Triton types the kernels.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import cdiv
from .kernel_gradient import (
    inverse_temperature,
    load_factors,
    load_labels,
    load_tile,
    operand,
    products,
    row_weights,
    scaled,
    shares,
    store_tile,
    summand,
    through_norm,
    tile_inverse,
)
from .launch import Head

# Rows of the forward's partials [splits + 1, 6, N]: running max, sum of exponentials, number of larger logits, sum of
# e z, sum of a z without the label's own part, label's logit.
FACTS = tl.constexpr(6)


@triton.jit(do_not_specialize=["N", "C", "B", "first_class", "num_classes", "ignore_index", "classes_per_split"])
def forward_kernel(
    x_ptr, w_ptr, label_ptr, share_ptr, class_weight_ptr, threshold_ptr, tau_ptr, inverse_x_ptr, inverse_w_ptr,
    partial_ptr, sums_ptr,
    N, C, B, first_class, num_classes, ignore_index, classes_per_split, stride_x, stride_w, stride_share,
    tau, smoothing,
    D: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, SOFT: tl.constexpr, SPREAD: tl.constexpr,
    ACCUMULATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid_n, pid_s, pid_d = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    whole: tl.constexpr = BLOCK_D >= D
    x_type: tl.constexpr = x_ptr.dtype.element_ty
    w_type: tl.constexpr = w_ptr.dtype.element_ty
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    label, _, valid = load_labels(label_ptr, offs_n, mask_n, B, num_classes, ignore_index, SOFT)
    here = valid & (label >= first_class) & (label < first_class + C)
    local = tl.where(here, label - first_class, -1).to(tl.int32)
    row_y = tl.where(here, local, 0)
    inverse_tau = inverse_temperature(tau_ptr, tau)

    if whole:
        inverse_x = tile_inverse(load_tile(x_ptr, offs_n, mask_n, stride_x, 0, D, BLOCK_D))
        inverse_y = tile_inverse(load_tile(w_ptr, row_y, here, stride_w, 0, D, BLOCK_D))
    else:
        inverse_x = tl.load(inverse_x_ptr + offs_n, mask=mask_n, other=0.0)
        inverse_y = tl.load(inverse_w_ptr + row_y, mask=here, other=0.0)
    # The label's logit by the same products in the same order as all others, so that equal classes give equal logits.
    dots_y = products(x_ptr, offs_n, mask_n, stride_x, inverse_x, w_ptr, row_y, here, stride_w, inverse_y,
                      D, COMPUTE, PRECISION, BLOCK_N, BLOCK_N, BLOCK_K)  # fmt: skip
    diagonal = tl.arange(0, BLOCK_N)[:, None] == tl.arange(0, BLOCK_N)[None, :]
    z_y = scaled(dots_y, inverse_x[:, None], x_type, inverse_y[None, :], w_type, inverse_tau, COMPUTE)
    logit_y = tl.sum(tl.where(diagonal, z_y, 0.0), 1)
    if threshold_ptr is not None:
        threshold = tl.load(threshold_ptr + offs_n, mask=mask_n, other=0.0)
    else:
        threshold = tl.where(here, logit_y, float("inf"))

    if BLOCK_K >= D:
        x = operand(load_tile(x_ptr, offs_n, mask_n, stride_x, 0, D, BLOCK_D), inverse_x, COMPUTE)
    running_max = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    larger = tl.zeros((BLOCK_N,), tl.int32)
    moment = tl.zeros((BLOCK_N,), tl.float32)
    term = tl.zeros((BLOCK_N,), tl.float32)
    sums = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    first = pid_s * classes_per_split
    for start in range(first, tl.minimum(first + classes_per_split, C), BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        if whole:
            w = load_tile(w_ptr, offs_c, mask_c, stride_w, 0, D, BLOCK_D)
            inverse_w = tile_inverse(w)
        else:
            inverse_w = tl.load(inverse_w_ptr + offs_c, mask=mask_c, other=0.0)
        if BLOCK_K >= D:
            dots = tl.dot(x, tl.trans(operand(w, inverse_w, COMPUTE)), input_precision=PRECISION)
        else:
            dots = products(x_ptr, offs_n, mask_n, stride_x, inverse_x, w_ptr, offs_c, mask_c, stride_w, inverse_w,
                            D, COMPUTE, PRECISION, BLOCK_N, BLOCK_C, BLOCK_K)  # fmt: skip
        z = scaled(dots, inverse_x[:, None], x_type, inverse_w[None, :], w_type, inverse_tau, COMPUTE)
        if SOFT or SPREAD:
            share = shares(share_ptr, stride_share, class_weight_ptr, (offs_n % B)[:, None], mask_n[:, None],
                           (first_class + offs_c)[None, :], mask_c[None, :], num_classes, smoothing, SOFT)  # fmt: skip
            term += tl.sum(share * z, 1)
        shown = tl.where(mask_c[None, :], z, float("-inf"))
        other = offs_c[None, :] != local[:, None]
        larger += tl.sum(((shown > threshold[:, None]) & other).to(tl.int32), 1)
        new_max = tl.maximum(running_max, tl.max(shown, 1))
        fade = tl.exp(running_max - new_max)
        e = tl.exp(shown - new_max[:, None])
        total = total * fade + tl.sum(e, 1)
        running_max = new_max
        if ACCUMULATE:
            if not whole:
                w = load_tile(w_ptr, offs_c, mask_c, stride_w, pid_d * BLOCK_D, D, BLOCK_D)
            # Without the label's own: rounded to COMPUTE, a probability near 1 would not cancel with its 1.
            e = tl.where(other, e, 0.0)
            if COMPUTE != tl.float16:  # noqa: SIM300
                e *= inverse_w[None, :]
            w = summand(w, inverse_w, COMPUTE)
            sums = tl.dot(e.to(COMPUTE), w, sums * fade[:, None], input_precision=PRECISION)
        else:
            moment = moment * fade + tl.sum(e * z, 1)

    out = partial_ptr + pid_s.to(tl.int64) * FACTS * N + offs_n
    store = mask_n & (pid_d == 0)
    tl.store(out, running_max, mask=store)
    tl.store(out + N, total, mask=store)
    tl.store(out + 2 * N, larger.to(tl.float32), mask=store)
    tl.store(out + 3 * N, moment, mask=store)
    tl.store(out + 4 * N, term, mask=store)
    tl.store(out + 5 * N, logit_y, mask=store)
    if ACCUMULATE:
        store_tile(sums_ptr, pid_s.to(tl.int64) * N + offs_n, mask_n, D, pid_d * BLOCK_D, sums, D, BLOCK_D)


@triton.jit(do_not_specialize=["N", "C", "B", "first_class", "num_classes", "ignore_index", "splits"])
def combine_kernel(
    x_ptr, w_ptr, label_ptr, weight_ptr, class_weight_ptr, tau_ptr, partial_ptr, sums_ptr,
    loss_ptr, lse_ptr, rank_ptr, logit_ptr, radial_ptr, grad_ptr, scale_ptr,
    N, C, B, first_class, num_classes, ignore_index, splits, stride_x, stride_w, tau, smoothing,
    D: tl.constexpr, SOFT: tl.constexpr, ACCUMULATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    label, ignored, valid = load_labels(label_ptr, offs_n, mask_n, B, num_classes, ignore_index, SOFT)
    factor = load_factors(class_weight_ptr, label, mask_n)
    weight = row_weights(weight_ptr, offs_n, mask_n, B, factor, smoothing, SOFT)
    local = label - first_class
    own = tl.where(valid & (local >= 0) & (local < C), (1.0 - smoothing) * factor, 0.0)
    if SOFT:
        own = tl.zeros_like(own)

    at = partial_ptr + offs_n
    logit_y = tl.load(at + 5 * N, mask=mask_n, other=0.0)
    top = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    for _ in range(0, splits):
        top = tl.maximum(top, tl.load(at, mask=mask_n, other=0.0))
        at += FACTS * N
    at = partial_ptr + offs_n
    total = tl.zeros((BLOCK_N,), tl.float32)
    larger = tl.zeros((BLOCK_N,), tl.int64)
    moment = tl.zeros((BLOCK_N,), tl.float32)
    term = tl.where(own != 0.0, own * logit_y, 0.0)
    for _ in range(0, splits):
        fade = tl.exp(tl.load(at, mask=mask_n, other=0.0) - top)
        total += fade * tl.load(at + N, mask=mask_n, other=1.0)
        larger += tl.load(at + 2 * N, mask=mask_n, other=0.0).to(tl.int64)
        moment += fade * tl.load(at + 3 * N, mask=mask_n, other=0.0)
        term += tl.load(at + 4 * N, mask=mask_n, other=0.0)
        at += FACTS * N
    # For the second pass: where a small tau makes lse large, a probability from it would be inexact.
    tl.store(at, top, mask=mask_n)
    tl.store(at + N, total, mask=mask_n)
    lse = top + tl.log(total)
    kept = valid & (ignored == 0)
    term = tl.where(kept, term, 0.0)
    loss = tl.where(valid, weight * tl.log(total) + (weight * top - term), float("nan"))
    tl.store(loss_ptr + offs_n, tl.where(ignored, 0.0, loss), mask=mask_n)
    tl.store(lse_ptr + offs_n, lse, mask=mask_n)
    tl.store(rank_ptr + offs_n, tl.where(kept, larger, -1), mask=mask_n)
    tl.store(logit_ptr + offs_n, term, mask=mask_n)
    if scale_ptr is not None:
        tl.store(scale_ptr, 1.0, mask=tl.program_id(0) == 0)

    if ACCUMULATE:
        sums = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        rows = offs_n.to(tl.int64)
        at = partial_ptr + offs_n
        for _ in range(0, splits):
            fade = tl.exp(tl.load(at, mask=mask_n, other=0.0) - top) / total
            sums += fade[:, None] * load_tile(sums_ptr, rows, mask_n, D, 0, D, BLOCK_D)
            at += FACTS * N
            rows += N
        has_y = own != 0.0
        w_y = load_tile(w_ptr, tl.where(has_y, local, 0), mask_n & has_y, stride_w, 0, D, BLOCK_D)
        w_y = w_y.to(tl.float32) * tile_inverse(w_y)[:, None]
        inverse_tau = inverse_temperature(tau_ptr, tau)
        pull = tl.where(has_y, weight * (tl.exp(tl.where(has_y, logit_y - top, 0.0)) / total) - own, 0.0)
        g = tl.where(kept[:, None], (weight[:, None] * sums + pull[:, None] * w_y) * inverse_tau, 0.0)
        x = load_tile(x_ptr, offs_n, mask_n, stride_x, 0, D, BLOCK_D)
        grad, radial = through_norm(g, x)
        store_tile(grad_ptr, offs_n, mask_n, D, 0, grad, D, BLOCK_D)
    else:
        radial = tl.where(kept, weight * moment / total - term, 0.0)
    tl.store(radial_ptr + offs_n, radial, mask=mask_n)


@triton.jit(do_not_specialize=["N", "B", "num_classes", "ignore_index"])
def reduce_kernel(
    rows_ptr, label_ptr, class_weight_ptr, loss_ptr, scale_ptr, N, B, num_classes, ignore_index,
    SOFT: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    loss = tl.zeros((BLOCK,), tl.float32)
    factors = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        offs_n = start + tl.arange(0, BLOCK)
        mask_n = offs_n < N
        loss += tl.load(rows_ptr + offs_n, mask=mask_n, other=0.0)
        label, ignored, _ = load_labels(label_ptr, offs_n, mask_n, B, num_classes, ignore_index, SOFT)
        if SOFT:
            factors += tl.where(mask_n, 1.0, 0.0)
        else:
            factors += tl.where(ignored, 0.0, load_factors(class_weight_ptr, label, mask_n))
    value = tl.sum(loss, 0)
    if MEAN:
        divisor = tl.sum(factors, 0)
        none = divisor == 0.0
        scale = 1.0 / tl.where(none, 1.0, divisor)
        tl.store(loss_ptr, tl.where(none, float("nan"), value * scale))
        tl.store(scale_ptr, tl.where(none, 0.0, scale))
    else:
        tl.store(loss_ptr, value)
        tl.store(scale_ptr, 1.0)


def cosine_ce(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: Tensor | None,
    temperature_value: float,
    class_weight: Tensor | None,
    threshold: Tensor | None,
    first_class: int,
    num_classes: int,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    compute: torch.dtype,
    input_grad: bool,
    weight_grad: bool,
    _splits: int | None = None,
) -> tuple[Tensor, ...]:
    """Launcher of ``fastrex::cosine_ce``. ``_splits`` overrides how often the tests divide a program's work.

    Where no row has a target ``scale`` is 0, so that a mean of nothing is NaN and its gradients are 0, as in PyTorch.
    """
    N, D = input.shape

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return input.new_empty(shape, dtype=dtype)

    loss, scale = empty(*((N,) if reduction == 0 else ())), empty()
    lse, rank, target_logit, radial = empty(N), empty(N, dtype=torch.int64), empty(N), empty(N)
    kind = torch.float32 if input.dtype == torch.float16 else input.dtype
    grad_input = empty(*((N, D) if input_grad else (0,)), dtype=kind)
    grad_weight = empty(*(weight.shape if weight_grad else (0,)))
    outputs = (loss, scale, lse, rank, target_logit, grad_input, grad_weight, radial)
    if N == 0:
        grad_weight.zero_()
        loss.fill_(float("nan") if reduction == 1 else 0.0)
        scale.fill_(float(reduction != 1))
        return outputs
    with torch.cuda.device_of(input):
        head = Head(
            input, weight, target, temperature, temperature_value, class_weight, first_class, num_classes,
            ignore_index, label_smoothing, compute,
        )  # fmt: skip
        accumulate = head.fused and input_grad
        chunks = cdiv(D, head.tile.columns) if accumulate else 1
        grid, each = head.grid(N, head.C, chunks, N * (D if accumulate else FACTS.value) * 4, _splits)
        # The last takes the maximum and the sum over all parts.
        partial = empty(grid[1] + 1, FACTS.value, N)
        sums = empty(grid[1], N, D) if accumulate else None
        forward_kernel[grid](
            **head.common, **head.tiles, threshold_ptr=threshold, partial_ptr=partial, sums_ptr=sums,
            classes_per_split=each, ACCUMULATE=accumulate, BLOCK_N=head.tile.own, BLOCK_C=head.tile.stream,
        )  # fmt: skip
        rows = loss if reduction == 0 else empty(N)
        combine_kernel[(cdiv(N, head.lines),)](
            **head.common, weight_ptr=head.mass, partial_ptr=partial, sums_ptr=sums, loss_ptr=rows, lse_ptr=lse,
            rank_ptr=rank, logit_ptr=target_logit, radial_ptr=radial, grad_ptr=grad_input if accumulate else None,
            scale_ptr=scale if reduction == 0 else None, splits=grid[1], ACCUMULATE=accumulate, BLOCK_N=head.lines,
            BLOCK_D=head.line,
        )  # fmt: skip
        if reduction != 0:
            reduce_kernel[(1,)](
                rows, head.common["label_ptr"], head.common["class_weight_ptr"], loss, scale, N, target.shape[0],
                num_classes, ignore_index, SOFT=head.common["SOFT"], MEAN=reduction == 1, BLOCK=1024,
            )  # fmt: skip
        if input_grad and not accumulate:
            head.gradient(partial[-1, 0], partial[-1, 1], None, grad_input, radial, _splits)
        if weight_grad:
            head.gradient(partial[-1, 0], partial[-1, 1], None, grad_weight, None, _splits)
    return outputs


def cosine_ce_backward(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: Tensor | None,
    temperature_value: float,
    class_weight: Tensor | None,
    first_class: int,
    num_classes: int,
    ignore_index: int,
    label_smoothing: float,
    compute: torch.dtype,
    lse: Tensor,
    grad_rows: Tensor,
    uniform_grad_weight: Tensor | None,
    input_grad: bool,
    weight_grad: bool,
    _splits: int | None = None,
) -> tuple[Tensor, ...]:
    """Launcher of ``fastrex::cosine_ce_backward``; ``radial`` is 0 where neither features nor temperature want it.

    ``uniform_grad_weight`` is not looked at: whether it serves would take a sync.
    """
    radial = input.new_empty(input.shape[0], dtype=torch.float32)
    grad_input = input.new_empty(input.shape if input_grad else (0,))
    grad_weight = weight.new_empty(weight.shape if weight_grad else (0,))
    if input.shape[0] == 0:
        return grad_input, grad_weight.zero_(), radial
    with torch.cuda.device_of(input):
        head = Head(
            input, weight, target, temperature, temperature_value, class_weight, first_class, num_classes,
            ignore_index, label_smoothing, compute,
        )  # fmt: skip
        lse, upstream = lse.contiguous(), grad_rows.contiguous()
        if input_grad or temperature is not None:
            out = grad_input if input_grad else torch.empty_like(head.x)
            head.gradient(lse, None, upstream, out, radial, _splits)
        else:
            radial.zero_()
        if weight_grad:
            head.gradient(lse, None, upstream, grad_weight, None, _splits)
    return grad_input, grad_weight, radial
