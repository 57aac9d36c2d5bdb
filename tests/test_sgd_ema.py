"""The fused optimiser step: every implementation against the reference, layouts, copies, skipped steps, scalars."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastrex_kernels import _cpp, sgd_ema_
from fastrex_kernels._op import INTERPRETED

CPP = pytest.param("cpp", marks=pytest.mark.skipif(not _cpp.LOADED, reason=_cpp.REASON or "loaded"))
TRITON = pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is off"))
both = pytest.mark.parametrize("impl", ["reference", CPP])
SHAPES = ((4, 3), (3,), (2, 6, 3, 3), (), (2500,))


def draw(seed: int, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for shape in shapes]


def state() -> dict[str, Any]:
    return {"params": draw(0), "grads": draw(1), "momentum_buffers": draw(2), "ema_params": draw(3)}


def step(tensors: dict[str, Any], impl: str, **more: Any) -> list[Tensor]:
    options = {"lr": torch.tensor(0.1), "momentum": 0.9, "weight_decay": [0.01] * len(tensors["params"]), **more}
    sgd_ema_(**tensors, **options, impl=impl)
    written = [t for name, values in tensors.items() if name != "grads" for t in values]
    return [t for t in written if t is not None]


@both
def test_by_hand(impl: str) -> None:
    p, b, e = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.0]), torch.tensor([0.0, 4.0])
    g = torch.tensor([8.0, 4.0])
    lr = torch.tensor(0.5)
    sgd_ema_([p], [g], [b], [e], lr=lr, momentum=0.5, weight_decay=[0.25], ema_momentum=0.75,
             inv_scale=torch.tensor(0.25), impl=impl)  # fmt: skip
    # d = 8/4 + 1/4 = 2.25 and 4/4 - 2/4 = 0.5; b = 0.25 + 2.25 and 0.5; p = 1 - 1.25 and -2 - 0.25
    assert b.tolist() == [2.5, 0.5]
    assert p.tolist() == [-0.25, -2.25]
    assert e.tolist() == [-0.0625, 3 - 2.25 / 4]


@pytest.mark.parametrize("impl", [CPP])
@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16, torch.float16])
def test_several_steps_follow_the_reference(impl: str, grad: torch.dtype) -> None:
    ours, theirs = state(), state()
    for seed in range(4, 9):
        for tensors, name in ((ours, impl), (theirs, "reference")):
            tensors["grads"] = [g.to(grad) for g in draw(seed)]
            result = step(tensors, name, inv_scale=torch.tensor(0.5))
            tensors[name] = result
            del tensors[name]
    for name in ("params", "momentum_buffers", "ema_params"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


@both
def test_any_layout_of_any_tensor(impl: str) -> None:
    """Every value is updated by its own neighbours, whatever the order in memory; padding between rows stays."""
    layouts = {
        "contiguous": lambda x: x.clone(),
        "channels last": lambda x: x.clone(memory_format=torch.channels_last),
        "transposed": lambda x: x.transpose(0, 1).clone().transpose(0, 1),
        "apart": lambda x: torch.full((*x.shape, 2), 7.0)[..., 0].copy_(x),
    }
    shape = ((4, 5, 3, 2),)
    expected = step({name: [x.double() for x in values] for name, values in {
        "params": draw(0, shape), "grads": draw(1, shape), "momentum_buffers": draw(2, shape),
        "ema_params": draw(3, shape)}.items()}, "reference")  # fmt: skip
    for name, lay in layouts.items():
        for other in layouts.values():
            tensors: dict[str, Any] = {
                "params": [lay(draw(0, shape)[0])],
                "grads": [other(draw(1, shape)[0])],
                "momentum_buffers": [lay(draw(2, shape)[0])],
                "ema_params": [other(draw(3, shape)[0])],
                "param_copies": [other(draw(4, shape)[0].bfloat16().float()).bfloat16()],
            }
            strides = [t.stride() for values in tensors.values() for t in values]
            written = step(tensors, impl)
            torch.testing.assert_close([w.double() for w in written[:3]], expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(written[3], written[0].bfloat16())
            assert strides == [t.stride() for values in tensors.values() for t in values]
            if name == "apart":
                assert (tensors["params"][0]._base[..., 1] == 7).all()


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copies_hold_the_rounded_new_values(impl: str, dtype: torch.dtype) -> None:
    tensors = state()
    tensors["ema_params"][1] = None
    tensors["param_copies"] = [p.to(dtype) for p in draw(8)]
    tensors["ema_copies"] = [p.to(dtype) for p in draw(9)]
    tensors["param_copies"][0] = tensors["ema_copies"][1] = None
    step(tensors, impl)
    for copies, sources in (("param_copies", "params"), ("ema_copies", "ema_params")):
        for copy, source in zip(tensors[copies], tensors[sources], strict=True):
            assert copy is None or torch.equal(copy, source.to(dtype))


@both
@pytest.mark.parametrize("skip", [torch.tensor(True), torch.tensor(1.0), torch.tensor(math.nan)])
def test_a_skipped_step_changes_no_bit_even_with_nan(impl: str, skip: Tensor) -> None:
    tensors = state() | {"grads": [torch.full_like(p, math.nan) for p in draw(0)]}
    tensors["param_copies"] = [p.bfloat16() for p in draw(8)]
    tensors["ema_copies"] = [p.bfloat16() for p in draw(9)]
    before = [t.clone() for name, values in tensors.items() if name != "grads" for t in values]
    assert all(map(torch.equal, step(tensors, impl, skip=skip), before))


@both
def test_skip_of_zero_is_a_step(impl: str) -> None:
    plain, zero, false = state(), state(), state()
    expected = step(plain, impl)
    assert all(map(torch.equal, step(zero, impl, skip=torch.tensor(0.0)), expected))
    assert all(map(torch.equal, step(false, impl, skip=torch.tensor(False)), expected))


@both
def test_a_nan_gradient_stays_a_nan(impl: str) -> None:
    tensors = state()
    tensors["grads"][0][1, 2] = math.nan
    step(tensors, impl)
    for name in ("params", "momentum_buffers", "ema_params"):
        nan = tensors[name][0].isnan()
        assert nan[1, 2]
        assert nan.sum() == 1


@both
def test_scalars_on_the_device(impl: str) -> None:
    expected = step(state(), impl, momentum=0.75, ema_momentum=0.5)
    got = step(state(), impl, momentum=torch.tensor(0.75), ema_momentum=torch.tensor(0.5))
    assert all(map(torch.equal, expected, got))


@both
def test_an_ema_without_momentum_is_the_parameter(impl: str) -> None:
    tensors = state()
    step(tensors, impl, ema_momentum=0.0)
    assert all(map(torch.equal, tensors["params"], tensors["ema_params"]))


@pytest.mark.parametrize("impl", ["reference", CPP, TRITON])
def test_parameters_that_require_a_gradient(impl: str) -> None:
    tensors = state()
    tensors["params"] = [nn.Parameter(p) for p in tensors["params"]]
    versions = [p._version for p in tensors["params"]]
    step(tensors, impl)
    assert all(p.requires_grad and p.grad_fn is None for p in tensors["params"])
    # Autograd refuses a backward through weights that have changed since the forward.
    assert all(p._version > v for p, v in zip(tensors["params"], versions, strict=True))


def test_one_parameter_in_float64_takes_the_reference() -> None:
    tensors = {name: [x.double() if i == 1 else x for i, x in enumerate(v)] for name, v in state().items()}
    step(tensors, "auto")
    with pytest.raises(ValueError, match=r"impl='cpp' takes float32, got torch\.float64"):
        step(tensors, "cpp")


@both
@pytest.mark.parametrize("name", ["grads", "momentum_buffers", "ema_params", "param_copies", "ema_copies"])
def test_another_shape_is_named(impl: str, name: str) -> None:
    tensors = state()
    tensors.setdefault(name, [p.bfloat16() for p in draw(5)])[1] = torch.zeros(5)
    with pytest.raises(ValueError, match=rf"sgd_ema_: {name}\[1\] must have the parameter's shape \(3,\), got \(5,\)"):
        step(tensors, impl)


@pytest.mark.parametrize("impl", [CPP])
def test_another_dtype_is_named(impl: str) -> None:
    for name, message in (
        ("grads", "float32, bfloat16 or float16"),
        ("ema_params", "float32"),
        ("param_copies", "bfloat16 or float16"),
    ):
        tensors = state()
        tensors.setdefault(name, [p.bfloat16() for p in draw(5)])[2] = torch.zeros(SHAPES[2], dtype=torch.float64)
        with pytest.raises(ValueError, match=rf"sgd_ema_: {name}\[2\] must be {message}, got Double"):
            step(tensors, impl)


@pytest.mark.parametrize("impl", [CPP])
def test_threads_never_show_in_the_bits(impl: str) -> None:
    before = torch.get_num_threads()
    shapes = ((300, 400), (77,), (64, 32, 3, 3))
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            names = ("params", "grads", "momentum_buffers", "ema_params")
            results.append(step({n: draw(i, shapes) for i, n in enumerate(names)}, impl))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


@pytest.mark.skipif(not _cpp.LOADED, reason=_cpp.REASON or "loaded")
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_meets_the_reference(level: str) -> None:
    # Read once per process, hence one of its own. A level that this CPU lacks runs the best one it has.
    code = """
