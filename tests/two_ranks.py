"""Run by torchrun: train a few steps and write this rank's state and losses, for test_distributed.py."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import safetensors.torch
import torch

from fastrex import config as c
from fastrex import distributed, objectives, schedule
from fastrex.data.dataset import open_dataset
from fastrex.data.loader import Batch
from fastrex.step import Trainer


def main(out: Path, dtype: str, steps: int, settings: list[str], nudge: float) -> None:
    torch.set_default_dtype(getattr(torch, dtype))
    config = objectives.resolve(c.load("demo", settings))
    losses, samples = [], []
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
        with data.batches(0, steps, world) as loader:
            for batch in loader:
                crops = tuple(crop.to(getattr(torch, dtype)) for crop in batch.crops)
                micros.append(Batch(**{**vars(batch), "crops": crops}))
                samples.append(batch.samples.tolist())
                if batch.last_micro:
                    values = trainer.step(batch.step, micros, plan.lr(batch.step + 1))
                    losses.append(float(distributed.sum_(values["loss"].clone(), world)) / world.size)
                    micros = []
        parts = {f"{stem}/{n}": t.contiguous().clone() for stem, ts in trainer.parts().items() for n, t in ts.items()}
        safetensors.torch.save_file(parts, out / f"rank{world.rank}.safetensors")
        (out / f"rank{world.rank}.json").write_text(
            json.dumps({"losses": losses, "samples": samples, "eval": results}), encoding="utf-8"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[5:], float(sys.argv[4]))
    os._exit(0)  # see fastrex.cli._leave
