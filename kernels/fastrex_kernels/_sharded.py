"""Cosine cross-entropy whose classes are split over the ranks of a process group: exact, nothing is sampled.

Rank r holds the rows ``first <= c < first + count`` of the class weights. All ranks' features and targets are gathered,
every rank computes the logits z of all rows against its own block, and the blocks' log-sums are merged::

    lse_n  = logsumexp_r(lse_nr)          loss_n = lse_n - sum_r t_nr
    t_nr   = sum_{c in block r} a_nc z_nc          a_nc = (1 - eps) [c = y_n] + eps / C

The backward goes the same way with dL/dloss_n of all rows: a block's part of dx is summed over the blocks, dW belongs
to the block. Collectives: two gathers of rows, one gather of three numbers per row (one more sum of one number per row
for the ranks); backward one gather of a number per row and one exchange of dx. They are gathers and exchanges followed
by a sum in the order of the ranks, so that the bits do not depend on how a backend orders a reduction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._op import CHECK, choose, compute_dtype, raw, readable
from .cosine_ce.reference import unit_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_PACKAGE = f"{__package__}.cosine_ce"
_PIECE = 65536  # rows that are normalised at a time
# torch 2.13 renamed this collective; 2.11 and 2.12 know the old name only.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Block(NamedTuple):
    """The classes of one rank.

    Attributes:
        group: the ranks that share the classes. first: id of the block's first class. classes: C, of all blocks.
    """

    group: ProcessGroup
    first: int
    classes: int


class Handle:
    """Holds a process group in a module: a copy of the module keeps the group, which cannot be copied itself."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        return self


def split(num_classes: int, rank: int, ranks: int) -> tuple[int, int]:
    """(first class, number of classes) of a rank: contiguous blocks whose sizes differ by one at most."""
    size, rest = divmod(num_classes, ranks)
    return rank * size + min(rank, rest), size + (rank < rest)


def gather_rows(x: Tensor, group: ProcessGroup) -> Tensor:
    """Rows of all ranks [R * n, ...] in the order of the ranks; no gradient."""
    out = x.new_empty((dist.get_world_size(group) * x.shape[0], *x.shape[1:]))
    _all_gather(out, x.detach().contiguous(), group=group)
    return out


def check_equal_rows(name: str, x: Tensor, group: ProcessGroup) -> None:
    """Raise on every rank if the ranks bring different numbers of rows, where that costs no sync or is asked for."""
    if x.device.type != "cpu" and not CHECK:
        return
    counts = gather_rows(torch.tensor([x.shape[0]], device=x.device), group).tolist()
    if len(set(counts)) > 1:
        raise ValueError(f"{name}: input must have equally many rows on every rank of process_group, got {counts}")


def exchange(x: Tensor, group: ProcessGroup) -> Tensor:
    """[R, n, ...] whose part r goes to rank r -> [R, n, ...] whose part r came from rank r."""
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out


def join_blocks(rows: Tensor, block: Block, device: torch.device | str | None = None) -> Tensor:
    """The rows of all ranks' blocks [C, ...], on every rank; sent block by block, because their sizes differ."""
    ranks, me = dist.get_world_size(block.group), dist.get_rank(block.group)
    full = rows.new_empty(block.classes, *rows.shape[1:], device=device or rows.device)
    for rank in range(ranks):
        first, count = split(block.classes, rank, ranks)
        part = rows.contiguous() if rank == me else rows.new_empty(count, *rows.shape[1:])
        dist.broadcast(part, src=dist.get_global_rank(block.group, rank), group=block.group)
        full[first : first + count] = part
    return full


def cosine_logits(input: Tensor, weight: Tensor, temperature: float | Tensor) -> Tensor:
    """``normalize(input) @ normalize(weight).T / temperature`` in float32, or float64 for float64 features."""
    return unit_logits(input, unit_rows(weight.to(_wide(input.dtype))), temperature)


def unit_logits(input: Tensor, weight: Tensor, temperature: float | Tensor) -> Tensor:
    """The same against rows that are normalised already."""
    kind = _wide(input.dtype)
    with torch.autocast(input.device.type, enabled=False):
        return (unit_rows(input.to(kind)) @ weight.to(kind).T / temperature).to(kind)


