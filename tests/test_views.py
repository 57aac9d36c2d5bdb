"""What the model sees of a batch, which momentum features it meets, features gone bad, and data of one class."""

from __future__ import annotations

import copy
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, environment, settings_for
from torch import Tensor, nn

from fastrex import checkpoint, standalone, views
from fastrex import config as c
from fastrex.data.dataset import open_dataset
from fastrex.data.loader import Batch
from fastrex.distributed import World
from fastrex.errors import FastrexError
from fastrex.step import Trainer
from fastrex.transfer import opening

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
QUEUES = {"moco": [], "supcon": ["objective.base_temperature=0"], "look": ["objective.neighbours=4"]}


def prepared(name: str, *words: str, steps: int = 1) -> tuple[Trainer, list[Batch]]:
    """A trainer with a queue of 40 and its first batches, of noise that is another in every micro-batch."""
    options = [*settings_for(name), "objective.queue_size=40", *QUEUES[name], "data.path=synthetic"]
    config = c.load("demo", [*options, *words])
    data = open_dataset(config, ALONE)
    trainer = Trainer(config, len(data.classes), ALONE)
    with data.batches(0, steps, ALONE) as loader:
        batches = list(loader)
    generator = torch.Generator().manual_seed(1)
    return trainer, [
        Batch(**{**vars(b), "crops": tuple(torch.randn(crop.shape, generator=generator) for crop in b.crops)})
        for b in batches
    ]


def seen_by(module: nn.Module) -> list[tuple[Any, ...]]:
    """The arguments of every call of ``module`` from here on."""
    calls: list[tuple[Any, ...]] = []
    module.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    return calls


@pytest.mark.parametrize(
    ("name", "crops", "wanted"),
    [
        ("moco", (2, 0), [[1]]),
        ("moco", (3, 2), [[1, 2], [0, 1]]),
        ("supcon", (2, 3), [[1], [0, 1, 2]]),
        ("moco", (1, 2), [[], [0, 1]]),
        ("look", (2, 0), [[0, 1]]),
    ],
)
def test_the_model_gets_the_crops_that_the_momentum_encoder_does_not(
    name: str, crops: tuple[int, int], wanted: list[list[int]]
) -> None:
    """``wanted``: of each group of the batch, the places of the crops that the model gets."""
    count, local = crops
    trainer, (batch,) = prepared(name, f"data.global_crops={count}", f"data.local_crops={local}")
    model, ema = seen_by(trainer.model), seen_by(trainer.ema)
    trainer.step(0, [batch], 0.1)
    images = len(batch.target)
    (given,), (first,) = model[0], ema[0]
    expected = [group.unflatten(0, (-1, images))[keep] for group, keep in zip(batch.crops, wanted, strict=True) if keep]
    assert len(given) == len(expected)
    assert all(torch.equal(found, crop.flatten(0, 1)) for found, crop in zip(given, expected, strict=True))
    assert torch.equal(first[0], batch.crops[0][:images])
    # What memory is foreseen for is what there is.
    assert trainer.crops == tuple((len(crop), crop.shape[-1]) for crop in expected)


def test_no_crop_left_for_the_model_is_refused() -> None:
    message = (
        "train: objective.name=moco must have a crop for the model beside that of the momentum encoder, got 1x32; set "
        "data.global_crops=2"
    )
    with pytest.raises(FastrexError) as caught:
        prepared("moco", "data.global_crops=1", "data.local_crops=0")
    assert str(caught.value) == message


def test_a_model_that_trains_on_local_crops_alone_is_told() -> None:
    for crops, told in ((1, True), (2, False)):
        trainer, _ = prepared("moco", f"data.global_crops={crops}", "data.local_crops=2")
        lines = [line for line in trainer.notices if "trains on local crops alone; set data.global_crops=2" in line]
        assert len(lines) == told


@pytest.mark.parametrize(("name", "told"), [("supcon", True), ("schane", True), ("moco", False), ("look", False)])
def test_pairs_within_a_micro_batch_are_told_where_there_are_micro_batches(name: str, told: bool) -> None:
    for accumulate in (1, 2):
        words = [*settings_for(name), "data.path=synthetic", "data.global_crops=2", f"optim.accumulate={accumulate}"]
        config = c.load("demo", words)
        trainer = Trainer(config, 4, ALONE)
        lines = [line for line in trainer.notices if "its own micro-batch" in line]
        assert len(lines) == (told and accumulate == 2)
        assert all("micro-batch of 8 images" in line for line in lines)


