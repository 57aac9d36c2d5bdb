"""What only a GPU can show: the loader on the device, the step as one graph, no host sync, training from end to end."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SETTINGS, settings_for
from torch import Tensor

from fastrex import config as c
from fastrex import distributed, trainer
from fastrex.data.dataset import open_dataset
from fastrex.data.index import build
from fastrex.data.loader import Batch
from fastrex.distributed import World
from fastrex.model.resnet import build_encoder
from fastrex.neighbours import knn_scores, mean_scores
from fastrex.step import Trainer
from fastrex.transfer import features, probes
from fastrex_kernels import contrastive_cross_entropy, nearest_keys
from fastrex_kernels._op import Call
from fastrex_kernels.contrastive_ce import cases as contrastive_cases

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU on this machine"),
    # What torch says of its own switches.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning"),
    pytest.mark.filterwarnings("ignore:Please use the new API settings to control TF32:UserWarning"),
]
DEVICE = "cuda"
Make = Callable[[int], list[Batch]]
# The graph is captured by the fourth step.
CAPTURED = 5


def configuration(data: Path, *more: str) -> c.Config:
    return c.load("demo", [*SETTINGS, f"data.path={json.dumps(str(data))}", *more])


@contextlib.contextmanager
def opened(*words: str, objective: str = "class_means", device: str = DEVICE) -> Iterator[tuple[Trainer, Make]]:
    """A small trainer on synthetic data, and its micro-batches by step: other numbers in every step."""
    config = c.load("demo", [*settings_for(objective), "data.path=synthetic", *words])
    with distributed.world(device) as world:
        # The same algorithms in every run, so that two can be compared.
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        config = trainer.resolve(config, world)
        data = open_dataset(config, world)
        with data.batches(0, 1, world) as loader:
            pattern = list(loader)

        def make(step: int) -> list[Batch]:
            random = torch.Generator().manual_seed(step)
            return [fresh(batch, step, random, len(data.classes)) for batch in pattern]

        try:
            yield Trainer(config, len(data.classes), world), make
        finally:
            torch.backends.cudnn.deterministic = False


def fresh(batch: Batch, step: int, random: torch.Generator, classes: int) -> Batch:
    crops = tuple(
        torch.randn(crop.shape, generator=random).to(crop.device).contiguous(memory_format=torch.channels_last)
        for crop in batch.crops
    )
    target = torch.randint(classes, batch.target.shape[:1], generator=random)
    if batch.target.is_floating_point():  # shares, as of images that are mixed in pairs
        shares = torch.rand(len(target), 1, generator=random)
        one_hot = torch.nn.functional.one_hot(target, classes).float()
        target = shares * one_hot + (1 - shares) * one_hot.flip(0)
    target = target.to(batch.target.device)
    return dataclasses.replace(batch, step=step, crops=crops, target=target)


def lr(step: int) -> float:
    """Another one in every step: a graph must not keep the one that it was captured with."""
    return 0.02 * (1 + step % 4)


def losses(run: Trainer, make: Make, start: int, stop: int) -> list[float]:
    return [float(run.step(step, make(step), lr(step))["loss"]) for step in range(start, stop)]


def tensors(run: Trainer) -> dict[str, Tensor]:
    """Copies of the whole state."""
    return {f"{part}.{name}": t.clone() for part, found in run.parts().items() for name, t in found.items()}


def learnt(run: Trainer) -> dict[str, Tensor]:
    """Copies of what a skipped step must not touch; BatchNorm's statistics and the guard are not among it."""
    found = dict(run.method.named_parameters())
    found |= {} if run.ema is None else {f"ema.{name}": p for name, p in run.ema.named_parameters()}
    return {name: p.detach().clone() for name, p in {**found, **run.optimizer.state()}.items()}


