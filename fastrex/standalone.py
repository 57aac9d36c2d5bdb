"""What the command line does outside a training: evaluate a source, show a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import checkpoint, distributed, export, files, objectives, rundir
from . import config as config_module
from .config import Config
from .data.dataset import open_dataset, open_index
from .data.index import Index
from .data.scan import refuse_one_class
from .distributed import World
from .errors import FastrexError, UsageError
from .evaluate import evaluate
from .step import Trainer


def evaluate_source(source: str | Path, settings: Sequence[str], device: str = "auto") -> dict[str, Any]:
    """Held-out accuracies of ``source``; see ``fastrex eval``.

    Raises:
        FastrexError: no data, one class only, nothing held out, or an unreadable source.
    """
    path = Path(source)
    with distributed.world(device) as world:
        if (path / rundir.CONFIG).is_file() and checkpoint.steps(path):
            config = config_module.read(path / rundir.CONFIG)
            config = objectives.resolve(config_module.override(config, settings))
            index = _held_out(config, world)
            found = checkpoint.newest_good(path)
            if found is None:
                raise FastrexError(f"eval: {path} must hold a good checkpoint, all are damaged")
            if found.state.get("classes") == list(index.classes):
                trainer = Trainer(config, len(index.classes), world)
                trainer.load(found.parts)
                return {"source": str(found.path), "step": found.step, **trainer.evaluate(index)}
            path = found.path
        else:
            facts = export.load_source(path)
            config = config_module.override(Config(recipe="eval"), [*facts.settings(), *settings])
            index = _held_out(config, world)
        encoder = export.load_encoder(path).to(world.device)
        return {"source": str(path), **evaluate(encoder, index, config, world, contextlib.nullcontext)}


def _held_out(config: Config, world: World) -> Index:
    index = open_index(config, world)
    refuse_one_class(index.root, index.classes, "eval")
    if not len(index.rows("val", config.data.held_out)):
        raise FastrexError(
            f"eval: {config.data.path} must have held-out images, got none; add a val/ folder or set data.held_out=0.1"
        )
    return index


def show_batch(
    config: Config, epoch: int, step: int, rows: int, out: Path, names: Sequence[str] = (), command: str = ""
) -> None:
    """Show ``rows`` images of a batch, or the images ``names``, with their crops: an HTML page or a PNG contact sheet.

    Raises:
        FastrexError: no data, a step or a name that there is not, or an image that cannot be read.
    """
    from .data import page, show

    if out.suffix.lower() not in (".html", ".png"):
        raise UsageError(f"data show: --out must end in .html or .png, got {str(out)!r}")
    config = objectives.resolve(config)
    with distributed.world("cpu") as world:
        data = open_dataset(config, world, labelled=objectives.needs_labels(config))
    if data.index is None or data.plan is None:
        raise FastrexError("data show: synthetic data has nothing to show; pass --data FOLDER")
    if names:
        samples = show.of_names(data.index, data.plan, config.data, epoch, names)
        title = f"{len(names)} chosen image{'s' * (len(names) > 1)} in epoch {epoch}"
    elif step >= data.steps_per_epoch:
        raise FastrexError(f"data show: --step must be below the {data.steps_per_epoch} steps of an epoch, got {step}")
    else:
        samples = show.of_batch(data.index, data.plan, config.data, epoch, step, rows)
        title = f"Step {step} of epoch {epoch}: {len(samples)} of {data.plan.batch_size} places"
    if out.suffix.lower() == ".png":
        show.contact_sheet(samples, out)
        return
    text = page.page(samples, config, title, command, data.notices)
    try:
        files.write_output(out, text)
    except OSError as error:
        raise FastrexError(f"cannot write {str(out)!r} ({error.strerror or error}); name another file") from error
