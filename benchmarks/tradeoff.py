"""The trade-off between the training task and transfer, at a size that two cores can do: each step of the method in
turn, everything else equal, several seeds.

``python -m benchmarks tradeoff --data ARCHIVES --out WORK`` trains what is not trained yet, probes what is not probed
yet, and writes the table, so it can be stopped and started again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Queue
from typing import Any

import click

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
    Arm("mc", "+ multi-crop", PLAIN),
    *(
        Arm(f"pr{depth}", f"+ projector, {depth} hidden, cosine", (COSINE, f"projector.hidden_layers={depth}"))
        for depth in range(4)
    ),
    Arm("ocm1", "+ OCM, projector 1 hidden", (OCM, "projector.hidden_layers=1")),
    Arm("ocm3", "+ OCM, projector 3 hidden", (OCM, "projector.hidden_layers=3")),
)


@dataclass(frozen=True)
class Size:
    """What a preset trains: images per class, epochs, width of the network, images per class for the probes."""

    per_class: int
    epochs: int
    width: int
    probe_per_class: int
    batch: int


SIZES = {
    # The whole of it within two hours on two cores of a laptop.
    "laptop": Size(per_class=2000, epochs=5, width=16, probe_per_class=500, batch=128),
    "quick": Size(per_class=32, epochs=2, width=8, probe_per_class=16, batch=32),
    "gpu": Size(per_class=5000, epochs=100, width=64, probe_per_class=5000, batch=256),
}


@click.command()
@click.option("--data", type=PLACE, required=True, help=f"Folder with {folders_module.CIFAR} and omniglot-small1.zip.")
@click.option("--out", type=PLACE, required=True, help="Where folders, runs and features are kept.")
@click.option("--size", type=click.Choice(list(SIZES)), default="laptop", show_default=True)
@click.option("--epochs", type=click.IntRange(min=1), help="Instead of the size's.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Trainings of each arm.")
@click.option("--arm", "names", multiple=True, type=click.Choice([arm.name for arm in ARMS]), help="Only these.")
@click.option("--jobs", type=click.IntRange(min=1), help="Trainings at a time; default: one for each core.")
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
    python -m benchmarks tradeoff --data ARCHIVES --out WORK --size gpu --jobs 1     # on a GPU
    """
    chosen = SIZES[size]
    length = epochs or chosen.epochs
    arms = [arm for arm in ARMS if not names or arm.name in names]
    try:
        folders = folders_module.prepare(data, out, chosen.per_class, chosen.probe_per_class)
        work = [(arm, seed) for seed in range(seeds) for arm in arms]
        lanes = jobs or own_cores()
        _side_by_side([partial(_train, folders, out, chosen, length, arm, seed, device) for arm, seed in work], lanes)
        if train_only:
            return
        _side_by_side([partial(_probe, folders, out, arm, seed, device) for arm, seed in work], lanes)
        runs = [_facts(_place(out, arm, seed), arm, seed) for arm, seed in work]
    except FastrexError as error:
        raise click.ClickException(str(error)) from None
    settings = {"size": size, **vars(chosen), "epochs": length, "seeds": seeds, "arms": [arm.name for arm in arms]}
    words = f"python -m benchmarks tradeoff --data ARCHIVES --out WORK --size {size} --epochs {length} --seeds {seeds}"
    content = report.content(runs, {arm.name: arm.title for arm in arms}, settings, words)
    click.echo(report.table(content))
    if json_path is not None:
        report.write(content, json_path)


def _place(out: Path, arm: Arm, seed: int) -> Path:
    return out / "runs" / f"{arm.name}-seed{seed}"


def _side_by_side(work: Sequence[Callable[[int], None]], lanes: int) -> None:
    """Do ``work`` in ``lanes`` processes at a time, each on a core of its own: they would share caches and threads."""
    free: Queue[int] = Queue()
    for lane in range(lanes):
        free.put(lane)

    def one(do: Callable[[int], None]) -> None:
        lane = free.get()
        try:
            do(lane)
        finally:
            free.put(lane)

    with ThreadPoolExecutor(lanes) as pool:
        for future in [pool.submit(one, do) for do in work]:
            future.result()


def _train(
    folders: dict[str, Path], out: Path, size: Size, epochs: int, arm: Arm, seed: int, device: str, lane: int
) -> None:
    run = _place(out, arm, seed)
    if _state(run) == "completed":
        return
    settings = [
        f"model.width={size.width}",
        f"optim.batch_size={size.batch}",
        f"optim.epochs={epochs}",
        f"run.seed={seed}",
        "eval.every_epochs=0",
        "checkpoint.every_epochs=0",
        "checkpoint.keep_last=1",
        *arm.settings,
    ]
    words = ["train", "cifar10", *settings, "--data", str(folders["train"]), "--out", str(run)]
    start = time.monotonic()
    _fastrex([*words, "--resume", "auto", "--device", device], lane, run.with_suffix(".log"))
    click.echo(f"{arm.name} seed {seed}: trained in {time.monotonic() - start:.0f} s")


def _probe(folders: dict[str, Path], out: Path, arm: Arm, seed: int, device: str, lane: int) -> None:
    run = _place(out, arm, seed)
    sets = ",".join(f"{name}={str(folders[name]).replace(',', ',,')}" for name in folders_module.SETS)
    words = ["transfer", str(run), "--sets", sets, "--probes", "logistic,knn", "--seeds", "0,1,2"]
    words += ["--cache", str(out / "features"), "--device", device]
    _fastrex(words, lane, run.with_suffix(".transfer.log"))
    click.echo(f"{arm.name} seed {seed}: probed")


def _fastrex(words: list[str], lane: int, log: Path) -> None:
    """Run the command in a process of its own, on one core where several share the machine."""
    cores = sorted(os.sched_getaffinity(0))
    environment = dict(os.environ)

    def settle() -> None:
        os.sched_setaffinity(0, {cores[lane % len(cores)]})

    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        done = subprocess.run(
            [sys.executable, "-m", "fastrex", *words], stdout=file, stderr=file, env=environment, preexec_fn=settle
        )
    if done.returncode:
        last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing said"])[-1]
        raise FastrexError(f"tradeoff: fastrex {words[0]} failed with exit code {done.returncode}: {last} (see {log})")


def _state(run: Path) -> str:
    try:
        return str(json.loads((run / "status.json").read_text(encoding="utf-8"))["state"])
    except (OSError, ValueError, KeyError):
        return ""


def _facts(run: Path, arm: Arm, seed: int) -> dict[str, Any]:
    """What a run has reached, from its own files."""
    found = json.loads((run / "transfer" / "transfer.json").read_text(encoding="utf-8"))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    training = [record for record in records if "train/loss" in record]
    return {
        "arm": arm.name,
        "seed": seed,
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
