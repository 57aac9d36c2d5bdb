"""Contrastive cross-entropy: each query's logits against keys that are other views, a memory bank or both, with any
number of positives per query (SupCon, SCHaNe, LOOK, MoCo and MoCHi are its options)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._op import choose, compute_dtype, define, in_cpp, raw
from .arguments import MARGINS, ContrastiveStats, Mixtures, check, check_nearest, expand, readable_mixtures
from .function import DTYPES, Options, rows_loss
from .reference import contrastive_cross_entropy_reference, nearest_keys_reference, pairs, unit_of

__all__ = ["ContrastiveStats", "Mixtures", "contrastive_cross_entropy", "nearest_keys"]

# Rows of a block of the reduced loss: one thread adds them up.
BLOCK = 4096
# Ids are one per row and key. ``stats`` are, per row: log of the sum of exponentials of the positives (with their
# margin), sum of their logits, the same log of the negatives at (1 + hardness) and at hardness times their logits, and
# the largest logit of either kind; ``counts`` how many there are of either.
FORWARD = (
    "contrastive_ce(Tensor input, Tensor keys, Tensor ids, Tensor key_ids, Tensor? instance, Tensor? key_instance, "
    "int private, int ignore_index, float temperature, float hardness, int margin_kind, float margin, "
    "ScalarType compute) -> (Tensor stats, Tensor counts)"
)
# ``coefficients`` [4, N] = A, B, C, H: the gradient of a positive's logit is A e^(s - lse_positive) + B, that of a
# negative's C e^((1 + hardness) s - lse_negative) - H e^(hardness s - lse_hard).
BACKWARD = (
    "contrastive_ce_backward(Tensor input, Tensor keys, Tensor ids, Tensor key_ids, Tensor? instance, "
    "Tensor? key_instance, int private, int ignore_index, float temperature, float hardness, int margin_kind, "
    "float margin, ScalarType compute, Tensor stats, Tensor coefficients, bool input_grad, int learnt_keys) -> "
    "(Tensor grad_input, Tensor grad_keys)"
)
NEAREST = (
    "nearest_keys(Tensor input, Tensor keys, Tensor ids, Tensor key_ids, Tensor? instance, Tensor? key_instance, "
    "int private, int ignore_index, int k, ScalarType compute) -> (Tensor cosine, Tensor index)"
)


def contrastive_cross_entropy(
    input: Tensor,
    keys: Tensor,
    ids: Tensor,
    key_ids: Tensor,
    *,
    instance: Tensor | None = None,
    key_instance: Tensor | None = None,
    private: int = 0,
    temperature: float = 0.1,
    positives: str = "mean",
    hardness: float = 0.0,
    detach_hardness: bool = False,
    margin: float = 0.0,
    margin_kind: str = "cosface",
    nearest: int = 0,
    mixtures: Mixtures | None = None,
    learnt_keys: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    return_stats: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    """Cross-entropy of each query against keys, where the keys with the query's id are positives and the others
    negatives.

    With s = cos(query, key) / temperature, P the positives and N the negatives of a query, its loss is
    ``log D - mean over P of s`` ("mean": SupCon, Khosla et al. 2020, L_out) or ``log D - log(sum over P of e^s)``
    ("sum": the log of the summed probability, LOOK's), where D = sum over P of e^s + sum over N of beta e^s.

    Args:
        input: queries [N, D], any floating dtype; normalised here. Rows are crop-major when ids are shared.
        keys: [M, D], normalised here; they get a gradient if they require one, [M, D] in full: zeros for those that
            do not learn.
        ids: int64 [N], or [B] with N a multiple of B (row n uses ``ids[n % B]``): classes, or images for MoCo.
        key_ids: int64 [M]; ``ignore_index`` is a slot that holds nothing.
        instance, key_instance: int64 [N] or [B], and [M]: a pair of equal instances is left out (the query itself).
        private: the first so many keys exist only for the queries with their id (MoCo's k+ beside the queue).
        temperature: at least 1e-6.
        positives: "mean" or "sum".
        hardness: a >= 0: beta is proportional to e^(a s) and averages to 1 over a query's negatives (SCHaNe; HCL with
            tau_plus 0). 0: beta is 1. At most 1000.
        detach_hardness: beta is a constant of the gradient.
        margin: of the positives' logits, 0 for none.
        margin_kind: "cosface" (cos - margin, margin in [0, 2)) or "arcface" (cos(theta + margin), margin in [0, pi)).
        nearest: only the so many nearest keys of a query count, whatever their id (LOOK); 0: all. The keys get no
            gradient then.
        mixtures: more negatives per query, each the normalised mix of two keys or of a key and the query; constants.
            A key's number that is none raises on a CPU; on a GPU it makes the query's loss NaN, without a device
            assert (``FASTREX_CHECK=1`` checks there too, at the cost of a sync).
        learnt_keys: only the first so many keys get a gradient, the others are a bank; None: all of them. The bank's
            part of the gradient is zeros of its full size: a tensor of its own, without a gradient, costs none.
        ignore_index: queries with this id have loss 0 and no gradient. What they and the unfilled slots hold is not
            looked at: it may be NaN.
        reduction: "none", "mean" over the queries that are not ignored (0 if there is none), or "sum".
        return_stats: also return :class:`ContrastiveStats`.
        impl: "auto", "reference", "cpp" or "triton"; asked for by name it runs or raises.

    Returns:
        The loss in float32 (float64 for float64 queries), or ``(loss, ContrastiveStats)``.

    A query without a positive has loss 0 and no gradient, and counts in the mean, as in SupCon's own code. A query or
    key whose l2 norm is at most 1e-12 has cosine 0 and gradient 0. The kernels never hold an [N, M] matrix and are
    differentiable once, backwards; the reference also twice, and in forward mode. Under ``torch.func.vmap`` the kernels
    run one sample after the other.

    Raises:
        ValueError, TypeError: naming the argument and the fact.
    """
    name = "contrastive_cross_entropy"
    check(
        name, input, keys, ids, key_ids, instance, key_instance, private, temperature, positives, hardness, margin,
        margin_kind, nearest, mixtures, learnt_keys, ignore_index, reduction,
    )  # fmt: skip
    chosen = _choose(name, impl, input, keys, ("contrastive_ce", "contrastive_ce_backward"))
    if nearest and chosen != "reference":
        chosen = _choose(name, impl, input, keys, ("nearest_keys",))
    rows, kind = input.shape[0], MARGINS.index(margin_kind) + 1 if margin else 0
    ids = expand(ids, rows)
    instance = None if instance is None else expand(instance, rows)
    learnt = keys.shape[0] if learnt_keys is None else learnt_keys
    if mixtures is not None:
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        mixtures = readable_mixtures(mixtures, keys.shape[0], dtype) if mixtures.first.shape[1] else None
    if chosen == "reference":
        loss, count_p, count_n, hit = contrastive_cross_entropy_reference(
            input, keys, ids, key_ids, instance, key_instance, mixtures, private=private, ignore_index=ignore_index,
            temperature=temperature, positives=positives, hardness=hardness, detach_hardness=detach_hardness,
            margin_kind=kind, margin=margin, nearest=nearest, learnt_keys=learnt,
        )  # fmt: skip
    else:
        options = Options(
            chosen, private, ignore_index, float(temperature), float(hardness), detach_hardness, kind, float(margin),
            positives == "sum", nearest, learnt, compute_dtype(input, keys),
        )  # fmt: skip
        loss, count_p, count_n, hit = rows_loss(
            options, input, keys, ids, key_ids, instance, key_instance, *(mixtures or (None, None, None))
        )
    if reduction == "sum":
        loss = _total(loss)
    elif reduction == "mean":
        loss = _total(loss) / (ids != ignore_index).sum().clamp(min=1)
    return (loss, ContrastiveStats(count_p, count_n, hit)) if return_stats else loss


@torch.no_grad()
def nearest_keys(
    input: Tensor,
    keys: Tensor,
    k: int,
    ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    *,
    instance: Tensor | None = None,
    key_instance: Tensor | None = None,
    private: int = 0,
    ignore_index: int = -100,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The ``k`` keys of largest cosine for each query, without an [N, M] matrix; there is no gradient.

    Args:
        input: queries [N, D], any floating dtype; normalised here.
        keys: [M, D]; normalised here.
        k: at most M.
        ids, key_ids, instance, key_instance, private, ignore_index: which pairs are left out, as
            :func:`contrastive_cross_entropy` has it. ``key_ids`` alone leaves out the unfilled slots.
        impl: "auto", "reference", "cpp" or "triton"; asked for by name it runs or raises.

    Returns:
        ``(cosine, index)``: float32 (float64 for float64 queries) and int64, both [N, k], the nearest first, equal
        ones by their index (on a GPU in torch.topk's order); -inf and -1 where a query has fewer keys.

    Raises:
        ValueError, TypeError: naming the argument and the fact.
    """
    name = "nearest_keys"
    check_nearest(name, input, keys, k, ids, key_ids, instance, key_instance, private, ignore_index)
    chosen = _choose(name, impl, input, keys, ("nearest_keys",))
    rows = input.shape[0]
    known = ignore_index + 1
    ids = torch.full((rows,), known, device=input.device) if ids is None else expand(ids, rows)
    key_ids = torch.full((keys.shape[0],), known, device=input.device) if key_ids is None else key_ids
    instance = None if instance is None else expand(instance, rows)
    if chosen != "reference":
        found: tuple[Tensor, Tensor] = raw(__name__, "nearest_keys", chosen)(
            input, keys, ids, key_ids, instance, key_instance, private, ignore_index, k, compute_dtype(input, keys)
        )
        return found
    kind = torch.float64 if input.dtype == torch.float64 else torch.float32
    with torch.autocast(input.device.type, enabled=False):
        cosine = unit_of(input, ids, ignore_index, kind) @ unit_of(keys, key_ids, ignore_index, kind).T
    positive, negative = pairs(ids, key_ids, instance, key_instance, private, ignore_index)
    return nearest_keys_reference(cosine, positive | negative, k)


def _total(loss: Tensor) -> Tensor:
    """Sum of the rows' losses in an order that their number fixes: ``sum`` splits a long row among a CPU's threads."""
    if loss.shape[0] <= BLOCK:
        return loss.sum()
    return F.pad(loss, (0, -loss.shape[0] % BLOCK)).view(-1, BLOCK).sum(dim=1).sum()


def _choose(name: str, impl: str, input: Tensor, keys: Tensor, operators: tuple[str, ...]) -> str:
    """The implementation; a C++ library of another version may lack the raw operators."""
    like = keys if input.dtype in DTYPES else input
    chosen = choose(name, impl, like, dtypes=DTYPES)
    if chosen != "cpp" or all(in_cpp(operator) for operator in operators):
        return chosen
    if impl == "auto":
        return "reference"
    raise RuntimeError(f"{name}: impl='cpp' needs {', '.join(operators)} in the C++ library, got one without")


def _fake_forward(
    input: Tensor,
    keys: Tensor,
    ids: Tensor,
    key_ids: Tensor,
    instance: Tensor | None,
    key_instance: Tensor | None,
    private: int,
    ignore_index: int,
    temperature: float,
    hardness: float,
    margin_kind: int,
    margin: float,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor]:
    rows = input.shape[0]
    return input.new_empty((6, rows), dtype=torch.float32), input.new_empty((2, rows), dtype=torch.int64)


def _fake_backward(
    input: Tensor,
    keys: Tensor,
    ids: Tensor,
    key_ids: Tensor,
    instance: Tensor | None,
    key_instance: Tensor | None,
    private: int,
    ignore_index: int,
    temperature: float,
    hardness: float,
    margin_kind: int,
    margin: float,
    compute: torch.dtype,
    stats: Tensor,
    coefficients: Tensor,
    input_grad: bool,
    learnt_keys: int,
) -> tuple[Tensor, Tensor]:
    return (
        input.new_empty(input.shape if input_grad else (0,)),
        keys.new_empty((learnt_keys, keys.shape[1])),
    )


def _fake_nearest(
    input: Tensor,
    keys: Tensor,
    ids: Tensor,
    key_ids: Tensor,
    instance: Tensor | None,
    key_instance: Tensor | None,
    private: int,
    ignore_index: int,
    k: int,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor]:
    shape = (input.shape[0], k)
    return input.new_empty(shape, dtype=torch.float32), input.new_empty(shape, dtype=torch.int64)


define(__name__, FORWARD, _fake_forward)
define(__name__, BACKWARD, _fake_backward)
define(__name__, NEAREST, _fake_nearest)
