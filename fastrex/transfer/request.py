"""What ``fastrex transfer`` was asked for: whatever can be wrong with it is found here, before an image is decoded."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .. import export, rundir
from ..errors import FastrexError, UsageError
from . import catalog, comparison, features, folder, keys, probes, results, search
from .catalog import Task
from .features import Transform

MARKDOWN, PAGE = "transfer.md", "transfer.html"
FILES = (results.FILE, MARKDOWN, PAGE)


@dataclass(frozen=True, eq=False)
class Request:
    """A transfer that can begin.

    encoder: on the CPU, in eval mode. ``result``: what ``out`` holds already, without sets where it is new. ``others``:
    rows of the comparison. cache: where features are kept, None: nowhere.
    """

    source: str
    tasks: Sequence[Task]
    out: Path
    probes: tuple[str, ...]
    protocol: str
    seeds: tuple[int, ...]
    shots: tuple[int, ...]
    cache: Path | None
    encoder: nn.Module
    identity: str
    transform: Transform
    result: results.Result
    others: Sequence[comparison.Row]


def check(
    source: str,
    sets: Sequence[str],
    *,
    root: Path | None,
    out: Path | None,
    probes: Sequence[str],
    protocol: str,
    seeds: Sequence[int],
    shots: Sequence[int],
    size: int | None,
    cache: Path | None,
    keep: bool,
    compare: Sequence[Path],
) -> Request:
    """The request of these words; see :func:`fastrex.transfer.suite.run`.

    Raises:
        UsageError: words that mean nothing.
        FastrexError: an encoder, a folder or a result that cannot be used, or a package that is missing.
    """
    tasks = catalog.tasks(sets, root)
    wanted, seeds, shots = _known_probes(probes), _seeds(seeds), _shots(shots)
    if protocol == "paper" and importlib.util.find_spec("optuna") is None:
        raise FastrexError(search.NO_OPTUNA)
    out = _folder(source) if out is None else out
    folder.claim("transfer", out, FILES)
    others = comparison.compare(compare, out)
    found = export.load_source(source)
    transform = Transform.of(found, size)
    encoder = export.assemble(found, source)
    _try(encoder, transform)
    identity = keys.identity(found)
    result = {
        "version": results.VERSION,
        "source": source,
        "encoder": {
            "identity": identity,
            "arch": str(found.arch["arch"]),
            "features": int(encoder.num_features),  # type: ignore[arg-type]
            "architecture": dict(found.arch),
        },
        "transform": transform.facts(),
        "protocol": protocol,
        "seeds": list(seeds),
        "shots": list(shots),
        "environment": rundir.environment(),
        "sets": [],
        "skipped": [],
        "means": {},
    }
    return Request(
        source,
        tasks,
        out,
        wanted,
        protocol,
        seeds,
        shots,
        (cache or features.default_cache()) if keep else None,
        encoder,
        identity,
        transform,
        continued(out, result),
        others,
    )


def _folder(source: str) -> Path:
    """Where the result goes by itself."""
    place = Path(source)
    if (place / rundir.CONFIG).is_file() or (place / "checkpoints").is_dir():
        return place / "transfer"
    whole = Path(os.path.abspath(place))
    return Path(f"transfer-{whole.name if whole.is_dir() else whole.stem}")


def _known_probes(words: Sequence[str]) -> tuple[str, ...]:
    if unknown := [word for word in words if word not in probes.PROBES]:
        raise UsageError(f"--probes must be some of {', '.join(probes.PROBES)}, got {unknown[0]!r}")
    return tuple(dict.fromkeys(words))


def _seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    if not seeds:
        raise UsageError("--seeds must name a whole number, got none")
    return tuple(seeds)


def _shots(shots: Sequence[int]) -> tuple[int, ...]:
    if min(shots, default=1) < 1:
        raise UsageError("--shots must be numbers of images per class of at least 1, got 0")
    return tuple(sorted(shots))


def _try(encoder: nn.Module, transform: Transform) -> None:
    """Whether the encoder takes images of this size at all."""
    blank = torch.zeros(1, transform.channels, transform.size, transform.size)
    try:
        with torch.inference_mode():
            shape = tuple(encoder(blank).shape)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FastrexError(
            f"transfer: the encoder must take images of {transform.size} px, it does not ({reason[:200]}); "
            "choose another --size"
        ) from None
    if shape != (1, int(encoder.num_features)):  # type: ignore[arg-type]
        raise FastrexError(f"transfer: the encoder must give one row of features per image, got the shape {shape}")


def continued(out: Path, fresh: results.Result) -> results.Result:
    """``fresh`` with what ``out`` already holds of sets.

    Raises:
        FastrexError: they were measured of another encoder, or in another way.
    """
    path = out / results.FILE
    if not path.exists():
        return fresh
    before = results.read(path)
    for what, there, asked in (
        ("encoder", before["encoder"]["identity"][:12], fresh["encoder"]["identity"][:12]),
        ("transform", before["transform"], fresh["transform"]),
        ("--protocol", before["protocol"], fresh["protocol"]),
        ("--seeds", before["seeds"], fresh["seeds"]),
    ):
        if there != asked:
            raise FastrexError(
                f"transfer: --out {out} holds results with the {what} {there}, asked for is {asked}; remove {path} if "
                "they are of no more use (of a run that has trained on, say), or choose another --out"
            )
    shots = sorted({*before.get("shots", []), *fresh["shots"]})
    return {**fresh, "sets": before["sets"], "shots": shots, "skipped": before["skipped"]}
