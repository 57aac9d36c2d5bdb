"""A run that was cut anywhere and continued is the run that was not: the same batches and the same state, bit by bit,
on each of its ranks. A cut run is the quiet run's directory as a kill would have left it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import launch
import pytest
import safetensors.torch
import torch
from conftest import ROOT, SETTINGS, settings_for, write_stripes
from test_distributed import GENTLE, State, distance
from torchvision_shim import import_timm

from fastrex import checkpoint, metrics, rundir
from fastrex import config as c
from fastrex.data.dataset import open_dataset
from fastrex.data.loader import Batch
from fastrex.distributed import World

Report = Callable[..., None]
# Six epochs of four steps, the first one warm-up; every step has a checkpoint, so that any of them can be the cut.
STEPS = 24
EVERY_STEP = ["checkpoint.every_epochs=0", "checkpoint.every_steps=1", f"checkpoint.keep_last={STEPS}"]
SIX_EPOCHS = [*SETTINGS, "optim.epochs=6", *EVERY_STEP]


@dataclass
class Run:
    """What a job of two ranks left behind. ``hashes``: of the final state, by rank. ``batches``: what each rank was
    trained on, by (step, micro-batch): index rows and the hash of crops and targets."""

    out: Path
    hashes: list[str]
    batches: list[dict[tuple[int, int], tuple[str, str]]]


def train(folder: Path, arguments: list[str | Path], faults: tuple[str, ...] = (), ranks: int = 2) -> Run:
    """Two ranks to the end of their run in ``folder/run``."""
    out, hashes, batches = folder / "run", folder / "hashes", folder / "batches"
    words = ["train", *arguments, "--out", out, "--device", "cpu"]
    shutil.rmtree(hashes, ignore_errors=True)
    shutil.rmtree(batches, ignore_errors=True)
    with launch.ranks(folder / "log", ranks, launch.faulty(words, faults, hashes, batches)) as job:
        codes = job.wait(240)
        assert codes == [0] * ranks, job.output
    files = [f"rank{rank}.txt" for rank in range(ranks)]
    return Run(out, [(hashes / f).read_text(encoding="utf-8") for f in files], [noted(batches / f) for f in files])


def noted(path: Path) -> dict[tuple[int, int], tuple[str, str]]:
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    assert len({(step, micro) for step, micro, _, _ in lines}) == len(lines), "a step was trained twice"
    return {(int(step), int(micro)): (rows, digest) for step, micro, rows, digest in lines}


def cut(run: Run, folder: Path, step: int) -> Path:
    """A copy of ``run`` as it was when it was killed with ``step`` steps saved, a little later."""
    out = folder / "run"
    shutil.copytree(run.out, out)
    shutil.rmtree(out / "export")
    for later in checkpoint.steps(out):
        if later > step:
            shutil.rmtree(checkpoint.folder(out, later))
    status = json.loads((out / "status.json").read_text(encoding="utf-8"))
    gone = {"state": "running", "step": step, "pid": 2**22 + 1, "host": os.uname().nodename, "time": status["time"]}
    (out / "status.json").write_text(json.dumps(gone), encoding="utf-8")
    # Two steps further than the checkpoint, the second record half written.
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    trained = [i for i, line in enumerate(lines) if "train/loss" in line]
    kept = lines[: trained[min(step + 1, len(trained) - 1)]]
    half = lines[len(kept)][: len(lines[len(kept)]) // 2] if len(kept) < len(lines) else ""
    (out / "metrics.jsonl").write_text("".join([*kept, half]), encoding="utf-8")
    return out


def goes_on(run: Run, folder: Path, step: int, *more: str, faults: tuple[str, ...] = ()) -> Run:
    """``run`` cut at ``step`` and continued by new processes; what they were trained on is checked here."""
    cut(run, folder, step)
    again = train(folder, ["--resume", "must", *more], faults)
    for mine, theirs in zip(again.batches, run.batches, strict=True):
        assert min(mine)[0] == step
        assert mine == {place: batch for place, batch in theirs.items() if place[0] in {s for s, _ in mine}}
    return again


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def quiet(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = train(tmp_path_factory.mktemp("quiet"), ["demo", *SIX_EPOCHS, "--data", stripes])
    assert len(set(run.hashes)) == 1
    assert sorted(run.batches[0]) == [(step, 0) for step in range(STEPS)]
    return run


def test_a_new_process_goes_on_from_step_13(quiet: Run, tmp_path: Path, report: Report) -> None:
    again = goes_on(quiet, tmp_path, 13)
    assert again.hashes == quiet.hashes
    # The log tells of every step once, and of the same losses.
    lines, straight = records(again.out), records(quiet.out)
    assert [r["step"] for r in lines if "train/loss" in r] == list(range(1, STEPS + 1))
    assert [r["step"] for r in lines if "eval/knn" in r] == [r["step"] for r in straight if "eval/knn" in r]
    timeless = [{k: v for k, v in r.items() if k != "time" and not k.startswith("perf/")} for r in lines]
    assert timeless == [{k: r[k] for k in t} for r, t in zip(straight, timeless, strict=True)]
    status = rundir.read_status(again.out)
    assert (status["state"], status["checkpoint"]) == ("completed", STEPS)
    report("T02", "13 steps, a new process, 11 steps", injected=1, survived=1, bits_equal=True)


@pytest.mark.faults
def test_twice_is_the_same_and_another_seed_is_not(quiet: Run, stripes: Path, tmp_path: Path, report: Report) -> None:
    again = train(tmp_path / "again", ["demo", *SIX_EPOCHS, "--data", stripes])
    other = train(tmp_path / "other", ["demo", *SIX_EPOCHS, "run.seed=1", "--data", stripes])
    assert again.hashes == quiet.hashes
    assert again.batches == quiet.batches
    assert len({*quiet.hashes, *other.hashes}) == 2
    first = [[rows for (step, _), (rows, _) in run.batches[0].items() if step < 4] for run in (quiet, other)]
    assert first[0] != first[1]
    report("T01", "24 steps twice, then with another seed", injected=0, survived=0, bits_equal=True)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("step", "where"),
    [
        (1, "first step of the warm-up"),
        (3, "end of the warm-up"),
        (6, "middle of an epoch"),
        (7, "last batch of an epoch to come"),
        (8, "end of an epoch"),
        (9, "first batch of an epoch"),
    ],
)
def test_a_cut_anywhere(quiet: Run, tmp_path: Path, step: int, where: str, report: Report) -> None:
    assert goes_on(quiet, tmp_path, step).hashes == quiet.hashes
    report("T03", f"cut at step {step}: {where}", injected=1, survived=1, bits_equal=True)


@pytest.mark.faults
def test_a_resumed_run_is_cut_again(quiet: Run, tmp_path: Path, report: Report) -> None:
    once = goes_on(quiet, tmp_path / "once", 5, "--max-steps", "7")
    assert sorted(once.batches[0]) == [(5, 0), (6, 0)]
    again = train(tmp_path / "once", ["--resume", "must"])
    assert again.hashes == quiet.hashes
    assert again.batches[0] == {place: batch for place, batch in quiet.batches[0].items() if place[0] >= 7}
    report("T04", "two cuts in one epoch", injected=2, survived=2, bits_equal=True)


@pytest.mark.faults
def test_threads_and_prefetch_may_change(quiet: Run, tmp_path: Path, report: Report) -> None:
    again = goes_on(quiet, tmp_path, 6, "data.threads=3", "data.prefetch=5")
    assert again.hashes == quiet.hashes
    assert "data.threads" in (again.out / "train.log").read_text(encoding="utf-8")
    report("T06", "other number of threads and prefetched batches on resume", injected=1, survived=1, bits_equal=True)


VARIANTS = {
    "cosine softmax, fp16, accumulation": [
        *settings_for("cosine_softmax"),
        "optim.precision=fp16",
        "optim.accumulate=2",
    ],
    "class means, bf16, balanced, repeats, padding": [
        *SETTINGS,
        "optim.precision=bf16",
        "data.sampling=balanced",
        "data.repeats=2",
        "data.last_batch=pad",
        "optim.batch_size=24",
    ],
    "cosine softmax, bf16, balanced": [
        *settings_for("cosine_softmax"),
        "optim.precision=bf16",
        "data.sampling=balanced",
    ],
    "class means, fp32, accumulation, padding": [
        *SETTINGS,
        "optim.accumulate=2",
        "data.last_batch=pad",
        "optim.batch_size=24",
    ],
}


@pytest.mark.faults
@pytest.mark.parametrize("name", list(VARIANTS))
def test_cuts_of_other_settings(stripes: Path, tmp_path: Path, name: str, report: Report) -> None:
    run = train(tmp_path / "quiet", ["demo", *VARIANTS[name], *EVERY_STEP, "--data", stripes, "--max-steps", "10"])
    assert len(set(run.hashes)) == 1
    assert goes_on(run, tmp_path / "cut", 6, "--max-steps", "10").hashes == run.hashes
    report("T02", f"cut at step 6: {name}", injected=1, survived=1, bits_equal=True)


@pytest.mark.faults
def test_a_cut_of_a_timm_encoder(stripes: Path, tmp_path: Path, report: Report) -> None:
    import_timm()
    table = [s for s in SETTINGS if not s.startswith("model.")]
    model = ["model.stem=imagenet", "model.width=64", "model.arch=timm:resnet10t"]
    words = ["demo", *table, *model, *EVERY_STEP, "--data", stripes, "--max-steps", "7"]
    run = train(tmp_path / "quiet", words, ("timm:",))
    # Its batch norms count over both ranks, or their statistics would differ.
    assert len(set(run.hashes)) == 1
    assert goes_on(run, tmp_path / "cut", 3, "--max-steps", "7", faults=("timm:",)).hashes == run.hashes
    report("T02", "cut at step 3: timm's ResNet-10-T", injected=1, survived=1, bits_equal=True)


@pytest.mark.faults
def test_the_loss_scale_is_restored(stripes: Path, tmp_path: Path, report: Report) -> None:
    words = ["demo", *SETTINGS, *EVERY_STEP, "optim.precision=fp16", "--data", stripes, "--max-steps", "10"]
    # So large that the gradients of the next steps overflow until it has been halved often enough.
    run = train(tmp_path / "quiet", words, ("loss-scale:step=2,scale=1e12",))
    scales = [r["train/loss_scale"] for r in records(run.out) if "train/loss_scale" in r]
    assert 65536 < scales[-1] < scales[4] < 1e12
    again = goes_on(run, tmp_path / "cut", 5, "--max-steps", "10")
    assert again.hashes == run.hashes
    assert [r["train/loss_scale"] for r in records(again.out) if "train/loss_scale" in r] == scales
    overflows = sum(after < before for before, after in pairwise(scales))
    report("T21", "fp16 overflows and a cut between", injected=overflows + 1, survived=overflows + 1, bits_equal=True)


@pytest.mark.faults
def test_a_replaced_file_is_replaced_alike(tmp_path: Path, report: Report) -> None:
    data = tmp_path / "data"
    write_stripes(data / "train", 16, seed=0)
    words = ["demo", *SETTINGS, *EVERY_STEP, "data.on_bad_sample=replace", "--data", data]
    begun = train(tmp_path / "begun", [*words, "--max-steps", "1"])
    victim = sorted((data / "train").rglob("*.jpg"))[20]
    victim.write_bytes(victim.read_bytes()[:200])
    for name in ("quiet", "cut"):
        shutil.copytree(begun.out, tmp_path / name / "run")
    straight = train(tmp_path / "quiet", ["--resume", "must", "--max-steps", "12"])
    first = train(tmp_path / "cut", ["--resume", "must", "--max-steps", "7"])
    second = train(tmp_path / "cut", ["--resume", "must", "--max-steps", "12"])
    assert second.hashes == straight.hashes
    for rank in range(2):
        assert {**first.batches[rank], **second.batches[rank]} == straight.batches[rank]
    assert victim.name in (straight.out / "train.log").read_text(encoding="utf-8")
    report("T26", "file gone bad, replaced, and the run cut", injected=2, survived=2, bits_equal=True)


def in_double_precision(
    folder: Path, data: Path, words: list[str], ranks: int, steps: int, run: Path | None = None
) -> tuple[State, dict[str, list[Any]], list[list[int]]]:
    """State, what rank 0 notes, and the global batches of ``ranks`` ranks up to step ``steps``."""
    folder.mkdir()
    settings = [*words, f"data.path={json.dumps(str(data))}", *(["--run", str(run)] if run else [])]
    script = str(ROOT / "tests" / "two_ranks.py")
    with launch.ranks(folder / "log", ranks, [script, str(folder), "float64", str(steps), "0", *settings]) as job:
        assert job.wait(240) == [0] * ranks, job.output
    states = [safetensors.torch.load_file(folder / f"rank{r}.safetensors") for r in range(ranks)]
    notes = [json.loads((folder / f"rank{r}.json").read_text(encoding="utf-8")) for r in range(ranks)]
    assert all(torch.equal(states[0][name], state[name]) for state in states for name in states[0])
    # A line per micro-batch, which the ranks share out in order.
    return states[0], notes[0], [list(chain(*shares)) for shares in zip(*(n["samples"] for n in notes), strict=True)]


@pytest.mark.faults
@pytest.mark.parametrize(("before", "after", "objective"), [(2, 1, "class_means"), (1, 2, "cosine_softmax")])
def test_another_number_of_ranks_goes_on_with_the_same_batches(
    stripes: Path, tmp_path: Path, before: int, after: int, objective: str, report: Report
) -> None:
    words = [*settings_for(objective), GENTLE, "optim.accumulate=2"]
    straight, told, samples = in_double_precision(tmp_path / "straight", stripes, words, after, 20)
    run = tmp_path / "run"
    run.mkdir()
    _, told_first, first = in_double_precision(tmp_path / "first", stripes, words, before, 9, run)
    mixed, told_second, second = in_double_precision(tmp_path / "second", stripes, words, after, 20, run)
    assert any(str(before) in line and "ranks" in line for line in told_second["lines"])
    assert [*first, *second] == samples
    assert [*told_first["losses"], *told_second["losses"]] == pytest.approx(told["losses"], rel=1e-8)
    assert distance(straight, mixed) < 1e-8
    if objective == "class_means":
        assert torch.equal(straight["bank/means.labels"], mixed["bank/means.labels"])
        assert torch.equal(straight["bank/means.pointer"], mixed["bank/means.pointer"])
    report("T07", f"{before} ranks, then {after}, {objective}: equal to 1e-8 in float64", injected=1, survived=1)


@pytest.mark.faults
def test_another_number_of_ranks_is_refused_or_asked_for(quiet: Run, tmp_path: Path, report: Report) -> None:
    cut(quiet, tmp_path, 10)
    words = ["train", "--resume", "must", "--out", tmp_path / "run", "--device", "cpu"]
    with launch.ranks(tmp_path / "log", 1, launch.faulty(words)) as job:
        assert job.wait(120) == [1]
        assert "--allow-world-size-change" in job.output
    assert checkpoint.steps(tmp_path / "run")[-1] == 10
    again = train(tmp_path, ["--resume", "must", "--allow-world-size-change"], ranks=1)
    both = [{place: rows for place, (rows, _) in batches.items()} for batches in quiet.batches]
    expected = {place: f"{both[0][place]},{both[1][place]}" for place in both[0] if place[0] >= 10}
    assert {place: rows for place, (rows, _) in again.batches[0].items()} == expected
    report("T07", "2 ranks, then 1: refused, then allowed, the same samples", injected=1, survived=1)


LOADERS = {
    "uniform": [],
    "repeats, balanced": ["data.repeats=2", "data.sampling=balanced"],
    "padding": ["data.last_batch=pad", "optim.batch_size=24"],
    "accumulation": ["optim.accumulate=2"],
    "one file bad": ["data.on_bad_sample=replace"],
}


@pytest.mark.parametrize("name", list(LOADERS))
def test_batches_from_any_step_on(tmp_path: Path, name: str, report: Report) -> None:
    write_stripes(tmp_path / "train", 16, seed=0)
    path = f"data.path={json.dumps(str(tmp_path))}"
    data = open_dataset(c.load("demo", [*SETTINGS, *LOADERS[name], path]), world(0, 1))
    if "bad" in name:
        victim = sorted((tmp_path / "train").rglob("*.jpg"))[7]
        victim.write_bytes(victim.read_bytes()[:200])
    last = 3 * data.steps_per_epoch
    for rank in range(2):
        straight = list(batches(data, 0, last, rank))
        assert len({b.step for b in straight}) == last
        for start in (1, data.steps_per_epoch - 1, data.steps_per_epoch, data.steps_per_epoch + 1, last - 1):
            resumed = list(batches(data, start, last, rank))
            expected = [b for b in straight if b.step >= start]
            assert [(b.step, b.micro) for b in resumed] == [(b.step, b.micro) for b in expected]
            for one, other in zip(resumed, expected, strict=True):
                assert torch.equal(torch.as_tensor(one.samples), torch.as_tensor(other.samples))
                assert torch.equal(one.target, other.target)
                assert all(torch.equal(a, b) for a, b in zip(one.crops, other.crops, strict=True))
    report("T06", f"loader started at five steps, {name}", injected=0, survived=0, bits_equal=True)


def test_tensorboard_forgets_what_is_done_again_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten: list[int | None] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            forgotten.append(purge_step)

        def close(self) -> None:
            pass

    monkeypatch.setattr(metrics, "_tensorboard", lambda: Writer)
    for start in (None, 0, 4):
        metrics.Log(tmp_path, c.load("demo", ["run.tensorboard=true"]), world(0, 1), start).close()
    # The writer drops events from that step on, itself included; the checkpoint's own stay.
    assert forgotten == [None, 1, 5]


def world(rank: int, size: int) -> World:
    return World(rank, size, rank, size, torch.device("cpu"))


def batches(data: object, start: int, stop: int, rank: int) -> Iterator[Batch]:
    with data.batches(start, stop, world(rank, 2)) as loader:  # type: ignore[attr-defined]
        yield from loader
