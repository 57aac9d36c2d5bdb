"""The raw C++ operators of the contrastive loss, where the contract's sizes do not reach: ranges of kept slopes,
instruction sets, cold temperatures, wide ids, NaN."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import environment
from torch import Tensor

from fastrex_kernels import _cpp
from fastrex_kernels.contrastive_ce.reference import pairs, with_margin
from fastrex_kernels.cosine_ce.reference import unit_rows

pytestmark = pytest.mark.skipif(not _cpp.LOADED, reason=f"the C++ operators are not loaded: {_cpp.REASON}")
OPS = torch.ops.fastrex
FLOAT, UNFILLED = torch.float32, -100


def problem(rows: int, keys: int, dim: int, classes: int, seed: int = 0) -> tuple[Any, ...]:
    """The first eight arguments of the operators: queries, keys, ids, instances, four private keys."""
    g = torch.Generator().manual_seed(seed)
    x, k = torch.randn(rows, dim, generator=g), torch.randn(keys, dim, generator=g)
    ids, key_ids = (torch.randint(classes, (n,), generator=g) for n in (rows, keys))
    ids[::9], key_ids[::7] = UNFILLED, UNFILLED
    instance, key_instance = (torch.randint(2 * rows, (n,), generator=g) for n in (rows, keys))
    return x, k, ids, key_ids, instance, key_instance, min(4, keys), UNFILLED


def exact(arguments: tuple[Any, ...], temperature: float, hardness: float, kind: int, margin: float) -> list[Tensor]:
    """stats, counts, gradients for coefficients of one, in float64."""
    x, k, *rest = arguments
    x, k = (t.double().requires_grad_() for t in (x, k))
    cosine = unit_rows(x) @ unit_rows(k).T
    positive, negative = pairs(*rest)
    own, logits = with_margin(cosine, kind, margin) / temperature, cosine / temperature
    nothing = torch.tensor(-torch.inf, dtype=torch.float64)

    def lse(values: Tensor, mask: Tensor) -> Tensor:
        some = mask.any(dim=1)
        return torch.where(some, torch.where(mask | ~some[:, None], values, nothing).logsumexp(dim=1), nothing)

    hard = lse(hardness * logits, negative) if hardness else nothing.expand(len(x))
    stats = [
        lse(own, positive), torch.where(positive, own, 0.0).sum(dim=1), lse((1 + hardness) * logits, negative), hard,
        torch.where(positive, logits, nothing).amax(dim=1), torch.where(negative, logits, nothing).amax(dim=1),
    ]  # fmt: skip
    # The sums' derivatives are the slopes with A = B = 1, C = 1 + hardness and H = -hardness.
    finite = [t[t.isfinite()].sum() for t in stats[:4]]
    dx, dk = torch.autograd.grad(sum(finite, torch.zeros(())), (x, k))
    counts = torch.stack((positive.sum(dim=1), negative.sum(dim=1)))
    return [torch.stack(stats).detach(), counts, dx, dk]


def ours(arguments: tuple[Any, ...], *options: Any, learnt: int | None = None) -> list[Tensor]:
    stats, counts = OPS.contrastive_ce(*arguments, *options, FLOAT)
    hardness = options[1]
    coefficients = torch.tensor([1.0, 1.0, 1 + hardness, -hardness])[:, None].expand(4, counts.shape[1])
    learnt = arguments[1].shape[0] if learnt is None else learnt
    return [
        stats, counts, *OPS.contrastive_ce_backward(*arguments, *options, FLOAT, stats, coefficients, True, learnt)
    ]  # fmt: skip


def check(got: list[Tensor], truth: list[Tensor], rtol: float) -> None:
    assert torch.equal(got[1], truth[1])
    assert torch.equal(got[0].isinf(), truth[0].isinf())
    torch.testing.assert_close(got[0].double(), truth[0], rtol=rtol, atol=rtol * 10)
    for a, b in zip(got[2:], truth[2:], strict=True):
        assert float((a.double() - b[: len(a)]).abs().max()) <= rtol * float(b.abs().max())


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        pytest.param((600, 9001, 9, 50), (0.1, 0.0, 0, 0.0), id="two ranges of learnt keys, the last block short"),
        pytest.param((5, 5003, 17, 3), (0.07, 1.0, 1, 0.2), id="few queries: the keys are split"),
        pytest.param((60, 130, 2051, 4), (0.1, 0.5, 0, 0.0), id="many features"),
        pytest.param((200, 700, 20, 9), (0.002, 0.0, 0, 0.0), id="cold: exponents span a thousand"),
        pytest.param((200, 4700, 20, 9), (0.004, 1.0, 1, 0.3), id="cold, weighted and split"),
        pytest.param((49, 300, 20, 2), (0.01, 0.7, 2, 0.4), id="cold with an angular margin"),
    ],
)  # fmt: skip
def test_equals_float64(sizes: tuple[int, ...], options: tuple[Any, ...]) -> None:
    arguments = problem(*sizes)
    truth = exact(arguments, *options)
    rtol = 3e-6 if options[0] > 0.05 else 3e-5  # a rounding of the cosine is divided by the temperature
    check(ours(arguments, *options), truth, rtol)
    part = ours(arguments, *options, learnt=33)
    check(part, [*truth[:3], truth[3][:33]], rtol)
    x, k, *rest = arguments  # columns first
    across = (x.T.contiguous().T, k.T.contiguous().T, *rest)
    assert all(torch.equal(a, b) for a, b in zip(ours(across, *options), ours(arguments, *options), strict=True))


@pytest.mark.parametrize("sizes", [(600, 9001, 9, 50), (7, 5003, 17, 3)])
@pytest.mark.parametrize("temperature", [0.1, 0.004])
def test_threads_change_no_bit(sizes: tuple[int, ...], temperature: float) -> None:
    arguments, threads, results = problem(*sizes), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append([*ours(arguments, temperature, 0.5, 1, 0.1), *OPS.nearest_keys(*arguments, 11, FLOAT)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets_agree(isa: str) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(__file__).rpartition("/")[0]!r})
import torch
import test_contrastive_cpp as t
for sizes, options in (((61, 333, 37, 5), (0.1, 0.5, 2, 0.3)), ((30, 2500, 70, 3), (0.005, 1.0, 1, 0.2))):
    arguments = t.problem(*sizes)
    t.check(t.ours(arguments, *options), t.exact(arguments, *options), 3e-5)
    t.check_nearest(arguments, 9)
print("agrees")
"""
    run = subprocess.run(
        [sys.executable, "-c", code], env={**environment(), "FASTREX_ISA": isa}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert run.stdout == "agrees\n", run.stderr


def check_nearest(arguments: tuple[Any, ...], k: int) -> None:
    cosine = unit_rows(arguments[0].double()) @ unit_rows(arguments[1].double()).T
    positive, negative = pairs(*arguments[2:])
    inside = torch.where(positive | negative, cosine, -torch.inf)
    value, index = OPS.nearest_keys(*arguments, k, FLOAT)
    expected = inside.sort(dim=1, descending=True).values[:, :k]
    assert torch.equal(index < 0, expected.isinf())
    torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6)
    named = torch.where(index < 0, -torch.inf, inside.gather(1, index.clamp(min=0)))
    torch.testing.assert_close(named, expected, rtol=0, atol=1e-6)
    for row in index:
        assert row[row >= 0].unique().numel() == int((row >= 0).sum())


