"""Training with the class weights split over ranks: the same numbers as one process, saved and resumed by any number of
ranks."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import launch
import pytest
import safetensors
import safetensors.torch
import torch
from conftest import ROOT, settings_for
from torch import Tensor

from fastrex import checkpoint, digests, distributed, objectives, preflight, resume, rundir
from fastrex import config as c
from fastrex.data.dataset import open_dataset
from fastrex.step import Trainer

Report = Callable[..., None]
State = dict[str, Tensor]
SETTINGS = settings_for("cosine_softmax")
SHARDED = [*SETTINGS, "objective.sharded=true"]
# As in test_distributed.py: the comparison is about the collectives, not about chaos.
GENTLE = "optim.lr=0.1"
TWELVE = ["optim.batch_size=12", GENTLE, "checkpoint.every_steps=1", "checkpoint.keep_last=20"]
OTHER_RANKS = ("--allow-world-size-change", "--resume", "must")
WEIGHT, MOMENTUM = "bank/head.weight", "optimizer/momentum.objective.head.weight"


def states(
    out: Path, ranks: int, data: Path, dtype: str, steps: int, settings: list[str], run: Path | None = None
) -> tuple[list[State], list[dict[str, Any]]]:
    """Each rank's state and losses after some steps of two_ranks.py."""
    out.mkdir()
    words = [str(ROOT / "tests" / "two_ranks.py"), str(out), dtype, str(steps), "0.0", *settings]
    words += [f"data.path={json.dumps(str(data))}", *(["--run", str(run)] if run else [])]
    with launch.ranks(out / "log", ranks, words) as job:
        assert job.wait(240) == [0] * ranks, job.output
    found = [safetensors.torch.load_file(out / f"rank{r}.safetensors") for r in range(ranks)]
    return found, [json.loads((out / f"rank{r}.json").read_text(encoding="utf-8")) for r in range(ranks)]


def train(run: Path, logs: Path, data: Path, ranks: int, *words: str) -> list[str]:
    """The program on some ranks, new or resumed; of each rank that loaded something a hash of what it then had."""
    new = ["demo", *SHARDED, "--data", data] if "--resume" not in words else []
    arguments = ["train", *new, *words, "--out", run, "--device", "cpu"]
    faults = [f"loaded:folder={logs}", f"joins:folder={logs}"]
    with launch.ranks(logs / "log", ranks, launch.faulty(arguments, faults)) as job:
        assert job.wait(240) == [0] * ranks, job.output
    return [file.read_text(encoding="utf-8") for file in sorted(logs.glob("rank*.txt"))]


def joins(logs: Path) -> list[int]:
    """How often each rank had joined split rows before its first step."""
    return [int(file.read_text(encoding="utf-8")) for file in sorted(logs.glob("joins-*.txt"))]


def tensors(run: Path, step: int) -> State:
    parts, _ = checkpoint.load(checkpoint.folder(run, step))
    return {f"{part}/{name}": tensor for part, found in parts.items() for name, tensor in found.items()}


def hash_of(run: Path, step: int) -> str:
    return checkpoint.state_hash(checkpoint.load(checkpoint.folder(run, step))[0])


def export_names(run: Path) -> list[str]:
    with safetensors.safe_open(run / "export" / "model.safetensors", "pt") as file:
        return list(file.keys())


def distance(a: State, b: State, floor: float = 1e-6) -> float:
    """Largest difference of any tensor above rounding level, relative to that tensor's largest value."""
    assert a.keys() == b.keys()
    floating = [(t, b[name]) for name, t in a.items() if t.is_floating_point() and t.abs().max() > floor]
    assert len(floating) > 60
    return max(((t - u).abs().max() / t.abs().max()).item() for t, u in floating)


