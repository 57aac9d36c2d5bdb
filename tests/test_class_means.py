"""Prototypes and the ring: worked examples, the published semantics, randomised comparison with a plain loop."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastrex_kernels import _cpp, bank_update_, class_means

CPP = pytest.param("cpp", marks=pytest.mark.skipif(not _cpp.LOADED, reason=_cpp.REASON or "loaded"))
both = pytest.mark.parametrize("impl", ["reference", CPP])


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


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


def bank(rows: int, dim: int, classes: int, seed: int = 0, dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dim, generator=g).to(dtype), torch.randint(classes, (rows,), generator=g)


@pytest.mark.parametrize("impl", [CPP])
@pytest.mark.parametrize(("rows", "dim", "classes"), [(3000, 200, 50), (4000, 256, 1), (9000, 131, 2)])
def test_threads_never_show_in_the_bits(rows: int, dim: int, classes: int, impl: str, threads: None) -> None:
    z, y = bank(rows, dim, classes)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(class_means(z, y, classes, impl=impl)[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("impl", [CPP])
def test_rows_of_a_class_are_added_in_slot_order(impl: str) -> None:
    # 2^24 + 1 + 1 is 2^24 in float32, 1 + 1 + 2^24 is not: only the order tells them apart.
    big, one = 2.0**24, 1.0
    for rows, expected in (((big, one, one), big), ((one, one, big), big + 2)):
        z = torch.tensor([[row, big] for row in rows]).repeat_interleave(2, 0)
        prototypes, _ = class_means(z, torch.tensor([0, 1] * 3), 2, impl=impl)
        assert prototypes[0].tolist() == pytest.approx(
            [expected / (expected**2 + (3 * big) ** 2) ** 0.5] * 1 + [3 * big / (expected**2 + (3 * big) ** 2) ** 0.5],
            rel=1e-6,
        )


@pytest.mark.parametrize("impl", [CPP])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prototypes_stay_equal_to_a_recompute_over_ten_thousand_updates(impl: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    classes, dim, size = 23, 19, 101
    z, y = bank(size, dim, classes, dtype=dtype)
    p = torch.zeros(1, dtype=torch.int64)
    prototypes, counts = class_means(z, y, classes, impl=impl)
    wraps = 0
    for step in range(10_000):
        count = int(torch.randint(1, 14, (1,), generator=g))
        keep = None if step % 3 else torch.rand((), generator=g) < 0.8
        before = int(p)
        rows = torch.randn(count, dim, generator=g)
        labels = torch.randint(classes, (count,), generator=g)
        bank_update_(z, y, p, rows, labels, keep=keep, prototypes=prototypes, counts=counts, impl=impl)
        wraps += int(p) < before
        fresh, number = class_means(z, y, classes, impl=impl)
        assert torch.equal(prototypes, fresh), step
        assert torch.equal(counts, number), step
    assert wraps > 500


@both
def test_only_touched_classes_are_written(impl: str) -> None:
    z, y = bank(30, 4, 6)
    y[:] = torch.arange(30) % 6
    prototypes, counts = torch.full((6, 4), torch.nan), torch.full((6,), -5)
    p = torch.tensor([1])
    bank_update_(z, y, p, torch.ones(2, 4), torch.tensor([5, 5]), prototypes=prototypes, counts=counts, impl=impl)
    # Slots 1 and 2 held classes 1 and 2 and hold class 5 now.
    assert prototypes.isnan().any(1).tolist() == [True, False, False, True, True, False]
    assert counts.tolist() == [-5, 4, 4, -5, -5, 7]


@both
def test_an_empty_slot_counts_for_no_class_while_the_ring_fills(impl: str) -> None:
    z, y, p = ring(5)
    prototypes, counts = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
    rows = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    bank_update_(z, y, p, rows, torch.tensor([2, 0]), prototypes=prototypes, counts=counts, impl=impl)
    assert prototypes.tolist() == [[0, 1], [0, 0], [1, 0]]
    assert counts.tolist() == [1, 0, 1]


@both
def test_a_bad_label_raises_before_anything_is_written(impl: str) -> None:
    z, y = bank(10, 3, 4)
    before, p = z.clone(), torch.zeros(1, dtype=torch.int64)
    prototypes, counts = class_means(z, y, 4, impl=impl)
    for bad in (-1, 4):
        with pytest.raises(ValueError, match=rf"bank_update_: labels must be in \[0, 4\), got {bad}"):
            bank_update_(
                z, y, p, torch.ones(2, 3), torch.tensor([0, bad]), prototypes=prototypes, counts=counts, impl=impl
            )
    assert torch.equal(z, before)
    assert int(p) == 0


@both
def test_a_bad_label_of_the_bank_is_named(impl: str) -> None:
    for bad in (-1, 3, 2**40):
        with pytest.raises(ValueError, match=rf"class_means: labels must be in \[0, 3\), got {bad}$"):
            class_means(torch.zeros(2, 3), torch.tensor([0, bad]), 3, impl=impl)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": None}, "prototypes and counts must be given together, got no counts"),
        ({"prototypes": None}, "prototypes and counts must be given together, got no prototypes"),
        ({"prototypes": torch.zeros(3, 9)}, r"prototypes must be torch.float32 \[C, 2\]"),
        ({"prototypes": torch.zeros(3, 2, dtype=torch.float64)}, r"prototypes must be torch.float32 \[C, 2\]"),
        ({"counts": torch.zeros(4, dtype=torch.int64)}, r"counts must be int64 \[3\]"),
        ({"prototypes": torch.zeros(2, 3).T}, "must be contiguous"),
        ({"keep": torch.tensor([True])}, "keep must be a 0-d bool tensor"),
    ],
)
def test_bad_prototypes_are_named(change: dict[str, torch.Tensor | None], message: str) -> None:
    z, y, p = ring(4)
    given = {"prototypes": torch.zeros(3, 2), "counts": torch.zeros(3, dtype=torch.int64), **change}
    with pytest.raises(ValueError, match=message):
        bank_update_(z, y, p, torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), **given)


@pytest.mark.skipif(not _cpp.LOADED, reason=_cpp.REASON or "loaded")
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_meets_the_reference(level: str) -> None:
    # Read once per process, hence one of its own. A level that this CPU lacks runs the best one it has.
    code = """
