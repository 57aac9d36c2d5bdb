"""Leave-one-out k nearest neighbours as a loss (LOOK, Feng et al., ICLR 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fastrex_kernels import contrastive_cross_entropy, nearest_keys

from ..errors import UsageError
from ..settings import setting
from .base import Context, Objective
from .class_means import expected_empty_share
from .queue import Queue
from .supcon import check_classes, positive_metrics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class LookOptions:
    """Section ``[objective]`` with ``name = "look"``. No code of the authors is public: the values are this project's
    choice, after what is remembered of the paper and unchecked (temperature 0.07 to 0.1, neighbours in the hundreds, a
    queue of 65536)."""

    temperature: float = setting(0.1, "temperature of the cosine logits and of the neighbours' votes", low=1e-4)
    neighbours: int = setting(256, "k: nearest entries of the queue that count", low=1)
    queue_size: int = setting(65536, "entries of the queue of momentum features", low=1)

    def __post_init__(self) -> None:
        if self.neighbours > self.queue_size:
            raise UsageError(
                f"config: objective.neighbours must be at most objective.queue_size={self.queue_size}, got "
                f"{self.neighbours}; set objective.queue_size={self.neighbours} or more"
            )


class Look(Objective):
    """``-log (sum of e^{s_nj} over those of the k nearest that share the label / sum over the k nearest)``: this
    project's reading, from memory, of leave-one-out k nearest neighbours as a loss.

    The neighbours come from a queue of momentum features, by cosine, and never show the query's own image: that would
    be the nearest by itself. A class may have several modes: only near images must agree. Until the queue holds k
    entries, those that it has count. A row without a neighbour of its class has the loss 0.
    """

    name: ClassVar[str] = "look"
    Options: ClassVar[type[Any]] = LookOptions
    needs_ema = True
    feeds = "momentum"

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        options: LookOptions,
        *,
        seed: int,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, options, seed=seed, group=group)
        check_classes(self.name, num_classes)
        self.queue = Queue(options.queue_size, in_features, self.name)

    def forward(
        self, features: Tensor, target: Tensor, context: Context | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if context is None:
            raise ValueError("look: forward must get a context with the images, got none")
        loss, stats = contrastive_cross_entropy(
            features, self.queue.features, target, self.queue.labels, instance=context.images,
            key_instance=self.queue.images, temperature=self.options.temperature, positives="sum",
            nearest=self.options.neighbours, reduction="none", return_stats=True,
        )  # fmt: skip
        # Neighbours that are all of the query's class are what is aimed at: that there is no negative is a hit.
        top1 = stats.hit.float().mean()
        return loss, {**positive_metrics(stats), "top1": top1, "filled": self.queue.filled()}

    def update_(
        self, features: Tensor, target: Tensor, *, keep: Tensor | None = None, images: Tensor | None = None
    ) -> None:
        self.queue.write_(features, target, images, keep)

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        """Votes [B, C] of the k nearest entries: each for its class, with e^{(cosine - largest cosine) / temperature};
        all 0 while the queue is empty."""
        anyone = torch.zeros(len(features), dtype=torch.int64, device=features.device)
        cosine, index = nearest_keys(
            features, self.queue.features, self.options.neighbours, anyone, self.queue.labels
        )  # fmt: skip
        there = index >= 0
        weight = torch.where(there, ((cosine - cosine[:, :1]) / self.options.temperature).exp(), 0.0)
        classes = torch.where(there, self.queue.labels[index], 0)
        votes = torch.zeros(len(features), self.num_classes, dtype=weight.dtype, device=features.device)
        for place in range(index.shape[1]):
            # One vote of each query at a time: on CUDA, sums of several at one address have no order.
            votes.scatter_add_(1, classes[:, place, None], weight[:, place, None])
        return votes

    def check(self, state: Mapping[str, Tensor]) -> None:
        self.queue.check(state, "queue.", self.num_classes)

    def notices(self, class_counts: Any) -> list[str]:
        share = expected_empty_share(np.asarray(class_counts), self.options.queue_size)
        line = (
            f"queue of {self.options.queue_size} features for {self.num_classes} classes: {share:.1%} of the classes "
            "are expected to be missing from it at any time"
        )
        if share > 0.01:
            line += (
                "; their images learn nothing meanwhile. Set objective.queue_size="
                f"{int(np.ceil(4.61 * self.num_classes))} or more"
            )
        return [line]
