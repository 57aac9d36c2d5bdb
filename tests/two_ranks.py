"""Run as the ranks of a job: train up to a step and write this rank's state, samples and losses, for
test_distributed.py; with ``--run DIR`` continue from the checkpoint there, if there is one, and save one at the end."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import safetensors.torch
import torch

from fastrex import config as c
from fastrex import distributed, objectives, resume, schedule
from fastrex.data.dataset import open_dataset
from fastrex.data.loader import Batch
from fastrex.step import Trainer


def main(out: Path, dtype: str, steps: int, settings: list[str], nudge: float, run: Path | None) -> None:
    torch.set_default_dtype(getattr(torch, dtype))
    config = objectives.resolve(c.load("demo", settings))
    losses, norms, changes, samples = [], [], [], []
    with distributed.world("cpu") as world:
        data = open_dataset(config, world)
        trainer = Trainer(config, len(data.classes), world)
        if nudge:
            with torch.no_grad():
                for p in trainer.model.parameters():
                    p.mul_(1 + nudge)
        # Before any step the weights are equal to the bit, so the accuracies must be too, however the images are
        # shared.
        results = trainer.evaluate(data.index) if dtype == "float32" and data.index is not None else {}
        plan = schedule.from_config(config.optim, data.steps_per_epoch)
        micros: list[Batch] = []
        start, lines = 0, list[str]()
        if run is not None:
            start, lines = resume.restore(trainer, data, run, allow_world_size_change=True)
        with data.batches(start, steps, world) as loader:
            for batch in loader:
                crops = tuple(crop.to(getattr(torch, dtype)) for crop in batch.crops)
                micros.append(Batch(**{**vars(batch), "crops": crops}))
                samples.append(batch.samples.tolist())
                if batch.last_micro:
                    values = trainer.step(batch.step, micros, plan.lr(batch.step + 1))
                    for name, means in (("loss", losses), ("class_change", changes)):
                        if name in values:  # objectives of pairs have no class vectors
                            means.append(float(distributed.sum_(values[name].clone(), world)) / world.size)
                    norms.append(float(values["grad_norm"]))
                    micros = []
        if run is not None:
            resume.Saving(trainer, data, run, lines.append).save(steps, last=True)
        parts = {f"{stem}/{n}": t.contiguous().clone() for stem, ts in trainer.parts().items() for n, t in ts.items()}
        safetensors.torch.save_file(parts, out / f"rank{world.rank}.safetensors")
        log = {"losses": losses, "norms": norms, "changes": changes, "samples": samples}
        (out / f"rank{world.rank}.json").write_text(
            json.dumps({**log, "eval": results, "lines": lines}), encoding="utf-8"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("dtype")
    parser.add_argument("steps", type=int)
    parser.add_argument("nudge", type=float)
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--run", type=Path)
    main(**vars(parser.parse_args()))
    os._exit(0)  # see fastrex.cli._leave
