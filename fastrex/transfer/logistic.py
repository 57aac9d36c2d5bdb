"""Multinomial logistic regression with an L2 penalty: many strengths and subsets of the rows, solved side by side.

Each problem is scikit-learn's LogisticRegression(C=C): minimise 1/2 |W|^2 + C sum_i loss_i over the weights W and an
intercept that is not penalised. With two classes scikit-learn fits one vector v, here W = (v, -v) / 2, whose squared
norm is half of v's: C is halved, which makes the solutions equal.

Where the speed comes from, all of it exact:

* The features are centred (the intercept takes the difference up) and turned into the eigenbasis of their covariance,
  once for all problems; |W| stays the same. Fewer rows than features: the basis has no more directions than rows.
* There a diagonal preconditioner is nearly Newton's: 1 / (1/(C n) + p(1-p) averaged over the rows x eigenvalue), the
  bound of Boehning (1992) with the curvature that is there in place of the largest possible. From W = 0 the first
  step is Newton's, up to rounding.
* One step costs one product with the features for the logits along the direction, whatever the line search tries, and
  one for the gradient; the problems of a subset stand side by side in both.
* Problems that have converged leave, by compaction.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .descent import History
from .space import Space

HISTORY = 10
MAX_ITERATIONS = 2000  # as published
TOLERANCE = 1e-4  # scikit-learn's default
REFRESH = 10
# Tries of one line search. On a GPU all of them run, since looking would wait for the device.
TRIALS_CPU, TRIALS_CUDA = 10, 3
# Steps between looks at who has converged.
LOOK_CPU, LOOK_CUDA = 2, 8
# Logits handled in one go on a CPU, so that the passes of a softmax find them in the cache.
CHUNK = 2**17
# What all problems of one wave may take on a CPU; on a GPU a quarter of its memory, whoever else uses it: products of
# other sizes are rounded in another way.
BUDGET = 3 * 2**30


@dataclass(frozen=True)
class Fits:
    """Solutions of P problems, group by group.

    Attributes:
        weights: [P, C, R] in the space; a class without a row in its group has the intercept -inf.
        gradients: [P], the largest entry of the gradient of mean loss + |W|^2 / (2 C n), as scikit-learn measures it.
        iterations: int64 [P]. objectives: [P], 1/2 |W|^2 + C sum_i loss_i.
    """

    weights: Tensor
    gradients: Tensor
    iterations: Tensor
    objectives: Tensor

    def predict(self, rows: Tensor) -> Tensor:
        """Classes int64 [P, M] of rows [M, R] of the space."""
        return torch.stack([(rows @ one.T).argmax(1) for one in self.weights])


def solve(
    space: Space,
    labels: Tensor,
    num_classes: int,
    groups: Sequence[Tensor],
    strengths: Sequence[Sequence[float]],
    *,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
    budget: int | None = None,
) -> Fits:
    """Solve a problem for each subset of rows and each of its strengths C.

    All begin at W = 0. The tolerance is absolute: with a weak penalty a fit of another strength nearby would meet it as
    it stands, and be returned in place of this one's.

    Args:
        labels: int64 [N]. groups: rows of the space, int64, one tensor per subset. strengths: values of C per subset.
        budget: bytes that the problems solved side by side may take; more problems than fit are solved in waves.
    """
    device = space.rows.device
    if budget is None:
        budget = torch.cuda.get_device_properties(device).total_memory // 4 if device.type == "cuda" else BUDGET
    found: list[Fits] = []
    wave: list[tuple[Tensor, list[float]]] = []
    used = 0

    def flush() -> None:
        nonlocal wave, used
        if any(values for _, values in wave):
            found.append(_Wave(space, labels, num_classes, wave).run(tolerance, max_iterations))
        wave, used = [], 0

    for rows, values in zip(groups, strengths, strict=True):
        subset = len(rows) * space.rows.shape[1] * space.rows.element_size()
        vectors = (2 * HISTORY + 10) * space.rows.shape[1]
        one = (3 * len(rows) + vectors) * num_classes * space.rows.element_size()
        wave.append((rows, []))
        used += subset
        for value in values:
            if used + one > budget and any(values for _, values in wave):
                flush()
                wave, used = [(rows, [])], subset
            wave[-1][1].append(float(value))
            used += one
    flush()
    parts = zip(*((f.weights, f.gradients, f.iterations, f.objectives) for f in found), strict=True)
    return Fits(*(torch.cat(part) for part in parts))


class _Group:
    """The problems of one subset of rows: logits, logits along the direction, and p - y, each [n, S, C]."""

    def __init__(self, rows: Tensor, labels: Tensor, size: int, theta: Tensor) -> None:
        self.rows, self.labels, self.size = rows, labels, size
        self.classes = theta.shape[1]
        self.power = rows.square().mean(0)
        self.logits = (rows @ theta.flatten(0, 1).T).view(len(rows), size, self.classes)
        self.absent = torch.bincount(labels, minlength=self.classes) == 0
        self.logits.masked_fill_(self.absent, float("-inf"))
        self.along = torch.zeros_like(self.logits)
        self.residual = torch.empty_like(self.logits)

    def chunks(self) -> list[slice]:
        rows = len(self.rows)
        size = rows if self.rows.is_cuda else max(CHUNK // (self.size * self.classes), 16)
        return [slice(begin, begin + size) for begin in range(0, rows, size)]

    def move(self, direction: Tensor) -> None:
        """Logits along the direction [S, C, R]."""
        torch.mm(self.rows, direction.flatten(0, 1).T, out=self.along.flatten(1))

    def evaluate(self, length: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss and its derivative along the direction, float64 [S], at ``length`` [S] along it."""
        loss = length.new_zeros(self.size, dtype=torch.float64)
        slope = torch.zeros_like(loss)
        for part in self.chunks():
            along, out = self.along[part], self.residual[part]
            shifted = torch.addcmul(self.logits[part], along, length[:, None])
            shifted -= shifted.amax(2, keepdim=True)
            own = self.labels[part, None, None].expand(-1, self.size, 1)
            score = shifted.gather(2, own)
            torch.exp(shifted, out=out)
            total = out.sum(2, keepdim=True)
            out /= total
            loss += (total.log_() - score).sum((0, 2), dtype=torch.float64)
            out.scatter_add_(2, own, out.new_full((1, 1, 1), -1.0).expand_as(own))
            slope += torch.mul(out, along, out=shifted).sum((0, 2)).double()
        return loss / len(self.rows), slope / len(self.rows)

    def advance(self, length: Tensor) -> None:
        for part in self.chunks():
            self.logits[part].addcmul_(self.along[part], length[:, None])

    def gradient(self, out: Tensor) -> None:
        """Of the mean loss where ``evaluate`` was last, into ``out`` [S, C, R]."""
        torch.mm(self.residual.flatten(1).T, self.rows, out=out.flatten(0, 1))
        out /= len(self.rows)

    def curvature(self) -> Tensor:
        """p(1-p) averaged over the rows x mean square of each column, [S, C, R]."""
        share = self.rows.new_zeros(self.size, self.classes)
        for part in self.chunks():
            # |p - y| is p, or 1 - p for the row's own class.
            odds = self.residual[part].abs()
            share += odds.addcmul_(odds, odds, value=-1).sum(0)
        return (share / len(self.rows))[:, :, None] * self.power

    def select(self, where: Tensor) -> None:
        self.size = len(where)
        self.logits, self.along = self.logits[:, where], self.along[:, where]
        self.residual = self.residual[:, where]


