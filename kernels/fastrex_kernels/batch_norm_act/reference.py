"""``batch_norm_act`` in eager PyTorch: the definition, and what trains where no kernel exists.

Over a group, the ranks' (count, mean, centred second moment) travel as one fp64 vector with a slot per rank, so the
all-reduce adds only zeros to each number: all ranks get the same bits, and the combination (Chan, Golub and LeVeque
1979) subtracts no large numbers of nearly equal size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def batch_norm_act_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    training: bool,
    momentum: float,
    eps: float,
    process_group: Any,
) -> Tensor:
    """Compute ``batch_norm_act``; arguments as checked by the public function of that name."""
    if training and process_group is not None and dist.get_world_size(process_group) > 1:
        output: Tensor
        output, mean, var, count = _joined(input, weight, bias, eps, process_group)
        if running_mean is not None and running_var is not None:
            running_mean.mul_(1.0 - momentum).add_(mean, alpha=momentum)
            running_var.mul_(1.0 - momentum).add_(var * (count / (count - 1.0)), alpha=momentum)
    else:
        if training:
            _check_count(input.numel() // max(input.shape[1], 1))
        output = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    # In place on a fresh tensor: batch normalisation keeps its input for the backward, not its output.
    if residual is not None:
        output = output.add_(residual)
    if relu:
        output = output.relu_()
    return output


def _joined(*args: Any) -> Any:
    return _JoinedBatchNorm.apply(*args)  # type: ignore[no-untyped-call]


def _check_count(count: float) -> None:
    if count < 2:
        raise ValueError(
            f"batch_norm_act: input must hold at least 2 values per channel (over all ranks) in training, "
            f"got {count:.0f}; use a larger batch or training=False"
        )


def _columns(vector: Tensor, like: Tensor) -> Tensor:
    """A [C] vector that broadcasts over [N, C] or [N, C, H, W]."""
    return vector if like.dim() == 2 else vector[:, None, None]


class _JoinedBatchNorm(torch.autograd.Function):
    """Normalise with the statistics of the ranks' joined batch; also returns mean, biased variance and count (fp64)."""

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor, bias: Tensor, eps: float, group: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        channels = input.shape[1]
        rows = input.numel() // max(channels, 1)
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        slots = torch.zeros(dist.get_world_size(group), 1 + 2 * channels, dtype=torch.float64, device=input.device)
        if rows:
            dims = (0, 2, 3) if input.dim() == 4 else (0,)
            var, mean = torch.var_mean(wide, dims, correction=0)
            own = slots[dist.get_rank(group)]
            own[:1].fill_(rows)
            own[1 : 1 + channels] = mean
            own[1 + channels :] = var.double() * rows
        dist.all_reduce(slots, group=group)
        counts, means, moments = slots[:, :1], slots[:, 1 : 1 + channels], slots[:, 1 + channels :]
        count = counts.sum()
        # Only a rank with fewer than two rows can be part of a batch with fewer than two: no other has to read it.
        if rows < 2:
            _check_count(count.item())
        joined_mean = (means * counts).sum(0) / count
        joined_var = (moments + counts * (means - joined_mean).square()).sum(0) / count
        mean, var = joined_mean.to(wide.dtype), joined_var.to(wide.dtype)
        output = torch.empty_like(input)
        if rows:  # torch's own kernels die on an empty batch
            output = F.batch_norm(input, mean, var, weight.to(wide.dtype), bias.to(wide.dtype), False, 0.0, eps)
        return output, joined_mean, joined_var, count

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, weight, _, ctx.eps, ctx.group = inputs
        _, mean, var, count = output
        ctx.save_for_backward(input, weight, mean, var, count)
        ctx.mark_non_differentiable(mean, var, count)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        input, weight, mean, var, count = ctx.saved_tensors
        if grad is None:
            grad = torch.zeros_like(input)
        dtype = torch.promote_types(input.dtype, torch.float32)
        mean, var, scale = mean.to(dtype), var.to(dtype), weight.to(dtype)
        inverse = torch.rsqrt(var + ctx.eps)
        # The two sums of the rank's own rows: of g * (x - mean) / std and of g.
        grad_weight, grad_bias = torch.zeros_like(scale), torch.zeros_like(scale)
        if input.numel():
            _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
                grad, input, scale, mean, var, mean, inverse, False, ctx.eps, [False, True, True]
            )
        grad_input = None
        if ctx.needs_input_grad[0]:
            sums = torch.stack((grad_bias, grad_weight)).double()
            dist.all_reduce(sums, group=ctx.group)
            mean_grad, mean_grad_normed = (sums / count).to(dtype)
            # In steps on one buffer: dx = scale / std * (g - mean(g) - normed * mean(g * normed)).
            work = (input - _columns(mean, input)).mul_(_columns(inverse * mean_grad_normed, input))
            work = work.add_(_columns(mean_grad, input)).neg_().add_(grad).mul_(_columns(scale * inverse, input))
            grad_input = work.to(input.dtype)
        return grad_input, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None, None
