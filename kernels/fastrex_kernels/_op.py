"""What an operator consists of, how it reaches torch's dispatcher, and which implementation a call gets."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from . import _cpp

IMPLS = ("auto", "reference", "cpp", "triton")
NAMESPACE = "fastrex"
# Looked for, not imported: that would cost every user a second, and only CUDA tensors need it.
_TRITON = importlib.util.find_spec("triton") is not None
# Triton kernels run in Triton's interpreter, on CPU tensors. A constant: Triton reads it when a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Values on a GPU are looked at only on request: it costs a host sync in every call.
CHECK = os.environ.get("FASTREX_CHECK") == "1"
# Keeps the registrations alive; csrc/ adds the CPU implementations to the same operators.
_LIBRARY: Any = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Case:
    """Sizes at which an operator is tested and measured, and the reason why this case exists.

    ``sizes`` are the words that the operator's ``make`` takes. ``bench`` marks the cases of ``fastrex bench kernels``:
    they are too large for the contract test, which runs the others.
    """

    name: str
    why: str
    sizes: Mapping[str, Any]
    bench: bool = False


@dataclass(frozen=True)
class Call:
    """Arguments of one call: ``function(*args, **kwargs)``.

    ``grads`` names those of ``tensors`` whose gradients the operator gives. In-place operators name what they write in
    ``writes``.
    """

    tensors: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    grads: Sequence[str] = ()
    writes: Sequence[str] = ()


@dataclass(frozen=True)
class Cost:
    """The least that any implementation must move and compute: ``bytes`` from and to memory, ``flops``."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Op:
    """One operator: the public function, its definition, its rivals' code, and what to test and measure.

    Attributes:
        name: of the public function.
        function: the public function, with ``impl=``.
        eager: the PyTorch that its users would write, in the tensors' own dtypes; rival and error yardstick.
        make: (sizes, dtype, device, seed) -> Call, by name for both ``function`` and ``eager``.
        cases: tested and measured sizes.
        cost: (sizes, dtype, direction "fwd" | "bwd" | "fwd_bwd") -> Cost.
        dtypes: those that the kernels take.
        deterministic: the same input gives the same bits.
        kernels: the implementations beside the reference that it has, on this CPU.
    """

    name: str
    function: Callable[..., Any]
    eager: Callable[..., Any]
    make: Callable[[Mapping[str, Any], torch.dtype, str, int], Call]
    cases: tuple[Case, ...]
    cost: Callable[[Mapping[str, Any], torch.dtype, str], Cost]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    deterministic: bool = True
    kernels: Callable[[], Sequence[str]] = lambda: ("cpp", "triton")


def define(package: str, schema: str, fake: Callable[..., Any] | None, *, triton: bool = True) -> None:
    """Register ``fastrex::<schema>`` with the dispatcher: Triton for CUDA tensors, and what shapes come out.

    The launcher has the operator's name and lives in ``kernel.py`` of ``package``; the first call imports Triton.
    Without ``triton`` there is none: the operator is one of CPUs. The C++ implementation registers itself when its
    library is loaded.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    if fake is not None:
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    if triton:
        _LIBRARY.impl(name, lambda *args, **kwargs: launcher(package, name)(*args, **kwargs), "CUDA")


def launcher(package: str, name: str) -> Callable[..., Any]:
    """The Triton launcher of a raw operator."""
    run: Callable[..., Any] = getattr(import_module(f"{package}.kernel"), name)
    return run


def raw(package: str, name: str, impl: str) -> Callable[..., Any]:
    """The raw operator ``name`` as ``impl`` ("cpp" or "triton", from :func:`choose`) runs it.

    Triton's interpreter works on CPU tensors, where the dispatcher would take C++: it is called directly.
    """
    if impl == "triton" and INTERPRETED:
        return launcher(package, name)
    run: Callable[..., Any] = getattr(torch.ops.fastrex, name).default
    return run


def in_cpp(name: str) -> bool:
    """Whether the C++ library has the raw operator ``name`` for this CPU: some are written for one instruction set."""
    found: bool = torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CPU")
    return found


# What torch.compiler.assume_constant_result does, which would import Dynamo (a second, and Triton) for every user.
in_cpp._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose(
    op: str,
    impl: str,
    like: Tensor,
    *,
    kernels: Sequence[str] = ("cpp", "triton"),
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16),
) -> str:
    """The implementation of ``op`` for tensors on the device and of the dtype of ``like``.

    ``auto``: Triton on CUDA, C++ on a CPU where it is built, and the reference for everything else. Any other name runs
    or raises, it never falls back.

    Raises:
        ValueError: ``impl`` is no known name, or cannot take such tensors.
        RuntimeError: this installation has no such implementation.
    """
    if impl not in IMPLS:
        raise ValueError(f"{op}: impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    device = like.device.type
    if impl == "auto":
        native = {"cuda": "triton", "cpu": "cpp"}.get(device, "")
        usable = native in kernels and like.dtype in dtypes and (_cpp.LOADED if native == "cpp" else _TRITON)
        return native if usable else "reference"
    if impl == "reference":
        return impl
    if impl not in kernels:
        known = ", ".join(("auto", "reference", *kernels))
        raise ValueError(f"{op}: impl must be one of {known} for this op, got {impl!r}")
    if like.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{op}: impl={impl!r} takes {names}, got {like.dtype}; use impl='reference'")
    if impl == "cpp":
        if device != "cpu":
            raise ValueError(f"{op}: impl='cpp' takes CPU tensors, got one on {like.device}")
        if not _cpp.LOADED:
            raise RuntimeError(f"{op}: impl='cpp' needs the C++ operators: {_cpp.REASON}")
    elif not _TRITON:
        raise RuntimeError(f"{op}: impl='triton' needs Triton: pip install triton")
    elif device != "cuda" and not (device == "cpu" and INTERPRETED):
        raise ValueError(f"{op}: impl='triton' takes CUDA tensors (or TRITON_INTERPRET=1), got one on {like.device}")
    return impl


def backend(device: str) -> str:
    """What ``impl="auto"`` runs on a device type ("cpu", "cuda", ...), with the reason where it is not the fast way."""
    if device == "cuda":
        return "Triton" if _TRITON else "reference (Triton is not installed)"
    if device == "cpu":
        return "C++" if _cpp.LOADED else f"reference ({_cpp.REASON})"
    return "reference"


def readable(tensor: Tensor) -> bool:
    """Whether a check may look at values: on a CPU, on a GPU with ``FASTREX_CHECK=1``, never in what is being traced
    or has no values of its own."""
    return (
        (tensor.device.type == "cpu" or (CHECK and tensor.device.type == "cuda"))
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of matrix products: autocast's where it is on, else the widest of the tensors'."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    widest = tensors[0].dtype
    for tensor in tensors[1:]:
        widest = torch.promote_types(widest, tensor.dtype)
    return widest
