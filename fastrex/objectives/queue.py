"""A ring of the newest momentum features with their class ids and images: the keys of the objectives with a queue."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastrex_kernels import bank_update_

from ..errors import FastrexError

# What the contrastive op leaves out wherever it stands in the keys' ids.
IGNORED = -100


class Queue(nn.Module):
    """Ring buffers of ``size`` entries; all state is in the buffers and does not depend on the number of ranks.

    A slot that was never written has the class id -100, and no query sees it. MoCo's queue starts with random vectors
    instead, which count as negatives; left out, a loss is of real features from the first step on, no random vector
    votes among the neighbours of LOOK, and none is mixed by MoCHi (this project's own choice). The price: a loss over
    fewer keys until the ring has come round, which ``filled`` shows.

    Args:
        size: Q. dim: D. name: of the objective, for errors.

    Attributes:
        features: [Q, D] of torch's default dtype (float32), as the momentum encoder gave them.
        labels: class ids int64 [Q]; -100: never written.
        images: int64 [Q], row of the index that an entry shows; -1, which is no image: never written.
        pointer: int64 [1], where the next entry goes.
    """

    features: Tensor
    labels: Tensor
    images: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int, name: str) -> None:
        super().__init__()
        self.size, self.name = size, name
        self.register_buffer("features", torch.zeros(size, dim))
        self.register_buffer("labels", torch.full((size,), IGNORED))
        self.register_buffer("images", torch.full((size,), -1))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))

    @torch.no_grad()
    def write_(self, features: Tensor, labels: Tensor, images: Tensor | None, keep: Tensor | None) -> None:
        """Write a batch at the pointer, in place, without a host sync: rows beyond the end of the ring are dropped and
        the pointer wraps to 0, as :func:`fastrex_kernels.bank_update_` does for every bank here.

        Args:
            features: [B, D] of the whole global batch. labels, images: int64 [B].
            keep: 0-d bool; nothing changes where it is False.

        Raises:
            ValueError: no images.
        """
        if images is None:
            raise ValueError(f"{self.name}: update_ must get the images of the features, got none")
        # Before the pointer moves. A surplus row writes once more what the last slot gets, as the bank's does.
        place = torch.arange(len(images), device=images.device)
        source = torch.minimum(place, self.size - 1 - self.pointer)
        slot = self.pointer + source
        written = images[source]
        if keep is not None:
            written = torch.where(keep, written, self.images[slot])
        self.images[slot] = written
        bank_update_(self.features, self.labels, self.pointer, features, labels, keep=keep)

    @torch.no_grad()
    def filled(self) -> Tensor:
        """Share of the slots that hold a feature, 0-d."""
        return (self.labels != IGNORED).float().mean()

    def check(self, state: Mapping[str, Tensor], prefix: str, num_classes: int) -> None:
        """Refuse stored buffers for values that they cannot have; names, shapes and dtypes are right.

        Raises:
            FastrexError: names the buffer and the value. A pointer beyond the ring would write beyond it, which a GPU
                does not notice.
        """
        ends = {"pointer": (0, self.size), "labels": (0, num_classes), "images": (-1, 2**63 - 1)}
        for name, (start, end) in ends.items():
            values = state[prefix + name]
            if name == "labels":
                values = values[values != IGNORED]
            if not values.numel():
                continue
            low, high = torch.stack(values.aminmax()).tolist()
            if low < start or high >= end:
                bound = f"at least {start}" if name == "images" else f"in [{start}, {end})"
                bound += f" or {IGNORED}" if name == "labels" else ""
                raise FastrexError(
                    f"resume: bank tensor {prefix + name!r} must be {bound}, got {low if low < start else high}; the "
                    "checkpoint belongs to another configuration"
                )
        if not bool(state[prefix + "features"].isfinite().all()):
            raise FastrexError(
                f"resume: bank tensor {prefix + 'features'!r} must be finite, got NaN or inf; the checkpoint is damaged"
            )
        empty, shown = state[prefix + "labels"] == IGNORED, state[prefix + "images"]
        if (odd := empty != (shown == -1)).any():
            slot = int(odd.int().argmax())
            raise FastrexError(
                f"resume: bank tensor {prefix + 'images'!r} must be -1 where {prefix + 'labels'!r} is {IGNORED} and "
                f"nowhere else, got {int(shown[slot])} beside {int(state[prefix + 'labels'][slot])} in slot {slot}; "
                "the checkpoint is damaged"
            )

    def extra_repr(self) -> str:
        return f"size={self.size}, dim={self.features.shape[1]}"
