"""The projector that a run has trained with its encoder, and the features behind each of its layers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import checkpoint, tensorfile
from .. import config as config_module
from ..errors import FastrexError
from ..export import WEIGHTS
from ..model.projector import Projector
from ..rundir import CONFIG

PREFIX = "projector."
_CHUNK = 4096  # rows


def find(source: str) -> tuple[Path, Projector | None]:
    """Where the encoder of ``source`` is to be read, and the projector of the same step in eval mode, on the CPU.

    A run gives its newest good checkpoint. No projector: an export, a file of others, a run without one
    (``projector.enabled=false``), a checkpoint whose run and configuration are gone.

    Raises:
        FastrexError: the checkpoint's projector is not the one that the configuration describes.
    """
    path = Path(source)
    if path.is_dir() and ((path / CONFIG).is_file() or (path / "checkpoints").is_dir()):
        for step in reversed(checkpoint.steps(path)):
            folder = checkpoint.folder(path, step)
            try:
                return folder, _read(folder)
            except checkpoint.BadCheckpoint:
                continue
        return path, None
    if path.name == WEIGHTS and (path.parent / checkpoint.STATE).is_file():
        path = path.parent
    return path, _read(path) if path.is_dir() and (path / checkpoint.STATE).is_file() else None


def _read(folder: Path) -> Projector | None:
    file = checkpoint.verified(folder, checkpoint.read_state(folder), WEIGHTS)
    described = folder.resolve().parent.parent / CONFIG
    if not described.is_file():
        return None
    config = config_module.read(described)
    if not config.projector.enabled:
        return None
    tensors = tensorfile.load(file)
    state = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    first = state.get("layers.0.weight")
    try:
        if first is None or first.ndim != 2 or config.projector.hidden_layers >= len(state):
            raise RuntimeError(f"it has {len(state)} tensors")
        # Without memory: a configuration can claim any width.
        with torch.device("meta"):
            projector = Projector(first.shape[1], config.projector, bn_eps=config.model.bn_eps, bn="torch")
        projector.load_state_dict(state, assign=True)
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:200]
        raise FastrexError(
            f"analyze: the projector in {file} must be the one of {described}, it is not: {problem}; one of them was "
            "replaced"
        ) from None
    return projector.eval().requires_grad_(False)


def depth(projector: Projector) -> int:
    """Its number of hidden layers."""
    return len(projector.stages()) - 1


@torch.inference_mode()
def layers(features: Tensor, projector: Projector | None) -> Iterator[tuple[str, Tensor]]:
    """ "encoder" with ``features`` [N, D], then "hidden 1", ... (behind the activation) and "output" with what
    ``projector`` makes of them, float32 [N, width]; two of them are held at a time. All on the device of both."""
    yield "encoder", features
    if projector is None:
        return
    x = nn.functional.normalize(features, dim=1, eps=1e-12) if projector.input_norm else features
    stages = projector.stages()
    for number, stage in enumerate(stages, 1):
        x = torch.cat([stage(part) for part in torch.split(x, _CHUNK)])
        yield f"hidden {number}" if number < len(stages) else "output", x
