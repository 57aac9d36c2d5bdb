"""Gradients that kernels give once: a second derivative of them is refused, not wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
