"""Measuring one call: times of several implementations that alternate, and their distance from the truth."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from fastrex_kernels._op import Call

DIRECTIONS = ("fwd", "bwd", "fwd_bwd")
# Rounding of a result itself, and of sums in another order than the truth's: units of its dtype.
ROUNDINGS = 4
MIN_ROUNDS, MAX_ROUNDS = 5, 2000
HOPELESS_MS = 4000.0
# Larger than every L2: what a call reads is not there because the call before it has just read it.
FLUSH_BYTES = 256 * 2**20
SLICE = 2**24
GRADIENT = "gradient of"


@dataclass(frozen=True)
class Timed:
    """``run`` is timed; what ``prepare`` returns is its argument and is made outside the time."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None


def order(names: Sequence[str], number: int) -> list[str]:
    """Names in the order of round ``number``: the first place rotates, and every second turn runs backwards, so that
    nobody always follows the same rival."""
    count = len(names)
    turned = [names[(place + number) % count] for place in range(count)]
    return turned[::-1] if number // count % 2 else turned


def interleave(calls: Mapping[str, Timed], seconds: float, device: str) -> dict[str, list[float]]:
    """Milliseconds of each call, in rounds that run all of them once, until ``seconds`` are over (5 rounds at least).

    A call of several seconds that takes 5 times as long as the fastest is not repeated: its warm-up is its time.
    On a GPU: events around the call, and L2 flushed before it.
    """
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    clock = _cuda_clock() if device == "cuda" else _cpu_time
    gc.collect()
    gc.disable()
    try:
        first = {name: clock(calls[name]) for name in names}
        fastest = min(first.values(), default=0.0)
        slow = {name for name, taken in first.items() if taken > max(HOPELESS_MS, 5 * fastest)}
        for name in slow:
            times[name].append(first[name])
        names = [name for name in names if name not in slow]
        start = time.perf_counter()
        for number in range(MAX_ROUNDS):
            for name in order(names, number):
                times[name].append(clock(calls[name]))
            if number + 1 >= MIN_ROUNDS and time.perf_counter() - start > seconds:
                break
    finally:
        gc.enable()
    return times


def _cpu_time(call: Timed) -> float:
    argument = call.prepare()
    start = time.perf_counter_ns()
    result = call.run(argument)
    elapsed = time.perf_counter_ns() - start
    # Freed after the clock has stopped: whose results are larger is not the question.
    del result, argument
    return elapsed / 1e6


