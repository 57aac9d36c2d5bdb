"""Which crops of a batch the model sees, and what the log should say of it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .config import Config
from .errors import FastrexError
from .objectives import Objective


def model_groups(config: Config, objective: Objective) -> tuple[tuple[int, int], ...]:
    """The groups of crops (crops per image, side) that the model sees: all, or with ``separate_view`` those without the
    first global crop.

    Raises:
        FastrexError: nothing is left.
    """
    if not objective.separate_view:
        return config.data.crops
    (count, side), *others = config.data.crops
    groups = (*(((count - 1, side),) if count > 1 else ()), *others)
    if not groups:
        raise FastrexError(
            f"train: objective.name={config.objective.name} must have a crop for the model beside that of the momentum "
            f"encoder, got {config.data.crops_text}; set data.global_crops=2"
        )
    return groups


def without_first(crops: Sequence[Tensor], images: int) -> tuple[Tensor, ...]:
    """The groups without the first global crop of the ``images`` images, which the momentum encoder alone sees."""
    first, *others = crops
    return (*((first[images:],) if len(first) > images else ()), *others)


def notices(config: Config, objective: Objective) -> list[str]:
    """Lines for the log."""
    lines = []
    if objective.separate_view and config.data.global_crops == 1:
        lines.append(
            f"objective.name={objective.name}: the global crop is the momentum encoder's, the model trains on local "
            "crops alone; set data.global_crops=2"
        )
    if objective.pairs_in_batch and config.optim.accumulate > 1:
        images = config.optim.batch_size // config.optim.accumulate
        lines.append(
            f"objective.name={objective.name}: a crop meets those of its own micro-batch of {images} images over all "
            f"ranks, not those of the whole batch (optim.accumulate={config.optim.accumulate})"
        )
    return lines
