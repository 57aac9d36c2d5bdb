"""Batch normalisation with an optional residual sum and ReLU, over one process or a group of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from .._op import choose, raw
from .function import PACKAGE, BatchStatistics, GivenStatistics, JoinedStatistics, check_count, rows_of
from .reference import batch_norm_act_reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def batch_norm_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    residual: Tensor | None = None,
    relu: bool = True,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    process_group: ProcessGroup | None = None,
    impl: str = "auto",
) -> Tensor:
    """Batch normalisation, then an optional sum, then an optional ReLU, as one op (Ioffe and Szegedy 2015).

    The same as this PyTorch, without its intermediate copies::

        y = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        y = y if residual is None else y + residual
        y = y.relu() if relu else y

    Args:
        input: [N, C] or [N, C, H, W] of any floating dtype; channels-last in gives channels-last out.
        weight: [C] scale, fp32 (fp64 for an fp64 input) or the input's dtype.
        bias: [C] shift, dtype of ``weight``.
        running_mean: [C] running mean, dtype of ``weight``; written in training. None only in training: keeps none.
        running_var: [C] running variance, likewise; gets the unbiased variance, as in PyTorch.
        residual: shape and dtype of ``input``; added before the ReLU.
        relu: whether negative results become 0.
        training: normalise with the batch's statistics (biased variance), else with the running ones.
        momentum: weight of the new value in the running statistics, in [0, 1].
        eps: added to the variance.
        process_group: in training, statistics are those of the joined batch of all ranks of this group, which may
            hold different (also zero) numbers of rows: one all-reduce forward, one backward. The gradients of
            ``weight`` and ``bias`` are the rank's own share, so that their sum over ranks is the joined gradient.
        impl: "auto", "reference", "cpp" or "triton". The kernels take fp32, bf16 and fp16, [N, C] or channels-last;
            "auto" leaves anything else to the reference. They are deterministic, and differentiable once.

    Returns:
        Tensor of the shape, dtype and memory format of ``input``. Statistics are fp32 or better for every dtype.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a shape, device or scalar is wrong; in training, a channel has fewer than two values in all.
    """
    if input.dim() not in (2, 4):
        raise ValueError(f"batch_norm_act: input must be [N, C] or [N, C, H, W], got shape {list(input.shape)}")
    if not input.is_floating_point():
        raise TypeError(f"batch_norm_act: input must be floating point, got {input.dtype}; cast it first")
    wide = torch.promote_types(input.dtype, torch.float32)
    if weight.dtype not in (wide, input.dtype):
        raise TypeError(f"batch_norm_act: weight must be {wide} for an input of {input.dtype}, got {weight.dtype}")
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, vector in vectors.items():
        if vector is None:
            if not training:
                raise ValueError(f"batch_norm_act: {name} must be a tensor when training=False, got None")
            continue
        if vector.shape != (input.shape[1],):
            raise ValueError(f"batch_norm_act: {name} must be [C] = [{input.shape[1]}], got {list(vector.shape)}")
        if vector.dtype != weight.dtype:
            raise TypeError(f"batch_norm_act: {name} must have weight's dtype {weight.dtype}, got {vector.dtype}")
        if vector.device != input.device:
            raise ValueError(f"batch_norm_act: {name} must be on {input.device} like input, got {vector.device}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("batch_norm_act: running_mean and running_var must be given together, got only one of them")
    if residual is not None:
        if residual.shape != input.shape:
            shapes = f"{list(input.shape)}, got {list(residual.shape)}"
            raise ValueError(f"batch_norm_act: residual must have input's shape {shapes}")
        if residual.dtype != input.dtype:
            raise TypeError(f"batch_norm_act: residual must have input's dtype {input.dtype}, got {residual.dtype}")
        if residual.device != input.device:
            raise ValueError(f"batch_norm_act: residual must be on {input.device} like input, got {residual.device}")
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"batch_norm_act: momentum must be in [0, 1], got {momentum}")
    if not eps >= 0.0:
        raise ValueError(f"batch_norm_act: eps must not be negative, got {eps}")
    impl = _choose(impl, input)
    if impl == "reference":
        return batch_norm_act_reference(
            input, weight, bias, running_mean, running_var, residual, relu, training, momentum, eps, process_group
        )
    input = rows_of(input)
    if residual is not None:
        residual = rows_of(residual)
    if weight.dtype != torch.float32:
        weight, bias = weight.float(), bias.float()
    if not training:
        return _given(input, weight, bias, running_mean, running_var, residual, relu, eps, impl)
    count = None
    rows = input.numel() // max(input.shape[1], 1)
    if process_group is not None and dist.get_world_size(process_group) > 1:
        output, mean, var, count, _ = JoinedStatistics.apply(  # type: ignore[no-untyped-call]
            input, weight, bias, residual, relu, eps, impl, process_group
        )
    else:
        check_count(rows)
        if impl == "cpp":
            trained: Tensor = raw(PACKAGE, "bn_train", impl)(
                input, weight, bias, residual, running_mean, running_var, relu, eps, momentum
            )
            return trained
        output, mean, var = _batch(input, weight, bias, residual, relu, eps, impl)
    # Here and not in the autograd.Function: a traced program must see the mutation.
    if running_mean is not None:
        raw(PACKAGE, "bn_track_", impl)(running_mean, running_var, mean, var, count, rows, momentum)
    result: Tensor = output
    return result


def _choose(impl: str, input: Tensor) -> str:
    """The implementation for ``input``: the kernels need channels side by side."""
    chosen = choose("batch_norm_act", impl, input)
    if chosen == "reference" or input.dim() == 2 or input.stride(1) == 1:
        return chosen
    if input.is_contiguous(memory_format=torch.channels_last):  # one channel, or none, or nothing at all
        return chosen
    if impl == "auto":
        return "reference"
    raise ValueError(
        f"batch_norm_act: input must be channels-last for impl={impl!r}, got strides {list(input.stride())}; "
        f"use input.contiguous(memory_format=torch.channels_last) or impl='reference'"
    )


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _batch(
    input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool, eps: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and biased variance of the batch."""
    if _needs_gradient(input, weight, bias, residual):
        output, mean, var, _ = BatchStatistics.apply(  # type: ignore[no-untyped-call]
            input, weight, bias, residual, relu, eps, impl
        )
    else:
        output, mean, var, _ = raw(PACKAGE, "bn_act", impl)(input, weight, bias, residual, relu, eps, False)
    return output, mean, var


def _given(
    input: Tensor, weight: Tensor, bias: Tensor, mean: Tensor | None, var: Tensor | None, residual: Tensor | None,
    relu: bool, eps: float, impl: str,
) -> Tensor:  # fmt: skip
    """Output with the running statistics."""
    output: Tensor
    if _needs_gradient(input, weight, bias, residual):
        output, _ = GivenStatistics.apply(  # type: ignore[no-untyped-call]
            input, weight, bias, residual, mean, var, relu, eps, impl
        )
    else:
        output, _ = raw(PACKAGE, "bn_apply", impl)(input, mean, var, weight, bias, residual, relu, eps, False)
    return output
