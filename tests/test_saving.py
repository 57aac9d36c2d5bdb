"""What is stored is the state at the call, whatever training and the disk do; what is loaded is that, or nothing."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import SETTINGS, environment
from test_checkpoint import reseal

from fastrex import checkpoint, distributed, export, manifest, objectives
from fastrex import config as c
from fastrex.data.dataset import Dataset, open_dataset
from fastrex.errors import FastrexError
from fastrex.resume import Saving, restore
from fastrex.step import Trainer


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[Trainer, Dataset]]:
    """A trainer whose every tensor differs from what a fresh one has."""
    config = objectives.resolve(c.load("demo", [*SETTINGS, "data.path=synthetic"]))
    with distributed.world("cpu") as world:
        data = open_dataset(config, world)
        trainer = Trainer(config, len(data.classes), world)
        disturb(trainer)
        yield trainer, data


def disturb(trainer: Trainer) -> None:
    with torch.no_grad():
        for tensors in trainer.parts().values():
            for name, tensor in tensors.items():
                tensor.add_(1 if name.endswith("labels") else 3).mul_(1 if name.endswith("labels") else 2)
                tensor.remainder_(10)


def with_options(running: tuple[Trainer, Dataset], run: Path, **options: Any) -> tuple[Saving, list[str]]:
    trainer, data = running
    said: list[str] = []
    saving = Saving(trainer, data, run, said.append)
    saving.options = dataclasses.replace(trainer.config.checkpoint, **options)
    return saving, said


class SlowDisk:
    """Writing waits until it is told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        original = safetensors.torch.save_file

        def save_file(*arguments: Any, **named: Any) -> None:
            self.begun.set()
            assert self.go_on.wait(60)
            original(*arguments, **named)

        monkeypatch.setattr(safetensors.torch, "save_file", save_file)


