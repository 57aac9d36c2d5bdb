"""``batch_norm_act``: against torch's own layers, by finite differences, and two ranks against the joined batch."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import environment
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

from fastrex_kernels import _cpp
from fastrex_kernels.batch_norm_act import batch_norm_act

cpp = pytest.mark.skipif(not _cpp.LOADED, reason=f"the C++ operators are not loaded: {_cpp.REASON}")
IMPLS = [pytest.param("reference"), pytest.param("cpp", marks=cpp)]
# 4-d with odd sizes, one image (all statistics from its pixels), 1x1 pixels, and rows of features.
SHAPES = [(4, 3, 5, 7), (1, 2, 3, 3), (6, 5, 1, 1), (9, 4)]


def parameters(channels: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """weight, bias (both with gradient), running_mean, running_var, none of them at its default."""
    generator = torch.Generator().manual_seed(seed)
    values = (torch.rand(channels, generator=generator, dtype=torch.float64) + 0.5 for _ in range(4))
    weight, bias, mean, var = (value.to(dtype) for value in values)
    return [weight.requires_grad_(), bias.sub(1).requires_grad_(), mean, var]


def side_by_side(tensor: Tensor, impl: str = "cpp") -> Tensor:
    """What the kernels take; the reference is tested with channels apart."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 and impl == "cpp" else tensor


def torch_layer(shape: tuple[int, ...], values: list[Tensor], momentum: float, eps: float) -> nn.Module:
    kind = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    layer = kind(shape[1], momentum=momentum, eps=eps).to(values[0].dtype)
    names = ("weight", "bias", "running_mean", "running_var")
    layer.load_state_dict(dict(zip(names, values, strict=True)), strict=False)
    return layer


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_values_gradients_and_buffers_equal_torch(
    shape: tuple[int, ...], relu: bool, with_residual: bool, training: bool, impl: str
) -> None:
    torch.manual_seed(1)
    dtype = torch.float64 if impl == "reference" else torch.float32
    values = parameters(shape[1], dtype)
    layer = torch_layer(shape, values, momentum=0.3, eps=1e-3).train(training)
    x, skip = (side_by_side(t, impl) for t in torch.randn(2, *shape, dtype=dtype) + 3.0)
    upstream = torch.randn(shape, dtype=dtype)
    ours, theirs = ([t.clone().requires_grad_() for t in (x, skip)] for _ in range(2))

    wanted = layer(theirs[0]) + (theirs[1] if with_residual else 0.0)
    wanted = wanted.relu() if relu else wanted
    torch.autograd.backward(wanted, upstream)
    got = batch_norm_act(
        ours[0], *values, residual=ours[1] if with_residual else None, relu=relu, training=training,
        momentum=0.3, eps=1e-3, impl=impl,
    )  # fmt: skip
    torch.autograd.backward(got, upstream)

    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(ours[0].grad, theirs[0].grad)
    torch.testing.assert_close(values[0].grad, layer.weight.grad)
    torch.testing.assert_close(values[1].grad, layer.bias.grad)
    torch.testing.assert_close(values[2], layer.running_mean)
    torch.testing.assert_close(values[3], layer.running_var)
    if with_residual:
        torch.testing.assert_close(ours[1].grad, theirs[1].grad)


