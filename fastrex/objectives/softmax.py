"""Plain softmax cross-entropy with learnt class weights: what the cosine objectives are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..settings import setting
from .base import Context, Objective, hit_metrics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class SoftmaxOptions:
    """Section ``[objective]`` with ``name = "softmax"``."""

    label_smoothing: float = setting(0.0, "share of the target spread over all classes", low=0.0, high=1.0)
    loss: str = setting(
        "softmax",
        "softmax = cross-entropy; binary = a cross-entropy of its own for each class, summed over them",
        choices=("softmax", "binary"),
    )
    binary_targets: str = setting(
        "present",
        "what loss=binary aims at for the classes of a mixed image: present = 1 for each; share = the share of each",
        choices=("present", "share"),
    )


class Softmax(Objective):
    """``cross_entropy(features @ weight.T + bias, target)``: nothing is normalised, there is no temperature.

    Weight [C, D] and bias [C] start as those of torch's ``nn.Linear``: uniform in +-1/sqrt(D).

    With ``loss = binary`` the classes are told apart one by one (the loss of RSB-A1, Wightman et al. 2021): the sum
    over the classes of the binary cross-entropy with logits. That it is a sum, and that ``label_smoothing`` s makes the
    targets ``(1 - s) y + s / C``, are this project's choices; a mean would be C times smaller.
    """

    name: ClassVar[str] = "softmax"
    soft_targets: bool = True
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

    def forward(
        self, features: Tensor, target: Tensor, context: Context | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Of class ids int64 [B] or probabilities [B, C]; top-1 and top-5 are then those of the most probable class."""
        options: SoftmaxOptions = self.options
        logits: Tensor = self.linear(features)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        crops = len(features) // len(target)  # rows are crop-major
        targets = target.to(logits.dtype).repeat(crops, 1) if target.is_floating_point() else target.repeat(crops)
        if options.loss == "binary":
            loss = F.binary_cross_entropy_with_logits(
                logits, self._binary(targets).to(logits.dtype), reduction="none"
            ).sum(1)
        else:
            loss = F.cross_entropy(logits, targets, reduction="none", label_smoothing=options.label_smoothing)
        with torch.no_grad():
            chosen = targets.argmax(1) if targets.is_floating_point() else targets
            rank = (logits > logits.gather(1, chosen[:, None])).sum(1)
        return loss, hit_metrics(rank)

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        logits: Tensor = self.linear(features)
        return logits

    def class_vectors(self) -> Tensor:
        return self.linear.weight

    def _binary(self, targets: Tensor) -> Tensor:
        """Targets of the binary cross-entropies, [N, C]."""
        options: SoftmaxOptions = self.options
        if not targets.is_floating_point():
            wanted = targets[:, None] == torch.arange(self.num_classes, device=targets.device)
        else:
            wanted = targets > 0 if options.binary_targets == "present" else targets
        smoothing = options.label_smoothing
        return wanted * (1 - smoothing) + smoothing / self.num_classes
