"""Decode, cut and resize with NVIDIA DALI, on the CPU or a GPU; the only module that imports it.

DALI draws nothing here: images, boxes and sizes come with each request, so a batch is what the plan says.
"""

from __future__ import annotations

import shlex
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from ..errors import FastrexError

Bytes = NDArray[np.uint8]
# Adds the outputs to a DALI graph: (fn, types, decoded images, arguments) -> outputs.
Graph = Callable[[Any, Any, Any, Sequence[Any]], list[Any]]

DEPTH = 2  # requests inside DALI: one is waited for while the next one decodes


@dataclass(frozen=True)
class Request:
    """The encoded images of one batch and what to make of them.

    ``files`` are the bytes of B files, ``names`` their paths, for errors. ``arguments`` come from
    :func:`crop_arguments` or :func:`centre_arguments`.
    """

    names: Sequence[Path]
    files: Sequence[Bytes]
    arguments: Sequence[NDArray[Any]]


def crop_arguments(boxes: Sequence[NDArray[np.int32]]) -> list[NDArray[np.float32]]:
    """For :func:`crops`: two corners [B, 2] of each crop in turn, from boxes [K, B, 4] (top, left, height, width)."""
    corners: list[NDArray[np.float32]] = []
    for group in boxes:
        for crop in group.astype(np.float32):
            corners += [crop[:, :2], crop[:, :2] + crop[:, 2:]]
    return corners


