"""Cosine softmax with learnt class weights (t-ReX, Sariyildiz et al., ICLR 2023, Eq. 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrex_kernels import cosine_cross_entropy

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
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(in_features)
        self.weight = nn.Parameter((torch.rand(num_classes, in_features, generator=generator) * 2 - 1) * bound)

    def forward(self, features: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, stats = cosine_cross_entropy(
            features, self.weight, target, temperature=self.options.temperature, reduction="none", return_stats=True
        )
        return loss, hit_metrics(stats.rank)

    def predict(self, features: Tensor) -> Tensor:
        return F.normalize(features.float(), dim=1) @ F.normalize(self.weight.detach().float(), dim=1).T
