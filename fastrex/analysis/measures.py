"""How features are spread on the unit sphere: coding length, spectrum, sparsity, distances within and between classes.

Every measure takes features x [N, D] of any floating dtype on any device, divides each row by its l2 norm, adds up in
float64 and gives a Python float (:func:`spectrum`: a tensor). Memory beside x is a chunk of rows and a matrix of
min(N, D) or of classes x D, never N x N. Labels are int64 [N], any numbers.

Names follow t-ReX (Sariyildiz et al., ICLR 2023), whose text could not be read when this was written: which measures
it shows is known, its formulas are not. Each docstring says where the formula comes from and what is this project's
reading. All of them raise FastrexError where a row is zero or not finite, or labels do not fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import FastrexError

EPS_SQUARED = 0.5
SPARSE_BELOW = 1e-5
UNIFORMITY_ROWS = 5_000
_CHUNK = 4096  # rows
_ACROSS = 1024  # rows that meet others at once


def coding_length(x: Tensor, eps_squared: float = EPS_SQUARED) -> float:
    """Average coding length in nats, R = 1/2 log det(I + D / (N eps^2) X'X); larger means more diverse.

    Yu et al., "Learning diverse and discriminative representations via the principle of maximal coding rate reduction"
    (NeurIPS 2020), with its default eps^2 = 0.5. That t-ReX used this eps and X not centred is this project's reading.
    """
    return _coding_length(_eigenvalues(x, "coding_length"), x, eps_squared)


def spectrum(x: Tensor) -> Tensor:
    """Singular values of X divided by the largest, falling: float64 [min(N, D)] on the device of ``x``.

    Roots of the eigenvalues of the smaller Gram matrix: those below about 1e-7 of the largest are rounding errors and
    given as 0. That X is not centred, and is X rather than its covariance, is this project's reading.
    """
    return _spectrum(_eigenvalues(x, "spectrum"))


def effective_rank(x: Tensor) -> float:
    """exp(H(p)), p_i = s_i / sum(s), of the singular values s of X: 1 for a line, min(N, D) for a flat spectrum.

    Roy and Vetterli, "The effective rank" (EUSIPCO 2007), of rows divided by their norms, not centred.
    """
    return _effective_rank(_spectrum(_eigenvalues(x, "effective_rank")))


def sparsity(x: Tensor, below: float = SPARSE_BELOW) -> float:
    """Share of entries whose absolute value is less than ``below`` after the division; t-ReX's bound is not known."""
    norms = _norms(x, "sparsity")
    return sum(int((part.abs() < below).sum()) for part in _units(x, norms)) / x.numel()


def non_zeros(x: Tensor) -> float:
    """Mean number of entries per row that are not exactly 0, as ImageNet-CoG's public code logs it."""
    _norms(x, "non_zeros")
    return int(torch.count_nonzero(x)) / len(x)


def intra_class_distance(x: Tensor, labels: Tensor) -> float:
    """Mean over classes of the mean of ||x_i - x_j||_2 over the pairs i != j of a class, exact; in [0, 2].

    Classes with one row have no pair and are left out. The formula is this project's reading of t-ReX's "intra-class
    distance".
    """
    norms = _norms(x, "intra_class_distance")
    means = []
    for rows in _classes(x, labels, "intra_class_distance"):
        if len(rows) > 1:
            total = x.new_zeros((), dtype=torch.float64)
            members = x[rows].double() / norms[rows]
            for start in range(0, len(rows), _ACROSS):
                part = members[start : start + _ACROSS]
                # A row's distance to itself is 0, which the root of a rounding error is not.
                apart = (2 - 2 * part @ members.T).clamp_(min=0).sqrt_()
                apart.diagonal(start).zero_()
                total += apart.sum()
            means.append(total / (len(rows) * (len(rows) - 1)))
    _need_pairs(bool(means), "intra_class_distance")
    return float(torch.stack(means).mean())


def class_separation(x: Tensor, labels: Tensor) -> float:
    """R^2 = 1 - d_within / d_total of mean cosine distances; 1 where every class is one point, 0 where classes do not
    differ, NaN where all rows are equal.

    d_within is the mean over classes of the mean of 1 - x_i . x_j over all pairs of a class, d_total the mean over all
    pairs of classes of the same over their pairs of rows: classes weigh equally whatever their size, and a row's pair
    with itself counts. Kornblith et al., "Why do better loss functions lead to less transferable features?" (NeurIPS
    2021). With the class means m_k, d_within is 1 - mean|m_k|^2 and d_total 1 - |mean m_k|^2, exactly.
    """
    sums, counts = _class_sums(x, labels, "class_separation")
    means = sums / counts[:, None]
    within = 1 - means.square().sum(1).mean()
    total = 1 - means.mean(0).square().sum()
    return float(1 - within / total) if float(total) > 1e-12 else math.nan


def alignment(x: Tensor, labels: Tensor) -> float:
    """Mean of ||x_i - x_j||_2^2 over all pairs i != j of the same class (all pairs weigh equally); in [0, 4].

    Wang and Isola, "Understanding contrastive representation learning through alignment and uniformity on the
    hypersphere" (ICML 2020), alpha = 2. Their positives are two views of one image; two images of one class are this
    project's reading.
    """
    sums, counts = _class_sums(x, labels, "alignment")
    pairs = float((counts * (counts - 1)).sum())
    _need_pairs(pairs > 0, "alignment")
    # The sum over the pairs of a class of 2 - 2 x_i . x_j; a row's pair with itself adds nothing.
    return max(0.0, float(2 * (counts.square() - sums.square().sum(1)).sum()) / pairs)


def uniformity(x: Tensor, rows: int = UNIFORMITY_ROWS) -> float:
    """log of the mean of exp(-2 ||x_i - x_j||_2^2) over the pairs i < j: 0 where all rows are equal, falling towards
    about -4 as they spread over a sphere of many dimensions.

    Wang and Isola (ICML 2020), t = 2. Exact up to ``rows`` rows; of more, so many are drawn (without replacement, by a
    fixed seed: the same rows each time).
    """
    norms = _norms(x, "uniformity")
    _need_pairs(len(x) > 1, "uniformity")
    if len(x) > rows:
        drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:rows].sort().values.to(x.device)
        x, norms = x[drawn], norms[drawn]
    total = x.new_zeros((), dtype=torch.float64)
    for start in range(0, len(x), _ACROSS):
        part = x[start : start + _ACROSS].double() / norms[start : start + _ACROSS]
        for other in range(start, len(x), _CHUNK):
            against = x[other : other + _CHUNK].double() / norms[other : other + _CHUNK]
            # Of row start + i with row other + j; those with j > i + start - other are the pairs not seen yet.
            near = torch.exp(-2 * (2 - 2 * part @ against.T).clamp_(min=0))
            total += near.triu_(start - other + 1).sum()
    return math.log(float(total) / (len(x) * (len(x) - 1) / 2))


