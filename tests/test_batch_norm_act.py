"""``batch_norm_act``: against torch's own layers, by finite differences, and two ranks against the joined batch."""

from __future__ import annotations

import itertools
import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

from fastrex_kernels.batch_norm_act import batch_norm_act

# 4-d with odd sizes, one image (all statistics from its pixels), 1x1 pixels, and rows of features.
SHAPES = [(4, 3, 5, 7), (1, 2, 3, 3), (6, 5, 1, 1), (9, 4)]


def parameters(channels: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """weight, bias (both with gradient), running_mean, running_var, none of them at its default."""
    generator = torch.Generator().manual_seed(seed)
    weight, bias, mean, var = (torch.rand(channels, generator=generator, dtype=dtype) + 0.5 for _ in range(4))
    return [weight.requires_grad_(), bias.sub(1).requires_grad_(), mean, var]


def torch_layer(shape: tuple[int, ...], values: list[Tensor], momentum: float, eps: float) -> nn.Module:
    kind = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    layer = kind(shape[1], momentum=momentum, eps=eps).to(values[0].dtype)
    names = ("weight", "bias", "running_mean", "running_var")
    layer.load_state_dict(dict(zip(names, values, strict=True)), strict=False)
    return layer


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_values_gradients_and_buffers_equal_torch(
    shape: tuple[int, ...], relu: bool, with_residual: bool, training: bool
) -> None:
    torch.manual_seed(1)
    values = parameters(shape[1])
    layer = torch_layer(shape, values, momentum=0.3, eps=1e-3).train(training)
    x, skip = torch.randn(2, *shape, dtype=torch.float64) + 3.0
    upstream = torch.randn(shape, dtype=torch.float64)
    ours, theirs = ([t.clone().requires_grad_() for t in (x, skip)] for _ in range(2))

    wanted = layer(theirs[0]) + (theirs[1] if with_residual else 0.0)
    wanted = wanted.relu() if relu else wanted
    torch.autograd.backward(wanted, upstream)
    got = batch_norm_act(
        ours[0], *values, residual=ours[1] if with_residual else None, relu=relu, training=training,
        momentum=0.3, eps=1e-3,
    )  # fmt: skip
    torch.autograd.backward(got, upstream)

    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(ours[0].grad, theirs[0].grad)
    torch.testing.assert_close(values[0].grad, layer.weight.grad)
    torch.testing.assert_close(values[1].grad, layer.bias.grad)
    torch.testing.assert_close(values[2], layer.running_mean)
    torch.testing.assert_close(values[3], layer.running_var)
    if with_residual:
        torch.testing.assert_close(ours[1].grad, theirs[1].grad)


# Finite differences cost two evaluations per number: small shapes.
@pytest.mark.parametrize("shape", [(2, 2, 3, 2), (5, 3)], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_gradcheck(shape: tuple[int, ...], training: bool) -> None:
    torch.manual_seed(2)
    weight, bias, mean, var = parameters(shape[1])
    x, skip = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def op(x: Tensor, weight: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
        return batch_norm_act(x, weight, bias, mean.clone(), var.clone(), residual=skip, training=training)

    assert torch.autograd.gradcheck(op, (x, weight, bias, skip))


def test_input_and_residual_are_left_alone() -> None:
    x, skip = torch.randn(2, 4, 3, 2, 2)
    before = x.clone(), skip.clone()
    with torch.no_grad():
        batch_norm_act(x, *parameters(3, torch.float32), residual=skip)
    assert torch.equal(x, before[0])
    assert torch.equal(skip, before[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_input_with_fp32_parameters(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    values = parameters(4, torch.float32)
    reference = [value.detach().clone() for value in values]
    x = (torch.randn(16, 4, 6, 6) + 2.0).to(dtype).requires_grad_()
    wanted = batch_norm_act(x.detach().float(), *reference)
    got = batch_norm_act(x, *values)
    torch.autograd.backward(got.sum())
    assert got.dtype == dtype
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert values[0].grad is not None
    assert values[0].grad.dtype == torch.float32
    # Half a unit in the last place of the largest value; the statistics themselves are fp32 and must not lose bits.
    torch.testing.assert_close(got.float(), wanted, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    torch.testing.assert_close(values[2], reference[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values[3], reference[3], rtol=1e-5, atol=1e-5)


def test_channels_last_is_kept_forward_and_backward() -> None:
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = batch_norm_act(x, *parameters(8, torch.float32), residual=x)
    torch.autograd.backward(y, torch.ones_like(y))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad is not None
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_training_without_running_statistics() -> None:
    weight, bias, mean, var = parameters(3)
    x = torch.randn(5, 3, dtype=torch.float64)
    wanted = batch_norm_act(x, weight, bias, mean, var)
    assert torch.equal(batch_norm_act(x, weight, bias, None, None), wanted)


def call(**changes: Any) -> Tensor:
    weight, bias, mean, var = parameters(3, torch.float32)
    arguments = {"input": torch.randn(4, 3), "weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
    return batch_norm_act(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (
            {"input": torch.randn(4, 3, 2)},
            ValueError,
            r"input must be \[N, C\] or \[N, C, H, W\], got shape \[4, 3, 2\]",
        ),
        ({"input": torch.ones(4, 3, dtype=torch.int64)}, TypeError, "input must be floating point, got torch.int64"),
        (
            {"input": torch.randn(4, 3).double()},
            TypeError,
            "weight must be torch.float64 for an input of torch.float64",
        ),
        ({"weight": torch.ones(2)}, ValueError, r"weight must be \[C\] = \[3\], got \[2\]"),
        ({"bias": torch.ones(3).double()}, TypeError, "bias must have weight's dtype torch.float32, got torch.float64"),
        ({"running_var": torch.ones(3, device="meta")}, ValueError, "running_var must be on cpu like input, got meta"),
        ({"running_var": None}, ValueError, "running_mean and running_var must be given together"),
        ({"running_mean": None, "training": False}, ValueError, "running_mean must be a tensor when training=False"),
        ({"residual": torch.randn(1, 3)}, ValueError, r"residual must have input's shape \[4, 3\], got \[1, 3\]"),
        ({"residual": torch.randn(4, 3).half()}, TypeError, "residual must have input's dtype torch.float32"),
        ({"momentum": 1.5}, ValueError, r"momentum must be in \[0, 1\], got 1.5"),
        ({"eps": -1e-5}, ValueError, "eps must not be negative, got -1e-05"),
        ({"impl": "fast"}, ValueError, "impl must be one of auto, reference, cpp, triton, got 'fast'"),
        ({"input": torch.randn(1, 3)}, ValueError, "at least 2 values per channel .* got 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^batch_norm_act: .*{message}"):
        call(**changes)


def test_one_value_per_channel_is_fine_in_eval_mode() -> None:
    assert call(input=torch.randn(1, 3), training=False).shape == (1, 3)


# Rows per rank: unequal; one rank alone below the two rows that a batch needs; one rank with nothing at all.
SPLITS = [(5, 3), (1, 4), (0, 4)]
JOINED_SHAPES = [(3, 4, 5), (3,)]
DTYPES = [torch.float64, torch.bfloat16]


def joined_batch(rows: int, rest: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """input (its mean is 1000 times its deviation: sums of squares would lose six digits), residual, upstream."""
    generator = torch.Generator().manual_seed(rows)
    x, skip, upstream = torch.randn(3, rows, *rest, generator=generator, dtype=torch.float64)
    return [t.to(dtype) for t in (x + 1e3 if dtype == torch.float64 else x, skip, upstream)]


def run_one(batch: list[Tensor], group: Any) -> dict[str, Tensor]:
    x, skip, upstream = batch
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias, mean, var = parameters(x.shape[1], wide)
    x, skip = x.clone().requires_grad_(), skip.clone().requires_grad_()
    y = batch_norm_act(x, weight, bias, mean, var, residual=skip, momentum=0.3, process_group=group)
    torch.autograd.backward(y, upstream)
    results = {"y": y, "dx": x.grad, "dskip": skip.grad, "dweight": weight.grad, "dbias": bias.grad}
    return {name: t.detach() for name, t in {**results, "mean": mean, "var": var}.items() if t is not None}


Ranks = list[tuple[dict[str, Tensor], dict[str, Any]]]


def rank_main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=40)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timeout)
    group = dist.group.WORLD
    calls = 0
    all_reduce = dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return all_reduce(*args, **kwargs)

    dist.all_reduce = counted
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {"calls": []}
    for split, rest, dtype in itertools.product(SPLITS, JOINED_SHAPES, DTYPES):
        start = sum(split[:rank])
        own = [t[start : start + split[rank]] for t in joined_batch(sum(split), rest, dtype)]
        calls = 0
        part = run_one(own, group)
        facts["calls"].append(calls)
        tensors |= {f"{split} {rest} {dtype} {name}": t.double().contiguous() for name, t in part.items()}
    x = torch.randn(3 + rank, 4, 2, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias, mean, var = parameters(4, torch.float32)
    y = batch_norm_act(x, weight, bias, mean, var, process_group=group)
    torch.autograd.backward(y, torch.ones_like(y))
    facts["channels-last"] = [t.is_contiguous(memory_format=torch.channels_last) for t in (y, x.grad) if t is not None]
    weight, bias, mean, var = parameters(3)
    calls = 0
    batch_norm_act(torch.ones(2, 3).double(), weight, bias, mean, var, training=False, process_group=group)
    facts["eval calls"] = calls
    try:
        # One row in all: rank 0 has it, rank 1 has none; both must say so instead of waiting for each other.
        batch_norm_act(torch.ones(1 - rank, 3).double(), weight, bias, mean, var, process_group=group)
    except ValueError as error:
        facts["one row"] = str(error)
    save_file(tensors, folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(facts))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What two gloo ranks found: tensors and facts, by rank."""
    folder = tmp_path_factory.mktemp("gloo")
    context: Any = start_processes(rank_main, (folder,), 2, join=False)  # type: ignore[no-untyped-call]
    deadline = time.monotonic() + 120
    # Raises with the traceback of a rank that failed.
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the two ranks did not finish within 120 s")
    return [
        (load_file(folder / f"{rank}.safetensors"), json.loads((folder / f"{rank}.json").read_text()))
        for rank in range(2)
    ]


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("rest", JOINED_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_ranks_equal_the_joined_batch(
    ranks: Ranks, split: tuple[int, int], rest: tuple[int, ...], dtype: torch.dtype
) -> None:
    wanted = run_one(joined_batch(sum(split), rest, dtype), None)
    parts = [{name: found[f"{split} {rest} {dtype} {name}"] for name in wanted} for found, _ in ranks]
    # fp64: a mean of 1e3 leaves the inputs 13 digits of their deviation. bf16: outputs are rounded, sums of them too.
    exact = dtype == torch.float64
    tolerance = 1e-11 if exact else 2**-7
    for name in ("y", "dx", "dskip"):
        joined = torch.cat([part[name] for part in parts])
        torch.testing.assert_close(joined, wanted[name].double(), rtol=tolerance, atol=tolerance)
    for name in ("dweight", "dbias"):
        torch.testing.assert_close(
            parts[0][name] + parts[1][name], wanted[name].double(), rtol=tolerance, atol=tolerance
        )
    for name in ("mean", "var"):
        torch.testing.assert_close(parts[0][name], wanted[name].double(), rtol=1e-11 if exact else 1e-5, atol=1e-6)
        assert torch.equal(parts[0][name], parts[1][name])


def test_one_all_reduce_forward_and_one_backward(ranks: Ranks) -> None:
    for _, facts in ranks:
        assert set(facts["calls"]) == {2}
        assert facts["eval calls"] == 0


def test_one_row_over_all_ranks_is_refused_by_every_rank(ranks: Ranks) -> None:
    for _, facts in ranks:
        assert "over all ranks) in training, got 1" in facts["one row"]


def test_channels_last_is_kept_over_ranks(ranks: Ranks) -> None:
    for _, facts in ranks:
        assert facts["channels-last"] == [True, True]