class _Wave:
    """Problems that are solved together. All tensors of P problems stand in the order of their groups."""

    def __init__(self, space: Space, labels: Tensor, classes: int, wave: list[tuple[Tensor, list[float]]]) -> None:
        rows, self.space = space.rows, space
        wave = [(subset, values) for subset, values in wave if values]
        c = rows.new_tensor([value for _, values in wave for value in values], dtype=torch.float64)
        counts = torch.cat([c.new_full((len(values),), len(subset)) for subset, values in wave])
        # From the mean loss + penalty that is minimised here to the sum that is told.
        self.factor = c * counts
        ridge = 1 / (c / 2 if classes == 2 else c) / counts
        penalised = rows.new_ones(rows.shape[1])
        penalised[space.rank] = 0
        self.shrink = ridge.to(rows.dtype)[:, None, None] * penalised
        shape = (len(c), classes, rows.shape[1])
        self.theta = rows.new_zeros(shape)
        self.groups, at = [], 0
        for subset, values in wave:
            own = self.theta[at : at + len(values)]
            # All rows in their order need no copy of the features.
            whole = len(subset) == len(rows) and bool((subset == torch.arange(len(rows), device=rows.device)).all())
            self.groups.append(
                _Group(rows if whole else rows[subset], labels if whole else labels[subset], len(values), own)
            )
            at += len(values)
        self.history = History(len(c), shape[1] * shape[2], HISTORY, rows)
        self.index = torch.arange(len(c), device=rows.device)
        self.failures = torch.zeros_like(self.index)

    def run(self, tolerance: float, max_iterations: int) -> Fits:
        cpu = not self.theta.is_cuda
        look = LOOK_CPU if cpu else LOOK_CUDA
        weights, gradients = torch.zeros_like(self.theta), torch.empty_like(self.factor)
        iterations, objectives = torch.zeros_like(self.index), torch.empty_like(self.factor)
        for group, span in self.spans():
            weights[span, :, self.space.rank] = torch.where(group.absent, float("-inf"), 0.0).to(weights.dtype)
        norm = (self.theta.square() * self.shrink).sum((1, 2), dtype=torch.float64) / 2
        loss = self.evaluate(torch.zeros_like(self.factor), None)[0]
        value, gradient = loss + norm, self.gradient()
        diagonal = self.diagonal()
        for step in range(max_iterations + 1):
            last = step == max_iterations
            if step % look == 0 or last:
                largest = self.largest(gradient, torch.inf if last else tolerance)
                over = (largest <= tolerance) | (self.failures >= 3) | last
                if bool(over.any()):
                    if bool(largest[over].isinf().any()):
                        largest = self.largest(gradient, torch.inf)
                    where = self.index[over]
                    weights[where] = torch.where(weights[where].isinf(), weights[where], self.theta[over])
                    gradients[where], iterations[where] = largest[over], step
                    objectives[where] = (value * self.factor)[over]
                    keep = (~over).nonzero().flatten()
                    if not len(keep):
                        break
                    self.select(keep)
                    value, norm, gradient, diagonal = value[keep], norm[keep], gradient[keep], diagonal[keep]
            if step % REFRESH == 0 and step:
                diagonal = self.diagonal()
                self.history.rescale(diagonal)
            value, norm, gradient = self.step(value, norm, gradient, diagonal)
        return Fits(weights, gradients, iterations, objectives)

    def spans(self) -> list[tuple[_Group, slice]]:
        """The groups, each with its place among the problems."""
        ends = itertools.accumulate(group.size for group in self.groups)
        return [(group, slice(end - group.size, end)) for group, end in zip(self.groups, ends, strict=True)]

    def evaluate(self, length: Tensor, open_: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean losses and slopes, float64 [P], at ``length`` [P]; groups with nothing in ``open_`` (CPU) give NaN."""
        losses, slopes = torch.full_like(length, torch.nan), torch.full_like(length, torch.nan)
        for group, span in self.spans():
            if open_ is None or bool(open_[span].any()):
                losses[span], slopes[span] = group.evaluate(length[span].to(self.theta.dtype))
        return losses, slopes

    def gradient(self) -> Tensor:
        out = torch.empty_like(self.theta)
        for group, span in self.spans():
            group.gradient(out[span])
        return out.addcmul_(self.theta, self.shrink)

    def diagonal(self) -> Tensor:
        """The preconditioner, [P, C R]. Where nothing curves (a class long settled, the filling columns) it is held
        within float32's range; the gradient there is 0 as well."""
        bound = torch.cat([group.curvature() for group in self.groups]).add_(self.shrink)
        bound[..., self.space.rank + 1 :] = 1
        return bound.clamp_min_(1e-20).reciprocal_().flatten(1)

    def largest(self, gradient: Tensor, tolerance: float) -> Tensor:
        """The largest entry of each gradient in the coordinates of the features, float64 [P], infinite where the
        gradient is too long for all its entries to be within ``tolerance``: turning it back is not free."""
        rank, space = self.space.rank, self.space
        intercept = gradient[..., rank]
        length = gradient[..., :rank].norm(dim=(1, 2))
        classes, width = gradient.shape[1], len(space.mean)
        most = tolerance * (math.sqrt(classes * width) + math.sqrt(classes) * space.length)
        close = ((length <= most) & (intercept.abs().amax(1) <= tolerance)).nonzero().flatten()
        found = torch.full_like(self.factor, torch.inf)
        if len(close):
            turned = gradient[close, :, :rank] @ space.basis.T
            turned.addcmul_(intercept[close, :, None], space.mean)
            found[close] = torch.maximum(turned.abs().amax((1, 2)), intercept[close].abs().amax(1)).double()
        return found

    def select(self, keep: Tensor) -> None:
        """Go on with the problems ``keep``, int64 [P']."""
        left = []
        for group, span in self.spans():
            inside = keep[(keep >= span.start) & (keep < span.stop)] - span.start
            if len(inside):
                group.select(inside)
                left.append(group)
        self.groups = left
        self.history.select(keep)
        self.theta, self.shrink, self.factor = self.theta[keep], self.shrink[keep], self.factor[keep]
        self.index, self.failures = self.index[keep], self.failures[keep]

    def step(self, value: Tensor, norm: Tensor, gradient: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step of every problem: the new objectives, penalties and gradients."""
        flat = gradient.flatten(1)
        direction = self.history.direction(flat, diagonal)
        slope = (direction * flat).sum(1, dtype=torch.float64)
        uphill = ~(slope < 0)
        if self.theta.is_cuda or bool(uphill.any()):
            self.history.forget(uphill)
            direction = torch.where(uphill[:, None], -diagonal * flat, direction)
            slope = (direction * flat).sum(1, dtype=torch.float64)
        shaped = direction.view_as(self.theta)
        for group, span in self.spans():
            group.move(shaped[span])
        weighted = shaped * self.shrink
        bend = (weighted * shaped).sum((1, 2), dtype=torch.float64)
        pull = (weighted * self.theta).sum((1, 2), dtype=torch.float64)
        length, after = self.search(value, norm, slope, pull, bend)
        # Neither a step nor a decrease that the numbers can show: the problem is as good as its precision.
        noise = torch.finfo(self.theta.dtype).eps * 1e-3 * value.abs()
        idle = (length == 0) | (-slope <= noise)
        self.failures = torch.where(idle, self.failures + 1, 0)
        short = length.to(self.theta.dtype)
        for group, span in self.spans():
            group.advance(short[span])
        direction *= short[:, None]
        self.theta += shaped
        new = self.gradient()
        self.history.push(direction, (new - gradient).flatten(1), diagonal)
        if self.theta.is_cuda or bool((length == 0).any()):
            self.history.forget(length == 0)
        return after, norm + length * pull + length.square() * bend / 2, new

    def search(self, value: Tensor, norm: Tensor, slope: Tensor, pull: Tensor, bend: Tensor) -> tuple[Tensor, Tensor]:
        """How far along the direction, and the objective there; 0 where nothing lower was found.

        The function is convex along the line, so its slope says on which side the minimum lies; accepted is what is no
        higher than the start and at most 0.9 times as steep (Wolfe's condition).
        """
        cpu = not self.theta.is_cuda
        length = torch.ones_like(value)
        low, high = torch.zeros_like(value), torch.full_like(value, torch.inf)
        low_slope, high_slope = slope, torch.zeros_like(value)
        at, steep = torch.full_like(value, torch.nan), slope
        fine = torch.zeros_like(value, dtype=torch.bool)
        slack = 8 * torch.finfo(self.theta.dtype).eps * value.abs()
        for trial in range(TRIALS_CPU if cpu else TRIALS_CUDA):
            if trial:
                width = high - low
                secant = low + width * (low_slope / (low_slope - high_slope)).nan_to_num(0.5)
                inside = torch.minimum(torch.maximum(secant, low + 0.1 * width), high - 0.1 * width)
                newton = length * (slope / (slope - steep))
                beyond = torch.where(steep > slope, newton, torch.inf).clamp(1.5 * length, 6 * length)
                length = torch.where(fine, length, torch.where(high.isfinite(), inside, beyond))
            loss, rise = self.evaluate(length, ~fine if cpu else None)
            here = loss + norm + length * pull + length.square() * bend / 2
            known = ~loss.isnan()
            at = torch.where(known, here, at)
            steep = torch.where(known, rise + pull + length * bend, steep)
            lower = at <= value + slack
            fine = lower & (steep.abs() <= -0.9 * slope)
            if cpu and bool(fine.all()):
                break
            right = ~fine & ((steep > 0) | ~lower)
            left = ~fine & ~right
            high, high_slope = torch.where(right, length, high), torch.where(right, steep, high_slope)
            low, low_slope = torch.where(left, length, low), torch.where(left, steep, low_slope)
        stuck = ~(at <= value + slack)
        if not cpu or bool(stuck.any()):
            length = length.masked_fill(stuck, 0.0)
            # The residuals have to be those of the point that is taken.
            at = self.evaluate(length, None)[0] + norm + length * pull + length.square() * bend / 2
        return length, at
