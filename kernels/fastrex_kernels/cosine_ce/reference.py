"""Definition of :func:`cosine_cross_entropy` in eager PyTorch; the logits are stored."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-12


def unit_rows(x: Tensor) -> Tensor:
    """Rows of ``x`` [R, D] divided by their l2 norm; a row whose norm is at most 1e-12 becomes 0 and gets no
    gradient."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    live = ~(norm <= EPS)  # so that a NaN stays one
    return torch.where(live, x / torch.where(live, norm, 1.0), 0.0)


def cosine_cross_entropy_reference(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float | Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, lse [N], rank [N])."""
    kind = torch.float64 if input.dtype == torch.float64 else torch.float32
    with torch.autocast(input.device.type, enabled=False):
        logits = unit_rows(input.to(kind)) @ unit_rows(weight.to(kind)).T / temperature
        factors = None if class_weight is None else class_weight.to(kind)
        rows, classes = logits.shape
        lse = torch.logsumexp(logits, dim=1)
        repeats = rows // target.shape[0] if target.shape[0] else 1
        if target.is_floating_point():
            share = target.to(kind).repeat(repeats, 1)
            loss = F.cross_entropy(logits, share, weight=factors, label_smoothing=label_smoothing, reduction="none")
            divisor = torch.full((), float(rows), device=loss.device, dtype=kind)
            kept, chosen = torch.ones(rows, dtype=torch.bool, device=loss.device), share.argmax(dim=1)
        else:
            label = target.repeat(repeats)
            kept = label != ignore_index
            valid = (label >= 0) & (label < classes)
            chosen = torch.where(valid, label, 0)
            loss = F.cross_entropy(logits, chosen, weight=factors, label_smoothing=label_smoothing, reduction="none")
            # Where, not a product: a bad label must give NaN and an ignored one exactly 0 with no gradient.
            loss = torch.where(kept, torch.where(valid, loss, torch.nan), 0.0)
            factor = torch.ones_like(loss) if factors is None else factors[chosen]
            divisor = torch.where(kept, factor, 0.0).sum()
        detached = logits.detach()
        rank = (detached > detached.gather(1, chosen[:, None])).sum(dim=1)
        rank = torch.where(kept, rank, -1)
        if reduction == "mean":
            loss = loss.sum() / divisor
        elif reduction == "sum":
            loss = loss.sum()
    return loss, lse.detach(), rank
