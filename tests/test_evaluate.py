"""k-NN by hand and against a plain loop; the bank's rows do not depend on the number of ranks."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fastrex.data.index import build
from fastrex.evaluate import knn_rows, knn_scores


def test_worked_example() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 2.0], [-1.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 0])
    scores = knn_scores(bank, labels, torch.tensor([[5.0, 0.0]]), 3, k=2, temperature=0.5)
    # The two nearest have cosines 1 and 0.6; weights are relative to the nearest one.
    assert scores[0].tolist() == pytest.approx([1.0, math.exp(-0.8), 0.0])


def test_against_a_plain_loop_and_in_chunks() -> None:
    g = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(60, 8, generator=g), torch.randn(37, 8, generator=g)
    labels = torch.randint(5, (60,), generator=g)
    whole = knn_scores(bank, labels, queries, 5, k=20, temperature=0.07)
    torch.testing.assert_close(whole, knn_scores(bank, labels, queries, 5, k=20, temperature=0.07, budget=4096))
    cosine = torch.nn.functional.cosine_similarity(queries[:, None], bank[None], dim=2)
    for row in range(len(queries)):
        near = cosine[row].argsort(descending=True)[:20]
        votes = [
            sum(math.exp((cosine[row, j] - cosine[row, near[0]]) / 0.07) for j in near if labels[j] == c)
            for c in range(5)
        ]
        assert whole[row].tolist() == pytest.approx(votes, rel=1e-4, abs=1e-6)


def test_k_is_capped_at_the_bank() -> None:
    assert knn_scores(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), 2, k=20, temperature=0.07).shape == (2, 2)


def test_rows_per_class(stripes: Path) -> None:
    index = build(stripes)
    rows = index.rows("train", 0.1)
    few = knn_rows(index, rows, 3)
    assert np.bincount(index.labels[few]).tolist() == [3, 3, 3, 3]
    assert set(few) <= set(rows)
    assert np.array_equal(few, np.sort(few))
    assert np.array_equal(knn_rows(index, rows[::-1], 3), few)
    assert np.array_equal(knn_rows(index, rows, 0), rows)
