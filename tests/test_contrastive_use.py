"""How contrastive cross-entropy is called: errors, mixtures that cannot be, the module."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from contrastive import data, loss_of, whole

from fastrex_kernels import ContrastiveLoss, Mixtures, contrastive_cross_entropy, nearest_keys
from fastrex_kernels.contrastive_ce import arguments


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"input": torch.ones(12)}, ValueError, r"input must have 2 dimensions, got shape \(12,\)"),
        ({"keys": torch.ones(20, 6, dtype=torch.int64)}, TypeError, "keys must be floating point, got torch.int64"),
        ({"keys": torch.ones(20, 5)}, ValueError, r"keys must be \[M, 6\] like input, got \(20, 5\)"),
        ({"ids": torch.ones(12)}, TypeError, "ids must be int64, got torch.float32"),
        ({"ids": torch.ones(5, dtype=torch.int64)}, ValueError, "ids must have 12 entries or a divisor of that, got 5"),
        ({"ids": torch.ones(0, dtype=torch.int64)}, ValueError, "ids must have 12 entries or a divisor of that, got 0"),
        ({"key_ids": torch.ones(10, dtype=torch.int64)}, ValueError, "key_ids must have one entry per key, 20, got 10"),
        ({"key_ids": torch.ones(20, 1, dtype=torch.int64)}, ValueError, "key_ids must have 1 dimension"),
        ({"instance": torch.arange(12)}, ValueError, "instance and key_instance must be given together, got instance"),
        ({"key_instance": torch.arange(20)}, ValueError, "must be given together, got key_instance alone"),
        ({"private": 21}, ValueError, r"private must be in \[0, 20\], the number of keys, got 21"),
        ({"temperature": 0.0}, ValueError, "temperature must be a finite number of at least 1e-06, got 0.0"),
        ({"temperature": 1e-7}, ValueError, "temperature must be a finite number of at least 1e-06, got 1e-07"),
        ({"temperature": math.nan}, ValueError, "temperature must be a finite number of at least 1e-06, got nan"),
        ({"temperature": math.inf}, ValueError, "temperature must be a finite number of at least 1e-06, got inf"),
        ({"temperature": torch.tensor(0.1)}, TypeError, "temperature must be a number, got Tensor"),
        ({"hardness": -0.5}, ValueError, r"hardness must be in \[0, 1000\], got -0.5"),
        ({"hardness": 2e3}, ValueError, r"hardness must be in \[0, 1000\], got 2000.0"),
        ({"hardness": math.nan}, ValueError, r"hardness must be in \[0, 1000\], got nan"),
        ({"hardness": "1"}, TypeError, "hardness must be a number, got str"),
        ({"margin": None}, TypeError, "margin must be a number, got NoneType"),
        ({"nearest": True}, TypeError, r"nearest must be an int, got True \(a bool\)"),
        ({"nearest": 3.0}, TypeError, "nearest must be an int, got float"),
        ({"private": 2.0}, TypeError, "private must be an int, got float"),
        ({"learnt_keys": 2.0}, TypeError, "learnt_keys must be an int, got float"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an int, got NoneType"),
        ({"ids": [0] * 12}, TypeError, "ids must be a tensor, got list"),
        ({"input": [[1.0]]}, TypeError, "input must be a tensor, got list"),
        ({"mixtures": (1, 2, 3)}, TypeError, r"mixtures must be Mixtures\(first, second, share\), got tuple"),
        ({"mixtures": Mixtures(1, 2, 3)}, TypeError, "mixtures.first must be a tensor, got int"),
        ({"positives": "max"}, ValueError, "positives must be one of mean, sum, got 'max'"),
        ({"reduction": "all"}, ValueError, "reduction must be one of none, mean, sum, got 'all'"),
        ({"margin_kind": "sphere"}, ValueError, "margin_kind must be one of cosface, arcface, got 'sphere'"),
        ({"margin": 2.0}, ValueError, r"margin must be in \[0, 2\) for cosface, got 2.0"),
        ({"margin": -0.1}, ValueError, r"margin must be in \[0, 2\) for cosface, got -0.1"),
        ({"margin": 3.2, "margin_kind": "arcface"}, ValueError, r"margin must be in \[0, 3.142\) for arcface, got 3.2"),
        ({"nearest": 21}, ValueError, r"nearest must be in \[0, 20\], the number of keys, got 21"),
        ({"learnt_keys": 21}, ValueError, r"learnt_keys must be in \[0, 20\], the number of keys, got 21"),
        (
            {"keys": torch.ones(20, 6, requires_grad=True), "nearest": 3},
            ValueError,
            "keys must not require a gradient with nearest=3; detach them or pass learnt_keys=0",
        ),
        ({"impl": "cuda"}, ValueError, "impl must be one of auto, reference, cpp, triton, got 'cuda'"),
    ],
)
def test_errors(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    x, k, ids, key_ids = data()
    with pytest.raises(kind, match=f"contrastive_cross_entropy: .*{message}"):
        contrastive_cross_entropy(**{"input": x, "keys": k, "ids": ids, "key_ids": key_ids, **change})


@pytest.mark.parametrize(
    ("first", "second", "share", "kind", "message"),
    [
        ([[20]], [[0]], [[0.5]], ValueError, r"mixtures.first must be in \[-2, 20\), got 20"),
        ([[-3]], [[0]], [[0.5]], ValueError, r"mixtures.first must be in \[-2, 20\), got -3"),
        ([[-1]], [[20]], [[0.5]], ValueError, r"mixtures.second must be in \[0, 20\), got 20"),
        ([[3]], [[-1]], [[0.5]], ValueError, r"mixtures.second must be in \[0, 20\), got -1"),
        ([[3, 4]], [[1]], [[0.5]], ValueError, r"mixtures.second must be \(12, 2\) like first, got \(12, 1\)"),
        ([[3]], [[1]], [[1]], TypeError, "mixtures.share must be floating point, got torch.int64"),
        ([[3.0]], [[1]], [[0.5]], TypeError, "mixtures.first must be int64, got torch.float32"),
        ([3], [1], [0.5], ValueError, r"mixtures.first must be \[12, E\], got \(12,\)"),
    ],
)
def test_mixtures_that_cannot_be(first: Any, second: Any, share: Any, kind: type[Exception], message: str) -> None:
    x, k, ids, key_ids = data()
    rows = Mixtures(*(torch.tensor(t * 12) for t in (first, second, share)))
    with pytest.raises(kind, match=f"contrastive_cross_entropy: {message}"):
        contrastive_cross_entropy(x, k, ids, key_ids, mixtures=rows)


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_mixtures_of_no_key_show_where_nothing_may_be_read(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a check would wait for the device."""
    monkeypatch.setattr(arguments, "readable", lambda tensor: False)
    x, k, ids, key_ids = data()
    plain = loss_of(x, k, ids, key_ids, mixtures=Mixtures(*whole()), reduction="none", impl=impl)
    for at, index in ((0, 20), (0, -3), (1, 20), (1, -1)):
        parts = whole()
        parts[at][4, 1] = index
        a = x.clone().requires_grad_()
        rows = loss_of(a, k, ids, key_ids, mixtures=Mixtures(*parts), reduction="none", impl=impl)
        assert rows.isnan().nonzero().flatten().tolist() == [4]
        others = torch.arange(12) != 4
        torch.testing.assert_close(rows[others], plain[others])
        (dx,) = torch.autograd.grad(rows.sum(), a)
        assert dx[others].isfinite().all()


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_a_share_in_half_precision_is_widened_once(impl: str) -> None:
    x, k, ids, key_ids = data()
    first, second, share = whole()
    narrow = (share + 0.003).bfloat16()
    a = x.clone().requires_grad_()
    found = [
        loss_of(a, k, ids, key_ids, mixtures=Mixtures(first, second, s), impl=impl) for s in (narrow, narrow.float())
    ]
    assert torch.equal(*found)
    assert torch.equal(*(torch.autograd.grad(loss, a)[0] for loss in found))


