"""Device-side averages, the progress line, and where they are written: metrics.jsonl, train.log, TensorBoard, W&B."""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from . import files, streams, untrusted
from .config import Config
from .distributed import World, sum_
from .errors import FastrexError, explain, one_line

MAX_LINE = 1 << 16
# Every other device value is logged as train/<name>.
LOGGED = {"empty_classes": "bank/empty_classes", "age": "bank/age", "filled": "bank/filled"}


class Meter:
    """Sums of 0-d device tensors; :class:`Reading` brings them to the host."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().to(torch.float32)
            # Never the tensor itself: a captured step writes the next step's value into the same memory.
            self.sums[name] = self.sums[name].add_(value) if name in self.sums else value.clone()
        self.count += 1

    def take(self, world: World) -> dict[str, Tensor]:
        """Means over steps and ranks, on the device; starts anew."""
        if not self.count:
            return {}
        total = sum_(torch.stack(list(self.sums.values())), world) / (self.count * world.size)
        means = dict(zip(self.sums, total.unbind(), strict=True))
        self.sums, self.count = {}, 0
        return means


class Reading:
    """Device values of a step on their way to the host, and what the host knew when they were sent.

    On a GPU the copy queues behind the steps before it, and nobody waits for it: an interval later it has long arrived.

    Args:
        values: 0-d tensors. step: their step. known: what else belongs to the record. left_s: until the end of the run.
    """

    def __init__(self, values: Mapping[str, Tensor], step: int, known: Mapping[str, float], left_s: float) -> None:
        self.names, self.step, self.known, self.left_s = list(values), step, known, left_s
        packed = torch.stack([value.to(torch.float64) for value in values.values()])
        self.event: torch.cuda.Event | None = None
        if packed.device.type == "cuda":
            self.host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self.host.copy_(packed, non_blocking=True)
            self.event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.event.record()
        else:
            self.host = packed

    def values(self) -> dict[str, float]:
        """The numbers; waits for them if they are still under way."""
        if self.event is not None:
            self.event.synchronize()
        return dict(zip(self.names, self.host.tolist(), strict=True))


class Log:
    """Lines for people and records for programs. Only rank 0 writes, apart from :meth:`anyone`."""

    def __init__(self, run: Path, config: Config, world: World, resume_step: int | None) -> None:
        self.main, self.rank, self.run = world.main, world.rank, run
        self.board: Any = None
        self.wandb: Any = None
        self._full = False
        if not self.main:
            return
        path = run / "metrics.jsonl"
        try:
            if resume_step is not None and path.exists():
                _drop_after(path, resume_step)
            with contextlib.ExitStack() as opened:
                self.text = opened.enter_context(untrusted.to_append(run / "train.log"))
                self.records = untrusted.to_append(path)
                opened.pop_all()
        except (OSError, ValueError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or f"its {path.name}: {error}"
            raise FastrexError(
                f"train: --out {run} must take the run's log, it does not ({reason}); remove what stands there, or "
                "choose another --out"
            ) from error
        if config.run.tensorboard:
            # What TensorBoard is to forget begins with this step itself.
            self.board = _tensorboard()(str(run), purge_step=None if resume_step is None else resume_step + 1)
        if config.run.wandb:
            # The directory's name is the run's identity, so that a resumed run continues its own record.
            self.wandb = _wandb().init(
                project=config.run.wandb, dir=str(run), id=run.resolve().name, name=run.name, resume="allow"
            )

    def line(self, text: str) -> None:
        """One line on the terminal and in train.log."""
        if self.main:
            streams.say(text)
            self._append(self.text, f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}\n")

    def anyone(self, text: str) -> None:
        """As :meth:`line`, but from whichever rank has something to say; not for what all of them know."""
        if self.main:
            self.line(text)
            return
        text = f"[rank {self.rank}] {text}"
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)
        # Opened for this line only: rank 0 appends to the same file. Elsewhere the folder may not exist.
        with contextlib.suppress(OSError), untrusted.to_append(self.run / "train.log") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}\n")

    def news(self, lines: deque[str]) -> None:
        """Take what a loader has to say out of ``lines``."""
        while lines:
            self.anyone(lines.popleft())

    @contextlib.contextmanager
    def telling(self, lines: deque[str]) -> Iterator[None]:
        """What stands in ``lines`` at the end is told, also when an error ends it."""
        try:
            yield
        finally:
            self.news(lines)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl: ``step``, ``time`` (Unix seconds) and the named values."""
        if not self.main:
            return
        # JSON has no NaN: a number gone bad is null.
        plain = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._append(self.records, json.dumps({"step": step, "time": round(time.time(), 3), **plain}) + "\n")
        if self.board is not None:
            with self._optional("board"):
                for name, value in values.items():
                    self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            with self._optional("wandb"):
                self.wandb.log(dict(values), step=step)

    @contextlib.contextmanager
    def _optional(self, writer: str) -> Iterator[None]:
        """A full disk or a service out of reach costs that writer, not the run. It gets no more: what TensorBoard's
        thread has met once is raised at every call."""
        try:
            yield
        except Exception as error:
            setattr(self, writer, None)
            name = {"board": "TensorBoard", "wandb": "W&B"}[writer]
            reason = explain(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            reason = one_line(reason[:300])
            self.line(f"{name} cannot go on ({reason}); it lacks what follows, metrics.jsonl has it")

    def _append(self, file: IO[str], text: str) -> None:
        """A full disk costs lines of the log, not the run; they follow once there is room."""
        try:
            file.write(text)
            file.flush()
        except OSError as error:
            if not self._full:
                self._full = True
                with contextlib.suppress(OSError):
                    print(f"fastrex: {explain(error)}; {file.name} lacks lines", file=sys.stderr, flush=True)

    def evaluated(self, step: int) -> bool:
        """Whether an evaluation of this step is on record (rank 0 knows)."""
        if not self.main:
            return False
        found = records(self.run / "metrics.jsonl")
        return any(record["step"] == step and "eval/knn" in record for _, record in found)

    def close(self) -> None:
        if self.main:
            if self.board is not None:
                with self._optional("board"):
                    self.board.close()
            if self.wandb is not None:
                with self._optional("wandb"):
                    self.wandb.finish()
            for file in (self.text, self.records):
                with contextlib.suppress(OSError):
                    file.close()


def progress(step: int, total: int, epoch: int, values: Mapping[str, float], eta_s: float) -> str:
    """The progress line: step, loss, top-1, learning rate, images/s, share of time waiting for data, time left."""
    left = max(0, round(eta_s))
    clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}" if left >= 3600 else f"{left // 60}:{left % 60:02d}"
    return (
        f"step {step}/{total} epoch {epoch} | loss {values['train/loss']:.4f} | top-1 {values['train/top1']:6.2%} | "
        f"lr {values['train/lr']:.5f} | {values['perf/images_per_s']:.1f} images/s | "
        f"data wait {values['perf/data_wait']:.0%} | eta {clock}"
    )


def _drop_after(path: Path, step: int) -> None:
    """Forget records past the checkpoint that training continues from: those steps are about to be made again."""
    kept = [line for line, record in records(path) if record["step"] <= step]
    files.write_text(path, "".join(f"{line}\n" for line in kept))


def records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of metrics.jsonl with what they say; what is none, as the line that a kill has cut, is left out."""
    with untrusted.opened(path) as raw, io.TextIOWrapper(raw, encoding="utf-8", errors="replace") as file:
        while line := file.readline(MAX_LINE):
            with contextlib.suppress(ValueError):
                record = untrusted.parse_json(line)
                if isinstance(record, dict) and type(record.get("step")) is int:
                    yield line.rstrip("\n"), record


def check_writers(config: Config) -> None:
    """Say what a wanted logger lacks, before a run directory exists."""
    if config.run.tensorboard:
        _tensorboard()
    if config.run.wandb:
        _wandb()


def _tensorboard() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise FastrexError(
            "train: run.tensorboard=true needs TensorBoard; pip install 'fastrex[tensorboard]'"
        ) from None
    return SummaryWriter


def _wandb() -> Any:
    try:
        import wandb
    except ImportError:
        raise FastrexError("train: run.wandb=PROJECT needs W&B; pip install 'fastrex[wandb]'") from None
    return wandb
