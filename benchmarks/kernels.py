"""Every operator's kernels beside their rivals: errors, times, peak memory and the share of the roofline.

This process discovers the operators, starts a worker process per measurement and keeps the records.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from fastrex import rundir
from fastrex_kernels._op import Case, Op

from . import FOREIGN, ROOT, files, measure, worker
from .rivals import RIVALS

KEYS = (
    "op", "case", "impl", "direction", "dtype", "device", "threads", "ms_p20", "ms_p50", "ms_p80", "peak_extra_mib",
    "bytes", "flops", "roofline_share", "error", "error_budget", "versions", "commit", "command",
)  # fmt: skip
ALLOCATORS = ("pooled", "default")
# Longer than any case that is worth waiting for: a compiler that hangs must not hold the others up for ever.
LIMIT_S = 1800

Record = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What is measured; empty tuples mean everything that makes sense."""

    ops: str = "fastrex_kernels"
    op: tuple[str, ...] = ()
    case: tuple[str, ...] = ()
    dtype: tuple[str, ...] = ("fp32", "bf16")
    impl: tuple[str, ...] = ()
    direction: tuple[str, ...] = ()
    allocator: tuple[str, ...] = ALLOCATORS
    device: str = "cpu"
    threads: int = 1
    seconds: float = 8.0
    command: str = ""


@dataclass
class Group:
    """All implementations of one case in one dtype under one allocator, and what is known of the case itself."""

    op: str
    case: str
    dtype: str
    device: str
    threads: int
    allocator: str
    gradient_mib: float = 0.0
    records: list[Record] = field(default_factory=list)

    def directions(self) -> list[str]:
        return list(dict.fromkeys(r["direction"] for r in self.records))

    def of(self, direction: str) -> list[Record]:
        return [r for r in self.records if r["direction"] == direction]

    def find(self, impl: str, direction: str) -> Record | None:
        return next((r for r in self.of(direction) if r["impl"] == impl), None)


def discover(settings: Settings) -> list[tuple[Op, Case]]:
    """The cases to be measured, in the operators' order.

    Raises:
        ValueError: a name that no operator or case has.
    """
    ops: Sequence[Op] = import_module(settings.ops).OPS
    _known("--op", settings.op, [op.name for op in ops])
    chosen = [op for op in ops if not settings.op or op.name in settings.op]
    # A case asked for by name may be one of the contract's small ones.
    every = [(op, case) for op in chosen for case in op.cases]
    _known("--case", settings.case, [case.name for _, case in every])
    _known("--impl", settings.impl, [*worker.OURS, *(r.name for r in RIVALS)])
    return [(op, case) for op, case in every if (case.name in settings.case if settings.case else case.bench)]