import torch
from fastrex_kernels import sgd_ema_
for kind in (torch.float32, torch.bfloat16, torch.float16):
    results = []
    for impl in ("cpp", "reference"):
        g = torch.Generator().manual_seed(0)
        p, b, e, d = ([torch.randn(n, generator=g) for n in (1, 15, 16, 333)] for _ in range(4))
        copies = [x.half() for x in p], [x.bfloat16() for x in p]
        sgd_ema_(p, [x.to(kind) for x in d], b, e, lr=torch.tensor(0.1), momentum=0.9, weight_decay=[0.01] * 4,
                 param_copies=copies[0], ema_copies=copies[1], impl=impl)
        assert all(map(torch.equal, copies[0], [x.half() for x in p]))
        assert all(map(torch.equal, copies[1], [x.bfloat16() for x in e]))
        results.append([*p, *b, *e])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
"""
    path = str(Path(__file__).parents[1] / "kernels")
    environment = {**os.environ, "FASTREX_ISA": level, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@both
def test_compiled_in_one_graph(impl: str) -> None:
    def update(params, grads, buffers, emas, lr):
        sgd_ema_(params, grads, buffers, emas, lr=lr, momentum=0.9, weight_decay=[0.01] * len(params), impl=impl)

    plain, compiled = state(), state()
    update(*plain.values(), torch.tensor(0.1))
    torch.compile(update, fullgraph=True, backend="aot_eager")(*compiled.values(), torch.tensor(0.1))
    for name in plain:
        assert all(map(torch.equal, plain[name], compiled[name])), name


def test_no_parameters_is_no_step() -> None:
    sgd_ema_([], [], [], [], lr=torch.tensor(0.1), momentum=0.9, weight_decay=[])
