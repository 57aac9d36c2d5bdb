"""How diverse the filters of an encoder's convolutions are.

Nayman et al., "Diverse ImageNet models transfer better" (WACV 2024), relate transfer to the diversity of filters. Their
measure could not be read when this was written: the two below are this project's reading of the word, not theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FastrexError
from .measures import effective_rank

SAME_FROM = 0.5  # cosine from which two filters count as one; a default of this project


def clusterability(filters: Tensor, same_from: float = SAME_FROM) -> float:
    """Clusters per filter of filters [O, K], in (0, 1]: 1 where no two of them point the same way.

    Greedy, hence the same for the same order: a filter whose cosine to the first filter of a cluster is at least
    ``same_from`` belongs to it, else it begins one of its own. Signs count: a ReLU lets w and -w see different things.
    """
    unit = torch.nn.functional.normalize(filters.double().flatten(1), dim=1).cpu()
    near = unit @ unit.T >= same_from
    # A zero filter is like no filter, but like itself.
    near.fill_diagonal_(True)
    covered, clusters = torch.zeros(len(unit), dtype=torch.bool), 0
    for row in range(len(unit)):
        if not covered[row]:
            clusters += 1
            covered |= near[row]
    return clusters / len(unit)


def rank_share(filters: Tensor) -> float:
    """Effective rank of filters [O, K] divided by their norms, as a share of min(O, K), the largest it can be."""
    flat = filters.flatten(1)
    return effective_rank(flat) / min(flat.shape)


def diversity(encoder: nn.Module, same_from: float = SAME_FROM) -> dict[str, Any]:
    """Both measures for every convolution with more than one filter, and their means over these layers.

    Filters that are all zero have no direction: they are counted and left out.

    Returns:
        ``layers``: how many, ``same_from``, ``clusters_per_filter`` and ``rank_share``: means (None without a layer),
        ``zero_filters``: how many in all, ``by_layer``: name, filters, clusters_per_filter, rank_share of each.

    Raises:
        FastrexError: a filter that is not finite.
    """
    rows: list[dict[str, Any]] = []
    zero = 0
    for name, weight in _convolutions(encoder):
        if not torch.isfinite(weight).all():
            raise FastrexError(
                f"analyze: filters must be finite, got NaN or inf in {name}; the encoder's training diverged"
            )
        filters = weight[weight.flatten(1).any(1)].flatten(1)
        zero += len(weight) - len(filters)
        if len(filters) > 1:
            values = {"clusters_per_filter": clusterability(filters, same_from), "rank_share": rank_share(filters)}
            rows.append({"layer": name, "filters": len(filters), **values})
    means = {
        key: sum(row[key] for row in rows) / len(rows) if rows else None
        for key in ("clusters_per_filter", "rank_share")
    }
    return {"layers": len(rows), "same_from": same_from, **means, "zero_filters": zero, "by_layer": rows}


def _convolutions(encoder: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Conv2d):
            yield name, module.weight.detach()
