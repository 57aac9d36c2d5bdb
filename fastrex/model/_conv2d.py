"""Stands for the op until it is there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def conv2d(
    input: Tensor,
    weight: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    weight_copy: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    if weight_copy is None:
        return torch.nn.functional.conv2d(input, weight, stride=stride, padding=padding)
    out: Tensor = _Convolution.apply(input, weight, weight_copy, stride, padding)  # type: ignore[no-untyped-call]
    return out


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(input: Tensor, weight: Tensor, weight_copy: Tensor, stride: int, padding: int) -> Tensor:
        return torch.nn.functional.conv2d(input, weight_copy, stride=stride, padding=padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, weight_copy, ctx.stride, ctx.padding = inputs
        ctx.dtype = weight.dtype
        ctx.save_for_backward(input, weight_copy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        stride, padding = [ctx.stride] * 2, [ctx.padding] * 2
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
        dx, dw, _ = torch.ops.aten.convolution_backward(
            grad, input, weight, None, stride, padding, [1, 1], False, [0, 0], 1, wanted
        )
        return dx, None if dw is None else dw.to(ctx.dtype), None, None, None
