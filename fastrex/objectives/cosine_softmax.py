"""Cosine softmax with learnt class weights (t-ReX, Sariyildiz et al., ICLR 2023, Eq. 1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastrex_kernels import CosineHead

from ..errors import FastrexError, UsageError
from ..settings import setting
from .base import Context, Objective, hit_metrics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class CosineSoftmaxOptions:
    """Section ``[objective]`` with ``name = "cosine_softmax"``."""

    temperature: float = setting(0.1, "temperature of the cosine logits", low=1e-4)
    sharded: bool = setting(
        False, "class weights split over the ranks (millions of classes): each rank holds and trains its block"
    )
    label_smoothing: float = setting(0.0, "share of the target spread over all classes", low=0.0, high=1.0)
    margin: float = setting(0.0, "margin of the target's logit in training (0 = none)", low=0.0)
    margin_kind: str = setting(
        "cosface",
        "cosface: cosine - margin, which is below 2; arcface: cosine of the angle + margin, which is below pi",
        choices=("cosface", "arcface"),
    )


class CosineSoftmax(Objective):
    """``cross_entropy(normalize(features) @ normalize(weight).T / temperature, target)``, no bias.

    The weight [C, D] is initialised as torch's ``nn.Linear`` is: uniform in +-1/sqrt(D). With ``sharded`` a rank holds
    the weights, gradients and momentum of C / ranks classes; the loss and its gradients are those of all C. A
    checkpoint joins them on every rank's host, an evaluation on every rank's device: 4 C D bytes (and as many for the
    momentum in a checkpoint).

    With a ``margin`` the target's cosine is made smaller in the loss alone: CosFace (Wang et al., CVPR 2018), ArcFace
    (Deng et al., CVPR 2019). Accuracies and evaluation know nothing of it.
    """

    name: ClassVar[str] = "cosine_softmax"
    Options: ClassVar[type[Any]] = CosineSoftmaxOptions

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        options: CosineSoftmaxOptions,
        *,
        seed: int,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, options, seed=seed, group=group)
        check_margin(options)
        self.soft_targets = not (options.margin or options.sharded)
        ranks = dist.get_world_size(group) if options.sharded and group is not None else 1
        if num_classes < ranks:
            raise FastrexError(
                f"train: objective.sharded=true must have at least one class for each of the {ranks} ranks, got "
                f"{num_classes} classes; set objective.sharded=false"
            )
        self.head = CosineHead(
            in_features,
            num_classes,
            temperature=options.temperature,
            reduction="none",
            label_smoothing=options.label_smoothing,
            margin=options.margin,
            margin_kind=options.margin_kind,
            generator=torch.Generator().manual_seed(seed),
            process_group=group if ranks > 1 else None,
        )
        if ranks > 1:
            self.split, self.class_ranks = frozenset({"head.weight"}), ranks

    def forward(
        self, features: Tensor, target: Tensor, context: Context | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, stats = self.head(features, target, return_stats=True)
        return loss, hit_metrics(stats.rank)

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        logits: Tensor = self.head.logits(features)
        return logits

    def class_vectors(self) -> Tensor:
        return self.head.weight

    def classifier(self) -> Callable[[Tensor], Tensor | None]:
        # All classes on every rank for once: ranks evaluate different numbers of images, so none can wait for another.
        return self.head.classifier()

    def join(self, rows: Tensor) -> Tensor:
        return self.head.join(rows, "cpu")

    def joined_shape(self, rows: Tensor) -> torch.Size:
        return torch.Size((self.num_classes, *rows.shape[1:]))

    def own(self, full: Tensor) -> Tensor:
        if full.ndim == 0 or len(full) != self.num_classes:
            raise FastrexError(
                f"resume: the class weights must be those of {self.num_classes} classes, got {list(full.shape)}; the "
                "checkpoint belongs to another configuration"
            )
        return self.head.own(full)

    def notices(self, class_counts: Any) -> list[str]:
        if not self.split:
            return []
        group = self.head.process_group
        assert group is not None
        fewest = self.num_classes // dist.get_world_size(group)
        line = f"class weights are split over {dist.get_world_size(group)} ranks: {fewest} classes each, or one more"
        size = self.head.weight.element_size() * self.num_classes * self.in_features / 2**20
        return [
            f"{line}; an evaluation holds all of them on every rank's device ({size:.1f} MiB), a checkpoint all of "
            f"them and their momentum on every rank's host ({2 * size:.1f} MiB)"
        ]


def check_margin(options: CosineSoftmaxOptions) -> None:
    """Refuse a margin that is out of range, or beside what it does not go with.

    Raises:
        UsageError: with the setting to change.
    """
    most = {"cosface": 2.0, "arcface": math.pi}[options.margin_kind]
    if options.margin >= most:
        raise UsageError(
            f"config: objective.margin must be below {most:.4g} for {options.margin_kind}, got {options.margin:g}; "
            "from memory, usual are 0.35 for cosface and 0.5 for arcface"
        )
    for word, given, off in (
        ("sharded", options.sharded, "false"),
        ("label_smoothing", options.label_smoothing > 0, "0"),
    ):
        if options.margin and given:
            raise UsageError(
                f"config: objective.margin must be 0 with objective.{word}, got {options.margin:g}; set "
                f"objective.{word}={off} or objective.margin=0"
            )