# Finite differences cost two evaluations per number: small shapes.
@pytest.mark.parametrize("shape", [(2, 2, 3, 2), (5, 3)], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_gradcheck(shape: tuple[int, ...], training: bool) -> None:
    torch.manual_seed(2)
    weight, bias, mean, var = parameters(shape[1])
    x, skip = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def op(x: Tensor, weight: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
        return batch_norm_act(x, weight, bias, mean.clone(), var.clone(), residual=skip, training=training)

    assert torch.autograd.gradcheck(op, (x, weight, bias, skip))


def test_input_and_residual_are_left_alone() -> None:
    x, skip = torch.randn(2, 4, 3, 2, 2)
    before = x.clone(), skip.clone()
    with torch.no_grad():
        batch_norm_act(x, *parameters(3, torch.float32), residual=skip)
    assert torch.equal(x, before[0])
    assert torch.equal(skip, before[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", IMPLS)
def test_16_bit_input_with_fp32_parameters(dtype: torch.dtype, impl: str) -> None:
    torch.manual_seed(3)
    values = parameters(4, torch.float32)
    reference = [value.detach().clone() for value in values]
    x = side_by_side(torch.randn(16, 4, 6, 6) + 2.0, impl).to(dtype).requires_grad_()
    wanted = batch_norm_act(x.detach().float(), *reference, impl="reference")
    got = batch_norm_act(x, *values, impl=impl)
    torch.autograd.backward(got.sum())
    assert got.dtype == dtype
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert values[0].grad is not None
    assert values[0].grad.dtype == torch.float32
    # Half a unit in the last place of the largest value; the statistics themselves are fp32 and must not lose bits.
    torch.testing.assert_close(got.float(), wanted, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    torch.testing.assert_close(values[2], reference[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values[3], reference[3], rtol=1e-5, atol=1e-5)


def test_channels_last_is_kept_forward_and_backward() -> None:
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = batch_norm_act(x, *parameters(8, torch.float32), residual=x)
    torch.autograd.backward(y, torch.ones_like(y))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad is not None
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_training_without_running_statistics() -> None:
    weight, bias, mean, var = parameters(3)
    x = torch.randn(5, 3, dtype=torch.float64)
    wanted = batch_norm_act(x, weight, bias, mean, var)
    assert torch.equal(batch_norm_act(x, weight, bias, None, None), wanted)


def outcome(
    impl: str, x: Tensor, skip: Tensor | None = None, *, upstream: Tensor | None = None, **options: Any
) -> list[Tensor]:
    """Output, gradients of input, weight, bias (and residual), running mean and variance."""
    values = parameters(x.shape[1], torch.promote_types(x.dtype, torch.float32))
    leaves = [t.detach().clone().requires_grad_() for t in (x, skip) if t is not None]
    y = batch_norm_act(leaves[0], *values, residual=leaves[1] if skip is not None else None, impl=impl, **options)
    torch.autograd.backward(y, torch.ones_like(y) if upstream is None else upstream)
    return [t.detach() for t in (y, leaves[0].grad, values[0].grad, values[1].grad, *values[2:]) if t is not None] + [
        leaf.grad for leaf in leaves[1:] if leaf.grad is not None
    ]


def assert_same(got: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a.nan_to_num(7.25), b.nan_to_num(7.25))


def test_nchw_goes_to_the_reference_and_is_refused_by_name() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert_same(outcome("auto", x), outcome("reference", x))
    if _cpp.LOADED:
        with pytest.raises(ValueError, match=r"^batch_norm_act: input must be channels-last for impl='cpp'"):
            outcome("cpp", x)


# Both need every path of the loops: segments, chunks, folded rows, a ragged end.
KERNEL_SHAPES = [(9, 8, 30, 33), (5, 3, 7, 9), (3, 37, 5, 7), (300, 48), (2, 2048)]


@cpp
@pytest.mark.parametrize("shape", KERNEL_SHAPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_the_number_of_threads_changes_no_bit(shape: tuple[int, ...], with_residual: bool) -> None:
    torch.manual_seed(4)
    x, skip, upstream = (side_by_side(torch.randn(shape)) for _ in range(3))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(outcome("cpp", x, skip if with_residual else None, upstream=upstream))
    torch.set_num_threads(1)
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


ISA = """
import sys, torch
from fastrex_kernels import _cpp
if not _cpp.LOADED:
    for path in sys.argv[2:]:
        torch.ops.load_library(path)
    _cpp.LOADED = True
from safetensors.torch import save_file
import test_batch_norm_act as t
found = {}
for shape in t.KERNEL_SHAPES:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for residual in (False, True):
            torch.manual_seed(5)
            x, skip, upstream = (t.side_by_side(torch.randn(shape)).to(dtype) for _ in range(3))
            got = t.outcome("cpp", x, skip if residual else None, upstream=upstream)
            found |= {f"{shape} {dtype} {residual} {i}": v.contiguous() for i, v in enumerate(got)}
save_file(found, sys.argv[1])
"""


@cpp
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_equals_the_reference(isa: str, tmp_path: Path) -> None:
    env = {**environment(), "FASTREX_ISA": isa}
    env["PYTHONPATH"] += f"{os.pathsep}{Path(__file__).parent}"
    run = [sys.executable, "-c", ISA, str(tmp_path / "found"), *torch.ops.loaded_libraries]
    subprocess.run(run, check=True, env=env)
    found = load_file(tmp_path / "found")
    for shape, dtype, residual in itertools.product(
        KERNEL_SHAPES, (torch.float32, torch.bfloat16, torch.float16), (False, True)
    ):
        torch.manual_seed(5)
        x, skip, upstream = (side_by_side(torch.randn(shape)).to(dtype).double() for _ in range(3))
        wanted = outcome("reference", x, skip if residual else None, upstream=upstream)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        for i, value in enumerate(wanted):
            got = found[f"{shape} {dtype} {residual} {i}"].double()
            torch.testing.assert_close(got, value, rtol=tolerance, atol=tolerance * float(value.abs().max()))


@cpp
# Dynamo makes an instance of every autograd.Function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_compiled_equals_eager(training: bool, with_residual: bool) -> None:
    torch.manual_seed(6)
    x, skip, upstream = (side_by_side(torch.randn(4, 12, 5, 3)) for _ in range(3))
    torch.compiler.reset()

    def run(function: Any) -> list[Tensor]:
        values = parameters(12, torch.float32)
        a, b = x.clone().requires_grad_(), skip.clone().requires_grad_()
        y = function(a, *values, residual=b if with_residual else None, training=training, impl="cpp")
        torch.autograd.backward(y, upstream)
        return [t.detach() for t in (y, a.grad, values[0].grad, values[1].grad, *values[2:]) if t is not None]

    assert_same(run(torch.compile(batch_norm_act, fullgraph=True, backend="aot_eager")), run(batch_norm_act))


@cpp
@pytest.mark.parametrize("shape", [(9, 16, 8, 8), (7, 5, 6, 5)], ids=str)
def test_a_mean_of_a_thousand_deviations_costs_nothing(shape: tuple[int, ...]) -> None:
    torch.manual_seed(7)
    x, upstream = side_by_side(torch.randn(shape)) + 1e3, side_by_side(torch.randn(shape))
    got = outcome("cpp", x, upstream=upstream, relu=False)
    wanted = outcome("reference", x.double(), upstream=upstream.double(), relu=False)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6 * float(b.abs().max()))


@cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_zeros_underflow_and_nan_pass_the_relu_as_torch_lets_them(
    dtype: torch.dtype, with_residual: bool, training: bool
) -> None:
    # One channel of zeros, one whose results underflow in 16 bits, one with a NaN, one with an infinity.
    far = 3.0 if training else float("inf")  # the statistics of an infinity are NaN or infinite, as the order has it
    x = torch.tensor([[0.0, 1.0, 1.0, 2.0], [0.0, -1.0, float("nan"), far]]).repeat(9, 1).to(dtype)
    weight, bias = torch.tensor([1.0, 2.0**-26, 1.0, 1.0]), torch.tensor([0.0, 0.0, 0.5, 0.5])
    skip = torch.zeros_like(x)
    found = []
    for function in ("torch", "cpp"):
        a, s = x.clone().requires_grad_(), skip.clone().requires_grad_()
        mean, var = torch.zeros(4), torch.ones(4)
        residual = s if with_residual else None
        if function == "torch":
            y = torch.nn.functional.batch_norm(a, mean, var, weight, bias, training)
            y = (y if residual is None else y + residual).relu()
        else:
            y = batch_norm_act(a, weight, bias, mean, var, residual=residual, training=training, impl="cpp")
        torch.autograd.backward(y, torch.ones_like(y))
        found.append((y.detach(), a.grad, s.grad, mean, var))
    (y, dx, dskip, mean, var), (y2, dx2, dskip2, mean2, var2) = found
    torch.testing.assert_close(y2, y, equal_nan=True)
    torch.testing.assert_close(mean2, mean, equal_nan=True)
    torch.testing.assert_close(var2, var, equal_nan=True)
    if with_residual:
        assert dskip is not None
        assert dskip2 is not None
        assert torch.equal(dskip2, dskip)
    elif not training:
        torch.testing.assert_close(dx2, dx, equal_nan=True)


@cpp
def test_running_statistics_and_weights_of_16_bits() -> None:
    values = [v.detach().bfloat16() for v in parameters(6, torch.float32)]
    x = torch.randn(40, 6, dtype=torch.bfloat16)
    ours, theirs = ([v.clone().requires_grad_(i < 2) for i, v in enumerate(values)] for _ in range(2))
    got, wanted = batch_norm_act(x, *ours, impl="cpp"), batch_norm_act(x, *theirs, impl="reference")
    for y in (got, wanted):
        torch.autograd.backward(y, torch.ones_like(y))
    torch.testing.assert_close(got, wanted, rtol=2**-6, atol=2**-8)  # the reference rounds between its steps
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=2**-6, atol=2**-4)


@cpp
def test_vectors_with_strides_and_rows_of_a_wider_tensor() -> None:
    wide = torch.randn(12, 10)
    values = [torch.rand(10)[::2] + 0.5 for _ in range(4)]
    copies = [value.clone() for value in values]
    got = batch_norm_act(wide[:, :5], *values, impl="cpp")
    assert torch.equal(got, batch_norm_act(wide[:, :5].contiguous(), *copies, impl="cpp"))
    assert torch.equal(values[3], copies[3])


@pytest.mark.parametrize("impl", IMPLS)
def test_two_forwards_before_the_backwards_and_a_backward_twice(impl: str) -> None:
    torch.manual_seed(8)
    dtype = torch.float32
    first, second = (side_by_side(torch.randn(4, 6, 3, 3, dtype=dtype), impl).requires_grad_() for _ in range(2))
    values = parameters(6, dtype)
    outputs = [batch_norm_act(x, *values, residual=x, impl=impl) for x in (first, second)]
    for x, y in zip((first, second), outputs, strict=True):
        (alone,) = torch.autograd.grad(batch_norm_act(x, *parameters(6, dtype), residual=x, impl=impl).sin().sum(), x)
        for _ in range(2):
            (grad,) = torch.autograd.grad(y.sin().sum(), x, retain_graph=True)
            assert torch.equal(grad, alone)


@cpp
def test_statistics_changed_before_an_eval_backward_are_noticed() -> None:
    weight, bias, mean, var = parameters(3, torch.float32)
    y = batch_norm_act(torch.randn(4, 3), weight, bias, mean, var, training=False, impl="cpp")
    batch_norm_act(torch.randn(4, 3), weight, bias, mean, var, impl="cpp")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(y.sum())


@cpp
def test_only_wanted_gradients() -> None:
    x, upstream = torch.randn(2, 8, 5)
    for training in (False, True):
        frozen = [v.detach() for v in parameters(5, torch.float32)]
        skip = torch.randn(8, 5, requires_grad=True)
        y = batch_norm_act(x, *frozen, residual=skip, training=training, impl="cpp")
        torch.autograd.backward(y, upstream)
        assert skip.grad is not None
        assert torch.equal(skip.grad, torch.where(y > 0, upstream, 0.0))
    assert not batch_norm_act(x, *frozen, impl="cpp").requires_grad


@cpp
def test_an_empty_batch_in_eval_mode() -> None:
    for shape in ((0, 3), (0, 3, 4, 4)):
        x = side_by_side(torch.empty(shape)).requires_grad_()
        weight, bias, mean, var = parameters(3, torch.float32)
        y = batch_norm_act(x, weight, bias, mean, var, training=False, impl="cpp")
        torch.autograd.backward(y.sum())
        assert y.shape == shape
        assert torch.equal(weight.grad if weight.grad is not None else torch.ones(3), torch.zeros(3))


def call(**changes: Any) -> Tensor:
    weight, bias, mean, var = parameters(3, torch.float32)
    arguments = {"input": torch.randn(4, 3), "weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
    return batch_norm_act(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (
            {"input": torch.randn(4, 3, 2)},
            ValueError,
            r"input must be \[N, C\] or \[N, C, H, W\], got shape \[4, 3, 2\]",
        ),
        ({"input": torch.ones(4, 3, dtype=torch.int64)}, TypeError, "input must be floating point, got torch.int64"),
        (
            {"input": torch.randn(4, 3).double()},
            TypeError,
            "weight must be torch.float64 for an input of torch.float64",
        ),
        ({"weight": torch.ones(2)}, ValueError, r"weight must be \[C\] = \[3\], got \[2\]"),
        ({"bias": torch.ones(3).double()}, TypeError, "bias must have weight's dtype torch.float32, got torch.float64"),
        ({"running_var": torch.ones(3, device="meta")}, ValueError, "running_var must be on cpu like input, got meta"),
        ({"running_var": None}, ValueError, "running_mean and running_var must be given together"),
        ({"running_mean": None, "training": False}, ValueError, "running_mean must be a tensor when training=False"),
        ({"residual": torch.randn(1, 3)}, ValueError, r"residual must have input's shape \[4, 3\], got \[1, 3\]"),
        ({"residual": torch.randn(4, 3).half()}, TypeError, "residual must have input's dtype torch.float32"),
        ({"momentum": 1.5}, ValueError, r"momentum must be in \[0, 1\], got 1.5"),
        ({"eps": -1e-5}, ValueError, "eps must not be negative, got -1e-05"),
        ({"impl": "fast"}, ValueError, "impl must be one of auto, reference, cpp, triton, got 'fast'"),
        ({"input": torch.randn(1, 3)}, ValueError, "at least 2 values per channel .* got 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^batch_norm_act: .*{message}"):
        call(**changes)


def test_one_value_per_channel_is_fine_in_eval_mode() -> None:
    assert call(input=torch.randn(1, 3), training=False).shape == (1, 3)


# Rows per rank: unequal; one rank alone below the two rows that a batch needs; one rank with nothing at all.
SPLITS = [(5, 3), (1, 4), (0, 4)]
JOINED_SHAPES = [(3, 4, 5), (3,)]
SETUPS = [(torch.float64, "reference"), (torch.bfloat16, "reference")]
if _cpp.LOADED:
    SETUPS += [(torch.float32, "cpp"), (torch.bfloat16, "cpp")]


def joined_batch(rows: int, rest: tuple[int, ...], dtype: torch.dtype, impl: str) -> list[Tensor]:
    """input (in fp64 with a mean of 1000 deviations: sums of squares would lose six digits), residual, upstream."""
    generator = torch.Generator().manual_seed(rows)
    x, skip, upstream = torch.randn(3, rows, *rest, generator=generator, dtype=torch.float64)
    return [side_by_side(t.to(dtype), impl) for t in (x + 1e3 if dtype == torch.float64 else x, skip, upstream)]


def run_one(batch: list[Tensor], group: Any, impl: str) -> dict[str, Tensor]:
    x, skip, upstream = batch
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias, mean, var = parameters(x.shape[1], wide)
    x, skip = x.clone().requires_grad_(), skip.clone().requires_grad_()
    y = batch_norm_act(x, weight, bias, mean, var, residual=skip, momentum=0.3, process_group=group, impl=impl)
    torch.autograd.backward(y, upstream)
    results = {"y": y, "dx": x.grad, "dskip": skip.grad, "dweight": weight.grad, "dbias": bias.grad}
    return {name: t.detach() for name, t in {**results, "mean": mean, "var": var}.items() if t is not None}


Ranks = list[tuple[dict[str, Tensor], dict[str, Any]]]


def rank_main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=40)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timeout)
    group = dist.group.WORLD
    calls = 0
    all_reduce = dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return all_reduce(*args, **kwargs)

    dist.all_reduce = counted
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {"calls": []}
    for split, rest, (dtype, impl) in itertools.product(SPLITS, JOINED_SHAPES, SETUPS):
        start = sum(split[:rank])
        own = [t[start : start + split[rank]] for t in joined_batch(sum(split), rest, dtype, impl)]
        calls = 0
        part = run_one(own, group, impl)
        facts["calls"].append(calls)
        tensors |= {f"{split} {rest} {dtype} {impl} {name}": t.double().contiguous() for name, t in part.items()}
    x = torch.randn(3 + rank, 4, 2, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias, mean, var = parameters(4, torch.float32)
    y = batch_norm_act(x, weight, bias, mean, var, process_group=group)
    torch.autograd.backward(y, torch.ones_like(y))
    facts["channels-last"] = [t.is_contiguous(memory_format=torch.channels_last) for t in (y, x.grad) if t is not None]
    weight, bias, mean, var = parameters(3)
    calls = 0
    batch_norm_act(torch.ones(2, 3).double(), weight, bias, mean, var, training=False, process_group=group)
    facts["eval calls"] = calls
    try:
        # One row in all: rank 0 has it, rank 1 has none; both must say so instead of waiting for each other.
        batch_norm_act(torch.ones(1 - rank, 3).double(), weight, bias, mean, var, process_group=group)
    except ValueError as error:
        facts["one row"] = str(error)
    save_file(tensors, folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(facts))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # see fastrex.cli._leave


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What two gloo ranks found: tensors and facts, by rank."""
    folder = tmp_path_factory.mktemp("gloo")
    context: Any = start_processes(rank_main, (folder,), 2, join=False)  # type: ignore[no-untyped-call]
    deadline = time.monotonic() + 120
    # Raises with the traceback of a rank that failed.
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the two ranks did not finish within 120 s")
    return [
        (load_file(folder / f"{rank}.safetensors"), json.loads((folder / f"{rank}.json").read_text()))
        for rank in range(2)
    ]


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("rest", JOINED_SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "impl"), SETUPS, ids=str)
def test_two_ranks_equal_the_joined_batch(
    ranks: Ranks, split: tuple[int, int], rest: tuple[int, ...], dtype: torch.dtype, impl: str
) -> None:
    wanted = run_one(joined_batch(sum(split), rest, dtype, impl), None, impl)
    parts = [{name: found[f"{split} {rest} {dtype} {impl} {name}"] for name in wanted} for found, _ in ranks]
    # fp64: a mean of 1e3 leaves the inputs 13 digits of their deviation. bf16: outputs are rounded, sums of them too.
    exact = dtype == torch.float64
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    for name in ("y", "dx", "dskip"):
        joined = torch.cat([part[name] for part in parts])
        torch.testing.assert_close(joined, wanted[name].double(), rtol=tolerance, atol=tolerance)
    for name in ("dweight", "dbias"):
        torch.testing.assert_close(
            parts[0][name] + parts[1][name], wanted[name].double(), rtol=tolerance, atol=tolerance
        )
    for name in ("mean", "var"):
        torch.testing.assert_close(parts[0][name], wanted[name].double(), rtol=1e-11 if exact else 1e-5, atol=1e-6)
        assert torch.equal(parts[0][name], parts[1][name])


def test_one_all_reduce_forward_and_one_backward(ranks: Ranks) -> None:
    for _, facts in ranks:
        assert set(facts["calls"]) == {2}
        assert facts["eval calls"] == 0


def test_one_row_over_all_ranks_is_refused_by_every_rank(ranks: Ranks) -> None:
    for _, facts in ranks:
        assert "over all ranks) in training, got 1" in facts["one row"]


def test_channels_last_is_kept_over_ranks(ranks: Ranks) -> None:
    for _, facts in ranks:
        assert facts["channels-last"] == [True, True]
