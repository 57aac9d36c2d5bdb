"""Classes split over 2 and 4 gloo ranks: the same losses, gradients and statistics as one process with all of them."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from fastrex_kernels import CosineHead, OnlineClassMeans, _cpp, modules
from fastrex_kernels._sharded import sharded_cosine_cross_entropy

DIM, ROWS = 6, 12
# Name -> (classes, options of the head, dtype, rows of a target). 10 classes are 3, 3, 2, 2 on four ranks.
CASES: dict[str, tuple[int, dict[str, Any], torch.dtype, int]] = {
    "plain": (10, {}, torch.float64, ROWS),
    "one class per rank": (4, {"reduction": "sum"}, torch.float64, ROWS),
    "everything": (
        37,
        {"label_smoothing": 0.1, "learnable_temperature": True, "temperature": 0.3, "ignore_index": 5},
        torch.float64,
        ROWS,
    ),
    "crops share the target": (10, {"learnable_temperature": True}, torch.float64, ROWS // 3),
    "rows": (10, {"reduction": "none"}, torch.float64, ROWS),
    "single precision": (37, {"label_smoothing": 0.1, "learnable_temperature": True}, torch.float32, ROWS),
}
SINGLE = "single precision"
# Triton's interpreter runs its kernels on the CPU.
KERNELS = [*(["cpp"] if _cpp.LOADED else []), *(["triton"] if importlib.util.find_spec("triton") else [])]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
# Scales of the ranks' losses: their gradients must not be mixed up.
UPSTREAM = (1.0, -0.5, 2.0, 0.25)


def batch(name: str, ranks: int) -> tuple[Tensor, Tensor]:
    """Features [ranks, ROWS, DIM] and targets [ranks, given]; some classes occur often, so that some are ignored."""
    classes, _, dtype, given = CASES[name]
    g = torch.Generator().manual_seed(len(name))
    x = torch.randn(ranks, ROWS, DIM, generator=g, dtype=dtype)
    x[0, 0] = 0
    target = torch.randint(min(classes, 8), (ranks, given), generator=g)
    target[-1, -1] = classes - 1
    return x, target


def head(name: str, group: Any = None) -> CosineHead:
    classes, options, dtype, _ = CASES[name]
    torch.manual_seed(3)
    made = CosineHead(DIM, classes, process_group=group, dtype=dtype, **options)
    with torch.no_grad():
        if made.first_class == 0:
            made.weight[0] = 0  # an empty class
    return made


def run_rank(name: str, rank: int, ranks: int, group: Any) -> dict[str, Tensor]:
    features, targets = batch(name, ranks)
    x, made = features[rank].clone().requires_grad_(), head(name, group)
    loss, stats = made(x, targets[rank], return_stats=True)
    (loss.sum() * UPSTREAM[rank]).backward()
    found = {"loss": loss, "lse": stats.lse, "rank": stats.rank, "dx": x.grad, "dw": made.weight.grad}
    found |= {"logits": made.logits(features[rank]), "weight": made.weight}
    if made.log_temperature is not None:
        found["dt"] = made.log_temperature.grad
    return {key: value.detach() for key, value in found.items() if value is not None}


def run_kernels(impl: str, rank: int, ranks: int, group: Any) -> dict[str, Tensor]:
    """The case in single precision by an implementation that is asked for by name."""
    features, targets = batch(SINGLE, ranks)
    x, made = features[rank].clone().requires_grad_(), head(SINGLE, group)
    loss, lse, hits = sharded_cosine_cross_entropy(
        x, made.weight, targets[rank], made._block(), temperature=made.temperature, ignore_index=made.ignore_index,
        label_smoothing=made.label_smoothing, reduction=made.reduction, return_stats=True, impl=impl,
    )  # fmt: skip
    (loss * UPSTREAM[rank]).backward()
    assert made.log_temperature is not None
    found = {"loss": loss, "lse": lse, "rank": hits, "dx": x.grad, "dw": made.weight.grad}
    found["dt"] = made.log_temperature.grad
    return {key: value.detach() for key, value in found.items() if value is not None}


def run_one(name: str, ranks: int) -> tuple[list[dict[str, Tensor]], CosineHead]:
    """The same in one process: the mean of the ranks' scaled losses is differentiated."""
    features, targets = batch(name, ranks)
    made, found = head(name), []
    for rank in range(ranks):
        x = features[rank].clone().requires_grad_()
        loss, stats = made(x, targets[rank], return_stats=True)
        (loss.sum() * UPSTREAM[rank] / ranks).backward()
        assert x.grad is not None
        values = {"loss": loss, "lse": stats.lse, "rank": stats.rank, "dx": x.grad * ranks}
        found.append({key: value.detach() for key, value in {**values, "logits": made.logits(x)}.items()})
    return found, made


