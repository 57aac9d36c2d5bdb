"""One optimiser step: SGD with momentum and weight decay, then the momentum encoder towards the updated parameters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .._op import resolve
from .reference import sgd_ema_reference

IMPLEMENTATIONS = {"reference": sgd_ema_reference}


def sgd_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    ema_params: Sequence[Tensor | None],
    *,
    lr: Tensor,
    momentum: float,
    weight_decay: Sequence[float],
    ema_momentum: float = 0.999,
    inv_scale: Tensor | None = None,
    skip: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Update parameters, momentum buffers and EMA copies in place, without a host sync.

    For each tensor, where ``skip`` is False::

        d = grad * inv_scale + weight_decay * param
        buffer = momentum * buffer + d           # no dampening, no Nesterov, as torch.optim.SGD
        param = param - lr * buffer
        ema = ema_momentum * ema + (1 - ema_momentum) * param

    The EMA follows the *updated* parameters: the forward of the next step then finds the same numbers as in the
    published order, where that step lerps towards the weights it is about to use (t-ReX, Sariyildiz et al., ICLR 2023).

    Args:
        params, grads, momentum_buffers: equally long lists of equally shaped tensors.
        ema_params: the EMA copy of each parameter, or None for a parameter without one (class weights).
        lr: 0-d tensor. momentum, ema_momentum: floats in [0, 1]. weight_decay: one float per parameter.
        inv_scale: 0-d tensor that gradients are multiplied by (loss scaling). skip: 0-d bool tensor.
        impl: "auto", "reference", "cpp" or "triton".

    Raises:
        ValueError: lists of different length, or a gradient of another shape.
    """
    run = resolve("sgd_ema_", impl, IMPLEMENTATIONS)
    for name, values in (
        ("grads", grads),
        ("momentum_buffers", momentum_buffers),
        ("ema_params", ema_params),
        ("weight_decay", weight_decay),
    ):
        if len(values) != len(params):
            raise ValueError(f"sgd_ema_: {name} must have one entry per parameter ({len(params)}), got {len(values)}")
    for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if param.shape != grad.shape:
            raise ValueError(
                f"sgd_ema_: grads[{index}] must have the parameter's shape {tuple(param.shape)}, "
                f"got {tuple(grad.shape)}"
            )
    run(params, grads, momentum_buffers, ema_params, lr, momentum, weight_decay, ema_momentum, inv_scale, skip)
