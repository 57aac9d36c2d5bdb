"""Classifiers that learn nothing: votes of the nearest neighbours, and the nearest class mean, both by cosine.

Banks and queries are normalised block by block: a bank of ImageNet's features is 10 GB, and is not copied.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Bytes of a block of the bank, normalised, and as much again of its cosines with a chunk of the queries.
BUDGET = 2**28
ROWS = 8192


def knn_scores(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    num_classes: int,
    k: int,
    temperature: float,
    budget: int = BUDGET,
) -> Tensor:
    """Weighted k-NN votes [Q, C]: the k nearest bank rows by cosine vote for their class with exp(cosine /
    temperature).

    Args:
        bank: features [M, D]. bank_labels: int64 [M]. queries: features [Q, D]. k is capped at M.
        budget: bytes of a block of the bank and of its cosines, each; which of equally near rows at the k-th place
            votes may depend on it.
    """
    count, k = len(queries), min(k, len(bank))
    near = torch.full((count, k), float("-inf"), device=queries.device)
    classes = torch.zeros(count, k, dtype=torch.int64, device=queries.device)
    size = max(budget // (4 * bank.shape[1]), 1)
    chunk = max(budget // (4 * min(size, len(bank))), 1)
    for begin in range(0, len(bank), size):
        block, labels = F.normalize(bank[begin : begin + size].float(), dim=1), bank_labels[begin : begin + size]
        for start in range(0, count, chunk):
            span = slice(start, start + chunk)
            cosines = F.normalize(queries[span].float(), dim=1) @ block.T
            found, where = cosines.topk(min(k, len(block)), dim=1)
            # The nearest of this block and of those before it.
            near[span], kept = torch.cat([near[span], found], 1).topk(k, dim=1)
            classes[span] = torch.cat([classes[span], labels[where]], 1).gather(1, kept)
    # Shifted by the nearest one: exp(1 / 0.01) would overflow in float32.
    weight = ((near - near[:, :1]) / temperature).exp()
    votes = torch.zeros(count, num_classes, device=queries.device)
    for place in range(k):
        # One vote of each query at a time: on CUDA, sums of several at one address have no order.
        votes.scatter_add_(1, classes[:, place, None], weight[:, place, None])
    return votes


def mean_scores(bank: Tensor, bank_labels: Tensor, queries: Tensor, num_classes: int) -> Tensor:
    """Cosines [Q, C] of the queries with the class means: means of l2-normalised rows, l2-normalised themselves.

    Args:
        bank: features [M, D]. bank_labels: int64 [M]. queries: features [Q, D]. A class without a row has the score 0.
    """
    sums = torch.zeros(num_classes, bank.shape[1], device=bank.device)
    for start in range(0, len(bank), ROWS):
        rows, labels = F.normalize(bank[start : start + ROWS].float(), dim=1), bank_labels[start : start + ROWS]
        if bank.is_cuda:
            # It sorts by class first and so adds in one order; index_add_ does so only on a CPU.
            sums.index_put_((labels,), rows, accumulate=True)
        else:
            sums.index_add_(0, labels, rows)
    # The mean has the direction of the sum.
    means = F.normalize(sums, dim=1).T
    scores = torch.empty(len(queries), num_classes, device=queries.device)
    for start in range(0, len(queries), ROWS):
        scores[start : start + ROWS] = F.normalize(queries[start : start + ROWS].float(), dim=1) @ means
    return scores
