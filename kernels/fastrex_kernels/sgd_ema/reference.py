"""Definition of :func:`sgd_ema_` in eager PyTorch, tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def sgd_ema_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    ema_params: Sequence[Tensor | None],
    lr: Tensor,
    momentum: float,
    weight_decay: Sequence[float],
    ema_momentum: float,
    inv_scale: Tensor | None,
    skip: Tensor | None,
) -> None:
    """See :func:`sgd_ema_`. A skipped step must leave every bit alone even when the gradient is NaN: hence where, not
    *."""
    for param, grad, buffer, ema, decay in zip(params, grads, momentum_buffers, ema_params, weight_decay, strict=True):
        delta = grad if inv_scale is None else grad * inv_scale
        if decay:
            delta = delta.add(param, alpha=decay)
        new_buffer = buffer.mul(momentum).add_(delta)
        new_param = param - lr * new_buffer
        if skip is not None:
            new_buffer = torch.where(skip, buffer, new_buffer)
            new_param = torch.where(skip, param, new_param)
        buffer.copy_(new_buffer)
        param.copy_(new_param)
        if ema is not None:
            new_ema = ema.lerp(param, 1 - ema_momentum)
            ema.copy_(new_ema if skip is None else torch.where(skip, ema, new_ema))
