"""Values and gradients of the contrastive cross-entropy: by hand, in loops, invariances, neutral values, NaN."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contrastive import data, each_impl, in_loops, loss_of

from fastrex_kernels import Mixtures, contrastive_cross_entropy, nearest_keys
from fastrex_kernels.contrastive_ce import cases, listed


@each_impl
def test_supcon_by_hand(impl: str) -> None:
    x = torch.tensor([[2.0, 0.0], [3.0, 4.0], [0.0, 0.5], [-1.0, 0.0]])
    ids, own = torch.tensor([0, 0, 0, 1]), torch.arange(4)
    # Cosines: 0-1 0.6, 0-2 0, 0-3 -1, 1-2 0.8, 1-3 -0.6, 2-3 0; logits are twice as large.
    e = math.exp
    denominators = [e(1.2) + e(0) + e(-2), e(1.2) + e(1.6) + e(-1.2), e(0) + e(1.6) + e(0)]
    means = [(1.2 + 0.0) / 2, (1.2 + 1.6) / 2, (0.0 + 1.6) / 2]
    # The last image is the only one of its class: loss 0.
    wanted = [math.log(d) - m for d, m in zip(denominators, means, strict=True)] + [0.0]
    options = {"instance": own, "key_instance": own, "temperature": 0.5, "impl": impl}
    rows, stats = contrastive_cross_entropy(x, x, ids, ids, reduction="none", return_stats=True, **options)
    assert rows.tolist() == pytest.approx(wanted, rel=1e-6)
    assert rows[3] == 0
    assert stats.positives.tolist() == [2, 2, 2, 0]
    assert stats.negatives.tolist() == [1, 1, 1, 3]
    assert stats.hit.tolist() == [True, True, True, False]
    assert loss_of(x, x, ids, ids, **options).item() == pytest.approx(sum(wanted) / 4, rel=1e-6)
    assert loss_of(x, x, ids, ids, reduction="sum", **options).item() == pytest.approx(sum(wanted), rel=1e-6)


@each_impl
def test_the_log_of_the_sum_by_hand(impl: str) -> None:
    x, keys = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.6, 0.8]])
    ids, key_ids = torch.tensor([7]), torch.tensor([7, 7, 3, 4])
    positive, negative = math.exp(2) + math.exp(0), math.exp(-2) + math.exp(1.2)
    loss = loss_of(x, keys, ids, key_ids, temperature=0.5, positives="sum", impl=impl)
    assert loss.item() == pytest.approx(-math.log(positive / (positive + negative)), rel=1e-6)


@each_impl
def test_hardness_by_hand(impl: str) -> None:
    x, keys = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.8, 0.6], [0.0, 1.0], [0.6, 0.8]])
    ids, key_ids = torch.tensor([1]), torch.tensor([1, 2, 3])
    # Negatives' logits 0 and 0.6 at temperature 1.
    for a in (1.0, 0.5):
        weights = [2 / (1 + math.exp(0.6 * a)), 2 * math.exp(0.6 * a) / (1 + math.exp(0.6 * a))]
        assert sum(weights) / 2 == pytest.approx(1.0)
        wanted = math.log(math.exp(0.8) + weights[0] + weights[1] * math.exp(0.6)) - 0.8
        for detach in (False, True):
            loss = loss_of(x, keys, ids, key_ids, temperature=1.0, hardness=a, detach_hardness=detach, impl=impl)
            assert loss.item() == pytest.approx(wanted, rel=1e-6)


@each_impl
def test_mochi_by_hand(impl: str) -> None:
    x = torch.tensor([[5.0, 0.0]])
    keys = torch.tensor([[0.8, 0.6], [0.0, 2.0], [-3.0, 0.0]])
    ids, key_ids = torch.tensor([0]), torch.tensor([0, -1, -1])
    # The middle of keys 1 and 2 is (-1, 1) / 2; a quarter of the query and three of key 1 (1, 3) / 4; the third is not.
    mixtures = Mixtures(
        torch.tensor([[1, -1, -2]]), torch.tensor([[2, 1, 0]]), torch.tensor([[0.5, 0.25, 0.5]])
    )  # fmt: skip
    cosines = [0.0, -1.0, -1 / math.sqrt(2), 1 / math.sqrt(10)]
    wanted = math.log(math.exp(0.8 / 0.2) + sum(math.exp(c / 0.2) for c in cosines)) - 0.8 / 0.2
    loss, stats = contrastive_cross_entropy(
        x, keys, ids, key_ids, temperature=0.2, private=1, mixtures=mixtures, return_stats=True, impl=impl
    )
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    assert (stats.positives.item(), stats.negatives.item(), stats.hit.item()) == (1, 4, True)


@each_impl
def test_look_by_hand(impl: str) -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    keys = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.8, 0.6], [0.0, -1.0], [-0.6, 0.8]])
    ids, key_ids = torch.tensor([5, 6]), torch.tensor([5, 9, 5, 6, 9])
    options = {"temperature": 1.0, "nearest": 3, "positives": "sum", "reduction": "none", "impl": impl}
    rows, stats = contrastive_cross_entropy(x, keys, ids, key_ids, return_stats=True, **options)
    # The first query's three nearest are keys 1, 2, 0; the second's are 0, 4, 2, none of its class.
    positive = math.exp(0.8) + math.exp(0.6)
    assert rows.tolist() == pytest.approx([math.log((positive + math.exp(1.0)) / positive), 0.0], rel=1e-6)
    assert stats.positives.tolist() == [2, 0]
    assert stats.negatives.tolist() == [1, 3]
    cosine, index = nearest_keys(x, keys, 3, impl=impl)
    assert index.tolist() == [[1, 2, 0], [0, 4, 2]]
    assert cosine.flatten().tolist() == pytest.approx([1.0, 0.8, 0.6, 0.8, 0.8, 0.6], rel=1e-6)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"positives": "sum"},
    "hard": {"hardness": 1.0},
    "hard detached": {"hardness": 0.7, "detach_hardness": True},
    "hard sum": {"hardness": 0.5, "positives": "sum"},
    "cosface": {"margin": 0.3},
    "arcface": {"margin": 0.5, "margin_kind": "arcface", "positives": "sum"},
    "arcface beyond pi": {"margin": 2.0, "margin_kind": "arcface"},
    "learnt": {"learnt_keys": 9},
    "nearest": {"nearest": 7, "positives": "sum", "margin": 0.2},
    "mixtures": {"mixtures": True, "hardness": 0.5},
    "nearest and mixtures": {"mixtures": True, "nearest": 7, "hardness": 0.5, "detach_hardness": True},
    "instances": {"instances": True},
    "private": {"private": 8, "positives": "sum"},
    "holes": {"holes": True},
    "cold": {"temperature": 0.02},
}


@pytest.mark.parametrize("name", OPTIONS)
@each_impl
def test_equals_the_loops(name: str, impl: str) -> None:
    options = dict(OPTIONS[name])
    x, k, ids, key_ids = data()
    g = torch.Generator().manual_seed(5)
    if options.pop("instances", False):
        options |= {"instance": torch.arange(12), "key_instance": torch.randint(24, (20,), generator=g)}
    if options.pop("holes", False):
        ids[3], key_ids[::3], options["ignore_index"] = -1, -1, -1
    if options.pop("mixtures", False):
        first = torch.randint(-2, 20, (12, 5), generator=g)
        options["mixtures"] = Mixtures(
            first, torch.randint(20, (12, 5), generator=g), torch.rand(12, 5, generator=g, dtype=torch.float64)
        )
    learnt = "nearest" not in options
    kind = torch.float64 if impl == "reference" else torch.float32
    a, b = x.to(kind).requires_grad_(), k.to(kind).requires_grad_(learnt)
    c, d = x.double().requires_grad_(), k.double().requires_grad_(learnt)
    mine = loss_of(a, b, ids, key_ids, reduction="none", impl=impl, **options)
    theirs = in_loops(c, d, ids, key_ids, **options)
    near = {"rtol": 1e-9, "atol": 1e-9} if impl == "reference" else {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(mine.double(), theirs, **near)
    up = torch.linspace(-1.0, 2.0, 12, dtype=torch.float64)
    found = torch.autograd.grad(mine, [a, b] if learnt else [a], up.to(kind))
    truth = torch.autograd.grad(theirs, [c, d] if learnt else [c], up)
    for one, two in zip(found, truth, strict=True):
        scale = two.abs().max().item()
        torch.testing.assert_close(one.double(), two, rtol=0, atol=scale * (1e-9 if impl == "reference" else 3e-5))


@each_impl
def test_one_positive_per_query_is_cross_entropy(impl: str) -> None:
    x, k, ids, _ = data()
    classes = torch.arange(20)
    ids = (ids * 5) % 20
    a, b = x.clone().requires_grad_(), k.clone().requires_grad_()
    c, d = x.clone().requires_grad_(), k.clone().requires_grad_()
    wanted = F.cross_entropy(F.normalize(c, dim=1) @ F.normalize(d, dim=1).T / 0.1, ids)
    wanted.backward()
    for positives in ("mean", "sum"):
        loss = loss_of(a, b, ids, classes, positives=positives, impl=impl)
        torch.testing.assert_close(loss, wanted)
        for mine, theirs in zip(torch.autograd.grad(loss, [a, b]), (c.grad, d.grad), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@each_impl
def test_invariances(impl: str) -> None:
    x, k, ids, key_ids = data()
    a = x.clone().requires_grad_()
    loss = loss_of(a, k, ids, key_ids, hardness=1.0, impl=impl)
    (gradient,) = torch.autograd.grad(loss, a)
    assert (gradient * x).sum(dim=1).abs().max() < 1e-5 * gradient.norm(dim=1).max() * x.norm(dim=1).max()
    near = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(loss_of(x * 7.5, k * 0.01, ids, key_ids, hardness=1.0, impl=impl), loss.detach(), **near)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        loss_of(x, k[order], ids, key_ids[order], hardness=1.0, impl=impl), loss.detach(), **near
    )
    # A shared id is one per row, crop by crop.
    torch.testing.assert_close(
        loss_of(x, k, ids[:4], key_ids, impl=impl), loss_of(x, k, ids[:4].repeat(3), key_ids, impl=impl)
    )


@each_impl
def test_neutral_values(impl: str) -> None:
    x, k, ids, key_ids = data()
    ids[2], ids[5] = 99, -100
    x[7] = 0
    a, b = x.requires_grad_(), k.requires_grad_()
    rows, stats = contrastive_cross_entropy(a, b, ids, key_ids, reduction="none", return_stats=True, impl=impl)
    assert rows[2] == 0
    assert rows[5] == 0
    assert stats.positives[[2, 5]].tolist() == [0, 0]
    assert stats.negatives[[2, 5]].tolist() == [20, 0]
    assert not stats.hit[[2, 5]].any()
    # A zero query has equal logits to all keys.
    assert rows[7].item() == pytest.approx(math.log(20), rel=1e-6)
    dx, dk = torch.autograd.grad(rows.sum(), [a, b])
    assert not dx[[2, 5, 7]].any()
    assert torch.isfinite(dx).all()
    assert torch.isfinite(dk).all()
    # The query without a positive counts in the mean, the ignored one does not.
    mean = loss_of(a, b, ids, key_ids, impl=impl)
    assert mean.item() == pytest.approx(rows.sum().item() / 11, rel=1e-6)
    nothing = loss_of(a, b, torch.full_like(ids, -100), key_ids, impl=impl)
    assert nothing == 0
    assert not any(g.any() for g in torch.autograd.grad(nothing, [a, b]))


@each_impl
def test_keys_that_learn_and_keys_that_do_not(impl: str) -> None:
    x, k, ids, key_ids = data()
    a, b = x.requires_grad_(), k.clone().requires_grad_()
    dx, dk = torch.autograd.grad(loss_of(a, b, ids, key_ids, impl=impl), [a, b])
    for learnt in (0, 9, 20):
        again, part = torch.autograd.grad(loss_of(a, b, ids, key_ids, learnt_keys=learnt, impl=impl), [a, b])
        torch.testing.assert_close(again, dx)
        torch.testing.assert_close(part[:learnt], dk[:learnt])
        assert not part[learnt:].any()
    (alone,) = torch.autograd.grad(loss_of(a, k, ids, key_ids, impl=impl), a)
    torch.testing.assert_close(alone, dx)
    (keys_alone,) = torch.autograd.grad(loss_of(x.detach(), b, ids, key_ids, impl=impl), b)
    torch.testing.assert_close(keys_alone, dk)
    near = loss_of(a, b, ids, key_ids, nearest=5, learnt_keys=0, impl=impl)
    assert not torch.autograd.grad(near, b)[0].any()


@each_impl
def test_a_nan_stays_a_nan(impl: str) -> None:
    x, k, ids, key_ids = data()
    x[4, 1] = math.nan
    rows = loss_of(x, k, ids, key_ids, reduction="none", impl=impl)
    assert rows.isnan().nonzero().flatten().tolist() == [4]


@each_impl
@pytest.mark.parametrize("words", [{}, {"hardness": 1.0, "positives": "sum"}, {"nearest": 8}, {"mixtures": True}])
@pytest.mark.parametrize("filling", [math.nan, math.inf])
def test_what_nobody_has_filled_is_not_looked_at(words: dict[str, Any], filling: float, impl: str) -> None:
    x, k, ids, key_ids = data()
    ids[[0, 5]], key_ids[[0, 3, 19]] = -100, -100
    if words.get("mixtures"):
        # Of keys that are filled, of the query with one, and places that hold none.
        words = {"mixtures": Mixtures(torch.tensor([[1, -1, -2]] * 12), torch.tensor([[2, 4, 0]] * 12),
                                      torch.full((12, 3), 0.4))}  # fmt: skip
    found = []
    for value in (0.5, filling):
        a, b = x.clone(), k.clone()
        a[ids == -100], b[key_ids == -100] = value, value
        a.requires_grad_()
        b.requires_grad_("nearest" not in words)
        loss = loss_of(a, b, ids, key_ids, impl=impl, **words)
        found.append([loss, *torch.autograd.grad(loss, [a, b] if b.requires_grad else [a])])
        found[-1] += nearest_keys(a, b, 20, ids, key_ids, impl=impl)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    # One that counts is seen by all who look at it.
    k[7] = filling
    assert not loss_of(x, k, ids, key_ids, impl=impl).isfinite()


@each_impl
def test_one_positive_never_gives_a_negative_loss(impl: str) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=g)
    ids = torch.arange(64)
    # The query's own copy is its positive: the loss is nearly 0, and the difference of its terms a rounding.
    a = x.clone().requires_grad_()
    mean, total = (
        loss_of(a, x, ids, ids, temperature=0.02, positives=positives, reduction="none", impl=impl)
        for positives in ("mean", "sum")
    )
    assert (mean >= 0).all()
    assert torch.equal(mean, total)
    gradients = [torch.autograd.grad(loss.sum(), a)[0] for loss in (mean, total)]
    assert torch.equal(*gradients)


@each_impl
@pytest.mark.parametrize("words", [{}, {"nearest": 8}, {"mixtures": True}])
def test_squares_that_leave_the_range_of_float32(words: dict[str, Any], impl: str) -> None:
    x, k, ids, key_ids = data()
    if words.get("mixtures"):
        words = {"mixtures": Mixtures(torch.tensor([[1, -1]] * 12), torch.tensor([[2, 4]] * 12),
                                      torch.full((12, 2), 0.4))}  # fmt: skip
    found = []
    for scale in (1.0, 1e20):
        a = (x * scale).requires_grad_()
        loss = loss_of(a, k * scale, ids, key_ids, impl=impl, **words)
        found.append((loss, torch.autograd.grad(loss, a)[0] * scale))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@each_impl
def test_rows_without_a_positive_survive_an_infinite_upstream_gradient(impl: str) -> None:
    x, k, ids, key_ids = data()
    ids[2], ids[5] = 99, -100
    a = x.requires_grad_()
    rows = loss_of(a, k, ids, key_ids, reduction="none", impl=impl)
    up = torch.ones(12)
    up[[2, 5]] = math.inf
    (dx,) = torch.autograd.grad(rows, a, up)
    if impl == "reference":  # autograd's own products
        dx = torch.where(torch.isin(torch.arange(12), torch.tensor([2, 5]))[:, None], 0.0, dx)
    assert dx.isfinite().all()
    assert not dx[[2, 5]].any()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_reduced_loss_has_the_same_bits_with_any_number_of_threads(reduction: str) -> None:
    x, k, ids, key_ids = data(rows=70_001, keys=5, dim=2)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(loss_of(x, k, ids, key_ids, reduction=reduction))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])
    rows = loss_of(x, k, ids, key_ids, reduction="none").double()
    torch.testing.assert_close(found[0].double(), getattr(rows, reduction)(), rtol=1e-6, atol=0)


def test_gradcheck() -> None:
    x, k, ids, key_ids = data(5, 7, 3, 3)
    mixtures = Mixtures(torch.tensor([[0, -2]] * 5), torch.tensor([[1, 0]] * 5), torch.full((5, 2), 0.4))
    ids[0] = 42
    for words in ({"hardness": 0.5}, {"margin": 0.4, "margin_kind": "arcface", "positives": "sum"}):
        assert torch.autograd.gradcheck(
            lambda a, b, words=words: loss_of(a, b, ids, key_ids, temperature=0.5, **words),
            (x.double().requires_grad_(), k.double().requires_grad_()),
        )
    assert torch.autograd.gradcheck(
        lambda a: loss_of(a, k.double(), ids, key_ids, temperature=0.5, mixtures=mixtures),
        x.double().requires_grad_(),
    )
    assert torch.autograd.gradgradcheck(
        lambda a: loss_of(a, k.double(), ids, key_ids, temperature=0.5, hardness=1.0), x.double().requires_grad_()
    )


@each_impl
def test_nearest_keys_leaves_out_what_the_loss_does(impl: str) -> None:
    x, k, ids, key_ids = data()
    key_ids[::4] = -1
    instance, key_instance = torch.arange(12), torch.arange(20) % 12
    cosine, index = nearest_keys(
        x, k, 20, ids, key_ids, instance=instance, key_instance=key_instance, private=6, ignore_index=-1, impl=impl
    )
    full = F.normalize(x, dim=1) @ F.normalize(k, dim=1).T
    for n in range(12):
        wanted = [
            m for m in range(20)
            if key_ids[m] != -1 and key_instance[m] != n and (m >= 6 or key_ids[m] == ids[n])
        ]  # fmt: skip
        found = index[n][index[n] >= 0].tolist()
        assert sorted(found) == wanted
        assert found == sorted(wanted, key=lambda m, n=n: -float(full[n, m]))
        assert (cosine[n, len(wanted) :] == -torch.inf).all()
        assert (index[n, len(wanted) :] == -1).all()
        torch.testing.assert_close(cosine[n, : len(wanted)], full[n, found])
    # Unfilled slots alone.
    assert not torch.isin(
        nearest_keys(x, k, 15, key_ids=key_ids, ignore_index=-1, impl=impl)[1], torch.arange(0, 20, 4)
    ).any()
    # Equal cosines come by their index.
    assert nearest_keys(x[:1], x[:1].repeat(6, 1), 4, impl=impl)[1].tolist() == [[0, 1, 2, 3]]


def test_mixtures_in_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    call = cases.make({"rows": 11, "keys": 30, "dim": 8, "entries": 6}, torch.float32, "cpu", 0)
    arguments = (call.tensors["input"], call.tensors["keys"], *call.tensors["mixtures"])
    whole = listed.mixture_cosines(*arguments)
    monkeypatch.setitem(listed.CHUNK, "cpu", 4 * 6 * 8 * 2)
    for one, two in zip(listed.mixture_cosines(*arguments), whole, strict=True):
        torch.testing.assert_close(one, two)


@each_impl
def test_nothing_to_list(impl: str) -> None:
    x, k, ids, key_ids = data()
    none = Mixtures(*(torch.zeros(12, 0, dtype=kind) for kind in (torch.int64, torch.int64, torch.float32)))
    torch.testing.assert_close(
        loss_of(x, k, ids, key_ids, mixtures=none, impl=impl), loss_of(x, k, ids, key_ids, impl=impl)
    )
    empty = Mixtures(*(torch.zeros(0, 4, dtype=kind) for kind in (torch.int64, torch.int64, torch.float32)))
    a = x[:0].clone().requires_grad_()
    for options in ({"nearest": 3}, {"mixtures": empty}, {"nearest": 3, "mixtures": empty}):
        loss = loss_of(a, k, ids[:0], key_ids, impl=impl, **options)
        assert loss == 0
        assert torch.autograd.grad(loss, a)[0].shape == (0, 6)
