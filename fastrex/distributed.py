"""Ranks: start-up from torchrun's environment, and the few collectives that the loop needs. A single process needs
none.

The order of things: the ranks meet at the store that the launcher names, the watch connects them (from then on nobody
waits for one that is gone), then the process group is made.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from .errors import FastrexError
from .stall import FIRST_STEPS_CUDA
from .watch import Watch

# Ranks may start minutes after one another: hosts boot, images are pulled.
MEETING_S = float(os.environ.get("FASTREX_MEETING_S", "600"))
# Of collectives. Long: the watch ends a job that hangs, after run.stall_s, which may be hours.
TIMEOUT = datetime.timedelta(days=2)


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
    watch: Watch = field(default_factory=Watch, compare=False, repr=False)

    @property
    def main(self) -> bool:
        return self.rank == 0

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
    ranks = _count("LOCAL_WORLD_SIZE", 1) if local_size is None else local_size
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def _count(name: str, least: int, below: int | None = None) -> int:
    """A number of the environment that launchers set; ``least`` where there is none."""
    text = os.environ.get(name, str(least))
    number = int(text) if text.isascii() and text.isdigit() else -1
    if number < least or (below is not None and number >= below):
        bound = f"at least {least}" if below is None else f"from {least} to {below - 1}"
        raise FastrexError(
            f"train: {name} in the environment must be a whole number, {bound}, got {text!r}; start the ranks with "
            "torchrun, or unset it"
        )
    return number


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
    the job instead of waiting for its peers.

    Raises:
        FastrexError: the ranks do not find one another.
        RankLost: another rank was the end of the job; whatever this one has met is an echo of that.
    """
    size, local_size = _count("WORLD_SIZE", 1), _count("LOCAL_WORLD_SIZE", 1)
    rank, local_rank = _count("RANK", 0, size), _count("LOCAL_RANK", 0)
    chosen = pick_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        # Crops keep their sizes, so the search for the fastest convolutions pays; TF32 as in the method's recipe.
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    watch = Watch(rank, size)
    if chosen.type == "cuda":
        watch.clock.first_steps = FIRST_STEPS_CUDA
    joined = World(rank, size, local_rank, local_size, chosen, watch)
    if size == 1:
        yield joined
        return
    try:
        with watch.explaining():
            _join(joined)
            yield joined
            watch.collectives = lambda: -1
            dist.destroy_process_group()
        watch.bye()
    finally:
        watch.close()


def _join(world: World) -> None:
    """Meet the other ranks, start the watch, make the process group."""
    master, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    where = f"{master}:{port}"
    try:
        store, _, _ = next(rendezvous("env://", timeout=datetime.timedelta(seconds=MEETING_S)))
        store.set_timeout(datetime.timedelta(seconds=MEETING_S))
        world.watch.start(store, master, world.local_size < world.size, MEETING_S)
        # Nothing of an earlier start of the same job is found in it: torchrun keeps the store over a restart.
        store = PrefixStore(world.watch.job, store)
        # Hosts that let the watch through but not gloo or NCCL would wait for the collectives' own timeout.
        world.watch.mark(0, "connecting")
        world.watch.guard(MEETING_S)
        options: dict[str, Any] = {"store": store, "rank": world.rank, "world_size": world.size, "timeout": TIMEOUT}
        if world.device.type == "cuda":
            dist.init_process_group("nccl", device_id=world.device, **options)
        else:
            dist.init_process_group("gloo", **options)
            # torchrun asks for one thread where nobody says otherwise; on a CPU the cores are the accelerator.
            torch.set_num_threads(max(1, own_cores(world.local_size)))
        world.watch.guard(0)
    except ValueError as error:
        raise FastrexError(
            "train: several ranks need RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment "
            f"({error}); start them with torchrun"
        ) from None
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        world.watch.check()
        fact = (str(error).strip().splitlines() or ["no message"])[0]
        if "EADDRINUSE" in fact:
            raise FastrexError(
                f"train: rank {world.rank} must be able to listen at {where}, but that port is in use, perhaps by "
                "another job; choose another --master-port, or --standalone for the ranks of one host"
            ) from None
        raise FastrexError(
            f"train: rank {world.rank} must meet the {world.size - 1} other ranks at {where} (MASTER_ADDR:MASTER_PORT) "
            f"within {MEETING_S:.0f} s, got: {fact}; check that address, the firewall and that all ranks were started"
        ) from None
    group = dist.group.WORLD
    assert group is not None
    # torch's own name for it, though not in its type hints: no public one exists.
    world.watch.collectives = group._get_sequence_number_for_group  # type: ignore[attr-defined]


def gather_rows(x: Tensor, world: World) -> Tensor:
    """Rows of all ranks, concatenated in rank order; every rank must bring equally many."""
    return x if world.group is None else gather_group(x, world.group)


def gather_group(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """:func:`gather_rows` over the ranks of ``group``; no gradient flows."""
    out = x.new_empty((dist.get_world_size(group) * x.shape[0], *x.shape[1:]))
    _all_gather(out, x.detach().contiguous(), group=group)
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


def text_from_main(text: str, world: World) -> str:
    """Rank 0's text on every rank; a host sync."""
    if world.size == 1:
        return text
    sent = list(text.encode())
    box = torch.zeros(from_main(len(sent), world), dtype=torch.uint8, device=world.device)
    if world.main:
        box.copy_(torch.tensor(sent, dtype=torch.uint8))
    if box.numel():
        dist.broadcast(box, src=0)
    return bytes(box.tolist()).decode()


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
    """Let rank 0 run the block first, then one rank of every other host, then the rest; leave it together. All wait for
    hours if need be: it may be indexing millions of files, and hosts need not share what rank 0 has written."""
    if world.size == 1:
        yield
        return
    # A group of its own: ranks that wait for hours keep no GPU busy.
    patient = dist.new_group(backend="gloo", timeout=TIMEOUT)
    turn = 0 if world.main else 1 if world.local_rank == 0 else 2
    for _ in range(turn):
        dist.barrier(patient)
    yield
    for _ in range(turn, 3):
        dist.barrier(patient)
    dist.destroy_process_group(patient)