def equal(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_two_ranks_equal_one_in_double_precision(stripes: Path, tmp_path: Path, report: Report) -> None:
    settings = [*SHARDED, GENTLE]
    (one,), (log,) = states(tmp_path / "one", 1, stripes, "float64", 20, settings)
    two, logs = states(tmp_path / "two", 2, stripes, "float64", 20, settings)
    assert equal(two[0], two[1])
    assert one[WEIGHT].shape[0] == 4
    assert distance(one, two[0]) < 1e-8
    assert logs[0]["losses"] == pytest.approx(log["losses"], rel=1e-8)
    # Over all classes, not over those of a rank; the guard decides by it, so it is equal to the bit.
    assert logs[0]["norms"] == pytest.approx(log["norms"], rel=1e-8)
    assert logs[0]["norms"] == logs[1]["norms"]
    report("sharded", "20 steps of 2 ranks against one process, fp64", injected=0, survived=0)


def test_what_two_ranks_have_saved_three_go_on_with(stripes: Path, tmp_path: Path, report: Report) -> None:
    # 4 classes on 3 ranks are blocks of 2, 1 and 1; batches of 12 can be shared by 1, 2 and 3.
    run = tmp_path / "run"
    train(run, tmp_path / "two", stripes, 2, "--max-steps", "2", *TWELVE)
    # Only a save wants other ranks' rows, and not the names and sizes that a start looks at.
    assert joins(tmp_path / "two") == [0] * 2
    saved = tensors(run, 2)
    assert saved[WEIGHT].shape == saved[MOMENTUM].shape == (4, 16)
    assert saved[MOMENTUM].any()
    loaded = train(run, tmp_path / "three", stripes, 3, *OTHER_RANKS, "--max-steps", "3")
    assert loaded == [hash_of(run, 2)] * 3
    # Weights and momentum for the digest of what was loaded, and for the hash of it here.
    assert joins(tmp_path / "three") == [4] * 3
    assert tensors(run, 3)[WEIGHT].shape == (4, 16)
    report("sharded", "saved by 2 ranks, loaded by 3", injected=1, survived=1, bits_equal=True)


def test_what_was_read_is_let_go_before_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = objectives.resolve(c.load("demo", [*SHARDED, "data.path=synthetic"]))
    with distributed.world("cpu") as world:
        data = open_dataset(config, world)
        trainer = Trainer(config, len(data.classes), world)
        named = [(part, name, t) for part, found in trainer.parts().items() for name, t in found.items()]
        shapes = trainer.part_shapes()
        assert [(part, name) for part, found in shapes.items() for name in found] == [place[:2] for place in named]
        for part, name, tensor in named:
            like = shapes[part][name]
            assert (like.shape, like.dtype, like.device.type) == (tensor.shape, tensor.dtype, "meta")
        assert preflight.checkpoint_bytes(trainer) == sum(tensor.nbytes for _, _, tensor in named)
        resume.Saving(trainer, data, tmp_path, print).save(4, last=True)
        read, alive = list[weakref.ref[Tensor]](), list[int]()
        newest_good, state_digest = checkpoint.newest_good, digests.state_digest

        def reading(*arguments: Any) -> Any:
            loaded = newest_good(*arguments)
            assert loaded is not None
            read.extend(weakref.ref(t) for part in loaded.parts.values() for t in part.values())
            return loaded

        def digesting(*arguments: Any) -> Any:
            alive.append(sum(tensor() is not None for tensor in read))
            return state_digest(*arguments)

        monkeypatch.setattr(checkpoint, "newest_good", reading)
        monkeypatch.setattr(digests, "state_digest", digesting)
        assert resume.restore(trainer, data, tmp_path)[0] == 4
        assert len(read) == len(named)
        assert alive == [0]


@pytest.mark.faults
def test_any_number_of_ranks_finishes_the_same_run(stripes: Path, tmp_path: Path, report: Report) -> None:
    train(tmp_path / "two", tmp_path / "first", stripes, 2, "--max-steps", "6", *TWELVE)
    for ranks in (1, 3):
        shutil.copytree(tmp_path / "two", tmp_path / str(ranks))
    train(tmp_path / "two", tmp_path / "then 2", stripes, 2, *OTHER_RANKS)
    for ranks in (1, 3):
        out = tmp_path / str(ranks)
        loaded = train(out, tmp_path / f"then {ranks}", stripes, ranks, *OTHER_RANKS)
        assert loaded == [hash_of(tmp_path / "two", 6)] * ranks
        # One step of single precision; later ones make the most of every rounding.
        assert distance(tensors(tmp_path / "two", 7), tensors(out, 7), floor=1e-4) < 1e-4
        status = rundir.read_status(out)
        assert (status["state"], status["step"]) == ("completed", 20)
        names = export_names(out)
        assert "conv1.weight" in names
        assert not [name for name in names if "head" in name]
    report("sharded", "a run of 2 ranks finished by 1 and by 3", injected=2, survived=2)


@pytest.mark.faults
def test_three_ranks_and_micro_batches_equal_one(stripes: Path, tmp_path: Path, report: Report) -> None:
    settings = [*SHARDED, GENTLE, "optim.batch_size=12", "optim.accumulate=2"]
    (one,), (log,) = states(tmp_path / "one", 1, stripes, "float64", 20, settings)
    # Seven steps of them by two ranks, whose blocks are others.
    states(tmp_path / "two", 2, stripes, "float64", 7, settings, run=tmp_path / "run")
    three, logs = states(tmp_path / "three", 3, stripes, "float64", 20, settings, run=tmp_path / "run")
    assert equal(three[0], three[1])
    assert equal(three[0], three[2])
    assert distance(one, three[0]) < 1e-8
    assert logs[2]["losses"] == pytest.approx(log["losses"][7:], rel=1e-8)
    report("sharded", "7 steps of 2 ranks, 13 of 3 against 20 of one process, fp64", injected=1, survived=1)


@pytest.mark.faults
def test_one_process_has_nothing_to_split(stripes: Path, tmp_path: Path, report: Report) -> None:
    (plain,), (log,) = states(tmp_path / "plain", 1, stripes, "float32", 6, SETTINGS)
    (split,), (other,) = states(tmp_path / "split", 1, stripes, "float32", 6, SHARDED)
    assert equal(plain, split)
    assert log == other
    two, logs = states(tmp_path / "two", 2, stripes, "float32", 1, SHARDED)
    # Untrained weights are the same to the bit, so the accuracies are, although the ranks share the images.
    assert logs[0]["eval"] == logs[1]["eval"] == log["eval"]
    assert log["eval"]["eval/images"] == 16
    assert logs[0]["losses"][0] == pytest.approx(log["losses"][0], rel=1e-5)
    assert equal(two[0], two[1])
    report("sharded", "one process with and without the option", injected=0, survived=0, bits_equal=True)


@pytest.mark.faults
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_bad_gradient_in_one_block_is_everybodys(
    stripes: Path, tmp_path: Path, report: Report, precision: str
) -> None:
    fault = "bad:where=grad,name=objective.head.weight,value=inf,rank=1,step=6"
    words = [*SHARDED, f"optim.precision={precision}", "run.log_every=1"]
    seen = f"watch:folder={tmp_path / 'seen'},step=6"
    arguments = ["train", "demo", *words, "--data", stripes, "--out", tmp_path / "run", "--device", "cpu"]
    with launch.ranks(tmp_path / "log", 2, launch.faulty(arguments, [fault, seen], tmp_path / "hashes")) as job:
        codes = job.wait(240)
    ranks = [json.loads((tmp_path / "seen" / f"6-rank{r}.json").read_text(encoding="utf-8")) for r in range(2)]
    for rank in ranks:
        assert all(rank["before"][kind] == rank["after"][kind] for kind in ("weights", "momentum", "copies"))
    # Each has classes of its own, and the same opinion of the step.
    assert ranks[0]["after"]["weights"] != ranks[1]["after"]["weights"]
    assert ranks[0]["after"]["guard"] == ranks[1]["after"]["guard"]
    if precision == "fp16":
        assert codes == [0, 0], job.output
        assert ranks[0]["after"]["guard"]["scale"] == ranks[0]["before"]["guard"]["scale"] / 2
        assert len({file.read_text(encoding="utf-8") for file in (tmp_path / "hashes").iterdir()}) == 1
    else:
        assert codes == [3, 3], job.output
        assert "got NaN or inf at step 6; the last good checkpoint is step 4" in job.output
    report("sharded", f"inf in one rank's block, {precision}", injected=1, survived=1, bits_equal=True)


@pytest.mark.faults
def test_fewer_classes_than_ranks_are_refused(stripes: Path, tmp_path: Path, report: Report) -> None:
    for split in ("train", "val"):
        for label in (0, 1):
            shutil.copytree(stripes / split / f"class-{label}", tmp_path / "data" / split / f"class-{label}")
    data = ["--data", tmp_path / "data", "--out", tmp_path / "run", "--device", "cpu"]
    with launch.ranks(tmp_path / "log", 3, launch.faulty(["train", "demo", *SHARDED, *TWELVE, *data])) as job:
        assert job.wait(60) == [1, 1, 1]
    wanted = "objective.sharded=true must have at least one class for each of the 3 ranks, got 2 classes"
    assert f"{wanted}; set objective.sharded=false" in job.output
    report("sharded", "more ranks than classes", injected=1, survived=1)
