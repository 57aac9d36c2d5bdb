"""One case in a process of its own: the times of all implementations, or the peak memory of one.

A process of its own because the allocator is set for a whole process, a peak needs a fresh one, and a case that is too
large for the machine must not take the others with it. ``python -m benchmarks.worker SPEC`` reads a :class:`Spec` as
JSON and writes its answer, also JSON, to the file that it names.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from fastrex.memory import pool
from fastrex_kernels._op import Call, Case, Cost, Op

from . import machine, measure
from .rivals import RIVALS, Absent
from .truth import truth

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OURS = ("cpp", "triton", "reference")
# A case whose main direction takes longer than this gets no other one.
SLOW_S = 30.0
Answer = dict[str, Any]


@dataclass(frozen=True)
class Spec:
    """What one worker does: ``task`` is "time", "memory" (then ``impls`` is one name) or "both". ``ops`` is the module
    whose ``OPS`` hold the operator."""

    task: str
    ops: str
    op: str
    case: str
    dtype: str
    device: str
    threads: int
    allocator: str
    directions: tuple[str, ...]
    impls: tuple[str, ...]
    seconds: float
    out: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def main() -> None:
    """Entry point."""
    spec = Spec(**json.loads(sys.argv[1]))
    # Inductor's pool of compiling processes would wait on the cores that are measured.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    pooled = spec.allocator == "pooled" and pool()
    torch.set_num_threads(spec.threads)
    op, case = find(spec.ops, spec.op, spec.case)
    answer = {"memory": memory, "time": times, "both": both}[spec.task](spec, op, case)
    answer["pooled"] = pooled
    Path(spec.out).write_text(json.dumps(answer), encoding="utf-8")


def find(module: str, op: str, case: str) -> tuple[Op, Case]:
    """The operator and the case with these names."""
    found = next(o for o in import_module(module).OPS if o.name == op)
    return found, next(c for c in found.cases if c.name == case)


def implementation(op: Op, impl: str, call: Call) -> Callable[..., Any]:
    """The operator as ``impl`` computes it, ours or a rival's. Raises :class:`Absent`."""
    if impl in OURS:
        return lambda **arguments: op.function(**arguments, impl=impl)
    return next(r for r in RIVALS if r.name == impl).build(op, call)


def reason(error: BaseException) -> str:
    """Why an implementation is absent, in one line."""
    if isinstance(error, Absent):
        return str(error)
    if machine.out_of_memory(error):
        return "needs more memory than is free"
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return f"{type(error).__name__}: {first[:200]}"


def make(spec: Spec, op: Op, case: Case) -> Call:
    """The tensors of the case, the same numbers every time."""
    return measure.requiring(op.make(case.sizes, DTYPES[spec.dtype], spec.device, 0))


def times(spec: Spec, op: Op, case: Case) -> Answer:
    """Errors of all implementations, then the interleaved times of those that keep their budget."""
    dtype = DTYPES[spec.dtype]
    sample = make(spec, op, case)
    directions = measure.available(sample, spec.directions)
    costs = {direction: op.cost(case.sizes, dtype, direction) for direction in directions}
    # Before and after the times: a shared machine's memory is twice as fast in one minute as in another.
    able = [_abilities(costs, dtype, spec.device)]
    if spec.device == "cpu":
        machine.limit_memory()
    functions, results, absent = errors(spec, op, case, sample, directions)
    main = measure.main_direction(directions)
    done: list[str] = []
    for direction in [main, *(d for d in directions if d != main)]:
        correct = [
            name for name, result in results.items() if result[direction]["error"] <= result[direction]["budget"]
        ]
        calls = {name: measure.timed(functions[name], sample, direction) for name in correct}
        seconds = spec.seconds / (2 if direction == main else 4)
        start = time.perf_counter()
        for name, taken in measure.interleave(calls, seconds, spec.device).items():
            results[name][direction]["ms"] = [round(measure.quantile(taken, share), 6) for share in (0.2, 0.5, 0.8)]
        done.append(direction)
        if time.perf_counter() - start > SLOW_S:
            break
    machine.forget()
    able.append(_abilities(costs, dtype, spec.device))
    roofs = {}
    for direction, cost in costs.items():
        bandwidth, peak = (max(values) for values in zip(*(before[direction] for before in able), strict=True))
        roofs[direction] = {
            "bytes": cost.bytes, "flops": cost.flops, "least_ms": 1e3 * max(cost.bytes / bandwidth, cost.flops / peak),
            "memory_gb_s": round(bandwidth / 1e9, 2), "matmul_gflop_s": round(peak / 1e9, 1),
        }  # fmt: skip
    return {
        "facts": machine.facts(spec.device, spec.allocator), "roofs": roofs,
        "directions": [d for d in directions if d in done],
        "gradient_mib": sum(sample.tensors[name].nbytes for name in sample.grads) / machine.MIB,
        "results": results, "absent": absent,
    }  # fmt: skip


