"""The loss of each row on the kernels: their statistics combined, and the gradient as coefficients for them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._once import once, refuse_tangents
from .._op import raw
from . import listed
from .reference import LINEAR

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PACKAGE = __name__.rpartition(".")[0]
# The backward gives first derivatives, and nothing gives forward-mode ones.
ONCE = (
    "contrastive_cross_entropy: the kernels have no {}; use impl='reference' to differentiate twice or in forward mode"
)


class Options(NamedTuple):
    """What is constant in a call; ``summed``: the log of the summed probability, not the mean of its logs."""

    impl: str
    private: int
    ignore_index: int
    temperature: float
    hardness: float
    detach_hardness: bool
    margin_kind: int
    margin: float
    summed: bool
    nearest: int
    learnt_keys: int
    compute: torch.dtype


def rows_loss(options: Options, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss float32 [N], positives [N], negatives [N], hit [N]) of ``input, keys, ids, key_ids, instance, key_instance,
    first, second, share`` (the last three: mixtures, or None)."""
    refuse_tangents(ONCE.format("forward-mode derivatives"), *tensors[:2])
    needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors[:2])
    differentiable: Any = _Contrastive.apply
    loss, stats, counts, *_ = differentiable(options, *_apart(tensors)) if needed else _forward(options, *tensors)
    return loss, counts[0], counts[1], stats[4] > stats[5]


