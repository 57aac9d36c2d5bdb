"""DeepNCM: softmax over squared distances to running class means (Guerriero, Caputo, Mensink, ICLR workshop 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import FastrexError, UsageError
from ..settings import setting
from .base import Context, Objective, hit_metrics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Of a float32, the bits that TF32 keeps: sign, exponent and ten of the mantissa.
TF32_BITS = -1 << 13


@dataclass(frozen=True)
class NcmOptions:
    """Section ``[objective]`` with ``name = "ncm"``."""

    update: str = setting(
        "online",
        "class means: online = of all features so far; condensation = these, forgotten every so many steps down to "
        "one; decay = moving average",
        choices=("online", "condensation", "decay"),
    )
    period: int = setting(390, "steps between two condensations (390 = an epoch of CIFAR at batch 128)", low=1)
    decay: float = setting(0.9, "share of the old mean that update=decay keeps, below 1", low=0.0, high=1.0)

    def __post_init__(self) -> None:
        if self.decay == 1:
            raise UsageError("config: objective.decay must be below 1, got 1, with which no mean moves; set 0.9")


class Ncm(Objective):
    """``cross_entropy(logits, target)`` with ``logits[c] = -||x - mean_c||^2``: no factor, no temperature, no weights.

    The means are state: after each step they take the model's own features of the first crop of the whole global batch
    (``update``), with t_c the sum and n_c the number of a class's features in the batch:

    * online: ``total += t``, ``count += n``, ``mean = total / count``, 0 for a class that was never seen;
    * condensation: online, and after every ``period`` updates ``total = mean``, ``count = 1`` for the classes seen;
    * decay: ``mean = decay * mean + (1 - decay) * t / n`` for the classes of the batch.

    As they start at 0, the very first step has no gradient of the loss: beside the means only weight decay moves
    anything. A loss that is not finite leaves them as they are, like all other state.

    Buffers: ``means`` float32 [C, D], ``totals`` float32 [C, D] (not with decay), ``counts`` int64 [C] (features since
    the start or the last condensation), ``updates`` int64 (their number), ``mean_distance`` float32, the diagnostic of
    the latest update: ||t_c / n_c - mean_c||^2 / ||t_c / n_c||^2 with the means before it, averaged over the classes of
    the batch that had a mean and whose features are not all 0 (as those behind a ReLU may be).
    """

    name: ClassVar[str] = "ncm"
    feeds: str = "online"
    Options: ClassVar[type[Any]] = NcmOptions

    means: Tensor
    totals: Tensor
    counts: Tensor
    updates: Tensor
    mean_distance: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        options: NcmOptions,
        *,
        seed: int,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, options, seed=seed, group=group)
        self.register_buffer("means", torch.zeros(num_classes, in_features))
        if options.update != "decay":
            self.register_buffer("totals", torch.zeros(num_classes, in_features))
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean_distance", torch.zeros(()))

    def forward(
        self, features: Tensor, target: Tensor, context: Context | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits, _ = self._scores(features)
        targets = target.repeat(len(features) // len(target))  # rows are crop-major
        # ||x||^2 is the same for all classes: the softmax does not see it.
        loss = F.cross_entropy(logits, targets, reduction="none")
        with torch.no_grad():
            # Classes without a mean are all as far: among equals the target comes last.
            rank = (logits >= logits.gather(1, targets[:, None])).sum(1) - 1
        return loss, {
            **hit_metrics(rank),
            "mean_distance": self.mean_distance.clone(),
            "empty_classes": (self.counts == 0).sum().float(),
        }

    @torch.no_grad()
    def update_(
        self, features: Tensor, target: Tensor, *, keep: Tensor | None = None, images: Tensor | None = None
    ) -> None:
        options: NcmOptions = self.options
        sums, added = class_sums(features.to(self.means.dtype), target, self.num_classes)
        there, seen = added > 0, self.counts > 0
        fresh = sums / added.clamp(min=1)[:, None]
        numbers, lengths = torch.finfo(fresh.dtype), fresh.square().sum(1)
        # Bounded, so that the sum over the classes is finite however short the features are.
        moved = (fresh - self.means).square().sum(1) / lengths.clamp(min=numbers.tiny)
        moved = moved.clamp(max=numbers.max / (2 * self.num_classes))
        known = there & seen & (lengths > 0)
        counts, updates = self.counts + added, self.updates + 1
        new = {"updates": updates, "mean_distance": torch.where(known, moved, 0.0).sum() / known.sum().clamp(min=1)}
        if options.update == "decay":
            decayed = options.decay * self.means + (1 - options.decay) * fresh
            new |= {"means": torch.where(there[:, None], decayed, self.means), "counts": counts}
        else:
            totals = self.totals + sums
            means = totals / counts.clamp(min=1)[:, None]
            if options.update == "condensation":
                due = updates % options.period == 0
                totals, counts = torch.where(due, means, totals), torch.where(due, counts.clamp(max=1), counts)
            new |= {"means": means, "totals": totals, "counts": counts}
        for name, value in new.items():
            own = getattr(self, name)
            own.copy_(value if keep is None else torch.where(keep, value, own))

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        """The logits: minus the squared distances to the class means."""
        logits, offset = self._scores(features)
        return logits - offset

    def class_vectors(self) -> Tensor:
        return self.means

    def check(self, state: Mapping[str, Tensor]) -> None:
        for name in ("counts", "updates"):
            if (low := int(state[name].min())) < 0:
                raise FastrexError(
                    f"resume: bank tensor {name!r} must be at least 0, got {low}; the checkpoint is damaged"
                )
        for name, tensor in state.items():
            # The diagnostic is only shown.
            if name != "mean_distance" and tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise FastrexError(
                    f"resume: bank tensor {name!r} must be finite, got NaN or inf; the checkpoint is damaged"
                )
        for name in {"means", "totals"} & state.keys():
            if (odd := (state["counts"] == 0) & state[name].any(1)).any():
                raise FastrexError(
                    f"resume: bank tensor {name!r} must be 0 for a class that was never seen, got other numbers for "
                    f"class {int(odd.int().argmax())}; the checkpoint is damaged"
                )

    def _scores(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [N, C] up to what all classes have in common, and that, [N, 1]; in the means' dtype, float32.

        Distances do not change when all points are moved. With the middle of the means at the origin, what
        ``2 x . mean - ||mean||^2`` subtracts is as small as it can be: penultimate features are all positive, and far
        from 0 in the same direction.
        """
        with torch.autocast(features.device.type, enabled=False):
            middle = self.means.mean(0)
            points, means = features.to(middle.dtype) - middle, self.means - middle
            logits = 2 * product(points, means) - means.square().sum(1)
            return logits, points.square().sum(1, keepdim=True)


