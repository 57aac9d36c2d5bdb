"""The trade-off between the training task and transfer, at a size that two cores can do: each step of the method in
turn, everything else equal, several seeds.

``python -m benchmarks tradeoff --data ARCHIVES --out WORK`` trains what is not trained yet, probes what is not probed
yet, and writes the table, so it can be stopped and started again.
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

from fastrex.cli_options import PLACE
from fastrex.distributed import own_cores
from fastrex.errors import FastrexError

from . import tradeoff_data as folders_module
from . import tradeoff_report as report

RESULTS = Path(__file__).parent / "results"
COSINE, OCM = "objective.name=cosine_softmax", "objective.name=class_means"
PLAIN = ("projector.enabled=false", "objective.name=softmax")


@dataclass(frozen=True)
class Arm:
    """One configuration: what a table calls it, and the settings in which it differs from the recipe."""

    name: str
    title: str
    settings: tuple[str, ...]


ARMS = (
    Arm("base", "Base: cross-entropy, one crop", (*PLAIN, "data.local_crops=0")),
    # The recipe's learning rate was chosen for the whole method: whether another one suits the base better is measured.
    Arm("base-slow", "Base, a quarter of the learning rate", (*PLAIN, "data.local_crops=0", "optim.lr=0.1")),
    Arm("base-fast", "Base, four times the learning rate", (*PLAIN, "data.local_crops=0", "optim.lr=1.6")),
    Arm("mc", "+ multi-crop", PLAIN),
    Arm("cos", "+ cosine softmax", ("projector.enabled=false", COSINE)),
    *(
        Arm(f"pr{depth}", f"+ projector, {depth} hidden", (COSINE, f"projector.hidden_layers={depth}"))
        for depth in range(4)
    ),
    Arm("ocm1", "+ OCM, projector 1 hidden", (OCM, "projector.hidden_layers=1")),
    Arm("ocm3", "+ OCM, projector 3 hidden", (OCM, "projector.hidden_layers=3")),
)


@dataclass(frozen=True)
class Size:
    """What a preset trains: images per class, epochs, width of the network, images per class for the probes."""

    name: str
    per_class: int
    epochs: int
    width: int
    probe_per_class: int
    batch: int


SIZES = {
    # The whole of it within two hours on two cores of a laptop.
    "laptop": Size("laptop", per_class=2000, epochs=5, width=16, probe_per_class=500, batch=128),
    "quick": Size("quick", per_class=32, epochs=2, width=8, probe_per_class=16, batch=32),
    "gpu": Size("gpu", per_class=5000, epochs=100, width=64, probe_per_class=5000, batch=256),
}


@click.command()
@click.option("--data", type=PLACE, required=True, help=f"Folder with {folders_module.CIFAR} and omniglot-small1.zip.")
@click.option("--out", type=PLACE, required=True, help="Where folders, runs and features are kept.")
@click.option("--size", type=click.Choice(list(SIZES)), default="laptop", show_default=True)
@click.option("--epochs", type=click.IntRange(min=1), help="Instead of the size's.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Trainings of each arm.")
@click.option("--arm", "names", multiple=True, type=click.Choice([arm.name for arm in ARMS]), help="Only these.")
@click.option(
    "--jobs", type=click.IntRange(min=1), help="Trainings at a time; default: one for each core, one on a GPU."
)
@click.option("--train-only", is_flag=True, help="Do not probe yet.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--json", "json_path", type=PLACE, help="Write the results, a table and a chart beside this file.")
def command(
    data: Path,
    out: Path,
    size: str,
    epochs: int | None,
    seeds: int,
    names: tuple[str, ...],
    jobs: int | None,
    train_only: bool,
    device: str,
    json_path: Path | None,
) -> None:
    """Train each step of the method with several seeds, and probe what transfers.

    \b
    python -m benchmarks tradeoff --data ARCHIVES --out WORK --json benchmarks/results/tradeoff.json
    python -m benchmarks tradeoff --data ARCHIVES --out WORK --size gpu     # on a GPU
    """
    chosen = SIZES[size]
    chosen = replace(chosen, epochs=epochs or chosen.epochs)
    arms = [arm for arm in ARMS if not names or arm.name in names]
    gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    lanes = jobs or (1 if gpu else own_cores())
    try:
        folders = folders_module.prepare(data, out, chosen.per_class, chosen.probe_per_class)
        work = [Work(folders, out, chosen, arm, seed, device) for seed in range(seeds) for arm in arms]
        _side_by_side([one.train for one in work], lanes)
        if train_only:
            return
        _side_by_side([one.probe for one in work], lanes)
        runs = [one.facts() for one in work]
    except FastrexError as error:
        raise click.ClickException(str(error)) from None
    settings = {**vars(chosen), "seeds": seeds, "arms": [arm.name for arm in arms]}
    words = f"python -m benchmarks tradeoff --data ARCHIVES --out WORK --size {size} --epochs {chosen.epochs}"
    content = report.content(runs, {arm.name: arm.title for arm in arms}, settings, f"{words} --seeds {seeds}")
    click.echo(report.table(content))
    if json_path is not None:
        report.write(content, json_path)


@dataclass(frozen=True)
class Work:
    """One training and its probes, in processes of their own."""

    folders: dict[str, Path]
    out: Path
    size: Size
    arm: Arm
    seed: int
    device: str

    @property
    def run(self) -> Path:
        # What was trained at another size is another run.
        return self.out / f"{self.size.name}-{self.size.epochs}-epochs" / f"{self.arm.name}-seed{self.seed}"

    def train(self, cores: set[int]) -> None:
        if _state(self.run) == "completed":
            return
        settings = [
            f"model.width={self.size.width}",
            f"optim.batch_size={self.size.batch}",
            f"optim.epochs={self.size.epochs}",
            f"run.seed={self.seed}",
            "eval.every_epochs=0",
            "checkpoint.every_epochs=0",
            "checkpoint.keep_last=1",
            *self.arm.settings,
        ]
        words = ["train", "cifar10", *settings, "--data", str(self.folders["images"]), "--out", str(self.run)]
        start = time.monotonic()
        _fastrex([*words, "--resume", "auto", "--device", self.device], cores, self.run.with_suffix(".log"))
        click.echo(f"{self.arm.name} seed {self.seed}: trained in {time.monotonic() - start:.0f} s")

    def probe(self, cores: set[int]) -> None:
        sets = ",".join(f"{name}={str(self.folders[name]).replace(',', ',,')}" for name in folders_module.SETS)
        words = ["transfer", str(self.run), "--sets", sets, "--probes", "logistic,knn", "--seeds", "0,1,2"]
        words += ["--cache", str(self.out / "features"), "--device", self.device]
        _fastrex(words, cores, self.run.with_suffix(".transfer.log"))
        click.echo(f"{self.arm.name} seed {self.seed}: probed")

    def facts(self) -> dict[str, Any]:
        """What the run has reached, from its own files."""
        found = json.loads((self.run / "transfer" / "transfer.json").read_text(encoding="utf-8"))
        records = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        training = [record for record in records if "train/loss" in record]
        environment = json.loads((self.run / "env.json").read_text(encoding="utf-8"))
        return {
            "arm": self.arm.name,
            "seed": self.seed,
            "commit": environment["commit"],
            "steps": training[-1]["step"],
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


def _side_by_side(work: Sequence[Callable[[set[int]], None]], lanes: int) -> None:
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


def _fastrex(words: list[str], cores: set[int], log: Path) -> None:
    """Run the command in a process of its own, on ``cores`` alone."""
    log.parent.mkdir(parents=True, exist_ok=True)
    pinned = ["taskset", "-c", ",".join(map(str, sorted(cores)))] if shutil.which("taskset") else []
    with log.open("ab") as file:
        done = subprocess.run([*pinned, sys.executable, "-m", "fastrex", *words], stdout=file, stderr=file)
    if done.returncode:
        last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing said"])[-1]
        raise FastrexError(f"tradeoff: fastrex {words[0]} failed with exit code {done.returncode}: {last} (see {log})")


def _state(run: Path) -> str:
    try:
        return str(json.loads((run / "status.json").read_text(encoding="utf-8"))["state"])
    except (OSError, ValueError, KeyError):
        return ""
