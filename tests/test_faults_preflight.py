"""``fastrex train --dry-run`` finds what stands in the way of step 1, on every rank, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import launch
import pytest
from command import fastrex
from conftest import SETTINGS

from fastrex import cgroup, preflight
from fastrex import config as config_module
from fastrex.distributed import World, pick_device

Report = Callable[..., None]


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder with its size and time of change."""
    paths = [folder, *folder.rglob("*")] if folder.exists() else []
    return {str(p.relative_to(folder)): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in paths}


def words(data: Path, out: Path, *more: str) -> list[str]:
    place = [] if any(word.startswith("data.path=") for word in more) else ["--data", str(data)]
    return ["train", "demo", *SETTINGS, *place, "--out", str(out), "--device", "cpu", *more]


def levels(out: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in out.splitlines():
        level, _, text = line.partition(": ")
        found.setdefault(level, []).append(text)
    return found


@pytest.fixture(scope="module")
def run(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    ended = fastrex(*words(stripes, out, "--max-steps", "4", "checkpoint.every_steps=2"))
    assert ended.code == 0, ended.err
    return out


def test_a_training_that_would_start(stripes: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    ended = fastrex(*words(stripes, tmp_path / "new" / "run", "--dry-run"))
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines()[-1] == "would start"
    found = levels(ended.out)
    assert "error" not in found
    for what in ("device", "--out", "settings", "open files", "threads", "/dev/shm", "images", "first batch", "model"):
        assert any(text.startswith(what) for text in found["ok"]), what
    assert any(re.search(r"memory: a step needs [\d.]+ MiB", text) for text in found["ok"])
    assert any(re.search(r"disk: .* free, the run needs up to", text) for text in found["ok"])
    assert "16x3x32x32, 32x3x16x16" in ended.out
    assert tree(tmp_path) == before


def test_what_it_says_the_disk_needs_is_what_a_checkpoint_has(run: Path, stripes: Path, tmp_path: Path) -> None:
    ended = fastrex(*words(stripes, tmp_path / "new", "--dry-run"))
    said = re.search(r"\(([\d.]+) MiB a checkpoint\)", ended.out)
    assert said is not None
    size = sum(p.stat().st_size for p in (run / "checkpoints" / "step-00000004").iterdir())
    assert float(said.group(1)) == pytest.approx(size / 2**20, rel=0.15)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["data.path=/nowhere"], "'/nowhere' does not exist"),
        (["optim.batch_size=128"], "batch"),
        (["optim.batch_size=1"], "BatchNorm"),
        (["run.tensorboard=true"], "pip install 'fastrex"),
        (["--init-from", "/nowhere.pth"], "/nowhere.pth does not exist"),
        (["--resume", "must"], "--resume must needs a run"),
        (["data.global_size=8192"], "memory: a step needs .*GiB.*optim.accumulate"),
        (["run.cuda_graph=on"], "run.cuda_graph=on"),
    ],
)
def test_what_is_in_the_way_is_an_error(more: list[str], said: str, stripes: Path, tmp_path: Path) -> None:
    ended = fastrex(*words(stripes, tmp_path / "run", *more, "--dry-run"))
    assert ended.code == 1, ended.out
    errors = levels(ended.out)["error"]
    assert any(re.search(said, text) for text in errors), errors
    assert ended.out.splitlines()[-1].startswith("would not start: ")
    assert not (tmp_path / "run").exists()


def test_several_errors_are_told_at_once(stripes: Path, tmp_path: Path) -> None:
    ended = fastrex(*words(stripes, tmp_path / "run", "run.tensorboard=true", "data.path=/nowhere", "--dry-run"))
    assert len(levels(ended.out)["error"]) == 2
    assert ended.out.splitlines()[-1] == "would not start: 2 errors"


def test_errors_of_usage_keep_their_code(tmp_path: Path) -> None:
    ended = fastrex("train", "trex", "--dry-run")
    assert ended.code == 2
    assert "--data" in ended.line


