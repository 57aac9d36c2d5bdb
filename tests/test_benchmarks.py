"""The benchmarks' machinery: order of the rounds, who gets no time, what a record holds. No timed test."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT, environment
from torch import Tensor

import fastrex_kernels
from benchmarks import bars, kernels, machine, measure, report, rivals, truth, worker
from benchmarks.__main__ import main
from benchmarks.rivals import RIVALS, Absent
from fastrex_kernels import cosine_cross_entropy
from fastrex_kernels._op import Call, Cost, Op

KEYS = [
    "op", "case", "impl", "direction", "dtype", "device", "threads", "ms_p20", "ms_p50", "ms_p80", "peak_extra_mib",
    "bytes", "flops", "roofline_share", "error", "error_budget", "versions", "commit", "command",
]  # fmt: skip
# Operators of one line that a worker process can import: right, wrong, greedy and deadly implementations.
MODULE = """
    import os
    import signal

    import torch
    from fastrex_kernels._op import Call, Case, Cost, Op


    def make(sizes, dtype, device, seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(sizes["rows"], 64, generator=generator).to(device, dtype)
        return Call({"x": x}, {"factor": 3.0}, grads=("x",))


    def right(x, factor, *, impl):
        return (x * factor).tanh().sum(dim=1)


    def wrong(x, factor, *, impl):
        return right(x, factor, impl=impl) * (1.001 if impl == "cpp" else 1.0)


    def greedy(x, factor, *, impl):
        if impl == "cpp":
            torch.empty(2**50)
        return right(x, factor, impl=impl)


    def deadly(x, factor, *, impl):
        if impl == "cpp":
            os.kill(os.getpid(), signal.SIGKILL)
        return right(x, factor, impl=impl)


    def roomy(x, factor, *, impl):
        torch.ones(32 * 2**18)
        return right(x, factor, impl=impl)


    def eager(x, factor):
        return (x * factor).tanh().sum(dim=1)


    def cost(sizes, dtype, direction):
        return Cost(bytes=sizes["rows"] * 64 * dtype.itemsize, flops=sizes["rows"] * 192)


    CASES = (Case("small", "quick", {"rows": 5}), Case("main", "what is measured", {"rows": 300}, bench=True))
    OPS = tuple(Op(f.__name__, f, eager, make, CASES, cost) for f in (right, wrong, greedy, deadly, roomy))
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the module, which this process and its children can import."""
    (tmp_path / "tiny_ops.py").write_text(textwrap.dedent(MODULE), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}:{ROOT / 'kernels'}")
    monkeypatch.delitem(sys.modules, "tiny_ops", raising=False)
    return "tiny_ops"


def settings(ops: str, op: str, *impls: str, **more: Any) -> kernels.Settings:
    return kernels.Settings(ops=ops, op=(op,), dtype=("fp32",), impl=impls, seconds=0.01, command="words", **more)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers as function calls: the records without a second of start-up each."""

    def start(spec: worker.Spec) -> worker.Answer:
        op, case = worker.find(spec.ops, spec.op, spec.case)
        return {**(worker.memory if spec.task == "memory" else worker.times)(spec, op, case), "pooled": True}

    monkeypatch.setattr(kernels, "start", start)
    monkeypatch.setattr(machine, "limit_memory", lambda: 0)
    monkeypatch.setattr(machine, "_best", lambda run, device: (run(), 1e-3)[1])


def test_rounds_alternate() -> None:
    names = ["a", "b", "c"]
    rounds = [measure.order(names, number) for number in range(6)]
    assert all(sorted(r) == names for r in rounds)
    for place in range(3):
        assert sorted(r[place] for r in rounds) == ["a", "a", "b", "b", "c", "c"]
    # Each one runs right after each of the others.
    assert {pair for r in rounds for pair in itertools.pairwise(r)} == {
        (one, other) for one in names for other in names if one != other
    }


def test_interleaving_runs_everybody_once_a_round() -> None:
    seen: list[str] = []

    def subject(name: str) -> measure.Timed:
        return measure.Timed(lambda argument: seen.append(f"{name}{argument}"), lambda: "!")

    times = measure.interleave({name: subject(name) for name in "abc"}, 0.0, "cpu")
    assert {name: len(taken) for name, taken in times.items()} == dict.fromkeys("abc", measure.MIN_ROUNDS)
    warm_up, rounds = seen[:3], [seen[i : i + 3] for i in range(3, len(seen), 3)]
    assert warm_up == ["a!", "b!", "c!"]
    assert rounds == [[f"{n}!" for n in measure.order("abc", number)] for number in range(measure.MIN_ROUNDS)]


def test_a_hopeless_rival_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {"fast": 1000.0, "slow": 6000.0, "close": 4500.0}
    monkeypatch.setattr(measure, "_cpu_time", lambda call: call.run(None))
    calls = {name: measure.Timed(lambda _, ms=ms: ms) for name, ms in taken.items()}
    times = measure.interleave(calls, 0.0, "cpu")
    assert times["slow"] == [6000.0]
    assert len(times["fast"]) == len(times["close"]) == measure.MIN_ROUNDS


def test_quantiles() -> None:
    assert [measure.quantile([3.0, 1.0, 2.0, 5.0, 4.0], q) for q in (0.0, 0.2, 0.5, 0.9, 1.0)] == pytest.approx(
        [1.0, 1.8, 3.0, 4.6, 5.0]
    )
    assert measure.quantile([7.0], 0.8) == 7.0


def test_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    truth_ = torch.tensor([1.0, -4.0, 2.0], dtype=torch.float64)
    assert measure.distance(torch.tensor([1.0, -4.0, 2.5]), truth_) == 0.125
    gone = torch.tensor([1.0, torch.nan, 2.0])
    assert measure.distance(gone, truth_) == math.inf
    assert measure.distance(truth_, gone) == math.inf
    assert measure.distance(gone, gone) == 0.0
    assert measure.distance(torch.tensor([1.0, -math.inf, 2.0]), truth_) == math.inf
    assert measure.distance(torch.full((3,), 0.5), torch.zeros(3)) == 0.5
    assert measure.distance(torch.empty(0), torch.empty(0)) == 0.0
    assert measure.distance(torch.tensor([3, 5]), torch.tensor([3, 4])) == 0.25
    monkeypatch.setattr(measure, "SLICE", 2)
    assert measure.distance(torch.tensor([1.0, -4.0, 2.5]), truth_) == 0.125
    with pytest.raises(ValueError, match="shape"):
        measure.distance(torch.zeros(2), torch.zeros(3))


def test_the_budget_is_twice_the_yardstick_and_some_rounding() -> None:
    units = {"output 0": 2.0**-8, "counts": 0.0}
    error, budget, name = measure.judge({"output 0": 0.03, "counts": 0.0}, {"output 0": 0.01}, units)
    assert (error, name) == (0.03, "output 0")
    assert budget == 0.02 + 4 * 2.0**-8
    error, budget, name = measure.judge({"output 0": 0.0, "counts": 0.1}, {"output 0": 0.01}, units)
    assert (error, budget, name) == (0.1, 0.0, "counts")


@pytest.mark.usefixtures("in_process")
def test_a_record_has_these_keys_and_finite_figures(tiny: str) -> None:
    groups = list(kernels.run(settings(tiny, "right", "cpp", "eager")))
    assert [g.allocator for g in groups] == ["pooled", "default"]
    assert groups[0].directions() == ["fwd", "bwd", "fwd_bwd"]
    assert groups[1].directions() == ["fwd_bwd"]
    for record in (r for g in groups for r in g.records):
        assert list(record) == KEYS
        assert 0 < record["ms_p20"] <= record["ms_p50"] <= record["ms_p80"]
        assert 0 < record["roofline_share"] < math.inf
        assert record["error"] <= record["error_budget"]
        assert (record["bytes"], record["flops"]) == (300 * 64 * 4, 300 * 192)
        assert record["command"] == "words"
        assert record["commit"] == "unknown" or len(record["commit"].removesuffix("+changes")) == 40
        assert {"fastrex", "torch", "python", "cpu", "allocator", "memory_gb_s", "matmul_gflop_s"} <= set(
            record["versions"]
        )
    assert all(r["peak_extra_mib"] is not None for r in groups[0].records)
    text = report.table(groups[0])
    assert "ratio" in text
    assert text.count("\neager") == 3


@pytest.mark.usefixtures("in_process")
def test_a_wrong_implementation_gets_no_time(tiny: str) -> None:
    (group, _) = kernels.run(settings(tiny, "wrong", "cpp", "eager", "reference"))
    for direction in group.directions():
        ours = group.find("cpp", direction)
        assert ours is not None
        assert ours["error"] > ours["error_budget"] > 0
        assert [ours[k] for k in KEYS if k.startswith("ms_") or k in ("roofline_share", "peak_extra_mib")] == [None] * 5
        assert all(r["ms_p50"] is not None for r in group.of(direction) if r is not ours)
    rows = [line for line in report.table(group).splitlines() if line.startswith("cpp")]
    assert len(rows) == 3
    assert all("no time: its error is beyond its budget, 1.0e-03/" in row for row in rows)


@pytest.mark.usefixtures("in_process")
def test_no_eager_time_is_asked_for_and_its_error_is_still_the_yardstick(tiny: str) -> None:
    (group,) = kernels.run(settings(tiny, "right", "cpp", allocator=("pooled",), direction=("fwd",)))
    (record,) = group.records
    assert record["impl"] == "cpp"
    assert record["error_budget"] > 4 * torch.finfo(torch.float32).eps
    assert record["ms_p50"] is not None


def test_peak_memory_is_measured_in_a_fresh_process(tiny: str) -> None:
    answer = kernels.start(spec(tiny, "roomy", "cpp"))
    assert answer["pooled"]
    assert set(answer["peak"]) == {"fwd", "fwd_bwd"}
    for peak in answer["peak"].values():
        assert 31 < peak < 48


def test_what_does_not_fit_is_absent_with_the_reason(tiny: str) -> None:
    assert kernels.start(spec(tiny, "greedy", "cpp")) == {"absent": "needs more memory than is free", "pooled": True}


def test_a_killed_worker_is_absent_with_the_reason(tiny: str) -> None:
    assert kernels.start(spec(tiny, "deadly", "cpp")) == {"absent": "its process was killed by signal 9"}


def spec(ops: str, op: str, impl: str) -> worker.Spec:
    return worker.Spec(
        task="memory", ops=ops, op=op, case="main", dtype="fp32", device="cpu", threads=1, allocator="pooled",
        directions=("fwd", "fwd_bwd"), impls=(impl,), seconds=0.1, out="",
    )  # fmt: skip


def cosine(frozen: bool = False, **options: Any) -> Call:
    generator = torch.Generator().manual_seed(0)
    rows, classes = (torch.randn(n, 16, generator=generator) for n in (24, 70))
    target = torch.randint(70, (8,), generator=generator)
    call = Call(
        {"input": rows, "weight": classes, "target": target}, options, ("input",) if frozen else ("input", "weight")
    )
    return measure.requiring(call)


def cosine_op() -> Op:
    def definition(**words: Any) -> Tensor:
        return cosine_cross_entropy(**words)  # type: ignore[return-value]

    return Op("cosine_cross_entropy", definition, definition, lambda *_: cosine(), (), lambda *_: Cost(1, 1))


@pytest.mark.parametrize("name", ["linear_cross_entropy", "linear_cross_entropy_chunked", "chunked"])
@pytest.mark.parametrize(
    ("frozen", "options"),
    [
        (False, {"temperature": 0.1}),
        (True, {"temperature": torch.tensor(0.5), "reduction": "sum"}),
        (False, {"ignore_index": 3}),
    ],
)
def test_rivals_compute_the_same(
    name: str, frozen: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rivals.chunked, "MAX_ROWS", 10)
    call, op = cosine(frozen, **options), cosine_op()
    function = next(r for r in RIVALS if r.name == name).build(op, call)
    wanted = truth.truth(op, call, gradients=True)
    for gradients in (True, False):
        got = measure.outcome(function, call, gradients=gradients)
        assert max(measure.distances(got, wanted, gradients=gradients).values()) < 2e-6


def test_the_truth_by_classes_is_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    for call in (cosine(temperature=0.2), cosine(frozen=True, reduction="sum")):
        wanted = truth.truth(cosine_op(), call, gradients=True)
        with monkeypatch.context() as patch:
            patch.setattr(truth, "STORED_BYTES", 0)
            patch.setattr(truth, "BLOCK", 32)
            got = truth.truth(cosine_op(), call, gradients=True)
        assert max(measure.distances(got, wanted, gradients=True).values()) < 1e-13


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("chunked", {"reduction": "none"}, "no reduction='none'"),
        ("chunked", {"class_weight": torch.ones(70)}, "has no class_weight"),
        ("linear_cross_entropy", {"return_stats": True}, "has no return_stats"),
        ("linear_cross_entropy_chunked", {"label_smoothing": 0.1}, "has no label_smoothing"),
    ],
)
def test_a_rival_says_what_it_cannot_do(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(Absent, match=message):
        next(r for r in RIVALS if r.name == name).build(cosine_op(), cosine(**options))


def test_compile_says_when_there_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "compiler", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Absent, match=r"needs a C\+\+ compiler"):
        rivals.compiled.build(cosine_op(), cosine())


