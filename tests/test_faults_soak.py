"""Long runs: memory, open files, threads and disk do not grow, and kills on the way change nothing of what they end in.

Samples of the processes are taken from outside, from /proc."""

from __future__ import annotations

import os
import random
import signal
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import launch
import pytest
from conftest import SETTINGS

from fastrex import checkpoint, rundir

Report = Callable[..., None]

# The smallest net that still has every part: rank 0 and 1 share two cores, and a step is mostly waiting for each other.
LONG = [
    *SETTINGS,
    "data.local_crops=0",
    "data.global_size=16",
    "data.eval_size=16",
    "data.eval_resize=16",
    "model.width=8",
    "optim.batch_size=4",
    "optim.epochs=313",
    "optim.lr=0.05",
    "eval.every_epochs=25",
    "checkpoint.every_epochs=0",
    "checkpoint.every_steps=100",
    "checkpoint.keep_every=2000",
    "run.log_every=50",
]
LONG_STEPS = 5000
LONG_SEED = 20230503
LOGS = ("metrics.jsonl", "train.log")


@dataclass
class Samples:
    """What a process held at several moments of its life, from /proc: resident bytes, open files, threads."""

    rss: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def take(self, pid: int, step: int) -> None:
        try:
            status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
            files = len(os.listdir(f"/proc/{pid}/fd"))
            words = dict(line.split(":", 1) for line in status.splitlines())
            rss, threads = int(words["VmRSS"].split()[0]) * 1024, int(words["Threads"])
        except (OSError, KeyError):
            return  # it is gone, or going
        self.rss.append(rss)
        self.files.append(files)
        self.threads.append(threads)
        self.steps.append(step)


@dataclass
class Watched:
    """A job's processes, and the largest size of its directory."""

    lives: dict[int, Samples] = field(default_factory=dict)
    disk: list[int] = field(default_factory=list)


@contextmanager
def watching(run: Path, pids: Sequence[int], seen: Watched, every_s: float) -> Iterator[None]:
    """Samples are taken while the block runs."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(every_s):
            step = last_step(run)
            for pid in pids:
                seen.lives.setdefault(pid, Samples()).take(pid, step)
            seen.disk.append(size(run / "checkpoints"))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def last_step(run: Path) -> int:
    with_step = [line for line in tail(run / "metrics.jsonl").splitlines() if line.startswith('{"step": ')]
    return int(with_step[-1].split()[1].rstrip(",")) if with_step else -1


def tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def size(folder: Path) -> int:
    """Bytes of the files below, while others write and remove there: `os.walk` passes over a folder that has just gone,
    `Path.rglob` raises."""
    total = 0
    for at, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(at, name)).st_size
            except OSError:
                continue  # a temporary one, or one that retention has just removed
    return total


def flat(samples: Samples, begin: int, end: int) -> tuple[float, float]:
    """Between two steps: the largest deviation of resident memory from its median, and how much it has grown from the
    first to the last quarter. Open files and threads are checked here: at rest as many at the end as in the
    beginning. The very end is no part of this: there the loader lets go of what it holds."""
    within = [i for i, step in enumerate(samples.steps) if begin <= step < end]
    assert len(within) >= 8, f"too few samples: {samples}"
    quarter = len(within) // 4
    for counts in (samples.files, samples.threads):
        chosen = [counts[i] for i in within]
        assert min(chosen[:quarter]) == min(chosen[-quarter:]), samples
        # A checkpoint or an evaluation that is under way holds a few more.
        assert max(chosen) <= min(chosen) + 12, samples
    rss = [samples.rss[i] for i in within]
    middle = statistics.median(rss)
    growth = statistics.median(rss[-quarter:]) / statistics.median(rss[:quarter]) - 1
    return max(abs(value / middle - 1) for value in rss), growth


def long_job(folder: Path, data: Path, faults: Sequence[str], seen: Watched, ranks: int, steps: int) -> list[str]:
    """Start the long run again until it is done; its state's hash on each rank."""
    run = folder / "run"
    words = ["train", "demo", *LONG, "--data", data, "--out", run, "--device", "cpu", "--resume", "auto"]
    command = launch.faulty([*words, "--max-steps", str(steps)], ["shallow:", *faults], folder / "hashes")
    for start in range(len(faults) + 1):
        job = launch.ranks(folder / f"log-{start}", ranks, command)
        with job, watching(run, [process.pid for process in job.processes], seen, 0.0001 * steps):
            codes = job.wait(1200)
        if not any(codes):
            break
        assert start < len(faults), job.output
        assert -signal.SIGKILL in codes, job.output
    return [path.read_text(encoding="utf-8") for path in sorted((folder / "hashes").glob("rank*.txt"))]


def test_memory_and_files_stay_as_they_are(stripes: Path, tmp_path: Path, report: Report) -> None:
    seen = Watched()
    long_job(tmp_path, stripes, (), seen, ranks=1, steps=300)
    (samples,) = seen.lives.values()
    around, growth = flat(samples, 50, 250)
    assert around < 0.05
    assert growth < 0.03
    report("T42", "300 steps, one process", injected=0, survived=0, growth=round(growth, 4))


@pytest.mark.faults
def test_five_thousand_steps_with_a_kill_every_few_hundred(stripes: Path, tmp_path: Path, report: Report) -> None:
    quiet, killed = Watched(), Watched()
    straight = long_job(tmp_path / "quiet", stripes, (), quiet, ranks=2, steps=LONG_STEPS)
    for samples in quiet.lives.values():
        around, growth = flat(samples, LONG_STEPS // 5, LONG_STEPS - 100)
        assert around < 0.05, samples.rss
        assert growth < 0.03, samples.rss
    chance = random.Random(LONG_SEED)
    steps = [450 * number + chance.randrange(100) for number in range(1, 11)]
    marks = tmp_path / "marks"
    marks.mkdir()
    faults = [f"kill:rank={chance.randrange(2)},step={step},once={marks / str(step)}" for step in steps]
    print(f"seed {LONG_SEED}: kills at {steps}")
    hashes = long_job(tmp_path / "killed", stripes, faults, killed, ranks=2, steps=LONG_STEPS)
    assert len(list(marks.iterdir())) == len(steps)
    assert len(straight) == 2
    assert hashes == straight
    assert len(set(hashes)) == 1
    # Every life holds as much as the one before.
    lives = [max(samples.rss[len(samples.rss) // 2 :]) for samples in killed.lives.values() if len(samples.rss) > 8]
    assert len(lives) > len(steps)
    assert max(lives) / min(lives) < 1.1, lives
    for folder, seen in ((tmp_path / "quiet", quiet), (tmp_path / "killed", killed)):
        run = folder / "run"
        assert rundir.read_status(run)["state"] == "completed"
        # The two newest, those kept for good, and one that is being written or removed.
        assert checkpoint.steps(run) == [2000, 4000, 4900, 5000]
        one = size(checkpoint.folder(run, LONG_STEPS))
        assert max(seen.disk) <= 6 * one
        assert not [path for path in run.rglob(".*") if path.name != rundir.LOCK]
    logs = {name: [(tmp_path / n / "run" / name).stat().st_size for n in ("quiet", "killed")] for name in LOGS}
    assert logs["metrics.jsonl"][1] == pytest.approx(logs["metrics.jsonl"][0], rel=0.01)
    assert logs["train.log"][1] < logs["train.log"][0] + (len(steps) + 1) * 4096
    report(
        "T42", "5,000 steps on two ranks, a kill every few hundred", injected=len(steps), survived=len(steps),
        bits_equal=True, seed=LONG_SEED,
    )  # fmt: skip
