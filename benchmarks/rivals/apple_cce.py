"""Apple's Cut Cross-Entropy (Wijmans et al., ICLR 2025) behind the normalisation."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from fastrex_kernels._op import Call, Op

from .. import machine
from . import _cosine
from ._absent import Absent

NAME, OPS = "apple_cce", (_cosine.OP,)


def build(op: Op, call: Call) -> Callable[..., Any]:
    if not machine.installed("cut_cross_entropy"):
        raise Absent("cut-cross-entropy is not installed")
    if call.tensors["input"].device.type != "cuda":
        raise Absent("runs on GPUs only")
    _cosine.require_plain(call, "ignore_index")
    fused = import_module("cut_cross_entropy").linear_cross_entropy

    return _cosine.normalised(
        lambda rows, classes, label, ignored, smoothing, reduction: fused(
            rows, classes, label, ignore_index=ignored, reduction=reduction
        )
    )
