"""Checks of what modules are built with."""

from __future__ import annotations

from .cosine_ce import REDUCTIONS


def check_sizes(name: str, **sizes: int) -> None:
    """Refuse a size below 1."""
    for word, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: {word} must be at least 1, got {size}")


def check_options(name: str, temperature: float, label_smoothing: float, reduction: str) -> None:
    """Refuse options of the loss that mean nothing."""
    if not temperature > 0:
        raise ValueError(f"{name}: temperature must be above 0, got {temperature}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing must be in [0, 1], got {label_smoothing}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
