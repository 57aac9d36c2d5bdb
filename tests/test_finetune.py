"""Fine-tuning: learning rates by layer, frozen stages, few images of each class, weights to start from."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import environment
from test_budget import CROPS, kept
from test_distributed import distance, run
from test_recompute import assert_same_bits, images, network, outcome
from test_step import FusedSGD
from test_train import command, final_hash, records, wait_for_step
from torch import Tensor, nn
from torchvision_shim import import_timm

import fastrex
from fastrex import apex, checkpoint, distributed, evaluate, export, objectives, resume, rundir, trainer
from fastrex import config as c
from fastrex.budget import activations, state_bytes
from fastrex.config import STAGES, DataConfig, ModelConfig, OptimConfig
from fastrex.data.dataset import open_dataset
from fastrex.data.index import Index, _rows_of, build
from fastrex.data.shots import training_rows
from fastrex.errors import FastrexError, UsageError
from fastrex.model.ema import make_ema
from fastrex.model.norm import BatchNormAct
from fastrex.model.resnet import ResNet, build_encoder
from fastrex.optim import Optimizer, rate_factors
from fastrex.step import Trainer

FALSE = torch.tensor(False)
LAYERS = OptimConfig(layer_decay=0.5, encoder_lr=0.2, weight_decay=0.1)
SMALL = [
    "data.global_size=32", "data.eval_resize=32", "data.eval_size=32", "model.arch=resnet18", "model.stem=small",
    "model.width=4", "optim.batch_size=16", "optim.epochs=4", "optim.warmup_epochs=1", "optim.precision=fp32",
    "eval.batch_size=32", "eval.every_epochs=1", "run.log_every=1",
]  # fmt: skip
TUNED = ["data.shots=8", "model.frozen_stages=2", "optim.layer_decay=0.7", "optim.encoder_lr=0.3"]
MOMENTUM = ["objective.name=class_means", "objective.bank_size=64", "projector.enabled=true",
            "projector.hidden_layers=1", "projector.hidden_dim=32", "projector.out_dim=16"]  # fmt: skip


def configured(data: Path, *more: str) -> c.Config:
    return objectives.resolve(c.load("finetune", [*SMALL, f"data.path={json.dumps(str(data))}", *more]))


def log_of(run: Path) -> str:
    return (run / "train.log").read_text(encoding="utf-8")


def stage_of(name: str) -> str:
    layer = name.removeprefix("model.encoder.").split(".")[0]
    return layer if layer.startswith("layer") else "stem"


@pytest.fixture(scope="module")
def encoder(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a run on all four classes."""
    out = tmp_path_factory.mktemp("encoder") / "run"
    rates = ("optim.lr=1.0", "optim.encoder_lr=1.0", "optim.layer_decay=1.0", "optim.epochs=10")
    result = trainer.train(configured(stripes, *rates), out=out, device="cpu")
    assert result.encoder is not None
    return result.encoder


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"encoder": ResNet("resnet18", stem="small", width=2), "projector": nn.Linear(3, 3)})
        self.objective = nn.Linear(3, 4)


def test_factors_by_hand() -> None:
    names = [name for name, _ in Net().named_parameters()]
    factors = rate_factors(names, LAYERS)
    wanted = {"stem": 0.2 / 32, "layer1": 0.2 / 16, "layer2": 0.2 / 8, "layer3": 0.2 / 4, "layer4": 0.2 / 2}
    assert factors == {n: pytest.approx(wanted[stage_of(n)]) for n in names if n.startswith("model.encoder.")}
    assert {n for n in names if n not in factors} == {
        "model.projector.weight", "model.projector.bias", "objective.weight", "objective.bias",
    }  # fmt: skip
    assert rate_factors(names, OptimConfig()) == {}
    assert rate_factors(["model.encoder.stem_conv.weight"], OptimConfig(encoder_lr=0.5)) == {
        "model.encoder.stem_conv.weight": 0.5
    }
    with pytest.raises(FastrexError, match=r"optim\.layer_decay must be 1 for .*, got 0\.5 with a layer 'stem_conv'"):
        rate_factors(["model.encoder.stem_conv.weight"], LAYERS)


