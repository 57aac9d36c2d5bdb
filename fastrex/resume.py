"""What a run saves and when, how it continues from that, and how a new run starts from another's weights."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint, digests, distributed, export, manifest
from .checkpoint import Parts
from .data.dataset import Dataset
from .errors import FastrexError
from .model.resnet import match_channels
from .optim import load_tensors
from .settings import toml_value
from .step import Trainer

# How long a save waits for the one before: a slow disk is waited for, one that hangs must not stall the training.
PATIENCE_S = 60.0
MESSAGE_BYTES = 1 << 26  # broadcast at a time: what the ranks hold beside their own state while a run is resumed


class Saving:
    """Checkpoints of a run while it trains. Rank 0 copies the state to the host and writes it in a thread.

    A stored checkpoint is the state at the call of :meth:`save`, whatever training does meanwhile. One is written at a
    time. ``say`` takes lines for the log. The interpreter does not end before the thread has. ``busy``: a checkpoint is
    being written.
    """

    def __init__(self, trainer: Trainer, data: Dataset, run: Path, say: Callable[[str], object]) -> None:
        self.trainer, self.data, self.run, self.say = trainer, data, run, say
        self.options = trainer.config.checkpoint
        self._thread: threading.Thread | None = None
        self._writing, self._error = -1, list[BaseException]()
        self._on_disk = -1
        self._completed: int | None = None
        self._waited = False
        self._busy = threading.Event()
        self.busy = self._busy.is_set
        self._pinned: dict[str, Tensor] = {}

    def save(self, step: int, *, last: bool = False, then: Callable[[], object] = lambda: None) -> None:
        """Store the state after ``step`` steps; all ranks call it.

        While the write before hangs, one that may fail (``checkpoint.on_failure=continue``) is left out.

        Args:
            last: return when the checkpoint is on the disk, on all ranks.
            then: with ``last``, what rank 0 does once the checkpoint is on the disk, while it is still ``busy``.

        Raises:
            FastrexError: the ranks hold different states (on all of them, nothing is written), or a checkpoint could
                not be written and must be (``last``, or ``checkpoint.on_failure=stop``).
        """
        trainer, world = self.trainer, self.trainer.world
        if not last and self.options.on_failure == "continue" and self._hangs():
            self.say(f"no checkpoint of step {step}: that of step {self._writing} is still being written")
            return
        self._agree(must=False)
        trainer.check_finite(step)
        parts = trainer.parts()
        digest = digests.state_digest(parts, manifest.digested(trainer.config, self.data, step))
        if odd := digests.disagreement(digest, world):
            raise FastrexError(
                f"checkpoint: all ranks must hold the same state at step {step}, but {odd} (failing memory or GPU?); "
                "nothing was written, resume from the last good checkpoint with --resume must"
            )
        waiting = last or not self.options.background
        if world.main and self._on_disk != step:
            facts = manifest.facts(trainer.config, self.data, world, step, digest)
            self._start(step, parts, facts, waiting, then)
        elif world.main and last:
            then()
        if waiting:
            self._agree(must=last)

    def poll(self) -> int | None:
        """The step of a checkpoint that was completed since the last call, on rank 0; costs nothing.

        Raises:
            FastrexError: one could not be written, with ``checkpoint.on_failure=stop``.
        """
        if self._thread is not None and not self._thread.is_alive():
            self._finish()
        step, self._completed = self._completed, None
        return step

    def close(self) -> None:
        """Wait for the write under way. A failure is only said: the run is ending for a reason of its own."""
        try:
            self._finish()
        except checkpoint.WriteFailed as error:
            self.say(str(error))

    def _hangs(self) -> bool:
        """Whether the write under way does not come to an end; rank 0 waits for it, and once only."""
        if self._thread is not None and not self._waited:
            self._thread.join(min(PATIENCE_S, self.trainer.config.run.stall_s / 4 or PATIENCE_S))
            self._waited = self._thread.is_alive()
        alive = self._thread is not None and self._thread.is_alive()
        return bool(distributed.from_main(int(alive), self.trainer.world))

    def newest(self) -> int:
        """The step of the newest checkpoint once the write under way has ended, -1 where there is none; all ranks call
        it."""
        world = self.trainer.world
        if world.main:
            self.close()
        steps = checkpoint.steps(self.run) if world.main else []
        return distributed.from_main(steps[-1] if steps else -1, world)

    def _start(self, step: int, parts: Parts, state: dict[str, Any], waiting: bool, then: Callable[[], object]) -> None:
        # Nobody changes the state while all wait for the disk: then no copy is needed.
        copy, ready = (parts, None) if waiting else self._copied(parts)

        def write() -> None:
            try:
                if ready is not None:
                    ready.synchronize()
                checkpoint.save(
                    self.run, step, copy, state, keep_last=self.options.keep_last, keep_every=self.options.keep_every
                )
                if waiting:
                    then()
            except BaseException as error:
                self._error.append(error)
            finally:
                self._busy.clear()

        self._writing, self._waited = step, False
        self._busy.set()
        if waiting:
            write()
            return
        # No daemon: an interpreter that ends waits for it.
        self._thread = threading.Thread(target=write, name="checkpoint")
        self._thread.start()

    def _agree(self, must: bool) -> None:
        """:meth:`_finish` on rank 0, its failure raised on all ranks."""
        problem = ""
        try:
            self._finish(must)
        except checkpoint.WriteFailed as error:
            problem = str(error)
        if problem := distributed.text_from_main(problem, self.trainer.world):
            raise checkpoint.WriteFailed(problem)

    def _finish(self, must: bool = False) -> None:
        """Wait for the write under way, if there is one, and take note of how it ended."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._writing < 0:
            return
        step, self._writing = self._writing, -1
        if not self._error:
            self._on_disk = self._completed = step
            return
        error = self._error.pop()
        if must or self.options.on_failure == "stop" or not isinstance(error, checkpoint.WriteFailed):
            raise error
        self.say(f"{error}; training goes on without it, the next checkpoint is tried as ever")

    def _copied(self, parts: Parts) -> tuple[Parts, Any]:
        """The tensors on the host, and an event after which they are there (None: they are).

        From a GPU they go to page-locked memory, in the order of its stream: the next step is queued behind them, and
        the host waits for nothing.
        """
        if self.trainer.world.device.type != "cuda":
            return {stem: {name: _clone(t) for name, t in tensors.items()} for stem, tensors in parts.items()}, None
        copies: dict[str, dict[str, Tensor]] = {}
        for stem, tensors in parts.items():
            for name, tensor in tensors.items():
                key = f"{stem}/{name}"
                if key not in self._pinned:
                    self._pinned[key] = torch.empty_like(tensor, device="cpu", pin_memory=True, requires_grad=False)
                copies.setdefault(stem, {})[name] = self._pinned[key].copy_(tensor.detach(), non_blocking=True)
        ready = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        ready.record()
        return copies, ready


