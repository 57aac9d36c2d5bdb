"""Definition of :func:`contrastive_cross_entropy` and :func:`nearest_keys` in eager PyTorch; the similarity matrix
[N, M] is stored, and every gradient is autograd's."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cosine_ce.reference import unit_rows

# Least sin(theta)^2 of ArcFace: its derivative divides by the sine, whose rounding takes over from here on.
LEAST_SINE_SQUARED = 1e-6
# From here on log(1 + e^x) is x, in float64 too.
LINEAR = 40.0
# The square root of the largest float32, less room for a sum.
LARGE = 1e16


def pairs(
    ids: Tensor,
    key_ids: Tensor,
    instance: Tensor | None,
    key_instance: Tensor | None,
    private: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Return (positive, negative), bool [N, M]; a pair that is neither is left out."""
    same = ids[:, None] == key_ids[None, :]
    counted = (ids[:, None] != ignore_index) & (key_ids[None, :] != ignore_index)
    if instance is not None and key_instance is not None:
        counted = counted & (instance[:, None] != key_instance[None, :])
    if private:
        counted = counted & (same | (torch.arange(key_ids.shape[0], device=ids.device) >= private)[None, :])
    return counted & same, counted & ~same


def unit_of(rows: Tensor, ids: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """Unit rows of [R, D] in ``dtype``; those with the id ``ignore_index`` are zero whatever they hold: nobody has
    filled the slot. Rows whose squares would overflow are scaled first."""
    rows = torch.where((ids == ignore_index)[:, None], 0.0, rows.to(dtype))
    largest = F.pad(rows.detach(), (0, 1)).abs().amax(dim=1, keepdim=True)
    return unit_rows(rows / torch.where(largest > LARGE, largest, 1.0))


def with_margin(cosine: Tensor, kind: int, margin: float) -> Tensor:
    """Cosine of a positive with its margin: 0 none, 1 CosFace (``c - m``), 2 ArcFace (``cos(theta + m)``, and
    ``c - m sin(m)`` where theta + m is beyond pi, which keeps it decreasing)."""
    if kind == 0:
        return cosine
    if kind == 1:
        return cosine - margin
    sine = (1.0 - cosine * cosine).clamp(min=LEAST_SINE_SQUARED).sqrt()
    turned = cosine * math.cos(margin) - sine * math.sin(margin)
    return torch.where(cosine < -math.cos(margin), cosine - margin * math.sin(margin), turned)


def masked_logsumexp(logits: Tensor, mask: Tensor) -> Tensor:
    """Log of the sum of exponentials over the entries of ``mask`` [N, M]; rows without any give 0 and no gradient."""
    some = mask.any(dim=1)
    inside = torch.where(mask, logits, -torch.inf)
    return torch.where(some, torch.logsumexp(torch.where(some[:, None], inside, 0.0), dim=1), 0.0)


def masked_max(values: Tensor, mask: Tensor) -> Tensor:
    """Largest entry of ``mask`` [N, M] in each row, -inf where there is none (M may be 0)."""
    inside = torch.where(mask, values, -torch.inf)
    return F.pad(inside, (0, 1), value=-torch.inf).amax(dim=1)


def nearest_keys_reference(cosine: Tensor, counted: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest entries of ``counted`` in each row of ``cosine`` [N, M], equal ones by their index: (cosine
    [N, k], index [N, k]), -inf and -1 where there are fewer."""
    inside = torch.where(counted, cosine, -torch.inf)
    value, index = (t[:, :k] for t in inside.sort(dim=1, descending=True, stable=True))
    return value, torch.where(counted.gather(1, index), index, -1)


def mixture_cosines_reference(query: Tensor, keys: Tensor, first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """Cosines [N, E] of unit queries [N, D] with their own mixtures of unit keys, which are constants."""
    with torch.no_grad():
        own = query[:, None, :].expand(-1, first.shape[1], -1)
        one = torch.where((first == -1)[..., None], own, keys[first.clamp(min=0)])
        mixed = share[..., None] * one + (1.0 - share[..., None]) * keys[second.clamp(min=0)]
        unit = unit_rows(mixed.flatten(0, 1)).view_as(mixed)
    return (query[:, None, :] * unit).sum(dim=2)


def contrastive_cross_entropy_reference(
    input: Tensor,
    keys: Tensor,
    ids: Tensor,
    key_ids: Tensor,
    instance: Tensor | None,
    key_instance: Tensor | None,
    mixtures: tuple[Tensor, Tensor, Tensor] | None,
    *,
    private: int,
    ignore_index: int,
    temperature: float,
    positives: str,
    hardness: float,
    detach_hardness: bool,
    margin_kind: int,
    margin: float,
    nearest: int,
    learnt_keys: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (loss [N], positives [N], negatives [N], hit [N]); ``ids`` and ``instance`` are [N]."""
    kind = torch.float64 if input.dtype == torch.float64 else torch.float32
    with torch.autocast(input.device.type, enabled=False):
        query = unit_of(input, ids, ignore_index, kind)
        parts = [keys[:learnt_keys], keys[learnt_keys:].detach()]
        unit_keys = unit_of(torch.cat(parts), key_ids, ignore_index, kind)
        cosine = query @ unit_keys.T
        positive, negative = pairs(ids, key_ids, instance, key_instance, private, ignore_index)
        if nearest:
            _, index = nearest_keys_reference(cosine.detach(), positive | negative, nearest)
            near = torch.zeros_like(positive).scatter(1, index.clamp(min=0), index >= 0)
            # Rows with fewer candidates name key 0 in the unused places, which may clear what another place has set.
            near[:, :1] = (index == 0).any(dim=1, keepdim=True)
            positive, negative = positive & near, negative & near
        own = with_margin(cosine, margin_kind, margin)
        if mixtures is not None:
            first, second, share = mixtures
            synthetic = mixture_cosines_reference(query, unit_keys.detach(), first, second, share)
            absent = torch.zeros_like(first, dtype=torch.bool)
            cosine = torch.cat((cosine, synthetic), dim=1)
            own = F.pad(own, (0, first.shape[1]))
            positive = torch.cat((positive, absent), dim=1)
            negative = torch.cat((negative, (first != -2) & (ids != ignore_index)[:, None]), dim=1)
        count_p, count_n = positive.sum(dim=1), negative.sum(dim=1)
        some_p, some_n = count_p > 0, count_n > 0
        own = own / temperature
        logits = cosine / temperature
        weighted = logits
        if hardness:
            # log beta: the weights of the negatives, which average to 1.
            log_weight = torch.log(count_n.clamp(min=1).to(kind))[:, None] + hardness * logits
            log_weight = log_weight - masked_logsumexp(hardness * logits, negative)[:, None]
            weighted = logits + (log_weight.detach() if detach_hardness else log_weight)
        lse_positive = masked_logsumexp(own, positive)
        log_negative = torch.where(some_n, masked_logsumexp(weighted, negative), -torch.inf)
        loss = F.softplus(log_negative - lse_positive, threshold=LINEAR)
        if positives == "mean":
            mean = torch.where(positive, own, 0.0).sum(dim=1) / count_p.clamp(min=1)
            # Of a single positive both are its logit: their difference would be a rounding, of either sign.
            loss = loss + torch.where(count_p > 1, lse_positive - mean, 0.0)
        detached = cosine.detach()
        hit = masked_max(detached, positive) > masked_max(detached, negative)
        return torch.where(some_p, loss, 0.0), count_p, count_n, hit
