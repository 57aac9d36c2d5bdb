"""All state of a run on one rank, and what one training step does to it (t-ReX, Sariyildiz et al., ICLR 2023).

One step: momentum features of the first global crop, beside them crops -> one encoder pass per resolution -> one
projector pass -> per-row loss against the prototypes as they stand -> backward; then bank, SGD, EMA. Whether numbers
have gone bad is decided on the device, for all ranks alike, before anything is changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import distributed, objectives, views
from .config import Config
from .data.dataset import DTYPES
from .data.index import Index
from .data.loader import Batch
from .distributed import World
from .errors import DivergedError, FastrexError
from .evaluate import evaluate
from .graph import WARM_UP, WARM_UP_RANKS, Inputs, StepGraph, inputs
from .model.ema import make_ema
from .model.layers import attach_copies, refresh_copies
from .model.multicrop import MultiCropModel, set_process_group
from .model.norm import resolve_bn
from .model.projector import Projector
from .model.resnet import ResNet, build_encoder
from .optim import Guard, Optimizer, check_tensors, load_tensors

# torch 2.13 renamed DDP's switch for sending buffers in every forward; 2.11 and 2.12 know the old name only.
_DDP_WORDS = inspect.signature(DistributedDataParallel).parameters
_KEEP_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _DDP_WORDS else "broadcast_buffers": False
}


class Method(nn.Module):
    """Model and objective as the one module that DDP wraps: an objective's class weights are trained like any other."""

    def __init__(self, model: MultiCropModel, objective: objectives.Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(
        self, crops: Sequence[Tensor], target: Tensor, context: objectives.Context
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None, Tensor]:
        """Mean loss over all rows (one global crop weighs as much as one local crop), tensors to log, the features
        [B, D] of the first crop for an objective that is fed with the model's own, and whether all features are finite
        (0-d bool): a loss need not show it, where rows without anything to compare them with have 0."""
        features = self.model(crops)
        loss, metrics = self.objective(features, target, context)
        own = features.detach()[: len(target)] if self.objective.feeds == "online" else None
        return loss.mean(), metrics, own, torch.isfinite(features.detach()).all()


class Trainer:
    """Model, momentum encoder, objective, optimiser and guard of one run.

    ``notices`` say for the log what was chosen; ``news`` what turned out later.
    """

    def __init__(self, config: Config, num_classes: int, world: World) -> None:
        device = world.device
        self.precision = resolve_precision(config.optim.precision, device)
        bn, line = resolve_bn(config.model.bn, self.precision, device, world.size)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, bn=bn))
        self.config, self.world = config, world
        self.notices, self.news = [line], deque[str]()
        torch.manual_seed(config.run.seed)
        encoder = build_encoder(config.model, config.data.channels)
        norms: dict[str, Any] = {"bn_momentum": config.model.bn_momentum, "bn_eps": config.model.bn_eps, "bn": bn}
        projector = Projector(int(encoder.num_features), config.projector, **norms)  # type: ignore[arg-type]
        model = MultiCropModel(encoder, projector, config.model.recompute)
        self.model = model.to(device=device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.objective = objectives.make(config, projector.out_features, num_classes, world.group).to(device)
        set_process_group(self.model, world.group)
        self.method = Method(self.model, self.objective)
        # As the method names them; every rank draws its own rows of these from the seed.
        self.split = frozenset(f"objective.{name}" for name in self.objective.split)
        shared = (p for name, p in self.method.named_parameters() if name not in self.split)
        distributed.broadcast_([*shared, *self.method.buffers()], world)
        self.ema = make_ema(self.model) if self.objective.needs_ema else None
        # Crops per image and their sides, as the model sees them.
        self.crops = views.model_groups(config, self.objective)
        self.notices += views.notices(config, self.objective)
        copies, ema_copies = self._attach_copies()
        if config.run.compile:
            for net in (self.model, self.ema):
                if net is not None:
                    net.encoder.compile()
        recorded, words = _recorded(config, device, world.size, isinstance(encoder, ResNet))
        self.notices += words
        stream: Any = torch.cuda.Stream(device) if recorded else None  # type: ignore[no-untyped-call]
        self.parallel = self._parallel(stream) if world.size > 1 else None
        self.optimizer = Optimizer(
            dict(self.method.named_parameters()),
            {} if self.ema is None else {f"model.{name}": p for name, p in self.ema.named_parameters()},
            config.optim,
            config.model.ema_momentum,
            copies=copies,
            ema_copies=ema_copies,
            gradients="kept" if self.parallel is not None else "flat" if device.type == "cuda" else "fresh",
            split=self.split,
            world=world,
        )
        self.guard = Guard(self.precision == "fp16").to(device)
        self.number = torch.zeros((), dtype=torch.int64, device=device)
        # Over several ranks the batch norms of both encoders talk on one communicator, in one order: no side by side.
        aside = device.type == "cuda" and world.size == 1 and self.ema is not None
        self.side: Any = torch.cuda.Stream(device) if aside else None  # type: ignore[no-untyped-call]
        self.graph: StepGraph | None = None
        if recorded:
            warm_up = WARM_UP if self.parallel is None else WARM_UP_RANKS
            self.graph = StepGraph(self._step, device, stream, warm_up=warm_up, must=config.run.cuda_graph == "on")
        self._in_flight = deque[Any]()

    def autocast(self) -> torch.autocast:
        dtype = DTYPES[self.precision]
        return torch.autocast(self.world.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def step(self, step: int, micros: Sequence[Batch], lr: float) -> dict[str, Tensor]:
        """One optimiser step over the micro-batches of this rank; returns 0-d device tensors to log, without a host
        sync. They are valid until the next step."""
        self.number.fill_(step)
        self.optimizer.set_lr(lr)
        if self.graph is None:
            logged = self._step(inputs(micros))
        else:
            before = (self.graph.captured, self.graph.reason)
            logged = self.graph(micros)
            if (self.graph.captured, self.graph.reason) != before:
                done = "the step is replayed as one graph from now on"
                missed = f"the step could not be recorded and runs kernel by kernel: {self.graph.reason}"
                self.news.append(f"CUDA graph: {done if self.graph.captured else missed}")
        if self.world.device.type == "cuda":
            self._throttle()
        return logged

    def _step(self, micros: Inputs) -> dict[str, Tensor]:
        """What a step does on the device: nothing here asks for a value."""
        self.optimizer.zero_grad()
        ok = torch.ones((), dtype=torch.bool, device=self.world.device)
        logged: dict[str, Tensor] = {}
        momentum_features: list[Tensor] = []
        own_features: list[Tensor] = []
        for number, (crops, target, images) in enumerate(micros, 1):
            context = objectives.Context(images)
            if self.ema is not None:
                momentum_features.append(self._momentum_features(self.ema, crops[0][: len(target)]))
                if self.objective.keys_first:
                    self._join_side()
                    context = objectives.Context(images, momentum_features[-1])
            seen = views.without_first(crops, len(target)) if self.objective.separate_view else crops
            with self._reduce_gradients(number == len(micros)):
                with self.autocast():
                    loss, metrics, own, finite = (self.parallel or self.method)(seen, target, context)
                ok = ok & finite & torch.isfinite(loss.detach())
                self.guard.scaled(loss / len(micros)).backward()  # type: ignore[no-untyped-call]
            if own is not None:
                own_features.append(own)
            for name, value in {"loss": loss, **metrics}.items():
                logged[name] = logged.get(name, 0.0) + value.detach() / len(micros)
        self._join_side()
        for z in momentum_features:
            ok = ok & torch.isfinite(z).all()
        inv_scale = self.guard.inv_scale  # of this step: judge() may change the scale for the next one
        norm = self.optimizer.grad_norm(inv_scale)
        skip, keep = self.guard.judge(self.number, distributed.all_true(ok, self.world), torch.isfinite(norm))
        directions = self.objective.class_directions()
        if fed := {"momentum": momentum_features, "online": own_features, "": []}[self.objective.feeds]:
            # Micro-batch by micro-batch: then the bank's order is the global batch's for any number of ranks.
            gathered = [
                torch.cat([distributed.gather_rows(part, self.world) for part in parts])
                for parts in (fed, [target for _, target, _ in micros], [images for _, _, images in micros])
            ]
            features, targets, shown = gathered
            self.objective.update_(features, targets, keep=keep, images=shown)
        self.optimizer.step(skip, inv_scale)
        return {**logged, "grad_norm": norm, **self.objective.class_change(directions)}

    def _momentum_features(self, ema: MultiCropModel, images: Tensor) -> Tensor:
        """Features of the first global crop, on a GPU on a stream of their own: its kernels fill what those of the
        small crops leave idle, until the bank wants them after the backward."""
        if self.side is not None:
            self.side.wait_stream(torch.cuda.current_stream(self.world.device))
        beside = contextlib.nullcontext() if self.side is None else torch.cuda.stream(self.side)
        with beside, torch.no_grad(), self.autocast():
            features: Tensor = ema((images,))
        return features

    def _join_side(self) -> None:
        """From here on the momentum features may be read."""
        if self.side is not None:
            torch.cuda.current_stream(self.world.device).wait_stream(self.side)

    def _throttle(self) -> None:
        """Let the host be two steps ahead of the device, no more: batches that wait in the queue hold memory."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record()
        self._in_flight.append(event)
        if len(self._in_flight) > 2:
            self._in_flight.popleft().synchronize()

    def _attach_copies(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copies of the weights in the dtype of the products, by parameter: rounded once a step by the optimiser
        instead of by autocast in every forward."""
        dtype = DTYPES[self.precision]
        if dtype == torch.float32:
            return {}, {}
        nets = [net and attach_copies(net, dtype) for net in (self.model, self.ema)]
        own, ema = ({f"model.{name}": copy for name, copy in (copies or {}).items()} for copies in nets)
        return own, ema

    def refresh_copies(self) -> None:
        """After weights were changed from outside."""
        for net in (self.model, self.ema):
            if net is not None:
                refresh_copies(net)

    def close(self) -> None:
        """Let go of the recorded step: a communicator that it uses cannot end before it."""
        if self.graph is not None:
            torch.cuda.synchronize(self.world.device)
            self.graph = None

    def _parallel(self, stream: Any) -> DistributedDataParallel:
        """Averages gradients over ranks. Buffers are equal on all ranks by construction (SyncBN, gathered bank): they
        are sent once, above, and never again. Gradients are views into the buckets: the all-reduce copies nothing."""
        device = self.world.device
        # torch's mechanism for what it must neither average nor send: the gradients of split rows are averages already.
        self.method._ddp_params_and_buffers_to_ignore = self.split  # type: ignore[assignment]
        # Its hooks belong to the stream that it is built on, which must be the one of the recording.
        with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
            parallel = DistributedDataParallel(
                self.method,
                device_ids=[device] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                init_sync=False,
                **_KEEP_BUFFERS,
            )
        if self.config.optim.reduce_dtype == "bf16":
            # Not the function itself: torch wants its annotations to be types, ours are strings.
            parallel.register_comm_hook(None, lambda group, bucket: distributed.average_in_bf16(group, bucket))
        return parallel

    def evaluate(self, index: Index, note: Callable[[str], None] = lambda line: None) -> dict[str, float]:
        """Held-out accuracies of the online encoder, with the objective's classifier and by k-NN; ``note`` as in
        :func:`fastrex.evaluate.evaluate`."""
        self.method.eval()
        classify = self.objective.classifier()

        def predict(features: Tensor) -> Tensor | None:
            return classify(self.model.projector(features).float())

        result = evaluate(self.model.encoder, index, self.config, self.world, self.autocast, predict, note)
        self.method.train()
        return result

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Every tensor of the run, by checkpoint file: the same on every rank and for any number of ranks.

        To be called by all ranks together: rows that are split over them are sent around, and come on the host.
        """
        parts = self._own_parts()
        for part, name in self.split_parts():
            parts[part][name] = self.objective.join(parts[part][name])
        return parts

    def part_shapes(self) -> dict[str, dict[str, Tensor]]:
        """:meth:`parts` as tensors without memory (device "meta"): names, dtypes and shapes; asks no other rank."""
        parts = self._own_parts()
        shapes = {part: {n: torch.empty_like(t, device="meta") for n, t in parts[part].items()} for part in parts}
        for part, name in self.split_parts():
            shapes[part][name] = shapes[part][name].new_empty(self.objective.joined_shape(parts[part][name]))
        return shapes

    def _own_parts(self) -> dict[str, dict[str, Tensor]]:
        """The same without other ranks' rows."""
        ema = {} if self.ema is None else {"ema": self.ema.state_dict()}
        optimizer = {**self.optimizer.state(), **{f"guard.{name}": b for name, b in self.guard.state_dict().items()}}
        return {"model": self.model.state_dict(), **ema, "bank": self.objective.state_dict(), "optimizer": optimizer}

    def load(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take a checkpoint's tensors in place; missing, surplus or foreign ones, and values that the objective cannot
        have, are refused by name before anything is changed."""
        mine = self._own_parts()
        if mine.keys() != parts.keys():
            raise FastrexError(f"resume: checkpoint must hold {', '.join(mine)}, got {', '.join(parts)}")
        given = {part: dict(tensors) for part, tensors in parts.items()}
        for part, name in self.split_parts():
            if name in given[part]:
                given[part][name] = self.objective.own(given[part][name])
        # All of it before any of it is loaded.
        for part, tensors in mine.items():
            check_tensors(tensors, given[part], part)
        self.objective.check(given["bank"])
        for part, tensors in mine.items():
            load_tensors(tensors, given[part], part)
        self.refresh_copies()

    def split_parts(self) -> list[tuple[str, str]]:
        """Where in the parts the rows stand that are split over ranks: the weights and their momentum."""
        weights = [("bank", name) for name in sorted(self.objective.split)]
        return [*weights, *(("optimizer", f"momentum.{name}") for name in sorted(self.split))]

    def check_finite(self, step: int) -> None:
        """Before a checkpoint of ``step`` steps: whether all state is finite, also what no loss has shown (running
        statistics that overflowed). To be called by all ranks together; a host sync.

        Raises:
            DivergedError: naming the first tensor that is not, on all ranks alike.
        """
        floating = [
            (f"{part} tensor {name!r}", tensor)
            for part, tensors in self._own_parts().items()
            for name, tensor in tensors.items()
            if tensor.is_floating_point()
        ]
        # The largest value of each: a Euclidean norm of large numbers would overflow by itself.
        largest = torch._foreach_norm([tensor.detach() for _, tensor in floating], float("inf"))
        own = torch.stack([torch.isfinite(value) for value in largest])
        finite = distributed.gather_rows(own[None].int(), self.world).amin(0).tolist()
        for (name, _), good in zip(floating, finite, strict=True):
            if not good:
                raise DivergedError(
                    f"train: all state must be finite, got NaN or inf in {name} after step {step}; the last good "
                    "checkpoint stays; lower optim.lr, lengthen optim.warmup_epochs or use --precision fp32"
                )

    def _reduce_gradients(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """DDP averages the gradients once, in the backward of the last micro-batch."""
        return contextlib.nullcontext() if last or self.parallel is None else self.parallel.no_sync()


def _recorded(config: Config, device: torch.device, ranks: int, own_encoder: bool) -> tuple[bool, list[str]]:
    """Whether the step is to become a CUDA graph, and what the log should say of it.

    Raises:
        FastrexError: it must, and cannot.
    """
    wanted = config.run.cuda_graph
    reason = ""
    if device.type != "cuda":
        reason = f"this run is on the {device.type.upper()}"
    elif config.optim.impl == "apex":
        reason = "optim.impl=apex takes the learning rate from the host"
    elif config.model.recompute == "passes" and not own_encoder:
        reason = "model.recompute=passes repeats the random numbers of a foreign encoder"
    if wanted == "on" and reason:
        raise FastrexError(f"train: run.cuda_graph=on must be able to record the step, but {reason}; use auto or off")
    if wanted == "off" or device.type != "cuda":
        return False, []
    if wanted == "auto" and ranks > 1:
        reason = f"over {ranks} ranks it is made on request (run.cuda_graph=on)"
    return not reason, [f"CUDA graph: {f'off, {reason}' if reason else 'recorded after the first steps'}"]


def resolve_precision(name: str, device: torch.device) -> str:
    """``auto`` is bf16 where the hardware computes in it; otherwise fp16 on a GPU and fp32 on a CPU."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() else "fp32"
