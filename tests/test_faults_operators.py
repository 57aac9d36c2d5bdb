"""Numbers gone bad in the operators: they spoil what they must, where somebody looks for it, and nothing beside it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastrex_kernels import OnlineClassMeans, _cpp, bank, bank_update_, class_means, cosine_cross_entropy

Report = Callable[..., None]

CPP = pytest.param("cpp", marks=pytest.mark.skipif(not _cpp.LOADED, reason=_cpp.REASON or "loaded"))
implementations = pytest.mark.parametrize("impl", ["reference", CPP])


@implementations
def test_bad_rows_spoil_no_other_row_of_the_loss(impl: str, report: Report) -> None:
    g = torch.Generator().manual_seed(0)
    x, w, y = torch.randn(9, 8, generator=g), torch.randn(5, 8, generator=g), torch.arange(9) % 5
    good = cosine_cross_entropy(x, w, y, reduction="none", impl=impl)
    assert isinstance(good, Tensor)
    for value in (math.nan, math.inf, -math.inf):
        bad = x.clone()
        bad[4, 3] = value
        loss = cosine_cross_entropy(bad, w, y, reduction="none", impl=impl)
        assert isinstance(loss, Tensor)
        assert loss.isnan().nonzero().flatten().tolist() == [4]
        assert torch.equal(loss[torch.arange(9) != 4], good[torch.arange(9) != 4])
    zero = x.clone()
    zero[4] = 0
    zero.requires_grad_()
    loss = cosine_cross_entropy(zero, w.requires_grad_(), y, reduction="none", impl=impl)
    assert isinstance(loss, Tensor)
    # All its logits are 0: the log of the number of classes, and no way down.
    assert loss[4].item() == pytest.approx(math.log(5))
    loss.mean().backward()
    assert zero.grad is not None
    assert w.grad is not None
    assert not zero.grad[4].any()
    assert bool(zero.grad.isfinite().all() and w.grad.isfinite().all())
    report("T23", f"NaN, inf and zero rows in the loss ({impl})", injected=4, survived=4, bits_equal=True)


@implementations
def test_bad_rows_spoil_no_other_class_of_a_bank(impl: str, report: Report) -> None:
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(12, 8, generator=g), torch.arange(12) % 4
    good, _ = class_means(z, y, 5, impl=impl)
    torch.testing.assert_close(good[:4].norm(dim=1), torch.ones(4))
    assert not good[4].any()
    for value in (math.nan, math.inf):
        bad = z.clone()
        bad[6, 1] = value
        means, counts = class_means(bad, y, 5, impl=impl)
        # It shows in its class, where the loss finds it, and nowhere else.
        assert means.isnan().any(1).tolist() == [False, False, True, False, False]
        assert torch.equal(means[[0, 1, 3, 4]], good[[0, 1, 3, 4]])
        assert counts.tolist() == [3, 3, 3, 3, 0]
    bad = z.clone()
    bad[y == 2] = 0
    means, _ = class_means(bad, y, 5, impl=impl)
    assert not means[2].any()
    assert bool(means.isfinite().all())
    report("T23", f"NaN, inf and zero rows under class_means ({impl})", injected=3, survived=3, bits_equal=True)


def test_bad_rows_stay_out_of_the_bank(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    means = OnlineClassMeans(4, 3, bank_size=6)
    labels = torch.tensor([0, 1])

    def state() -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in means.state_dict().items()}

    def unchanged(before: dict[str, Tensor]) -> bool:
        return all(torch.equal(tensor, before[name]) for name, tensor in means.state_dict().items())

    before = state()
    for value in (math.nan, math.inf, -math.inf):
        rows = torch.ones(2, 4)
        rows[1, 2] = value
        with pytest.raises(ValueError, match=r"update_: features must be finite, got NaN or inf in row 1; leave"):
            means.update_(rows, labels)
        means.update_(rows, labels, torch.tensor(False))
        assert unchanged(before)
        with monkeypatch.context() as patch:
            # On a GPU nobody looks at values: the batch is left out there, on the device.
            patch.setattr(bank, "readable", lambda tensor: False)
            means.update_(rows, labels)
        assert unchanged(before)
    means.update_(torch.zeros(2, 4), labels)
    assert not unchanged(before)
    norms = means.prototypes().norm(dim=1)
    assert all(norm == 0 or norm == pytest.approx(1) for norm in norms.tolist())
    report("T23", "NaN, inf and zero rows into the bank", injected=10, survived=10, bits_equal=True)


@implementations
def test_prototypes_have_the_same_bits_in_any_order_of_the_classes(impl: str, report: Report) -> None:
    g = torch.Generator().manual_seed(3)
    rows, labels = torch.randn(40, 16, generator=g), torch.randint(6, (40,), generator=g)  # many duplicates
    start = torch.randn(64, 16, generator=g), torch.randint(6, (64,), generator=g)

    def after(order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features, ids, pointer = start[0].clone(), start[1].clone(), torch.tensor([5])
        prototypes, counts = class_means(features, ids, 6, impl=impl)
        bank_update_(
            features, ids, pointer, rows[order], labels[order], prototypes=prototypes, counts=counts, impl=impl
        )
        return prototypes, counts, pointer

    given = after(torch.arange(40))
    assert all(map(torch.equal, given, after(torch.arange(40))))
    # Other neighbours, but the rows of a class still come one after another as they did.
    shuffled = torch.randperm(6, generator=g)[labels].argsort(stable=True)
    assert not torch.equal(shuffled, torch.arange(40))
    assert all(map(torch.equal, given, after(shuffled)))
    # Within a class too: the same sums but for their rounding.
    prototypes, counts, pointer = after(torch.randperm(40, generator=g))
    torch.testing.assert_close(prototypes, given[0], rtol=0, atol=1e-6)
    assert torch.equal(counts, given[1])
    assert torch.equal(pointer, given[2])
    report("T34", f"bank update, duplicate labels, permuted order ({impl})", injected=2, survived=2, bits_equal=True)
