"""Checkpoints on disk: safetensors and a JSON manifest with checksums, made visible by one rename, verified when read,
removed when newer ones are complete. No pickle."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from . import files, tensorfile, untrusted
from .errors import FastrexError

FORMAT = 1
STATE = "state.json"
KEPT_BAD = 2  # damaged checkpoints that stay for whoever wants to look at them
_STEP = re.compile(r"step-([0-9]{8,})")
_TEMP = ".tmp-"
_CHECKSUM = "checksum"
_ROOM = 1 << 20  # bytes for state.json and what file systems need beside the tensors
_MAX_STATE = 1 << 26  # bytes of a manifest that is read, and values in it: room for the names of a million classes
_MAX_ITEMS = 1 << 21

Parts = Mapping[str, Mapping[str, Tensor]]


class BadCheckpoint(FastrexError):
    """A checkpoint folder that cannot be trusted; the message says why."""


class WriteFailed(FastrexError):
    """The disk did not take a checkpoint; those before it are as they were."""


@dataclass(frozen=True)
class Loaded:
    """A verified checkpoint: its folder, step, tensors (file stem -> name -> tensor) and manifest."""

    path: Path
    step: int
    parts: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return run / "checkpoints" / f"step-{step:08d}"


def steps(run: Path) -> list[int]:
    """Steps that have a checkpoint folder, rising."""
    found = (_STEP.fullmatch(p.name) for p in (run / "checkpoints").glob("step-*"))
    return sorted(int(m.group(1)) for m in found if m)


def save(run: Path, step: int, parts: Parts, state: Mapping[str, Any], *, keep_last: int, keep_every: int = 0) -> Path:
    """Write ``parts`` (file stem -> named tensors) and ``state``, then remove what :func:`retire` does not keep.

    The folder appears complete or not at all: written beside its place, flushed to the disk, renamed. One that already
    stands there stays when it verifies and is of the same state (by ``digest``), else it is set aside.

    Raises:
        WriteFailed: no room, no permission or a broken disk; nothing of the attempt is left.
    """
    final = folder(run, step)
    needed = sum(t.numel() * t.element_size() for tensors in parts.values() for t in tensors.values())
    try:
        if final.exists():
            with contextlib.suppress(BadCheckpoint):
                if verify(final).get("digest") == state.get("digest"):
                    return final
            set_aside(final)
        if not final.parent.is_dir():
            final.parent.mkdir(parents=True)
            files.sync(run)
        sweep(run)
        if free_bytes(final.parent) < needed + _ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with _temporary(final) as temp:
            facts = {}
            for stem, tensors in parts.items():
                path = temp / f"{stem}.safetensors"
                # safetensors refuses channels-last strides: the values are stored in logical order, the strides are
                # the reader's.
                safetensors.torch.save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, path)
                facts[path.name] = _seal(path)
            manifest = sealed({"format": FORMAT, "step": step, **state, "files": facts})
            (temp / STATE).write_text(_readable(final, manifest), encoding="utf-8")
            files.sync(temp / STATE)
            files.sync(temp)
            temp.rename(final)
            files.sync(final.parent)
    except (OSError, safetensors.SafetensorError) as error:
        room = ""
        with contextlib.suppress(OSError):
            room = f", {free_bytes(files.nearest(final.parent))} are free"
        raise WriteFailed(
            f"checkpoint: {final} could not be written ({getattr(error, 'strerror', None) or error}; it needs {needed} "
            f"bytes{room}); older checkpoints are untouched, free space or choose another --out"
        ) from error
    retire(run, keep_last, keep_every)
    return final


def retire(run: Path, keep_last: int, keep_every: int = 0) -> None:
    """Remove checkpoints older than the newest ``keep_last`` whole ones, those at multiples of ``keep_every`` steps (0
    = none) apart. Damaged ones do not count as kept."""
    whole = [step for step in steps(run) if _looks_whole(folder(run, step))]
    oldest = whole[-keep_last] if len(whole) > keep_last else 0
    for step in steps(run):
        if step < oldest and not (keep_every and step % keep_every == 0):
            path = folder(run, step)
            # Renamed first: a kill in the middle must not leave half a checkpoint under a good name.
            gone = path.with_name(f"{_TEMP}old-{path.name}-{secrets.token_hex(4)}")
            with contextlib.suppress(OSError):
                path.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)


def sweep(run: Path) -> None:
    """Remove what killed writers left half-written; one that still lives holds a lock on its folder."""
    for temp in (run / "checkpoints").glob(f"{_TEMP}*"):
        with contextlib.suppress(FileNotFoundError), _locked(temp) as mine:
            if mine:
                shutil.rmtree(temp, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Rename a checkpoint that is damaged or of another state to ``bad.step-N``, so that its step can be saved again;
    the newest few stay."""
    aside = path.with_name(f"bad.{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        path.rename(aside)
        files.sync(path.parent)
    except OSError as error:
        raise FastrexError(
            f"checkpoint: {path} must be set aside as {aside.name} ({error.strerror}); rename it"
        ) from None
    for old in sorted(path.parent.glob("bad.step-*"), key=lambda p: (len(p.name), p.name))[:-KEPT_BAD]:
        shutil.rmtree(old, ignore_errors=True)
    return aside


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read a checkpoint folder and verify every checksum.

    Raises:
        BadCheckpoint: a file is missing, cut, changed or surplus.
    """
    state = verify(path)
    parts = {}
    for name in state["files"]:
        file = path / name
        try:
            parts[file.stem] = tensorfile.load(file)
        except tensorfile.BadTensors as error:
            raise BadCheckpoint(f"checkpoint: {error}") from None
    return parts, state


def verify(path: Path) -> dict[str, Any]:
    """The manifest, once every file of the folder matches it and nothing else is there.

    Raises:
        BadCheckpoint: see :func:`load`.
    """
    state = read_state(path)
    for name in state["files"]:
        verified(path, state, name)
    if surplus := {p.name for p in path.iterdir()} - {STATE, *state["files"]}:
        raise BadCheckpoint(f"checkpoint: {path} holds {min(surplus)!r}, which its {STATE} does not know")
    return state


def check_sizes(path: Path) -> None:
    """Whether all files are there in full length, without reading them.

    Raises:
        BadCheckpoint: one is cut or missing.
    """
    for name, fact in read_state(path)["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != fact["bytes"]:
            raise BadCheckpoint(f"checkpoint: {file} must have {fact['bytes']} bytes, it is cut or missing")


def verified(path: Path, state: Mapping[str, Any], name: str) -> Path:
    """The file ``name`` of the checkpoint ``path``, once it matches what the manifest says of it.

    Raises:
        BadCheckpoint: it is missing, damaged, or not in the manifest.
    """
    file, fact = path / name, state["files"].get(name)
    with contextlib.suppress(OSError):
        known = fact and file.is_file() and file.stat().st_size == fact["bytes"]
        if known and files.digest(file) == fact["sha256"]:
            return file
    raise BadCheckpoint(f"checkpoint: {file} must match its checksum in {STATE}, it is damaged or missing")


def read_state(path: Path) -> dict[str, Any]:
    """The manifest alone: its shape and its own checksum hold. One without a checksum is of an earlier fastrex, which
    wrote none.

    Raises:
        BadCheckpoint: it is missing, damaged, or no manifest of this step.
    """
    try:
        state = untrusted.read_json(path / STATE, _MAX_STATE, items=_MAX_ITEMS)
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"checkpoint: {path / STATE} cannot be read ({error})") from None
    if (
        not isinstance(state, dict)
        or not isinstance(state.get("files"), dict)
        or type(state.get("step")) is not int
        or type(state.get("format")) is not int
    ):
        raise BadCheckpoint(f"checkpoint: {path / STATE} is no checkpoint manifest")
    # Keys that came together with the checksum: without this, damage in its name would pass for an old manifest.
    if (_CHECKSUM in state or "digest" in state) and state != sealed(state):
        raise BadCheckpoint(f"checkpoint: {path / STATE} must match its own checksum, it is damaged")
    name = _STEP.fullmatch(path.name)
    if name and int(name.group(1)) != state["step"]:
        raise BadCheckpoint(f"checkpoint: {path / STATE} is of step {state['step']}, its folder says {path.name}")
    for file, fact in state["files"].items():
        plain = re.fullmatch(r"[a-z]+\.safetensors", file)
        if not plain or not isinstance(fact, dict) or {"bytes", "sha256"} - fact.keys():
            raise BadCheckpoint(f"checkpoint: {path / STATE} names an unexpected file {file!r}")
    return state


def sealed(state: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with the checksum of all its other keys."""
    content = {key: value for key, value in state.items() if key != _CHECKSUM}
    return {**content, _CHECKSUM: hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def newest_good(run: Path, say: Callable[[str], object] | None = None) -> Loaded | None:
    """The newest checkpoint that verifies.

    With ``say`` (the run's writer) damaged ones before it are reported and set aside as ``bad.step-N``, so that their
    steps can be saved again. Without, or when none is good, nothing in the run is touched.
    """
    damaged: list[tuple[Path, BadCheckpoint]] = []
    for step in reversed(steps(run)):
        path = folder(run, step)
        try:
            parts, state = load(path)
        except BadCheckpoint as error:
            damaged.append((path, error))
            continue
        if say is not None:
            for broken, why in damaged:
                say(f"{why}; set aside as {set_aside(broken).name}, step {step} is used")
        return Loaded(path, step, parts, state)
    return None


def had_any(run: Path) -> bool:
    """Whether a checkpoint was ever completed in this run, good or damaged."""
    return bool(steps(run)) or any((run / "checkpoints").glob("bad.step-*"))


def free_bytes(path: Path) -> int:
    """Room for this user on the file system of ``path``."""
    return shutil.disk_usage(path).free


def state_hash(parts: Parts) -> str:
    """sha256 over all tensors in a fixed order: equal on two ranks or two runs exactly when every bit is equal."""
    total = hashlib.sha256()
    for stem in sorted(parts):
        for name in sorted(parts[stem]):
            tensor = parts[stem][name].detach().cpu().contiguous()
            total.update(f"{stem}/{name}/{tensor.dtype}/{tuple(tensor.shape)}".encode())
            total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@contextlib.contextmanager
def _temporary(final: Path) -> Iterator[Path]:
    """A folder beside ``final``, locked while it lives, gone afterwards unless it was renamed."""
    temp = final.with_name(f"{_TEMP}{final.name}-{os.getpid()}-{secrets.token_hex(4)}")
    temp.mkdir()
    try:
        with _locked(temp):
            yield temp
    finally:
        shutil.rmtree(temp, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock of a folder; False where another process has it. The kernel lets go of a dead process's lock, on
    whatever machine or in whatever container it ran, which a process number would not tell."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        mine = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            mine = False
        except OSError:
            pass  # A file system without locks: the run directory's only writer may sweep.
        yield mine
    finally:
        os.close(handle)


def _seal(path: Path) -> dict[str, Any]:
    """Flush a file, give it the mode that the umask asks for (safetensors leaves 0600) and return its size and
    checksum."""
    path.chmod(0o666 & ~files.umask())
    files.sync(path)
    return {"bytes": path.stat().st_size, "sha256": files.digest(path)}


def _looks_whole(path: Path) -> bool:
    try:
        check_sizes(path)
    except (BadCheckpoint, OSError):
        return False
    return True


def _readable(path: Path, manifest: Mapping[str, Any]) -> str:
    """The manifest's JSON, refused where :func:`read_state` would refuse it."""
    text = json.dumps(manifest, indent=1)
    try:
        untrusted.check_json(text, _MAX_STATE, _MAX_ITEMS)
    except ValueError as error:
        raise WriteFailed(
            f"checkpoint: {path / STATE} could not be read again ({error}); use fewer or shorter class names"
        ) from None
    return text
