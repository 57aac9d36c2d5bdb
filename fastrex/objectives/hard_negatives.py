"""Which negatives MoCHi mixes, and by how much: random numbers that are functions of what they are drawn for.

A row of draws is a stream of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA
2014), computed on the device with torch's int64, whose products wrap around as the algorithm's unsigned ones do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrex_kernels import Mixtures

# In a mixture's ``first``: the query itself, and no mixture at all.
QUERY, ABSENT = -1, -2
# 2^64 / golden ratio, and the multipliers of the finaliser, as signed numbers.
_GAMMA, _FIRST, _SECOND = (n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def mixtures(
    nearest: Tensor,
    images: Tensor,
    crops: Tensor,
    step: Tensor,
    *,
    synthetic: int,
    harder: int,
    seed: int,
    offset: int = 0,
) -> Mixtures:
    """The draws of MoCHi (Kalantidis et al., NeurIPS 2020) for each query.

    Args:
        nearest: int64 [N, H], the hardest negatives of each query; -1 where there are fewer.
        images, crops: int64 [N], what the queries show: queries that agree in both get the same draws.
        step: int64 [1], of the optimiser. seed: of the run.
        synthetic: mixtures of two negatives. harder: those of a negative with the query; both per query.
        offset: what is added to an index of ``nearest``.

    Returns:
        Mixtures [N, synthetic + harder], those of two negatives first. A draw that meets a -1 is absent.
    """
    words = random_words(seed, step, images, crops, 3 * synthetic + 2 * harder)
    # The part of the two negatives of a pair, then of the one that the query meets: (first, second, share).
    one, two, pair, other, query = torch.split(words, [synthetic] * 3 + [harder] * 2, dim=1)
    first, second, alone = (_pick(nearest, part) for part in (one, two, other))
    share = torch.cat([uniform(pair), 0.5 * uniform(query)], 1)
    absent = torch.cat([(first < 0) | (second < 0), alone < 0], 1)
    first = torch.cat([first + offset, torch.full_like(alone, QUERY)], 1)
    second = torch.cat([second, alone], 1) + offset
    return Mixtures(torch.where(absent, ABSENT, first), torch.where(absent, 0, second), share)


def random_words(seed: int, step: Tensor, images: Tensor, crops: Tensor, count: int) -> Tensor:
    """64 random bits for each number of each row, int64 [N, count]."""
    key = torch.full_like(images, seed)
    for part in (step, images, crops):
        key = _finalise((key ^ part) + _GAMMA)
    return _finalise(key[:, None] + _GAMMA * torch.arange(1, count + 1, device=images.device))


def uniform(words: Tensor) -> Tensor:
    """Numbers in [0, 1), multiples of 2^-24, float32: the words' highest bits."""
    return _shifted(words, 40).float() * 2.0**-24


def _pick(nearest: Tensor, words: Tensor) -> Tensor:
    """One of each query's own candidates for each word, int64 [N, E]. The 31 highest bits against H: no candidate is
    likelier than another by more than H / 2^31."""
    return nearest.gather(1, _shifted(words, 33) % nearest.shape[1])


def _finalise(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Right shift that brings in zeros; torch's brings in the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
