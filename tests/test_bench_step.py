"""The benchmarks of the step and of a run: what a record holds, who is compared, what is refused. No timed
assertion."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT, environment

from benchmarks import processes, roofline, run, step, step_batch, step_parts, step_report
from benchmarks.__main__ import main
from benchmarks.rivals import Absent, eager_step
from benchmarks.rivals.eager_step import NAMES, EagerStep
from benchmarks.step_subjects import Fastrex, Spec
from fastrex import config as config_module
from fastrex.distributed import World
from fastrex.errors import FastrexError

KEYS = [
    "op", "impl", "allocator", "device", "threads", "ranks", "batch", "crops", "model", "objective", "bn", "precision",
    "images_per_s_p20", "images_per_s_p50", "images_per_s_p80", "ratio", "peak_mib", "roofline_share", "parts_ms",
    "communication_share", "kernels", "bytes", "flops", "loss", "rounds", "notices", "error", "versions", "commit",
    "command",
]  # fmt: skip
SMALL = (
    "data.global_size=32", "data.local_crops=2", "data.local_size=16", "data.local_scale=[0.1,0.5]",
    "model.arch=resnet18", "model.width=8", "projector.hidden_layers=1", "projector.hidden_dim=32",
    "projector.out_dim=16", "optim.precision=fp32", "model.stem=small",
)  # fmt: skip
PARTS = ["forward 32", "forward 16", "EMA", "head", "backward", "optimiser", "other"]
LEVELS = {"L0", "L1", "L2", "L3"}
ALONE = World(0, 1, 0, 1, torch.device("cpu"))
USUAL = ("--device", "cpu", "--threads", "1", "--batch", "8", "--classes", "2")


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, from the checkout."""
    env = {**environment(), "PYTHONPATH": ""}
    start = [sys.executable, "-m", "benchmarks", *words]
    return subprocess.run(start, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of all implementations under both allocators."""
    out = tmp_path_factory.mktemp("out") / "new"
    done = bench("step", *SMALL, *USUAL, "--seconds", "0.1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "ms of a step" in done.stdout
    assert (out / "step-cpu.png").read_bytes().startswith(b"\x89PNG")
    found: list[dict[str, Any]] = json.loads((out / "step-cpu.json").read_text(encoding="utf-8"))
    return found


def test_records(records: list[dict[str, Any]]) -> None:
    who = [(r["impl"], r["allocator"]) for r in records]
    assert who == [("fastrex", "pooled"), ("eager", "pooled"), ("eager_cl", "pooled"), ("eager", "default")]
    for record in records:
        assert list(record) == KEYS
        assert record["error"] is None
        assert (record["op"], record["crops"], record["batch"]) == ("step", "1x32 + 2x16", 8)
        assert (record["model"], record["ranks"], record["threads"]) == ("resnet18", 1, 1)
        assert 0 < record["images_per_s_p20"] <= record["images_per_s_p50"] <= record["images_per_s_p80"]
        assert len(record["rounds"]) == 2
        assert list(record["parts_ms"]) == PARTS
        assert all(taken >= 0 for taken in record["parts_ms"].values())
        assert all(record["parts_ms"][part] > 0 for part in PARTS[:-1])
        assert record["kernels"] > 100
        assert set(record["roofline_share"]) == set(record["bytes"]) == LEVELS
        assert record["bytes"]["L0"] > record["bytes"]["L1"] > record["bytes"]["L3"] > 0
        assert record["flops"] > 0
        assert record["peak_mib"] > 0
        assert len(record["loss"]) == 3
        assert record["communication_share"] is None
        assert record["command"].startswith("fastrex bench step data.global_size=32 ")
        assert "--out" not in record["command"]
        assert {"fastrex", "torch", "python", "cpu", "allocator"} <= set(record["versions"])
    ours, eager, *others = records
    assert ours["ratio"] == {
        name: pytest.approx(ours["images_per_s_p50"] / r["images_per_s_p50"], rel=1e-3)
        for name, r in zip(("eager", "eager_cl", "eager_default"), (eager, *others), strict=True)
    }
    assert [r["ratio"] for r in records[1:]] == [None] * 3
    assert ours["precision"] == eager["precision"] == "fp32"
    assert ours["loss"] == pytest.approx(eager["loss"], rel=6e-3)
    assert records[3]["loss"] == pytest.approx(eager["loss"], rel=1e-4)


def test_two_ranks(tmp_path: Path) -> None:
    target = tmp_path / "step.json"
    words = ["--ranks", "2", "--impl", "fastrex", "--allocator", "default", "--seconds", "0.05"]
    done = bench("step", *SMALL, *USUAL, *words, "--json", str(target))
    assert done.returncode == 0, done.stderr
    (ours,) = json.loads(target.read_text(encoding="utf-8"))
    assert (ours["ranks"], ours["error"]) == (2, None)
    assert 0 < ours["communication_share"] <= 1
    assert f"{ours['communication_share']:.1%} of a step has a collective under way" in done.stdout
    assert ours["ratio"] == {}


def test_a_run_from_end_to_end(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed: pip install 'fastrex[train]'")
    pytest.importorskip("sklearn", reason="the demo's images need scikit-learn")
    made = subprocess.run(
        [sys.executable, "-m", "fastrex", "data", "demo", str(tmp_path / "digits")],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    target = tmp_path / "run.json"
    usual = ["--device", "cpu", "--threads", "1", "--batch", "8", "--seconds", "0.2"]
    done = bench("run", *SMALL, "--data", str(tmp_path / "digits"), *usual, "--json", str(target))
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(target.read_text(encoding="utf-8"))
    assert list(record) == list(run.KEYS)
    assert (record["op"], record["device"], record["batch"]) == ("run", "cpu", 8)
    assert record["data"]["classes"] == 10
    assert record["ratio"] == pytest.approx(record["images_per_s_p50"] / record["step_images_per_s_p50"], rel=1e-2)
    assert 0 <= record["data_wait"] <= 1
    assert len(record["rounds"]) == len(record["step_rounds"]) == 2
    assert list(record["parts_ms"]) == ["data wait", *PARTS]
    assert record["parts_ms"]["data wait"] > 0
    assert str(tmp_path) not in json.dumps(record)
    assert "end to end / step" in done.stdout
    assert "bar" not in done.stdout  # which is for a GPU
    assert run.verdicts([{**record, "device": "cuda", "ratio": 0.96}]) == [
        "bar 95% of the step's rate: met, reached 96.0%"
    ]
    assert run.verdicts([{**record, "device": "cuda", "ratio": 0.9}])[0].endswith("missed, reached 90.0%")


def test_a_run_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without DALI there is no loader."""
    shadow = tmp_path / "nvidia"
    shadow.mkdir()
    (shadow / "__init__.py").write_text("raise ImportError('shadowed')\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pytest.importorskip("sklearn", reason="the demo's images need scikit-learn")
    from fastrex.data.demo import write_digits

    digits = str(write_digits(tmp_path / "digits"))
    done = CliRunner().invoke(main, ["run", *SMALL, "--data", digits, "--device", "cpu", "--threads", "1"])
    assert done.exit_code == 1
    assert "DALI" in done.output.splitlines()[-1]
    assert "pip install 'fastrex[train]'" in done.output.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["step", "--batch", "1"], "--batch"),
        (["step", "--batch", "9", "--ranks", "2"], "--batch must be a multiple of --ranks"),
        (["step", "--batch", "2", "--ranks", "2"], "2 images or more for each, got 2 for 2"),
        (["step", "--threads", "100000"], "--threads must be at most the number of cores"),
        (["step", "--impl", "lazy"], "--impl"),
        (["step", "--recipe", "none"], "none"),
        (["step", "model.widths=9"], "width"),
        (["step", "model.arch=resnet51"], "resnet50"),
        (["step", "objective.name=magic"], "objective.name"),
        (["run"], "--data"),
        (["run", "--data", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str) -> None:
    done = CliRunner().invoke(main, [words[0], "--device", "cpu", *words[1:]])
    assert done.exit_code in (1, 2)
    assert isinstance(done.exception, SystemExit)  # not an error that shows a traceback
    assert message in done.output.splitlines()[-1]


def test_the_largest_batch() -> None:
    for fitting in (2, 3, 5, 7, 100, 1000, 1023, 4097):
        for start in (2, 8, 100, 5000):
            asked: list[int] = []

            def fits(batch: int, asked: list[int] = asked, fitting: int = fitting) -> bool:
                asked.append(batch)
                return batch <= fitting

            found = step_batch.largest(fits, start)
            assert found is not None
            assert fitting - max(1, found // 16) < found <= fitting
            assert len(asked) == len(set(asked))
    assert step_batch.largest(lambda batch: False, 8) is None
    assert step_batch.largest(lambda batch: True, 1024) == step_batch.LARGEST


def test_find_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one attempt that fits; another does not."""
    monkeypatch.setattr(step_batch, "LARGEST", 8)
    target = tmp_path / "batch.json"
    usual = ["step", *SMALL, *USUAL, "--find-batch", "--allocator", "default"]
    done = CliRunner().invoke(main, [*usual, "--json", str(target)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "8 images fit" in done.output
    (record,) = json.loads(target.read_text(encoding="utf-8"))
    assert list(record) == list(step_batch.KEYS)
    assert (record["batch"], record["limit_mib"]) == (8, None)
    (attempt,) = record["attempts"]
    assert (attempt["batch"], attempt["error"]) == (8, None)
    assert record["peak_mib"] == attempt["peak_mib"] > 0
    assert attempt["estimate_mib"] > 0
    small = step.Settings(words=SMALL, batch=2, impl=("fastrex",), allocator="default", limit_mib=1)
    refused = step_batch.attempt(small)
    assert refused["peak_mib"] is None
    assert refused["error"]
    lost = [{**record, "batch": None, "peak_mib": None, "attempts": [{**attempt, **refused}]}]
    assert step_batch.table(lost).endswith("not even 2 images fit")


def resolved(*words: str) -> config_module.Config:
    return config_module.load("trex", [*SMALL, "optim.batch_size=8", *words])


def ours(config: config_module.Config) -> Fastrex:
    return Fastrex(Spec("fastrex", "", (), "cpu", 1, "default", 3, ""), config, ALONE)


def state_of(subject: Fastrex) -> dict[str, torch.Tensor]:
    tensors = {f"model.{name}": t.clone() for name, t in subject.trainer.model.state_dict().items()}
    return tensors | {f"objective.{name}": t.clone() for name, t in subject.trainer.objective.state_dict().items()}


@pytest.fixture
def _double() -> Iterator[None]:
    """So that nothing is hidden by roundings."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("objective", ["class_means", "cosine_softmax"])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_the_rival_trains_as_we_do(arch: str, objective: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same losses from the same weights, step by step, past the end of the bank."""
    monkeypatch.setattr(eager_step, "resolve_precision", lambda *_: "fp32")
    bank = ["objective.bank_size=20"] if objective == "class_means" else []
    words = [f"objective.name={objective}", f"model.arch={arch}", "data.global_crops=2", "optim.weight_decay=0"]
    config = resolved(*words, *bank)
    mine = ours(config)
    mine.batch = dataclasses.replace(mine.batch, crops=tuple(crop.double() for crop in mine.batch.crops))
    rival = EagerStep(name, config, 3, ALONE, state_of(mine))
    for _ in range(4):
        mine.step()
        found = rival.step(rival.crops(mine.batch.crops), mine.batch.target, mine.lr)
        assert found["loss"] == pytest.approx(mine.loss(), rel=1e-6)
        assert found["top1"] == pytest.approx(float(mine.values["top1"]))
    if rival.memory is not None:
        assert int(rival.memory.ptr) == 8


def test_what_a_rival_cannot_do() -> None:
    with pytest.raises(Absent, match=r"not timm:vit"):
        EagerStep("eager", resolved("model.arch=timm:vit"), 3, ALONE, {})
    with pytest.raises(Absent, match="SyncBatchNorm needs GPUs"):
        EagerStep("eager", resolved(), 3, World(0, 2, 0, 2, torch.device("cpu")), {})


@pytest.mark.parametrize("recompute", ["none", "passes"])
def test_parts_of_our_step(recompute: str) -> None:
    """What is computed again belongs to the backward, and nothing stays wrapped."""
    config = resolved(f"model.recompute={recompute}")
    subject, clock = ours(config), step_parts.Clock(cuda=False)
    with subject.parts(clock):
        for _ in range(2):
            with clock.step():
                subject.step()
    assert step_parts.names(config) == PARTS[:-1]
    assert [set(one) for one in clock.steps] == [set(PARTS)] * 2
    found = clock.medians(step_parts.names(config))
    assert list(found) == PARTS
    assert all(taken > 0 for taken in found.values())
    subject.step()
    assert len(clock.steps) == 2
    for owner in (subject.trainer.optimizer, subject.trainer.objective):
        assert not {"grad_norm", "step", "update_"} & set(vars(owner))


def test_a_part_inside_another_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 100, 10))
    monkeypatch.setattr(step_parts.time, "perf_counter", lambda: next(now) / 1e3)
    clock = step_parts.Clock(cuda=False)
    with clock.step(), clock.part("head"), clock.part("forward 32"):
        pass
    assert clock.steps == [
        {"other": pytest.approx(20.0), "head": pytest.approx(20.0), "forward 32": pytest.approx(10.0)}
    ]


def test_operators_are_counted() -> None:
    x = torch.ones(3)
    assert step_parts.launched(lambda: x.add_(1).mul_(2), cuda=False) == 2


def test_time_with_a_collective_under_way() -> None:
    assert step_parts.union([]) == 0
    assert step_parts.union([(5, 9), (0, 2), (1, 3), (6, 7), (9, 10)]) == 8


def subject(name: str, losses: list[float], precision: str = "fp32") -> step.Subject:
    return step.Subject(name, "pooled", name, {"losses": losses, "precision": precision, "seconds": 1.0})


def test_losses_must_agree() -> None:
    good = [subject("fastrex", [7.01, 6.5, 6.0], "bf16"), subject("eager", [7.0, 6.6, 6.1])]
    step.compare(good)
    assert [s.error for s in good] == [None, None]
    bad = [
        subject("fastrex", [7.5, 6.6, 6.1], "bf16"),  # another forward
        subject("eager", [7.0, 6.6, 6.1]),
        subject("eager_cl", [7.0, 6.6, 7.0], "bf16"),  # another backward
        subject("other", [7.0, float("nan"), 6.1]),
    ]
    step.compare(bad)
    assert [s.error for s in bad] == [
        "wrong: loss 7.5 in step 1, not 7 as eager", None, "wrong: loss 7 in step 3, not 6.1 as eager",
        "wrong: loss nan in step 2, not 6.6 as eager",
    ]  # fmt: skip


def made_up(impl: str, speed: float | None, **more: Any) -> dict[str, Any]:
    record = dict.fromkeys(KEYS) | {
        "op": "step", "impl": impl, "allocator": "pooled", "device": "cpu", "threads": 2, "ranks": 1, "batch": 8,
        "crops": "1x224 + 8x96", "model": "resnet50", "objective": "class_means", "bn": "fused", "precision": "bf16",
        "images_per_s_p20": speed, "images_per_s_p50": speed, "images_per_s_p80": speed, "versions": {},
    }  # fmt: skip
    return record | more


def test_bars() -> None:
    ratios = {"eager": 3.2, "eager_cl": 1.1, "eager_default": 4.0}
    mine = made_up("fastrex", 5.0, ratio=ratios)
    assert step_report.verdicts([mine, made_up("eager", 1.6)]) == [
        "bar 3.00x over eager: met, reached 3.200x",
        "bar 1.30x over eager_cl: missed, reached 1.100x",
    ]
    for other in ({"threads": 4}, {"batch": 16}, {"allocator": "default"}, {"ranks": 2}, {"crops": "1x32"}):
        assert step_report.verdicts([mine | other]) == []
    assert step_report.verdicts([made_up("eager", 1.6)]) == []
    lost = made_up("fastrex", None, error="wrong: loss 2 in step 1, not 1 as eager")
    assert step_report.verdicts([lost]) == [f"bars: missed, {lost['error']}"]
    gpu = {"device": "cuda", "batch": 256, "allocator": "cuda", "versions": {"gpu": "NVIDIA H200"}}
    fast = made_up("fastrex", 2900.0, ratio={"eager": 1.9}, **gpu)
    assert step_report.verdicts([fast]) == [
        "bar 2800 images/s with model.bn=fused: met, reached 2900 images/s",
        "bar 2.00x over eager: missed, reached 1.900x",
    ]
    assert step_report.verdicts([fast | {"bn": "torch", "images_per_s_p50": 1900.0}])[0] == (
        "bar 2000 images/s with model.bn=torch: missed, reached 1900 images/s"
    )
    assert step_report.verdicts([fast | {"versions": {"gpu": "NVIDIA L4"}}]) == []


def test_table(records: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = step_report.table(records)
    assert "step (1 threads, pooled allocation): resnet18, 1x32 + 2x16 crops, batches of 8" in text
    assert "eager_default" in text
    assert "bar" not in text
    lost = [{**records[0], **{"images_per_s_p50": None, "parts_ms": None, "error": "absent: no"}}, *records[1:]]
    assert "fastrex         absent: no" in step_report.table(lost)
    assert step_report.chart(lost, tmp_path / "chart.png") is None
    assert step_report.chart(lost[:1], tmp_path / "none.png") == "no chart: nothing was measured"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'fastrex[plots]'" in str(step_report.chart(records, tmp_path / "chart.png"))


def test_a_team_rests_between_answers_and_says_why_it_ended(tmp_path: Path) -> None:
    settings = step.Settings(words=SMALL, classes=2, impl=("fastrex",), allocator="default")
    (alone,) = settings.subjects()
    team = settings.start(alone, "", str(tmp_path))
    try:
        assert team.ask("peak")[0]["peak_mib"] >= 0
        pid = team.members[0].pid
        deadline = time.monotonic() + 10
        while state(pid) != "T" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert state(pid) == "T"
        with pytest.raises(processes.Ended, match=r"fastrex ended: .*dance"):
            team.ask("dance")
    finally:
        team.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]


def test_an_implementation_that_ends_stops_no_other() -> None:
    class Silent:
        def ask(self, do: str, **_: Any) -> list[dict[str, Any]]:
            if do == "round":
                raise processes.Ended("eager ended: killed by signal 9")
            return [{"absent": "needs more memory than is free"}]

    one = subject("eager", [1.0])
    assert one.ask(Silent(), "round") is None  # type: ignore[arg-type]
    assert one.error == "absent: eager ended: killed by signal 9"
    assert one.ask(Silent(), "parts") is None  # type: ignore[arg-type]
    assert one.error == "absent: needs more memory than is free"


def test_first_weights_are_those_of_a_run(tmp_path: Path) -> None:
    import safetensors.torch

    path = str(tmp_path / "state.safetensors")
    step.save_first_weights(resolved(), 3, path)
    saved, mine = safetensors.torch.load_file(path), state_of(ours(resolved()))
    assert saved.keys() == mine.keys()
    assert all(torch.equal(saved[name], mine[name]) for name in saved)


@pytest.mark.parametrize("name", ["softmax", "ncm", "supcon", "schane", "look", "moco", "mochi"])
def test_objectives_without_a_rival_are_refused(name: str) -> None:
    words = (*SMALL, f"objective.name={name}")
    with pytest.raises(FastrexError, match=f"objective class_means or cosine_softmax, got objective.name={name}"):
        step.check(step.Settings(words=words, batch=8, ranks=1))
    with pytest.raises(FastrexError, match=f"must be class_means or cosine_softmax, got {name}"):
        roofline.step(config_module.load("demo", list(words)), 4, 8, 4, 0)


@pytest.mark.parametrize(
    ("words", "forwards", "follows"),
    [
        (("objective.name=supcon", "objective.queue_size=9"), ["forward 16"], True),
        (("objective.name=supcon",), ["forward 32", "forward 16"], False),
        (("objective.name=moco", "data.global_crops=2"), ["forward 32", "forward 16"], True),
        (("objective.name=class_means",), ["forward 32", "forward 16"], True),
    ],
)
def test_parts_are_those_that_the_options_make(words: tuple[str, ...], forwards: list[str], follows: bool) -> None:
    wanted = [*forwards, *(["EMA"] if follows else []), "head", "backward", "optimiser"]
    assert step_parts.names(config_module.load("trex", [*SMALL, *words])) == wanted


def test_ranks_must_share_the_batch() -> None:
    with pytest.raises(FastrexError, match="--batch must be a multiple"):
        step.check(step.Settings(words=SMALL, batch=7, ranks=2))
