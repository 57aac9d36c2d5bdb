"""Checkpoints: safetensors and a JSON manifest with checksums, made visible by one rename, verified when read. No
pickle."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .errors import FastrexError

FORMAT = 1
STATE = "state.json"
_STEP = re.compile(r"step-(\d{8,})")


class BadCheckpoint(FastrexError):
    """A checkpoint folder that cannot be trusted; the message says why."""


def folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return run / "checkpoints" / f"step-{step:08d}"


def steps(run: Path) -> list[int]:
    """Steps that have a checkpoint folder, rising."""
    found = (_STEP.fullmatch(p.name) for p in (run / "checkpoints").glob("step-*"))
    return sorted(int(m.group(1)) for m in found if m)


def save(run: Path, step: int, parts: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int) -> Path:
    """Write ``parts`` (file stem -> named tensors) and ``state``; keep the newest ``keep`` checkpoints.

    The folder appears complete or not at all: written beside its place, flushed to the disk, renamed.
    """
    final = folder(run, step)
    if final.exists():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    for leftover in final.parent.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temp = final.parent / f".tmp-{final.name}-{os.getpid()}"
    try:
        temp.mkdir()
        files = {}
        for stem, tensors in parts.items():
            path = temp / f"{stem}.safetensors"
            # safetensors refuses channels-last strides: the values are stored in logical order, the strides are the
            # reader's.
            safetensors.torch.save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, path)
            files[path.name] = _seal(path)
        manifest = {"format": FORMAT, "step": step, **state, "files": files}
        (temp / STATE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        sync(temp / STATE)
        sync(temp)
        temp.rename(final)
        sync(final.parent)
    except (OSError, safetensors.SafetensorError) as error:
        raise FastrexError(
            f"checkpoint: {final} could not be written ({getattr(error, 'strerror', None) or error}); "
            "older checkpoints are untouched, free space or choose another --out"
        ) from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    for old in steps(run)[:-keep]:
        shutil.rmtree(folder(run, old), ignore_errors=True)
    return final


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read a checkpoint folder and verify every checksum.

    Raises:
        BadCheckpoint: a file is missing, cut or changed, or the format is not the one that this program reads.
    """
    state = read_state(path)
    parts = {}
    for name in state["files"]:
        file = verified(path, state, name)
        try:
            parts[file.stem] = safetensors.torch.load_file(file)
        except (safetensors.SafetensorError, ValueError) as error:
            raise BadCheckpoint(f"checkpoint: {file} is no safetensors file ({error})") from None
    return parts, state


def verified(path: Path, state: Mapping[str, Any], name: str) -> Path:
    """The file ``name`` of the checkpoint ``path``, once it matches what the manifest says of it.

    Raises:
        BadCheckpoint: it is missing, damaged, or not in the manifest.
    """
    file, fact = path / name, state["files"].get(name)
    if fact is None or not file.is_file() or file.stat().st_size != fact["bytes"] or digest(file) != fact["sha256"]:
        raise BadCheckpoint(f"checkpoint: {file} must match its checksum in {STATE}, it is damaged or missing")
    return file


def read_state(path: Path) -> dict[str, Any]:
    """The manifest alone, its shape checked."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"checkpoint: {path / STATE} cannot be read ({error})") from None
    if (
        not isinstance(state, dict)
        or not isinstance(state.get("files"), dict)
        or not isinstance(state.get("step"), int)
    ):
        raise BadCheckpoint(f"checkpoint: {path / STATE} is no checkpoint manifest")
    if state.get("format") != FORMAT:
        raise BadCheckpoint(f"checkpoint: {path} has format {state.get('format')}, this fastrex reads {FORMAT}")
    for name, fact in state["files"].items():
        plain = isinstance(name, str) and re.fullmatch(r"[a-z]+\.safetensors", name)
        if not plain or not isinstance(fact, dict) or {"bytes", "sha256"} - fact.keys():
            raise BadCheckpoint(f"checkpoint: {path / STATE} names an unexpected file {name!r}")
    return state


def newest_good(run: Path, say: Callable[[str], object] | None = None) -> tuple[Path, int] | None:
    """The newest checkpoint that verifies, and its step.

    With ``say`` (the run's writer) a damaged one is reported and set aside as ``bad.step-N``, so that its step can be
    saved again; without, nothing in the run is touched.
    """
    for step in reversed(steps(run)):
        path = folder(run, step)
        try:
            load(path)
        except BadCheckpoint as error:
            if say is None:
                continue
            aside = path.with_name(f"bad.{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            say(f"{error}; set aside as {aside.name}, trying the one before")
        else:
            return path, step
    return None


def had_any(run: Path) -> bool:
    """Whether a checkpoint was ever completed in this run, good or damaged."""
    return bool(steps(run)) or any((run / "checkpoints").glob("bad.step-*"))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a small JSON file in one rename."""
    temp = path.with_name(f".{path.name}.{os.getpid()}")
    temp.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temp.replace(path)


def _seal(path: Path) -> dict[str, Any]:
    """Flush a file, give it the mode that the umask asks for (safetensors leaves 0600) and return its size and
    checksum."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": digest(path)}


def digest(path: Path) -> str:
    """sha256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def state_hash(parts: Mapping[str, Mapping[str, Tensor]]) -> str:
    """sha256 over all tensors in a fixed order: equal on two ranks or two runs exactly when every bit is equal."""
    total = hashlib.sha256()
    for stem in sorted(parts):
        for name in sorted(parts[stem]):
            tensor = parts[stem][name].detach().cpu().contiguous()
            total.update(f"{stem}/{name}/{tensor.dtype}/{tuple(tensor.shape)}".encode())
            total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
