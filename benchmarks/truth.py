"""What a call ought to give: the operator's definition in float64."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastrex_kernels._op import Call, Op

from . import measure
from .rivals import _cosine

# Logits beyond this are not stored in float64: the definition would need ten times as much.
STORED_BYTES = 2**30
BLOCK = 2**15
# The contrastive loss: its definition stores about so many matrices of all pairs; rows of a block without them.
CONTRASTIVE, MATRICES, ROWS = "contrastive_cross_entropy", 8, 256


def truth(op: Op, call: Call, gradients: bool) -> dict[str, Tensor]:
    """Outputs and gradients by name, as :func:`measure.outcome` names them."""
    wanted = measure.exact(call)
    if op.name == _cosine.OP and len(call.tensors["input"]) * len(call.tensors["weight"]) * 8 > STORED_BYTES:
        _cosine.require_plain(call)
        return measure.outcome(by_classes, wanted, gradients=gradients)
    if op.name == CONTRASTIVE and _pairs(call) * 8 * MATRICES > STORED_BYTES:
        return measure.outcome(lambda **words: by_rows(op, **words), wanted, gradients=gradients)
    return measure.outcome(lambda **words: op.function(**words, impl="reference"), wanted, gradients=gradients)


def _pairs(call: Call) -> int:
    return len(call.tensors["input"]) * len(call.tensors["keys"])


def by_rows(op: Op, **words: Any) -> Tensor:
    """The mean contrastive loss of rows that have an id each, over blocks of them, seen again in the backward."""
    rows = {name: words.pop(name) for name in ("input", "ids", "instance") if name in words}
    if any(len(value) != len(rows["input"]) for value in rows.values()):
        raise ValueError(f"{op.name}: ids must be one per row in the truth by blocks, got fewer")
    if bool((rows["ids"] == words.get("ignore_index", -100)).any()) or words.get("reduction", "mean") != "mean":
        raise ValueError(
            f"{op.name}: the truth by blocks is a mean over all rows, got ignored ones or another reduction"
        )
    mixtures = words.pop("mixtures", None)
    count = len(rows["input"])

    def block(start: int, rows: dict[str, Tensor], keys: Tensor) -> Tensor:
        part = {name: value[start : start + ROWS] for name, value in rows.items()}
        mixed = mixtures and type(mixtures)(*(t[start : start + ROWS] for t in mixtures))
        more = {**words, "keys": keys, "mixtures": mixed, "reduction": "sum"}
        loss: Tensor = op.function(**part, **more, impl="reference")
        return loss

    keys = words.pop("keys")
    parts = [checkpoint(block, start, rows, keys, use_reentrant=False) for start in range(0, count, ROWS)]
    return torch.stack(parts).sum() / count


def by_classes(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    **unused: Any,
) -> Tensor:
    """The cosine cross-entropy of class ids over blocks of classes, each seen twice and none kept."""
    label = target if len(target) == len(input) else target.repeat(len(input) // len(target))
    losses: Tensor = _ByClasses.apply(input, weight, label, float(temperature))  # type: ignore[no-untyped-call]
    return _cosine.reduce(losses, label, reduction, -100)


class _ByClasses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, label: Tensor, temperature: float) -> Tensor:
        rows = F.normalize(input, dim=1) / temperature
        parts = [torch.logsumexp(rows @ F.normalize(block, dim=1).T, dim=1) for block in torch.split(weight, BLOCK)]
        lse = torch.logsumexp(torch.stack(parts), dim=0)
        ctx.save_for_backward(input, weight, label, lse)
        ctx.temperature = temperature
        return lse - (rows * F.normalize(weight[label], dim=1)).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, label, lse = ctx.saved_tensors
        d_input = torch.zeros_like(input)
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, len(weight), BLOCK):
            with torch.enable_grad():
                x, w = (t.detach().requires_grad_() for t in (input, weight[start : start + BLOCK]))
                logits = F.normalize(x, dim=1) @ F.normalize(w, dim=1).T / ctx.temperature
            share = torch.exp(logits.detach() - lse[:, None])
            mine = ((label >= start) & (label < start + len(w))).nonzero()[:, 0]
            share[mine, label[mine] - start] -= 1
            dx, dw = torch.autograd.grad(logits, [x, w], share * upstream[:, None])
            d_input += dx
            if d_weight is not None:
                d_weight[start : start + BLOCK] = dw
        return d_input, d_weight, None, None
