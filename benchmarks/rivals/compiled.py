"""The eager code under ``torch.compile``. It compiles when it is first called, before anything is timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastrex_kernels._op import Call, Op

from .. import machine
from ._absent import Absent

NAME, OPS = "compile", None


def build(op: Op, call: Call) -> Callable[..., Any]:
    if not torch.cuda.is_available() and machine.compiler() is None:
        raise Absent("torch.compile needs a C++ compiler, and there is no g++")
    torch._dynamo.reset()
    compiled: Callable[..., Any] = torch.compile(op.eager, dynamic=False)
    return compiled