def unit_weight(weight: Tensor) -> Tensor:
    """Class weights [C, D] normalised, in place where their dtype is one that losses are computed in."""
    weight = weight.to(_wide(weight.dtype))
    # In pieces: no second [C, D] even for a moment.
    for piece in torch.split(weight, _PIECE):
        piece.copy_(unit_rows(piece))
    return weight


@torch.no_grad()
def sharded_logits(input: Tensor, weight: Tensor, block: Block, temperature: float | Tensor) -> Tensor:
    """This rank's rows [n, D] against the classes of all ranks -> [n, C]."""
    check_equal_rows("CosineHead.logits", input, block.group)
    ranks = dist.get_world_size(block.group)
    counts = [split(block.classes, rank, ranks)[1] for rank in range(ranks)]
    part = cosine_logits(gather_rows(input, block.group), weight, temperature)
    # To the width of the first block, which is the widest: the exchange takes equal parts.
    padded = torch.nn.functional.pad(part, (0, counts[0] - part.shape[1])).reshape(ranks, input.shape[0], counts[0])
    parts = exchange(padded, block.group)
    return torch.cat([parts[rank, :, :count] for rank, count in enumerate(counts)], dim=1)


def sharded_cosine_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    block: Block,
    *,
    temperature: float | Tensor,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    return_stats: bool,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss of this rank's own rows, their lse [n] and, for ``return_stats``, the rank [n] of their targets.

    Args:
        input: this rank's features [n, D]; every rank of the group calls with equally many rows.
        weight: this rank's classes [count, D].
        target: int64 [n], or [B] shared by the crops; ids of all C classes.
        temperature: a float or a 0-d tensor, equal on all ranks.

    Gradients are those of the mean over the ranks of what each rank makes of its own losses: ``weight`` and
    ``temperature`` (the latter equal on all ranks) get 1/R of the sum over all rows, ``input`` its own loss's gradient.

    Raises:
        ValueError, TypeError: naming the argument and the fact.
    """
    _check(input, weight, target, block)
    wide = torch.float64 in (input.dtype, weight.dtype)
    impl = choose("CosineHead", impl, input.new_empty(0, dtype=torch.float64) if wide else input)
    # Before the gathering, which would set the crops of all ranks side by side.
    target = target.repeat(input.shape[0] // target.shape[0]) if target.shape[0] else target
    learnt = temperature if isinstance(temperature, Tensor) else None
    fixed = 1.0 if isinstance(temperature, Tensor) else temperature
    plan = _Plan(block, fixed, ignore_index, label_smoothing, impl, compute_dtype(input, weight))
    rows, labels = gather_rows(input, block.group), gather_rows(target, block.group)
    _check_ids(labels, block, ignore_index)
    threshold = _threshold(rows, weight, labels, learnt, plan) if return_stats else None
    loss, lse, rank, _ = _ShardedLoss.apply(input, weight, learnt, rows, labels, threshold, plan)  # type: ignore[no-untyped-call]
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / (target != ignore_index).sum()
    return loss, lse, rank if return_stats else None


def _check(input: Tensor, weight: Tensor, target: Tensor, block: Block) -> None:
    name = "CosineHead"
    if not input.is_floating_point():
        raise TypeError(f"{name}: input must be floating point, got {input.dtype}")
    if target.dtype != torch.int64 or target.ndim != 1:
        fact = f"{target.dtype} {list(target.shape)}"
        raise TypeError(f"{name}: target must be int64 class ids [N] with a process_group, got {fact}")
    for word, tensor in (("target", target), ("weight", weight)):
        if tensor.device != input.device:
            raise ValueError(f"{name}: {word} must be on {input.device} like input, got {tensor.device}")
    rows, given = input.shape[0], target.shape[0]
    if given != rows and (given == 0 or rows % given):
        raise ValueError(f"{name}: target must have {rows} rows or a divisor of that, got {given}")
    check_equal_rows(name, input, block.group)


def _check_ids(labels: Tensor, block: Block, ignore_index: int) -> None:
    """Of all ranks' rows, so that every rank raises and none is left waiting."""
    if readable(labels):
        bad = labels[((labels < 0) | (labels >= block.classes)) & (labels != ignore_index)]
        if bad.numel():
            raise ValueError(f"CosineHead: target must be in [0, {block.classes}) or {ignore_index}, got {int(bad[0])}")


