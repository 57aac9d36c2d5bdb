"""Online Class Means: class prototypes averaged from a memory bank (t-ReX, Sariyildiz et al., ICLR 2023, Eq. 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._op import choose, define, raw, readable
from .reference import bank_update_reference, class_means_reference


def _means_fake(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    shape = (num_classes, features.shape[1])
    return features.new_empty(shape, dtype=torch.float32), labels.new_empty((num_classes,))


def _update_fake(
    bank_features: Tensor,
    bank_labels: Tensor,
    pointer: Tensor,
    features: Tensor,
    labels: Tensor,
    keep: Tensor | None,
    prototypes: Tensor | None,
    counts: Tensor | None,
) -> None:
    return None


define(__name__, "class_means(Tensor features, Tensor labels, int num_classes) -> (Tensor, Tensor)", _means_fake)
define(
    __name__,
    "bank_update_(Tensor(a!) bank_features, Tensor(b!) bank_labels, Tensor(c!) pointer, Tensor features, Tensor labels,"
    " Tensor? keep, Tensor(d!)? prototypes, Tensor(e!)? counts) -> ()",
    _update_fake,
)


def class_means(features: Tensor, labels: Tensor, num_classes: int, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Prototypes of the classes in a bank: the sum of each class's rows, divided by its l2 norm.

    The rows of a class are added in the order of their slots, in float32: the same bank gives the same bits, whatever
    the number of threads, and also where :func:`bank_update_` keeps the prototypes up to date.

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
    _check_rows("class_means", features, labels)
    impl = choose("class_means", impl, features)
    if num_classes < 1:
        raise ValueError(f"class_means: num_classes must be at least 1, got {num_classes}")
    if impl != "cpp":
        _check_values("class_means", labels, num_classes)
    with torch.no_grad():
        if impl == "reference":
            return class_means_reference(features, labels, num_classes)
        prototypes, counts = raw(__name__, "class_means", impl)(features, labels, num_classes)
        return prototypes, counts


def bank_update_(
    bank_features: Tensor,
    bank_labels: Tensor,
    pointer: Tensor,
    features: Tensor,
    labels: Tensor,
    *,
    keep: Tensor | None = None,
    prototypes: Tensor | None = None,
    counts: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Write a batch into the ring, in place, at the device-side pointer; no host sync.

    Rows that do not fit before the end of the ring are dropped and the pointer wraps to 0, as the reference method
    does.

    With ``prototypes`` and ``counts``, the classes that lost or gained a row are computed again from their rows in the
    bank, all others stay: what was equal to ``class_means(bank_features, bank_labels, C)`` before the call is equal to
    it afterwards, bit for bit on one implementation, however many updates follow one another.

    Args:
        bank_features: [M, D]. bank_labels: int64 [M]. pointer: int64 [1].
        features: [B, D], cast to the bank's dtype. labels: int64 [B]. With ``prototypes``, an id out of range raises on
            a CPU; on a GPU the row takes its slot and counts for no class.
        keep: 0-d bool tensor; where it is False nothing changes (a batch with numbers gone bad).
        prototypes: contiguous [C, D] in float32 (float64 with a float64 bank), as :func:`class_means` returns them.
        counts: contiguous int64 [C]; both or neither.
        impl: "auto", "reference", "cpp" or "triton".

    Raises:
        ValueError, TypeError: naming the argument and the fact.
    """
    _check_rows("bank_update_", bank_features, bank_labels)
    _check_rows("bank_update_", features, labels)
    impl = choose("bank_update_", impl, bank_features)
    size, dim = bank_features.shape
    if features.shape[1] != dim:
        raise ValueError(f"bank_update_: features must be [B, {dim}], got {tuple(features.shape)}")
    for word, tensor in (("pointer", pointer), ("keep", keep)):
        if tensor is not None and tensor.device != bank_features.device:
            raise ValueError(f"bank_update_: {word} must be on {bank_features.device}, got {tensor.device}")
    if features.device != bank_features.device:
        raise ValueError(f"bank_update_: features must be on {bank_features.device}, got {features.device}")
    if pointer.shape != (1,) or pointer.dtype != torch.int64:
        raise ValueError(f"bank_update_: pointer must be int64 [1], got {pointer.dtype} {tuple(pointer.shape)}")
    if keep is not None and (keep.dtype != torch.bool or keep.ndim):
        raise ValueError(f"bank_update_: keep must be a 0-d bool tensor, got {keep.dtype} {tuple(keep.shape)}")
    if size < 1:
        raise ValueError("bank_update_: bank_features must have at least one row, got none")
    if prototypes is not None or counts is not None:
        classes = _check_means(bank_features, prototypes, counts)
        if impl != "cpp":
            _check_values("bank_update_", labels, classes)
    if not features.shape[0]:
        return
    run = bank_update_reference if impl == "reference" else raw(__name__, "bank_update_", impl)
    with torch.no_grad():
        run(bank_features, bank_labels, pointer, features, labels, keep, prototypes, counts)


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


def _check_values(name: str, labels: Tensor, num_classes: int) -> None:
    """What the C++ operators check while they read the labels."""
    if not labels.numel() or not readable(labels):
        return
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        bad = labels[(labels < 0) | (labels >= num_classes)][0]
        raise ValueError(f"{name}: labels must be in [0, {num_classes}), got {int(bad)}")


def _check_means(bank: Tensor, prototypes: Tensor | None, counts: Tensor | None) -> int:
    """The number of classes C."""
    if prototypes is None or counts is None:
        missing = "prototypes" if prototypes is None else "counts"
        raise ValueError(f"bank_update_: prototypes and counts must be given together, got no {missing}")
    dim, kind = bank.shape[1], torch.float64 if bank.dtype == torch.float64 else torch.float32
    if prototypes.ndim != 2 or prototypes.shape[1] != dim or prototypes.dtype != kind:
        fact = f"{prototypes.dtype} {tuple(prototypes.shape)}"
        raise ValueError(f"bank_update_: prototypes must be {kind} [C, {dim}], got {fact}")
    classes = prototypes.shape[0]
    if counts.dtype != torch.int64 or counts.shape != (classes,):
        raise ValueError(f"bank_update_: counts must be int64 [{classes}], got {counts.dtype} {tuple(counts.shape)}")
    if not (prototypes.is_contiguous() and counts.is_contiguous()):
        raise ValueError("bank_update_: prototypes and counts must be contiguous, got strides of another layout")
    if prototypes.device != bank.device or counts.device != bank.device:
        raise ValueError(
            f"bank_update_: prototypes and counts must be on {bank.device}, got {prototypes.device} and {counts.device}"
        )
    return classes
