"""Learning rate of every step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .config import OptimConfig


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from 0 and half a cosine to ``end``, per step (t-ReX recipe).

    Args:
        peak: learning rate at the end of the warm-up.
        end: learning rate that the cosine runs towards.
        warmup: steps of warm-up; step ``warmup - 1`` has the peak (inclusive end points).
        total: steps of the whole schedule; stopping a run early never rescales it.
    """

    peak: float
    end: float
    warmup: int
    total: int

    def lr(self, step: int) -> float:
        """Learning rate of step 0, 1, ..."""
        if step < self.warmup:
            return self.peak * step / max(self.warmup - 1, 1)
        position = min(step - self.warmup, self.total - self.warmup) / max(self.total - self.warmup, 1)
        return self.end + 0.5 * (self.peak - self.end) * (1 + math.cos(math.pi * position))


def from_config(optim: OptimConfig, steps_per_epoch: int) -> Schedule:
    """The schedule of a run: the peak grows linearly with the images in the global batch, from ``optim.lr`` at 256."""
    return Schedule(
        peak=optim.lr * optim.batch_size / 256,
        end=optim.min_lr,
        warmup=round(optim.warmup_epochs * steps_per_epoch),
        total=optim.epochs * steps_per_epoch,
    )
