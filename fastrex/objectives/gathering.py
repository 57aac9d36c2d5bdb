"""Rows of all ranks as the keys of a contrastive loss, with the gradient that belongs to the rank that made them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..distributed import gather_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def all_rows(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Rows of all ranks [R * n, ...] in the order of the ranks; ``x`` itself where there is one rank only.

    The gradient of a row is the sum over the ranks of what their losses make of it, at the rank that brought the row.
    The loop averages the gradients of the parameters over the ranks: together that is the gradient of the mean of the
    ranks' losses, as in one process.

    Args:
        x: [n, ...], equally many rows on every rank. Called by all ranks together, as is its backward.
    """
    if group is None or dist.get_world_size(group) == 1:
        return x
    rows: Tensor = _AllRows.apply(x, group) if x.requires_grad else gather_group(x, group)  # type: ignore[no-untyped-call]
    return rows


class Crops(NamedTuple):
    """All crops of a batch as queries and keys.

    Attributes:
        keys: [M, D], of all ranks. ids, key_ids: class ids int64 [N] and [M]. instance, key_instance: which row of the
            global batch each is, int64 [N] and [M]: a query leaves itself out.
    """

    keys: Tensor
    ids: Tensor
    key_ids: Tensor
    instance: Tensor
    key_instance: Tensor


def all_crops(features: Tensor, target: Tensor, group: ProcessGroup | None) -> Crops:
    """The crops of all images of all ranks as keys of this rank's crops.

    Args:
        features: this rank's rows [N, D], crop-major. target: class ids int64 [B] of its images.
    """
    ids = target.repeat(len(features) // len(target))
    rows = torch.arange(len(features), device=features.device)
    keys, key_ids = all_rows(features, group), all_rows(ids, group)
    first = 0 if group is None else dist.get_rank(group) * len(features)
    return Crops(keys, ids, key_ids, rows + first, torch.arange(len(keys), device=features.device))


class _AllRows(torch.autograd.Function):
    """:func:`all_rows` over several ranks: gather forwards; backwards every rank sends each other one its part of the
    gradient, and they are added in the order of the ranks, so that the bits do not depend on how a backend reduces."""

    @staticmethod
    def forward(x: Tensor, group: ProcessGroup) -> Tensor:
        return gather_group(x, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.group = inputs
        ctx.dtype = x.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ranks = dist.get_world_size(ctx.group)
        # Wide: a sum of parts in 16 bits would be less exact than one process.
        parts = grad.to(torch.promote_types(grad.dtype, torch.float32)).contiguous()
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=ctx.group)
        return received.reshape(ranks, -1, *grad.shape[1:]).sum(0).to(ctx.dtype), None
