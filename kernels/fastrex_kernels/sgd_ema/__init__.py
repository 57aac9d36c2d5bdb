"""One optimiser step: SGD with momentum and weight decay, then the momentum encoder towards the updated parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._op import choose, define, raw
from .reference import sgd_ema_reference


def _fake(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    ema_params: list[Tensor],
    ema_index: list[int],
    param_copies: list[Tensor],
    param_copy_index: list[int],
    ema_copies: list[Tensor],
    ema_copy_index: list[int],
    weight_decay: list[float],
    lr: Tensor,
    momentum: float,
    momentum_scalar: Tensor | None,
    ema_momentum: float,
    ema_momentum_scalar: Tensor | None,
    inv_scale: Tensor | None,
    skip: Tensor | None,
) -> None:
    return None


# A schema has no mutable list of optional tensors: the lists of what not every parameter has are dense, and an index
# says which entry belongs to a parameter, -1 for none.
define(
    __name__,
    "sgd_ema_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor(c!)[] ema_params,"
    " int[] ema_index, Tensor(d!)[] param_copies, int[] param_copy_index, Tensor(e!)[] ema_copies,"
    " int[] ema_copy_index, float[] weight_decay, Tensor lr, float momentum, Tensor? momentum_scalar,"
    " float ema_momentum, Tensor? ema_momentum_scalar, Tensor? inv_scale, Tensor? skip) -> ()",
    _fake,
)


def sgd_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    ema_params: Sequence[Tensor | None],
    *,
    lr: Tensor,
    momentum: float | Tensor,
    weight_decay: Sequence[float],
    ema_momentum: float | Tensor = 0.999,
    inv_scale: Tensor | None = None,
    skip: Tensor | None = None,
    param_copies: Sequence[Tensor | None] | None = None,
    ema_copies: Sequence[Tensor | None] | None = None,
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
        params, grads, momentum_buffers: equally long lists of equally shaped tensors. The kernels take parameters,
            buffers and EMA copies in float32, gradients also in bfloat16 and float16; they are fastest where the
            tensors of one parameter share dense strides (any order of the axes).
        ema_params: the EMA copy of each parameter, or None for a parameter without one (class weights).
        lr: 0-d tensor. weight_decay: one float per parameter.
        momentum, ema_momentum: floats in [0, 1], or 0-d tensors.
        inv_scale: 0-d tensor that gradients are multiplied by (loss scaling).
        skip: 0-d tensor, bool or a number that is not 0 (``found_inf``): nothing changes.
        param_copies, ema_copies: for each parameter a bfloat16 or float16 tensor that the new values are rounded into,
            or None; an EMA's copy belongs to a parameter with an EMA.
        impl: "auto", "reference", "cpp" or "triton". On CUDA the addresses of the tensors are sent to the device when
            they change: warm up before capturing a CUDA graph.

    Raises:
        ValueError: lists of different length, tensors of another shape, or a dtype that ``impl`` does not take.
    """
    count = len(params)
    for name, values in (
        ("grads", grads),
        ("momentum_buffers", momentum_buffers),
        ("ema_params", ema_params),
        ("weight_decay", weight_decay),
        ("param_copies", param_copies),
        ("ema_copies", ema_copies),
    ):
        if values is not None and len(values) != count:
            raise ValueError(f"sgd_ema_: {name} must have one entry per parameter ({count}), got {len(values)}")
    for name, value in (("momentum", momentum), ("ema_momentum", ema_momentum)):
        if not isinstance(value, Tensor) and not 0.0 <= value <= 1.0:
            raise ValueError(f"sgd_ema_: {name} must be in [0, 1], got {value}")
    if not isinstance(lr, Tensor) or lr.ndim:
        raise TypeError(f"sgd_ema_: lr must be a 0-d tensor, got {lr!r}")
    if not count:
        return
    # One parameter that no kernel takes is enough for the reference.
    odd = next((param for param in params if param.dtype is not torch.float32), params[0])
    impl = choose("sgd_ema_", impl, odd, dtypes=(torch.float32,))
    if impl != "cpp":  # which checks for itself, at no cost
        _check_shapes(params, grads, "grads")
        _check_shapes(params, momentum_buffers, "momentum_buffers")
        _check_shapes(params, ema_params, "ema_params")
        _check_shapes(params, param_copies or (), "param_copies")
        _check_shapes(params, ema_copies or (), "ema_copies")
    with torch.no_grad():
        if impl == "reference":
            none = (None,) * count
            lists = (params, grads, momentum_buffers, ema_params, param_copies or none, ema_copies or none)
            sgd_ema_reference(*lists, lr, momentum, weight_decay, ema_momentum, inv_scale, skip)
            return
        raw(__name__, "sgd_ema_", impl)(
            params,
            grads,
            momentum_buffers,
            *_dense(ema_params),
            *_dense(param_copies or ()),
            *_dense(ema_copies or ()),
            weight_decay,
            lr,
            *_scalar(momentum),
            *_scalar(ema_momentum),
            inv_scale,
            skip,
        )


def _check_shapes(params: Sequence[Tensor], tensors: Sequence[Tensor | None], name: str) -> None:
    for index, (param, tensor) in enumerate(zip(params, tensors, strict=False)):
        if tensor is not None and param.shape != tensor.shape:
            raise ValueError(
                f"sgd_ema_: {name}[{index}] must have the parameter's shape {tuple(param.shape)}, "
                f"got {tuple(tensor.shape)}"
            )


def _dense(tensors: Sequence[Tensor | None]) -> tuple[list[Tensor], list[int]]:
    """The tensors that are there, and for each parameter the place of its own, or -1."""
    there: list[Tensor] = []
    index = []
    for tensor in tensors:
        if tensor is None:
            index.append(-1)
        else:
            index.append(len(there))
            there.append(tensor)
    return there, index


def _scalar(value: float | Tensor) -> tuple[float, Tensor | None]:
    return (0.0, value) if isinstance(value, Tensor) else (value, None)
