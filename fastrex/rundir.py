"""The run directory: who may write in it, what it says about itself, and how a run leaves it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from . import checkpoint, distributed, files, untrusted
from . import config as config_module
from .config import Config
from .distributed import World
from .errors import DivergedError, FastrexError, explain, one_line
from .verdict import RankLost, Verdict, first_line

CONFIG, STATUS, ENV, LOCK, INDEX = "config.toml", "status.json", "env.json", ".lock", "index.npz"
MAX_STATUS = 1 << 20  # bytes of status.json and env.json
EXIT_CODES = {"completed": 0, "failed": 1, "diverged": 3, "preempted": 75}


def default_out(config: Config | None, world: World) -> Path:
    """``runs/<recipe>-<UTC time>``, with rank 0's time on every rank."""
    if config is None:
        raise FastrexError("train: a run that continues needs its directory; pass --out RUN")
    now = distributed.from_main(int(time.time()), world)
    return Path("runs") / f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime(now))}"


def prepare(out: Path, config: Config | None, resume: str) -> tuple[Config, bool]:
    """Decide between a new run and a resumed one; return the configuration that holds and whether to resume.

    Args:
        config: what the command line asked for; None asks for whatever the run directory says. A resumed run takes
            only ``config.RESUMABLE`` from it, anything else must be as it was.
        resume: never (a non-empty directory is refused), auto (resume when there is a run), must.
    """
    stored = out / CONFIG
    if resume != "never" and stored.is_file():
        old = config_module.read(stored)
        kept = config_module.resumed(old, config) if config is not None else old
        if config is not None and (changes := config_module.diff(kept, config)):
            raise FastrexError(
                f"train: --resume must continue the same run, but {out} differs in {'; '.join(changes[:5])}"
                f"{'; ...' if len(changes) > 5 else ''}. Resume without settings, or start a new --out with "
                f"--init-from {out}"
            )
        return kept, True
    if resume == "must":
        raise FastrexError(
            f"train: --resume must needs a run in --out, got {out} without {CONFIG}; use --resume auto or never"
        )
    if out.is_dir() and any(p.name != LOCK for p in out.iterdir()):
        raise FastrexError(
            f"train: --out must be a new or empty directory, got {out}; resume it with --resume must, or choose another"
        )
    if out.exists() and not out.is_dir():
        raise FastrexError(f"train: --out must be a directory, got the file {out}")
    if config is None:
        raise FastrexError("train: a new run needs a recipe")
    return config, False


def decide(out: Path, config: Config | None, resume: str, world: World) -> tuple[Config, bool]:
    """:func:`prepare` of rank 0, for all ranks: the others need not see the directory."""
    if world.size == 1:
        return prepare(out, config, resume)
    words = ""
    if world.main:
        config, resuming = prepare(out, config, resume)
        words = f"{'resume' if resuming else 'start'}\n{config_module.to_toml(config)}"
    how, _, text = distributed.text_from_main(words, world).partition("\n")
    return config_module.from_toml(text), how == "resume"


