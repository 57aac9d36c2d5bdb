"""Checkpoints under accidents: kills at every point of a save, damage of every kind, full disks, ranks that differ,
state that is foreign or left out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import launch
import pytest
import torch
from conftest import SETTINGS, environment
from test_checkpoint import damage, good, reseal, write
from test_saving import other_tensors

from fastrex import checkpoint, digests, rundir, trainer
from fastrex import config as c
from fastrex.errors import FastrexError

Report = Callable[..., None]
CPU = ["--device", "cpu"]


def driver(code: str, run: Path, *words: str) -> list[list[Any]]:
    """Run ``code``, which forks its victims: they need not import torch again. Its lines of JSON."""
    command = [sys.executable, "-c", code, str(run), *words]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


KILLS = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from fastrex import checkpoint

torch.set_num_threads(1)
run, random_ = Path(sys.argv[1]), random.Random(0)
for kill in range(25):
    first = (checkpoint.steps(run) or [0])[-1] + 1
    victim = os.fork()
    if not victim:
        step = first
        while True:
            parts = {"model": {"w": torch.full((200_000,), float(step))}, "bank": {"x": torch.full((9,), float(step))}}
            checkpoint.save(run, step, parts, {}, keep_last=2)
            step += 1
    while (checkpoint.steps(run) or [0])[-1] < first:
        time.sleep(0.001)
    time.sleep(random_.uniform(0, 0.03))
    os.kill(victim, signal.SIGKILL)
    os.waitpid(victim, 0)
    temps = len(list((run / "checkpoints").glob(".tmp-step-*")))
    newest = checkpoint.steps(run)[-1]
    found = checkpoint.newest_good(run)
    values = [t.unique().tolist() for tensors in found.parts.values() for t in tensors.values()] if found else []
    checkpoint.sweep(run)
    print(json.dumps([newest, found and found.step, values, temps, len(list((run / "checkpoints").glob(".*")))]))
"""


def test_t08_kills_at_any_moment_leave_the_newest_checkpoint_whole(tmp_path: Path, report: Report) -> None:
    lines = driver(KILLS, tmp_path)
    assert len(lines) == 25
    for newest, found, values, temps, left in lines:
        assert found == newest
        assert values == [[newest], [newest]]
        assert temps <= 1
        assert left == 0
    assert any(temps for _, _, _, temps, _ in lines), "no kill came in the middle of a save"
    report("T08", "SIGKILL at random moments of a loop of saves", injected=25, survived=25)


# Where a save is killed, and whether its checkpoint is there afterwards.
POINTS = {
    "before the temporary folder": False,
    "in file 1": False,
    "in file 2": False,
    "before the manifest": False,
    "in the manifest": False,
    "before the rename": False,
    "before the folder's flush": True,
    "before the oldest is removed": True,
    "while the oldest is removed": True,
}
POINT = """
import json, os, shutil, signal, sys
from pathlib import Path
import safetensors.torch, torch
from fastrex import checkpoint, files

run = Path(sys.argv[1])
torch.set_num_threads(1)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def patch(owner, name, before):
    original = getattr(owner, name)
    def patched(*arguments, **named):
        before(original, *arguments, **named)
        return original(*arguments, **named)
    setattr(owner, name, patched)

def cut(path):
    with open(path, "rb+") as file:
        file.truncate(path.stat().st_size // 2)
    die()

def arm(point):
    if point == "before the temporary folder":
        patch(Path, "mkdir", lambda original, self, *rest, **named: self.name.startswith(".tmp-") and die())
    elif point in ("in file 1", "in file 2"):
        seen = []
        def write(original, tensors, path):
            seen.append(path)
            if len(seen) == int(point[-1]):
                original(tensors, path)
                cut(path)
        patch(safetensors.torch, "save_file", write)
    elif point == "before the manifest":
        patch(Path, "write_text", lambda original, self, *rest, **named: die())
    elif point == "in the manifest":
        patch(files, "sync", lambda original, path: path.name == "state.json" and cut(path))
    elif point == "before the rename":
        patch(Path, "rename", lambda original, self, target: target.name.startswith("step-") and die())
    elif point == "before the folder's flush":
        patch(files, "sync", lambda original, path: path.name == "checkpoints" and die())
    elif point == "before the oldest is removed":
        patch(Path, "rename", lambda original, self, target: target.name.startswith(".tmp-old-") and die())
    elif point == "while the oldest is removed":
        def remove(original, path, *rest, **named):
            if path.name.startswith(".tmp-old-"):
                next(path.glob("*.safetensors")).unlink()
                die()
        patch(shutil, "rmtree", remove)

def save(where, step):
    parts = {name: {"w": torch.full((1000,), float(step))} for name in ("model", "bank")}
    checkpoint.save(where, step, parts, {}, keep_last=2)

for number, point in enumerate(sys.argv[2:]):
    where = run / str(number)
    save(where, 1)
    save(where, 2)
    victim = os.fork()
    if not victim:
        arm(point)
        save(where, 3)
        os._exit(0)
    code = os.waitpid(victim, 0)[1]
    found = checkpoint.newest_good(where)
    values = found.parts["model"]["w"].unique().tolist()
    checkpoint.sweep(where)  # as a resumed run does
    save(where, 3)
    again = checkpoint.newest_good(where, print)
    left = sorted(p.name for p in (where / "checkpoints").glob(".*"))
    print(json.dumps([point, code, found.step, values, again.step, left]))
"""


