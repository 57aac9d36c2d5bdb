"""The optimiser step, its schedule, and the guard against numbers gone bad."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastrex.config import OptimConfig
from fastrex.errors import FastrexError
from fastrex.optim import GROWTH_INTERVAL, MAX_SKIPPED, Guard, Optimizer, load_tensors
from fastrex.schedule import Schedule, from_config
from fastrex_kernels import sgd_ema_

FALSE, TRUE = torch.tensor(False), torch.tensor(True)
number = torch.tensor


def test_published_schedule() -> None:
    # recipes.md 1.3: 5004 iterations per epoch, warm-up over 10 epochs with inclusive end points, half-cosine over 90.
    plan = from_config(OptimConfig(), 5004)
    assert plan.total == 500_400
    assert plan.lr(0) == 0.0
    assert plan.lr(50_039) == pytest.approx(0.1)
    assert plan.lr(50_040) == pytest.approx(0.1)
    assert plan.lr(50_040 + 225_180) == pytest.approx(0.05, rel=1e-3)
    assert 1e-6 <= plan.lr(500_399) < 1.01e-6
    assert all(plan.lr(s) <= plan.lr(s + 1) for s in range(0, 50_039, 997))
    assert all(plan.lr(s) >= plan.lr(s + 1) for s in range(50_040, 500_399, 997))


def test_learning_rate_scales_with_the_batch() -> None:
    assert from_config(OptimConfig(batch_size=1024), 10).peak == pytest.approx(0.4)
    assert Schedule(peak=1.0, end=0.0, warmup=0, total=10).lr(0) == 1.0


def tensors(seed: int = 0, dtype: torch.dtype = torch.float64):
    g = torch.Generator().manual_seed(seed)
    shapes = [(4, 3), (3,), (2, 2, 3, 3)]
    return [torch.randn(s, generator=g, dtype=dtype) for s in shapes]


def test_sgd_equals_torch_and_ema_follows_the_updated_weights() -> None:
    params, buffers = tensors(), [torch.zeros_like(p) for p in tensors()]
    ema = [p.clone() for p in params]
    theirs = [nn.Parameter(p.clone()) for p in params]
    decay = [0.01, 0.0, 0.01]
    torch_sgd = torch.optim.SGD(
        [{"params": [p], "weight_decay": d} for p, d in zip(theirs, decay, strict=True)], lr=0.1, momentum=0.9
    )
    expected = [p.clone() for p in params]
    for seed in range(1, 6):
        grads = tensors(seed)
        lr = torch.tensor(0.1 / seed, dtype=torch.float64)
        sgd_ema_(params, grads, buffers, ema, lr=lr, momentum=0.9, weight_decay=decay, ema_momentum=0.8)
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g
        for group in torch_sgd.param_groups:
            group["lr"] = 0.1 / seed
        torch_sgd.step()
        expected = [0.8 * e + 0.2 * p.detach() for e, p in zip(expected, theirs, strict=True)]
    torch.testing.assert_close(params, [p.detach() for p in theirs])
    torch.testing.assert_close(ema, expected)


def test_a_skipped_step_changes_no_bit_even_with_nan() -> None:
    params, buffers, ema = tensors(), tensors(1), [*tensors(2)[:2], None]
    before = [t.clone() for t in [*params, *buffers, *ema[:2]]]
    bad = [torch.full_like(p, math.nan) for p in params]
    sgd_ema_(params, bad, buffers, ema, lr=torch.tensor(0.1), momentum=0.9, weight_decay=[1.0] * 3, skip=TRUE)
    assert all(torch.equal(a, b) for a, b in zip([*params, *buffers, *ema[:2]], before, strict=True))


def test_inverse_scale() -> None:
    a, b = tensors(), tensors()
    zeros = lambda: [torch.zeros_like(p) for p in tensors()]  # noqa: E731
    g = tensors(3)
    sgd_ema_(a, g, zeros(), [None] * 3, lr=torch.tensor(0.1), momentum=0.9, weight_decay=[0.1] * 3)
    scaled = [x * 1024 for x in g]
    sgd_ema_(
        b,
        scaled,
        zeros(),
        [None] * 3,
        lr=torch.tensor(0.1),
        momentum=0.9,
        weight_decay=[0.1] * 3,
        inv_scale=torch.tensor(1 / 1024),
    )
    torch.testing.assert_close(a, b)


def test_bad_lists_are_named() -> None:
    p = tensors()
    with pytest.raises(ValueError, match=r"grads must have one entry per parameter \(3\), got 2"):
        sgd_ema_(p, p[:2], p, p, lr=torch.tensor(0.1), momentum=0.9, weight_decay=[0.0] * 3)
    with pytest.raises(ValueError, match=r"grads\[1\] must have the parameter's shape"):
        sgd_ema_(p, [p[0], p[0], p[2]], p, p, lr=torch.tensor(0.1), momentum=0.9, weight_decay=[0.0] * 3)


def test_weight_decay_by_dimension() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = Optimizer(dict(net.named_parameters()), {}, OptimConfig(weight_decay=0.5), 0.9)
    assert optimizer.decay == {"0.weight": 0.5, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0}


def test_parameters_without_gradient_stay() -> None:
    net = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    optimizer = Optimizer(dict(net.named_parameters()), {}, OptimConfig(), 0.9)
    before = net[1].weight.clone()
    net[0](torch.ones(1, 2)).sum().backward()
    assert torch.isfinite(optimizer.grad_norm())
    optimizer.set_lr(0.1)
    optimizer.step(FALSE, None)
    assert torch.equal(net[1].weight, before)


def test_guard_marks_the_first_bad_step_and_freezes() -> None:
    guard = Guard(fp16=False)
    assert [bool(x) for x in guard.judge(number(5), TRUE, TRUE)] == [False, True]
    assert [bool(x) for x in guard.judge(number(6), TRUE, FALSE)] == [True, False]
    assert [bool(x) for x in guard.judge(number(7), FALSE, FALSE)] == [True, False]
    assert [bool(x) for x in guard.judge(number(8), TRUE, TRUE)] == [True, False]
    assert int(guard.diverged) == 6


def test_fp16_overflow_halves_the_scale_and_keeps_the_bank() -> None:
    guard = Guard(fp16=True)
    start = float(guard.scale)
    for n in range(1, 4):
        assert [bool(x) for x in guard.judge(number(n), TRUE, FALSE)] == [True, True]
        assert float(guard.scale) == start / 2**n
        assert int(guard.skipped) == n
    assert [bool(x) for x in guard.judge(number(4), TRUE, TRUE)] == [False, True]
    assert int(guard.skipped) == 0
    for n in range(GROWTH_INTERVAL - 1):
        guard.judge(number(n), TRUE, TRUE)
    assert float(guard.scale) == start / 4
    assert int(guard.diverged) == -1
    guard.judge(number(9), FALSE, FALSE)
    assert int(guard.diverged) == 9


def test_too_many_overflows_in_a_row_are_latched() -> None:
    guard = Guard(fp16=True)
    guard.scale.fill_(2.0**30)
    for n in range(MAX_SKIPPED - 1):
        assert bool(guard.judge(number(n), TRUE, FALSE)[1])
    skip, keep = guard.judge(number(MAX_SKIPPED - 1), TRUE, FALSE)
    assert (bool(skip), bool(keep)) == (True, False)
    scale = float(guard.scale)
    # A good step afterwards, before anybody looked, changes nothing any more.
    assert [bool(x) for x in guard.judge(number(MAX_SKIPPED), TRUE, TRUE)] == [True, False]
    assert (int(guard.diverged), int(guard.skipped), float(guard.scale)) == (MAX_SKIPPED - 1, MAX_SKIPPED, scale)


def test_the_scale_can_neither_vanish_nor_become_infinite() -> None:
    guard = Guard(fp16=True)
    # They come and go, never so many in a row that the run stops.
    for n in range(32):
        guard.judge(number(n), TRUE, FALSE if n % 2 else TRUE)
    assert float(guard.scale) == 1.0
    assert int(guard.diverged) == -1
    # No halving helps the next one.
    assert [bool(x) for x in guard.judge(number(32), TRUE, TRUE)] == [False, True]
    assert [bool(x) for x in guard.judge(number(33), TRUE, FALSE)] == [True, False]
    assert (int(guard.diverged), int(guard.skipped), float(guard.scale)) == (33, 1, 1.0)
    guard = Guard(fp16=True)
    guard.scale.fill_(2.0**32)
    guard.growth.fill_(GROWTH_INTERVAL - 1)
    guard.judge(number(400), TRUE, TRUE)
    assert float(guard.scale) == 2.0**32
    assert int(guard.growth) == 0


def test_a_diverged_guard_moves_no_more() -> None:
    guard = Guard(fp16=True)
    guard.judge(number(0), TRUE, TRUE)
    guard.judge(number(1), FALSE, TRUE)
    before = {name: float(value) for name, value in guard.state_dict().items()}
    guard.judge(number(2), TRUE, FALSE)
    guard.judge(number(3), TRUE, TRUE)
    assert {name: float(value) for name, value in guard.state_dict().items()} == before
    assert before["diverged"] == 1


def test_foreign_tensors_are_refused_by_name() -> None:
    mine = {"a": torch.zeros(2), "b": torch.zeros(3)}
    with pytest.raises(FastrexError, match="lacks model tensor 'b'"):
        load_tensors(mine, {"a": torch.zeros(2)}, "model")
    with pytest.raises(FastrexError, match="has an unknown model tensor 'c'"):
        load_tensors(mine, {**mine, "c": torch.zeros(1)}, "model")
    with pytest.raises(FastrexError, match=r"model tensor 'b' must be \(3,\), got \(4,\)"):
        load_tensors(mine, {"a": torch.ones(2), "b": torch.ones(4)}, "model")
    with pytest.raises(FastrexError, match=r"model tensor 'b' must be torch.float32, got torch.float16"):
        load_tensors(mine, {"a": torch.ones(2), "b": torch.ones(3, dtype=torch.float16)}, "model")
    assert not mine["a"].any()
