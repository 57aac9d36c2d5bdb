"""Keys that are listed for each query: the nearest ones, and mixtures. Their logits [N, E] are stored, the keys
themselves [N, E, D] only in chunks."""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cosine_ce.reference import EPS
from .reference import LEAST_SINE_SQUARED, masked_max, with_margin

# Bytes of the mixtures that exist at once: what a CPU's cache holds, and what keeps a GPU busy.
CHUNK = {"cpu": 2 * 2**20, "cuda": 64 * 2**20}


class Shape(Protocol):
    """What of the loss's options the logits depend on."""

    @property
    def temperature(self) -> float: ...
    @property
    def hardness(self) -> float: ...
    @property
    def margin_kind(self) -> int: ...
    @property
    def margin(self) -> float: ...


def positives(index: Tensor, ids: Tensor, key_ids: Tensor) -> Tensor:
    """Which of the listed keys [N, k] have the query's id; -1 in ``index`` is no key."""
    return (key_ids[index.clamp(min=0)] == ids[:, None]) & (index >= 0)


def present(first: Tensor, ids: Tensor, ignore_index: int) -> Tensor:
    """Which mixtures [N, E] there are: an ignored query sees none."""
    return (first != -2) & (ids != ignore_index)[:, None]


def statistics(cosine: Tensor, positive: Tensor, counted: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """(stats [6, N], counts [2, N]) as the raw operator gives them, of listed keys [N, k]."""
    negative = counted & ~positive
    safe = torch.where(counted, cosine, 0.0)
    own, logits = with_margin(safe, shape.margin_kind, shape.margin) / shape.temperature, safe / shape.temperature
    stats = torch.stack(
        (
            _lse(own, positive),
            torch.where(positive, own, 0.0).sum(dim=1),
            _lse((1.0 + shape.hardness) * logits, negative),
            _lse(shape.hardness * logits, negative if shape.hardness else torch.zeros_like(negative)),
            masked_max(logits, positive),
            masked_max(logits, negative),
        )
    )
    return stats, torch.stack((positive.sum(dim=1), negative.sum(dim=1)))


def fold(stats: Tensor, counts: Tensor, cosine: Tensor, counted: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Add listed negatives [N, E] to the rows' statistics."""
    logits = torch.where(counted, cosine, 0.0) / shape.temperature
    lse_negative = torch.logaddexp(stats[2], _lse((1.0 + shape.hardness) * logits, counted))
    lse_hard = torch.logaddexp(stats[3], _lse(shape.hardness * logits, counted)) if shape.hardness else stats[3]
    best = torch.maximum(stats[5], masked_max(logits, counted))
    folded = torch.stack((stats[0], stats[1], lse_negative, lse_hard, stats[4], best))
    return folded, torch.stack((counts[0], counts[1] + counted.sum(dim=1)))


def gradients(
    cosine: Tensor, positive: Tensor | None, counted: Tensor, stats: Tensor, coefficients: Tensor, shape: Shape
) -> Tensor:
    """The loss's gradient with respect to listed cosines [N, E]; without ``positive`` all are negatives."""
    cosine = torch.where(counted, cosine, 0.0)
    logits = cosine / shape.temperature
    of_positive, of_each, of_negative, of_hard = coefficients[:, :, None]
    # A row without negatives has -inf here, and no listed one to be weighed.
    lse = stats.nan_to_num(neginf=0.0, nan=torch.nan)[:, :, None]
    pull = of_negative * torch.exp((1.0 + shape.hardness) * logits - lse[2])
    if shape.hardness:
        pull = pull - of_hard * torch.exp(shape.hardness * logits - lse[3])
    if positive is not None:
        own = with_margin(cosine, shape.margin_kind, shape.margin) / shape.temperature
        push = (of_positive * torch.exp(own - lse[0]) + of_each) * _slope(cosine, shape)
        pull = torch.where(positive, push, pull)
    return torch.where(counted, pull, 0.0) / shape.temperature


def _slope(cosine: Tensor, shape: Shape) -> Tensor:
    """Derivative of :func:`with_margin`."""
    if shape.margin_kind != 2:
        return torch.ones_like(cosine)
    left = 1.0 - cosine * cosine
    sine = left.clamp(min=LEAST_SINE_SQUARED).sqrt()
    turned = math.cos(shape.margin) + torch.where(
        left > LEAST_SINE_SQUARED, math.sin(shape.margin) * cosine / sine, 0.0
    )
    return torch.where(cosine < -math.cos(shape.margin), 1.0, turned)


def mixture_cosines(input: Tensor, keys: Tensor, first: Tensor, second: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """(cosine, scale), float32 [N, E] each: cosines of the queries with their mixtures, and one over the norm of
    ``share u + (1 - share) v`` (0 where it vanishes), in chunks of rows."""
    query, table, scale_of = _unit(input), keys.float().contiguous(), _inverse_norm(keys)
    rows, entries = first.shape
    step = max(1, CHUNK.get(input.device.type, CHUNK["cuda"]) // max(1, 4 * entries * keys.shape[1]))
    # Where the query is mixed in, the key in its place weighs nothing; the other one does, should it be a NaN.
    pair = torch.stack((torch.where(first < 0, second, first), second), dim=2)
    weights = torch.stack((torch.where(first < 0, 0.0, share), 1.0 - share), dim=2) * scale_of[pair]
    of_query = torch.where(first == -1, share, 0.0)[..., None]
    cosines, scales = [], []
    for start in range(0, max(1, rows), step):
        part = slice(start, start + step)
        q = query[part]
        mixed = F.embedding_bag(
            pair[part].flatten(0, 1), table, per_sample_weights=weights[part].flatten(0, 1), mode="sum"
        ).view(-1, entries, q.shape[1])
        mixed = torch.addcmul(mixed, of_query[part], q[:, None, :])
        norm = torch.linalg.vector_norm(mixed, dim=2)
        scale = torch.where(norm <= EPS, 0.0, 1.0 / norm)
        cosines.append((mixed @ q[:, :, None]).squeeze(2) * scale)
        scales.append(scale)
    return torch.cat(cosines), torch.cat(scales)


def weighted_keys(keys: Tensor, index: Tensor, weights: Tensor, counted: Tensor) -> Tensor:
    """Sum of ``weights`` [N, E] times the unit keys of ``index`` [N, E] where ``counted``, float32 [N, D]. The keys are
    scaled through their weights, so that float32 keys are not copied."""
    scale = _inverse_norm(keys)
    # 0 times a NaN is one: what is not counted reads a key without any. Where all have one, so has what is counted.
    index = torch.where(counted, index, scale.isfinite().to(torch.uint8).argmax())
    weights = torch.where(counted, weights.float() * scale[index], 0.0)
    total = F.embedding_bag(index, keys.float().contiguous(), per_sample_weights=weights, mode="sum")
    return torch.where(counted.any(dim=1, keepdim=True), total, 0.0)


def through_norm(input: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of ``input`` [N, D] in float32 from that of its unit rows."""
    unit = _unit(input)
    return (gradient - (gradient * unit).sum(dim=1, keepdim=True) * unit) * _inverse_norm(input)[:, None]


def _unit(rows: Tensor) -> Tensor:
    return rows.float() * _inverse_norm(rows)[:, None]


def _inverse_norm(rows: Tensor) -> Tensor:
    """One over the l2 norm of each row, float32, 0 where that is at most 1e-12. Large rows are scaled first, as their
    squares may overflow. Infinite elements give a NaN, which their quotient by the norm is."""
    if rows.shape[1] == 0:
        return rows.new_zeros(rows.shape[0], dtype=torch.float32)
    size, found = max(1, CHUNK.get(rows.device.type, CHUNK["cuda"]) // (4 * rows.shape[1])), []
    for part in torch.split(rows.float(), size):
        largest = part.abs().amax(dim=1).clamp(min=1.0)
        norm = torch.linalg.vector_norm(part / largest[:, None], dim=1)
        found.append(torch.where(norm <= EPS, 0.0, 1.0 / norm / largest))
    return torch.cat(found)


def _lse(logits: Tensor, mask: Tensor) -> Tensor:
    return torch.logsumexp(torch.where(mask, logits, -torch.inf), dim=1)
