"""All state of a run on one rank, and what one training step does to it (t-ReX, Sariyildiz et al., ICLR 2023).

One step: crops -> one encoder pass per resolution -> one projector pass -> per-row loss against the prototypes as they
stand -> momentum features of the first global crop -> backward -> bank, SGD, EMA. Whether numbers have gone bad is
decided on the device, for all ranks alike, before anything is changed.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import distributed, objectives
from .config import Config
from .data.index import Index
from .data.loader import Batch
from .distributed import World
from .errors import FastrexError
from .evaluate import evaluate
from .model.ema import make_ema
from .model.multicrop import MultiCropModel, set_process_group
from .model.projector import Projector
from .model.resnet import build_encoder
from .optim import Guard, Optimizer, load_tensors

# torch 2.13 renamed DDP's switch for sending buffers in every forward; 2.11 and 2.12 know the old name only.
_DDP_WORDS = inspect.signature(DistributedDataParallel).parameters
_KEEP_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _DDP_WORDS else "broadcast_buffers": False
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Method(nn.Module):
    """Model and objective as the one module that DDP wraps: an objective's class weights are trained like any other."""

    def __init__(self, model: MultiCropModel, objective: objectives.Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, crops: Sequence[Tensor], target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over all rows (one global crop weighs as much as one local crop) and tensors to log."""
        loss, metrics = self.objective(self.model(crops), target)
        return loss.mean(), metrics


class Trainer:
    """Model, momentum encoder, objective, optimiser and guard of one run."""

    def __init__(self, config: Config, num_classes: int, world: World) -> None:
        self.config, self.world = config, world
        torch.manual_seed(config.run.seed)
        encoder = build_encoder(config.model, config.data.channels)
        bn = {"bn_momentum": config.model.bn_momentum, "bn_eps": config.model.bn_eps}
        projector = Projector(int(encoder.num_features), config.projector, **bn)  # type: ignore[arg-type]
        model = MultiCropModel(encoder, projector)
        self.model = model.to(device=world.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.objective = objectives.make(config, config.projector.out_dim, num_classes).to(world.device)
        set_process_group(self.model, world.group)
        self.method = Method(self.model, self.objective)
        distributed.broadcast_([*self.method.parameters(), *self.method.buffers()], world)
        self.ema = make_ema(self.model) if self.objective.needs_ema else None
        self.parallel: DistributedDataParallel | None = None
        if world.size > 1:
            # Buffers are equal on all ranks by construction (SyncBN, gathered bank): sending them again in every
            # forward would only cost. Gradients are views into the buckets, so that the all-reduce copies nothing.
            self.parallel = DistributedDataParallel(
                self.method,
                device_ids=[world.device] if world.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                **_KEEP_BUFFERS,
            )
        self.precision = resolve_precision(config.optim.precision, world.device)
        ema = {} if self.ema is None else {f"model.{name}": p for name, p in self.ema.named_parameters()}
        self.optimizer = Optimizer(dict(self.method.named_parameters()), ema, config.optim, config.model.ema_momentum)
        self.guard = Guard(self.precision == "fp16").to(world.device)

    def autocast(self) -> torch.autocast:
        dtype = DTYPES[self.precision]
        return torch.autocast(self.world.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def step(self, step: int, micros: Sequence[Batch], lr: float) -> dict[str, Tensor]:
        """One optimiser step over the micro-batches of this rank; returns 0-d device tensors to log, without a host
        sync."""
        self.optimizer.zero_grad()
        ok = torch.ones((), dtype=torch.bool, device=self.world.device)
        logged: dict[str, Tensor] = {}
        momentum_features: list[Tensor] = []
        for batch in micros:
            with self._reduce_gradients(batch is micros[-1]):
                with self.autocast():
                    loss, metrics = (self.parallel or self.method)(batch.crops, batch.target)
                ok = ok & torch.isfinite(loss.detach())
                if self.ema is not None:
                    with torch.no_grad(), self.autocast():
                        z = self.ema((batch.crops[0][: len(batch.target)],))
                    ok = ok & torch.isfinite(z).all()
                    momentum_features.append(z)
                self.guard.scaled(loss / len(micros)).backward()  # type: ignore[no-untyped-call]
            for name, value in {"loss": loss, **metrics}.items():
                logged[name] = logged.get(name, 0.0) + value.detach() / len(micros)
        inv_scale = self.guard.inv_scale  # of this step: judge() may change the scale for the next one
        norm = self.optimizer.grad_norm(inv_scale)
        skip, keep = self.guard.judge(step, distributed.all_true(ok, self.world), torch.isfinite(norm))
        if momentum_features:
            # Micro-batch by micro-batch: then the bank's order is the global batch's for any number of ranks.
            z = torch.cat([distributed.gather_rows(part, self.world) for part in momentum_features])
            y = torch.cat([distributed.gather_rows(batch.target, self.world) for batch in micros])
            self.objective.update_(z, y, keep=keep)
        self.optimizer.step(lr, skip, inv_scale)
        return {**logged, "grad_norm": norm}

    def evaluate(self, index: Index, note: Callable[[str], None] = lambda line: None) -> dict[str, float]:
        """Held-out accuracies of the online encoder, with the objective's classifier and by k-NN; ``note`` as in
        :func:`fastrex.evaluate.evaluate`."""
        self.method.eval()

        def predict(features: Tensor) -> Tensor | None:
            return self.objective.predict(self.model.projector(features).float())

        result = evaluate(self.model.encoder, index, self.config, self.world, self.autocast, predict, note)
        self.method.train()
        return result

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Every tensor of the run, by checkpoint file."""
        ema = {} if self.ema is None else {"ema": self.ema.state_dict()}
        optimizer = {**self.optimizer.state(), **{f"guard.{name}": b for name, b in self.guard.state_dict().items()}}
        return {"model": self.model.state_dict(), **ema, "bank": self.objective.state_dict(), "optimizer": optimizer}

    def load(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take a checkpoint's tensors in place; missing, surplus or foreign ones are refused by name."""
        mine = self.parts()
        if mine.keys() != parts.keys():
            raise FastrexError(f"resume: checkpoint must hold {', '.join(mine)}, got {', '.join(parts)}")
        for name, tensors in mine.items():
            load_tensors(tensors, parts[name], name)

    def _reduce_gradients(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """DDP averages the gradients once, in the backward of the last micro-batch."""
        return contextlib.nullcontext() if last or self.parallel is None else self.parallel.no_sync()


def resolve_precision(name: str, device: torch.device) -> str:
    """``auto`` is bf16 where the hardware computes in it; otherwise fp16 on a GPU and fp32 on a CPU."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() else "fp32"