def centre_arguments(heights: NDArray[Any], widths: NDArray[Any], resize: int, size: int) -> list[NDArray[Any]]:
    """For :func:`centre_crops`: resized shape and corner of the crop in it, [B, 2] each, from the images' shapes [B].

    As torchvision's Resize and CenterCrop: the short side becomes ``resize``, the long one
    ``int(resize * long / short)``; the corner is ``round(spare / 2)``. Where the image is smaller than the crop, zeros
    pad it on both sides, ``missing // 2`` of them first.
    """
    shape = np.stack((heights, widths), axis=1).astype(np.int64)
    resized = resize * shape // shape.min(axis=1, keepdims=True)
    spare = resized - size
    corner = np.where(spare < 0, -(-spare // 2), np.rint(spare / 2))
    return [resized.astype(np.float32), corner.astype(np.int32)]


def crops(
    requests: Iterator[Request],
    groups: Sequence[tuple[int, int]],
    *,
    batch_size: int,
    threads: int,
    device: torch.device,
    root: Path,
) -> Iterator[tuple[Request, tuple[Tensor, ...]]]:
    """Decode each image once as RGB, cut it at its boxes and resize with an antialiased cubic.

    That is Pillow's BICUBIC resize with ``box=``: the filter sees the pixels just outside the box.

    Args:
        requests: batches of at most ``batch_size`` images; pulled in this thread, ``DEPTH`` ahead of the results.
        groups: (crops per image K, side S) of each group.
        threads: of the decoder, at least 1. device: where to decode and cut. root: the image folder, for errors.

    Yields:
        The request, and for each group uint8 [K*B, S, S, 3], crop-major, in memory of its own.

    Raises:
        FastrexError: DALI is missing, or images cannot be decoded, which are named.
    """
    sides = [side for count, side in groups for _ in range(count)]

    def graph(fn: Any, types: Any, images: Any, corners: Sequence[Any]) -> list[Any]:
        how = {"interp_type": types.INTERP_CUBIC, "antialias": True}
        return [
            fn.resize(images, size=[side, side], roi_start=corners[2 * i], roi_end=corners[2 * i + 1], **how)
            for i, side in enumerate(sides)
        ]

    for request, outputs in _run(requests, graph, [np.float32] * 2 * len(sides), batch_size, threads, device, root):
        pieces = iter(outputs)
        yield request, tuple(_own([next(pieces) for _ in range(count)]) for count, _ in groups)


def centre_crops(
    requests: Iterator[Request], size: int, *, batch_size: int, threads: int, device: torch.device, root: Path
) -> Iterator[tuple[Request, Tensor]]:
    """Decode as RGB, resize with an antialiased linear filter, cut the centre: uint8 [B, size, size, 3].

    Arguments and errors as for :func:`crops`.
    """

    def graph(fn: Any, types: Any, images: Any, arguments: Sequence[Any]) -> list[Any]:
        resized = fn.resize(images, size=arguments[0], interp_type=types.INTERP_LINEAR, antialias=True)
        return [fn.slice(resized, start=arguments[1], shape=[size, size], axes=[0, 1], out_of_bounds_policy="pad")]

    for request, outputs in _run(requests, graph, [np.float32, np.int32], batch_size, threads, device, root):
        yield request, _own(outputs)


def _run(
    requests: Iterator[Request],
    graph: Graph,
    dtypes: Sequence[type[np.generic]],
    batch_size: int,
    threads: int,
    device: torch.device,
    root: Path,
) -> Iterator[tuple[Request, list[Tensor]]]:
    """Feed ``requests`` to a pipeline; yield each with its outputs, which are DALI's and live until the next one."""
    inside: deque[Request] = deque()

    def feed() -> Iterator[tuple[Any, ...]]:
        for request in requests:
            inside.append(request)
            yield (list(request.files), *(np.ascontiguousarray(argument) for argument in request.arguments))

    pipeline = _pipeline(feed(), graph, dtypes, batch_size, threads, device)
    while True:
        try:
            outputs = pipeline.run()
        except StopIteration:
            return
        except RuntimeError as error:
            if isinstance(error, FastrexError):
                raise
            raise _named(error, inside, root) from error
        yield inside.popleft(), [from_dlpack(output.as_tensor()) for output in outputs]


def _own(pieces: list[Tensor]) -> Tensor:
    """Joined along the rows in memory that DALI does not use again, complete when this returns."""
    joined = torch.cat(pieces)
    if joined.is_cuda:
        torch.cuda.current_stream(joined.device).synchronize()
    return joined


def _pipeline(
    feed: Iterator[tuple[Any, ...]],
    graph: Graph,
    dtypes: Sequence[type[np.generic]],
    batch_size: int,
    threads: int,
    device: torch.device,
    depth: int = DEPTH,
) -> Any:
    """One pipeline function for the CPU and for a GPU, where DALI decodes with its hybrid decoder."""
    dali, fn, types = _dali()
    gpu = device.type == "cuda"
    pipeline = dali.Pipeline(
        batch_size=batch_size,
        num_threads=threads,
        device_id=(device.index or 0) if gpu else None,
        prefetch_queue_depth=depth,
    )
    with pipeline:
        encoded, *arguments = fn.external_source(
            source=feed,
            num_outputs=1 + len(dtypes),
            batch=True,
            dtype=[types.UINT8, *(types.to_dali_type(np.dtype(dtype).name) for dtype in dtypes)],
            ndim=[1] * (1 + len(dtypes)),
        )
        # Only RGB: other output types corrupt memory on grey JPEGs. The CPU decoder always upsamples chroma as Pillow
        # does, the GPU's only when told to.
        options = {"device": "mixed", "jpeg_fancy_upsampling": True} if gpu else {"device": "cpu"}
        images = fn.decoders.image(encoded, output_type=types.RGB, **options)
        pipeline.set_outputs(*graph(fn, types, images, arguments))
    pipeline.build()
    return pipeline


def _dali() -> tuple[Any, Any, Any]:
    try:
        from nvidia import dali
        from nvidia.dali import fn, types
    except ImportError as error:
        fact = f"NVIDIA DALI, which decodes the images, cannot be imported ({error})"
        raise FastrexError(f"{fact}; pip install 'fastrex[train]'") from error
    return dali, fn, types


def _named(error: RuntimeError, inside: Sequence[Request], root: Path) -> RuntimeError:
    """The error to raise for a batch that failed: DALI does not say which file, so each one is decoded by itself."""
    bad = [
        name
        for request in inside
        for name, file in zip(request.names, request.files, strict=True)
        if not _decodes(file)
    ]
    if not bad:
        return RuntimeError(f"DALI failed, though each image of the batch decodes by itself: {error}")
    names = ", ".join(repr(str(name)) for name in dict.fromkeys(bad))
    return FastrexError(f"cannot decode {names}; {way_out(root)}")


def _decodes(file: Bytes) -> bool:
    pipeline = _pipeline(
        iter([([file],)]), lambda fn, types, images, arguments: [images], (), 1, 1, torch.device("cpu"), depth=1
    )
    try:
        pipeline.run()
    except RuntimeError:
        return False
    return True


def way_out(root: Path) -> str:
    """What a user can do about a file that went bad after it was indexed."""
    return (
        f"restore it to resume this run, or run `fastrex data index {shlex.quote(str(root))}` "
        "and start a new run with --init-from"
    )
