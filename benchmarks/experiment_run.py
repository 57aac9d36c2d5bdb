"""An experiment from its archives to its table: every arm with several seeds at an equal budget, and what of each
encoder transfers.

What is trained or probed already is left as it is, so an experiment can be stopped and started again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Queue
from typing import Any

import click
import torch

from fastrex import config as config_module
from fastrex import objectives
from fastrex.cli_options import PLACE
from fastrex.config import Config
from fastrex.distributed import own_cores
from fastrex.errors import FastrexError

from . import experiment_data as folders_module
from . import experiment_report as report
from .experiment import SIZES, Arm, Experiment, Size

# What the machine or the command's folders decide: no difference between two trainings of an arm.
OUTWARD = ("data.path", "optim.precision")


@dataclass(frozen=True)
class Work:
    """One training and its probes, in processes of their own."""

    experiment: Experiment
    folders: dict[str, Path]
    out: Path
    size: Size
    arm: Arm
    seed: int
    device: str

    @property
    def run(self) -> Path:
        # What was trained at another size is another run.
        size = f"{self.size.name}-{self.size.epochs}-epochs"
        return self.out / self.experiment.name / size / f"{self.arm.name}-seed{self.seed}"

    @property
    def epochs(self) -> int:
        return self.experiment.epochs(self.arm, self.size.epochs)[-1]

    @property
    def before(self) -> Work | None:
        """The training that this one goes on from."""
        return replace(self, arm=self.experiment.arm(self.arm.start)) if self.arm.start else None

    @property
    def settings(self) -> list[str]:
        """In which the training differs from the recipe."""
        return [
            f"model.width={self.size.width}",
            f"optim.batch_size={self.size.batch}",
            f"optim.epochs={self.epochs}",
            f"run.seed={self.seed}",
            "eval.every_epochs=0",
            "checkpoint.every_epochs=0",
            "checkpoint.keep_last=1",
            *self.arm.settings,
        ]

    @property
    def config(self) -> Config:
        """What is trained, every option of the objective named."""
        return objectives.resolve(config_module.load(self.experiment.recipe, self.settings))

    def check(self) -> None:
        """Refuse a run that is there already but is not what would be trained now.

        Raises:
            FastrexError: it has other settings, or started from a first stage that was trained again since.
        """
        if not (self.run / "config.toml").is_file():
            return
        who, way_out = f"{self.experiment.name}: {self.arm.name} seed {self.seed}", f"remove {self.run}"
        found = config_module.diff(config_module.read(self.run / "config.toml"), self.config)
        if changed := [line for line in found if line.partition(":")[0] not in OUTWARD]:
            raise FastrexError(f"{who} must have been trained as it is configured now, got {changed[0]}; {way_out}")
        # A run writes its index when it has read what it starts from, and never again.
        if self.before and _written(self.before.run / "export/model.safetensors") > _written(self.run / "index.npz"):
            raise FastrexError(
                f"{who} must have started from {self.arm.start} as it is now, got one that was trained again since; "
                f"{way_out}"
            )

    def train(self, cores: set[int]) -> None:
        self.check()  # again: its first stage may have been trained by this very command
        if _state(self.run) == "completed":
            return
        recipe, images = self.experiment.recipe, str(self.folders["images"])
        words = ["train", recipe, *self.settings, "--data", images, "--out", str(self.run), "--resume", "auto"]
        if self.before is not None:
            words += ["--init-from", str(self.before.run)]
        start = time.monotonic()
        self._fastrex([*words, "--device", self.device], cores, self.run.with_suffix(".log"))
        click.echo(f"{self.arm.name} seed {self.seed}: trained in {time.monotonic() - start:.0f} s")

    def probe(self, cores: set[int]) -> None:
        sets = ",".join(f"{name}={str(self.folders[name]).replace(',', ',,')}" for name in folders_module.SETS)
        words = ["transfer", str(self.run), "--sets", sets, "--probes", "logistic,knn", "--seeds", "0,1,2"]
        words += ["--cache", str(self.out / "features"), "--device", self.device]
        self._fastrex(words, cores, self.run.with_suffix(".transfer.log"))
        click.echo(f"{self.arm.name} seed {self.seed}: probed")

    def facts(self) -> dict[str, Any]:
        """What the run has reached, from its own files."""
        found = json.loads((self.run / "transfer" / "transfer.json").read_text(encoding="utf-8"))
        training = self._training()
        return {
            "arm": self.arm.name,
            "seed": self.seed,
            "commits": sorted({self._commit(), *([self.before._commit()] if self.before else [])}),
            "steps": training[-1]["step"] + (self.before._training()[-1]["step"] if self.before else 0),
            "train_loss": training[-1]["train/loss"],
            "sets": {
                entry["name"]: {
                    name: {key: probe["top1"][key] for key in ("mean", "low", "high")}
                    | {"log_odds": probe["log_odds"]["value"]}
                    for name, probe in entry["probes"].items()
                }
                for entry in found["sets"]
            },
        }

    def _commit(self) -> str:
        return str(json.loads((self.run / "env.json").read_text(encoding="utf-8"))["commit"])

    def _training(self) -> list[dict[str, Any]]:
        """What the log has of training steps."""
        lines = (self.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [record for record in map(json.loads, lines) if "train/loss" in record]

    def _fastrex(self, words: list[str], cores: set[int], log: Path) -> None:
        """Run the command in a process of its own, on ``cores`` alone."""
        log.parent.mkdir(parents=True, exist_ok=True)
        pinned = ["taskset", "-c", ",".join(map(str, sorted(cores)))] if shutil.which("taskset") else []
        with log.open("ab") as file:
            done = subprocess.run([*pinned, sys.executable, "-m", "fastrex", *words], stdout=file, stderr=file)
        if done.returncode:
            last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing said"])[-1]
            name = self.experiment.name
            raise FastrexError(
                f"{name}: fastrex {words[0]} failed with exit code {done.returncode}: {last} (see {log})"
            )


def command(experiment: Experiment) -> click.Command:
    """The command line of an experiment."""
    names = [arm.name for arm in experiment.shown()]

    @click.command(help=experiment.help)
    @click.option("--data", type=PLACE, required=True, help=f"Folder with {' and '.join(folders_module.ARCHIVES)}.")
    @click.option("--out", type=PLACE, required=True, help="Where folders, runs and features are kept.")
    @click.option("--size", type=click.Choice(list(SIZES)), default="laptop", show_default=True)
    @click.option("--epochs", type=click.IntRange(min=1), help="Instead of the size's.")
    @click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Trainings of each arm.")
    @click.option("--arm", "chosen", multiple=True, type=click.Choice(names), help="Only these.")
    @click.option(
        "--jobs", type=click.IntRange(min=1), help="Trainings at a time; default: one for each core, one on a GPU."
    )
    @click.option("--train-only", is_flag=True, help="Do not probe yet.")
    @click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
    @click.option("--json", "json_path", type=PLACE, help="Write the results, a table and a chart beside this file.")
    def run(
        data: Path,
        out: Path,
        size: str,
        epochs: int | None,
        seeds: int,
        chosen: tuple[str, ...],
        jobs: int | None,
        train_only: bool,
        device: str,
        json_path: Path | None,
    ) -> None:
        preset = replace(SIZES[size], epochs=epochs or SIZES[size].epochs)
        gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        arms = experiment.shown(chosen)
        try:
            folders = folders_module.prepare(data, out, preset.per_class, preset.probe_per_class)
            work = [Work(experiment, folders, out, preset, arm, n, device) for n in range(seeds) for arm in arms]
            conduct(work, jobs or (1 if gpu else own_cores()), probe=not train_only)
            if train_only:
                return
            runs = [one.facts() for one in work]
        except FastrexError as error:
            raise click.ClickException(str(error)) from None
        settings = {**vars(preset), "seeds": seeds, "arms": [arm.name for arm in arms]}
        words = f"python -m benchmarks {experiment.name} --data ARCHIVES --out WORK --size {size}"
        content = report.content(experiment, runs, settings, f"{words} --epochs {preset.epochs} --seeds {seeds}")
        click.echo(report.table(content))
        if json_path is not None:
            report.write(experiment, content, json_path)

    return run


def conduct(work: Sequence[Work], lanes: int, *, probe: bool) -> None:
    """Train what others start from, then all ``work``, then probe it."""
    first = {one.before.run: one.before for one in work if one.before is not None}
    if short := [one for one in work if one.epochs < 1]:
        one = short[0]
        raise FastrexError(
            f"{one.experiment.name}: --epochs must leave {one.arm.name} an epoch after {one.arm.start}, got "
            f"{one.size.epochs}; give 2 or more"
        )
    for one in (*first.values(), *work):
        one.check()  # before hours go by
    side_by_side([one.train for one in first.values()], lanes)
    side_by_side([one.train for one in work], lanes)
    if probe:
        side_by_side([one.probe for one in work], lanes)


def side_by_side(work: Sequence[Callable[[set[int]], None]], lanes: int) -> None:
    """Do ``work`` in ``lanes`` processes at a time, each on its share of the cores: they would share caches and
    threads. The first failure, or Ctrl-C, lets what runs end and begins nothing more."""
    free: Queue[set[int]] = Queue()
    cores = sorted(os.sched_getaffinity(0))
    for lane in range(lanes):
        free.put(set(cores[lane::lanes] or cores[lane % len(cores) :][:1]))

    ended = threading.Event()

    def one(do: Callable[[set[int]], None]) -> None:
        share = free.get()
        try:
            if not ended.is_set():
                do(share)
        except BaseException:
            ended.set()
            raise
        finally:
            free.put(share)

    with ThreadPoolExecutor(lanes) as pool:
        futures = [pool.submit(one, do) for do in work]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            ended.set()


def _written(path: Path) -> int:
    """When, in nanoseconds; 0 where it is not there."""
    return path.stat().st_mtime_ns if path.is_file() else 0


def _state(run: Path) -> str:
    try:
        return str(json.loads((run / "status.json").read_text(encoding="utf-8"))["state"])
    except (OSError, ValueError, KeyError):
        return ""