class Encoder(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, DIM))


def train(ranks: int, own: slice, group: Any, wrap: Callable[[nn.Module], nn.Module]) -> tuple[Encoder, CosineHead]:
    """Five steps of anybody's loop; the batch is that of all ranks, of which this process takes ``own``."""
    encoder = Encoder().double()
    torch.manual_seed(1)
    made = CosineHead(DIM, 10, learnable_temperature=True, process_group=group, dtype=torch.float64)
    optimizer = torch.optim.SGD([*encoder.parameters(), *made.parameters()], lr=0.1, momentum=0.9)
    model = wrap(encoder)
    g = torch.Generator().manual_seed(2)
    for _ in range(5):
        x = torch.randn(ranks * ROWS, 5, generator=g, dtype=torch.float64)[own]
        target = torch.randint(10, (ranks * ROWS,), generator=g)[own]
        optimizer.zero_grad()
        made(model(x), target).backward()
        optimizer.step()
    return encoder, made


def message(call: Callable[[], Any]) -> str:
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    return str(caught.value)


def state_of(prefix: str, *modules: nn.Module) -> dict[str, Tensor]:
    return {
        f"{prefix}/{number}/{key}": value
        for number, part in enumerate(modules)
        for key, value in part.state_dict().items()
    }


def rank_main(rank: int, folder: Path, ranks: int) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    group: Any = dist.group.WORLD
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {"again": []}
    for name in CASES:
        found = run_rank(name, rank, ranks, group)
        again = run_rank(name, rank, ranks, group)
        facts["again"].append(all(torch.equal(found[key], again[key]) for key in found))
        tensors |= {f"{name}/{key}": value for key, value in found.items()}

    for impl in KERNELS:
        tensors |= {f"{impl}/{key}": value for key, value in run_kernels(impl, rank, ranks, group).items()}

    made = head("plain", group)
    full = made.full_weight()
    copied = copy.deepcopy(made)
    copied.load_full_weight(full + 1)
    tensors |= {"full": full, "moved": copied.full_weight(), "own": made.state_dict()["weight"]}
    classify = made.classifier()
    if rank == 0:  # by itself: the others would be waited for
        x = batch("plain", ranks)[0][0]
        facts["classifier"] = torch.equal(classify(x), head("plain").logits(x))
    tensors |= state_of("sharded", *train(ranks, own, group, DistributedDataParallel))
    # A head that is not split is part of the model like any other layer.
    tensors |= state_of("ddp", *train_replicated(ranks, own))

    # Frozen weights get no gradient, and features that need none get none, on every rank alike.
    features, targets = batch("plain", ranks)
    made.weight.requires_grad_(False)
    x = features[rank].clone().requires_grad_()
    made(x, targets[rank]).backward()
    facts["frozen"] = [made.weight.grad is None, x.grad is not None]
    made.weight.requires_grad_(True)
    made(features[rank], targets[rank]).backward()
    tensors["features without gradient"] = made.weight.grad  # type: ignore[assignment]
    probe = head(SINGLE, group)
    features, targets = batch(SINGLE, ranks)
    probe(features[rank], targets[rank]).backward()
    tensors["temperature without features"] = probe.log_temperature.grad  # type: ignore[assignment,union-attr]
    features, targets = batch("plain", ranks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        single = head(SINGLE, group)
        loss = single(features[rank].float(), targets[rank])
    loss.backward()
    facts["autocast"] = [str(t.dtype) for t in (loss, single.weight, single.weight.grad)]
    tensors["autocast loss"] = loss.detach()

    tensors["opposite parts"] = opposite_parts(ranks, group, torch.float16)
    means = OnlineClassMeans(DIM, 10, bank_size=40, process_group=group)
    g = torch.Generator().manual_seed(4)
    for _ in range(3):
        z, labels = torch.randn(ranks, 4, DIM, generator=g), torch.randint(10, (ranks, 4), generator=g)
        means.update_(z[rank], labels[rank])
    tensors |= state_of("means", means)
    facts["errors"] = [
        message(lambda: made(features[rank, : ROWS - rank], targets[rank, : ROWS - rank])),
        message(lambda: means.update_(torch.zeros(1 + rank, DIM), torch.zeros(1 + rank, dtype=torch.int64))),
        message(lambda: made(features[rank], torch.zeros(ROWS, 10))),
        message(lambda: made(features[rank], targets[rank] + 10)),
        message(lambda: made(features[rank], targets[rank][:5])),
        message(lambda: made(features[rank, :, :3], targets[rank])),
        message(lambda: made.load_full_weight(full[1:])),
        message(lambda: CosineHead(DIM, ranks - 1, process_group=group)),
        message(lambda: made.join(full)),
        message(lambda: made.join(torch.zeros(()))),
        message(lambda: made.own(full[1:])),
        message(lambda: made.own(torch.zeros(()))),
    ]
    facts["repr"] = repr(made)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(facts))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # see fastrex.cli._leave


