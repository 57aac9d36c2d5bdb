"""The coordinates that a linear probe is solved in: the eigenbasis of the features' covariance."""

from __future__ import annotations

import torch
from torch import Tensor

# Columns of the rows' matrix are a multiple of so many: matrix products are slower otherwise.
PAD = 16
ROWS = 8192


class Space:
    """The features of a set, centred and turned into the eigenbasis of their covariance, and a column of ones.

    Args:
        features: [N, D], kept nowhere. dtype: of the solution, float32 or float64; the basis is found in float64.

    Attributes:
        rows: [N, R], R = rank + 1 filled up with zeros to a multiple of 16. basis: [D, rank]. mean: [D].
    """

    def __init__(self, features: Tensor, dtype: torch.dtype = torch.float32) -> None:
        count, width = features.shape
        mean = features.mean(0, dtype=torch.float64)
        if count <= width:
            centred = features.double() - mean
            values, left = torch.linalg.eigh(centred @ centred.T)
            # What is left of it would be rounding: the differences of equal rows, and one direction less by the mean.
            keep = values > values[-1].clamp_min(0) * count * torch.finfo(torch.float64).eps
            basis = torch.linalg.qr(centred.T @ (left[:, keep] / values[keep].sqrt())).Q
        else:
            gram = mean.new_zeros(width, width)
            for start in range(0, count, ROWS):
                centred = features[start : start + ROWS].double() - mean
                gram.addmm_(centred.T, centred)
            basis = torch.linalg.eigh(gram).eigenvectors
        self.mean, self.basis = mean.to(dtype), basis.to(dtype)
        self.rank = basis.shape[1]
        self.length = float(mean.norm())
        self.rows = self.place(features)

    def place(self, features: Tensor) -> Tensor:
        """Other features [M, D] in this space, [M, R]."""
        width = -(-(self.rank + 1) // PAD) * PAD
        out = self.mean.new_zeros(len(features), width)
        for start in range(0, len(features), ROWS):
            part = features[start : start + ROWS].to(self.mean.dtype) - self.mean
            out[start : start + ROWS, : self.rank] = part @ self.basis
        out[:, self.rank] = 1
        return out

    def raw(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [P, C, R] as those of the features themselves: [P, C, D] and intercepts [P, C]."""
        turned = weights[..., : self.rank] @ self.basis.T
        return turned, weights[..., self.rank] - turned @ self.mean
