"""The training step: no host sync, gradients and updates of every kind, fused and plain numerics."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from conftest import SETTINGS, settings_for
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastrex
from fastrex import apex
from fastrex import config as c
from fastrex.config import OptimConfig
from fastrex.data.dataset import open_dataset
from fastrex.data.loader import Batch
from fastrex.distributed import World
from fastrex.optim import Optimizer
from fastrex.step import Trainer

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
SYNTHETIC = "data.path=synthetic"
PLAIN = ("model.bn=torch", "optim.impl=torch")
# In a net of 4 channels a single ReLU that rounding shuts or opens shows in a gradient.
WIDER = "model.width=16"
FALSE, TRUE = torch.tensor(False), torch.tensor(True)
# What brings a device value to the host, or a shape that depends on one.
READS = (
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "_unique2",
    "unique_dim", "unique_consecutive", "repeat_interleave.Tensor", "allclose",
)  # fmt: skip


class Reads(TorchDispatchMode):
    """Collects the operators that would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.name().removeprefix("aten::")
        if name in READS or name.partition(".")[0] in READS:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU labels are looked at in every call, which costs nothing there; on a GPU they are not."""
    for name, module in list(sys.modules.items()):
        if name.startswith("fastrex_kernels") and hasattr(module, "readable"):
            monkeypatch.setattr(module, "readable", lambda tensor: False)


def trainer_and_batches(*words: str, steps: int = 4, nudge: float = 0.0) -> tuple[Trainer, list[Batch]]:
    config = c.load("demo", [*SETTINGS, SYNTHETIC, *words])
    data = open_dataset(config, ALONE)
    trainer = Trainer(config, len(data.classes), ALONE)
    if nudge:
        with torch.no_grad():
            for p in trainer.model.parameters():
                p.mul_(1 + nudge)
    with data.batches(0, steps, ALONE) as loader:
        batches = list(loader)
    # The synthetic loader repeats one batch; here every step gets its own.
    generator = torch.Generator().manual_seed(1)
    fresh = []
    for batch in batches:
        crops = tuple(torch.randn(crop.shape, generator=generator).to(crop) for crop in batch.crops)
        crops = tuple(crop.contiguous(memory_format=torch.channels_last) for crop in crops)
        target = torch.randint(len(data.classes), batch.target.shape, generator=generator)
        fresh.append(Batch(**{**vars(batch), "crops": crops, "target": target}))
    return trainer, fresh


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("objective", ["class_means", "cosine_softmax"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_reads_no_device_value(objective: str, precision: str) -> None:
    settings = [s for s in settings_for(objective) if not s.startswith("optim.precision")]
    config = c.load("demo", [*settings, SYNTHETIC, f"optim.precision={precision}"])
    data = open_dataset(config, ALONE)
    trainer = Trainer(config, len(data.classes), ALONE)
    with data.batches(0, 3, ALONE) as loader, Reads() as reads:
        for batch in loader:
            trainer.step(batch.step, [batch], 0.1)
    assert reads.seen == []


def test_a_read_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, batches = trainer_and_batches(steps=1)
    real = trainer.optimizer.grad_norm

    def reading(inv_scale: Tensor | None = None) -> Tensor:
        norm = real(inv_scale)
        assert float(norm) > 0
        return norm

    monkeypatch.setattr(trainer.optimizer, "grad_norm", reading)
    with Reads() as reads:
        trainer.step(0, batches, 0.1)
    assert "_local_scalar_dense" in reads.seen


@pytest.mark.usefixtures("as_on_a_gpu")
def test_the_loop_reads_on_logging_steps_only(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    by_step: dict[int, list[str]] = {}
    with Reads() as reads:
        real = Trainer.step

        def step(self: Trainer, number: int, micros: Sequence[Batch], lr: float) -> dict[str, Tensor]:
            by_step[number - 1] = list(reads.seen)  # since the last step began
            reads.seen.clear()
            return real(self, number, micros, lr)

        monkeypatch.setattr(Trainer, "step", step)
        config = c.load("demo", [*SETTINGS, SYNTHETIC, "run.log_every=4", "checkpoint.every_epochs=0"])
        fastrex.train(config, out=tmp_path / "run", max_steps=10, device="cpu")
    # Step n is logged once n + 1 steps are done; the last step also saves.
    between = {number: seen for number, seen in by_step.items() if number >= 0 and (number + 1) % 4}
    assert sorted(between) == [0, 1, 2, 4, 5, 6, 8]
    assert not any(between.values()), between


def net_and_optimizer(config: OptimConfig, gradients: str = "fresh", copies: bool = False) -> tuple[nn.Module, Any]:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5 * 36, 4))
    net = net.to(memory_format=torch.channels_last)
    parameters = dict(net.named_parameters())
    ema = {name: p.detach().clone() for name, p in parameters.items() if not name.startswith("3")}
    low = {
        n: torch.empty_like(p, dtype=torch.bfloat16, requires_grad=False) for n, p in parameters.items() if p.ndim > 1
    }
    ema_low = {n: torch.empty_like(ema[n], dtype=torch.bfloat16) for n in low if n in ema}
    more = {"copies": low, "ema_copies": ema_low} if copies else {}
    return net, Optimizer(parameters, ema, config, 0.75, gradients=gradients, **more)


def train(net: nn.Module, optimizer: Optimizer, steps: int = 4, skipped: int = 2, scale: float | None = None) -> None:
    generator = torch.Generator().manual_seed(5)
    inv_scale = None if scale is None else torch.tensor(1 / scale)
    for step in range(steps):
        optimizer.zero_grad()
        for _ in range(2):  # as two resolutions: gradients meet
            x = torch.randn(4, 3, 8, 8, generator=generator).contiguous(memory_format=torch.channels_last)
            loss: Tensor = net(x).square().mean()
            (loss if scale is None else loss * scale).backward()
        assert math.isfinite(optimizer.grad_norm(inv_scale))
        optimizer.set_lr(0.1 / (1 + step))
        optimizer.step(TRUE if step == skipped else FALSE, inv_scale)


def everything(net: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        **{f"p.{n}": p.detach() for n, p in net.named_parameters()},
        **optimizer.state(),
        **{f"ema.{n}": t for n, t in optimizer.ema.items()},
        **{f"copy.{n}": t for n, t in optimizer.copies.items()},
        **{f"ema copy.{n}": t for n, t in optimizer.ema_copies.items()},
    }


def test_flat_gradients_are_one_buffer_that_stays() -> None:
    (plain, a), (net, b) = (net_and_optimizer(OptimConfig(), kind) for kind in ("fresh", "flat"))
    assert b.flat is None
    train(plain, a, steps=1)
    train(net, b, steps=1)
    places = {n: p.grad.data_ptr() for n, p in net.named_parameters()}
    train(plain, a)
    train(net, b)
    assert {n: p.grad.data_ptr() for n, p in net.named_parameters()} == places
    # Every gradient lies in the buffer, in its parameter's own layout, and nothing else does.
    assert b.flat is not None
    start, end = b.flat.data_ptr(), b.flat.data_ptr() + b.flat.nbytes
    for p in net.parameters():
        assert start <= p.grad.data_ptr() < end
        assert p.grad.stride() == p.stride()
    assert torch.linalg.vector_norm(b.flat) == pytest.approx(
        float(torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in net.parameters()]))), rel=1e-6
    )
    for name, tensor in everything(plain, a).items():
        assert torch.equal(tensor, everything(net, b)[name]), name


def test_flat_gradients_leave_alone_what_has_none() -> None:
    net = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    optimizer = Optimizer(dict(net.named_parameters()), {}, OptimConfig(weight_decay=0.5), 0.9, gradients="flat")
    before = net[1].weight.clone()
    for _ in range(3):
        optimizer.zero_grad()
        net[0](torch.ones(1, 2)).sum().backward()
        optimizer.grad_norm()
        optimizer.set_lr(0.1)
        optimizer.step(FALSE, None)
    assert torch.equal(net[1].weight, before)


def test_kept_gradients_are_cleared_in_place() -> None:
    (plain, a), (net, b) = (net_and_optimizer(OptimConfig(), kind) for kind in ("fresh", "kept"))
    train(plain, a)
    train(net, b)
    for name, tensor in everything(plain, a).items():
        assert torch.equal(tensor, everything(net, b)[name]), name


class FusedSGD(torch.optim.SGD):
    """NVIDIA apex's interface, as far as it is used: a learning rate from the host, a flag that stops the kernels."""

    def __init__(self, groups: Any, lr: float, momentum: float) -> None:
        super().__init__(groups, lr=lr, momentum=momentum)
        self._dummy_overflow_buf = torch.zeros(1, dtype=torch.int32)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        assert isinstance(self.param_groups[0]["lr"], float)
        return None if self._dummy_overflow_buf.any() else super().step(closure)