def group(**times: float) -> kernels.Group:
    """A group of the first bar's case with these times."""
    found = kernels.Group("cosine_cross_entropy", "c1000", "fp32", "cpu", 2, "pooled", gradient_mib=2.0)
    for impl, ms in times.items():
        record = {**dict.fromkeys(KEYS), "impl": impl, "direction": "fwd_bwd", "versions": {"allocator": "pooled"}}
        record |= {"ms_p20": ms, "ms_p50": ms, "ms_p80": ms, "roofline_share": 0.5, "peak_extra_mib": ms}
        found.records.append(record | {"error": 1e-7, "error_budget": 1e-6})
    return found


def test_bars_are_judged_against_the_best_of_their_rivals() -> None:
    met = group(cpp=10.0, eager=20.0, compile=16.2, chunked=9.0)
    assert list(bars.verdicts(met)) == [(True, "bar 1.40x: met, 1.620x over compile")]
    missed = group(cpp=10.0, eager=13.0)
    assert list(bars.verdicts(missed)) == [(False, "bar 1.40x: missed, 1.300x over eager")]
    assert "bars: 1 of 2 met\ncosine_cross_entropy c1000 fp32: bar 1.40x: missed" in report.summary([met, missed])
    met.threads = 8
    assert not list(bars.verdicts(met))