def test_an_image_that_went_bad_is_found(stripes: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(stripes, data)
    assert fastrex("data", "index", data).code == 0
    for path in (data / "train").rglob("*.jpg"):
        path.write_bytes(path.read_bytes()[:-200])
    ended = fastrex(*words(data, tmp_path / "run", "--dry-run"))
    assert ended.code == 1
    assert any(".jpg" in text and "indexed" in text for text in levels(ended.out)["error"])


def test_a_run_that_would_be_resumed_is_read_and_not_touched(run: Path, stripes: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    resume = ["train", "--out", str(copy), "--resume", "must", "--device", "cpu", "--dry-run"]
    before = tree(copy)
    ended = fastrex(*resume)
    assert ended.code == 0, ended.out
    assert "resume: from step 4" in ended.out
    assert tree(copy) == before
    victim = copy / "checkpoints" / "step-00000004" / "model.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(bytes(content))
    before = tree(copy)
    ended = fastrex(*resume)
    assert ended.code == 0, ended.out
    assert any("step 4 is damaged" in text for text in levels(ended.out)["warning"])
    assert "resume: from step 2" in ended.out
    assert tree(copy) == before
    shutil.rmtree(copy / "checkpoints" / "step-00000002")
    ended = fastrex(*resume)
    assert ended.code == 1
    assert any("all are damaged" in text for text in levels(ended.out)["error"])


@pytest.fixture
def limits() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


ALONE = World(0, 1, 0, 1, pick_device("cpu"))


@pytest.mark.usefixtures("limits")
def test_the_limit_on_open_files_is_raised_where_it_may_be() -> None:
    config = config_module.load("demo", ["data.threads=8"])
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    found = preflight.open_files(config, ALONE)
    now = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert found == preflight.Finding("note", f"open files: limit raised from 300 to {now}")
    assert now >= 388
    assert preflight.open_files(config, ALONE).level == "ok"
    with mock.patch.object(resource, "setrlimit", side_effect=ValueError):
        resource.getrlimit(resource.RLIMIT_NOFILE)
        with mock.patch.object(resource, "getrlimit", return_value=(300, 300)):
            found = preflight.open_files(config, ALONE)
    assert found.level == "warning"
    assert "ulimit -n" in found.text


def test_threads_are_counted_against_the_group(tmp_path: Path) -> None:
    config = config_module.load("demo", ["data.threads=8"])
    with mock.patch.object(cgroup, "processes", return_value=20):
        assert preflight.processes(config, ALONE).level == "warning"
    with mock.patch.object(cgroup, "processes", return_value=2000):
        assert preflight.processes(config, ALONE).level == "ok"


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_a_container(version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / ("memory" if version == 1 else "") / "job" / "step"
    pids = tmp_path / ("pids" if version == 1 else "") / "job" / "step"
    for folder in {inner, pids}:
        folder.mkdir(parents=True)
    name = "memory.limit_in_bytes" if version == 1 else "memory.max"
    (inner / name).write_text("max\n" if version == 2 else "9223372036854771712\n", encoding="ascii")
    (inner.parent / name).write_text("1000000\n", encoding="ascii")
    (pids / "pids.max").write_text("100\n", encoding="ascii")
    (pids / "pids.current").write_text("60\n", encoding="ascii")
    (pids.parent / "pids.max").write_text("max\n", encoding="ascii")
    groups = tmp_path / "groups"
    groups.write_text("0::/job/step\n" if version == 2 else "4:memory:/job/step\n2:pids:/job/step\n", encoding="ascii")
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    monkeypatch.setattr(cgroup, "GROUPS", groups)
    assert cgroup.memory() == 1_000_000
    assert cgroup.processes() == 40
    groups.write_text("0::/elsewhere\n", encoding="ascii")  # the host's path, seen from inside
    assert cgroup.memory() is None


def test_disk_counts_what_is_kept_for_good(tmp_path: Path) -> None:
    config = config_module.load("demo", ["checkpoint.keep_last=3", "checkpoint.keep_every=10"])
    free = shutil.disk_usage(tmp_path).free
    assert preflight.disk(tmp_path, config, free // 4, 0).level == "warning"
    assert preflight.disk(tmp_path, config, free // 4, 0, existing=4).level == "ok"
    assert preflight.disk(tmp_path, config, free // 20, 0).level == "ok"
    assert preflight.disk(tmp_path, config, free // 20, 0, steps=1000).level == "warning"
    assert preflight.disk(tmp_path / "a" / "b", config, free * 2, 0).level == "error"


@pytest.mark.faults
def test_every_rank_looks_and_rank_0_tells(stripes: Path, tmp_path: Path, report: Report) -> None:
    """Rank 1 alone may open few files; both ranks share a batch that cannot be shared."""
    limited = (
        "import os, resource, runpy, sys\n"
        "if os.environ['RANK'] == '1': resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))\n"
        "sys.argv[0] = 'fastrex'\n"
        "runpy.run_module('fastrex', run_name='__main__')\n"
    )
    script = tmp_path / "limited.py"
    script.write_text(limited, encoding="utf-8")
    good = words(stripes, tmp_path / "run", "--dry-run")
    with launch.ranks(tmp_path / "good.log", 2, [str(script), *good]) as job:
        assert job.wait() == [0, 0], job.output
    lines = job.output.splitlines()
    assert "device: cpu x 2" in job.output
    assert "8x3x32x32" in job.output, "a rank's half of the batch"
    assert [line for line in lines if line.startswith("warning: [rank 1] open files")]
    assert [line for line in lines if "would start" in line] == ["would start"]
    odd = words(stripes, tmp_path / "run", "optim.batch_size=15", "--dry-run")
    with launch.ranks(tmp_path / "odd.log", 2, launch.faulty(odd)) as job:
        assert job.wait() == [1, 1], job.output
    assert len(re.findall("multiple of ranks", job.output)) == 1
    with launch.ranks(
        tmp_path / "no.log", 2, launch.faulty(words(stripes, tmp_path / "run", "data.path=/nowhere", "--dry-run"))
    ) as job:
        assert job.wait() == [1, 1], job.output
    assert "would not start: 1 error" in job.output
    assert not (tmp_path / "run").exists()
    report("T40", "--dry-run on two ranks: a limit of one rank, a batch, no images", injected=3, survived=3)


@pytest.mark.faults
def test_a_rank_that_cannot_resume(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    resume = ["train", "--out", str(copy), "--resume", "must", "--device", "cpu", "--dry-run"]
    state = json.loads((copy / "checkpoints" / "step-00000004" / "state.json").read_text(encoding="utf-8"))
    assert state["world_size"] == 1
    with launch.ranks(tmp_path / "log", 2, launch.faulty(resume)) as job:
        assert job.wait() == [1, 1], job.output
    assert "--allow-world-size-change" in job.output
    with launch.ranks(tmp_path / "log2", 2, launch.faulty([*resume, "--allow-world-size-change"])) as job:
        assert job.wait() == [0, 0], job.output
    assert "resume: from step 4" in job.output


def test_out_is_probed_without_a_trace(tmp_path: Path) -> None:
    before = tree(tmp_path)
    assert preflight.writable(tmp_path / "a" / "b").level == "ok"
    with mock.patch.object(os, "O_TMPFILE", 0):  # a file system without nameless files
        assert preflight.writable(tmp_path / "a" / "b").level == "ok"
    assert [p.name for p in tmp_path.iterdir()] == []
    assert before.keys() == tree(tmp_path).keys()
    (tmp_path / "file").write_bytes(b"")
    for bad in (tmp_path / "file", tmp_path / "file" / "x", Path("/proc/x"), tmp_path / ("y" * 256)):
        assert preflight.writable(bad).level == "error", bad