@pytest.mark.parametrize("impl", ["torch", "apex"])
@pytest.mark.parametrize("scale", [None, 64.0])
@pytest.mark.parametrize("gradients", ["fresh", "flat"])
def test_every_update_computes_the_same(
    impl: str, scale: float | None, gradients: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apex, "fused_sgd", lambda: FusedSGD)
    config = OptimConfig(weight_decay=0.1)
    net, optimizer = net_and_optimizer(config, gradients, copies=True)
    train(net, optimizer, scale=scale)
    other, theirs = net_and_optimizer(c.OptimConfig(weight_decay=0.1, impl=impl), gradients, copies=True)
    train(other, theirs, scale=scale)
    ours = everything(net, optimizer)
    assert len(ours) > 15
    for name, tensor in everything(other, theirs).items():
        torch.testing.assert_close(
            tensor, ours[name], rtol=2e-5, atol=1e-6, check_dtype=True, msg=lambda m, n=name: n + m
        )
    # A copy is its master, rounded.
    for name, copy in theirs.copies.items():
        assert torch.equal(copy, theirs.parameters[name].detach().to(torch.bfloat16))
    for name, copy in optimizer.ema_copies.items():
        assert torch.equal(copy, optimizer.ema[name].to(torch.bfloat16))


@pytest.mark.parametrize("impl", ["fused", "torch", "apex"])
def test_a_skipped_step_changes_nothing(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apex, "fused_sgd", lambda: FusedSGD)
    net, optimizer = net_and_optimizer(OptimConfig(impl=impl), copies=True)
    train(net, optimizer, steps=2, skipped=9)
    before = {name: tensor.clone() for name, tensor in everything(net, optimizer).items()}
    for p in net.parameters():
        p.grad = torch.full_like(p, math.nan)
    optimizer.step(TRUE, None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in everything(net, optimizer).items())


