"""Online Class Means: cosine softmax against prototypes from a memory bank (t-ReX, ICLR 2023, Eq. 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastrex_kernels import OnlineClassMeans

from ..errors import FastrexError
from ..settings import setting
from .base import Context, Objective, hit_metrics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class ClassMeansOptions:
    """Section ``[objective]`` with ``name = "class_means"``."""

    temperature: float = setting(0.1, "temperature of the cosine logits", low=1e-4)
    bank_size: int = setting(8192, "entries of the memory bank of momentum features", low=1)


class ClassMeans(Objective):
    """The class weights of Eq. 1 replaced by the normalised sums of a FIFO bank of un-normalised momentum features.

    The bank starts with standard normal features and uniform labels, as the published method does; it is all real after
    bank_size / batch_size steps. A class without an entry has the zero prototype, hence logit 0.
    """

    name: ClassVar[str] = "class_means"
    Options: ClassVar[type[Any]] = ClassMeansOptions
    needs_ema = True
    feeds = "momentum"

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        options: ClassMeansOptions,
        *,
        seed: int,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, options, seed=seed, group=group)
        # No process group: the loop gathers the features of all ranks itself, with those of its micro-batches.
        self.means = OnlineClassMeans(
            in_features, num_classes, options.bank_size, temperature=options.temperature, reduction="none", seed=seed
        )

    def forward(
        self, features: Tensor, target: Tensor, context: Context | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, stats = self.means(features, target, return_stats=True)
        health = self.means.health(drift=False)
        return loss, {**hit_metrics(stats.rank), **{name: health[name] for name in ("empty_classes", "age")}}

    def update_(
        self, features: Tensor, target: Tensor, *, keep: Tensor | None = None, images: Tensor | None = None
    ) -> None:
        self.means.update_(features, target, keep)

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        prototypes = self.means.prototypes()
        return F.normalize(features.to(prototypes.dtype), dim=1) @ prototypes.T

    def class_vectors(self) -> Tensor:
        return self.means.prototypes()

    def check(self, state: Mapping[str, Tensor]) -> None:
        # A pointer beyond the ring would write beyond it, which a GPU does not notice.
        for name, end in (("means.pointer", self.options.bank_size), ("means.labels", self.num_classes)):
            low, high = torch.stack(state[name].aminmax()).tolist()
            if low < 0 or high >= end:
                raise FastrexError(
                    f"resume: bank tensor {name!r} must be in [0, {end}), got {low if low < 0 else high}; the "
                    "checkpoint belongs to another configuration"
                )

    def notices(self, class_counts: Any) -> list[str]:
        share = expected_empty_share(np.asarray(class_counts), self.options.bank_size)
        line = (
            f"bank of {self.options.bank_size} features for {self.num_classes} classes: "
            f"{share:.1%} of the classes are expected to be empty at any time"
        )
        if share > 0.01:
            # The share falls as exp(-M/C): ln(100) entries per class leave one in a hundred empty.
            line += (
                "; an empty class is only a neutral competitor with logit 0. Set objective.bank_size="
                f"{int(np.ceil(4.61 * self.num_classes))} or more, or objective.name=cosine_softmax"
            )
        return [line]


def expected_empty_share(class_counts: np.ndarray[Any, Any], bank_size: int) -> float:
    """Expected share of classes without an entry among ``bank_size`` draws with the classes' frequencies."""
    frequency = class_counts / max(class_counts.sum(), 1)
    return float(np.mean((1 - frequency) ** bank_size))