def describe(x: Tensor, labels: Tensor) -> dict[str, float | list[float] | None]:
    """All measures by name; the eigenvalues are computed once. None for what needs two rows of a class, or two rows,
    where there are none."""
    values = _eigenvalues(x, "describe")
    relative = _spectrum(values)
    paired = bool((torch.unique(_labels(x, labels, "describe"), return_counts=True)[1] > 1).any())
    return {
        "coding_length": _coding_length(values, x, EPS_SQUARED),
        "effective_rank": _effective_rank(relative),
        "sparsity": sparsity(x),
        "non_zeros": non_zeros(x),
        "intra_class_distance": intra_class_distance(x, labels) if paired else None,
        "class_separation": class_separation(x, labels) if paired else None,
        "alignment": alignment(x, labels) if paired else None,
        "uniformity": uniformity(x) if len(x) > 1 else None,
        "spectrum": relative.tolist(),
    }


def _norms(x: Tensor, name: str) -> Tensor:
    """l2 norms of the rows, float64 [N, 1]."""
    if x.ndim != 2 or not x.numel() or not x.is_floating_point():
        raise FastrexError(
            f"{name}: features must be numbers [N, D] with N and D of at least 1, got {x.dtype} {list(x.shape)}; give "
            "one row per image"
        )
    norms = torch.cat([torch.linalg.vector_norm(part.double(), dim=1, keepdim=True) for part in torch.split(x, _CHUNK)])
    bad = ~(torch.isfinite(norms) & (norms > 0))[:, 0]
    if bad.any():
        row = int(bad.int().argmax())
        fact = "zeros alone" if float(norms[row]) == 0 else "NaN or inf"
        raise FastrexError(
            f"{name}: every row of the features must have a direction, got {fact} in row {row}; leave it out"
        )
    return norms


def _units(x: Tensor, norms: Tensor) -> Iterator[Tensor]:
    """The rows divided by their norms, float64, some at a time."""
    for part, norm in zip(torch.split(x, _CHUNK), torch.split(norms, _CHUNK), strict=True):
        yield part.double() / norm


def _eigenvalues(x: Tensor, name: str) -> Tensor:
    """Squared singular values of X, falling: float64 [min(N, D)], rounding errors as 0."""
    norms = _norms(x, name)
    if len(x) < x.shape[1]:
        unit = x.double() / norms
        gram = unit @ unit.T
    else:
        gram = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64)
        for part in _units(x, norms):
            gram.addmm_(part.T, part)
    values: Tensor = torch.linalg.eigvalsh(gram).flip(0)
    return torch.where(values > values[0] * len(gram) * torch.finfo(torch.float64).eps, values, 0)


def _coding_length(values: Tensor, x: Tensor, eps_squared: float) -> float:
    return float(torch.log1p(values * (x.shape[1] / (len(x) * eps_squared))).sum() / 2)


def _spectrum(values: Tensor) -> Tensor:
    return (values / values[0]).sqrt()


def _effective_rank(relative: Tensor) -> float:
    share = relative / relative.sum()
    return float(torch.special.entr(share).sum().exp())


def _classes(x: Tensor, labels: Tensor, name: str) -> Iterator[Tensor]:
    """The row numbers of each class."""
    labels = _labels(x, labels, name)
    order = labels.argsort(stable=True)
    counts = torch.unique(labels, return_counts=True)[1]
    yield from torch.split(order, counts.tolist())


def _class_sums(x: Tensor, labels: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Of the K classes that occur: sums of their unit rows [K, D] and numbers of rows [K], both float64."""
    norms = _norms(x, name)
    _, place, counts = torch.unique(_labels(x, labels, name), return_inverse=True, return_counts=True)
    sums = x.new_zeros(len(counts), x.shape[1], dtype=torch.float64)
    for part, at in zip(_units(x, norms), torch.split(place, _CHUNK), strict=True):
        sums.index_add_(0, at, part)
    return sums, counts.double()


def _labels(x: Tensor, labels: Tensor, name: str) -> Tensor:
    if labels.shape != x.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise FastrexError(
            f"{name}: labels must be one whole number for each of the {len(x)} rows, got {labels.dtype} "
            f"{list(labels.shape)}; give those of the same images"
        )
    return labels.to(x.device)


def _need_pairs(there: bool, name: str) -> None:
    if not there:
        raise FastrexError(f"{name}: there must be two rows that make a pair, got none; take more images per class")
