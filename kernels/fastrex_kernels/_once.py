"""Derivatives that kernels do not have, the second ones and those of forward mode, are refused, not wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual


class _Once(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, loss: Tensor, refusal: str) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.refusal = inputs[2]

    @staticmethod
    def backward(ctx: Any, *unused: Tensor) -> Any:
        raise RuntimeError(ctx.refusal)


def once(gradient: Tensor, loss: Tensor, refusal: str) -> Tensor:
    """``gradient``, tied by ``loss`` to the graph, so that a backward through it raises RuntimeError(``refusal``)."""
    apply: Any = _Once.apply
    tied: Tensor = apply(gradient, loss, refusal)
    return tied


def refuse_tangents(refusal: str, *tensors: Tensor | None) -> None:
    """Raise RuntimeError(``refusal``) where forward-mode differentiation has given one of ``tensors`` a tangent: it
    would come out as 0."""
    if not torch.compiler.is_compiling() and any(t is not None and _has_tangent(t) for t in tensors):
        raise RuntimeError(refusal)


def _has_tangent(tensor: Tensor) -> bool:
    return unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]
