"""From a configuration to an exported encoder: set-up, the loop, checkpoints, evaluation. To be read from top to
bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shlex
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import torch

import fastrex_kernels

from . import budget, checkpoint, distributed, export, memory, objectives, preflight, rundir, schedule, signals, streams
from . import resume as resume_module
from .config import STAGES, Config
from .data.dataset import Dataset, open_dataset
from .data.index import save as save_index
from .data.loader import Batch
from .distributed import World
from .errors import DivergedError, FastrexError
from .metrics import LOGGED, Log, Meter, Reading, check_writers, progress
from .step import Trainer, resolve_precision
from .verdict import Interrupted, RankLost, Stopped


@dataclass(frozen=True)
class Result:
    """How a run ended. ``state``: completed or preempted; ``metrics``: the last evaluation; ``encoder``: the export
    folder."""

    out: Path
    state: str
    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    encoder: Path | None = None


def train(
    config: Config | None = None,
    *,
    out: Path | str | None = None,
    resume: str = "never",
    init_from: Path | str | None = None,
    max_steps: int | None = None,
    device: str = "auto",
    allow_world_size_change: bool = False,
) -> Result:
    """Train from a configuration to an exported encoder; the same as the command ``fastrex train``.

    Args:
        config: from :func:`fastrex.load_config`; None continues what ``out`` holds (with ``resume``).
        out: run directory; default ``runs/<recipe>-<UTC time>``.
        resume: never, auto (if there is a run in ``out``) or must.
        init_from: encoder weights to start a new run from: a run, a safetensors file or an official ``.pth``.
        max_steps: stop after this many steps; the schedule keeps its length.
        device: auto, cpu or cuda.
        allow_world_size_change: continue a run on another number of ranks than it was saved from: the same global
            batches, not the same bits.

    Raises:
        FastrexError: one line that names what is wrong and the way out.
        DivergedError: the loss, a feature or a gradient is not finite; the last good checkpoint stays.
    """
    if max_steps is not None and max_steps < 1:
        raise FastrexError(f"train: --max-steps must be at least 1, got {max_steps}")
    try:
        return _run(config, out, resume, init_from, max_steps, device, allow_world_size_change)
    except Interrupted as early:
        streams.say(f"fastrex: train: {early}")
    except RankLost as early:
        if early.verdict.state != "preempted":
            raise
        streams.say(f"fastrex: {early}")
    return Result(Path(out or "."), "preempted", 0)


def _run(
    config: Config | None,
    out: Path | str | None,
    resume: str,
    init_from: Path | str | None,
    max_steps: int | None,
    device: str,
    allow_world_size_change: bool,
) -> Result:
    with signals.noted(at_once=True) as asked, distributed.world(device) as world:
        world.watch.command, world.watch.wanted = "train", lambda: bool(asked)
        world.watch.mark(0, "opening the data")
        config = None if config is None else resolve(config, world)
        path = Path(out) if out is not None else rundir.default_out(config if resume == "never" else None, world)
        if world.main:
            preflight.check_out(path)
        config, resuming = rundir.decide(path, config, resume, world)
        init_from = starting_weights(init_from, resuming, resume)
        # Whatever can be wrong with the input is found before the run directory is touched.
        stored, labelled = path / rundir.INDEX if resuming else None, objectives.needs_labels(config)
        data = open_dataset(config, world, stored, labelled=labelled)
        pooled = world.device.type == "cpu" and memory.pool()
        world.watch.mark(0, "building the model")
        trainer = Trainer(config, len(data.classes), world)
        notices = [resume_module.init_from(trainer, init_from)] if init_from is not None else []
        if config.model.frozen_stages and init_from is None and not resuming:
            stages = f"model.frozen_stages={config.model.frozen_stages}"
            notices.append(f"{stages} keeps weights that are random; pass --init-from ENCODER")
        notices += without_effect(config)
        if pooled:
            notices.append("CPU memory is pooled: what tensors free stays with this process (glibc mallopt)")
        notices.append(f"kernels: {fastrex_kernels.backend(world.device.type)}")
        check_writers(config)
        notices += preflight.start(path, trainer)
        run = rundir.RunDir(path, world)
        facts = {"world_size": world.size, "device": str(world.device), "classes": len(data.classes)}
        with contextlib.ExitStack() as closing:
            closing.callback(run.close)
            # From here on there is a run that a stop signal leaves in order.
            asked.at_once = False
            try:
                # Inside of run.failed: that is to hear the reason, not the echo of another rank's end.
                with world.watch.explaining():
                    notices += run.open(config, resuming, facts=facts)
                    if world.main and data.index is not None and not resuming:
                        save_index(data.index, path / rundir.INDEX)
                    result = _train(trainer, data, run, resuming, allow_world_size_change, max_steps, notices, closing)
                    trainer.close()
                return result
            except BaseException as error:
                run.failed(error)
                raise


def _train(
    trainer: Trainer,
    data: Dataset,
    run: rundir.RunDir,
    resuming: bool,
    allow_world_size_change: bool,
    max_steps: int | None,
    notices: list[str],
    closing: contextlib.ExitStack,
) -> Result:
    config, world = trainer.config, trainer.world
    start, lines = 0, list[str]()
    if resuming:
        world.watch.mark(0, "reading the checkpoint")
        start, lines = resume_module.restore(trainer, data, run.path, allow_world_size_change=allow_world_size_change)
    plan = schedule.from_config(config.optim, data.steps_per_epoch)
    stop = plan.total if max_steps is None else min(max_steps, plan.total)
    log = Log(run.path, config, world, start if resuming else None)
    closing.callback(log.close)
    lines += [*notices, *trainer.notices, *data.notices, *trainer.objective.notices(data.drawn_counts)]
    for line in [*_opening(trainer, data, run.path, start, stop, plan.total), *lines]:
        log.line(line)
    saving = resume_module.Saving(trainer, data, run.path, log.line)
    closing.callback(saving.close)
    world.watch.busy = saving.busy
    world.watch.guard(config.run.stall_s or math.inf, start)
    step, state, metrics = _loop(trainer, data, plan, run, saving, log, start, stop)
    world.watch.guard(0)
    if state == "preempted":
        run.status(state, step=step)
        way_on = f"fastrex train --out {shlex.quote(str(run.path))} --resume must"
        log.line(f"preempted at step {step}; continue with: {way_on}")
        # A launcher may end rank 0 with the first rank that leaves.
        distributed.barrier(world)
        return Result(run.path, state, step, metrics)
    encoder = run.path / "export"
    if world.main:
        export.export(checkpoint.folder(run.path, step), encoder, "hf", facts=metrics, overwrite=True)
    run.status(state, step=step, metrics=metrics, encoder=str(encoder))
    for line in _closing(metrics, encoder):
        log.line(line)
    distributed.barrier(world)
    return Result(run.path, state, step, metrics, encoder)


def _loop(
    trainer: Trainer,
    data: Dataset,
    plan: schedule.Schedule,
    run: rundir.RunDir,
    saving: resume_module.Saving,
    log: Log,
    start: int,
    stop: int,
) -> tuple[int, str, dict[str, float]]:
    """Run steps ``start`` to ``stop``; return (steps done, completed or preempted, last evaluation)."""
    config, world, watch, per_epoch = trainer.config, trainer.world, trainer.world.watch, data.steps_per_epoch
    meter, readings = Meter(), deque[Reading]()
    step, results, evaluated, saved = start, dict[str, float](), -1, -1

    def left_over(step: int) -> bool:
        # Stopped right after the last step, only the evaluation is missing, if there is one.
        return step < stop or data.held_out > 0

    leave = watch.boundary()
    due = bool(start) and look_at(config, data, start) and not leave
    if due and not distributed.from_main(int(log.evaluated(start)), world):
        # The run was stopped or killed between the checkpoint and its evaluation.
        results, leave = _evaluate(trainer, data, log, start)
        evaluated = start
    if leave:
        return start, "preempted", {}
    with data.batches(start, stop, world) as loader, log.telling(loader.news), watch.explaining():
        micros: list[Batch] = []
        mark = Mark(start)
        watch.mark(step, "waiting for data")
        for batch in loader:
            log.news(loader.news)
            micros.append(batch)
            if not batch.last_micro:
                continue
            _tell(trainer, log)
            # The method itself draws nothing from torch's generators; a foreign encoder with dropout does.
            torch.manual_seed((config.run.seed * 1_000_003 + step) * 4099 + world.rank & (2**63 - 1))
            lr = plan.lr(step)
            watch.mark(step, "training")
            meter.add(trainer.step(step, micros, lr))
            micros, step = [], step + 1
            watch.mark(step, "waiting for data")

            epochs_done = step // per_epoch if step % per_epoch == 0 else 0
            last = step == stop
            save = _due(config.checkpoint.every_epochs, epochs_done) or _due(config.checkpoint.every_steps, step)
            look = bool(data.held_out) and (last or look_at(config, data, step))
            if (complete := saving.poll()) is not None:
                run.status("running", step=complete)
            leave = watch.boundary()
            if not (save or look or leave or last or step % config.run.log_every == 0):
                continue
            sent = {**meter.take(world), **trainer.guard.report()}
            rates = mark.rates(step, loader.wait_s, config.optim.batch_size)
            left_s = (stop - step) * mark.seconds_per_step
            known = {**rates, "train/lr": lr, "train/epoch": step / per_epoch}
            readings.append(Reading(sent, step, known, left_s))
            # What was sent to the host a logging interval ago has arrived: to read it, nobody waits. The loop waits
            # for the device only where something hangs on the numbers of this very step.
            waiting = world.device.type == "cuda" and not (save or look or leave or last)
            while len(readings) > waiting:
                _report(trainer, log, readings.popleft(), stop, per_epoch, saving)
            if save or last or leave:
                watch.mark(step, "saving")
                _save(saving, run, step, last or leave, preempted=leave and left_over(step))
                saved = step if last or leave else saved
            if look and not leave:
                results, leave = _evaluate(trainer, data, log, step)
                evaluated = step
            if leave:
                break
            mark = Mark(step, loader.wait_s)
            watch.mark(step, "waiting for data")
    _tell(trainer, log)
    if not leave and step < stop:
        raise RuntimeError(f"train: the loader must give batches up to step {stop}, it ended at step {step}")
    if not leave and evaluated != step and data.held_out:
        results, leave = _evaluate(trainer, data, log, step)
    preempted = leave and left_over(step)
    if saved != step:  # one that was written in the background, or fell due only now
        _save(saving, run, step, last=True, preempted=preempted)
    return step, "preempted" if preempted else "completed", results


def _save(saving: resume_module.Saving, run: rundir.RunDir, step: int, last: bool, preempted: bool) -> None:
    """Once the checkpoint of a stop is on the disk the run is preempted, whatever becomes of the ranks that leave."""
    saving.save(step, last=last, then=lambda: run.status("preempted", step=step) if preempted else None)


def _tell(trainer: Trainer, log: Log) -> None:
    """What the trainer has found out; every rank knows it."""
    while trainer.news:
        log.line(trainer.news.popleft())


def resolve(config: Config, world: World) -> Config:
    """What the run directory stores: every option of the objective named, precision decided by this machine."""
    precision = resolve_precision(config.optim.precision, world.device)
    optim = dataclasses.replace(config.optim, precision=precision)
    return dataclasses.replace(objectives.resolve(config), optim=optim)


def without_effect(config: Config) -> list[str]:
    """The learning rates that have nothing to act on, as a line for the log."""
    if config.model.frozen_stages < len(STAGES):
        return []
    dead = [f"optim.{name}" for name in ("encoder_lr", "layer_decay") if getattr(config.optim, name) != 1]
    return [f"model.frozen_stages=5 holds the whole encoder: {' and '.join(dead)} without effect"] if dead else []


def starting_weights(init_from: Path | str | None, resuming: bool, resume: str) -> Path | str | None:
    """``init_from`` for a new run. A restarted job repeats its command; its run has started from there already."""
    if resuming and init_from is not None and resume == "must":
        raise FastrexError("train: --init-from must start a new run; it cannot be combined with --resume must")
    return None if resuming else init_from


def _due(every: int, count: int) -> bool:
    return every > 0 and count > 0 and count % every == 0


def look_at(config: Config, data: Dataset, step: int) -> bool:
    """Whether the model is evaluated after ``step`` steps, the end of the run apart."""
    epochs, rest = divmod(step, data.steps_per_epoch)
    return data.held_out > 0 and rest == 0 and _due(config.eval.every_epochs, epochs)


def _evaluate(trainer: Trainer, data: Dataset, log: Log, step: int) -> tuple[dict[str, float], bool]:
    """Results, and whether all ranks left on request before there were any."""
    assert data.index is not None
    trainer.world.watch.mark(step, "evaluating")
    try:
        results = trainer.evaluate(data.index, log.anyone)
    except Stopped:
        return {}, True
    log.record(step, results)
    log.line(f"step {step} evaluation | {accuracies(results)}")
    return results, False


def _report(
    trainer: Trainer, log: Log, reading: Reading, stop: int, per_epoch: int, saving: resume_module.Saving
) -> None:
    """Log what was sent, and stop on the guard's marks; they are equal on all ranks, so all ranks stop together."""
    step, values = reading.step, reading.values()
    diverged, skipped = int(values.pop("diverged")), int(values["skipped_in_a_row"])
    if not trainer.guard.fp16:
        del values["skipped_in_a_row"]
    record = {**{LOGGED.get(name, f"train/{name}"): value for name, value in values.items()}, **reading.known}
    log.record(step, record)
    log.line(progress(step, stop, (step - 1) // per_epoch, record, reading.left_s))
    if diverged < 0:
        return
    kept = saving.newest()
    way_out = f"the last good checkpoint is step {kept}" if kept >= 0 else "no checkpoint was written yet"
    # Values gone bad are no overflow, and set the count back.
    if not skipped:
        raise DivergedError(
            f"train: loss, features and gradients must be finite, got NaN or inf at step {diverged}; {way_out}; "
            "lower optim.lr, lengthen optim.warmup_epochs or use --precision fp32"
        )
    raise DivergedError(
        f"train: fp16 gradients must be finite, got an overflow at step {diverged} (in a row: {skipped}, loss scale: "
        f"{values['loss_scale']:g}); {way_out}; use --precision bf16 or fp32"
    )


class Mark:
    """A point in the run that rates are measured from."""

    def __init__(self, step: int, wait_s: float = 0.0) -> None:
        self.step, self.wait_s, self.time = step, wait_s, time.perf_counter()
        self.seconds_per_step = 0.0

    def rates(self, step: int, wait_s: float, images: int) -> dict[str, float]:
        """Images per second and the share of time spent waiting for data since the mark."""
        elapsed = time.perf_counter() - self.time
        self.seconds_per_step = elapsed / (step - self.step)
        return {"perf/images_per_s": images / self.seconds_per_step, "perf/data_wait": (wait_s - self.wait_s) / elapsed}


def accuracies(results: dict[str, float]) -> str:
    """Evaluation results as words."""
    names = {"eval/top1": "top-1", "eval/knn": "k-NN"}
    shown = [f"{word} {results[name]:.2%}" for name, word in names.items() if name in results]
    return ", ".join(shown) + f" of {results['eval/images']:.0f} held-out images"


def _opening(trainer: Trainer, data: Dataset, run: Path, start: int, stop: int, total: int) -> list[str]:
    config, world = trainer.config, trainer.world
    weights = sum(p.numel() for p in trainer.model.encoder.parameters())
    projector = f"projector {config.projector.text}" if config.projector.enabled else "no projector"
    lines = [
        f"run {run} | recipe {config.recipe} | {world.device.type} x {world.size} | precision {trainer.precision}",
        f"data {data.config.data.path or 'digits'} | {int(data.class_counts.sum())} images, "
        f"{len(data.classes)} classes, {data.held_out} held out | crops {config.data.crops_text} | "
        f"batch {config.optim.batch_size}",
        f"model {config.model.arch} {weights / 1e6:.2f}M | {projector} | "
        f"objective {config.objective.name} | steps {start} to {stop} of {total}",
    ]
    if config.optim.accumulate > 1:
        lines.append(
            f"optim.accumulate={config.optim.accumulate}: BatchNorm works per micro-batch of "
            f"{config.optim.batch_size // config.optim.accumulate} images; bank, EMA and weights move once per step"
        )
    if (step := preflight.step_memory(trainer)) is not None:
        lines.append(budget.budget_line(*step, memory.available(world.device)))
    return lines


def _closing(metrics: dict[str, float], encoder: Path) -> list[str]:
    return [
        f"accuracy: {accuracies(metrics)}" if metrics else "accuracy: not evaluated",
        f"encoder:  {encoder / 'model.safetensors'}",
        f"load it:  fastrex.load_encoder({str(encoder)!r})",
    ]