def test_memory_bars_leave_the_gradients_out() -> None:
    judged = group(cpp=10.0, eager=82.0)
    judged.case = "c21841"
    assert [text for _, text in bars.verdicts(judged)][1] == (
        "bar 15% of eager's memory beyond the gradients: met, 10.0%"
    )


def test_bars_name_cases_that_exist() -> None:
    known = {(op.name, case.name) for op in fastrex_kernels.OPS for case in op.cases if case.bench}
    assert {(bar.op, bar.case) for bar in bars.BARS} <= known


def test_chart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "chart.png"
    assert report.chart([group(cpp=10.0, eager=14.0)], target) is None
    assert target.read_bytes().startswith(b"\x89PNG")
    assert "nothing was measured" in str(report.chart([group(cpp=10.0)], target))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'fastrex[plots]'" in str(report.chart([group(cpp=10.0, eager=14.0)], target))


def test_unknown_names_are_said(tiny: str) -> None:
    for words in ({"op": ("no",)}, {"case": ("no",)}, {"impl": ("no",)}):
        with pytest.raises(ValueError, match=f"--{next(iter(words))} must be one of .*, got 'no'"):
            kernels.discover(kernels.Settings(ops=tiny, **words))


def test_command_line(tiny: str, tmp_path: Path) -> None:
    """The whole way in real processes, from a checkout that is not installed."""
    words = ["--ops", tiny, "--op", "right", "--case", "small", "--dtype", "fp32", "--seconds", "0.05"]
    out = tmp_path / "new" / "k.json"
    run: Callable[..., Any] = subprocess.run
    done = run(
        [sys.executable, "-m", "benchmarks", "kernels", *words, "--impl", "eager", "--impl", "cpp", "--threads", "1",
         "--allocator", "pooled", "--json", str(out)],
        cwd=ROOT, env={**environment(), "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "right small fwd_bwd fp32 (cpu, 1 threads, pooled allocation)" in done.stdout
    assert f"records: {out}" in done.stdout
    records = json.loads(out.read_text(encoding="utf-8"))
    assert [list(r) for r in records] == [KEYS] * 6
    assert {(r["impl"], r["direction"]) for r in records} == {
        (impl, direction) for impl in ("cpp", "eager") for direction in measure.DIRECTIONS
    }
    assert all(r["command"].startswith("fastrex bench kernels --op right --case small") for r in records)
    assert str(tmp_path) not in records[0]["command"]


def test_curves_of_one_run_and_of_several(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for name, loss in (("a-seed0", 2.0), ("a-seed1", 1.9), ("b-seed0", 1.5)):
        run = tmp_path / name
        run.mkdir()
        lines = [
            {"step": 1, "time": 10.0, "train/loss": loss, "train/top1": 0.1},
            {"step": 1, "time": 3610.0, "eval/knn": 0.5, "eval/top1": 0.4},
        ]
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
        (run / "env.json").write_text('{"torch": "2"}', encoding="utf-8")
        (run / "config.toml").write_text(f'path = "{tmp_path}"\nseed = 0\n', encoding="utf-8")
    runs = [str(tmp_path / name) for name in ("a-seed0", "a-seed1", "b-seed0")]
    done = CliRunner().invoke(main, ["curve", *runs, "--name", "all", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    content = json.loads((tmp_path / "all.json").read_text(encoding="utf-8"))
    assert [found["train"][0]["train/loss"] for found in content["runs"].values()] == [2.0, 1.9, 1.5]
    assert content["runs"]["b-seed0"]["eval"][0]["hours"] == 1.0
    assert str(tmp_path) not in json.dumps(content)
    assert (tmp_path / "all.png").stat().st_size > 10_000
    done = CliRunner().invoke(main, ["curve", runs[0], "--name", "one", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "one.json").read_text(encoding="utf-8"))["train"][0]["step"] == 1
