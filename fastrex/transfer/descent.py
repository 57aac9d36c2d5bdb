"""L-BFGS for many problems at once: their histories side by side, each step a few products of whole batches.

The inverse Hessian is used in its compact form (Byrd, Nocedal and Schnabel, 1994): the 2m vectors of a history are read
twice in a step, each time in one batched product, where the usual recursion reads them four times, one by one. The
matrix that it starts from is a diagonal, which may change between steps. Nothing here waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-300


class History:
    """The last ``length`` steps s and changes of the gradient y of P problems with L unknowns each.

    A problem whose curvature s'y is not positive (rounding, or a step of length 0) has no pair there.
    """

    def __init__(self, problems: int, unknowns: int, length: int, like: Tensor) -> None:
        self.length = length
        self.steps = like.new_zeros(problems, length, unknowns)
        self.changes = torch.zeros_like(self.steps)
        # s_i'y_j and y_i'H0 y_j by slot. In double: the triangular systems can be badly conditioned.
        self.cross = like.new_zeros(problems, length, length, dtype=torch.float64)
        self.inner = torch.zeros_like(self.cross)
        self.scale = like.new_ones(problems, dtype=torch.float64)
        self.slot = 0

    def push(self, step: Tensor, change: Tensor, diagonal: Tensor) -> None:
        """Remember a step [P, L] and the change of the gradient over it [P, L]; ``diagonal`` as in ``direction``."""
        at = self.slot
        self.steps[:, at] = step
        self.changes[:, at] = change
        self.cross[:, at] = _products(self.changes, step)
        self.cross[:, :, at] = _products(self.steps, change)
        self.inner[:, at] = _products(self.changes, diagonal * change)
        self.inner[:, :, at] = self.inner[:, at]
        curvature, weight = self.cross[:, at, at], self.inner[:, at, at]
        good = (curvature > 0) & (weight > 0)
        self.scale = torch.where(good, curvature / weight.clamp_min(TINY), self.scale)
        self.cross[:, at, at] = torch.where(good, curvature, 0.0)
        self.slot = (at + 1) % self.length

    def rescale(self, diagonal: Tensor) -> None:
        """Use another initial diagonal [P, L]: the products with it are made anew."""
        for at in range(self.length):
            self.inner[:, at] = _products(self.changes, diagonal * self.changes[:, at])
        newest = (self.slot - 1) % self.length
        curvature, weight = self.cross[:, newest, newest], self.inner[:, newest, newest]
        self.scale = torch.where((curvature > 0) & (weight > 0), curvature / weight.clamp_min(TINY), 1.0)

    def forget(self, which: Tensor) -> None:
        """Drop the pairs of the problems ``which``, bool [P]."""
        self.cross.masked_fill_(which[:, None, None], 0.0)
        self.scale.masked_fill_(which, 1.0)

    def select(self, where: Tensor) -> None:
        """Keep the problems ``where``, int64."""
        self.steps, self.changes = self.steps[where], self.changes[where]
        self.cross, self.inner, self.scale = self.cross[where], self.inner[where], self.scale[where]

    def direction(self, gradient: Tensor, diagonal: Tensor) -> Tensor:
        """-H gradient [P, L], where H is the inverse Hessian that the pairs imply over a multiple of ``diagonal``."""
        order = torch.arange(self.slot, self.slot + self.length, device=gradient.device) % self.length
        own = self.cross.diagonal(dim1=1, dim2=2)[:, order]
        valid = (own > 0).double()
        both = valid[:, :, None] * valid[:, None]
        gamma = self.scale[:, None]
        upper = torch.triu(self.cross[:, order][:, :, order]) * both + torch.diag_embed(1 - valid)
        inner = self.inner[:, order][:, :, order] * both * gamma[:, :, None]
        along_steps = _products(self.steps, gradient)[:, order] * valid
        along_changes = _products(self.changes, diagonal * gradient)[:, order] * valid * gamma
        first = torch.linalg.solve_triangular(upper, along_steps[:, :, None], upper=True)
        middle = own[:, :, None] * first + inner @ first - along_changes[:, :, None]
        second = torch.linalg.solve_triangular(upper.mT, middle, upper=False)
        weights = torch.zeros_like(self.cross[:, :2])
        weights[:, 0, order], weights[:, 1, order] = second.squeeze(2), -first.squeeze(2)
        weights = weights.to(gradient.dtype)
        moved = torch.baddbmm(gradient[:, None], weights[:, 1:], self.changes).squeeze(1)
        moved *= diagonal
        moved *= gamma.to(gradient.dtype)
        return torch.baddbmm(moved[:, None], weights[:, :1], self.steps).squeeze(1).neg_()


def _products(vectors: Tensor, other: Tensor) -> Tensor:
    """[P, m, L] with [P, L]: float64 [P, m]. As a row times a matrix, which BLAS reads at memory bandwidth."""
    return (other[:, None] @ vectors.mT).squeeze(1).double()
