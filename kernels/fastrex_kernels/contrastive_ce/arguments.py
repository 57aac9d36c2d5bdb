"""What the contrastive operators take and give, and the checks of it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._op import readable

POSITIVES = ("mean", "sum")
MARGINS = ("cosface", "arcface")
# Cosines less a margin of 2 are below every other; an angle plus pi is beyond every other.
MOST_MARGIN = {"cosface": 2.0, "arcface": math.pi}
# Logits and their weights stay far inside the range of float32.
LEAST_TEMPERATURE, MOST_HARDNESS = 1e-6, 1e3
# What traced numbers are, too.
INTEGER, NUMBER = (int, torch.SymInt), (int, float, torch.SymInt, torch.SymFloat)
REDUCTIONS = ("none", "mean", "sum")


class ContrastiveStats(NamedTuple):
    """What the loss knows of each query: how many ``positives`` and ``negatives`` it had, int64 [N] each, and whether
    the nearest of them is a positive (``hit``, bool [N]; a query without positives has no hit)."""

    positives: Tensor
    negatives: Tensor
    hit: Tensor


class Mixtures(NamedTuple):
    """Synthetic negatives, E per query: ``normalise(share * u + (1 - share) * v)`` of unit vectors, where v is key
    ``second`` and u is key ``first``, or the query itself where ``first`` is -1 (MoCHi, Kalantidis et al. 2020). Where
    ``first`` is -2 there is none. All are constants of the gradient. They are negatives whatever keys they name: the
    keys' ids, ``private`` and ``instance`` are not consulted.

    ``first``, ``second``: int64 [N, E]; ``share``: floating point [N, E].
    """

    first: Tensor
    second: Tensor
    share: Tensor


def expand(ids: Tensor, rows: int) -> Tensor:
    """One id per row, from ids [B] that crop-major rows share."""
    return ids if ids.shape[0] == rows else ids.repeat(rows // ids.shape[0])


def readable_mixtures(mixtures: Mixtures, count: int, dtype: torch.dtype) -> Mixtures:
    """The same mixtures of ``count`` keys, with indices that can be read: what an entry that is not there holds counts
    for nothing, and one that names no key has a share of NaN, which the loss shows."""
    first, second, share = mixtures
    there = first != -2
    wrong = there & ((first < -2) | (first >= count) | (second < 0) | (second >= count))
    share = torch.where(wrong, torch.nan, share.detach().to(dtype))
    return Mixtures(
        torch.where(wrong, 0, first), torch.where(there & ~wrong, second, 0), torch.where(there, share, 0.0)
    )


def check(
    name: str,
    input: Tensor,
    keys: Tensor,
    ids: Tensor,
    key_ids: Tensor,
    instance: Tensor | None,
    key_instance: Tensor | None,
    private: int,
    temperature: float,
    positives: str,
    hardness: float,
    margin: float,
    margin_kind: str,
    nearest: int,
    mixtures: Mixtures | None,
    learnt_keys: int | None,
    ignore_index: int,
    reduction: str,
) -> None:
    """Raise what :func:`contrastive_cross_entropy` says of its arguments."""
    _check_tensors(name, input, keys, ids, key_ids, instance, key_instance, private, ignore_index)
    check_options(name, temperature, positives, hardness, margin, margin_kind, reduction)
    check_integer(name, "nearest", nearest)
    if learnt_keys is not None:
        check_integer(name, "learnt_keys", learnt_keys)
    count = keys.shape[0]
    if nearest < 0 or nearest > count:
        raise ValueError(f"{name}: nearest must be in [0, {count}], the number of keys, got {nearest}")
    if learnt_keys is not None and not 0 <= learnt_keys <= count:
        raise ValueError(f"{name}: learnt_keys must be in [0, {count}], the number of keys, got {learnt_keys}")
    if nearest and keys.requires_grad and torch.is_grad_enabled() and learnt_keys != 0:
        raise ValueError(
            f"{name}: keys must not require a gradient with nearest={nearest}; detach them or pass learnt_keys=0"
        )
    if mixtures is not None:
        _check_mixtures(name, input, keys, mixtures)


def check_options(
    name: str, temperature: float, positives: str, hardness: float, margin: float, margin_kind: str, reduction: str
) -> None:
    """Raise what :func:`contrastive_cross_entropy` says of its options."""
    for word, number in (("temperature", temperature), ("hardness", hardness), ("margin", margin)):
        if not isinstance(number, NUMBER) or isinstance(number, bool):
            raise TypeError(f"{name}: {word} must be a number, got {_kind(number)}")
    # Comparisons, which a traced number can have, unlike math.isfinite.
    if not LEAST_TEMPERATURE <= temperature < math.inf:
        raise ValueError(
            f"{name}: temperature must be a finite number of at least {LEAST_TEMPERATURE:g}, got {temperature!r}"
        )
    if not 0 <= hardness <= MOST_HARDNESS:
        raise ValueError(f"{name}: hardness must be in [0, {MOST_HARDNESS:g}], got {hardness!r}")
    for word, value, known in (
        ("positives", positives, POSITIVES),
        ("margin_kind", margin_kind, MARGINS),
        ("reduction", reduction, REDUCTIONS),
    ):
        if value not in known:
            raise ValueError(f"{name}: {word} must be one of {', '.join(known)}, got {value!r}")
    if not 0 <= margin < MOST_MARGIN[margin_kind]:
        raise ValueError(
            f"{name}: margin must be in [0, {MOST_MARGIN[margin_kind]:.4g}) for {margin_kind}, got {margin!r}"
        )


def check_integer(name: str, word: str, number: object) -> None:
    # A bool is an int, and never what was meant.
    if not isinstance(number, INTEGER) or isinstance(number, bool):
        raise TypeError(f"{name}: {word} must be an int, got {_kind(number)}")


def _kind(value: object) -> str:
    return f"{value} (a bool)" if isinstance(value, bool) else type(value).__name__


def check_nearest(
    name: str,
    input: Tensor,
    keys: Tensor,
    k: int,
    ids: Tensor | None,
    key_ids: Tensor | None,
    instance: Tensor | None,
    key_instance: Tensor | None,
    private: int,
    ignore_index: int,
) -> None:
    """Raise what :func:`nearest_keys` says of its arguments."""
    _check_tensors(name, input, keys, ids, key_ids, instance, key_instance, private, ignore_index)
    check_integer(name, "k", k)
    if key_ids is None and ids is not None:
        raise ValueError(f"{name}: key_ids must be given with ids, got None")
    if private and ids is None:
        raise ValueError(f"{name}: ids must be given with private={private}, got None")
    if not 1 <= k <= keys.shape[0]:
        raise ValueError(f"{name}: k must be in [1, {keys.shape[0]}], the number of keys, got {k}")


def check_tensor(name: str, word: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: {word} must be a tensor, got {_kind(tensor)}")


def _check_tensors(
    name: str,
    input: Tensor,
    keys: Tensor,
    ids: Tensor | None,
    key_ids: Tensor | None,
    instance: Tensor | None,
    key_instance: Tensor | None,
    private: int,
    ignore_index: int,
) -> None:
    check_integer(name, "private", private)
    check_integer(name, "ignore_index", ignore_index)
    for word, tensor in (("input", input), ("keys", keys)):
        check_tensor(name, word, tensor)
        if tensor.ndim != 2:
            raise ValueError(f"{name}: {word} must have 2 dimensions, got shape {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: {word} must be floating point, got {tensor.dtype}")
    rows, count = input.shape[0], keys.shape[0]
    if keys.shape[1] != input.shape[1]:
        raise ValueError(f"{name}: keys must be [M, {input.shape[1]}] like input, got {tuple(keys.shape)}")
    if (instance is None) != (key_instance is None):
        given = "key_instance" if instance is None else "instance"
        raise ValueError(f"{name}: instance and key_instance must be given together, got {given} alone")
    numbers = {"ids": ids, "key_ids": key_ids, "instance": instance, "key_instance": key_instance}
    for word, number in numbers.items():
        if number is None:
            continue
        check_tensor(name, word, number)
        if number.dtype != torch.int64:
            raise TypeError(f"{name}: {word} must be int64, got {number.dtype}")
        shape = tuple(number.shape)
        if number.ndim != 1:
            raise ValueError(f"{name}: {word} must have 1 dimension, got shape {shape}")
        if word.startswith("key_"):
            if shape[0] != count:
                raise ValueError(f"{name}: {word} must have one entry per key, {count}, got {shape[0]}")
        elif shape[0] != rows and (shape[0] == 0 or rows % shape[0]):
            raise ValueError(f"{name}: {word} must have {rows} entries or a divisor of that, got {shape[0]}")
    for word, other in {"keys": keys, **numbers}.items():
        if other is not None and other.device != input.device:
            raise ValueError(f"{name}: {word} must be on {input.device} like input, got {other.device}")
    if not 0 <= private <= count:
        raise ValueError(f"{name}: private must be in [0, {count}], the number of keys, got {private}")


def _check_mixtures(name: str, input: Tensor, keys: Tensor, mixtures: Mixtures) -> None:
    if not isinstance(mixtures, Mixtures):
        raise TypeError(f"{name}: mixtures must be Mixtures(first, second, share), got {_kind(mixtures)}")
    first, second, share = mixtures
    for word, tensor in mixtures._asdict().items():
        check_tensor(name, f"mixtures.{word}", tensor)
    count = keys.shape[0]
    if first.ndim != 2 or first.shape[0] != input.shape[0]:
        raise ValueError(f"{name}: mixtures.first must be [{input.shape[0]}, E], got {tuple(first.shape)}")
    for word, tensor in (("second", second), ("share", share)):
        if tensor.shape != first.shape:
            shapes = f"{tuple(first.shape)} like first, got {tuple(tensor.shape)}"
            raise ValueError(f"{name}: mixtures.{word} must be {shapes}")
    for word, tensor in (("first", first), ("second", second)):
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name}: mixtures.{word} must be int64, got {tensor.dtype}")
    if not share.is_floating_point():
        raise TypeError(f"{name}: mixtures.share must be floating point, got {share.dtype}")
    for word, tensor in (("first", first), ("second", second), ("share", share)):
        if tensor.device != input.device:
            raise ValueError(f"{name}: mixtures.{word} must be on {input.device} like input, got {tensor.device}")
    if not count and first.shape[1]:
        raise ValueError(f"{name}: mixtures must have keys to mix, got none; pass mixtures=None")
    if readable(first) and first.numel():
        low, high = int(first.min()), int(first.max())
        if low < -2 or high >= count:
            raise ValueError(f"{name}: mixtures.first must be in [-2, {count}), got {low if low < -2 else high}")
        there = second[first != -2]
        if there.numel() and (int(there.min()) < 0 or int(there.max()) >= count):
            wrong = int(there.min()) if int(there.min()) < 0 else int(there.max())
            raise ValueError(f"{name}: mixtures.second must be in [0, {count}), got {wrong}")
