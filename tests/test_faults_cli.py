"""Every command with every kind of bad input: the right exit code, one line that names the thing and the way out."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import launch
import pytest
from command import fastrex
from conftest import SETTINGS, environment, write_stripes

Report = Callable[..., None]
NOBODY = 65534

# What no command can make sense of, whatever it wants: usage errors.
IMPOSSIBLE = {"loop", "long name", "long path", "nul", "nothing"}
FILES = {"missing", "empty", "garbage", "newline", "bytes", "escape", "broken link", "zero"}
FOLDERS = {"missing", "folder", "newline", "bytes", "escape"}


def places(folder: Path, suffix: str) -> dict[str, str]:
    """Kind -> a path of that kind."""
    folder.mkdir()

    def at(name: str) -> Path:
        return folder / f"{name}{suffix}"

    at("folder").mkdir()
    at("empty").write_bytes(b"")
    at("garbage").write_bytes(bytes(range(255, -1, -1)) * 16)
    os.mkfifo(at("pipe"))
    # Links, and no devices themselves: a program that goes wrong as root would replace them.
    at("zero").symlink_to("/dev/zero")
    at("loop").symlink_to(at("loop").name)
    at("broken").symlink_to("nowhere")
    # Its address is short: that of a socket has a hundred letters.
    with socket.socket(socket.AF_UNIX) as box, contextlib.chdir(folder):
        box.bind(f"socket{suffix}")
    return {
        **{kind: str(at(kind)) for kind in ("missing", "folder", "empty", "garbage", "pipe", "zero", "socket", "loop")},
        "broken link": str(at("broken")),
        "below a file": str(at("empty") / f"x{suffix}"),
        "long name": str(at("n" * 300)),
        "long path": str(at("/".join(["m" * 200] * 25))),
        "nul": f"{folder}/nu\0l{suffix}",
        "newline": str(at("new\nline")),
        "bytes": str(at("caf\udce9")),
        "escape": str(at("\x1b[31mred")),
        "nothing": "",
    }


@dataclass(frozen=True)
class Place:
    """A parameter that takes a path. ``words``: a command for it; PLACE, DATA, RUN and NEW are filled in.

    ``fine``: kinds of :func:`places` that it takes. ``usage``: others whose error is one of usage.
    """

    words: str
    suffix: str = ""
    fine: set[str] = field(default_factory=set)
    usage: set[str] = field(default_factory=set)


TRAIN = "train demo SETTINGS --device cpu --max-steps 1"
PLACES = {
    "train RECIPE": Place("train PLACE", ".toml", usage=FILES | {"folder", "pipe", "socket", "below a file"}),
    "train --data": Place(f"{TRAIN} --data PLACE --out NEW", usage={"bytes"}),
    "train --data list": Place(f"{TRAIN} --data PLACE --out NEW", ".csv", usage={"bytes"}),
    "train --data shard": Place(f"{TRAIN} --data PLACE --out NEW", ".tar", usage={"bytes"}),
    "train --init-from": Place(f"{TRAIN} --data DATA --out NEW --init-from PLACE"),
    "train --init-from .pth": Place(f"{TRAIN} --data DATA --out NEW --init-from PLACE", ".pth"),
    "train --init-from .safetensors": Place(f"{TRAIN} --data DATA --out NEW --init-from PLACE", ".safetensors"),
    "train --out": Place(f"{TRAIN} --data DATA --out PLACE", fine=FOLDERS - {"bytes"}),
    "train --resume": Place("train --out PLACE --resume must --device cpu"),
    "eval SOURCE": Place("eval PLACE --data DATA"),
    "eval SOURCE .pth": Place("eval PLACE --data DATA", ".pth"),
    "eval SOURCE .safetensors": Place("eval PLACE --data DATA", ".safetensors"),
    "eval --data": Place("eval RUN --data PLACE", usage={"bytes"}),
    "eval --json": Place("eval RUN --device cpu --json PLACE", fine=FILES),
    "export SOURCE": Place("export PLACE NEW"),
    "export OUT": Place("export RUN PLACE --to hf", fine=FOLDERS),
    "config RECIPE": Place("config PLACE", ".toml", fine={"empty"}),
    "status RUN": Place("status PLACE"),
    "data index": Place("data index PLACE"),
    "data index .csv": Place("data index PLACE", ".csv"),
    "data index .tsv": Place("data index PLACE", ".tsv"),
    "data index .jsonl": Place("data index PLACE", ".jsonl"),
    "data index .tar": Place("data index PLACE", ".tar"),
    "data check": Place("data check PLACE"),
    "data check --json": Place("data check DATA --json PLACE", fine=FILES),
    "data shard PATH": Place("data shard PLACE NEW"),
    "data shard OUT": Place("data shard DATA PLACE", fine=FOLDERS),
    "data demo": Place("data demo PLACE", fine=FOLDERS),
    "data show --data": Place("data show SETTINGS --data PLACE --out NEW.html", usage={"bytes"}),
    "data show --out .html": Place("data show SETTINGS --data DATA --out PLACE", ".html", fine=FILES),
    "data show --out .png": Place("data show SETTINGS --data DATA --out PLACE", ".png", fine=FILES),
    "bench loader --data": Place("bench loader --data PLACE --seconds 0.1"),
    "bench curve RUN": Place("bench curve PLACE --name x"),
}
QUICK = ("train --data", "train --init-from", "export SOURCE", "status RUN", "data index", "data check --json")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_stripes(root / "train", 16, seed=0)
    write_stripes(root / "val", 4, seed=1)
    return root


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    words = ["train", "demo", *SETTINGS, "--data", data, "--out", out, "--device", "cpu", "--max-steps", "8"]
    ended = fastrex(*words, "checkpoint.every_steps=2", "checkpoint.keep_last=3")
    assert ended.code == 0, ended.err
    return out


def filled(words: str, place: str, data: Path, run: Path, new: Path) -> list[str]:
    known = {"PLACE": [place], "DATA": [str(data)], "RUN": [str(run)], "NEW": [str(new)], "SETTINGS": SETTINGS}
    known["NEW.html"] = [f"{new}.html"]
    return [part for word in words.split() for part in known.get(word, [word])]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.faults) for name in PLACES]
)
def test_every_path_of_every_command(name: str, data: Path, run: Path, tmp_path: Path, report: Report) -> None:
    place, inside = PLACES[name], tmp_path / "in"
    there = places(inside, place.suffix)
    for number, (kind, path) in enumerate(there.items()):
        new = tmp_path / f"new{number}"
        ended = fastrex(*filled(place.words, path, data, run, new))
        if kind in place.fine:
            assert ended.code == 0, (kind, ended.err)
            continue
        assert ended.code in (1, 2), (kind, ended)
        assert ended.code == 2 or kind not in IMPOSSIBLE | place.usage, (kind, ended.err)
        line = ended.line
        assert line.isprintable()
        assert "--debug" not in line, (kind, line)
        named = path.rpartition("/")[2].removesuffix(place.suffix).encode("unicode_escape").decode()
        assert named in line.replace("\\\\", "\\") or kind in ("zero", "broken link", "below a file"), (kind, line)
        assert re.search(r"; |must|give|choose|another|--help", line), (kind, line)
        assert not new.exists(), "a second try must not be refused because of the first"
    assert stat.S_ISFIFO((inside / f"pipe{place.suffix}").stat().st_mode)
    assert (inside / f"zero{place.suffix}").resolve() == Path("/dev/zero") or "zero" in place.fine
    assert stat.S_ISCHR(Path("/dev/zero").stat().st_mode)
    report("T40", f"paths that cannot be: {name}", injected=len(there), survived=len(there))


WORDS = [
    "frain",
    "--nope",
    "train --nope",
    "train demo trex",
    "train demo optim.lr",
    "train demo optim.lr=fast",
    "train demo optim.lr=-1",
    "train demo optim.lr=nan",
    "train demo optim.epochs=1.5",
    "train demo optim.batch_size=true",
    "train demo data.mean=[1,2]",
    "train demo data.mean=1",
    "train demo augment.flip=2",
    "train demo nowhere.lr=1",
    "train demo optim.nothing=1",
    "train demo recipe.x=1",
    "train demo objective.name=other",
    "train demo objective.nothing=1",
    "train demo optim.warmup_epochs=1000",
    "train demo run.seed=99999999999999999999999",
    "train demo checkpoint.on_failure=maybe",
    "train --resume always",
    "train --max-steps 0",
    "train --max-steps ten",
    "train --device tpu",
    "train --precision int8",
    "train --arch resnet19",
    "train --out",
    "eval",
    "eval --device tpu a",
    "export",
    "export a",
    "export a b c",
    "export a b --to onnx",
    "config nothing",
    "config demo optim.lrr=1",
    "config --nope",
    "status",
    "status a b",
    "status --nope a",
    "env now",
    "data",
    "data nothing",
    "data index",
    "data index a b",
    "data index a --threads -1",
    "data index a --empty-classes maybe",
    "data shard a",
    "data shard a b --size 0",
    "data shard a b --split test",
    "data shard a b --seed -1",
    "data check",
    "data check a --threads x",
    "data demo a b",
    "data show demo --epoch -1",
    "data show demo --epoch 4294967296",
    "data show demo --step -1",
    "data show demo --rows 0",
    "data show demo --sample a --step 1",
    "data show demo --out batch.gif",
    "bench nothing",
    "bench kernels --seconds -1",
    "bench kernels --dtype int8",
    "bench kernels --case nothing",
    "bench loader",
    "bench curve",
]


def test_bad_words_are_errors_of_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: Report) -> None:
    monkeypatch.chdir(tmp_path)
    for words in WORDS:
        ended = fastrex(*words.split())
        assert ended.code == 2, (words, ended)
        if words != "data":  # which shows its help
            assert ended.line.isprintable()
            assert "--debug" not in ended.err, ended.err
        assert not any(tmp_path.iterdir()), words
    report("T40", "words that are no command", injected=len(WORDS), survived=len(WORDS))


def test_without_a_command_the_help_is_shown() -> None:
    ended = fastrex()
    assert ended.code == 2
    assert "Usage: fastrex" in ended.out + ended.err
    assert "error" not in ended.err


@pytest.mark.parametrize(
    ("variable", "value"),
    [("WORLD_SIZE", "two"), ("WORLD_SIZE", "0"), ("RANK", "1"), ("LOCAL_RANK", "-"), ("WORLD_SIZE", "")],
)
def test_a_bad_environment_is_named(
    variable: str, value: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    words = [*filled(TRAIN, "", data, tmp_path, tmp_path), "--data", str(data), "--out", str(tmp_path / "run")]
    with mock.patch("os._exit", sys.exit):  # which ends one of several ranks
        ended = fastrex(*words)
    assert ended.code in (1, 2)
    assert variable in ended.line
    assert "--debug" not in ended.err


INTERRUPTED = {
    "train": "fastrex.trainer.train",
    "train --dry-run": "fastrex.dryrun.dry_run",
    "eval a": "fastrex.standalone.evaluate_source",
    "export a b": "fastrex.export.load_source",
    "config": "fastrex.objectives.resolve",
    "status RUN": "fastrex.rundir.read_status",
    "env": "fastrex.rundir.environment",
    "data index DATA": "fastrex.data.index.build",
    "data check DATA": "fastrex.data.check.check",
    "data shard DATA NEW": "fastrex.data.sharding.shard",
    "data demo NEW": "fastrex.data.demo.write_digits",
    "data show --data DATA": "fastrex.standalone.show_batch",
    # What a checkout has beside the package, an installation has inside of it.
    "bench kernels": f"{'fastrex.bench' if find_spec('fastrex.bench') else 'benchmarks'}.kernels.discover",
}


@pytest.mark.parametrize("words", INTERRUPTED)
@pytest.mark.parametrize("error", [KeyboardInterrupt, EOFError])
def test_an_interrupt_is_no_error_and_an_end_of_file_no_interrupt(
    words: str, error: type[BaseException], data: Path, run: Path, tmp_path: Path
) -> None:
    with mock.patch(INTERRUPTED[words], side_effect=error):
        ended = fastrex(*filled(words, "", data, run, tmp_path / "new"))
    if error is KeyboardInterrupt:
        assert (ended.code, ended.line) == (130, "fastrex: aborted")
    else:
        assert ended.code == 1
        assert "EOFError" in ended.line


@pytest.mark.faults
def test_ctrl_c_ends_a_process_with_130(tmp_path: Path, report: Report) -> None:
    folder = tmp_path / "images" / "a"
    write_stripes(tmp_path / "images", 1, seed=0)
    folder.mkdir()
    for number in range(20_000):
        os.link(tmp_path / "images" / "class-0" / "00.jpg", folder / f"{number}.jpg")
    for words in (["data", "index", tmp_path / "images"], ["data", "check", tmp_path / "images"]):
        with launch.one(tmp_path / f"{words[1]}.log", launch.faulty(words)) as job:
            # It reads headers as soon as its threads are there.
            status = Path(f"/proc/{job.processes[0].pid}/status")
            job.until(lambda status=status: int(status.read_text().split("Threads:")[1].split()[0]) > 4)
            job.send(signal.SIGINT)
            assert job.wait() == [130], job.output
        assert job.output.strip() == "fastrex: aborted"
    assert not list((tmp_path / "images").rglob("*.npz*"))
    report("T40", "Ctrl-C during data index and data check", injected=2, survived=2)


def process(words: list[str | Path], **more: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastrex", *map(str, words)]
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        command, env=environment(), text=True, timeout=120, **{"stderr": subprocess.PIPE, **more}
    )


def test_nobody_reads_what_is_printed(run: Path, tmp_path: Path, report: Report) -> None:
    for words in (["status", run], ["config"]):
        ours, theirs = os.pipe()
        os.close(ours)
        ended = process(words, stdout=theirs)
        os.close(theirs)
        assert (ended.returncode, ended.stderr) == (1, ""), words
    with Path("/dev/full").open("w") as full:
        ended = process(["status", run], stdout=full)
    assert ended.returncode == 1
    assert re.fullmatch(r"fastrex: error: .*No space left on device.*\n", ended.stderr)
    report("T40", "stdout is closed or full", injected=3, survived=3)


@pytest.mark.faults
def test_a_training_goes_on_when_its_terminal_is_gone(data: Path, tmp_path: Path, report: Report) -> None:
    out = tmp_path / "run"
    ours, theirs = os.pipe()
    os.close(ours)
    ended = process([*filled(TRAIN, "", data, tmp_path, out), "--data", data, "--out", out], stdout=theirs)
    os.close(theirs)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert json.loads((out / "status.json").read_text(encoding="utf-8"))["state"] == "completed"
    assert "accuracy:" in (out / "train.log").read_text(encoding="utf-8")
    report("T40", "a training whose stdout nobody reads", injected=1, survived=1)


@pytest.mark.faults
def test_too_little_memory_is_one_line(data: Path, tmp_path: Path, report: Report) -> None:
    out = tmp_path / "run"
    words = [
        *filled(TRAIN, "", data, tmp_path, out),
        "projector.hidden_layers=2",
        "projector.hidden_dim=60000",
        "--data",
        data,
        "--out",
        out,
    ]

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, 12 * 2**30))  # the second layer wants 13.4 GiB

    ended = process(words, stdout=subprocess.PIPE, preexec_fn=limited)
    assert ended.returncode == 1
    assert re.fullmatch(r"fastrex: error: out of memory \(.*\); lower optim.batch_size.*\n", ended.stderr), ended.stderr
    assert not out.exists()
    report("T40", "no memory for the model", injected=1, survived=1)


@contextlib.contextmanager
def disk(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


WRITERS = {
    "train": f"{TRAIN} --data DATA --out PLACE",
    "eval": "eval RUN --device cpu --json PLACE",
    "export": "export RUN PLACE --to hf",
    "data check": "data check DATA --json PLACE",
    "data shard": "data shard DATA PLACE",
    "data demo": "data demo PLACE",
    "data show": "data show SETTINGS --data DATA --out PLACE.html",
    "data show png": "data show SETTINGS --data DATA --out PLACE.png",
}


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_disk_that_takes_nothing(how: str, data: Path, run: Path, tmp_path: Path, report: Report) -> None:
    with disk(tmp_path / "disk", "size=64k" if how == "full" else "ro,size=64k") as folder:
        if how == "full":
            with contextlib.suppress(OSError):
                (folder / "ballast").write_bytes(b"-" * 65536)
        before = sorted(folder.iterdir())
        for name, words in WRITERS.items():
            place = folder / "out"
            ended = fastrex(*(w.replace("PLACE", str(place)) for w in filled(words, "PLACE", data, run, place)))
            assert ended.code == 1, (name, ended)
            line = ended.line
            assert "--debug" not in line, (name, line)
            assert str(folder) in line, (name, line)
            said = "bytes|No space left" if how == "full" else "[Rr]ead-only"
            assert re.search(said, line), (name, line)
            # Shards that were begun stay, for the same command to go on with.
            left = [p for p in sorted(folder.iterdir()) if p.name != ".out.partial"]
            assert left == before, (name, "nothing may stay")
    report("T40", f"outputs on a {how} disk", injected=len(WRITERS), survived=len(WRITERS))


def test_the_disk_must_hold_a_checkpoint(data: Path, tmp_path: Path, report: Report) -> None:
    with disk(tmp_path / "disk", "size=400k") as folder:
        words = [*filled(TRAIN, "", data, tmp_path, folder), "model.width=16", "--data", data, "--out", folder / "run"]
        ended = fastrex(*words)
        assert ended.code == 1
        need, got = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+)(?: bytes|;)", ended.line))
        assert need > got > 0
        assert list(folder.iterdir()) == []
        dry = fastrex(*words, "--dry-run")
        assert dry.code == 1
        assert re.search(r"^error: disk: .* bytes for one checkpoint", dry.out, re.M)
    report("T40", "a disk too small for one checkpoint", injected=2, survived=2)


READERS = {
    "train": f"{TRAIN} --data PLACE --out NEW",
    "train recipe": "train PLACE.toml",
    "train weights": f"{TRAIN} --data DATA --out NEW --init-from PLACE.safetensors",
    "train foreign": f"{TRAIN} --data DATA --out NEW --init-from PLACE.pth",
    "train out": f"{TRAIN} --data DATA --out PLACE",
    "eval": "eval PLACE.pth --data DATA",
    "eval run": "eval PLACE --data DATA",
    "export": "export PLACE NEW",
    "status": "status PLACE",
    "data index": "data index PLACE",
    "data index csv": "data index PLACE.csv",
    "data check": "data check PLACE",
    "data shard": "data shard PLACE NEW",
    "config": "config PLACE.toml",
}


@pytest.mark.faults
def test_what_may_not_be_read(data: Path, run: Path, report: Report) -> None:
    if os.geteuid():
        pytest.skip("only root can become another user")
    root = Path(tempfile.mkdtemp())
    try:
        root.chmod(0o777)
        shutil.copytree(data, root / "data")
        (root / "data").chmod(0o755)
        for suffix in (".toml", ".safetensors", ".pth", ".csv"):
            (root / f"closed{suffix}").write_bytes(b"-")
            (root / f"closed{suffix}").chmod(0)
        (root / "closed").mkdir(mode=0)
        for number, (name, words) in enumerate(READERS.items()):
            new = root / f"new{number}"
            with mock.patch.dict(os.environ, FASTREX_CACHE=str(root / "cache")):
                os.seteuid(NOBODY)
                try:
                    place = str(root / "closed")
                    ended = fastrex(*(w.replace("PLACE", place) for w in filled(words, place, root / "data", run, new)))
                finally:
                    os.seteuid(0)
            assert ended.code in (1, 2), (name, ended)
            assert "--debug" not in ended.line, (name, ended.line)
            assert "closed" in ended.line, (name, ended.line)
            assert re.search(r"[Pp]ermission|readable|cannot be read|without", ended.line), (name, ended.line)
    finally:
        shutil.rmtree(root)
    report("T40", "files and folders that this user may not read", injected=len(READERS), survived=len(READERS))