class _Plan(NamedTuple):
    """What the passes over a block need beside tensors; ``temperature`` counts where no tensor of it is given."""

    block: Block
    temperature: float
    ignore_index: int
    label_smoothing: float
    impl: str
    compute: torch.dtype


class _ShardedLoss(torch.autograd.Function):
    """(loss [n], lse [n], rank [n]) of the own rows and the lse [N] of all; ``rows`` and ``labels`` are gathered."""

    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor,
        temperature: Tensor | None,
        rows: Tensor,
        labels: Tensor,
        threshold: Tensor | None,
        plan: _Plan,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        block, count, me = plan.block, input.shape[0], dist.get_rank(plan.block.group)
        if plan.impl == "reference":
            parts = _block_forward(rows, weight, labels, temperature, threshold, plan)
        else:
            _, _, lse, rank, logit, *_ = raw(_PACKAGE, "cosine_ce", plan.impl)(
                rows, weight, labels, temperature, plan.temperature, None, threshold, block.first, block.classes,
                plan.ignore_index, plan.label_smoothing, 0, plan.compute, False, False,
            )  # fmt: skip
            parts = lse, logit, rank
        # In double precision, in which a rank is exact too: three numbers per row travel in one message.
        every = gather_rows(torch.stack([part.double() for part in parts])[None], block.group)
        kept, valid = labels != plan.ignore_index, (labels >= 0) & (labels < block.classes)
        lse = torch.logsumexp(every[:, 0], 0)
        # Where, not a product: a bad label must give NaN and an ignored one exactly 0.
        loss = torch.where(kept, torch.where(valid, lse - every[:, 1].sum(0), torch.nan), 0.0)
        rank = torch.where(kept, every[:, 2].sum(0).long(), -1)
        kind = _wide(input.dtype)
        mine = slice(me * count, (me + 1) * count)
        lse = lse.to(kind)
        return loss[mine].to(kind), lse[mine].clone(), rank[mine], lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, weight, temperature, rows, labels, _, ctx.plan = inputs
        ctx.count, ctx.kind = input.shape[0], input.dtype
        ctx.save_for_backward(rows, weight, temperature, labels, output[3])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        block, ranks = plan.block, dist.get_world_size(plan.block.group)
        rows, weight, temperature, labels, lse = ctx.saved_tensors
        wants_input, wants_weight, wants_temperature = ctx.needs_input_grad[:3]
        grad = lse.new_zeros(ctx.count) if grad is None else grad.to(lse.dtype)
        # What belongs to the mean of the ranks' losses is divided here, [N] numbers, and not in [count, D] of dW.
        grads = gather_rows(grad / ranks, block.group)
        grad_input: Tensor | None
        if plan.impl == "reference":
            grad_input, grad_weight, radial = _block_backward(
                rows, weight, labels, temperature, lse, grads, wants_input, wants_weight, plan
            )
        else:
            # Wide rows, whose gradient is wide: a part rounded to 16 bits before the sum over the blocks would be less
            # exact than one process, and could overflow where the sum does not.
            grad_input, grad_weight, radial = raw(_PACKAGE, "cosine_ce_backward", plan.impl)(
                rows.to(lse.dtype), weight, labels, temperature, plan.temperature, None, block.first, block.classes,
                plan.ignore_index, plan.label_smoothing, plan.compute, lse, grads, None,
                wants_input or wants_temperature, wants_weight,  # ``radial`` comes with the gradient of the rows
            )  # fmt: skip
        grad_temperature = None
        if wants_temperature:
            part = -(grads * radial).sum() / temperature
            grad_temperature = gather_rows(part.reshape(1).double(), block.group).sum().to(temperature.dtype)
        if wants_input and grad_input is not None:
            parts = exchange(grad_input.to(lse.dtype).reshape(ranks, ctx.count, rows.shape[1]), block.group)
            grad_input = (parts.sum(0) * ranks).to(ctx.kind)
        gradients = (grad_input if wants_input else None, grad_weight if wants_weight else None, grad_temperature)
        return (*gradients, None, None, None, None)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What losses and sums are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _locate(labels: Tensor, count: int, plan: _Plan) -> tuple[Tensor, Tensor]:
    """Whether each target is in this block [N], and its row there (0 where it is not)."""
    local = labels - plan.block.first
    inside = (local >= 0) & (local < count) & (labels != plan.ignore_index)
    return inside, torch.where(inside, local, 0)


