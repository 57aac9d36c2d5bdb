"""Prototypes and the ring: worked examples, the published semantics, randomised comparison with a plain loop."""

from __future__ import annotations

import pytest
import torch

from fastrex_kernels import bank_update_, class_means


def test_worked_example() -> None:
    z = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, -2.0], [1.0, 0.0]])
    prototypes, counts = class_means(z, torch.tensor([0, 0, 2, 0]), 4)
    # Class 0: sum (4, 4), un-normalised rows weigh by their norm; class 1 and 3 are empty; class 2 points down.
    half = 0.5**0.5
    torch.testing.assert_close(prototypes, torch.tensor([[half, half], [0, 0], [0, -1.0], [0, 0]]))
    assert counts.tolist() == [3, 0, 1, 0]


def test_norms_weigh_the_rows() -> None:
    z = torch.tensor([[10.0, 0.0], [0.0, 1.0]])
    prototypes, _ = class_means(z, torch.tensor([0, 0]), 1)
    assert prototypes[0, 0] > 0.99


def test_prototypes_carry_no_gradient_and_keep_the_dtype() -> None:
    z = torch.randn(6, 3, requires_grad=True)
    prototypes, _ = class_means(z, torch.arange(6), 6)
    assert not prototypes.requires_grad
    assert class_means(z.double(), torch.arange(6), 6)[0].dtype == torch.float64
    assert class_means(z.bfloat16(), torch.arange(6), 6)[0].dtype == torch.float32


def test_a_nan_in_the_bank_shows_in_its_prototype() -> None:
    z = torch.ones(3, 2)
    z[1, 0] = torch.nan
    prototypes, _ = class_means(z, torch.tensor([0, 1, 0]), 3)
    assert prototypes.isnan().any(1).tolist() == [False, True, False]


def ring(size: int, dim: int = 2):
    return torch.zeros(size, dim), torch.full((size,), -1), torch.zeros(1, dtype=torch.int64)


def test_surplus_is_dropped_and_the_pointer_wraps() -> None:
    z, y, p = ring(5)
    for value, count in ((1, 3), (2, 3), (3, 2)):
        bank_update_(z, y, p, torch.full((count, 2), float(value)), torch.full((count,), value))
        if value == 2:
            # Rows 3 and 4 fit, the third one is dropped, the pointer is back at the start.
            assert y.tolist() == [1, 1, 1, 2, 2]
            assert p.item() == 0
    assert y.tolist() == [3, 3, 1, 2, 2]
    assert z[:, 0].tolist() == [3, 3, 1, 2, 2]
    assert p.item() == 2


def test_exact_fit_wraps_too() -> None:
    z, y, p = ring(4)
    bank_update_(z, y, p, torch.ones(4, 2), torch.arange(4))
    assert p.item() == 0
    assert y.tolist() == [0, 1, 2, 3]


def test_a_batch_larger_than_the_ring_fills_it_once() -> None:
    z, y, p = ring(3)
    bank_update_(z, y, p, torch.arange(10.0).reshape(5, 2), torch.arange(5))
    assert y.tolist() == [0, 1, 2]
    assert z[2].tolist() == [4.0, 5.0]
    assert p.item() == 0


def test_keep_false_changes_no_bit() -> None:
    z, y, p = ring(4)
    bank_update_(z, y, p, torch.full((3, 2), torch.nan), torch.arange(3), keep=torch.tensor(False))
    assert not z.any()
    assert y.tolist() == [-1] * 4
    assert p.item() == 0
    bank_update_(z, y, p, torch.ones(3, 2), torch.arange(3), keep=torch.tensor(True))
    assert p.item() == 3


def test_against_a_plain_loop_over_many_updates() -> None:
    g = torch.Generator().manual_seed(0)
    size, pointer = 37, 0
    z, y, p = ring(size, 3)
    model: list[tuple[list[float], int]] = [([0.0] * 3, -1)] * size
    for _ in range(500):
        count = int(torch.randint(1, 20, (1,), generator=g))
        rows, labels = torch.randn(count, 3, generator=g), torch.randint(9, (count,), generator=g)
        bank_update_(z, y, p, rows, labels)
        fits = min(count, size - pointer)
        model[pointer : pointer + fits] = list(zip(rows[:fits].tolist(), labels[:fits].tolist(), strict=True))
        pointer = pointer + count if pointer + count < size else 0
        assert p.item() == pointer
    assert y.tolist() == [label for _, label in model]
    assert z.tolist() == [row for row, _ in model]


@pytest.mark.parametrize(
    ("labels", "classes", "kind", "message"),
    [
        (torch.tensor([0, 9]), 3, ValueError, r"labels must be in \[0, 3\), got 9"),
        (torch.tensor([0, -1]), 3, ValueError, r"labels must be in \[0, 3\), got -1"),
        (torch.tensor([0, 1], dtype=torch.int32), 3, TypeError, "labels must be int64"),
        (torch.tensor([0]), 3, ValueError, r"labels must be \[2\]"),
        (torch.tensor([0, 1]), 0, ValueError, "num_classes must be at least 1"),
    ],
)
def test_bad_input_is_named(labels: torch.Tensor, classes: int, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        class_means(torch.zeros(2, 3), labels, classes)


def test_bad_ring_is_named() -> None:
    z, y, p = ring(4)
    with pytest.raises(ValueError, match=r"features must be \[B, 2\]"):
        bank_update_(z, y, p, torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"pointer must be int64 \[1\]"):
        bank_update_(z, y, torch.zeros(()), torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))