@pytest.mark.parametrize(("sizes", "k"), [((203, 3000, 33, 5), 40), ((3, 9000, 20, 5), 100), ((20, 60, 8, 3), 60)])
def test_nearest_keys(sizes: tuple[int, ...], k: int) -> None:
    check_nearest(problem(*sizes), k)


def test_equal_cosines_come_by_their_index() -> None:
    # 0 is the cosine of a zero key, -0 that of an orthogonal one.
    keys = torch.zeros(700, 2)
    keys[::3] = torch.tensor([0.0, -1.0])
    keys[13], keys[600] = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])
    ids, key_ids = torch.zeros(20, dtype=torch.int64), torch.ones(700, dtype=torch.int64)
    value, index = OPS.nearest_keys(
        torch.tensor([[1.0, 0.0]]).expand(20, 2), keys, ids, key_ids, None, None, 0, UNFILLED, 5, FLOAT
    )
    assert torch.equal(index, torch.tensor([13, 600, 0, 1, 2]).expand(20, 5))
    assert torch.equal(value, torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]).expand(20, 5))


def test_ids_that_agree_in_their_lower_half_differ() -> None:
    x, k, ids, key_ids, instance, key_instance, private, _ = problem(40, 90, 12, 4)
    high = torch.where(torch.arange(90) % 2 == 0, 1 << 32, 0)
    ids = torch.where(ids < 0, ids, ids + (1 << 32))
    key_ids = torch.where(key_ids < 0, key_ids, key_ids + high)
    arguments = (x, k, ids, key_ids, instance + (1 << 40), key_instance + (1 << 40) - high, private, UNFILLED)
    check(ours(arguments, 0.1, 0.0, 0, 0.0), exact(arguments, 0.1, 0.0, 0, 0.0), 3e-6)


@pytest.mark.parametrize("temperature", [0.1, 0.004])
def test_a_nan_is_seen_and_stays_in_its_row(temperature: float) -> None:
    arguments = problem(50, 200, 12, 4)
    x, ids = arguments[0], arguments[2]
    clean, *_ = OPS.contrastive_ce(*arguments, temperature, 1.0, 0, 0.0, FLOAT)
    x[3, 5], x[9, 0] = torch.nan, torch.nan
    assert ids[3] != UNFILLED
    assert ids[9] == UNFILLED  # nobody looks at this one
    stats, counts, dx, _ = ours(arguments, temperature, 1.0, 0, 0.0)
    assert stats[:, 3].isnan().all()
    assert dx[3].isnan().all()
    others = torch.arange(50) != 3
    assert torch.equal(stats[:, others], clean[:, others])
    assert dx[others].isfinite().all()
    assert torch.equal(counts[:, 9], torch.zeros(2, dtype=torch.int64))
    value, index = OPS.nearest_keys(*arguments, 6, FLOAT)
    assert value[3].isnan().all()
    assert (index[3] >= 0).all()
    assert value[others].isfinite().logical_or(value[others].isneginf()).all()


def test_coefficients_of_zero_give_zero() -> None:
    arguments = problem(50, 200, 12, 4)
    stats, _ = OPS.contrastive_ce(*arguments, 0.1, 1.0, 0, 0.0, FLOAT)
    stats[:, ::2], coefficients = -torch.inf, torch.ones(4, 50)
    stats[:, 1], coefficients[:, ::2], coefficients[:, 1] = torch.nan, 0.0, 0.0
    dx, dk = OPS.contrastive_ce_backward(*arguments, 0.1, 1.0, 0, 0.0, FLOAT, stats, coefficients, True, 200)
    assert torch.equal(dx[::2], torch.zeros(25, 12))
    assert torch.equal(dx[1], torch.zeros(12))
    assert dk.isfinite().all()
    assert dx[3].abs().sum() > 0