class RunDir:
    """The directory while a job writes in it. Only rank 0 writes; a second job is refused."""

    def __init__(self, path: Path, world: World) -> None:
        self.path, self.world = path, world
        self._lock: IO[str] | None = None
        self._opened = self._over = False
        # The main thread and the watch's.
        self._writing = threading.Lock()

    def open(self, config: Config, resuming: bool, *, facts: Mapping[str, Any]) -> list[str]:
        """Take the lock and write what the run is, while the other ranks wait. Returns lines for the log: settings that
        a resumed run has changed.

        Raises:
            FastrexError: the directory cannot be written, or another job writes there or has begun a run meanwhile.
        """
        lines = self._open(config, resuming, facts) if self.world.main else []
        distributed.barrier(self.world)
        self._opened = True
        self.world.watch.on_verdict = self.ended
        self.world.watch.way_out = "continue with --resume must"
        return lines

    def _open(self, config: Config, resuming: bool, facts: Mapping[str, Any]) -> list[str]:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lines = self._take()
        except OSError as error:
            raise FastrexError(
                f"train: --out {self.path} cannot be written ({error.strerror}); choose another --out"
            ) from None
        stored = self.path / CONFIG
        # What was decided before indexing, perhaps hours ago, another job may have decided too.
        if not resuming and (stored.exists() or (self.path / "checkpoints").exists()):
            self.close()
            raise FastrexError(
                f"train: --out must be a new or empty directory, but another job has begun a run in {self.path} "
                "meanwhile; resume it with --resume must, or choose another"
            )
        for name in (CONFIG, STATUS, ENV, INDEX, "metrics.jsonl"):
            files.sweep(self.path / name)
        # Also of a resumed run: some settings may have been changed.
        changes = config_module.diff(config_module.read(stored), config) if stored.is_file() else []
        files.write_text(stored, config_module.to_toml(config))
        files.write_json(self.path / ENV, {**environment(), **facts})
        self.status("running")
        return [*lines, *(f"this run has changed {change}" for change in changes)]

    def _take(self) -> list[str]:
        """The lock, which the kernel takes back when this process ends, whatever its end: its file means nothing."""
        path = self.path / LOCK
        while True:
            self._lock = lock = untrusted.to_append(path, "a+")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                owner = _owner(lock.read(1000))
                self.close()
                raise FastrexError(
                    f"train: --out {self.path} is being written by another process{owner}; stop it or choose another "
                    "--out"
                ) from None
            except OSError as error:
                return [f"{self.path} cannot be locked ({error.strerror}): see to it that no other job writes there"]
            # Whoever removes the file while it is locked makes room for a second one, which would not know of this.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                    break
            self.close()
        lock.truncate(0)
        lock.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}) + "\n")
        lock.flush()
        return []

    def status(self, state: str, **facts: Any) -> None:
        """Replace status.json: ``state`` and what a program needs to know about it. Only the owner of the lock does,
        and no more once the run has ended; but a run that was to stop and is saved is preempted, though ranks were
        killed while it was written."""
        with self._writing:
            if self._lock is None or (self._over and state != "preempted"):
                return
            self._over = state != "running"
            try:
                self._write(state, **facts)
            except OSError as error:
                if state == "running" and not facts:
                    raise
                # A full disk does not stop a run, nor replace the error that it caused.
                with contextlib.suppress(OSError):
                    print(f"fastrex: {explain(error)}", file=sys.stderr, flush=True)

    def _write(self, state: str, **facts: Any) -> None:
        content = {"state": state, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "pid": os.getpid()}
        files.write_json(self.path / STATUS, {**content, "host": socket.gethostname(), **facts})

    def failed(self, error: BaseException) -> None:
        """Say why the run ended."""
        watch = self.world.watch
        if isinstance(error, RankLost):
            self.ended(error.verdict)
        elif watch.verdict is not None and not self.world.main:
            self.ended(watch.verdict)
        else:
            state = "diverged" if isinstance(error, DivergedError) else "failed"
            self.ended(Verdict(first_line(error), self.world.rank, watch.place.step, state))

    def ended(self, verdict: Verdict) -> None:
        """Any rank, any thread. Rank 0 writes; when it is gone, the others do, where they see the directory."""
        facts = {"rank": verdict.rank, "step": verdict.step, "error": verdict.text}
        if self.world.main:
            self.status(verdict.state, **facts)
        elif verdict.gone and verdict.rank == 0 and self._opened:
            with self._writing, contextlib.suppress(OSError, ValueError):
                now = untrusted.read_json(self.path / STATUS, MAX_STATUS)
                if isinstance(now, dict) and now.get("state") == "running":
                    files.write_json(self.path / STATUS, {**now, "state": verdict.state, **facts})

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _owner(text: str) -> str:
    """Who says in the lock's file that it has it."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        facts = untrusted.parse_json(text)
        return f" (process {int(facts['pid'])} on {one_line(str(facts['host'])[:80])})"
    return ""


def read_status(run: Path) -> dict[str, Any]:
    """status.json, with ``state`` corrected to ``killed`` when its process is gone from this host."""
    path = run / STATUS
    try:
        status = untrusted.read_json(path, MAX_STATUS)
        if not isinstance(status, dict) or not isinstance(status.get("state"), str):
            raise ValueError(STATUS)
    except (OSError, ValueError):
        raise FastrexError(
            f"status: RUN must be a run directory, got {run} without a readable {STATUS}; give what --out was"
        ) from None
    pid = status.get("pid")
    if status["state"] == "running" and status.get("host") == socket.gethostname() and isinstance(pid, int):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            status["state"] = "killed"
        except (PermissionError, OverflowError):
            pass
    steps = checkpoint.steps(run)
    return {**status, "checkpoint": steps[-1] if steps else None}


def environment() -> dict[str, Any]:
    """Versions and hardware, for env.json and ``fastrex env``."""
    import torch

    from fastrex_kernels import backend

    packages = {}
    for name in ("torch", "triton", "nvidia-dali-cuda130", "numpy", "safetensors", "Pillow", "scikit-learn", "timm"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = "absent"
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "fastrex": version(),
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": gpus,
        "cuda": torch.version.cuda or "absent",
        "kernels": {device: backend(device) for device in ("cpu", "cuda")},
        "packages": packages,
    }


def commit() -> str:
    """The checkout's commit, marked when files differ from it; ``unknown`` where this file is in no checkout of
    fastrex."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def version() -> str:
    """The installed version of fastrex, or the checkout's."""
    try:
        return metadata.version("fastrex")
    except metadata.PackageNotFoundError:
        return "0+checkout"
