"""LinkedIn's Liger kernels: their fused linear cross-entropy behind the normalisation."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

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

    return _cosine.normalised(
        lambda rows, classes, label, ignored, smoothing, reduction: fused(
            rows, classes, label, ignore_index=ignored, label_smoothing=smoothing, reduction=reduction
        )
    )