@pytest.mark.faults
def test_t09_a_kill_at_each_point_of_a_save(tmp_path: Path, report: Report) -> None:
    lines = driver(POINT, tmp_path, *POINTS)
    assert [line[0] for line in lines] == list(POINTS)
    for point, status, step, values, again, left in lines:
        assert status == 9, f"{point}: the save came to its end"
        assert step == (3 if POINTS[point] else 2), point
        assert values == [step]
        assert again == 3
        assert left == [], point
    report("T09", "SIGKILL at each point of a save", injected=len(POINTS), survived=len(POINTS))


def train(log: Path, *arguments: str | Path, faults: list[str] | None = None, code: int | None = 0) -> str:
    """A real run to its end; what it printed."""
    with launch.one(log, launch.faulty(["train", *arguments, *CPU], faults or [])) as job:
        (got,) = job.wait(180)
        assert got == code if code is not None else got != 0, job.output
        return job.output


def new(data: Path, out: Path, *more: str) -> list[str | Path]:
    return ["demo", *SETTINGS, "checkpoint.keep_last=9", "--data", data, "--out", out, *more]


def stored_hash(run: Path, step: int) -> str:
    return checkpoint.state_hash(checkpoint.load(checkpoint.folder(run, step))[0])


def configuration(data: Path) -> c.Config:
    return c.load("demo", [*SETTINGS, "checkpoint.keep_last=9", f"data.path={json.dumps(str(data))}"])