def run(trainer: Trainer, batches: Sequence[Batch]) -> tuple[list[float], dict[str, Tensor]]:
    losses = [float(trainer.step(n, [batch], 0.02)["loss"]) for n, batch in enumerate(batches)]
    return losses, {name: p.detach() for name, p in trainer.method.named_parameters()}


def apart(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Largest relative distance of a weight; those that stay at rounding level are left out."""
    return max(float((t - b[n]).norm() / t.norm()) for n, t in a.items() if t.ndim > 1)


def as_float(batch: Batch) -> Batch:
    return Batch(**{**vars(batch), "crops": tuple(crop.float() for crop in batch.crops)})


def test_fused_and_plain_agree() -> None:
    """Design: first loss to 1e-5, gradients to 1e-4, and at 50 steps no further apart than two plain runs whose
    weights differ by 1e-7."""
    steps = 50
    fused, batches = trainer_and_batches(WIDER, steps=steps)
    plain, _ = trainer_and_batches(WIDER, *PLAIN, steps=1)
    nudged, _ = trainer_and_batches(WIDER, *PLAIN, steps=1, nudge=1e-7)
    gradients = []
    for trainer in (fused, plain):
        # The first step's gradients, before anything has moved.
        real = trainer.optimizer.grad_norm

        def kept(inv_scale: Tensor | None = None, trainer: Trainer = trainer, real: Any = real) -> Tensor:
            if len(gradients) < 2 and not any(found[0] is trainer for found in gradients):
                grads = {n: p.grad.clone() for n, p in trainer.method.named_parameters() if p.grad is not None}
                gradients.append((trainer, grads))
            return real(inv_scale)

        trainer.optimizer.grad_norm = kept  # type: ignore[method-assign]
    (losses, weights), (plain_losses, plain_weights), (_, other) = (run(t, batches) for t in (fused, plain, nudged))
    assert losses[0] == pytest.approx(plain_losses[0], rel=1e-5)
    assert apart(gradients[1][1], gradients[0][1]) < 1e-4
    assert apart(plain_weights, weights) <= max(apart(plain_weights, other), 1e-5)


def test_fused_and_plain_agree_in_bf16() -> None:
    """The fused path is no further from fp32 than PyTorch's own kernels under autocast are."""
    words, bf16 = (WIDER, "optim.lr=0.1"), "optim.precision=bf16"
    fused, batches = trainer_and_batches(*words, bf16, steps=4)
    plain, _ = trainer_and_batches(*words, bf16, *PLAIN, steps=1)
    exact, _ = trainer_and_batches(*words, *PLAIN, steps=1)
    assert fused.optimizer.copies
    (losses, weights), (plain_losses, plain_weights) = run(fused, batches), run(plain, batches)
    exact_losses, exact_weights = run(exact, [as_float(batch) for batch in batches])
    assert losses[0] == pytest.approx(exact_losses[0], rel=2e-3)
    # Later losses are noise of either sign: their size is what can be compared.
    ours, theirs = (
        max(abs(loss - truth) for loss, truth in zip(found, exact_losses, strict=True))
        for found in (losses, plain_losses)
    )
    assert ours <= 2 * theirs + 5e-3 * exact_losses[0]
    assert apart(exact_weights, weights) <= 1.5 * apart(exact_weights, plain_weights)
    # The copies are the masters, rounded, after every step.
    for name, copy in fused.optimizer.copies.items():
        assert torch.equal(copy, fused.optimizer.parameters[name].detach().to(torch.bfloat16)), name


def test_loading_a_checkpoint_renews_the_copies() -> None:
    trainer, batches = trainer_and_batches("optim.precision=bf16", steps=2)
    run(trainer, batches)
    other, _ = trainer_and_batches("optim.precision=bf16", steps=1)
    other.load(trainer.parts())
    for name, copy in other.optimizer.copies.items():
        assert torch.equal(copy, trainer.optimizer.copies[name]), name
    assert run(trainer, batches)[0] == run(other, batches)[0]


@pytest.mark.filterwarnings("ignore:.*script_method.* is deprecated:DeprecationWarning")
def test_compiled_encoders_are_the_same_step() -> None:
    plain, batches = trainer_and_batches(steps=2)
    compiled, _ = trainer_and_batches("run.compile=true", steps=1)
    assert all(net.encoder._compiled_call_impl is not None for net in (compiled.model, compiled.ema))
    # What the compiler makes of the encoder is tested with the model; here no minute is spent on it.
    with torch.compiler.set_stance("force_eager"):
        losses, weights = run(compiled, batches)
    plain_losses, plain_weights = run(plain, batches)
    assert losses == plain_losses
    assert all(torch.equal(p, weights[name]) for name, p in plain_weights.items())
