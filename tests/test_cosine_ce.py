"""Cosine cross-entropy: definition by hand, PyTorch's edge cases, invariances, errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastrex_kernels import cosine_cross_entropy


def data(rows: int = 12, classes: int = 7, dim: int = 5, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=g, dtype=torch.float64)
    w = torch.randn(classes, dim, generator=g, dtype=torch.float64)
    y = torch.randint(classes, (rows,), generator=g)
    return x, w, y


def test_worked_example() -> None:
    # cos = (1, 0) and (0.6, 0.8) at temperature 0.5: logits (2, 0) and (1.2, 1.6).
    x = torch.tensor([[3.0, 0.0], [6.0, 8.0]])
    w = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    loss, stats = cosine_cross_entropy(x, w, torch.tensor([0, 0]), temperature=0.5, reduction="none", return_stats=True)
    expected = [math.log1p(math.exp(-2.0)), math.log1p(math.exp(0.4))]
    assert loss.tolist() == pytest.approx(expected, rel=1e-6)
    assert stats.rank.tolist() == [0, 1]
    assert stats.lse.tolist() == pytest.approx([expected[0] + 2.0, expected[1] + 1.2], rel=1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("target", ["ids", "ignored", "all ignored", "soft"])
def test_equals_torch(reduction: str, smoothing: float, weighted: bool, target: str) -> None:
    x, w, y = data()
    cw = torch.linspace(0.5, 2.0, 7, dtype=torch.float64) if weighted else None
    if target == "ignored":
        y[::3] = -100
    elif target == "all ignored":
        y[:] = -100
    elif target == "soft":
        y = torch.softmax(torch.randn(12, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), 1)
    a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
    mine = cosine_cross_entropy(
        a, b, y, temperature=0.3, class_weight=cw, label_smoothing=smoothing, reduction=reduction
    )
    c, d = x.clone().requires_grad_(), w.clone().requires_grad_()
    logits = F.normalize(c, dim=1) @ F.normalize(d, dim=1).T / 0.3
    theirs = F.cross_entropy(logits, y, weight=cw, label_smoothing=smoothing, reduction=reduction)
    torch.testing.assert_close(mine, theirs, equal_nan=True)
    if target != "all ignored":
        g = torch.randn(mine.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        mine.backward(g)
        theirs.backward(g)
        torch.testing.assert_close(a.grad, c.grad)
        torch.testing.assert_close(b.grad, d.grad)


def test_target_is_shared_over_crops() -> None:
    x, w, _ = data()
    y = torch.tensor([1, 4, 6])
    mine = cosine_cross_entropy(x, w, y, reduction="none")
    torch.testing.assert_close(mine, cosine_cross_entropy(x, w, y.repeat(4), reduction="none"))


def test_zero_rows_and_empty_classes() -> None:
    x, w, y = data()
    x[2] = 0
    w[5] = 0
    y[3] = 5
    a, b = x.requires_grad_(), w.requires_grad_()
    loss, stats = cosine_cross_entropy(a, b, y, reduction="none", return_stats=True)
    assert loss[2].item() == pytest.approx(math.log(7))
    loss.sum().backward()
    assert not a.grad[2].any()
    assert not b.grad[5].any()
    assert torch.isfinite(a.grad).all()
    # The logit of an empty class is exactly 0, so its loss is the log of the sum of exponentials.
    assert loss[3].item() == pytest.approx(stats.lse[3].item())


def test_a_nan_stays_a_nan() -> None:
    # A feature gone bad must not pass for a zero row, whose loss is finite.
    x, w, y = data()
    x[4, 1] = math.nan
    assert cosine_cross_entropy(x, w, y, reduction="none").isnan().nonzero().flatten().tolist() == [4]
    x, w, y = data()
    w[5, 0] = math.nan
    assert cosine_cross_entropy(x, w, y, reduction="none").isnan().all()


def test_scale_invariance_and_orthogonal_gradient() -> None:
    x, w, y = data()
    a = x.clone().requires_grad_()
    loss = cosine_cross_entropy(a, w, y)
    loss.backward()
    torch.testing.assert_close(cosine_cross_entropy(x * 7.5, w * 0.01, y), loss.detach())
    assert (a.grad * x).sum(1).abs().max() < 1e-12


def test_frozen_prototypes_and_learnable_temperature() -> None:
    x, w, y = data()
    t = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    a = x.requires_grad_()
    cosine_cross_entropy(a, w, y, temperature=t).backward()
    assert w.grad is None
    eps = 1e-6
    slope = (
        cosine_cross_entropy(x, w, y, temperature=0.2 + eps) - cosine_cross_entropy(x, w, y, temperature=0.2 - eps)
    ) / (2 * eps)
    assert t.grad.item() == pytest.approx(slope.item(), rel=1e-5)


def test_gradcheck() -> None:
    x, w, y = data(rows=4, classes=3, dim=3)
    assert torch.autograd.gradcheck(
        lambda a, b: cosine_cross_entropy(a, b, y, label_smoothing=0.1), (x.requires_grad_(), w.requires_grad_())
    )


def test_low_precision_inputs_give_a_float32_loss() -> None:
    x, w, y = data()
    truth = cosine_cross_entropy(x, w, y)
    loss = cosine_cross_entropy(x.bfloat16(), w.bfloat16(), y)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(truth.item(), rel=2e-2)


def test_initial_loss_of_online_class_means() -> None:
    # recipes.md 1.5: about 7.1 with 1000 random unit prototypes of 256 dimensions at temperature 0.1.
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(512, 256, generator=g), torch.randn(1000, 256, generator=g)
    loss = cosine_cross_entropy(x, w, torch.randint(1000, (512,), generator=g))
    assert 7.05 < loss.item() < 7.2


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"input": torch.zeros(3)}, ValueError, r"input must have 2 dimensions, got shape \(3,\)"),
        ({"input": torch.zeros(12, 5, dtype=torch.int64)}, TypeError, "input must be floating point"),
        ({"weight": torch.zeros(7, 4)}, ValueError, r"weight must be \[C >= 1, 5\], got \(7, 4\)"),
        ({"weight": torch.zeros(0, 5)}, ValueError, r"weight must be \[C >= 1, 5\]"),
        ({"target": torch.zeros(12, dtype=torch.int32)}, TypeError, "target must be int64 class ids"),
        (
            {"target": torch.zeros(5, dtype=torch.int64)},
            ValueError,
            "target must have 12 rows or a divisor of that, got 5",
        ),
        ({"target": torch.full((12,), 7)}, ValueError, r"target must be in \[0, 7\) or -100, got 7"),
        ({"target": torch.zeros(12, 6)}, ValueError, r"target probabilities must be \[N or B, 7\]"),
        ({"temperature": 0.0}, ValueError, "temperature must be above 0"),
        ({"temperature": torch.ones(2)}, ValueError, "temperature must be a float or a 0-d tensor"),
        ({"label_smoothing": 2.0}, ValueError, "label_smoothing must be in"),
        ({"class_weight": torch.ones(3)}, ValueError, r"class_weight must be \[7\]"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of none, mean, sum"),
        ({"impl": "cuda"}, ValueError, "impl must be one of"),
        ({"impl": "triton"}, ValueError, "impl must be one of auto, reference for this op, got 'triton'"),
    ],
)
def test_bad_input_is_named(change: dict, kind: type, message: str) -> None:
    x, w, y = data()
    arguments = {"input": x.float(), "weight": w.float(), "target": y, **change}
    with pytest.raises(kind, match=message):
        cosine_cross_entropy(**arguments)