def wait_for(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_stored_is_the_state_at_the_call(
    running: tuple[Trainer, Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _ = running
    saving, _ = with_options(running, tmp_path)
    disk = SlowDisk(monkeypatch)
    before = checkpoint.state_hash(trainer.parts())
    saving.save(1)
    assert disk.begun.wait(60)
    disturb(trainer)
    after = checkpoint.state_hash(trainer.parts())
    assert saving.poll() is None
    assert checkpoint.steps(tmp_path) == []
    # The second save waits for the first, and stores what holds when it is its turn.
    second = threading.Thread(target=saving.save, args=(2,))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    disk.go_on.set()
    second.join(60)
    saving.close()
    assert saving.poll() == 2
    assert saving.poll() is None
    stored = [checkpoint.state_hash(checkpoint.load(checkpoint.folder(tmp_path, step))[0]) for step in (1, 2)]
    assert stored == [before, after] != [after, before]


def test_a_save_that_hangs_costs_checkpoints_and_no_stall(
    running: tuple[Trainer, Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving, said = with_options(running, tmp_path)
    monkeypatch.setattr("fastrex.resume.PATIENCE_S", 0.05)
    disk = SlowDisk(monkeypatch)
    saving.save(1)
    assert saving.busy()
    for step in (2, 3):
        saving.save(step)
    assert said == [f"no checkpoint of step {n}: that of step 1 is still being written" for n in (2, 3)]
    disk.go_on.set()
    # What must be on the disk is waited for.
    saving.save(4, last=True)
    assert not saving.busy()
    assert checkpoint.steps(tmp_path) == [1, 4]


@pytest.mark.parametrize("background", [True, False])
def test_what_follows_on_the_last_checkpoint_is_done_once_it_is_there(
    running: tuple[Trainer, Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    saving, _ = with_options(running, tmp_path)
    if background:
        saving.save(2)
    seen = []
    saving.save(2, last=True, then=lambda: seen.append((checkpoint.steps(tmp_path), saving.busy() or background)))
    assert seen == [([2], True)]
    full(monkeypatch)
    with pytest.raises(checkpoint.WriteFailed):
        saving.save(3, last=True, then=lambda: seen.append(([3], True)))
    assert len(seen) == 1
    assert not saving.busy()


def test_poll_tells_of_a_complete_checkpoint_once(running: tuple[Trainer, Dataset], tmp_path: Path) -> None:
    saving, said = with_options(running, tmp_path)
    saving.save(3)
    seen: list[int] = []
    wait_for(lambda: seen.extend(filter(None, [saving.poll()])) or seen)
    assert seen == [3] == checkpoint.steps(tmp_path)
    # The end of the run wants what is there already: nothing is written again.
    stamp = (checkpoint.folder(tmp_path, 3) / "state.json").stat().st_mtime_ns
    saving.save(3, last=True)
    assert (checkpoint.folder(tmp_path, 3) / "state.json").stat().st_mtime_ns == stamp
    assert saving.poll() is None
    assert said == []


@pytest.mark.parametrize(("options", "last"), [({"background": False}, False), ({}, True)])
def test_what_must_be_on_the_disk_is_there_at_once(
    running: tuple[Trainer, Dataset], tmp_path: Path, options: dict[str, Any], last: bool
) -> None:
    saving, _ = with_options(running, tmp_path, **options)
    saving.save(5, last=last)
    assert checkpoint.steps(tmp_path) == [5]
    assert saving.poll() == 5


def full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "free_bytes", lambda path: 0)


def test_a_failure_in_the_background_is_said_and_the_next_attempt_succeeds(
    running: tuple[Trainer, Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving, said = with_options(running, tmp_path)
    with monkeypatch.context() as patch:
        full(patch)
        saving.save(1)
        wait_for(lambda: saving.poll() or said)
    assert len(said) == 1
    assert "step-00000001 could not be written (No space left on device; it needs" in said[0]
    assert said[0].endswith("training goes on without it, the next checkpoint is tried as ever")
    saving.save(2)
    saving.close()
    assert saving.poll() == 2
    assert checkpoint.steps(tmp_path) == [2]


def test_a_failure_that_nobody_polled_is_said_at_the_end(
    running: tuple[Trainer, Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for policy in ("continue", "stop"):
        saving, said = with_options(running, tmp_path, on_failure=policy)
        with monkeypatch.context() as patch:
            full(patch)
            saving.save(1)
            saving.close()
        assert len(said) == 1
        assert "could not be written" in said[0]


@pytest.mark.parametrize("how", ["poll", "save", "synchronous"])
def test_a_failure_stops_the_run_where_that_is_asked_for(
    running: tuple[Trainer, Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    saving, said = with_options(running, tmp_path, on_failure="stop", background=how != "synchronous")
    full(monkeypatch)

    def go_on() -> None:
        saving.save(1)
        wait_for(saving.poll if how == "poll" else lambda: saving.save(2))

    with pytest.raises(checkpoint.WriteFailed, match="step-00000001 could not be written"):
        go_on()
    assert said == []


def test_the_last_checkpoint_must_succeed_under_any_policy(
    running: tuple[Trainer, Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving, _ = with_options(running, tmp_path)
    with monkeypatch.context() as patch:
        full(patch)
        with pytest.raises(checkpoint.WriteFailed):
            saving.save(4, last=True)
        saving.save(6)
        wait_for(lambda: not saving._thread or not saving._thread.is_alive())
    # A step whose background write failed is tried again when it turns out to be the last.
    saving.save(6, last=True)
    assert checkpoint.steps(tmp_path) == [6]


def test_an_error_of_the_program_is_never_taken_for_a_full_disk(
    running: tuple[Trainer, Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving, _ = with_options(running, tmp_path)
    monkeypatch.setattr(checkpoint, "sealed", lambda state: 1 / 0)
    saving.save(1)
    with pytest.raises(ZeroDivisionError):
        wait_for(saving.poll)


EXIT = """
import sys, time
from pathlib import Path
import safetensors.torch
from fastrex import config as c, distributed, objectives
from fastrex.data.dataset import open_dataset
from fastrex.resume import Saving
from fastrex.step import Trainer

original = safetensors.torch.save_file
def save_file(*arguments, **named):
    time.sleep(0.3)
    original(*arguments, **named)
safetensors.torch.save_file = save_file
config = objectives.resolve(c.load("demo", sys.argv[2:]))
with distributed.world("cpu") as world:
    data = open_dataset(config, world)
    Saving(Trainer(config, len(data.classes), world), data, Path(sys.argv[1]), print).save(1)
"""


def test_an_interpreter_that_ends_waits_for_the_write(tmp_path: Path) -> None:
    command = [sys.executable, "-c", EXIT, str(tmp_path), *SETTINGS, "data.path=synthetic"]
    subprocess.run(command, env=environment(), check=True, timeout=120)
    assert checkpoint.newest_good(tmp_path) is not None


@pytest.fixture
def saved(running: tuple[Trainer, Dataset], tmp_path: Path) -> Path:
    saving, _ = with_options(running, tmp_path)
    saving.save(4, last=True)
    return tmp_path


def other_tensors(path: Path, stem: str, change: Callable[[dict[str, torch.Tensor]], object], **facts: Any) -> None:
    """Write a file of a checkpoint anew, with checksums that hold."""
    file = path / f"{stem}.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file)
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    state["files"][file.name] = checkpoint._seal(file)
    reseal(path, files=state["files"], **facts)


# One tensor of every kind of state.
KINDS = [
    ("model", "encoder.conv1.weight"),
    ("model", "encoder.bn1.running_mean"),
    ("model", "encoder.bn1.num_batches_tracked"),
    ("model", "projector.layers.0.weight"),
    ("ema", "encoder.conv1.weight"),
    ("ema", "encoder.bn1.running_var"),
    ("bank", "means.features"),
    ("bank", "means.labels"),
    ("bank", "means.pointer"),
    ("optimizer", "momentum.model.encoder.conv1.weight"),
    ("optimizer", "guard.scale"),
    ("optimizer", "guard.skipped"),
]


def refused(running: tuple[Trainer, Dataset], run: Path, match: str, **options: Any) -> None:
    trainer, data = running
    before = checkpoint.state_hash(trainer.parts())
    with pytest.raises(FastrexError, match=match):
        restore(trainer, data, run, **options)
    assert checkpoint.state_hash(trainer.parts()) == before, "something was loaded"
    # Refused is not damaged.
    assert checkpoint.steps(run) == [4]


def test_there_are_no_other_kinds(running: tuple[Trainer, Dataset]) -> None:
    trainer, _ = running
    names = {(stem, name) for stem, tensors in trainer.parts().items() for name in tensors}
    assert names >= set(KINDS)
    assert {name for stem, name in names if stem == "bank"} == {name for stem, name in KINDS if stem == "bank"}


@pytest.mark.parametrize(("stem", "name"), KINDS)
def test_each_kind_of_state_is_missed_by_name(
    running: tuple[Trainer, Dataset], saved: Path, stem: str, name: str
) -> None:
    path = checkpoint.folder(saved, 4)
    way_out = f".*--init-from {saved}"
    whole = safetensors.torch.load_file(path / f"{stem}.safetensors")[name]
    other_tensors(path, stem, lambda tensors: tensors.pop(name))
    refused(running, saved, f"step-00000004 lacks {stem} tensor {name!r}{way_out}")
    other_tensors(path, stem, lambda tensors: tensors.update({name + "x": whole}))
    refused(running, saved, f"lacks {stem} tensor {name!r}")
    other_tensors(path, stem, lambda tensors: tensors.update({name: whole}))
    refused(running, saved, f"has a foreign {stem} tensor '{name}x'{way_out}")
    other_tensors(path, stem, lambda tensors: tensors.pop(name + "x"))
    other_tensors(path, stem, lambda tensors: tensors.update({name: torch.stack([whole, whole])}))
    refused(running, saved, rf"{stem} tensor {name!r} of step-00000004 must be \w+ \[.*\], got \w+ \[2.*{way_out}")
    wrong = whole.double() if whole.dtype == torch.float32 else whole.float()
    other_tensors(path, stem, lambda tensors: tensors.update({name: wrong}))
    refused(running, saved, f"{stem} tensor {name!r} of step-00000004 must be .*, got float")
    # The right shape and the right checksums, but not the values that were saved.
    other_tensors(path, stem, lambda tensors: tensors.update({name: whole + 1}))
    trainer, data = running
    with pytest.raises(FastrexError, match="what was loaded from step 4 must be what was saved, digest"):
        restore(trainer, data, saved)
    other_tensors(path, stem, lambda tensors: tensors.update({name: whole}))
    assert restore(trainer, data, saved) == (4, ["resumed from step-00000004"])


@pytest.mark.parametrize(("name", "value", "end"), [("means.pointer", 64, 64), ("means.labels", -1, 10)])
def test_a_bank_that_points_outside_is_refused_by_name(
    running: tuple[Trainer, Dataset], saved: Path, name: str, value: int, end: int
) -> None:
    path = checkpoint.folder(saved, 4)
    other_tensors(path, "bank", lambda tensors: tensors[name][-1:].fill_(value))
    match = rf"bank tensor {name!r} must be in \[0, {end}\d*\), got {value};"
    refused(running, saved, match)
    # An evaluation loads without a resume.
    before = checkpoint.state_hash(running[0].parts())
    parts, _ = checkpoint.load(path)
    with torch.no_grad():
        parts["model"]["encoder.conv1.weight"] += 1
    with pytest.raises(FastrexError, match=match):
        running[0].load(parts)
    assert checkpoint.state_hash(running[0].parts()) == before


def test_a_whole_file_less_or_more_is_refused_by_name(running: tuple[Trainer, Dataset], saved: Path) -> None:
    path = checkpoint.folder(saved, 4)
    files = json.loads((path / "state.json").read_text(encoding="utf-8"))["files"]
    for name, stem in (("ema.safetensors", "ema"), ("bank.safetensors", "bank")):
        content = (path / name).read_bytes()
        (path / name).unlink()
        reseal(path, files={n: fact for n, fact in files.items() if n != name})
        refused(running, saved, f"step-00000004 lacks part {stem!r}")
        (path / name).write_bytes(content)
    (path / "more.safetensors").write_bytes(content)
    reseal(path, files={**files, "more.safetensors": files[name]})
    refused(running, saved, "step-00000004 has a foreign part 'more'")


@pytest.mark.parametrize("key", manifest.KEYS)
def test_each_fact_is_missed_by_name(running: tuple[Trainer, Dataset], saved: Path, key: str) -> None:
    reseal(checkpoint.folder(saved, 4), **{key: None})
    refused(running, saved, rf"state\.json of step 4 must hold '{key}'.*--init-from {saved}")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"seed": 7}, "the checkpoint's seed must be the run's, 0, got 7"),
        ({"schedule": {"peak": 1.0}}, "the checkpoint's schedule must be the run's, {'peak': .*got {'peak': 1.0}"),
        ({"classes": ["a", "b"]}, r"the checkpoint's classes must be the run's, .*got \['a', 'b'\]"),
        ({"data": "0" * 64}, "the images must be those of the run"),
        ({"config": ""}, "another configuration"),
        ({"config": "[data]\nglobal_size = 64\n"}, "another configuration: data.global_size: 64 -> 32;"),
        (
            {"plan": 0},
            "batches must be those of plan version 1, got 0, written by fastrex .*; finish the run with that",
        ),
        ({"format": 99}, r"checkpoints must have format 1, got 99, written by fastrex .*; finish .*--init-from"),
        ({"world_size": 2}, "number of ranks must be the run's, 2, got 1; start 2, or pass --allow-world-size-change"),
        ({"digest": "0" * 16}, "what was loaded from step 4 must be what was saved, digest 0000000000000000, got"),
    ],
)
def test_each_foreign_fact_is_refused(
    running: tuple[Trainer, Dataset], saved: Path, changes: dict[str, Any], match: str
) -> None:
    reseal(checkpoint.folder(saved, 4), **changes)
    refused(running, saved, match)


def test_settings_that_change_no_bit_may_differ(running: tuple[Trainer, Dataset], saved: Path) -> None:
    trainer, data = running
    text = c.to_toml(c.override(trainer.config, ["run.log_every=9", "data.path=/elsewhere", "checkpoint.keep_last=7"]))
    reseal(checkpoint.folder(saved, 4), config=text)
    assert restore(trainer, data, saved)[0] == 4


def test_another_number_of_ranks_is_said_where_it_is_allowed(running: tuple[Trainer, Dataset], saved: Path) -> None:
    reseal(checkpoint.folder(saved, 4), world_size=2)
    _, lines = restore(*running, saved, allow_world_size_change=True)
    assert "resuming a run of 2 ranks with 1: same batches, other rounding" in lines


def test_other_versions_are_said(running: tuple[Trainer, Dataset], saved: Path) -> None:
    then = {**manifest.versions(), "torch": "2.11.0", "dali": "1.50"}
    reseal(checkpoint.folder(saved, 4), versions=then)
    step, lines = restore(*running, saved)
    assert step == 4
    assert [line[:60] for line in lines[:2]] == [
        f"the checkpoint was written with torch 2.11.0, this is {torch.__version__}: bits"[:60],
        f"the checkpoint was written with dali 1.50, this is {manifest.versions()['dali']}: bits may"[:60],
    ]


def test_a_checkpoint_of_before_is_refused_with_a_way_out_that_works(
    running: tuple[Trainer, Dataset], saved: Path
) -> None:
    path = checkpoint.folder(saved, 4)
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    before = {k: v for k, v in state.items() if k not in ("checksum", "digest", "plan", "versions")}
    (path / "state.json").write_text(json.dumps({**before, "fastrex": "0.1", "torch": "2.12.0"}), encoding="utf-8")
    refused(running, saved, rf"step 4 must hold 'plan', it was written by fastrex 0\.1; .*--init-from {saved}")
    (saved / "config.toml").write_text(c.to_toml(running[0].config), encoding="utf-8")
    weights = export.load_source(saved).state["conv1.weight"]
    assert torch.equal(weights, running[0].model.encoder.state_dict()["conv1.weight"])


def test_all_damaged_is_an_error_and_nothing_at_all_a_beginning(
    running: tuple[Trainer, Dataset], saved: Path, tmp_path: Path
) -> None:
    (checkpoint.folder(saved, 4) / "model.safetensors").unlink()
    refused(running, saved, "must hold a good checkpoint, all are damaged")
    assert restore(*running, tmp_path / "new") == (0, ["no checkpoint yet: starting from step 0"])
