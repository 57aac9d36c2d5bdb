"""LinkedIn's Liger kernels: their fused linear cross-entropy behind the normalisation."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor

from fastrex_kernels._op import Call, Op

from .. import machine
from . import _cosine
from ._absent import Absent

NAME, OPS = "liger", (_cosine.OP,)


def build(op: Op, call: Call) -> Callable[..., Any]:
    if not machine.installed("liger_kernel"):
        raise Absent("liger-kernel is not installed")
    if call.tensors["input"].device.type != "cuda":
        raise Absent("runs on GPUs only")
    _cosine.require_plain(call, "ignore_index", "label_smoothing")
    fused = import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy

    def run(
        input: Tensor,
        weight: Tensor,
        target: Tensor,
        temperature: float | Tensor = 0.1,
        class_weight: None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        return_stats: bool = False,
    ) -> Any:
        rows, classes, label = _cosine.operands(input, weight, target, temperature)
        return fused(
            rows, classes, label, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction
        )

    return run