def _known(option: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{option} must be one of {', '.join(dict.fromkeys(known))}, got {name!r}")


def implementations(settings: Settings, op: str) -> list[str]:
    """Ours for the device, then its rivals; the definition in eager PyTorch only where it is asked for."""
    ours = ["triton" if settings.device == "cuda" else "cpp"]
    rivals = [r.name for r in RIVALS if r.competes(op)]
    if not settings.impl:
        return [*ours, *rivals]
    return [name for name in (*worker.OURS, *rivals) if name in settings.impl]


def run(settings: Settings, say: Callable[[str], None] = lambda _: None) -> Iterator[Group]:
    """Measure; gives each group as soon as it is done. ``say`` is told what is being measured."""
    commit, version = rundir.commit(), rundir.version()
    allocators = settings.allocator if settings.device == "cpu" else ("cuda",)
    for op, case in discover(settings):
        for dtype in settings.dtype:
            if worker.DTYPES[dtype] not in op.dtypes:
                continue
            peaks: dict[str, worker.Answer] = {}
            for allocator in allocators:
                say(f"{op.name} {case.name} {dtype} {allocator}")
                group = measure_group(settings, op, case, dtype, allocator, peaks)
                for record in group.records:
                    record["versions"] = {"fastrex": version, **record["versions"]}
                    record["commit"] = commit
                yield group


def measure_group(
    settings: Settings, op: Op, case: Case, dtype: str, allocator: str, peaks: dict[str, worker.Answer]
) -> Group:
    """Memory of each implementation, each in a fresh process, then the times of all together in another one. On a GPU
    one process does it all, unless one of them has taken it down.

    ``peaks`` takes the workers' answers on memory. Where it holds them already, this is the second allocator, which
    answers one question: how much of the times is the allocator. One direction tells, and memory is not measured again.
    """
    directions = settings.direction or measure.DIRECTIONS
    first = not peaks
    if not first:
        directions = (measure.main_direction(directions),)
    names = implementations(settings, op.name)
    spec = worker.Spec(
        task="memory", ops=settings.ops, op=op.name, case=case.name, dtype=dtype, device=settings.device,
        threads=settings.threads, allocator=allocator, directions=tuple(directions), impls=(),
        seconds=settings.seconds, out="",
    )  # fmt: skip
    timing: worker.Answer = {}
    if settings.device == "cuda":
        timing = start(replace(spec, task="both", impls=tuple(names)))
        peaks.update(timing.get("peaks", {}))
    if first and "peaks" not in timing:
        # Always under the C library's default, which takes what is asked for: in a pool a peak depends on its gaps.
        exact = replace(spec, allocator="default")
        peaks.update({name: start(replace(exact, impls=(name,))) for name in names})
    absent: dict[str, str] = {}
    if "peaks" not in timing:
        absent = {name: answer["absent"] for name, answer in peaks.items() if "absent" in answer}
        timing = start(replace(spec, task="time", impls=tuple(name for name in names if name not in absent)))
    if "results" not in timing:
        absent = {**dict.fromkeys(names, str(timing["absent"])), **absent}
        timing = {"results": {}, "absent": {}, "roofs": {}, "facts": {}, "directions": [], "gradient_mib": 0.0}
    absent |= timing["absent"]
    if allocator == "pooled" and timing.get("pooled") is False:
        timing["facts"]["allocator"] = "default (this C library cannot pool)"
    group = Group(op.name, case.name, dtype, settings.device, settings.threads, allocator, timing["gradient_mib"])
    for direction in timing["directions"] or [measure.main_direction(directions)]:
        for name in names:
            record = _record(group, direction, name, timing, absent.get(name))
            record["command"] = settings.command
            if first and record["ms_p50"] is not None:
                record["peak_extra_mib"] = peaks[name].get("peak", {}).get(direction)
            group.records.append(record)
    return group


def _record(group: Group, direction: str, impl: str, timing: worker.Answer, absent: str | None) -> Record:
    """One row of the JSON. Where there is no number, ``error`` is the reason: "absent: ..."."""
    roof = timing["roofs"].get(direction, {})
    record: Record = dict.fromkeys(KEYS)
    record |= {key: getattr(group, key) for key in ("op", "case", "dtype", "device", "threads")}
    record |= {"impl": impl, "direction": direction, "bytes": roof.get("bytes"), "flops": roof.get("flops")}
    record["versions"] = timing["facts"] | {k: roof[k] for k in ("memory_gb_s", "matmul_gflop_s") if k in roof}
    if absent is not None:
        return record | {"error": f"absent: {absent}"}
    found = timing["results"][impl][direction]
    record |= {"error": found["error"], "error_budget": found["budget"]}
    if "ms" in found:
        record |= dict(zip(("ms_p20", "ms_p50", "ms_p80"), found["ms"], strict=True))
        record["roofline_share"] = round(roof["least_ms"] / found["ms"][1], 4)
    return record


def start(spec: worker.Spec) -> worker.Answer:
    """What a worker answers, or {"absent": why there is no answer}."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    # A checkout works from any folder; an installation needs no path.
    path = [*([str(ROOT)] if __package__ == "benchmarks" else []), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    kept["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(p for p in path if p))
    if spec.device == "cpu":
        kept["OMP_NUM_THREADS"] = str(spec.threads)
    with tempfile.TemporaryDirectory() as folder:
        spec = replace(spec, out=str(Path(folder) / "answer.json"))
        command = [sys.executable, "-m", f"{__package__}.worker", spec.to_json()]
        try:
            done = subprocess.run(command, env=kept, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        except subprocess.TimeoutExpired:
            return {"absent": f"took more than {LIMIT_S} s"}
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            killed = f"its process was killed by signal {-done.returncode}" if done.returncode < 0 else last[:300]
            return {"absent": killed}
        answer: worker.Answer = json.loads(Path(spec.out).read_text(encoding="utf-8"))
        return answer


def write_json(path: Path, groups: Sequence[Group]) -> None:
    """All records so far, as a list."""
    files.write_json(path, [record for group in groups for record in group.records])
