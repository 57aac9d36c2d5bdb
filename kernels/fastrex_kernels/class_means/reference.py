"""Definitions of :func:`class_means` and :func:`bank_update_` in eager PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-12


def class_means_reference(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return (prototypes [C, D], counts [C])."""
    kind = torch.float64 if features.dtype == torch.float64 else torch.float32
    # Row C collects what has no class (only a GPU lets such labels through), so that nothing needs a sync.
    slot = torch.where((labels >= 0) & (labels < num_classes), labels, num_classes)
    total = torch.zeros(num_classes + 1, features.shape[1], dtype=kind, device=features.device)
    total.index_add_(0, slot, features.to(kind))
    counts = torch.zeros(num_classes + 1, dtype=torch.int64, device=features.device)
    counts.index_add_(0, slot, torch.ones_like(slot))
    total = total[:num_classes]
    norm = torch.linalg.vector_norm(total, dim=1, keepdim=True)
    live = ~(norm <= EPS)  # so that a NaN stays one
    return torch.where(live, total / torch.where(live, norm, 1.0), 0.0), counts[:num_classes]


def bank_update_reference(
    bank_features: Tensor,
    bank_labels: Tensor,
    pointer: Tensor,
    features: Tensor,
    labels: Tensor,
    keep: Tensor | None,
    prototypes: Tensor | None,
    counts: Tensor | None,
) -> None:
    """Write ``features`` and ``labels`` at ``pointer``; see :func:`bank_update_`."""
    size, given = bank_labels.shape[0], labels.shape[0]
    # A surplus row is replaced by the row that fills the last slot: it writes the same values once more, which needs no
    # mask, no sync and no scratch slot.
    source = torch.minimum(torch.arange(given, device=labels.device), size - 1 - pointer)
    slot = pointer + source
    new_features, new_labels = features.to(bank_features.dtype)[source], labels[source]
    old_labels = bank_labels[slot]
    after = torch.where(pointer + given < size, pointer + given, 0)
    if keep is not None:
        new_features = torch.where(keep, new_features, bank_features[slot])
        new_labels = torch.where(keep, new_labels, old_labels)
        after = torch.where(keep, after, pointer)
    bank_features[slot] = new_features
    bank_labels[slot] = new_labels
    pointer.copy_(after)
    if prototypes is None or counts is None:
        return
    classes = counts.shape[0]
    written = torch.cat([old_labels, new_labels])
    touched = torch.zeros(classes + 1, dtype=torch.bool, device=labels.device)
    touched[torch.where((written >= 0) & (written < classes), written, classes)] = True
    if keep is not None:
        touched = touched & keep
    fresh, fresh_counts = class_means_reference(bank_features, bank_labels, classes)
    prototypes.copy_(torch.where(touched[:classes, None], fresh, prototypes))
    counts.copy_(torch.where(touched[:classes], fresh_counts, counts))
