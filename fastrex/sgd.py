"""SGD with momentum and the EMA that follows it: the fused op, PyTorch's own kernels, and NVIDIA apex's.

All three compute the same: d = gradient * inv_scale + decay * p; b = momentum * b + d; p = p - lr * b; then the EMA
towards the updated p, then the rounded copies; where ``skip`` is set, nothing. The fused op does it in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrex_kernels import sgd_ema_

from . import apex

if TYPE_CHECKING:
    from .optim import Optimizer

Update = Callable[[Tensor, Tensor | None], None]


class Fused:
    """One call of ``fastrex_kernels.sgd_ema_``."""

    def __init__(self, owner: Optimizer, momentum: float, ema_momentum: float) -> None:
        self.owner, self.momentum, self.ema_momentum = owner, momentum, ema_momentum

    def __call__(self, skip: Tensor, inv_scale: Tensor | None) -> None:
        owner = self.owner
        names = [name for name, p in owner.parameters.items() if p.grad is not None]
        sgd_ema_(
            [owner.parameters[n] for n in names],
            [owner.parameters[n].grad for n in names],  # type: ignore[misc]
            [owner.buffers[n] for n in names],
            [owner.ema.get(n) for n in names],
            lr=owner.lr,
            momentum=self.momentum,
            weight_decay=[owner.decay[n] for n in names],
            ema_momentum=self.ema_momentum,
            inv_scale=inv_scale,
            skip=skip,
            param_copies=[owner.copies.get(n) for n in names] if owner.copies else None,
            ema_copies=[owner.ema_copies.get(n) for n in names] if owner.ema_copies else None,
        )


class _Separate:
    """SGD by an optimiser of ``torch.optim``'s interface, then EMA and copies by lists of tensors."""

    def __init__(self, owner: Optimizer, ema_momentum: float, make: Callable[..., Any]) -> None:
        self.owner, self.rate = owner, 1.0 - ema_momentum
        groups: dict[float, list[Tensor]] = {}
        for name, p in owner.parameters.items():
            groups.setdefault(owner.decay[name], []).append(p)
        self.sgd = make([{"params": params, "weight_decay": decay} for decay, params in groups.items()])
        for name, p in owner.parameters.items():
            self.sgd.state[p]["momentum_buffer"] = owner.buffers[name]
        self.followed = _both(owner.parameters, owner.ema)
        self.rounded = [_both(owner.parameters, owner.copies), _both(owner.ema, owner.ema_copies)]

    @torch.no_grad()
    def follow(self, skip: Tensor) -> None:
        params, ema = self.followed
        if ema:
            apart = torch._foreach_sub(params, ema)
            torch._foreach_mul_(apart, torch.where(skip, 0.0, self.rate))
            torch._foreach_add_(ema, apart)
        for masters, copies in self.rounded:
            if copies:
                torch._foreach_copy_(copies, masters)


def _both(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """The tensors whose names stand in both, in one order."""
    names = [name for name in left if name in right]
    return [left[name] for name in names], [right[name] for name in names]


class Torch(_Separate):
    """``torch.optim.SGD(fused=True)``, whose kernel takes the loss scale and ``found_inf`` from the device."""

    def __init__(self, owner: Optimizer, momentum: float, ema_momentum: float) -> None:
        super().__init__(
            owner, ema_momentum, lambda groups: torch.optim.SGD(groups, lr=owner.lr, momentum=momentum, fused=True)
        )

    def __call__(self, skip: Tensor, inv_scale: Tensor | None) -> None:
        self.sgd.found_inf = skip.float()
        self.sgd.grad_scale = None if inv_scale is None else inv_scale.reciprocal()
        self.sgd.step()
        self.follow(skip)


class Apex(_Separate):
    """``apex.optimizers.FusedSGD`` of NVIDIA apex. It takes the learning rate from the host: no CUDA graph."""

    def __init__(self, owner: Optimizer, momentum: float, ema_momentum: float) -> None:
        make = apex.fused_sgd()
        super().__init__(owner, ema_momentum, lambda groups: make(groups, lr=0.0, momentum=momentum))

    def __call__(self, skip: Tensor, inv_scale: Tensor | None) -> None:
        grads = [p.grad for p in self.owner.parameters.values() if p.grad is not None]
        if inv_scale is not None:
            torch._foreach_mul_(grads, inv_scale)
        for group in self.sgd.param_groups:
            group["lr"] = self.owner.host_lr
        # Its kernels read this before anything else and do nothing where it is set.
        self.sgd._dummy_overflow_buf.copy_(skip)
        self.sgd.step()
        self.follow(skip)


IMPLS: dict[str, Callable[[Optimizer, float, float], Update]] = {"fused": Fused, "torch": Torch, "apex": Apex}
