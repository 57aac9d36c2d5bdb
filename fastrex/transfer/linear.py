"""The linear probe of the large sets: SGD on features that stay where they are, many (lr, wd) pairs side by side.

As published (ImageNet-CoG, t-ReX): Linear with bias in PyTorch's default initialisation on l2-normalised features,
mean softmax cross-entropy, SGD with momentum 0.9 and weight decay also on the bias, batches of 1024, 100 epochs. All
pairs see the same batches, so that a step is one product for the logits of all of them and one for their gradients.
float32 throughout, on a GPU as torch is set (TF32 only where the user has switched it on).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MOMENTUM, BATCH, EPOCHS = 0.9, 1024, 100
PAD = 16
BLOCK = 4096  # rows handled in one go outside of training
# What the pairs trained side by side may take; on a GPU a quarter of its memory, whoever else uses it: products of
# other sizes are rounded in another way.
BUDGET = 2 * 2**30


def rate(epoch: int, epochs: int = EPOCHS) -> float:
    """Share of the learning rate in ``epoch``, from 0: the published code calls its cosine after each epoch with that
    epoch's number, so that the first two run at the full rate."""
    return 1.0 if epoch < 2 else 0.5 * (1 + math.cos(math.pi * (epoch - 1) / epochs))


def unit_rows(features: Tensor, device: torch.device | None = None) -> Tensor:
    """[N, D] -> [N, R] on ``device``: l2-normalised, a column of ones for the bias, zeros up to a multiple of 16
    (products are faster so). Block by block: features of ImageNet are 10 GB, and no second copy is made of them."""
    count, width = features.shape
    out = features.new_zeros(count, -(-(width + 1) // PAD) * PAD, device=device)
    for start in range(0, count, BLOCK):
        out[start : start + BLOCK, :width] = F.normalize(features[start : start + BLOCK].to(out.device), dim=1)
    out[:, width] = 1
    return out


def train(
    rows: Tensor,
    labels: Tensor,
    num_classes: int,
    width: int,
    pairs: Sequence[tuple[float, float]],
    seed: int,
    *,
    places: Tensor | None = None,
    epochs: int = EPOCHS,
    batch: int = BATCH,
    budget: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Train a classifier for each (learning rate, weight decay).

    A pair whose loss is not finite in an epoch, or whose weights are not after it, stops and keeps the weights from
    before that epoch.

    Args:
        rows: features of ``width`` columns as ``unit_rows`` gives them, [N, R], float32 or float64. labels: int64 [N].
        seed: of the initialisation and of the batches, the same ones for all pairs.
        places: the rows to learn from, int64 [n], default all: batches are gathered anyway, a subset needs no copy.
        budget: bytes of weights and momentum at once; more pairs than fit are trained one part after the other.

    Returns:
        Weights [P, C, R] and bool [P]: which pairs went on to the end.
    """
    if budget is None:
        budget = torch.cuda.get_device_properties(rows.device).total_memory // 4 if rows.is_cuda else BUDGET
    if places is None:
        places = torch.arange(len(rows), device=rows.device)
    one = (4 * num_classes * rows.shape[1] + 3 * batch * num_classes) * rows.element_size()
    size = max(budget // one, 1)
    parts = [
        _train(rows, labels, places, num_classes, width, pairs[begin : begin + size], seed, epochs, batch)
        for begin in range(0, len(pairs), size)
    ]
    return torch.cat([weights for weights, _ in parts]), torch.cat([alive for _, alive in parts])


def predict(rows: Tensor, weights: Tensor, places: Tensor | None = None) -> Tensor:
    """Classes int64 [P, M] of rows [M, R], or of those of them at ``places`` int64 [M], under weights [P, C, R]."""
    parts = []
    for start in range(0, len(rows) if places is None else len(places), BLOCK):
        span = slice(start, start + BLOCK)
        part = rows[span] if places is None else rows[places[span]]
        scores = part @ weights.flatten(0, 1).T
        parts.append(scores.view(len(part), *weights.shape[:2]).argmax(2).T)
    return torch.cat(parts, 1)


def _train(
    rows: Tensor,
    labels: Tensor,
    learn: Tensor,
    classes: int,
    width: int,
    pairs: Sequence[tuple[float, float]],
    seed: int,
    epochs: int,
    batch: int,
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    count, size = len(pairs), rows.shape[1]
    # torch.nn.Linear draws weights and bias from U(-1/sqrt(D), 1/sqrt(D)).
    drawn = (torch.rand(classes, width + 1, generator=generator, dtype=torch.float64) * 2 - 1) / math.sqrt(width)
    weights = rows.new_zeros(count, classes, size)
    weights[..., : width + 1] = drawn.to(rows)
    kept, momentum = weights.clone(), torch.zeros_like(weights)
    rates, decays = rows.new_tensor(pairs).T[:, :, None, None]
    alive = torch.ones(count, dtype=torch.bool, device=rows.device)
    flat, flat_momentum = weights.view(-1, size), momentum.view(-1, size)
    for epoch in range(epochs):
        lengths = -rates * rate(epoch, epochs)
        losses = rows.new_zeros(count)
        order = torch.randperm(len(learn), generator=generator).to(rows.device)
        for start in range(0, len(order), batch):
            places = learn[order[start : start + batch]]
            x, own = rows[places], labels[places, None, None].expand(-1, count, 1)
            logits = (x @ flat.T).view(len(x), count, classes)
            logits -= logits.amax(2, keepdim=True)
            score = logits.gather(2, own)
            error = logits.exp_()
            total = error.sum(2, keepdim=True)
            error /= total
            losses += (total.log_() - score).sum((0, 2))
            error.scatter_add_(2, own, error.new_full((1, 1, 1), -1.0).expand_as(own))
            flat_momentum.addmm_(error.flatten(1).T, x, beta=MOMENTUM, alpha=1 / len(x))
            momentum.addcmul_(weights, decays)
            weights.addcmul_(momentum, lengths)
        # The last step may overflow after a loss that was still finite.
        alive &= losses.isfinite() & weights.flatten(1).isfinite().all(1)
        still = alive[:, None, None]
        kept = torch.where(still, weights, kept)
        # What has stopped stands still at numbers that are finite.
        weights.copy_(kept)
        momentum.masked_fill_(~still, 0.0)
        rates = torch.where(still, rates, 0.0)
    return kept, alive