def _abilities(costs: Mapping[str, Cost], dtype: torch.dtype, device: str) -> dict[str, tuple[float, float]]:
    """Bytes and operations per second that this machine reaches on as much data, by direction."""
    return {
        direction: (machine.bandwidth(cost.bytes, device), machine.matmul_peak(dtype, device))
        for direction, cost in costs.items()
    }


def errors(
    spec: Spec, op: Op, case: Case, sample: Call, directions: Sequence[str]
) -> tuple[dict[str, Callable[..., Any]], Answer, dict[str, str]]:
    """Each implementation that runs, its errors and budgets by direction; and why the others do not.

    The truth is the definition in float64; the yardstick is eager PyTorch in the case's dtype.
    """
    modes = {direction: direction != "fwd" for direction in directions}
    wanted = truth(op, make(spec, op, case) if sample.writes else sample, any(modes.values()))
    functions: dict[str, Callable[..., Any]] = {}
    found: dict[str, dict[bool, tuple[dict[str, float], dict[str, float]]]] = {}
    absent: dict[str, str] = {}
    # Eager first, asked for or not: the others are judged by it.
    for impl in dict.fromkeys(("eager", *spec.impls)):
        try:
            functions[impl] = implementation(op, impl, sample)
            found[impl] = {}
            for mode in {*modes.values()}:
                call = make(spec, op, case) if sample.writes else sample
                got = measure.outcome(functions[impl], call, gradients=mode)
                found[impl][mode] = (measure.distances(got, wanted, gradients=mode), measure.units(got))
                del got
        except Exception as error:
            found.pop(impl, None)
            absent[impl] = reason(error)
            if spec.device == "cuda":
                torch.cuda.synchronize()  # raises where the context is lost: nobody after this one could be measured
        machine.release()
    # The chunked loop is eager PyTorch too, where the eager code itself needs too much memory.
    yardstick = found.get("eager", found.get("chunked", {}))
    results: Answer = {}
    for impl in [name for name in found if name in spec.impls]:
        results[impl] = {}
        for direction, mode in modes.items():
            far, units = found[impl][mode]
            worst, budget, name = measure.judge(far, yardstick.get(mode, ({}, {}))[0], units)
            results[impl][direction] = {"error": worst, "budget": budget, "worst": name}
    functions = {name: functions[name] for name in results}
    return functions, results, {name: text for name, text in absent.items() if name in spec.impls}


def both(spec: Spec, op: Op, case: Case) -> Answer:
    """Times and, as ``peaks``, memory: on a GPU, whose allocator counts the same bytes in any process."""
    answer = times(spec, op, case)
    peaks = {name: memory(replace(spec, impls=(name,)), op, case) for name in answer["results"]}
    return {**answer, "peaks": peaks}


def memory(spec: Spec, op: Op, case: Case) -> Answer:
    """Peak memory of one implementation beyond what its arguments take, in MiB, by direction.

    On a CPU: VmHWM after the call minus VmRSS before it, once a first call has loaded what only first calls load
    (modules, compilers, the linear algebra library's own buffers: up to 150 MiB that belong to no implementation) and
    everything it freed has gone back to the kernel. Where the kernel does not permit to reset VmHWM, it is the first
    call, of the main direction only, and compiled code has no figure.
    """
    impl = spec.impls[0]
    call = make(spec, op, case)
    directions = measure.available(call, spec.directions)
    main = measure.main_direction(directions)
    if spec.device == "cpu":
        machine.limit_memory()
    peaks: dict[str, float] = {}
    start = time.perf_counter()
    try:
        function = implementation(op, impl, call)
        resets = spec.device == "cuda" or machine.reset_peak()
        for direction in [main, *(d for d in directions if d != main)]:
            if not resets and (impl == "compile" or direction != main):
                continue
            if time.perf_counter() - start > SLOW_S:
                break
            subject = measure.timed(function, call, direction)
            if resets:
                subject.run(subject.prepare())
            argument = subject.prepare()
            machine.release()
            if spec.device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                result = subject.run(argument)
                torch.cuda.synchronize()
                extra = torch.cuda.max_memory_allocated() - before
            else:
                machine.reset_peak()
                before = machine.status_bytes("VmRSS")
                result = subject.run(argument)
                extra = max(machine.status_bytes("VmHWM") - before, 0)
            peaks[direction] = round(extra / machine.MIB, 2)
            del result, argument
    except Exception as error:
        return {"absent": reason(error)}
    return {"peak": peaks}


if __name__ == "__main__":
    main()
