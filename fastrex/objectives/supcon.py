"""Supervised contrastive learning (SupCon, Khosla et al., NeurIPS 2020), against a batch or a momentum queue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fastrex_kernels import ContrastiveStats, contrastive_cross_entropy

from ..errors import FastrexError
from ..settings import setting
from .base import Context, Objective
from .gathering import all_crops, all_rows
from .queue import Queue

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class SupConOptions:
    """Section ``[objective]`` with ``name = "supcon"``."""

    temperature: float = setting(0.1, "temperature of the cosine logits", low=1e-4)
    base_temperature: float = setting(
        0.07, "the loss is multiplied by temperature / base_temperature, as SupCon's code does (0 = not)", low=0.0
    )
    positives: str = setting(
        "mean",
        "mean = mean of the positives' log-probabilities (L_out), sum = log of their summed probability",
        choices=("mean", "sum"),
    )
    queue_size: int = setting(
        0, "0 = keys are all crops of the batch; else momentum features of the batch and of a queue of this size", low=0
    )


class SupCon(Objective):
    """Every crop against keys of which those of its own class are the positives.

    Batch form: the keys are all crops of all images of all ranks, the query itself left out; queries and keys learn.
    Of a step in micro-batches each is a batch of its own.

    Queue form (``queue_size``): the keys are the momentum features of the batch, of all ranks, and those of a queue;
    they do not learn. The key of the query's own image is a positive. The first global crop is the momentum encoder's
    alone: with that very crop as a query, the positive pair would be two nearly equal networks' views of one tensor,
    which agree without any invariance being learnt.

    A row without a positive has the loss 0.
    """

    name: ClassVar[str] = "supcon"
    Options: ClassVar[type[Any]] = SupConOptions
    pairs_in_batch = True

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        options: SupConOptions,
        *,
        seed: int,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, options, seed=seed, group=group)
        check_classes(self.name, num_classes)
        self.factor = options.temperature / options.base_temperature if options.base_temperature else 1.0
        self.queue = Queue(options.queue_size, in_features, self.name) if options.queue_size else None
        if self.queue is not None:
            self.needs_ema = self.keys_first = self.separate_view = True
            self.feeds = "momentum"

    def forward(
        self, features: Tensor, target: Tensor, context: Context | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        words: dict[str, Any] = {
            "temperature": self.options.temperature, "positives": self.options.positives, "reduction": "none",
            "return_stats": True,
        }  # fmt: skip
        if self.queue is None:
            crops = all_crops(features, target, self.group)
            loss, stats = contrastive_cross_entropy(features, **crops._asdict(), **words)
            return loss * self.factor, positive_metrics(stats)
        momentum = momentum_of(self.name, context)
        keys = torch.cat([all_rows(momentum, self.group), self.queue.features])
        key_ids = torch.cat([all_rows(target, self.group), self.queue.labels])
        loss, stats = contrastive_cross_entropy(features, keys, target, key_ids, **words)
        return loss * self.factor, {**positive_metrics(stats), "filled": self.queue.filled()}

    def update_(
        self, features: Tensor, target: Tensor, *, keep: Tensor | None = None, images: Tensor | None = None
    ) -> None:
        if self.queue is not None:
            self.queue.write_(features, target, images, keep)

    def check(self, state: Mapping[str, Tensor]) -> None:
        if self.queue is not None:
            self.queue.check(state, "queue.", self.num_classes)


def check_classes(name: str, num_classes: int) -> None:
    """Refuse data without labels: all images in one class.

    Raises:
        FastrexError: fewer than two classes.
    """
    if num_classes < 2:
        raise FastrexError(
            f"train: objective.name={name} must have labels of at least two classes, got {num_classes}; give data.path "
            "a folder for each class, or set objective.name=moco, which needs no labels"
        )


def momentum_of(name: str, context: Context | None) -> Tensor:
    """The momentum features [B, D] of this rank's images.

    Raises:
        ValueError: there are none.
    """
    if context is None or context.momentum is None:
        raise ValueError(f"{name}: forward must get a context with momentum features, got none")
    return context.momentum


def positive_metrics(stats: ContrastiveStats) -> dict[str, Tensor]:
    """``top1``: share of the rows whose nearest key is a positive, with a negative that it could have been instead.
    ``without_positive``: share of those without any, whose loss is 0."""
    hit = stats.hit & (stats.negatives > 0)
    return {"top1": hit.float().mean(), "without_positive": (stats.positives == 0).float().mean()}
