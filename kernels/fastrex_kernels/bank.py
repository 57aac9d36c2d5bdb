"""Online Class Means as a module: prototypes from a memory bank, and the loss against them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import _sharded
from ._op import readable
from ._options import check_options, check_sizes
from .class_means import bank_update_, class_means
from .cosine_ce import Stats, cosine_cross_entropy

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class OnlineClassMeans(nn.Module):
    """Cosine softmax against prototypes averaged from a memory bank (t-ReX, Sariyildiz et al., ICLR 2023, Eq. 2).

    A prototype is the normalised sum of its class's entries in a ring of the newest ``bank_size`` momentum features,
    which are not normalised. The caller owns the momentum encoder::

        loss = means(encoder(images), target)      # against the prototypes as they stand
        means.update_(momentum_encoder(images).detach(), target)

    The bank starts with standard normal features and uniform labels, as the published method does, the same on every
    rank. A class without an entry has the zero prototype, hence logit 0. All state is in the buffers ``features``
    [M, D], ``labels`` [M] and ``pointer`` [1] and does not depend on the number of ranks.

    Args:
        in_features: D. num_classes: C. bank_size: M; with 4.6 C entries 1 % of balanced classes are empty.
        temperature: of the logits, above 0.
        label_smoothing: share of the target spread over all classes, in [0, 1].
        process_group: :meth:`update_` gathers the features of its ranks, so that every rank holds the same bank. Tell
            DDP not to send the buffers around (``broadcast_buffers=False``): they are equal already.
        reduction: "none", "mean" or "sum".
        seed: of the first entries.
        device, dtype: of the bank's features. A bank in 16 bits halves the memory.

    Raises:
        ValueError, TypeError: naming the argument and the fact.
    """

    features: Tensor
    labels: Tensor
    pointer: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bank_size: int = 8192,
        *,
        temperature: float = 0.1,
        label_smoothing: float = 0.0,
        process_group: ProcessGroup | None = None,
        reduction: str = "mean",
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes("OnlineClassMeans", in_features=in_features, num_classes=num_classes, bank_size=bank_size)
        check_options("OnlineClassMeans", temperature, label_smoothing, reduction)
        self.in_features, self.num_classes, self.bank_size = in_features, num_classes, bank_size
        self.temperature, self.label_smoothing = temperature, label_smoothing
        self.reduction, self.seed = reduction, seed
        ranks = 1 if process_group is None else dist.get_world_size(process_group)
        self._shared = _sharded.Handle(process_group if ranks > 1 else None)
        self._seen: Tensor | None = None
        self.register_buffer("features", torch.empty(bank_size, in_features, device=device, dtype=dtype))
        self.register_buffer("labels", torch.empty(bank_size, device=device, dtype=torch.int64))
        self.register_buffer("pointer", torch.empty(1, device=device, dtype=torch.int64))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill the bank with its first entries, drawn from ``seed``."""
        self._seen = None
        if self.features.is_meta:
            return
        # On the CPU: then the bank is the same on every device.
        words: dict[str, Any] = {"generator": torch.Generator().manual_seed(self.seed), "device": "cpu"}
        wide = torch.promote_types(self.features.dtype, torch.float32)
        self.features.copy_(torch.randn(self.features.shape, dtype=wide, **words))
        self.labels.copy_(torch.randint(self.num_classes, self.labels.shape, **words))
        self.pointer.zero_()

    def forward(self, input: Tensor, target: Tensor, *, return_stats: bool = False) -> Tensor | tuple[Tensor, Stats]:
        """Loss of features [N, D] against the prototypes as they stand; see :func:`cosine_cross_entropy`.

        Args:
            input: features [N, D].
            target: class ids int64 [N] or [B], or probabilities [N, C] or [B, C]; [B] with N a multiple of B is shared
                by the crops (row n uses ``target[n % B]``).
            return_stats: also return :class:`Stats`.
        """
        if input.ndim != 2 or input.shape[1] != self.in_features:
            raise ValueError(f"OnlineClassMeans: input must be [N, {self.in_features}], got {list(input.shape)}")
        return cosine_cross_entropy(
            input, self.prototypes(), target, temperature=self.temperature, label_smoothing=self.label_smoothing,
            reduction=self.reduction, return_stats=return_stats,
        )  # fmt: skip

    @torch.no_grad()
    def update_(self, features: Tensor, labels: Tensor, keep: Tensor | None = None) -> None:
        """Write momentum features into the ring, in place, without a host sync.

        Args:
            features: [B, D] without gradient, un-normalised; with a process group this rank's rows, equally many on
                every rank. All ranks' rows enter in the order of the ranks.
            labels: int64 [B].
            keep: 0-d bool tensor, equal on all ranks; where it is False nothing changes (a batch gone bad). Without it
                a batch with NaN or inf in it, on whatever rank, is left out on a GPU and raises on a CPU: in the bank
                it would spoil its classes until the ring has come round.
        """
        name = "OnlineClassMeans.update_"
        if features.requires_grad:
            raise ValueError(
                f"{name}: features must not require a gradient, got a tensor that does; detach the momentum encoder's"
            )
        group = self._shared.group
        if group is not None:
            _sharded.check_equal_rows(name, features, group)
            features, labels = _sharded.gather_rows(features, group), _sharded.gather_rows(labels, group)
        if labels.numel() and readable(labels):  # of all ranks: then every rank raises
            low, high = torch.stack(labels.aminmax()).tolist()
            if low < 0 or high >= self.num_classes:
                raise ValueError(f"{name}: labels must be in [0, {self.num_classes}), got {low if low < 0 else high}")
        if keep is None:
            keep = features.isfinite().all()
            if readable(features) and not keep:
                row = int(features.isfinite().all(1).int().argmin())
                raise ValueError(
                    f"{name}: features must be finite, got NaN or inf in row {row}; leave that batch out, or let keep "
                    "say whether it is good"
                )
        bank_update_(self.features, self.labels, self.pointer, features, labels, keep=keep)

    def prototypes(self) -> Tensor:
        """Prototypes [C, D] as the bank stands: unit rows, zero for an empty class; float32, or float64 as the bank."""
        if self.features.requires_grad:
            raise ValueError("OnlineClassMeans: the bank's features must not require a gradient, got a bank that does")
        return class_means(self.features, self.labels, self.num_classes)[0]

    @torch.no_grad()
    def health(self, *, drift: bool = True) -> dict[str, Tensor]:
        """How well the bank stands for the classes: 0-d tensors on its device, no host sync.

        Returns:
            ``empty_classes``: classes without an entry. ``age``: how many entries were written since a class's newest
            one, mean over the classes that have one: about C where classes are balanced; those near bank_size are about
            to fall out. ``bad_labels``: entries whose label is no class (only a GPU lets them in; they count nowhere).
            ``drift``: mean of 1 - cosine between each prototype and what it was at the last call with ``drift``, over
            the classes with entries at both; NaN at the first. It keeps a copy of the prototypes, which is no part of
            ``state_dict``; ``drift=False`` leaves it out and costs next to nothing.
        """
        slots = torch.arange(self.bank_size, device=self.labels.device)
        since = (self.pointer - 1 - slots) % self.bank_size
        good = (self.labels >= 0) & (self.labels < self.num_classes)
        newest = torch.full((self.num_classes + 1,), self.bank_size, device=self.labels.device)
        newest = newest.scatter_reduce_(0, torch.where(good, self.labels, self.num_classes), since, "amin")[:-1]
        present = newest < self.bank_size
        age = torch.where(present, newest, 0).sum().float() / present.sum()
        values = {"empty_classes": (~present).sum().float(), "age": age, "bad_labels": (~good).sum().float()}
        if drift:
            now, before = self.prototypes(), self._seen
            values["drift"] = torch.full_like(age, torch.nan)
            if before is not None and before.device == now.device:
                both = now.any(1) & before.any(1)
                cosine = torch.linalg.vecdot(now, before.to(now.dtype))
                values["drift"] = (torch.where(both, 1 - cosine, 0.0).sum() / both.sum()).float()
            self._seen = now
        return values

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, bank_size={self.bank_size}, "
            f"temperature={self.temperature}, label_smoothing={self.label_smoothing}, reduction={self.reduction!r}"
        )
