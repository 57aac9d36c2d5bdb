"""What a training needs of its machine: a place to write, disk, memory, open files, threads. Looked at before step 1.

``fastrex train --dry-run`` shows all of it; the cheap part is looked at by every start.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from . import budget, cgroup, checkpoint, files
from .config import Config
from .data.dataset import DTYPES
from .distributed import World
from .errors import FastrexError, explain
from .model.resnet import ResNet
from .step import Trainer

MIB, GIB = 2**20, 2**30
OK, NOTE, WARNING, ERROR = "ok", "note", "warning", "error"
# The longest that is appended to --out: a file of a checkpoint under its temporary name.
TAIL = 96
NAME_MAX, PATH_MAX = 255, 4096
INODES = 100
SHARED_MEMORY = 64 * MIB  # per rank; NCCL's transport between GPUs of one machine


@dataclass(frozen=True)
class Finding:
    """What one check says. ``level``: ok, note, warning, or error: the training would not start."""

    level: str
    text: str


def start(out: Path, trainer: Trainer) -> list[str]:
    """The cheap checks that every start makes; lines for the log. Every rank calls it, before --out is made.

    Raises:
        FastrexError: the disk cannot hold one checkpoint.
    """
    need = checkpoint_bytes(trainer)
    if trainer.world.main:
        found = disk(out, trainer.config, need, 0, existing=len(checkpoint.steps(out)))
        if found.level == ERROR:
            raise FastrexError(f"train: {found.text}")
    found = open_files(trainer.config, trainer.world)
    return [found.text] if found.level != OK else []


def check_out(out: Path) -> None:
    """Refuse an --out that cannot be written, before images are looked for, which may take long.

    Raises:
        FastrexError: its name is too long, a part of it is a file, or its folder does not admit a new file.
    """
    found = writable(out)
    if found.level == ERROR:
        raise FastrexError(f"train: {found.text}")


def writable(out: Path) -> Finding:
    """Whether ``out``, or the nearest folder above it that is there, takes a new file. Nothing stays."""
    way_out = "choose another --out"
    try:
        os.fsencode(out).decode("utf-8")
    except UnicodeDecodeError:
        return Finding(ERROR, f"--out must be UTF-8, got {str(out)!r}; {way_out}")
    if "\0" in str(out):
        return Finding(ERROR, f"--out must not hold a NUL, got {str(out)!r}; {way_out}")
    full = Path(os.path.abspath(out))
    if len(os.fsencode(full)) + TAIL > PATH_MAX or any(len(os.fsencode(part)) > NAME_MAX for part in full.parts):
        return Finding(ERROR, f"--out must be shorter, got {len(os.fsencode(full))} bytes; {way_out}")
    try:
        folder = files.nearest(full)
        if not folder.is_dir():
            kind = "another file" if folder.exists() else "a broken link"
            raise NotADirectoryError(errno.ENOTDIR, f"{folder} is {kind}")
        _probe(folder)
    except OSError as error:
        return Finding(ERROR, f"--out {out} cannot be written ({error.strerror or error}); {way_out}")
    return Finding(OK, f"--out {out} can be written")


def _probe(folder: Path) -> None:
    """Make a file in ``folder``, without a name where the file system knows such files, else with one; it is gone at
    the end."""
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o600))
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
        name = folder / f".fastrex-{os.getpid()}"
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        name.unlink()


def checkpoint_bytes(trainer: Trainer) -> int:
    """Bytes of all tensors of a checkpoint."""
    return sum(tensor.nbytes for part in trainer.part_shapes().values() for tensor in part.values())


def disk(out: Path, config: Config, one: int, export: int, *, existing: int = 0, steps: int = 0) -> Finding:
    """Whether the disk holds what a run writes.

    Args:
        one: bytes of a checkpoint. export: bytes of the exported encoder. existing: checkpoints that are there.
        steps: of the whole run, for ``checkpoint.keep_every``.
    """
    place = files.nearest(Path(os.path.abspath(out)))
    keep = config.checkpoint
    # The new one is complete before the oldest goes, and logs and reports want room as well.
    count = keep.keep_last + 2 + (steps // keep.keep_every if keep.keep_every else 0)
    need = max(1, count - existing) * one + export
    free, inodes = shutil.disk_usage(place).free, os.statvfs(place)
    fact = f"{place} has {_size(free)} free"
    if free < one + export:
        exact = f"{one + export:,} bytes for one checkpoint, got {free:,}"
        return Finding(ERROR, f"disk: {place} must have {exact}; free some space or choose another --out")
    if inodes.f_files and inodes.f_favail < INODES:
        text = f"disk: {place} must admit {INODES} more files, got {inodes.f_favail} (inodes)"
        return Finding(ERROR, f"{text}; remove some files or choose another --out")
    if free < need:
        text = f"disk: {fact}, {max(1, count - existing)} checkpoints of {_size(one)} may need {_size(need)}"
        return Finding(WARNING, f"{text}; free some space or lower checkpoint.keep_last")
    return Finding(OK, f"disk: {fact}, the run needs up to {_size(need)} ({_size(one)} a checkpoint)")


def file_size(largest: int) -> Finding:
    """Whether this process may write a file of ``largest`` bytes."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and limit < largest:
        text = f"files may have {limit:,} bytes (ulimit -f), a checkpoint has one of {largest:,}"
        return Finding(ERROR, f"{text}; raise the limit")
    return Finding(OK, "files may be as large as checkpoints are (ulimit -f)")