def opposite_parts(ranks: int, group: Any, dtype: torch.dtype) -> Tensor:
    """dx where that of every class is beyond fp16, and of all together is not: they all but cancel out."""
    made = CosineHead(DIM, ranks, process_group=group, reduction="sum")
    with torch.no_grad():
        full = torch.zeros(ranks, DIM)
        full[:, 0] = 1
        full[range(ranks), [2 + c for c in range(ranks)]] = 0.01
        made.load_full_weight(full)
    x = torch.zeros(2, DIM, dtype=dtype)
    x[:, 1] = 2**-7
    x.requires_grad_()
    (made(x, torch.zeros(2, dtype=torch.int64)) * 1000).backward()
    assert x.grad is not None
    return x.grad


def train_replicated(ranks: int, own: slice) -> tuple[nn.Module]:
    torch.manual_seed(1)
    model = Classifier()
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    g = torch.Generator().manual_seed(2)
    for _ in range(3):
        x = torch.randn(ranks * ROWS, 5, generator=g, dtype=torch.float64)[own]
        target = torch.randint(10, (ranks * ROWS,), generator=g)[own]
        optimizer.zero_grad()
        parallel(x, target).backward()
        optimizer.step()
    return (model,)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder().double()
        self.head = CosineHead(DIM, 10, learnable_temperature=True, dtype=torch.float64)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = self.head(self.encoder(x), target)
        return loss