def apart(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The largest relative difference of a tensor, by its norm; infinite where one is not finite."""
    assert left.keys() == right.keys()
    worst = 0.0
    for name, value in left.items():
        a, b = value.double().cpu(), right[name].double().cpu()
        if not (a.isfinite().all() and b.isfinite().all()):
            return float("inf")
        worst = max(worst, float((a - b).norm() / b.norm().clamp(min=1e-6)))
    return worst


def captured(run: Trainer) -> None:
    assert run.graph is not None
    assert run.graph.captured, run.graph.reason


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


@pytest.mark.parametrize("graph", ["on", "off"])
@pytest.mark.parametrize("objective", ["class_means", "cosine_softmax"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_step_on_synthetic_data_never_waits_for_the_device(graph: str, objective: str, precision: str) -> None:
    words = (f"optim.precision={precision}", f"run.cuda_graph={graph}")
    with opened(*words, objective=objective) as (run, make):
        batches = [make(step) for step in range(CAPTURED + 4)]
        for step in range(CAPTURED):
            run.step(step, batches[step], lr(step))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(CAPTURED, CAPTURED + 4):
                run.step(step, batches[step], lr(step))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if graph == "on":
            captured(run)
        assert int(run.guard.diverged) == -1


@pytest.mark.parametrize("objective", ["class_means", "cosine_softmax"])
@pytest.mark.parametrize(
    ("precision", "accumulate", "tolerance"), [("fp32", 1, 1e-3), ("bf16", 1, 1e-2), ("fp16", 2, 1e-2)]
)
def test_the_graph_computes_what_eager_steps_do(
    objective: str, precision: str, accumulate: int, tolerance: float
) -> None:
    words = (f"optim.precision={precision}", f"optim.accumulate={accumulate}")
    found: dict[str, tuple[list[float], dict[str, Tensor]]] = {}
    for graph in ("off", "on"):
        with opened(*words, f"run.cuda_graph={graph}", objective=objective) as (run, make):
            values = losses(run, make, 0, CAPTURED + 1)
            look(run)  # an evaluation between two replays
            values += losses(run, make, CAPTURED + 1, CAPTURED + 5)
            assert int(run.guard.diverged) == -1
            if graph == "off":
                assert run.graph is None
            else:
                captured(run)
            found[graph] = values, tensors(run)
    assert len(set(found["on"][0])) == CAPTURED + 5  # no replay shows an old batch or an old result
    assert found["on"][0] == pytest.approx(found["off"][0], rel=tolerance)
    assert apart(found["on"][1], found["off"][1]) < 10 * tolerance


TWO_CROPS = ("data.global_crops=2", "data.local_crops=0")
METHODS = {
    "softmax, mixed": ("softmax", ("augment.mixup=0.2", "augment.cutmix=1.0")),
    "cosine, margin": ("cosine_softmax", ("objective.margin=0.2",)),
    "frozen, decayed": ("class_means", ("model.frozen_stages=2", "optim.layer_decay=0.7", "optim.encoder_lr=0.5")),
    "supcon": ("supcon", TWO_CROPS),
    "moco": ("moco", (*TWO_CROPS, "objective.queue_size=64")),
}


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 1e-2)])
@pytest.mark.parametrize("method", METHODS)
def test_the_graph_of_every_kind_of_method_computes_what_eager_steps_do(
    method: str, precision: str, tolerance: float
) -> None:
    objective, words = METHODS[method]
    found: dict[str, tuple[list[float], dict[str, Tensor]]] = {}
    for graph in ("off", "on"):
        settings = (*words, f"optim.precision={precision}", f"run.cuda_graph={graph}")
        with opened(*settings, objective=objective) as (run, make):
            before = tensors(run)
            values = losses(run, make, 0, CAPTURED + 5)
            assert int(run.guard.diverged) == -1
            if graph == "on":
                captured(run)
            after = tensors(run)
            stem = "model.encoder.conv1.weight"
            assert torch.equal(before[stem], after[stem]) == (method == "frozen, decayed")
            found[graph] = values, after
    assert len(set(found["on"][0])) == CAPTURED + 5
    # MoCo's first loss is 0: its queue is empty.
    assert found["on"][0] == pytest.approx(found["off"][0], rel=tolerance, abs=1e-6)
    assert apart(found["on"][1], found["off"][1]) < 10 * tolerance


def look(run: Trainer) -> None:
    """What an evaluation does to the model."""
    run.method.eval()
    with torch.no_grad(), run.autocast():
        images = torch.randn(6, 3, 32, 32, device=DEVICE).contiguous(memory_format=torch.channels_last)
        assert run.model.encoder(images).isfinite().all()
    run.method.train()


def test_a_graph_goes_on_from_tensors_that_were_loaded() -> None:
    with opened("run.cuda_graph=on", "optim.precision=bf16") as (run, make):
        losses(run, make, 0, CAPTURED)
        captured(run)
        kept = {part: {name: t.clone() for name, t in found.items()} for part, found in run.parts().items()}
        first, state = losses(run, make, CAPTURED, CAPTURED + 3), tensors(run)
        run.load(kept)
        assert losses(run, make, CAPTURED, CAPTURED + 3) == pytest.approx(first, rel=1e-3)
        assert apart(tensors(run), state) < 1e-2


def test_after_a_recording_that_failed_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened("run.cuda_graph=auto") as (run, make):
        real = run.optimizer.grad_norm

        def reading(inv_scale: Tensor | None = None) -> Tensor:
            norm = real(inv_scale)
            if torch.cuda.is_current_stream_capturing():
                norm.item()
            return norm

        monkeypatch.setattr(run.optimizer, "grad_norm", reading)
        values = losses(run, make, 0, CAPTURED)
        assert run.graph is not None
        assert not run.graph.captured
        assert run.graph.reason
        assert all(value == pytest.approx(values[0], rel=0.5) for value in values)
        assert torch.randn(4, device=DEVICE).isfinite().all()
        # What other streams have used is still given back: the loader's batches are.
        side = torch.cuda.Stream()
        torch.cuda.synchronize()
        before = torch.cuda.memory_reserved()
        for step in range(CAPTURED, CAPTURED + 8):
            batch = torch.ones(2**26, dtype=torch.uint8, device=DEVICE)
            batch.record_stream(side)
            del batch
            losses(run, make, step, step + 1)
            torch.cuda.synchronize()
        assert torch.cuda.memory_reserved() <= before + 3 * 2**26


def test_replays_take_no_more_memory() -> None:
    with opened("run.cuda_graph=on") as (run, make):
        losses(run, make, 0, CAPTURED + 2)
        before = torch.cuda.memory_allocated()
        losses(run, make, CAPTURED + 2, CAPTURED + 12)
        assert torch.cuda.memory_allocated() <= before


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_momentum_encoder_on_a_stream_of_its_own_changes_nothing(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Same(torch.cuda.Stream):
        """No stream of its own: everything in the order in which it is written."""

        def __new__(cls, *arguments: Any, **options: Any) -> Any:
            return torch.cuda.current_stream()

    def outcome() -> tuple[list[float], dict[str, Tensor]]:
        with opened("run.cuda_graph=off", f"optim.precision={precision}") as (run, make):
            return losses(run, make, 0, 8), tensors(run)

    beside = outcome()
    monkeypatch.setattr(torch.cuda, "Stream", Same)
    alone = outcome()
    assert beside[0] == pytest.approx(alone[0], rel=1e-4)
    assert apart(beside[1], alone[1]) < 1e-3


@pytest.mark.parametrize("bn", ["fused", "torch"])
def test_every_activation_is_channels_last(bn: str) -> None:
    with opened(f"model.bn={bn}", "optim.precision=bf16", "run.cuda_graph=off", "model.width=16") as (run, make):
        wrong: list[str] = []

        def check(name: str) -> Any:
            def hook(module: Any, inputs: Any, output: Any) -> None:
                if isinstance(output, Tensor) and output.dim() == 4:
                    seen.append(name)
                    if not output.is_contiguous(memory_format=torch.channels_last):
                        wrong.append(f"{name}: {tuple(output.shape)} {output.stride()}")

            return hook

        seen: list[str] = []
        for root in (run.model, run.ema):
            for name, module in [] if root is None else root.named_modules():
                module.register_forward_hook(check(name))
        run.step(0, make(0), 0.1)
        assert len(seen) > 20
        assert not wrong


def test_no_kernel_transposes_an_activation() -> None:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with opened("optim.precision=bf16", "run.cuda_graph=off", "model.width=16") as (run, make):
        losses(run, make, 0, 3)
        with torch.profiler.profile(activities=activities) as profile:
            losses(run, make, 3, 4)
        names = {event.key for event in profile.key_averages()}
        turned = [name for name in names if "nchwtonhwc" in name.lower() or "nhwctonchw" in name.lower()]
        assert not turned


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_in_every_precision_trains(precision: str) -> None:
    with opened(f"optim.precision={precision}") as (run, make):
        before = learnt(run)
        values = losses(run, make, 0, 6)
        assert all(value == pytest.approx(values[0], rel=0.5) for value in values)
        assert (int(run.guard.diverged), int(run.guard.skipped)) == (-1, 0)
        after = learnt(run)
        assert all(t.isfinite().all() for t in after.values())
        moved = [not torch.equal(t, before[name]) for name, t in after.items()]
        assert sum(moved) > 0.9 * len(moved)
        assert all(p.dtype == torch.float32 for p in run.method.parameters())


@pytest.mark.parametrize("graph", ["on", "off"])
def test_an_fp16_overflow_skips_the_step_and_halves_the_scale(graph: str) -> None:
    with opened("optim.precision=fp16", f"run.cuda_graph={graph}") as (run, make):
        run.guard.scale.fill_(1024.0)
        losses(run, make, 0, CAPTURED)
        if graph == "on":
            captured(run)
        before = learnt(run)
        run.guard.scale.fill_(2.0**40)
        losses(run, make, CAPTURED, CAPTURED + 1)
        assert (int(run.guard.skipped), int(run.guard.diverged)) == (1, -1)
        assert float(run.guard.scale) == 2.0**39
        assert all(torch.equal(t, before[name]) for name, t in learnt(run).items())
        run.guard.scale.fill_(1024.0)
        losses(run, make, CAPTURED + 1, CAPTURED + 2)
        assert (int(run.guard.skipped), int(run.guard.diverged)) == (0, -1)
        assert not all(torch.equal(t, before[name]) for name, t in learnt(run).items())


@pytest.mark.parametrize("graph", ["on", "off"])
def test_numbers_gone_bad_stop_every_update(graph: str) -> None:
    with opened(f"run.cuda_graph={graph}") as (run, make):
        losses(run, make, 0, CAPTURED)
        before = learnt(run)
        (batch,) = make(CAPTURED)
        batch.crops[0][0, 0, 0, 0] = torch.nan
        run.step(CAPTURED, [batch], 0.1)
        losses(run, make, CAPTURED + 1, CAPTURED + 3)
        assert int(run.guard.diverged) == CAPTURED
        assert all(torch.equal(t, before[name]) for name, t in learnt(run).items())


def test_the_gpu_computes_what_the_cpu_does() -> None:
    found = {}
    for device in ("cpu", DEVICE):
        with opened("optim.precision=fp32", device=device) as (run, make):
            found[device] = losses(run, make, 0, 6)
    assert found[DEVICE][0] == pytest.approx(found["cpu"][0], rel=2e-3)
    assert found[DEVICE] == pytest.approx(found["cpu"], rel=2e-2)


@pytest.mark.parametrize(
    "word", ["model.bn=torch", "optim.impl=torch", "model.recompute=blocks", "model.recompute=passes"]
)
@pytest.mark.parametrize("graph", ["on", "off"])
def test_another_way_to_compute_the_step_computes_the_same(word: str, graph: str) -> None:
    found = []
    for more in ((), (word,)):
        with opened("optim.precision=fp32", f"run.cuda_graph={graph}", *more) as (run, make):
            found.append(losses(run, make, 0, CAPTURED + 3))
            assert int(run.guard.diverged) == -1
    assert found[1][0] == pytest.approx(found[0][0], rel=2e-3)
    assert found[1] == pytest.approx(found[0], rel=2e-2)


@pytest.mark.parametrize("bn", ["fused", "torch"])
def test_a_training_on_synthetic_data_completes_and_resumes(bn: str, tmp_path: Path) -> None:
    words = ["data.path=synthetic", "run.cuda_graph=on", f"model.bn={bn}", "optim.precision=bf16"]
    config = c.load("demo", [*SETTINGS, *words, "run.log_every=3"])
    assert trainer.train(config, out=tmp_path / "run", max_steps=8, device=DEVICE).state == "completed"
    result = trainer.train(None, out=tmp_path / "run", resume="must", max_steps=14, device=DEVICE)
    assert (result.state, result.step) == ("completed", 14)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [record["train/loss"] for record in map(json.loads, lines) if "train/loss" in record]
    assert len(logged) >= 4
    assert all(0 < loss < 20 for loss in logged)


# Dynamo and Inductor use what torch has deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_compiled_step_computes_the_same() -> None:
    found = []
    for compiled in ("false", "true"):
        with opened("optim.precision=fp32", f"run.compile={compiled}", "run.cuda_graph=off") as (run, make):
            found.append(losses(run, make, 0, 3))
    assert found[1] == pytest.approx(found[0], rel=2e-2)


def mixture(rows: int, classes: int = 10, width: int = 64) -> tuple[Tensor, Tensor]:
    """Features of classes that overlap."""
    random = torch.Generator().manual_seed(rows)
    labels = torch.arange(rows) % classes
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    return centres[labels] + 2 * torch.randn(rows, width, generator=random), labels


@pytest.mark.parametrize("probe", probes.PROBES)
def test_probes_find_what_they_find_on_a_cpu(probe: str) -> None:
    data = probes.Features(*mixture(2000), *mixture(1000), num_classes=10)

    def found(device: str) -> list[probes.Outcome]:
        with features.exact():
            return probes.run(probe, data, seeds=(1, 2), device=torch.device(device), note=print)

    ours, cpu = found(DEVICE), found("cpu")
    for one, other in zip(ours, cpu, strict=True):
        assert (one.predictions == other.predictions).double().mean() > 0.97
        # A choice between strengths that are equally good may fall otherwise.
        assert one.validation == pytest.approx(other.validation, abs=0.01)
    again = found(DEVICE)
    assert all(torch.equal(a.predictions, b.predictions) for a, b in zip(ours, again, strict=True))


def test_neighbours_and_means_of_a_cpu_and_the_same_twice() -> None:
    (bank, labels), (queries, _) = mixture(5000), mixture(700)
    for scores in (
        lambda d: knn_scores(bank.to(d), labels.to(d), queries.to(d), 10, 20, 0.07),
        lambda d: mean_scores(bank.to(d), labels.to(d), queries.to(d), 10),
    ):
        ours = scores(DEVICE)
        assert torch.equal(ours, scores(DEVICE))
        torch.testing.assert_close(ours.cpu(), scores("cpu"), rtol=1e-3, atol=1e-4)


def test_features_for_transfer_are_those_of_a_cpu_and_the_same_twice(stripes: Path, tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    index = build(stripes)
    rows = index.rows("train", 0.0)
    transform = features.Transform(32, 32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 3)
    found = []
    for device, cache in ((DEVICE, None), (DEVICE, tmp_path), (DEVICE, tmp_path), ("cpu", None)):
        torch.manual_seed(0)
        encoder = build_encoder(c.ModelConfig(arch="resnet18", stem="small", width=8), 3).eval()
        world = World(0, 1, 0, 1, torch.device(device))
        net = encoder.to(device=world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        found.append(features.extract(net, "id", index, rows, transform, world, cache=cache).features)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])
    assert float((found[0] - found[3]).norm() / found[3].norm()) < 0.05  # decoders differ by a level or two


def contrastive(dtype: torch.dtype, rows: int = 512, keys: int = 8192, **more: Any) -> Call:
    """Queries and keys of 128 features, of the queries' images as well; ``more``: sizes and options of the case."""
    sizes = {"rows": rows, "keys": keys, "dim": 128, "classes": 100, "images": True, "reduction": "none", **more}
    return contrastive_cases.make(sizes, dtype, DEVICE, 0)


def loss_and_gradients(function: Callable[..., Any], call: Call, **more: Any) -> list[Tensor]:
    words: dict[str, Any] = dict(call.tensors)
    words |= {name: words[name].detach().clone().requires_grad_() for name in call.grads}
    loss, _ = function(**words, **call.options, **more)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), [words[name] for name in call.grads])]


