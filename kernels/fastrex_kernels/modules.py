"""The loss as modules: a cosine classifier and the stateless loss. Prototypes from a memory bank, which this file
passes on, are in ``bank.py``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import _sharded
from ._margin import check_margin, margin_cross_entropy
from ._options import check_options, check_sizes
from .bank import OnlineClassMeans
from .cosine_ce import Stats, cosine_cross_entropy

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["CosineCrossEntropyLoss", "CosineHead", "OnlineClassMeans"]

# Weights are drawn in pieces of this many classes, so that the same seed gives the same classes to any number of ranks.
_DRAWN_AT_ONCE = 65536


class CosineCrossEntropyLoss(nn.Module):
    """:func:`cosine_cross_entropy` with its options, for weights that live elsewhere.

    Args:
        temperature: a float above 0, or a 0-d ``nn.Parameter`` to learn it.
        class_weight: per-class factor [C], kept as a buffer.
        ignore_index: rows with this id have loss 0 and no gradient.
        label_smoothing: share of the target spread over all classes, in [0, 1].
        reduction: "none", "mean" or "sum".
    """

    class_weight: Tensor | None

    def __init__(
        self,
        temperature: float | nn.Parameter = 0.1,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if isinstance(temperature, Tensor) and (temperature.ndim or not isinstance(temperature, nn.Parameter)):
            fact = f"a {type(temperature).__name__} {tuple(temperature.shape)}"
            raise TypeError(f"CosineCrossEntropyLoss: temperature must be a float or a 0-d nn.Parameter, got {fact}")
        fixed = 1.0 if isinstance(temperature, Tensor) else temperature
        check_options("CosineCrossEntropyLoss", fixed, label_smoothing, reduction)
        self.temperature = temperature
        self.register_buffer("class_weight", class_weight)
        self.ignore_index, self.label_smoothing, self.reduction = ignore_index, label_smoothing, reduction

    def forward(
        self, input: Tensor, weight: Tensor, target: Tensor, *, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, Stats]:
        """Loss of features [N, D] against class weights [C, D]; see :func:`cosine_cross_entropy`."""
        return cosine_cross_entropy(
            input, weight, target, temperature=self.temperature, class_weight=self.class_weight,
            ignore_index=self.ignore_index, label_smoothing=self.label_smoothing, reduction=self.reduction,
            return_stats=return_stats,
        )  # fmt: skip

    def extra_repr(self) -> str:
        temperature = "learnt" if isinstance(self.temperature, Tensor) else self.temperature
        words = f"temperature={temperature}, ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}"
        return f"{words}, reduction={self.reduction!r}"


class CosineHead(nn.Module):
    """Cosine classifier and its softmax loss: logits ``normalize(x) @ normalize(weight).T / temperature``, no bias.

    ``weight`` [C, D] is initialised as that of ``nn.Linear``, uniform in +-1/sqrt(D). Its dtype is never touched: under
    autocast the products run in autocast's dtype, the loss is float32.

    Args:
        in_features: D. num_classes: C.
        temperature: of the logits, above 0; the initial one where it is learnt.
        learnable_temperature: learn its logarithm, the parameter ``log_temperature``, so that it stays above 0. Keep
            weight decay away from it (decay draws the temperature towards 1).
        label_smoothing: share of the target spread over all classes, in [0, 1].
        ignore_index: rows with this id have loss 0 and no gradient.
        reduction: "none", "mean" (over the rows that are not ignored) or "sum".
        margin: of the target's logit in the loss, 0 for none. It goes with class ids alone and a fixed temperature,
            without label smoothing and process group.
        margin_kind: "cosface", ``(cos - margin) / temperature`` with margin in [0, 2) (Wang et al., CVPR 2018), or
            "arcface", ``cos(angle + margin) / temperature`` with margin in [0, pi) (Deng et al., CVPR 2019); beyond an
            angle of pi - margin it is ``cos - margin sin(margin)``, which goes on falling.
        generator: that the weights are drawn from, see :meth:`reset_parameters`.
        process_group: split the classes over its ranks: rank r holds ``weight`` of the classes ``first_class`` to
            ``first_class + len(weight)``, contiguous blocks whose sizes differ by one at most; C >= ranks. None, or a
            group of one rank, holds all classes here.
        device, dtype: of the weight.

    With a group of several ranks the loss is the exact softmax over all C classes. Every rank calls ``forward`` (and
    ``backward``) with its own, equally many, rows and gets their loss. Gradients are those of the mean of the ranks'
    losses, the convention of ``DistributedDataParallel``: a rank's ``x.grad`` is its own loss's gradient, which DDP
    averages as usual; ``weight.grad`` and ``log_temperature.grad`` are already averaged and final. So keep the head
    outside of DDP, or have DDP ignore ``weight``: it would average the blocks of different classes. ``state_dict`` has
    a rank's own block; :meth:`full_weight` and :meth:`load_full_weight` go between numbers of ranks.

    Raises:
        ValueError, TypeError: naming the argument and the fact.
    """

    log_temperature: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        temperature: float = 0.1,
        learnable_temperature: bool = False,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        margin: float = 0.0,
        margin_kind: str = "cosface",
        generator: torch.Generator | None = None,
        process_group: ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes("CosineHead", in_features=in_features, num_classes=num_classes)
        check_options("CosineHead", temperature, label_smoothing, reduction)
        ranks = 1 if process_group is None else dist.get_world_size(process_group)
        without = {"label_smoothing": label_smoothing > 0, "learnable_temperature": learnable_temperature}
        check_margin("CosineHead", margin, margin_kind, **without, process_group=ranks > 1)
        self.margin, self.margin_kind = margin, margin_kind
        if num_classes < ranks:
            wanted = f"at least the {ranks} ranks of process_group"
            raise ValueError(f"CosineHead: num_classes must be {wanted}, got {num_classes}")
        self.in_features, self.num_classes = in_features, num_classes
        self.label_smoothing, self.ignore_index, self.reduction = label_smoothing, ignore_index, reduction
        self._temperature = temperature
        self._shared = _sharded.Handle(process_group if ranks > 1 else None)
        rank = 0 if self._shared.group is None else dist.get_rank(self._shared.group)
        self.first_class, count = _sharded.split(num_classes, rank, ranks)
        self.weight = nn.Parameter(torch.empty(count, in_features, device=device, dtype=dtype))
        if learnable_temperature:
            # A logarithm in 16 bits would move in steps of a percent.
            wide = torch.promote_types(self.weight.dtype, torch.float32)
            self.log_temperature = nn.Parameter(torch.empty((), device=device, dtype=wide))
        else:
            self.register_parameter("log_temperature", None)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights anew and set the initial temperature.

        From generators in the same state, any number of ranks draws the same classes, each keeping its own.
        """
        if self.log_temperature is not None:
            self.log_temperature.fill_(math.log(self._temperature))
        if self.weight.is_meta:
            return
        bound, count = 1 / math.sqrt(self.in_features), self.weight.shape[0]
        for start in range(0, self.num_classes, _DRAWN_AT_ONCE):
            stop = min(start + _DRAWN_AT_ONCE, self.num_classes)
            drawn = self.weight.new_empty(stop - start, self.in_features).uniform_(-bound, bound, generator=generator)
            first, last = max(start, self.first_class), min(stop, self.first_class + count)
            if first < last:
                self.weight[first - self.first_class : last - self.first_class] = drawn[first - start : last - start]

    @property
    def process_group(self) -> ProcessGroup | None:
        """The group over whose ranks the classes are split; None where all of them are here."""
        return self._shared.group

    @property
    def temperature(self) -> float | Tensor:
        """The temperature of the logits: a float, or a 0-d tensor with gradient where it is learnt."""
        return self._temperature if self.log_temperature is None else self.log_temperature.exp()

    def forward(self, input: Tensor, target: Tensor, *, return_stats: bool = False) -> Tensor | tuple[Tensor, Stats]:
        """Softmax cross-entropy of the cosine logits.

        Args:
            input: features [N, D]. With a process group: this rank's own rows, equally many on every rank (checked on a
                CPU, and anywhere with FASTREX_CHECK=1, because it costs a sync).
            target: class ids int64 [N], or [B] with N a multiple of B (row n uses ``target[n % B]``); without a process
                group also probabilities [N, C] or [B, C].
            return_stats: also return :class:`Stats`, whose ``rank`` gives top-k accuracies without logits. They know no
                margin, like :meth:`logits`; with one they cost another pass over all classes.

        Returns:
            The loss in float32 (float64 for float64 features), or ``(loss, Stats)``.
        """
        self._check_input(input)
        words: dict[str, Any] = {"temperature": self.temperature, "ignore_index": self.ignore_index}
        words |= {"reduction": self.reduction, "return_stats": return_stats}
        if self.margin:
            words |= {"margin": self.margin, "margin_kind": self.margin_kind}
            return margin_cross_entropy(input, self.weight, target, **words)
        words["label_smoothing"] = self.label_smoothing
        if self._shared.group is None:
            return cosine_cross_entropy(input, self.weight, target, **words)
        loss, lse, rank = _sharded.sharded_cosine_cross_entropy(input, self.weight, target, self._block(), **words)
        return loss if rank is None else (loss, Stats(lse, rank))

    def logits(self, input: Tensor) -> Tensor:
        """Cosine logits [N, C] of features [N, D], float32 (float64 for float64 features).

        With a process group every rank calls with equally many rows of its own; no gradient flows there.
        """
        self._check_input(input)
        if self._shared.group is not None:
            return _sharded.sharded_logits(input, self.weight, self._block(), self.temperature)
        return _sharded.cosine_logits(input, self.weight, self.temperature)

    @torch.no_grad()
    def classifier(self) -> Callable[[Tensor], Tensor]:
        """:meth:`logits` of the classes as they stand now, normalised once, for this rank alone to call.

        Their [C, D] stay here as long as what is returned does. A collective where the classes are split.
        """
        weight = _sharded.unit_weight(self.full_weight())
        # Learnt or not: as it stands now.
        temperature = float(self.temperature)

        def logits(input: Tensor) -> Tensor:
            self._check_input(input)
            return _sharded.unit_logits(input, weight, temperature)

        return logits

    def full_weight(self) -> Tensor:
        """The weights of all classes [C, D], on every rank; a collective where they are split."""
        return self.join(self.weight)

    @torch.no_grad()
    def load_full_weight(self, weight: Tensor) -> None:
        """Take this rank's classes from the weights of all of them [C, D], saved by any number of ranks."""
        if weight.shape != (self.num_classes, self.in_features):
            wanted = [self.num_classes, self.in_features]
            raise ValueError(f"CosineHead.load_full_weight: weight must be {wanted}, got {list(weight.shape)}")
        self.weight.copy_(self.own(weight))

    @torch.no_grad()
    def join(self, rows: Tensor, device: torch.device | str | None = None) -> Tensor:
        """What every rank has per class of its own (``weight``, its momentum) for all classes [C, ...], on every rank.

        A collective where the classes are split: block after block, so that ``device`` (default: that of ``rows``) may
        be one with room for all classes, the CPU, while the ranks' own device has room for two blocks.

        Raises:
            ValueError: ``rows`` has another number of rows than ``weight``.
        """
        self._check_rows("join", rows, self.weight.shape[0])
        if self._shared.group is None:
            return rows.detach().to(device or rows.device, copy=True)
        return _sharded.join_blocks(rows.detach(), self._block(), device)

    def own(self, full: Tensor) -> Tensor:
        """This rank's rows (a view) of what :meth:`join` gives.

        Raises:
            ValueError: ``full`` does not have a row per class.
        """
        self._check_rows("own", full, self.num_classes)
        return full[self.first_class : self.first_class + self.weight.shape[0]]

    def extra_repr(self) -> str:
        learnt = "" if self.log_temperature is None else " (learnt)"
        last = self.first_class + self.weight.shape[0]
        block = "" if self._shared.group is None else f", classes {self.first_class} to {last - 1} here"
        sizes = (
            f"in_features={self.in_features}, num_classes={self.num_classes}, temperature={self._temperature}{learnt}"
        )
        words = f"label_smoothing={self.label_smoothing}, ignore_index={self.ignore_index}"
        margin = f", margin={self.margin} ({self.margin_kind})" if self.margin else ""
        return f"{sizes}, {words}{margin}, reduction={self.reduction!r}{block}"

    def _block(self) -> _sharded.Block:
        assert self._shared.group is not None
        return _sharded.Block(self._shared.group, self.first_class, self.num_classes)

    def _check_rows(self, method: str, rows: Tensor, wanted: int) -> None:
        if rows.ndim == 0 or rows.shape[0] != wanted:
            word = "rows" if method == "join" else "full"
            raise ValueError(f"CosineHead.{method}: {word} must be [{wanted}, ...], got {list(rows.shape)}")

    def _check_input(self, input: Tensor) -> None:
        if input.ndim != 2 or input.shape[1] != self.in_features:
            raise ValueError(f"CosineHead: input must be [N, {self.in_features}], got {list(input.shape)}")
