"""Cosine softmax with learnt class weights (t-ReX, Sariyildiz et al., ICLR 2023, Eq. 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastrex_kernels import CosineHead

from ..settings import setting
from .base import Objective, hit_metrics


@dataclass(frozen=True)
class CosineSoftmaxOptions:
    """Section ``[objective]`` with ``name = "cosine_softmax"``."""

    temperature: float = setting(0.1, "temperature of the cosine logits", low=1e-4)


class CosineSoftmax(Objective):
    """``cross_entropy(normalize(features) @ normalize(weight).T / temperature, target)``, no bias.

    The weight [C, D] is initialised as torch's ``nn.Linear`` is: uniform in +-1/sqrt(D).
    """

    name: ClassVar[str] = "cosine_softmax"
    needs_ema: ClassVar[bool] = False
    Options: ClassVar[type[Any]] = CosineSoftmaxOptions

    def __init__(self, in_features: int, num_classes: int, options: CosineSoftmaxOptions, *, seed: int) -> None:
        super().__init__(in_features, num_classes, options, seed=seed)
        self.head = CosineHead(in_features, num_classes, temperature=options.temperature, reduction="none")
        self.head.reset_parameters(torch.Generator().manual_seed(seed))

    def forward(self, features: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, stats = self.head(features, target, return_stats=True)
        return loss, hit_metrics(stats.rank)

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        logits: Tensor = self.head.logits(features)
        return logits
