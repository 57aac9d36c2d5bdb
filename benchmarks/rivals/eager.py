"""What a researcher writes in PyTorch: the operator's own record has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastrex_kernels._op import Call, Op

NAME, OPS = "eager", None


def build(op: Op, call: Call) -> Callable[..., Any]:
    return op.eager
