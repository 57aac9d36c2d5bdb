"""The raw operators of ``batch_norm_act``, and their gradients.

Raw operators take rows of channels: [N, C] contiguous or [N, C, H, W] channels-last, statistics in fp64. ``mask`` holds
a bit per element in memory order, whether the ReLU let it through; it is empty where the backward recomputes that from
``input`` (no residual) and where nothing is to be known. ``batch``: the statistics are those of ``input`` itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._op import define, raw

PACKAGE = __package__ or ""


def rows_of(tensor: Tensor) -> Tensor:
    """``tensor`` with its channels side by side in memory."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor.contiguous()


def check_count(count: float) -> None:
    if count < 2:
        raise ValueError(
            f"batch_norm_act: input must hold at least 2 values per channel (over all ranks) in training, "
            f"got {count:.0f}; use a larger batch or training=False"
        )


def _statistic(input: Tensor, *sizes: int) -> Tensor:
    return input.new_empty(sizes, dtype=torch.float64)


def _mask(input: Tensor, residual: Tensor | None, relu: bool, save_mask: bool) -> Tensor:
    size = (input.numel() + 7) // 8 if save_mask and relu and residual is not None else 0
    return input.new_empty((size,), dtype=torch.uint8)


def _fake_act(
    input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool, eps: float, save_mask: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, var = _statistic(input, input.shape[1]), _statistic(input, input.shape[1])
    return torch.empty_like(input), mean, var, _mask(input, residual, relu, save_mask)


def _fake_apply(
    input: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool,
    eps: float, save_mask: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(input), _mask(input, residual, relu, save_mask)


def _gradient(input: Tensor, wanted: bool) -> Tensor:
    return torch.empty_like(input) if wanted else input.new_empty((0,))


def _fake_backward(
    grad: Tensor, input: Tensor, mask: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, relu: bool,
    eps: float, batch: bool, want_input: bool, want_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dresidual = _gradient(input, want_input), _gradient(input, want_residual and relu)
    return dx, torch.empty_like(weight), torch.empty_like(weight), dresidual


def _fake_backward_sums(
    grad: Tensor, input: Tensor, mask: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, relu: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _statistic(input, 2, input.shape[1]), torch.empty_like(weight), torch.empty_like(weight)


def _fake_backward_apply(
    grad: Tensor, input: Tensor, mask: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, sums: Tensor,
    count: Tensor, relu: bool, eps: float, want_residual: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(input), _gradient(input, want_residual and relu)


def _fake_join(slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    channels = (slots.shape[1] - 1) // 2
    return slots.new_empty((channels,)), slots.new_empty((channels,)), slots.new_empty(())


define(
    PACKAGE,
    "bn_act(Tensor input, Tensor weight, Tensor bias, Tensor? residual, bool relu, float eps, bool save_mask) "
    "-> (Tensor output, Tensor mean, Tensor var, Tensor mask)",
    _fake_act,
)
define(
    PACKAGE,
    "bn_apply(Tensor input, Tensor mean, Tensor var, Tensor weight, Tensor bias, Tensor? residual, bool relu, "
    "float eps, bool save_mask) -> (Tensor output, Tensor mask)",
    _fake_apply,
)
define(
    PACKAGE,
    "bn_backward(Tensor grad, Tensor input, Tensor mask, Tensor mean, Tensor var, Tensor weight, Tensor bias, "
    "bool relu, float eps, bool batch, bool want_input, bool want_residual) "
    "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)",
    _fake_backward,
)
# Over a group: a rank's (count, mean, centred second moment) as [1 + 2C], and the joined batch of a [ranks, 1 + 2C].
define(PACKAGE, "bn_stats(Tensor input) -> Tensor", lambda input: _statistic(input, 1 + 2 * input.shape[1]))
define(PACKAGE, "bn_join(Tensor slots) -> (Tensor mean, Tensor var, Tensor count)", _fake_join)
# The sums over rows of g and of g * (x - mean) as [2, C], and what gradients of weight and bias follow from them.
define(
    PACKAGE,
    "bn_backward_sums(Tensor grad, Tensor input, Tensor mask, Tensor mean, Tensor var, Tensor weight, Tensor bias, "
    "bool relu, float eps) -> (Tensor sums, Tensor grad_weight, Tensor grad_bias)",
    _fake_backward_sums,
)
define(
    PACKAGE,
    "bn_backward_apply(Tensor grad, Tensor input, Tensor mask, Tensor mean, Tensor var, Tensor weight, Tensor bias, "
    "Tensor sums, Tensor count, bool relu, float eps, bool want_residual) "
    "-> (Tensor grad_input, Tensor grad_residual)",
    _fake_backward_apply,
)
# The batch has `count` rows, or `rows` where that is None.
define(
    PACKAGE,
    "bn_track_(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, Tensor? count, int rows, "
    "float momentum) -> ()",
    lambda *_: None,
)
# Training in one process with its gradients, made of the others in csrc/batch_norm_autograd.cpp.
define(
    PACKAGE,
    "bn_train(Tensor input, Tensor weight, Tensor bias, Tensor? residual, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, bool relu, float eps, float momentum) -> Tensor",
    lambda input, *_: torch.empty_like(input),
    triton=False,
)


def _split(grad: Tensor, dresidual: Tensor | None, ctx: Any) -> Tensor | None:
    """The gradient of the residual: without a ReLU it is the output's."""
    if not ctx.needs_input_grad[3]:
        return None
    return dresidual if ctx.relu else grad


class BatchStatistics(torch.autograd.Function):
    """Normalise with the batch's statistics; also returns mean, biased variance (fp64) and mask."""

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool, eps: float, impl: str
    ) -> Any:
        return raw(PACKAGE, "bn_act", impl)(input, weight, bias, residual, relu, eps, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, weight, bias, _, ctx.relu, ctx.eps, ctx.impl = inputs
        _, mean, var, mask = output
        ctx.save_for_backward(input, mask, mean, var, weight, bias)
        ctx.mark_non_differentiable(mean, var, mask)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        grad = rows_of(grad)
        want_input, want_residual = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        dx, dweight, dbias, dresidual = raw(PACKAGE, "bn_backward", ctx.impl)(
            grad, *ctx.saved_tensors, ctx.relu, ctx.eps, True, want_input, want_residual
        )
        return dx if want_input else None, dweight, dbias, _split(grad, dresidual, ctx), None, None, None


class GivenStatistics(torch.autograd.Function):
    """Normalise with statistics that do not depend on the batch; also returns the mask."""

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, mean: Tensor, var: Tensor, relu: bool,
        eps: float, impl: str,
    ) -> Any:  # fmt: skip
        return raw(PACKAGE, "bn_apply", impl)(input, mean, var, weight, bias, residual, relu, eps, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, weight, bias, _, mean, var, ctx.relu, ctx.eps, ctx.impl = inputs
        _, mask = output
        ctx.save_for_backward(input, mask, mean, var, weight, bias)
        ctx.mark_non_differentiable(mask)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 9
        grad = rows_of(grad)
        want_input, want_residual = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        dx, dweight, dbias, dresidual = raw(PACKAGE, "bn_backward", ctx.impl)(
            grad, *ctx.saved_tensors, ctx.relu, ctx.eps, False, want_input, want_residual
        )
        rest = (None,) * 5
        return dx if want_input else None, dweight, dbias, _split(grad, dresidual, ctx), *rest


class JoinedStatistics(torch.autograd.Function):
    """Normalise with the statistics of the ranks' joined batch; also returns mean, biased variance, count and mask.

    The ranks' numbers travel as one fp64 vector with a slot per rank, as in ``reference.py``: the all-reduce adds only
    zeros to each of them, and all ranks get the same bits.
    """

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool, eps: float, impl: str,
        group: Any,
    ) -> Any:  # fmt: skip
        channels = input.shape[1]
        rows = input.numel() // max(channels, 1)
        slots = input.new_zeros((dist.get_world_size(group), 1 + 2 * channels), dtype=torch.float64)
        if rows:
            slots[dist.get_rank(group)] = raw(PACKAGE, "bn_stats", impl)(input)
        dist.all_reduce(slots, group=group)
        mean, var, count = raw(PACKAGE, "bn_join", impl)(slots)
        # Only a rank with fewer than two rows can be part of a batch with fewer than two: no other has to read it.
        if rows < 2:
            check_count(count.item())
        output, mask = raw(PACKAGE, "bn_apply", impl)(input, mean, var, weight, bias, residual, relu, eps, True)
        return output, mean, var, count, mask

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, weight, bias, _, ctx.relu, ctx.eps, ctx.impl, ctx.group = inputs
        _, mean, var, count, mask = output
        ctx.save_for_backward(input, mask, mean, var, weight, bias, count)
        ctx.mark_non_differentiable(mean, var, count, mask)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        *saved, count = ctx.saved_tensors
        # The other ranks wait for this one's sums, also where nothing depends on its output.
        grad = torch.zeros_like(saved[0]) if grad is None else rows_of(grad)
        options = (ctx.relu, ctx.eps)
        sums, dweight, dbias = raw(PACKAGE, "bn_backward_sums", ctx.impl)(grad, *saved, *options)
        dx = dresidual = None
        if ctx.needs_input_grad[0]:
            dist.all_reduce(sums, group=ctx.group)
            dx, dresidual = raw(PACKAGE, "bn_backward_apply", ctx.impl)(
                grad, *saved, sums, count, *options, ctx.needs_input_grad[3]
            )
        return dx, dweight, dbias, _split(grad, dresidual, ctx), None, None, None, None