def _clone(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def restore(
    trainer: Trainer, data: Dataset, run: Path, *, allow_world_size_change: bool = False
) -> tuple[int, list[str]]:
    """Continue from the newest good checkpoint, which rank 0 reads and verifies once and sends to the others.

    Returns (step, lines for the log); a run that was killed before its first checkpoint starts from step 0. Before
    anything is loaded, all of it is checked; afterwards every rank holds the state that was saved, to the bit.

    Raises:
        FastrexError: all checkpoints are damaged, or the newest good one is not of this run, on all ranks alike.
    """
    world = trainer.world
    mine = trainer.part_shapes()
    lines, problem, found = list[str](), "", None
    if world.main:
        try:
            checkpoint.sweep(run)
            found = checkpoint.newest_good(run, lines.append)
            if found is not None:
                lines += manifest.check(found.state, trainer.config, data, world, run, allow_world_size_change)
                check_parts(mine, found.parts, found.path, run)
                trainer.objective.check(found.parts["bank"])
            elif checkpoint.had_any(run):
                problem = (
                    f"resume: {run / 'checkpoints'} must hold a good checkpoint, all are damaged; start a new --out"
                )
        except FastrexError as error:
            problem = str(error)
    words = {"problem": problem, "lines": lines, "step": -1, "digest": ""}
    if found is not None:
        words |= {"step": found.step, "digest": found.state.get("digest", "")}
    heard = json.loads(distributed.text_from_main(json.dumps(words), world))
    if heard["problem"]:
        raise FastrexError(heard["problem"])
    step = int(heard["step"])
    if step < 0:
        return 0, ["no checkpoint yet: starting from step 0"]
    parts, found = found.parts if found else None, None
    trainer.load(parts if world.size == 1 and parts else _received(parts, mine, trainer))
    # The digest joins split rows on the host once more: what was read must not stand beside them.
    parts = None
    loaded = digests.state_digest(trainer.parts(), manifest.digested(trainer.config, data, step))
    odd = digests.disagreement(loaded, world)
    if odd or str(loaded) != heard["digest"]:
        raise FastrexError(
            f"resume: what was loaded from step {step} must be what was saved, digest {heard['digest']}, got {loaded}"
            f"{f' ({odd})' if odd else ''}; memory or a GPU may be failing, try --resume must again on another machine"
        )
    return step, [*heard["lines"], f"resumed from {checkpoint.folder(run, step).name}"]


def check_parts(mine: Parts, given: Parts, path: Path, run: Path) -> None:
    """Refuse a checkpoint unless it has exactly the tensors ``mine``, by name, shape and dtype.

    Raises:
        FastrexError: names the first one that is missing, foreign or different.
    """
    way_out = f"it belongs to another configuration; start a new run with --init-from {run}"
    for kind, have, want in (("lacks", given, mine), ("has a foreign", mine, given)):
        for stem, tensors in want.items():
            if stem not in have:
                raise FastrexError(f"resume: {path.name} {kind} part {stem!r}; {way_out}")
            if absent := sorted(tensors.keys() - have[stem].keys()):
                raise FastrexError(f"resume: {path.name} {kind} {stem} tensor {absent[0]!r}; {way_out}")
    for stem, tensors in mine.items():
        for name, tensor in tensors.items():
            own, other = _kind_of(tensor), _kind_of(given[stem][name])
            if own != other:
                raise FastrexError(
                    f"resume: {stem} tensor {name!r} of {path.name} must be {own}, got {other}; {way_out}"
                )


def _kind_of(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _received(parts: Parts | None, mine: Parts, trainer: Trainer) -> dict[str, dict[str, Tensor]]:
    """The tensors that rank 0 has read, on every rank, shaped as ``mine``: split rows on the host, all others on the
    device."""
    world, split = trainer.world, trainer.split_parts()

    def room(stem: str, name: str, like: Tensor) -> Tensor:
        device = torch.device("cpu") if (stem, name) in split else world.device
        return (
            torch.empty(like.shape, dtype=like.dtype, device=device) if parts is None else parts[stem][name].to(device)
        )

    received = {stem: {name: room(stem, name, t) for name, t in tensors.items()} for stem, tensors in mine.items()}
    for group in _groups([received[stem][name] for stem in sorted(mine) for name in sorted(mine[stem])]):
        # Rows that ranks share out come on the host, which NCCL does not reach.
        boxes = [piece.to(world.device) for piece in group]
        distributed.broadcast_(boxes, world)
        for piece, box in zip(group, boxes, strict=True):
            if box is not piece:
                piece.copy_(box)
    return received


def _groups(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Flat pieces of the tensors, about ``MESSAGE_BYTES`` at a time."""
    group, size = list[Tensor](), 0
    for tensor in tensors:
        for piece in torch.split(tensor.view(-1), MESSAGE_BYTES // tensor.element_size()):
            group.append(piece)
            size += piece.numel() * piece.element_size()
            if size >= MESSAGE_BYTES:
                yield group
                group, size = [], 0
    if group:
        yield group


def init_from(trainer: Trainer, source: Path | str) -> str:
    """Start the encoder (and its momentum copy) from other weights; projector, objective and bank start fresh.

    Returns:
        A line for the log: where the weights come from, and what of the images or the network is not as it was there.

    Raises:
        FastrexError: they are those of another network.
    """
    loaded = export.load_source(source)
    encoder = trainer.model.encoder
    own = {n: t for n, t in encoder.state_dict().items() if not n.endswith("num_batches_tracked")}
    given = {n: t for n, t in loaded.state.items() if not n.endswith("num_batches_tracked")}
    given, words = match_channels(given, own)
    # Published weights may be in 16 bits; unlike a checkpoint's, they need not be what was saved to the bit.
    given = {n: t.to(own[n].dtype) if n in own and t.is_floating_point() else t for n, t in given.items()}
    try:
        load_tensors(own, given, "encoder")
    except FastrexError:
        raise FastrexError(
            f"train: --init-from must hold a {trainer.config.model.arch} (stem {trainer.config.model.stem}, "
            f"width {trainer.config.model.width}) like the recipe, got {_kind(loaded.arch)}; set model.* to that"
        ) from None
    if trainer.ema is not None:
        trainer.ema.encoder.load_state_dict(encoder.state_dict())
    trainer.refresh_copies()
    said = [
        _kind(loaded.arch),
        *(f"{key} {loaded.provenance[key]}" for key in ("run", "step") if key in loaded.provenance),
    ]
    return "; ".join(
        [f"encoder starts from {source}: {', '.join(said)}", *([words] if words else []), *_odd(trainer, loaded)]
    )


def _odd(trainer: Trainer, loaded: export.Source) -> list[str]:
    """Settings that give the same weights other features than where they come from."""
    config = trainer.config
    pairs = [("model.bn_eps", config.model.bn_eps, loaded.arch["bn_eps"])]
    pairs += [(f"data.{key}", getattr(config.data, key), loaded.preprocessing.get(key)) for key in ("mean", "std")]
    return [
        f"{name} is {toml_value(own)} here and was {toml_value(given)} there"
        for name, own, given in pairs
        if given is not None and own != given
    ]


def _kind(arch: Mapping[str, object]) -> str:
    return f"{arch['arch']} (stem {arch['stem']}, width {arch['width']})"
