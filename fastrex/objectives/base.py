"""The interface that the training loop calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Numbers in the class vectors up to which their change is logged: beyond, reading them all would show in a step.
CHANGE_UP_TO = 2**24


class Context(NamedTuple):
    """What a step knows beside the model's features, of this rank's micro-batch of B images.

    Attributes:
        images: int64 [B], which image each place shows: a row of the index. Views of one image share it.
        momentum: [B, D], the momentum encoder's projected features of the first global crop, without gradient; None
            unless the objective has ``keys_first``.
    """

    images: Tensor
    momentum: Tensor | None = None


class Objective(nn.Module, ABC):
    """A loss over projected features, with all its state in parameters and buffers.

    The loop calls :meth:`forward`, then :meth:`update_` with features of the same step, so that a batch never meets its
    own entries in the bank.

    Attributes:
        needs_ema: there is a momentum encoder.
        keys_first: :meth:`forward` wants its features (``Context.momentum``); else it works beside the model.
        separate_view: the first global crop is the momentum encoder's alone, and the model gets the others: where
            features of both meet in the loss, those of one and the same crop would agree by themselves.
        feeds: what :meth:`update_` takes: "momentum" features, the model's own of the first global crop ("online"), or
            nothing ("").
        needs_labels: it learns from the class ids, of which there must be two or more. Of the class alone: the data are
            opened before there is an instance.
        pairs_in_batch: which crops meet depends on the batch, so on its micro-batches too.
        soft_targets: :meth:`forward` takes shares of the classes as well (mixup, CutMix).
        split: names of the parameters of which a rank holds and trains its own rows only. Their gradients come out of
            the backward as the averages over the ranks that all other gradients still have to become.
        class_ranks: over how many ranks the rows of :meth:`class_vectors` are split; 1 where each has them all.
    """

    name: ClassVar[str]
    Options: ClassVar[type[Any]]
    needs_labels: ClassVar[bool] = True
    pairs_in_batch: ClassVar[bool] = False
    # Of the class; an objective whose options decide sets them for itself, before anything asks.
    needs_ema: bool = False
    keys_first: bool = False
    separate_view: bool = False
    feeds: str = ""
    soft_targets: bool = False
    split: frozenset[str]
    class_ranks: int

    def __init__(
        self, in_features: int, num_classes: int, options: Any, *, seed: int, group: ProcessGroup | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.num_classes, self.options = in_features, num_classes, options
        self.group = group
        self.split, self.class_ranks = frozenset(), 1

    @abstractmethod
    def forward(
        self, features: Tensor, target: Tensor, context: Context | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Per-row loss [N] float32 and 0-d device tensors to log.

        Args:
            features: [N, D], N a multiple of B: crop after crop (row k B + b).
            target: class ids int64 [B], or with ``soft_targets`` shares of the classes [B, C].
            context: what else is known of these images.
        """

    def update_(
        self, features: Tensor, target: Tensor, *, keep: Tensor | None = None, images: Tensor | None = None
    ) -> None:
        """Take what ``feeds`` names, features [B, D] without gradient, with class ids int64 [B] and ``images`` int64
        [B], of the whole global batch; nothing changes where ``keep`` (0-d bool) is False."""

    def predict(self, features: Tensor) -> Tensor | None:
        """Class scores [B, C] of projected features [B, D], or None when the objective has no classifier."""
        return None

    def class_vectors(self) -> Tensor | None:
        """The vectors that features are compared with, one row per class [C, D] of any length (this rank's rows where
        they are split), as they stand; None for an objective without any."""
        return None

    @torch.no_grad()
    def class_directions(self) -> Tensor | None:
        """:meth:`class_vectors` divided by their l2 norms, float32 or better, as a copy (a zero vector stays zero);
        None without any, or where they have more than ``CHANGE_UP_TO`` numbers in all."""
        if self.num_classes * self.in_features > CHANGE_UP_TO or (vectors := self.class_vectors()) is None:
            return None
        return F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=1, eps=1e-12)

    @torch.no_grad()
    def class_change(self, before: Tensor | None) -> dict[str, Tensor]:
        """``class_change``: how far the class vectors have moved on the unit sphere since ``before``, an earlier answer
        of :meth:`class_directions`: 1/C sum_c ||w_c - before_c||_2, 0-d; nothing where that was None.

        t-ReX shows that prototypes move more per step than learnt weights; the norm is this project's reading. Of rows
        that are split over ranks a rank gives their part times the number of ranks: the mean over ranks, which is
        logged, is that of all classes.
        """
        after = None if before is None else self.class_directions()
        if before is None or after is None:
            return {}
        moved = torch.linalg.vector_norm(after - before, dim=1).sum()
        return {"class_change": moved * (self.class_ranks / self.num_classes)}

    def classifier(self) -> Callable[[Tensor], Tensor | None]:
        """:meth:`predict` as the state stands now, for one rank to call as often as it likes; to be asked for by all
        ranks together."""
        return self.predict

    def join(self, rows: Tensor) -> Tensor:
        """What all ranks have of a tensor like those named in ``split``: all rows, on the host of every rank. To be
        called by all ranks together."""
        return rows

    def joined_shape(self, rows: Tensor) -> torch.Size:
        """The shape of what :meth:`join` gives, which this rank knows by itself."""
        return rows.shape

    def own(self, full: Tensor) -> Tensor:
        """This rank's rows of what :meth:`join` gave to any number of ranks.

        Raises:
            FastrexError: it has another number of rows.
        """
        return full

    def check(self, state: Mapping[str, Tensor]) -> None:
        """Refuse a stored ``state_dict``, whose names, shapes and dtypes are right, for its values.

        Raises:
            FastrexError: names the tensor and the value.
        """
        return

    def notices(self, class_counts: Any) -> list[str]:
        """Lines for the log at the start, from the number of training images per class."""
        return []

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_classes={self.num_classes}, options={self.options}"


def hit_metrics(rank: Tensor) -> dict[str, Tensor]:
    """Top-1 and top-5 shares from the ranks [N] of the targets."""
    return {"top1": (rank == 0).float().mean(), "top5": ((rank >= 0) & (rank < 5)).float().mean()}
