"""Two ranks equal one: the same samples, the same bank bits on both, the same numbers within the stated tolerances."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import ROOT, SETTINGS, environment, settings_for, write_stripes
from torch import Tensor

from fastrex import checkpoint, rundir

State = dict[str, Tensor]
# A net of 4 channels on batches of 16 amplifies rounding 2.5-fold per step at the demo's learning rate; at this one it
# learns just as visibly and the comparison is about the collectives, not about chaos.
GENTLE = "optim.lr=0.1"


def torchrun(ranks: int, *arguments: str | Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    result = subprocess.run(
        [*launch, *map(str, arguments)], env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )
    if not result.returncode:
        assert "Warning" not in result.stderr
    return result


def run(
    out: Path, ranks: int, data: Path, dtype: str, steps: int, settings: list[str], nudge: float = 0.0
) -> tuple[list[State], list[dict[str, Any]]]:
    out.mkdir()
    words = [*settings, f"data.path={json.dumps(str(data))}"]
    result = torchrun(ranks, ROOT / "tests" / "two_ranks.py", out, dtype, str(steps), str(nudge), *words)
    assert result.returncode == 0, result.stderr
    states = [safetensors.torch.load_file(out / f"rank{r}.safetensors") for r in range(ranks)]
    logs = [json.loads((out / f"rank{r}.json").read_text(encoding="utf-8")) for r in range(ranks)]
    return states, logs


def distance(a: State, b: State) -> float:
    """Largest difference of any floating tensor, relative to that tensor's largest value.

    Tensors that stay at rounding level are left out: a bias in front of a BatchNorm has no gradient but noise.
    """
    floating = [(t, b[name]) for name, t in a.items() if t.is_floating_point() and t.abs().max() > 1e-6]
    assert len(floating) > 100
    return max(((t - u).abs().max() / t.abs().max()).item() for t, u in floating)


@pytest.mark.parametrize("objective", ["class_means", "cosine_softmax"])
def test_two_ranks_equal_one_in_double_precision(stripes: Path, tmp_path: Path, objective: str) -> None:
    settings = [*settings_for(objective), GENTLE]
    (one,), (log_one,) = run(tmp_path / "one", 1, stripes, "float64", 20, settings)
    two, logs = run(tmp_path / "two", 2, stripes, "float64", 20, settings)
    # Every sample of a global batch, in order, whatever the number of ranks.
    joined = [[*a, *b] for a, b in zip(logs[0]["samples"], logs[1]["samples"], strict=True)]
    assert joined == log_one["samples"]
    # All state is equal on both ranks, to the bit.
    assert all(torch.equal(two[0][name], two[1][name]) for name in two[0])
    assert logs[0]["losses"] == pytest.approx(log_one["losses"], rel=1e-8)
    assert distance(one, two[0]) < 1e-8
    if objective == "class_means":
        assert torch.equal(one["bank/means.labels"], two[0]["bank/means.labels"])
        assert torch.equal(one["bank/means.pointer"], two[0]["bank/means.pointer"])


def test_two_ranks_in_single_precision_stay_as_close_as_two_nudged_runs(stripes: Path, tmp_path: Path) -> None:
    # BatchNorm training amplifies rounding: the yardstick at 50 steps is a run whose weights start 1e-7 away.
    steps, settings = 50, SETTINGS
    (one,), (log_one,) = run(tmp_path / "one", 1, stripes, "float32", steps, settings)
    (nudged,), _ = run(tmp_path / "nudged", 1, stripes, "float32", steps, settings, nudge=1e-7)
    two, logs = run(tmp_path / "two", 2, stripes, "float32", steps, settings)
    assert logs[0]["losses"][0] == pytest.approx(log_one["losses"][0], rel=1e-5)
    assert all(torch.equal(two[0][name], two[1][name]) for name in two[0])
    assert distance(one, two[0]) <= 2 * distance(one, nudged)
    assert logs[0]["eval"] == logs[1]["eval"] == log_one["eval"]
    assert log_one["eval"]["eval/images"] == 16
    assert torch.equal(one["bank/means.labels"], two[0]["bank/means.labels"])


def test_accumulation_commutes_with_ranks(stripes: Path, tmp_path: Path) -> None:
    settings = [*SETTINGS, GENTLE, "optim.accumulate=2"]
    (one,), (log_one,) = run(tmp_path / "one", 1, stripes, "float64", 6, settings)
    two, _ = run(tmp_path / "two", 2, stripes, "float64", 6, settings)
    assert distance(one, two[0]) < 1e-9
    assert torch.equal(one["bank/means.labels"], two[0]["bank/means.labels"])
    assert len(log_one["losses"]) == 6


def test_torchrun_trains_to_the_end_and_another_number_of_ranks_continues(stripes: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["-m", "fastrex", "train", "demo", *SETTINGS, "--data", stripes, "--out", out, "--device", "cpu"]
    first = torchrun(2, *arguments, "--max-steps", "6")
    assert first.returncode == 0, first.stderr
    assert rundir.read_status(out)["state"] == "completed"
    assert json.loads((out / "env.json").read_text(encoding="utf-8"))["world_size"] == 2
    resume = ["-m", "fastrex", "train", "--out", out, "--resume", "must", "--device", "cpu"]
    second = torchrun(1, *resume, "--allow-world-size-change")
    assert second.returncode == 0, second.stderr
    assert "resuming a run of 2 ranks with 1" in second.stdout
    assert checkpoint.steps(out)[-1] == 16


def test_what_stops_one_rank_ends_the_job_and_is_named_in_its_status(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    write_stripes(data / "train", 8, seed=0)
    arguments = ("-m", "fastrex", "train", "demo", *SETTINGS, "--data", data, "--out", out, "--device", "cpu")
    first = torchrun(2, *arguments, "--max-steps", "1")
    assert first.returncode == 0, first.stderr
    victim = sorted((data / "train").rglob("*.jpg"))[3]
    victim.write_bytes(victim.read_bytes()[:100])
    second = torchrun(2, "-m", "fastrex", "train", "--out", out, "--resume", "must", "--device", "cpu")
    assert second.returncode != 0
    status = rundir.read_status(out)
    assert status["state"] == "failed"
    assert victim.name in status["error"]
    lines = [line for line in second.stderr.splitlines() if line.startswith("fastrex: error [rank ")]
    assert any(victim.name in line and "--init-from" in line for line in lines)


def test_a_stop_signal_to_torchrun_saves_at_the_same_step_on_all_ranks(stripes: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fastrex"]
    arguments = ["train", "demo", *SETTINGS, "--data", stripes, "--out", out, "--device", "cpu", "optim.epochs=500"]
    process = subprocess.Popen(
        [*launch, *map(str, arguments)], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 90
    while not checkpoint.steps(out):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    status = rundir.read_status(out)
    assert status["state"] == "preempted"
    assert status["step"] == status["checkpoint"]


def test_a_batch_that_the_ranks_cannot_share_is_refused(stripes: Path, tmp_path: Path) -> None:
    arguments = ["-m", "fastrex", "train", "demo", *SETTINGS, "--data", stripes, "--out", tmp_path / "run"]
    result = torchrun(2, *arguments, "--device", "cpu", "optim.batch_size=15")
    assert result.returncode != 0
    assert "optim.batch_size must be a multiple of ranks x optim.accumulate = 2, got 15" in result.stderr
    assert "set optim.batch_size=14" in result.stderr


def test_gradients_may_be_sent_in_bf16(stripes: Path, tmp_path: Path) -> None:
    settings = [*SETTINGS, GENTLE]
    full, logs = run(tmp_path / "full", 2, stripes, "float32", 1, settings)
    half, half_logs = run(tmp_path / "half", 2, stripes, "float32", 1, [*settings, "optim.reduce_dtype=bf16"])
    # One step, since a small net amplifies rounding. Both ranks hold the same bits.
    assert all(torch.equal(half[0][name], half[1][name]) for name in half[0])
    assert logs[0]["losses"][0] == half_logs[0]["losses"][0]
    name = "optimizer/momentum.model.encoder.conv1.weight"
    apart = float((full[0][name] - half[0][name]).norm() / full[0][name].norm())
    assert 1e-5 < apart < 0.05
