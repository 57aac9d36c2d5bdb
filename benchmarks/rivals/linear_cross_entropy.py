"""``F.linear_cross_entropy`` of PyTorch 2.13 behind the normalisation: as it is, and with its own chunking."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrex_kernels._op import Call, Op

from . import _cosine
from ._absent import Absent

NAME, CHUNKED, OPS = "linear_cross_entropy", "linear_cross_entropy_chunked", (_cosine.OP,)


def build(op: Op, call: Call) -> Callable[..., Any]:
    return _build(call, None)


def build_chunked(op: Op, call: Call) -> Callable[..., Any]:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Absent(f"torch {torch.__version__} has no LinearCrossEntropyOptions; torch 2.13 does")
    return _build(call, torch.nn.LinearCrossEntropyOptions())


def _build(call: Call, chunking: Any) -> Callable[..., Any]:
    if not hasattr(F, "linear_cross_entropy"):
        raise Absent(f"torch {torch.__version__} has no F.linear_cross_entropy; torch 2.13 does")
    # With smoothing PyTorch warns and takes the other path.
    smoothing = ("label_smoothing",) if chunking is None else ()
    _cosine.require_plain(call, "class_weight", "ignore_index", *smoothing)

    def run(
        input: Tensor,
        weight: Tensor,
        target: Tensor,
        temperature: float | Tensor = 0.1,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        return_stats: bool = False,
    ) -> Tensor:
        rows, classes, label = _cosine.operands(input, weight, target, temperature)
        return F.linear_cross_entropy(
            rows, classes, label, weight=class_weight, reduction=reduction, ignore_index=ignore_index,
            label_smoothing=label_smoothing, options=chunking,
        )  # fmt: skip

    return run