def test_absent_mixtures_may_hold_anything() -> None:
    x, k, ids, key_ids = data()
    absent = Mixtures(torch.full((12, 1), -2), torch.full((12, 1), 99), torch.full((12, 1), math.nan))
    a = x.requires_grad_()
    for impl in ("reference", "auto"):
        mine, plain = (loss_of(a, k, ids, key_ids, mixtures=m, impl=impl) for m in (absent, None))
        torch.testing.assert_close(mine, plain)
        torch.testing.assert_close(torch.autograd.grad(mine, a), torch.autograd.grad(plain, a))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 21}, r"k must be in \[1, 20\], the number of keys, got 21"),
        ({"k": 0}, r"k must be in \[1, 20\], the number of keys, got 0"),
        ({"ids": torch.arange(12)}, "key_ids must be given with ids, got None"),
        ({"private": 3}, "ids must be given with private=3, got None"),
        ({"keys": torch.ones(20, 5)}, r"keys must be \[M, 6\] like input"),
    ],
)
def test_errors_of_nearest_keys(change: dict[str, Any], message: str) -> None:
    x, k, _, _ = data()
    with pytest.raises(ValueError, match=f"nearest_keys: {message}"):
        nearest_keys(**{"input": x, "keys": k, "k": 3, **change})


class TestModule:
    def test_a_batch_of_views_against_itself(self) -> None:
        x, _, ids, _ = data()
        own = torch.arange(12)
        labels = ids[:6]
        wanted = loss_of(x, x, labels.repeat(2), labels.repeat(2), instance=own, key_instance=own, hardness=1.0)
        torch.testing.assert_close(ContrastiveLoss(hardness=1.0)(x, labels), wanted)
        torch.testing.assert_close(ContrastiveLoss(hardness=1.0)(x, labels.repeat(2)), wanted)

    def test_a_bank_alone_and_behind_the_batch(self) -> None:
        x, k, ids, key_ids = data()
        a = x.requires_grad_()
        loss = ContrastiveLoss(temperature=0.2, positives="sum", ignore_index=3)
        torch.testing.assert_close(
            loss(a, ids, k, key_ids), loss_of(a, k, ids, key_ids, temperature=0.2, positives="sum", ignore_index=3)
        )
        both = loss(a, ids, k.requires_grad_(), key_ids, with_batch=True)
        own, rest = torch.arange(12), torch.full((20,), -1)
        wanted = loss_of(
            a, torch.cat((a, k.detach())), ids, torch.cat((ids, key_ids)), instance=own,
            key_instance=torch.cat((own, rest)), temperature=0.2, positives="sum", ignore_index=3,
        )  # fmt: skip
        torch.testing.assert_close(both, wanted)
        torch.testing.assert_close(torch.autograd.grad(both, a), torch.autograd.grad(wanted, a))

    def test_neighbours_within_the_batch(self) -> None:
        x, _, ids, _ = data()
        a = x.requires_grad_()
        loss = ContrastiveLoss(nearest=4)(a, ids)
        assert torch.autograd.grad(loss, a)[0].any()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"temperature": -1.0}, "temperature must be a finite number of at least 1e-06, got -1.0"),
            ({"nearest": -1}, "nearest must be at least 0, got -1"),
            ({"nearest": True}, "nearest must be an int, got True"),
            ({"ignore_index": "none"}, "ignore_index must be an int, got str"),
            ({"margin": 5.0}, "margin must be in"),
        ],
    )
    def test_options_that_mean_nothing(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises((ValueError, TypeError), match=f"ContrastiveLoss: {message}"):
            ContrastiveLoss(**options)

    def test_it_shows_every_option(self) -> None:
        words = inspect.signature(ContrastiveLoss).parameters
        shown = repr(ContrastiveLoss(detach_hardness=True, ignore_index=7))
        assert all(f"{word}=" in shown for word in words)
        assert "detach_hardness=True" in shown
        assert "ignore_index=7" in shown

    def test_keys_need_labels(self) -> None:
        x, k, ids, _ = data()
        with pytest.raises(ValueError, match="ContrastiveLoss: keys and key_labels must be given together, got keys"):
            ContrastiveLoss()(x, ids, k)
        with pytest.raises(ValueError, match="ContrastiveLoss: labels must have 12 entries or a divisor of that"):
            ContrastiveLoss()(x, ids[:5])

    @pytest.mark.parametrize("with_batch", [False, True])
    def test_errors_name_what_the_user_passed(self, with_batch: bool) -> None:
        x, k, ids, key_ids = data()
        for keys, key_labels, message in (
            (k[:, :5], key_ids, r"keys must be \[M, 6\] like features, got \(20, 5\)"),
            (k, key_ids[:7], r"key_labels must have one entry per key, 20, got \(7,\)"),
            (k, key_ids.tolist(), "key_labels must be a tensor, got list"),
            (k, key_ids.float(), "key_labels must be int64, got torch.float32"),
            (k.long(), key_ids, "keys must be floating point, got torch.int64"),
            (k[0], key_ids, r"keys must have 2 dimensions, got shape \(6,\)"),
        ):
            with pytest.raises((ValueError, TypeError), match=f"ContrastiveLoss: {message}"):
                ContrastiveLoss()(x, ids, keys, key_labels, with_batch=with_batch)
        with pytest.raises(ValueError, match="ContrastiveLoss: keys must be given with with_batch=True, got None"):
            ContrastiveLoss()(x, ids, with_batch=True)
