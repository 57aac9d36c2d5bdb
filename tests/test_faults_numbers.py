"""Numbers gone bad in real runs: skipped or stopped on all ranks alike, and never in a bank, an average or a
checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import launch
import pytest
import torch
from conftest import settings_for
from torch import Tensor

from fastrex import checkpoint, rundir
from fastrex.optim import MAX_SKIPPED

Report = Callable[..., None]
SHARDED, MICROS = "objective.sharded=true", "optim.accumulate=2"
EVERY_STEP = ["checkpoint.every_steps=1", "checkpoint.keep_last=40"]
# What a step that is left out must not touch. Running statistics move in the forward, before anybody knows.
KEPT = ("weights", "momentum", "ema", "copies")


@dataclass
class Outcome:
    """How a job ended: exit codes, what it wrote, and by step and rank what the watch saw."""

    run: Path
    codes: list[int]
    output: str
    seen: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)
    hashes: list[str] = field(default_factory=list)

    def status(self) -> dict[str, Any]:
        return dict(rundir.read_status(self.run))

    def tensors(self, step: int) -> dict[str, Tensor]:
        parts, _ = checkpoint.load(checkpoint.folder(self.run, step))
        return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def train(
    out: Path,
    data: Path,
    ranks: int,
    faults: list[str],
    *words: str,
    watch: str = "",
    objective: str = "class_means",
    resume: bool = False,
) -> Outcome:
    """A job of ``ranks`` processes; ``watch``: words for the watch, without its folder."""
    seen, hashes = out / "seen", out / "hashes"
    new = ["demo", *settings_for(objective), "--data", data, *words]
    # Given once more, since a resumed run has its settings in its folder.
    arguments = ["train", *(["--resume", "must", *words] if resume else new), "--out", out / "run", "--device", "cpu"]
    watching = [f"watch:folder={seen},{watch}"] if watch else []
    with launch.ranks(out / "log", ranks, launch.faulty(arguments, [*faults, *watching], hashes)) as job:
        codes = job.wait(240)
        found = Outcome(out / "run", codes, job.output)
    for file in sorted(seen.glob("*.json")):
        step, _, rank = file.stem.partition("-rank")
        found.seen[int(step), int(rank)] = json.loads(file.read_text(encoding="utf-8"))
    found.hashes = [file.read_text(encoding="utf-8") for file in sorted(hashes.glob("*.txt"))]
    return found


def same_on_all_ranks(found: Outcome, ranks: int, *, split: bool = False) -> bool:
    """``split``: each rank has class weights of its own, and their momentum."""
    apart = ("weights", "momentum") if split else ()

    def common(step: int, rank: int) -> dict[str, dict[str, Any]]:
        both = found.seen[step, rank]
        return {when: {kind: seen for kind, seen in both[when].items() if kind not in apart} for when in both}

    steps = sorted({step for step, _ in found.seen})
    assert steps
    return all(common(step, rank) == common(step, 0) for step in steps for rank in range(ranks))


def finite(tensors: dict[str, Tensor]) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors.values() if t.is_floating_point())


def diverged(found: Outcome, ranks: int, step: int, kept: int | None, *, split: bool = False) -> None:
    """The job stopped because of step ``step``, on all ranks alike, and kept the checkpoint ``kept``."""
    assert found.codes == [3] * ranks, found.output
    status = found.status()
    assert status["state"] == "diverged"
    assert f"at step {step};" in status["error"]
    assert found.output.count(f"got NaN or inf at step {step};") >= ranks
    assert same_on_all_ranks(found, ranks, split=split)
    for (number, _), seen in found.seen.items():
        assert number >= step
        assert all(seen["after"][kind] == seen["before"][kind] for kind in (*KEPT, "bank")), number
        assert seen["after"]["guard"]["diverged"] == step
    assert (checkpoint.steps(found.run) or [None])[-1] == kept
    if kept is not None:
        assert f"the last good checkpoint is step {kept}" in status["error"]
        assert finite(found.tensors(kept))
    assert not found.hashes


def overflowed(found: Outcome, step: int, ranks: int) -> None:
    """Step ``step`` was left out on all ranks alike: it counts, the bank moves on, the scale halves."""
    for rank in range(ranks):
        before, after = found.seen[step, rank]["before"], found.seen[step, rank]["after"]
        assert all(after[kind] == before[kind] for kind in KEPT), (step, rank)
        assert after["bank"] != before["bank"]
        assert after["statistics"] != before["statistics"]
        assert after["finite"]
        assert after["guard"]["scale"] == before["guard"]["scale"] / 2
        assert after["guard"]["skipped"] == before["guard"]["skipped"] + 1
        assert after["guard"]["growth"] == 0
        assert after["guard"]["diverged"] == -1


def test_one_nan_on_one_rank_stops_both_before_anything_is_changed(
    stripes: Path, tmp_path: Path, report: Report
) -> None:
    # Step 3 ends an epoch, so a checkpoint falls due in the very step that went bad.
    found = train(tmp_path, stripes, 2, ["bad:where=features,rank=1,step=3"], *EVERY_STEP, watch="step=3")
    diverged(found, 2, 3, kept=3)
    report("T21", "NaN in one online feature of one rank, fp32", injected=1, survived=1, bits_equal=True)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("precision", "ranks", "where", "value", "rank", "objective", "options"),
    [
        ("fp32", 2, "loss", "nan", 1, "class_means", ()),
        ("fp32", 2, "image", "nan", None, "class_means", ()),
        ("fp32", 2, "grads", "inf", None, "cosine_softmax", ()),
        ("fp32", 1, "grad", "inf", None, "class_means", ()),
        ("bf16", 2, "features", "inf", 0, "cosine_softmax", ()),
        ("bf16", 2, "grad", "nan", 1, "class_means", ()),
        ("bf16", 1, "ema", "-inf", None, "class_means", ()),
        ("fp16", 2, "ema", "nan", 1, "class_means", ()),
        ("fp16", 2, "image", "inf", 1, "class_means", ()),
        ("fp16", 1, "features", "nan", None, "cosine_softmax", ()),
        ("fp32", 2, "features", "nan", 1, "cosine_softmax", (SHARDED,)),
        # The last micro-batch, whose backward averages the gradients, is a good one.
        ("bf16", 2, "loss", "nan", 0, "cosine_softmax", (SHARDED, MICROS)),
        ("fp32", 2, "features", "inf", 1, "class_means", (MICROS, "optim.impl=torch")),
    ],
)
def test_bad_numbers_stop_the_run_with_nothing_changed(
    stripes: Path,
    tmp_path: Path,
    report: Report,
    precision: str,
    ranks: int,
    where: str,
    value: str,
    rank: int | None,
    objective: str,
    options: tuple[str, ...],
) -> None:
    fault = f"bad:where={where},value={value},step=2{'' if rank is None else f',rank={rank}'}"
    if MICROS in options:
        fault += ",calls=1"
    words = [*EVERY_STEP, f"optim.precision={precision}", *options]
    found = train(tmp_path, stripes, ranks, [fault], *words, watch="step=2", objective=objective)
    diverged(found, ranks, 2, kept=2, split=SHARDED in options)
    who = "all ranks" if rank is None else f"rank {rank}"
    text = ", ".join([f"{value} in {where} on {who} of {ranks}", precision, objective, *options])
    text += " (in the first micro-batch only)" if MICROS in options else ""
    report("T21", text, injected=1, survived=1, bits_equal=True)


@pytest.mark.faults
def test_what_the_loop_reads_late_has_changed_nothing_meanwhile(stripes: Path, tmp_path: Path, report: Report) -> None:
    # Read at the end of the epoch only, where a checkpoint falls due: three more steps have run by then.
    words = ["run.log_every=16", "optim.precision=bf16"]
    found = train(tmp_path, stripes, 2, ["bad:where=loss,rank=0,step=4"], *words, watch="step=4,until=8")
    diverged(found, 2, 4, kept=4)
    assert {step for step, _ in found.seen} == {4, 5, 6, 7}
    report("T21", "NaN loss, read three steps later", injected=1, survived=1, bits_equal=True)


@pytest.mark.faults
def test_a_request_to_stop_does_not_save_a_diverged_state(stripes: Path, tmp_path: Path, report: Report) -> None:
    faults = ["bad:where=ema,rank=1,step=5", "signal:signal=SIGTERM,step=5"]
    found = train(tmp_path, stripes, 2, faults, "run.log_every=16", watch="step=5")
    diverged(found, 2, 5, kept=4)
    report("T21", "NaN and SIGTERM in one step", injected=2, survived=2, bits_equal=True)


@pytest.mark.faults
def test_statistics_that_no_loss_sees_are_never_saved(stripes: Path, tmp_path: Path, report: Report) -> None:
    found = train(tmp_path, stripes, 2, ["bad:where=statistics,value=inf,rank=1,step=5"])
    assert found.codes == [3, 3], found.output
    assert found.status()["state"] == "diverged"
    assert found.output.count("NaN or inf in model tensor 'encoder.bn1.running_var' after step 8") >= 2
    assert checkpoint.steps(found.run) == [4]
    assert finite(found.tensors(4))
    report("T22", "inf in a running variance of one rank", injected=1, survived=1)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("ranks", "objective", "options"),
    [
        (1, "class_means", ()),
        (2, "class_means", ()),
        (2, "cosine_softmax", ()),
        (2, "cosine_softmax", (SHARDED, MICROS, "optim.impl=torch")),
    ],
)
def test_fp16_overflows_are_left_out_on_all_ranks_alike(
    stripes: Path, tmp_path: Path, report: Report, ranks: int, objective: str, options: tuple[str, ...]
) -> None:
    one = ranks - 1
    faults = [f"bad:where=grad,rank={one},step=6", "bad:where=grads,value=inf,step=9"]
    faults += ["bad:where=grad,value=-inf,rank=0,step=12", f"bad:where=row,rank={one},step=14"]
    words = ["optim.precision=fp16", *options]
    found = train(tmp_path, stripes, ranks, faults, *words, watch="step=6,until=15", objective=objective)
    assert found.codes == [0] * ranks, found.output
    assert same_on_all_ranks(found, ranks, split=SHARDED in options)
    assert len(found.hashes) == ranks
    assert len(set(found.hashes)) == 1
    skipped = {6, 9, 12}
    for step in range(6, 15):
        before, after = found.seen[step, 0]["before"], found.seen[step, 0]["after"]
        if step in skipped and objective == "class_means":
            overflowed(found, step, ranks)
        assert (after["weights"] == before["weights"]) == (step in skipped)
        assert (after["guard"]["scale"] < before["guard"]["scale"]) == (step in skipped)
    assert finite(found.tensors(16))
    setting = ", ".join([f"{ranks} ranks", "fp16", objective, *options])
    patterns = f"NaN, inf: one gradient on one rank, all on all ({setting}); a zero feature row"
    report("T21", patterns, injected=4, survived=4)


@pytest.mark.faults
def test_a_run_resumed_after_an_overflow_has_its_scale_and_counters(
    stripes: Path, tmp_path: Path, report: Report
) -> None:
    faults = ["bad:where=grads,value=inf,rank=1,step=8,until=10"]
    words = ["optim.precision=fp16", *EVERY_STEP]
    straight = train(tmp_path / "straight", stripes, 2, faults, *words)
    cut = train(tmp_path / "cut", stripes, 2, faults, "--max-steps", "9", *words)
    assert cut.codes == [0, 0], cut.output
    guard = {name: value.item() for name, value in cut.tensors(9).items() if "guard" in name}
    assert (guard["optimizer/guard.skipped"], guard["optimizer/guard.growth"]) == (1, 0)
    resumed = train(tmp_path / "cut", stripes, 2, faults, resume=True)
    assert straight.codes == resumed.codes == [0, 0], resumed.output
    for step in (10, 12):
        ours, theirs = straight.tensors(step), resumed.tensors(step)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert float(straight.tensors(10)["optimizer/guard.skipped"]) == 2
    assert set(straight.hashes) == set(resumed.hashes)
    assert len(set(resumed.hashes)) == 1
    report("T21", "resumed between two fp16 overflows", injected=2, survived=2, bits_equal=True)


@pytest.mark.faults
def test_an_overflow_at_the_lowest_scale_stops_the_run(stripes: Path, tmp_path: Path, report: Report) -> None:
    # One that comes and goes: the steps before and after it would be good ones.
    faults = ["loss-scale:step=4,scale=1", "bad:where=grad,value=inf,rank=1,step=6"]
    words = ["optim.precision=fp16", *EVERY_STEP]
    found = train(tmp_path, stripes, 2, faults, *words, watch="step=6")
    assert found.codes == [3, 3], found.output
    error = found.status()["error"]
    assert "fp16 gradients must be finite, got an overflow at step 6 (in a row: 1, loss scale: 1);" in error
    assert error.endswith("the last good checkpoint is step 6; use --precision bf16 or fp32")
    assert same_on_all_ranks(found, 2)
    seen = found.seen[6, 0]
    assert all(seen["after"][kind] == seen["before"][kind] for kind in (*KEPT, "bank"))
    report("T21", "one overflow at loss scale 1, fp16", injected=1, survived=1, bits_equal=True)


@pytest.mark.faults
def test_nan_for_ever_in_fp16_stops_after_so_many_steps_also_across_a_resume(
    stripes: Path, tmp_path: Path, report: Report
) -> None:
    start = 6  # by then the scale has found its place
    faults = [f"bad:where=grad,rank=1,step={start},until=99"]
    words = ["optim.precision=fp16", "optim.epochs=8", *EVERY_STEP]
    first = train(tmp_path, stripes, 2, faults, "--max-steps", "16", *words)
    assert first.codes == [0, 0], first.output
    before = first.tensors(start)
    # Halved to 1, and once more in vain.
    count = round(math.log2(float(before["optimizer/guard.scale"]))) + 1
    last = start + count - 1
    assert last > 16
    assert count < MAX_SKIPPED
    found = train(tmp_path, stripes, 2, faults, resume=True, watch="step=16,until=40")
    assert found.codes == [3, 3], found.output
    assert f"got an overflow at step {last} (in a row: {count}, loss scale: 1);" in found.status()["error"]
    assert same_on_all_ranks(found, 2)
    assert max(step for step, _ in found.seen) == last
    for (step, _), seen in found.seen.items():
        assert all(seen["after"][kind] == seen["before"][kind] for kind in KEPT), step
        assert seen["after"]["finite"]
    assert checkpoint.steps(found.run)[-1] == last
    newest = found.tensors(last)
    assert finite(newest)
    assert float(newest["optimizer/guard.scale"]) == 1.0  # and never less
    moved = {name for name, tensor in newest.items() if not torch.equal(tensor, before[name])}
    assert {name for name in moved if "running" not in name and "num_batches" not in name} == {
        *("bank/means.features", "bank/means.labels", "bank/means.pointer"),
        *("optimizer/guard.scale", "optimizer/guard.skipped", "optimizer/guard.growth"),
    }
    report(
        "T22",
        "NaN in one gradient of one rank for ever, fp16, resumed",
        injected=count,
        survived=count,
        bits_equal=True,
    )


@pytest.mark.faults
def test_running_statistics_are_equal_on_all_ranks_by_construction(
    stripes: Path, tmp_path: Path, report: Report
) -> None:
    words = ["optim.epochs=6"]
    found = train(tmp_path / "joined", stripes, 2, [], *words, watch="step=22,until=24")
    assert found.codes == [0, 0], found.output
    assert same_on_all_ranks(found, 2)
    assert len({seen["after"]["statistics"] for seen in found.seen.values()}) == 2
    assert len(found.hashes) == 2
    assert len(set(found.hashes)) == 1
    # Each rank by itself, on its own images: without the joined statistics they part in the first step.
    apart = train(tmp_path / "apart", stripes, 2, ["apart:"], "--max-steps", "1", *words, watch="step=0")
    assert apart.seen[0, 0]["before"]["statistics"] == apart.seen[0, 1]["before"]["statistics"]
    assert apart.seen[0, 0]["after"]["statistics"] != apart.seen[0, 1]["after"]["statistics"]
    report("buffers", "buffers of the model and its EMA after 24 steps of 2 ranks", injected=0, survived=0)