def open_files(config: Config, world: World) -> Finding:
    """Whether the limit on open files is high enough; the soft one is raised where it is not and may be."""
    threads = config.data.threads or world.threads
    # Libraries and devices, shards that stay open, files being read, sockets to every rank.
    need = 256 + 64 + 8 * threads + 4 * world.size
    soft, now = cgroup.admit_files(need)
    if soft == resource.RLIM_INFINITY or soft >= need:
        return Finding(OK, f"open files: {'no limit' if soft == resource.RLIM_INFINITY else f'limit {soft}'}")
    if now < need:
        text = f"open files: about {need} are needed, the limit is {now}"
        return Finding(WARNING, f"{text}; raise it (ulimit -n) or lower data.threads")
    return Finding(NOTE, f"open files: limit raised from {soft} to {now}")


def processes(config: Config, world: World) -> Finding:
    """Whether the threads of this machine's ranks are admitted."""
    threads = config.data.threads or world.threads
    # Reading, decoding, cutting, computing, and a few that the libraries start.
    need = world.local_size * (4 * threads + 32)
    room = cgroup.processes()
    limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    # The user's processes count together and root's not at all.
    if os.geteuid() and limit != resource.RLIM_INFINITY:
        room = limit if room is None else min(room, limit)
    if room is not None and room < need:
        text = f"threads: about {need} are needed, {room} are admitted"
        return Finding(WARNING, f"{text}; raise the limit (ulimit -u, pids.max) or lower data.threads")
    return Finding(OK, f"threads: about {need} are needed, {'no limit' if room is None else f'{room} are admitted'}")


def shared_memory(world: World) -> Finding:
    """/dev/shm, which only NCCL between GPUs of one machine makes use of: images pass between threads."""
    if world.device.type != "cuda" or world.local_size == 1:
        return Finding(OK, "/dev/shm: not used")
    need = SHARED_MEMORY * world.local_size
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError as error:
        free, fact = 0, explain(error)
    else:
        fact = f"{_size(free)} free"
    if free < need:
        text = f"/dev/shm: NCCL may want {_size(need)}, got {fact}"
        return Finding(WARNING, f"{text}; start the container with --shm-size=1g or --ipc=host")
    return Finding(OK, f"/dev/shm: {fact}")


def step_memory(trainer: Trainer) -> tuple[dict[str, int], int, int] | None:
    """Activations of a step by resolution, images in it, bytes of the state; None for an encoder that is not ours."""
    if not isinstance(trainer.model.encoder, ResNet):
        return None
    config = trainer.config
    images = config.optim.batch_size // (config.optim.accumulate * trainer.world.size)
    dtype = DTYPES[trainer.precision]
    kept = budget.activations(trainer.model, trainer.crops, images, config.data.channels, dtype)
    return kept, images, budget.state_bytes(trainer.method, trainer.ema)


def memory(need: int, available: int, world: World) -> Finding:
    """Whether a step fits: ``need`` bytes of a rank, ``available`` ones of its device."""
    if world.device.type == "cpu":
        available //= world.local_size
    text = f"memory: a step needs {_size(need)}"
    if need > available:
        hint = "set optim.accumulate higher, optim.batch_size lower or model.recompute=passes"
        return Finding(ERROR, f"{text} and the libraries' own, a rank has {_size(available)}; {hint}")
    return Finding(OK, f"{text} and the libraries' own, a rank has {_size(available)}")


def device(world: World) -> str:
    """The device in words."""
    if world.device.type == "cuda":
        return f"cuda x {world.size} ({torch.cuda.get_device_name(world.device)})"
    return f"cpu x {world.size} ({world.threads} cores each)"


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"
