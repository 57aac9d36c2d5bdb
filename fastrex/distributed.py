"""Ranks: start-up from torchrun's environment, and the few collectives that the loop needs. A single process needs
none."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import FastrexError

TIMEOUT = datetime.timedelta(minutes=10)
PATIENCE = datetime.timedelta(hours=12)


# torch 2.13 renamed this collective; 2.11 and 2.12 know the old name only.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def quick_agreement(self) -> bool:
        """Whether asking all ranks for a Python value costs no device sync: one process, or gloo."""
        return self.size == 1 or self.device.type == "cpu"

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group for SyncBN and gathers, or None for a single process."""
        return dist.group.WORLD if self.size > 1 else None

    @property
    def threads(self) -> int:
        """This rank's share of the cores."""
        return own_cores(self.local_size)


def own_cores(local_size: int | None = None) -> int:
    """The cores of this process, shared with the other ranks that torchrun started on this machine."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if local_size is None else local_size
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """``auto`` takes CUDA where it is there; asking for ``cuda`` without it is an error."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise FastrexError(
            "train: --device cuda needs a CUDA build of torch and a GPU that it can see; use --device cpu"
        )
    if local_rank >= torch.cuda.device_count():
        raise FastrexError(
            f"train: --nproc-per-node must be at most the number of visible GPUs, {torch.cuda.device_count()}, "
            f"got local rank {local_rank}"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def world(device: str = "auto") -> Iterator[World]:
    """Join the group that torchrun describes in the environment; leave it on success only, so that a failing rank ends
    the job instead of waiting for its peers."""
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    chosen = pick_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        # Crops keep their sizes, so the search for the fastest convolutions pays; TF32 as in the method's recipe.
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    if size > 1:
        if chosen.type == "cuda":
            dist.init_process_group("nccl", timeout=TIMEOUT, device_id=chosen)
        else:
            dist.init_process_group("gloo", timeout=TIMEOUT)
            # torchrun asks for one thread where nobody says otherwise; on a CPU the cores are the accelerator.
            torch.set_num_threads(max(1, own_cores(local_size)))
    yield World(rank, size, local_rank, local_size, chosen)
    if size > 1:
        dist.destroy_process_group()


def gather_rows(x: Tensor, world: World) -> Tensor:
    """Rows of all ranks, concatenated in rank order; every rank must bring equally many."""
    if world.size == 1:
        return x
    out = x.new_empty((world.size * x.shape[0], *x.shape[1:]))
    _all_gather(out, x.contiguous())
    return out


def gather_ragged(x: Tensor, world: World) -> Tensor:
    """Rows of all ranks, concatenated in rank order; ranks may bring different numbers of rows."""
    if world.size == 1:
        return x
    counts = torch.zeros(world.size, dtype=torch.int64, device=x.device)
    counts[world.rank] = x.shape[0]
    dist.all_reduce(counts)
    sizes = [int(n) for n in counts.tolist()]
    padded = x.new_zeros((max(sizes), *x.shape[1:]))
    padded[: x.shape[0]] = x
    every = gather_rows(padded, world)
    return torch.cat([every[r * max(sizes) : r * max(sizes) + n] for r, n in enumerate(sizes)])


def sum_(x: Tensor, world: World) -> Tensor:
    """Sum over ranks, in place."""
    if world.size > 1:
        dist.all_reduce(x)
    return x


def all_true(flag: Tensor, world: World) -> Tensor:
    """Whether a 0-d bool tensor is True on every rank; stays on the device."""
    if world.size == 1:
        return flag
    count = flag.to(torch.int32)
    dist.all_reduce(count, op=dist.ReduceOp.MIN)
    return count.bool()


def any_true(flag: bool, world: World) -> bool:
    """Whether a Python bool is True on any rank; a host sync."""
    if world.size == 1:
        return flag
    count = torch.tensor(int(flag), device=world.device)
    dist.all_reduce(count, op=dist.ReduceOp.MAX)
    return bool(count)


def from_main(value: int, world: World) -> int:
    """Rank 0's integer on every rank; a host sync."""
    if world.size == 1:
        return value
    box = torch.tensor(value, device=world.device)
    dist.broadcast(box, src=0)
    return int(box)


@torch.no_grad()
def broadcast_(tensors: Iterable[Tensor], world: World) -> None:
    """Give every rank the values of rank 0, in place: one collective per dtype."""
    if world.size == 1:
        return
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.dtype, []).append(tensor)
    for same in kinds.values():
        packed = torch.cat([tensor.reshape(-1) for tensor in same])
        dist.broadcast(packed, src=0)
        for tensor, values in zip(same, torch.split(packed, [t.numel() for t in same]), strict=True):
            tensor.copy_(values.view(tensor.shape))


def average_in_bf16(group: dist.ProcessGroup | None, bucket: Any) -> torch.futures.Future[Tensor]:
    """Communication hook of DistributedDataParallel: half the bytes, gradients rounded and summed in bf16.

    torch's own hook of this kind refuses gloo.
    """
    buffer = bucket.buffer()
    packed = (buffer / dist.get_world_size(group)).to(torch.bfloat16)
    work = dist.all_reduce(packed, group=group, async_op=True)
    averaged: torch.futures.Future[Tensor] = work.get_future().then(lambda done: buffer.copy_(done.value()[0]))
    return averaged


def barrier(world: World) -> None:
    """Wait for all ranks."""
    if world.size > 1:
        dist.barrier()


@contextmanager
def main_first(world: World) -> Iterator[None]:
    """Let rank 0 run the block before the others do. They wait for hours if need be: it may be indexing millions of
    files."""
    if world.size == 1:
        yield
        return
    # A group of its own, because the patience of a collective is its group's.
    patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    if not world.main:
        dist.barrier(patient)
    yield
    if world.main:
        dist.barrier(patient)
    dist.destroy_process_group(patient)