@pytest.fixture(scope="module")
def eight(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run stopped after 8 of 16 steps, with checkpoints of steps 4 and 8."""
    return trainer.train(
        configuration(stripes), out=tmp_path_factory.mktemp("eight") / "run", max_steps=8, device="cpu"
    ).out


@pytest.fixture(scope="module")
def sixteen(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, never stopped."""
    return trainer.train(configuration(stripes), out=tmp_path_factory.mktemp("sixteen") / "run", device="cpu").out


@pytest.fixture
def run(eight: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(eight, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.faults
@pytest.mark.parametrize(
    "how", ["cut file", "flipped bit", "missing file", "empty manifest", "wrong sha256", "extra file"]
)
def test_t10_a_damaged_newest_checkpoint_costs_one_interval_and_no_bit(
    run: Path, sixteen: Path, how: str, report: Report
) -> None:
    damage(checkpoint.folder(run, 8), how)
    trainer.train(None, out=run, resume="must", device="cpu")
    said = (run / "train.log").read_text(encoding="utf-8")
    assert "set aside as bad.step-00000008, step 4 is used" in said
    assert "resumed from step-00000004" in said
    assert checkpoint.steps(run) == [4, 8, 12, 16]
    for step in (8, 16):
        assert stored_hash(run, step) == stored_hash(sixteen, step)
    report("T10", f"newest checkpoint damaged: {how}", injected=1, survived=1, bits_equal=True)


@pytest.mark.faults
def test_t11_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again(
    run: Path, tmp_path: Path, report: Report
) -> None:
    for step in (4, 8):
        damage(checkpoint.folder(run, step), "flipped bit")
    said = train(tmp_path / "log", "--out", run, "--resume", "must", code=1)
    assert "must hold a good checkpoint, all are damaged" in said
    assert "Traceback" not in said
    with pytest.raises(FastrexError, match="must hold a good checkpoint, all are damaged"):
        trainer.train(None, out=run, resume="auto", device="cpu")
    assert checkpoint.steps(run) == [4, 8]
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert max(steps) == 8
    assert rundir.read_status(run)["state"] == "failed"
    report("T11", "all checkpoints damaged, --resume must and auto", injected=2, survived=2)


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """What ``folder`` holds, on a file system of ``size`` bytes."""
    aside = folder.with_name("aside")
    shutil.copytree(folder, aside)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        shutil.copytree(aside, folder, dirs_exist_ok=True)
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def size_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


@pytest.mark.faults
@pytest.mark.parametrize("asked", [True, False], ids=["asked-before", "met-while-writing"])
def test_t12_a_full_file_system_keeps_what_was_there(
    tmp_path: Path, asked: bool, monkeypatch: pytest.MonkeyPatch, report: Report
) -> None:
    path = tmp_path / "run"
    write(path, 1)
    if not asked:
        # Others fill the disk between the look at it and the write.
        monkeypatch.setattr(checkpoint, "free_bytes", lambda path: 1 << 40)
    big = {"model": {"w": torch.zeros(500_000)}, "bank": {"w": torch.zeros(500_000)}}
    with small_disk(path / "checkpoints", 3 << 20):
        with pytest.raises(
            checkpoint.WriteFailed, match=r"step-00000002 could not.*[Nn]o space.*it needs 4000000 bytes"
        ):
            checkpoint.save(path, 2, big, {}, keep_last=1)
        assert sorted(p.name for p in (path / "checkpoints").iterdir()) == ["step-00000001"]
        assert good(path) == 1
        # It fits when it is smaller: nothing of the attempt takes room.
        big.pop("bank")
        checkpoint.save(path, 2, big, {}, keep_last=1)
        assert checkpoint.steps(path) == [2]
    report("T12", f"full file system, {'asked before' if asked else 'met while writing'}", injected=1, survived=1)


@pytest.mark.faults
def test_t12_a_run_on_a_full_disk_goes_on_and_saves_when_there_is_room(
    run: Path, sixteen: Path, tmp_path: Path, report: Report
) -> None:
    """Steps 9 to 11 save to a full disk, then it is cleared. The real thing with root, else a limit on file sizes."""
    folder, ballast = run / "checkpoints", run / "checkpoints" / "ballast"
    arguments = ["train", "--out", run, "--resume", "must", "checkpoint.every_steps=1", "checkpoint.keep_last=2", *CPU]
    words = launch.faulty(arguments, ["stall:step=11,seconds=8,once=" + str(tmp_path / "stalled")])
    with contextlib.ExitStack() as closing:
        limited = os.geteuid() != 0
        if not limited:
            closing.enter_context(small_disk(folder, 4 * size_of(checkpoint.folder(run, 8)) + (4 << 20)))
            with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(bytes(4096)):
                    pass
        job = closing.enter_context(launch.one(tmp_path / "log", words))
        if limited:
            resource.prlimit(job.processes[0].pid, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        job.until(lambda: (tmp_path / "stalled").exists())
        ballast.unlink(missing_ok=True)
        if limited:
            resource.prlimit(job.processes[0].pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        assert job.wait(180) == [0], job.output
        failed = [line for line in job.output.splitlines() if "could not be written" in line]
        assert {f"step-{step:08d}" for step in (9, 10)} <= {
            word for line in failed for word in line.split("/")[-1].split()
        }
        assert all("bytes" in line and "training goes on" in line for line in failed)
        assert checkpoint.steps(run)[-2:] == [15, 16]
        assert not list(folder.glob(".tmp-*"))
        assert stored_hash(run, 16) == stored_hash(sixteen, 16)
    report(
        "T12",
        "a run meets a full disk, which is cleared later",
        injected=len(failed),
        survived=len(failed),
        bits_equal=True,
    )


@pytest.mark.faults
def test_t12_a_run_that_shall_stop_on_a_full_disk_stops(run: Path, tmp_path: Path, report: Report) -> None:
    words = ["--out", run, "--resume", "must", "checkpoint.on_failure=stop"]
    said = train(tmp_path / "log", *words, faults=["full:"], code=1)
    assert "step-00000012 could not be written (No space left on device; it needs" in said.splitlines()[-1]
    assert checkpoint.steps(run) == [4, 8]
    assert rundir.read_status(run)["state"] == "failed"
    report("T12", "full disk with checkpoint.on_failure=stop", injected=1, survived=1)


@pytest.mark.faults
def test_t12_the_last_checkpoint_fails_on_all_ranks(stripes: Path, tmp_path: Path, report: Report) -> None:
    words = launch.faulty(["train", *new(stripes, tmp_path / "run", "--max-steps", "2"), *CPU], ["full:rank=0"])
    with launch.ranks(tmp_path / "log", 2, words) as job:
        assert job.wait(120) == [1, 1]
        for rank in (0, 1):
            error = next(line for line in job.output.splitlines() if f"error [rank {rank}]" in line)
            assert "step-00000002 could not be written (No space left on device; it needs" in error
    report("T12", "no room for the last checkpoint, 2 ranks", injected=1, survived=1)


@pytest.mark.faults
def test_ranks_that_differ_are_named_and_nothing_of_them_is_stored(
    stripes: Path, tmp_path: Path, report: Report
) -> None:
    out = tmp_path / "run"
    words = launch.faulty(["train", *new(stripes, out), *CPU], ["nudge:rank=1,step=5"])
    with launch.ranks(tmp_path / "log", 2, words) as job:
        codes = job.wait(120)
        assert codes == [1, 1], job.output
        expected = "all ranks must hold the same state at step 8, but rank 1 differs from rank 0 in "
        assert job.output.count(expected) == 2
        assert re.search(expected + r"(ema/|model/|optimizer/momentum\.model\.)encoder\.conv1\.weight", job.output)
    assert checkpoint.steps(out) == [4]
    assert good(out) == 4
    report("T05", "a flipped bit on one rank", injected=1, survived=1)


@pytest.fixture(scope="module")
def by_two(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks, stopped after 4 steps."""
    folder = tmp_path_factory.mktemp("by-two")
    words = launch.faulty(["train", *new(stripes, folder / "run", "--max-steps", "4"), *CPU])
    with launch.ranks(folder / "log", 2, words) as job:
        assert job.wait(120) == [0, 0], job.output
    return folder / "run"


@pytest.mark.faults
def test_only_rank_0_reads_the_checkpoint_and_all_hold_it(by_two: Path, tmp_path: Path, report: Report) -> None:
    run = tmp_path / "run"
    shutil.copytree(by_two, run)
    hashes = tmp_path / "hashes"
    arguments = ["train", "--out", run, "--resume", "must", "--max-steps", "6", *CPU]
    with launch.ranks(tmp_path / "log", 2, launch.faulty(arguments, ["blind:rank=1"], hashes=hashes)) as job:
        assert job.wait(120) == [0, 0], job.output
    assert (hashes / "rank0.txt").read_text() == (hashes / "rank1.txt").read_text()
    report("T05", "a rank that cannot read the checkpoints", injected=1, survived=1, bits_equal=True)


@pytest.mark.faults
def test_t07_another_number_of_ranks_is_refused_unless_allowed(by_two: Path, tmp_path: Path, report: Report) -> None:
    run = tmp_path / "run"
    shutil.copytree(by_two, run)
    resume = ["--out", run, "--resume", "must"]
    said = train(tmp_path / "refused", *resume, code=1)
    assert "the number of ranks must be the run's, 2, got 1; start 2, or pass --allow-world-size-change" in said
    assert checkpoint.steps(run) == [4]
    said = train(tmp_path / "allowed", *resume, "--allow-world-size-change", "--max-steps", "5")
    assert "resuming a run of 2 ranks with 1: same batches, other rounding" in said
    assert checkpoint.steps(run) == [4, 5]
    # And back: the checkpoint of step 5 is one rank's.
    words = launch.faulty(["train", *resume, "--max-steps", "6", *CPU])
    with launch.ranks(tmp_path / "two", 2, words) as job:
        assert job.wait(120) == [1, 1], job.output
        assert job.output.count("the run's, 1, got 2") == 2
    report("T07", "another number of ranks", injected=2, survived=2)


@pytest.mark.faults
def test_t07_other_settings_are_refused_by_name(run: Path, report: Report) -> None:
    changes = {
        "optim.batch_size=8": "optim.batch_size: 16 -> 8",
        "run.seed=1": "run.seed: 0 -> 1",
        "data.local_crops=3": "data.local_crops: 2 -> 3",
        "optim.lr=0.3": "optim.lr: ",
    }
    for setting, name in changes.items():
        other = c.override(c.read(run / "config.toml"), [setting])
        with pytest.raises(FastrexError, match=f"must continue the same run, but {run} differs in {name}"):
            trainer.train(other, out=run, resume="must", device="cpu")
    assert checkpoint.steps(run) == [4, 8]
    report("T07", "resumed with other settings", injected=len(changes), survived=len(changes))


@pytest.mark.faults
def test_t41_a_checkpoint_of_an_earlier_version_names_it_and_the_way_out_works(
    run: Path, tmp_path: Path, report: Report
) -> None:
    for step in (4, 8):
        path = checkpoint.folder(run, step) / "state.json"
        state = json.loads(path.read_text(encoding="utf-8"))
        old = {k: v for k, v in state.items() if k not in ("checksum", "digest", "plan", "versions")}
        path.write_text(json.dumps({**old, "fastrex": "0.1.0", "torch": "2.11.0"}), encoding="utf-8")
    said = train(tmp_path / "refused", "--out", run, "--resume", "must", code=1)
    assert "of step 8 must hold 'plan', it was written by fastrex 0.1.0; finish the run with that version" in said
    assert f"start a new run with --init-from {run}" in said
    assert checkpoint.steps(run) == [4, 8]
    out = tmp_path / "out"
    config = c.override(c.read(run / "config.toml"), [])
    assert trainer.train(config, out=out, init_from=run, max_steps=1, device="cpu").step == 1
    report("T41", "a checkpoint of an earlier version", injected=1, survived=1)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 2}, "must have format 1, got 2, written by fastrex 9.9"),
        ({"plan": 2}, "must be those of plan version 1, got 2, written by fastrex 9.9"),
    ],
)
def test_t41_a_checkpoint_of_a_later_version_is_refused_not_set_aside(
    run: Path, changes: dict[str, Any], words: str, report: Report
) -> None:
    reseal(checkpoint.folder(run, 8), **changes, versions={"fastrex": "9.9"})
    with pytest.raises(FastrexError, match=words):
        trainer.train(None, out=run, resume="must", device="cpu")
    assert checkpoint.steps(run) == [4, 8]
    report("T41", f"a checkpoint with another {min(changes)}", injected=1, survived=1)


# One tensor of every kind of state that a step changes.
LEFT_OUT = [
    ("model", "encoder.conv1.weight"),
    ("model", "encoder.bn1.running_mean"),
    ("ema", "encoder.conv1.weight"),
    ("ema", "encoder.bn1.running_mean"),
    ("bank", "means.features"),
    ("bank", "means.labels"),
    ("bank", "means.pointer"),
    ("optimizer", "momentum.model.encoder.conv1.weight"),
    ("model", "encoder.bn1.num_batches_tracked"),
    ("optimizer", "guard.scale"),
    ("optimizer", "guard.growth"),
    ("optimizer", "guard.skipped"),
]


@pytest.mark.faults
@pytest.mark.parametrize(("stem", "name"), LEFT_OUT)
def test_t05_state_that_is_left_out_is_found_and_would_change_the_end(
    run: Path, sixteen: Path, monkeypatch: pytest.MonkeyPatch, stem: str, name: str, report: Report
) -> None:
    path = checkpoint.folder(run, 8)
    # The pointer and the counters may stand at 0 by right.
    value = 16 if name == "means.pointer" or name.startswith("guard.") else 0
    other_tensors(path, stem, lambda tensors: tensors[name].fill_(value))
    with pytest.raises(FastrexError, match="what was loaded from step 8 must be what was saved"):
        trainer.train(None, out=run, resume="must", device="cpu")
    # With the check hidden from it, the run goes on and ends elsewhere: the check is needed for this tensor.
    state = checkpoint.read_state(path)
    original, calls = digests.state_digest, []

    def deceived(*arguments: Any) -> digests.StateDigest:
        calls.append(original(*arguments))
        return calls[-1] if len(calls) > 1 else dataclasses.replace(calls[0], total=int(state["digest"], 16))

    monkeypatch.setattr(digests, "state_digest", deceived)
    assert trainer.train(None, out=run, resume="must", max_steps=12, device="cpu").step == 12
    assert stored_hash(run, 12) != stored_hash(sixteen, 12)
    report("T05", f"left out of a checkpoint: {stem} {name}", injected=1, survived=1)
