"""The contrastive loss and the search as their users write them, in the tensors' own dtypes: rivals and yardsticks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import ContrastiveStats, Mixtures


def eager(
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
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    """The matrix of logits less its rows' maximum, matrices of masks, the masked mean of the log-probabilities."""
    if learnt_keys is not None:
        keys = torch.cat((keys[:learnt_keys], keys[learnt_keys:].detach()))
    ids = ids.repeat(len(input) // len(ids)) if len(ids) != len(input) else ids
    # 0 times what a slot holds that nobody has filled may be a NaN.
    input, keys = (t.masked_fill((i == ignore_index)[:, None], 0.0) for t, i in ((input, ids), (keys, key_ids)))
    query, unit = F.normalize(input, dim=1), F.normalize(keys.to(input.dtype), dim=1)
    cosine = query @ unit.T
    positive, counted = _masks(ids, key_ids, instance, key_instance, private, ignore_index)
    if nearest:
        chosen = cosine.detach().masked_fill(~counted, -torch.inf).topk(nearest, dim=1).indices
        counted = counted & torch.zeros_like(counted).scatter_(1, chosen, True)
    positive = positive & counted
    negative = counted & ~positive
    own = cosine
    if margin and margin_kind == "cosface":
        own = torch.where(positive, cosine - margin, cosine)
    elif margin:
        sine = (1 - cosine.square()).clamp(min=1e-6).sqrt()
        turned = cosine * math.cos(margin) - sine * math.sin(margin)
        turned = torch.where(cosine > -math.cos(margin), turned, cosine - margin * math.sin(margin))
        own = torch.where(positive, turned, cosine)
    if mixtures is not None:
        first, second, share = mixtures
        u = torch.where((first == -1)[..., None], query.detach()[:, None], unit.detach()[first.clamp(min=0)])
        mix = share[..., None].to(u.dtype) * u + (1 - share[..., None].to(u.dtype)) * unit.detach()[second]
        extra = torch.einsum("nd,ned->ne", query, F.normalize(mix, dim=2))
        there = (first != -2) & (ids != ignore_index)[:, None]
        own, cosine = torch.cat((own, extra), dim=1), torch.cat((cosine, extra), dim=1)
        positive, negative = F.pad(positive, (0, extra.shape[1])), torch.cat((negative, there), dim=1)
    logits = (own / temperature).masked_fill(~(positive | negative), -torch.inf)
    if logits.shape[1]:
        # Of a row that nothing is left of, any number will do.
        logits = logits - logits.detach().amax(dim=1, keepdim=True).clamp(min=-1e4)
    exp = logits.exp()
    total = exp.sum(dim=1)
    if hardness:
        negatives = torch.where(negative, exp, 0.0)
        weight = torch.where(negative, (hardness * logits.masked_fill(~negative, 0.0)).exp(), 0.0)
        weight = weight.detach() if detach_hardness else weight
        mean = weight.sum(dim=1) / negative.sum(dim=1).clamp(min=1)
        reweighted = (weight * negatives).sum(dim=1) / mean.clamp(min=torch.finfo(mean.dtype).tiny)
        total = torch.where(positive, exp, 0.0).sum(dim=1) + reweighted
    total = total.clamp(min=torch.finfo(total.dtype).tiny)
    number = positive.sum(dim=1)
    if positives == "sum":
        share_positive = torch.where(positive, exp, 0.0).sum(dim=1) / total
        loss = -torch.where(number > 0, share_positive, 1.0).log()
    else:
        log_prob = torch.where(positive, logits, 0.0) - positive * total.log()[:, None]
        loss = -log_prob.sum(dim=1) / number.clamp(min=1)
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / (ids != ignore_index).sum().clamp(min=1)
    if not return_stats:
        return loss
    best = (F.pad(cosine.detach().masked_fill(~m, -torch.inf), (0, 1), value=-torch.inf) for m in (positive, negative))
    near, far = (b.amax(dim=1) for b in best)
    return loss, ContrastiveStats(number, negative.sum(dim=1), near > far)


def eager_nearest(
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
) -> tuple[Tensor, Tensor]:
    """All cosines, then ``topk``."""
    cosine = F.normalize(input, dim=1) @ F.normalize(keys.to(input.dtype), dim=1).T
    if key_ids is not None:
        ids = key_ids.new_full((len(input),), ignore_index + 1) if ids is None else ids
        cosine = cosine.masked_fill(~_masks(ids, key_ids, instance, key_instance, private, ignore_index)[1], -torch.inf)
    value, index = cosine.topk(k, dim=1)
    return value, torch.where(value == -torch.inf, -1, index)


def _masks(
    ids: Tensor,
    key_ids: Tensor,
    instance: Tensor | None,
    key_instance: Tensor | None,
    private: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """(equal ids, not left out), bool [N, M]."""
    same = ids[:, None] == key_ids
    counted = (ids != ignore_index)[:, None] & (key_ids != ignore_index)
    if instance is not None and key_instance is not None:
        instance = instance.repeat(len(ids) // len(instance)) if len(instance) != len(ids) else instance
        counted = counted & (instance[:, None] != key_instance)
    if private:
        own = same | (torch.arange(len(key_ids), device=ids.device) >= private)
        counted = counted & own
    return same, counted
