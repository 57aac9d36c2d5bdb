"""Online Class Means: class prototypes averaged from a memory bank (t-ReX, Sariyildiz et al., ICLR 2023, Eq. 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._op import resolve
from .reference import bank_update_reference, class_means_reference

MEANS = {"reference": class_means_reference}
UPDATES = {"reference": bank_update_reference}


def class_means(features: Tensor, labels: Tensor, num_classes: int, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Prototypes of the classes in a bank: the sum of each class's rows, divided by its l2 norm.

    Args:
        features: bank rows [M, D], floating point, **not** normalised: a row's norm weighs its contribution.
        labels: class ids int64 [M]. An id out of range raises on a CPU; on a GPU the row is dropped.
        num_classes: C, at least 1.
        impl: "auto", "reference", "cpp" or "triton".

    Returns:
        ``prototypes`` [C, D] in float32 (float64 for float64 features), unit rows, and ``counts`` [C] int64. The
        prototype of an empty class is the zero vector, so that its cosine logit is exactly 0. No gradient flows.

    Raises:
        ValueError, TypeError: naming the argument and the fact.
    """
    run = resolve("class_means", impl, MEANS)
    _check_rows("class_means", features, labels)
    if num_classes < 1:
        raise ValueError(f"class_means: num_classes must be at least 1, got {num_classes}")
    if labels.device.type == "cpu" and labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        bad = labels[(labels < 0) | (labels >= num_classes)][0]
        raise ValueError(f"class_means: labels must be in [0, {num_classes}), got {int(bad)}")
    prototypes, counts = run(features, labels, num_classes)
    return prototypes, counts


def bank_update_(
    bank_features: Tensor,
    bank_labels: Tensor,
    pointer: Tensor,
    features: Tensor,
    labels: Tensor,
    *,
    keep: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Write a batch into the ring, in place, at the device-side pointer; no host sync.

    Rows that do not fit before the end of the ring are dropped and the pointer wraps to 0, as the reference method
    does.

    Args:
        bank_features: [M, D]. bank_labels: int64 [M]. pointer: int64 [1].
        features: [B, D], cast to the bank's dtype. labels: int64 [B].
        keep: 0-d bool tensor; where it is False nothing changes (a batch with numbers gone bad).
        impl: "auto", "reference", "cpp" or "triton".

    Raises:
        ValueError, TypeError: naming the argument and the fact.
    """
    run = resolve("bank_update_", impl, UPDATES)
    _check_rows("bank_update_", bank_features, bank_labels)
    _check_rows("bank_update_", features, labels)
    if features.shape[1] != bank_features.shape[1]:
        raise ValueError(f"bank_update_: features must be [B, {bank_features.shape[1]}], got {tuple(features.shape)}")
    if pointer.shape != (1,) or pointer.dtype != torch.int64:
        raise ValueError(f"bank_update_: pointer must be int64 [1], got {pointer.dtype} {tuple(pointer.shape)}")
    if features.shape[0]:
        run(bank_features, bank_labels, pointer, features, labels, keep)


def _check_rows(name: str, features: Tensor, labels: Tensor) -> None:
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(
            f"{name}: features must be floating point [rows, D], got {features.dtype} {tuple(features.shape)}"
        )
    if labels.dtype != torch.int64:
        raise TypeError(f"{name}: labels must be int64, got {labels.dtype}")
    if labels.shape != features.shape[:1]:
        raise ValueError(f"{name}: labels must be [{features.shape[0]}] like the rows, got {tuple(labels.shape)}")
    if labels.device != features.device:
        raise ValueError(f"{name}: labels must be on {features.device} like features, got {labels.device}")
