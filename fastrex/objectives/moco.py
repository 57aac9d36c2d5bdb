"""Momentum contrast without labels (MoCo v2, He et al. 2020, Chen et al. 2020), and with synthetic hard negatives
(MoCHi, Kalantidis et al., NeurIPS 2020): what supervised objectives are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fastrex_kernels import Mixtures, contrastive_cross_entropy, nearest_keys

from ..errors import FastrexError, UsageError
from ..settings import setting
from .base import Context, Objective
from .hard_negatives import ABSENT, mixtures
from .queue import IGNORED, Queue
from .supcon import momentum_of, positive_metrics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Instance of the keys of the batch, which no query leaves out; id of the entries of the queue, which no query has.
_NO_IMAGE, _NEGATIVE = -2, -1


@dataclass(frozen=True)
class MocoOptions:
    """Section ``[objective]`` with ``name = "moco"``."""

    temperature: float = setting(0.2, "temperature of the cosine logits", low=1e-4)
    queue_size: int = setting(65536, "entries of the queue of momentum features, the negatives", low=1)


class Moco(Objective):
    """InfoNCE: every crop but the first global one against its own image's momentum feature of that one, the only
    positive, and a queue of negatives. Class ids play no part.

    Old entries of the query's own image are left out of its negatives: MoCo keeps them, which does little where the
    queue is a twentieth of the data, and makes an image its own negative where it is as long (this project's own
    choice). Batch norms are made over all ranks instead of MoCo's shuffling of the images over them.

    ``top1`` is the share of the queries to which their positive is nearer than every negative of the queue; a query
    without any, as in the first step, is no hit.
    """

    name: ClassVar[str] = "moco"
    Options: ClassVar[type[Any]] = MocoOptions
    needs_labels = False
    needs_ema = True
    keys_first = True
    separate_view = True
    feeds = "momentum"

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        options: Any,
        *,
        seed: int,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, options, seed=seed, group=group)
        self.queue = Queue(options.queue_size, in_features, self.name)

    def forward(
        self, features: Tensor, target: Tensor, context: Context | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        momentum = momentum_of(self.name, context)
        assert context is not None
        # By place in the batch, not by image: a repeated image has a key for each of its views, and the same for any
        # number of ranks. Keys of the batch exist for their own queries only.
        ids = torch.arange(len(momentum), device=features.device)
        queue_ids = torch.where(self.queue.labels == IGNORED, IGNORED, _NEGATIVE)
        loss, stats = contrastive_cross_entropy(
            features,
            torch.cat([momentum, self.queue.features]),
            ids,
            torch.cat([ids, queue_ids]),
            instance=context.images,
            key_instance=torch.cat([torch.full_like(ids, _NO_IMAGE), self.queue.images]),
            private=len(ids),
            temperature=self.options.temperature,
            mixtures=self.mixtures(features.detach(), context.images, queue_ids),
            reduction="none",
            return_stats=True,
        )
        return loss, {"top1": positive_metrics(stats)["top1"], "filled": self.queue.filled()}

    def mixtures(self, features: Tensor, images: Tensor, queue_ids: Tensor) -> Mixtures | None:
        """Further negatives of each query; indices are those of the batch's keys and the queue, one after the other."""
        return None

    def update_(
        self, features: Tensor, target: Tensor, *, keep: Tensor | None = None, images: Tensor | None = None
    ) -> None:
        # Class 0 stands for a slot that is filled: the labels may be missing.
        self.queue.write_(features, torch.zeros_like(target), images, keep)

    def check(self, state: Mapping[str, Tensor]) -> None:
        self.queue.check(state, "queue.", 1)


@dataclass(frozen=True)
class MochiOptions(MocoOptions):
    """Section ``[objective]`` with ``name = "mochi"``: MoCHi(hardest, synthetic, harder), by default that of the best
    released model, MoCHi(512, 1024, 512)."""

    hardest: int = setting(512, "N: negatives nearest to a query, of which its synthetic ones are mixed", low=1)
    synthetic: int = setting(1024, "s: mixtures of two of them, per query", low=0)
    harder: int = setting(512, "s': mixtures of one of them with the query itself, per query", low=0)
    mix_after: int = setting(0, "optimiser steps before the first mixing", low=0)

    def __post_init__(self) -> None:
        if self.hardest > self.queue_size:
            raise UsageError(
                f"config: objective.hardest must be at most objective.queue_size={self.queue_size}, got {self.hardest};"
                f" set objective.queue_size={self.hardest} or more"
            )


class Mochi(Moco):
    """MoCo with synthetic negatives, mixed for each query from its own N hardest of the queue::

        s:   normalise(a n_i + (1 - a) n_j)    a ~ U(0, 1)
        s':  normalise(b q + (1 - b) n_j)      b ~ U(0, 0.5): the query weighs less than the negative

    They carry no gradient, and only enter the denominator. i, j, a and b are a function of the run's seed, the
    optimiser step, the image and the crop: the same for any number of ranks and after a resume. Where the queue has
    fewer than N entries, draws that meet none give no mixture; before ``mix_after`` steps none do.

    The mixtures count as negatives in ``top1`` too, so it is no measure to compare with MoCo's.
    """

    name: ClassVar[str] = "mochi"
    Options: ClassVar[type[Any]] = MochiOptions
    steps: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        options: MochiOptions,
        *,
        seed: int,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, options, seed=seed, group=group)
        self.seed = seed
        # Optimiser steps done; in a buffer, so that a recorded step counts and a resumed run goes on.
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))

    @torch.no_grad()
    def mixtures(self, features: Tensor, images: Tensor, queue_ids: Tensor) -> Mixtures | None:
        options, batch = self.options, len(images)
        if not options.synthetic + options.harder:
            return None
        anyone = torch.arange(batch, device=features.device)
        _, nearest = nearest_keys(
            features, self.queue.features, options.hardest, anyone, queue_ids, instance=images,
            key_instance=self.queue.images,
        )  # fmt: skip
        crops = torch.arange(len(features), device=features.device) // batch
        every = images.repeat(len(features) // batch)
        found = mixtures(
            nearest, every, crops, self.steps, synthetic=options.synthetic, harder=options.harder, seed=self.seed,
            offset=batch,
        )  # fmt: skip
        # Searched and drawn before as well: a recorded step has no branch on a value of the device.
        return found._replace(first=torch.where(self.steps >= options.mix_after, found.first, ABSENT))

    def update_(
        self, features: Tensor, target: Tensor, *, keep: Tensor | None = None, images: Tensor | None = None
    ) -> None:
        super().update_(features, target, keep=keep, images=images)
        self.steps += 1 if keep is None else keep.long()

    def check(self, state: Mapping[str, Tensor]) -> None:
        super().check(state)
        if (steps := int(state["steps"])) < 0:
            raise FastrexError(
                f"resume: bank tensor 'steps' must be at least 0, got {steps}; the checkpoint belongs to another "
                "configuration"
            )

    def notices(self, class_counts: Any) -> list[str]:
        options = self.options
        return [
            f"MoCHi({options.hardest}, {options.synthetic}, {options.harder}): synthetic negatives are mixed after "
            f"{options.mix_after} steps"
        ]