@pytest.mark.parametrize("name", ["moco", "supcon"])
def test_every_micro_batch_meets_its_own_momentum_features(name: str) -> None:
    trainer, micros = prepared(name, "data.global_crops=2", "data.local_crops=0", "optim.accumulate=2")
    assert len(micros) == 2
    twin = copy.deepcopy(trainer.ema)
    assert twin is not None
    with torch.no_grad():
        wanted = [twin((batch.crops[0][: len(batch.target)],)) for batch in micros]
    assert not torch.equal(*wanted)
    calls = seen_by(trainer.objective)
    trainer.step(0, micros, 0.1)
    contexts = [context for _, _, context in calls]
    for batch, context, features in zip(micros, contexts, wanted, strict=True):
        assert torch.equal(context.momentum, features)
        assert torch.equal(context.images, batch.images)


def test_features_gone_bad_stop_a_step_whose_loss_is_finite() -> None:
    """Without an entry in the queue LOOK has nothing to compare with, and every loss is 0."""

    def spoilt(module: nn.Module, inputs: Any, out: Tensor) -> Tensor:
        return out * torch.where(torch.arange(len(out)) == 3, math.nan, 1.0)[:, None]

    words = ("data.global_crops=2", "data.local_crops=0")
    for bad in (False, True):
        trainer, (batch,) = prepared("look", *words)
        if bad:
            trainer.model.register_forward_hook(spoilt)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        values = trainer.step(0, [batch], 0.1)
        assert values["loss"].item() == 0
        assert (trainer.guard.report()["diverged"].item() >= 0) == bad
        assert trainer.objective.queue.filled().item() == pytest.approx(0 if bad else len(batch.target) / 40)
        if bad:
            assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


@pytest.fixture(scope="module")
def one_class(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unlabelled")
    for source in sorted((stripes / "train").glob("*/*.jpg")):
        target = root / "images" / f"{source.parent.name}-{source.name}"
        target.parent.mkdir(exist_ok=True)
        shutil.copy(source, target)
    return root


def train(name: str, data: Path, out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    settings = [*settings_for(name), "data.global_crops=2", *words]
    start = [sys.executable, "-m", "fastrex", "train", "demo", "--data", str(data), "--out", str(out)]
    command = [*start, "--device", "cpu", "--max-steps", "3", *settings]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)


@pytest.mark.parametrize("held_out", [0.1, 0.0])
def test_images_without_labels_train_what_needs_none(one_class: Path, tmp_path: Path, held_out: float) -> None:
    run = tmp_path / "run"
    done = train("moco", one_class, run, "objective.queue_size=40", f"data.held_out={held_out}")
    assert done.returncode == 0, done.stderr
    assert "evaluation is off: there is one class only, and accuracies need two" in done.stderr + done.stdout
    assert ("data.held_out=0 trains on the" in done.stderr + done.stdout) == bool(held_out)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    assert losses
    assert all(math.isfinite(loss) for loss in losses)
    assert not any(name.startswith("eval/") for record in records for name in record)
    parts, _ = checkpoint.load(checkpoint.folder(run, 3))
    assert (parts["bank"]["queue.labels"] == 0).sum() == 40
    assert (run / "export" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["supcon", "cosine_softmax"])
def test_images_without_labels_are_refused_where_they_are_learnt(one_class: Path, tmp_path: Path, name: str) -> None:
    done = train(name, one_class, tmp_path / "run")
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()[-1:]
    assert "only class 'images' holds images, training needs two classes; expected CLASS/IMAGE.jpg" in line
    assert line.endswith("without labels train objective.name=moco or mochi")
    assert not (tmp_path / "run").exists()


def test_accuracies_of_one_class_are_refused(one_class: Path) -> None:
    config = c.load("demo", [*settings_for("moco"), f"data.path={json.dumps(str(one_class))}"])
    with pytest.raises(FastrexError, match="only class 'images' holds images, eval needs two classes"):
        standalone._held_out(config, ALONE)
    with pytest.raises(FastrexError, match="only class 'images' holds images, transfer needs two classes"):
        opening.own("mine", one_class)


def test_groups_of_an_objective_that_sees_all() -> None:
    trainer, _ = prepared("look", "data.global_crops=1", "data.local_crops=0")
    assert views.model_groups(trainer.config, trainer.objective) == trainer.config.data.crops
