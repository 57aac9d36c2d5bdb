"""The other ways to compute the same: what fastrex's own implementations are measured beside.

Each file defines ``NAME``, ``OPS`` (names of the operators that it is a rival for; None for all of them) and
``build(op, call) -> function``, which returns a function with the arguments and outputs of the operator, by name, or
raises :class:`Absent`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastrex_kernels._op import Call, Op

from . import apple_cce, chunked, compiled, eager, liger, linear_cross_entropy, metric_learning
from ._absent import Absent

__all__ = ["RIVALS", "Absent", "Rival"]


@dataclass(frozen=True)
class Rival:
    """A way to compute an operator without fastrex's kernels."""

    name: str
    build: Callable[[Op, Call], Callable[..., Any]]
    ops: tuple[str, ...] | None = None

    def competes(self, op: str) -> bool:
        return self.ops is None or op in self.ops


RIVALS = (
    Rival(eager.NAME, eager.build, eager.OPS),
    Rival(compiled.NAME, compiled.build, compiled.OPS),
    Rival(linear_cross_entropy.NAME, linear_cross_entropy.build, linear_cross_entropy.OPS),
    Rival(linear_cross_entropy.CHUNKED, linear_cross_entropy.build_chunked, linear_cross_entropy.OPS),
    Rival(chunked.NAME, chunked.build, chunked.OPS),
    Rival(liger.NAME, liger.build, liger.OPS),
    Rival(apple_cce.NAME, apple_cce.build, apple_cce.OPS),
    Rival(metric_learning.NAME, metric_learning.build, metric_learning.OPS),
)
