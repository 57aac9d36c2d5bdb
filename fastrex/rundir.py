"""The run directory: who may write in it, what it says about itself, and how a run leaves it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import socket
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from . import checkpoint, distributed
from . import config as config_module
from .config import Config
from .distributed import World
from .errors import FastrexError

CONFIG, STATUS, ENV, LOCK, INDEX = "config.toml", "status.json", "env.json", ".lock", "index.npz"
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


class RunDir:
    """The directory while a job writes in it. Only rank 0 writes; a second job is refused."""

    def __init__(self, path: Path, world: World) -> None:
        self.path, self.world = path, world
        self._lock: IO[str] | None = None
        self._opened = False

    def open(self, config: Config, *, facts: Mapping[str, Any]) -> list[str]:
        """Take the lock and write what the run is; the other ranks wait, before (they still look at the directory) and
        after. Returns lines for the log: settings that a resumed run has changed."""
        distributed.barrier(self.world)
        lines = self._open(config, facts) if self.world.main else []
        distributed.barrier(self.world)
        self._opened = True
        return lines

    def _open(self, config: Config, facts: Mapping[str, Any]) -> list[str]:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / LOCK).open("a", encoding="utf-8")
        except OSError as error:
            raise FastrexError(
                f"train: --out {self.path} cannot be written ({error.strerror}); choose another --out"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise FastrexError(
                f"train: --out {self.path} is being written by another process; stop it or choose another --out"
            ) from None
        # Also of a resumed run: some settings may have been changed.
        stored = self.path / CONFIG
        changes = config_module.diff(config_module.read(stored), config) if stored.is_file() else []
        temp = self.path / f".{CONFIG}"
        temp.write_text(config_module.to_toml(config), encoding="utf-8")
        temp.replace(self.path / CONFIG)
        checkpoint.write_json(self.path / ENV, {**environment(), **facts})
        self.status("running")
        return [f"this run has changed {change}" for change in changes]

    def status(self, state: str, **facts: Any) -> None:
        """Replace status.json: ``state`` and what a program needs to know about it. Only the owner of the lock does."""
        if self._lock is None:
            return
        content = {"state": state, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "pid": os.getpid()}
        checkpoint.write_json(self.path / STATUS, {**content, "host": socket.gethostname(), **facts})

    def failed(self, error: BaseException) -> None:
        """Say why the run ended, from whichever rank met it first: what follows on the others is only its echo."""
        path = self.path / STATUS
        if not self._opened:
            return
        # A full disk must not replace the error that it caused.
        with contextlib.suppress(OSError, ValueError):
            now = json.loads(path.read_text(encoding="utf-8"))
            if now.get("state") == "running":
                facts = {"rank": self.world.rank, "error": f"{type(error).__name__}: {error}"}
                checkpoint.write_json(path, {**now, "state": "failed", **facts})

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def read_status(run: Path) -> dict[str, Any]:
    """status.json, with ``state`` corrected to ``killed`` when its process is gone from this host."""
    path = run / STATUS
    try:
        status = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise FastrexError(f"status: RUN must be a run directory, got {run} without a readable {STATUS}") from None
    if status.get("state") == "running" and status.get("host") == socket.gethostname():
        try:
            os.kill(int(status["pid"]), 0)
        except ProcessLookupError:
            status["state"] = "killed"
        except PermissionError:
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
