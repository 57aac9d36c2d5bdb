"""Definition of :func:`sgd_ema_` in eager PyTorch, tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sgd_ema_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    ema_params: Sequence[Tensor | None],
    param_copies: Sequence[Tensor | None],
    ema_copies: Sequence[Tensor | None],
    lr: Tensor,
    momentum: float | Tensor,
    weight_decay: Sequence[float],
    ema_momentum: float | Tensor,
    inv_scale: Tensor | None,
    skip: Tensor | None,
) -> None:
    """See :func:`sgd_ema_`. A skipped step must leave every bit alone even when the gradient is NaN: hence where, not
    *."""
    skipped = None if skip is None else skip != 0

    def write(target: Tensor, value: Tensor) -> None:
        target.copy_(value if skipped is None else torch.where(skipped, target, value.to(target.dtype)))

    for param, grad, buffer, ema, param_copy, ema_copy, decay in zip(
        params, grads, momentum_buffers, ema_params, param_copies, ema_copies, weight_decay, strict=True
    ):
        delta = grad.to(param.dtype)
        if inv_scale is not None:
            delta = delta * inv_scale
        if decay:
            delta = delta.add(param, alpha=decay)
        write(buffer, buffer * momentum + delta)
        write(param, param - lr * buffer)
        if param_copy is not None:
            write(param_copy, param)
        if ema is not None:
            write(ema, ema.lerp(param, 1 - ema_momentum))
            if ema_copy is not None:
                write(ema_copy, ema)