@torch.no_grad()
def _threshold(rows: Tensor, weight: Tensor, labels: Tensor, temperature: Tensor | None, plan: _Plan) -> Tensor:
    """The targets' logits [N], each from the rank that holds the class, rounded as the kernel's products are."""
    kind = _wide(rows.dtype)
    inside, local = _locate(labels, weight.shape[0], plan)
    compute = kind if plan.impl == "reference" else plan.compute
    with torch.autocast(rows.device.type, enabled=False):
        x, w = (unit_rows(t.to(kind)).to(compute).to(kind) for t in (rows, weight[local]))
        logit = torch.linalg.vecdot(x, w) / (plan.temperature if temperature is None else temperature)
    logit = torch.where(inside, logit, 0.0).to(kind)
    # All ranks but one add zero: exact in any order.
    dist.all_reduce(logit, group=plan.block.group)
    return logit


def _block_forward(
    rows: Tensor, weight: Tensor, labels: Tensor, temperature: Tensor | None, threshold: Tensor | None, plan: _Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``cosine_ce`` gives for a block, by definition: (lse, sum of a_c z_c, number of classes above the
    threshold), each [N]."""
    logits = cosine_logits(rows, weight, plan.temperature if temperature is None else temperature)
    inside, local = _locate(labels, weight.shape[0], plan)
    own = torch.where(inside, logits.gather(1, local[:, None])[:, 0], 0.0)
    smoothing = plan.label_smoothing
    logit = (1 - smoothing) * own + smoothing / plan.block.classes * logits.sum(1)
    rank = torch.zeros_like(labels)
    if threshold is not None:
        # The target itself is never above itself, however the two products round.
        rank = (logits > threshold[:, None]).sum(1) - (inside & (own > threshold)).long()
    return torch.logsumexp(logits, 1), logit, rank


def _block_backward(
    rows: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: Tensor | None,
    lse: Tensor,
    grads: Tensor,
    wants_input: bool,
    wants_weight: bool,
    plan: _Plan,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """What ``cosine_ce_backward`` gives for a block, by definition: (its part of dx [N, D], dW, and sum over the block
    of (p - a) z [N])."""
    kind = lse.dtype
    tau = plan.temperature if temperature is None else temperature
    with torch.autocast(rows.device.type, enabled=False):
        x, w = rows.to(kind), weight.to(kind)
        x_unit, w_unit = unit_rows(x), unit_rows(w)
        logits = (x_unit @ w_unit.T / tau).to(kind)
        inside, local = _locate(labels, weight.shape[0], plan)
        slope = (logits - lse[:, None]).exp() - plan.label_smoothing / plan.block.classes
        slope.scatter_add_(1, local[:, None], inside[:, None].to(kind) * (plan.label_smoothing - 1.0))
        live = (labels != plan.ignore_index) & (labels >= 0) & (labels < plan.block.classes)
        slope = torch.where(live[:, None], slope, 0.0)
        radial = (slope * logits).sum(1)
        slope = slope * (grads[:, None] / tau).to(kind)
        grad_input = _through_norm(slope @ w_unit, x, x_unit) if wants_input else None
        grad_weight = _through_norm(slope.T @ x_unit, w, w_unit).to(weight.dtype) if wants_weight else None
    return grad_input, grad_weight, radial


def _through_norm(grad: Tensor, x: Tensor, unit: Tensor) -> Tensor:
    """Gradient of ``x`` from that of its unit rows; a row too short to be normalised, whose unit row is 0, gets
    none."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    live = (unit != 0).any(1, keepdim=True)
    tangent = grad - unit * torch.linalg.vecdot(grad, unit)[:, None]
    return torch.where(live, tangent / torch.where(live, norm, 1.0), 0.0)
