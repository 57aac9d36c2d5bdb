"""Whole runs on grey images, with balanced classes, with repeats: they train, resume, export and are told of."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SETTINGS, write_stripes

import fastrex
from fastrex import config as c
from fastrex import distributed, export, standalone, trainer
from fastrex.config import Config
from fastrex.data.dataset import open_dataset
from fastrex.data.synthetic import SyntheticLoader
from fastrex.distributed import World
from fastrex.errors import FastrexError
from fastrex.resume import init_from
from fastrex.step import Trainer

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed: pip install 'fastrex[train]'")


def configured(path: Path | str, *settings: str) -> Config:
    return c.load("demo", [*SETTINGS, f"data.path={json.dumps(str(path))}", "optim.epochs=2", *settings])


def log_of(run: Path) -> str:
    return (run / "train.log").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def grey_run(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "grey"
    trainer.train(configured(stripes, "data.channels=1"), out=out, device="cpu")
    return out


def test_a_grey_run_trains_says_so_and_gives_a_grey_encoder(grey_run: Path) -> None:
    assert "data.channels=1: grey images" in log_of(grey_run)
    assert "augment.hue" in log_of(grey_run)
    for source in (grey_run, grey_run / "export"):
        encoder = fastrex.load_encoder(source)
        assert encoder(torch.zeros(2, 1, 32, 32)).shape == (2, 32)
    facts = json.loads((grey_run / "export" / "config.json").read_text(encoding="utf-8"))
    assert facts["pretrained_cfg"]["input_size"][0] == facts["fastrex"]["channels"] == 1


def test_a_grey_encoder_is_evaluated_on_grey_images(grey_run: Path, stripes: Path) -> None:
    for source in (grey_run, grey_run / "export"):
        result = standalone.evaluate_source(source, [f"data.path={json.dumps(str(stripes))}"], "cpu")
        assert result["eval/images"] == 16
        assert 0 <= result["eval/knn"] <= 1


@pytest.fixture
def world() -> contextlib.AbstractContextManager[World]:
    return distributed.world("cpu")


@pytest.mark.parametrize("given", [3, 1])
def test_a_run_starts_from_an_encoder_of_other_channels(
    given: int, stripes: Path, tmp_path: Path, world: contextlib.AbstractContextManager[World]
) -> None:
    wanted = 4 - given
    with world as here:
        source = Trainer(configured(stripes, f"data.channels={given}", "run.seed=5"), 4, here)
        state = {f"encoder.{k}": v.contiguous() for k, v in source.model.encoder.state_dict().items()}
        torch.save(state, tmp_path / "source.pth")
        target = Trainer(configured(stripes, f"data.channels={wanted}"), 4, here)
        line = init_from(target, tmp_path / "source.pth")
        x = torch.randn(2, 1, 32, 32)
        for model in (target.model, target.ema):
            assert model is not None
            ours = model.encoder.eval()(x.expand(2, wanted, 32, 32))
            torch.testing.assert_close(ours, source.model.encoder.eval()(x.expand(2, given, 32, 32)))
        assert ("summed for grey images" if wanted == 1 else "repeated, divided by 3") in line
        plain = Trainer(configured(stripes, f"data.channels={given}"), 4, here)
        line = f"encoder starts from {tmp_path / 'source.pth'}: resnet18 (stem small, width 4)"
        assert init_from(plain, tmp_path / "source.pth") == line
        narrow = Trainer(configured(stripes, f"data.channels={wanted}", "model.width=8"), 4, here)
        with pytest.raises(FastrexError, match="--init-from must hold a resnet18"):
            init_from(narrow, tmp_path / "source.pth")


def test_export_names_its_channels_to_the_command_line(grey_run: Path) -> None:
    assert export.load_source(grey_run).settings()[0] == "data.channels=1"


def test_synthetic_crops_have_the_channels(world: contextlib.AbstractContextManager[World]) -> None:
    with world as here:
        data = open_dataset(configured("synthetic", "data.channels=1"), here)
        assert any("data.channels=1" in line for line in data.notices)
        with data.batches(0, 1, here) as loader:
            assert isinstance(loader, SyntheticLoader)
            (batch,) = loader
    assert [crops.shape[1] for crops in batch.crops] == [1, 1]
    assert batch.plan.views.tolist() == [0] * len(batch.samples)
    assert batch.plan.planned.tolist() == batch.samples.tolist()


def uneven(root: Path) -> Path:
    """Four classes of 16, of which one keeps 3 images."""
    write_stripes(root, 16, seed=0)
    for number in range(3, 16):
        (root / "class-2" / f"{number:02d}.jpg").unlink()
    return root


@pytest.mark.parametrize("last_batch", ["drop", "pad"])
def test_balanced_and_repeated_runs_train_and_resume(tmp_path: Path, last_batch: str) -> None:
    root = uneven(tmp_path / "images")
    words = ("data.held_out=0", "data.sampling=balanced", "data.repeats=2", f"data.last_batch={last_batch}")
    config = configured(root, *words)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer.train(config, out=whole, device="cpu")
    trainer.train(config, out=parts, max_steps=2, device="cpu")
    trainer.train(None, out=parts, resume="must", device="cpu")
    ours, theirs = (fastrex.load_encoder(run).state_dict() for run in (whole, parts))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert "data.sampling=balanced: 4 classes equally often" in log_of(whole)
    assert "data.repeats=2: an epoch draws" in log_of(whole)


def test_balanced_batches_reach_the_training_balanced(
    tmp_path: Path, world: contextlib.AbstractContextManager[World]
) -> None:
    root = uneven(tmp_path / "images")
    with world as here:
        config = configured(root, "data.held_out=0", "data.sampling=balanced", "data.last_batch=pad")
        data = open_dataset(config, here)
        with data.batches(0, data.steps_per_epoch, here) as loader:
            targets = np.concatenate([batch.target.numpy() for batch in loader])
    assert data.class_counts.tolist() == [16, 16, 3, 16]
    assert len(targets) == 64
    assert np.bincount(targets).tolist() == [16] * 4
    assert len(set(data.drawn_counts.tolist())) == 1


def test_repeats_that_do_not_divide_the_batch_are_refused(
    stripes: Path, world: contextlib.AbstractContextManager[World]
) -> None:
    with world as here, pytest.raises(FastrexError, match=r"multiple of data\.repeats=3, got 16; set .*batch_size=15"):
        open_dataset(configured(stripes, "data.repeats=3"), here)
