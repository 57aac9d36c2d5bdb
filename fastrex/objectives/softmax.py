"""Plain softmax cross-entropy with learnt class weights: what the cosine objectives are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Objective, hit_metrics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class SoftmaxOptions:
    """Section ``[objective]`` with ``name = "softmax"``."""


class Softmax(Objective):
    """``cross_entropy(features @ weight.T + bias, target)``: nothing is normalised, there is no temperature.

    Weight [C, D] and bias [C] start as those of torch's ``nn.Linear``: uniform in +-1/sqrt(D).
    """

    name: ClassVar[str] = "softmax"
    needs_ema: ClassVar[bool] = False
    Options: ClassVar[type[Any]] = SoftmaxOptions

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        options: SoftmaxOptions,
        *,
        seed: int,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, options, seed=seed, group=group)
        # Drawn once, by the run's seed: torch's own generator stays where it is.
        self.linear = nn.Linear(in_features, num_classes, device="meta").to_empty(device="cpu")
        bound, generator = in_features**-0.5, torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.linear.parameters():
                parameter.uniform_(-bound, bound, generator=generator)

    def forward(self, features: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits: Tensor = self.linear(features)
        logits = logits.float()
        targets = target.repeat(len(features) // len(target))  # rows are crop-major
        loss = F.cross_entropy(logits, targets, reduction="none")
        with torch.no_grad():
            rank = (logits > logits.gather(1, targets[:, None])).sum(1)
        return loss, hit_metrics(rank)

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        logits: Tensor = self.linear(features)
        return logits

    def class_vectors(self) -> Tensor:
        return self.linear.weight