@pytest.mark.parametrize("impl", ["fused", "torch", "apex"])
@pytest.mark.parametrize("gradients", ["fresh", "flat", "kept"])
def test_layer_wise_rates_are_those_of_parameter_groups(
    impl: str, gradients: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against torch.optim.SGD, which has a learning rate for each group, over a schedule that rises and falls."""
    monkeypatch.setattr(apex, "fused_sgd", lambda: FusedSGD)
    torch.manual_seed(0)
    net, theirs = Net(), Net()
    theirs.load_state_dict(net.state_dict())
    config = OptimConfig(layer_decay=0.5, encoder_lr=0.2, weight_decay=0.1, impl=impl)
    optimizer = Optimizer(dict(net.named_parameters()), {}, config, 0.9, gradients=gradients)
    factors = rate_factors(dict(net.named_parameters()), config)
    names = [name for name, _ in theirs.named_parameters()]
    sgd = torch.optim.SGD(
        [
            {"params": [p], "weight_decay": 0.1 if p.ndim > 1 else 0.0, "name": name}
            for name, p in theirs.named_parameters()
        ],
        lr=0.1,
        momentum=0.9,
    )
    for step, lr in enumerate((0.02, 0.1, 0.3, 0.1, 0.05)):
        draws = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        for ours, other in zip(net.parameters(), theirs.parameters(), strict=True):
            grad = torch.randn(ours.shape, generator=draws)
            if ours.grad is None:
                ours.grad = torch.zeros_like(ours)
            ours.grad.copy_(4 * grad)
            other.grad = grad
        norm = optimizer.grad_norm(torch.tensor(0.25))
        torch.testing.assert_close(norm, nn.utils.get_total_norm([p.grad for p in theirs.parameters()]))
        for group, name in zip(sgd.param_groups, names, strict=True):
            group["lr"] = lr * factors.get(name, 1.0)
        sgd.step()
        optimizer.set_lr(lr)
        optimizer.step(FALSE, torch.tensor(0.25))
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(net.get_parameter(name), p, rtol=1e-5, atol=1e-6)
        momentum = sgd.state[p]["momentum_buffer"] * factors.get(name, 1.0)
        torch.testing.assert_close(optimizer.buffers[name], momentum, rtol=1e-5, atol=1e-6)


def test_factors_of_one_multiply_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    monkeypatch.setattr(torch, "_foreach_mul_", lambda *_: pytest.fail("there is nothing to multiply"))
    optimizer = Optimizer(dict(net.named_parameters()), {}, OptimConfig(), 0.9)
    optimizer.set_lr(0.1)
    optimizer.step(FALSE, None)


@pytest.mark.parametrize("stages", [1, 3, 5])
@pytest.mark.parametrize("recompute", ["none", "blocks", "passes"])
def test_a_frozen_prefix_computes_as_in_evaluation_and_keeps_nothing(stages: int, recompute: str) -> None:
    model, free = network(recompute, arch="resnet18"), network("none", arch="resnet18")
    for net in (model, free):
        for layer in net.modules():
            if isinstance(layer, BatchNormAct):
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.5, 2.0)
    model.load_state_dict(free.state_dict())
    resnet = model.encoder
    assert isinstance(resnet, ResNet)
    resnet.freeze(stages)
    model.eval().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = outcome(model, torch.float32)
    frozen = {n for n in before if n.startswith("encoder.") and STAGES.index(stage_of(n[8:])) < stages}
    assert all(torch.equal(tensor, before[name]) == (name in frozen) for name, tensor in model.named_buffers())
    # The same by hand: stages in eval mode, and no gradient behind them.
    for stage in ("conv1", "bn1", *STAGES[1:])[: stages + 1]:
        free.encoder.get_submodule(stage).eval().requires_grad_(False)
    assert_same_bits(found, outcome(free, torch.float32))
    gradients = {n for n, p in model.named_parameters() if p.grad is not None}
    assert gradients == {n for n, _ in model.named_parameters()} - frozen
    told = activations(model, CROPS, 8, 3, torch.float32)
    assert sum(told.values()) - told["recomputed"] == kept(model, 8, torch.float32)
    if recompute == "none":
        assert sum(told.values()) < sum(
            activations(network("none", arch="resnet18"), CROPS, 8, 3, torch.float32).values()
        )
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert state_bytes(model) == sum(t.nbytes for t in model.state_dict().values()) + 2 * trained


def test_a_momentum_copy_is_frozen_too() -> None:
    model = network("none", arch="resnet18")
    assert isinstance(model.encoder, ResNet)
    model.encoder.freeze(2)
    twin = make_ema(model)
    before = {name: tensor.clone() for name, tensor in twin.encoder.named_buffers()}
    twin((images(4, 32),))
    changed = {stage_of(n) for n, tensor in twin.encoder.named_buffers() if not torch.equal(tensor, before[n])}
    assert changed == {"layer2", "layer3", "layer4"}


def test_what_cannot_be_frozen_is_refused(stripes: Path) -> None:
    import_timm()
    with pytest.raises(FastrexError, match=r"model\.frozen_stages must be 0 for timm:resnet10t, got 1"):
        build_encoder(ModelConfig(arch="timm:resnet10t", frozen_stages=1))
    config = configured(stripes, *MOMENTUM, "model.frozen_stages=5", "projector.enabled=false")
    with distributed.world("cpu") as world, pytest.raises(FastrexError, match="must have a weight to train, got none"):
        Trainer(config, 4, world)


@pytest.fixture(scope="module")
def index(stripes: Path) -> Iterator[Index]:
    return build(stripes)


def test_shots_are_a_choice_of_their_seed(index: Index) -> None:
    every = training_rows(index, DataConfig())
    assert np.array_equal(every, index.rows("train", 0.1))
    few, more = (training_rows(index, DataConfig(shots=k)) for k in (3, 5))
    assert np.bincount(index.labels[few]).tolist() == [3, 3, 3, 3]
    assert set(few) < set(more) < set(every)
    assert np.array_equal(few, np.sort(few))
    others = {tuple(training_rows(index, DataConfig(shots=3, shots_seed=seed))) for seed in range(20)}
    assert len(others) == 20
    # Every image has its turn: of 16 the seeds 0..199 draw each about 37 times in 3.
    drawn = np.bincount(np.concatenate([training_rows(index, DataConfig(shots=3, shots_seed=s)) for s in range(200)]))
    assert drawn[every].min() > 15
    assert drawn[every].max() < 65
    assert np.array_equal(training_rows(index, DataConfig(shots=16)), every)


def test_shots_do_not_hang_on_the_order_of_the_rows(index: Index) -> None:
    """The images are the same by name."""
    turned = np.random.default_rng(0).permutation(len(index))
    other = _rows_of(index._meta(), index, turned, index._columns())
    for data in (DataConfig(shots=4), DataConfig(shots=2, shots_seed=5)):
        few, again = (training_rows(one, data) for one in (index, other))
        assert not np.array_equal(few, again)
        assert {index.name(row) for row in few} == {other.name(row) for row in again}
        assert np.bincount(other.labels[again]).tolist() == [data.shots] * 4


def test_shots_are_of_what_is_not_held_out(stripes: Path) -> None:
    alone = build(stripes / "train")
    assert len(training_rows(alone, DataConfig(shots=4, held_out=0.0))) == 16
    held = DataConfig(shots=4, held_out=0.25)
    assert not set(training_rows(alone, held)) & set(alone.rows("val", 0.25))


def test_a_class_without_training_images_is_no_matter_of_the_shots(index: Index) -> None:
    rows = index.rows("train", 0.1)
    bad = rows[index.labels[rows] == 2]
    empty = index.with_status(bad, np.ones(len(bad), np.uint8))
    with pytest.raises(FastrexError, match=r"got 5 with 0 in 'class-2'; lower data\.held_out or add images$"):
        training_rows(empty, DataConfig(shots=5))


def test_more_shots_than_images_are_refused_by_name(index: Index) -> None:
    with pytest.raises(
        FastrexError,
        match=r"data\.shots must be at .*, got 17 with 16 in 'class-0' and fewer in 3 .*; set data\.shots=16",
    ):
        training_rows(index, DataConfig(shots=17))


def test_synthetic_data_has_no_shots() -> None:
    config = objectives.resolve(c.load("trex_plain_1", ["data.path=synthetic", "data.shots=5"]))
    with distributed.world("cpu") as world, pytest.raises(UsageError, match=r"data\.shots must be 0"):
        open_dataset(config, world)


def test_batches_counts_and_the_bank_of_the_evaluation_are_of_the_shots(
    stripes: Path, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(stripes, "data.shots=5")
    chosen = set(training_rows(index, config.data))
    seen: list[list[int]] = []
    real = evaluate._extract
    monkeypatch.setattr(evaluate, "_extract", lambda *a: seen.append(a[2].tolist()) or real(*a))
    with distributed.world("cpu") as world:
        data = open_dataset(config, world)
        with data.batches(0, 4, world) as loader:
            assert {row for batch in loader for row in batch.samples.tolist()} == chosen
        assert data.class_counts.tolist() == [5, 5, 5, 5]
        assert (data.steps_per_epoch, data.held_out) == (2, 16)
        assert "data.shots=5: 20 of 64 training images (data.shots_seed=0)" in data.notices
        Trainer(config, 4, world).evaluate(index)
    assert [set(rows) for rows in seen] == [chosen, set(index.rows("val", 0.1))]


def test_two_ranks_equal_one(stripes: Path, tmp_path: Path) -> None:
    base = [word for word in SMALL if not word.startswith("eval.every")]
    settings = [*base, *MOMENTUM, *TUNED, "optim.lr=0.1", "data.local_crops=0"]
    (one,), (log,) = run(tmp_path / "one", 1, stripes, "float64", 6, settings)
    two, logs = run(tmp_path / "two", 2, stripes, "float64", 6, settings)
    assert [[*a, *b] for a, b in zip(logs[0]["samples"], logs[1]["samples"], strict=True)] == log["samples"]
    assert all(torch.equal(two[0][name], two[1][name]) for name in two[0])
    assert distance(one, two[0]) < 1e-8


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_weights_and_statistics_keep_their_bits(
    stripes: Path, encoder: Path, tmp_path: Path, precision: str
) -> None:
    """Through training, evaluation and checkpoints, in the model and in the momentum encoder."""
    config = configured(stripes, *MOMENTUM, *TUNED, f"optim.precision={precision}")
    trainer.train(config, out=tmp_path / "run", init_from=encoder, device="cpu")
    parts = checkpoint.load(checkpoint.folder(tmp_path / "run", 8))[0]
    source = export.load_source(encoder).state
    for part in ("model", "ema"):
        for name, given in source.items():
            if name.endswith("num_batches_tracked"):
                continue
            stays = stage_of(name) in ("stem", "layer1")
            assert torch.equal(parts[part][f"encoder.{name}"], given) == stays, (part, name)
    moved = {n.removeprefix("momentum.") for n in parts["optimizer"] if n.startswith("momentum.model.encoder.")}
    assert {stage_of(name) for name in moved} == {"layer2", "layer3", "layer4"}
    said = log_of(tmp_path / "run")
    assert "data.shots=8: 32 of 64 training images" in said
    assert f"encoder starts from {encoder}: resnet18 (stem small, width 4), run run, step 40" in said
    assert "keeps weights that are random" not in said


def test_rates_without_effect_are_named() -> None:
    frozen = c.load("finetune", ["model.frozen_stages=5", "optim.layer_decay=1.0"])
    assert trainer.without_effect(frozen) == [
        "model.frozen_stages=5 holds the whole encoder: optim.encoder_lr without effect"
    ]
    both = c.load("finetune", ["model.frozen_stages=5"])
    assert "optim.encoder_lr and optim.layer_decay without effect" in trainer.without_effect(both)[0]
    assert trainer.without_effect(c.load("finetune", ["model.frozen_stages=4"])) == []
    assert trainer.without_effect(c.load("trex", ["model.frozen_stages=5"])) == []
    # A rate of 0 would still move the running statistics.
    with pytest.raises(UsageError, match=r"optim\.encoder_lr must .*, got 0"):
        c.load("finetune", ["optim.encoder_lr=0"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ((), "3 hidden layers"),
        (("projector.hidden_layers=1",), "1 hidden layer"),
        (("projector.activation=relu", "projector.batch_norm=false"), "3 hidden layers, ReLU, no BatchNorm"),
        (("projector.hidden_layers=0", "projector.activation=relu"), "0 hidden layers"),
        (("projector.enabled=false",), "no projector"),
    ],
)
def test_a_projector_in_words(settings: tuple[str, ...], words: str) -> None:
    assert c.load("trex", settings).projector.text == words


def test_frozen_random_weights_are_named(stripes: Path, tmp_path: Path) -> None:
    trainer.train(configured(stripes, *TUNED), out=tmp_path / "run", max_steps=1, device="cpu")
    assert "model.frozen_stages=2 keeps weights that are random; pass --init-from ENCODER" in log_of(tmp_path / "run")


def test_a_killed_fine_tuning_goes_on_with_the_same_bits(stripes: Path, encoder: Path, tmp_path: Path) -> None:
    settings = [*SMALL, *MOMENTUM, *TUNED, "optim.epochs=6"]
    words = ["train", "finetune", *settings, "--data", str(stripes), "--init-from", str(encoder), "--device", "cpu"]
    quiet, out = tmp_path / "quiet", tmp_path / "run"
    config = configured(stripes, *MOMENTUM, *TUNED, "optim.epochs=6")
    trainer.train(config, out=quiet, init_from=encoder, device="cpu")
    process = subprocess.Popen(
        command(*words, "--out", out, "checkpoint.every_steps=3"),
        env=environment(),
        stdout=subprocess.DEVNULL,
        text=True,
    )
    wait_for_step(out, process, 4)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert rundir.read_status(out)["state"] == "killed"
    assert trainer.train(None, out=out, resume="must", device="cpu").step == 12
    assert final_hash(out) == final_hash(quiet)


def classes_of(stripes: Path, folder: Path, *names: str) -> Path:
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        for name in names:
            (folder / split / name).symlink_to(stripes / split / name)
    return folder


def test_few_images_of_other_classes_from_an_encoder_and_from_scratch(stripes: Path, tmp_path: Path) -> None:
    """Four images of each of two classes; the encoder has been trained on the two others."""
    rates = ("optim.lr=1.0", "optim.encoder_lr=1.0", "optim.layer_decay=1.0", "optim.epochs=20")
    known = configured(classes_of(stripes, tmp_path / "known", "class-0", "class-2"), *rates)
    encoder = trainer.train(known, out=tmp_path / "first", device="cpu").encoder
    folder = classes_of(stripes, tmp_path / "new", "class-1", "class-3")
    few = ("data.shots=4", "optim.batch_size=8", "optim.epochs=12", "optim.lr=0.4")
    found = {}
    for name, start in (("tuned", encoder), ("scratch", None)):
        result = trainer.train(configured(folder, *few), out=tmp_path / name, init_from=start, device="cpu")
        assert result.state == "completed"
        losses = [record["train/loss"] for record in records(tmp_path / name) if "train/loss" in record]
        found[name] = (sum(losses[-4:]) / 4, result.metrics["eval/top1"])
    assert found["tuned"][0] < 0.8 * found["scratch"][0]
    assert found["tuned"][1] >= 0.75


def test_an_official_file_starts_an_encoder(stripes: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    source = ResNet("resnet18", stem="small", width=4)
    state: dict[str, Tensor] = {n: t.contiguous() for n, t in source.state_dict().items()}
    torch.save({**state, "fc.weight": torch.zeros(1000, 32), "fc.bias": torch.zeros(1000)}, tmp_path / "official.pth")
    config = configured(stripes, *MOMENTUM)
    with distributed.world("cpu") as world:
        started = Trainer(config, 4, world)
        line = resume.init_from(started, tmp_path / "official.pth")
        other = Trainer(configured(stripes, "data.mean=[0.5,0.5,0.5]", "model.bn_eps=0.001"), 4, world)
        odd = resume.init_from(other, tmp_path / "official.pth")
        wide = Trainer(configured(stripes, "model.stem=imagenet"), 4, world)
        with pytest.raises(FastrexError, match=r"must hold a resnet18 \(stem imagenet, .*, got resnet18 \(stem small"):
            resume.init_from(wide, tmp_path / "official.pth")
    assert line == f"encoder starts from {tmp_path / 'official.pth'}: resnet18 (stem small, width 4)"
    assert odd.endswith("model.bn_eps is 0.001 here and was 1e-05 there")
    assert started.ema is not None
    x = torch.randn(2, 3, 32, 32)
    for net in (started.model, started.ema):
        torch.testing.assert_close(net.encoder.eval()(x), source.eval()(x))


def test_other_preprocessing_is_named(stripes: Path, encoder: Path) -> None:
    with distributed.world("cpu") as world:
        line = resume.init_from(Trainer(configured(stripes, "data.mean=[0.5,0.5,0.5]"), 4, world), encoder)
    assert line.endswith("; data.mean is [0.5, 0.5, 0.5] here and was [0.485, 0.456, 0.406] there")
    assert fastrex.load_encoder(encoder).num_features == 32