def _apart(tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """The same tensors, none of them twice (a batch that is its own keys): torch.compile takes each argument of an
    autograd function for a tensor of its own."""
    found: list[Tensor | None] = []
    for tensor in tensors:
        again = tensor is not None and any(tensor is other for other in found)
        found.append(tensor.view_as(tensor) if tensor is not None and again else tensor)
    return found


def _forward(options: Options, *tensors: Any) -> tuple[Tensor, ...]:
    """(loss, stats [6, N], counts [2, N], coefficients [4, N], then what the listed keys and the mixtures leave for the
    backward, empty without them)."""
    input, keys, ids, key_ids, instance, key_instance, first, second, share = tensors
    pairing = (input, keys, ids, key_ids, instance, key_instance, options.private, options.ignore_index)
    cosine, index, synthetic, scale = (input.new_empty(0) for _ in range(4))
    if options.nearest:
        run = raw(PACKAGE, "nearest_keys", options.impl)
        cosine, index = run(*pairing, options.nearest, options.compute)
        stats, counts = listed.statistics(cosine, listed.positives(index, ids, key_ids), index >= 0, options)
    else:
        run = raw(PACKAGE, "contrastive_ce", options.impl)
        stats, counts = run(*pairing, *_shape(options), options.compute)
    if first is not None:
        with torch.autocast(input.device.type, enabled=False):
            synthetic, scale = listed.mixture_cosines(input, keys, first, second, share)
        present = listed.present(first, ids, options.ignore_index)
        stats, counts = listed.fold(stats, counts, synthetic, present, options)
    loss, coefficients = combine(stats, counts, options)
    return loss, stats, counts, coefficients, cosine, index, synthetic, scale


def _shape(options: Options) -> tuple[float, float, int, float]:
    return options.temperature, options.hardness, options.margin_kind, options.margin


def combine(stats: Tensor, counts: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """The rows' loss [N] and the coefficients [4, N] of its gradient, from their statistics."""
    lse_positive, sum_positive, lse_negative, lse_hard, _, _ = stats
    count_positive, count_negative = counts
    some, zero = count_positive > 0, torch.zeros_like(lse_positive)
    log_negative = lse_negative
    if options.hardness:
        log_negative = torch.where(
            count_negative > 0, count_negative.to(stats.dtype).log() + lse_negative - lse_hard, -torch.inf
        )
    # log(Neg / P): what log D is above lse_positive, and both shares of D, come from it without a cancellation.
    odds = torch.where(some, log_negative - lse_positive, 0.0)
    above, share_negative = F.softplus(odds, threshold=LINEAR), torch.sigmoid(odds)
    if options.summed:
        loss, of_positive, of_each = above, -share_negative, zero
    else:
        each = 1.0 / count_positive.clamp(min=1).to(stats.dtype)
        # Of a single positive both log-sum and mean are its logit: their difference would be a rounding.
        several = count_positive > 1
        loss = above + torch.where(several, lse_positive - sum_positive * each, 0.0)
        of_positive = torch.where(several, torch.sigmoid(-odds), -share_negative)
        of_each = torch.where(several, -each, 0.0)
    learnt = 0.0 if options.detach_hardness else options.hardness
    of_negative, of_hard = share_negative * (1.0 + learnt), share_negative * learnt if learnt else zero
    coefficients = torch.stack((of_positive, of_each, of_negative, of_hard))
    return torch.where(some, loss, 0.0), torch.where(some, coefficients, 0.0)


class _Contrastive(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(options: Options, *tensors: Any) -> tuple[Tensor, ...]:
        return _forward(options, *(None if t is None else t.detach() for t in tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options, *tensors = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 10
        loss = ctx.saved_tensors[9]
        saved = [None if t is None else t.detach() for t in ctx.saved_tensors]
        dx, dk = _backward(ctx.options, grad.detach(), saved, ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        if torch.is_grad_enabled():
            refusal = ONCE.format("second derivatives")
            dx, dk = (None if g is None else once(g, loss, refusal) for g in (dx, dk))
        return (None, dx, dk, *(None,) * 7)


def _backward(
    options: Options, grad: Tensor, saved: list[Any], input_grad: bool, keys_grad: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the queries and of the keys for the rows' upstream ``grad`` [N]."""
    input, keys, ids, key_ids, instance, key_instance, first, second, share = saved[:9]
    _, stats, _, coefficients, cosine, index, synthetic, scale = saved[9:]
    # A row that gives nothing gives nothing to an infinite upstream gradient either.
    coefficients = torch.where(coefficients == 0, 0.0, coefficients * grad)
    learnt = options.learnt_keys if keys_grad else 0
    dx: Tensor | None = None
    dk: Tensor | None = None
    extra: Tensor | None = None
    if options.nearest:
        if input_grad:
            positive = listed.positives(index, ids, key_ids)
            pull = listed.gradients(cosine, positive, index >= 0, stats, coefficients, options)
            extra = listed.weighted_keys(keys, index, pull, index >= 0)
        if keys_grad:
            dk = torch.zeros_like(keys)
    else:
        dx, dk = raw(PACKAGE, "contrastive_ce_backward", options.impl)(
            input, keys, ids, key_ids, instance, key_instance, options.private, options.ignore_index,
            *_shape(options), options.compute, stats, coefficients, input_grad, learnt,
        )  # fmt: skip
        # The bank behind the learnt keys is part of the same tensor, whose gradient has its shape.
        if not keys_grad:
            dk = None
        elif learnt < keys.shape[0]:
            dk = F.pad(dk, (0, 0, 0, keys.shape[0] - learnt))
    if first is not None and input_grad:
        present = listed.present(first, ids, options.ignore_index)
        pull = listed.gradients(synthetic, None, present, stats, coefficients, options) * scale
        # What the query adds to its own mixtures lies along the query: the norm takes it away again.
        weights, of_keys = torch.cat((pull * share, pull * (1.0 - share)), dim=1), present & (first >= 0)
        counted = torch.cat((of_keys, present), dim=1)
        mixed = listed.weighted_keys(keys, torch.cat((first, second), dim=1), weights, counted)
        extra = mixed if extra is None else extra + mixed
    if not input_grad:
        return None, dk
    if extra is not None:
        through = torch.where((ids == options.ignore_index)[:, None], 0.0, listed.through_norm(input, extra))
        dx = (through if dx is None else dx.to(through.dtype) + through).to(input.dtype)
    return dx, dk
