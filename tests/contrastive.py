"""What the tests of the contrastive cross-entropy share: inputs, the definition in loops, the implementations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrex_kernels import Mixtures, contrastive_cross_entropy
from fastrex_kernels._op import in_cpp

built = pytest.mark.skipif(
    not (in_cpp("contrastive_ce") and in_cpp("nearest_keys")), reason="the C++ library has no such operator"
)
IMPLS = ["reference", pytest.param("cpp", marks=built)]
each_impl = pytest.mark.parametrize("impl", IMPLS)


def data(rows: int = 12, keys: int = 20, dim: int = 6, classes: int = 4, seed: int = 0) -> tuple[Tensor, ...]:
    """Queries and keys in float32 (whose float64 copies are the same numbers), and the ids of both."""
    g = torch.Generator().manual_seed(seed)
    x, k = torch.randn(rows, dim, generator=g), torch.randn(keys, dim, generator=g)
    return x, k, torch.randint(classes, (rows,), generator=g), torch.randint(classes, (keys,), generator=g)


def loss_of(*tensors: Tensor, **words: Any) -> Tensor:
    found = contrastive_cross_entropy(*tensors, **words)
    assert isinstance(found, Tensor)
    return found


def in_loops(
    x: Tensor,
    k: Tensor,
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
) -> Tensor:
    """Each row's loss [N], pair by pair, as the docstring of the function says it."""
    unit = [v / v.norm() for v in k]
    if learnt_keys is not None:
        unit = [u if m < learnt_keys else u.detach() for m, u in enumerate(unit)]
    losses = []
    for n, query in enumerate(x):
        q, own = query / query.norm(), int(ids[n])
        pairs = []
        for m, u in enumerate(unit):
            same = own == int(key_ids[m])
            out = own == ignore_index or int(key_ids[m]) == ignore_index or (m < private and not same)
            if instance is not None and key_instance is not None:
                out = out or bool(instance[n] == key_instance[m])
            if not out:
                pairs.append((q @ u, same))
        if nearest:
            pairs = sorted(pairs, key=lambda pair: -float(pair[0].detach()))[:nearest]
        close = [c for c, same in pairs if same]
        far = [c / temperature for c, same in pairs if not same]
        if mixtures is not None and own != ignore_index:
            for first, second, share in zip(*(t[n].tolist() for t in mixtures), strict=True):
                if first != -2:
                    mix = share * (q if first == -1 else unit[first]) + (1 - share) * unit[second]
                    far.append(q @ (mix / mix.norm()).detach() / temperature)
        if not close:
            losses.append(x.new_zeros(()))
            continue
        if margin and margin_kind == "cosface":
            close = [c - margin for c in close]
        elif margin:
            close = [
                torch.cos(torch.acos(c) + margin) if torch.acos(c) + margin < math.pi else c - margin * math.sin(margin)
                for c in close
            ]
        logits = torch.stack(close) / temperature
        negatives = x.new_zeros(())
        if far:
            s = torch.stack(far)
            weight = len(far) * torch.softmax(hardness * s, dim=0)
            negatives = ((weight.detach() if detach_hardness else weight) * s.exp()).sum()
        total = logits.exp().sum() + negatives
        share_log = logits.mean() if positives == "mean" else logits.exp().sum().log()
        losses.append(total.log() - share_log)
    return torch.stack(losses)


def whole() -> tuple[Tensor, Tensor, Tensor]:
    """Parts of mixtures of 12 queries that are as they should be."""
    return torch.tensor([[1, 3]] * 12), torch.tensor([[2, 4]] * 12), torch.full((12, 2), 0.4)
