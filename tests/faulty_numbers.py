"""Numbers gone bad, for faulty.py.

``bad:where=W,step=S``: in step S (with ``until=U`` in the steps S to U - 1) a number W becomes ``value`` (nan, inf,
...; default nan) on rank ``rank`` (default: all). W: ``loss``; ``features`` or ``ema``, one element of the online or
the momentum features; ``row``, a whole row of online features; ``image``, one value of a crop; ``grad``, one element of
one parameter's gradient before the ranks' average (``name=`` of the parameter, default: the first); ``grads``, one of
every parameter's; ``statistics``, a running variance after the step, which no loss sees. With ``calls=N`` only in the
first N of a step's calls, those of its first micro-batches.

``joins:folder=F``: each rank writes before its first step how often it has joined rows that are split over ranks.

``watch:folder=F,step=S,until=U``: each rank writes what its state was before and after those steps.

``loaded:folder=F``: each rank writes a hash of its state right after it has taken that of a checkpoint.

``apart:``: every rank normalises with the statistics of its own batch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrex import checkpoint, objectives
from fastrex import step as step_module
from fastrex.data.loader import Batch

Words = dict[str, str]
Now = Callable[[], bool]
RANK = int(os.environ.get("RANK", "0"))


def clock(words: Words) -> Now:
    """Whether the step that runs is one of those that ``words`` name; ``calls``: so many times a step at most."""
    first = int(words["step"])
    last = int(words.get("until", first + 1))
    running, left = [-1], [0.0]
    original = step_module.Trainer.step

    def step(self: Any, number: int, *arguments: Any, **named: Any) -> Any:
        running[0], left[0] = number, float(words.get("calls", "inf"))
        return original(self, number, *arguments, **named)

    def now() -> bool:
        left[0] -= 1
        return first <= running[0] < last and left[0] >= 0

    step_module.Trainer.step = step  # type: ignore[method-assign]
    return now


def spoilt(x: Tensor, value: float) -> Tensor:
    """A copy of ``x`` whose first element is ``value``; gradients pass as if nothing had happened."""
    place = torch.zeros_like(x.detach())
    place[(0,) * x.ndim] = value
    return x + place


def bad(words: Words) -> None:
    now, value = clock(words), float(words.get("value", "nan"))
    PLACES[words["where"]](now, value, words)


def loss(now: Now, value: float, words: Words) -> None:
    original = step_module.Method.forward

    def forward(self: Any, *arguments: Any) -> Any:
        found, *others = original(self, *arguments)
        return (found + value if now() else found), *others

    step_module.Method.forward = forward  # type: ignore[method-assign]


def features(now: Now, value: float, words: Words) -> None:
    for kind in [kind for kind in objectives.OBJECTIVES if "forward" in vars(kind)]:
        original = kind.forward

        def forward(self: Any, x: Tensor, *others: Any, original: Any = original) -> Any:
            if now():
                x = x * torch.arange(len(x))[:, None].gt(0) if words["where"] == "row" else spoilt(x, value)
            return original(self, x, *others)

        kind.forward = forward  # type: ignore[method-assign]


def ema(now: Now, value: float, words: Words) -> None:
    original = step_module.Trainer._momentum_features

    def momentum_features(self: Any, *arguments: Any) -> Tensor:
        found = original(self, *arguments)
        return spoilt(found, value) if now() else found

    step_module.Trainer._momentum_features = momentum_features  # type: ignore[method-assign]


def image(now: Now, value: float, words: Words) -> None:
    original = step_module.Trainer._step

    def step(self: Any, micros: Any) -> Any:
        if now():
            micros = [((spoilt(crops[0], value), *crops[1:]), *others) for crops, *others in micros]
        return original(self, micros)

    step_module.Trainer._step = step  # type: ignore[method-assign]


def grad(now: Now, value: float, words: Words) -> None:
    original = step_module.Trainer.__init__

    def init(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        parameters = dict(self.method.named_parameters())
        names = list(parameters) if words["where"] == "grads" else [words.get("name", next(iter(parameters)))]
        for name in names:
            parameters[name].register_hook(lambda g: spoilt(g, value) if now() else g)

    step_module.Trainer.__init__ = init  # type: ignore[method-assign]


def statistics(now: Now, value: float, words: Words) -> None:
    original = step_module.Trainer.step

    def step(self: Any, *arguments: Any) -> Any:
        found = original(self, *arguments)
        if now():
            self.model.encoder.bn1.running_var[0] = value
        return found

    step_module.Trainer.step = step  # type: ignore[method-assign]


PLACES: dict[str, Callable[[Now, float, Words], None]] = {
    "loss": loss,
    "features": features,
    "row": features,
    "ema": ema,
    "image": image,
    "grad": grad,
    "grads": grad,
    "statistics": statistics,
}


def watch(words: Words) -> None:
    now, original = clock(words), step_module.Trainer.step

    def step(self: Any, number: int, micros: Sequence[Batch], lr: float) -> Any:
        before = state_of(self)
        found = original(self, number, micros, lr)
        if now():
            folder = Path(words["folder"])
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"before": before, "after": state_of(self)})
            (folder / f"{number}-rank{RANK}.json").write_text(text, encoding="utf-8")
        return found

    step_module.Trainer.step = step  # type: ignore[method-assign]


def state_of(trainer: Any) -> dict[str, Any]:
    """Hashes of a rank's state by kind, and the guard's numbers."""
    nets = {"model": trainer.model, **({} if trainer.ema is None else {"ema": trainer.ema})}
    kinds = {
        "weights": dict(trainer.method.named_parameters()),
        "momentum": trainer.optimizer.buffers,
        "ema": {} if trainer.ema is None else dict(trainer.ema.named_parameters()),
        "copies": {**trainer.optimizer.copies, **{f"ema {n}": t for n, t in trainer.optimizer.ema_copies.items()}},
        "bank": dict(trainer.objective.named_buffers()),
        "statistics": {f"{net} {n}": t for net, module in nets.items() for n, t in module.named_buffers()},
    }
    hashes = {kind: hash_of(tensors) for kind, tensors in kinds.items()}
    guard = {name: float(value) for name, value in trainer.guard.state_dict().items()}
    finite = all(bool(t.isfinite().all()) for tensors in kinds.values() for t in tensors.values())
    return {**hashes, "guard": guard, "finite": finite}


def hash_of(tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(
            name.encode() + tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return total.hexdigest()


def loaded(words: Words) -> None:
    original = step_module.Trainer.load

    def load(self: Any, parts: Any) -> None:
        original(self, parts)
        text = checkpoint.state_hash(self.parts())
        (Path(words["folder"]) / f"rank{RANK}.txt").write_text(text, encoding="utf-8")

    step_module.Trainer.load = load  # type: ignore[method-assign]


def joins(words: Words) -> None:
    kind, first, count = objectives.lookup("cosine_softmax"), [True], [0]
    original, original_step = kind.join, step_module.Trainer.step

    def join(self: Any, rows: Tensor) -> Tensor:
        count[0] += 1
        return original(self, rows)

    def step(self: Any, *arguments: Any) -> Any:
        if first[0]:
            (Path(words["folder"]) / f"joins-{RANK}.txt").write_text(str(count[0]), encoding="utf-8")
        first[0] = False
        return original_step(self, *arguments)

    kind.join = join  # type: ignore[method-assign]
    step_module.Trainer.step = step  # type: ignore[method-assign]


def apart(words: Words) -> None:
    step_module.set_process_group = lambda model, group: None  # type: ignore[assignment]


PATCHES: dict[str, Callable[[Words], None]] = {
    "bad": bad,
    "watch": watch,
    "loaded": loaded,
    "joins": joins,
    "apart": apart,
}
