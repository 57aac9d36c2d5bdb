"""Cosine cross-entropy: the softmax loss over normalised logits of t-ReX (Sariyildiz et al., ICLR 2023, Eq. 1 and
2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._op import resolve
from .reference import cosine_cross_entropy_reference

IMPLEMENTATIONS = {"reference": cosine_cross_entropy_reference}
REDUCTIONS = ("none", "mean", "sum")


class Stats(NamedTuple):
    """What the loss knows of each row: ``lse`` [N] float32, log of the sum of exponentials; ``rank`` [N] int64, the
    number of classes with a larger logit than the target's (0 = top-1 hit, -1 = ignored row)."""

    lse: Tensor
    rank: Tensor


def cosine_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    return_stats: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Stats]:
    """Cross-entropy of cosine logits, ``F.cross_entropy(normalize(input) @ normalize(weight).T / temperature,
    target)``.

    Args:
        input: features [N, D], any floating dtype; rows are crop-major when the target is shared.
        weight: class weights or prototypes [C, D]. With ``requires_grad=False`` no gradient is computed for them.
        target: class ids int64 [N], or [B] with N a multiple of B (row n uses ``target[n % B]``), or probabilities
            [N, C] or [B, C].
        temperature: float or 0-d tensor above 0, which may require a gradient.
        class_weight: per-class factor [C]; the mean divides by the sum of the targets' factors, as PyTorch does.
        ignore_index: rows with this id have loss 0, no gradient and rank -1.
        label_smoothing: share of the target spread over all classes, in [0, 1].
        reduction: "none", "mean" (NaN when every row is ignored) or "sum".
        return_stats: also return :class:`Stats`.
        impl: "auto", "reference", "cpp" or "triton"; asked for by name it runs or raises.

    Returns:
        The loss in float32 (float64 for float64 inputs), or ``(loss, Stats)``.

    A row or class whose l2 norm is at most 1e-12 has logit 0 and gradient 0 (an empty class of Online Class Means).
    A class id out of range raises on a CPU; on a GPU it makes that row's loss NaN, without a device assert or a sync.

    Raises:
        ValueError, TypeError: naming the argument and the fact.
    """
    run = resolve("cosine_cross_entropy", impl, IMPLEMENTATIONS)
    _check(input, weight, target, temperature, class_weight, ignore_index, label_smoothing, reduction)
    loss, lse, rank = run(input, weight, target, temperature, class_weight, ignore_index, label_smoothing, reduction)
    return (loss, Stats(lse, rank)) if return_stats else loss


def _check(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float | Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> None:
    name = "cosine_cross_entropy"
    for word, tensor in (("input", input), ("weight", weight)):
        if tensor.ndim != 2:
            raise ValueError(f"{name}: {word} must have 2 dimensions, got shape {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: {word} must be floating point, got {tensor.dtype}")
    if weight.shape[0] < 1 or weight.shape[1] != input.shape[1]:
        raise ValueError(f"{name}: weight must be [C >= 1, {input.shape[1]}], got {tuple(weight.shape)}")
    for word, tensor in (("weight", weight), ("target", target)):
        if tensor.device != input.device:
            raise ValueError(f"{name}: {word} must be on {input.device} like input, got {tensor.device}")
    classes = weight.shape[0]
    if target.is_floating_point():
        if target.ndim != 2 or target.shape[1] != classes:
            raise ValueError(f"{name}: target probabilities must be [N or B, {classes}], got {tuple(target.shape)}")
    elif target.dtype != torch.int64:
        raise TypeError(f"{name}: target must be int64 class ids or floating point probabilities, got {target.dtype}")
    elif target.ndim != 1:
        raise ValueError(f"{name}: target ids must have 1 dimension, got shape {tuple(target.shape)}")
    rows, given = input.shape[0], target.shape[0]
    if given != rows and (given == 0 or rows % given):
        raise ValueError(f"{name}: target must have {rows} rows or a divisor of that, got {given}")
    if class_weight is not None and class_weight.shape != (classes,):
        raise ValueError(f"{name}: class_weight must be [{classes}], got {tuple(class_weight.shape)}")
    if isinstance(temperature, Tensor):
        if temperature.ndim:
            raise ValueError(
                f"{name}: temperature must be a float or a 0-d tensor, got shape {tuple(temperature.shape)}"
            )
    elif not temperature > 0:
        raise ValueError(f"{name}: temperature must be above 0, got {temperature}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing must be in [0, 1], got {label_smoothing}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if target.device.type == "cpu" and not target.is_floating_point() and target.numel():
        bad = target[((target < 0) | (target >= classes)) & (target != ignore_index)]
        if bad.numel():
            raise ValueError(f"{name}: target must be in [0, {classes}) or {ignore_index}, got {int(bad[0])}")
