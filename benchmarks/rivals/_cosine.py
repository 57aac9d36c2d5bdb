"""What every rival of ``cosine_cross_entropy`` does before its own work: normalise, and find each row's label."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrex_kernels._op import Call

from ._absent import Absent

OP = "cosine_cross_entropy"


def require_plain(call: Call, *known: str) -> None:
    """Raise :class:`Absent` where the call wants more than class ids, a constant temperature and ``known`` options."""
    values = {**call.options, **call.tensors}
    if values["target"].is_floating_point():
        raise Absent("takes class ids, not probabilities")
    if "temperature" in call.grads:
        raise Absent("has no gradient for the temperature")
    unset = {"class_weight": None, "ignore_index": -100, "label_smoothing": 0.0, "return_stats": False}
    for name, neutral in unset.items():
        if name not in known and values.get(name, neutral) != neutral:
            raise Absent(f"has no {name}")


def operands(
    input: Tensor, weight: Tensor, target: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised rows divided by the temperature, normalised weights, one label per row."""
    label = target if len(target) == len(input) else target.repeat(len(input) // len(target))
    return F.normalize(input, dim=1) / temperature, F.normalize(weight, dim=1), label


def normalised(fused: Callable[[Tensor, Tensor, Tensor, int, float, str], Any]) -> Callable[..., Any]:
    """``fused(rows, classes, label, ignore_index, label_smoothing, reduction)`` with the operator's own arguments."""

    def run(
        input: Tensor,
        weight: Tensor,
        target: Tensor,
        temperature: float | Tensor = 0.1,
        class_weight: None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        return_stats: bool = False,
    ) -> Any:
        return fused(*operands(input, weight, target, temperature), ignore_index, label_smoothing, reduction)

    return run


def reduce(losses: Tensor, label: Tensor, reduction: str, ignore_index: int) -> Tensor:
    """The reduction of one loss per row, as torch's."""
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / torch.count_nonzero(label != ignore_index)