import torch
from fastrex_kernels import bank_update_, class_means
g = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for dim in (1, 7, 64, 333):
        z, y = torch.randn(200, dim, generator=g).to(dtype), torch.randint(9, (200,), generator=g)
        means = class_means(z, y, 9, impl="cpp")
        torch.testing.assert_close(means, class_means(z.double().float(), y, 9, impl="reference"))
        p, rows = torch.tensor([190]), torch.randn(20, dim, generator=g)
        bank_update_(z, y, p, rows, torch.arange(20) % 9, prototypes=means[0], counts=means[1], impl="cpp")
        assert all(map(torch.equal, means, class_means(z, y, 9, impl="cpp")))
"""
    path = str(Path(__file__).parents[1] / "kernels")
    environment = {**os.environ, "FASTREX_ISA": level, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.skipif(not _cpp.LOADED, reason=_cpp.REASON or "loaded")
def test_raw_operators_keep_their_schemas() -> None:
    z, y = bank(12, 5, 4)
    torch.library.opcheck(torch.ops.fastrex.class_means.default, (z, y, 4))
    means = class_means(z, y, 4)
    p, new = torch.tensor([10]), bank(3, 5, 4, seed=1)
    for extra in ((None, None, None), (torch.tensor(True), *means)):
        torch.library.opcheck(torch.ops.fastrex.bank_update_.default, (z, y, p, *new, *extra))


@both
def test_compiled_in_one_graph(impl: str) -> None:
    def step(z, y, p, rows, labels, prototypes, counts):
        bank_update_(z, y, p, rows, labels, prototypes=prototypes, counts=counts, impl=impl)
        return class_means(z, y, 4, impl=impl)

    def arguments():
        z, y = bank(12, 5, 4)
        return (z, y, torch.tensor([10]), *bank(3, 5, 4, seed=1), *class_means(z, y, 4, impl=impl))

    plain, compiled = arguments(), arguments()
    expected = step(*plain)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    assert all(map(torch.equal, (*expected, *plain), (*got, *compiled)))