@pytest.mark.parametrize(
    "options", [{}, {"hardness": 1.0, "margin": 0.3, "margin_kind": "arcface"}], ids=["plain", "all"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_contrastive_loss_is_as_exact_as_eager_and_the_same_twice(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    call = contrastive(dtype, **options)
    exact = {n: t.double() if t.is_floating_point() else t for n, t in call.tensors.items()}
    truth = loss_and_gradients(contrastive_cross_entropy, Call(exact, call.options, call.grads), impl="reference")
    usual = loss_and_gradients(contrastive_cases.OP.eager, call)
    ours = loss_and_gradients(contrastive_cross_entropy, call, impl="triton")
    again = loss_and_gradients(contrastive_cross_entropy, call, impl="triton")
    for mine, same, theirs, right in zip(ours, again, usual, truth, strict=True):
        assert torch.equal(mine, same)
        largest = right.abs().max()
        error, allowed = ((value.double() - right).abs().max() / largest for value in (mine, theirs))
        assert error <= 2 * allowed + 8 * torch.finfo(mine.dtype).eps


def test_the_contrastive_loss_takes_a_tenth_of_eagers_memory() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("eager's matrices want more than this GPU's memory")
    call = contrastive(torch.float32, rows=4096, keys=65_536, images=False)
    taken = {}
    for impl, function in (("triton", contrastive_cross_entropy), ("eager", contrastive_cases.OP.eager)):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss_and_gradients(function, call, **({"impl": impl} if impl == "triton" else {}))
        taken[impl] = torch.cuda.max_memory_allocated() - before
    # Ours holds both gradients of the keys' size and the copies that this test differentiates.
    assert taken["triton"] <= 0.1 * taken["eager"]


def test_the_contrastive_operators_replay_in_a_graph() -> None:
    call = contrastive(torch.bfloat16)
    leaves = {name: call.tensors[name].clone().requires_grad_() for name in call.grads}
    found = ("keys", "ids", "key_ids", "instance", "key_instance")

    def compute() -> list[Tensor]:
        words = {**call.tensors, **leaves}
        loss, stats = contrastive_cross_entropy(**words, **call.options, impl="triton")
        gradients = torch.autograd.grad(loss.sum(), [leaves[name] for name in call.grads])
        nearest = nearest_keys(words["input"], k=20, **{name: words[name] for name in found}, impl="triton")
        return [loss.detach(), *stats, *gradients, *nearest]

    torch.cuda.set_sync_debug_mode("error")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):
            compute()  # compiles the kernels
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = compute()
    with torch.no_grad():
        for leaf in leaves.values():
            leaf.copy_(torch.randn(leaf.shape, device=DEVICE))
    graph.replay()
    for replayed, fresh_one in zip(held, compute(), strict=True):
        assert torch.equal(replayed, fresh_one)
