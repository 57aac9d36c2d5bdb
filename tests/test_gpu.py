"""What only a GPU can show: the loader on the device, a training from end to end, no host sync inside a step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SETTINGS

from fastrex import config as c
from fastrex import distributed, trainer
from fastrex.data.dataset import open_dataset
from fastrex.step import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU on this machine")


def configuration(data: Path, *more: str) -> c.Config:
    return c.load("demo", [*SETTINGS, f"data.path={json.dumps(str(data))}", *more])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("resize", ["dali", "fastrex"])
def test_crops_on_the_device_are_those_of_the_cpu(stripes: Path, resize: str, channels: int) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    batches = []
    for device, cutter in (("cpu", "fastrex"), ("cuda", resize)):
        config = configuration(stripes, f"data.resize={cutter}", f"data.channels={channels}")
        with distributed.world(device) as world:
            data = open_dataset(config, world)
            with data.batches(0, 3, world) as loader:
                batches.append([[crop.float().cpu() for crop in batch.crops] for batch in loader])
    for on_cpu, on_gpu in zip(*batches, strict=True):
        for a, b in zip(on_cpu, on_gpu, strict=True):
            # Decoders differ by a level or two of 255, divided by a deviation of 0.22.
            assert (a - b).abs().mean() < 3 / 255 / 0.22


@pytest.mark.parametrize("resize", ["dali", "fastrex"])
def test_a_bad_file_is_replaced_on_the_device_too(stripes: Path, tmp_path: Path, resize: str) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    folder = Path(shutil.copytree(stripes, tmp_path / "images"))
    words = [f"data.resize={resize}", "data.on_bad_sample=replace", "run.seed=3"]
    samples = []
    with distributed.world("cuda") as world:
        data = open_dataset(configuration(folder, *words), world)
        assert data.index is not None
        for damage in (False, True):
            if damage:
                victim = data.index.path(5)
                victim.write_bytes(victim.read_bytes()[:60].ljust(victim.stat().st_size, b"\xff"))
            with data.batches(0, 8, world) as loader:
                samples.append([batch.samples.tolist() for batch in loader])
    for clean, other in zip(*samples, strict=True):
        assert all(a == b if a != 5 else b != 5 for a, b in zip(clean, other, strict=True))


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_run_on_the_gpu_completes_and_resumes(stripes: Path, tmp_path: Path, precision: str) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    config = configuration(stripes, f"optim.precision={precision}")
    assert trainer.train(config, out=tmp_path / "run", max_steps=3, device="cuda").state == "completed"
    result = trainer.train(None, out=tmp_path / "run", resume="must", max_steps=8, device="cuda")
    assert result.step == 8
    assert result.metrics["eval/images"] == 16


@pytest.mark.parametrize("objective", ["class_means", "cosine_softmax"])
def test_a_step_on_synthetic_data_never_waits_for_the_device(objective: str) -> None:
    settings = [s for s in SETTINGS if not s.startswith("objective.")]
    config = c.load("demo", [*settings, "data.path=synthetic", f"objective.name={objective}", "optim.precision=bf16"])
    config = trainer.resolve(config, distributed.World(0, 1, 0, 1, torch.device("cuda", 0)))
    with distributed.world("cuda") as world:
        data = open_dataset(config, world)
        run = Trainer(config, len(data.classes), world)
        with data.batches(0, 4, world) as loader:
            batches = list(loader)
        run.step(0, batches[:1], 0.1)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for number, batch in enumerate(batches[1:], 1):
                run.step(number, [batch], 0.1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert int(run.guard.diverged) == -1
