"""One contract for every operator, implementation, case and dtype.

Truth is the reference in float64 on the same numbers. An implementation may be at most twice as far from it as the
PyTorch that users would write is in the same dtype, plus a few units of rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from fastrex_kernels import OPS, _cpp
from fastrex_kernels._op import INTERPRETED, Call, Case, Op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NATIVE = "triton" if DEVICE == "cuda" else "cpp"
# In the interpreter bfloat16 products and sums are silently wrong (see test_interpreter.py).
DTYPES = {
    "cpp": (torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.bfloat16, torch.float16),
}
# Rounding of the result itself, and of sums in another order than the truth's.
ROUNDINGS = 8


def implementations(op: Op) -> list[str]:
    found = []
    if DEVICE == "cpu" and _cpp.LOADED:
        found.append("cpp")
    if DEVICE == "cuda" or INTERPRETED:
        found.append("triton")
    return [impl for impl in found if impl in op.kernels()]


def contract() -> list[Any]:
    return [
        pytest.param(op, case, impl, dtype, id=f"{op.name}-{case.name}-{impl}-{str(dtype)[6:]}")
        for op in OPS
        for case in op.cases
        if not case.bench
        for impl in implementations(op)
        for dtype in DTYPES[impl]
        if dtype in op.dtypes
    ]


def first_cases() -> list[Any]:
    native = [op for op in OPS if implementations(op)]
    return [pytest.param(op, next(c for c in op.cases if not c.bench), id=op.name) for op in native]


@pytest.fixture
def poisoned() -> Iterator[None]:
    """``torch.empty`` gives NaN (or the largest integer), so that an element nobody writes is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def to(tree: Any, dtype: torch.dtype) -> Any:
    """Floating tensors, and options that name a floating dtype, in ``dtype``."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, torch.dtype):
            return dtype if leaf.is_floating_point else leaf
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return tree_map(one, tree)


def flat(tree: Any) -> list[Tensor]:
    return [t for t in tree_flatten(tree)[0] if isinstance(t, Tensor)]


def run(function: Callable[..., Any], call: Call, **more: Any) -> dict[str, Tensor]:
    """Outputs, gradients and written tensors by name; the upstream gradients are the same numbers for everyone."""
    tensors = dict(call.tensors)
    # A copy keeps the strides: a case with odd ones is about them.
    for name, value in tensors.items():
        tensors[name] = tree_map(lambda t: copy_with_strides(t) if isinstance(t, Tensor) else t, value)
    for name in call.grads:
        tensors[name].requires_grad_()
    outputs = flat(function(**tensors, **call.options, **more))
    results = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    roots = [t for t in outputs if t.requires_grad]
    if call.grads:
        generator = torch.Generator().manual_seed(17)
        upstream = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in roots]
        gradients = torch.autograd.grad(roots, [tensors[name] for name in call.grads], upstream)
        results |= {f"gradient of {name}": g for name, g in zip(call.grads, gradients, strict=True)}
    for name in call.writes:
        results |= {f"{name} {i}": t.detach() for i, t in enumerate(flat(tensors[name]))}
    return results


def copy_with_strides(tensor: Tensor) -> Tensor:
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest number; for integers the share that differs."""
    assert a.shape == b.shape
    if not a.numel():
        return 0.0
    if not a.is_floating_point():
        return float((a != b).double().mean())
    a, b = a.double(), b.double()
    if not torch.equal(torch.isnan(a), torch.isnan(b)):
        return float("inf")
    a, b = a.nan_to_num(nan=0.0), b.nan_to_num(nan=0.0)
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("op", "case", "impl", "dtype"), contract())
def test_contract(op: Op, case: Case, impl: str, dtype: torch.dtype) -> None:
    call = op.make(case.sizes, dtype, DEVICE, 0)
    exact = Call(to(call.tensors, torch.float64), to(call.options, torch.float64), call.grads, call.writes)
    truth = run(op.function, exact, impl="reference")
    usual = run(op.eager, call)
    ours = run(op.function, call, impl=impl)
    again = run(op.function, call, impl=impl)
    assert ours.keys() == truth.keys()
    for name, value in ours.items():
        error = distance(value, truth[name])
        if value.is_floating_point():
            allowed = 2 * distance(usual[name], truth[name]) + ROUNDINGS * torch.finfo(value.dtype).eps
        else:
            allowed = 2 * distance(usual[name], truth[name]) + 0.01
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
        if op.deterministic:
            same = torch.equal(value.nan_to_num(nan=0.5), again[name].nan_to_num(nan=0.5))
            assert same, f"{name}: other bits on a repeat"


@pytest.mark.parametrize("op", [op for op in OPS if NATIVE in implementations(op)], ids=lambda op: op.name)
def test_torch_checks_the_raw_operators(op: Op) -> None:
    """Schema (mutations, aliases), fake implementation and dispatch under AOT autograd, on the calls that occur."""
    calls: dict[Any, tuple[Any, ...]] = {}

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.namespace == "fastrex":
                detached = tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, (args, kwargs or {}))
                # One call of each operator for each set of what is given and what is asked for.
                calls[function, *(a is None if not isinstance(a, bool) else a for a in args)] = (function, *detached)
            return function(*args, **(kwargs or {}))

    with Recorder():
        for case in op.cases:
            if not case.bench:
                run(op.function, op.make(case.sizes, op.dtypes[0], DEVICE, 0), impl=NATIVE)
    assert calls
    for function, args, kwargs in calls.values():
        torch.library.opcheck(function, args, kwargs)


# Dynamo itself uses what torch has deprecated.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("op", "case"), first_cases())
def test_compiled_equals_eager(op: Op, case: Case) -> None:
    """``torch.compile(fullgraph=True)`` traces the public function, and changes nothing."""
    torch._dynamo.reset()
    call = op.make(case.sizes, op.dtypes[0], DEVICE, 0)
    expected = run(op.function, call)
    got = run(torch.compile(op.function, fullgraph=True, backend="aot_eager"), call)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("op", [op for op in OPS if "cpp" in implementations(op)], ids=lambda op: op.name)
def test_the_number_of_threads_changes_no_bit(op: Op) -> None:
    # The largest case of the contract: small ones stay on one thread.
    case = max((c for c in op.cases if not c.bench), key=lambda c: size(op, c))
    call = op.make(case.sizes, op.dtypes[0], "cpu", 0)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(op.function, call, impl="cpp"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


def size(op: Op, case: Case) -> int:
    return sum(t.numel() for t in flat(op.make(case.sizes, op.dtypes[0], "cpu", 0).tensors))
