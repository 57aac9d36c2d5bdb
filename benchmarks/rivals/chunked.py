"""The ten lines that someone short of memory writes: eager PyTorch over chunks of rows, gradients in the same pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrex_kernels._op import Call, Op

from . import _cosine
from ._absent import Absent

NAME, OPS = "chunked", (_cosine.OP,)
# Logits of one chunk: small enough for the caches where the classes are few, large enough for the matrix product.
CHUNK_ELEMENTS, MIN_ROWS, MAX_ROWS = 2**20, 32, 512


def build(op: Op, call: Call) -> Callable[..., Any]:
    _cosine.require_plain(call, "ignore_index", "label_smoothing")
    if {**call.options, **call.tensors}.get("reduction", "mean") == "none":
        raise Absent("sums its chunks: no reduction='none'")

    def run(rows: Tensor, classes: Tensor, label: Tensor, ignored: int, smoothing: float, reduction: str) -> Tensor:
        gradients = torch.is_grad_enabled()
        total = _Chunks.apply(rows, classes, label, ignored, smoothing, gradients)  # type: ignore[no-untyped-call]
        # In the dtype that eager PyTorch gives the loss.
        return _cosine.reduce(total, label, reduction, ignored).to(rows.dtype)

    return _cosine.normalised(run)


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, classes: Tensor, label: Tensor, ignored: int, smoothing: float, gradients: bool
    ) -> Tensor:
        size = min(max(CHUNK_ELEMENTS // len(classes), MIN_ROWS), MAX_ROWS)
        total = rows.new_zeros((), dtype=torch.promote_types(rows.dtype, torch.float32))
        trained = gradients and ctx.needs_input_grad[1]
        d_rows = torch.empty_like(rows)
        # Summed in float32: a sum over chunks in bfloat16 would be several times less exact than one matrix product.
        d_classes = classes.new_zeros(classes.shape, dtype=total.dtype) if trained else None
        for start in range(0, len(rows), size):
            with torch.set_grad_enabled(gradients):
                chunk = rows[start : start + size].detach().requires_grad_(gradients)
                weights = classes.detach().requires_grad_(trained)
                losses = F.cross_entropy(
                    chunk @ weights.T, label[start : start + size], ignore_index=ignored, label_smoothing=smoothing,
                    reduction="sum",
                )  # fmt: skip
            total += losses.detach()
            if gradients:
                found = torch.autograd.grad(losses, [chunk, weights] if trained else [chunk])
                d_rows[start : start + size] = found[0]
                if d_classes is not None:
                    d_classes += found[1]
        ctx.save_for_backward(d_rows, d_classes)
        ctx.dtype = classes.dtype
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        d_rows, d_classes = ctx.saved_tensors
        scaled = None if d_classes is None else d_classes.mul_(upstream).to(ctx.dtype)
        return d_rows.mul_(upstream), scaled, None, None, None, None
