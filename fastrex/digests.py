"""A 64-bit digest of all state of a run, computed where the tensors live: ranks compare theirs at every save, a resumed
run compares its own with the one that was stored.

It answers "is every bit the same?" against accidents (a rank that went astray, a tensor left out), not against
somebody who wants two states to collide; files on disk have sha256 for that.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import distributed
from .distributed import World

ROW = 4096  # words that share one sum; part of the digest's definition
# Words held as temporaries at a time: what a CPU's caches hold; enough to fill a GPU, and little beside a model.
BLOCK = {"cpu": 1 << 17, "cuda": 1 << 20}
# Odd 64-bit constants of the splitmix64 generator, as signed numbers.
STEP, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
MASK = 2**64 - 1


@dataclass(frozen=True)
class StateDigest:
    """``names`` of all tensors ("part/tensor", sorted), one digest of each in ``values`` (int64 [n], on the CPU), and
    ``total`` over names, dtypes, shapes, values and facts, signed."""

    names: tuple[str, ...]
    values: Tensor
    total: int

    def __str__(self) -> str:
        return f"{self.total & MASK:016x}"


def state_digest(parts: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> StateDigest:
    """Digest of named tensors and of ``facts`` (what JSON can hold); one sync per device.

    Equal for equal values in logical order: strides (channels-last) and device do not count. Every bit, position, name,
    dtype and shape does.
    """
    named = {f"{stem}/{name}": tensor for stem, tensors in parts.items() for name, tensor in tensors.items()}
    names = tuple(sorted(named))
    values = torch.zeros(len(names), dtype=torch.int64)
    where: dict[torch.device, list[int]] = {}
    for place, name in enumerate(names):
        where.setdefault(named[name].device, []).append(place)
    for places in where.values():
        values[places] = torch.stack([_tensor_digest(named[names[place]].detach()) for place in places]).cpu()
    table = [
        f"{name} {named[name].dtype} {list(named[name].shape)} {value}"
        for name, value in zip(names, values.tolist(), strict=True)
    ]
    text = json.dumps([table, facts], sort_keys=True)
    return StateDigest(names, values, _signed64(text))


def disagreement(mine: StateDigest, world: World) -> str | None:
    """Which rank holds another state than most, and in what; None where all are equal. Every rank calls it, every rank
    gets the same words."""
    if world.size == 1:
        return None
    device = world.device
    # The names too: ranks with other tensors could not even compare them one by one.
    head = torch.tensor([[mine.total, _signed64("\n".join(mine.names))]], device=device)
    totals, layouts = distributed.gather_rows(head, world).cpu().T.tolist()
    odd = _odd_one_out(totals)
    if odd is None:
        return None
    reference = next(rank for rank, total in enumerate(totals) if total == _most_common(totals))
    who = f"rank {odd} differs from rank {reference}"
    if len(set(layouts)) > 1:
        return f"{who} in the names of its tensors"
    every = distributed.gather_rows(mine.values[None].to(device), world).cpu()
    places = (every[odd] != every[reference]).nonzero().flatten().tolist()
    if not places:
        return f"{who} in the step, the seed or the schedule"
    more = f" and {len(places) - 1} more" if len(places) > 1 else ""
    return f"{who} in {mine.names[places[0]]}{more}"


def _odd_one_out(totals: list[int]) -> int | None:
    common = _most_common(totals)
    return next((rank for rank, total in enumerate(totals) if total != common), None)


def _most_common(totals: list[int]) -> int:
    """The first of them where several are equally common: with two ranks, rank 0's."""
    return max(totals, key=totals.count)


def _signed64(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


def _tensor_digest(tensor: Tensor) -> Tensor:
    """0-d int64 on the tensor's device, over its bits in logical order.

    Rows of ``ROW`` words are reduced to a sum of mixed words each, these sums are words again, until one is left.
    """
    words, rest = _words(tensor)
    level = 0
    while True:
        sums = _row_sums(words, level)
        if level == 0 and len(rest):
            sums = torch.cat([sums, _row_sums(rest, -1)])
        if len(sums) == 1:
            return sums[0]
        words, level = sums, level + 1


def _words(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The bits as int64 words, and the last, incomplete word filled with zeros (empty where there is none)."""
    flat = tensor.contiguous().reshape(-1)
    # A view in wider words needs both, its place in memory and in its storage.
    if flat.data_ptr() % 8 or flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    raw = flat.view(torch.uint8)
    whole = raw.numel() // 8 * 8
    rest = raw.new_zeros(8 if raw.numel() > whole else 0)
    rest[: raw.numel() - whole] = raw[whole:]
    return raw[:whole].view(torch.int64), rest.view(torch.int64)


def _row_sums(words: Tensor, level: int) -> Tensor:
    """Sum of the mixed words of every row; at least one row, whose sum is 0 where there are no words."""
    keys = _keys(level, words.device)
    if len(words) <= ROW:
        return _mixed(words, keys[: len(words)]).sum().reshape(1)
    whole = len(words) // ROW * ROW
    block = max(ROW, BLOCK.get(words.device.type, BLOCK["cpu"]))
    sums = [_mixed(piece.view(-1, ROW), keys).sum(1) for piece in torch.split(words[:whole], block)]
    if whole < len(words):
        sums.append(_mixed(words[whole:], keys[: len(words) - whole]).sum().reshape(1))
    return torch.cat(sums)


def _mixed(words: Tensor, keys: Tensor) -> Tensor:
    """A pseudo-random function of each word and its position: multiplications carry a bit upwards, shifts downwards.

    Without the mixing, the wrapping sum would lose two flipped sign bits.
    """
    mixed = torch.bitwise_xor(words, keys).mul_(FIRST)
    mixed ^= mixed >> 32
    mixed *= SECOND
    mixed ^= mixed >> 29
    return mixed


@functools.cache
def _keys(level: int, device: torch.device) -> Tensor:
    """One number per position of a row, others at every level."""
    state = torch.arange(1, ROW + 1, dtype=torch.int64) + (level + 1) * ROW
    state *= STEP
    state = (state ^ (state >> 30)) * FIRST
    state = (state ^ (state >> 27)) * SECOND
    return (state ^ (state >> 31)).to(device)
