"""Sizes at which the prototypes and the ring are tested and measured, and their rivals in eager PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._op import Call, Case, Cost, Op
from . import bank_update_, class_means


def eager(features: Tensor, labels: Tensor, *, num_classes: int) -> tuple[Tensor, Tensor]:
    """The prototypes as their users write them: the sums in the dtype of the bank, the norm in float32, because
    ``F.normalize``'s epsilon is 0 in float16."""
    total = torch.zeros(num_classes, features.shape[1], dtype=features.dtype, device=features.device)
    total.index_add_(0, labels, features)
    kind = torch.float64 if features.dtype == torch.float64 else torch.float32
    return F.normalize(total.to(kind), dim=1), torch.bincount(labels, minlength=num_classes)


def make(sizes: Mapping[str, Any], dtype: torch.dtype, device: str, seed: int) -> Call:
    """A bank. ``sizes``: rows, dim, classes; ``strided`` (rows apart), ``skewed`` (most rows in class 0), ``zero``
    (class 0 sums to nothing)."""
    g = torch.Generator().manual_seed(seed)
    rows, dim, classes = sizes["rows"], sizes["dim"], sizes["classes"]
    features = torch.randn(rows, dim + (3 if sizes.get("strided") else 0), generator=g).to(dtype)
    labels = torch.randint(classes, (rows,), generator=g)
    if sizes.get("skewed"):
        labels[torch.rand(rows, generator=g) < 0.9] = 0
    if sizes.get("zero"):
        features[labels == 0] = 0
    features = features.to(device)[:, :dim]
    return Call({"features": features, "labels": labels.to(device)}, {"num_classes": classes})


def cost(sizes: Mapping[str, Any], dtype: torch.dtype, direction: str) -> Cost:
    """One read of the bank and its labels, one write of the prototypes and counts; there is no backward."""
    rows, dim, classes = sizes["rows"], sizes["dim"], sizes["classes"]
    return Cost(rows * (dim * dtype.itemsize + 8) + classes * (4 * dim + 8), rows * dim + 3 * classes * dim)


CASES = (
    Case("small", "more classes than rows: most prototypes are empty", {"rows": 3, "dim": 5, "classes": 7}),
    Case("one", "one value, one class", {"rows": 1, "dim": 1, "classes": 1}),
    Case("no rows", "an empty bank gives zero prototypes", {"rows": 0, "dim": 8, "classes": 3}),
    Case("odd", "no size is a multiple of a vector or a tile", {"rows": 301, "dim": 77, "classes": 13}),
    Case("strided", "rows lie apart", {"rows": 130, "dim": 64, "classes": 9, "strided": True}),
    Case("wide", "columns in several blocks and a rest", {"rows": 90, "dim": 837, "classes": 5}),
    Case("one class", "threads share columns, not classes", {"rows": 2000, "dim": 200, "classes": 1}),
    Case("skewed", "nine of ten rows in one class", {"rows": 1500, "dim": 136, "classes": 40, "skewed": True}),
    Case("zero", "a class whose sum has no direction", {"rows": 40, "dim": 16, "classes": 4, "zero": True}),
    Case("trex", "the published bank", {"rows": 8192, "dim": 256, "classes": 1000}, bench=True),
    Case("22k", "a bank of a million rows", {"rows": 1_000_000, "dim": 256, "classes": 21_841}, bench=True),
)  # fmt: skip


def eager_update(
    bank_features: Tensor,
    bank_labels: Tensor,
    pointer: Tensor,
    features: Tensor,
    labels: Tensor,
    *,
    keep: Tensor | None = None,
    prototypes: Tensor | None = None,
    counts: Tensor | None = None,
) -> None:
    """The published method's update, which reads the pointer on the host, and prototypes from the whole bank."""
    if keep is not None and not bool(keep):
        return
    slot, size = int(pointer), bank_labels.shape[0]
    fits = min(labels.shape[0], size - slot)
    bank_features[slot : slot + fits] = features[:fits].to(bank_features.dtype)
    bank_labels[slot : slot + fits] = labels[:fits]
    pointer.fill_(slot + labels.shape[0] if slot + labels.shape[0] < size else 0)
    if prototypes is not None and counts is not None:
        fresh, number = eager(bank_features, bank_labels, num_classes=counts.shape[0])
        prototypes.copy_(fresh)
        counts.copy_(number)