def _cuda_clock() -> Callable[[Timed], float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def measure(call: Timed) -> float:
        argument = call.prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        # The flush also keeps the device busy while the host issues the call: launches show only where they are late.
        flush.zero_()
        start.record()
        result = call.run(argument)
        end.record()
        torch.cuda.synchronize()
        del result, argument
        return float(start.elapsed_time(end))

    return measure


def quantile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the sorted values."""
    ranked = sorted(values)
    place = share * (len(ranked) - 1)
    low = int(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (place - low)


def timed(function: Callable[..., Any], call: Call, direction: str) -> Timed:
    """``function`` on ``call``: its forward without gradients, its backward after an untimed forward, or both."""
    inputs = [call.tensors[name] for name in call.grads]
    # Made by the first call, the warm-up, and kept: filling a gradient as large as an image batch is nobody's work.
    upstream: list[Tensor] = []

    def forward(_: object = None) -> Any:
        return function(**call.tensors, **call.options)

    def forward_only(_: object) -> Any:
        with torch.no_grad():
            return function(**call.tensors, **call.options)

    def backward(roots: list[Tensor]) -> Any:
        if not upstream:
            upstream.extend(torch.ones_like(root) for root in roots)
        return torch.autograd.grad(roots, inputs, upstream)

    if direction == "fwd":
        return Timed(forward_only)
    if direction == "bwd":
        return Timed(backward, lambda: _roots(forward()))
    return Timed(lambda _: backward(_roots(forward())))


def available(call: Call, asked: Sequence[str]) -> list[str]:
    """Directions of a call among those asked for; without gradients there is only the forward."""
    return [d for d in DIRECTIONS if d in asked] if call.grads else ["fwd"]


def main_direction(directions: Sequence[str]) -> str:
    """What a training step runs."""
    return "fwd_bwd" if "fwd_bwd" in directions else directions[0]


def requiring(call: Call) -> Call:
    """The same call whose ``grads`` are leaves that require a gradient."""
    tensors = dict(call.tensors)
    for name in call.grads:
        tensors[name] = tensors[name].detach().requires_grad_()
    return Call(tensors, call.options, call.grads, call.writes)


def exact(call: Call) -> Call:
    """The same numbers in float64, also where an option names the dtype of the result."""

    def double(leaf: Any) -> Any:
        if isinstance(leaf, torch.dtype):
            return torch.float64 if leaf.is_floating_point else leaf
        return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    tensors, options = (tree_map(double, dict(part)) for part in (call.tensors, call.options))
    return requiring(Call(tensors, options, call.grads, call.writes))


def outcome(function: Callable[..., Any], call: Call, *, gradients: bool) -> dict[str, Tensor]:
    """What one call gives, by name: outputs, tensors written in place and, asked for, the gradients.

    The upstream gradients are the same numbers for every implementation and dtype.
    """
    with torch.set_grad_enabled(gradients):
        outputs = flat(function(**call.tensors, **call.options))
    results = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    if gradients:
        generator = torch.Generator().manual_seed(17)
        roots = _roots(outputs)
        upstream = [torch.randn(t.shape, generator=generator).to(t.device, t.dtype) for t in roots]
        found = torch.autograd.grad(roots, [call.tensors[name] for name in call.grads], upstream)
        results |= {f"{GRADIENT} {name}": g for name, g in zip(call.grads, found, strict=True)}
    for name in call.writes:
        results |= {f"{name} {i}": t.detach() for i, t in enumerate(flat(call.tensors[name]))}
    return results


def distance(a: Tensor, truth: Tensor) -> float:
    """Largest difference, relative to the largest number of the truth. A NaN on one side only is infinitely far."""
    if a.shape != truth.shape:
        raise ValueError(f"the result has shape {tuple(a.shape)}, the truth {tuple(truth.shape)}")
    worst, largest = 0.0, 0.0
    a, truth = a.reshape(-1), truth.reshape(-1)
    # In slices: a copy in float64 of a million rows is as large as everything else together.
    for start in range(0, a.numel(), SLICE):
        x, y = a[start : start + SLICE].double(), truth[start : start + SLICE].double()
        gone = torch.isnan(x)
        if not torch.equal(gone, torch.isnan(y)):
            return float("inf")
        worst = max(worst, float((x - y).abs().masked_fill_(gone, 0.0).max()))
        largest = max(largest, float(y.abs().masked_fill_(gone, 0.0).max()))
    return worst / largest if largest else worst


def distances(results: Mapping[str, Tensor], truth: Mapping[str, Tensor], *, gradients: bool) -> dict[str, float]:
    """The distance of every result from its truth, which may hold gradients that were not asked for."""
    names = [name for name in truth if gradients or not name.startswith(GRADIENT)]
    if list(results) != names:
        raise ValueError(f"it gives {', '.join(results) or 'nothing'}; the definition gives {', '.join(names)}")
    return {name: distance(value, truth[name]) for name, value in results.items()}


def judge(
    errors: Mapping[str, float], yardstick: Mapping[str, float], units: Mapping[str, float]
) -> tuple[float, float, str]:
    """The result that is furthest from the truth for what is allowed: (error, budget, its name).

    Args:
        errors: distances of one implementation. yardstick: those of eager PyTorch in the same dtype.
        units: unit of rounding of each result's dtype, 0 for integers.
    """
    budgets = {name: 2 * yardstick.get(name, 0.0) + ROUNDINGS * units[name] for name in errors}

    def excess(name: str) -> float:
        return errors[name] / budgets[name] if budgets[name] else float("inf") if errors[name] else 0.0

    worst = max(errors, key=excess)
    return errors[worst], budgets[worst], worst


def units(results: Mapping[str, Tensor]) -> dict[str, float]:
    """Unit of rounding of each result."""
    return {name: torch.finfo(t.dtype).eps if t.is_floating_point() else 0.0 for name, t in results.items()}


def flat(tree: Any) -> list[Tensor]:
    """The tensors of nested lists, tuples and dicts."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _roots(outputs: Any) -> list[Tensor]:
    return [t for t in flat(outputs) if t.requires_grad]