def product(input: Tensor, weight: Tensor) -> Tensor:
    """``input @ weight.T`` of [N, D] and [C, D] to the accuracy of float32, with a gradient for ``input``.

    A GPU may multiply in TF32 (10 bits of mantissa), which is no loss for a layer but is for a difference of squares of
    large numbers. Split into the part that TF32 has and the rest, three of its products are exact to 2^-20. The
    gradient is that of one product.
    """
    if input.device.type != "cuda" or input.dtype != torch.float32:
        return input @ weight.T
    return split_product(input, weight)


def split_product(input: Tensor, weight: Tensor) -> Tensor:
    """:func:`product` in three parts, none of which needs more than TF32."""
    (high, low), (weight_high, weight_low) = halves(input), halves(weight)
    return high @ weight_high.T + (high @ weight_low.T + low @ weight_high.T)


def halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """What TF32 has of float32 ``values``, without gradient, and the rest."""
    high = (values.detach().contiguous().view(torch.int32) & TF32_BITS).view(torch.float32)
    return high, values - high


def class_sums(features: Tensor, target: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Sums [C, D] of the rows of ``features`` [B, D] by class, and their numbers int64 [C].

    Rows are added in their order, so that the same batch gives the same bits (``index_add_`` is made of atomics on a
    GPU). A class id out of range counts for no class.
    """
    slot = torch.where((target >= 0) & (target < classes), target, classes)
    ordered, rows = slot.sort(stable=True)
    ends = torch.searchsorted(ordered, torch.arange(classes + 2, device=target.device))
    counts = ends.diff()
    # "unsafe" leaves out checks of the counts that would ask the device.
    sums = torch.segment_reduce(features[rows], "sum", lengths=counts, axis=0, initial=0.0, unsafe=True)
    return sums[:classes], counts[:classes]
