"""Contrastive losses as a module for loops of one's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .contrastive_ce import ContrastiveStats, contrastive_cross_entropy
from .contrastive_ce.arguments import check_integer, check_options, check_tensor, expand

__all__ = ["ContrastiveLoss"]

NAME = "ContrastiveLoss"


class ContrastiveLoss(nn.Module):
    """:func:`contrastive_cross_entropy` with its options: SupCon (Khosla et al., 2020) on a batch of views, against
    keys that live elsewhere, or both.

    Args:
        temperature: at least 1e-6.
        positives: "mean" of the positives' log-probabilities (SupCon), or "sum": the log of their sum.
        hardness: how far hard negatives weigh more (SCHaNe and HCL: 1; at most 1000); 0: all alike.
        detach_hardness: these weights are constants of the gradient.
        margin: of the positives' logits; ``margin_kind``: "cosface" or "arcface".
        nearest: only so many nearest keys of each query count (LOOK); 0: all. Keys get no gradient then, the batch
            itself included: features learn as queries alone.
        ignore_index: a label of features and keys that count nowhere.
        reduction: "none", "mean" or "sum".
    """

    def __init__(
        self,
        temperature: float = 0.1,
        positives: str = "mean",
        hardness: float = 0.0,
        detach_hardness: bool = False,
        margin: float = 0.0,
        margin_kind: str = "cosface",
        nearest: int = 0,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        check_options(NAME, temperature, positives, hardness, margin, margin_kind, reduction)
        for word, number in (("nearest", nearest), ("ignore_index", ignore_index)):
            check_integer(NAME, word, number)
        if nearest < 0:
            raise ValueError(f"{NAME}: nearest must be at least 0, got {nearest}")
        self.temperature, self.positives = temperature, positives
        self.hardness, self.detach_hardness = hardness, detach_hardness
        self.margin, self.margin_kind, self.nearest = margin, margin_kind, nearest
        self.ignore_index, self.reduction = ignore_index, reduction

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        keys: Tensor | None = None,
        key_labels: Tensor | None = None,
        *,
        with_batch: bool = False,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, ContrastiveStats]:
        """The loss of features [N, D] with labels int64 [N], or [B] that N / B views share crop by crop.

        Args:
            keys: [M, D] with ``key_labels`` int64 [M], such as a memory bank; without them the features are the keys,
                and none is its own.
            with_batch: the features are keys as well, before the given ones, which then get no gradient.
        """
        self._check(features, labels, keys, key_labels, with_batch)
        if keys is not None and key_labels is not None and not with_batch:
            return self._loss(features, keys, labels, key_labels, return_stats=return_stats)
        rows = features.shape[0]
        ids = expand(labels, rows)
        own = torch.arange(rows, device=features.device)
        words = {"instance": own, "learnt_keys": 0 if self.nearest else rows, "return_stats": return_stats}
        if keys is None or key_labels is None:
            return self._loss(features, features, ids, ids, key_instance=own, **words)
        behind = torch.full((keys.shape[0],), -1, device=features.device)
        both = torch.cat((features, keys.detach()))
        return self._loss(
            features, both, ids, torch.cat((ids, key_labels)), key_instance=torch.cat((own, behind)), **words
        )

    @staticmethod
    def _check(
        features: Tensor, labels: Tensor, keys: Tensor | None, key_labels: Tensor | None, with_batch: bool
    ) -> None:
        """What the function would say in its own words."""
        if (keys is None) != (key_labels is None):
            given = "key_labels" if keys is None else "keys"
            raise ValueError(f"{NAME}: keys and key_labels must be given together, got {given} alone")
        if with_batch and keys is None:
            raise ValueError(
                f"{NAME}: keys must be given with with_batch=True, got None; without keys the batch is them"
            )
        for word, tensor in (("features", features), ("keys", keys)):
            if tensor is None:
                continue
            check_tensor(NAME, word, tensor)
            if tensor.ndim != 2:
                raise ValueError(f"{NAME}: {word} must have 2 dimensions, got shape {tuple(tensor.shape)}")
            if not tensor.is_floating_point():
                raise TypeError(f"{NAME}: {word} must be floating point, got {tensor.dtype}")
        rows, dim = features.shape
        for word, tensor in (("labels", labels), ("key_labels", key_labels)):
            if tensor is None:
                continue
            check_tensor(NAME, word, tensor)
            if tensor.dtype != torch.int64:
                raise TypeError(f"{NAME}: {word} must be int64, got {tensor.dtype}")
        count = labels.shape[0] if labels.ndim == 1 else 0
        if labels.ndim != 1 or (count != rows and (count == 0 or rows % count)):
            shape = tuple(labels.shape)
            raise ValueError(f"{NAME}: labels must have {rows} entries or a divisor of that, got {shape}")
        if keys is None or key_labels is None:
            return
        if keys.shape[1] != dim:
            raise ValueError(f"{NAME}: keys must be [M, {dim}] like features, got {tuple(keys.shape)}")
        if tuple(key_labels.shape) != (keys.shape[0],):
            shape = tuple(key_labels.shape)
            raise ValueError(f"{NAME}: key_labels must have one entry per key, {keys.shape[0]}, got {shape}")
        for word, tensor in (("labels", labels), ("keys", keys), ("key_labels", key_labels)):
            if tensor.device != features.device:
                raise ValueError(f"{NAME}: {word} must be on {features.device} like features, got {tensor.device}")

    def _loss(self, *tensors: Tensor, **words: Any) -> Tensor | tuple[Tensor, ContrastiveStats]:
        return contrastive_cross_entropy(
            *tensors, temperature=self.temperature, positives=self.positives, hardness=self.hardness,
            detach_hardness=self.detach_hardness, margin=self.margin, margin_kind=self.margin_kind,
            nearest=self.nearest, ignore_index=self.ignore_index, reduction=self.reduction, **words,
        )  # fmt: skip

    def extra_repr(self) -> str:
        words = (
            "temperature", "positives", "hardness", "detach_hardness", "margin", "margin_kind", "nearest",
            "ignore_index", "reduction",
        )  # fmt: skip
        return ", ".join(f"{word}={getattr(self, word)!r}" for word in words)