def make_update(sizes: Mapping[str, Any], dtype: torch.dtype, device: str, seed: int) -> Call:
    """A full ring and a batch. ``sizes``: those of :func:`make`, batch; ``slot`` (0), ``prototypes``, ``keep``, and
    ``wide_batch`` (features in float32)."""
    g = torch.Generator().manual_seed(seed + 1)
    bank, classes = make(sizes, dtype, device, seed).tensors, sizes["classes"]
    tensors = {
        "bank_features": bank["features"],
        "bank_labels": bank["labels"],
        "pointer": torch.tensor([sizes.get("slot", 0)], device=device),
        "features": torch.randn(sizes["batch"], sizes["dim"], generator=g)
        .to(torch.float32 if sizes.get("wide_batch") else dtype)
        .to(device),
        "labels": torch.randint(classes, (sizes["batch"],), generator=g).to(device),
    }
    writes = ["bank_features", "bank_labels", "pointer"]
    if "keep" in sizes:
        tensors["keep"] = torch.tensor(sizes["keep"], device=device)
    if sizes.get("prototypes"):
        means = class_means(bank["features"], bank["labels"], classes, impl="reference")
        tensors["prototypes"], tensors["counts"] = means
        writes += ["prototypes", "counts"]
    return Call(tensors, writes=writes)


def cost_update(sizes: Mapping[str, Any], dtype: torch.dtype, direction: str) -> Cost:
    """The batch read and written; with prototypes the labels once, and the rows of the classes that it touches."""
    rows, dim, classes, batch = sizes["rows"], sizes["dim"], sizes["classes"], sizes["batch"]
    moved = 2 * batch * (dim * dtype.itemsize + 8)
    if not sizes.get("prototypes"):
        return Cost(moved, 0)
    # Classes that at least one of the 2 * batch labels (those overwritten and those written) names, for uniform labels.
    touched = classes * (1 - (1 - 1 / classes) ** (2 * batch))
    again = touched / classes * rows * dim
    return Cost(int(moved + rows * 8 + again * dtype.itemsize + touched * (4 * dim + 8)), int(again))


BANK_CASES = (
    Case("start", "the first batch", {"rows": 50, "dim": 12, "classes": 6, "batch": 7, "prototypes": True}),
    Case("end", "a surplus is dropped and the pointer wraps",
         {"rows": 37, "dim": 33, "classes": 9, "batch": 16, "slot": 30, "prototypes": True}),
    Case("plain", "no prototypes", {"rows": 20, "dim": 8, "classes": 3, "batch": 5, "slot": 4}),
    Case("larger than the ring", "the rows that fit, once",
         {"rows": 5, "dim": 8, "classes": 3, "batch": 9, "prototypes": True}),
    Case("not kept", "nothing changes",
         {"rows": 20, "dim": 8, "classes": 3, "batch": 5, "prototypes": True, "keep": False}),
    Case("kept", "keep is a tensor",
         {"rows": 20, "dim": 8, "classes": 30, "batch": 5, "prototypes": True, "keep": True}),
    Case("cast", "the batch has another dtype than the bank",
         {"rows": 64, "dim": 70, "classes": 5, "batch": 11, "prototypes": True, "wide_batch": True}),
    Case("strided", "the bank's rows lie apart",
         {"rows": 64, "dim": 40, "classes": 5, "batch": 11, "prototypes": True, "strided": True}),
    Case("trex", "the published bank", {"rows": 8192, "dim": 256, "classes": 1000, "batch": 256}, bench=True),
    Case("trex with prototypes", "the published bank, prototypes kept up to date",
         {"rows": 8192, "dim": 256, "classes": 1000, "batch": 256, "prototypes": True}, bench=True),
    Case("22k with prototypes", "a million rows: the update must not read them all",
         {"rows": 1_000_000, "dim": 256, "classes": 21_841, "batch": 256, "prototypes": True}, bench=True),
)  # fmt: skip

OP = Op(name="class_means", function=class_means, eager=eager, make=make, cases=CASES, cost=cost)
BANK_OP = Op(
    name="bank_update_",
    function=bank_update_,
    eager=eager_update,
    make=make_update,
    cases=BANK_CASES,
    cost=cost_update,
)