Ranks = list[tuple[dict[str, Tensor], dict[str, Any]]]


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What the gloo ranks found: tensors and facts, by rank."""
    folder, size = tmp_path_factory.mktemp("gloo"), request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        context: Any = start_processes(rank_main, (folder, size), size, join=False)  # type: ignore[no-untyped-call]
    deadline = time.monotonic() + 180
    # Raises with the traceback of a rank that failed.
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the ranks did not finish within 180 s")
    return [
        (load_file(folder / f"{rank}.safetensors"), json.loads((folder / f"{rank}.json").read_text()))
        for rank in range(size)
    ]


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    """By the largest value: small gradients among large ones carry the rounding of the large ones."""
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    scale = max(b.abs().max().item(), 1e-30)
    torch.testing.assert_close(a / scale, b / scale, rtol=0, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("name", CASES)
def test_split_classes_equal_one_process(ranks: Ranks, name: str) -> None:
    wanted, one = run_one(name, len(ranks))
    tolerance = TOLERANCE[CASES[name][2]]
    parts = [{key: tensors[f"{name}/{key}"] for key in ("loss", "lse", "rank", "dx", "logits")} for tensors, _ in ranks]
    for part, joined in zip(parts, wanted, strict=True):
        assert torch.equal(part["rank"], joined["rank"])
        for key in ("loss", "lse", "dx", "logits"):
            close(part[key], joined[key], tolerance)
    blocks = [tensors[f"{name}/weight"] for tensors, _ in ranks]
    # The same seed draws the same classes, whatever the number of ranks.
    assert torch.equal(torch.cat(blocks), one.weight)
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1
    assert one.weight.grad is not None
    close(torch.cat([tensors[f"{name}/dw"] for tensors, _ in ranks]), one.weight.grad, tolerance)
    if one.log_temperature is not None:
        assert one.log_temperature.grad is not None
        for tensors, _ in ranks:
            close(tensors[f"{name}/dt"], one.log_temperature.grad, tolerance)
            assert torch.equal(tensors[f"{name}/dt"], ranks[0][0][f"{name}/dt"])


@pytest.mark.parametrize("impl", ["cpp", "triton"])
def test_kernels_equal_one_process(ranks: Ranks, impl: str) -> None:
    if impl not in KERNELS:
        pytest.skip("Triton is not installed" if impl == "triton" else _cpp.REASON)
    wanted, one = run_one(SINGLE, len(ranks))
    for (tensors, _), joined in zip(ranks, wanted, strict=True):
        assert torch.equal(tensors[f"{impl}/rank"], joined["rank"])
        for key in ("loss", "lse", "dx"):
            close(tensors[f"{impl}/{key}"], joined[key], 1e-5)
        close(tensors[f"{impl}/dt"], one.log_temperature.grad, 1e-5)  # type: ignore[union-attr, arg-type]
    close(torch.cat([tensors[f"{impl}/dw"] for tensors, _ in ranks]), one.weight.grad, 1e-5)  # type: ignore[arg-type]


def test_same_bits_again(ranks: Ranks) -> None:
    assert all(all(facts["again"]) for _, facts in ranks)


def test_full_weights_go_between_numbers_of_ranks(ranks: Ranks) -> None:
    whole = head("plain").weight.detach()
    for tensors, _ in ranks:
        assert torch.equal(tensors["full"], whole)
        assert torch.equal(tensors["moved"], whole + 1)
    assert torch.equal(torch.cat([tensors["own"] for tensors, _ in ranks]), whole)


def test_one_rank_classifies_by_itself(ranks: Ranks) -> None:
    assert ranks[0][1]["classifier"]


def test_the_place_that_the_bank_once_had_still_has_it() -> None:
    assert modules.OnlineClassMeans is OnlineClassMeans


def test_training_equals_one_process_with_the_joined_batch(ranks: Ranks) -> None:
    encoder, made = train(len(ranks), slice(None), None, lambda module: module)
    for tensors, _ in ranks:
        for key, value in encoder.state_dict().items():
            close(tensors[f"sharded/0/{key}"], value, 1e-10)
        close(tensors["sharded/1/log_temperature"], made.log_temperature.detach(), 1e-10)  # type: ignore[union-attr]
    close(torch.cat([tensors["sharded/1/weight"] for tensors, _ in ranks]), made.weight.detach(), 1e-10)


def test_a_whole_head_under_ddp_equals_one_process(ranks: Ranks) -> None:
    # Without DDP, the batch of all ranks in one process.
    torch.manual_seed(1)
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    g = torch.Generator().manual_seed(2)
    for _ in range(3):
        x = torch.randn(len(ranks) * ROWS, 5, generator=g, dtype=torch.float64)
        target = torch.randint(10, (len(ranks) * ROWS,), generator=g)
        optimizer.zero_grad()
        model(x, target).backward()
        optimizer.step()
    for tensors, _ in ranks:
        for key, value in model.state_dict().items():
            close(tensors[f"ddp/0/{key}"], value, 1e-10)


def test_only_what_needs_a_gradient_gets_one(ranks: Ranks) -> None:
    assert all(facts["frozen"] == [True, True] for _, facts in ranks)
    features, targets = batch("plain", len(ranks))
    one = head("plain")
    one(features.flatten(0, 1), targets.flatten()).backward()
    assert one.weight.grad is not None
    close(torch.cat([tensors["features without gradient"] for tensors, _ in ranks]), one.weight.grad, 1e-10)
    features, targets = batch(SINGLE, len(ranks))
    one = head(SINGLE)
    one(features.flatten(0, 1), targets.flatten()).backward()
    assert one.log_temperature is not None
    assert one.log_temperature.grad is not None
    for tensors, _ in ranks:
        close(tensors["temperature without features"], one.log_temperature.grad, 1e-5)


def test_parts_of_a_gradient_are_summed_before_they_are_rounded(ranks: Ranks) -> None:
    wanted = opposite_parts(len(ranks), None, torch.float32)
    assert wanted.abs().max() > 1000
    for tensors, _ in ranks:
        assert tensors["opposite parts"].dtype == torch.float16
        close(tensors["opposite parts"].float(), wanted, 2e-3)


def test_autocast_leaves_the_parameters_alone(ranks: Ranks) -> None:
    features, targets = batch("plain", len(ranks))
    one = head(SINGLE)
    for rank, (tensors, facts) in enumerate(ranks):
        assert facts["autocast"] == ["torch.float32"] * 3
        # bfloat16 products of unit rows at temperature 0.1.
        close(tensors["autocast loss"], one(features[rank].float(), targets[rank]).detach(), 2**-6)


def test_the_bank_is_that_of_the_joined_batch(ranks: Ranks) -> None:
    means = OnlineClassMeans(DIM, 10, bank_size=40)
    g = torch.Generator().manual_seed(4)
    for _ in range(3):
        z, labels = torch.randn(len(ranks), 4, DIM, generator=g), torch.randint(10, (len(ranks), 4), generator=g)
        means.update_(z.flatten(0, 1), labels.flatten())
    for tensors, _ in ranks:
        assert all(torch.equal(tensors[f"means/0/{key}"], value) for key, value in means.state_dict().items())


def test_errors_name_the_fact_on_every_rank(ranks: Ranks) -> None:
    size = len(ranks)
    counts = [ROWS - rank for rank in range(size)]
    for tensors, facts in ranks:
        own = len(tensors["own"])
        expected = [
            f"CosineHead: input must have equally many rows on every rank of process_group, got {counts}",
            "OnlineClassMeans.update_: input must have equally many rows on every rank of process_group, got [1, 2",
            "CosineHead: target must be int64 class ids [N] with a process_group, got torch.float32 [12, 10]",
            "CosineHead: target must be in [0, 10) or -100, got 1",
            "CosineHead: target must have 12 rows or a divisor of that, got 5",
            "CosineHead: input must be [N, 6], got [12, 3]",
            "CosineHead.load_full_weight: weight must be [10, 6], got [9, 6]",
            f"CosineHead: num_classes must be at least the {size} ranks of process_group, got {size - 1}",
            f"CosineHead.join: rows must be [{own}, ...], got [10, 6]",
            f"CosineHead.join: rows must be [{own}, ...], got []",
            "CosineHead.own: full must be [10, ...], got [9, 6]",
            "CosineHead.own: full must be [10, ...], got []",
        ]
        for found, start in zip(facts["errors"], expected, strict=True):
            assert found.startswith(start)
    assert "classes 0 to " in ranks[0][1]["repr"]
    assert "to 9 here" in ranks[-1][1]["repr"]
