"""``conv2d`` in eager PyTorch: the definition, and what runs wherever the C++ convolution does not."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def conv2d_reference(input: Tensor, weight: Tensor, weight_copy: Tensor | None, stride: int, padding: int) -> Tensor:
    """Compute ``conv2d``; arguments as checked by the public function of that name."""
    if weight_copy is None:
        rounded = weight.to(input.dtype)
    elif torch.is_grad_enabled() and weight.requires_grad:
        rounded = _Rounded.apply(weight, weight_copy)  # type: ignore[no-untyped-call]
    else:
        rounded = weight_copy
    device = input.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != input.dtype:
        with torch.autocast(device, enabled=False):
            return F.conv2d(input, rounded, None, stride, padding)
    return F.conv2d(input, rounded, None, stride, padding)


class _Rounded(torch.autograd.Function):
    """The copy's values, whose gradient is the weight's."""

    @staticmethod
    def forward(weight: Tensor, copy: Tensor) -> Tensor:
        return copy.view_as(copy)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None
